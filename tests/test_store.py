"""The queue of a server: each job ends once, whatever is killed, and nothing is lost."""

import threading

import pytest

from easyanimate_jax.serving.store import MOST_STOPS, Full, Store

REQUEST = {"prompt": "一只红色的狐狸", "frames": 9, "height": 32, "width": 48}


def id_of(number: int) -> str:
    return f"video_{number:032x}"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "served")


def add(store, *numbers, alike="a", most=100, **more):
    return [store.add(id_of(n), "demo", REQUEST, alike, most=most, **more) for n in numbers]


def numbers(jobs):
    return [int(job.id.removeprefix("video_"), 16) for job in jobs]


def test_a_job_comes_back_as_it_was_queued(store):
    (job,) = add(store, 1)
    assert store.get(job.id) == job and job.request == REQUEST and job.status == "queued"
    assert store.get(id_of(2)) is None


def test_like_jobs_are_claimed_together_in_the_order_of_arrival(store):
    add(store, 1)
    add(store, 2, alike="b")
    add(store, 3, 4, 5)
    assert [numbers(store.claim(3)) for _ in range(4)] == [[1, 3, 4], [2], [5], []]


def test_two_threads_never_claim_the_same_job(store):
    add(store, *range(200), most=1000)
    found, start = [], threading.Barrier(4)

    def claim():
        start.wait()
        while jobs := store.claim(3):
            found.extend(numbers(jobs))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(200))


def test_a_full_queue_takes_no_job_and_an_ended_one_makes_room(store):
    add(store, 1, 2, most=2)
    with pytest.raises(Full):
        add(store, 3, most=2)
    store.fail(id_of(1), "invalid_input", "no")
    add(store, 3, most=2)
    assert store.counts() == {"queued": 2, "in_progress": 0, "completed": 0, "failed": 1}


def test_the_same_idempotency_key_gives_the_same_job(store):
    (first,) = add(store, 1, key="k")
    assert add(store, 2, key="k") == [first] and store.get(id_of(2)) is None
    assert store.by_key("k") == first


def test_a_job_of_a_killed_server_is_queued_again_but_not_for_ever(store):
    add(store, 1)
    for stops in range(1, MOST_STOPS):
        assert numbers(store.claim(1)) == [1]
        again = Store(store.folder)
        assert again.recover() == 1 and again.get(id_of(1)).stops == stops
    store.claim(1)
    store.recover()
    assert store.get(id_of(1)).status == "failed" and store.get(id_of(1)).code == "interrupted"


def test_a_job_that_ends_engines_is_tried_alone_and_then_fails(store):
    add(store, 1, 2, 3)
    store.requeue([job.id for job in store.claim(3)], died=True)
    assert numbers(store.claim(3)) == [1]
    store.requeue([id_of(1)], died=True)
    assert store.get(id_of(1)).code == "interrupted"
    assert numbers(store.claim(3)) == [2]
    store.requeue([id_of(2)], died=False)  # the server ended: no fault of the job
    assert store.get(id_of(2)).deaths == 1 and store.get(id_of(2)).status == "queued"


def test_a_fresh_job_does_not_join_one_that_ended_an_engine(store):
    add(store, 1)
    store.claim(1)
    store.requeue([id_of(1)], died=True)
    add(store, 2, 3)
    assert [numbers(store.claim(9)) for _ in range(2)] == [[1], [2, 3]]


def test_cancelling_before_and_while_it_is_made(store):
    add(store, 1, 2)
    assert store.cancel(id_of(2)).code == "cancelled"
    store.claim(1)
    assert store.cancel(id_of(1)).status == "in_progress"
    write(store, 1)
    assert not store.complete(id_of(1), f"{id_of(1)}.mp4", 1.0)
    assert store.get(id_of(1)).code == "cancelled" and not list(store.videos.iterdir())
    assert store.cancel(id_of(9)) is None


def test_a_cancelled_job_of_a_dead_engine_is_not_made_again(store):
    add(store, 1)
    store.claim(1)
    store.cancel(id_of(1))
    store.requeue([id_of(1)], died=True)
    assert store.get(id_of(1)).code == "cancelled" and store.claim(1) == []


def write(store, number, size=10):
    for suffix in (".mp4", ".json", "_sheet.png", "_first.png"):
        (store.videos / f"{id_of(number)}{suffix}").write_bytes(b"x" * size)
    (store.uploads / id_of(number)).mkdir()
    (store.uploads / id_of(number) / "image").write_bytes(b"x")


def completed(store, *wanted):
    add(store, *wanted)
    for job in store.claim(100):
        write(store, numbers([job])[0])
        assert store.complete(job.id, f"{job.id}.mp4", 2.0)


def test_deleting_removes_the_row_and_the_files_of_a_job_that_has_ended(store):
    completed(store, 1, 2)
    add(store, 3)
    assert store.delete(id_of(1)) and not store.delete(id_of(3)) and not store.delete(id_of(1))
    assert store.get(id_of(1)) is None
    assert {path.name[:38] for path in store.videos.iterdir()} == {id_of(2)}
    assert [path.name for path in store.uploads.iterdir()] == [id_of(2)]


def test_files_without_a_row_go_at_the_next_start_and_those_with_one_stay(store):
    completed(store, 1)
    add(store, 4)
    write(store, 4)
    write(store, 5)
    (store.videos / f".{id_of(4)}.part").write_bytes(b"half")
    (store.videos / f".{id_of(6)}.part").write_bytes(b"half")
    (store.videos / "notes.txt").write_bytes(b"not ours")
    store.recover()
    kept = {path.name.strip(".")[:38] for path in store.videos.iterdir()}
    assert kept == {id_of(1), id_of(4), "notes.txt"}
    assert {path.name for path in store.uploads.iterdir()} == {id_of(1), id_of(4)}


def test_the_oldest_videos_go_when_they_are_too_old_or_too_many(tmp_path):
    now = [1000.0]
    store = Store(tmp_path, clock=lambda: now[0])
    for number in range(5):
        completed(store, number)
        now[0] += 86400
    assert store.expire(days=3.5, most=10**6) == 2
    assert store.expire(days=3.5, most=81) == 1
    assert numbers(store.page(None, 9, "asc")[0]) == [3, 4]


def test_pages_follow_the_order_of_arrival(store):
    add(store, *range(5))
    assert [numbers(jobs) for jobs, _ in [store.page(None, 2, "asc")]] == [[0, 1]]
    jobs, more = store.page(id_of(1), 2, "asc")
    assert numbers(jobs) == [2, 3] and more
    jobs, more = store.page(id_of(3), 2, "asc")
    assert numbers(jobs) == [4] and not more
    assert numbers(store.page(id_of(2), 9, "desc")[0]) == [1, 0]
    assert store.page(id_of(77), 9, "desc") == ([], False)


def test_progress_and_places_in_the_queue(store):
    jobs = add(store, 1, 2, 3)
    assert [store.ahead(job) for job in jobs] == [0, 1, 2]
    store.claim(1)
    store.advance([id_of(1), id_of(2)], 40)
    assert [store.get(id_of(n)).progress for n in (1, 2)] == [40, 0]
    store.complete(id_of(1), "x.mp4", 3.0)
    assert store.times()[:2] == (1, 3.0) and store.get(id_of(1)).progress == 100
