"""TLS to a broker: its certificate names the host, ours names the device or the node."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from nearcast.errors import Code, MeshError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. They are read for every connection, so that a renewed certificate holds from the next one on.

    Attributes:
        ca: whom the broker's certificate must come from; None = the machine's authorities.
        certificate, key: who we are; None where a broker asks for no certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """A client context with what is on disk now.

        Raises:
            MeshError: UNAUTHENTICATED naming the file that cannot be used.
        """
        path = self.ca
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            path = self.certificate
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise MeshError(Code.UNAUTHENTICATED, f"{path} and its key cannot be used for TLS: {error}.") from error
        return context
