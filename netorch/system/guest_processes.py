"""The QEMU processes of a lab's guests, and what they say of themselves."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from netorch.errors import NetorchError
from netorch.system.namespaces import wait_exit
from netorch.system.processes import Marked, end, leaders, marked
from netorch.system.scope import Scope

UNREACHABLE = "unreachable"
_KEEPER_SECONDS = 20.0


def directory_of(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest


def running(scope: Scope) -> dict[str, list[Marked]]:
    """The lab's QEMU processes by key."""
    found = leaders(marked(scope))
    return {key: processes for key, processes in found.items() if key.startswith("guest:")}


@contextlib.contextmanager
def collected(errors: list[NetorchError]) -> Iterator[None]:
    """Remember an error and go on: guests that are handled side by side don't fail for each
    other.
    """
    try:
        yield
    except NetorchError as error:
        errors.append(error)


def end_is_meant(scope: Scope, guest: str) -> None:
    """Leave the keeper nothing to note about a guest: it is about to be ended by its person's
    will, which is no failure.
    """
    (directory_of(scope, guest) / "process").unlink(missing_ok=True)


def end_guests(scope: Scope, processes: Sequence[Marked]) -> None:
    """End QEMU processes, as `netorch.system.processes.end` does, and see keepers off that have no
    other child: a keeper ends by itself, but a moment later. Raises KernelError.
    """
    doomed = {process.pid for process in processes}
    everyone = marked(scope)
    needed = {p.parent for p in everyone if p.pid not in doomed}
    parents = {p.parent for p in processes} - needed
    pidfds = []
    for process in everyone:
        if process.resource is None and process.pid in parents:
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(process.pid))
    try:
        end(scope, processes)
        for pidfd in pidfds:
            wait_exit(pidfd, _KEEPER_SECONDS)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
