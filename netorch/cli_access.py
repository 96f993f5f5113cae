"""The commands that work with a guest from outside: its files, keyboard and screen, and ssh."""

import argparse
import contextlib
from pathlib import Path

from netorch.cli_options import ANY_COMMAND, GUEST, LAB_OPTION, argument, command
from netorch.output import echo


@command(
    LAB_OPTION,
    argument("-r", "--recursive", action="store_true", help="Copy directories."),
    argument("--ssh", action="store_true", help="By ssh, and not by the guest's agent."),
    argument("source", metavar="SOURCE", help="A file, or GUEST:FILE."),
    argument("target", metavar="TARGET", help="Where it goes: a path, or GUEST:PATH."),
)
def copy(lab: str | None, recursive: bool, ssh: bool, source: str, target: str) -> None:
    """Copy a file into a guest or out of it: `netorch copy FILE vm1:/tmp`. What arrived is compared
    before it gets its name.
    """
    from netorch import access

    access.copy(lab, source, target, recursive, ssh)


@command(
    LAB_OPTION,
    argument("--connect", action="store_true", help=argparse.SUPPRESS),  # what ssh calls
    argument("guest", metavar="[USER@]GUEST", help="Its name."),
    argument(
        "words",
        metavar="[COMMAND]...",
        nargs=ANY_COMMAND,
        help="What to run there, and its options.",
    ),
)
def ssh(lab: str | None, connect: bool, guest: str, words: list[str]) -> None:
    """Log in to a guest that runs sshd, or run a command there: also in a private place, where no
    other ssh gets. Keys and configuration are your own.
    """
    from netorch import access

    if connect:
        access.connect(lab, guest)
    else:
        access.ssh(lab, guest, words)


@command(
    LAB_OPTION,
    argument("--text", default="", help="First type this, as on a US keyboard; \\n is enter."),
    GUEST,
    argument("keys", metavar="[KEYS]...", nargs="*", help="Combinations, by QEMU's names of keys."),
)
def send_key(lab: str | None, text: str, guest: str, keys: list[str]) -> None:
    """Press keys on a guest's keyboard, one combination after the other: `netorch send-key vm1
    ctrl-alt-f2 ret`.
    """
    from netorch import access

    access.send_keys(access.guest(lab, guest, "a keyboard"), text, keys)


@command(
    LAB_OPTION,
    GUEST,
    argument("file", metavar="FILE", type=Path, help="What to write."),
)
def screenshot(lab: str | None, guest: str, file: Path) -> None:
    """Write what a guest shows on its screen to FILE, as PNG."""
    from netorch import access

    access.screenshot(access.guest(lab, guest, "a screen"), file)


@command(
    LAB_OPTION,
    argument(
        "--listen",
        dest="where",
        default="",
        metavar="PORT|PATH",
        help="A loopback port, or the path of a Unix socket; else the first free port from 5900.",
    ),
    GUEST,
)
def vnc(lab: str | None, where: str, guest: str) -> None:
    """Let VNC viewers see a guest's screen, until Ctrl-C; viewers that are connected then stay."""
    from netorch import access

    def say(at: str, own: str) -> None:
        port = at.rpartition(":")[2]
        echo(f"{guest} shows its screen at {at} until Ctrl-C")
        if port.isdecimal():
            echo(f"viewers: vncviewer 127.0.0.1::{port}, remote-viewer vnc://127.0.0.1:{port}")
        echo(f"QEMU's own display is at {own}")

    with contextlib.suppress(KeyboardInterrupt):
        access.show(access.guest(lab, guest, "a screen"), where, say)
