"""The versions on disk: immutable folders, and one small pointer file per model."""

from __future__ import annotations

from nearcast.store.manifest import Manifest, decode_manifest, is_model_name
from nearcast.store.pointer import Pointer
from nearcast.store.store import Store

__all__ = ["Manifest", "Pointer", "Store", "decode_manifest", "is_model_name"]
