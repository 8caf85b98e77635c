"""What no text demands and every client needs: no cross-talk, deadlines, cancellation, compression, health by gRPC."""

from __future__ import annotations

import gzip
import http.client
import json
import time
from collections.abc import Callable
from typing import Any

import grpc

from tests.compat.clients import SERVICE, Grpc, RefusedError, Rest, path_of, read_rest, require_ok
from tests.compat.contract import ADD, IDENTITY, ONE_ROW, SLOW, SUM, add_inputs
from tests.compat.load import in_parallel
from tests.compat.registry import GRPC, MUST, RECOMMENDED, REST, check, expect
from tests.compat.tensors import make

CALLERS, CALLS = 16, 8


@check("behaviour.no_cross_talk", MUST)
def no_cross_talk(client: Any) -> None:
    """Sixteen callers at once, batched or not, each get their own values, rows and ids."""

    def caller(number: int) -> None:
        for turn in range(CALLS):
            rows = 1 + (number + turn) % 3
            a = make("FP32", (rows, 4), [1000 * number + turn + n for n in range(4 * rows)])
            b = make("FP32", (rows, 4), [0.5] * (4 * rows))
            answer = client.infer(ADD, {"a": a, "b": b}, request_id=f"{number}.{turn}")
            expect(answer.id == f"{number}.{turn}", f"caller {number} got the id {answer.id!r}")
            wanted = make("FP32", (rows, 4), [value + 0.5 for value in a.values()])
            found = answer.outputs["sum"]
            expect(found.shape == wanted.shape, f"{rows} rows were sent, the shape is {list(found.shape)}")
            expect(found.raw == wanted.raw, f"caller {number} got {found.values()[:4]}, wanted {wanted.values()[:4]}")

    for error in in_parallel([lambda n=n: caller(n) for n in range(CALLERS)]):
        if error is not None:
            raise error


@check("behaviour.one_bad_in_a_batch", MUST)
def one_bad(client: Any) -> None:
    """Wrong requests among right ones, at the same time, do not harm these."""

    def good() -> None:
        for _ in range(CALLS):
            expect(client.infer(ADD, add_inputs()).outputs["sum"].raw == SUM.raw, "a wrong sum")

    def bad() -> None:
        for _ in range(CALLS):
            try:
                client.infer(ADD, {"a": make("FP32", (1, 3), [1, 2, 3]), "b": ONE_ROW})
            except RefusedError:
                continue
            raise AssertionError("a wrong request was answered")

    for error in in_parallel([good, bad] * 4):
        if error is not None:
            raise error


@check("behaviour.deterministic_large_batch", RECOMMENDED)
def many_rows(client: Any) -> None:
    """One request with 500 rows is answered whole."""
    a = make("FP32", (500, 4), range(2000))
    answer = client.infer(ADD, {"a": a, "b": a})
    expect(answer.outputs["sum"].values() == [2.0 * n for n in range(2000)], "wrong sums")


def _slow_s(client: Any, count: int) -> float:
    """How long `count` slow requests take that were sent together."""
    began = time.monotonic()
    for error in in_parallel([lambda: client.infer(SLOW, {"x": ONE_ROW})] * count):
        if error is not None:
            raise error
    return time.monotonic() - began


QUEUED = 8


@check("behaviour.cancelled_work_is_dropped", RECOMMENDED)
def cancelled(client: Any) -> None:
    """After eight clients hang up, the next request does not wait for what they had asked for."""

    def hang_up() -> None:
        if client.transport != GRPC:
            _send_and_hang_up(client)
            return
        body = client.request(SLOW, {"x": ONE_ROW}).SerializeToString()
        calls = [client.channel.unary_unary(SERVICE + "ModelInfer").future(body, timeout=10) for _ in range(QUEUED)]
        time.sleep(0.02)
        for call in calls:
            call.cancel()

    _require_prompt(client, hang_up)


