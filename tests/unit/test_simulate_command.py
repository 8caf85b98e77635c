from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from nearcast.cli.simulate import command
from simulations.figure import Axis, Curve, draw_bars, draw_curves

TOML = """
name = "mine"
title = "Mine <&>"
why = "Small."
duration_s = 12.0
warmup_s = 1.0
load = [{ rate_rps = 60.0 }]
nodes = [
    { name = "edge", tier = "local", rtt_ms = 0.2, service_ms = 20.0 },
    { name = "pop", tier = "peer", rtt_ms = 8.0, service_ms = 20.0 },
]
faults = [{ kind = "slow", nodes = ["edge"], value = 6.0, windows_s = [[4.0, 8.0]] }]
"""


def test_the_scenarios_are_listed():
    result = CliRunner().invoke(command, ["--list"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 13
    assert "cloud-brownout" in result.output


def test_a_scenario_of_ones_own_gives_a_table_and_a_page_that_needs_nothing_else(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(TOML)
    page = tmp_path / "page.html"
    asked = [str(tmp_path / "mine.toml"), "--policies", "nearcast", "--report", str(page)]
    result = CliRunner().invoke(command, asked)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith("nearcast")
    text = page.read_text()
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert [ET.fromstring(figure).tag for figure in figures] == ["{http://www.w3.org/2000/svg}svg"] * 3
    assert "Mine &lt;&amp;&gt;" in text
    assert not re.findall(r"(?:src|href)=|@import|url\(", text)


def test_a_run_is_json_and_repeats_itself(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(TOML)
    asked = [str(tmp_path / "mine.toml"), "--policies", "nearcast", "--json"]
    first, again = (CliRunner().invoke(command, asked).output for _ in range(2))
    assert json.loads(first) == json.loads(again)
    assert json.loads(first)["policies"][0]["requests"] > 500


def test_unknown_policies_are_refused():
    result = CliRunner().invoke(command, ["steady", "--policies", "nobody"])
    assert result.exit_code == 2
    assert "nobody" in result.output


@pytest.mark.parametrize(
    "axis", [Axis(title="x", low=5.0, high=120.0), Axis(title="x", low=1e-3, high=1.0, is_log=True)]
)
def test_ticks_are_round_and_inside(axis: Axis):
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 12
    assert all(0.0 <= axis.place(tick) <= 1.0 + 1e-9 for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_figures_survive_what_cannot_be_drawn():
    bars = draw_bars([("a<b", math.inf, math.nan, "#000000"), ("b", 2.0, 1.0, "#000000")])
    curves = draw_curves(
        [Curve(name="c", colour="#000000", points=[])], Axis(title="x", low=0, high=1), Axis(title="y", low=0, high=1)
    )
    for figure in (bars, curves):
        ET.fromstring(figure)
    assert "∞" in bars
