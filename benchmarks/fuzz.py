"""Mutated conversations against both transports and the channel, mutated messages and MQTT payloads against the
decoders: no crash.

Most connections go to the protocol objects over a transport in memory, a smaller share over real sockets to a server
process; rows say how many of each. `ARGS=--quick` takes seconds. Coverage-guided fuzzing is `benchmarks.fuzz_atheris`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.foreign import call
from benchmarks.fuzz_channel import attack_channel
from benchmarks.fuzz_decoders import compare
from benchmarks.fuzz_json import compare_json
from benchmarks.fuzz_mutations import INFER, infer_message, mutate, record_http2, record_rest
from benchmarks.fuzz_payloads import attack
from benchmarks.fuzz_written import compare_written
from benchmarks.rows import Row

FULL = {"h2": 930_000, "rest": 60_000}
QUICK = {"h2": 30_000, "rest": 4_000}
SOCKETS_FULL = {"h2": 8_000, "rest": 4_000}
SOCKETS_QUICK = {"h2": 1_000, "rest": 500}
MESSAGES = {True: 50_000, False: 1_000_000}
PAYLOADS = {True: 30_000, False: 1_000_000}
ANSWERED = {True: 5_000, False: 100_000}
WORKERS = max(1, os.cpu_count() or 1)
SEED = 20_260
OPEN_AT_ONCE = 32
READ_TIMEOUT_S = 0.02


def run(*, quick: bool) -> list[Row]:
    """Rows; the text of what failed goes to stderr."""
    rows: list[Row] = []
    seen = [row for kind in ("h2", "rest") for row in _in_memory(kind, (QUICK if quick else FULL)[kind], rows)]
    crashes = sum(found["crashes"] for found in seen)
    probes, failed = sum(found["probes"] for found in seen), sum(found["probes_failed"] for found in seen)
    connections = sum(found["connections"] for found in seen)
    counts = SOCKETS_QUICK if quick else SOCKETS_FULL
    on_sockets = asyncio.run(_over_sockets(counts, rows))
    tally = compare(random.Random(SEED), MESSAGES[quick])
    written = compare_written(random.Random(SEED), MESSAGES[quick] // 10)
    bodies = compare_json(random.Random(SEED), MESSAGES[quick] // 5)
    mqtt = attack(random.Random(SEED), PAYLOADS[quick])
    answered = attack_channel(random.Random(SEED), ANSWERED[quick])
    found = [
        *on_sockets["first"],
        *tally.first,
        *written.first,
        *bodies.first,
        *mqtt.first,
        *answered.first,
        *(text for one in seen for text in one["first"]),
    ]
    for text in found:
        print(f"fuzz: {text}", file=sys.stderr)
    rows += [
        Row("fuzz.connections", connections + sum(counts.values()), "1", f"{sum(counts.values())} over sockets"),
        Row(
            "fuzz.crashes",
            crashes + on_sockets["crashes"] + tally.crashes + bodies.crashes + mqtt.crashes + answered.crashes,
            "1",
            "errors that nobody expected",
        ),
        Row("fuzz.probes", probes + on_sockets["probes"], "1", "honest calls in between"),
        Row("fuzz.probes_failed", failed + on_sockets["probes_failed"], "1"),
        Row("fuzz.tasks_left", sum(one["tasks"] for one in seen), "1", "methods that wait for connections long gone"),
        Row("fuzz.messages", tally.messages, "1", f"{tally.accepted} taken, {tally.stricter} refused by us alone"),
        Row("fuzz.channels", answered.messages, "1", "connections to a server that sends mutated answers"),
        Row("fuzz.json_bodies", bodies.messages, "1", f"{bodies.accepted} taken, the others refused"),
        Row("fuzz.mqtt_payloads", mqtt.messages, "1", f"{mqtt.accepted} taken, the others refused"),
        Row("fuzz.mqtt_crashes", mqtt.crashes, "1", "payloads that were neither taken nor refused"),
        Row("fuzz.written", written.messages, "1", "messages of few forms, written with ever other values"),
        Row(
            "fuzz.decoder_disagreements",
            tally.disagreements + written.disagreements + bodies.disagreements,
            "1",
            "with protobuf's own parser, and of what is recognised with what is parsed",
        ),
    ]
    return rows


def _in_memory(kind: str, count: int, rows: list[Row]) -> list[dict[str, Any]]:
    """Workers with different seeds, side by side."""
    began = time.perf_counter()
    each = count // WORKERS
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz_child", "drive", kind, str(SEED + index), str(each)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(WORKERS)
    ]
    seen: list[dict[str, Any]] = []
    for index, child in enumerate(children):
        out, _ = child.communicate()
        if child.returncode:
            first = [f"{kind} seed {SEED + index}: the process ended with {child.returncode}"]
            lost = {"connections": 0, "probes": 1, "probes_failed": 1, "samples": [], "tasks": 0, "crashes": 1}
            seen.append({**lost, "first": first})
        else:
            seen.append(json.loads(out))
    taken_s = time.perf_counter() - began
    rows.append(Row(f"fuzz.{kind}_in_memory", sum(one["connections"] for one in seen), "1"))
    rows.append(Row(f"fuzz.{kind}_per_s", count / taken_s, "1/s", f"{WORKERS} processes"))
    slopes = [_slope(one["samples"]) for one in seen if one["samples"]]
    rows.append(Row(f"fuzz.{kind}_rss_slope", max(slopes, default=float("inf")), "B", "per connection, after warm-up"))
    return seen


def _slope(samples: list[list[int]]) -> float:
    """Bytes per connection: the median slope of all pairs of samples (Theil and Sen), deaf to single steps."""
    pairs = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(samples) for b in samples[i + 1 :] if b[0] > a[0]]
    return statistics.median(pairs) if pairs else 0.0


async def _over_sockets(counts: dict[str, int], rows: list[Row]) -> dict[str, Any]:
    """The same against a server process, and its memory from outside."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fuzz_child", "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    ready = json.loads(child.stdout.readline())
    result: dict[str, Any] = {"crashes": 0, "probes": 0, "probes_failed": 0, "first": []}
    for kind in ("h2", "rest"):
        good = record_http2() if kind == "h2" else record_rest()
        rng = random.Random(SEED)
        began = time.perf_counter()
        samples: list[list[int]] = []
        for start in range(0, counts[kind], OPEN_AT_ONCE):
            await asyncio.gather(
                *(_send(ready[kind], mutate(rng.choice(good), good, rng)) for _ in range(OPEN_AT_ONCE))
            )
            if start % (OPEN_AT_ONCE * 10) == 0:
                result["probes"] += 1
                result["probes_failed"] += not await asyncio.to_thread(_is_honest, ready["h2"])
                if start > counts[kind] // 5:
                    rss = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * 4096
                    samples.append([start, rss])
        rows.append(Row(f"fuzz.{kind}_sockets", counts[kind], "1"))
        rows.append(Row(f"fuzz.{kind}_sockets_per_s", counts[kind] / (time.perf_counter() - began), "1/s"))
        rows.append(Row(f"fuzz.{kind}_sockets_rss_slope", _slope(samples), "B", "per connection, after warm-up"))
    with suppress(OSError):
        child.stdin.write("\n")
        child.stdin.flush()
    said = child.stdout.readline()
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            pipe.close()
    if said:
        told = json.loads(said)
        result["crashes"] += told["crashes"]
        result["first"] += told["first"]
    else:
        result["crashes"] += 1
        result["first"].append("the server process died")
    return result


async def _send(address: str, pieces: list[bytes]) -> None:
    """One connection: send what there is, read a little, hang up."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, (host, int(port)))
            for piece in pieces:
                await asyncio.wait_for(loop.sock_sendall(sock, piece), 1.0)
            await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), READ_TIMEOUT_S)
        except (OSError, TimeoutError):
            return


def _is_honest(address: str) -> bool:
    """Whether a client that is not ours gets its answer."""
    try:
        return b"text" in call(address, INFER, infer_message())
    except Exception:  # noqa: BLE001 - whatever it is, the call failed
        return False
