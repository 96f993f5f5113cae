"""Which labs there are, and where: by the marks that they left, with or without a run directory."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from netorch.bridging import needs_no_rights
from netorch.errors import NetorchError, UsageError
from netorch.model import Topology
from netorch.system import bridge_helper, rundir
from netorch.system.places import Place, has_net_admin, marked_processes, private_places
from netorch.system.scope import (
    PLACE_FILE,
    Scope,
    current_place,
    disks_base,
    place_of,
    run_base,
)

PlaceChoice = Literal["auto", "current", "private"]


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
            keeper=self.place.keeper,
            run=self.run,
            disks=self.disks,
        )


def find_all(name: str | None) -> list[Lab]:
    """The lab called `name`, or all labs."""
    return labs() if name is None else [find(name)]


def labs() -> list[Lab]:
    """All labs that can be seen from here, by their marks and their run directories."""
    from netorch.system.marks import marked_labs

    here = current_place()
    base = run_base()
    names = [*marked_labs(), *(run.name for run in rundir.all_of(base) if place_of(run) == here)]
    places = {name: Place(lab=name, private=True, inode=0) for name in _remains()}
    places |= {name: Place(lab=name, private=False, inode=here) for name in names}
    places |= private_places()
    found = [lab_of(name, place) for name, place in places.items()]
    return sorted(found, key=lambda lab: lab.name)


def _remains() -> list[str]:
    """Labs of which only directories may be left: a private one that was killed, or a reboot."""
    base = run_base()
    runs = [run.name for run in rundir.all_of(base) if place_of(run) is None or _was_private(run)]
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


def place_for(topology: Topology, choice: PlaceChoice) -> Place | None:
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
    without_rights = wanted == "auto" and not has_net_admin()
    if without_rights and needs_no_rights(topology) and bridge_helper.installed():
        return Place(lab=name, private=False, inode=current_place())
    if wanted == "private" or without_rights:
        if place_of(run_base() / name) == current_place() and has_net_admin():
            raise UsageError(
                f"lab {name} runs in the current network namespace",
                f"take it down first: netorch teardown {name}",
            )
        return None
    return Place(lab=name, private=False, inode=current_place())


def refuse_a_twin(lab: Lab) -> None:
    """Two labs of one name would share a run directory: the second, whose place is another, is
    refused.
    """
    other = place_of(lab.run)
    here = lab.place.inode
    if other not in (None, here) and any(
        int(marks["NETORCH_PLACE"]) == other and marks["NETORCH_LAB"] == lab.name
        for _pid, marks in marked_processes()
    ):
        raise NetorchError(
            f"another lab {lab.name} runs in another network namespace (net:[{other}])",
            "give one of them another name ([lab] name), or set NETORCH_RUN_DIR",
        )
    note_place(lab)


def note_place(lab: Lab) -> None:
    file, here = lab.run / PLACE_FILE, lab.place.inode
    text = f"{here} private" if lab.place.private else str(here)
    with suppress(FileNotFoundError):
        if file.read_text() == text:
            return
    rundir.write(file, text)


def lab_of(name: str, place: Place) -> Lab:
    run = Path(place.run) if place.run else run_base() / name
    return Lab(name, place, run, disks_base() / name)


def run_of(name: str) -> Path:
    """The run directory of a lab: where its private place has it, or where it will be."""
    running = private_places().get(name)
    return Path(running.run) if running and running.run else run_base() / name


def _was_private(run: Path) -> bool:
    return (run / PLACE_FILE).read_text().endswith(" private")
