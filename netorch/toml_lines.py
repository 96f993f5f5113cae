"""On which line of a TOML text each key stands.

tomllib gives values without positions, so this scans the text a second time. It runs only when a
mistake has to be reported, and only on a text that tomllib has accepted: so it knows TOML's shape
(headers, dotted and quoted keys, the four kinds of strings, nested arrays and inline tables) and
checks nothing.

Libraries weighed: tomlkit and rtoml keep no positions; tree-sitter with its TOML grammar does, at
the price of two binary packages and the same walk over its tree.
"""

import re
import tomllib
from bisect import bisect_right

from netorch.errors import Key

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY = re.compile(r'[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'')
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_BARE = re.compile(r"[^,\]}#\n]*")


def lines(text: str) -> dict[Key, int]:
    """The line, from 1, of every key and array element of a valid TOML text, by its path.

    A table has the line of the first key or header that names it, an element of an array that on
    which it begins.
    """
    return _Scanner(text.replace("\r\n", "\n")).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.found: dict[Key, int] = {}
        self.elements: dict[Key, int] = {}  # arrays of tables: the index of the latest one

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self._accept("[["):
                table = self._header(self._key(), element=True)
                self._accept("]]")
            elif self._accept("["):
                table = self._header(self._key(), element=False)
                self._accept("]")
            else:
                self._pair(table)
            self._skip(_BLANK)
        return self.found

    def _header(self, key: tuple[str, ...], element: bool) -> Key:
        """The path that a header means: its names, each with the index of the latest element."""
        path: Key = ()
        for depth, name in enumerate(key, start=1):
            path = (*path, name)
            self._note(path)
            if element and depth == len(key):
                self.elements[path] = self.elements.get(path, -1) + 1
            if path in self.elements:
                path = (*path, self.elements[path])
                self._note(path)
        return path

    def _pair(self, table: Key) -> None:
        path = table
        for name in self._key():
            path = (*path, name)
            self._note(path)
        self._accept("=")
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> tuple[str, ...]:
        names = []
        while True:
            self._skip(_SPACE)
            raw = self._take(_KEY)
            names.append(tomllib.loads(f"key = {raw}")["key"] if raw[0] in "\"'" else raw)
            self._skip(_SPACE)
            if not self._accept("."):
                return tuple(names)

    def _value(self, path: Key) -> None:
        if self._accept("["):
            index = 0
            while not self._closed("]"):
                self._note((*path, index))
                self._value((*path, index))
                index += 1
        elif self._accept("{"):
            while not self._closed("}"):
                self._pair(path)
        elif self.text[self.at] in "\"'":
            self._take(_STRING)
        else:
            self._take(_BARE)

    def _closed(self, bracket: str) -> bool:
        """Go to the next item; true if there is none and the bracket is closed."""
        self._skip(_BLANK)
        if self._accept(","):
            self._skip(_BLANK)
        return self._accept(bracket)

    def _note(self, path: Key) -> None:
        self.found.setdefault(path, bisect_right(self.starts, self.at))

    def _accept(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        if found:
            self.at += len(token)
        return found

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._take(pattern)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"not TOML at offset {self.at}: tomllib has to see it first"
        self.at = match.end()
        return match.group()
