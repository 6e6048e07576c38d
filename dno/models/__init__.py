"""Text-to-image models: a base class, one file per group of families, one row per model.

specs.py              the rows: where a model is and what it wants; names of precisions and devices
loading.py            names to frozen models; every failure is one `UserError`
conditioning.py       what the network is told besides the noisy latents
base.py               `TextToImage`: what the families share
stable_diffusion.py   Stable Diffusion 1.x, 2.x and XL, and turbo
"""
