"""Who gets a certificate for which name: the pure rules, the register, the CA."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_node.broker.access import access_list, claim_names, holder_name
from edge_node.broker.provisioning import Claim, Holder, ProvisioningLimits, QuestionRate, require_grant, wanted_name
from edge_node.broker.tenant import TenantAuthority, hold, is_running
from edge_node.config import EdgeConfig
from nearcast.config import load_config
from nearcast.errors import Code, MeshError
from nearcast.identity.authority import make_plain_csr, public_key_fingerprint
from nearcast.identity.device import DeviceIdentity, Place, require_certificate
from nearcast.identity.node import RENEW_AT
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.provisioning import (
    BODY_SIZE_BYTES_MAX,
    CertificateRequest,
    answer_topic,
    certificate_topic,
    read_request,
    request_message,
    requester,
)

LIMITS = ProvisioningLimits()
NOW = 1_800_000_000.0
NAMES = st.from_regex(r"[a-z0-9_-]{1,57}", fullmatch=True).filter(lambda name: name not in ("node", "dlq"))


class Wall:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def refused(call, *arguments) -> Code:
    with pytest.raises(MeshError) as refusal:
        call(*arguments)
    return refusal.value.code


def open_claim(**changes) -> Claim:
    return Claim(**{"name": "claim+1", "expires_at": NOW + 60, **changes})


# -- the rules --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(NAMES)
def test_a_claim_for_a_name_makes_nobody_else(name):
    claim = open_claim(holder=name)
    assert wanted_name("claim+1", "another", claim) == name
    assert wanted_name("claim+1", name, open_claim()) == name
    assert wanted_name("claim+1", name, open_claim(kind="reader")) == f"reader+{name}"
    assert wanted_name(name, "another", None) == name  # who renews stays who it is


@pytest.mark.parametrize("name", ["", "node", "dlq", "a/b", "claim+1", "UPPER", "a" * 65])
def test_nobody_is_called_like_something_else(name):
    assert refused(wanted_name, "claim+1", name, open_claim()) is Code.INVALID_REQUEST


@pytest.mark.parametrize("asker", ["claim+1", "node+worker", "node+registrar"])
def test_who_has_no_claim_gets_nothing(asker):
    assert refused(wanted_name, asker, "d1", None) is Code.FORBIDDEN


def grant(claim, holder, *, key="k", now=NOW):
    return require_grant(key, claim, holder, now, LIMITS)


def test_a_claim_is_spent_once_and_a_lost_answer_costs_nothing():
    assert grant(open_claim(), Holder(name="d1"))
    held = Holder(name="d1", keys=frozenset({"k"}), certificates=1)
    assert not grant(open_claim(uses_left=0), held)
    assert refused(grant, open_claim(uses_left=0), Holder(name="d2")) is Code.FORBIDDEN
    assert refused(lambda: grant(open_claim(), Holder(name="d2"), now=NOW + 60)) is Code.FORBIDDEN


def test_a_name_in_use_is_given_to_no_other_key():
    held = Holder(name="d1", keys=frozenset({"other"}), certificates=1)
    assert refused(grant, open_claim(holder="d1"), held) is Code.CONFLICT


def test_a_former_name_is_given_again_only_by_its_own_claim_and_when_the_broker_has_forgotten_it():
    former = Holder(name="d1", free_at=NOW - 1)
    assert grant(open_claim(holder="d1"), former)
    assert refused(grant, open_claim(), former) is Code.CONFLICT
    assert refused(grant, open_claim(holder="d1"), Holder(name="d1", free_at=NOW + 1)) is Code.OVERLOADED
    assert refused(grant, open_claim(holder="d1"), Holder(name="d1", free_at=NOW - 1, purged=False)) is Code.OVERLOADED


def test_who_renews_needs_a_certificate_that_holds_and_not_too_many():
    assert not grant(None, Holder(name="d1", keys=frozenset({"old"}), certificates=1))
    assert refused(grant, None, Holder(name="d1", free_at=NOW)) is Code.FORBIDDEN
    many = Holder(name="d1", certificates=LIMITS.certificates_per_holder_max)
    assert refused(grant, None, many) is Code.OVERLOADED


@given(st.lists(st.floats(0, 60), min_size=1, max_size=60))
def test_an_asker_is_heard_a_burst_and_then_at_the_stated_rate(pauses):
    rate, now, heard = QuestionRate(LIMITS), 0.0, []
    for pause in pauses:
        now += pause
        try:
            rate.require("a", now)
            heard.append(now)
        except MeshError:
            pass
    for start in range(len(heard)):
        for end in range(start, len(heard)):
            allowed = LIMITS.question_burst + (heard[end] - heard[start]) / LIMITS.question_interval_s
            assert end - start + 1 <= allowed + 1e-6
    assert heard[0] == pauses[0]


def test_askers_are_forgotten_beyond_their_number():
    rate = QuestionRate(ProvisioningLimits(askers_max=10))
    for number in range(1000):
        rate.require(f"a{number}", 0.0)
    assert len(rate._due) == 10


# -- topics and bodies ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.one_of(NAMES, st.sampled_from(["claim+17", "reader+dash-1"])))
def test_the_topic_says_who_asks(name):
    assert requester(certificate_topic("acme", name)) == name
    assert answer_topic("acme", name).startswith("nc/v1/acme/")
    assert "+" not in answer_topic("acme", name)


@given(st.text(max_size=80))
def test_no_other_topic_names_an_asker(text):
    if "/" in text or not text:
        assert requester(f"nc/v1/acme/{text}/up/certificate") == ""
    assert requester(text) == ""


@settings(max_examples=50)
@given(st.binary(max_size=300))
def test_what_is_no_question_is_refused(payload):
    try:
        assert isinstance(read_request(payload), CertificateRequest)
    except MeshError as error:
        assert error.code is Code.INVALID_REQUEST


def test_a_question_has_a_bounded_size():
    message = request_message("acme", "d1", CertificateRequest(csr="x", id="7"))
    assert read_request(message.payload).id == "7"
    assert message.correlation == b"7"
    assert isinstance(message, Message)
    assert refused(read_request, b" " * (BODY_SIZE_BYTES_MAX + 1)) is Code.TOO_LARGE


def test_whoever_is_no_device_has_a_name_that_no_pattern_is_applied_to():
    text = access_list("acme", claims_max=2, readers=["reader+dash"])
    users = [line.removeprefix("user ") for line in text.splitlines() if line.startswith("user ")]
    assert users == ["node+worker", "node+doctor", "node+registrar", "claim+0", "claim+1", "reader+dash"]
    assert all("+" in user for user in users)
    patterns = [
        line for line in text.splitlines() if line.startswith("pattern write") or "readwrite nc/v1/acme/%u" in line
    ]
    assert patterns
    assert all("nc/v1/acme/%u/" in line for line in patterns)
    assert set(claim_names(2)) == {"claim+0", "claim+1"}
    assert holder_name("device", "d1") == "d1"


# -- the authority and its register -----------------------------------------------------------------------------------


@pytest.fixture
def wall():
    return Wall()


@pytest.fixture
def authority(tmp_path, wall):
    opened = TenantAuthority.create(tmp_path / "acme", "acme", clock=wall)
    opened.move("mqtts://127.0.0.1:8883")
    yield opened
    opened.close()


def issue(authority, asker, wanted=""):
    key, csr = make_plain_csr()
    name, certificate = authority.issue(asker, wanted, csr)
    require_certificate(certificate, ca=authority.ca_pem, key=key, name=name)
    return x509.load_pem_x509_certificate(certificate), csr


def invite(authority, folder, *, name="", kind="device", uses=1, life_s=3600.0):
    return authority.invite(folder, name=name, kind=kind, uses=uses, life_s=life_s).place.name


def crl_of(authority):
    authority.write_rights(authority.registry.rights())
    return x509.load_pem_x509_crl((authority.folder / "revoked.pem").read_bytes())


def test_a_claim_becomes_a_device_whose_life_ends_a_third_after_its_renewal(authority, tmp_path):
    claim = DeviceIdentity.load(authority.invite(tmp_path / "c", name="d1", kind="device", uses=1, life_s=60).folder)
    certificate, csr = issue(authority, claim.place.name, "ignored")
    assert certificate.subject.rfc4514_string() == "CN=d1"
    again, _ = authority.issue(claim.place.name, "", csr)
    assert again == "d1"
    assert refused(issue, authority, claim.place.name) is Code.CONFLICT
    life_s = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()
    assert life_s * (1 - RENEW_AT) > 2 * 48 * 3600  # twice the longest outage that devices are to outlast
    assert [(row.name, row.state) for row in authority.listing()] == [(claim.place.name, "used"), ("d1", "valid")]


def test_revoking_names_every_certificate(authority, wall):
    claim = invite(authority, authority.folder / "c", name="d1")
    first, _ = issue(authority, claim)
    renewed, _ = issue(authority, "d1")
    assert len(crl_of(authority)) == 0
    assert authority.revoke("d1") == 2
    after = crl_of(authority)
    assert {entry.serial_number for entry in after} == {first.serial_number, renewed.serial_number}
    assert after.last_update_utc.timestamp() < wall.now < after.next_update_utc.timestamp()
    assert after.is_signature_valid(x509.load_pem_x509_certificate(authority.ca_pem).public_key())
    rights = authority.registry.rights()
    assert rights.denied == ("d1",)
    assert rights.unpurged == ("d1",)
    assert refused(issue, authority, "d1") is Code.FORBIDDEN
    assert refused(authority.revoke, "d2") is Code.INVALID_REQUEST


def test_a_revoked_name_is_given_again_once_the_broker_has_forgotten_its_holder(authority):
    issue(authority, invite(authority, authority.folder / "c", name="d1"))
    authority.revoke("d1")
    again = invite(authority, authority.folder / "c2", name="d1")
    assert refused(issue, authority, again) is Code.OVERLOADED
    authority.registry.purged("d1")
    issue(authority, again)
    assert authority.registry.rights().denied == ()


def test_an_expired_certificate_takes_the_rights_and_a_right_clock_gives_them_back(authority, wall):
    issue(authority, invite(authority, authority.folder / "c", name="d1"))
    known = authority.registry.version()
    wall.now += LIMITS.certificate_life_s + 1
    assert authority.registry.version() != known
    assert authority.registry.rights().denied == ("d1",)
    wall.now = NOW + 1  # the clock had been wrong
    assert authority.registry.rights().denied == ()


def test_claims_and_devices_have_a_bound(tmp_path, wall):
    limits = ProvisioningLimits(claims_max=2, holders_max=2)
    authority = TenantAuthority.create(tmp_path / "acme", "acme", limits=limits, clock=wall)
    authority.move("mqtts://127.0.0.1:8883")
    claim = invite(authority, tmp_path / "c1", uses=3, life_s=60)
    second = invite(authority, tmp_path / "c2", name="d3", life_s=600)
    assert {claim, second} == {"claim+0", "claim+1"}
    assert refused(lambda: invite(authority, tmp_path / "c3", name="d4")) is Code.OVERLOADED
    issue(authority, claim, "d1")
    issue(authority, claim, "d2")
    assert refused(issue, authority, claim, "d3") is Code.OVERLOADED
    wall.now += 61
    assert refused(lambda: invite(authority, tmp_path / "c4", name="d4")) is Code.OVERLOADED
    authority.registry.purged(claim)  # whoever held it is known to be gone
    assert invite(authority, tmp_path / "c5", name="d4") == claim
    assert refused(lambda: invite(authority, tmp_path / "c5", name="d4")) is Code.CONFLICT
    authority.close()


@pytest.mark.parametrize(("uses", "life_s", "name"), [(0, 60, ""), (2, 60, "d1"), (1, 0, ""), (1, 10**9, "")])
def test_a_claim_with_a_bad_number_is_refused(authority, uses, life_s, name):
    folder = authority.folder / "c"
    assert refused(lambda: invite(authority, folder, name=name, uses=uses, life_s=life_s)) is Code.INVALID_REQUEST


def test_another_tenant_s_certificate_is_nobody_s(authority, tmp_path):
    other = TenantAuthority.create(tmp_path / "umbrella", "umbrella")
    key, csr = make_plain_csr()
    name, certificate = authority.issue(invite(authority, tmp_path / "c", name="d1"), "", csr)
    place = Place(url="mqtts://127.0.0.1:1", tenant="umbrella", name=name)
    with pytest.raises(MeshError) as untrusted:
        DeviceIdentity.write(tmp_path / "d1", place, ca=other.ca_pem, certificate=certificate, key=key)
    assert untrusted.value.code is Code.UNTRUSTED
    identity = DeviceIdentity.write(tmp_path / "d1", place, ca=authority.ca_pem, certificate=certificate, key=key)
    identity.key.chmod(0o644)
    assert refused(DeviceIdentity.load, tmp_path / "d1") is Code.UNAUTHENTICATED
    identity.key.chmod(0o600)
    identity.key.write_bytes(make_plain_csr()[0])
    assert refused(DeviceIdentity.load, tmp_path / "d1") is Code.UNTRUSTED
    other.close()


def test_only_one_node_runs_on_a_tenant(authority):
    assert not is_running(authority.folder)
    descriptor = hold(authority.folder)
    assert is_running(authority.folder)
    assert refused(hold, authority.folder) is Code.CONFLICT
    os.close(descriptor)
    assert refused(TenantAuthority.open, authority.folder / "none") is Code.INVALID_REQUEST


def test_each_tenant_has_one_broker_and_local_has_no_certificates():
    def configured(*brokers):
        tables = ", ".join("{" + f'tenant = "{name}"' + "}" for name in brokers)
        return load_config(EdgeConfig, overrides=[f"mqtt.tenant_brokers=[{tables}]"]).value.mqtt.tenant_brokers

    assert [each.tenant for each in configured("acme", "umbrella")] == ["acme", "umbrella"]
    for wrong in (("acme", "acme"), ("local",), ("UPPER",)):
        assert refused(configured, *wrong) is Code.INVALID_REQUEST


class Names(RuleBasedStateMachine):
    """At no time two keys hold the same name, whatever is invited, asked, revoked, expired and forgotten."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.wall = Wall()
        self.limits = ProvisioningLimits(certificate_life_s=100.0, reuse_after_s=10.0, claims_max=4, holders_max=3)
        self.authority = TenantAuthority.create(self.folder / "t", "t", limits=self.limits, clock=self.wall)
        self.authority.move("mqtts://127.0.0.1:1")
        self.claims: list[str] = []
        self.made = 0
        self.csrs = [make_plain_csr()[1] for _ in range(3)]
        self.held: dict[str, list[tuple[str, float]]] = {}

    @rule(name=st.sampled_from(["", "a", "b"]), uses=st.integers(1, 2))
    def invite(self, name, uses):
        self.made += 1
        try:
            folder = self.folder / f"c{self.made}"
            self.claims.append(invite(self.authority, folder, name=name, uses=1 if name else uses, life_s=50.0))
        except MeshError as error:
            assert error.code is Code.OVERLOADED

    @rule(which=st.integers(0, 5), wanted=st.sampled_from(["a", "b", "c"]), key=st.integers(0, 2))
    def ask(self, which, wanted, key):
        asker = self.claims[which % len(self.claims)] if self.claims and which < 4 else wanted
        try:
            name, _ = self.authority.issue(asker, wanted, self.csrs[key])
        except MeshError:
            return
        fingerprint = public_key_fingerprint(self.csrs[key])
        keys = {held for held, _ in self.living(name)}
        if asker != name:  # a claim never gives a living name to another key
            assert keys <= {fingerprint}
        self.held.setdefault(name, []).append((fingerprint, self.wall.now + 100.0))

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def revoke(self, name):
        try:
            self.authority.revoke(name)
            self.held.pop(name, None)
        except MeshError:
            assert not self.living(name)

    @rule(seconds=st.floats(0.5, 60))
    def wait(self, seconds):
        self.wall.now += seconds
        for name in self.authority.registry.rights().unpurged:
            self.authority.registry.purged(name)

    def living(self, name):
        return [pair for pair in self.held.get(name, ()) if pair[1] > self.wall.now + 1]

    @invariant()
    def who_is_denied_holds_nothing(self):
        if hasattr(self, "authority"):
            denied = self.authority.registry.rights().denied
            assert not [name for name in denied if self.living(name)]

    def teardown(self):
        if hasattr(self, "authority"):
            self.authority.close()
            shutil.rmtree(self.folder)


TestNames = Names.TestCase
TestNames.settings = settings(max_examples=5, stateful_step_count=15, deadline=None)


def test_plain_certificates_say_no_more_than_the_name(authority):
    certificate, _ = issue(authority, invite(authority, authority.folder / "c", name="d1"))
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [identifier.dotted_string for identifier in usage] == ["1.3.6.1.5.5.7.3.2"]  # a client, never a server
    assert certificate.public_bytes(serialization.Encoding.PEM).startswith(b"-----BEGIN")
