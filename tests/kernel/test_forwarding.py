"""Forwarding on interfaces that aren't ours: claimed, set and put back, whoever is killed."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.errors import NetorchError
from netorch.resources import Forwarding, Resource
from netorch.system import forwarding
from netorch.system.firewall import Firewall
from netorch.system.scope import Scope
from tests.kernel.cables import sh

WANTED = Forwarding(name="eth0")


def firewall(lab: str) -> Firewall:
    nowhere = Path("/nonexistent")
    return Firewall(Scope(lab=lab, place=0, run=nowhere, disks=nowhere))


def ignore(_: Resource) -> None:
    pass


def uplink(on: bool = False) -> None:
    sh("echo 0 > /proc/sys/net/ipv4/ip_forward; ip link add eth0 type bridge")
    turn(on)


def turn(on: bool) -> None:
    Path("/proc/sys/net/ipv4/conf/eth0/forwarding").write_text(str(int(on)))


def flag() -> bool:
    return Path("/proc/sys/net/ipv4/conf/eth0/forwarding").read_text() == "1\n"


def killed_at(function: str, work: Callable[[], None]) -> None:
    """Do the work in a child that SIGKILLs itself where it would call a function of the module."""
    child = os.fork()
    if child == 0:
        setattr(forwarding, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("before", [False, True])
def test_the_flag_goes_on_and_back(before: bool) -> None:
    uplink(before)
    lab = firewall("a")
    done: list[Resource] = []
    for _ in range(2):
        lab.create([WANTED], done.append)
        assert flag()
        assert list(lab.observe()) == [WANTED]
    for _ in range(2):
        lab.delete([WANTED], done.append)
        assert flag() == before
        assert list(lab.observe()) == []
    assert done == [WANTED] * 4
    assert sh("nft list ruleset") == ""


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("first", ["a", "b"])
def test_the_last_of_two_labs_puts_it_back(before: bool, first: str) -> None:
    uplink(before)
    labs = {"a": firewall("a"), "b": firewall("b")}
    for lab in labs.values():
        lab.create([WANTED], ignore)
    labs.pop(first).delete([WANTED], ignore)
    assert flag()
    [last] = labs.values()
    assert list(last.observe()) == [WANTED]
    last.delete([WANTED], ignore)
    assert flag() == before
    assert sh("nft list ruleset") == ""


def test_killed_between_claim_and_flag() -> None:
    uplink()
    lab = firewall("a")
    killed_at("_set_forwarding", lambda: firewall("a").create([WANTED], ignore))
    assert not flag()
    assert list(lab.observe()) == [Forwarding(name="eth0", on=False)]
    lab.create([WANTED], ignore)
    assert flag()
    lab.delete([WANTED], ignore)
    assert not flag()


def test_killed_between_flag_and_claim_on_the_way_back() -> None:
    uplink()
    lab = firewall("a")
    lab.create([WANTED], ignore)
    killed_at("_set_forwarding", lambda: firewall("a").delete([WANTED], ignore))
    assert list(lab.observe()) == [WANTED]
    turn(False)  # the flag was restored, and then it was killed
    assert list(lab.observe()) == [Forwarding(name="eth0", on=False)]
    lab.delete([WANTED], ignore)
    assert not flag()
    assert sh("nft list ruleset") == ""


def test_a_flag_that_someone_turned_off_shows_and_is_mended() -> None:
    uplink()
    lab = firewall("a")
    lab.create([WANTED], ignore)
    turn(False)
    assert list(lab.observe()) == [Forwarding(name="eth0", on=False)]
    lab.create([WANTED], ignore)
    assert flag()


def test_an_interface_that_vanished_is_forgotten() -> None:
    uplink()
    lab = firewall("a")
    lab.create([WANTED], ignore)
    sh("ip link del eth0")
    assert list(lab.observe()) == [Forwarding(name="eth0", on=False)]
    assert lab.check([WANTED]) == ["there is no interface eth0, the uplink that the file names"]
    with pytest.raises(NetorchError, match="failed to set forwarding on eth0: no such interface"):
        lab.create([WANTED], ignore)
    lab.delete([WANTED], ignore)
    assert sh("nft list ruleset") == ""


def test_a_machine_that_became_a_router_stays_one() -> None:
    """Docker, say, was started while the lab ran: it sets ip_forward, and with it every flag."""
    uplink()
    lab = firewall("a")
    lab.create([WANTED], ignore)
    sh("echo 1 > /proc/sys/net/ipv4/ip_forward")
    lab.delete([WANTED], ignore)
    assert flag()


def test_several_interfaces_go_one_by_one() -> None:
    uplink()
    sh("ip link add eth1 type bridge")
    lab = firewall("a")
    other = Forwarding(name="eth1")
    lab.create([WANTED, other], ignore)
    lab.delete([WANTED], ignore)
    assert not flag()
    assert list(lab.observe()) == [other]
    lab.delete([WANTED, other], ignore)
    assert sh("nft list ruleset") == ""


def test_labs_that_come_and_go_at_once_leave_it_as_it_was() -> None:
    uplink()
    children = []
    for number in range(6):
        if (child := os.fork()) == 0:
            lab = firewall(f"lab{number}")
            for _ in range(10):
                lab.create([WANTED], ignore)
                lab.delete([WANTED], ignore)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert not flag()
    assert sh("nft list ruleset") == ""
