"""A model whose films are grey, and the maker of pairs around it; it can be killed in a film."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import TINY

from easyanimate_jax.data import media
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.evaluation.rewards import RewardFunction
from easyanimate_jax.runs import evaluate
from easyanimate_jax.runs.evaluate import Asked
from easyanimate_jax.runs.load import Pipeline, Resident
from easyanimate_jax.runs.pairs import PairMaker
from easyanimate_jax.runs.parts import Opened

PROMPTS = ["a red square", "红色/方块", "nothing"]
SIZE = (5, 32, 32)


def film(prompt, seed):
    """Grey that follows from prompt and seed; "nothing" has always the same."""
    grey = 100 if prompt == "nothing" else (37 * seed + len(prompt)) % 200 + 20
    return np.full((*SIZE, 3), grey, np.uint8)


def brightness(frames, prompts):
    return frames.reshape(len(prompts), -1).astype(float).mean(axis=1).round(1)


BRIGHT = RewardFunction("fake_films:brightness", brightness)


def fake(patch, asked, dies=-1):
    """Put the fake model in place; after `dies` films the process is killed in the next one."""

    def text_to_video(diffusion, request):
        asked.extend(zip(request.texts, request.seeds, strict=True))
        return np.stack([film(*one) for one in zip(request.texts, request.seeds, strict=True)])

    write = media.write_video

    def write_video(path, *given, **options):
        if len(asked) > dies >= 0:
            Path(path).write_bytes(b"half a film")
            os.kill(os.getpid(), 9)
        write(path, *given, **options)

    patch.setattr(evaluate, "text_to_video", text_to_video)
    patch.setattr(media, "write_video", write_video)
    patch.setattr(evaluate, "weights_print", lambda *given: "w")


def maker(output, reward=BRIGHT, prompts=PROMPTS, count=4, seed=7):
    opened = Opened(*(Path(name) for name in ("model", "t", "v", "e")), TINY, Flow())
    encoder = SimpleNamespace(encode=list, is_cut=lambda prompt: False)
    run = Pipeline(opened, Resident(TINY, Flow(), {"encoder": lambda: encoder}), None)
    asked = Asked(batch=1, seed=seed)
    return PairMaker(opened, run, prompts, reward, output, count=count, size=SIZE, asked=asked)


def die(output):
    with pytest.MonkeyPatch.context() as patch:
        fake(patch, [], dies=5)
        maker(Path(output)).make()
