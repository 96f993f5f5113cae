"""What udhcpc runs in a host, with programs of the test's own in the place of `ip` and `mv`."""

import os
import shutil
import subprocess
from pathlib import Path

from netorch.system import services

SCRIPT = Path(services.__file__).with_name("udhcpc.sh")
# The first time, it tells that it was called and waits until it may go on.
HESITATE = """\
#!/bin/sh
if mkdir called 2> /dev/null; then
    echo > at_it
    read -r line < go_on
fi
exec {mv} "$@"
"""


def client(directory: Path, interface: str, dns: str, programs: Path) -> subprocess.Popen[bytes]:
    """The script, for a lease of this interface."""
    lease = {"interface": interface, "ip": "192.0.2.2", "mask": "24", "lease": "60", "dns": dns}
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.Popen([SCRIPT, "bound"], cwd=directory, env={**lease, "PATH": path})


def program(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    (directory / name).chmod(0o755)


def test_the_servers_of_two_interfaces_stand_together(tmp_path: Path) -> None:
    """Also where one's script is late with what it has read before the other's wrote."""
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    for programs in (quick, slow):
        program(programs, "ip", "#!/bin/sh\n")
    program(slow, "mv", HESITATE.format(mv=shutil.which("mv")))
    for fifo in ("at_it", "go_on"):
        os.mkfifo(tmp_path / fifo)
    late = client(tmp_path, "eth0", "192.0.2.10", slow)
    (tmp_path / "at_it").read_text()  # until it is about to rename
    assert client(tmp_path, "eth1", "192.0.2.11 192.0.2.12", quick).wait() == 0
    assert not (tmp_path / "resolv.eth0").exists()
    (tmp_path / "go_on").write_text("\n")
    assert late.wait() == 0
    servers = ["192.0.2.10", "192.0.2.11", "192.0.2.12"]
    text = (tmp_path / "resolv.conf").read_text()
    assert text == "".join(f"nameserver {address}\n" for address in servers)
    assert (tmp_path / "resolv.eth0").exists()
    assert not list(tmp_path.glob("resolv.new*"))
