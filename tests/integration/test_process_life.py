"""Real processes under `nearcast.runtime.run`: signals, drain, exit codes, metrics."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from nearcast.errors import MeshError
from nearcast.runtime import ExitCode
from nearcast.telemetry import Telemetry
from router.child import Child
from tests.patience import until

ROOT = Path(__file__).parents[2]
PREAMBLE = """
import asyncio, sys
from nearcast.errors import Code, MeshError
from nearcast.runtime import announce, run
"""
TIMEOUT_S = 20


def start(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *signals: int) -> tuple[int, str, str]:
    """Wait until the process is ready, send the signals (one per line it prints), and return how it ended."""
    assert process.stdout is not None
    try:
        for number in signals:
            assert process.stdout.readline(), "the process ended before it was ready"
            process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_main_finish(number: int) -> None:
    process = start("""
        async def main(shutdown):
            announce("x", grpc="127.0.0.1:1")
            await shutdown.wait()
            print("drained")
            return 0
        sys.exit(run(main))
    """)
    code, out, err = finish(process, number)
    assert (code, out, err) == (ExitCode.OK, "drained\n", "")


def test_a_main_that_does_not_finish_is_cancelled_after_the_drain() -> None:
    process = start("""
        async def main(shutdown):
            announce("x")
            try:
                await asyncio.Event().wait()
            finally:
                print("cancelled")
        sys.exit(run(main, drain_s=0.1))
    """)
    code, out, err = finish(process, signal.SIGTERM)
    assert (code, out) == (ExitCode.FAILED, "cancelled\n")
    assert "still busy" in err


def test_a_second_signal_ends_at_once() -> None:
    process = start("""
        async def main(shutdown):
            announce("x")
            await shutdown.wait()
            print("draining", flush=True)
            await asyncio.Event().wait()
        sys.exit(run(main, drain_s=1000))
    """)
    assert finish(process, signal.SIGINT, signal.SIGINT)[0] == ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("statement", "code", "text"),
    [
        (
            "raise MeshError(Code.UNAVAILABLE, 'The broker is gone.')",
            ExitCode.UNAVAILABLE,
            "nearcast: The broker is gone.\n",
        ),
        ("raise ExceptionGroup('', [MeshError(Code.FORBIDDEN, 'No.')])", ExitCode.FORBIDDEN, "nearcast: No.\n"),
        ("return 1", ExitCode.FAILED, ""),
    ],
)
def test_how_main_ends_is_the_exit_code(statement: str, code: int, text: str) -> None:
    process = start(f"""
        async def main(shutdown):
            {statement}
        sys.exit(run(main))
    """)
    assert finish(process) == (code, "", text)


def test_a_defect_is_logged_with_its_traceback() -> None:
    process = start("""
        async def main(shutdown):
            raise ExceptionGroup("two", [MeshError(Code.FORBIDDEN, "No."), KeyError("defect")])
        sys.exit(run(main))
    """)
    code, _, err = finish(process)
    assert code == ExitCode.INTERNAL
    assert "KeyError: 'defect'" in err


async def test_metrics_are_served_and_a_taken_port_is_named() -> None:
    telemetry, other = Telemetry("edge"), Telemetry("edge")
    address = await telemetry.serve_metrics("127.0.0.1:0")
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
            assert answer.status == 200
            assert "process_resident_memory_bytes" in await answer.text()
        with pytest.raises(MeshError, match=f"{address} is in use"):
            await other.serve_metrics(address)
        with pytest.raises(MeshError, match="no certificates"):
            await other.serve_metrics("0.0.0.0:0")
    finally:
        await telemetry.close()


def test_logs_are_json_on_stderr_and_hold_what_stdlib_loggers_say() -> None:
    process = start("""
        import logging
        from nearcast.telemetry import TelemetryConfig, get_logger, start
        log = get_logger("nearcast.test")
        log.debug("before_start")
        start("edge", TelemetryConfig())
        start("edge", TelemetryConfig())
        log.info("model_loaded", model="digits")
        log.debug("not_shown")
        logging.getLogger("library").warning("said %s", "so")
        async def main(shutdown):
            return 0
        sys.exit(run(main))
    """)
    code, out, err = finish(process)
    assert (code, out) == (ExitCode.OK, "")
    assert [line.count('"service": "edge"') for line in err.splitlines()] == [1, 1]
    assert '"event": "model_loaded"' in err
    assert '"event": "said so"' in err


def test_a_daemon_call_returns_raises_and_is_not_waited_for() -> None:
    process = start("""
        import time
        from nearcast.runtime import run_in_daemon

        def fail():
            raise MeshError(Code.CONFLICT, "no")

        async def main(shutdown):
            assert await run_in_daemon(lambda: 7, name="seven") == 7
            try:
                await run_in_daemon(fail, name="fail")
            except MeshError as error:
                assert error.code is Code.CONFLICT
            waiting = asyncio.ensure_future(run_in_daemon(lambda: time.sleep(3600), name="silent"))
            announce("x")
            await shutdown.wait()
            waiting.cancel()
            return 0
        sys.exit(run(main))
    """)
    code, _, err = finish(process, signal.SIGTERM)
    assert (code, err) == (0, "")


def test_a_child_is_nicer_than_the_node_whatever_that_ones_niceness_is(tmp_path: Path) -> None:
    async def keep() -> int:
        child = Child("c", ["sleep", "60"], log=tmp_path / "log", nice=2)
        child.start()
        try:
            await until(lambda: bool(child.pid))
            return os.getpriority(os.PRIO_PROCESS, child.pid)
        finally:
            await child.stop()

    def keep_as_a_nicer_thread() -> tuple[int, int]:
        return os.nice(5), asyncio.run(keep())

    with ThreadPoolExecutor(1) as thread:
        own, childs = thread.submit(keep_as_a_nicer_thread).result()
    assert childs == min(19, own + 2)
