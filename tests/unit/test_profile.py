"""Profiles: what is chosen from what was measured, and when a kept profile counts."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from nearcast.cli.models import command
from nearcast.serving import tuning
from nearcast.serving.profile import Point, Profile, Setting, choose_rows, choose_threads
from nearcast.serving.tuning import Profiles, measure
from nearcast.store import Store
from nearcast.store.contents import Contents
from nearcast.store.manifest import Manifest
from tests.tiny_models import activate, affine_model, install


def point(threads: int, rows: int, p95_us: float, rows_per_s: float = 1000.0) -> Point:
    return Point(threads=threads, rows=rows, p50_us=p95_us / 2, p95_us=p95_us, rows_per_s=rows_per_s)


def profile_of(manifest: Manifest) -> Profile:
    return Profile(
        model_sha256=manifest.file(manifest.model_file).sha256,
        engine="onnxruntime",
        engine_version="1",
        processor="p",
        concurrency=1,
        latency_budget_ms=1.0,
        points=(point(1, 1, 10.0),),
    )


@pytest.mark.parametrize(
    ("p95_us", "threads"),
    [((100, 60, 40), 4), ((100, 97, 96), 1), ((100, 60, 58), 2), ((50, 60, 70), 1)],
)
def test_threads_are_the_fewest_among_the_soonest(p95_us: tuple[float, ...], threads: int) -> None:
    points = [point(2**power, 1, time) for power, time in enumerate(p95_us)]
    assert choose_threads(points) == threads


@pytest.mark.parametrize(
    ("rates", "budget_us", "rows"),
    [
        ((100, 180, 300, 500), 1e6, 8),
        ((100, 180, 186, 188), 1e6, 2),  # what is over brings under 5 %
        ((100, 90, 80, 70), 1e6, 1),
        ((100, 180, 300, 500), 450.0, 4),  # a batch of 8 would take 800
        ((100, 180, 300, 500), 1.0, 1),  # alone it runs whatever it takes
    ],
)
def test_rows_are_the_fewest_that_bring_as_much_within_the_budget(
    rates: tuple[float, ...], budget_us: float, rows: int
) -> None:
    points = [point(1, 2**power, 100.0 * 2**power, rate) for power, rate in enumerate(rates)]
    assert choose_rows(points, 1, budget_us=budget_us) == rows


def test_a_model_is_measured_and_its_profile_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "POINT_TIME_S", 0.005)
    store = Store(tmp_path / "models")
    contents = Contents(install(store, affine_model()), store.folder("affine", 1))
    seen: list[Point] = []
    profile = measure(contents, concurrency=2, progress=seen.append)
    assert list(profile.points) == seen
    assert {each.rows for each in seen} == {1, 2, 4, 8, 16, 32}
    profiles = Profiles.beside(store.root)
    assert profiles.setting(contents.manifest) is None
    profiles.keep(contents.manifest, profile)
    assert profiles.find(contents.manifest) == profile
    assert isinstance(profiles.setting(contents.manifest), Setting)


def test_a_profile_of_another_engine_processor_or_file_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = install(Store(tmp_path / "models"), affine_model())
    profiles = Profiles(tmp_path / "profiles")
    profile = profile_of(manifest)
    profiles.keep(manifest, profile)
    assert profiles.find(manifest) == profile
    for name in ("engine_version", "processor"):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, name, lambda *_: "another")
            assert profiles.find(manifest) is None
    profiles.keep(manifest, msgspec.structs.replace(profile, model_sha256="0" * 64))
    assert profiles.find(manifest) is None
    (path,) = profiles.folder.glob("*.json")
    path.write_text('{"schema": 1}')
    assert profiles.find(manifest) is None
    assert path.name in caplog.text


def test_the_oldest_profiles_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PROFILES_MAX", 1)
    manifest = install(Store(tmp_path / "models"), affine_model())
    profiles = Profiles(tmp_path / "profiles")
    profiles.folder.mkdir()
    (profiles.folder / "old.json").write_text("{}")
    profile = profile_of(manifest)
    profiles.keep(manifest, profile)
    assert len(list(profiles.folder.iterdir())) == 1
    assert profiles.find(manifest) == profile


def test_the_command_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "POINT_TIME_S", 0.002)
    store = Store(tmp_path / "models")
    manifest = install(store, affine_model())
    activate(store, stable=1)
    asked = ["tune", "affine", "--store", str(store.root), "--concurrency", "1"]
    result = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert result.exit_code == 0
    assert "chosen" in result.output
    assert Profiles.beside(store.root).find(manifest) is not None
    again = CliRunner().invoke(command, [*asked, "--json", "--time", "0.1"], catch_exceptions=False)
    assert json.loads(again.stdout)["choice"]["threads"] >= 1
