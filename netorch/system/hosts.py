"""Hosts: network namespaces that play machines, kept by mounts as `ip netns` keeps its own.

A host's mark is the name of the file that its namespace is mounted on,
`netorch:<lab>:<host>:<place>`; in the current place it stands in /run/netns, so `ip netns exec`
works on it. A file without a mount is what a SIGKILL between the two leaves; it is observed as a
host that is not up.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from netorch.errors import KernelError, MissingError, NetorchError, UsageError
from netorch.planner import Update
from netorch.resources import Namespace, Resource
from netorch.system import namespaces, processes
from netorch.system.namespaces import (
    MNT_DETACH,
    MS_BIND,
    MS_REC,
    MS_SLAVE,
    NEWNET,
    NEWNS,
    UMOUNT_NOFOLLOW,
)
from netorch.system.netns_directory import directory_of, remove_directory
from netorch.system.scope import Scope

if TYPE_CHECKING:
    from subprocess import Popen

_OWN_NAMESPACE = "/proc/thread-self/ns/net"
_RESOLV_CONF = Path("/etc/resolv.conf")
_GRACE = 2.0  # seconds between SIGTERM and SIGKILL for what runs in a host that goes


class Hosts:
    """The adapter for Namespace."""

    kinds: tuple[type[Resource], ...] = (Namespace,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self, look: object = None) -> Iterable[Namespace]:
        prefix, suffix = f"netorch:{self._scope.lab}:", f":{self._scope.place}"
        try:
            names = os.listdir(self._scope.namespaces)
        except FileNotFoundError:
            return []
        hosts = [
            name.removeprefix(prefix).removesuffix(suffix)
            for name in names
            if name.startswith(prefix) and name.endswith(suffix)
        ]
        return [Namespace(host=h, up=_is_up(self._scope.namespace(h))) for h in sorted(hosts)]

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        if not wanted or self._scope.private:
            return []  # a private place was itself made by the same calls
        if namespaces.may_mount() and _may_unshare():
            return []
        return [
            "hosts can't be made here: that needs CAP_SYS_ADMIN, and NET_ADMIN alone was given "
            "(use --private, or add SYS_ADMIN to the container)"
        ]

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        home = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with directory_of(self._scope):
                for resource in _namespaces(wanted):
                    try:
                        _make(self._scope.namespace(resource.host))
                    except OSError as error:
                        raise _failed("create", resource.host, error) from error
                    finally:
                        namespaces.setns(home, NEWNET)
                    done(resource)
        finally:
            os.close(home)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        self.create([update.new for update in wanted], done)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        paths = {
            resource: self._scope.namespace(resource.host) for resource in _namespaces(unwanted)
        }
        _end_processes(self._scope, {p.stat().st_ino for p in paths.values() if _is_mounted(p)})
        for resource, path in paths.items():
            try:
                while _is_mounted(path):
                    namespaces.unmount(path, MNT_DETACH | UMOUNT_NOFOLLOW)
                path.unlink(missing_ok=True)
            except OSError as error:
                raise _failed("delete", resource.host, error) from error
            done(resource)
        if not self._scope.private:
            remove_directory(self._scope.namespaces)


def exec_in_host(
    scope: Scope, host: str, argv: Sequence[str], nameservers: Sequence[str] = (), search: str = ""
) -> NoReturn:
    """Become `argv`, run in the host, with the host's name servers in its /etc/resolv.conf.

    Raises UsageError if there is no such host, MissingError if the program isn't found (a shell's
    127), and KernelError if it can't be executed (126) or the host can't be entered. After an error
    this process stays in the host.
    """
    namespace = _open(scope, host)
    try:
        namespaces.setns(namespace, NEWNET)
        if nameservers:
            _own_resolv_conf(scope, nameservers, search)
    except OSError as error:
        raise _failed("enter", host, error) from error
    finally:
        os.close(namespace)
    try:
        os.execvpe(argv[0], list(argv), scope.environment())
    except OSError as error:
        raise _not_run(argv[0], host, error) from error


def popen_in_host(
    scope: Scope,
    host: str,
    argv: Sequence[str],
    nameservers: Sequence[str] = (),
    search: str = "",
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> "Popen[bytes]":
    """As exec_in_host, in a child with a session of its own; the streams are subprocess's."""
    from subprocess import Popen, SubprocessError

    def prepare() -> None:
        _own_resolv_conf(scope, nameservers, search)

    namespace = _open(scope, host)
    try:
        with namespaces.in_namespace(namespace):
            return Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=scope.environment(environ=environ),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=prepare if nameservers else None,
            )
    except SubprocessError as error:
        raise NetorchError(
            f"failed to run {argv[0]} in host {host}: can't mount a resolv.conf for it"
        ) from error
    except OSError as error:
        raise _not_run(argv[0], host, error) from error
    finally:
        os.close(namespace)


