"""Labs: from a topology, or a name, to the place where it runs, and the engine at work there.

What every command does first: find the lab's place (the current network namespace, or a private
one), take its lock, move in, and look. A private place is made before anything else and, when an
apply fails that made it, destroyed after everything else: it is the one thing that can't be made
from inside.
"""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Literal

import msgspec

from netorch import engine
from netorch.bridging import named_interfaces, refuse_in_private, warn_of_managers
from netorch.compiler import compile
from netorch.engine import Progress
from netorch.errors import NetorchError, ReadyError, UsageError
from netorch.facts import Facts
from netorch.model import Topology
from netorch.planner import Plan, diff
from netorch.resources import Record, Resource, Ruleset
from netorch.state import EMPTY, State
from netorch.surroundings import fresh_facts, uplink_subnet, with_names
from netorch.system import Adapter, System, confirmation, rundir
from netorch.system.confirmation import Pending, Watchdog
from netorch.system.places import (
    Place,
    create_private,
    destroy,
    enter,
    has_net_admin,
    marked_processes,
    private_places,
)
from netorch.system.scope import TABLE_PREFIX, Scope, current_place, disks_base, run_base

PlaceChoice = Literal["auto", "current", "private"]


_PLACE = "place"  # in the run directory: the inode of its network namespace, and whether private


class Lab(msgspec.Struct, frozen=True):
    """A lab that is there, in part or in whole: its name, its place and its directories."""

    name: str
    place: Place
    run: Path
    disks: Path

    @property
    def scope(self) -> Scope:
        return Scope(
            lab=self.name,
            place=self.place.inode,
            private=self.place.private,
            run=self.run,
            disks=self.disks,
        )


class Outcome(msgspec.Struct, frozen=True):
    """What `apply` or `plan` found: the plan (done or to do) and the place."""

    lab: str
    place: Place | None  # None: a private place that would have to be made
    plan: Plan
    running: Lab | None = None  # the lab that `apply` brought up


class Standing(msgspec.Struct, frozen=True):
    """What `status` found. `desired` is None where the record of the topology is lost."""

    lab: Lab
    desired: State | None
    observed: State
    pending: Pending | None = None  # a confirmation

    def rows(self) -> list[tuple[str, str, Resource]]:
        """(ok | missing | changed | stray, key, resource), in the order of the desired state."""
        desired = self.desired if self.desired is not None else EMPTY
        rows: list[tuple[str, str, Resource]] = []
        for resource in desired:
            found = self.observed.get(resource.key)
            state = "missing" if found is None else "ok" if found == resource else "changed"
            rows.append((state, resource.key, resource))
        rows += [("stray", r.key, r) for r in self.observed if r.key not in desired]
        return rows

    @property
    def in_sync(self) -> bool:
        return self.desired is not None and not diff(self.desired, self.observed)


def machine(
    scope: Scope,
    report: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
    only: Set[type[Resource]] | None = None,
) -> System:
    """The adapters of all resources, or of `only` these, over the namespaces that this process is
    in.
    """
    from netorch.system.bridge_uplinks import BridgeUplinks
    from netorch.system.disks import Overlays
    from netorch.system.firewall import Firewall
    from netorch.system.guests import Guests
    from netorch.system.hosts import Hosts
    from netorch.system.links import Links
    from netorch.system.services import DhcpClients, Dnsmasqs

    adapters: list[Adapter] = [
        rundir.Records(scope),
        Hosts(scope),
        Links(scope),
        BridgeUplinks(scope, warn),
        Firewall(scope),
        Dnsmasqs(scope),
        DhcpClients(scope),
        Overlays(scope),
        Guests(scope, report),
    ]
    if only is not None:
        adapters = [adapter for adapter in adapters if not only.isdisjoint(adapter.kinds)]
    return System(adapters)


def apply(
    topology: Topology,
    source: str,
    choice: PlaceChoice,
    progress: Progress,
    confirm: float | None = None,
) -> Outcome:
    """Make the lab be what the topology says, and wait until its guests and hosts have their
    addresses.

    With `confirm`, everything goes back after that many seconds unless a confirmation comes first
    (`netorch.system.confirmation`).

    Raises ConflictError before the first change, ApplyError after the rollback, ReadyError if all
    was made but a guest didn't come to life in time (the lab stays up for a look).
    """
    name = topology.name
    confirmation.refuse_while_pending(name, _run_of(name))
    prepare(topology, progress)
    with (
        rundir.locked(_run_of(name)) as run,
        confirmation.guarded(_outside(name, run), confirm, choice) as watchdog,
    ):
        place = _find(topology, choice)
        made = place is None
        if place is None:
            place = _create_private(topology, run)
        lab = _lab(name, place)
        try:
            if place.private:
                enter(place)
            _refuse_a_twin(lab)
            plan = _apply_here(lab, topology, source, progress, watchdog)
        except ReadyError:
            raise
        except BaseException:
            if made:
                destroy(place)
                rundir.leave(run)
            if rundir.recorded(run) is None:
                rundir.remove(lab.scope)
            raise
        return Outcome(name, place, plan, lab)


