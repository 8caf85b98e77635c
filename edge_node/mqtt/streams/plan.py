"""How a stream's samples become inputs of its model, and which outputs come back as inputs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import msgspec

from edge_node.mqtt.streams.definition import StreamDefinition
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, Stateful, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """An input that gets, in the next run, what the output `output` gave in this one. It begins with zeros."""

    input: str
    output: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One definition applied to one model.

    Attributes:
        data: the input that the samples fill. shape: of one window; None = as each message says.
        feedback: the state that goes round.
        metadata: of the model, with `data` as its only input.
        labels: names of the classes by index.
        joins: windows may be stacked along the first axis of one run: no state, and the axis is free.
    """

    definition: StreamDefinition
    data: TensorSpec
    shape: tuple[int, ...] | None
    feedback: tuple[Feedback, ...]
    stateful: Stateful
    metadata: ModelMetadata
    labels: tuple[str, ...]
    joins: bool


def make_plan(definition: StreamDefinition, metadata: ModelMetadata) -> Plan:
    """Fit a definition to its model.

    Raises:
        MeshError: INVALID_REQUEST saying which entry of the configuration does not fit.
    """
    stateful = _stateful(metadata.properties.get("stateful", "none"))
    feedback = _feedback(definition, metadata, stateful)
    fed_back = {entry.input for entry in feedback}
    data = [spec for spec in metadata.inputs if spec.name not in fed_back]
    if len(data) != 1:
        raise _misfit(definition, f"{len(data)} inputs of the model would be filled by samples; it must be one")
    labels = metadata.properties.get("labels", "")
    return Plan(
        definition=definition,
        data=data[0],
        shape=_window_shape(definition, data[0]) if definition.window else None,
        feedback=feedback,
        stateful=stateful,
        metadata=msgspec.structs.replace(metadata, inputs=(data[0],)),
        labels=definition.labels or tuple(labels.split("\n") if labels else ()),
        joins=stateful == "none" and data[0].shape[:1] == (-1,),
    )


def _stateful(text: str) -> Stateful:
    return "explicit" if text == "explicit" else "hidden" if text == "hidden" else "none"


def _feedback(definition: StreamDefinition, metadata: ModelMetadata, stateful: Stateful) -> tuple[Feedback, ...]:
    pairs: Mapping[str, str] = definition.state
    if not pairs and stateful == "explicit":
        pairs = _alike(definition, metadata.inputs, metadata.outputs)
    inputs = {spec.name: spec for spec in metadata.inputs}
    outputs = {spec.name for spec in metadata.outputs}
    if not pairs.keys() <= inputs.keys() or not set(pairs.values()) <= outputs:
        raise _misfit(definition, "`state` must name inputs and outputs of the model")
    return tuple(
        Feedback(input=name, output=output, datatype=inputs[name].datatype, shape=_one(inputs[name].shape))
        for name, output in pairs.items()
    )


def _alike(definition: StreamDefinition, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, str]:
    """Each input that has one output of its own type and shape; where names go on alike (state, stateN), only those."""
    pairs = {}
    for spec in inputs:
        same = [out.name for out in outputs if (out.datatype, out.shape) == (spec.datatype, spec.shape)]
        if len(same) == 1:
            pairs[spec.name] = same[0]
    pairs = {name: output for name, output in pairs.items() if output.startswith(name)} or pairs
    if not pairs:
        raise _misfit(definition, "no output has the type and shape of an input; say with `state` which is which")
    return pairs


def _window_shape(definition: StreamDefinition, data: TensorSpec) -> tuple[int, ...]:
    shape = _one(data.shape)
    free = [axis for axis, size in enumerate(data.shape) if size < 0]
    left_over = definition.window // max(1, prod(shape))
    if free and left_over > 1:  # the last free axis takes what the others leave
        shape = tuple(left_over if axis == free[-1] else size for axis, size in enumerate(shape))
    if prod(shape) != definition.window:
        raise _misfit(
            definition, f"a window of {definition.window} samples does not fit the model's input {list(data.shape)}"
        )
    return shape


def _one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if size < 0 else size for size in shape)


def _misfit(definition: StreamDefinition, reason: str) -> MeshError:
    return MeshError(
        Code.INVALID_REQUEST, f"The stream {definition.name} does not fit its model {definition.model}: {reason}."
    )
