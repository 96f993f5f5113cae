"""Peers that are installed, doing the same jobs: libvirt, mininet, munet.

None is needed: what is not there is left out of the table, and the table says so. `scripts/bench
--peers` installs them.
"""

import shutil
import sys
from pathlib import Path

from bench.turns import Clock, Turn

_LIBVIRT = """<network><name>default</name><forward mode='nat'/>
<bridge name='virbr0' stp='off' delay='0'/>
<ip address='192.168.122.1' netmask='255.255.255.0'>
<dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip></network>
"""

# A NAT network and two hosts; with an argument, that many hosts on one bridge.
_MININET = """
import sys
from mininet.net import Mininet
from mininet.nodelib import LinuxBridge, NAT
net = Mininet(switch=LinuxBridge, controller=None)
switch = net.addSwitch("s1")
for number in range(int(sys.argv[1])):
    net.addLink(net.addHost(f"h{number}"), switch)
net.start()
net.stop()
"""


def nat() -> dict[str, Turn]:
    found: dict[str, Turn] = {}
    if shutil.which("virsh") and shutil.which("libvirtd"):
        found["libvirt (virsh, daemon running)"] = _libvirt
    if _has_mininet():
        found["mininet (two hosts, no DHCP or NAT)"] = _mininet(2)
    return found


def _libvirt(directory: Path, clock: Clock) -> None:
    """libvirtd in these namespaces, with its directories on a tmpfs; its start is not counted."""
    import subprocess

    from netorch.system import namespaces

    for path in ("/run", "/var/lib/libvirt", "/etc/libvirt/qemu"):
        Path(path).mkdir(parents=True, exist_ok=True)
        namespaces.mount("bench", path, "tmpfs")
    xml = directory / "default.xml"
    xml.write_text(_LIBVIRT)
    cable = ["ip", "link", "add", "wan0", "type", "veth", "peer", "name", "wan1"]
    subprocess.run(cable, check=True)
    for name in ("wan0", "wan1"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    daemon = subprocess.Popen(["libvirtd"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while subprocess.run(["virsh", "net-define", str(xml)], capture_output=True).returncode:
            assert daemon.poll() is None, "libvirtd has ended"
        clock.run("up", ["virsh", "net-start", "default"])
        clock.run("down", ["virsh", "net-destroy", "default"])
    finally:
        daemon.terminate()
        daemon.wait()
        for pid in Path("/run/libvirt").rglob("*.pid"):
            sys.stderr.write(f"left: {pid}\n")


def _has_mininet() -> bool:
    import subprocess

    there = subprocess.run(["/usr/bin/python3", "-c", "import mininet.net"], capture_output=True)
    return there.returncode == 0


def _mininet(hosts: int) -> Turn:
    def turn(directory: Path, clock: Clock) -> None:
        script = directory / "net.py"
        script.write_text(_MININET)
        clock.run("up", ["/usr/bin/python3", str(script), str(hosts)])

    return turn
