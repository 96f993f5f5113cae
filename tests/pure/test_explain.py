"""Judging a journey from what was seen, without a machine: the lab as it should be, and one thing
that is not.
"""

from collections.abc import Callable
from ipaddress import IPv4Interface
from pathlib import Path

import msgspec
import pytest

from netorch.compiler import compile
from netorch.errors import UsageError
from netorch.facts import Facts
from netorch.resources import Bridge, Guest, Resource, Tap, Veth
from netorch.state import State
from netorch.system import journeys, sights, tracing
from netorch.system.echo import Echo
from netorch.system.explain import Hop, first_broken, judge
from netorch.system.journeys import Journey
from netorch.system.leases import Lease
from netorch.system.neighbours import Learned, Way
from netorch.system.sights import Ground, Inside, Sights
from netorch.system.snapshot import Link
from netorch.system.tracing import Drop
from netorch.topology import load

FORWARDING = bytes.fromhex("0500010003000000")  # IFLA_BRPORT_STATE = 3
DESIRED = compile(
    load(Path(__file__).parents[2] / "topologies/virbr0-vs-br0.toml"),
    Facts(),
    Path("/run/x"),
    "netorch_x",
)
PORTS: list[Tap | Veth] = [*DESIRED.of(Tap), *DESIRED.of(Veth)]
ANSWERED = Echo(True, True, "it answers a ping")
SILENT = Echo(True, False, "it does not answer a ping")


def lease(node: str) -> Lease:
    guest = DESIRED.get(f"guest:{node}")
    assert isinstance(guest, Guest)
    network = guest.networks[0]
    address = {"vm1": "192.168.122.6", "vm2": "10.0.0.120"}[node]
    return Lease(
        network=network, expires=0, mac=guest.nics[0].mac, address=address, name=node, client_id=""
    )


LEASES = (lease("vm1"), lease("vm2"))


def journey(source: str, target: str) -> Journey:
    return journeys.plan(DESIRED, LEASES, ["192.168.122.1", "10.0.0.1"], source, target)


def seen(source: str, target: str) -> tuple[Journey, Sights]:
    """The journey, and the lab as it should be."""
    planned = journey(source, target)
    bridges = {b.name: b for b in DESIRED.of(Bridge)}
    indexes = {name: 100 + number for number, name in enumerate(bridges)}
    links = {
        b.name: Link(index=indexes[b.name], name=b.name, up=True, running=True, forwarding=True)
        for b in bridges.values()
    }
    for number, port in enumerate(PORTS):
        master = indexes[port.bridge]
        links[port.name] = Link(
            index=number + 1, name=port.name, up=True, running=True, master=master, port=FORWARDING
        )
    inside = {}
    for end in (planned.source, planned.target):
        if end is not None:
            inside[end.node] = Inside(
                device="eth0",
                up=True,
                carrier=True,
                addresses=(end.address,),
                way=Way("eth0"),
                arp={planned.address: "reachable"},
            )
    out = planned.target.bridge if planned.target else "virbr0"
    table = tuple(
        Learned(indexes[e.bridge], links[e.port.name].index, e.mac)
        for e in (planned.source, planned.target)
        if e is not None
    )
    ground = Ground(links=links, learned=table, way=Way(out))
    return planned, Sights(
        state=DESIRED, ground=ground, leases=LEASES, inside=inside, echo=ANSWERED
    )


def broken(planned: Journey, sight: Sights) -> Hop | None:
    return next((h for h in judge(DESIRED, planned, sight, "netorch_x") if not h.ok), None)


def without(key: str) -> State:
    return State(r for r in DESIRED if r.key != key)


def changed(key: str, **fields: object) -> State:
    def one(resource: Resource) -> Resource:
        return msgspec.structs.replace(resource, **fields) if resource.key == key else resource

    return State(one(resource) for resource in DESIRED)


def state(make: Callable[[], State]) -> Callable[[Sights], Sights]:
    return lambda s: msgspec.structs.replace(s, state=make(), echo=SILENT)


def link(name: str, **fields: object) -> Callable[[Sights], Sights]:
    def change(s: Sights) -> Sights:
        links = {**s.ground.links, name: msgspec.structs.replace(s.ground.links[name], **fields)}
        ground = msgspec.structs.replace(s.ground, links=links)
        return msgspec.structs.replace(s, ground=ground, echo=SILENT)

    return change


def ground(**fields: object) -> Callable[[Sights], Sights]:
    return lambda s: msgspec.structs.replace(
        s, ground=msgspec.structs.replace(s.ground, **fields), echo=SILENT
    )


def inside(node: str, **fields: object) -> Callable[[Sights], Sights]:
    def change(s: Sights) -> Sights:
        there = {**s.inside, node: msgspec.structs.replace(s.inside[node], **fields)}
        return msgspec.structs.replace(s, inside=there, echo=SILENT)

    return change


def sight(**fields: object) -> Callable[[Sights], Sights]:
    return lambda s: msgspec.structs.replace(s, **{"echo": SILENT, **fields})


