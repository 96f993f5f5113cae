"""The agents of netorch.Lab: processes that live in the labs, so that no caller has to.

Entering a private place can't be undone, and needs a process with a single thread. A test process
must not enter, and often has threads. So it starts, once, a starter: this module in a process of
its own, single-threaded, with everything imported that a lab may need.

    caller ──▶ starter ──fork──▶ agent of lab 1   (in the lab's place)
       │                └─fork──▶ agent of lab 2
       └──────── a socket pair to each agent ─────▶

An agent costs a fork. It makes its lab, then serves its caller's requests (wire.py) one at a time,
and meanwhile waits for the commands that it started, each of which has a pipe that its exit status
goes to. When its socket closes, or its starter asks (SIGTERM), it takes the lab down and ends.

The starter does nothing but wait: for requests, for the end of its agents and for that of the
caller, on a pidfd, since others may hold copies of the caller's sockets. When the caller is gone it
ends all agents. What an agent that was killed has left, it takes down by the marks. So of these
processes any can be killed, the caller included, and the labs end.
"""

import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from netorch import labs, nodes, picture, wire
from netorch.engine import Progress
from netorch.errors import ConflictError, MissingError, NetorchError, ReadyError, UsageError
from netorch.resources import Veth
from netorch.system import rundir
from netorch.system.owned_place import OwnedPlace
from netorch.system.places import (
    Place,
    create_private,
    destroy,
    enter,
    has_net_admin,
    private_places,
)
from netorch.system.scope import current_place, disks_base, run_base

Answer = tuple[Any, tuple[int, ...]]  # a value, and descriptors to go with it

_request = msgspec.json.Decoder(wire.AnyRequest)
_GRACE = 20.0  # seconds that agents have to take their labs down once the caller is gone


class _Command(NamedTuple):
    pid: int
    status: int  # the pipe


