"""`nearcast push`: sign a bundle and publish it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from nearcast.cli.listing import json_option, print_json
from nearcast.cli.operator_options import channel_option, operator_options, reason_option
from nearcast.runtime.exit import ExitCode

if TYPE_CHECKING:
    from model_sync.publisher.outcome import Outcome
    from model_sync.publisher.push import Pushed


EXIT_CODES = """\b
Exit codes for a pipeline:
  0   published; with --wait: every node has obeyed, none refused it
  1   --wait: a node refused the release, or its trial was stopped
  65  the bundle or the controller is not to be trusted
  69  the controller cannot be reached
  75  --wait: not every node reported in time; or a conflict: raise the release number
  77  no key, or a licence that is not allowed
All others: nearcast --help.
"""


@click.command(epilog=EXIT_CODES)
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@channel_option
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Try it on this share of the requests.")
@click.option(
    "--wave",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the nodes that try it.",
)
@click.option("--team", default="", help="Whose key signs; default: the only one there is.")
@click.option(
    "--draft",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that collects signatures if the team needs several. Default: HOME/draft.",
)
@click.option(
    "--tenant-keys",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with the keys that open sealed bundles.",
)
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), help="Wait so many seconds for the nodes.")
@click.option("--rollback-ok", type=int, multiple=True, help="Allow a return to this release too; repeatable.")
@reason_option
@operator_options
@json_option
def command(
    bundle: Path,
    channel: str,
    share: float | None,
    wave: float,
    team: str,
    draft: Path | None,
    tenant_keys: Path | None,
    wait_s: float | None,
    rollback_ok: tuple[int, ...],
    reason: str,
    home: Path,
    control: str,
    as_json: bool,
) -> None:
    """Check BUNDLE, sign it with the team's key, upload it and point a channel to it.

    Without --share it becomes the stable release; with it, a candidate beside the stable one.
    With --wait the command ends once every node that follows the channel has said what became of it.
    """
    from model_sync.publisher.control_client import connect
    from model_sync.publisher.outcome import wait_for_nodes
    from model_sync.publisher.push import push

    with connect(home, control) as client, UploadBar() as bar:
        pushed = push(
            bundle,
            client,
            home / "operator",
            channel=channel,
            team=team,
            share=share,
            wave=wave,
            draft=draft,
            tenant_keys=tenant_keys,
            rollback_ok=rollback_ok,
            reason=reason,
            meter=bar,
        )
        outcome = None if wait_s is None else wait_for_nodes(client, pushed, wait_s)
    if as_json:
        print_json(asdict(pushed) | ({} if outcome is None else {"outcome": asdict(outcome)}))
    else:
        _tell(pushed, share, outcome)
    if outcome is not None and outcome.result != "holding":
        sys.exit(ExitCode.TRY_AGAIN if outcome.result == "waiting" else ExitCode.FAILED)


def _tell(pushed: Pushed, share: float | None, outcome: Outcome | None) -> None:
    what = f"candidate for {share:.0%} of the requests" if pushed.action == "candidate" else "stable"
    known = "" if pushed.is_published else " (published before)"
    click.echo(f"{pushed.model} {pushed.release} is {what} in channel {pushed.channel}{known}, intent {pushed.intent}.")
    if outcome is None:
        return
    why = f": {'; '.join(outcome.reasons)}" if outcome.reasons else ""
    counts = f"{outcome.holding} of {outcome.nodes} nodes hold it, {outcome.refused} refused it"
    said = {
        "holding": f"{counts}.",
        "refused": f"{counts}{why}.",
        "stopped": f"It is not picked any more{why}.",
        "waiting": f"Not every node has reported in time; {counts}{why}.",
    }
    click.echo(said[outcome.result])


class UploadBar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> UploadBar:  # noqa: PYI034 (final in practice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, size_bytes: int, what: str = "uploading") -> None:
        """Something starts."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if not size_bytes or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("upload", total=size_bytes)
        self._progress.start()

    def advance(self, size_bytes: int) -> None:
        """So many more bytes are sent."""
        if self._progress is not None:
            self._progress.advance(self._task, size_bytes)
