"""What a REST listener remembers of requests and answers, and how it writes the latter."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from multidict import CIMultiDict

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.transport.json_layouts import JsonLayouts
from nearcast.transport.json_tensors import decode_request
from nearcast.transport.rest_connection import write_answer
from nearcast.transport.rest_heads import HEADS_MAX, Heads
from nearcast.transport.rest_inference import RestInference, _Asker, answer_error
from nearcast.transport.seam import DEFAULT_LIMITS
from nearcast.transport.service import InferenceService
from nearcast.wire.framing import LIMITS
from tests.integration.add_model import AddModel

ERROR = MeshError(Code.CANCELLED, "Gone.")


def is_learned(*fields: tuple[str, str]) -> bool:
    heads = Heads(100)
    learn(heads, b"head", *fields)
    return heads.find(b"head") is not None


def learn(heads: Heads, head: bytes, *fields: tuple[str, str]) -> None:
    message = SimpleNamespace(
        method="POST", path="/v2/models/add/infer", headers=CIMultiDict(fields), should_close=False, version=(1, 1)
    )
    heads.learn(head, message, 10)


def learn_layout(layouts: JsonLayouts, request_id: str) -> bytes:
    body = b'{"id":"%b","inputs":[]}' % request_id.encode()
    layouts.learn(body, len(body), *decode_request("add", "", body, len(body)))
    return body


@pytest.mark.parametrize("code", CATALOGUE)
def test_every_error_can_be_written(code: Code) -> None:
    written = write_answer(answer_error(MeshError(code, "x")), 0)
    assert re.match(rb"HTTP/1.1 %d [\w -]*\r\n" % CATALOGUE[code].http, written)


def test_only_the_first_word_counts() -> None:
    model, told = AddModel(), []
    inference = RestInference(InferenceService(model, model, server_name="x"), DEFAULT_LIMITS)
    for _ in range(2):
        inference._enter()
    asker = _Asker(inference, None, told.append)
    asker.refuse(ERROR)
    asker.refuse(ERROR)
    asker.cancel()
    assert len(told) == inference._in_flight == 1


def test_an_ordinary_head_is_learned() -> None:
    assert is_learned(("Host", "x"))


@pytest.mark.parametrize("name", ["traceparent", "NC-Idempotency-Key"])
def test_a_head_that_does_not_come_again_is_not_learned(name: str) -> None:
    assert not is_learned((name, "1"))


def test_a_head_may_ask_for_what_is_done_anyway() -> None:
    assert is_learned(("Connection", "keep-alive"))


@pytest.mark.parametrize("values", [["x-hop"], ["keep-alive, x-hop"], ["keep-alive", "x-hop"]])
def test_a_head_with_other_words_on_its_connection_is_not_learned(values: list[str]) -> None:
    assert not is_learned(*(("connection", value) for value in values))


def test_the_oldest_head_gives_way() -> None:
    heads = Heads(100)
    for number in range(HEADS_MAX + 1):
        learn(heads, b"%d" % number)
    assert [heads.find(head) is None for head in (b"0", b"1", b"%d" % HEADS_MAX)] == [True, False, False]


def test_the_oldest_layout_gives_way() -> None:
    layouts = JsonLayouts()
    first, second, *_ = (learn_layout(layouts, str(number)) for number in range(LIMITS.layouts_max + 1))
    assert [layouts.read("add", "", body, len(body)) is None for body in (first, second)] == [True, False]


def test_json_longer_than_the_body_has_no_layout() -> None:
    layouts = JsonLayouts()
    body = learn_layout(layouts, "")
    assert layouts.read("add", "", body, len(body)) is not None
    assert layouts.read("add", "", body, len(body) + 5) is None
