"""What all layers of tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import untouched

# No time limit for an example: two cores are shared with guests. In CI the examples are the same
# every time, so that what fails there fails for whoever looks into it.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the golden files; review their diff"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Hold a text against the file that says what it should be, or write that file anew."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path} says otherwise; see --update-golden"

    return compare


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Fails the session if the machine is not as it was (tests/untouched.py)."""
    os.environ[untouched.TAG] = str(os.getpid())
    before = untouched.machine()
    yield
    left = untouched.differences(before, untouched.machine())
    if left:
        pytest.fail("the tests changed the machine:\n" + "\n".join(left), pytrace=False)
