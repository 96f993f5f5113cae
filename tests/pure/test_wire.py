"""The messages between netorch.Lab and its agents."""

import socket
from typing import Any

from netorch import wire


def test_who_has_read_a_message_may_be_gone_at_once() -> None:
    ours, theirs = socket.socketpair()

    class Slow(socket.socket):
        """The other end acts on what was sent before this one goes on."""

        def send(self, data: Any, flags: int = 0) -> int:
            sent = super().send(data, flags)
            theirs.recv(sent)
            theirs.close()
            return sent

    with Slow(fileno=ours.detach()) as channel:
        wire.send(channel, wire.End())
