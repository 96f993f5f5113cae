"""What NICs and disks have in common that come and go while their guest runs.

To be unplugged takes the guest's help: device_del asks it, and DEVICE_DELETED comes when its system
has let go and QEMU has freed the device with all that it held (hw/core/qdev.c, device_finalize). A
guest that stands still lets go of nothing, so it is let run first.
"""

from collections.abc import Iterable, Iterator

from netorch.errors import NetorchError
from netorch.system import saved
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope

_UNPLUG_SECONDS = 15.0  # a Linux lets go within a second; under TCG on a busy machine, three
# How QEMU leaves a run state (qapi/run-state.json). From any other one only a new start leads on.
RESUME = {
    "prelaunch": "cont",
    "paused": "cont",
    "io-error": "cont",
    "postmigrate": "cont",  # it was about to be saved
    "suspended": "system_wakeup",
}
_PERIPHERAL = "/machine/peripheral/"


def resume(scope: Scope, qmp: Qmp, guest: str, state: str) -> None:
    """Let a guest run that is in this state, if it doesn't."""
    if state in RESUME:
        qmp.ask("migrate_cancel")  # where a `save` was killed, QEMU may be writing on
        saved.drop(scope, guest)
        qmp.ask(RESUME[state])


def ask_to_let_go(qmp: Qmp, devices: Iterable[str]) -> Iterator[str]:
    """Ask for devices that are there; those whose DEVICE_DELETED is still to come."""
    for device in devices:
        try:
            qmp.ask("device_del", {"id": device})
        except QmpError as error:
            if "not found" in error.message:  # an earlier run had asked for it
                continue
            if "in the process of unplug" not in error.message:
                raise
        yield device


def await_gone(qmp: Qmp, device: str, what: str, guest: str) -> None:
    """Wait until a guest has let go of a device. Raises NetorchError."""
    if not qmp.event("DEVICE_DELETED", device, _UNPLUG_SECONDS):
        raise NetorchError(
            f"failed to remove {what} from guest {guest}: its system does not "
            f"let go of the device within {_UNPLUG_SECONDS:g} s",
            "is it still booting? Then apply again; or take the guest out of the file, "
            "apply, and put it back in",
        )


def port_of(qmp: Qmp, device: str) -> str:
    """The port that a device is in; "": it is on the root bus."""
    bus: str = qmp.ask("qom-get", {"path": f"{_PERIPHERAL}{device}", "property": "parent_bus"})
    return bus.removeprefix(_PERIPHERAL).split("/")[0] if bus.startswith(_PERIPHERAL) else ""


class FreePorts:
    """The ports of a running guest that nothing is in."""

    def __init__(self, guest: str, machine: str, ports: Iterable[str]) -> None:
        self._guest = guest
        self._needed = machine == "q35"
        self._ports = list(ports)

    def take(self, what: str) -> str:
        """One for `what`; "": it needs none. Raises NetorchError."""
        if not self._needed:
            return ""
        if not self._ports:
            raise NetorchError(
                f"failed to add {what} to guest {self._guest}: all its ports are taken",
                "a USB controller keeps its port when its disks have gone: "
                f"`netorch restart {self._guest}` frees it",
            )
        return self._ports.pop(0)
