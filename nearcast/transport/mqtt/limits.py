"""Every bound of an MQTT connection, of a device as well as of a node."""

from __future__ import annotations

USER_PROPERTIES_MAX = 32
"""Of a message. One more is read, so that whoever receives it can refuse it; further ones are not."""
PACKET_BYTES_MAX = 16 * 1024 * 1024
"""A larger packet ends the connection before it is buffered; the broker is told the bound and should send none."""
RECEIVE_MAX = 256
"""Messages that the broker may have sent and we have not acknowledged."""
CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 30
STALL_S = 10.0
"""A broker that confirms nothing for so long, although something waits for it, is left for a new connection."""
