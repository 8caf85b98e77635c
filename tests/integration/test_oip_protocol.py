"""Every feature of the protocol over gRPC (both servers) and REST alike, with real models on a real host."""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pymicro_wakeword
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import serialize_byte_tensor

from nearcast.identity import CertificateAuthority
from nearcast.serving import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store import Store
from nearcast.transport.shared_memory import RegionLimits, Regions
from tests.integration.oip_ways import WAYS, Refused, make_client, make_listener, shape_of
from tests.tiny_models import activate, affine_model, install, tensor, text_model

X = np.float32([[1, 5, 3, 3], [0, -1, 2, 1]])
FORBIDDEN = ("PERMISSION_DENIED", "403")
INVALID = ("INVALID_ARGUMENT", "400")
UNSUPPORTED = ("UNIMPLEMENTED", "501")
EXTENSIONS = {
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "sequence",
    "sequence(string_id)",
    "statistics",
}


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
async def host(tmp_path):
    store = Store(tmp_path / "store")
    install(store, affine_model(), labels=("zero", "one", "two"), response_cache=True)
    text = {"inputs": (tensor("x", "BYTES", (-1,)),), "outputs": (tensor("y", "BYTES", (-1,)),)}
    install(store, text_model(), name="text", **text)
    activate(store, stable=1)
    activate(store, "text", stable=1)
    host = ModelHost(store, node="test-1", limits=HostLimits(slots=2, batch_rows_max=8))
    await host.start()
    yield host
    await host.close()


@contextmanager
def regions_bound_to(**limits):
    regions = Regions(RegionLimits(**limits))
    yield regions
    regions.close()


@pytest.fixture
async def client(way, host, tmp_path):
    """Over the server's Unix socket, as the user that the server runs as."""
    with regions_bound_to(regions_max=3, region_bytes_max=4096, tensor_bytes_max=2048) as regions:
        address = f"unix:{tmp_path / 'oip.sock'}"
        server = make_listener(way, host, host, address, regions=regions)
        await server.start()
        client = make_client(way, address)
        yield client
        await client.close()
        await server.drain(2.0)


@pytest.fixture
async def remote(way, host):
    """Over TCP, as anybody."""
    server = make_listener(way, host, host, "127.0.0.1:0")
    await server.start()
    client = make_client(way, server.address)
    yield client
    await client.close()
    await server.drain(2.0)


@pytest.fixture
def region():
    """A client's shared memory object of 256 bytes."""
    key = f"/nc-test-{os.getpid()}"
    handle = shm.create_shared_memory_region("r", key, 256)
    yield key, handle
    shm.destroy_shared_memory_region(handle)


@contextmanager
def refused(statuses, words):
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.status in statuses, caught.value
    assert words in caught.value.text, caught.value.text


async def test_configuration_is_what_load_generators_read(client):
    metadata, config = await client.metadata("affine"), await client.config("affine", "1")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    if "properties" in metadata:  # which tritonclient's gRPC messages lack
        assert metadata["properties"]["labels"] == "zero\none\ntwo"
    assert (config["name"], config["platform"], config["backend"]) == ("affine", "onnxruntime_onnx", "onnxruntime")
    # The batch axis is in the metadata's shapes and not in the configuration's.
    assert config["max_batch_size"] == 8
    assert [(t["name"], t["data_type"], t["dims"]) for t in config["input"]] == [("x", "TYPE_FP32", [4])]
    assert [(t["name"], t["data_type"], t["dims"]) for t in config["output"]] == [("y", "TYPE_FP32", [4])]
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == HostLimits().queue_rows_max
    assert "sequence_batching" not in config
    assert "ensemble_scheduling" not in config
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert config["response_cache"] == {"enable": True}
    assert [int(version) for version in config["version_policy"]["specific"]["versions"]] == [1]
    assert [(g["count"], g["kind"]) for g in config["instance_group"]] == [(2, "KIND_CPU")]
    assert config["parameters"]["semver"] == {"string_value": "1.0.1"}
    # A row of text has no axis that `dims` could name: the full shape, and no batch size.
    text = await client.config("text")
    assert (text["max_batch_size"], text["input"][0]["data_type"], text["input"][0]["dims"]) == (0, "TYPE_STRING", [-1])
    with refused(("NOT_FOUND", "404"), "affine, text"):
        await client.config("none")


