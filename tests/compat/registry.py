"""The list of checks: each is one function with an id, a level and the transports that it speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MUST, EXTENSION, RECOMMENDED = "must", "extension", "recommended"
"""What the protocol's text demands; what Triton's extensions document; what a client may hope for."""
GRPC, REST = "grpc", "rest"
BOTH = (GRPC, REST)
PASS, FAIL, ABSENT = "pass", "fail", "absent"


class NonconformingError(AssertionError):
    """What a check found wrong, in words for the report."""


@dataclass(frozen=True)
class Check:
    """One check. `extension` names what a server would announce; where it does not, a failure reads as absent."""

    id: str
    level: str
    text: str
    transports: tuple[str, ...]
    run: Callable[[Any], None]
    extension: str = ""


@dataclass(frozen=True)
class Result:
    """How one check ended over one transport; `detail` says why it did not pass."""

    check: str
    transport: str
    status: str
    detail: str = ""


CHECKS: dict[str, Check] = {}


def check(name: str, level: str, transports: str | tuple[str, ...] = BOTH, *, extension: str = "") -> Any:
    """Register a check; the first line of its docstring is its text in the report."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        over = (transports,) if isinstance(transports, str) else transports
        add(Check(name, level, (function.__doc__ or "").splitlines()[0], over, function, extension))
        return function

    return register


def add(item: Check) -> None:
    """Register a check that was made in a loop."""
    assert item.id not in CHECKS, f"two checks are called {item.id}"
    assert item.text, f"{item.id} does not say what it checks"
    CHECKS[item.id] = item


def expect(condition: Any, text: str) -> None:
    """Fail the check with `text` unless the condition holds."""
    if not condition:
        raise NonconformingError(text)


def run_check(item: Check, client: Any) -> Result:
    """One check over one transport. Whatever goes wrong belongs to the server: the report says what."""
    try:
        item.run(client)
    except Exception as error:
        announced = not item.extension or item.extension in {name.split("(")[0] for name in client.extensions()}
        text = str(error) if isinstance(error, NonconformingError) else f"{type(error).__name__}: {error}"
        return Result(item.id, client.transport, FAIL if announced else ABSENT, " ".join(text.split())[:300])
    return Result(item.id, client.transport, PASS)
