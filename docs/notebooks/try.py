# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     cell_metadata_filter: tags,-all
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Films of emoji from words
#
# At the end you have short films of emoji that you described in English or Chinese, a film that
# begins with a picture, and the same words with other seeds, guidance and steps. The files are
# MP4, GIF and PNG.
#
# The model comes with the repository: nothing is trained and no weights are downloaded. On two CPU
# cores the whole notebook takes about a minute, mostly to compile. It also runs on a GPU and a
# TPU. In Colab choose the machine in *Runtime > Change runtime type*. We tested it in Jupyter on a
# CPU, and **not yet in Colab**.

# %% [markdown]
# ## 1. Choose
#
# `SOURCE` is the repository. `../..` is right if you opened this notebook from a copy of it. In
# Colab, write the git address of the repository. Everything that the notebook writes goes to
# `FOLDER`.
#
# In Colab the lines with `@param` also appear as sliders and fields. Elsewhere they are plain
# variables.

# %% tags=["parameters"]
SOURCE = "../.."
FOLDER = "emoji_films"

PROMPT = "an animated emoji of teacher"  # @param {type:"string"}
SEED = 7  # @param {type:"slider", min:0, max:100, step:1}
STEPS = 20  # @param {type:"slider", min:2, max:50, step:1}
GUIDANCE = 3.0  # @param {type:"slider", min:1.0, max:8.0, step:0.5}
PICTURE = ""  # a picture file of your own for section 7; "" takes a frame of a film

# %% [markdown]
# ## 2. Install
#
# This cell gets the repository if it is not there yet, and installs the package for the device of
# this machine. If Colab then asks you to restart the session, do so, and run the notebook again
# from the top.

# %%
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER, CODE = Path(FOLDER).resolve(), Path(SOURCE).resolve()
FOLDER.mkdir(parents=True, exist_ok=True)
if not (CODE / "easyanimate_jax").is_dir():
    CODE = FOLDER / "code"
    if not CODE.exists():
        subprocess.run(["git", "clone", "--depth", "1", SOURCE, CODE], check=True)
if importlib.util.find_spec("easyanimate_jax") is None:
    extra = "[cuda]" if shutil.which("nvidia-smi") else ""
    if any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        extra = "[tpu]"
    words = [sys.executable, "-m", "pip", "install", "-q", "-e", f"{CODE}{extra}"]
    subprocess.run(words, check=True)
sys.path.insert(0, str(CODE))

# %% [markdown]
# ## 3. Load the model
#
# `emoji` is the name of the model that comes with the repository. Its weights are read at the first
# use, so this cell ends at once.

# %%
import jax
import numpy as np

import easyanimate_jax as ea

pipeline = ea.load_pipeline("emoji")
print(jax.devices())

# %% [markdown]
# The next cell defines two helpers. `play` writes frames as a film of 8 frames a second and shows
# it. `sheet` shows one row of frames for each film, as a picture.

# %%
from IPython.display import Image, Video, display

from easyanimate_jax.data.media import contact_sheet, write_gif, write_png, write_video


def play(frames, name, width=256):
    """Write frames (F, H, W, 3) as a film into FOLDER, and show it."""
    write_video(FOLDER / name, frames, crf=10)
    attributes = "controls loop autoplay muted"
    display(Video(str(FOLDER / name), embed=True, width=width, html_attributes=attributes))


def sheet(films, name):
    """Write eight frames of each film (B, F, H, W, 3) as one picture into FOLDER, and show it."""
    write_png(FOLDER / name, contact_sheet(np.stack(films), columns=8))
    display(Image(str(FOLDER / name)))


# %% [markdown]
# ## 4. A film from words
#
# A film is an array of bytes: frames, height, width, colours. The first film of a size takes
# longer, because JAX compiles the model. Later ones take about a second on two cores.

# %%
film = pipeline(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE)
print(film.shape, film.dtype)
play(film, "film.mp4")
sheet([film], "film.png")

# %% [markdown]
# ## 5. English and Chinese
#
# A list of prompts gives a batch of films. The model knows the names of emoji in both languages,
# and nothing else: other words give an emoji that is near, or a blur. These names are from its
# training data.

# %%
prompts = ["woman mage", "an animated emoji of red heart", "划艇", "老师的动画表情"]
films = pipeline(prompts, seed=SEED, steps=STEPS, guidance=GUIDANCE)
play(np.concatenate(films, axis=2), "languages.mp4", width=768)  # side by side
sheet(films, "languages.png")

# %% [markdown]
# ## 6. Seeds, guidance and steps
#
# The seed chooses the noise that a film is made from. So the same words with other seeds give other
# films, and the same seed gives the same film again. Here are four seeds side by side.

# %%
seeds = [SEED, SEED + 1, SEED + 2, SEED + 3]
films = pipeline([PROMPT] * 4, seed=seeds, steps=STEPS, guidance=GUIDANCE)
play(np.concatenate(films, axis=2), "seeds.mp4", width=768)

# %% [markdown]
# Guidance says how strictly the film follows the words. 1 means no guidance, and large values
# exaggerate. Each row below has another guidance, and all have the same seed.

# %%
guidances = (1.0, 2.0, 3.0, 6.0)
films = [pipeline(PROMPT, seed=SEED, steps=STEPS, guidance=value) for value in guidances]
print("guidance of the rows:", *guidances)
sheet(films, "guidance.png")

# %% [markdown]
# A film begins as noise and is cleaned in steps. Few steps are fast and give soft outlines. More
# steps take longer in proportion.

# %%
counts = sorted({2, max(2, STEPS // 4), STEPS, 2 * STEPS})
films = [pipeline(PROMPT, seed=SEED, steps=count, guidance=GUIDANCE) for count in counts]
print("steps of the rows:", *counts)
sheet(films, "steps.png")

# %% [markdown]
# ## 7. A film from a picture
#
# The picture becomes the first frame, and the words say what it shows. A picture of your own is
# scaled and cropped to the size of the film. It works best if it looks like the training data: one
# emoji on white. Little guidance keeps the film near the picture.

# %%
from PIL import Image as Picture

picture = np.asarray(Picture.open(PICTURE).convert("RGB")) if PICTURE else film[len(film) // 2]
moved = pipeline(PROMPT, image=picture, seed=SEED + 1, steps=STEPS, guidance=1.0)
play(moved, "from_picture.mp4")
sheet([moved], "from_picture.png")

# %% [markdown]
# ## 8. Save
#
# The films and sheets are already in `FOLDER`. This cell also writes a GIF and the last frame, and
# lists all files. In Colab, take them from the files on the left: the machine is deleted when the
# session ends.

# %%
write_gif(FOLDER / "film.gif", film)
write_png(FOLDER / "last.png", film[-1])
for path in sorted(FOLDER.glob("*.*")):
    print(f"{path.stat().st_size:>9,} bytes  {path.name}")

# %% [markdown]
# ## Where to go next
#
# * Teach this model a character of your own: `lora.ipynb`, in this folder.
# * Train a model on your own clips: `train.ipynb`, in this folder.
# * Every way to generate, with all options: `docs/generate.md`.
# * A page in the browser instead of Python: `docs/tutorial/serve.md`.
