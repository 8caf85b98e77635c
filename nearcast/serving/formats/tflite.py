"""TFLite, verified as the FlatBuffers file that it is: offsets, counts, indices and 64-bit ranges lie inside of it.

The tables are those of LiteRT's `schema.fbs`, by slot. Options of operators and quantisation details are not followed:
what they may break is caught by the child process that loads the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nearcast.errors import Code, MeshError

IDENTIFIER = b"TFL3"
TABLES_MAX = 1_000_000
ELEMENTS_MAX = 2**33
"""Elements of one tensor."""
_MODEL_SLOTS = 8
"""Slots of the root table before those that name weights in other files."""
_HEADER_SIZE_BYTES = 8
_UNUSED_OFFSETS = (0, 1)
"""Values of `Buffer.offset` that stand for "the data is in the table"."""


@dataclass(frozen=True, slots=True)
class _Table:
    at: int
    slots: tuple[int, ...]
    size_bytes: int


def check_tflite(data: bytes) -> None:
    """Check a model.

    Raises:
        MeshError: UNTRUSTED with the reason.
    """
    if data[4:_HEADER_SIZE_BYTES] != IDENTIFIER:
        raise _refusal("it does not begin as one.")
    _Verifier(data).model()


class _Verifier:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tables_left = TABLES_MAX

    def model(self) -> None:
        root = self._table(self._number(0, 4))
        if any(root.slots[_MODEL_SLOTS:]):
            raise _refusal("it takes weights from other files.")
        buffers = self._tables(root, 4, self._buffer)
        codes = self._tables(root, 1, self._code)
        tensors = self._tables(root, 2, lambda table: self._subgraph(table, codes=codes, buffers=buffers))
        if not tensors:
            raise _refusal("it has no graph.")
        self._text(root, 3)
        self._require_indices(self._numbers(root, 5, 4), len(buffers), "metadata")
        self._tables(root, 6, lambda table: self._metadata(table, buffers))
        self._tables(root, 7, lambda table: self._signature(table, tensors))

    def _buffer(self, table: _Table) -> int:
        self._vector(table, 0, 1)
        self._require_range(self._scalar(table, 1, 8), self._scalar(table, 2, 8), "a buffer")
        return 1

    def _code(self, table: _Table) -> int:
        self._text(table, 1)
        return 1

    def _subgraph(self, table: _Table, *, codes: Sequence[int], buffers: Sequence[int]) -> int:
        """How many tensors it has."""
        tensors = self._tables(table, 0, lambda tensor: self._tensor(tensor, buffers))
        for slot in (1, 2):
            self._require_indices(self._numbers(table, slot, 4), len(tensors), "a graph's tensors")
        self._tables(table, 3, lambda operator: self._operator(operator, codes, tensors))
        self._text(table, 4)
        return len(tensors)

    def _tensor(self, table: _Table, buffers: Sequence[int]) -> int:
        shape = [_signed(number) for number in self._numbers(table, 0, 4)]
        if any(axis < -1 for axis in shape) or math.prod(max(1, axis) for axis in shape) > ELEMENTS_MAX:
            raise _refusal(f"a tensor has more than {ELEMENTS_MAX} elements, or fewer than none.")
        self._require_indices([self._scalar(table, 2, 4)], len(buffers), "a tensor's buffer")
        self._text(table, 3)
        for quantization in self._child(table, 4):
            for slot, size in ((0, 4), (1, 4), (2, 4), (3, 8)):
                self._vector(quantization, slot, size)
        self._numbers(table, 7, 4)
        return 1

    def _operator(self, table: _Table, codes: Sequence[int], tensors: Sequence[int]) -> int:
        self._require_indices([self._scalar(table, 0, 4)], len(codes), "an operator's code")
        for slot in (1, 2, 8):
            # -1 stands for an input that is left out.
            indices = [number for number in self._numbers(table, slot, 4) if _signed(number) != -1]
            self._require_indices(indices, len(tensors), "an operator's tensors")
        for slot in (5, 7):
            self._vector(table, slot, 1)
        self._require_range(self._scalar(table, 9, 8), self._scalar(table, 10, 8), "an operator's options")
        return 1

    def _metadata(self, table: _Table, buffers: Sequence[int]) -> int:
        self._text(table, 0)
        self._require_indices([self._scalar(table, 1, 4)], len(buffers), "metadata")
        return 1

    def _signature(self, table: _Table, tensors: Sequence[int]) -> int:
        graph = self._scalar(table, 4, 4)
        self._require_indices([graph], len(tensors), "a signature's graph")
        for slot in (0, 1):
            for index in self._tables(table, slot, self._named_tensor):
                self._require_indices([index], tensors[graph], "a signature's tensors")
        self._text(table, 2)
        return 1

    def _named_tensor(self, table: _Table) -> int:
        self._text(table, 0)
        return self._scalar(table, 1, 4)

    # FlatBuffers.

    def _table(self, at: int) -> _Table:
        self._tables_left -= 1
        if self._tables_left < 0:
            raise _refusal(f"it has more than {TABLES_MAX} tables.")
        vtable = at - _signed(self._number(at, 4))
        vtable_size_bytes, size_bytes = self._number(vtable, 2), self._number(vtable + 2, 2)
        self._require(vtable, vtable_size_bytes)
        self._require(at, size_bytes)
        if vtable_size_bytes < 4 or vtable_size_bytes % 2 or size_bytes < 4:
            raise _refusal("a table is malformed.")
        slots = tuple(self._number(vtable + offset, 2) for offset in range(4, vtable_size_bytes, 2))
        return _Table(at, slots, size_bytes)

    def _field(self, table: _Table, slot: int, size_bytes: int) -> int | None:
        offset = table.slots[slot] if slot < len(table.slots) else 0
        if not offset:
            return None
        if offset + size_bytes > table.size_bytes:
            raise _refusal("a field lies outside of its table.")
        return table.at + offset

    def _scalar(self, table: _Table, slot: int, size_bytes: int) -> int:
        at = self._field(table, slot, size_bytes)
        return 0 if at is None else self._number(at, size_bytes)

    def _child(self, table: _Table, slot: int) -> list[_Table]:
        at = self._field(table, slot, 4)
        return [] if at is None else [self._table(at + self._number(at, 4))]

    def _vector(self, table: _Table, slot: int, item_size_bytes: int) -> tuple[int, int]:
        """Where a vector's items begin, and how many there are."""
        at = self._field(table, slot, 4)
        if at is None:
            return 0, 0
        begin = at + self._number(at, 4)
        count = self._number(begin, 4)
        self._require(begin + 4, count * item_size_bytes)
        return begin + 4, count

    def _numbers(self, table: _Table, slot: int, size_bytes: int) -> list[int]:
        begin, count = self._vector(table, slot, size_bytes)
        if count > TABLES_MAX:
            raise _refusal(f"a list has more than {TABLES_MAX} entries.")
        return [self._number(begin + index * size_bytes, size_bytes) for index in range(count)]

    def _tables(self, table: _Table, slot: int, check: Callable[[_Table], int]) -> list[int]:
        """Check each table of a vector; answers what the checks answer."""
        begin, count = self._vector(table, slot, 4)
        places = range(begin, begin + 4 * count, 4)
        return [check(self._table(at + self._number(at, 4))) for at in places]

    def _text(self, table: _Table, slot: int) -> None:
        begin, count = self._vector(table, slot, 1)
        if begin and self._number(begin + count, 1):
            raise _refusal("a text does not end.")

    def _number(self, at: int, size_bytes: int) -> int:
        self._require(at, size_bytes)
        if at % min(size_bytes, 4):
            raise _refusal("a number is not aligned.")
        return int.from_bytes(self._data[at : at + size_bytes], "little")

    def _require(self, at: int, size_bytes: int) -> None:
        if at < 0 or at + size_bytes > len(self._data):
            raise _refusal("an offset leads out of the file.")

    def _require_range(self, offset: int, size_bytes: int, what: str) -> None:
        """A 64-bit range beside the tables; the sum does not wrap here as it would in 64 bits."""
        if offset not in _UNUSED_OFFSETS and offset + size_bytes > len(self._data):
            raise _refusal(f"the range of {what} leads out of the file.")

    def _require_indices(self, indices: Sequence[int], count: int, what: str) -> None:
        if any(index >= count for index in indices):
            raise _refusal(f"an index of {what} leads out of its list.")


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def _refusal(reason: str) -> MeshError:
    return MeshError(Code.UNTRUSTED, reason)
