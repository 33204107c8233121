"""Preparation on a Ray cluster: the same bytes as in one process, whatever dies meanwhile.

Ray listens on all addresses of a machine, so the driver runs in a network namespace that has only
the loopback address.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_prepare import PROMPTS, FakeText, tiny_vae

from easyanimate_jax.commands import prepare as command
from easyanimate_jax.data import media
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet, Records
from easyanimate_jax.prepare import cluster, engine
from easyanimate_jax.prepare.curate import Rules, curate
from easyanimate_jax.prepare.prepare import make_sets, plan_sets
from easyanimate_jax.prepare.shots import Splitting

LATENTS = LatentSet("small", Budget(12, (12,), (32,), frames=9), condition_draws=1)
WEIGHTS = {"vae": "v", "text": "t"}
INSIDE = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
ROOT = Path(__file__).parent.parent
TASKS = "ray::decode_jobs", "ray::Maker.pixels", "ray::Maker.texts"  # Ray names its processes so
# Python runs it when it starts. The decoder's own process, and no other, then ends by a signal at
# one film, as with a fault of FFmpeg.
CRASH = """
import os, signal, sys
if "easyanimate_jax.data.decode" in sys.orig_argv:
    from easyanimate_jax.data import media
    read = media.read_at
    def read_at(path, *rest):
        if path.name == "film137.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(path, *rest)
    media.read_at = read_at
"""


class Strict(FakeText):
    """Has no finite states for one caption."""

    def encode(self, prompts):
        states = super().encode(prompts)
        return (states[0] + np.inf, states[1]) if "film 2" in prompts else states


def load():
    return tiny_vae(), FakeText()


def load_strict():
    return tiny_vae(), Strict()


def load_never():
    time.sleep(600)


def drive(out: str, loader: str) -> int:
    """Return the exit code of a driver, or of a process without an engine."""
    models = globals()[loader]
    if out.endswith("alone"):
        whole = make_sets(out, [LATENTS], *models(), PROMPTS, 0, weights=WEIGHTS)
    else:
        whole = engine.make_sets(out, [LATENTS], models, PROMPTS, 0, weights=WEIGHTS)
    return 0 if whole else 1


def films(folder: Path, count: int) -> Path:
    """12 films under many names, each with other bytes behind its end."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(min(count, 12)):
        frames = np.repeat(rng.integers(20, 255, (9, 5, 5, 3), np.uint8), 8, 1).repeat(8, 2)
        media.write_video(folder / f"film{number}.mp4", frames)
    for number in range(count):
        content = (folder / f"film{number % 12}.mp4").read_bytes()
        if number >= 12:
            more = number.to_bytes(4, "big")
            more = (8 + len(more)).to_bytes(4, "big") + b"free" + more
            (folder / f"film{number}.mp4").write_bytes(content + more)
        (folder / f"film{number}.txt").write_text(f"film {number}")
    return folder


class Drivers:
    """Starts drivers, and ends what Ray leaves behind them."""

    def __init__(self, folder: Path):
        if subprocess.run([*INSIDE, "true"], capture_output=True).returncode:
            pytest.skip("this machine makes no network namespace, where Ray would be alone")
        self.log = folder / "log"
        self.temporary = tempfile.mkdtemp(prefix="r")  # short: names of sockets have a limit
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(CRASH)
        paths = folder / "hook", ROOT, ROOT / "tests"
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self.environment |= {"RAY_TMPDIR": self.temporary, "HOME": self.temporary}
        self.environment.pop("RAY_ADDRESS", None)

    def start(self, out: Path, loader: str = "load") -> subprocess.Popen:
        code = f"import sys, test_engine; sys.exit(test_engine.drive({str(out)!r}, {loader!r}))"
        return self.run(["-c", code])

    def run(self, words: list[str]) -> subprocess.Popen:
        words = [*INSIDE, sys.executable, *words]
        with open(self.log, "w") as log:
            return subprocess.Popen(words, env=self.environment, stderr=log)

    def finish(self, out: Path, loader: str = "load") -> tuple[int, str]:
        """The exit code of a driver, and what it said."""
        with self.start(out, loader) as driver:
            code = driver.wait()
        return code, self.log.read_text()

    def workers(self, driver: subprocess.Popen, tasks=TASKS) -> dict[int, str]:
        """The processes of tasks below a driver, and what they do."""
        return {
            pid: words
            for pid, words in processes().items()
            if words.startswith(tasks) and driver.pid in ancestors(pid)
        }

    def close(self) -> None:
        for pid, words in processes().items():
            if self.temporary in words:
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def drivers(tmp_path):
    made = Drivers(tmp_path)
    yield made
    made.close()


