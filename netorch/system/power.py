"""The power of running guests: the button, the plug, and standing still, by QMP."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from netorch.errors import UsageError
from netorch.system import saved
from netorch.system.guest_processes import directory_of, end_guests, end_is_meant, running
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope
from netorch.system.watch import Watch


def stop(
    scope: Scope, guests: Sequence[str], seconds: float, progress: Callable[[str], None]
) -> None:
    """Press the power button of guests; those that still run after `seconds` are ended.

    A guest that doesn't run is left alone. Raises KernelError for a QEMU that can't be ended.
    """
    found = running(scope)
    began = time.monotonic()
    left = {f"guest:{name}": name for name in guests if f"guest:{name}" in found}
    with Watch() as watch:
        for key in left:
            for process in found[key]:
                watch.process(process, key)
        if seconds > 0:
            for name in left.values():
                _press(scope, name, progress)
        while left and (rest := began + seconds - time.monotonic()) > 0:
            _changed, ended = watch.wait(rest)
            for key in ended & left.keys():
                progress(f"{left.pop(key)} is off after {time.monotonic() - began:.1f} s")
    for name in left.values():
        end_is_meant(scope, name)
    end_guests(scope, [process for key in left for process in found[key]])
    for name in left.values():
        late = f": it did not switch itself off within {seconds:.0f} s" if seconds > 0 else ""
        progress(f"{name} was ended{late}")


def tell(scope: Scope, guests: Iterable[str], command: str) -> None:
    """Send one QMP command to each. Raises UsageError for a guest that doesn't run, QmpError."""
    for name in guests:
        with session(scope, name) as qmp:
            if command == "cont":
                saved.drop(scope, name)
            qmp.ask(command)


def _press(scope: Scope, name: str, progress: Callable[[str], None]) -> None:
    try:
        with session(scope, name) as qmp:
            state = qmp.ask("query-status")["status"]
            if state == "postmigrate" and saved.path(scope, name).exists():
                qmp.ask("quit")  # a `save` was killed when all but this was done
                return
            if state != "running":
                saved.drop(scope, name)
                qmp.ask("cont")  # one that stands still can't hear it
            qmp.ask("system_powerdown")
    except (QmpError, UsageError) as error:
        progress(f"{name}: {error.message}")  # then it is ended when the time is up


@contextlib.contextmanager
def session(scope: Scope, name: str) -> Iterator[Qmp]:
    """A QMP session with a guest. Raises UsageError if it doesn't run, QmpError."""
    try:
        connected = Qmp(directory_of(scope, name) / "qmp.sock", name)
    except QmpError as error:
        if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
            raise UsageError(f"guest {name} does not run", f"netorch start {name}") from error
        raise
    with connected as qmp:
        qmp.ready()
        yield qmp
