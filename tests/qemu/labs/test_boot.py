"""Guests that boot otherwise than tiny does: by PXE, by UEFI, a kernel of one's own, cloud-init."""

import json
import subprocess
from pathlib import Path

import pytest

from netorch.errors import MissingError
from netorch.system.firmware import uefi
from netorch.system.tiny import tiny_image
from tests.qemu import images
from tests.qemu.images import Image
from tests.qemu.labs.lab import Machine

BOOT_SECONDS = 330  # for slow firmware and a whole distribution, under TCG on a busy machine

# tiny's init writes "netorch-tiny: ..." on the console once it has its lease.
NETWORK = """
lab.timeout = 300

[networks.default]
address = "192.168.122.1/24"
tftp    = "tftp"
dhcp    = { boot = "boot.ipxe" }

[networks.lan]
mode = "bridge"
"""
PXE = """
[guests.empty]
boot  = "network"
ready = "console:netorch-tiny: eth"
nics  = [{ network = "lan" }, { network = "default", address = "192.168.122.7" }]

[guests.direct]
ready   = "console:netorch-tiny: eth"
kernel  = "tftp/vmlinuz"
initrd  = "tftp/initrd"
cmdline = "console=ttyS0 quiet netorch.hostname=direct of-the-file"
nics    = [{ network = "default" }]
"""
SCRIPT = """#!ipxe
kernel vmlinuz initrd=initrd console=ttyS0 quiet netorch.hostname=${hostname} by-ipxe
initrd initrd
boot
"""
UEFI = """
lab.timeout = 300

[networks.default]

[guests.efi]
firmware = "uefi"
machine  = "pc"
nics     = [{ network = "default" }]
"""
DEBIAN = """
lab.timeout = 300

[networks.default]
address = "192.168.122.1/24"

[networks.lan]
mode    = "bridge"
address = "10.0.0.1/24"
dhcp    = true

[guests.sid-1]
image    = "DISK"
kernel   = "KERNEL"
initrd   = "INITRD"
cmdline  = "root=LABEL=root rw console=ttyS0 quiet audit=0 cryptomgr.notests noreplace-smp"
memory   = "512M"
ready    = "tcp:22"
ssh_keys = ["key.pub"]
user_data = '''
#cloud-config
users: [default, {name: alice}]
'''
nics = [
    { network = "lan" },
    { network = "default", address = "192.168.122.6" },
]
"""


def test_an_empty_guest_boots_what_the_labs_tftp_serves_and_another_its_own_kernel(
    machine: Machine,
) -> None:
    _tftp(machine.directory)
    lab = machine.up("pxe", NETWORK + PXE, seconds=BOOT_SECONDS)
    assert lab.leases()["empty"] == "192.168.122.7"
    for guest, word in (("empty", "by-ipxe"), ("direct", "of-the-file")):
        log = (lab.run / "guests" / guest / "serial.log").read_text(errors="replace")
        assert word in lab.sh(guest, "cat /proc/cmdline")
        assert lab.sh(guest, "hostname") == guest
        assert ("iPXE" in log) == (guest == "empty")
    lab.unchanged()


def test_tiny_boots_by_uefi_which_keeps_its_variables(machine: Machine) -> None:
    try:
        uefi("pc")
    except MissingError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    lab = machine.up("uefi", UEFI, seconds=BOOT_SECONDS)
    assert lab.sh("efi", "ls /sys/firmware/efi/fw_platform_size")
    variables = machine.disks_base / lab.name / "efi.pc.uefi-variables"
    assert variables.stat().st_size == uefi("pc").template.path.stat().st_size
    assert variables.read_bytes() != uefi("pc").template.path.read_bytes()
    lab.unchanged()


@pytest.fixture(scope="session")
def debian() -> Image:
    return images.debian()


def test_a_debian_image_comes_up_with_its_name_key_and_addresses(
    debian: Image, machine: Machine
) -> None:
    key = machine.directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    text = DEBIAN.replace("DISK", str(debian.disk)).replace("KERNEL", str(debian.kernel))
    text = text.replace("INITRD", str(debian.initrd))
    lab = machine.up("debian", text, seconds=BOOT_SECONDS)
    said = subprocess.run(
        [
            *("ssh", "-F", "none", "-i", key, "-o", "BatchMode=yes"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "ConnectionAttempts=90", "debian@192.168.122.6"),
            "until [ $(ip -4 -brief addr show up | grep -c eth) = 2 ]; do sleep 0.1; done; "
            "hostname; getent passwd alice | cut -d: -f1; ip -json -4 address",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BOOT_SECONDS,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    name, user, addresses = said.stdout.split("\n", 2)
    assert (name, user) == ("sid-1", "alice")
    found = {nic["ifname"]: nic["addr_info"][0]["local"] for nic in json.loads(addresses)}
    assert found["eth1"] == "192.168.122.6"
    assert found["eth0"].startswith("10.0.0.")
    lab.unchanged()


def test_what_a_guest_should_boot_is_looked_at_before_anything_is_made(machine: Machine) -> None:
    file = machine.file("missing", NETWORK + PXE.replace("tftp/initrd", "nowhere"))
    said = machine.netorch("apply", str(file), status=1).stderr
    directory = machine.directory
    assert f"failed to serve {directory}/tftp by TFTP: No such file or directory" in said
    for path in ("tftp/vmlinuz", "nowhere"):
        assert f"failed to read {directory}/{path} of guest direct: No such file" in said
    assert machine.left() == []


def _tftp(directory: Path) -> None:
    tiny = tiny_image(print)
    served = directory / "tftp"
    served.mkdir()
    (served / "vmlinuz").symlink_to(tiny.vmlinuz)
    (served / "initrd").symlink_to(tiny.initrd)
    (served / "boot.ipxe").write_text(SCRIPT)
