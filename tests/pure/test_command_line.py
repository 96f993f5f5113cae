"""The command line: every command's help, and what of a line is whose."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netorch import nodes, output
from netorch.cli import ELSEWHERE, every_command, find, main
from netorch.command_line import parsed
from netorch.errors import UsageError
from netorch.facts import Facts
from netorch.surroundings import with_names
from netorch.system.places import Place
from netorch.system.qmp import Completed
from netorch.topology import parse
from netorch.whereabouts import Lab

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(every_command())


def line(text: str) -> dict[str, object]:
    """What the command gets, without what was not said."""
    name, *words = text.split(" ")
    command = find(name)
    assert command is not None
    given = parsed(command, words)
    return {key: value for key, value in given.items() if value is not None and value is not False}


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["netorch", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(str(end.value.code))


def test_the_table_names_the_modules_of_the_commands() -> None:
    modules = {name: made.run.__module__ for name, made in every_command().items()}
    elsewhere = {name: f"netorch.{module}" for name, module in ELSEWHERE.items()}
    assert modules == {**dict.fromkeys(modules, "netorch.cli"), **elsewhere}


@pytest.mark.parametrize("columns", ["80", "100", "20", "x"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help(
    name: str,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    command = find(name)
    assert command is not None
    assert run(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: netorch {name} [OPTIONS]")
    assert command.help
    assert command.help.replace(" ", "") in shown.replace(" ", "").replace("\n", "")
    for names, how in command.arguments:
        hidden = how.get("help") == "==SUPPRESS=="
        assert all((word in shown) != hidden for word in names if word[0] == "-")
        assert hidden or how["help"][:8] in shown
        assert how.get("metavar", "") in shown
    assert max(map(len, shown.splitlines())) <= (int(columns) if columns in ("80", "100") else 80)


def test_overview(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "-h") == 0
    shown = capsys.readouterr().out
    assert [
        row.split()[0] for row in shown.partition("commands:\n")[2].splitlines()[:-2]
    ] == COMMANDS
    assert "  plan        Show what `apply FILE` would do, and change nothing.\n" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert run(monkeypatch) == 2
    assert capsys.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("aply", "there is no command 'aply'", "did you mean apply? try 'netorch --help'"),
        ("xyz", "there is no command 'xyz'", "try 'netorch --help'"),
        ("\udcff", "there is no command '\\udcff'", "try 'netorch --help'"),
        ("--versio", "there is no option '--versio'", "did you mean --version? try"),
        ("check", "the following arguments are required: FILE", "try 'netorch check --help'"),
        ("check a b", "'b' is one argument too many", ""),
        ("check a -- b", "'b' is one argument too many", ""),
        ("ls a", "'a' is one argument too many", ""),
        ("ls -- a", "'a' is one argument too many", ""),
        ("apply --js a", "there is no option '--js'", "did you mean --json? try"),
        ("apply --conf=3 a", "there is no option '--conf'", "did you mean --confirm? try"),
        ("apply --json=yes a", "argument --json: ignored explicit argument 'yes'", ""),
        ("apply -x a", "there is no option '-x'", ""),
        ("status --lab a", "there is no option '--lab'", "give the lab without '--lab'; try"),
        ("send-key vm1 -1", "there is no option '-1'", ""),
        ("apply a --confirm", "argument --confirm: expected one argument", ""),
        ("apply --confirm 0 a", "--confirm: must be a number of seconds, at least 1, not '0'", ""),
        ("apply --confirm nan a", "a number of seconds, at least 1, not 'nan'", ""),
        ("apply --confirm inf a", "a number of seconds, at least 1, not 'inf'", ""),
        ("stop vm1 --timeout -1", "a number of seconds, at least 0, not '-1'", ""),
        ("stop vm1 --timeout soon", "a number of seconds, at least 0, not 'soon'", ""),
        ("exec --timeout 0 vm1 ls", "a number of seconds, above 0, not '0'", ""),
        ("exec vm1", "the following arguments are required: COMMAND...", ""),
        ("exec vm1 --", "the following arguments are required: COMMAND...", ""),
        ("start --", "the following arguments are required: GUESTS...", ""),
        ("ssh", "the following arguments are required: [USER@]GUEST\n", ""),
        ("send-key", "the following arguments are required: GUEST\n", ""),
    ],
)
def test_usage_errors(
    words: str,
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *words.split(" ")) == 2
    out, err = capsys.readouterr()
    usage, error, way_out = err.splitlines(keepends=True)
    assert out == ""
    assert usage.startswith("usage: netorch ")
    assert error.startswith("error: ")
    assert message in error
    assert way_out.startswith("hint: ")
    assert hint in way_out
    assert way_out.endswith(" --help'\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_may_be_abbreviated(name: str) -> None:
    command = find(name)
    assert command is not None
    if command.passes_on:
        return
    options = [word for names, _ in command.arguments for word in names if word[:2] == "--"]
    for option in (*options, "--help"):
        if option[:-1] not in options:
            with pytest.raises(UsageError, match="there is no option"):
                parsed(command, [option[:-1], "1"])


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("apply lab.toml --json --confirm 1", {"as_json": True, "confirm": 1.0, "place": "auto"}),
        ("apply --confirm=1.5 --private lab.toml", {"confirm": 1.5, "place": "private"}),
        ("apply --private -- lab.toml", {"place": "private"}),
        ("apply --confirm 9 lab.toml --confirm 2", {"confirm": 2.0, "place": "auto"}),
    ],
)
def test_options_of_apply(text: str, given: dict[str, object]) -> None:
    assert line(text) == {"file": Path("lab.toml"), **given}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("status", {}),
        ("status --", {}),
        ("status --json lab", {"lab": "lab", "as_json": True}),
        ("status lab --json", {"lab": "lab", "as_json": True}),
        ("status -- --json", {"lab": "--json"}),
        ("snapshot vm1 --restart s", {"guest": "vm1", "name": "s", "restart": True}),
        ("snapshot --revert s vm1", {"guest": "vm1", "revert": "s"}),
        ("stop a --timeout 0 b", {"guests": ["a", "b"], "timeout": 0.0}),
        ("stop a -- --lab", {"guests": ["a", "--lab"]}),
        ("start a --lab -x b", {"guests": ["a", "b"], "lab": "-x"}),
        ("send-key vm1", {"guest": "vm1", "text": "", "keys": []}),
        ("send-key vm1 --text --lab ret", {"guest": "vm1", "text": "--lab", "keys": ["ret"]}),
        ("send-key --text= vm1 a b", {"guest": "vm1", "text": "", "keys": ["a", "b"]}),
        ("send-key --text=a=b vm1 -- -1", {"guest": "vm1", "text": "a=b", "keys": ["-1"]}),
        ("copy a vm1:b -r", {"source": "a", "target": "vm1:b", "recursive": True}),
        ("copy - vm1:\udcff", {"source": "-", "target": "vm1:\udcff"}),
        ("vnc vm1 --listen 5901", {"guest": "vm1", "where": "5901"}),
    ],
)
def test_options_stand_anywhere(text: str, given: dict[str, object]) -> None:
    found = line(text)
    if "timeout" not in given:
        found.pop("timeout", None)
    assert found == given


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("vm1 ip addr", {"command": ["ip", "addr"]}),
        ("vm1 -- ip addr", {"command": ["ip", "addr"]}),
        ("-- vm1 ip addr", {"command": ["ip", "addr"]}),
        ("vm1 ls -la --color=never", {"command": ["ls", "-la", "--color=never"]}),
        ("vm1 ls -lh", {"command": ["ls", "-lh"]}),
        ("vm1 -- ls --help", {"command": ["ls", "--help"]}),
        ("vm1 -- x --lab y --timeout 3", {"command": ["x", "--lab", "y", "--timeout", "3"]}),
        ("--timeout 3 vm1 -- sleep 9", {"command": ["sleep", "9"], "timeout": 3.0}),
        ("vm1 --timeout 3 sleep 9", {"command": ["sleep", "9"], "timeout": 3.0}),
        ("vm1 sleep 9 --timeout=3", {"command": ["sleep", "9"], "timeout": 3.0}),
        ("vm1 -- git checkout -- file", {"command": ["git", "checkout", "--", "file"]}),
        ("vm1 git checkout -- --lab", {"command": ["git", "checkout", "--lab"]}),
        ("vm1 -- -- x", {"command": ["--", "x"]}),
        ("vm1 x --tim 3", {"command": ["x", "--tim", "3"]}),
        ("vm1 kill -9 -1", {"command": ["kill", "-9", "-1"]}),
        ("vm1 printf  -", {"command": ["printf", "", "-"]}),
    ],
)
def test_what_exec_passes_on(text: str, given: dict[str, object]) -> None:
    assert line(f"exec {text}") == {"node": "vm1", **given}


def test_what_ssh_passes_on() -> None:
    assert line("ssh vm1") == {"guest": "vm1", "words": []}
    assert line("ssh u@vm1 ls -l") == {"guest": "u@vm1", "words": ["ls", "-l"]}
    assert line("ssh vm1 -- ls --lab") == {"guest": "vm1", "words": ["ls", "--lab"]}
    given = line("ssh --connect --lab l vm1")
    assert given == {"guest": "vm1", "words": [], "lab": "l", "connect": True}


def test_a_command_imports_only_its_own() -> None:
    script = """
