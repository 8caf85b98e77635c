"""Licences: SPDX expressions against an operator's list."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_sync.publisher.licence import LICENCES_ALLOWED, POLICY_FILE, PublishPolicy, read_policy, require_licence
from nearcast.errors import Code, MeshError


@pytest.mark.parametrize(
    ("expression", "spelled"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("apache-2.0 or mit", "Apache-2.0 OR MIT"),
        ("GPL-3.0-only OR MIT", "GPL-3.0-only OR MIT"),
        ("(MIT AND BSD-3-Clause)", "MIT AND BSD-3-Clause"),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception"),
    ],
)
def test_allowed_expressions_come_back_as_spdx_spells_them(expression: str, spelled: str) -> None:
    assert require_licence(expression, PublishPolicy()) == spelled


@pytest.mark.parametrize(
    "expression",
    [
        "GPL-3.0-only", "MIT AND GPL-3.0-only", "(MIT OR GPL-3.0-only) AND AGPL-3.0-only", "LicenseRef-Own",
        "MIT WITH LLVM-exception", "CC-BY-NC-4.0",
    ],
)  # fmt: skip
def test_others_are_refused_with_what_to_do(expression: str) -> None:
    with pytest.raises(MeshError) as caught:
        require_licence(expression, PublishPolicy())
    assert caught.value.code is Code.FORBIDDEN
    assert repr(expression) in caught.value.message
    assert f"`licences_allowed` in operator/{POLICY_FILE}" in caught.value.message


@pytest.mark.parametrize("expression", ["", "MIT AND", "MIT MIT", "Proprietary", "My own", "(" * 400, "x" * 600])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(MeshError) as caught:
        require_licence(expression, PublishPolicy())
    assert caught.value.code is Code.INVALID_REQUEST


def test_the_operator_decides(tmp_path: Path) -> None:
    assert read_policy(tmp_path) == PublishPolicy()
    (tmp_path / POLICY_FILE).write_text('licences_allowed = ["LicenseRef-Own", "gpl-3.0-only"]\n')
    policy = read_policy(tmp_path)
    assert require_licence("LicenseRef-Own AND GPL-3.0-only", policy) == "LicenseRef-Own AND GPL-3.0-only"
    with pytest.raises(MeshError, match="not on the allow-list"):
        require_licence("MIT", policy)
    for text, match in (
        ("licences = []", "unknown"),
        ("licences_allowed = 1", "does not fit"),
        ("[", "not valid"),
    ):
        (tmp_path / POLICY_FILE).write_text(text)
        with pytest.raises(MeshError, match=match):
            read_policy(tmp_path)


def test_every_default_is_a_licence() -> None:
    for licence in LICENCES_ALLOWED:
        assert require_licence(licence, PublishPolicy()) == licence
