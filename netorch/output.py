"""Lines for people: styled where a terminal shows them, plain where a file or a program gets them.

As https://no-color.org has it, a NO_COLOR that isn't empty takes the styles away.
"""

import errno
import os
import re
import sys
from typing import TextIO

# What the machine says no with, wherever it is met: a full disk, a file that is somebody else's. No
# traceback is needed to mend that.
FROM_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "magenta": 35}
_STYLES = re.compile(r"\x1b\[[;?0-9]*[a-zA-Z]")


def style(text: str, colour: str, bold: bool = False) -> str:
    return f"\x1b[{_COLOURS[colour]}{';1' * bold}m{text}\x1b[0m"


def unstyle(text: str) -> str:
    return _STYLES.sub("", text)


def silence() -> None:
    """Have the flush at exit say nothing of a standard output that can't be written."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def echo(text: str = "", err: bool = False) -> None:
    """A line on standard output or error."""
    echo_on(sys.stderr if err else sys.stdout, text)


def echo_on(out: TextIO | None, text: str) -> None:
    """A line on `out`, there at once; nothing where the stream was closed before we began."""
    if out is None:
        return
    if os.environ.get("NO_COLOR") or not out.isatty():
        text = unstyle(text)
    try:
        out.write(text + "\n")
    except UnicodeEncodeError:  # the name of a file may be any bytes
        safe = text.encode(out.encoding, "backslashreplace").decode(out.encoding)
        out.write(safe + "\n")
    out.flush()
