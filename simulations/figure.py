"""Figures as SVG, by hand: bars and curves in the plain style of a paper."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 820, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 165, 16, 46
_BAR, _GAP, _LABEL = 20, 10, 150
_INK, _FAINT, _BAND = "#333333", "#dddddd", "#ececec"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis shows, and from where to where."""

    title: str
    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between `low` (0) and `high` (1)."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        return ((math.log(max(value, self.low)) if self.is_log else value) - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            return [
                value
                for exponent in range(first, last + 1)
                for step in steps
                if self.low <= (value := step * 10.0**exponent) * 1.0001 and value <= self.high * 1.0001
            ]
        rough = (self.high - self.low) / 6.0
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line with its name."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    wide: bool = False


def draw_curves(
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    bands: Sequence[tuple[float, float]] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves over both axes. `bands` are shaded spans of x, `marks` dashed verticals with a word."""
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def across(value: float) -> float:
        return _LEFT + x.place(min(max(value, x.low), x.high)) * (right - _LEFT)

    def down(value: float) -> float:
        return bottom - y.place(min(max(value, y.low), y.high)) * (bottom - _TOP)

    parts = [
        f'<rect x="{across(a):.1f}" y="{_TOP}" width="{max(0.0, across(b) - across(a)):.1f}" height="{bottom - _TOP}" '
        f'fill="{_BAND}"/>'
        for a, b in bands
    ]
    for tick in y.ticks():
        at = down(tick)
        parts.append(_line(_LEFT, at, right, at, _FAINT))
        parts.append(_text(_LEFT - 8, at + 4, f"{tick:g}", anchor="end"))
    for tick in x.ticks():
        at = across(tick)
        parts.append(_line(at, bottom, at, bottom + 5, _INK))
        parts.append(_text(at, bottom + 20, f"{tick:g}", anchor="middle"))
    for value, word in marks:
        at = across(value)
        parts.append(_line(at, _TOP, at, bottom, _INK, dash="4 4"))
        parts.append(_text(at + 5, _TOP + 12, word))
    parts += [_line(_LEFT, bottom, right, bottom, _INK), _line(_LEFT, _TOP, _LEFT, bottom, _INK)]
    for at, curve in enumerate(curves):
        width = 2.6 if curve.wide else 1.5
        path = " ".join(f"{across(px):.1f},{down(py):.1f}" for px, py in curve.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )
        level = _TOP + 12 + at * 20
        parts.append(_line(right + 14, level - 4, right + 34, level - 4, curve.colour, width=width))
        parts.append(_text(right + 40, level, curve.name))
    middle = (_TOP + bottom) / 2
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 8, x.title, anchor="middle"))
    parts.append(
        f'<text x="16" y="{middle:.1f}" font-size="13" fill="{_INK}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle:.1f})">{html.escape(y.title)}</text>'
    )
    return _frame(HEIGHT, parts, f"{y.title} over {x.title}")


def draw_bars(bars: Sequence[tuple[str, float, float, str]]) -> str:
    """Horizontal bars: name, value, half width of its interval (NaN = none), colour. An infinite one has no end."""
    finite = [value + (0.0 if math.isnan(half) else half) for _, value, half, _ in bars if math.isfinite(value)]
    axis = Axis(title="", low=0.0, high=max(finite, default=1.0) * 1.08)
    room = WIDTH - _LABEL - 90
    parts = []
    for row, (name, value, half, colour) in enumerate(bars):
        top = 6 + row * (_BAR + _GAP)
        length = room * (axis.place(value) if math.isfinite(value) else 1.0)
        middle = top + _BAR / 2
        opacity = "1" if math.isfinite(value) else "0.35"
        parts.append(
            f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}" opacity="{opacity}"/>'
        )
        parts.append(_text(_LABEL - 8, middle + 4, name, anchor="end"))
        end = _LABEL + length
        if math.isfinite(value) and not math.isnan(half):
            low, high = (_LABEL + room * axis.place(max(0.0, value + sign * half)) for sign in (-1, 1))
            parts.append(_line(low, middle, high, middle, _INK, width=1.4))
            parts += [_line(at, middle - 4, at, middle + 4, _INK, width=1.4) for at in (low, high)]
            end = max(end, high)
        parts.append(_text(end + 7, middle + 4, f"{value:.1f} ms" if math.isfinite(value) else "∞"))
    return _frame(len(bars) * (_BAR + _GAP) + 6, parts, "bars")


def _frame(height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1.0, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="13" fill="{_INK}" text-anchor="{anchor}">{html.escape(words)}</text>'
    )
