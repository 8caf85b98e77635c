"""`nearcast models`: what lies in a store, what a running node has in memory, and what is publicly known."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from nearcast.cli.listing import json_option, print_json, print_table, printable
from nearcast.cli.models_fetch import fetch
from nearcast.cli.models_tune import tune
from nearcast.cli.repository_options import from_option, identity_options, open_source


@click.group("models")
def command() -> None:
    """List the models of a store or of a running node; fetch known public ones."""


command.add_command(fetch)
command.add_command(tune)


@command.command("list", short_help="List models and their versions.")
@click.option("--store", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A node's store folder.")
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="A running node's control socket (host.sock)."
)
@json_option
def list_models(store: Path | None, socket_path: Path | None, as_json: bool) -> None:
    """List models and their versions, from the disk (--store) or from a running node (--socket)."""
    if (store is None) == (socket_path is None):
        raise click.UsageError("Give either --store FOLDER or --socket PATH.")
    rows = _from_store(store) if store is not None else _from_socket(Path(str(socket_path)))
    agent = _agent(store) if store is not None else None
    if as_json:
        print_json({"models": rows} | ({"agent": agent} if agent else {}))
    else:
        _print(rows, running=store is None)
        _print_agent(agent)


@command.command("fsck", short_help="Check what lies in a node's store, and repair it.")
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="A node's store folder; the node must be stopped.",
)
@click.option("--repair", is_flag=True, help="Fetch the bad chunks again, and clear away what the agent makes anew.")
@from_option
@identity_options
@json_option
def check_store(store: Path, repair: bool, repository: str, identity: Path | None, home: Path, as_json: bool) -> None:
    """Check every version, pointer, journal record and trusted role in a store. Exit code 1 if a fault is left."""
    from model_sync.agent.fsck import Check, locked
    from nearcast.store import Store

    with locked(store):
        source = open_source(repository, identity=identity, home=home) if repair else None
        report = Check(Store(store), source=source).run()
        if source is not None:
            source.close()
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(report) | {"is_whole": report.is_whole})
    else:
        rows = [[fault.path, fault.problem, fault.repair] for fault in report.faults]
        if rows:
            print_table(["path", "problem", "repair"], rows)
        click.echo(
            f"{report.models} models, {report.releases} releases, {report.files} files: "
            + ("all fine." if not rows else f"{len(rows)} faults, {sum(1 for row in rows if row[2])} repaired.")
        )
    sys.exit(0 if report.is_whole else 1)


def _from_store(root: Path) -> list[dict[str, Any]]:
    from nearcast.errors import MeshError
    from nearcast.store import Pointer, Store

    store = Store(root)
    rows: list[dict[str, Any]] = []
    for model in store.models():
        problem = ""
        try:
            pointer = store.pointer(model) or Pointer()
        except MeshError as error:
            pointer, problem = Pointer(), error.message
        versions = [_version(store, model, release, pointer) for release in store.releases(model)]
        rows.append({"model": model, "problem": problem, "share": pointer.share, "versions": versions})
    return rows


def _version(store: Any, model: str, release: int, pointer: Any) -> dict[str, Any]:
    from nearcast.errors import MeshError

    roles = [role for role in ("stable", "candidate", "last_good") if getattr(pointer, role) == release]
    row: dict[str, Any] = {"release": release, "roles": roles}
    try:
        manifest = store.manifest(model, release)
    except MeshError as error:
        return row | {"error": error.message}
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    return row | {"semver": manifest.semver, "engine": manifest.engine, "size_bytes": size_bytes}


def _agent(store: Path) -> dict[str, Any] | None:
    import msgspec

    from model_sync.agent.status import read_status

    status = read_status(store)
    return None if status is None else msgspec.to_builtins(status)


def _print_agent(agent: dict[str, Any] | None) -> None:
    """What the agent last said about its work; a node that does not follow its channel says here why."""
    if agent is None:
        return
    checked = f"{max(0.0, time.time() - agent['succeeded_at']):.0f} s ago" if agent["succeeded_at"] else "never"
    click.echo(f"\nagent: channel {agent['channel']}, serial {agent['serial']}, last verified {checked}")
    problems = [("agent", agent["error"] or agent["clock_note"])]
    for name, model in sorted(agent["models"].items()):
        refused = ", ".join(map(str, model["quarantined"]))
        problems += [(name, model["error"]), (name, refused and f"refused for good: release {refused}")]
    for name, problem in problems:
        if problem:
            click.echo(f"{name}: {printable(problem)}")


def _from_socket(path: Path) -> list[dict[str, Any]]:
    from nearcast.serving.control import ControlRequest, ask

    models: list[dict[str, Any]] = ask(path, ControlRequest(op="models"))["models"]
    return models


def _print(rows: list[dict[str, Any]], *, running: bool) -> None:
    counts = ["requests", "errors", "p50 µs", "p99 µs"]
    columns = ["model", "release", "semver"] + (["state", *counts] if running else ["serves as", "engine", "size"])
    cells = _running_cells if running else _stored_cells
    print_table(
        columns,
        [
            [row["model"], str(version["release"]), version.get("semver", ""), *cells(version)]
            for row in rows
            for version in row["versions"]
        ],
        empty="No versions are installed here.",
        right=["release", "size", *counts],
    )
    for row in rows:
        problems = [row.get("problem", ""), *(version.get("error", "") for version in row["versions"])]
        for problem in filter(None, problems):
            click.echo(f"{row['model']}: {printable(problem)}")


def _running_cells(version: dict[str, Any]) -> list[str]:
    counts = [str(version["requests"]), str(version["errors"])]
    return [version["state"], *counts, f"{version['p50_us']:.0f}", f"{version['p99_us']:.0f}"]


def _stored_cells(version: dict[str, Any]) -> list[str]:
    roles = ", ".join(role.replace("_", " ") for role in version["roles"])
    return [roles, version.get("engine", ""), f"{version.get('size_bytes', 0) / 1024:.0f} KiB"]
