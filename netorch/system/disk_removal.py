"""Taking disks from guests that run.

A disk whose overlay or volume goes is unplugged right before that file is deleted, so that no guest
ever writes to a file that has no name any more. Others are unplugged when their guest is updated
(netorch.system.disk_changes). Order: device_del, DEVICE_DELETED, then the nodes from the top, the
descriptors, and the spec last. So a spec without its device is what a killed run leaves, here as in
plugging, and `clear` takes away whatever is there of it.
"""

from collections.abc import Collection, Sequence

from netorch.disk_devices import PluggedDisk, device_id, nodes
from netorch.nic_devices import SPEC
from netorch.resources import Guest
from netorch.system.guest_devices import look, reach
from netorch.system.hotplug import ask_to_let_go, await_gone, resume
from netorch.system.processes import Marked
from netorch.system.qmp import Qmp
from netorch.system.scope import Scope


def unplug(scope: Scope, process: Marked, names: Collection[str]) -> None:
    """Take disks from a running guest; silent for those that it doesn't have."""
    assert isinstance(process.resource, Guest)
    guest = process.resource.name
    with reach(scope, guest) as qmp:
        qmp.ready()
        seen = look(qmp, process)
        gone = [plugged for plugged in seen.disks if plugged.disk.name in names]
        if gone:
            resume(scope, qmp, guest, seen.state)
        leaving = leave(qmp, gone, seen.devices)
        finish(qmp, gone, leaving, guest)


def leave(qmp: Qmp, gone: Sequence[PluggedDisk], present: Collection[str]) -> list[str]:
    """Ask the guest to let go of disks; the devices that it is to let go of."""
    devices = [device_id(plugged.disk.name) for plugged in gone]
    return list(ask_to_let_go(qmp, [device for device in devices if device in present]))


def finish(qmp: Qmp, gone: Sequence[PluggedDisk], leaving: Collection[str], guest: str) -> None:
    """Wait until they have gone, and clear what is left of them."""
    for plugged in gone:
        device = device_id(plugged.disk.name)
        if device in leaving:
            await_gone(qmp, device, plugged.disk.describe(), guest)
        clear(qmp, plugged)


def clear(qmp: Qmp, plugged: PluggedDisk) -> None:
    """What is left of a disk without its device: any part of it may be missing."""
    present = block_nodes(qmp)
    for node in nodes(plugged.disk):
        if node in present:
            qmp.ask("blockdev-del", {"node-name": node})
    present_sets = descriptor_sets(qmp)
    for number in plugged.sets:
        if number in present_sets:
            qmp.ask("remove-fd", {"fdset-id": number})
    qmp.ask("object-del", {"id": device_id(plugged.disk.name) + SPEC})


def block_nodes(qmp: Qmp) -> set[str]:
    """The names of all block nodes."""
    return {node["node-name"] for node in qmp.ask("query-named-block-nodes", {"flat": True})}


def descriptor_sets(qmp: Qmp) -> set[int]:
    """The numbers of all sets of descriptors."""
    return {one["fdset-id"] for one in qmp.ask("query-fdsets")}
