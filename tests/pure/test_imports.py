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
    "subprocess",
    "dataclasses",
    "inspect",
)

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
    for name in HEAVY[:6]:
        assert name not in loaded
