"""Links on the real kernel: every shape, every update, strangers, half-made ones."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from netorch.errors import KernelError, NetorchError
from netorch.planner import Update, diff
from netorch.resources import Bridge, Resource, Tap, Veth
from netorch.state import State
from netorch.system import removal, taps
from netorch.system.links import Links
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from tests.isolation import inside, ip, ip_json, make_host, require_tun
from tests.whole_labs import settle_carriers

MakeScope = Callable[..., Scope]
T = TypeVar("T", bound=Resource)

BRIDGE = Bridge(
    network="default",
    name="virbr0",
    mac="52:54:00:00:00:01",
    addresses=("192.168.122.1/24",),
    forwarding=True,
)
TAP = Tap(id="vm1:0", name="vm1-0", network="default", bridge="virbr0", mac="fe:54:00:00:00:02")
VETH = Veth(
    id="server:0",
    name="server-0",
    network="default",
    bridge="virbr0",
    host="server",
    device="eth0",
    mac="52:54:00:00:00:03",
    addresses=("192.168.122.9/24",),
    gateway="192.168.122.1",
)


def replace(resource: T, **fields: object) -> T:
    return msgspec.structs.replace(resource, **fields)


def create(adapter: Links, *wanted: Resource) -> None:
    done: list[Resource] = []
    adapter.create(wanted, done.append)
    assert done == list(wanted)


def assert_there(adapter: Links, *wanted: Resource) -> None:
    assert State(adapter.observe()) == State(wanted)


def update(adapter: Links, old: Resource, new: Resource) -> None:
    done: list[Resource] = []
    adapter.update([Update(old, new)], done.append)
    assert done == [new]


def delete(adapter: Links, *unwanted: Resource) -> None:
    done: list[Resource] = []
    adapter.delete(unwanted, done.append)
    assert done == list(unwanted)


def index_of(name: str) -> int:
    index: int = ip_json("link", "show", "dev", name)[0]["ifindex"]
    return index


def names() -> set[str]:
    return {link["ifname"] for link in ip_json("link")}


@pytest.mark.parametrize(
    "bridge",
    [
        BRIDGE,
        replace(BRIDGE, forwarding=False, addresses=()),
        replace(BRIDGE, mtu=9000, stp=True),
        replace(BRIDGE, mtu=576, up=False),
        replace(BRIDGE, addresses=("10.0.0.1/24", "10.0.1.1/31", "10.0.0.2/24")),
    ],
    ids=["default", "bare", "jumbo-stp", "small-down", "addresses"],
)
def test_a_bridge_is_observed_as_it_was_wanted(scope: MakeScope, bridge: Bridge) -> None:
    adapter = Links(scope())
    create(adapter, bridge)
    if len(bridge.addresses) == 3:  # the kernel lists the second addresses of networks last
        assert (
            ip_json("-4", "addr", "show", "virbr0")[0]["addr_info"][0]["broadcast"] == "10.0.0.255"
        )
    assert_there(adapter, bridge)
    delete(adapter, bridge)
    assert names() == {"lo"}


def test_a_bridge_has_marks_no_ipv6_and_no_delay(scope: MakeScope) -> None:
    adapter = Links(chosen := scope("my.lab"))
    create(adapter, BRIDGE)
    [shown] = ip_json("addr", "show", "virbr0")
    assert shown["ifalias"] == "netorch:my.lab:bridge:default"
    assert int(shown["group"]) == chosen.group + 1
    assert [a["local"] for a in shown["addr_info"]] == ["192.168.122.1"]
    assert shown["linkinfo"]["info_data"]["forward_delay"] == 0
    assert shown["linkinfo"]["info_data"]["stp_state"] == 0
    with open("/proc/sys/net/ipv4/conf/virbr0/forwarding") as forwarding:
        assert forwarding.read() == "1\n"
    with open("/proc/sys/net/ipv4/ip_forward") as forwarding:
        assert forwarding.read() == "0\n"


def test_a_bridge_keeps_its_mac_and_mtu_whatever_its_ports_have(scope: MakeScope) -> None:
    adapter = Links(scope())
    create(adapter, BRIDGE)
    ip("link", "add", "p0", "address", "02:00:00:00:00:01", "mtu", "1200", "type", "veth")
    ip("link", "set", "p0", "master", "virbr0")
    assert_there(adapter, BRIDGE)


@pytest.mark.parametrize(
    "fields",
    [
        {"mac": "52:54:00:00:00:ff"},
        {"mtu": 1400},
        {"addresses": ("10.0.0.1/24",)},
        {"addresses": ("192.168.122.1/24", "10.0.0.1/24")},
        {"addresses": ()},
        {"forwarding": False},
        {"stp": True},
        {"up": False},
    ],
    ids=str,
)
def test_a_bridge_is_updated_in_place_and_back(scope: MakeScope, fields: dict[str, object]) -> None:
    adapter = Links(scope())
    new = replace(BRIDGE, **fields)
    create(adapter, BRIDGE)
    index = index_of("virbr0")
    for old, wanted in ((BRIDGE, new), (new, BRIDGE)):
        update(adapter, old, wanted)
        assert_there(adapter, wanted)
    assert index_of("virbr0") == index


@pytest.mark.parametrize("multi_queue", [False, True])
@pytest.mark.parametrize("vnet_hdr", [False, True])
@pytest.mark.parametrize("owner", [0, 1000])
def test_a_tap_is_observed_as_it_was_wanted(
    scope: MakeScope, multi_queue: bool, vnet_hdr: bool, owner: int
) -> None:
    require_tun()
    if owner and Path("/proc/self/uid_map").read_text().split()[2] == "1":
        with pytest.raises(KernelError, match="Invalid argument") as raised:
            Links(scope()).create([replace(TAP, owner=owner, bridge="")], lambda _: None)
        assert "uid 1000" in raised.value.hint  # a private place has one uid
        return
    adapter = Links(chosen := scope())
    tap = replace(TAP, multi_queue=multi_queue, vnet_hdr=vnet_hdr, owner=owner)
    create(adapter, BRIDGE)
    create(adapter, tap)
    assert_there(adapter, BRIDGE, tap)
    [shown] = ip_json("addr", "show", "vm1-0")
    assert shown["ifalias"] == "netorch:t:tap:vm1:0"
    assert int(shown["group"]) == chosen.group
    assert shown["addr_info"] == []


@pytest.mark.parametrize(
    "fields",
    [{"mac": "fe:54:00:00:00:ff"}, {"mtu": 1400}, {"bridge": "", "network": ""}, {"up": False}],
    ids=str,
)
def test_a_tap_is_updated_in_place_while_its_queue_is_open(
    scope: MakeScope, fields: dict[str, object]
) -> None:
    require_tun()
    adapter = Links(scope())
    new = replace(TAP, **fields)
    create(adapter, BRIDGE)
    create(adapter, TAP)
    index = index_of("vm1-0")
    queue = open_queue(TAP)
    for old, wanted in ((TAP, new), (new, TAP)):
        update(adapter, old, wanted)
        assert_there(adapter, BRIDGE, wanted)
    assert index_of("vm1-0") == index
    assert ip_json("-6", "addr", "show", "vm1-0") == []
    os.close(queue)


def test_a_tap_moves_between_bridges(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(scope())
    other = Bridge(network="lan", name="br0", mac="52:54:00:00:00:09")
    create(adapter, BRIDGE, other)
    create(adapter, TAP)
    moved = replace(TAP, network="lan", bridge="br0")
    update(adapter, TAP, moved)
    assert_there(adapter, BRIDGE, other, moved)


def test_a_tap_survives_its_bridge(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(scope())
    create(adapter, BRIDGE)
    create(adapter, TAP)
    delete(adapter, BRIDGE)
    assert_there(adapter, replace(TAP, bridge="", network=""))
    create(adapter, BRIDGE)
    update(adapter, replace(TAP, bridge=""), TAP)
    assert_there(adapter, BRIDGE, TAP)


def test_a_tap_is_deleted_under_an_open_queue(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(scope())
    create(adapter, BRIDGE)
    create(adapter, TAP)
    queue = open_queue(TAP)
    delete(adapter, TAP)
    assert_there(adapter, BRIDGE)
    with pytest.raises(OSError, match="File descriptor in bad state"):
        os.read(queue, 1)
    os.close(queue)


def open_queue(tap: Tap) -> int:
    import fcntl
    import struct

    fd = os.open(taps.DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", tap.name.encode(), taps.flags(tap)))
    return fd


@pytest.mark.parametrize("private", [False, True])
def test_a_veth_is_observed_from_both_ends(scope: MakeScope, private: bool) -> None:
    adapter = Links(chosen := scope(private=private))
    make_host(chosen, "server")
    create(adapter, BRIDGE)
    create(adapter, VETH)
    assert_there(adapter, BRIDGE, VETH)
    with inside(chosen, "server"):
        [shown] = ip_json("addr", "show", "eth0")
        assert shown["ifalias"] == "netorch:t:veth:server:0"
        [route] = ip_json("route", "show", "default")
        assert (route["gateway"], route["dev"]) == ("192.168.122.1", "eth0")
        ip("-4", "route", "get", "192.168.122.1")
    delete(adapter, VETH)
    assert_there(adapter, BRIDGE)
    with inside(chosen, "server"):
        assert names() == {"lo"}


def test_packets_pass_between_hosts(scope: MakeScope) -> None:
    import subprocess

    adapter = Links(chosen := scope())
    other = replace(
        VETH,
        id="b:0",
        name="b-0",
        host="b",
        mac="52:54:00:00:00:04",
        addresses=("192.168.122.8/24",),
    )
    make_host(chosen, "server")
    make_host(chosen, "b")
    create(adapter, BRIDGE)
    create(adapter, VETH, other)
    with inside(chosen, "b"):
        for target in ("192.168.122.9", "192.168.122.1"):
            subprocess.run(["busybox", "ping", "-c1", "-W30", target], check=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"mac": "52:54:00:00:00:ff"},
        {"mtu": 1400},
        {"addresses": ("192.168.122.7/24",)},
        {"addresses": ("192.168.122.9/24", "10.0.0.1/8")},
        {"addresses": (), "gateway": ""},
        {"gateway": ""},
        {"gateway": "192.168.122.2"},
        {"up": False, "gateway": ""},
        {"bridge": "", "network": ""},
    ],
    ids=str,
)
def test_a_veth_is_updated_in_place_and_back(scope: MakeScope, fields: dict[str, object]) -> None:
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    new = replace(VETH, **fields)
    create(adapter, BRIDGE)
    create(adapter, VETH)
    index = index_of("server-0")
    for old, wanted in ((VETH, new), (new, VETH)):
        update(adapter, old, wanted)
        assert_there(adapter, BRIDGE, wanted)
    assert index_of("server-0") == index


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("link set eth0 down", "up"),
        ("route del default", "gateway"),
        ("addr del 192.168.122.9/24 dev eth0", "addresses"),
        ("link set eth0 mtu 1300", "mtu"),
    ],
)
def test_what_changed_in_a_host_is_seen_and_mended(
    scope: MakeScope, command: str, field: str
) -> None:
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    create(adapter, BRIDGE)
    create(adapter, VETH)
    with inside(chosen, "server"):
        ip(*command.split())
    observed = State(adapter.observe()).get(VETH.key)
    assert observed is not None
    assert getattr(observed, field) != getattr(VETH, field)
    update(adapter, observed, VETH)
    assert_there(adapter, BRIDGE, VETH)


def test_a_leased_address_is_not_a_veths_own(scope: MakeScope) -> None:
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    dynamic = replace(VETH, addresses=(), gateway="")
    create(adapter, BRIDGE)
    create(adapter, dynamic)
    with inside(chosen, "server"):
        ip(
            "addr",
            "add",
            "192.168.122.77/24",
            "dev",
            "eth0",
            "valid_lft",
            "600",
            "preferred_lft",
            "600",
        )
        ip("route", "add", "default", "via", "192.168.122.1", "proto", "dhcp")
    assert_there(adapter, BRIDGE, dynamic)


def test_a_veth_goes_with_its_host_and_comes_again(scope: MakeScope) -> None:
    from netorch.system import namespaces

    adapter = Links(chosen := scope())
    path = make_host(chosen, "server")
    create(adapter, BRIDGE)
    create(adapter, VETH)
    namespaces.unmount(path, namespaces.MNT_DETACH)  # the mount point stays, as after a crash
    observed = State(adapter.observe()).get(VETH.key)
    assert observed is None or isinstance(observed, Veth)
    assert observed is None or observed.device == ""
    make_host(chosen, "server")
    create(adapter, VETH)
    assert_there(adapter, BRIDGE, VETH)


def test_everything_may_be_done_twice(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    wanted = (BRIDGE, TAP, VETH)
    create(adapter, *wanted)
    monitor = Watch()
    create(adapter, *wanted)
    for resource in wanted:
        update(adapter, resource, resource)
    assert monitor.events() == []
    assert_there(adapter, *wanted)
    delete(adapter, *reversed(wanted))
    delete(adapter, *reversed(wanted))
    assert_there(adapter)
    assert names() == {"lo"}


class Watch:
    """Hears the kernel's notices of links, addresses and routes from now on."""

    def __init__(self) -> None:
        import socket

        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0x1 | 0x10 | 0x40 | 0x100 | 0x400))
        self._socket.setblocking(False)
        settle_carriers()
        self.events()

    def events(self) -> list[int]:
        """Their message types."""
        seen: list[int] = []
        while True:
            try:
                seen.append(int.from_bytes(self._socket.recv(65536)[4:6], sys.byteorder))
            except BlockingIOError:
                return seen


