"""The QEMU processes of a lab's guests, and what they say of themselves."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from netorch.system.processes import Marked, leaders, marked
from netorch.system.qmp import Qmp, QmpError
from netorch.system.scope import Scope

UNREACHABLE = "unreachable"


def directory_of(scope: Scope, guest: str) -> Path:
    return scope.run / "guests" / guest


def running(scope: Scope) -> dict[str, list[Marked]]:
    """The lab's QEMU processes by key."""
    found = leaders(marked(scope))
    return {key: processes for key, processes in found.items() if key.startswith("guest:")}


def run_states(scope: Scope, names: Sequence[str]) -> Mapping[str, str]:
    """The run state of each guest. All are asked before the first answer is awaited."""
    states = {}
    with contextlib.ExitStack() as opened:
        asked = {}
        for name in names:
            states[name] = UNREACHABLE
            with contextlib.suppress(QmpError, FileNotFoundError):
                asked[name] = opened.enter_context(
                    Qmp(directory_of(scope, name) / "qmp.sock", name)
                )
                asked[name].send("query-status")
        for name, qmp in asked.items():
            with contextlib.suppress(QmpError):
                qmp.ready()
                states[name] = qmp.answer("query-status")["status"]
    return states
