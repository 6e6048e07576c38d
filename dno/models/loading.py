"""Loading models: a name, folder or file becomes a frozen model; every failure is one `UserError`."""

import contextlib
import json
import math
import re
import tempfile
from pathlib import Path

import torch

from dno.errors import UserError
from dno.memory import is_out_of_memory
from dno.models.quiet import quiet
from dno.models.specs import PRECISIONS, model_spec
from dno.models.stable_diffusion import StableDiffusion, StableDiffusionXL

FAMILIES = {family.pipeline_class: family for family in (StableDiffusion, StableDiffusionXL)}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@torch.inference_mode(False)  # whose tensors no gradient could ever pass
def load_model(
    name, dtype=torch.float32, device="cpu", variant=None, lora=None, model_config=None,
    vae=None, vae_precision="auto",
):  # fmt: skip
    """Load a text-to-image model, frozen, all of it stored in `dtype` but for the VAE.

    name: a row of `MODELS`, hub id, diffusers folder or single .safetensors file.
    model_config: pipeline folder that says how to read a single file, where the hub cannot be reached.
    lora: PATH_OR_ID[:SCALE], added to the weights.
    vae: another VAE than the model's: hub id, folder or .safetensors file.
    vae_precision: what the VAE is stored and run in, one of `PRECISIONS`. auto is `dtype`, but float32 where that is
        float16 and the VAE would overflow in it, as SDXL's own does.
    Raises UserError: no such model, of another family, weights missing, damaged or in a pickle, gated, no network.
    """
    family = check_model(name, lora, vae)
    source = model_spec(name).source
    path = Path(source).expanduser()
    with quiet():
        if path.is_file():
            family = _family_of_file(path, model_config)
            pipe = _load_file(family, path, dtype, model_config)
        else:
            pipe = _load_pipeline(family, source, dtype, variant)
        if vae is not None:
            pipe.vae = _load_vae(vae, pipe)
        if lora:
            _add_lora(pipe, lora)
        pipe.vae.to(_vae_dtype(vae_precision, dtype, pipe.vae, family))
        with _explained(f"--model {name} could not be moved to {device} (is it whole?)"):
            pipe.to(device)
        return family(pipe, str(name))


def check_model(name, lora=None, vae=None):
    """Raise UserError for what can be said of a model, its LoRA and its VAE without loading them.

    Returns the model's family, or None for a single file, whose family is found when it is read.
    """
    family = None
    source = model_spec(name).source
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--model {path}: only .safetensors is read, since a pickle can run code; convert it first")
    elif path.is_dir():
        family = _check_folder(path)
    elif _may_be_hub_id(str(source)):
        with quiet():
            family = _check_class(_from_hub("--model", source, "model_index.json"), source)
    else:
        raise UserError(f"--model {name}: no such folder or file; expected one, or a hub id such as owner/name")
    if lora:
        _parse_lora(lora)
    if vae is not None:
        _check_vae(vae)
    return family


def _may_be_hub_id(source):
    is_file = source.endswith((".safetensors", ".ckpt", ".pt", ".bin"))
    return not is_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source)


# What the names of the tensors in a single file begin with or contain, and what the file then is.
_OTHER_FILES = {
    "double_blocks.": "a FLUX model",
    "joint_blocks.": "Stable Diffusion 3",
    "lora_": "a LoRA, which goes with --lora",
    "caption_projection.": "a PixArt or SANA model",
    "context_refiner.": "a Lumina or Z-Image model",
    "control_model.": "a ControlNet",
}


def _family_of_file(path, model_config):
    """The family of a single file: that of the pipeline's folder which tells how to read it, else by its tensors."""
    from safetensors import safe_open

    with _explained(f"--model {path} could not be read (is the file whole?)"), safe_open(path, "pt") as file:
        names = set(file.keys())
    if not any("model.diffusion_model.input_blocks." in name for name in names):
        kinds = [kind for mark, kind in _OTHER_FILES.items() if any(mark in name for name in names)]
        looks = f"it looks like {kinds[0]}" if kinds else f"its tensors are such as {min(names, default='none')!r}"
        raise UserError(f"--model {path} has no UNet of Stable Diffusion: {looks}")
    index = Path(model_config).expanduser() / "model_index.json" if model_config else None
    if index and index.is_file():
        return _check_class(index, index.parent)
    # SDXL's text encoders are embedders 0 and 1 of a conditioner; the refiner has the first one only.
    if not any(name.startswith("conditioner.embedders.") for name in names):
        return StableDiffusion
    if not any(name.startswith("conditioner.embedders.1.") for name in names):
        raise UserError(f"--model {path} is an SDXL refiner, which cannot make images of noise alone")
    return StableDiffusionXL


def _load_file(family, path, dtype, model_config):
    if model_config:
        fix, model_config = "is the file whole?", str(Path(model_config).expanduser())
    else:
        fix = "without a network, give its pipeline's folder with --model_config"
    with _explained(f"--model {path} could not be read ({fix})"):
        return _pipeline(family).from_single_file(
            str(path), config=model_config, torch_dtype=dtype, local_files_only=model_config is not None,
            **family.pipeline_options,
        )  # fmt: skip


def _pipeline(family):
    import diffusers

    return getattr(diffusers, family.pipeline_class)


