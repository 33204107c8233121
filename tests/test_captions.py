"""A captioning server is asked in both languages, again after a fault, and named when it fails."""

import base64
import http.server
import io
import json
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from easyanimate_jax.prepare import captions
from easyanimate_jax.prepare.captions import INSTRUCTIONS, Server

STILLS = np.full((3, 32, 48, 3), 200, np.uint8)


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that are waited for a server, without waiting."""
    found = []
    monkeypatch.setattr(captions.time, "sleep", found.append)
    return found


@pytest.fixture
def server(pauses):
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


def test_a_server_that_is_down_is_asked_after_growing_pauses(server, pauses):
    url, asked, answers = server
    answers += [(503, {}), (429, {}), (500, {}), (502, {}), says("a wall"), (503, {}), says("墙")]
    assert Server(url, "m")(STILLS) == ["a wall", "墙"]
    assert pauses == [1, 4, 16, 60, 1] and len(asked) == 7
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    pauses.clear()
    with pytest.raises(ConnectionError, match=r"/v1/chat/completions did not serve 6 requests: .*"):
        Server(down, "m", tries=6)(STILLS)
    assert pauses == [1, 4, 16, 60, 60]


def test_a_server_that_hangs_up_or_is_slow_does_not_serve(pauses):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"2 requests: .*timed out"):
            Server(url, "m", tries=2, seconds=0.1)(STILLS)

        def answer_nonsense():
            for _ in range(4):  # the two above, which gave up, and two more
                with listening.accept()[0] as connection:
                    connection.sendall(b"220 this is no HTTP\r\n\r\n")

        thread = threading.Thread(target=answer_nonsense, daemon=True)
        thread.start()
        with pytest.raises(ConnectionError, match="did not serve 2 requests"):
            Server(url, "m", tries=2)(STILLS)
        thread.join(5)
    assert pauses == [1, 1]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (400, ValueError, "refuses the clip"),
        (413, ValueError, "refuses the clip"),
        (401, ConnectionError, "refuses every request"),
        (404, ConnectionError, "refuses every request"),
    ],
)
def test_a_refusal_is_not_asked_again(server, pauses, code, kind, words):
    url, asked, answers = server
    answers += [(code, {})]
    with pytest.raises(kind, match=f"{words}: .*{code}"):
        Server(url, "m")(STILLS)
    assert len(asked) == 1 and not pauses


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://h/v1", "/v1"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(ValueError, match=f"Server.url is {url!r}; begin it with http://"):
        Server(url, "m")