import sys
sys.argv = ["netorch", "stop"]
from netorch.cli import main
try:
    main()
except SystemExit as end:
    print(end.code, *(name for name in sys.modules if name.endswith("_cli") or "cli_" in name))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 netorch.cli_options netorch.guest_cli\n"


@pytest.mark.parametrize("words", [["schema"], ["check", "topologies/default.toml"], ["--help"]])
def test_nobody_reads(words: list[str]) -> None:
    """As in `netorch schema | true`: no traceback, no message, status 1."""
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "netorch", *words]
    done = subprocess.run(argv, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "styled"),
    [(Terminal, "", True), (Terminal, "1", False), (io.TextIOWrapper, "", False)],
)
def test_only_a_terminal_gets_styles(
    stream: type[io.TextIOWrapper], no_color: str, styled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    out = stream(io.BytesIO())
    text = f"{output.style('+', 'green')} a {output.style('x', 'red', bold=True)}"
    output.echo_on(out, text)
    out.seek(0)
    assert out.buffer.read() == (text if styled else "+ a x").encode() + b"\n"
    assert output.unstyle(text) == "+ a x"


def test_names_of_any_bytes_are_shown() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output.echo_on(out, "caf\u00e9 \udcff: ok")
    out.seek(0)
    assert out.buffer.read() == b"caf\\xe9 \\udcff: ok\n"


@pytest.mark.parametrize("words", ["--help", "ls --json", "schema", "check lab.toml"])
def test_an_output_that_is_full_is_an_error_without_a_traceback(words: str, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").touch()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "netorch", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NETORCH_RUN_DIR": str(tmp_path / "none")},
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_report_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("netorch.labs.find", lambda name: SimpleNamespace(name="a"))
    monkeypatch.setattr("netorch.verify.verify", lambda lab: [])
    file = tmp_path / "none" / "report.xml"
    assert run(monkeypatch, "verify", "--junit", str(file)) == 1
    assert capsys.readouterr().err == f"error: failed to write {file}: No such file or directory\n"


def test_a_command_in_a_guest_needs_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def agent_exec(scope: object, guest: str, command: object, data: bytes, *rest: object) -> Any:
        given.append(data)
        return Completed(0, b"", b"")

    monkeypatch.setattr("netorch.system.qmp.agent_exec", agent_exec)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    place = Place(lab="a", private=False, inode=0)
    node = nodes.Node(Lab("a", place, Path("/none"), Path("/none")), "vm1", True)
    assert nodes.run(node, ["true"]) == 0
    assert given == [b""]


def test_an_owner_that_is_nobody_is_named_with_its_key() -> None:
    topology = parse('[networks.a]\n[taps.t]\nnetwork = "a"\nowner = "no-one-here"', "a", ROOT)
    with pytest.raises(UsageError, match=r"taps\.t\.owner: there is no user 'no-one-here'"):
        with_names(Facts(), topology)
