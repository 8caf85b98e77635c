"""Every bound of the MQTT side of a node, by who keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_node.mqtt.backlog import BacklogLimits
from nearcast.backoff import ReconnectLimits

CRASHES_MAX = 3
STREAMS_MAX = 10_000
REPLIES_AGE_S_MAX = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """The connection to the devices' broker, and what it has not been told to forget.

    Attributes:
        unacknowledged_max: our Receive Maximum. Acknowledgements keep the order of arrival, so behind one that waits
            for the disk (without durability: for an answer) wait even those that are refused at once: it is large, or
            they would not reach us at once. unacknowledged_bytes_max: of payloads, with durability: we stop reading.
        unacknowledged_age_max_s: without durability: an older request is acknowledged unanswered.
        stall_s: a broker that confirms none of our messages for so long is left for a new connection.
        reconnect: the node's devices wait for it, and it is alone: a fraction of their longest wait.
    """

    unacknowledged_max: int = 32_767
    unacknowledged_bytes_max: int = 64 * 1024 * 1024
    unacknowledged_age_max_s: float = 5.0
    connect_timeout_s: float = 5.0
    stall_s: float = 10.0
    keepalive_s: int = 30
    session_expiry_s: int = 86_400
    will_delay_s: int = 10
    reconnect: ReconnectLimits = field(default_factory=lambda: ReconnectLimits(max_s=3.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLimits:
    """What a device may send.

    Attributes:
        payload_bytes_max: larger requests are answered 413; the generated broker configuration allows a little more.
        image_bytes_max: the same for images; cameras' full frames are not what a message broker is for.
        json_bytes_max: the same for JSON, whose every number costs time on the loop; larger tensors travel as bytes.
        correlation_bytes_max: a device chooses it and we store it.
        user_chars_max: user properties of a request, names and values together.
        ttl_default_ms: deadline of a request that names none. ttl_max_ms: a longer one is cut to this.
    """

    payload_bytes_max: int = 8 * 1024 * 1024
    image_bytes_max: int = 1024 * 1024
    json_bytes_max: int = 2 * 1024 * 1024
    correlation_bytes_max: int = 128
    user_chars_max: int = 4096
    ttl_default_ms: float = 30_000.0
    ttl_max_ms: float = 3_600_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Requests between their message and their answer.

    Attributes:
        pending_max, pending_bytes_max: accepted and not answered; beyond it requests are refused with 429.
        in_flight_max: requests that are given to the models at the same time.
        hold_ms: how long the acceptance of a request waits for its answer, to share a transaction with it.
        attempts_max: a request that was being executed in this many crashes is answered 500 instead of tried again.
        retry_after_ms: what a refusal proposes.
        memory_replies_age_max_s, memory_replies_bytes_max: answers remembered for requests that are not on disk.
        outlasting_max: requests that wait for a model nobody can be asked for now, beyond it they are answered 503 at
            once. outlast_base_s, outlast_max_s: full jitter between their tries. answer_margin_s: so long before the
            deadline they give up.
        sequences_max: sequences of hidden-state models remembered, least recently used first forgotten.
    """

    pending_max: int = 1024
    pending_bytes_max: int = 64 * 1024 * 1024
    in_flight_max: int = 64
    hold_ms: float = 2.0
    attempts_max: int = CRASHES_MAX
    retry_after_ms: int = 200
    memory_replies_age_max_s: float = REPLIES_AGE_S_MAX
    memory_replies_bytes_max: int = 16 * 1024 * 1024
    outlasting_max: int = 256
    outlast_base_s: float = 0.1
    outlast_max_s: float = 2.0
    answer_margin_s: float = 0.2
    sequences_max: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """What is on disk.

    Attributes:
        commit_batch_max: operations in one transaction.
        replies_age_max_s, replies_max, replies_bytes_max: how long an answer is kept for a repeated request.
        inputs_bytes_max, inputs_age_max_s: streams' messages that wait for their execution.
        outbox_bytes_max: events that wait for a link; how long they wait is theirs to say.
        when_full: what goes then: `drop-oldest`, or `reject` = the new one. Either is counted and told of.
        page_bytes_max: of the page of streams' messages that is read at once.
        streams_max: streams remembered; a new one takes the place of the one that was quiet longest.
        letters_max, letters_bytes_max: dead letters kept; the oldest go first. letter_ttl_s: Message Expiry of the
            message about one.
    """

    commit_batch_max: int = 256
    replies_age_max_s: float = REPLIES_AGE_S_MAX
    replies_max: int = 100_000
    replies_bytes_max: int = 256 * 1024 * 1024
    inputs_bytes_max: int = 256 * 1024 * 1024
    inputs_age_max_s: float = 172_800.0
    outbox_bytes_max: int = 256 * 1024 * 1024
    when_full: Literal["drop-oldest", "reject"] = "drop-oldest"
    page_bytes_max: int = 1024 * 1024
    streams_max: int = STREAMS_MAX
    letters_max: int = 1_000
    letters_bytes_max: int = 64 * 1024 * 1024
    letter_ttl_s: float = 172_800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishLimits:
    """What is on its way to one broker.

    Attributes:
        window, bytes_max: messages that it has not confirmed.
        lanes: of what waits, so much is in memory.
        backlog_window: of the window, so much is for backlogs. backlog_per_s: and so many messages of them a second.
        read_retry_s: between two tries to read a page.
        forget_delay_s: what a broker has taken is forgotten so much later, together.
        unstored_max, unstored_bytes_max: answers and refusals that are only in memory and have not left; no Receive
            Maximum bounds requests with QoS 0, and one more is given up.
        refusals_max: a broker is offered an event so often; between, full jitter over refusal_retry_base_s to
            refusal_retry_max_s. refused_topics_max: topics of which it is remembered.
    """

    window: int = 256
    bytes_max: int = 4 * 1024 * 1024
    lanes: BacklogLimits = field(default_factory=lambda: BacklogLimits(page_rows_max=48))
    backlog_window: int = 32
    backlog_per_s: float = 2400.0
    read_retry_s: float = 0.2
    forget_delay_s: float = 0.1
    unstored_max: int = 32_768
    unstored_bytes_max: int = 64 * 1024 * 1024
    refusals_max: int = 5
    refusal_retry_base_s: float = 0.5
    refusal_retry_max_s: float = 60.0
    refused_topics_max: int = STREAMS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """Streams between ledger and models.

    Attributes:
        lanes: of what waits, so much is in memory; a page of it becomes batches.
        in_hand_max: messages, or 64 KiB each, between ledger and models. windows_max: that one may complete.
        states_cached_max: streams whose state is kept in memory too.
        tries_max: a message at which its model fails so often becomes a dead letter.
        retry_base_s, retry_max_s: full jitter, while a stream's model cannot answer.
        attempts_max: a message that was being executed in this many crashes becomes one, too.
        memory_bytes_max: without durability, of messages that wait. streams_max: remembered in memory.
        sequences_max: sequences of hidden-state models remembered, least recently used first forgotten.
    """

    lanes: BacklogLimits = field(default_factory=BacklogLimits)
    in_hand_max: int = 128
    windows_max: int = 4096
    states_cached_max: int = 1024
    tries_max: int = 5
    retry_base_s: float = 0.5
    retry_max_s: float = 60.0
    attempts_max: int = CRASHES_MAX
    memory_bytes_max: int = 64 * 1024 * 1024
    streams_max: int = STREAMS_MAX
    sequences_max: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttLimits:
    """All of them, for one broker of devices."""

    session: SessionLimits = field(default_factory=SessionLimits)
    messages: MessageLimits = field(default_factory=MessageLimits)
    requests: RequestLimits = field(default_factory=RequestLimits)
    ledger: LedgerLimits = field(default_factory=LedgerLimits)
    publish: PublishLimits = field(default_factory=PublishLimits)
    streams: StreamLimits = field(default_factory=StreamLimits)
