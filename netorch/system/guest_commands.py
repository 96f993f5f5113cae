"""Commands in a guest, several at a time, over one connection to its agent.

The agent serves one client at a time, so all probes of a guest share a connection: a lock is held
for the length of one request, never for that of a command. The agent tells of a command's end only
when asked, so `run` asks, at intervals from 5 to 100 ms. Every command is bounded by the guest's
own `timeout`, where the guest has one: so it ends even if netorch is killed.
"""

import base64
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from netorch.errors import NetorchError
from netorch.system.patience import Patience, Stopped
from netorch.system.qmp import Agent, Completed, QmpError, agent_path
from netorch.system.scope import Scope

_INTERVALS = (0.005, 0.01, 0.02, 0.05, 0.1)  # the last one repeats


class Inside:
    """A guest's agent. The connection is made by the first request, and closed by `close`."""

    def __init__(self, scope: Scope, guest: str, patience: Patience) -> None:
        self.guest = guest
        self._scope = scope
        self._patience = patience
        self._lock = threading.Lock()
        self._agent: Agent | None = None
        self._absent: NetorchError | None = None

    def close(self) -> None:
        with self._lock:
            if self._agent is not None:
                self._agent.close()
                self._agent = None

    def addresses(self) -> dict[str, list[str]]:
        """IPv4 addresses by MAC, as the guest has them now."""
        found: dict[str, list[str]] = {}
        for interface in self._ask("guest-network-get-interfaces", {}):
            there = interface.get("ip-addresses", [])
            v4 = [a["ip-address"] for a in there if a["ip-address-type"] == "ipv4"]
            found.setdefault(interface.get("hardware-address", ""), []).extend(v4)
        return found

    def run(self, argv: Sequence[str], seconds: float) -> Completed | None:
        """Run a command to its end; None if it takes longer once it is started, and then it is
        ended.
        """
        pid = self.start(argv)
        until = time.monotonic() + seconds
        asked = 0
        try:
            while not (status := self._ask("guest-exec-status", {"pid": pid}))["exited"]:
                now = time.monotonic()
                if now >= until:
                    self.end(pid)
                    return None
                self._patience.wait(now + _INTERVALS[min(asked, len(_INTERVALS) - 1)])
                asked += 1
        except Stopped:
            self.end(pid)
            raise
        out, err = (base64.b64decode(status.get(f"{name}-data", "")) for name in ("out", "err"))
        return Completed(status.get("exitcode", 128 + status.get("signal", 0)), out, err)

    def start(self, argv: Sequence[str]) -> int:
        """Start a command; its pid in the guest."""
        arguments = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        return int(self._ask("guest-exec", arguments)["pid"])

    def end(self, pid: int) -> None:
        """End a command that `start` started; one that has ended by itself is none the worse."""
        with suppress(NetorchError):  # a guest that does not answer any more has nothing to end
            self._ask("guest-exec", {"path": "/bin/kill", "arg": [str(pid)]})

    def _ask(self, command: str, arguments: dict[str, object]) -> Any:
        with self._lock:
            if self._absent is not None:
                raise self._absent  # found out once, by waiting for it; not by every probe again
            try:
                if self._agent is None:
                    self._agent = Agent(agent_path(self._scope, self.guest), self.guest)
            except NetorchError as error:
                self._absent = error
                raise
            try:
                return self._agent.ask(command, arguments)
            except QmpError as error:
                if isinstance(error.__cause__, OSError) or "closed" in error.message:
                    self._agent.close()  # what comes late would be taken for the next answer
                    self._agent = None
                raise
