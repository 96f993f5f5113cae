"""Runs the jobs and writes the table: `scripts/bench [LETTER...]`. Needs root (namespaces).

With letters, these jobs take the place of theirs in bench/results, if the machine is the same. With
--quick, one turn of each and nothing written: to try the bench, not to measure.
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
from typing import Any

from bench import goals, peers, summary
from bench.jobs import Job, Tools, all_jobs
from bench.turns import Figure, measure, mount_points

# What a figure is divided by: the first of these that took part.
BASES = ("script", "C floor", "bare interpreter", "kernel")


def main() -> None:
    venv = Path(sys.argv[1])
    quick = "--quick" in sys.argv
    letters = [word for word in sys.argv[2:] if word != "--quick"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, mount_points():
        tools = _tools(venv, Path(scratch))
        os.environ["BENCH_TINY"] = _tiny(tools)
        results: dict[str, Any] = {
            "machine": _machine(tools),
            "left out": peers.missing(),
            "jobs": {
                job.letter: _measured(job, Path(scratch), quick)
                for job in all_jobs(tools)
                if not letters or job.letter in letters
            },
        }
    if letters and not quick:
        results = _merged(results)
    text = _table(results) + _notes(results)
    print(text)
    if quick:
        return
    summary.RESULTS.parent.mkdir(exist_ok=True)
    summary.RESULTS.with_suffix(".md").write_text(text)
    summary.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    summary.main()


def _measured(job: Job, scratch: Path, quick: bool) -> dict[str, Any]:
    load, began = os.getloadavg()[2], time.time()
    found = _run(job, scratch, quick)
    seconds = round(time.time() - began)
    print(f"{job.letter} took {seconds} s", file=sys.stderr, flush=True)
    figures = {
        name: {label: figure._asdict() for label, figure in of.items()}
        for name, of in found.items()
    }
    return {
        "title": job.title,
        "date": time.strftime("%F %R"),
        "load before": round(load, 1),
        "seconds": seconds,
        "figures": figures,
    }


def _merged(new: dict[str, Any]) -> dict[str, Any]:
    """The committed results with these jobs instead of theirs: what is compared is in one job."""
    if not summary.RESULTS.exists():
        return new
    old = json.loads(summary.RESULTS.read_text())
    if old["machine"] != new["machine"]:
        sys.exit(f"the results there are of another machine, so measure all: {old['machine']}")
    return {**new, "jobs": {**old["jobs"], **new["jobs"]}}


def _run(job: Job, scratch: Path, quick: bool) -> dict[str, dict[str, Figure]]:
    def say(line: str) -> None:
        print(f"{job.letter} {line}", file=sys.stderr, flush=True)

    few = dict.fromkeys(job.few, 1) if quick else job.few
    turns = 0 if quick else job.turns
    return measure(job.contenders, turns, few, scratch / job.letter, say)


def _tools(venv: Path, scratch: Path) -> Tools:
    floor = scratch / "floor"
    source = summary.ROOT / "bench" / "floor.c"
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
        "cpu": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": _python(tools),
        "qemu": qemu.stdout.splitlines()[0] if qemu.stdout else "none",
        "accelerator": "TCG",
    }


def _python(tools: Tools) -> str:
    """Version and path: distributions build theirs with more optimization than a plain build."""
    program = "import platform, sys; print(platform.python_version(), sys._base_executable)"
    said = subprocess.run([tools.python, "-c", program], capture_output=True, text=True, check=True)
    return said.stdout.strip()


def _table(results: dict[str, Any]) -> str:
    found = goals.figures(results)
    machine = ", ".join(f"{key}: {value}" for key, value in results["machine"].items())
    lines = [
        "# Results of scripts/bench",
        "",
        f"{machine}.",
        "",
        "Whole commands, from spawn to exit, in milliseconds: the median, and the lowest and the",
        "highest turn. The ratio is to the first of script, C floor, bare interpreter and the bare",
        "kernel work that took part. Contenders took turns; slow ones had fewer. Peak memory is",
        "that of the largest process that was waited for.",
        "",
        "| job | | contender | ms | lowest - highest | ratio | peak MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for letter, figures in found.items():
        title = f"{letter} {results['jobs'][letter]['title']}"
        for label in dict.fromkeys(label for of in figures.values() for label in of):
            for name, of in figures.items():
                if label in of:
                    lines.append(_row(title, label, name, of[label], _base(figures, label)))
    if goals.goals(found):
        lines += ["", "The goals, as ratios where no unit is given:", ""]
        lines += goals.table(found)
    return "\n".join(lines) + "\n"


def _notes(results: dict[str, Any]) -> str:
    jobs = results["jobs"].items()
    lines = ["", "| job | measured | load before | took |", "|---|---|---:|---:|"]
    lines += [
        f"| {letter} | {job['date']} | {job['load before']} | {job['seconds']} s |"
        for letter, job in jobs
    ]
    lines += ["", f"In all {sum(job['seconds'] for _, job in jobs) / 60:.0f} minutes."]
    lines += [f"Left out: {peer}: {reason}." for peer, reason in results["left out"].items()]
    return "\n".join(lines) + "\n"


def _base(figures: goals.Figures, label: str) -> float | None:
    return next((figures[b][label].ms for b in BASES if label in figures.get(b, {})), None)


def _row(title: str, label: str, name: str, figure: Figure, base: float | None) -> str:
    ratio = f"{figure.ms / base:.2f}" if base else ""
    if label == "memory":
        return f"| {title} | PSS of all | {name} | | | | {figure.mib:.0f} |"
    mib = f"{figure.mib:.0f}" if figure.mib else ""
    spread = f"{figure.low:.1f} - {figure.high:.1f}"
    return f"| {title} | {label} | {name} | {figure.ms:.1f} | {spread} | {ratio} | {mib} |"


main()
