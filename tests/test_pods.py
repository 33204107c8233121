"""Train steps compiled for TPUs that are not there: they fit, with the kernel, and no surprises."""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from arrays import count_parameters
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.v5_12b import config as v5_12b
from easyanimate_jax.commands.aot import main
from easyanimate_jax.data.buckets import Budget
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.models.attention import splash
from easyanimate_jax.pods import hlo
from easyanimate_jax.pods.compile import (
    compile_step,
    stage_reports,
    suggest_mesh,
    topology_devices,
)
from easyanimate_jax.pods.gpu import model_step
from easyanimate_jax.pods.predict import predict
from easyanimate_jax.pods.report import markdown, page, table, to_json
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.training.chips import chip_of
from easyanimate_jax.training.compile import StageReport, model_flops
from easyanimate_jax.training.post.objectives import SegmentDistillation
from easyanimate_jax.training.program import COMPILER_OPTIONS
from easyanimate_jax.training.stages import Stage

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install -e '.[dev]'",
)

NARROW = dataclasses.replace(
    v5_12b,
    model=dataclasses.replace(
        v5_12b.model, depth=2, mmdit_depth=2, heads=4, text_widths=(128, 128), time_width=128
    ),
    sets=(LatentSet("clips", Budget(256, (256,), (64,)), condition_draws=1),),
    stages=(
        Stage("rows", "clips", batch_size=8, microbatch=4, steps=10),
        Stage("tokens", "clips", task="i2v", batch_size=4, microbatch=2, steps=10),
    ),
)
# Bytes in bfloat16 of a block's smallest matrix. A quarter is what its last reduction leaves, and
# as much has the shard of a text projection, which is summed over `context` and lies there whole.
MATRIX = 256 * 256 * 2


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "num_slices", "mesh", "stage"),
    [
        pytest.param("v6e:2x2", 1, MeshConfig(1, 2, 2, 1), "rows", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 2, MeshConfig(2, 2, 2, 1), "tokens", marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 1, MeshConfig(1, 2, 2, 1), "tokens", marks=pytest.mark.slow),
        pytest.param("tpu7x:2x2x1", 1, MeshConfig(1, 2, 4, 1), "tokens", marks=pytest.mark.slow),
    ],
    ids=["v6e", "two slices of v5p", "v6e, tokens", "Ironwood"],
)
def test_a_narrow_step_compiles_for_a_pod(topology, num_slices, mesh, stage, capfd):
    config = dataclasses.replace(NARROW, mesh=mesh)
    chosen = next(s for s in config.stages if s.name == stage)
    report, text = compile_step(config, chosen, topology, num_slices=num_slices)
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for a bad resharding
    assert report.fits and report.peak_bytes_per_chip < 1e9

    runs = {"fwd": 0, "dkv": 0}  # the loop over blocks may be cut into parts
    for kernel in report.kernels:
        count, _, name = kernel.split()[:3]
        runs[next(kind for kind in runs if kind in name)] += int(count)
    once = 2 * report.accumulate  # blocks x microbatches
    assert runs == {"fwd": once, "dkv": once}, "attention runs again in the backward pass"

    within = [c for c in hlo.read_program(text).collectives if not _crosses_slices(c, num_slices)]
    # Ironwood's sparse cores sum the shards of the text projections once a step, in float32.
    summed = MATRIX if topology.startswith("tpu7x") else MATRIX // 4
    large = {
        c.kind for c in within if c.largest > (summed if c.kind == "all-reduce" else MATRIX // 4)
    }
    assert large == {"all-gather", "reduce-scatter"} | (
        {"all-to-all"} if stage == "tokens" else set()
    )
    low, high = report.predicted_step_seconds_range
    assert 0 < low < report.predicted_step_seconds < high
    assert json.loads(to_json(topology, [report]))["stages"][0]["fits"] is True
    assert report.collective_bytes_per_axis.keys() >= {"fsdp", "context"}
    assert sum(report.collective_bytes_per_axis.values()) == pytest.approx(
        sum(report.collective_bytes.values())
    )
    for text in (table([report]), markdown([report]), page(topology, [report])):
        assert stage in text and "yes" in text


@needs_compiler
@pytest.mark.slow
def test_products_of_integers_are_integers_in_the_compiled_step():
    model = dataclasses.replace(NARROW.model, products="int8", save=("attention", "mlp"))
    config = dataclasses.replace(NARROW, model=model, mesh=MeshConfig(1, 2, 2, 1))
    _, text = compile_step(config, config.stages[0], "v6e:2x2")
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    products = re.findall(r"= (\w+)\[\S* (?:convolution|dot)\(%([\w.\-]+), %([\w.\-]+)", text)
    found = collections.Counter((result, types[a], types[b]) for result, a, b in products)
    matrices = 6 * 2  # q, k, v, out, up, down of both streams
    again = matrices - 2  # "up" is kept
    assert found["s32", "s8", "s8"] == 3 * matrices + again
    assert {kind[0] for kind in found} == {"s32", "bf16", "f32"}


def _crosses_slices(collective: hlo.Collective, num_slices: int) -> bool:
    """Whether a group holds devices of both slices of four."""
    return num_slices > 1 and len({device // 4 for device in collective.group}) > 1


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "num_keys"),
    [
        pytest.param("v5p:2x2x1", 4096, marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 14336, marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 53760, marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 53760, marks=pytest.mark.slow),
    ],
)
def test_long_blocks_of_keys_fit_the_vector_memory_that_the_step_asks_for(topology, num_keys):
    device = topology_devices(topology)[0]
    place = NamedSharding(Mesh([device], ("data",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((1, num_keys, 2, 64), jnp.bfloat16, sharding=place)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place)

    def loss(q, k, v, lengths):
        return splash(q, k, v, lengths, device_kind=device.device_kind).astype(jnp.float32).sum()

    options = COMPILER_OPTIONS[device.device_kind]
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=options)
    kernels = hlo.read_program(program.lower(x, x, x, lengths).compile().as_text()).kernels
    assert [kernel.name.split("_")[2] for kernel in kernels] == ["fwd", "dkv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.py", "--topology", "v5p:4x4x8"], "there is no config"),
        (["configs/demo_vae.py", "--topology", "v5p:4x4x8"], "trains a VAE"),
        (["configs/demo.py", "--topology", "v5p:4x4x8", "--stage", "last"], "no stage 'last'"),
        (["configs/demo.py", "--topology", "h200:0x8"], "use h200:8, or h200:16x8"),
        (["configs/demo.py", "--topology", "h200:8", "--slices", "2"], "--slices is for TPUs"),
        pytest.param(
            ["configs/demo.py", "--topology", "v5p:9by9"],
            "topology 'v5p:9by9'",
            marks=needs_compiler,
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_flops_are_those_of_the_hand_count():
    for tokens, linear, attention in ((3328, 40, 8), (13312, 148, 110), (53248, 583, 1693)):
        flops, share = model_flops(v5_12b.model, tokens, 333)
        assert flops / 3 == pytest.approx((linear + attention) * 1e12, rel=0.02)
        assert share == pytest.approx(attention / (linear + attention), abs=0.02)


# On one H200, by benchmarks/aot_gpu.py: blocks, tokens, rows; GB at most in use, seconds of a step.
@pytest.mark.parametrize(
    ("blocks", "tokens", "rows", "gigabytes", "seconds"),
    [(8, 3584, 8, 57.93, 0.494), (4, 53248, 1, 39.73, 1.520)],
)
def test_the_model_of_a_gpu_is_near_what_was_measured(blocks, tokens, rows, gigabytes, seconds):
    model = dataclasses.replace(v5_12b.model, depth=blocks, mmdit_depth=blocks)
    config = dataclasses.replace(v5_12b, model=model)
    stage = dataclasses.replace(v5_12b.stages[2], batch_size=rows, microbatch=rows)
    report = model_step(config, stage, "h200:1", tokens=tokens)
    assert report.memory["weights"] == 4 * count_parameters(model)
    assert report.peak_bytes_per_chip == pytest.approx(1e9 * gigabytes, rel=0.05)
    assert report.predicted_step_seconds == pytest.approx(seconds, rel=0.1)


def test_products_in_8_bits_take_half_the_time_on_a_gpu_and_their_scales_take_some():
    reports = {}
    for products in ("full", "fp8"):
        model = dataclasses.replace(v5_12b.model, products=products, save=("attention",))
        config = dataclasses.replace(v5_12b, model=model)
        stage = dataclasses.replace(v5_12b.stages[2], microbatch=64)
        reports[products] = model_step(config, stage, "h200:64").predicted_parts
    full, low = reports["full"], reports["fp8"]
    assert low["matmul"] == pytest.approx(full["matmul"] / 2)
    assert full["elementwise"] < low["elementwise"] < 2 * full["elementwise"]
    assert low["attention"] == full["attention"] and low["collectives"] == full["collectives"]


def test_more_gpus_hold_less_each_and_are_described_as_a_model(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    words = ["configs/v5_12b.py", "--stage", "13312_t2v", "--json", str(figures), "--topology"]
    found = {}
    for topology, code in (("h200:16x8", 0), ("h200:32x8", 0), ("h100:8", 1)):
        assert main([*words, topology]) == code
        assert "not compiled: a model" in capsys.readouterr().out
        (found[topology],) = json.loads(figures.read_text())["stages"]
    few, many, one_host = found.values()
    assert few["modelled"]
    # Biases and norms lie whole on every device.
    assert many["memory"]["weights"] * 2 == pytest.approx(few["memory"]["weights"], rel=0.02)
    assert many["peak_bytes_per_chip"] < few["peak_bytes_per_chip"]
    assert 1 < few["predicted_step_seconds"] / many["predicted_step_seconds"] < 2  # one network
    assert not one_host["fits"] and one_host["changes"]
    for change in one_host["changes"]:
        assert change["peak_bytes_per_chip"] < one_host["hbm_bytes"]


def test_a_mesh_follows_the_devices():
    asked = MeshConfig(1, 16, 8, 1)
    assert suggest_mesh(asked, 128) == asked
    assert suggest_mesh(asked, 256) == MeshConfig(1, 32, 8, 1)
    assert suggest_mesh(asked, 1024) == MeshConfig(2, 64, 8, 1)
    assert suggest_mesh(asked, 4) == MeshConfig(1, 1, 4, 1)


PROGRAM = """HloModule step, is_scheduled=true

%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kernel = (f32[8,64]{1,0}, bf16[4,256,64]{2,1,0}) custom-call(%x), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1]{0}, \
bf16[4,64,128]{2,1,0}, bf16[4,64,256]{2,1,0}}, frontend_attributes={kernel_metadata={
}}, backend_config="x"
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add
}

%sparse (w: f32[8], t: token[]) -> bf16[16] {
  ROOT %all-gather.9 = bf16[16]{0} all-gather(%w), replica_groups={{0,1},{2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%condition (y: f32[8]) -> pred[] {
  %limit = s32[] constant(48)
  ROOT %less = pred[] compare(%y, %limit), direction=LT
}

ENTRY %main (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  %all-gather.2 = bf16[16]{0} all-gather(%z), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %gather.4 = ((f32[8]{0}, token[]), bf16[16]{0}) call-start(%z), \
async_execution_thread="sparsecore", to_apply=%sparse
  %fusion.3 = f32[8]{0} fusion(%z), kind=kLoop, backend_config={"estimated_cycles":"500"}
  %copy.5 = f32[8]{0} copy(%z), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %loop = f32[8]{0} while(%z), condition=%condition, body=%body
}
"""


def test_loops_count_as_often_as_they_run():
    program = hlo.read_program(PROGRAM)
    reduced, gathered, beside = program.collectives
    assert (reduced.kind, reduced.group, reduced.count) == ("all-reduce", (0, 2), 48)
    assert reduced.wire == 48 * 32 * 2 * 1 / 2 and reduced.largest == 32
    assert (gathered.kind, gathered.group, gathered.count) == ("all-gather", (0, 2, 4, 6), 1)
    assert gathered.wire == 32 * 3 / 4 and not gathered.overlaps
    assert (beside.kind, beside.group, beside.overlaps) == ("all-gather", (0, 1), True)
    (kernel,) = program.kernels
    assert (kernel.shape, kernel.num_keys, kernel.count) == ((1, 4, 128, 64), 256, 48)
    assert (program.matmul_cycles, program.other_cycles) == (0, 500)


@pytest.mark.parametrize("name", ["splash_mha_fwd", "splash_mha_dkv"])
def test_attention_on_gathered_keys_takes_the_time_of_queries_times_keys(name):
    def seconds(queries, keys):
        program = hlo.Program([], [hlo.Kernel(name, (1, 8, queries, 64), keys, 1)])
        return predict(program, chip_of("TPU v5"), [], 64).attention

    assert seconds(512, 4096) == pytest.approx(seconds(4096, 4096) / 8)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1 2 2 2", "1 8 1 1"])
def test_the_memory_of_a_step_on_cpus_is_as_predicted(mesh):
    words = ["benchmarks/aot_memory.py", "--measure", "configs/demo.py", "large_i2v", *mesh.split()]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": "."}
    ran = subprocess.run(
        [sys.executable, *words], env=os.environ | flags, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.15)


@needs_compiler
def test_a_mesh_axis_may_be_a_part_of_a_direction_of_the_torus():
    mesh = make_mesh(MeshConfig(1, 32, 8, 1), topology_devices("v6e:16x16"))
    rows = {tuple(d.coords[1] for d in group) for group in mesh.devices[0, :, :, 0]}
    columns = {tuple(d.coords[0] for d in group) for group in mesh.devices[0, :, :, 0]}
    assert all(len(set(group)) == 1 for group in rows) or all(len(set(g)) == 1 for g in columns)


def test_stages_of_equal_sizes_share_a_report_and_those_of_another_objective_do_not():
    stage = v5_12b.stages[0]
    of = lambda steps: SegmentDistillation(steps=steps)  # noqa: E731
    stages = [dataclasses.replace(stage, name=name) for name in "abcd"]
    stages[2:] = (
        dataclasses.replace(s, objective=of(n)) for s, n in zip(stages[2:], (4, 8), strict=True)
    )
    asked = []

    def report_of(config, stage):
        asked.append(stage.name)
        sizes = {"batch_size": 1, "microbatch": 1, "accumulate": 1, "tokens": 1, "text_tokens": 1}
        sizes |= {"save": ()}
        own = {"fits": True, "hbm_bytes": 1, "peak_bytes_per_chip": 1, "memory": {}, "steps": 1}
        more = {"topology": "", "mesh": {}, "model_flops": 1.0, "attention_share": 0.0}
        return StageReport(name=stage.name, task="t2v", **sizes, **own, **more)

    found = [report.name for report in stage_reports(v5_12b, stages, report_of)]
    assert found == list("abcd") and asked == ["a", "c", "d"]
