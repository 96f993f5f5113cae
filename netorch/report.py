"""What the commands print: text for people, JSON for programs."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from netorch.engine import Progress
from netorch.labs import Lab, Outcome, Standing
from netorch.output import echo, echo_on, style, unstyle
from netorch.planner import Action, Create, Delete, Update
from netorch.resources import Guest, Resource
from netorch.system import rundir
from netorch.system.places import Place

if TYPE_CHECKING:
    from netorch.expectations import Verdict
    from netorch.system.confirmation import Pending
    from netorch.system.disk_snapshots import Snapshot
    from netorch.system.endings import Ending
    from netorch.system.hops import Hop
    from netorch.system.leases import Lease

SIGNS: dict[type[Action], tuple[str, str]] = {
    Create: ("+", "green"),
    Delete: ("-", "red"),
    Update: ("~", "yellow"),
}
COLOURS = {"ok": "green", "missing": "red", "changed": "yellow", "stray": "magenta"}


class Printer(Progress):
    """Prints the engine's progress, a line for each thing that happened."""

    def __init__(self, out: TextIO, undoing: Callable[[], None]) -> None:
        self._out = out
        self._undoing = undoing
        self.began = time.monotonic()
        self.count = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def done(self, action: Action) -> None:
        self.count += 1
        self._line(_signed(action))

    def waiting(self, line: str) -> None:
        self._line(f"  {line}")

    def warn(self, line: str) -> None:
        self._line(f"{style('warning:', 'yellow')} {line}")

    def undoing(self, reason: BaseException) -> None:
        self._undoing()
        self._line(style("undoing what was done", "red"))

    def undone(self, action: Action) -> None:
        self._line(_signed(action))

    def _line(self, text: str) -> None:
        echo_on(self._out, text)


def up(outcome: Outcome, progress: Printer, confirm: float | None = None) -> None:
    """The last lines of a successful apply."""
    if not outcome.plan:
        echo(f"lab {outcome.lab}: nothing to do")
        return
    count = f"{progress.count} change{'s' if progress.count != 1 else ''}"
    where = f" {_where(outcome.place)}" if outcome.place else ""
    echo(f"lab {outcome.lab} is up{where}: {count} in {progress.seconds:.1f} s")
    if outcome.place and outcome.place.uplink == "none":
        why = f": {outcome.place.reason}" if outcome.place.reason else ""
        echo(f"it has no way out{why}")
    if confirm is not None:
        echo(f"it is put back in {confirm:g} s unless you say `netorch confirm {outcome.lab}`")


def down(lab: Lab, progress: Printer, errors: Sequence[str]) -> None:
    """The last lines of a teardown."""
    for error in errors:
        echo(style("left behind: ", "red") + error, err=True)
    if not errors:
        echo(f"lab {lab.name} is gone ({progress.seconds:.1f} s)")


def plan_text(outcome: Outcome) -> None:
    if outcome.place is None:
        echo(style("+", "green") + " create a private namespace")
    for action, line in zip(outcome.plan, outcome.plan.describe(), strict=True):
        sign, colour = SIGNS[type(action)]
        echo(f"{style(sign, colour)} {line}")
    count = len(outcome.plan)
    echo(
        f"{count} change{'s' if count != 1 else ''} to lab {outcome.lab}"
        if count
        else "nothing to do"
    )


def plan_json(outcome: Outcome) -> dict[str, Any]:
    """`{"lab", "place", "actions": [{"action", "key", "description", "new"?, "old"?}],
    "restarts": {key: reason}}`.
    """
    actions = []
    for action, line in zip(outcome.plan, outcome.plan.describe(), strict=True):
        actions.append({**msgspec.to_builtins(action), "key": action.key, "description": line})
    return {
        "lab": outcome.lab,
        "place": _place_json(outcome.place),
        "actions": actions,
        "restarts": outcome.plan.restarts,
    }


