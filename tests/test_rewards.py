"""Rewards of a function and of a server; a server's bad answer costs its own video and no other."""

import base64
import http.server
import io
import json
import math
import socket
import threading
import time

import numpy as np
import pytest

from easyanimate_jax.data import media
from easyanimate_jax.evaluation import rewards
from easyanimate_jax.evaluation.rewards import (
    Received,
    RewardError,
    RewardFunction,
    RewardServer,
    check_dropped,
    matched,
    open_reward,
)

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (5, 1, 4, 4, 3), np.uint8).repeat(5, 1).repeat(8, 2).repeat(8, 3)
PROMPTS = [f"a square {n}" for n in range(5)]


def brightness(frames, prompts):
    """A reward of this module."""
    return frames.reshape(len(prompts), -1).astype(float).mean(axis=1)


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(rewards.time, "sleep", found.append)
    return found


@pytest.fixture
def server(pauses):
    """Address, requests, and functions of a request that answer the next ones."""
    asked, answers = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"token": self.headers.get("Authorization")})
            code, answer = (answers.pop(0) if answers else good)(body)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/score", asked, answers
    listening.shutdown()


def rows(body):
    """The right answer: the number in a prompt."""
    return [{"id": s["id"], "reward": float(s["prompt"].split()[-1])} for s in body["samples"]]


def good(body):
    return 200, {"rewards": rows(body)}


def changed(change):
    """An answer whose rows `change` has changed."""

    def answer(body):
        found = rows(body)
        return 200, {"rewards": change(found) or found}

    return answer


def test_a_function_of_a_module_rates_videos():
    reward = open_reward("test_rewards:brightness")
    np.testing.assert_array_equal(reward(FRAMES, PROMPTS), brightness(FRAMES, PROMPTS))
    assert reward.name == "test_rewards:brightness"
    found = RewardFunction("f", lambda frames, prompts: [1.0, math.nan, math.inf, 2, 3])(
        FRAMES, PROMPTS
    )
    np.testing.assert_array_equal(found, [1, math.nan, math.nan, 2, 3])
    with pytest.raises(ValueError, match=r"f returned the shape \(2,\) for 5 videos; return one"):
        RewardFunction("f", lambda frames, prompts: [1.0, 2.0])(FRAMES, PROMPTS)
    for text in ("nowhere:f", "json:nothing", "json", ":f", "json:decoder"):
        with pytest.raises(ValueError, match=text):
            open_reward(text)


@pytest.mark.parametrize("form", ["mp4", "npz"])
def test_a_server_gets_the_videos_and_prompts_and_its_numbers_are_matched_by_id(
    server, form, monkeypatch, tmp_path
):
    url, asked, answers = server
    monkeypatch.setenv("REWARD_TOKEN", "k")
    answers += [changed(lambda rows: rows[::-1])] * 3
    reward = open_reward(url, batch=2, format=form)
    np.testing.assert_array_equal(reward(FRAMES, PROMPTS), [0, 1, 2, 3, 4])
    assert [len(one["samples"]) for one in asked] == [2, 2, 1]
    assert {one["token"] for one in asked} == {"Bearer k"}
    assert (asked[0]["version"], asked[0]["format"], asked[0]["fps"]) == (1, form, 8)
    sample = asked[1]["samples"][1]
    content = base64.b64decode(sample["video"])
    assert sample["prompt"] == "a square 3"
    if form == "npz":
        np.testing.assert_array_equal(
            np.load(io.BytesIO(content), allow_pickle=False)["frames"], FRAMES[3]
        )
    else:
        (tmp_path / "sent.mp4").write_bytes(content)
        found = media.read_clip(tmp_path / "sent.mp4", 0, 5)
        grey = found.mean(axis=-1), FRAMES[3].mean(axis=-1)  # colour has half the resolution
        assert abs(grey[0] - grey[1]).mean() < 12
        assert found.shape == FRAMES[3].shape


def test_floats_are_sent_as_the_same_pixels(server):
    url, asked, _ = server
    for frames in (FRAMES[:1], (FRAMES[:1] + 0.5) / 127.5 - 1):
        RewardServer(url, format="npz")(frames, PROMPTS[:1])
    assert asked[0]["samples"] == asked[1]["samples"]
    with pytest.raises(ValueError, match="floats must be from -1 to 1"):
        RewardServer(url)(FRAMES[:1].astype(np.float32), PROMPTS[:1])


def lose(row):
    def change(rows):
        del rows[row]

    return change


