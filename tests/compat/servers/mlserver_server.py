"""Starts MLServer with the contract's models, in its own environment (`make bench-peers`)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers import mlserver
from tests.compat.contract import ADD, IDENTITY, SLOW
from tests.compat.tensors import DATATYPES

RUNTIME = Path(__file__).with_name("mlserver_runtime.py")


def tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def write_models(folder: Path) -> None:
    """One folder a model, each with `model-settings.json`."""

    def put(name: str, kind: str, inputs: list[Any], outputs: list[Any], **fields: Any) -> None:
        settings = {
            "name": name,
            "implementation": "mlserver_runtime.ContractModel",
            "parameters": {"version": "1", "extra": {"kind": kind}},
            "inputs": inputs,
            "outputs": outputs,
        }
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(json.dumps(settings | fields))

    for datatype in DATATYPES:
        sides = [[tensor(name, datatype, [-1, -1])] for name in "xy"]
        put(IDENTITY[datatype], "identity", *sides)
    rows = [tensor(name, "FP32", [-1, 4]) for name in ("a", "b", "sum", "difference")]
    # Adaptive batching as its documentation shows it.
    put(ADD, "add", rows[:2], rows[2:], max_batch_size=16, max_batch_time=0.002)
    put(SLOW, "slow", [tensor("x", "FP32", [-1, 4])], [tensor("y", "FP32", [-1, 4])])


@contextlib.contextmanager
def contract_server(folder: Path) -> Iterator[dict[str, str]]:
    """The contract served by MLServer."""
    write_models(folder)
    with mlserver(folder, runtime=RUNTIME) as where:
        yield where
