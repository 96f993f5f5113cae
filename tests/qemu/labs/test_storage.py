"""Disks: each front-end on each back-end, in one guest; what is written, kept and left alone."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.labs.lab import Lab, Machine

BUSES = ("virtio", "scsi", "sata", "nvme", "usb")
SIZE = 1 << 20
READ = 3 << 16  # how much of a disk is read, of which the middle third is written

# In the guest: a link /run/disk/SERIAL for every disk, made when so many are there. Their drivers
# show the serial numbers in different places. Few processes: each costs milliseconds under TCG.
_LINK = """
mkdir -p /run/disk
tries=0
until set -- /sys/block/[snv]*; [ $# -ge {count} ]; do
    tries=$((tries + 1)); [ $tries -lt 1600 ] || {{ echo "only $# disks"; exit 1; }}
    usleep 50000
done
for disk in "$@"; do
    at=$disk/device
    if [ -f $disk/serial ]; then read -r serial < $disk/serial
    elif [ -f $at/serial ]; then read -r serial < $at/serial
    elif [ -f $at/../../../../serial ]; then read -r serial < $at/../../../../serial
    else serial=$(tail -c +5 $at/vpd_pg80 | tr -d ' '); fi
    ln -sfn /dev/${{disk##*/}} /run/disk/$serial
done
"""
_READ = """
echo 3 > /proc/sys/vm/drop_caches
for name in {names}; do
    echo $name $(dd if=/run/disk/$name bs=64k count=3 2>/dev/null | md5sum)
done
"""
_WRITE = """
for name in {names}; do
    dd if=/dev/urandom of=/run/disk/$name bs=64k count=1 seek=1 conv=fsync,notrunc 2>/dev/null ||
        echo $name
done
"""


def _images(directory: Path) -> dict[str, bytes]:
    """The images, and what is in them."""
    contents = {name: os.urandom(SIZE) for name in ("raw", "qcow2", "chain")}
    for name, content in contents.items():
        (directory / f"{name}.img").write_bytes(content)

    def qemu_img(*words: str) -> None:
        subprocess.run(["qemu-img", *words], check=True, cwd=directory, stdout=subprocess.DEVNULL)

    qemu_img("convert", "-f", "raw", "-O", "qcow2", "qcow2.img", "data.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "chain.img", "-F", "raw", "middle.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2")
    for bus in BUSES:
        (directory / f"{bus}.img").write_bytes(contents["raw"])
        qemu_img("convert", "-f", "raw", "-O", "qcow2", "qcow2.img", f"{bus}.qcow2")
    return contents


def _disks(bus: str) -> Iterator[str]:
    chain = '{ file = "middle.qcow2", format = "qcow2" }, { file = "chain.img", format = "raw" }'
    kept = "persistent = true, format ="
    yield f'name = "{bus}-raw", file = "raw.img"'
    yield f'name = "{bus}-qcow2", file = "data.qcow2"'
    yield f'name = "{bus}-chain", file = "top.qcow2", backing = [{chain}]'
    yield f'name = "{bus}-new", size = "1M"'
    yield f'name = "{bus}-kept-raw", file = "{bus}.img", {kept} "raw"'
    yield f'name = "{bus}-kept-qcow2", file = "{bus}.qcow2", {kept} "qcow2"'


def _file(memory: str = "160M") -> str:
    disks = [f'    {{ bus = "{bus}", {rest} }},' for bus in BUSES for rest in _disks(bus)]
    old = ['{ bus = "ide", file = "raw.img" }', '{ bus = "ide", size = "1M" }']
    old += ['{ bus = "sata", file = "data.qcow2" }', '{ file = "raw.img", readonly = true }']
    lines = ["[guests.vm1]", f'memory = "{memory}"', 'ready = "agent"', "disks = [", *disks, "]"]
    lines += ["[guests.old]", 'machine = "pc"', 'ready = "agent"', f"disks = [{', '.join(old)}]"]
    return "\n".join(lines)


def _await(lab: Lab, guest: str, count: int) -> None:
    """Wait until the guest has so many disks."""
    lab.sh(guest, _LINK.format(count=count))


def _names(*suffixes: str) -> list[str]:
    return [f"{bus}-{suffix}" for bus in BUSES for suffix in suffixes]


def _sums(lab: Lab, guest: str, names: list[str]) -> dict[str, str]:
    """MD5 of what the guest reads of its disks."""
    said = lab.sh(guest, _READ.format(names=" ".join(names)))
    return dict(line.split()[:2] for line in said.splitlines())


def _digest(content: bytes) -> str:
    return hashlib.md5(content[:READ]).hexdigest()


def test_every_front_end_on_every_back_end(machine: Machine) -> None:
    contents = _images(machine.directory)
    shared = [machine.directory / name for name in ("raw.img", "chain.img")]
    shared += [machine.directory / f"{name}.qcow2" for name in ("data", "middle", "top")]
    before = [path.read_bytes() for path in shared]
    lab = machine.up("storage", _file())
    _await(lab, "vm1", 6 * len(BUSES))
    _await(lab, "old", 4)
    names = _names("raw", "qcow2", "chain", "new", "kept-raw", "kept-qcow2")
    expected = {
        "raw": contents["raw"],
        "qcow2": contents["qcow2"],
        "chain": contents["chain"],
        "new": bytes(SIZE),
    }
    first = _sums(lab, "vm1", names)
    for name in names:
        back_end = name.partition("-")[2].removeprefix("kept-")
        assert first[name] == _digest(expected[back_end]), name

    assert lab.sh("vm1", _WRITE.format(names=" ".join(names))) == ""
    written = _sums(lab, "vm1", names)
    assert not set(written.values()) & set(first.values())
    assert len(set(written.values())) == len(names), "each disk has its own contents"

    _check_old_machine(lab, contents)
    _check_growing(machine, lab)
    _check_that_the_holder_is_named(machine, lab)

    again = _file(memory="192M").replace('virtio-new", size = "1M"', 'virtio-new", size = "3M"')
    lab.file.write_text(again)
    machine.netorch("apply", "--restart", str(lab.file))
    lab.unchanged()
    _await(lab, "vm1", 6 * len(BUSES))
    kept = _sums(lab, "vm1", names)
    assert kept == written, "they outlive a restart"
    lab.teardown()
    assert machine.left() == []
    assert [path.read_bytes() for path in shared] == before, "only overlays were written"
    for bus in BUSES:
        plain = machine.directory / "plain.img"
        command = ["qemu-img", "convert", "-O", "raw", f"{bus}.qcow2", str(plain)]
        subprocess.run(command, check=True, cwd=machine.directory)
        raw = machine.directory / f"{bus}.img"
        assert _digest(raw.read_bytes()) == written[f"{bus}-kept-raw"]
        assert _digest(plain.read_bytes()) == written[f"{bus}-kept-qcow2"]


def _check_old_machine(lab: Lab, contents: dict[str, bytes]) -> None:
    names = ["disk0", "disk1", "disk2", "disk3"]
    found = _sums(lab, "old", names)
    expected = [contents["raw"], bytes(SIZE), contents["qcow2"], contents["raw"]]
    assert list(found.values()) == list(map(_digest, expected))
    drivers = (
        "for d in disk0 disk2; do d=$(readlink /run/disk/$d); readlink -f /sys/block/${d##*/}; done"
    )
    pci = [path.split("/")[4] for path in lab.sh("old", drivers).splitlines()]
    classes = [lab.sh("old", f"cat /sys/bus/pci/devices/{at}/class") for at in pci]
    assert classes == ["0x010180", "0x010601"]  # IDE, AHCI
    assert lab.sh("old", "cat /sys/block/$(basename $(readlink /run/disk/disk3))/ro") == "1"
    # A disk that is read-only to the guest refuses what it writes.
    lab.sh("old", "dd if=/dev/zero of=/run/disk/disk3 count=1", status=1)


def _check_growing(machine: Machine, lab: Lab) -> None:
    sectors = "cat /sys/block/$(basename $(readlink /run/disk/virtio-new))/size"
    assert lab.sh("vm1", sectors) == str(SIZE // 512)
    text = lab.file.read_text()
    lab.file.write_text(text.replace('virtio-new", size = "1M"', 'virtio-new", size = "3M"'))
    done = machine.netorch("apply", str(lab.file))
    assert "guest" not in done.stderr, "it is not started again"
    # QEMU has told the guest, which looks a moment later.
    lab.sh("vm1", f"until [ $({sectors}) = {3 * SIZE // 512} ]; do usleep 10000; done")
    lab.unchanged()
    lab.file.write_text(text)
    done = machine.netorch("apply", str(lab.file), status=1)
    assert "has 3M and can't shrink to 1M" in done.stderr
    lab.file.write_text(text.replace('virtio-new", size = "1M"', 'virtio-new", size = "3M"'))


def _check_that_the_holder_is_named(machine: Machine, lab: Lab) -> None:
    """By another lab of ours, in a place of its own, and by QEMU's own locks."""
    other = machine.file(
        "other",
        '[guests.vm2]\ndisks = [{ file = "virtio.img", format = "raw", persistent = true },'
        ' { file = "usb.qcow2" }, { file = "raw.img", format = "raw", persistent = true }]',
    )
    done = machine.netorch("apply", "--private", str(other), status=1)
    holder = f"process {_qemu_of(lab)} (qemu:vm1 of lab {lab.name})"
    assert f"virtio.img is in use by {holder}" in done.stderr
    assert f"usb.qcow2 is being written to by {holder}" in done.stderr
    assert f"raw.img is in use by {holder[:8]}" in done.stderr, "it is below an overlay"
    command = ["qemu-img", "resize", "-f", "raw", str(machine.directory / "virtio.img"), "2M"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert 'Failed to get "write" lock' in refused.stderr


def _qemu_of(lab: Lab) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"guest=vm1,process=qemu:vm1" in words
            and f"NETORCH_LAB={lab.name}".encode() in environment
        ):
            return int(path.parent.name)
    raise AssertionError("vm1 does not run")


def test_block_devices(machine: Machine) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes loop devices")
    loops: list[str] = []
    files = [machine.directory / f"{name}.img" for name in ("base", "kept")]
    try:
        for file in files:
            file.write_bytes(os.urandom(SIZE))
            command = ["losetup", "--find", "--show", str(file)]
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode != 0:
                pytest.skip(f"no loop device: {made.stderr}")
            loops.append(made.stdout.strip())
        _check_block_devices(machine, *loops)
    finally:
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop], check=True)


def _check_block_devices(machine: Machine, base: str, kept: str) -> None:
    """Overlays over the device `base` on every bus, and `kept` persistent."""
    before = [Path(loop).read_bytes() for loop in (base, kept)]
    rows = [f'{{ bus = "{bus}", name = "{bus}", file = "{base}" }}' for bus in BUSES]
    rows.append(f'{{ file = "{kept}", name = "kept", format = "raw", persistent = true }}')
    lab = machine.up("devices", f'[guests.vm1]\nready = "agent"\ndisks = [{", ".join(rows)}]')
    names = [*BUSES, "kept"]
    _await(lab, "vm1", len(names))
    found = _sums(lab, "vm1", names)
    assert found == {**dict.fromkeys(BUSES, _digest(before[0])), "kept": _digest(before[1])}
    assert lab.sh("vm1", _WRITE.format(names=" ".join(names))) == ""
    written = _sums(lab, "vm1", names)
    assert len(set(written.values())) == len(names)
    other = machine.file("other", f"[guests.vm1]\ndisks = [{rows[-1]}]")
    done = machine.netorch("apply", str(other), status=1)
    assert f"image {kept} is in use by process {_qemu_of(lab)} (qemu:vm1 of " in done.stderr
    lab.teardown()
    assert Path(base).read_bytes() == before[0]
    assert _digest(Path(kept).read_bytes()) == written["kept"]
    subprocess.run(["mkfs.ext2", "-q", kept], check=True)
    mounted = machine.directory / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", kept, str(mounted)], check=True)
    done = machine.netorch("apply", str(other), status=1)
    assert f"failed to write to image {kept}: Device or resource busy" in done.stderr
    subprocess.run(["umount", str(mounted)], check=True)
