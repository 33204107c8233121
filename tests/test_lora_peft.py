"""A LoRA trained by PEFT in PyTorch, and by our train step: the same start and the same draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx
from peft import LoraConfig, get_peft_model
from test_mmdit import converted, normal, numpy_state, reference

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.models.lora import LoRAConfig, attach, fill, is_adapter
from easyanimate_jax.models.mmdit import patchify, unpatchify
from easyanimate_jax.training.optimizer import OptimizerConfig, make_optimizer
from easyanimate_jax.training.step import Part, TrainState, train_step
from easyanimate_jax.weights.adapters import to_continue

RANK, ALPHA, RATE, STEPS = 4, 8, 2e-3, 100
ROWS, GRID, KEY = 2, (2, 3, 5), jax.random.key(5)
PROCESS = Flow()
OPTIMIZER = OptimizerConfig(weight_decay=0.01, eps=1e-8, max_grad_norm=0.0)


def batch_of(number):
    """Two rows of one of four batches."""
    latents = jnp.asarray(normal(number % 4, ROWS, 2, 6, 10, 16))
    mean = np.asarray(patchify(latents))
    arrays = Batch(
        mean=mean,
        logvar=np.full_like(mean, -3.0),
        grid=np.array([GRID] * ROWS, np.int32),
        lengths=np.full(ROWS, mean.shape[1], np.int32),
        texts=(normal(10 + number % 4, ROWS, 5, 24),),
        condition=None,
        weight=np.ones(ROWS, np.float32),
    )
    return jax.tree.map(lambda x: jnp.asarray(x)[None], arrays)  # one microbatch


def drawn(batch, step):
    """What the train step draws of a batch: noised latents, times and targets, as videos."""
    time_key, noise_key = jax.random.split(jax.random.fold_in(KEY, step))
    time = PROCESS.sample_time(time_key, (ROWS,), batch.lengths[0])
    keys = [jax.random.split(jax.random.fold_in(noise_key, row)) for row in range(ROWS)]
    eps, noise = (
        jnp.stack([jax.random.normal(pair[i], batch.mean.shape[2:]) for pair in keys])
        for i in range(2)
    )
    tokens = batch.mean[0] + jnp.exp(batch.logvar[0] / 2) * eps
    noised, target = PROCESS.add_noise(tokens, noise, time), PROCESS.target(tokens, noise, time)
    videos = (rearrange(unpatchify(x, GRID), "B T h w C -> B C T h w") for x in (noised, target))
    return *(torch.from_numpy(np.array(x)) for x in (*videos, time)), np.array(PROCESS.weight(time))


def losses_of_torch(model):
    trained = [weight for name, weight in model.named_parameters() if "lora_" in name]
    update = torch.optim.AdamW(trained, RATE, (0.9, 0.999), 1e-8, 0.01)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step)
        noised, target, time, weight = drawn(batch, step)
        text = torch.from_numpy(np.array(batch.texts[0][0]))
        prediction = model(noised, time, encoder_hidden_states=text)[0]
        rows = (prediction - target).square().mean(dim=(1, 2, 3, 4))
        loss = (rows * torch.from_numpy(weight)).mean()
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


def losses_of_ours(model):
    graph, adapters, frozen = nnx.split(model, is_adapter, ...)
    optimizer, zero = make_optimizer(OPTIMIZER), jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, adapters, None, optimizer.init(adapters), frozen)
    step = jax.jit(
        partial(
            train_step,
            optimizer=optimizer,
            process=PROCESS,
            ema_decay=0.0,
            part=Part(graph),
        )
    )
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, batch_of(number), KEY, jnp.float32(RATE))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_a_hundred_updates_by_peft_have_our_losses(tmp_path):
    theirs = reference(add_norm_text_encoder=True, text_embed_dim_t5=None)
    ours = converted(numpy_state(theirs))
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    theirs = get_peft_model(theirs, settings)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():  # a file of zeros would be refused
            weight += 0.01 * torch.randn_like(weight) * ("lora_B" in name)
    theirs.save_pretrained(tmp_path)
    config = LoRAConfig(rank=RANK, alpha=float(ALPHA))
    attach(ours, config, key=jax.random.key(0))
    fill(ours, jax.tree.map(jnp.asarray, to_continue(tmp_path, ours.config, config)))
    expected, found = losses_of_torch(theirs), losses_of_ours(ours)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.mean(found[-8:]) < 0.9 * np.mean(found[:8])
