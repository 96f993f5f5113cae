"""What a command doesn't use, it doesn't import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "pyroute2",
    "nftables",
    "dns",
    "qemu",
    "asyncio",
    "rich",
    "shutil",
    "subprocess",
)
NOT_TO_SAY_THE_VERSION = ("argparse", "dataclasses", "inspect")

SCRIPT = """
import json, sys
sys.argv = ["netorch", *{argv!r}]
from netorch.cli import main
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    "argv", [["--version"], ["check", "topologies/default.toml"]], ids=lambda argv: argv[0]
)
def test_a_command_that_touches_no_machine_imports_nothing_for_it(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(argv=argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = json.loads(done.stdout.splitlines()[-1])
    for name in HEAVY:
        assert name not in loaded
    if argv == ["--version"]:
        for name in NOT_TO_SAY_THE_VERSION:
            assert name not in loaded


def test_a_lab_without_guests_imports_nothing_about_them() -> None:
    script = """
import json, sys
from netorch import cli, labs, report
from netorch.system import adapters, conflicts, facts, look, processes, services, starting, taps
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    ours = ("guests", "qmp", "tiny", "late", "leases", "readiness", "disks", "bridge_uplinks")
    for name in (*(f"netorch.system.{module}" for module in ours), "netorch.expectations"):
        assert name not in loaded
    for name in ("pyroute2", "nftables", "logging", "_hashlib", "shutil", "subprocess"):
        assert name not in loaded


def test_short_commands_are_not_collected() -> None:
    script = """
import gc, sys
collections = lambda: sum(generation["collections"] for generation in gc.get_stats())
sys.argv = ["netorch", "--version"]
from netorch.__main__ import main
before = collections()
try:
    main()
except SystemExit:
    pass
print(collections() - before, gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 True True"
