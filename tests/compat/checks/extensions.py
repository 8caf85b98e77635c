"""Triton's extensions that every tool asks for: configuration, statistics, repository, sequences, schedule policy."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import nearcast
from tests.compat.clients import RefusedError
from tests.compat.contract import ADD, IDENTITY, ONE_ROW, SEQUENCE, SLOW, add_inputs
from tests.compat.load import in_parallel
from tests.compat.registry import EXTENSION, GRPC, RECOMMENDED, check, expect
from tests.compat.tensors import Tensor, make

CONFIG, STATISTICS, REPOSITORY = "model_configuration", "statistics", "model_repository"
SEQUENCES, SCHEDULE, CLASSIFICATION = "sequence", "schedule_policy", "classification"


def require_refused(call: Any, what: str) -> RefusedError:
    """The error that a call ends with."""
    try:
        call()
    except RefusedError as error:
        return error
    raise AssertionError(f"{what} was answered")


@check("config.tensors", EXTENSION, extension=CONFIG)
def config(client: Any) -> None:
    """ModelConfig names the model, its tensors and their types in Triton's words."""
    found = client.config(ADD)
    expect(found["name"] == ADD, f"the name is {found['name']!r}")
    expect(
        {t["name"]: t["data_type"] for t in found["input"]} == {"a": "TYPE_FP32", "b": "TYPE_FP32"}, str(found["input"])
    )
    expect({t["name"] for t in found["output"]} == {"sum", "difference"}, str(found["output"]))


@check("config.shapes_agree", EXTENSION, extension=CONFIG)
def config_shapes(client: Any) -> None:
    """Dims of the configuration, with a batch axis if max_batch_size > 0, are the shape of the metadata."""
    found = client.config(ADD)
    axis = [-1] if found.get("max_batch_size", 0) > 0 else []
    shapes = {t["name"]: [int(size) for size in t["shape"]] for t in client.model_metadata(ADD)["inputs"]}
    for tensor in found["input"]:
        dims = axis + [int(size) for size in tensor["dims"]]
        expect(
            dims == shapes[tensor["name"]],
            f"{tensor['name']} has the dims {dims} and the shape {shapes[tensor['name']]}",
        )


@check("config.unknown_model", EXTENSION, extension=CONFIG)
def config_of_unknown(client: Any) -> None:
    """ModelConfig of an unknown model is refused with a client error."""
    client.config(ADD)
    error = require_refused(lambda: client.config("no_such_model"), "an unknown model")
    expect(error.blames_client, f"it says {error}")


def _counts(client: Any, model: str = ADD) -> dict[str, int]:
    entries = [entry for entry in client.statistics(model) if entry["name"] == model]
    stats = [entry["inference_stats"] for entry in entries]
    return {
        "inferences": sum(int(entry["inference_count"]) for entry in entries),
        "executions": sum(int(entry["execution_count"]) for entry in entries),
        "success": sum(int(each["success"]["count"]) for each in stats),
        "success_ns": sum(int(each["success"]["ns"]) for each in stats),
        "compute_ns": sum(int(each["compute_infer"]["ns"]) for each in stats),
        "fail": sum(int(each["fail"]["count"]) for each in stats),
    }


def _grown(client: Any, act: Any, model: str = ADD) -> dict[str, int]:
    before = _counts(client, model)
    act()
    for _ in range(20):  # counts may follow the answer by a moment
        after = _counts(client, model)
        if after != before:
            break
        time.sleep(0.01)
    return {name: after[name] - before[name] for name in after}


@check("statistics.success", EXTENSION, extension=STATISTICS)
def counts_successes(client: Any) -> None:
    """Three requests answered are three successes, with time in them."""
    client.infer(ADD, add_inputs())
    before = _counts(client)
    for _ in range(3):
        client.infer(ADD, add_inputs())
    time.sleep(0.02)
    after = _counts(client)
    expect(after["success"] - before["success"] == 3, f"{after['success'] - before['success']} successes")
    expect(after["success_ns"] > before["success_ns"], "no time in them")


@check("statistics.rows", EXTENSION, extension=STATISTICS)
def counts_rows(client: Any) -> None:
    """inference_count counts rows where the model has a batch axis: one request of 2 rows is 2 inferences."""
    client.infer(ADD, add_inputs())
    batches = client.config(ADD).get("max_batch_size", 0) > 0
    grown = _grown(client, lambda: client.infer(ADD, add_inputs()))
    expect(grown["inferences"] == (2 if batches else 1), f"{grown['inferences']} inferences")
    expect(grown["executions"] == 1, f"{grown['executions']} executions")


