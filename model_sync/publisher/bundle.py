"""Bundles: a folder with `manifest.json` and the files that it names. No archive, no code, always the same bytes.

The same bytes: on another day, by another user, from another folder. Golden outputs that the author leaves out are
computed, and processors may differ in the last bit: who wants the same bundle from every machine states them.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from model_sync.publisher.golden import GOLDEN_FILE, VECTORS_MAX, pack_vectors, read_vectors
from model_sync.publisher.licence import PublishPolicy, require_licence
from model_sync.publisher.sbom import SBOM_FILE, require_sbom, write_sbom
from nearcast.errors import Code, MeshError
from nearcast.store.contents import Contents
from nearcast.store.manifest import (
    CHUNK_SIZE_BYTES,
    MANIFEST_FILE,
    MANIFEST_SIZE_BYTES_MAX,
    Cascade,
    File,
    FileName,
    Manifest,
    ModelName,
    Pipeline,
    Release,
    Sha256,
    Tensor,
    decode_manifest,
    require_variants,
)
from nearcast.store.sealing import TenantKeys, derive_data_key, key_id, seal_file

if TYPE_CHECKING:
    from nearcast.serving.gate_child import GateResult

SUFFIXES = {"onnxruntime": (".onnx",), "litert": (".tflite",)}
"""File names of the formats that hold no code, by engine; the gate looks at the bytes."""


class BundleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an author writes (`spec.toml`) to make a bundle; sizes and digests are computed.

    Attributes:
        files: further files beside `model_file`, such as external weights.
        golden: `.npz` files, one vector each (arrays `in_<name>`, `out_<name>`), or `.json` files with a list of
            `{"inputs": {name: nested lists}, "outputs": {...}}`, or images for a model that takes nothing else. Outputs
            that are left out are computed by the engine.
        atol: how far an answer may be from a golden output.
        licence: an SPDX expression that the operator's policy allows.
        quality: what the author measured, in [0, 1]; compared only between versions of one model.
        quality_tolerance: how much of it an int8 variant may lose.
        data_sha256: digest of the data that the model was trained on.
        parent: the earlier release that it was trained or converted from.
        response_cache: nodes may remember answers: equal inputs give equal outputs.
        pipeline: steps around the model; `inputs` and `outputs` are then what clients see.
        smaller: a model that may stand in for this one when nothing else is in time.
        cascade: which of its answers a larger model is asked about again.
    """

    name: ModelName
    release: Release
    semver: str
    engine: Literal["onnxruntime", "litert"]
    model_file: FileName
    licence: Annotated[str, msgspec.Meta(min_length=1)]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    files: tuple[FileName, ...] = ()
    stateful: Literal["none", "explicit", "hidden"] = "none"
    variant: str = "default"
    quality: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    quality_tolerance: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    latency_budget_ms: Annotated[float, msgspec.Meta(gt=0)] = 1000.0
    golden: Annotated[tuple[str, ...], msgspec.Meta(max_length=VECTORS_MAX)] = ()
    atol: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    rollback_ok: tuple[Release, ...] = ()
    labels: tuple[str, ...] = ()
    data_sha256: Sha256 | None = None
    parent: Release | None = None
    description: str = ""
    properties: dict[str, str] = {}
    response_cache: bool = False
    pipeline: Pipeline | msgspec.UnsetType = msgspec.UNSET
    smaller: ModelName | None = None
    cascade: Cascade | msgspec.UnsetType = msgspec.UNSET


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """For whom a bundle is sealed: the tenant's name and key."""

    tenant: ModelName
    key: bytes


