"""The machine: the only package that touches the kernel, processes and files.

`System` is what the engine sees: observe, check, execute. Behind it stands one adapter for each
family of resources; each observes what carries the lab's mark and makes, changes and deletes what
it is handed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from netorch.planner import Action, Create, Delete, Update
from netorch.resources import Resource
from netorch.state import State

if TYPE_CHECKING:
    from netorch.system.look import Look
    from netorch.system.scope import Scope


class Adapter(Protocol):
    """One family of resources on the real machine.

    `create`, `update` and `delete` take resources that don't depend on each other, in any number,
    and call `done(resource)` for each as soon as it is as asked; on an error they raise a
    NetorchError for the first one that failed ("failed to create bridge virbr0: File exists"),
    after `done` was called for all that did succeed. All of them may be called twice: creating what
    an interrupted run left half made, or deleting what is gone, succeeds.
    """

    @property
    def kinds(self) -> tuple[type[Resource], ...]: ...

    def observe(self, look: "Look") -> Iterable[Resource]:
        """What the machine has with this lab's mark. Half-made objects are reported as they are."""
        ...

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        """Why `wanted` can't be created, a sentence each: foreign objects in the way, missing
        programs.
        """
        ...

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None: ...

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None: ...

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None: ...


@runtime_checkable
class InHalves(Protocol):
    """An adapter whose work goes on by itself once it has begun: processes start and end while
    the other adapters do their part of a step.
    """

    def begin(self, step: Sequence[Action]) -> None:
        """Begin what of this step is this adapter's; its `create` and `delete` wait for the end."""
        ...


class System:
    """All adapters as one; dispatches by the class of the resource."""

    def __init__(self, scope: "Scope", adapters: Sequence[Adapter]) -> None:
        self._scope = scope
        self._adapters = tuple(adapters)
        self._by_kind = {kind: adapter for adapter in adapters for kind in adapter.kinds}

    def observe(self, look: "Look | None" = None) -> State:
        """What there is, seen in one `look`; by default in a new one."""
        from netorch.system.look import Look

        look = look or Look(self._scope)
        return State(resource for adapter in self._adapters for resource in adapter.observe(look))

    def check(self, wanted: Iterable[Resource]) -> list[str]:
        """Every reason why these resources can't be created; empty if none is known."""
        return [
            reason
            for adapter, resources in self._grouped(wanted)
            for reason in adapter.check(resources)
        ]

    def execute(self, step: Sequence[Action], done: Callable[[Action], None]) -> None:
        """Carry out one step of a plan; `done` hears of each action as it is finished.

        What is deleted goes the other way round than it was made, and what has begun to end by
        itself is waited for last. So nft tables go before bridges: the kernel frees a table after
        a grace period, for which whoever closes the nft socket waits, and deleting a bridge takes
        several.
        """
        actions = {action.key: action for action in step}

        def finished(resource: Resource) -> None:
            done(actions[resource.key])

        groups = self._grouped(action.resource for action in step)
        if any(isinstance(action, Delete) for action in step):
            groups.reverse()
            groups.sort(key=lambda group: isinstance(group[0], InHalves))
        for adapter, resources in groups:
            if isinstance(adapter, InHalves):
                adapter.begin([actions[resource.key] for resource in resources])
        for adapter, resources in groups:
            chosen = [actions[resource.key] for resource in resources]
            creates = [action.new for action in chosen if isinstance(action, Create)]
            updates = [action for action in chosen if isinstance(action, Update)]
            deletes = [action.old for action in chosen if isinstance(action, Delete)]
            if deletes:
                adapter.delete(deletes, finished)
            if creates:
                adapter.create(creates, finished)
            if updates:
                adapter.update(updates, finished)

    def _grouped(self, resources: Iterable[Resource]) -> list[tuple[Adapter, list[Resource]]]:
        groups: dict[int, tuple[Adapter, list[Resource]]] = {}
        for resource in resources:
            adapter = self._by_kind[type(resource)]
            groups.setdefault(id(adapter), (adapter, []))[1].append(resource)
        return list(groups.values())
