"""What families share: conditioning, the VAE both ways, adapters, checkpointing and compiling without help, float16."""

from functools import partial

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file

import dno
from dno.errors import UserError
from dno.memory import graph_bytes
from dno.models.base import _in_precision_of
from dno.models.conditioning import Conditioning, Shared
from dno.sampling import sample

STEPS = 3


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Conditioning.


def conditioning(negative=True):
    def half(sign):
        return {
            "tokens": sign * torch.arange(6).view(3, 2), "texts": [sign * torch.ones(n) for n in (1, 2, 3)],
            "added": {"pooled": sign * torch.arange(3), "ids": Shared((1, 2))}, "mask": None,
        }  # fmt: skip

    return Conditioning(half(1), half(-1) if negative else None)


def test_rows_of_a_conditioning_may_repeat():
    rows = conditioning()[[2, 0, 2]]
    assert len(conditioning()) == len(rows) == 3 and len(conditioning()[[1]]) == 1
    for half, sign in ((rows.positive, 1), (rows.negative, -1)):
        assert half["tokens"].tolist() == [[sign * 4, sign * 5], [0, sign], [sign * 4, sign * 5]]
        assert half["added"]["pooled"].tolist() == [2 * sign, 0, 2 * sign]
        assert [len(text) for text in half["texts"]] == [3, 1, 3]
        assert half["added"]["ids"] == Shared((1, 2)) and half["mask"] is None
    assert conditioning(negative=False)[range(1, 3)].negative is None


def test_a_conditioning_doubled_is_the_negative_rows_and_then_the_positive_ones():
    doubled = conditioning().doubled()
    assert len(doubled) == 6 and doubled.negative is None
    assert doubled.positive["added"]["pooled"].tolist() == [0, -1, -2, 0, 1, 2]
    assert [int(text[0]) for text in doubled.positive["texts"]] == [-1, -1, -1, 1, 1, 1]
    assert doubled.positive["added"]["ids"] == Shared((1, 2)) and doubled.positive["mask"] is None
    assert conditioning().negated().positive["added"]["pooled"].tolist() == [0, -1, -2]


# The VAE.


STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}


def test_the_vaes_own_statistics_are_honoured(tiny_xl_model):
    """As diffusers' SDXL pipeline does with them."""
    model = tiny_xl_model
    model.vae.register_to_config(**STATISTICS)
    latents = randn(2, 4, 8, 8)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    expected = model.vae.decode(latents * std / 0.13025 + mean).sample
    torch.testing.assert_close(model.decode(latents), expected, rtol=1e-4, atol=1e-5)
    model.pipe.set_progress_bar_config(disable=True)
    published, denoised = (
        model.pipe("duck", latents=latents[:1], num_inference_steps=1, guidance_scale=1, output_type=kind).images
        for kind in ("pt", "latent")
    )
    torch.testing.assert_close((model.decode(denoised) / 2 + 0.5).clamp(0, 1), published, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"scaling_factor": 2.0, "shift_factor": 0.5}, STATISTICS])
def test_encoding_is_the_vaes_posterior_and_the_inverse_of_decoding(tiny_model, config):
    tiny_model.vae.register_to_config(**config)
    images, z = randn(2, 3, 16, 24).clamp(-1, 1), randn(2, 4, 8, 12, seed=1)
    posterior = tiny_model.vae.encode(images).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    seen = []
    tiny_model.vae.decode = lambda x, **kw: seen.append(x) or (x,)  # what the decoder is given
    for draw, expected in ((None, posterior.mean), (z, posterior.mean + posterior.std * z)):
        latents = tiny_model.encode(images, draw)
        assert latents.shape == (2, 4, 8, 12) and latents.dtype == torch.float32
        tiny_model.decode(latents)
        torch.testing.assert_close(seen.pop(), expected, rtol=1e-5, atol=1e-5)


def test_encoding_has_a_gradient_and_runs_in_the_vaes_precision(tiny_folder):
    exact, half = (dno.load_model(str(tiny_folder), dtype) for dtype in (torch.float64, torch.bfloat16))
    images = randn(1, 3, 16, 16, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda pixel: exact.encode(images + pixel).mean(), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    )
    coarse = half.encode(images.float())
    assert coarse.dtype == torch.float32 and (coarse - exact.encode(images)).abs().max() < 0.1


# Adapters.


@pytest.fixture
def exact(tiny_folder):
    """The tiny model in float64."""
    return dno.load_model(str(tiny_folder), torch.float64)


def rendered(model, recompute, noise, guidance_scale=3.0):
    conditioning = model.encode_prompts(["white duck", "red car"])
    denoise = partial(model.denoise, conditioning=conditioning, guidance_scale=guidance_scale)
    return model.decode(sample(denoise, noise, model.schedule(STEPS), 1.0, recompute))


def fill(parameters):
    """Give a LoRA weights that matter; fresh ones change nothing."""
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=i))


