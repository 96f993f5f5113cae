"""`netorch verify`: the expectations of a running lab, each tried from where it says.

All questions are tried side by side, each in a thread of its own: a probe waits nearly all of its
time, and its sockets can be made in any host's namespace (`netorch.system.probes`). Guests try by
themselves, through their agents.

A "yes" is an answer within the deadline; until then a probe is repeated. With `seen_as` the packet
also has to be seen at the far end, and its source address is compared.

A "no" is proved in two steps. The source gets no answer: it is turned away, or it waits in vain
until the deadline. Then the same probe has to work from elsewhere: from this machine, which is on
the far end's network as its gateway, or from others there. If it does not, the far end may simply
be dead, and nothing is proved.

All of it happens in a forked child (`netorch.system.forked` says why). Nothing of it stays:
sockets, captures and listeners belong to blocks, and an interruption stops the threads through
`Patience`, so that each of them leaves its blocks.
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from netorch.errors import NetorchError
from netorch.expectations import PLACE, Port, Question, Verdict, ports, questions
from netorch.labs import Lab, intended
from netorch.resources import Guest
from netorch.state import State
from netorch.system import leases
from netorch.system.capture import Capture, Mark, Seen
from netorch.system.echo import Echo, knock_from_guest, knock_from_host
from netorch.system.explain import Packets, Probe, explain, first_broken
from netorch.system.forked import in_child
from netorch.system.guest_commands import Inside
from netorch.system.guest_probes import GuestVantage
from netorch.system.hosts import Hosts
from netorch.system.listeners import End, Listeners
from netorch.system.patience import Patience
from netorch.system.probes import Answer, Vantage
from netorch.system.scope import Scope

_ATTEMPT = 1.0  # seconds that one attempt waits for its answer
_PAUSE = 0.25  # seconds between an attempt that was turned away and the next
_CONTROL = 3.0  # seconds for a probe that has to work
_CONTROLS = 3  # vantages that are asked to, at most


def verify(lab: Lab) -> list[Verdict]:
    """Try every expectation of the lab; the verdicts in the order of the file. Moves into the lab's
    place. Raises NetorchError where the record of its topology is lost.
    """
    topology, desired = intended(lab)
    asked = questions(topology, desired)
    if not asked:
        return []

    def work() -> bytes:
        with Patience() as patience, ExitStack() as stack:
            return msgspec.json.encode(_Run(lab.scope, desired, patience, stack).verdicts(asked))

    verdicts = msgspec.json.decode(in_child(work), type=list[Verdict])
    return [_explained(lab.scope, desired, verdict) for verdict in verdicts]


def _explained(scope: Scope, desired: State, verdict: Verdict) -> Verdict:
    """The verdict with the first broken hop, where something should have arrived and has not."""
    question = verdict.question
    if verdict.ok or not question.expect.reach:
        return verdict
    far = question.far
    target = far.node if far.node not in (None, PLACE, question.source) else far.address
    probe = None
    if question.kind in ("tcp", "udp") and far.address:
        packets = Packets(
            f"{question.kind} dport {question.port}", f"{question.kind} sport {question.port}"
        )
        probe = Probe(packets, lambda: _knock(scope, desired, question))
    try:
        hops = explain(scope, desired, question.source, target or "gateway", probe)
    except NetorchError as error:
        return msgspec.structs.replace(verdict, because=f"not to be explained: {error.message}")
    broken = any(not hop.ok for hop in hops)
    return msgspec.structs.replace(verdict, because=first_broken(hops) if broken else "")


def _knock(scope: Scope, desired: State, question: Question) -> Echo:
    source, kind, address, port = (
        question.source,
        question.kind,
        question.far.address,
        question.port,
    )
    if f"guest:{source}" in desired:
        return knock_from_guest(scope, source, kind, address, port)
    return knock_from_host(scope.namespace(source), kind, address, port)


class _Watch:
    """What arrives at both ends of one probe, which has a mark of its own."""

    def __init__(self, mark: Mark, far: Capture | None, near: Capture | None) -> None:
        self.mark = mark
        self.near = near  # at a guest that probes: what comes back to it
        self._far = far
        self._seen: Seen | None = None

    def seen(self) -> Seen | None:
        if self._far is not None:
            self._seen = self._far.seen(self.mark) or self._seen
        return self._seen


class _Run:
    def __init__(self, scope: Scope, desired: State, patience: Patience, stack: ExitStack) -> None:
        self.scope = scope
        self.patience = patience
        self.hosts = {namespace.host: namespace.up for namespace in Hosts(scope).observe()}
        self.ports: dict[str, list[Port]] = {}
        for port in ports(desired):
            self.ports.setdefault(port.node, []).append(port)
        self.guests = {g.name: Inside(scope, g.name, patience) for g in desired.of(Guest)}
        for inside in self.guests.values():
            stack.callback(inside.close)
        self.listeners = stack.enter_context(Listeners(patience))
        # Far ends, by address and probe: those that can't listen, and those that do so by
        # themselves.
        self.deaf: dict[tuple[str, str], str] = {}
        self.served: set[tuple[str, str]] = set()
        self.numbers = itertools.count()

    def verdicts(self, asked: Sequence[Question]) -> list[Verdict]:
        asked = self.patience.each(asked, self._addressed)
        listening = {(q.far, q.expect.by): q for q in asked if q.kind in ("tcp", "udp")}
        longest = sum(q.seconds + _CONTROL * _CONTROLS for q in asked)
        self.patience.each(listening.values(), lambda q: self._listen(q, longest))
        self.listeners.echo()
        return self.patience.each(asked, self._verdict)

    # Far ends

    def _addressed(self, question: Question) -> Question:
        """The question with the address of its far end, if somebody else has given that."""
        far = question.far
        if far.address or not far.mac or far.node is None:
            return question
        port = next(port for port in self.ports[far.node] if port.mac == far.mac)
        found = msgspec.structs.replace(far, address=next(self._addresses(port), ""))
        return msgspec.structs.replace(question, far=found)

    def _addresses(self, port: Port) -> Iterator[str]:
        """The addresses that a NIC has now."""
        if port.device:
            address = self._host(port.node).address_of(port.device)
            yield from [address] if address else []
        else:
            try:
                yield from self.guests[port.node].addresses().get(port.mac, [])
            except NetorchError:
                return  # it does not answer: that is then what its own probes say

    def _listen(self, question: Question, seconds: float) -> None:
        far, inside = question.far, self.guests.get(question.far.node or PLACE)
        if far.node is None or not far.address or (inside and question.kind == "udp"):
            return
        key = (far.address, question.expect.by)
        end = End(question.kind, far.address, question.port)
        try:
            if inside is not None:
                own = self.listeners.open_in_guest(end, inside, seconds)
            else:
                namespace = self._host(far.node).namespace
                own = self.listeners.open(end._replace(namespace=namespace))
        except NetorchError as error:
            self.deaf[key] = error.message
        else:
            if not own:
                self.served.add(key)

    def _host(self, node: str) -> Vantage:
        namespace = None if node == PLACE else self.scope.namespace(node)
        return Vantage(namespace, self.patience)

    @contextmanager
    def _watch(self, question: Question, source: str) -> Iterator[_Watch]:
        """A mark of its own, and what it takes to see it at the far end, where that is needed."""
        number = next(self.numbers)
        mark = Mark(100 + number % 400, b"netorch-" + os.urandom(6).hex().encode())
        far = question.far.node
        wanted = question.expect.seen_as is not None or question.kind == "udp"
        with ExitStack() as stack:
            seeing = self._capture(stack, far) if wanted and far is not None else None
            near = self._capture(stack, source) if source in self.guests else None
            yield _Watch(mark, seeing, near)

    def _capture(self, stack: ExitStack, node: str) -> Capture | None:
        """What arrives at a node; None if its cable or its namespace is gone."""
        links = [port.link for port in self.ports[node]] if node in self.guests else []
        inside = self.scope.namespace(node) if node != PLACE and not links else None
        try:
            return stack.enter_context(Capture(inside, links))
        except OSError:
            return None

    # Verdicts

    def _verdict(self, question: Question) -> Verdict:
        began = time.monotonic()
        ok, observed = self._judged(question)
        took = time.monotonic() - began
        return Verdict(question=question, ok=ok, observed=observed, seconds=round(took, 3))

    def _judged(self, question: Question) -> tuple[bool, str]:
        expect = question.expect
        if question.kind == "dhcp":
            return self._leased(question)
        with self._watch(question, question.source) as watch:
            answer = self._settled(question, question.source, watch, question.seconds)
            reached = answer.kind == "reached"
            text = answer.text
            if answer.kind == "silent":
                text += f" in {question.seconds:g} s"
            if reached and expect.seen_as is not None:
                return self._compared(expect.seen_as, watch.seen(), text)
        if not reached and (reason := self.deaf.get((question.far.address, expect.by))):
            text += f"; {reason}"
        if expect.reach or answer.kind == "broken":
            return reached, text
        if reached:
            return False, f"it gets there: {text}"
        if question.kind == "dns" and answer.kind == "refused":
            return True, text  # the server is up: it has said no
        return self._proved(question, text)

    def _compared(self, wanted: str, seen: Seen | None, text: str) -> tuple[bool, str]:
        if seen is None:
            return False, f"{text}, but nothing of it was seen at the far end"
        if seen.source != wanted:
            return False, f"{text}, but seen as {seen.source}, not as {wanted}"
        return True, f"{text}, seen as {seen.source}"

    def _proved(self, question: Question, text: str) -> tuple[bool, str]:
        """Does the same probe work from where it must?"""
        tried = []
        for vantage in question.vantages[:_CONTROLS]:
            with self._watch(question, vantage) as watch:
                control = self._settled(question, vantage, watch, _CONTROL, must=True)
            who = vantage or "this machine"
            up = control.kind == "reached" or (question.kind, control.kind) == ("dns", "refused")
            if up:
                return True, f"{text}; {who} gets there: {control.text}"
            tried.append(f"{who} does not get there either: {control.text}")
        doubt = "; ".join(tried) or "nobody else is on that network to try"
        return False, f"could not be proved: {text}; {doubt}"

    def _leased(self, question: Question) -> tuple[bool, str]:
        """Every NIC of the source that asks has its address; the lease is looked up beside it."""
        until = time.monotonic() + question.seconds
        own = self.ports[question.source]
        asking = [p for p in own if p.given == "lab"] or [p for p in own if p.given == "elsewhere"]
        while True:
            held = {lease.mac: lease.address for lease in leases.read(self.scope)}
            texts = [_lease_text(p, list(self._addresses(p)), held.get(p.mac, "")) for p in asking]
            wrong = [text for right, text in texts if not right]
            if not wrong:
                return True, ", ".join(text for _, text in texts)
            now = time.monotonic()
            if now >= until:
                return False, ", ".join(wrong)
            self.patience.wait(min(until, now + _PAUSE))

    # Probes

    def _settled(
        self, question: Question, vantage: str, watch: _Watch, seconds: float, must: bool = False
    ) -> Answer:
        """Try until it works, or, where it shall not, until that is clear. Returns the last answer;
        where the attempts ended in silence, the last that was more than that.
        """
        patient = must or question.expect.reach
        until = time.monotonic() + seconds
        left = seconds  # whatever the clock says, the first attempt has its time
        told = None
        while True:
            answer = self._attempt(question, vantage, watch, min(_ATTEMPT, left))
            if answer.kind in ("reached", "broken"):
                return answer
            if answer.kind != "silent":
                told = answer
                if not patient:
                    return answer
                self.patience.wait(min(until, time.monotonic() + _PAUSE))
            left = until - time.monotonic()
            if left <= 0:
                return told or answer

    def _attempt(self, question: Question, node: str, watch: _Watch, seconds: float) -> Answer:
        if node != PLACE and node not in self.guests and not self.hosts.get(node):
            return Answer("broken", f"host {node} is not up")
        vantage = self._vantage(node, watch)
        if question.kind == "dns":
            return self._resolved(question, vantage, seconds)
        address = question.far.address
        if not address and question.far.name and isinstance(vantage, GuestVantage):
            address = question.far.name
        elif not address and question.far.name:
            answer, found = vantage.dns(question.far.name, question.servers, seconds)
            if not found:
                return answer._replace(text=f"no address of {question.far.name}: {answer.text}")
            address = found[0]
        if not address:
            return Answer("unreachable", f"{question.expect.to} has no address")
        if question.kind == "ping":
            return vantage.ping(address, watch.mark, seconds)
        if question.kind == "tcp":
            return vantage.tcp(address, question.port, watch.mark, seconds)
        return self._arrived(
            question, vantage.udp(address, question.port, watch.mark, seconds), watch
        )

    def _arrived(self, question: Question, answer: Answer, watch: _Watch) -> Answer:
        """A datagram that nothing came back for: has it arrived nevertheless?

        Where a service of somebody else's has the port that is enough, and where nothing may
        arrive it is too much. A guest, where nothing listens, has to answer that its port is
        closed.
        """
        far = question.far
        if answer.kind == "reached" or watch.seen() is None:
            return answer
        if far.node not in self.guests:
            counts = (far.address, question.expect.by) in self.served or not question.expect.reach
            if answer.kind == "silent" and counts:
                return Answer("reached", "it arrives, and nobody answers")
        elif answer.kind == "refused" or answer.by == far.address:
            return Answer("reached", "it arrives, at a closed port")
        return answer

    def _resolved(
        self, question: Question, vantage: Vantage | GuestVantage, seconds: float
    ) -> Answer:
        given = (question.far.address,) if question.far.address else ()
        servers = given if isinstance(vantage, GuestVantage) else given or question.servers
        answer, found = vantage.dns(question.detail, servers, seconds)
        if found and question.answers and not set(found) & set(question.answers):
            said = ", ".join(found)
            return Answer("broken", f"{said}, but it has {', '.join(question.answers)}")
        return answer

    def _vantage(self, node: str, watch: _Watch) -> Vantage | GuestVantage:
        if node in self.guests:
            return GuestVantage(self.guests[node], watch.near)
        return self._host(node)


def _lease_text(port: Port, there: Sequence[str], leased: str) -> tuple[bool, str]:
    nic = port.device or port.link
    if not there:
        return False, f"no address on {nic}" + (f", though {leased} is leased" if leased else "")
    if port.given == "elsewhere":
        return True, f"{there[0]} on {nic}"
    if not leased:
        return False, f"{there[0]} on {nic}, without a lease"
    if leased not in there:
        return False, f"{', '.join(there)} on {nic}, but the lease is {leased}"
    return True, f"{leased} on {nic}"
