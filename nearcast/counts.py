"""What a version has done, counted. Light: the agent, which loads no engine, reads the counters too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

Duration: TypeAlias = tuple[int, int]
"""How often, and nanoseconds in all."""
Runs: TypeAlias = tuple[int, int, int, int]
"""How many, and nanoseconds in all on tensors before the engine, in the engine, and on tensors after it."""


class VersionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What one version has done since the process began, in the terms of Triton's statistics extension.

    Attributes:
        model: its name; `version` as on the wire.
        last_inference_ms: wall time of the last answer, milliseconds since 1970; 0 = none yet.
        rows: inferences: a request of n rows counts n. Answers from a cache do not count.
        runs: runs of the engine: however many requests ran together, they are one.
        runs_by_rows: the same runs, and their time, by the rows that ran together.
        success: requests that were answered, from arrival to answer.
        fail: requests that ended with an error.
        queue: waiting of the answered ones.
        compute_input: reading their tensors, decoding images, joining those of several requests.
        compute: time of the runs that they took part in; two requests in one run count its time twice.
        compute_output: taking the answers of joined requests apart.
        cache_hit: look-ups of the response cache that found the answer.
        cache_miss: those that did not.
        memory_bytes: estimate of what the version holds in memory now.
    """

    model: str
    version: str
    last_inference_ms: int = 0
    rows: int = 0
    runs: int = 0
    runs_by_rows: Mapping[int, Runs] = {}
    success: Duration = (0, 0)
    fail: Duration = (0, 0)
    queue: Duration = (0, 0)
    compute_input: Duration = (0, 0)
    compute: Duration = (0, 0)
    compute_output: Duration = (0, 0)
    cache_hit: Duration = (0, 0)
    cache_miss: Duration = (0, 0)
    memory_bytes: int = 0
