"""`nearcast simulate SCENARIO`: the live routing code in virtual time."""

from __future__ import annotations

import click

SCENARIOS = {"cloud-brownout": "simulations.scenarios.cloud_brownout"}


@click.command("simulate")
@click.argument("scenario", type=click.Choice(sorted(SCENARIOS)))
@click.option("--seed", default=1, show_default=True, help="Same seed, same trace hash.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(scenario: str, seed: int, as_json: bool) -> None:
    """Run a SCENARIO with the routing code of the live mesh and with a baseline."""
    import importlib

    import msgspec

    result = importlib.import_module(SCENARIOS[scenario]).run(seed)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result.scenario}, seed {result.seed}: milliseconds, share of answers within {result.slo_ms:g} ms"
    )
    for column in ("policy", "requests", "refused", "p50", "p99", "SLO", "in fault", "hedges"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in result.policies:
        table.add_row(
            row.policy,
            str(row.requests),
            str(row.refused),
            f"{row.p50_ms:.1f}",
            f"{row.p99_ms:.1f}",
            f"{row.slo_share:.2%}",
            f"{row.slo_share_in_fault:.2%}",
            f"{row.hedge_share:.2%}",
        )
    console = Console()
    console.print(table)
    for row in result.policies:
        console.print(f"trace of {row.policy}: {row.trace_hash[:16]}", style="dim")
