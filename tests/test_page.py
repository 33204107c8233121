"""The page of a server: its words, its login; and all its forms in a real browser (slow)."""

import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient
from test_sample import FILM
from test_serve_api import TOKEN
from test_serve_api import api as api  # fixtures: a server's state, models without weights, files
from test_serve_api import client as client
from test_serve_api import files as files
from test_serve_api import models as models

from easyanimate_jax.data import media
from easyanimate_jax.serving import site
from easyanimate_jax.serving.app import Limits, create_app
from easyanimate_jax.serving.fields import FIELDS

TEXTS = json.loads(site.PAGE["texts.json"].read_text("utf-8"))
SCRIPT = site.PAGE["page.js"].read_text("utf-8")
HTML = site.PAGE["index.html"].read_text("utf-8")
AXE = Path(__file__).parent.parent / ".venv/axe/node_modules/axe-core/axe.min.js"


def test_both_languages_have_all_words():
    english, chinese = (set(TEXTS[name]) - {"help", "codes"} for name in ("en", "zh"))
    assert english == chinese
    used = set(re.findall(r'data-text="(\w+)"', HTML)) | set(re.findall(r'say\("(\w+)"\)', SCRIPT))
    used |= set(re.findall(r'button\("(\w+)"', SCRIPT)) | {f"name_{name}" for name in FIELDS}
    used |= {f"way_{name}" for name in site.WAYS} | {"status_queued", "status_in_progress"}
    camera = site.PAGE["camera.js"].read_text("utf-8")
    presets = camera.split("PRESETS = {")[1].split("};")[0]
    used |= {f"preset_{name}" for name in re.findall(r"^  (\w+): \{", presets, re.M)}
    assert used - english == set()
    assert set(TEXTS["zh"]["help"]) == set(FIELDS)  # English comes from the options
    assert not [word for word in TEXTS["zh"].values() if word == ""]


def test_the_page_offers_what_the_models_can_do(client):
    offered = client.get("/v1/options").json()
    ways = {model["id"]: model["ways"] for model in offered["models"]}
    assert ways == {
        "run": ["text", "image", "video", "inpaint"],
        "t2v": ["text", "video", "inpaint"],
        "control": ["control", "trajectory"],
        "camera": ["camera"],
        "v5": ["text", "video", "inpaint"],
    }
    assert offered["models"][-1]["samplers"][0] == "ddim"
    assert [field["name"] for field in offered["fields"]] == list(FIELDS)
    seed = next(field for field in offered["fields"] if field["name"] == "seed")
    assert (seed["kind"], seed["low"], seed["high"], seed["default"]) == (
        "integer",
        0,
        2**32 - 1,
        43,
    )


def test_the_page_needs_no_token_and_its_requests_do(api):
    with TestClient(create_app(api, ["127.0.0.1"]), base_url="http://127.0.0.1") as client:
        for path in sorted(set(site.PATHS) - {"/login"}):
            answer = client.get(path)
            assert answer.status_code == 200 and "default-src 'self'" in str(answer.headers), path
        assert client.get("/v1/options").status_code == 401
        for body in (b"", b"{}", b"[]", b'{"token": 3}', b'{"token": "guess"}', b"[" * 50_000):
            assert client.post("/login", content=body).status_code == 401
        answer = client.post("/login", json={"token": TOKEN})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert client.get("/v1/options").status_code == 200  # by the cookie
        made = client.post("/v1/videos", json={"prompt": "x"}, headers={"origin": "http://evil"})
        assert made.status_code == 403


