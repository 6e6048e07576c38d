"""Where weights come from, and what a user reads when something is wrong with them."""

import argparse
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

import rewards
from rewards import weights

ROOT = Path(__file__).parents[2]


def build(name):
    return rewards.RFUNCTIONS[name](None, "cpu")


def error_of(name):
    """The message of building this reward: one line that says how to mend it."""
    with pytest.raises(rewards.RewardError) as caught:
        build(name)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message and len(message) < 700, message
    assert "hf download" in message or "git checkout" in message, message
    return message


@pytest.fixture
def copy(
    configure,
    tmp_path,
    clip_folder,
    pick_folder,
    sprites_folder,
    aesthetic_file,
    hps_file,
    imagereward_folder,
):
    """copy(name): a private copy of a reward's weights, configured; returns the file to spoil."""
    sources = {
        "clip": clip_folder,
        "pick": pick_folder,
        "sprites": sprites_folder,
        "hps": hps_file,
        "hps_v2.1": hps_file,
        "aesthetic": aesthetic_file,
        "imagereward": imagereward_folder,
    }

    def make(name):
        source = sources[name]
        files = list(source.iterdir()) if source.is_dir() else [source]
        for file in files:
            (tmp_path / file.name).write_bytes(file.read_bytes())
        where = tmp_path if source.is_dir() else tmp_path / source.name
        configure(**{rewards.MODELS[name].setting: where})
        spoiled = {"imagereward": "ImageReward.pt"}.get(name, "model.safetensors")
        return tmp_path / spoiled if source.is_dir() else where

    return make


FOLDERS = ("clip", "pick", "sprites")
PICKLES = ("aesthetic", "hps", "hps_v2.1", "imagereward")


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


# --- (e) what is wrong with a file --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS + PICKLES)
def test_intact_copy_loads(name, copy):
    copy(name)
    build(name)


@pytest.mark.parametrize("name", FOLDERS + PICKLES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_weights(name, damage, copy):
    file = copy(name)
    content = file.read_bytes()
    file.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>404</html>"}[damage]
    )
    message = error_of(name)
    assert name in message and str(file.parent) in message


@pytest.mark.parametrize("name", FOLDERS + PICKLES)
def test_missing_weights(name, copy):
    file = copy(name)
    file.unlink()
    message = error_of(name)
    assert file.name in message and "not found" in message and f"--{rewards.MODELS[name].setting}" in message


@pytest.mark.parametrize("name", PICKLES)
def test_malicious_pickle_is_refused(name, copy, tmp_path):
    file, marker = copy(name), tmp_path / "was-run"
    torch.save({"state_dict": Malicious(marker)}, file)
    assert "was not run" in error_of(name)
    file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    error_of(name)
    assert not marker.exists()


def test_malicious_pickle_in_a_clip_folder_is_refused(copy, tmp_path):
    file, marker = copy("clip"), tmp_path / "was-run"
    file.unlink()
    torch.save({"logit_scale": Malicious(marker)}, tmp_path / "pytorch_model.bin")
    error_of("clip")
    assert not marker.exists()


def test_clip_folder_with_a_plain_pickle_loads(copy, clip_folder, tmp_path, pictures):
    from safetensors.torch import load_file

    expected = build("clip")(pictures(1, 64, 64), ["a"])
    file = copy("clip")
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    torch.testing.assert_close(build("clip")(pictures(1, 64, 64), ["a"]), expected)
    assert rewards.loaded_files()[0]["file"] == "pytorch_model.bin"


@pytest.mark.parametrize("name", PICKLES)
def test_wrong_architecture_in_a_pickle(name, copy):
    file = copy(name)
    state = torch.load(file, weights_only=True)
    state = state.get("state_dict", state)
    spoiled = {
        key: value[:1] if "weight" in key and value.ndim == 2 else value for key, value in state.items()
    }
    torch.save(spoiled, file)
    assert "another architecture" in error_of(name)
    torch.save(torch.nn.Linear(3, 4).state_dict(), file)
    assert "another architecture" in error_of(name)
    torch.save([1, 2, 3], file)
    assert "expected a state dict" in error_of(name)


@pytest.mark.parametrize("name", FOLDERS)
def test_wrong_architecture_in_a_clip_folder(name, copy):
    folder = copy(name).parent
    config = json.loads((folder / "config.json").read_text())
    deeper, wider, other = (json.loads(json.dumps(config)) for _ in range(3))
    deeper["vision_config"]["num_hidden_layers"] = 3
    wider["vision_config"]["intermediate_size"] = 80
    other["model_type"] = "siglip"
    for changed, words in ((deeper, "missing"), (wider, "shapes"), (other, "siglip")):
        (folder / "config.json").write_text(json.dumps(changed))
        message = error_of(name)
        assert "another architecture" in message and words in message
    (folder / "config.json").write_text("{")
    assert "cannot be read" in error_of(name)


def test_aesthetic_names_a_clip_of_another_width(configure, pick_folder):
    configure(clip_path=pick_folder)  # 32 dimensions instead of 768
    message = error_of("aesthetic")
    assert "(1024, 768), expected (1024, 32)" in message


