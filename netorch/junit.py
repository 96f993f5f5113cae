"""Verdicts as JUnit XML, which CI services read."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from netorch.expectations import Verdict

# What XML 1.0 can't hold, in whatever form.
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(lab: str, verdicts: Sequence[Verdict]) -> str:
    """One suite, called after the lab, with a test case for every verdict."""
    failures = sum(not verdict.ok for verdict in verdicts)
    numbers = {
        "tests": str(len(verdicts)),
        "failures": str(failures),
        "errors": "0",
        "skipped": "0",
        "time": f"{sum(verdict.seconds for verdict in verdicts):.3f}",
    }
    suites = xml.Element("testsuites")
    suite = xml.SubElement(suites, "testsuite", {"name": lab, **numbers})
    for verdict in verdicts:
        case = xml.SubElement(
            suite,
            "testcase",
            {"classname": lab, "name": _name(verdict), "time": f"{verdict.seconds:.3f}"},
        )
        if verdict.ok:
            xml.SubElement(case, "system-out").text = _clean(verdict.observed)
        else:
            failure = xml.SubElement(case, "failure", {"message": _clean(verdict.observed)})
            failure.text = _clean("\n".join(filter(None, (verdict.observed, verdict.because))))
    xml.indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{xml.tostring(suites, encoding="unicode")}\n'


def _name(verdict: Verdict) -> str:
    expect = verdict.question.expect
    words = [verdict.question.title]
    if not expect.reach:
        words.append("(must not)")
    if expect.seen_as:
        words.append(f"(seen as {expect.seen_as})")
    return _clean(" ".join(words))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
