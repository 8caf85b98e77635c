"""`nearcast simulate SCENARIO`: the live routing code in virtual time."""

from __future__ import annotations

from pathlib import Path

import click

from nearcast.cli.listing import json_option, print_json, print_table


@click.command("simulate")
@click.argument("name", metavar="SCENARIO", required=False)
@click.option("--list", "list_all", is_flag=True, help="List the scenarios.")
@click.option("--seed", default=1, show_default=True, help="Same seed, same trace hash.")
@click.option("--seeds", default=1, show_default=True, help="Replications: that many seeds from --seed on.")
@click.option("--policies", default="", metavar="A,B,…", help="Only these policies.  [default: all]")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with figures.")
@json_option
def command(
    name: str | None, list_all: bool, seed: int, seeds: int, policies: str, report: Path | None, as_json: bool
) -> None:
    """Run SCENARIO with the routing code of the live mesh, published balancers, and oracles that see into the nodes.

    All meet the same requests, model times and faults. A request without an answer counts as infinitely late.
    SCENARIO is a name from --list, or a TOML file of your own.
    """
    import msgspec

    from simulations.experiment import policy_names
    from simulations.page import render_page
    from simulations.replicate import replicate
    from simulations.report import summarize
    from simulations.scenario import load_scenario, parse_scenario, scenario_names

    if list_all or name is None:
        scenarios = [load_scenario(each) for each in scenario_names()]
        if as_json:
            print_json(msgspec.to_builtins(scenarios))
        else:
            print_table(["scenario", "what happens"], [[each.name, each.title] for each in scenarios])
        return
    scenario = parse_scenario(Path(name).read_bytes()) if Path(name).is_file() else load_scenario(name)
    chosen = tuple(filter(None, policies.split(","))) or policy_names()
    if unknown := set(chosen) - set(policy_names()):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(policy_names())}.")
    found = replicate([scenario], chosen, range(seed, seed + max(1, seeds)))
    runs = {policy: found[scenario.name, policy] for policy in chosen}
    summaries = [summarize(scenario, runs[policy]) for policy in chosen]
    if report is not None:
        report.write_text(render_page(scenario, runs, summaries), encoding="utf-8")
    if as_json:
        # JSON knows no infinity; msgspec writes null for it.
        print_json(msgspec.json.decode(msgspec.json.encode({"scenario": scenario, "policies": summaries})))
        return
    click.echo(f"{scenario.title}. {scenario.why}")
    last = f"-{seed + seeds - 1}" if seeds > 1 else ""
    click.echo(f"milliseconds; seed {seed}{last}; objective {scenario.slo_ms:g}, deadline {scenario.deadline_ms:g}\n")
    numbers = ["requests", "unanswered", "p50", "p99", "p99.9", "in time", "in fault", "hedges"]
    print_table(
        ["policy", *numbers, "trace"],
        [
            [
                *(row.policy, str(row.requests), str(row.unanswered)),
                *(str(row.p50_ms), str(row.p99_ms), str(row.p999_ms)),
                *(f"{share:.2%}" for share in (row.slo_share.value, row.slo_share_in_fault, row.hedge_share)),
                row.trace_hash[:12],
            ]
            for row in summaries
        ],
        right=numbers,
    )
