from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.runtime import (
    ExitCode,
    announce,
    exit_code,
    format_address,
    is_loopback,
    listen_error,
    parse_address,
    require_tls,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:8001", "localhost", 8001),
        ("[::1]:65535", "::1", 65535),
        ("unix:/run/x.sock", "unix:/run/x.sock", 0),
    ],
)
def test_addresses_survive_the_round_trip(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == (host, port)
    assert str(address) == format_address(host, port) == text


@pytest.mark.parametrize("text", ["", "8001", ":8001", "host:", "host:-1", "host:65536", "::1:80", "host:٣", "unix:"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(MeshError) as caught:
        parse_address(text)
    assert caught.value.code is Code.INVALID_REQUEST


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_clear_error(text: str) -> None:
    try:
        address = parse_address(text)
    except MeshError as error:
        assert error.code is Code.INVALID_REQUEST
    else:
        assert parse_address(str(address)) == address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "unix:/run/x"])
def test_loopback_needs_no_certificates(host: str) -> None:
    assert is_loopback(host)
    require_tls(format_address(host, 1), tls_present=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "fe80::1%eth0"])
def test_any_other_listener_needs_certificates(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(MeshError, match="no certificates"):
        require_tls(format_address(host, 8001), tls_present=False)
    require_tls(format_address(host, 8001), tls_present=True)


def test_a_failed_bind_names_the_address() -> None:
    error = listen_error(OSError(errno.EADDRINUSE, "Address already in use"), "127.0.0.1:8001")
    assert error.code is Code.UNAVAILABLE
    assert "127.0.0.1:8001 is in use" in error.message
    assert listen_error(OSError(errno.EACCES, "denied"), "127.0.0.1:80").code is Code.FORBIDDEN


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_an_exit_code_that_is_no_success(code: Code) -> None:
    assert exit_code(MeshError(code, "x")) not in (ExitCode.OK, ExitCode.FAILED)


def test_a_ready_process_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    announce("edge-1", grpc="127.0.0.1:8001", http="127.0.0.1:8000")
    assert json.loads(capsys.readouterr().out) == {
        "ready": "edge-1",
        "grpc": "127.0.0.1:8001",
        "http": "127.0.0.1:8000",
    }
