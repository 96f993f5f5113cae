"""PID 1 of a private place; run as a script (`python -I -S -E place_init.py LAB`), never imported.

It holds the place: while it lives the namespaces exist, and when it dies the kernel kills every
process in them. standard input is the leash, whose other end only the creator has: the creator
writes the name of the uplink once the place is complete, and its death before that reads as end of
file, which ends this process. The answer on standard output says that the place will stay. The name
of this process in `ps` is `netorch:<uplink>` from then on. The kernel reaps children of a process
that ignores SIGCHLD, so nothing is left to do but to wait for SIGTERM.
"""

import os
import signal
import sys


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
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
    signal.sigwait({signal.SIGTERM})


main()
