"""A captioning server is asked in both languages, again after a fault, and named when it fails."""

import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from easyanimate_jax.prepare.captions import INSTRUCTIONS, Server

STILLS = np.full((3, 32, 48, 3), 200, np.uint8)


@pytest.fixture
def server():
    asked, answers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            code, answer = answers.pop(0)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", asked, answers
    listening.shutdown()


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def test_a_clip_gets_a_caption_in_each_language(server, monkeypatch):
    url, asked, answers = server
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    answers += [(503, {}), says("  "), says(" a grey wall "), says("灰色的墙")]
    assert Server(url, "some-model")(STILLS) == ["a grey wall", "灰色的墙"]
    assert [a[:2] for a in asked] == [("/v1/chat/completions", "Bearer k")] * 4
    *pictures, text = asked[-1][2]["messages"][0]["content"]
    assert text["text"] == INSTRUCTIONS[1] and len(pictures) == 3
    sent = base64.b64decode(pictures[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (48, 32)


def test_a_server_that_never_answers_well_is_named(server):
    url, _, answers = server
    answers += [(200, {"error": "no"}), (200, []), says(None)]
    with pytest.raises(ValueError, match=r"/v1/chat/completions gave no caption in 3 requests"):
        Server(url, "m", tries=3)(STILLS)
