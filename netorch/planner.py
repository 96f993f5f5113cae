"""diff(desired, observed) -> Plan: what has to be done to the machine, in order, and nothing else.

Order of a plan: all deletes first, what needs others before what is needed, or with it where one
deletion takes both (a bridge with its ports); then creates and updates, what is needed before what
needs it. Actions that don't depend on each other stand together in a step, so that the engine can
hand a whole step to an adapter (a thousand taps are one batch of messages).

A resource that differs is updated where it says that it can become the desired one
(`Resource.can_become`), otherwise deleted and created. What needs a deleted resource is asked what
is left of it (`Resource.after_replace`). To make one again that is in use, a running guest, is a
*restart*: the plan names it, and whoever carries the plan out has to be allowed to.
"""

from collections.abc import Iterable, Iterator

import msgspec

from netorch.resources import Resource
from netorch.state import State


class Action(msgspec.Struct, frozen=True, tag_field="action", tag=str.lower):
    """One change to the machine. It says in words what it is, and knows its inverse."""

    @property
    def resource(self) -> Resource:
        """The resource that is there once the action is done, or that was there for a Delete."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        return self.resource.key

    def inverse(self) -> "Action":
        raise NotImplementedError

    def describe(self) -> str:
        raise NotImplementedError


class Create(Action, frozen=True):
    new: Resource

    @property
    def resource(self) -> Resource:
        return self.new

    def inverse(self) -> "Delete":
        return Delete(self.new)

    def describe(self) -> str:
        return f"create {self.new.describe()}"


class Delete(Action, frozen=True):
    old: Resource

    @property
    def resource(self) -> Resource:
        return self.old

    def inverse(self) -> Create:
        return Create(self.old)

    def describe(self) -> str:
        return f"delete {self.old.describe()}"


class Update(Action, frozen=True):
    old: Resource
    new: Resource

    @property
    def resource(self) -> Resource:
        return self.new

    def inverse(self) -> "Update":
        return Update(self.new, self.old)

    def describe(self) -> str:
        return f"update {self.new.describe()}: {', '.join(self.old.changes(self.new))}"


class Plan:
    """Steps of actions. The actions of a step are independent of each other and of one verb."""

    __slots__ = ("reasons", "steps")

    def __init__(
        self, steps: Iterable[Iterable[Action]], reasons: dict[str, str] | None = None
    ) -> None:
        self.steps = tuple(tuple(step) for step in steps)
        self.reasons = reasons or {}  # key of a resource that is made again -> why

    @property
    def restarts(self) -> dict[str, str]:
        """What is in use and made again, a running guest: its key -> why."""
        return {
            action.key: self.reasons[action.key]
            for action in self
            if isinstance(action, Delete) and action.key in self.reasons and action.old.is_in_use
        }

    def __iter__(self) -> Iterator[Action]:
        return (action for step in self.steps for action in step)

    def __bool__(self) -> bool:
        return any(self.steps)

    def __len__(self) -> int:
        return sum(map(len, self.steps))

    def describe(self) -> list[str]:
        """One line an action; a resource that is made again says why."""
        restarts = self.restarts
        lines = []
        for action in self:
            line = action.describe()
            if action.key in restarts:
                verb, _, rest = line.partition(" ")
                name = action.key.replace(":", " ")
                why = restarts[action.key]
                line = f"restart {name}: {why}" if verb == "delete" else f"{verb} again {rest}"
            elif isinstance(action, Delete) and action.key in self.reasons:
                line += f" (to make it again: {self.reasons[action.key]})"
            lines.append(line)
        return lines


def diff(desired: State, observed: State) -> Plan:
    """The plan that turns `observed` into `desired`; empty (false) when they are in sync."""
    doomed: dict[str, Resource] = {}
    reasons: dict[str, str] = {}
    for old in observed:
        new = desired.get(old.key)
        if new is None:
            doomed[old.key] = old
        elif old != new and not old.can_become(new):
            doomed[old.key] = old
            reasons[old.key] = ", ".join(old.changes(new)) or "its kind changed"

    # What is left of the others once the doomed are gone; this can doom more of them.
    left = {resource.key: resource for resource in observed if resource.key not in doomed}
    for level in _levels(observed):
        for key in level:
            current = left.get(key)
            for needed in current.needs if current else ():
                if current is None or needed not in doomed:
                    continue
                remains = current.after_replace(needed)
                new = desired.get(key)
                if remains is None or (new is not None and not remains.can_become(new)):
                    doomed[key] = left.pop(key)
                    if key in desired:
                        reasons[key] = (
                            f"{needed} is made again" if needed in desired else f"{needed} goes"
                        )
                    current = None
                else:
                    left[key] = current = remains

    steps: list[list[Action]] = []
    for level in reversed(_levels(State(doomed.values()), deleting=True)):
        gone = sorted((doomed[key] for key in level), key=lambda old: not old.goes_with)
        steps.append([Delete(old) for old in gone])
    for level in _levels(desired):
        creates: list[Action] = []
        updates: list[Action] = []
        for key in level:
            new = desired.get(key)
            assert new is not None
            if key not in left:
                creates.append(Create(new))
            elif left[key] != new:
                updates.append(Update(left[key], new))
        steps += [step for step in (creates, updates) if step]
    return Plan(steps, reasons)


def _levels(state: State, deleting: bool = False) -> list[list[str]]:
    """Keys by depth: one past the deepest of a resource's needs that are in the state. To be
    deleted, it may have the depth of what it goes with, and is one past what it goes before.
    """
    depth: dict[str, int] = {}

    def visit(key: str) -> int:
        if key not in depth:
            resource = state.get(key)
            assert resource is not None
            depth[key] = (
                0  # a cycle would be a mistake of the compiler; it must not hang the planner
            )
            past = dict.fromkeys((*resource.needs, *state.order.get(key, ())), 1)
            if deleting:
                past |= {n: 0 for n in resource.needs if n.startswith(resource.goes_with)}
                past |= dict.fromkeys(resource.goes_before, 1)
            depth[key] = max((visit(n) + step for n, step in past.items() if n in state), default=0)
        return depth[key]

    levels: list[list[str]] = []
    for resource in state:
        level = visit(resource.key)
        while len(levels) <= level:
            levels.append([])
        levels[level].append(resource.key)
    return levels
