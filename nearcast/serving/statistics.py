"""What a version did: counts, sums and log-bucketed durations, a few list operations per request.

The histogram follows HdrHistogram's layout: eight linear sub-buckets per power of two, so a quantile is off by at most
1/16 of its value. No locks: everything happens on the loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import sub

from nearcast.counts import VersionCounts
from nearcast.errors import Code

_SUB_BITS = 3
_SUB = 1 << _SUB_BITS
_BUCKETS = 256
"""Enough for 2^33 µs, more than two hours."""
RUN_SIZES_MAX = 256
"""Sizes of runs that are counted apart, of one version."""


def bucket_of(duration_us: int) -> int:
    """Index of the bucket that a duration falls into."""
    if duration_us < _SUB:
        return max(0, duration_us)
    shift = duration_us.bit_length() - _SUB_BITS - 1
    index = (shift << _SUB_BITS) + (duration_us >> shift)
    return index if index < _BUCKETS else _BUCKETS - 1


_QUICK_US = 4096
_QUICK = bytes(map(bucket_of, range(_QUICK_US)))
"""The buckets of short durations, which are looked up in half the time."""


def bucket_start_us(index: int) -> int:
    """Smallest duration of a bucket."""
    if index < 2 * _SUB:
        return index
    shift = (index >> _SUB_BITS) - 1
    return (_SUB + (index & (_SUB - 1))) << shift


_STARTS = tuple(bucket_start_us(index) for index in range(_BUCKETS + 1))


def quantile_us(counts: Sequence[int], q: float) -> float:
    """The `q` quantile in microseconds, interpolated inside its bucket; 0 without samples."""
    total = sum(counts)
    if not total:
        return 0.0
    rank = q * total
    seen = 0
    for index, count in enumerate(counts):
        if count and seen + count >= rank:
            start, end = _STARTS[index], _STARTS[index + 1]
            return start + (end - start) * max(0.0, rank - seen) / count
        seen += count
    return float(_STARTS[len(counts)])


def quantile_of(sparse: Mapping[str, int], q: float) -> float:
    """As `quantile_us`, of the used buckets alone by their index in decimal; what is no bucket does not count."""
    counts = [0] * _BUCKETS
    for bucket, count in sparse.items():
        if bucket.isdecimal() and int(bucket) < _BUCKETS:
            counts[int(bucket)] += count
    return quantile_us(counts, q)


def slower_than(sparse: Mapping[str, int], limit_us: float) -> int:
    """How many of the durations surely took longer than the limit; the bucket that holds the limit does not count."""
    return sum(
        count
        for bucket, count in sparse.items()
        if bucket.isdecimal() and int(bucket) < _BUCKETS and bucket_start_us(int(bucket)) >= limit_us
    )


class Statistics:
    """One version since it was first loaded. `compute` is model time, `total` from arrival to answer, both in µs.

    `queue_us` and `compute_us` are what answers say: the first holds `read_s`, in which tensors are read from their
    messages, and the second `before_s`, in which they are decoded and joined. `after_s` follows: joined answers are
    taken apart. `input_us`, `infer_us`, `output_us` and `wait_us` tell them from each other.

    `runs` counts what the engine ran by rows: how often, and seconds in all before, in and after it. `last` is the
    monotonic instant of the last answer. `refusals` counts by reason what the queue turned away. `compared` and
    `disagreed` count shadowed inputs, `shadows_dropped` those that the node had no time for.
    """

    __slots__ = (
        "_snapshot",
        "after_s",
        "batches",
        "before_s",
        "cache_hit_us",
        "cache_hits",
        "cache_miss_us",
        "cache_misses",
        "codes",
        "compared",
        "compute",
        "compute_us",
        "disagreed",
        "fail_us",
        "last",
        "queue_us",
        "read_s",
        "refusals",
        "requests",
        "rows",
        "runs",
        "shadows_dropped",
        "total",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.rows = 0
        self.codes: dict[Code, int] = {}
        self.batches: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.runs: dict[int, list[float]] = {}
        self.read_s = 0.0
        self.before_s = 0.0
        self.after_s = 0.0
        self.last = 0.0
        self.fail_us = 0
        self.cache_hits = 0
        self.cache_hit_us = 0
        self.cache_misses = 0
        self.cache_miss_us = 0
        self.queue_us = 0
        self.compute_us = 0
        self.compared = 0
        self.disagreed = 0
        self.shadows_dropped = 0
        self.compute = [0] * _BUCKETS
        self.total = [0] * _BUCKETS
        self._snapshot: tuple[float, list[int], list[int]] = (0.0, [0] * _BUCKETS, [0] * _BUCKETS)

    def answer(self, queue_us: int, compute_us: int) -> None:
        """A request was answered; neither time is negative."""
        total_us = queue_us + compute_us
        self.requests += 1
        self.queue_us += queue_us
        self.compute_us += compute_us
        self.compute[_QUICK[compute_us] if compute_us < _QUICK_US else bucket_of(compute_us)] += 1
        self.total[_QUICK[total_us] if total_us < _QUICK_US else bucket_of(total_us)] += 1

    def fail(self, code: Code, elapsed_us: int = 0) -> None:
        """A request ended with an error."""
        self.requests += 1
        self.fail_us += elapsed_us
        self.codes[code] = self.codes.get(code, 0) + 1

    def release(self, reason: str, rows: int) -> None:
        """A batch went to the engine."""
        self.batches[reason] = self.batches.get(reason, 0) + 1
        self.rows += rows

    def refuse(self, why: str) -> None:
        """The queue turned a request away."""
        self.refusals[why] = self.refusals.get(why, 0) + 1

    def ran(
        self,
        rows: int,
        started: float,
        ended: float,
        *,
        requests: int = 1,
        before_s: float = 0.0,
        after_s: float = 0.0,
    ) -> None:
        """The engine ran once.

        Args:
            rows: of the run.
            started: in seconds; what came before the engine lies within.
            ended: in seconds.
            requests: to be answered with it.
            before_s: what decoding and joining tensors took.
            after_s: what taking the answers apart took.
        """
        run = self.runs.get(rows)
        if run is None:
            # One size beyond the bound counts as the largest: a client may send any number of rows.
            run = self.runs.setdefault(rows if len(self.runs) < RUN_SIZES_MAX else max(self.runs), [0, 0.0, 0.0, 0.0])
        run[0] += 1
        run[2] += ended - started - before_s
        if before_s or after_s:
            run[1] += before_s
            run[3] += after_s
            self.before_s += requests * before_s
            self.after_s += requests * after_s

    def hit(self, lookup_us: int) -> None:
        """The response cache had the answer; `answer` is still to be called."""
        self.cache_hits += 1
        self.cache_hit_us += lookup_us

    def miss(self, lookup_us: int) -> None:
        """The response cache did not have the answer."""
        self.cache_misses += 1
        self.cache_miss_us += lookup_us

    def counts(self, model: str, version: str, *, wall_offset_s: float, memory_bytes: int) -> VersionCounts:
        """The same in the protocol's terms.

        Args:
            model: its name.
            version: as on the wire.
            wall_offset_s: wall time minus monotonic time, in seconds.
            memory_bytes: what the version holds now.
        """
        answered, failed = self.answered, sum(self.codes.values())
        return VersionCounts(
            model=model,
            version=version,
            last_inference_ms=int((self.last + wall_offset_s) * 1e3) if self.last else 0,
            rows=self.inferences,
            runs=self.executions,
            runs_by_rows={
                rows: (int(run[0]), int(run[1] * 1e9), int(run[2] * 1e9), int(run[3] * 1e9))
                for rows, run in sorted(self.runs.items())
            },
            success=(answered, self.success_us * 1000),
            fail=(failed, self.fail_us * 1000),
            queue=(answered, self.wait_us * 1000),
            compute_input=(answered, self.input_us * 1000),
            compute=(answered, self.infer_us * 1000),
            compute_output=(answered, self.output_us * 1000),
            cache_hit=(self.cache_hits, self.cache_hit_us * 1000),
            cache_miss=(self.cache_misses, self.cache_miss_us * 1000),
            memory_bytes=memory_bytes,
        )

    @property
    def total_us(self) -> int:
        """Microseconds from arrival to answer, of all answered requests."""
        return self.queue_us + self.compute_us

    @property
    def inferences(self) -> int:
        """Rows that the engine answered."""
        return int(sum(rows * run[0] for rows, run in self.runs.items()))

    @property
    def executions(self) -> int:
        """Runs of the engine."""
        return int(sum(run[0] for run in self.runs.values()))

    @property
    def success_us(self) -> int:
        """From arrival to answer: what follows added up, but for parts of microseconds."""
        return self.total_us + self.output_us

    @property
    def wait_us(self) -> int:
        """Waiting for the engine."""
        return max(0, self.queue_us - int(self.read_s * 1e6))

    @property
    def input_us(self) -> int:
        """Reading, decoding and joining tensors."""
        return int((self.read_s + self.before_s) * 1e6)

    @property
    def infer_us(self) -> int:
        """In the engine."""
        return max(0, self.compute_us - int(self.before_s * 1e6))

    @property
    def output_us(self) -> int:
        """Taking the answers of joined requests apart."""
        return int(self.after_s * 1e6)

    @property
    def errors(self) -> int:
        """Requests that the model itself failed. What clients, deadlines or overload cause is in `codes` only."""
        return self.codes.get(Code.INTERNAL, 0)

    @property
    def answered(self) -> int:
        """Requests that got an answer."""
        return self.requests - sum(self.codes.values())

    def recent_us(
        self, now: float, q: Sequence[float], *, window_s: float = 10.0, samples_min: int = 20
    ) -> list[float]:
        """Quantiles of the compute time over the last window or two; empty until `samples_min` requests were seen."""
        taken, previous, older = self._snapshot
        if now - taken >= window_s and sum(self.compute) - sum(previous) >= samples_min:
            self._snapshot = (now, list(self.compute), previous)
            older = previous
        recent = list(map(sub, self.compute, older))
        return [quantile_us(recent, each) for each in q] if sum(recent) >= samples_min else []
