"""Resources: what a lab consists of once it runs, each as one frozen value.

The desired State (from the compiler) and the observed State (from `netorch.system`) are made of the
same classes, and equality is the definition of "in sync". So a field belongs here only if the
machine can be asked for it; what a process was started with is asked of the process itself (its
environment carries this very value as JSON, see `encode` and `decode`).

Every resource has
    key      its name within the lab, `<kind>:<what the file calls it>`, and its mark in the kernel
    needs    the keys of what has to exist before it
and may say how it fares when something that it needs is made again (`after_replace`).
"""

from typing import ClassVar, Self

import msgspec

from netorch.boot_resources import GuestBoot as GuestBoot
from netorch.boot_resources import Seed as Seed
from netorch.boot_resources import Variables as Variables
from netorch.guest_resources import DiskLayer as DiskLayer
from netorch.guest_resources import Guest as Guest
from netorch.guest_resources import GuestDisk as GuestDisk
from netorch.guest_resources import GuestNic as GuestNic
from netorch.guest_resources import Overlay as Overlay
from netorch.guest_resources import Passt as Passt
from netorch.guest_resources import Volume as Volume
from netorch.guest_resources import behind_ports as behind_ports
from netorch.resource import Resource as Resource


class Record(Resource, frozen=True):
    """The topology as it was applied, kept in the run directory for `status` and the commands after
    it.
    """

    live: ClassVar[frozenset[str]] = frozenset({"text", "source"})
    text: str  # the Topology as JSON
    source: str  # the file that it came from, absolute

    @property
    def key(self) -> str:
        return "record"

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"record of the topology {self.source}"

    def changes(self, new: Resource) -> list[str]:
        return ["topology as applied"]


class Namespace(Resource, frozen=True):
    """The network namespace that plays one `[hosts]` machine. `up`: it is mounted, and its lo is
    up.
    """

    live: ClassVar[frozenset[str]] = frozenset({"up"})
    host: str
    up: bool = True

    @property
    def key(self) -> str:
        return f"namespace:{self.host}"

    def describe(self) -> str:
        return f"host {self.host} (network namespace)"


class Bridge(Resource, frozen=True):
    """A bridge of the lab's own. `addresses` are `a.b.c.d/len`; `forwarding` is IPv4's, per
    interface. `uplink` is the interface whose place at layer 3 it takes ("": none); a
    BridgeUplink is that.
    """

    live: ClassVar[frozenset[str]] = frozenset(
        {"mac", "mtu", "addresses", "forwarding", "stp", "uplink", "up"}
    )
    network: str
    name: str
    mac: str
    mtu: int = 1500
    addresses: tuple[str, ...] = ()
    forwarding: bool = False
    stp: bool = False
    uplink: str = ""
    up: bool = True

    @property
    def key(self) -> str:
        return f"bridge:{self.network}"

    def describe(self) -> str:
        words = [f"bridge {self.name}", *self.addresses]
        if self.mtu != 1500:
            words.append(f"mtu {self.mtu}")
        if self.forwarding:
            words.append("forwarding")
        return " ".join(words)


class BridgeUplink(Resource, frozen=True):
    """An interface that is not ours as a port of a lab's bridge, which has its addresses and
    routes meanwhile. `joined`: it is there and a port.
    """

    live: ClassVar[frozenset[str]] = frozenset({"joined"})
    network: str
    name: str
    bridge: str
    joined: bool = True

    @property
    def key(self) -> str:
        return f"uplink:{self.network}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"bridge:{self.network}",)

    def describe(self) -> str:
        return f"uplink {self.name} of {self.bridge}, with its addresses and routes"


class Tap(Resource, frozen=True):
    """A persistent tap on a bridge. `id` is what the key is made of: `vm1:0` or the name in
    `[taps]`. `network` is "" where the bridge is not the lab's own.

    `mac` is the host side's; `bridge` is the interface name of the bridge ("" for none); `owner` is
    a uid: a tap without one can be taken by whoever may open /dev/net/tun.
    """

    live: ClassVar[frozenset[str]] = frozenset({"network", "bridge", "mac", "mtu", "up"})
    goes_with = ("bridge:",)
    goes_before = ("ruleset",)  # no packet of a port passes without the rules
    id: str
    name: str
    network: str
    bridge: str
    mac: str
    mtu: int = 1500
    multi_queue: bool = False
    vnet_hdr: bool = True
    owner: int = 0
    up: bool = True

    @property
    def key(self) -> str:
        return f"tap:{self.id}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"bridge:{self.network}",) if self.network else ("record",)

    def after_replace(self, needed: str) -> Self:
        return msgspec.structs.replace(self, bridge="")

    def describe(self) -> str:
        return f"tap {self.name} on {self.bridge or 'no bridge'}"


class Veth(Resource, frozen=True):
    """A veth pair between a bridge and a host's namespace.

    `name` is the bridge's end; `network` is as a Tap's; `device`, `mac`, `addresses` (static ones),
    and `gateway` (of the default route, "" for none) belong to the host's end.
    """

    live: ClassVar[frozenset[str]] = frozenset(
        {"network", "bridge", "mtu", "mac", "addresses", "gateway", "up"}
    )
    goes_with = Tap.goes_with
    goes_before = Tap.goes_before
    id: str
    name: str
    network: str
    bridge: str
    host: str
    device: str
    mac: str
    mtu: int = 1500
    addresses: tuple[str, ...] = ()
    gateway: str = ""
    up: bool = True

    @property
    def key(self) -> str:
        return f"veth:{self.id}"

    @property
    def needs(self) -> tuple[str, ...]:
        bridge = (f"bridge:{self.network}",) if self.network else ()
        return ("record", *bridge, f"namespace:{self.host}")

    def after_replace(self, needed: str) -> Self | None:
        if needed.startswith("bridge:"):
            return msgspec.structs.replace(self, bridge="")
        return None

    def describe(self) -> str:
        words = [
            f"veth {self.name} on {self.bridge or 'no bridge'}: {self.host} {self.device}",
            *self.addresses,
        ]
        return " ".join(words)


