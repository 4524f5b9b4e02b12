"""Every row that the data page shows is read, without `data.format`, as the page says."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distft.data.named_templates import use_template
from distft.data.prepare import prepare_data
from tests.data.rows import ALL, recipe_of, trained, write_rows

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = re.findall(r"^\| `(\{.*?\})` \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("row", "kind", "says"), ROWS, ids=[row[2:16] for row, _, _ in ROWS])
def test_a_row_of_the_page_is_read_as_it_says(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, kind: str, says: str
) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    chatting = copy.deepcopy(tokenizer)
    use_template(chatting, "chatml")
    file = write_rows(tmp_path / "rows.jsonl", [json.loads(row)])
    splits = prepare_data(recipe_of(f"data.name={file}", *ALL), chatting)
    told = trained(splits.train[0], chatting)
    if "Whales" in row:
        assert told.endswith("mammals.<|im_end|>")
    else:
        assert told == ("2<|im_end|>" if "1" in row else "Hello<|im_end|>")
    assert splits.inferred is not None
    assert ("conversation" in kind or kind == "the same") == (
        "conversation" in splits.inferred or "messages" in splits.inferred
    )


def test_the_page_has_a_row_of_each_format() -> None:
    assert len(ROWS) == 7
