"""Stable Diffusion XL against diffusers itself and finite differences; `test_parity` has the official rewards."""

import warnings
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler

import dno
from dno.errors import UserError
from dno.memory import Plan, graph_bytes
from dno.models.stable_diffusion import StableDiffusionXL
from dno.sampling import sample

STEPS = 4


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def exact(tiny_xl_folder):
    """The tiny model in float64."""
    return dno.load_model(tiny_xl_folder, torch.float64)


@pytest.fixture
def unet_calls(tiny_xl_model, monkeypatch):
    """What the UNet is called with: the batch size and the time ids."""
    calls, forward = [], tiny_xl_model.network.forward

    def watched(x, *args, added_cond_kwargs, **kw):
        calls.append((len(x), added_cond_kwargs["time_ids"].tolist()))
        return forward(x, *args, added_cond_kwargs=added_cond_kwargs, **kw)

    monkeypatch.setattr(tiny_xl_model.network, "forward", watched)
    return calls


def gradient(model, plan=None, size=(8, 8), guidance_scale=5.0, eta=1.0, through_network=True, scale=1.0):
    """The gradient (T + 1, 2, 4, h, w) in the noises of a loss on two images, with their sum."""
    plan = plan or Plan(STEPS, STEPS)
    model.checkpoint_blocks(plan.network_blocks, plan.vae_blocks)
    noise = randn(STEPS + 1, 2, 4, *size, dtype=torch.promote_types(model.dtype, torch.float32)).requires_grad_()
    denoise = partial(
        model.denoise, conditioning=model.encode_prompts(["white duck", "red car"], "a grey cat"),
        guidance_scale=guidance_scale, through_network=through_network, split_guidance=plan.split_guidance,
    )  # fmt: skip
    latents = sample(denoise, noise, model.schedule(STEPS), eta, recompute=plan.recompute(STEPS))
    loss = scale * model.decode(latents).square().mean()
    return torch.autograd.grad(loss, noise)[0], loss.item()


def embeddings(conditioning):
    """As the pipeline orders them: positive, negative, pooled, negative pooled."""
    halves = conditioning.positive, conditioning.negative
    return [half["encoder_hidden_states"] for half in halves] + [
        half["added_cond_kwargs"]["text_embeds"] for half in halves
    ]


# The border, against the published pipeline.


def published_latents(model, latents, num_steps, **kw):
    """diffusers' own images for the model, before they are decoded, with its own DDIM at eta = 0."""
    pipe = model.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=num_steps, latents=latents, output_type="latent", **kw).images


SIZES = {"original_size": (40, 30), "crops_coords_top_left": (3, 5), "target_size": (64, 48)}


