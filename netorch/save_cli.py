"""The commands that keep what guests are: running ones (save), and their disks (snapshot)."""

import sys

from netorch.cli_options import (
    GUEST,
    GUESTS,
    JSON,
    LAB_OPTION,
    TIMEOUT,
    argument,
    command,
    quiet_signals,
)
from netorch.errors import UsageError
from netorch.output import echo


@command(GUESTS, LAB_OPTION)
def save(guests: list[str], lab: str | None) -> None:
    """Keep the running state of guests in files, and end them; `start` lets them go on there."""
    from netorch import lifecycle, report

    progress = report.Printer(sys.stderr, quiet_signals)
    lifecycle.save(lifecycle.find(lab, guests), guests, progress)


@command(
    GUEST,
    argument("name", metavar="[NAME]", nargs="?", help="What to call it."),
    LAB_OPTION,
    argument(
        "--list", dest="as_list", action="store_true", help="List the snapshots of the guest."
    ),
    argument("--revert", metavar="NAME", help="Put the guest's disks back to this snapshot."),
    argument("--delete", metavar="NAME", help="Delete this snapshot."),
    argument(
        "--restart", action="store_true", help="With --revert: stop a running guest, and start it."
    ),
    TIMEOUT,
    JSON,
)
def snapshot(
    guest: str,
    name: str | None,
    lab: str | None,
    as_list: bool,
    revert: str | None,
    delete: str | None,
    restart: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Make a snapshot of a guest's disks, NAME or the time; list, go back to, or delete one."""
    from netorch import lifecycle, report, snapshots

    asked = [word for word in (name, as_list, revert, delete) if word]
    if len(asked) > 1:
        raise UsageError("one thing at a time: NAME, --list, --revert or --delete")
    if restart and not revert:
        raise UsageError("--restart goes with --revert")
    found = lifecycle.find(lab, [guest])
    if as_list:
        there = snapshots.listed(found, guest)
        if as_json:
            report.json_out(report.snapshots_json(there))
        else:
            report.snapshots_text(guest, there)
    elif revert:
        progress = report.Printer(sys.stderr, quiet_signals)
        seconds = timeout if restart else None
        snapshots.revert(found, guest, revert, seconds, progress)
    elif delete:
        snapshots.delete(found, guest, delete)
    else:
        echo(f"{guest}: snapshot {snapshots.make(found, guest, name)}")
