"""Every key of a TOML text is found on the line where it stands."""

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netorch.errors import Key, dotted
from netorch.toml_lines import lines


def paths(value: object, path: Key = ()) -> Iterator[Key]:
    if path:
        yield path
    if isinstance(value, dict):
        for name, item in value.items():
            yield from paths(item, (*path, name))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, (*path, index))


def by_dotted(text: str) -> dict[str, int]:
    found = lines(text)
    assert set(paths(tomllib.loads(text))) <= set(found)
    return {dotted(path): line for path, line in found.items()}


def test_tables_keys_and_elements() -> None:
    text = """\
# [not.a.table]
[guests.vm1]
image = "tiny"
nics = [
    { network = "a", address = "10.0.0.2" },   # ] }
    # a comment
    { network = "b" }
]
[[guests.vm2.nics]]
network = 'c'
[[guests.vm2.nics]]
network = "d"
[hosts."a.b"]
"""
    found = by_dotted(text)
    assert found == {
        "guests": 2,
        "guests.vm1": 2,
        "guests.vm1.image": 3,
        "guests.vm1.nics": 4,
        "guests.vm1.nics[0]": 5,
        "guests.vm1.nics[0].network": 5,
        "guests.vm1.nics[0].address": 5,
        "guests.vm1.nics[1]": 7,
        "guests.vm1.nics[1].network": 7,
        "guests.vm2": 9,
        "guests.vm2.nics": 9,
        "guests.vm2.nics[0]": 9,
        "guests.vm2.nics[0].network": 10,
        "guests.vm2.nics[1]": 11,
        "guests.vm2.nics[1].network": 12,
        "hosts": 13,
        'hosts."a.b"': 13,
    }


@pytest.mark.parametrize(
    "value",
    [
        '"""\n[x]\n a = 1 \\" """',
        "'''\n'' = 1'''",
        '""""quoted"""""',
        "''''quoted'''''",
        '"# = \\" ["',
        "'[\\'",
        "1979-05-27 07:32:00Z",
        "[[1, 2],\n[3, ]\n, # ]\n]",
        "{ a.b = 1, 'c d' = [ { e = 2 } ] }",
        "-inf",
        '""',
    ],
)
def test_what_follows_a_value_is_found(value: str) -> None:
    text = f"first = {value}\r\nsecond = 2 # c\r\n\r\n  [ t . 'u' ]\r\n  third=3"
    found = by_dotted(text)
    second = 2 + value.count("\n")
    assert (found["first"], found["second"], found["t.u.third"]) == (1, second, second + 3)


def test_sub_tables_of_array_elements() -> None:
    text = "[[a]]\n[a.b]\nc = 1\n[[a]]\n[[a.d]]\n[[a.d]]\ne = 2\n"
    found = by_dotted(text)
    assert found["a[0].b.c"] == 3
    assert found["a[1].d[1]"] == 6
    assert found["a[1].d[1].e"] == 7


# Random documents: a nested dict, written in one of the ways that TOML has for each of its parts.

NAMES = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=4),
)
STRINGS = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.one_of(st.integers(-(2**70), 2**70), st.booleans(), STRINGS)
INLINE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
TABLES = st.recursive(
    st.dictionaries(NAMES, INLINE, max_size=4),
    lambda inner: st.dictionaries(
        NAMES, INLINE | inner | st.lists(inner, min_size=1, max_size=3), max_size=3
    ),
    max_leaves=6,
)


class Writer:
    """Writes a dict as TOML; `draw` decides about quotes, blanks and comments."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def pick(self, *choices: str) -> str:
        return str(self.draw(st.sampled_from(choices)))

    def name(self, name: str) -> str:
        return name if name and dotted((name,)) == name else basic(name)

    def blank(self) -> str:
        return self.pick("", " ", "\n", " # ]} \"'\n", "\t")

    def string(self, text: str) -> str:
        if self.draw(st.booleans()) and "'" not in text and text.isprintable():
            return self.pick(f"'{text}'", f"'''{text}'''")
        if self.draw(st.booleans()):
            first = "\n" if text.startswith("\n") else self.pick("", "\n")  # TOML drops one
            return '"""' + first + basic(text)[1:-1].replace("\\n", "\n") + '"""'
        return basic(text)

    def value(self, value: object) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, list):
            items = [self.blank() + self.value(item) + self.blank() for item in value]
            return "[" + ",".join(items) + self.blank() + "]"
        if isinstance(value, dict):
            pairs = (f" {self.name(k)} = {self.value(v)}" for k, v in value.items())
            return "{" + ",".join(pairs) + " }"
        return str(value)

    def table(self, table: dict[str, Any], header: str) -> str:
        plain = ""
        nested = ""
        for key, value in table.items():
            full = f"{header}.{self.name(key)}" if header else self.name(key)
            if isinstance(value, dict) and self.draw(st.booleans()):
                nested += f"{self.blank()}\n[ {full} ]\n" + self.table(value, full)
            elif is_tables(value) and self.draw(st.booleans()):
                nested += "".join(f"[[{full}]]\n{self.table(item, full)}" for item in value)
            else:
                plain += f"{self.pick('', ' ')}{self.name(key)}={self.value(value)} # c\n"
        return plain + nested


def is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) for i in value)


def basic(text: str) -> str:
    def escape(letter: str) -> str:
        if letter in '"\\':
            return "\\" + letter
        if letter == "\n":
            return "\\n"
        return letter if letter.isprintable() else f"\\U{ord(letter):08x}"

    return '"' + "".join(map(escape, text)) + '"'


@given(st.data())
def test_every_path_has_the_line_of_its_key(data: st.DataObject) -> None:
    document = data.draw(TABLES)
    writer = Writer(data.draw)
    text = writer.table(document, "")
    assert tomllib.loads(text) == document
    found = lines(text)
    rows = text.split("\n")
    assert set(found) == set(paths(document))
    for path, line in found.items():
        names = [part for part in path if isinstance(part, str)]
        if isinstance(path[-1], str):
            assert writer.name(names[-1]) in rows[line - 1]
