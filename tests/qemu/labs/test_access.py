"""A guest's files, keyboard and screen from outside."""

import array
import hashlib
import os
import random
import signal
import socket
from pathlib import Path

from netorch.system.qmp import Qmp
from netorch.system.watch import Watch
from tests.pure.test_keys_and_pictures import decoded
from tests.qemu.labs.lab import SECONDS, Lab, Machine, wait_for

MEGABYTES = 20
# "Linux's text mode": 80 columns of 9 pixels, 25 rows of 16; its two colours are black and grey.
TEXT_MODE = (720, 400)
BLACK, GREY = bytes(3), b"\xa8\xa8\xa8"


PLAIN = """
[guests.vm1]
video = "virtio-vga"
ready = "agent"

[guests.vm2]
ready = "agent"

[hosts.a]
"""


def test_files_keys_and_pictures(machine: Machine) -> None:
    lab = machine.shipped("screen")
    lab.unchanged()
    _files(lab)
    _failures(lab)
    _directories(lab)
    _time_limit(lab)
    _screen(lab)
    _viewers(lab)
    _connection(lab)
    _late_port(lab)
    lab.unchanged()


def _late_port(lab: Lab) -> None:
    """The agent is started when the kernel tells that its port has a name: by then, not before.

    Nobody asks the agent meanwhile: what it is asked while it ends is lost.
    """
    before = lab.sh("vm1", "cat /run/agent.pid")
    script = """\
killall qemu-ga
while pidof qemu-ga; do usleep 10000; done > /dev/null
rm /run/agent /run/agent.pid
for port in /sys/class/virtio-ports/*; do echo change > $port/uevent; done
until [ -s /run/agent.pid ]; do usleep 10000; done
echo it is back > /dev/console
"""
    lab.machine.netorch("exec", "--lab", lab.name, "vm1", "--", "tee", "/root/late", input=script)
    _type(lab, "sh /root/late", "ret")
    wait_for(lab.run / "guests" / "vm1" / "serial.log", lambda text: "it is back" in text)
    assert lab.sh("vm1", "cat /run/agent.pid") != before


def _files(lab: Lab) -> None:
    """Twenty megabytes each way."""
    here = lab.machine.directory
    data = random.Random(1).randbytes(MEGABYTES << 20)
    (here / "big").write_bytes(data)
    (here / "big").chmod(0o750)
    copying = lab.machine.start("copy", "--lab", lab.name, str(here / "big"), "vm1:/root/big")
    assert copying.wait(SECONDS) == 0
    found = lab.sh("vm1", "stat -c '%a %s' /root/big; sha256sum < /root/big; ls -A /root")
    sum = hashlib.sha256(data).hexdigest()
    assert found.split() == ["750", str(len(data)), sum, "-", "big"]
    _copy(lab, "vm1:/root/big", str(here / "back"))
    assert (here / "back").read_bytes() == data
    assert (here / "back").stat().st_mode & 0o777 == 0o750


def _failures(lab: Lab) -> None:
    here = lab.machine.directory
    lab.sh("vm1", "mkdir /small && mount -t tmpfs -o size=1m small /small && echo old > /small/f")
    full = _copy(lab, str(here / "big"), "vm1:/small/f", status=1)
    assert full.startswith(f"error: failed to copy {here}/big to vm1:/small/f: ")
    assert "No space left on device" in full
    assert full.count("error:") == 1
    assert lab.sh("vm1", "ls -A /small; cat /small/f") == "f\nold"

    assert "No such file or directory" in _copy(lab, "vm1:/none", str(here), status=1)
    assert "no directory /none" in _copy(lab, str(here / "big"), "vm1:/none/x", status=1)
    assert "no absolute path" in _copy(lab, str(here / "big"), "vm1:x", status=2)
    assert "neither is in a guest" in _copy(lab, "a", "./b:c", status=2)
    assert "both are in guests" in _copy(lab, "vm1:/a", "vm1:/b", status=2)
    assert "no guest or host 'vm2'" in _copy(lab, "a", "vm2:/b", status=2)

    # This takes hours.
    lab.sh("vm1", "truncate -s 100G /dev/shm/endless")
    endless = ("copy", "--lab", lab.name, "vm1:/dev/shm/endless", str(here / "new"))
    interrupted = lab.machine.start(*endless)
    with Watch() as watch:
        watch.directory(here)
        while not any(part.stat().st_size for part in here.glob(".new.*")):
            assert watch.wait(SECONDS)[0]
    lab.exec("vm1", "true")
    assert interrupted.poll() is None, "the agent had time for a command meanwhile"
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(SECONDS) == 1
    assert not list(here.glob("*new*"))


