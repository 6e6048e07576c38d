"""The embedded model: a small Stable Diffusion, the scenes it was trained on, and its two judges.

Importing this package does nothing. The pipeline's weights lie beside this file, so
`StableDiffusionPipeline.from_pretrained("sprites")` loads it; README.md is the model card.
"""
