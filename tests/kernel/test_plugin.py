"""The pytest plugin, by whole runs of pytest on test files of their own."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = '''
import os, signal
from pathlib import Path
import pytest, netorch
from netorch.pytest_plugin import lab_fixture

LAB = """
[networks.lan]
mode = "bridge"
[hosts.a]
nics = [{ network = "lan", address = "192.168.122.1/24" }]
[hosts.b]
nics = [{ network = "lan", address = "192.168.122.2/24" }]
"""
'''
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run pytest on a test file; its output. Nothing of the lab's may be left afterwards."""
    installed = [point.name for point in metadata.entry_points(group="pytest11")]
    plugin = [] if "netorch" in installed else ["-p", "netorch.pytest_plugin"]
    home = tmp_path / "project"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NETORCH_RUN_DIR": str(tmp_path / "run"),
        "NETORCH_DISK_DIR": str(tmp_path / "disks"),
        "TMPDIR": str(tmp_path),
    }

    def pytest_run(body: str, *arguments: str, files: dict[str, str] | None = None) -> str:
        home.mkdir(exist_ok=True)
        (home / "pytest.ini").write_text("[pytest]\n")
        for name, text in (files or {}).items():
            (home / name).write_text(text)
        (home / "test_it.py").write_text(HEAD + textwrap.dedent(body))
        argv = [sys.executable, "-m", "pytest", "-rs", *plugin, *arguments]
        done = subprocess.run(
            argv,
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        wait_until(lambda: not (tmp_path / "run").exists())
        return done.stdout + done.stderr

    return pytest_run


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lab_is_the_modules_or_the_markers(run: Run) -> None:
    path = '[networks.lan]\nmode = "bridge"\n[hosts.c]\n'
    shown = run(
        """
        def test_module(lab):
            lab.host("a").run(["ping", "-c", "1", "-W", "30", lab.ip("b")])

        @pytest.mark.lab("other.toml")
        def test_path(lab):
            assert list(lab.topology.hosts) == ["c"]

        @pytest.mark.lab(netorch.Topology(hosts={"d": netorch.Host()}))
        def test_model(lab):
            assert list(lab.topology.hosts) == ["d"]

        lan = lab_fixture("other.toml", scope="module")
        names = []

        @pytest.mark.parametrize("number", range(3))
        def test_shared(lan, number):
            names.append(lan.name)
            assert len(set(names)) == 1

        def test_several(make_lab):
            one, two = make_lab(LAB), make_lab(LAB)
            one.link("b").down()
            assert two.host("a").run(["ping", "-c", "1", "-W", "30", two.ip("b")])

        """,
        files={"other.toml": path},
    )
    assert "7 passed" in shown, shown


def test_the_fixture_needs_a_topology(run: Run) -> None:
    shown = run("del LAB\ndef test(lab): pass")
    assert "the fixture `lab` has no topology" in shown


def test_the_report_of_a_failed_test_shows_the_lab(run: Run) -> None:
    shown = run(
        """
        @pytest.mark.lab(LAB + '[networks.nat]\\naddress = "192.168.99.1/24"\\ndhcp = false\\n'
                         'dns = false\\n', capture=True)
        def test(lab):
            lab.host("a").run(["ping", "-c", "2", "-i", "0.01", lab.ip("b")])
            lab.link("b").down()
            assert False
        """
    )
    assert "1 failed" in shown
    assert re.search(r"-+ lab lab-[0-9a-f]{6} -+\nNODE +LINK +ADDRESS +STATE\n", shown), shown
    assert re.search(r"  b +eth0 - b-0  192.168.122.2/24  down", shown)
    assert "chain forward" in shown
    saved = re.search(r"^(/\S+/lan\.pcap) \((\d+) frames\)$", shown, re.MULTILINE)
    assert saved
    assert int(saved[2]) >= 4
    assert Path(saved[1]).read_bytes()[:4] == b"\x4d\x3c\xb2\xa1"


def test_what_the_machine_lacks_skips_with_the_reason(run: Run) -> None:
    body = """
        @pytest.mark.needs_netorch("userns", "nonesuch-program")
        def test(): pass

        @pytest.mark.needs_netorch("userns")
        def test_good(): pass
        """
    shown = run(body)
    assert "1 passed, 1 skipped" in shown
    assert "nonesuch-program is not installed" in shown
    shown = run(body, "-o", "netorch_missing=fail")
    assert "this machine can't have the lab: nonesuch-program is not installed" in shown
    assert "1 failed, 1 passed" in shown or "1 passed, 1 error" in shown


def test_no_user_namespaces(run: Run) -> None:
    """Each test runs where the limit is 0, which only its own namespaces have."""
    if os.geteuid() != 0:
        pytest.skip("the limit of namespaces is the machine's root's to set")
    from netorch.system import namespaces

    namespaces.unshare(namespaces.NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text("0 0 1")
    Path("/proc/self/gid_map").write_text("0 0 1")
    try:
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    except OSError as error:
        pytest.skip(f"can't set the limit here: {error}")
    shown = run("def test(lab): pass")
    assert "1 skipped" in shown
    assert "no more user namespaces are allowed" in shown


def test_ten_workers_with_the_same_addresses_at_once(run: Run) -> None:
    pytest.importorskip("xdist")
    shown = run(
        """
        import time

        @pytest.mark.parametrize("number", range(10))
        def test(lab, number):
            Path(f"up{number}").touch()
            deadline = time.monotonic() + 120
            while len(list(Path().glob("up*"))) < 10:  # all ten labs are up at once
                assert time.monotonic() < deadline
                time.sleep(0.02)
            lab.host("b").run(["ping", "-c", "1", "-W", "30", "192.168.122.1"])
        """,
        *("-n", "10", "--maxschedchunk", "1"),
    )
    assert "10 passed" in shown, shown


def test_a_worker_that_dies_leaves_nothing(run: Run) -> None:
    pytest.importorskip("xdist")
    shown = run(
        """
        def test_killed(lab):
            lab.host("a").popen(["sleep", "1000"])
            os.kill(os.getpid(), signal.SIGKILL)

        def test_gone(lab):
            os._exit(3)

        def test_fork(lab):
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            lab.host("a").run(["true"])
        """,
        *("-n", "1"),
    )
    assert "2 failed, 1 passed" in shown, shown
    assert shown.count("crashed") >= 2


def test_an_interrupted_session_leaves_nothing(run: Run) -> None:
    shown = run(
        f"""
        def test(lab):
            os.kill(os.getpid(), {int(signal.SIGINT)})
            lab.host("a").run(["sleep", "1000"])
        """
    )
    assert "KeyboardInterrupt" in shown


def test_who_uses_no_lab_imports_nothing_of_it(run: Run) -> None:
    shown = run(
        """
        import sys

        def test():
            loaded = [m for m in sys.modules if m.startswith(("netorch.", "msgspec", "pyroute2"))]
            assert loaded == ["netorch.pytest_plugin"]
        """
    )
    assert "1 passed" in shown, shown
