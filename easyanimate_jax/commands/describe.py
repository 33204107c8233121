"""Print the schedule of a config: `python -m easyanimate_jax describe CONFIG`."""

from easyanimate_jax.commands import train


def main(arguments: list[str]) -> int:
    return train.main([*arguments, "--describe"])
