"""What the pages show on a terminal is what happens: every ```console block is run and compared.

Numbers, MAC addresses, times and the path of the checkout may differ; a line `...` stands for any
number of lines. The commands run without capabilities, as an ordinary user's do, on a machine of
the test's own (tests/kernel/machine.py) that has a default route for pasta.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.machine import on_a_machine

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    if "```console" in page.read_text()
]

# Whoever has uid 0 needs CAP_SETFCAP to map it into a user namespace (Linux 5.12).
UNPRIVILEGED = ("setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@on_a_machine
def test_page(page: Path, tmp_path: Path) -> None:
    environment = environment_for(tmp_path)
    checkout = tmp_path / "checkout"  # what a page writes does not go into the real one
    checkout.mkdir()
    for path in ROOT.iterdir():
        (checkout / path.name).symlink_to(path)
    try:
        for command, expected in steps(page):
            done = subprocess.run(
                [*UNPRIVILEGED, "sh", "-c", command],
                cwd=checkout,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert matches(expected, done.stdout), (
                f"{page.name}: $ {command}\nshows:\n{expected}\nbut printed:\n{done.stdout}"
            )
    finally:
        # By name: --all would also take the private labs that this user has elsewhere.
        for run in (tmp_path / "run").glob("*"):
            subprocess.run(["netorch", "teardown", run.name], env=environment, check=True)


def environment_for(tmp_path: Path) -> dict[str, str]:
    """The caller's, with `netorch` on the PATH and run directories of the test's own."""
    shim = tmp_path / "bin" / "netorch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m netorch "$@"\n')
    shim.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{shim.parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "PYTHONPATH": str(ROOT),
        "NETORCH_RUN_DIR": str(tmp_path / "run"),
        "NETORCH_DISK_DIR": str(tmp_path / "disks"),
    }


def steps(page: Path) -> list[tuple[str, str]]:
    """The commands of a page, each with what it shows of their output."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            found.append((command, output))
    return found


# What the first guest of a shape has to wait for, or one that comes while another test does.
ONCE = re.compile(r"^ *(making a template of|waiting for another netorch).*\n", re.MULTILINE)


def matches(expected: str, printed: str) -> bool:
    printed = ONCE.sub("", printed)
    parts = [re.escape(normal(line)) for line in expected.strip().splitlines()]
    pattern = "\n".join(".*?" if part == re.escape("...") else part for part in parts)
    return re.fullmatch(pattern, normal(printed.strip()), re.DOTALL) is not None


def normal(text: str) -> str:
    text = re.sub(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC", text)
    text = re.sub(r"/\S*/(?=topologies/)", "", text)
    text = re.sub(r"\d+(\.\d+)?", "N", text)
    return re.sub(r" +", " ", text)


def test_the_comparison_can_fail() -> None:
    assert matches("a 1.5 ms\n...\nend", "a 22 ms\nx\ny\nend")
    assert matches("a\nend", "a\n  making a template of tiny with 256 MiB\nend")
    assert not matches("a 1.5 ms\nend", "a 22 s\nend")
    assert not matches("a\n...\nend", "a\nend of it")
