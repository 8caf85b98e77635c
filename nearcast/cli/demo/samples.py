"""What the demo asks: images, spoken phrases and files whose right answers a person can check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODELS = Path(__file__).parent / "models"

FILES: dict[str, tuple[bytes, str]] = {
    "this program": (Path(__file__).read_bytes(), "python"),
    "a bundle specification": ((MODELS / "magika" / "magika-1.toml").read_bytes(), "toml"),
    "a web page": (
        b"""<!DOCTYPE html>
<html><head><title>nearcast</title></head>
<body><h1>It runs</h1>
<p>An answer next to the device.</p></body></html>
""",
        "html",
    ),
    "a table": (
        b"device,temperature,humidity\n"
        + b"".join(b"greenhouse-%d,2%d.5,6%d\n" % (i, i % 9, i % 7) for i in range(40)),
        "csv",
    ),
}
"""Content and true type by what a person would call it."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Test images that no model was trained on: float32 [10, 64], 0 to 9, and one on which releases disagree."""

    images: npt.NDArray[np.float32]
    disputed: npt.NDArray[np.float32]
    disputed_label: int


def load_digits() -> Digits:
    """The shipped images."""
    with np.load(MODELS / "digits" / "samples.npz") as file:
        return Digits(file["images"], file["disputed"][None, :], int(file["disputed_label"]))


def load_clips() -> dict[str, npt.NDArray[np.int8]]:
    """Phrases as int8 features [steps, 1, 3, 40], 30 ms a step: `okay_nabu` and `hey_jarvis`."""
    with np.load(MODELS / "wake_word" / "clips.npz") as file:
        return {name: file[name] for name in file.files}


def draw(image: npt.NDArray[Any]) -> list[str]:
    """A digit as eight lines of text, so that a person can check the answer."""
    shades = " .:*#"
    scaled = (image.reshape(8, 8) / 16 * (len(shades) - 1)).round().astype(int)
    return ["".join(shades[v] * 2 for v in row) for row in scaled]
