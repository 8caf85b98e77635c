"""`nearcast import`: take what was carried here."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from nearcast.cli.export import print_exported
from nearcast.cli.listing import json_option, print_json, print_table, printable
from nearcast.cli.operator_options import channel_option
from nearcast.cli.repository_options import identity_options, read_root, root_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@channel_option
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Store of a node that is stopped.")
@click.option("--mirror", type=click.Path(path_type=Path, file_okay=False), help="Folder that nodes read as a mirror.")
@click.option("--node", default="", help="With --store: name of the node; default: the one of --identity.")
@root_option
@identity_options
@json_option
def command(
    folder: Path,
    channel: str,
    store: Path | None,
    mirror: Path | None,
    node: str,
    root: Path | None,
    identity: Path | None,
    home: Path,
    as_json: bool,
) -> None:
    """Take a copy that `nearcast export` made, verified again, into a node's --store or a --mirror folder.

    A running node needs no import: name the folder in its `agent.mirrors`.
    """
    if (store is None) == (mirror is None):
        raise click.UsageError("Give either --store FOLDER or --mirror FOLDER.")
    pinned = read_root(root, identity, home)
    if mirror is not None:
        _into_mirror(folder, mirror, pinned, channel, as_json=as_json)
    elif store is not None:
        _into_store(folder, store, pinned, channel, node or _node_name(identity), as_json=as_json)


def _into_mirror(folder: Path, mirror: Path, root: bytes, channel: str, *, as_json: bool) -> None:
    from model_sync.agent.sources.folder_source import FolderSource
    from model_sync.publisher.export import Export

    exported = Export(FolderSource(folder), root, mirror, channel=channel, now=time.time()).run()
    print_exported(exported, mirror, as_json=as_json)


def _into_store(folder: Path, store: Path, root: bytes, channel: str, node: str, *, as_json: bool) -> None:
    import asyncio

    from model_sync.agent.import_once import import_once

    imported = asyncio.run(import_once(str(folder.absolute()), store, root, channel=channel, node=node))
    rows = [_row(model, status) for model, status in sorted(imported.models.items())]
    if as_json:
        print_json({"serial": imported.serial, "models": rows})
    else:
        cells = [[row["model"], str(row["stable"] or ""), str(row["candidate"] or ""), row["note"]] for row in rows]
        print_table(["model", "stable", "candidate", ""], [[printable(cell) for cell in line] for line in cells])
    sys.exit(1 if any(row["error"] for row in rows) else 0)


def _row(model: str, status: Any) -> dict[str, Any]:
    trial = f"release {status.goal} is tried when the node runs" if status.state == "PROBATION" else ""
    error = status.error
    return {
        "model": model,
        "stable": status.stable,
        "candidate": status.candidate,
        "error": error,
        "note": error or trial,
    }


def _node_name(identity: Path | None) -> str:
    from nearcast.identity import load_identity

    if identity is not None and (identity / "node.pem").exists():
        return load_identity(identity).name
    return "import"
