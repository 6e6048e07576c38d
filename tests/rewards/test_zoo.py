"""The public recipe for rewards, their names, and what tells a reward without a gradient."""

import subprocess
import sys
from pathlib import Path

import rewards

ROOT = Path(__file__).parents[2]
PUBLIC = ("aesthetic_loss_fn", "hps_loss_fn", "pick_loss_fn", "white_loss_fn", "black_loss_fn",
          "contrast_loss_fn", "jpeg_compressibility", "clip_loss_fn", "imagereward_loss_fn")  # fmt: skip


def test_the_published_recipe_for_a_custom_reward(tmp_path):
    """Append a factory to rewards_zoo.py and a row to __init__.py, as the README says, and use it."""
    package = tmp_path / "rewards"
    package.mkdir()
    for file in (ROOT / "rewards").glob("*.py"):
        (package / file.name).write_bytes(file.read_bytes())
    zoo, table = package / "rewards_zoo.py", package / "__init__.py"
    zoo.write_text(
        zoo.read_text()
        + """

def custom_loss_fn(inference_dtype=None, device=None):
    def loss_fn(im_pix_un, prompts):
        im_pix = ((im_pix_un / 2) + 0.5).clamp(0, 1)
        return -im_pix[:, 0].mean((1, 2))
    return loss_fn
"""
    )
    table.write_text(
        table.read_text().replace("RFUNCTIONS = {", 'RFUNCTIONS = {\n    "redness": custom_loss_fn,')
    )
    zoo.write_text(
        zoo.read_text()
        + """

def scored_by_hand(inference_dtype=None, device=None):
    return lambda images, prompts: torch.zeros(len(images))


scored_by_hand.differentiable = False
"""
    )
    table.write_text(table.read_text().replace("RFUNCTIONS = {", 'RFUNCTIONS = {\n    "by_hand": scored_by_hand,'))
    code = "import torch, rewards as r; f = r.RFUNCTIONS['redness']; print(f()(torch.zeros(2, 3, 8, 8), ['', '']).tolist(), r.is_differentiable(f), [n for n, g in r.RFUNCTIONS.items() if not g.differentiable])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[-0.5, -0.5] True ['by_hand', 'jpeg', 'jpeg_incompressibility']", done.stderr


def test_public_names_and_rows():
    from rewards import rewards_zoo

    for name in PUBLIC:
        assert getattr(rewards, name) is getattr(rewards_zoo, name)
    names = "aesthetic hps hps_v2.1 pick clip imagereward sprites white black contrast jpeg jpeg_incompressibility"
    assert list(rewards.RFUNCTIONS) == names.split()


def test_what_is_differentiable_is_declared_and_true(configure):
    for name, factory in rewards.RFUNCTIONS.items():
        assert factory.differentiable == (not name.startswith("jpeg"))
        undeclared = lambda *args, build=factory, **kw: build(*args, **kw)  # noqa: E731
        assert rewards.is_differentiable(undeclared, prompt="red car") == factory.differentiable, name


def test_a_reward_without_a_gradient_is_found_out():
    """Detached, zero everywhere, or not a tensor."""
    for loss in (lambda x, p: x.detach().mean((1, 2, 3)), lambda x, p: (x.mean((1, 2, 3)) * 0),
                 lambda x, p: x.round().mean((1, 2, 3)), lambda x, p: 1.0):  # fmt: skip
        assert not rewards.is_differentiable(lambda inference_dtype=None, device=None, loss=loss: loss)