def processes() -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
    return found


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def made(out: Path) -> dict[str, bytes]:
    """The files that a preparation makes; the hashes of the source hold its own times."""
    found = (path for path in out.rglob("*") if path.is_file() and path.name != "contents.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_whatever_dies_every_clip_is_made_once_and_with_the_same_bytes(tmp_path, drivers):
    """300 films, one of which kills its decoder; ten processes and the driver are killed."""
    source, out, alone = films(tmp_path / "source", 300), tmp_path / "out", tmp_path / "alone"
    for folder in (out, alone):
        plan_sets(source, folder, [LATENTS], 0, weights=WEIGHTS, shard_size=10)
    assert drivers.finish(alone)[0] == 0

    chance, killed = random.Random(0), []
    driver = drivers.start(out)
    while driver.poll() is None:
        time.sleep(0.3)
        shards = len(list((out / "small" / "shards").rglob("*.shard")))
        workers = drivers.workers(driver)
        if len(killed) == 5:
            driver.kill()
            driver.wait()
            killed.append("the driver")
            driver = drivers.start(out)
        elif len(killed) < 11 and workers and shards >= 2 * len(killed):
            kind = chance.choice(sorted({words.split()[0] for words in workers.values()}))
            pid = chance.choice([pid for pid, words in workers.items() if words.startswith(kind)])
            os.kill(pid, signal.SIGKILL)
            killed.append(kind)
    assert driver.returncode == 0, drivers.log.read_text()
    assert len(killed) == 11 and {*TASKS[:2]} <= {*killed}, killed

    files, expected = made(out), made(alone)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    clips = [f"film{number}.mp4" for number in range(300) if number != 137]
    assert sorted(Records(out / "small").index["clip"]) == sorted(clips)
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["file"] == "film137.mp4" and "the decoder died of it (SIGSEGV)" in line["reason"]


@pytest.mark.slow
def test_a_shard_that_always_fails_is_named_and_the_others_are_made(tmp_path, drivers):
    source, out = films(tmp_path / "source", 4), tmp_path / "out"
    plan_sets(source, out, [LATENTS], 0, weights=WEIGHTS, shard_size=2)
    code, told = drivers.finish(out, "load_strict")
    assert code == 1
    assert "are not finite in float16" in told and ".shard is not made: ValueError: " in told
    assert len(list((out / "small" / "shards").rglob("*.shard"))) == 2
    assert len(list((out / "texts" / "shards").rglob("*.shard"))) == 1
    code, told = drivers.finish(out)
    assert code == 0, told
    assert len(Records(out / "small")) == 4


@pytest.mark.slow
def test_a_driver_that_has_lost_its_ray_stops(tmp_path, drivers):
    source, out = films(tmp_path / "source", 4), tmp_path / "out"
    plan_sets(source, out, [LATENTS], 0, weights=WEIGHTS, shard_size=2)
    driver = drivers.start(out, "load_never")
    while not (found := drivers.workers(driver, ("ray::Maker.start",))):
        assert driver.poll() is None, drivers.log.read_text()
        time.sleep(0.3)
    (raylet,) = (pid for pid in ancestors(*found) if "raylet" in processes()[pid].split()[0])
    os.kill(raylet, signal.SIGKILL)
    assert driver.wait(120) == 1
    assert "ConnectionError: Ray has ended on this host" in drivers.log.read_text()


@pytest.mark.slow
def test_films_are_cut_on_a_cluster_as_in_one_process(tmp_path, drivers):
    """Ray's own processes are killed meanwhile."""
    source, out, alone = films(tmp_path / "source", 60), tmp_path / "out", tmp_path / "alone"
    rules = Rules(Splitting(min_seconds=0.5), min_pixels=0)
    assert curate(source, alone, rules)
    words = [str(source), str(out), "--min-pixels", "0", "--min-seconds", "0.5"]
    driver = drivers.run(["-m", "easyanimate_jax", "curate", *words, "--engine", "ray"])
    killed = 0
    while driver.poll() is None:
        time.sleep(0.3)
        if killed < 2 and (workers := drivers.workers(driver, ("ray::finish_films",))):
            os.kill(min(workers), signal.SIGKILL)
            killed += 1
    assert driver.returncode == 0 and killed == 2, drivers.log.read_text()
    for name in ("clips.parquet", "funnel.txt"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
    kept = [(one / "films").rglob("*.jsonl") for one in (out, alone)]
    names = [
        sorted({json.loads(line)["film"] for path in some for line in path.open()}) for some in kept
    ]
    assert names[0] == names[1] and len(names[0]) == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray", "--part", "1/2"], "--part 1/2 is for processes without an engine"),
        (["--devices", "TPU"], "--devices TPU chooses hosts of a cluster; add --engine ray"),
        (["--engine", "spark"], "--engine"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(words, message, capsys):
    assert command.main(["configs/demo.py", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_ray_its_installation_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert command.main(["configs/demo.py", "--engine", "ray"]) == 2
    error = "error: --engine ray: ray is not installed; run pip install 'easyanimate_jax[ray]'\n"
    assert capsys.readouterr().err == error


def test_a_host_that_does_not_see_the_folders_is_named(tmp_path):
    engine.check_seen((tmp_path,))
    with pytest.raises(cluster.Unusable, match=r"does not see .*nowhere: keep source and output"):
        engine.check_seen((tmp_path, tmp_path / "nowhere"))


@contextlib.contextmanager
def listening(answer: bytes | None):
    """A server that sends `answer` to whoever connects and keeps the line open; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def serve() -> None:
            with contextlib.suppress(OSError):  # it is closed
                while True:
                    line = stack.enter_context(server.accept()[0])
                    if answer is not None:
                        line.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def refused(capsys) -> str:
    began = time.monotonic()
    assert command.main(["configs/demo.py", "--engine", "ray"]) == 2
    assert time.monotonic() - began < 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "write HOST:6379 or ray://HOST:10001 of a running" in error
    return error


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://localhost:{}/names"])
def test_an_address_at_which_nothing_listens_is_refused_at_once(form, monkeypatch, capsys):
    with listening(None) as port:
        pass
    monkeypatch.setenv("RAY_ADDRESS", form.format(port))
    error = refused(capsys)
    assert f"RAY_ADDRESS is {form.format(port)!r}" in error and "Connection refused" in error


@pytest.mark.parametrize(
    "address", ["cluster", "http://127.0.0.1:8265", "host:", "127.0.0.1:99999"]
)
def test_what_is_no_address_of_a_cluster_is_refused(address, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS is {address!r}, and no cluster answers there" in refused(capsys)


def test_servers_that_are_not_ray_are_refused(monkeypatch, capsys):
    """One speaks another protocol, and one says nothing."""
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    for answer, told in ((b"HTTP/1.1 400 Bad Request\r\n", "is not Ray"), (None, "timed out")):
        with listening(answer) as port:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            assert told in refused(capsys)


def test_a_name_that_takes_minutes_to_resolve_is_not_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "ANSWER", 0.2)
    monkeypatch.setattr(cluster.socket, "create_connection", lambda *_: time.sleep(60))
    monkeypatch.setenv("RAY_ADDRESS", "cluster:6379")
    assert "cluster:6379 did not answer" in refused(capsys)


def test_auto_without_a_cluster_or_with_one_that_has_ended_is_refused(
    tmp_path, monkeypatch, capsys
):
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set())
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "RAY_ADDRESS is 'auto', and no cluster answers there (this host runs" in refused(capsys)
    with listening(None) as port:
        pass
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    assert f":{port}: Connection refused" in refused(capsys)


def test_an_address_at_which_grpc_answers_is_taken(monkeypatch):
    with listening(b"\0\0\0\4\0\0\0\0\0") as port:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "local", "", "other://x"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            cluster.check_ray()
