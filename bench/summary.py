"""The README's table, made of the results that are committed.

`python -m bench.summary` rewrites it, as `scripts/bench` does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "results.json"
BEGIN, END = "<!-- bench.summary: begin -->\n", "<!-- bench.summary: end -->\n"

# Whole commands: what it is, the job, netorch's contender, the label, and the others' names there.
_ROWS = (
    ("NAT network, DHCP, two taps: up", "A", "netorch", "up"),
    ("the same: down", "A", "netorch", "down"),
    ("two hosts on a bridge: up", "A", "netorch (two hosts)", "up"),
    ("100 taps on a bridge: up", "B", "netorch", "up"),
    ("the same: down", "B", "netorch", "down"),
    ("100 hosts on a bridge: up", "B", "netorch (100 hosts)", "up"),
    ("1,000 taps on ten bridges: up", "C", "netorch", "up"),
    ("the same: down", "C", "netorch", "down"),
    ("the same: one tap more", "C", "netorch", "add one"),
    ("the same: nothing to change", "C", "netorch", "again"),
    ("a guest, to its address", "D1", "netorch warm", "up"),
    ("the same, booted", "D1", "netorch cold", "up"),
    ("eight guests", "D8", "netorch warm", "up"),
    ("the same, booted", "D8", "netorch cold", "up"),
)
_OTHERS = ("script", "libvirt", "mininet", "munet")


def table(results: dict[str, Any]) -> str:
    lines = ["| | netorch | best shell script | libvirt | mininet | munet |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for what, letter, ours, label in _ROWS:
        figures = results["jobs"][letter]["figures"]
        cells = [figures[ours][label]["ms"], *_others(figures, ours, label)]
        lines.append(f"| {what} | {' | '.join(map(_time, cells))} |")
    return "\n".join(lines) + "\n"


def _others(figures: dict[str, Any], ours: str, label: str) -> Iterator[float | None]:
    """What makes hosts stands beside our hosts, what does not beside our taps."""
    for other in _OTHERS:
        yield min(
            (
                of[label]["ms"]
                for name, of in figures.items()
                if name.startswith(other) and label in of and ("hosts" in name) == ("hosts" in ours)
            ),
            default=None,
        )


def _time(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def readme(text: str, results: dict[str, Any]) -> str:
    """The README with the table of these results."""
    before, _, rest = text.partition(BEGIN)
    _old, _, after = rest.partition(END)
    return before + BEGIN + table(results) + END + after


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
