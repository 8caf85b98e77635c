"""One round of an agent without a node around it: what a copy of the repository says is installed into a store.

It is the agent itself, with its journal, checks and gates. It stops where a version is to be tried under real requests:
the node's own agent goes on from there when it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_sync.agent.app import ROOT_FILE, Agent
from model_sync.agent.config import AgentConfig
from model_sync.agent.status import AgentStatus, ModelStatus, read_status
from model_sync.replica.state import State
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError

RESTING = (State.IDLE, State.PROBATION, State.HOLD)
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Serial of the repository's state that was verified, and what became of each model."""

    serial: int
    models: Mapping[str, ModelStatus]


async def import_once(
    folder: str, store: Path, root: bytes, *, channel: str, node: str, timeout_s: float = 3600.0
) -> Imported:
    """Install from the repository in `folder` what `channel` wants into `store`.

    Args:
        folder: a folder or any other address of a repository.
        store: of a node whose agent does not run.
        root: content of the pinned root.json.
        channel: whose document to follow.
        node: name of the node, which the waves of a rollout look at.
        timeout_s: for all of it.

    Raises:
        MeshError: CONFLICT if an agent works on the store; UNTRUSTED or UNAVAILABLE as a check; UNAVAILABLE too if it
            takes longer than `timeout_s`.
    """
    config = AgentConfig(
        node=node,
        repository=folder,
        store=str(store),
        channel=channel,
        poll_s=timeout_s,
        hint_wait_s=0.0,
        probation_s=timeout_s,
    )
    write_file(store / ".agent" / ROOT_FILE, root)  # where an agent without an identity looks
    agent = Agent(config)
    try:
        await agent.start()
        if not await agent.check():
            raise MeshError(Code.UNTRUSTED, _said(store).error)
        async with asyncio.timeout(timeout_s):
            while any(model.state not in RESTING for model in _said(store).models.values()):  # noqa: ASYNC110 (a file)
                await asyncio.sleep(POLL_S)
        said = _said(store)
        return Imported(serial=said.serial, models=said.models)
    except TimeoutError:
        raise MeshError(Code.UNAVAILABLE, f"The import took longer than {timeout_s:g} s; start it again.") from None
    finally:
        await agent.close(orderly=True)


def _said(store: Path) -> AgentStatus:
    """The status that the agent writes after every step."""
    status = read_status(store)
    if status is None:
        raise MeshError(Code.INTERNAL, f"The agent could not write its status into {store}.")
    return status
