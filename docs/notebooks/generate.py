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
# # Make a video from a text, and from a picture
#
# This notebook installs easyanimate_jax, trains a very small model on drawn shapes, and makes
# videos with it. No weights are downloaded. If you have a model, name it in `MODEL` below: then
# nothing is trained.
#
# It runs on a CPU, a GPU or a TPU. On two CPU cores it takes about ten minutes, nearly all of it
# for training. In Colab choose the kind of machine in *Runtime > Change runtime type*. It was
# tested in Jupyter on a CPU, and **not yet in Colab**.

# %% [markdown]
# ## 1. Parameters
#
# `SOURCE` is where the repository is: a git address, or the folder of a copy. It needs an address
# of your own, because this notebook does not know where you got it from. `FOLDER` receives
# everything that the notebook writes.

# %% tags=["parameters"]
SOURCE = "https://YOUR.GIT.SERVER/easyanimate_jax.git"
FOLDER = "easyanimate"
MODEL = ""  # a run, a converted or a released folder; "" trains a small model

CLIPS = 300  # training data: short clips, and pictures
IMAGES = 100
VAE_STEPS = 300  # training steps of the video autoencoder
TEXT_STEPS = 300  # of each text encoder
STEPS = 400  # of the transformer, for text to video; then half of them for image to video

# %% [markdown]
# ## 2. Install
#
# The next cell gets the repository and installs the package for the device of this machine. If
# Colab then asks you to restart the session, do so, and run the notebook from the top.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER, MODEL = Path(FOLDER).resolve(), MODEL and Path(MODEL).resolve()
FOLDER.mkdir(parents=True, exist_ok=True)
CODE = Path(SOURCE).resolve() if Path(SOURCE).is_dir() else FOLDER / "code"
if not CODE.exists():
    subprocess.run(["git", "clone", "--depth", "1", SOURCE, CODE], check=True)
if importlib.util.find_spec("easyanimate_jax") is None:
    extra = "[cuda]" if shutil.which("nvidia-smi") else ""
    if any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        extra = "[tpu]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{CODE}{extra}"], check=True)
os.chdir(CODE)  # the commands below name files of the repository

# %% [markdown]
# The commands run as processes of their own. So the device is free for each of them: a TPU belongs
# to one process at a time.


