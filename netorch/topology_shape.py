"""The slow reading of a topology: every unknown key and every value of a wrong type, at once.

msgspec stops at the first mistake. So when it has found one, this walks the data along msgspec's
own description of the model, notes all of them in a person's words, and puts a harmless value
where a wrong one stood, so that `netorch.topology_checks` can look at the rest. `broken` names the
places of such values; whatever is said about those would be an echo.
"""

from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from netorch.errors import Finding, Key, quoted
from netorch.model import Topology
from netorch.topology_values import nearest

_WRONG = object()


def read(data: dict[str, Any]) -> tuple[Topology, list[Finding], set[Key]]:
    """The topology as far as it can be read, its mistakes, and the places that were made up."""
    walk = _Walk()
    topology = walk.value(inspect.type_info(Topology), data, ())
    return topology, walk.findings, walk.broken


class _Walk:
    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.broken: set[Key] = set()

    def value(self, kind: inspect.Type, value: object, path: Key) -> Any:
        """The value, with every wrong part replaced; _WRONG if nothing of it is left."""
        for option in _options(kind):
            bare = _bare(option)
            if not _fits(bare, value):
                continue
            if isinstance(bare, inspect.StructType):
                return self._struct(bare, value, path)
            if isinstance(bare, inspect.DictType):
                return self._dict(bare, value, path)
            if isinstance(bare, inspect.VarTupleType | inspect.TupleType):
                return self._array(bare, value, path)
            if _allows(bare, value):
                return value
        return self._wrong(
            path, f"expected {_words(kind)}, got {_shown(value)}", _hint(kind, value)
        )

    def _wrong(self, path: Key, message: str, hint: str) -> object:
        self.findings.append((path, message, hint))
        self.broken.add(path)
        return _WRONG

    def _struct(self, kind: inspect.StructType, table: Any, path: Key) -> object:
        fields = {field.encode_name: field for field in kind.fields}
        for name in table.keys() - fields.keys():
            self._unknown(name, list(fields), table, path)
        values = {}
        for name, field in fields.items():
            if name in table:
                value = self.value(field.type, table[name], (*path, name))
                if value is not _WRONG:
                    values[field.name] = value
            elif field.required:
                value = "..." if isinstance(field.type, inspect.IntType) else '"..."'
                self._wrong((*path, name), "is missing", f"write {name} = {value}")
            if field.required and field.name not in values:
                values[field.name] = ""  # what is broken is not looked at
        return kind.cls(**values)

    def _unknown(self, name: str, known: list[str], table: Any, path: Key) -> None:
        meant = nearest(name, known)
        if meant:
            hint = f"did you mean {meant}?"
            if meant not in table:
                self.broken.add((*path, meant))
        else:
            hint = f"known here: {', '.join(known)}"
        self.findings.append(((*path, name), "no such key", hint))

    def _dict(self, kind: inspect.DictType, table: Any, path: Key) -> dict[str, object]:
        found = {}
        for name, item in table.items():
            if not _allows(_bare(kind.key_type), name):
                message = f"expected {_words(kind.key_type)}, got {quoted(name)}"
                self.findings.append(((*path, name), message, _hint(kind.key_type, name)))
            value = self.value(kind.value_type, item, (*path, name))
            if value is _WRONG:
                assert isinstance(kind.value_type, inspect.StructType)
                value = self._made_up(kind.value_type)
            found[name] = value
        return found

    def _array(
        self, kind: inspect.VarTupleType | inspect.TupleType, items: Any, path: Key
    ) -> object:
        if isinstance(kind, inspect.TupleType):
            if len(items) != len(kind.item_types):
                message = f"expected {_words(kind)}, got an array of {len(items)}"
                return self._wrong(path, message, "")
            kinds = list(kind.item_types)
        else:
            kinds = [kind.item_type] * len(items)
        found = []
        for index, (item_kind, item) in enumerate(zip(kinds, items, strict=True)):
            value = self.value(item_kind, item, (*path, index))
            if value is _WRONG:
                made_up = isinstance(item_kind, inspect.StructType)
                value = self._made_up(item_kind) if made_up else ""
            found.append(value)
        return tuple(found)

    def _made_up(self, kind: Any) -> object:
        return kind.cls(**{field.name: "" for field in kind.fields if field.required})


