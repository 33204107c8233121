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
# # Train on your own clips
#
# At the end you have a small video model that was trained on a folder of clips, and films that it
# makes from words. You see every step: the table of captions, the video autoencoder, the text
# encoders, the latents, the transformer, and sampling. They are the commands of a large training.
#
# On two CPU cores it takes about ten minutes, nearly all of it for training. It also runs on a GPU
# and a TPU. In Colab choose the machine in *Runtime > Change runtime type*. We tested it in Jupyter
# on a CPU, and **not yet in Colab**.

# %% [markdown]
# ## 1. Choose
#
# `SOURCE` is the repository. `../..` is right if you opened this notebook from a copy of it. In
# Colab, write the git address of the repository. Everything that the notebook writes goes to
# `FOLDER`.
#
# `MY_CLIPS` is your folder of clips. Beside each film is a text file of the same name that holds
# its caption: `cat.mp4` and `cat.txt`. A clip needs at least 9 frames at 8 frames a second, so a
# little more than one second. Without a folder, the notebook draws clips.

# %% tags=["parameters"]
SOURCE = "../.."
FOLDER = "my_model"
MY_CLIPS = ""  # your folder of films and captions; "" draws clips

CLIPS = 300  # clips to draw
VAE_STEPS = 300  # training steps of the video autoencoder
TEXT_STEPS = 300  # of each text encoder
STEPS = 600  # of the transformer

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
# The commands below run as processes of their own. So the device is free for each of them: a TPU
# belongs to one process at a time. `run` starts one and shows what it prints.


