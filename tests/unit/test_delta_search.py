"""The search: what it keeps, what it leaves out, and that it can be stopped."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from model_sync.delta import bsdiff
from model_sync.delta.search import ENCODERS, Tried, best, search
from model_sync.publisher.delta_child import DeltaSearch

RNG = np.random.default_rng(7)
OLD = np.round(RNG.laplace(0, 12, 60_000)).astype(np.int8).tobytes()
NEW = (np.frombuffer(OLD, np.int8) + (RNG.random(len(OLD)) < 0.02)).astype(np.int8).tobytes()


def tried(codec: str, size_bytes: int | None) -> Tried:
    return Tried(codec=codec, payload=None if size_bytes is None else bytes(size_bytes))  # type: ignore[arg-type]


def test_the_smallest_delta_that_is_worth_it() -> None:
    small, large, absent = tried("bsdiff", 300), tried("zstd-prefix", 500), tried("residual-bz2", None)
    assert best([large, absent, small], 1000) is small
    assert best([large, absent, small], 500) is small
    assert best([large, absent, small], 499) is None
    assert best([absent], 1000) is None
    assert best([], 1000) is None


def test_every_codec_is_tried_and_proved() -> None:
    found = list(search(OLD, NEW, clock=time.perf_counter, budget_s=60.0))
    assert [each.codec for each in found] == list(ENCODERS)
    assert all(each.payload and each.encode_s > 0 and each.decode_s > 0 for each in found)
    chosen = best(found, len(NEW))
    assert chosen is not None
    assert chosen.payload is not None
    assert len(chosen.payload) < 0.025 * len(NEW)
    assert [each.codec for each in search(None, NEW, clock=time.perf_counter, budget_s=60.0)] == ["zstd", "chunks"]


def test_no_codec_is_begun_after_the_budget() -> None:
    ticks = iter([0.0, 0.0, 0.0, 1.0, 2.0, *[9.0] * 20])
    found = list(search(OLD, NEW, clock=lambda: next(ticks), budget_s=5.0))
    assert [each.payload is not None for each in found] == [True, False, False, False, False]
    assert (found[0].encode_s, found[0].decode_s) == (1.0, 1.0)
    assert {each.reason for each in found[1:]} == {"no time left"}


def test_what_is_not_installed_or_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bsdiff4", None)
    *_, last = search(OLD, NEW, clock=time.perf_counter, budget_s=60.0)
    assert (last.codec, last.payload, last.reason) == ("bsdiff", None, "the package bsdiff4 is not installed")
    monkeypatch.undo()
    monkeypatch.setattr(bsdiff, "SIZE_BYTES_MAX", 1 << 10)
    *_, last = search(OLD, NEW, clock=time.perf_counter, budget_s=60.0)
    assert last.payload is None
    assert "larger than" in last.reason


def test_a_codec_that_does_not_lead_back_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "residual-bz2", lambda old, new: ENCODERS["residual-gaps"](old, new))
    monkeypatch.setitem(ENCODERS, "bsdiff", lambda old, new: bsdiff.encode(old, old))
    found = {each.codec: each for each in search(OLD, NEW, clock=time.perf_counter, budget_s=60.0)}
    assert found["residual-bz2"].payload is None
    assert "Refused" in found["residual-bz2"].reason
    assert "lead back" in found["bsdiff"].reason


def test_the_child_searches_many_files_and_stops_in_time() -> None:
    with DeltaSearch(60.0) as child:
        assert [each.codec for each in child.search(None, NEW)] == ["zstd", "chunks"]
        assert [each.codec for each in child.search(OLD, NEW)] == list(ENCODERS)
    began = time.monotonic()
    with DeltaSearch(0.6) as child:
        large = RNG.bytes(30_000_000)
        assert len(list(child.search(large, large[::-1]))) < len(ENCODERS)
        assert list(child.search(OLD, NEW)) == []
    assert time.monotonic() - began < 10
