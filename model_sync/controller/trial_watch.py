"""Watches the trials of all channels: takes reports in, stops what has failed, and keeps the book of changes."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

from model_sync.controller.bodies import RolloutRequest
from model_sync.controller.config import SyncLimits
from model_sync.controller.home import ENROLMENT_FILE
from model_sync.controller.lineage import Change, Lineage
from model_sync.controller.reports import Reports, Stop, read_report
from model_sync.repository.layout import parse_models_path
from model_sync.repository.repository import Repository
from model_sync.rollout.document import ChannelDocument, Rollout
from model_sync.rollout.trial import TrialLimits
from nearcast.clock import Clock
from nearcast.store.manifest import is_model_name
from nearcast.telemetry import get_logger

CONTROLLER = "controller"
"""Who changes a channel when no operator does."""
_log = get_logger("model_sync.controller")


class TrialWatch:
    """The trials of one repository.

    Args:
        repository: whose channels to watch.
        trial: when to stop.
        limits: bounds of the reports.
        clock: monotonic for reports, wall for the book.
        change: decides, signs and announces a change in somebody's name.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        trial: TrialLimits,
        limits: SyncLimits,
        clock: Clock,
        change: Callable[[RolloutRequest, str], Awaitable[object]],
    ) -> None:
        self._repository = repository
        self._trial = trial
        self._limits = limits
        self._clock = clock
        self._change = change
        self._reports = Reports(trial, limits)
        self._lineage = Lineage(repository.folder.parent / ENROLMENT_FILE)
        self._followed: dict[str, int] = {}

    def take(self, node: str, data: bytes, signature: str, certificate: bytes) -> bool:
        """Take a node's report; false if it is a repeated or an older one.

        Raises:
            MeshError: as `read_report` and `Reports.take`.
        """
        report = read_report(data, node, signature, certificate)
        self.follow(report.channel)
        return self._reports.take(self._clock.monotonic(), report, len(data))

    def forget(self, node: str) -> None:
        """The node was removed from the mesh."""
        self._reports.forget(node)

    def describe(self, document: ChannelDocument, model: str, members: Iterable[str]) -> dict[str, Any]:
        """A channel as its nodes report it, all models or one; `members` are the names that should report."""
        self.follow(document.channel)
        reporting = self._reports.names(self._clock.monotonic())
        return {
            "channel": document.channel,
            "intent": document.intent,
            "auto_stop": self._trial.auto_stop,
            "reporting": len(reporting),
            "silent": sorted(set(members) - reporting),
            "rollouts": [
                self._reports.describe(document.channel, rollout)
                for rollout in document.rollouts
                if model in ("", rollout.model)
            ],
        }

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Judge for as long as the application lives."""
        del app
        task = asyncio.get_running_loop().create_task(self._judge_forever())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def follow(self, channel: str) -> None:
        """Learn of a channel's trials; reads only when anything was signed since the last time."""
        serial = self._repository.serial
        if self._followed.get(channel) == serial or not is_model_name(channel):
            return
        document = self._repository.channel(channel)
        if document is not None:
            self._followed[channel] = serial
            self._reports.follow(channel, document)

    async def history(self, model: str) -> list[Change]:
        """The newest changes of a model, or of all."""
        return await asyncio.to_thread(self._lineage.read, model)

    async def record_published(self, paths: Iterable[str], by: str) -> None:
        """Write down that releases were published; by their target paths."""
        changes = []
        for path in paths:
            model, release = parse_models_path(path)
            changes.append(self._make_change(by, "", model, "publish", release))
        await self._record(changes)

    async def record(self, wanted: RolloutRequest, by: str, before: Rollout | None, intent: int) -> None:
        """Write down what was just signed, and watch it. `before`: what the channel said of the model."""
        tried = before.candidate.release if before is not None and before.candidate is not None else None
        stable = before.stable.release if before is not None else None
        release = wanted.release or tried
        change = self._make_change(
            by, wanted.channel, wanted.model, wanted.action, release,
            # A rollback to what is stable takes back the trial.
            replaced=tried if wanted.action == "rollback" and release == stable else stable,
            reason=wanted.reason, intent=intent,
        )  # fmt: skip
        await self._record([change])
        self.follow(wanted.channel)

    async def _judge_forever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.judge_s)
            for channel in list(self._followed):
                self.follow(channel)
            for stop in self._reports.judge():
                _log.warning(
                    "trial_failed", channel=stop.channel, model=stop.model, release=stop.release, reason=stop.reason
                )
                if self._trial.auto_stop:
                    await self._stop(stop)

    async def _stop(self, stop: Stop) -> None:
        reason = f"Stopped by the controller: {stop.reason}."
        wanted = RolloutRequest(
            channel=stop.channel, model=stop.model, action="stop", release=stop.release, reason=reason[:1024]
        )
        try:
            await self._change(wanted, CONTROLLER)
        except Exception:  # noqa: BLE001 - an operator was quicker, or the disk is full: the next report asks again
            _log.exception("trial_not_stopped", channel=stop.channel, model=stop.model)

    async def _record(self, changes: list[Change]) -> None:
        try:
            await asyncio.to_thread(self._lineage.append, *changes)
        except sqlite3.Error:
            # What was signed stands, and names who and when by itself.
            _log.exception("lineage_not_written")

    def _make_change(
        self, by: str, channel: str, model: str, action: str, release: int | None, **fields: Any
    ) -> Change:
        published = self._repository.find(model, release) if release is not None else None
        return Change(
            at=round(self._clock.wall(), 3), by=by, channel=channel, model=model, action=action, release=release,
            manifest_sha256=published.manifest_sha256 if published is not None else None,
            data_sha256=published.manifest.data_sha256 if published is not None else None, **fields,
        )  # fmt: skip