class Rate(Resource, frozen=True):
    """What a tap or veth lets pass in bit/s, 0 for any amount: `into` the node, and `out` of it.

    `name` is the ifb that what the node sends is queued at; `port` is the key of the tap or veth.
    """

    live: ClassVar[frozenset[str]] = frozenset({"into", "out"})
    name: str
    port: str
    into: int = 0
    out: int = 0

    @property
    def key(self) -> str:
        return f"rate:{self.port}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.port,)

    def after_replace(self, needed: str) -> Self:
        return msgspec.structs.replace(self, into=0, out=0)

    def describe(self) -> str:
        of = self.port.partition(":")[2]
        if self.into == self.out:
            return f"rate of {of}, {_rate(self.into)}"
        both = {"in": self.into, "out": self.out}
        limited = [f"{way} {_rate(bits)}" for way, bits in both.items() if bits]
        return f"rate of {of}, {', '.join(limited)}"

    def changes(self, new: Resource) -> list[str]:
        assert isinstance(new, Rate)
        both = {"in": (self.into, new.into), "out": (self.out, new.out)}
        words = [f"{k} {_rate(a)} -> {_rate(b)}" for k, (a, b) in both.items() if a != b]
        return words if self.name == new.name else [*words, f"interface -> {new.name}"]


class Ruleset(Resource, frozen=True, eq=False):
    """The lab's nft table. Two are equal when their digests are.

    `text` is a script that makes the table: the rendered one when desired, the kernel's own listing
    when observed (so a change can be undone). `digest` is that of the rendered text; "" when the
    table is not as netorch left it.
    """

    live: ClassVar[frozenset[str]] = frozenset({"digest", "text"})
    text: str
    digest: str

    @property
    def key(self) -> str:
        return "ruleset"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ruleset) and self.digest == other.digest

    def __ne__(self, other: object) -> bool:
        return not self == other  # the base class has one of its own, which compares all fields

    def __hash__(self) -> int:
        return hash(self.digest)

    def describe(self) -> str:
        return "nftables rules"

    def changes(self, new: Resource) -> list[str]:
        return ["rules" if self.digest else "changed by someone else"]


class Forwarding(Resource, frozen=True):
    """IPv4 forwarding on an interface that is not ours: the way out of a NAT or routed network."""

    live: ClassVar[frozenset[str]] = frozenset({"on"})
    name: str
    on: bool = True

    @property
    def key(self) -> str:
        return f"forwarding:{self.name}"

    def describe(self) -> str:
        return f"IPv4 forwarding on {self.name}"

    def no_interface(self) -> str:
        return f"there is no interface {self.name}, the uplink that the file names"


class Dnsmasq(Resource, frozen=True):
    """The DHCP and DNS server of one network.

    `config` is its configuration file, `hosts` the DHCP reservations and `names` the static names
    (in the format of /etc/hosts); the last two are read again on SIGHUP. `tftp` is the directory
    that it serves ("": none).
    """

    live: ClassVar[frozenset[str]] = frozenset({"hosts", "names"})
    network: str
    config: str
    hosts: str = ""
    names: str = ""
    tftp: str = ""

    @property
    def key(self) -> str:
        return f"dnsmasq:{self.network}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"bridge:{self.network}",)

    def after_replace(self, needed: str) -> Self:
        return self  # bind-dynamic: it finds the bridge again by name

    def describe(self) -> str:
        return f"dnsmasq for {self.network}"

    def changes(self, new: Resource) -> list[str]:
        words = {"config": "configuration", "hosts": "reservations", "names": "names"}
        words |= {"tftp": "TFTP directory"}
        return [words[f] for f in words if getattr(self, f) != getattr(new, f)]


class DhcpClient(Resource, frozen=True):
    """A DHCP client that keeps the address of one interface of a host.

    `logged`: what it says can be read, so that its lease can be waited for.
    """

    host: str
    device: str
    logged: bool = True

    @property
    def key(self) -> str:
        return f"dhcp:{self.host}:{self.device}"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"veth:{self.host}:{self.device.removeprefix('eth')}",)

    def describe(self) -> str:
        return f"DHCP client on {self.host} {self.device}"


AnyResource = (
    Record
    | Namespace
    | Bridge
    | BridgeUplink
    | Tap
    | Veth
    | Rate
    | Ruleset
    | Forwarding
    | Dnsmasq
    | DhcpClient
    | Overlay
    | Seed
    | Variables
    | Volume
    | Guest
    | Passt
)


def _rate(bits: int) -> str:
    """As tc writes it."""
    for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
        if bits and bits % size == 0:
            return f"{bits // size}{unit}"
    return f"{bits}bit" if bits else "unlimited"


def encode(resource: Resource) -> str:
    """The resource as a line of JSON, as a process carries it in its environment."""
    return msgspec.json.encode(resource).decode()


def decode(text: str | bytes) -> AnyResource:
    """The resource that `encode` wrote. Raises msgspec.DecodeError for anything else."""
    resource: AnyResource = msgspec.json.decode(text, type=AnyResource)
    return resource
