"""Making a template: boot a guest without a NIC, stop it, write its state down.

Its memory is a file from the beginning (share=on), which a migration with `x-ignore-shared` leaves
out, so that the stream holds the devices alone. The guest says on its console when there is nothing
left to do before it is copied (netorch/system/tiny-init.sh).

The QEMU is no lab's: it has no marks, no network and no capability, and the kernel ends it with the
thread that started it (PR_SET_PDEATHSIG), which waits for it here.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from netorch.errors import NetorchError
from netorch.guests import Descriptors
from netorch.system import incoming
from netorch.system.capabilities import confine
from netorch.system.qmp import Qmp, connect, listen
from netorch.system.templates import Unfit

_SECONDS = 120.0  # a boot takes two, and fifteen on a very busy machine
_SAYS = b"netorch-tiny: "
_FIT = b"fit to be copied"
_UNFIT = b"unfit to be copied: "
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def give_birth(words: Callable[[Descriptors, Path], list[str]], into: Path, scratch: Path) -> None:
    """Write `ram` and `state` into the directory `into`. Raises Unfit, OSError."""
    ram = into / "ram"
    with ram.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(listen(scratch / f"{n}.sock")) for n in ("q", "s", "a")]
        qmp = opened.enter_context(Qmp(scratch / "q.sock", "template"))
        console = opened.enter_context(connect(scratch / "s.sock", _SECONDS))
        numbers = [listener.fileno() for listener in listeners]
        fds = Descriptors(qmp=numbers[0], serial=numbers[1], agent=numbers[2])
        log = opened.enter_context((scratch / "qemu.log").open("w+"))
        process = _start(words(fds, ram), fds, scratch, log.fileno())
        opened.callback(process.wait)
        opened.callback(process.kill)
        try:
            _bring_up(qmp, console)
            state = os.open(into / "state", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            opened.callback(os.close, state)
            _write_down(qmp, state)
            qmp.ask("quit")
            process.wait()
            os.fsync(state)
        except NetorchError as error:
            if isinstance(error, Unfit):
                raise
            log.seek(0)
            said = log.read().strip()
            raise Unfit(f"its template can't be made: {said or error.message}") from error
    with ram.open("rb") as file:
        os.fsync(file.fileno())


def _bring_up(qmp: Qmp, console: socket.socket) -> None:
    qmp.ready()
    incoming.set_capabilities(qmp, ["x-ignore-shared"])  # if it can
    qmp.ask("cont")
    deadline = time.monotonic() + _SECONDS
    with console.makefile("rb") as lines:
        try:
            for line in lines:
                console.settimeout(max(0.1, deadline - time.monotonic()))
                said = line.partition(_SAYS)[2].strip()
                if said == _FIT:
                    return
                if said.startswith(_UNFIT):
                    raise Unfit(said.removeprefix(_UNFIT).decode(errors="replace"))
        except TimeoutError as error:
            raise Unfit(f"its template did not boot within {_SECONDS:.0f} s") from error
    raise Unfit("QEMU of its template has ended")


def _write_down(qmp: Qmp, state: int) -> None:
    qmp.ask("stop")
    qmp.ask("migrate", {"uri": incoming.hand_over(qmp, state, ("x-ignore-shared",))})
    if incoming.wait_migrated(qmp) != "completed":
        raise Unfit("QEMU failed to write the state of its template")


def _start(
    words: list[str], fds: Descriptors, directory: Path, log: int
) -> "subprocess.Popen[bytes]":
    parent = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def be_bound() -> None:
        confine(())
        prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        words,
        cwd=directory,
        env={name: value for name, value in os.environ.items() if not name.startswith("NETORCH_")},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(fds.qmp, fds.serial, fds.agent),
        start_new_session=True,
        preexec_fn=be_bound,
    )
