"""The base model of `make demo-control`: the long demo on an autoencoder that also learns edges.

The autoencoder shares its latents between clips, edges and clips with hidden frames. So the model
learns shapes more slowly than in the long demo, but its videos do reach a given end picture.
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
