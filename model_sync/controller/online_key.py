"""The online key of this process, and the one that will follow it. The private half never leaves this machine.

```
online.pem        signs timestamp, snapshot and rollout
online-next.pem   made when an operator asks for it; takes over once root and targets trust it
```
"""

from __future__ import annotations

from pathlib import Path

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

from model_sync.repository.signing_key import load_key, write_key
from nearcast.durable import move_file

ONLINE_KEY = "online.pem"
NEXT_ONLINE_KEY = "online-next.pem"


def load_online_keys(home: Path) -> list[CryptoSigner]:
    """The keys that may sign here, as far as they are at hand; without any the process serves, and signs nothing.

    Raises:
        MeshError: FORBIDDEN if one cannot be read.
    """
    return [load_key(path) for path in (home / ONLINE_KEY, home / NEXT_ONLINE_KEY) if path.exists()]


def make_next_online_key(home: Path) -> CryptoSigner:
    """Make the key that will follow; one made before, and not yet in use, is replaced."""
    signer = CryptoSigner.generate_ed25519()
    write_key(home / NEXT_ONLINE_KEY, signer)
    return signer


def settle_online_key(home: Path, keyid: str) -> None:
    """Once `keyid` signs, its file is the online key; what signed before is of no more use to anybody."""
    following = home / NEXT_ONLINE_KEY
    if following.exists() and load_key(following).public_key.keyid == keyid:
        move_file(following, home / ONLINE_KEY)
