"""Real models served by nearcast, grpc.aio, MLServer and Triton's core, side by side, beside the bare engine.

Every server is pinned to one core and the load tool to another; every engine has one thread that does not spin. Before
a server is measured its outputs are compared with the engine's, alone and sixteen at once: a wrong one is no row.
`python -m benchmarks.serving_table` prints the last run as a Markdown table.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import has_h2load
from benchmarks.rows import Row
from benchmarks.serving_load import Load, as_json, load
from benchmarks.serving_models import Workload, fill_store, workloads
from benchmarks.serving_peers import Candidate, Loop, foreign, ours, time_loop
from benchmarks.serving_requests import WrongAnswerError, prepare
from nearcast.serving.engines import LoadedModel, load_engine
from nearcast.store.contents import Contents

RESULTS = Path(__file__).parent / "results"
OWN = "nearcast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One server in one configuration under one load, and the bare engine just before."""

    model: str
    server: str
    setting: str
    transport: str
    concurrency: int
    loop: Loop
    load: Load

    @property
    def share(self) -> float:
        """Throughput over that of the in-process loop."""
        return self.load.requests_per_s * self.loop.loop_us / 1e6

    @property
    def cpu_share(self) -> float:
        """The same by processor time, which a busy machine distorts less."""
        return self.loop.cpu_us / self.load.cpu_us


def run(*, quick: bool) -> list[Row]:
    """Every model on every server; the bars are ratios within this run."""
    if not has_h2load():
        return [Row("serving.skipped_no_h2load", 1, "", "install nghttp2-client to measure")]
    rows: list[Row] = []
    measured: list[Measured] = []
    for workload in workloads():
        try:
            model = workload.make()
        except Exception as error:  # noqa: BLE001 - without the model there is no row, and its bars read as missed
            rows.append(Row(f"serving.{workload.name}_missing", 1, "", str(error)[:200]))
            continue
        with tempfile.TemporaryDirectory() as folder:
            found, problems = measure_model(workload, model, Path(folder), quick=quick)
        measured += found
        rows += problems
    keep_raw(measured, quick=quick)
    return rows + judge(measured) + [_row(each) for each in best(measured)]


def measure_model(workload: Workload, model: bytes, root: Path, *, quick: bool) -> tuple[list[Measured], list[Row]]:
    """All servers on one model, each round beside the loop."""
    store = fill_store(root, workload, model)
    engine = load_engine(Contents(store.manifest(workload.name, 1), store.folder(workload.name, 1)), threads=1)
    own = [ours(workload, root / "store", "ngh2"), ours(workload, root / "store", "aio")]
    if workload.name == "silero":
        own.insert(1, ours(workload, root / "store", "ngh2", batch_rows_max=1))
    measured: list[Measured] = []
    problems: list[Row] = []
    loop = None
    for round_number in range(1 if quick else 3):
        others = foreign(workload, root / "source" / "model.onnx", quick=quick) if round_number == 0 else []
        for candidate in [*own, *others]:
            if loop is None or not quick:
                loop = time_loop(root / "store", workload)
            try:
                measured += measure(workload, engine, candidate, root, loop, quick=quick)
            except (RuntimeError, WrongAnswerError) as error:
                if candidate.server == OWN:
                    raise
                name = f"serving.no_row.{workload.name}.{candidate.server}"
                problems.append(Row(name, 1, "", f"{candidate.setting}: {str(error)[-300:]}"))
    return measured, problems


def measure(
    workload: Workload, engine: LoadedModel, candidate: Candidate, root: Path, loop: Loop, *, quick: bool
) -> Iterator[Measured]:
    """One server under each load."""
    seconds = 0.5 if quick else 3.0
    with tempfile.TemporaryDirectory(dir=root) as folder, candidate.start(Path(folder)) as places:
        for transport in candidate.transports[: 1 if quick and candidate.server != OWN else None]:
            request = prepare(workload, engine, candidate, places, transport)
            for concurrency in _loads(workload, candidate, transport, quick=quick):
                seen = load(request, concurrency=concurrency, seconds=seconds, pid=places["pid"])
                yield Measured(
                    model=workload.name,
                    server=candidate.server,
                    setting=candidate.setting,
                    transport=transport,
                    concurrency=concurrency,
                    loop=loop,
                    load=seen,
                )


def _loads(workload: Workload, candidate: Candidate, transport: str, *, quick: bool) -> tuple[int, ...]:
    """Requests in flight. A quick run keeps what the bars need and what compares peers where they differ most."""
    if candidate.setting == "batch 1":
        return (64,)
    if not quick:
        return (1, 16, 64)
    if workload.name == "image" and candidate.server == OWN and transport == "grpc":
        return (1, 16)
    return (1, 64) if workload.name == "silero" and transport == "grpc" else (1,)


