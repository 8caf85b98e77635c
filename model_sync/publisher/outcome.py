"""What became of a push: asks the controller until every node that follows the channel has said so, or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.push import Pushed

POLL_S = 1.0
WAIT_S_MAX = 86_400.0
REASONS_MAX = 8
_SETTLED = "IDLE"
Result: TypeAlias = Literal["holding", "refused", "stopped", "waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where a release stands on the nodes of a channel.

    Attributes:
        result: `holding`: every node has obeyed and none refused it. `refused`: at least one node did. `stopped`: the
            channel picks it no longer. `waiting`: a node has not obeyed yet, or none has reported.
        nodes: that follow the channel, as far as they report.
        holding: that have it. With a wave below 1 these are fewer.
        refused: that have it in quarantine.
        reasons: why, in the nodes' words, or why the trial ended.
    """

    result: Result
    nodes: int = 0
    holding: int = 0
    refused: int = 0
    reasons: tuple[str, ...] = ()


def judge(status: dict[str, Any], pushed: Pushed) -> Outcome:
    """Read the answer of `GET /v1/channels/{channel}/status`."""
    row = next((row for row in status["rollouts"] if row["model"] == pushed.model), None)
    if row is None or pushed.release not in (row["stable"], row["candidate"]):
        reason = row["reason"] if row is not None and row["reason"] else "the channel picks another release"
        return Outcome(result="stopped", reasons=(reason,))
    is_stable = row["stable"] == pushed.release
    holding = row["stable_nodes"].get(str(pushed.release), 0) if is_stable else row["candidate_nodes"]
    refusals = [entry for entry in row["quarantined"] if entry["release"] == pushed.release]
    refused = sum(entry["nodes"] for entry in refusals)
    reasons = [reason for entry in refusals for reason in entry["reasons"]] or list(row["errors"])
    obeyed = sum(count for intent, count in row["intents"].items() if int(intent) >= pushed.intent)
    settled = obeyed == row["following"] > 0 and set(row["states"]) == {_SETTLED}
    result: Result = "waiting"
    if settled and refused:
        result = "refused"
    elif settled and holding:
        result = "holding"
    return Outcome(
        result=result, nodes=row["following"], holding=holding, refused=refused, reasons=tuple(reasons[:REASONS_MAX])
    )


def wait_for_nodes(
    client: ControlClient, pushed: Pushed, wait_s: float, show: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Ask until there is an outcome, for at most `wait_s`; `show` hears of each state on the way."""
    deadline = time.monotonic() + min(wait_s, WAIT_S_MAX)
    while True:
        path = f"/v1/channels/{quote(pushed.channel, safe='')}/status?model={quote(pushed.model, safe='')}"
        outcome = judge(client.call("GET", path), pushed)
        show(outcome)
        left_s = deadline - time.monotonic()
        if outcome.result != "waiting" or left_s <= 0:
            return outcome
        time.sleep(min(POLL_S, left_s))
