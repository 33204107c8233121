"""The notebook: equal to its source, and it runs from the first cell to the last (slow)."""

import json
import os
import re
from pathlib import Path

import pytest

from easyanimate_jax.data import media

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {"CLIPS": 24, "IMAGES": 4, "VAE_STEPS": 4, "TEXT_STEPS": 4, "STEPS": 2}


def source_cells(name):
    """(kind, text) of the cells of a source in the percent format."""
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    cells = []
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in title else "code"
        if kind == "markdown":
            body = re.sub(r"^# ?", "", body, flags=re.M)
        cells.append((kind, body.strip()))
    return cells


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def test_every_source_has_a_notebook():
    assert NAMES == sorted(path.stem for path in FOLDER.glob("*.py")) != []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source_without_outputs(name):
    """`make notebooks` writes it anew."""
    read = notebook(name)
    cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in read["cells"]]
    assert cells == source_cells(name)
    for cell in read["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    tagged = [cell for cell in read["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert set(SMALL) <= set(re.findall(r"^(\w+) = ", "".join(tagged[0]["source"]), re.M))
    assert read["metadata"]["kernelspec"]["name"] == "python3"
    assert read["metadata"]["accelerator"] == "GPU" and "colab" in read["metadata"]


def executed(name, **parameters):
    """Run a notebook with other parameters in this environment; return it with its outputs."""
    nbclient = pytest.importorskip("nbclient", reason="make notebooks installs it")
    pytest.importorskip("ipykernel", reason="make notebooks installs it")
    nbformat = pytest.importorskip("nbformat")
    read = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for place, cell in enumerate(read.cells):
        if "parameters" in cell.metadata.get("tags", []):
            text = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
            read.cells.insert(place + 1, nbformat.v4.new_code_cell(text))
            break
    options = {"timeout": 600, "kernel_name": "python3"}
    client = nbclient.NotebookClient(
        read, resources={"metadata": {"path": str(ROOT.parent)}}, **options
    )
    client.execute(
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    )
    return read


def outputs(read):
    """(what the cells printed, kinds of what they show)."""
    shown = [output for cell in read.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in shown if output.output_type == "stream")
    kinds = [kind for output in shown for kind in output.get("data", ())]
    return text, kinds


@pytest.mark.slow
def test_the_notebook_trains_a_model_and_makes_videos(tmp_path):
    first = executed("generate", SOURCE=str(ROOT), FOLDER=str(tmp_path / "first"), **SMALL)
    text, kinds = outputs(first)
    assert kinds.count("text/html") == 2 and "CpuDevice" in text and "GB a device" in text
    for film in ("from_text.mp4", "from_picture.mp4"):
        seen = media.probe(tmp_path / "first" / film)
        assert (seen.num_frames, seen.height, seen.width) == (9, 64, 64)
    assert (tmp_path / "first" / "last.png").is_file()

    model = str(tmp_path / "first" / "run")
    again = executed("generate", SOURCE=str(ROOT), FOLDER=str(tmp_path / "own"), MODEL=model)
    text, kinds = outputs(again)
    assert kinds.count("text/html") == 2 and "step" not in text
    assert (tmp_path / "own" / "from_text.mp4").is_file()
    assert not (tmp_path / "own" / "vae").exists()
