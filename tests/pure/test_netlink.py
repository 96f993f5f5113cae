"""Our encoder and parsers against pyroute2's own encoding and decoding."""

import socket
import struct
import subprocess
import sys

import pytest

from netorch.system import changes, messages, netlink, snapshot
from netorch.system.changes import Wanted
from netorch.system.snapshot import Link

NO_IPV6 = ("IFLA_AF_SPEC", (("AF_INET6", (("IFLA_INET6_ADDR_GEN_MODE", 1),)),))


def decoded(message: bytearray) -> dict[str, object]:
    """The attributes of a link message, as the whole of pyroute2 reads them."""
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    parsed = ifinfmsg(bytes(message))
    parsed.decode()
    return dict(parsed["attrs"]) | {"index": parsed["index"], "flags": parsed["flags"]}


def test_a_link_message_says_what_was_asked() -> None:
    message = messages.link(
        7,
        name="tap0",
        alias="netorch:t:tap:a:0",
        mac="52:54:00:00:00:01",
        attributes=(("IFLA_MTU", 1400), ("IFLA_GROUP", 5), messages.up(True)),
    )
    assert len(message) == struct.unpack_from("=I", message)[0]
    said = decoded(message)
    assert said["IFLA_IFNAME"] == "tap0"
    assert said["IFLA_IFALIAS"] == "netorch:t:tap:a:0"
    assert said["IFLA_ADDRESS"] == "52:54:00:00:00:01"
    assert (said["IFLA_MTU"], said["IFLA_GROUP"], said["index"], said["flags"]) == (1400, 5, 7, 1)


def encoded(attributes: messages.Attributes) -> dict[str, object]:
    """Nested attributes as pyroute2 takes them."""
    return {
        "attrs": [
            (name, encoded(value) if isinstance(value, tuple) else value)
            for name, value in attributes
        ]
    }


INFO = (
    ("IFLA_INFO_KIND", "bridge"),
    ("IFLA_INFO_DATA", (("IFLA_BR_FORWARD_DELAY", 200), ("IFLA_BR_STP_STATE", 1))),
)


@pytest.mark.parametrize(
    "attributes",
    [
        (("IFLA_MTU", 1400),),
        (("IFLA_GROUP", 0x4E000001), ("IFLA_MASTER", 1 << 30)),
        (("IFLA_ADDRESS", "52:54:00:00:00:01"), ("IFLA_MTU", 9000)),
        (("IFLA_LINKINFO", INFO),),
        (NO_IPV6,),
    ],
    ids=lambda attributes: attributes[0][0],
)
def test_links_are_encoded_as_pyroute2_encodes_them(attributes: messages.Attributes) -> None:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    theirs = ifinfmsg()
    theirs["header"]["type"] = messages.NEWLINK
    theirs["header"]["flags"] = messages.CREATE
    theirs["index"] = 7
    theirs["flags"] = theirs["change"] = 1
    theirs["attrs"] = encoded(attributes)["attrs"]
    theirs.encode()
    ours = messages.link(7, flags=messages.CREATE, attributes=(*attributes, messages.up(True)))
    assert bytes(ours) == bytes(theirs.data)


@pytest.mark.parametrize(
    ("kind", "text", "broadcast"),
    [
        (messages.NEWADDR, "10.1.2.3/20", "10.1.15.255"),
        (messages.NEWADDR, "10.1.2.3/31", ""),
        (messages.DELADDR, "10.1.2.3/20", ""),
    ],
)
def test_addresses_are_encoded_as_pyroute2_encodes_them(
    kind: int, text: str, broadcast: str
) -> None:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    local, _, length = text.partition("/")
    theirs = ifaddrmsg()
    theirs["header"]["type"] = kind
    if kind == messages.NEWADDR:
        theirs["header"]["flags"] = messages.CREATE | messages.EXCLUSIVE
    theirs["family"], theirs["prefixlen"], theirs["index"] = socket.AF_INET, int(length), 7
    theirs["attrs"] = [("IFA_LOCAL", local), ("IFA_ADDRESS", local)]
    if broadcast:
        theirs["attrs"].append(("IFA_BROADCAST", broadcast))
    theirs.encode()
    assert bytes(messages.address(kind, 7, text)) == bytes(theirs.data)


def test_deletions_are_encoded_as_pyroute2_encodes_them() -> None:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    for index, attrs, ours in (
        (7, [], messages.delete_link(7)),
        (0, [("IFLA_GROUP", 5)], messages.delete_group(5)),
    ):
        theirs = ifinfmsg()
        theirs["header"]["type"] = messages.DELLINK
        theirs["index"], theirs["attrs"] = index, attrs
        theirs.encode()
        assert bytes(ours) == bytes(theirs.data)


