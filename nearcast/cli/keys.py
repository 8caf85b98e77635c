"""`nearcast keys`: the signing keys of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nearcast.cli.listing import json_option, print_json, print_table
from nearcast.cli.operator_options import home_option, operator_options

if TYPE_CHECKING:
    from model_sync.publisher.rotation import Outcome, Wish

F = TypeVar("F", bound=Callable[..., Any])
KEY_HELP = "a key file, pkcs11:token=NAME;object=LABEL, or another signer's URI#PUBLIC.pem"


def change_options(function: F) -> F:
    """What every change of keys takes: where else private keys are, and where a draft goes."""
    options = (
        click.option(
            "--sign-with", multiple=True, metavar="KEY", help="A private key to sign with, beside those known."
        ),
        click.option("--draft", type=click.Path(path_type=Path), help="Folder for a draft. Default: HOME/draft."),
        click.option("--threshold", type=click.IntRange(1), help="How many keys must sign from now on."),
    )
    for option in options:
        function = option(function)
    return operator_options(function)


def withdraw_option(function: F) -> F:
    """Add `--withdraw`."""
    return click.option(
        "--withdraw", multiple=True, metavar="MODEL@RELEASE", help="A release the team vouches for no longer."
    )(function)


@click.group()
def command() -> None:
    """Make, list, replace and renew the keys of a mesh. KEY is a file or the URI of a token."""


@command.command(short_help="Make all keys of a new mesh.")
@home_option
@click.option("--team", default="core", show_default=True, help="The team that may publish models.")
@click.option("--root-key", multiple=True, metavar="KEY", help=f"Root key: {KEY_HELP}.")
@click.option("--root-threshold", default=1, show_default=True, help="How many root keys must sign.")
@click.option("--targets-key", multiple=True, metavar="KEY", help="Targets key, in the same forms.")
@click.option("--targets-threshold", default=1, show_default=True, help="How many targets keys must sign.")
@click.option("--models-key", multiple=True, metavar="KEY", help="The team's key, in the same forms.")
@click.option("--models-threshold", default=1, show_default=True, help="How many of the team's keys must sign.")
@click.option(
    "--root-version",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="First root; above the last of a mesh that this one replaces.",
)
def init(home: Path, team: str, root_version: int, **wanted: Any) -> None:
    """Make all keys of a new mesh: HOME/operator (offline keys) and HOME/sync (what the controller needs).

    Without --root-key there are two root keys, of which either can sign; one of them is a backup to be put away.
    """
    from model_sync.publisher.keys import RoleKeys, init_keys

    roles = {
        role: RoleKeys(keys=wanted[f"{role}_key"], threshold=wanted[f"{role}_threshold"])
        for role in ("root", "targets", "models")
    }
    init_keys(home, team, roles, root_version=root_version)
    click.echo(f"{home / 'operator'}  root, targets and models-{team}: keep it on your own machine, never on a server")
    if (home / "backup").exists():
        click.echo(f"{home / 'backup'}  the second root key: copy it to a stick, put that away, delete the folder here")
    click.echo(f"{home / 'sync'}  online key, certificate authorities and an empty repository: for the controller")
    click.echo(f"Next: nearcast sync --home {home / 'sync'}")


@command.command("new", short_help="Make one key in a file.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def new(file: Path) -> None:
    """Make a private key in FILE and its public half beside it, which others may have."""
    from model_sync.publisher.keys import new_key, public_path

    key = new_key(file)
    click.echo(f"{file}  private, id {key.keyid[:8]}: it stays with its holder")
    click.echo(f"{public_path(file)}  public: give it to who runs `nearcast keys`")


@command.command("list", short_help="List roles, thresholds, keys and expiries.")
@operator_options
@json_option
def list_keys(home: Path, control: str, *, as_json: bool) -> None:
    """List each role: how many of which keys must sign, where a private key was last seen, when the role expires."""
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.key_listing import list_roles

    with connect(home, control) as client:
        rows = list_roles(client, home / "operator")
    if as_json:
        print_json(rows)
        return
    pairs = [(row, f"{row['threshold']} of {len(row['keys'])}", key) for row in rows for key in row["keys"]]
    cells = [
        [row["role"], needed, key["id"][:8], key["place"], key["seen"][:10], row["expires"][:10]]
        for row, needed, key in pairs
    ]
    print_table(["ROLE", "THRESHOLD", "KEY", "PRIVATE HALF", "SEEN", "EXPIRES"], cells)


@command.command(short_help="Add a key to a role, or a new team.")
@click.argument("role")
@click.option("--key", "keys", multiple=True, metavar="KEY", help=f"The key to add: {KEY_HELP}.")
@click.option("--models", multiple=True, metavar="PATTERN", help="Models that a new team may publish. Default: any.")
@change_options
def add(role: str, keys: tuple[str, ...], models: tuple[str, ...], **options: Any) -> None:
    """Add a key to ROLE: root, targets or models-TEAM. A new team gets a key made here, unless --key names one."""
    from model_sync.publisher.rotation import Wish, add_keys

    paths = tuple(f"models/{pattern}/*" for pattern in models)
    _change(add_keys, Wish(role=role, keys=keys, threshold=options["threshold"], paths=paths), options)


@command.command(short_help="Replace a key of a role.")
@click.argument("role")
@click.option("--old", multiple=True, metavar="ID", help="The key that goes; needed if the role has several.")
@click.option(
    "--key", "keys", multiple=True, metavar="KEY", help=f"The key that comes: {KEY_HELP}. Default: a new file."
)
@withdraw_option
@change_options
def rotate(role: str, old: tuple[str, ...], keys: tuple[str, ...], withdraw: tuple[str, ...], **options: Any) -> None:
    """Replace a key of ROLE: root, targets, models-TEAM, or online (the controller's). It signs anew what must hold."""
    from model_sync.publisher.rotation import Wish, rotate_keys

    wish = Wish(role=role, keys=keys, drop=old, threshold=options["threshold"], withdraw=_releases(withdraw))
    _change(rotate_keys, wish, options)


@command.command(short_help="Take a key away from a role.")
@click.argument("role")
@click.option("--key", "keys", multiple=True, required=True, metavar="ID", help="Id of the key, or its beginning.")
@withdraw_option
@change_options
def revoke(role: str, keys: tuple[str, ...], withdraw: tuple[str, ...], **options: Any) -> None:
    """Take a key away from ROLE without another in its place; as many as must sign have to remain."""
    from model_sync.publisher.rotation import Wish, revoke_keys

    wish = Wish(role=role, drop=keys, threshold=options["threshold"], withdraw=_releases(withdraw))
    _change(revoke_keys, wish, options)


@command.command(short_help="Add your signature to a draft.")
@click.argument("draft", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--key", "keys", multiple=True, metavar="KEY", help=f"Your key: {KEY_HELP}. Default: those of HOME/operator."
)
@home_option
def sign(draft: Path, keys: tuple[str, ...], home: Path) -> None:
    """Show what DRAFT changes and sign it; needs neither the controller nor its network."""
    from model_sync.publisher.drafts import co_sign, describe, waiting

    change = co_sign(draft, keys, home / "operator")
    for name, role in change.items():
        for line in describe(name, role, home / "operator" / "tuf"):
            click.echo(line)
        open_ids = waiting(role)
        signed = ", ".join(keyid[:8] for keyid in role.signatures if keyid not in open_ids)
        still = ", ".join(keyid[:8] for keyid in open_ids)
        click.echo(f"  signed by {signed or 'nobody'}; may still sign: {still or 'nobody'}")


@command.command(short_help="Publish a draft that has its signatures.")
@click.argument("draft", type=click.Path(path_type=Path, file_okay=False, exists=True))
@operator_options
def submit(draft: Path, home: Path, control: str) -> None:
    """Send DRAFT to the controller, which checks every signature again; the folder is removed once it is published."""
    import shutil

    from model_sync.publisher.control_client import connect
    from model_sync.publisher.drafts import read_draft, submit
    from model_sync.publisher.roles import read_roles

    change = read_draft(draft)
    with connect(home, control) as client:
        serial = submit(change, read_roles(client, home / "operator"), client, home / "operator")
    shutil.rmtree(draft)
    click.echo(f"{', '.join(change)} published, serial {serial}.")


@command.command(short_help="Replace an operator's expired certificate.")
@home_option
def renew(home: Path) -> None:
    """Give the operator of HOME a new certificate after the old one expired; needs HOME/sync on this machine."""
    from model_sync.publisher.keys import renew_operator

    identity = renew_operator(home)
    click.echo(f"{identity.uri} has a new certificate for 7 days; commands renew it while it holds.")


@command.command(short_help="Sign the offline roles for another term.")
@operator_options
def extend(home: Path, control: str) -> None:
    """Sign root, targets and models roles for another term; due before 90 days without a push are over."""
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.rotation import renew_roles

    with connect(home, control) as client:
        expiries = renew_roles(client, home / "operator")
    for role, expires in expiries.items():
        click.echo(f"{role} holds until {expires:%Y-%m-%d}")


def _change(function: Callable[..., Outcome], wish: Wish, options: dict[str, Any]) -> None:
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.rotation import require_done

    home: Path = options["home"]
    draft = options["draft"] or home / "draft"
    with connect(home, options["control"]) as client:
        outcome = function(client, home / "operator", wish, signers=options["sign_with"], draft=draft)
    require_done(outcome, draft)
    click.echo(f"{', '.join(outcome.changed)} published, serial {outcome.serial}.")


def _releases(texts: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    pairs = [text.partition("@") for text in texts]
    for model, _, number in pairs:
        if not model or not number.isdecimal():
            raise click.BadParameter(f"{model!r} must look like digits@7.", param_hint="--withdraw")
    return tuple((model, int(number)) for model, _, number in pairs)
