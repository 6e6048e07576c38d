"""Align Stable Diffusion 1.x / 2.x to a differentiable reward by Direct Noise Optimization.

commands to try:
  python dno_stable_diffusion.py --prompt "white duck" --objective black --lr 0.001
  python dno_stable_diffusion.py --prompt "white duck" --objective black --gamma 1
  python dno_stable_diffusion.py --model sprites --prompt "white duck" --objective black --gamma 10 --lr 0.005
"""

from dno.cli import main

if __name__ == "__main__":
    main(__doc__, prefix="SD", prompt="white duck", objective=("black",), opt_steps=100, seed=0, lr=0.01)
