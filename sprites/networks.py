"""The networks of the embedded model, as diffusers and transformers know them, and its latent space."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from sprites.scenes import SIZE
from sprites.tokens import MAX_LENGTH

WIDTH = 96  # of the text encoder and of both of CLIP's towers
SCALING = 0.18215  # Stable Diffusion's own, so that nothing that assumes it goes wrong
# Std of the scaled latents. SD 1.5's schedule ends at sqrt(alpha_bar) = 0.068, not 0: what is left of the
# signal tells the network how bright the picture is, and a sampler that starts from pure noise finds no such
# hint. The 16 x 16 latents' mean has a noise of 1/16; at std 1 the hint is almost as strong and the samples'
# brightness varies too little (an earlier model: 0.82 of the data's). At 0.5 the hint drowns.
LATENT_STD = 0.5


def autoencoder():
    """64 x 64 pictures <-> 4 x 16 x 16 latents, 0.9 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=SCALING,
    )


def text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_to_latents(tokenizer):
    """The two networks of the last stage: `text_encoder` and `unet` (4 M parameters)."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=32,
    )
    return nn.ModuleDict({"text_encoder": CLIPTextModel(text_config(tokenizer)), "unet": unet})


def clip(tokenizer):
    """A CLIP of 0.5 M parameters; it takes images in [-1, 1]."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    text = text_config(tokenizer).to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def scheduler():
    """Stable Diffusion 1.5's noise schedule.

    The spacing is "trailing": it starts at the last timestep, where the signal is weakest and the sampler's
    pure noise is most nearly what the network was trained on.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def to_images(scenes):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_all(vae, scenes, batch=64):
    """Scaled latents of uint8 scenes (N, 64, 64, 3): float16 (N, 4, 16, 16)."""
    latents = []
    vae = vae.to(memory_format=torch.channels_last)
    for start in range(0, len(scenes), batch):
        images = to_images(scenes[start : start + batch])
        with torch.autocast("cpu", torch.bfloat16):
            latents.append((vae.encode(images).latent_dist.mean * SCALING).half())
    return torch.cat(latents)


@torch.no_grad()
def evened_autoencoder(weights, scenes, num=2048):
    """The trained autoencoder in better coordinates: latents of mean 0, uncorrelated, all of std LATENT_STD.

    latents' = M (latents - mean), with M symmetric. M goes into the 1 x 1 convolution that ends the encoder,
    its inverse into the one that begins the decoder, so pictures and format stay what they were. The
    posterior's variance, tiny everywhere, becomes its average.
    """
    vae = autoencoder()
    vae.load_state_dict(weights)
    images = to_images(scenes[:num])
    posteriors = [vae.encode(part).latent_dist for part in images.split(64)]
    latents = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1).double()  # (4, N)
    variance = torch.cat([p.var for p in posteriors]).mean((0, 2, 3)).double()
    values, vectors = torch.linalg.eigh(latents.cov())
    matrix = vectors @ torch.diag(LATENT_STD / SCALING / values.sqrt()) @ vectors.T
    inverse, mean = torch.linalg.inv(matrix), latents.mean(1)

    conv = vae.quant_conv  # outputs: 4 means, 4 log variances
    weight, bias = conv.weight[:, :, 0, 0].double(), conv.bias.double()
    conv.weight[:4, :, 0, 0] = (matrix @ weight[:4]).float()
    conv.bias[:4] = (matrix @ (bias[:4] - mean)).float()
    conv.weight[4:] = 0
    conv.bias[4:] = (matrix**2 @ variance).log().float()
    conv = vae.post_quant_conv
    conv.bias += (conv.weight[:, :, 0, 0].double() @ mean).float()
    conv.weight[:, :, 0, 0] = (conv.weight[:, :, 0, 0].double() @ inverse).float()
    return vae.eval()
