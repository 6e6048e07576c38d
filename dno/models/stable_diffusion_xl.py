"""Stable Diffusion XL: what it has beyond Stable Diffusion, whose sampler, guidance and decoding it shares."""

import torch

from dno.errors import UserError
from dno.models.stable_diffusion import Conditioning, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL, frozen, from a diffusers `StableDiffusionXLPipeline`.

    Two text encoders, whose embeddings are joined; the second one's pooled embedding; and, beside them, the sizes that
    an image of the training set had before it was scaled and cropped, and after.
    Source: Podell et al. 2023 (arXiv 2307.01952), section "Micro-Conditioning".
    """

    pipeline_class = "StableDiffusionXLPipeline"
    pipeline_options = {"add_watermarker": False}
    text_encoders, tokenizers = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
    size_conditioned = True
    vae_obeys_force_upcast = True  # the published VAE overflows in float16

    def _check(self, pipe):
        super()._check(pipe)
        config, encoders = pipe.unet.config, [getattr(pipe, part) for part in self.text_encoders]
        # The refiner has one text encoder, and an aesthetic score in the place of the target's height and width.
        if None in encoders or config.projection_class_embeddings_input_dim != (
            encoders[1].config.projection_dim + 6 * (config.addition_time_embed_dim or 0)
        ):
            raise UserError(
                "the model's UNet does not take two text encoders and six sizes, as SDXL's base model does; a refiner "
                "cannot make images of noise alone"
            )

    @torch.no_grad()
    def encode_prompts(
        self, prompts, negative_prompt=None, *, guided=True,
        original_size=None, crops_coords_top_left=(0, 0), target_size=None,
    ):  # fmt: skip
        """Conditioning of B prompts and of sizes in pixels, the same for the negative prompt.

        negative_prompt: None is all zeros where the model's configuration says so, else the empty prompt.
        original_size: (height, width) that the image is said to have had; small ones make it look so.
        crops_coords_top_left: (top, left) of what is said to have been cut off; (0, 0) centres the subject.
        target_size: (height, width) that it was trained for. None is the image's own, here and for original_size.
        guided, warnings: as for Stable Diffusion.
        """
        embeddings = self._encode(prompts, negative_prompt, guided)
        return Conditioning(*embeddings, sizes=(original_size, crops_coords_top_left, target_size))

    def _more_conditions(self, x, conditioning):
        image = [side * self.scale_factor for side in x.shape[2:]]
        original, crop, target = conditioning.sizes
        # float32 in every precision: bfloat16 has no 1022. Filled on the device, as the timestep is.
        numbers = [*(original or image), *crop, *(target or image)]
        time_ids = torch.stack([torch.full((len(x),), float(n), device=x.device) for n in numbers], dim=1)  # (B, 6)
        return {"added_cond_kwargs": {"text_embeds": conditioning.pooled, "time_ids": time_ids}}
