"""What a process and its threads did to one folder, call by call, recorded by `strace`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "open,openat,creat,lseek,write,pwrite64,writev,pwritev,truncate,ftruncate,fallocate,copy_file_range,sendfile,"
    "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat"
)
SOCKET_CALLS = "sendto,sendmsg,recvfrom,recvmsg"
STRING_BYTES_MAX = 8 * 1024 * 1024
"""The longest single write that is recorded whole; a longer one is an error, never a guess."""
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_SENDING = re.compile(r"^\d+ +(sendto|sendmsg)\((.*)<unfinished")
_SENDS = frozenset({"sendto", "sendmsg"})
_ARGUMENT = re.compile(r'(?:(\d+|AT_FDCWD)<((?:\\x..)*)>(\(deleted\))?)|"((?:\\x..)*)"(\.\.\.)?|([A-Z0-9_|]+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call that changed or may change the folder. Paths are relative to it; `offset` -1 = where the file stands.

    What goes through a socket is a `send` or a `receive`; its path is the kernel's name of the socket.
    """

    name: str
    path: str
    other: str = ""
    descriptor: int = -1
    offset: int = -1
    data: bytes = b""
    appends: bool = False
    truncates: bool = False


def record_prefix(trace: Path, *, sockets: bool = False) -> list[str]:
    """What to put in front of a command line to have its trace written, on request with what its sockets carry."""
    calls = f"{CALLS},{SOCKET_CALLS}" if sockets else CALLS
    options = ["-f", "-y", "-xx", "-s", str(STRING_BYTES_MAX), "--seccomp-bpf", "-e", f"trace={calls}"]
    return ["strace", *options, "-e", "signal=none", "-o", str(trace)]


def is_available() -> bool:
    """Whether processes can be traced here."""
    try:
        done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def read_trace(trace: Path, folder: Path) -> Iterator[Call]:
    """The calls of a trace below `folder`, in the order in which they were completed; a `send` when it began.

    Raises:
        ValueError: for a call below the folder that is recorded in part or not understood.
    """
    begun: dict[str, str] = {}
    prefix = str(folder)
    with trace.open() as lines:
        for line in lines:
            if line.endswith("<unfinished ...>\n"):
                begun[line.split(" ", 1)[0]] = line[: -len("<unfinished ...>\n")].rstrip()
                if sending := _SENDING.match(line):
                    yield _decode_socket(sending[1], _arguments(sending[2]), STRING_BYTES_MAX)
                continue
            if resumed := _RESUMED.match(line):
                if resumed[2] in _SENDS:
                    del begun[resumed[1]]
                    continue
                line = begun.pop(resumed[1], "") + resumed[3]  # noqa: PLW2901 (the two halves of one line)
            found = _LINE.match(line)
            if found is None or int(found[4]) < 0:
                continue
            call = _decode(found[2], found[3], int(found[4]), line, prefix)
            if call is not None:
                yield call


@dataclass(frozen=True, slots=True)
class _Argument:
    descriptor: int = -1
    path: str = ""
    deleted: bool = False
    data: bytes | None = None
    word: str = ""


def _arguments(text: str) -> list[_Argument]:
    found = []
    for number, path, deleted, string, cut, word in _ARGUMENT.findall(text):
        if cut:
            raise ValueError("a string of the trace is cut")
        if number:
            name = -1 if number == "AT_FDCWD" else int(number)
            found.append(_Argument(descriptor=name, path=_bytes(path).decode(), deleted=bool(deleted)))
        elif word:
            found.append(_Argument(word=word))
        else:
            found.append(_Argument(data=_bytes(string)))
    return found


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _decode(name: str, text: str, result: int, line: str, prefix: str) -> Call | None:
    arguments = _arguments(text)
    first = arguments[0]
    if name in _SOCKETS:
        return _decode_socket(name, arguments, result)
    if first.descriptor >= 0 and first.data is None and name not in _BY_FOLDER:
        if first.deleted or (not first.path.startswith(prefix + "/") and first.path != prefix):
            return None
        return _decode_descriptor(name, first, arguments, result, prefix)
    paths = [path for path in _paths(arguments) if path == prefix or path.startswith(prefix + "/")]
    if not paths:
        return None
    below = [path[len(prefix) + 1 :] for path in paths]
    match name:
        case "open" | "openat" | "creat":
            flags = {flag for argument in arguments for flag in argument.word.split("|")}
            writes = name == "creat" or flags & {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"}
            if not writes:
                return None
            appends, truncates = "O_APPEND" in flags, name == "creat" or "O_TRUNC" in flags
            return Call(name="open", path=below[0], descriptor=result, appends=appends, truncates=truncates)
        case "mkdir" | "mkdirat":
            return Call(name="mkdir", path=below[0])
        case "unlink" | "unlinkat" | "rmdir":
            return Call(name="unlink", path=below[0])
        case "rename" | "renameat" | "renameat2" if len(below) == 2:
            return Call(name="rename", path=below[0], other=below[1])
        case "symlink" | "symlinkat":
            target = next(argument.data for argument in arguments if argument.data is not None)
            return Call(name="symlink", path=below[-1], other=target.decode())
        case _:
            raise ValueError(f"this call is not understood: {line[:300]}")


_SOCKETS = frozenset(SOCKET_CALLS.split(","))
_BY_FOLDER = frozenset(("openat", "unlinkat", "renameat", "renameat2", "mkdirat", "linkat", "symlinkat"))


def _decode_socket(name: str, arguments: list[_Argument], result: int) -> Call:
    data = b"".join(argument.data for argument in arguments if argument.data is not None)
    kind = "send" if name in _SENDS else "receive"
    return Call(name=kind, path=arguments[0].path, descriptor=arguments[0].descriptor, data=data[:result])


def _decode_descriptor(
    name: str, first: _Argument, arguments: list[_Argument], result: int, prefix: str
) -> Call | None:
    path, descriptor = first.path[len(prefix) + 1 :], first.descriptor
    match name:
        case "write" | "pwrite64":
            data = arguments[1].data
            assert data is not None
            offset = int(arguments[3].word) if name == "pwrite64" else -1
            return Call(name="write", path=path, descriptor=descriptor, offset=offset, data=data[:result])
        case "fsync" | "fdatasync":
            return Call(name="sync", path=path)
        case "lseek":
            return Call(name="seek", path=path, descriptor=descriptor, offset=result)
        case "ftruncate":
            return Call(name="truncate", path=path, offset=int(arguments[1].word))
        case _:
            raise ValueError(f"{name} on {first.path} is not understood")


def _paths(arguments: list[_Argument]) -> Iterator[str]:
    base = ""
    for argument in arguments:
        if argument.data is not None:
            name = os.fsdecode(argument.data)
            yield os.path.normpath(name if name.startswith("/") else f"{base}/{name}")
        elif argument.path:
            base = argument.path
