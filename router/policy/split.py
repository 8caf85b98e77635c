"""Which requests the candidate answers. One hash, the same in every router, so that a client sees one version."""

from __future__ import annotations

import hashlib

_SCALE = 2.0**-64


def assign(salt: str, tenant: str, key: str, share: float) -> bool:
    """Whether the candidate of the rollout with this `salt` answers the requests of `key`.

    Raising `share` only ever moves keys from stable to candidate; a new salt draws anew.

    Args:
        salt: of the rollout document.
        tenant: whose request it is.
        key: from `sticky_key`.
        share: in [0, 1].
    """
    if share <= 0.0:
        return False
    if share >= 1.0:
        return True
    # Lengths first: ("a", "bc") and ("ab", "c") are different questions.
    text = f"{len(salt)}:{len(tenant)}:{salt}{tenant}{key}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") * _SCALE < share


def sticky_key(*, sequence: str, principal: str, request_id: str, nonce: str) -> str:
    """What a client's assignment hangs on: its sequence, else its identity, else the request's id, else `nonce`.

    An anonymous request without id gets a fresh `nonce`: each is drawn alone, so a share of 20 % is 20 % of them.
    """
    if sequence:
        return f"s:{sequence}"
    if principal:
        return f"p:{principal}"
    return f"r:{request_id}" if request_id else f"n:{nonce}"
