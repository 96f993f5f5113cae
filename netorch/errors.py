"""Everything that netorch raises on purpose.

    NetorchError               failed for a reason that the person can act on (exit status 1)
    ├── TopologyError          the file is wrong: carries every mistake in it (exit status 2)
    ├── UsageError             something was asked for that does not exist (exit status 2)
    ├── ConflictError          something foreign is in the way; nothing was changed
    ├── MissingError           a program, a kernel feature or a permission is missing
    ├── ImageError             a guest image can't be found, built or read
    ├── KernelError            the kernel refused a request; carries the errno
    ├── ApplyError             an action failed; says what was undone
    ├── CommandError           a command in a host or guest failed (Python API only)
    └── ReadyError             all was made, but something did not come to life in time

A message says what failed, on which object and why; `hint` says what to do about it. Only
`netorch.cli` prints them and turns them into exit statuses.
"""

from collections.abc import Sequence

Key = tuple[str | int, ...]
"""Where a value stands in a topology: the names and indices that lead to it."""

Finding = tuple[Key, str, str]
"""A mistake before its line is known: where, what is wrong, what would be right."""


def dotted(key: Key) -> str:
    """The key as TOML writes it, with indices: `guests.vm1.nics[0].network`, `guests."vm 1"`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        bare = part.isascii() and part.replace("-", "a").replace("_", "a").isalnum()
        text += "." * bool(text) + (part if bare else quoted(part))
    return text


def quoted(text: str) -> str:
    """The text between quotes, on one line, the middle of a long one left out."""
    if len(text) > 60:
        text = f"{text[:40]}…{text[-15:]}"
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return '"' + "".join(escaped).replace('"', '\\"') + '"'


class NetorchError(Exception):
    """A failure with a reason (`message`) and, where there is one, a way out (`hint`)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Mistake:
    """One mistake in a topology file: where it is, what is wrong and what would be right.

    `path` is the dotted key (`networks.default.address`), `line` counts from 1 and is 0 where
    unknown.
    """

    __slots__ = ("hint", "line", "message", "path")

    def __init__(self, path: str, message: str, hint: str = "", line: int = 0) -> None:
        self.path = path
        self.message = message
        self.hint = hint
        self.line = line

    def __repr__(self) -> str:
        return f"Mistake({self.path!r}, {self.message!r}, {self.hint!r}, {self.line})"


class TopologyError(NetorchError):
    """The topology file is invalid. `mistakes` holds all that is wrong with it, in the order of the
    file.
    """

    def __init__(self, source: str, mistakes: Sequence[Mistake]) -> None:
        self.source = source
        self.mistakes = tuple(mistakes)
        lines = []
        for mistake in self.mistakes:
            where = f"{source}:{mistake.line}" if mistake.line else source
            key = f"{mistake.path}: " if mistake.path else ""
            hint = f" ({mistake.hint})" if mistake.hint else ""
            lines.append(f"{where}: {key}{mistake.message}{hint}")
        super().__init__("\n".join(lines))


class UsageError(NetorchError):
    """The command line names a lab, guest or host that is not there."""


def not_running(guest: str) -> UsageError:
    """What was asked for needs a guest that runs."""
    return UsageError(f"guest {guest} does not run", f"netorch start {guest}")


class ConflictError(NetorchError):
    """A foreign object has a name or an address range that the lab needs."""


class MissingError(NetorchError):
    """A program, a kernel feature or a permission that the lab needs is missing."""


class ImageError(NetorchError):
    """A guest image can't be found, built or read."""


class KernelError(NetorchError):
    """The kernel refused a request; `errno` is its reason."""

    def __init__(self, message: str, errno: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.errno = errno


class ApplyError(NetorchError):
    """An action failed. `undone` and `left` say, in words, what was taken back and what could not
    be.
    """

    def __init__(
        self, message: str, hint: str = "", undone: Sequence[str] = (), left: Sequence[str] = ()
    ) -> None:
        super().__init__(message, hint)
        self.undone = tuple(undone)
        self.left = tuple(left)


class CommandError(NetorchError):
    """A command in a host or guest failed. `returncode` is None if it was ended by a time limit."""

    def __init__(
        self, message: str, returncode: int | None, stdout: str | bytes, stderr: str | bytes
    ) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class ReadyError(NetorchError):
    """The lab was made, but a guest or host did not become ready before the deadline."""
