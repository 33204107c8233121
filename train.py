"""Train: `python train.py configs/demo.py`; the verb `train` of the one command."""

import sys

from easyanimate_jax.commands.train import run

if __name__ == "__main__":
    run(sys.argv[1:])
