"""Print what each step to a model of the report takes and costs: arithmetic, with your numbers.

Rates are measured ones of this repository, predictions of `aot`, or assumptions; the last column
says which. The default prices are about the list prices of a large cloud: give your own. No cloud
was paid or asked. `--write` puts the tables into the pages on scale, which a test compares.

    python benchmarks/scale.py --clips 26.6e6 --hosts 128 --price-chip-hour 4.2
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from clip_records import CAPTIONS, ROOT
from set_bytes import CLIPS, clip_bytes, terabytes

from easyanimate_jax.commands.parse import load_config

CONFIG = "configs/v5_12b.py"
PAGES = {"en": ROOT / "docs" / "scale.md", "zh": ROOT / "docs" / "zh" / "scale.md"}
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
CHIP, FLOPS = "v5p", 459e12  # of a chip a second, in bfloat16
CHIPS_A_HOST = 4
REPORT = 26.6e6  # clips; the report's other numbers grow with it

# Measured, on one core.
READ_CLIP = 0.71  # seconds: 49 frames of a 1080p film, benchmarks/results/seeking.md
PLAN_CLIP = 86e-6  # seconds a clip and set, docs/scale.md
DUPLICATES = 25.1 / 5e6  # seconds a hash, benchmarks/results/duplicates.md
AOT_STAGE = 8 / 60  # hours: 5 to 11 minutes, docs/results.md

# By arithmetic.
VAE_PIXEL = 9.13e6  # FLOPs to encode a pixel of a video, `count_vae`
VAE_PICTURE = 12.24e6  # of a picture
TEXT_CAPTION = 2 * (0.35e9 * 77 + 1.7e9 * 256)  # 2 x weights x tokens of both encoders

# Assumed.
CURATE_READS = 2  # a clip that is kept is read twice: cut, then scored
PICTURE = 0.05  # seconds of a core to read a picture
SIDES = {3072: 256, 3328: 256, 13312: 512, 53248: 1024}  # tokens -> pixels of a square clip
PICTURE_SIDE, FRAMES = 896, 49
READS_A_CLIP = 6  # requests for a clip's part of a film, docs/results.md#stores


class Step(NamedTuple):
    """A row of the table: hours of `machines`, and what they read, write and cost."""

    name: str
    hours: float
    cost: float
    read: float = 0.0  # TB
    written: float = 0.0  # TB


def count_vae(frames: int, height: int, width: int) -> float:
    """Return the FLOPs of the convolutions and products that encode a pixel of a video."""
    import jax
    import jax.numpy as jnp

    from easyanimate_jax.models.vae import CausalVAE, VAEConfig
    from easyanimate_jax.prepare.encode import _encode
    from easyanimate_jax.weights.module import abstract

    def flops(jaxpr) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
            if eqn.primitive.name == "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape
                outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * out * math.prod(kernel) / outputs
            elif eqn.primitive.name == "dot_general":
                (summed, _), _ = eqn.params["dimension_numbers"]
                total += 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in summed)
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            below = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
            total += times * sum(flops(one) for one in below if hasattr(one, "eqns"))
        return total

    video = jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.float32)
    traced = jax.make_jaxpr(_encode)(abstract(CausalVAE, VAEConfig()), video)
    return flops(traced.jaxpr) / (frames * height * width)


def encode_flops(latents) -> float:
    """Return the FLOPs to encode a clip of a set with its conditions."""
    videos = 1 + latents.condition_draws
    if latents.kinds == ("image",):
        return videos * VAE_PICTURE * PICTURE_SIDE**2
    return videos * VAE_PIXEL * FRAMES * SIDES[latents.budget.tokens] ** 2


def training(hosts: int) -> tuple[float, float, float]:
    """Return (chip hours, TB read by all hosts, millions of reads) of all stages.

    They are those of 512 chips, or of 128 if that is nearer; another number takes the same chip
    hours.
    """
    pod = "v5p-512" if hosts * CHIPS_A_HOST > 256 else "v5p-128"
    fed = json.loads((RESULTS / "feeding.json").read_text())
    hours = read = reads = 0.0
    for stage in load_config(CONFIG, ()).stages:
        name = f"{pod}_{stage.name}"
        figures = json.loads((RESULTS / "pods" / f"{name}.json").read_text())["stages"][0]
        hours += figures["predicted_chip_hours"]
        read += stage.steps * fed[name]["hosts"] * fed[name]["bytes"] / 1e12
        reads += stage.steps * fed[name]["hosts"] * fed[name]["reads"] / 1e6
    return hours, read, reads


def preparation(o: argparse.Namespace) -> list[Step]:
    """Return the rows of the steps before training, in their order."""
    config, scale = load_config(CONFIG, ()), o.clips / REPORT
    counts = [1e6 * scale * count for count in CLIPS[CONFIG][0]]
    captioned, sizes = (
        1e6 * scale * CLIPS[CONFIG][1],
        [clip_bytes(config, latents) for latents in config.sets],
    )
    latents = sum(count * size.now for count, size in zip(counts, sizes, strict=True)) / 1e12
    texts = captioned * sizes[0].text / 1e12
    pictures, videos = counts[0], sum(counts[1:])

    def on_cores(name: str, seconds: float, cores: int, clips: float = 0.0) -> Step:
        cost = seconds / 3600 * o.price_core_hour
        cost += clips * READS_A_CLIP / 1e6 * o.price_million_reads
        return Step(name, seconds / 3600 / cores, cost, clips * o.clip_mb / 1e6)

    def on_chips(name: str, flops: float, written: float) -> Step:
        hours = flops / (FLOPS * o.mfu) / 3600
        machines = o.hosts * CHIPS_A_HOST
        return Step(name, hours / machines, hours * o.price_chip_hour, 0.0, written)

    cores = o.workers * o.cores
    work = sum(n * encode_flops(one) for n, one in zip(counts, config.sets, strict=True))
    return [
        on_cores("curate", CURATE_READS * READ_CLIP * o.clips, cores, CURATE_READS * o.clips),
        on_cores("duplicates", DUPLICATES * o.clips, 1),
        on_cores("plan", PLAN_CLIP * captioned * len(config.sets), 1),
        on_cores("decode", READ_CLIP * videos + PICTURE * pictures, cores, videos),
        on_chips("encode", work, latents),
        on_chips("texts", CAPTIONS * captioned * TEXT_CAPTION, texts),
        on_cores("look", 3600 * AOT_STAGE * len(config.stages), 1),
    ]


def steps(o: argparse.Namespace) -> list[Step]:
    """Return the rows of the table, with the sum at its end."""
    made = preparation(o)
    hours, read, reads = training(o.hosts)
    cost = hours * o.price_chip_hour + reads * o.price_million_reads
    made.append(Step("train", hours / (o.hosts * CHIPS_A_HOST), cost, read))
    at_once = min(step.hours for step in made if step.name in ("decode", "encode"))
    total = sum(step.hours for step in made) - at_once  # both run at the same time
    stored = sum(step.written for step in made) + o.clips * o.clip_mb / 1e6
    months = total / 24 / 30 + o.months
    made.append(Step("keep", 24 * 30 * months, stored * months * o.price_tb_month, 0.0, stored))
    read = sum(step.read for step in made)
    return [*made, Step("sum", total, sum(step.cost for step in made), read, 0.0)]


WORDS = {
    "en": {
        "head": ("step", "command", "machines", "hours", "TB read", "TB written", "$", "from"),
        "curate": (
            "1. curate",
            "`curate --part k/n`",
            "{w} x {c} cores",
            "measured, 2 reads a clip",
        ),
        "duplicates": ("1. near-duplicates", "the last `curate`", "1 core", "measured"),
        "plan": ("2. plan", "`prepare --step plan`", "1 core", "measured"),
        "decode": ("3. decode", "`prepare --step work`", "{w} x {c} cores", "measured"),
        "encode": ("3. encode clips", "the same", "{t} {chip}", "FLOPs, {mfu} assumed"),
        "texts": ("3. encode captions", "the same", "{t} {chip}", "FLOPs, {mfu} assumed"),
        "look": ("4. look", "`aot`, `doctor`", "1 core", "measured"),
        "train": ("5. train", "`train.py`", "{t} {chip}", "predicted, [pods](pods.md)"),
        "keep": ("keep all of it", "", "a bucket", "arithmetic"),
        "sum": ("sum", "", "", "decode and encode at once"),
    },
    "zh": {
        "head": ("步骤", "命令", "机器", "小时", "读取 TB", "写入 TB", "美元", "依据"),
        "curate": ("1. 切分筛选", "`curate --part k/n`", "{w} x {c} 核", "实测，每片段读两遍"),
        "duplicates": ("1. 近似去重", "最后一个 `curate`", "1 核", "实测"),
        "plan": ("2. 规划", "`prepare --step plan`", "1 核", "实测"),
        "decode": ("3. 解码", "`prepare --step work`", "{w} x {c} 核", "实测"),
        "encode": ("3. 编码片段", "同上", "{t} {chip}", "FLOPs，假设 {mfu}"),
        "texts": ("3. 编码描述", "同上", "{t} {chip}", "FLOPs，假设 {mfu}"),
        "look": ("4. 检查", "`aot`、`doctor`", "1 核", "实测"),
        "train": ("5. 训练", "`train.py`", "{t} {chip}", "预测，见 [pod](pods.md)"),
        "keep": ("全部存储", "", "存储桶", "推算"),
        "sum": ("合计", "", "", "解码与编码同时进行"),
    },
}


def cost_table(o: argparse.Namespace, language: str = "en") -> str:
    """Return the table of costs as Markdown."""
    words = WORDS[language]
    lines = [_line(words["head"]), f"|{'---|' * len(words['head'])}"]
    about = {"w": o.workers, "c": o.cores, "t": o.hosts * CHIPS_A_HOST, "chip": CHIP}
    about["mfu"] = f"{o.mfu:.0%} MFU"
    for step in steps(o):
        name, command, machines, source = (word.format(**about) for word in words[step.name])
        numbers = [_number(x) for x in (step.hours, step.read, step.written)]
        lines.append(_line((name, command, machines, *numbers, _money(step.cost), source)))
    return "\n".join(lines)


def byte_table(language: str = "en") -> str:
    """Return the table of TB, before and now, as Markdown."""
    names = {
        "en": ("config", "TB before", "TB now", "of it latents", "of it captions"),
        "zh": ("配置", "以前 TB", "现在 TB", "其中潜变量", "其中描述"),
    }[language]
    lines = [_line(names), f"|{'---|' * len(names)}"]
    for path in CLIPS:
        before, now, texts = terabytes(path)
        lines.append(_line((f"`{path}`", *(f"{x:.0f}" for x in (before, now + texts, now, texts)))))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(x: float) -> str:
    return "" if not x else f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 0.1 else f"{x:.2f}"


def _money(x: float) -> str:
    return "< 1" if x < 1 else f"{round(x, 2 - math.floor(math.log10(x))):,.0f}"


def parser() -> argparse.ArgumentParser:
    """Return the options, with the defaults of the pages."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--clips", type=float, default=REPORT)
    made.add_argument("--hosts", type=int, default=128, help=f"of {CHIPS_A_HOST} {CHIP} chips")
    made.add_argument("--workers", type=int, default=128, help="hosts with CPUs alone")
    made.add_argument("--cores", type=int, default=96, help="of a worker")
    made.add_argument("--mfu", type=float, default=0.3, help="of the encoders, assumed")
    made.add_argument("--clip-mb", type=float, default=5.0, help="of a clip's part of its film")
    made.add_argument("--months", type=float, default=1.0, help="to keep it beside the work")
    made.add_argument("--price-chip-hour", type=float, default=4.2)
    made.add_argument("--price-core-hour", type=float, default=0.04)
    made.add_argument("--price-tb-month", type=float, default=20.0)
    made.add_argument("--price-million-reads", type=float, default=0.4)
    made.add_argument("--write", action="store_true", help="write the tables into the pages")
    return made


def written(text: str, language: str) -> str:
    """Return a page with both tables, of the defaults."""
    tables = {"cost": cost_table(parser().parse_args([]), language), "bytes": byte_table(language)}
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main() -> None:
    """Print the table, or write the pages."""
    options = parser().parse_args()
    if options.write:
        for language, page in PAGES.items():
            page.write_text(written(page.read_text("utf-8"), language), "utf-8")
    sys.stdout.write(cost_table(options) + "\n")


if __name__ == "__main__":
    main()
