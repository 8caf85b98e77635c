"""The bill of materials of a bundle, as CycloneDX JSON: model, files with digests, licence, data, parent, tool.

Nothing in it is random or of today: the same bundle has the same bill. Of a sealed bundle the bill lists the plain
files and is sealed itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import msgspec
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.license import LicenseExpression
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6

from nearcast import __version__
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import Manifest

SBOM_FILE = "sbom.cdx.json"


class _Hash(msgspec.Struct, kw_only=True):
    alg: str
    content: str


class _Component(msgspec.Struct, kw_only=True):
    type: str
    name: str
    hashes: tuple[_Hash, ...] = ()


class _Bill(msgspec.Struct, kw_only=True):
    components: tuple[_Component, ...] = ()


def make_sbom(manifest: Manifest) -> bytes:
    """The bill of a bundle whose manifest lists every file but the bill itself."""
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"{manifest.name}@{manifest.release}",
        name=manifest.name,
        version=manifest.semver,
        description=manifest.description or None,
        licenses=[LicenseExpression(manifest.licence)],
        hashes=[_sha256(manifest.file(manifest.model_file).sha256)],
        pedigree=_pedigree(manifest),
        properties=[Property(name=f"nearcast:{name}", value=value) for name, value in _properties(manifest).items()],
    )
    parts = [
        Component(
            type=ComponentType.FILE, bom_ref=f"file:{entry.path}", name=entry.path, hashes=[_sha256(entry.sha256)]
        )
        for entry in manifest.files
    ]
    if manifest.data_sha256:
        data = Component(
            type=ComponentType.DATA, bom_ref="data", name="training data", hashes=[_sha256(manifest.data_sha256)]
        )
        parts.append(data)
    tool = Component(type=ComponentType.APPLICATION, bom_ref="tool", name="nearcast", version=__version__)
    metadata = BomMetaData(component=model, tools=ToolRepository(components=[tool]))
    metadata.timestamp = None  # type: ignore[assignment]  # the library takes None; its constructor would take today
    serial = uuid5(NAMESPACE_URL, "nearcast:bundle:" + hashlib.sha256(manifest.encode()).hexdigest())
    bom = Bom(metadata=metadata, components=parts, serial_number=serial)
    bom.register_dependency(model, parts)
    return JsonV1Dot6(bom).output_as_string(indent=1).encode() + b"\n"


def require_sbom(manifest: Manifest, data: bytes, plain_sha256: dict[str, str]) -> None:
    """Refuse a bill that lists other files than the bundle has.

    Args:
        manifest: of the bundle.
        data: the plain bill.
        plain_sha256: digests of all other files, plain, by name.

    Raises:
        MeshError: UNTRUSTED.
    """
    try:
        bill = msgspec.json.decode(data, type=_Bill)
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNTRUSTED, f"{manifest.sbom_file} is no bill of materials: {error}.") from error
    listed = {
        part.name: each.content for part in bill.components if part.type == "file" for each in part.hashes
        if each.alg == "SHA-256"
    }  # fmt: skip
    if listed != plain_sha256:
        wrong = min(listed.items() ^ plain_sha256.items())[0]
        raise MeshError(
            Code.UNTRUSTED, f"{manifest.sbom_file} says otherwise than the bundle about {wrong}; make the bundle again."
        )


def write_sbom(manifest: Manifest, folder: Path) -> None:
    """Write the bill into a bundle's folder."""
    (folder / SBOM_FILE).write_bytes(make_sbom(manifest))


def _sha256(content: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=content)


def _pedigree(manifest: Manifest) -> Pedigree | None:
    if manifest.parent is None:
        return None
    parent = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"{manifest.name}@{manifest.parent}",
        name=manifest.name,
        properties=[Property(name="nearcast:release", value=str(manifest.parent))],
    )
    return Pedigree(ancestors=[parent])


def _properties(manifest: Manifest) -> dict[str, str]:
    found = {
        "release": str(manifest.release),
        "engine": manifest.engine,
        "variant": manifest.variant,
        "quality": f"{manifest.quality:g}",
        "golden_vectors": str(len(manifest.golden)),
    }
    if manifest.data_sha256:
        found["data_sha256"] = manifest.data_sha256
    return found
