"""The HTTP interface of a server, without an engine: what is queued, shown, refused and deleted."""

import base64
import contextlib
import io
import json
import shutil
import socket
import threading
import time
import zipfile
from unittest.mock import Mock

import numpy as np
import openai
import pytest
import requests
import uvicorn
from PIL import Image
from safetensors.numpy import save_file
from starlette.testclient import TestClient
from test_sample import FILM, PICTURE, add_checkpoint

from easyanimate_jax.data import media
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.serving import fields
from easyanimate_jax.serving.app import Api, Limits, create_app
from easyanimate_jax.serving.dispatcher import Dispatcher
from easyanimate_jax.serving.engine import Settings, open_model
from easyanimate_jax.serving.store import RESERVE, Store

TOKEN = "a token of some length"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
MODELS = {"run": 33, "t2v": 16, "control": 32, "camera": 38}
LIMITS = Limits(queue=5, pixels=9 * 32 * 64, steps=60, megabytes=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(settings, what they open): models without weights, beside a picture and a film."""
    folder = tmp_path_factory.mktemp("models")
    with contextlib.chdir(folder):
        for name, channels in MODELS.items():
            add_checkpoint(name, in_channels=channels)
        add_checkpoint("v5", in_channels=16, process=DDPM())
        (folder / "vae").mkdir()
        (folder / "text/text_encoder").mkdir(parents=True)
        encoder = {"model_type": "qwen2", "hidden_size": 8}
        (folder / "text/text_encoder/config.json").write_text(json.dumps(encoder))
        settings = Settings({name: str(folder / name) for name in (*MODELS, "v5")})
        return settings, {name: open_model(settings, name) for name in settings.models}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and a film, as bytes."""
    folder = tmp_path_factory.mktemp("files")
    media.write_png(folder / "start.png", PICTURE)
    media.write_video(folder / "film.mp4", FILM)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def api(models, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    settings, opened = models
    store = Store(tmp_path / "served")
    return Api(store, Dispatcher(store, settings), opened, limits=LIMITS, token=TOKEN)


@pytest.fixture
def client(api):
    """An ordinary HTTP client that has the token."""
    app = create_app(api, ["127.0.0.1"])
    with TestClient(app, base_url="http://127.0.0.1:8000", headers=HEADERS) as client:
        yield client


@pytest.fixture
def videos(client):
    """The routes by OpenAI's own client."""
    options = {"api_key": TOKEN, "http_client": client, "max_retries": 0}
    return openai.OpenAI(base_url="http://127.0.0.1:8000/v1", **options).videos


@pytest.fixture
def reference(api):
    """A client of EasyAnimate's own routes, of a server whose engine is at once done or fails."""

    class Engine(threading.Thread):
        def run(self):
            while not api.ended.is_set():
                for job in api.store.claim(1):
                    if job.request["prompt"] == "fail":
                        api.store.fail(job.id, "out_of_memory", "too little memory")
                    else:
                        (api.store.videos / f"{job.id}.mp4").write_bytes(b"film")
                        api.store.complete(job.id, f"{job.id}.mp4", 1.5)
                time.sleep(0.02)

    app = create_app(api, ["127.0.0.1"], easyanimate_routes=True)
    with TestClient(app, base_url="http://127.0.0.1:8000", headers=HEADERS) as client:
        engine = Engine(daemon=True)
        engine.start()
        yield lambda **fields: client.post(
            "/easyanimate/infer_forward", json={"generation_method": "Video Generation"} | fields
        )
    engine.join()


def test_a_lora_of_few_steps_is_sampled_in_them_unless_the_request_says_otherwise(
    api, client, tmp_path
):
    told = {"easyanimate_jax": json.dumps({"sampling": {"steps": 4, "guidance": 1.0}})}
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "four.safetensors", told)
    settings = api.dispatcher.settings
    api.dispatcher.settings = settings._replace(loras={"four": str(tmp_path / "four.safetensors")})
    api.loras = {name: ["four"] for name in api.models}

    def stored(**fields):
        made = client.post("/v1/videos", json={"prompt": "a fox", "model": "t2v"} | fields)
        assert made.status_code == 200, made.text
        request = api.store.get(made.json()["id"]).request
        return request["steps"], request["guidance"]

    assert stored() == (50, 6.0)
    assert stored(lora=["four:1"]) == (4, 1.0)
    assert stored(lora=["four:0"]) == (50, 6.0)
    assert stored(lora=["four:1"], steps=8) == (8, 1.0)


@pytest.fixture
def server(api, tmp_path, monkeypatch):
    """The address of a server whose engine copies a film; "fail" fails, "wait" is not made."""
    api.limits = api.limits._replace(queue=50)
    listening = socket.create_server(("127.0.0.1", 0))
    app = uvicorn.Server(
        uvicorn.Config(
            create_app(api, ["127.0.0.1"]), log_level="warning", timeout_graceful_shutdown=1
        )
    )

    def make():
        store = api.store
        while not app.should_exit:
            for job in store.claim(1):
                store.advance([job.id], 40)
                if job.request["prompt"] == "fail":
                    store.fail(job.id, "out_of_memory", "too little memory")
                elif job.request["prompt"] != "wait":
                    name = f"{job.id}.{'png' if job.request['frames'] == 1 else 'mp4'}"
                    content = "start.png" if name.endswith("png") else "film.mp4"
                    (store.videos / name).write_bytes((tmp_path / content).read_bytes())
                    store.complete(job.id, name, 1.0)
                while (now := store.get(job.id)).status == "in_progress" and not app.should_exit:
                    time.sleep(0.02)
                    if now.cancelled:
                        store.fail(job.id, "cancelled", "cancelled")
            time.sleep(0.02)

    threads = [
        threading.Thread(target=app.run, args=([listening],), daemon=True),
        threading.Thread(target=make, daemon=True),
    ]
    for thread in threads:
        thread.start()
    monkeypatch.setenv("EASYANIMATE_TOKEN", TOKEN)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    app.should_exit = True
    for thread in threads:
        thread.join()


def finish(api, *ids, content=b"film"):
    for job in api.store.claim(len(ids)):
        (api.store.videos / f"{job.id}.mp4").write_bytes(content)
        (api.store.videos / f"{job.id}_first.png").write_bytes(b"first")
        assert api.store.complete(job.id, f"{job.id}.mp4", 1.5)


@pytest.mark.filterwarnings("ignore:The Sora API")
def test_openais_client_creates_polls_downloads_lists_and_deletes(videos, api):
    made = videos.create(
        prompt="一只红色的狐狸", size="64x32", seconds="1", model="t2v", extra_body={"seed": 7}
    )
    assert (made.status, made.progress, made.model, made.object) == ("queued", 0, "t2v", "video")
    assert (made.size, made.seconds, made.seed, made.num_frames) == ("64x32", "1", 7, 9)
    assert made.prompt == "一只红色的狐狸" and made.queue_position == 0
    finish(api, made.id)
    done = videos.poll(made.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert videos.download_content(made.id).read() == b"film"
    assert videos.download_content(made.id, variant="thumbnail").read() == b"first"
    with pytest.raises(openai.NotFoundError, match="this job has no spritesheet"):
        videos.download_content(made.id, variant="spritesheet")
    assert [video.id for video in videos.list(limit=1)] == [made.id]
    assert videos.delete(made.id).deleted and list(videos.list()) == []
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        videos.retrieve(made.id)


@pytest.mark.filterwarnings("ignore:The Sora API")
def test_openais_client_sends_pictures_and_films(videos, api, tmp_path):
    with open(tmp_path / "start.png", "rb") as file:
        made = videos.create(prompt="x", input_reference=file, model="run")
    job = api.store.get(made.id)
    assert job.request["image"] == "image" and (job.request["frames"], made.size) == (5, "32x16")
    kept = api.store.uploads / made.id / "image"
    assert kept.read_bytes() == (tmp_path / "start.png").read_bytes()
    with open(tmp_path / "film.mp4", "rb") as file:
        made = videos.create(prompt="x", input_reference=file, extra_body={"strength": 0.5})
    assert api.store.get(made.id).request["video"] == "video"
    first = videos.create(prompt="x", model="t2v")
    assert videos.remix(first.id, prompt="y").model == "t2v"  # not the default
    again = videos.remix(made.id, prompt="another one")
    assert again.remixed_from_video_id == made.id and again.prompt == "another one"
    assert (api.store.uploads / again.id / "video").is_file()
    assert api.store.get(again.id).request["strength"] == 0.5


@pytest.mark.filterwarnings("ignore:The Sora API")
def test_errors_reach_openais_client_with_field_and_code(videos):
    with pytest.raises(openai.BadRequestError) as refused:
        videos.create(prompt="x", extra_body={"guidance_scale": 200})
    error = refused.value
    assert (error.param, error.code, error.type) == (
        "guidance",
        "invalid_input",
        "invalid_request_error",
    )
    assert "guidance 200.0 is not between 0 and 100" in error.message
    with pytest.raises(openai.NotFoundError) as refused:
        videos.create(prompt="x", model="sora-2")
    assert refused.value.code == "model_not_found" and "run, t2v" in refused.value.message


def url_of(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_every_way_of_generating_is_a_request(client, api, tmp_path):
    picture, film = (tmp_path / name for name in ("start.png", "film.mp4"))
    hole = io.BytesIO()
    Image.fromarray(np.full((24, 40), 255, np.uint8)).save(hole, "png")
    data = url_of(picture.read_bytes(), "image/png")
    api.limits = Limits(queue=99)
    poses = "title\n" + "0 1 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n" * 20
    for model, json_body in [
        ("t2v", {}),
        ("t2v", {"frames": 1}),
        ("run", {"image": data, "end_image": data, "picture_noise": 0.1}),
        ("run", {"image": data, "size": "like", "frames": 5, "height": 16}),
        ("run", {"video": url_of(film.read_bytes(), "video/mp4"), "strength": 0.4}),
        (
            "run",
            {
                "video": url_of(film.read_bytes(), "video/mp4"),
                "mask": url_of(hole.getvalue(), "image/png"),
            },
        ),
        ("control", {"control": url_of(film.read_bytes(), "video/mp4"), "operator": "canny"}),
        ("control", {"trajectory": [[[4, 4], [28, 12]]], "spot": 4}),
        ("camera", {"camera": poses}),
        ("v5", {"sampler": "euler_a", "guided": [0.1, 0.9], "steps": 3}),
    ]:
        answer = client.post("/v1/videos", json={"prompt": "x", "model": model} | json_body)
        assert answer.status_code == 200, (json_body, answer.text)
    form = {"prompt": "x", "trajectory": "[[[4, 4], [28, 12]]]", "model": "control"}
    assert client.post("/v1/videos", data=form).status_code == 200
    form = {"prompt": "x", "guided": "0.1, 0.9", "steps": "3", "model": "t2v", "user": "me"}
    assert client.post("/v1/videos", data=form).status_code == 200
    stored = [job.request for job in api.store.page(None, 99, "asc")[0]]
    assert stored[-1]["guided"] == [0.1, 0.9] and stored[-1]["steps"] == 3


def test_a_request_names_the_loras_of_its_model(client, api):
    api.loras = {"t2v": ["style", "face"]}

    def post(lora):
        return client.post("/v1/videos", json={"prompt": "x", "model": "t2v", "lora": lora})

    for lora in ("style:0.8, face", ["style:0.8", "face:1"], "style:0.8,face,style:0"):
        assert api.store.get(post(lora).json()["id"]).request["lora"] == [
            ["style", 0.8],
            ["face", 1],
        ]
    other = post("style:0.5").json()["id"]
    assert [len(api.store.claim(9)) for _ in range(3)] == [3, 1, 0]  # one batch, one memory
    assert api.store.get(other).request["lora"] == [["style", 0.5]]
    for lora, words in (
        ("gone", "its LoRAs are style, face"),
        ("style:much", "give a weight"),
        ("style:1e9", "give a weight"),
        ("style:nan", "give a weight"),
        ({"style": 1}, "give names and weights"),
        ([1], "give names and weights"),
        ("../style", "has no LoRA"),
    ):
        answer = post(lora)
        assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "lora"
    assert client.post("/v1/videos", json={"prompt": "x", "lora": "style"}).status_code == 404


def test_easyanimates_clients_get_the_video_in_the_answer(reference, api, files):
    whole = {
        "base_model_path": "none",
        "motion_module_path": "none",
        "lora_model_path": "none",
        "lora_alpha_slider": 0.55,
        "prompt_textbox": "a red circle",
        "negative_prompt_textbox": "blur",
        "sampler_dropdown": "Flow",
        "sample_step_slider": 30,
        "resize_method": "Generate by",
        "width_slider": 32,
        "height_slider": 16,
        "is_image": False,
        "length_slider": 5,
        "cfg_scale_slider": 6,
        "start_image": base64.b64encode(files["start.png"]).decode(),
        "seed_textbox": 43,
    }
    answer = reference(**whole).json()
    assert answer["message"] == "Success" and answer["save_sample_path"] == ""
    assert base64.b64decode(answer["base64_encoding"]) == b"film"
    (job,) = api.store.page(None, 9, "asc")[0]
    assert job.request["image"] == "image" and job.request["negative_prompt"] == "blur"
    assert [job.request[name] for name in ("frames", "steps", "sampler")] == [5, 30, "euler"]
    reference(
        generation_method="Image Generation", prompt_textbox="x", width_slider=32, height_slider=16
    )
    assert api.store.page(None, 1, "desc")[0][0].request["frames"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_textbox": "fail"}, "too little memory"),
        ({"lora_model_path": "/etc/passwd"}, "chosen when the server starts"),
        ({"sampler_dropdown": "magic"}, "sampler_dropdown is 'magic'"),
        ({"width_slider": 33, "height_slider": 16}, "width 33"),
        ({"generation_method": "x"}, "generation_method is 'x'"),
        ({"start_image": "@@"}, "not base64"),
    ],
)
def test_easyanimates_clients_find_errors_in_the_message(reference, fields, message):
    answer = reference(**fields)
    assert answer.status_code == 200 and answer.json()["base64_encoding"] is None
    assert answer.json()["message"].startswith("Error. error information is ")
    assert message in answer.json()["message"]


def test_like_requests_share_a_batch_and_others_do_not(client, api):
    for body in (
        {},
        {"seed": 1},
        {"steps": 3},
        {"frames": 1},
        {"teacache": 0.1},
        {"teacache": 0.1},
    ):
        api.limits = Limits(queue=99)
        client.post("/v1/videos", json={"prompt": "x", "model": "t2v"} | body)
    assert [len(api.store.claim(9)) for _ in range(6)] == [2, 1, 1, 1, 1, 0]


def test_an_idempotency_key_makes_one_job(client, api):
    headers = {"idempotency-key": "one"}
    ids = {
        client.post("/v1/videos", json={"prompt": "x"}, headers=headers).json()["id"] for _ in "ab"
    }
    assert len(ids) == 1 and api.store.counts()["queued"] == 1
    assert len(list(api.store.uploads.iterdir())) == 0


def test_a_full_queue_says_when_to_come_again(client):
    codes = [client.post("/v1/videos", json={"prompt": "x"}).status_code for _ in range(6)]
    assert codes == [200] * 5 + [429]
    answer = client.post("/v1/videos", json={"prompt": "x"})
    assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "queue_full"


def test_a_waiting_job_is_cancelled_then_deleted(client, api):
    id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    answer = client.get(f"/v1/videos/{id}/content")
    assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
    shown = client.delete(f"/v1/videos/{id}").json()
    assert shown["status"] == "failed" and shown["error"]["code"] == "cancelled"
    assert client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert client.get(f"/v1/videos/{id}").status_code == 404


def test_events_tell_each_change_and_end(client, api):
    id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = []
        for line in answer.iter_lines():
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: "))["status"])
                if len(seen) == 1:
                    finish(api, id)
    assert seen == ["queued", "completed"]


def test_a_film_can_be_read_in_parts(client, api):
    id = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    finish(api, id, content=b"0123456789")
    answer = client.get(f"/v1/videos/{id}/content", headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    assert client.head(f"/v1/videos/{id}/content").headers["content-length"] == "10"


def test_clients_that_leave_change_nothing(server, api):
    """In an upload, in an event stream, in the body of a film: the server and the job go on."""
    made = requests.post(f"{server}/v1/videos", json={"prompt": "x"}, headers=HEADERS).json()["id"]
    while api.store.get(made).status != "completed":
        time.sleep(0.02)
    (api.store.videos / f"{made}.mp4").write_bytes(bytes(4 * 10**7))  # more than sockets hold
    waiting = requests.post(f"{server}/v1/videos", json={"prompt": "wait"}, headers=HEADERS).json()
    while api.store.get(waiting["id"]).status != "in_progress":
        time.sleep(0.02)
    host, port = server.removeprefix("http://").split(":")
    token = f"host: 127.0.0.1\r\nauthorization: {HEADERS['authorization']}\r\n"
    form = "content-type: multipart/form-data; boundary=x\r\ncontent-length: 900\r\n"
    asked = {
        "POST /v1/videos": form,
        f"GET /v1/videos/{waiting['id']}/events": "",
        f"GET /v1/videos/{made}/content": "",
    }
    for line, more in asked.items():
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{line} HTTP/1.1\r\n{token}{more}\r\n".encode())
            if line.startswith("POST"):
                client.sendall(b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx')
            else:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert api.store.get(waiting["id"]).status == "in_progress"
    assert (
        requests.get(f"{server}/v1/videos", headers=HEADERS).json()["data"][0]["id"]
        == (waiting["id"])
    )
    assert len(api.store.page(None, 9, "asc")[0]) == 2 and not list(api.store.uploads.iterdir())


def test_health_models_and_metrics(client, api):
    for state in ("starting", "failed"):
        answer = client.get("/healthz", headers={"authorization": ""})
        assert (answer.status_code, answer.json()) == (503, {"status": state})
        api.dispatcher.broken.set()
    api.dispatcher.ready.set()
    assert client.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == [*MODELS, "v5"]
    client.post("/v1/videos", json={"prompt": "x"})
    text = client.get("/metrics").text
    assert 'easyanimate_jobs{status="queued"} 1.0' in text
    assert "easyanimate_sampling_seconds_count 0.0" in text


def test_a_full_disk_is_507_and_queues_nothing(client, api, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fields, "place", full)
    answer = client.post("/v1/videos", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert api.store.counts()["queued"] == 0


def test_the_last_room_of_a_disk_is_kept_for_the_queue(client, api, monkeypatch):
    usage = shutil.disk_usage(api.store.folder)._replace(free=RESERVE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    answer = client.post("/v1/videos", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")


def test_a_fault_of_the_server_has_the_form_of_all_errors(api, monkeypatch):
    app = create_app(api, ["127.0.0.1"])
    options = {"base_url": "http://127.0.0.1", "headers": HEADERS, "raise_server_exceptions": False}
    with TestClient(app, **options) as client:
        for error in (ZeroDivisionError(), OSError(5, "Input/output error")):
            monkeypatch.setattr(fields, "place", Mock(side_effect=error))
            answer = client.post("/v1/videos", json={"prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
            assert api.store.counts()["queued"] == 0


def bomb(kind: str) -> bytes:
    """A small file of very many pixels or bytes."""
    out = io.BytesIO()
    if kind == "png":
        Image.new("1", (40_000, 40_000)).save(out, "png")
    else:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("0", bytes(10**7))
    return out.getvalue()


BAD_BODIES = {
    "no prompt": {},
    "a prompt that is no text": {"prompt": 3},
    "null as prompt": {"prompt": None},
    "a long prompt": {"prompt": "x" * 10_001},
    "half a character": {"prompt": "\ud800"},
    "an unknown field": {"sede": 3},
    "a field of the inside": {"__class__": "x"},
    "extra_body": {"extra_body": {"seed": 1}},
    "negative frames": {"num_frames": -3},
    "frames that are no 4n+1": {"num_frames": 8},
    "fractions of a frame": {"num_frames": 5.5},
    "endless frames": {"num_frames": 10**30},
    "no number of frames": {"num_frames": "five"},
    "true as a number": {"num_frames": True},
    "not a number": {"guidance": float("nan")},
    "infinity": {"guidance": float("inf")},
    "huge sides": {"size": "10000x10000"},
    "a negative size": {"size": "-16x16"},
    "a size of words": {"size": "big"},
    "a size as a list": {"size": [16, 16]},
    "two sizes": {"size": "32x16", "width": 32},
    "two names of one thing": {"num_frames": 5, "frames": 5},
    "seconds and frames": {"seconds": "1", "num_frames": 9},
    "negative seconds": {"seconds": -1},
    "seconds of words": {"seconds": "soon"},
    "more than the limit": {"size": "64x64", "num_frames": 9},
    "many steps": {"steps": 61},
    "a path of an endless video": {
        "trajectory": [[[4, 4], [28, 12]]],
        "model": "control",
        "size": "1344x1344",
        "num_frames": 100_001,
    },
    "a negative seed": {"seed": -1},
    "a large seed": {"seed": 2**32},
    "an unknown sampler": {"sampler": "magic"},
    "one bound of guidance": {"guided": [0.1]},
    "guidance as an object": {"guided": {"a": 1}},
    "a file of the server": {"image": "/etc/passwd"},
    "a file by its URL": {"image": "file:///etc/passwd"},
    "a picture of the network": {"image": "http://169.254.169.254/latest"},
    "a reference of the network": {"input_reference": {"image_url": "https://example.com/a.png"}},
    "a file of OpenAI": {"input_reference": {"file_id": "file-1"}},
    "broken base64": {"image": "data:image/png;base64,@@@@"},
    "an empty picture": {"image": "data:image/png;base64,"},
    "a page as a picture": {"image": url_of(b"<html><script>alert(1)</script>", "image/png")},
    "a drawing that loads files": {
        "image": url_of(b'<svg><image href="file:///etc/passwd"/></svg>', "image/png")
    },
    "a playlist": {"video": url_of(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "video/mp4")},
    "a list of files": {"video": url_of(b"ffconcat version 1.0\nfile /etc/passwd\n", "video/mp4")},
    "a bomb of pixels": {"image": "PIXELS"},
    "a zip as a picture": {"image": "ZIP"},
    "a picture as a film": {"video": "PICTURE"},
    "a film as a picture": {"image": "FILM"},
    "half a film": {"video": "HALF"},
    "a mask alone": {"mask": "PICTURE"},
    "picture and film": {"image": "PICTURE", "video": "FILM"},
    "a deep path": {"trajectory": "[" * 50_000, "model": "control"},
    "a path of words": {"trajectory": [["a", "b"]], "model": "control"},
    "a path outside": {"trajectory": [[[4000, 4000]]], "model": "control"},
    "poses of words": {"camera": "title\nhere and there", "model": "camera"},
    "control of a model without": {"control": "FILM", "model": "t2v"},
    "no control": {"model": "control"},
    "a model by its path": {"model": "/etc"},
    "a model of another type": {"model": {"a": 1}},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_requests_are_refused_and_nothing_is_written(name, client, api, tmp_path):
    body = BAD_BODIES[name] if name.endswith("prompt") else {"prompt": "x"} | BAD_BODIES[name]
    film = (tmp_path / "film.mp4").read_bytes()
    given = {
        "PIXELS": url_of(bomb("png"), "image/png") if "pixels" in name else "",
        "ZIP": url_of(bomb("zip"), "image/png"),
        "PICTURE": url_of((tmp_path / "start.png").read_bytes(), "image/png"),
        "FILM": url_of(film, "video/mp4"),
        "HALF": url_of(film[: len(film) // 2], "video/mp4"),
    }
    body = {
        key: given.get(value, value) if isinstance(value, str) else value
        for key, value in body.items()
    }
    answer = client.post(
        "/v1/videos", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 404, 415), answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    assert str(tmp_path) not in answer.text and "--" not in error["message"]
    assert api.store.counts()["queued"] == 0 and list(api.store.uploads.iterdir()) == []
    assert client.post("/v1/videos", json={"prompt": "x", "model": "t2v"}).status_code == 200


JSON_TYPE = {"content-type": "application/json"}
BAD_CALLS = {
    "no token": (401, "get", "/v1/videos", {"headers": {"authorization": ""}}),
    "another token": (401, "get", "/v1/videos", {"headers": {"authorization": "Bearer guess"}}),
    "the token as a password": (
        401,
        "get",
        "/v1/videos",
        {"headers": {"authorization": f"Basic {TOKEN}"}},
    ),
    "the token in the address": (
        401,
        "get",
        f"/v1/videos?token={TOKEN}",
        {"headers": {"authorization": ""}},
    ),
    "a foreign character": (
        401,
        "get",
        "/metrics",
        {"headers": {"authorization": "Bearer \xe9".encode("latin1")}},
    ),
    "another host": (400, "get", "/v1/videos", {"headers": {"host": "evil.example"}}),
    "a page of another server": (
        403,
        "post",
        "/v1/videos",
        {"headers": {"origin": "http://evil.example"}},
    ),
    "a page of a file": (403, "post", "/v1/videos", {"headers": {"origin": "null"}}),
    "not JSON": (400, "post", "/v1/videos", {"content": b"{", "headers": JSON_TYPE}),
    "a list": (400, "post", "/v1/videos", {"content": b"[]", "headers": JSON_TYPE}),
    "deep JSON": (400, "post", "/v1/videos", {"content": b'{"a":' * 50_000, "headers": JSON_TYPE}),
    "huge JSON": (413, "post", "/v1/videos", {"content": b" " * 2_000_001, "headers": JSON_TYPE}),
    "text": (
        415,
        "post",
        "/v1/videos",
        {"content": b"x", "headers": {"content-type": "text/plain"}},
    ),
    "no type": (415, "post", "/v1/videos", {"content": b"x"}),
    "a form without border": (
        400,
        "post",
        "/v1/videos",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ),
    "a broken form": (
        400,
        "post",
        "/v1/videos",
        {"content": b"--a\r\nx", "headers": {"content-type": "multipart/form-data; boundary=a"}},
    ),
    "a field twice": (
        400,
        "post",
        "/v1/videos",
        {"files": [("prompt", (None, "x")), ("prompt", (None, "y"))]},
    ),
    "many fields": (
        400,
        "post",
        "/v1/videos",
        {"files": [(f"a{n}", (None, "x")) for n in range(200)]},
    ),
    "many files": (
        400,
        "post",
        "/v1/videos",
        {"files": [(f"a{n}", ("n", b"x")) for n in range(30)]},
    ),
    "a large file": (413, "post", "/v1/videos", {"files": {"image": ("a.png", b"x" * 2_100_000)}}),
    "a name with a path": (404, "get", "/v1/videos/..%2f..%2fetc%2fpasswd", {}),
    "a name with dots": (404, "get", "/v1/videos/video_../content", {}),
    "another variant": (422, "get", f"/v1/videos/video_{'0' * 32}/content?variant=../a", {}),
    "a page of 1000": (422, "get", "/v1/videos?limit=1000", {}),
    "a page of words": (422, "get", "/v1/videos?limit=x", {}),
    "another order": (422, "get", "/v1/videos?order=random()", {}),
    "another method": (405, "put", "/v1/videos", {}),
    "no such route": (404, "get", "/docs", {}),
    "a remix of nothing": (
        404,
        "post",
        f"/v1/videos/video_{'0' * 32}/remix",
        {"json": {"prompt": "x"}},
    ),
    "a remix with more": (
        400,
        "post",
        f"/v1/videos/video_{'0' * 32}/remix",
        {"json": {"prompt": "x", "seed": 1}},
    ),
    "a long key": (
        400,
        "post",
        "/v1/videos",
        {"json": {"prompt": "x"}, "headers": {"idempotency-key": "k" * 201}},
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_have_their_status_and_write_nothing(name, client, api):
    status, method, path, options = BAD_CALLS[name]
    answer = client.request(method, path, **options)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert api.store.counts()["queued"] == 0 and list(api.store.uploads.iterdir()) == []


def test_a_body_without_length_is_counted(client):
    chunks = (b"x" * 10**5 for _ in range(30))
    answer = client.post("/v1/videos", content=chunks, headers=JSON_TYPE)
    assert answer.status_code == 413


def test_the_name_of_an_upload_is_never_used(client, api, tmp_path):
    files = {"image": ("../../../evil.png", (tmp_path / "start.png").read_bytes())}
    id = client.post("/v1/videos", data={"prompt": "x"}, files=files).json()["id"]
    assert [path.name for path in (api.store.uploads / id).iterdir()] == ["image"]
    assert not list(tmp_path.rglob("*evil*"))


def test_a_script_in_a_prompt_stays_text(client):
    prompt = "<script>alert(1)</script>"
    answer = client.post("/v1/videos", json={"prompt": prompt})
    assert answer.json()["prompt"] == prompt
    assert answer.headers["content-type"] == "application/json"


def test_the_fields_are_the_options(client):
    described = client.get("/openapi.json").json()["paths"]["/v1/videos"]["post"]
    schema = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert list(schema["properties"]) == list(fields.FIELDS)
    assert schema["properties"]["fit"]["enum"] == ["crop", "stretch"]
    assert schema["properties"]["image"] == {
        "type": "string",
        "format": "binary",
        "description": "Picture: the first frame.",
    }
