"""A model from a folder, a single file or the hub, with a LoRA; and one clear line for each way that can fail."""

import importlib
import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dno
from dno.errors import UserError
from dno.loading import resolve_device, resolve_precision

httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # or its successor httpx2
UNET = "unet/diffusion_pytorch_model.safetensors"
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def refused(*args, **kw):
    """The one line that loading with these arguments fails with."""
    with pytest.raises(UserError) as error:
        dno.load_model(*args, **kw)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny pipeline, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def weights(model):
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.pipe.text_encoder}
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Folders.


def test_a_folder_is_loaded_frozen_and_as_it_is(tiny_folder, tiny_model):
    saved = load_file(tiny_folder / UNET)
    assert all(torch.equal(value, saved[key]) for key, value in tiny_model.unet.state_dict().items())
    assert not any(value.requires_grad for value in weights(tiny_model).values())
    assert not (tiny_model.unet.training or tiny_model.vae.training or tiny_model.pipe.text_encoder.training)
    assert same_weights(tiny_model, dno.load_model(tiny_folder))  # a Path will do


def remove(part):
    return lambda folder: shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()


def write(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def truncate(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-1000])


def pickle_instead(folder):
    (folder / UNET).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")


def lose_a_tensor(folder):
    tensors = load_file(folder / UNET)
    del tensors["conv_out.weight"]
    save_file(tensors, folder / UNET, metadata={"format": "pt"})


DAMAGED = {
    "no index": (remove("model_index.json"), "no model_index.json in it; expected a diffusers pipeline's folder"),
    "index cut short": (write("model_index.json", b"{"), "model_index.json is damaged"),
    "index of another kind": (write("model_index.json", b"[1]"), "model_index.json is damaged"),
    "index of bytes": (write("model_index.json", b"\xff"), "model_index.json is damaged"),
    "no weights": (remove(UNET), "unet/ has no .safetensors file; download the model again"),
    "no vae": (remove("vae"), "vae/ has no .safetensors file; download the model again"),
    "no tokenizer": (remove("tokenizer"), "no tokenizer/; download the model again"),
    "pickle": (pickle_instead, "only diffusion_pytorch_model.bin, a pickle, .* safe_serialization=True"),
    "unet cut short": (truncate(UNET), "could not be loaded .is it whole"),
    "text encoder cut short": (truncate("text_encoder/model.safetensors"), "could not be loaded .is it whole"),
    "empty weights": (write(UNET, b""), "could not be loaded .is it whole"),
    "tensor lost": (lose_a_tensor, "is it whole"),
    "config cut short": (write("vae/config.json", b"{"), "could not be loaded .*vae/config.json"),
    "no scheduler": (remove("scheduler"), "could not be loaded .*scheduler_config.json"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_named_in_one_line(copy, name):
    damage, words = DAMAGED[name]
    damage(copy)
    message = refused(str(copy))
    assert str(copy) in message and re.search(words, message), message


def test_another_familys_folder_names_its_script(golden_folder, copy):
    message = refused(str(golden_folder.with_name("tiny-sdxl")))
    expected = "is a StableDiffusionXLPipeline; expected a StableDiffusionPipeline; use dno_sdxl.py"
    assert re.fullmatch(rf"--model \S+tiny-sdxl {expected}", message)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert refused(str(copy)).endswith("is a FluxPipeline; expected a StableDiffusionPipeline")


def test_variant(tiny_model, tmp_path):
    tiny_model.pipe.save_pretrained(tmp_path, variant="fp16")
    assert same_weights(dno.load_model(str(tmp_path), variant="fp16"), tiny_model)
    assert "does it need another --variant?" in refused(str(tmp_path))
    assert "does it need another --variant?" in refused(str(tmp_path), variant="bf16")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "no/such/folder", "two words", "./no", "../no", "no/such.safetensors", "no.ckpt"]
)
def test_a_model_that_is_nowhere(name):
    assert refused(name) == f"--model {name}: no such folder or file; expected one, or a hub id such as owner/name"


# The hub.


