"""The QEMU processes of a lab's guests, and what they say of themselves."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from netorch.system.namespaces import wait_exit
from netorch.system.processes import Marked, end, leaders, marked
from netorch.system.scope import Scope

UNREACHABLE = "unreachable"
_KEEPER_SECONDS = 5.0


def directory_of(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest


def running(scope: Scope) -> dict[str, list[Marked]]:
    """The lab's QEMU processes by key."""
    found = leaders(marked(scope))
    return {key: processes for key, processes in found.items() if key.startswith("guest:")}


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