async def test_statistics_count_rows_runs_and_the_cache(client):
    for rows in (X, X, np.concatenate([X, X, X])):
        await client.infer("affine", {"x": rows})
    with refused(INVALID, "must have shape"):
        await client.infer("affine", {"x": X[:, :2]})
    (entry,) = await client.statistics("affine", "1")
    stats = entry["inference_stats"]
    assert (entry["name"], entry["version"]) == ("affine", "1")
    # Three requests of 2, 2 and 6 rows; the second one is the first again and comes from the cache.
    assert (entry["inference_count"], entry["execution_count"]) == (8, 2)
    assert [(b["batch_size"], b["compute_infer"]["count"]) for b in entry["batch_stats"]] == [(2, 1), (6, 1)]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (3, 1)
    assert (stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (1, 2)
    assert stats["success"]["ns"] >= stats["queue"]["ns"] + stats["compute_infer"]["ns"] > 0
    assert stats["fail"]["ns"] > 0
    assert entry["last_inference"] > 1_600_000_000_000
    assert entry["memory_usage"][0]["byte_size"] > 0
    assert {found["name"] for found in await client.statistics()} == {"affine", "text"}
    with refused(("NOT_FOUND", "404"), "not on this node"):
        await client.statistics("none")


async def test_many_small_requests_are_fewer_runs(client):
    rows = [np.full((1, 4), number, np.float32) for number in range(24)]
    answers = await asyncio.gather(*(client.infer("affine", {"x": row}) for row in rows))
    assert all(np.array_equal(answer.as_numpy("y"), 2 * row) for answer, row in zip(answers, rows, strict=True))
    (entry,) = await client.statistics("affine")
    assert entry["inference_count"] == 24
    assert entry["execution_count"] <= 24
    runs = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in entry["batch_stats"]}
    assert sum(runs.values()) == entry["execution_count"]
    assert sum(size * count for size, count in runs.items()) == 24


async def test_the_operator_loads_and_unloads(client, host):
    assert {"model_repository", "system_shared_memory"} | EXTENSIONS == set((await client.server())["extensions"])
    await client.unload("affine")
    assert [(m["name"], m["state"]) for m in await client.index()] == [("affine", "UNAVAILABLE"), ("text", "READY")]
    # Given up until it is asked for again.
    assert (await client.infer("affine", {"x": X})).as_numpy("y").tolist() == (2 * X).tolist()
    await client.unload("affine")
    await client.load("affine")
    assert [m["state"] for m in await client.index()] == ["READY", "READY"]
    with refused(("NOT_FOUND", "404"), "'none' is not on this node"):
        await client.load("none")
    with refused(UNSUPPORTED, "signed bundles alone"):
        await client.load("affine", config='{"max_batch_size": 99}')


async def test_others_load_nothing_and_share_no_memory(remote, region):
    assert {"model_repository(index)"} | EXTENSIONS == set((await remote.server())["extensions"])
    with refused(FORBIDDEN, "Only an operator may load models"):
        await remote.load("affine")
    with refused(FORBIDDEN, "Only an operator may unload models"):
        await remote.unload("affine")
    with refused(FORBIDDEN, "over the server's Unix socket"):
        await remote.register("r", region[0], 256)
    with refused(FORBIDDEN, "over the server's Unix socket"):
        await remote.infer("affine", {"x": ("FP32", [2, 4], "r", 32, 0)})
    with refused(FORBIDDEN, "over the server's Unix socket"):
        await remote.infer("affine", {"x": X}, {"y": ("r", 32, 0)})
    await remote.unregister()
    assert await remote.regions() == []
    # A copy of another's name gives nothing, and what was refused harmed nobody.
    assert (await remote.infer("affine", {"x": X})).as_numpy("y").tolist() == (2 * X).tolist()


