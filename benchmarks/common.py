"""What the benchmarks share: the model to measure, the clock, and the tables that they print."""

import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dno.loading import load_model, resolve_device, resolve_precision  # noqa: E402
from dno.models import StableDiffusion, model_spec  # noqa: E402
from dno.quiet import quiet  # noqa: E402


def add_model_arguments(parser):
    """The flags of `benchmark_model`."""
    parser.add_argument("--model", default="sprites", help="as the scripts' --model (default: sprites)")
    parser.add_argument(
        "--random_weights", action="store_true",
        help="Stable Diffusion 1.5's published architecture with random weights, where its own cannot be had",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")


def benchmark_model(args):
    """The model that the flags ask for, on its device."""
    device = resolve_device(args.device)
    dtype = resolve_precision(args.precision, device)
    return random_stable_diffusion(dtype, device) if args.random_weights else load_model(args.model, dtype, device)


def sampling_settings(args):
    """Steps and guidance of the flags, or the model's own."""
    spec = model_spec("" if args.random_weights else args.model)
    return {"num_steps": args.num_steps or spec.num_steps, "guidance_scale": spec.guidance_scale}


def random_stable_diffusion(dtype, device):
    """Stable Diffusion 1.5's sizes with random weights: it costs what the real one costs, and shows nothing.

    The sizes are those of the published unet, vae, text_encoder and scheduler configurations. Its tokenizer is that of
    sprites, padded to 77 tokens, since the words do not matter here.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(
            sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "sprites" / "tokenizer", model_max_length=77),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
            clip_sample=False, set_alpha_to_one=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with quiet():
        return StableDiffusion(pipe.to(device, dtype), "random weights")


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


def print_table(header, rows):
    """A markdown table; the first column is text, the others are numbers."""
    print(f"| {' | '.join(header)} |")
    print("|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    sys.stdout.flush()
