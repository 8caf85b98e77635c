"""`python -m benchmarks.device_streams_node PORT KIND FOLDER`: a node whose devices send streams.

`audio` runs Silero VAD (explicit state) and the wake word "okay nabu" (hidden state) on samples and features of sound;
`cheap` a classifier of digits, behind the router as on a node.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import uvloop

from benchmarks.mqtt_node import DIGITS, NODE
from benchmarks.serving_models import Workload, fill_store, workloads
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.worker import MqttWorker
from model_sync.publisher.bundle import BundleSpec, create_bundle
from nearcast.cli.demo.samples import load_clips
from nearcast.cli.demo.wake_word import CUTOFF, OUTPUT_SCALE, WINDOWS, model_file
from nearcast.runtime import announce, keep_pages
from nearcast.serving.host import ModelHost
from nearcast.store import Store
from nearcast.store.manifest import Tensor
from nearcast.store.pointer import Pointer
from router.policy import Policy, PolicyConfig
from router.router import Router

VOICE = StreamDefinition(
    name="voice",
    model="silero",
    window=576,
    hop=512,
    datatype="INT16",
    scale=1 / 32768,
    labels=("speech",),
)
WAKE = StreamDefinition(
    name="wake",
    model="wake_word",
    window=120,
    labels=("okay nabu",),
    score_scale=OUTPUT_SCALE,
    mean_of=WINDOWS,
    threshold=CUTOFF,
    emit="change",
)
DIGIT = StreamDefinition(name="digit", model="digits")


def fill_audio(folder: Path) -> Store:
    """A store with both models of sounds."""
    silero = next(each for each in workloads() if each.name == "silero")
    store = fill_store(folder, silero, silero.make())
    source = folder / "wake_word"
    source.mkdir()
    (source / "model.tflite").write_bytes(model_file().read_bytes())
    # In order on one fresh interpreter, which hears the phrase on the way.
    steps = [{"inputs": {"input_audio": step.tolist()}} for step in load_clips()["okay_nabu"]]
    (source / "golden.json").write_text(json.dumps(steps))
    spec = BundleSpec(
        name=WAKE.model,
        release=1,
        semver="1.0.0",
        engine="litert",
        model_file="model.tflite",
        licence="Apache-2.0",
        stateful="hidden",
        golden=("golden.json",),
        inputs=(Tensor(name="input_audio", datatype="INT8", shape=(1, 3, 40)),),
        outputs=(Tensor(name="dense_1", datatype="UINT8", shape=(1, 1)),),
    )
    create_bundle(spec, source, folder / "wake_bundle")
    store.commit(WAKE.model, 1, folder / "wake_bundle")
    store.write_pointer(WAKE.model, Pointer(stable=1, last_good=1))
    return store


def fill_cheap(folder: Path) -> Store:
    """A store with the small classifier."""
    inputs = (Tensor(name="image", datatype="FP32", shape=(-1, 64), batch_axis=0),)
    outputs = (Tensor(name="probabilities", datatype="FP32", shape=(-1, 10), batch_axis=0),)
    model = Workload(name="digits", engine_us=0, make=DIGITS.read_bytes, inputs=inputs, outputs=outputs)
    return fill_store(folder, model, model.make())


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("kind", choices=("audio", "cheap"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    keep_pages()
    root = options.folder / options.kind
    is_new = not (root / "store").exists()
    fill = fill_audio if options.kind == "audio" else fill_cheap
    store = fill(root) if is_new else Store(root / "store")
    host = ModelHost(store, node=NODE)
    await host.start()
    router = Router(Policy(PolicyConfig(), seed=1), local=host, node=NODE)
    await router.start()
    worker = MqttWorker(
        router,
        router,
        node=NODE,
        host="127.0.0.1",
        port=options.port,
        inbox=root / "inbox.sqlite",
        streams=(VOICE, WAKE) if options.kind == "audio" else (DIGIT,),
    )
    await worker.start()
    await worker.wait_connected()
    announce("streams")
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
