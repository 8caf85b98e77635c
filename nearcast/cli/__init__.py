"""The one console script. A subcommand is imported when it runs; the table below is all that `--help` needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click

from nearcast import __version__
from nearcast.errors import MeshError


class Entry(NamedTuple):
    """One subcommand: the module that offers it as `command`, and the line that `--help` shows."""

    module: str
    help: str


SUBCOMMANDS: Mapping[str, Entry] = {
    "demo": Entry("nearcast.cli.demo", "Run the whole mesh on this machine: real models, real traffic."),
    "up": Entry("nearcast.cli.up", "Run a whole mesh on this machine as one process tree."),
    "edge": Entry("nearcast.cli.edge", "Run an edge node."),
    "cloud": Entry("nearcast.cli.cloud", "Run a cloud core."),
    "router": Entry("nearcast.cli.router", "Run a stand-alone router."),
    "sync": Entry("nearcast.cli.sync", "Run the controller: repository, rollouts, enrolment."),
    "infer": Entry("nearcast.cli.infer", "Send one request."),
    "bench": Entry("nearcast.cli.bench", "Load a target and print its percentiles."),
    "bundle": Entry("nearcast.cli.bundle", "Create, verify and inspect model bundles."),
    "models": Entry("nearcast.cli.models", "List the models of a store or of a running node."),
    "keys": Entry("nearcast.cli.keys", "Make and renew the keys of a mesh."),
    "push": Entry("nearcast.cli.push", "Sign a bundle and publish it to a channel."),
    "rollout": Entry("nearcast.cli.rollout", "Start, watch, promote or stop a rollout."),
    "rollback": Entry("nearcast.cli.rollback", "Return a model to an earlier version."),
    "export": Entry("nearcast.cli.export", "Copy what a channel wants to a folder or a stick."),
    "import": Entry("nearcast.cli.import_", "Take such a copy into a node's store or a mirror."),
    "nodes": Entry("nearcast.cli.nodes", "List, invite and remove nodes."),
    "devices": Entry("nearcast.cli.devices", "Invite, list and revoke the devices of a tenant; join as one."),
    "route": Entry("nearcast.cli.route", "Explain where a request would go."),
    "simulate": Entry("nearcast.cli.simulate", "Simulate a fleet on virtual time."),
    "doctor": Entry("nearcast.cli.doctor", "Find what is wrong between a node, its broker and its devices."),
    "dlq": Entry("nearcast.cli.dlq", "List what a node gave up, and have it tried again."),
    "config": Entry("nearcast.cli.config", "Show settings and where they come from."),
}
"""All subcommands, in the order of `--help`."""

PACKAGES = ("nearcast", "router", "edge_node", "cloud_core", "model_sync", "simulations")
"""What every installation holds; what else a command imports comes with an extra."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports only the one that runs.

    It is also the place where an error becomes one line on stderr and a numbered exit code.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry] = SUBCOMMANDS, **options: Any) -> None:
        super().__init__(*args, **options)
        self._entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        command = import_module(entry.module).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}.command is no click.Command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self._entries[name].help) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        try:
            return super().main(args, *rest, **options)
        except MeshError as error:
            from nearcast.runtime.exit import exit_code

            click.echo(f"nearcast: {error.message}", err=True)
            sys.exit(exit_code(error))
        except ModuleNotFoundError as error:
            if not error.name or error.name.partition(".")[0] in PACKAGES:
                raise
            from nearcast.runtime.exit import ExitCode

            click.echo(
                f"nearcast: {error.name} is not installed; install what the role needs: "
                "pip install 'nearcast[edge]', [cloud], [router] or [sync]; [demo] has everything.",
                err=True,
            )
            sys.exit(ExitCode.CONFIG)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nearcast")
def main() -> None:
    """Answer inference requests next to the device, and fall back to the cloud when needed.

    Exit codes: 0 fine, 1 a check said no, 2 or 64 wrong usage, 65 not trusted, 66 not found, 69 not reachable,
    70 internal error, 75 not now (in conflict, busy, too late), 77 not allowed, 78 wrong configuration,
    130 interrupted.
    """
