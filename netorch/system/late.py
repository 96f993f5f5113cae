"""Why a guest or host has no lease: the first step on the way there that left no evidence."""

import fcntl
import re
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 0x1
_IFF_RUNNING = 0x40
_LINES = 5
_TAIL = 4096
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of terminals: colours, cursor


def guest_reason(scope: Scope, guest: str, links: Sequence[str], step: str) -> str:
    """The reason, given the last DHCP message of the guest's MAC in dnsmasq's log ("": none)."""
    if step:
        return dhcp_reason(step)
    directory = scope.run / "guests" / guest
    try:
        with Qmp(directory / "qmp.sock", guest) as qmp:
            qmp.ready()
            status = qmp.ask("query-status")["status"]
    except (QmpError, FileNotFoundError):
        return "QEMU does not answer"
    if status != "running":
        return f"QEMU does not run the guest (its state is {status})"
    if reason := _link_reason(links):
        return reason
    console = directory / "serial.log"
    if not console.exists() or not console.stat().st_size:
        return "it runs, but has written nothing to its serial console: does it boot?"
    return f"it has not asked for an address{log_end(console)}"


def host_reason(links: Sequence[str], step: str) -> str:
    return dhcp_reason(step) if step else _link_reason(links) or "its DHCP client has not asked yet"


def dhcp_reason(step: str) -> str:
    """What is missing after the last message that dnsmasq has seen or sent."""
    return {
        "DHCPDISCOVER": "it asked, and dnsmasq offered nothing (no free address or reservation)",
        "DHCPOFFER": "dnsmasq made an offer, and no request came back",
        "DHCPREQUEST": "it requested an address, and dnsmasq did not acknowledge",
        "DHCPNAK": "dnsmasq refused the address that it requested",
        "DHCPDECLINE": "it declined the offered address: another machine has it",
        "DHCPRELEASE": "it gave its lease back",
    }.get(step, f"the last DHCP message was {step}")


def log_end(log: Path) -> str:
    """The end of a log, to be put behind a sentence; "" if there is none."""
    lines = last_lines(log)
    if not lines:
        return ""
    return "; the last lines of {}:\n{}".format(log, "\n".join(f"    {line}" for line in lines))


def last_lines(log: Path) -> list[str]:
    """The last lines of a log that aren't empty, without what terminals are told."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    plain = _ESCAPE.sub("", text).splitlines()
    return [line.strip() for line in plain if line.strip()][-_LINES:]


def _link_reason(names: Sequence[str]) -> str:
    """What is wrong with the first of these links that is not up and running; "" if all are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for name in names:
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("16s16x", name.encode()))
            except OSError as error:
                return f"its link {name} can't be asked: {error.strerror}"
            flags = struct.unpack_from("16xH", answer)[0]
            if not flags & _IFF_UP:
                return f"its link {name} is down"
            if not flags & _IFF_RUNNING:
                return f"its link {name} has no carrier"
    return ""
