"""`nearcast bundle`: make and check what is pushed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nearcast.cli.bundle_diff import diff
from nearcast.cli.bundle_quantize import quantize
from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import home_option

if TYPE_CHECKING:
    from nearcast.store.manifest import Manifest, Tensor

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
F = TypeVar("F", bound=Callable[..., Any])


def tenant_keys_option(function: F) -> F:
    """Add `--tenant-keys`."""
    return click.option("--tenant-keys", type=FOLDER, help="Folder with the keys that open sealed bundles.")(function)


@click.group()
def command() -> None:
    """Create, verify, compare, quantise and inspect model bundles."""


command.add_command(diff)
command.add_command(quantize)


@command.command()
@click.option("--spec", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=True, help="spec.toml")
@click.option("--out", type=FOLDER, required=True, help="The new bundle folder.")
@click.option("--source", type=FOLDER, help="Where the files lie. Default: beside the specification.")
@click.option("--seal-with", type=FILE, help="Seal every file with this tenant's key; see: nearcast bundle key.")
@click.option("--tenant", default="", help="Whose key it is; goes with --seal-with.")
@home_option
def create(spec: Path, out: Path, source: Path | None, seal_with: Path | None, tenant: str, home: Path) -> None:
    """Make a bundle of the files that a specification names. The same files always make the same bytes.

    The licence must be one that the operator's policy allows: `licences_allowed` in HOME/operator/policy.toml.
    """
    from model_sync.publisher.bundle import Seal, create_bundle, read_spec
    from model_sync.publisher.licence import read_policy
    from nearcast.store.manifest import is_model_name
    from nearcast.store.sealing import read_key

    if (seal_with is None) is not (tenant == ""):
        raise click.UsageError("--seal-with and --tenant go together.")
    if tenant and not is_model_name(tenant):
        raise click.UsageError("A tenant's name has lower-case letters, digits, _ and -, at most 64 characters.")
    seal = None if seal_with is None else Seal(tenant=tenant, key=read_key(seal_with))
    policy = read_policy(home / "operator")
    manifest = create_bundle(read_spec(spec), source or spec.parent, out, policy=policy, seal=seal)
    sealed = f", sealed for {tenant}" if seal else ""
    click.echo(f"{manifest.name} release {manifest.release} ({manifest.semver}): {_size(manifest)} in {out}{sealed}")


@command.command(short_help="Make a tenant's key.")
@click.argument("out", type=FILE)
def key(out: Path) -> None:
    """Write a new key of a tenant to OUT (`NAME.key`), for you alone.

    Bundles are sealed with it; the nodes that may open them hold a copy in their folder of tenant keys. Who loses it
    loses every bundle that is sealed with it: keep one copy off line.
    """
    from nearcast.store.sealing import make_key

    click.echo(f"{out}: key {make_key(out)}")


@command.command(short_help="Check every byte of a bundle and let it pass its gate.")
@click.argument("folder", type=FOLDER)
@tenant_keys_option
@json_option
def verify(folder: Path, tenant_keys: Path | None, as_json: bool) -> None:
    """Check every byte of a bundle, load it in a child process and run its golden vectors."""
    import msgspec

    from model_sync.publisher.bundle import check_sbom, pass_gate, verify_bundle

    manifest = verify_bundle(folder)
    check_sbom(folder, manifest, tenant_keys)
    measured = pass_gate(folder, tenant_keys)
    if as_json:
        print_json({"name": manifest.name, "release": manifest.release, "gate": msgspec.to_builtins(measured)})
    else:
        click.echo(f"{manifest.name} release {manifest.release} is whole and passes its gate.")
        click.echo(f"golden vectors: {measured.vectors}, p50 {measured.p50_us:g} us, loaded in {measured.load_ms:g} ms")


@command.command()
@click.argument("folder", type=FOLDER)
@tenant_keys_option
@json_option
def inspect(folder: Path, tenant_keys: Path | None, as_json: bool) -> None:
    """Show what a bundle says about itself. Of a sealed one the bill of materials is read with the tenant's key only.

    As JSON: the fields of the manifest, and beside them its digest, the size of all files, and the bill of materials.
    """
    import hashlib
    import json

    import msgspec

    from model_sync.publisher.bundle import read_bundle, read_sbom

    manifest, data = read_bundle(folder)
    sbom = read_sbom(folder, manifest, tenant_keys)
    if as_json:
        size_bytes = sum(entry.size_bytes for entry in manifest.files)
        more = {"manifest_sha256": hashlib.sha256(data).hexdigest(), "size_bytes": size_bytes, "sbom": sbom}
        print_json({**json.loads(data), **more})
        return
    shown = {
        "model": f"{manifest.name} release {manifest.release} ({manifest.semver}, {manifest.variant})",
        "engine": f"{manifest.engine}, {manifest.model_file}",
        "state": manifest.stateful,
        "quality": f"{manifest.quality:.4g}",
        "latency budget": f"{manifest.latency_budget_ms:g} ms",
        "size": _size(manifest),
        "golden vectors": str(len(manifest.golden))
        + (f" within {manifest.golden[0].atol:g}" if manifest.golden else ""),
        "rollback to": ", ".join(map(str, manifest.rollback_ok)) or "as the push lists",
        "licence": manifest.licence,
        "trained on": f"data {manifest.data_sha256}" if manifest.data_sha256 else "",
        "made from": f"release {manifest.parent}" if manifest.parent else "",
        "bill of materials": _bill(manifest, sbom),
        "encryption": _encryption(manifest),
        "description": manifest.description,
        "properties": msgspec.json.encode(manifest.properties).decode() if manifest.properties else "",
    }
    print_table(["what", "value"], [[key, value] for key, value in shown.items() if value])
    click.echo()
    _print_tensors("", manifest.inputs, manifest.outputs)
    _print_pipeline(manifest)
    click.echo()
    print_table(
        ["file", "bytes", "sha256"], [[f.path, str(f.size_bytes), f.sha256] for f in manifest.files], empty="No files."
    )


def _print_tensors(whose: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    tensors = [("input", tensor) for tensor in inputs] + [("output", tensor) for tensor in outputs]
    print_table(
        [f"{whose}tensor", "name", "datatype", "shape", "batch axis"],
        [[kind, t.name, t.datatype, str(list(t.shape)), _axis(t.batch_axis)] for kind, t in tensors],
        empty="",
    )


def _print_pipeline(manifest: Manifest) -> None:
    """The steps around the model, and the tensors that the model file itself has."""
    import msgspec

    pipeline = manifest.pipeline
    if pipeline is msgspec.UNSET:
        return
    click.echo()
    sides = (("before", pipeline.before), ("after", pipeline.after))
    steps = [(side, msgspec.to_builtins(step)) for side, each in sides for step in each]
    print_table(["when", "step", "settings"], [[side, step.pop("step"), _settings(step)] for side, step in steps])
    click.echo()
    _print_tensors("model's ", pipeline.inputs, pipeline.outputs)


def _settings(step: dict[str, Any]) -> str:
    shown = {key: f"{len(value)} grids" if key == "grids" else value for key, value in step.items()}
    return ", ".join(f"{key} {' '.join(map(str, v)) if isinstance(v, list | tuple) else v}" for key, v in shown.items())


def _bill(manifest: Manifest, sbom: dict[str, Any] | None) -> str:
    if manifest.sbom_file is None:
        return "none"
    if sbom is None:
        return f"{manifest.sbom_file}, sealed; --tenant-keys opens it"
    return f"{manifest.sbom_file}, CycloneDX {sbom.get('specVersion')}, {len(sbom.get('components', ()))} components"


def _encryption(manifest: Manifest) -> str:
    seal = manifest.encryption
    return "none" if seal is None else f"{seal.algorithm} for tenant {seal.tenant}, key {seal.key_id}"


def _axis(axis: int | None) -> str:
    return "-" if axis is None else str(axis)


def _size(manifest: Manifest) -> str:
    return f"{sum(entry.size_bytes for entry in manifest.files) / 1e6:.2f} MB in {len(manifest.files)} files"
