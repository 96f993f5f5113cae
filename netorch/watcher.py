"""`netorch watch`: tells how a lab's processes end, and starts guests again whose file says so.

The watcher stays outside of the lab's place, which would live on for as long as somebody is in
there; what has to be done inside is done by a child. It waits for pidfds and inotify, and looks at
everything anew whenever something has changed: so guests of a later apply are watched as well.

Who has ended while nobody was looking (before this began, or while another guest was started) gave
no event, but left the keeper's note: notes that were not told yet are told as well.

What a teardown or another command ends while it holds the lab's lock is no failure: the watcher
waits for the lock before it judges.
"""

import os
import time
from collections.abc import Callable, Sequence

from netorch import lifecycle
from netorch.engine import Progress
from netorch.errors import NetorchError
from netorch.labs import Lab
from netorch.system import rundir
from netorch.system.endings import Ending, endings
from netorch.system.processes import leaders, marked
from netorch.system.watch import Watch

# A guest that fails again and again is left alone: this many starts, within that many seconds.
_STARTS = 5
_WITHIN = 60.0
_NOTE_SECONDS = 30.0  # for the keeper to note how a guest ended, on a busy machine

_NEWS = ("record.json", "guests", "process", "ended")  # files whose change is worth a look

Say = Callable[[str], None]


def watch(lab: Lab, say: Say, progress: Progress) -> None:
    """Watch until the lab is gone."""
    starts: dict[str, list[float]] = {}
    told: dict[str, int] = {}
    while rundir.settled(lab.run):
        failed = _wait(lab, told, say)
        for name in failed:
            recent = [at for at in starts.get(name, ()) if time.monotonic() - at < _WITHIN]
            if len(recent) >= _STARTS:
                say(f"{name} is left alone: it was started {_STARTS} times in {_WITHIN:.0f} s")
                continue
            starts[name] = [*recent, time.monotonic()]
            _start(lab, name, say, progress)
    say(f"lab {lab.name} is gone")


def _wait(lab: Lab, told: dict[str, int], say: Say) -> Sequence[str]:
    """Wait until processes end or others come; the guests that are to be started again. `told` has
    the notes that were told, by guest.
    """
    with Watch() as events:
        processes = leaders(marked(lab.scope))
        for directory in (lab.run, lab.run / "guests", *lab.run.glob("guests/*")):
            if directory.is_dir():
                events.directory(directory)
        for key, group in processes.items():
            for process in group:
                events.process(process, key)
        missed = {f"guest:{n}" for n in endings(lab.scope) if told.get(n) != _note(lab, n)}
        if missed:
            return _judge(lab, missed, told, say, events)
        while True:
            changed, ended = events.wait(3600.0)
            if ended:
                return _judge(lab, ended, told, say, events)
            if any(path.name in _NEWS for path in changed):
                return ()


def _judge(
    lab: Lab, ended: set[str], told: dict[str, int], say: Say, events: Watch
) -> Sequence[str]:
    if not rundir.settled(lab.run) or (record := rundir.recorded(lab.run)) is None:
        return ()
    gone = ended - leaders(marked(lab.scope)).keys()
    guests = rundir.topology_of(record).guests
    again = []
    for key in sorted(gone):
        kind, _, name = key.partition(":")
        if kind != "guest":
            say(f"{key} has ended: `netorch apply` makes it again")
            continue
        ending = _ending(lab, name, events)
        if ending is None:
            say(f"{name} was stopped")
            continue
        told[name] = _note(lab, name)
        say(f"{name}: {ending.describe()}")
        policy = guests[name].restart if name in guests else "no"
        if policy == "always" or (policy == "on-failure" and ending.failed):
            again.append(name)
    return again


def _ending(lab: Lab, name: str, events: Watch) -> Ending | None:
    """How the guest ended; None if it was stopped by netorch."""
    deadline = time.monotonic() + _NOTE_SECONDS
    while (found := endings(lab.scope).get(name)) is None:
        left = deadline - time.monotonic()
        if left <= 0 or not (lab.run / "guests" / name / "process").exists():
            return endings(lab.scope).get(name)
        events.wait(left)
    return found


def _note(lab: Lab, name: str) -> int:
    """What tells the keeper's note about a guest from an earlier one: 0 where there is none."""
    try:
        return (lab.run / "guests" / name / "ended").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _start(lab: Lab, name: str, say: Say, progress: Progress) -> None:
    """Start a guest again, in a child, since moving into the lab's place can't be undone."""
    say(f"{name} is started again")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            lifecycle.start(lab, [name], progress)
            status = 0
        except NetorchError as error:
            say(f"failed to start {name} again: {error.message}")
        finally:
            os._exit(status)
    os.waitpid(pid, 0)
