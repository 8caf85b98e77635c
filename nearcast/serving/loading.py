"""From a folder to a hot version: load, run real data until the times are known. Everything here blocks."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from nearcast.errors import MeshError
from nearcast.handler import Tensors
from nearcast.serving.engines import LoadedModel, Runner, load_engine
from nearcast.serving.golden import read_tensors, zeros
from nearcast.serving.heap import own_pages
from nearcast.serving.profile import Setting
from nearcast.serving.tuning import Profiles
from nearcast.store import Manifest, Store
from nearcast.store.contents import Contents

_LOG = logging.getLogger(__name__)
WARM_UP_RUNS_MAX = 32
WARM_UP_TIME_S = 0.01


class WarmUp(msgspec.Struct, frozen=True, kw_only=True):
    """What warming taught: batch-1 model times, the elements of the inputs they hold for, and a new sequence's time.

    Where one thread does all of a run its time is processor time: what the loop would lag by, whatever else the machine
    was doing while the version was loaded.

    Without data that the model accepts, `runs` is 0 and the times are unknown.
    """

    runs: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    elements: int = 1
    sequence_us: float = 0.0


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A version in memory that has run, and how it is to run here."""

    manifest: Manifest
    engine: LoadedModel
    warm_up: WarmUp
    load_s: float
    setting: Setting


def load_version(
    store: Store,
    model: str,
    release: int,
    default: Setting,
    profiles: Profiles | None = None,
    tenant_keys: Path | None = None,
) -> Loaded:
    """Load and warm one version.

    Args:
        store: where it lies.
        model: its name.
        release: its number.
        default: threads, and rows of a batch at most, where no profile advises others.
        profiles: what was measured on this machine; no profile has more rows than the default.
        tenant_keys: folder of the keys that open sealed versions.

    Raises:
        MeshError: if the version is not in the store, cannot be loaded, or fails on its own golden vectors.
    """
    started = time.perf_counter()
    manifest = store.manifest(model, release)
    contents = Contents(manifest, store.folder(model, release), tenant_keys=tenant_keys)
    advised = profiles.setting(manifest) if profiles is not None else None
    threads = (advised or default).threads
    rows_max = min(default.rows_max, (advised or default).rows_max)
    with own_pages():
        engine = load_engine(contents, threads=threads)
        try:
            vectors = [read_tensors(contents, vector.inputs) for vector in manifest.golden]
            warm_up = warm(engine, manifest, vectors, threads)
        except BaseException:
            engine.close()
            raise
    return Loaded(
        manifest=manifest,
        engine=engine,
        warm_up=warm_up,
        load_s=time.perf_counter() - started,
        setting=Setting(threads=threads, rows_max=rows_max),
    )


def warm(engine: LoadedModel, manifest: Manifest, vectors: list[dict[str, Any]], threads: int) -> WarmUp:
    """Run the vectors, or zeros, until times are stable: at most `WARM_UP_TIME_S`, or one run.

    The first run is not counted, unless it is the only one.

    Raises:
        MeshError: if the model fails on a golden vector. Zeros may be outside of what it takes, so they may fail.
    """
    inputs: list[Tensors] = [*vectors] or [zeros(manifest)]
    started = time.perf_counter()
    runner: Runner = engine.new_sequence() if manifest.stateful == "hidden" else engine
    sequence_us = (time.perf_counter() - started) * 1e6
    busy_s = time.thread_time if threads == 1 else time.perf_counter
    busy_before = busy_s()
    try:
        runner.run(inputs[0])
    except MeshError:
        if vectors:
            raise
        _LOG.warning("%s release %d could not be warmed with zeros", manifest.name, manifest.release)
        return WarmUp(sequence_us=sequence_us)
    first_s = busy_s() - busy_before
    # A slow model's second run would tell little, and a request may wait for this load.
    times = [first_s * 1e6] if first_s > WARM_UP_TIME_S / 2 else []
    until = time.perf_counter() + WARM_UP_TIME_S
    for tensors in itertools.cycle(() if times else inputs):
        before, busy_before = time.perf_counter(), busy_s()
        runner.run(tensors)
        times.append((busy_s() - busy_before) * 1e6)
        after = time.perf_counter()
        if len(times) >= WARM_UP_RUNS_MAX or 2 * after - before > until:  # another run would end too late
            break
    times.sort()
    return WarmUp(
        runs=len(times),
        p50_us=times[len(times) // 2],
        p99_us=times[round(0.98 * (len(times) - 1))],
        elements=max(1, min(sum(array.size for array in each.values()) for each in inputs)),
        sequence_us=sequence_us,
    )
