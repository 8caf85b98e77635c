"""When a node takes over a release that is ready, so that a fleet does not turn over all at once."""

from __future__ import annotations

from model_sync.replica.state import Memory, Want
from model_sync.replica.wave import seed
from nearcast.store.pointer import Pointer


def wait_for_turn_s(node: str, memory: Memory, pointer: Pointer, want: Want | None, spread_s: float) -> float:
    """Seconds, uniform over the nodes in [0, `spread_s`), that this node waits with the goal of `memory`.

    0 for what must not wait: the first release, a return to an older one, and for what need not: a candidate, whose
    nodes are drawn by wave, and a candidate that becomes stable, which serves already.
    """
    goal = memory.goal
    if goal is None or memory.slot == "candidate" or pointer.stable is None or goal.release == pointer.candidate:
        return 0.0
    if (want is not None and want.rollback) or goal.release <= (memory.committed or 0):
        return 0.0
    return seed(node, goal.sha256) * spread_s
