"""Whatever happens in whatever order: every request ends exactly once, bounds hold, order is kept, nothing starves."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run

AGE_S = 2.0
configs = st.builds(
    BatchingConfig,
    rows_max=st.integers(1, 8),
    window_s_max=st.sampled_from([0.0, 0.5, 2.0]),
    queue_rows_max=st.integers(1, 20),
    queue_bytes_max=st.sampled_from([10, 1000]),
    engines=st.integers(1, 3),
    priority_age_s=st.just(AGE_S),
    late_quantile=st.sampled_from([0.0, 0.95]),
)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(0, 10),
            st.sampled_from("ab"),
            st.sampled_from([None, 0.0, 0.3, 1.0, 4.0]),
            st.integers(0, 4),
            st.integers(0, 4),
        ),
        st.tuples(st.just("finish"), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.5, 3.0])),
    ),
    max_size=60,
)


@dataclass(frozen=True)
class Request:
    rows: int
    key: str
    arrived: float
    deadline: float | None
    level: int
    size_bytes: int

    @property
    def rank(self) -> float:
        return self.arrived + (self.level - 1) * AGE_S


@dataclass
class Shell:
    """Does what the batcher says and checks each word of it."""

    config: BatchingConfig
    now: float = 0.0
    requests: dict[int, Request] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    running: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def obey(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Run():
                    self.run(instruction)
                case Refuse(request_id, why, retry_s):
                    assert (retry_s is None) == (why == "hopeless")
                    assert retry_s is None or retry_s >= 0
                    if why in ("late", "hopeless"):
                        assert self.config.late_quantile
                        assert self.requests[request_id].deadline is not None
                    self.end(request_id, "refused")
                case Expire(ids):
                    for i in ids:
                        deadline = self.requests[i].deadline
                        assert deadline is not None
                        assert deadline <= self.now
                        if i in self.waiting:
                            self.end(i, "expired")
                        else:
                            assert any(i in batch for batch in self.running.values())
                            assert i not in self.told
                            self.told.add(i)

    def run(self, run: Run) -> None:
        ids = run.ids
        requests = [self.requests[i] for i in ids]
        assert len(self.running) < self.config.engines
        self.running[ids[0]] = ids
        assert run.rows == sum(each.rows for each in requests)
        assert run.rows <= self.config.rows_max or len(ids) == 1
        assert len({each.key for each in requests}) == 1
        in_order = sorted(self.waiting, key=lambda i: (self.requests[i].rank, i))
        same = [i for i in in_order if self.requests[i].key == requests[0].key]
        assert list(ids) == same[: len(ids)], "in order of rank within a key"
        assert ids[0] == in_order[0], "the first in rank goes first"
        behind = same[len(ids) :]
        if run.reason == "full":
            fits = behind and run.rows + self.requests[behind[0]].rows <= self.config.rows_max
            assert run.rows >= self.config.rows_max or not fits
        if run.reason == "idle":
            assert not behind, "nobody who fits is left behind without a reason"
        for i, each in zip(ids, requests, strict=True):
            assert each.deadline is None or each.deadline > self.now, "expired work must not run"
            self.end(i, "run")

    def end(self, request_id: int, how: str) -> None:
        assert request_id not in self.ended
        self.ended[request_id] = how
        self.waiting.remove(request_id)


@settings(max_examples=200, deadline=None)
@given(configs, steps)
def test_every_request_ends_exactly_once(config: BatchingConfig, events: list[tuple]) -> None:
    batcher, shell = Batcher(config), Shell(config)
    for event in events:
        match event:
            case ("add", rows, key, ttl, priority, size_bytes):
                i = len(shell.requests)
                deadline = None if ttl is None else shell.now + ttl
                level = priority if 1 <= priority <= config.priority_levels else config.priority_default
                shell.requests[i] = Request(max(1, rows), key, shell.now, deadline, level, size_bytes)
                shell.waiting.append(i)
                shell.obey(
                    batcher.add(
                        shell.now, i, rows, key=key, deadline=deadline, priority=priority, size_bytes=size_bytes
                    )
                )
            case ("finish", which) if shell.running:
                run_id = list(shell.running)[which % len(shell.running)]
                del shell.running[run_id]
                shell.obey(batcher.finish(shell.now, run_id))
            case ("cancel", i):
                assert batcher.cancel(i) == (i in shell.waiting)
                if i in shell.waiting:
                    shell.end(i, "cancelled")
            case ("wait", seconds):
                until = shell.now + seconds
                while (wake := batcher.next_wake()) is not None and wake <= until:
                    shell.now = max(shell.now, wake)
                    before = len(shell.ended) + len(shell.told)
                    shell.obey(batcher.tick(shell.now))
                    ends = len(shell.ended) + len(shell.told)
                    assert ends > before or batcher.next_wake() != wake, "a wake must bring something about"
                shell.now = until
        check_bounds(batcher, shell)
    while shell.waiting or shell.running:
        shell.now += config.window_s_max + 0.01
        if shell.running:
            run_id = next(iter(shell.running))
            del shell.running[run_id]
            shell.obey(batcher.finish(shell.now, run_id))
        else:
            shell.obey(batcher.tick(shell.now))
    assert sorted(shell.ended) == sorted(shell.requests)


def check_bounds(batcher: Batcher, shell: Shell) -> None:
    config = shell.config
    assert batcher.waiting == len(shell.waiting)
    assert batcher.running == len(shell.running)
    rows = sum(shell.requests[i].rows for i in shell.waiting)
    size_bytes = sum(shell.requests[i].size_bytes for i in shell.waiting)
    assert (batcher.rows_waiting, batcher.bytes_waiting) == (rows, size_bytes)
    assert (rows <= config.queue_rows_max and size_bytes <= config.queue_bytes_max) or len(shell.waiting) == 1
    if config.window_s_max == 0 and shell.waiting:
        assert len(shell.running) == config.engines, "no engine idles while something waits"
