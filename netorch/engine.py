"""The engine: observe, diff, check, execute, verify; and roll back when a step fails.

Order and limits:
- Nothing is changed before every reason against the plan that can be known has been asked for
  (`Machine.check`).
- Rolling back is the same path with another goal: when a step fails, or the person interrupts, the
  diff between the state before and what is observed now is carried out. Those are the inverses of
  what was done, in reverse order, plus whatever the failed step left half made, which no memory of
  ours would know.
- Teardown goes to the empty state. It and the rollback go on past errors and report them all.
- A SIGKILL at any point needs nothing from here: what is half made carries the lab's marks, so the
  next apply or teardown sees it as a difference like any other.
"""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol

from netorch.errors import ApplyError, ConflictError, NetorchError, ReadyError
from netorch.planner import Action, Create, Plan, Update, diff
from netorch.resources import Resource
from netorch.state import EMPTY, State


class Machine(Protocol):
    """What the engine needs of `netorch.system.System`; the tests' FakeSystem is another."""

    def observe(self) -> State: ...

    def check(self, wanted: Iterable[Resource]) -> list[str]: ...

    def execute(self, step: Sequence[Action], done: Callable[[Action], None]) -> None: ...


class Progress:
    """Hears what the engine does. This one is silent; the command line's prints."""

    def planned(self, plan: Plan) -> None:
        """The plan is known; nothing has been changed yet."""

    def done(self, action: Action) -> None:
        """One action was carried out."""

    def warn(self, line: str) -> None:
        """Something that is not an error, but will keep the lab from working as its file says."""

    def undoing(self, reason: BaseException) -> None:
        """A step failed or the person interrupted: the rollback begins."""

    def undone(self, action: Action) -> None:
        """One action of the rollback was carried out."""

    def waiting(self, line: str) -> None:
        """Something that has to come to life by itself (a guest) got a step further."""


class Undo:
    """A block whose changes are taken back when an exception leaves it.

    A NetorchError, an OSError or a KeyboardInterrupt becomes an ApplyError that says what was
    undone and what could not be; any other exception is a defect and passes through after the
    rollback. A ReadyError undoes nothing: what came late can be looked at, or waited for again.
    """

    def __init__(self, machine: Machine, before: State, progress: Progress) -> None:
        self._machine = machine
        self._before = before
        self._progress = progress

    def __enter__(self) -> "Undo":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        reason: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if reason is None or isinstance(reason, ReadyError):
            return
        self._progress.undoing(reason)
        plan = diff(self._before, self._machine.observe())
        undone, left = _carry_on(self._machine, plan, self._progress.undone)
        if isinstance(reason, KeyboardInterrupt):
            raise ApplyError("interrupted", undone=undone, left=left) from reason
        if isinstance(reason, NetorchError):
            raise ApplyError(reason.message, reason.hint, undone, left) from reason
        if isinstance(reason, OSError):
            raise ApplyError(str(reason), undone=undone, left=left) from reason


def apply(
    machine: Machine,
    desired: State,
    progress: Progress,
    ready: Callable[[Plan], object] = lambda plan: None,
    before: Callable[[Sequence[Action], Plan], object] = lambda step, plan: None,
    observed: State | None = None,
    restart: bool = True,
) -> Plan:
    """Bring the machine to `desired`; return the plan that did it, empty if nothing had to be done.

    `ready` waits for what has to come to life by itself, and `before` for what a step has to come
    after; a ReadyError leaves the machine as it is then, but an interruption takes back what was
    done. `observed` is what is known to be there, if it is known. Without `restart`, a plan that
    restarts a guest is refused. Raises ConflictError before the first change, ApplyError after the
    rollback.
    """
    observed = machine.observe() if observed is None else observed
    plan = diff(desired, observed)
    progress.planned(plan)
    if plan:
        if not restart:
            refuse_restarts(plan)
        check(machine, plan)
        with Undo(machine, observed, progress):
            for step in plan.steps:
                before(step, plan)
                machine.execute(step, progress.done)
            rest = diff(desired, machine.observe())
            if rest:
                raise NetorchError(
                    "what was applied does not show on the machine; still to do: "
                    + "; ".join(rest.describe()),
                    "is something else changing these objects at the same time?",
                )
    try:
        ready(plan)
    except KeyboardInterrupt:
        with Undo(machine, observed, progress):
            raise
    return plan


def refuse_restarts(plan: Plan) -> None:
    """Raise ConflictError if the plan restarts guests; it names each, and why."""
    if restarts := plan.restarts:
        lines = [f"{key.replace(':', ' ')} has to restart: {why}" for key, why in restarts.items()]
        raise ConflictError("\n".join(lines), "to let that happen: netorch apply --restart FILE")


def check(machine: Machine, plan: Plan) -> None:
    """Raise ConflictError with every reason why the plan can't be carried out."""
    reasons = [
        reason
        for action in plan
        if isinstance(action, Update) and (reason := action.old.refuses(action.new))
    ]
    reasons += machine.check([action.new for action in plan if isinstance(action, Create)])
    if reasons:
        raise ConflictError("\n".join(reasons))


def teardown(machine: Machine, progress: Progress) -> list[str]:
    """Delete all that carries the lab's marks, going on past errors. Returns what could not be
    deleted.
    """
    plan = diff(EMPTY, machine.observe())
    progress.planned(plan)
    _done, errors = _carry_on(machine, plan, progress.done)
    return errors + [f"still there: {resource.describe()}" for resource in machine.observe()]


def _carry_on(
    machine: Machine, plan: Plan, done: Callable[[Action], None]
) -> tuple[list[str], list[str]]:
    """Execute `plan` past errors; returns what was done and what failed, in words."""
    finished: dict[str, str] = {}
    errors: list[str] = []

    def note(action: Action) -> None:
        finished[action.describe()] = action.key
        done(action)

    for step in plan.steps:
        try:
            machine.execute(step, note)
        except (NetorchError, OSError):
            # One bad apple must not keep the rest of its step: again, one at a time.
            for action in step:
                if action.describe() in finished:
                    continue
                try:
                    machine.execute([action], note)
                except (NetorchError, OSError) as error:
                    errors.append(f"failed to {action.describe()}: {error}")
    return list(finished), errors
