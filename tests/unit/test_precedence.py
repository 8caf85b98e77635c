"""Threads that run models give way to the loop, and the loop's short slices stay its own."""

from __future__ import annotations

import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nearcast.serving.precedence import NICENESS, ask_for_short_slices, give_way_to_loop


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"), reason="asks Linux"
)
def test_a_models_thread_is_nicer_than_the_loops() -> None:
    with ThreadPoolExecutor(1) as loop:
        before = loop.submit(niceness).result()
        assert loop.submit(ask_for_short_slices).result()
        assert loop.submit(niceness).result() == before
    with ThreadPoolExecutor(1, initializer=give_way_to_loop) as models:
        assert models.submit(niceness).result() == min(19, before + NICENESS)
