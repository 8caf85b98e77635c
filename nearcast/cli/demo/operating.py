"""Scene 5: a candidate gets a share of the requests, and one command takes it back, while requests flow."""

from __future__ import annotations

import asyncio
import time

from nearcast.cli.demo.asking import DigitsThroughRouter
from nearcast.cli.demo.samples import load_digits
from nearcast.cli.demo.stage import Stage
from nearcast.cli.demo.traffic import Traffic

RATE_PER_S = 200.0
SHARE = 0.2
OBSERVED = 600
SHARE_TOLERANCE = 0.07
"""Four standard errors of a 20 % share in 600 answers."""
ROLLBACK_S_MAX = 1.0
AFTER_ROLLBACK_S = 1.5


async def play(stage: Stage) -> None:
    """Canary, split proved by outputs and by version, rollback."""
    stage.title(
        5, f"Release 2 of digits goes to a {SHARE:.0%} canary; then one command rolls it back while requests flow"
    )
    digits = load_digits()
    await stage.operate(
        "push", str(stage.folder / "bundles" / "digits-2"), "--channel", "stable", "--share", str(SHARE)
    )
    async with (
        DigitsThroughRouter(stage, digits.disputed) as ask,
        Traffic("grpc.aio", ask, rate_per_s=RATE_PER_S) as traffic,
    ):
        took = await stage.until(
            lambda: _has_candidate(traffic), timeout_s=20.0, what="The first answer of the candidate"
        )
        stage.say(f"the candidate answers {took:.1f} s after the push")
        mark = time.monotonic()
        await stage.until(
            lambda: _counted(traffic, mark, OBSERVED), timeout_s=30.0, what=f"{OBSERVED} answers during the canary"
        )
        judge_split(stage, traffic, mark)
        stage.console.print(await stage.operate("rollout", "status"), highlight=False)
        began = time.monotonic()
        await stage.operate("rollback", "digits", "--to", "1", "--channel", "stable")
        await asyncio.sleep(AFTER_ROLLBACK_S)
    judge_rollback(stage, traffic, began)


def judge_split(stage: Stage, traffic: Traffic, mark: float) -> None:
    """The share in the versions, and that outputs agree with what the versions claim."""
    answers = [s.answer for s in traffic.samples if s.answer is not None and s.sent_at >= mark]
    second = [answer for answer in answers if answer.version == "2"]
    says = {version: {a.says for a in answers if a.version == version} for version in ("1", "2")}
    share = len(second) / max(1, len(answers))
    stage.say(f"on the disputed image release 1 says {_join(says['1'])}, release 2 says {_join(says['2'])}")
    stage.check(
        f"about {SHARE:.0%} of the answers come from release 2",
        ok=abs(share - SHARE) <= SHARE_TOLERANCE,
        detail=f"{len(second)} of {len(answers)} = {share:.1%}",
    )
    distinct = len(says["1"]) == len(says["2"]) == 1 and says["1"] != says["2"]
    stage.check("outputs prove it: each release gives its own answer", ok=distinct)


def judge_rollback(stage: Stage, traffic: Traffic, began: float) -> None:
    """No failure, and no late answer from the candidate."""
    late = [s.done_at - began for s in traffic.samples if s.answer is not None and s.answer.version == "2"]
    last_s = max([0.0, *late])
    stage.check(
        f"no answer from release 2 later than {ROLLBACK_S_MAX:g} s after the command's start",
        ok=last_s <= ROLLBACK_S_MAX,
        detail=f"last one after {last_s:.2f} s",
    )
    failures = traffic.failures
    stage.check(
        "no request failed during canary and rollback",
        ok=not failures,
        detail=f"{len(failures)} of {len(traffic.samples)}" + (f", first: {failures[0].error}" if failures else ""),
    )
    stage.observe(traffic)


async def _has_candidate(traffic: Traffic) -> bool:
    return traffic.versions()["2"] > 0


async def _counted(traffic: Traffic, mark: float, count: int) -> bool:
    return sum(traffic.versions(mark).values()) >= count


def _join(values: set[str]) -> str:
    return ", ".join(sorted(values)) or "nothing"
