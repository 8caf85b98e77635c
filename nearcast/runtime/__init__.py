"""What every process of the mesh shares: its life, its exit codes, its listening addresses."""

from nearcast.runtime.address import Address, format_address, is_loopback, listen_error, parse_address, require_tls
from nearcast.runtime.exit import ExitCode, exit_code
from nearcast.runtime.heap import keep_pages
from nearcast.runtime.process import Shutdown, announce, run
from nearcast.runtime.thread import run_in_daemon

__all__ = [
    "Address",
    "ExitCode",
    "Shutdown",
    "announce",
    "exit_code",
    "format_address",
    "is_loopback",
    "keep_pages",
    "listen_error",
    "parse_address",
    "require_tls",
    "run",
    "run_in_daemon",
]
