"""netorch.Lab for real: labs that a process uses without entering them."""

import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import netorch
from netorch import errors, starter
from netorch.system import places
from netorch.system.namespaces import wait_exit
from netorch.system.starting import program

TWO = """
[networks.lan]
mode = "bridge"

[hosts.a]
nics = [{ network = "lan", address = "192.168.122.1/24" }]

[hosts.b]
nics = [{ network = "lan", address = "192.168.122.2/24" }]
"""
NAT = (
    TWO
    + """
[networks.default]
bridge = "virbr0"
address = "192.168.123.1/24"

[hosts.c]
nics = [{ network = "default" }]
"""
)
# What the starter and its agent do, in one process.
AGENT = """
import os, sys
from netorch import agents, wire
from netorch.agent import Agent
from netorch.topology import parse
agents._import_all()
before = set(sys.modules)
topology = parse(sys.stdin.read(), "x.toml", ".")
start = wire.Start(lab="imports", named=False, topology=topology, source="x.toml", private=True,
    keep=False, uplink="none", environ={}, cwd=".")
agent = Agent(start)
agent.end()
print(*sorted(set(sys.modules) - before))
"""
ENDLESS = ["sleep", "1000"]
PATIENCE = 60  # seconds for what is quick on a machine that isn't busy


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETORCH_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NETORCH_DISK_DIR", str(tmp_path / "disks"))
    return tmp_path / "run"


@contextmanager
def up(topology: Any = TWO, **options: Any) -> Iterator[netorch.Lab]:
    """A lab, and no starter afterwards: the test's process ends without ceremony."""
    try:
        with netorch.Lab(topology, **options) as lab:
            yield lab
    finally:
        starter.finish()


def ping(lab: netorch.Lab, host: str, address: str, patience: int = PATIENCE) -> int:
    done = lab.host(host).run(["ping", "-c", "1", "-W", str(patience), address], check=False)
    return int(done.returncode)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(name: str, run_dir: Path) -> bool:
    marked = [m for _pid, m in places.marked_processes() if m["NETORCH_LAB"] == name]
    return not marked and not (run_dir / name).exists()


@pytest.mark.parametrize("topology", [TWO, NAT], ids=["hosts", "dhcp"])
def test_no_agent_imports_anything(topology: str) -> None:
    """Each of them would pay for it again."""
    done = subprocess.run(
        [sys.executable, "-c", AGENT], input=topology, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_a_lab_is_up_in_the_block_and_its_caller_stays_where_it_was(run_dir: Path) -> None:
    before = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("user", "net", "mnt", "pid")]
    with up() as lab:
        assert lab.is_up
        assert ping(lab, "a", lab.ip("b")) == 0
        assert {row.state for row in lab.status()} == {"ok"}
        assert places.private_places()[lab.name].uplink == "none", "others see it as any other"
    after = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("user", "net", "mnt", "pid")]
    assert after == before
    assert is_gone(lab.name, run_dir)
    assert not run_dir.exists()
    with pytest.raises(errors.UsageError, match="is not up"):
        lab.host("a").run(["true"])


def test_run() -> None:
    with up() as lab:
        a = lab.host("a")
        done = a.run(["sh", "-c", "cat; echo wrong >&2"], input="text")
        assert (done.stdout, done.stderr, done.returncode) == ("text", "wrong\n", 0)
        assert a.run(["cat"], input=bytes(3_000_000), text=False).stdout == bytes(3_000_000)
        assert a.run(["sh", "-c", "exit 7"], check=False).returncode == 7
        assert a.run(["sh", "-c", "kill -9 $$"], check=False).returncode == -9
        with pytest.raises(
            errors.CommandError, match=r"in a failed: exit status 7\nno good"
        ) as bad:
            a.run(["sh", "-c", "echo no good >&2; exit 7"])
        assert (bad.value.returncode, bad.value.stderr) == (7, "no good\n")
        with pytest.raises(errors.CommandError, match=r"still ran after 0.2 s"):
            a.run(ENDLESS, timeout=0.2)
        begun = a.popen(["sh", "-c", "echo begun; sleep 1000"], stdout=subprocess.PIPE)
        assert begun.stdout is not None
        select.select([begun.stdout], [], [], PATIENCE)  # before its time begins to run
        with pytest.raises(errors.CommandError, match=r"still ran after 0.2 s") as late:
            begun.communicate(timeout=0.2)
        assert (late.value.returncode, late.value.stdout) == (None, "begun\n")
        with pytest.raises(errors.MissingError, match="failed to run /nonesuch in host a"):
            a.run(["/nonesuch"])
        with pytest.raises(errors.UsageError, match="has no host 'c'"):
            lab.host("c")


def test_a_command_has_the_callers_environment_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with up() as lab:
        monkeypatch.setenv("COLOUR", "green")
        monkeypatch.chdir(tmp_path)
        script = ["sh", "-c", "echo $COLOUR; pwd; echo $NETORCH_LAB"]
        told = lab.host("a").run(script).stdout.split()
        assert told == ["green", str(tmp_path), lab.name]
        told = lab.host("a").run(script, env={"COLOUR": "red"}, cwd="/usr").stdout.split()
        assert told[:2] == ["red", "/usr"]


