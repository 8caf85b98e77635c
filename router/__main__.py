"""`python -m router --config FILE [--join TOKEN] [--set section.key=value]`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from nearcast.config import load_config
from nearcast.errors import MeshError
from nearcast.identity import join, read_token
from nearcast.runtime import exit_code, run
from router.config import RouterConfig


def run_router(*, config: Path | None, overrides: Sequence[str] = (), token: str = "") -> int:
    """Run a router process to its end; answers its exit code. `token`, as on the command line, joins a mesh first.

    Raises:
        MeshError: if the configuration or the token cannot be used.
    """

    def read() -> RouterConfig:
        return load_config(RouterConfig, path=config, overrides=overrides).value

    loaded = read()
    folder = Path(loaded.identity) if loaded.identity else Path(loaded.data_dir) / "identity"
    if token and not (folder / "node.pem").exists():
        folder.mkdir(parents=True, exist_ok=True)
        join(read_token(token), folder)
    from router.app import DRAIN_S, serve

    # Half a second more than the listeners need, so that the agent can end, too.
    return run(lambda shutdown: serve(loaded, shutdown, read), drain_s=DRAIN_S + 0.5)


def main() -> int:
    """Run the router that the command line describes."""
    parser = ArgumentParser(prog="python -m router", description="Run a stand-alone router.")
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument(
        "--join",
        default="",
        metavar="TOKEN",
        help="join a mesh first: @FILE with the token, - for standard input, or the token itself",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    options = parser.parse_args()
    try:
        return run_router(config=options.config, overrides=options.set, token=options.join)
    except MeshError as error:
        sys.stderr.write(f"router: {error.message}\n")
        return int(exit_code(error))


if __name__ == "__main__":
    sys.exit(main())
