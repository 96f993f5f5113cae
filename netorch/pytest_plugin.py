"""The pytest plugin: labs as fixtures (docs/pytest.md).

pytest loads this module for everybody who has netorch installed, so it imports nothing of it until
a test asks for a lab. Then the starter of agents is begun while pytest still collects.
"""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from netorch.api import Lab, Text
    from netorch.capture import Capture
    from netorch.wire import Uplink

Scope = Literal["session", "package", "module", "class", "function"]

_CONSOLE_LINES = 40
_fixtures = {"lab", "make_lab"}
_made: list[str] = []  # where lab_fixture was called
_recorders = pytest.StashKey[dict["Lab", dict[str, "Capture"]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "netorch_capture",
        "record what passes the networks of all labs, for the reports of failed tests",
        type="bool",
        default=False,
    )
    parser.addini(
        "netorch_missing",
        "what becomes of tests whose labs this machine can't have: skip or fail",
        default="skip",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "lab(topology, capture=None, uplink=None): the lab that the fixture `lab` brings up: "
        "a path, TOML text or a netorch.Topology",
    )
    config.addinivalue_line(
        "markers",
        "needs_netorch(*what): skip, with the reason, where this machine lacks one of: "
        "userns, tun, nft, qemu, or a program by its name",
    )
    config.stash[_recorders] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    items = session.items
    if _made or any(_fixtures.intersection(getattr(item, "fixturenames", ())) for item in items):
        from netorch import starter

        starter.warm()


def pytest_unconfigure() -> None:
    if "netorch.starter" in sys.modules:
        sys.modules["netorch.starter"].finish()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_netorch"):
        from netorch import needs

        for what in marker.args:
            if reason := needs.missing(what):
                _cannot(item.config, reason)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.when != "teardown":
        for lab in _labs_of(item):
            report.sections += _sections(item, lab)
    return report


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator["Lab"]:
    """The lab of `@pytest.mark.lab(...)`, or of the module's LAB: up during the test."""
    marker = request.node.get_closest_marker("lab")
    options: dict[str, Any] = dict(marker.kwargs) if marker else {}
    topology = marker.args[0] if marker and marker.args else options.pop("topology", None)
    if topology is None:
        topology = getattr(request.module, "LAB", None)
    if topology is None:
        raise pytest.UsageError(
            "the fixture `lab` has no topology: mark the test with @pytest.mark.lab(...), "
            "or set LAB in its module"
        )
    with _running(request, topology, request.path.parent, **options) as running:
        yield running


class LabMaker:
    """Makes labs for one test."""

    def __init__(self, request: pytest.FixtureRequest, stack: ExitStack) -> None:
        self._request = request
        self._stack = stack
        self.labs: list[Lab] = []

    def __call__(
        self, topology: "Text", *, capture: bool | None = None, uplink: "Uplink | None" = None
    ) -> "Lab":
        """A lab that is up until the test ends."""
        base = self._request.path.parent
        running = _running(self._request, topology, base, capture=capture, uplink=uplink)
        self.labs.append(self._stack.enter_context(running))
        return self.labs[-1]


@pytest.fixture
def make_lab(request: pytest.FixtureRequest) -> Iterator[LabMaker]:
    """`make_lab(topology)` brings up a lab for the rest of the test; as many as are asked for."""
    with ExitStack() as stack:
        yield LabMaker(request, stack)


def lab_fixture(
    topology: "Text",
    *,
    scope: Scope = "module",
    name: str | None = None,
    capture: bool | None = None,
    uplink: "Uplink | None" = None,
) -> Any:
    """A fixture: `lan = lab_fixture("lan.toml", scope="module")` in a test module or conftest.py.

    Paths begin at the file in which this is called. Tests of the scope share the lab.
    """
    base = Path(sys._getframe(1).f_globals["__file__"]).parent

    def of_this_topology(request: pytest.FixtureRequest) -> Iterator["Lab"]:
        with _running(request, topology, base, capture=capture, uplink=uplink) as running:
            yield running

    _made.append(str(base))
    return pytest.fixture(scope=scope, name=name)(of_this_topology)


@contextmanager
def _running(
    request: pytest.FixtureRequest,
    topology: "Text",
    base: Path,
    *,
    capture: bool | None = None,
    uplink: "Uplink | None" = None,
) -> Iterator["Lab"]:
    from netorch.api import Lab
    from netorch.errors import MissingError

    lab = Lab(topology, base=base, uplink=uplink)
    if lab.topology.guests or lab.topology.taps:
        _require(request.config, lab)
    try:
        lab.start()
    except MissingError as error:
        _cannot(request.config, f"{error.message} ({error.hint})" if error.hint else error.message)
    known = request.config.stash[_recorders]
    with ExitStack() as stack:
        stack.callback(lab.close)
        if request.config.getini("netorch_capture") if capture is None else capture:
            networks = lab.topology.networks
            known[lab] = {name: stack.enter_context(lab.recorder(name)) for name in networks}
            stack.callback(known.pop, lab)
        yield lab


def _require(config: pytest.Config, lab: "Lab") -> None:
    from netorch import needs

    for what in needs.of(lab.topology):
        if reason := needs.missing(what):
            _cannot(config, reason)


def _cannot(config: pytest.Config, reason: str) -> None:
    if config.getini("netorch_missing") == "fail":
        pytest.fail(f"this machine can't have the lab: {reason}", pytrace=False)
    pytest.skip(reason)


def _labs_of(item: pytest.Item) -> list["Lab"]:
    """The labs that are up for a test."""
    if "netorch.api" not in sys.modules:
        return []
    from netorch.api import Lab

    values = list(getattr(item, "funcargs", {}).values())
    made = [lab for maker in values if isinstance(maker, LabMaker) for lab in maker.labs]
    return [lab for lab in (*values, *made) if isinstance(lab, Lab) and lab.is_up]


def _sections(item: pytest.Item, lab: "Lab") -> list[tuple[str, str]]:
    """What a failed test's report says of a lab."""
    from netorch.errors import NetorchError

    try:
        found = lab.sections()
        for name in lab.topology.guests:
            lines = lab.guest(name).console_log().splitlines()[-_CONSOLE_LINES:]
            found.append((f"console of {name}", "\n".join(lines)))
    except NetorchError as error:
        return [(f"lab {lab.name}", str(error))]
    recorders = item.config.stash[_recorders].get(lab, {})
    if recorders:
        directory = _directory(item)
        found.append(("captured", "\n".join(_saved(directory, *one) for one in recorders.items())))
    return found


def _saved(directory: Path, network: str, recorder: "Capture") -> str:
    path = recorder.save(directory / f"{network}.pcap")
    more = f", {recorder.dropped} more were not kept" if recorder.dropped else ""
    return f"{path} ({recorder.count} frames{more})"


def _directory(item: pytest.Item) -> Path:
    """One that pytest keeps for a while, as it keeps tmp_path."""
    factory: Callable[..., Path] = item.config._tmp_path_factory.mktemp  # type: ignore[attr-defined]
    cleaned = "".join(c if c.isalnum() else "_" for c in item.name)[:30]
    return factory(f"netorch-{cleaned}", numbered=True)
