"""Many runs at once: every policy on the same draws, seeds spread over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence

from simulations.experiment import Run, run
from simulations.scenario import Scenario

Task = tuple[Scenario, int, tuple[str, ...]]


def replicate(
    scenarios: Iterable[Scenario],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[tuple[str, str], list[Run]]:
    """Runs by scenario and policy, in the order of the seeds. `progress` hears how many parts are done, of how many."""
    tasks = [(scenario, seed, tuple(policies)) for scenario in scenarios for seed in seeds]
    found: dict[tuple[str, str], list[Run]] = {}
    processes = min(len(tasks), processes or os.cpu_count() or 1)
    if processes <= 1:
        for done, task in enumerate(tasks):
            _collect(found, _work(task))
            progress(done + 1, len(tasks))
        return found
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, runs in enumerate(pool.imap(_work, tasks)):
            _collect(found, runs)
            progress(done + 1, len(tasks))
    return found


def _work(task: Task) -> list[Run]:
    scenario, seed, policies = task
    return [run(scenario, policy, seed) for policy in policies]


def _collect(found: dict[tuple[str, str], list[Run]], runs: list[Run]) -> None:
    for each in runs:
        found.setdefault((each.scenario, each.policy), []).append(each)