# %%
def run(*words):
    """Run Python with these words, and show what it prints."""
    words = [sys.executable, *map(str, words)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")


run("-c", "import jax; print(jax.__version__, jax.devices())")

# %% [markdown]
# ## 3. Data
#
# One coloured shape or digit moves over a background. Each clip has an English and a Chinese
# caption.

# %%
data = FOLDER / "data"
sizes = ("--images", IMAGES, "--clips", CLIPS, "--large-clips", 0, "--heldout", 0)
if not MODEL:
    run("-m", "demos.world", data, *sizes)

# %% [markdown]
# ## 4. The models
#
# A video model has three parts. The **autoencoder** (VAE) turns pixels into a small array, the
# latents, and back. The **text encoders** turn a caption into arrays. The **transformer** turns
# noise into latents, guided by the text.
#
# Two configs describe the training. They are Python files, like those in `configs/`. Here they
# change the demo's.

# %%
VAE_CONFIG = f"""
from dataclasses import replace

from configs.demo_vae import config as demo

config = replace(
    demo,
    data={str(data)!r},
    output={str(FOLDER / "vae")!r},
    stages=(replace(demo.stages[0], steps={VAE_STEPS}),),
    warmup_steps={min(20, VAE_STEPS // 4)},
)
"""
CONFIG = f"""
from dataclasses import replace

from configs.demo import SMALL
from configs.demo import config as demo
from easyanimate_jax import LatentSet, SampleConfig, Stage

config = replace(
    demo,
    source={str(data)!r},
    prepared={str(FOLDER / "latents")!r},
    vae={str(FOLDER / "vae")!r},
    text={str(FOLDER / "text")!r},
    run={str(FOLDER / "run")!r},
    sets=(LatentSet("small", SMALL, kinds=("video",), condition_draws=1),),
    stages=(
        Stage("t2v", "small", batch_size=16, steps={STEPS}, learning_rate=1e-2),
        Stage("i2v", "small", task="i2v", batch_size=16, steps={max(1, STEPS // 2)},
              learning_rate=4e-3, end_learning_rate=1e-4),
    ),
    samples=SampleConfig(every=0, frames=9, height=64, width=64),
)
"""
(FOLDER / "vae_config.py").write_text(VAE_CONFIG)
(FOLDER / "config.py").write_text(CONFIG)

# %% [markdown]
# What will be trained, and how much memory does it need? `describe` says so without using a device:
# see the lines `model`, `state` (bytes that a device holds) and the table of the stages. What a
# step needs besides depends on the batch.

# %%
if not MODEL:
    run("-m", "easyanimate_jax", "describe", FOLDER / "config.py", "--mesh.fsdp", 1)

# %% [markdown]
# Train the three parts. Each command goes on where it was stopped if you run it again.

# %%
if not MODEL:
    run("-m", "easyanimate_jax", "vae-train", FOLDER / "vae_config.py")

# %%
if not MODEL:
    run("-m", "easyanimate_jax", "text", data, FOLDER / "text", "--steps", TEXT_STEPS)
    run("-m", "easyanimate_jax", "prepare", FOLDER / "config.py")

# %%
if not MODEL:
    run("-m", "easyanimate_jax", "train", FOLDER / "config.py")

# %% [markdown]
# ## 5. A video from a text
#
# From here on this notebook itself uses the device. On a TPU, restart it before you train again.
#
# `load_pipeline` opens a model; its weights are read at the first use. They need about as many
# bytes as printed here, and the work on a video comes on top. If a large model does not fit, try
# `low_memory=True` or `int8=True`.

# %%
import jax

import easyanimate_jax as ea

pipeline = ea.load_pipeline(MODEL or FOLDER / "run")
weights = jax.tree.leaves((pipeline.diffusion.model, pipeline.vae))
print(f"weights of transformer and VAE: {sum(x.nbytes for x in weights) / 1e9:.3f} GB")
print(jax.devices()[0], jax.devices()[0].memory_stats() or "(tells no memory)")

# %%
frames = pipeline("a red circle moves right slowly on a black background", steps=20, guidance=3.0)
print(frames.shape, frames.dtype)  # frames, height, width, colours

# %%
from IPython.display import Video, display

from easyanimate_jax.data.media import write_png, write_video


def show(frames, name):
    """Write frames as a film into FOLDER, 8 a second, and show it."""
    write_video(FOLDER / name, frames, 8)
    display(Video(str(FOLDER / name), embed=True, width=256, html_attributes="controls loop"))


show(frames, "from_text.mp4")

# %% [markdown]
# The first run of a size compiles it. Other prompts, seeds and guidances of the same size are then
# fast. This model knows six colours, four shapes, ten digits, three backgrounds, four directions
# and two speeds. It was trained for minutes, so shapes are blurred, and some words
# are misread.

# %% [markdown]
# ## 6. A video from a picture
#
# The picture becomes the first frame. It is an array of bytes, (height, width, 3): one of your own
# works, too.

# %%
import numpy as np

height, width = frames.shape[1:3]
picture = np.full((height, width, 3), 240, np.uint8)
picture[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = (45, 75, 230)
moved = pipeline(
    "a blue square moves up quickly on a white background", image=picture, steps=20, guidance=1.0
)
show(moved, "from_picture.mp4")

# %% [markdown]
# ## 7. Save
#
# The films are already in `FOLDER`. This also writes the last frame, and lists what there is. In
# Colab take them from the files on the left, or copy `FOLDER` to your Drive: the machine is deleted
# when the session ends.

# %%
write_png(FOLDER / "last.png", moved[-1])
for path in sorted(FOLDER.glob("*.*")):
    print(f"{path.stat().st_size:>9,} bytes  {path}")

# %% [markdown]
# ## Where to go next
#
# * Films, masks, controls and cameras: `docs/generate.md`. Your own clips: `docs/data.md`.
# * A page in the browser instead of Python: `docs/serve.md`.
# * The same model trained for longer: `make demo`, in `docs/demo.md`.