def status_text(standing: Standing) -> None:
    lab = standing.lab
    echo(f"lab {lab.name} {_where(lab.place)}")
    rows = []
    for state, key, resource in standing.rows():
        rows.append((style(state, COLOURS[state]), key, _detail(standing, state, resource)))
    table(("STATE", "KEY", "WHAT"), rows)
    for ending in standing.endings.values():
        for log, lines in (("QEMU", ending.qemu), ("its console", ending.console)):
            if lines:
                echo(f"\n{ending.guest}: the last lines of {log}:")
                echo("\n".join(f"    {line}" for line in lines))
    held = _leases(lab)
    if held:
        echo()
        leases_table(held)
    if (waiting := standing.pending) is not None:
        echo(_waiting(lab, waiting))
    if standing.desired is None:
        echo("the record of its topology is lost: apply its file again, or tear it down")


def _waiting(lab: Lab, waiting: "Pending") -> str:
    if waiting.alive:
        left = f"{waiting.seconds_left:.0f} s left"
        return f"it is put back unless `netorch confirm {lab.name}` comes in time: {left}"
    return (
        f"it waits for `netorch confirm {lab.name}`, but the watchdog that would put it back "
        "was killed: it stays as it is"
    )


def status_json(standing: Standing) -> dict[str, Any]:
    """`{"lab", "place", "in_sync", "resources": [...], "leases": [...], "confirmation"}`."""
    rows = []
    for state, key, resource in standing.rows():
        row: dict[str, Any] = {
            "state": state,
            "key": key,
            "resource": msgspec.to_builtins(resource),
        }
        observed = standing.observed.get(key)
        if state == "changed" and observed is not None:
            row["observed"] = msgspec.to_builtins(observed)
        if state == "missing" and (ending := _ending(standing, resource)):
            row["ended"] = msgspec.to_builtins(ending)
        if state == "missing" and (at := _saved(standing, resource)):
            row["saved"] = at
        rows.append(row)
    return {
        **lab_json(standing.lab),
        "in_sync": standing.in_sync,
        "resources": rows,
        "leases": leases_json(standing.lab),
        "confirmation": msgspec.to_builtins(standing.pending),
    }


def labs_text(there: Sequence[Lab]) -> None:
    if not there:
        echo("no lab is running here")
        return
    rows = []
    for lab in there:
        record = rundir.recorded(lab.run)
        topology = rundir.topology_of(record) if record else None
        counts = (str(len(topology.guests)), str(len(topology.hosts))) if topology else ("?", "?")
        rows.append(
            (lab.name, _where(lab.place), *counts, record.source if record else "record lost")
        )
    table(("LAB", "PLACE", "GUESTS", "HOSTS", "FILE"), rows)


def lab_json(lab: Lab) -> dict[str, Any]:
    record = rundir.recorded(lab.run)
    return {
        "lab": lab.name,
        "place": _place_json(lab.place),
        "run": str(lab.run),
        "file": record.source if record else None,
    }


def leases_text(lab: Lab) -> None:
    held = _leases(lab)
    if held:
        leases_table(held)
    else:
        echo(f"lab {lab.name} has given no lease")


def leases_json(lab: Lab) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(lease) for lease in _leases(lab)]


def _leases(lab: Lab) -> "list[Lease]":
    from netorch.system import leases  # an apply has none to show

    return leases.read(lab.scope)


def leases_table(held: "Iterable[Lease]") -> None:
    rows = [
        (lease.network, lease.name or "-", lease.address, lease.mac, _until(lease))
        for lease in held
    ]
    table(("NETWORK", "NAME", "ADDRESS", "MAC", "EXPIRES"), rows)


def snapshots_text(guest: str, there: "Sequence[Snapshot]") -> None:
    if there:
        from netorch.system.saved import when

        table(("SNAPSHOT", "MADE"), [(one.name, when(one.at)) for one in there])
    else:
        echo(f"guest {guest} has no snapshot")


def snapshots_json(there: "Sequence[Snapshot]") -> list[dict[str, Any]]:
    return [msgspec.to_builtins(one) for one in there]


