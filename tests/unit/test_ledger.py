"""The ledger against a real SQLite file: what is committed is there after a reopening, and bounds hold."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tracemalloc

import pytest

from edge_node.mqtt.admission import Request
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.letters import list_letters, mark_for_replay, read_letter
from edge_node.mqtt.ledger.records import Event, Input, Intake, Reply
from edge_node.mqtt.limits import LedgerLimits
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


async def crash(ledger):
    """The file is closed as a kill would leave it."""
    await ledger._commits.close()


def make(path, *, boot="boot-1", links=("device",), **limits):
    return Ledger(path / "inbox.sqlite", boot=boot, links=links, limits=LedgerLimits(**limits))


async def test_what_was_accepted_is_unanswered_after_a_restart(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    assert (await ledger.accept(request_of(), b"payload")).verdict == "accept"
    await ledger.close()
    ledger = make(tmp_path)
    (unanswered,) = (await ledger.open(0.0)).requests
    await ledger.close()
    assert unanswered.request == request_of()
    assert (unanswered.payload, unanswered.attempts, unanswered.same_boot) == (b"payload", 0, True)


async def test_a_crash_counts_for_all_at_first_and_then_for_whom_it_was_trying(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    rows = [(await ledger.accept(request_of(name), b"x")).id for name in (b"innocent", b"poison")]
    for attempts in ([1, 1], [1, 2], [1, 3]):
        await crash(ledger)
        ledger = make(tmp_path)
        assert [each.attempts for each in (await ledger.open(0.0)).requests] == attempts
        await ledger.begin(rows[1])
    await ledger.close()
    ledger = make(tmp_path)
    assert [each.attempts for each in (await ledger.open(0.0)).requests] == [1, 3]
    await ledger.close()


async def test_verdicts_follow_the_state(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    first = await ledger.accept(request_of(), b"payload")
    assert (await ledger.accept(request_of(), b"payload")).verdict == "pending"
    assert (await ledger.accept(request_of(digest=b"other"), b"x")).verdict == "conflict"
    assert (await ledger.accept(request_of(device="other"), b"payload")).verdict == "accept"
    await ledger.finish(first.id, reply_of(), 101.0)
    again = await ledger.accept(request_of(deadline=200.0), b"payload")
    assert again.verdict == "replay"
    assert again.replay is not None
    assert (again.replay.message.payload, again.replay.expires) == (b"answer", 200.0)
    assert again.replay.message.user == {"status": "200", "dedup": "1"}
    assert (await ledger.accept(request_of(digest=b"other"), b"x")).verdict == "conflict"
    # A full node still answers what it knows, and takes nothing new.
    assert (await ledger.accept(request_of(), b"payload", has_room=False)).verdict == "replay"
    assert (await ledger.accept(request_of(b"new"), b"payload", has_room=False)).verdict == "full"
    assert (await ledger.accept(request_of(b"new"), b"payload")).verdict == "accept"
    await ledger.close()


async def test_an_answer_stays_in_the_outbox_until_the_broker_has_it(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    row = (await ledger.accept(request_of(), b"payload")).id
    await ledger.finish(row, reply_of(), 101.0)
    await ledger.close()

    ledger = make(tmp_path)
    recovered = await ledger.open(0.0)
    assert recovered.requests == []
    ((topic, last),) = recovered.outbox["device"].items()
    (outgoing,) = (await ledger.owed("device", 0, 10, 1 << 20)).rows
    assert (topic, last) == (reply_of().topic, outgoing.id)
    assert (outgoing.message.topic, outgoing.message.payload, outgoing.expires) == (topic, b"answer", 130.0)
    await ledger.delivered([outgoing.id])
    await ledger.close()

    ledger = make(tmp_path, boot="boot-2")
    assert (await ledger.open(0.0)).outbox == {"device": {}}
    assert (await ledger.accept(request_of(), b"payload")).verdict == "replay"
    await ledger.close()


async def test_another_boot_is_noticed(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    await ledger.accept(request_of(), b"payload")
    await ledger.close()
    ledger = make(tmp_path, boot="boot-2")
    (unanswered,) = (await ledger.open(0.0)).requests
    assert not unanswered.same_boot
    await ledger.close()


async def test_answers_are_forgotten_by_age_and_number_but_never_unsent_ones(tmp_path):
    ledger = make(tmp_path, replies_age_max_s=10.0, replies_max=3)
    await ledger.open(0.0)
    sent = []
    for number in range(5):
        row = (await ledger.accept(request_of(b"%d" % number), b"x")).id
        sent.append((await ledger.finish(row, reply_of(), 100.0 + number))[0].id)
    assert await ledger.prune(104.0) == 0
    await ledger.delivered(sent)
    assert await ledger.prune(104.0) == 2
    assert [(await ledger.accept(request_of(b"%d" % n), b"x")).verdict for n in (1, 2)] == ["accept", "replay"]
    await ledger.prune(113.5)
    assert (await ledger.accept(request_of(b"3"), b"x")).verdict == "accept"
    assert (await ledger.accept(request_of(b"4"), b"x")).verdict == "replay"
    await ledger.close()


async def test_waiting_operations_share_a_commit(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    verdicts = await asyncio.gather(*(ledger.accept(request_of(b"%d" % (n // 2)), b"x") for n in range(400)))
    assert [each.verdict for each in verdicts] == ["accept", "pending"] * 200
    await ledger.close()


async def test_a_file_that_cannot_be_used_is_one_clear_error(tmp_path):
    (tmp_path / "inbox.sqlite").write_bytes(b"this is no database" * 100)
    ledger = make(tmp_path)
    with pytest.raises(MeshError) as refused:
        await ledger.open(0.0)
    assert refused.value.code is Code.UNAVAILABLE


async def test_a_failing_disk_fails_the_request_and_nothing_else(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    blocker = sqlite3.connect(tmp_path / "inbox.sqlite")
    blocker.execute("DROP TABLE outbox")
    blocker.execute("ALTER TABLE inbox RENAME TO gone")
    with pytest.raises(MeshError) as refused:
        await ledger.accept(request_of(), b"x")
    assert refused.value.code is Code.UNAVAILABLE
    blocker.execute("ALTER TABLE gone RENAME TO inbox")
    blocker.close()
    assert (await ledger.accept(request_of(), b"x")).verdict == "accept"
    await ledger.close()


async def test_durability_is_asked_of_sqlite(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    run = ledger._commits.submit
    assert await run(lambda c: c.execute("PRAGMA synchronous").fetchone()[0]) == 2
    assert await run(lambda c: c.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"
    await ledger.close()
    with pytest.raises(MeshError):
        await ledger.accept(request_of(), b"x")


def input_of(seq=None, *, boot="b1", stream="audio"):
    return Input(
        tenant="local", device="mic", stream=stream, boot=boot if seq is not None else "", seq=seq, arrived=1.0
    )


def event_of(name):
    return Event(topic="nc/v1/local/mic/out/audio", payload=name, user={"id": "1"}, ttl_s=60.0)


async def test_a_stream_moves_on_in_one_transaction(tmp_path):
    ledger = make(tmp_path, links=("device", "upstream"))
    await ledger.open(0.0)
    assert [(await ledger.take(input_of(seq), b"%d" % seq)).verdict for seq in (1, 2, 2, 1)] == [
        "accept",
        "accept",
        "duplicate",
        "duplicate",
    ]
    assert await ledger.take(input_of(6), b"6") == Intake("accept", 3, lost=3)
    assert (await ledger.take(input_of(1, boot="b2"), b"1")).verdict == "accept"
    assert (await ledger.take(input_of(), b"uncounted")).verdict == "accept"
    events = await ledger.advance(1, 10.0, state=b"s1", events=[event_of(b"one"), event_of(b"two")])
    assert [each.message.payload for each in events] == [b"one", b"two"]
    assert await ledger.advance(1, 10.0, state=b"again", events=[event_of(b"again")]) == ()
    assert await ledger.stream_state("local", "mic", "audio") == b"s1"
    await crash(ledger)

    ledger = make(tmp_path, links=("device", "upstream"))
    recovered = await ledger.open(20.0)
    assert recovered.inputs == {"local/mic/audio": 5}
    assert recovered.outbox == {link: {event_of(b"").topic: 2} for link in ("device", "upstream")}
    page = await ledger.inputs(2, 2)
    assert [(each.id, each.payload) for each in page.rows] == [(3, b"6"), (4, b"1")]
    assert page.through == 4
    assert (await ledger.inputs(4, 2)).through == 5
    assert await ledger.stream_state("local", "mic", "audio") == b"s1"
    assert (await ledger.take(input_of(1, boot="b2"), b"1")).verdict == "duplicate"
    assert (await ledger.take(input_of(6), b"6")).verdict == "duplicate", "a broker sends it again after the reboot"
    await ledger.close()


async def test_an_event_is_owed_until_every_link_has_it(tmp_path):
    ledger = make(tmp_path, links=("device", "upstream"))
    await ledger.open(0.0)
    await ledger.take(input_of(1), b"x")
    (event,) = await ledger.advance(1, 10.0, events=[event_of(b"one")])
    await ledger.delivered([event.id], "device")
    assert (await ledger.owed("device", 0, 10, 1 << 20)).rows == []
    await ledger.close()
    ledger = make(tmp_path, boot="boot-2", links=("device", "upstream"))
    await ledger.open(1000.0)
    (owed,) = (await ledger.owed("upstream", 0, 10, 1 << 20)).rows
    assert (owed.message, owed.expires) == (event.message, 1060.0)  # what passed between two boots is not known
    await ledger.delivered([owed.id], "upstream")
    await ledger.close()
    ledger = make(tmp_path, links=("device",))
    assert (await ledger.open(0.0)).outbox == {"device": {}}
    await ledger.close()


async def test_dead_letters_are_listed_announced_and_tried_again(tmp_path):
    path = tmp_path / "inbox.sqlite"
    ledger = make(tmp_path)
    await ledger.open(0.0)
    row = (await ledger.accept(request_of(), b"payload")).id
    _, announced = await ledger.finish(row, reply_of(), 101.0, buried="crashed")
    assert announced.message.topic == "nc/v1/local/dlq/edge"
    await ledger.take(input_of(1), b"data")
    await ledger.advance(1, 101.0, buried="unreadable")
    letters = list_letters(path)  # beside the running node
    assert [(each.kind, each.device, each.name, each.reason) for each in letters] == [
        ("request", "cam", "digits", "crashed"),
        ("input", "mic", "audio", "unreadable"),
    ]
    assert read_letter(path, 2) == (letters[1], b"data")
    assert read_letter(path, 3) is None
    assert mark_for_replay(path, [1, 2, 9]) == [1, 2]
    assert [each.replay for each in list_letters(path)] == [True, True]
    revived = await ledger.revive(200.0, 30.0)
    (request,), (item,) = revived.requests, revived.inputs
    assert (request.request.correlation, request.request.deadline, request.payload) == (b"c", 230.0, b"payload")
    assert (item.input.key, item.payload) == ("local/mic/audio", b"data")
    assert list_letters(path) == []
    await ledger.finish(request.id, reply_of(b"now"), 201.0)
    again = await ledger.accept(request_of(), b"payload")
    assert again.replay.message.payload == b"answer"  # the first answer stays the answer
    await ledger.close()
    with pytest.raises(MeshError):
        list_letters(tmp_path / "none")


async def test_streams_and_letters_are_bounded(tmp_path):
    ledger = make(tmp_path, streams_max=2, letters_max=1, inputs_bytes_max=1000, when_full="reject")
    await ledger.open(0.0)
    for number, stream in enumerate(("s1", "s2", "s3"), start=1):
        await ledger.take(input_of(1, stream=stream), b"x")
        await ledger.advance(number, 1.0, state=b"s", buried="bad")
    assert [await ledger.stream_state("local", "mic", name) for name in ("s1", "s2", "s3")] == [None, b"s", b"s"]
    assert [each.name for each in list_letters(tmp_path / "inbox.sqlite")] == ["s3"]
    assert (await ledger.take(input_of(2, stream="s3"), bytes(1000))).verdict == "full"
    assert (await ledger.take(input_of(2, stream="s3"), b"x")).verdict == "accept"  # its number was not used up
    await ledger.close()


async def test_an_operation_that_fails_spares_its_neighbours_and_leaves_no_trace(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    told = []
    ledger.on_commit(lambda committed: told.extend(each.id for each in committed.added))
    await ledger.take(input_of(1), b"x")
    await ledger.take(input_of(2), b"y")
    good = ledger.advance(1, 10.0, events=[event_of(b"one")])
    bad = ledger.finish(99, reply_of(), 10.0, buried="there is no such request")
    later = ledger.advance(2, 10.0, events=[event_of(b"two")])
    with pytest.raises(MeshError) as raised:
        await bad
    assert raised.value.code is Code.INTERNAL  # another try would fail too
    ids = [each.id for each in (*await good, *await later)]
    assert told == ids == [row.id for row in (await ledger.owed("device", 0, 10, 1 << 20)).rows]
    assert ledger.event_bytes == sum(row.size_bytes for row in (await ledger.owed("device", 0, 10, 1 << 20)).rows)
    await ledger.close()


async def test_what_waits_too_long_goes_and_is_told_of_once(tmp_path):
    ledger = make(tmp_path, inputs_age_max_s=50.0)
    await ledger.open(0.0)
    reasons = []
    ledger.on_commit(lambda committed: reasons.append(dict(committed.reasons)))
    await ledger.take(input_of(1), b"old")
    await ledger.take(input_of(2), b"done")
    await ledger.advance(2, 1.0, events=[event_of(b"expires at 61")])
    assert await ledger.prune(51.0) == 0
    assert await ledger.prune(61.0) == 2
    assert reasons[-1] == {"expired": 1, "inputs_old": 1}
    assert (await ledger.inputs(0, 10)).rows == []
    assert len(await ledger.tell_drops(61.0)) == 1
    assert await ledger.tell_drops(62.0) == ()
    assert [each.reason for each in list_letters(tmp_path / "inbox.sqlite")] == [
        "Messages were dropped: 1 expired, 1 inputs_old."
    ]
    await ledger.close()


async def test_the_oldest_inputs_make_room_if_that_is_the_policy(tmp_path):
    ledger = make(tmp_path, inputs_bytes_max=10_000)
    await ledger.open(0.0)
    for seq in range(1, 31):
        assert (await ledger.take(input_of(seq), bytes(900))).verdict == "accept"
    rows = (await ledger.inputs(0, 100)).rows
    assert [each.input.seq for each in rows] == list(range(31 - len(rows), 31))
    assert await ledger.advance(1, 1.0, state=b"s", events=[event_of(b"late")]) == ()
    assert (await ledger.take(input_of(31), bytes(20_000))).verdict == "full"
    await ledger.close()


async def test_an_event_that_a_link_refused_can_be_sent_again_on_that_link(tmp_path):
    ledger = make(tmp_path, links=("device", "upstream"))
    await ledger.open(0.0)
    await ledger.take(input_of(1), b"x")
    (event,) = await ledger.advance(1, 1.0, events=[event_of(b"one")])
    (announced,) = await ledger.refuse(event.id, "upstream", "not allowed", 2.0)
    assert [row.id for row in (await ledger.owed("device", 0, 10, 1 << 20)).rows] == [event.id, announced.id]
    assert await ledger.refuse(announced.id, "upstream", "not allowed", 2.0) == ()  # no letters about letters
    mark_for_replay(tmp_path / "inbox.sqlite", [1])
    (again,) = (await ledger.revive(3.0, 30.0)).outgoing
    assert (again.message, again.links, again.expires) == (event.message, 2, 63.0)
    await ledger.close()


async def test_a_letter_that_cannot_be_sent_again_stays_one(tmp_path):
    path = tmp_path / "inbox.sqlite"
    ledger = make(tmp_path, links=("device", "upstream"))
    await ledger.open(0.0)
    await ledger.take(input_of(1), b"x")
    (event,) = await ledger.advance(1, 1.0, events=[event_of(b"one")])
    await ledger.refuse(event.id, "upstream", "not allowed", 2.0)
    await ledger.close()
    mark_for_replay(path, [1])
    for fields in ({}, {"links": ("device", "upstream"), "outbox_bytes_max": 10, "when_full": "reject"}):
        ledger = make(tmp_path, **fields)
        await ledger.open(3.0)
        assert (await ledger.revive(3.0, 30.0)).outgoing == []
        assert await ledger.tell_drops(3.0) == (), "nothing was dropped"
        await ledger.close()
        assert [each.replay for each in list_letters(path)] == [True]
    ledger = make(tmp_path, links=("device", "upstream"))
    await ledger.open(4.0)
    (again,) = (await ledger.revive(4.0, 30.0)).outgoing
    assert (again.message, again.links) == (event.message, 2)
    assert list_letters(path) == []
    await ledger.close()


async def test_a_stream_reads_its_own_rows_without_those_of_the_others(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    for seq in range(1, 6):
        for stream in ("audio", "video", "video"):
            await ledger.take(input_of(stream=stream), b"%d" % seq)
    page = await ledger.inputs(1, 2, key="local/mic/audio")
    assert ([(row.id, row.payload) for row in page.rows], page.through) == ([(4, b"2"), (7, b"3")], 7)
    assert (await ledger.inputs(7, 3, key="local/mic/audio")).through == 15
    assert (await ledger.inputs(0, 3, key="local/mic/none")).rows == []
    plan = await ledger._commits.submit(
        lambda c: c.execute("EXPLAIN QUERY PLAN SELECT 1 FROM inputs WHERE stream = 1 AND id > 1").fetchall()
    )
    assert "inputs_by_stream (stream=? AND rowid>?)" in plan[0][3]
    await ledger.close()


async def test_a_file_of_an_earlier_format_is_named_as_one(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "inbox.sqlite")) as connection:
        connection.execute("CREATE TABLE inbox (id INTEGER PRIMARY KEY, finished REAL, size INTEGER, state TEXT)")
    ledger = make(tmp_path)
    with pytest.raises(MeshError, match="earlier format"):
        await ledger.open(0.0)
    await ledger.close()


async def test_a_file_of_the_last_format_is_read_on(tmp_path):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    await ledger.take(input_of(3), b"x")
    await ledger.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "inbox.sqlite")) as connection:
        for statement in (
            "ALTER TABLE streams DROP COLUMN boots",
            "ALTER TABLE streams ADD COLUMN boot TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE streams ADD COLUMN seq INTEGER",
            "UPDATE streams SET boot = 'b1', seq = 3",
            "PRAGMA user_version = 1",
        ):
            connection.execute(statement)
        connection.commit()
    for _ in range(2):
        ledger = make(tmp_path)
        await ledger.open(0.0)
        assert (await ledger.take(input_of(3), b"x")).verdict == "duplicate"
        assert (await ledger.take(input_of(stream="new"), b"x")).verdict == "accept"
        await ledger.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "inbox.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    ledger = make(tmp_path)
    with pytest.raises(MeshError, match="format 99"):
        await ledger.open(0.0)
    await ledger.close()


async def test_a_request_that_could_not_be_stored_leaves_nothing_in_memory(tmp_path, monkeypatch):
    ledger = make(tmp_path)
    await ledger.open(0.0)
    await ledger.accept(request_of(b"stored"), b"x")
    for name in (b"stored", b"lost"):
        key = ("local", "cam", name)
        ledger.expect(key)
        ledger.doubt(key)
        await ledger.owed("device", 0, 1, 1)
        assert ledger.knows(key) == (name == b"stored")
    await ledger.close()


async def test_a_letter_without_room_leaves_its_payload_on_disk(tmp_path):
    path, payload = tmp_path / "inbox.sqlite", bytes(1 << 20)
    ledger = make(tmp_path)
    await ledger.open(0.0)
    await ledger.take(input_of(1), b"x")
    (event,) = await ledger.advance(1, 1.0, events=[event_of(payload)])
    await ledger.refuse(event.id, "device", "not allowed", 2.0)
    await ledger.close()
    mark_for_replay(path, [1])
    for when_full in ("reject", "drop-oldest"):
        ledger = make(tmp_path, outbox_bytes_max=len(payload), when_full=when_full)
        await ledger.open(3.0)
        tracemalloc.start()
        revived = await ledger.revive(3.0, 30.0)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await ledger.close()
        assert (revived.outgoing, len(list_letters(path))) == ([], 1)
        assert peak_bytes < len(payload)
