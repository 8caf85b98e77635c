"""`nearcast dlq` on a ledger as a node leaves it."""

from __future__ import annotations

import asyncio
import json

import pytest
from click.testing import CliRunner

from edge_node.mqtt.admission import Request
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.records import Reply
from edge_node.mqtt.limits import LedgerLimits
from nearcast.cli import main
from nearcast.runtime import ExitCode

REPLY = "nc/v1/local/cam/down/reply/digits"
PAYLOAD = bytes(range(256)) * 2


@pytest.fixture
def data_dir(tmp_path):
    """A node's folder with one dead request."""

    async def bury():
        ledger = Ledger(tmp_path / "inbox.sqlite", boot="b", limits=LedgerLimits())
        await ledger.open(0.0)
        request = Request(
            tenant="local", device="cam", model="digits", correlation=b"c", reply_topic=REPLY, arrived=1.0,
            content_type="application/octet-stream", accept="application/octet-stream", deadline=9.0, digest=b"d",
        )  # fmt: skip
        row = (await ledger.accept(request, PAYLOAD)).id
        await ledger.finish(row, Reply(topic=REPLY, user={"status": "500"}, expires=9.0), 2.0, buried="it crashed")
        await ledger.close()

    asyncio.run(bury())
    return tmp_path


def run(data_dir, *arguments, code=ExitCode.OK):
    result = CliRunner().invoke(main, ["dlq", *arguments, "--set", f"data_dir={data_dir}"])
    assert result.exit_code == code, result.output
    return result.output


def test_a_letter_is_listed_shown_and_marked(data_dir, tmp_path):
    (listed,) = json.loads(run(data_dir, "list", "--json"))["letters"]
    assert (listed["device"], listed["name"], listed["reason"]) == ("cam", "digits", "it crashed")
    assert "it crashed" in run(data_dir, "list")
    assert "digits" in run(data_dir, "show", str(listed["id"]), "--output", str(tmp_path / "payload"))
    assert (tmp_path / "payload").read_bytes() == PAYLOAD
    assert json.loads(run(data_dir, "replay", "--all", "--json")) == {"replay": [listed["id"]]}
    (listed,) = json.loads(run(data_dir, "list", "--json"))["letters"]
    assert listed["replay"] is True


def test_what_is_not_there_is_said(data_dir, tmp_path):
    assert "no dead letter 77" in run(data_dir, "show", "77", code=ExitCode.NOT_FOUND)
    assert "no dead letter 77" in run(data_dir, "replay", "77", code=ExitCode.NOT_FOUND)
    assert "either IDs or --all" in run(data_dir, "replay", code=2)
    assert "no ledger" in run(tmp_path / "elsewhere", "list", code=ExitCode.USAGE)
    assert "no ledger" in run(data_dir, "list", "--tenant", "acme", code=ExitCode.USAGE)
