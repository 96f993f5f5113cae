"""Arguments and options that several commands share."""

import signal
from pathlib import Path

import click

FILE = click.argument("file", type=click.Path(path_type=Path))
LAB = click.argument("lab", required=False)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
PLACE = click.option(
    "--private",
    "place",
    flag_value="private",
    default="auto",
    help="Use a private namespace even if the current one could be changed.",
)
LAB_OPTION = click.option("--lab", help="The lab, where more than one runs.")


def quiet_signals() -> None:
    """A rollback that is interrupted would leave what it was called to remove."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
