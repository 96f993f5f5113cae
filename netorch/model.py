"""The model: what a person writes, as frozen values. The same classes are the Python API.

The classes say which keys exist, of which type, and with which default; `netorch.topology` reads a
file into them and checks what types can't say. docs/topology.md describes every key, and a test
holds the two together. A default of None means "derived": the compiler chooses (a bridge's name, a
MAC, an address).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# `(?!\n)`: Python's `$`, unlike JSON Schema's, lets a newline follow, and dnsmasq would read it.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$(?!\n)"
INTERFACE = r"^[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,14}$(?!\n)"
DISK = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,19}$(?!\n)"
SERIAL = r"^[!-~]([ -~]{0,18}[!-~])?$(?!\n)"
MAC = r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$(?!\n)"
LEASE = r"^([0-9]{1,9}[smhdw]?|infinite)$(?!\n)"
USER = r"^[^\s:\x00]{1,255}$(?!\n)"
BOOT_FILE = r"^[A-Za-z0-9_./:@+-]{1,127}$(?!\n)"  # DHCP has 128 bytes for it
READY = r"^(lease|agent|none|tcp:[0-9]{1,5}|console:.+)$(?!\n)"
BY = r"^(ping|dhcp|(tcp|udp):[0-9]{1,5}|dns:[^\s\x00]{1,253})$(?!\n)"

Name = Annotated[
    str,
    Meta(
        pattern=NAME,
        description="a name: letters, digits, `_`, `.`, `-`, at most 63 of them, "
        "the first a letter or digit",
    ),
]
Interface = Annotated[
    str,
    Meta(
        pattern=INTERFACE,
        description="an interface name: at most 15 letters, digits, `_`, `.`, `-`, `@`, `+`, "
        "the first a letter, digit or `_`",
    ),
]
Mac = Annotated[str, Meta(pattern=MAC, description="a MAC address such as 52:54:00:12:34:56")]
Lease = Annotated[
    str, Meta(pattern=LEASE, description='a lease time such as "30m", "1h", "7d" or "infinite"')
]
BootFile = Annotated[
    str,
    Meta(
        pattern=BOOT_FILE,
        description="a file to boot: a path below the directory of tftp, or a URL; at most 127 "
        "letters, digits, `_`, `.`, `/`, `:`, `@`, `+`, `-`",
    ),
]
User = Annotated[str, Meta(pattern=USER, description="a user's name")]
By = Annotated[
    str,
    Meta(
        pattern=BY,
        description='a probe: "ping", "tcp:PORT", "udp:PORT", "dns:NAME" or "dhcp"',
    ),
]
DiskName = Annotated[  # QEMU's node names have at most 31 characters, and serial numbers 20
    str,
    Meta(
        pattern=DISK,
        description="a disk's name: letters, digits, `_`, `.`, `-`, at most 20 of them, "
        "the first a letter or digit",
    ),
]
Serial = Annotated[
    str,
    Meta(pattern=SERIAL, description="a serial number: at most 20 printable ASCII characters"),
]
Size = Annotated[str, Meta(description='a disk\'s size such as "512M" or "10G"')]
Ready = Annotated[
    str,
    Meta(
        pattern=READY,
        description='a sign of readiness: "lease", "agent", "tcp:PORT", "console:REGEX" or "none"',
    ),
]
Bits = Annotated[str, Meta(description='a rate such as "10mbit"')]
Memory = Annotated[str, Meta(description='an amount of memory such as "256M" or "1G"')]
Port = Annotated[int, Meta(ge=1, le=65535)]
DISKLESS = ("tiny", "none")  # the values of a guest's image that are no file
Mode = Literal["nat", "route", "open", "isolated", "bridge"]
Bus = Literal["virtio", "scsi", "sata", "ide", "nvme", "usb"]
Format = Literal["auto", "qcow2", "raw"]
Model = Literal["virtio-net-pci", "e1000", "e1000e", "rtl8139", "vmxnet3", "virtio-net-device"]


class _Table(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    pass


class Lab(_Table, frozen=True):
    """`[lab]`: the lab as a whole."""

    name: Name | None = None  # the file's name without .toml
    place: Literal["auto", "current", "private"] = "auto"
    uplink: Literal["auto", "pasta", "slirp4netns", "none"] = "auto"  # of a private place
    timeout: Annotated[int, Meta(ge=1, le=3600)] = 120  # seconds until every guest must be ready
    overcommit: bool = False  # guests may have more memory than the machine


class Dhcp(_Table, frozen=True):
    """`dhcp` of a network: the range that dnsmasq serves."""

    range: tuple[str, str] | None = None  # all addresses but the gateway's
    lease: Lease = "1h"
    boot: BootFile | None = None  # what a guest gets that boots from the network


class Network(_Table, frozen=True):
    """`[networks.NAME]`: a bridge and its services."""

    mode: Mode = "nat"
    bridge: Interface | None = None  # virbr0 for `default`, else br-NAME
    address: str | None = None  # "auto" for every mode but bridge, which has none
    dhcp: Dhcp | bool | None = None  # on where there is an address, but for mode bridge
    tftp: str | None = None  # a directory
    dns: bool = True
    domain: Name | None = None
    uplink: Interface | None = None
    external: bool = False  # the bridge is somebody else's
    mac: Mac | None = None
    mtu: Annotated[int, Meta(ge=576, le=65535)] | None = None
    stp: bool = False


class Rates(_Table, frozen=True, rename={"in_": "in"}):
    """`rate` of a NIC, where it differs by direction."""

    in_: int | Bits | None = None  # what the node receives; None: any amount
    out: int | Bits | None = None  # what it sends


class Forward(_Table, frozen=True):
    """One of a NIC's `forward`: a port of this machine that leads to one of the guest."""

    port: Port
    to: Port | None = None  # the same
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = "127.0.0.1"  # where it listens


