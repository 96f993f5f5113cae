"""Rates of taps and veths, by the token bucket filter (tbf) of both of their directions.

What a node receives, the kernel sends on the node's port (its tap, or the bridge's end of its
veth): a tbf as the port's root qdisc limits that. What a node sends comes in by the port, where
there are no queues: an `ingress` qdisc redirects it to an ifb of the port's own, whose root qdisc
is a tbf, and which hands it back as if it had just come in by the port. (The action `police` would
need no ifb, but drops all that it doesn't let pass, and a TCP then has a fraction of its rate.)

The ifb carries the mark of the Rate; it is there even where only one direction is limited. A port's
tbf is ours by its handle. Where no Rate is wanted, nobody looks at qdiscs, and they cost nothing.
An ifb, its tbf and what leads to it are made by one call into the kernel: whoever is killed before
or after has no packet lost. The same holds for taking away, redirection first: a redirection to an
ifb that is gone drops everything.

The messages are put together from the structs of <linux/pkt_sched.h>, <linux/pkt_cls.h> and
<linux/tc_act/tc_mirred.h>.
"""

import errno
import os
import socket
import struct
from collections.abc import Mapping, Sequence

import msgspec

from netorch.errors import KernelError
from netorch.resources import Rate
from netorch.system import changes, messages, removal
from netorch.system.changes import Wanted
from netorch.system.netlink import HEADER, Group, Netlink, Outcomes
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot, attributes

_NEWQDISC, _DELQDISC, _GETQDISC, _NEWTFILTER, _GETTFILTER = 36, 37, 38, 44, 46
_REPLACE = 0x100
_TC = struct.Struct("=B3xiIII")  # tcmsg: family, interface, handle, parent, info
_ROOT, _INGRESS, _INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000
_OURS = 0x4E000000  # the handle 4e00: of our tbfs ("N")
_KIND, _OPTIONS = 1, 2  # TCA_
_TBF_PARMS, _TBF_BURST = 1, 6
_RATESPEC = struct.Struct("=BBHhHI")  # cell, link layer, overhead, cell alignment, mpu, bytes/s
_ETHERNET = 1  # TC_LINKLAYER_ETHERNET: without, the kernel wants a table of transmission times
_U32_SEL, _U32_ACT = 5, 7
_ACT_KIND, _ACT_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_MIRRED = struct.Struct("=IIiiiiI")  # index, capab, action, refcnt, bindcnt, eaction, interface
_STOLEN, _EGRESS_REDIRECT = 4, 1
_ALL_PROTOCOLS = socket.htons(3)  # ETH_P_ALL
# A packet of a guest with vnet_hdr has up to 64 KiB and a header; what is larger than the burst is
# cut by the CPU, packet by packet (net/sched/sch_tbf.c, tbf_segment).
_LEAST_BURST = 66 << 10
_BURST_SECONDS, _LATENCY_SECONDS = 0.005, 0.05


class Seen(msgspec.Struct):
    """The qdiscs of a place: what passes our tbfs, by interface, and who has an ingress qdisc."""

    bytes_per_second: dict[int, int] = {}
    ingress: set[int] = set()


def observe(own: Mapping[str, Link]) -> list[Rate]:
    """The Rates of the lab's links `own`, which are by key; no dump where there are none."""
    ifbs = {key.removeprefix("rate:"): link for key, link in own.items() if _is_rate(key)}
    if not ifbs:
        return []
    with Netlink() as netlink:
        seen = _look(netlink)
        return [_observe(netlink, port, ifb, own.get(port), seen) for port, ifb in ifbs.items()]


def create(
    netlink: Netlink,
    snapshot: Snapshot,
    own: Mapping[str, Link],
    wanted: Sequence[Rate],
    scope: Scope,
) -> Outcomes:
    """Make the ifbs of Rates and limit their ports. What fails leaves nothing."""
    if not wanted:
        return []
    ipv6 = 0 if snapshot.has_ipv6 else None
    ifbs = [Link(index=changes.new_index(snapshot), ipv6=ipv6, mtu=1500) for _ in wanted]
    seen = _look(netlink)
    groups: list[Group] = []
    for rate, ifb in zip(wanted, ifbs, strict=True):
        made = messages.link(
            ifb.index,
            name=rate.name,
            flags=messages.CREATE | messages.EXCLUSIVE,
            attributes=(("IFLA_LINKINFO", (("IFLA_INFO_KIND", "ifb"),)),),
        )
        port = own.get(rate.port)
        rest = _settle(netlink, rate, ifb, port, seen, scope) if port else []
        groups.append([made, *rest] if port else [])
    outcomes = netlink.send(groups)
    for place, rate in enumerate(wanted):
        if rate.port not in own:
            outcomes[place] = _gone(rate)
    failed = [r for r, error in zip(wanted, outcomes, strict=True) if error is not None]
    release(netlink, own, failed)
    removal.take_back(netlink, [ifb.index for ifb in ifbs], outcomes)
    return outcomes


