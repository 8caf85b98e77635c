"""What a stream means: which model reads its samples, in which windows, and what becomes of the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from nearcast.transport.mqtt.topics import ID_PATTERN

WINDOW_SAMPLES_MAX = 1 << 20
Id = Annotated[str, msgspec.Meta(pattern=rf"^{ID_PATTERN}\Z")]


class StreamDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry `[[streams]]`: what happens to messages on `…/up/data/{name}`.

    Attributes:
        name: last level of the topic, the same for all devices.
        model, version: what runs; version "" = the channel's choice.
        window: samples that the model reads at once; 0 = each message is one input as it is.
        hop: samples from the beginning of one window to the next; 0 = `window`. Less than `window` overlaps: the first
            window then begins with zeros.
        datatype: of the samples, where the message does not say `dtype`; "" = the model's own.
        sample_rate_hz: that WAV files must have; 0 = what the model says, if it does.
        scale: factor on each raw sample, before it becomes the model's datatype.
        state: the input that gets each output's value in the next window, as input = output. Empty for a model with
            explicit state: the one output of the same type and shape, best with a name that begins like the input's.
        labels: names of the classes by index; one label for a single score.
        score_scale: factor on each score, for models whose outputs are quantised.
        mean_of: windows over which each score is averaged; the windows before the first one count as zero.
        threshold: results below this score are left out.
        emit: an event for `each` message, or only when the set of class names in the results `change`s.
        deadline_ms: of each run of the model.
        expiry_s: Message Expiry of the events.
    """

    name: Id
    model: Id
    version: str = ""
    window: Annotated[int, msgspec.Meta(ge=0, le=WINDOW_SAMPLES_MAX)] = 0
    hop: Annotated[int, msgspec.Meta(ge=0, le=WINDOW_SAMPLES_MAX)] = 0
    datatype: str = ""
    sample_rate_hz: Annotated[int, msgspec.Meta(ge=0)] = 0
    scale: float = 1.0
    state: dict[str, str] = {}
    labels: tuple[str, ...] = ()
    score_scale: float = 1.0
    mean_of: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    threshold: float = 0.0
    emit: Literal["each", "change"] = "each"
    deadline_ms: Annotated[float, msgspec.Meta(gt=0)] = 10_000.0
    expiry_s: Annotated[int, msgspec.Meta(gt=0)] = 172_800

    def __post_init__(self) -> None:
        if self.hop > self.window:
            raise ValueError(f"the stream {self.name} hops further than its window: samples would be left out")

    @property
    def step(self) -> int:
        """Samples from one window to the next."""
        return self.hop or self.window


def by_name(definitions: Sequence[StreamDefinition]) -> Mapping[str, StreamDefinition]:
    """The definitions by the names of their streams.

    Raises:
        ValueError: if two have the same name.
    """
    known = {definition.name: definition for definition in definitions}
    if len(known) != len(definitions):
        raise ValueError("two streams have the same name")
    return known
