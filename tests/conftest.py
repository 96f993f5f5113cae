"""What all layers of tests share."""

import os
import signal
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

# Whoever was started in the background by a script ignores it, and so would all that is
# interrupted here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
_QUICK = {"kernel": 1, "engine": 2, "pure": 3}  # ever quicker than the other layers
_BEFORE = pytest.StashKey[dict[str, set[str]]]()


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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    """Before pytest-xdist starts its workers, which inherit the environment."""
    worker = _worker(session.config)
    if worker:  # it judges the processes of its own tests, and its controller those of all
        os.environ[untouched.TAG] += f"-{worker}"
    else:
        os.environ[untouched.TAG] = str(os.getpid())
        session.stash[_BEFORE] = untouched.machine()
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fails the session if the machine is not as it was (tests/untouched.py), once all workers have
    ended.
    """
    yield
    if _BEFORE not in session.stash:
        return
    untouched.await_ends(session.stash[_BEFORE], 30)
    left = untouched.differences(session.stash[_BEFORE], untouched.machine())
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.get_terminal_writer()
        reporter.line("\n".join(["FAILED: the tests changed the machine:", *left]), red=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What pytest-xdist's workers are given: the tests that share a fixture of their module as one
    piece, and what takes long first, so that no worker is left alone with it in the end.
    """
    if not _worker(config):
        return
    items.sort(key=lambda item: _QUICK.get(item.path.relative_to(TESTS).parts[0], 0))
    for item in items:
        assert isinstance(item, pytest.Function)
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == "module" for given in fixtures for fixture in given):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(TESTS))))


def _worker(config: pytest.Config) -> str:
    """The name of this worker of pytest-xdist; "" in a session without, and in its controller."""
    given: dict[str, str] = getattr(config, "workerinput", {})
    return given.get("workerid", "")
