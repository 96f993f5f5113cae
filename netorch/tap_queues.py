"""Who has which tap: the open queues of `system.queues`, joined with what is known of each tap.

Every tap that can be seen gives a row for each process that has it open, or one without a process.
A field that nothing observable tells is None. Where each comes from, the surest first:

    namespace  the kernel, asked of the descriptor; netorch's mark in the process's environment; the
               process's own namespace if that has such a tap, open (`namespace_from` says which)
    queues     the kernel's count, so also of processes that can't be seen
    guest      netorch's mark; QEMU's command line
    NIC, MAC   the same, by the tap's name or its descriptors. Both may be older than the NIC, and a
               descriptor's number be that of another NIC before. So where the tap's MAC is the
               NIC's with fe as its first byte, the two have to agree; and with neither, it is the
               MAC that the bridge has learned from this port, if that agrees
    address    netorch's leases by MAC; the ARP table, on the tap's bridge
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from netorch.guest_resources import Guest
from netorch.qemu_options import Options, read
from netorch.system.netns_links import View, queues, views
from netorch.system.queues import Holder, Queues, each_tap, marks_of
from netorch.system.scope import current_place, place_of, run_base
from netorch.system.snapshot import Link


class TapRow(msgspec.Struct, frozen=True, kw_only=True):
    """A tap, and a process that has it open. `idle` queues are open and not in use by the guest.

    `state` is "open", or "free": it is persistent, and nobody has it open. An open tap without a
    process is held by one that may not be looked into.
    """

    tap: str
    state: str
    namespace: int | None = None
    namespace_from: str | None = None
    place: str | None = None
    lab: str | None = None
    bridge: str | None = None
    queues: int | None = None
    idle: int | None = None
    process: str | None = None
    pid: int | None = None
    descriptors: tuple[int, ...] = ()
    guest: str | None = None
    model: str | None = None
    mac: str | None = None
    address: str | None = None


class Found(msgspec.Struct, frozen=True):
    """All rows. `refused`: so many processes may not be looked into."""

    rows: list[TapRow]
    refused: int


def find() -> Found:
    """Every tap that can be seen from here, and who has it."""
    here = current_place()
    with Queues() as seen:
        there = views(seen.spaces, here)
        places = _Places(seen, there, here)
        rows = list(_open(seen, there, places))
        held = {(row.namespace, row.tap) for row in rows}
        rows += _others(there, places, held)
        return Found(sorted(rows, key=_order), seen.refused)


def _order(row: TapRow) -> tuple[object, ...]:
    digits = row.tap.rstrip("0123456789")
    number = int(row.tap[len(digits) :] or -1)
    return (row.place != "here", row.place or "~", digits, number, row.pid or 0)


def _open(seen: Queues, there: Mapping[int, View], places: "_Places") -> Iterator[TapRow]:
    for holder in seen.holders:
        guest = _marked_guest(holder)
        options = read(holder.argv)
        for tap, asked, fds in each_tap(holder):
            namespace, by = _namespace(holder, tap, asked, there)
            view = there.get(namespace) if namespace is not None else None
            if view is not None and tap in view.tuns:
                continue
            link = view.taps.get(tap) if view is not None else None
            model, mac = _nic(guest, options, tap, fds, link, view)
            yield TapRow(
                tap=tap,
                state="open",
                namespace=namespace,
                namespace_from=by,
                process=holder.name,
                pid=holder.pid,
                descriptors=fds,
                guest=guest.name if guest else options.guest,
                model=model,
                mac=mac,
                **places.fields(namespace, link, mac),
            )


def _others(
    there: Mapping[int, View], places: "_Places", held: set[tuple[int | None, str]]
) -> Iterator[TapRow]:
    """The taps that no process which can be seen has open."""
    for inode, view in there.items():
        for name, link in view.taps.items():
            if (inode, name) not in held:
                mac = _learned(link, view)
                yield TapRow(
                    tap=name,
                    state="open" if queues(link)[0] else "free",
                    namespace=inode,
                    namespace_from="kernel",
                    mac=mac,
                    **places.fields(inode, link, mac),
                )


def _namespace(
    holder: Holder, tap: str, asked: int | None, there: Mapping[int, View]
) -> tuple[int | None, str | None]:
    if asked is not None:
        return asked, "kernel"
    marked = holder.marks.get("NETORCH_PLACE", "")
    if marked.isdecimal() and holder.uid == os.geteuid():
        return int(marked), "mark"
    view = there.get(holder.home) if holder.home is not None else None
    link = view.taps.get(tap) if view else None
    if link is not None and queues(link)[0]:
        return holder.home, "process"
    return None, None


def _marked_guest(holder: Holder) -> Guest | None:
    """What netorch's mark says, of a process that is ours, or asked for by root."""
    if "NETORCH_RESOURCE" not in holder.marks or os.geteuid() not in (0, holder.uid):
        return None
    try:
        return msgspec.json.decode(holder.marks["NETORCH_RESOURCE"].encode(), type=Guest)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None  # not a guest, or one of another version of netorch


