"""Bounds that a child process sets itself before it touches a stranger's bytes. Light: it loads no engine."""

from __future__ import annotations

import resource

CPU_GRACE_S = 5


def confine(*, cpu_s_max: int, address_space_bytes_max: int, file_size_bytes_max: int) -> None:
    """From here on the process can neither grow, spin, write large files nor leave a core behind."""
    for kind, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        # The soft bound is SIGXCPU. At the hard one comes SIGKILL, which must mean that another one killed the child.
        (resource.RLIMIT_CPU, cpu_s_max, cpu_s_max + CPU_GRACE_S),
        (resource.RLIMIT_FSIZE, file_size_bytes_max, file_size_bytes_max),
        (resource.RLIMIT_AS, address_space_bytes_max, address_space_bytes_max),
    ):
        present = resource.getrlimit(kind)[1]
        allowed = hard if present == resource.RLIM_INFINITY else min(hard, present)
        resource.setrlimit(kind, (min(soft, allowed), allowed))
