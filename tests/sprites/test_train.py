"""Training in miniature: an interrupted run equals an uninterrupted one, and its export loads."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from sprites.judge import load_judge
from sprites.train import main
from sprites.training import learning_rate, orthogonalize


@pytest.fixture(scope="module", autouse=True)
def threads():
    """train.py sets the number of threads of its process; give it back to the other tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with 64 scenes and an autoencoder of two steps."""
    folder = tmp_path_factory.mktemp("work")
    run(folder, "scenes", "--num_scenes", "64")
    run(folder, "autoencoder", "--steps", "2", "--batch", "2")
    return folder


def run(folder, stage, *options):
    main([stage, "--work", str(folder), "--threads", "2", *options])


def load(folder, stage):
    return torch.load(folder / f"{stage}.pt", weights_only=True)


def assert_same(a, b):
    """Two nested checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("stage", ["clip", "judge", "unet"])
def test_resumed_equals_uninterrupted(work, stage):
    options = ("--steps", "3", "--batch", "2")
    run(work, stage, *options)
    whole = load(work, stage)
    (work / f"{stage}.pt").unlink()
    run(work, stage, *options, "--stop", "2")
    assert load(work, stage)["step"] == 2
    run(work, stage, *options)
    assert_same(load(work, stage), whole)


def test_export_of_a_miniature_loads(work, tmp_path):
    for stage in ("clip", "judge", "unet"):
        run(work, stage, "--steps", "1", "--batch", "2")
    run(work, "export", "--output", str(tmp_path))
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("white duck", num_inference_steps=2).images[0].size == (64, 64)
    CLIPModel.from_pretrained(tmp_path / "clip")
    load_judge(tmp_path / "judge")
    assert not list(tmp_path.glob(".export-*"))


def test_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(step, 1000, flat=0.5, warmup=50) for step in range(1000)]
    assert rates[0] == 1 / 50
    assert set(rates[50:501]) == {1.0}
    assert rates[501:] == sorted(rates[501:], reverse=True)
    assert rates[-1] < 1e-4


def test_orthogonalize_brings_all_singular_values_near_one():
    for shape in ((16, 40), (40, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalize(matrix))
        assert values.min() > 0.5
        assert values.max() < 1.4