def _directories(lab: Lab) -> None:
    here = lab.machine.directory
    (here / "tree" / "sub").mkdir(parents=True)
    (here / "tree" / "sub" / "a b").write_text("x")
    (here / "tree" / "link").symlink_to("sub/a b")
    assert "it is a directory" in _copy(lab, str(here / "tree"), "vm1:/tmp", status=2)
    _copy(lab, "-r", str(here / "tree"), "vm1:/tmp")
    assert lab.sh("vm1", "cd /tmp; cat tree/link; ls -A . tree") == "x.:\ntree\n\ntree:\nlink\nsub"
    _copy(lab, "-r", "vm1:/tmp/tree", str(here / "again"))
    assert (here / "again" / "link").readlink() == Path("sub/a b")
    assert (here / "again" / "sub" / "a b").read_text() == "x"
    assert lab.sh("vm1", "ls -A /tmp") == "tree"


def _time_limit(lab: Lab) -> None:
    script = "echo so far; (while :; do sleep 1000; done) & wait"
    command = ("exec", "--timeout", "5", "--lab", lab.name, "vm1", "--", "sh", "-c", script)
    late = lab.machine.netorch(*command, status=124)
    assert late.stdout == "so far\n"
    assert "error: sh in guest vm1 was ended after 5 s" in late.stderr
    assert lab.sh("vm1", "ps | grep '[s]leep 1000'", status=1) == ""


def _screen(lab: Lab) -> None:
    lab.sh("vm1", "until grep -qa '# ' /dev/vcs1; do usleep 10000; done")  # the shell's prompt
    before = _picture(lab)
    _type(lab, r'echo "Typed: ~/$((6*7))" >/tmp/typed', "ret", "x", "ctrl-c")
    lab.sh("vm1", "until [ -s /tmp/typed ]; do usleep 10000; done")
    assert lab.sh("vm1", "cat /tmp/typed") == "Typed: ~/42"
    lab.sh("vm1", "until grep -qa 'x^C *vm1:~# ' /dev/vcs1; do usleep 10000; done")
    after = _picture(lab)
    assert after.count(GREY) > before.count(GREY) + 200, "letters have dozens of pixels each"

    _type(lab, "sleep 777", "ret")
    lab.sh("vm1", "until ps | grep '[s]leep 777'; do usleep 10000; done")
    _type(lab, "", "ctrl-c")
    lab.sh("vm1", "while ps | grep '[s]leep 777'; do usleep 10000; done")
    _type(lab, "clear; echo go''ne; exit", "ret")
    lab.sh("vm1", "until grep -qa 'gone.*vm1:~# ' /dev/vcs1; do usleep 10000; done")

    unknown = ("send-key", "--lab", lab.name, "vm1", "ret", "ctrl-alt-delet")
    assert "there is no key 'delet'" in lab.machine.netorch(*unknown, status=2).stderr
    with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
        qmp.ready()
        qmp.ask("stop")
    paused = lab.machine.netorch("send-key", "--lab", lab.name, "vm1", "ret", status=1)
    assert "guest vm1 takes no keys: it is paused" in paused.stderr
    with Qmp(lab.run / "guests" / "vm1" / "qmp.sock", "vm1") as qmp:
        qmp.ready()
        qmp.ask("cont")


def _type(lab: Lab, text: str, *keys: str) -> None:
    lab.machine.netorch("send-key", "--lab", lab.name, "--text", text, "vm1", *keys)


def _picture(lab: Lab) -> bytes:
    """The screen's pixels; those of the cursor, which blinks, are no more than 18."""
    file = lab.machine.directory / "screen.png"
    lab.machine.netorch("screenshot", "--lab", lab.name, "vm1", str(file))
    width, height, pixels = decoded(file.read_bytes())
    assert (width, height) == TEXT_MODE
    points = [pixels[at : at + 3] for at in range(0, len(pixels), 3)]
    assert set(points) == {BLACK, GREY}
    return b"".join(point for point in points if point == GREY)


