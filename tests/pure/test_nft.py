"""The rules, compared in meaning with libvirt's own test data.

Both rulesets are interpreted here, and every packet of a table of packets has to fare the same in
both.
"""

import itertools
import re
import xml.etree.ElementTree as ET
from functools import cache
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import NamedTuple

import pytest

from netorch.networks import Segment, ruleset

CASES = Path(__file__).parents[3] / "shared/libvirt-cases/firewall"
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="libvirt's test data is not in ../shared/libvirt-cases"
)

IN_SCOPE = ["nat-default", "forward-dev", "route-default", "nat-no-dhcp"]
PROTOCOLS = ("tcp", "udp", "icmp")


class Packet(NamedTuple):
    iif: str
    oif: str
    saddr: str
    daddr: str
    protocol: str
    established: bool

    def reply(self) -> "Packet":
        return Packet(self.oif, self.iif, self.daddr, self.saddr, self.protocol, True)


class Rules(NamedTuple):
    chains: dict[str, list[str]]
    sets: dict[str, list[str]]

    def run(self, chain: str, packet: Packet) -> str | None:
        """The verdict of a chain; None if it lets the packet pass to its end, or returns."""
        for rule in self.chains.get(chain, []):
            verdict = self._apply(rule.split(), packet)
            if verdict == "return":
                return None
            if verdict is None or not verdict.startswith("jump "):
                if verdict is not None:
                    return verdict
                continue
            if (verdict := self.run(verdict.removeprefix("jump "), packet)) is not None:
                return verdict
        return None

    def _apply(self, words: list[str], packet: Packet) -> str | None:
        """The rule's verdict, None if it doesn't match."""
        while words:
            keys = []
            while words[0] in ("ip", "iif", "iifname", "oif", "oifname", "."):
                word = words.pop(0)
                if word != ".":
                    keys.append(words.pop(0) if word == "ip" else word.removesuffix("name"))
            if keys:
                negated = words[0] == "!="
                if negated:
                    words.pop(0)
                if self._among(words, [str(getattr(packet, key)) for key in keys]) == negated:
                    return None
            elif words[:2] == ["meta", "l4proto"]:
                del words[:2]
                if not self._among(words, [packet.protocol]):
                    return None
            elif words[:2] == ["ct", "state"]:
                assert set(words[2].split(",")) == {"established", "related"}
                del words[:3]
                if not packet.established:
                    return None
            elif words[0] == "counter":
                words.pop(0)
            else:
                return " ".join(words)
        raise AssertionError("a rule without a verdict")

    def _among(self, words: list[str], values: list[str]) -> bool:
        """Is the value in the set, or equal to the literal, that comes next (and is taken off)?"""
        operand = words.pop(0)
        if operand == "{":
            end = words.index("}")
            elements = " ".join(words[:end]).split(", ")
            del words[: end + 1]
        else:
            elements = self.sets[operand[1:]] if operand[0] == "@" else [operand]
        wanted = [element.replace('"', "").split(" . ") for element in elements]
        return any(all(map(_equal, values, element)) for element in wanted)


@cache
def _equal(value: str, wanted: str) -> bool:
    if "." in wanted or "/" in wanted:
        return ip_address(value) in ip_network(wanted)
    return value == wanted


def ours(*segments: Segment) -> Rules:
    rules = ruleset("netorch_t", segments)
    assert rules is not None
    chains = re.findall(r"\tchain (\w+) \{\n(.*?)\t\}\n", rules.text, re.DOTALL)
    sets = re.findall(r"\tset (\w+) \{.*?elements = \{ (.*?) \}\n", rules.text, re.DOTALL)
    return Rules(
        {
            name: [
                line.strip() for line in body.splitlines() if not line.strip().startswith("type")
            ]
            for name, body in chains
        },
        {name: re.split(r",\s+", elements) for name, elements in sets},
    )


def libvirt(*cases: tuple[str, str, str], only: str = "") -> Rules:
    """Rules of libvirt's cases, each with a bridge and a subnet (by its beginning) of its own.

    The base chains' jumps are those of libvirt 11's src/network/network_nftables.c.
    """
    chains: dict[str, list[str]] = {
        "forward": ["jump guest_cross", "jump guest_input", "jump guest_output"],
        "postrouting": ["jump guest_nat"],
    }
    for case, bridge, prefix in cases:
        words = (CASES / f"{case}-linux.nftables").read_text().replace("\\\n", " ").replace("'", "")
        for line in words.splitlines():
            rule = " ".join(line.split())
            if match := re.fullmatch(r"nft -ae insert rule ip libvirt_network (\w+) (.*)", rule):
                if only and not match[2].endswith(only) and match[1] != "guest_cross":
                    continue
                text = match[2].replace("virbr0", bridge).replace("192.168.122.", prefix)
                chains.setdefault(match[1], []).insert(0, text)
    return Rules(chains, {})


def segment_of(case: str, bridge: str = "virbr0", prefix: str = "192.168.122.") -> Segment:
    network = ET.parse(CASES / f"{case}.xml").getroot()
    forward, address = network.find("forward"), network.find("ip")
    assert forward is not None
    assert address is not None
    gateway = ip_interface(f"{address.get('address')}/{address.get('netmask')}")
    return Segment(
        network="default",
        mode=forward.get("mode") or "nat",
        bridge=bridge,
        subnet=str(gateway.network).replace("192.168.122.", prefix),
        gateway=str(gateway.ip).replace("192.168.122.", prefix),
        uplink=forward.get("dev") or "",
    )


