"""`nearcast route replay`: a router's log of decisions through the same code once more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nearcast.cli.listing import json_option, print_json, print_table, printable
from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from router.policy import PolicyConfig
    from simulations.replay import Answer, ReplayResult

CHANGES_SHOWN_MAX = 20


@click.command("replay", short_help="Make logged decisions once more, also with other settings.")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="policy.NAME=VALUE", help="What if the policy had this?")
@json_option
def replay(files: tuple[Path, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Make the decisions of FILES (or of all logs in a folder) once more and compare them.

    A router writes them to DATA/decisions if its configuration says `[decisions] enabled = true`. Without --set the
    exit status is 1 unless every decision is the logged one.
    """
    from simulations.replay import read, replay

    paths = [path for each in files for path in (each.glob("*.decisions") if each.is_dir() else (each,))]
    if not paths:
        raise MeshError(Code.INVALID_REQUEST, "There are no *.decisions here; name a router's DATA/decisions.")
    changes = [_parse(text) for text in settings]
    result = replay(read(paths), (lambda config: _change(config, dict(changes))) if changes else None)
    if as_json:
        print_json(_as_json(result))
    else:
        _print(result, what_if=bool(changes))
    if not (result.identical or changes):
        raise SystemExit(1)


def _parse(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("policy."):
        raise MeshError(Code.INVALID_REQUEST, f"{text!r} is no setting; it looks like policy.tail_weight=0.5.")
    return name.removeprefix("policy."), value


def _change(config: PolicyConfig, changes: dict[str, str]) -> PolicyConfig:
    import msgspec

    from router.policy import PolicyConfig

    try:
        return msgspec.convert({**msgspec.to_builtins(config), **changes}, PolicyConfig, strict=False)
    except msgspec.ValidationError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The policy cannot be set so: {error}.") from error


def _as_json(result: ReplayResult) -> dict[str, Any]:
    first = result.first
    return {
        "records": result.records,
        "decisions": dict(result.decisions),
        "different": dict(result.different),
        "first": None
        if first is None
        else {
            "record": first.record,
            "call": first.call,
            "now": first.now,
            "logged": _say(first.logged),
            "replayed": _say(first.replayed),
        },
        "changes": [{"from": a, "to": b, "count": n} for (a, b), n in result.changes.most_common()],
        "gaps": [{"where": where, "lost": lost} for where, lost in result.gaps],
        "skipped": result.skipped,
    }


def _print(result: ReplayResult, *, what_if: bool) -> None:
    asked, different = result.decisions.total(), result.different.total()
    calls = ", ".join(f"{count} {call}" for call, count in result.decisions.most_common())
    click.echo(f"{result.records} records, {asked} decisions ({calls})")
    for where, lost in result.gaps:
        click.echo(f"gap {where}: {lost or 'an unknown number of'} records are missing; goes on from a checkpoint")
    if result.skipped:
        click.echo(f"{result.skipped} records were skipped: they belong to attempts from before a begin")
    if not asked:
        click.echo("nothing to compare: the log holds no decision after its first begin or checkpoint")
    elif not different:
        click.echo("all identical" if not what_if else "nothing would change")
    else:
        click.echo(f"{different} ({different / asked:.2%}) {'would change' if what_if else 'differ'}")
        rows = [[a, b, str(n)] for (a, b), n in result.changes.most_common(CHANGES_SHOWN_MAX)]
        print_table(["logged", "replayed", "times"], rows, right=["times"])
    first = result.first
    if first is not None:
        click.echo(f"first: record {first.record}, {first.call} at {first.now:.6f} s")
        click.echo(printable(f"  logged   {_say(first.logged)}"))
        click.echo(printable(f"  replayed {_say(first.replayed)}"))


def _say(answer: Answer) -> str:
    return repr(answer)
