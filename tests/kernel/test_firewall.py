"""The rules, with real packets among a gateway (the test itself), guests, and a far side.

guest ── virbr0 (192.168.122.1) gateway (10.9.0.1) eth0 ── far (10.9.0.2, knows the way back)
"""

import socket
import struct
import sys
import time
from pathlib import Path

import pytest

from netorch.errors import KernelError
from netorch.networks import Segment, ruleset
from netorch.planner import Update
from netorch.resources import Forwarding, Resource, Ruleset
from netorch.system.firewall import Firewall, foreign_drops
from netorch.system.namespaces import in_namespace
from netorch.system.scope import Scope
from tests.kernel.cables import PATIENCE, bridge, guest_on, machine, sh, tcp, wire

FAR = "10.9.0.2"
GUEST = "192.168.122.6"


class World:
    def __init__(self) -> None:
        sh("echo 0 > /proc/sys/net/ipv4/ip_forward")
        bridge("virbr0", "192.168.122.1/24")
        self.guest = guest_on("virbr0", "tap0", f"{GUEST}/24", "192.168.122.1")
        self.far = machine()
        wire(self.far, "eth0", f"{FAR}/24", "10.9.0.1")
        sh("ip addr add 10.9.0.1/24 dev eth0")
        self.firewall = firewall()
        self.firewall.create([Forwarding(name="eth0")], ignore)

    def load(self, *segments: Segment) -> Ruleset:
        rules = ruleset("netorch_t", segments)
        assert rules is not None
        self.firewall.create([rules], ignore)
        return rules


def firewall(lab: str = "t") -> Firewall:
    nowhere = Path("/nonexistent")
    return Firewall(Scope(lab=lab, place=0, run=nowhere, disks=nowhere))


def ignore(_: Resource) -> None:
    pass


def segment(
    mode: str, bridge: str = "virbr0", subnet: str = "192.168.122.0/24", uplink: str = ""
) -> Segment:
    return Segment(network=bridge, mode=mode, bridge=bridge, subnet=subnet, uplink=uplink)


def source_of(client: int, server: int, address: str) -> str:
    seen = tcp(client, server, address)
    return seen[0] if seen else "refused"


def udp(client: int, server: int, address: str, *, source: int = 0) -> tuple[str, int] | None:
    with in_namespace(server):
        receiving = socket.socket(type=socket.SOCK_DGRAM)
    with in_namespace(client):
        sending = socket.socket(type=socket.SOCK_DGRAM)
    with receiving, sending:
        receiving.bind(("", 9000))
        sending.bind(("", source))
        sending.connect((address, 9000))
        sending.send(b"x")
        receiving.settimeout(PATIENCE)
        try:
            return receiving.recvfrom(10)[1]  # type: ignore[no-any-return]
        except TimeoutError:
            return None


def echo(client: int, address: str) -> bool:
    """Does the address answer an ICMP echo request?"""
    body = struct.pack("!BBHHH", 8, 0, 0xF7FD, 1, 1)
    with in_namespace(client):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw:
        raw.connect((address, 0))
        raw.send(body)
        raw.settimeout(PATIENCE)
        try:
            return raw.recv(100)[20] == 0
        except OSError:  # refused by the gateway, or no answer in time
            return False


def test_a_nat_guest_reaches_far_as_the_gateway_and_nobody_comes_in() -> None:
    world = World()
    world.load(segment("nat"))
    assert source_of(world.guest, world.far, FAR) == "10.9.0.1"
    seen = udp(world.guest, world.far, FAR)
    assert seen is not None
    assert seen[0] == "10.9.0.1"
    assert echo(world.guest, FAR)
    assert tcp(world.far, world.guest, GUEST) is None
    assert not echo(world.far, GUEST)


def test_without_rules_the_far_side_would_come_in() -> None:
    """The control: what the other tests see refused is refused by the rules."""
    world = World()
    assert source_of(world.far, world.guest, GUEST) == FAR
    assert echo(world.far, GUEST)


def test_a_guest_cannot_pass_as_a_privileged_port() -> None:
    world = World()
    world.load(segment("nat"))
    for seen in (
        tcp(world.guest, world.far, FAR, source=700),
        udp(world.guest, world.far, FAR, source=700),
    ):
        assert seen is not None
        assert seen[1] >= 1024


def test_a_nat_network_with_an_uplink_leaves_by_it_alone() -> None:
    world = World()
    other = machine()
    wire(other, "eth1", "10.8.0.2/24", "10.8.0.1")
    sh("ip addr add 10.8.0.1/24 dev eth1; echo 1 > /proc/sys/net/ipv4/conf/eth1/forwarding")
    world.load(segment("nat", uplink="eth0"))
    assert source_of(world.guest, world.far, FAR) == "10.9.0.1"
    assert tcp(world.guest, other, "10.8.0.2") is None


