"""TOML text -> Topology, with all mistakes of the file at once.

A file without mistakes takes the short way: tomllib, msgspec's conversion, and `topology_checks`.
Only when one of them objects, the file is read again the slow way (`topology_shape`), which finds
every mistake, and a third time (`toml_lines`), for the line of each.

A syntax error is the exception to "all": nothing after it can be trusted, so it stands alone.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from netorch.errors import Finding, Mistake, TopologyError, dotted
from netorch.model import Topology
from netorch.topology_checks import check
from netorch.topology_files import complete
from netorch.topology_values import memory_mib

_SYNTAX_HINTS = {
    "Invalid value": 'text stands in quotes: mode = "nat"',
    "Cannot overwrite a value": "the key stands there twice",
}

__all__ = ["checked", "load", "memory_mib", "parse"]


_LARGEST = 16 << 20  # bytes; a disk image, or /dev/zero, would fill the memory


def load(path: Path) -> Topology:
    """The topology in the file. Raises TopologyError for a file that can't be read or is wrong."""
    source = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise TopologyError(source, [Mistake("", "there is no such file")]) from error
    except IsADirectoryError as error:
        hint = "name the topology file in it"
        raise TopologyError(source, [Mistake("", "is a directory", hint)]) from error
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise TopologyError(source, [Mistake("", f"can't be read: {reason}")]) from error
    if len(raw) > _LARGEST:
        mistake = Mistake("", f"is larger than {_LARGEST >> 20} MiB", "is it a topology?")
        raise TopologyError(source, [mistake])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        mistake = Mistake("", "is not UTF-8 text", "TOML files are; save it as such", line)
        raise TopologyError(source, [mistake]) from error
    return parse(text, source, path.absolute().parent)


def parse(text: str, source: str, base: Path) -> Topology:
    """The topology in the text; `source` is what messages call it, `base` where its paths begin.

    The lab has its name, and files are taken in (`netorch.topology_files`); everything else is as
    written. Raises TopologyError.
    """
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise TopologyError(source, [Mistake("", "is nested too deeply")]) from error
    except ValueError as error:  # also from int(), which refuses numbers of over 4,300 digits
        raise TopologyError(source, [_syntax(text, str(error))]) from error
    try:
        topology = msgspec.convert(data, Topology)
    except msgspec.ValidationError as error:
        raise TopologyError(source, _mistakes(text, data, str(error))) from error
    if check(topology):
        raise TopologyError(source, _mistakes(text, data, ""))
    return _complete(topology, source, base, text)


def checked(topology: Topology, source: str, base: Path) -> Topology:
    """A topology that a program made, checked and completed as one that was parsed."""
    data = msgspec.json.decode(msgspec.json.encode(topology))  # arrays as TOML has them
    try:
        objection = ""
        topology = msgspec.convert(data, Topology)
    except msgspec.ValidationError as error:
        objection = str(error)
    if objection or check(topology):
        raise TopologyError(source, _mistakes("", data, objection))
    return _complete(topology, source, base, "")


def _complete(topology: Topology, source: str, base: Path, text: str) -> Topology:
    topology, findings = complete(topology, base)
    if findings:
        raise TopologyError(source, _placed(text, findings))
    lab = topology.lab
    if lab.name is None:
        lab = msgspec.structs.replace(lab, name=_lab_name(source))
    return msgspec.structs.replace(topology, lab=lab)


def _lab_name(source: str) -> str:
    """The file's name without its suffix, as a valid name: `My lab.toml` is `My-lab`."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).stem)
    return cleaned.lstrip("_.-")[:63].rstrip("-") or "lab"


def _syntax(text: str, message: str) -> Mistake:
    """tomllib's message, its position taken apart."""
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if place is None:
        return Mistake("", f"is not valid TOML: {message}")
    what = message[: place.start()]
    hint = _SYNTAX_HINTS.get(what, "")
    if place[1] is None:
        return Mistake("", f"not valid TOML: {what} at the end of the file", hint, _last_line(text))
    return Mistake("", f"not valid TOML: {what} at column {place[2]}", hint, int(place[1]))


def _last_line(text: str) -> int:
    return text.rstrip("\n").count("\n") + 1


def _mistakes(text: str, data: dict[str, Any], objection: str) -> list[Mistake]:
    """Every mistake of a file that has some, in the order of its lines."""
    from netorch.topology_shape import read

    topology, findings, broken = read(data)
    findings += check(topology, broken)
    assert findings, f"msgspec refused what topology_shape accepts: {objection}"
    return _placed(text, findings)


def _placed(text: str, findings: Iterable[Finding]) -> list[Mistake]:
    from netorch.toml_lines import lines

    known = lines(text)
    order = {path: place for place, path in enumerate(known, start=1)}
    placed = []
    for path, message, hint in findings:
        ends = range(len(path), 0, -1)
        there = next((path[:end] for end in ends if path[:end] in known), ())
        mistake = Mistake(dotted(path), message, hint, known.get(there, 0))
        placed.append((mistake.line, order.get(there, 0), mistake))
    return [mistake for _, _, mistake in sorted(placed, key=lambda item: item[:2])]