def packets(interfaces: list[str], addresses: list[str]) -> list[Packet]:
    return [
        Packet(*fields)
        for fields in itertools.product(
            interfaces, interfaces, addresses, addresses, PROTOCOLS, (False, True)
        )
    ]


ADDRESSES = [
    "192.168.122.1",
    "192.168.122.7",
    "192.168.122.255",
    "192.168.123.9",
    "8.8.8.8",
    "224.0.0.251",
    "224.0.1.1",
    "255.255.255.255",
]


@needs_cases
@pytest.mark.parametrize("case", IN_SCOPE)
def test_every_packet_fares_as_under_libvirts_rules(case: str) -> None:
    mine, theirs = ours(segment_of(case)), libvirt((case, "virbr0", "192.168.122."))
    for packet in packets(["virbr0", "enp0s7", "eth1"], ADDRESSES):
        assert (mine.run("forward", packet) or "accept") == (
            theirs.run("forward", packet) or "accept"
        ), packet
        assert mine.run("postrouting", packet) == theirs.run("postrouting", packet), packet


@needs_cases
@pytest.mark.parametrize("first", IN_SCOPE)
@pytest.mark.parametrize("second", IN_SCOPE)
def test_two_networks_connect_as_under_libvirt(first: str, second: str) -> None:
    """Compared by connections: ours also stops one-way packets that could get no answer."""
    sides = (("virbr0", "192.168.122."), ("virbr1", "192.168.123."))
    mine = ours(segment_of(first, *sides[0]), segment_of(second, *sides[1]))
    theirs = libvirt((first, *sides[0]), (second, *sides[1]))
    _compare_connections(mine, theirs)


@needs_cases
@pytest.mark.parametrize("other", IN_SCOPE)
def test_an_isolated_network_connects_to_nothing_as_under_libvirt(other: str) -> None:
    isolated = Segment(network="i", mode="isolated", bridge="virbr1", subnet="192.168.123.0/24")
    mine = ours(segment_of(other), isolated)
    theirs = libvirt((other, "virbr0", "192.168.122."))
    for name, rules in libvirt(
        ("route-default", "virbr1", "192.168.123."), only="reject"
    ).chains.items():
        if name.startswith("guest_"):
            theirs.chains[name][:0] = rules
    _compare_connections(mine, theirs)
    for packet in packets(["virbr0", "virbr1", "eth1"], ADDRESSES):
        if (packet.iif == "virbr1") != (packet.oif == "virbr1"):
            assert mine.run("forward", packet) == "reject", packet


def _compare_connections(mine: Rules, theirs: Rules) -> None:
    def connects(rules: Rules, packet: Packet) -> bool:
        both = (packet, packet.reply())
        return all((rules.run("forward", p) or "accept") == "accept" for p in both)

    for packet in packets(["virbr0", "virbr1", "enp0s7", "eth1"], ADDRESSES):
        if not packet.established:
            assert connects(mine, packet) == connects(theirs, packet), packet


def segment(number: int, mode: str, uplink: str = "") -> Segment:
    return Segment(
        network=f"n{number}",
        mode=mode,
        bridge=f"br{number}",
        subnet=f"10.{number // 256}.{number % 256}.0/24",
        gateway=f"10.{number // 256}.{number % 256}.1",
        uplink=uplink,
    )


def test_networks_without_policy_need_no_table() -> None:
    assert ruleset("netorch_t", []) is None
    assert ruleset("netorch_t", [segment(1, "open"), segment(2, "bridge")]) is None


def test_open_and_bridged_networks_are_in_no_rule() -> None:
    rules = ruleset("netorch_t", [segment(1, "open"), segment(2, "bridge"), segment(3, "nat")])
    assert rules is not None
    assert "br1" not in rules.text
    assert "br2" not in rules.text


def test_a_nat_network_reaches_the_labs_own_lan_and_is_hidden_there() -> None:
    rules = ours(segment(1, "nat"), segment(2, "bridge"))
    there = Packet("br1", "br2", "10.0.1.5", "10.0.2.80", "tcp", False)
    assert rules.run("forward", there) is None
    assert rules.run("forward", there.reply()) is None
    assert rules.run("postrouting", there) == "masquerade to :1024-65535"
    assert rules.run("forward", there.reply()._replace(established=False)) == "reject"


def test_the_number_of_rules_does_not_grow_with_the_networks() -> None:
    modes = [("nat", ""), ("nat", "eth0"), ("route", ""), ("route", "eth1"), ("isolated", "")]
    few = ours(*(segment(n, *modes[n % 5]) for n in range(5)))
    many = ours(*(segment(n, *modes[n % 5]) for n in range(1000)))
    assert few.chains == many.chains
    assert len(many.sets["guarded"]) == 1000


def test_the_digest_tells_rules_apart_and_nothing_else() -> None:
    one = ruleset("netorch_t", [segment(1, "nat")])
    assert one is not None
    assert one == ruleset("netorch_t", [segment(1, "nat"), segment(2, "bridge")])
    assert one != ruleset("netorch_t", [segment(1, "route")])
    assert f'comment "{one.digest}"' in one.text


@pytest.mark.parametrize("name", ['a" }', "a*", "a\\", "a\nb", "a b", "a{", "a#", "a;b"])
@pytest.mark.parametrize("field", ["network", "bridge", "uplink", "domain", "lease"])
def test_no_value_can_break_out_of_its_place(field: str, name: str) -> None:
    fields = {"network": "n", "mode": "nat", "bridge": "br0", field: name}
    with pytest.raises(ValueError, match="can't stand in"):
        Segment(**fields)  # type: ignore[arg-type]
