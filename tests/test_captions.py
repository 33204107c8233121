"""A captioning server is asked in both languages, again after a fault, and named when it fails."""

import base64
import http.server
import io
import json
import logging
import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from easyanimate_jax.prepare import servers
from easyanimate_jax.prepare.captions import INSTRUCTIONS, REWRITE, RewritingServer, Server
from easyanimate_jax.prepare.embeddings import (
    AlignmentServer,
    EmbeddingServer,
    alignment_score,
    server_embedding,
)

STILLS = np.full((3, 32, 48, 3), 200, np.uint8)


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that are waited for a server, on a clock that does not wait."""
    found = []

    class Clock:
        monotonic = staticmethod(lambda: 1000.0 + sum(found))
        sleep = staticmethod(found.append)

    monkeypatch.setattr(servers, "time", Clock)
    return found


@contextmanager
def answering(answers):
    """Yield the URL of a server that gives the answers, and the requests that it got."""
    asked = []

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
    yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def server(pauses):
    answers = []
    with answering(answers) as (url, asked):
        yield url, asked, answers


@pytest.fixture
def down():
    """The URL of a server that is down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def says(text):
    return 200, {"choices": [{"message": {"content": text}}]}


def test_a_clip_gets_a_caption_in_each_language(server, monkeypatch):
    url, asked, answers = server
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    answers += [(503, {}), says("  "), says(" a grey wall "), says("灰色的墙")]
    assert Server((url,), "some-model")(STILLS) == ["a grey wall", "灰色的墙"]
    assert [a[:2] for a in asked] == [("/v1/chat/completions", "Bearer k")] * 4
    *pictures, text = asked[-1][2]["messages"][0]["content"]
    assert text["text"] == INSTRUCTIONS[1] and len(pictures) == 3
    sent = base64.b64decode(pictures[0]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).size == (48, 32)


def test_the_reasoning_of_a_model_is_no_caption(server):
    url, _, answers = server
    answers += [says("<think>A wall? Yes.</think>\n\na wall"), says("Grau? 灰色.</think>墙")]
    assert Server((url,), "m")(STILLS) == ["a wall", "墙"]
    answers += [says("<think>It could be a wall, or")] * 2
    with pytest.raises(ValueError, match=r"gave no caption in 2 requests: .*turn off"):
        Server((url,), "m", tries=2)(STILLS)


def test_a_server_that_never_answers_well_is_named(server):
    url, _, answers = server
    answers += [(200, {"error": "no"}), (200, []), says(None)]
    with pytest.raises(ValueError, match=r"/v1/chat/completions gave no caption in 3 requests"):
        Server((url,), "m", tries=3)(STILLS)


def test_a_server_that_is_down_is_asked_after_growing_pauses(server, pauses):
    url, asked, answers = server
    answers += [(503, {}), (429, {}), (500, {}), (502, {}), says("a wall"), (503, {}), says("墙")]
    assert Server((url,), "m")(STILLS) == ["a wall", "墙"]
    assert pauses == [1, 4, 16, 60, 1] and len(asked) == 7


def test_servers_that_answer_to_nothing_for_a_stated_time_are_named(down, pauses):
    with pytest.raises(ConnectionError, match=r"no answer for 141 s from .*/completions: .*refus"):
        Server((down,), "m", patience=141.0)(STILLS)
    assert pauses == [1, 4, 16, 60, 60]


def test_another_server_answers_for_one_that_dies(server, pauses, down, caplog):
    """It is not asked again before its pause is over, and warned of once."""
    url, asked, answers = server
    answers += [says("a")] * 6
    captioner = Server((down, url), "m", ("Describe it.",))
    assert [captioner(STILLS) for _ in range(6)] == [["a"]] * 6
    assert len(asked) == 6 and not pauses
    [record] = caplog.records
    assert record.message.startswith(f"{down}/chat/completions does not serve: ")


def test_a_server_that_comes_back_is_taken_back(server, pauses, caplog):
    caplog.set_level(logging.INFO)
    url, _, answers = server
    answers += [says("a")] * 5
    with answering([(503, {}), (503, {}), says("b"), says("b")]) as (other, _):
        captioner = Server((other, url), "m", ("Describe it.",))
        caption = lambda: captioner(STILLS)[0]  # noqa: E731
        assert [caption(), caption()] == ["a", "a"]  # the first asks the other one, too
        pauses.append(1)  # as if that much later
        assert [caption(), caption()] == ["a", "a"]
        pauses.append(4)
        assert [caption(), caption(), caption()] == ["b", "a", "b"]
    told = [record.message.removeprefix(other) for record in caplog.records]
    assert told[0].startswith("/chat/completions does not serve: HTTP Error 503")
    assert told[1:] == ["/chat/completions serves again"]


def test_a_server_that_hangs_holds_up_one_request(server, pauses, caplog):
    url, asked, answers = server
    answers += [says("a")] * 6
    with socket.create_server(("127.0.0.1", 0)) as hung, ThreadPoolExecutor(1) as pool:
        hangs = f"http://127.0.0.1:{hung.getsockname()[1]}"
        captioner = Server((hangs, url), "m", ("Describe it.",), seconds=30.0)
        held = pool.submit(captioner, STILLS)
        connection, _ = hung.accept()
        assert [captioner(STILLS) for _ in range(5)] == [["a"]] * 5 and len(asked) == 5
        assert not caplog.records  # nothing was asked of it
        connection.close()
        assert held.result() == ["a"]


