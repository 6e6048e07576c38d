"""Align Stable Diffusion XL to a differentiable reward by Direct Noise Optimization.

commands to try:
  python dno_sdxl.py --prompt "white duck" --objective black --lr 0.001
  python dno_sdxl.py --prompt "white duck" --objective black --gamma 1 --checkpointing block --split_guidance
  python dno_sdxl.py --model stabilityai/sdxl-turbo --num_steps 4 --prompt "white duck" --objective pick
  python dno_sdxl.py --model sprites-xl --prompt "white duck" --objective black --gamma 10 --lr 0.005
"""

from dno.cli import main
from dno.models.specs import DEFAULT_SDXL_MODEL

if __name__ == "__main__":
    main(
        __doc__, prefix="SDXL", model=DEFAULT_SDXL_MODEL, prompt="white duck", objective=("black",), opt_steps=100,
        seed=0, lr=0.01,
    )  # fmt: skip
