"""The funnel: how many clips each step of curation kept, as text and as a web page."""

import base64
import html
import io
from collections import Counter

import numpy as np
from PIL import Image

from easyanimate_jax.prepare.model_steps import ORIGINAL
from easyanimate_jax.storage.stores import Place, replace_text

PICTURES = 8  # pictures of each step on the page


_ORDER = {"not": 0, "does": 0, "shorter": 1, "fewer": 2, "near-duplicate": 3, "no": 9}
_ORDER |= {"similar": 10}


class Funnel:
    """The counts of all rows by their reasons, and some rows of each."""

    def __init__(self):
        self.reasons, self.rewritten = Counter(), 0  # the reason of rows that are kept is ""
        self.shown: dict[str, list[dict]] = {}

    def add(self, row: dict) -> None:
        """Count a row."""
        reason = _step(row)
        self.reasons[reason] += 1
        if not reason and row["captions"] != row.get(ORIGINAL, row["captions"]):
            self.rewritten += 1
        some = self.shown.setdefault(reason, [])
        if len(some) < PICTURES:
            some.append(row)

    def steps(self) -> list[tuple[str, int, int]]:
        """Return (reason, clips left out for it, clips left after it) of each step, in order."""
        left, found = self.reasons.total(), []
        for reason in sorted(self.reasons.keys() - {""}, key=_place):
            left -= self.reasons[reason]
            found.append((reason, self.reasons[reason], left))
        return found

    def text(self) -> str:
        """Return the funnel as text, one line for each step."""
        found, total = self.steps(), self.reasons.total()
        lines = [" -> ".join(f"{n:,}" for n in (total, *(left for *_, left in found)))]
        lines += [f"  {lost:>10,} left out: {reason}" for reason, lost, _ in found]
        lines += [f"  {self.reasons['']:>10,} kept"]
        if self.rewritten:
            lines += [f"  {self.rewritten:>10,} of them with rewritten captions"]
        return "\n".join(lines)

    def write(self, out: Place, thumbnails: dict[str, np.ndarray]) -> None:
        """Write `funnel.txt` and `funnel.html` into the folder `out`."""
        replace_text(out / "funnel.txt", self.text() + "\n")
        total, parts = (
            self.reasons.total(),
            [
                "<!doctype html><meta charset=utf-8><title>Funnel</title><style>body{font:14px "
                "sans-serif;margin:2em}figure{display:inline-block;margin:4px;width:170px}figcaption"
                "{font-size:11px;overflow-wrap:anywhere}.bar{background:#48c;height:8px}</style>"
                f"<h1>Funnel</h1><pre>{html.escape(self.text())}</pre>"
            ],
        )
        for reason, count, _ in [*self.steps(), ("", self.reasons[""], 0)]:
            parts.append(f"<h2>{html.escape(reason or 'kept')}: {count:,}</h2>")
            parts.append(f"<div class=bar style='width:{100 * count / max(1, total):.1f}%'></div>")
            parts += [
                f"<figure>{_picture(thumbnails.get(row['clip']))}<figcaption>"
                f"{html.escape(_title(row))}</figcaption></figure>"
                for row in self.shown.get(reason, ())
            ]
        replace_text(out / "funnel.html", "\n".join(parts))


def _place(reason: str) -> tuple[int, str]:
    return _ORDER.get(reason.split()[0], 5), reason


def _title(row: dict) -> str:
    """Return what the page tells of a row."""
    scores = ", ".join(f"{k} {v:.2f}" for k, v in row.items() if _is_score(k, v))
    told = [f"{row['clip']} {row['height']}x{row['width']}, {row['frames']} frames", scores]
    told += [row["left_out"]] if row["left_out"] != _step(row) else []
    told += row["captions"]
    before = row.get(ORIGINAL, row["captions"])
    told += [f"(before: {'; '.join(before)})"] if row["captions"] != before else []
    return "; ".join(filter(None, told))


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
