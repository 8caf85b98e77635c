"""Health and metadata of the server and its models."""

from __future__ import annotations

from typing import Any

from nearcast.wire.v1 import oip_pb2 as pb
from tests.compat.clients import Grpc, RefusedError, Rest
from tests.compat.contract import ADD, IDENTITY, add_inputs
from tests.compat.registry import GRPC, MUST, RECOMMENDED, REST, check, expect
from tests.compat.tensors import DATATYPES


@check("health.live", MUST)
def live(client: Any) -> None:
    """A server that runs is live."""
    if client.transport == GRPC:
        expect(client.call("ServerLive", pb.ServerLiveRequest()).live, "ServerLive says live = false")
    else:
        expect(client.http("GET", "/v2/health/live").status == 200, "/v2/health/live is not 200")


@check("health.ready", MUST)
def ready(client: Any) -> None:
    """A server whose models are loaded is ready."""
    if client.transport == GRPC:
        expect(client.call("ServerReady", pb.ServerReadyRequest()).ready, "ServerReady says ready = false")
    else:
        expect(client.http("GET", "/v2/health/ready").status == 200, "/v2/health/ready is not 200")


@check("health.live.body", RECOMMENDED, REST)
def live_body(client: Rest) -> None:
    """The body of the live answer is {"live": true}."""
    expect(client.http("GET", "/v2/health/live").json() == {"live": True}, "another body")


@check("health.ready.body", RECOMMENDED, REST)
def ready_body(client: Rest) -> None:
    """The body of the ready answer says so: {"ready": true} or, as the specification prints, {"live": true}."""
    body = client.http("GET", "/v2/health/ready").json()
    expect(body in ({"ready": True}, {"live": True}), f"the body is {body}")


@check("health.model_ready", MUST)
def model_ready(client: Any) -> None:
    """A loaded model is ready."""
    expect(client.is_model_ready(ADD), f"{ADD} is not ready")


@check("health.model_ready.version", MUST)
def version_ready(client: Any) -> None:
    """A loaded version is ready under its own name."""
    version = client.infer(ADD, add_inputs()).version
    expect(version, "the answer names no version to ask for")
    expect(client.is_model_ready(ADD, version), f"version {version} of {ADD} is not ready")


@check("health.model_ready.body", RECOMMENDED, REST)
def model_ready_body(client: Rest) -> None:
    """The body of the model ready answer names the model and says ready."""
    body = client.http("GET", f"/v2/models/{ADD}/ready").json()
    expect(body.get("name") == ADD and body.get("ready") is True, f"the body is {body}")


@check("health.model_ready.unknown", MUST)
def unknown_not_ready(client: Any) -> None:
    """A model that does not exist is not ready."""
    try:
        found = client.is_model_ready("no_such_model")
    except RefusedError as error:
        expect(error.blames_client or error.status == "UNAVAILABLE", f"asked for an unknown model it says {error}")
    else:
        expect(not found, "an unknown model is ready")


@check("health.model_ready.unknown_version", MUST)
def unknown_version_not_ready(client: Any) -> None:
    """A version that does not exist is not ready."""
    try:
        found = client.is_model_ready(ADD, "999")
    except RefusedError as error:
        expect(error.blames_client or error.status == "UNAVAILABLE", f"asked for an unknown version it says {error}")
    else:
        expect(not found, "an unknown version is ready")


@check("metadata.server", MUST)
def server_metadata(client: Any) -> None:
    """Server metadata has a name, a version and a list of extensions."""
    found = client.server_metadata()
    expect(isinstance(found["name"], str) and found["name"], "no name")
    expect(isinstance(found["version"], str) and found["version"], "no version")
    expect(isinstance(found["extensions"], list), "no list of extensions")


@check("metadata.model", MUST)
def model_metadata(client: Any) -> None:
    """Model metadata has name, platform, and every tensor with name, datatype and shape."""
    found = client.model_metadata(ADD)
    expect(found["name"] == ADD, f"the name is {found['name']!r}")
    expect(isinstance(found["platform"], str), "no platform")
    wanted = {"inputs": {"a", "b"}, "outputs": {"sum", "difference"}}
    for side, names in wanted.items():
        expect({t["name"] for t in found[side]} == names, f"{side}: {[t['name'] for t in found[side]]}")
        for tensor in found[side]:
            expect(tensor["datatype"] == "FP32", f"{tensor['name']} is {tensor['datatype']}")
            expect(list(tensor["shape"]) == [-1, 4], f"the shape of {tensor['name']} is {tensor['shape']}, not [-1, 4]")


@check("metadata.model.versions", MUST)
def model_versions(client: Any) -> None:
    """Versions in model metadata are text, and the version that answers is among them."""
    versions = client.model_metadata(ADD).get("versions", [])
    expect(all(isinstance(v, str) for v in versions), f"versions are {versions}")
    answered = client.infer(ADD, add_inputs()).version
    expect(not answered or answered in versions, f"version {answered!r} answers, metadata lists {versions}")


@check("metadata.model.free_axes", MUST)
def free_axes(client: Any) -> None:
    """A free axis has the size -1."""
    (tensor,) = client.model_metadata(IDENTITY["FP32"])["inputs"]
    expect(list(tensor["shape"]) == [-1, -1], f"the shape is {tensor['shape']}")


@check("metadata.model.datatypes", MUST)
def datatypes(client: Any) -> None:
    """Every datatype is spelt as the protocol spells it."""
    for datatype in DATATYPES:
        if datatype == "BF16":
            continue
        (tensor,) = client.model_metadata(IDENTITY[datatype])["inputs"]
        expect(tensor["datatype"] == datatype, f"{datatype} is called {tensor['datatype']}")


@check("metadata.model.version_path", MUST)
def metadata_of_version(client: Any) -> None:
    """Metadata of one named version."""
    version = client.infer(ADD, add_inputs()).version
    expect(version, "the answer names no version to ask for")
    expect(client.model_metadata(ADD, version)["name"] == ADD, "another model's metadata")


@check("metadata.model.properties", RECOMMENDED, GRPC)
def properties(client: Grpc) -> None:
    """Model metadata carries the map of properties, field 6 of the specification."""
    expect(client.model_metadata(ADD)["properties"], "no properties")
