"""A copy of what one channel wants, for where no network goes: it is a repository itself.

Whatever comes is verified as an agent would: metadata first, then each file against it, chunk by chunk. It is written
in the order of a publication (files, roles, snapshot, timestamp last), so that a copy that is served while it grows is
always whole. A USB stick, any web server and `nearcast import` take it from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import Metadata, Targets  # type: ignore[attr-defined]

from model_sync.agent.install.fetch import Remote
from model_sync.agent.install.lone_fetch import CHUNK_TIMEOUT_S, blob_of, fetch_file
from model_sync.agent.metadata import Checked, MetadataSource
from model_sync.agent.sources.source import Source, StatusError
from model_sync.delta.index import INDEX_FILE, INDEX_SIZE_BYTES_MAX, decode_index
from model_sync.repository.layout import delta_path, models_path, target_file_path
from model_sync.rollout.transitions import MODELS_MAX
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import File, Manifest, decode_manifest

STATE_FOLDER = ".checked"
"""In the copy: the metadata that was verified last. The next copy into the same folder takes nothing older."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a copy holds.

    Attributes:
        serial: of the repository's state.
        releases: by model, with what could not be taken as its reason in `refused`.
        size_bytes: of all blobs and deltas named; `received_bytes` of them came now.
        expires: by role, in seconds since 1970, soonest first.
    """

    serial: int
    releases: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    size_bytes: int
    received_bytes: int
    expires: Mapping[str, float]

    @property
    def holds_until(self) -> float:
        """When the first signature expires: nothing new is installed from the copy after that."""
        return next(iter(self.expires.values()))


class Export:
    """Copies one channel of `source` into the folder `out`.

    Args:
        source: the repository, or another copy of it.
        root: content of the pinned root.json.
        now: seconds since 1970.
        models: only these; empty = all that the channel names.
        deltas: take the deltas to each file too.
    """

    def __init__(
        self,
        source: Source,
        root: bytes,
        out: Path,
        *,
        channel: str,
        now: float,
        models: Collection[str] = (),
        deltas: bool = True,
    ) -> None:
        self._source = source
        self._out = out
        self._channel = channel
        self._models = models
        self._deltas = deltas
        self._now = now
        self._metadata = MetadataSource(
            out / STATE_FOLDER, source, root, channel=channel, timeout_s=CHUNK_TIMEOUT_S, models_max=MODELS_MAX
        )
        self._size_bytes = 0
        self._received_bytes = 0

    def run(self, *, hold_s: float = 0.0) -> Exported:
        """Copy; complete what is there already. `hold_s`: for how long every signature must hold from now on.

        Raises:
            MeshError: UNTRUSTED for anything that is not the signed content, or a signature that ends too soon
                (nothing was copied then); UNAVAILABLE if the source does not give it.
        """
        checked = self._metadata.check(self._now)
        expires = self._expires()
        role, until = next(iter(expires.items()))
        if until < self._now + hold_s:
            raise MeshError(
                Code.UNTRUSTED,
                f"The {role} role of {self._source.url} expires in {(until - self._now) / 3600:.1f} h, and the copy "
                f"has to hold for {hold_s / 3600:.1f} h; export just before you go, or let the mesh sign for longer.",
            )
        wanted, refused = self._wanted(checked)
        for manifest, _ in wanted:
            for entry in manifest.files:
                self._take(blob_of(entry))
                if self._deltas:
                    self._take_deltas(entry)
        for manifest, data in wanted:
            self._write_target(models_path(manifest.name, manifest.release), data)
        self._write_channel()
        self._write_metadata()
        releases: dict[str, tuple[int, ...]] = {}
        for manifest, _ in wanted:
            releases[manifest.name] = (*releases.get(manifest.name, ()), manifest.release)
        return Exported(
            serial=checked.serial,
            releases=releases,
            refused=refused,
            size_bytes=self._size_bytes,
            received_bytes=self._received_bytes,
            expires=expires,
        )

    def _wanted(self, checked: Checked) -> tuple[list[tuple[Manifest, bytes]], dict[str, str]]:
        if missing := set(self._models) - set(checked.wants):
            known = ", ".join(sorted(checked.wants)) or "none"
            raise MeshError(
                Code.MODEL_NOT_FOUND,
                f"The channel {self._channel!r} has no model {', '.join(sorted(missing))}; it has: {known}.",
            )
        wanted, refused = [], {}
        for model, want in sorted(checked.wants.items()):
            if self._models and model not in self._models:
                continue
            for goal in filter(None, (want.stable, want.candidate)):
                if goal.refusal:
                    refused[model] = goal.refusal
                    continue
                data = self._metadata.manifest(goal.sha256)
                wanted.append((decode_manifest(data), data))
        return wanted, refused

    def _take(self, remote: Remote) -> None:
        self._received_bytes += fetch_file(self._source, remote, self._out / remote.path)
        self._size_bytes += remote.size_bytes

    def _take_deltas(self, entry: File) -> None:
        """Deltas are a help that nobody signs: what is missing or wrong is left out."""
        path = delta_path(entry.sha256, INDEX_FILE)
        with suppress(StatusError):
            data = self._source.read(path, size_bytes_max=INDEX_SIZE_BYTES_MAX, timeout_s=CHUNK_TIMEOUT_S)
            try:
                index = decode_index(data)
            except MeshError:
                return
            for way in index.ways:
                payload = delta_path(entry.sha256, way.name)
                self._take(Remote(path=payload, size_bytes=way.size_bytes, sha256=way.sha256, chunks=way.chunks))
            write_file(self._out / path, data)

    # Metadata, as the repository lays it out.

    def _write_target(self, path: str, data: bytes) -> None:
        write_file(self._out / target_file_path(path, hashlib.sha256(data).hexdigest()), data)

    def _write_channel(self) -> None:
        path = f"channels/{self._channel}.json"
        target = Metadata[Targets].from_bytes(self._checked_role("rollout")).signed.targets[path]
        self._write_target(path, self._metadata.manifest(target.hashes["sha256"]))

    def _write_metadata(self) -> None:
        folder = self._out / "metadata"
        for path in sorted((self._state / "root_history").glob("*.root.json")):
            write_file(folder / path.name, path.read_bytes())
        for name, data in self._roles():
            if name not in ("timestamp", "snapshot", "root"):
                write_file(folder / f"{Metadata.from_bytes(data).signed.version}.{name}.json", data)
        snapshot = self._checked_role("snapshot")
        write_file(folder / f"{Metadata.from_bytes(snapshot).signed.version}.snapshot.json", snapshot)
        write_file(folder / "timestamp.json", self._checked_role("timestamp"))

    def _expires(self) -> dict[str, float]:
        """When each role expires, soonest first."""
        found = {name: Metadata.from_bytes(data).signed.expires.timestamp() for name, data in self._roles()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _roles(self) -> Iterator[tuple[str, bytes]]:
        for path in sorted(self._state.glob("*.json")):
            yield path.name.removesuffix(".json"), path.read_bytes()

    def _checked_role(self, name: str) -> bytes:
        return (self._state / f"{name}.json").read_bytes()

    @property
    def _state(self) -> Path:
        return self._out / STATE_FOLDER / "metadata"
