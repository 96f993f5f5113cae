"""A piece of work in a forked child: for work that needs threads.

A process that has entered a private place can't have threads: it is to have its children in another
PID namespace than its own, and clone() refuses a thread to such a process (clone(2), CLONE_THREAD).
Its child is in that namespace altogether, and can.

An interruption reaches the child once, from the terminal or from here, whichever comes first, and
is waited for: so the child has cleaned up when `in_child` raises.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from netorch.errors import NetorchError


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` returns. Raises NetorchError if it fails, with its traceback on stderr."""
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _run(work, sending)
    os.close(sending)
    try:
        with os.fdopen(receiving, "rb") as pipe:
            result = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGINT)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        raise NetorchError(
            f"failed to finish: the process that did the work ended with {code}",
            "was the lab taken down meanwhile?" if code == -signal.SIGKILL else "",
        )
    return result


def _run(work: Callable[[], bytes], sending: int) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _once)
        result = work()
        with os.fdopen(sending, "wb") as pipe:
            pipe.write(result)
        code = 0
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the parent has been interrupted, or is gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _once(*_: object) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
