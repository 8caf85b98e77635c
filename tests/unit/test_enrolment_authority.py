"""Who may join: one use, a limited time, one owner per name, and removal that lasts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_sync.controller.enrolment import CERTIFICATES_PER_NAME_MAX, EnrolmentAuthority, certificate_sha256
from nearcast.clock import ManualClock
from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, make_csr

DAY_S = 86_400.0


class Mesh:
    """An authority and its clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.authority = CertificateAuthority.create(folder / "ca", clock=self.clock)
        self.open()

    def open(self) -> None:
        self.enrolment = EnrolmentAuthority(self.folder / "control.db", clock=self.clock.wall, invites_max=5)

    def enrol(self, secret: str) -> bytes:
        return self.enrolment.enrol(secret, make_csr("any", "edge")[1], self.authority)[0]

    def join(self, name: str) -> bytes:
        return self.enrol(self.enrolment.invite(name, "edge", 60.0, 1)[0])

    def counts(self, certificate: bytes, name: str = "e1", role: str = "edge") -> bool:
        try:
            self.enrolment.require_member(name, role, certificate_sha256(certificate))
        except MeshError as error:
            assert error.code is Code.FORBIDDEN
            return False
        return True


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(tmp_path)
    yield made
    made.enrolment.close()


def code_of(caught: pytest.ExceptionInfo[MeshError]) -> Code:
    return caught.value.code


def test_a_secret_is_spent_by_its_first_use_even_after_a_restart(mesh: Mesh) -> None:
    secret, _ = mesh.enrolment.invite("e1", "edge", 60.0, 7)
    certificate, root_version = mesh.enrolment.enrol(secret, make_csr("e1", "edge")[1], mesh.authority)
    assert root_version == 7
    assert mesh.counts(certificate)
    assert not mesh.counts(certificate, role="cloud")
    assert not mesh.counts(certificate, name="e2")
    mesh.enrolment.close()
    mesh.open()
    assert mesh.counts(certificate)
    with pytest.raises(MeshError, match="used already") as caught:
        mesh.enrol(secret)
    assert code_of(caught) is Code.FORBIDDEN


def test_a_secret_expires(mesh: Mesh) -> None:
    secret, expires_at = mesh.enrolment.invite("e1", "edge", 60.0, 1)
    assert expires_at == mesh.clock.wall() + 60.0
    mesh.clock.advance(60.0)
    with pytest.raises(MeshError, match="expired") as caught:
        mesh.enrol(secret)
    assert code_of(caught) is Code.FORBIDDEN
    mesh.enrolment.invite("e1", "edge", 60.0, 1)


def test_a_bad_request_does_not_spend_the_secret(mesh: Mesh) -> None:
    secret, _ = mesh.enrolment.invite("e1", "edge", 60.0, 1)
    with pytest.raises(MeshError) as caught:
        mesh.enrolment.enrol(secret, b"no request", mesh.authority)
    assert code_of(caught) is Code.INVALID_REQUEST
    assert mesh.counts(mesh.enrol(secret))


def test_a_name_has_one_owner_until_it_is_removed_or_expired(mesh: Mesh) -> None:
    old = mesh.join("e1")
    with pytest.raises(MeshError) as caught:
        mesh.enrolment.invite("e1", "edge", 60.0, 1)
    assert code_of(caught) is Code.CONFLICT
    mesh.enrolment.remove("e1")
    assert not mesh.counts(old)
    new = mesh.join("e1")
    assert mesh.counts(new)
    assert not mesh.counts(old)
    mesh.clock.advance(7 * DAY_S + 1)
    assert mesh.counts(mesh.join("e1"))


def test_removal_cancels_an_open_invitation(mesh: Mesh) -> None:
    secret, _ = mesh.enrolment.invite("e1", "edge", 60.0, 1)
    mesh.enrolment.remove("e1")
    with pytest.raises(MeshError) as caught:
        mesh.enrol(secret)
    assert code_of(caught) is Code.UNAUTHENTICATED
    with pytest.raises(MeshError) as caught:
        mesh.enrolment.remove("e1")
    assert code_of(caught) is Code.MODEL_NOT_FOUND


def test_renewals_keep_the_newest_certificates(mesh: Mesh) -> None:
    certificates = [mesh.join("e1")]
    for _ in range(CERTIFICATES_PER_NAME_MAX):
        mesh.clock.advance(1.0)
        certificates.append(mesh.enrolment.renew("e1", "edge", make_csr("e1", "edge")[1], mesh.authority))
    assert [mesh.counts(certificate) for certificate in certificates] == [False] + [True] * CERTIFICATES_PER_NAME_MAX
    (member,) = mesh.enrolment.members()
    assert (member.name, member.expires_at) == ("e1", mesh.clock.wall() + 7 * DAY_S)


def test_open_invitations_are_bounded(mesh: Mesh) -> None:
    for index in range(5):
        mesh.enrolment.invite(f"e{index}", "edge", 60.0, 1)
    with pytest.raises(MeshError) as caught:
        mesh.enrolment.invite("one-more", "edge", 60.0, 1)
    assert code_of(caught) is Code.OVERLOADED
    mesh.clock.advance(61.0)
    mesh.enrolment.invite("one-more", "edge", 60.0, 1)


def test_removed_names_are_told_while_a_certificate_of_theirs_lasts(mesh: Mesh) -> None:
    for name in ("e1", "e2", "e3"):
        mesh.join(name)
    mesh.enrolment.invite("e4", "edge", 60.0, 1)
    assert mesh.enrolment.removed() == []
    mesh.clock.advance(DAY_S)
    for name in ("e2", "e1", "e4"):
        mesh.enrolment.remove(name)
    mesh.enrolment.close()
    mesh.open()
    assert mesh.enrolment.removed() == ["e1", "e2"]
    mesh.join("e2")
    assert mesh.enrolment.removed() == ["e1"]
    mesh.clock.advance(6 * DAY_S - 1)
    assert mesh.enrolment.removed() == ["e1"]
    mesh.clock.advance(1)
    assert mesh.enrolment.removed() == []
