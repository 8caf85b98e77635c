"""ModelStreamInfer: many requests over one call (a Triton extension that is announced nowhere)."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

from nearcast.wire.v1 import oip_pb2 as pb
from tests.compat.clients import SERVICE, TIMEOUT_S, Grpc, read_grpc
from tests.compat.contract import ADD, IDENTITY, ONE_ROW, SLOW, SUM, add_inputs
from tests.compat.registry import EXTENSION, GRPC, check, expect
from tests.compat.tensors import make

NAME = "ModelStreamInfer"


def converse(client: Grpc, requests: list[Any]) -> list[Any]:
    """Send all requests, read one answer for each, close."""
    waiting: queue.Queue[Any] = queue.Queue()
    for request in requests:
        waiting.put(request.SerializeToString())

    def outgoing() -> Iterator[bytes]:
        while (body := waiting.get()) is not None:
            yield body

    call = client.channel.stream_stream(SERVICE + "ModelStreamInfer")(outgoing(), timeout=TIMEOUT_S)
    try:
        return [pb.ModelStreamInferResponse.FromString(next(call)) for _ in requests]
    finally:
        waiting.put(None)
        call.cancel()


@check("stream.one", EXTENSION, GRPC, extension=NAME)
def one(client: Grpc) -> None:
    """A request over a stream is answered as over a unary call."""
    (reply,) = converse(client, [client.request(ADD, add_inputs(), request_id="s1")])
    expect(not reply.error_message, f"error: {reply.error_message}")
    answer = read_grpc(reply.infer_response)
    expect(answer.id == "s1" and answer.outputs["sum"].raw == SUM.raw, "another answer")


@check("stream.ids", EXTENSION, GRPC, extension=NAME)
def ids(client: Grpc) -> None:
    """Twenty requests at once are answered each with its id and its own values."""
    requests = [
        client.request(IDENTITY["INT32"], {"x": make("INT32", (1, 1), [n])}, request_id=str(n)) for n in range(20)
    ]
    seen = {}
    for reply in converse(client, requests):
        expect(not reply.error_message, f"error: {reply.error_message}")
        answer = read_grpc(reply.infer_response)
        seen[answer.id] = answer.outputs["y"].values()
    expect(seen == {str(n): [n] for n in range(20)}, f"answers are {seen}")


@check("stream.error_then_continue", EXTENSION, GRPC, extension=NAME)
def goes_on(client: Grpc) -> None:
    """A request that fails is answered by error_message, and the stream goes on."""
    good = client.request(ADD, add_inputs(), request_id="good")
    bad = client.request(ADD, {"a": ONE_ROW}, request_id="bad")
    replies = converse(client, [good, bad, good])
    failed = [reply for reply in replies if reply.error_message]
    expect(len(failed) == 1, f"{len(failed)} of 3 answers are errors")
    for reply in replies:
        if not reply.error_message:
            expect(read_grpc(reply.infer_response).outputs["sum"].raw == SUM.raw, "a wrong sum")


@check("stream.error_id", EXTENSION, GRPC, extension=NAME)
def error_id(client: Grpc) -> None:
    """The answer with error_message carries the id of the request that failed."""
    (reply,) = converse(client, [client.request(ADD, {"a": ONE_ROW}, request_id="bad-1")])
    expect(reply.error_message, "no error")
    expect(reply.infer_response.id == "bad-1", f"the id is {reply.infer_response.id!r}")


@check("stream.two_models", EXTENSION, GRPC, extension=NAME)
def two_models(client: Grpc) -> None:
    """One stream serves several models."""
    numbers = make("INT64", (1, 2), [1, -(2**63)])
    first = client.request(ADD, add_inputs(), request_id="add")
    replies = converse(client, [first, client.request(IDENTITY["INT64"], {"x": numbers}, request_id="int")])
    answers = {reply.infer_response.id: read_grpc(reply.infer_response) for reply in replies}
    expect(answers["add"].outputs["sum"].raw == SUM.raw, "a wrong sum")
    expect(answers["int"].outputs["y"].raw == numbers.raw, "wrong integers")


@check("stream.half_close", EXTENSION, GRPC, extension=NAME)
def half_close(client: Grpc) -> None:
    """A client that closes its side first still gets the answer, then a clean end."""
    body = client.request(SLOW, {"x": ONE_ROW}).SerializeToString()
    call = client.channel.stream_stream(SERVICE + "ModelStreamInfer")(iter([body]), timeout=TIMEOUT_S)
    replies = [pb.ModelStreamInferResponse.FromString(reply) for reply in call]
    expect(len(replies) == 1, f"{len(replies)} answers to one request")
    expect(read_grpc(replies[0].infer_response).outputs["y"].raw == ONE_ROW.raw, "a wrong answer")
