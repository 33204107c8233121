"""The page of `evaluate`: its figures, the loss by time, and films beside one another."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from easyanimate_jax.evaluation import web

SHOWN = 8  # clips
WIDTH = 320  # pixels of a film on the page
TITLES = {
    "real": "the clip",
    "rebuilt": "rebuilt by the VAE",
    "made": "made from one of its captions",
}


def figures(results: Mapping) -> list[tuple[str, str, str]]:
    """Return (figure, value, 95 % interval or standard error) of each result."""
    loss = results["loss"]
    rows = [("loss of denoising", f"{loss['loss']:.5f}", f"standard error {loss['error']:.5f}")]
    for name, unit in (("psnr", " dB"), ("ssim", "")):
        one = results[name]
        spread = f"{one['low']:.3f} to {one['high']:.3f}{unit}"
        rows.append((f"{name.upper()} of reconstructions", f"{one['value']:.3f}{unit}", spread))
    if "distance" in results:
        one = results["distance"]
        name = f"Fréchet distance by {one['features']}, {one['real']} real and {one['made']} made"
        rows.append((name, f"{one['value']:.4g}", f"{one['low']:.4g} to {one['high']:.4g}"))
    return rows


def page(
    results: Mapping, read: Callable[[str, Mapping], UInt8[np.ndarray, "F H W 3"] | None]
) -> str:
    """Return the HTML page. `read(kind, row)` returns the film of a clip, or None."""
    about, loss = results["settings"], results["loss"]
    times = (np.arange(len(loss["by_time"])) + 0.5) / len(loss["by_time"])
    curve = web.line_chart(
        {"loss": ((100 * times).tolist(), loss["by_time"])},
        x_label="training times below it, in percent: from little noise to much",
    )
    lengths = web.table(["tokens", "loss"], list(loss["by_length"].items()))
    step = "" if about["step"] is None else f", step {about['step']} ({about['weights_of']})"
    films = "".join(_row(row, read) for row in results["clips"][:SHOWN])
    how = "{steps} steps, guidance {guidance}".format(**about["sampling"])
    note = web.note(f"{loss['clips']} clips. Films are made in {how}.")
    return web.page(
        f"{about['model']}{step}",
        [
            ("Figures", web.table(["", "value", "95 of 100"], figures(results)) + note),
            ("Loss by time", curve + lengths),
            ("Clips", films),
        ],
    )


def _row(row: Mapping, read: Callable) -> str:
    shown = []
    for kind, title in TITLES.items():
        film = read(kind, row)
        if film is None:
            continue
        scale = WIDTH / film.shape[2]
        one = (
            web.picture(film[0], title, scale) if len(film) == 1 else web.video(film, title, scale)
        )
        shown.append(one)
    words = f"{row['number']}. {row['clip']}: {' / '.join(row['captions'])} ({row['psnr']:.1f} dB)"
    return f"<div>{web.note(words)}{''.join(shown)}</div>"


def lines(results: Mapping) -> Sequence[str]:
    """Return the figures as lines for a terminal."""
    rows = figures(results)
    width = max(len(name) for name, *_ in rows)
    return [f"{name:<{width}}  {value}  ({spread})" for name, value, spread in rows]
