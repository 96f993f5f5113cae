"""How guests ended: what their keeper noted (keeper.py), and the ends of their logs."""

import time
from pathlib import Path

import msgspec

from netorch.system.late import last_lines
from netorch.system.scope import Scope


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """`status` is QEMU's exit status, or the signal that killed it. `at` is in seconds since 1970.
    `qemu` and `console` are the last lines of its logs.
    """

    guest: str
    killed: bool
    status: int
    at: int
    qemu: tuple[str, ...]
    console: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return self.killed or self.status != 0

    def describe(self) -> str:
        how = "was killed by signal" if self.killed else "exited with status"
        return f"it {how} {self.status} on {time.strftime('%F %T', time.localtime(self.at))}"


def endings(scope: Scope) -> dict[str, Ending]:
    """The guests of the lab that have ended and were not started again, by name."""
    found = {}
    for path in sorted(scope.run.glob("guests/*/ended")):
        if ending := _read(path):
            found[ending.guest] = ending
    return found


def _read(path: Path) -> Ending | None:
    try:
        words = path.read_text().split()
    except FileNotFoundError:
        return None  # started again
    if len(words) != 3:
        return None  # being written
    verb, status, at = words
    return Ending(
        guest=path.parent.name,
        killed=verb == "killed",
        status=int(status),
        at=int(at),
        qemu=tuple(last_lines(path.with_name("qemu.log"))),
        console=tuple(last_lines(path.with_name("serial.log"))),
    )
