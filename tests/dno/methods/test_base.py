"""The contract of methods: a small one gets files, resume, report, flags and sweeps for nothing.

A signal may come at any moment: nothing is lost, and the resumed run is the one that was never stopped.
"""

import json
import signal
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dno import UserError, align
from dno.__main__ import main, overview
from dno.methods import METHODS, method_class
from dno.methods.base import Iteration, Method, State
from dno.noise import keyed_generator
from dno.regularization import probability
from dno.resume import make_settings
from dno.runs.checkpoints import load_newest
from dno.settings import Group, setting
from dno.task import Loaded, Task

STEPS = 3


@dataclass(frozen=True)
class Walk(Group):
    title: ClassVar[str] = "walk"

    num_strides: int = setting(6, "how many strides are tried", basic="strides", least=1, metavar="N")
    stride: float = setting(0.3, "length of a stride", basic="length of a stride", above=0, metavar="X")

    def check(self):
        if self.stride > 1 and self.num_strides > 9:
            raise UserError("--stride is above 1 for more than 9 strides; lower one of them")


class Position(State):
    def __init__(self, noise):
        super().__init__(noise.shape[1])
        self.noise, self.strides = noise, [0] * noise.shape[1]

    def pack(self):
        tensors, values = super().pack()
        return {**tensors, "noise": self.noise}, {**values, "strides": self.strides}

    def unpack(self, tensors, values):
        super().unpack(tensors, values)
        self.noise, self.strides = tensors["noise"], values["strides"]


class Walker(Method):
    """z <- z + stride xi, whatever the reward. `between` is called in the middle of each change of state."""

    name, title, prefix = "walk", "Random walk", "Walk"
    groups, columns = (Walk,), {"distance": "distance walked"}
    presets: ClassVar[dict] = {"num_steps": STEPS}

    @staticmethod
    def between(step):
        pass

    @property
    def num_iterations(self):
        return self.settings.num_strides

    def describe(self):
        return {"walk": f"{self.settings.num_strides} strides of {self.settings.stride:g}"}

    def blank(self):
        return Position(torch.zeros(self.settings.num_steps + 1, *self.task.latent_shape))

    def start(self):
        return Position(self.task.draw())

    def iterations(self, state):
        task = self.task
        while state.step < self.num_iterations and (rows := state.active):
            noise = state.noise[:, rows]
            with torch.no_grad():
                images = task.render(noise.unbind(), rows)
            losses, rewards = task.losses_or_nan(images, rows)
            metrics = {"probability": probability(noise), "distance": torch.tensor([state.strides[b] for b in rows])}
            found = Iteration(rows, images, losses, rewards, noise, metrics, task.evaluate(images, rows))
            generator = keyed_generator(9, self.settings.seed, state.step)
            xi = torch.randn(noise.shape, generator=generator)
            with state.changing():
                state.noise[:, rows] = noise + self.settings.stride * xi
                self.between(state.step)
                for b in rows:
                    state.strides[b] += 1
            yield found


@pytest.fixture(autouse=True)
def walker(monkeypatch):
    monkeypatch.setitem(METHODS, "walk", (__name__, "Walker"))


@pytest.fixture
def walk(tiny_model, tmp_path):
    def walk(folder=None, **settings):
        folder = None if folder is None else tmp_path / folder
        settings = {"objective": "contrast", "draw": False, "batch_size": 2, **settings}
        return align(tiny_model, method="walk", folder=folder, **settings)

    return walk


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gb")} for line in lines]