def update(
    netlink: Netlink, own: Mapping[str, Link], wanted: Sequence[Rate], scope: Scope
) -> Outcomes:
    """Bring Rates, whose ifbs and ports are among `own`, to what they should be."""
    if not wanted:
        return []
    seen = _look(netlink)
    outcomes: Outcomes = []
    groups: list[Group] = []
    for rate in wanted:
        port = own.get(rate.port)
        outcomes.append(None if port else _gone(rate))
        ifb = own[rate.key]
        groups.append(_settle(netlink, rate, ifb, port, seen, scope) if port else [])
    sent = netlink.send(groups)
    return [known or error for known, error in zip(outcomes, sent, strict=True)]


def release(netlink: Netlink, own: Mapping[str, Link], unwanted: Sequence[Rate]) -> None:
    """Take the limits off the ports that are there, so that the ifbs can go."""
    if not unwanted:
        return
    seen = _look(netlink)
    ports = [own[rate.port].index for rate in unwanted if rate.port in own]
    groups = [[*_unlimited(port, seen), *_undirected(port, seen)] for port in ports]
    for error in netlink.send(groups):
        if error is not None:
            raise KernelError(f"failed to take a rate off: {error.message}", error.errno)


def missing(snapshot: Snapshot) -> list[str]:
    """What this kernel lacks for rates, found by making one on an ifb that is gone again when the
    call returns.
    """
    index = changes.new_index(snapshot)
    name = f"rate{os.urandom(4).hex()}"
    trial = {
        "ifb": messages.link(
            index,
            name=name,
            flags=messages.CREATE | messages.EXCLUSIVE,
            attributes=(("IFLA_LINKINFO", (("IFLA_INFO_KIND", "ifb"),)),),
        ),
        "sch_tbf": _tbf(index, 10**6),
        "sch_ingress": _ingress(index),
        "cls_u32": _filter(index, b""),
        "act_mirred": _filter(index, _redirect(index), priority=2),
    }
    with Netlink() as netlink:
        outcomes = netlink.send_whole([*trial.values(), messages.delete_link(index)])
    for module, error in zip(trial, outcomes, strict=False):
        if error is not None:
            return [
                f"rates of NICs need the kernel's {module}: {error.message} "
                f"(on a host, `modprobe {module}`)"
            ]
    return []


def _observe(netlink: Netlink, port: str, ifb: Link, link: Link | None, seen: Seen) -> Rate:
    into = seen.bytes_per_second.get(link.index, 0) if link else 0
    out = seen.bytes_per_second.get(ifb.index, 0)
    if not (link and ifb.up and link.index in seen.ingress and _leads(netlink, link, ifb)):
        out = 0
    return Rate(name=ifb.name, port=port, into=into * 8, out=out * 8)


