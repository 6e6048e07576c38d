"""A model from a folder, a single file or the hub, with a LoRA; and one clear line for each way that can fail."""

import importlib
import json
import re
import shutil
import warnings

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import errors
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dno
from dno.errors import UserError
from dno.models.loading import check_model
from dno.models.specs import resolve_device, resolve_precision
from dno.models.stable_diffusion import SCHEDULERS, StableDiffusion, StableDiffusionXL

httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # or its successor httpx2
UNET, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"
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
    networks = {"unet": model.network, "vae": model.vae}
    networks.update({name: getattr(model.pipe, name) for name in model.text_encoders})
    return {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Folders.


def test_a_folder_is_loaded_frozen_and_as_it_is(tiny_folder, tiny_model):
    saved = load_file(tiny_folder / UNET)
    assert all(torch.equal(value, saved[key]) for key, value in tiny_model.network.state_dict().items())
    assert not any(value.requires_grad for value in weights(tiny_model).values())
    assert not (tiny_model.network.training or tiny_model.vae.training or tiny_model.pipe.text_encoder.training)
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


# A refiner is published as a pipeline of the second kind.
@pytest.mark.parametrize("kind", ["Flux", "StableDiffusionXLImg2Img", "StableDiffusionXLInpaint"])
def test_another_familys_folder_is_refused(copy, kind):
    (copy / "model_index.json").write_text(json.dumps({"_class_name": f"{kind}Pipeline"}))
    expected = f"is a {kind}Pipeline; expected a StableDiffusionPipeline or StableDiffusionXLPipeline"
    assert refused(str(copy)) == f"--model {copy} {expected}"


@pytest.fixture
def copy_xl(tiny_xl_folder, tmp_path):
    return shutil.copytree(tiny_xl_folder, tmp_path / "copy-xl")


def test_the_folder_says_which_family_it_is_of(tiny_xl_folder, tiny_xl_model, tiny_model):
    assert type(tiny_xl_model) is StableDiffusionXL and type(tiny_model) is StableDiffusion
    saved = load_file(tiny_xl_folder / "text_encoder_2/model.safetensors")
    assert all(torch.equal(saved[key], v) for key, v in tiny_xl_model.pipe.text_encoder_2.state_dict().items())
    assert not any(value.requires_grad for value in weights(tiny_xl_model).values())
    assert not (tiny_xl_model.pipe.text_encoder.training or tiny_xl_model.pipe.text_encoder_2.training)


XL_DAMAGED = {
    "no second text encoder": (remove("text_encoder_2"), "text_encoder_2/ has no .safetensors file; download"),
    "no second tokenizer": (remove("tokenizer_2"), "no tokenizer_2/; download the model again"),
    "no text encoder": (remove("text_encoder"), "text_encoder/ has no .safetensors file; download the model again"),
    "second cut short": (truncate("text_encoder_2/model.safetensors"), "could not be loaded .is it whole"),
}


@pytest.mark.parametrize("name", XL_DAMAGED)
def test_a_damaged_folder_of_sdxl_is_named_in_one_line(copy_xl, name):
    damage, words = XL_DAMAGED[name]
    damage(copy_xl)
    message = refused(str(copy_xl))
    assert str(copy_xl) in message and re.search(words, message), message


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


def test_a_hub_model_is_loaded_by_its_name_and_its_class_checked_first(monkeypatch, tiny_folder, tmp_path):
    asked, load = [], StableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: tiny_folder / file)
    monkeypatch.setattr(
        StableDiffusionPipeline, "from_pretrained", lambda name, **kw: asked.append(name) or load(tiny_folder, **kw)
    )
    assert dno.load_model("owner/name").default_size == (16, 16) and asked == ["owner/name"]
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", raising(httpx.ReadError("lost the connection")))
    assert "--model owner/name could not be loaded" in refused("owner/name")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: tmp_path / file)
    assert "--model owner/name is a FluxPipeline" in refused("owner/name")


# What a model's configuration asks for.


