"""Align Stable Diffusion to any reward by Direct Noise Optimization, with a gradient estimated from perturbed samples.

commands to try:
  python dno_stable_diffusion_nograd.py --model sprites --prompt "white duck" --objective jpeg
  python dno_stable_diffusion_nograd.py --objective path/to/reward.py:my_loss_fn --num_samples 32 --gamma 1
  accelerate launch --num_processes 2 dno_stable_diffusion_nograd.py --prompt "white duck" --objective jpeg --lr 0.01
  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 dno_stable_diffusion_nograd.py --model sprites --objective jpeg
"""

from dno.cli import main

if __name__ == "__main__":
    main(
        __doc__, prefix="SD-NoGrad", estimator="hybrid", prompt="black duck", objective=("jpeg",), opt_steps=50,
        seed=123, lr=0.01,
    )  # fmt: skip
