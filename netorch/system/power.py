"""The power of running guests: the button, the plug, and standing still, by QMP.

QEMU drops a press that comes before the guest's kernel has enabled the button (hw/acpi/core.c,
acpi_pm1_evt_power_down), and what hears it in the guest may come later still. Nothing tells of
either, so `stop` presses again while it waits, as OpenStack's nova does each ten seconds. A guest
that shuts down already takes no notice of another press.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from netorch.errors import UsageError, not_running
from netorch.system import saved
from netorch.system.guest_processes import directory_of, end_guests, end_is_meant, running
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope
from netorch.system.watch import Watch

_AGAIN = 5.0  # seconds from one press of the button to the next


def stop(
    scope: Scope, guests: Sequence[str], seconds: float, progress: Callable[[str], None]
) -> None:
    """Press the power button of guests, again and again; those that still run after `seconds` are
    ended.

    A guest that doesn't run is left alone. Raises KernelError for a QEMU that can't be ended.
    """
    found = running(scope)
    began = press = time.monotonic()
    until = began + seconds
    left = {f"guest:{name}": name for name in guests if f"guest:{name}" in found}
    deaf: dict[str, str] = {}
    with Watch() as watch:
        for key in left:
            for process in found[key]:
                watch.process(process, key)
        while left and press < until:
            deaf = _press_all(scope, left.values())
            press = time.monotonic() + _AGAIN
            while left and (rest := min(press, until) - time.monotonic()) > 0:
                _changed, ended = watch.wait(rest)
                for key in ended & left.keys():
                    progress(f"{left.pop(key)} is off after {time.monotonic() - began:.1f} s")
    for name in left.values():
        end_is_meant(scope, name)
    end_guests(scope, [process for key in left for process in found[key]])
    for name in left.values():
        late = f": it did not switch itself off within {seconds:.0f} s" if seconds > 0 else ""
        why = f" ({deaf[name]})" if name in deaf else ""
        progress(f"{name} was ended{late}{why}")


def tell(scope: Scope, guests: Iterable[str], command: str) -> None:
    """Send one QMP command to each. Raises UsageError for a guest that doesn't run, QmpError."""
    for name in guests:
        with session(scope, name) as qmp:
            if command == "cont":
                saved.drop(scope, name)
            qmp.ask(command)


def _press_all(scope: Scope, names: Iterable[str]) -> dict[str, str]:
    """Press the buttons; by name, those that could not be, and why: who ends just now can't."""
    deaf = {}
    for name in names:
        try:
            _press(scope, name)
        except (QmpError, UsageError) as error:
            deaf[name] = error.message
    return deaf


def _press(scope: Scope, name: str) -> None:
    with session(scope, name) as qmp:
        state = qmp.ask("query-status")["status"]
        if state == "postmigrate" and saved.path(scope, name).exists():
            qmp.ask("quit")  # a `save` was killed when all but this was done
            return
        if state != "running":
            saved.drop(scope, name)
            qmp.ask("cont")  # one that stands still can't hear it
        qmp.ask("system_powerdown")


@contextlib.contextmanager
def session(scope: Scope, name: str) -> Iterator[Qmp]:
    """A QMP session with a guest. Raises UsageError if it doesn't run, QmpError."""
    try:
        connected = Qmp(directory_of(scope, name) / "qmp.sock", name)
    except QmpError as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise not_running(name) from error
        raise
    with connected as qmp:
        qmp.ready()
        yield qmp
