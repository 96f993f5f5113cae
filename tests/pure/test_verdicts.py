"""Verdicts as lines, JSON and JUnit XML."""

from xml.etree import ElementTree as xml

import pytest

from netorch import report
from netorch.expectations import Far, Question, Verdict
from netorch.junit import document
from netorch.model import Expect


def verdict(ok: bool, observed: str, because: str = "", **keys: object) -> Verdict:
    expect = Expect(**{"from_": "vm1", "to": "server", **keys})  # type: ignore[arg-type]
    question = Question(expect=expect, source="vm1", kind="ping", detail="", far=Far())
    return Verdict(question=question, ok=ok, observed=observed, seconds=0.25, because=because)


VERDICTS = [
    verdict(True, "0.8 ms, seen as 10.0.0.1", seen_as="10.0.0.1"),
    verdict(True, "no answer in 2 s; this machine gets there: 0.1 ms", reach=False, by="tcp:22"),
    verdict(False, "no answer in 10 s", "tap vm1-0 is down\nlink: set it up"),
]


def test_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    report.verdicts_text("lab", VERDICTS)
    assert capsys.readouterr().out == (
        "ok   vm1 -> server ping: 0.8 ms, seen as 10.0.0.1\n"
        "ok   vm1 -> server tcp:22 (must not): "
        "no answer in 2 s; this machine gets there: 0.1 ms\n"
        "FAIL vm1 -> server ping: no answer in 10 s\n"
        "     tap vm1-0 is down\n"
        "     link: set it up\n"
        "lab lab: 1 of 3 expectations are not met\n"
    )


def test_nothing_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    report.verdicts_text("lab", [])
    assert capsys.readouterr().out == "lab lab expects nothing: its file has no [[expect]]\n"


def test_json() -> None:
    rows = report.verdicts_json(VERDICTS)
    assert rows[0] == {
        "from": "vm1",
        "to": "server",
        "by": "ping",
        "reach": True,
        "seen_as": "10.0.0.1",
        "ok": True,
        "observed": "0.8 ms, seen as 10.0.0.1",
        "because": "",
        "seconds": 0.25,
    }


def test_junit() -> None:
    (suite,) = xml.fromstring(document("lab", VERDICTS))
    assert suite.attrib == {
        "name": "lab",
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "0",
        "time": "0.750",
    }
    assert [case.get("name") for case in suite] == [
        "vm1 -> server ping (seen as 10.0.0.1)",
        "vm1 -> server tcp:22 (must not)",
        "vm1 -> server ping",
    ]
    failure = suite[2].find("failure")
    assert failure is not None
    assert failure.get("message") == "no answer in 10 s"
    assert failure.text == "no answer in 10 s\ntap vm1-0 is down\nlink: set it up"


def test_junit_is_xml_whatever_was_observed() -> None:
    odd = verdict(False, "\x1b[31m<&\0\ud800>", "\x07")
    assert xml.fromstring(document("lab", [odd]).encode())[0][0][0].get("message")


def test_a_verdict_survives_json() -> None:
    import msgspec

    assert msgspec.json.decode(msgspec.json.encode(VERDICTS), type=list[Verdict]) == VERDICTS
