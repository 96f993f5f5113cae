"""The power button, with a QEMU that is played by the test."""

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from netorch.system import power
from netorch.system.guest_processes import directory_of
from netorch.system.processes import marked
from netorch.system.qmp import listen
from netorch.system.scope import Scope
from netorch.system.starting import start
from tests.guest_shapes import guest


class Played:
    """A QEMU whose guest hears only the last of so many presses; 0: none at all."""

    def __init__(self, pid: int, hears: int) -> None:
        self.presses = 0
        self._pid = pid
        self._hears = hears

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb", buffering=0) as lines:
                lines.write(b'{"QMP": {}}\n')
                for line in lines:
                    answer = self._answer(json.loads(line)["execute"])
                    lines.write(json.dumps(answer).encode() + b"\n")

    def _answer(self, command: str) -> dict[str, object]:
        if command == "system_powerdown":
            self.presses += 1
            if self.presses == self._hears:
                os.kill(self._pid, signal.SIGKILL)
        return {"return": {"status": "running"} if command == "query-status" else {}}


@contextmanager
def played(scope: Scope, hears: int) -> Iterator[Played]:
    directory = directory_of(scope, "vm1")
    directory.mkdir(parents=True, exist_ok=True)
    with listen(directory / "qmp.sock") as listener:
        process = start(scope, guest(), ["/bin/sleep", "1000"], log=directory / "qemu.log")
        qemu = Played(process.pid, hears)
        thread = threading.Thread(target=qemu.serve, args=[listener])
        thread.start()
        try:
            yield qemu
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # ends accept()
            thread.join()
            process.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_AGAIN", 0.01)


def test_a_press_that_nobody_heard_is_repeated(scope: Callable[..., Scope]) -> None:
    lab = scope()
    said: list[str] = []
    with played(lab, hears=3) as qemu:
        power.stop(lab, ["vm1", "vm2"], 30, said.append)
        assert qemu.presses >= 3
    (line,) = said
    assert re.fullmatch(r"vm1 is off after \d+\.\d s", line)


def test_who_hears_no_press_is_ended(scope: Callable[..., Scope]) -> None:
    lab = scope()
    said: list[str] = []
    with played(lab, hears=0) as qemu:
        power.stop(lab, ["vm1"], 0, said.append)
        assert qemu.presses == 0
    assert said == ["vm1 was ended"]
    with played(lab, hears=0) as qemu:
        power.stop(lab, ["vm1"], 0.1, said.append)
        assert qemu.presses > 0
    assert said[1:] == ["vm1 was ended: it did not switch itself off within 0 s"]
    assert marked(lab) == []
