"""What warming a version teaches about its time."""

from __future__ import annotations

import time
from pathlib import Path

from nearcast.handler import Tensors
from nearcast.serving.engines import Outputs, load_engine
from nearcast.serving.engines.onnxruntime import OnnxModel
from nearcast.serving.golden import read_tensors
from nearcast.serving.loading import WARM_UP_TIME_S, warm
from nearcast.store import Store
from nearcast.store.contents import Contents
from tests.tiny_models import affine_model, install

PUT_OFF_S = 0.02


class PutOff(OnnxModel):
    """Each run loses the processor for a while, as beside others that start."""

    def run(self, inputs: Tensors) -> Outputs:
        time.sleep(PUT_OFF_S)
        return super().run(inputs)


class Laborious(OnnxModel):
    """Each run keeps the processor for as long as a warm-up may take."""

    runs = 0

    def run(self, inputs: Tensors) -> Outputs:
        self.runs += 1
        until = time.thread_time() + WARM_UP_TIME_S
        while time.thread_time() < until:
            pass
        return super().run(inputs)


def test_a_slow_model_is_run_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model(), name="m")
    contents = Contents(store.manifest("m", 1), store.folder("m", 1))
    vectors = [read_tensors(contents, vector.inputs) for vector in contents.manifest.golden]
    engine = Laborious(contents, threads=1)
    learnt = warm(engine, contents.manifest, vectors, threads=1)
    assert (engine.runs, learnt.runs) == (1, 1)
    assert learnt.p50_us == learnt.p99_us >= WARM_UP_TIME_S * 1e6


def test_a_run_that_was_put_off_counts_as_what_it_worked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model(), name="m")
    contents = Contents(store.manifest("m", 1), store.folder("m", 1))
    vectors = [read_tensors(contents, vector.inputs) for vector in contents.manifest.golden]
    put_off = warm(PutOff(contents, threads=1), contents.manifest, vectors, threads=1)
    assert put_off.runs >= 1
    assert 0 < put_off.p50_us <= put_off.p99_us < PUT_OFF_S * 1e6
    together = warm(PutOff(contents, threads=2), contents.manifest, vectors, threads=2)
    assert together.p50_us >= PUT_OFF_S * 1e6, "the loop waits for all threads of a run"
    assert warm(load_engine(contents, threads=1), contents.manifest, vectors, threads=1).runs > put_off.runs