def _check_folder(folder):
    """The family of a diffusers pipeline's folder that looks whole."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--model {folder}: no model_index.json in it; expected a diffusers pipeline's folder")
    family = _check_class(index, folder)
    for part in family.tokenizers:
        if not (folder / part).is_dir():
            raise UserError(f"--model {folder}: it has no {part}/; download the model again")
    for part in (family.network_part, "vae", *family.text_encoders):
        _check_safetensors("--model", folder, part)
    return family


def _check_safetensors(flag, folder, part=""):
    files = sorted(file.name for file in (folder / part).glob("*") if file.is_file())
    if not any(name.endswith(".safetensors") for name in files):
        pickles = [name for name in files if name.endswith(PICKLES)]
        raise UserError(
            f"{flag} {folder}: {part + '/' if part else 'it'} has no .safetensors file"
            + (f", only {pickles[0]}, a pickle, which can run code; save the model with safe_serialization=True"
               if pickles else "; download the model again")
        )  # fmt: skip


def _from_hub(flag, name, file):
    """The local copy of a small file of a hub repository."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except errors.GatedRepoError:
        raise UserError(f"{flag} {name} is gated: accept its licence on its page, then run `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{flag} {name}: neither a folder here nor a model on the hub; check the spelling") from None
    except errors.EntryNotFoundError as error:
        # LocalEntryNotFoundError, the kind without a network, is one of these.
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _no_network(flag, name) from None
        kind = "diffusers pipeline" if file == "model_index.json" else "VAE of diffusers"
        raise UserError(f"{flag} {name} is no {kind}: it has no {file}") from None
    except (OSError, errors.HTTPError):  # the second from its HTTP library, whichever that is
        raise _no_network(flag, name) from None


def _no_network(flag, name):
    other = "try --model sprites, which comes with this project" if flag == "--model" else "leave the flag out"
    return UserError(
        f"{flag} {name}: the hub cannot be reached and the model is in no local cache; give a local folder, or {other}"
    )


def _check_class(index, where):
    """The family that a model_index.json is of."""
    with _explained(f"{index} is damaged"):
        got = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if got not in FAMILIES:
        raise UserError(f"--model {where} is a {got}; expected a {' or '.join(FAMILIES)}")
    return FAMILIES[got]


def _load_pipeline(family, source, dtype, variant):
    with _explained(f"--model {source} could not be loaded (is it whole? does it need another --variant?)"):
        return _pipeline(family).from_pretrained(
            str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,
            # The VAE is loaded as it is, and rounded once, when its own precision is known.
            dtype={"default": dtype, "vae": torch.float32}, variant=variant, use_safetensors=True,
            **family.pipeline_options,
        )  # fmt: skip


def _check_vae(vae):
    path = Path(vae).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--vae {path}: only .safetensors is read, since a pickle can run code; convert it first")
    elif path.is_dir():
        _check_safetensors("--vae", path)
        if not (path / "config.json").is_file():
            raise UserError(f"--vae {path}: no config.json in it; expected the folder of a diffusers VAE")
    elif _may_be_hub_id(str(vae)):
        with quiet():
            _from_hub("--vae", str(vae), "config.json")
    else:
        raise UserError(f"--vae {vae}: no such folder or file; expected one, or a hub id such as owner/name")


def _load_vae(vae, pipe):
    """Another VAE for the pipeline, in float32. A single file is read as one like the pipeline's own."""
    from diffusers import AutoencoderKL

    path, own = Path(vae).expanduser(), pipe.vae.config
    with _explained(f"--vae {vae} could not be loaded (is it whole?)"):
        if path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                pipe.vae.save_config(folder)
                network = AutoencoderKL.from_single_file(str(path), config=folder, torch_dtype=torch.float32)
            network.register_to_config(force_upcast=None)  # the model's own says nothing of this one: nobody knows
        else:
            source = str(path) if path.is_dir() else str(vae)
            network = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True)
    for name, got, expected in (
        ("latent channels", network.config.latent_channels, own.latent_channels),
        ("levels", len(network.config.block_out_channels), len(own.block_out_channels)),
    ):
        if got != expected:
            raise UserError(f"--vae {vae} has {got} {name}; the model's own has {expected}")
    return network


def _vae_dtype(precision, dtype, vae, family):
    upcast = vae.config.force_upcast if family.vae_obeys_force_upcast else False
    if precision == "auto":
        return torch.float32 if dtype == torch.float16 and upcast is not False else dtype
    if precision == "fp16" and upcast:
        raise UserError(
            "--vae_precision fp16: the VAE overflows in it (force_upcast in its configuration); use bf16 or fp32, or "
            "one made for it, --vae madebyollin/sdxl-vae-fp16-fix"
        )
    return PRECISIONS[precision]


def _parse_lora(lora):
    """PATH_OR_ID[:SCALE] -> (source, scale), of a source that may exist."""
    source, _, scale = lora.rpartition(":")
    try:
        source, scale = (source, float(scale)) if source else (lora, 1.0)
    except ValueError:
        source, scale = lora, 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {lora}: the scale is {scale}; expected a finite number")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"--lora {source}: only .safetensors files are read, since a pickle can run code")
    if not path.exists() and not _may_be_hub_id(source):
        raise UserError(f"--lora {source}: no such file or folder; expected one, or a hub id such as owner/name")
    return source, scale


def _add_lora(pipe, lora):
    source, scale = _parse_lora(lora)
    path = Path(source).expanduser()
    with _explained(f"--lora {source} could not be added"):
        if path.is_file():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
        else:
            pipe.load_lora_weights(str(path) if path.is_dir() else source, use_safetensors=True)
        if not pipe.get_list_adapters():
            raise ValueError("none of its weights belongs to this model")
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()


@contextlib.contextmanager
def _explained(what):
    """Turn a library's failure to load into one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        message = " ".join(str(error).split()) or "no message"
        raise UserError(f"{what}: {type(error).__name__}: {message[:300]}") from error
