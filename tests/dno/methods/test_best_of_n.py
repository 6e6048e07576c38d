"""Best-of-N: candidates are the draws that are promised, the best is kept, and the search follows its formula."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from dno import UserError, align
from dno.methods.best_of_n import SHOWN, SHOWN_SIZE, Ranking, neighbour
from dno.noise import NEIGHBOUR, draw_noise, keyed_generator, load_noise
from dno.resume import prepare
from dno.task import Loaded, Task

SHAPE, STEPS = (4, 8, 8), 3


@pytest.fixture
def quick(tiny_model, tmp_path):
    """quick(folder=None, **settings): best-of-N on the tiny model, into a folder of tmp_path."""

    def run(folder=None, **settings):
        settings = {"num_candidates": 12, "candidates_per_iteration": 4, "objective": "contrast", **settings}
        folder = None if folder is None else tmp_path / folder
        return align(tiny_model, method="best_of_n", num_steps=STEPS, folder=folder, draw=False, **settings)

    return run


def reward_of(tiny_model, noise, **settings):
    """(rewards, images) of a noise, by DNO's iteration 0."""
    settings = {"objective": "contrast", "opt_steps": 1, "batch_size": noise.shape[1], **settings}
    result = align(tiny_model, noise=noise, num_steps=STEPS, **settings)
    return result.rewards, result.images


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gb")} for line in lines]


def check_equal(a, b):
    """Everything that two runs left is equal, bit by bit where nothing is measured."""
    assert lines_of(a.folder) == lines_of(b.folder)
    names = sorted(str(path.relative_to(a.folder)) for path in a.folder.rglob("*.png"))
    assert names == sorted(str(path.relative_to(b.folder)) for path in b.folder.rglob("*.png"))
    for name in names:
        assert (a.folder / name).read_bytes() == (b.folder / name).read_bytes(), name
    for name in ("images", "rewards", "noise"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.steps, a.stopped) == (b.steps, b.stopped)


# Independent draws


