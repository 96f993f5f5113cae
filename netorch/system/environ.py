"""What a process was executed with, as /proc/PID/environ has it.

Kernel threads and zombies have no memory, so that file reads empty, or can't be opened (as on Linux
6.18). And it reads empty for some microseconds of every exec: while the kernel swaps the memories,
and from then until it says where the new environment is (fs/exec.c, begin_new_exec;
fs/binfmt_elf.c, create_elf_tables). A look at just that moment would take a process of a lab for
somebody else's.

So what is empty is looked at again, if it has a program in /proc/PID/exe: kernel threads and
zombies have none, and cost no more than this question. A process whose exec is over says in
/proc/PID/stat where its code is (fs/binfmt_elf.c does that last) and where its environment begins
and ends.
"""

import os
import time

_EXEC_SECONDS = 5.0  # an exec may have to wait for its program's disk
# proc(5), counted from the one after the name.
_START_CODE, _ENV_START, _ENV_END = 26 - 3, 50 - 3, 51 - 3


def environment_of(pid: int) -> bytes:
    """The environment of a process, each entry ended by a zero byte. Raises OSError."""
    text = _read(pid)
    return text if text or not _has_program(pid) else _after_exec(pid)


def _read(pid: int) -> bytes:
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        return file.read()


def _has_program(pid: int) -> bool:
    return os.access(f"/proc/{pid}/exe", os.F_OK)


def _after_exec(pid: int) -> bytes:
    """No event tells of the end of an exec, so this gives the processor away until it is there."""
    deadline = time.monotonic() + _EXEC_SECONDS
    while _has_program(pid) and time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        if fields[_START_CODE] != b"0" and fields[_ENV_START] == fields[_ENV_END]:
            return b""  # it was executed without any
        if text := _read(pid):
            return text
        os.sched_yield()
    return b""
