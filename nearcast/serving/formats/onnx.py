"""ONNX, walked as the protobuf message that it is (field numbers of `onnx.proto3`), each count within its bound.

Looks for what makes a parser or a runtime open other files, allocate without end, or unroll functions for ever.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from nearcast.errors import Code, MeshError
from nearcast.store.manifest import PATH_PATTERN

DEPTH_MAX = 64
FIELDS_MAX = 5_000_000
"""Fields of all messages that are looked into."""
NODES_MAX = 200_000
"""Nodes after every function was put in place of its calls."""
FUNCTIONS_MAX = 4096
ELEMENTS_MAX = 2**33
"""Elements of one tensor."""
_OFFSET_PATTERN = r"[0-9]{1,19}"
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}

# Where tensors hide: message -> {field: message}. The names are those of onnx.proto3.
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_MODEL_FIELDS = {*range(1, 9), 14, 20, 25, 26}
_IR_VERSION, _GRAPH, _OPSET_IMPORT = 1, 7, 8
_NODE_NAMES = {4: "op", 7: "domain", 8: "overload"}
_FUNCTION_NAMES = {1: "op", 10: "domain", 13: "overload"}
_TENSOR_DIMS, _TENSOR_ENTRY, _TENSOR_LOCATION, _IS_EXTERNAL = 1, 13, 14, 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
Fields: TypeAlias = Iterator[tuple[int, int, memoryview, int]]
Name: TypeAlias = tuple[bytes, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of another file that the model takes; a `length` of 0 is "to the end"."""

    location: str
    offset: int
    length: int


@dataclass(slots=True)
class _Scope:
    """The main graph, or a function: how many nodes it has, and which names they call."""

    nodes: int = 0
    calls: Counter[Name] = field(default_factory=Counter)


def check_onnx(data: bytes) -> list[Range]:
    """Check a model; answers what it takes from other files.

    Raises:
        MeshError: UNTRUSTED if the bytes are no such message, or beyond a bound.
    """
    walk = _Walk()
    numbers = walk.model(memoryview(data))
    if unknown := numbers - _MODEL_FIELDS:
        raise _refusal(f"it has the unknown field {min(unknown)}.")
    if not {_IR_VERSION, _GRAPH, _OPSET_IMPORT} <= numbers:
        raise _refusal("it has no graph or version.")
    if _expanded(walk.main, walk.functions, {}, 0) > NODES_MAX:
        raise _refusal(f"its functions unroll to more than {NODES_MAX} nodes.")
    return walk.ranges


