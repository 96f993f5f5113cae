"""The command line: one function a command; the only place that prints, exits and handles signals.

Each command imports what it needs when it runs: `--version` and `check` must start as fast as
Python does. Reports go to stdout, progress and errors to stderr.

Exit status: 0 done, in sync; 1 failed; 2 wrong usage or an invalid file; 3 differs (`plan`,
`status`); 4 an expectation was not met (`verify`).
"""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from netorch import __version__
from netorch.cli_options import (
    COMMANDS,
    FILE,
    GUEST,
    JSON,
    LAB,
    LAB_OPTION,
    PLACE,
    SOME_COMMAND,
    Command,
    argument,
    command,
    quiet_signals,
    seconds,
)
from netorch.errors import ApplyError, MissingError, NetorchError, TopologyError, UsageError
from netorch.output import FROM_OUTSIDE, echo, silence, style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netorch.expectations import Verdict
    from netorch.model import Topology


# The commands of other modules: only the module of the one that was asked for is imported.
ELSEWHERE = {
    **dict.fromkeys(("start", "stop", "restart", "pause", "resume", "watch"), "guest_cli"),
    **dict.fromkeys(("save", "snapshot"), "save_cli"),
    **dict.fromkeys(("copy", "ssh", "send-key", "screenshot", "vnc"), "cli_access"),
}


@command(
    FILE,
    PLACE,
    argument(
        "--verify", dest="and_verify", action="store_true", help="Then prove its expectations."
    ),
    JSON,
    argument(
        "--confirm",
        type=seconds(1),
        metavar="SECONDS",
        help="Put everything back after SECONDS, 1 or more, unless `netorch confirm` comes first.",
    ),
    argument("--restart", action="store_true", help="Restart guests where a change needs it."),
)
def apply(
    file: Path, place: str, and_verify: bool, as_json: bool, confirm: float | None, restart: bool
) -> None:
    """Bring up the lab that FILE describes, or change the running one to match."""
    from netorch import labs, report

    topology = _load(file)
    progress = report.Printer(sys.stderr, quiet_signals)
    source = str(file.resolve())
    outcome = labs.apply(topology, source, place, progress, confirm, restart)  # type: ignore[arg-type]
    made = report.plan_json(outcome)
    if not as_json:
        report.up(outcome, progress, confirm)
    if and_verify:
        from netorch.verify import verify

        assert outcome.running is not None, "apply has brought it up"
        verdicts = verify(outcome.running)
        made["expectations"] = report.verdicts_json(verdicts)
        if not as_json:
            report.verdicts_text(outcome.lab, verdicts)
    if as_json:
        report.json_out(made)
    if and_verify:
        _exit_as_expected(verdicts)


@command(LAB)
def confirm(lab: str | None) -> None:
    """Keep what `apply --confirm` has changed."""
    from netorch import labs
    from netorch.system.confirmation import confirm as keep

    found = labs.find(lab)
    if keep(found.name, found.run):
        echo(f"lab {found.name} stays as it is")
    else:
        echo(f"lab {found.name} stays as it is: its watchdog had ended before")


@command(FILE, PLACE, JSON)
def plan(file: Path, place: str, as_json: bool) -> None:
    """Show what `apply FILE` would do, and change nothing. Exit status 3: there is something."""
    from netorch import labs, report

    outcome = labs.plan(_load(file), str(file.resolve()), place)  # type: ignore[arg-type]
    if as_json:
        report.json_out(report.plan_json(outcome))
    else:
        report.plan_text(outcome)
    sys.exit(3 if outcome.plan else 0)


@command(FILE)
def check(file: Path) -> None:
    """Check FILE and say all that is wrong with it; the machine is not touched."""
    from netorch.compiler import compile
    from netorch.facts import Facts

    topology = _load(file)
    users = {t.owner: 0 for t in topology.taps.values() if isinstance(t.owner, str)}
    compile(topology, Facts(users=users), Path("/run/netorch") / topology.name, "netorch")
    echo(f"{file}: ok")


