"""Eight small films of emoji by the model that comes with the package, and a page that plays them.

    python -m demos.gallery OUT [--seed 1] [--prompts "a teacher" "老师"]

Seven films are made from English and Chinese words. The eighth one begins with a picture: the
first frame of the first film. Beside the page are the films, `strip.png` with three frames of each,
and `prompts.json`.
"""

import html
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from easyanimate_jax import load_pipeline
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.commands.parse import registry, run
from easyanimate_jax.data.media import write_png, write_video
from easyanimate_jax.training.safety.exits import DONE

MODEL = "emoji"
PROMPTS = (
    "woman mountain biking",
    "teacher",
    "woman mage",
    "automobile",
    "划艇",
    "程序员的动画表情",
    "盘腿的女人",
)
SCALE = 2  # of the page's films
STRIP = (0, 6, 12)  # frames of each film in the strip

STYLE = """
body{font:16px/1.5 system-ui,"PingFang SC","Noto Sans CJK SC",sans-serif;max-width:960px;
margin:2.5em auto;padding:0 1em;color:#1d2433;background:#fff}
h1{font-size:1.8em;margin-bottom:.2em} p{max-width:46em} code,pre{background:#f2f4f8;
border-radius:6px;padding:.1em .35em;font-size:.9em} pre{padding:.8em 1em;overflow-x:auto}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:1.2em;
margin:1.5em 0}
figure{margin:0;border:1px solid #e3e7ee;border-radius:14px;overflow:hidden;text-align:center}
video{width:100%;display:block} figcaption{padding:.4em .8em .8em;min-height:3em}
small{color:#5b6577;display:block}
"""


@dataclass(frozen=True)
class Options:
    """The prompts, the seed and the model of a gallery."""

    prompts: tuple[str, ...] = PROMPTS
    """Words for the films, in English or Chinese."""

    seed: int = 1
    """Seed of the noise of every film."""

    model: Path = Path(MODEL)
    """The model: a name, a run or a folder."""


def make(options: Options) -> list[tuple[str, np.ndarray]]:
    """Return (prompt, frames (F, H, W, 3) uint8) of each film; a picture begins the last one."""
    prompts = list(options.prompts)
    if not prompts:
        raise ValueError("--prompts is empty: give the words of at least one film")
    pipeline = load_pipeline(str(options.model))
    seeds = [options.seed + number for number in range(len(prompts) + 1)]
    films = list(pipeline(prompts, seed=seeds[:-1]))
    again = pipeline(prompts[0], seed=seeds[-1], image=films[0][0])
    return [*zip(prompts, films, strict=True), (prompts[0], again)]


def write(out: Path, films: list[tuple[str, np.ndarray]], options: Options, seconds: float) -> Path:
    """Write the films, their strip, their prompts and the page into `out`; return the page."""
    out.mkdir(parents=True, exist_ok=True)
    cards = []
    for number, (prompt, frames) in enumerate(films):
        name = f"{number}.mp4"
        write_video(out / name, frames, crf=10)
        how = f"seed {options.seed + number}"
        if number == len(films) - 1:
            how = "from a picture: the first frame of the first film"
        cards.append(
            f'<figure><video src="{name}" autoplay loop muted playsinline></video>'
            f"<figcaption>{html.escape(prompt)}<small>{how}</small></figcaption></figure>"
        )
    strip = [np.concatenate([frames[i] for i in STRIP], axis=0) for _, frames in films]
    write_png(out / "strip.png", np.concatenate(strip, axis=1))
    words = [prompt for prompt, _ in films]
    (out / "prompts.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", "utf-8")
    page = out / "index.html"
    page.write_text(_page("".join(cards), seconds), "utf-8")
    return page


def _page(cards: str, seconds: float) -> str:
    model = f"python sample.py {MODEL} --prompt"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Small films of emoji</title>
<style>{STYLE}</style><h1>Small films of emoji</h1>
<p>A model with 7 million weights made these films in {seconds:.0f} seconds on this machine.
It comes with the repository, and <code>configs/emoji.py</code> trained it: the same code as for the
12B model. Reload the page to start all films together.</p>
<main>{cards}</main>
<h2>Your own words</h2>
<pre>{model} "woman dancing"
{model} 戴头纱的女人
python -m easyanimate_jax serve {MODEL}    # the same in a browser</pre>
<p>The model knows 2,109 animated emoji by their English and Chinese names. It was not trained on
anything else: other words give emoji that it finds near.</p></html>
"""


def main(out: tyro.conf.Positional[Path], options: tyro.conf.OmitArgPrefixes[Options]) -> int:
    """Make eight small films of emoji and a page that plays them, in the folder OUT."""
    set_up_jax()
    began = time.time()

    def work() -> int:
        films = make(options)
        print(write(out, films, options, time.time() - began))
        return DONE

    return run(work)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, registry=registry()))
