"""The ComfyUI nodes, against a server, with a stand-in for the parts of ComfyUI that they use.

integrations/comfyui/README.md tells how they are run in ComfyUI itself.
"""

import asyncio
import importlib.util
import io
import json
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_serve_api import TOKEN
from test_serve_api import api as api  # fixtures: a server's state, models without weights, files
from test_serve_api import files as files
from test_serve_api import models as models
from test_serve_api import server as server

from easyanimate_jax.data import media

PACK = Path(__file__).parent.parent / "integrations" / "comfyui"


class Interrupted(BaseException):
    """As ComfyUI's: not an Exception that a node may catch by accident."""


class Kind:
    """Any type of `comfy_api.latest.io`: its Input and Output remember their arguments."""

    Input = Output = staticmethod(
        lambda *names, **options: types.SimpleNamespace(names=names, **options)
    )


class Film:
    """A VIDEO."""

    def __init__(self, file):
        self.content = file if isinstance(file, bytes) else file.read()

    def save_to(self, file):
        file.write(self.content)

    def get_components(self):
        path = Path(self.folder) / "read.mp4"
        path.write_bytes(self.content)
        frames = media.read_clip(path, 0, media.probe(path).num_frames)
        return types.SimpleNamespace(images=torch.from_numpy(frames / np.float32(255)))


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """The node classes by their ids, the progress that was told, and a switch to interrupt."""
    told, interrupt = [], threading.Event()

    def throw():
        if interrupt.is_set():
            raise Interrupted

    latest = types.ModuleType("comfy_api.latest")
    names = ("Int", "Float", "String", "Combo", "Image", "Mask", "Video")
    latest.io = types.SimpleNamespace(
        ComfyNode=object,
        Schema=lambda **fields: types.SimpleNamespace(**fields),
        NodeOutput=lambda *values: values,
        Custom=lambda name: Kind,
        **dict.fromkeys(names, Kind),
    )
    latest.ComfyExtension = object
    latest.InputImpl = types.SimpleNamespace(VideoFromFile=Film)
    Film.folder = tmp_path
    management = types.ModuleType("comfy.model_management")
    management.throw_exception_if_processing_interrupted = throw
    utils = types.ModuleType("comfy.utils")
    utils.ProgressBar = lambda total: types.SimpleNamespace(update_absolute=told.append)
    comfy = types.ModuleType("comfy")
    comfy.model_management, comfy.utils = management, utils
    for module in (comfy, management, utils, types.ModuleType("comfy_api"), latest):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "comfy_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfy_pack", module)
    for name in ("comfy_pack.nodes", "comfy_pack.client"):  # those of the last test
        sys.modules.pop(name, None)
    spec.loader.exec_module(module)
    nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in nodes}, told, interrupt


def run(pack, name, url, model, prompt="x", **given):
    nodes, _, _ = pack
    sys.modules["comfy_pack.client"].POLL = 0.05
    (place,) = nodes["EasyAnimateJAXServer"].execute(url, model)
    sizes = {"width": 32, "height": 16, "frames": 5, "steps": 2, "guidance": 3.0, "seed": 7}
    node = nodes[f"EasyAnimateJAX{name}"]
    return asyncio.run(node.execute(place, prompt, "", **(sizes | given)))


def test_every_node_makes_a_video(pack, server, api):
    nodes, told, _ = pack
    film = Film((Path(Film.folder) / "film.mp4").read_bytes())
    picture = torch.rand(1, 20, 30, 3)
    hole = torch.zeros(1, 24, 40)
    hole[:, 5:] = 1
    (options,) = nodes["EasyAnimateJAXOptions"].execute("euler", '{"shift": 3}', fps=8, fit="crop")
    (lora,) = nodes["EasyAnimateJAXLoRA"].execute("face", 0.5)
    (lora,) = nodes["EasyAnimateJAXLoRA"].execute("style", 1.0, lora)
    api.loras = {"t2v": ["face", "style"]}
    moves = dict.fromkeys(("x", "y", "z", "tilt", "roll"), 0.0) | {"pan": 0.5}
    for name, model, given, sent in (
        ("TextToVideo", "t2v", {"options": options, "lora": lora}, set()),
        ("ImageToVideo", "run", {"start": picture, "end": picture}, {"image", "end_image"}),
        ("VideoToVideo", "run", {"video": film, "strength": 0.5}, {"video"}),
        ("VideoToVideo", "run", {"video": film, "strength": 0.5, "mask": hole}, {"video", "mask"}),
        ("ControlToVideo", "control", {"control": film, "operator": "canny"}, {"control"}),
        (
            "TrajectoryToVideo",
            "control",
            {"paths": "[[[4, 4], [28, 12]]]", "spot": 4},
            {"trajectory"},
        ),
        (
            "TrajectoryToVideo",
            "control",
            {"paths": '[{"x": 4, "y": 4}, {"x": 9, "y": 9}]', "spot": 0},
            {"trajectory"},
        ),
        ("CameraToVideo", "camera", {"poses": "", **moves}, {"camera"}),
    ):
        video, images = run(pack, name, server, model, **given)
        assert images.shape == (9, 24, 40, 3) and images.dtype == torch.float32
        assert video.content == film.content
        job = api.store.page(None, 1, "desc")[0][0]
        kept = api.store.uploads / job.id
        assert sent == ({path.name for path in kept.iterdir()} if kept.exists() else set())
        assert (job.request["seed"], job.request["steps"]) == (7, 2)
    first = api.store.page(None, 100, "asc")[0][0].request
    assert first["shift"] == 3 and first["lora"] == [["face", 0.5], ["style", 1]]
    assert told[-1] == 100 and set(told) <= set(range(101))
    rows = (kept / "camera").read_text().splitlines()
    assert len(rows) == 14 and len(rows[1].split()) == 19


