"""What the README says of speed is what was measured last."""

import json

from bench import goals, summary


def test_the_readmes_table_is_that_of_the_results() -> None:
    text = (summary.ROOT / "README.md").read_text()
    results = json.loads(summary.RESULTS.read_text())
    assert summary.readme(text, results) == text
    assert "| a guest, to its address |" in text


def test_a_missed_goal_is_in_what_is_left() -> None:
    """Each one stands in docs/performance.md, by the words of the table, with what explains it."""
    results = json.loads(summary.RESULTS.read_text())
    found = goals.figures(results)
    missed = [goal.what for goal in goals.goals(found) if not goal.reached]
    explained = (summary.ROOT / "docs" / "performance.md").read_text().partition("## What is left")
    assert [what for what in missed if what not in explained[2]] == []
    lines = (summary.RESULTS.parent / "results.md").read_text().splitlines()
    assert set(goals.table(found)) <= set(lines)
