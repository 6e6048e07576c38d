"""The stages `unet` and `unet-xl` of train.py: networks that predict the noise in latents from captions."""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sprites import networks
from sprites.data import WHOLE, caption_ids, encode_changed_scenes, encode_scenes, load_average, load_latents
from sprites.scenes import PAIRS
from sprites.tokens import build_tokenizer
from sprites.training import adamw, fit, generator

ALPHA_BAR = networks.scheduler().alphas_cumprod


def train_unet(args):
    """Predict the noise in latents from captions: text encoder and UNet together."""
    encode_scenes(args)
    on_all_processes(train_unet_process, args)


def train_unet_xl(args):
    """The same for sprites-xl, which also hears what was done to a picture: original size and crop."""
    encode_scenes(args)
    encode_changed_scenes(args)
    on_all_processes(train_unet_xl_process, args)


def train_unet_process(rank, args, meeting):
    """One process of `train_unet`; they meet at the address `meeting`."""
    world, steps = join(rank, args, meeting), args.steps or 6600
    latents = load_latents(args)["latents"]
    batch = (args.batch or 32) // world
    tokenizer = build_tokenizer()
    tokens, nothing = caption_ids(tokenizer)

    def loss(model, step, gen):
        index = torch.randint(len(latents), (batch,), generator=gen)
        x0, pairs = latents[index].float(), index % len(PAIRS)
        ids = tokens[(torch.rand(batch, generator=gen) < 0.1).long(), pairs]
        # No caption for a tenth: the other half of classifier-free guidance.
        ids = torch.where(torch.rand(batch, 1, generator=gen) < 0.1, nothing, ids)

        def predict(x, t):
            return model["unet"](x, t, model["text_encoder"](ids)[0]).sample

        return denoising_loss(predict, x0, gen, (args.seed + 3, step), rank, world)

    torch.manual_seed(args.seed + 3)
    model = networks.text_to_latents(tokenizer)
    fit(model, loss, steps, [adamw(model.parameters(), 1e-3)], args.work / "unet.pt", seed=args.seed + 3,
        stop=args.stop, ema=0.999, warmup=200, flat=0.45, rank=rank, world=world)  # fmt: skip
    leave(world)


def train_unet_xl_process(rank, args, meeting):
    """One process of `train_unet_xl`."""
    world, steps = join(rank, args, meeting), args.steps or 4200
    plain, changed = load_latents(args)["latents"], torch.load(args.work / "latents-xl.pt", weights_only=True)
    latents = torch.cat([plain, changed["latents"]])  # a third of them small originals and crops
    time_ids = torch.cat([torch.tensor(WHOLE).expand(len(plain), -1), changed["time_ids"]])
    pairs = torch.cat([torch.arange(len(part)) for part in (plain, changed["latents"])]) % len(PAIRS)
    batch = (args.batch or 32) // world
    tokenizer = build_tokenizer()
    tokens, nothing = caption_ids(tokenizer)

    def loss(model, step, gen):
        index = torch.randint(len(latents), (batch,), generator=gen)
        ids = tokens[(torch.rand(batch, generator=gen) < 0.1).long(), pairs[index]]
        # No caption: mostly as zeros, which is what the pipeline takes where no negative prompt is given.
        empty = torch.rand(batch, 1, generator=gen)
        ids = torch.where(empty < 0.03, nothing, ids)

        def predict(x, t):
            hidden, pooled = networks.encode_xl(model, ids)
            added = {"text_embeds": pooled * (empty < 0.9), "time_ids": time_ids[index]}
            return model["unet"](x, t, hidden * (empty < 0.9)[..., None], added_cond_kwargs=added).sample

        return denoising_loss(predict, latents[index].float(), gen, (args.seed + 4, step), rank, world)

    torch.manual_seed(args.seed + 4)
    model = networks.text_to_latents_xl(tokenizer)
    networks.warm_start_xl(model, load_average(args, "unet"), load_average(args, "clip"), tokens.flatten(0, 1))
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(model, loss, steps, [adamw(trained, 1e-3)], args.work / "unet-xl.pt", seed=args.seed + 4,
        stop=args.stop, ema=0.999, warmup=200, flat=0.3, rank=rank, world=world)  # fmt: skip
    leave(world)


def denoising_loss(predict, x0, gen, key, rank, world):
    """noise_loss of predict(x, t), where x (B, 4, 16, 16) are the latents x0 with noise and t (B,) their timesteps.

    key: numbers that name this step for all processes together: timesteps are stratified over the whole batch.
    """
    offset = torch.rand((), generator=generator(*key))
    t = (torch.arange(len(x0)) * world + rank + offset) / (len(x0) * world) * len(ALPHA_BAR)
    t = t.long().clamp(max=len(ALPHA_BAR) - 1)
    eps = torch.randn(x0.shape, generator=gen)
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    with torch.autocast("cpu", torch.bfloat16):
        error = predict(x, t) - eps
    return noise_loss(error.float(), a.flatten())


def noise_loss(error, alpha_bar):
    """Squared error of the noise, min-SNR weighted, and on noisy inputs its coarsest frequencies once more.

    The brightness of a whole picture is one number among a thousand, decided where there is hardly any
    signal; the plain mean gives it too little weight to be learned in a short run.
    error: (B, 4, 16, 16). alpha_bar: (B,). SNR is that of latents whose std is networks.LATENT_STD.
    """
    snr = networks.LATENT_STD**2 * alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / snr
    mean = error.mean((2, 3)).square().mean(1)
    coarse = F.adaptive_avg_pool2d(error, 4).square().mean((1, 2, 3))
    low = 0.02 * (256 * mean + 16 * coarse) * (snr < 0.5)
    return (weight * error.square().mean((1, 2, 3)) + low).mean()


# --- processes --------------------------------------------------------------------------------------------


def on_all_processes(function, args):
    """Call function(rank, args, meeting) in each of --processes processes."""
    if args.processes == 1:
        return function(0, args, None)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(function, (args, f"file://{folder}/store"), args.processes)


def join(rank, args, meeting):
    """Meet the other processes at the address `meeting`; the number of processes."""
    torch.set_num_threads(args.threads)
    if args.processes > 1:
        timeout = timedelta(minutes=5)
        dist.init_process_group("gloo", meeting, rank=rank, world_size=args.processes, timeout=timeout)
    return args.processes


def leave(world):
    if world > 1:
        dist.destroy_process_group()
