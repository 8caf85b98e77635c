from __future__ import annotations

import json
import socket
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import nearcast
from model_sync.agent.status import AgentStatus, ModelStatus, write_status
from nearcast.cli import SUBCOMMANDS, Entry, LazyGroup, main
from nearcast.cli.bench import Outcome, report_of
from nearcast.cli.listing import print_table
from nearcast.errors import Code, MeshError
from nearcast.runtime import ExitCode
from nearcast.store import Pointer, Store

CLI_FOLDER = Path(nearcast.__file__).parent / "cli"


def existing() -> list[str]:
    return main.list_commands(click.Context(main))


def test_every_command_module_is_in_the_table() -> None:
    modules = {path.stem for path in CLI_FOLDER.glob("*.py")} | {
        path.parent.name for path in CLI_FOLDER.glob("*/__init__.py")
    }
    assert {entry.module for entry in SUBCOMMANDS.values()} >= {
        f"nearcast.cli.{name}" for name in modules if name != "__init__" and defines_command(name)
    }


def defines_command(name: str) -> bool:
    path = CLI_FOLDER / f"{name}.py"
    path = path if path.exists() else CLI_FOLDER / name / "__init__.py"
    return "\ndef command(" in path.read_text() or "\ncommand = " in path.read_text()


@pytest.mark.parametrize("name", existing())
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: ")


def leaves() -> list[list[str]]:
    """Every command that does something, as its words on the command line."""
    found = []
    for name in existing():
        command = main.get_command(click.Context(main), name)
        below = sorted(command.commands) if isinstance(command, click.Group) else []
        found += [[name, word] for word in below] or [[name]]
    return found


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_every_option_says_what_it_is_for(words: list[str]) -> None:
    command = main
    for word in words:
        command = command.get_command(click.Context(command), word)
    silent = [
        option.name
        for option in command.params
        if isinstance(option, click.Option) and not option.help and not option.show_default
    ]
    assert silent == []
    assert "\\b" not in CliRunner().invoke(main, [*words, "--help"]).output


def test_a_listing_shows_hostile_cells_whole_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["what", "n"], [["[/canary] \x1b[31m", "1"], ["x" * 300, "22"]], right=["n"])
    heading, hostile, long = capsys.readouterr().out.splitlines()
    assert heading.split() == ["what", "n"]
    assert hostile.startswith("[/canary] \N{REPLACEMENT CHARACTER}[31m")
    assert hostile.endswith("   1")
    assert long == "x" * 300 + "  22"
    print_table(["what"], [], empty="Nothing yet; make one.")
    assert capsys.readouterr().out == "Nothing yet; make one.\n"


def test_a_bench_report_is_json() -> None:
    outcome = Outcome(seconds=2.0, latencies_ms=[1.0, 2.0, 9.0], served_by=Counter({"edge-1": 3}))
    report = json.loads(json.dumps(report_of(outcome)))
    assert report["answered"] == 3
    assert report["served_by"] == {"edge-1": 3}
    assert (report["p50_ms"], report["p99_ms"]) == (2.0, 9.0)