@check("behaviour.expired_work_is_dropped", RECOMMENDED, GRPC)
def expired(client: Grpc) -> None:
    """After the deadline (grpc-timeout) of eight queued requests, the next one does not wait for them."""

    def let_expire() -> None:
        body = client.request(SLOW, {"x": ONE_ROW}).SerializeToString()
        calls = [client.channel.unary_unary(SERVICE + "ModelInfer").future(body, timeout=0.02) for _ in range(QUEUED)]
        for call in calls:
            expect(
                call.code()
                in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED),
                f"it ended with {call.code()}",
            )

    _require_prompt(client, let_expire)


def _require_prompt(client: Any, abandon: Callable[[], None]) -> None:
    """A request right after `abandon` does not wait for it, in one of three tries: a busy machine is not slow each
    time, a server that works off what nobody wants is.
    """
    all_s = _slow_s(client, QUEUED)
    took: list[float] = []
    for _ in range(3):
        abandon()
        began = time.monotonic()
        client.infer(SLOW, {"x": ONE_ROW})
        took.append(time.monotonic() - began)
        if took[-1] < 0.6 * all_s:
            return
    waited_ms = min(took) * 1e3
    expect(False, f"it waited {waited_ms:.0f} ms for work that nobody wants; all of it takes {all_s * 1e3:.0f} ms")


@check("behaviour.quick_beside_slow", RECOMMENDED)
def quick_beside_slow(client: Any) -> None:
    """While a slow model works, a request to another model does not wait for it."""
    slow_s = _slow_s(client, 1)
    took: list[float] = []

    def quick() -> None:
        time.sleep(0.01)
        began = time.monotonic()
        client.infer(IDENTITY["FP32"], {"x": ONE_ROW})
        took.append(time.monotonic() - began)

    # The quickest of three: a server whose requests wait for each other is slow each time, a busy machine is not.
    for _ in range(3):
        for error in in_parallel([lambda: client.infer(SLOW, {"x": ONE_ROW})] * 4 + [quick]):
            if error is not None:
                raise error
    waited_s = min(took)
    expect(waited_s < 2 * slow_s, f"it waited {waited_s * 1e3:.0f} ms; one slow request takes {slow_s * 1e3:.0f} ms")


@check("behaviour.gzip", RECOMMENDED)
def compressed(client: Any) -> None:
    """A compressed request is read."""
    if client.transport == GRPC:
        body = client.request(ADD, add_inputs()).SerializeToString()
        client.call_bytes(SERVICE + "ModelInfer", body, compression=grpc.Compression.Gzip)
        return
    message, _ = client.request(add_inputs())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = client.http("POST", path_of(ADD) + "/infer", gzip.compress(json.dumps(message).encode()), headers)
    expect(read_rest(require_ok(answer)).outputs["sum"].raw == SUM.raw, "a wrong sum")


@check("behaviour.keep_alive", RECOMMENDED, REST)
def keep_alive(client: Rest) -> None:
    """One connection carries several requests, also after a refused one."""
    body = json.dumps(client.request(add_inputs())[0]).encode()
    connection = http.client.HTTPConnection(client.address, timeout=5)
    try:
        for path, wanted in ((ADD, 200), ("no_such_model", 404), (ADD, 200)):
            connection.request("POST", path_of(path) + "/infer", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            expect(
                response.status == wanted or (wanted == 404 and response.status in (400, 422)),
                f"status {response.status}",
            )
            expect(not response.will_close, "the server closes the connection")
    finally:
        connection.close()


@check("behaviour.grpc_health", RECOMMENDED, GRPC)
def grpc_health(client: Grpc) -> None:
    """grpc.health.v1 says SERVING, for load balancers and probes."""
    reply = client.call_bytes("/grpc.health.v1.Health/Check", b"")
    expect(reply == b"\x08\x01", f"the reply is {reply!r}")


def _send_and_hang_up(client: Rest) -> None:
    body = json.dumps(client.request({"x": ONE_ROW})[0]).encode()
    connections = [http.client.HTTPConnection(client.address, timeout=5) for _ in range(QUEUED)]
    for connection in connections:
        connection.request("POST", path_of(SLOW) + "/infer", body, {"Content-Type": "application/json"})
    time.sleep(0.02)
    for connection in connections:
        connection.close()
