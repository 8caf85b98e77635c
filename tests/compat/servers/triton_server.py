"""Starts Triton's core with the Python backend, from the wheel of nvidia-pytriton in its own environment."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.compat.children import free_port, running
from tests.compat.contract import ADD, IDENTITY, SEQUENCE, SLOW
from tests.compat.tensors import DATATYPES

ROOT = Path(__file__).parents[3]
ENVIRONMENT = ROOT / ".venv-peers" / "triton"
PACKAGES = ENVIRONMENT / "lib" / "python3.11" / "site-packages"
TRITON = PACKAGES / "pytriton" / "tritonserver"
MODEL = Path(__file__).with_name("triton_model.py")

SCHEDULER = """dynamic_batching {
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true timeout_action: REJECT }
}
"""
CONTROLS = """sequence_batching {
  max_sequence_idle_microseconds: 5000000
  control_input [
    { name: "START" control [ { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } ] },
    { name: "END" control [ { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } ] },
    { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
  ]
}
"""


def tensors(side: str, *entries: tuple[str, str, str]) -> str:
    """The `input` or `output` of a config.pbtxt."""
    return "".join(
        f'{side} [ {{ name: "{name}" data_type: TYPE_{kind} dims: [ {dims} ] }} ]\n' for name, kind, dims in entries
    )


def put(folder: Path, name: str, kind: str, body: str, *, batch: int = 0, model: Path = MODEL) -> None:
    """One model of the repository."""
    version = folder / name / "1"
    version.mkdir(parents=True)
    shutil.copy(model, version / "model.py")
    head = f'name: "{name}"\nbackend: "python"\nmax_batch_size: {batch}\n'
    kinds = (
        f'parameters {{ key: "kind" value {{ string_value: "{kind}" }} }}\ninstance_group [ {{ kind: KIND_CPU }} ]\n'
    )
    (folder / name / "config.pbtxt").write_text(head + kinds + body)


def write_models(folder: Path) -> None:
    """The contract as a model repository."""
    for datatype in DATATYPES:
        kind = "STRING" if datatype == "BYTES" else datatype
        body = tensors("input", ("x", kind, "-1, -1")) + tensors("output", ("y", kind, "-1, -1"))
        put(folder, IDENTITY[datatype], "bf16" if datatype == "BF16" else "identity", body)
    pair = tensors("input", ("a", "FP32", "4"), ("b", "FP32", "4"))
    both = tensors("output", ("sum", "FP32", "4"), ("difference", "FP32", "4"))
    put(folder, ADD, "add", pair + both + SCHEDULER, batch=512)
    body = tensors("input", ("x", "FP32", "4")) + tensors("output", ("y", "FP32", "4"))
    put(folder, SLOW, "slow", body + SCHEDULER, batch=1)
    # The first axis of a frame is the batch; four sequences may be open at once.
    body = tensors("input", ("x", "INT8", "3, 40")) + tensors("output", ("y", "FP32", "1"))
    put(folder, SEQUENCE, "sequence", body + CONTROLS, batch=4)


@contextlib.contextmanager
def triton(folder: Path, *options: str) -> Iterator[dict[str, str]]:
    """Triton on a model repository; yields its addresses."""
    backends = _link_backend(folder.parent)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [str(TRITON / "bin" / "tritonserver"), f"--model-repository={folder}", "--model-control-mode=none"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    command += [f"--backend-directory={backends}", f"--cache-directory={TRITON / 'caches'}", *options]
    environment = {
        "VIRTUAL_ENV": str(ENVIRONMENT),
        "PATH": f"{ENVIRONMENT / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(PACKAGES),
        "LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs"),
    }
    url = f"http://127.0.0.1:{ports['http']}"
    with running(
        command, ready_url=f"{url}/v2/health/ready", log=folder.parent / "triton.log", environment=environment
    ):
        yield {"grpc": f"127.0.0.1:{ports['grpc']}", "rest": url}


def _link_backend(folder: Path) -> Path:
    """The Python backend beside the stub of this Python's version, which the wheel keeps apart."""
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    stub = TRITON / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    for source in (stub, *(TRITON / "backends" / "python").glob("*triton*")):
        (python / source.name).symlink_to(source)
    return python.parent


@contextlib.contextmanager
def contract_server(folder: Path) -> Iterator[dict[str, str]]:
    """The contract served by Triton's core."""
    models = folder / "models"
    models.mkdir()
    write_models(models)
    with triton(models) as where:
        yield where
