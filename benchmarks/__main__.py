"""`python -m benchmarks NAME... [--quick] [--json]` measures, prints `name value unit target ok`, keeps the result.

Exits 1 if a row that has a target misses it or was not measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import importlib.metadata
import json
import platform
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

HERE = Path(__file__).parent
NAMES = (
    "echo",
    "large",
    "cores",
    "streams",
    "serving",
    "router",
    "lease",
    "policy",
    "scenarios",
    "overload",
    "accounting",
    "replay",
    "live",
    "reports",
    "cascade",
    "wire",
    "steps",
    "coldstart",
    "footprint",
    "reload",
    "fuzz",
    "connections",
    "crash",
    "chaos",
    "delta",
    "canary",
    "resume",
    "swap",
    "deadlines",
    "ar",
    "agent_idle",
    "fanout",
    "isolation",
    "storm",
    "outage",
    "device_streams",
    "mqtt",
)
PACKAGES = (
    "nearcast",
    "ngh2",
    "grpcio",
    "uvloop",
    "numpy",
    "onnxruntime",
    "ai-edge-litert",
    "protobuf",
    "mqtt5",
    "paho-mqtt",
    "tuf",
)


def main() -> int:
    """Run the named benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; noisier")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    targets = tomllib.loads((HERE / "targets.toml").read_text())
    judged: list[dict[str, Any]] = []
    broken: list[str] = []
    for name in names:
        found = run(name, quick=options.quick)
        if not found:
            broken.append(name)
        rows = judge(found, bars(targets.get(name, {}), quick=options.quick))
        judged += rows
        if not options.json:
            print_rows(rows)
    keep(judged, names, quick=options.quick)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": judged}, indent=1))
    return 0 if not broken and all(row["ok"] is not False for row in judged) else 1


def run(name: str, *, quick: bool) -> list[Row]:
    """The rows of one benchmark. One that breaks has none, so that its bars read as not measured and the others run."""
    try:
        rows: list[Row] = importlib.import_module(f"benchmarks.{name}").run(quick=quick)
    except Exception:  # noqa: BLE001 - whatever it was, it is printed
        traceback.print_exc()
        return []
    return rows


def bars(targets: dict[str, dict[str, Any]], *, quick: bool) -> dict[str, dict[str, Any]]:
    """The targets of one benchmark. Where a quick run counts less, its own bar stands under `quick`."""
    return {name: target | (target.get("quick", {}) if quick else {}) for name, target in targets.items()}


def judge(rows: list[Row], targets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their target and `ok`: True, False, or None where there is no target."""
    result = []
    for row in rows:
        target = targets.get(row.name)
        entry = {"name": row.name, "value": row.value, "unit": row.unit, "target": "", "ok": None, "note": row.note}
        if target is not None:
            if "at_least" in target:
                entry |= {"target": f"≥ {target['at_least']:g}", "ok": row.value >= target["at_least"]}
            else:
                entry |= {"target": f"≤ {target['at_most']:g}", "ok": row.value <= target["at_most"]}
        result.append(entry)
    measured = {row.name for row in rows}
    result += [
        {"name": name, "value": None, "unit": target["unit"], "target": "not measured", "ok": False, "note": ""}
        for name, target in targets.items()
        if name not in measured
    ]
    return result


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        ok = {True: "ok", False: "MISS", None: ""}[row["ok"]]
        print(f"{row['name']:44} {value:>10} {row['unit']:6} {row['target']:>10} {ok:4} {row['note']}", flush=True)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": model, "python": platform.python_version(), "system": platform.platform(), "versions": versions}


def keep(rows: list[dict[str, Any]], names: list[str], *, quick: bool) -> None:
    """Write the result beside the others: one file a run, named by what ran."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    taken = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    kind = "quick" if quick else "full"
    document = {"taken": taken, "kind": kind, "machine": machine(), "rows": rows}
    what = "all" if set(names) == set(NAMES) else "-".join(names)
    (folder / f"{what}.{kind}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
