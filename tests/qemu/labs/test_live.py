"""One guest that lives through everything that a file can change while it runs."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from netorch.system.qmp import Qmp
from tests.isolation import ip
from tests.qemu.labs.lab import SECONDS, Lab, Machine

GATEWAY = "10.0.0.1"
NICS = 'nics = [{ network = "lan" }]'
TEXT = f"""
[networks.lan]
mode = "isolated"
address = "{GATEWAY}/24"

[networks.two]
mode = "isolated"
address = "10.2.0.1/24"

[networks.three]
mode = "isolated"
address = "10.3.0.1/24"

[guests.vm1]
memory = 128
ports = 4
vnc = 5
{NICS}
"""


def with_second(nic: str) -> str:
    return TEXT.replace(NICS, f'nics = [{{ network = "lan" }}, {{ {nic} }}]')


def test_a_guest_changes_while_it_runs(machine: Machine) -> None:
    lab = machine.up("live", TEXT)
    pid = qemu_of(lab)
    with transfer(lab):
        assert "add NIC" in change(lab, with_second('network = "two"'))
        assert address_of(lab, "eth1").startswith("10.2.0.")
        lab.sh("vm1", "ping -c 1 -W 60 10.2.0.1")
        lab.unchanged()

        change(lab, with_second('network = "three"'))
        assert address_of(lab, "eth1").startswith("10.3.0.")
        lab.sh("vm1", "ping -c 1 -W 60 10.3.0.1")

        change(lab, with_second('network = "three", link = "down"'))
        until(lab, "cat /sys/class/net/eth1/carrier", "0")
        lab.unchanged()
        change(lab, with_second('network = "three"'))
        lab.sh("vm1", "ping -c 1 -W 60 10.3.0.1")

        change(lab, with_second('network = "three", model = "e1000"'))
        assert lab.sh("vm1", "basename $(readlink /sys/class/net/eth1/device/driver)") == "e1000"
        lab.sh("vm1", "ping -c 1 -W 60 10.3.0.1")
        refused = lab.machine.netorch("save", "vm1", status=2).stderr
        assert "its NICs or disks were changed while it ran" in refused

        assert "remove NIC" in change(lab, TEXT)
        assert lab.sh("vm1", "ls -d /sys/class/net/eth*") == "/sys/class/net/eth0"
        until(lab, "ls /run/udhcpc.*", "/run/udhcpc.eth0.pid")

        change(lab, TEXT.replace("vnc = 5", "vnc = 6"))
        assert banner(5906).startswith(b"RFB")
        assert not listens(5905)
        _disks_come_and_go(lab)
    assert qemu_of(lab) == pid

    _limits(lab)
    _heals(lab)
    _heals_disks(lab)
    assert qemu_of(lab) == pid
    _restarts(lab, pid)


def _limits(lab: Lab) -> None:
    """A rate holds in its direction: 500 kB take 1.7 s, as 66 KiB pass at once."""
    for way in ("out", "in"):
        rate = f'{{ {way} = "2mbit" }}'
        did = change(lab, TEXT.replace(NICS, f'nics = [{{ network = "lan", rate = {rate} }}]'))
        assert f"rate of vm1:0, {way} 2mbit" in did
        lab.unchanged()
        with socket.create_server((GATEWAY, 0)) as listening:
            listening.settimeout(SECONDS)
            port = listening.getsockname()[1]
            lab.sh(
                "vm1",
                "echo 'read go; head -c 500000 /dev/zero' > /run/out; "
                "echo 'wc -c > /run/n; mv /run/n /run/end' > /run/in; "
                f"nc {GATEWAY} {port} -e sh /run/{way} > /dev/null 2>&1 &",
            )
            connection, _peer = listening.accept()
        with connection:
            connection.settimeout(SECONDS)
            begin = time.monotonic()  # before the first byte, which waits for this machine
            if way == "in":
                connection.sendall(bytes(500_000))
                connection.shutdown(socket.SHUT_WR)
                until(lab, "cat /run/end", "500000")
            else:
                connection.sendall(b"go\n")
                assert sum(map(len, iter(lambda: connection.recv(65536), b""))) == 500_000  # noqa: B023
            assert 1.2 < time.monotonic() - begin < 30
    change(lab, TEXT)


def _heals(lab: Lab) -> None:
    """A tap and a bridge that somebody deleted come back with their traffic."""
    change(lab, TEXT)
    ip("link", "del", "vm1-0")
    status = lab.machine.netorch("status", lab.name, status=3).stdout
    assert "NIC vm1-0 has lost its tap" in status
    ip("tuntap", "add", "vm1-0", "mode", "tap")  # a stranger's of that name is not it
    assert "NIC vm1-0 has lost its tap" in lab.machine.netorch("status", lab.name, status=3).stdout
    ip("link", "del", "vm1-0")
    assert "plug NIC vm1-0 on lan again" in change(lab, TEXT)
    lab.sh("vm1", f"ping -c 1 -W 60 {GATEWAY}")
    ip("link", "del", "br-lan")
    change(lab, TEXT)
    lab.sh("vm1", f"ping -c 1 -W 60 {GATEWAY}")


def with_disks(*disks: str) -> str:
    return TEXT.replace(NICS, f"{NICS}\ndisks = [{', '.join(f'{{ {disk} }}' for disk in disks)}]")


# In the guest: waits for a disk by its serial number; the time is for its driver to be loaded.
_FIND = """
find_disk() {{
    for disk in /sys/block/[snv]*; do
        for file in $disk/serial $disk/device/serial $disk/device/../../../../serial; do
            serial=
            [ ! -f $file ] || read -r serial < $file || :
            [ "$serial" != {serial} ] || return 0
        done
        page=$disk/device/vpd_pg80
        [ ! -f $page ] || [ "$(tail -c +5 $page | tr -d ' ')" != {serial} ] || return 0
    done
    return 1
}}
tries=0
until find_disk; do
    tries=$((tries + 1)); [ $tries -lt 800 ] || {{ ls /sys/block; exit 1; }}
    usleep 100000
