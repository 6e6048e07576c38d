"""The embedded models: a small Stable Diffusion and a Stable Diffusion XL, their scenes, and two judges.

Importing this package does nothing. The pipelines' weights lie beside this file:
`StableDiffusionPipeline.from_pretrained("sprites")` and `StableDiffusionXLPipeline.from_pretrained("sprites/xl")`
load them; README.md is the model card.
"""
