"""Many runs at once: every policy on the same draws, seeds spread over processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

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
    found: dict[tuple[str, str], list[Run]] = {}
    for each in stream_runs(scenarios, policies, seeds, processes=processes, progress=progress):
        found.setdefault((each.scenario, each.policy), []).append(each)
    return found


def stream_runs(
    scenarios: Iterable[Scenario],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Iterator[Run]:
    """The same runs one by one, a scenario after the other, so that nobody has to hold them all."""
    processes = processes or os.cpu_count() or 1
    pairs = [(scenario, seed) for scenario in scenarios for seed in seeds]
    # The draws of a run are shared by the policies of one task; few tasks are split, so that all processes have one.
    parts = 1 if len(pairs) >= 2 * processes else min(processes, len(policies))
    tasks = [(scenario, seed, tuple(policies[part::parts])) for scenario, seed in pairs for part in range(parts)]
    if min(processes, len(tasks)) <= 1:
        for done, task in enumerate(tasks):
            yield from _work(task)
            progress(done + 1, len(tasks))
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        for done, runs in enumerate(pool.imap(_work, tasks)):
            yield from runs
            progress(done + 1, len(tasks))


def _work(task: Task) -> list[Run]:
    scenario, seed, policies = task
    return [run(scenario, policy, seed) for policy in policies]