def _options(kind: inspect.Type) -> Iterator[inspect.Type]:
    """The types that a value may have; TOML has no null, so None is not among them."""
    for option in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
        if not isinstance(option, inspect.NoneType):
            yield option


def _bare(kind: inspect.Type) -> inspect.Type:
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _fits(kind: inspect.Type, value: object) -> bool:
    """Is the value of the kind's TOML type?"""
    if isinstance(kind, inspect.IntType):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, inspect.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, inspect.StrType | inspect.LiteralType):
        return isinstance(value, str)
    if isinstance(kind, inspect.StructType | inspect.DictType):
        return isinstance(value, dict)
    return isinstance(value, list)


def _allows(kind: inspect.Type, value: Any) -> bool:
    """Does the value keep the limits of its kind?"""
    if isinstance(kind, inspect.IntType):
        return (kind.ge is None or value >= kind.ge) and (kind.le is None or value <= kind.le)
    if isinstance(kind, inspect.LiteralType):
        return value in kind.values
    if isinstance(kind, inspect.StrType) and kind.pattern:
        import re

        return re.search(kind.pattern, value) is not None
    return True


def _words(kind: inspect.Type) -> str:
    """The kind as a person says it, with the values that it allows."""
    words = [word for option in _options(kind) for word in _option_words(option)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _option_words(kind: inspect.Type) -> list[str]:
    if isinstance(kind, inspect.Metadata):
        return [_description(kind)[0]]
    if isinstance(kind, inspect.LiteralType):
        return [quoted(str(value)) for value in kind.values]
    if isinstance(kind, inspect.IntType):
        limits = f" from {kind.ge} to {kind.le}" if kind.ge is not None else ""
        return [f"a whole number{limits}"]
    if isinstance(kind, inspect.BoolType):
        return ["true", "false"]
    if isinstance(kind, inspect.StrType):
        return ["a string"]
    if isinstance(kind, inspect.TupleType):
        return ["an array of two strings"]
    if isinstance(kind, inspect.VarTupleType):
        return [f"an array of {'strings' if _holds_strings(kind) else 'tables'}"]
    return ["a table"]


def _holds_strings(kind: inspect.VarTupleType) -> bool:
    return isinstance(_bare(kind.item_type), inspect.StrType)


def _description(kind: inspect.Metadata) -> tuple[str, str]:
    """What the model calls the type, and, after a colon, what it has to look like."""
    name, _, form = str((kind.extra_json_schema or {})["description"]).partition(": ")
    return name, form


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int | float):
        number = f"{value:#x}" if isinstance(value, int) and abs(value) >= 10**60 else str(value)
        return number if len(number) <= 60 else f"a number of {len(number)} digits"
    return f"the date or time {value}"


def _hint(kind: inspect.Type, value: object) -> str:
    fits = any(_fits(_bare(option), value) for option in _options(kind))
    for option in _options(kind):
        bare = _bare(option)
        if isinstance(bare, inspect.LiteralType) and isinstance(value, str):
            meant = nearest(value, [str(known) for known in bare.values])
            if meant:
                return f"did you mean {quoted(meant)}?"
        if isinstance(bare, inspect.BoolType) and value in ("true", "false"):
            return f"without the quotes: {value}"
        if isinstance(bare, inspect.IntType) and isinstance(value, str) and value.isdecimal():
            return f"without the quotes: {_shown(value)[1:-1]}"
        can_be_quoted = isinstance(value, int | float) and not fits
        if (
            can_be_quoted
            and isinstance(bare, inspect.StrType)
            and bare.pattern
            and _allows(bare, _shown(value))
        ):
            return f"in quotes: {quoted(_shown(value))}"
        if isinstance(option, inspect.Metadata) and isinstance(value, str):
            return _description(option)[1]
        if isinstance(bare, inspect.VarTupleType) and isinstance(value, dict):
            return "an array of tables is written [[...]], or [{ ... }]"
    return ""
