"""Networks of every mode and guests of every kind, each against a real kernel and a real guest.

What the golden files of tests/pure/golden render, and where it runs for real:

    states/br0               tests/qemu/test_br0.py, test_the_shipped_br0
    states/default           test_names.test_the_reserved_lease_is_the_same_everywhere
    states/hosts-only        test_hosts_only
    states/isolated          test_isolated
    states/quickstart        test_nodes.test_quickstart_and_commands_in_its_nodes
    states/screen            test_access.test_files_keys_and_pictures
    states/taps              test_taps_for_a_machine_that_something_else_starts
    states/three-nics        test_nics.test_three_nics_take_leases_and_move_a_megabyte_each_way
    states/virbr0-vs-br0     test_packets.test_virbr0_and_br0
    guests/*                 tests/qemu/test_guest_adapter.py, test_shape: all, by name; here also
      tiny                     everywhere
      tiny-pc, multi-queue     test_every_mode_side_by_side
      e1000, rtl8139           test_nics (three-models: with all in one guest, test_every_mode...)
      qcow2, raw               test_disks.test_guests_write_to_overlays_and_never_to_the_image
      vnc                      test_nodes.test_console_and_screen
      vnc-socket               test_access
      network, uefi, ...       test_boot
    mistakes/*               never reach a machine

Modes: nat, bridge in test_packets; isolated, route, open, no DHCP, no DNS, no address, STP here;
MTU and domain in test_names. test_golden_files_are_all_exercised holds this list to the directory.
"""

import json
import subprocess
from pathlib import Path

from netorch.system.tiny import tiny_image
from tests.guest_shapes import BOOTS, SHAPES
from tests.isolation import ip, ip_json
from tests.qemu.labs.lab import SECONDS, TOPOLOGIES, Machine, wait_for
from tests.qemu.labs.server import PORT

GOLDEN = Path(__file__).parents[2] / "pure" / "golden"

EVERY_MODE = """
[networks.nat]
address = "10.1.0.1/24"

[networks.routed]
mode    = "route"
address = "10.2.0.1/24"

[networks.open]
mode    = "open"
address = "10.3.0.1/24"

[networks.quiet]
mode    = "isolated"
address = "10.4.0.1/24"
dns     = false

[networks.static]
mode    = "open"
address = "10.5.0.1/24"
dhcp    = false
bridge  = "static0"
mac     = "52:54:00:55:55:55"

[networks.lan]
mode = "bridge"

[guests.big]
machine = "pc"
memory  = "192M"
cpus    = 2
nics    = [
    { network = "routed", queues = 2 },
    { network = "nat", model = "e1000" },
    { network = "quiet", model = "rtl8139" },
]

[hosts]
natted   = { nics = [{ network = "nat" }] }
routed   = { nics = [{ network = "routed" }] }
opened   = { nics = [{ network = "open" }] }
quiet    = { nics = [{ network = "quiet" }] }
quiet2   = { nics = [{ network = "quiet" }] }
static   = { nics = [{ network = "static", address = "10.5.0.5/24" }] }
left     = { nics = [{ network = "lan", address = "10.6.0.1/24" }] }
right    = { nics = [{ network = "lan", address = "10.6.0.2/24" }] }
"""

SLOW = """
[networks.slow]
mode    = "bridge"
address = "10.7.0.1/24"
dhcp    = true
stp     = true

[hosts.late]
nics = [{ network = "slow" }]
"""

FOREIGN = """
[networks.default]
address = "192.168.122.1/24"

[taps.many]
network = "default"
queues  = 2
"""


