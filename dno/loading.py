"""From a model's name to a frozen model on the device; whatever can go wrong is one line."""

import contextlib
import json
import math
import re
from pathlib import Path

import torch

from dno.errors import UserError
from dno.memory import is_out_of_memory
from dno.models import StableDiffusion, model_spec
from dno.quiet import quiet

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {family.pipeline_class: family for family in (StableDiffusion,)}
# Where the other published pipelines belong.
SCRIPTS = {"StableDiffusionPipeline": "dno_stable_diffusion.py", "StableDiffusionXLPipeline": "dno_sdxl.py"}


def resolve_device(name):
    """`--device` as a torch.device. Raises UserError where this torch cannot use it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(f"--device {name}: this torch ({torch.__version__}) sees no such device; use --device auto")
    return torch.device(name)


def resolve_precision(name, device):
    """`--precision` as a torch dtype: auto is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return PRECISIONS[name]


def load_model(name, dtype=torch.float32, device="cpu", variant=None, lora=None, model_config=None):
    """Load a text-to-image model, frozen, all of it stored in `dtype`.

    name: a row of `MODELS`, hub id, diffusers folder or single .safetensors file.
    model_config: pipeline folder that says how to read a single file, where the hub cannot be reached.
    lora: PATH_OR_ID[:SCALE], added to the weights.
    Raises UserError: no such model, not a Stable Diffusion, weights missing, damaged or in a pickle, gated, no network.
    """
    check_model(name, lora)
    source = model_spec(name).source
    path = Path(source).expanduser()
    with quiet():
        pipe = _load_file(path, dtype, model_config) if path.is_file() else _load_pipeline(source, dtype, variant)
        if lora:
            _add_lora(pipe, lora)
        family = FAMILIES[type(pipe).__name__]
        with _explained(f"--model {name} could not be moved to {device} (is it whole?)"):
            pipe.to(device)
        return family(pipe, str(name))


def check_model(name, lora=None):
    """Raise UserError for what can be said of a model and its LoRA without loading them."""
    source = model_spec(name).source
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--model {path}: only .safetensors is read, since a pickle can run code; convert it first")
    elif path.is_dir():
        _check_folder(path)
    elif _may_be_hub_id(str(source)):
        with quiet():
            _check_hub(source)
    else:
        raise UserError(f"--model {name}: no such folder or file; expected one, or a hub id such as owner/name")
    if lora:
        _parse_lora(lora)


def _may_be_hub_id(source):
    is_file = source.endswith((".safetensors", ".ckpt", ".pt", ".bin"))
    return not is_file and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source)


def _load_file(path, dtype, model_config):
    from diffusers import StableDiffusionPipeline

    if model_config:
        fix, model_config = "is the file whole?", str(Path(model_config).expanduser())
    else:
        fix = "without a network, give its pipeline's folder with --model_config"
    with _explained(f"--model {path} could not be read ({fix})"):
        return StableDiffusionPipeline.from_single_file(
            str(path), config=model_config, torch_dtype=dtype, local_files_only=model_config is not None,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip


def _check_folder(folder):
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"--model {folder}: no model_index.json in it; expected a diffusers pipeline's folder")
    _check_class(index, folder)
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"--model {folder}: it has no tokenizer/; download the model again")
    for part in ("unet", "vae", "text_encoder"):
        files = sorted(file.name for file in (folder / part).glob("*") if file.is_file())
        if not any(name.endswith(".safetensors") for name in files):
            pickles = [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
            raise UserError(
                f"--model {folder}: {part}/ has no .safetensors file"
                + (f", only {pickles[0]}, a pickle, which can run code; save the model with safe_serialization=True"
                   if pickles else "; download the model again")
            )  # fmt: skip


def _check_hub(name):
    from huggingface_hub import errors, hf_hub_download

    try:
        index = hf_hub_download(name, "model_index.json")
    except errors.GatedRepoError:
        raise UserError(f"--model {name} is gated: accept its licence on its page, then run `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"--model {name}: neither a folder here nor a model on the hub; check the spelling") from None
    except errors.EntryNotFoundError as error:
        # LocalEntryNotFoundError, the kind without a network, is one of these.
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _no_network(name) from None
        raise UserError(f"--model {name} is no diffusers pipeline: it has no model_index.json") from None
    except (OSError, errors.HTTPError):  # the second from its HTTP library, whichever that is
        raise _no_network(name) from None
    _check_class(Path(index), name)


def _no_network(name):
    return UserError(
        f"--model {name}: the hub cannot be reached and the model is in no local cache; give a local folder, or try "
        "--model sprites, which comes with this project"
    )


def _check_class(index, where):
    with _explained(f"{index} is damaged"):
        got = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if got not in FAMILIES:
        other = f"; use {SCRIPTS[got]}" if got in SCRIPTS else ""
        raise UserError(f"--model {where} is a {got}; expected a {' or '.join(FAMILIES)}{other}")


def _load_pipeline(source, dtype, variant):
    from diffusers import StableDiffusionPipeline

    with _explained(f"--model {source} could not be loaded (is it whole? does it need another --variant?)"):
        return StableDiffusionPipeline.from_pretrained(
            str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,
            dtype=dtype, variant=variant, use_safetensors=True,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip


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
