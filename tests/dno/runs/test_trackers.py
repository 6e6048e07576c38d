import sys
import types
import warnings

import pytest
import torch

from dno import align
from dno.errors import UserError
from dno.resume import prepare
from dno.runs.trackers import Trackers

METRICS = {"step": 0, "reward": 0.5, "rewards": [0.5], "probability": float("nan"), "images": [{}]}


def test_tensorboard_gets_metrics_and_every_kth_image(tiny_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = align(
        model=str(tiny_folder), num_steps=3, opt_steps=5, output=str(tmp_path), report_to="tensorboard",
        report_images_every=2, batch_size=2,
    )  # fmt: skip
    events = accumulator.EventAccumulator(str(result.folder / "trackers" / "dno"), size_guidance={"images": 0})
    events.Reload()
    rewards = [event.value for event in events.Scalars("reward")]
    assert rewards == pytest.approx([metrics["reward"] for metrics in result.metrics])
    assert [event.step for event in events.Images("images")] == [0, 2, 4]


class Broken:
    name = "wandb"
    requires_logging_directory = False
    calls, configs = [], []

    def __init__(self, *args):
        pass

    def start(self):
        pass

    def store_init_configuration(self, config):
        self.configs.append(config)

    def log(self, values, step=None):
        self.calls.append((values, step))
        raise ConnectionError("no network")

    def log_images(self, *args, **kwargs):
        self.calls.append("images")

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def broken(monkeypatch):
    from accelerate import tracking

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = types.SimpleNamespace()
    Broken.calls, Broken.configs = [], []


def test_a_tracker_that_fails_is_one_warning_and_the_run_continues(broken, tiny_folder, tmp_path):
    with pytest.warns(UserWarning) as seen:
        result = align(model=str(tiny_folder), num_steps=3, opt_steps=4, output=str(tmp_path), report_to=("wandb",))
    assert len(result.metrics) == 4 and len(Broken.calls) == 1
    messages = [str(w.message) for w in seen if "tracker" in str(w.message)]
    assert messages == ["the tracker wandb failed and is left out: ConnectionError: no network"]


def test_only_finite_numbers_are_sent(broken):
    trackers = Trackers(("wandb",), None, {"objective": ("black",)})
    with pytest.warns(UserWarning):
        trackers.log(METRICS, torch.zeros(1, 3, 4, 4))
    assert Broken.calls == [({"reward": 0.5}, 0)]


def test_settings_and_what_they_resolved_to_are_sent_as_one_flat_dict(broken):
    config = {
        "resolved": {"lr": 0.01, "size": (64, 64), "precision": "float32", "weights": {"black": 1.0}},
        "method": "dno", "settings": {"precision": "auto", "patience": None, "gamma": 1.0, "compile": False},
    }  # fmt: skip
    Trackers(("wandb",), None, config)
    Trackers(("wandb",), None, {"objective": ("black",), "opt_time": None, "opt_steps": 5})
    assert Broken.configs == [
        {
            "method": "dno", "precision": "float32", "patience": "None", "gamma": 1.0, "compile": False, "lr": 0.01,
            "size": "(64, 64)", "weights": "{'black': 1.0}",
        },
        {"objective": "('black',)", "opt_time": "None", "opt_steps": 5},
    ]  # fmt: skip


def test_tensorboard_takes_a_nested_configuration(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trackers = Trackers(
            ("tensorboard",), tmp_path, {"method": "dno", "settings": {"a": None}, "resolved": {"b": {"c": None}}}
        )
        trackers.log(METRICS, torch.zeros(1, 3, 4, 4))
        trackers.finish()
    assert list(tmp_path.glob("dno/**/events*"))


def test_the_images_are_what_the_png_files_show(broken, monkeypatch, tmp_path):
    """Clamped, rounded to 256 levels: the same pixels as in `save_image`."""
    from PIL import Image

    from dno.runs.folder import Run

    sent = []
    monkeypatch.setattr(Broken, "log", lambda self, values, step: None)
    monkeypatch.setattr(Broken, "log_images", lambda self, images, step: sent.append(images["images"]))
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    Trackers(("wandb",), None, {}).log(METRICS, images)
    run = Run(tmp_path)
    for b, pixels in enumerate(sent[0]):
        run.save_image("initial", images[b], b)
        path = run.folder / f"initial{'_b1' if b else ''}.png"
        expected = [round(min(max(value / 2 + 0.5, 0), 1) * 255) for value in images[b].flatten().double().tolist()]
        assert pixels.transpose(2, 0, 1).flatten().tolist() == pytest.approx(expected, abs=1)
        with Image.open(path) as image:
            assert image.tobytes() == pixels.tobytes()


def test_a_tracker_that_cannot_start_is_a_warning(monkeypatch, broken):
    monkeypatch.setattr(Broken, "start", lambda self: 1 / 0)
    with pytest.warns(UserWarning, match="wandb failed"):
        trackers = Trackers(("wandb",), None, {})
    trackers.log(METRICS, torch.zeros(1, 3, 4, 4))
    trackers.finish()
    assert Broken.calls == []


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to trackio .* pip install trackio"):
        prepare({"report_to": "trackio"})
