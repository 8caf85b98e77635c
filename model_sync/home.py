"""Where an operator's keys and the controller's state lie on this machine. Light: every command looks here first."""

from __future__ import annotations

import os
from pathlib import Path


def default_home() -> Path:
    """`$NEARCAST_HOME`, else `~/.nearcast`; holds `operator/` and, where the controller runs, `sync/`."""
    return Path(os.environ.get("NEARCAST_HOME") or Path.home() / ".nearcast")
