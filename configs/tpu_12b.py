"""The 12B with 24 heads of 128 for pretraining from scratch on TPU, with the same width.

The number of parameters is the same too. A head of 64 uses half of a matrix unit 128 wide. The
released weights need 48 heads of 64.
"""

from dataclasses import replace

from configs.v5_12b import config as v5_12b

config = replace(v5_12b, run="runs/tpu_12b", model=replace(v5_12b.model, heads=24, head_width=128))
