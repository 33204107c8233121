"""The notebooks: equal to their sources, without outputs, and each runs to its last cell (slow)."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from easyanimate_jax.data import media

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
SMALL = {  # parameters with which a notebook ends soon
    "try": {"STEPS": 2},
    "train": {"CLIPS": 24, "VAE_STEPS": 4, "TEXT_STEPS": 4, "STEPS": 2},
    "lora": {"CLIPS": 6, "KNOWN": 2, "STEPS": 2, "SAMPLING_STEPS": 2},
}
ALL = {"SOURCE", "FOLDER"}  # parameters of every notebook
EMOJI, TRAINED = (17, 96, 96), (9, 64, 64)  # frames, height, width


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
    for suffix in ("py", "ipynb"):
        assert {path.stem for path in FOLDER.glob(f"*.{suffix}")} == set(SMALL), suffix


@pytest.mark.parametrize("name", SMALL)
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
    assert ALL | set(SMALL[name]) <= set(
        re.findall(r"^(\w+) = ", "".join(tagged[0]["source"]), re.M)
    )
    assert read["metadata"]["kernelspec"]["name"] == "python3"
    assert read["metadata"]["accelerator"] == "GPU" and "colab" in read["metadata"]


def test_the_notebooks_install_in_the_same_way():
    """They must stand alone, so each has the cell."""
    found = [[text for _, text in source_cells(name) if '"pip"' in text] for name in SMALL]
    assert len(found[0]) == 1 and found == [found[0]] * len(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_begins_with_its_end_and_its_time_and_explains_its_cells(name):
    cells = source_cells(name)
    assert re.search(r"At the end\b.*\bminutes?\b.*\bnot yet in Colab\b", cells[0][1], re.S)
    for (before, _), (kind, text) in itertools.pairwise(cells):
        assert before == "markdown" or kind == "markdown", text


def executed(name, **parameters):
    """Run a notebook where it is, with other parameters; return it with its outputs."""
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
    client = nbclient.NotebookClient(read, resources={"metadata": {"path": str(FOLDER)}}, **options)
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


def size(path):
    seen = media.probe(path)
    return seen.num_frames, seen.height, seen.width


def rows(path, height=96):
    """The rows of a sheet, as arrays."""
    picture = np.asarray(Image.open(path))
    return np.split(picture, len(picture) // height)


@pytest.mark.slow
def test_try_makes_films_of_words_and_of_a_picture(tmp_path):
    text, kinds = outputs(executed("try", FOLDER=str(tmp_path), **SMALL["try"]))
    assert "CpuDevice" in text and "(17, 96, 96, 3) uint8" in text
    assert (kinds.count("text/html"), kinds.count("image/png")) == (4, 5)
    assert size(tmp_path / "film.mp4") == size(tmp_path / "from_picture.mp4") == EMOJI
    assert size(tmp_path / "seeds.mp4") == (17, 96, 4 * 96)
    assert Image.open(tmp_path / "film.gif").n_frames == 17
    last = np.asarray(Image.open(tmp_path / "last.png"))
    np.testing.assert_array_equal(last, rows(tmp_path / "film.png")[0][:, -96:])
    for name, count in {"languages": 4, "guidance": 4, "steps": 2}.items():
        sheet = rows(tmp_path / f"{name}.png")
        assert len({row.tobytes() for row in sheet}) == count, name


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_train_makes_a_model_of_drawn_clips_or_of_a_folder(own, tmp_path):
    clips = ""
    if own:
        clips = tmp_path / "own"
        clips.mkdir()
        for number in range(6):
            frames = np.full((20, 48, 80, 3), 40 * number, np.uint8)
            media.write_video(clips / f"{number}.mp4", frames, 8)
            (clips / f"{number}.txt").write_text(f"a grey picture {number}\n")
        (clips / "notes.txt").write_text("no film has this name")
    folder = tmp_path / "made"
    given = SMALL["train"] | {"FOLDER": str(folder), "MY_CLIPS": str(clips)}
    text, kinds = outputs(executed("train", **given))
    assert (kinds.count("text/html"), kinds.count("image/png")) == (2, 1)
    assert "GB a device" in text and "CpuDevice" in text
    assert size(folder / "0.mp4") == size(folder / "own.mp4") == TRAINED
    assert len(rows(folder / "sheet.png", 64)) == 8
    if own:
        table = json.loads((clips / "metadata.json").read_text("utf-8"))
        assert [row["text"] for row in table] == [f"a grey picture {n}" for n in range(6)]
        assert "0.mp4: a grey picture 0" in text and not (folder / "clips").exists()


@pytest.mark.slow
def test_lora_trains_exports_and_compares(tmp_path):
    text, kinds = outputs(executed("lora", FOLDER=str(tmp_path), **SMALL["lora"]))
    assert (kinds.count("text/html"), kinds.count("image/png")) == (1, 4)
    assert "mimo -> m ##i ##m ##o\n" in text and "[UNK]" not in text
    assert size(tmp_path / "clips" / "0.mp4") == EMOJI
    assert size(tmp_path / "before_after.mp4") == (17, 96, 2 * 96)
    before, after = rows(tmp_path / "before_after.png")
    none, *_, whole = rows(tmp_path / "weights.png")
    np.testing.assert_array_equal(none, before)  # weight 0 keeps the bits of the model
    np.testing.assert_array_equal(whole, after)
    assert (before != after).any()
    assert 10_000 < (tmp_path / "mimo.safetensors").stat().st_size < 10_000_000