def test_a_server_that_hangs_up_or_is_slow_does_not_serve(pauses):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"no answer for 1 s from .*timed out"):
            Server((url,), "m", seconds=0.1, patience=1.0)(STILLS)

        def answer_nonsense():
            for _ in range(4):  # the two above, which gave up, and two more
                with listening.accept()[0] as connection:
                    connection.sendall(b"220 this is no HTTP\r\n\r\n")

        thread = threading.Thread(target=answer_nonsense, daemon=True)
        thread.start()
        with pytest.raises(ConnectionError, match="no answer for 1 s from"):
            Server((url,), "m", patience=1.0)(STILLS)
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
    captioner = Server((url,), "m", ("Describe it.",))
    with pytest.raises(kind, match=f"{words}: .*{code}"):
        captioner(STILLS)
    assert len(asked) == 1 and not pauses
    if kind is ValueError:  # and the next clip is not kept waiting
        answers += [says("a")]
        assert captioner(STILLS) == ["a"] and not pauses


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://h/v1", "/v1"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(ValueError, match=f"Server.url is {url!r}; begin it with http://"):
        Server((url,), "m")


def test_a_caption_is_rewritten_by_a_model_that_reads_it_and_its_kind(server, pauses):
    url, asked, answers = server
    answers += [(503, {}), says(""), says(" A fox {runs}. ")]
    rewriter = pickle.loads(pickle.dumps(RewritingServer((url,), "some-model")))
    assert rewriter("In the video {kind} a fox runs", "video") == "A fox {runs}."
    path, _, body = asked[-1]
    assert path == "/v1/chat/completions" and body["model"] == "some-model" and pauses == [1]
    wanted = REWRITE.replace("{kind}", "video").replace(
        "{caption}", "In the video {kind} a fox runs"
    )
    assert body["messages"] == [{"role": "user", "content": wanted}]
    answers += [says(None)] * 2
    with pytest.raises(ValueError, match=r"completions gave no rewritten caption in 2 requests"):
        RewritingServer((url,), "m", tries=2)("a", "image")


def test_an_instruction_without_the_caption_is_refused():
    with pytest.raises(ValueError, match=r"instruction is 'Rewrite it\.'; write \{caption\} where"):
        RewritingServer(("http://h",), "m", "Rewrite it.")


def is_at(*vector):
    return 200, {"data": [{"embedding": list(vector)}]}


def test_the_alignment_is_the_cosine_of_frames_and_caption(server):
    url, asked, answers = server
    answers += [is_at(2.0, 0.0), is_at(0.0, 0.5), (503, {}), is_at(3.0, 0.0), is_at(-1.0, -1.0)]
    score = alignment_score(AlignmentServer((url,), "clip", low=0.25))
    assert (score.name, score.low, score.frames) == ("alignment", 0.25, "captioned")
    found = score.measure(STILLS[:2], ["east", "south west"])
    np.testing.assert_allclose(found, [0.5**0.5, -1.0])
    assert {path for path, _, _ in asked} == {"/v1/embeddings"}
    [message] = asked[0][2]["messages"]
    [picture] = message["content"]
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert (asked[-1][2]["input"], asked[-1][2]["model"]) == ("south west", "clip")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, {"data": []}), "gave no embedding in 2 requests"),
        (is_at(0.0, 0.0), "gave no embedding in 2 requests: .* all are 0"),
        (is_at(float("nan"), 1.0), "gave no embedding in 2 requests: .*finite"),
        ((400, {}), "refuses the clip: .*400"),
    ],
)
def test_an_embedding_that_cannot_be_used_is_the_clip_s_reason(server, answer, words):
    url, _, answers = server
    answers += [is_at(1.0, 0.0), answer, answer]
    with pytest.raises(ValueError, match=f"/v1/embeddings {words}"):
        AlignmentServer((url,), "m", tries=2)(STILLS[:1], ["a"])


def test_embeddings_of_different_lengths_are_of_no_use(server):
    url, _, answers = server
    answers += [is_at(1.0, 0.0), is_at(1.0, 0.0, 0.0)]
    with pytest.raises(ValueError, match="m gives frames and captions vectors of different len"):
        AlignmentServer((url,), "m")(STILLS[:1], ["a"])


def test_the_vector_of_a_clip_is_the_mean_direction_of_its_frames(server):
    url, asked, answers = server
    answers += [is_at(2.0, 0.0), is_at(0.0, 0.5)]
    embedding = server_embedding(EmbeddingServer((url,), "clip", similarity=0.9))
    vector = embedding.vector(STILLS[:2])
    np.testing.assert_allclose(vector, [0.5**0.5] * 2, atol=1e-3)
    assert vector.dtype == np.float16 and embedding.similarity == 0.9 and len(asked) == 2
