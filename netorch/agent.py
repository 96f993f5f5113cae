"""The agent of one netorch.Lab, in the lab's place; see netorch.agents."""

import os
import select
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from netorch import labs, nodes, picture, wire
from netorch.addresses import uplink_subnet
from netorch.engine import Progress
from netorch.errors import ConflictError, MissingError, NetorchError, ReadyError
from netorch.system import cables, rundir
from netorch.system.owned_place import OwnedPlace
from netorch.system.places import (
    Place,
    create_private,
    destroy,
    enter,
    has_net_admin,
)
from netorch.system.scope import current_place, disks_base, run_base

Answer = tuple[Any, tuple[int, ...]]  # a value, and descriptors to go with it

request_decoder = msgspec.json.Decoder(wire.AnyRequest)


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
        if start.named and any(lab.name == start.lab for lab in labs.labs()):
            raise ConflictError(
                f"a lab {start.lab} is there already",
                f"give this another name, or: netorch teardown {start.lab}",
            )
        if not start.private and not has_net_admin():
            raise MissingError(
                "failed to make a lab in the current network namespace: no CAP_NET_ADMIN over it",
                "make it a private one",
            )
        labs.prepare(start.topology, Progress())
        place = Place(lab=start.lab, private=False, inode=0)
        try:
            with rundir.locked(run):
                place = self._place(start, run)
                self.lab = labs.Lab(start.lab, place, run, disks_base() / start.lab)
                fresh = self._owned is not None
                labs.apply_inside(self.lab, start.topology, start.source, Progress(), fresh=fresh)
                cables.await_all(self.lab.scope)
        except BaseException as error:
            if isinstance(error, ReadyError):
                with suppress(NetorchError):
                    error.add_note(_text(self.sections()))
            self.lab = labs.Lab(start.lab, place, run, disks_base() / start.lab)
            self._keep = False
            self.end()
            raise
        self.topology = start.topology

    def _place(self, start: wire.Start, run: Path) -> Place:
        if not start.private:
            return Place(lab=start.lab, private=False, inode=current_place())
        if start.uplink == "none" and not start.keep:
            self._owned = OwnedPlace(start.lab, run)
            return self._owned.place
        subnet = uplink_subnet(start.topology)
        place = create_private(start.lab, run, start.uplink, subnet)
        try:
            enter(place)
        except BaseException:
            destroy(place)
            raise
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
                request = request_decoder.decode(text) if text else wire.End()
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
                    plan = labs.apply_inside(
                        self.lab,
                        request.topology,
                        request.source,
                        Progress(),
                        restart=request.restart,
                    )
                cables.await_all(self.lab.scope)
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
                cables.plug(self.lab.scope, request.id, request.up)
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
        elif self.lab.place.inode:
            errors = labs.teardown(self.lab, Progress())
            if errors:
                raise NetorchError("\n".join(errors))
        for fd in list(self._commands):
            self._ended(fd)
        rundir.leave(self.lab.run)
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


def live(start: wire.Start, channel: socket.socket) -> NoReturn:
    """The agent's whole life."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(start.environ)
        os.chdir(start.cwd)
        reply, _ = _answered(lambda: _whole(start, channel))
        with suppress(OSError):
            wire.send(channel, reply)
    except KeyboardInterrupt:  # the caller has died at another moment; the starter looks after us
        os._exit(1)
    finally:
        os._exit(0)


def _whole(start: wire.Start, channel: socket.socket) -> tuple[None, tuple[()]]:
    agent = Agent(start)
    value = {"place": agent.lab.place, "run": str(agent.lab.run)}
    try:
        wire.send(channel, wire.Reply(value))
        agent.serve(channel)
    except (KeyboardInterrupt, OSError):
        pass  # the caller has died
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    agent.end()
    return None, ()
