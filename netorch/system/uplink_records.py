"""Undo records of bridges' uplinks, in the run directory: what an interface had when it was taken.

The kernel's own state is the record that counts (see `netorch.system.bridge_uplinks`). The file is
for the two cases in which that state has a hole: a move of which the kernel refused a part and
which was killed before that part was put back, and a bridge that somebody else has deleted. A file
of another boot or another network namespace says nothing, and is passed over.
"""

from pathlib import Path

import msgspec

from netorch.errors import NetorchError
from netorch.system.layer3 import Holding
from netorch.system.rundir import write_synced
from netorch.system.scope import Scope

_PREFIX = "uplink-"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`complete`: all of the holding is known to have moved to the bridge."""

    network: str
    name: str
    bridge: str
    was_up: bool
    holding: Holding
    complete: bool = False
    place: int = 0
    boot: str = ""


class Records:
    """The records of one lab."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def all(self) -> list[Record]:
        found = [self._read(path) for path in sorted(self._scope.run.glob(f"{_PREFIX}*.json"))]
        here = (self._scope.place, _boot())
        return [record for record in found if (record.place, record.boot) == here]

    def of(self, network: str) -> Record | None:
        return next((record for record in self.all() if record.network == network), None)

    def write(self, record: Record) -> None:
        if not self._scope.run.is_dir():
            return  # somebody has deleted it; the kernel's state is enough
        marked = msgspec.structs.replace(record, place=self._scope.place, boot=_boot())
        write_synced(self._path(record.network), msgspec.json.encode(marked).decode())

    def remove(self, network: str) -> None:
        self._path(network).unlink(missing_ok=True)

    def _path(self, network: str) -> Path:
        return self._scope.run / f"{_PREFIX}{network}.json"

    def _read(self, path: Path) -> Record:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError) as error:
            raise NetorchError(f"failed to read {path}: {error}") from error


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
