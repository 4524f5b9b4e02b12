"""Reports on the logs of other programs, alone and together with runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser

from .conftest import CELLS, command, opened, report


def test_the_log_of_any_trainer_gets_a_page(browser: Browser, tmp_path: Path) -> None:
    history = [
        {"step": step, "epoch": step / 10, "loss": 2 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
        for step in range(1, 9)
    ]
    history.append({"step": 8, "eval_loss": 1.0, "eval_runtime": 3.0})
    history.append({"step": 8, "train_runtime": 12.5, "train_samples_per_second": 6.4, "train_loss": 0.7})
    history[-2] |= {"eval_accuracy": 0.75}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 8}))
    (tmp_path / "bare.json").write_text(json.dumps([{"step": "4", "eval_loss": 0.5}, *history]))
    report(tmp_path, "trainer_state.json", "bare.json", "--output", "log.html")
    page, problems = opened(browser, tmp_path / "log.html")
    assert problems == [] and page.title() == f"{tmp_path.name} and bare"
    keys = {figure.get_attribute("id").removeprefix("chart-") for figure in page.query_selector_all("figure")}
    assert keys == {"loss_step", "learning_rate", "eval_loss", "eval_perplexity", "eval_accuracy"}
    drawn = page.eval_on_selector_all("#chart-eval_perplexity tbody tr", CELLS)
    e_to_the_loss = [[tmp_path.name, "8", "2.71828"], ["bare", "4", "1.64872"], ["bare", "8", "2.71828"]]
    assert drawn == e_to_the_loss
    rows = page.locator("section[aria-labelledby=logs] tr")
    heads, values = (rows.nth(n).locator("th, td").all_text_contents() for n in (0, 2))
    assert dict(zip(heads, values, strict=True)) == {
        "log": "bare",
        "steps": "8",
        "last train loss": "0.2500",
        "mean train loss": "0.7000",
        "best eval loss": "0.5000",
        "last eval loss": "1.0000",
        "last perplexity": "2.72",
        "train time, s": "12.5",
        "samples/s": "6.40",
        "last eval accuracy": "0.7500",
    }
    record = json.loads((tmp_path / "log.json").read_text())
    assert [log["name"] for log in record["logs"]] == [tmp_path.name, "bare"]
    assert record["logs"][1]["figures"]["best_eval_loss"] == 0.5
    report(tmp_path, "trainer_state.json")
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 8, (
        "a report does not replace what it was made from"
    )
    assert (tmp_path / "trainer_state.html").is_file()
    report(tmp_path, "trainer_state.json", "--output", "one.md")
    assert (tmp_path / "one.md").read_text().startswith(f"# {tmp_path.name}\n\n## Logs\n")
    (tmp_path / "no.json").write_text('{"a": 1}')
    done = command(tmp_path, "no.json")
    assert done.returncode == 2 and "has no log_history" in done.stderr


def test_faulty_logs_are_reported(tmp_path: Path) -> None:
    for text, message in (
        ("[]", "has an empty log_history"),
        ('[{"loss": 2.5, "epoch": 1}]', "log.json cannot be drawn: none of its 1 record has a whole number as step"),
        ("", "is not readable JSON"),
    ):
        (tmp_path / "log.json").write_text(text)
        done = command(tmp_path, "log.json")
        assert done.returncode == 2 and message in done.stderr
    (tmp_path / "log.json").write_text(
        '[{"step": "1", "loss": NaN}, {"step": 2, "loss": "2.5"}, {"step": 3, "loss": Infinity}, {"loss": 1}, 7]'
    )
    assert command(tmp_path, "log.json", "--output", "page.html").stdout == "report: page.html, page.md, page.json\n"
    for kind in ("html", "md"):
        text = (tmp_path / f"page.{kind}").read_text()
        text = re.sub("`|</?code>", "", text)
        assert "log: charts leave out 2 values that are NaN or infinite." in text
        assert "log diverged from step 3: loss is not finite from step 3 on." in text
        assert "log: left out 2 records without a whole number as step." in text
    (log,) = json.loads(command(tmp_path, "log.json", "--json").stdout)["logs"]
    assert (log["figures"], log["unread"], log["infinite"]) == ({"steps": 3, "last_train_loss": "Infinity"}, 2, 2)


def test_folders_of_other_programs_and_files_next_to_runs(made: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(next(made.glob("sharded*")), runs / "sharded")
    (runs / "logs").mkdir()
    for step in (9, 10):
        state = runs / "theirs" / f"checkpoint-{step}" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    for name in ("x.html", "x.md", "x.json"):
        (runs / name).write_text('{"verdict": ""}')
    words = sorted(str(path.relative_to(tmp_path)) for path in runs.iterdir())
    done = command(tmp_path, *words, "--json")
    record = json.loads(done.stdout)
    assert [run["name"] for run in record["runs"]] == ["sharded"]
    assert [(log["name"], log["figures"]["steps"]) for log in record["logs"]] == [("theirs/checkpoint-10", 10)]
    assert done.stderr.count("distft: skipped: ") == 4 and "skipped: runs/x.json has no log_history" in done.stderr
    assert "# 1 run\n" in (both := command(tmp_path, *words).stdout) and "## Logs" in both
    assert command(tmp_path, "runs/logs").returncode == 2
    missing = command(tmp_path, "runs/sharded", "runs/typo")
    assert missing.returncode == 2 and "runs/typo" in missing.stderr
    (tmp_path / "page.md").write_text("# Mine\n")
    done = command(tmp_path, "runs/sharded", "--output", "page.html")
    assert done.stdout == "report: page.html, page.json\n" and "page.md is not a distft report" in done.stderr
    assert command(tmp_path, "runs/sharded", "--output", "page.html").stdout == done.stdout, "its own files it replaces"
    assert (tmp_path / "page.md").read_text() == "# Mine\n"
