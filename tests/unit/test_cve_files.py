"""Pickles, archives and TFLite files of the kinds behind published vulnerabilities; under any name they are refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pymicro_wakeword
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.serving.formats import MODEL_SIZE_BYTES_MAX, require_format
from nearcast.serving.formats.foreign import find_foreign
from nearcast.serving.formats.safetensors import check_safetensors
from nearcast.serving.formats.tflite import check_tflite
from nearcast.store.contents import Contents
from nearcast.store.manifest import CHUNK_SIZE_BYTES, decode_manifest
from tests.tiny_models import affine_model, tensor, write_version

WAKE_WORD = (Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite").read_bytes()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def refused(match: str) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is Code.UNTRUSTED)


def zipped(name: str = "data.pkl", data: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def tarred(name: str = "../../evil") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def torch_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def broken_crc() -> bytes:
    data = bytearray(zipped(data=pickle.dumps(Evil())))
    data[14] ^= 0xFF
    return bytes(data)


def two_names() -> bytes:
    """The local header says another name than the directory at the end."""
    return zipped("data.pkl").replace(b"data.pkl", b"data.txt", 1)


FOREIGN = {
    "cve_2025_1550_cve_2025_8747_cve_2025_49655_keras": zipped("config.json", b'{"class_name": "Lambda"}'),
    "cve_2025_1550_keras_h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "torch": torch_file(),
    "cve_2025_10155_pickle": pickle.dumps(Evil()),
    "cve_2025_10156_zip_crc": broken_crc(),
    "cve_2025_1944_zip_name": two_names(),
    "ghsa_w8jq_xcqf_f792_pickle_cut_off": pickle.dumps(Evil())[:-1],
    "ghsa_w8jq_xcqf_f792_pickle_then_junk": pickle.dumps(Evil())[:-1] + b"\xff\xfe",
    "modelscan_354_pickle_of_text": b"cbuiltins\nprint\n(S'executed'\ntR.",
    "modelscan_338_pickle_of_text_cut_off": b"cbuiltins\nprint\n(S'executed'\ntR",
    "modelscan_263_npy": b"\x93NUMPY\x01\x00" + bytes(64),
    "cve_2007_4559_tar": tarred(),
    "gzip_bomb": gzip.compress(bytes(1_000_000)),
    "zip_bomb": zipped("zeros", bytes(1_000_000)),
    "zstd_bomb": zstd.compress(bytes(1_000_000)),
    "xz": lzma.compress(b"x"),
    "bzip2": bz2.compress(b"x"),
    "program": b"\x7fELF" + bytes(64),
    "script": b"#!/bin/sh\nrm -rf /\n",
    "zip_behind_text": b"only notes\n" + zipped(),
}


@pytest.mark.parametrize("name", ["notes.txt", "data.json", "weights.bin", "model.safetensors", "labels"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_holds_code_or_unpacks_is_refused_under_any_name(tmp_path: Path, kind: str, name: str) -> None:
    manifest = write_version(tmp_path, affine_model(), extra={name: FOREIGN[kind]})
    with refused(f"The file {name} is refused"):
        require_format(Contents(manifest, tmp_path))
    assert find_foreign(FOREIGN[kind])


@pytest.mark.parametrize("engine", ["onnxruntime", "litert"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_and_as_the_model_itself(tmp_path: Path, kind: str, engine: str) -> None:
    manifest = write_version(tmp_path, FOREIGN[kind], engine=engine)
    with refused("is no (ONNX|TFLite) model"):
        require_format(Contents(manifest, tmp_path))


def test_the_end_of_an_archive_that_lists_nothing_and_numbers_that_begin_like_a_pickle_are_neither() -> None:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    assert not find_foreign(b"a model" + buffer.getvalue())
    assert find_foreign(b"a model" + zipped() + buffer.getvalue()[:-2] + b"\1\0x")
    assert find_foreign(b"a model" + b"PK\x06\x07" + bytes(16) + buffer.getvalue())
    assert not find_foreign(np.frombuffer(b"import os\n\ndef f(): pass", np.uint8).astype(np.int32).tobytes())


def test_and_as_what_the_golden_vectors_use(tmp_path: Path) -> None:
    x = np.frombuffer(FOREIGN["torch"] + bytes(-len(FOREIGN["torch"]) % 16), np.float32).reshape(-1, 4)
    manifest = write_version(tmp_path, affine_model(), golden=(({"x": x}, {"y": x}),))
    with refused(r"The file golden\.bin is refused: it is a zip archive"):
        require_format(Contents(manifest, tmp_path))


@pytest.mark.parametrize(
    "text",
    [b"", b"clear notes\nfor all\n", "Grüße, 世界\n".encode(), b"(c) 2026\n", b".", b"c\nn\n"],
)  # fmt: skip
def test_text_passes(tmp_path: Path, text: bytes) -> None:
    manifest = write_version(tmp_path, affine_model(), extra={"notes.txt": text})
    require_format(Contents(manifest, tmp_path))


def test_what_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(7).bytes(256)
    for name, data, match in (
        ("weights.bin", noise, "neither text nor safetensors"),
        ("notes.txt", b"a\0b", "neither text"),
        ("labels.json", b"{", "it is no JSON"),
        ("labels.json", b"[" * 100_000, "it is no JSON"),
        ("labels.json", noise, "it is no JSON"),
    ):
        folder = tmp_path / str(hash((name, data)))
        manifest = write_version(folder, affine_model(), extra={name: data})
        with refused(match):
            require_format(Contents(manifest, folder))


@given(st.binary(max_size=512))
def test_no_bytes_break_the_look_for_pickles(data: bytes) -> None:
    assert isinstance(find_foreign(data), str)
    assert find_foreign(b"\x80\x04" + data) in ("", "a pickle", "a zip archive", "a tar archive")


# -- safetensors ----------------------------------------------------------------------


def safetensors(header: Any, body: bytes = bytes(8), size_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size_bytes is None else size_bytes) + text + body


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [start, end]}


def test_safetensors_within_bounds_pass(tmp_path: Path) -> None:
    good = safetensors({"__metadata__": {"by": "us"}, "a": entry(0, 4), "b": entry(4, 8)})
    check_safetensors(good)
    manifest = write_version(tmp_path, affine_model(), extra={"extra.safetensors": good})
    require_format(Contents(manifest, tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"a": entry(0, 4)}),
        safetensors({"a": entry(0, 4), "b": entry(0, 4)}),
        safetensors({"a": entry(0, 8)}),
        safetensors({"a": entry(0, 12, [3])}),
        safetensors({"a": entry(-4, 8, [3])}),
        safetensors({"a": entry(8, 0, [2])}),
        safetensors({"a": entry(0, 8, [2**62, 2**62])}),
        safetensors({"a": entry(0, 8, [-1, -2])}),
        safetensors({"a": entry(0, 8, [2], "OBJECT")}),
        safetensors({"a": {"dtype": "F32"}}),
        safetensors({"a": entry(0, True, [2])}),
        safetensors(b'{"a": 1, "a": 2}'),
        safetensors(b"[1]"),
        safetensors(b"{" * 100_000),
        safetensors({"a": entry(0, 8, [2])}, size_bytes=2**64 - 1),
        safetensors({"a": entry(0, 8, [2])}, size_bytes=2**63),
        safetensors({"a": entry(0, 8, [2])}, size_bytes=2**32),
    ],
)
def test_safetensors_beyond_their_bounds_are_refused(data: bytes) -> None:
    with refused("its (header|tensors)"):
        check_safetensors(data)


# -- TFLite ---------------------------------------------------------------------------


def root(data: bytes) -> tuple[int, int]:
    at = struct.unpack_from("<I", data, 0)[0]
    return at, at - struct.unpack_from("<i", data, at)[0]


def slot(data: bytes, table: int, index: int) -> int:
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size = struct.unpack_from("<H", data, vtable)[0]
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0] if 4 + 2 * index < size else 0
    return table + offset if offset else 0


def follow(data: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def tiny_tflite(offset: int = 0, size: int = 0, *, buffer: int = 0, options: tuple[int, int] = (0, 0)) -> bytes:
    """One graph, one tensor, one operator, one buffer with a 64-bit range; made with the FlatBuffers library."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    data, code, tensor_ = schema.BufferT(), schema.OperatorCodeT(), schema.TensorT()
    data.offset, data.size = offset, size
    tensor_.shape, tensor_.buffer, tensor_.name = [1], buffer, b"t"
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = [0], [0]
    operator.largeCustomOptionsOffset, operator.largeCustomOptionsSize = options
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [tensor_], [0], [0], [operator]
    model = schema.ModelT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [data], [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_real_tflite_models_pass() -> None:
    check_tflite(WAKE_WORD)
    check_tflite(tiny_tflite())
    check_tflite(tiny_tflite(offset=8, size=16))


@pytest.mark.parametrize(
    ("offset", "size"),
    [(2**64 - 8, 16), (2**64 - 1, 2**64 - 1), (8, 2**64 - 8), (2**32, 0), (2**63, 2**63), (2**31, 2**31), (8, 2**32)],
)
def test_a_64_bit_range_beyond_the_file_is_refused_and_does_not_wrap(offset: int, size: int) -> None:
    """The sum of the first ones is small in 64 (or 32) bits."""
    with refused("the range of a buffer leads out"):
        check_tflite(tiny_tflite(offset, size))
    with refused("the range of an operator's options"):
        check_tflite(tiny_tflite(options=(offset, size)))


def test_cve_2018_8825_pysec_2020_134_cve_2022_23560_indices_stay_in_their_lists() -> None:
    with refused("an index of a tensor's buffer"):
        check_tflite(tiny_tflite(buffer=1))
    with refused("an index of a tensor's buffer"):
        check_tflite(tiny_tflite(buffer=2**32 - 1))


def test_weights_in_other_files_are_refused() -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(tiny_tflite(), 0))
    group = schema.ExternalBufferGroupT()
    group.name = b"../../etc/passwd"
    model.externalBufferGroups = [group]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    with refused("takes weights from other files"):
        check_tflite(bytes(builder.Output()))


