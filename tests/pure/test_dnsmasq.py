"""dnsmasq's files, compared with what libvirt's own test data expects for the same networks."""

import xml.etree.ElementTree as ET
from ipaddress import IPv4Network, ip_interface
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, strategies

from netorch.model import INTERFACE, NAME
from netorch.networks import Reservation, Segment, dhcp_hosts, dnsmasq_config, static_names

CASES = Path(__file__).parents[3] / "shared/libvirt-cases/dnsmasq"
needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="libvirt's test data is not in ../shared/libvirt-cases"
)

# The cases, and lines of theirs that belong to features that netorch doesn't have.
IN_SCOPE = {
    "nat-network-dns-local-domain": set[str](),
    "isolated-network": {"ra-param=*,0,0"},  # no router advertisements here, IPv6 is off
    "leasetime-infinite": set(),
    "leasetime-seconds": set(),
    "routed-network-no-dns": set(),
    "nat-network-mtu": {
        "dhcp-range=2001:db8:ac10:fe01::1,ra-only",
        "dhcp-range=2001:db8:ac10:fd01::1,ra-only",
    },
    "nat-network-dns-srv-record-minimal": {
        "srv-host=_name._tcp",
        "dhcp-range=fc00:db8:ac10:fe01::1,ra-only",
        "dhcp-range=fc00:db8:ac10:fd01::1,ra-only",
    },
    "netboot-network": set(),
    "netboot-tftp": set(),
}

# What ours has besides: libvirt gives the like on the command line (user, pid file, lease file
# by its script), or it is a difference that networks.py explains.
OURS = {
    "user=root",
    "group=",
    "pid-file=",
    "log-facility=/r/log",
    "dhcp-leasefile=/r/leases",
    "log-dhcp",
    "no-ping",
    "no-hosts",
    "domain-needed",
    "local=//",
}


def segment_of(case: str) -> Segment:
    network = ET.parse(CASES / f"{case}.xml").getroot()
    forward, domain, mtu = network.find("forward"), network.find("domain"), network.find("mtu")
    bridge, address, dns = network.find("bridge"), network.find("ip"), network.find("dns")
    assert bridge is not None
    assert address is not None
    gateway = ip_interface(f"{address.get('address')}/{address.get('netmask')}")
    bootp = address.find("dhcp/bootp")
    served, lease = address.find("dhcp/range"), address.find("dhcp/range/lease")
    return Segment(
        network=network.findtext("name", ""),
        mode="isolated" if forward is None else forward.get("mode") or "nat",
        bridge=bridge.get("name", ""),
        subnet=str(gateway.network),
        gateway=str(gateway.ip),
        mtu=1500 if mtu is None else int(mtu.get("size", "")),
        dhcp_first="" if served is None else served.get("start", ""),
        dhcp_last="" if served is None else served.get("end", ""),
        lease="1h" if lease is None else {"0": "infinite", "200": "200s"}[lease.get("expiry", "")],
        boot="" if bootp is None else bootp.get("file", ""),
        dns=dns is None or dns.get("enable") != "no",
        domain="" if domain is None else domain.get("name", ""),
        reservations=tuple(
            Reservation(mac=h.get("mac", ""), address=h.get("ip", ""), name=h.get("name", ""))
            for h in address.iterfind("dhcp/host")
        ),
    )


def render(segment: Segment, **paths: str) -> str:
    defaults = {"leases": "/r/leases", "hosts": "/r/hosts", "names": "/r/names", "log": "/r/log"}
    return dnsmasq_config(segment, **{**defaults, **paths})


