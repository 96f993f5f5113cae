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
from pathlib import Path
from typing import NoReturn

from netorch.errors import MissingError
from netorch.system import place_birth
from netorch.system.places import Place
from netorch.system.processes import program
from netorch.system.rundir import leave

UPLINK = "none"


class OwnedPlace:
    """The place, from within. `end` is to be called by the process that made it."""

    def __init__(self, lab: str, run: Path) -> None:
        """Make the place and move in. Raises MissingError where the machine doesn't allow it."""
        cat = program("cat")
        if cat is None:
            raise MissingError("cat is not installed", "it is in coreutils, or busybox")
        inode = place_birth.settle(lab, run)
        name = run / "netns" / f"netorch:{UPLINK}"
        name.symlink_to(cat)
        marks = {**place_birth.marks_of(lab, inode), "NETORCH_PRIVATE": "1"}
        reader, self._leash = os.pipe()
        self._init = os.fork()
        if self._init == 0:
            _become_init(name, marks, reader)
        os.close(reader)
        self._run = run
        self.place = Place(lab=lab, private=True, inode=inode, init=self._init, uplink=UPLINK)

    def end(self) -> None:
        """Kill all that runs in the place, wait until it is gone, and let go of its mounts."""
        os.kill(self._init, signal.SIGKILL)  # a child that has not been waited for: still itself
        with suppress(ChildProcessError):
            while True:  # its own children first: PID 1 stays until they have been reaped
                os.waitpid(-1, 0)
        os.close(self._leash)
        leave(self._run)


def _become_init(name: Path, marks: dict[str, str], leash: int) -> NoReturn:
    try:
        os.setsid()
        os.dup2(leash, 0)
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; it survives the exec
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(name, ["cat"], marks)
    finally:
        os._exit(1)
