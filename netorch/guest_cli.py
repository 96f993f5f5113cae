"""The commands for guests of a running lab; see netorch.cli."""

import sys
import time
from contextlib import suppress

from netorch.cli_options import (
    GUESTS,
    LAB,
    LAB_OPTION,
    TIMEOUT,
    argument,
    command,
    quiet_signals,
)
from netorch.output import echo


@command(
    GUESTS,
    LAB_OPTION,
    argument(
        "--discard", action="store_true", help="Boot saved guests afresh: what was saved is lost."
    ),
)
def start(guests: list[str], lab: str | None, discard: bool) -> None:
    """Start guests, with all that they need, and wait until they are ready. One that was saved
    goes on where it was.
    """
    from netorch import lifecycle, report

    progress = report.Printer(sys.stderr, quiet_signals)
    if not lifecycle.start(lifecycle.find(lab, guests), guests, progress, discard):
        echo(f"nothing to do: {', '.join(guests)} runs")


@command(GUESTS, LAB_OPTION, TIMEOUT)
def stop(guests: list[str], lab: str | None, timeout: float) -> None:
    """Switch guests off: their power button is pressed, and after a time they are ended."""
    from netorch import lifecycle, report

    progress = report.Printer(sys.stderr, quiet_signals)
    lifecycle.stop(lifecycle.find(lab, guests), guests, timeout, progress)


@command(GUESTS, LAB_OPTION, TIMEOUT)
def restart(guests: list[str], lab: str | None, timeout: float) -> None:
    """Stop guests and start them again, each in a new QEMU."""
    from netorch import lifecycle, report

    progress = report.Printer(sys.stderr, quiet_signals)
    lifecycle.restart(lifecycle.find(lab, guests), guests, timeout, progress)


@command(GUESTS, LAB_OPTION)
def pause(guests: list[str], lab: str | None) -> None:
    """Let guests stand still; `resume` or an apply lets them go on."""
    from netorch import lifecycle

    lifecycle.pause(lifecycle.find(lab, guests), guests)


@command(GUESTS, LAB_OPTION)
def resume(guests: list[str], lab: str | None) -> None:
    """Let paused guests go on."""
    from netorch import lifecycle

    lifecycle.resume(lifecycle.find(lab, guests), guests)


@command(LAB)
def watch(lab: str | None) -> None:
    """Watch over a lab: say how guests end, and start those again whose file says `restart`."""
    from netorch import labs, report, watcher

    def say(line: str) -> None:
        echo(f"{time.strftime('%H:%M:%S')} {line}")

    found = labs.find(lab)
    say(f"watching lab {found.name}; Ctrl-C leaves it as it is")
    with suppress(KeyboardInterrupt):
        watcher.watch(found, say, report.Printer(sys.stderr, quiet_signals))
