"""Where a private key is, and how to sign with it: a file, a PKCS#11 token, or what `securesystemslib` knows by URI.

```
root.pem                              a private key in a file, readable by its owner alone
alice.pub.pem                         a public key: the private half is in other hands
pkcs11:token=alice;object=root        an ECDSA key on a token; its library is named by PYKCS11LIB
awskms:alias/root#root.pub.pem        any other signer of securesystemslib, with the public key after the #
```
A PIN comes from the environment (PKCS11_PIN) or is asked for; it is never part of a command line.
"""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.signer import (  # type: ignore[attr-defined]
    SIGNER_FOR_URI_SCHEME,
    HSMSigner,
    Key,
    Signer,
    SSlibKey,
)

from model_sync.repository.signing_key import load_key
from nearcast.errors import Code, MeshError

PIN_VARIABLE = "PKCS11_PIN"
LIBRARY_VARIABLE = "PYKCS11LIB"
PKCS11_SCHEME = "pkcs11:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A key, and where its private half can be used; `uri` "" = only the public half is known here."""

    key: Key
    uri: str


def find_key(text: str) -> Place:
    """The key that a command names.

    Raises:
        MeshError: INVALID_REQUEST if it is no key, FORBIDDEN if it cannot be used, UNSUPPORTED without its library.
    """
    if text.startswith(PKCS11_SCHEME):
        return Place(key=_open_token(text).public_key, uri=text)
    uri, _, public = text.partition("#")
    if is_registered(uri):
        if not public:
            raise MeshError(Code.INVALID_REQUEST, f"{uri} needs its public key: {uri}#FILE, a PEM file.")
        return Place(key=_read_public(Path(public)), uri=uri)
    path = Path(text)
    try:
        is_private = b"PRIVATE KEY" in path.read_bytes()
    except OSError as error:
        raise MeshError(
            Code.INVALID_REQUEST, f"{text} is no key: it is neither a file, nor a pkcs11: or other known URI."
        ) from error
    if is_private:
        return Place(key=load_key(path).public_key, uri=str(path.resolve()))
    return Place(key=_read_public(path), uri="")


def open_signer(place: Place) -> Signer:
    """What signs with the private key at a place.

    Raises:
        MeshError: FORBIDDEN if it is not there, or is another key than the place says.
    """
    if not place.uri:
        raise MeshError(Code.FORBIDDEN, f"Of the key {place.key.keyid[:8]} only the public half is known here.")
    if place.uri.startswith(PKCS11_SCHEME):
        signer: Signer = _open_token(place.uri)
    elif is_registered(place.uri):
        try:
            signer = Signer.from_priv_key_uri(place.uri, place.key, ask_pin)
        except Exception as error:  # each signer raises errors of its own
            raise MeshError(Code.FORBIDDEN, f"The key {place.uri} cannot be used: {error}.") from error
    else:
        signer = load_key(Path(place.uri))
    if signer.public_key.keyid != place.key.keyid:
        raise MeshError(Code.FORBIDDEN, f"{place.uri} holds another key than {place.key.keyid[:8]} by now.")
    return signer


def is_registered(uri: str) -> bool:
    """Whether `securesystemslib` has a signer for the scheme of a URI; it may need an extra of that package."""
    scheme, colon, _ = uri.partition(":")
    return bool(colon) and scheme in SIGNER_FOR_URI_SCHEME


_pins: dict[str, str] = {}


def ask_pin(name: str) -> str:
    """The PIN of a token: from the environment, else asked for once.

    Raises:
        MeshError: UNAUTHENTICATED if there is nobody to ask.
    """
    if pin := os.environ.get(PIN_VARIABLE):
        return pin
    if name not in _pins:
        if not sys.stdin.isatty():
            raise MeshError(Code.UNAUTHENTICATED, f"The token needs its PIN ({name}); put it into {PIN_VARIABLE}.")
        _pins[name] = getpass.getpass(f"PIN of {name}: ")
    return _pins[name]


def parse_pkcs11(uri: str) -> dict[str, str]:
    """The attributes of a PKCS#11 URI (RFC 7512): `token`, and `object` or `id`.

    Raises:
        MeshError: INVALID_REQUEST if there are others, or too few. A PIN has no place in a URI.
    """
    path, _, query = uri.removeprefix(PKCS11_SCHEME).partition("?")
    pairs = [part.partition("=") for part in path.split(";")]
    found = {name: value for name, _, value in pairs}
    if query or not found.keys() <= {"token", "object", "id"} or "token" not in found or len(found) != 2:
        raise MeshError(
            Code.INVALID_REQUEST,
            f"{uri.partition('?')[0]!r} must look like pkcs11:token=NAME;object=LABEL (or ;id=%02); the library comes "
            f"from {LIBRARY_VARIABLE}, the PIN from {PIN_VARIABLE} or is asked for.",
        )
    return found


def _open_token(uri: str) -> HSMSigner:
    wanted = parse_pkcs11(uri)
    token = unquote(wanted["token"])
    if not os.environ.get(LIBRARY_VARIABLE):
        raise MeshError(
            Code.INVALID_REQUEST, f"Set {LIBRARY_VARIABLE} to the PKCS#11 library of the token {token}, a .so file."
        )
    try:
        import pkcs11
        from pkcs11.exceptions import PKCS11Error
    except ModuleNotFoundError as error:
        raise MeshError(Code.UNSUPPORTED, "Tokens need another package; run: pip install 'nearcast[hsm]'.") from error

    def ask(_: str) -> str:
        return ask_pin(f"token {token}")

    try:
        if "id" in wanted:
            number = int(unquote(wanted["id"], "latin-1").encode("latin-1").hex(), 16)
        else:
            slot = pkcs11.lib(os.environ[LIBRARY_VARIABLE]).get_token(token_label=token)
            with slot.open(user_pin=ask("")) as session:
                found = session.get_key(pkcs11.ObjectClass.PUBLIC_KEY, label=unquote(wanted["object"]))
                number = int.from_bytes(found.id, "big")
        _, key = HSMSigner.import_(number, token, ask)
        return HSMSigner(number, key, ask, token)
    except (PKCS11Error, ValueError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise MeshError(Code.FORBIDDEN, f"The key {uri} cannot be used: {reason}.") from error


def _read_public(path: Path) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise MeshError(Code.INVALID_REQUEST, f"{path} holds no key that can be read; keys are PEM files.") from error
