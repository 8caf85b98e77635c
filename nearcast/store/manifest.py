"""The signed description of one model version. Wire names are the field names; unknown fields are errors."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.store.steps import STEPS_MAX, After, Before

CHUNK_SIZE_BYTES = 256 * 1024
"""Unit of download and verification: what a cut connection costs at most."""
MANIFEST_FILE = "manifest.json"
MANIFEST_SIZE_BYTES_MAX = 4 * 1024 * 1024
# \Z and not $: that would let a name end in a line break.
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}\Z"
PATH_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
SHA256_PATTERN = r"^[0-9a-f]{64}\Z"

ModelName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
FileName = Annotated[str, msgspec.Meta(pattern=PATH_PATTERN)]
Sha256 = Annotated[str, msgspec.Meta(pattern=SHA256_PATTERN)]
Release = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_FLOATS = frozenset({"FP16", "FP32", "FP64"})


_YOUNGER = {"response_cache": False, "quality_tolerance": 0.01, "smaller": None}
"""Fields that older agents refuse as unknown, with their defaults; `pipeline` and `cascade` are left out as unset."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of a version: a plain name in the version folder, never a path. `chunks` are sha256 per 256 KiB."""

    path: FileName
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Sha256
    chunks: tuple[Sha256, ...]


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A declared input or output. `batch_axis` None = the model cannot be batched over this tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    batch_axis: int | None = None


class GoldenTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A tensor of a golden vector: raw little-endian bytes live in `file` at `offset`, `size_bytes` long."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    file: FileName
    offset: Annotated[int, msgspec.Meta(ge=0)]
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]


