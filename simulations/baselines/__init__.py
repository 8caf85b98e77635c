"""Published load balancers with their published parameters: what `router.policy` has to beat."""

from simulations.baselines.c3 import C3
from simulations.baselines.least_request import LeastRequest
from simulations.baselines.peak_ewma import PeakEwma
from simulations.baselines.prequal import Prequal
from simulations.baselines.priority import PriorityFailover
from simulations.baselines.round_robin import RoundRobin
from simulations.contract import Baseline

BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline for baseline in (RoundRobin, PriorityFailover, LeastRequest, PeakEwma, C3, Prequal)
}
"""By name, the plainest first."""

__all__ = ["BASELINES", "C3", "LeastRequest", "PeakEwma", "Prequal", "PriorityFailover", "RoundRobin"]
