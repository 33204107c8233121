"""`convert(source, target, options)`: convert a model or a whole pipeline to another layout.

A pipeline is a folder of folders. `transformer` and `vae` are renamed and reshaped; text encoders
are only cast to the chosen dtype; tokenizers and the scheduler are copied. All headers are checked
before any byte is written, and a failed conversion leaves no target behind.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from easyanimate_jax.diffusion.tasks import task_of
from easyanimate_jax.facts import DTypes, check_fields
from easyanimate_jax.storage.local import local_path
from easyanimate_jax.storage.stores import Place, Remote
from easyanimate_jax.weights import (
    defaults,
    files,
    lora,
    mmdit_table,
    run_folder,
    schedulers,
    vae_table,
)
from easyanimate_jax.weights.adapters import Weighted, merged, open_loras, summary
from easyanimate_jax.weights.at_hand import at_hand
from easyanimate_jax.weights.defaults import Defaults
from easyanimate_jax.weights.folder import KINDS, Model, Weights, open_model, read_json
from easyanimate_jax.weights.lazy import Tensor
from easyanimate_jax.weights.module import CONFIG, WEIGHTS, config_text
from easyanimate_jax.weights.prefixes import parts_of, unwrapped
from easyanimate_jax.weights.schedulers import INDEX, SCHEDULER, SCHEDULERS
from easyanimate_jax.weights.writing import LORA_FILE, Part, appearing, write

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXTS = (*TEXT_ENCODERS, *TOKENIZERS)
LENGTHS = "text.json"  # prompt lengths, present for text encoders other than the released ones
PARTS = (*KINDS, *TEXTS, "scheduler")
REQUIRED = ("vae", "text_encoder", "tokenizer")  # by diffusers' pipelines; null if absent
# A layer of Bert, T5 or Qwen2, and not of a decoder or a vision tower.
LAYER = re.compile(r"(?:(?!decoder|visual|vision)\w+\.)*?(?:block|layer|layers)\.(\d+)\.")


class Report(NamedTuple):
    """The result of a conversion; `parts` are (name, number of tensors, bytes)."""

    parts: list[tuple[str, int, int]]
    notes: list[str]
    seconds: float
    peak_rss: int | None  # bytes; the peak memory of the whole process, None where nobody counts it

    def __str__(self) -> str:
        count, size = (sum(part[i] for part in self.parts) for i in (1, 2))
        lines = [f"{name:16}{n:6} tensors {b / 1e6:12.2f} MB" for name, n, b in self.parts]
        total = (
            f"{'total':16}{count:6} tensors {size / 1e6:12.2f} MB in {self.seconds:.1f} s, "
            f"{size / 1e6 / self.seconds:.0f} MB/s"
        )
        if self.peak_rss is not None:
            total += f", peak RSS {self.peak_rss / 1e6:.0f} MB"
        return "\n".join([*lines, total, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Options:
    """The choices of one conversion."""

    to: Literal["jax", "diffusers", "original", "comfyui"]
    """Layout to write; "comfyui" is for LoRA files."""

    dtype: DTypes | None = None
    """Data type of all written weights. None keeps the type of each tensor."""

    weights: Weights = "ema"
    """Weights to read from a run's checkpoint: the average ("ema") or the trained ones ("raw")."""

    step: int | None = None
    """Step of the run's checkpoint to read. None is the newest."""

    in_channels: int | None = None
    """Input channels of the written transformer; the number selects the task (spec 2.9). None keeps
    the number of the source."""

    only: str | None = None
    """Name of one part of the pipeline; it is written directly to the target. None writes the whole
    pipeline."""

    allow_pickle: bool = False
    """Also read .bin, .pt and .ckpt files, with torch. Use it only for sources that you trust."""

    loras: tuple[tuple[str, float], ...] = ()
    """LoRA files, with a weight each, to add to the transformer's weights."""

    shard_bytes: int = files.SHARD
    """Maximum bytes of one weight file; larger models are split over several files."""

    def __post_init__(self):
        check_fields(
            self,
            step="[0, inf)",
            in_channels="[1, inf)",
            shard_bytes="[1, inf)",
            loras="(-inf, inf)",
        )
        if self.only not in (None, *PARTS):
            raise ValueError(f"Options.only is {self.only!r}; use one of {', '.join(PARTS)}")


