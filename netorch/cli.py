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

import click

from netorch import __version__, cli_access, guest_cli, save_cli
from netorch.cli_options import FILE, JSON, LAB, PLACE, quiet_signals
from netorch.errors import ApplyError, MissingError, NetorchError, TopologyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netorch.expectations import Verdict
    from netorch.model import Topology


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="netorch %(version)s")
def cli() -> None:
    """One TOML file becomes a running QEMU network lab, and goes away without a trace."""


@cli.command()
@FILE
@PLACE
@click.option("--verify", "and_verify", is_flag=True, help="Then prove its expectations.")
@JSON
@click.option(
    "--confirm",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="Put everything back after SECONDS unless `netorch confirm` comes first.",
)
@click.option("--restart", is_flag=True, help="Restart guests where a change needs it.")
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


@cli.command()
@LAB
def confirm(lab: str | None) -> None:
    """Keep what `apply --confirm` has changed."""
    from netorch import labs
    from netorch.system.confirmation import confirm as keep

    found = labs.find(lab)
    if keep(found.name, found.run):
        click.echo(f"lab {found.name} stays as it is")
    else:
        click.echo(f"lab {found.name} stays as it is: its watchdog had ended before")


@cli.command()
@FILE
@PLACE
@JSON
def plan(file: Path, place: str, as_json: bool) -> None:
    """Show what `apply FILE` would do, and change nothing. Exit status 3: there is something."""
    from netorch import labs, report

    outcome = labs.plan(_load(file), str(file.resolve()), place)  # type: ignore[arg-type]
    if as_json:
        report.json_out(report.plan_json(outcome))
    else:
        report.plan_text(outcome)
    sys.exit(3 if outcome.plan else 0)


@cli.command()
@FILE
def check(file: Path) -> None:
    """Check FILE and say all that is wrong with it; the machine is not touched."""
    from netorch.compiler import compile
    from netorch.facts import Facts

    topology = _load(file)
    users = {t.owner: 0 for t in topology.taps.values() if isinstance(t.owner, str)}
    compile(topology, Facts(users=users), Path("/run/netorch") / topology.name, "netorch")
    click.echo(f"{file}: ok")


@cli.command()
@LAB
@JSON
def status(lab: str | None, as_json: bool) -> None:
    """Compare a running lab with the file as it was applied. Exit status 3 if something differs."""
    from netorch import labs, report

    standing = labs.status(labs.find(lab))
    if as_json:
        report.json_out(report.status_json(standing))
    else:
        report.status_text(standing)
    sys.exit(0 if standing.in_sync else 3)


@cli.command()
@LAB
@JSON
@click.option(
    "--junit", metavar="FILE", type=click.Path(path_type=Path), help="Write JUnit XML as well."
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

        junit.write_text(document(found.name, verdicts), encoding="utf-8")
    if as_json:
        report.json_out(report.verdicts_json(verdicts))
    else:
        report.verdicts_text(found.name, verdicts)
    _exit_as_expected(verdicts)


@cli.command()
@JSON
def ls(as_json: bool) -> None:
    """List the labs that run here."""
    from netorch import labs, report

    there = labs.labs()
    if as_json:
        report.json_out([report.lab_json(lab) for lab in there])
    else:
        report.labs_text(there)


@cli.command()
@LAB
@click.option("--all", "every", is_flag=True, help="All labs that run here.")
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


@cli.command()
@LAB
@JSON
def leases(lab: str | None, as_json: bool) -> None:
    """Show the DHCP leases of a lab."""
    from netorch import labs, report

    found = labs.find(lab)
    if as_json:
        report.json_out(report.leases_json(found))
    else:
        report.leases_text(found)


@cli.command()
@click.argument("tap", metavar="[TAP|PID]", required=False)
@JSON
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
        click.echo(line, err=True)


@cli.command(name="exec", context_settings={"ignore_unknown_options": True})
@click.option("--lab", help="The lab, where more than one runs.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End the command after SECONDS, with exit status 124.",
)
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(lab: str | None, timeout: float | None, node: str, command: tuple[str, ...]) -> None:
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


@cli.command()
@click.option("--lab", help="The lab, where more than one runs.")
@click.argument("guest")
def console(lab: str | None, guest: str) -> None:
    """Open the serial console of a guest; Ctrl-] leaves it."""
    from netorch import nodes

    sys.exit(nodes.console(nodes.find(lab, guest)))


@cli.command()
@click.option("--lab", help="The lab, where more than one runs.")
@click.argument("source")
@click.argument("target")
@JSON
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


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a topology file, for editors."""
    from netorch import report
    from netorch.schema import schema as of_file

    report.json_out(of_file())


for command in (*guest_cli.COMMANDS, *save_cli.COMMANDS, *cli_access.COMMANDS):
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point. Turns errors into messages and exit statuses."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except TopologyError as error:
        click.echo(error.message, err=True)
        count = len(error.mistakes)
        click.echo(f"{count} mistake{'s' if count != 1 else ''}; nothing was changed", err=True)
        sys.exit(2)
    except NetorchError as error:
        _complain(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the flush at exit is silent
        sys.exit(1)
    sys.exit(0)


def _load(file: Path) -> "Topology":
    from netorch.topology import load

    return load(file)


def _exit_as_expected(verdicts: "Sequence[Verdict]") -> NoReturn:
    sys.exit(0 if all(verdict.ok for verdict in verdicts) else 4)


def _complain(error: NetorchError) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.message}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    if isinstance(error, ApplyError):
        for line in error.undone:
            click.echo(f"undone: {line}", err=True)
        for line in error.left:
            click.echo(f"{click.style('left behind:', fg='red')} {line}", err=True)
        if not error.undone and not error.left:
            click.echo("nothing had to be undone", err=True)
