"""The report against the run it is made of: nothing from outside, the same numbers, and a slider that works."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dno.errors import UserError
from dno.report import page as report
from dno.report.charts import Curve, chart
from dno.report.page import main, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")


def make_run(folder, steps=10, batch=1, every=1, size=(16, 16), change=None, **args):
    """A run's folder. Image b has reward step + 100 b, but -1 at the last step; frames are plain colours."""
    (folder / "images").mkdir(parents=True)
    args = {"prompt": "a red ball", "model": "sprites", "climbs": "black", "weights": {"black": 1.0}, "gamma": 10.0,
            "watched": ["judge"], "num_steps": 25, "opt_time": 25, "guidance_scale": 3.0, "objective": ["black"],
            "opt_steps": steps, "seed": 1, "lr": 0.01, "precision": "float32", "versions": {"torch": "2.9.1"}} | args
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(steps):
        images = []
        for b in range(batch):
            reward = float(step if step < steps - 1 else -1) + 100 * b
            images.append({"reward": reward, "black": reward, "judge": 0.9 - 0.05 * step, "probability": 10.0**-step,
                           "probability_min": 10.0 ** (-2 * step), "grad_norm": 1.5 + step})  # fmt: skip
            if step % every == 0:
                save(folder / "images" / f"{step:03d}{f'_b{b}' if b else ''}.png", color(step, b), size)
        line = {"step": step, "reward": images[0]["reward"], "rewards": [image["reward"] for image in images],
                "seconds": 9.0 if step == 0 else 0.25, "peak_memory_gb": 1 + step / 100, "images": images}  # fmt: skip
        lines.append(change(line) if change else line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def color(step, b=0):
    return (200 - 7 * step, 40 + 9 * step, 90 + 30 * b)


def save(path, rgb, size=(16, 16), **text):
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    Image.new("RGB", size, rgb).save(path, pnginfo=info)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its texts, and the data of its script."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.texts, self.open, self.scripts = path.read_text("utf-8"), [], [], [], []
        self.feed(self.source)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif data.strip() and self.open[-1:] != ["style"]:
            self.texts.append(data.strip())

    def all(self, tag, kind=None):
        return [a for t, a in self.elements if t == tag and (kind is None or kind in a.get("class", "").split())]

    def pixel(self, frame):
        image = Image.open(io.BytesIO(base64.b64decode(self.data["pool"][frame[1]].partition(",")[2])))
        return image.size, image.format, image.convert("RGB").getpixel((image.width // 2, image.height // 2))


def rows(path):
    """The cells of every table row of a page, as text."""
    found = re.findall(r"<tr.*?</tr>", path.read_text("utf-8"))
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in found]


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run")]))
    own = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(|innerHTML", own)
    for _, attributes in page.elements:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            assert attributes.get(name, "data:").startswith(("data:image/", "data:", "#run-"))
    assert not page.all("link") and len(page.all("script")) == 2
    assert not any("src" in script for script in page.all("script"))
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_numbers_are_those_of_the_run(tmp_path):
    folder = make_run(tmp_path / "run")
    path = write_report([folder])
    assert path == folder / "report.html"
    picture = Page(path).data["runs"][0]["images"][0]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "judge", "probability", "grad_norm"):
        assert picture["values"][name] == pytest.approx([entry["images"][0][name] for entry in log], rel=1e-6)
    assert picture["best"] == 8 and Page(path).data["steps"] == list(range(10))
    table = {row[0]: row[1:] for row in rows(path)}
    assert [table["reward"][0], table["reward"][2]] == ["0.0000", "8.0000"]
    assert [table["judge"][0], table["judge"][2]] == ["0.9000", "0.5000"]
    assert [table["P(z)"][0], table["P(z)"][2]] == ["1.0000", "1.0×10⁻⁸"]
    assert table["gradient norm"][0] == "1.5000"
    subtitle = "sprites · Direct Noise Optimization · reward black · γ 10 · lr 0.01 · seed 1 · 10 iterations"
    assert f"{subtitle} · 0.25 s per iteration · at most 1.09 GB" in Page(path).texts


def test_frames_are_the_saved_images_without_loss(tmp_path):
    page = Page(write_report([make_run(tmp_path / "run")]))
    frames = page.data["runs"][0]["images"][0]["frames"]
    assert [frame[0] for frame in frames] == list(range(10))
    assert [page.pixel(frame) for frame in frames] == [((16, 16), "PNG", color(step)) for step in range(10)]


def test_images_that_were_not_saved(tmp_path):
    """Every fourth is there; initial.png and best.png stand in, and best.png says of which step it is."""
    folder = make_run(tmp_path / "run", every=4)
    (folder / "images" / "000.png").unlink()
    save(folder / "initial.png", (1, 2, 3))
    save(folder / "best.png", (4, 5, 6), step=7)  # a limit on P(z) ruled out 8
    (folder / "images" / "004.png").write_bytes(b"no image")
    page = Page(write_report([folder]))
    picture = page.data["runs"][0]["images"][0]
    assert picture["best"] == 7 and [frame[0] for frame in picture["frames"]] == [0, 7, 8]
    assert [page.pixel(frame)[2] for frame in picture["frames"]] == [(1, 2, 3), (4, 5, 6), color(8)]
    shutil.rmtree(folder / "images")
    (folder / "initial.png").unlink()
    (folder / "best.png").unlink()
    assert Page(write_report([folder])).data["pool"] == []


def test_batch(tmp_path):
    path = write_report([make_run(tmp_path / "run", steps=4, batch=3)])
    page = Page(path)
    pictures = page.data["runs"][0]["images"]
    assert [p["values"]["reward"] for p in pictures] == [[100 * b + i for i in (0, 1, 2, -1)] for b in range(3)]
    assert page.pixel(pictures[2]["frames"][1])[2] == color(1, 2)
    assert [button["data-image"] for button in page.all("button") if "data-image" in button] == ["0", "1", "2"]
    summary = [row[row.index(str(b)) :][:6] for b, row in enumerate(rows(path)[1:4])]
    assert summary == [
        [str(b), *(f"{100 * b + step:.{2 if b else 4}f}" for step in (0, 2)), "2", "0.0100", "0.9000 → 0.8000"]
        for b in range(3)
    ]


def test_several_runs(tmp_path):
    folders = [make_run(tmp_path / "runs" / "one", steps=4, opt_steps=6)]
    folders.append(make_run(tmp_path / "runs" / "two", steps=6, gamma=0.0))
    path = write_report([*folders, folders[0]])  # one of them twice
    assert path == tmp_path / "runs" / "report.html"
    page, table = Page(path), rows(path)
    assert table[1] == ["gamma 10one", "0.0000", "2.0000", "2", "0.0100", "0.9000 → 0.8000", "4 of 6", "0.25", "1.03"]
    assert table[2] == ["gamma 0two", "0.0000", "4.0000", "4", "1.0×10⁻⁴", "0.9000 → 0.7000", "6", "0.25", "1.05"]
    assert page.data["steps"] == list(range(6)) and [len(run["steps"]) for run in page.data["runs"]] == [4, 6]
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link["href"].removeprefix("#") for link in page.all("a")} == {"run-0", "run-1"} <= targets
    curves = page.all("path", "curve")
    assert len(curves) == 4 * 2 and {curve["data-run"] for curve in curves} == {"0", "1"}
    other = write_report(folders, tmp_path / "new" / "page.html")
    assert other.read_text("utf-8") == path.read_text("utf-8")  # the same runs, the same bytes


def test_a_run_is_called_by_what_tells_it_apart(tmp_path):
    settings = [{"opt_steps": 5, "gamma": 1.0, "lr": 0.1}, {"opt_steps": 6, "gamma": 2.0, "lr": 0.2, "eta": 0.5}]
    folders = [make_run(tmp_path / name, steps=2, **each) for name, each in zip("ab", settings, strict=True)]
    assert [row[0] for row in rows(write_report(folders))[1:3]] == [
        "eta – · lr 0.1 · gamma 1 · …a", "eta 0.5 · lr 0.2 · gamma 2 · …b"
    ]  # fmt: skip
    same = [make_run(tmp_path / "same" / name, steps=2) for name in "cd"]
    assert [row[0] for row in rows(write_report(same))[1:3]] == ["c", "d"]


def test_flags_that_were_changed_come_first(tmp_path):
    folders = [make_run(tmp_path / name, steps=3, lr=lr, opt_steps=100) for name, lr in (("a", 0.01), ("b", 0.5))]
    source = write_report(folders).read_text("utf-8")
    shown, folded = source.split("<details>")
    names = [re.findall(r'<tr( class="differs")?><th scope="row">(\w+)</th>', part) for part in (shown, folded)]
    assert [name for mark, name in names[0] if mark] == ["lr"]
    assert {"prompt", "model", "gamma", "seed"} <= {name for _, name in names[0]}
    assert {"num_steps", "guidance_scale", "objective", "precision", "versions"} <= {name for _, name in names[1]}
    assert '<td>0.01</td><td>0.5</td><td class="default">0.01</td>' in shown and "torch 2.9.1" in folded


def make_best_of_n(folder, steps=4, prompt=("a red ball", "a duck"), **resolved):
    """A run of another method: two images, no P(z) and no gradient, a column of its own, a gallery per image."""
    images = [{"prompt": list(prompt), "num_candidates": 32, "seed": 1, "model": "sprites", "batch_size": 1}]
    (folder / "images").mkdir(parents=True)
    facts = {"title": "Best-of-N", "iterations": steps, "columns": {"mean": "mean of the batch"}, "climbs": "black",
             "weights": {"black": 1.0}, "watched": [], "batch_size": 2}  # fmt: skip
    args = {"method": "best_of_n", "settings": images[0], "resolved": images[0] | facts | resolved}
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(steps):
        images = [{"reward": step + b, "black": step + b, "mean": step + b - 0.5} for b in range(2)]
        for b in range(2):
            save(folder / "images" / f"{step:03d}{f'_b{b}' if b else ''}.png", color(step, b))
        rewards = [image["reward"] for image in images]
        lines.append({"step": step, "reward": sum(rewards) / 2, "rewards": rewards, "images": images})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for b in range(2):
        save(folder / f"gallery{'_b1' if b else ''}.png", (b, 7, 7), (300, 200))
    return folder


def test_a_run_of_another_method(tmp_path):
    """What the run did not record is nowhere on the page; its own column has a chart and a row."""
    path = write_report([make_best_of_n(tmp_path / "run")])
    page, table = Page(path), rows(path)
    assert table[0] == ["run", "image", "first reward", "best reward", "at iteration", "iterations", "s / iteration",
                        "peak GB"]  # fmt: skip
    assert table[1] == ["run", "0a red ball", "0.0000", "3.0000", "3", "4", "–", "–"]
    assert table[2] == ["1a duck", "1.0000", "4.0000", "3"]
    assert "sprites · Best-of-N · reward black · seed 1 · 4 iterations" in page.texts
    assert [figure["data-metric"] for figure in page.all("figure", "chart")] == ["reward", "mean"]
    assert [row[0] for row in table if row[0] in ("reward", "mean of the batch", "P(z)", "gradient norm")] == [
        "reward", "mean of the batch"
    ]  # fmt: skip
    assert not {"P(z)", "γ", "noise"} & set(re.findall(r"[\w()]+", " ".join(page.texts)))


def test_each_image_has_its_own_prompt_and_gallery(tmp_path):
    page = Page(write_report([make_best_of_n(tmp_path / "run")]))
    images = page.data["runs"][0]["images"]
    assert [image["prompt"] for image in images] == ["a red ball", "a duck"]
    assert [page.pixel([0, image["gallery"]]) for image in images] == [((300, 200), "PNG", (b, 7, 7)) for b in range(2)]
    assert "“a red ball” and 1 more" in page.texts and page.all("p", "prompt")
    assert [button["title"] for button in page.all("button") if "data-image" in button] == ["a red ball", "a duck"]
    page = Page(write_report([make_run(tmp_path / "other")]))
    assert not page.all("figure", "gallery") and "Gallery" not in page.texts


def test_a_gallery_is_made_smaller_and_left_out_if_it_does_not_fit(tmp_path, monkeypatch):
    folder = make_best_of_n(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 255, (2, 1500, 2000, 3), dtype=np.uint8)
    for b, name in enumerate(("gallery.png", "gallery_b1.png")):
        Image.fromarray(noise[b]).save(folder / name, compress_level=0)
    galleries = []
    for limit in (30e6, 4e6, 2e6):  # of which they may have a quarter
        monkeypatch.setattr(report, "RUN_BYTES", limit)
        page = Page(write_report([folder]))
        found = [image["gallery"] for image in page.data["runs"][0]["images"]]
        galleries.append([None if place is None else page.pixel([0, place])[:2] for place in found])
    small = ((640, 480), "JPEG")
    assert galleries == [[((1280, 960), "JPEG")] * 2, [small, small], [small, None]]


def test_runs_of_different_methods_side_by_side(tmp_path):
    """Each is called by its method; what one of them lacks is a dash; its settings alone tell no runs apart."""
    folders = [make_run(tmp_path / "dno", steps=6, watched=[]), make_best_of_n(tmp_path / "n", prompt=["a red ball"])]
    path = write_report(folders)
    page, table = Page(path), rows(path)
    assert table[0][:6] == ["run", "image", "first reward", "best reward", "at iteration", "P(z) at best"]
    assert [row[0] for row in table[1:3]] == ["Direct Noise Optimizationdno", "Best-of-Nn"]
    assert [row[5] for row in table[1:3]] == ["1.0×10⁻⁴", "–"]
    charts = {figure["data-metric"]: figure for figure in page.all("figure", "chart")}
    assert list(charts) == ["reward", "probability", "mean", "grad_norm"]
    assert {(figure["data-left"], figure["data-right"]) for figure in charts.values()} == {("0", "5")}
    shown = path.read_text("utf-8").split("<details>")[0]
    assert re.findall(r'<tr class="differs"><th scope="row">(\w+)</th>', shown) == ["method"]
    assert [run["images"][0]["values"].keys() for run in page.data["runs"]] == [
        {"reward", "probability", "grad_norm", "probability_min"}, {"reward", "mean", "probability_min"}
    ]  # fmt: skip


def test_runs_without_a_common_folder_are_written_up_here(tmp_path, monkeypatch, capsys):
    folders = [make_run(tmp_path / name, steps=2) for name in "ab"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # As on another drive: what the two have in common is the root of the disk.
    monkeypatch.setattr("os.path.commonpath", lambda paths: tmp_path.anchor)
    main([str(folder) for folder in folders])
    assert capsys.readouterr().out.strip() == str(tmp_path / "here" / "report.html")
    table = rows(tmp_path / "here" / "report.html")
    assert [row[0] for row in table[1:3]] == [str(folder) for folder in folders]


HOSTILE = "</script><script>alert(1)</script> \"q\" 'p' <!-- & 白い鴨 🦆 {{data}} \ud800 \x07"


def test_nothing_that_a_run_says_becomes_markup(tmp_path):
    def rename(line):
        return line | {"images": [line["images"][0] | {"<u>\"'": 1, "</script>": 2}]}

    folder = make_run(tmp_path / 'a <b> "c"', prompt=HOSTILE, climbs="<u>", watched=["<u>\"'"], model="<s>",
                      weights={"</script>": 1, "b": 2}, change=rename)  # fmt: skip
    other = make_run(tmp_path / "other", steps=3)
    for folders in ([folder], [folder, other]):
        page = Page(write_report(folders))
        assert not {"u", "s"} & {tag for tag, _ in page.elements}
        assert len(page.all("script")) == 2 and "alert" not in page.scripts[1]
        assert page.data["runs"][0]["images"][0]["prompt"].startswith(HOSTILE.split(" \ud800")[0])
        assert any("</script><script>alert(1)</script>" in words for words in page.texts)
        assert "白い鴨 🦆 {{data}}" in page.all("img")[0]["alt"]


def test_an_unfinished_run_with_values_that_are_no_numbers(tmp_path):
    def spoil(line):
        if line["step"] in (1, 3):
            image = line["images"][0] | {"reward": None, "probability": float("nan"), "grad_norm": None}
            return line | {"reward": None, "rewards": [None], "images": [image], "seconds": None}
        return line

    folder = make_run(tmp_path / "run", steps=6, opt_steps=40, change=spoil)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rewa')
    page = Page(write_report([folder]))
    values = page.data["runs"][0]["images"][0]["values"]
    assert values["reward"] == [0, None, 2, None, 4, -1] and values["probability"][1] is None
    assert any("6 of 40 iterations" in words for words in page.texts)
    assert "NaN" not in page.scripts[0]
    # Nothing but nulls, and entries of another make.
    lines = ['{"step": 0, "reward": null, "images": null}', "7", '{"step": 1, "images": [3]}', '{"step": null}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report([folder]))
    assert page.data["runs"][0]["images"][0]["best"] is None and not page.all("figure", "chart")


def test_curves_are_where_the_values_are():
    curve = Curve(0, 0, "run", [0, 1, 2, 3, 4], [1.0, 3.0, None, 2.0, None], best=1)
    figure = chart("reward", "Reward", "", [curve], curve.steps)
    low, high = (float(re.search(rf'data-{name}="([^"]+)"', figure)[1]) for name in ("low", "high"))
    assert low < 1 and high > 3
    path = re.search(r'class="curve chosen"[^>]* d="([^"]+)"', figure)[1]
    moves = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [move[0] for move in moves] == ["M", "L", "M"] and path.endswith("h0.6")  # a gap, then one alone
    assert [float(x) for _, x, _ in moves[:2]] == [0, 25]
    assert [high - float(y) / 100 * (high - low) for _, _, y in moves] == pytest.approx([1, 3, 2], abs=2e-3)
    assert 'class="ring"' in figure and "left:25.00%" in figure
    logs = chart("p", "P(z)", "", [Curve(0, 0, "run", [0, 1, 2], [1.0, 1e-3, 0.0])], [0, 1, 2], log=True)
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'curve chosen"[^>]* d="([^"]+)"', logs)[1])]
    assert ys[1] - ys[0] == pytest.approx((ys[2] - ys[0]) / 4, abs=0.02) and ys[2] == 100  # cut at 1e-12
    assert "≤10⁻¹²" in logs


