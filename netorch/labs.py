"""Labs: from a topology, or a name, to the place where it runs, and the engine at work there.

What every command does first: find the lab's place (the current network namespace, or a private
one), take its lock, move in, and look. A private place is made before anything else and, when an
apply fails that made it, destroyed after everything else: it is the one thing that can't be made
from inside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from netorch import engine
from netorch.addresses import uplink_subnet
from netorch.bridging import named_interfaces, refuse_in_private, warn_of_managers
from netorch.compiler import compile
from netorch.engine import Progress
from netorch.errors import NetorchError, ReadyError, UsageError
from netorch.facts import Facts, Uplink
from netorch.model import Topology
from netorch.planner import Plan, diff
from netorch.resources import Record, Resource, Ruleset
from netorch.state import EMPTY, State
from netorch.system import System, confirmation, rundir
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
) -> System:
    """The adapters of all resources, over the namespaces that this process is in."""
    from netorch.system.bridge_uplinks import BridgeUplinks
    from netorch.system.disks import Overlays
    from netorch.system.firewall import Firewall
    from netorch.system.guests import Guests
    from netorch.system.hosts import Hosts
    from netorch.system.links import Links
    from netorch.system.services import DhcpClients, Dnsmasqs

    return System(
        [
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
    )


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
    run = run_base() / name
    confirmation.refuse_while_pending(name, run)
    if any(guest.image == "tiny" for guest in topology.guests.values()):
        from netorch.system.tiny import tiny_image

        tiny_image(progress.waiting)  # here: a place without a way out can't download its parts
    with (
        rundir.locked(run),
        confirmation.guarded(_outside(name, run), confirm, choice) as watchdog,
    ):
        place = _find(topology, choice)
        made = place is None
        if place is None:
            refuse_in_private(topology)
            place = create_private(name, run, topology.lab.uplink, uplink_subnet(topology))
        lab = Lab(name, place, run, disks_base() / name)
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
        return Outcome(name, place, plan)


def plan(topology: Topology, source: str, choice: PlaceChoice) -> Outcome:
    """What `apply` would do. Nothing is changed, not even a private place made.

    Raises ConflictError if it could not be done.
    """
    name = topology.name
    run = run_base() / name
    place = _find(topology, choice)
    if place is None:
        refuse_in_private(topology)
        desired = compile(topology, _fresh_facts(topology), run, TABLE_PREFIX + name, source)
        return Outcome(name, None, diff(desired, EMPTY))
    lab = Lab(name, place, run, disks_base() / name)
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
    observed = machine(lab.scope).observe()
    record = rundir.recorded(lab.run)
    if record is None:
        return Standing(lab, None, observed, waiting)
    return Standing(lab, _desired(lab, topology_of(record), record.source), observed, waiting)


def teardown(lab: Lab, progress: Progress) -> list[str]:
    """Take the lab away by its marks alone. Returns what could not be deleted, in words."""
    from netorch.system.processes import end, marked

    with rundir.locked(lab.run):
        confirmation.call_off(lab.name, lab.run)
        if lab.place.private:
            destroy(lab.place)
            errors: list[str] = []
        else:
            errors = engine.teardown(machine(lab.scope), progress)
            end(lab.scope, marked(lab.scope))  # what `exec` left running, or another version
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
    found = [Lab(name, place, base / name, disks_base() / name) for name, place in places.items()]
    return sorted(found, key=lambda lab: lab.name)


def _remains() -> list[str]:
    """Labs of which only directories may be left: a private one that was killed, or a reboot."""
    base = run_base()
    runs = [run.name for run in rundir.all_of(base) if _place_of(run) is None or _was_private(run)]
    disks = [d.name for d in rundir.all_of(disks_base()) if not (base / d.name).exists()]
    if not runs and not disks:
        return []
    alive = {marks["NETORCH_LAB"] for _pid, marks in marked_processes()}
    return [name for name in (*runs, *disks) if name not in alive]


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
    watchdog: Watchdog | None,
) -> Plan:
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

    system = machine(lab.scope, progress.waiting, progress.warn)
    return engine.apply(system, desired, progress, ready)


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
    rundir.write(lab.run / _PLACE, f"{here} private" if lab.place.private else str(here))


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

    facts = _with_names(observe_facts(lab.scope, named_interfaces(topology)), topology)
    return compile(topology, facts, lab.run, lab.scope.table, source)


def _with_names(facts: Facts, topology: Topology) -> Facts:
    """Add what the file's own words refer to: users' ids and images' formats."""
    from netorch.system.disks import image_format

    owners = {taps.owner for taps in topology.taps.values() if isinstance(taps.owner, str)}
    images = {g.image for g in topology.guests.values() if g.image != "tiny" and g.format == "auto"}
    return msgspec.structs.replace(
        facts,
        users={owner: _uid_of(owner) for owner in owners},
        formats={image: image_format(Path(image)) for image in images},
    )


def _uid_of(user: str) -> int:
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError(
            f"there is no user {user!r} to own a tap", "a number does as well"
        ) from error


def _fresh_facts(topology: Topology) -> Facts:
    """What a private place looks like before it is made."""
    from netorch.system.uplinks import choose

    has_uplink = choose(topology.lab.uplink) != "none"
    facts = Facts(
        taken=(uplink_subnet(topology),) if has_uplink else (),
        uplinks=(Uplink(name="uplink0", mtu=1500),) if has_uplink else (),
    )
    return _with_names(facts, topology)
