"""What the package never does: run code that it was given, or listen where others can reach it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "easyanimate_jax").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"])
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "urllib", "requests"}
# The places that reach out: to the captioning or rewarding server that the command line names.
ALLOWED = {
    "easyanimate_jax/prepare/servers.py": "urllib.request",
    "easyanimate_jax/evaluation/rewards.py": "urllib.request",
}
CALLS = {"eval", "exec", "compile", "__import__"}


def forbidden(source: str) -> list[str]:
    """What in a file may not be there, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [(node.lineno, name) for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = f"{node.value.id}.{node.attr}"
            if whole.startswith("pickle.") and whole != "pickle.UnpicklingError":
                found.append((node.lineno, whole))
            if whole in ("os.system", "os.popen"):
                found.append((node.lineno, whole))
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        constants = {k: v.value for k, v in keywords.items() if isinstance(v, ast.Constant)}
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in CALLS:
            found.append((node.lineno, name))
        if method == "load" and ast.unparse(node.func) == "torch.load":
            found += [(node.lineno, "torch.load")] * (constants.get("weights_only") is not True)
        if method in ("extractall", "extract") and constants.get("filter") != "data":
            found.append((node.lineno, method))
        # A socket's takes no keywords, that of a primitive of JAX has some.
        if method == "bind" and not keywords and "127.0.0.1" not in ast.unparse(node):
            found.append((node.lineno, "bind"))
        if ast.unparse(node.func) == "av.open" and isinstance(
            node.args[0], ast.Constant | ast.Call
        ):
            found.append((node.lineno, "av.open of a name"))
        switches = ("shell", "trust_remote_code", "allow_pickle")
        found += [(node.lineno, switch) for switch in switches if constants.get(switch) is True]
    return [f"line {line}: {what}" for line, what in found]


@pytest.mark.reliability  # R15
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix())
    found = forbidden(path.read_text())
    assert [line for line in found if allowed is None or not line.endswith(allowed)] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)",
        "import yaml",
        "from urllib.request import urlopen",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "tar.extractall(folder)",
        "server.bind(('0.0.0.0', 80))",
        "av.open(str(path))",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert forbidden(line)
