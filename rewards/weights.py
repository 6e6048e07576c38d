"""Reward weights: where they are found, how they are read safely, and the settings that hold for all rewards.

Each model is one row of `MODELS`: its hub repository, its files, and from these a flag (`--hps_path`) and an
environment variable (`DNO_HPS_PATH`) that name a local copy. A path that was configured wins over the
environment variable, and that over the hub. The command line generates its flags and their help from the same
table:

    rewards.add_arguments(parser)
    args = parser.parse_args()
    rewards.configure_from(args)                        # or rewards.configure(hps_path="weights/hps.pt")
    loss_fn = rewards.RFUNCTIONS["hps"](rewards.PRECISIONS[args.reward_precision], device)
    rewards.loaded_files()                              # file names and sha256, for a record of the run
"""

import hashlib
import os
import pickle
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOT = Path(__file__).parent.parent
CLIP_FILES = ("config.json", "model.safetensors")
CLIP_ALSO = ("preprocessor_config.json", "tokenizer*.json", "vocab.json", "merges.txt")


class RewardError(ValueError):
    """What went wrong, in one line for the user: what was got, what was expected, how to fix it."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))


@dataclass(frozen=True)
class Model:
    """One row of the table.

    key: name of the row. repo: hub repository, or None for weights that come with the project.
    files: what must be there. A row with one file may be given as the path of the file or of its folder, a row with
        several files as the path of their folder.
    also: files that are used if they are there. aliases: other names under which the only file is published.
    folder: the default place of weights that come with the project.
    """

    key: str
    about: str
    repo: str | None
    files: tuple
    also: tuple = ()
    aliases: tuple = ()
    folder: Path | None = None

    @property
    def setting(self):
        """Name of the setting and of the flag: "hps_v2_1_path"."""
        return self.key.replace(".", "_") + "_path"

    @property
    def variable(self):
        """Name of the environment variable: "DNO_HPS_V2_1_PATH"."""
        return "DNO_" + self.setting.upper()

    @property
    def fetch(self):
        """The command that puts the files into ./weights/<key>."""
        if self.repo is None:
            return f"git checkout -- {self.folder.relative_to(ROOT)}"
        return f"hf download {self.repo} {' '.join(self.files)} --local-dir weights/{self.key}"

    @property
    def help(self):
        """One sentence for `-h`."""
        default = f"the hub's {self.repo}" if self.repo else str(self.folder.relative_to(ROOT))
        what = f"folder with {', '.join(self.files)}" if len(self.files) > 1 else self.files[0]
        return f"{self.about}: local {what} (default: ${self.variable}, else {default})"


MODELS = {
    model.key: model
    for model in (
        Model("clip", "CLIP of `clip`, `aesthetic`", "openai/clip-vit-large-patch14", CLIP_FILES, CLIP_ALSO),
        Model("aesthetic", "head of `aesthetic`", "trl-lib/ddpo-aesthetic-predictor",
              ("aesthetic-model.pth",), aliases=("sac+logos+ava1-l14-linearMSE.pth",)),
        Model("hps", "HPS v2.0", "xswu/HPSv2", ("HPS_v2_compressed.pt",)),
        Model("hps_v2.1", "HPS v2.1", "xswu/HPSv2", ("HPS_v2.1_compressed.pt",)),
        Model("pick", "PickScore", "yuvalkirstain/PickScore_v1", CLIP_FILES, CLIP_ALSO),
        Model("imagereward", "ImageReward", "THUDM/ImageReward", ("ImageReward.pt",), ("med_config.json",)),
        Model("bert", "tokenizer of `imagereward`", "google-bert/bert-base-uncased", ("vocab.txt",)),
        Model("sprites", "the embedded CLIP", None, CLIP_FILES, CLIP_ALSO, folder=ROOT / "sprites" / "clip"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What holds for every reward. Set with `configure`.

    paths: local copies, {"hps_path": path}.
    preprocess: "own" for the preprocessing of each reward model, "reference" for the official DNO code's.
    checkpointing: recompute a tower's activations in the backward pass instead of keeping them.
    hps_architecture: the open_clip configuration of the HPS checkpoints.
    """

    paths: dict = field(default_factory=dict)
    preprocess: str = "own"
    checkpointing: bool = False
    hps_architecture: str = "ViT-H-14"


