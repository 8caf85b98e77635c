"""The join token: one use, expiring, and enough to know the controller before anything it says is believed."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Annotated, Final

import msgspec

from nearcast.errors import Code, MeshError

TOKEN_SIZE_BYTES_MAX: Final = 4096
INVITE_AGAIN: Final = "run `nearcast nodes invite` again and use the new token"

_STANDARD_INPUT: Final = 0

_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class JoinToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `nearcast nodes invite` prints.

    Attributes:
        control: base URL of the controller, https.
        ca_sha256: fingerprint of the mesh's CA certificate (DER).
        root_sha256: digest of the TUF root metadata file.
        name: the node that is invited.
        role: its role.
        secret: proves the invitation; good for one certificate.
        expires_at: wall-clock seconds since 1970.
    """

    control: Annotated[str, msgspec.Meta(pattern=r"^https://[^/\s]+\Z", max_length=512)]
    ca_sha256: _Digest
    root_sha256: _Digest
    name: str
    role: str
    secret: Annotated[str, msgspec.Meta(min_length=16, max_length=256)]
    expires_at: float

    def encode(self) -> str:
        """The token as text without spaces: URL-safe base64 of JSON."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """Read a token.

        Raises:
            MeshError: INVALID_REQUEST if the text is none, for example because a part is missing.
        """
        text = text.strip()
        try:
            if len(text) > TOKEN_SIZE_BYTES_MAX:
                raise ValueError("too long")
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            return msgspec.json.decode(data, type=cls)
        except (binascii.Error, ValueError, msgspec.DecodeError) as error:
            raise MeshError(
                Code.INVALID_REQUEST, f"The join token is damaged or incomplete; {INVITE_AGAIN}."
            ) from error


def read_token(given: str) -> str:
    """The token that a command line names: `@FILE`, `-` for a line of standard input, or the token itself. Blocks.

    Other users of the machine see a command line, and with it a token that stands in it.

    Raises:
        MeshError: INVALID_REQUEST if nothing can be read.
    """
    if given != "-" and not given.startswith("@"):
        return given
    try:
        line = _read_standard_input() if given == "-" else _read_file(Path(given[1:]))
    except (OSError, ValueError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The join token cannot be read: {error}.") from error
    if not line.strip():
        place = "Standard input" if given == "-" else given[1:]
        raise MeshError(Code.INVALID_REQUEST, f"{place} holds no join token; {INVITE_AGAIN}.")
    return line.strip()


def _read_file(path: Path) -> str:
    with path.open() as file:
        return file.read(TOKEN_SIZE_BYTES_MAX + 1)


def _read_standard_input() -> str:
    # Not through sys.stdin: its lock, held by a thread that waits for a terminal, would break the end of the process.
    line = bytearray()
    while b"\n" not in line and len(line) <= TOKEN_SIZE_BYTES_MAX:
        piece = os.read(_STANDARD_INPUT, TOKEN_SIZE_BYTES_MAX)
        if not piece:
            break
        line += piece
    return line.partition(b"\n")[0].decode()