def test_large_images_are_made_smaller(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", steps=12, size=(600, 300))
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    for path in folder.glob("images/*.png"):
        shutil.copy(tmp_path / "noise.png", path)
    Image.fromarray(noise[::-1]).save(folder / "images" / "003.png", compress_level=0)
    page = Page(write_report([folder]))
    assert page.pixel([3, 1])[:2] == ((512, 256), "JPEG") and len(page.data["pool"]) == 2  # each image once
    for limit, kept in ((400_000, 12), (100_000, 4)):  # smaller frames first, then fewer of them
        monkeypatch.setattr(report, "RUN_BYTES", limit)
        page = Page(write_report([folder]))
        frames = page.data["runs"][0]["images"][0]["frames"]
        assert page.pixel(frames[0])[0] == (256, 128) and {0, 10, 11} <= {step for step, _ in frames}
        assert sum(len(page.data["pool"][place]) for _, place in frames) < limit and len(frames) == kept


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "args.json").unlink(), "has no args.json"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda folder: (folder / "args.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "args.json").write_text("[]"), "holds no settings"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"st'), "has no entry"),
    ],
)
def test_a_folder_without_a_run_is_one_line(tmp_path, capsys, spoil, words):
    folder = make_run(tmp_path / "run", steps=2)
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        main([str(folder), "--output", str(tmp_path / "page.html")])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and words in err
    assert err.count("\n") == 1 and not (tmp_path / "page.html").exists()


