"""netorch verify with real guests: the shipped comparison of virbr0 and br0, and every probe."""

import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from netorch import labs
from netorch.engine import Progress
from netorch.expectations import Verdict
from netorch.labs import Lab
from netorch.model import Expect
from netorch.system.qmp import Qmp, agent_exec, agent_path
from netorch.system.tiny import tiny_image
from netorch.topology import load
from netorch.verify import verify
from tests.isolation import require_tun
from tests.kernel.machine import PREFIX, on_a_machine

pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed"
)

FILE = Path(__file__).parents[2] / "topologies" / "virbr0-vs-br0.toml"
NAT = "10.0.0.1"

# Sources, far ends and ports besides those in the file.
MORE = (
    Expect(from_="vm1", to="server", by="udp:5000", seen_as=NAT),
    Expect(from_="server", to="vm2", by="udp:5000", seen_as="10.0.0.80"),
    Expect(from_="vm1", to="vm2", by="udp:5000", seen_as=NAT),
    Expect(from_="vm1", to="vm2", by="tcp:5000", seen_as=NAT),
    Expect(from_="network:lan", to="vm1", reach=False),
    Expect(from_="vm2", to="vm1", by="tcp:5000", reach=False),
    Expect(from_="vm2", to="vm1", by="udp:5000", reach=False),
    Expect(from_="vm1", to="gateway", by="tcp:9", seen_as="192.168.122.6"),
    Expect(from_="vm1", by="dns:vm1"),
    Expect(from_="vm2", to="gateway", by="dns:server"),
    Expect(from_="vm2", by="dns:nobody", reach=False),
)
WRONG = (
    Expect(from_="vm1", to="server", seen_as="192.168.122.6"),
    Expect(from_="vm1", to="server", by="tcp:80", reach=False),
    Expect(from_="vm1", to="10.0.0.99", within=2),
    Expect(from_="vm1", by="dns:nobody", within=1),
)


@pytest.fixture(scope="session", autouse=True)
def _tiny() -> None:
    """Built before the first test goes where there is no network."""
    tiny_image(print)


@on_a_machine
def test_virbr0_vs_br0(tmp_path: Path) -> None:
    require_tun()
    os.environ["NETORCH_RUN_DIR"] = str(tmp_path / "run")
    os.environ["NETORCH_DISK_DIR"] = str(tmp_path / "disks")
    lab = up(())
    try:
        shipped = verify(lab)
        assert len(shipped) == 8
        assert_all(shipped, True)
        assert [v.observed.rpartition(" ")[2] for v in shipped[:2]] == [NAT, NAT]

        up(MORE)
        found = verify(lab)[len(shipped) :]
        assert_all(found, True)
        for verdict in found[4:8]:
            assert verdict.observed.startswith("rejected by 10.0.0.1 (ICMP port unreachable); ")

        up(WRONG)
        found = verify(lab)[len(shipped) :]
        assert_all(found, False)
        assert "seen as 10.0.0.1, not as 192.168.122.6" in found[0].observed
        assert_nothing_runs_in(lab, "vm2")

        up((Expect(from_="vm2", to="vm1", reach=False),), shipped=False)
        with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
            qmp.ready()
            qmp.ask("stop")
        # It looks as if it ran for long, so nobody waits for its boot.
        os.utime(agent_path(lab.scope, "vm1"), (0, 0))
        (dead,) = verify(lab)
        assert not dead.ok
        assert dead.observed.startswith("could not be proved: "), dead
    finally:
        assert labs.teardown(lab, Progress()) == []


def up(more: tuple[Expect, ...], shipped: bool = True) -> Lab:
    """Apply the shipped file with more expectations, or with other ones."""
    topology = load(FILE)
    own = msgspec.structs.replace(topology.lab, name=f"{PREFIX}vs")
    expect = topology.expect + more if shipped else more
    changed = msgspec.structs.replace(topology, lab=own, expect=expect)
    outcome = labs.apply(changed, str(FILE), "current", Progress())
    assert outcome.running is not None
    return outcome.running


def assert_all(verdicts: list[Verdict], ok: bool) -> None:
    lines = [f"{v.ok} {v.question.title}: {v.observed}" for v in verdicts]
    assert all(verdict.ok == ok for verdict in verdicts), "\n".join(lines)


def assert_nothing_runs_in(lab: Lab, guest: str) -> None:
    """They were told to end, and may take a moment; by themselves they would run for longer."""
    deadline = time.monotonic() + 20
    while True:
        programs = agent_exec(lab.scope, guest, ["ps", "-o", "args"]).out.decode().splitlines()
        left = [line for line in programs if line.startswith(("nc ", "ping ", "tftp "))]
        if not left:
            return
        assert time.monotonic() < deadline, left
