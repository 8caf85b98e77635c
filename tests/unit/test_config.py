from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.config import ConfigError, load_config
from nearcast.errors import Code
from nearcast.runtime import ExitCode, exit_code


class Listeners(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    grpc: str = "127.0.0.1:8001"
    http: str = "127.0.0.1:8000"


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    queue_max: Annotated[int, msgspec.Meta(ge=1)] = 64
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        if self.drain_s > 60:
            raise ValueError("drain_s must be at most 60")


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str = ""


class AppConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str = "edge-1"
    folder: Path = Path("data")
    tls: bool = False
    transport: Literal["ngh2", "grpcio"] = "ngh2"
    models: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    cloud: str | None = None
    listeners: Listeners = Listeners()
    limits: Limits = Limits(drain_s=3.0)
    fallback: Limits | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "mesh.toml"
    path.write_text(text)
    return path


def test_defaults_alone_are_the_struct_itself() -> None:
    loaded = load_config(AppConfig, environ={})
    assert loaded.value == AppConfig()
    assert load_config(AppConfig, environ={"NEARCAST_HOME": "/root", "PATH": "/bin"}).value == AppConfig()
    assert {row.origin for row in loaded.rows()} == {"default"}


def test_later_layers_win_and_each_value_knows_its_origin(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "from-file"\n[listeners]\ngrpc = "127.0.0.1:1"\nhttp = "127.0.0.1:2"\n[limits]\nqueue_max = 1\n',
    )
    loaded = load_config(
        AppConfig,
        path=path,
        environ={"NEARCAST_LISTENERS__GRPC": "127.0.0.1:3", "NEARCAST_LIMITS__QUEUE_MAX": "2", "HOME": "/root"},
        overrides=["limits.queue_max=3"],
    )
    assert loaded.value.listeners == Listeners(grpc="127.0.0.1:3", http="127.0.0.1:2")
    assert loaded.value.limits == Limits(queue_max=3, drain_s=3.0), "what is not set keeps the section's own default"
    assert loaded.origin("name") == str(path)
    assert loaded.origin("listeners.grpc") == "environment NEARCAST_LISTENERS__GRPC"
    assert loaded.origin("limits.queue_max") == "--set"
    assert loaded.origin("limits.drain_s") == "default"


def test_text_is_read_by_the_type_of_its_target() -> None:
    loaded = load_config(
        AppConfig,
        environ={"NEARCAST_TLS": "true", "NEARCAST_FOLDER": "/var/lib/nearcast", "NEARCAST_NAME": "7"},
        overrides=['models=["digits", "vad"]', 'peers=[{name="b"}]', "cloud=10.0.0.1:8001", "limits.drain_s=2"],
    )
    value = loaded.value
    assert value.tls is True
    assert value.folder == Path("/var/lib/nearcast")
    assert value.name == "7"
    assert value.models == ("digits", "vad")
    assert value.peers == (Peer(name="b"),)
    assert value.cloud == "10.0.0.1:8001"
    assert value.limits.drain_s == 2.0


def test_an_optional_section_starts_from_its_own_defaults(tmp_path: Path) -> None:
    assert load_config(
        AppConfig, path=write(tmp_path, "[fallback]\nqueue_max = 9\n"), environ={}
    ).value.fallback == Limits(queue_max=9)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('nmae = "x"', ["mesh.toml", "`nmae`", "`name`"]),
        ("[limits]\nqueue_mx = 3", ["mesh.toml", "`limits.queue_mx`", "`limits.queue_max`"]),
        ("listeners = 3", ["`listeners` is a section"]),
        ("[limits]\nqueue_max = 0", ["mesh.toml", "`limits.queue_max`", ">= 1"]),
        ('[limits]\nqueue_max = "3"', ["mesh.toml", "`limits.queue_max`", "Expected `int`"]),
        ("folder = 3", ["`folder`", "path"]),
        ("[limits]\ndrain_s = 61.0", ["`limits.drain_s`", "at most 60"]),
        ('transport = "http3"', ["`transport`", "http3"]),
        ("name = \nx = 1", ["not valid TOML", "line 1"]),
        ('[[peers]]\nnmae = "x"', ["`peers`", "nmae"]),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(AppConfig, path=write(tmp_path, text), environ={})
    assert caught.value.code is Code.INVALID_REQUEST
    assert exit_code(caught.value) is ExitCode.CONFIG
    for part in parts:
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("environ", "overrides", "parts"),
    [
        ({"NEARCAST_LIMITS__QUEUE_MX": "1"}, [], ["environment NEARCAST_LIMITS__QUEUE_MX", "`limits.queue_max`"]),
        ({"NEARCAST_LIMITS": "1"}, [], ["`limits` is a section", "limits.queue_max"]),
        ({"NEARCAST_NAME__FIRST": "x"}, [], ["`name.first`", "is a value, not a section"]),
        ({}, ["limits.queue_max"], ["section.key=value"]),
        ({}, ["queue_max=3"], ["--set", "`queue_max`", "`limits.queue_max`"]),
        ({}, ["limits.queue_max=many"], ["--set", "`limits.queue_max`"]),
        ({}, ["=3"], ["--set", "unknown key"]),
    ],
)
def test_a_bad_override_names_its_place(environ: dict[str, str], overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(AppConfig, environ=environ, overrides=overrides)
    for part in parts:
        assert part in caught.value.message


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        load_config(AppConfig, path=tmp_path / "absent.toml", environ={})


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_override_raises_anything_but_a_config_error(key: str, value: str) -> None:
    try:
        loaded = load_config(AppConfig, environ={f"NEARCAST_{key}": value}, overrides=[f"{key}={value}"])
    except ConfigError as error:
        assert error.message
    else:
        assert loaded.origin(key.strip()) == "--set"
