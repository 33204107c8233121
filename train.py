"""Train: `python train.py configs/demo.py [--stages.0.steps 10 ...]`.

With `--describe` the whole schedule is printed and no device is touched.
"""

import os
import sys


def main(args: list[str]) -> int:
    describe = "--describe" in args
    if describe:
        args = [a for a in args if a != "--describe"]
        os.environ["JAX_PLATFORMS"] = "cpu"
    if not args or args[0].startswith("-"):
        print("usage: python train.py CONFIG [--describe] [--field value ...]", file=sys.stderr)
        return 2
    import jax

    from easyanimate_jax import config as configs

    try:
        config = configs.load(args[0], args[1:])
        if describe:
            from easyanimate_jax.describe import describe_run

            print(describe_run(config))
            return 0
        if isinstance(config, configs.VAETrainConfig):
            from easyanimate_jax.training import vae

            vae.train(config)
            return 0
        if "JAX_COORDINATOR_ADDRESS" in os.environ:
            jax.distributed.initialize()
        from easyanimate_jax import trainer

        return trainer.train(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