class Nic(_Table, frozen=True):
    """One of a guest's `nics`: on a network, on a wire, or with a back-end that needs neither.
    `address` is a DHCP reservation.
    """

    network: Name | None = None
    wire: Name | None = None
    backend: Literal["tap", "user", "passt"] = "tap"
    forward: tuple[Forward, ...] = ()
    model: Model | None = None  # virtio-net-pci, on a microvm virtio-net-device
    address: str | None = None
    mac: Mac | None = None
    queues: Annotated[int, Meta(ge=1, le=256)] = 1
    tap: Interface | None = None
    link: Literal["up", "down"] = "up"
    rate: int | Bits | Rates | None = None  # bit/s


class HostNic(_Table, frozen=True):
    """One of a host's `nics`. `address` is static with a prefix length, or "dhcp"."""

    network: Name
    address: str | None = None
    gateway: str | bool = True  # the network's; false: no default route
    mac: Mac | None = None
    rate: int | Bits | Rates | None = None  # bit/s


class Layer(_Table, frozen=True):
    """One of `backing`: a file that the one before it is an overlay of."""

    file: str
    format: Literal["qcow2", "raw"]


class Disk(_Table, frozen=True):
    """One of a guest's `disks`: a file or block device, or, by `size`, a new empty disk."""

    file: str | None = None
    size: Size | None = None
    format: Format = "auto"
    backing: tuple[Layer, ...] = ()
    bus: Bus = "virtio"
    name: DiskName | None = None  # disk0, disk1, ...
    serial: Serial | None = None  # the name
    persistent: bool = False
    readonly: bool = False
    cdrom: bool = False


class Guest(_Table, frozen=True):
    """`[guests.NAME]`: a QEMU virtual machine."""

    image: str = "tiny"  # "none" where a kernel or the network is booted
    format: Format = "auto"
    backing: tuple[Layer, ...] = ()  # of the image
    bus: Bus = "virtio"  # of the image
    persistent: bool = False  # the image
    memory: int | Memory = "256M"
    cpus: Annotated[int, Meta(ge=1, le=255)] = 1
    machine: Literal["q35", "pc", "microvm"] = "q35"
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    firmware: Literal["bios", "uefi"] = "bios"
    boot: Literal["disk", "network"] = "disk"
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str | None = None
    user_data: str | None = None  # cloud-init's: a path, or the text itself
    ssh_keys: tuple[str, ...] = ()  # public keys, or paths of files of them
    ports: Annotated[int, Meta(ge=0, le=64)] | None = None  # for what comes and goes: 4 on q35
    vnc: bool | Annotated[int, Meta(ge=0, le=59635)] = False
    video: Literal["VGA", "virtio-vga"] | None = None
    nics: tuple[Nic, ...] = ()
    disks: tuple[Disk, ...] = ()
    after: tuple[Name, ...] = ()  # guests that have to be ready first
    ready: Ready = "lease"
    restart: Literal["no", "on-failure", "always"] = "no"  # by `netorch watch`


class Host(_Table, frozen=True):
    """`[hosts.NAME]`: a network namespace that plays a machine."""

    nics: tuple[HostNic, ...] = ()


class Taps(_Table, frozen=True):
    """`[taps.NAME]`: taps for virtual machines that something else starts."""

    network: Name
    count: Annotated[int, Meta(ge=1, le=1023)] = 1
    owner: User | Annotated[int, Meta(ge=0, le=0xFFFFFFFE)] = 0
    queues: Annotated[int, Meta(ge=1, le=256)] = 1


class Expect(_Table, frozen=True, rename={"from_": "from"}):
    """`[[expect]]`: what must reach what, and what must not."""

    from_: str | tuple[str, ...]  # nodes, or "network:NAME": all nodes there
    to: str | None = None  # a node, "gateway", an address or a DNS name
    by: By = "ping"
    reach: bool = True
    seen_as: str | None = None
    within: Annotated[int, Meta(ge=1, le=3600)] | None = None  # seconds: 10, without reach 2


class Topology(_Table, frozen=True):
    """A whole file."""

    lab: Lab = Lab()
    networks: dict[Name, Network] = {}
    guests: dict[Name, Guest] = {}
    hosts: dict[Name, Host] = {}
    taps: dict[Name, Taps] = {}
    expect: tuple[Expect, ...] = ()

    @property
    def name(self) -> str:
        assert self.lab.name is not None, "netorch.topology fills it in"
        return self.lab.name
