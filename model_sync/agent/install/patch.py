"""The process that applies one delta: a payload is a stranger's word, so it meets the decoders here and nowhere else.

`python -m model_sync.agent.install.patch` reads a `PatchOrder` from stdin and writes what was made to stdout: the
signed file, or for `measures` the ranges that it lacks. It exits with 0, or with 1 and a `Refusal` on stderr.
`model_sync.agent.install.patch_child` starts it. Plain bytes of a sealed version are in its memory alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from model_sync.agent.install.bases import Bases
from model_sync.delta.index import Way
from model_sync.delta.ways import apply_way, find_lacking
from nearcast.errors import Code, MeshError
from nearcast.serving.confinement import confine
from nearcast.store import Manifest, Store

NOTES_SIZE_BYTES_MAX = 64 * 1024
"""Of everything that the process writes but its stdout."""


class PatchOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to make.

    Attributes:
        store: folder of the store, with the releases that the way starts from.
        manifest: of the new version, verified.
        path: which of its files.
        way: how; `payload` is the file that was fetched for it.
        lacking: (start, size in bytes) of parts of the new file; their bytes lie in a row in the file `parts`.
        tenant_keys: folder with the tenants' keys, for sealed versions; "" = none.
        measures: only say what is lacking.
        cpu_s_max, address_space_bytes_max: what the process may use.
    """

    store: str
    manifest: Manifest
    path: str
    way: Way
    payload: str
    lacking: tuple[tuple[int, int], ...] = ()
    parts: str = ""
    tenant_keys: str = ""
    measures: bool = False
    cpu_s_max: int
    address_space_bytes_max: int


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no result."""

    code: Code
    message: str


def make(order: PatchOrder) -> bytes:
    """The signed bytes of the file, sealed if the version is.

    Raises:
        MeshError: if the way does not lead there.
        OSError, KeyError, MemoryError: if the bases or parts are not here, or all of it is too large.
    """
    payload = Path(order.payload).read_bytes()
    bases = Bases(Store(Path(order.store)), order.manifest.name).of(order.way)
    entry = order.manifest.file(order.path)
    if order.manifest.encryption is not None:
        from model_sync.delta.sealed import apply_sealed_way
        from nearcast.store.sealing import TenantKeys, open_file

        keys = TenantKeys.load(Path(order.tenant_keys) if order.tenant_keys else None)
        plain = b"".join(open_file(base.manifest, base.entry.path, base.read(), keys) for base in bases)
        data_key = keys.unwrap(order.manifest.encryption)
        return apply_sealed_way(order.way, payload, plain, manifest=order.manifest, path=order.path, data_key=data_key)
    old = b"".join(base.read() for base in bases)
    if order.measures:
        return msgspec.json.encode(find_lacking(order.way, payload, old, size_bytes=entry.size_bytes))
    return apply_way(
        order.way, payload, old, size_bytes=entry.size_bytes, sha256=entry.sha256, read_range=_read_parts(order)
    )


def _read_parts(order: PatchOrder) -> Callable[[int, int], bytes]:
    """Reads the parts in the order in which they were found to be lacking, which is that of asking."""
    left = list(reversed(order.lacking))
    at = 0

    def read(start: int, size_bytes: int) -> bytes:
        nonlocal at
        if not left or left.pop() != (start, size_bytes):
            raise MeshError(Code.UNTRUSTED, "Refused a delta: the files that it starts from have changed.")
        with Path(order.parts).open("rb") as file:
            file.seek(at)
            at += size_bytes
            return file.read(size_bytes)

    return read


def main() -> int:
    """Entry of the process."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=PatchOrder)
    confine(
        cpu_s_max=order.cpu_s_max,
        address_space_bytes_max=order.address_space_bytes_max,
        file_size_bytes_max=NOTES_SIZE_BYTES_MAX,
    )
    try:
        sys.stdout.buffer.write(make(order))
        sys.stdout.buffer.flush()
    except MeshError as error:
        refusal = Refusal(code=error.code, message=error.message)
    except (OSError, KeyError, MemoryError) as error:
        message = f"The delta to {order.path} cannot be applied here: {type(error).__name__}."
        refusal = Refusal(code=Code.UNTRUSTED, message=message)
    else:
        return 0
    sys.stderr.buffer.write(msgspec.json.encode(refusal))
    return 1


if __name__ == "__main__":
    sys.exit(main())
