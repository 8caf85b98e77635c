"""`nearcast bundle diff`: what an update from one bundle to another would cost, codec by codec."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nearcast.cli.listing import json_option, print_json, print_table

if TYPE_CHECKING:
    from nearcast.store.manifest import File

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
COLUMNS = ["file", "codec", "bytes", "percent", "encode s", "apply ms", "best"]


@click.command("diff", short_help="Show what an update from one bundle to another would cost.")
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("--tenant-keys", type=FOLDER, help="Folder with the keys that open sealed bundles.")
@click.option(
    "--budget", "budget_s", type=click.FloatRange(min=0), default=600.0, show_default=True, help="Seconds for one file."
)
@json_option
def diff(old: Path, new: Path, tenant_keys: Path | None, budget_s: float, as_json: bool) -> None:
    """Try every codec from the files of OLD to those of NEW, as a push does; the best is marked.

    Percent is of the new file. A node that has OLD fetches the best; one that has nothing fetches zstd.
    """
    rows = list(compare(old, new, tenant_keys, budget_s))
    if as_json:
        print_json(rows)
        return
    print_table(COLUMNS, [_cells(row) for row in rows], right=COLUMNS[2:6])


def compare(old: Path, new: Path, tenant_keys: Path | None, budget_s: float) -> Iterator[dict[str, Any]]:
    """One row per file and codec; of each file exactly one is the best."""
    from model_sync.publisher.bundle import read_bundle
    from model_sync.publisher.deltas import find_bases
    from nearcast.store.sealing import TenantKeys, open_file

    keys = TenantKeys.load(tenant_keys)
    earlier, manifest = read_bundle(old)[0], read_bundle(new)[0]
    for entry in manifest.files:
        if any(entry.sha256 == base.sha256 for base in earlier.files):
            yield _row(entry, "unchanged", 0, is_best=True)
            continue
        content = open_file(manifest, entry.path, (new / entry.path).read_bytes(), keys)
        bases = [
            open_file(earlier, base.path, (old / base.path).read_bytes(), keys)
            for _, base in find_bases(entry, manifest, [earlier])
        ]
        yield from _compare_file(entry, content, bases, budget_s)


def _compare_file(entry: File, content: bytes, bases: list[bytes], budget_s: float) -> Iterator[dict[str, Any]]:
    from model_sync.delta.search import best, search

    whole = list(search(None, content, clock=time.perf_counter, budget_s=budget_s))
    full = next((tried for tried in whole if tried.codec == "zstd" and tried.payload is not None), None)
    full_size_bytes = min(len(content), len(full.payload)) if full and full.payload is not None else len(content)
    from_base = [tried for base in bases for tried in search(base, content, clock=time.perf_counter, budget_s=budget_s)]
    chosen = best(from_base, full_size_bytes) or full
    for tried in (*([full] if full else []), *from_base):
        size_bytes = None if tried.payload is None else len(tried.payload)
        yield _row(
            entry, tried.codec, size_bytes, encode_s=tried.encode_s, decode_s=tried.decode_s, reason=tried.reason,
            is_best=tried is chosen,
        )  # fmt: skip


def _row(
    entry: File,
    codec: str,
    size_bytes: int | None,
    *,
    encode_s: float = 0.0,
    decode_s: float = 0.0,
    reason: str = "",
    is_best: bool = False,
) -> dict[str, Any]:
    return {
        "file": entry.path,
        "codec": codec,
        "size_bytes": size_bytes,
        "percent": None if size_bytes is None else round(100 * size_bytes / max(1, entry.size_bytes), 3),
        "encode_s": round(encode_s, 3),
        "apply_ms": round(decode_s * 1e3, 1),
        "reason": reason,
        "best": is_best,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    if row["size_bytes"] is None:
        return [row["file"], row["codec"], "-", "-", "-", "-", row["reason"]]
    figures = [str(row["size_bytes"]), f"{row['percent']:.2f}", f"{row['encode_s']:.2f}", f"{row['apply_ms']:.1f}"]
    return [row["file"], row["codec"], *figures, "*" if row["best"] else ""]
