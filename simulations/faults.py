"""What goes wrong, and when."""

from __future__ import annotations

from collections.abc import Callable

from simulations.fleet import HANDSHAKE, Job
from simulations.mesh import Mesh
from simulations.scenario import Fault


def schedule_faults(mesh: Mesh) -> None:
    """Have every fault of the scenario begin and end."""
    for fault in mesh.scenario.faults:
        for name in fault.nodes:
            for begin_s, end_s in fault.windows_s:
                FAULTS[fault.kind](mesh, fault, name, begin_s, end_s)


def _slow(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    mesh.world.at(begin_s, setattr, mesh.nodes[name], "slowdown", fault.value)
    mesh.world.at(end_s, setattr, mesh.nodes[name], "slowdown", 1.0)


def _slots(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    node = mesh.nodes[name]
    mesh.world.at(begin_s, node.set_slots, int(fault.value))
    mesh.world.at(end_s, node.set_slots, node.spec.slots)


def _rtt(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    link = mesh.links[name]
    mesh.world.at(begin_s, setattr, link, "rtt_s", fault.value / 1e3)
    mesh.world.at(end_s, setattr, link, "rtt_s", link.rtt_s)


def _fail(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    mesh.world.at(begin_s, setattr, mesh.nodes[name], "fails_after_s", fault.value / 1e3)
    mesh.world.at(end_s, setattr, mesh.nodes[name], "fails_after_s", None)


def _cut(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    link = mesh.links[name]
    mesh.world.at(begin_s, link.cut)
    mesh.world.at(begin_s + fault.value / 1e3, link.lose)
    mesh.world.at(end_s, link.mend)


def _stale(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    mesh.world.at(begin_s, mesh.report_age_s.__setitem__, name, fault.value)
    mesh.world.at(end_s, mesh.report_age_s.__setitem__, name, 0.0)


def _lie(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    mesh.world.at(begin_s, setattr, mesh.nodes[name], "lies_s", fault.value / 1e3)
    mesh.world.at(end_s, setattr, mesh.nodes[name], "lies_s", None)


def _crowd(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    """Its requests are part of the workload."""


def _handshakes(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    random, node = mesh.world.stream(f"handshakes/{name}"), mesh.nodes[name]

    def connect() -> None:
        node.submit(Job(fault.handshake_ms / 1e3, 0.0, None, HANDSHAKE))

    for _ in range(int(fault.value)):
        mesh.world.at(random.uniform(begin_s, end_s), connect)


def _cold(mesh: Mesh, fault: Fault, name: str, begin_s: float, end_s: float) -> None:
    node, load_s = mesh.nodes[name], fault.load_ms / 1e3
    mesh.world.at(begin_s, node.cold_s.__setitem__, fault.model, load_s)
    mesh.world.at(max(begin_s, end_s - load_s), node.bring_in, fault.model)


FAULTS: dict[str, Callable[[Mesh, Fault, str, float, float], None]] = {
    "slow": _slow,
    "slots": _slots,
    "rtt": _rtt,
    "fail": _fail,
    "cut": _cut,
    "stale": _stale,
    "lie": _lie,
    "crowd": _crowd,
    "handshakes": _handshakes,
    "cold": _cold,
}