def _nic(
    guest: Guest | None,
    options: Options,
    tap: str,
    fds: tuple[int, ...],
    link: Link | None,
    view: View | None,
) -> tuple[str | None, str | None]:
    """The model and the MAC of the NIC before a tap."""
    claims: list[tuple[str | None, str | None]] = []
    if guest is not None:
        claims += [(nic.model, nic.mac) for nic in guest.nics if nic.tap == tap]
    claims += [
        (nic.model, nic.mac)
        for nic in options.nics
        if nic.ifname == tap or not set(nic.fds).isdisjoint(fds)
    ]
    for model, mac in claims:
        if link is None or mac is None or not _has_the_nics(link, guest) or _pair(link.mac, mac):
            return model, mac
    return None, _learned(link, view) if link and view else None


def _learned(link: Link, view: View) -> str | None:
    """The MAC of the NIC as the bridge has learned it."""
    macs = [mac for mac in view.macs.get(link.index, ()) if _pair(link.mac, mac)]
    return macs[0] if len(macs) == 1 else None


def _pair(taps: str, nics: str) -> bool:
    return taps != nics and taps == "fe" + nics[2:]


def _has_the_nics(link: Link, guest: Guest | None) -> bool:
    """Whether the tap's MAC is made of its NIC's: those of netorch's guests, and of libvirt's
    (virnetdevtap.c). One of qemu-bridge-helper, or of [taps], begins with fe as well, and says
    nothing.
    """
    mark, *key = link.alias.split(":")
    if mark == "netorch":
        return guest is not None and key[1:3] == ["tap", guest.name]
    return link.name.startswith("vnet") and link.mac.startswith("fe:")


class _Places:
    """What the network namespace of a tap tells: its place, lab, bridge, addresses."""

    def __init__(self, seen: Queues, there: Mapping[int, View], here: int) -> None:
        self._seen = seen
        self._there = there
        self._here = here
        self._marks: dict[int, dict[str, str]] = {}
        self._leases: dict[tuple[int, str], dict[str, str]] = {}

    def fields(self, inode: int | None, link: Link | None, mac: str | None) -> dict[str, Any]:
        if inode is None:
            return {}
        fields: dict[str, Any] = {"place": self._word(inode), "lab": self._lab(inode, link)}
        if link is not None:
            view = self._there[inode]
            master = view.links.get(link.master)
            fields["bridge"] = master.name if master else None
            fields["queues"], fields["idle"] = queues(link)
            if mac is not None:
                fields["address"] = self._address(inode, link, mac, view)
        return fields

    def _word(self, inode: int) -> str:
        """here, private (of one of our labs), a name of `ip netns`, or the inode."""
        if inode == self._here:
            return "here"
        if self._private(inode):
            return "private"  # its `lab` says whose
        name = self._seen.names.get(inode)
        return f"netns {name}" if name else f"net:[{inode}]"

    def _lab(self, inode: int, link: Link | None) -> str | None:
        mark, _, rest = link.alias.partition(":") if link else ("", "", "")
        if mark == "netorch":
            return rest.partition(":")[0]
        return self._private(inode).get("NETORCH_LAB")

    def _private(self, inode: int) -> dict[str, str]:
        """The marks of the private place with this namespace, {} if it is none of ours."""
        if inode == self._here:
            return {}
        if inode not in self._marks:
            wanted = {"NETORCH_PLACE": str(inode), "NETORCH_PRIVATE": "1"}
            every = (marks_of(pid) for pid in self._seen.members.get(inode, ()))
            self._marks[inode] = next((m for m in every if wanted.items() <= m.items()), {})
        return self._marks[inode]

    def _address(self, inode: int, link: Link, mac: str, view: View) -> str | None:
        lab = self._lab(inode, link)
        leased = self._leased(inode, lab).get(mac) if lab else None
        known = (view.addresses.get((index, mac)) for index in (link.master, link.index))
        return leased or next(filter(None, known), None)

    def _leased(self, inode: int, lab: str) -> dict[str, str]:
        """The addresses of a lab's leases by MAC, if its run directory is of this place."""
        if (inode, lab) not in self._leases:
            run = self._run(inode, lab)
            self._leases[inode, lab] = _leases(run) if run is not None else {}
        return self._leases[inode, lab]

    def _run(self, inode: int, lab: str) -> Path | None:
        """The run directory of a lab of this user's in the namespace."""
        marks = self._private(inode)
        if marks.get("NETORCH_LAB") == lab and "NETORCH_RUN" in marks:
            run = Path(marks["NETORCH_RUN"])
        else:
            run = run_base() / lab
            if place_of(run) != inode:
                return None
        return run if run.is_dir() and run.stat().st_uid == os.geteuid() else None


def _leases(run: Path) -> dict[str, str]:
    """The addresses that are leased now, by MAC."""
    from netorch.system.leases import read_in

    now = time.time()
    held = [lease for lease in read_in(run) if lease.expires == 0 or lease.expires > now]
    return {lease.mac: lease.address for lease in held}
