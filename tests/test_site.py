"""The site of the documentation: it builds without a warning, offline, and its links are whole."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import yaml
from mkdocs.structure.files import File, Files

from easyanimate_jax.__main__ import VERBS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIGS = {"en": ROOT / "mkdocs.yml", "zh": ROOT / "mkdocs.zh.yml"}
LOADED = {"script", "img", "iframe", "source", "video", "audio", "embed", "object"}
LOADING = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch"}


class Yaml(yaml.SafeLoader):
    """YAML whose own tags (an environment variable, a Python function) are read as None."""


Yaml.add_multi_constructor("", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def hooks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("hooks")


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("reference")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Both sites as `make site` builds them, in a temporary folder; and what was printed."""
    folder, said = tmp_path_factory.mktemp("site"), ""
    for language, config in CONFIGS.items():
        out = folder / ("zh" if language == "zh" else ".")
        words = ["build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", *words],
            env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
            capture_output=True,
            text=True,
        )
        said += done.stderr + done.stdout
        assert done.returncode == 0, said[-4000:]
    return folder, said


def pages_in(language: str) -> list[str]:
    """The Markdown files of a language, as its navigation names them."""
    folder = DOCS / "zh" if language == "zh" else DOCS
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*.md")]
    return [name for name in found if language == "zh" or not name.startswith("zh/")]


