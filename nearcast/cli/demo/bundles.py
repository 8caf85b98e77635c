"""The demo's bundles: specifications shipped with it, model files shipped or taken from their packages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from nearcast.cli.demo import file_types, wake_word
from nearcast.cli.demo.samples import FILES, MODELS, load_clips

BUNDLES = {
    "digits-1": MODELS / "digits",
    "digits-2": MODELS / "digits",
    "digits-large-1": MODELS / "digits",
    "wake-word-1": MODELS / "wake_word",
    "magika-1": MODELS / "magika",
}


def write_sources(folder: Path) -> dict[str, Path]:
    """Lay out one folder with specification, model file and golden inputs per bundle; returns the specifications."""
    specifications = {}
    for name, source in BUNDLES.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        specifications[name] = target / "spec.toml"
        shutil.copyfile(source / f"{name}.toml", specifications[name])
        for file in (source / f"{name}.onnx", source / "golden.npz"):
            if file.exists():
                shutil.copyfile(file, target / file.name)
    shutil.copyfile(file_types.model_folder() / "model.onnx", folder / "magika-1" / "model.onnx")
    model_file = wake_word.model_file()
    shutil.copyfile(model_file, folder / "wake-word-1" / model_file.name)
    _write_golden(folder)
    return specifications


def _write_golden(folder: Path) -> None:
    content = next(iter(FILES.values()))[0]
    np.savez(folder / "magika-1" / "magika-1.npz", in_bytes=file_types.extract_features(content))
    # In order on one fresh interpreter, which hears the phrase on the way.
    steps = [{"inputs": {"input_audio": step.tolist()}} for step in load_clips()["okay_nabu"]]
    (folder / "wake-word-1" / "wake-word-1.json").write_text(json.dumps(steps))
