"""Sample: `python sample.py RUN --prompt TEXT` runs the verb `sample` of the command line."""

import sys

from easyanimate_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
