"""The rewards that `--objective` and `--evaluate` know by name.

To add one, write a loss factory in `rewards_zoo.py` and give it a row here. See `rewards_zoo` for the contract.
"""

from .rewards_zoo import *

RFUNCTIONS = {
    "white": white_loss_fn,
    "black": black_loss_fn,
    "contrast": contrast_loss_fn,
    "jpeg": jpeg_compressibility,
}