def _namespaces(resources: Iterable[Resource]) -> list[Namespace]:
    return [resource for resource in resources if isinstance(resource, Namespace)]


def _make(path: Path) -> None:
    """Make the namespace, or finish it. Leaves the calling thread in there."""
    if _is_mounted(path):
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.setns(there, NEWNET)
        finally:
            os.close(there)
    else:
        path.touch()
        try:
            namespaces.unshare(NEWNET)
            namespaces.mount(_OWN_NAMESPACE, path, flags=MS_BIND)
        except OSError:
            path.unlink()
            raise
    namespaces.loopback_up()


def _is_mounted(path: Path) -> bool:
    try:
        return path.stat().st_dev == os.stat(_OWN_NAMESPACE).st_dev
    except FileNotFoundError:
        return False


def _is_up(path: Path) -> bool:
    if not _is_mounted(path):
        return False
    with namespaces.in_namespace(path):
        return namespaces.loopback_is_up()


def _open(scope: Scope, host: str) -> int:
    path = scope.namespace(host)
    if not _is_mounted(path):
        raise UsageError(f"host {host} of lab {scope.lab} is not running")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _end_processes(scope: Scope, inodes: set[int]) -> None:
    """End the lab's processes in these network namespaces: commands that were run there."""

    def is_inside(process: processes.Marked) -> bool:
        try:
            return os.stat(f"/proc/{process.pid}/ns/net").st_ino in inodes
        except OSError:
            return False  # it has ended

    if inodes:
        processes.end_all(scope, is_inside, _GRACE)


def _own_resolv_conf(scope: Scope, nameservers: Sequence[str], search: str) -> None:
    """A mount namespace of this process's own, with these name servers in /etc/resolv.conf."""
    if not _RESOLV_CONF.exists():
        return
    lines = [f"search {search}"] if search else []
    lines += [f"nameserver {address}" for address in nameservers]
    namespaces.unshare(NEWNS)
    namespaces.mount(None, "/", flags=MS_REC | MS_SLAVE)
    own = scope.run / f"resolv.conf.{os.urandom(8).hex()}"
    own.write_text("".join(f"{line}\n" for line in lines))
    try:
        own.chmod(0o644)
        namespaces.mount(own, _RESOLV_CONF, flags=MS_BIND)
    finally:
        own.unlink()


def _may_unshare() -> bool:
    """Try in a child what hosts need: so whatever decides it (seccomp, AppArmor) answers."""
    child = os.fork()
    if child == 0:
        try:
            namespaces.unshare(NEWNET | NEWNS)
            namespaces.mount(None, "/", flags=MS_REC | MS_SLAVE)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _failed(verb: str, host: str, error: OSError) -> KernelError:
    return KernelError(f"failed to {verb} host {host}: {error.strerror}", error.errno or 0)


def _not_run(program: str, host: str, error: OSError) -> NetorchError:
    if isinstance(error, FileNotFoundError):
        return MissingError(f"failed to run {program} in host {host}: {error.strerror}")
    return KernelError(
        f"failed to run {program} in host {host}: {error.strerror}", error.errno or 0
    )
