"""Labs: from a topology, or a name, to the place where it runs, and the engine at work there.

What every command does first: find the lab's place (the current network namespace, or a private
one), take its lock, move in, and look. A private place is made before anything else and, when an
apply fails that made it, destroyed after everything else: it is the one thing that can't be made
from inside.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from netorch import engine
from netorch.addresses import uplink_subnet
from netorch.bridging import named_interfaces, needs_no_rights, refuse_in_private, warn_of_managers
from netorch.compiler import compile
from netorch.engine import Progress
from netorch.errors import NetorchError, ReadyError
from netorch.facts import Facts
from netorch.model import Topology
from netorch.nic_devices import idle_queues
from netorch.planner import Action, Plan, diff
from netorch.resources import DhcpClient, Guest, Resource, Ruleset
from netorch.state import EMPTY, State
from netorch.surroundings import fresh_facts, refuse_before_place, refuse_held, with_names
from netorch.system import System, confirmation, rundir
from netorch.system.confirmation import Pending, Watchdog
from netorch.system.look import Look
from netorch.system.places import (
    Place,
    create_private,
    destroy,
    enter,
    has_net_admin,
    private_places,
)
from netorch.system.scope import Scope, current_place, disks_base, run_base
from netorch.whereabouts import Lab as Lab
from netorch.whereabouts import PlaceChoice as PlaceChoice
from netorch.whereabouts import find as find
from netorch.whereabouts import find_all as find_all
from netorch.whereabouts import lab_of, note_place, place_for, refuse_a_twin, run_of
from netorch.whereabouts import labs as labs

if TYPE_CHECKING:
    from netorch.system.endings import Ending
    from netorch.system.readiness import Readiness


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
    endings: Mapping[str, "Ending"] = {}  # of guests that are missing
    saved: Mapping[str, int] = {}  # guests that are missing, and when they were saved

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
    from netorch.system.adapters import adapters

    return System(scope, adapters(scope, report, warn, only))


def apply(
    topology: Topology,
    source: str,
    choice: PlaceChoice,
    progress: Progress,
    confirm: float | None = None,
    restart: bool = False,
) -> Outcome:
    """Make the lab be what the topology says, and wait until its guests and hosts have their
    addresses.

    With `confirm`, everything goes back after that many seconds unless a confirmation comes first
    (`netorch.system.confirmation`). Without `restart`, what needs guests to restart is refused.

    Raises ConflictError before the first change, ApplyError after the rollback, ReadyError if all
    was made but a guest didn't come to life in time (the lab stays up for a look).
    """
    name = topology.name
    confirmation.refuse_while_pending(name, run_of(name))
    prepare(topology, progress)
    with (
        rundir.locked(run_of(name)) as run,
        confirmation.guarded(_outside(name, run), confirm, choice) as watchdog,
    ):
        place = place_for(topology, choice)
        made = place is None
        if place is None:
            place = _create_private(topology, run)
        lab = lab_of(name, place)
        try:
            if place.private:
                enter(place)
            refuse_a_twin(lab)
            plan = _apply_here(lab, topology, source, progress, restart, watchdog)
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
    """What has to be done before moving into a place without a way out, which can't download, and
    without a sight of who is outside.
    """
    refuse_held(topology)
    if any(guest.image == "tiny" for guest in topology.guests.values()):
        from netorch.system.guests import QEMU
        from netorch.system.starting import program
        from netorch.system.tiny import tiny_image
        from netorch.system.warm_starts import make_templates

        tiny_image(progress.waiting)
        if qemu := program(QEMU):
            make_templates(qemu, topology.guests, progress.waiting)


def apply_inside(
    lab: Lab,
    topology: Topology,
    source: str,
    progress: Progress,
    *,
    fresh: bool = False,
    restart: bool = False,
) -> Plan:
    """As `apply`, in a process that is in the lab's place and has its lock. What fails leaves the
    place to the caller.

    `fresh`: this process has just made the place, for this lab alone. So nothing is looked for
    there but what was asked for.
    """
    note_place(lab)
    return _apply_here(lab, topology, source, progress, restart, fresh=fresh)


def plan(topology: Topology, source: str, choice: PlaceChoice) -> Outcome:
    """What `apply` would do. Nothing is changed, not even a private place made.

    Raises ConflictError if it could not be done.
    """
    name = topology.name
    place = place_for(topology, choice)
    if place is None:
        refuse_in_private(topology)
        scope = _outside(name, run_base() / name)
        desired = compile(topology, fresh_facts(topology), scope.run, scope.table, source)
        refuse_before_place(scope, desired)
        return Outcome(name, None, diff(desired, EMPTY))
    lab = lab_of(name, place)
    if place.private:
        enter(place)
    system, look = machine(lab.scope), Look(lab.scope)
    todo = diff(_desired(lab, topology, source, look), system.observe(look))
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
    look = Look(lab.scope)
    observed = machine(lab.scope).observe(look)
    record = rundir.recorded(lab.run)
    if record is None:
        return Standing(lab, None, observed, waiting)
    desired = _desired(lab, rundir.topology_of(record), record.source, look)
    if not (lab.run / "guests").exists():
        return Standing(lab, desired, observed, waiting)
    from netorch.system import saved
    from netorch.system.endings import endings

    kept = saved.states(lab.scope)
    return Standing(lab, desired, observed, waiting, endings(lab.scope), kept)


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
    topology = rundir.topology_of(record)
    return topology, _desired(lab, topology, record.source)


def teardown(lab: Lab, progress: Progress) -> list[str]:
    """Take the lab away by its marks alone. Returns what could not be deleted, in words."""
    from netorch.system.netns_directory import remove_directory
    from netorch.system.processes import end_all

    with rundir.locked(lab.run):
        confirmation.call_off(lab.name, lab.run)
        if lab.place.private:
            # Looked for again: while this waited for the lock, an apply may have made it.
            destroy(private_places().get(lab.name, lab.place))
            errors: list[str] = []
        else:
            errors = engine.teardown(machine(lab.scope), progress)
            end_all(lab.scope)  # what `exec` left running, or another version
            remove_directory(lab.scope.namespaces)
        if not errors:
            rundir.remove(lab.scope)
        return errors


def _apply_here(
    lab: Lab,
    topology: Topology,
    source: str,
    progress: Progress,
    restart: bool,
    watchdog: Watchdog | None = None,
    fresh: bool = False,
) -> Plan:
    look = Look(lab.scope)
    if fresh and lab.place.uplink == "none":
        facts = with_names(Facts(), topology)  # there is nothing but lo
        desired = compile(topology, facts, lab.run, lab.scope.table, source)
    else:
        desired = _desired(lab, topology, source, look)

    def ready(plan: Plan) -> None:
        if watchdog is not None:
            (watchdog.applied if plan else watchdog.cancel)()
        from netorch.system.firewall import foreign_drops

        if plan and desired.of(Ruleset):
            for drop in foreign_drops():
                progress.warn(drop)
        warn_of_managers(plan, progress)
        if rundir.is_ours(lab.scope.disks):
            from netorch.system import saved
            from netorch.system.disks import forget_removed

            saved.keep_only(lab.scope, topology.guests)
            forget_removed(lab.scope)
        for guest in desired.of(Guest) if plan else ():
            for line in idle_queues(guest):
                progress.warn(line)

    only = {type(resource) for resource in desired} if fresh else None
    adapters = machine(lab.scope, progress.waiting, progress.warn, only)
    known = EMPTY if fresh else adapters.observe(look)
    return carry_out(lab, topology, desired, adapters, known, progress, ready, restart)


def carry_out(
    lab: Lab,
    topology: Topology,
    desired: State,
    adapters: engine.Machine,
    known: State,
    progress: Progress,
    ready: Callable[[Plan], object] = lambda plan: None,
    restart: bool = True,
) -> Plan:
    """`engine.apply`, with what guests need that are started: memory, those that they come after,
    and to be waited for. `ready` is called before that.
    """
    readiness = _readiness(lab, topology, desired, progress)

    def before(step: Sequence[Action], plan: Plan) -> None:
        if step is plan.steps[0] and topology.guests and not topology.lab.overcommit:
            from netorch.system.memory import refuse_too_much

            refuse_too_much(plan)
        if readiness is not None:
            readiness.before(step, plan)

    def all_ready(plan: Plan) -> None:
        ready(plan)
        if readiness is not None:
            readiness.all(plan)

    return engine.apply(adapters, desired, progress, all_ready, before, known, restart)


def _readiness(
    lab: Lab, topology: Topology, desired: State, progress: Progress
) -> "Readiness | None":
    """What has to be waited for; None where nothing comes to life by itself."""
    if not any(isinstance(resource, Guest | DhcpClient) for resource in desired):
        return None
    from netorch.system.readiness import Readiness

    return Readiness(lab.scope, topology.guests, desired, topology.lab.timeout, progress.waiting)


def _outside(name: str, run: Path) -> Scope:
    """The scope of what belongs to a lab and runs where netorch was called."""
    return Scope(lab=name, place=current_place(), run=run, disks=disks_base() / name)


def _create_private(topology: Topology, run: Path) -> Place:
    name = topology.name
    try:
        refuse_in_private(topology)
        return create_private(name, run, topology.lab.uplink, uplink_subnet(topology))
    except BaseException:
        if rundir.recorded(run) is None:
            rundir.remove(lab_of(name, Place(lab=name, private=True, inode=0, run=str(run))).scope)
        raise


def _desired(lab: Lab, topology: Topology, source: str, look: Look | None = None) -> State:
    from netorch.system.facts import observe_facts

    observed = observe_facts(lab.scope, named_interfaces(topology), look)
    helper = needs_no_rights(topology) and not has_net_admin()
    facts = with_names(msgspec.structs.replace(observed, helper=helper), topology)
    return compile(topology, facts, lab.run, lab.scope.table, source)
