"""What a host says about a version: its tensors, and as properties how it is run here."""

from __future__ import annotations

from collections.abc import Iterable

from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.serving.engines import PLATFORMS
from nearcast.serving.limits import HostLimits
from nearcast.serving.signature import Signature
from nearcast.store.manifest import Manifest, Tensor


def describe(manifest: Manifest, ready: Iterable[int], limits: HostLimits) -> ModelMetadata:
    """The metadata of a version.

    What tools read from the model configuration travels as properties, so that it passes through routers:
    `batch_rows_max` (rows of one run, where the first axis of every tensor is its batch axis), `batch_window_us_max`,
    `queue_rows_max`, `priority_levels`, `priority_default`, `instances` (runs at the same time), `sequence_idle_us`,
    `sequences_max`, `cache`, and `labels`, one class a line.

    Args:
        manifest: of the version.
        ready: the releases in memory.
        limits: of the host.
    """
    properties = dict(manifest.properties) | {
        "semver": manifest.semver,
        "stateful": manifest.stateful,
        "variant": manifest.variant,
        "quality": f"{manifest.quality:g}",
        "engine": manifest.engine,
        "instances": str(limits.slots if manifest.engine == "onnxruntime" else 1),
        "queue_rows_max": str(limits.queue_rows_max),
        "priority_levels": str(limits.priority_levels),
        "priority_default": str(limits.priority_default),
    }
    if manifest.stateful == "hidden":
        properties["sequence_idle_us"] = str(int(limits.sequence_idle_s * 1e6))
        properties["sequences_max"] = str(limits.sequences_max)
    elif Signature(manifest).batchable and all(t.batch_axis == 0 for t in (*manifest.inputs, *manifest.outputs)):
        properties["batch_rows_max"] = str(limits.batch_rows_max)
        properties["batch_window_us_max"] = str(int(limits.batch_window_us_max))
    if manifest.response_cache and manifest.stateful == "none":
        properties["cache"] = "true"
    if manifest.labels:
        properties["labels"] = "\n".join(manifest.labels)
    return ModelMetadata(
        name=manifest.name,
        versions=tuple(str(release) for release in sorted(ready)),
        platform=PLATFORMS[manifest.engine],
        inputs=tuple(map(_spec, manifest.inputs)),
        outputs=tuple(map(_spec, manifest.outputs)),
        properties=properties,
    )


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.datatype, tensor.shape)
