"""The README and docs/ say what the program does: commands parse, examples run, tables are made of the settings."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dno import align
from dno.cli import build_parser, parse
from dno.methods import METHODS, method_class

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
# Whatever starts them: python, accelerate launch or torchrun.
SCRIPTS = {
    (page, method, flags)
    for page, text in PAGES.items()
    for method, flags in [
        *(("dno", flags) for flags in re.findall(r"^(?!#)(?:\S.* )?dno_\w+\.py (.*?)(?:  +#.*)?$", text, re.M)),
        *re.findall(r"^python -m dno (\w+) (.*?)(?:  +#.*)?$", text, re.M),
    ]
}


@pytest.mark.parametrize(("page", "method", "flags"), sorted(SCRIPTS))
def test_commands_parse(page, method, flags):
    if method not in METHODS:
        assert method == "report"
        return
    given, run = parse(build_parser(method_class(method)), shlex.split(flags.replace("output/SD-*", "output/SD-1")))
    if not run["resume"]:
        method_class(method).settings_class()(**given).resolve()


def test_there_are_commands():
    assert len(SCRIPTS) > 20


def test_the_page_of_flags_is_made_of_the_settings():
    made = runpy.run_path(str(ROOT / "docs" / "flags.py"))["page"]()
    assert PAGES["flags.md"] == made, "run python docs/flags.py"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (folder / link).exists(), link


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 260


# The examples of docs/extending.md, as a reader would use them.

CODE = re.findall(r"```python\n(.*?)```", PAGES["extending.md"], re.S)
EXAMPLES = dict(zip(("reward", "model", "family", "method"), CODE, strict=True))


def example(name):
    """What the code of an example defines."""
    found = {"__name__": f"example_{name}"}
    exec(EXAMPLES[name], found)
    return found


def quick(tiny_folder, **settings):
    return align(**{"model": str(tiny_folder), "num_steps": 3, "opt_steps": 3, "lr": 0.05, "seed": 1, **settings})


def test_the_reward(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(EXAMPLES["reward"])
    result = quick(tiny_folder, objective=f"{tmp_path / 'mine.py'}:warmth_loss_fn")
    red, _, blue = result.images.mean(dim=(2, 3)).unbind(dim=1)
    torch.testing.assert_close(result.rewards, red - blue)
    assert result.rewards[0] > result.metrics[0]["reward"]


def test_the_model(monkeypatch):
    from dno.models import specs

    monkeypatch.setattr(specs, "MODELS", dict(specs.MODELS))
    example("model")
    settings = method_class("dno").settings_class()(model="dreamy").resolve()
    assert (settings.num_steps, settings.guidance_scale, settings.eta) == (30, 7.0, 0.5)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_family(tiny_folder, eta):
    from diffusers import StableDiffusionPipeline

    family = example("family")["FlowUNet"]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    model = family(pipe, "mine")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    point = model.schedule(4)[1]
    x0, eps = model.denoise(x, point, model.encode_prompts(["a", "b"]), guidance_scale=3.0)
    torch.testing.assert_close(point.alpha * x0 + point.sigma * eps, x)
    result = quick(tiny_folder, model=family(pipe, "mine"), eta=eta)
    assert result.rewards[0] > result.metrics[0]["reward"]


def test_the_method(tiny_folder, tmp_path, monkeypatch):
    """Flags, files, resuming and reports are there for nothing."""
    module = type(sys)("example_method")
    monkeypatch.setitem(sys.modules, "example_method", module)
    exec(EXAMPLES["method"], vars(module))
    monkeypatch.setitem(METHODS, "random_walk", ("example_method", "RandomWalk"))
    assert "--stride X" in build_parser(method_class("random_walk")).format_help()
    settings = {"model": str(tiny_folder), "num_steps": 3, "seed": 1, "batch_size": 2, "method": "random_walk"}
    whole = align(**settings, steps=6, output=tmp_path)
    assert (whole.folder / "evolution.png").is_file() and whole.folder.name.startswith("Walk-")
    assert all(best >= first for best, first in zip(whole.rewards, whole.metrics[0]["rewards"]))
    seen = []
    part = align(**settings, steps=6, output=tmp_path, callback=lambda metrics: seen.append(metrics) or len(seen) == 3)
    resumed = align(resume=part.folder)
    assert torch.equal(resumed.noise, whole.noise) and torch.equal(resumed.images, whole.images)
    page = subprocess.run(
        [sys.executable, "-m", "dno", "report", str(whole.folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (whole.folder / "report.html").is_file() and "report.html" in page.stdout


def test_the_loop_of_ones_own(tiny_folder, monkeypatch, capsys):
    """The last code of docs/methods.md, on the tiny model."""
    code = re.findall(r"```python\n(.*?)```", PAGES["methods.md"], re.S)[-1]
    code = code.replace('"sprites"', repr(str(tiny_folder))).replace("opt_steps=30", "opt_steps=2, num_steps=3")
    exec(code, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