def test_every_mode_side_by_side(machine: Machine) -> None:
    lab = machine.up("modes", EVERY_MODE)
    lab.unchanged()
    leases = lab.leases()
    hosts = {name: leases[name] for name in ("natted", "routed", "opened", "quiet", "quiet2")}
    assert "static" not in leases
    hosts["static"] = "10.5.0.5"
    lab.serve(*hosts, "right")

    def seen(source: str, target: str) -> str:
        return lab.ask(source, hosts[target]).partition(" ")[0]

    # Out of nat as the network's gateway on the other side, out of the others as oneself.
    assert seen("natted", "static") == "10.5.0.1"
    assert seen("routed", "static") == hosts["routed"]
    assert seen("opened", "static") == hosts["opened"]
    assert seen("natted", "routed") == "10.2.0.1"
    # Into route, open and an open network without DHCP from everywhere, into nat from nowhere.
    assert seen("static", "routed") == "10.5.0.5"
    assert seen("static", "opened") == "10.5.0.5"
    assert lab.ask("static", hosts["natted"]) == "refused by 10.5.0.1: type 3 code 3"
    assert lab.ask("routed", hosts["natted"]) == "refused by 10.2.0.1: type 3 code 3"
    # Isolated: among themselves and with the machine, and no route to elsewhere.
    assert seen("quiet2", "quiet") == hosts["quiet2"]
    assert "unreachable" in lab.ask("quiet", hosts["static"])
    lab.exec("quiet", "ip", "route", "add", "default", "via", "10.4.0.1")
    assert lab.ask("quiet", hosts["static"]) == "silent", "its bridge does not forward"
    assert lab.ask("static", hosts["quiet"]) == "refused by 10.5.0.1: type 3 code 3"
    assert lab.ask("quiet", "10.4.0.1", 53) == "Connection refused without ICMP", "no DNS there"
    # A bridge without an address is a wire.
    assert lab.ask("left", "10.6.0.2").partition(" ")[0] == "10.6.0.1"
    assert ip_json("addr", "show", "dev", "br-lan")[0]["addr_info"] == []
    assert ip_json("link", "show", "dev", "static0")[0]["address"] == "52:54:00:55:55:55"

    assert lab.sh("big", "nproc") == "2"
    total = int(lab.sh("big", "awk '/^MemTotal/ {print $2}' /proc/meminfo"))
    assert 128 << 10 < total < 192 << 10
    assert "i440FX" in lab.sh("big", "cat /sys/class/dmi/id/product_name")
    drivers = lab.sh(
        "big", "for n in /sys/class/net/eth*; do basename $(readlink $n/device/driver); done"
    )
    assert drivers.split() == ["virtio_net", "e1000", "8139cp"]
    assert lab.sh("big", "ls -d /sys/class/net/eth0/queues/rx-* | wc -l") == "2"
    addresses = lab.sh("big", "ip -4 -o addr | awk '{print $4}'").split()
    assert [address.rpartition(".")[0] for address in addresses[1:]] == [
        "10.2.0",
        "10.1.0",
        "10.4.0",
    ]
    pid = next(
        row["pid"]
        for row in json.loads(machine.netorch("taps", "--json", "big-0").stdout)
        if row["lab"] == lab.name
    )
    rows = json.loads(machine.netorch("taps", "--json", str(pid)).stdout)
    shown = ("tap", "bridge", "queues", "model")
    assert [[row[name] for name in shown] for row in rows] == [
        ["big-0", "br-routed", 2, "virtio-net-pci"],
        ["big-1", "br-nat", 1, "e1000"],
        ["big-2", "br-quiet", 1, "rtl8139"],
    ]
    assert [f"{row['address']}/24" for row in rows] == addresses[1:]
    assert lab.sh("big", f"nc 10.5.0.5 {PORT}").split()[0] == addresses[1].partition("/")[0]
    assert lab.sh("big", f"nc {hosts['quiet']} {PORT}").split()[0] == addresses[3].partition("/")[0]


def test_isolated(machine: Machine) -> None:
    lab = machine.shipped("isolated")
    lab.unchanged()
    leases = lab.leases()
    assert set(leases) == {"vm1", "vm2"}
    assert leases["vm2"] in lab.sh("vm1", "ping -c 1 -W 60 vm2"), "by its name"
    assert leases["vm1"] in lab.sh("vm2", "nslookup vm1")
    assert "default" not in lab.sh("vm1", "ip route")
    lab.sh("vm1", "ping -c 1 -W 60 192.168.122.1")