def test_popen() -> None:
    with up() as lab:
        script = ["sh", "-c", "read word; echo got $word; read more"]
        pipe = subprocess.PIPE
        with lab.host("a").popen(script, stdin=pipe, stdout=pipe) as process:
            assert process.poll() is None
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("this\n")
            process.stdin.flush()
            assert process.stdout.readline() == "got this\n"
        assert process.returncode == 1, "its input was closed"
        endless = lab.host("b").popen(ENDLESS)
        with pytest.raises(errors.CommandError, match="still ran"):
            endless.wait(0.05)
        endless.terminate()
        assert endless.wait(PATIENCE) == -signal.SIGTERM
        left = lab.host("b").popen(ENDLESS)
    assert left.wait(PATIENCE) == -signal.SIGKILL, "it ends with the lab"


def test_a_cable_is_pulled_and_put_back() -> None:
    with up() as lab:
        assert ping(lab, "a", lab.ip("b")) == 0
        lab.link("b").down()
        assert "NO-CARRIER" in lab.host("b").run(["ip", "link", "show", "eth0"]).stdout
        assert ping(lab, "a", lab.ip("b"), patience=1) != 0
        assert [row.state for row in lab.status() if row.key == "veth:b:0"] == ["changed"]
        lab.link("b", network="lan").up()
        assert ping(lab, "a", lab.ip("b")) == 0
        with pytest.raises(errors.UsageError, match="a has no NIC 1"):
            lab.link("a", 1)


def test_a_capture_holds_what_passed_while_the_block_ran(tmp_path: Path) -> None:
    with up() as lab:
        ping(lab, "a", lab.ip("b"))  # so that both know each other's MACs
        with (
            lab.capture("lan", path=tmp_path / "lan.pcap") as bridge,
            lab.capture("b") as nic,
        ):
            for _ in range(5):  # each when the one before it was answered
                assert ping(lab, "a", lab.ip("b")) == 0
        ping(lab, "a", lab.ip("b"))
        assert list(echoes(bridge.pcap())) == [8, 0] * 5
        assert list(echoes(nic.pcap())) == [8, 0] * 5
        assert (tmp_path / "lan.pcap").read_bytes() == bridge.pcap()
        assert bridge.dropped == 0
        with lab.capture("lan") as flood:
            lab.host("a").run(["ping", "-q", "-c", "6000", "-f", lab.ip("b")], timeout=300)
        assert len(list(echoes(flood.pcap()))) + flood.dropped >= 12000
        with pytest.raises(errors.UsageError, match="no host or guest 'nowhere'"):
            lab.capture("nowhere")


def test_a_recorder_keeps_the_beginning() -> None:
    with up() as lab, lab.recorder("lan") as recorder:
        lab.host("a").run(["ping", "-q", "-c", "400", "-f", lab.ip("b")], timeout=300)
        assert 512 <= recorder.count < 600  # some more once there is room again
        assert recorder.dropped > 0


def echoes(pcap: bytes) -> Iterator[int]:
    """The ICMP types in a pcap."""
    magic, *_, kind = struct.unpack_from("=IHHiIII", pcap)
    assert (magic, kind) == (0xA1B23C4D, 1)
    at = 24
    while at < len(pcap):
        _sec, _nsec, length, _whole = struct.unpack_from("=IIII", pcap, at)
        frame = pcap[at + 16 : at + 16 + length]
        if frame[12:14] == b"\x08\x00" and frame[23] == 1:
            yield frame[34]
        at += 16 + length


def test_a_running_lab_is_changed() -> None:
    with up() as lab:
        there = lab.host("a").popen(ENDLESS)
        more = TWO + '[hosts.c]\nnics = [{ network = "lan", address = "192.168.122.3/24" }]\n'
        done = lab.apply(more)
        assert [line for line in done if "host c" in line]
        assert ping(lab, "c", lab.ip("a")) == 0
        assert lab.apply(more) == []
        assert there.poll() is None
        with pytest.raises(errors.TopologyError):
            lab.apply("[networks.lan]\nmode = 'bridges'\n")