done
disk=/dev/${{disk##*/}}
"""
_WRITE = "dd if=/dev/urandom of=$disk bs=64k count=2 conv=fsync 2>/dev/null"
_SUM = "echo 3 > /proc/sys/vm/drop_caches; dd if=$disk bs=64k count=3 2>/dev/null | md5sum"
_BLOCKS = "set -- /sys/block/[snv]*; [ ! -e $1 ] || echo $#"


def _at(lab: Lab, serial: str, script: str) -> str:
    return lab.sh("vm1", _FIND.format(serial=serial) + script)


def _disks_come_and_go(lab: Lab) -> None:
    own = lab.machine.disks_base / lab.name / "vm1"
    image = lab.machine.directory / "data.img"
    image.write_bytes(os.urandom(1 << 20))
    before = image.read_bytes()
    digest = hashlib.md5(before[: 3 << 16]).hexdigest()
    new, file = 'name = "new", size = "4M"', f'name = "file", file = "{image}"'
    for bus in ("virtio", "nvme"):
        done = change(lab, with_disks(new, f'{file}, bus = "{bus}"'))
        assert f"disk file ({bus})" in done if bus == "virtio" else "disk file bus" in done
        assert _at(lab, "file", _SUM).split()[0] == digest
        lab.unchanged()
    assert _at(lab, "file", _WRITE) == ""
    assert _at(lab, "new", _WRITE) == ""
    kept = _at(lab, "new", _SUM)
    assert _at(lab, "file", _SUM).split()[0] != digest

    done = change(lab, with_disks(new.replace("4M", "6M")))
    assert "remove disk file (nvme)" in done
    assert [path.name for path in own.iterdir()] == ["new.qcow2"]
    until(lab, _BLOCKS, "1")
    until(lab, f"{_FIND.format(serial='new')} cat /sys/block/${{disk##*/}}/size", "12288")
    lab.unchanged()

    for bus in ("scsi", "usb"):
        change(lab, with_disks(f'{file}, bus = "{bus}"', new.replace("4M", "6M")))
        assert _at(lab, "file", _SUM).split()[0] == digest, "what was written has gone with it"
        assert _at(lab, "new", _SUM) == kept
        lab.unchanged()
    change(lab, TEXT)
    until(lab, _BLOCKS, "")
    assert not own.exists()
    assert image.read_bytes() == before
    with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
        qmp.ready()
        assert qmp.ask("query-fdsets") == []
        assert qmp.ask("query-named-block-nodes", {"flat": True}) == []
        left = {row["name"] for row in qmp.ask("qom-list", {"path": "/machine/peripheral"})}
        assert "scsi" not in left


def _heals_disks(lab: Lab) -> None:
    """What a killed apply leaves: any part of a disk, from either end."""
    text = with_disks('name = "new", size = "4M"')
    change(lab, text)
    assert _at(lab, "new", _WRITE) == ""
    kept = _at(lab, "new", _SUM)
    spec, device = "disk-new.spec", "disk-new"
    for parts in ((), ("node",), ("node", "sets", "spec")):
        with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
            qmp.ready()
            qmp.ask("device_del", {"id": device})
            assert qmp.event("DEVICE_DELETED", device, SECONDS)
            if "node" in parts:
                qmp.ask("blockdev-del", {"node-name": device})
            if "sets" in parts:
                for one in qmp.ask("query-fdsets"):
                    qmp.ask("remove-fd", {"fdset-id": one["fdset-id"]})
            if "spec" in parts:
                qmp.ask("object-del", {"id": spec})
        status = lab.machine.netorch("status", lab.name, status=3).stdout
        assert "disk new" in status
        again = "add disk new" if "spec" in parts else "plug disk new (virtio) again"
        assert again in change(lab, text)
        assert _at(lab, "new", _SUM) == kept
        lab.unchanged()
    with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
        qmp.ready()
        qmp.ask("device_del", {"id": device})
        assert qmp.event("DEVICE_DELETED", device, SECONDS)
    assert "remove disk new" in change(lab, TEXT)
    lab.unchanged()
    assert not (lab.machine.disks_base / lab.name / "vm1").exists()


def _restarts(lab: Lab, pid: int) -> None:
    """What can't change in a running guest is named, refused, and done when asked for."""
    larger = TEXT.replace("memory = 128", "memory = 160")
    more = ', { network = "two" }' * 4
    for text, why in (
        (larger, "memory 128 -> 160"),
        (TEXT.replace(NICS, NICS.replace("}]", f"}}{more}]")), "add NIC vm1-1"),  # of four ports
    ):
        lab.file.write_text(text)
        planned = lab.machine.netorch("plan", str(lab.file), status=3).stdout
        assert f"restart guest vm1: {why}" in planned
        as_json = json.loads(lab.machine.netorch("plan", "--json", str(lab.file), status=3).stdout)
        assert as_json["restarts"].keys() == {"guest:vm1"}
        refused = lab.machine.netorch("apply", str(lab.file), status=1).stderr
        assert f"guest vm1 has to restart: {why}" in refused
        assert "netorch apply --restart FILE" in refused
        assert lab.sh("vm1", "ls -d /sys/class/net/eth*") == "/sys/class/net/eth0"
        assert qemu_of(lab) == pid
    lab.file.write_text(larger)
    lab.machine.netorch("apply", "--restart", str(lab.file))
    assert qemu_of(lab) != pid
    lab.unchanged()


def change(lab: Lab, text: str) -> str:
    """Apply another text; what was done."""
    lab.file.write_text(text)
    return lab.machine.netorch("apply", str(lab.file)).stderr


def until(lab: Lab, command: str, said: str) -> None:
    """Wait until a command in the guest says that: of what QEMU did, its kernel hears later."""
    lab.sh("vm1", f"until [ \"$({command})\" = '{said}' ]; do usleep 10000; done")


def address_of(lab: Lab, device: str) -> str:
    return lab.sh("vm1", f"ip -4 addr show {device} | awk '/inet/ {{ print $2 }}'")


def qemu_of(lab: Lab) -> int:
    """The pid of the guest's QEMU, by its mark."""
    mark = f"NETORCH_LAB={lab.name}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as environ:
                marked = mark in environ.read().split(b"\0")
            with open(f"/proc/{name}/comm", encoding="utf-8") as comm:
                if marked and comm.read().startswith("qemu"):
                    return int(name)
        except OSError:  # another user's, or gone meanwhile
            continue
    raise AssertionError("no QEMU runs")


def banner(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as screen:
        return screen.recv(12)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def transfer(lab: Lab) -> Iterator[None]:
    """Bytes that flow to the guest over its first NIC all the while, and arrive whole."""
    stop = threading.Event()
    digest = hashlib.md5()
    sent = 0

    def pump(connection: socket.socket) -> None:
        nonlocal sent
        block = os.urandom(1 << 16)
        while not stop.wait(0.01):  # or it would have the processor to itself
            connection.sendall(block)
            digest.update(block)
            sent += len(block)

    with socket.create_server((GATEWAY, 0)) as listening:
        listening.settimeout(SECONDS)
        port = listening.getsockname()[1]
        lab.sh(
            "vm1",
            f"mkfifo /run/sum; (nc {GATEWAY} {port} < /dev/null | md5sum | "
            "{ read -r sum; echo $sum > /run/sum; }) > /dev/null 2>&1 &",
        )
        connection, _peer = listening.accept()
        connection.settimeout(SECONDS)
        pumping = threading.Thread(target=pump, args=[connection])
        pumping.start()
        try:
            yield
        finally:
            stop.set()
            pumping.join()
            connection.close()
    received = lab.sh("vm1", "cat /run/sum")
    assert sent > 1 << 20
    assert received.split()[0] == digest.hexdigest()
