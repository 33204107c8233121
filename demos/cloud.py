"""The whole way with every path in an object store: clips, sets, models, run, checkpoints, samples.

    python -m demos.cloud [--kills 30] [--stores gs s3]

The clips, the VAE and the text encoders are made once, on the disk. Then the same config is
prepared, trained and sampled three times: from the disk, from `gs://` and from `s3://`. The stores
are servers in memory on loopback. The commands are killed at random moments and given again. The
runs in the stores must end in the bits of the run on the disk: all losses, the weights, and the
frames of a sample. It says what no local server can show: nothing of this reached a real cloud.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from easyanimate_jax.data import media
from easyanimate_jax.storage import stores
from easyanimate_jax.weights.identity import weights_print

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "demo_cloud"
CONFIG = "configs/demo_cloud.py"
PYTHON = (sys.executable,)
VERB = (*PYTHON, "-m", "easyanimate_jax")
FIELDS = {"source": "data", "prepared": "latents", "vae": "vae", "text": "text", "run": "train"}
KEYS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo", "AWS_REGION": "us-east-1"}
S3 = """
import sys, time, boto3
from moto.server import ThreadedMotoServer
ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False).start()
boto3.client("s3", endpoint_url=f"http://127.0.0.1:{sys.argv[1]}").create_bucket(Bucket="demo")
print("ready", flush=True)
time.sleep(10**6)
"""


@dataclass
class Options:
    """The arguments."""

    kills: int = 30
    """How often commands are killed, over all steps and stores."""
    stores: tuple[str, ...] = ("gs", "s3")
    """The schemes to try."""
    seed: int = 0
    """Of the moments of the kills."""


class Commands:
    """Runs commands; kills some of them at random moments, and gives them again."""

    def __init__(self, kills: int, seed: int):
        self.left, self.random, self.made = kills, random.Random(seed), []
        self.seconds: dict[str, float] = {}  # of a step that was not killed

    def __call__(self, step: str, *words: str, where: str, killed: int = 0) -> None:
        """Run a command until it ends by itself, after it was killed `killed` times."""
        for _ in range(killed):
            self._kill(step, words, where)
        began = time.perf_counter()
        self._wait(step, self._start(words, where), where)
        if not killed:
            self.seconds[step] = time.perf_counter() - began

    def _start(self, words, where: str) -> subprocess.Popen:
        log = open(FOLDER / f"{where}.log", "a")  # noqa: SIM115 the process writes to it
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)

    def _kill(self, step: str, words, where: str) -> None:
        process = self._start(words, where)
        moment = self.random.uniform(0, self.seconds[step])
        try:
            self._wait(step, process, where, moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.made.append({"store": where, "step": step, "after": round(moment, 2)})
            print(f"{where}: {step} killed after {moment:.1f} s", flush=True)

    def _wait(self, step: str, process, where: str, moment: float | None = None) -> None:
        if code := process.wait(moment):
            raise SystemExit(f"{where}: {step} ended with {code}; see {FOLDER / where}.log")


def main(options: Options) -> None:
    """Run the demo and write its result. Exits with an error at the first difference."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    commands = Commands(options.kills, options.seed)
    local = str(FOLDER / "local")
    _make_inputs(local)
    for name in ("latents", "train", "samples"):
        shutil.rmtree(f"{local}/{name}", ignore_errors=True)
    _whole_way(commands, local, "local", 0)
    rows = [_row("local", local)]
    for number, scheme in enumerate(options.stores):
        left = options.kills - len(commands.made)
        with _server(scheme):
            url = f"{scheme}://demo/way"
            for name in ("data", "vae", "text"):
                _upload(Path(local, name), stores.place(url) / name)
            _whole_way(commands, url, scheme, left // (len(options.stores) - number))
            rows.append(_row(scheme, url))
            _compare(local, url)
    result = {"kills": commands.made, "ends": rows}
    (FOLDER / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{len(commands.made)} kills; all runs ended in the same bits: {rows[0]['weights']}")


def _make_inputs(local: str) -> None:
    """Make clips, VAE and text encoders, unless they are there."""
    if Path(local, "text", "text.json").is_file():
        return
    sizes = ("--images", "12", "--clips", "36", "--large-clips", "2")
    steps = ("--stages.0.steps", "20", "--stages.1.steps", "2")
    places = ("--data", f"{local}/data", "--output", f"{local}/vae")
    for words in (
        (*PYTHON, "-m", "demos.world", f"{local}/data", *sizes),
        (*PYTHON, "train.py", "configs/demo_vae.py", *places, *steps),
        (*VERB, "text", f"{local}/data/texts", f"{local}/text", "--steps", "20"),
    ):
        subprocess.run(words, cwd=ROOT, check=True)


def _whole_way(commands: Commands, root: str, where: str, kills: int) -> None:
    """Prepare, train and sample below a root; share the kills between these steps."""
    paths = [word for name, below in FIELDS.items() for word in (f"--{name}", f"{root}/{below}")]
    share = {"prepare": kills * 3 // 10, "sample": kills // 10}
    share["train"] = kills - sum(share.values())
    sample = [f"{root}/train", "--prompt", "a red circle", "--output", f"{root}/samples"]
    for step, words in (
        ("prepare", (*VERB, "prepare", CONFIG, *paths)),
        ("train", (*PYTHON, "train.py", CONFIG, *paths)),
        ("sample", (*PYTHON, "sample.py", *sample, "--seed", "3", "--steps", "3")),
    ):
        commands(step, *words, where=where, killed=share[step])


def _row(where: str, root: str) -> dict:
    return {"where": where, "weights": weights_print(f"{root}/train")}


def _compare(local: str, url: str) -> None:
    """Exit with an error unless a store holds what the disk holds."""
    there = stores.place(url)
    losses = [
        {r["step"]: r["loss"] for r in map(json.loads, text.splitlines())}
        for text in ((p / "train" / "metrics.jsonl").read_text() for p in (Path(local), there))
    ]
    copy, name = FOLDER / "sample.mp4", "samples/00000001.mp4"
    stores.download(there / name, copy)
    frames = [media.read_clip(path, 0, 9, 1) for path in (Path(local, name), copy)]
    same = {
        "losses": losses[0] == losses[1],
        "weights": weights_print(f"{local}/train") == weights_print(f"{url}/train"),
        "frames": bool((frames[0] == frames[1]).all()),
    }
    if not all(same.values()):
        raise SystemExit(f"{url} differs from {local}: {same}")


def _upload(folder: Path, target) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            stores.upload(path, target / path.relative_to(folder))


@contextmanager
def _server(scheme: str):
    """Serve a store, and set the variables by which all commands find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        words, variables = ("tests/fake_gcs.py", str(port)), ("STORAGE_EMULATOR_HOST",)
        found = dict.fromkeys((*variables, "TENSORSTORE_GCS_HTTP_URL"), url)
    else:
        words, found = ("-c", S3, str(port)), KEYS | {"AWS_ENDPOINT_URL": url}
    os.environ |= found
    server = subprocess.Popen([*PYTHON, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        time.sleep(1.0)  # the bucket
        yield
    finally:
        server.kill()
        for name in found:
            del os.environ[name]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
