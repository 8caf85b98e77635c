"""The whole state of a policy as bytes, and back.

Python's pickle carries the object graph; the reader builds nothing but the policy's own classes and a few containers,
so that a log from elsewhere can make no other code run.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from nearcast.errors import Code, MeshError
from router.policy.events import Attempt
from router.policy.policy import Policy

_PACKAGE = "router.policy."
_OTHERS = frozenset(
    {
        ("collections", "deque"),
        ("collections", "OrderedDict"),
        ("nearcast.errors", "Code"),
        ("nearcast.handler", "Served"),
        ("nearcast.load", "VersionReport"),
        ("msgspec._utils", "rebuild"),
    }
)


def save(policy: Policy, attempts: tuple[Attempt, ...]) -> bytes:
    """The state of a policy and of the attempts that may still be spoken of."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump((policy, attempts))
    return buffer.getvalue()


def load(state: bytes) -> tuple[Policy, tuple[Attempt, ...]]:
    """What `save` was given.

    Raises:
        MeshError: UNSUPPORTED if another release wrote it, INVALID_REQUEST if it names what no policy has.
    """
    try:
        policy, attempts = _Unpickler(io.BytesIO(state)).load()
    except MeshError:
        raise
    except Exception as error:
        raise MeshError(
            Code.UNSUPPORTED, f"The checkpoint was written by another release ({error}); replay it with that one."
        ) from error
    return policy, attempts


def blank() -> Policy:
    """A policy that its state is about to fill."""
    return Policy.__new__(Policy)


def bound(owner: object, name: str) -> Callable[..., Any]:
    """A method that one part of the policy holds of another."""
    method = getattr(owner, name, None)
    if not type(owner).__module__.startswith(_PACKAGE) or name.startswith("_") or not isinstance(method, MethodType):
        raise MeshError(Code.INVALID_REQUEST, "The checkpoint names what no policy has; use another file.")
    return method


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            return bound, (value.__self__, value.__name__)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OTHERS:
            return super().find_class(module, name)
        found = vars(sys.modules[module]).get(name) if module.startswith(_PACKAGE) and module in sys.modules else None
        if found in (blank, bound) or (isinstance(found, type) and found.__module__ == module):
            return found
        raise MeshError(Code.INVALID_REQUEST, f"The checkpoint names {module}.{name}, which no policy has.")