def prepare(topology: Topology, progress: Progress) -> None:
    """What has to be done before moving into a place without a way out, which can't download."""
    if any(guest.image == "tiny" for guest in topology.guests.values()):
        from netorch.system.tiny import tiny_image

        tiny_image(progress.waiting)


def apply_inside(
    lab: Lab, topology: Topology, source: str, progress: Progress, *, fresh: bool = False
) -> Plan:
    """As `apply`, in a process that is in the lab's place and has its lock. What fails leaves the
    place to the caller.

    `fresh`: this process has just made the place, for this lab alone. So nothing is looked for
    there but what was asked for.
    """
    _note_place(lab)
    return _apply_here(lab, topology, source, progress, fresh=fresh)


def plan(topology: Topology, source: str, choice: PlaceChoice) -> Outcome:
    """What `apply` would do. Nothing is changed, not even a private place made.

    Raises ConflictError if it could not be done.
    """
    name = topology.name
    place = _find(topology, choice)
    if place is None:
        refuse_in_private(topology)
        facts = fresh_facts(topology)
        desired = compile(topology, facts, run_base() / name, TABLE_PREFIX + name, source)
        return Outcome(name, None, diff(desired, EMPTY))
    lab = _lab(name, place)
    if place.private:
        enter(place)
    system = machine(lab.scope)
    todo = diff(_desired(lab, topology, source), system.observe())
    engine.check(system, todo)
    return Outcome(name, place, todo)


def status(lab: Lab) -> Standing:
    """Compare the lab with the topology that was last applied. Moves into the lab's place."""
    waiting = confirmation.pending(lab.name, lab.run)
    if lab.place.private:
        enter(lab.place)
    return status_inside(lab, waiting)


def status_inside(lab: Lab, waiting: Pending | None = None) -> Standing:
    """As `status`, in a process that is in the lab's place."""
    observed = machine(lab.scope).observe()
    record = rundir.recorded(lab.run)
    if record is None:
        return Standing(lab, None, observed, waiting)
    return Standing(lab, _desired(lab, topology_of(record), record.source), observed, waiting)


def intended(lab: Lab) -> tuple[Topology, State]:
    """The topology that was last applied, and the State that it asks for. Moves into the lab's
    place, unless this process is there.
    """
    if lab.place.private and current_place() != lab.place.inode:
        enter(lab.place)
    record = rundir.recorded(lab.run)
    if record is None:
        raise NetorchError(
            f"the record of what lab {lab.name} should be is lost", "apply its file again"
        )
    topology = topology_of(record)
    return topology, _desired(lab, topology, record.source)


def teardown(lab: Lab, progress: Progress) -> list[str]:
    """Take the lab away by its marks alone. Returns what could not be deleted, in words."""
    from netorch.system.netns_directory import remove_directory
    from netorch.system.processes import end, marked

    with rundir.locked(lab.run):
        confirmation.call_off(lab.name, lab.run)
        if lab.place.private:
            # Looked for again: while this waited for the lock, an apply may have made it.
            destroy(private_places().get(lab.name, lab.place))
            errors: list[str] = []
        else:
            errors = engine.teardown(machine(lab.scope), progress)
            end(lab.scope, marked(lab.scope))  # what `exec` left running, or another version
            remove_directory(lab.scope.namespaces)
        if not errors:
            rundir.remove(lab.scope)
        return errors


def find_all(name: str | None) -> list[Lab]:
    """The lab called `name`, or all labs."""
    return labs() if name is None else [find(name)]


def labs() -> list[Lab]:
    """All labs that can be seen from here, by their marks and their run directories."""
    from netorch.system.marks import marked_labs

    here = current_place()
    base = run_base()
    names = [*marked_labs(), *(run.name for run in rundir.all_of(base) if _place_of(run) == here)]
    places = {name: Place(lab=name, private=True, inode=0) for name in _remains()}
    places |= {name: Place(lab=name, private=False, inode=here) for name in names}
    places |= private_places()
    found = [_lab(name, place) for name, place in places.items()]
    return sorted(found, key=lambda lab: lab.name)


def _remains() -> list[str]:
    """Labs of which only directories may be left: a private one that was killed, or a reboot."""
    base = run_base()
    runs = [run.name for run in rundir.all_of(base) if _place_of(run) is None or _was_private(run)]
    disks = [d.name for d in rundir.all_of(disks_base()) if not (base / d.name).exists()]
    if disks:
        # Another network namespace may have a lab whose run directory was deleted.
        alive = {marks["NETORCH_LAB"] for _pid, marks in marked_processes()}
        disks = [name for name in disks if name not in alive]
    return runs + disks