class GoldenVector(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A real input and the output that this version must give for it, within `atol`; also the warm-up data.

    For a model with hidden state, vectors run in order on one fresh interpreter.
    """

    inputs: tuple[GoldenTensor, ...]
    outputs: tuple[GoldenTensor, ...]
    atol: float = 1e-4


class Pipeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What happens before and after the model runs. The manifest's `inputs` and `outputs` are what clients see.

    Attributes:
        inputs: what the model file itself takes; a client may send these too, ready, in place of the manifest's.
        outputs: what it gives.
        before: make the model's inputs of the manifest's. Tensors that no step names go through as they are.
        after: make the manifest's outputs of the model's.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    before: Annotated[tuple[Before, ...], msgspec.Meta(max_length=STEPS_MAX)] = ()
    after: Annotated[tuple[After, ...], msgspec.Meta(max_length=STEPS_MAX)] = ()


class Cascade(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which answers are uncertain, and which model is asked again about those.

    An answer is uncertain if in any of its rows the largest value of `output` lies in [low, high), or is no number. For
    a score of one value both ends are certain: `low` is a sure no, `high` a sure yes.

    Attributes:
        larger: a model that takes the same inputs and gives the same outputs, only better.
        output: the floating-point output that tells.
        softmax: the output holds logits; probabilities are made of each row first.
    """

    larger: ModelName
    output: str
    high: float
    low: float = 0.0
    softmax: bool = False


class Encryption(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the files of a version are sealed: AES-256-GCM with one data key, which the tenant's key wraps.

    Sizes and digests in `files` are those of the sealed bytes, so that mirrors and disks never see others.

    Attributes:
        tenant: whose key wraps the data key; bound into every seal.
        key_id: which of the tenant's keys; the first 16 hex digits of its sha256.
        wrapped_key: the data key, sealed with the tenant's key, in base64.
    """

    algorithm: Literal["AES-256-GCM"] = "AES-256-GCM"
    tenant: ModelName
    key_id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
    wrapped_key: Annotated[str, msgspec.Meta(max_length=128)]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One version of one model.

    Attributes:
        release: monotone counter per model; in decimal it is the `model_version` of the wire.
        engine: which engine runs it. `model_file` names the file that it opens.
        stateful: none, explicit (state is a tensor) or hidden (one interpreter per sequence).
        response_cache: equal inputs give equal outputs, so that nodes may remember them; only with `stateful` none.
        quality: what the model's author measured, in [0, 1]; compared only between versions of one model.
        quality_tolerance: how much quality a variant made of this version, such as an int8 one, may lose.
        latency_budget_ms: a golden run slower than this fails the gate.
        rollback_ok: older releases to which a signed rollback may return.
        licence: an SPDX expression.
        sbom_file: the bill of materials among `files` (CycloneDX JSON).
        data_sha256: digest of the data that it was trained on, as its author states it.
        parent: the release that it was trained or converted from.
        encryption: how the files are sealed; None = they are plain.
        labels: what the classes of the model are called, in their order.
        pipeline: steps around the model.
        smaller: a model that may answer in this one's place when nothing that holds this one is in time.
        cascade: when a larger model is asked again; only with `stateful` none.
    """

    schema: Literal[1] = 1
    name: ModelName
    release: Release
    semver: str
    engine: Literal["onnxruntime", "litert"]
    model_file: FileName
    files: tuple[File, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    stateful: Literal["none", "explicit", "hidden"] = "none"
    response_cache: bool = False
    variant: str = "default"
    quality: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    quality_tolerance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    golden: tuple[GoldenVector, ...] = ()
    latency_budget_ms: Annotated[float, msgspec.Meta(gt=0)] = 1000.0
    rollback_ok: tuple[Release, ...] = ()
    labels: tuple[str, ...] = ()
    licence: str
    sbom_file: FileName | None = None
    data_sha256: Sha256 | None = None
    parent: Release | None = None
    encryption: Encryption | None = None
    description: str = ""
    properties: dict[str, str] = {}
    pipeline: Pipeline | msgspec.UnsetType = msgspec.UNSET
    smaller: ModelName | None = None
    cascade: Cascade | msgspec.UnsetType = msgspec.UNSET

    def of_model(self) -> Manifest:
        """The same version as its model file sees it: without the pipeline."""
        if self.pipeline is msgspec.UNSET:
            return self
        inputs, outputs = self.pipeline.inputs, self.pipeline.outputs
        return msgspec.structs.replace(self, inputs=inputs, outputs=outputs, pipeline=msgspec.UNSET)

    def file(self, path: str) -> File:
        """The entry of one file.

        Raises:
            KeyError: if the manifest names no such file.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)

    def encode(self) -> bytes:
        """Canonical bytes: the same manifest always encodes the same way.

        Fields younger than the first agents are written only where they say something, so that those take the rest.
        """
        fields = msgspec.to_builtins(self)
        for name, default in _YOUNGER.items():
            if fields[name] == default:
                del fields[name]
        return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest.

    Raises:
        MeshError: UNTRUSTED if it is too large, malformed, or names files twice or not at all.
    """
    if len(data) > MANIFEST_SIZE_BYTES_MAX:
        raise MeshError(Code.UNTRUSTED, f"The manifest is larger than {MANIFEST_SIZE_BYTES_MAX} bytes.")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNTRUSTED, f"The manifest is malformed: {error}.") from error
    names = [entry.path for entry in manifest.files]
    if len(set(names)) != len(names):
        raise MeshError(Code.UNTRUSTED, "The manifest names a file twice.")
    used = {manifest.model_file} | {t.file for v in manifest.golden for t in (*v.inputs, *v.outputs)}
    used |= {manifest.sbom_file} if manifest.sbom_file else set()
    if missing := used - set(names):
        raise MeshError(Code.UNTRUSTED, f"The manifest uses files that it does not list: {', '.join(sorted(missing))}.")
    for entry in manifest.files:
        if len(entry.chunks) != -(-entry.size_bytes // CHUNK_SIZE_BYTES):
            raise MeshError(Code.UNTRUSTED, f"The chunk list of {entry.path} does not fit its size.")
    require_variants(manifest)
    return manifest


def require_variants(manifest: Manifest) -> None:
    """Check what a manifest says about other models.

    Raises:
        MeshError: UNTRUSTED if it names itself, or a cascade that could never be followed.
    """
    cascade = manifest.cascade
    if manifest.smaller == manifest.name:
        raise MeshError(Code.UNTRUSTED, "The manifest names the model itself as its smaller one; name another model.")
    if cascade is msgspec.UNSET:
        return
    if cascade.larger == manifest.name:
        raise MeshError(Code.UNTRUSTED, "The cascade leads from the model to itself; name another larger one.")
    if not any(out.name == cascade.output and out.datatype in _FLOATS for out in manifest.outputs):
        raise MeshError(
            Code.UNTRUSTED, f"The cascade looks at {cascade.output!r}, which is no floating-point output of the model."
        )
    if not cascade.low < cascade.high:
        raise MeshError(Code.UNTRUSTED, "The cascade's low must be less than its high.")
    if manifest.stateful != "none":
        raise MeshError(Code.UNTRUSTED, "A model that keeps state has no cascade: another one lacks that state.")


def is_model_name(name: str) -> bool:
    """Whether `name` may name a model (and so a folder): lower case, digits, `_` and `-`, at most 64 characters."""
    return re.fullmatch(NAME_PATTERN, name) is not None
