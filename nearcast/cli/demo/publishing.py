"""Scene 2: three real models become signed bundles, and the nodes fetch, verify, gate, warm and activate them."""

from __future__ import annotations

import asyncio

from nearcast.cli.demo.bundles import write_sources
from nearcast.cli.demo.stage import Stage

ACTIVATION_TIMEOUT_S = 30.0
EDGE_MODELS = ("digits", "magika", "wake_word")
CLOUD_MODELS = (*EDGE_MODELS, "digits_large")
FIRST_RELEASES = ("digits-1", "magika-1", "wake-word-1")


def show_processes(stage: Stage) -> None:
    """One line per process."""
    for name, addresses in stage.mesh.addresses.items():
        places = "  ".join(f"{kind} {address}" for kind, address in addresses.items() if address)
        stage.say(f"[bold]{name:8}[/] {places}")
    stage.check("every process is up and joined with a certificate of its own", ok=len(stage.mesh.addresses) >= 6)


async def play(stage: Stage) -> None:
    """Create, push, wait until the models answer where they should."""
    stage.title(2, "Bundles are built, signed and pushed; nodes fetch, verify, gate, warm and activate them")
    specifications = write_sources(stage.folder / "sources")
    for name, specification in specifications.items():
        bundle = str(stage.folder / "bundles" / name)
        await stage.operate("bundle", "create", "--spec", str(specification), "--out", bundle)
    for name in FIRST_RELEASES:
        await stage.operate("push", str(stage.folder / "bundles" / name), "--channel", "stable")
    await stage.operate("push", str(stage.folder / "bundles" / "digits-large-1"), "--channel", "cloud")
    for name in FIRST_RELEASES:
        await stage.operate("push", str(stage.folder / "bundles" / name), "--channel", "cloud")
    took = await stage.until(lambda: are_hot(stage), timeout_s=ACTIVATION_TIMEOUT_S, what="Activation on every node")
    stage.check(
        "every node answers with the models of its channel", ok=True, detail=f"{took:.1f} s after the last push"
    )


async def are_hot(stage: Stage) -> bool:
    """Whether every edge node and the cloud core answer `ready` for their models."""
    wanted = [
        (name, model)
        for name in stage.mesh.addresses
        for model in (CLOUD_MODELS if name.startswith("cloud") else EDGE_MODELS if name.startswith("edge") else ())
    ]
    return all(await asyncio.gather(*(stage.is_ready(name, model) for name, model in wanted)))
