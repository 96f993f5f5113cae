"""A private place that ends with the process that made it: where the labs of tests live.

The process moves into the new namespaces itself, and its next child becomes PID 1: `cat`, which
reads a pipe whose writing end only this process has. However this process ends, the pipe ends with
it, then PID 1, and then the kernel kills every process of the place; its links and mounts go with
the last of them. To others it is a private place as any (places.py): marks in the environment, and
a name `netorch:none`, which is that of a symbolic link, because a process can be named by its own
hand only.

It costs a fork and the kernel's work, where a place that shall outlive its maker takes the start of
a Python for its PID 1. An uplink would have to be started from outside, so there is none.
"""

import os
import signal
from contextlib import suppress
from functools import cache
from pathlib import Path

from netorch.errors import MissingError
from netorch.system import place_birth
from netorch.system.places import Place
from netorch.system.starting import program

UPLINK = "none"


class OwnedPlace:
    """The place, from within. `end` is to be called by the process that made it."""

    def __init__(self, lab: str, run: Path) -> None:
        """Make the place and move in. Raises MissingError where the machine doesn't allow it."""
        cat = _cat()
        inode = place_birth.settle(lab, run)
        name = run / "netns" / f"netorch:{UPLINK}"
        name.symlink_to(cat)
        marks = place_birth.init_marks(lab, run, inode)
        reader, self._leash = os.pipe()
        try:
            self._init = _start_init(name, marks, reader)
        finally:
            os.close(reader)
        self.place = Place(
            lab=lab, private=True, inode=inode, init=self._init, uplink=UPLINK, run=str(run)
        )

    def end(self) -> None:
        """Kill all that runs in the place, and wait until it is gone."""
        os.kill(self._init, signal.SIGKILL)  # a child that has not been waited for: still itself
        with suppress(ChildProcessError):
            while True:  # its own children first: PID 1 stays until they have been reaped
                os.waitpid(-1, 0)
        os.close(self._leash)


def warm() -> None:
    """Find what will be needed: for processes that others are forked from."""
    with suppress(MissingError):  # then whoever needs it will say so
        _cat()


@cache
def _cat() -> str:
    found = program("cat")
    if found is None:
        raise MissingError("cat is not installed", "it is in coreutils, or busybox")
    return found


def _start_init(name: Path, marks: dict[str, str], leash: int) -> int:
    """PID 1, by posix_spawn: that copies no page tables, so it costs a fifth of a fork."""
    actions = [
        (os.POSIX_SPAWN_DUP2, leash, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
    ]
    # Ignored, and that survives the exec: so the kernel reaps the orphans that come to PID 1.
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        return os.posix_spawn(
            name, ["cat"], marks, file_actions=actions, setsid=True, setsigmask=()
        )
    finally:
        signal.signal(signal.SIGCHLD, before)
