"""virbr0 against br0, with real packets: who reaches whom, and as whom."""

import re
import select
import socket
from subprocess import Popen

from tests.qemu.labs.lab import SECONDS, Lab, Machine
from tests.qemu.labs.server import PORT

GATEWAY, SERVER, NAT, BRIDGED = "10.0.0.1", "10.0.0.80", "192.168.122.6", "10.0.0.120"
WEB = 8080
USE_LOW_PORTS = """
    echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
    echo 80 99 > /proc/sys/net/ipv4/ip_local_port_range
"""
REFUSED = f"refused by {GATEWAY}: type 3 code 3"


def test_virbr0_and_br0(machine: Machine) -> None:
    lab = machine.shipped("virbr0-vs-br0")
    lab.unchanged()
    (server,) = lab.serve("server")
    _nat_guest_goes_out_as_the_gateway(lab, server)
    _bridged_guest_is_itself(lab, server)
    _nobody_comes_in_to_the_nat_guest(lab)
    _the_far_host_reaches_the_bridged_guest(lab)


def _nat_guest_goes_out_as_the_gateway(lab: Lab, server: Popen[str]) -> None:
    lab.sh("vm1", USE_LOW_PORTS)
    for seen in (_tcp(lab, "vm1"), _udp(lab, "vm1")):
        address, port = seen.split()
        assert address == GATEWAY
        assert int(port) >= 1024, "a guest passed as a privileged port"
    lab.sh("vm1", f"ping -c 1 -W 60 {SERVER}")
    assert _line(server) == f"ping {GATEWAY}"


def _bridged_guest_is_itself(lab: Lab, server: Popen[str]) -> None:
    lab.sh("vm2", USE_LOW_PORTS)
    for seen in (_tcp(lab, "vm2"), _udp(lab, "vm2")):
        address, port = seen.split()
        assert address == BRIDGED
        assert 80 <= int(port) < 100
    lab.sh("vm2", f"ping -c 1 -W 60 {SERVER}")
    assert _line(server) == f"ping {BRIDGED}"


def _nobody_comes_in_to_the_nat_guest(lab: Lab) -> None:
    _serve_web(lab, "vm1")
    assert _web(NAT) == "192.168.122.1", "its listener lives"
    assert lab.ask("server", NAT, WEB) == REFUSED
    lab.exec("server", "ip", "route", "add", "192.168.122.0/24", "via", GATEWAY)
    assert lab.ask("server", NAT, WEB) == REFUSED
    assert "100% packet loss" in lab.sh("server", f"busybox ping -c 1 -W 1 {NAT}", status=1)
    assert REFUSED.split(":")[0] in lab.ask("server", NAT, WEB + 1)
    assert "refused" in lab.sh("vm2", f"nc -w 60 {NAT} {WEB} 2>&1", status=1)
    assert _web(NAT) == "192.168.122.1"


def _the_far_host_reaches_the_bridged_guest(lab: Lab) -> None:
    _serve_web(lab, "vm2")
    seen = lab.sh("server", f"busybox wget -q -O - http://{BRIDGED}:{WEB}/cgi-bin/who")
    assert seen == SERVER
    assert lab.sh("vm1", f"wget -q -O - http://{BRIDGED}:{WEB}/cgi-bin/who") == GATEWAY
    assert _web(BRIDGED) == GATEWAY


def _tcp(lab: Lab, guest: str) -> str:
    return lab.sh(guest, f"nc {SERVER} {PORT}")


def _udp(lab: Lab, guest: str) -> str:
    return lab.sh(guest, f"tftp -g -l - -r who {SERVER} {PORT}")


def _serve_web(lab: Lab, guest: str) -> None:
    """A web server in a guest, which tells each client how it sees it; it listens afterwards."""
    page = "#!/bin/sh\\necho\\necho $REMOTE_ADDR\\n"
    lab.sh(
        guest,
        f"mkdir -p /www/cgi-bin && cd /www/cgi-bin && printf '{page}' > who && chmod +x who && "
        f"httpd -p 0.0.0.0:{WEB} -h /www < /dev/null > /dev/null 2>&1",
    )


def _web(address: str) -> str:
    """Whom the guest's web server sees in this process, which is on the gateway."""
    with socket.create_connection((address, WEB), timeout=SECONDS) as connection:
        connection.sendall(b"GET /cgi-bin/who HTTP/1.0\r\n\r\n")
        answer = connection.makefile().read()
    found = re.search(r"\n([\d.]+)\s*$", answer)
    assert found, answer
    return found[1]


def _line(child: Popen[str]) -> str:
    assert child.stdout is not None
    readable, _, _ = select.select([child.stdout], [], [], SECONDS)
    assert readable, "the server has said nothing"
    return child.stdout.readline().strip()
