"""The score of hpsv2's own package on the same random checkpoint; skipped where the package is absent.

The package runs as published, with three helping hands: its wheel lacks the tokenizer's vocabulary, which is
read from open_clip; it imports `clint` and `turtle`, which it does not need to score; and its ViT-H-14 is the
scaled-down one of these tests.
"""

import gzip
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import rewards
from rewards.__main__ import read

if importlib.util.find_spec("hpsv2") is None:
    pytest.skip("hpsv2 is absent: pip install --no-deps hpsv2==1.2.0", allow_module_level=True)

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def official_score(monkeypatch, tmp_path, hps_architecture):
    """hpsv2.img_score.score(picture file, prompt, checkpoint) -> [score]."""
    import open_clip

    for name in ("clint", "clint.textui", "turtle", "requests"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["clint.textui"].progress = sys.modules["turtle"].forward = None

    opened, shipped = gzip.open, Path(open_clip.__file__).parent / VOCABULARY
    monkeypatch.setattr(
        gzip, "open", lambda file, *rest: opened(shipped if VOCABULARY in str(file) else file, *rest)
    )
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    config = open_clip.get_model_config(hps_architecture)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", json.loads(json.dumps(config)))
    create = img_score.create_model_and_transforms
    # Without the weights of the second argument, which the checkpoint replaces anyway.
    monkeypatch.setattr(
        img_score, "create_model_and_transforms", lambda name, _, **kw: create(name, None, **kw)
    )
    monkeypatch.setattr(img_score, "root_path", str(tmp_path))
    monkeypatch.setattr(img_score, "model_dict", {})
    return img_score.score


@pytest.mark.filterwarnings("ignore")
def test_hpsv2_scores_the_same_checkpoint_alike(official_score, configure, hps_file, picture_files):
    loss_fn = rewards.RFUNCTIONS["hps"](None, "cpu")
    for prompt in ("a white duck", "Two red cars; it's 3 o'clock &amp; raining..."):
        for file in sorted(picture_files.iterdir()):
            (expected,) = official_score(str(file), prompt, str(hps_file))
            with torch.no_grad():
                score = -loss_fn(read(file), [prompt]).item()
            assert score == pytest.approx(float(expected), abs=2e-6)
