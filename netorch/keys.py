"""Keys by QEMU's names (QKeyCode), and the keys that type a text on a US keyboard: pure.

A combination is written as QEMU's monitor and virsh write it, with hyphens: `ctrl-alt-delete`. No
QKeyCode has a hyphen in its name.
"""

from collections.abc import Iterable, Iterator, Set

from netorch.errors import UsageError

Combination = tuple[str, ...]

# What people call keys that QEMU calls otherwise.
_ALSO = {
    "enter": "ret",
    "return": "ret",
    "escape": "esc",
    "space": "spc",
    "control": "ctrl",
    "del": "delete",
    "ins": "insert",
    "pageup": "pgup",
    "pagedown": "pgdn",
    "win": "meta_l",
    "super": "meta_l",
}

_PLAIN = {
    "\n": "ret",
    "\t": "tab",
    " ": "spc",
    "-": "minus",
    "=": "equal",
    "[": "bracket_left",
    "]": "bracket_right",
    ";": "semicolon",
    "'": "apostrophe",
    "`": "grave_accent",
    "\\": "backslash",
    ",": "comma",
    ".": "dot",
    "/": "slash",
    **{c: c for c in "abcdefghijklmnopqrstuvwxyz0123456789"},
}
# Each character of the first row is the shifted one of the second.
_SHIFTED = dict(zip('!@#$%^&*()_+{}:"~<>?|', "1234567890-=[];'`,./\\", strict=True))


def combination(text: str, known: Set[str]) -> Combination:
    """The keys of `ctrl-alt-delete`, which are pressed together. Raises UsageError.

    `known` are the names that the guest's QEMU has.
    """
    keys = tuple(_ALSO.get(word.lower(), word.lower()) for word in text.split("-"))
    for key in keys:
        if key not in known:
            from difflib import get_close_matches

            near = get_close_matches(key, [*known, *_ALSO], 1)
            raise UsageError(
                f"there is no key {key!r}" + (f" in {text!r}" if key != text else ""),
                f"perhaps {near[0]}" if near else "QEMU's names, such as ret, f1, ctrl-c",
            )
    return keys


def typed(text: str) -> Iterator[Combination]:
    """The combinations that type `text`, where `\\n`, `\\t` and `\\\\` may stand for a newline, a
    tab and a backslash. Raises UsageError for what a US keyboard has not.
    """
    for character in _unescaped(text):
        if character in _PLAIN:
            yield (_PLAIN[character],)
        elif character in _SHIFTED:
            yield ("shift", _PLAIN[_SHIFTED[character]])
        elif character.lower() in _PLAIN:
            yield ("shift", character.lower())
        else:
            raise UsageError(f"no key of a US keyboard types {character!r}")


def _unescaped(text: str) -> Iterable[str]:
    characters = iter(text)
    for character in characters:
        if character != "\\":
            yield character
            continue
        following = next(characters, "")
        if following in ("n", "t", "\\"):
            yield {"n": "\n", "t": "\t", "\\": "\\"}[following]
        else:
            yield character
            yield from following
