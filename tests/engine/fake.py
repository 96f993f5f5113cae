"""A machine in memory, for the engine's logic only. What it shows is never reported as working.

It behaves as the kernel does where that matters to the engine: a deleted bridge lets go of its
ports, a deleted namespace takes its veths along, creating what is there or needs what is missing
fails. Its state prints as text, and it can be told to fail at the n-th change.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from netorch.errors import KernelError
from netorch.planner import Action, Create, Delete, Update
from netorch.resources import Guest, Namespace, Rate, Resource, Tap, Veth
from netorch.state import EMPTY, State


class Killed(BaseException):
    """Stands for SIGKILL: nothing of netorch runs after it."""


class FakeSystem:
    def __init__(self, state: State = EMPTY) -> None:
        self.there = {resource.key: resource for resource in state}
        self.changes = 0
        self.fail_at: int | None = None
        self.fail_with: BaseException = KernelError("failed to do it: no luck", 5)
        self.half_made: Callable[[Resource], Resource | None] = lambda resource: None
        self.refused: list[str] = []

    def observe(self) -> State:
        return State(self.there.values())

    def check(self, wanted: Iterable[Resource]) -> list[str]:
        return self.refused

    def execute(self, step: Sequence[Action], done: Callable[[Action], None]) -> None:
        for action in step:
            self._change(action)
            done(action)

    def text(self) -> str:
        return "\n".join(f"{key}: {self.there[key].describe()}" for key in sorted(self.there))

    def _change(self, action: Action) -> None:
        self.changes += 1
        if self.changes == self.fail_at:
            self.fail_at = None
            if isinstance(action, Create) and (left := self.half_made(action.new)) is not None:
                self.there[action.key] = left
            raise self.fail_with
        if isinstance(action, Delete):
            self.there.pop(action.key, None)
            self._let_go(action.old)
            return
        assert isinstance(action, Create | Update)
        if isinstance(action, Create):
            assert action.key not in self.there, f"{action.key} is there already"
        else:
            assert self.there.get(action.key) == action.old, (
                f"{action.key} is not as it was planned"
            )
        for needed in action.new.needs:
            if needed.partition(":")[0] not in (
                "dnsmasq",
                "ruleset",
            ):  # both may be absent by design
                assert needed in self.there, f"{action.key} needs {needed}"
        self.there[action.key] = action.new

    def _let_go(self, gone: Resource) -> None:
        for key, resource in list(self.there.items()):
            if gone.key not in resource.needs:
                continue
            if isinstance(resource, Guest | Rate):
                left = resource.after_replace(gone.key)
                if left is not None:
                    self.there[key] = left
            elif isinstance(resource, Tap):
                self.there[key] = msgspec.structs.replace(resource, bridge="")
            elif isinstance(resource, Veth):
                if isinstance(gone, Namespace):
                    del self.there[key]
                else:
                    self.there[key] = msgspec.structs.replace(resource, bridge="")
