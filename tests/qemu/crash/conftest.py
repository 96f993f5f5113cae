"""Every body runs in network namespaces of its own (tests/isolation.py)."""

import pytest

from tests import isolation
from tests.whole_labs import lab_machine as lab_machine


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    isolation.run(pyfuncitem)
    return True
