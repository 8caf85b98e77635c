"""What Triton's tools read of a model and of what it did: its configuration and its statistics, as protobuf."""

from __future__ import annotations

from typing import cast

from nearcast.counts import Duration, VersionCounts
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.wire.v1 import oip_pb2 as pb

_TYPES = {"BYTES": "STRING"}
_SHOWN_APART = frozenset({"labels"})
"""Properties that the configuration does not repeat: they may be long."""


def encode_config(metadata: ModelMetadata) -> pb.ModelConfig:
    """A model's configuration.

    Where the first axis of every tensor is its batch axis, `max_batch_size` is the number of rows that run at once and
    `dims` leave that axis out. Everywhere else it is 0 and `dims` are the full shapes.
    """
    properties = metadata.properties
    tensors = (*metadata.inputs, *metadata.outputs)
    rows_max = number(properties.get("batch_rows_max", ""))
    if any(len(spec.shape) < 2 for spec in tensors):
        rows_max = 0  # a shape without axes cannot be said in `dims`
    axis = 1 if rows_max else 0
    config = pb.ModelConfig(
        name=metadata.name,
        platform=metadata.platform,
        backend=properties.get("engine", ""),
        max_batch_size=rows_max,
        input=[pb.ModelInput(name=s.name, data_type=_type(s), dims=s.shape[axis:]) for s in metadata.inputs],
        output=[
            pb.ModelOutput(
                name=s.name,
                data_type=_type(s),
                dims=s.shape[axis:],
                label_filename="labels.txt" if properties.get("labels") else "",
            )
            for s in metadata.outputs
        ],
        version_policy=pb.ModelVersionPolicy(
            specific=pb.ModelVersionPolicy.Specific(versions=[int(v) for v in metadata.versions if v.isdecimal()])
        ),
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
        response_cache=pb.ModelResponseCache(enable=properties.get("cache") == "true"),
        parameters={
            name: pb.ModelParameter(string_value=value)
            for name, value in properties.items()
            if name not in _SHOWN_APART
        },
    )
    _schedule(config, metadata)
    return config


def encode_statistics(counts: VersionCounts) -> pb.ModelStatistics:
    """What one version did."""
    return pb.ModelStatistics(
        name=counts.model,
        version=counts.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.rows,
        execution_count=counts.runs,
        inference_stats=pb.InferStatistics(
            success=_duration(counts.success),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.compute_input),
            compute_infer=_duration(counts.compute),
            compute_output=_duration(counts.compute_output),
            cache_hit=_duration(counts.cache_hit),
            cache_miss=_duration(counts.cache_miss),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration((runs, before_ns)),
                compute_infer=_duration((runs, infer_ns)),
                compute_output=_duration((runs, after_ns)),
            )
            for rows, (runs, before_ns, infer_ns, after_ns) in counts.runs_by_rows.items()
        ],
        memory_usage=[pb.MemoryUsage(type="CPU", byte_size=counts.memory_bytes)] if counts.memory_bytes else [],
    )


def number(text: str) -> int:
    """A count among the properties; 0 where there is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _schedule(config: pb.ModelConfig, metadata: ModelMetadata) -> None:
    properties = metadata.properties
    if properties.get("stateful") == "hidden":
        config.sequence_batching.direct.SetInParent()
        config.sequence_batching.max_sequence_idle_microseconds = number(properties.get("sequence_idle_us", ""))
    elif number(properties.get("batch_rows_max", "")):
        batching = config.dynamic_batching
        batching.max_queue_delay_microseconds = number(properties.get("batch_window_us_max", ""))
        batching.priority_levels = number(properties.get("priority_levels", ""))
        batching.default_priority_level = number(properties.get("priority_default", ""))
        queue = batching.default_queue_policy
        queue.timeout_action = pb.ModelQueuePolicy.REJECT
        queue.allow_timeout_override = True
        queue.max_queue_size = number(properties.get("queue_rows_max", ""))
    if instances := number(properties.get("instances", "")):
        config.instance_group.add(name=f"{metadata.name}_0", count=instances, kind=pb.ModelInstanceGroup.KIND_CPU)


def _type(spec: TensorSpec) -> pb.DataType:
    return cast("pb.DataType", pb.DataType.Value("TYPE_" + _TYPES.get(spec.datatype, spec.datatype)))


def _duration(value: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=value[0], ns=value[1])
