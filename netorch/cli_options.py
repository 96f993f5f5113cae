"""What commands are made of: a function, and the arguments and options on its line.

    @command(FILE, argument("--quick", action="store_true", help="Leave the rest out."))
    def example(file: Path, quick: bool) -> None:
        \"""The help of `netorch example`: the first sentence is its line in `netorch --help`.\"""

`argument` takes what argparse's `add_argument` takes, and keeps it until the command is asked for
(netorch.command_line). A positional's `metavar` is what the usage shows.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Argument = tuple[tuple[str, ...], dict[str, Any]]

SOME_COMMAND = "A..."  # argparse.PARSER: words of another command's line
ANY_COMMAND = "..."  # argparse.REMAINDER: the same, or none


class Command:
    def __init__(self, run: Callable[..., None], arguments: tuple[Argument, ...]) -> None:
        self.name = run.__name__.rstrip("_").replace("_", "-")
        self.run = run
        self.arguments = arguments
        self.help = " ".join((run.__doc__ or "").split())

    @property
    def passes_on(self) -> bool:
        """Whether options that it doesn't know belong to another command on its line."""
        return any(
            settings.get("nargs") in (SOME_COMMAND, ANY_COMMAND) for _, settings in self.arguments
        )


COMMANDS: dict[str, Command] = {}
"""By name: those of the modules that are imported."""


def command(*arguments: Argument) -> Callable[[Callable[..., None]], Command]:
    def add(run: Callable[..., None]) -> Command:
        made = Command(run, arguments)
        COMMANDS[made.name] = made
        return made

    return add


def argument(*names: str, **settings: Any) -> Argument:
    return names, settings


def seconds(least: float, above: bool = False) -> Callable[[str], float]:
    """The type of a time, at least or `above` so many seconds."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if (value > least if above else value >= least) and value < float("inf"):
            return value
        from argparse import ArgumentTypeError

        words = "above" if above else "at least"
        raise ArgumentTypeError(f"must be a number of seconds, {words} {least:g}, not {text!r}")

    return convert


FILE = argument("file", metavar="FILE", type=Path, help="The topology.")
LAB = argument(
    "lab", metavar="[LAB]", nargs="?", help="Its name; not needed where only one lab runs."
)
JSON = argument("--json", dest="as_json", action="store_true", help="Print JSON for programs.")
PLACE = argument(
    "--private",
    dest="place",
    action="store_const",
    const="private",
    default="auto",
    help="Use a private namespace even if the current one could be changed.",
)
LAB_OPTION = argument("--lab", help="The lab, where more than one runs.")
GUEST = argument("guest", metavar="GUEST", help="Its name.")
GUESTS = argument("guests", metavar="GUESTS...", nargs="+", help="Their names.")
TIMEOUT = argument(
    "--timeout",
    metavar="SECONDS",
    type=seconds(0),
    default=30.0,
    help="How long a guest may take to switch itself off; 0 ends it at once (default: 30).",
)


def quiet_signals() -> None:
    """A rollback that is interrupted would leave what it was called to remove."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