@check("statistics.fail", EXTENSION, extension=STATISTICS)
def counts_failures(client: Any) -> None:
    """A request that fails before it runs is no success."""
    client.infer(ADD, add_inputs())
    time.sleep(0.02)
    before = _counts(client)
    require_refused(lambda: client.infer(ADD, {"a": ONE_ROW}), "a request without an input")
    time.sleep(0.02)
    after = _counts(client)
    expect(after["success"] == before["success"], "it counts as a success")
    expect(after["inferences"] == before["inferences"], "it counts as an inference")


@check("statistics.compute_within_success", EXTENSION, extension=STATISTICS)
def compute_within_success(client: Any) -> None:
    """The time of compute is part of the time of success, and most of it for a slow model."""
    client.infer(SLOW, {"x": ONE_ROW})
    grown = _grown(client, lambda: client.infer(SLOW, {"x": ONE_ROW}), SLOW)
    expect(grown["compute_ns"] <= grown["success_ns"], f"{grown['compute_ns']} ns of {grown['success_ns']} ns")
    expect(grown["compute_ns"] >= 0.5 * grown["success_ns"], f"{grown['compute_ns']} ns of {grown['success_ns']} ns")


@check("statistics.last_inference", EXTENSION, extension=STATISTICS)
def last_inference(client: Any) -> None:
    """last_inference is the time of the last request in milliseconds since 1970."""
    client.infer(ADD, add_inputs())
    now = time.time() * 1000
    last = max(int(entry["last_inference"]) for entry in client.statistics(ADD))
    expect(abs(now - last) < 5000, f"last_inference is {last}, now is {now:.0f}")


@check("statistics.all_models", EXTENSION, extension=STATISTICS)
def all_models(client: Any) -> None:
    """Statistics without a name list every model that was asked for something."""
    client.infer(ADD, add_inputs())
    client.infer(IDENTITY["FP32"], {"x": ONE_ROW})
    names = {entry["name"] for entry in client.statistics()}
    expect({ADD, IDENTITY["FP32"]} <= names, f"names are {sorted(names)}")


@check("statistics.unknown_model", EXTENSION, extension=STATISTICS)
def statistics_of_unknown(client: Any) -> None:
    """Statistics of an unknown model are refused with a client error."""
    client.statistics(ADD)
    error = require_refused(lambda: client.statistics("no_such_model"), "an unknown model")
    expect(error.blames_client, f"it says {error}")


@check("repository.index", EXTENSION, extension=REPOSITORY)
def index(client: Any) -> None:
    """The repository index lists every model, READY where it is."""
    states = {entry["name"]: entry.get("state") for entry in client.index()}
    expect(states.get(ADD) == "READY", f"{ADD} is {states.get(ADD)}")
    expect(set(IDENTITY.values()) - {IDENTITY["BF16"]} <= set(states), "models are missing")


@check("repository.index.ready", EXTENSION, extension=REPOSITORY)
def index_ready(client: Any) -> None:
    """The index of ready models lists no other."""
    found = client.index(ready=True)
    expect(found and all(entry.get("state") == "READY" for entry in found), f"{found}")


@cache
def spoken_frames() -> Any:
    """INT8 [65, 1, 3, 40]: a spoken word, for which a wake word model's answer depends on what it has heard."""
    clips = Path(nearcast.__file__).parent / "cli" / "demo" / "models" / "wake_word" / "clips.npz"
    with np.load(clips) as found:
        return found["okay_nabu"]


def _frame(client: Any, index: int) -> tuple[str, Tensor]:
    (spec,) = client.model_metadata(SEQUENCE)["inputs"]
    frame = spoken_frames()[index]
    return spec["name"], Tensor("INT8", frame.shape, frame.tobytes())


def _step(client: Any, sequence: Any, index: int, **flags: bool) -> bytes:
    name, tensor = _frame(client, index)
    parameters = {"sequence_id": sequence} | {f"sequence_{key}": value for key, value in flags.items()}
    answer = client.infer(SEQUENCE, {name: tensor}, parameters=parameters)
    return b"".join(answer.outputs[key].raw for key in sorted(answer.outputs))


