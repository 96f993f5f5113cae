"""The entry point of the command line: `netorch`, and `python -m netorch`.

A command is short, and what it makes lives until its end. So the garbage collector, which would
walk over every imported module several times, is off from before the first import on; and at the
end all that there is is taken out of its sight, since the interpreter's last collection walks over
everything once more. Together 15 ms of a command's 80 (docs/performance.md).
"""

import gc
from typing import NoReturn


def main() -> NoReturn:
    gc.disable()
    try:
        from netorch.cli import main as command_line

        command_line()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