def find(name: str | None) -> Lab:
    """The lab called `name`, or the only one that runs. Raises UsageError, which lists what there
    is.
    """
    there = labs()
    names = ", ".join(lab.name for lab in there)
    if name is None:
        if len(there) == 1:
            return there[0]
        if not there:
            raise UsageError("no lab is running here", "start one: netorch apply FILE")
        raise UsageError("more than one lab is running: say which", f"one of {names}")
    for lab in there:
        if lab.name == name:
            return lab
    raise UsageError(f"no lab {name!r} is running here", f"running: {names or 'none'}")


def topology_of(record: Record) -> Topology:
    """The topology that a record holds."""
    return msgspec.json.decode(record.text, type=Topology)


def _apply_here(
    lab: Lab,
    topology: Topology,
    source: str,
    progress: Progress,
    watchdog: Watchdog | None = None,
    fresh: bool = False,
) -> Plan:
    if fresh and lab.place.uplink == "none":
        facts = with_names(Facts(), topology)  # there is nothing but lo
        desired = compile(topology, facts, lab.run, lab.scope.table, source)
    else:
        desired = _desired(lab, topology, source)

    def ready(plan: Plan) -> None:
        if watchdog is not None:
            (watchdog.applied if plan else watchdog.cancel)()
        from netorch.system.firewall import foreign_drops
        from netorch.system.leases import wait_ready

        if plan and desired.of(Ruleset):
            for drop in foreign_drops():
                progress.warn(drop)
        warn_of_managers(plan, progress)
        wait_ready(lab.scope, desired, plan, topology.lab.timeout, progress.waiting)

    only = {type(resource) for resource in desired} if fresh else None
    adapters = machine(lab.scope, progress.waiting, progress.warn, only)
    return engine.apply(adapters, desired, progress, ready, EMPTY if fresh else None)


def _outside(name: str, run: Path) -> Scope:
    """The scope of what belongs to a lab and runs where netorch was called."""
    return Scope(lab=name, place=current_place(), run=run, disks=disks_base() / name)


def _find(topology: Topology, choice: PlaceChoice) -> Place | None:
    """The place where the lab runs, or shall run; None for a private place yet to be made."""
    name = topology.name
    running = private_places().get(name)
    wanted = choice if choice != "auto" else topology.lab.place
    if running is not None:
        if wanted == "current":
            raise UsageError(
                f"lab {name} runs in a private place",
                f"take it down first: netorch teardown {name}",
            )
        return running
    if wanted == "private" or (wanted == "auto" and not has_net_admin()):
        if _place_of(run_base() / name) == current_place() and has_net_admin():
            raise UsageError(
                f"lab {name} runs in the current network namespace",
                f"take it down first: netorch teardown {name}",
            )
        return None
    return Place(lab=name, private=False, inode=current_place())


def _create_private(topology: Topology, run: Path) -> Place:
    name = topology.name
    refuse_in_private(topology)
    try:
        return create_private(name, run, topology.lab.uplink, uplink_subnet(topology))
    except BaseException:
        if rundir.recorded(run) is None:
            rundir.remove(_lab(name, Place(lab=name, private=True, inode=0, run=str(run))).scope)
        raise


def _refuse_a_twin(lab: Lab) -> None:
    """Two labs of one name would share a run directory: the second, whose place is another, is
    refused.
    """
    other = _place_of(lab.run)
    here = lab.place.inode
    if other not in (None, here) and any(
        int(marks["NETORCH_PLACE"]) == other and marks["NETORCH_LAB"] == lab.name
        for _pid, marks in marked_processes()
    ):
        raise NetorchError(
            f"another lab {lab.name} runs in another network namespace (net:[{other}])",
            "give one of them another name ([lab] name), or set NETORCH_RUN_DIR",
        )
    _note_place(lab)


def _note_place(lab: Lab) -> None:
    here = lab.place.inode
    rundir.write(lab.run / _PLACE, f"{here} private" if lab.place.private else str(here))


def _lab(name: str, place: Place) -> Lab:
    run = Path(place.run) if place.run else run_base() / name
    return Lab(name, place, run, disks_base() / name)


def _run_of(name: str) -> Path:
    """The run directory of a lab: where its private place has it, or where it will be."""
    running = private_places().get(name)
    return Path(running.run) if running and running.run else run_base() / name


def _place_of(run: Path) -> int | None:
    """The network namespace that a run directory belongs to."""
    try:
        return int((run / _PLACE).read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return None


def _was_private(run: Path) -> bool:
    return (run / _PLACE).read_text().endswith(" private")


def _desired(lab: Lab, topology: Topology, source: str) -> State:
    from netorch.system.facts import observe_facts

    facts = with_names(observe_facts(lab.scope, named_interfaces(topology)), topology)
    return compile(topology, facts, lab.run, lab.scope.table, source)
