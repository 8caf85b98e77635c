"""The edge node as its users meet it: a process with real models, asked over gRPC, REST and MQTT."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model_sync.publisher.bundle import create_bundle, read_spec
from nearcast.cli.demo import wake_word
from nearcast.cli.demo.bundles import write_sources
from nearcast.cli.demo.samples import load_clips, load_digits
from nearcast.client.mqtt import MqttDevice
from nearcast.errors import Code, MeshError
from nearcast.store import Pointer, Store

WAIT_S = 30.0
pytest.importorskip("pymicro_wakeword")
needs_mosquitto = pytest.mark.skipif(not Path("/usr/sbin/mosquitto").exists(), reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of the demo, built as an operator would."""
    folder = tmp_path_factory.mktemp("bundles")
    specs = write_sources(folder / "sources")
    made = {name: folder / name for name in ("digits-1", "wake-word-1")}
    for name, out in made.items():
        create_bundle(read_spec(specs[name]), specs[name].parent, out)
    return made


def install(bundles, root: Path) -> None:
    store = Store(root)
    for name, model in (("digits-1", "digits"), ("wake-word-1", "wake_word")):
        shutil.copytree(bundles[name], store.stage_folder(model, 1), dirs_exist_ok=True)
        store.commit(model, 1, store.stage_folder(model, 1))
        store.write_pointer(model, Pointer(stable=1))


class Node:
    def __init__(self, folder: Path, *settings: str, name: str = "edge") -> None:
        pairs = [
            f"data_dir={folder}",
            *(f"listen.{kind}=127.0.0.1:0" for kind in ("grpc", "http", "metrics")),
            *settings,
        ]
        command = [sys.executable, "-m", "nearcast", name, *(part for pair in pairs for part in ("--set", pair))]
        self.log = (folder.parent / "node.log").open("wb")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log)
        line = self.process.stdout.readline()
        assert line, (folder.parent / "node.log").read_text()
        self.addresses = json.loads(line)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(WAIT_S)
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture
def node(bundles, tmp_path):
    install(bundles, tmp_path / "edge" / "models")
    settings = ("mqtt.broker=spawn", "mqtt.port=0", 'streams=[{name="sketch",model="digits"}]')
    node = Node(tmp_path / "edge", *settings, f"listen.local=unix:{tmp_path / 'local.sock'}")
    yield node
    if node.process.poll() is None:
        node.stop(signal.SIGKILL)


