"""The one adapter around python-tuf's client: what the channel wants, verified, or a clear sentence why not.

It knows two private things of the library (7.0.1): the reference time against which metadata expires, which the library
takes from the clock of the machine and `set_reference_time` replaces by ours; and how it writes files, which
`DurableUpdater` makes durable. Tests pin both.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]
from tuf.api.serialization import DeserializationError
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from model_sync.agent.sources.source import Source, StatusError
from model_sync.replica.state import Goal, Want
from model_sync.repository.layout import custom_rollback_ok, models_path, target_file_path
from model_sync.rollout.document import ChannelDocument, Pick, Rollout, last_intent
from model_sync.trust.vouching import TargetFacts, require_digest, vouched
from nearcast.durable import make_folder, remove_leftovers, sync_folder, write_file
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import MANIFEST_SIZE_BYTES_MAX, SHA256_PATTERN, Manifest, decode_manifest

CHANNEL_SIZE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A verified view: serial of the timestamp, the channel document's intent, and what it wants per model."""

    serial: int
    intent: int
    wants: dict[str, Want]


class TufFetcher(FetcherInterface):
    """Lets the library download over our connection; errors keep their sentence."""

    def __init__(self, source: Source, *, timeout_s: float) -> None:
        self._source = source
        self._timeout_s = timeout_s

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """As the library's, but for what is left of a refused answer: that must not come before the next one."""
        data = bytearray()
        with closing(self._fetch(url)) as pieces:
            for piece in pieces:
                data += piece
                if len(data) > max_length:
                    raise exceptions.DownloadLengthMismatchError(f"{url} is longer than {max_length} bytes")
        return bytes(data)

    def _fetch(self, url: str) -> Generator[bytes, None, None]:
        deadline = time.monotonic() + self._timeout_s
        complete = False
        try:
            _, pieces = self._source.get(url.removeprefix(self._source.url), timeout_s=self._timeout_s)
            for piece in pieces:
                if time.monotonic() > deadline:
                    raise exceptions.SlowRetrievalError(f"{self._source.url} is too slow; the check was given up.")
                yield piece
            complete = True
        except StatusError as error:
            complete = True
            raise exceptions.DownloadHTTPError(error.message, error.status) from error
        except MeshError as error:
            raise exceptions.DownloadError(error.message) from error
        finally:
            if not complete:
                self._source.close()


class DurableUpdater(Updater):
    """The library replaces its files without fsync: after a power cut a torn one would let older versions in again.

    What is there already is not written again, so that a check that finds nothing new costs no write.
    """

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)

    def _update_root_symlink(self) -> None:
        link = Path(self._dir, "root.json")
        current = f"root_history/{self._trusted_set.root.version}.root.json"
        if not link.is_symlink() or str(link.readlink()) != current:
            super()._update_root_symlink()


def open_updater(folder: Path, fetcher: TufFetcher, url: str, root: bytes, *, now: float) -> DurableUpdater:
    """A TUF client on `folder` with our transport, our durability, and our time.

    Args:
        folder: its trusted metadata.
        fetcher: downloads.
        url: where the metadata lies; below the source of `fetcher`.
        root: content of the pinned root.json.
        now: seconds since 1970 against which metadata expires.
    """
    config = UpdaterConfig(prefix_targets_with_hash=True, app_user_agent="nearcast")
    updater = DurableUpdater(str(folder), url, fetcher=fetcher, config=config, bootstrap=root)
    set_reference_time(updater, now)
    return updater


