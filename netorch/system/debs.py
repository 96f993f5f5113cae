"""Debian and Ubuntu packages as a source of files, without root and without installing anything.

Theory of operation
-------------------
``apt-get download`` reads the package lists that the machine already has, fetches a package from
where its administrator said, checks it against the signed lists, and writes it into the current
directory; all of that an ordinary user may do. ``dpkg-deb -x`` unpacks it anywhere. Nothing here
touches dpkg's database. apt's own user for downloads (``_apt``) is turned off: it could not write
into the caller's directory, and changing to it is refused inside a user namespace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from netorch.errors import ImageError

_UPDATE = "run `sudo apt-get update`, then try again"


def available() -> bool:
    """Whether this machine has apt and dpkg."""
    return all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))


def known(package: str) -> bool:
    """Whether the machine's package lists have a version of the package that can be downloaded."""
    return bool(_apt_cache("show", "--no-all-versions", package))


def dependencies(package: str, *, recursive: bool = False) -> list[str]:
    """The real packages that a package depends on, itself not among them, in apt's order.

    Raises ImageError where the lists don't have the package.
    """
    if not known(package):
        raise ImageError(f"failed to find package {package}: the package lists lack it", _UPDATE)
    options = [f"--no-{kind}" for kind in _WEAK] + (["--recurse"] if recursive else [])
    found: dict[str, None] = {}
    for line in _apt_cache("depends", *options, package).splitlines():
        kind, separator, name = line.strip().lstrip("|").partition(":")
        if separator and kind in ("Depends", "PreDepends") and not name.strip().startswith("<"):
            found.setdefault(name.strip().partition(":")[0])
    found.pop(package, None)
    return list(found)


_WEAK = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")


def unpack(packages: Sequence[str], into: Path) -> None:
    """Download packages and unpack them all over the directory ``into``, which is made.

    Raises ImageError with what apt or dpkg said.
    """
    into.mkdir(parents=True, exist_ok=True)
    downloads = into.with_name(into.name + ".debs")
    downloads.mkdir()
    _run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages],
        f"failed to download {', '.join(packages)}",
        _UPDATE,
        directory=downloads,
    )
    for deb in sorted(downloads.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb), str(into)], f"failed to unpack {deb.name}", "")
    shutil.rmtree(downloads)


def _apt_cache(*arguments: str) -> str:
    """What apt-cache prints; it prints nothing for packages that it doesn't know."""
    return subprocess.run(
        ["apt-cache", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        text=True,
        check=False,
    ).stdout


def _run(argv: list[str], failure: str, hint: str, directory: Path | None = None) -> None:
    try:
        subprocess.run(
            argv,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().replace("\n", "; ") or f"exit status {error.returncode}"
        raise ImageError(f"{failure}: {reason}", hint) from error


def _environment() -> dict[str, str]:
    """The caller's environment (it may hold a proxy), with messages in English."""
    return {**os.environ, "LC_ALL": "C"}
