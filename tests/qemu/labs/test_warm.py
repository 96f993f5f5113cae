"""Guests that are copies of one that was booted before."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from netorch.system.cache import cache_directory
from netorch.system.namespaces import wait_exit
from netorch.system.templates import _manifest
from netorch.system.tiny import tiny_image
from netorch.system.watch import Watch
from tests.qemu.labs.lab import SECONDS, Lab, Machine

COPIES = """
[networks.lan]
mode = "isolated"
address = "10.0.0.1/24"

[guests.vm1]
memory = 128
nics = [{ network = "lan" }, { network = "lan", model = "e1000" }, { network = "lan" }]

[guests.vm2]
memory = 128
nics = [{ network = "lan" }, { wire = "cable" }]

[guests.vm3]
memory = 128
nics = [{ wire = "cable" }, { backend = "user" }]

[guests.alone]
memory = 128
"""
# What a copy knows of itself, once it has seen that it is one.
LOOK = """
until hostname=$(cat /proc/sys/kernel/hostname); [ $hostname = NAME ] && [ ! -e /run/clock ]; do
    sleep 0.1
done
echo $hostname $(cat /proc/sys/kernel/random/boot_id) $(head -c 8 /dev/urandom | od -An -tx8)
date +%s
cat /sys/class/net/eth*/address 2> /dev/null || true
"""
ONE = """
[guests.vm1]
memory = 128
start = "warm"
ready = "agent"
"""


def test_copies_are_guests_like_others_and_share_nothing_that_must_differ(machine: Machine) -> None:
    lab = machine.up("warm", COPIES)
    assert "cold" not in lab.said
    names = ("vm1", "vm2", "vm3", "alone")
    looks = {name: look_into(lab, name) for name in names}
    identities = [look[0].split() for look in looks.values()]
    assert [identity[0] for identity in identities] == list(names)
    assert all(len(set(column)) == 4 for column in zip(*identities, strict=True))
    for name, look in looks.items():
        assert look[2:] == [nic["mac"] for nic in desired(lab, name)["nics"]]
        assert "netorch.template" in lab.sh(name, "cat /proc/cmdline")
    lab.sh("vm1", "ping -c 1 -W 60 10.0.0.1")
    lab.sh("vm1", f"ping -c 1 -W 60 {lab.leases()['vm2']}")
    lab.sh("vm2", "ip addr add 10.1.0.2/24 dev eth1")
    lab.sh("vm3", "ip addr add 10.1.0.3/24 dev eth0 && ping -c 1 -W 60 10.1.0.2")
    lab.sh("vm3", "ping -c 1 -W 60 10.0.2.2")
    lab.unchanged()

    machine.netorch("restart", "--lab", lab.name, "vm2")
    assert look_into(lab, "vm2")[0].split()[1] != looks["vm2"][0].split()[1]
    lab.unchanged()


def test_a_template_is_made_in_secret_or_not_at_all(machine: Machine, tmp_path: Path) -> None:
    cache = cache_of_its_own(machine, tmp_path)
    file = machine.file("secret", ONE)
    apply = machine.start("apply", str(file))
    qemu = maker_in(cache)
    os.kill(apply.pid, signal.SIGKILL)
    assert wait_exit(qemu, SECONDS)
    os.close(qemu)
    assert machine.left() == []

    lab = machine.up("secret", ONE)
    assert "cold" not in lab.said
    (made,) = cache.glob("warm-*[!k]")
    assert not list(cache.glob(".warm-*"))

    # One that looks whole and isn't.
    machine.netorch("stop", "--lab", lab.name, "--timeout", "0", "vm1")
    (made / "state").write_bytes(b"no state")
    (made / "manifest").write_bytes(_manifest(made))
    said = machine.netorch("start", "--lab", lab.name, "vm1").stderr
    assert re.search(r"vm1 starts cold: .*", said)
    assert not made.exists()
    assert "netorch.template" not in lab.sh("vm1", "cat /proc/cmdline")
    lab.unchanged()


def look_into(lab: Lab, guest: str) -> list[str]:
    """The lines of LOOK; its clock is right."""
    began = time.time()
    look = lab.sh(guest, LOOK.replace("NAME", guest)).splitlines()
    assert began - 30 < int(look[1]) < time.time() + 30
    return look


def desired(lab: Lab, guest: str) -> dict[str, list[dict[str, str]]]:
    rows = lab.status()["resources"]
    found: dict[str, list[dict[str, str]]] = next(
        row["resource"] for row in rows if row["key"] == f"guest:{guest}"
    )
    return found


def cache_of_its_own(machine: Machine, tmp_path: Path) -> Path:
    """A cache that has the image tiny, and no template."""
    tiny_image(print)
    cache = tmp_path / "cache/netorch"
    cache.mkdir(parents=True)
    for path in cache_directory().glob("tiny-*"):
        (cache / path.name).symlink_to(path)
    machine.use_cache(cache.parent)
    return cache


def maker_in(cache: Path) -> int:
    """A pidfd of the QEMU that makes a template in a cache."""
    deadline = time.monotonic() + SECONDS
    with Watch() as watch:
        watch.directory(cache)
        while not (scratch := list(cache.glob(".warm-*"))):
            watch.wait(deadline - time.monotonic())
        watch.directory(scratch[0])
        while True:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # gone meanwhile
                    if str(scratch[0]).encode() in path.read_bytes():
                        return os.pidfd_open(int(path.parent.name))
            assert time.monotonic() < deadline
            watch.wait(0.1)
