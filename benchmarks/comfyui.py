"""Execute the workflows of integrations/comfyui in ComfyUI itself, through a server.

Starts a server on a finished demo, and ComfyUI on the CPU with nothing but this pack. Each workflow
is queued by ComfyUI's own interface. Those that the model cannot serve must fail with one line; one
is interrupted, and its job must be cancelled. Writes benchmarks/results/comfyui.md.

    python benchmarks/comfyui.py COMFYUI RUN [--python PYTHON_OF_COMFYUI]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax.data import media

RESULT = Path(__file__).parent / "results" / "comfyui.md"
PACK = Path(__file__).parent.parent / "integrations" / "comfyui"
NAME = "easyanimate_jax_nodes"
SMALL = {"steps": 4, "prompt": "a red circle moves left slowly on a white background"}


def main() -> None:
    """Run all workflows, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("comfyui", type=Path, help="folder of ComfyUI's source")
    p.add_argument("run", help="folder of a finished demo")
    p.add_argument("--python", default=sys.executable, help="the Python that runs ComfyUI")
    p.add_argument("--port", type=int, default=8188)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        link(a.comfyui)
        files(a, a.comfyui / "input")
        server, comfy = start_server(a, folder), None
        try:
            comfy = start_comfyui(a, folder)
            paths = sorted((PACK / "api_workflows").glob("*.json"))
            rows = [workflow(a, server, path) for path in paths]
            rows.append(interrupted(a, server))
        finally:
            for process in filter(None, (comfy, server[0])):
                process.terminate()
                process.wait()
    RESULT.write_text(table(rows))
    print(RESULT.read_text())


def link(comfyui: Path) -> None:
    """Put the pack where ComfyUI looks for it."""
    place = comfyui / "custom_nodes" / NAME
    if not place.exists():
        place.symlink_to(PACK.resolve())


def files(a, folder: Path) -> None:
    """Write the film, the picture and the mask that the workflows read."""
    clips = sorted(Path(a.run).parent.joinpath("data").rglob("*.mp4"))
    long = next(clip for clip in clips if media.probe(clip).num_frames >= 9)
    shutil.copy(long, folder / "film.mp4")
    film = media.probe(long)
    media.write_png(folder / "start.png", media.read_at(long, 0, 1)[0])
    hole = np.zeros((film.height, film.width, 3), np.uint8)
    hole[:, film.width // 2 :] = 255
    media.write_png(folder / "mask.png", hole)


def start_server(a, folder: Path):
    """Return (process, address) of a server without a token."""
    command = [sys.executable, "-m", "easyanimate_jax", "serve", a.run, "--port", "0"]
    command += ["--no-token", "--most-steps", "1000", "--folder", str(folder / "served")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()[-1]


def start_comfyui(a, folder: Path) -> subprocess.Popen:
    """Return ComfyUI as a process that answers."""
    command = [a.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(a.port)]
    command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", NAME]
    command += ["--disable-api-nodes", "--output-directory", str(folder / "comfyui")]
    log = open(folder / "comfyui.txt", "w")  # noqa: SIM115 the process writes to it
    process = subprocess.Popen(command, cwd=a.comfyui, stdout=log, stderr=log)
    for _ in range(300):
        try:
            ask(a, "/system_stats")
            return process
        except OSError:
            if process.poll() is not None:
                sys.exit((folder / "comfyui.txt").read_text())
            time.sleep(1)
    raise TimeoutError("ComfyUI does not answer")


def ask(a, path: str, body: dict | None = None) -> dict:
    """Return ComfyUI's answer."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{a.port}{path}", data, timeout=60) as answer:
        return json.loads(answer.read() or b"{}")


def queued(a, server, nodes: dict) -> str:
    """Queue a workflow on the server of this test; return ComfyUI's id of it."""
    for node in nodes.values():
        if node["class_type"] == "EasyAnimateJAXServer":
            node["inputs"]["url"] = server[1]
        if "prompt" in node["inputs"]:
            node["inputs"] |= SMALL
    return ask(a, "/prompt", {"prompt": nodes})["prompt_id"]


def ended(a, id: str) -> dict:
    """Return what ComfyUI's history tells of an ended workflow."""
    for _ in range(600):
        history = ask(a, f"/history/{id}")
        if id in history:
            return history[id]
        time.sleep(0.5)
    raise TimeoutError("the workflow does not end")


def workflow(a, server, path: Path) -> tuple[str, str, float]:
    """Return (name, how it ended, seconds) of a workflow."""
    began = time.monotonic()
    told = ended(a, queued(a, server, json.loads(path.read_text())))
    seconds = time.monotonic() - began
    if told["status"]["status_str"] == "success":
        (output,) = [one for node in told["outputs"].values() for one in node["images"]]
        return path.stem, f"success: {output['filename']}", seconds
    failed = next(m[1] for m in told["status"]["messages"] if m[0] == "execution_error")
    message = failed["exception_message"].strip()
    assert "\n" not in message, message
    return path.stem, f"refused: {message}", seconds


def interrupted(a, server) -> tuple[str, str, float]:
    """Return how a workflow ended that was interrupted, and its job."""
    nodes = json.loads((PACK / "api_workflows" / "text_to_video.json").read_text())
    SMALL["steps"] = 1000
    began = time.monotonic()
    id = queued(a, server, nodes)
    time.sleep(5)
    ask(a, "/interrupt", {})
    told = ended(a, id)
    seconds = time.monotonic() - began
    time.sleep(1)
    with urllib.request.urlopen(f"{server[1]}/v1/videos?limit=1") as answer:
        job = json.load(answer)["data"][0]
    kinds = [message[0] for message in told["status"]["messages"]]
    assert "execution_interrupted" in kinds and job["error"]["code"] == "cancelled", (kinds, job)
    return "text_to_video, interrupted", "interrupted, and its job cancelled", seconds


def table(rows) -> str:
    """Return the result as Markdown."""
    lines = "\n".join(f"| {name} | {how} | {seconds:.1f} |" for name, how, seconds in rows)
    return f"""# The nodes in ComfyUI

{setting()}

| workflow | ended | seconds |
|---|---|---|
{lines}
"""


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
