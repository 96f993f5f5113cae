"""Whole labs: every test body runs in namespaces of its own and leaves nothing there (lab.py)."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from netorch.system.tiny import tiny_image
from tests import isolation
from tests.qemu.labs.lab import Machine

_PROGRAMS = ("qemu-system-x86_64", "qemu-img", "dnsmasq", "busybox", "nft")


@pytest.fixture(scope="session", autouse=True)
def _tiny() -> None:
    """Built before the first test goes where there is no network."""
    for program in _PROGRAMS:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    tiny_image(print)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    body = pyfuncitem.obj

    def on_the_machine(**arguments: Any) -> None:
        isolation.require_tun()
        with arguments["machine"]:
            body(**arguments)

    pyfuncitem.obj = on_the_machine
    isolation.run(pyfuncitem)
    return True
