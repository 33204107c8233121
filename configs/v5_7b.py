"""EasyAnimateV5 7B: the upper 18 of its 36 blocks share weights between text and video."""

from dataclasses import replace

from configs.v5_12b import config as v5_12b

config = replace(v5_12b, run="runs/v5_7b", model=replace(v5_12b.model, depth=36, mmdit_depth=18))
