"""Whether the guests that are to be started fit into the machine's memory."""

from pathlib import Path

from netorch.errors import ConflictError
from netorch.planner import Create, Delete, Plan
from netorch.resources import Guest

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def refuse_too_much(plan: Plan) -> None:
    """Raise ConflictError if the plan starts guests with more memory than there is to be had.

    The memory of guests that the plan ends is to be had again.
    """
    created = [a.new for a in plan if isinstance(a, Create) and isinstance(a.new, Guest)]
    if not created:
        return
    freed = sum(a.old.memory for a in plan if isinstance(a, Delete) and isinstance(a.old, Guest))
    wanted = sum(guest.memory for guest in created)
    there = available() + freed
    if wanted > there:
        largest = max(created, key=lambda guest: guest.memory)
        raise ConflictError(
            f"{len(created)} guests to be started have {wanted} MiB of memory together, and "
            f"{there} MiB are available",
            f"give them less (`memory`; {largest.name} has {largest.memory} MiB), or write "
            "`overcommit = true` into [lab]",
        )


def available() -> int:
    """MiB that new processes can have: the kernel's estimate, within this cgroup's limits."""
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    there = [_kib(fields["MemAvailable"]) + _kib(fields.get("SwapFree", "0"))]
    group = _own_group()
    while group is not None and group.is_relative_to(_CGROUP):
        limit, used = group / "memory.max", group / "memory.current"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            there.append((int(most) - int(used.read_text())) >> 10)
        group = group.parent
    return min(there) >> 10


def _kib(field: str) -> int:
    return int(field.split()[0])


def _own_group() -> Path | None:
    """This process's cgroup (version 2), None where there is none to look at."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return _CGROUP / line[4:]
    return None