def convert(
    source: str | Place,
    target: str | Path,
    options: Options,
    progress: Callable[[int, int], object] = lambda size, total: None,
) -> Report:
    """Convert `source` and write it to `target`, a new folder.

    A LoRA becomes a new file. So do the adapters of a run with `lora`, if `target` is named
    *.safetensors; else they are added to the weights of its model.

    `progress` is called with the bytes just written and the total bytes. Raises ValueError listing
    all problems; `target` does not exist then.
    """
    began, source, target = time.perf_counter(), at_hand(source), local_path(target)
    problems = []
    if not source.exists():
        problems.append(f"{source} does not exist")
    elif isinstance(source, Remote) and not run_folder.is_run(source):
        problems.append(f"{source} holds no checkpoints; of gs:// and s3:// only runs are read")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        problems.append(f"{target} already exists; name a new folder, or remove it")
    files.raise_all(f"{source} -> {target}", problems)
    plan = Plan(options, problems)
    plan.read(source, alone=target.suffix == ".safetensors")
    files.raise_all(source, problems)

    total = sum(part.nbytes for part in plan.parts)
    with appearing(target) as folder:
        for part in plan.parts:
            write(folder / part.name, part, lambda size: progress(size, total))
            files.raise_all(source, problems)
    return Report(
        [(p.name or target.name, len(p.tensors), p.nbytes) for p in plan.parts if p.tensors],
        plan.notes,
        time.perf_counter() - began,
        peak_rss(),
    )