def test_a_listener_that_does_not_speak_http_is_said_to_explain_no_routes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as peer:
                peer.recv(1024)
                peer.sendall(b"\x00\x00\x18\x04\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        result = CliRunner().invoke(main, ["route", "explain", "digits", "--address", address])
        thread.join()
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert address in result.stderr


def test_help_lists_what_exists_in_the_order_of_the_table() -> None:
    result = CliRunner().invoke(main, ["--help"])
    positions = [result.output.index(f"\n  {name} ") for name in existing()]
    assert positions == sorted(positions)
    assert "config" in existing()


def test_a_missing_extra_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_an_extra.py").write_text("import no_such_library.part\n")
    (tmp_path / "is_broken.py").write_text("import nearcast.no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = {"probe": Entry("needs_an_extra", "Probe."), "broken": Entry("is_broken", "Broken.")}
    group = LazyGroup(name="nearcast", entries=entries)
    result = CliRunner().invoke(group, ["probe"])
    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.startswith("nearcast: no_such_library is not installed; ")
    assert "nearcast[edge]" in result.stderr
    assert isinstance(CliRunner().invoke(group, ["broken"]).exception, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("code", "exit_code"), [(Code.UNAVAILABLE, ExitCode.UNAVAILABLE), (Code.UNTRUSTED, ExitCode.UNTRUSTED)]
)
def test_an_error_is_one_line_and_a_numbered_exit_code(
    monkeypatch: pytest.MonkeyPatch, code: Code, exit_code: ExitCode
) -> None:
    @click.command()
    def command() -> None:
        raise MeshError(code, "The controller does not answer; start it.")

    module = types.ModuleType("nearcast_cli_probe")
    module.__file__ = __file__
    module.command = command  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(origin=__file__)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    group = LazyGroup(name="nearcast", entries={"probe": Entry(module.__name__, "Probe.")})
    result = CliRunner().invoke(group, ["probe"])
    assert result.stderr == "nearcast: The controller does not answer; start it.\n"
    assert result.stdout == ""
    assert result.exit_code == exit_code


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"nearcast, version {nearcast.__version__}\n"


def test_config_show_tells_values_and_origins(tmp_path: Path) -> None:
    path = tmp_path / "sync.toml"
    path.write_text('[telemetry]\nlevel = "debug"\n')
    arguments = ["config", "show", "--app", "sync", "--config", str(path), "--set", "telemetry.format=json"]
    environ = {"NEARCAST_ADDRESS": "127.0.0.1:7"}
    listing = json.loads(CliRunner().invoke(main, [*arguments, "--json"], env=environ).output)
    rows = {row["key"]: (row["value"], row["origin"]) for row in listing}
    assert rows["telemetry.level"] == ("debug", str(path))
    assert rows["telemetry.format"] == ("json", "--set")
    assert rows["address"] == ("127.0.0.1:7", "environment NEARCAST_ADDRESS")
    assert rows["home"][1] == "default"
    table = CliRunner().invoke(main, arguments, env=environ)
    assert table.exit_code == 0
    assert "127.0.0.1:7" in table.output


def test_config_show_has_a_line_for_each_field_of_a_table_of_tables() -> None:
    streams = 'streams=[{name="pixels",model="digits"}]'
    table = CliRunner().invoke(main, ["config", "show", "--app", "edge", "--set", streams]).output
    assert {tuple(line.split()) for line in table.splitlines()} >= {
        ("streams[0].name", "pixels", "--set"),
        ("streams[0].model", "digits", "--set"),
    }
    assert max(map(len, table.splitlines())) < 100


def test_the_nodes_configuration_in_the_document_on_mqtt_holds(tmp_path: Path) -> None:
    _, _, rest = (CLI_FOLDER.parents[1] / "docs/mqtt.md").read_text().partition("```toml\n")
    path = tmp_path / "edge.toml"
    path.write_text(rest.partition("```")[0])
    shown = CliRunner().invoke(main, ["config", "show", "--app", "edge", "--config", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    set_here = {row["key"] for row in json.loads(shown.output) if row["origin"] == str(path)}
    assert set_here >= {"data_dir", "streams", "mqtt.tenant_brokers", "mqtt.upstream.url", "mqtt.durability"}


def test_config_show_refuses_what_load_would_refuse() -> None:
    result = CliRunner().invoke(main, ["config", "show", "--app", "sync", "--set", "adress=x"])
    assert result.exit_code == ExitCode.CONFIG
    assert "`adress`" in result.stderr
    assert "`address`" in result.stderr


def test_a_store_shows_why_its_agent_does_not_follow(tmp_path: Path) -> None:
    Store(tmp_path).write_pointer("digits", Pointer(stable=1))
    (tmp_path / ".agent").mkdir()
    model = ModelStatus(state="IDLE", error="Release 2 does not pass its gate.", quarantined=(2,))
    status = AgentStatus(node="edge-1", channel="stable", mode="install", error="No answer.", models={"digits": model})
    write_status(tmp_path / ".agent", status)
    arguments = ["models", "list", "--store", str(tmp_path)]
    shown = CliRunner().invoke(main, arguments).output
    assert "channel stable, serial 0, last verified never" in shown
    assert "agent: No answer." in shown
    assert "digits: Release 2 does not pass its gate." in shown
    assert "digits: refused for good: release 2" in shown
    listed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert listed["agent"]["models"]["digits"]["quarantined"] == [2]
