"""Several calls at the same time, each on its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


def in_parallel(calls: Sequence[Callable[[], object]]) -> list[BaseException | None]:
    """What each call raised, in their order; None for those that returned."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()
        except Exception as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
