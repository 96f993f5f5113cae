"""Probes from a guest, through its agent, with the programs that the guest has.

The built-in image has busybox's; most others have ping and bash, which opens /dev/tcp/ADDRESS/PORT.
Each probe is a line of shell that takes what is there, and says which program is missing where
nothing is (status 127). What came back is read from the programs' messages, and, since these
can't tell a rejection by ICMP from a refusal by TCP (and busybox's ping and tftp don't see one at
all), from what ICMP goes to the guest by its taps.
"""

import re
import socket
from collections.abc import Sequence

from netorch.errors import NetorchError
from netorch.system.capture import Capture, Mark
from netorch.system.guest_commands import Inside
from netorch.system.probes import Answer, rejected
from netorch.system.qmp import Completed

_GRACE = 1.0  # seconds that a command may take longer than its own limit
_MISSING = 127

# $1 address, $2 size, $3 seconds
_PING = """
command -v ping >/dev/null || { echo "no ping" >&2; exit 127; }
exec ping -c 1 -W "$3" -s "$2" "$1"
"""
# $1 address, $2 port, $3 seconds, $4 token
_TCP = """
if command -v bash >/dev/null; then
    exec timeout "$3" bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf %s "$2" >&3' "$1" "$2" "$4"
elif command -v nc >/dev/null && nc --help 2>&1 | grep -q BusyBox; then
    exec nc -w "$3" "$1" "$2" -e echo "$4"
else
    echo "neither bash nor busybox's nc" >&2; exit 127
fi
"""
_UDP = """
if command -v bash >/dev/null; then
    exec timeout "$3" bash -c \
        'exec 3<>"/dev/udp/$0/$1" && printf %s "$2" >&3 && head -c 1 <&3 >/dev/null' "$1" "$2" "$4"
elif command -v tftp >/dev/null; then
    exec timeout "$3" tftp -g -l /dev/null -r "$4" "$1" "$2"
else
    echo "neither bash nor busybox's tftp" >&2; exit 127
fi
"""
# $1 name, $2 server or "", $3 seconds
_DNS = """
if command -v nslookup >/dev/null; then
    exec timeout "$3" nslookup "$1" $2
elif [ -z "$2" ] && command -v getent >/dev/null; then
    exec timeout "$3" getent ahostsv4 "$1"
else
    echo "no nslookup" >&2; exit 127
fi
"""
_REFUSED = re.compile(r"refused", re.I)
_UNREACHABLE = re.compile(r"unreachable|no route", re.I)
_NO_NAME = re.compile(r"bad address|not known|can't resolve|NXDOMAIN|can't find|no answer", re.I)


class GuestVantage:
    """Where a probe starts: inside a guest. `incoming` sees what goes to its NICs."""

    def __init__(self, inside: Inside, incoming: Capture | None) -> None:
        self._inside = inside
        self._incoming = incoming

    def ping(self, address: str, mark: Mark, seconds: float) -> Answer:
        done = self._run(_PING, address, str(mark.size), _whole(seconds), seconds=seconds)
        if isinstance(done, Answer):
            return done
        took = re.search(rb"time[=<]([\d.]+) ms", done.out)
        if done.code == 0 and took:
            return Answer("reached", f"{float(took[1]):.1f} ms")
        return self._failure(done, address, socket.IPPROTO_ICMP)

    def tcp(self, address: str, port: int, mark: Mark, seconds: float) -> Answer:
        token = mark.token.decode()
        done = self._run(_TCP, address, str(port), _whole(seconds), token, seconds=seconds)
        if isinstance(done, Answer):
            return done
        if done.code == 0:
            return Answer("reached", "connected")
        return self._failure(done, address, socket.IPPROTO_TCP)

    def udp(self, address: str, port: int, mark: Mark, seconds: float) -> Answer:
        """Reached where anything comes back; tftp takes no echo for an answer to itself, but an
        error is one.
        """
        token = mark.token.decode()
        done = self._run(_UDP, address, str(port), _whole(seconds), token, seconds=seconds)
        if isinstance(done, Answer):
            return done
        if done.code == 0 or b"server error" in done.err:
            return Answer("reached", "answered")
        return self._failure(done, address, socket.IPPROTO_UDP)

    def dns(
        self, name: str, servers: Sequence[str], seconds: float
    ) -> tuple[Answer, tuple[str, ...]]:
        """As Vantage.dns; without servers, those that the guest knows of are asked."""
        server = servers[0] if servers else ""
        done = self._run(_DNS, name, server, _whole(seconds), seconds=seconds)
        if isinstance(done, Answer):
            return done, ()
        found = _addresses(done.out.decode(errors="replace"))
        if found:
            return Answer("reached", ", ".join(found)), found
        text = (done.out + done.err).decode(errors="replace")
        if _NO_NAME.search(text) and "timed out" not in text:
            said = f"{server or 'its name server'} knows no address of it"
            return Answer("refused", said), ()
        return self._failure(done, server or "its name server", socket.IPPROTO_UDP), ()

    def _run(self, script: str, *arguments: str, seconds: float) -> Completed | Answer:
        argv = ("/bin/sh", "-c", script, "sh", *arguments)
        try:
            done = self._inside.run(argv, seconds + _GRACE)
        except NetorchError as error:
            return Answer("broken", error.message)
        if done is None:
            return Completed(-1, b"", b"")
        if done.code == _MISSING:
            what = done.err.decode(errors="replace").strip()
            return Answer("broken", f"guest {self._inside.guest} has {what} to probe with")
        return done

    def _failure(self, done: Completed, address: str, protocol: int) -> Answer:
        if self._incoming and (turned := self._incoming.rejection(address, protocol)):
            return rejected(turned.code, turned.by, "", address)
        text = (done.err + done.out).decode(errors="replace")
        if _REFUSED.search(text):
            return Answer("refused", f"refused by {address}")
        if _NO_NAME.search(text):
            return Answer("unreachable", f"it finds no address of {address}")
        if _UNREACHABLE.search(text):
            return Answer("unreachable", f"no route to {address}, or nobody there")
        return Answer("silent", "no answer")


def _addresses(text: str) -> tuple[str, ...]:
    """Those of nslookup's second part (the first is the server's own), or of getent's lines."""
    _, named, answer = text.partition("Name:")
    lines = answer if named else "" if "Server:" in text else text
    return tuple(dict.fromkeys(re.findall(r"(?<![\d.])\d+(?:\.\d+){3}(?![\d.])", lines)))


def _whole(seconds: float) -> str:
    """Seconds as programs take them."""
    return str(max(1, round(seconds)))
