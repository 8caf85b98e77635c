"""What can happen to a replica machine. `job` ties an answer to the instruction that asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from model_sync.replica.state import Failure, Want


@dataclass(frozen=True, slots=True)
class Booted:
    """The agent started and has replayed its journal."""


@dataclass(frozen=True, slots=True)
class Polled:
    """The shell began to check the metadata."""


@dataclass(frozen=True, slots=True)
class CheckFailed:
    """The metadata could not be checked."""

    reason: str


@dataclass(frozen=True, slots=True)
class Intended:
    """A verified channel document says this."""

    want: Want


@dataclass(frozen=True, slots=True)
class Done:
    """The step of `job` succeeded."""

    job: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The host serves what the pointer says. The counters are where the trial starts; see `Sampled`."""

    job: int
    requests: int = 0
    errors: int = 0
    latency: Mapping[str, int] = field(default_factory=dict)
    compared: int = 0
    disagreed: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The step of `job` failed; within `retry_s` it is of no use to try again."""

    job: int
    failure: Failure
    reason: str
    retry_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampled:
    """Counters of the release on trial; `heard` is false when the host did not answer.

    `latency` counts its answers by bucket of their duration, `reference` those of the version that it replaces.
    `compared` inputs were run on both, and `disagreed` of them answered differently.
    """

    job: int
    requests: int = 0
    errors: int = 0
    heard: bool = True
    failed: str = ""
    latency: Mapping[str, int] = field(default_factory=dict)
    reference: Mapping[str, int] = field(default_factory=dict)
    compared: int = 0
    disagreed: int = 0


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """A status report could not be delivered. No state listens to it."""

    reason: str


Event: TypeAlias = Booted | Polled | CheckFailed | Intended | Done | Loaded | Failed | Sampled | Ticked | ReportFailed
