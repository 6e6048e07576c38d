"""The networks of the embedded model, as diffusers and transformers know them, and its latent space."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sprites.scenes import SIZE
from sprites.tokens import MAX_LENGTH

WIDTH = 96  # of the text encoder and of both of CLIP's towers
SCALING = 0.18215  # Stable Diffusion's own, so that nothing that assumes it goes wrong
# Std of the scaled latents. SD 1.5's schedule ends at sqrt(alpha_bar) = 0.068, not 0: what is left of the
# signal tells the network how bright the picture is, and a sampler that starts from pure noise finds no such
# hint. The 16 x 16 latents' mean has a noise of 1/16; at std 1 the hint is almost as strong and the samples'
# brightness varies too little (an earlier model: 0.82 of the data's). At 0.5 the hint drowns.
LATENT_STD = 0.5
TIME_WIDTH = 32  # sprites-xl: width of the sinusoids of each of the six numbers of the micro-conditioning


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


def text_config(tokenizer, layers=2):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
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


def text_to_latents_xl(tokenizer):
    """The networks of sprites-xl: `text_encoder`, `text_encoder_2` and `unet` (6.3 M).

    Stable Diffusion XL reads both text encoders before their last layer. So the first has a third layer, which is
    never read and not trained; the second is the text tower of `clip` and is frozen as a whole.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        use_linear_projection=True,
        norm_num_groups=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTH + 6 * TIME_WIDTH,
    )
    first = CLIPTextModel(text_config(tokenizer, layers=3))
    second = CLIPTextModelWithProjection(text_config(tokenizer)).requires_grad_(False)
    first.encoder.layers[-1].requires_grad_(False)
    first.final_layer_norm.requires_grad_(False)
    return nn.ModuleDict({"text_encoder": first, "text_encoder_2": second, "unet": unet})


def encode_xl(model, ids):
    """What Stable Diffusion XL makes of token ids (B, 16): hidden states (B, 16, 192), pooled embedding (B, 96)."""
    first, second = (model[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2"))
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


@torch.no_grad()
def warm_start_xl(model, small, clip, ids):
    """Let `text_to_latents_xl` begin as the finished model it grows out of.

    small, clip: state dicts of `text_to_latents` and of `clip`. ids: token ids (N, 16) of the captions.
    Whatever is new adds nothing at first: the embedding of pooled text and micro-conditioning, the second block of
    each transformer. The hidden states are those of two encoders, without the final normalization that `small` was
    trained on; a linear map, fitted over the captions, gives its inputs back and goes into the cross-attention.
    """
    own = model.state_dict()
    start = small | {f"text_encoder_2.{name}": value for name, value in clip.items()}
    for name in own.keys() & start.keys():
        if start[name].numel() == own[name].numel():  # 1 x 1 convolutions have become linear layers
            own[name].copy_(start[name].view_as(own[name]))

    hidden, _ = encode_xl(model, ids)
    normalized = model["text_encoder"].final_layer_norm(hidden[..., :WIDTH])
    restore = torch.linalg.lstsq(hidden.flatten(0, 1), normalized.flatten(0, 1), driver="gelsd").solution  # (192, 96)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and name in small:
            parameter.copy_(small[name] @ restore.T)
        new = ".transformer_blocks.1." in name and (".to_out.0." in name or ".ff.net.2." in name)
        if new or "add_embedding.linear_2." in name:
            parameter.zero_()


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
