"""What an operator reads of a trial; nothing that a node reports can steer the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from nearcast.cli.rollout_view import view

RELEASE = {"requests": 1000, "errors": 5, "p50_ms": 1.5, "p99_ms": 4.25, "compared": 0, "disagreed": 0}
FINDING = {"progress": 0.25, "candidate_share": 0.01, "candidate_requests": 100, "stable_share": 0.01}


def shown(**fields: Any) -> str:
    rollout = {
        "model": "digits", "stable": 3, "candidate": 4, "wave": 0.25, "share": 0.1, "rollback": False, "reason": "",
        "by": "ann", "at": 1000.0, "states": {"IDLE": 2}, "stable_nodes": {"3": 2}, "candidate_nodes": 1,
        "received_bytes": 1_500_000, "releases": {"3": RELEASE, "4": {**RELEASE, "compared": 50, "disagreed": 1}},
        "trial": {"reason": "", "findings": {"errors": FINDING}}, "quarantined": [], "errors": {},
    } | fields  # fmt: skip
    status = {
        "channel": "stable", "intent": 7, "auto_stop": False, "reporting": 2, "silent": ["edge-9"],
        "rollouts": [rollout],
    }  # fmt: skip
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(view(status, 1090.0), highlight=False)
    return capture.get()


def test_a_running_trial() -> None:
    text = shown()
    for words in (
        "channel stable  intent 7  nodes reporting 2  silent 1: edge-9", "by ann 2 min ago",
        "share 10% of the requests",
        "wave 25% of the nodes", "0.50%", "2.00% of 50", "IDLE 2", "candidate on 1", "1.5 MB received",
        "███░░░░░░░░░ 25%", "no reason to stop",
    ):  # fmt: skip
        assert words in text, words


def test_a_failed_trial_and_a_quarantine() -> None:
    verdict = {"reason": "9.00% of 100 requests fail", "findings": {"errors": {**FINDING, "progress": 1.7}}}
    bans = [{"release": 4, "nodes": 2, "reasons": ["it fails \x1b[2J and [bold]shouts[/bold]"]}]
    text = shown(trial=verdict, quarantined=bans)
    assert "FAILED: 9.00% of 100 requests fail; stop it: nearcast rollout stop" in text
    assert "4 on 2 nodes: it fails \N{REPLACEMENT CHARACTER}[2J and [bold]shouts[/bold]" in text
    assert "\x1b" not in text


def test_without_a_trial_or_reports() -> None:
    nothing = dict.fromkeys(RELEASE, 0)
    text = shown(candidate=None, trial=None, releases={"3": nothing}, states={}, received_bytes=0)
    assert "no reports yet" in text
    assert "trial" not in text
    assert "nothing reported of both releases yet" in shown(trial=None)
