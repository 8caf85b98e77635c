"""`nearcast bundle`: make and check what is pushed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nearcast.cli import bundle_diff
from nearcast.cli.listing import json_option, print_json, print_table

if TYPE_CHECKING:
    from nearcast.store.manifest import Manifest

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def command() -> None:
    """Create, verify, compare and inspect model bundles."""


command.add_command(bundle_diff.command)


@command.command()
@click.option("--spec", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=True, help="spec.toml")
@click.option("--out", type=FOLDER, required=True, help="The new bundle folder.")
@click.option("--source", type=FOLDER, help="Where the files lie. Default: beside the specification.")
def create(spec: Path, out: Path, source: Path | None) -> None:
    """Make a bundle of the files that a specification names. The same files always make the same bytes."""
    from model_sync.publisher.bundle import create_bundle, read_spec

    manifest = create_bundle(read_spec(spec), source or spec.parent, out)
    click.echo(f"{manifest.name} release {manifest.release} ({manifest.semver}): {_size(manifest)} in {out}")


@command.command(short_help="Check every byte of a bundle and let it pass its gate.")
@click.argument("folder", type=FOLDER)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check every byte of a bundle, load it in a child process and run its golden vectors."""
    import msgspec

    from model_sync.publisher.bundle import pass_gate, verify_bundle

    manifest = verify_bundle(folder)
    measured = pass_gate(folder)
    if as_json:
        print_json({"name": manifest.name, "release": manifest.release, "gate": msgspec.to_builtins(measured)})
    else:
        click.echo(f"{manifest.name} release {manifest.release} is whole and passes its gate.")
        click.echo(f"golden vectors: {measured.vectors}, p50 {measured.p50_us:g} us, loaded in {measured.load_ms:g} ms")


@command.command()
@click.argument("folder", type=FOLDER)
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Show what a bundle says about itself."""
    import msgspec

    from model_sync.publisher.bundle import read_bundle

    manifest, data = read_bundle(folder)
    if as_json:
        click.echo(data.decode(), nl=False)
        return
    shown = {
        "model": f"{manifest.name} release {manifest.release} ({manifest.semver}, {manifest.variant})",
        "engine": f"{manifest.engine}, {manifest.model_file}",
        "state": manifest.stateful,
        "quality": f"{manifest.quality:.4g}",
        "latency budget": f"{manifest.latency_budget_ms:g} ms",
        "golden vectors": str(len(manifest.golden)),
        "rollback to": ", ".join(map(str, manifest.rollback_ok)) or "as the push lists",
        "licence": manifest.licence,
        "description": manifest.description,
        "properties": msgspec.json.encode(manifest.properties).decode() if manifest.properties else "",
    }
    print_table(["what", "value"], [[key, value] for key, value in shown.items() if value])
    click.echo()
    tensors = [("input", tensor) for tensor in manifest.inputs] + [("output", tensor) for tensor in manifest.outputs]
    print_table(
        ["tensor", "name", "datatype", "shape", "batch axis"],
        [[kind, t.name, t.datatype, str(list(t.shape)), _axis(t.batch_axis)] for kind, t in tensors],
        empty="",
    )
    click.echo()
    print_table(
        ["file", "bytes", "sha256"], [[f.path, str(f.size_bytes), f.sha256] for f in manifest.files], empty="No files."
    )


def _axis(axis: int | None) -> str:
    return "-" if axis is None else str(axis)


def _size(manifest: Manifest) -> str:
    return f"{sum(entry.size_bytes for entry in manifest.files) / 1e6:.2f} MB in {len(manifest.files)} files"