def configured(folder, part, **changes):
    """Change the configuration of a part, whose class too if `_class_name` is given; "left out" takes a key out."""
    path = next((folder / part).glob("*config.json"))
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = [index[part][0], config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


UNSUPPORTED = {
    "flow sigmas": ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
                    "scheduler is UniPCMultistepScheduler with use_flow_sigmas; expected discrete variance-preserving"),
    "flow prediction": ({"prediction_type": "flow_prediction"}, "predicts 'flow_prediction'; expected one of"),
    "betas": ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; expected"),
    "no signal": ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
                  "end without signal .* expected prediction_type v_prediction"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_scheduler_that_is_not_supported_is_named(copy, name):
    changes, words = UNSUPPORTED[name]
    configured(copy, "scheduler", **changes)
    assert re.search(words, refused(str(copy)))


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_scheduler_of_other_levels_is_named(copy, kind):
    configured(copy, "scheduler", _class_name=kind)
    message = refused(str(copy))
    assert f"the model's scheduler is {kind}; expected" in message and "DDIMScheduler" in message


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_the_table_has_ddims_levels(kind):
    """All of them give the timesteps and alphas that DDIM does, from the same configuration."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    try:
        scheduler = getattr(diffusers, kind)(**config)
    except ImportError as error:  # some of them want scipy or torchsde
        pytest.skip(str(error))
    ours = diffusers.DDIMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(scheduler.alphas_cumprod, ours.alphas_cumprod)


@pytest.mark.parametrize(
    ("kind", "changes", "ignored"),
    [("PNDMScheduler", {}, None), ("PNDMScheduler", {"set_alpha_to_one": True}, "set_alpha_to_one=True"),
     ("DDIMScheduler", {}, None), ("DDIMScheduler", {"clip_sample": False}, None),
     ("DDIMScheduler", {"clip_sample": True, "thresholding": True}, "clip_sample=True, thresholding=True"),
     ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
     ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"},
      "timestep_type=continuous"),
     ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "algorithm_type": "dpmsolver++"}, "use_lu_lambdas=True")],
)  # fmt: skip
def test_what_the_scheduler_asks_for_in_vain_is_one_warning(copy_xl, kind, changes, ignored):
    configured(copy_xl, "scheduler", _class_name=kind, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dno.load_model(str(copy_xl))
    said = [str(w.message) for w in caught if "scheduler" in str(w.message)]
    assert said == ([f"ignored settings of the model's scheduler: {ignored}"] if ignored else [])


def test_a_distilled_unet_and_one_that_predicts_its_variance_are_refused(tiny_model):
    tiny_model.pipe.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(UserError, match="guidance scale as an input .time_cond_proj_dim.*LCM LoRA"):
        StableDiffusion(tiny_model.pipe, "distilled")
    tiny_model.pipe.unet.register_to_config(time_cond_proj_dim=None, out_channels=8)
    with pytest.raises(UserError, match="gives 8 channels and its VAE has 4"):
        StableDiffusion(tiny_model.pipe, "learned variance")


def test_the_size_of_a_model_that_does_not_say_it(copy):
    configured(copy, "unet", sample_size=None)
    model = dno.load_model(str(copy))
    assert model.default_size == (16, 16), "the VAE says it, in pixels"
    configured(copy, "vae", sample_size="left out")
    model = dno.load_model(str(copy))
    with pytest.raises(UserError, match="does not say what size its images have; give --height and --width"):
        model.default_size  # noqa: B018
    settings = {"num_steps": 2, "opt_steps": 1, "output": None}
    with pytest.raises(UserError, match="give --height and --width"):
        dno.align(model=model, **settings)
    assert dno.align(model=model, height=16, width=24, **settings).images.shape == (1, 3, 16, 24)


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
            ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
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


def original_names(state):
    """A VAE's tensors as the original code has them, the attention's matrices as 1 x 1 convolutions."""
    for key, value in state.items():
        name = original_vae_key(key)
        linear = "attn_1" in name and value.dim() == 2
        yield name, (value[:, :, None, None] if linear else value).contiguous()


@pytest.fixture(scope="session")
def single_file(tiny_folder, tmp_path_factory):
    """The tiny pipeline's weights in one file, under the names of the original Stable Diffusion code."""
    model, tensors = dno.load_model(tiny_folder), {}
    for key, value in model.network.state_dict().items():
        tensors["model.diffusion_model." + original_unet_key(key)] = value
    for name, value in original_names(model.vae.state_dict()):
        tensors["first_stage_model." + name] = value
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


# Enough of a single file to be taken for Stable Diffusion, and no more.
A_UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("tensor", "looks"),
    [("double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
     ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a FLUX model"),
     ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
     ("lora_unet_down_blocks_1.lora_up.weight", "a LoRA, which goes with --lora"),
     (f"unet.{TO_Q}.lora_A.weight", "a LoRA, which goes with --lora"),
     ("control_model.input_blocks.0.0.weight", "a ControlNet")],
)  # fmt: skip
def test_a_single_file_of_something_else_is_refused_with_what_it_looks_like(tmp_path, tiny_folder, tensor, looks):
    path = tmp_path / "other.safetensors"
    save_file({tensor: torch.zeros(2), "some.weight": torch.zeros(2)}, path)
    for config in (None, str(tiny_folder)):
        message = refused(str(path), model_config=config)
        assert message == f"--model {path} has no UNet of Stable Diffusion: it looks like {looks}"
    save_file({"some.weight": torch.zeros(2)}, path)
    assert "has no UNet of Stable Diffusion: its tensors are such as 'some.weight'" in refused(str(path))


def test_a_damaged_single_file(single_file, tiny_folder, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(single_file.read_bytes()[:-1000])
    save_file(A_UNET, tmp_path / "other.safetensors")
    for name in ("cut", "other"):
        message = refused(str(tmp_path / f"{name}.safetensors"), model_config=str(tiny_folder))
        assert f"{name}.safetensors could not be read (is the file whole?)" in message


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_never_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    assert "only .safetensors is read, since a pickle can run code" in refused(str(path))
    assert not (tmp_path / "bad").exists()


OPEN_CLIP = (
    ("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.token_embedding", "token_embedding"),
    ("final_layer_norm", "ln_final"), ("encoder.layers", "transformer.resblocks"), ("layer_norm", "ln_"),
    ("fc1", "c_fc"), ("fc2", "c_proj"), ("self_attn", "attn"),
)  # fmt: skip


def open_clip_tensors(state):
    """A text encoder's tensors as open_clip has them: the three projections of an attention in one."""
    tensors = {replaced(key.removeprefix("text_model."), OPEN_CLIP): value for key, value in state.items()}
    tensors["text_projection"] = tensors.pop("text_projection.weight").T
    for key in [key for key in tensors if ".q_proj." in key]:
        together = [tensors.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        tensors[key.replace("q_proj.", "in_proj_")] = torch.cat(together)
    return tensors


def test_a_single_file_of_sdxl_gives_the_folders_model(tiny_xl_folder, tiny_xl_model, tmp_path):
    model, path = tiny_xl_model, tmp_path / "xl.safetensors"
    text, text_2 = (getattr(model.pipe, name).state_dict() for name in model.text_encoders)
    tensors = {
        **{f"model.diffusion_model.{original_unet_key(key)}": value
           for key, value in model.network.state_dict().items()},
        **{f"first_stage_model.{name}": value for name, value in original_names(model.vae.state_dict())},
        **{f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}": value
           for key, value in text.items()},
        **{f"conditioner.embedders.1.model.{key}": value for key, value in open_clip_tensors(text_2).items()},
    }  # fmt: skip
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    loaded = dno.load_model(str(path), model_config=str(tiny_xl_folder))
    assert type(loaded) is StableDiffusionXL and same_weights(loaded, model)


def test_a_single_file_of_a_refiner_is_refused_by_its_tensors(tmp_path):
    path = tmp_path / "refiner.safetensors"
    save_file(A_UNET | {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}, path)
    assert refused(str(path)) == f"--model {path} is an SDXL refiner, which cannot make images of noise alone"


def test_a_single_file_of_sdxl_is_known_by_its_tensors_or_its_configuration(tmp_path, tiny_xl_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", lambda path, **kw: asked.append(kw) or 1 / 0)
    save_file(A_UNET | {"conditioner.embedders.1.model.ln_final.bias": torch.zeros(2)}, tmp_path / "xl.safetensors")
    save_file(A_UNET, tmp_path / "other.safetensors")
    assert "could not be read" in refused(str(tmp_path / "xl.safetensors"))
    assert "could not be read" in refused(str(tmp_path / "other.safetensors"), model_config=str(tiny_xl_folder))
    assert [kw["config"] for kw in asked] == [None, str(tiny_xl_folder)]
    assert all(kw["add_watermarker"] is False for kw in asked)


# Another VAE, and its precision.


def vae_folder(model, folder, **changes):
    """A VAE as diffusers saves it, with other weights, of the model's configuration but for some changes."""
    vae = AutoencoderKL.from_config({**model.vae.config, **changes})
    for value in vae.state_dict().values():
        value.fill_(0.25)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["folder", "file of the folder", "original file"])
def test_another_vae_takes_the_place_of_the_models(tiny_xl_folder, tiny_xl_model, tmp_path, kind):
    folder = vae_folder(tiny_xl_model, tmp_path / "vae")
    state = load_file(folder / VAE_FILE)
    save_file(dict(original_names(state)), tmp_path / "original.safetensors")
    paths = {"folder": "vae", "file of the folder": f"vae/{VAE_FILE}", "original file": "original.safetensors"}
    model = dno.load_model(tiny_xl_folder, torch.bfloat16, vae=str(tmp_path / paths[kind]))
    assert model.vae.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.vae.parameters())
    assert {float(v) for value in model.vae.state_dict().values() for v in value.unique()} == {0.25}
    assert model.vae.config.scaling_factor == 0.13025


def test_of_a_vae_in_a_single_file_nobody_knows_whether_it_overflows(tiny_xl_folder, tiny_xl_model, tmp_path):
    """The model's own configuration, by which the file is read, says that the model's own VAE does."""
    file = str(vae_folder(tiny_xl_model, tmp_path / "vae", force_upcast=True) / VAE_FILE)
    assert dno.load_model(tiny_xl_folder, torch.float16, vae=file).vae.dtype == torch.float32
    assert dno.load_model(tiny_xl_folder, torch.float16, vae=file, vae_precision="fp16").vae.dtype == torch.float16


def test_another_vae_from_the_hub(tiny_xl_folder, tiny_xl_model, tmp_path, monkeypatch):
    folder, load = vae_folder(tiny_xl_model, tmp_path / "vae"), AutoencoderKL.from_pretrained
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: folder / file)
    local = {"owner/vae": folder}
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda name, **kw: load(local.get(name, name), **kw))
    assert (dno.load_model(tiny_xl_folder, vae="owner/vae").vae.decoder.conv_in.weight == 0.25).all()
    missing = http_error(errors.RemoteEntryNotFoundError, 404)
    for error, words in ((ConnectionError(), "hub cannot be reached"), (missing, "is no VAE of diffusers")):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
        message = refused(tiny_xl_folder, vae="owner/vae")
        assert message.startswith("--vae owner/vae") and words in message