# %%
def run(*words):
    """Run Python with these words in the folder of the repository, and show what it prints."""
    words = [sys.executable, *map(str, words)]
    with subprocess.Popen(
        words, cwd=CODE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")


run("-c", "import jax; print(jax.__version__, jax.devices())")

# %% [markdown]
# ## 3. Clips and their captions
#
# A data set is a folder with the films and a table, `metadata.json`. Each row has the path of a
# film, its type and its caption. This cell writes the table for your folder if it has none. Without
# a folder of yours, it draws coloured shapes and digits that move, with captions in English and
# Chinese.

# %%
import json

data = Path(MY_CLIPS).resolve() if MY_CLIPS else FOLDER / "clips"
table = data / "metadata.json"
if not MY_CLIPS:
    sizes = ("--images", 0, "--clips", CLIPS, "--large-clips", 0, "--heldout", 0)
    run("-m", "demos.world", data, *sizes)
elif not table.is_file():
    captions = [path for path in sorted(data.rglob("*.txt")) if path.read_text("utf-8").strip()]
    rows = [
        {
            "file_path": film.relative_to(data).as_posix(),
            "type": "video",
            "text": caption.read_text("utf-8").strip(),
        }
        for caption in captions
        for film in sorted(caption.parent.glob("*"))
        if film.stem == caption.stem and film.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm")
    ]
    table.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
rows = json.loads(table.read_text("utf-8"))
print(len(rows), "captions; the first one:", rows[0])

# %% [markdown]
# `sources` reads the table as the training will read it. It prints how many clips there are, their
# sizes and lengths, and every row that cannot be used, with the reason.

# %%
run("-m", "easyanimate_jax", "sources", data)

# %% [markdown]
# ## 4. Two configs
#
# A video model has three parts. The **autoencoder** (VAE) turns pixels into a small array, the
# latents, and back. The **text encoders** turn a caption into arrays. The **transformer** turns
# noise into latents, guided by the text.
#
# A config is a Python file, like those in `configs/`. The first one trains the autoencoder and the
# second one the transformer. Both change some fields of the demo's configs. A film of 9 frames of
# 64 x 64 pixels is 48 tokens for the transformer.

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

from configs.demo import config as demo
from easyanimate_jax import Budget, LatentSet, SampleConfig, Stage

SMALL = Budget(48, lengths=(48,), sizes=(64,), frames=9, min_fill=0.7)
config = replace(
    demo,
    source={str(data)!r},
    prepared={str(FOLDER / "latents")!r},
    vae={str(FOLDER / "vae")!r},
    text={str(FOLDER / "text")!r},
    run={str(FOLDER / "run")!r},
    sets=(LatentSet("clips", SMALL, kinds=("video",)),),
    stages=(
        Stage("t2v", "clips", batch_size=16, steps={STEPS}, learning_rate=1e-2,
              end_learning_rate=1e-3),
    ),
    samples=SampleConfig(every=0, frames=9, height=64, width=64),
)
"""
(FOLDER / "vae_config.py").write_text(VAE_CONFIG)
(FOLDER / "config.py").write_text(CONFIG)

# %% [markdown]
# `describe` prints what will be trained, without using a device: the parameters, the bytes that a
# device holds, and the table of the stages.

# %%
run("-m", "easyanimate_jax", "describe", FOLDER / "config.py", "--mesh.fsdp", 1)

# %% [markdown]
# ## 5. Train the parts that stay fixed
#
# The autoencoder comes first. If a training command stops, run its cell again: it continues from
# the last checkpoint.

# %%
run("-m", "easyanimate_jax", "vae-train", FOLDER / "vae_config.py")

# %% [markdown]
# Then two small text encoders are trained on the captions of the table.

# %%
run("-m", "easyanimate_jax", "text", data, FOLDER / "text", "--steps", TEXT_STEPS)

# %% [markdown]
# ## 6. Encode the clips
#
# `prepare` encodes every clip and every caption once, so that the training does not do it again at
# each step.

# %%
run("-m", "easyanimate_jax", "prepare", FOLDER / "config.py")

# %% [markdown]
# ## 7. Train the transformer
#
# The loss falls quickly at first and then slowly. Films still improve when the loss hardly changes.

# %%
run("-m", "easyanimate_jax", "train", FOLDER / "config.py")

# %% [markdown]
# ## 8. Films from words
#
# From here on this notebook itself uses the device. On a TPU, restart it before you train again.
# `load_pipeline` opens the run.

# %%
import jax
import numpy as np

import easyanimate_jax as ea

pipeline = ea.load_pipeline(FOLDER / "run")
print(jax.devices())

# %% [markdown]
# Four captions of the training, and the film that the model makes from each. All films are written
# to `FOLDER` and shown side by side.

# %%
from IPython.display import Image, Video, display

from easyanimate_jax.data.media import contact_sheet, read_at, write_png, write_video

chosen = [rows[i * (len(rows) - 1) // 3] for i in range(4)]
films = pipeline([row["text"] for row in chosen], seed=7, steps=20, guidance=3.0)
for number, (row, film) in enumerate(zip(chosen, films, strict=True)):
    print(f"{number}.mp4: {row['text']}")
    write_video(FOLDER / f"{number}.mp4", film)
write_video(FOLDER / "films.mp4", np.concatenate(films, axis=2))
attributes = "controls loop autoplay muted"
display(Video(str(FOLDER / "films.mp4"), embed=True, width=768, html_attributes=attributes))

# %% [markdown]
# The sheet compares them with the clips. In each pair of rows the upper one is the clip, and the
# lower one is the film from its caption. The films differ from the clips in all that the caption
# does not say, such as the place where a shape begins.

# %%
clips = [read_at(data / row["file_path"], 0.0, 9, (64, 64)) for row in chosen]
pairs = [frames for pair in zip(clips, films, strict=True) for frames in pair]
write_png(FOLDER / "sheet.png", contact_sheet(np.stack(pairs), columns=9))
display(Image(str(FOLDER / "sheet.png")))

# %% [markdown]
# Now write a sentence of your own. Use the words of your captions, because the text encoders know
# no others.

# %%
PROMPT = chosen[0]["text"]
film = pipeline(PROMPT, seed=1, steps=20, guidance=3.0)
write_video(FOLDER / "own.mp4", film)
display(Video(str(FOLDER / "own.mp4"), embed=True, width=256, html_attributes=attributes))

# %% [markdown]
# ## 9. Make it good
#
# This model is small and was trained for minutes, so shapes are blurred and some words are misread.
#
# | change | where |
# |---|---|
# | more clips: hundreds at least | `MY_CLIPS` |
# | more steps: 500 for the autoencoder, thousands for the transformer | `VAE_STEPS`, `STEPS` |
# | larger and longer films | `lengths`, `sizes` and `frames` of the budget |
# | several stages, small clips first | `sets` and `stages`, as in `configs/demo.py` |
#
# In Colab, take the files from the left: the machine is deleted when the session ends.
#
# ## Where to go next
#
# * The same steps as commands: `docs/tutorial/your_clips.md`. More on data: `docs/data.md`.
# * Teach an existing model something new from a few clips: `lora.ipynb`, in this folder.
# * Films from pictures, films, masks and controls: `docs/generate.md`.
