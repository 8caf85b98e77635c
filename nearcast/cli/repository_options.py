"""What the commands share that read a repository as a node does: where it is, and which root to trust."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nearcast.cli.operator_options import home_option

if TYPE_CHECKING:
    from model_sync.agent.sources.source import Source

CONNECT_TIMEOUT_S = 10.0
F = TypeVar("F", bound=Callable[..., Any])


def identity_options(function: F) -> F:
    """Add `--identity` and `--home`: as whom, and so in which mesh."""
    identity = click.option(
        "--identity",
        type=click.Path(path_type=Path, file_okay=False),
        help="A node's identity folder; default: the operator of --home.",
    )
    return identity(home_option(function))


def root_option(function: F) -> F:
    """Add `--root`."""
    root = click.Path(path_type=Path, dir_okay=False)
    return click.option("--root", type=root, help="The pinned root.json; default: the identity's.")(function)


def from_option(function: F) -> F:
    """Add `--from`."""
    return click.option(
        "--from",
        "repository",
        default="",
        metavar="URL",
        help="http(s)://, s3://, file:// or a folder. Default: the mesh's own repository.",
    )(function)


def read_root(root: Path | None, identity: Path | None, home: Path) -> bytes:
    """The pinned root: the one given, the node's, or the operator's.

    Raises:
        MeshError: UNAUTHENTICATED if there is none.
    """
    from nearcast.errors import Code, MeshError

    path = root or (identity / "root.json" if identity is not None else home / "operator" / "root.json")
    try:
        return path.read_bytes()
    except OSError as error:
        raise MeshError(
            Code.UNAUTHENTICATED,
            f"{path} cannot be read ({error.strerror}); give --root FILE or --identity FOLDER: the root to trust.",
        ) from error


def open_source(repository: str, *, identity: Path | None, home: Path) -> Source:
    """The repository that the options name.

    Only the controller of our own mesh sees our certificate; any other place is outside, and untrusted anyway.
    """
    import ssl

    from model_sync.agent.sources.addresses import make_source
    from model_sync.publisher.control_client import find_control
    from nearcast.identity import client_tls, load_identity

    folder = identity if identity is not None else home / "operator" / "identity"
    url = repository or f"{find_control(folder)}/repository"

    def tls() -> ssl.SSLContext:
        if repository:
            return ssl.create_default_context()
        known = load_identity(folder)
        return client_tls(known, ca=known.ca, alpn=("http/1.1",))

    roles = () if repository else ("sync",)
    timeout_s = CONNECT_TIMEOUT_S
    return make_source(url, tls=tls, connect_timeout_s=timeout_s, timeout_s=timeout_s, roles=roles)
