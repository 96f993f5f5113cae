"""Where nftables drops a packet: the kernel's own trace of a probe.

A chain of ours at the very beginning of the prerouting and output hooks sets the trace bit on the
probe's packets and on their answers; the kernel then reports every rule that they meet, in any
table, to whoever listens to NFNLGRP_TRACE. So there is no guessing from policies or counters: the
report names the rule that dropped it. A table of family bridge does the same for bridged frames.

Both tables have the flag `owner`: they live as long as the netlink socket that made them (Linux
5.12), so nothing is left even by a SIGKILL. Where the kernel can't do that, nothing is traced.

Messages and attributes: <linux/netfilter/nf_tables.h>, enum nft_trace_attributes.
"""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

from netorch.errors import KernelError
from netorch.system.netlink import HEADER
from netorch.system.nft import Nft
from netorch.system.snapshot import attributes

_NETFILTER, _SOL_NETLINK, _ADD_MEMBERSHIP = 12, 270, 1
_TRACE_GROUP = 9  # NFNLGRP_NFTRACE
_TRACE = 10 << 8 | 17  # NFNL_SUBSYS_NFTABLES, NFT_MSG_TRACE
_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID, _PACKET, _POLICY = 1, 2, 3, 4, 5, 6, 8, 16
_BY_POLICY, _BY_RULE = 1, 3
_DROP = 0
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_FIRST = -1000  # before connection tracking and the raw tables


class Drop(msgspec.Struct, frozen=True):
    """What dropped a packet: a rule, as nft lists it, or ("") the chain's policy."""

    family: str
    table: str
    chain: str
    rule: str
    answer: bool  # it was the answer that was dropped

    @property
    def where(self) -> str:
        return f"chain {self.chain} of table {self.family} {self.table}"


class _Event(msgspec.Struct, frozen=True):
    """A message of the kernel about one packet in one chain."""

    family: str
    table: str
    chain: str
    packet: int
    handle: int  # of the rule; 0 for a policy
    dropped: bool
    source: str  # "" where the message has no packet
    target: str


class Packets(msgspec.Struct, frozen=True):
    """The packets between two addresses that are the probe's, and its answers, as nft writes it."""

    request: str
    answer: str


PINGS = Packets("icmp type echo-request", "icmp type echo-reply")


class Trace:
    """Traces the probes between two IPv4 addresses while the block runs.

    Raises KernelError or MissingError where the machine can't trace.
    """

    def __init__(self, lab: str, source: str, target: str, packets: Packets) -> None:
        self._ends = (source, target)
        self._nft = Nft(handles=True)
        table = f"netorchtrace_{lab}_{os.urandom(4).hex()}"
        rules = (
            f"ip saddr {source} ip daddr {target} {packets.request} meta nftrace set 1\n"
            f"ip saddr {target} {packets.answer} meta nftrace set 1\n"
        )
        self._nft.run(_table("inet", table, ("prerouting", "output"), rules), "trace")
        with suppress(KernelError):  # a kernel without this family has no rules of it either
            self._nft.run(_table("bridge", table, ("prerouting",), rules), "trace")
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER
        )
        self._socket.setblocking(False)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _TRACE_GROUP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        del self._nft  # and the tables with its socket

    def drop(self) -> Drop | None:
        """What dropped one of the packets so far, the first if several did."""
        source, target = self._ends
        events = list(self._events())
        requests = {e.packet for e in events if (e.source, e.target) == (source, target)}
        answers = {e.packet for e in events if e.source == target}
        for event in events:
            if event.dropped and event.packet in requests | answers:
                where = (event.family, event.table, event.chain)
                rule = self._rule(event) if event.handle else ""
                return Drop(*where, rule=rule, answer=event.packet not in requests)
        return None

    def _events(self) -> Iterator[_Event]:
        """The kernel writes them while the packet is on its way, so they are all here by now."""
        while True:
            try:
                data = memoryview(self._socket.recv(1 << 16))
            except BlockingIOError:
                return
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, _, _, _ = HEADER.unpack_from(data, at)
                if kind == _TRACE:
                    yield parse(data[at + HEADER.size : at + length])
                at += length + 3 & ~3

    def _rule(self, event: _Event) -> str:
        command = f"list chain {event.family} {event.table} {event.chain}"
        try:
            listing = self._nft.run(command, command)
        except KernelError:  # the chain went meanwhile: what dropped the packet is known anyway
            listing = ""
        line = re.search(rf"^\s*(.*) # handle {event.handle}$", listing, re.MULTILINE)
        return line[1] if line else f"handle {event.handle}"


def parse(body: memoryview) -> _Event:
    """A trace message, from its struct nfgenmsg on."""
    values = dict(attributes(body[4:]))
    kind = _number(values[_TYPE])
    verdict: int | None = None
    if kind == _BY_POLICY and _POLICY in values:
        verdict = _number(values[_POLICY])
    elif kind == _BY_RULE and _VERDICT in values:
        verdict = _number(dict(attributes(values[_VERDICT]))[1])
    packet = values.get(_PACKET, memoryview(b""))
    known = len(packet) >= 20
    return _Event(
        family=_FAMILIES.get(body[0], "inet"),
        table=_text(values[_TABLE]),
        chain=_text(values[_CHAIN]),
        packet=int.from_bytes(values[_ID], sys.byteorder),
        handle=_number(values[_HANDLE]) if kind == _BY_RULE and _HANDLE in values else 0,
        dropped=verdict == _DROP,
        source=socket.inet_ntoa(packet[12:16]) if known else "",
        target=socket.inet_ntoa(packet[16:20]) if known else "",
    )


def _table(family: str, name: str, hooks: tuple[str, ...], rules: str) -> str:
    chains = "".join(
        f"chain {hook} {{\ntype filter hook {hook} priority {_FIRST}; policy accept\n{rules}}}\n"
        for hook in hooks
    )
    return f"table {family} {name} {{\nflags owner\n{chains}}}\n"


def _number(value: memoryview) -> int:
    return int.from_bytes(value, "big")


def _text(value: memoryview) -> str:
    return bytes(value).rstrip(b"\0").decode(errors="replace")
