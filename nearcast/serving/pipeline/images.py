"""Images on their way into a model: decoded within bounds and resized. Pure functions of their bytes.

Pillow decodes and resizes; it is imported when a version that takes images is loaded (`nearcast[images]`).
"""

from __future__ import annotations

import io
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from nearcast.errors import Code, MeshError
from nearcast.serving.pipeline.boxes import WHOLE, Frame
from nearcast.store.steps import DecodeImage, Resize

Array: TypeAlias = npt.NDArray[Any]
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""What has at most 8 bits for each channel; Pillow would cut others off silently."""
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "area": Image.Resampling.BOX}


def decode_image(step: DecodeImage, data: bytes) -> Image.Image:
    """The pixels of one file, upright.

    Raises:
        MeshError: INVALID_REQUEST if the bytes are none of the formats, too large once decoded, cut off or damaged.
    """
    wanted = ", ".join(step.formats)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=[name.upper() for name in step.formats])
    except Exception as error:  # whatever a decoder trips over lies in a stranger's bytes
        raise _refused(step, f"is no {wanted} file ({len(data)} bytes)") from error
    width, height = image.size
    if width * height > step.pixels_max:
        raise _refused(step, f"has {width} x {height} pixels, more than {step.pixels_max} in all")
    if image.mode not in _MODES:
        raise _refused(step, f"has the pixel format {image.mode}; use 8 bits for each channel")
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert(step.mode)
    except MemoryError:
        raise
    except Exception as error:
        raise _refused(step, f"is a damaged or cut off {str(image.format).lower()} file") from error


def resize_image(step: Resize, image: Image.Image) -> tuple[Array, Frame]:
    """One image in the declared size, UINT8 [height, width, channels], and where it lies in there."""
    method = _FILTERS[step.filter]
    if step.fit == "stretch":
        return _pixels(image.resize((step.width, step.height), method)), WHOLE
    scale = min(step.width / image.width, step.height / image.height)
    width = min(step.width, max(1, round(image.width * scale)))
    height = min(step.height, max(1, round(image.height * scale)))
    left, top = (step.width - width) // 2, (step.height - height) // 2
    frame = Image.new(image.mode, (step.width, step.height), (step.pad,) * len(image.getbands()))
    frame.paste(image.resize((width, height), method), (left, top))
    place = (left / step.width, top / step.height, width / step.width, height / step.height)
    return _pixels(frame), place


def _pixels(image: Image.Image) -> Array:
    pixels: Array = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _refused(step: DecodeImage, problem: str) -> MeshError:
    return MeshError(Code.INVALID_REQUEST, f"The image in input {step.source} {problem}.")
