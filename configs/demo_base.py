"""What `make demo-control` begins with: the long demo on an autoencoder that keeps what is given.

Edges and single pictures among black ones share its latents, so shapes are learned more slowly than
in the long demo, and an end picture is reached.
"""

from dataclasses import replace

from configs.demo_long import config as demo

config = replace(
    demo,
    source="runs/demo_base/data",
    prepared="runs/demo_base/latents",
    vae="runs/demo_base/vae",
    text="runs/demo_base/text",
    run="runs/demo_base/train",
    stages=tuple(replace(s, steps=1000) if s.name == "medium_i2v" else s for s in demo.stages),
)
