"""What a network does with packets, names and addresses: nft rules and dnsmasq's files as text.

A `Segment` is one network with every derived value chosen. The behaviour is that of libvirt 11's
networks (its nftables back-end and its dnsmasq configuration); where it differs on purpose, the
reason stands beside the line, and tests/pure/test_nft.py and test_dnsmasq.py compare the two.

Rules. One table a lab, whose networks are elements of sets: a packet passes the same handful of
rules whether the lab has one network or a thousand, and a kind of policy that no network uses has
no rule.
    forward      what stays on one bridge is accepted first (with br_netfilter, bridged frames come
                 by here); what enters a guarded bridge must be let in by `arriving`, what comes
                 from one must be let out by `leaving`; both return what they allow and reject the
                 rest. So a packet between two networks needs the consent of both. (libvirt accepts
                 in the first of the two: there an isolated guest can send to a routed network, but
                 never gets an answer.)
    input        no IPv6 into the machine: our bridges have no IPv6 address, but the machine's
                 others would answer whoever sends to the bridge's MAC.
    postrouting  masquerading: not within the subnet, not to link-local multicast or broadcast (a
                 DHCP broadcast reply has to keep its source port), TCP and UDP to ports above 1023
                 (so that a guest can't pass as a privileged port), then the rest.
nat, route and isolated networks are guarded; open and bridge have no rules, as in libvirt.
Interfaces are matched by name, so the rules outlive a bridge that is made again. An accept here
overrides no drop in another table: see `netorch.system.firewall.foreign_drops`.

dnsmasq. One process a network, bound to its bridge, reading nothing but the three texts from here.
"""

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network

import msgspec

from netorch.digests import sha256
from netorch.resources import Ruleset

