"""The Stable Diffusion border against diffusers itself: prediction types, guidance, decoding, prompts, precision."""

import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

import dno
from dno.errors import UserError
from dno.models.specs import MODELS, model_spec
from dno.models.stable_diffusion import StableDiffusion
from dno.sampling import sample, step

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def embeddings(conditioning):
    """(positive, negative), (B, L, D) each."""
    return [keywords["encoder_hidden_states"] for keywords in (conditioning.positive, conditioning.negative)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reconfigured(model, **scheduler):
    """The model with some of its scheduler's configuration replaced."""
    pipe = model.pipe
    # Stable Diffusion's own configuration switches the clipping of x0 off too.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **scheduler)
    return StableDiffusion(pipe, "reconfigured")


def published(model):
    """diffusers' own DDIM for the model."""
    return DDIMScheduler.from_config(model.pipe.scheduler.config)


@pytest.fixture
def unet_calls(tiny_model, monkeypatch):
    """The batch sizes that the UNet is called with."""
    sizes, forward = [], tiny_model.network.forward

    def counted(x, *args, **kw):
        sizes.append(len(x))
        return forward(x, *args, **kw)

    monkeypatch.setattr(tiny_model.network, "forward", counted)
    return sizes


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_denoise_and_step_are_ddims(tiny_model, prediction_type):
    model = reconfigured(tiny_model, prediction_type=prediction_type)
    conditioning = model.encode_prompts(["white duck", "red car"])
    schedule, scheduler = model.schedule(10), published(model)
    scheduler.set_timesteps(10)
    x, z = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for i in (0, 5, 9):
        t = schedule.timesteps[i]
        x0, eps = model.denoise(x, schedule[i], conditioning, guidance_scale=1)
        with torch.no_grad():
            prediction = model.pipe.unet(x, t, **conditioning.positive).sample
        for eta in (0, 0.5, 1):
            expected = scheduler.step(prediction, t, x, eta=eta, variance_noise=z)
            torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=1e-5)
            if eta == 0 or i < 9:  # diffusers adds noise after the last step too
                after = step(x0, eps, z, schedule, i, eta)
                torch.testing.assert_close(after, expected.prev_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.alpha[i].float() * x0 + schedule.sigma[i].float() * eps, x)


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("scheduler", [*({"prediction_type": kind} for kind in PREDICTIONS), ZERO_SNR])
@pytest.mark.parametrize("negative_prompt", [None, "a grey cat"])
def test_sampling_is_the_published_pipelines(tiny_model, scheduler, negative_prompt):
    model = reconfigured(tiny_model, **scheduler)
    noise = randn(11, 2, 4, 8, 8)
    conditioning = model.encode_prompts(["white duck", "red car"], negative_prompt)
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=5.0)
    with torch.no_grad():
        latents = sample(denoise, noise, model.schedule(10), eta=0)
        images = model.decode(latents)
    pipe = model.pipe
    pipe.scheduler = published(model)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        ["white duck", "red car"], height=16, width=16, num_inference_steps=10, guidance_scale=5.0, eta=0.0,
        negative_prompt=negative_prompt and [negative_prompt] * 2, latents=noise[-1], output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    with torch.no_grad():
        by_hand = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(images, by_hand)


def test_decoding_neither_clamps_nor_forgets_a_shift(tiny_model):
    latents = 3 * randn(1, 4, 8, 8)
    images = tiny_model.decode(latents)
    assert images.shape == (1, 3, 16, 16) and images.abs().max() > 1
    tiny_model.vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    torch.testing.assert_close(tiny_model.decode(latents), tiny_model.vae.decode(latents / 2 + 0.5).sample)