def http_error(kind, status):
    return kind("told by the hub", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


NO_NETWORK = "cannot be reached .* local folder, .*--model sprites"
HUB = {
    "gated": (http_error(errors.GatedRepoError, 403), "is gated: accept its licence .*hf auth login"),
    "unknown": (http_error(errors.RepositoryNotFoundError, 404), "neither a folder here nor a model on the hub"),
    "no pipeline": (http_error(errors.RemoteEntryNotFoundError, 404), "no diffusers pipeline: it has no model_index"),
    "offline": (errors.OfflineModeIsEnabled("offline"), NO_NETWORK),
    "not cached": (errors.LocalEntryNotFoundError("not cached"), NO_NETWORK),
    "server": (http_error(errors.HfHubHTTPError, 500), NO_NETWORK),
    "refused": (ConnectionError("refused"), NO_NETWORK),
    "name server": (httpx.ConnectError("name or service not known"), NO_NETWORK),
    "timeout": (httpx.ReadTimeout("timed out"), NO_NETWORK),
}


def raising(error):
    def function(*args, **kw):
        raise error

    return function


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_says_is_one_line_with_the_fix(monkeypatch, name):
    error, words = HUB[name]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    message = refused("owner/name")
    assert message.startswith("--model owner/name") and re.search(words, message)


def test_a_name_that_no_hub_has():
    assert "check the spelling" in refused("owner--x/name")


def test_a_hub_model_is_loaded_by_its_name_and_its_class_checked_first(monkeypatch, tiny_folder, golden_folder):
    asked, load = [], StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: tiny_folder / file)
    monkeypatch.setattr(
        StableDiffusionPipeline, "from_pretrained", lambda name, **kw: asked.append(name) or load(tiny_folder, **kw)
    )
    assert dno.load_model("owner/name").default_size == (16, 16) and asked == ["owner/name"]
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", raising(httpx.ReadError("lost the connection")))
    assert "--model owner/name could not be loaded" in refused("owner/name")
    sdxl = golden_folder.with_name("tiny-sdxl")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: sdxl / file)
    assert "use dno_sdxl.py" in refused("owner/name")


# Single files.


RESNET = (
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
)  # fmt: skip
ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))


def replaced(text, pairs):
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def original_unet_key(key):
    """diffusers' name -> the original code's, which numbers all blocks in a row, for one resnet a down block."""
    ends = (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
            ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))  # fmt: skip
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key)
    if not match:
        return replaced(key, ends)
    place, block, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = replaced(rest, RESNET) if kind == "resnets" else rest
    if kind == "downsamplers":
        return f"input_blocks.{2 * block + 2}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # after the attentions of block 0
        return f"output_blocks.{2 * block + 1}.2.{rest}"
    if place == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    number = 2 * block + layer + (place == "down")
    return f"{'input' if place == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"


