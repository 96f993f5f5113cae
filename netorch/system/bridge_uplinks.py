"""Uplinks of bridges: interfaces that aren't ours, whose place at layer 3 a bridge takes.

Theory of operation
-------------------
A port of a bridge gets no packets of its own any more, so its addresses and routes have to stand on
the bridge. All of the move is one sendmsg: the mark, the port, the routes and addresses off the
interface and onto the bridge (`netorch.system.layer3`). The kernel works through it in the sender's
context before it looks at a signal, so SIGKILL comes before all of it or after all of it, and the
time without routes is that of a few dozen messages, some of a millisecond. The way back is the same
with the two exchanged.

The order within: the interface becomes a port first, since that takes longest and hurts nobody
(what comes in is answered by the bridge, which has the same MAC; what goes out still leaves by the
interface). The old address goes before the new one comes, because the kernel, when it removes an
IPv4 address, drops every route that has it as its source, on any interface.

What has to be known to undo it
-------------------------------
The bridge's own addresses and routes are the record: whatever it has besides the lab's own goes
back to the interface, in the state that it has then (a lease renewed, a route added meanwhile).
Only which interface it is and whether it was up can't be derived; they stand in an alternative name
of the bridge, `netorch-uplink:<index>:<up|down>:<name>`, set in the same sendmsg. It is on an
object of ours, so the interface keeps its own alias, and it lives exactly as long as the change
does: a lost run directory loses nothing, a reboot takes both. (Elements of an nft set would do as
well, but need a second transaction, and a kill could come between the two.) MTU, MAC and forwarding
of the interface are not changed, but given to the bridge; its promiscuity the kernel counts by
itself.

The file in the run directory (`netorch.system.uplink_records`) is a second leg for what the kernel
can't hold: a part of a move that the kernel refused, and a bridge that somebody else deletes.

IPv6 settings (accept_ra and its like) are copied to the bridge before the move where /proc/sys is
writable. Not moved: traffic control, what other programs keep by the interface's name
(rules, sockets bound to it, DHCP clients: `netorch.system.uplink_checks` names those).
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from netorch.errors import KernelError, MissingError, NetorchError
from netorch.planner import Update
from netorch.resources import BridgeUplink, Resource
from netorch.system import layer3, messages
from netorch.system.layer3 import Holding
from netorch.system.look import Look
from netorch.system.netlink import HEADER, Netlink, Outcomes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot, UplinkMark, uplink_mark
from netorch.system.uplink_records import Record, Records
from netorch.system.uplink_settings import copy_settings

# IN6_ADDR_GEN_MODE_NONE: link-local addresses there are someone's, not the kernel's.
NO_LINK_LOCAL = 1

Done = Callable[[Resource], None]
# What a message finds done already: an address or route that is there, or gone with another one.
_DONE_ALREADY = {
    messages.NEWADDR: (errno.EEXIST,),
    messages.NEWROUTE: (errno.EEXIST,),
    messages.DELNEIGH: (errno.ENOENT,),
    messages.DELADDR: (errno.EADDRNOTAVAIL,),
    messages.DELROUTE: (errno.ESRCH, errno.ENOENT),
    messages.NEWLINKPROP: (errno.EEXIST,),
    messages.DELLINKPROP: (errno.ENOENT, errno.EINVAL),
}


class BridgeUplinks:
    """The adapter for BridgeUplink."""

    kinds: tuple[type[Resource], ...] = (BridgeUplink,)

    def __init__(self, scope: Scope, warn: Callable[[str], None] = lambda line: None) -> None:
        self._scope = scope
        self._records = Records(scope)
        self._warn = warn

    def observe(self, look: Look | None = None) -> Iterable[Resource]:
        snapshot = (look or Look(self._scope)).snapshot
        with Netlink() as netlink:
            found = {u.network: u for u in self._observe(snapshot)}
            for record in self._records.all():
                if record.network not in found and _lacks(netlink, snapshot, record):
                    found[record.network] = BridgeUplink(
                        network=record.network, name=record.name, bridge=record.bridge, joined=False
                    )
        return found.values()

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        from netorch.system.uplink_checks import reasons  # only before a change

        uplinks = [resource for resource in wanted if isinstance(resource, BridgeUplink)]
        return [line for uplink in uplinks for line in reasons(uplink, self._scope)]

    def create(self, wanted: Sequence[Resource], done: Done) -> None:
        for uplink in wanted:
            assert isinstance(uplink, BridgeUplink)
            with Netlink() as netlink:
                self._give_back(netlink, uplink)  # of an earlier bridge that is gone
                self._take(netlink, uplink)
            done(uplink)

    def update(self, wanted: Sequence[Update], done: Done) -> None:
        for change in wanted:
            assert isinstance(change.new, BridgeUplink)
            if change.new.joined:
                self.create([change.new], done)
            else:  # a rollback to a state that was broken before
                self.delete([change.new], lambda resource: None)
                done(change.new)

    def delete(self, unwanted: Sequence[Resource], done: Done) -> None:
        for uplink in unwanted:
            assert isinstance(uplink, BridgeUplink)
            with Netlink() as netlink:
                self._give_back(netlink, uplink)
            done(uplink)

    def _observe(self, snapshot: Snapshot) -> Iterator[BridgeUplink]:
        prefix = self._scope.alias("bridge:")
        for bridge in snapshot.links.values():
            mark = uplink_mark(bridge) if bridge.alias.startswith(prefix) else None
            if mark is not None:
                port = snapshot.links.get(mark.index)
                yield BridgeUplink(
                    network=bridge.alias.removeprefix(prefix),
                    name=port.name if port else mark.name,
                    bridge=bridge.name,
                    joined=port is not None and port.master == bridge.index,
                )

    def _take(self, netlink: Netlink, uplink: BridgeUplink) -> None:
        snapshot = Snapshot(netlink)
        bridge, port = self._bridge(snapshot, uplink), snapshot.by_name.get(uplink.name)
        if bridge is None or port is None:
            missing = uplink.bridge if bridge is None else uplink.name
            raise KernelError(
                f"failed to take {uplink.name} into {uplink.bridge}: there is no {missing}",
                errno.ENODEV,
            )
        if port.ipv6 is not None:
            copy_settings(netlink, port, bridge, self._warn)
        own = snapshot.own(bridge)
        mark = UplinkMark(port.index, port.up, port.name)
        held = layer3.look(netlink, port.index, link_local=port.ipv6 == NO_LINK_LOCAL)
        record = Record(
            network=uplink.network,
            name=port.name,
            bridge=bridge.name,
            was_up=port.up,
            holding=held,
        )
        self._records.write(record)
        join = (("IFLA_MASTER", bridge.index), messages.up(True))
        batch = [
            messages.alternative_name(messages.NEWLINKPROP, bridge.index, str(mark)),
            messages.link(port.index, attributes=join),
            *held.taken(port.index),
            *_away(bridge, own),
            *held.given(bridge.index),
            *_back(bridge, own),
        ]
        if failed := _first(batch, netlink.send_whole(batch)):
            self._put_back(netlink, bridge, port, held, own, mark)
            self._records.remove(uplink.network)
            raise _refused(f"failed to take {uplink.name} into {uplink.bridge}", *failed)
        self._records.write(msgspec.structs.replace(record, complete=True))

    def _put_back(
        self,
        netlink: Netlink,
        bridge: Link,
        port: Link,
        held: Holding,
        own: Sequence[str],
        mark: UplinkMark,
    ) -> None:
        """Undo a move that went wrong half-way: what the interface had is still known here."""
        batch = [
            *held.taken(bridge.index),
            *_away(bridge, own),
            *_left(port, bridge, mark),
            *held.given(port.index),
            *_back(bridge, own),
            messages.alternative_name(messages.DELLINKPROP, bridge.index, str(mark)),
        ]
        if failed := _first(batch, netlink.send_whole(batch)):
            raise _refused(f"failed to give {port.name} back what it had", *failed)

    def _give_back(self, netlink: Netlink, uplink: BridgeUplink) -> None:
        """All that the bridge has besides the lab's own, and what a record says is missing."""
        snapshot = Snapshot(netlink)
        bridge = self._bridge(snapshot, uplink)
        mark = uplink_mark(bridge) if bridge is not None else None
        record = self._records.of(uplink.network)
        if bridge is not None and mark is not None:
            batch = self._way_back(netlink, snapshot, bridge, mark, record)
        elif record is not None and _lacks(netlink, snapshot, record):
            batch = list(record.holding.given(snapshot.by_name[record.name].index))
        else:
            batch = []
        if failed := _first(batch, netlink.send_whole(batch)):
            raise _refused(f"failed to give {uplink.name} back what it had", *failed)
        self._records.remove(uplink.network)

    def _way_back(
        self,
        netlink: Netlink,
        snapshot: Snapshot,
        bridge: Link,
        mark: UplinkMark,
        record: Record | None,
    ) -> list[bytearray]:
        unmark = messages.alternative_name(messages.DELLINKPROP, bridge.index, str(mark))
        port = snapshot.links.get(mark.index) or snapshot.by_name.get(mark.name)
        if port is None:
            return [unmark]  # the interface is gone, and nothing can have its addresses
        own = snapshot.own(bridge)
        made_by_hand = bridge.ipv6 == NO_LINK_LOCAL
        gained = layer3.look(
            netlink,
            bridge.index,
            own=[text.partition("/")[0] for text in own],
            link_local=made_by_hand,
        )
        lost: tuple[bytearray, ...] = ()
        if record is not None and not record.complete:
            lost = tuple(record.holding.without(gained).given(port.index))
        return [
            *gained.taken(bridge.index),
            *_away(bridge, own),
            *gained.given(port.index),
            *lost,
            *_left(port, bridge, mark),
            *([] if made_by_hand else _no_ipv6(netlink, bridge)),
            *_back(bridge, own),
            unmark,
        ]

    def _bridge(self, snapshot: Snapshot, uplink: BridgeUplink) -> Link | None:
        alias = self._scope.alias(f"bridge:{uplink.network}")
        return next((link for link in snapshot.links.values() if link.alias == alias), None)


