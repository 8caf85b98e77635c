"""What every benchmark returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure. `name` is the key in `targets.toml`; ratios have the unit "x"."""

    name: str
    value: float
    unit: str
    note: str = ""
