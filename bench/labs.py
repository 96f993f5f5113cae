"""What is built, as netorch's files and as the best shell scripts."""

from pathlib import Path

NAT = """
[networks.default]
bridge = "virbr0"
address = "192.168.122.1/24"
dhcp = { range = ["192.168.122.2", "192.168.122.254"] }
uplink = "lo"
[taps.vm]
network = "default"
count = 2
"""


def switches(bridges: int, taps: int) -> str:
    """A file with `bridges` bridges of `taps` taps each."""
    return "".join(
        f'[networks.n{b}]\nmode = "bridge"\nbridge = "br{b}"\n'
        f'[taps.t{b}x]\nnetwork = "n{b}"\ncount = {taps}\n'
        for b in range(bridges)
    )


def networks(count: int) -> str:
    """A file with `count` isolated networks, each with an address and a tap."""
    return "".join(
        f'[networks.n{n}]\nmode = "isolated"\nbridge = "br{n}"\ndns = false\ndhcp = false\n'
        f'address = "10.{n // 256}.{n % 256}.1/24"\n'
        f'[taps.t{n}x]\nnetwork = "n{n}"\n'
        for n in range(count)
    )


def hosts(count: int) -> str:
    """A file with `count` hosts, each with an address, on one bridge."""
    return '[networks.lan]\nmode = "bridge"\n' + "".join(
        f'[hosts.h{h}]\nnics = [{{ network = "lan", address = "10.0.1.{h + 1}/16" }}]\n'
        for h in range(count)
    )


def guests(count: int, start: str = "") -> str:
    """A file with `count` tiny guests on one NAT network."""
    text = '[networks.default]\naddress = "192.168.122.1/24"\nuplink = "lo"\n'
    extra = f'start = "{start}"\n' if start else ""
    return text + "".join(
        f'[guests.vm{g}]\n{extra}accel = "tcg"\nnics = [{{ network = "default" }}]\n'
        for g in range(count)
    )


def write_switches_script(directory: Path, bridges: int, taps: int) -> tuple[list[str], list[str]]:
    """The best script for bridges with taps: one `ip -batch` each way; deleting by group."""
    up = directory / "up.ip"
    lines = [f"link add br{b} group 7 type bridge" for b in range(bridges)]
    for b in range(bridges):
        for t in range(taps):
            name = f"t{b}x{t}"
            lines.append(f"tuntap add {name} mode tap vnet_hdr")
            lines.append(f"link set {name} master br{b} group 7 up")
    lines += [f"link set br{b} up" for b in range(bridges)]
    up.write_text("\n".join(lines) + "\n")
    return ["ip", "-batch", str(up)], ["ip", "link", "delete", "group", "7"]


def write_naive_script(directory: Path, bridges: int, taps: int) -> tuple[list[str], list[str]]:
    """What one writes first: a command for each thing, both ways."""
    up, down = ["set -e"], ["set -e"]
    for b in range(bridges):
        up += [f"ip link add br{b} type bridge", f"ip link set br{b} up"]
        for t in range(taps):
            name = f"t{b}x{t}"
            up.append(f"ip tuntap add {name} mode tap")
            up.append(f"ip link set {name} master br{b}")
            up.append(f"ip link set {name} up")
            down.append(f"ip link delete {name}")
        down.append(f"ip link delete br{b}")
    for name, lines in (("up", up), ("down", down)):
        (directory / f"{name}.sh").write_text("\n".join(lines) + "\n")
    return ["sh", str(directory / "up.sh")], ["sh", str(directory / "down.sh")]


def write_nat_script(directory: Path) -> tuple[list[str], list[str]]:
    """The best script for the NAT network: ip -batch, nft -f, dnsmasq; and back."""
    (directory / "up.ip").write_text(
        """\
link add virbr0 group 7 address 52:54:00:11:22:33 type bridge forward_delay 0
addr add 192.168.122.1/24 dev virbr0
tuntap add vm0 mode tap vnet_hdr
tuntap add vm1 mode tap vnet_hdr
link set vm0 master virbr0 group 7 up
link set vm1 master virbr0 group 7 up
link set virbr0 up
"""
    )
    (directory / "rules.nft").write_text(
        """\
table inet script {
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname "virbr0" oifname "virbr0" accept
    ip daddr 192.168.122.0/24 oifname "virbr0" ct state established,related accept
    ip saddr 192.168.122.0/24 iifname "virbr0" accept
    oifname "virbr0" reject
    iifname "virbr0" reject
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 192.168.122.0/24 ip daddr { 224.0.0.0/24, 255.255.255.255 } return
    meta l4proto { tcp, udp } ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 \
masquerade to :1024-65535
    ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 masquerade
  }
}
"""
    )
    (directory / "dnsmasq.conf").write_text(
        f"""\
user=root
group=
strict-order
except-interface=lo
bind-dynamic
interface=virbr0
dhcp-range=192.168.122.2,192.168.122.254,255.255.255.0
dhcp-authoritative
no-ping
dhcp-leasefile={directory}/leases
pid-file={directory}/dnsmasq.pid
"""
    )
    (directory / "up.sh").write_text(
        f"""\
set -e
cd {directory}
ip -batch up.ip
nft -f rules.nft
echo 1 > /proc/sys/net/ipv4/conf/virbr0/forwarding
dnsmasq -C dnsmasq.conf
"""
    )
    (directory / "down.sh").write_text(
        f"""\
set -e
cd {directory}
kill $(cat dnsmasq.pid)
nft delete table inet script
ip link delete group 7
"""
    )
    return ["sh", str(directory / "up.sh")], ["sh", str(directory / "down.sh")]