def test_a_mask_film_is_white_where_the_mask_is(pack, server, api):
    film = Film((Path(Film.folder) / "film.mp4").read_bytes())
    hole = torch.zeros(9, 24, 40)
    for number in range(9):
        hole[number, :, number:] = 1
    run(pack, "VideoToVideo", server, "run", frames=9, video=film, strength=0.5, mask=hole)
    job = api.store.page(None, 1, "desc")[0][0]
    path = api.store.uploads / job.id / "mask"
    frames = media.read_at(path, 0, 9)
    np.testing.assert_array_equal(frames[..., 0], hole.numpy() * 255)


def test_one_frame_is_a_picture(pack, server):
    video, images = run(pack, "TextToVideo", server, "t2v", frames=1)
    assert video is None and images.shape == (1, 40, 40, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "fail"}, "too little memory"),
        ({"model": "gone"}, "there is no model 'gone'"),
        ({"frames": 8}, "8 frames"),
        ({"url": "http://127.0.0.1:9"}, "does not answer"),
        ({"url": "ftp://x"}, "is no address"),
        ({"url": "http://example.com"}, "use https"),
    ],
)
def test_failures_are_one_line(pack, server, given, message):
    asked = {"url": server, "model": "t2v"} | given
    with pytest.raises(Exception, match=message) as failed:
        run(pack, "TextToVideo", **asked)
    assert "\n" not in str(failed.value)


def test_a_wrong_token_says_where_it_belongs(pack, server, monkeypatch, tmp_path):
    monkeypatch.setenv("EASYANIMATE_TOKEN", "wrong")
    with pytest.raises(Exception, match="EASYANIMATE_TOKEN"):
        run(pack, "TextToVideo", server, "t2v")
    monkeypatch.delenv("EASYANIMATE_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("EASYANIMATE_TOKEN_FILE", str(tmp_path / "token"))
    run(pack, "TextToVideo", server, "t2v")


def test_an_interrupt_cancels_the_job(pack, server, api):
    _, told, interrupt = pack
    threading.Timer(0.5, interrupt.set).start()
    with pytest.raises(Interrupted):
        run(pack, "TextToVideo", server, "t2v", prompt="wait")
    deadline = time.monotonic() + 10
    while (job := api.store.page(None, 1, "desc")[0][0]).status != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert job.code == "cancelled" and 40 in told


def test_the_workflows_name_nodes_and_inputs_that_exist(pack):
    nodes, _, _ = pack
    found = set()
    for path in sorted((PACK / "api_workflows").glob("*.json")):
        for node in json.loads(path.read_text()).values():
            kind = node["class_type"]
            if kind in nodes:
                found.add(kind)
                known = {one.names[0] for one in nodes[kind].define_schema().inputs}
                assert set(node["inputs"]) <= known, (path.name, kind)
                wanted = {
                    one.names[0]
                    for one in nodes[kind].define_schema().inputs
                    if not getattr(one, "optional", False)
                }
                assert wanted <= set(node["inputs"]), (path.name, kind)
    assert found == set(nodes)


def prompt_of(graph):
    """The prompt that ComfyUI's page makes of a graph: of each node its type, widgets and links."""
    sources = {link: (str(node), slot) for link, node, slot, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        inputs, values = {}, iter(node["widgets_values"])
        for one in node["inputs"]:
            if "widget" in one:
                inputs[one["name"]] = next(values)
                if one["name"] == "seed":
                    assert next(values) == "fixed"  # what becomes of the seed after a run
            elif one["link"] is not None:
                inputs[one["name"]] = [*sources[one["link"]]]
        assert list(values) == []
        inputs.pop("upload", None)  # a button
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_the_page_s_workflows_are_those_of_the_interface():
    names = {path.name for path in (PACK / "api_workflows").iterdir()}
    assert names == {path.name for path in (PACK / "example_workflows").iterdir()} and names
    for name in sorted(names):
        graph = json.loads((PACK / "example_workflows" / name).read_text())
        wanted = json.loads((PACK / "api_workflows" / name).read_text())
        assert prompt_of(graph) == wanted, name
        outputs = {node["id"]: node["outputs"] for node in graph["nodes"]}
        for link, node, slot, *_ in graph["links"]:
            assert link in outputs[node][slot]["links"], name
        boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[:i]:
                apart = x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h
                assert apart, f"two nodes of {name} overlap"


def test_pictures_keep_their_values(pack):
    module = sys.modules["comfy_pack.nodes"]
    x = torch.rand(2, 5, 7, 3)
    read = np.asarray(Image.open(io.BytesIO(module.png(x))))
    np.testing.assert_array_equal(read, (x[0] * 255).round().byte().numpy())
