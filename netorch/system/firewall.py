"""The lab's nft table, and forwarding on the interfaces that it leaves by.

The table is replaced whole, in one transaction; connections that conntrack knows go on. Whether it
is still as netorch left it is asked of the kernel alone: the table's comment carries the digest of
the rendered text, and once the table is loaded its own listing is hashed and the table sealed with
an empty chain `sealed_<hash>`. A table whose listing hashes to something else was changed by
someone (or netorch was killed before the seal, or libnftables prints differently after an upgrade):
its digest is then "", and the next apply replaces it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from netorch.digests import sha256
from netorch.errors import NetorchError
from netorch.planner import Update
from netorch.resources import Forwarding, Resource, Ruleset
from netorch.system.forwarding import Claims, interfaces
from netorch.system.namespaces import may_change_links
from netorch.system.nft import Nft
from netorch.system.scope import Scope

# Compiled where they are used, since that takes longer than to load this module.
_SEAL = r"\n?\tchain sealed_([0-9a-f]+) \{\n\t\}\n"
_COMMENT = r'(?m)^\tcomment "([0-9a-f]+)"$'
_TABLE = r"(?ms)^table (ip|inet|bridge) (\S+) \{\n(.*?)^\}"
_FORWARD = (
    r"(?m)^\tchain (\S+) \{\n(?:\t\tcomment .*\n)?"
    + r"\t\ttype filter hook forward [^;]*; policy (\w+);$"
)
_REFUSAL = r"(counter )?(drop|reject( with [a-z0-9 -]*)?)( comment .*)?"


class Firewall:
    """Adapter for Ruleset and Forwarding; see `netorch.system.Adapter`."""

    kinds: tuple[type[Resource], ...] = (Ruleset, Forwarding)

    def __init__(self, scope: Scope) -> None:
        self._lab = scope.lab
        self._table = scope.table

    @cached_property
    def _nft(self) -> Nft:
        return Nft()

    @cached_property
    def _claims(self) -> Claims:
        return Claims(self._lab, self._nft)

    def observe(self, look: object = None) -> Iterable[Resource]:
        if not may_change_links():
            return  # who may not see tables has made none
        tables = self._nft.tables()
        if self._table in tables:
            yield self._ruleset()
        yield from self._claims.observe(tables)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        names = interfaces() if any(isinstance(r, Forwarding) for r in wanted) else {}
        reasons = []
        for resource in wanted:
            if isinstance(resource, Forwarding) and resource.name not in names:
                reasons.append(resource.no_interface())
            if isinstance(resource, Ruleset):
                try:
                    self._nft.check(self._table, resource.text, f"load table inet {self._table}")
                except NetorchError as error:
                    hint = f"; {error.hint}" if error.hint else ""
                    reasons.append(f"{error.message}{hint}")
        return reasons

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for resource in wanted:
            if isinstance(resource, Ruleset):
                self._load(resource)
                done(resource)
        if forwardings := [resource for resource in wanted if isinstance(resource, Forwarding)]:
            self._claims.set(forwardings, done)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        self.create([update.new for update in wanted], done)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        if forwardings := [resource for resource in unwanted if isinstance(resource, Forwarding)]:
            self._claims.release(forwardings, done)
        for resource in unwanted:
            if isinstance(resource, Ruleset):
                if self._table in self._nft.tables():
                    command = f"delete table inet {self._table}"
                    self._nft.run(command, command)
                done(resource)

    def _load(self, rules: Ruleset) -> None:
        self._nft.run(self._script(rules), f"load table inet {self._table}")
        if rules.digest:  # else it is someone's version that a rollback brings back
            seal = f"add chain inet {self._table} sealed_{_hash(self._listing())}"
            self._nft.run(seal, f"seal table inet {self._table}")

    def _script(self, rules: Ruleset) -> str:
        """Make and delete first: so the table is replaced whether it is there or not."""
        return f"table inet {self._table}\ndelete table inet {self._table}\n{rules.text}"

    def _ruleset(self) -> Ruleset:
        listing = self._listing()
        text = re.sub(_SEAL, "", listing)
        seals, comment = re.findall(_SEAL, listing), re.search(_COMMENT, text)
        intact = comment is not None and seals == [_hash(text)]
        return Ruleset(text=text, digest=comment[1] if comment and intact else "")

    def _listing(self) -> str:
        command = f"list table inet {self._table}"
        return self._nft.run(command, command)


def foreign_drops() -> list[str]:
    """Sentences that name other tables' chains which drop forwarded packets they don't know."""
    return [f"{where} {why}: the lab's traffic needs a rule {at}" for where, why, at in refusals()]


def refusals() -> list[tuple[str, str, str]]:
    """Other tables' chains that drop forwarded packets they don't know: which, how, and where the
    lab needs a rule in it.

    A lab's packets pass those chains too, and no rule of ours can help (docker and ufw have such a
    policy, firewalld such a last rule). Whether a rule before it lets the lab through, this can't
    tell. Rules of iptables-legacy are invisible to nftables.
    """
    nft = Nft()
    found = []
    for family, table, body in re.findall(_TABLE, nft.run("list chains", "list the nft chains")):
        if table.startswith("netorch_"):
            continue
        for chain, policy in re.findall(_FORWARD, body):
            where = f"chain {chain} of table {family} {table}"
            if policy == "drop":
                found.append((where, "has policy drop", "in it"))
                continue
            listing = nft.run(f"list chain {family} {table} {chain}", f"list {where}")
            rules = [line.strip() for line in listing.splitlines() if line.startswith("\t\t")]
            if re.fullmatch(_REFUSAL, rules[-1]):
                last = rules[-1].removeprefix("counter ")
                found.append((where, f"ends with `{last}`", "before"))
    return found


def _hash(listing: str) -> str:
    return sha256(listing)[:16]
