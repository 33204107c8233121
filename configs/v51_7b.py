"""EasyAnimateV5.1 7B."""

from dataclasses import replace

from configs.v51_12b import config as v51_12b

config = replace(v51_12b, run="runs/v51_7b", model=replace(v51_12b.model, depth=36, mmdit_depth=18))