class MetadataSource:
    """Checks the repository. Blocking, one check at a time.

    Args:
        folder: private folder for metadata and small targets.
        source: the repository.
        root: content of the pinned root.json.
        channel: whose document to read.
    """

    def __init__(
        self, folder: Path, source: Source, root: bytes, *, channel: str, timeout_s: float, models_max: int
    ) -> None:
        self._metadata = folder / "metadata"
        self._targets = folder / "targets"
        self._source = source
        self._root = root
        self._channel = channel
        self._timeout_s = timeout_s
        self._models_max = models_max
        self._fetcher = TufFetcher(source, timeout_s=timeout_s)
        for place in (self._metadata, self._metadata / "root_history", self._targets):
            make_folder(place)
            remove_leftovers(place)
            sync_folder(place)  # a rename of a predecessor that was killed before its fsync counts from now on

    def check(self, now: float) -> Checked:
        """Walk the metadata and read the channel document. `now`: seconds since 1970 against which metadata expires.

        Raises:
            MeshError: UNTRUSTED if anything offered is not validly signed, fresh and newer; UNAVAILABLE if the
                repository cannot be reached. What was known before stays as it was.
        """
        try:
            return self._check(now)
        except (MeshError, OSError):
            raise
        except Exception as error:  # whatever a parser makes of hostile bytes, the next check must come
            raise explain(error, self._source.url) from error

    def manifest(self, sha256: str) -> bytes:
        """A manifest of the last check, by its digest.

        Raises:
            MeshError: UNTRUSTED if the stored bytes are damaged; UNAVAILABLE if they are not here.
        """
        try:
            data = (self._targets / f"{sha256}.json").read_bytes()
        except FileNotFoundError:
            raise MeshError(
                Code.UNAVAILABLE, f"Manifest {sha256[:12]} is not here; the next check fetches it."
            ) from None
        require_digest("the stored manifest", data, sha256)
        return data

    def _check(self, now: float) -> Checked:
        url = f"{self._source.url}/metadata/"
        updater = open_updater(self._metadata, self._fetcher, url, self._root, now=now)
        updater.refresh()
        path = f"channels/{self._channel}.json"
        target = updater.get_targetinfo(path)
        if target is None:
            raise MeshError(
                Code.UNAVAILABLE, f"The repository has no channel {self._channel!r}; push a model or start a rollout."
            )
        data = self._small_target(target, path, CHANNEL_SIZE_BYTES_MAX)
        document = decode_channel(data, self._channel, self._models_max)
        require_intent_of(root_version_of(updater), document)
        wants = {rollout.model: self._want(updater, rollout, document.intent) for rollout in document.rollouts}
        self._prune({one.sha256 for want in wants.values() for one in (want.stable, want.candidate) if one})
        return Checked(serial=serial_of(updater), intent=document.intent, wants=wants)

    def _want(self, updater: Updater, rollout: Rollout, intent: int) -> Want:
        candidate = rollout.candidate
        return Want(
            intent=intent,
            stable=self._goal(updater, rollout.model, rollout.stable),
            candidate=self._goal(updater, rollout.model, candidate) if candidate is not None else None,
            wave=rollout.wave,
            share=rollout.share,
            salt=rollout.salt,
            rollback=rollout.rollback,
            disagreement_max=rollout.disagreement_max,
        )

    def _goal(self, updater: Updater, model: str, pick: Pick) -> Goal:
        """One pick with what the models role says about it; a bad one is refused alone, with its reason."""
        try:
            target, manifest = self._vouched(updater, model, pick)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 (as in `check`; one team's role must not hold up the others)
            reason = error.message if isinstance(error, MeshError) else explain(error, self._source.url).message
            return Goal(release=pick.release, sha256=pick.manifest_sha256, refusal=reason)
        return Goal(
            release=pick.release,
            sha256=pick.manifest_sha256,
            size_bytes=sum(entry.size_bytes for entry in manifest.files),
            rollback_ok=tuple(sorted({*manifest.rollback_ok, *target.rollback_ok})),
        )

    def _vouched(self, updater: Updater, model: str, pick: Pick) -> tuple[TargetFacts, Manifest]:
        path = models_path(model, pick.release)
        entry = updater.get_targetinfo(path)
        target = None
        if entry is not None:
            sha256 = entry.hashes.get("sha256", "")
            target = TargetFacts(
                sha256=sha256, size_bytes=entry.length, rollback_ok=tuple(sorted(custom_rollback_ok(entry)))
            )
        vouched(model, pick, target)
        assert entry is not None
        assert target is not None
        manifest = decode_manifest(self._small_target(entry, path, MANIFEST_SIZE_BYTES_MAX))
        vouched(model, pick, target, manifest)
        return target, manifest

    def _small_target(self, target: TargetFile, path: str, size_bytes_max: int) -> bytes:
        sha256 = target.hashes.get("sha256", "")
        if re.fullmatch(SHA256_PATTERN, sha256) is None or target.length > size_bytes_max:
            raise MeshError(Code.UNTRUSTED, f"Refused {path}: it has no sha256, or more than {size_bytes_max} bytes.")
        place = self._targets / f"{sha256}.json"
        try:
            data = place.read_bytes()
            require_digest(path, data, sha256)
        except (FileNotFoundError, MeshError):
            data = self._source.read(
                target_file_path(path, sha256), size_bytes_max=target.length, timeout_s=self._timeout_s
            )
            target.verify_length_and_hashes(data)
            write_file(place, data)
        return data

    def _prune(self, kept: set[str]) -> None:
        """Small targets of earlier documents go once there are many: a channel with 1 000 changes is no leak."""
        places = [place for place in self._targets.glob("*.json") if place.stem not in kept]
        if len(places) > 2 * self._models_max:
            for place in sorted(places, key=lambda one: one.stat().st_mtime)[: -self._models_max]:
                place.unlink(missing_ok=True)


def set_reference_time(updater: Updater, now: float) -> None:
    """Make metadata expire against our time instead of the machine's clock. `now`: seconds since 1970."""
    updater._trusted_set.reference_time = dt.datetime.fromtimestamp(now, dt.UTC)  # noqa: SLF001 (no other way)


def serial_of(updater: Updater) -> int:
    """Version of the verified timestamp: what the hint counts."""
    return int(updater._trusted_set.timestamp.version)  # noqa: SLF001 (no other way)


def root_version_of(updater: Updater) -> int:
    """Version of the verified root."""
    return int(updater._trusted_set.root.version)  # noqa: SLF001 (no other way)


def require_intent_of(root_version: int, document: ChannelDocument) -> None:
    """Refuse an intent beyond what the present root has room for.

    Who stole the online key could else use up all numbers, and no document would ever be newer again.

    Raises:
        MeshError: UNTRUSTED.
    """
    if document.intent > last_intent(root_version):
        raise MeshError(
            Code.UNTRUSTED,
            f"Refused the document of channel {document.channel!r}: intent {document.intent} is beyond what root "
            f"{root_version} allows, so its key is in wrong hands; replace it with `nearcast keys rotate online`.",
        )


def decode_channel(data: bytes, channel: str, models_max: int) -> ChannelDocument:
    """Parse a verified channel document.

    Raises:
        MeshError: UNTRUSTED if it is malformed, of another channel, too long, or names a model twice.
    """
    try:
        document = msgspec.json.decode(data, type=ChannelDocument)
    except msgspec.DecodeError as error:
        raise MeshError(Code.UNTRUSTED, f"The document of channel {channel!r} is malformed: {error}.") from error
    names = {rollout.model for rollout in document.rollouts}
    if document.channel != channel or len(names) != len(document.rollouts) or len(names) > models_max:
        raise MeshError(
            Code.UNTRUSTED,
            f"The document of channel {channel!r} is of channel {document.channel!r}, names a model twice, "
            f"or more than {models_max} models.",
        )
    return document


def explain(error: Exception, url: str) -> MeshError:
    """What the TUF client found, in one sentence for the operator."""
    text = str(error).rstrip(".")
    match error:
        case exceptions.ExpiredMetadataError():
            why = (
                f"The metadata of {url} has expired ({text}); is the sync process running, and is this node's clock "
                "right? The node serves on and installs nothing."
            )
            return MeshError(Code.UNTRUSTED, why)
        case exceptions.BadVersionNumberError():
            return MeshError(Code.UNTRUSTED, f"Refused the metadata of {url}: it is older than what is known ({text}).")
        case exceptions.UnsignedMetadataError():
            why = f"Refused the metadata of {url}: it is not signed by the keys that this node trusts ({text})."
            return MeshError(Code.UNTRUSTED, why)
        case exceptions.LengthOrHashMismatchError() | exceptions.DownloadLengthMismatchError():
            return MeshError(Code.UNTRUSTED, f"Refused bytes of {url}: they are not the signed ones ({text}).")
        case exceptions.DownloadError():
            reason = text or "nothing came in time"
            return MeshError(Code.UNAVAILABLE, f"The repository cannot be checked: {reason}. The node serves on.")
        case DeserializationError():
            why = f"Refused the metadata of {url}: it is malformed ({str(error.__cause__ or text).rstrip('.')[:200]})."
            return MeshError(Code.UNTRUSTED, why)
        case _:
            return MeshError(Code.UNTRUSTED, f"Refused the metadata of {url}: {text[:200] or 'it is malformed'}.")
