"""`nearcast simulate SCENARIO`: the live routing code in virtual time."""

from __future__ import annotations

import click

from nearcast.cli.listing import json_option, print_json, print_table

SCENARIOS = {"cloud-brownout": "simulations.scenarios.cloud_brownout"}


@click.command("simulate")
@click.argument("scenario", type=click.Choice(sorted(SCENARIOS)), metavar="SCENARIO")
@click.option("--seed", default=1, show_default=True, help="Same seed, same trace hash.")
@json_option
def command(scenario: str, seed: int, as_json: bool) -> None:
    """Run SCENARIO (cloud-brownout) with the routing code of the live mesh and with a baseline."""
    import importlib

    import msgspec

    result = importlib.import_module(SCENARIOS[scenario]).run(seed)
    if as_json:
        print_json(msgspec.to_builtins(result))
        return
    click.echo(f"{result.scenario}, seed {result.seed}: milliseconds, share of answers within {result.slo_ms:g} ms")
    numbers = ["requests", "refused", "p50", "p99", "SLO", "in fault", "hedges"]
    print_table(
        ["policy", *numbers, "trace"],
        [
            [
                *(row.policy, str(row.requests), str(row.refused), f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}"),
                *(f"{share:.2%}" for share in (row.slo_share, row.slo_share_in_fault, row.hedge_share)),
                row.trace_hash[:16],
            ]
            for row in result.policies
        ],
        right=numbers,
    )
