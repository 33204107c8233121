"""The image and the files that start it: they name what exists, and agree with one another.

docs/results.md tells what was really built.
"""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from test_serve_api import api as api  # fixtures: a server's state, models without weights, files
from test_serve_api import client as client
from test_serve_api import files as files
from test_serve_api import models as models

from easyanimate_jax.__main__ import VERBS
from easyanimate_jax.commands import parse, serve

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "docs" / "launch"
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
PARTS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]
EXTRAS = {"cpu": {"serve"}, "cuda": {"serve", "cuda"}, "tpu": {"serve", "tpu"}}


def last(word: str) -> str:
    """What follows the last instruction `word` of the Dockerfile."""
    return [rest for first, rest in PARTS if first == word][-1]


def command(word: str) -> list[str]:
    """The words of CMD, of ENTRYPOINT, or of the command of HEALTHCHECK."""
    return json.loads(last(word)[last(word).index("[") :])


def copied() -> list[str]:
    """The files and folders of the repository that the Dockerfile copies."""
    return [name for first, rest in PARTS if first == "COPY" for name in rest.split()[:-1]]


def served(words: list[str]) -> serve.Options:
    """The options of a container's command, as the verb `serve` reads and checks them."""
    assert words[0] == "serve"
    own = parse.options(serve.Options, words[1:], "serve", serve.HELP)
    serve.check(own)
    return own


def extras() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (found,) = [
        word.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "extras_require"
    ]
    return {key.value for key in found.keys}


def test_the_image_gets_the_files_that_it_copies_and_no_others():
    first, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    assert first == "*"
    assert [line[1:] for line in rest if line.startswith("!")] == copied()
    assert [line for line in rest if not line.startswith("!")] == ["**/__pycache__"]
    assert all((ROOT / name).exists() for name in copied())
    needed = {"setup.py", "pyproject.toml", "easyanimate_jax", "configs", "requirements.lock"}
    assert needed <= set(copied())


def test_the_image_starts_our_server():
    assert command("ENTRYPOINT") == ["python", "-m", "easyanimate_jax"]
    own = served(command("CMD"))
    kept = last("VOLUME").split()
    assert str(own.folder) in kept and str(own.port) == last("EXPOSE")
    (environment,) = [rest for first, rest in PARTS if first == "ENV" and "HOME=" in rest]
    for name in ("HOME", "JAX_COMPILATION_CACHE_DIR"):
        place = re.search(rf"\b{name}=(\S+)", environment)[1]
        assert any(Path(place).is_relative_to(one) for one in kept)
    for word in ("mkdir -p", "chown 1000:1000", "chmod 1777"):
        (made,) = re.findall(rf"{word} ([^&]+)", last("RUN"))
        assert {*kept, "runs"} == set(made.split())
    assert last("USER") == "1000"


def test_the_image_asks_the_server_how_it_is(client, api):
    program = command("HEALTHCHECK")[-1]
    (address,) = re.findall(r"http://127\.0\.0\.1:(\d+/\w+)", program)
    port, path = address.split("/")
    assert int(port) == served(command("CMD")).port
    assert client.get(f"/{path}", headers={"authorization": ""}).status_code == 503
    api.dispatcher.ready.set()
    assert client.get(f"/{path}", headers={"authorization": ""}).status_code == 200


@pytest.mark.parametrize("device", EXTRAS)
def test_the_image_installs_extras_that_exist(device):
    (line,) = re.findall(r"extras=.*?(?= && python3)", last("RUN"))
    script = f"DEVICE={device}; {line}; echo $extras"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.strip().split(",")) == EXTRAS[device] <= extras()


def test_the_image_installs_the_locked_releases():
    """pip takes the lock file as constraints once its hashes are removed."""
    (line,) = re.findall(r"sed .*?(?= >)", last("RUN"))
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("#")]
    found = [Requirement(line) for line in lines]
    assert {"jax", "flax", "fastapi"} <= {one.name for one in found}
    assert all([part.operator for part in one.specifier] == ["=="] for one in found)


def test_the_compose_file_starts_this_image():
    compose = yaml.safe_load((LAUNCH / "compose.yaml").read_text())
    server, trainer = compose["services"]["serve"], compose["services"]["train"]
    for service in (server, trainer):
        build = service["build"]
        assert (LAUNCH / build["context"]).resolve() == ROOT and "ARG DEVICE=cpu" in LINES
        assert build["args"]["DEVICE"] in EXTRAS and service["image"] == server["image"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        named = [one.split(":")[0] for one in service["volumes"] if "$" not in one]
        assert set(named) <= set(compose["volumes"])
    own = served(server["command"])
    assert server["ports"] == [f"127.0.0.1:{own.port}:{last('EXPOSE')}"]
    inside = {re.sub(r":ro$", "", one).rpartition(":")[2] for one in server["volumes"]}
    assert inside == {*own.models, *last("VOLUME").split()}
    assert trainer["entrypoint"] == [*command("ENTRYPOINT"), "train"] and "train" in VERBS
    assert f"{last('WORKDIR')}/runs:" in "".join(f"{one}:" for one in trainer["volumes"])
    assert trainer["healthcheck"] == {"disable": True} and "shm_size" in trainer


def test_the_deployment_starts_this_image(client, api):
    everything = list(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text()))
    kinds = {one["kind"]: one for one in everything}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    own = served(container["args"])
    (port,) = container["ports"]
    (service,) = kinds["Service"]["spec"]["ports"]
    assert port["containerPort"] == own.port == int(last("EXPOSE")) == service["port"]
    assert service["targetPort"] == port["name"]
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Service"]["spec"]["selector"] == labels
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["metadata"]["name"] in own.allow_host
    assert str(pod["securityContext"]["runAsUser"]) == last("USER")
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert set(mounts) == {*own.models, *last("VOLUME").split()}
    volumes = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"]}
    claims = {o["metadata"]["name"] for o in everything if o["kind"] == "PersistentVolumeClaim"}
    assert set(mounts.values()) == set(volumes) and set(volumes.values()) == claims

    start, ready, live = (
        container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")
    )
    assert start["periodSeconds"] * start["failureThreshold"] >= 600  # as HEALTHCHECK, or longer
    assert start["httpGet"] == ready["httpGet"] == live["httpGet"]
    assert start["httpGet"]["port"] == port["name"]
    (host,) = start["httpGet"]["httpHeaders"]
    assert host["name"] == "Host" and host["value"] in serve.LOCAL
    api.dispatcher.ready.set()
    assert client.get(start["httpGet"]["path"], headers={"authorization": ""}).status_code == 200
