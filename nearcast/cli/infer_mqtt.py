"""`nearcast infer` as a device: over an anonymous broker on this machine, or with a device's own certificate."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from nearcast.client import Answer
    from nearcast.client.mqtt import MqttDevice
    from nearcast.handler import Parameter, Tensors


async def ask(
    url: str,
    identity: Path | None,
    model: str,
    inputs: Tensors,
    *,
    version: str,
    parameters: Mapping[str, Parameter],
    deadline_ms: float,
) -> Answer:
    """One request.

    Raises:
        MeshError: UNAVAILABLE without a broker; what the mesh answered; DEADLINE without an answer.
    """
    logging.getLogger("nearcast.device").setLevel(logging.ERROR)  # a lost broker is said by the error
    async with _device(url, identity) as device:
        await device.link.wait_up(attempts_max=1)
        return await device.infer(model, inputs, version=version, parameters=parameters, deadline_ms=deadline_ms)


def _device(url: str, identity: Path | None) -> MqttDevice:
    from nearcast.client.mqtt import MqttDevice
    from nearcast.client.mqtt_limits import DeviceLimits

    word = f"cli-{secrets.token_hex(4)}"  # replies of its own, beside those of a device with this name
    if identity is not None:
        from nearcast.client.provisioning import device_url, identity_tls
        from nearcast.identity.device import DeviceIdentity

        # The certificate is the session, so the device's own must be left as it is.
        loaded = DeviceIdentity.load(identity)
        return MqttDevice(device_url(loaded), tls=identity_tls(loaded), replies=word, announce=False)
    place = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/local/{word}"
    limits = DeviceLimits(session_expiry_s=0)  # gone without a trace
    return MqttDevice(place, client_id=word, replies=word, announce=False, limits=limits)
