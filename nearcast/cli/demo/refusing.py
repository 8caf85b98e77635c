"""Scene 6: what is refused, and in which words."""

from __future__ import annotations

import shutil
from pathlib import Path

from nearcast.cli.demo.stage import Stage

TEAM = "core"


async def play(stage: Stage) -> None:
    """A flipped byte, an unknown key, an older release."""
    stage.title(6, "What is refused")
    bundles = stage.folder / "bundles"

    flipped = stage.folder / "flipped"
    shutil.copytree(bundles / "digits-2", flipped)
    model = flipped / "digits-2.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    await _expect_refusal(stage, "a bundle with one flipped byte", "push", str(flipped), "--channel", "stable")

    # A thief with the operator's certificate, but with a team key that the mesh does not know.
    stranger, thief = stage.folder / "stranger", stage.folder / "thief"
    await stage.operate("keys", "init", "--home", str(stranger))
    shutil.copytree(stage.mesh.operator_home / "operator", thief / "operator")
    key = Path("operator", f"models-{TEAM}.pem")
    shutil.copyfile(stranger / key, thief / key)
    third = stage.folder / "bundles" / "digits-3"
    specification = stage.folder / "sources" / "digits-2" / "spec-3.toml"
    specification.write_text(
        (specification.parent / "spec.toml").read_text().replace("release = 2", "release = 3").replace("2.0.0", "3.0.0")
    )
    await stage.operate("bundle", "create", "--spec", str(specification), "--out", str(third))
    await _expect_refusal(
        stage, "a bundle signed by an unknown key", "push", str(third), "--channel", "stable", "--home", str(thief)
    )
    await stage.operate("push", str(bundles / "digits-2"), "--channel", "stable")
    await _expect_refusal(
        stage, "a bundle older than what runs", "push", str(bundles / "digits-1"), "--channel", "stable"
    )


async def _expect_refusal(stage: Stage, what: str, *arguments: str) -> None:
    code, out, err = await stage.command(*arguments)
    words = (err.strip() or out.strip()).splitlines()
    stage.check(f"refused: {what}", ok=code != 0, detail=words[-1] if words else f"exit code {code}")
