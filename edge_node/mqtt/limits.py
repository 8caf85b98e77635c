"""Every bound of the MQTT side of a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_node.mqtt.backlog import BacklogLimits
from nearcast.backoff import ReconnectLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttLimits:
    """Every bound of the MQTT side.

    Attributes:
        payload_bytes_max: larger requests are answered 413; the generated broker configuration allows a little more.
        image_bytes_max: the same for images; cameras' full frames are not what a message broker is for.
        json_bytes_max: the same for JSON, whose every number costs time on the loop; larger tensors travel as bytes.
        correlation_bytes_max: a device chooses it and we store it.
        user_chars_max: user properties of a request, names and values together.
        ttl_default_ms: deadline of a request that names none. ttl_max_ms: a longer one is cut to this.
        expired_notice_s: Message Expiry of the answer 408, which nobody waits for any more.
        pending_max, pending_bytes_max: accepted and not answered; beyond it requests are refused with 429.
        in_flight_max: requests that are given to the models at the same time.
        hold_ms: how long the acceptance of a request waits for its answer, to share a transaction with it.
        memory_replies_bytes_max: answers remembered in memory, for requests that are not on disk.
        unacknowledged_max: our Receive Maximum. Acknowledgements keep the order of arrival, so behind one that waits
            for the disk (without durability: for an answer) wait even those that are refused at once: it is large, or
            they would not reach us at once. unacknowledged_bytes_max: of payloads, with durability: we stop reading.
        unacknowledged_age_max_s: without durability: an older request is acknowledged unanswered.
        publish_window: answers on their way to the broker.
        commit_batch_max: operations in one transaction.
        replies_age_max_s, replies_max, replies_bytes_max: how long an answer is kept for a repeated request.
        attempts_max: a request that was being executed in this many crashes is answered 500 instead of tried again.
        inputs_bytes_max, inputs_age_max_s: streams' messages that wait for their execution, on disk.
        outbox_bytes_max: events that wait for a link, on disk; how long they wait is theirs to say.
        when_full: what goes then: `drop-oldest`, or `reject` = the new one. Either is counted and told of.
        live_rows_max, live_bytes_max: of what waits for a link, so much is kept in memory. page_rows_max,
            page_bytes_max: the rest is read in pages. live_share: messages of streams without a backlog for each one
            of a backlog. backlog_window: of the window of a link, so much is for backlogs. backlog_per_s: and so
            many messages of them a second. publish_bytes_max: and so
            many bytes are on their way. read_retry_s: between two tries to read a page.
            input_page_rows_max: the page of streams, whose messages become batches.
            forget_delay_s: what a link has taken is forgotten so much later, together.
        unstored_max, unstored_bytes_max: answers and refusals that are only in memory and have not left; no Receive
            Maximum bounds requests with QoS 0, and one more is given up.
        refusals_max: a broker is offered an event so often; between, full jitter over refusal_retry_base_s to
            refusal_retry_max_s.
        streams_max: streams remembered; a new one takes the place of the one that was quiet longest.
        inputs_in_hand_max: messages of streams, or 64 KiB each, between ledger and models. windows_max: that one
            of them may complete. states_cached_max: streams whose state is kept in memory too.
        input_tries_max: a message at which its model fails so often becomes a dead letter.
        input_retry_base_s, input_retry_max_s: full jitter, while a stream's model cannot answer.
        letters_max, letters_bytes_max: dead letters kept; the oldest go first. letter_ttl_s: Message Expiry of the
            message about one.
        outlasting_max: requests that wait for a model nobody can be asked for now, beyond it they are answered 503 at
            once. outlast_base_s, outlast_max_s: full jitter between their tries. answer_margin_s: so long before the
            deadline they give up.
        sequences_max: sequences of hidden-state models remembered, least recently used first forgotten.
        stall_s: a broker that confirms none of our messages for so long is left for a new connection.
        reconnect: the node's devices wait for it, and it is alone: a fraction of their longest wait.
    """

    payload_bytes_max: int = 8 * 1024 * 1024
    image_bytes_max: int = 1024 * 1024
    json_bytes_max: int = 2 * 1024 * 1024
    correlation_bytes_max: int = 128
    user_chars_max: int = 4096
    ttl_default_ms: float = 30_000.0
    ttl_max_ms: float = 3_600_000.0
    expired_notice_s: int = 30
    pending_max: int = 1024
    pending_bytes_max: int = 64 * 1024 * 1024
    in_flight_max: int = 64
    hold_ms: float = 2.0
    unacknowledged_max: int = 32_767
    unacknowledged_bytes_max: int = 64 * 1024 * 1024
    unacknowledged_age_max_s: float = 5.0
    publish_window: int = 256
    commit_batch_max: int = 256
    replies_age_max_s: float = 600.0
    replies_max: int = 100_000
    replies_bytes_max: int = 256 * 1024 * 1024
    memory_replies_bytes_max: int = 16 * 1024 * 1024
    attempts_max: int = 3
    inputs_bytes_max: int = 256 * 1024 * 1024
    inputs_age_max_s: float = 172_800.0
    outbox_bytes_max: int = 256 * 1024 * 1024
    when_full: Literal["drop-oldest", "reject"] = "drop-oldest"
    live_rows_max: int = 1024
    live_bytes_max: int = 4 * 1024 * 1024
    page_rows_max: int = 48
    input_page_rows_max: int = 128
    page_bytes_max: int = 1024 * 1024
    live_share: int = 4
    backlog_window: int = 32
    backlog_per_s: float = 2400.0
    publish_bytes_max: int = 4 * 1024 * 1024
    read_retry_s: float = 0.2
    forget_delay_s: float = 0.1
    unstored_max: int = 32_768
    unstored_bytes_max: int = 64 * 1024 * 1024
    refusals_max: int = 5
    refusal_retry_base_s: float = 0.5
    refusal_retry_max_s: float = 60.0
    streams_max: int = 10_000
    inputs_in_hand_max: int = 128
    windows_max: int = 4096
    states_cached_max: int = 1024
    input_tries_max: int = 5
    input_retry_base_s: float = 0.5
    input_retry_max_s: float = 60.0
    letters_max: int = 1_000
    letters_bytes_max: int = 64 * 1024 * 1024
    letter_ttl_s: float = 172_800.0
    outlasting_max: int = 256
    outlast_base_s: float = 0.1
    outlast_max_s: float = 2.0
    answer_margin_s: float = 0.2
    sequences_max: int = 10_000
    reconnect: ReconnectLimits = field(default_factory=lambda: ReconnectLimits(max_s=3.0))
    connect_timeout_s: float = 5.0
    stall_s: float = 10.0
    keepalive_s: int = 30
    session_expiry_s: int = 86_400
    will_delay_s: int = 10
    retry_after_ms: int = 200

    @property
    def lanes(self) -> BacklogLimits:
        """Of each consumer of stored rows: a link, or the streams."""
        return BacklogLimits(
            live_rows_max=self.live_rows_max,
            live_bytes_max=self.live_bytes_max,
            page_rows_max=self.page_rows_max,
            page_bytes_max=self.page_bytes_max,
            live_share=self.live_share,
        )