class Page:
    """A server with an engine that copies a film, and a browser's page on it."""

    def __init__(self, api, browser, folder, language, width):
        self.api, self.folder = api, folder
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = create_app(api, ["127.0.0.1"])
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        )
        self.threads = [
            threading.Thread(target=self.server.run, args=([listening],), daemon=True),
            threading.Thread(target=self.make, daemon=True),
        ]
        self.seen, self.foreign, self.faults = [], [], []
        for thread in self.threads:
            thread.start()
        context = browser.new_context(locale=language, viewport={"width": width, "height": 900})
        self.page = context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self.note)
        self.page.goto(self.url)

    def note(self, request):
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.foreign.append(request.url)

    def make(self):
        store = self.api.store
        while not self.server.should_exit:
            for job in store.claim(1):
                for progress in (10, 40, 80):
                    store.advance([job.id], progress)
                    time.sleep(0.3)
                if job.request["prompt"] == "fail":
                    store.fail(job.id, "out_of_memory", "too little")
                    continue
                shutil.copy(self.folder / "film.mp4", store.videos / f"{job.id}.mp4")
                media.write_png(store.videos / f"{job.id}_first.png", FILM[0])
                store.complete(job.id, f"{job.id}.mp4", 1.0)
            time.sleep(0.05)

    def enter(self):
        self.page.wait_for_selector("#login:not([hidden])")
        self.page.fill("#token", "a wrong one")
        self.page.click("#login button")
        self.page.fill("#token", TOKEN)
        self.page.click("#login button")
        self.page.wait_for_selector("#request:not([hidden])")

    def until(self, condition):
        """Wait for a condition in JavaScript; the page's policy forbids Playwright's own way."""
        end = time.monotonic() + 15
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(50)

    def choose(self, model, way):
        self.page.select_option("#model", model)
        self.page.check(f"#way_{way}")

    def send(self, prompt):
        """Send the form, see the job's progress, then its film play; return the job."""
        self.page.fill("#prompt", prompt)
        before = len(self.api.store.page(None, 100, "asc")[0])
        self.page.click("#send")
        self.until(f"document.querySelectorAll('article').length > {before}")
        job = self.api.store.page(None, 1, "desc")[0][0]
        bar = f"#{job.id} progress"
        self.until(f"document.querySelector('{bar}')?.value >= 10")
        self.page.wait_for_selector(f"#{job.id} video")
        film = f"document.querySelector('#{job.id} video')"
        self.page.evaluate(f"{film}.play()")
        self.until(f"{film}.readyState >= 2 && {film}.currentTime > 0")
        assert self.page.evaluate(f"[{film}.videoWidth, {film}.videoHeight]") == [40, 24]
        shown = self.page.evaluate(
            f"""() => {{ const c = new OffscreenCanvas(40, 24), p = c.getContext("2d");
            p.drawImage({film}, 0, 0); return [...p.getImageData(0, 0, 40, 24).data]; }}"""
        )
        assert np.std(shown) > 20  # a frame was decoded
        return self.api.store.get(job.id)

    def drag(self, *points):
        box = self.page.locator("#canvas").bounding_box()
        x, y = (np.array(points) * [box["width"], box["height"]] + [box["x"], box["y"]]).T
        self.page.mouse.move(x[0], y[0])
        self.page.mouse.down()
        for place in zip(x, y, strict=True):
            self.page.mouse.move(*place, steps=3)
        self.page.mouse.up()

    def end(self):
        self.page.context.close()
        self.server.should_exit = True
        for thread in self.threads:
            thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="make browser installs it")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=quiet)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("language", "width"), [("en-US", 1280), ("zh-CN", 390), ("en-US", 390)])
def test_every_way_is_filled_in_and_its_video_plays(language, width, api, browser, tmp_path):
    api.limits = Limits(queue=50)
    page = Page(api, browser, tmp_path, language, width)
    try:
        page.enter()
        title = {"en-US": "New video", "zh-CN": "新视频"}[language]
        assert page.page.text_content("#request h2") == title
        script = "<img src=x onerror=alert(1)>"
        assert page.send(script).request["prompt"] == script
        assert page.page.locator("article img").count() == 0

        page.choose("run", "image")
        page.page.set_input_files("#field_image", tmp_path / "start.png")
        page.page.fill("#field_seed", "7")
        job = page.send("pictures")
        assert job.request["image"] == "image" and job.request["seed"] == 7

        page.choose("run", "video")
        page.page.click("#send")
        page.until("document.querySelector('#message').textContent != ''")
        page.page.set_input_files("#field_video", tmp_path / "film.mp4")
        page.page.fill("#field_strength", "0.5")
        assert page.send("a film").request["strength"] == 0.5

        page.choose("run", "inpaint")
        page.page.set_input_files("#field_video", tmp_path / "film.mp4")
        page.until("document.querySelector('#canvas').width == 40")
        page.drag((0.2, 0.5), (0.8, 0.5))
        page.drag((0.5, 0.1), (0.5, 0.2))
        page.page.click("#undo")
        job = page.send("a part")
        mask = np.asarray(Image.open(api.store.uploads / job.id / "mask").convert("L"))
        assert mask.shape == (24, 40) and mask[12, 20] == 255 and mask[2, 20] == mask[0, 0] == 0

        page.choose("control", "control")
        page.page.set_input_files("#field_control", tmp_path / "film.mp4")
        page.page.select_option("#field_operator", "canny")
        assert page.send("edges").request["operator"] == "canny"

        page.choose("control", "trajectory")
        page.drag((0.1, 0.5), (0.5, 0.5), (0.9, 0.9))
        job = page.send("a path")
        (path,) = json.loads((api.store.uploads / job.id / "trajectory").read_text())
        assert path[0] == pytest.approx([3.2, 8], abs=0.6) and len(path) > 4
        assert path[-1] == pytest.approx([28.8, 14.4], abs=0.6)

        page.page.select_option("#model", "camera")
        page.page.select_option("#preset", "pan_left")
        job = page.send("a camera")
        rows = (api.store.uploads / job.id / "camera").read_text().splitlines()
        assert len(rows) == 14 and all(len(row.split()) == 19 for row in rows[1:])
        last = np.array(rows[-1].split()[7:], float).reshape(3, 4)[:, :3]
        assert np.allclose(last @ last.T, np.eye(3), atol=1e-5) and last[0, 2] > 0.4

        page.page.select_option("#model", "run")
        page.page.fill("#field_width", "33")
        page.page.evaluate("document.querySelector('#request').noValidate = true")
        page.page.click("#send")
        page.until("document.querySelector('#message').textContent.includes('33')")

        page.page.reload()
        page.page.wait_for_selector("article video")
        assert page.page.locator("article").count() == 7
        again = {"en-US": "Use these settings", "zh-CN": "使用这些设置"}[language]
        page.page.get_by_role("button", name=again).nth(5).click()
        assert page.page.input_value("#field_seed") == "7"
        other = {"en-US": "zh", "zh-CN": "en"}[language]
        page.page.select_option("#language", other)
        assert page.page.text_content("#request h2") in ("New video", "新视频") != title
        assert page.page.input_value("#field_seed") == "7"  # kept over the change
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.foreign == [] and page.faults == []
    finally:
        page.end()