@pytest.mark.parametrize("way", ["ngh2", "rest"])
async def test_certificates_of_operators_load_too(way, host, tmp_path):
    from tests.integration.test_oip_clients import certify

    authority = CertificateAuthority.create(tmp_path / "ca")
    edge, operator = (certify(authority, tmp_path / role, role) for role in ("edge", "operator"))
    server = make_listener(way, host, host, "127.0.0.1:0", identity=edge)
    await server.start()
    try:
        for identity, status in ((operator, True), (edge, False)):
            assert await _unload_by(way, server.address, identity) is status
    finally:
        await server.drain(2.0)


async def _unload_by(way, address, identity):
    """Whether a peer with this certificate may unload."""
    import aiohttp

    from nearcast.errors import MeshError
    from nearcast.identity import client_tls
    from nearcast.transport.grpc import make_channel
    from nearcast.wire.v1 import oip_pb2 as pb

    if way == "rest":
        connector = aiohttp.TCPConnector(ssl=client_tls(identity, ca=identity.ca, alpn=["http/1.1"]))
        async with aiohttp.ClientSession(f"https://{address}", connector=connector) as session:
            answer = await session.post("/v2/repository/models/affine/unload")
            return answer.status == 200
    channel = make_channel(way, address, identity=identity)
    body = pb.RepositoryModelUnloadRequest(model_name="affine").SerializeToString()
    try:
        await channel.unary("/inference.GRPCInferenceService/RepositoryModelUnload", (body,))
    except MeshError:
        return False
    finally:
        await channel.close()
    return True


async def test_tensors_in_shared_memory(client, region):
    key, handle = region
    await client.register("r", key, 128, 64)
    assert await client.regions() == [{"name": "r", "key": key, "offset": 64, "byte_size": 128}]
    assert await client.regions("r") == await client.regions()
    shm.set_shared_memory_region(handle, [X], offset=64 + 8)
    result = await client.infer("affine", {"x": ("FP32", [2, 4], "r", 32, 8)}, {"y": ("r", 64, 64)}, request_id="q")
    answer = result.get_response()
    assert (answer["id"] if isinstance(answer, dict) else answer.id) == "q"
    assert shape_of(result, "y") == [2, 4]
    assert shm.get_contents_as_numpy(handle, np.float32, [2, 4], offset=128).tolist() == (2 * X).tolist()
    # Half of it: the input from shared memory, the output in the answer.
    plain = await client.infer("affine", {"x": ("FP32", [2, 4], "r", 32, 8)})
    assert plain.as_numpy("y").tolist() == (2 * X).tolist()
    with refused(("ABORTED", "409"), "registered already"):
        await client.register("r", key, 128)
    await client.unregister("r")
    await client.unregister("r")
    with refused(INVALID, "Unable to find"):
        await client.infer("affine", {"x": ("FP32", [2, 4], "r", 32, 8)})
    with refused(INVALID, "Unable to find"):
        await client.regions("r")


async def test_text_in_shared_memory(client, region):
    key, handle = region
    await client.register("r", key, 256)
    words = np.array([b"gr\xc3\xbcn", b""], dtype=object)
    shm.set_shared_memory_region(handle, [serialize_byte_tensor(words)])
    size = 4 + 5 + 4
    await client.infer("text", {"x": ("BYTES", [2], "r", size, 0)}, {"y": ("r", 64, 128)})
    assert shm.get_contents_as_numpy(handle, np.object_, [2], offset=128).tolist() == [b"gr\xc3\xbcn", b""]
    with refused(INVALID, "13 bytes; 12 were given"):
        await client.infer("text", {"x": ("BYTES", [2], "r", size, 0)}, {"y": ("r", 12, 128)})