def options(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@needs_cases
@pytest.mark.parametrize("case", IN_SCOPE)
def test_the_configuration_says_what_libvirts_says(case: str) -> None:
    segment = segment_of(case)
    name = segment.network
    theirs = set(options((CASES / f"{case}.conf").read_text())) - IN_SCOPE[case]
    renamed = {
        f"dhcp-hostsfile=/var/lib/libvirt/dnsmasq/{name}.hostsfile": "dhcp-hostsfile=/r/hosts",
        f"addn-hosts=/var/lib/libvirt/dnsmasq/{name}.addnhosts": "addn-hosts=/r/names",
    }
    # A lease time is always given: libvirt leaves dnsmasq's default, which is 1h.
    theirs = {
        f"{line},1h" if line.startswith("dhcp-range=") and line.count(",") == 2 else line
        for line in (renamed.get(line, line) for line in theirs)
    }
    tftp = ET.parse(CASES / f"{case}.xml").find("ip/tftp")
    mine = options(render(segment, tftp="" if tftp is None else tftp.get("root", "")))
    assert len(mine) == len(set(mine))
    extra = {f"rev-server={segment.subnet}"}
    if segment.domain:
        extra.add(f"local=/{segment.domain}/")
    assert theirs - set(mine) == set()
    assert set(mine) - theirs <= OURS | extra


@needs_cases
@pytest.mark.parametrize("case", [c for c in IN_SCOPE if (CASES / f"{c}.hostsfile").exists()])
def test_every_reservation_of_libvirt_is_one_of_ours(case: str) -> None:
    """Names that have a domain stand among the static names: dnsmasq would cut it off."""
    segment = segment_of(case)
    lines = (CASES / f"{case}.hostsfile").read_text().splitlines()
    theirs = [line.split(",") for line in lines]
    assert dhcp_hosts(segment) == "".join(f"{mac},{ip}\n" for mac, ip, *_ in theirs)
    assert static_names(segment) == "".join(f"{ip} {name}\n" for _, ip, name, *_ in theirs)


def segment(
    mode: str = "nat",
    *,
    mtu: int = 1500,
    dns: bool = True,
    subnet: str = "192.168.122.0/24",
    names: tuple[tuple[str, str], ...] = (),
    reservations: tuple[Reservation, ...] = (),
) -> Segment:
    return Segment(
        network="default",
        mode=mode,
        bridge="virbr0",
        subnet=subnet,
        gateway="192.168.122.1",
        mtu=mtu,
        dhcp_first="192.168.122.2",
        dhcp_last="192.168.122.254",
        dns=dns,
        names=names,
        reservations=reservations,
    )


def test_plain_names_are_given_with_the_lease_and_static_ones_at_once() -> None:
    served = segment(
        names=(("192.168.122.80", "server"),),
        reservations=(
            Reservation(mac="52:54:00:00:00:01", address="192.168.122.6", name="vm1"),
            Reservation(mac="52:54:00:00:00:02", address="192.168.122.7"),
        ),
    )
    assert dhcp_hosts(served) == (
        "52:54:00:00:00:01,192.168.122.6,vm1\n52:54:00:00:00:02,192.168.122.7\n"
    )
    assert static_names(served) == "192.168.122.80 server\n"


@pytest.mark.parametrize(
    "name", ["10", "1h", "7w", "infinite", "ignore", "10.0.0.5", "db.prod", "a-", "a..b", "a."]
)
def test_a_name_that_dnsmasq_would_misread_is_a_static_one(name: str) -> None:
    served = segment(reservations=(Reservation(mac="m", address="192.168.122.6", name=name),))
    assert dhcp_hosts(served) == "m,192.168.122.6\n"
    assert static_names(served) == f"192.168.122.6 {name}\n"


def test_without_dns_there_is_no_port_no_names_and_no_upstream() -> None:
    text = render(segment(dns=False), resolv="/r/resolv")
    assert "port=0" in options(text)
    assert not [o for o in options(text) if o.startswith(("addn", "local", "resolv", "rev"))]


def test_an_isolated_network_asks_nobody_and_has_no_router() -> None:
    text = options(render(segment("isolated"), resolv="/r/resolv"))
    assert "no-resolv" in text
    assert "dhcp-option=3" in text
    assert "resolv-file=/r/resolv" not in text


def test_a_network_may_ask_other_servers_than_the_machine() -> None:
    assert "resolv-file=/r/resolv" in options(render(segment(), resolv="/r/resolv"))


def test_a_usual_mtu_is_not_announced() -> None:
    assert "mtu" not in render(segment())
    assert "dhcp-option=option:mtu,1400" in options(render(segment(mtu=1400)))


@pytest.mark.parametrize("length", [8, 9, 16, 20, 24, 25, 30])
def test_reverse_zones_are_whole_octets_that_cover_the_subnet(length: int) -> None:
    subnet = IPv4Network(f"10.0.0.0/{length}")
    lines = options(render(segment(subnet=str(subnet))))
    zones = [IPv4Network(o.partition("=")[2]) for o in lines if o.startswith("rev-server=")]
    assert {zone.prefixlen % 8 for zone in zones} == {0}
    assert sum(zone.num_addresses for zone in zones) == subnet.num_addresses
    assert all(zone.subnet_of(subnet) for zone in zones)


NAMES = strategies.from_regex(NAME)
INTERFACES = strategies.from_regex(INTERFACE)


@given(NAMES, NAMES, NAMES, INTERFACES, NAMES)
def test_what_a_file_may_say_is_one_word_of_one_line(
    network: str, guest: str, host: str, bridge: str, domain: str
) -> None:
    reserved = Reservation(mac="52:54:00:00:00:01", address="192.168.122.6", name=guest)
    served = msgspec.structs.replace(
        segment(reservations=(reserved,), names=(("192.168.122.80", host),)),
        network=network,
        bridge=bridge,
        domain=domain,
    )
    usual = msgspec.structs.replace(segment(), domain="lab")
    assert len(render(served).split("\n")) == len(render(usual).split("\n"))
    assert f"interface={bridge}" in options(render(served))
    words = (dhcp_hosts(served) + static_names(served)).split()
    assert len(words) == (3 if f",{guest}\n" in dhcp_hosts(served) else 5)


def test_paths_are_quoted_where_they_need_it() -> None:
    text = render(segment(), log='/r/a b # "c"\\\nuser=x')
    assert r'log-facility="/r/a b # \"c\"\\\nuser=x"' in options(text)