class _Walk:
    def __init__(self) -> None:
        self.main = _Scope()
        self.functions: dict[Name, _Scope] = {}
        self.ranges: list[Range] = []
        self._fields_left = FIELDS_MAX

    def model(self, data: memoryview) -> set[int]:
        """Look at every message that can hold a tensor; answers the model's own field numbers."""
        numbers: set[int] = set()
        stack = [("Model", data, 0, self.main)]
        while stack:
            kind, message, depth, scope = stack.pop()
            if depth > DEPTH_MAX:
                raise _refusal(f"it is nested more than {DEPTH_MAX} messages deep.")
            if kind == "Tensor":
                self._tensor(message)
                continue
            if kind == "Function":
                scope = self._function(message)
            elif kind == "Node":
                scope.nodes += 1
                scope.calls[self._name(message, _NODE_NAMES)] += 1
            nested = _NESTED[kind]
            for number, wire_type, value, _ in self._fields(message):
                if kind == "Model":
                    numbers.add(number)
                if wire_type == _LENGTH and number in nested:
                    stack.append((nested[number], value, depth + 1, scope))
        return numbers

    def _fields(self, message: memoryview) -> Fields:
        for found in _fields(message):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _refusal(f"it has more than {FIELDS_MAX} fields.")
            yield found

    def _name(self, message: memoryview, numbers: dict[int, str]) -> Name:
        found = {number: bytes(value) for number, kind, value, _ in self._fields(message) if kind == _LENGTH
                 and number in numbers}  # fmt: skip
        op, domain, overload = (found.get(number, b"") for number in numbers)
        return (domain, op, overload)

    def _function(self, message: memoryview) -> _Scope:
        name = self._name(message, _FUNCTION_NAMES)
        if name in self.functions or len(self.functions) >= FUNCTIONS_MAX:
            raise _refusal(f"it has a function twice, or more than {FUNCTIONS_MAX}.")
        self.functions[name] = _Scope()
        return self.functions[name]

    def _tensor(self, message: memoryview) -> None:
        dims: list[int] = []
        entries: list[tuple[str, str]] = []
        is_external = False
        for number, wire_type, value, whole in self._fields(message):
            if number == _TENSOR_DIMS:
                dims += [whole] if wire_type == _VARINT else _packed(value)
            elif number == _TENSOR_ENTRY and wire_type == _LENGTH:
                entries.append(self._entry(value))
            elif number == _TENSOR_LOCATION:
                is_external = whole == _IS_EXTERNAL
        if math.prod(dims) > ELEMENTS_MAX or any(dim > ELEMENTS_MAX for dim in dims):
            raise _refusal(f"a tensor has more than {ELEMENTS_MAX} elements.")
        if is_external or entries:
            self.ranges.append(_external(entries))

    def _entry(self, message: memoryview) -> tuple[str, str]:
        texts = {number: bytes(value) for number, kind, value, _ in self._fields(message) if kind == _LENGTH}
        key, value = texts.get(1, b""), texts.get(2, b"")
        return key.decode("utf-8", "replace"), value.decode("utf-8", "replace")


def _external(entries: list[tuple[str, str]]) -> Range:
    found = dict(entries)
    if len(found) != len(entries) or found.keys() - _EXTERNAL_KEYS or "location" not in found:
        keys = ", ".join(sorted(key[:32] for key, _ in entries))
        raise _refusal(f"its external data has other keys than a location, an offset and a length once each: {keys!r}.")
    location, offset, length = found["location"], found.get("offset", "0"), found.get("length", "0")
    if re.fullmatch(PATH_PATTERN, location) is None:
        raise _refusal(f"it takes data from {location[:128]!r}, which is no file of its manifest.")
    if not (re.fullmatch(_OFFSET_PATTERN, offset) and re.fullmatch(_OFFSET_PATTERN, length)):
        raise _refusal(f"it takes data from {location} at no number: {offset[:32]!r}, {length[:32]!r}.")
    return Range(location, int(offset), int(length))


def _expanded(scope: _Scope, functions: dict[Name, _Scope], known: dict[int, int], depth: int) -> int:
    """Nodes of a scope once its calls are replaced by what they call; exact, however large."""
    if depth > DEPTH_MAX:
        raise _refusal(f"its functions call each other more than {DEPTH_MAX} deep, or in a circle.")
    if id(scope) not in known:
        total = scope.nodes
        for name, count in scope.calls.items():
            if name in functions:
                total += count * _expanded(functions[name], functions, known, depth + 1)
        known[id(scope)] = total
    return known[id(scope)]


def _packed(values: memoryview) -> list[int]:
    found, position = [], 0
    while position < len(values):
        value, position = _varint(values, position)
        found.append(value)
    return found


def _fields(message: memoryview) -> Fields:
    """Field number, wire type, content and, of a varint, the value of each field."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire_type, value = tag >> 3, tag & 7, 0
        start = position
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            start = position
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _LENGTH:
            size, start = _varint(message, position)
            position = start + size
        else:
            raise _refusal(f"wire type {wire_type} is not in use.")
        if position > end or number == 0:
            raise _refusal("the bytes end in the middle of a field.")
        yield number, wire_type, message[start:position], value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _refusal("the bytes end in the middle of a field.")


def _refusal(reason: str) -> MeshError:
    return MeshError(Code.UNTRUSTED, reason)