# The characters that a value may have in both languages without meaning anything but itself.
_PLAIN = r"[A-Za-z0-9_.:/@+-]*"
# What dnsmasq takes as a name in dhcp-host: one label that it can't read as a lease time, `ignore`
# (option.c, one_opt LOPT/dhcp-host), an address or a domain of another network.
_HOSTNAME = r"(?i)(?!(\d+[smhdw]?|infinite|ignore)$)[A-Za-z0-9]([A-Za-z0-9_-]*[A-Za-z0-9])?"


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A DHCP reservation; `name` may be "" (the second NIC of a guest on the same network)."""

    mac: str
    address: str
    name: str = ""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One network: a bridge, its subnet and its services.

    `subnet` is `a.b.c.d/len` and `gateway` the bridge's address in it; both are "" where the bridge
    has none. `uplink` is the only interface that nat or route may leave by ("": any). `dhcp_first`
    is "" without DHCP; `lease` is in dnsmasq's form; `boot` is the file or URL that it gives to
    who boots from the network. `names` are pairs of address and name.

    Raises ValueError for a value that would mean more than itself in a configuration file.
    """

    network: str
    mode: str
    bridge: str
    subnet: str = ""
    gateway: str = ""
    uplink: str = ""
    mtu: int = 1500
    dhcp_first: str = ""
    dhcp_last: str = ""
    lease: str = "1h"
    boot: str = ""
    dns: bool = True
    domain: str = ""
    reservations: tuple[Reservation, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        fields = (getattr(self, field) for field in self.__struct_fields__)
        values = [value for value in fields if isinstance(value, str)]
        values += [value for pair in self.names for value in pair]
        values += [value for r in self.reservations for value in (r.mac, r.address, r.name)]
        for value in values:
            if not re.fullmatch(_PLAIN, value):
                raise ValueError(
                    f"network {self.network}: {value!r} can't stand in a configuration file"
                )


def ruleset(table: str, segments: Sequence[Segment]) -> Ruleset | None:
    """The rules of `table inet <table>`; None where no network has any.

    The text declares the table in the form in which `nft list table` prints one; whoever loads it
    replaces the whole table in one transaction. The table's comment carries the digest.
    """
    guarded = [segment for segment in segments if segment.mode in ("nat", "route", "isolated")]
    if not guarded:
        return None
    parts = [*_sets(guarded), *_forward(guarded), *_postrouting(guarded)]
    body = "\n".join(part for part in parts if part)
    digest = sha256(body)[:32]
    return Ruleset(text=f'table inet {table} {{\n\tcomment "{digest}"\n{body}}}\n', digest=digest)


def dnsmasq_config(
    segment: Segment,
    *,
    leases: str,
    hosts: str,
    names: str,
    log: str,
    resolv: str = "",
    tftp: str = "",
) -> str:
    """dnsmasq's configuration for one network, to be given as its only one by --conf-file.

    The arguments are paths: of the lease database and the log, which dnsmasq writes, of what
    `dhcp_hosts` and `static_names` return, of a resolv.conf that says whom to ask ("": the
    machine's own), and of the directory that it serves by TFTP ("": none).
    """
    lines = [
        f"# netorch: network {segment.network}",
        "strict-order",
        # setgroups is denied in a user namespace, and dnsmasq gives up; an empty group needs none.
        "user=root",
        "group=",
        "pid-file=",
        f"log-facility={_path(log)}",
        "except-interface=lo",
        "bind-dynamic",
        f"interface={segment.bridge}",
    ]
    if tftp:
        lines += ["enable-tftp", f"tftp-root={_path(tftp)}"]
    lines += _dns(segment, names, resolv) if segment.dns else ["port=0"]
    if segment.dhcp_first:
        lines += _dhcp(segment, leases, hosts)
    return "\n".join(lines) + "\n"


def dhcp_hosts(segment: Segment) -> str:
    """The reservations, for dhcp-hostsfile: `mac,address,name` a line."""
    return "".join(
        f"{r.mac},{r.address},{r.name}\n"
        if re.fullmatch(_HOSTNAME, r.name)
        else f"{r.mac},{r.address}\n"
        for r in segment.reservations
    )


def static_names(segment: Segment) -> str:
    """Names that don't wait for a lease, for addn-hosts: `address name` a line.

    Those of a reservation stand here where dnsmasq would take the name for something else.
    """
    reserved = [
        (r.address, r.name) for r in segment.reservations if not re.fullmatch(_HOSTNAME, r.name)
    ]
    return "".join(f"{address} {name}\n" for address, name in [*segment.names, *reserved] if name)


def _sets(guarded: Sequence[Segment]) -> Iterable[str]:
    yield _set("guarded", "ifname", [(f'"{s.bridge}"',) for s in guarded])
    yield _set("within", "ifname . ifname", [(f'"{s.bridge}"', f'"{s.bridge}"') for s in guarded])
    for mode in ("nat", "route"):
        homes = [(f'"{s.bridge}"', s.subnet) for s in _by(guarded, mode, uplink=False)]
        yield _set(mode, "ifname . ipv4_addr", homes)
        homes_by = [
            (f'"{s.bridge}"', s.subnet, f'"{s.uplink}"') for s in _by(guarded, mode, uplink=True)
        ]
        yield _set(f"{mode}_uplink", "ifname . ipv4_addr . ifname", homes_by)
    masked, masked_by = _by(guarded, "nat", uplink=False), _by(guarded, "nat", uplink=True)
    yield _set(
        "inside", "ipv4_addr . ipv4_addr", [(s.subnet, s.subnet) for s in masked + masked_by]
    )
    yield _set("hidden", "ipv4_addr", [(s.subnet,) for s in masked])
    yield _set(
        "hidden_uplink", "ipv4_addr . ifname", [(s.subnet, f'"{s.uplink}"') for s in masked_by]
    )


def _forward(guarded: Sequence[Segment]) -> Iterable[str]:
    yield _chain(
        "forward",
        "type filter hook forward priority filter; policy accept;",
        "iifname . oifname @within accept",
        "oifname @guarded jump arriving",
        "iifname @guarded jump leaving",
    )
    answered = "ct state established,related return"
    arriving, leaving = [], []
    for mode, verdict in (("nat", answered), ("route", "return")):
        if _by(guarded, mode, uplink=False):
            arriving.append(f"oifname . ip daddr @{mode} {verdict}")
            leaving.append(f"iifname . ip saddr @{mode} return")
        if _by(guarded, mode, uplink=True):
            arriving.append(f"oifname . ip daddr . iifname @{mode}_uplink {verdict}")
            leaving.append(f"iifname . ip saddr . oifname @{mode}_uplink return")
    yield _chain("arriving", *arriving, "reject")
    yield _chain("leaving", *leaving, "reject")
    yield _chain(
        "input",
        "type filter hook input priority filter; policy accept;",
        "meta nfproto ipv6 iifname @guarded drop",
    )


def _postrouting(guarded: Sequence[Segment]) -> Iterable[str]:
    sources = []
    if _by(guarded, "nat", uplink=False):
        sources.append("ip saddr @hidden jump masquerading")
    if _by(guarded, "nat", uplink=True):
        sources.append("ip saddr . oifname @hidden_uplink jump masquerading")
    if not sources:
        return
    yield _chain(
        "masquerading",
        "ip daddr { 224.0.0.0/24, 255.255.255.255 } return",
        "meta l4proto { tcp, udp } masquerade to :1024-65535",
        "masquerade",
    )
    yield _chain(
        "postrouting",
        "type nat hook postrouting priority srcnat; policy accept;",
        "ip saddr . ip daddr @inside return",
        *sources,
    )


def _by(segments: Sequence[Segment], mode: str, uplink: bool) -> list[Segment]:
    """The segments of a mode that may leave by any interface, or by one only."""
    return [s for s in segments if s.mode == mode and bool(s.uplink) == uplink and s.subnet]


def _set(name: str, type_: str, elements: Sequence[tuple[str, ...]]) -> str:
    if not elements:
        return ""
    flags = "\t\tflags interval\n" if "ipv4_addr" in type_ else ""
    listed = ",\n\t\t\t     ".join(" . ".join(element) for element in elements)
    return f"\tset {name} {{\n\t\ttype {type_}\n{flags}\t\telements = {{ {listed} }}\n\t}}\n"


def _chain(name: str, *rules: str) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


def _dns(segment: Segment, names: str, resolv: str) -> list[str]:
    # libvirt has the machine's /etc/hosts read; a guest can't then have a name that stands there.
    lines = ["no-hosts", f"addn-hosts={_path(names)}"]
    if segment.mode == "isolated":
        lines.append("no-resolv")
    elif resolv:
        lines.append(f"resolv-file={_path(resolv)}")
    # The lab's names are the lab's affair (libvirt: forwardPlainNames='no', localOnly, localPtr).
    lines += ["domain-needed", "local=//"]
    if segment.subnet:
        # Whole octets: other prefixes are refused before dnsmasq 2.87 and wrong in 2.88 and 2.89.
        net = IPv4Network(segment.subnet)
        zones = net.subnets(new_prefix=-(-net.prefixlen // 8) * 8)
        lines += [f"rev-server={zone}" for zone in zones]
    if segment.domain:
        lines += [f"local=/{segment.domain}/", f"domain={segment.domain}", "expand-hosts"]
    return lines


def _dhcp(segment: Segment, leases: str, hosts: str) -> list[str]:
    first, last = IPv4Address(segment.dhcp_first), IPv4Address(segment.dhcp_last)
    outside = [r for r in segment.reservations if not first <= IPv4Address(r.address) <= last]
    # libvirt counts the range alone: reservations outside of it then take leases from it.
    count = int(last) - int(first) + 1 + len(outside)
    lines = [
        f"dhcp-range={first},{last},{IPv4Network(segment.subnet).netmask},{segment.lease}",
        "dhcp-no-override",
        "dhcp-authoritative",
        f"dhcp-lease-max={count}",
        f"dhcp-hostsfile={_path(hosts)}",
        f"dhcp-leasefile={_path(leases)}",
        "log-dhcp",
        # Every NIC of the lab has a reservation; the check costs 3 s a lease, one after the other.
        "no-ping",
    ]
    if segment.boot:
        lines.append(f"dhcp-boot={segment.boot}")
    if segment.mode == "isolated":
        lines.append("dhcp-option=3")  # no router
    if segment.mtu != 1500:
        lines.append(f"dhcp-option=option:mtu,{segment.mtu}")
    return lines


def _path(path: str) -> str:
    """A path as a value of dnsmasq's configuration, quoted where a character has a meaning."""
    if re.fullmatch(_PLAIN, path):
        return path
    escaped = path.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'
