"""The steps around a model against references of their own: Pillow, plain numpy, or the way back."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from model_sync.publisher.bundle import read_spec
from model_sync.publisher.fetch import CATALOGUE
from nearcast.errors import Code, MeshError
from nearcast.serving.pipeline.boxes import detect_boxes, make_anchors, suppress
from nearcast.serving.pipeline.images import decode_image, resize_image
from nearcast.serving.pipeline.numbers import name_classes, normalise, softmax, top_k
from nearcast.store.steps import AnchorGrid, DecodeImage, DetectBoxes, Normalise, Resize

DECODE = DecodeImage(source="image", target="pixels")
LOGITS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-60, 60, width=32))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def refused(match: str) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is Code.INVALID_REQUEST)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_every_format_gives_the_pixels_that_pillow_reads(kind: str) -> None:
    data = encode(noise(20, 30), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode_image(DECODE, data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_whatever_way_the_camera_was_held(orientation: int) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 255
    back = {2: "fliplr", 3: "180", 4: "flipud", 5: "transpose", 6: "ccw", 7: "transverse", 8: "cw"}.get(orientation, "")
    stored = {
        "": lambda a: a,
        "fliplr": np.fliplr,
        "flipud": np.flipud,
        "180": lambda a: np.rot90(a, 2),
        "transpose": lambda a: a.transpose(1, 0, 2),
        "ccw": lambda a: np.rot90(a, 1),
        "cw": lambda a: np.rot90(a, -1),
        "transverse": lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    }[back](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decode_image(DECODE, data), upright)


def test_what_is_no_such_image_is_refused_in_words() -> None:
    jpeg = encode(noise(64, 64), "JPEG")
    for data, match in (
        (b"", "is no jpeg, png, webp file"),
        (b"GIF89a" + bytes(64), "is no jpeg, png, webp file"),
        (encode(noise(8, 8), "GIF"), "is no jpeg"),
        (jpeg[: len(jpeg) // 2], "damaged or cut off jpeg"),
        (encode(Image.new("I;16", (4, 4))), "pixel format I;16"),
    ):
        with refused(match):
            decode_image(DECODE, data)
    with refused("is no png file"):
        decode_image(DecodeImage(source="image", target="pixels", formats=("png",)), jpeg)


def test_a_bomb_is_refused_by_its_header() -> None:
    # 30 kB that would be 900 MB: more than Pillow itself warns of.
    data = bytearray(encode(Image.new("L", (8, 8))))
    data[16:24] = (17_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    with refused("17000 x 17000 pixels|is no jpeg"):
        decode_image(DECODE, bytes(data))
    with refused(r"has 20 x 20 pixels, more than 399 in all"):
        decode_image(DecodeImage(source="image", target="pixels", pixels_max=399), encode(Image.new("L", (20, 20))))


@given(st.binary(max_size=80), st.integers(0, 400), st.sampled_from(["JPEG", "PNG", "WEBP"]))
@settings(max_examples=25, deadline=None)
def test_no_bytes_make_the_decoder_fail_in_another_way(junk: bytes, at: int, kind: str) -> None:
    data = encode(noise(9, 9), kind)
    for bent in (junk, data[:at] + junk + data[at + len(junk) :]):
        try:
            assert decode_image(DECODE, bent).mode == "RGB"
        except MeshError as error:
            assert error.code is Code.INVALID_REQUEST


def test_area_is_the_mean_and_bilinear_a_triangle_as_wide_as_the_scale() -> None:
    image = noise(24, 36)
    pixels = np.asarray(image, np.float64)
    area, _ = resize_image(Resize(tensor="x", width=12, height=8, filter="area"), image)
    assert np.abs(area - pixels.reshape(8, 3, 12, 3, 3).mean(axis=(1, 3))).max() <= 1
    bilinear, _ = resize_image(Resize(tensor="x", width=12, height=8), image)

    def weights(size: int, wanted: int) -> Any:
        scale = size / wanted
        middles = (np.arange(wanted) + 0.5) * scale
        found = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - middles[:, None]) / max(1.0, scale))
        return found / found.sum(axis=1, keepdims=True)

    expected = np.einsum("yh,xw,hwc->yxc", weights(24, 8), weights(36, 12), pixels)
    assert np.abs(bilinear - expected).max() <= 1.01


@given(st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=20, deadline=None)
def test_a_letterbox_keeps_the_shape_of_the_image_and_says_where_it_is(width: int, height: int) -> None:
    step = Resize(tensor="x", width=32, height=16, fit="letterbox", pad=7)
    pixels, (left, top, wide, high) = resize_image(step, Image.new("RGB", (width, height), (200, 200, 200)))
    inside = np.zeros((16, 32), bool)
    rows = slice(round(top * 16), round((top + high) * 16))
    inside[rows, round(left * 32) : round((left + wide) * 32)] = True
    assert (pixels[inside] == 200).all()
    assert (pixels[~inside] == 7).all()
    assert abs(wide * 32 - min(32, width * 16 / height)) <= 1


def test_normalise_is_per_channel() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    step = Normalise(tensor="x", mean=(1.0, 2.0, 3.0), scale=(0.5, 2.0, 1.0))
    assert np.array_equal(normalise(step, pixels), (pixels - np.array([1.0, 2, 3])) * np.array([0.5, 2, 1]))
    half = normalise(Normalise(tensor="x", scale=(1 / 255,), datatype="FP16"), pixels)
    assert half.dtype == np.float16


@settings(max_examples=40)
@given(LOGITS)
def test_softmax_sums_to_one_and_keeps_the_order(logits: Any) -> None:
    shares = softmax(logits)
    exact = np.exp(logits.astype(np.float64))
    assert np.allclose(shares, exact / exact.sum(axis=-1, keepdims=True), atol=1e-6)
    assert shares.dtype == np.float32


@settings(max_examples=40)
@given(LOGITS, st.integers(1, 9))
def test_top_k_is_what_sorting_gives(scores: Any, k: int) -> None:
    k = min(k, scores.shape[-1])
    values, classes = top_k(scores, k)
    for row, found, places in zip(scores, values, classes, strict=True):
        expected = sorted(range(len(row)), key=lambda index: (-row[index], index))[:k]
        assert places.tolist() == expected
        assert found.tolist() == row[expected].tolist()


def test_classes_get_their_names() -> None:
    classes = np.array([[0, 2, 5, -1]], np.int32)
    assert name_classes(classes, ("a", "b", "c")).tolist() == [[b"a", b"c", b"", b""]]
    assert name_classes(classes, ("a", "b", "c"), np.array([[True, False, True, True]])).tolist()[0][1] == b""


BOXES = arrays(np.float32, st.tuples(st.integers(1, 12), st.just(4)), elements=st.floats(0, 1, width=32))


@given(BOXES, st.data(), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_of_boxes_that_overlap_the_best_stays(corners: Any, data: Any, overlap_max: float) -> None:
    boxes = np.concatenate([np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1)
    classes = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(boxes), max_size=len(boxes))))

    def overlaps(a: Any, b: Any) -> bool:
        shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
        union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
        return bool(shared > np.float32(overlap_max) * union)

    kept: list[int] = []
    for index, box in enumerate(boxes):
        if not any(classes[index] == classes[k] and overlaps(boxes[k], box) for k in kept):
            kept.append(index)
    assert suppress(boxes, classes, overlap_max=np.float32(overlap_max), boxes_max=99) == kept
    assert suppress(boxes, classes, overlap_max=np.float32(overlap_max), boxes_max=2) == kept[:2]


@pytest.mark.parametrize("size_is_log", [True, False])
@pytest.mark.parametrize("order", ["yxhw", "xywh"])
def test_boxes_come_back_out_of_their_anchors_and_out_of_the_letterbox(order: str, size_is_log: bool) -> None:
    grids = (AnchorGrid(rows=4, columns=6, sizes=((0.2, 0.3), (0.5, 0.4))),)
    step = DetectBoxes(
        box_source="b", score_source="s", grids=grids, order=order, size_is_log=size_is_log, first_class=1, points=1,
        boxes_max=3, scales=(10.0, 8.0, 5.0, 4.0),
    )  # fmt: skip
    anchors = make_anchors(grids)
    assert anchors.shape == (48, 4)
    assert np.allclose(anchors[2 * (2 * 6 + 1)], [2.5 / 4, 1.5 / 6, 0.2, 0.3])
    wanted = {5: (0.2, 0.3, 0.4, 0.7), 40: (0.5, 0.1, 0.9, 0.3)}
    raw, scores = np.zeros((1, 48, 6), np.float32), np.full((1, 48, 3), -9.0, np.float32)
    for index, (top, left, bottom, right) in wanted.items():
        y, x, h, w = anchors[index]
        sizes = np.array([(bottom - top) / h, (right - left) / w])
        numbers = [
            ((top + bottom) / 2 - y) / h * 10, ((left + right) / 2 - x) / w * 8,
            *((np.log(sizes) if size_is_log else sizes) * (5, 4)),
        ]  # fmt: skip
        raw[0, index, :4] = numbers if order == "yxhw" else [numbers[at] for at in (1, 0, 3, 2)]
        raw[0, index, 4:] = [(left - x) / w * 8, (top - y) / h * 10]
        scores[0, index, 1 if index == 5 else 2] = 2.0 if index == 5 else 3.0
    scores[0, :, 0] = 50.0  # background
    frames = np.array([[0.1, 0.0, 0.8, 1.0]], np.float32)
    found = detect_boxes(step, anchors, raw, scores, frames)
    expected = [[t, (le - 0.1) / 0.8, b, (r - 0.1) / 0.8] for t, le, b, r in (wanted[40], wanted[5])]
    assert np.allclose(found.boxes[0], [*expected, [0, 0, 0, 0]], atol=1e-5)
    assert found.classes.tolist() == [[2, 1, 0]]
    assert np.allclose(found.scores[0], [1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-2)), 0])
    assert np.allclose(found.points[0, 0, 0], expected[0][:2], atol=1e-5)


def test_the_catalogues_detectors_have_the_anchors_that_their_models_have() -> None:
    for name, anchors in (("blazeface", 896), ("ssd-mobilenetv2", 1917)):
        spec = read_spec(CATALOGUE / name / "bundle.toml")
        (step,) = spec.pipeline.after  # type: ignore[union-attr]
        assert isinstance(step, DetectBoxes)
        assert len(make_anchors(step.grids)) == anchors