def _settle(
    netlink: Netlink, rate: Rate, ifb: Link, port: Link, seen: Seen, scope: Scope
) -> list[bytearray]:
    """All that limits the port; a redirection that is right stays, so that no packet is lost."""
    wanted = Wanted(
        alias=scope.alias(rate.key),
        mac=ifb.mac,
        mtu=ifb.mtu,
        up=True,
        group=scope.group,
        no_ipv6=True,
    )
    group = [*changes.configure(ifb, wanted), *changes.activate(ifb, wanted)]
    if rate.out:
        group.append(_tbf(ifb.index, rate.out // 8))
        if not (port.index in seen.ingress and _leads(netlink, port, ifb)):
            group += [*_undirected(port.index, seen), _ingress(port.index)]
            group.append(_filter(port.index, _redirect(ifb.index)))
    else:
        group += _undirected(port.index, seen)
    if rate.into:
        group.append(_tbf(port.index, rate.into // 8))
    else:
        group += _unlimited(port.index, seen)
    return group


def _look(netlink: Netlink) -> Seen:
    seen = Seen()
    for body in netlink.dump(_GETQDISC, _TC.pack(0, 0, 0, 0, 0)):
        _, index, handle, parent, _ = _TC.unpack_from(body)
        if parent == _INGRESS:
            seen.ingress.add(index)
        elif parent == _ROOT and handle == _OURS:
            values = dict(attributes(body[_TC.size :]))
            parameters = dict(attributes(values.get(_OPTIONS, memoryview(b"")))).get(_TBF_PARMS)
            if parameters is not None:
                seen.bytes_per_second[index] = _RATESPEC.unpack_from(parameters)[5]
    return seen


def _leads(netlink: Netlink, port: Link, ifb: Link) -> bool:
    """Whether all that comes in by the port goes to the ifb."""
    for body in netlink.dump(_GETTFILTER, _TC.pack(0, port.index, 0, _INGRESS_HANDLE, 0)):
        found = body[_TC.size :]
        for kind in (_OPTIONS, _U32_ACT, 1, _ACT_OPTIONS, _MIRRED_PARMS):
            found = dict(attributes(found)).get(kind, memoryview(b""))
        if len(found) >= _MIRRED.size:
            *_, action, index = _MIRRED.unpack_from(found)
            return bool(action == _EGRESS_REDIRECT and index == ifb.index)
    return False


def _tbf(index: int, rate: int) -> bytearray:
    """The tbf of `rate` bytes a second as the root qdisc, whatever the link has there now."""
    burst = max(_LEAST_BURST, int(rate * _BURST_SECONDS))
    limit = burst + int(rate * _LATENCY_SECONDS)
    parameters = _RATESPEC.pack(0, _ETHERNET, 0, 0, 0, rate) + bytes(_RATESPEC.size)
    parameters += struct.pack("=III", limit, 0, 0)
    options = _attribute(_TBF_PARMS, parameters) + _attribute(_TBF_BURST, struct.pack("=I", burst))
    flags = messages.CREATE | _REPLACE
    return _message(_NEWQDISC, flags, index, _OURS, _ROOT, 0, "tbf", options)


def _ingress(index: int) -> bytearray:
    flags = messages.CREATE | messages.EXCLUSIVE
    return _message(_NEWQDISC, flags, index, _INGRESS_HANDLE, _INGRESS, 0, "ingress", b"")


def _filter(index: int, action: bytes, priority: int = 1) -> bytearray:
    """A u32 that matches everything."""
    flags = messages.CREATE | messages.EXCLUSIVE
    selector = struct.pack("=BBBxHHhhI", 1, 0, 1, 0, 0, 0, 0, 0) + bytes(16)  # TC_U32_TERMINAL
    options = _attribute(_U32_SEL, selector) + action
    info = priority << 16 | _ALL_PROTOCOLS
    return _message(_NEWTFILTER, flags, index, 0, _INGRESS_HANDLE, info, "u32", options)


def _redirect(ifb: int) -> bytes:
    parameters = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, ifb)
    action = _attribute(_ACT_KIND, b"mirred\0")
    action += _attribute(_ACT_OPTIONS, _attribute(_MIRRED_PARMS, parameters))
    return _attribute(_U32_ACT, _attribute(1, action))


def _unlimited(index: int, seen: Seen) -> list[bytearray]:
    if index not in seen.bytes_per_second:
        return []
    return [_message(_DELQDISC, 0, index, _OURS, _ROOT)]


def _undirected(index: int, seen: Seen) -> list[bytearray]:
    if index not in seen.ingress:
        return []
    return [_message(_DELQDISC, 0, index, _INGRESS_HANDLE, _INGRESS)]


def _message(
    kind: int,
    flags: int,
    index: int,
    handle: int,
    parent: int,
    info: int = 0,
    name: str = "",
    options: bytes = b"",
) -> bytearray:
    body = _TC.pack(0, index, handle, parent, info)
    if name:
        body += _attribute(_KIND, name.encode() + b"\0")
    if options:
        body += _attribute(_OPTIONS, options)
    return bytearray(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _gone(rate: Rate) -> KernelError:
    return KernelError(f"{rate.port.replace(':', ' ', 1)} is gone", errno.ENODEV)


def _is_rate(key: str) -> bool:
    return key.startswith("rate:")
