"""Deltas of a push: from the files of the last releases to those of the new one, uploaded before anyone asks.

A delta only saves bytes. So nothing here fails a push: what takes too long or goes wrong is left out, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from model_sync.delta.index import FILE_SIZE_BYTES_MIN, INDEX_FILE, Codec, DeltaIndex, Way
from model_sync.delta.sealed import seal_delta
from model_sync.delta.search import SIZE_BYTES_MAX, best, describe_way
from model_sync.publisher.base_cache import BaseCache, earlier_manifests
from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.delta_child import DeltaSearch
from model_sync.publisher.meter import Meter
from model_sync.repository.layout import delta_path
from nearcast.errors import MeshError
from nearcast.store.manifest import File, Manifest
from nearcast.store.sealing import TenantKeys, open_file
from nearcast.telemetry import get_logger

BUDGET_S = 180.0
"""All searches of one push together."""
CACHE_FOLDER = "cache"
_log = get_logger("model_sync.publisher.deltas")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWay:
    """One way that a push added: to the file `path`, from a release (None = from nothing, or from any)."""

    path: str
    codec: str
    base_release: int | None
    size_bytes: int
    file_size_bytes: int


def upload_deltas(
    client: ControlClient,
    bundle: Path,
    manifest: Manifest,
    roles: Mapping[str, Metadata[Targets]],
    operator: Path,
    *,
    meter: Meter,
    keys: TenantKeys | None = None,
    budget_s: float = BUDGET_S,
) -> tuple[PublishedWay, ...]:
    """Search and upload the ways to every file of a bundle whose blobs are in the repository.

    Args:
        client: an operator's connection.
        bundle: the bundle's folder.
        manifest: its manifest, verified.
        roles: the verified models roles, which name the earlier releases.
        operator: where the cache of old files lies.
        meter: shows the search and the upload.
        keys: open sealed versions; without them such files have no deltas.
        budget_s: for all searches together; 0 = publish no deltas.

    Never raises for a search or an upload that fails.
    """
    published: list[PublishedWay] = []
    try:
        files = [entry for entry in _distinct(manifest) if _is_wanted(client, entry)] if budget_s > 0 else []
        if not files:
            return ()
        earlier = earlier_manifests(client, roles, manifest)
        pairs = [(entry, find_bases(entry, manifest, earlier)) for entry in files]
        cache = BaseCache(operator / CACHE_FOLDER, client)
        for _, bases in pairs:
            for _, base in bases:
                cache.keep(base)
        client.close()  # the search takes longer than the controller keeps a silent connection
        maker = _Maker(bundle, manifest, cache, keys or TenantKeys())
        meter.begin(sum(entry.size_bytes * (1 + len(bases)) for entry, bases in pairs), "searching deltas")
        with DeltaSearch(budget_s) as child:
            found = [(entry, maker.find(child, entry, bases, meter)) for entry, bases in pairs]
        meter.begin(sum(len(payload) for _, ways in found for _, payload, _ in ways), "uploading deltas")
        for entry, ways in found:
            published += _upload(client, entry, ways, meter)
    except (MeshError, OSError) as error:
        _log.warning("deltas_left_out", model=manifest.name, release=manifest.release, reason=str(error))
    return tuple(published)


Found = tuple[Way, bytes, int | None]
"""A way, its payload, and the release that its base belongs to."""
Base = tuple[Manifest, File]


class _Maker:
    def __init__(self, bundle: Path, manifest: Manifest, cache: BaseCache, keys: TenantKeys) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._cache = cache
        self._keys = keys
        self._data_key = keys.unwrap(manifest.encryption) if manifest.encryption else None

    def find(self, child: DeltaSearch, entry: File, bases: Sequence[Base], meter: Meter) -> list[Found]:
        """The ways to one file, smallest first: from nothing, from anything, and the best from each base."""
        new = open_file(self._manifest, entry.path, (self._bundle / entry.path).read_bytes(), self._keys)
        found: list[Found] = []
        full_size_bytes = len(new)
        for tried in child.search(None, new):
            # The ranges that chunks ask for would be of sealed bytes.
            if tried.payload is not None and not (tried.codec == "chunks" and self._data_key):
                if tried.codec == "zstd":
                    full_size_bytes = min(full_size_bytes, len(tried.payload))
                found.append(self._describe(entry, tried.codec, None, tried.payload, None))
        meter.advance(entry.size_bytes)
        for manifest, base in bases:
            old = open_file(manifest, base.path, self._cache.read(base), self._keys)
            tried_best = best(child.search(old, new), full_size_bytes)
            if tried_best is not None and tried_best.payload is not None:
                found.append(self._describe(entry, tried_best.codec, base.sha256, tried_best.payload, manifest.release))
            meter.advance(entry.size_bytes)
        smaller = [each for each in found if each[0].size_bytes < entry.size_bytes]
        return sorted(smaller, key=lambda each: each[0].size_bytes)

    def _describe(self, entry: File, codec: Codec, base: str | None, payload: bytes, release: int | None) -> Found:
        if self._data_key is not None:
            payload = seal_delta(payload, entry.sha256, f"{base or 'full'}.{codec}", self._data_key)
        return describe_way(codec, base, payload), payload, release


def _upload(client: ControlClient, entry: File, ways: Sequence[Found], meter: Meter) -> list[PublishedWay]:
    """Payloads first and the index last, so that whoever sees the index finds what it names."""
    if not ways:
        return []
    for way, payload, _ in ways:
        client.put_bytes(f"/v1/{delta_path(entry.sha256, way.name)}", payload, meter.advance)
    index = DeltaIndex(result=entry.sha256, size_bytes=entry.size_bytes, ways=tuple(way for way, _, _ in ways))
    client.put_bytes(f"/v1/{delta_path(entry.sha256, INDEX_FILE)}", index.encode(), lambda _: None)
    return [
        PublishedWay(
            path=entry.path,
            codec=way.codec,
            base_release=release,
            size_bytes=way.size_bytes,
            file_size_bytes=entry.size_bytes,
        )
        for way, _, release in ways
    ]


def _distinct(manifest: Manifest) -> list[File]:
    return list({entry.sha256: entry for entry in manifest.files}.values())


def _is_wanted(client: ControlClient, entry: File) -> bool:
    """Whether a file is of a size that deltas are made for and has none yet; an index never changes."""
    if not FILE_SIZE_BYTES_MIN <= entry.size_bytes <= SIZE_BYTES_MAX:
        return False
    status, _ = client.get_bytes(f"/repository/{delta_path(entry.sha256, INDEX_FILE)}")
    return status != 200


def find_bases(entry: File, manifest: Manifest, earlier: Sequence[Manifest]) -> list[Base]:
    """Files of earlier releases with the name or the role of a new one; of equal ones the first."""
    bases: dict[str, Base] = {}
    for old in earlier:
        names = {entry.path, old.model_file if entry.path == manifest.model_file else entry.path}
        for base in old.files:
            if base.path in names and base.sha256 != entry.sha256:
                bases.setdefault(base.sha256, (old, base))
    return list(bases.values())
