"""What runs are called and which of their flags were changed, against settings and defaults known beforehand."""

from dataclasses import asdict
from pathlib import Path

import pytest

from dno.methods import METHODS, method_class
from dno.models.specs import DEFAULT_MODEL
from dno.report.flags import Label, Row, common_folder, labels_of, plain, rows_of
from dno.report.reading import Run


def run(name="a", method="dno", resolved=(), title="", **asked):
    """A run with these settings; resolved: what it became of them, and facts beside them."""
    defaults = asdict(method_class(method).settings_class()()) if method in METHODS else {}
    asked = {**defaults, "model": "sprites", **asked}
    args = {"method": method, "title": title or method, **asked, "num_steps": asked.get("num_steps") or 25}
    return Run(Path("/runs") / name, method, args | dict(resolved), asked, [0], [], None, [])


MODEL = Row("model", ["sprites"], DEFAULT_MODEL)


def test_what_was_changed_is_shown_as_it_was_asked():
    differing, changed, rest = rows_of(
        [run(lr=0.5, precision="fp32", resolved={"precision": "float32", "device": "cpu"})]
    )
    assert differing == []
    assert changed == [MODEL, Row("precision", ["fp32"], "auto"), Row("lr", ["0.5"], "0.01")]
    rest = {row.name: row.values for row in rest}
    assert rest["method"] == ["dno"] and rest["num_steps"] == ["25"] and rest["device"] == ["cpu"]
    assert rest["reward_paths"] == ["–"] and rest["gamma"] == ["0"]


def test_what_the_run_filled_in_is_no_change():
    """sprites has 25 steps of its own, and auto became float32 on this machine."""
    for asked in (None, 25):
        _, changed, _ = rows_of([run(num_steps=asked, resolved={"precision": "float32"}, output="elsewhere")])
        assert changed == [MODEL]
    _, changed, _ = rows_of([run(num_steps=10)])
    assert changed[1] == Row("num_steps", ["10"], "25")


def test_runs_differ_in_what_they_have():
    a, b = run("a", lr=0.5), run("b", lr=0.2, resolved={"versions": {"torch": "2"}, "weights": {"black": 1}})
    differing, changed, _ = rows_of([a, b])
    assert differing == [Row("lr", ["0.5", "0.2"], "0.01"), Row("versions", ["–", "torch 2"], "")]
    other = run("c", "best_of_n", num_candidates=8)
    differing, changed, _ = rows_of([a, other])
    assert [row.name for row in differing] == ["method"]
    assert Row("num_candidates", ["–", "8"], "64") in changed and Row("lr", ["0.5", "–"], "0.01") in changed


def test_a_method_that_is_unknown_here_has_no_defaults():
    differing, changed, rest = rows_of([run(method="other", steps=3)])
    assert (differing, changed) == ([], []) and Row("steps", ["3"], "") in rest


def test_labels():
    assert labels_of([run("a")]) == [Label("a")]
    assert labels_of([run("a", lr=0.5), run("b")]) == [Label("lr 0.5", "a"), Label("lr 0.01", "b")]
    assert labels_of([run("x/a"), run("y/a")]) == [Label("x/a"), Label("y/a")]
    three = [run("a", lr=0.5), run("b", "best_of_n", title="Best-of-N"), run("c", lr=0.2)]
    assert labels_of(three) == [Label("dno · lr 0.5", "a"), Label("Best-of-N", "b"), Label("dno · lr 0.2", "c")]
    assert labels_of([*three[:2], run("d", "best_of_n", title="Best-of-N")])[1:] == [
        Label("Best-of-N · b"), Label("Best-of-N · d")
    ]  # fmt: skip


def test_a_label_says_what_was_asked_of_the_machine():
    """Not what the machine made of it, and nothing if one of the runs does not know."""
    fp32 = run("a", precision="fp32", resolved={"precision": "float32"})
    auto = run("b", resolved={"precision": "bfloat16"})
    assert [label.words for label in labels_of([fp32, auto])] == ["precision fp32", "precision auto"]
    assert labels_of([auto, run("c", resolved={"precision": "float32"})]) == [Label("b"), Label("c")]
    old = run("d")
    del old.asked["precision"]
    assert labels_of([fp32, old]) == [Label("a"), Label("d")]


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "–"), ((), "–"), (True, "yes"), (0.0, "0"), (1e-05, "1e-05"), ("", ""),
     (["black", "white:2"], "black white:2"), (("a duck",), "a duck"),
     (["a duck", "ball"], '"a duck" ball'), ({"black": 1.0, "white": None}, "black 1, white –")],
)  # fmt: skip
def test_how_a_setting_is_written(value, words):
    assert plain(value) == words


def test_the_root_of_the_disk_is_no_common_folder(tmp_path):
    assert common_folder([tmp_path / "a", tmp_path / "b" / "c"]) == tmp_path
    assert common_folder([Path("/runs/a"), Path("/elsewhere/b")]) is None
