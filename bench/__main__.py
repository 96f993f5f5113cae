"""Runs the jobs and writes the table: `scripts/bench [LETTER...]`. Needs root (namespaces).

With --quick, one turn of each and nothing written: to try the bench, not to measure.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import goals, peers, summary
from bench.jobs import Job, Tools, all_jobs
from bench.turns import Figure, measure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

# What a figure is divided by: the first of these that took part.
BASES = ("script", "C floor", "bare interpreter", "kernel")


def main() -> None:
    venv = Path(sys.argv[1])
    quick = "--quick" in sys.argv
    letters = [word for word in sys.argv[2:] if word != "--quick"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        tools = _tools(venv, Path(scratch))
        os.environ["BENCH_TINY"] = _tiny(tools)
        jobs = [job for job in all_jobs(tools) if not letters or job.letter in letters]
        found, took = {}, {}
        for job in jobs:
            start = time.time()
            found[job.letter] = _run(job, Path(scratch), quick)
            took[job.letter] = round(time.time() - start)
            print(f"{job.letter} took {took[job.letter]} s", file=sys.stderr, flush=True)
    machine = _machine(tools)
    absent = peers.missing()
    text = _table(jobs, found, machine) + _notes(took, absent)
    print(text)
    if quick:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "results.md").write_text(text)
    whole = {
        "machine": machine,
        "seconds": round(time.time() - began),
        "left out": absent,
        "jobs": {
            job.letter: {
                "title": job.title,
                "seconds": took[job.letter],
                "figures": _plain(found[job.letter]),
            }
            for job in jobs
        },
    }
    (RESULTS / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    if not letters:
        summary.main()


def _run(job: Job, scratch: Path, quick: bool) -> dict[str, dict[str, Figure]]:
    def say(line: str) -> None:
        print(f"{job.letter} {line}", file=sys.stderr, flush=True)

    few = dict.fromkeys(job.few, 1) if quick else job.few
    turns = 0 if quick else job.turns
    return measure(job.contenders, turns, few, scratch / job.letter, say)


def _tools(venv: Path, scratch: Path) -> Tools:
    floor = scratch / "floor"
    source = ROOT / "bench" / "floor.c"
    subprocess.run(["cc", "-O2", "-o", str(floor), str(source)], check=True)
    return Tools(str(venv / "bin/netorch"), str(venv / "bin/python"), str(floor))


def _tiny(tools: Tools) -> str:
    """Paths of the image tiny, built if it has to be, as JSON."""
    program = (
        "import json\nfrom netorch.system.tiny import tiny_image\n"
        "i = tiny_image(print)\n"
        "print(json.dumps({'kernel': str(i.kernel), 'initrd': str(i.initrd), "
        "'cmdline': i.cmdline}))"
    )
    said = subprocess.run([tools.python, "-c", program], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[-1]


def _machine(tools: Tools) -> dict[str, str]:
    model = next(
        (
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    return {
        "date": time.strftime("%F"),
        "cpu": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": _python(tools),
        "qemu": qemu.stdout.splitlines()[0] if qemu.stdout else "none",
        "accelerator": "TCG",
        "load before": f"{os.getloadavg()[2]:.1f}",
    }


def _python(tools: Tools) -> str:
    """Version and path: distributions build theirs with more optimization than a plain build."""
    program = "import platform, sys; print(platform.python_version(), sys._base_executable)"
    said = subprocess.run([tools.python, "-c", program], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def _plain(found: dict[str, dict[str, Figure]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {label: figure._asdict() for label, figure in figures.items()}
        for name, figures in found.items()
    }


def _table(
    jobs: list[Job],
    found: dict[str, dict[str, dict[str, Figure]]],
    machine: dict[str, str],
) -> str:
    lines = [
        "# Results of scripts/bench",
        "",
        ", ".join(f"{key}: {value}" for key, value in machine.items()) + ".",
        "",
        "Whole commands, from spawn to exit, in milliseconds: the median, and the lowest and the",
        "highest turn. The ratio is to the first of script, C floor, bare interpreter and the bare",
        "kernel work that took part. Contenders took turns; slow ones had fewer. Peak memory is",
        "that of the largest process that was waited for.",
        "",
        "| job | | contender | ms | lowest - highest | ratio | peak MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for job in jobs:
        figures = found[job.letter]
        for label in dict.fromkeys(label for of in figures.values() for label in of):
            for name, of in figures.items():
                if label in of:
                    lines.append(_row(job, label, name, of[label], _base(figures, label)))
    if goals.goals(found):
        lines += ["", "The goals, as ratios where no unit is given:", ""]
        lines += goals.table(found)
    return "\n".join(lines) + "\n"


def _notes(took: dict[str, int], absent: dict[str, str]) -> str:
    jobs = ", ".join(f"{letter} {seconds} s" for letter, seconds in took.items())
    lines = ["", f"All of it took {sum(took.values()) / 60:.0f} minutes: {jobs}."]
    lines += [f"Left out: {peer}: {reason}." for peer, reason in absent.items()]
    return "\n".join(lines) + "\n"


def _base(figures: dict[str, dict[str, Figure]], label: str) -> float | None:
    return next((figures[b][label].ms for b in BASES if label in figures.get(b, {})), None)


def _row(job: Job, label: str, name: str, figure: Figure, base: float | None) -> str:
    ratio = f"{figure.ms / base:.2f}" if base else ""
    if label == "memory":
        return f"| {job.letter} | PSS of all | {name} | | | | {figure.mib:.0f} |"
    mib = f"{figure.mib:.0f}" if figure.mib else ""
    spread = f"{figure.low:.1f} - {figure.high:.1f}"
    return (
        f"| {job.letter} {job.title} | {label} | {name} | {figure.ms:.1f} | {spread} | {ratio} | "
        f"{mib} |"
    )


main()
