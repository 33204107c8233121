"""Train: `python train.py configs/demo.py` runs the verb `train` of the command line."""

import sys

from easyanimate_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
