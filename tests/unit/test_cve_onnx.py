"""ONNX models of the kinds behind published vulnerabilities; each is refused before any runtime sees it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nearcast.errors import Code, MeshError
from nearcast.serving.formats import onnx as onnx_format
from nearcast.serving.formats import require_format
from nearcast.serving.formats.onnx import DEPTH_MAX, check_onnx
from nearcast.store.contents import Contents
from tests.tiny_models import affine_model, write_version

WEIGHTS = np.array([2.0], np.float32).tobytes()


def external(**entries: str) -> bytes:
    """y = s * x, with s from another file."""
    weights = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weights.external_data.add(key=key, value=value)
    return model([helper.make_node("Mul", ["x", "s"], ["y"])], [weights])


def model(nodes: list[Any], weights: list[Any], functions: list[Any] | None = None) -> bytes:
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", specs[:1], specs[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions or [])
    data: bytes = made.SerializeToString()
    return data


def require(folder: Path, data: bytes, **files: bytes) -> None:
    manifest = write_version(folder, data, extra={name.replace("_", "."): content for name, content in files.items()})
    require_format(Contents(manifest, folder))


def refused(match: str) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is Code.UNTRUSTED)


def test_what_is_meant_passes(tmp_path: Path) -> None:
    require(tmp_path / "one", external(location="w.bin"), w_bin=WEIGHTS)
    require(tmp_path / "two", external(location="w.bin", offset="4", length="4"), w_bin=WEIGHTS * 2)
    require(tmp_path / "three", external(location="w.bin", checksum="0" * 40), w_bin=WEIGHTS)


@pytest.mark.parametrize(
    "location",
    [
        "../w.bin", "a/../../w.bin", "/etc/passwd", "..", ".", "", "a/b.bin", "C:\\w.bin", "..\\w.bin", "w.bin\0",
        "%2e%2e/w", "w.bin\n",
        "file:///etc/passwd", "*/_ORT_MEM_ADDR_/*", "w.bin ", " w.bin", "\uff57.bin", "missing.bin", "model.onnx",
    ],
)  # fmt: skip
def test_cve_2022_25882_cve_2024_27318_cve_2024_5187_cve_2025_51480_no_path_leads_out(
    tmp_path: Path, location: str
) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHTS)
    with refused("which is no file of its manifest"):
        require(tmp_path / "version", external(location=location), w_bin=WEIGHTS)


@pytest.mark.parametrize("make", ["symlink", "hardlink", "fifo", "folder"])
def test_cve_2026_27489_links_are_no_files_of_a_version(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "version"
    manifest = write_version(folder, external(location="w.bin"), extra={"w.bin": WEIGHTS})
    path = folder / "w.bin"
    path.rename(tmp_path / "secret")
    {
        "symlink": lambda: path.symlink_to(tmp_path / "secret"),
        "hardlink": lambda: path.hardlink_to(tmp_path / "secret"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[make]()
    with refused("no regular file|is a hard link"):
        require_format(Contents(manifest, folder))


@pytest.mark.parametrize(
    ("offset", "length"),
    [("0", "5"), ("4", "1"), ("5", "0"), (str(2**63), "4"), (str(2**63 - 1), "9"), (str(2**64 - 4), "8")],
)
def test_cve_2026_34445_a_range_beyond_the_file_is_refused_and_does_not_wrap(
    tmp_path: Path, offset: str, length: str
) -> None:
    with refused("from beyond the end of w.bin|at no number"):
        require(tmp_path, external(location="w.bin", offset=offset, length=length), w_bin=WEIGHTS)


@pytest.mark.parametrize("value", ["-1", "0x4", "4.0", "1e9", "", " 4", "\uff14", "9" * 20])
def test_cve_2026_34445_what_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    for entry in ("offset", "length"):
        with refused("at no number"):
            require(tmp_path / entry, external(location="w.bin", **{entry: value}), w_bin=WEIGHTS)


@pytest.mark.parametrize("key", ["basepath", "__class__", "file_path", "Location", "location\0", "length "])
def test_cve_2026_34445_unknown_keys_are_refused(tmp_path: Path, key: str) -> None:
    with refused("other keys than a location"):
        require(tmp_path, external(**{"location": "w.bin", key: "1"}), w_bin=WEIGHTS)


def test_cve_2026_34445_keys_come_once(tmp_path: Path) -> None:
    twice = onnx.load_from_string(external(location="w.bin"))
    twice.graph.initializer[0].external_data.add(key="location", value="../w.bin")
    with refused("once each"):
        require(tmp_path / "twice", twice.SerializeToString(), w_bin=WEIGHTS)
    with refused("other keys than a location"):
        require(tmp_path / "none", external(), w_bin=WEIGHTS)


@pytest.mark.parametrize("dims", [[2**62], [2**32, 2**32], [2**33, 2], [-1], [2**40, 0, 1]])
def test_cve_2026_34445_a_tensor_of_huge_size_is_refused(dims: list[int]) -> None:
    weights = TensorProto(name="s", data_type=TensorProto.FLOAT, dims=dims)
    with refused("a tensor has more than"):
        check_onnx(model([helper.make_node("Mul", ["x", "s"], ["y"])], [weights]))


def function(name: str, calls: list[str]) -> Any:
    nodes = [helper.make_node(call, ["a"], ["b"], domain="own" if call.startswith("f") else "") for call in calls]
    return helper.make_function("own", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])


def test_cve_2026_34445_functions_that_unroll_for_ever_are_refused() -> None:
    call = [helper.make_node("f0", ["x"], ["y"], domain="own")]
    doubling = [function(f"f{index}", [f"f{index + 1}"] * 2) for index in range(40)] + [function("f40", ["Relu"])]
    with refused("unroll to more than"):
        check_onnx(model(call, [], doubling))
    with refused("in a circle"):
        check_onnx(model(call, [], [function("f0", ["f1"]), function("f1", ["f0"])]))
    with refused("a function twice"):
        check_onnx(model(call, [], [function("f0", ["Relu"]), function("f0", ["Relu"])]))
    chain = [function(f"f{index}", [f"f{index + 1}"]) for index in range(DEPTH_MAX + 2)]
    with refused("deep, or in a circle"):
        check_onnx(model(call, [], chain))
    check_onnx(model(call, [], [function("f0", ["f1", "Relu"]), function("f1", ["Relu"])]))


def test_cve_2026_34445_a_bomb_of_nodes_or_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model([helper.make_node("Relu", ["x"], [f"r{index}"]) for index in range(50)], [])
    check_onnx(data)
    monkeypatch.setattr(onnx_format, "NODES_MAX", 49)
    with refused("unroll to more than 49 nodes"):
        check_onnx(data)
    monkeypatch.setattr(onnx_format, "FIELDS_MAX", 100)
    with refused("more than 100 fields"):
        check_onnx(data)


def test_cve_2026_28500_only_files_of_the_version_are_models(tmp_path: Path) -> None:
    """Nothing is ever loaded by name from a hub: a model file is one that the signed manifest lists."""
    manifest = write_version(tmp_path, affine_model())
    with pytest.raises(KeyError):
        Contents(manifest, tmp_path).read("hub:resnet50")


def test_an_unknown_field_of_the_model_or_an_archive_behind_it_is_refused(tmp_path: Path) -> None:
    with refused("the unknown field 99"):
        check_onnx(affine_model() + bytes([0x9A, 0x06, 0x01, 0x00]))
    stub = b"PK\x05\x06" + bytes(4) + bytes([1, 0, 1, 0]) + bytes(10)
    hidden = onnx.load_from_string(affine_model())
    hidden.doc_string = "x"
    data = hidden.SerializeToString() + bytes([6 << 3 | 2, len(stub)]) + stub
    with refused("it is a zip archive"):
        require(tmp_path, data)
