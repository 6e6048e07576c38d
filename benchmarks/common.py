"""What the benchmarks share: the model to measure, the clock, and the tables that they print."""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dno.models.loading import FAMILIES, load_model  # noqa: E402
from dno.models.quiet import quiet  # noqa: E402
from dno.models.specs import model_spec, resolve_device, resolve_precision  # noqa: E402
from dno.resume import prepare  # noqa: E402
from dno.task import Loaded, Task  # noqa: E402

# The sizes in the published configurations of Stable Diffusion 1.5 and of SDXL base; what is left out is the default.
SD15_UNET = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}  # fmt: skip
SDXL_UNET = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD15_VAE = {
    "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SDXL_VAE = {**SD15_VAE, "sample_size": 1024, "scaling_factor": 0.13025}
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Architecture:
    """What `random_model` builds: the configurations of a UNet and of a VAE."""

    title: str
    unet: dict
    vae: dict


ARCHITECTURES = {"sd15": Architecture("SD 1.5", SD15_UNET, SD15_VAE), "sdxl": Architecture("SDXL", SDXL_UNET, SDXL_VAE)}
_TINY_UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16,
}  # fmt: skip
_TINY_VAE = {
    "sample_size": 16, "block_out_channels": (8, 8), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TINY_ARCHITECTURES = {
    "sd15": Architecture("tiny SD", {**_TINY_UNET, "attention_head_dim": 4}, _TINY_VAE),
    "sdxl": Architecture(
        "tiny SDXL",
        {
            **_TINY_UNET, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 10 + 6 * 4,
        },
        {**_TINY_VAE, "scaling_factor": 0.13025},
    ),
}  # fmt: skip


def add_model_arguments(parser):
    """The flags of `benchmark_model`."""
    parser.add_argument("--model", default="sprites", help="as the scripts' --model (default: sprites)")
    parser.add_argument(
        "--random_weights", action="store_true",
        help="Stable Diffusion 1.5's published architecture with random weights, if its own cannot be had",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")


def benchmark_model(args):
    """The model that the flags ask for, on its device."""
    device = resolve_device(args.device)
    dtype = resolve_precision(args.precision, device)
    if args.random_weights:
        return random_model(ARCHITECTURES["sd15"], dtype, device)
    return load_model(args.model, dtype, device)


def sampling_settings(args):
    """Steps and guidance of the flags, or the model's own."""
    spec = model_spec("" if args.random_weights else args.model)
    return {"num_steps": args.num_steps or spec.num_steps, "guidance_scale": spec.guidance_scale}


def make_task(method, model, **settings):
    """The task of a run of the method, as `align` makes it. model: loaded; it keeps its text encoder."""
    start = prepare({"model": model.name, "output": None, **settings}, method)
    return Task(start.settings, needs_gradient=start.method.needs_gradient(start.settings), loaded=Loaded(model))


def random_model(architecture, dtype, device):
    """A frozen model with random weights, built on the device and in the precision at once: it costs what the real one
    costs, and shows nothing.

    architecture: one of `ARCHITECTURES`. On the device "meta" it has shapes only, and costs nothing.
    Its text encoders have one layer, and sprites' tokenizer padded to 77 tokens: the words do not matter here.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    with quiet():
        with torch.device("meta"):
            networks = diffusers.UNet2DConditionModel(**architecture.unet), diffusers.AutoencoderKL(**architecture.vae)
        unet, vae = (_filled(network, dtype, device) for network in networks)
        tokenizer = CLIPTokenizer.from_pretrained(ROOT / "sprites" / "tokenizer", model_max_length=77)
        config, parts = unet.config, {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(**SCHEDULER)}

        def text_encoder(cls, width):
            return _text_encoder(cls, width, tokenizer, dtype, device)

        if config.addition_embed_type == "text_time":  # two encoders: their embeddings joined, and the second's pooled
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pipe = diffusers.StableDiffusionXLPipeline(
                text_encoder=text_encoder(CLIPTextModel, config.cross_attention_dim - pooled), tokenizer=tokenizer,
                text_encoder_2=text_encoder(CLIPTextModelWithProjection, pooled), tokenizer_2=tokenizer,
                add_watermarker=False, **parts,
            )  # fmt: skip
        else:
            pipe = diffusers.StableDiffusionPipeline(
                text_encoder=text_encoder(CLIPTextModel, config.cross_attention_dim), tokenizer=tokenizer,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts,
            )  # fmt: skip
        return FAMILIES[type(pipe).__name__](pipe, "random")


def _text_encoder(cls, width, tokenizer, dtype, device):
    from transformers import CLIPTextConfig

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, projection_dim=width,
        num_hidden_layers=1, num_attention_heads=1, **ids,
    )  # fmt: skip
    with torch.device(device):
        return cls(config).to(dtype)


@torch.no_grad()
def _filled(network, dtype, device):
    """The network with random weights of a size that keeps the size of what passes through them."""
    network = network.to(dtype).to_empty(device=device)
    assert not list(network.buffers()), "a buffer would be left unfilled"
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)  # one over the root of what is summed up
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)
    return network


def synchronize(device):
    """Wait for the device, so that a clock that is read next has seen its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine(device):
    """One line on what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def markdown_table(header, rows):
    """A markdown table as one string; the first column is text, the others are numbers."""
    lines = [header, *rows]
    lines = [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
    return "\n".join([lines[0], "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|", *lines[1:]])


def print_table(header, rows):
    """Print `markdown_table`."""
    print(markdown_table(header, rows), flush=True)
