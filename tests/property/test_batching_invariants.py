"""Whatever happens in whatever order: every request ends exactly once, bounds hold, order is kept, nothing starves."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run

configs = st.builds(
    BatchingConfig,
    rows_max=st.integers(1, 8),
    window_s=st.sampled_from([0.0, 0.5, 2.0]),
    queue_rows_max=st.integers(1, 20),
    engines=st.integers(1, 3),
)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 10), st.sampled_from("ab"), st.sampled_from([None, 0.0, 0.3, 1.0, 4.0])
        ),
        st.tuples(st.just("finish")),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.5, 3.0])),
    ),
    max_size=60,
)


@dataclass
class Shell:
    """Does what the batcher says and checks each word of it."""

    config: BatchingConfig
    now: float = 0.0
    rows: dict[int, int] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    deadlines: dict[int, float | None] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)
    running: int = 0

    def obey(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(ids, rows, reason):
                    self.running += 1
                    assert self.running <= self.config.engines
                    assert rows == sum(max(1, self.rows[i]) for i in ids)
                    assert rows <= self.config.rows_max or len(ids) == 1
                    assert len({self.keys[i] for i in ids}) == 1
                    same = [i for i in self.waiting if self.keys[i] == self.keys[ids[0]]]
                    assert list(ids) == same[: len(ids)], "first come, first served within a key"
                    assert ids[0] == self.waiting[0], "the oldest goes first"
                    if reason == "full":
                        behind = same[len(ids) :]
                        assert (
                            rows >= self.config.rows_max or rows + max(1, self.rows[behind[0]]) > self.config.rows_max
                        )
                    for i in ids:
                        deadline = self.deadlines[i]
                        assert deadline is None or deadline > self.now, "expired work must not run"
                        self.end(i, "run")
                case Refuse(request_id):
                    self.end(request_id, "refused")
                case Expire(ids):
                    for i in ids:
                        deadline = self.deadlines[i]
                        assert deadline is not None
                        assert deadline <= self.now
                        self.end(i, "expired")

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
            case ("add", rows, key, ttl):
                i = len(shell.rows)
                shell.rows[i], shell.keys[i] = rows, key
                shell.deadlines[i] = None if ttl is None else shell.now + ttl
                shell.waiting.append(i)
                shell.obey(batcher.add(shell.now, i, rows, key=key, deadline=shell.deadlines[i]))
            case ("finish",) if shell.running:
                shell.running -= 1
                shell.obey(batcher.finish(shell.now))
            case ("cancel", i):
                assert batcher.cancel(i) == (i in shell.waiting)
                if i in shell.waiting:
                    shell.end(i, "cancelled")
            case ("wait", seconds):
                until = shell.now + seconds
                while (wake := batcher.next_wake()) is not None and wake <= until:
                    shell.now = max(shell.now, wake)
                    before = len(shell.ended)
                    shell.obey(batcher.tick(shell.now))
                    assert len(shell.ended) > before or batcher.next_wake() != wake, "a wake must bring something about"
                shell.now = until
        assert batcher.waiting == len(shell.waiting)
        assert batcher.running == shell.running
        waiting_rows = sum(max(1, shell.rows[i]) for i in shell.waiting)
        assert batcher.rows_waiting == waiting_rows
        assert waiting_rows <= config.queue_rows_max or len(shell.waiting) == 1
        if config.window_s == 0 and shell.waiting:
            assert shell.running == config.engines, "no engine idles while something waits"
    while shell.waiting or shell.running:
        shell.now += config.window_s + 0.01
        if shell.running:
            shell.running -= 1
            shell.obey(batcher.finish(shell.now))
        else:
            shell.obey(batcher.tick(shell.now))
    assert sorted(shell.ended) == sorted(shell.rows)
