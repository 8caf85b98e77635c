"""Starts other inference servers from environments of their own: MLServer, and Triton's core from nvidia-pytriton.

`make bench-peers` installs both. `benchmarks serving` measures them beside nearcast, `tests/compat` checks them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
FOLDER = Path(__file__).parents[1] / ".venv-peers"
MLSERVER, TRITON = FOLDER / "mlserver", FOLDER / "triton"
_PACKAGES = TRITON / "lib" / "python3.11" / "site-packages"
_TRITON = _PACKAGES / "pytriton" / "tritonserver"


@contextlib.contextmanager
def mlserver(folder: Path, *, runtime: Path, pin: tuple[str, ...] = (), **settings: Any) -> Iterator[dict[str, Any]]:
    """MLServer on the models of a folder, each beside its `model-settings.json`; yields `grpc`, `rest` and `pid`.

    Args:
        folder: where the models are; its settings and log go there too.
        runtime: the file that holds the models' implementation.
        pin: a command in front, such as `taskset -c 0`.
        settings: of the server, as MLServer calls them.
    """
    shutil.copy(runtime, folder)
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    common = {"host": "127.0.0.1", "debug": False, "use_structured_logging": False}
    (folder / "settings.json").write_text(json.dumps(common | ports | settings))
    url = f"http://127.0.0.1:{ports['http_port']}"
    command = [*pin, str(MLSERVER / "bin/mlserver"), "start", str(folder)]
    path = {"PATH": f"{MLSERVER / 'bin'}:/usr/bin:/bin", "PYTHONPATH": str(folder)}
    with running(command, ready_url=f"{url}/v2/health/ready", log=folder / "log", environment=path) as child:
        yield {"grpc": f"127.0.0.1:{ports['grpc_port']}", "rest": url, "pid": child.pid}


@contextlib.contextmanager
def triton(models: Path, *, pin: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Triton's core on a model repository; yields `grpc`, `rest` and `pid`. Its log lies beside the repository."""
    backends = _link_backend(models.parent)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [*pin, str(_TRITON / "bin" / "tritonserver"), f"--model-repository={models}"]
    command += ["--model-control-mode=none", f"--backend-directory={backends}"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    command += [f"--{name}-address=127.0.0.1" for name in ports]
    environment = {
        "VIRTUAL_ENV": str(TRITON),
        "PATH": f"{TRITON / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(_PACKAGES),
        "LD_LIBRARY_PATH": str(_PACKAGES / "nvidia_pytriton.libs"),
    }
    url = f"http://127.0.0.1:{ports['http']}"
    log = models.parent / "triton.log"
    with running(command, ready_url=f"{url}/v2/health/ready", log=log, environment=environment) as child:
        yield {"grpc": f"127.0.0.1:{ports['grpc']}", "rest": url, "pid": child.pid}


def put_triton_model(models: Path, name: str, config: str, *, code: Path, parameters: Mapping[str, str]) -> None:
    """One model of Triton's Python backend: `config.pbtxt` and its code, one instance on the CPU."""
    version = models / name / "1"
    version.mkdir(parents=True)
    shutil.copy(code, version / "model.py")
    head = f'name: "{name}"\nbackend: "python"\ninstance_group [ {{ count: 1 kind: KIND_CPU }} ]\n'
    for key, value in parameters.items():
        head += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    (models / name / "config.pbtxt").write_text(head + config)


def _link_backend(folder: Path) -> Path:
    """The Python backend beside the stub of this Python's version, which the wheel keeps apart."""
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    stub = _TRITON / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    for source in (stub, *(_TRITON / "backends" / "python").glob("*triton*")):
        (python / source.name).symlink_to(source)
    return python.parent


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: list[str], *, ready_url: str, log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, with all its children, until the block ends; yields once `ready_url` answers 200.

    Raises:
        RuntimeError: with the end of its log, if it is not ready in time.
    """
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=out, env=dict(os.environ) | dict(environment), start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(ready_url):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} is not ready: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield child
    finally:
        stop_group(child)


def stop_group(child: subprocess.Popen[Any]) -> None:
    """End a child that leads a process group, and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _answers(url: str) -> bool:
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=2)
    try:
        connection.request("GET", "/" + path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
