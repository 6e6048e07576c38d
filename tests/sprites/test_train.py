"""Training in miniature: an interrupted run equals an uninterrupted one, and its export loads."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPModel

from sprites import networks
from sprites.data import WHOLE, caption_ids, micro_conditioned
from sprites.judge import load_judge
from sprites.scenes import scenes
from sprites.tokens import build_tokenizer
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
    main([stage, "--work", str(folder), "--threads", "1", *options])


def begin(folder):
    """One step of the stages that others build on, unless they have a checkpoint."""
    for stage in ("clip", "judge", "unet"):
        run(folder, stage, "--steps", "1", "--batch", "2")


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


@pytest.mark.parametrize("stage", ["clip", "judge", "unet", "unet-xl"])
def test_resumed_equals_uninterrupted(work, stage):
    options = ("--steps", "3", "--batch", "2")
    if stage == "unet-xl":
        begin(work)
    run(work, stage, *options)
    whole = load(work, stage)
    (work / f"{stage}.pt").unlink()
    run(work, stage, *options, "--stop", "2")
    assert load(work, stage)["step"] == 2
    run(work, stage, *options)
    assert_same(load(work, stage), whole)


def test_export_of_a_miniature_loads(work, tmp_path):
    begin(work)
    run(work, "unet-xl", "--steps", "1", "--batch", "2")
    run(work, "export", "--output", str(tmp_path))
    for kind, folder in ((StableDiffusionPipeline, tmp_path), (StableDiffusionXLPipeline, tmp_path / "xl")):
        pipeline = kind.from_pretrained(str(folder))
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline("white duck", num_inference_steps=2).images[0].size == (64, 64)
    CLIPModel.from_pretrained(tmp_path / "clip")
    load_judge(tmp_path / "judge")
    assert not list(tmp_path.glob(".export-*"))


@torch.no_grad()
def test_xl_begins_as_the_model_it_grows_out_of():
    """The weights are random; the predictions must agree all the same, up to the fitted linear map."""
    tokenizer = build_tokenizer()
    ids, _ = caption_ids(tokenizer)
    torch.manual_seed(0)
    small, clip = networks.text_to_latents(tokenizer), networks.clip(tokenizer)
    model = networks.text_to_latents_xl(tokenizer)
    networks.warm_start_xl(model, small.state_dict(), clip.state_dict(), ids.flatten(0, 1))
    hidden, pooled = networks.encode_xl(model, ids[0, :4])
    x, t, added = torch.randn(4, 4, 16, 16), torch.tensor([1, 300, 600, 999]), {"text_embeds": pooled}
    added["time_ids"] = torch.tensor([WHOLE] * 4)
    prediction = model["unet"](x, t, hidden, added_cond_kwargs=added).sample
    wanted = small["unet"](x, t, small["text_encoder"](ids[0, :4])[0]).sample
    other = small["unet"](x, t, small["text_encoder"](ids[0, 4:8])[0]).sample
    assert (prediction - wanted).norm() < 0.05 * (other - wanted).norm()


def test_time_ids_tell_what_was_done_to_a_scene():
    data, _ = scenes(0, 64, seed=7)
    images, time_ids = micro_conditioned(data, 0)
    small = time_ids[:, 0] < 64
    assert 8 < small.sum() < 40
    for scene, image, (height, width, top, left, *target) in zip(data, images, time_ids.tolist()):
        assert height == width and target == [64, 64]
        if height == 64:
            assert (scene[top:, left:] == image[: 64 - top, : 64 - left]).all()
        else:
            assert (top, left) == (0, 0)
            assert sharpness(image) <= sharpness(scene)


def sharpness(image):
    return sum((torch.tensor(image).float().diff(dim=d) ** 2).mean() for d in (0, 1))


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
