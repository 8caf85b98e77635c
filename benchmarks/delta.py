"""What an update costs: synthetic changes, pairs of models trained here, and what a node takes to apply it.

Percent is of the new file. `residual` is the order-0 entropy of new minus old at equal places of a tensor: what any
coder needs that knows the numbers, but not their neighbours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.delta_models import Pair, real_pairs, synthetic_pairs
from benchmarks.rows import Row
from model_sync.delta.index import DeltaIndex
from model_sync.delta.search import Tried, best, describe_way, search
from model_sync.delta.ways import apply_way

APPLIES = 5
BUDGET_S = 600.0


def run(quick: bool) -> list[Row]:
    """Search every pair as a push does, and apply what wins as a node does."""
    rows: list[Row] = []
    costs: list[Cost] = []
    for pair in (*synthetic_pairs(quick=quick), *real_pairs(quick=quick)):
        cost = measure(pair)
        costs.append(cost)
        rows += list(_rows(pair, cost))
    rows += [
        Row("delta.worst_vs_full_zstd", max(map(_vs_full, costs)), "x", "of all pairs, the index included"),
        Row("delta.apply_ms_per_mb", max(cost.apply_ms_per_mb for cost in costs), "ms/MB", "the slowest of all pairs"),
        Row("delta.search_s_per_mb", max(cost.search_s_per_mb for cost in costs), "s/MB", "the slowest, one core"),
    ]
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one pair."""

    codec: str
    sent_bytes: int
    index_bytes: int
    full_bytes: int
    apply_ms_per_mb: float
    search_s_per_mb: float


def measure(pair: Pair) -> Cost:
    """Search as a push does: the file alone, then from its base; apply the winner and check what comes out."""
    began = time.process_time()
    whole = next(tried for tried in search(None, pair.new, clock=time.perf_counter, budget_s=BUDGET_S))
    assert whole.payload is not None, (pair.name, whole.reason)
    tried = list(search(pair.old, pair.new, clock=time.perf_counter, budget_s=BUDGET_S))
    searched_s = time.process_time() - began
    chosen = best(tried, len(whole.payload)) or whole
    return Cost(
        codec=chosen.codec,
        sent_bytes=len(chosen.payload or b""),
        index_bytes=len(_index(pair, whole, chosen).encode()),
        full_bytes=len(whole.payload),
        apply_ms_per_mb=_apply_ms(pair, chosen) / (len(pair.new) / 1e6),
        search_s_per_mb=searched_s / (len(pair.new) / 1e6),
    )


def _vs_full(cost: Cost) -> float:
    return (cost.sent_bytes + cost.index_bytes) / cost.full_bytes


def _index(pair: Pair, *found: Tried) -> DeltaIndex:
    sha256 = hashlib.sha256(pair.old).hexdigest()
    ways = (describe_way(each.codec, None if each.codec == "zstd" else sha256, each.payload or b"") for each in found)
    return DeltaIndex(result=hashlib.sha256(pair.new).hexdigest(), size_bytes=len(pair.new), ways=tuple(ways))


def _apply_ms(pair: Pair, chosen: Tried) -> float:
    """Of one core, the best of some rounds; digests of base and result included."""
    payload = chosen.payload or b""
    base = b"" if chosen.codec == "zstd" else pair.old
    way = describe_way(chosen.codec, hashlib.sha256(base).hexdigest() if base else None, payload)
    sha256 = hashlib.sha256(pair.new).hexdigest()
    took = []
    for _ in range(APPLIES):
        began = time.process_time()
        made = apply_way(way, payload, base, size_bytes=len(pair.new), sha256=sha256)
        took.append(time.process_time() - began)
        assert made == pair.new
    return min(took) * 1e3


def _rows(pair: Pair, cost: Cost) -> Iterator[Row]:
    size_bytes = len(pair.new)
    full_percent = 100 * cost.full_bytes / size_bytes
    note = f"{cost.codec} of {size_bytes / 1e6:.2f} MB; full zstd {full_percent:.1f} %; {pair.note}".removesuffix("; ")
    yield Row(f"delta.{pair.name}_percent", 100 * cost.sent_bytes / size_bytes, "%", note)
    if pair.residuals:
        bound = sum(map(order0_bytes, pair.residuals))
        fair = min(bound, cost.full_bytes)
        yield Row(
            f"delta.{pair.name}_vs_entropy", cost.sent_bytes / fair, "x", f"residual {100 * bound / size_bytes:.2f} %"
        )


def order0_bytes(symbols: NDArray[Any]) -> float:
    """Bytes that an ideal coder needs which knows how often each symbol occurs, and nothing else."""
    _, counts = np.unique(symbols, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() * symbols.size / 8)


if __name__ == "__main__":
    for row in run(quick=False):
        print(f"{row.name:<50} {row.value:8.3f} {row.unit:6} {row.note}")
