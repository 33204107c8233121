"""The command line: `python -m easyanimate_jax VERB ...`, or `easyanimate-jax VERB ...`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from easyanimate_jax.training.safety.exits import BAD_INPUT, BROKEN_PIPE, DONE

VERBS = {
    "train": "train a transformer by the stages of a config, or resume",
    "vae-train": "train a video autoencoder",
    "text": "train two small text encoders on captions",
    "sample": "generate videos and pictures from a run",
    "evaluate": "measure a model on captioned clips",
    "calibrate": "measure how a model's residual changes, for MagCache",
    "pairs": "make rated pairs of videos to train a preference on",
    "serve": "generate videos for clients over HTTP",
    "describe": "print the schedule of a config without a device",
    "plan": "print which clips make the steps of a config",
    "sources": "print the contents of a source of clips",
    "curate": "cut and score films into a table of clips",
    "control": "write the control videos of a folder of clips",
    "prepare": "encode the clips of a config to records",
    "convert": "convert weights between the PyTorch layouts and ours",
    "checkpoint": "list, verify and compare the checkpoints of a run",
    "doctor": "examine the hosts of a run",
    "speed": "print the speed of a run, measured and predicted",
    "aot": "predict memory and time of a config on a pod, without the pod",
    "supervise": "start, watch and restart the processes of a run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code. By default the arguments are those of the process.

    A reader that closes our output, such as `head`, ends the verb without a word.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
        return BROKEN_PIPE
    return code


def _run(arguments: Sequence[str] | None) -> int:
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help"):
        print(usage())
        return DONE
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=3, cutoff=0)
        print(
            f"error: there is no verb {verb!r}; the nearest are {', '.join(nearest)}"
            if verb
            else f"error: give a verb: {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return BAD_INPUT
    module = importlib.import_module(f"easyanimate_jax.commands.{verb.replace('-', '_')}")
    return module.main(rest)


def usage() -> str:
    """Return the help text: one line per verb."""
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: python -m easyanimate_jax VERB [options]",
            "",
            *lines,
            "",
            "`VERB --help` lists the options of a verb, `train CONFIG --help` those of a config.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
