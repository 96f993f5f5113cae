"""Test bodies in network namespaces of their own.

A process that has made itself a user namespace can't go back, so each test body runs in a forked
child: it unshares, runs the body with the fixtures that pytest has set up, and sends back how it
went. As root that is a network and a mount namespace, as an ordinary user a user namespace
besides. What the body mounts or makes there is gone when the last process in it is.
"""

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netorch.system import namespaces
from netorch.system.scope import Scope

_ORDINARY = namespaces.NEWNET | namespaces.NEWNS

# What is to be done at the end of the body that runs now; None outside of one.
_at_end: list[Callable[[], None]] | None = None


def at_end(do: Callable[[], None]) -> None:
    """Do this when the test's body has ended, in its namespaces. Only for what runs in a body."""
    assert _at_end is not None, "outside of the body, in namespaces that all tests share"
    _at_end.append(do)


def run(item: pytest.Function) -> None:
    """Call the test function of `item` in fresh namespaces; raise here what it raises there."""
    names = item._fixtureinfo.argnames
    arguments = {name: item.funcargs[name] for name in names}
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            outcome = _outcome(item, arguments)
            with os.fdopen(sending, "wb") as pipe:
                pickle.dump(outcome, pipe)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if the session has died: this child must not go on with its tests
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    verb, text = pickle.loads(sent) if sent else ("failed", f"the test's process ended: {status}")
    if verb == "skipped":
        pytest.skip(text)
    if verb == "failed":
        pytest.fail(text, pytrace=False)


def _outcome(item: pytest.Function, arguments: dict[str, Any]) -> tuple[str, str]:
    global _at_end
    try:
        refused = _enter()
        if refused:
            return "skipped", refused
        _at_end = []
        try:
            item.obj(**arguments)
        finally:
            for do in reversed(_at_end):
                do()
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except (
        BaseException
    ) as error:  # also SystemExit and KeyboardInterrupt: this process must not go on
        try:
            return "failed", str(item.repr_failure(pytest.ExceptionInfo.from_exception(error)))
        except Exception:
            return "failed", traceback.format_exc()
    return "passed", ""


def _enter() -> str:
    """Go into fresh namespaces; why the kernel refused them, if it did."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid == 0:
            namespaces.unshare(_ORDINARY)
        else:
            namespaces.unshare(_ORDINARY | namespaces.NEWUSER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_SLAVE)
        _own_run_netns()
        namespaces.loopback_up()
    except OSError as error:
        return f"this kernel or container refuses namespaces to uid {uid}: {error}"
    return ""


def _own_run_netns() -> None:
    netns = Path("/run/netns")
    if not netns.is_dir():  # an ordinary user can't make it, but can have a /run of his own here
        namespaces.mount("tmpfs", "/run", "tmpfs")
        netns.mkdir()
    namespaces.mount("tmpfs", netns, "tmpfs")


def ip(*arguments: str) -> str:
    """Run iproute2; its output. Raises CalledProcessError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def ip_json(*arguments: str) -> list[dict[str, Any]]:
    """Run iproute2 with `-json -details`; what it lists."""
    listed: list[dict[str, Any]] = json.loads(ip("-json", "-details", *arguments) or "[]")
    return [entry for entry in listed if entry]


def make_host(scope: Scope, host: str) -> Path:
    """A host's network namespace, mounted where the scope has it, lo up."""
    path = scope.namespace(host)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        namespaces.unshare(namespaces.NEWNET)
        namespaces.loopback_up()
        namespaces.mount("/proc/thread-self/ns/net", path, None, namespaces.MS_BIND)
    finally:
        namespaces.setns(home, namespaces.NEWNET)
        os.close(home)
    return path


@contextmanager
def inside(scope: Scope, host: str) -> Iterator[None]:
    """This thread in a host's network namespace; what it starts there is in it too."""
    with namespaces.in_namespace(scope.namespace(host)):
        yield


def require_tun() -> None:
    """Skip where taps can't be made, with the reason."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/net/tun can't be opened: {error.strerror}")
