"""`nearcast models tune`: measure a model on this machine, so that its node runs it as fast as this machine can."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearcast.cli.listing import json_option, print_json, print_table

if TYPE_CHECKING:
    from nearcast.serving.profile import Point, Profile
    from nearcast.store import Store


@click.command(short_help="Measure a model on this machine: threads and batch sizes.")
@click.argument("model")
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="A node's store folder.",
)
@click.option("--release", type=click.IntRange(min=1), help="Default: the stable one.")
@click.option(
    "--concurrency", type=click.IntRange(1, 64), help="Runs at the same time, as on the node. Default: its default."
)
@click.option("--time", "time_s", type=click.FloatRange(0.1, 600), default=30.0, show_default=True, help="Seconds.")
@click.option("--tenant-keys", type=click.Path(path_type=Path, file_okay=False), help="Keys that open sealed versions.")
@json_option
def tune(
    model: str,
    store: Path,
    release: int | None,
    concurrency: int | None,
    time_s: float,
    tenant_keys: Path | None,
    as_json: bool,
) -> None:
    """Measure MODEL with every number of threads, then every batch size, and keep the profile beside the store.

    The node uses it the next time it loads that version. Measure on a machine that is otherwise as busy as it will be.
    """
    import msgspec

    from nearcast.serving.limits import HostLimits
    from nearcast.serving.tuning import Profiles, measure
    from nearcast.store import Store
    from nearcast.store.contents import Contents

    versions = Store(store)
    number = release or _stable(versions, model)
    contents = Contents(versions.manifest(model, number), versions.folder(model, number), tenant_keys=tenant_keys)
    profile = measure(
        contents,
        concurrency=concurrency or HostLimits().slots,
        time_s_max=time_s,
        progress=None if as_json else _say,
    )
    kept = Profiles.beside(store)
    kept.keep(contents.manifest, profile)
    if as_json:
        print_json({**msgspec.to_builtins(profile), "choice": msgspec.to_builtins(profile.choose())})
    else:
        _print(profile)
        click.echo(f"kept in {kept.folder}")


def _stable(versions: Store, model: str) -> int:
    from nearcast.errors import Code, MeshError

    pointer = versions.pointer(model) if model in versions.models() else None
    if pointer is None or pointer.stable is None:
        known = ", ".join(versions.models()) or "none"
        raise MeshError(Code.MODEL_NOT_FOUND, f"{model} has no stable release in this store; it holds: {known}.")
    return pointer.stable


def _say(point: Point) -> None:
    click.echo(f"{point.threads} threads, {point.rows} rows: {point.p50_us:.0f} us", err=True)


def _print(profile: Profile) -> None:
    choice = profile.choose()
    counts = ["threads", "rows", "p50 µs", "p95 µs", "rows/s"]
    rows = [
        [
            str(point.threads),
            str(point.rows),
            f"{point.p50_us:.0f}",
            f"{point.p95_us:.0f}",
            f"{point.rows_per_s:.0f}",
            "chosen" if (point.threads, point.rows) == (choice.threads, choice.rows_max) else "",
        ]
        for point in profile.points
    ]
    print_table([*counts, ""], rows, right=counts)
    click.echo(f"{profile.engine} {profile.engine_version} on {profile.processor}, {profile.concurrency} runs at once")