def test_hosts_only(machine: Machine) -> None:
    lab = machine.shipped("hosts-only")
    lab.unchanged()
    lab.serve("server", "client")
    assert lab.ask("client", "203.0.113.80").split()[0] == "203.0.113.1"
    refused = lab.ask("server", lab.leases()["client"])
    assert refused == "refused by 203.0.113.1: type 3 code 3"
    ip("link", "delete", "br-outside")
    assert "missing" in machine.netorch("status", lab.name, status=3).stdout
    assert "create bridge br-outside" in machine.netorch("plan", str(lab.file), status=3).stdout
    assert "br-outside" in machine.netorch("apply", str(lab.file)).stderr
    lab.unchanged()
    assert lab.ask("client", "203.0.113.80").split()[0] == "203.0.113.1"


def test_spanning_tree(machine: Machine) -> None:
    lab = machine.up("slow", SLOW)
    lab.unchanged()
    assert set(lab.leases()) == {"late"}
    assert ip_json("link", "show", "dev", "br-slow")[0]["linkinfo"]["info_data"]["stp_state"] == 1


def test_taps_for_a_machine_that_something_else_starts(machine: Machine) -> None:
    lab = machine.shipped("taps")
    lab.unchanged()
    taps = {link["ifname"] for link in ip_json("link", "show", "master", "virbr0")}
    assert taps == {"lab0", "lab1", "lab2", "lab3"}
    other = machine.up("foreign", FOREIGN.replace("122", "123").replace("default", "second"))
    mac = "52:54:00:99:00:01"
    _start_qemu(machine, "tap,id=n0,ifname=lab0,script=no,downscript=no", f"netdev=n0,mac={mac}")
    _start_qemu(
        machine,
        "tap,id=n0,ifname=many0,script=no,downscript=no,queues=2",
        "netdev=n0,mq=on,vectors=6,mac=52:54:00:99:00:02",
    )
    file = wait_for(lab.run / "dnsmasq-default.leases", lambda text: mac in text)
    address = file.split()[2]
    assert address in machine.netorch("leases", lab.name).stdout
    ip("neigh", "flush", "all")
    # dnsmasq writes of its lease before it has that.
    ping = f"until busybox ping -c 1 -W 1 {address}; do :; done"
    subprocess.run(["sh", "-c", ping], check=True, timeout=SECONDS)
    wait_for(other.run / "dnsmasq-second.leases", lambda text: "52:54:00:99:00:02" in text)
    lab.unchanged()
    other.unchanged()
    found = json.loads(machine.netorch("taps", "--json").stdout)
    rows = {row["tap"]: row for row in found if row["place"] == "here"}
    assert [rows[f"lab{number}"]["state"] for number in range(4)] == ["open", *["free"] * 3]
    stranger = [rows["lab0"][name] for name in ("bridge", "model", "mac", "address", "lab")]
    assert stranger == ["virbr0", "virtio-net-pci", mac, address, lab.name]
    many = rows["many0"]
    assert (many["queues"], len(many["descriptors"]), many["lab"]) == (2, 2, other.name)


def test_golden_files_are_all_exercised(machine: Machine) -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {"disks", "guests", "mistakes", "states"}
    assert {path.stem for path in (GOLDEN / "guests").iterdir()} == {*SHAPES, *BOOTS}
    tests = Path(__file__).parents[1]
    pages = (tests.parents[1] / "docs").glob("*.md")  # which tests/qemu/test_docs.py runs
    sources = [path.read_text() for path in (*tests.rglob("test_*.py"), *pages)]
    for kind in (GOLDEN / "states", TOPOLOGIES):
        for path in kind.iterdir():
            used = (
                f'machine.shipped("{path.stem}")',
                f'load(TOPOLOGIES / "{path.stem}.toml")',
                f"$ netorch apply topologies/{path.stem}.toml",
            )
            assert any(use in source for source in sources for use in used), path


def _start_qemu(machine: Machine, netdev: str, device: str) -> None:
    """A guest of somebody else, on the built-in image. Without capabilities: as the taps' owner."""
    tiny = tiny_image(print)
    command = (
        "setpriv --bounding-set -all --inh-caps -all "
        "qemu-system-x86_64 -machine q35 -accel tcg -m 128 -nodefaults -display none"
    )
    boot = ["-kernel", str(tiny.kernel), "-initrd", str(tiny.initrd), "-append", tiny.cmdline]
    nic = ["-netdev", netdev, "-device", f"virtio-net-pci,{device}"]
    machine.started([*command.split(), *boot, *nic])
