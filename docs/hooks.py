"""Fit the pages of docs/ to the site; mkdocs calls the functions `on_...` (mkdocs.yml: hooks).

Pages are written so that every link works on GitHub. On the site, a link to a file that is no page
of it becomes the address of that file in the repository, and a link from a Chinese page to an
English one leads to the English site, one folder higher. A link to a missing file is a warning,
which ends a strict build. The English site also gets the pages that docs/reference.py makes from
the code, and copies of two files of the root.

`site:NAME` stands for an address below the root of both sites until a page is written.
"""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from posixpath import relpath
from urllib.parse import urlsplit

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COPIES = {"project/changes.md": "CHANGELOG.md", "project/contributing.md": "CONTRIBUTING.md"}
MADE = "reference"  # pages below it that no file holds
LOG = logging.getLogger("mkdocs.hooks.site")

# Code has no links: fenced blocks and what stands between backticks.
CODE = re.compile(r"(^ *(`{3,}).*?^ *\2 *$|(`+)(?!`).+?(?<!`)\3(?!`))", re.S | re.M)
LINK = re.compile(r"(\]\()([^)\s]+)")
HELD = re.compile(r'((?:href|src)=")site:')


def on_config(config):
    """Let the navigation of the Chinese site show English pages where it has none of its own.

    404.html keeps the addresses that the language switch gets here.
    """
    for other in config.extra["alternate"]:
        other["link"] = f"site:{'zh/' * (other['lang'] == 'zh')}index.html"
    if _is_chinese(config):
        config.nav = [_own_or_english(entry) for entry in config.nav]
    return config


def on_files(files, config):
    """Add the pages of the English site that are not in docs/."""
    if _is_chinese(config):
        return files
    for name, text in made().items():
        files.append(File.generated(config, name, content=text))
    for name, source in COPIES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Return the text of a page with links that work on the site."""
    own = page.file.src_uri
    source = ROOT / COPIES[own] if own in COPIES else Path(config.docs_dir) / own
    if own == f"{MADE}/index.md":
        titles = {f.src_uri: f.src_uri for f in files if _is_made(f.src_uri)}
        markdown += "".join(f"* [{_title(n)}]({relpath(n, MADE)})\n" for n in sorted(titles))

    def fit(match):
        target = _fitted(match[2], own, source, config, files)
        return match[1] + target

    parts = CODE.split(markdown)
    texts = parts[:: CODE.groups + 1]
    codes = parts[1 :: CODE.groups + 1]
    fitted = [LINK.sub(fit, text) for text in texts]
    return "".join(a + b for a, b in zip(fitted, [*codes, ""], strict=True))


def on_page_context(context, page, config, nav):
    """Let the language switch lead to the same page, if the other language has it."""
    for other in config.extra["alternate"]:
        folder = "zh/" if other["lang"] == "zh" else ""
        there = (DOCS / folder / page.file.src_uri).is_file() or not folder
        other["link"] = f"site:{folder}{page.url if there else 'index.html'}"
    return context


def on_post_page(output, page, config):
    """Return the HTML of a page with relative addresses for `site:`."""
    depth = page.url.count("/") + _is_chinese(config)
    return HELD.sub(rf"\g<1>{'../' * depth}", output)


def on_post_template(output_content, template_name, config):
    """Return the HTML of 404.html, which may be shown at any address: links begin at the root."""
    root = urlsplit(config.site_url or "/").path.removesuffix("zh/")
    return HELD.sub(rf"\g<1>{root}", output_content)


def made() -> dict[str, str]:
    """Return the text of each page that is made from the code, by its name below docs/."""
    # A process of its own, because commands set up logging, signals and JAX.
    command = [sys.executable, str(DOCS / "reference.py")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _fitted(link: str, own: str, source: Path, config, files) -> str:
    """Return the link of the page `own`, whose text is that of the file `source`, on the site."""
    name, sign, anchor = link.partition("#")
    if not name or re.match(r"[a-z]+:", name):
        return link
    target = Path(os.path.normpath(source.parent / name))
    page = _page_of(target, Path(config.docs_dir))
    if page and (file := files.get_file_from_path(page)) and file.inclusion.is_included():
        return relpath(page, os.path.dirname(own)) + sign + anchor
    if not target.is_relative_to(ROOT) or not target.exists():
        LOG.warning("%s links to %s, which does not exist", own, link)
        return link
    if _is_chinese(config) and (page := _page_of(target, DOCS)) and _is_english(page):
        return f"site:{page.removesuffix('.md') + '.html' * page.endswith('.md')}{sign}{anchor}"
    kind = "tree" if target.is_dir() else "blob"
    place = target.relative_to(ROOT).as_posix()
    return f"{config.extra['repository']}/{kind}/main/{place}{sign}{anchor}"


def _page_of(target: Path, docs: Path) -> str | None:
    """Return the name below `docs` under which a site with that folder holds a file, if it may."""
    for name, source in COPIES.items():
        if target == ROOT / source:
            return name
    return target.relative_to(docs).as_posix() if target.is_relative_to(docs) else None


def _is_english(page: str) -> bool:
    """Return True if the English site shows the file: a page or a picture."""
    return page in COPIES or (page.endswith((".md", ".png", ".svg", ".webp")) and page[:3] != "zh/")


def _is_chinese(config) -> bool:
    return config.theme["language"] == "zh"


def _is_made(name: str) -> bool:
    return name.startswith(f"{MADE}/") and not (DOCS / name).is_file()


def _title(name: str) -> str:
    return Path(name).stem.capitalize()


def _own_or_english(entry):
    """Return an entry of the navigation whose missing pages are links to the English site."""
    if isinstance(entry, str):
        return entry
    ((title, value),) = entry.items()
    if isinstance(value, list):
        return {title: [_own_or_english(one) for one in value]}
    if (DOCS / "zh" / value).is_file():
        return entry
    return {f"{title} (English)": f"site:{value.removesuffix('.md')}.html"}
