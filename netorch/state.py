"""A State: what a lab should be, or what the machine was seen to have."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from netorch.resources import Resource

T = TypeVar("T", bound=Resource)


class State:
    """A set of resources by key: what a lab should be, or what the machine was seen to have.

    `order` says what a resource comes after although it doesn't need it, by key: it is no property
    of the machine, and two states that differ in nothing else are equal.
    """

    __slots__ = ("_resources", "order")

    def __init__(
        self, resources: Iterable[Resource] = (), order: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        self._resources = {resource.key: resource for resource in resources}
        self.order: Mapping[str, tuple[str, ...]] = order or {}

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._resources.values())

    def __len__(self) -> int:
        return len(self._resources)

    def __contains__(self, key: object) -> bool:
        return key in self._resources

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._resources == other._resources

    def __hash__(self) -> int:
        return hash(frozenset(self._resources))

    def __repr__(self) -> str:
        return f"State({list(self)!r})"

    def get(self, key: str) -> Resource | None:
        return self._resources.get(key)

    def of(self, kind: type[T]) -> list[T]:
        """The resources of one class, in the order in which they were given."""
        return [resource for resource in self if isinstance(resource, kind)]


EMPTY = State()
