"""cuDNN's attention without a mask: its forward and its backward kernel as two functions.

JAX's public function rounds the log-sums to the dtype of the queries, and its backward kernel takes
no other result and log-sums. So both calls are private ones of JAX. `unmasked` compares the names
of their parameters with those of jax 0.10 to 0.12, and returns None if they are others.
"""

import inspect

import jax.numpy as jnp

from easyanimate_jax.models.zero_keys import Kernel, Keys, LogSums, Queries

try:
    from jax._src.cudnn import fused_attention_stablehlo as private
except ImportError:
    private = None

NOT_USED = ["bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"]
NOT_USED += ["page_table_k", "page_table_v"]
OPERANDS = ["query", "key", "value", *NOT_USED, "activation", "fwd_output", "grad_output"]
SETTINGS = ["scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout"]
SETTINGS += ["sliding_window_length"]
ADDED = ["score_mod_args", "score_mod"]  # by jax 0.12: a function that changes the scores


def unmasked() -> Kernel | None:
    """Return cuDNN's kernels, or None if this release of JAX calls them in another way."""
    forward, backward = (
        inspect.signature(getattr(private, name, lambda: None)).parameters
        for name in ("dot_product_attention", "_dot_product_attention_bwd_impl")
    )
    known = [name for name in backward if name not in ADDED] == OPERANDS + SETTINGS
    known &= "return_residual" in forward
    known &= hasattr(private, "_dot_product_attention_bwd_p_wrapper")
    return Kernel(_forward, _backward) if known else None


def _forward(q: Queries, k: Keys, v: Keys) -> tuple[Queries, LogSums]:
    return private.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, return_residual=True)


def _backward(
    q: Queries, k: Keys, v: Keys, out: Queries, log_sums: LogSums, d_out: Queries
) -> tuple[Queries, Keys, Keys]:
    implementation = inspect.signature(private._dot_product_attention_bwd_impl)
    more = {"score_mod": None} if "score_mod" in implementation.parameters else {}
    return tuple(
        private._dot_product_attention_bwd_p_wrapper.bind(
            *(q, k, v, *[jnp.zeros(0, q.dtype)] * len(NOT_USED), log_sums, out, d_out),
            scale=q.shape[-1] ** -0.5,
            seed=0,
            dropout_rate=0.0,
            variadic_args=(False, False),
            mask_type=private.MaskType.NO_MASK,
            layout=private.AttentionLayout.BTNH.value,
            sliding_window_length=None,
            **more,
        )
    )
