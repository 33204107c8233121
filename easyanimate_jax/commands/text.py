"""Train two small text encoders on captions."""

from pathlib import Path

import tyro

from easyanimate_jax.text.train import TextTrainConfig, train


def main(arguments: list[str]) -> int:
    tyro.cli(_train, args=arguments, prog="python -m easyanimate_jax text")
    return 0


def _train(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    config: tyro.conf.OmitArgPrefixes[TextTrainConfig],
) -> None:
    """Train two small text encoders on the captions of SOURCE into OUT."""
    train(source, out, config)
