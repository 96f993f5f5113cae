"""A bridge takes the place of an interface at layer 3, and gives it back, whoever is killed."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netorch import engine
from netorch.engine import Progress
from netorch.errors import ApplyError, ConflictError, KernelError, NetorchError
from netorch.planner import Action
from netorch.resources import Bridge, BridgeUplink, Record
from netorch.state import State
from netorch.system import System, layer3, rundir, uplink_checks
from netorch.system.bridge_uplinks import BridgeUplinks
from netorch.system.links import Links
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import Link
from tests.kernel.cables import sh
from tests.kernel.uplinks import PLAIN, RICH, RICH6, has_ipv6, standing, talking, uplink

MakeScope = Callable[..., Scope]
UPLINK = BridgeUplink(network="lan", name="eth1", bridge="br0")
RECORD = Record(text="{}", source="lab.toml")


def desired(*addresses: str, mtu: int = 1500) -> State:
    bridge = Bridge(
        network="lan",
        name="br0",
        mac=sh("ip -br link show dev eth1").split()[2],
        mtu=mtu,
        addresses=addresses,
        uplink="eth1",
    )
    return State([RECORD, bridge, UPLINK])


def system(scope: Scope) -> System:
    return System(scope, [rundir.Records(scope), Links(scope), BridgeUplinks(scope)])


def apply(scope: Scope, wanted: State, progress: Progress | None = None) -> None:
    engine.apply(system(scope), wanted, progress or Progress())
    assert not engine.apply(system(scope), wanted, Progress())


def teardown(scope: Scope) -> None:
    assert engine.teardown(system(scope), Progress()) == []


def configuration() -> str:
    return RICH + (RICH6 if has_ipv6() else "")


def moved(before: dict[str, list[str]], names: tuple[str, str] = ("eth1", "br0")) -> list[str]:
    """The routes as they are to be with the bridge in the interface's place."""
    old, new = names
    kept = [line for line in before["routes"] if "fe80::/64" not in line]
    return sorted(line.replace(f"dev {old} ", f"dev {new} ") for line in kept)


def routes() -> list[str]:
    return [line for line in standing()["routes"] if "fe80::/64" not in line]


def test_everything_moves_and_comes_back_exactly(scope: MakeScope) -> None:
    uplink(configuration(), detection=True)
    before = standing()
    lab = scope()
    apply(lab, desired())
    if has_ipv6():
        assert "tentative" not in sh("ip -6 addr show dev br0 scope global")
    assert routes() == moved(before)
    addresses = standing("br0")["addresses"]
    assert [a for a in addresses if "fe80:" not in a] == [
        a for a in before["addresses"] if "fe80:" not in a
    ]
    assert not [a for a in standing()["addresses"] if "fe80:" not in a]
    teardown(lab)
    assert standing() == before


def test_the_mtu_the_mac_and_the_alias(scope: MakeScope) -> None:
    uplink(PLAIN, mtu=1400)
    before = standing()
    lab = scope()
    apply(lab, desired(mtu=1400))
    there = sh("ip -d link show dev br0")
    assert "mtu 1400" in there
    assert sh("ip -br link show dev eth1").split()[2] in there
    assert "alias of the admin" in sh("ip link show dev eth1")
    teardown(lab)
    assert standing() == before


@pytest.mark.parametrize("own", ["10.0.0.1/24", "192.168.7.1/24"])
def test_an_address_of_the_file_is_an_additional_one(own: str, scope: MakeScope) -> None:
    uplink(RICH)
    before = standing()
    lab = scope()
    apply(lab, desired(own))
    assert "10.0.0.5" in sh("ip route get 10.0.0.254")
    there = sh("ip -4 addr show dev br0")
    assert there.index("10.0.0.5/24") < there.index(own)
    changed = desired("10.0.0.2/24")
    apply(lab, changed)
    assert own not in sh("ip -4 addr show dev br0")
    apply(lab, State([RECORD, Bridge(network="lan", name="br0", mac="52:54:00:00:00:01")]))
    assert standing() == before
    teardown(lab)


def test_a_connection_survives_the_move_and_the_way_back(scope: MakeScope) -> None:
    far = uplink()
    lab = scope()
    with talking(far) as talk:
        talk.goes_on()
        apply(lab, desired())
        talk.goes_on()
        teardown(lab)
        talk.goes_on()


def test_an_interface_that_is_down_goes_down_again(scope: MakeScope) -> None:
    uplink("ip link set eth1 down; ip addr add 10.0.0.5/24 dev eth1")
    before = standing()
    lab = scope()
    apply(lab, desired())
    assert "UP" in sh("ip -br link show dev eth1").split()[3]
    teardown(lab)
    assert standing() == before


def test_what_changed_meanwhile_comes_back_as_it_is_then(scope: MakeScope) -> None:
    uplink()
    lab = scope()
    apply(lab, desired())
    sh("ip addr add 10.0.0.77/24 dev br0 label lease valid_lft 900 preferred_lft 900")
    sh("ip route del default; ip route add default via 10.0.0.253")
    teardown(lab)
    assert "10.0.0.77/24" in sh("ip addr show dev eth1")
    assert "default via 10.0.0.253 dev eth1" in sh("ip route")


