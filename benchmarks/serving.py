"""Measure the server against `sample.py` on the same prompts, in one run.

Clients ask the server for one video each and look at it as often as OpenAI's client does, which
follows the server's header. `sample.py --prompts` makes the same videos with the same batch before.
Both have made one batch first, so that nothing compiles in the time that is measured. Then a
thousand tiny pictures show whether the memory of the server and of its engine stays the same.
Writes benchmarks/results/serving.md.

    python benchmarks/serving.py RUN [--clients 64] [--batch 4] [--steps 10] [--jobs 1000]
"""

import argparse
import concurrent.futures
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from setting import setting

RESULT = Path(__file__).parent / "results" / "serving.md"
SMALL = {"num_frames": 1, "size": "64x64", "steps": 1, "guidance": 1}


def main() -> None:
    """Measure both, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", help="folder of a finished demo")
    for name, value in (("--clients", 64), ("--batch", 4), ("--steps", 10), ("--jobs", 1000)):
        p.add_argument(name, type=int, default=value)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        alone = by_command(a, folder)
        server = Server(a, folder)
        try:
            seconds, looks = server.many(a)
            memory = server.memory(a)
        finally:
            server.process.terminate()
            server.process.wait()
    RESULT.write_text(table(a, alone, seconds, looks, memory))
    print(RESULT.read_text())


def prompt(number: int) -> str:
    """Return the prompt of a client."""
    colour = ("red", "green", "blue", "yellow")[number % 4]
    return f"a {colour} circle moves left slowly on a white background"


def by_command(a, folder: Path) -> float:
    """Return the seconds in which `sample.py` makes the videos, after a first batch."""
    lines = [{"prompt": prompt(n), "seed": n} for n in range(a.batch + a.clients)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "sample.py", a.run, "--prompts", str(folder / "prompts.jsonl")]
    command += ["--batch", str(a.batch), "--steps", str(a.steps), "--output", str(folder / "out")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = sorted(path.stat().st_mtime for path in (folder / "out").glob("*.mp4"))
    return ends[-1] - ends[a.batch - 1]


class Server:
    """A server as a process, without a token."""

    def __init__(self, a, folder: Path):
        command = [sys.executable, "-m", "easyanimate_jax", "serve", a.run, "--port", "0"]
        command += ["--no-token", "--folder", str(folder / "served"), "--batch", str(a.batch)]
        command += ["--most-jobs", "100000"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1]
        self.queue, self.looks = folder / "served" / "jobs.sqlite", []

    def ask(self, path: str, body: dict | None = None) -> tuple[dict, float]:
        """Return the answer to a request, and the seconds until the next look at it.

        A body makes it a POST.
        """
        data = body and json.dumps(body).encode()
        asked = urllib.request.Request(
            f"{self.url}{path}", data, headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            wait = int(answer.headers.get("openai-poll-after-ms", 1000)) / 1e3
            return json.load(answer), wait

    def make(self, body: dict) -> dict:
        """Queue a video, look at it until it has ended, and return its job."""
        job, wait = self.ask("/v1/videos", body)
        while job["status"] in ("queued", "in_progress"):
            time.sleep(wait)
            began = time.perf_counter()
            job, wait = self.ask(f"/v1/videos/{job['id']}")
            self.looks.append(time.perf_counter() - began)
        assert job["status"] == "completed", job
        return job

    def many(self, a) -> tuple[float, list[float]]:
        """Return the seconds for all clients' videos, and those of each look at a status."""
        with concurrent.futures.ThreadPoolExecutor(a.clients) as pool:
            first = [{"prompt": prompt(n), "seed": n, "steps": a.steps} for n in range(a.batch)]
            list(pool.map(self.make, first))
            self.looks.clear()
            began = time.time()
            bodies = [
                {"prompt": prompt(n), "seed": 100 + n, "steps": a.steps} for n in range(a.clients)
            ]
            list(pool.map(self.make, bodies))
            with sqlite3.connect(self.queue) as queue:  # a client may notice the end later
                (ended,) = queue.execute("SELECT MAX(ended) FROM jobs").fetchone()
            return ended - began, list(self.looks)

    def memory(self, a) -> list[tuple[int, float, float]]:
        """Return (pictures made, GB of the server, GB of its engine) at five points."""
        found, made = [], 0
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            for goal in np.linspace(a.jobs / 5, a.jobs, 5).astype(int):
                bodies = [SMALL | {"prompt": "x", "seed": n} for n in range(made, goal)]
                list(pool.map(self.make, bodies))
                made = int(goal)
                engine = max(engine_of(self.process.pid), key=resident, default=0)
                found.append((made, resident(self.process.pid), resident(engine)))
        return found


def engine_of(pid: int) -> list[int]:
    """Return the children of a process, of all its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def resident(pid: int) -> float:
    """Return the memory of a process in GB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def table(a, alone: float, seconds: float, looks: list[float], memory) -> str:
    """Return the result as Markdown."""
    rates = [60 * a.clients / each for each in (alone, seconds)]
    p50, p99 = np.percentile(looks, [50, 99]) * 1e3
    rows = "\n".join(f"| {made} | {server:.2f} | {engine:.2f} |" for made, server, engine in memory)
    return f"""# The server

{setting()}

{a.clients} clients with one video each, {a.steps} steps, batches of {a.batch}.

| | videos a minute | share |
|---|---|---|
| `sample.py --prompts` | {rates[0]:.1f} | 1 |
| server | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} |

A look at the status while the engine denoises, of {len(looks)}: median {p50:.1f} ms,
99 % below {p99:.1f} ms.

Memory in GB after pictures of one step:

| pictures | server | engine |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
