"""Starting and stopping single guests of a running lab.

The file stays what the lab should be: a guest that was stopped is missing in `status`, and an apply
starts it. `start` is an apply of a part: of the guests that are named, and what they need.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from netorch.engine import Progress
from netorch.errors import UsageError, not_running
from netorch.labs import Lab, carry_out, find_all, intended, machine
from netorch.planner import Plan
from netorch.resources import Guest
from netorch.state import State
from netorch.system import power, rundir, saved, saving
from netorch.system.places import enter
from netorch.system.scope import current_place


def find(lab: str | None, guests: Sequence[str]) -> Lab:
    """The lab that has all these guests. Raises UsageError."""
    having = []
    known: list[str] = []
    for there in find_all(lab):
        record = rundir.recorded(there.run)
        if record is None:
            continue
        names = rundir.topology_of(record).guests
        known += names
        if all(guest in names for guest in guests):
            having.append(there)
    if not having:
        unknown = [guest for guest in guests if guest not in known] or guests
        raise UsageError(
            f"no lab here has a guest {unknown[0]!r}", f"guests: {', '.join(known) or 'none'}"
        )
    if len(having) > 1:
        names_ = ", ".join(there.name for there in having)
        raise UsageError("more than one lab has such a guest", f"say which with --lab: {names_}")
    return having[0]


def start(lab: Lab, guests: Sequence[str], progress: Progress, discard: bool = False) -> Plan:
    """Start guests with all that they need or come after, and wait until they are ready.

    Those that were saved go on from there; `discard` forgets that.
    Raises as `netorch.labs.apply` does.
    """
    with inside(lab):
        if discard:
            for name in guests:
                saved.drop(lab.scope, name)
        return start_inside(lab, guests, progress)


def stop(lab: Lab, guests: Sequence[str], seconds: float, progress: Progress) -> None:
    """Switch guests off: by the power button, and by force after `seconds`."""
    with inside(lab):
        power.stop(lab.scope, guests, seconds, progress.waiting)


def restart(lab: Lab, guests: Sequence[str], seconds: float, progress: Progress) -> Plan:
    """Stop, then start. Not a guest's own reboot: QEMU is a new process."""
    with inside(lab):
        power.stop(lab.scope, guests, seconds, progress.waiting)
        return start_inside(lab, guests, progress)


def save(lab: Lab, guests: Sequence[str], progress: Progress) -> None:
    """Save guests, one after the other: their running state goes to files, and their QEMU ends.

    Raises UsageError before the first one, NetorchError for one that can not be saved: it runs on.
    """
    with inside(lab):
        observed = machine(lab.scope, only={Guest}).observe()
        for guest in [running_guest(observed, name) for name in guests]:
            saving.save(lab.scope, guest, progress.waiting)


def running_guest(observed: State, name: str) -> Guest:
    """Raises UsageError for a guest that doesn't run."""
    guest = observed.get(f"guest:{name}")
    if not isinstance(guest, Guest):
        raise not_running(name)
    return guest


def pause(lab: Lab, guests: Sequence[str]) -> None:
    """Let guests stand still; an apply resumes them, too. Raises UsageError, QmpError."""
    with inside(lab):
        power.tell(lab.scope, guests, "stop")


def resume(lab: Lab, guests: Sequence[str]) -> None:
    with inside(lab):
        power.tell(lab.scope, guests, "cont")


@contextlib.contextmanager
def inside(lab: Lab) -> Iterator[None]:
    """Hold the lab's lock, in its place."""
    with rundir.locked(lab.run):
        if lab.place.private and current_place() != lab.place.inode:
            enter(lab.place)
        yield


def start_inside(lab: Lab, guests: Sequence[str], progress: Progress) -> Plan:
    topology, desired = intended(lab)
    adapters = machine(lab.scope, progress.waiting, progress.warn)
    observed = adapters.observe()
    goal = part(desired, observed, [f"guest:{name}" for name in guests])
    return carry_out(lab, topology, goal, adapters, observed, progress)


def part(desired: State, observed: State, keys: Iterable[str]) -> State:
    """What is there, but with these resources, and all that they need or come after, as they should
    be.
    """
    wanted: dict[str, None] = {}
    queue = list(keys)
    while queue:
        key = queue.pop()
        resource = desired.get(key)
        if resource is not None and key not in wanted:
            wanted[key] = None
            queue += [*resource.needs, *desired.order.get(key, ())]
    goal = [resource for resource in observed if resource.key not in wanted]
    return State([*goal, *(r for r in desired if r.key in wanted)], desired.order)