def test_the_path_is_printed_and_a_failed_write_leaves_the_old_page(tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "run", steps=2)
    main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    before = (folder / "report.html").read_bytes()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        write_report([folder])
    assert (folder / "report.html").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "images", "report.html"}


def browse(path, fragment, profile, budget=1000):
    """The page as Chromium has it after its scripts ran, and what they wrote on the console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom",
               f"--virtual-time-budget={budget}", "--enable-logging=stderr", "--v=0", path.as_uri() + fragment]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_the_slider_works_in_a_browser(tmp_path):
    """#step=7 of two runs: the longer shows iteration 7, the shorter its last; #image=1 chooses of the batch."""
    folders = [make_run(tmp_path / "a", steps=10, batch=2, prompt=HOSTILE), make_run(tmp_path / "b", steps=4, every=2)]
    path = write_report(folders)
    dom, console = browse(path, "#step=7&image=1", tmp_path / "profile")
    assert console == []  # a script error, or a request that the page's policy refused, would be here
    cards = dom.split('<section class="card"')[1:]
    captions = [re.findall(r"<figcaption>(.*?)</figcaption>", card)[:3] for card in cards]
    assert captions == [["before", "iteration 7", "best, iteration 8"],
                        ["before", "iteration 3, the last, image of 2", "best, iteration 2"]]  # fmt: skip
    reward = [re.search(r'data-metric="reward">(.*?)</tr>', card)[1] for card in cards]
    numbers = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in reward]
    assert numbers == [["100.00", "107.00", "108.00"], ["0.0000", "−1.0000", "2.0000"]]
    assert re.search(r'aria-valuetext="iteration 7"', dom) and "1.0×10⁻⁷" in cards[0]
    data = Page(path).data
    now = re.search(r'<figure class="now"><img [^>]*src="([^"]+)"', cards[0])[1]
    assert now == data["pool"][dict(data["runs"][0]["images"][1]["frames"])[7]]
    plot = dom.split('data-metric="reward"')[1 + len(cards)]
    assert re.search(r'class="cursor" style="left: 77\.77\d*%', plot)
    dots = re.findall(r'class="dot"[^>]*left: ([\d.]+)%', plot.split("</figure>")[0])
    assert [float(dot) for dot in dots] == pytest.approx([100 * 7 / 9, 100 * 3 / 9], abs=0.01)


