"""Golden states: each shipped topology, and the choices of the compiler one by one."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netorch.compiler import compile
from netorch.errors import NetorchError
from netorch.facts import Facts, Interface, Uplink
from netorch.model import Guest as GuestModel
from netorch.model import Lab, Nic, Topology
from netorch.planner import diff
from netorch.resources import (
    Bridge,
    BridgeUplink,
    DiskLayer,
    Dnsmasq,
    Forwarding,
    Guest,
    Overlay,
    Rate,
    Resource,
    Ruleset,
    Tap,
    Veth,
    Volume,
)
from netorch.state import State
from netorch.topology import load, parse

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "states"
FACTS = Facts(
    taken=("192.0.2.0/24",),
    uplinks=(Uplink("eth0", 1500),),
    users={"alice": 1000, "root": 0},
)


def compiled(text: str, facts: Facts = FACTS) -> State:
    topology = parse(text, "lab.toml", Path("/labs"))
    return compile(topology, facts, Path("/run/netorch/lab"), "netorch_lab")


def shown(resource: Resource) -> str:
    """A resource as golden text: a line a field, and texts of many lines as they are."""
    lines = [f"[{resource.key}]"]
    for field in resource.__struct_fields__:
        value = getattr(resource, field)
        if isinstance(value, str) and "\n" in value:
            lines += [f"{field}:", *(f"    {line}" for line in value.splitlines())]
        elif (resource.key, field) != ("record", "text"):
            lines.append(f"{field} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "topologies").glob("*.toml")), ids=lambda path: path.stem
)
def test_shipped_topologies(path: Path, golden: Callable[[Path, str], None]) -> None:
    topology = load(path)
    state = compile(
        topology, FACTS, Path("/run/netorch") / topology.name, f"netorch_{topology.name}"
    )
    golden(GOLDEN / f"{path.stem}.txt", "\n\n".join(map(shown, state)) + "\n")


def test_the_smallest_file_is_libvirts_default_network() -> None:
    state = compiled("[networks.default]")
    (bridge,) = state.of(Bridge)
    assert (bridge.name, bridge.addresses) == ("virbr0", ("192.168.122.1/24",))
    assert bridge.mac.startswith("52:54:00:")
    (dnsmasq,) = state.of(Dnsmasq)
    assert "dhcp-range=192.168.122.2,192.168.122.254" in dnsmasq.config
    assert state.of(Forwarding) == [Forwarding(name="eth0")]


def test_an_automatic_address_avoids_what_is_taken_and_stays_where_it_was() -> None:
    text = "[networks.default]\n[networks.second]"
    taken = Facts(taken=("192.168.122.0/24", "192.168.123.128/25"))
    first, second = (bridge.addresses for bridge in compiled(text, taken).of(Bridge))
    assert (first, second) == (("192.168.124.1/24",), ("192.168.125.1/24",))
    kept = Facts(addresses={"default": "192.168.130.1/24"})
    assert compiled(text, kept).of(Bridge)[0].addresses == ("192.168.130.1/24",)
    clash = Facts(taken=("192.168.130.0/24",), addresses={"default": "192.168.130.1/24"})
    assert compiled(text, clash).of(Bridge)[0].addresses == ("192.168.122.1/24",)


def test_no_subnet_left_is_an_error() -> None:
    with pytest.raises(NetorchError, match="no free /24"):
        compiled("[networks.default]", Facts(taken=("192.168.0.0/16", "10.0.0.0/8")))


def test_a_range_that_is_too_small_is_a_mistake() -> None:
    text = """
        [networks.lan]
        address = "10.0.0.1/24"
        dhcp = { range = ["10.0.0.2", "10.0.0.2"] }
        [guests.a]
        nics = [{ network = "lan" }]
        [guests.b]
        nics = [{ network = "lan" }]
    """
    with pytest.raises(NetorchError, match="2 NICs ask for an address"):
        compiled(text)


def test_the_mtu_is_the_uplinks_and_never_larger_than_ethernets() -> None:
    text = '[networks.default]\n[networks.inner]\nmode = "isolated"\naddress = "10.1.0.1/24"'
    small = compiled(text, Facts(uplinks=(Uplink("wg0", 1420),))).of(Bridge)
    assert [bridge.mtu for bridge in small] == [1420, 1500]
    large = compiled(text, Facts(uplinks=(Uplink("uplink0", 65520),))).of(Bridge)
    assert [bridge.mtu for bridge in large] == [1500, 1500]


def test_a_lan_with_an_address_is_a_way_out_and_forwards() -> None:
    lan = '[networks.lan]\nmode = "bridge"\naddress = "10.0.0.1/24"\n'
    assert [b.forwarding for b in compiled(lan).of(Bridge)] == [False]
    assert [b.forwarding for b in compiled(lan + "[networks.default]").of(Bridge)] == [True, True]


def test_only_a_modes_own_networks_forward() -> None:
    for mode, forwards in [("nat", True), ("route", True), ("open", True), ("isolated", False)]:
        state = compiled(f'[networks.n]\nmode = "{mode}"')
        assert state.of(Bridge)[0].forwarding is forwards
        assert bool(state.of(Forwarding)) is forwards
    assert not compiled('[networks.n]\nmode = "open"').of(Ruleset)


def test_a_written_uplink_is_the_only_one() -> None:
    state = compiled('[networks.n]\nuplink = "wan0"')
    assert state.of(Forwarding) == [Forwarding(name="wan0")]


def test_a_host_routes_by_the_first_gateway_only() -> None:
    state = compiled("""
        [networks.a]
        address = "10.0.1.1/24"
        [networks.b]
        address = "10.0.2.1/24"
        [hosts.h]
        nics = [
            { network = "a", address = "10.0.1.9/24" },
            { network = "b", address = "10.0.2.9/24" },
        ]
    """)
    assert [veth.gateway for veth in state.of(Veth)] == ["10.0.1.1", ""]


def test_taps_have_the_owner_and_the_guests_mac_with_fe() -> None:
    state = compiled("""
        [networks.default]
        [taps.lab]
        network = "default"
        count = 2
        owner = "alice"
        queues = 4
        [guests.vm1]
        nics = [{ network = "default", mac = "52:54:00:AB:CD:EF" }]
    """)
    assert [(t.name, t.owner, t.multi_queue) for t in state.of(Tap)] == [
        ("lab0", 1000, True),
        ("lab1", 1000, True),
        ("vm1-0", 0, False),
    ]
    assert state.of(Tap)[2].mac == "fe:54:00:ab:cd:ef"
    assert state.of(Guest)[0].nics[0].mac == "52:54:00:ab:cd:ef"


def test_rates_are_whole_bytes_a_second_by_direction() -> None:
    state = compiled("""
        [networks.default]
        [guests.vm1]
        nics = [
            { network = "default", rate = "1.5mbit", tap = "lan" },
            { network = "default", rate = 100001 },
            { network = "default", rate = { out = "1 GBIT" } },
            { network = "default", rate = {} },
        ]
        [hosts.client]
        nics = [{ network = "default", rate = { in = "8kbit", out = "32gbit" } }]
    """)
    assert [(r.key, r.name, r.into, r.out) for r in state.of(Rate)] == [
        ("rate:tap:vm1:lan", "lan-rate", 1_500_000, 1_500_000),
        ("rate:tap:vm1:1", "vm1-1-rate", 100_000, 100_000),
        ("rate:tap:vm1:2", "vm1-2-rate", 0, 10**9),
        ("rate:veth:client:0", "client-0-rate", 8000, 32 * 10**9),
    ]
    assert [r.describe() for r in state.of(Rate)] == [
        "rate of vm1:lan, 1500kbit",
        "rate of vm1:1, 100kbit",
        "rate of vm1:2, out 1gbit",
        "rate of client:0, in 8kbit, out 32gbit",
    ]


def test_where_no_tap_can_be_made_the_helper_gives_guests_theirs() -> None:
    text = """
        [networks.lan]
        mode = "bridge"
        bridge = "br0"
        external = true
        [guests.vm1]
        nics = [{ network = "lan" }]
    """
    made = compiled(text)
    assert [nic.tap for nic in made.of(Guest)[0].nics] == ["vm1-0"]
    given = compiled(text, Facts(helper=True))
    assert not given.of(Tap)
    (guest,) = given.of(Guest)
    assert [(nic.tap, nic.bridge) for nic in guest.nics] == [("", "br0")]
    assert guest.needs == ("record", "ruleset")


def test_every_need_is_met() -> None:
    for path in (ROOT / "topologies").glob("*.toml"):
        topology = load(path)
        state = compile(topology, FACTS, Path("/run/x"), "netorch_x")
        for resource in state:
            for needed in resource.needs:
                assert needed in state or needed == "ruleset", (
                    f"{path.stem}: {resource.key} needs {needed}"
                )


NAMES = st.lists(
    st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True), min_size=1, max_size=40, unique=True
)


def guests(names: list[str]) -> State:
    topology = Topology(
        lab=Lab(name="lab"),
        networks=parse("[networks.default]", "", Path("/")).networks,
        guests={name: GuestModel(nics=(Nic(network="default"),)) for name in names},
    )
    return compile(topology, FACTS, Path("/run/x"), "netorch_x")


@given(NAMES)
def test_addresses_and_macs_are_unique_and_inside(names: list[str]) -> None:
    lines = guests(names).of(Dnsmasq)[0].hosts.splitlines()
    macs, addresses = zip(*(line.split(",")[:2] for line in lines), strict=True)
    assert len(set(macs)) == len(set(addresses)) == len(names)
    subnet = IPv4Network("192.168.122.0/24")
    assert all(IPv4Address(address) in subnet for address in addresses)
    assert not {"192.168.122.0", "192.168.122.1", "192.168.122.255"} & set(addresses)


@given(NAMES)
def test_appending_a_guest_moves_nobody(names: list[str]) -> None:
    before = guests(names[:-1]).of(Dnsmasq)[0].hosts
    after = guests(names).of(Dnsmasq)[0].hosts
    assert after.startswith(before)


def bridged(text: str, **facts: object) -> State:
    there = {"eth1": Interface("52:54:00:00:00:0a", 9000, forwarding=True)}
    lan = '[networks.lan]\nmode = "bridge"\nbridge = "br0"\nuplink = "eth1"\n'
    return compiled(lan + text, Facts(interfaces=there, **facts))  # type: ignore[arg-type]


def test_a_bridge_has_the_mac_the_mtu_and_the_forwarding_of_its_uplink() -> None:
    state = bridged('[taps.t]\nnetwork = "lan"')
    (bridge,) = state.of(Bridge)
    assert (bridge.mac, bridge.mtu, bridge.forwarding) == ("52:54:00:00:00:0a", 9000, True)
    assert state.of(Tap)[0].mtu == 9000
    assert state.of(BridgeUplink) == [BridgeUplink(network="lan", name="eth1", bridge="br0")]


def test_nat_by_an_interface_that_is_taken_in_leaves_by_the_bridge() -> None:
    """The default route is eth1's before the move, and br0's after it."""
    state = bridged("[networks.default]", uplinks=(Uplink("eth1", 1400),))
    assert state.of(Forwarding) == []
    assert all(bridge.forwarding for bridge in state.of(Bridge))


def test_somebody_elses_bridge_is_no_resource() -> None:
    text = '[networks.lan]\nmode = "bridge"\nbridge = "br7"\nexternal = true\n'
    state = compiled(
        text + '[taps.t]\nnetwork = "lan"',
        Facts(interfaces={"br7": Interface("52:54:00:00:00:0a", 1400)}),
    )
    assert state.of(Bridge) == []
    (tap,) = state.of(Tap)
    assert (tap.bridge, tap.network, tap.mtu) == ("br7", "", 1400)
    assert tap.needs == ("record",)


DISKS = """
[guests.vm1]
image = "os.img"
bus = "sata"
disks = [
    { file = "data.img" },
    { size = "10G", name = "scratch", bus = "nvme", serial = "A 1" },
    { file = "top", bus = "ide", backing = [{ file = "sub/base", format = "raw" }] },
    { file = "/dev/sdb", format = "raw", persistent = true, bus = "scsi" },
    { file = "install.iso", cdrom = true, bus = "ide" },
]
"""


def test_disks() -> None:
    """The image comes first; files get the lab's own overlays, unless they are written or read."""
    formats = {"/labs/os.img": "qcow2", "/labs/data.img": "raw", "/labs/top": "qcow2"}
    formats["/labs/install.iso"] = "raw"
    state = compiled(DISKS, msgspec.structs.replace(FACTS, formats=formats))
    guest = state.get("guest:vm1")
    assert isinstance(guest, Guest)
    assert [(d.name, d.bus, d.unit, d.use, d.serial, d.bootindex) for d in guest.disks] == [
        ("image", "sata", 0, "overlay", "image", 1),
        ("disk0", "virtio", 0, "overlay", "disk0", 0),
        ("scratch", "nvme", 0, "volume", "A 1", 0),
        ("disk2", "sata", 1, "overlay", "disk2", 0),
        ("disk3", "scsi", 0, "write", "disk3", 0),
        ("disk4", "sata", 2, "read", "disk4", 0),
    ]
    assert [layer for disk in guest.disks for layer in disk.layers] == [
        DiskLayer("/labs/os.img", "qcow2"),
        DiskLayer("/labs/data.img", "raw"),
        DiskLayer("/labs/top", "qcow2"),
        DiskLayer("/labs/sub/base", "raw"),
        DiskLayer("/dev/sdb", "raw"),
        DiskLayer("/labs/install.iso", "raw"),
    ]
    assert [r for r in state if isinstance(r, Overlay | Volume)] == [
        Overlay(guest="vm1", disk="image", image="/labs/os.img", format="qcow2"),
        Overlay(guest="vm1", disk="disk0", image="/labs/data.img", format="raw"),
        Volume(guest="vm1", disk="scratch", size=10 << 30),
        Overlay(guest="vm1", disk="disk2", image="/labs/top", format="qcow2"),
    ]
    assert {need for need in guest.needs if need.startswith(("overlay:", "volume:"))} == {
        *("overlay:vm1:image", "overlay:vm1:disk0", "volume:vm1:scratch", "overlay:vm1:disk2"),
    }
    on_pc = compiled(DISKS.replace("image =", 'machine = "pc"\nimage ='), FACTS).get("guest:vm1")
    assert isinstance(on_pc, Guest)
    places = [(disk.bus, disk.unit) for disk in on_pc.disks if disk.bus in ("ide", "sata")]
    assert places == [("sata", 0), ("ide", 0), ("ide", 1)]


def test_a_disk_in_the_middle_goes_and_the_others_stay_what_they_are() -> None:
    rows = [f'{{ size = "1G", name = "{name}" }}' for name in ("a", "b", "c")]
    before = compiled(f"[guests.vm1]\ndisks = [{', '.join(rows)}]")
    after = compiled(f"[guests.vm1]\ndisks = [{rows[0]}, {rows[2]}]")
    plan = diff(after, before)
    assert [line for line in plan.describe() if "disk" in line.split()[1]] == [
        "delete disk b of vm1, 1G"
    ]


def test_a_volume_grows_and_never_shrinks() -> None:
    small, large = (compiled(f'[guests.vm1]\ndisks = [{{ size = "{n}G" }}]') for n in (1, 2))
    assert [line for line in diff(large, small).describe() if "record" not in line] == [
        "update disk disk0 of vm1, 2G: size 1073741824 -> 2147483648"
    ]
    old, new = large.get("volume:vm1:disk0"), small.get("volume:vm1:disk0")
    assert old is not None
    assert new is not None
    assert "can't shrink to 1G" in old.refuses(new)
    assert not new.refuses(old)
