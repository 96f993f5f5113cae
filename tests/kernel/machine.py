"""A machine for tests of places and hosts: network, mount (and, unprivileged, user) namespaces.

`on_a_machine` runs a test in a forked child that has moved into them, since no process can come
back from a user namespace. The machine has a /run of its own, and an interface `wan` (10.99.0.2/24)
with the default route to 10.99.0.1, an address in the network namespace that is mounted on FAR.
"""

import functools
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.system import namespaces as ns
from netorch.system import places

FAR = Path("/run/far")
FAR_ADDRESS = "10.99.0.1"
PREFIX = f"test{os.getpid()}-"  # of the labs' names, so that tests in parallel don't see each other


def on_a_machine(test: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def forked(*args: object, **kwargs: object) -> None:
        def body() -> None:
            _make_machine()
            try:
                test(*args, **kwargs)
            finally:
                for lab, place in places.private_places().items():
                    if lab.startswith(PREFIX):
                        places.destroy(place)

        failure = run_forked(body)
        if failure.startswith("skip:"):
            pytest.skip(failure.removeprefix("skip:"))
        if failure:
            pytest.fail(failure, pytrace=False)

    return forked


def run_forked(body: Callable[[], None]) -> str:
    """Run `body` in a child; the traceback of what it raised, "" if nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            body()
        except pytest.skip.Exception as reason:
            text = f"skip:{reason}"
        except BaseException:
            text = traceback.format_exc()
        finally:
            try:
                os.write(writer, text.encode()[-60000:])
            finally:  # also if the session has died: this child must not go on with its tests
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    status = os.waitpid(child, 0)[1]
    return text if status == 0 else f"{text}\nended by wait status {status}"


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _make_machine() -> None:
    if os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        try:
            ns.unshare(ns.NEWUSER)
        except OSError as error:
            pytest.skip(f"user namespaces: {error.strerror}")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    ns.unshare(ns.NEWNET | ns.NEWNS)
    ns.mount(None, "/", flags=ns.MS_REC | ns.MS_SLAVE)
    ns.mount("run", "/run", "tmpfs")
    ns.loopback_up()
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    FAR.touch()
    ns.unshare(ns.NEWNET)
    ns.mount("/proc/self/ns/net", FAR, flags=ns.MS_BIND)
    ns.loopback_up()
    run(
        *("ip", "link", "add", "far", "type", "veth", "peer", "name", "wan"),
        *("netns", f"/proc/{os.getpid()}/fd/{home}"),
    )
    run("ip", "addr", "add", f"{FAR_ADDRESS}/24", "dev", "far")
    run("ip", "link", "set", "far", "up")
    ns.setns(home, ns.NEWNET)
    os.close(home)
    run("ip", "addr", "add", "10.99.0.2/24", "dev", "wan")
    run("ip", "link", "set", "wan", "up")
    run("ip", "route", "add", "default", "via", FAR_ADDRESS)
