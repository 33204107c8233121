"""The one command: `python -m easyanimate_jax VERB ...`; without a verb it lists them."""

import importlib
import sys

VERBS = {
    "train": "run a staged schedule, or go on with it",
    "sample": "make videos and pictures from a checkpoint",
    "describe": "print the whole schedule of a config, without a device",
    "prepare": "encode the clips of a config to records",
    "curate": "cut and score films into a table of clips",
    "sources": "say what a source of clips holds",
    "plan": "print the plans of a config's stages",
    "control": "write the control videos of a folder of clips",
    "convert": "convert weights between PyTorch's layouts and ours",
    "doctor": "examine the hosts of a run",
    "aot": "say what a stage needs of a pod, without the pod",
    "supervise": "start the processes of a run, watch and restart them",
    "checkpoint": "list, verify and compare checkpoints",
    "text": "train two small text encoders on captions",
    "vae-train": "train a video autoencoder",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in VERBS:
        width = max(map(len, VERBS))
        lines = [f"  {verb.ljust(width)}  {text}" for verb, text in VERBS.items()]
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        stream = sys.stdout if asked else sys.stderr
        print("usage: python -m easyanimate_jax VERB ...", *lines, sep="\n", file=stream)
        return 0 if asked else 2
    verb, *rest = arguments
    name = verb.replace("-", "_")
    return importlib.import_module(f"easyanimate_jax.commands.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
