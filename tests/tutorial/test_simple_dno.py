"""The tutorial runs from top to bottom, its numbers hold, and it is stored with its outputs."""

import json
import math
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent
STORED = REPO / "tutorial" / "simple_dno.ipynb"
MAX_BYTES = 4_000_000


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the last cell prints after a run in fast mode. The notebook is run from a copy."""
    why = 'is not installed: pip install -e ".[notebook]"'
    nbclient = pytest.importorskip("nbclient", reason=f"nbclient {why}")
    pytest.importorskip("ipykernel", reason=f"ipykernel {why}")
    import nbformat

    folder = tmp_path_factory.mktemp("tutorial")
    copy = folder / STORED.name
    copy.write_bytes(STORED.read_bytes())
    notebook = nbformat.read(copy, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNO_TUTORIAL_FAST", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # nobody's own settings
        patch.delenv("MPLBACKEND", raising=False)
        client = nbclient.NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(STORED.parent)}}
        )
        client.execute()
    return json.loads("".join(output["text"] for output in notebook.cells[-1]["outputs"]))


def test_model_gives_the_ring(results):
    assert results["off_ring_eta_1"] < 0.15


def test_reward_rises(results):
    assert results["reward_after"] > results["reward_before"] + 1


def test_hybrid_gradient_grows_better_with_q(results):
    cosines = results["hybrid_cosine_by_q"]
    assert cosines[-1] > max(cosines[0], 0.6)
    assert cosines[-1] > results["zeroth_order_cosine_by_q"][-1]


@pytest.mark.parametrize("estimate", ["hybrid", "zeroth_order"])
def test_rounded_reward_rises(results, estimate):
    assert results[f"rounded_{estimate}"] > results["rounded_before"] + 0.5


def test_probability_is_asked_of_each_point(results):
    median, whole = results["probability_fresh"]
    assert median == pytest.approx(1) and whole > 0.1
    median, whole = results["probability_chosen"]
    assert median == pytest.approx(1) and whole < 1e-6


def test_regularizer_keeps_points_near_the_ring(results):
    assert results["distance_outside_gamma_0"] > 0.15
    assert results["distance_outside_gamma_10"] < 0.05
    assert results["probability_outside_gamma_0"] < 0.1 < results["probability_outside_gamma_10"]


def test_regularizer_does_not_keep_points_out_of_the_hole(results):
    """Where it fails, and the tutorial says so: the noise stays typical, and the points leave the ring."""
    assert results["distance_hole_gamma_1"] > 0.3
    assert results["probability_hole_gamma_1"] > 0.5


def test_every_number_is_finite(results):
    def numbers(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        else:
            yield value

    assert all(math.isfinite(number) for number in numbers(results))


def test_stored_with_outputs(stored):
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert kinds and "error" not in kinds, cell["id"]
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"], cell["id"]


def test_stored_in_full_not_in_fast_mode(stored):
    text = "".join(_text(stored))
    assert "fast mode: False" in text and "PLACEHOLDER" not in text


def test_stored_without_paths_of_a_machine(stored):
    for text in _text(stored):
        assert not re.search(r"(?<![\w.])/(work|home|tmp|root|Users)\b", text), text[:200]


def test_small_enough():
    assert STORED.stat().st_size < MAX_BYTES


def test_every_image_has_a_takeaway(stored):
    """The cell after a figure says in a sentence what it shows."""
    cells = stored["cells"]
    for cell, following in zip(cells, cells[1:]):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            is_said = following["cell_type"] == "markdown" and "".join(following["source"]).startswith("*Takeaway:")
            also_figure = any("image/png" in output.get("data", {}) for output in following.get("outputs", []))
            assert is_said or also_figure, cell["id"]


def _text(notebook):
    """All text of a notebook: sources and outputs, without the images (base64 may spell anything)."""
    for cell in notebook["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", ""))
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield "".join(data)