def check_equal(a, b):
    assert lines_of(a.folder) == lines_of(b.folder)
    names = [sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*.png")) for run in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), name
    for name in ("images", "rewards", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.steps, a.stopped) == (b.steps, b.stopped)


# For nothing


def test_files_and_facts(walk):
    run = walk("run", draw=True, evaluate="white")
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {"args.json", "metrics.jsonl", "result.json", "initial.png", "best.png", "best_b1.png", "images/005_b1.png",
            "best_noise.safetensors", "evolution.png", "evolution.gif"} <= names  # fmt: skip
    args = json.loads((run.folder / "args.json").read_text())
    assert args["method"] == "walk" and args["settings"]["num_strides"] == 6
    for name, value in {"title": "Random walk", "result": "noise", "columns": {"distance": "distance walked"},
                        "iterations": 6, "num_steps": STEPS, "stride": 0.3}.items():  # fmt: skip
        assert args["resolved"][name] == value, name
    assert [line["distance"] for line in lines_of(run.folder)] == list(range(6))


@pytest.mark.parametrize("stop_at", [0, 2, 5])
def test_resume(walk, tiny_model, tmp_path, stop_at):
    def stop(metrics):
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    whole = walk("whole", checkpointing_steps=2)
    with pytest.raises(KeyboardInterrupt):
        walk("part", checkpointing_steps=2, callback=stop)
    check_equal(whole, align(tiny_model, resume=tmp_path / "part"))


def test_flags_and_their_checks(capsys, tiny_folder, tmp_path):
    for flag in ("-h", "--help_all"):
        with pytest.raises(SystemExit):
            main(["walk", flag])
        out = capsys.readouterr().out
        assert out.count("--stride") == 1 == out.count("--num_strides") and "--lr" not in out and "[0.3]" in out
    assert "  walk       Random walk" in overview()
    settings = ["--model", str(tiny_folder), "--output", str(tmp_path / "output")]
    for flags, words in (("--stride 2 --num_strides 10", "--stride is above 1"), ("--stride 0", "--stride is 0")):
        with pytest.raises(SystemExit) as end:
            main(["walk", *settings, *flags.split()])
        assert end.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(UserError, match="walk has no setting lr"):
        align(method="walk", lr=0.1)


def test_a_page_with_its_column(walk):
    from dno.report.page import main as report

    run = walk("run")
    report([str(run.folder)])
    page = (run.folder / "report.html").read_text()
    assert "Random walk" in page and "Distance walked" in page


def test_a_sweep(tmp_path, tiny_folder):
    from dno.sweep import sweep
    from dno.team import Team

    settings = {
        "model": str(tiny_folder), "objective": "contrast", "output": str(tmp_path), "num_strides": 2, "draw": False,
    }  # fmt: skip
    rows = sweep(method_class("walk"), settings, None, [0, 1], "Walk", Team())
    assert [row["seed"] for row in rows] == [0, 1] and all(row["iterations"] == 2 for row in rows)
    assert all(list(row["others"]) == ["contrast"] and row["probability"] > 0 for row in rows)


def test_presets_give_way_to_what_is_asked():
    assert make_settings(Walker, {}).num_steps == STEPS
    assert make_settings(Walker, {"num_steps": 7}).num_steps == 7


# The loop by itself


@pytest.fixture
def task(tiny_model):
    def task(**settings):
        settings = make_settings(
            Walker, {"model": tiny_model.name, "batch_size": 2, "objective": "contrast", **settings}
        )
        return Task(settings.resolve(), loaded=Loaded(tiny_model))

    return task


def test_leaving_the_loop_early_keeps_a_whole_state(task):
    def walked(count):
        method = Walker(task())
        state = method.start()
        for found in method.iterations(state):
            assert state.whole and found.rows == [0, 1]
            if state.step == count:
                break
        return state

    state = walked(4)
    assert state.step == 4 and state.strides == [4, 4]
    earlier, method = walked(2), Walker(task())
    tensors, values = earlier.pack()
    later = method.blank()
    later.unpack(tensors, json.loads(json.dumps(values)))
    for _ in method.iterations(later):
        if later.step == 4:
            break
    assert torch.equal(later.noise, state.noise) and later.strides == state.strides


def test_a_state_packed_and_unpacked():
    state = State(3)
    state.step, state.failed = 7, True
    state.stop(1, "enough")
    state.stop(1, "too much")
    tensors, values = state.pack()
    other = State(3)
    other.unpack(tensors, json.loads(json.dumps(values)))
    assert other.step == 7 and other.stopped == [None, "enough", None] and other.active == [0, 2] and other.whole
    other.retry()
    assert other.active == [0, 1, 2]


def test_a_state_is_not_whole_while_it_changes_nor_after_a_change_that_failed():
    state = State(1)
    with state.changing():
        assert not state.whole and state.step == 0
    assert state.whole and state.step == 1
    with pytest.raises(ZeroDivisionError), state.changing():
        _ = 1 / 0
    assert not state.whole and state.step == 1


def test_a_change_that_failed_is_not_saved(walk, tiny_model, monkeypatch, tmp_path):
    def fail(step):
        if step == 3:
            raise RuntimeError("half way")

    whole = walk("whole")
    monkeypatch.setattr(Walker, "between", staticmethod(fail))
    with pytest.raises(RuntimeError, match="half way") as error:
        walk("part", checkpointing_steps=2)
    assert len(error.value.result.metrics) == 3 and load_newest(tmp_path / "part").step == 2
    monkeypatch.undo()
    monkeypatch.setitem(METHODS, "walk", (__name__, "Walker"))
    check_equal(whole, align(tiny_model, resume=tmp_path / "part"))


# Signals


class Screen:
    """A screen that calls `during` in the middle of the recording of an iteration."""

    folder = None

    def __init__(self, during):
        self.during = during

    def begin(self, about, rows, done=0):
        pass

    def iteration(self, metrics, best):
        self.during(metrics["step"])

    def end(self, result):
        pass

    def close(self):
        pass


@pytest.fixture
def terminated():
    """SIGTERM raises, as on the command line."""

    def handler(number, frame):
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


def calling(during):
    """A reward as `contrast`'s, that calls `during` with the number of its call."""

    def factory(inference_dtype=None, device=None):
        count = iter(range(10**6))

        def loss_fn(images, prompts):
            during(next(count))
            return -images.std(dim=(1, 2, 3))

        return loss_fn

    factory.differentiable = False
    return factory


WHEN = {"reward": 3, "change": 4, "record": 4, "callback": 4}  # iterations that are done when the run has ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("when", WHEN)
def test_a_signal_loses_nothing(walk, tiny_model, tmp_path, monkeypatch, terminated, when, number):
    import rewards

    armed = []

    def at(place, step):
        if armed and place == when and step == 3:
            armed.pop()
            signal.raise_signal(number)

    monkeypatch.setattr(Walker, "between", staticmethod(lambda step: at("change", step)))
    monkeypatch.setitem(rewards.RFUNCTIONS, "calling", calling(lambda step: at("reward", step)))

    def settings():
        return {
            "objective": "calling", "screen": Screen(lambda step: at("record", step)), "checkpointing_steps": 99,
            "callback": lambda metrics: at("callback", metrics["step"]),
        }  # fmt: skip

    whole = walk("whole", **settings())
    armed.append(True)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as error:
        walk("part", **settings())
    assert not armed and handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    done = WHEN[when]
    assert len(lines_of(tmp_path / "part")) == len(error.value.result.metrics) == done
    assert load_newest(tmp_path / "part").step == done
    check_equal(whole, align(tiny_model, resume=tmp_path / "part"))


@pytest.mark.parametrize("settings", [{"opt_steps": 4}, {"opt_steps": 4, "weight_decay": 0.1, "opt_time": 2}], ids=str)
def test_a_signal_between_the_updates_of_two_images(tiny_model, tmp_path, settings):
    """DNO's own change of state: image 0 has moved, image 1 has not."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    settings = {"num_steps": STEPS, "objective": "contrast", "batch_size": 2, "draw": False, **settings}
    whole, calls = align(tiny_model, folder=tmp_path / "whole", **settings), iter(range(100))
    hook = register_optimizer_step_post_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if next(calls) == 4 else None
    )
    with pytest.raises(KeyboardInterrupt):
        align(tiny_model, folder=tmp_path / "part", **settings)
    hook.remove()
    assert next(calls) == 6, "the update of image 1 was waited for"
    assert load_newest(tmp_path / "part").step == 3 == len(lines_of(tmp_path / "part"))
    check_equal(whole, align(tiny_model, resume=tmp_path / "part"))


def test_the_first_of_several_signals_counts(walk, terminated):
    def both(step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        walk("run", screen=Screen(both))


def test_a_signal_that_is_ignored_stays_ignored(walk):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = walk("run", screen=Screen(lambda step: signal.raise_signal(signal.SIGINT)))
        assert len(run.metrics) == 6 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread_needs_no_signals(walk):
    found = []
    thread = threading.Thread(target=lambda: found.append(walk("run")))
    thread.start()
    thread.join()
    assert len(found[0].metrics) == 6
