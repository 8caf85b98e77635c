"""What the demo asks and how it reads answers: compared with the packages that the models come from."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from nearcast.cli.demo import file_types, wake_word
from nearcast.cli.demo.bundles import BUNDLES, write_sources
from nearcast.cli.demo.samples import FILES, MODELS, draw, load_clips, load_digits

OTHER_FILES = {
    "json": b'{"name": "nearcast", "ports": [8000, 8001, 8002], "tls": true}\n' * 5,
    "shell": b'#!/bin/sh\nset -e\nfor f in *.onnx; do\n  sha256sum "$f"\ndone\n',
    "padded": b"   \n\n  import sys\nprint(sys.argv)\n   \n",
    "large": (b"def f(x):\n    return x + 1\n\n" * 400),
    "binary": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("name", [*FILES, *OTHER_FILES])
def test_file_types_are_those_of_the_magika_package(name):
    import magika

    content = FILES[name][0] if name in FILES else OTHER_FILES[name]
    folder = file_types.model_folder()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    scores = session.run(None, {"bytes": file_types.extract_features(content)})[0][0]
    label, score = file_types.Labels(folder).name(scores)
    reference = magika.Magika().identify_bytes(content)
    assert label == reference.output.label
    assert score == pytest.approx(reference.score, abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"short", b"   \n\n a      "])
def test_files_that_need_no_model_are_refused(content):
    with pytest.raises(ValueError, match="need no model"):
        file_types.extract_features(content)


def test_a_wake_word_needs_five_windows_above_the_cutoff():
    assert not wake_word.is_detected([255, 255, 255, 255])
    assert wake_word.is_detected([0, 255, 255, 255, 255, 255])
    assert not wake_word.is_detected([255, 0] * 20)
    assert wake_word.peak_probability([256 * 85 // 100] * 5) == pytest.approx(0.847, abs=1e-3)


def test_the_shipped_images_are_0_to_9_and_one_is_disputed():
    digits = load_digits()
    answers = {}
    for release in ("digits-1", "digits-2", "digits-large-1"):
        session = onnxruntime.InferenceSession(MODELS / "digits" / f"{release}.onnx")
        answers[release] = session.run(None, {"image": np.concatenate([digits.images, digits.disputed])})[0].argmax(
            axis=1
        )
        assert answers[release][:10].tolist() == list(range(10))
    assert answers["digits-1"][10] != answers["digits-2"][10]
    assert len(draw(digits.images[0])) == 8


def test_clips_are_quantised_steps_of_thirty_milliseconds():
    clips = load_clips()
    assert set(clips) == {"okay_nabu", "hey_jarvis"}
    for clip in clips.values():
        assert clip.dtype == np.int8
        assert clip.shape[1:] == (1, 3, 40)


def test_every_bundle_of_the_demo_is_made_and_passes_the_gate(tmp_path):
    from model_sync.publisher.bundle import create_bundle, read_spec
    from nearcast.serving.gate_child import run_gate

    specifications = write_sources(tmp_path / "sources")
    assert set(specifications) == set(BUNDLES)
    for name, path in specifications.items():
        manifest = create_bundle(read_spec(path), path.parent, tmp_path / "bundles" / name)
        assert manifest.golden, name
        result = run_gate(tmp_path / "bundles" / name)
        assert result.ok, (name, result.error)
