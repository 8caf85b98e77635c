"""The inbox against a real SQLite file: what is committed is there after a reopening, and bounds hold."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from edge_node.mqtt.admission import Request
from edge_node.mqtt.inbox import Inbox, Reply
from edge_node.mqtt.limits import MqttLimits
from nearcast.errors import Code, MeshError


def request_of(correlation=b"c", *, digest=b"d", device="cam", deadline=130.0):
    return Request(
        tenant="local",
        device=device,
        model="digits",
        correlation=correlation,
        reply_topic=f"nc/v1/local/{device}/down/reply/digits",
        content_type="application/octet-stream",
        accept="application/octet-stream",
        arrived=100.0,
        deadline=deadline,
        digest=digest,
    )


def reply_of(payload=b"answer"):
    return Reply(topic="nc/v1/local/cam/down/reply/digits", payload=payload, user={"status": "200"}, expires=130.0)


def make(path, *, boot="boot-1", **limits):
    return Inbox(path / "inbox.sqlite", boot=boot, limits=MqttLimits(**limits))


async def test_what_was_accepted_is_unanswered_after_a_restart(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    assert (await inbox.accept(request_of(), b"payload")).verdict == "accept"
    await inbox.close()
    for attempts in (1, 2):
        inbox = make(tmp_path)
        (unanswered,) = (await inbox.open(0.0)).requests
        await inbox.close()
        assert unanswered.request == request_of()
        assert (unanswered.payload, unanswered.attempts, unanswered.same_boot) == (b"payload", attempts, True)


async def test_verdicts_follow_the_state(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    first = await inbox.accept(request_of(), b"payload")
    assert (await inbox.accept(request_of(), b"payload")).verdict == "pending"
    assert (await inbox.accept(request_of(digest=b"other"), b"x")).verdict == "conflict"
    assert (await inbox.accept(request_of(device="other"), b"payload")).verdict == "accept"
    await inbox.finish(first.id, reply_of(), 101.0)
    again = await inbox.accept(request_of(deadline=200.0), b"payload")
    assert again.verdict == "replay"
    assert again.replay is not None
    assert (again.replay.reply.payload, again.replay.reply.expires, again.replay.dedup) == (b"answer", 200.0, True)
    assert (await inbox.accept(request_of(digest=b"other"), b"x")).verdict == "conflict"
    # A full node still answers what it knows, and takes nothing new.
    assert (await inbox.accept(request_of(), b"payload", has_room=False)).verdict == "replay"
    assert (await inbox.accept(request_of(b"new"), b"payload", has_room=False)).verdict == "full"
    assert (await inbox.accept(request_of(b"new"), b"payload")).verdict == "accept"
    await inbox.close()


async def test_an_answer_stays_in_the_outbox_until_the_broker_has_it(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    row = (await inbox.accept(request_of(), b"payload")).id
    await inbox.finish(row, reply_of(), 101.0)
    await inbox.close()

    inbox = make(tmp_path)
    backlog = await inbox.open(0.0)
    assert backlog.requests == []
    (outgoing,) = backlog.replies
    assert outgoing.reply == reply_of()
    await inbox.delivered([outgoing.id])
    await inbox.close()

    inbox = make(tmp_path, boot="boot-2")
    assert (await inbox.open(0.0)).replies == []
    assert (await inbox.accept(request_of(), b"payload")).verdict == "replay"
    await inbox.close()


async def test_another_boot_is_noticed(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    await inbox.accept(request_of(), b"payload")
    await inbox.close()
    inbox = make(tmp_path, boot="boot-2")
    (unanswered,) = (await inbox.open(0.0)).requests
    assert not unanswered.same_boot
    await inbox.close()


async def test_answers_are_forgotten_by_age_and_number_but_never_unsent_ones(tmp_path):
    inbox = make(tmp_path, replies_age_max_s=10.0, replies_max=3)
    await inbox.open(0.0)
    sent = []
    for number in range(5):
        row = (await inbox.accept(request_of(b"%d" % number), b"x")).id
        sent.append((await inbox.finish(row, reply_of(), 100.0 + number)).id)
    assert await inbox.prune(104.0) == 0
    await inbox.delivered(sent)
    assert await inbox.prune(104.0) == 2
    assert [(await inbox.accept(request_of(b"%d" % n), b"x")).verdict for n in (1, 2)] == ["accept", "replay"]
    await inbox.prune(113.5)
    assert (await inbox.accept(request_of(b"3"), b"x")).verdict == "accept"
    assert (await inbox.accept(request_of(b"4"), b"x")).verdict == "replay"
    await inbox.close()


async def test_waiting_operations_share_a_commit(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    verdicts = await asyncio.gather(*(inbox.accept(request_of(b"%d" % (n // 2)), b"x") for n in range(400)))
    assert [each.verdict for each in verdicts] == ["accept", "pending"] * 200
    await inbox.close()


async def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path):
    (tmp_path / "inbox.sqlite").write_bytes(b"this is no database" * 100)
    inbox = make(tmp_path)
    with pytest.raises(MeshError) as refused:
        await inbox.open(0.0)
    assert refused.value.code is Code.UNAVAILABLE


async def test_a_failing_disk_fails_the_request_and_nothing_else(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    blocker = sqlite3.connect(tmp_path / "inbox.sqlite")
    blocker.execute("DROP TABLE outbox")
    blocker.execute("ALTER TABLE inbox RENAME TO gone")
    with pytest.raises(MeshError) as refused:
        await inbox.accept(request_of(), b"x")
    assert refused.value.code is Code.UNAVAILABLE
    blocker.execute("ALTER TABLE gone RENAME TO inbox")
    blocker.close()
    assert (await inbox.accept(request_of(), b"x")).verdict == "accept"
    await inbox.close()


async def test_durability_is_asked_of_sqlite(tmp_path):
    inbox = make(tmp_path)
    await inbox.open(0.0)
    run = inbox._commits.submit
    assert await run(lambda c: c.execute("PRAGMA synchronous").fetchone()[0]) == 2
    assert await run(lambda c: c.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"
    await inbox.close()
    with pytest.raises(MeshError):
        await inbox.accept(request_of(), b"x")