_settings = Settings()
_loaded = {}  # key -> path of the weights that were loaded last
_hashes = {}  # (path, size, time) -> sha256


def settings():
    """The settings in force."""
    return _settings


def configure(preprocess="own", checkpointing=False, hps_architecture="ViT-H-14", **paths):
    """Replace all settings at once; what is not given goes back to its default, so `configure()` resets.

    paths: `<model>_path` for any row of `MODELS`; None or "" leaves it to environment and hub.
    Raises RewardError for an unknown name or mode.
    """
    global _settings
    known = [model.setting for model in MODELS.values()]
    for name in paths:
        if name not in known:
            raise RewardError(f"unknown reward setting {name}: expected one of {', '.join(known)}")
    if preprocess not in ("own", "reference"):
        raise RewardError(f"--reward_preprocess got {preprocess!r}: expected own or reference")
    given = {name: Path(path).expanduser() for name, path in paths.items() if path}
    _settings = Settings(given, preprocess, checkpointing, hps_architecture)
    _loaded.clear()


def add_arguments(parser):
    """Add the flags of this table and of the settings to an argparse parser."""
    group = parser.add_argument_group("reward models")
    group.add_argument("--reward_precision", choices=PRECISIONS, default="fp32",
                       help="precision of the reward models' weights (default: %(default)s)")  # fmt: skip
    group.add_argument("--reward_preprocess", choices=("own", "reference"), default="own",
                       help="own: resize, crop or pad as each reward model does; reference: aesthetic, hps "
                       "and pick as in the official DNO code (default: %(default)s)")  # fmt: skip
    group.add_argument("--reward_checkpointing", action="store_true",
                       help="less memory, more time: recompute activations on the way back")  # fmt: skip
    for model in MODELS.values():
        group.add_argument(f"--{model.setting}", metavar="PATH", help=model.help)


def configure_from(args):
    """`configure` from what `add_arguments` parsed."""
    paths = {model.setting: getattr(args, model.setting) for model in MODELS.values()}
    configure(preprocess=args.reward_preprocess, checkpointing=args.reward_checkpointing, **paths)


# --- finding ------------------------------------------------------------------------------------------------


def locate(key):
    """The place of a model's weights: the path of its file, or of its folder where it has several.

    Raises RewardError that says what is missing, where it was looked for, and how to fetch it.
    """
    model = MODELS[key]
    if model.setting in _settings.paths:
        return check_local(model, _settings.paths[model.setting], f"given by --{model.setting}")
    if os.environ.get(model.variable):
        return check_local(model, Path(os.environ[model.variable]).expanduser(), f"given by {model.variable}")
    if model.repo is None:
        return check_local(model, model.folder, "the project's own folder")
    return from_hub(model)


def check_local(model, path, source):
    """`path` made precise, or RewardError. source: why it is looked for there."""
    if len(model.files) == 1 and path.is_dir():
        path = next((path / name for name in (*model.files, *model.aliases) if (path / name).is_file()), path)
        missing = [] if path.is_file() else [model.files[0]]
    elif len(model.files) == 1:
        missing = [] if path.is_file() else [path.name]
    else:
        missing = [name for name in model.files if not (path / name).is_file()]
        if missing == ["model.safetensors"] and (path / "pytorch_model.bin").is_file():
            missing = []
    if missing:
        raise RewardError(
            f"{model.key}: {' and '.join(missing)} not found at {path} ({source}); fetch with `{model.fetch}`"
            + (f" and pass --{model.setting} weights/{model.key}" if model.repo else "")
        )
    return path


