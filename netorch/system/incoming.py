"""Starting QEMU from a state file instead of booting it.

QEMU is started with `-incoming defer` and -S, and gets by QMP first the capabilities of the
migration (here only `events`: its end is told and not asked for), then the open file, named by
getfd, and reads it from where it stands. A QEMU that can't make sense of the stream ends, and has
said why on stderr. One that can stands still then ("paused"), whatever it did when it was saved.

QEMU 9.1 and later warn that fd: is meant for pipes and sockets; they go on taking files.
"""

from collections.abc import Iterable

from netorch.system.qmp import Qmp, QmpError

_NAME = "state"  # of the descriptor in QEMU


def begin(qmp: Qmp, state: int, capabilities: Iterable[str] = ()) -> None:
    """Let a QEMU that waits for its state read it from a descriptor. Raises QmpError."""
    qmp.ask("migrate-incoming", {"uri": hand_over(qmp, state, capabilities)})


def finish(qmp: Qmp) -> None:
    """Wait until the state is in. Raises QmpError if it doesn't get there."""
    if wait_migrated(qmp) != "completed":
        raise QmpError("QEMU failed to read the saved state")


def hand_over(qmp: Qmp, state: int, names: Iterable[str] = ()) -> str:
    """Give QEMU a descriptor for a migration; the address by which it knows it."""
    qmp.ask("migrate-set-capabilities", capabilities("events", *names))
    qmp.ask("getfd", {"fdname": _NAME}, [state])
    return f"fd:{_NAME}"


def capabilities(*names: str, on: bool = True) -> dict[str, object]:
    return {"capabilities": [{"capability": name, "state": on} for name in names]}


def wait_migrated(qmp: Qmp) -> str:
    """Wait for the end of a migration: completed, failed or cancelled."""
    ends = ("completed", "failed", "cancelled")
    event = qmp.wait_event(
        lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in ends
    )
    return str(event["data"]["status"])
