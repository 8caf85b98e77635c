#!/usr/bin/env python
"""The agent's own metadata path behind the command line that the upstream suite of TUF clients drives.

`make conformance SUITE=…` runs that suite. What is tested is what the agent uses: its connection, its clock floor, its
durable files, its bounds. Only the loop around them is this file's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

from tuf.api import exceptions
from tuf.api.metadata import TargetFile  # type: ignore[attr-defined]

from model_sync.agent.metadata import DurableUpdater, TufFetcher, open_updater
from model_sync.agent.sources.http_source import HttpSource
from nearcast.clock import SYSTEM_CLOCK
from nearcast.clock_store import ClockFloor
from nearcast.durable import make_folder, write_file
from nearcast.errors import MeshError

TIMEOUT_S = 10.0
YEAR_S = 365 * 86_400
PRIVATE_FOLDER = ".agent"
"""What the agent keeps beside the metadata: the pinned root and the floor of the clock."""


def init(metadata: Path, trusted_root: Path) -> None:
    """Pin a root."""
    make_folder(metadata / PRIVATE_FOLDER)
    shutil.copyfile(trusted_root, metadata / PRIVATE_FOLDER / "root.json")
    shutil.copyfile(trusted_root, metadata / "root.json")


def refresh(metadata: Path, url: str) -> DurableUpdater:
    """Check the repository as the agent does."""
    # Some of the suite's repositories were recorded, and are to be read, in years before this code was built.
    built = int(SYSTEM_CLOCK.wall()) - YEAR_S
    clock = ClockFloor(metadata / PRIVATE_FOLDER / "clock.json", SYSTEM_CLOCK, build_time=built)
    reading = clock.read()
    if not reading.trusted:
        raise SystemExit(reading.reason)
    root = (metadata / PRIVATE_FOLDER / "root.json").read_bytes()
    fetcher = TufFetcher(open_source(url), timeout_s=TIMEOUT_S)
    updater = open_updater(metadata, fetcher, url, root, now=reading.now)
    updater.refresh()
    clock.verified(reading)
    return updater


def download(updater: DurableUpdater, url: str, name: str, folder: Path) -> None:
    """Fetch one target unless it is here."""
    target = updater.get_targetinfo(name)
    if target is None:
        raise SystemExit(f"{name} is no target of the repository")
    place = folder / quote(name, safe="")
    if is_here(target, place):
        return
    directory, slash, file_name = name.rpartition("/")
    digest = next(iter(target.hashes.values()))
    consistent = updater._trusted_set.root.consistent_snapshot
    path = f"{directory}{slash}{digest}.{file_name}" if consistent else name
    data = open_source(url).read(path, size_bytes_max=target.length, timeout_s=TIMEOUT_S)
    target.verify_length_and_hashes(data)
    write_file(place, data)


def is_here(target: TargetFile, place: Path) -> bool:
    """Whether the very content lies there already."""
    try:
        target.verify_length_and_hashes(place.read_bytes())
    except (OSError, exceptions.LengthOrHashMismatchError):
        return False
    return True


def open_source(url: str) -> HttpSource:
    """A connection as the agent makes it."""
    return HttpSource(url, tls=None, connect_timeout_s=TIMEOUT_S)


def main() -> int:
    """Run one command of the suite; returns its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    given = parser.parse_args()
    try:
        if given.command == "init":
            init(given.metadata_dir, given.trusted_root)
            return 0
        updater = refresh(given.metadata_dir, given.metadata_url)
        for name in given.target_name if given.command == "download" else []:
            download(updater, given.target_base_url, name, given.target_dir)
    except (exceptions.RepositoryError, exceptions.DownloadError, MeshError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
