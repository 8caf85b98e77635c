"""Magika's way from bytes to a file type: features before the model, a label after it.

The two rules (which bytes the model reads, and when its answer counts) are those of Magika's `standard_v3_3` model; a
test compares them with the `magika` package itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

PADDING = 256
BLOCK_SIZE_BYTES = 4096
WINDOW_SIZE = 1024
FILE_SIZE_BYTES_MIN = 8
THRESHOLD_DEFAULT = 0.5


def model_folder() -> Path:
    """Where the `magika` package keeps `model.onnx` and its configuration."""
    import magika

    return Path(magika.__file__).parent / "models" / "standard_v3_3"


def extract_features(content: bytes) -> npt.NDArray[np.int32]:
    """What the model reads of a file: int32 [1, 2048], the first and the last 1024 bytes without outer white space.

    Raises:
        ValueError: if the file is too short for the model.
    """
    size = min(BLOCK_SIZE_BYTES, len(content))
    begin = np.full(WINDOW_SIZE, PADDING, np.int32)
    end = np.full(WINDOW_SIZE, PADDING, np.int32)
    head = np.frombuffer(content[:size].lstrip()[:WINDOW_SIZE], np.uint8)
    tail = np.frombuffer(content[len(content) - size :].rstrip()[-WINDOW_SIZE:], np.uint8)
    begin[: len(head)] = head
    end[WINDOW_SIZE - len(tail) :] = tail
    if len(content) < FILE_SIZE_BYTES_MIN or begin[FILE_SIZE_BYTES_MIN - 1] == PADDING:
        raise ValueError(f"files shorter than {FILE_SIZE_BYTES_MIN} bytes need no model")
    return np.concatenate([begin, end])[None, :]


class Labels:
    """Turns the model's scores into the name of a file type."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.min.json").read_text())
        self.names: list[str] = config["target_labels_space"]
        self._thresholds: dict[str, float] = config["thresholds"]
        self._overwrite: dict[str, str] = config["overwrite_map"]
        known = json.loads((folder.parents[1] / "config" / "content_types_kb.min.json").read_text())
        self._texts = {name for name, entry in known.items() if entry["is_text"]}

    def name(self, scores: npt.NDArray[np.float32]) -> tuple[str, float]:
        """The file type and its score, for FP32 [214] scores. Unsure answers become `txt` or `unknown`."""
        best = int(scores.argmax())
        score = float(scores[best])
        label = self._overwrite.get(self.names[best], self.names[best])
        if score < self._thresholds.get(self.names[best], THRESHOLD_DEFAULT):
            return ("txt" if label in self._texts else "unknown"), score
        return label, score