@pytest.mark.slow
def test_a_failed_job_and_a_cancelled_one_say_so(api, browser, tmp_path):
    page = Page(api, browser, tmp_path, "en-US", 1280)
    try:
        page.enter()
        for prompt in ("fail", "slow", "waits"):
            page.page.fill("#prompt", prompt)
            page.page.keyboard.press("Tab")  # the form works by keyboard: leave the text
            page.page.locator("#send").focus()
            page.page.keyboard.press("Enter")
            page.page.locator("article").filter(has_text=prompt).wait_for()
        page.page.get_by_role("button", name="Cancel").first.click()
        page.page.get_by_text("Cancelled.").wait_for()
        page.page.get_by_text("There was too little memory").wait_for()
        page.page.get_by_role("button", name="Delete").first.click()
        page.until("document.querySelectorAll('article').length == 2")
        assert page.faults == []
    finally:
        page.end()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_axe_finds_no_barrier(language, width, api, browser, tmp_path):
    """In every way, with jobs of every state, light and dark, axe-core finds nothing."""
    if not AXE.is_file():
        pytest.skip("there is no axe-core: make browser installs it with npm")
    page = Page(api, browser, tmp_path, language, width)
    found = {}

    def examine(state):
        for scheme in ("light", "dark"):
            page.page.emulate_media(color_scheme=scheme)
            for one in page.page.evaluate("async () => (await axe.run()).violations"):
                for node in one["nodes"]:
                    found.setdefault((one["impact"], one["id"], node["html"]), (state, scheme))

    try:
        page.page.wait_for_selector("#login:not([hidden])")
        page.page.evaluate(AXE.read_text("utf-8"))
        examine("login")
        page.enter()
        examine("nothing made")
        for prompt in ("fail", "a circle", "waits"):
            page.page.fill("#prompt", prompt)
            page.page.click("#send")
            page.page.locator("article").filter(has_text=prompt).wait_for()
        examine("in progress")
        page.page.wait_for_selector("article video")
        page.page.wait_for_selector("article .failed")
        page.page.click("summary")
        for model, ways in (
            ("run", ("text", "image", "video", "inpaint")),
            ("control", ("control", "trajectory")),
            ("camera", ("camera",)),
        ):
            page.page.select_option("#model", model)
            for way in ways:
                if page.page.locator(f"#way_{way}").is_visible():
                    page.page.check(f"#way_{way}")
                if way == "inpaint":
                    page.page.set_input_files("#field_video", tmp_path / "film.mp4")
                    page.until("document.querySelector('#canvas').width == 40")
                examine(way)
        page.page.select_option("#model", "run")
        page.choose("run", "video")
        page.page.click("#send")
        page.until("document.querySelector('#message').textContent != ''")
        examine("a refused request")
    finally:
        page.end()
    assert found == {}