def test_a_vae_that_cannot_be_used(tiny_xl_folder, tiny_xl_model, tmp_path):
    def why(vae):
        return refused(tiny_xl_folder, vae=str(vae))

    assert "--vae /no/such: no such folder or file" in why("/no/such")
    assert "--vae no/such.safetensors: no such folder or file" in why("no/such.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    assert "a pickle can run code" in why(tmp_path / "vae.pt")
    folder = vae_folder(tiny_xl_model, tmp_path / "vae")
    file = folder / VAE_FILE
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    assert f"--vae {cut} could not be loaded (is it whole?)" in why(cut)
    state = load_file(file)
    del state["decoder.conv_out.weight"]
    save_file(state, tmp_path / "lost.safetensors", metadata={"format": "pt"})
    assert "could not be loaded (is it whole?)" in why(tmp_path / "lost.safetensors")
    wide = vae_folder(tiny_xl_model, tmp_path / "wide", latent_channels=16)
    assert why(wide) == f"--vae {wide} has 16 latent channels; the model's own has 4"
    (folder / "config.json").unlink()
    assert "no config.json in it" in why(folder)
    file.rename(folder / "diffusion_pytorch_model.bin")
    assert "only diffusion_pytorch_model.bin, a pickle" in why(folder)
    for vae in ("/no/such", folder):
        with pytest.raises(UserError, match="--vae"):
            check_model(tiny_xl_folder, vae=str(vae))


@pytest.mark.parametrize(
    ("upcast", "dtype", "precision", "expected"),
    [(True, torch.float16, "auto", torch.float32), (True, torch.bfloat16, "auto", torch.bfloat16),
     (True, torch.float32, "auto", torch.float32), (False, torch.float16, "auto", torch.float16),
     (True, torch.bfloat16, "fp32", torch.float32), (True, torch.float32, "bf16", torch.bfloat16),
     (True, torch.float16, "fp16", "--vae_precision fp16: the VAE overflows in it.*bf16 or fp32"),
     (False, torch.float32, "fp16", torch.float16)],
)  # fmt: skip
def test_the_vaes_precision(tiny_xl_model, copy_xl, upcast, dtype, precision, expected):
    """It is loaded as it was saved and rounded once; in float16 only where its configuration does not warn of it."""
    tiny_xl_model.vae.register_to_config(force_upcast=upcast)
    tiny_xl_model.vae.save_config(copy_xl / "vae")
    if isinstance(expected, str):
        assert re.search(expected, refused(copy_xl, dtype, vae_precision=precision))
        return
    model = dno.load_model(copy_xl, dtype, vae_precision=precision)
    assert model.dtype == dtype and model.vae.dtype == expected
    saved = tiny_xl_model.vae.state_dict()
    assert all(torch.equal(saved[key].to(expected), value) for key, value in model.vae.state_dict().items())
    images = model.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_a_vae_that_overflows_in_float16_gives_finite_images(tiny_xl_model, copy_xl):
    """Its first layer gives values past 65504, and the others bring them back, as with SDXL's own VAE."""
    tiny_xl_model.vae.decoder.conv_in.weight.mul_(1e4)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for upcast in (True, False):
        tiny_xl_model.vae.register_to_config(force_upcast=upcast)
        tiny_xl_model.vae.save_pretrained(copy_xl / "vae")
        images = dno.load_model(copy_xl, torch.float16).decode(latents)
        assert bool(images.isfinite().all()) == upcast, "the second is the proof that it overflows"


# LoRA.


@pytest.fixture(scope="session")
def lora(tiny_folder, tmp_path_factory):
    """A LoRA's file, as peft and diffusers write it, and its (A, B) of one layer."""
    unet, folder = dno.load_model(tiny_folder).network, tmp_path_factory.mktemp("lora")
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
    change = model.network.get_submodule(TO_Q).weight - tiny_model.network.get_submodule(TO_Q).weight
    torch.testing.assert_close(change, scale * b @ a)
    assert change.abs().max() > 0.01
    assert weights(model).keys() == weights(tiny_model).keys()  # nothing of it is left beside the weights
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_lora_is_added_to_sdxl(tiny_xl_folder, tiny_xl_model, tmp_path):
    a, b = torch.ones(2, 16), torch.full((16, 2), 0.5)
    save_file({f"unet.{TO_Q}.lora_A.weight": a, f"unet.{TO_Q}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    model = dno.load_model(tiny_xl_folder, lora=f"{tmp_path / 'lora.safetensors'}:2")
    change = model.network.get_submodule(TO_Q).weight - tiny_xl_model.network.get_submodule(TO_Q).weight
    torch.testing.assert_close(change, 2 * b @ a)


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
