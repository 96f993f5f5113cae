"""A guest of an ordinary user on somebody else's bridge, with a tap from qemu-bridge-helper.

As root only: in a user namespace nothing can be setuid root. The test's machine has a helper that
is, a bridge.conf, and a Python, a checkout and a cache that nobody may read.
"""

import os
import shutil
import site
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from netorch.system.bridge_helper import installed
from netorch.system.namespaces import MS_BIND, mount
from tests.isolation import ip, ip_json
from tests.kernel.machine import on_a_machine
from tests.qemu.labs.lab import SECONDS

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to install a program setuid root"),
    pytest.mark.skipif(installed() is None, reason="qemu-bridge-helper is not installed"),
]

ROOT = Path(__file__).parents[2]
NOBODY = 65534
RTMGRP_NEIGH = 4  # <linux/rtnetlink.h>
MAC = "52:54:00:00:00:77"
LAB = f"""
[networks.lan]
mode     = "bridge"
bridge   = "br0"
external = true

[guests.vm1]
memory = "128M"
nics   = [{{ network = "lan", mac = "{MAC}" }}]
"""


@on_a_machine
def test_a_guest_on_a_bridge_that_the_administrator_allows() -> None:
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "br0", "up")
    before = ports()
    refused = netorch("apply", "/run/lab.toml", prepare=True)
    assert refused.returncode == 1
    assert "access denied by acl file" in refused.stderr
    assert "`allow br0` in /etc/qemu/bridge.conf" in refused.stderr
    assert netorch("ls").stdout == "no lab is running here\n"
    Path("/etc/qemu/bridge.conf").write_text("allow br0\n")
    monitor = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    monitor.bind((0, RTMGRP_NEIGH))
    try:
        applied = netorch("apply", "/run/lab.toml")
        assert applied.returncode == 0, applied.stderr
        assert "in this network namespace" in applied.stdout
        assert len(ports()) == 1
        assert netorch("status").returncode == 0
        assert "nothing to do" in netorch("apply", "/run/lab.toml").stdout
        await_learning(monitor)  # the guest asks for an address: its packets come through
    finally:
        monitor.close()
        gone = netorch("teardown")
    assert gone.returncode == 0, gone.stderr
    assert ports() == before


def await_learning(monitor: socket.socket) -> None:
    """Wait until a bridge tells the kernel's listeners of a port with the guest's MAC."""
    monitor.settimeout(SECONDS)
    while bytes.fromhex(MAC.replace(":", "")) not in monitor.recv(65536):
        continue


def ports() -> list[str]:
    return [link["ifname"] for link in ip_json("link") if link.get("master") == "br0"]


def netorch(*arguments: str, prepare: bool = False) -> subprocess.CompletedProcess[str]:
    if prepare:
        _prepare()
    return subprocess.run(
        [
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *(f"/run/python/bin/{Path(sys.executable).resolve().name}", "-m", "netorch"),
            *arguments,
        ],
        cwd="/run/checkout",
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": "/run/checkout:/run/packages",
            "PYTHONDONTWRITEBYTECODE": "1",
            "NETORCH_RUN_DIR": "/run/nobody/run",
            "NETORCH_DISK_DIR": "/run/nobody/disks",
            "XDG_CACHE_HOME": "/run/nobody/cache",
            "HOME": "/run/nobody",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def _prepare() -> None:
    """In the test's own mount namespace: /run is a tmpfs there (tests/kernel/machine.py)."""
    (packages,) = site.getsitepackages()
    for source, target in ((sys.base_prefix, "python"), (ROOT, "checkout"), (packages, "packages")):
        Path("/run", target).mkdir()
        mount(source, f"/run/{target}", flags=MS_BIND)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "netorch")
    # Not the templates, which other tests make and throw away meanwhile.
    ignore = shutil.ignore_patterns("warm-*", ".*")
    shutil.copytree(cache, "/run/nobody/cache/netorch", ignore=ignore)
    for path in [Path("/run/nobody"), *Path("/run/nobody").rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    helper = installed()
    assert helper is not None
    shutil.copy(helper, "/run/helper")
    os.chmod("/run/helper", 0o4755)
    mount("/run/helper", helper, flags=MS_BIND)
    for name in ("upper", "work"):
        Path("/run/etc", name).mkdir(parents=True)
    mount(
        "etc", "/etc", "overlay", data="lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work"
    )
    Path("/etc/qemu").mkdir(exist_ok=True)
    Path("/etc/qemu/bridge.conf").write_text("deny all\n")
    Path("/run/lab.toml").write_text(LAB)
