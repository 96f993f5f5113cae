"""Names of interfaces that nobody wrote: derived from the topology alone, at most 15 bytes."""

from netorch.digests import blake2s
from netorch.model import Network, Nic, Taps


def bridge_name(network: str, definition: Network) -> str:
    """The bridge's interface name: libvirt's for `default`, else `br-<network>`."""
    return definition.bridge or ("virbr0" if network == "default" else shorten(f"br-{network}"))


def tap_name(guest: str, index: int, nic: Nic) -> str:
    """The tap of a guest's NIC: `vm1-0`."""
    return nic.tap or shorten(f"{guest}-{index}")


def tap_id(index: int, nic: Nic) -> str:
    """What the key of a guest's tap ends in: a tap with a name of its own keeps its key wherever
    its NIC stands in the file.
    """
    return nic.tap or str(index)


def tap_names(name: str, taps: Taps) -> list[str]:
    """The taps of `[taps.NAME]`: `lab0`, `lab1`, ..."""
    return [shorten(f"{name}{index}") for index in range(taps.count)]


def veth_name(host: str, index: int) -> str:
    """The bridge's end of a host's NIC: `server-0`."""
    return shorten(f"{host}-{index}")


def rate_name(port: str) -> str:
    """The ifb of a limited tap or veth: `vm1-0-rate`."""
    return shorten(f"{port}-rate")


def shorten(name: str) -> str:
    """`name` as an interface name: at most 15 bytes; a longer one is its start and a hash."""
    if len(name) <= 15:
        return name
    return f"{name[:8]}-{blake2s(name).hex()[:6]}"
