"""Peers that are installed, doing the same jobs: libvirt, mininet, munet.

None is needed: what is not there is left out of the table, and the table says so. `scripts/bench
--peers` installs them.

libvirtd runs in the turn's own namespaces, with tmpfs over every directory it keeps state in; it is
started, and knows the network and the domain, before the clock starts. mininet and munet are driven
as a person would, by a program: up is from its spawn to its hosts being there, down from then on
to its exit, so that their interpreter's start counts once.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from bench.turns import Clock, Turn

ROOT = Path(__file__).parents[1]

# Directories that libvirtd writes in.
_STATE = ("/run", "/etc/libvirt", *(f"/var/{d}/libvirt" for d in ("lib", "cache", "log")))
# Users that the driver packages look up and the system package would make.
_USERS = ("libvirt-qemu", "libvirt-dnsmasq", "libvirt", "kvm")
# QEMU as root; no cgroups, which are the machine's; and
# no virtlogd, which would be one process more to wait for.
_QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
"""
_NETWORK = """<network{namespace}><name>default</name><forward mode='nat'/>
<bridge name='virbr0' {bridge}/><mac address='52:54:00:11:22:33'/>
<ip address='192.168.122.1' netmask='255.255.255.0'>
<dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip>{options}</network>
"""
_SHIPPED = _NETWORK.format(namespace="", bridge="stp='on' delay='0'", options="")
_TUNED = _NETWORK.format(
    namespace=" xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'",
    bridge="stp='off' delay='0'",
    options="<dnsmasq:options><dnsmasq:option value='no-ping'/></dnsmasq:options>",
)
_DOMAIN = """<domain type='qemu'><name>vm</name><memory unit='MiB'>256</memory>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline></os>
<features><acpi/></features>
<devices><emulator>{emulator}</emulator>
<controller type='usb' model='none'/><memballoon model='none'/>
<interface type='network'><source network='default'/><model type='virtio'/></interface>
<serial type='file'><source path='{serial}'/></serial>
</devices></domain>
"""
_LEASES_HELPER = Path("/usr/lib/libvirt/libvirt_leaseshelper")

_MININET = """
import sys
from mininet.net import Mininet
from mininet.nodelib import LinuxBridge
Mininet.inited = True  # it would raise limits of the whole machine by sysctl
net = Mininet(switch=LinuxBridge, controller=None, ipBase="10.0.0.0/8")
number = 0
for bridge in range(int(sys.argv[1])):
    switch = net.addSwitch(f"s{bridge + 1}")
    for host in range(int(sys.argv[2])):
        net.addLink(net.addHost(f"h{number}"), switch)
        number += 1
net.start()
print("up", flush=True)
sys.stdin.read()
net.stop()
"""
_MUNET = """
import asyncio, logging, sys
logging.disable(logging.INFO)
from munet.parser import async_build_topology
lan = {"name": "lan", "ip": "10.0.0.0/16"}
nodes = [
    {"name": f"h{n}", "connections": [{"to": "lan", "ip": f"10.0.1.{n + 1}/16"}]}
    for n in range(int(sys.argv[1]))
]
config = {
    "version": 1,
    "config_pathname": sys.argv[2] + "/munet.json",
    "topology": {"networks": [lan], "nodes": nodes},
}
async def main():
    unet = await async_build_topology(config, rundir=sys.argv[2] + "/munet")
    print("up", flush=True)
    sys.stdin.read()
    await unet.async_delete()
asyncio.run(main())
"""
_PYTHON = "/usr/bin/python3"  # the one that distribution packages are for


def munet_python() -> Path:
    return Path(os.environ.get("BENCH_PEERS_VENV", ROOT / ".bench-peers"), "bin/python")


def missing() -> dict[str, str]:
    """The peers that are left out, each with the reason."""
    reasons = {}
    if lacks := [name for name in ("virsh", "libvirtd") if not shutil.which(name)]:
        reasons["libvirt"] = f"no {' and no '.join(lacks)} (scripts/bench --peers installs it)"
    if not shutil.which("brctl") or not _imports(_PYTHON, "mininet.net"):
        reasons["mininet"] = "no mininet with brctl (scripts/bench --peers installs it)"
    if not _imports(str(munet_python()), "munet.parser"):
        reasons["munet"] = f"not in {munet_python().parents[1].name} (scripts/bench --peers)"
    return reasons


def _imports(python: str, module: str) -> bool:
    if not shutil.which(python):
        return False
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def _there(**found: dict[str, Turn]) -> dict[str, Turn]:
    absent = missing()
    return {
        f"{peer} ({what})" if what else peer: turn
        for peer, turns in found.items()
        if peer not in absent
        for what, turn in turns.items()
    }


def nat() -> dict[str, Turn]:
    return _there(
        libvirt={"its daemon running, no taps": _libvirt_network},
        mininet={"two hosts, no DHCP or NAT": _mininet(1, 2)},
        munet={"two hosts, no DHCP or NAT": _munet(2)},
    )


