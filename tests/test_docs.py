"""The pages: short where they promise it, true where they name files, functions and sections."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "easyanimate_jax"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]

BLOCK = re.compile(r"^( *)```.*?^\1```", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# A number with a unit, or a decimal number that is not the name of a version.
FIGURE = re.compile(
    r"\d\s*(?:%|(?:[KMGT]i?B|m?s|min|hours?|minutes?|seconds?|d[bB]|times|TFLOP\S*|pixels)\b)"
    r"|(?<![\w.])(?<!Python )(?<!Python 3\.11 to )(?<!Apache-)\d+\.\d+"
)

# "spec 4.1", "spec 9.1, 9.2", "Spec 8.3 to 8.5", "sections 4.5 and 6 of the specification",
# and, where a docstring goes on, "(6.2)".
NUMBER = r"\d{1,2}(?:\.\d{1,2})?"
NUMBERS = rf"{NUMBER}(?:(?:, | and | to ){NUMBER})*"
CITED = re.compile(
    rf"\b[Ss]pec ({NUMBERS})\b|[Ss]ections? ({NUMBERS}) of the specification"
    r"|(?:^|(?<=\w ))\((\d{1,2}\.\d{1,2})\)(?=[.,:\"]|$)",
    re.M,
)
ROW = re.compile(r"\b[Ss]pec 12, (?:row )?(\d+)\b")
CITING = ("easyanimate_jax", "demos", "configs", "benchmarks", "tests")

STOP = re.compile(r"`([\w/]+\.py):(\w+(?:\.\w+)?)`")


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def cells(text: str) -> list[str]:
    """The cells of all tables, as they are shown: without the targets of links."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [re.sub(r"\]\([^)]*\)", "]", cell) for row in rows for cell in row.strip("|").split("|")]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def headings(spec: str) -> set[str]:
    return set(re.findall(rf"^#+ ({NUMBER})\.? ", spec, re.M))


def cited(text: str) -> set[str]:
    """The sections that a text names; a row of section 12 is none."""
    found = (
        "".join(filter(None, match.groups())) for match in CITED.finditer(ROW.sub("spec 12", text))
    )
    return {number for one in found for number in re.findall(NUMBER, one)}


def sources() -> dict[str, str]:
    """The text of every file that may cite the specification; this one cites what is not there."""
    paths = [path for room in CITING for path in sorted((ROOT / room).rglob("*.py"))]
    paths.remove(Path(__file__))
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def defined(path: Path) -> set[str]:
    """The functions and classes of a module, and the methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{x.name}" for x in node.body if isinstance(x, ast.FunctionDef)}
    return names


def test_the_readme_is_a_door():
    text = prose(README)
    assert len(re.findall(r"\w+", text)) <= 900
    assert max(len(re.findall(r"\w+", cell)) for cell in cells(text)) <= 12
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_readme_holds_no_measured_figure():
    """Figures are in docs/results.md alone."""
    text = re.sub(r"\]\([^)]*\)", "]", README.read_text())
    assert [text[m.start() - 20 : m.end() + 9] for m in FIGURE.finditer(text)] == []
    for figure in ("17 min", "24.6 dB", "0.97", "35 %", "7.3 GiB", "2 times", "100 ms"):
        assert FIGURE.search(f"it was {figure} here"), figure
    for name in ("V5.1", "Python 3.11 to 3.13", "12B", "two cores"):
        assert not FIGURE.search(f"it is {name} here"), name


def test_every_result_has_a_date_a_machine_and_a_command():
    machines = r", (CPU|GPU|Compiler|CI|arithmetic)\b"
    rows = [line for line in (DOCS / "results.md").read_text().splitlines() if line[:2] == "| "]
    rows = [row for row in rows if not row.startswith("| what |")]
    assert len(rows) > 100
    for row in rows:
        how = row.strip("| ").rsplit(" | ", 1)[1]
        assert re.match(r"20\d\d-\d\d-\d\d, ", how) and re.search(machines, how), row
        assert re.search(r"`|\]\(|, the same|, a profile|, an earlier", how), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = prose(page)
    links = [link for link in LINK.findall(text) if not re.match(r"https?:", link)]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_the_pages_on_pods_hold_the_table_of_the_figures(monkeypatch):
    """In both languages; a star marks figures of earlier code, which only a long trace tells."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the script sets for good
    from benchmarks.pods import tables

    monkeypatch.setattr(tables, "fingerprint", lambda name: tables.read(name)["made_of"])
    table = tables.tables()
    assert len(table.splitlines()) > 40
    for page in tables.PAGES:
        text = page.read_text("utf-8").replace(" * |", " |")
        assert f"{tables.BEGIN}\n{table}\n{tables.END}\n" in text, page
    assert [page.name for page in tables.PAGES] == ["pods.md", "pods.md"]


def test_every_cited_section_exists():
    spec = (DOCS / "spec.md").read_text()
    known, rows = headings(spec), re.findall(r"^\| (\d+) \|", spec[spec.index("## 12.") :], re.M)
    unknown = {
        name: bad
        for name, text in sources().items()
        if (bad := (cited(text) - known) | (set(ROW.findall(text)) - set(rows)))
    }
    assert unknown == {}


def test_a_section_that_does_not_exist_is_seen():
    spec = (DOCS / "spec.md").read_text()
    assert {"0", "2.5", "9.4", "12", "13"} <= headings(spec)
    text = """x = 1  # spec 4.1
    \"\"\"Follows sections 4.5 and 6 of the specification, and spec 9.1, 9.2; Spec 8.3 to 8.5.
    Several of them (6.2).  f(0.5), (spec 12, row 4), (spec 99.9)\"\"\"
    """
    expected = {"4.1", "4.5", "6", "9.1", "9.2", "8.3", "8.5", "6.2", "12", "99.9"}
    assert cited(text) == expected
    assert cited(text) - headings(spec) == {"99.9"}
    assert len({number for text in sources().values() for number in cited(text)}) > 30


def test_the_walks_stop_at_functions_that_exist():
    stops = STOP.findall((DOCS / "architecture.md").read_text())
    assert len(stops) > 40
    for file, name in stops:
        assert (PACKAGE / file).is_file(), file
        assert name in defined(PACKAGE / file), f"{file}:{name}"


def test_the_readme_s_python_makes_a_video(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    frames = names["frames"]
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    assert str(frames.shape) in capsys.readouterr().out
    assert np.array(Image.open("last.png")).shape == frames.shape[1:]
