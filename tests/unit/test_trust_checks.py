"""What may be installed: two roles that agree, no falling release, no quarantined manifest, a believable time."""

from __future__ import annotations

import hashlib

import pytest

from model_sync.rollout.document import Pick
from model_sync.trust.admission import Ban, Standing, require_not_banned, require_not_older
from model_sync.trust.vouching import TargetFacts, require_digest, vouched
from nearcast.clock_floor import AHEAD_S_MAX, BUILD_TIME, effective_now, raise_floor
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import File, Manifest, Tensor

A, B = "a" * 64, "b" * 64
PICK = Pick(release=2, manifest_sha256=A)


def manifest(name: str = "digits", release: int = 2) -> Manifest:
    tensor = Tensor(name="x", datatype="FP32", shape=(1,))
    file = File(path="m.onnx", size_bytes=0, sha256=A, chunks=())
    return Manifest(
        name=name, release=release, semver="1.0.0", engine="onnxruntime", model_file="m.onnx", files=(file,),
        inputs=(tensor,), outputs=(tensor,), licence="MIT",
    )  # fmt: skip


def test_two_roles_that_agree() -> None:
    vouched("digits", PICK, TargetFacts(sha256=A, size_bytes=10), manifest())


@pytest.mark.parametrize(
    ("target", "content", "text"),
    [
        (None, None, "no models role vouches for it"),
        (TargetFacts(sha256=B, size_bytes=10), None, "the rollout picks manifest aaaaaaaaaaaa"),
        (TargetFacts(sha256=A, size_bytes=10), manifest(name="other"), "describes other release 2"),
        (TargetFacts(sha256=A, size_bytes=10), manifest(release=3), "describes digits release 3"),
    ],
)
def test_two_roles_that_do_not(target: TargetFacts | None, content: Manifest | None, text: str) -> None:
    with pytest.raises(MeshError, match=text) as caught:
        vouched("digits", PICK, target, content)
    assert caught.value.code is Code.UNTRUSTED


def test_digests() -> None:
    require_digest("it", b"data", hashlib.sha256(b"data").hexdigest())
    with pytest.raises(MeshError, match="instead of the signed"):
        require_digest("it", b"datb", hashlib.sha256(b"data").hexdigest())


@pytest.mark.parametrize(
    ("release", "rollback", "allowed"),
    [
        (5, False, True),
        (6, False, True),
        (4, False, False),
        (4, True, True),
        (3, True, True),
        (2, True, False),
        (1, True, True),
        (1, False, False),
    ],
)
def test_the_release_counter_falls_only_by_a_listed_rollback(release: int, rollback: bool, allowed: bool) -> None:
    standing = Standing(floor=5, stable=5, last_good=1, rollback_ok=(3, 4))
    if allowed:
        require_not_older("digits", release, standing, rollback=rollback)
        return
    with pytest.raises(MeshError) as caught:
        require_not_older("digits", release, standing, rollback=rollback)
    assert caught.value.code is Code.UNTRUSTED
    assert ("`nearcast rollback`" in caught.value.message) is not rollback


def test_a_fresh_node_takes_any_release() -> None:
    require_not_older("digits", 1, Standing(), rollback=False)


@pytest.mark.parametrize(
    ("sha256", "intent", "salt", "allowed"),
    [(A, 3, "s", False), (A, 4, "s", False), (A, 3, "t", False), (A, 4, "t", True), (B, 3, "s", True)],
)
def test_quarantine_ends_with_a_new_rollout_alone(sha256: str, intent: int, salt: str, allowed: bool) -> None:
    bans = [Ban(sha256=A, release=2, intent=3, salt="s", reason="it crashed.")]
    if allowed:
        require_not_banned("digits", sha256, bans, intent=intent, salt=salt)
        return
    with pytest.raises(MeshError, match="in quarantine here because it crashed"):
        require_not_banned("digits", sha256, bans, intent=intent, salt=salt)


def test_time_is_never_before_the_floor() -> None:
    assert effective_now(1000.0, BUILD_TIME).now == BUILD_TIME
    assert effective_now(1000.0, BUILD_TIME).trusted
    assert "behind" in effective_now(1000.0, BUILD_TIME).reason
    assert effective_now(BUILD_TIME + 5.0, BUILD_TIME).now == BUILD_TIME + 5.0
    assert effective_now(BUILD_TIME + 5.0, BUILD_TIME).reason == ""


def test_a_clock_far_ahead_is_not_believed() -> None:
    reading = effective_now(BUILD_TIME + AHEAD_S_MAX + 1, BUILD_TIME)
    assert not reading.trusted
    assert reading.now == BUILD_TIME
    assert raise_floor(BUILD_TIME, reading) == BUILD_TIME


def test_the_floor_rises_in_steps_and_never_falls() -> None:
    floor = float(BUILD_TIME)
    assert raise_floor(floor, effective_now(floor + 10.0, floor)) == floor
    assert raise_floor(floor, effective_now(floor + 7200.0, floor)) == floor + 7200.0
    assert raise_floor(floor, effective_now(0.0, floor)) == floor
