"""What a reward costs at full size: seconds and peak memory of one forward and backward pass.

    python benchmarks/reward_cost.py                                  # every reward, 512 and 1024 px, fp32
    python benchmarks/reward_cost.py --reward hps pick --reward_precision bf16 --reward_checkpointing
    python benchmarks/reward_cost.py --reward hps --hps_path HPS_v2_compressed.pt      # the real weights

If no path is given, random weights of the published architecture are written to a temporary folder in the
published layout (up to 4 GB, removed at the end) and loaded through the public path: they cost what the real
ones do. Each reward runs in a separate process. The columns:

    load       seconds to build the reward from files that are in the disk cache
    weights    the tensors that the reward holds after the first prompt, its text tower freed
    forward    seconds from images to losses, the prompt known (the median of --repeats)
    backward   seconds from losses to the images' gradient
    peak       memory that a forward and backward pass needs on top
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards

REWARDS = ("aesthetic", "hps", "pick", "clip", "imagereward", "sprites")
MODELS = {
    "aesthetic": ("clip", "aesthetic"),
    "imagereward": ("imagereward", "bert"),
}  # others: of their own name
CLIP_L = {"projection_dim": 768,
          "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12, "eos_token_id": 49407},
          "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                            "num_attention_heads": 16, "patch_size": 14}}  # fmt: skip
CLIP_H = {"projection_dim": 1024,
          "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "hidden_act": "gelu", "eos_token_id": 49407},
          "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                            "num_attention_heads": 16, "hidden_act": "gelu", "patch_size": 14}}  # fmt: skip
ROW = "{reward:12} {px:5d} {load:8.1f} {weights:11.2f} {forward:10.3f} {backward:11.3f} {peak:8.2f}"
PROMPT = "a white duck on a lake"


def main():
    args = parse()
    devices = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    print(f"{devices}, torch {torch.__version__}, {args.reward_precision}, batch {args.batch}"
          f"{', checkpointed' if args.reward_checkpointing else ''}")  # fmt: skip
    print("reward        px    load s  weights GB  forward s  backward s  peak GB", flush=True)
    results = []
    context = multiprocessing.get_context("spawn")
    for name in args.reward:
        with tempfile.TemporaryDirectory(prefix="reward-cost-") as folder, context.Pool(1) as pool:
            try:
                rows = pool.apply(measure, (name, args, Path(folder)))
            except rewards.RewardError as error:
                print(f"{name:12} left out: {error}", flush=True)
                continue
            for row in rows:
                results.append(row)
                print(ROW.format(**row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def parse():
    about, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=about, epilog=details,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--reward", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[512, 1024], help="side of the images, in pixels"
    )
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures into this file")
    rewards.add_arguments(parser)
    return parser.parse_args()


def measure(name, args, folder):
    """The rows of one reward; runs in a separate process."""
    torch.set_num_threads(args.threads)
    for key in MODELS.get(name, (name,)):
        model = rewards.MODELS[key]
        if getattr(args, model.setting) is None and model.repo is not None:
            (folder / key).mkdir()
            write_random(key, folder / key)
            setattr(args, model.setting, folder / key)
    rewards.configure_from(args)
    start = time.perf_counter()
    loss_fn = rewards.RFUNCTIONS[name](rewards.PRECISIONS[args.reward_precision], args.device)
    load = time.perf_counter() - start
    with torch.no_grad():
        loss_fn(torch.zeros(1, 3, 64, 64, device=args.device), [PROMPT])
    weights = tensors()
    rows = []
    for px in args.sizes:
        forward, backward, peak = [], [], 0
        for _ in range(args.repeats):
            images = (torch.rand(args.batch, 3, px, px, device=args.device) * 2 - 1).requires_grad_(True)
            reset_peak(args.device)
            rest, start = memory(args.device), clock(args.device)
            losses = loss_fn(images, [PROMPT] * args.batch)
            middle = clock(args.device)
            losses.sum().backward()
            end = clock(args.device)
            assert images.grad.isfinite().all() and images.grad.any()
            forward.append(middle - start)
            backward.append(end - middle)
            peak = max(peak, memory(args.device, peak=True) - rest)
        rows.append({"reward": name, "px": px, "load": load, "weights": weights / 1e9,
                     "forward": statistics.median(forward), "backward": statistics.median(backward),
                     "peak": peak / 1e9, "precision": args.reward_precision, "batch": args.batch,
                     "checkpointing": args.reward_checkpointing})  # fmt: skip
    return rows


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tensors():
    """Bytes of all live tensors."""
    gc.collect()
    found = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in found}.values())


def memory(device, peak=False):
    """Bytes in use: of the GPU's tensors, or of this process (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def reset_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that is kept for later would hide the peak
        Path("/proc/self/clear_refs").write_text("5")


# --- random weights in the published layout -----------------------------------------------------------------


def write_random(key, folder):
    if key in ("clip", "pick"):
        write_clip(folder, CLIP_L if key == "clip" else CLIP_H)
    elif key == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "white", "duck", "on", "lake"]
        words += [f"word{i}" for i in range(30522 - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    elif key == "aesthetic":
        from rewards.towers import LinearHead

        torch.save(LinearHead(768).state_dict(), folder / rewards.MODELS[key].files[0])
    elif key == "hps":
        import open_clip

        with torch.device("meta"):
            model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        torch.save({"state_dict": random_state(model)}, folder / rewards.MODELS[key].files[0])
    else:
        from rewards import imagereward

        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                  "num_attention_heads": 16, "image_size": 224, "patch_size": 16}  # fmt: skip
        with torch.device("meta"):
            model = imagereward.ImageReward(vision, imagereward.TEXT_CONFIG)
        state = {original_name(name): value for name, value in random_state(model).items()}
        torch.save(state, folder / rewards.MODELS[key].files[0])


def write_clip(folder, config):
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**config)
    with torch.device("meta"):
        model = CLIPModel(config)
    save_file(random_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def random_state(model):
    """Weights of a size at which neither the signal nor the gradient fades."""
    state = {}
    for name, value in model.state_dict().items():
        if value.ndim == 0:
            state[name] = torch.tensor(100.0).log()  # CLIP's logit scale
        elif value.ndim == 1:
            state[name] = torch.full(value.shape, float("norm" in name.lower() or "ln_" in name))
            state[name] *= name.endswith("weight")
        else:
            state[name] = torch.empty(value.shape).normal_(0, 0.02)
    return state


def original_name(name):
    """The name in ImageReward.pt of a weight of rewards.imagereward.ImageReward."""
    from rewards.imagereward import VISION_NAMES

    if not name.startswith("vision."):
        return name if name.startswith("mlp.") else "blip.text_encoder." + name.removeprefix("text.")
    name = "." + name.removeprefix("vision.").replace("post_layernorm.", "norm.")
    for original, ours in reversed(VISION_NAMES):
        name = name.replace(ours, original)
    return "blip.visual_encoder" + name


if __name__ == "__main__":
    main()
