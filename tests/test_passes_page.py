"""`docs/passes.md`: its code runs, prints what stands below it, and its table says what the passes declare."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from gpd_fx import passes
from gpd_fx.rules import RULES, rule_of

PAGE = (Path(__file__).parents[1] / "docs" / "passes.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


def test_all_code_runs_and_prints_what_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) > 8
    names: dict[str, object] = {"__name__": "page"}
    try:
        for code, expected in blocks:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "docs/passes.md", "exec"), names)
            assert [line.rstrip() for line in printed.getvalue().splitlines()] == expected.splitlines(), code
    finally:
        RULES.pop("mine.gain.default", None)
        rule_of.cache_clear()


def test_the_table_says_what_the_passes_declare() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\w+) \| (.*) \|$", PAGE, re.MULTILINE)
    made = {
        name: kind for name, kind in vars(passes).items() if isinstance(kind, type) and issubclass(kind, passes.Pass)
    }
    assert {name for name, _, _ in rows} == made.keys() - {"Pass", "Pipeline"}
    for name, parameters, function in rows:
        assert made[name].parameters == parameters, name
        assert made[name].changes_function == (function != "the same"), name
