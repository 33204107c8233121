"""The 12B with 24 heads of 128 for pretraining from scratch on TPU: the same width and parameters.

A head of 64 half-fills a 128-wide matrix unit. Released weights keep 48 heads of 64.
"""

from dataclasses import replace

from configs.v5_12b import config as v5_12b

config = replace(v5_12b, run="runs/tpu_12b", model=replace(v5_12b.model, heads=24, head_width=128))
