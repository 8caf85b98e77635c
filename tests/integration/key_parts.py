"""A mesh with its controller process, the commands of docs/keys.md, and a node that looks at what comes of them."""

from __future__ import annotations

import json
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from tuf.api.metadata import Metadata

from model_sync.agent.config import AgentConfig, AgentLimits
from model_sync.publisher.control_client import connect
from model_sync.publisher.push import Pushed, push
from nearcast.cli import main
from tests.integration.agent_parts import MODEL
from tests.tiny_models import affine_model, write_version

READY_S = 20.0
PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def page_commands(title: str) -> list[str]:
    """The commands of one section of docs/keys.md, line by line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page_sections()[title], flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def titles_with_commands() -> set[str]:
    """The sections that tell the reader to run something."""
    return {title for title, text in page_sections().items() if "```sh" in text}


def page_sections() -> dict[str, str]:
    """The text of each section by its title."""
    sections = re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE)
    return {title: text for title, _, text in (section.partition("\n") for section in sections)}


def run_command(line: str, words: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run one command in this process; answers exit code and what it printed."""
    for name, value in (words or {}).items():
        line = line.replace(f"${name}", value)
    program, *arguments = shlex.split(line)
    assert program == "nearcast", line
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def run_page(title: str, words: Mapping[str, str] | None = None, *, codes: Mapping[int, int] | None = None) -> str:
    """Run a section's commands; each must end with 0, or with the code that `codes` gives by position."""
    printed = ""
    for position, line in enumerate(page_commands(title)):
        code, output = run_command(line, words)
        assert code == (codes or {}).get(position, 0), (line, output)
        printed += output
    return printed


class Controller:
    """The sync process of a home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "nearcast", "sync", "--home", str(self.home / "sync")]
        self.process = subprocess.Popen(
            [*command, "--set=telemetry.level=error"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], READY_S)[0], "the sync process did not get ready"
        assert json.loads(self.process.stdout.readline())["ready"] == "sync"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(READY_S)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def operator(self) -> Path:
        return self.home / "operator"

    @property
    def repository(self) -> Path:
        return self.home / "sync" / "repository"

    def bundle(self, release: int) -> Path:
        folder = self.home / f"bundle-{release}"
        x = np.ones((1, 4), np.float32)
        golden = (({"x": x}, {"y": x * np.float32(release)}),)
        if not folder.exists():
            write_version(folder, affine_model(float(release)), name=MODEL, release=release, golden=golden)
        return folder

    def push(self, release: int, *, share: float | None = None) -> Pushed:
        with connect(self.home) as client:
            return push(self.bundle(release), client, self.operator, channel="stable", share=share, delta_budget_s=0)

    def roll(self, action: str, **fields: object) -> int:
        with connect(self.home) as client:
            wish = {"channel": "stable", "model": MODEL, "action": action, **fields}
            return int(client.call("POST", "/v1/rollouts", wish)["intent"])

    def keyids(self, role: str) -> list[str]:
        code, output = run_command(f"nearcast keys list --home {self.home} --json")
        assert code == 0, output
        return [key["id"] for row in json.loads(output) if row["role"] == role for key in row["keys"]]


class Node:
    """Folders of one node: the root it joined with, its store, and the mirror it reads."""

    def __init__(self, folder: Path, repository: Path, root: bytes) -> None:
        self.folder = folder
        self.repository = repository
        identity = folder / "identity"
        identity.mkdir(parents=True, exist_ok=True)
        (identity / "root.json").write_bytes(root)

    @property
    def config(self) -> AgentConfig:
        """An agent that checks when it starts and when it is told to."""
        return AgentConfig(
            repository=str(self.repository),
            identity=str(self.folder / "identity"),
            store=str(self.folder / "store"),
            poll_s=600.0,
            probation_s=0.1,
            limits=AgentLimits(backoff_base_s=0.05, backoff_cap_s=0.2),
        )

    def copy(self, folder: Path, repository: Path | None = None) -> Node:
        shutil.copytree(self.folder, folder, symlinks=True)
        root = (folder / "identity" / "root.json").read_bytes()
        return Node(folder, repository or self.repository, root)


def newest(repository: Path, name: str) -> Metadata:
    """The newest version of a role's file."""
    folder = repository / "metadata"
    if name == "timestamp":
        return Metadata.from_file(str(folder / "timestamp.json"))
    versions = [int(path.name.partition(".")[0]) for path in folder.glob(f"*.{name}.json")]
    return Metadata.from_file(str(folder / f"{max(versions)}.{name}.json"))