class Plan:
    """The parts that a conversion will write, found by reading only the headers of files."""

    def __init__(self, options: Options, problems: list[str]):
        self.options, self.problems = options, problems
        self.parts: list[Part] = []
        self.notes: list[str] = []
        self.models: dict[str, Model] = {}
        self.process = ""  # class name of a run's noise process
        self.defaults, self.size = Defaults(), None  # how the model is sampled
        self.memory = files.Memory()
        self.loras = open_loras(options.loras)

    def read(self, source: Place, *, alone: bool) -> None:
        """Fill `parts` from a pipeline, a run, a model or a LoRA; add all faults to `problems`.

        `alone` asks for the adapters of a run without its model.
        """
        only = self.options.only
        places = self._places(source)
        if alone and run_folder.is_run(source):
            self.parts += _adapters_part(source, self.options, self.problems)
        elif not places:
            if (source / lora.CONFIG).is_file():
                self.parts += _lora_part(lora.read(source), self.options, self.problems)
                return
            names = self._open(source)
            if lora.is_lora(names):
                self.parts += _lora_part(lora.read(source), self.options, self.problems)
            elif self.options.to == "comfyui":
                self.problems.append("--to comfyui is for LoRA files; use diffusers or original")
            elif not self.problems:
                self._add(only or self._kind(source, names), source, "")
        elif only:
            if only not in places:
                self.problems.append(f"{source} has no {only}; it has {', '.join(places)}")
                return
            self._add(only, places[only], "")
        else:
            for name, place in places.items():
                self._add(name, place, name)
            if not self.problems:
                self._add_pipeline_files(places)

    def _places(self, source: Place) -> dict[str, Place]:
        """Return the path of each part of a pipeline; {} for a single model."""
        if run_folder.is_run(source):
            _, meta = run_folder.read_meta(source, self.options.step)
            config = meta["config"]
            self.process = config["process"]["class"]
            self.defaults, self.size = defaults.of_run(meta), defaults.size_of_run(meta)
            vae, text = (
                at_hand(run_folder.frozen_model(source, config, name)) for name in ("vae", "text")
            )
            texts = {name: text / name for name in TEXTS if (text / name).is_dir()}
            return {"transformer": source, "vae": vae, **texts}
        places = {name: source / name for name in PARTS if (source / name).is_dir()}
        self.defaults, self.size = defaults.of_folder(source), defaults.size_of_folder(source)
        if (source / INDEX).is_file():
            named = read_json(source / INDEX, self.problems)
            self.problems += [
                f"{source / INDEX} names {name}, and there is no such folder; download it"
                for name in PARTS
                if isinstance(named.get(name), list) and any(named[name]) and name not in places
            ]
        return places

    def _open(self, path: Path) -> dict[str, Tensor]:
        return files.open_weights(path, self.problems, self.options.allow_pickle, self.memory)

    def _kind(self, source: Path, names: Mapping[str, Tensor]) -> str:
        """Return which part a single model is, from the names of its tensors."""
        held = sorted(parts_of(names))
        if len(held) > 1:
            self.problems.append(
                f"{source} holds {' and '.join(held)}; choose one with --only {held[0]}"
            )
            return ""
        names = unwrapped(names, self.problems)
        if any(name.startswith(("transformer_blocks.", "blocks.")) for name in names):
            return "transformer"
        if any("coder." in name for name in names):
            return "vae"
        self.problems.append(
            f"{source} is no transformer, VAE or LoRA of EasyAnimate: its first tensor is "
            f"{next(iter(names))}"
        )
        return ""

    def _add(self, name: str, place: Place, folder: str) -> None:
        if name in KINDS:
            self._add_model(name, place, folder)
        elif name in TEXT_ENCODERS:
            self._add_text_encoder(place, folder)
        elif name:
            copies = [path for path in place.iterdir() if path.is_file()]
            self.parts.append(Part(folder, copies=copies))

    def _add_model(self, name: str, place: Place, folder: str) -> None:
        options, kind = self.options, KINDS[name]
        found = len(self.problems)
        model = open_model(
            place,
            name,
            self.problems,
            dtype=options.dtype,
            weights=options.weights,
            step=options.step,
            allow_pickle=options.allow_pickle,
            memory=self.memory,
        )
        if model is None or len(self.problems) > found:
            return
        wanted = options.in_channels
        if name == "transformer" and wanted not in (None, model.config.in_channels):
            config, tensors, lines = mmdit_table.widen(model.tensors, model.config, wanted)
            model = model._replace(config=config, tensors=tensors)
            self.notes += lines
        loras = (*model.loras, *self.loras) if name == "transformer" else ()
        if own := [one for one in map(_defaults_of, loras) if one]:
            self.defaults = own[0]
        if loras:
            model = model._replace(tensors=merged(model.tensors, model.config, loras))
            self.notes += [f"added {summary(one)}" for one in loras]
        self.models[name] = model
        if options.to == "jax":
            text = config_text(kind.MODEL_CLASS, model.config)
            stem, longest = WEIGHTS.removesuffix(".safetensors"), sys.maxsize
            self.parts.append(Part(folder, model.tensors, stem, longest, {CONFIG: text}))
            return
        try:
            fields = kind.config_json(model.config, options.to)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            return
        self.notes += kind.notes(model.config, options.to)
        tensors = kind.to_torch(model.tensors, model.config, options.to)
        texts = {CONFIG: _json(fields)}
        self.parts.append(Part(folder, tensors, kind.STEM, options.shard_bytes, texts))

    def _add_text_encoder(self, place: Path, folder: str) -> None:
        options = self.options
        tensors = self._open(place)
        tensors = files.checked(tensors, self.problems, options.dtype)
        fields = read_json(place / CONFIG, self.problems)
        if options.dtype:
            named = [name for name in ("dtype", "torch_dtype") if name in fields]
            fields |= dict.fromkeys(named, options.dtype)
        self.problems += _other_depth(place, tensors, fields)
        copies = [
            path
            for path in place.iterdir()
            if path.is_file() and path.name != CONFIG and not files.is_weights(path)
        ]
        texts = {CONFIG: _json(fields)}
        self.parts.append(Part(folder, tensors, "model", options.shard_bytes, texts, copies))

    def _add_pipeline_files(self, places: Mapping[str, Path]) -> None:
        """Add the missing scheduler, the prompt lengths, and diffusers' index of the parts."""
        for file in (places[name].parent / LENGTHS for name in places if name == "text_encoder"):
            if file.is_file():
                self.parts.append(Part("", copies=[file]))
        transformer = self.models.get("transformer")
        if not transformer:
            return
        num_texts = len(transformer.config.text_widths)
        if "scheduler" in places:
            scheduler = read_json(places["scheduler"] / SCHEDULER, self.problems)
        else:
            scheduler = SCHEDULERS[self.process or schedulers.released_process(num_texts)]
            self.parts.append(Part("scheduler", texts={SCHEDULER: _json(scheduler)}))
        if not self.process:  # a run's parts were trained together
            vae = self.models["vae"].config if "vae" in self.models else None
            self.notes += schedulers.strange_parts(num_texts, scheduler.get("_class_name"), vae)
        if self.defaults != Defaults() or self.size:
            self.parts.append(Part("", texts={defaults.FILE: self.defaults.text(self.size)}))
        if self.options.to == "jax":
            return
        if "text_encoder_2" in places and self.options.to == "diffusers":
            self.notes.append(
                "diffusers has no pipeline with the two text encoders of V5; load the parts one by "
                "one with its classes"
            )
        try:
            task = task_of(transformer.config.in_channels)
        except ValueError as error:
            self.problems.append(f"{error}; choose one with --in-channels")
            return
        index = {
            "_class_name": task.pipeline,
            **{
                n: _text_class(n, place, self.problems) for n, place in places.items() if n in TEXTS
            },
            "transformer": ["diffusers", mmdit_table.FOREIGN_CLASS],
            "vae": ["diffusers", vae_table.FOREIGN_CLASS],
            "scheduler": ["diffusers", scheduler.get("_class_name")],
        }
        missing = {name: [None, None] for name in REQUIRED if name not in places}
        self.notes += [f"there is no {name}, so diffusers loads None for it" for name in missing]
        self.parts.append(Part("", texts={INDEX: _json(index | missing)}))