def from_hub(model):
    """The model's files in the hub's cache, downloaded if they are not there."""
    import huggingface_hub

    wanted = [*model.files, *model.also]
    for offline in (True, False):
        try:
            folder = huggingface_hub.snapshot_download(
                model.repo, allow_patterns=wanted, local_files_only=offline
            )
        except Exception as error:  # a network can fail in any way
            reason = error
            continue
        folder = Path(folder)
        missing = [name for name in model.files if not (folder / name).is_file()]
        if not missing:
            return folder / model.files[0] if len(model.files) == 1 else folder
        reason = f"the repository has no {' and '.join(missing)}"
    raise RewardError(
        f"{model.key}: {' and '.join(model.files)} of {model.repo} is not in the hub's cache "
        f"({huggingface_hub.constants.HF_HUB_CACHE}) and cannot be downloaded ({brief(reason)}); "
        f"with a network run `{model.fetch}`, then pass --{model.setting} weights/{model.key} "
        f"or set {model.variable}"
    )


def brief(error, limit=120):
    """The start of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


# --- reading ------------------------------------------------------------------------------------------------


def read_pickle(key, path):
    """A state dict saved with torch.save, read without running any code in it.

    Raises RewardError if the file is damaged, holds anything but tensors in plain containers, or is no state
    dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise unreadable(key, path, error) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        got = type(state).__name__
        raise RewardError(f"{key}: {path} holds a {got}, expected a state dict of tensors; {again(key)}")
    return state


def unreadable(key, path, error):
    """RewardError for a file that cannot be read."""
    text = str(error)
    if "weights_only" in text or "Weights only" in text or "Unsupported" in text:
        return RewardError(
            f"{key}: {path} is not a plain weights file and was not run: it is damaged, or its pickle holds "
            f"more than tensors; {again(key)}"
        )
    return RewardError(
        f"{key}: {path} cannot be read, it is damaged or cut off ({brief(text)}); {again(key)}"
    )


def again(key):
    """The end of an error message: how to get a good copy."""
    return f"fetch it again with `{MODELS[key].fetch}`"


def load_strict(key, path, module, state):
    """Copy `state` into `module`; every name and shape must agree, else RewardError names the first."""
    expected = module.state_dict()
    report = []
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing:
        report.append(f"{len(missing)} missing (first: {min(missing)})")
    if unexpected:
        report.append(f"{len(unexpected)} unexpected (first: {min(unexpected)})")
    for name in sorted(expected.keys() & state.keys()):
        if expected[name].shape != state[name].shape:
            got, wanted = tuple(state[name].shape), tuple(expected[name].shape)
            report.append(f"{name} is {got}, expected {wanted}")
            break
    if report:
        raise RewardError(f"{key}: {path} has another architecture: {'; '.join(report)}; {again(key)}")
    module.load_state_dict(state)


def loaded(key, path):
    """Record that these weights are in use, for `loaded_files`."""
    _loaded[key] = Path(path)


@contextmanager
def recorded():
    """A context that gives what is loaded inside it, {key: path}, for `loaded_files`."""
    global _loaded
    before, _loaded = _loaded, {}
    try:
        yield _loaded
    finally:
        before.update(_loaded)
        _loaded = before


def loaded_files(paths=None):
    """The weight files of {key: path}: [{"model": key, "file": name, "sha256": digest}].

    paths: as `recorded` gives them; None = what was loaded since the last `configure`.
    The digests are computed here, not while loading: seconds for the largest files, once for each file.
    """
    return [
        {"model": key, "file": file.name, "sha256": sha256(file)}
        for key, path in (_loaded if paths is None else paths).items()
        for file in (weight_files(path) if path.is_dir() else [path])
    ]


def weight_files(folder):
    """The files with the weights in a model's folder."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def sha256(path):
    """The file's digest in hexadecimal, remembered as long as the file does not change."""
    stat = path.stat()
    mark = (str(path), stat.st_size, stat.st_mtime_ns)
    if mark not in _hashes:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        _hashes[mark] = digest.hexdigest()
    return _hashes[mark]