def test_the_best_is_the_best_of_the_draws_each_rendered_by_itself(quick, tiny_model):
    result = quick(batch_size=2, seed=5)
    for b in range(2):
        draws = [draw_noise([5 + b], STEPS, SHAPE, k) for k in range(12)]
        rewards = torch.cat([reward_of(tiny_model, draw)[0] for draw in draws])
        best = rewards.argmax().item()
        assert result.rewards[b].item() == pytest.approx(rewards[best].item(), abs=1e-5)
        assert torch.equal(result.noise[:, b], draws[best][:, 0]) and result.steps[b] == best // 4
        for step, line in enumerate(result.metrics):
            found, part = line["images"][b], rewards[4 * step : 4 * step + 4]
            assert found["candidate"] == 4 * step + part.argmax().item()
            assert found["mean"] == pytest.approx(part.mean().item(), abs=1e-5)
            assert found["std"] == pytest.approx(part.std(correction=0).item(), abs=1e-5)
            assert 0 < found["probability_min"] <= 1 and 0 < found["probability"] <= 1
    assert len(result.metrics) == 3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_agrees_with_the_start_of_dnos_best_of(quick, tiny_model, eta):
    best = quick(batch_size=2, eta=eta)
    start = align(tiny_model, num_steps=STEPS, objective="contrast", best_of=12, opt_steps=1, batch_size=2, eta=eta)
    assert torch.equal(best.noise, start.noise)
    torch.testing.assert_close(best.images, start.images)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_its_noise_gives_its_image_again(quick, tiny_model, eta):
    result = quick("run", batch_size=2, eta=eta)
    assert result.noise.shape == (1 if eta == 0 else STEPS + 1, 2, *SHAPE)
    for noise in (result.noise, load_noise(result.folder)):
        rewards, images = reward_of(tiny_model, noise, eta=eta)
        torch.testing.assert_close(images, result.images, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rewards, result.rewards, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("search", ["none", "neighbours"])
def test_batches_change_nothing_but_rounding(quick, search):
    together = quick(batch_size=2, batch_per_device=7, search=search)
    one_by_one = quick(batch_size=2, batch_per_device=1, search=search)
    assert torch.equal(together.noise, one_by_one.noise) and together.steps == one_by_one.steps
    torch.testing.assert_close(together.images, one_by_one.images, atol=1e-4, rtol=1e-4)
    for b in range(2):
        alone = quick(seed=b, search=search)
        assert torch.equal(alone.noise[:, 0], together.noise[:, b])


def test_every_iteration_has_the_image_of_its_own_best_whichever_candidate_that_is(tiny_model):
    settings = {"model": tiny_model.name, "num_steps": STEPS, "objective": "contrast", "batch_size": 2}
    start = prepare({**settings, "num_candidates": 12, "candidates_per_iteration": 3}, "best_of_n")
    method = start.method(Task(start.settings, loaded=Loaded(tiny_model)))
    places = set()
    for found in method.iterations(method.start()):
        with torch.no_grad():
            images = method.task.render(found.noise.unbind(), found.rows)
        torch.testing.assert_close(found.images, images)
        torch.testing.assert_close(found.losses, method.task.losses(images, found.rows)[0])
        places |= {int(k) % 3 for k in found.metrics["candidate"]}
    assert {0} < places, "the first of an iteration wins in some of them, and others in others"


def test_more_candidates_than_an_iteration_takes_are_tried_and_no_more(quick):
    sizes = []
    result = quick(num_candidates=10, callback=lambda metrics: sizes.append(metrics["candidate"]))
    assert len(result.metrics) == 3 and 8 <= result.metrics[2]["candidate"] < 10
    assert torch.equal(quick(num_candidates=10, candidates_per_iteration=99).noise, result.noise)


def test_a_prompt_for_each_image(quick):
    both = quick(prompt=["white duck", "red car"])
    for b, prompt in enumerate(("white duck", "red car")):
        alone = quick(prompt=prompt, seed=b)
        assert torch.equal(both.noise[:, b], alone.noise[:, 0])


def test_rewards_without_gradient_and_evaluations(quick):
    result = quick(objective={"jpeg": 1, "contrast": 0.5}, evaluate="white")
    for line in result.metrics:
        assert line["reward"] == pytest.approx(line["jpeg"] + 0.5 * line["contrast"], rel=1e-5)
        assert math.isfinite(line["white"])
    best = result.metrics[result.steps[0]]
    expected = result.images.clamp(-1, 1).mean().item()
    assert best["white"] == pytest.approx(expected, abs=0.2) and "white" in best["images"][0]


def test_rules_that_stop(quick):
    whole = quick(num_candidates=40, seed=1)
    rewards = [line["reward"] for line in whole.metrics]
    target = sorted(rewards)[len(rewards) // 2]
    first = next(i for i, reward in enumerate(rewards) if reward >= target)
    stopped = quick(num_candidates=40, seed=1, target_reward=target)
    assert len(stopped.metrics) == first + 1 and "reached the target" in stopped.stopped[0]
    patient = quick(num_candidates=400, candidates_per_iteration=1, patience=3)
    assert len(patient.metrics) - 1 == patient.steps[0] + 3 and "no better reward in 3" in patient.stopped[0]
    assert len(quick(max_seconds=1e-9).metrics) == 1


def test_an_image_that_stops_leaves_the_others_to_themselves(quick):
    alone = [quick(seed=b, num_candidates=24) for b in range(2)]
    target = min(run.rewards.item() for run in alone)
    both = quick(batch_size=2, num_candidates=24, target_reward=target)
    assert "reached the target" in (both.stopped[0] or both.stopped[1])
    assert both.rewards.min() >= target - 1e-5


# Rewards that fail


def failing(where, how):
    """A reward that fails at the calls' images counted in `where`."""

    def factory(inference_dtype=None, device=None):
        count = iter(range(10**6))

        def loss_fn(images, prompts):
            losses = -images.square().mean(dim=(1, 2, 3))
            for i in range(len(images)):
                if next(count) in where:
                    if how == "raise":
                        raise ValueError("the service is gone")
                    losses[i] = how
            return losses

        return loss_fn

    factory.differentiable = False
    return factory


@pytest.fixture
def reward(monkeypatch):
    """reward(where, how): the name of such a reward."""
    import rewards

    def add(where, how):
        monkeypatch.setitem(rewards.RFUNCTIONS, "failing", failing(where, how))
        return "failing"

    return add


@pytest.mark.filterwarnings("ignore:the reward 'failing' failed")
@pytest.mark.parametrize("how", [math.nan, math.inf, -math.inf, "raise"])
def test_a_failure_loses_its_candidate_and_nothing_else(quick, reward, how):
    clean = quick(objective=reward((), how), batch_per_device=1)
    lost = clean.metrics[clean.steps[0]]["images"][0]["candidate"]
    result = quick("run", objective=reward((lost,), how), batch_per_device=1)
    assert result.metrics[lost // 4]["images"][0]["candidate"] != lost
    assert len(result.metrics) == 3 and result.rewards.isfinite().all() and result.rewards < clean.rewards
    assert all(math.isfinite(line["mean"]) and math.isfinite(line["std"]) for line in result.metrics)


@pytest.mark.filterwarnings("ignore:the reward 'failing' failed")
@pytest.mark.parametrize("how", [math.nan, "raise"])
def test_a_run_without_any_finite_reward_fails_in_one_line_and_can_be_resumed(quick, reward, tiny_model, tmp_path, how):
    with pytest.raises(UserError, match="none of 12 candidates had a finite reward; check the objective"):
        quick("run", objective=reward(range(100), how), num_candidates=40, batch_per_device=1)
    assert len(lines_of(tmp_path / "run")) == 3
    reward((), how)
    resumed = align(tiny_model, resume=tmp_path / "run")
    assert len(resumed.metrics) == 10 and resumed.rewards.isfinite().all()


def test_one_image_without_a_finite_reward_leaves_the_other_alone(quick, reward):
    every_second = range(0, 1000, 2)  # with one candidate per image and iteration, those of image 0
    result = quick(
        "run", objective=reward(every_second, math.nan), batch_size=2, candidates_per_iteration=1, batch_per_device=2
    )
    assert result.rewards[0] == -math.inf and result.rewards[1].isfinite() and result.steps[0] is None
    assert result.images[0].isnan().all() and result.images[1].isfinite().all()
    assert not (result.folder / "gallery.png").exists() and (result.folder / "gallery_b1.png").exists()


# The search


def test_a_neighbour_is_its_formula_and_keeps_the_norms():
    z, xi = (torch.randn(4, 2, *SHAPE, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    for rho in (0.01, 0.3, 0.9, 1.0):
        found = neighbour(z, xi, rho)
        for i in range(4):
            for b in range(2):
                moved = (1 - rho**2) ** 0.5 * z[i, b] + rho * xi[i, b]
                torch.testing.assert_close(found[i, b], moved * z[i, b].norm() / moved.norm())
    distance = [(neighbour(z, xi, rho) - z).norm().item() for rho in (0.01, 0.1, 0.5, 1.0)]
    assert distance == sorted(distance) and distance[0] < 0.015 * z.norm()
    fresh = neighbour(z, xi, 1.0)
    cosine = torch.nn.functional.cosine_similarity(fresh.flatten(2), xi.flatten(2), dim=2)
    torch.testing.assert_close(cosine, torch.ones(4, 2, dtype=torch.float64), msg="a fresh draw, but for its norm")


def test_a_noise_that_is_zero_stays_zero():
    assert not neighbour(torch.zeros(1, 1, *SHAPE), torch.randn(1, 1, *SHAPE), 0.5).any()


def test_a_search_draws_around_the_best_so_far(quick, tiny_model):
    """Written out: the first candidates are draws, later ones neighbours of the best of all before."""
    result = quick(search="neighbours", rho=0.4, seed=3)
    best, highest = None, -math.inf
    for step in range(3):
        pivot = best
        for k in range(4 * step, 4 * step + 4):
            if pivot is None:
                z = draw_noise([3], STEPS, SHAPE, k)
            else:
                xi = torch.randn(STEPS + 1, 1, *SHAPE, generator=keyed_generator(NEIGHBOUR, 3, k))
                z = neighbour(pivot, xi, 0.4)
            reward = reward_of(tiny_model, z)[0].item()
            if reward > highest:
                best, highest = z, reward
    assert torch.equal(result.noise, best) and result.rewards.item() == pytest.approx(highest, abs=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_search_finds_more_than_draws_do(quick, eta):
    settings = {"num_candidates": 80, "candidates_per_iteration": 4, "eta": eta, "batch_size": 2}
    drawn, searched = quick(**settings), quick(search="neighbours", **settings)
    assert (searched.rewards > drawn.rewards).all()
    means = [line["mean"] for line in searched.metrics]
    assert np.mean(means[-5:]) > np.mean(means[:5]), "the whole neighbourhood rises"
    assert min(line["probability"] for line in searched.metrics) > 0.1, "the norms keep it probable"


def test_a_search_starts_from_a_noise_which_is_its_first_candidate(quick, tiny_model):
    start = draw_noise([77, 78], STEPS, SHAPE)
    settings = {"search": "neighbours", "batch_size": 2}
    first = quick(noise=start, num_candidates=1, **settings)
    assert torch.equal(first.noise, start)
    torch.testing.assert_close(first.rewards, reward_of(tiny_model, start)[0])
    near = quick(noise=start, rho=0.01, **settings)
    assert ((near.noise - start).flatten(2).norm(dim=2) < 0.05 * start.flatten(2).norm(dim=2)).all()
    assert (near.rewards >= first.rewards).all()


def test_a_search_with_eta_0_starts_from_the_file_of_such_a_run(quick):
    before = quick("run", eta=0.0)
    after = quick(eta=0.0, search="neighbours", rho=0.05, noise=str(before.folder))
    assert after.noise.shape == before.noise.shape and after.rewards >= before.rewards - 1e-6


def test_a_noise_without_a_search_is_refused(quick):
    with pytest.raises(UserError, match="add --search neighbours"):
        quick(noise=draw_noise([0], STEPS, SHAPE))


# Files


@pytest.mark.parametrize("search", ["none", "neighbours"])
@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_stop_at_any_iteration_can_be_resumed_bit_for_bit(quick, tiny_model, tmp_path, search, stop_at):
    def stop(metrics):
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    settings = {"batch_size": 2, "num_candidates": 18, "search": search, "checkpointing_steps": 2, "evaluate": "jpeg"}
    whole = quick("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        quick("part", callback=stop, **settings)
    assert len(lines_of(tmp_path / "part")) == stop_at + 1
    check_equal(whole, align(tiny_model, resume=tmp_path / "part"))


def test_a_run_that_was_killed_after_its_last_checkpoint_gets_its_gallery(quick, tiny_model):
    run = quick("run")
    gallery = (run.folder / "gallery.png").read_bytes()
    for name in ("gallery.png", "result.json"):
        (run.folder / name).unlink()
    align(tiny_model, resume=run.folder)
    assert (run.folder / "gallery.png").read_bytes() == gallery


def test_the_checkpoint_has_no_noise_but_the_best_unless_it_searches(quick):
    from dno.runs.checkpoints import load_newest

    for search, count in (("none", 1), ("neighbours", 2)):
        run = quick(f"run-{search}", search=search)
        tensors = load_newest(run.folder).tensors
        assert [tensor.shape[-3:] for tensor in tensors.values()].count(SHAPE) == count, tensors.keys()


def test_the_gallery_has_the_best_in_order(quick, tiny_model, tmp_path):
    result = quick("run", num_candidates=24)
    rewards, images = zip(*(reward_of(tiny_model, draw_noise([0], STEPS, SHAPE, k)) for k in range(24)))
    order = torch.cat(rewards).argsort(descending=True)[:SHOWN].tolist()
    with Image.open(result.folder / "gallery.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), dtype=float)
    # 16 px enlarged 12 times, in four columns, each over a caption.
    assert pixels.shape == (4 * (192 + 26 + 8) + 8, 4 * 200 + 8, 3)
    for place, k in enumerate(order):
        x, y = 8 + place % 4 * 200, 8 + place // 4 * 226
        tile = pixels[y + 6 : y + 192 : 12, x + 6 : x + 192 : 12]
        expected = (images[k][0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1) * 255
        assert np.abs(tile - expected).max() <= 1.5, f"place {place} is candidate {k}"
        assert (pixels[y + 192 : y + 218, x : x + 192] < 128).any(), "a caption"


def test_few_candidates_make_a_small_gallery(quick):
    result = quick("run", num_candidates=3)
    with Image.open(result.folder / "gallery.png") as sheet:
        assert sheet.size == (3 * 200 + 8, 226 + 8)


def test_large_images_are_shown_smaller():
    state = Ranking(1)
    state.rank(0, range(2), torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 2 * SHOWN_SIZE + 1, SHOWN_SIZE))
    assert state.shown[0][0][2].shape == ((2 * SHOWN_SIZE + 1) // 3, SHOWN_SIZE // 3, 3)
    assert [k for _, k, _ in state.shown[0]] == [1, 0]


def test_ties_go_to_the_earlier_candidate():
    state = Ranking(1)
    for ks in (range(0, 2), range(2, 4)):
        state.rank(0, ks, torch.tensor([1.0, 1.0]), torch.zeros(2, 3, 8, 8))
        state.move([0], ks, torch.full((1, 1, 4, 8, 8), float(ks.start)))
    assert [k for _, k, _ in state.shown[0]] == [0, 1, 2, 3] and not state.pivot.any()


def test_args_and_report_know_the_method(quick):
    from dno.report.page import main as report

    run = quick("run")
    args = json.loads((run.folder / "args.json").read_text())
    assert args["method"] == "best_of_n" and args["resolved"]["iterations"] == 3
    assert list(args["resolved"]["columns"]) == ["mean", "std"] and args["settings"]["num_candidates"] == 12
    report([str(run.folder)])
    page = (run.folder / "report.html").read_text()
    assert "Mean reward of the candidates" in page and "Best-of-N" in page


# The command line


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*arguments) -> standard output of `python -m dno`, in tmp_path."""
    from dno.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def command(*arguments):
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    yield command
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_command_line_runs_it_and_resumes_it(command, tiny_folder, tmp_path):
    flags = ("--model", tiny_folder, "--num_steps", 3, "--objective", "jpeg", "--no-draw", "--num_candidates", 6)
    out = command("best_of_n", *flags, "--candidates_per_iteration", 2)
    assert "candidates  6, 2 per iteration" in out and "best reward" in out
    (folder,) = (tmp_path / "output").iterdir()
    assert folder.name.startswith("BestOfN-") and (folder / "gallery.png").is_file()
    assert "resumed at iteration 3" in command("--resume", folder)


def test_its_help_lists_its_flags(command, capsys):
    with pytest.raises(SystemExit) as end:
        command("best_of_n", "-h")
    out = capsys.readouterr().out
    assert end.value.code == 0 and len(out.splitlines()) <= 45
    for flag in ("--num_candidates", "--candidates_per_iteration", "--batch_per_device", "--search", "--rho"):
        assert flag in out
    assert "--lr" not in out and "--gamma" not in out


def test_a_sweep_has_a_folder_and_a_row_per_prompt_and_seed(tiny_folder, tmp_path, launch):
    (tmp_path / "prompts.txt").write_text("white duck\nred car\n")
    settings = {
        "method": "best_of_n", "prefix": "BestOfN", "model": str(tiny_folder), "num_steps": 3, "draw": False,
        "objective": ("contrast",), "num_candidates": 4, "candidates_per_iteration": 2,
    }  # fmt: skip
    ((code, out, err),) = launch(1, "--prompts prompts.txt --seeds 0 1", only=settings)
    assert code == 0, err
    (folder,) = (tmp_path / "output").iterdir()
    rows = json.loads((folder / "summary.json").read_text())
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in ("white duck", "red car") for s in (0, 1)]
    assert all(row["iterations"] == 2 and row["best"] >= row["first"] for row in rows)
    assert "others" in rows[0] and not {"mean", "std", "candidate"} & rows[0]["others"].keys()
    assert len(list(folder.glob("*/gallery.png"))) == 4
