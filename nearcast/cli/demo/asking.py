"""Scene 3: real requests from stock clients and ours, over every transport, with answers that a person can check."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from nearcast.cli.demo import file_types, wake_word
from nearcast.cli.demo.samples import FILES, draw, load_clips, load_digits
from nearcast.cli.demo.stage import Stage
from nearcast.cli.demo.traffic import Answer
from nearcast.client import AsyncClient
from nearcast.client.mqtt import MqttDevice
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import WireResponse
from nearcast.wire.status import served_from_trailers

HTTP_TIMEOUT_S = 5.0
MQTT_DEADLINE_MS = 5000.0
INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
SHOWN_DIGIT = 7


class DigitsThroughRouter:
    """One image, asked with plain grpc.aio through the stand-alone router; the trailers say who answered."""

    def __init__(self, stage: Stage, image: npt.NDArray[np.float32], *, deadline_s: float = 1.0) -> None:
        self._address = stage.mesh.addresses["router-1"]["grpc"]
        self._message = TensorRequest(model="digits", inputs={"image": image}).encode()
        self._deadline_s = deadline_s

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._address)
        self._method: Any = self._channel.unary_unary(INFER_PATH)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def __call__(self) -> Answer:
        call = self._method(self._message, timeout=self._deadline_s)
        reply = await call
        served = served_from_trailers(dict(await call.trailing_metadata()))
        scores = WireResponse(reply, served).decode()["probabilities"]
        return Answer(model="digits", version=served.version, served_by=served.node, says=str(int(scores.argmax())))


async def play(stage: Stage) -> None:
    """The router with a stock client, both nodes with ours, plain HTTP, MQTT."""
    stage.title(3, "Real requests: tritonclient, our client, plain HTTP, MQTT")
    await asyncio.to_thread(ask_with_tritonclient, stage)
    await ask_with_client(stage)
    await asyncio.to_thread(ask_with_http, stage)
    await ask_with_mqtt(stage)


def ask_with_tritonclient(stage: Stage) -> None:
    """Digits through the stand-alone router with NVIDIA's client."""
    import tritonclient.grpc as triton

    digits = load_digits()
    with triton.InferenceServerClient(stage.mesh.addresses["router-1"]["grpc"]) as client:
        batch = triton.InferInput("image", [10, 64], "FP32")
        batch.set_data_from_numpy(digits.images)
        scores = client.infer("digits", [batch], client_timeout=5.0).as_numpy("probabilities")
    answers = scores.argmax(axis=1).tolist()
    for line in draw(digits.images[SHOWN_DIGIT]):
        stage.say(f"[green]{line}[/]")
    stage.check(
        "tritonclient over gRPC through the router reads ten digits", ok=answers == list(range(10)), detail=str(answers)
    )


async def ask_with_client(stage: Stage) -> None:
    """File types with our client, which knows both edge nodes."""
    labels = file_types.Labels(file_types.model_folder())
    async with AsyncClient(stage.edge_addresses()) as client:
        for name, (content, truth) in FILES.items():
            answer = await client.infer("magika", {"bytes": file_types.extract_features(content)}, deadline_ms=2000)
            label, score = labels.name(answer.outputs["target_label"][0])
            stage.check(
                f"our client asks what {name} is: {label}",
                ok=label == truth,
                detail=f"{score:.0%} sure, {answer.latency_ms:.1f} ms, {answer.served_by}",
            )


def ask_with_http(stage: Stage) -> None:
    """A digit as plain JSON, as curl would send it."""
    image = load_digits().images[3]
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": image.tolist()}]}
    request = urllib.request.Request(
        f"http://{stage.mesh.addresses['edge-1']['http']}/v2/models/digits/infer",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
        answer = json.load(response)
        served_by = response.headers["nc-served-by"]
    digit = int(np.argmax(answer["outputs"][0]["data"]))
    stage.check("plain HTTP with JSON reads a 3", ok=digit == 3, detail=f"says {digit}, {served_by}")


async def ask_with_mqtt(stage: Stage) -> None:
    """Two devices speak at the same time; the model keeps a state for each of them."""
    clips = load_clips()
    place = f"mqtt://{stage.mesh.addresses['edge-1']['mqtt']}/local"
    async with MqttDevice(f"{place}/kitchen") as kitchen, MqttDevice(f"{place}/garage") as garage:
        heard: dict[str, list[int]] = {"kitchen": [], "garage": []}
        for one, other in zip(clips["okay_nabu"], clips["hey_jarvis"], strict=False):
            for device, step in ((kitchen, one), (garage, other)):
                answer = await device.infer("wake_word", {"input_audio": step}, deadline_ms=MQTT_DEADLINE_MS)
                heard[device.device].append(int(answer.outputs["dense_1"].item()))
        image = load_digits().images[5][None, :]
        digit = await kitchen.infer("digits", {"image": image}, deadline_ms=MQTT_DEADLINE_MS)
    kitchen_peak, garage_peak = (wake_word.peak_probability(heard[name]) for name in ("kitchen", "garage"))
    stage.check(
        "MQTT: the kitchen's microphone hears 'okay nabu', the garage's, interleaved with it, does not",
        ok=wake_word.is_detected(heard["kitchen"]) and not wake_word.is_detected(heard["garage"]),
        detail=f"{kitchen_peak:.0%} and {garage_peak:.0%}",
    )
    says = int(digit.outputs["probabilities"].argmax())
    stage.check("MQTT: request and reply read a 5", ok=says == 5, detail=f"says {says}")
