"""What a pipeline is told of a push, read from the controller's own description of a channel."""

from __future__ import annotations

from typing import Any

import pytest

from model_sync.controller.config import SyncLimits
from model_sync.controller.reports import Reports
from model_sync.publisher.outcome import Result, judge
from model_sync.publisher.push import Pushed
from model_sync.rollout.document import ChannelDocument, Pick, Rollout
from model_sync.rollout.report import ModelReport, SyncReport
from model_sync.rollout.trial import TrialLimits

DIGEST = "0" * 64
PUSHED = Pushed(
    model="digits", release=2, channel="stable", action="candidate", intent=7, serial=9, is_published=True,
    uploaded_bytes=1, rollback_ok=(1,),
)  # fmt: skip


def described(*reports: ModelReport | None, stable: int = 1, candidate: int | None = 2) -> dict[str, Any]:
    """Node n says the n-th; None = it follows the channel and has nothing to say of the model yet."""
    rollout = Rollout(
        model="digits",
        stable=Pick(release=stable, manifest_sha256=DIGEST),
        candidate=Pick(release=candidate, manifest_sha256=DIGEST) if candidate else None,
        share=0.1 if candidate else 0.0,
        reason="a rollback" if candidate is None and stable == 1 else "",
    )
    document = ChannelDocument(channel="stable", intent=7, rollouts=(rollout,))
    book = Reports(TrialLimits(), SyncLimits())
    book.follow("stable", document)
    for index, report in enumerate(reports):
        models = () if report is None else (report,)
        book.take(0.0, SyncReport(node=f"n{index}", channel="stable", epoch="e", sequence=1, at=1.0, models=models), 10)
    return {"rollouts": [book.describe("stable", rollout)]}


def says(state: str = "IDLE", *, candidate: int | None = 2, intent: int = 7, **more: Any) -> ModelReport:
    return ModelReport(model="digits", state=state, stable=1, candidate=candidate, intent=intent, **more)


REFUSAL = says(candidate=None, quarantined=(2,), reasons={"2": "output y differs"})


@pytest.mark.parametrize(
    ("reports", "result", "counts"),
    [
        ((), "waiting", (0, 0, 0)),
        ((None,), "waiting", (1, 0, 0)),
        ((says(),), "holding", (1, 1, 0)),
        ((says(), None), "waiting", (2, 1, 0)),
        ((says(), says(candidate=None)), "holding", (2, 1, 0)),
        ((says(), says(candidate=None, intent=6)), "waiting", (2, 1, 0)),
        ((says(), says("FETCH", candidate=None, goal=2)), "waiting", (2, 1, 0)),
        ((says("PROBATION"),), "waiting", (1, 1, 0)),
        ((says(), says("HOLD", candidate=None, error="The disk is full")), "waiting", (2, 1, 0)),
        ((says(candidate=None),), "waiting", (1, 0, 0)),
        ((says(), REFUSAL), "refused", (2, 1, 1)),
        ((REFUSAL,), "refused", (1, 0, 1)),
        ((says("GATE", candidate=None), REFUSAL), "waiting", (2, 0, 1)),
    ],
)
def test_every_node_must_have_said_something(
    reports: tuple[ModelReport | None, ...], result: Result, counts: tuple[int, int, int]
) -> None:
    outcome = judge(described(*reports), PUSHED)
    assert (outcome.result, (outcome.nodes, outcome.holding, outcome.refused)) == (result, counts)


def test_reasons_are_the_nodes_own_words() -> None:
    assert judge(described(says(), REFUSAL), PUSHED).reasons == ("output y differs",)
    held = says("HOLD", candidate=None, error="The disk is full")
    assert judge(described(says(), held), PUSHED).reasons == ("The disk is full",)


def test_a_trial_that_ended_is_seen() -> None:
    ended = judge(described(says(candidate=None), candidate=None), PUSHED)
    assert (ended.result, ended.reasons) == ("stopped", ("a rollback",))
    assert judge({"rollouts": []}, PUSHED).result == "stopped"
    promoted = described(ModelReport(model="digits", state="IDLE", stable=2, intent=8), stable=2, candidate=None)
    assert (judge(promoted, PUSHED).result, judge(promoted, PUSHED).holding) == ("holding", 1)
