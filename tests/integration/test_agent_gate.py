"""The agent's gate: a refusal is final, a child that was killed or a key that is missing is not."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from model_sync.agent.install import gate
from model_sync.agent.install.gate import KILLS_MAX, Gate
from nearcast.errors import Code, MeshError
from nearcast.serving.gate_child import gate_environment
from tests.tiny_models import affine_model, write_version


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the child runs before anything else."""
    folder = tmp_path / "hook"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "sitecustomize.py"


async def refusal(running: Gate, folder: Path) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await running.run(folder, timeout_s=20.0)
    return caught.value


async def test_a_killed_child_is_no_refusal_until_it_is_killed_again_and_again(tmp_path: Path, hook: Path) -> None:
    write_version(tmp_path / "version", affine_model())
    hook.write_text("import os; os.kill(os.getpid(), 9)")
    running = Gate()
    for _ in range(KILLS_MAX - 1):
        error = await refusal(running, tmp_path / "version")
        assert error.code is Code.UNAVAILABLE
        assert "was killed (out of memory?)" in error.message
    assert (await refusal(running, tmp_path / "version")).code is Code.UNTRUSTED
    assert (await refusal(running, tmp_path / "version")).code is Code.UNAVAILABLE, "a newer document: from one again"
    hook.unlink()
    await running.run(tmp_path / "version", timeout_s=20.0)
    hook.write_text("import os; os.kill(os.getpid(), 9)")
    assert (await refusal(running, tmp_path / "version")).code is Code.UNAVAILABLE, "a child that ended: from one again"


async def test_a_crash_is_a_refusal(tmp_path: Path, hook: Path) -> None:
    write_version(tmp_path / "version", affine_model())
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU):
        hook.write_text(f"import os; os.kill(os.getpid(), {int(number)})")
        error = await refusal(Gate(), tmp_path / "version")
        assert error.code is Code.UNTRUSTED, error
        assert error.message.startswith("it did not pass the gate: The checking process ")


async def test_a_cancelled_gate_takes_the_child_with_it(tmp_path: Path, hook: Path) -> None:
    write_version(tmp_path / "version", affine_model())
    note = tmp_path / "pid"
    hook.write_text(f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    task = asyncio.create_task(Gate().run(tmp_path / "version", timeout_s=20.0))
    while not (note.exists() and note.read_text()):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_child_inherits_nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert set(gate_environment()) == {"PATH", "LANG", "PYTHONPATH", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    assert gate.OUTPUT_BYTES_MAX < 1_000_000
