"""Every parameter of the policy in one frozen place. Times are milliseconds here and seconds inside."""

from __future__ import annotations

from typing import Annotated

import msgspec

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of `Policy`.

    Attributes:
        reserve_ms: kept back of every deadline for the way home.
        queue_wait_ms_max: a request without deadline is refused if it would wait longer than this.
        tail_weight: what a millisecond between the median and the 95th percentile costs, in milliseconds of median.
        queue_toll: what a millisecond in a queue costs on top of itself: who waits also delays those behind.
        peer_penalty_ms: handicap of a neighbouring node, because near is better when nothing else decides.
        cloud_penalty_ms: handicap of a cloud core; stands for its price.
        tie_fraction: candidates within this fraction of the best count as equal.
        tie_ms: and so do those within this many milliseconds.
        hot_quantile: Prequal's Q_RIF: a target above this quantile of the load of its tier is hot.
        error_penalty_ms: handicap of a target that always fails; scaled by its error share.
        error_half_life_ms: time after which half of a target's bad name is forgotten.
        rtt_seed_ms: first guess of a peer's round trip; the cloud's is ten times that.
        service_seed_ms: first guess of a model time that nobody has reported.
        bytes_per_s_seed: first guess of a link's rate, bytes per second.
        window_size: samples of the sliding service-time window.
        window_age_ms_max: older samples are dropped.
        forgive_ms: a target that nobody has asked for this long is believed to get better again, half of the way for
            each such time, and one request at a time may see.
        price_weight_ms: what one unit of price for 1000 answers is worth, in milliseconds.
        quality_weight_ms: what all of the quality is worth, in milliseconds.
        stale_ms: age at which a report's spread counts double and its load is half forgotten.
        stale_widening_max: upper bound of that widening.
        refresh_ms: how often ages, decays and hot bounds are brought up to date.
        hedge_share: hedges per request, on average.
        hedge_burst: hedges that may be saved up.
        hedge_delay_ms_min: no hedge is sent earlier.
        brownout_share: when more than this share of requests outlasts its hedge delay, hedging stops for that tier.
        brownout_smoothing: weight of one request in that share.
        retry_share: retries per request, on average.
        retry_burst: retries that may be saved up; a node's death spends one for each request in flight on it, and for
            each that is sent there until the loss is seen.
        retry_per_s: retries earned per second without any traffic.
        attempts_max: sends of one request, all kinds together.
        breaker_failures: consecutive failures of a model on a target that open its breaker.
        breaker_open_ms: how long it stays open the first time; doubles with each relapse.
        breaker_open_ms_max: bound of that doubling.
        breaker_trials: requests that a half-open breaker lets through at the same time.
        pushback_ms_max: a target's wish to be left alone with a model counts for at most this long.
        sequences_max: sequences whose target is remembered; the least recently used is forgotten first.
        targets_max: targets that are known at the same time.
        versions_max: versions that one target may report; the rest of its report is not read.
        class_shares: for each class of requests, highest first: the part of the time it could wait that a standing
            queue may take before it is refused; the default class is the second. Who is beyond its share gets the mean
            of its own class and the next lower one.
        burst_share: the same for every class but the highest while the queue is not older than that time.
        patience_ms: for this long a queue is kept short enough for the least patient request of a higher class.
        tenant_shares_max: tenants, counted once for each model they use, that are told apart; the rest share one part.
        tenant_idle_ms: a tenant that asks for nothing for this long leaves its part to the others.
        tier_trip_ms: a tier most of whose answers come to nothing for this long is set aside.
        tier_open_ms: how long it is set aside the first time; doubles with each relapse.
        tier_open_ms_max: bound of that doubling.
        tier_trials: requests at the same time that are to show whether it is back.
        tier_start_ms: time in which a tier that is back gets from the trials to all requests.
        slow_score_max: a target whose model time lies more standard deviations than this above its like is set aside.
        slow_share_max: share of the targets of a model that may be set aside as slow at the same time.
        slow_ms: how often that is looked at, and for how long one is set aside the first time; doubles with each
            relapse.
        slow_ms_max: bound of that doubling.
    """

    reserve_ms: NonNegative = 1.0
    queue_wait_ms_max: Positive = 2000.0
    tail_weight: NonNegative = 0.3
    queue_toll: NonNegative = 1.0
    peer_penalty_ms: NonNegative = 1.0
    cloud_penalty_ms: NonNegative = 3.0
    tie_fraction: NonNegative = 0.1
    tie_ms: NonNegative = 0.1
    hot_quantile: Fraction = 0.84
    error_penalty_ms: NonNegative = 2000.0
    error_half_life_ms: Positive = 2000.0
    rtt_seed_ms: Positive = 2.0
    service_seed_ms: Positive = 5.0
    bytes_per_s_seed: Positive = 50e6
    window_size: Count = 64
    window_age_ms_max: Positive = 5000.0
    forgive_ms: Positive = 500.0
    price_weight_ms: NonNegative = 1.0
    quality_weight_ms: NonNegative = 50.0
    stale_ms: Positive = 2000.0
    stale_widening_max: NonNegative = 4.0
    refresh_ms: Positive = 50.0
    hedge_share: Fraction = 0.049
    hedge_burst: NonNegative = 10.0
    hedge_delay_ms_min: NonNegative = 1.0
    brownout_share: Fraction = 0.2
    brownout_smoothing: Fraction = 0.03
    retry_share: Fraction = 0.05
    retry_burst: NonNegative = 64.0
    retry_per_s: NonNegative = 1.0
    attempts_max: Count = 3
    breaker_failures: Count = 5
    breaker_open_ms: Positive = 250.0
    breaker_open_ms_max: Positive = 5000.0
    breaker_trials: Count = 1
    pushback_ms_max: NonNegative = 1000.0
    sequences_max: Count = 10_000
    targets_max: Count = 256
    versions_max: Count = 1024
    class_shares: Annotated[tuple[Fraction, ...], msgspec.Meta(min_length=1, max_length=4)] = (1.0, 0.3, 0.2, 0.1)
    burst_share: Fraction = 0.8
    patience_ms: NonNegative = 5000.0
    tenant_shares_max: Count = 10_000
    tenant_idle_ms: Positive = 2000.0
    tier_trip_ms: Positive = 1000.0
    tier_open_ms: Positive = 500.0
    tier_open_ms_max: Positive = 5000.0
    tier_trials: Count = 4
    tier_start_ms: Positive = 1000.0
    slow_score_max: Positive = 6.0
    slow_share_max: Fraction = 0.5
    slow_ms: Positive = 1000.0
    slow_ms_max: Positive = 30_000.0


LASTING = frozenset({
    "breaker_failures", "breaker_open_ms", "breaker_open_ms_max", "breaker_trials", "forgive_ms", "sequences_max",
    "tenant_idle_ms", "tenant_shares_max", "tier_open_ms", "tier_open_ms_max", "tier_start_ms", "tier_trials",
    "tier_trip_ms", "window_age_ms_max", "window_size",
})  # fmt: skip
"""Parameters that what has been learnt is made of: they hold for the whole life of a policy."""
