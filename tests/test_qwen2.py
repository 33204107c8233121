"""Qwen2-VL's language model equals transformers', padded rows are the old ones, chats are exact."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from easyanimate_jax.data.records import read_texts, write_texts
from easyanimate_jax.prepare import TextStates, fingerprint
from easyanimate_jax.sharding import MeshConfig, make_mesh, shardings
from easyanimate_jax.text.encode import BATCH, CHAT, Chat, TextConfig, TextEncoder
from easyanimate_jax.text.qwen2 import Qwen2, Qwen2Config, load_qwen2

BYTES = sorted(transformers.models.gpt2.tokenization_gpt2.bytes_to_unicode().values())