def test_a_routed_network_keeps_its_addresses_and_lets_in() -> None:
    world = World()
    world.load(segment("route"))
    assert source_of(world.guest, world.far, FAR) == GUEST
    assert source_of(world.far, world.guest, GUEST) == FAR


def test_an_isolated_network_is_left_by_nothing() -> None:
    world = World()
    world.load(segment("isolated"))
    neighbour = guest_on("virbr0", "tap1", "192.168.122.7/24", "192.168.122.1")
    assert tcp(world.guest, world.far, FAR) is None
    assert tcp(world.far, world.guest, GUEST) is None
    assert source_of(world.guest, neighbour, "192.168.122.7") == GUEST
    assert echo(world.guest, "192.168.122.1")


def test_two_nat_networks_cannot_talk() -> None:
    world = World()
    bridge("virbr1", "192.168.123.1/24")
    other = guest_on("virbr1", "tap1", "192.168.123.6/24", "192.168.123.1")
    world.load(segment("nat"), segment("nat", "virbr1", "192.168.123.0/24"))
    assert tcp(world.guest, other, "192.168.123.6") is None
    assert tcp(other, world.guest, GUEST) is None
    assert source_of(other, world.far, FAR) == "10.9.0.1"


def test_a_nat_guest_reaches_the_labs_own_lan() -> None:
    """virbr0-vs-br0: the bridged machine sees the gateway, and can't come back."""
    world = World()
    bridge("br0", "10.7.0.1/24")
    server = guest_on("br0", "tap1", "10.7.0.80/24", "10.7.0.1")
    world.load(segment("nat"), segment("bridge", "br0", "10.7.0.0/24"))
    assert source_of(world.guest, server, "10.7.0.80") == "10.7.0.1"
    assert tcp(server, world.guest, GUEST) is None


def test_no_ipv6_comes_in_from_a_guest() -> None:
    """A guest knows the bridge's MAC, and may send it packets for any address of the machine."""
    world = World()
    sh("ip addr add fd00::1/64 dev eth0 nodad")
    mac = sh("ip -br link show virbr0").split()[2]
    with in_namespace(world.guest):
        sh("ip addr add fd01::6/64 dev eth0 nodad; ip route add fd00::/64 dev eth0")
        sh(f"ip neigh add fd00::1 lladdr {mac} dev eth0")
        sending = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sending, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as receiving:
        receiving.bind(("::", 9000))
        receiving.settimeout(PATIENCE)
        sending.sendto(b"before", ("fd00::1", 9000))
        assert receiving.recv(10) == b"before"
        receiving.settimeout(1)
        world.load(segment("nat"))
        sending.sendto(b"after", ("fd00::1", 9000))
        with pytest.raises(TimeoutError):
            receiving.recv(10)


def test_an_update_leaves_connections_alone() -> None:
    world = World()
    old = world.load(segment("nat"))
    with in_namespace(world.far):
        listening = socket.create_server(("", 8000))
    with in_namespace(world.guest):
        connecting = socket.socket()
    with listening, connecting:
        connecting.connect((FAR, 8000))
        accepted, peer = listening.accept()
        with accepted:
            new = ruleset("netorch_t", [segment("nat"), segment("nat", "virbr9", "10.99.0.0/24")])
            assert new is not None
            world.firewall.update([Update(old, new)], ignore)
            for sender, receiver in ((connecting, accepted), (accepted, connecting)):
                receiver.settimeout(PATIENCE)
                sender.send(b"still here")
                assert receiver.recv(20) == b"still here"
            assert peer[0] == "10.9.0.1"
    assert next(r for r in world.firewall.observe() if isinstance(r, Ruleset)) == new


def observed(wall: Firewall) -> Ruleset | None:
    return next((r for r in wall.observe() if isinstance(r, Ruleset)), None)


MODES = [("nat", ""), ("nat", "eth0"), ("route", ""), ("route", "eth0"), ("isolated", "")]


def many(count: int) -> list[Segment]:
    return [
        segment(MODES[n % 5][0], f"br{n}", f"10.{n // 256}.{n % 256}.0/24", MODES[n % 5][1])
        for n in range(count)
    ]