class Agent:
    """One lab, from within its place."""

    def __init__(self, start: wire.Start) -> None:
        """Make the lab. Raises NetorchError once nothing of it is left."""
        self._keep = start.keep
        self._owned: OwnedPlace | None = None
        self._commands: dict[int, _Command] = {}  # by pidfd
        self._services: dict[str, tuple[list[str], str]] = {}
        run = run_base() / start.lab
        if start.named and start.lab in private_places():
            raise ConflictError(f"a lab {start.lab} is running already", "give this another name")
        if not start.private and not has_net_admin():
            raise MissingError(
                "failed to make a lab in the current network namespace: no CAP_NET_ADMIN over it",
                "make it a private one",
            )
        labs.prepare(start.topology, Progress())
        with rundir.locked(run):
            place = Place(lab=start.lab, private=False, inode=0)
            try:
                place = self._place(start, run)
                self.lab = labs.Lab(start.lab, place, run, disks_base() / start.lab)
                fresh = self._owned is not None
                labs.apply_inside(self.lab, start.topology, start.source, Progress(), fresh=fresh)
            except BaseException as error:
                if isinstance(error, ReadyError):
                    with suppress(NetorchError):
                        error.add_note(_text(self.sections()))
                self.lab = labs.Lab(start.lab, place, run, disks_base() / start.lab)
                self.end()
                raise
        self.topology = start.topology

    def _place(self, start: wire.Start, run: Path) -> Place:
        if not start.private:
            return Place(lab=start.lab, private=False, inode=current_place())
        if start.uplink == "none" and not start.keep:
            self._owned = OwnedPlace(start.lab, run)
            return self._owned.place
        subnet = labs.uplink_subnet(start.topology)
        place = create_private(start.lab, run, start.uplink, subnet)
        enter(place)
        return place

    def serve(self, channel: socket.socket) -> None:
        """Answer requests until the caller says or shows that it is done."""
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        while True:
            for fd, _event in poll.poll():
                if fd in self._commands:
                    poll.unregister(fd)
                    self._ended(fd)
                    continue
                text, fds = wire.receive(channel)
                request = _request.decode(text) if text else wire.End()
                if isinstance(request, wire.End):
                    return
                known = set(self._commands)
                reply, given = _answered(partial(self.answer, request, fds))
                for pidfd in set(self._commands) - known:
                    poll.register(pidfd, select.POLLIN)
                wire.send(channel, reply, given)
                for descriptor in (*fds, *(g for g in given if g not in self._commands)):
                    os.close(descriptor)

    def answer(self, request: wire.Request, fds: list[int]) -> Answer:
        match request:
            case wire.Apply():
                self._services.clear()
                with rundir.locked(self.lab.run):
                    plan = labs.apply_inside(self.lab, request.topology, request.source, Progress())
                self.topology = request.topology
                return plan.describe(), ()
            case wire.Status():
                standing = labs.status_inside(self.lab)
                return [(state, key, r.describe()) for state, key, r in standing.rows()], ()
            case wire.Spawn():
                return self._spawn(request, fds)
            case wire.Signal():
                self._signal(request)
            case wire.Packets():
                return None, (self._packets(request),)
            case wire.Wire():
                self._wire(request)
            case wire.Picture():
                return self.sections(), ()
        return None, ()

    def sections(self) -> list[tuple[str, str]]:
        """The lab as it is now: (title, text)."""
        from netorch.system import leases
        from netorch.system.nft import Nft

        held = leases.read(self.lab.scope)
        addresses = {lease.mac: lease.address for lease in held}
        state = labs.machine(self.lab.scope).observe()
        rows = [(one.network, one.name or "-", one.address, one.mac) for one in held]
        sections = [(f"lab {self.lab.name}", picture.networks(state, addresses))]
        if rows:
            head = ("NETWORK", "NAME", "ADDRESS", "MAC")
            sections.append(("leases", picture.table(head, rows)))
        rules = Nft(counters=True).run("list ruleset", "list the nft rules").strip()
        if rules:
            sections.append(("nft rules", rules))
        return sections

    def end(self) -> None:
        """Take the lab down, unless it is to be kept."""
        if self._keep:
            return
        if self._owned is not None:
            self._owned.end()
        elif self.lab.place.private:
            destroy(self.lab.place)
            rundir.leave(self.lab.run)
        elif self.lab.place.inode:
            errors = labs.teardown(self.lab, Progress())
            if errors:
                raise NetorchError("\n".join(errors))
        for fd in list(self._commands):
            self._ended(fd)
        rundir.remove(self.lab.scope)

    def _spawn(self, request: wire.Spawn, fds: list[int]) -> Answer:
        from netorch.system.hosts import popen_in_host

        host = request.host
        if host not in self._services:
            self._services[host] = nodes.name_service(self.lab, host)
        stdin, stdout, stderr, status = fds
        started = popen_in_host(
            self.lab.scope,
            host,
            request.argv,
            *self._services[host],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            environ=request.environ,
            cwd=request.cwd,
        )
        started.returncode = 0  # it is waited for here, and not by subprocess
        pidfd = os.pidfd_open(started.pid)
        self._commands[pidfd] = _Command(started.pid, os.dup(status))
        return started.pid, (pidfd,)

    def _ended(self, pidfd: int) -> None:
        """Tell the exit status of a command to who waits for it."""
        command = self._commands.pop(pidfd)
        with suppress(ChildProcessError, BrokenPipeError):
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            assert ended is not None
            exited = ended.si_code == os.CLD_EXITED
            os.write(command.status, str(ended.si_status if exited else -ended.si_status).encode())
        os.close(command.status)
        os.close(pidfd)

    def _signal(self, request: wire.Signal) -> None:
        """Until it has been waited for, its pid is its own."""
        if any(command.pid == request.pid for command in self._commands.values()):
            with suppress(ProcessLookupError):
                (os.killpg if request.group else os.kill)(request.pid, request.number)

    def _packets(self, request: wire.Packets) -> int:
        from netorch.system.namespaces import in_namespace
        from netorch.system.packets import listen

        try:
            if not request.host:
                return listen(request.device, request.frames).detach()
            with in_namespace(self.lab.scope.namespace(request.host)):
                return listen(request.device, request.frames).detach()
        except OSError as error:
            where = f" of {request.host}" if request.host else ""
            raise NetorchError(
                f"failed to capture on {request.device}{where}: {error.strerror}"
            ) from error

    def _wire(self, request: wire.Wire) -> None:
        from netorch.planner import Update
        from netorch.system.links import Links

        links = Links(self.lab.scope)
        for veth in links.observe():
            if isinstance(veth, Veth) and veth.id == request.id:
                change = Update(veth, msgspec.structs.replace(veth, up=request.up))
                links.update([change], lambda resource: None)
                return
        raise UsageError(f"lab {self.lab.name} has no link {request.id}")