def test_forwarding_is_nested_as_the_kernel_takes_it() -> None:
    conf = ("IFLA_INET_CONF", (("FORWARDING", 1),))
    message = messages.link(7, attributes=(("IFLA_AF_SPEC", (("AF_INET", (conf,)),)),))
    nested = struct.pack("=HHHHHHHHI", 20, 26, 16, 2, 12, 1, 8, 1, 1)
    assert bytes(message[32:]) == nested


def test_a_template_is_not_changed_by_its_use() -> None:
    first = messages.link(1, name="a", attributes=(NO_IPV6,))
    messages.link(2, name="bbbbbbbb", attributes=(NO_IPV6,))
    assert messages.link(1, name="a", attributes=(NO_IPV6,)) == first


def test_pyroute2_is_imported_whole_by_who_wants_it() -> None:
    script = """
import sys
from netorch.system import messages
messages.link(1, attributes=(("IFLA_MTU", 1400),))
messages.address(messages.NEWADDR, 1, "192.0.2.1/24")
assert not any(name.startswith("pyroute2") for name in sys.modules)
messages.default_route(messages.NEWROUTE, 1, "192.0.2.1")
assert not any(name.startswith("pyroute2") for name in sys.modules)
import pyroute2
import pyroute2.netlink.rtnl
assert pyroute2.IPRoute
assert pyroute2.netlink.rtnl.RTM_NEWLINK == messages.NEWLINK
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_parser_reads_what_the_encoder_writes() -> None:
    info = (("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", (("IFLA_BR_STP_STATE", 1),)))
    attributes = (
        ("IFLA_MTU", 1400),
        ("IFLA_MASTER", 3),
        ("IFLA_GROUP", 5),
        ("IFLA_LINKINFO", info),
        NO_IPV6,
    )
    message = messages.link(
        7,
        name="b0",
        alias="x:y",
        mac="52:54:00:00:00:01",
        attributes=(*attributes, messages.up(True)),
    )
    link = snapshot.parse_link(memoryview(bytes(message))[16:])
    assert link.info == {5: 1}
    link.data = b""
    assert link == Link(
        index=7, name="b0", alias="x:y", mac="52:54:00:00:00:01", mtu=1400, up=True, group=5,
        master=3, kind="bridge", ipv6=1,
    )  # fmt: skip


def test_no_difference_is_no_message() -> None:
    link = Link(index=7, alias="a", mac="m", mtu=1500, up=True, group=5, ipv6=1, forwarding=True)
    wanted = Wanted(alias="a", mac="m", mtu=1500, up=True, group=5, forwarding=True, no_ipv6=True)
    assert changes.at_once(link, wanted) == []
    assert changes.configure(link, wanted) == []
    assert changes.activate(link, wanted) == []


@pytest.mark.parametrize(
    ("current", "wanted", "expected"),
    [
        ([], ["10.0.0.1/24"], ["+10.0.0.1/24"]),
        (["10.0.0.1/24"], ["10.0.0.1/24"], []),
        (["10.0.0.1/24", "10.0.0.2/24"], [], ["-10.0.0.2/24", "-10.0.0.1/24"]),
        (
            ["10.0.0.1/24", "10.1.0.1/24"],
            ["10.0.0.1/24", "10.2.0.1/24"],
            ["-10.1.0.1/24", "+10.2.0.1/24"],
        ),
        (["10.0.0.1/24"], ["10.0.0.1/16"], ["-10.0.0.1/24", "+10.0.0.1/16"]),
    ],
)
def test_addresses_change_from_the_first_difference_on(
    current: list[str], wanted: list[str], expected: list[str]
) -> None:
    said = []
    for message in changes.readdress(7, current, wanted):
        kind = struct.unpack_from("=H", message, 4)[0]
        length = message[17]
        local = ".".join(map(str, message[28:32]))
        said.append(f"{'+' if kind == messages.NEWADDR else '-'}{local}/{length}")
    assert said == expected


def test_a_group_is_never_split_over_two_calls() -> None:
    groups = [[bytearray(100)] * size for size in (1, 100, 27, 1, 200, 3, 0)]
    chunks = list(netlink._chunks(groups))
    assert [index for chunk in chunks for index in chunk] == list(range(len(groups)))
    sizes = [sum(len(groups[index]) for index in chunk) for chunk in chunks]
    assert sizes == [128, 1, 200, 3]


def test_an_extended_answer_goes_into_the_reason() -> None:
    text = b"Unknown device type\0"
    extended = struct.pack("=HH", 4 + len(text), 1) + text
    body = memoryview(struct.pack("=i", -95) + bytes(16) + extended)
    assert netlink._reason(95, 0x200, body) == "Operation not supported (Unknown device type)"
    assert netlink._reason(95, 0, body) == "Operation not supported"


def test_observing_needs_no_pyroute2() -> None:
    code = "import sys, netorch.system.links, netorch.system.facts; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("pyroute2", "asyncio", "ctypes", "subprocess"):
        assert f"'{name}'" not in done.stdout