@pytest.mark.parametrize("name", ["t", "a-b.c_d", "0", "a" * 63])
def test_the_table_is_what_was_loaded_until_someone_changes_it(name: str) -> None:
    wall = firewall(name)
    table = f"netorch_{name}"
    rules = ruleset(table, many(10))
    assert rules is not None
    assert wall.check([rules]) == []
    assert observed(wall) is None
    wall.create([rules], ignore)
    wall.create([rules], ignore)
    seen = observed(wall)
    assert seen == rules
    assert seen is not None
    # The kernel's own listing makes the same table again, sealed or not as it was.
    wall.delete([rules], ignore)
    wall.delete([rules], ignore)
    assert sh("nft list ruleset") == ""
    wall.create([seen], ignore)
    assert observed(wall) == rules

    for change in (
        f"add rule inet {table} forward accept",
        f"flush chain inet {table} leaving",
        f"add element inet {table} guarded {{ eth7 }}",
        f"delete element inet {table} nat {{ br0 . 10.0.0.0/24 }}",
        f"add chain inet {table} more",
    ):
        wall.create([rules], ignore)
        assert observed(wall) == rules
        sh(f"nft '{change}'")
        drifted = observed(wall)
        assert drifted is not None
        assert drifted.digest == "", change
        # Rolling back an update of a changed table brings the change back, and it still shows.
        wall.update([Update(drifted, rules)], ignore)
        wall.update([Update(rules, drifted)], ignore)
        assert observed(wall) == drifted
        assert observed(wall).text == drifted.text  # type: ignore[union-attr]


def test_a_table_that_was_never_sealed_is_replaced() -> None:
    """What a SIGKILL between the two transactions leaves."""
    wall = firewall()
    rules = ruleset("netorch_t", many(3))
    assert rules is not None
    sh(f"nft -f - <<'END'\n{rules.text}\nEND")
    unsealed = observed(wall)
    assert unsealed == Ruleset(text="", digest="")
    assert unsealed is not None
    wall.update([Update(unsealed, rules)], ignore)
    assert observed(wall) == rules


def test_looking_and_checking_changes_nothing() -> None:
    wall = firewall()
    rules = ruleset("netorch_t", many(3))
    assert rules is not None
    wall.create([rules], ignore)
    before = sh("nft -a list ruleset")
    list(wall.observe())
    assert wall.check([rules]) == []
    assert sh("nft -a list ruleset") == before  # handles included: not even made again


def test_rules_that_the_kernel_refuses_are_found_before_they_are_loaded() -> None:
    broken = Ruleset(text="table inet netorch_t {\n\tchain a {\n\t\tjump b\n\t}\n}\n", digest="1")
    [reason] = firewall().check([broken])
    assert reason.startswith("failed to load table inet netorch_t: ")
    assert sh("nft list ruleset") == ""


def test_rules_that_the_kernel_refuses_leave_the_old_ones() -> None:
    wall = firewall()
    rules = ruleset("netorch_t", many(3))
    assert rules is not None
    wall.create([rules], ignore)
    broken = Ruleset(text="table inet netorch_t {\n\tchain a {\n\t\tjump b\n\t}\n}\n", digest="1")
    with pytest.raises(KernelError, match="failed to load table inet netorch_t: "):
        wall.update([Update(rules, broken)], ignore)
    assert observed(wall) == rules


def test_a_thousand_networks() -> None:
    wall = firewall()
    started = time.perf_counter()
    rules = ruleset("netorch_t", many(1000))
    rendered = time.perf_counter()
    assert rules is not None
    wall.create([rules], ignore)
    loaded = time.perf_counter()
    assert observed(wall) == rules
    looked = time.perf_counter()
    sys.stdout.write(
        f"1,000 networks: rendered in {(rendered - started) * 1e3:.1f} ms, loaded and sealed in "
        f"{(loaded - rendered) * 1e3:.1f} ms, observed in {(looked - loaded) * 1e3:.1f} ms\n"
    )


def test_foreign_chains_that_drop_are_named() -> None:
    firewall().create([r for r in [ruleset("netorch_t", many(3))] if r], ignore)
    assert foreign_drops() == []
    sh(
        "nft 'table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop;\n"
        " accept\n }\n chain INPUT { type filter hook input priority 0; policy drop;\n }\n }\n"
        'table inet firewalld { chain filter_FORWARD { comment "c"\n'
        " type filter hook forward priority 10;\n"
        " ct state established accept\n counter reject with icmpx admin-prohibited\n }\n }\n"
        "table ip6 filter { chain F { type filter hook forward priority 0; policy drop;\n }\n }\n"
        "table inet fine { chain f { type filter hook forward priority 0;\n ip saddr 1.1.1.1 drop\n"
        " }\n chain empty { type filter hook forward priority 0;\n }\n }'"
    )
    assert foreign_drops() == [
        "chain FORWARD of table ip filter has policy drop: the lab's traffic needs a rule in it",
        "chain filter_FORWARD of table inet firewalld ends with `reject with icmpx "
        "admin-prohibited`: the lab's traffic needs a rule before",
    ]