def _lacks(netlink: Netlink, snapshot: Snapshot, record: Record) -> bool:
    """Without a bridge that has them: does the interface lack some of what it had?"""
    port = snapshot.by_name.get(record.name)
    made = record.complete or record.bridge not in snapshot.by_name
    if port is None or not made:
        return False
    now = layer3.look(netlink, port.index, link_local=port.ipv6 == NO_LINK_LOCAL)
    return bool(record.holding.without(now))


def _away(bridge: Link, own: Sequence[str]) -> Iterator[bytearray]:
    """The bridge's own addresses make room: they are additional ones, behind the uplink's."""
    for text in reversed(own):
        yield messages.address(messages.DELADDR, bridge.index, text)


def _back(bridge: Link, own: Sequence[str]) -> Iterator[bytearray]:
    for text in own:
        yield messages.address(messages.NEWADDR, bridge.index, text)


def _left(port: Link, bridge: Link, mark: UplinkMark) -> list[bytearray]:
    """The interface leaves the bridge, unless it has left already, and goes down if it was."""
    attributes: messages.Attributes = () if mark.was_up else (messages.up(False),)
    if port.master in (0, bridge.index):
        attributes = (("IFLA_MASTER", 0), *attributes)
    return [messages.link(port.index, attributes=attributes)] if attributes else []


