"""Working in nodes: exec with its statuses and streams, consoles, VNC."""

import os
import pty
import select
import socket
import subprocess
import termios
import time

from tests.qemu.labs.lab import SECONDS, Machine, closed_at_end
from tests.qemu.labs.server import PORT

PROMPT = b"# "
LEAVE = b"\x1d"  # ctrl-]

SHOWN = """
[networks.default]
address = "192.168.122.1/24"

[guests.vm1]
vnc  = 3
nics = [{ network = "default" }]
"""


def test_quickstart_and_commands_in_its_nodes(machine: Machine) -> None:
    lab = machine.shipped("quickstart")
    lab.unchanged()
    lab.sh("vm1", "ping -c 1 -W 60 192.168.122.1")
    lab.serve("server")
    assert lab.sh("vm1", f"nc 203.0.113.80 {PORT}").split()[0] == "203.0.113.1"
    for node in ("vm1", "server"):
        done = lab.exec(node, "sh", "-c", "cat; echo oops >&2; exit 7", input="a\nb", status=7)
        assert done.stdout == "a\nb"
        assert done.stderr == "oops\n"
        big = "x" * 100_000
        assert lab.exec(node, "cat", input=big).stdout == big
        printed = lab.exec(node, "printf", "%s|", "a b", "--json", "$HOME", "*").stdout
        assert printed == "a b|--json|$HOME|*|"
        killed = lab.exec(node, "sh", "-c", "kill -9 $$", status=None)
        assert killed.returncode in (137, -9)
        missing = lab.exec(node, "nosuch", status=None)
        assert missing.returncode == 127
        assert "nosuch" in missing.stderr
        assert "Traceback" not in missing.stderr
    unknown = lab.exec("vm7", "true", status=2)
    assert "no guest or host 'vm7' is running here" in unknown.stderr
    assert "vm1, server" in unknown.stderr
    elsewhere = machine.netorch("exec", "--lab", "nowhere", "vm1", "--", "true", status=2)
    assert "no lab 'nowhere' is running here" in elsewhere.stderr
    console = machine.netorch("console", "--lab", lab.name, "server", status=2)
    assert "is a host and has no console" in console.stderr


def test_console_and_screen(machine: Machine) -> None:
    lab = machine.up("shown", SHOWN)
    command = ("console", "--lab", lab.name, "vm1")

    piped = machine.start(*command)
    assert piped.stdin is not None
    assert piped.stdout is not None
    _read(piped.stdout.fileno(), PROMPT)
    piped.stdin.write("echo hel''lo\n")
    piped.stdin.flush()
    _read(piped.stdout.fileno(), b"hello")
    piped.stdin.write(LEAVE.decode())
    piped.stdin.flush()
    assert piped.wait(SECONDS) == 0

    keyboard, terminal = pty.openpty()
    with closed_at_end(keyboard, terminal):
        before = termios.tcgetattr(terminal)
        shown = machine.start(*command, stdin=terminal, stdout=terminal, stderr=terminal)
        assert b"ctrl-] leaves" in _read(keyboard, PROMPT)
        os.write(keyboard, b"echo $((6 * 7))\r")
        _read(keyboard, b"42")
        os.write(keyboard, b"sleep 1000\r")
        lab.sh("vm1", "until pidof sleep; do usleep 10000; done")
        os.write(keyboard, b"\x03echo $((6 + 7))\r")  # ctrl-c is the guest's
        _read(keyboard, b"13")
        os.write(keyboard, LEAVE)
        _read(keyboard, b"[left]")
        assert shown.wait(SECONDS) == 0
        assert termios.tcgetattr(terminal) == before

    with socket.create_connection(("127.0.0.1", 5903), timeout=30) as screen:
        assert screen.recv(12).startswith(b"RFB 003.")
    listening = subprocess.run(
        ["ss", "-Hltn", "sport = 5903"], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[3] for line in listening.splitlines()] == ["127.0.0.1:5903"]
    assert "refused" in lab.sh("vm1", "nc 192.168.122.1 5903 2>&1", status=1)
    lab.unchanged()


def _read(descriptor: int, text: bytes) -> bytes:
    """Read until `text` comes."""
    deadline = time.monotonic() + SECONDS
    shown = b""
    while text not in shown:
        readable, _, _ = select.select([descriptor], [], [], deadline - time.monotonic())
        assert readable, shown
        shown += os.read(descriptor, 4096)
    return shown