def _run(client: Any, sequence: Any, frames: list[int]) -> list[bytes]:
    last = len(frames) - 1
    return [_step(client, sequence, index, start=n == 0, end=n == last) for n, index in enumerate(frames)]


@check("sequence.state", EXTENSION, extension=SEQUENCES)
def keeps_state(client: Any) -> None:
    """A sequence's answers depend on what it sent before, and a new start begins afresh."""
    frames = list(range(45))
    first = _run(client, 701, frames)
    expect(_run(client, 701, frames) == first, "the second run of the same sequence differs from the first")
    other = _run(client, 701, [*range(20, 64), frames[-1]])
    expect(other[-1] != first[-1], "the last answer does not depend on what came before it")


@check("sequence.isolation", EXTENSION, extension=SEQUENCES)
def isolated(client: Any) -> None:
    """Two sequences interleaved get what each gets alone."""
    frames = {702: list(range(45)), 703: list(range(10, 55))}
    alone = {key: _run(client, key, own) for key, own in frames.items()}
    expect(alone[702] != alone[703], "both get the same alone")
    mixed: dict[int, list[bytes]] = {702: [], 703: []}
    for n in range(45):
        for key, own in frames.items():
            mixed[key].append(_step(client, key, own[n], start=n == 0, end=n == 44))
    expect(mixed == alone, "interleaved answers differ")


@check("sequence.text_id", EXTENSION, extension=SEQUENCES)
def text_id(client: Any) -> None:
    """A sequence may be named by text."""
    expect(_run(client, "camera-7", [1, 2, 3]) == _run(client, 704, [1, 2, 3]), "answers differ from a numbered one")


@check("sequence.not_started", EXTENSION, extension=SEQUENCES)
def not_started(client: Any) -> None:
    """A request of a sequence that was never started is refused."""
    _run(client, 798, [0, 1])
    require_refused(lambda: _step(client, 799, 1), "it")


@check("sequence.no_id", EXTENSION, extension=SEQUENCES)
def no_id(client: Any) -> None:
    """A request without a sequence to a model that keeps state is refused."""
    name, tensor = _frame(client, 1)
    require_refused(lambda: client.infer(SEQUENCE, {name: tensor}), "it")


@check("schedule.priority", EXTENSION, extension=SCHEDULE)
def priority(client: Any) -> None:
    """A priority is accepted."""
    client.infer(ADD, add_inputs(), parameters={"priority": 1})


@check("schedule.timeout.enough", EXTENSION, extension=SCHEDULE)
def long_timeout(client: Any) -> None:
    """A request with a timeout of 9 s is answered."""
    client.infer(ADD, add_inputs(), parameters={"timeout": 9_000_000})


@check("schedule.timeout.queued", EXTENSION, extension=SCHEDULE)
def queued_timeout(client: Any) -> None:
    """Behind six slow requests, one with a timeout of 1 ms is refused and does not run."""
    calls = [lambda: client.infer(SLOW, {"x": ONE_ROW})] * 6

    def late() -> None:
        time.sleep(0.005)
        require_refused(lambda: client.infer(SLOW, {"x": ONE_ROW}, parameters={"timeout": 1000}), "it")

    for error in in_parallel([*calls, late]):
        if error is not None:
            raise error


@check("classification.top_two", EXTENSION, extension=CLASSIFICATION)
def classification(client: Any) -> None:
    """The parameter `classification` = 2 turns an output into its two largest values, as BYTES `value:index`."""
    tensor = make("FP32", (1, 4), [0.5, 3.0, -1.0, 2.0])
    if client.transport == GRPC:
        request = client.request(IDENTITY["FP32"], {"x": tensor}, outputs=["y"])
        request.outputs[0].parameters["classification"].int64_param = 2
        found = client.send(request).outputs["y"]
    else:
        message, _ = client.request({"x": tensor}, outputs=["y"])
        message["outputs"][0]["parameters"] = {"classification": 2}
        found = client.send(IDENTITY["FP32"], message).outputs["y"]
    parts = [value.decode().split(":")[:2] for value in found.values()]
    expect([(float(value), int(index)) for value, index in parts] == [(3.0, 1), (2.0, 3)], f"y is {found.values()}")


@check("statistics.of_one_version", RECOMMENDED, extension=STATISTICS)
def of_one_version(client: Any) -> None:
    """Statistics of one version list that version only."""
    version = client.infer(ADD, add_inputs()).version
    expect({entry["version"] for entry in client.statistics(ADD, version)} == {version}, "others too, or none")