def test_spoiled_tokenizer(copy):
    folder = copy("clip").parent
    (folder / "vocab.json").write_text("{")
    assert "tokenizer" in error_of("clip")


def test_damaged_preprocessor_config_and_another_normalization(copy, pictures):
    folder, images = copy("sprites").parent, pictures(1, 64, 64)
    before = build("sprites")(images, ["red car"])
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    assert not torch.equal(build("sprites")(images, ["red car"]), before)
    (folder / "preprocessor_config.json").write_text("{")
    error_of("sprites")


# --- where weights come from --------------------------------------------------------------------------------


def test_flag_wins_over_environment_and_environment_over_hub(monkeypatch, tmp_path):
    named, other = tmp_path / "named.pt", tmp_path / "other.pt"
    named.touch()
    other.touch()
    monkeypatch.setenv("DNO_HPS_PATH", str(other))
    assert weights.locate("hps") == other
    rewards.configure(hps_path=str(named))
    assert weights.locate("hps") == named
    rewards.configure()
    assert weights.locate("hps") == other
    monkeypatch.setenv("DNO_HPS_PATH", str(tmp_path / "nowhere"))
    assert "DNO_HPS_PATH" in error_of("hps")


def test_a_folder_stands_for_the_file_in_it(tmp_path):
    for name in ("sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"):
        (tmp_path / name).touch()
        rewards.configure(aesthetic_path=tmp_path)
        assert weights.locate("aesthetic") == tmp_path / name
    assert "HPS_v2_compressed.pt" in str(
        pytest.raises(rewards.RewardError, configure_and_locate, tmp_path).value
    )


def configure_and_locate(folder):
    rewards.configure(hps_path=folder)
    weights.locate("hps")


def test_without_a_network_the_error_says_how_to_fetch(monkeypatch):
    calls = []

    def offline(repo, allow_patterns, local_files_only):
        calls.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name, model in rewards.MODELS.items():
        if model.repo is None or name == "bert":
            continue
        calls.clear()
        if name == "aesthetic":  # looks for its CLIP first
            continue
        message = error_of(name)
        assert calls == [True, False], "the cache is asked first"
        for part in (
            model.repo,
            *model.files,
            model.variable,
            f"--{model.setting}",
            "no network and no cache",
        ):
            assert part in message


def test_hub_files_are_used_from_the_cache(monkeypatch, tmp_path, hps_file, hps_architecture):
    seen = []

    def cached(repo, allow_patterns, local_files_only):
        seen.append((repo, allow_patterns, local_files_only))
        return str(hps_file.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    rewards.configure(hps_architecture=hps_architecture)
    build("hps")
    assert seen == [("xswu/HPSv2", ["HPS_v2_compressed.pt"], True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert "the repository has no HPS_v2_compressed.pt" in error_of("hps")


def test_missing_embedded_clip_says_how_to_restore_it(tmp_path):
    rewards.configure(sprites_path=tmp_path)
    assert "git checkout -- sprites/clip" in error_of("sprites")


# --- settings -----------------------------------------------------------------------------------------------


def test_configure_replaces_and_resets(tmp_path):
    rewards.configure(preprocess="reference", checkpointing=True, hps_path=tmp_path, clip_path=None)
    assert weights.settings().paths == {"hps_path": tmp_path}
    rewards.configure()
    assert weights.settings() == weights.Settings()
    for wrong in ({"hsp_path": "x"}, {"preprocess": "mine"}):
        with pytest.raises(rewards.RewardError):
            rewards.configure(**wrong)


def test_flags_and_help_come_from_the_table(tmp_path):
    parser = argparse.ArgumentParser()
    rewards.add_arguments(parser)
    args = parser.parse_args(["--hps_v2_1_path", str(tmp_path), "--reward_preprocess", "reference",
                              "--reward_checkpointing", "--reward_precision", "bf16"])  # fmt: skip
    rewards.configure_from(args)
    assert weights.settings().paths == {"hps_v2_1_path": tmp_path}
    assert weights.settings().preprocess == "reference" and weights.settings().checkpointing
    assert rewards.PRECISIONS[args.reward_precision] is torch.bfloat16
    text = " ".join(parser.format_help().split())
    for model in rewards.MODELS.values():
        assert f"--{model.setting}" in text and model.variable in text


def test_loaded_files_name_what_was_loaded(configure, clip_folder, aesthetic_file, monkeypatch):
    assert rewards.loaded_files() == []
    build("aesthetic")
    digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()  # noqa: E731
    assert rewards.loaded_files() == [
        {"model": "clip", "file": "model.safetensors", "sha256": digest(clip_folder / "model.safetensors")},
        {"model": "aesthetic", "file": aesthetic_file.name, "sha256": digest(aesthetic_file)},
    ]
    rewards.configure()
    assert rewards.loaded_files() == []


def test_importing_does_nothing():
    heavy = ("transformers", "open_clip", "huggingface_hub")
    code = f"import sys, rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_loading_prints_nothing(configure, capfd):
    for name in ("aesthetic", "hps", "pick", "imagereward", "sprites"):
        build(name)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
