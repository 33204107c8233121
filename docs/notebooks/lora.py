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
# # Teach the emoji model a character of your own
#
# At the end the emoji model knows a new word, `mimo`, and makes films of the character that it
# names: its colours, its shape and its feet, with rough outlines. You also have a LoRA: a small
# `.safetensors` file that you can add to the model with any weight. The clips are drawn in the
# notebook, or they are yours.
#
# A LoRA leaves the weights of the model as they are. It trains pairs of small matrices beside them.
#
# On two CPU cores the whole notebook takes about three minutes. It also runs on a GPU and a TPU. In
# Colab choose the machine in *Runtime > Change runtime type*. We tested it in Jupyter on a CPU, and
# **not yet in Colab**.

# %% [markdown]
# ## 1. Choose
#
# `SOURCE` is the repository. `../..` is right if you opened this notebook from a copy of it. In
# Colab, write the git address of the repository. Everything that the notebook writes goes to
# `FOLDER`.
#
# `MY_CLIPS` is a folder of your own clips: about ten films of one thing on white, each at least
# 2.1 seconds long. Beside each film is a text file of the same name that holds its caption. Use one
# new word in all captions, and write it in `PROMPT`. Without a folder, the notebook draws clips.

# %% tags=["parameters"]
SOURCE = "../.."
FOLDER = "my_lora"
MY_CLIPS = ""  # your folder of films and captions; "" draws clips
PROMPT = "an animated emoji of mimo"  # @param {type:"string"}

CLIPS = 16  # clips to draw
KNOWN = 32  # films of known emoji, which the model makes itself
STEPS = 400  # training steps
SAMPLING_STEPS = 20  # @param {type:"slider", min:2, max:50, step:1}
SEED = 7  # @param {type:"slider", min:0, max:100, step:1}

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
# ## 3. Clips
#
# `mimo` is a round creature with one antenna and orange feet. This function draws one frame of it,
# four times too large, and scales it down for smooth outlines. `hop` is 0 on the ground and 1 at
# the top. Change the drawing as you like.

# %%
import numpy as np
from PIL import Image, ImageDraw

SIDE, FRAMES = 96, 17  # the size that the emoji model makes


def draw(hop, place=0.0, look=0.0):
    """Return a frame of mimo: how high it is, where it stands, and where it looks (-1 to 1)."""
    picture = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
    pen = ImageDraw.Draw(picture)
    wide, tall = 100 + 16 * (1 - hop), 96 - 14 * (1 - hop)  # flatter on the ground
    x, y = 192 + 60 * place, 350 - tall - 70 * hop
    for side in (-1, 1):
        foot = x + 48 * side, y + tall - 4
        pen.ellipse((foot[0] - 30, foot[1] - 16, foot[0] + 30, foot[1] + 16), fill=(240, 140, 40))
    tip = x + 20 * look, y - tall - 40
    pen.line((x, y - tall + 8, *tip), fill=(20, 120, 130), width=10)
    pen.ellipse((tip[0] - 16, tip[1] - 16, tip[0] + 16, tip[1] + 16), fill=(240, 140, 40))
    pen.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(40, 180, 180))
    for side in (-1, 1):
        eye = x + 38 * side + 14 * look, y - 24
        pen.ellipse((eye[0] - 24, eye[1] - 28, eye[0] + 24, eye[1] + 28), fill="white")
        pupil = eye[0] + 9 * look
        pen.ellipse((pupil - 11, eye[1] - 12, pupil + 11, eye[1] + 12), fill=(30, 40, 60))
    pen.arc((x - 30, y - 10, x + 30, y + 46), 20, 160, fill=(20, 90, 100), width=8)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


# %% [markdown]
# The next cell draws the clips: mimo hops, at another rhythm and place in each. Every clip has four
# captions, in the forms that the model was trained with.

# %%
import json

from IPython.display import Image as Shown
from IPython.display import Video, display

from easyanimate_jax.data.media import contact_sheet, write_png, write_video

CAPTIONS = ("mimo", "an animated emoji of mimo", "米莫", "米莫的动画表情")


def sheet(films, name):
    """Write eight frames of each film (B, F, H, W, 3) as one picture into FOLDER, and show it."""
    write_png(FOLDER / name, contact_sheet(np.stack(films), columns=8))
    display(Shown(str(FOLDER / name)))


