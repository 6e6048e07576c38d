"""Direct Noise Optimization: align a text-to-image model to a reward by optimizing the noise that it samples from.

    from dno import align
    result = align(model="sprites", prompt="white duck", objective="black", gamma=10)

Source: Tang et al. 2024, "Tuning-Free Alignment of Diffusion Models with Direct Noise Optimization", arXiv 2405.18881.
"""

__all__ = ["Alignment", "UserError", "align", "load_model"]

_HOME = {
    "align": "dno.alignment", "Alignment": "dno.alignment", "load_model": "dno.models.loading",
    "UserError": "dno.errors",
}  # fmt: skip


def __getattr__(name):
    # Importing `dno` alone loads nothing; torch and diffusers come with the first name that needs them.
    if name not in _HOME:
        raise AttributeError(f"module 'dno' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