@pytest.mark.parametrize("negative_prompt", [None, "a grey cat"])
@pytest.mark.parametrize("sizes", [{}, SIZES])
def test_sampling_is_the_published_pipelines(tiny_xl_model, negative_prompt, sizes):
    """Not square, and with the default sizes and others."""
    model, noise = tiny_xl_model, randn(11, 2, 4, 12, 8)
    conditioning = model.encode_prompts(["white duck", "red car"], negative_prompt, **sizes)
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=5.0)
    with torch.no_grad():
        latents = sample(denoise, noise, model.schedule(10), eta=0)
        images = model.decode(latents)
    expected = published_latents(
        model, noise[-1], 10, prompt=["white duck", "red car"], height=24, width=16, guidance_scale=5.0, eta=0.0,
        negative_prompt=negative_prompt and [negative_prompt] * 2, **sizes,
    )  # fmt: skip
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert images.shape == (2, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(images, model.vae.decode(latents / 0.13025).sample)


def test_sizes_reach_the_unet_and_matter(tiny_xl_model, unet_calls):
    x, encode = randn(2, 4, 12, 8), tiny_xl_model.encode_prompts
    prompts = ["white duck", "red car"]
    default, _ = tiny_xl_model.denoise(x, tiny_xl_model.point(501), encode(prompts), 5.0)
    told, _ = tiny_xl_model.denoise(x, tiny_xl_model.point(501), encode(prompts, **SIZES), 5.0)
    # Height before width; the same for the negative half.
    assert unet_calls == [(4, [[24, 16, 0, 0, 24, 16]] * 4), (4, [[40, 30, 3, 5, 64, 48]] * 4)]
    assert (default - told).abs().max() > 1e-3


def test_prompts_are_encoded_as_the_pipeline_does(tiny_xl_model):
    prompts = ["white duck", ""]
    for negative in (None, "a grey cat", ""):
        expected = tiny_xl_model.pipe.encode_prompt(
            prompts, negative_prompt=None if negative is None else [negative] * 2
        )
        got = tiny_xl_model.encode_prompts(prompts, negative)
        parts = embeddings(got)
        assert [part.shape for part in parts] == [(2, 77, 28)] * 2 + [(2, 10)] * 2
        assert all(torch.equal(*pair) for pair in zip(parts, expected))
    second = got[[1]]
    assert all(torch.equal(row, part[1:]) for row, part in zip(embeddings(second), embeddings(got)))
    sizes = [each.positive["added_cond_kwargs"]["time_ids"].value for each in (second, got)]
    assert sizes[0] == sizes[1] == (None, (0, 0), None)


def test_the_familys_empty_prompt_is_what_the_configuration_says(tiny_xl_model):
    zeros = tiny_xl_model.encode_prompts(["white duck"])
    assert not any(part.any() for part in embeddings(zeros)[1::2])
    tiny_xl_model.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    empty, given = (tiny_xl_model.encode_prompts(["white duck"], negative) for negative in (None, ""))
    assert torch.equal(embeddings(empty)[1], embeddings(given)[1]) and embeddings(empty)[1].any()


def test_without_guidance_the_network_sees_one_half_and_no_negative_prompt_is_encoded(tiny_xl_model, unet_calls):
    x, encode = randn(2, 4, 8, 8), tiny_xl_model.encode_prompts
    prompts = ["white duck", "red car"]
    lone = encode(prompts, "a grey cat", guided=False)
    assert lone.negative is None and lone[[0]].negative is None
    for scale in (0, 1, 1.5):
        x0, eps = tiny_xl_model.denoise(x, tiny_xl_model.point(501), encode(prompts), scale)
        if scale <= 1:
            assert torch.equal(eps, tiny_xl_model.denoise(x, tiny_xl_model.point(501), lone, scale)[1])
    assert [size for size, _ in unet_calls] == [2, 2, 2, 2, 4]
    with pytest.raises(ValueError, match="guidance_scale is 1.5, and the negative prompt was left out"):
        tiny_xl_model.denoise(x, tiny_xl_model.point(501), lone, 1.5)


def test_a_cut_prompt_is_said_once_for_both_tokenizers(tiny_xl_model):
    with pytest.warns(UserWarning, match="77 tokens, the model takes 75; cut: 'y z'") as caught:
        tiny_xl_model.encode_prompts([" ".join("x" * 75) + " y z"] * 2)
    assert len([w for w in caught if "tokens" in str(w.message)]) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_xl_model.encode_prompts(["white duck"], "y " * 80, guided=False)  # not used, so not warned of


def test_both_text_encoders_are_freed(tiny_xl_model):
    tiny_xl_model.free_text_encoder()
    assert tiny_xl_model.pipe.text_encoder is None and tiny_xl_model.pipe.text_encoder_2 is None
    with pytest.raises(UserError, match="encode every prompt before"):
        tiny_xl_model.encode_prompts(["white duck"])


def test_the_schedule_is_ddims_for_the_published_scheduler(tiny_xl_model):
    schedule = tiny_xl_model.schedule(50)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20)) and tiny_xl_model.prediction_type == "epsilon"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[[*range(981, 0, -20), 0]]
    torch.testing.assert_close(schedule.alpha, alpha_bar.sqrt(), rtol=1e-5, atol=0)
    assert tiny_xl_model.default_size == (16, 16)


@pytest.mark.parametrize("change", [{"projection_class_embeddings_input_dim": 30}, {"in_channels": 9}])
def test_a_refiner_and_an_inpainting_model_are_refused(tiny_xl_model, change):
    tiny_xl_model.network.register_to_config(**change)
    with pytest.raises(UserError, match="a refiner cannot make images of noise alone|models for inpainting") as error:
        StableDiffusionXL(tiny_xl_model.pipe, "other")
    assert "\n" not in str(error.value)


# The gradient.


@pytest.mark.parametrize(("guidance_scale", "eta"), [(5.0, 1.0), (5.0, 0.0), (1.0, 1.0)])
def test_the_gradient_equals_finite_differences(exact, guidance_scale, eta):
    whole, _ = gradient(exact, guidance_scale=guidance_scale, eta=eta)
    conditioning = exact.encode_prompts(["white duck", "red car"], "a grey cat")
    denoise = partial(exact.denoise, conditioning=conditioning, guidance_scale=guidance_scale)
    noise, direction = (randn(STEPS + 1, 2, 4, 8, 8, seed=seed, dtype=torch.float64) for seed in (0, 1))

    @torch.no_grad()
    def loss(by):
        return exact.decode(sample(denoise, noise + by * direction, exact.schedule(STEPS), eta)).square().mean().item()

    # A central difference of fourth order.
    h = 1e-3
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert (whole * direction).sum().item() == pytest.approx(slope, rel=1e-7)
    assert whole[:-1].any() == (eta > 0)


