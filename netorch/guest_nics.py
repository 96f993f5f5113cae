"""A guest's NICs, from what the file says of them: a part of the compiler."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Interface, IPv4Network

import msgspec

from netorch.addresses import Macs
from netorch.model import Forward, Topology
from netorch.names import tap_id, tap_name
from netorch.resources import GuestNic
from netorch.topology_nics import model_of


def guest_nics(
    topology: Topology,
    name: str,
    *,
    macs: Macs,
    subnets: Iterator[str],
    served: Collection[str],
    helpers: Mapping[str, str] | None,
) -> tuple[GuestNic, ...]:
    """The NICs of a guest. `subnets` are for "user" and "passt"; `served` are the networks with
    DHCP; `helpers` are the bridges on which
    qemu-bridge-helper makes the taps, where it does.
    """
    guest = topology.guests[name]
    found = []
    for index, nic in enumerate(guest.nics):
        end = GuestNic(
            id=tap_id(index, nic),
            mac=macs.of_nic(name, index, nic.mac),
            model=model_of(guest, nic),
            backend=nic.backend,
            network=nic.network or "",
            served=nic.network in served,
            link=nic.link,
        )
        found.append(msgspec.structs.replace(end, **_behind(topology, name, index, helpers)))
        if nic.backend != "tap":
            found[-1] = msgspec.structs.replace(found[-1], subnet=next(subnets))
    return tuple(found)


def user_subnets(gateways: Iterable[IPv4Interface | None]) -> Iterator[str]:
    """Subnets for QEMU or passt to play, one for each such NIC of a guest: from QEMU's usual
    10.0.2.0/24 on, without those of the lab's networks, which the guest may be on as well.
    """
    taken = [gateway.network for gateway in gateways if gateway]
    for subnet in IPv4Network("10.0.0.0/8").subnets(new_prefix=24):
        if subnet >= IPv4Network("10.0.2.0/24") and not any(map(subnet.overlaps, taken)):
            yield str(subnet)


def _behind(
    topology: Topology, name: str, index: int, helpers: Mapping[str, str] | None
) -> dict[str, object]:
    nic = topology.guests[name].nics[index]
    if nic.wire is not None:
        return {"backend": "wire", "wire": nic.wire, "end": _end(topology, nic.wire, name)}
    if nic.network is None:
        return {"forward": tuple(map(_forward, nic.forward))}
    if helpers is not None:
        return {"queues": nic.queues, "bridge": helpers[nic.network]}
    return {"queues": nic.queues, "tap": tap_name(name, index, nic)}


def _end(topology: Topology, wire: str, name: str) -> int:
    """0 or 1, by the guests' names: so their order in the file doesn't matter."""
    return sorted(_guests_on(topology, wire)).index(name)


def _guests_on(topology: Topology, wire: str) -> Iterator[str]:
    for name, guest in topology.guests.items():
        if any(nic.wire == wire for nic in guest.nics):
            yield name


def _forward(written: Forward) -> Forward:
    return msgspec.structs.replace(written, to=written.to or written.port)
