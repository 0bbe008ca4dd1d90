"""The measured tables are made of results files, and what has no table is shown instead."""

from __future__ import annotations

import re
from dataclasses import replace

import contest
import families
import head
import measurement
import pytest
import report
import rows
import tables
import torch

TINY = ["--device", "cpu", "--tokens", "16", "--hidden", "24", "--vocab", "301", "--repeats", "1"]
PROVIDERS = ["fastpost token_stats", "fastpost fused_loss", "naive torch", "torch linear_cross_entropy", "quack"]


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch):
    monkeypatch.setattr("harness.COPIED_BYTES", {"cpu": 1 << 20})


def test_the_tables_of_a_page_come_from_the_file(tmp_path):
    output, readme = tmp_path / "cpu.jsonl", tmp_path / "README.md"
    contest.main(head.HEAD, [*TINY, "--providers", *PROVIDERS, "--output", str(output), "--cases", "logp"])
    readme.write_text("before\n<!-- table:head -->\nold 1.23\n<!-- /table -->\nafter\n")
    assert tables.main([str(output), "--page", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:head -->\n") and text.endswith("<!-- /table -->\nafter\n")
    assert "old 1.23" not in text and "T 16, D 24, V 301, bfloat16" in text
    assert "| | logp, W frozen (2 G) | logp, W trained (3 G) | worst logp error |" in text
    assert "| **fastpost token_stats** | " in text and "quack" not in text
    (counted,) = (line for line in text.splitlines() if line.startswith("| fastpost token_stats, counted |"))
    assert len(re.findall(r" \d+\.\d\d, \d+ flop/B \|", counted)) == 2
    assert tables.main([str(output), "--page", str(readme)]) == 0 and readme.read_text() == text
    readme.write_text("no marks")
    assert tables.main([str(output), "--page", str(readme)]) == 2


@pytest.mark.parametrize("bench", tables.TABLES)
def test_a_page_has_the_tables_of_the_committed_results(tmp_path, bench):
    now, page = tables.PAGES[bench].read_text(), tmp_path / "page.md"
    files = [file for file in sorted(contest.RESULTS.glob("*.jsonl")) if runs_of(file) == bench]
    page.write_text(emptied := tables.rewritten(now, bench, []))
    assert tables.main([*map(str, files), "--page", str(page)]) == 0
    assert emptied != page.read_text() == now, "run `make readme`"


def runs_of(file):
    return measurement.last_run(file)[0].setup.bench


def test_a_program_has_its_own_table_and_the_others_keep_theirs(tmp_path):
    output, readme = tmp_path / "families.jsonl", tmp_path / "README.md"
    options = ["--providers", "fastpost", "naive torch", "--cases", "dpo", "gkd", "--output", str(output)]
    contest.main(families.FAMILIES, [*TINY, *options])
    others = "<!-- table:head -->\nof the head\n<!-- /table -->\n"
    readme.write_text(f"{others}<!-- table:families -->\nold\n<!-- /table -->\n")
    assert tables.main([str(output), "--page", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"{others}<!-- table:families -->\n") and "old" not in text
    assert "| | **fastpost** | naive torch |\n" in text
    for row in ("dpo, W frozen (3 G)", "dpo, W trained (4 G)", "gkd, W frozen (3 G)", "gkd, W trained (4 G)"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} | "))
        assert len(re.findall(r"\d+\.\d\d(, \d+ MB)?, \de-\d\d", line)) == 2, line


def test_a_run_without_a_table_is_shown_and_leaves_the_page_as_it_was(tmp_path, capsys):
    output, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    assert rows.main([*TINY, "--tile", "6", "64", "--output", str(output)]) == 0
    readme.write_text(before := "<!-- table:head -->\nof the head\n<!-- /table -->\n")
    capsys.readouterr()
    assert tables.main([str(output), "--page", str(readme)]) == 0
    printed = capsys.readouterr().out
    assert readme.read_text() == before
    assert printed.startswith(f"{output}: no page has a table of 'rows', so none was changed")
    assert "fold, 6 x 64" in printed and "statistics" in printed


def test_the_runs_of_a_sweep_are_shown_as_its_lines(tmp_path, capsys):
    """Seconds that are 1e-3 and 1e-5 a token: the table has the slope."""
    setup = contest.Setup(contest.machine(torch.device("cpu")), "2026-01-01", "bfloat16", 8, 24, 301, 1, "sweep")
    one = measurement.Measurement(setup, "logp, W frozen", 2, "naive torch", "torch", None, "", "ok")
    found = [replace(one, setup=replace(setup, tokens=T), seconds=1e-3 + 1e-5 * T) for T in (8, 16, 32)]
    measurement.append(output := tmp_path / "sweep.jsonl", found)
    (readme := tmp_path / "README.md").write_text("no marks")
    assert tables.main([str(output), "--page", str(readme)]) == 0 and readme.read_text() == "no marks"
    printed = capsys.readouterr().out
    assert "no page has a table of 'sweep'" in printed
    assert "tokens 8 to 32" in printed and " 10.000 " in printed


def test_a_sweep_of_too_few_points_has_no_lines(capsys):
    report.show_growth([])
    assert "growth" in capsys.readouterr().out