def nearcast(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nearcast", *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def work_locally(address: str) -> None:
    """What only a process of this machine may do: share memory, and give a model back."""
    import tritonclient.grpc as triton
    import tritonclient.utils.shared_memory as shm

    image = load_digits().images[7][None, :].astype(np.float32)
    key = f"/nc-edge-{os.getpid()}"
    handle = shm.create_shared_memory_region("image", key, image.nbytes)
    client = triton.InferenceServerClient(address)
    try:
        shm.set_shared_memory_region(handle, [image])
        client.register_system_shared_memory("image", key, image.nbytes)
        tensor = triton.InferInput("image", list(image.shape), "FP32")
        tensor.set_shared_memory("image", image.nbytes)
        client.unload_model("digits")
        best = triton.InferRequestedOutput("probabilities", class_count=1)
        top = client.infer("digits", [tensor], outputs=[best]).as_numpy("probabilities")
        assert top.shape == (1, 1)
        assert top[0, 0].split(b":")[1] == b"7"
        (counts,) = client.get_inference_statistics("digits").model_stats
        assert (counts.inference_count, counts.execution_count) >= (1, 1)
    finally:
        client.close()
        shm.destroy_shared_memory_region(handle)


async def sketch(broker: str) -> dict:
    """A device sends a drawing to a stream; what another program reads of it."""
    host, _, port = broker.rpartition(":")
    command = ["mosquitto_sub", "-h", host, "-p", port, "-t", "nc/v1/local/+/out/sketch", "-C", "1", "-W", "10", "-d"]
    pipe = asyncio.subprocess.PIPE
    reader = await asyncio.create_subprocess_exec("stdbuf", "-oL", *command, stdout=pipe)
    while b"SUBACK" not in (line := await reader.stdout.readline()):
        assert line, "mosquitto_sub ended"
    async with MqttDevice(f"mqtt://{broker}/local/pad") as pad:
        await pad.send("sketch", load_digits().images[7].astype(np.float32).tobytes())
        out = await reader.stdout.read()
    return json.loads(next(line for line in out.splitlines() if line.startswith(b"{")))


def retained(broker: str, leaf: str) -> dict:
    """What the node says about itself."""
    host, _, port = broker.rpartition(":")
    topic = f"nc/v1/local/node/edge-1/{leaf}"
    command = ["mosquitto_sub", "-h", host, "-p", port, "-t", topic, "-C", "1", "-W", "10"]
    return json.loads(subprocess.run(command, capture_output=True, timeout=WAIT_S, check=True).stdout)


def wish(broker: str, version: int, **desired) -> dict:
    """Wish something of the node; returns what it reports."""
    host, _, port = broker.rpartition(":")
    text = json.dumps({"version": version, "desired": desired})
    command = ["mosquitto_pub", "-h", host, "-p", port, "-t", "nc/v1/local/node/edge-1/desired", "-r", "-q", "1"]
    subprocess.run([*command, "-m", text], timeout=WAIT_S, check=True)
    return retained(broker, "reported")


@needs_mosquitto
async def test_one_image_over_every_transport_and_two_microphones(node, tmp_path):
    assert node.addresses["ready"] == "edge-1"
    image = tmp_path / "image.npy"
    np.save(image, load_digits().images[7][None, :])
    urls = [
        f"grpc://{node.addresses['grpc']}",
        f"http://{node.addresses['http']}",
        f"mqtt://{node.addresses['mqtt']}/local/camera",
    ]
    found = await asyncio.gather(
        *(asyncio.to_thread(nearcast, "infer", "digits", f"image=@{image}", "--url", url, "--json") for url in urls)
    )
    for run in found:
        assert run.returncode == 0, run.stderr
        answer = json.loads(run.stdout)
        assert int(np.argmax(answer["outputs"][0]["data"])) == 7
        assert (answer["model_version"], answer["served_by"], answer["tier"]) == ("1", "edge-1", "local")

    event = await sketch(node.addresses["mqtt"])
    assert (event["device"], event["stream"], event["seq"]) == ("pad", "sketch", 1)
    assert event["results"][0]["class_name"] == "7"
    words = [f"drawing of {digit}" for digit in range(10)]
    streams = [{"name": "sketch", "model": "digits", "labels": words}]
    reported = await asyncio.to_thread(wish, node.addresses["mqtt"], 3, streams=streams)
    assert (reported["version"], reported["reported"]["streams"][0]["labels"]) == (3, words)
    assert (await sketch(node.addresses["mqtt"]))["results"][0]["class_name"] == "drawing of 7"
    models = await asyncio.to_thread(retained, node.addresses["mqtt"], "models")
    assert {each["model"] for each in models["models"]} == {"digits", "wake_word"}
    state = await asyncio.to_thread(retained, node.addresses["mqtt"], "state")
    assert (state["state"], state["clock_ok"]) == ("online", True)

    await asyncio.to_thread(work_locally, node.addresses["local"])

    clips = load_clips()
    place = f"mqtt://{node.addresses['mqtt']}/local"
    heard: dict[str, list[int]] = {"kitchen": [], "garage": []}
    async with MqttDevice(f"{place}/kitchen") as kitchen, MqttDevice(f"{place}/garage") as garage:
        for one, other in zip(clips["okay_nabu"], clips["hey_jarvis"], strict=False):
            for device, step in ((kitchen, one), (garage, other)):
                answer = await device.infer("wake_word", {"input_audio": step}, deadline_ms=10_000)
                assert answer.served_by == "edge-1"
                heard[device.device].append(int(answer.outputs["dense_1"].item()))
        with pytest.raises(MeshError) as refused:
            await garage.infer("nothere", {"x": np.zeros(1, np.float32)}, deadline_ms=5000)
    assert wake_word.is_detected(heard["kitchen"])
    assert not wake_word.is_detected(heard["garage"])
    assert refused.value.code is Code.MODEL_NOT_FOUND
    assert "digits" in refused.value.message
    assert node.stop() == 0


def test_infer_reads_json_and_says_what_is_wrong(node):
    url = f"grpc://{node.addresses['grpc']}"
    value = json.dumps(load_digits().images[3][None, :].tolist())
    good = nearcast("infer", "digits", f"image={value}", "--url", url)
    assert good.returncode == 0, good.stderr
    assert "edge-1 (local)" in good.stdout
    unknown = nearcast("infer", "digits", "picture=[1]", "--url", url)
    assert unknown.returncode == 64
    assert "image" in unknown.stderr
    absent = nearcast("infer", "nothere", "x=[1]", "--url", url)
    assert absent.returncode == 66
    lost = nearcast("infer", "digits", f"image={value}", "--url", "grpc://127.0.0.1:1", "--deadline-ms", "2000")
    assert lost.returncode == 69
    assert node.stop() == 0


@needs_mosquitto
def test_nothing_is_left_behind_when_the_node_is_killed(node):
    listing = Path("/proc")
    broker_port = node.addresses["mqtt"].rpartition(":")[2]

    def brokers():
        found = []
        for entry in listing.iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes()
                    children = (entry / "status").read_text()
                except OSError:
                    continue
                if (
                    b"mosquitto.conf" in command
                    and str(node_folder(node)).encode() in command
                    and "State:\tZ" not in children
                ):
                    found.append(int(entry.name))
        return found

    assert broker_port.isdigit()
    assert len(brokers()) == 1
    node.stop(signal.SIGKILL)
    for _ in range(500):
        if not brokers():
            break
        os.sched_yield()
        subprocess.run(["sleep", "0.01"], check=True)
    assert brokers() == []


def node_folder(node) -> Path:
    return Path(next(part for part in node.process.args if part.startswith("data_dir=")).partition("=")[2])


@pytest.mark.parametrize("setting", ["listen.grpc=0.0.0.0:0", "listen.http=0.0.0.0:0"])
def test_a_reachable_listener_without_certificates_refuses_to_start(setting, tmp_path):
    pairs = [
        f"data_dir={tmp_path / 'n'}",
        "listen.grpc=127.0.0.1:0",
        "listen.http=127.0.0.1:0",
        "listen.metrics=",
        setting,
    ]
    run = nearcast("edge", *(part for pair in pairs for part in ("--set", pair)))
    assert run.returncode != 0
    assert "certificate" in run.stderr.lower() or "tls" in run.stderr.lower()


def test_other_tenants_need_an_authenticating_broker(tmp_path):
    run = nearcast(
        "edge", "--set", f"data_dir={tmp_path / 'n'}", "--set", "mqtt.broker=spawn", "--set", 'mqtt.tenants=["acme"]'
    )
    assert run.returncode == 64
    assert "local" in run.stderr


def test_the_cloud_core_serves_too(bundles, tmp_path):
    install(bundles, tmp_path / "cloud" / "models")
    node = Node(tmp_path / "cloud", name="cloud")
    try:
        image = tmp_path / "image.npy"
        np.save(image, load_digits().images[2][None, :])
        run = nearcast("infer", "digits", f"image=@{image}", "--url", f"http://{node.addresses['http']}", "--json")
        assert run.returncode == 0, run.stderr
        answer = json.loads(run.stdout)
        assert int(np.argmax(answer["outputs"][0]["data"])) == 2
        assert answer["served_by"] == "cloud-1"
    finally:
        assert node.stop() == 0
