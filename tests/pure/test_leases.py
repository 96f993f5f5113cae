"""When a guest counts as having its address, by what dnsmasq and its console have written."""

from pathlib import Path

import pytest

from netorch.resources import Guest
from netorch.system import leases
from netorch.system.scope import Scope
from netorch.system.services import nic_key, note_start

MAC = "52:54:00:00:00:01"
ADDRESS = "10.0.0.9"
ACK = f"dnsmasq-dhcp[7]: 1 DHCPACK(br0) {ADDRESS} {MAC} vm1\n"
SAID = f"netorch-tiny: eth0 {ADDRESS}/24\n"


@pytest.fixture
def scope(tmp_path: Path) -> Scope:
    (tmp_path / "guests/vm1").mkdir(parents=True)
    for name in ("conf", "log"):
        (tmp_path / f"dnsmasq-lan.{name}").touch()
    (tmp_path / "dnsmasq-lan.leases").write_text(f"1 {MAC} {ADDRESS} vm1 *\n")
    return Scope(lab="t", place=0, run=tmp_path, disks=tmp_path)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize("key", [nic_key(MAC), "guest:vm1"])
def test_what_a_console_said_of_an_address_before_is_no_sign_of_it(scope: Scope, key: str) -> None:
    console, log = scope.run / "guests/vm1/serial.log", scope.run / "dnsmasq-lan.log"
    append(log, ACK)
    append(console, SAID)
    note_start(scope, {key: console})
    wanted = leases._Wanted("vm1", "guest:vm1", "lan", MAC, ("vm1-0", "br0"), console=console)
    wait = leases._Wait(scope, [wanted], {key}, print)

    def is_late() -> bool:
        wait._look()
        return bool(wait._late)

    assert is_late(), "it has not asked"
    append(log, ACK)
    assert is_late(), "it has not set the address"
    append(console, SAID)
    assert not is_late()


def test_a_guest_whose_console_is_new_has_said_nothing(scope: Scope) -> None:
    guest = Guest(name="vm1", image="tiny", machine="q35", accel="tcg", memory=128, cpus=1, nics=())
    note_start(scope, {guest.key: scope.run / "guests/vm1/serial.log", "dhcp:a:eth0": None})
    text = (scope.run / "dnsmasq-lan.log").read_text()
    assert text == "netorch: guest:vm1 starts\nnetorch: dhcp:a:eth0 starts\n"
