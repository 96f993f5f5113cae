"""Starting QEMU from a state file instead of booting it.

QEMU is started with `-incoming defer` and -S, and gets by QMP first the capabilities of the
migration (here only `events`: its end is told and not asked for), then the open file, named by
getfd, and reads it from where it stands. A QEMU that can't make sense of the stream ends, and has
said why on stderr. One that can stands still then ("paused"), whatever it did when it was saved.

QEMU 9.1 and later warn that fd: is meant for pipes and sockets; they go on taking files.
"""

import contextlib
import time
from collections.abc import Iterable

from netorch.errors import NetorchError
from netorch.system.qmp import Agent, Qmp, QmpError, agent_path
from netorch.system.scope import Scope

_NAME = "state"  # of the descriptor in QEMU
_AGENT_SECONDS = 10.0  # of an agent that is there: its guest goes on where it stopped

# What libvirt and QEMU itself (migration/options.c) use after a migration; milliseconds.
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}


def begin(qmp: Qmp, state: int, capabilities: Iterable[str] = ()) -> None:
    """Let a QEMU that waits for its state read it from a descriptor. Raises QmpError."""
    qmp.ask("migrate-incoming", {"uri": hand_over(qmp, state, capabilities)})


def finish(qmp: Qmp) -> None:
    """Wait until the state is in. Raises QmpError if it doesn't get there."""
    if wait_migrated(qmp) != "completed":
        raise QmpError("QEMU failed to read the saved state")


def hand_over(qmp: Qmp, state: int, capabilities: Iterable[str] = ()) -> str:
    """Give QEMU a descriptor for a migration; the address by which it knows it."""
    set_capabilities(qmp, ("events", *capabilities))
    qmp.ask("getfd", {"fdname": _NAME}, [state])
    return f"fd:{_NAME}"


def set_capabilities(qmp: Qmp, names: Iterable[str], on: bool = True) -> None:
    wanted = [{"capability": name, "state": on} for name in names]
    qmp.ask("migrate-set-capabilities", {"capabilities": wanted})


def wait_migrated(qmp: Qmp) -> str:
    """Wait for the end of a migration: completed, failed or cancelled."""
    ends = ("completed", "failed", "cancelled")
    event = qmp.wait_event(
        lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in ends
    )
    return str(event["data"]["status"])


def settle(scope: Scope, guest: str, qmp: Qmp) -> None:
    """What a guest that was away does not do by itself: show its bridges where it is, and look at
    the clock. The clock only if its agent is there and can.
    """
    qmp.ask("announce-self", _ANNOUNCE)
    ports = {port["label"]: port["frontend-open"] for port in qmp.ask("query-chardev")}
    if not ports.get("agent"):
        return
    # It sets the system's clock first, and then complains where there is no other to be set.
    with (
        contextlib.suppress(NetorchError),
        Agent(agent_path(scope, guest), guest, _AGENT_SECONDS, _AGENT_SECONDS) as agent,
    ):
        agent.ask("guest-set-time", {"time": time.time_ns()})