def test_only_what_differs_is_touched(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(scope())
    create(adapter, BRIDGE)
    create(adapter, TAP)
    monitor = Watch()
    update(adapter, BRIDGE, replace(BRIDGE, addresses=(*BRIDGE.addresses, "10.0.0.1/24")))
    assert set(monitor.events()) == {20, 24}  # RTM_NEWADDR and its RTM_NEWROUTEs; no link


def test_a_foreign_link_is_refused_not_adopted(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    ip("link", "add", "virbr0", "type", "bridge")
    ip("tuntap", "add", "mode", "tap", "name", "vm1-0")
    ip("link", "add", "server-0", "type", "veth", "peer", "name", "far")
    before = ip_json("link")
    tap = replace(TAP, bridge="", network="")
    wanted: Bridge | Tap | Veth
    for wanted in (BRIDGE, tap, replace(VETH, bridge="")):
        done: list[Resource] = []
        with pytest.raises(KernelError, match=rf"failed to create \w+ {wanted.name}: .*") as raised:
            adapter.create([wanted], done.append)
        assert raised.value.errno in (errno.EEXIST, errno.EBUSY)
        assert raised.value.hint
        assert done == []
    assert ip_json("link") == before
    other = replace(TAP, id="vm2:0", name="vm2-0")
    with pytest.raises(KernelError, match="vm2-0: virbr0 is not the lab's own bridge"):
        adapter.create([other], done.append)
    delete(adapter, BRIDGE, tap, VETH)
    assert ip_json("link") == before
    reasons = adapter.check([BRIDGE, tap, VETH])
    assert len(reasons) == 3
    assert "virbr0 is taken by a bridge that looks like libvirt's" in reasons[0]
    assert "vm1-0 is taken by a tap that is not netorch's" in reasons[1]


def test_two_labs_leave_each_other_alone(scope: MakeScope) -> None:
    require_tun()
    one, two = Links(scope("one")), Links(scope("two"))
    other = replace(BRIDGE, name="virbr1", addresses=("10.0.0.1/24",))
    create(one, BRIDGE, TAP)
    create(two, other)
    assert_there(one, BRIDGE, TAP)
    assert_there(two, other)
    [reason] = two.check([replace(BRIDGE, addresses=())])
    assert reason == "the name virbr0 is taken by a bridge of the netorch lab one"
    delete(one, TAP, BRIDGE)
    assert_there(two, other)


def test_what_cannot_be_finished_is_taken_back(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    good = replace(BRIDGE, network="good", name="good0", addresses=("10.0.0.1/24",))
    bad = replace(BRIDGE, mtu=70000)
    done: list[Resource] = []
    with pytest.raises(KernelError, match="failed to create bridge virbr0: "):
        adapter.create([bad, good], done.append)
    assert done == [good]
    assert_there(adapter, good)
    on_good = {"network": "good", "bridge": "good0"}
    with pytest.raises(KernelError, match="failed to create tap vm1-0: "):
        adapter.create([replace(TAP, mtu=70000, **on_good)], done.append)
    with pytest.raises(KernelError, match=r"failed to create veth server-0: .*unreachable"):
        adapter.create([replace(VETH, gateway="172.16.0.1", **on_good)], done.append)
    with pytest.raises(KernelError, match="failed to create tap vm1-0: there is no bridge virbr0"):
        adapter.create([TAP], done.append)
    with pytest.raises(
        KernelError, match="failed to create veth server-0: host nobody: No such file"
    ):
        adapter.create([replace(VETH, host="nobody", **on_good)], done.append)
    with pytest.raises(KernelError, match="failed to update tap vm1-0: it is gone"):
        adapter.update([Update(TAP, TAP)], done.append)
    assert_there(adapter, good)


def test_half_made_links_converge(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    for command in (
        "link add virbr0 mtu 1499 type bridge stp_state 1",
        "link set virbr0 alias netorch:t:bridge:default",
        "tuntap add mode tap name vm1-0 multi_queue",  # of another shape: made again
        "link set vm1-0 alias netorch:t:tap:vm1:0",
        "link add server-0 type veth peer name eth0 netns",
    ):
        if command.endswith("netns"):
            ip("link", "add", "server-0", "type", "veth", "peer", "name", "eth0")
            continue
        ip(*command.split())
    ip("link", "set", "server-0", "alias", "netorch:t:veth:server:0")
    assert len(adapter.observe()) == 3
    create(adapter, BRIDGE, TAP, VETH)
    assert_there(adapter, BRIDGE, TAP, VETH)


def test_a_killed_run_leaves_only_what_is_marked(scope: MakeScope) -> None:
    """SIGKILL at any moment: what is left carries the mark, converges, and can be taken away."""
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    many = [replace(TAP, id=f"vm{i}:0", name=f"vm{i}-0") for i in range(150)]
    wanted = [BRIDGE, VETH, *many]
    for moment in range(12):
        child = os.fork()
        if child == 0:
            try:
                adapter.create(wanted, lambda _resource: None)
            finally:  # this child must not go on with the test
                os._exit(0)
        watch_until(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shown = [link for link in ip_json("link") if link["ifname"] != "lo"]
        unmarked = [s["ifname"] for s in shown if not s.get("ifalias", "").startswith("netorch:t:")]
        assert unmarked == []
        if moment % 2:
            create(adapter, *wanted)
            assert_there(adapter, *wanted)
        delete(adapter, *adapter.observe())
        assert names() == {"lo"}


def watch_until(moment: int) -> None:
    """Wait for `moment` x 40 of the kernel's notices of links."""
    import socket

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as watching:
        watching.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        watching.bind((0, 0x1))
        watching.settimeout(0.2)
        try:
            for _ in range(moment * 40):
                watching.recv(65536)
        except (TimeoutError, OSError):
            return


@pytest.mark.parametrize(
    ("setup", "address", "expected"),
    [
        ("addr add 192.168.122.7/30 dev up0", "192.168.122.1/24", "192.168.122.7/30 of up0"),
        ("route add 192.168.0.0/16 dev up0", "192.168.122.1/24", "route 192.168.0.0/16 of up0"),
        (
            "route add blackhole 192.168.122.0/25",
            "192.168.122.1/24",
            "a route without an interface",
        ),
        ("route add default dev up0", "192.168.122.1/24", ""),
        ("route add 128.0.0.0/1 dev up0", "192.168.122.1/24", ""),
        ("addr add 192.168.123.1/24 dev up0", "192.168.122.1/24", ""),
        ("addr add 10.0.0.1 peer 192.168.122.5 dev up0", "192.168.122.1/24", "10.0.0.1/32 of up0"),
        (
            "addr add 192.168.122.5 peer 10.0.0.1 dev up0",
            "192.168.122.1/24",
            "192.168.122.5/32 of up0",
        ),
        ("link set up0 up", "127.1.0.1/24", "127.0.0.1/8 of lo"),
    ],
)
def test_overlapping_ranges_are_refused_with_their_owner(
    scope: MakeScope, setup: str, address: str, expected: str
) -> None:
    ip("link", "add", "up0", "type", "bridge")
    ip("link", "set", "up0", "up")
    ip(*setup.split())
    reasons = Links(scope()).check([replace(BRIDGE, addresses=(address,))])
    assert [expected in reason for reason in reasons] == [True] * bool(expected)


def test_the_labs_own_ranges_do_not_clash_with_itself(scope: MakeScope) -> None:
    adapter = Links(scope())
    create(adapter, BRIDGE)
    assert adapter.check([replace(BRIDGE, name="virbr9")]) == []


def test_too_many_ports_are_counted_before_anything_is_made(scope: MakeScope) -> None:
    require_tun()
    many = [replace(TAP, id=f"vm{i}:0", name=f"vm{i}") for i in range(1024)]
    assert Links(scope()).check([BRIDGE, *many[:1023]]) == []
    [reason] = Links(scope()).check([BRIDGE, *many])
    assert reason == "bridge virbr0 would have 1,024 ports; the kernel allows 1,023"


def test_a_tun_device_that_cannot_be_opened_is_explained(
    scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "DEVICE", "/dev/net/missing")
    [reason] = Links(scope()).check([TAP])
    assert "No such file" in reason
    assert "--device" in reason
    with pytest.raises(NetorchError, match="failed to create tap vm1-0: No such file"):
        Links(scope()).create([replace(TAP, bridge="")], lambda _: None)


def test_a_kernel_without_the_driver_is_explained(
    scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = KernelError("Operation not supported (Unknown device type)", errno.EOPNOTSUPP)

    def refuse(self: Netlink, groups: Sequence[object]) -> list[KernelError | None]:
        return [refused for _ in groups]

    monkeypatch.setattr(removal, "take_back", lambda *_: None)
    monkeypatch.setattr(Netlink, "send", refuse)
    with pytest.raises(NetorchError, match="Unknown device type") as raised:
        Links(scope()).create([BRIDGE], lambda _: None)
    assert "modprobe bridge" in raised.value.hint


def test_some_of_a_group_are_deleted_and_the_others_stay(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(scope())
    many = [replace(TAP, id=f"vm{i}:0", name=f"vm{i}-0") for i in range(20)]
    create(adapter, BRIDGE, *many)
    delete(adapter, *many[:10])
    assert_there(adapter, BRIDGE, *many[10:])
    delete(adapter, BRIDGE, *many[10:])
    assert names() == {"lo"}


def test_a_stranger_in_the_labs_group_survives(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    create(adapter, BRIDGE, TAP)
    ip("link", "add", "foreign0", "group", str(chosen.group), "type", "bridge")
    ip("link", "add", "foreign1", "group", str(chosen.group + 1), "type", "bridge")
    delete(adapter, TAP, BRIDGE)
    assert names() == {"lo", "foreign0", "foreign1"}


def test_a_thousand_taps_cost_ten_times_a_hundred(scope: MakeScope) -> None:
    """Linear in the number of links; the bound is wide, since other tests may share the CPUs."""
    require_tun()
    from time import process_time

    adapter = Links(scope())
    spent = {}
    for count in (1, 8):
        bridges = [
            replace(BRIDGE, network=f"n{b}", name=f"br{b}", addresses=()) for b in range(count)
        ]
        many = [
            replace(TAP, id=f"v{b}-{t}:0", name=f"t{b}-{t}", network=f"n{b}", bridge=f"br{b}")
            for b in range(count)
            for t in range(100)
        ]
        create(adapter, *bridges)
        started = process_time()
        create(adapter, *many)
        spent[count] = process_time() - started
        assert_there(adapter, *bridges, *many)
        delete(adapter, *many)
        delete(adapter, *bridges)
    assert spent[8] < spent[1] * 8 * 3


def test_a_plan_of_nothing_follows(scope: MakeScope) -> None:
    require_tun()
    adapter = Links(chosen := scope())
    make_host(chosen, "server")
    desired = State([BRIDGE, TAP, VETH])
    create(adapter, *desired)
    assert not diff(desired, State(adapter.observe()))
