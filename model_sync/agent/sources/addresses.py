"""Which kind of source an address stands for."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from model_sync.agent.sources.folder_source import FolderSource
from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.object_source import ObjectSource
from model_sync.agent.sources.source import Source
from nearcast.errors import Code, MeshError


def make_source(
    url: str,
    *,
    tls: Callable[[], ssl.SSLContext] | None,
    connect_timeout_s: float,
    timeout_s: float,
    roles: tuple[str, ...] = (),
) -> Source:
    """A source for `http(s)://…`, `s3://bucket/prefix`, `file:///folder` or the path of a folder.

    `tls` and `roles` are as for `HttpSource`; `timeout_s` is for one request to an object store.

    Raises:
        MeshError: INVALID_REQUEST for any other address, or as the source's constructor.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return HttpSource(url, tls=tls, connect_timeout_s=connect_timeout_s, roles=roles)
    if parts.scheme == "s3":
        return ObjectSource(url, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderSource(Path(unquote(parts.path)))
    if url and "://" not in url:
        return FolderSource(Path(url))
    raise MeshError(Code.INVALID_REQUEST, f"{url!r} is no repository: use http(s)://, s3://, file:// or a folder.")
