"""Coverage-guided fuzzing, as long as you like: `python -m benchmarks.fuzz_atheris TARGET [-max_total_time=60 ...]`.

Targets: `decoders` (the wire's requests, JSON requests, gRPC messages), `agree` (the wire beside protobuf's parser),
`http2` (a connection), `payloads` (MQTT requests, streams and answers), `formats` (the checks of model files). Needs
atheris; options of libFuzzer and a folder for the corpus may follow.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable
from typing import Any


def main() -> int:
    """Run one target until it crashes or its time is over."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(f"usage: python -m benchmarks.fuzz_atheris {'|'.join(TARGETS)} [options of libFuzzer]", file=sys.stderr)
        return 64
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("atheris is missing; install the development requirements (make install-dev)", file=sys.stderr)
        return 69
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["nearcast", "edge_node"]):
        test_one = TARGETS[name]()
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
    return 0


def _decoders() -> Callable[[bytes], None]:
    from benchmarks.fuzz_decoders import feed

    return feed


def _agree() -> Callable[[bytes], None]:
    from benchmarks.fuzz_decoders import Tally, judge, judge_answer

    def test_one(data: bytes) -> None:
        problem = judge(data, Tally()) or judge_answer(data, Tally())
        if problem:
            raise AssertionError(problem)

    return test_one


def _http2() -> Callable[[bytes], None]:
    from benchmarks.fuzz_child import Crashes, converse, make_factory
    from benchmarks.fuzz_mutations import record_http2

    loop = asyncio.new_event_loop()
    crashes = Crashes()
    crashes.hear(loop)
    factory, _ = loop.run_until_complete(make_factory("h2"))
    greeting = b"".join(record_http2()[0][:3])

    def test_one(data: bytes) -> None:
        # One byte says whether what follows comes after a good greeting: few random bytes would pass it.
        pieces = [greeting, data[1:]] if data[:1] > b"\x20" else [data[1:]]
        loop.run_until_complete(converse(factory, loop, pieces))
        if crashes.count:
            raise AssertionError(crashes.first)

    return test_one


def _payloads() -> Callable[[bytes], None]:
    from random import Random

    from benchmarks.fuzz_payloads import ask, hear, seed_payloads, stream

    kinds = sorted({kind for kind, _ in seed_payloads()})

    def test_one(data: bytes) -> None:
        # Two bytes choose the format and what surrounds the payload.
        kind, rng = kinds[data[0] % len(kinds) if data else 0], Random(data[1] if len(data) > 1 else 0)
        ask(data[2:], kind, rng)
        hear(data[2:], kind, rng)
        stream(data[2:], kind, rng)

    return test_one


def _formats() -> Callable[[bytes], None]:
    from nearcast.errors import MeshError
    from nearcast.serving.formats.foreign import find_foreign
    from nearcast.serving.formats.onnx import check_onnx
    from nearcast.serving.formats.safetensors import check_safetensors
    from nearcast.serving.formats.text import check_json
    from nearcast.serving.formats.tflite import check_tflite

    checks: tuple[Callable[[bytes], object], ...] = (check_onnx, check_tflite, check_safetensors, check_json)

    def test_one(data: bytes) -> None:
        find_foreign(data)
        for check in checks:
            try:
                check(data)
            except MeshError:
                continue

    return test_one


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "decoders": _decoders,
    "agree": _agree,
    "http2": _http2,
    "payloads": _payloads,
    "formats": _formats,
}

if __name__ == "__main__":
    sys.exit(main())
