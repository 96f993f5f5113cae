"""The goals that the figures are held against, each a ratio of two figures of the same run."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bench.turns import Figure, exponent

# Of a job: contender -> label -> figure. Of all: letter -> that.
Figures = Mapping[str, Mapping[str, Figure]]
PEERS = ("libvirt", "mininet", "munet", "naive script")


class Goal(NamedTuple):
    """`measured` has to be at most `limit`."""

    what: str
    measured: float
    limit: float

    @property
    def reached(self) -> bool:
        return self.measured <= self.limit


def figures(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Figure]]]:
    """What bench/results has, by job."""
    return {
        letter: {
            name: {label: Figure(**figure) for label, figure in of.items()}
            for name, of in job["figures"].items()
        }
        for letter, job in results["jobs"].items()
    }


def goals(found: Mapping[str, Figures]) -> list[Goal]:
    """Those for which this run has figures."""
    of = {
        "H": _start_up,
        "A": lambda job: [*_beside_peers("A", job, 1.0), *_again("A", job), *_floor("A", job)],
        "B": lambda job: [*_beside_peers("B", job, 0.2), *_again("B", job), *_floor("B", job)],
        "C": lambda job: [*_beside_peers("C", job, 0.2), *_again("C", job), *_floor("C", job)],
        "D1": lambda job: _guests("D1", job),
        "D8": lambda job: _guests("D8", job),
        "D32": _memory,
        "I": _fixture,
        "J": _growth,
    }
    return [goal for letter, job in found.items() if letter in of for goal in of[letter](job)]


def _start_up(job: Figures) -> Iterator[Goal]:
    for label in ("--version", "check"):
        bare = job["bare interpreter"][label].ms
        yield Goal(f"H {label} / bare interpreter", job["netorch"][label].ms / bare, 6.0)


def _beside_peers(letter: str, job: Figures, limit: float) -> Iterator[Goal]:
    """Whole commands; hosts beside peers that make hosts."""
    for name, figures in job.items():
        if not name.startswith(PEERS):
            continue
        hosts = [own for own in job if own.startswith("netorch (")]
        ours = hosts[0] if hosts and name.startswith(("mininet", "munet")) else "netorch"
        for label in ("up", "down") if letter != "A" or name.startswith("libvirt") else ("up",):
            ratio = job[ours][label].ms / figures[label].ms
            yield Goal(f"{letter} {label}: {ours} / {name}", ratio, limit)


def _floor(letter: str, job: Figures) -> Iterator[Goal]:
    """What is left of a command after the interpreter and all imports, to the whole script."""
    ours, script = job["netorch"], job["script"]
    for label in ("up", "down") if letter != "A" else ("down",):
        rest = ours[label].ms - ours["start-up"].ms
        yield Goal(
            f"{letter} {label}: netorch after start-up / script", rest / script[label].ms, 1.5
        )


def _again(letter: str, job: Figures) -> Iterator[Goal]:
    ratio = job["netorch"]["again"].ms / job["netorch"]["status"].ms
    yield Goal(f"F no-change apply of {letter} / status", ratio, 1.3)


def _guests(letter: str, job: Figures) -> Iterator[Goal]:
    floor = job["script"]["up"].ms
    leases = job["netorch cold"]["leases"].ms
    yield Goal(f"{letter} cold, to the leases / script", leases / floor, 1.1)
    if "netorch warm" in job:
        yield Goal(f"{letter} warm / script", job["netorch warm"]["up"].ms / floor, 0.25)


def _memory(job: Figures) -> Iterator[Goal]:
    yield Goal("D32 warm, memory of all in GB", job["netorch warm"]["memory"].mib / 1024, 3.0)


def _fixture(job: Figures) -> Iterator[Goal]:
    for label in ("both, apart", "both, back to back"):
        yield Goal(f"I {label} / kernel", job["netorch"][label].ms / job["kernel"][label].ms, 2.5)


def _growth(job: Figures) -> Iterator[Goal]:
    sizes = {int(name): figures for name, figures in job.items() if name.isdigit()}
    for label in (label for label in job["10"] if label != "start-up"):
        time = exponent([(n, of[label].ms) for n, of in sizes.items()])
        yield Goal(f"J exponent of time, {label}", time, 1.1)
        memory = exponent([(n, of[label].mib) for n, of in sizes.items()])
        yield Goal(f"J exponent of memory, {label}", memory, 1.1)
    script = job["script, 1000"]
    for label in ("up", "down"):
        rest = job["1000"][label].ms - job["1000"]["start-up"].ms
        what = f"J {label}: 1,000 networks after start-up / script"
        yield Goal(what, rest / script[label].ms, 1.5)


def table(found: Mapping[str, Figures]) -> list[str]:
    lines = ["| goal | measured | at most | |", "|---|---:|---:|---|"]
    for goal in goals(found):
        verdict = "reached" if goal.reached else "**missed**"
        lines.append(f"| {goal.what} | {goal.measured:.2f} | {goal.limit:g} | {verdict} |")
    return lines
