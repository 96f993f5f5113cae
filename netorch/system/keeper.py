"""The keeper: the parent of a lab's guests. It knows how they end, and bounds their logs.

A script (`python -I -S -E keeper.py ...`) without any import of netorch's, in two roles:

    keeper.py LAB         PID 1 of a private place. While it lives the namespaces exist, and when it
                          dies the kernel kills every process in them.
    keeper.py keep RUN    outside of a private place; ends with the last of its children

PID 1 is on a leash until its place is complete: standard input, whose other end only the creator
has. The creator writes the name of the uplink, and its death before that reads as end of file,
which ends this process. The answer on standard output says that the place will stay. The name of
this process in `ps` is `netorch:<uplink>` from then on.

How a guest ended: its directory in the run directory has a file `process` with the pid that the
keeper knows it by; once that has ended, the file is renamed to `ended`, with the status in it.
Renaming claims it: a guest whose directory is being removed, or that was started again, is not
written about.

Logs: a guest writes what it likes to its serial console, and QEMU writes on into the same file. So
a log that has grown over _LIMIT bytes is cut to its last half, in place. The kernel tells of
changes (F_NOTIFY, once each time); what a guest writes within the next second then waits, so that a
chatty one costs one look a second.
"""

import fcntl
import os
import signal
import sys
import time

_LIMIT = 2 << 20
_PAUSE = 1.0
_CHANGES = fcntl.DN_MODIFY | fcntl.DN_CREATE | fcntl.DN_RENAME


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGIO})
    if sys.argv[1:2] == ["keep"]:
        Keeper(sys.argv[2], stay=False).run()
        return
    uplink = os.read(0, 32).decode()
    if not uplink:
        sys.exit(1)
    with open("/proc/self/comm", "w") as comm:
        comm.write(f"netorch:{uplink}")
    os.write(1, b"complete")
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    Keeper(os.environ["NETORCH_RUN"], stay=True).run()


class Keeper:
    """Waits for signals. `stay`: also without children."""

    def __init__(self, run: str, stay: bool) -> None:
        self._run = run
        self._stay = stay
        self._watched: dict[str, int] = {}

    def run(self) -> None:
        """Returns on SIGTERM, or with the last child."""
        look_at: float | None = 0.0
        while self._reap() or self._stay:
            wait = 3600.0 if look_at is None else max(0.0, look_at - time.monotonic())
            heard = signal.sigtimedwait({signal.SIGTERM, signal.SIGCHLD, signal.SIGIO}, wait)
            if heard is None:
                self._look()
                look_at = None
            elif heard.si_signo == signal.SIGTERM:
                return
            elif heard.si_signo == signal.SIGIO:
                look_at = time.monotonic() + _PAUSE

    def _reap(self) -> bool:
        """Note the ends of children; whether there are more."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return False
            if ended is None:
                return True
            self._note(ended)

    def _note(self, ended: os.waitid_result) -> None:
        verb = "exited" if ended.si_code == os.CLD_EXITED else "killed"
        for directory in self._guests():
            process = f"{directory}/process"
            try:
                with open(process) as file:
                    if file.read() != str(ended.si_pid):
                        continue
                os.rename(process, f"{directory}/ended")
                fd = os.open(f"{directory}/ended", os.O_WRONLY | os.O_TRUNC)  # never made anew
            except FileNotFoundError:
                continue  # it is being removed, or has never been started
            os.write(fd, f"{verb} {ended.si_status} {int(time.time())}\n".encode())
            os.close(fd)

    def _guests(self) -> list[str]:
        try:
            return [entry.path for entry in os.scandir(f"{self._run}/guests")]
        except FileNotFoundError:
            return []

    def _look(self) -> None:
        """Ask for news of all directories with logs, then bound what is there."""
        directories = [self._run, f"{self._run}/guests", *self._guests()]
        for gone in self._watched.keys() - set(directories):
            os.close(self._watched.pop(gone))
        for directory in directories:
            self._watch(directory)
            try:
                logs = [entry.path for entry in os.scandir(directory)]
            except FileNotFoundError:
                continue
            for log in logs:
                if log.endswith(".log"):
                    bound(log)

    def _watch(self, directory: str) -> None:
        if directory not in self._watched:
            try:
                self._watched[directory] = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                return
        fcntl.fcntl(self._watched[directory], fcntl.F_NOTIFY, _CHANGES)


def bound(log: str) -> None:
    """Cut a log that is too long to its last half, at a line. Who writes to it appends."""
    try:
        with open(log, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a lab may have several keepers
            size = os.fstat(file.fileno()).st_size
            if size <= _LIMIT:
                return
            file.seek(size - _LIMIT // 2)
            kept = b"[netorch cut this log here]\n" + file.read().partition(b"\n")[2]
            file.seek(0)
            file.write(kept)
            file.flush()
            file.truncate(len(kept))  # what was written since the reading goes
    except FileNotFoundError:
        return  # deleted meanwhile


if __name__ == "__main__":
    main()
