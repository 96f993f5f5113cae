"""The python blocks of docs/python.md are run, those of docs/pytest.md and README.md are tests."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from netorch.system.starting import program

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(argv: list[str], tmp_path: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NETORCH_RUN_DIR": str(tmp_path / "run"),
        "NETORCH_DISK_DIR": str(tmp_path / "disks"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("number", range(len(blocks("docs/python.md"))))
def test_python(number: int, tmp_path: Path) -> None:
    for name in ("dnsmasq", "busybox"):
        if program(name) is None:
            pytest.skip(f"{name} is not installed")
    run(["-c", blocks("docs/python.md")[number]], tmp_path)


def test_pytest(tmp_path: Path) -> None:
    installed = [point.name for point in metadata.entry_points(group="pytest11")]
    plugin = [] if "netorch" in installed else ["-p", "netorch.pytest_plugin"]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for number, block in enumerate([*blocks("docs/pytest.md"), *blocks("README.md")]):
        (tmp_path / f"test_{number}.py").write_text(block)
    arguments = [
        "-q",
        "-W",
        "error",
        "--strict-markers",
        *plugin,
        "-c",
        str(tmp_path / "pytest.ini"),
    ]
    assert "8 passed" in run(["-m", "pytest", *arguments, str(tmp_path)], tmp_path)
