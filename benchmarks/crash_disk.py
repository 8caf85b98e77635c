"""A disk that may forget what was never synced: which images a power cut can leave behind.

The rules are those of POSIX on a journaling file system without ordering guarantees, and stricter than ext4:

* fsync of a file makes its bytes and its size durable, never its name; fsync of a folder makes its names durable.
* A change of names (create, rename, unlink) is atomic. Unsynced ones survive in any combination, except that a change
  needs the earlier ones of the same name and of the same file.
* Unsynced bytes survive in blocks of 512 bytes or 4 KiB, in any combination with what was there before; the file may
  have its old size, its new one or one between; what was never written reads as zeros.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import TypeAlias

from benchmarks.crash_trace import Call

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
ROOT = 0
Image: TypeAlias = dict[str, bytes | str | None]
"""Path below the root → content of a file, target of a link, or None for a folder."""
Tear: TypeAlias = Callable[[bytes, bytes, random.Random], bytes]
"""What is left of a file: from its durable bytes and those that a reader sees."""


@dataclass(slots=True)
class Node:
    """A file, a link or a folder. `settled` holds what is durable, `fresh` what a reader sees; `least` is the smallest
    size that the file had since it was synced: none of what may be left is smaller.
    """

    target: str | None = None
    names: dict[str, int] | None = None
    settled_names: dict[str, int] = field(default_factory=dict)
    fresh: bytes = b""
    settled: bytes = b""
    least: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One atomic change of names: (folder, name, node or None) each. Changes that share a key keep their order."""

    places: tuple[tuple[int, str, int | None], ...]
    keys: frozenset[tuple[int, str] | int]