def test_a_topology_is_text_a_path_or_the_model(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(TWO)
    model = netorch.Topology(
        networks={"lan": netorch.Network(mode="bridge")},
        hosts={
            name: netorch.Host(nics=(netorch.HostNic(network="lan", address=f"10.0.0.{n}/24"),))
            for n, name in ((1, "a"), (2, "b"))
        },
    )
    for topology in (path, str(path), model, TWO):
        with up(topology) as lab:
            assert ping(lab, "a", lab.ip("b")) == 0
    wrong = netorch.Topology(hosts={"a": netorch.Host(nics=(netorch.HostNic(network="lam"),))})
    with pytest.raises(errors.TopologyError, match=r"hosts.a.nics\[0\].network"):
        netorch.Lab(wrong)
    with pytest.raises(errors.TopologyError, match="mode"):
        netorch.Lab(netorch.Topology(networks={"n": netorch.Network(mode="wrong")}))  # type: ignore[arg-type]


def test_labs_of_several_threads_have_the_same_addresses() -> None:
    found: list[int] = []

    def use() -> None:
        with netorch.Lab(TWO) as lab:
            all_up.wait(120)
            found.append(ping(lab, "a", "192.168.122.2"))

    all_up = threading.Barrier(5)
    threads = [threading.Thread(target=use) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starter.finish()
    assert found == [0] * 5


def test_leases_and_names() -> None:
    for name in ("dnsmasq", "busybox"):
        if program(name) is None:
            pytest.skip(f"{name} is not installed")
    topology = """
        [networks.default]
        mode = "isolated"
        address = "192.168.122.1/24"
        domain = "example.test"
        [hosts.a]
        nics = [{ network = "default" }]
        [hosts.b]
        nics = [{ network = "default" }]
    """
    with up(topology) as lab:
        assert sorted(lease.name for lease in lab.leases()) == ["a", "b"]
        assert lab.ip("a") in {lease.address for lease in lab.leases()}
        lab.host("a").run(["ping", "-c", "1", "-W", str(PATIENCE), "b"])
        titles = [title for title, _text in lab.sections()]
        assert titles == [f"lab {lab.name}", "leases", "nft rules"]
        shown = dict(lab.sections())
        assert f"{lab.ip('a')} (DHCP)" in shown[f"lab {lab.name}"]


def test_a_lab_ends_with_the_process_that_made_it(run_dir: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lab = netorch.Lab(TWO)
        lab.start()
        lab.host("a").popen(ENDLESS)
        os.write(writer, lab.name.encode())
        signal.pause()
        os._exit(0)
    os.close(writer)
    name = os.read(reader, 100).decode()
    assert not is_gone(name, run_dir)
    helper = os.pidfd_open(parent(parent(places.private_places()[name].init)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert wait_exit(helper, PATIENCE), "it ends when all agents have"
    os.close(helper)
    assert is_gone(name, run_dir)


def test_a_lab_ends_with_its_agent(run_dir: Path) -> None:
    with up() as lab:
        init = places.private_places()[lab.name].init
        agent = parent(init)
        process = lab.host("a").popen(ENDLESS)
        os.kill(agent, signal.SIGKILL)
        wait_until(lambda: is_gone(lab.name, run_dir))
        assert process.wait(PATIENCE) == -signal.SIGKILL
        with pytest.raises(errors.NetorchError, match="the lab is gone"):
            lab.host("a").run(["true"])
        with pytest.raises(errors.NetorchError, match="the lab is gone"):
            lab.close()


def test_the_starters_death_ends_no_lab_and_the_next_gets_another() -> None:
    with up() as lab:
        first = parent(parent(places.private_places()[lab.name].init))
        pidfd = os.pidfd_open(first)
        os.kill(first, signal.SIGKILL)
        assert wait_exit(pidfd, PATIENCE)
        os.close(pidfd)
        assert ping(lab, "a", lab.ip("b")) == 0
        with netorch.Lab(TWO) as next_one:
            assert ping(next_one, "a", lab.ip("b")) == 0
            assert ping(lab, "a", lab.ip("b")) == 0


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("PPid:")[1].split()[0])


def test_a_fork_of_the_caller_leaves_the_lab_alone() -> None:
    with up() as lab:
        child = os.fork()
        if child == 0:
            try:
                lab.host("a").run(["true"])
            except errors.UsageError:
                lab.close()
                os._exit(42)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 42
        assert ping(lab, "a", lab.ip("b")) == 0


def test_a_lab_is_kept_under_its_name_until_it_is_torn_down(run_dir: Path) -> None:
    with up(keep=True, name="kept") as lab:
        twin = netorch.Lab(TWO, name=lab.name)
        with pytest.raises(errors.ConflictError, match="a lab kept is there already"):
            twin.start()
    try:
        assert "kept" in places.private_places()
    finally:
        places.destroy(places.private_places()["kept"])


def test_what_cant_be_made_leaves_nothing(run_dir: Path) -> None:
    lab = netorch.Lab('[networks.n]\nmode = "bridge"\n[taps.t]\nnetwork = "n"\nowner = "nobody-x"')
    with pytest.raises(errors.UsageError, match="nobody-x"):
        lab.start()
    assert is_gone(lab.name, run_dir)
    assert not lab.is_up
    starter.finish()


def test_a_lab_in_the_current_place() -> None:
    with up(private=False) as lab:
        assert (
            "br-lan"
            in subprocess.run(
                ["ip", "-br", "link"], capture_output=True, text=True, check=True
            ).stdout
        )
        assert ping(lab, "a", lab.ip("b")) == 0
    left = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "br-lan" not in left