def original_vae_key(key, blocks=2):
    key = key.replace("down_blocks", "down")
    key = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    if "mid_block.attentions" in key:
        key = replaced(key.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return replaced(key, (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                          ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")))  # fmt: skip


@pytest.fixture(scope="session")
def single_file(tiny_folder, tmp_path_factory):
    """The tiny pipeline's weights in one file, under the names of the original Stable Diffusion code."""
    model, tensors = dno.load_model(tiny_folder), {}
    for key, value in model.unet.state_dict().items():
        tensors["model.diffusion_model." + original_unet_key(key)] = value
    for key, value in model.vae.state_dict().items():
        name = original_vae_key(key)
        linear = "attn_1" in name and value.dim() == 2  # the original has 1 x 1 convolutions
        tensors["first_stage_model." + name] = value[:, :, None, None] if linear else value
    for key, value in model.pipe.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = value
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def test_a_single_file_with_a_config_gives_the_folders_model(single_file, tiny_folder, tiny_model):
    model = dno.load_model(str(single_file), model_config=str(tiny_folder))
    assert same_weights(model, tiny_model)
    assert model.schedule(50).timesteps.tolist() == tiny_model.schedule(50).timesteps.tolist()
    assert model.prediction_type == "epsilon" and model.default_size == (16, 16)
    half = dno.load_model(str(single_file), torch.bfloat16, model_config=str(tiny_folder))
    assert {value.dtype for value in weights(half).values() if value.is_floating_point()} == {torch.bfloat16}


def test_a_single_file_without_config_and_network_names_the_flag(single_file, monkeypatch):
    monkeypatch.setattr("diffusers.loaders.single_file.snapshot_download", raising(httpx.ConnectError("no network")))
    message = refused(str(single_file))
    assert f"--model {single_file} could not be read" in message
    assert "without a network, give its pipeline's folder with --model_config" in message


def test_a_damaged_single_file(single_file, tiny_folder, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(single_file.read_bytes()[:-1000])
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("cut", "other"):
        message = refused(str(tmp_path / f"{name}.safetensors"), model_config=str(tiny_folder))
        assert f"{name}.safetensors could not be read (is the file whole?)" in message


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_never_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    assert "only .safetensors is read, since a pickle can run code" in refused(str(path))
    assert not (tmp_path / "bad").exists()


# LoRA.


@pytest.fixture(scope="session")
def lora(tiny_folder, tmp_path_factory):
    """A LoRA's file, as peft and diffusers write it, and its (A, B) of one layer."""
    unet, folder = dno.load_model(tiny_folder).unet, tmp_path_factory.mktemp("lora")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, convert_state_dict_to_diffusers(state))
    return folder / "pytorch_lora_weights.safetensors", [state[f"{TO_Q}.lora_{x}.weight"] for x in "AB"]


@pytest.mark.parametrize(("suffix", "scale"), [("", 1), (":0.5", 0.5), (":-2", -2)])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_lora_adds_its_scaled_product_to_the_weights(tiny_folder, tiny_model, lora, suffix, scale, as_folder):
    file, (a, b) = lora
    model = dno.load_model(tiny_folder, lora=f"{file.parent if as_folder else file}{suffix}")
    change = model.unet.get_submodule(TO_Q).weight - tiny_model.unet.get_submodule(TO_Q).weight
    torch.testing.assert_close(change, scale * b @ a)
    assert change.abs().max() > 0.01
    assert weights(model).keys() == weights(tiny_model).keys()  # nothing of it is left beside the weights
    assert not any(p.requires_grad for p in model.unet.parameters())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({"unet.elsewhere.lora_A.weight": (2, 3), "unet.elsewhere.lora_B.weight": (3, 2)}, "elsewhere"),
     ({f"unet.{TO_Q}.lora_A.weight": (2, 5), f"unet.{TO_Q}.lora_B.weight": (5, 2)}, "size mismatch"),
     ({"some.weight": (2, 3)}, "lora")],
)  # fmt: skip
def test_a_lora_of_another_model_is_refused(tiny_folder, tmp_path, tensors, words, capfd):
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, path)
    message = refused(tiny_folder, lora=f"{path}:0.5")
    assert message.startswith(f"--lora {path} could not be added") and words in message
    assert capfd.readouterr().err == ""  # the one line is all


def test_a_lora_that_cannot_be_read(tiny_folder, tmp_path, lora):
    assert "no such file or folder" in refused(tiny_folder, lora="no/such.safetensors")
    assert "no such file or folder" in refused(tiny_folder, lora="/no/such:0.5")
    assert "the scale is nan; expected a finite number" in refused(tiny_folder, lora=f"{lora[0]}:nan")
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    assert "a pickle can run code" in refused(tiny_folder, lora=str(tmp_path / "pytorch_lora_weights.bin"))
    assert "could not be added" in refused(tiny_folder, lora=str(tmp_path))
    (tmp_path / "cut.safetensors").write_bytes(lora[0].read_bytes()[:-10])
    assert "could not be added" in refused(tiny_folder, lora=str(tmp_path / "cut.safetensors"))


# Device and precision.


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert resolve_device("auto").type == expected
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: .* no such device; use --device auto"):
            resolve_device(name)


def test_precisions(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert all(resolve_precision(name, device) == dtype for name, dtype in names.items() for device in (cpu, cuda))
    assert resolve_precision("auto", cpu) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert resolve_precision("auto", cuda) == expected