def hops_text(hops: "Sequence[Hop]") -> None:
    """A line for each hop; the first broken one stands out, and is said again at the end."""
    from netorch.system.hops import first_broken

    broken = next((hop for hop in hops if not hop.ok), None)
    rows = []
    for hop in hops:
        word, colour = ("ok", "green") if hop.ok else ("broken too", "yellow")
        if hop is broken:
            word, colour = "broken", "red"
        rows.append((style(word, colour), hop.name, hop.detail))
    table(("STATE", "HOP", "WHAT"), rows)
    echo(first_broken(hops))


def hops_json(hops: "Sequence[Hop]") -> list[dict[str, Any]]:
    """`[{"name", "ok", "detail"}]`, in the order in which a packet meets them."""
    return [msgspec.to_builtins(hop) for hop in hops]


def verdicts_text(lab: str, verdicts: "Sequence[Verdict]") -> None:
    """A line for each: what was expected, and what was observed."""
    for verdict in verdicts:
        sign = style("ok  ", "green") if verdict.ok else style("FAIL", "red")
        wanted = "" if verdict.question.expect.reach else " (must not)"
        echo(f"{sign} {verdict.question.title}{wanted}: {verdict.observed}")
        for line in verdict.because.splitlines():
            echo(f"     {line}")
    failed = sum(not verdict.ok for verdict in verdicts)
    if not verdicts:
        echo(f"lab {lab} expects nothing: its file has no [[expect]]")
    elif failed:
        echo(f"lab {lab}: {failed} of {len(verdicts)} expectations are not met")


def verdicts_json(verdicts: "Sequence[Verdict]") -> list[dict[str, Any]]:
    """`[{"from", "to", "by", "reach", "seen_as", "ok", "observed", "because", "seconds"}]`."""
    return [
        {
            "from": verdict.question.source,
            "to": verdict.question.expect.to,
            "by": verdict.question.expect.by,
            "reach": verdict.question.expect.reach,
            "seen_as": verdict.question.expect.seen_as,
            "ok": verdict.ok,
            "observed": verdict.observed,
            "because": verdict.because,
            "seconds": verdict.seconds,
        }
        for verdict in verdicts
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, without borders or truncation, so that both eyes and awk can read them."""
    widths = [max(len(unstyle(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell + " " * (width - len(unstyle(cell)))
            for cell, width in zip(row, widths, strict=True)
        ]
        echo("  ".join(cells).rstrip())


def json_out(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def _signed(action: Action) -> str:
    sign, colour = SIGNS[type(action)]
    words = action.resource.describe() if not isinstance(action, Update) else action.describe()[7:]
    return f"{style(sign, colour)} {words}"


def _detail(standing: Standing, state: str, resource: Resource) -> str:
    observed = standing.observed.get(resource.key)
    if state == "changed" and observed is not None:
        return (
            f"{resource.describe()}; it is not as applied: {', '.join(resource.changes(observed))}"
        )
    if state == "missing" and (at := _saved(standing, resource)):
        from netorch.system.saved import when

        return f"{resource.describe()}: saved on {when(at)}"
    if state == "missing" and (ending := _ending(standing, resource)):
        return f"{resource.describe()}: {ending.describe()}"
    return resource.describe()


def _ending(standing: Standing, resource: Resource) -> "Ending | None":
    return standing.endings.get(resource.name) if isinstance(resource, Guest) else None


def _saved(standing: Standing, resource: Resource) -> int | None:
    return standing.saved.get(resource.name) if isinstance(resource, Guest) else None


def _where(place: Place) -> str:
    if not place.private:
        return "in this network namespace"
    if not place.init:
        return "in a private namespace that is gone"
    return f"in a private namespace (uplink: {place.uplink})"


def _place_json(place: Place | None) -> dict[str, Any] | None:
    return None if place is None else msgspec.to_builtins(place)


def _until(lease: "Lease") -> str:
    if lease.expires == 0:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.expires))