def test_guidance_of_one_or_less_is_the_conditional_prediction_at_half_the_work(tiny_model, unet_calls):
    conditioning = tiny_model.encode_prompts(["white duck", "red car"], "a grey cat")
    x = randn(2, 4, 8, 8)
    eps = {scale: tiny_model.denoise(x, tiny_model.point(501), conditioning, scale)[1] for scale in (0, 1, 1.5, 5)}
    assert unet_calls == [2, 2, 4, 4]
    torch.testing.assert_close(eps[0], eps[1])
    negative = tiny_model.denoise(x, tiny_model.point(501), conditioning.negated(), 1)[1]
    assert (negative - eps[1]).abs().max() > 1e-3
    for scale in (1.5, 5):
        torch.testing.assert_close(eps[scale], negative + scale * (eps[1] - negative), rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_does(tiny_model):
    pipe = tiny_model.pipe
    conditioning = tiny_model.encode_prompts(["white duck", ""], "a grey cat")
    positive, negative = embeddings(conditioning)
    for text, row in (("white duck", positive[0]), ("", positive[1]),
                      ("a grey cat", negative[0]), ("a grey cat", negative[1])):  # fmt: skip
        ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        torch.testing.assert_close(row, pipe.text_encoder(ids)[0][0])
    second = conditioning[[1]]
    assert len(second) == 1 and torch.equal(embeddings(second)[0], positive[1:]) and len(embeddings(second)[1]) == 1


def test_no_negative_prompt_is_the_empty_one(tiny_model):
    default, empty = tiny_model.encode_prompts(["white duck"]), tiny_model.encode_prompts(["white duck"], "")
    assert torch.equal(embeddings(default)[1], embeddings(empty)[1])
    assert torch.equal(embeddings(default)[1], embeddings(tiny_model.encode_prompts([""]))[0])


def test_a_prompt_over_the_limit_warns_with_what_is_cut(tiny_model):
    longest = " ".join("x" * 75)  # one token each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = tiny_model.encode_prompts([longest, ""], "")
    with pytest.warns(UserWarning, match="77 tokens, the model takes 75; cut: 'y z'"):
        cut = tiny_model.encode_prompts([longest + " y z", ""])
    assert torch.equal(embeddings(cut)[0], embeddings(whole)[0])
    with pytest.warns(UserWarning, match="cut: 'w'"):
        tiny_model.encode_prompts(["white duck"], longest + " w")


def test_the_text_encoder_can_be_freed(tiny_model):
    tiny_model.free_text_encoder()
    assert tiny_model.pipe.text_encoder is None and tiny_model.device.type == "cpu"
    with pytest.raises(UserError, match="encode every prompt before"):
        tiny_model.encode_prompts(["white duck"])


def test_the_schedule_is_the_published_one(tiny_model):
    schedule = tiny_model.schedule(50)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[[*range(981, 0, -20), 0]]
    torch.testing.assert_close(schedule.alpha, alpha_bar.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.sigma, (1 - alpha_bar).sqrt(), rtol=1e-4, atol=0)
    assert tiny_model.schedule(1).timesteps.tolist() == [1]


# Any noise level.


def test_a_point_of_the_schedule_is_the_models_own(tiny_model):
    for point in tiny_model.schedule(10):
        assert tiny_model.point(point.timestep) == tiny_model.point(float(point.timestep)) == point
        assert tiny_model.point(sigma=point.sigma / point.alpha) == point
    for last in (0, 999):
        point = tiny_model.point(last)
        assert tiny_model.point(sigma=point.sigma / point.alpha).timestep == last


def test_between_two_levels_the_logarithm_of_their_ratio_is_interpolated(tiny_model):
    below, above = tiny_model.point(500), tiny_model.point(501)
    point = tiny_model.point(500.25)
    ratio = math.log(point.sigma / point.alpha)
    ends = [math.log(end.sigma / end.alpha) for end in (below, above)]
    assert ratio == pytest.approx(0.75 * ends[0] + 0.25 * ends[1]) and point.timestep == 500.25
    assert point.alpha**2 + point.sigma**2 == pytest.approx(1) and below.alpha > point.alpha > above.alpha
    same = tiny_model.point(sigma=math.exp(ratio))
    assert (same.timestep, same.alpha, same.sigma) == pytest.approx((500.25, point.alpha, point.sigma))


def test_points_of_a_tensor_are_one_per_row(tiny_model):
    given = torch.tensor([0, 17, 999])
    points = tiny_model.point(given)
    assert torch.equal(points.timestep, given)
    single = [tiny_model.point(t) for t in given.tolist()]
    assert points.alpha.tolist() == [point.alpha for point in single]
    assert points.sigma.tolist() == [point.sigma for point in single]
    fractions = tiny_model.point(torch.tensor([3.5, 20.0]))
    assert fractions.timestep.tolist() == [3.5, 20] and fractions.alpha[1] == tiny_model.point(20).alpha
    sigmas = tiny_model.point(sigma=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(sigmas.sigma / sigmas.alpha, torch.tensor([0.5, 2.0]).double())


@pytest.mark.parametrize("given", [{"timestep": 999.5}, {"timestep": -1}, {"sigma": 20.0}, {"sigma": 0.0},
                                   {"timestep": torch.tensor([5, 1000])}])  # fmt: skip
def test_a_level_that_the_model_was_not_trained_at_is_refused(tiny_model, given):
    with pytest.raises(ValueError, match="expected from 0 to 999|expected from 0.029.* to 14.6"):
        tiny_model.point(**given)


def test_a_last_level_without_signal_has_its_point(tiny_model):
    model = reconfigured(tiny_model, **ZERO_SNR)
    assert (model.point(999).alpha, model.point(999).sigma) == (0, 1) and model.point(998).alpha > 0
    assert model.point(sigma=1e3).timestep < 998
    with pytest.raises(ValueError, match="the model's levels"):
        model.point(sigma=1e9)


@pytest.mark.parametrize("guidance_scale", [1, 5])
@pytest.mark.parametrize("split", [False, True])
def test_rows_at_their_own_levels_are_as_if_alone(tiny_model, guidance_scale, split):
    model, x = tiny_model, randn(3, 4, 8, 8)
    conditioning = model.encode_prompts(["white duck", "red car", ""], "a grey cat")
    timesteps = [17, 501, 980.5]
    rows = model.denoise(x, model.point(torch.tensor(timesteps)), conditioning, guidance_scale, split_guidance=split)
    for b, timestep in enumerate(timesteps):
        alone = model.denoise(x[[b]], model.point(timestep), conditioning[[b]], guidance_scale)
        for got, expected in zip(rows, alone):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got[[b]], expected, rtol=1e-4, atol=1e-4)


def test_timesteps_reach_the_network_whole_or_in_float32(tiny_model):
    seen = []
    tiny_model.network.register_forward_pre_hook(lambda module, args, kw: seen.append(args[1]), with_kwargs=True)
    conditioning, x = tiny_model.encode_prompts(["white duck"]), randn(1, 4, 8, 8)
    for timestep in (501, 501.5, torch.tensor([501]), torch.tensor([501.5])):
        tiny_model.denoise(x, tiny_model.point(timestep), conditioning, 5.0)
    assert [(t.dtype, t.tolist()) for t in seen] == [(torch.int64, [501] * 2), (torch.float32, [501.5] * 2)] * 2


def test_each_prompt_can_have_a_negative_one_of_its_own(tiny_model):
    own = tiny_model.encode_prompts(["white duck", "red car"], ["a grey cat", ""])
    for b, negative in enumerate(["a grey cat", ""]):
        shared = tiny_model.encode_prompts(["white duck", "red car"], negative)
        assert torch.equal(embeddings(own)[1][b], embeddings(shared)[1][b])
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        tiny_model.encode_prompts(["white duck", "red car"], ["a grey cat"])


@pytest.mark.parametrize(
    ("spacing", "offset", "most", "first"),
    [("leading", 1, 999, 999), ("leading", 0, 1000, 999), ("trailing", 0, 1000, 999), ("linspace", 0, 1000, 999)],
)
def test_more_steps_than_the_model_has_are_refused(tiny_model, spacing, offset, most, first):
    model = reconfigured(tiny_model, timestep_spacing=spacing, steps_offset=offset)
    assert model.schedule(most).timesteps[0] == first
    with pytest.raises(UserError, match=f"--num_steps {most + 1} .* 999 .*{spacing}.*lower it"):
        model.schedule(most + 1)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_spacing_can_be_given(tiny_model, spacing):
    scheduler = DDIMScheduler.from_config(tiny_model.pipe.scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    assert tiny_model.schedule(7, timestep_spacing=spacing).timesteps.tolist() == scheduler.timesteps.tolist()
    own, leading = tiny_model.schedule(7), tiny_model.schedule(7, timestep_spacing="leading")
    assert own.timesteps.tolist() == leading.timesteps.tolist()
    with pytest.raises(UserError, match="is 'karras'; expected one of leading, linspace, trailing"):
        tiny_model.schedule(7, timestep_spacing="karras")


def test_trailing_steps_are_as_many_as_asked_for(tiny_model):
    """diffusers has 62 timesteps for 61 steps, the last of them -1."""
    schedule = tiny_model.schedule(61, timestep_spacing="trailing")
    assert schedule.num_steps == 61 and len(schedule.alpha) == 62 and schedule.timesteps.min() >= 0


def test_a_row_says_how_a_few_step_model_samples(tiny_folder, monkeypatch):
    for name in ("stabilityai/sd-turbo", "stabilityai/sdxl-turbo"):
        spec = model_spec(name)
        assert (spec.source, spec.num_steps, spec.guidance_scale, spec.eta) == (name, 1, 0, 1)
        monkeypatch.setitem(MODELS, "turbo", lambda spec=spec: replace(spec, source=str(tiny_folder)))
        schedule = dno.load_model("turbo").schedule(4)
        assert schedule.timesteps.tolist() == [999, 749, 499, 249]
        assert schedule.alpha[-1] == 1 and schedule.sigma[-1] == 0
        # One step gives x0, whatever noise there is for it.
        model = dno.load_model("turbo")
        denoise = partial(model.denoise, conditioning=model.encode_prompts(["duck"], guided=False), guidance_scale=0)
        noise = randn(2, 1, 4, 8, 8)
        assert torch.equal(sample(denoise, noise, model.schedule(1), 1.0), denoise(noise[1], model.point(999))[0])


def test_an_unknown_prediction_type_is_refused(tiny_model):
    with pytest.raises(UserError, match="'flow'; expected one of epsilon, v_prediction, sample"):
        reconfigured(tiny_model, prediction_type="flow")


def test_sizes_come_from_the_model(tiny_model):
    assert tiny_model.scale_factor == 2 and tiny_model.default_size == (16, 16)
    assert tiny_model.latent_shape(3, 24, 16) == (3, 4, 12, 8)
    tiny_model.network.register_to_config(sample_size=(8, 12))
    assert tiny_model.default_size == (16, 24)


def sizes_in_bytes(model):
    networks = (model.network, model.vae, model.pipe.text_encoder)
    return [sum(p.numel() * p.element_size() for p in network.parameters()) for network in networks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_are_stored_in_half_precision_and_the_border_is_float32(tiny_folder, tiny_model, dtype):
    half = dno.load_model(str(tiny_folder), dtype)
    assert half.dtype == dtype and [2 * size for size in sizes_in_bytes(half)] == sizes_in_bytes(tiny_model)
    networks = (half.network, half.vae, half.pipe.text_encoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {dtype}
    assert not any(p.requires_grad for network in networks for p in network.parameters())

    conditioning = half.encode_prompts(["white duck"])
    assert {part.dtype for part in embeddings(conditioning)} == {dtype}
    point = tiny_model.point(501)
    exact = tiny_model.denoise(randn(1, 4, 8, 8), point, tiny_model.encode_prompts(["white duck"]), 5.0)
    for got, expected in zip(half.denoise(randn(1, 4, 8, 8), point, conditioning, 5.0), exact):
        assert got.dtype == torch.float32 and (got - expected).norm() < 0.06 * expected.norm()
    assert half.decode(randn(1, 4, 8, 8)).dtype == torch.float32


def gradients(model, scale=1.0, recompute=False):
    """The gradient in the noises of a loss on two images, the second one's loss a thousandth of the first one's."""
    noise = [z.requires_grad_() for z in randn(4, 2, 4, 8, 8)]
    conditioning = model.encode_prompts(["white duck", "red car"])
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=3.0)
    images = model.decode(sample(denoise, noise, model.schedule(3), 1.0, recompute=recompute))
    losses = scale * torch.tensor([1.0, 1e-3]) * images.mean(dim=(1, 2, 3))
    return torch.stack(torch.autograd.grad(losses.sum(), noise[1:]))  # (3, 2, 4, 8, 8)


def assert_close_per_image(got, expected, tolerance):
    assert got.dtype == torch.float32 and got.isfinite().all()
    for b in range(2):
        error = (got[:, b] - expected[:, b]).norm() / expected[:, b].norm()
        assert error < tolerance, f"image {b}: {error}"


@pytest.mark.parametrize("recompute", [False, True])
def test_fp16_keeps_gradients_that_would_underflow(tiny_folder, tiny_model, recompute):
    """The mean over 768 values, times 1e-6 and less: far below float16's least number, 6e-8."""
    half = dno.load_model(str(tiny_folder), torch.float16)
    expected = gradients(tiny_model, 1e-6)
    assert not expected.half().any()
    assert_close_per_image(gradients(half, 1e-6, recompute), expected, 0.03)


def test_fp16_survives_large_gradients_and_passes_on_what_is_not_finite(tiny_folder, tiny_model):
    half = dno.load_model(str(tiny_folder), torch.float16)
    assert_close_per_image(gradients(half, 1e8), gradients(tiny_model, 1e8), 0.03)
    assert not gradients(half, float("inf")).isfinite().any()
    assert not gradients(half, 0.0).any()


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_takes_a_float32_leaf(tiny_folder, tiny_model, recompute):
    half = dno.load_model(str(tiny_folder), torch.bfloat16)
    assert_close_per_image(gradients(half, 1.0, recompute), gradients(tiny_model), 0.15)


@pytest.mark.parametrize("recompute", [False, True])
def test_block_checkpointing_gives_the_same_gradient(tiny_model, recompute):
    expected = gradients(tiny_model)
    assert expected.flatten(1).norm(dim=1).min() > 0
    tiny_model.checkpoint_blocks()
    assert tiny_model.network.is_gradient_checkpointing and tiny_model.vae.is_gradient_checkpointing
    torch.testing.assert_close(gradients(tiny_model, recompute=recompute), expected)
    tiny_model.checkpoint_blocks(False)
    assert not (tiny_model.network.is_gradient_checkpointing or tiny_model.vae.is_gradient_checkpointing)


def test_a_model_that_wants_more_than_noise_is_refused(tiny_model):
    tiny_model.pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="UNet takes 9 channels and its VAE has 4.*inpainting"):
        StableDiffusion(tiny_model.pipe, "inpainting")


def test_a_point_is_of_one_timestep_or_one_sigma(tiny_model):
    for arguments in ({}, {"timestep": 500, "sigma": 1.0}):
        with pytest.raises(ValueError, match="one of the two"):
            tiny_model.point(**arguments)


@pytest.mark.parametrize("kind", ["LCMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_what_a_schedulers_file_leaves_out_has_its_own_classs_defaults(tiny_model, kind):
    import diffusers

    scheduler = getattr(diffusers, kind)()
    tiny_model.pipe.scheduler = getattr(diffusers, kind).from_config({"_class_name": kind})
    model = type(tiny_model)(tiny_model.pipe, "mine")
    torch.testing.assert_close(model.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert model.scheduler.config.timestep_spacing == scheduler.config.timestep_spacing


@pytest.mark.parametrize("setting", [{"num_class_embeds": 3}, {"addition_embed_type": "text_time"}], ids=str)
def test_a_unet_that_wants_to_be_told_more_is_refused(tiny_model, setting):
    tiny_model.network.register_to_config(**setting)
    with pytest.raises(UserError, match="wants to be told more than this pipeline says"):
        type(tiny_model)(tiny_model.pipe, "mine")
