"""Waiting until guests are ready, each in its own sense (`ready` in the file).

    lease           dnsmasq has given it its addresses (netorch.system.leases)
    agent           its guest agent answers
    tcp:PORT        something in it listens on the port
    console:REGEX   its serial console has shown this since it was started
    none            nothing is waited for

One that goes on from a saved state is asked nothing that only a boot answers: leases and consoles.

A guest that comes `after` others is started when these are ready; at the end of an apply, all are
waited for. Leases, agents and consoles tell by themselves. Nothing tells when a guest begins to
listen on a port, so that is tried again, four times a second.
"""

import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from netorch import model
from netorch.errors import ReadyError
from netorch.planner import Action, Create, Plan
from netorch.resources import DhcpClient, Guest
from netorch.state import State
from netorch.system import leases, saved
from netorch.system.late import log_end
from netorch.system.qmp import Agent, agent_path
from netorch.system.scope import Scope
from netorch.system.watch import Watch

_AGAIN = 0.25


def start_line(guest: str) -> str:
    """What a guest's console log has before what the guest writes after a start."""
    return f"[netorch starts {guest}]\n"


class Readiness:
    """What an apply waits for. `guests` are those of the topology; `seconds` is for each wait."""

    def __init__(
        self,
        scope: Scope,
        guests: Mapping[str, model.Guest],
        desired: State,
        seconds: float,
        progress: Callable[[str], None],
    ) -> None:
        self._scope = scope
        self._guests = guests
        self._desired = desired
        self._seconds = seconds
        self._progress = progress
        self._ready: set[str] = set()
        self._restored = saved.states(scope).keys()

    def before(self, step: Sequence[Action], plan: Plan) -> None:
        """Wait for the guests that those of this step come after. Raises ReadyError."""
        starting = [a.new.name for a in step if isinstance(a, Create) and isinstance(a.new, Guest)]
        for name in starting:
            first = [other for other in self._guests[name].after if other not in self._ready]
            if first:
                self._progress(f"{name} waits for {', '.join(first)}")
                self._wait(first, plan)

    def all(self, plan: Plan) -> None:
        """Wait for all guests and hosts that were not waited for yet. Raises ReadyError."""
        self._wait([name for name in self._guests if name not in self._ready], plan, hosts=True)

    def _wait(self, names: Sequence[str], plan: Plan, hosts: bool = False) -> None:
        deadline = time.monotonic() + self._seconds
        started = {a.key for a in plan if isinstance(a, Create)} | {*leases.asking_anew(plan)}
        names = [n for n in names if not self._goes_on(n)]
        asking = {f"guest:{n}" for n in names if self._guests[n].ready == "lease"}
        others = [n for n in names if f"guest:{n}" not in asking]
        for name in others:
            if f"guest:{name}" in started:
                self._progress(f"{name} starts")
        awaited = State(
            resource
            for resource in self._desired
            if (resource.key in asking if isinstance(resource, Guest) else True)
            and (hosts or not isinstance(resource, DhcpClient))
        )
        leases.wait_ready(self._scope, awaited, started, self._seconds, self._progress)
        for name in others:
            # At the end of an apply, one that ran before has nothing to prove.
            if hosts and f"guest:{name}" not in started:
                continue
            self._wait_for(name, self._guests[name].ready, deadline)
        self._ready.update(names)

    def _goes_on(self, name: str) -> bool:
        kind = self._guests[name].ready.partition(":")[0]
        return name in self._restored and kind in ("lease", "console")

    def _wait_for(self, name: str, ready: str, deadline: float) -> None:
        kind, _, argument = ready.partition(":")
        if kind == "none":
            return
        if kind == "agent":
            left = max(1.0, deadline - time.monotonic())
            Agent(agent_path(self._scope, name), name, left).close()
            self._progress(f"{name}: its agent answers")
        elif kind == "console":
            self._wait_for_console(name, argument, deadline)
        else:
            self._wait_for_port(name, int(argument), deadline)

    def _wait_for_console(self, name: str, pattern: str, deadline: float) -> None:
        log = self._scope.run / "guests" / name / "serial.log"
        wanted = re.compile(pattern, re.MULTILINE)
        with Watch() as watch:
            watch.directory(log.parent)
            while not (found := wanted.search(_since_start(log, name))):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ReadyError(
                        f"the console of {name} has not shown {pattern!r} yet{log_end(log)}",
                        "the lab is up: see `netorch console`",
                    )
                watch.wait(left)
        self._progress(f"{name}: {found[0].strip()}")

    def _wait_for_port(self, name: str, port: int, deadline: float) -> None:
        guest = self._desired.get(f"guest:{name}")
        macs = {nic.mac for nic in guest.nics} if isinstance(guest, Guest) else set()
        reason = "it has no address yet"
        while (left := deadline - time.monotonic()) > 0:
            for lease in leases.read(self._scope):
                if lease.mac not in macs:
                    continue
                try:
                    socket.create_connection((lease.address, port), timeout=left).close()
                except OSError as error:
                    reason = f"{lease.address}: {error.strerror or error}"
                else:
                    self._progress(f"{name}: {lease.address} listens on port {port}")
                    return
            time.sleep(min(_AGAIN, left))
        raise ReadyError(
            f"{name} does not listen on port {port} yet ({reason})", "the lab is up: have a look"
        )


def _since_start(log: Path, name: str) -> str:
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return text.rpartition(start_line(name))[2]