def navigation(language: str) -> list[str]:
    def names(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for one in entry.values() if isinstance(entry, dict) else entry:
                yield from names(one)

    return list(names(yaml.load(CONFIGS[language].read_text("utf-8"), Yaml)["nav"]))


class Html(HTMLParser):
    """The anchors of a page, its links to follow, and the addresses that it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in LOADED:
            self.loads += [given[name] for name in ("src", "data", "srcset") if given.get(name)]
        elif tag == "link" and set((given.get("rel") or "").split()) & LOADING:
            self.loads.append(given["href"])
        elif given.get("href"):
            self.links.append(given["href"])


def read(folder: Path) -> dict[Path, Html]:
    return {path: Html(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}


def dead(folder: Path) -> list[str]:
    """The links and loaded addresses of a site's pages that lead to no file or no anchor of it."""
    pages, found = read(folder), []
    for path, page in pages.items():
        for link in page.links + page.loads:
            if re.match(r"(?!site:)[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            # 404.html is shown at any address, so its addresses begin at the root.
            absolute = path.name == "404.html" and name.startswith("/")
            start = folder if absolute else path.parent
            target = Path(os.path.normpath(start / unquote(name.removeprefix("/" * absolute))))
            target = target / "index.html" if target.is_dir() else target
            target = target if name else path
            there = target.is_file()
            if not there or (anchor and unquote(anchor) not in pages[target].ids):
                found.append(f"{path.name}: {link}")
    return found


def test_every_page_is_in_the_navigation_once():
    made = {"commands", "configs", "python", "http"}
    made = {f"reference/{name}.md" for name in made}
    copies = {"project/changes.md", "project/contributing.md"}
    english = navigation("en")
    assert sorted(english) == sorted({*pages_in("en"), *made, *copies})
    chinese = navigation("zh")
    assert set(pages_in("zh")) <= set(chinese) and len(set(chinese)) == len(chinese)
    assert set(chinese) <= set(english)  # what docs/zh/ lacks is shown in English


def test_lists_are_indented_for_both_readers():
    """GitHub takes three spaces before a part of a list's item, the site only four."""
    found = [f"{path}:{n}" for path in DOCS.rglob("*.md") for n in unlike(path.read_text("utf-8"))]
    assert found == []
    assert unlike("1. x\n\n   y") == [3] and unlike("1. x\n   * y\n   z") == [2]
    assert unlike("1. x\n   y\n\n    z\n") == unlike("```\n\n  * y\n```\n") == []


def unlike(text: str) -> list[int]:
    """The numbers of the lines that both readers place in different lists."""
    found, code, last = [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        part = re.match(r" {1,3}(?:[*-] |\d+\. |```|\|)", line) or not last.strip()
        if not code and part and re.match(r" {1,3}\S", line):
            found.append(number)
        code ^= line.strip().startswith("```")
        last = line
    return found


def test_links_are_fitted_to_the_site(hooks, caplog):
    def fit(link: str, own: str, language: str = "en") -> str:
        docs = DOCS / "zh" if language == "zh" else DOCS
        config = SimpleNamespace(
            docs_dir=str(docs), theme={"language": language}, extra={"repository": "R"}
        )
        files = Files([File(name, str(docs), "site", False) for name in pages_in(language)])
        if language == "en":
            files.append(File("project/changes.md", str(docs), "site", False))
        page = SimpleNamespace(file=SimpleNamespace(src_uri=own))
        return hooks.on_page_markdown(f"[x]({link})", page, config, files)[4:-1]

    assert fit("data.md#pairs", "serve.md") == "data.md#pairs"
    assert fit("../data.md", "tutorial/try.md") == "../data.md"
    assert fit("../configs/demo.py", "data.md") == "R/blob/main/configs/demo.py"
    assert fit("launch/jobset.yaml", "pods.md") == "R/blob/main/docs/launch/jobset.yaml"
    assert fit("launch", "pods.md") == "R/tree/main/docs/launch"
    assert fit("../CHANGELOG.md#unreleased", "data.md") == "project/changes.md#unreleased"
    assert fit("docs/data.md", "project/changes.md") == "../data.md"
    assert fit("https://x.org/a.md", "data.md") == "https://x.org/a.md"
    assert fit("../results.md#lora", "finetune.md", "zh") == "site:results.html#lora"
    assert fit("../../pictures/plan.svg", "concepts/plan.md", "zh") == "site:pictures/plan.svg"
    assert fit("../../CONTRIBUTING.md", "data.md", "zh") == "site:project/contributing.html"
    assert fit("../../README.zh.md", "index.md", "zh") == "R/blob/main/README.zh.md"
    assert fit("data.md", "index.md", "zh") == "data.md"
    assert not caplog.records
    assert fit("no_such.md", "data.md") == "no_such.md"
    assert "no_such.md, which does not exist" in caplog.text


def test_code_has_no_links(hooks):
    config = SimpleNamespace(
        docs_dir=str(DOCS), theme={"language": "en"}, extra={"repository": "R"}
    )
    page = SimpleNamespace(file=SimpleNamespace(src_uri="data.md"))
    link = "[a](../setup.py)"
    text = f"`{link}`\n\n```\n{link}\n```\n\n    ```\n    {link}\n    ```\n"
    assert hooks.on_page_markdown(text, page, config, Files([])) == text
    assert "R/blob" in hooks.on_page_markdown(f"{text}{link}", page, config, Files([]))


def test_the_reference_has_every_field_of_every_config(reference):
    import easyanimate_jax as ea

    kinds = {kind.__name__: kind for kind in reference.config_classes()}
    assert {"TrainConfig", "VAETrainConfig", "Stage", "Budget", "Flow", "DDPM"} <= set(kinds)
    for name, kind in kinds.items():
        assert getattr(ea, name) is kind, f"{name} is no public name"
        rows = {row[0].strip("`"): row for row in reference.fields_of(kind)}
        assert set(rows) == set(kind.__dataclass_fields__), name
        for field, (_, hint, default, span, meaning) in rows.items():
            assert meaning, f"{name}.{field}"
            assert span or not re.search(r"\b(int|float)\b", hint), f"{name}.{field}"
            real = kind.__dataclass_fields__[field]
            required = {real.default, real.default_factory} == {dataclasses.MISSING}
            assert (default == "required") == required, f"{name}.{field}"
    rows = {row[0]: row for row in reference.fields_of(ea.TrainConfig)}
    assert rows["`keep`"][1:4] == ("`int`", "`3`", "[1, inf)")
    assert rows["`source`"][2] == "required"


def test_the_reference_has_every_public_name(reference):
    import easyanimate_jax as ea

    text = reference.python()
    for name in ea._HOME:
        value = getattr(ea, name)
        whole = f"::: {value.__module__}.{value.__qualname__}\n"
        assert whole in text + "\n" or f"[{name}](configs.md#" in text, name


def test_the_reference_has_every_verb_and_route(site):
    folder, _ = site
    page = (folder / "reference" / "commands.html").read_text("utf-8")
    assert all(f'<h2 id="{verb}">' in page for verb in VERBS) and "--weights-of" in page
    page = (folder / "reference" / "http.html").read_text("utf-8")
    sources = "".join(path.read_text() for path in (ROOT / "easyanimate_jax/serving").glob("*.py"))
    routes = re.findall(r'@app\.(get|post|delete)\("(/(?:v1|healthz|metrics)[^"]*)"', sources)
    assert len(routes) >= 10
    assert all(f"{method.upper()} {path}<" in page for method, path in routes)


def test_the_sites_build_without_a_warning(site):
    _, said = site
    assert "WARNING" not in said and "ERROR" not in said


def test_the_site_has_every_page(site):
    folder, _ = site
    for language in CONFIGS:
        top = folder / "zh" if language == "zh" else folder
        own = pages_in(language) if language == "zh" else navigation(language)
        for name in own:
            assert (top / name).with_suffix(".html").is_file(), name


def test_the_site_has_no_dead_link_and_loads_nothing_from_elsewhere(site):
    folder, _ = site
    pages = read(folder)
    assert len(pages) > 50 and sum(len(page.links) for page in pages.values()) > 3000
    assert dead(folder) == []
    foreign = re.compile(r"(?:[a-z]+:)?//", re.I)
    assert [a for page in pages.values() for a in page.loads if foreign.match(a)] == []
    for path in folder.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//|@import", path.read_text("utf-8")), path


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "b.html").write_text('<h1 id="here">x</h1>')
    links = ["b.html", "b.html#here", "b.html#gone", "c.html", "https://x.org", "site:b.html"]
    text = "".join(f'<a href="{link}">x</a>' for link in links) + '<img src="no.png">'
    (tmp_path / "a.html").write_text(text)
    expected = ["a.html: b.html#gone", "a.html: c.html", "a.html: site:b.html", "a.html: no.png"]
    assert dead(tmp_path) == expected
    assert Html('<script src="https://x/y.js"></script>').loads == ["https://x/y.js"]


def test_the_language_switch_leads_to_the_same_page(site):
    folder, _ = site
    switch = re.compile(r'<a href="([^"]+)" hreflang="(\w+)"')
    found = {}
    for name in ("data.html", "zh/data.html", "concepts/plan.html", "zh/concepts/plan.html"):
        links = switch.findall((folder / name).read_text("utf-8"))
        at = (folder / name).parent
        found[name] = {b: os.path.relpath(os.path.normpath(at / a), folder) for a, b in links}
    for name in ("data.html", "concepts/plan.html"):
        assert found[name] == found[f"zh/{name}"] == {"en": name, "zh": f"zh/{name}"}
    only_english = dict(switch.findall((folder / "results.html").read_text("utf-8")))
    assert only_english["zh/index.html"] == "zh"


def test_the_search_finds_chinese_words_and_english_ones(site):
    folder, _ = site
    for top, language, word, page in (
        ("", "en", "bucket", "concepts/tokens.html"),
        ("zh/", "zh", "检查点", "concepts/checkpoints.html"),
        ("zh/", "zh", "微调", "finetune.html"),
    ):
        index = json.loads((folder / f"{top}search/search_index.json").read_text("utf-8"))
        assert language in index["config"]["lang"]
        cut = re.compile(index["config"]["separator"])
        hits = {
            entry["location"].partition("#")[0]
            for entry in index["docs"]
            if word in cut.split(re.sub("<[^>]+>", " ", f"{entry['title']} {entry['text']}"))
        }
        assert page in hits, (word, sorted(hits))
