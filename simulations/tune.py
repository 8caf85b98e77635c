"""`python -m simulations.tune [SCENARIO...]`: the live policy beside its yardsticks, on the tuning seeds only."""

from __future__ import annotations

import sys

from simulations.experiment import LIVE, baselines
from simulations.replicate import replicate
from simulations.report import summarize
from simulations.scenario import TUNING_SEEDS, load_scenario, scenario_names


def main(names: list[str]) -> None:
    """Print p99, in ms, of the live policy, the queue oracle and the best baseline; all scenarios if none is named."""
    scenarios = [load_scenario(name) for name in names or scenario_names()]
    policies = (LIVE, "queue-oracle", *baselines())
    found = replicate(scenarios, policies, TUNING_SEEDS)
    print("scenario             p99  in time  hedges   10 s  /oracle  /best  best baseline")
    for scenario in scenarios:
        rows = {policy: summarize(scenario, found[scenario.name, policy]) for policy in policies}
        live = rows[LIVE]
        best = min((rows[name] for name in baselines()), key=lambda row: row.p99_ms.value)
        print(
            f"{scenario.name:16} {live.p99_ms.value:7.1f} {live.slo_share.value:8.2%} {live.hedge_share:7.2%} "
            f"{live.hedge_share_max:6.1%}  {live.p99_ms.value / rows['queue-oracle'].p99_ms.value:7.2f} "
            f"{live.p99_ms.value / best.p99_ms.value:6.2f}  {best.policy} {best.p99_ms.value:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
