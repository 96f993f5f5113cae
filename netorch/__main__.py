"""The entry point of the command line: `netorch`, and `python -m netorch`.

Nearly every command is short, and what it makes lives until its end. So the garbage collector,
which would walk over every imported module several times, begins only when there are more objects
than a command usually has; and at the end all that there is is taken out of its sight, since the
interpreter's last collection walks over everything once more. Together 15 ms of a command's 80
(docs/performance.md).
"""

import gc
from typing import NoReturn

_MANY = 100_000  # after an apply of a thousand taps there are 31,000


def main() -> NoReturn:
    gc.set_threshold(_MANY)
    try:
        from netorch.cli import main as command_line

        command_line()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
