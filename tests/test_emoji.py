"""The emoji data: names, captions, films by time; the model that comes with the package."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demos import emoji, gallery
from demos.emoji_report import ranks
from easyanimate_jax import load_pipeline
from easyanimate_jax.data.media import read_clip
from easyanimate_jax.weights.identity import fingerprint
from easyanimate_jax.weights.pretrained import FOLDER, lasting_name, model_place

NAMES = {
    "en": [("1F418", "elephant", ["animal"]), ("270B", "raised hand", ["stop", "high"])],
    "zh": [("1F418", "大象", ["动物", "象"]), ("270B", "举起手", ["停", "击掌"])],
}
TONES = {"en": ": light skin tone", "zh": ": 较浅肤色"}
ELEPHANT = emoji.Emoji(
    {"en": "elephant", "zh": "大象"}, {"en": ("animal",), "zh": ("动物", "大象")}
)


def webp(shades, milliseconds, side=8):
    """An animated WebP of one grey square a frame with a transparent gap at the right."""
    frames = []
    for shade in shades:
        pixels = np.zeros((side, side, 4), np.uint8)
        pixels[:, : side // 2] = pixels[:, -1] = (shade, shade, shade, 255)
        frames.append(Image.fromarray(pixels))
    data = io.BytesIO()
    more = {"append_images": frames[1:], "duration": milliseconds} if len(frames) > 1 else {}
    frames[0].save(data, "WEBP", save_all=len(frames) > 1, lossless=True, **more)
    return data.getvalue()


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def packages(folder):
    """The six packages, with two moving emoji, a still one, and one that has no name."""
    folder.mkdir(parents=True)
    names = {}
    for lang, rows in NAMES.items():
        skins = [{"hexcode": "270B-1F3FB", "label": rows[1][1] + TONES[lang]}]
        listed = [{"hexcode": code, "label": label, "tags": tags} for code, label, tags in rows]
        listed[1]["skins"] = skins
        names[f"{lang}/data.json"] = json.dumps(listed).encode()
    moving = {"assets/1f418.webp": webp([0, 60, 120], 500), "assets/ffff.webp": webp([0, 9], 500)}
    still = {"assets/1f418.webp": webp([0], 0), "assets/270b.webp": webp([50], 0)}
    parts = [names, still, moving, {"assets/270b-1f3fb.webp": webp([10, 200], 1000)}]
    parts += [{"assets/270b.webp": webp([5], 0)}, {}]
    for package, files in zip((emoji.NAMES, emoji.STILLS, *emoji.MOVING), parts, strict=True):
        name, version = package.rsplit("@", 1)
        archive(folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz", files)


def test_the_data_set_holds_what_moves_with_captions_in_both_languages(tmp_path):
    packages(tmp_path / "packages")
    assert emoji.write_emoji(tmp_path) == (2, 2)
    for folder, side in emoji.SIDES.items():
        rows = json.loads((tmp_path / folder / "metadata.json").read_text("utf-8"))
        films = {row["file_path"] for row in rows if row["type"] == "video"}
        assert films == {"films/1f418.mp4", "films/270b-1f3fb.mp4"}
        assert read_clip(tmp_path / folder / "films/1f418.mp4", 0, 17).shape == (17, side, side, 3)
    told = [row["text"] for row in rows if row["file_path"] == "films/270b-1f3fb.mp4"]
    assert told[:2] == [
        "raised hand, light skin tone",
        "an animated emoji of raised hand, light skin tone",
    ]
    assert "举起手，较浅肤色的动画表情" in told
    wordings = json.loads((tmp_path / "wordings.json").read_text("utf-8"))
    texts = json.loads((tmp_path / "texts" / "metadata.json").read_text("utf-8"))
    known = {row["text"] for row in [*rows, *texts]}
    assert [row["file_path"] for row in wordings] == sorted(films)
    for row in wordings:
        assert set(row["trained"].values()) <= known
        assert not set(row["held_out"].values()) & known


def test_frames_are_chosen_by_time_and_films_go_round():
    shades = [0, 60, 120]
    frames = emoji.frames_of(webp(shades, [125, 500, 125]), 8)  # 0.75 s
    expected = [shades[i] for i in (0, 1, 1, 1, 1, 2)]
    left = frames[:, 4, 1].astype(int).mean(-1)
    np.testing.assert_allclose(left, (expected * 3)[: emoji.FRAMES], atol=3)
    assert (frames[:, :, 5:7] == 255).all()  # transparent pixels are white
    assert emoji.frames_of(webp([7], 0), 8) is None


def test_captions_have_only_tags_that_say_more_and_fit():
    assert ELEPHANT.say("en", "{label}, {tags}") == "elephant, animal"
    assert ELEPHANT.say("zh", "{tags}：{label}") == "动物：大象"  # "大象" says nothing new
    bare = emoji.Emoji({"en": "fox"}, {"en": ("fox",)})
    assert bare.say("en", "{label}, {tags}") is None
    long = emoji.Emoji({"en": " ".join(["very"] * 14 + ["old"])}, {"en": ("one two", "three")})
    assert long.say("en", "{label}, {tags}") in (None, f"{long.labels['en']}, three")


@pytest.mark.parametrize(
    ("code", "point"),
    [("0023-FE0F-20E3", "23-20e3"), ("1f441-fe0f-200d-1f5e8", "1f441-200d-1f5e8"), ("a9", "a9")],
)
def test_code_points_of_all_packages_agree(code, point):
    assert emoji.plain(code) == point


def test_without_npm_the_missing_archive_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"npm is missing: .* emojibase-data-17\.0\.0\.tgz"):
        emoji.fetch(emoji.NAMES, tmp_path)


def test_what_npm_says_is_shown_when_it_fails(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho 404 no such package >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"cannot fetch nothing@1\.0\.0: 404 no such package"):
        emoji.fetch("nothing@1.0.0", tmp_path / "packages")


def test_a_stopped_npm_leaves_no_half_archive(tmp_path, monkeypatch):
    script = '#!/bin/sh\necho half > "$4/nothing-1.0.0.tgz"\nexit 1\n'
    (tmp_path / "npm").write_text(script)
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match="cannot fetch nothing"):
        emoji.fetch("nothing@1.0.0", tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


@pytest.mark.parametrize("bite", [lambda data: b"x", lambda data: data[: len(data) // 2]])
def test_a_damaged_archive_is_named_in_one_line(tmp_path, capsys, bite):
    packages(tmp_path / "packages")
    (broken,) = (tmp_path / "packages").glob("emojibase*")
    broken.write_bytes(bite(broken.read_bytes()))
    assert emoji.main(tmp_path) == 2
    assert f"{broken} is damaged" in (told := capsys.readouterr().err)
    assert "remove it to fetch it again" in told


def test_a_gallery_of_a_model_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    options = gallery.Options(model=tmp_path / "nothing")
    assert gallery.main(tmp_path / "out", options) == 2
    assert "nothing is no run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_rank_counts_what_is_nearer_than_the_one_asked_for():
    known = np.array([[0.0, 0], [1, 0], [2, 0], [9, 9]], np.float32)
    made = np.array([[0.1, 0], [0.9, 0.0], [8, 8]], np.float32)
    assert ranks(made, known, [0, 0, 1]).tolist() == [0, 1, 2]


def test_a_gallery_has_a_page_a_strip_and_films(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), dtype=np.uint8)
    films = [("<a> fox", frames), ("狐狸", frames)]
    page = gallery.write(tmp_path / "try", films, gallery.Options(prompts=("<a> fox",)), 3.2)
    text = page.read_text("utf-8")
    assert "&lt;a&gt; fox" in text and "狐狸" in text and text.count("<video") == 2
    assert np.asarray(Image.open(page.parent / "strip.png")).shape == (96, 64, 3)
    assert read_clip(page.parent / "1.mp4", 0, 17).shape == (17, 32, 32, 3)


def test_a_name_is_the_model_of_the_package_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_place("emoji") == FOLDER / "emoji"
    assert model_place("elsewhere").name == "elsewhere"
    assert lasting_name(Path("emoji")) == "emoji"
    assert lasting_name(Path("elsewhere")) == str(tmp_path / "elsewhere")
    (tmp_path / "emoji").mkdir()
    assert not model_place("emoji").is_absolute()
    assert lasting_name(Path("emoji")) == str(tmp_path / "emoji")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("emoji")


def test_the_model_makes_what_it_is_asked_for_in_both_languages(pipeline):
    prompts = ["an animated emoji of red heart", "红心的动画表情", "blue heart", "蓝心"]
    films = pipeline(prompts, steps=8, seed=[1, 2, 3, 4])
    assert films.shape == (4, 17, 96, 96, 3)
    drawn = films.min(axis=-1) < 200  # not the white around it
    red, _, blue = (films[..., c].astype(float) for c in range(3))
    warmer = [(red - blue)[row][drawn[row]].mean() for row in range(4)]
    assert min(warmer[:2]) > 60 and max(warmer[2:]) < -30


def test_the_model_goes_on_from_a_picture(pipeline):
    (film,) = pipeline(["red heart"], steps=8)
    again = pipeline("red heart", steps=8, seed=9, image=film[0])
    assert np.abs(again[0].astype(int) - film[0]).mean() < 12


def test_the_card_names_the_bytes_that_lie_beside_it():
    card = (FOLDER / "emoji" / "README.md").read_text("utf-8")
    parts = [path for path in sorted((FOLDER / "emoji").iterdir()) if path.is_dir()]
    assert parts and all(f"| {part.name} | `{fingerprint(part)}` |" in card for part in parts)
    assert sum(path.stat().st_size for path in (FOLDER / "emoji").rglob("*.*")) <= 16e6