async def test_bounds_of_shared_memory_are_looked_at_each_time(client, region):
    key, _ = region
    for name, bad, size, offset in (
        ("a", "/../etc/passwd", 8, 0),
        ("b", "..", 8, 0),
        ("c", "/a/b", 8, 0),
        ("d", "", 8, 0),
        ("e", "/none-of-this-name", 8, 0),
        ("f", key, 257, 0),
        ("g", key, 8, 256),
        ("h", key, 8, 2**63 - 1),
        ("i", key, 0, 0),
        ("j", key, 4097, 0),
        ("", key, 8, 0),
    ):
        with pytest.raises(Refused) as caught:
            await client.register(name, bad, size, offset)
        assert caught.value.status in (*INVALID, "404"), (name, caught.value)
    link = Path("/dev/shm") / f"nc-test-link-{os.getpid()}"
    link.symlink_to("/etc/passwd")
    try:
        with refused(INVALID, "Unable to open"):
            await client.register("l", link.name, 8)
    finally:
        link.unlink()
    await client.register("r", key, 256)
    for place in (("r", 32, 225), ("r", 32, 2**63 - 1), ("r", 2**62, 0)):
        with refused(INVALID, "are not within the 256 bytes"):
            await client.infer("affine", {"x": ("FP32", [2, 4], *place)})
        with refused(INVALID, "are not within the 256 bytes"):
            await client.infer("affine", {"x": X}, {"y": place})
    with refused(INVALID, "needs 32 bytes, got 31"):
        await client.infer("affine", {"x": ("FP32", [2, 4], "r", 31, 0)})
    # The client cuts its memory off under the server.
    os.truncate(f"/dev/shm{key}", 16)
    with refused(INVALID, "ends before"):
        await client.infer("affine", {"x": ("FP32", [2, 4], "r", 32, 0)})
    with refused(INVALID, "ends before"):
        await client.infer("affine", {"x": X}, {"y": ("r", 32, 0)})
    for name in ("s", "t"):
        await client.register(name, key, 16)
    with refused(("RESOURCE_EXHAUSTED", "429"), "unregister one first"):
        await client.register("u", key, 16)
    await client.unregister()
    assert await client.regions() == []


async def test_classes(client):
    result = await client.infer("affine", {"x": X}, {"y": 3})
    # Of equal elements the first comes first; the fourth has no label.
    assert result.as_numpy("y").tolist() == [
        [b"10.000000:1:one", b"6.000000:2:two", b"6.000000:3"],
        [b"4.000000:2:two", b"2.000000:3", b"0.000000:0:zero"],
    ]
    more = await client.infer("affine", {"x": X}, {"y": 99})
    assert shape_of(more, "y") == [2, 4]
    with refused(INVALID, "holds no numbers"):
        await client.infer("text", {"x": np.array([b"a"], dtype=object)}, {"y": 1})


async def test_sequences_of_a_model_with_hidden_state(way, tmp_path):
    store = Store(tmp_path / "store")
    install(
        store,
        (Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite").read_bytes(),
        name="wake_word",
        engine="litert",
        model_file="model.tflite",
        stateful="hidden",
        inputs=(tensor("input_audio", "INT8", (1, 3, 40), None),),
        outputs=(tensor("dense_1", "UINT8", (1, 1), None),),
    )
    activate(store, "wake_word", stable=1)
    host = ModelHost(store, node="test-1")
    await host.start()
    server = make_listener(way, host, host, "127.0.0.1:0")
    await server.start()
    client = make_client(way, server.address)
    frame = {"input_audio": np.zeros((1, 3, 40), np.int8)}
    try:
        config = await client.config("wake_word")
        assert config["max_batch_size"] == 0
        assert config["sequence_batching"]["max_sequence_idle_microseconds"] == 60_000_000
        assert config["sequence_batching"]["direct"] is not None
        assert config["input"][0]["dims"] == [1, 3, 40]
        with refused(INVALID, "sequence_id"):
            await client.infer("wake_word", frame)
        for name in (7, 2**63 - 1, "mic-1"):
            with refused(INVALID, "has not been started"):
                await client.infer("wake_word", frame, sequence_id=name)
            await client.infer("wake_word", frame, sequence_id=name, sequence_start=True)
            await client.infer("wake_word", frame, sequence_id=name)
            await client.infer("wake_word", frame, sequence_id=name, sequence_end=True)
            with refused(INVALID, "has not been started"):
                await client.infer("wake_word", frame, sequence_id=name)
        (entry,) = await client.statistics("wake_word")
        assert (entry["inference_count"], entry["execution_count"]) == (9, 9)
    finally:
        await client.close()
        await server.drain(2.0)
        await host.close()
