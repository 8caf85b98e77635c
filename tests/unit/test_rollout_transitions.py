"""The table of what may happen to a channel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_sync.rollout.document import ChannelDocument, Pick
from model_sync.rollout.transitions import Action, Command, apply, find_rollout
from nearcast.errors import Code, MeshError


def pick(release: int) -> Pick:
    return Pick(release=release, manifest_sha256=f"{release:064x}")


def command(action: Action, release: int | None = None, **facts: object) -> Command:
    chosen = None if release is None else pick(release)
    return Command(channel="main", model="digits", action=action, pick=chosen, **facts)  # type: ignore[arg-type]


def play(*commands: Command) -> ChannelDocument:
    document = None
    for each in commands:
        document = apply(document, each)
    assert document is not None
    return document


def test_first_stable_starts_the_channel() -> None:
    document = play(command("stable", 1))
    assert (document.channel, document.intent) == ("main", 1)
    rollout = find_rollout(document, "digits")
    assert rollout is not None
    assert rollout.stable == pick(1)
    assert rollout.candidate is None
    assert not rollout.rollback


def test_candidate_then_promote() -> None:
    trial = play(command("stable", 1), command("candidate", 2, share=0.2, wave=0.5, salt="s"))
    rollout = find_rollout(trial, "digits")
    assert rollout is not None
    assert (rollout.stable, rollout.candidate, rollout.share, rollout.wave, rollout.salt) == (
        pick(1), pick(2), 0.2, 0.5, "s",
    )  # fmt: skip
    rollout = find_rollout(apply(trial, command("promote")), "digits")
    assert rollout is not None
    assert (rollout.stable, rollout.candidate, rollout.share, rollout.wave) == (pick(2), None, 0.0, 1.0)


def test_widening_a_trial_keeps_its_salt() -> None:
    document = play(
        command("stable", 1), command("candidate", 2, share=0.2, salt="s"), command("candidate", 2, share=0.6, salt="t")
    )
    rollout = find_rollout(document, "digits")
    assert rollout is not None
    assert (rollout.share, rollout.salt) == (0.6, "s")


def test_stop_removes_the_candidate() -> None:
    document = play(command("stable", 1), command("candidate", 2, share=0.2, salt="s"), command("stop"))
    rollout = find_rollout(document, "digits")
    assert rollout is not None
    assert (rollout.stable, rollout.candidate, rollout.share, rollout.salt) == (pick(1), None, 0.0, "")


def test_rollback_only_to_a_listed_release() -> None:
    document = play(command("stable", 1), command("stable", 2), command("stable", 3))
    with pytest.raises(MeshError) as caught:
        apply(document, command("rollback", 1, rollback_ok=frozenset({2})))
    assert caught.value.code is Code.FORBIDDEN
    rollout = find_rollout(apply(document, command("rollback", 2, rollback_ok=frozenset({2, 1}))), "digits")
    assert rollout is not None
    assert rollout.stable == pick(2)
    assert rollout.rollback


def test_rollback_to_stable_ends_the_trial() -> None:
    document = play(command("stable", 1), command("candidate", 2, share=0.2, salt="s"), command("rollback", 1))
    rollout = find_rollout(document, "digits")
    assert rollout is not None
    assert (rollout.stable, rollout.candidate, rollout.rollback) == (pick(1), None, False)


def test_rollback_ends_the_trial_too() -> None:
    document = play(
        command("stable", 1),
        command("stable", 2),
        command("candidate", 3, share=0.2, salt="s"),
        command("rollback", 1, rollback_ok=frozenset({1})),
    )
    rollout = find_rollout(document, "digits")
    assert rollout is not None
    assert (rollout.stable, rollout.candidate, rollout.rollback) == (pick(1), None, True)


def test_rollback_stays_said_until_the_channel_is_at_the_newest_release() -> None:
    back = play(command("stable", 3), command("rollback", 1, rollback_ok=frozenset({1}), newest=3))
    trial = apply(back, command("candidate", 2, share=0.5, salt="s", newest=3))
    promoted = apply(trial, command("promote", newest=3))
    newer = apply(promoted, command("stable", 4, newest=4))
    said = [find_rollout(document, "digits").rollback for document in (back, trial, promoted, newer)]  # type: ignore[union-attr]
    assert said == [True, True, True, False]


@pytest.mark.parametrize(
    ("history", "refused", "code"),
    [
        ([], command("candidate", 1, share=0.2, salt="s"), Code.CONFLICT),
        ([], command("rollback", 1), Code.CONFLICT),
        ([], command("promote"), Code.CONFLICT),
        ([], command("stable"), Code.INVALID_REQUEST),
        ([command("stable", 2)], command("stable", 2), Code.CONFLICT),
        ([command("stable", 2)], command("stable", 1), Code.CONFLICT),
        ([command("stable", 2)], command("promote"), Code.CONFLICT),
        ([command("stable", 2)], command("stop"), Code.CONFLICT),
        ([command("stable", 2)], command("candidate", 1, share=0.2, salt="s"), Code.CONFLICT),
        ([command("stable", 2)], command("candidate", 3, share=0.0, salt="s"), Code.INVALID_REQUEST),
        ([command("stable", 2)], command("candidate", 3, share=0.2, wave=1.5, salt="s"), Code.INVALID_REQUEST),
        ([command("stable", 2)], command("candidate", 3, share=0.2), Code.INVALID_REQUEST),
        ([command("stable", 2)], command("rollback", 3, rollback_ok=frozenset({3})), Code.CONFLICT),
        ([command("stable", 2)], command("rollback", 2), Code.CONFLICT),
        ([command("stable", 1), command("candidate", 2, share=0.1, salt="s")], command("stable", 3), Code.CONFLICT),
        (
            [command("stable", 1), command("candidate", 2, share=0.1, salt="s")],
            command("candidate", 3, share=0.1, salt="t"),
            Code.CONFLICT,
        ),
        ([command("stable", 1), command("candidate", 2, share=0.1, salt="s")], command("promote", 3), Code.CONFLICT),
    ],
)
def test_refusals(history: list[Command], refused: Command, code: Code) -> None:
    document = play(*history) if history else None
    with pytest.raises(MeshError) as caught:
        apply(document, refused)
    assert caught.value.code is code


def test_another_channel_is_refused() -> None:
    document = play(command("stable", 1))
    with pytest.raises(MeshError):
        apply(document, Command(channel="beta", model="digits", action="stable", pick=pick(2)))


COMMANDS = st.builds(
    Command,
    channel=st.just("main"),
    model=st.sampled_from(["digits", "wake"]),
    action=st.sampled_from(["stable", "candidate", "promote", "stop", "rollback"]),
    pick=st.none() | st.integers(1, 6).map(pick),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    salt=st.sampled_from(["", "s", "t"]),
    newest=st.just(6),
    rollback_ok=st.frozensets(st.integers(1, 6)),
)


@given(st.lists(COMMANDS, max_size=30))
def test_any_history_keeps_the_invariants(history: list[Command]) -> None:
    document: ChannelDocument | None = None
    for each in history:
        before = document
        try:
            document = apply(before, each)
        except MeshError:
            assert document is before
            continue
        assert document.intent == (before.intent if before else 0) + 1
        assert [entry.model for entry in document.rollouts] == sorted({entry.model for entry in document.rollouts})
        old, new = find_rollout(before, each.model), find_rollout(document, each.model)
        assert new is not None
        if new.candidate is not None:
            assert new.candidate.release > new.stable.release
            assert new.salt
            assert new.share > 0
        else:
            assert (new.share, new.wave) == (0.0, 1.0)
        if old is not None and new.stable.release < old.stable.release:
            assert new.rollback
            assert each.action == "rollback"
            assert new.stable.release in each.rollback_ok
        for entry in document.rollouts:
            if entry.model != each.model:
                assert entry == find_rollout(before, entry.model)
