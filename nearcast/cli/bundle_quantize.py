"""`nearcast bundle quantize`: int8 variants, kept only where they pay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import home_option

if TYPE_CHECKING:
    from model_sync.publisher.quantize import Report


@click.command(short_help="Make an int8 variant, and keep it only if it is faster here.")
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The new bundle folder.")
@click.option("--release", type=click.IntRange(min=2), help="Of the variant. Default: the next one.")
@click.option("--semver", default="", help="Of the variant. Default: the bundle's with +int8.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Examples: an .npz with arrays in_<input> and perhaps label. Default: the golden vectors.",
)
@click.option("--rows", type=click.IntRange(1, 256), default=1, show_default=True, help="The batch that is timed.")
@home_option
@json_option
def quantize(
    bundle: Path,
    out: Path,
    release: int | None,
    semver: str,
    data: Path | None,
    rows: int,
    home: Path,
    as_json: bool,
) -> None:
    """Quantise BUNDLE in several ways and write the fastest as a bundle of its own.

    Half of the examples calibrate, half judge. A way counts only if it is measurably faster on this machine and loses
    no more than the bundle's quality_tolerance. Exit code 1 if none does; then nothing is written.
    """
    import msgspec

    from model_sync.publisher.bundle import verify_bundle
    from model_sync.publisher.licence import read_policy
    from model_sync.publisher.quantize import Variant, quantize_bundle, read_examples

    manifest = verify_bundle(bundle)
    report = quantize_bundle(
        bundle,
        manifest,
        out,
        Variant(release=release or manifest.release + 1, semver=semver or f"{manifest.semver}+int8"),
        examples=None if data is None else read_examples(data, manifest),
        rows=rows,
        policy=read_policy(home / "operator"),
        progress=lambda way: click.echo(f"trying {way}", err=True),
    )
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        _print(report, out)
    sys.exit(0 if report.kept else 1)


def _print(report: Report, out: Path) -> None:
    rows = [["original", f"{report.size_bytes / 1024:.0f} KiB", "1.00", "", ""]]
    for trial in report.trials:
        measured = ["", "", ""]
        if trial.size_bytes:
            measured = [f"{trial.size_bytes / 1024:.0f} KiB", f"{trial.time_ratio:.2f}", f"{trial.loss:.4f}"]
        rows.append(
            [trial.way, *measured, "kept" if trial.way == report.kept else trial.verdict or "slower than the kept"]
        )
    print_table(["way", "size", "time", f"{report.measure} lost", ""], rows, right=["size", "time"])
    if report.kept:
        click.echo(f"{report.model}: the int8 variant is in {out}; push it like any bundle.")
    else:
        click.echo(f"{report.model} release {report.release} stays as it is: no int8 variant pays on this machine.")