def test_skipping_the_network_gives_another_gradient_of_the_same_images(tiny_xl_model, exact, unet_calls):
    """What backpropagation gives where the UNet's prediction is a constant, without a second call of the network."""
    whole, loss = gradient(exact)
    skipped, same_loss = gradient(exact, through_network=False)
    assert loss == same_loss
    # Most at x_T, from which the network is passed most often.
    assert (whole - skipped)[-1].norm() > 0.2 * whole[-1].norm(), "the gradient through the UNet is lost"
    # x' = (alpha' / alpha) x + (...) eps with eps held, so each noise reaches the latents by a number alone.
    schedule, alpha = exact.schedule(STEPS), exact.schedule(STEPS).alpha
    latents = sample(
        partial(exact.denoise, conditioning=exact.encode_prompts([""]), guidance_scale=1, through_network=False),
        noise := randn(STEPS + 1, 1, 4, 8, 8, dtype=torch.float64).requires_grad_(), schedule, 0.0, recompute=False,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(latents.sum(), noise)
    torch.testing.assert_close(grad[-1], torch.full_like(grad[-1], float(alpha[-1] / alpha[0])), rtol=1e-5, atol=0)

    gradient(tiny_xl_model, Plan(0, 0), through_network=False)
    assert len(unet_calls) == STEPS


PLANS = {
    **{f"{kept} kept": Plan(STEPS, kept) for kept in range(STEPS)},
    "VAE by block": Plan(STEPS, 2, vae_blocks=True),
    "block": Plan(STEPS, 0, network_blocks=True, vae_blocks=True),
    "block, kept": Plan(STEPS, STEPS, network_blocks=True),
    "split": Plan(STEPS, 0, split_guidance=True),
    "split, kept": Plan(STEPS, STEPS, split_guidance=True),
    "split, block": Plan(STEPS, 0, network_blocks=True, vae_blocks=True, split_guidance=True),
}


@pytest.fixture(scope="module")
def whole(tiny_xl_folder):
    """The gradient in float64 where everything is kept."""
    return gradient(dno.load_model(tiny_xl_folder, torch.float64))


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_gives_the_same_gradient(exact, whole, name):
    got, loss = gradient(exact, PLANS[name])
    expected, expected_loss = whole
    assert expected.flatten(1).norm(dim=1)[1:].min() > 0 and loss == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_split_guidance_keeps_one_half_only(tiny_xl_model, unet_calls):
    """Two calls of B images forward, and one more for the half that was not kept."""
    gradient(tiny_xl_model, Plan(STEPS, STEPS, split_guidance=True))
    assert [size for size, _ in unet_calls] == [2] * 3 * STEPS
    conditioning, x = tiny_xl_model.encode_prompts([""]), randn(1, 4, 8, 8).requires_grad_()
    denoise = partial(tiny_xl_model.denoise, x, tiny_xl_model.point(501), conditioning)
    one, two, split = (
        graph_bytes(partial(denoise, scale, split_guidance=split))
        for scale, split in ((1, False), (5, False), (5, True))
    )
    assert split < 1.1 * one < 0.6 * two


def test_networks_are_checkpointed_separately(tiny_xl_model):
    for arguments, expected in (((), (1, 1)), ((False,), (0, 0)), ((True, False), (1, 0)), ((False, True), (0, 1))):
        tiny_xl_model.checkpoint_blocks(*arguments)
        flags = (tiny_xl_model.network.is_gradient_checkpointing, tiny_xl_model.vae.is_gradient_checkpointing)
        assert flags == expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_give_the_same_gradient(tiny_xl_model, backend):
    expected, _ = gradient(tiny_xl_model)
    torch._dynamo.utils.counters.clear()
    tiny_xl_model.compile_blocks(backend=backend)
    for plan in (Plan(STEPS, STEPS), Plan(STEPS, 0, network_blocks=True, vae_blocks=True, split_guidance=True)):
        got, _ = gradient(tiny_xl_model, plan)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
@pytest.mark.parametrize("plan", [Plan(STEPS, STEPS), Plan(STEPS, 1, split_guidance=True)])
def test_half_precision(tiny_xl_folder, tiny_xl_model, dtype, tolerance, plan):
    """With a loss whose gradient float16 has no room for; its VAE is in float32, across the same border."""
    half = dno.load_model(tiny_xl_folder, dtype)
    assert half.network.dtype == dtype and half.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    expected, _ = gradient(tiny_xl_model, scale=1e-7)
    got, _ = gradient(half, plan, scale=1e-7)
    assert not expected.half().any() and got.isfinite().all()
    assert (got - expected).norm() < tolerance * expected.norm()