@command(LAB, JSON)
def status(lab: str | None, as_json: bool) -> None:
    """Compare a running lab with the file as it was applied. Exit status 3 if something differs."""
    from netorch import labs, report

    standing = labs.status(labs.find(lab))
    if as_json:
        report.json_out(report.status_json(standing))
    else:
        report.status_text(standing)
    sys.exit(0 if standing.in_sync else 3)


@command(
    LAB,
    JSON,
    argument("--junit", metavar="FILE", type=Path, help="Write JUnit XML as well."),
)
def verify(lab: str | None, as_json: bool, junit: Path | None) -> None:
    """Prove what the lab's file expects: what reaches what, and what does not. Exit status 4: an
    expectation was not met.
    """
    from netorch import labs, report
    from netorch.verify import verify as prove

    found = labs.find(lab)
    verdicts = prove(found)
    if junit is not None:
        from netorch.junit import document

        try:
            junit.write_text(document(found.name, verdicts), encoding="utf-8")
        except OSError as error:
            raise NetorchError(f"failed to write {junit}: {error.strerror}") from error
    if as_json:
        report.json_out(report.verdicts_json(verdicts))
    else:
        report.verdicts_text(found.name, verdicts)
    _exit_as_expected(verdicts)


@command(JSON)
def ls(as_json: bool) -> None:
    """List the labs that run here."""
    from netorch import labs, report

    there = labs.labs()
    if as_json:
        report.json_out([report.lab_json(lab) for lab in there])
    else:
        report.labs_text(there)


@command(
    LAB,
    argument("--all", dest="every", action="store_true", help="All labs that run here."),
)
def teardown(lab: str | None, every: bool) -> None:
    """Take a lab away: guests, services, rules, links, files. Needs no file."""
    from netorch import labs, report

    if lab and every:
        raise UsageError("--all takes no name")
    failed = False
    for there in labs.labs() if every else [labs.find(lab)]:
        progress = report.Printer(sys.stderr, quiet_signals)
        errors = labs.teardown(there, progress)
        report.down(there, progress, errors)
        failed = failed or bool(errors)
    sys.exit(1 if failed else 0)


@command(LAB, JSON)
def leases(lab: str | None, as_json: bool) -> None:
    """Show the DHCP leases of a lab."""
    from netorch import labs, report

    found = labs.find(lab)
    if as_json:
        report.json_out(report.leases_json(found))
    else:
        report.leases_text(found)


@command(
    argument("tap", metavar="[TAP|PID]", nargs="?", help="The name of a tap, or a process."),
    JSON,
)
def taps(tap: str | None, as_json: bool) -> None:
    """Show who has which tap open, netorch's or anybody's: all, those of one name, or those of one
    process.
    """
    from netorch import tap_report
    from netorch.tap_queues import find

    found = find()
    rows = tap_report.chosen(found, tap)
    if as_json:
        tap_report.json_out(rows)
    else:
        tap_report.text(rows)
    for line in tap_report.unseen(found, rows, os.geteuid() == 0):
        echo(line, err=True)


@command(
    LAB_OPTION,
    argument(
        "--timeout",
        type=seconds(0, above=True),
        metavar="SECONDS",
        help="End the command after SECONDS, with exit status 124.",
    ),
    argument("node", metavar="NODE", help="A host or guest."),
    argument(
        "command",
        metavar="COMMAND...",
        nargs=SOME_COMMAND,
        help="What to run there, and its options.",
    ),
)
def exec_(lab: str | None, timeout: float | None, node: str, command: list[str]) -> None:
    """Run a command in a host, or through the guest agent in a guest: `netorch exec vm1 -- ip
    addr`.
    """
    from netorch import nodes

    try:
        status = nodes.run(nodes.find(lab, node), command, timeout)
    except MissingError as error:
        _complain(error)
        status = 127  # as shells have it for a command that is not there
    except nodes.TimedOut as error:
        _complain(error)
        status = 124  # as timeout(1) has it
    sys.exit(status)