@pytest.mark.parametrize("noise_too", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_gradient_reaches_a_lora_through_the_sampler(exact, noise_too, blocks):
    parameters = exact.add_adapter(2)
    fill(parameters)
    noise = [z.requires_grad_(noise_too) for z in randn(STEPS + 1, 2, 4, 8, 8, dtype=torch.float64)]
    wanted = parameters + noise[1:] * noise_too
    exact.checkpoint_blocks(blocks)

    def loss(recompute=False):
        return rendered(exact, recompute, noise).square().mean()

    grads = {recompute: torch.autograd.grad(loss(recompute), wanted) for recompute in (False, True, 2)}
    for recompute in (True, 2):
        torch.testing.assert_close(grads[recompute], grads[False], rtol=1e-9, atol=1e-12)
    directions = [randn(*tensor.shape, seed=100 + i, dtype=torch.float64) for i, tensor in enumerate(wanted)]

    @torch.no_grad()
    def moved(h):
        for tensor, direction in zip(wanted, directions):
            tensor.add_(h * direction)
        value = loss().item()
        for tensor, direction in zip(wanted, directions):
            tensor.sub_(h * direction)
        return value

    h = 1e-4
    slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    got = sum((grad * direction).sum() for grad, direction in zip(grads[True], directions)).item()
    assert got == pytest.approx(slope, rel=1e-7) and abs(slope) > 1e-6
    assert all(grad.any() for grad in grads[True][: len(parameters)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_and_is_trained_in_float32(tiny_folder, dtype):
    model, noise = dno.load_model(str(tiny_folder), dtype), randn(STEPS + 1, 2, 4, 8, 8)
    with torch.no_grad():
        before = rendered(model, True, noise)
        parameters = model.add_adapter(4, alpha=8)
        assert torch.equal(rendered(model, True, noise), before)
    assert model.dtype == dtype and {p.dtype for p in parameters} == {torch.float32}
    trained = [p for p in model.network.parameters() if p.requires_grad]
    attentions = sum(type(module).__name__ == "Attention" for module in model.network.modules())
    assert {id(p) for p in trained} == {id(p) for p in parameters} and len(parameters) == 2 * 4 * attentions > 0
    images = rendered(model, True, noise)
    grads = torch.autograd.grad(images.square().mean(), parameters)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_an_adapter_starts_from_its_seed_alone(tiny_folder):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        drawn.append(dno.load_model(str(tiny_folder)).add_adapter(2, seed=seed, target_modules=["to_q"]))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_without_the_adapter_the_model_is_as_before(tiny_model):
    noise = randn(STEPS + 1, 2, 4, 8, 8)
    with torch.no_grad():
        before = rendered(tiny_model, True, noise)
        with tiny_model.without_adapter():
            assert torch.equal(rendered(tiny_model, True, noise), before), "there is none yet"
        parameters = tiny_model.add_adapter(2)
        fill(parameters)
        changed = rendered(tiny_model, True, noise)
        parameters[0].requires_grad_(False)
        with tiny_model.without_adapter():
            assert torch.equal(rendered(tiny_model, True, noise), before)
        assert torch.equal(rendered(tiny_model, True, noise), changed) and not torch.equal(changed, before)
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("kind", ["tiny_folder", "tiny_xl_folder"])
def test_a_saved_adapter_is_a_lora_that_can_be_loaded(request, tmp_path, kind, alpha):
    folder = request.getfixturevalue(kind)
    model, noise = dno.load_model(str(folder)), randn(STEPS + 1, 2, 4, 8, 8)
    fill(model.add_adapter(3, alpha))
    model.save_adapter(tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".safetensors" and all(key.startswith("unet.") for key in load_file(file))
    with torch.no_grad():
        expected = rendered(model, True, noise)
        plain = rendered(dno.load_model(str(folder)), True, noise)
        for lora in (tmp_path, file):
            loaded = rendered(dno.load_model(str(folder), lora=str(lora)), True, noise)
            torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2


# float16.


def test_in_float16_weights_and_embeddings_are_not_trained(tiny_folder):
    """Each image's gradient has a scale of its own inside, which a sum over images cannot be rid of."""
    half = dno.load_model(str(tiny_folder), torch.float16)
    with pytest.raises(UserError, match="float16 only the noise .* use bf16 or fp32"):
        half.add_adapter(2)
    conditioning, x = half.encode_prompts(["white duck"]), randn(1, 4, 8, 8)
    half.denoise(x, half.point(500), conditioning, 5.0)
    for tensor in (half.network.conv_in.weight, conditioning.positive["encoder_hidden_states"]):
        tensor.requires_grad_()
        with pytest.raises(UserError, match="float16"):
            half.denoise(x, half.point(500), conditioning, 5.0)
        with torch.no_grad():
            half.denoise(x, half.point(500), conditioning, 5.0)
        tensor.requires_grad_(False)


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 5, 3), (2, 3, 4, 4, 2)])
def test_float16_gradients_are_scaled_for_outputs_of_any_rank(shape):
    network = torch.nn.Linear(1, 1, dtype=torch.float16).requires_grad_(False)
    network.dtype = torch.float16
    x = randn(2, 3, 4, 4).requires_grad_()
    size = torch.Size(shape).numel() // 2

    def function(x):
        return (x * x).flatten(1).sum(1, keepdim=True).expand(2, size).reshape(shape) / size

    output = _in_precision_of(network, function, x, {})
    weights = torch.tensor([1e-9, 1e9]).view(-1, *[1] * (len(shape) - 1))
    (grad,) = torch.autograd.grad((weights * output).sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach() * torch.tensor([1e-9, 1e9]).view(2, 1, 1, 1), rtol=1e-2, atol=0)


# Networks that cannot be checkpointed or compiled by block.


@pytest.mark.parametrize("part", ["network", "vae"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_has_no_blocks_to_checkpoint_is_recomputed_whole(exact, monkeypatch, part, recompute):
    noise = randn(STEPS + 1, 2, 4, 8, 8, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(rendered(exact, recompute, noise).square().mean(), noise)
    module, latents = getattr(exact, part), noise[0]
    monkeypatch.setattr(type(module), "_supports_gradient_checkpointing", False)
    conditioning = exact.encode_prompts(["white duck", "red car"])

    def once():
        return exact.decode(latents) if part == "vae" else exact.denoise(latents, exact.point(500), conditioning, 3.0)

    kept = graph_bytes(once)
    exact.checkpoint_blocks()
    (grad,) = torch.autograd.grad(rendered(exact, recompute, noise).square().mean(), noise)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    assert not module.is_gradient_checkpointing and graph_bytes(once) < 0.2 * kept
    exact.checkpoint_blocks(False)
    assert graph_bytes(once) == kept


def test_a_network_without_named_blocks_is_compiled_whole(tiny_model, monkeypatch):
    conditioning, x = tiny_model.encode_prompts(["white duck"]), randn(1, 4, 8, 8)
    expected = tiny_model.denoise(x, tiny_model.point(500), conditioning, 5.0)
    monkeypatch.setattr(type(tiny_model.network), "_repeated_blocks", None)
    torch._dynamo.utils.counters.clear()
    tiny_model.compile_blocks(backend="eager")
    torch.testing.assert_close(tiny_model.denoise(x, tiny_model.point(500), conditioning, 5.0), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_network_is_the_part_that_the_class_names(tiny_model):
    class Transformer(type(tiny_model)):
        network_part = "transformer"

    tiny_model.pipe.transformer = tiny_model.pipe.unet
    assert Transformer(tiny_model.pipe, "transformer").network is tiny_model.pipe.transformer
    assert [tiny_model.needs_negative(scale) for scale in (0, 1, 1.5)] == [False, False, True]


def test_halves_that_differ_in_what_has_no_batch_are_not_joined():
    positive, negative = ({"a": torch.zeros(2, 3), "size": Shared((n, n))} for n in (64, 16))
    with pytest.raises(ValueError, match="differ in what has no batch; use split_guidance"):
        Conditioning(positive, negative).doubled()
    with pytest.raises(ValueError, match="differ"):
        Conditioning({"a": torch.zeros(2, 3), "b": None}, {"a": torch.zeros(2, 3), "b": torch.zeros(2)}).doubled()
    same = Conditioning(positive, {**negative, "size": Shared((64, 64))}).doubled()
    assert len(same) == 4 and same.positive["size"] == Shared((64, 64))


def test_rows_may_be_a_tensor():
    conditioning = Conditioning({"a": torch.arange(6).view(3, 2), "b": ["x", "y", "z"]})
    taken = conditioning[torch.tensor([2, 0])].positive
    assert taken["a"].tolist() == [[4, 5], [0, 1]] and taken["b"] == ["z", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "the rank of the adapter is 0; expected a whole number"),
        ({"rank": 2, "target_modules": "to_z"}, "the network has no layer 'to_z'"),
    ],
)
def test_adapters_that_cannot_be_are_one_line_and_leave_the_model_usable(tiny_model, arguments, message):
    with pytest.raises(UserError, match=message):
        tiny_model.add_adapter(**arguments)
    assert tiny_model.add_adapter(2, target_modules="to_q")
    with pytest.raises(UserError, match="has an adapter already"):
        tiny_model.add_adapter(2)


@pytest.mark.parametrize("setting", [{"scaling_factor": 0}, {"latents_mean": [0.0] * 4}], ids=str)
def test_a_vae_whose_scale_is_not_known_is_refused(tiny_model, setting):
    tiny_model.vae.register_to_config(**setting)
    with pytest.raises(UserError, match="the VAE"):
        type(tiny_model)(tiny_model.pipe, "mine")
