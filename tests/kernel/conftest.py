"""Tests against the real kernel: every body runs in a network namespace of its own
(tests/isolation.py).
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.system.processes import end_all
from netorch.system.scope import Scope, current_place
from tests import isolation
from tests.whole_labs import lab_machine as lab_machine


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    isolation.run(pyfuncitem)
    return True


@pytest.fixture
def scope(tmp_path: Path) -> Callable[..., Scope]:
    """Makes the Scope of a lab; to be called in the test's body, which is where the place is
    known. The lab's processes are ended with the body.
    """

    def make(lab: str = "t", *, private: bool = False) -> Scope:
        run = tmp_path / "run" / lab
        run.mkdir(parents=True, exist_ok=True)
        made = Scope(
            lab=lab, place=current_place(), private=private, run=run, disks=tmp_path / "disks"
        )
        isolation.at_end(lambda: end_all(made))
        return made

    return make