FAULTS = {
    "NaN": changed(lambda rows: rows[1].update(reward=math.nan)),
    "infinite": changed(lambda rows: rows[1].update(reward=-math.inf)),
    "text": changed(lambda rows: rows[1].update(reward="0.5")),
    "null": changed(lambda rows: rows[1].update(reward=None)),
    "true": changed(lambda rows: rows[1].update(reward=True)),
    "huge": changed(lambda rows: rows[1].update(reward=10**400)),
    "double": changed(lambda rows: [*rows, rows[1]]),
    "double and other": changed(lambda rows: [*rows, rows[1] | {"reward": 7.0}]),
    "too few": changed(lose(1)),
    "of another id": changed(lambda rows: rows[1].update(id="0-0")),
    "no row": changed(lambda rows: [rows[0], 17, *rows[2:]]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_bad_answer_costs_its_own_video_alone(server, fault, caplog):
    url, asked, answers = server
    answers.append(fault)
    found = RewardServer(url, batch=3)(FRAMES, PROMPTS)
    np.testing.assert_array_equal(found, [0, math.nan, 2, 3, 4])
    assert len(asked) == 2 and "the reward http" in caplog.text


def test_an_answer_for_nobody_costs_nothing(server):
    url, _, answers = server
    answers.append(changed(lambda rows: [*rows, {"id": "late", "reward": 9.0}]))
    np.testing.assert_array_equal(RewardServer(url)(FRAMES, PROMPTS), [0, 1, 2, 3, 4])


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"rewards": 3}', b"[" * 100_000, b"null"])
def test_an_answer_that_cannot_be_read_costs_its_batch(server, content, pauses):
    url, _, answers = server
    answers.append(lambda body: (200, content))
    found = RewardServer(url, batch=3)(FRAMES, PROMPTS)
    np.testing.assert_array_equal(found, [math.nan] * 3 + [3, 4])
    assert pauses == []


def test_a_busy_server_is_asked_again_after_growing_pauses_and_a_refusal_is_not(server, pauses):
    url, asked, answers = server
    answers += [lambda body, code=code: (code, {}) for code in (503, 429, 500, 502, 408)]
    np.testing.assert_array_equal(RewardServer(url, tries=6)(FRAMES, PROMPTS), [0, 1, 2, 3, 4])
    assert pauses == [1, 4, 16, 60, 60] and len(asked) == 6
    assert len({json.dumps(one["samples"]) for one in asked}) == 1
    answers.append(lambda body: (404, {}))
    assert np.isnan(RewardServer(url)(FRAMES, PROMPTS)).all() and len(asked) == 7
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = RewardServer(f"http://127.0.0.1:{free.getsockname()[1]}", tries=2)
    assert np.isnan(down(FRAMES, PROMPTS)).all()
    with pytest.raises(RewardError, match="does not serve: no answer to 2 requests"):
        down.check()
    RewardServer(url).check()
    assert asked[-1]["samples"] == []


def test_a_late_answer_is_none_and_is_not_taken_for_the_next(server, pauses):
    url, asked, answers = server
    wait = threading.Event()

    def late(body):
        wait.wait(10)
        return changed(lambda rows: [row | {"reward": 9.0} for row in rows])(body)

    answers += [late, late]
    began = time.monotonic()
    found = RewardServer(url, batch=3, seconds=0.2, tries=2)(FRAMES, PROMPTS)
    assert time.monotonic() - began < 5
    wait.set()
    np.testing.assert_array_equal(found, [math.nan] * 3 + [3, 4])
    assert pauses == [1] and len(asked) == 3


def test_an_answer_that_drips_is_late(pauses):
    def drip():
        with listening.accept()[0] as connection:
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            try:
                for _ in range(40):
                    connection.sendall(b" ")
                    stop.wait(0.05)
            except OSError:
                pass

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, daemon=True).start()
        server = RewardServer(
            f"http://127.0.0.1:{listening.getsockname()[1]}", seconds=0.3, tries=1
        )
        began = time.monotonic()
        assert np.isnan(server(FRAMES[:1], PROMPTS[:1])).all()
        stop.set()
    assert time.monotonic() - began < 1.5


def test_faults_of_an_answer_are_named():
    answer = [{"id": "a", "reward": 1}, {"id": "a", "reward": 2}, {"id": "x", "reward": 1}]
    found, faults = matched(["a", "b", "c"], {"rewards": [*answer, {"id": "b", "reward": 5}]})
    assert found == {"b": 5.0}
    assert faults == [
        "it answers 2 times for a",
        "it answers for 'x', which was not asked",
        "it has no answer for c",
    ]


def test_received_rewards_are_read_again_without_a_line_that_was_cut(tmp_path):
    path = tmp_path / "rewards.jsonl"
    Received(path).add({"a": 0.1 + 0.2, "b": math.nan})
    with path.open("a") as file:
        file.write('{"key": "c", "rew')
    again = Received(path)
    assert again.rewards == {"a": 0.1 + 0.2}
    again.add({"d": -1e-300})
    assert Received(path).rewards == {"a": 0.1 + 0.2, "d": -1e-300}
    assert len(path.read_text().splitlines()) == 2


def test_more_than_a_twentieth_of_dropped_groups_ends_the_run():
    check_dropped(0, 1, "r")
    check_dropped(5, 100, "r")
    with pytest.raises(RewardError, match="6 of 100 prompts have a video without a reward of r"):
        check_dropped(6, 100, "r")


def test_numbers_and_addresses_of_a_server_are_checked():
    for wrong in ({"batch": 0}, {"seconds": 0.0}, {"tries": 0}, {"fps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RewardServer("http://x", **wrong)
    with pytest.raises(ValueError, match="begins with no http"):
        RewardServer("ftp://x")
