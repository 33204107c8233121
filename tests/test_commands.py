"""One command: every verb explains itself, and says in one line what is wrong."""

import ast
import dataclasses
import errno
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path

import pytest

from easyanimate_jax.__main__ import VERBS, main
from easyanimate_jax.commands import parse
from easyanimate_jax.runs.config import TrainConfig, VAETrainConfig
from easyanimate_jax.sharding import MeshConfig
from easyanimate_jax.storage.stores import Remote

ROOT = Path(__file__).parent.parent
CONFIG_VERBS = ("train", "describe", "doctor", "plan", "prepare", "aot")


def module_of(verb):
    return importlib.import_module(f"easyanimate_jax.commands.{verb.replace('-', '_')}")


def code_of(*words):
    try:
        return main(list(words))
    except SystemExit as stop:
        return stop.code


def test_every_verb_explains_itself_without_jax():
    program = (
        "import sys\n"
        "from easyanimate_jax.__main__ import VERBS, main\n"
        "for verb in (None, *VERBS):\n"
        "    try:\n"
        "        code = main(['--help'] if verb is None else [verb, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        code = stop.code\n"
        "    assert not code, verb\n"
        "assert not {'jax', 'transformers', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.split("usage: ")
    assert len(shown) == len(VERBS) + 2
    assert all(f"easyanimate_jax {verb} [-h]" in done.stdout for verb in VERBS)


def flat(config, prefix=""):
    """The options of a config's fields, as the command line has them."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name.replace('_', '-')}"
        some = value if isinstance(value, tuple) else ()
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{name}.")
        elif some and dataclasses.is_dataclass(some[0]):
            for i, one in enumerate(some):
                yield from flat(one, f"{name}.{i}.")
        elif name.endswith(".mesh") and value is None:
            yield from flat(MeshConfig(), f"{name}.")
        elif name.endswith(".objective") and value is None:
            continue  # an objective is chosen in the file; its fields are then options
        else:
            yield f"--{name}"


@pytest.mark.parametrize(
    ("verb", "path"),
    [*((verb, "configs/demo.py") for verb in CONFIG_VERBS), ("vae-train", "configs/demo_vae.py")],
)
def test_help_of_a_verb_and_a_config_lists_every_field(verb, path, capsys):
    from easyanimate_jax.runs.config import load

    assert code_of(verb, path, "--help") == 0
    shown = set(re.findall(r"--(?:no-)?[a-z][\w.-]*", capsys.readouterr().out))
    own = {f.name for f in dataclasses.fields(module_of(verb).Options)} - {"config", "index"}
    assert {f"--{name}" for name in own} <= shown
    assert set(flat(load(path))) <= shown


def test_help_of_train_names_the_configs_and_shows_two_examples(capsys):
    assert code_of("train", "--help") == 0
    out = capsys.readouterr().out
    assert all(f"configs/{path.name}" in out for path in (ROOT / "configs").glob("*.py"))
    examples = re.findall(r"^  python train\.py (\S+)(?: --\S+ \S+)+$", out, re.M)
    assert len(examples) == 2 and all((ROOT / path).is_file() for path in examples)


def test_a_reader_that_closes_the_output_ends_the_verb_without_a_word():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "easyanimate_jax", "--help"]
    ran = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a verb: train, "),
        (["trian"], "no verb 'trian'; the nearest are train, "),
        (["check"], "checkpoint"),
        (["train"], "missing: CONFIG"),
        (["train", "nowhere.py"], "no config 'nowhere.py'"),
        (["train", "configs/demo.py", "--loops", "2"], "--loops"),
        (
            ["train", "configs/demo.py", "--stages.0.step", "2"],
            "perhaps you meant --stages.0.steps",
        ),
        (["train", "configs/demo.py", "--stages.0.steps", "many"], "--stages.0.steps: .*'many'"),
        (
            ["train", "configs/demo.py", "--stages.0.mesh.fdsp", "2"],
            "perhaps you meant --stages.0.mesh.fsdp",
        ),
        (
            ["train", "configs/demo.py", "--stages.0.mesh.fsdp", "0"],
            r"MeshConfig.fsdp is 0; use -1 or a whole number of 1 or more",
        ),
        (["train", "configs/demo.py", "--stages.9.mesh.fsdp", "2"], "--stages.9.mesh.fsdp"),
        (["train", "configs/demo.py", "--stages.0.data", "x"], "reads latent set 'x'"),
        (
            ["train", "configs/demo.py", "--process.train-shift", "x"],
            "--process.train-shift: .*'x'",
        ),
        (["train", "configs/demo.py", "--replay", "-x"], "--replay"),
        (["train", "configs/demo_vae.py", "--replay", "3"], "--replay is for transformers"),
        (["vae-train", "configs/demo.py"], "configs/demo.py trains a transformer"),
        (
            ["vae-train", "configs/demo_vae.py", "--warmup-steps", "9999"],
            "warmup_steps is 9999, and the stages have",
        ),
        (["describe", "configs/demo_vae.py"], "configs/demo_vae.py trains a VAE"),
        (["plan", "configs/demo.py", "nowhere"], "nowhere"),
        (["prepare", "configs/demo.py", "--part", "8/8"], "as in 0/8 to 7/8"),
        (["curate", "a"], "missing: OUT"),
        (["curate", "a", "b", "--part", "2"], "as in 0/8 to 7/8"),
        (["sources"], "missing: SOURCE"),
        (["control", "a", "depth"], "no operator 'depth'; use canny"),
        (["text", "nowhere", "out"], "nowhere"),
        (["checkpoint", "lists", "a"], "Expected one of .*'list', 'verify', 'diff'"),
        (["checkpoint", "diff", "a", "1"], "give two for diff"),
        (["checkpoint", "list", "nowhere"], "nowhere holds no checkpoints"),
        (["aot", "configs/demo.py"], "missing: --topology"),
        (["doctor", "--seed", "3"], "--seed"),
        (["supervise", "--ranks", "2"], "behind --"),
        (["supervise", "--ranks", "0", "--", "true"], "--ranks 0"),
        (["convert", "a"], "missing: .*TARGET"),
        (["sample"], "missing: MODEL"),
        (["serve"], "give a model"),
        (["serve", "nowhere"], "there is no folder nowhere"),
        (["serve", "configs", "--lora", "nowhere"], "there is no file nowhere"),
        (["serve", "configs", "configs"], "two are called 'configs': name one of them"),
        (["serve", "a b=configs"], "'a b' is no name"),
        (["serve", "configs", "--no-token", "--host", "0.0.0.0"], "--no-token opens the server"),
        (["serve", "configs", "--token", "guess"], "--token is too easy to guess"),
        (["serve", "configs", "--no-token", "--token", "0123456789abcdef"], "cannot both be given"),
        (["serve", "configs", "--port", "70000"], "--port 70000 is not between 0 and 65535"),
        (["serve", "configs", "--folder", "setup.py"], "--folder setup.py is a file"),
        (["serve", "configs"], "configs is no run, and no whole pipeline"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # tyro would break its lines there
    assert code_of(*words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert re.match(r"(error|convert|sample\.py): ", error) and re.search(message, error)


# Processes that we start ourselves: no commands.
WORKERS = {"easyanimate_jax.data.decode", "easyanimate_jax.serving.engine"}
PLACES = [
    ["train", "configs/demo.py", "--run", "{}"],
    ["train", "configs/demo.py", "--init", "{}"],
    ["train", "configs/demo.py", "--init-lora", "{}"],
    ["train", "{}"],
    ["vae-train", "configs/demo_vae.py", "--output", "{}"],
    ["vae-train", "configs/demo_vae.py", "--data", "{}"],
    ["prepare", "configs/demo.py", "--prepared", "{}"],
    ["prepare", "configs/demo.py", "--source", "{}"],
    ["describe", "configs/demo.py", "--run", "{}"],
    ["plan", "configs/demo.py", "{}"],
    ["aot", "configs/demo.py", "--topology", "v5p:2x2x1", "--json", "{}"],
    ["aot", "configs/demo.py", "--topology", "v5p:2x2x1", "--html", "{}"],
    ["aot", "configs/demo.py", "--topology", "v5p:2x2x1", "--suggest", "{}"],
    ["doctor", "configs/demo.py", "--run", "{}"],
    ["sources", "{}"],
    ["sources", "configs", "--links", "{}"],
    ["curate", "{}", "out"],
    ["curate", "configs", "{}"],
    ["curate", "configs", "out", "--links", "{}"],
    ["control", "{}", "canny"],
    ["text", "{}", "out"],
    ["text", "configs", "{}"],
    ["calibrate", "{}"],
    ["calibrate", "configs", "--prompts", "{}"],
    ["calibrate", "configs", "--transformer", "{}"],
    ["pairs", "{}", "--prompts", "configs", "--reward", "a:b"],
    ["pairs", "configs", "--prompts", "{}", "--reward", "a:b"],
    ["checkpoint", "list", "{}"],
    ["speed", "{}"],
    ["convert", "{}", "out", "--to", "jax"],
    ["convert", "configs", "{}", "--to", "jax"],
    ["convert", "configs", "out", "--to", "jax", "--lora", "{}"],
    ["serve", "{}"],
    ["serve", "name={}"],
    ["serve", "configs", "--lora", "{}"],
    ["serve", "configs", "--folder", "{}"],
    ["sample", "{}", "--prompt", "a"],
    ["sample", "configs", "--prompt", "a", "--output", "{}"],
    ["sample", "configs", "--prompt", "a", "--image", "{}"],
    ["sample", "configs", "--prompts", "{}"],
    ["sample", "configs", "--prompt", "a", "--lora", "{}"],
]


@pytest.mark.parametrize("words", PLACES, ids=" ".join)
def test_a_url_is_refused_by_every_command_and_leaves_nothing(words, capsys, tmp_path, monkeypatch):
    for name in ("configs", "demos"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert code_of(*(word.format("hf://bucket/a [b]") for word in words)) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "'hf://bucket/a [b]' is no local path, and hf:// is not supported" in error
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "demos"}


def test_an_option_that_is_a_path_has_the_type_of_one():
    """`parse` makes a local path of it. The file of a config is opened by `runs.config.load`."""
    words = {"config", "operator", "topology", "part", "mesh", "stage", "url", "model"}
    words |= {"instructions", "features", "reward", "score", "embed", "profile", "instruction"}
    words |= {"models", "lora", "token", "host", "allow_host"}  # of serve; two are NAME=PATH
    for kind in OPTIONS - CONFIGS:
        if kind.__name__ == "SampleRequest":
            continue  # tests/test_local.py
        hints = typing.get_type_hints(kind)
        texts = {name for name, hint in hints.items() if "str" in str(hint)}
        assert texts <= words, f"{kind.__module__}: {texts - words}"


def classes_below(kind) -> set:
    """A dataclass, and those that its fields are made of."""
    found = set()
    for hint in typing.get_type_hints(kind).values():
        todo = [hint]
        while todo:
            one = todo.pop()
            todo += typing.get_args(one)
            if dataclasses.is_dataclass(one) and one not in (*found, Remote):  # a URL is a word
                found |= classes_below(one)
    return {kind} | found


def sentences(kind) -> dict[str, str]:
    """The string below each field of a class, where tyro reads the help of an option from."""
    found = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        for line, below in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                found[line.target.id] = str(below.value.value) if is_text else ""
    return found


OPTIONS = {kind for verb in VERBS for kind in classes_below(module_of(verb).Options)}
CONFIGS = classes_below(TrainConfig) | classes_below(VAETrainConfig)


@pytest.mark.parametrize(
    "kind",
    sorted(OPTIONS | CONFIGS, key=lambda k: (k.__module__, k.__name__)),
    ids=lambda k: k.__name__,
)
def test_every_option_and_every_field_of_a_config_has_a_sentence(kind):
    found = sentences(kind)
    assert set(found) == {field.name for field in dataclasses.fields(kind)}
    wrong = [name for name, text in found.items() if not re.search(r"\w\S* .*\.$", text, re.S)]
    assert not wrong, f"{kind.__name__}: {', '.join(wrong)} say nothing"


def texts():
    folders = [ROOT / "easyanimate_jax", ROOT / "docs", ROOT / "configs", ROOT / "demos"]
    paths = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".md", ".sh", ".yaml")]
    return {p: p.read_text("utf-8") for p in (*paths, ROOT / "README.md", ROOT / "Makefile")}


def test_what_is_said_of_commands_names_verbs_that_exist():
    for path, text in texts().items():
        named = re.findall(r"-m easyanimate_jax ([a-z][\w-]*)", text)
        assert set(named) <= set(VERBS), path
        modules = set(re.findall(r"-m (easyanimate_jax\.[\w.]*)", text))
        assert modules <= WORKERS, path
        assert "--describe" not in text, path


def test_the_console_script_is_the_command():
    (place,) = re.findall(r"\"easyanimate-jax=([\w.]+:\w+)\"", (ROOT / "setup.py").read_text())
    module, name = place.split(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_the_scripts_at_the_top_are_two_verbs(verb):
    words = [sys.executable, f"{verb}.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"easyanimate_jax {verb} [-h]" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/demo.py", "--run"],
        ["train", "configs/demo_vae.py", "--output"],
        ["vae-train", "configs/demo_vae.py", "--output"],
        ["prepare", "configs/demo.py", "--prepared"],
        ["text", ".", "OUT"],
        ["curate", ".", "OUT"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_cannot_be_a_folder_is_refused_before_anything_is_read(words, tmp_path, capsys):
    """None of the data and models of these configs exists here."""
    *words, name = words
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    part = {"--run": "checkpoints", "--prepared": "image", "--output": "checkpoints"}.get(name)
    places = {file: file, file / "below" / "it": file, link: link}
    if part:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / part).write_text("mine")
        places[tmp_path / "folder"] = tmp_path / "folder" / part
    for place, wrong in places.items():
        assert code_of(*words, *([name] if name[0] == "-" else []), str(place)) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"error: {name} {place}") and error.count("\n") == 1
        what = "a link to nothing" if wrong == link else "a file"
        assert f"{wrong} is {what}; name a folder" in error
    assert file.read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 5, "a/b: No space left on dev"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "Disk quota exceeded; make room"),
        (OSError(errno.EIO, "Input/output error", "a"), 5, "a: Input/output error; make room"),
        (OSError(errno.EROFS, "Read-only file system", "a"), 2, "Read-only file system: 'a'"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 2, "Permission denied: 'a'"),
        (OSError(errno.EMFILE, "a: raise `ulimit -n`"), 2, "a: raise `ulimit -n`\n"),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            2,
            "open files: 'a'; raise the limit (`",
        ),
    ],
)
def test_a_disk_that_takes_no_more_and_a_wrong_place_are_one_line(error, code, message, capsys):
    assert parse.run(partial(_raise, error)) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and message in line


def test_a_store_that_does_not_answer_is_one_line_and_no_wrong_input(capsys):
    error = TimeoutError(errno.ETIMEDOUT, "the store did not answer", "gs://b/x")
    assert parse.run(partial(_raise, error)) == 5
    assert capsys.readouterr().err == "error: gs://b/x: the store did not answer\n"


def test_an_error_of_a_network_is_no_wrong_input():
    """A scheduler starts the run again, which it does not after exit code 2."""
    for number in (errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET):
        with pytest.raises(OSError):
            parse.run(partial(_raise, OSError(number, "of the network")))


def _raise(error):
    raise error
