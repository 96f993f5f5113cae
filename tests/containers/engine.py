"""Rootless podman, and containers whose image is this machine's own root file system.

No image can be pulled where the tests run, and none is needed: a container's root is a skeleton of
empty directories with the machine's /usr, this Python, this checkout and the cache of the image
`tiny` mounted on them read-only. So a container has what `scripts/setup` installed.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {  # program: Debian's package
    "podman": "podman",
    "crun": "crun",
    "newuidmap": "uidmap",
    "slirp4netns": "slirp4netns",
}
CACHE = "/var/cache/tests"  # of the containers
_SKELETON = """
set -e
mkdir -p "$1" && cd "$1"
mkdir -p dev etc home proc root run sys tmp usr var/lib var/tmp
chmod 1777 tmp var/tmp
for name in bin lib lib64 sbin; do ln -s "usr/$name" "$name"; done
echo root:x:0:0:root:/root:/bin/sh >etc/passwd
echo root:x:0: >etc/group
"""


class Done(NamedTuple):
    """How a command ended, and what it wrote to both its streams."""

    status: int
    output: str

    @property
    def text(self) -> str:
        """The output of a command that must succeed."""
        assert self.status == 0, f"exit status {self.status}:\n{self.output}"
        return self.output


class Container:
    """A running container. Its PID 1 sleeps and reaps nothing, as most containers' does."""

    def __init__(self, engine: "Engine", name: str) -> None:
        self._engine = engine
        self._name = name

    def run(self, *argv: str) -> Done:
        return self._engine.run("podman", "exec", self._name, *argv)

    def netorch(self, *argv: str) -> Done:
        return self.run(sys.executable, "-m", "netorch", *argv)


class Engine:
    """Podman in namespaces of the tests' own (server.py). Must be closed."""

    def __init__(self, scratch: Path, cache: Path) -> None:
        self._scratch = scratch
        python = Path(sys.executable).resolve().parents[1]
        here = [ROOT, Path(sys.prefix), Path(sys.base_prefix), python]
        self._shared = [*_outermost(here), cache]
        self._containers = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.containers.server", scratch, *self._shared],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.refused: str = self._answer()["refused"]

    @property
    def ids(self) -> int:
        """How many ids a container can have."""
        lines = self.run("podman", "unshare", "cat", "/proc/self/uid_map").text.splitlines()
        return sum(int(line.split()[2]) for line in lines)

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, *argv: str) -> Done:
        """Run a command as podman's user, on podman's machine."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(argv) + "\n")
        self._server.stdin.flush()
        answer = self._answer()
        return Done(answer["status"], answer["output"])

    def file(self, name: str, text: str) -> Path:
        """Write a file where podman finds it."""
        path = self._scratch / "tmp" / name
        assert self.run("sh", "-c", 'printf %s "$1" >"$2"', "sh", text, str(path)).text == ""
        return path

    @contextmanager
    def container(self, *options: str) -> Iterator[Container]:
        """A container that was started with these options of `podman run`."""
        self._containers += 1
        name = f"c{self._containers}"
        root = self._scratch / "tmp" / name
        assert self.run("sh", "-c", _SKELETON, "sh", str(root)).text == ""
        started = self.run(
            *("podman", "run", "--detach", "--name", name, "--cgroups=disabled"),
            *self._volumes(),
            *("--env", f"PYTHONPATH={ROOT}", "--env", "PYTHONDONTWRITEBYTECODE=1"),
            *("--env", f"XDG_CACHE_HOME={CACHE}", "--workdir", str(ROOT)),
            *options,
            *("--rootfs", str(root), "sleep", "infinity"),
        )
        assert started.status == 0, started.output
        try:
            yield Container(self, name)
        finally:
            self.run("podman", "rm", "--force", "--time", "0", name)

    def _volumes(self) -> Sequence[str]:
        volumes = ["--volume=/usr:/usr:ro", "--volume=/etc/alternatives:/etc/alternatives:ro"]
        for number, path in enumerate(self._shared):
            where = f"{CACHE}/netorch" if number == len(self._shared) - 1 else path
            volumes.append(f"--volume={self._scratch}/share/{number}:{where}:ro")
        return volumes

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, f"the machine of podman has ended: {self._server.wait()}"
        return json.loads(line)


def require_podman() -> None:
    """Skip where it is not installed, with the names of the packages."""
    if missing := [package for program, package in NEEDS.items() if not shutil.which(program)]:
        pytest.skip(f"not installed: {' '.join(missing)} (scripts/setup --tests)")


def _outermost(paths: list[Path]) -> list[Path]:
    """Those that lie below no other, nor below /usr, which every container has."""
    chosen: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(other) for other in (Path("/usr"), *chosen)):
            chosen.append(path)
    return chosen