@command(LAB_OPTION, GUEST)
def console(lab: str | None, guest: str) -> None:
    """Open the serial console of a guest; Ctrl-] leaves it."""
    from netorch import nodes

    sys.exit(nodes.console(nodes.find(lab, guest)))


@command(
    LAB_OPTION,
    argument("source", metavar="SOURCE", help="A guest or host."),
    argument("target", metavar="TARGET", help="A guest, a host, `gateway`, or an address."),
    JSON,
)
def why(lab: str | None, source: str, target: str, as_json: bool) -> None:
    """Say why a packet from SOURCE, a guest or host, does not reach TARGET: another one,
    `gateway`, or an IPv4 address. Exit status 1: a hop on the way is broken.
    """
    from netorch import nodes, report

    hops = nodes.why(nodes.find(lab, source), target)
    if as_json:
        report.json_out(report.hops_json(hops))
    else:
        report.hops_text(hops)
    sys.exit(0 if all(hop.ok for hop in hops) else 1)


@command()
def schema() -> None:
    """Print the JSON Schema of a topology file, for editors."""
    from netorch import report
    from netorch.schema import schema as of_file

    report.json_out(of_file())


def every_command() -> dict[str, Command]:
    """By name. Imports the modules of all commands."""
    for name in ELSEWHERE:
        find(name)
    return COMMANDS


def find(name: str) -> Command | None:
    if name in ELSEWHERE and name not in COMMANDS:
        from importlib import import_module

        import_module(f"netorch.{ELSEWHERE[name]}")
    return COMMANDS.get(name)


def main() -> NoReturn:
    """Entry point. Turns errors into messages and exit statuses."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            _run(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except TopologyError as error:
        echo(error.message, err=True)
        count = len(error.mistakes)
        echo(f"{count} mistake{'s' if count != 1 else ''}; nothing was changed", err=True)
        sys.exit(2)
    except NetorchError as error:
        _complain(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        echo("\ninterrupted", err=True)
        sys.exit(1)
    except BrokenPipeError:
        silence()
        sys.exit(1)
    except OSError as error:
        if error.errno not in FROM_OUTSIDE:
            raise
        silence()
        what = f"{error.filename}: " if error.filename else ""
        _complain(NetorchError(f"{what}{error.strerror}"))
        sys.exit(1)
    sys.exit(0)


def _run(words: list[str]) -> None:
    first = words[0] if words else "--help"
    if first == "--version":
        echo(f"netorch {__version__}")
        return
    from netorch.command_line import near, overview, parsed

    if first in ("-h", "--help"):
        echo(overview(every_command().values()), err=not words)
        sys.exit(0 if words else 2)
    found = find(first)
    if found is None:
        echo("usage: netorch COMMAND [OPTIONS] [ARGUMENTS]", err=True)
        what = "option" if first.startswith("-") else "command"
        known = [*every_command(), "--version", "--help"]
        raise UsageError(
            f"there is no {what} {first!r}", f"{near(first, known)}try 'netorch --help'"
        )
    found.run(**parsed(found, words[1:]))


def _load(file: Path) -> "Topology":
    from netorch.topology import load

    return load(file)


def _exit_as_expected(verdicts: "Sequence[Verdict]") -> NoReturn:
    sys.exit(0 if all(verdict.ok for verdict in verdicts) else 4)


def _complain(error: NetorchError) -> None:
    echo(f"{style('error:', 'red', bold=True)} {error.message}", err=True)
    if error.hint:
        echo(f"hint: {error.hint}", err=True)
    if isinstance(error, ApplyError):
        for line in error.undone:
            echo(f"undone: {line}", err=True)
        for line in error.left:
            echo(f"{style('left behind:', 'red')} {line}", err=True)
        if not error.undone and not error.left:
            echo("nothing had to be undone", err=True)
