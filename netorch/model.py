"""The model: what a person writes, as frozen values. The same classes are the Python API.

The classes say which keys exist, of which type, and with which default; `netorch.topology` reads a file
into them and checks what types can't say. docs/topology.md describes every key, and a test holds the two
together. A default of None means "derived": the compiler chooses (a bridge's name, a MAC, an address).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
INTERFACE = r"^[^\s/:]{1,15}$"

Name = Annotated[str, Meta(pattern=NAME, description="letters, digits, `_`, `.`, `-`; 1 to 63 of them")]
Interface = Annotated[str, Meta(pattern=INTERFACE, description="an interface name, at most 15 bytes")]
Mac = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$", description="a MAC address")]
Address = Annotated[str, Meta(description="an IPv4 address with its prefix length, `192.168.122.1/24`")]
Mode = Literal["nat", "route", "open", "isolated", "bridge"]
Model = Literal["virtio-net-pci", "e1000", "rtl8139"]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Lab(_Table):
    """`[lab]`: the lab as a whole."""

    name: Name | None = None  # the file's name without .toml
    place: Literal["auto", "current", "private"] = "auto"
    uplink: Literal["auto", "pasta", "slirp4netns", "none"] = "auto"  # of a private place
    timeout: Annotated[int, Meta(ge=1, le=3600)] = 120  # seconds until every guest must have its lease


class Dhcp(_Table):
    """`dhcp` of a network: the range that dnsmasq serves."""

    range: tuple[str, str] | None = None  # all addresses but the gateway's
    lease: Annotated[str, Meta(pattern=r"^(\d+[smhdw]?|infinite)$")] = "1h"


class Network(_Table):
    """`[networks.NAME]`: a bridge and its services."""

    mode: Mode = "nat"
    bridge: Interface | None = None  # virbr0 for `default`, else br-NAME
    address: str | None = None  # "auto" for every mode but bridge, which has none
    dhcp: Dhcp | bool | None = None  # on where there is an address, but for mode bridge
    dns: bool = True
    domain: Name | None = None
    uplink: Interface | None = None
    mac: Mac | None = None
    mtu: Annotated[int, Meta(ge=576, le=65535)] | None = None
    stp: bool = False


class Nic(_Table):
    """One of a guest's `nics`. `address` is a DHCP reservation."""

    network: Name
    model: Model = "virtio-net-pci"
    address: str | None = None
    mac: Mac | None = None
    queues: Annotated[int, Meta(ge=1, le=256)] = 1
    tap: Interface | None = None


class HostNic(_Table):
    """One of a host's `nics`. `address` is static with a prefix length, or "dhcp"."""

    network: Name
    address: str | None = None
    gateway: str | bool = True  # the network's; false: no default route
    mac: Mac | None = None


class Guest(_Table):
    """`[guests.NAME]`: a QEMU virtual machine."""

    image: str = "tiny"
    format: Literal["auto", "qcow2", "raw"] = "auto"
    memory: int | str = "256M"
    cpus: Annotated[int, Meta(ge=1, le=255)] = 1
    machine: Literal["q35", "pc"] = "q35"
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    vnc: Annotated[int, Meta(ge=0, le=59635)] | None = None
    nics: tuple[Nic, ...] = ()


class Host(_Table):
    """`[hosts.NAME]`: a network namespace that plays a machine."""

    nics: tuple[HostNic, ...] = ()


class Taps(_Table):
    """`[taps.NAME]`: taps for virtual machines that something else starts."""

    network: Name
    count: Annotated[int, Meta(ge=1, le=1023)] = 1
    owner: str | Annotated[int, Meta(ge=0)] | None = None
    queues: Annotated[int, Meta(ge=1, le=256)] = 1


class Topology(_Table):
    """A whole file."""

    lab: Lab = Lab()
    networks: dict[Name, Network] = {}
    guests: dict[Name, Guest] = {}
    hosts: dict[Name, Host] = {}
    taps: dict[Name, Taps] = {}

    @property
    def name(self) -> str:
        assert self.lab.name is not None, "netorch.topology fills it in"
        return self.lab.name