@pytest.mark.parametrize("size_bytes", [0, 4, 7, 8, 12, 64, 1000])
def test_a_file_that_is_cut_off_is_refused(size_bytes: int) -> None:
    with refused("."):
        check_tflite(WAKE_WORD[:size_bytes])


@given(st.integers(0, len(WAKE_WORD) // 4 - 1), st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC]))
def test_no_changed_word_breaks_the_verifier(word: int, value: int) -> None:
    data = bytearray(WAKE_WORD)
    struct.pack_into("<I", data, 4 * word, value)
    try:
        check_tflite(bytes(data))
    except MeshError as error:
        assert error.code is Code.UNTRUSTED


def test_an_offset_that_leads_out_is_refused() -> None:
    data = bytearray(WAKE_WORD)
    table, _ = root(WAKE_WORD)
    buffers = slot(WAKE_WORD, table, 4)
    struct.pack_into("<I", data, buffers, 0x7FFFFFF0)
    with refused("leads out of the file"):
        check_tflite(bytes(data))
    data = bytearray(WAKE_WORD)
    struct.pack_into("<I", data, follow(WAKE_WORD, buffers), 0xFFFFFFFF)
    with refused("leads out of the file"):
        check_tflite(bytes(data))


# -- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**33 + 1])
def test_cve_2026_34155_sizes_at_2_and_4_gib_are_counted_whole(tmp_path: Path, size_bytes: int) -> None:
    """Each byte has a chunk whose digest is signed, so a size that a smaller integer would cut is no way around it."""
    manifest = write_version(tmp_path, affine_model())
    raw = json.loads(manifest.encode())
    chunks = -(-size_bytes // CHUNK_SIZE_BYTES)
    raw["files"][0] |= {"size_bytes": size_bytes, "chunks": ["0" * 64] * chunks}
    assert decode_manifest(json.dumps(raw).encode()).files[0].size_bytes == size_bytes
    for wrong in (size_bytes % 2**31 // CHUNK_SIZE_BYTES, chunks - 1, chunks + 1):
        raw["files"][0]["chunks"] = ["0" * 64] * wrong
        with refused("does not fit its size"):
            decode_manifest(json.dumps(raw).encode())


def test_cve_2023_46228_a_file_of_another_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    manifest = write_version(tmp_path, affine_model(), inputs=(tensor("x", "FP32", (-1, 4)),))
    raw = json.loads(manifest.encode())
    size_bytes = MODEL_SIZE_BYTES_MAX + 1
    raw["files"][0] |= {"size_bytes": size_bytes, "chunks": ["0" * 64] * (-(-size_bytes // CHUNK_SIZE_BYTES))}
    described = decode_manifest(json.dumps(raw).encode())
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(size_bytes)  # sparse
    with refused(f"larger than {MODEL_SIZE_BYTES_MAX} bytes"):
        require_format(Contents(described, tmp_path))
    with refused("has not the size"):
        Contents(manifest, tmp_path).read("model.onnx")
