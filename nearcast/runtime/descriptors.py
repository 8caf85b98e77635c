"""File descriptors: every connection, file and pipe is one, and a process may have so many and no more."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource

DESCRIPTORS_MAX = 65_536
LOOK_INTERVAL_S = 1.0
SHORT_SHARE = 0.9
"""Of them in use: from here on they are short, and it is said."""
EASE_SHARE = 0.8
"""Below this they are short no more."""
_log = logging.getLogger("nearcast.runtime")


def raise_descriptors() -> None:
    """Take as many file descriptors as the system allows, up to `DESCRIPTORS_MAX`.

    The soft limit, often 1024, is for programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Shortage:
    """Whether descriptors are short. Pure."""

    def __init__(self) -> None:
        self.lasts = False

    def look(self, used: int, most: int) -> bool:
        """Whether that has changed, with so many of them in use."""
        before, self.lasts = self.lasts, used >= (EASE_SHARE if self.lasts else SHORT_SHARE) * most
        return self.lasts != before


async def watch_descriptors() -> None:
    """Say when descriptors are short and when they are again enough.

    Without any, the loop closes new connections as it takes them and tells nobody.
    """
    shortage = Shortage()
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most == resource.RLIM_INFINITY or not shortage.look(_count(most), most):
            continue
        if shortage.lasts:
            _log.warning(
                "of %d file descriptors nearly all are in use: connections are refused and files cannot be opened; "
                "raise the limit (`ulimit -n`, `LimitNOFILE=`) or find who holds so many connections",
                most,
            )
        else:
            _log.warning("there are enough file descriptors again")


def _count(most: int) -> int:
    """About how many are in use: the system gives the lowest one that is free."""
    try:
        lowest_free = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return most if error.errno == errno.EMFILE else 0
    os.close(lowest_free)
    return lowest_free