clips = Path(MY_CLIPS).resolve() if MY_CLIPS else FOLDER / "clips"
if not MY_CLIPS:
    clips.mkdir(exist_ok=True)
    random, rows, drawn = np.random.default_rng(0), [], []
    for number in range(CLIPS):
        rate, phase, place = random.uniform(0.8, 1.4), random.uniform(), random.uniform(-0.5, 0.5)
        time = phase + rate * np.arange(FRAMES) / 8
        hops, looks = abs(np.sin(np.pi * time)), np.sin(2 * time)
        drawn.append(np.stack([draw(h, place, k) for h, k in zip(hops, looks, strict=True)]))
        write_video(clips / f"{number}.mp4", drawn[-1], 8, crf=10)
        rows += [{"file_path": f"{number}.mp4", "type": "video", "text": t} for t in CAPTIONS]
    (clips / "metadata.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    sheet(drawn[:3], "clips.png")

# %% [markdown]
# If a training has only the new word, the model forgets the old ones: everything becomes mimo. So
# the training also gets films of emoji that the model knows. The model makes them itself, with the
# command for many samples.

# %%
names = ["cat face", "panda", "red apple", "pizza", "guitar", "alarm clock", "robot", "ghost"]
names += [
    "octopus",
    "bicycle",
    "turtle",
    "umbrella",
    "snowman",
    "hamburger",
    "unicorn",
    "sunflower",
]
prompts = [f"an animated emoji of {name}" for name in names]
names = ["企鹅", "狮子", "草莓", "足球", "气球", "闹钟", "火车", "蝴蝶", "青蛙", "向日葵"]
names += ["香蕉", "披萨", "自行车", "猴子", "雨伞", "吉他"]
prompts += [f"{name}的动画表情" for name in names]
order = np.random.default_rng(1).permutation(len(prompts))[:KNOWN]

known, lines = FOLDER / "known", FOLDER / "known.jsonl"
wanted = [{"prompt": prompts[i], "seed": int(i)} for i in order]
lines.write_text("".join(json.dumps(line) + "\n" for line in wanted), "utf-8")
options = ("--steps", SAMPLING_STEPS, "--batch", 8, "--output", known)
run("-m", "easyanimate_jax", "sample", "emoji", "--prompts", lines, *options)

# %% [markdown]
# A data set may be a mixture: a `.toml` file that names other data sets. `sources` prints what it
# holds, and every clip that cannot be used, with the reason.

# %%
rows = []
for path in sorted(known.glob("*.mp4")):
    told = json.loads(path.with_suffix(".json").read_text("utf-8"))["options"]
    rows.append({"file_path": path.name, "type": "video", "text": told["prompt"]})
(known / "metadata.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
mixture = FOLDER / "mixture.toml"
places = {"new": clips, "known": known}
text = "".join(f"{name} = {json.dumps(str(place))}\n" for name, place in places.items())
mixture.write_text(text, "utf-8")
run("-m", "easyanimate_jax", "sources", mixture)

# %% [markdown]
# ## 4. Does the model know the words?
#
# The tokenizer of the model has a vocabulary of the words in emoji names. It spells any other
# English word in letters, as `m ##i ##m ##o` here. So a new word is a sequence of letters, which
# the LoRA can learn. Chinese is read character by character. A character that is in no emoji name
# becomes `[UNK]`, and the model cannot tell such characters apart: choose another one. A caption
# may have 26 tokens.

# %%
from transformers import AutoTokenizer

from easyanimate_jax.weights.pretrained import model_place

tokenizer = AutoTokenizer.from_pretrained(model_place("emoji") / "tokenizer")
for words in dict.fromkeys([PROMPT, *(() if MY_CLIPS else CAPTIONS)]):
    print(words, "->", *tokenizer.tokenize(words))

# %% [markdown]
# ## 5. The config
#
# It changes some fields of `configs/emoji.py`, which trained the model. `vae`, `text` and `init`
# are the parts of the model that comes with the repository, by its name. `lora` says which layers
# get a pair of matrices, and their width, the rank.

# %%
CONFIG = f"""
from dataclasses import replace

from configs.emoji import config as emoji
from easyanimate_jax import Budget, LatentSet, LoRAConfig, OptimizerConfig, Stage

config = replace(
    emoji,
    source={str(mixture)!r},
    prepared={str(FOLDER / "latents")!r},
    run={str(FOLDER / "run")!r},
    vae="emoji",
    text="emoji",
    init="emoji",
    lora=LoRAConfig(rank=16, alpha=16.0, targets=("texts.*", "attention", "mlp")),
    sets=(LatentSet("clips", Budget(180, (180,), (96,), frames=17), kinds=("video",)),),
    stages=(
        Stage("lora", "clips", batch_size=4, steps={STEPS}, learning_rate=4e-3,
              end_learning_rate=4e-4, warmup={min(20, STEPS // 2)}),
    ),
    optimizer=OptimizerConfig(weight_decay=0.0, b2=0.99, max_grad_norm=1.0),
    samples=replace(emoji.samples, every=0, prompts=()),
    ema_decay=0.98,
    log_every=25,
)
"""
(FOLDER / "config.py").write_text(CONFIG)
run("-m", "easyanimate_jax", "describe", FOLDER / "config.py", "--mesh.fsdp", 1)

# %% [markdown]
# ## 6. Encode and train
#
# `prepare` encodes clips and captions once, with the model's own autoencoder and text encoder.

# %%
run("-m", "easyanimate_jax", "prepare", FOLDER / "config.py")

# %% [markdown]
# Now the LoRA is trained. If it stops, run the cell again: it continues from the last checkpoint.

# %%
run("-m", "easyanimate_jax", "train", FOLDER / "config.py")

# %% [markdown]
# ## 7. Export
#
# `convert` writes the pairs of matrices alone. `--to original` uses the names of EasyAnimate's own
# scripts; `diffusers` and `comfyui` are possible, too.

# %%
lora = FOLDER / "mimo.safetensors"
lora.unlink(missing_ok=True)
run("-m", "easyanimate_jax", "convert", FOLDER / "run", lora, "--to", "original")
print(f"{lora.stat().st_size:,} bytes")

# %% [markdown]
# ## 8. Before and after
#
# From here on this notebook itself uses the device. On a TPU, restart it before you train again.
#
# Both films of a pair are made from the same words and the same noise. The upper row is the model
# as it was, the lower row the model with the LoRA.

# %%
import easyanimate_jax as ea

before = ea.load_pipeline("emoji")
after = ea.load_pipeline("emoji", loras=ea.open_loras([(lora, 1.0)]))
options = {"seed": SEED, "steps": SAMPLING_STEPS, "guidance": 3.0}
films = [pipeline(PROMPT, **options) for pipeline in (before, after)]
sheet(films, "before_after.png")

# %% [markdown]
# The same two as a film, side by side.

# %%
write_video(FOLDER / "before_after.mp4", np.concatenate(films, axis=2), crf=10)
attributes = "controls loop autoplay muted"
where = str(FOLDER / "before_after.mp4")
display(Video(where, embed=True, width=512, html_attributes=attributes))

# %% [markdown]
# A LoRA should leave other words alone. Each pair of rows shows a known emoji, which was not among
# the films of section 3, before and after. In our run both changed, and the Chinese prompt took
# mimo's colour. More films of known emoji, or a smaller weight (section 9), help against that.

# %%
others = ["an animated emoji of teacher", "大象的动画表情"]
made = [pipeline(others, **options) for pipeline in (before, after)]
sheet([made[row][number] for number in range(len(others)) for row in (0, 1)], "others.png")

# %% [markdown]
# ## 9. A weight
#
# The weight scales what the LoRA adds: 0 is the model as it was, and 1 is how it was trained. The
# rows below have the weights that are printed.

# %%
weights = (0.0, 0.4, 0.7, 1.0)
films = []
for weight in weights:
    pipeline = ea.load_pipeline("emoji", loras=ea.open_loras([(lora, weight)]))
    films.append(pipeline(PROMPT, **options))
print("weights of the rows:", *weights)
sheet(films, "weights.png")

# %% [markdown]
# ## 10. Save
#
# Everything is in `FOLDER`. In Colab, take the files from the left: the machine is deleted when the
# session ends.

# %%
for path in sorted(FOLDER.glob("*.*")):
    print(f"{path.stat().st_size:>9,} bytes  {path.name}")

# %% [markdown]
# ## Where to go next
#
# * The file works with the command, too:
#   `python sample.py emoji --prompt "an animated emoji of mimo" --lora mimo.safetensors:0.8`.
# * The same steps on other models: `docs/tutorial/lora.md`. All choices: `docs/finetune.md`.
# * Train a whole model on your clips: `train.ipynb`, in this folder.