def one_bridge(hosts: int) -> dict[str, Turn]:
    name = f"{hosts} hosts"
    return _there(mininet={name: _mininet(1, hosts)}, munet={name: _munet(hosts)})


def many_bridges(bridges: int, hosts: int) -> dict[str, Turn]:
    """munet is not among them: 250 hosts take it a minute, a thousand more than a turn has."""
    return _there(mininet={f"{bridges} x {hosts} hosts": _mininet(bridges, hosts)})


def one_guest() -> dict[str, Turn]:
    return _there(
        libvirt={
            "as shipped": _libvirt_guest(_SHIPPED),
            "no STP, no ping check": _libvirt_guest(_TUNED),
        }
    )


def _libvirt_network(directory: Path, clock: Clock) -> None:
    _libvirtd()
    _define(directory, "net-define", _TUNED)
    for verb in ("net-start", "net-destroy"):  # what it does once in a life, as making its chains
        _quietly(["virsh", verb, "default"])
    clock.run("up", ["virsh", "net-start", "default"])
    clock.run("down", ["virsh", "net-destroy", "default"])


def _libvirt_guest(network: str) -> Turn:
    def turn(directory: Path, clock: Clock) -> None:
        told = _tell_of_leases(directory)
        _libvirtd()
        _define(directory, "net-define", network)
        image = json.loads(os.environ["BENCH_TINY"])
        emulator = shutil.which("qemu-system-x86_64")
        serial = directory / "serial"
        _define(directory, "define", _DOMAIN.format(emulator=emulator, serial=serial, **image))
        up = f"exec 3<>{told}; virsh net-start default && virsh start vm && read mac <&3"
        clock.run("up", ["sh", "-c", up])
        clock.run("down", ["sh", "-c", "virsh destroy vm && virsh net-destroy default"])

    return turn


def _libvirtd() -> None:
    """Returns when it answers. It ends with the turn's PID namespace, as all that it starts."""
    from netorch.system import namespaces

    for path in _STATE:
        Path(path).mkdir(parents=True, exist_ok=True)
        namespaces.mount("bench", path, "tmpfs")
    namespaces.mount("sysfs", "/sys", "sysfs")  # the one that is there shows the machine's links
    _add_users()
    Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    Path("/etc/libvirt/libvirtd.conf").write_text('unix_sock_group = "root"\n')
    _quietly(["libvirtd", "--daemon"])
    _quietly(["virsh", "domcapabilities"])  # it asks QEMU once, and remembers


def _add_users() -> None:
    """Put files with _USERS in place of /etc/passwd and /etc/group."""
    from netorch.system import namespaces

    for file, rest in (("passwd", "::/:/bin/false"), ("group", "")):
        lines = Path("/etc", file).read_text().splitlines()
        there = {line.partition(":")[0] for line in lines}
        for number, name in enumerate(_USERS):
            if name not in there:
                lines.append(f"{name}:x:{64055 + number}:{64055 + number if rest else ''}{rest}")
        changed = Path("/run", file)
        changed.write_text("\n".join(lines) + "\n")
        namespaces.mount(changed, f"/etc/{file}", flags=namespaces.MS_BIND)


def _define(directory: Path, verb: str, xml: str) -> None:
    file = directory / f"{verb}.xml"
    file.write_text(xml)
    _quietly(["virsh", verb, str(file)])


def _tell_of_leases(directory: Path) -> Path:
    """A fifo that says the MAC of each new lease: around the program that dnsmasq tells."""
    from netorch.system import namespaces

    told, real, wrapper = directory / "told", directory / "leaseshelper", directory / "tell.sh"
    os.mkfifo(told)
    shutil.copy2(_LEASES_HELPER, real)
    wrapper.write_text(
        f'#!/bin/sh\n{real} "$@"\nstatus=$?\n[ "$1" != add ] || echo "$2" > {told}\nexit $status\n'
    )
    wrapper.chmod(0o755)
    namespaces.mount(wrapper, _LEASES_HELPER, flags=namespaces.MS_BIND)
    return told


def _quietly(argv: list[str]) -> None:
    said = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if said.returncode != 0:
        raise SystemExit(f"{' '.join(argv)}: {said.returncode}\n{said.stdout}")


def _mininet(bridges: int, hosts: int) -> Turn:
    argv = [_PYTHON, "-c", _MININET, str(bridges), str(hosts)]
    return lambda _, clock: clock.hold(argv)


def _munet(hosts: int) -> Turn:
    """munet asks once for the child of a process that may not have forked yet: here, until it has.

    Without that, 100 hosts fail on a busy machine.
    """

    def turn(directory: Path, clock: Clock) -> None:
        patient = directory / "pgrep"
        patient.write_text(f'#!/bin/sh\nuntil {shutil.which("pgrep")} "$@"; do :; done\n')
        patient.chmod(0o755)
        os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
        clock.hold([str(munet_python()), "-c", _MUNET, str(hosts), str(directory)])

    return turn