@pytest.mark.parametrize(
    ("source", "target"),
    [("vm1", "server"), ("vm1", "vm2"), ("vm2", "server"), ("server", "vm2"), ("vm1", "gateway")],
)
def test_all_is_well(source: str, target: str) -> None:
    planned, sights_ = seen(source, target)
    assert broken(planned, sights_) is None
    assert first_broken(judge(DESIRED, planned, sights_, "netorch_x")).startswith("every hop")


DROP = Drop(family="ip", table="filter", chain="FORWARD", rule="", answer=False)
CASES: list[tuple[str, Callable[[Sights], Sights], str, str]] = [
    ("vm1", state(lambda: without("guest:vm1")), "guest vm1", "no QEMU runs it"),
    ("vm1", state(lambda: changed("guest:vm1", state="paused")), "guest vm1", "is paused"),
    ("vm1", inside("vm1", unseen="it is silent"), "NIC eth0 of vm1", "it is silent"),
    ("vm1", inside("vm1", device=""), "NIC 52:54", "no such NIC"),
    ("vm1", inside("vm1", carrier=False), "NIC eth0 of vm1", "set_link"),
    ("vm1", state(lambda: without("tap:vm1:0")), "tap vm1-0", "it is gone"),
    ("vm1", link("vm1-0", up=False, running=False), "tap vm1-0", "it is down"),
    ("vm1", link("vm1-0", running=False), "tap vm1-0", "no QEMU has it open"),
    (
        "vm1",
        state(lambda: changed("tap:vm1:0", bridge="br0")),
        "bridge port vm1-0",
        "it is a port of br0, not of virbr0",
    ),
    (
        "vm1",
        link("vm1-0", port=bytes.fromhex("0500010001000000")),
        "bridge port vm1-0",
        "it is listening",
    ),
    ("vm1", link("virbr0", up=False), "bridge virbr0", "it is down"),
    (
        "vm1",
        state(lambda: changed("bridge:default", addresses=())),
        "bridge virbr0",
        "it lacks its address 192.168.122.1/24",
    ),
    ("vm1", ground(learned=()), "forwarding table of virbr0", "it has not learned"),
    ("vm1", state(lambda: without("dnsmasq:default")), "dnsmasq for default", "does not run"),
    ("vm1", sight(leases=()), "lease of vm1", "no lease"),
    ("vm1", inside("vm1", addresses=("169.254.1.1",)), "lease of vm1", "vm1 has 169.254.1.1"),
    (
        "vm1",
        inside("vm1", way=Way(error="Network unreachable")),
        "route in vm1",
        "no way to 10.0.0.80 (Network unreachable)",
    ),
    ("vm1", ground(way=Way(error="no")), "route in this machine", "no way to"),
    ("vm1", ground(way=Way("eth9")), "route in this machine", "leave by eth9, not by br0"),
    ("vm1", link("br0", forwarding=False), "forwarding on br0", "is off"),
    ("vm1", state(lambda: without("ruleset")), "nft table netorch_x", "it is gone"),
    ("vm1", state(lambda: changed("ruleset", digest="")), "nft table netorch_x", "someone else"),
    ("vm1", sight(drop=DROP), "nft chain FORWARD of table ip filter", "by its policy"),
    (
        "vm1",
        sight(refusals=(("chain FORWARD of table ip filter", "has policy drop"),)),
        "nft chain FORWARD of table ip filter",
        "could not be traced",
    ),
    ("vm2", sight(drop=DROP), "nft chain FORWARD of table ip filter", "br_netfilter"),
    ("vm1", link("server-0", up=False, running=False), "veth server-0", "it is down"),
    ("vm1", inside("server", up=False, carrier=False), "NIC eth0 of server", "it is down"),
    ("vm1", inside("server", addresses=()), "address of server", "has none"),
    ("vm1", inside("server", way=Way(error="none")), "route in server", "to 10.0.0.1"),
    (
        "vm1",
        inside("vm1", arp={"10.0.0.80": "failed"}),
        "neighbour 10.0.0.80 of vm1",
        "nobody answers",
    ),
    ("vm1", sight(), "answer of server", "a firewall on either"),
]


@pytest.mark.parametrize(
    ("source", "change", "name", "detail"), CASES, ids=[f"{c[2]}-{c[3]}" for c in CASES]
)
def test_the_broken_hop_is_named(
    source: str, change: Callable[[Sights], Sights], name: str, detail: str
) -> None:
    planned, sights_ = seen(source, "server")
    hop = broken(planned, change(sights_))
    assert hop is not None
    assert hop.name.startswith(name)
    assert detail in hop.detail


def test_an_effect_is_not_blamed_for_its_cause() -> None:
    planned, sights_ = seen("vm1", "server")
    down = inside("server", up=False)(link("server-0", running=False)(sights_))
    hop = broken(planned, down)
    assert hop is not None
    assert hop.name == "NIC eth0 of server"
    planned, sights_ = seen("server", "vm2")
    killed = sight(state=without("guest:vm2"))(link("vm2-0", running=False)(sights_))
    hop = broken(planned, killed)
    assert hop is not None
    assert hop.name == "guest vm2"