def test_the_position_among_equal_routes_stays(scope: MakeScope) -> None:
    first = "ip route append default via 10.0.0.254 dev eth1"
    second = "ip route append default via 10.55.0.9 dev other"
    uplink(f"ip addr add 10.0.0.5/24 dev eth1; {first}; {second}")
    before = sh("ip route show default")
    lab = scope()
    apply(lab, desired())
    assert sh("ip route show default") == before.replace("eth1", "br0")
    teardown(lab)
    assert sh("ip route show default") == before


# Killed


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a forked child; the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(NetorchError):
            work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_before_call(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in place of the n-th call that changes something by netlink, from 1."""
    left = [number]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(self: Netlink, messages: list[object]) -> object:
            left[0] -= bool(messages)
            if messages and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, messages)

        return call

    for name in ("send", "send_whole"):
        monkeypatch.setattr(Netlink, name, counted(getattr(Netlink, name)))


def each_kill(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Do the work killed before its first, second, ... call, until it gets through."""
    for number in range(1, 100):

        def killed(number: int = number) -> None:
            killed_before_call(number, monkeypatch)
            work()

        if in_a_child(killed) == 0:
            return
        yield number
    raise AssertionError("no end")


@pytest.mark.parametrize("lost", [False, True], ids=["", "run directory lost"])
@pytest.mark.parametrize("after", ["teardown", "apply"])
def test_killed_at_any_call_of_an_apply(
    after: str, lost: bool, scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink(configuration())
    before = standing()
    lab = scope()
    wanted = desired("10.0.0.1/24")
    kills = 0
    for kills in each_kill(lambda: apply(lab, wanted), monkeypatch):
        if lost:
            shutil.rmtree(lab.run)
            lab.run.mkdir()
        if after == "apply":
            apply(lab, wanted)
            assert routes() != before["routes"]
        teardown(lab)
        assert standing() == before, f"killed before call {kills}"
    assert kills == 2  # the bridge, and the move
    teardown(lab)
    assert standing() == before


@pytest.mark.parametrize("lost", [False, True], ids=["", "run directory lost"])
def test_killed_at_any_call_of_a_teardown(
    lost: bool, scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink(configuration())
    before = standing()
    lab = scope()
    wanted = desired("10.0.0.1/24")
    apply(lab, wanted)
    for number in each_kill(lambda: teardown(lab), monkeypatch):
        if lost:
            shutil.rmtree(lab.run)
            lab.run.mkdir()
        teardown(lab)
        assert standing() == before, f"killed before call {number}"
        apply(lab, wanted)
    assert standing() == before


@pytest.mark.parametrize("when", ["planned", "done"])
def test_killed_by_the_progress(when: str, scope: MakeScope) -> None:
    uplink(configuration())
    before = standing()
    lab = scope()
    wanted = desired()

    class Killing(Progress):
        def planned(self, plan: object) -> None:
            if when == "planned":
                os.kill(os.getpid(), signal.SIGKILL)

        def done(self, action: Action) -> None:
            if action.key == "uplink:lan":
                os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lambda: apply(lab, wanted, Killing())) == signal.SIGKILL
    teardown(lab)
    assert standing() == before


# Failed


def test_a_failure_after_the_move_rolls_back(scope: MakeScope) -> None:
    uplink(configuration())
    before = standing()
    lab = scope()

    class Failing(Progress):
        def done(self, action: Action) -> None:
            if action.key == "uplink:lan":
                raise KernelError("failed on purpose", errno.EIO)

    with pytest.raises(ApplyError, match="on purpose") as caught:
        engine.apply(system(lab), desired("10.0.0.1/24"), Failing())
    assert not caught.value.left
    assert standing() == before
    assert list(system(lab).observe()) == []


def refuse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is made to refuse the last of the routes, by an interface that is not there."""
    real = layer3.Holding.given

    def given(self: layer3.Holding, index: int) -> Iterator[bytearray]:
        messages = list(real(self, index))
        if not index:  # to know how long they are
            yield from messages
            return
        monkeypatch.setattr(layer3.Holding, "given", real)
        yield from messages[:-1]
        nowhere = bytes(messages[-1]).replace(index.to_bytes(4, sys.byteorder), b"\x7f\xff\xff\x7f")
        yield bytearray(nowhere)

    monkeypatch.setattr(layer3.Holding, "given", given)


def test_a_route_that_the_kernel_refuses_undoes_the_move(
    scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink(PLAIN)
    before = standing()
    lab = scope()
    refuse_one(monkeypatch)
    with pytest.raises(ApplyError, match="failed to take eth1 into br0: route default"):
        engine.apply(system(lab), desired(), Progress())
    assert standing() == before


def test_killed_after_a_refusal_the_record_has_what_is_missing(
    scope: MakeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink(PLAIN)
    before = standing()
    lab = scope()
    wanted = desired()

    def work() -> None:
        refuse_one(monkeypatch)
        monkeypatch.setattr(
            BridgeUplinks, "_put_back", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
        apply(lab, wanted)

    assert in_a_child(work) == signal.SIGKILL
    assert "default" not in sh("ip route")
    teardown(lab)
    assert standing() == before


@pytest.mark.parametrize("then", ["teardown", "apply"])
def test_a_bridge_that_somebody_deletes(then: str, scope: MakeScope) -> None:
    uplink(configuration())
    before = standing()
    lab = scope()
    apply(lab, desired())
    sh("ip link del br0")
    assert BridgeUplink(network="lan", name="eth1", bridge="br0", joined=False) in list(
        system(lab).observe()
    )
    if then == "apply":
        apply(lab, desired())
        assert routes() == moved(before)
    teardown(lab)
    assert standing() == before


def test_a_port_that_somebody_takes_out(scope: MakeScope) -> None:
    uplink()
    before = standing()
    lab = scope()
    apply(lab, desired())
    sh("ip link set eth1 nomaster")
    (found,) = system(lab).observe().of(BridgeUplink)
    assert not found.joined
    apply(lab, desired())
    assert "master br0" in sh("ip link show dev eth1")
    sh("ip link set eth1 nomaster")
    teardown(lab)
    assert standing() == before


def test_an_interface_that_is_unplugged(scope: MakeScope) -> None:
    uplink()
    lab = scope()
    apply(lab, desired())
    sh("ip link del eth1")
    teardown(lab)
    assert list(system(lab).observe()) == []


# Refused before the first change


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("ip link del eth1", "there is no such interface"),
        ("ip link add x type bridge; ip link set eth1 master x", "a port of the bridge x already"),
        ("ip link del eth1; ip link add eth1 type bridge", "it is a bridge itself"),
        ("ip link set eth1 alias netorch:other:tap:x", "belongs to the netorch lab other"),
        (
            "ip nexthop add id 7 via 10.0.0.254 dev eth1; ip route add 192.0.2.0/24 nhid 7",
            "nexthop objects",
        ),
    ],
)
def test_unfit_interfaces_are_named(setup: str, reason: str, scope: MakeScope) -> None:
    uplink()
    wanted = desired()
    sh(setup)
    with pytest.raises(ConflictError, match=reason):
        engine.apply(system(scope()), wanted, Progress())
    assert "br0" not in sh("ip link")


def test_thousands_of_routes_are_too_many(scope: MakeScope, tmp_path: Path) -> None:
    uplink()
    many = tmp_path / "routes"
    prefixes = [f"172.{16 + i // 256}.{i % 256}.0/24" for i in range(3000)]
    many.write_text("".join(f"route add {prefix} via 10.0.0.254\n" for prefix in prefixes))
    sh(f"ip -batch {many}")
    with pytest.raises(ConflictError, match="too many"):
        engine.apply(system(scope()), desired(), Progress())
    many.write_text("".join(f"route del {prefix}\n" for prefix in prefixes[1000:]))
    sh(f"ip -batch {many}")
    before = standing()
    lab = scope()
    apply(lab, desired())
    teardown(lab)
    assert standing() == before


def test_an_address_of_the_file_that_moves_anyway(scope: MakeScope) -> None:
    uplink()
    with pytest.raises(ConflictError, match=r"overlaps with 10\.0\.0\.5/24 of eth1"):
        engine.apply(system(scope()), desired("10.0.0.5/24"), Progress())


def test_a_private_place_says_why(scope: MakeScope) -> None:
    lab = scope(private=True)
    (reason,) = BridgeUplinks(lab).check([UPLINK])
    assert "without root" in reason
    assert 'mode = "nat"' in reason


def test_wireless_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judgement alone: there is no wireless interface here, and this sysfs is a fake."""
    monkeypatch.setattr(uplink_checks, "SYSFS", tmp_path)
    for mark in ("wireless", "phy80211"):
        (tmp_path / mark / mark).mkdir(parents=True)
        assert uplink_checks.is_wireless(mark)
    assert not uplink_checks.is_wireless("eth1")
    wifi = Link(index=3, name="wlan0", mac="52:54:00:00:00:01")
    assert "wireless" in uplink_checks.unfit(wifi, None, 0, True)
    assert 'mode = "nat"' in uplink_checks.unfit(wifi, None, 0, True)


def test_a_dhcp_client_is_named() -> None:
    uplink()
    words = ["dhclient", "-c", "print(flush=True); input()", "eth1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, executable=sys.executable, stdin=pipe, stdout=pipe) as client:
        assert client.stdout is not None
        client.stdout.readline()
        (line,) = uplink_checks.managers("eth1")
        assert line.startswith(f"dhclient (pid {client.pid}) keeps eth1's lease")
        client.communicate(b"\n")