def read_spec(path: Path) -> BundleSpec:
    """Read a `spec.toml`.

    Raises:
        MeshError: INVALID_REQUEST naming what does not fit.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), BundleSpec)
    except OSError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The specification {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The specification {path} does not fit: {error}.") from error


def create_bundle(
    spec: BundleSpec, source: Path, out: Path, *, policy: PublishPolicy | None = None, seal: Seal | None = None
) -> Manifest:
    """Make a bundle folder.

    Args:
        spec: what to make.
        source: folder that holds the files which `spec` names.
        out: the new folder; missing or empty. It appears only once it is whole.
        policy: which licences are allowed; None = the usual ones.
        seal: for whom to seal every file; None = they stay plain.

    Raises:
        MeshError: CONFLICT if `out` holds something, INVALID_REQUEST if files are missing or do not fit, FORBIDDEN if
            the licence is not allowed, UNTRUSTED if the model cannot be loaded as specified, TOO_LARGE to be sealed.
    """
    licence = require_licence(spec.licence, policy or PublishPolicy())
    spec = msgspec.structs.replace(spec, licence=licence)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MeshError(Code.CONFLICT, f"{out} exists already; choose a new folder.")
    if not spec.model_file.endswith(SUFFIXES[spec.engine]):
        raise MeshError(
            Code.INVALID_REQUEST, f"{spec.engine} opens {' or '.join(SUFFIXES[spec.engine])}, not {spec.model_file}."
        )
    names = [spec.model_file, *spec.files]
    made_here = (GOLDEN_FILE, SBOM_FILE, MANIFEST_FILE)
    if len({*names, *made_here}) != len(names) + len(made_here):
        raise MeshError(
            Code.INVALID_REQUEST, f"A file is named twice, or as one that is made here: {', '.join(made_here)}."
        )
    if spec.parent is not None and spec.parent >= spec.release:
        raise MeshError(Code.INVALID_REQUEST, f"The parent {spec.parent} is no earlier release than {spec.release}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        manifest = _fill(draft, spec, source, names)
        if seal is not None:
            manifest = _seal(draft, manifest, seal)
        data = manifest.encode()
        decode_manifest(data)
        (draft / MANIFEST_FILE).write_bytes(data)
        for path in draft.iterdir():
            path.chmod(0o644)
        draft.chmod(0o755)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _fill(draft: Path, spec: BundleSpec, source: Path, names: list[str]) -> Manifest:
    for name in names:
        try:
            shutil.copyfile(source / name, draft / name)
        except OSError as error:
            raise MeshError(Code.INVALID_REQUEST, f"The file {name} cannot be read from {source}.") from error
    manifest = Manifest(
        name=spec.name,
        release=spec.release,
        semver=spec.semver,
        engine=spec.engine,
        model_file=spec.model_file,
        files=tuple(describe_file(draft / name) for name in names),
        inputs=spec.inputs,
        outputs=spec.outputs,
        stateful=spec.stateful,
        variant=spec.variant,
        quality=spec.quality,
        quality_tolerance=spec.quality_tolerance,
        latency_budget_ms=spec.latency_budget_ms,
        rollback_ok=spec.rollback_ok,
        labels=spec.labels,
        licence=spec.licence,
        data_sha256=spec.data_sha256,
        parent=spec.parent,
        description=spec.description,
        properties=dict(sorted(spec.properties.items())),
        response_cache=spec.response_cache,
        pipeline=spec.pipeline,
        smaller=spec.smaller,
        cascade=spec.cascade,
    )
    _require_sound(manifest)
    vectors = read_vectors(source, spec.golden, spec.inputs, spec.outputs)
    if vectors:
        golden = pack_vectors(vectors, manifest, draft, spec.atol)
        files = (*manifest.files, describe_file(draft / GOLDEN_FILE))
        manifest = msgspec.structs.replace(manifest, golden=golden, files=files)
    write_sbom(manifest, draft)
    files = (*manifest.files, describe_file(draft / SBOM_FILE))
    return msgspec.structs.replace(manifest, sbom_file=SBOM_FILE, files=files)


def _require_sound(manifest: Manifest) -> None:
    from nearcast.serving.pipeline.flow import require_flow

    try:
        require_variants(manifest)
        if manifest.pipeline is not msgspec.UNSET:
            require_flow(manifest, manifest.pipeline)
    except MeshError as error:
        raise MeshError(Code.INVALID_REQUEST, error.message) from error


def _seal(draft: Path, manifest: Manifest, seal: Seal) -> Manifest:
    """Put the seal of each file in its place."""
    digests = [(entry.path, entry.sha256) for entry in manifest.files]
    data_key = derive_data_key(seal.key, seal.tenant, manifest, digests)
    identifier = key_id(seal.key)
    encryption = TenantKeys({identifier: seal.key}).wrap(data_key, seal.tenant, identifier)
    manifest = msgspec.structs.replace(manifest, encryption=encryption)
    for index, entry in enumerate(manifest.files):
        path = draft / entry.path
        path.write_bytes(seal_file(manifest, index, entry.path, path.read_bytes(), data_key))
    return msgspec.structs.replace(manifest, files=tuple(describe_file(draft / entry.path) for entry in manifest.files))


def describe_file(path: Path) -> File:
    """A file's size, digest and the digests of its 256 KiB chunks."""
    whole, chunks, size_bytes = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK_SIZE_BYTES):
            whole.update(piece)
            chunks.append(hashlib.sha256(piece).hexdigest())
            size_bytes += len(piece)
    return File(path=path.name, size_bytes=size_bytes, sha256=whole.hexdigest(), chunks=tuple(chunks))


