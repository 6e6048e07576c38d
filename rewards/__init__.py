"""The rewards that `--objective` and `--evaluate` know by name.

To add one, write a loss factory in `rewards_zoo.py` and give it a row here. See `rewards_zoo` for the contract and
`weights` for where weights come from.
"""

from .contract import is_differentiable  # noqa: F401
from .rewards_zoo import *
from .weights import (  # noqa: F401
    MODELS,
    PRECISIONS,
    RewardError,
    add_arguments,
    configure,
    configure_from,
    loaded_files,
    recorded,
)

RFUNCTIONS = {
    "aesthetic": aesthetic_loss_fn,
    "hps": hps_loss_fn,
    "hps_v2.1": hps_v21_loss_fn,
    "pick": pick_loss_fn,
    "clip": clip_loss_fn,
    "imagereward": imagereward_loss_fn,
    "sprites": sprites_loss_fn,
    "white": white_loss_fn,
    "black": black_loss_fn,
    "contrast": contrast_loss_fn,
    "jpeg": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}
for _factory in RFUNCTIONS.values():  # a row is differentiable unless it says that it is not
    vars(_factory).setdefault("differentiable", True)
