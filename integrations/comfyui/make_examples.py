"""Write the workflows of `api_workflows/` in the form of ComfyUI's page, by that page itself.

ComfyUI's browser of templates shows the files of `example_workflows/`. Start ComfyUI with this pack
and with `film.mp4`, `start.png` and `mask.png` in its folder `input`, and install Playwright and
Chromium. Each file is loaded into the page, arranged and saved; then it is loaded again, and its
prompt must be that of `api_workflows/`.

    python make_examples.py http://127.0.0.1:8188 /usr/bin/chromium
"""

import json
import sys
import uuid
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
READY = "() => !!window.LiteGraph?.registered_node_types?.EasyAnimateJAXServer && !!app.graph"
SAVE = "() => JSON.stringify(app.graph.serialize())"  # as text: without what is undefined
PROMPT = "async () => JSON.stringify((await app.graphToPrompt()).output)"
FIXED = """() => app.graph.nodes.forEach(node => node.widgets?.forEach(widget => {
  if (widget.name == "control_after_generate") widget.value = "fixed"; }))"""
GAP, TITLE = 60, 30  # pixels between nodes, and of a node's title


def main(address: str, chromium: str) -> None:
    """Write and check every file."""
    with sync_playwright() as started:
        options = {"executable_path": chromium, "args": ["--no-sandbox", "--disable-gpu"]}
        page = started.chromium.launch(**options).new_page(viewport={"width": 1600, "height": 1000})
        page.goto(address)
        page.wait_for_function(READY, timeout=120_000)
        for path in sorted((HERE / "api_workflows").glob("*.json")):
            prompt = json.loads(path.read_text())
            graph = arranged(page, prompt, path.stem)
            target = HERE / "example_workflows" / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(graph, indent=1) + "\n")
            check(page, graph, prompt, path.name)
            print(path.name)


def arranged(page, prompt: dict, name: str) -> dict:
    """Return the graph that the page makes of a prompt, with the nodes side by side."""
    page.evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])
    page.wait_for_timeout(1000)  # widgets of several lines get their height when they are drawn
    page.evaluate(FIXED)  # else the seed changes with every run
    page.evaluate(f"() => app.graph.arrange({GAP})")
    graph = json.loads(page.evaluate(SAVE))
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"easyanimate_jax/{name}"))
    return graph


def check(page, graph: dict, prompt: dict, name: str) -> None:
    """Raise ValueError if the saved graph overlaps, or is another workflow than the prompt."""
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            if x < x2 + w2 and x2 < x + w and y - TITLE < y2 + h2 and y2 - TITLE < y + h:
                raise ValueError(f"{name}: two nodes overlap")
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(500)
    read = json.loads(page.evaluate(PROMPT))
    for node in read.values():
        node.pop("_meta")
        node["inputs"].pop("video-preview", None)  # the page's own, of LoadVideo
    if read != prompt:
        raise ValueError(f"{name}: the page makes {json.dumps(read)} of it")


if __name__ == "__main__":
    main(*sys.argv[1:])
