"""A scenario as data: fleet, load, faults, objective. One TOML file each under `scenarios/`."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Annotated, Literal, TypeAlias

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.load import Tier

TUNING_SEEDS = (1, 2, 3, 4, 5)
"""Whoever sets a parameter of the policy looks at these runs only."""
JUDGED_SEEDS = (101, 102, 103, 104, 105, 106, 107, 108)
"""What `benchmarks scenarios` counts. Nobody tunes on them."""

MODEL, VERSION = "detector", "1"
Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
FaultKind: TypeAlias = Literal["slow", "slots", "rtt", "fail", "cut", "stale", "lie", "crowd", "handshakes", "cold"]


class NodeSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One node as the router sees it.

    Attributes:
        slots: runs that go on at the same time; all others wait, first come, first served.
        rtt_ms: there and back without waiting; `rtt_jitter` is the mean extra time as a share of it (exponential).
        service_ms: median of one run; `service_sigma` is the width of its lognormal noise.
        stall_share: share of runs that another process holds up for `stall_ms`.
        uplink_mbit_per_s: rate of the way there; large bodies share it one after the other.
        foreign_rps: requests per second that reach the node past our router.
        queue_max: requests that may wait; more are refused.
        memoryless: service times are exponential of mean `service_ms`, without stalls: for checks against theory.
    """

    name: str
    tier: Tier
    slots: Count = 4
    rtt_ms: NonNegative
    rtt_jitter: NonNegative = 0.05
    service_ms: Positive
    service_sigma: NonNegative = 0.2
    stall_share: Share = 0.01
    stall_ms: NonNegative = 150.0
    uplink_mbit_per_s: Positive = 1000.0
    foreign_rps: NonNegative = 0.0
    queue_max: Count = 256
    memoryless: bool = False

    @property
    def service_s(self) -> float:
        """Median of one run in seconds."""
        return self.service_ms / 1e3

    @property
    def service_mean_s(self) -> float:
        """Mean of one run in seconds, stalls included."""
        if self.memoryless:
            return self.service_s
        return self.service_s * math.exp(self.service_sigma**2 / 2.0) + self.stall_share * self.stall_ms / 1e3


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From `from_s` on `rate_rps` requests arrive per second (Poisson), until the next phase."""

    from_s: NonNegative = 0.0
    rate_rps: NonNegative


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A share of the requests; the shares of all classes sum to one. `from_s`: the class does not exist before."""

    share: Share = 1.0
    model: str = MODEL
    size_bytes: Count = 600
    priority: int = 0
    tenant: str = "local"
    from_s: NonNegative = 0.0


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What goes wrong at each of `nodes` during `windows_s`, and what `value` means.

    slow: runs that begin take `value` times as long. slots: only `value` slots are left; runs on the others fail.
    rtt: the round trip is `value` ms. fail: every request fails after `value` ms.
    cut: nothing passes, in flight or new; the connection counts as lost after `value` ms.
    stale: reports are `value` seconds old. lie: reports and trailers claim no load and `value` ms of service time.
    crowd: `value` more foreign requests per second.
    handshakes: `value` connections are made over the window, each holds a slot for `handshake_ms`.
    cold: `model` is not in memory; the agent brings it in within `load_ms`, to be ready when the window ends; a request
    that comes earlier has it brought in at once, and waits.
    """

    kind: FaultKind
    nodes: tuple[str, ...]
    windows_s: tuple[tuple[float, float], ...]
    value: NonNegative = 0.0
    model: str = MODEL
    load_ms: NonNegative = 0.0
    handshake_ms: NonNegative = 0.0


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One scenario. `slo_ms` is the objective, `deadline_ms` when the client hangs up; `why` says why these numbers.

    A client without an answer asks again, with a new deadline, up to `retries` times: after as long as it was told to
    wait, else after 100 ms, 200 ms, …, each time a fifth more or less. Its latency counts from the first try.
    Requests that arrive before `warmup_s` are served and not counted.
    """

    name: str
    title: str
    why: str
    duration_s: Positive
    warmup_s: NonNegative = 5.0
    slo_ms: Positive = 100.0
    deadline_ms: Positive = 500.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0
    nodes: tuple[NodeSpec, ...]
    load: tuple[Phase, ...]
    classes: tuple[RequestClass, ...] = (RequestClass(),)
    faults: tuple[Fault, ...] = ()

    @property
    def capacity_rps(self) -> float:
        """What all nodes serve together when nothing is wrong, foreign requests included."""
        return sum(node.slots / node.service_mean_s for node in self.nodes)

    def __post_init__(self) -> None:
        names = {node.name for node in self.nodes}
        unknown = {name for fault in self.faults for name in fault.nodes} - names
        if unknown:
            raise ValueError(f"faults name unknown nodes: {', '.join(sorted(unknown))}")
        if not self.nodes or len(names) < len(self.nodes):
            raise ValueError("a scenario needs nodes with names of their own")
        if abs(sum(kind.share for kind in self.classes) - 1.0) > 1e-6:
            raise ValueError("the shares of all classes must sum to 1")
        if not self.load or [phase.from_s for phase in self.load] != sorted({phase.from_s for phase in self.load}):
            raise ValueError("load needs phases in rising order")
        if any(not 0 <= begin < end for fault in self.faults for begin, end in fault.windows_s):
            raise ValueError("a window of a fault must end after it begins")


def scenario_names() -> tuple[str, ...]:
    """The scenarios that come with the package."""
    folder = files("simulations.scenarios")
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_scenario(name: str) -> Scenario:
    """Read one of `scenario_names()`.

    Raises:
        MeshError: INVALID_REQUEST if there is none of that name, or its file is not valid.
    """
    if name not in scenario_names():
        raise MeshError(
            Code.INVALID_REQUEST, f"There is no scenario {name!r}; choose one of {', '.join(scenario_names())}."
        )
    return parse_scenario(files("simulations.scenarios").joinpath(f"{name}.toml").read_bytes())


def parse_scenario(text: bytes) -> Scenario:
    """A scenario from TOML.

    Raises:
        MeshError: INVALID_REQUEST if the text is not valid.
    """
    try:
        return msgspec.toml.decode(text, type=Scenario)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The scenario is not valid: {error}.") from error