def _no_ipv6(netlink: Netlink, bridge: Link) -> list[bytearray]:
    """A bridge without an uplink has no IPv6 of its own."""
    if bridge.ipv6 is None:
        return []
    families = (("AF_INET6", (("IFLA_INET6_ADDR_GEN_MODE", NO_LINK_LOCAL),)),)
    off = messages.link(bridge.index, attributes=(("IFLA_AF_SPEC", families),))
    return [off, *layer3.link_locals(netlink, bridge.index)]


def _first(batch: Sequence[bytearray], outcomes: Outcomes) -> tuple[bytearray, KernelError] | None:
    """The first message that failed for another reason than that there was nothing to do."""
    for message, error in zip(batch, outcomes, strict=True):
        _, kind, *_ = HEADER.unpack_from(message)
        if error is not None and error.errno not in _DONE_ALREADY.get(kind, ()):
            return message, error
    return None


def _refused(what: str, message: bytearray, error: KernelError) -> NetorchError:
    part = layer3.describe(bytes(message))
    text = f"{what}: {part}: {error.message}"
    if error.errno == errno.EOPNOTSUPP:
        refused: NetorchError = MissingError(
            f"{what}: its driver can't be a port of a bridge (Wi-Fi can't, as long as it is a "
            "station: its access point takes frames from one address only)",
            'use mode = "nat" instead',
        )
    elif error.errno == errno.EBUSY:
        hint = "a macvlan, a bond or another bridge may be on it: `ip -d link`"
        refused = KernelError(text, error.errno, hint)
    elif error.errno in (errno.EPERM, errno.EACCES):
        refused = KernelError(text, error.errno, "this needs CAP_NET_ADMIN")
    else:
        refused = KernelError(text, error.errno)
    refused.__cause__ = error
    return refused
