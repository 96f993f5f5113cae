"""The JSON Schema of a topology file, for editors and for `netorch schema`."""

from typing import Any

import msgspec

from netorch.model import Topology

DESCRIPTIONS = {
    "Topology.lab": "The lab as a whole.",
    "Topology.networks": "Networks by name: bridges and their services.",
    "Topology.guests": "Guests by name: QEMU virtual machines.",
    "Topology.hosts": "Hosts by name: network namespaces that play machines.",
    "Topology.taps": "Taps for virtual machines that netorch does not start.",
    "Topology.expect": "What must reach what, and what must not; `netorch verify` proves it.",
    "Lab.name": "The lab's name; by default the file's name without .toml.",
    "Lab.place": "Where the lab lives: the current network namespace or one of its own.",
    "Lab.uplink": "What connects a private place to the outside.",
    "Lab.timeout": "Seconds until every guest must be ready.",
    "Lab.overcommit": "Whether guests may have more memory than the machine has to give.",
    "Network.mode": "How the network meets the outside; libvirt's names.",
    "Network.bridge": "The bridge's interface name; by default virbr0 for `default`, else br-NAME.",
    "Network.address": "This machine's address there with its prefix length, or auto.",
    "Network.dhcp": "Whether dnsmasq gives out addresses, or the range that it serves.",
    "Network.dns": "Whether dnsmasq answers for the names of guests and hosts.",
    "Network.domain": "The DNS domain of those names.",
    "Network.uplink": "The interface that traffic leaves by, or, of a bridge, its way to a LAN.",
    "Network.tftp": "A directory that dnsmasq serves by TFTP, relative to the file.",
    "Network.external": "Whether the bridge is somebody else's, there already and left as it is.",
    "Network.mac": "The bridge's MAC address; by default derived from the names.",
    "Network.mtu": "The MTU of the bridge and its ports; by default the uplink's, at most 1500.",
    "Network.stp": "Whether the bridge runs the spanning tree protocol.",
    "Dhcp.range": "The first and the last address; by default all of the subnet.",
    "Dhcp.lease": "How long a lease holds, two minutes or more.",
    "Dhcp.boot": "What a guest gets that boots from the network: a file below tftp, or a URL.",
    "Forward.port": "The port on this machine.",
    "Forward.to": "The guest's port; by default the same.",
    "Forward.protocol": "TCP or UDP.",
    "Forward.address": "Where this machine listens; by default on loopback alone.",
    "Nic.network": "The network that the NIC is on, if it is on one.",
    "Nic.wire": "The wire that the NIC is on, together with one NIC of another guest.",
    "Nic.backend": "What is behind the NIC: a tap on its network, or a way out without one.",
    "Nic.forward": "Ports of this machine that lead to the guest, by back-ends user and passt.",
    "Nic.model": "The device that the guest sees; by default virtio, as the machine has it.",
    "Nic.address": "The address that DHCP reserves for it.",
    "Nic.mac": "The guest's MAC address; by default derived from the names.",
    "Nic.queues": "Queues of a virtio NIC on a network.",
    "Nic.tap": "The tap's interface name; by default GUEST-INDEX.",
    "Nic.link": "Whether its cable is in.",
    "Nic.rate": "What it receives and sends at most, in bit/s: 10mbit; or both in a table.",
    "Rates.in": "What the node receives at most: 10mbit, 1gbit, a number of bit/s.",
    "Rates.out": "What the node sends at most.",
    "HostNic.network": "The network that the NIC is on.",
    "HostNic.address": "A static address with its prefix length, or dhcp (the default).",
    "HostNic.gateway": "The default route: the network's, an address, or none.",
    "HostNic.mac": "The MAC address; by default derived from the names.",
    "HostNic.rate": "What it receives and sends at most, as a guest's NIC.",
    "Guest.image": "tiny (built in), none, or the path of a disk image, relative to the file.",
    "Guest.format": "The image's format.",
    "Guest.backing": "What the image is an overlay of, layer by layer.",
    "Guest.bus": "The bus of the image's disk.",
    "Guest.persistent": "Whether the guest writes to the image itself.",
    "Guest.memory": "Memory: 256M, 1G, or a number of MiB.",
    "Guest.cpus": "Virtual CPUs.",
    "Guest.machine": "QEMU's machine type.",
    "Guest.accel": "QEMU's accelerator; auto takes KVM where it is seen to work.",
    "Guest.firmware": "The firmware: SeaBIOS, or the UEFI firmware that is installed.",
    "Guest.boot": "Boot from the disk, or from the network first.",
    "Guest.kernel": "A kernel to boot directly, relative to the file.",
    "Guest.initrd": "The initramfs of that kernel, relative to the file.",
    "Guest.cmdline": "The command line of that kernel.",
    "Guest.user_data": "cloud-init's user data: a path, or the text (of several lines).",
    "Guest.ssh_keys": "Public SSH keys for cloud-init's user, or paths of files of them.",
    "Guest.ports": "PCIe ports of a q35, for NICs and disks that come and go; by default 4.",
    "Guest.vnc": "true: VNC on a Unix socket; a number: that display, on loopback.",
    "Guest.video": "The display adapter; by default VGA with vnc, else none.",
    "Guest.nics": "The guest's NICs, in its order.",
    "Guest.disks": "The guest's other disks.",
    "Guest.after": "Guests that have to be ready before this one is started.",
    "Guest.ready": "What is waited for: lease, agent, tcp:PORT, console:REGEX or none.",
    "Guest.restart": "When `netorch watch` starts it again: no, on-failure or always.",
    "Disk.file": "A qcow2 or raw file or a block device, relative to the file.",
    "Disk.size": "The size of a new empty disk: 512M, 10G.",
    "Disk.format": "The format of what is in the file.",
    "Disk.backing": "What the file is an overlay of, layer by layer.",
    "Disk.bus": "What the guest sees the disk on.",
    "Disk.name": "What the disk is called; by default disk0, disk1, ...",
    "Disk.serial": "The serial number that the guest sees; by default the name.",
    "Disk.persistent": "Whether the guest writes to the file itself.",
    "Disk.readonly": "Whether the guest can only read.",
    "Disk.cdrom": "Whether the guest sees a CD-ROM drive with the file in it.",
    "Layer.file": "A file that the layer above it is an overlay of, relative to the file.",
    "Layer.format": "Its format.",
    "Host.nics": "The host's NICs: eth0, eth1, ...",
    "Taps.network": "The network that the taps are on.",
    "Taps.count": "How many; they are called NAME0, NAME1, ...",
    "Taps.owner": "The user, by name or number, who may open them; by default root alone.",
    "Taps.queues": "Queues of each tap.",
    "Expect.from": "The guest or host that tries, several of them, or network:NAME for all there.",
    "Expect.to": "A guest or host, gateway, an IPv4 address, or a DNS name.",
    "Expect.by": "How: ping, tcp:PORT, udp:PORT, dns:NAME or dhcp.",
    "Expect.reach": "Whether it must get there, or must not.",
    "Expect.seen_as": "The source address that the far side has to see.",
    "Expect.within": "Seconds until it must have worked, or for which it must not; 10 and 2.",
}


def schema() -> dict[str, Any]:
    """The schema in the dialect of draft 2020-12, every key with its description."""
    made = msgspec.json.schema(Topology)
    definitions = made["$defs"]
    for key, description in DESCRIPTIONS.items():
        table, _, name = key.partition(".")
        definitions[table]["properties"][name]["description"] = description
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "netorch topology",
        "description": "One QEMU network lab: its networks, guests, hosts and taps.",
        **_plain(made),
    }


def _plain(part: Any) -> Any:
    """Without the look-ahead that Python's `$` needs and some validators' expressions lack."""
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [_plain(value) for value in part]
    return part.removesuffix(r"(?!\n)") if isinstance(part, str) else part
