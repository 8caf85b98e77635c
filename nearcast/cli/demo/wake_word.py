"""From the wake-word model's answers to a detection: the mean of five windows above the model's cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OUTPUT_SCALE = 1 / 256
WINDOWS = 5
CUTOFF = 0.85


def model_file(name: str = "okay_nabu") -> Path:
    """Where `pymicro-wakeword` keeps its models."""
    import pymicro_wakeword

    return Path(pymicro_wakeword.__file__).parent / "models" / f"{name}.tflite"


def peak_probability(scores: Sequence[int]) -> float:
    """The highest mean of five consecutive uint8 scores, as a probability; 0 for fewer than five."""
    sums = [sum(scores[i : i + WINDOWS]) for i in range(len(scores) - WINDOWS + 1)]
    return max(sums, default=0) / WINDOWS * OUTPUT_SCALE


def is_detected(scores: Sequence[int]) -> bool:
    """Whether the phrase was heard."""
    return peak_probability(scores) > CUTOFF