def best(measured: list[Measured]) -> list[Measured]:
    """Of each server, model, transport and load: the middle round of the setting with the highest throughput."""
    middle = [_middle(measured, each) for each in measured]
    found: dict[tuple[str, ...], Measured] = {}
    for each in middle:
        if each.setting == "batch 1":
            continue
        key = (each.model, each.transport, str(each.concurrency), each.server)
        if key not in found or each.load.requests_per_s > found[key].load.requests_per_s:
            found[key] = each
    return list(found.values())


def _middle(measured: list[Measured], like: Measured) -> Measured:
    same = [
        each
        for each in measured
        if (each.model, each.server, each.setting, each.transport, each.concurrency)
        == (like.model, like.server, like.setting, like.transport, like.concurrency)
    ]
    return sorted(same, key=lambda each: each.load.requests_per_s)[len(same) // 2]


def judge(measured: list[Measured]) -> list[Row]:
    """The bars of the issue: shares of the loop by the middle of the rounds, and who is behind whom."""

    def own(model: str, concurrency: int, setting: str = "default") -> list[Measured]:
        return [
            each
            for each in measured
            if (each.server, each.transport, each.model, each.concurrency, each.setting)
            == (OWN, "grpc", model, concurrency, setting)
        ]

    def share(name: str, found: list[Measured], note: str) -> list[Row]:
        if not found:
            return []
        note += f"; by processor time {statistics.median(each.cpu_share for each in found):.2f}"
        return [Row(name, statistics.median(each.share for each in found), "x", note)]

    rows = share("serving.silero_unbatched_share_of_loop", own("silero", 64, "batch 1"), "64 in flight, no batching")
    rows += share("serving.silero_batched_share_of_loop", own("silero", 64), "64 in flight")
    rows += share("serving.magika_c1_share_of_loop", own("magika", 1), "one request at a time")
    rows += share("serving.image_c16_share_of_loop", own("image", 16), "16 in flight, 602 kB each")
    if single := own("image", 1):
        added_ms = statistics.median((each.load.mean_us - each.loop.loop_us) / 1e3 for each in single)
        rows.append(Row("serving.image_c1_added_ms", added_ms, "ms", "mean of one at a time, less the loop"))
    return rows + ceilings(measured) + compare(best(measured))


def ceilings(measured: list[Measured]) -> list[Row]:
    """What the bare engine gives where a server's requests differ from a tight loop."""
    rows = []
    for model in dict.fromkeys(each.model for each in measured):
        loops = list({id(each.loop): each.loop for each in measured if each.model == model}.values())
        paused = statistics.median(loop.cpu_us / loop.paused_cpu_us for loop in loops)
        rows.append(Row(f"serving.{model}_paused_loop_share", paused, "x", "the engine alone, 0.3 ms between runs"))
        if all(loop.row_us for loop in loops):
            joined = statistics.median(loop.loop_us / loop.row_us for loop in loops)
            rows.append(Row(f"serving.{model}_batch16_loop_share", joined, "x", "the engine alone, 16 rows a run"))
    return rows


def compare(found: list[Measured]) -> list[Row]:
    """Against each peer in the same row: same model, transport and load."""
    rates = {(each.model, each.transport, each.concurrency, each.server): each.load.requests_per_s for each in found}
    rows, behind = [], []
    for (model, transport, concurrency, server), rate in rates.items():
        if server == OWN:
            continue
        ratio = rates[model, transport, concurrency, OWN] / rate
        if (model, transport, concurrency, server) == ("silero", "grpc", 64, "MLServer"):
            rows.append(Row("serving.silero_vs_mlserver", ratio, "x", "64 in flight, MLServer at its best"))
        if ratio <= 1.0:
            behind.append(f"{model} {transport} c={concurrency} {server} {ratio:.2f}x")
    compared = sum(server != OWN for *_, server in rates)
    if compared:
        note = f"of {compared}" + (": " + ", ".join(behind) if behind else "")
        rows.append(Row("serving.rows_behind_a_peer", len(behind), "rows", note))
    return rows


def _row(each: Measured) -> Row:
    seen = each.load
    name = f"serving.{each.model}.{each.server}.{each.transport}.c{each.concurrency}_rps"
    note = f"p50 {seen.p50_us:.0f} us, p99 {seen.p99_us:.0f} us, cpu {seen.cpu_us:.0f} us, rss {seen.rss_mb:.0f} MB"
    return Row(
        name,
        seen.requests_per_s,
        "1/s",
        f"{note}, {each.share:.2f} of the loop, {each.cpu_share:.2f} by cpu; {each.setting}",
    )


def keep_raw(measured: list[Measured], *, quick: bool) -> None:
    """Every measurement, for the table and for whoever doubts it."""
    from benchmarks.__main__ import machine

    entries: list[dict[str, Any]] = [
        {
            "model": each.model,
            "server": each.server,
            "setting": each.setting,
            "transport": each.transport,
            "concurrency": each.concurrency,
            "loop": asdict(each.loop),
        }
        | as_json(each.load)
        for each in measured
    ]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"serving-raw.{'quick' if quick else 'full'}.json"
    path.write_text(json.dumps({"machine": machine(), "measured": entries}, indent=1) + "\n")
