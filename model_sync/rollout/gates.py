"""The hard gate of a rollout: too many nodes that tried the candidate have thrown it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from model_sync.rollout.report import ModelReport

Trying: TypeAlias = Literal["no", "yes", "failed"]


def trying(report: ModelReport, candidate: int, intent: int) -> Trying:
    """Whether a node tries the candidate of a trial that began with document `intent`.

    A node that threw the same release out in an earlier trial, and has not obeyed this one yet, says nothing about it.
    """
    if candidate in (report.candidate, report.stable, report.goal):
        return "yes"
    return "failed" if candidate in report.quarantined and report.intent >= intent else "no"


def failed_gate(nodes: Iterable[Trying], *, share_min: float, nodes_min: int) -> str:
    """Why the rollout must stop, or "": at least `nodes_min` nodes failed, and at least `share_min` of those that try.

    Both are asked for: one broken node of two is no verdict, nor are two broken nodes of a thousand.
    """
    tried = [one for one in nodes if one != "no"]
    failed = tried.count("failed")
    if failed >= nodes_min and failed >= share_min * len(tried):
        return f"{failed} of {len(tried)} nodes that tried it have it in quarantine"
    return ""