def _viewers(lab: Lab) -> None:
    own = lab.run / "guests" / "vm1" / "vnc.sock"
    assert own.stat().st_mode & 0o777 == 0o600
    shown = lab.machine.start("vnc", "--lab", lab.name, "vm1")
    assert shown.stdout is not None
    assert shown.stdout.readline() == "vm1 shows its screen at 127.0.0.1:5900 until Ctrl-C\n"
    assert "vnc://127.0.0.1:5900" in shown.stdout.readline()
    assert shown.stdout.readline() == f"QEMU's own display is at {own}\n"
    for _viewer in range(2):
        with socket.create_connection(("127.0.0.1", 5900), SECONDS) as viewer:
            assert viewer.recv(12) == b"RFB 003.008\n"
    shown.send_signal(signal.SIGINT)
    assert shown.wait(SECONDS) == 0

    path = lab.machine.directory / "viewers.sock"
    shown = lab.machine.start("vnc", "--listen", str(path), "--lab", lab.name, "vm1")
    assert shown.stdout is not None
    assert str(path) in shown.stdout.readline()
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(SECONDS)
        viewer.connect(str(path))
        assert viewer.recv(12) == b"RFB 003.008\n"
    shown.terminate()
    assert shown.wait(SECONDS) == 0
    assert not path.exists()


def _connection(lab: Lab) -> None:
    """What ssh gets from its ProxyCommand: a descriptor that is connected with the guest's sshd."""
    none = lab.machine.netorch("ssh", "--connect", "--lab", lab.name, "vm1", status=1)
    assert "port 22: Connection refused" in none.stderr
    listen = "nc -ll -p 22 -e /bin/cat > /dev/null 2>&1 &"
    lab.sh("vm1", f"{listen} until grep -q ':0016 .* 0A ' /proc/net/tcp*; do usleep 10000; done")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        proxy = lab.machine.start(
            "ssh", "--connect", "--lab", lab.name, "vm1", stdout=theirs.fileno()
        )
        assert proxy.wait(SECONDS) == 0
        _data, ancillary, *_rest = ours.recvmsg(1, 64)
        (descriptor,) = array.array("i", ancillary[0][2])
    with socket.socket(fileno=descriptor) as connection:
        connection.settimeout(SECONDS)
        connection.sendall(b"hello\n")
        assert connection.recv(6) == b"hello\n"


def _copy(lab: Lab, *arguments: str, status: int = 0) -> str:
    return lab.machine.netorch("copy", "--lab", lab.name, *arguments, status=status).stderr


def test_what_has_no_screen_or_agent_says_so(machine: Machine) -> None:
    plain = machine.up("plain", PLAIN)
    file = str(machine.directory / "x.png")

    def said(status: int, *arguments: str) -> str:
        command, *rest = arguments
        return machine.netorch(command, "--lab", plain.name, *rest, status=status).stderr

    plain.exec("vm2", "sh", "-c", "(sleep 1; kill $(pidof qemu-ga)) > /dev/null 2>&1 &")
    agent = plain.run / "guests" / "vm2" / "agent.sock"
    while plain.exec("vm2", "true", status=None).returncode == 0:
        os.utime(agent, (0, 0))  # it looks as if it ran for long: nobody waits for its boot
    silent = said(1, "copy", __file__, "vm2:/x")
    assert "agent of vm2 does not answer" in silent
    assert "--ssh" in silent
    assert "guest vm1 has no VNC display\nhint: write `vnc = true`" in said(2, "vnc", "vm1")
    assert "guest vm2 has no screen\nhint: write `vnc = true`" in said(1, "screenshot", "vm2", file)
    assert not Path(file).exists()
    machine.netorch("screenshot", "--lab", plain.name, "vm1", file)
    assert decoded(Path(file).read_bytes())[:2] == TEXT_MODE
    assert "a is a host: only guests have a screen" in said(2, "screenshot", "a", file)
    assert "a is a host, and hosts have this machine's files" in said(2, "copy", file, "a:/x")