def read_bundle(folder: Path) -> tuple[Manifest, bytes]:
    """The manifest of a bundle and its exact bytes.

    Raises:
        MeshError: INVALID_REQUEST if there is none, UNTRUSTED if it is malformed.
    """
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            data = file.read(MANIFEST_SIZE_BYTES_MAX + 1)
    except OSError as error:
        raise MeshError(
            Code.INVALID_REQUEST, f"{folder} is no bundle: it has no {MANIFEST_FILE}. Make one: nearcast bundle create."
        ) from error
    return decode_manifest(data), data


def verify_bundle(folder: Path) -> Manifest:
    """Check that a bundle holds exactly what its manifest says.

    Raises:
        MeshError: UNTRUSTED naming the file that is missing, too much, or has other bytes.
    """
    manifest, _ = read_bundle(folder)
    named = {entry.path for entry in manifest.files} | {MANIFEST_FILE}
    found = {path.name for path in folder.iterdir()}
    if extra := sorted(found - named):
        raise MeshError(Code.UNTRUSTED, f"The bundle holds files that its manifest does not name: {', '.join(extra)}.")
    if missing := sorted(named - found):
        raise MeshError(Code.UNTRUSTED, f"The bundle lacks files that its manifest names: {', '.join(missing)}.")
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_symlink() or not path.is_file() or path.lstat().st_nlink > 1 or describe_file(path) != entry:
            raise MeshError(
                Code.UNTRUSTED,
                f"The file {entry.path} has other bytes than its manifest says, or is a link; make the bundle again.",
            )
    if not manifest.model_file.endswith(SUFFIXES[manifest.engine]):
        raise MeshError(Code.UNTRUSTED, f"{manifest.model_file} is no format that {manifest.engine} opens.")
    return manifest


def check_sbom(folder: Path, manifest: Manifest, tenant_keys: Path | None = None) -> None:
    """Check that the bill of materials, if there is one, lists exactly the files of a bundle.

    Raises:
        MeshError: UNTRUSTED if it does not; as `Contents.read`.
    """
    if manifest.sbom_file is None:
        return
    contents = Contents(manifest, folder, tenant_keys=tenant_keys)
    others = [entry.path for entry in manifest.files if entry.path != manifest.sbom_file]
    digests = {path: hashlib.sha256(contents.read(path)).hexdigest() for path in others}
    require_sbom(manifest, contents.read(manifest.sbom_file), digests)


def read_sbom(folder: Path, manifest: Manifest, tenant_keys: Path | None = None) -> dict[str, Any] | None:
    """The bill of materials; None without one, or if it is sealed and the key is not in `tenant_keys`.

    Raises:
        MeshError: UNTRUSTED if its bytes are not what the manifest says, or no JSON.
    """
    if manifest.sbom_file is None:
        return None
    try:
        data = Contents(manifest, folder, tenant_keys=tenant_keys).read(manifest.sbom_file)
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNTRUSTED, f"{manifest.sbom_file} is no JSON: {error}.") from error
    except MeshError as error:
        if error.code is Code.UNAUTHENTICATED and tenant_keys is None:
            return None
        raise


def pass_gate(folder: Path, tenant_keys: Path | None = None) -> GateResult:
    """Load a verified bundle in a child process and run its golden vectors; answers what the child measured.

    Raises:
        MeshError: UNTRUSTED if the model does not load, crashes, is too slow or answers otherwise than it must;
            UNAVAILABLE if this machine cannot check it, for example because the tenant's key is not in `tenant_keys`.
    """
    from nearcast.serving.gate_child import run_gate

    result = run_gate(folder, tenant_keys=tenant_keys)
    if not result.ok:
        code = Code.UNAVAILABLE if result.is_transient else Code.UNTRUSTED
        raise MeshError(code, f"The model does not pass its gate: {result.error}")
    return result
