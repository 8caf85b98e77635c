"""TLS to a broker: its certificate names the host, ours names the device or the node."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from nearcast.errors import Code, MeshError

_ALERTS = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the broker says that our certificate has expired; ask for a new invitation",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the broker says that our certificate was revoked; ask for a new invitation",
    "TLSV1_ALERT_UNKNOWN_CA": "the broker does not know the authority of our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the broker asks for a certificate",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
}
"""OpenSSL's names of what the other end complains of."""


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


def describe_failure(error: BaseException) -> str:
    """Why a connection failed, in words for whoever has to mend it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not one that we trust ({error.verify_message}); name its CA, or a device's identity"
    if isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
        return _ALERTS[error.reason]
    return str(error)
