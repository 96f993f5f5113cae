"""The commands that work with a guest from outside: its files, keyboard and screen, and ssh."""

import contextlib
from pathlib import Path

import click

from netorch.cli_options import LAB_OPTION


@click.command()
@LAB_OPTION
@click.option("-r", "--recursive", is_flag=True, help="Copy directories.")
@click.option("--ssh", is_flag=True, help="By ssh, and not by the guest's agent.")
@click.argument("source")
@click.argument("target")
def copy(lab: str | None, recursive: bool, ssh: bool, source: str, target: str) -> None:
    """Copy a file into a guest or out of it: `netorch copy FILE vm1:/tmp`. What arrived is compared
    before it gets its name.
    """
    from netorch import access

    access.copy(lab, source, target, recursive, ssh)


@click.command(context_settings={"ignore_unknown_options": True})
@LAB_OPTION
@click.option("--connect", is_flag=True, hidden=True)  # what ssh calls
@click.argument("guest", metavar="[USER@]GUEST")
@click.argument("words", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)
def ssh(lab: str | None, connect: bool, guest: str, words: tuple[str, ...]) -> None:
    """Log in to a guest that runs sshd, or run a command there: also in a private place, where no
    other ssh gets. Keys and configuration are your own.
    """
    from netorch import access

    if connect:
        access.connect(lab, guest)
    else:
        access.ssh(lab, guest, words)


@click.command(name="send-key")
@LAB_OPTION
@click.option("--text", default="", help="First type this, as on a US keyboard; \\n is enter.")
@click.argument("guest")
@click.argument("keys", nargs=-1)
def send_key(lab: str | None, text: str, guest: str, keys: tuple[str, ...]) -> None:
    """Press keys on a guest's keyboard, one combination after the other: `netorch send-key vm1
    ctrl-alt-f2 ret`.
    """
    from netorch import access

    access.send_keys(access.guest(lab, guest, "a keyboard"), text, keys)


@click.command()
@LAB_OPTION
@click.argument("guest")
@click.argument("file", type=click.Path(path_type=Path))
def screenshot(lab: str | None, guest: str, file: Path) -> None:
    """Write what a guest shows on its screen to FILE, as PNG."""
    from netorch import access

    access.screenshot(access.guest(lab, guest, "a screen"), file)


@click.command()
@LAB_OPTION
@click.option(
    "--listen",
    "where",
    default="",
    metavar="PORT|PATH",
    help="A loopback port, or the path of a Unix socket; else the first free port from 5900.",
)
@click.argument("guest")
def vnc(lab: str | None, where: str, guest: str) -> None:
    """Let VNC viewers see a guest's screen, until Ctrl-C; viewers that are connected then stay."""
    from netorch import access

    def say(at: str, own: str) -> None:
        port = at.rpartition(":")[2]
        click.echo(f"{guest} shows its screen at {at} until Ctrl-C")
        if port.isdecimal():
            click.echo(
                f"viewers: vncviewer 127.0.0.1::{port}, remote-viewer vnc://127.0.0.1:{port}"
            )
        click.echo(f"QEMU's own display is at {own}")

    with contextlib.suppress(KeyboardInterrupt):
        access.show(access.guest(lab, guest, "a screen"), where, say)


COMMANDS = (copy, ssh, send_key, screenshot, vnc)
