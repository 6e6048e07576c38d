"""The paper's table with stub rewards and a tiny model: numbers, resume, and what is missing."""

import json
import re
import sys
from pathlib import Path

import pytest

from dno.errors import UserError

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import paper_table  # noqa: E402

STUBS = """
def left_loss_fn(inference_dtype=None, device=None):
    return lambda images, prompts: -images[..., :4].mean(dim=(1, 2, 3))

def right_loss_fn(inference_dtype=None, device=None):
    return lambda images, prompts: -images[..., -4:].mean(dim=(1, 2, 3))
"""


@pytest.fixture
def flags(tiny_folder, tmp_path):
    """Two stub rewards, two prompts, and little time."""
    stubs, prompts = tmp_path / "stubs.py", tmp_path / "prompts.txt"
    stubs.write_text(STUBS)
    prompts.write_text("cat\n\ndog\ncat\nhorse\n")
    return [
        "--model", str(tiny_folder), "--objectives", f"{stubs}:left_loss_fn", f"{stubs}:right_loss_fn",
        "--evaluate", "black", "--minutes", "0.002", "0.004", "--prompts", str(prompts), "--limit", "2",
        "--num_steps", "2", "--lr", "0.05", "--output", str(tmp_path / "out"),
    ]  # fmt: skip


def cells(text):
    """The table's rows by what was optimized and when: numbers and the count of prompts."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return rows[0], {(row[0], row[1]): row[2:] for row in rows[2:]}


def mean(cell):
    return float(re.match(r"\**(-?[\d.]+)", cell)[1])


def test_the_list_is_that_of_the_paper():
    assert len(set(paper_table.ANIMALS)) == 45
    assert paper_table.ANIMALS[0] == "cat" and paper_table.ANIMALS[-1] == "kangaroo"
    args = paper_table.parse([])
    assert (args.objectives, args.minutes) == (["aesthetic", "hps", "pick"], [1, 3, 5])
    assert paper_table.prompts_of(paper_table.parse(["--limit", "3"])) == ["cat", "dog", "horse"]


def test_the_table_has_start_and_times_and_a_second_start_makes_nothing(flags, tmp_path):
    assert paper_table.main(flags) == 4  # two rewards x two prompts
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    header, rows = cells(text)
    assert header[2:5] == ["left", "right", "black"]
    assert set(rows) == {("none", "start"), *((r, t) for r in ("left", "right") for t in ("0.002 min", "0.004 min"))}
    assert all(row[-1] == "2" for row in rows.values())
    for column, name in enumerate(("left", "right")):
        start, early, late = (mean(rows[key][column]) for key in
                              (("none", "start"), (name, "0.002 min"), (name, "0.004 min")))  # fmt: skip
        assert start <= early <= late, "the best so far"
        assert rows[name, "0.004 min"][column].startswith("**") and "±" in rows[name, "0.004 min"][column]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.jsonl")}
    assert len(before) == 4
    assert paper_table.main(flags) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == text


def test_a_run_that_was_cut_short_is_resumed(flags, tmp_path, monkeypatch):
    flags[flags.index("--minutes") + 1 : flags.index("--prompts")] = ["0.1"]
    flags[flags.index("--limit") + 1] = "1"
    del flags[flags.index("--objectives") + 2]  # one reward

    def cut(metrics):
        raise KeyboardInterrupt

    run_all = paper_table.run_all
    monkeypatch.setattr(paper_table, "run_all", lambda *sweep, callback: run_all(*sweep, callback=cut))
    with pytest.raises(KeyboardInterrupt):
        paper_table.main(flags)
    (metrics,) = (tmp_path / "out").rglob("metrics.jsonl")
    begun = metrics.read_text().splitlines()
    assert len(begun) == 1

    monkeypatch.setattr(paper_table, "run_all", run_all)
    assert paper_table.main(flags) == 1
    lines = metrics.read_text().splitlines()
    assert lines[:1] == begun and len(lines) > 1


def test_the_reward_of_a_time_is_the_best_that_was_known_by_then(tmp_path):
    found = [(0.5, 1.0, 9.0), (0.5, 3.0, 8.0), (0.5, None, 7.5), (0.5, 2.0, 7.0), (0.5, 4.0, 6.0)]
    lines = [json.dumps({"step": i, "seconds": s, "pick": a, "hps": b}) for i, (s, a, b) in enumerate(found)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    read = paper_table.read(tmp_path, "pick", [0.1, 0.5, 1.2, 2.0, 60])
    assert [line["step"] for line in read] == [0, 0, 0, 1, 1, 4]
    assert read[-1]["hps"] == 6.0, "held out, on the same image"


def test_a_cell_is_mean_and_standard_error():
    assert paper_table._cell([1.0, 3.0, None]) == "2.0000 ± 1.0000"
    assert paper_table._cell([2.0]) == "2.0000" and paper_table._cell([]) == "-"


def test_missing_weights_are_one_line_before_anything_starts(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ["--model", str(tiny_folder), "--objectives", "black", "hps", "--output", str(tmp_path)]
    with pytest.raises(UserError) as raised:
        paper_table.main([*flags, "--hps_path", str(tmp_path / "nowhere.pt")])
    assert "hps" in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("flags", [["--prompts", "no/such/x"], ["--model", "no/such/x"]])
def test_a_wrong_path_is_one_line(tmp_path, flags):
    with pytest.raises(UserError, match="no/such/x"):
        paper_table.main(["--objectives", "black", "--output", str(tmp_path), *flags])


def test_wrong_numbers_are_refused():
    for flags in (["--minutes", "0"], ["--limit", "0"]):
        with pytest.raises(SystemExit):
            paper_table.parse(flags)
