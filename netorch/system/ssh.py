"""ssh to a guest: the person's own client, keys and configuration, through the lab's namespace.

A guest of a private place can be reached only from within the place. So ssh gets its connection
from a ProxyCommand (`netorch ssh --connect`), which enters the place, connects, hands the connected
socket to ssh and ends (ssh_config(5), ProxyUseFdpass; systemd-ssh-proxy does the same): no byte
passes through netorch.

Guests come and go, and many have the same address: their host keys are kept in the lab's run
directory, under the guest's name, and never in the person's known_hosts.
"""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from netorch.errors import MissingError, NetorchError
from netorch.system.copying import PIECE
from netorch.system.qmp import Completed
from netorch.system.starting import program

_CONNECT_SECONDS = 5.0
_SSH_FAILED = 255  # ssh(1), EXIT STATUS


def command(lab: str, guest: str, known_hosts: Path, user: str = "") -> list[str]:
    """The ssh command line for a guest, without what shall run there. Raises MissingError."""
    ssh = program("ssh")
    if ssh is None:
        raise MissingError("ssh is not installed", "install openssh-client")
    connect = [sys.executable, "-m", "netorch", "ssh", "--connect", "--lab", lab, guest]
    options = {
        "ProxyCommand": shlex.join(connect).replace("%", "%%"),
        "ProxyUseFdpass": "yes",
        "HostKeyAlias": guest,
        "UserKnownHostsFile": f'"{known_hosts}"'.replace("%", "%%"),
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",  # nothing about the new host key
        "ServerAliveInterval": "10",  # the lab may go away without a packet
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [ssh, *words, *(("-l", user) if user else ()), guest]


def replace(argv: Sequence[str]) -> NoReturn:
    """Run ssh instead of this process. Raises NetorchError."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(argv[0], list(argv))
    except OSError as error:
        raise NetorchError(f"failed to start {argv[0]}: {error.strerror}") from error


def hand_over(addresses: Iterable[str], port: int, guest: str) -> None:
    """Connect to the first address that answers, and hand the connection over through the socket
    that is this process's output. Raises NetorchError.
    """
    tried = []
    for address in addresses:
        try:
            with socket.create_connection((address, port), _CONNECT_SECONDS) as connection:
                connection.settimeout(None)
                with socket.socket(fileno=os.dup(sys.stdout.fileno())) as ssh:
                    socket.send_fds(ssh, [b"\0"], [connection.fileno()])
            return
        except OSError as error:
            tried.append(f"{address} port {port}: {error.strerror or error}")
    if not tried:
        raise NetorchError(
            f"guest {guest} has no address that is known here",
            "it needs a NIC on a network with DHCP, or with an `address`",
        )
    raise NetorchError(f"failed to reach guest {guest}: {'; '.join(tried)}", "does sshd run there?")


class SshFiles:
    """A `copying.Remote`."""

    def __init__(self, argv: Sequence[str], guest: str) -> None:
        self.guest = guest
        self._argv = argv

    def run(self, script: str, *words: str) -> Completed:
        done = subprocess.run(
            self._shell(script, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode == _SSH_FAILED:
            self._check(done.returncode, done.stderr)
        return Completed(done.returncode, done.stdout, done.stderr)

    def write(self, path: str, pieces: Iterator[bytes]) -> None:
        shell = self._shell('umask 077; cat > "$1"', path)
        with subprocess.Popen(shell, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ssh:
            assert ssh.stdin is not None
            with suppress(BrokenPipeError):  # then its status and what it says tell why
                for piece in pieces:
                    ssh.stdin.write(piece)
            _, said = ssh.communicate()
        self._check(ssh.returncode, said)

    def read(self, path: str) -> Iterator[bytes]:
        shell = self._shell('cat "$1"', path)
        with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ssh:
            assert ssh.stdout is not None
            assert ssh.stderr is not None
            while piece := ssh.stdout.read(PIECE):
                yield piece
            said = ssh.stderr.read()
        self._check(ssh.returncode, said)

    def _shell(self, script: str, *words: str) -> list[str]:
        return [*self._argv, "--", shlex.join(["sh", "-c", script, "sh", *words])]

    def _check(self, status: int, said: bytes) -> None:
        if status != 0:
            cause = said.decode(errors="replace").strip() or f"exit status {status}"
            who = "ssh" if status == _SSH_FAILED else self.guest
            raise NetorchError(f"{who} says: {cause}")
