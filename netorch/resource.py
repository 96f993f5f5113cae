"""The base of all resources; `netorch.resources` says what they are for and has all kinds."""

from typing import ClassVar, Self

import msgspec


class Resource(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=str.lower):
    """The base of all resources: frozen structs that encode to tagged JSON objects."""

    # Fields that a running object can take on; a difference in any other field makes it again.
    live: ClassVar[frozenset[str]] = frozenset()
    # How the keys begin of those needs that may be deleted in one step with it.
    goes_with: ClassVar[tuple[str, ...]] = ()
    # The keys of what must not be deleted before it, although it doesn't need that.
    goes_before: ClassVar[tuple[str, ...]] = ()

    @property
    def key(self) -> str:
        raise NotImplementedError

    @property
    def needs(self) -> tuple[str, ...]:
        return ("record",)

    def after_replace(self, needed: str) -> Self | None:
        """What is left of this one once `needed` has been deleted; None: it is gone or useless as
        well.
        """
        return None

    def refuses(self, new: Self) -> str:
        """Why this one can't become `new`, which has its key, as a sentence; "" where it can."""
        return ""

    def can_become(self, new: "Resource") -> bool:
        """Whether an update can make `new` of what this one was seen to be; otherwise it is made
        again.
        """
        return type(self) is type(new) and all(
            field in self.live or getattr(self, field) == getattr(new, field)
            for field in self.__struct_fields__
        )

    @property
    def is_in_use(self) -> bool:
        """Whether to make it again would stop something that somebody may be at work in: a restart,
        which has to be asked for.
        """
        return False

    def describe(self) -> str:
        """The resource in a few words, as `plan` prints it."""
        raise NotImplementedError

    def changes(self, new: "Resource") -> list[str]:
        """The fields in which `new` differs, as `name old -> new`."""
        return [
            f"{field} {short(getattr(self, field))} -> {short(getattr(new, field))}"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(new, field)
        ]


def short(value: object) -> str:
    """A value for a line of a plan."""
    if isinstance(value, tuple):
        return " ".join(map(short, value)) or "none"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
