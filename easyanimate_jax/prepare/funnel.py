"""The funnel: how many clips each step of curation kept, as text and as a web page."""

import base64
import html
import io
from collections import Counter

import numpy as np
from PIL import Image

from easyanimate_jax.prepare.clip_captions import ORIGINAL
from easyanimate_jax.storage.stores import Place, replace_text

PICTURES = 8  # pictures of each step on the page


def steps(rows: list[dict]) -> list[tuple[str, int, int]]:
    """Return (reason, clips left out for it, clips left after it) of each step, in order."""
    reasons = Counter(_step(row) for row in rows if row["left_out"])
    left, found = len(rows), []
    for reason in dict.fromkeys(sorted(reasons, key=lambda r: _ORDER.get(r.split()[0], 5))):
        left -= reasons[reason]
        found.append((reason, reasons[reason], left))
    return found


_ORDER = {"not": 0, "does": 0, "shorter": 1, "fewer": 2, "near-duplicate": 3, "no": 9}


def text(rows: list[dict]) -> str:
    """Return the funnel as text, one line for each step."""
    found = steps(rows)
    lines = [" -> ".join(f"{n:,}" for n in (len(rows), *(left for *_, left in found)))]
    lines += [f"  {lost:>10,} left out: {reason}" for reason, lost, _ in found]
    lines += [f"  {len(rows) - sum(n for _, n, _ in found):>10,} kept"]
    kept = [row for row in rows if not row["left_out"] and ORIGINAL in row]
    if rewritten := sum(row["captions"] != row[ORIGINAL] for row in kept):
        lines += [f"  {rewritten:>10,} of them with rewritten captions"]
    return "\n".join(lines)


def shown(rows: list[dict]) -> list[dict]:
    """Return at most `PICTURES` rows of each step, and of the rows that are kept."""
    by_step = {}
    for row in rows:
        by_step.setdefault(_step(row), []).append(row)
    return [row for some in by_step.values() for row in some[:PICTURES]]


def write(out: Place, rows: list[dict], thumbnails: dict[str, np.ndarray]) -> None:
    """Write `funnel.txt` and `funnel.html` into the folder `out`."""
    replace_text(out / "funnel.txt", text(rows) + "\n")
    found = [*steps(rows), ("", len(rows) - sum(n for _, n, _ in steps(rows)), 0)]
    parts = [
        "<!doctype html><meta charset=utf-8><title>Funnel</title><style>body{font:14px sans-serif;"
        "margin:2em}figure{display:inline-block;margin:4px;width:170px}figcaption{font-size:11px;"
        "overflow-wrap:anywhere}.bar{background:#48c;height:8px}</style><h1>Funnel</h1>"
        f"<pre>{html.escape(text(rows))}</pre>"
    ]
    for reason, count, _ in found:
        parts.append(f"<h2>{html.escape(reason or 'kept')}: {count:,}</h2>")
        parts.append(f"<div class=bar style='width:{100 * count / max(1, len(rows)):.1f}%'></div>")
        for row in shown(rows):
            if _step(row) != reason:
                continue
            scores = ", ".join(f"{k} {v:.2f}" for k, v in row.items() if _is_score(k, v))
            title = (
                f"{row['clip']} {row['height']}x{row['width']}, {row['frames']} frames; {scores}"
            )
            why = row["left_out"] if row["left_out"] != reason else ""
            why = "; ".join(filter(None, (why, *row["captions"])))
            if row["captions"] != (before := row.get(ORIGINAL, row["captions"])):
                why += f" (before: {'; '.join(before)})"
            parts.append(
                f"<figure>{_picture(thumbnails.get(row['clip']))}<figcaption>"
                f"{html.escape(title)} {html.escape(why)}</figcaption></figure>"
            )
    replace_text(out / "funnel.html", "\n".join(parts))


def _step(row: dict) -> str:
    """Return the reason without the details of one file."""
    return row["left_out"].split(":")[0]


def _is_score(name: str, value) -> bool:
    return isinstance(value, float) and name != "fps"


def _picture(pixels: np.ndarray | None) -> str:
    if pixels is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=70)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
