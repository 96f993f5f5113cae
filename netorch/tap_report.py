"""What `netorch taps` prints: all taps, or those of one name or one process.

Names of taps, processes and guests are anybody's text: what isn't printable is escaped, so that
it can't move the cursor of whoever reads it.
"""

import sys
from collections.abc import Sequence

import msgspec

from netorch.errors import UsageError
from netorch.output import echo
from netorch.picture import table
from netorch.tap_queues import Found, TapRow

_HEAD = (
    *("TAP", "STATE", "BRIDGE", "QUEUES", "PROCESS", "PID", "FDS"),
    *("GUEST", "NIC", "MAC", "ADDRESS", "LAB", "PLACE"),
)


def chosen(found: Found, wanted: str | None) -> list[TapRow]:
    """The rows of the tap or the process `wanted`. Raises UsageError with the near names."""
    if wanted is None:
        return found.rows
    rows = [row for row in found.rows if wanted in (row.tap, str(row.pid))]
    if rows:
        return rows
    if wanted.isdecimal():
        pids = {str(row.pid): row for row in found.rows if row.pid is not None}
        message, known = f"process {wanted} has no tap open that can be seen", list(pids)
    else:
        message, known = f"no tap {wanted!r} can be seen", [row.tap for row in found.rows]
    hint = _hint(wanted, list(dict.fromkeys(known)))
    if found.refused:
        hint += f"; not looked into, for want of rights: {found.refused} processes"
    raise UsageError(message, hint)


def text(rows: Sequence[TapRow]) -> None:
    if rows:
        echo(table(_HEAD, [_cells(row) for row in rows]))
    else:
        echo("no tap can be seen")


def json_out(rows: Sequence[TapRow]) -> None:
    """A list of `TapRow`s; what isn't known is null."""
    encoded = msgspec.json.encode(_printable(msgspec.to_builtins(rows)))
    sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")


def unseen(found: Found, rows: Sequence[TapRow], root: bool) -> list[str]:
    """What is to be said of what could not be seen, a line each."""
    lines = []
    way = "with CAP_SYS_PTRACE and CAP_NET_ADMIN" if root else "sudo netorch taps"
    if any(row.namespace_from == "process" for row in rows):
        lines.append(f"?: where the process is; the kernel may not be asked of the tap: {way}")
    if found.refused:
        count = f"{found.refused} process{'es' if found.refused != 1 else ''}"
        whose = count if root else "other users' processes"
        held = sum(row.state == "open" and row.pid is None for row in rows)
        some = f" ({held} of these taps held there)" if held else ""
        lines.append(f"{whose} can't be looked into{some}; to see all: {way}")
    return lines


def _cells(row: TapRow) -> tuple[str, ...]:
    idle = f" ({row.idle} idle)" if row.idle else ""
    guessed = "?" if row.namespace_from == "process" else ""
    cells = (
        row.tap,
        row.state,
        row.bridge,
        None if row.queues is None else f"{row.queues}{idle}",
        row.process,
        None if row.pid is None else str(row.pid),
        ranges(row.descriptors) or None,
        row.guest,
        row.model,
        row.mac,
        row.address,
        row.lab,
        None if row.place is None else row.place + guessed,
    )
    return tuple("-" if cell is None else _escaped(cell) for cell in cells)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as in `5,8-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def _printable(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Without the surrogates of bytes that aren't UTF-8, which JSON can't have."""
    return [
        {
            name: value.encode("utf-8", "backslashreplace").decode()
            if isinstance(value, str)
            else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _hint(wanted: str, known: list[str]) -> str:
    import difflib  # costs 8 ms

    close = difflib.get_close_matches(wanted, known, n=5)
    if close:
        return f"near: {', '.join(map(_escaped, close))}"
    return f"there are: {', '.join(map(_escaped, known[:20]))}" if known else "there is none"
