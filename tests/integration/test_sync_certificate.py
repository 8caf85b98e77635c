"""The sync process shows its own certificate to every node: it makes a new one in time, and shows it at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509

from model_sync.publisher.keys import init_keys
from nearcast.identity import CertificateAuthority, client_tls, make_csr
from nearcast.identity.files import write_file

WAIT_S = 20.0
DAY_S = 86_400


def shown_certificate(url: str, ca: Path) -> bytes:
    """The DER certificate of whoever listens, verified."""
    host, port = url.removeprefix("https://").rsplit(":", 1)
    context = client_tls(None, ca=ca, alpn=("http/1.1",))
    with socket.create_connection((host, int(port)), WAIT_S) as tcp, context.wrap_socket(tcp) as tls:
        found = tls.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_it_is_renewed_while_the_process_runs(tmp_path: Path) -> None:
    tomorrow = time.time() + DAY_S
    init_keys(tmp_path)
    home = tmp_path / "sync"
    command = [sys.executable, "-m", "nearcast", "sync", "--home", str(home)]
    settings = ["--set=refresh_s=0.1", "--set=telemetry.level=error"]
    process = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["control"]
        ca = home / "ca" / "ca.pem"
        first = shown = shown_certificate(url, ca)
        # A certificate whose life is almost over takes the place of the fresh one.
        key, csr = make_csr("sync", "sync")
        pem = CertificateAuthority.load(home / "ca").issue(csr, name="sync", role="sync", lifetime_s=3.0)
        write_file(home / "identity" / "node.key", key, mode=0o600)
        write_file(home / "identity" / "node.pem", pem)
        ends_at = time.monotonic() + WAIT_S
        while shown == first or x509.load_der_x509_certificate(shown).not_valid_after_utc.timestamp() < tomorrow:
            assert time.monotonic() < ends_at
            time.sleep(0.02)
            shown = shown_certificate(url, ca)
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
