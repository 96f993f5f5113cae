"""What keeps an interface from being a bridge's uplink, and who else has a hand in it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from netorch.resources import BridgeUplink
from netorch.system import layer3
from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot

SYSFS = Path("/sys/class/net")
NAT = 'use mode = "nat" instead'
_ETHERNET = 6  # bytes of a MAC
_MOST = 180_000  # bytes of one sendmsg, with room below the least send buffer (212,992)
_DHCP_CLIENTS = ("dhclient", "dhcpcd", "udhcpc", "busybox", "dhcpcanon")


def reasons(uplink: BridgeUplink, scope: Scope) -> Iterator[str]:
    """Why it can't be done, a sentence each; nothing is changed."""
    with Netlink() as netlink:
        snapshot = Snapshot(netlink)
        port = snapshot.by_name.get(uplink.name)
        where = f"network {uplink.network}: {uplink.name}"
        if port is None:
            yield f"{where} can't be the uplink of {uplink.bridge}: {_absent(scope.private)}"
            return
        bridge = snapshot.by_name.get(uplink.bridge)
        ours = bridge.index if bridge and bridge.alias.startswith(scope.alias("bridge:")) else 0
        if reason := unfit(port, snapshot.links.get(port.master), ours, is_wireless(port.name)):
            yield f"{where} can't be the uplink of {uplink.bridge}: {reason}"
            return
        held = layer3.look(netlink, port.index)
    if held.nexthop_objects:
        yield f"{where} has routes by nexthop objects (`ip nexthop`), which can't be moved"
    if 2 * sum(map(len, held.given(0))) > _MOST:
        yield f"{where} has {len(held.routes):,} routes, too many to be moved in one go"


def unfit(port: Link, master: Link | None, ours: int, wireless: bool) -> str:
    """Why this interface can't be a port of our bridge (of the index `ours`); "" if it can."""
    if wireless:
        return (
            "it is wireless, and an access point takes frames from the addresses of its stations "
            f"only, not from guests': {NAT}"
        )
    if port.name == "lo":
        return "it is the loopback interface"
    if port.alias.startswith("netorch:"):
        return f"it belongs to the netorch lab {port.alias.split(':')[1]}"
    if port.kind == "bridge":
        return f'it is a bridge itself: use it, with external = true and bridge = "{port.name}"'
    if port.master and port.master != ours:
        kind = master.kind if master else "device"
        name = master.name if master else "another one"
        return f"it is a port of the {kind} {name} already"
    if len(port.mac.split(":")) != _ETHERNET:
        return f"it is no Ethernet interface: {NAT}"
    return ""


def is_wireless(name: str) -> bool:
    """Whether sysfs says so; where it shows another namespace's, the kernel's refusal will do."""
    return any((SYSFS / name / mark).exists() for mark in ("wireless", "phy80211"))


def _absent(private: bool) -> str:
    if not private:
        return "there is no such interface"
    return (
        "there is no such interface in this private namespace, and the machine's own can't be "
        f"bridged without root: {NAT}, or run netorch as root"
    )


def managers(name: str) -> list[str]:
    """Sentences that name the programs which configure this interface, as far as can be seen."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return []  # the plan gave it back, or it is gone
    found = [
        f"{program} (pid {pid}) keeps {name}'s lease: it goes on asking by {name}, not by the "
        "bridge, and may give it an address again"
        for pid, program in _dhcp_clients(name)
    ]
    if _is_initial_namespace():
        nm = Path(f"/run/NetworkManager/devices/{index}")
        if nm.exists() and "managed=true" in _text(nm):
            found.append(
                f"NetworkManager manages {name} and may change it: "
                f"`nmcli device set {name} managed no`"
            )
        networkd = Path(f"/run/systemd/netif/links/{index}")
        if networkd.exists() and "ADMIN_STATE=unmanaged" not in _text(networkd):
            found.append(
                f"systemd-networkd manages {name} and may change it: "
                "give it a .network file with `[Link] Unmanaged=yes`"
            )
    return found


def _dhcp_clients(name: str) -> Iterator[tuple[int, str]]:
    here = os.stat("/proc/self/ns/net").st_ino
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
            program = os.path.basename(words[0])
            named = any(word == name or word == f"-i{name}" for word in words[1:])
            if program not in _DHCP_CLIENTS or not named:
                continue
            if os.stat(f"{entry.path}/ns/net").st_ino == here:
                yield int(entry.name), program
        except OSError:
            continue  # ended meanwhile, or not ours to look at


def _is_initial_namespace() -> bool:
    """Are the files of the machine's daemons about this network namespace?"""
    try:
        return os.stat("/proc/1/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