def _text(sections: list[tuple[str, str]]) -> str:
    return "\n\n".join(f"{title}\n{text}" for title, text in sections)


def _answered(work: Callable[[], Answer]) -> tuple[wire.Reply, tuple[int, ...]]:
    try:
        value, fds = work()
    except NetorchError as error:
        return wire.Reply(failure=wire.failure(error)), ()
    except Exception as defect:
        told = NetorchError(f"{type(defect).__name__}: {defect}", "a defect of netorch")
        told.add_note(traceback.format_exc())
        return wire.Reply(failure=wire.failure(told)), ()
    return wire.Reply(value), fds


def _live(start: wire.Start, channel: socket.socket) -> NoReturn:
    """The agent's whole life."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(start.environ)
        os.chdir(start.cwd)
        reply, _ = _answered(lambda: _whole(start, channel))
        with suppress(OSError):
            wire.send(channel, reply)
    except KeyboardInterrupt:  # the caller has died while the lab was made: nothing is left of it
        os._exit(1)
    finally:
        os._exit(0)


def _whole(start: wire.Start, channel: socket.socket) -> tuple[None, tuple[()]]:
    agent = Agent(start)
    value = {"place": agent.lab.place, "run": str(agent.lab.run)}
    try:
        wire.send(channel, wire.Reply(value))
        agent.serve(channel)
    except (KeyboardInterrupt, OSError):  # the caller has died
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    agent.end()
    return None, ()


class _Starter:
    def __init__(self, channel: socket.socket, caller: int) -> None:
        self._channel = channel
        self._caller = caller
        self._agents: dict[int, tuple[int, str]] = {}  # by pidfd: the pid, the lab's name
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._poll.register(caller, select.POLLIN)

    def serve(self) -> None:
        while True:
            for fd, _event in self._poll.poll():
                if fd in self._agents:
                    self._ended(fd)
                elif fd == self._caller or not self._request():
                    return

    def end(self) -> None:
        """Have all agents take their labs down."""
        import time

        for pid, _lab in self._agents.values():
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while self._agents and (left := deadline - time.monotonic()) > 0:
            for fd, _event in self._poll.poll(left * 1000):
                if fd in self._agents:
                    self._ended(fd)
                else:
                    self._poll.unregister(fd)
        for fd, (pid, _lab) in list(self._agents.items()):
            os.kill(pid, signal.SIGKILL)
            self._ended(fd)

    def _request(self) -> bool:
        text, fds = wire.receive(self._channel)
        if not text:
            return False
        start = _request.decode(text)
        assert isinstance(start, wire.Start)
        (end,) = fds
        pid = os.fork()
        if pid == 0:
            for fd in (self._channel.fileno(), self._caller, *self._agents):
                os.close(fd)
            _live(start, socket.socket(fileno=end))
        os.close(end)
        pidfd = os.pidfd_open(pid)
        self._agents[pidfd] = pid, "" if start.keep else start.lab
        self._poll.register(pidfd, select.POLLIN)
        return True

    def _ended(self, pidfd: int) -> None:
        pid, lab = self._agents.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and lab:
            _take_down(lab)


def _take_down(name: str) -> None:
    """What a killed agent left, by the marks."""
    child = os.fork()
    if child == 0:
        try:
            for lab in labs.labs():
                if lab.name == name:
                    labs.teardown(lab, Progress())
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def main(channel: int, caller: int) -> None:
    """The starter: `channel` is its socket, `caller` the pid of the process that uses it."""
    import gc

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    pidfd = os.pidfd_open(caller)
    if os.getppid() != caller:
        sys.exit(1)
    gc.collect()
    gc.freeze()  # or the agents' garbage collectors would copy every page
    starter = _Starter(socket.socket(fileno=channel), pidfd)
    try:
        starter.serve()
    finally:
        starter.end()


def _import_all() -> None:
    """What agents will need: so that it is imported once, and no agent imports anything."""
    import subprocess

    from netorch.system import (
        conflicts,
        disks,
        facts,
        firewall,
        guests,
        hosts,
        leases,
        links,
        messages,
        nft,
        packets,
        removal,
        services,
        taps,
    )

    del subprocess, conflicts, disks, facts, firewall, guests, hosts, leases, links, nft, packets
    del removal, services, taps
    messages.warm()
