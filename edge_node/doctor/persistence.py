"""Whether a broker keeps what an offline device has not heard yet: in its session, and on its disk."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edge_node.doctor.findings import DoctorLimits, Finding, Status, Subject
from edge_node.doctor.player import playing
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.message import Message

_LOOK_INTERVAL_S = 0.05
_AUTOSAVE_DEFAULT_S = 1800.0
_ADVICE = "Set `persistence true`, a `persistence_location` that it may write, and `autosave_interval 5`."


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where a Mosquitto saves its sessions; `path` None = nowhere. `interval_s`: how often."""

    path: Path | None
    interval_s: float = _AUTOSAVE_DEFAULT_S


def read_store(text: str) -> Store:
    """What a `mosquitto.conf` says about it (mosquitto.conf(5): without `persistence true` nothing is saved)."""
    words: Mapping[str, str] = dict(
        line.split(maxsplit=1) for line in map(str.strip, text.splitlines()) if " " in line and not line.startswith("#")
    )
    if words.get("persistence", "false").strip() != "true":
        return Store(path=None)
    name = words.get("persistence_file", "mosquitto.db").strip()
    folder = words.get("persistence_location", "").strip()
    try:
        interval_s = float(words.get("autosave_interval", _AUTOSAVE_DEFAULT_S))
    except ValueError:
        interval_s = _AUTOSAVE_DEFAULT_S
    if words.get("autosave_on_changes", "false").strip() == "true":
        interval_s = 1.0  # then the interval counts changes, and ours are few
    return Store(path=Path(folder) / name, interval_s=interval_s)


async def find_persistence(subject: Subject, limits: DoctorLimits) -> Finding:
    """Leave a session, have a message sent to it, see it on the disk, and come back for it.

    Raises:
        MeshError: UNAVAILABLE if the broker does not let us in.
    """
    if not subject.plays_node:
        return _finding("skip", "without a certificate of the node's nothing can be sent to a sleeping device")
    store = None if subject.broker_config is None else read_store(_read(subject.broker_config))
    if store is not None and store.path is None:
        return _finding("fail", f"{subject.broker_config} saves nothing: a crash loses every queued message", _ADVICE)
    topic = topics.node_topic(subject.tenant, f"doctor-{subject.device}"[:64], "state")
    marker = secrets.token_hex(16).encode()
    async with playing(subject, "sleeper", subject.device_tls, limits, session_expiry_s=limits.session_expiry_s) as one:
        await one.connection.subscribe(topic)
    async with playing(subject, "node", subject.node_tls, limits) as node:
        await node.confirmed(Message(topic=topic, payload=marker))
    saved = None if store is None else await _is_saved(store, marker, limits)
    async with playing(subject, "sleeper", subject.device_tls, limits, session_expiry_s=1) as one:
        heard = await one.hears(lambda message: message.payload == marker, limits.silence_s)
    if heard is None:
        return _finding("fail", "a device that comes back does not get what was said meanwhile", _ADVICE)
    return _judge(store, saved=saved, limits=limits)


def _judge(store: Store | None, *, saved: bool | None, limits: DoctorLimits) -> Finding:
    if store is None:
        told = "sessions are kept while the broker runs; whether a restart loses them cannot be seen from here"
        return _finding("warn", told, "Name its configuration with --broker-config.")
    if saved:
        return _finding("ok", f"saved to {store.path} within {store.interval_s:g} s")
    if store.interval_s > limits.autosave_max_s:
        told = f"a crash loses what was queued in the last {store.interval_s:g} s"
        return _finding("warn", told, "Set `autosave_interval 5`.")
    return _finding("fail", f"{store.path} does not hold what was queued {store.interval_s:g} s ago", _ADVICE)


async def _is_saved(store: Store, marker: bytes, limits: DoctorLimits) -> bool:
    if store.path is None or store.interval_s > limits.autosave_max_s:
        return False
    clock = asyncio.get_running_loop().time
    until = clock() + store.interval_s + limits.autosave_margin_s
    while clock() < until:
        if marker in await asyncio.to_thread(_read_bytes, store.path):
            return True
        await asyncio.sleep(_LOOK_INTERVAL_S)
    return False


def _finding(status: Status, detail: str, advice: str = "") -> Finding:
    return Finding(check="persistence", status=status, detail=detail, advice=advice)


def _read(path: Path) -> str:
    return _read_bytes(path).decode(errors="replace")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
