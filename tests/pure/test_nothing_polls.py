"""Nothing sleeps: whatever is waited for is an event (netlink, pidfd, a daemon's own readiness)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "netorch"
POLLS = {
    PACKAGE / "system/qmp.py",  # the guest agent tells of a command's end only when asked
    PACKAGE / "system/screen.py",  # QEMU tells nobody when a key has been pressed
    PACKAGE / "system/readiness.py",  # nothing tells when a guest begins to listen on a port
}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_sleeps(path: Path) -> None:
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not names & {"sleep", "sleep_ms"} or path in POLLS