ACTIONS = """
<script>
const seen = [], note = () => seen.push(find(".bar output b").textContent);
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
for (const key of ["End", "ArrowLeft", "Home", "ArrowLeft", "ArrowRight"]) { press(key); note(); }
const plot = find(".plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", { buttons: 1, clientX: box.left + box.width * 0.75 }));
note();
find(".choice button[data-image='1']").click();
seen.push(find(".ring:not([hidden])").dataset.image, all(".curve.chosen").map(curve => curve.dataset.image).join(""));
press(" ");
seen.push(play.textContent);
setTimeout(() => { note(); document.title = [...seen, play.textContent].join(); }, 2000);
</script>
"""


@needs_chromium
def test_keys_curves_and_buttons_work_in_a_browser(tmp_path):
    path = write_report([make_run(tmp_path / "run", steps=9, batch=2)])
    path.write_text(path.read_text("utf-8") + ACTIONS, "utf-8")
    dom, console = browse(path, "#step=4", tmp_path / "profile", budget=3000)
    assert console == []
    assert re.search("<title>(.*?)</title>", dom)[1] == "8,7,0,0,1,6,1,11111,Pause,8,Play"


@needs_chromium
def test_prompt_and_gallery_follow_the_chosen_image(tmp_path):
    path = write_report([make_best_of_n(tmp_path / "run")])
    dom, console = browse(path, "#image=1", tmp_path / "profile")
    assert console == [] and '<p class="prompt">“a duck”</p>' in dom and 'alt="a duck, before"' in dom
    data = Page(path).data
    shown = re.search(r'<figure class="gallery".*?<img [^>]*src="([^"]+)"', dom)[1]
    assert shown == data["pool"][data["runs"][0]["images"][1]["gallery"]]