class Disk:
    """Replays calls; at any time `images` says what a power cut may leave."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {ROOT: Node(names={})}
        self.pending: list[Change] = []
        self._offsets: dict[tuple[int, int], int] = {}

    # Replay.

    def apply(self, call: Call) -> None:
        """Carry out one system call that succeeded."""
        match call.name:
            case "nothing":
                return
            case "open":
                self._open(call)
            case "seek":
                self._offsets[call.descriptor, self._find(call.path)] = call.offset
            case "write":
                self._write(call)
            case "truncate":
                node = self.nodes[self._find(call.path)]
                node.fresh = node.fresh[: call.offset].ljust(call.offset, b"\0")
                node.least = min(node.least, call.offset)
            case "sync":
                self._sync(self._find(call.path))
            case "mkdir":
                self._create(call.path, Node(names={}))
            case "symlink":
                self._create(call.path, Node(target=call.other))
            case "unlink":
                folder, name = self._place(call.path)
                self._change((folder, name, None), node=self._find(call.path))
            case "rename":
                source, target = self._place(call.path), self._place(call.other)
                moved = self._find(call.path)
                self._change((*source, None), (*target, moved), node=moved)
            case _:
                raise ValueError(f"{call.name} is no call that this disk knows")

    def read(self, path: str) -> bytes | None:
        """What a reader sees now; None if there is no such file."""
        try:
            return self.nodes[self._find(path)].fresh
        except FileNotFoundError:
            return None

    def _open(self, call: Call) -> None:
        try:
            number = self._find(call.path)
        except FileNotFoundError:
            number = self._create(call.path, Node())
        node = self.nodes[number]
        if call.truncates:
            node.fresh, node.least = b"", 0
        self._offsets[call.descriptor, number] = -1 if call.appends else 0

    def _write(self, call: Call) -> None:
        number = self._find(call.path)
        node, key = self.nodes[number], (call.descriptor, number)
        offset = self._offsets.get(key, 0) if call.offset < 0 else call.offset
        if offset < 0:
            node.fresh += call.data
            return
        end = offset + len(call.data)
        node.fresh = node.fresh[:offset].ljust(offset, b"\0") + call.data + node.fresh[end:]
        if call.offset < 0:
            self._offsets[key] = end

    def _create(self, path: str, node: Node) -> int:
        number = len(self.nodes)
        self.nodes[number] = node
        self._change((*self._place(path), number), node=number)
        return number

    def _change(self, *places: tuple[int, str, int | None], node: int) -> None:
        for folder, name, target in places:
            names = self.nodes[folder].names
            assert names is not None
            if target is None:
                names.pop(name, None)
            else:
                names[name] = target
        self.pending.append(Change(places, frozenset({node, *((folder, name) for folder, name, _ in places)})))

    def _sync(self, number: int) -> None:
        node = self.nodes[number]
        if node.names is None:
            node.settled = node.fresh
            node.least = len(node.fresh)
            return
        wanted = {change for change in self.pending if any(folder == number for folder, _, _ in change.places)}
        kept = set(self._with_needs(wanted))
        self._settle(self._settled_names(), [change for change in self.pending if change in kept])
        self.pending = [change for change in self.pending if change not in kept]

    def _settled_names(self) -> dict[int, dict[str, int]]:
        """The durable names of each folder."""
        return {number: node.settled_names for number, node in self.nodes.items() if node.names is not None}

    @staticmethod
    def _settle(folders: dict[int, dict[str, int]], changes: Iterable[Change]) -> None:
        for change in changes:
            for folder, name, target in change.places:
                if target is None:
                    folders[folder].pop(name, None)
                else:
                    folders[folder][name] = target

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = path.rpartition("/")
        return self._find(folder), name

    def _find(self, path: str) -> int:
        number = ROOT
        for part in filter(None, path.split("/")):
            number = (self.nodes[number].names or {}).get(part, -1)
            if number < 0:
                raise FileNotFoundError(path)
        return number

    # What may be left.

    def _with_needs(self, wanted: Collection[Change]) -> list[Change]:
        """Some changes and every earlier one that they need."""
        kept: list[Change] = []
        needed: set[object] = set()
        for change in reversed(self.pending):
            if change in wanted or not needed.isdisjoint(change.keys):
                kept.append(change)
                needed |= change.keys
        return kept[::-1]

    def _without(self, lost: Change) -> list[Change]:
        """All changes but one and those that need it."""
        kept: list[Change] = []
        gone: set[object] = set()
        for change in self.pending:
            if change is lost or not gone.isdisjoint(change.keys):
                gone |= change.keys
            else:
                kept.append(change)
        return kept

    def images(self, seed: int) -> Iterator[Image]:
        """Everything kept, everything lost, names without bytes; then in turns each way to tear files, each change kept
        or lost alone, and any of them at random; for ever.
        """
        draw = random.Random(seed)
        everything = list(self.pending)
        yield self._image(everything, _keep, draw)
        yield self._image([], _lose, draw)
        yield self._image(everything, _lose, draw)
        tears, changes = list(dict.fromkeys(_TEARS)), list(everything)
        draw.shuffle(tears)
        draw.shuffle(changes)
        for tear, change in zip_longest(tears, changes):
            if tear is not None:
                yield self._image(everything, tear, draw)
            yield self._random(everything, draw)
            if change is not None:
                yield self._image(self._with_needs({change}), draw.choice(_TEARS), draw)
                yield self._image(self._without(change), draw.choice(_TEARS), draw)
        while True:
            yield self._random(everything, draw)

    def _random(self, everything: list[Change], draw: random.Random) -> Image:
        share = draw.choice((0.2, 0.5, 0.8, 1.0))
        return self._image(self._with_needs({change for change in everything if draw.random() < share}), None, draw)

    def _image(self, changes: list[Change], tear: Tear | None, draw: random.Random) -> Image:
        folders = {number: dict(names) for number, names in self._settled_names().items()}
        self._settle(folders, changes)
        image: Image = {}
        self._walk(image, "", ROOT, folders, tear, draw)
        return image

    @staticmethod
    def _torn(node: Node, tear: Tear, draw: random.Random) -> bytes:
        left = tear(node.settled, node.fresh, draw)
        return left + node.settled[len(left) : node.least]

    def _walk(
        self,
        image: Image,
        path: str,
        number: int,
        folders: dict[int, dict[str, int]],
        tear: Tear | None,
        draw: random.Random,
    ) -> None:
        node = self.nodes[number]
        if node.target is not None:
            image[path] = node.target
        elif node.names is None:
            chosen = tear or draw.choice(_TEARS)
            image[path] = node.settled if node.fresh is node.settled else self._torn(node, chosen, draw)
        else:
            image[path] = None
            for name, child in sorted(folders[number].items()):
                self._walk(image, f"{path}/{name}".lstrip("/"), child, folders, tear, draw)


def _keep(old: bytes, new: bytes, draw: random.Random) -> bytes:
    del old, draw
    return new


def _lose(old: bytes, new: bytes, draw: random.Random) -> bytes:
    del new, draw
    return old


def _zero(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """The new size without the new bytes."""
    del draw
    return old[: len(new)].ljust(len(new), b"\0")


def _cut(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """The new bytes up to a sector; the file ends there, but never before the end of what was durable."""
    return new[: max(_sector(old, new, draw), len(old) if new.startswith(old) else 0)]


def _hole(old: bytes, new: bytes, draw: random.Random) -> bytes:
    """The new bytes up to a sector, what was there before behind it, the new size."""
    at = _sector(old, new, draw)
    return new[:at] + _zero(old, new, draw)[at:]


def _mix_sectors(old: bytes, new: bytes, draw: random.Random) -> bytes:
    return _mix(old, new, draw, SECTOR_BYTES)


def _mix_blocks(old: bytes, new: bytes, draw: random.Random) -> bytes:
    return _mix(old, new, draw, BLOCK_BYTES)


def _sector(old: bytes, new: bytes, draw: random.Random) -> int:
    """A sector's beginning at or behind the first byte that differs, as nothing before it was written."""
    first = len(old) if new.startswith(old) else 0
    return min(len(new), SECTOR_BYTES * draw.randint(first // SECTOR_BYTES, len(new) // SECTOR_BYTES))


def _mix(old: bytes, new: bytes, draw: random.Random, size: int) -> bytes:
    before = _zero(old, new, draw)
    bits = draw.getrandbits(len(new) // size + 1)
    pieces = (
        (new if bits >> index & 1 else before)[at : at + size] for index, at in enumerate(range(0, len(new), size))
    )
    return b"".join(pieces)


_TEARS = (_keep, _keep, _lose, _zero, _cut, _hole, _mix_sectors, _mix_blocks)


def digest_of(image: Image) -> str:
    """Names the image: equal images, equal digests."""
    digest = hashlib.sha256()
    for path, content in image.items():
        name = "" if content is None else content if isinstance(content, str) else sha256_of(content)
        digest.update(f"{path}\0{type(content).__name__}\0{name}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def sha256_of(data: bytes) -> str:
    """Digest of a file; the same objects come again and again."""
    return hashlib.sha256(data).hexdigest()
