"""Whole labs: every test body runs in namespaces of its own and leaves nothing there (lab.py)."""

from pathlib import Path
from typing import Any

import pytest

from tests import isolation
from tests.qemu.labs.lab import Machine


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