def _text_class(name: str, place: Path, problems: list[str]) -> list[str | None]:
    """Return the library and class of a text encoder or tokenizer, from its own config."""
    if name in TEXT_ENCODERS:
        classes = read_json(place / CONFIG, problems).get("architectures") or [None]
        return ["transformers", classes[0]]
    fields = read_json(place / "tokenizer_config.json", problems)
    return ["transformers", fields.get("tokenizer_class")]


def _defaults_of(one: Weighted) -> Defaults | None:
    return defaults.of_metadata(one.lora.metadata) if one.weight else None


def _adapters_part(source: Place, options: Options, problems: list[str]) -> list[Part]:
    """Return the file of the adapters of a run; [] after a problem."""
    model = open_model(source, "transformer", problems, weights=options.weights, step=options.step)
    _, meta = run_folder.read_meta(source, options.step)
    parts = ", ".join(pattern for pattern, _ in meta["config"].get("train", ()))
    if model and model.loras and not parts:
        return _lora_part(model.loras[-1].lora, options, problems)
    if model:
        other = f"trained {parts} of the model itself too" if model.loras else "has no adapters"
        problems.append(f"{source} {other}: name a folder for the whole model, not a LoRA file")
    return []


def _lora_part(given: lora.LoRA, options: Options, problems: list[str]) -> list[Part]:
    """Return the file of a LoRA; a dtype is that of its matrices. [] after a problem."""
    if options.to == "jax":
        problems.append(
            "a LoRA file has no layout of its own in JAX; use --to original, diffusers or "
            "comfyui, or load it with sample.py --lora"
        )
        return []
    given = lora.cast(given, options.dtype)
    tensors, told = lora.to_tensors(given, options.to), lora.metadata_for(given, options.to)
    return [Part("", tensors, LORA_FILE, sys.maxsize, metadata=told)]


def _other_depth(place: Path, names: Iterable[str], fields: Mapping) -> list[str]:
    """Return a line if the file of a text encoder has more or fewer layers than its config."""
    fields = {**fields, **(fields.get("text_config") or {})}
    told = fields.get("num_hidden_layers", fields.get("num_layers"))
    found = [int(m[1]) for m in map(LAYER.match, names) if m]
    if told is None or not found or told == 1 + max(found):
        return []
    return [
        f"{place}: config.json names {told} layers, and the weights have {1 + max(found)}; use the "
        f"config that belongs to them"
    ]


def _json(fields: Mapping) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def peak_rss() -> int | None:
    """Return the peak memory of this process, in bytes; None on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, it excludes the parent's memory before exec
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
