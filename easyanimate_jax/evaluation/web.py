"""Parts of a self-contained HTML page: tables, SVG charts, inline pictures and videos."""

import base64
import html
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from easyanimate_jax.data import media

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.7em} h2{margin-top:2em;border-bottom:1px solid #d5dae3;padding-bottom:.2em}
table{border-collapse:collapse;margin:1em 0} th,td{padding:.25em .8em;text-align:right}
th:first-child,td:first-child{text-align:left} tr:nth-child(even){background:#f4f6fa}
th{border-bottom:2px solid #9aa5b8} figure{display:inline-block;margin:.4em;vertical-align:top}
figcaption{font-size:12px;max-width:16em;color:#4c576b} img,video{image-rendering:pixelated}
svg text{font:11px system-ui,sans-serif;fill:#4c576b} .note{color:#4c576b}
"""
COLOURS = ("#2f6fd0", "#d2562b", "#2f9e62", "#8a56c2", "#b58a12", "#24909b")


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return a whole HTML document. Each section is (heading, HTML); headings are escaped."""
    body = "".join(f"<h2>{html.escape(head)}</h2>{content}" for head, content in sections)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def note(text: str) -> str:
    """Return a paragraph of escaped text."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return an HTML table; floats have three decimals."""

    def cell(value, tag="td"):
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return f"<{tag}>{html.escape(text)}</{tag}>"

    head = "".join(cell(h, "th") for h in header)
    body = "".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    bands: Sequence[tuple[float, float, str]] = (),
    width: int = 1000,
    height: int = 280,
) -> str:
    """Return SVG lines over a shared x axis; `bands` are shaded spans (from, to, name) of x."""
    left, right, top, bottom = 50, 10, 22, 34
    xs = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    ys = np.concatenate([np.asarray(y, float) for _, y in series.values()])
    x0, x1 = xs.min(), max(xs.max(), xs.min() + 1e-9)
    y0, y1 = y_range or (ys.min(), max(ys.max(), ys.min() + 1e-9))

    def px(x):
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y):
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width:100%">']
    for i, (a, b, name) in enumerate(bands):
        shade = "#eef2f8" if i % 2 else "#f8fafc"
        parts.append(
            f'<rect x="{px(a):.1f}" y="{top}" width="{px(b) - px(a):.1f}" '
            f'height="{height - top - bottom}" fill="{shade}"/>'
            f'<text x="{px(a) + 4:.1f}" y="{top + 12}">{html.escape(name)}</text>'
        )
    for y in np.linspace(y0, y1, 5):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" '
            f'stroke="#d5dae3"/><text x="{left - 6}" y="{py(y) + 4:.1f}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
    for x in np.linspace(x0, x1, 6):
        parts.append(f'<text x="{px(x):.1f}" y="{height - 18}" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 3}" text-anchor="middle">{x_label}</text>')
    for i, (name, (x, y)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            f'<text x="{left + 130 * i}" y="12" style="fill:{colour}">{html.escape(name)}</text>'
        )
    return "".join(parts) + "</svg>"


def picture(image: UInt8[np.ndarray, "H W 3"], caption: str = "", scale: float = 1.0) -> str:
    """Return an inline PNG picture, shown at `scale` times its size."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    tag = f'<img width="{round(image.shape[1] * scale)}" src="data:image/png;base64,{data}">'
    return f"<figure>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>"


def video(frames: UInt8[np.ndarray, "F H W 3"], caption: str = "", scale: float = 1.0) -> str:
    """Return an inline looping video at 8 frames a second, shown at `scale` times its size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        media.write_video(path, frames)
        data = base64.b64encode(path.read_bytes()).decode()
    tag = (
        f'<video width="{round(frames.shape[2] * scale)}" autoplay loop muted playsinline '
        f'src="data:video/mp4;base64,{data}"></video>'
    )
    return f"<figure>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>"


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Return the running mean of each value and up to `window` - 1 values before it."""
    values = np.asarray(values, float)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
