"""What labs say of bridges that take in an interface of the machine's, or are the machine's own."""

from netorch.engine import Progress
from netorch.errors import MissingError
from netorch.model import Topology
from netorch.planner import Plan
from netorch.resources import BridgeUplink


def refuse_in_private(topology: Topology) -> None:
    """A private place that is yet to be made can't have interfaces of the machine's."""
    for name, network in topology.networks.items():
        if network.external:
            what = f"the bridge {network.bridge}, which is not netorch's to make,"
        elif network.mode == "bridge" and network.uplink:
            what = f"its uplink {network.uplink}"
        else:
            continue
        raise MissingError(
            f"network {name}: {what} is the machine's, and can't be had in a private namespace, "
            "where a lab without root lives",
            'use mode = "nat" instead (pasta carries it to the outside), or run netorch as root '
            "without --private",
        )


def needs_no_rights(topology: Topology) -> bool:
    """Is it nothing but guests on bridges of others? qemu-bridge-helper has taps for them."""
    nics = [nic for guest in topology.guests.values() for nic in guest.nics]
    return (
        any(nic.network for nic in nics)
        and all(network.external for network in topology.networks.values())
        and all(nic.queues == 1 and nic.rate is None for nic in nics)
        and not (topology.hosts or topology.taps)
    )


def named_interfaces(topology: Topology) -> list[str]:
    """The interfaces of others that the file names."""
    networks = topology.networks.values()
    uplinks = [n.uplink for n in networks if n.uplink and n.mode == "bridge"]
    return uplinks + [n.bridge for n in networks if n.external and n.bridge]


def warn_of_managers(plan: Plan, progress: Progress) -> None:
    """Say which programs have a hand in the uplinks that have just moved."""
    uplinks = [action.resource for action in plan if isinstance(action.resource, BridgeUplink)]
    for uplink in uplinks:
        from netorch.system.uplink_checks import managers

        for line in managers(uplink.name):
            progress.warn(line)
