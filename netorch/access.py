"""Working with a guest from outside: its files, its keyboard and screen, and ssh.

All but ssh goes through Unix sockets in the run directory, which can be reached from outside of a
private place as well. So these commands stay where they were called, and what they read and write
is the person's own.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from netorch.errors import ReadyError, UsageError, not_running
from netorch.guests import vnc_socket
from netorch.labs import intended
from netorch.nodes import Node, find
from netorch.resources import Guest
from netorch.system.power import session
from netorch.system.qmp import agent_path

if TYPE_CHECKING:
    from netorch.system.copying import Remote

_SSH_PORT = 22


def guest(lab: str | None, name: str, verb: str) -> Node:
    """The guest called `name`. Raises UsageError, also for a host, of which one can't `verb`."""
    node = find(lab, name)
    if not node.is_guest:
        raise UsageError(f"{name} is a host: only guests have {verb}")
    return node


def copy(
    lab: str | None, source: str, target: str, recursive: bool = False, by_ssh: bool = False
) -> None:
    """Copy a file or a directory into a guest or out of it; one of the two is GUEST:/PATH, or with
    ssh [USER@]GUEST:PATH. Raises NetorchError.
    """
    from netorch.system.copying import copy_in, copy_out

    there = [_remote_part(text) for text in (source, target)]
    match there:
        case [None, (name, path)]:
            with _files(lab, name, path, by_ssh) as remote:
                copy_in(remote, Path(source), path, recursive)
        case [(name, path), None]:
            with _files(lab, name, path, by_ssh) as remote:
                copy_out(remote, path, target, recursive)
        case [None, None]:
            raise UsageError(
                "neither is in a guest", "write one of them as GUEST:/path; ./a:b is a file here"
            )
        case _:
            raise UsageError("both are in guests", "copy to a file here, and that into the other")


def send_keys(node: Node, text: str, keys: Sequence[str]) -> None:
    """Type `text`, then press the keys, such as `ctrl-alt-delete`. Raises NetorchError."""
    from netorch.keys import combination, typed
    from netorch.system import screen

    with session(node.lab.scope, node.name) as qmp:
        known = screen.known_keys(qmp)
        wanted = [*typed(text), *(combination(key, known) for key in keys)]
        screen.press(qmp, node.name, wanted)


def screenshot(node: Node, file: Path) -> None:
    """Write what the guest shows on its screen as PNG. Raises NetorchError."""
    from netorch.system import screen

    with session(node.lab.scope, node.name) as qmp:
        screen.screenshot(qmp, node.name, file)


def show(node: Node, where: str, say: Callable[[str, str], None]) -> None:
    """Let VNC viewers in at `where` (a loopback port, a path, or "" for the next free port) until
    the guest ends, which raises NetorchError. `say` hears where, and where QEMU's own display is.
    """
    from netorch.system import viewers
    from netorch.system.guest_processes import running

    with session(node.lab.scope, node.name) as qmp:
        own = viewers.own_display(qmp, node.name)
    processes = running(node.lab.scope).get(f"guest:{node.name}")
    if not processes:
        raise not_running(node.name)
    pidfd = os.pidfd_open(processes[0].pid)
    try:
        with viewers.listening(where) as listener:
            at = listener.getsockname()
            say(at if isinstance(at, str) else f"{at[0]}:{at[1]}", _where(node, own))
            viewers.hand_over(listener, _directory(node) / "qmp.sock", node.name, pidfd)
    finally:
        os.close(pidfd)


def ssh(lab: str | None, target: str, words: Sequence[str]) -> NoReturn:
    """Run ssh to [USER@]GUEST instead of this process. Raises NetorchError."""
    from netorch.system.ssh import replace

    user, name = _user(target)
    replace([*_ssh(guest(lab, name, "ssh"), user), *words])


def connect(lab: str | None, name: str) -> None:
    """What ssh calls: reach the guest's sshd from within the lab's place, and hand the connection
    over. Raises NetorchError.
    """
    from netorch.system import leases
    from netorch.system.ssh import hand_over

    node = guest(lab, name, "ssh")
    topology, desired = intended(node.lab)
    wanted = desired.get(f"guest:{name}")
    assert isinstance(wanted, Guest), "find() read the record"
    held = {lease.mac: lease.address for lease in leases.read(node.lab.scope)}
    written = [nic.address for nic in topology.guests[name].nics]
    known = [held.get(nic.mac) or own for nic, own in zip(wanted.nics, written, strict=True)]
    hand_over([address for address in known if address], _SSH_PORT, name)


@contextmanager
def _files(lab: str | None, target: str, path: str, by_ssh: bool) -> "Iterator[Remote]":
    from netorch.system.agent_files import AgentFiles
    from netorch.system.ssh import SshFiles

    user, name = _user(target) if by_ssh else ("", target)
    node = find(lab, name)
    if not node.is_guest:
        raise UsageError(
            f"{name} is a host, and hosts have this machine's files", f"cp FILE {path or 'FILE'}"
        )
    if not path.startswith("/"):
        raise UsageError(f"{path!r} in guest {name} is no absolute path", "GUEST:/path")
    if by_ssh:
        yield SshFiles(_ssh(node, user), name)
        return
    try:
        files = AgentFiles(agent_path(node.lab.scope, name), name)
    except ReadyError as error:
        hint = f"{error.hint}; a guest with sshd is reached with --ssh"
        raise ReadyError(error.message, hint) from error
    with files:
        yield files


def _ssh(node: Node, user: str) -> list[str]:
    from netorch.system.ssh import command

    return command(node.lab.name, node.name, _directory(node) / "known_hosts", user)


def _where(node: Node, display: str) -> str:
    """QEMU's own display in words; "" is its Unix socket."""
    if not display:
        return str(node.lab.run / vnc_socket(node.name))
    return f"{display} in the lab's own namespace" if node.lab.place.private else display


def _user(target: str) -> tuple[str, str]:
    user, _, name = target.rpartition("@")
    return user, name


def _remote_part(text: str) -> tuple[str, str] | None:
    """GUEST and PATH of `GUEST:PATH`; None for a path here. As with scp, a slash before the colon
    makes a path.
    """
    name, colon, path = text.partition(":")
    return (name, path) if colon and name and "/" not in name else None


def _directory(node: Node) -> Path:
    return node.lab.run / "guests" / node.name
