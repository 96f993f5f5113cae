"""What a reader copies is right: the Containerfile, the pages about containers and CI, workflows.

No image can be pulled where the tests run and no CI service reads these files here, so they are
held against what they name: packages, files, netorch's own command line, podman's options.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from netorch.cli import find
from netorch.command_line import parsed

ROOT = Path(__file__).parents[2]
PAGES = ("docs/ci.md", "docs/containers.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXTRA = {"ca-certificates", "git"}  # for pip, where an image is smaller than a machine
SEPARATORS = re.compile(r"""&&|\|\||;|['"]|\bexec lab\b|\n""")


def text(path: str) -> str:
    return (ROOT / path).read_text()


def blocks(path: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text(path)) if kind == language]


def documents() -> Iterator[tuple[str, Any]]:
    """Every YAML document, with the file that it is in."""
    for page in PAGES:
        for body in blocks(page, "yaml"):
            yield page, yaml.safe_load(body)
    yield ".github/workflows/ci.yml", yaml.safe_load(text(".github/workflows/ci.yml"))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command that is shown, with its file; continued lines are one."""
    shells = [(page, body) for page in PAGES for body in blocks(page, "sh")]
    shells += [(page, string) for page, document in documents() for string in strings(document)]
    containerfile = text("Containerfile").replace("#     ", "").replace("RUN ", "")
    shells.append(("Containerfile", containerfile))
    for page, shell in shells:
        for part in SEPARATORS.split(shell.replace("\\\n", " ")):
            words = shlex.split(part, comments=True)
            if words:
                yield page, words


def needed() -> set[str]:
    """The packages of scripts/setup without those for its tests."""
    setup = text("scripts/setup").partition("--tests ]")[0]
    found = set(re.findall(r"^need ([a-z0-9-]+) ", setup, re.MULTILINE))
    return found | set(re.findall(r'missing="\$missing ([a-z0-9-]+)"', setup))


@pytest.mark.parametrize("path", ["Containerfile", "docs/ci.md"])
def test_packages_are_those_of_setup(path: str) -> None:
    assert len(needed()) > 7
    installs = [w for page, w in commands() if page == path and {"apt-get", "install"} <= {*w}]
    assert installs
    for words in installs:
        packages = {w for w in words[words.index("install") + 1 :] if not w.startswith("-")}
        assert packages - EXTRA == needed()


def test_packages_exist() -> None:
    if not shutil.which("apt-cache"):
        pytest.skip("apt-cache is not installed: this is not Debian")
    wanted = needed() | EXTRA
    known = subprocess.run(
        ["apt-cache", "show", *wanted], capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"^Package: (.*)$", known.stdout, re.MULTILINE)) == wanted


def test_containerfile() -> None:
    joined = text("Containerfile").replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in lines]
    names = [name for name, _ in instructions]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT"}
    assert json.loads(instructions[-1][1]) == ["netorch"]
    for name, rest in instructions:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)


def test_workflows_have_the_shape_that_their_services_read() -> None:
    workflows = [document for _, document in documents() if "jobs" in document]
    assert len(workflows) == 2
    for workflow in workflows:
        assert True in workflow, "YAML 1.1 reads `on` as true"
        for job in workflow["jobs"].values():
            assert job["runs-on"]
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step)
                subprocess.run(["sh", "-n", "-c", step.get("run", "")], check=True)
    (gitlab,) = (d["lab"] for _, d in documents() if "lab" in d)
    for part in ("before_script", "script", "after_script"):
        for line in gitlab[part]:
            assert isinstance(line, str)
            subprocess.run(["sh", "-n", "-c", line], check=True)


def test_every_netorch_command_is_one() -> None:
    shown = [(page, words[1:]) for page, words in commands() if words[0] == "netorch" != words[-1]]
    assert {page for page, _ in shown} >= set(PAGES)
    for page, (name, *arguments) in shown:
        command = find(name)
        assert command is not None, f"{page}: netorch {name}"
        parsed(command, arguments)  # raises UsageError


def test_every_file_that_is_named_is_there() -> None:
    for page, words in commands():
        for word in words:
            if word.startswith(("scripts/", "topologies/", ".ci/")):
                assert (ROOT / word).exists(), f"{page}: {word}"
        if words[0].startswith(("scripts/", ".ci/")):
            assert os.access(ROOT / words[0], os.X_OK), f"{page}: {words[0]}"


def test_podman_knows_the_options() -> None:
    if not shutil.which("podman"):
        pytest.skip("not installed: podman (scripts/setup --tests)")
    helped = subprocess.run(["podman", "run", "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z-]+", helped.stdout))
    shown = [words[2:] for _, words in commands() if words[:2] == ["podman", "run"]]
    rows = re.findall(r"^\| `(--[^|]*)` \|", text("docs/containers.md"), re.MULTILINE)
    shown += [shlex.split(row.replace("`", " ").replace(",", " ")) for row in rows]
    assert len(shown) > 10
    for words in shown:
        options = {word for word in words if word.startswith("--")}
        assert options <= known, options - known
