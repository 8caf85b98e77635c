"""Numbered exit codes. The numbers follow sysexits where it has a word for the case."""

from __future__ import annotations

from enum import IntEnum

from nearcast.config import ConfigError
from nearcast.errors import Code, MeshError


class ExitCode(IntEnum):
    """How a process ended. 0 is success; 1 a check that said no; 64-78 name the class of an error."""

    OK = 0
    FAILED = 1
    USAGE = 64
    UNTRUSTED = 65
    NOT_FOUND = 66
    UNAVAILABLE = 69
    INTERNAL = 70
    TRY_AGAIN = 75
    FORBIDDEN = 77
    CONFIG = 78
    INTERRUPTED = 130


_BY_CODE = {
    Code.INVALID_REQUEST: ExitCode.USAGE,
    Code.TOO_LARGE: ExitCode.USAGE,
    Code.UNSUPPORTED: ExitCode.USAGE,
    Code.UNAUTHENTICATED: ExitCode.FORBIDDEN,
    Code.FORBIDDEN: ExitCode.FORBIDDEN,
    Code.MODEL_NOT_FOUND: ExitCode.NOT_FOUND,
    Code.VERSION_MISMATCH: ExitCode.NOT_FOUND,
    Code.UNTRUSTED: ExitCode.UNTRUSTED,
    Code.UNAVAILABLE: ExitCode.UNAVAILABLE,
    Code.CONFLICT: ExitCode.TRY_AGAIN,
    Code.OVERLOADED: ExitCode.TRY_AGAIN,
    Code.DEADLINE: ExitCode.TRY_AGAIN,
    Code.SUPERSEDED: ExitCode.TRY_AGAIN,
    Code.CANCELLED: ExitCode.INTERRUPTED,
    Code.INTERNAL: ExitCode.INTERNAL,
}


def exit_code(error: MeshError) -> ExitCode:
    """The exit code of a process that ends because of `error`."""
    return ExitCode.CONFIG if isinstance(error, ConfigError) else _BY_CODE[error.code]
