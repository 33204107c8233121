"""Train small text encoders on captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.commands.jax_settings import set_up_jax
from easyanimate_jax.text.train_config import TextTrainConfig
from easyanimate_jax.training.safety.exits import DONE

HELP = """Train small text encoders on captions, and write them in the released layout."""


@dataclass(frozen=True)
class Options:
    """The arguments of `text`."""

    source: Positional[Path]
    """Folder with a metadata.json; a file may have captions in several languages."""
    out: Positional[Path]
    """Folder to write the two encoders and their tokenizers to."""
    training: OmitArgPrefixes[TextTrainConfig] = TextTrainConfig()
    """Sizes of the encoders, and their training options."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `text`; return the exit code."""
    set_up_jax()
    return parse.run(partial(_train, arguments))


def _train(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "text", HELP)
    parse.check_folder("OUT", own.out)
    from easyanimate_jax.text.train import train

    train(own.source, own.out, own.training)
    return DONE
