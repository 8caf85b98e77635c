"""From scores to results, and from results to the event that leaves the node. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from edge_node.mqtt.streams.plan import Plan
from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors

BOXES, BOX_SCORES, BOX_CLASSES = "boxes", "scores", "classes"
SCORES_MAX = 1 << 16
"""Of one window: they are looked through on the loop."""
RESULTS_MAX = 256
"""Of one message; the best ones stay."""


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that the model saw. `window` counts within the message; `bbox` is as the model gives it."""

    class_name: str
    score: float
    window: int = 0
    bbox: tuple[float, ...] | None = None


class EventBody(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of an event.

    Attributes:
        id: the same for the same message of the device, however often it was sent or executed.
        ts: the device's own word, else the node's wall clock at the message's arrival.
        boot_id, seq: the device's count; "" and null where it keeps none.
        latency_ms: from the message's arrival to the result; null where the machine was off in between.
    """

    id: str
    ts: str
    boot_id: str
    seq: int | None
    device: str
    stream: str
    model: str
    version: str
    latency_ms: float | None
    results: Sequence[Result]


def event_id(key: str, boot: str, seq: int | None, *, otherwise: str) -> str:
    """32 hexadecimal digits that name one message of one stream.

    Args:
        key: the stream's name among all.
        boot: the device's boot.
        seq: the device's count in it; None where it keeps none.
        otherwise: what tells messages apart then: the row in the ledger.
    """
    own = f"{boot}\n{seq}" if seq is not None else f"\n\n{otherwise}"
    return hashlib.blake2b(f"{key}\n{own}".encode(), digest_size=16).hexdigest()


def read_boxes(outputs: Tensors, plan: Plan, window: int) -> list[Result] | None:
    """The results of a detector; None if the model is none."""
    if BOXES not in outputs or BOX_SCORES not in outputs:
        return None
    if not outputs[BOX_SCORES].size:
        return []
    scores = outputs[BOX_SCORES].reshape(-1).astype(np.float64) * plan.definition.score_scale
    boxes = outputs[BOXES].reshape(len(scores), -1)
    classes = outputs[BOX_CLASSES].reshape(-1) if BOX_CLASSES in outputs else np.zeros(len(scores), np.int64)
    return [
        Result(class_name=_label(plan, int(kind)), score=_rounded(score), window=window, bbox=tuple(box.tolist()))
        for score, kind, box in zip(scores, classes, boxes, strict=True)
        if score > 0 and score >= plan.definition.threshold
    ]


def read_scores(outputs: Tensors, plan: Plan) -> list[float]:
    """The scores of all classes, flat.

    Raises:
        MeshError: INVALID_REQUEST if the model has not one output of scores, UNSUPPORTED if that holds no numbers.
    """
    fed_back = {entry.output for entry in plan.feedback}
    names = [name for name in outputs if name not in fed_back]
    if len(names) != 1:
        raise MeshError(Code.INVALID_REQUEST, f"A stream's model gives one output of scores, not {', '.join(names)}.")
    output = outputs[names[0]]
    if output.dtype.kind not in "biuf" or output.size > SCORES_MAX:
        raise MeshError(
            Code.UNSUPPORTED, f"The output {names[0]} of a stream's model must be at most {SCORES_MAX} numbers."
        )
    scores: list[float] = output.reshape(-1).tolist()
    scale = plan.definition.score_scale
    return scores if scale == 1.0 else [score * scale for score in scores]


def mean_scores(
    recent: Sequence[Sequence[float]], scores: Sequence[float], count: int
) -> tuple[tuple[tuple[float, ...], ...], Sequence[float]]:
    """The scores to keep for the next window, and the mean over the last `count` windows."""
    if count == 1:
        return (), scores
    kept = (*(tuple(entry) for entry in recent if len(entry) == len(scores)), tuple(scores))[-count:]
    # Windows before the first one count as zero: nothing was heard in them.
    return kept, [sum(entries) / count for entries in zip(*kept, strict=True)]


def best_class(scores: Sequence[float], plan: Plan, window: int) -> list[Result]:
    """The class with the highest score, if it reaches the threshold."""
    if not scores:
        return []
    best = max(range(len(scores)), key=scores.__getitem__)  # numpy's would let the GIL go for nothing
    if not scores[best] >= plan.definition.threshold:  # a score that is no number reaches nothing
        return []
    return [Result(class_name=_label(plan, best, len(scores)), score=_rounded(scores[best]), window=window)]


def strongest(results: Sequence[Result]) -> list[Result]:
    """At most `RESULTS_MAX` results, in their order."""
    if len(results) <= RESULTS_MAX:
        return list(results)
    least = sorted((result.score for result in results), reverse=True)[RESULTS_MAX - 1]
    return [result for result in results if result.score >= least][:RESULTS_MAX]


def class_names(results: Sequence[Result]) -> tuple[str, ...]:
    """The names in the results, each once, in alphabetical order."""
    return tuple(sorted({result.class_name for result in results}))


def encode_event(body: EventBody) -> bytes:
    """The event as JSON."""
    return msgspec.json.encode(body)


def _label(plan: Plan, index: int, count: int = 0) -> str:
    if 0 <= index < len(plan.labels):
        return plan.labels[index]
    return plan.definition.model if count == 1 else str(index)


def _rounded(score: Any) -> float:
    return round(float(score), 6)
