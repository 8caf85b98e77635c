"""The keys that one operator can reach: the PEM files of the operator's folder, and places noted in `keys.json`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from securesystemslib.signer import Key, Signer  # type: ignore[attr-defined]

from model_sync.publisher.signers import Place, find_key, open_signer
from nearcast.durable import move_file, write_file
from nearcast.errors import Code, MeshError

NOTES_FILE = "keys.json"
NEW_SUFFIX = ".new"
"""`root.new.pem`: made for a change that does not hold yet."""
RETIRED_FOLDER = "retired"


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the private half of a key was when it was last used or named; `uri` "" = in other hands."""

    uri: str
    seen: datetime
    key: dict[str, Any]


class KeyRing:
    """Finds private keys by key id.

    Args:
        operator: the operator's folder.
        extra: keys that a command names beside.
    """

    def __init__(self, operator: Path, extra: Iterable[str] = ()) -> None:
        self._operator = operator.resolve()
        self._notes = _read_notes(operator / NOTES_FILE)
        self._extra = {place.key.keyid: place for place in map(find_key, extra)}
        self.reasons: list[str] = []

    def signer(self, key: Key) -> Signer | None:
        """What signs with a key; None if its private half cannot be reached, with `reasons` saying why."""
        for place in self._places(key):
            try:
                signer = open_signer(place)
            except MeshError as error:
                self.reasons.append(error.message)
                continue
            self.note(place)
            return signer
        return None

    def signer_of(self, keyid: str) -> Signer | None:
        """What signs with the key of that id, if this ring has met it before."""
        if path := self.files().get(keyid):
            return open_signer(find_key(str(path)))
        note = self._notes.get(keyid)
        return self.signer(Key.from_dict(keyid, dict(note.key))) if note else None

    def has(self, keyid: str) -> bool:
        """Whether the private half is known to be in reach; opens nothing."""
        note = self._notes.get(keyid)
        return keyid in self._extra or keyid in self.files() or bool(note and note.uri and not _is_gone(note.uri))

    def note(self, place: Place) -> None:
        """Remember where a key is. What lies in the folder itself is noted by its name: the folder may be copied."""
        is_own = place.uri.startswith("/") and Path(place.uri).parent == self._operator
        self._notes[place.key.keyid] = Note(
            uri=Path(place.uri).name if is_own else place.uri,
            seen=datetime.now(UTC).replace(microsecond=0),
            key=place.key.to_dict(),
        )
        if self._operator.is_dir():
            data = msgspec.json.format(msgspec.json.encode(self._notes), indent=1)
            write_file(self._operator / NOTES_FILE, data + b"\n", mode=0o600)

    def last_seen(self, keyid: str) -> Note | None:
        """Where a key was last seen."""
        return self._notes.get(keyid)

    def files(self) -> dict[str, Path]:
        """The private key files of the folder, by key id."""
        found = {}
        for path in sorted(self._operator.glob("*.pem")):
            place = find_key(str(path))
            if place.uri:
                found[place.key.keyid] = path
        return found

    def settle(self, role: str, keyids: Iterable[str]) -> None:
        """Once a change of a role's keys holds: its new key file takes the role's name, one of no use is put aside."""
        current, new = self._operator / f"{role}.pem", self._operator / f"{role}{NEW_SUFFIX}.pem"
        held = set(keyids)
        by_path = {path: keyid for keyid, path in self.files().items()}
        if current in by_path and by_path[current] not in held:
            (self._operator / RETIRED_FOLDER).mkdir(mode=0o700, exist_ok=True)
            move_file(current, self._operator / RETIRED_FOLDER / f"{role}-{by_path[current][:8]}.pem")
        if by_path.get(new) in held and not current.exists():
            move_file(new, current)

    def _places(self, key: Key) -> list[Place]:
        places = [self._extra[key.keyid]] if key.keyid in self._extra else []
        if path := self.files().get(key.keyid):
            places.append(Place(key=key, uri=str(path)))
        note = self._notes.get(key.keyid)
        if note and note.uri and not _is_gone(note.uri):
            places.append(Place(key=key, uri=note.uri))
        return places


def _is_gone(uri: str) -> bool:
    """Whether a file is not where it was; files of the folder itself are looked for by key id instead."""
    is_place = uri.startswith("/") or ":" in uri
    return not is_place or (uri.startswith("/") and not Path(uri).exists())


def _read_notes(path: Path) -> dict[str, Note]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Note])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, f"{path} cannot be read ({error}); move it away.") from error
