"""A lab in text, for a report: who is on which network with which address, and who leads where."""

from collections.abc import Iterable, Mapping, Sequence

from netorch.resources import Bridge, DhcpClient, Guest, Namespace, Tap, Veth
from netorch.state import State


def networks(state: State, leased: Mapping[str, str]) -> str:
    """The networks as observed, each with what is on it. `leased` is by MAC."""
    rows: list[tuple[str, ...]] = []
    for bridge in state.of(Bridge):
        rows.append((bridge.network, bridge.name, " ".join(bridge.addresses), _up(bridge.up)))
        ports = [*_hosts(state, bridge, leased), *_taps(state, bridge, leased)]
        rows += [(f"  {node}", *rest) for node, *rest in ports]
    loose = [veth for veth in state.of(Veth) if not veth.bridge]
    rows += [(f"  {veth.host}", veth.device, "", "on no bridge") for veth in loose]
    for guest in state.of(Guest):
        rows.append((guest.name, f"{guest.image}, {guest.memory} MiB", "", guest.state))
    for host in state.of(Namespace):
        if not host.up:
            rows.append((host.host, "host", "", "not complete"))
    return table(("NODE", "LINK", "ADDRESS", "STATE"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )
    return "\n".join(lines)


def _hosts(state: State, bridge: Bridge, leased: Mapping[str, str]) -> Iterable[tuple[str, ...]]:
    asking = {(client.host, client.device) for client in state.of(DhcpClient)}
    for veth in state.of(Veth):
        if veth.bridge == bridge.name:
            addresses = " ".join(veth.addresses)
            if (veth.host, veth.device) in asking:
                addresses = _leased(leased, veth.mac)
            cable = f"{veth.device} - {veth.name}"
            yield (veth.host, cable, addresses or "no address", _up(veth.up))


def _taps(state: State, bridge: Bridge, leased: Mapping[str, str]) -> Iterable[tuple[str, ...]]:
    nics = {nic.tap: (guest.name, nic.mac) for guest in state.of(Guest) for nic in guest.nics}
    for tap in state.of(Tap):
        if tap.bridge == bridge.name:
            node, mac = nics.get(tap.name, (tap.id.partition(":")[0], ""))
            yield (node, f"tap {tap.name}", _leased(leased, mac) if mac else "", _up(tap.up))


def _leased(leased: Mapping[str, str], mac: str) -> str:
    return f"{leased[mac]} (DHCP)" if mac in leased else "no lease"


def _up(up: bool) -> str:
    return "up" if up else "down"
