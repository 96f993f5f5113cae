"""The guest agent's protocol, against an agent of the test's own."""

import base64
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from netorch.errors import ReadyError
from netorch.system import qmp
from netorch.system.qmp import Agent, Completed, listen

PID = 7


class FakeAgent:
    """Answers one client. Command PID ends by itself after so many questions, or by `signal`.
    What is `lost` is sent instead of the first answers.
    """

    def __init__(
        self,
        path: Path,
        asked: int,
        signal: str = "",
        late: float = 0.0,
        lost: Sequence[bytes] = (),
    ) -> None:
        self.commands: list[list[str]] = []
        self._lost = list(lost)
        self._left, self._signal, self._late = asked, signal, late
        self._listener = listen(path)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self) -> None:
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        time.sleep(self._late)
        with client, client.makefile("rwb") as lines:
            for line in lines:
                if self._lost:
                    lines.write(self._lost.pop(0))
                    lines.flush()
                    continue
                request = json.loads(line.rpartition(b"\xff")[2])
                answer = self._answer(request["execute"], request.get("arguments", {}))
                prefix = b"\xff" if request["execute"] == "guest-sync-delimited" else b""
                lines.write(prefix + json.dumps({"return": answer}).encode() + b"\n")
                lines.flush()

    def _answer(self, command: str, arguments: dict[str, Any]) -> object:
        if command == "guest-sync-delimited":
            return arguments["id"]
        if command == "guest-exec":
            self.commands.append([arguments["path"], *arguments["arg"]])
            if self._signal in arguments["arg"][-2:]:
                self._left = 0
            return {"pid": PID + len(self.commands) - 1}
        if arguments["pid"] != PID:
            return {"exited": True, "exitcode": 0}
        self._left -= 1
        if self._left >= 0:
            return {"exited": False}
        out = base64.b64encode(b"said").decode()
        return {"exited": True, "exitcode": 3, "out-data": out, "out-truncated": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def test_output_that_the_agent_has_cut_is_marked(path: Path) -> None:
    fake = FakeAgent(path, asked=3)
    with Agent(path, "vm1") as agent:
        assert agent.run(["true"]) == Completed(3, b"said", b"", cut=True)
    fake.end()
    assert fake.commands == [["true"]]


@pytest.mark.parametrize(("signal", "sent"), [("TERM", ["TERM"]), ("KILL", ["TERM", "KILL"])])
def test_a_command_is_ended_at_its_time_limit(
    signal: str, sent: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netorch.system.qmp._GRACE", 0.05)
    fake = FakeAgent(path, asked=1_000_000, signal=signal)
    with Agent(path, "vm1") as agent:
        done = agent.run(["sleep", "100"], seconds=0.01)
    fake.end()
    assert done == Completed(None, b"said", b"", cut=True)
    assert [command[-2:] for command in fake.commands[1:]] == [[s, str(PID)] for s in sent]


@pytest.mark.parametrize(
    "fate",
    [
        {"lost": [b"", b'": 1}\n{"return": 1}\n{"ret']},
        {"late": 0.2},  # it finds four requests, and the last answer counts
    ],
    ids=["an agent before it has lost requests", "it was asked before it was there"],
)
def test_synchronization(fate: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_SYNC_AGAIN", 0.02)
    fake = FakeAgent(path, asked=0, **fate)
    with Agent(path, "vm1") as agent:
        assert agent.run(["true"]).code == 3
    fake.end()


def test_a_guest_that_was_just_started_may_still_boot(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "_AGENT_SECONDS", 0.05)
    fake = FakeAgent(path, asked=0, late=0.2)
    with Agent(path, "vm1") as agent:
        assert agent.run(["true"]).code == 3
    fake.end()
    with listen(path):
        os.utime(path, (0, 0))
        with pytest.raises(ReadyError, match="agent of vm1 does not answer"):
            Agent(path, "vm1")
