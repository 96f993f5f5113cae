"""A guest's screen and keyboard, by QMP.

Pictures: QEMU, which has little access to the file system, is given a descriptor of an anonymous
file (add-fd), writes PPM there (screendump), and `png` makes the file of it.

Keys: QEMU presses and releases them by a timer, from a queue of 1,024 entries that drops what is
too much (ui/input.c), and the emulated keyboard has room for 16 bytes. QEMU tells nobody when a key
has been pressed. So each combination is sent when the one before must be done.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from netorch.errors import NetorchError
from netorch.keys import Combination
from netorch.png import png
from netorch.system.copying import beside
from netorch.system.qmp import Qmp, QmpError

HOLD = 0.02  # seconds that a key is down, and then up

_FDSET = 0x6E6F  # QEMU counts its own from 0, and a set's number has to be said


def screenshot(qmp: Qmp, guest: str, file: Path) -> None:
    """Write what the guest's screen shows as PNG. Raises NetorchError."""
    try:
        with os.fdopen(os.memfd_create("screen"), "rb") as picture:
            path = f"/proc/self/fd/{picture.fileno()}"
            written = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # QEMU looks at how it was opened
            try:
                qmp.ask("add-fd", {"fdset-id": _FDSET}, [written])
            finally:
                os.close(written)
            try:
                qmp.ask("screendump", {"filename": f"/dev/fdset/{_FDSET}"})
            finally:
                qmp.ask("remove-fd", {"fdset-id": _FDSET})
            with beside(file.resolve()) as made:
                for part in png(picture):
                    made.write(part)
    except QmpError as error:
        if "no console" in error.message:
            raise NetorchError(
                f"guest {guest} has no screen", 'write `vnc = true` or `video = "VGA"` in its table'
            ) from error
        raise
    except OSError as error:
        raise NetorchError(f"failed to write {file}: {error.strerror}") from error


def known_keys(qmp: Qmp) -> frozenset[str]:
    """The names of all keys that this QEMU has."""
    for entry in qmp.ask("query-qmp-schema"):
        # An enumeration has a number for its name (docs/devel/qapi-code-gen, introspection).
        if entry["meta-type"] == "enum" and "kp_enter" in entry["values"]:
            return frozenset(entry["values"]) - {"unmapped"}
    raise NetorchError("this QEMU does not say which keys it has")


def press(qmp: Qmp, guest: str, combinations: Iterable[Combination]) -> None:
    """Press combinations one after the other; returns when the last one is released."""
    state = qmp.ask("query-status")["status"]
    if state != "running":
        raise NetorchError(f"guest {guest} takes no keys: it is {state}")
    for keys in combinations:
        wanted = [{"type": "qcode", "data": key} for key in keys]
        qmp.ask("send-key", {"keys": wanted, "hold-time": round(HOLD * 1000)})
        time.sleep(2 * HOLD * len(keys))