def test_a_guest_that_nobody_can_look_into_is_not_blamed_for_that() -> None:
    planned, sights_ = seen("vm1", "server")
    unseen = Inside(unseen="no agent")
    other = sight(
        state=changed("guest:vm1", image="/images/other.img"),
        inside={**sights_.inside, "vm1": unseen},
        echo=Echo(False, False, "no agent"),
    )(sights_)
    assert broken(planned, other) is None


def test_journeys() -> None:
    routed = journey("vm1", "server")
    assert (routed.routed, routed.here, routed.address, routed.seen_as) == (
        *(True, False, "10.0.0.80", "10.0.0.1"),
    )
    bridged = journey("vm2", "10.0.0.80")
    assert (bridged.routed, bridged.target and bridged.target.node) == (False, "server")
    assert bridged.seen_as == "10.0.0.120"
    here = journey("vm1", "gateway")
    assert (here.routed, here.here, here.address) == (False, True, "192.168.122.1")
    outside = journey("vm1", "198.51.100.7")
    assert (outside.routed, outside.target) == (True, None)
    neighbour = journey("vm1", "192.168.122.99")  # a machine that the lab doesn't know
    assert (neighbour.routed, neighbour.target) == (False, None)
    reserved = journeys.plan(DESIRED, (), [], "server", "vm1")
    assert reserved.address == "192.168.122.6"
    with pytest.raises(UsageError, match="no guest or host of this lab"):
        journey("vm1", "vm9")
    with pytest.raises(UsageError, match="vm1 always reaches itself"):
        journey("vm1", "vm1")


BUSYBOX = (
    "1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue qlen 1000\\    link/loopback 00:00:00:"
    "00:00:00 brd 00:00:00:00:00:00\n"
    "2: eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc pfifo_fast qlen 1000\\    "
    "link/ether 52:54:00:5a:98:34 brd ff:ff:ff:ff:ff:ff",
    "1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever\n"
    "2: eth0    inet 192.168.122.6/24 brd 192.168.122.255 scope global eth0\\       valid_lft",
    "10.0.0.80 via 192.168.122.1 dev eth0  src 192.168.122.6 ",
    "192.168.122.1 dev eth0 lladdr 52:54:00:24:aa:bb used 0/0/0 probes 1 REACHABLE\n"
    "192.168.122.9 dev eth0  used 0/0/0 probes 6 FAILED\n",
)


def test_what_ip_says_in_a_guest() -> None:
    assert sights.parse(BUSYBOX, "52:54:00:5a:98:34", asked=True) == Inside(
        device="eth0",
        up=True,
        carrier=True,
        addresses=("192.168.122.6",),
        way=Way("eth0", "192.168.122.1"),
        arp={"192.168.122.1": "reachable", "192.168.122.9": "failed"},
    )
    other = "52:54:00:00:00:00"
    unreachable = "RTNETLINK answers: Network is unreachable"
    lost = sights.parse((BUSYBOX[0], "", f"ip: {unreachable}\n", ""), other, asked=True)
    assert lost == Inside(way=Way(error=unreachable))
    assert sights.parse((*BUSYBOX[:2], "", ""), "52:54:00:5a:98:34", asked=False).way is None


def test_what_the_agent_tells_where_it_may_not_run_commands() -> None:
    listed: list[dict[str, object]] = [
        {"name": "lo", "ip-addresses": []},
        {
            "name": "ens3",
            "hardware-address": "52:54:00:00:00:01",
            "ip-addresses": [
                {"ip-address": "fe80::1", "ip-address-type": "ipv6", "prefix": 64},
                {"ip-address": "10.0.0.9", "ip-address-type": "ipv4", "prefix": 24},
            ],
        },
    ]
    found = sights._listed(listed, "52:54:00:00:00:01")
    assert (found.device, found.addresses, found.up) == ("ens3", ("10.0.0.9",), True)
    assert sights._listed(listed, "52:54:00:00:00:02") == Inside()


def test_a_trace_message() -> None:
    """As Linux 6.1 sent it: a rule of table ip filter drops 127.0.0.1 > 127.0.0.9."""
    body = bytes.fromhex(
        "02000000"
        "08000f0000000002"
        "0800040000000003"
        "08000600c99eb4f7"
        "080002006f757400"
        "0b00010066696c7465720000"
        "0c0003000000000000000002"
        "0c000580"
        "0800010000000000"
        "18000800"
        "450000541d86400040011f197f0000017f000009"
    )
    event = tracing.parse(memoryview(body))
    assert (event.family, event.table, event.chain, event.handle) == ("ip", "filter", "out", 2)
    assert event.dropped
    assert (event.source, event.target) == ("127.0.0.1", "127.0.0.9")


def test_the_interfaces_of_the_lab_are_what_the_cases_assume() -> None:
    names = {b.name: str(IPv4Interface(b.addresses[0]).ip) for b in DESIRED.of(Bridge)}
    assert names == {"virbr0": "192.168.122.1", "br0": "10.0.0.1"}
