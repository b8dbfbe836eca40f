"""Shipped configs, derived values, formulas against published numbers, and the table of constraints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatronish import formulas
from megatronish.config import Config
from megatronish.config_loader import SECTIONS, load_config
from megatronish.config_section import Section
from megatronish.constraints import CONSTRAINTS, check, divisors_near, find_problems, multiples_near, warnings
from megatronish.yaml_file import read_yaml_file

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_GPUS = {"demo_cpu": 8, "llama3_8b": 64, "llama3_70b": 256, "gpt2_124m": 8, "gpt3_175b": 1024, "gpt_1t": 3072}


def config_with(**changes: dict[str, Any]) -> Config:
    """A small sound config (one rank), with the sections' fields changed."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 4, "hidden_size": 64, "num_heads": 8, "mlp_size": 128, "vocab_size": 100},
        "data": {"train": "t", "sequence_length": 32},
        "optim": {"lr": 1e-3},
        "train": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 1},
        "parallel": {},
        "kernels": {},
        "observe": {},
    }
    return Config(name="x", **{name: {**fields, **changes.get(name, {})} for name, fields in sections.items()})  # type: ignore[arg-type]


def fields_set(values: dict[str, Any]) -> int:
    return sum(fields_set(value) if isinstance(value, dict) else 1 for value in values.values())


def test_the_shipped_configs_are_the_ones_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(NUM_GPUS)


@pytest.mark.parametrize("name", NUM_GPUS)
def test_a_shipped_config_is_sound_at_its_own_number_of_gpus(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", world_size=NUM_GPUS[name])
    assert config.name == name
    assert config.data_parallel_size(NUM_GPUS[name]) == config.parallel.data
    # Twice the GPUs is twice the data ranks, by one override.
    overrides = ["parallel.data=", f"train.global_batch_size={2 * config.train.global_batch_size}"]
    load_config(CONFIGS / f"{name}.yaml", overrides, world_size=2 * NUM_GPUS[name])


@pytest.mark.parametrize("name", NUM_GPUS)
def test_a_shipped_config_sets_at_most_25_fields(name: str) -> None:
    values = read_yaml_file(CONFIGS / f"{name}.yaml").values
    while "base" in values:
        base = read_yaml_file(CONFIGS / values.pop("base")).values
        for key, value in values.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        values = base
    assert fields_set(values) <= 25


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama3_8b", 8.03),
        ("llama3_70b", 70.55),
        ("gpt2_124m", 0.12448),
        ("gpt3_175b", 174.6),
        ("gpt_1t", 1008.0),
        ("demo_cpu", 0.01052),
    ],
)
def test_parameters_of_the_shipped_configs(name: str, billions: float) -> None:
    # 8.03 and 70.55 are Meta's model cards, 1008.0 is table 1 of Narayanan et al. 2021, 174.6 table D.1 of Brown et al. 2020; GPT-2
    # small has 124.44 M without padded rows.
    assert formulas.num_parameters(load_config(CONFIGS / f"{name}.yaml").model) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_parameters_are_those_of_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config_with(model={"num_kv_heads": 2, "vocab_size": 128}).model
    shape = LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        reference = LlamaForCausalLM(shape)
    assert formulas.num_parameters(model) == sum(p.numel() for p in reference.parameters())
    matrices = [p.numel() for name, p in reference.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    assert formulas.num_matrix_weights(model) == sum(matrices)
    embeddings = 2 * model.padded_vocab_size * model.hidden_size
    assert formulas.num_parameters_without_embeddings(model) == formulas.num_parameters(model) - embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_gpt2_are_those_of_the_model(tied: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {"architecture": "gpt2", "max_positions": 40, "tie_embeddings": tied, "vocab_size": 128, "mlp_size": 200}
    model = config_with(model=fields).model
    shape = GPT2Config(vocab_size=128, n_positions=40, n_embd=64, n_layer=4, n_head=8, n_inner=200, tie_word_embeddings=tied)
    with torch.device("meta"):
        reference = GPT2LMHeadModel(shape)
    assert formulas.num_parameters(model) == sum(p.numel() for p in reference.parameters())
    matrices = [p.numel() for name, p in reference.named_parameters() if p.dim() == 2 and name.startswith("transformer.h")]
    assert formulas.num_matrix_weights(model) == sum(matrices) + 128 * 64
    without = [
        p.numel() for name, p in reference.named_parameters() if "wte" not in name and "wpe" not in name and "head" not in name
    ]
    assert formulas.num_parameters_without_embeddings(model) == sum(without)


def test_an_odd_head_size_is_sound_without_rotary_positions() -> None:
    model = {"architecture": "gpt2", "max_positions": 32, "hidden_size": 24}
    assert check(config_with(model=model)) == []


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    model, sequence = config_with(model={"num_kv_heads": 2, "vocab_size": 128}).model, 32
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    tokens = torch.zeros(1, sequence, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(shape)(tokens).logits.sum().backward()
    # The rotary table, an outer product of positions and frequencies, is the rest.
    assert counter.get_total_flops() / sequence == pytest.approx(formulas.flops_per_token(model, sequence), rel=1e-4)


# Narayanan et al. 2021, table 1: layers, hidden, billions of parameters, GPUs, batch, TFLOP/s per GPU, seconds per step.
TABLE_1 = [
    (24, 2304, 1.7, 32, 512, 137, 3.515),
    (30, 3072, 3.6, 64, 512, 138, 3.711),
    (36, 4096, 7.5, 128, 512, 142, 3.691),
    (40, 6144, 18.4, 256, 1024, 135, 9.388),
    (48, 8192, 39.1, 512, 1536, 138, 14.424),
    (60, 10240, 76.1, 1024, 1792, 140, 16.009),
    (80, 12288, 145.6, 1536, 2304, 148, 24.842),
    (96, 16384, 310.1, 1920, 2160, 155, 37.64),
    (105, 20480, 529.6, 2520, 2520, 163, 54.159),
    (128, 25600, 1008.0, 3072, 3072, 163, 102.372),
]


@pytest.mark.parametrize(("layers", "hidden", "billions", "gpus", "batch", "tflops", "seconds"), TABLE_1)
def test_gpt_formulas_give_table_1(
    layers: int, hidden: int, billions: float, gpus: int, batch: int, tflops: float, seconds: float
) -> None:
    parameters = formulas.gpt_parameters(num_layers=layers, hidden_size=hidden, vocab_size=51200, sequence_length=2048)
    assert parameters / 1e9 == pytest.approx(billions, abs=0.051)  # published with one decimal
    flops = formulas.gpt_step_flops(
        batch_size=batch, sequence_length=2048, num_layers=layers, hidden_size=hidden, vocab_size=51200, recompute="full"
    )
    # The seconds follow from the published aggregate, the rate per GPU is published as a whole number.
    assert flops / gpus / seconds / 1e12 == pytest.approx(tflops, abs=0.51)


# Megatron-Core's table for H100: layers, hidden, GPUs, batch, TFLOP/s per GPU, MFU in percent, seconds per step.
@pytest.mark.parametrize(
    ("layers", "hidden", "gpus", "batch", "tflops", "percent", "seconds"),
    [
        (24, 2048, 48, 192, 408.8, 41, 0.452),
        (32, 6144, 192, 192, 489.1, 49, 0.85),
        (84, 8192, 768, 384, 419.7, 42, 2.177),
        (96, 12288, 2304, 1152, 432.8, 44, 5.259),
        (112, 18432, 6144, 3072, 459.9, 47, 12.717),
    ],
)
def test_gpt_flops_without_recomputation_give_the_megatron_core_table(
    layers: int, hidden: int, gpus: int, batch: int, tflops: float, percent: float, seconds: float
) -> None:
    flops = formulas.gpt_step_flops(
        batch_size=batch, sequence_length=4096, num_layers=layers, hidden_size=hidden, vocab_size=131072, recompute="none"
    )
    assert flops / gpus / seconds / 1e12 == pytest.approx(tflops, rel=2e-3)
    peak = formulas.peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak is not None
    utilisation = formulas.mfu(batch * 4096 / seconds, flops_per_token=flops / batch / 4096, num_devices=gpus, peak_tflops=peak)
    assert 100 * utilisation == pytest.approx(percent, abs=0.6)


def test_pipeline_bubbles() -> None:
    assert formulas.pipeline_bubble(64, 512) == pytest.approx(0.123, abs=1e-3)  # Narayanan's 1T run
    assert formulas.pipeline_bubble(4, 28, num_chunks=3) == pytest.approx(0.0357, abs=1e-4)  # its 76B run, interleaved
    assert formulas.pipeline_idle_fraction(4, 12) == pytest.approx(3 / 15)
    assert formulas.pipeline_idle_fraction(4, 12, num_chunks=3) == pytest.approx(3 / 39)
    assert formulas.pipeline_bubble(1, 7) == formulas.pipeline_idle_fraction(1, 7) == 0


def test_activation_bytes_are_those_of_the_paper() -> None:
    # Korthikanti et al. 2022: GPT-3 has 5as/h = 80, so selective recomputation saves 70 % of the layer; MT-NLG 530B has 64, 65 %.
    for heads, hidden, scores, saved in ((96, 12288, 80, 0.70), (128, 20480, 64, 0.65)):
        shape = {"sequence_length": 2048, "micro_batch_size": 1, "hidden_size": hidden, "num_heads": heads}
        sbh = 2048 * hidden
        whole = formulas.activation_bytes_per_layer(**shape)
        assert whole == (34 + scores) * sbh
        assert 1 - formulas.activation_bytes_per_layer(**shape, recompute="selective") / whole == pytest.approx(saved, abs=0.005)
        assert formulas.activation_bytes_per_layer(**shape, tensor=8) == (10 + (24 + scores) / 8) * sbh
        assert formulas.activation_bytes_per_layer(**shape, tensor=8, sequence_parallel=True) == whole / 8
        assert formulas.activation_bytes_per_layer(**shape, tensor=8, recompute="full") == 2 * sbh


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H200", 989.4, 67.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA GB200", 2500.0, 80.0),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA H1000 of next year", None, None),
    ],
)
def test_peak_rates_by_device_name(name: str, bfloat16: float | None, float32: float | None) -> None:
    assert formulas.peak_tflops(name, "bfloat16") == bfloat16
    assert formulas.peak_tflops(name, "float32") == float32
    assert formulas.peak_tflops(name, "float64") is None


LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# What breaks each row, alone: changes, world size, words the message must hold.
BROKEN: dict[str, tuple[dict[str, dict[str, Any]], int | None, tuple[str, ...]]] = {
    "model.hidden_size % model.num_heads": ({"model": {"num_heads": 7}}, None, ("64", "7", "8")),
    "head size even": ({"model": {"hidden_size": 24}}, None, ("24", "8", "3")),
    "model.num_heads % model.num_kv_heads": ({"model": {"num_kv_heads": 3}}, None, ("8", "3", "4")),
    "gpt2 needs model.max_positions": ({"model": {"architecture": "gpt2"}}, None, ("gpt2", "data.sequence_length=32")),
    "llama has no model.max_positions": ({"model": {"max_positions": 64}}, None, ("64", "llama")),
    "gpt2 has no gated activation": (
        {"model": {"architecture": "gpt2", "max_positions": 32, "activation": "geglu"}},
        None,
        ("geglu", "gpt2"),
    ),
    "data.sequence_length <= model.max_positions": (
        {"model": {"architecture": "gpt2", "max_positions": 31}},
        None,
        ("data.sequence_length=32", "model.max_positions=31"),
    ),
    "gpt2 has no rotary positions": (
        {"model": {"architecture": "gpt2", "max_positions": 32, "rope_layout": "interleaved", "rope_scaling": LINEAR}},
        None,
        ("model.rope_layout, model.rope_scaling", "gpt2", "remove them"),
    ),
    "model.partial_rotary_factor turns pairs": ({"model": {"partial_rotary_factor": 0.4}}, None, ("0.4", "heads of 8", "0.25")),
    "model.rope_scaling has the keys of its type": (
        {"model": {"rope_scaling": {**LINEAR, "beta_fast": 16.0}}},
        None,
        ("linear", "beta_fast=16.0", "remove it"),
    ),
    "model.rope_scaling needs the length before": (
        {"model": {"rope_scaling": {"type": "llama3", "factor": 8.0}}},
        None,
        ("llama3", "original_max_position_embeddings"),
    ),
    "model.rope_scaling has its bounds in order": (
        {"model": {"rope_scaling": {**YARN, "beta_fast": 0.5}}},
        None,
        ("beta_slow=1", "beta_fast=0.5"),
    ),
    "yarn needs model.rope_theta > 1": ({"model": {"rope_theta": 1.0, "rope_scaling": YARN}}, None, ("model.rope_theta=1", "yarn")),
    "parallel.tensor divides what it cuts": ({"parallel": {"tensor": 16}}, None, ("16", "num_heads=8", "1, 2, 4 or 8")),
    "model.num_layers >= parallel.pipeline x parallel.num_chunks": (
        {"parallel": {"pipeline": 2, "schedule": "interleaved", "num_chunks": 3}},
        None,
        ("pipeline=2", "num_chunks=3", "6 parts", "num_layers=4"),
    ),
    "parallel.schedule=interleaved and parallel.num_chunks > 1": (
        {"parallel": {"pipeline": 2, "num_chunks": 2}},
        None,
        ("num_chunks=2", "schedule=1f1b", "to interleaved"),
    ),
    "parallel.stage_layers has a number for each part": (
        {"parallel": {"pipeline": 2, "schedule": "interleaved", "num_chunks": 2, "stage_layers": (2, 2)}},
        None,
        ("2 numbers", "pipeline=2", "num_chunks=2", "give 4"),
    ),
    "parallel.stage_layers adds up to model.num_layers": (
        {"parallel": {"pipeline": 2, "stage_layers": (1, 2)}},
        None,
        ("adds up to 3", "num_layers=4", "by 1"),
    ),
    "world = tensor x pipeline x data": ({"parallel": {"tensor": 2, "data": 4}}, 4, ("8", "4", "parallel.data to 2")),
    "world % (tensor x pipeline)": ({"parallel": {"tensor": 4}}, 6, ("6", "4", "8")),
    "train.global_batch_size % (train.micro_batch_size x data)": ({"parallel": {"data": 3}}, None, ("8", "3", "6 or 9")),
    "microbatches >= parallel.pipeline": ({"parallel": {"pipeline": 4, "data": 4}}, None, ("8", "2", "4", "16")),
    "train.batch_ramp reaches train.global_batch_size": (
        {"train": {"batch_ramp": {"start": 3, "increment": 2, "samples": 50}}},
        None,
        ("3", "8", "increment=2", "1 or 5"),
    ),
    "train.batch_ramp % (train.micro_batch_size x data)": (
        {"train": {"batch_ramp": {"start": 2, "increment": 2, "samples": 50}}, "parallel": {"data": 4}},
        None,
        ("start=2", "increment=2", "4 data ranks", "set it to 4"),
    ),
    "microbatches of train.batch_ramp.start >= parallel.pipeline": (
        {"train": {"batch_ramp": {"start": 2, "increment": 2, "samples": 50}}, "parallel": {"pipeline": 4, "data": 1}},
        None,
        ("start=2", "2 microbatches", "pipeline=4", "at least 4"),
    ),
    "parallel.recompute has one for each stage": (
        {"parallel": {"pipeline": 2, "recompute": ["none", "full", "full"]}},
        None,
        ("3 choices", "parallel.pipeline=2"),
    ),
    "parallel.zero_stage of parallel.zero_engine=native": (
        {"parallel": {"zero_stage": 3}},
        None,
        ("parallel.zero_stage=3", "parallel.zero_engine to deepspeed"),
    ),
    "parallel.offload of parallel.zero_engine=native": (
        {"parallel": {"offload": "cpu"}},
        None,
        ("parallel.offload=cpu", "parallel.zero_engine to deepspeed"),
    ),
    "parallel.deepspeed_config of parallel.zero_engine=native": (
        {"parallel": {"deepspeed_config": "ds.json"}},
        None,
        ("parallel.deepspeed_config=ds.json", "parallel.zero_engine to deepspeed"),
    ),
    "parallel.zero_stage of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed", "zero_stage": 0}},
        None,
        ("parallel.zero_stage=0", "zero_engine to native"),
    ),
    "parallel.pipeline of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed", "pipeline": 2}},
        None,
        ("parallel.pipeline=2", "zero_engine to native"),
    ),
    "parallel.num_chunks of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed", "num_chunks": 2, "schedule": "interleaved"}},
        None,
        ("parallel.num_chunks=2", "zero_engine to native"),
    ),
    "parallel.sequence of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed", "tensor": 2, "sequence": True}},
        None,
        ("parallel.sequence=true", "zero_engine to native"),
    ),
    "train.dtype of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed"}, "train": {"dtype": "float16"}},
        None,
        ("train.dtype=float16", "bfloat16 or float32"),
    ),
    "train.loss_chunks of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed"}, "train": {"loss_chunks": 4}},
        None,
        ("train.loss_chunks=4", "zero_engine to native"),
    ),
    "optim.moments_dtype of parallel.zero_engine=deepspeed": (
        {"parallel": {"zero_engine": "deepspeed"}, "optim": {"moments_dtype": "bfloat16"}},
        None,
        ("bfloat16", "zero_engine to native"),
    ),
    "parallel.offload=nvme needs parallel.zero_stage=3": (
        {"parallel": {"zero_engine": "deepspeed", "zero_stage": 2, "offload": "nvme", "offload_path": "/disk"}},
        None,
        ("parallel.zero_stage=2", "parallel.offload to cpu"),
    ),
    "parallel.offload=nvme needs train.dtype=float32": (
        {
            "parallel": {"zero_engine": "deepspeed", "zero_stage": 3, "offload": "nvme", "offload_path": "/disk"},
            "train": {"dtype": "bfloat16"},
        },
        None,
        ("train.dtype=bfloat16", "parallel.offload to cpu"),
    ),
    "parallel.offload_path goes with parallel.offload=nvme": (
        {"parallel": {"zero_engine": "deepspeed", "zero_stage": 3, "offload": "nvme"}},
        None,
        ("needs parallel.offload_path",),
    ),
    "parallel.zero_stage=3 and parallel.recompute": (
        {"parallel": {"zero_engine": "deepspeed", "zero_stage": 3, "recompute": "selective"}},
        None,
        ("selective", "parallel.zero_stage=3"),
    ),
    "parallel.zero_stage=3 and observe.sample_interval": (
        {"parallel": {"zero_engine": "deepspeed", "zero_stage": 3}, "data": {"tokenizer": "t"}, "observe": {"sample_interval": 5}},
        None,
        ("5", "parallel.zero_stage=3"),
    ),
    "kernels names what the run has": (
        {"kernels": {"gelu": "triton", "rms_norm": "torch"}},
        None,
        ("kernels.gelu=triton:", "model.architecture=llama", "remove it"),
    ),
    "kernels.attention computes in train.dtype": (
        {"kernels": {"attention": "cuda"}, "model": {"hidden_size": 512}},
        None,
        ("cuda", "train.dtype=float32", "bfloat16 or float16"),
    ),
    "kernels.attention takes heads of this size": (
        {"kernels": {"attention": "triton"}, "model": {"hidden_size": 96}},
        None,
        ("model.hidden_size=96", "model.num_heads=8", "12", "multiples of 8"),
    ),
    "kernels.attention takes documents and dropout": (
        {"kernels": {"attention": "triton-tma"}, "train": {"dtype": "bfloat16"}, "model": {"dropout": 0.1}},
        None,
        ("triton-tma", "model.dropout", "triton"),
    ),
    "train.steps or train.tokens": ({"train": {"tokens": 5}}, None, ("100", "5")),
    "optim.warmup_steps <= steps": ({"optim": {"warmup_steps": 101}}, None, ("101", "100")),
    "wsd needs optim.decay_steps": ({"optim": {"schedule": "wsd"}}, None, ("optim.decay_steps", "wsd")),
    "constant has no decay": ({"optim": {"schedule": "constant", "decay_steps": 7}}, None, ("7", "constant")),
    "warmup + decay <= steps": ({"optim": {"warmup_steps": 30, "decay_steps": 71}}, None, ("30", "71", "100", "70")),
    "optim.master of bfloat16 parameters": ({"optim": {"master": "remainder"}}, None, ("remainder", "train.dtype=float32")),
    "optim.master=none needs optim.rounding=stochastic": (
        {"optim": {"master": "none"}, "train": {"dtype": "bfloat16"}},
        None,
        ("optim.master=none", "nearest", "remainder"),
    ),
    "optim.rounding=stochastic needs something to round": (
        {"optim": {"rounding": "stochastic"}},
        None,
        ("nothing is kept in bfloat16", "optim.moments_dtype"),
    ),
    "optim.moments_dtype of a float64 run": (
        {"optim": {"moments_dtype": "bfloat16"}, "train": {"dtype": "float64"}},
        None,
        ("bfloat16", "float64"),
    ),
    "optim.min_lr <= optim.lr": ({"optim": {"min_lr": 0.5}}, None, ("0.5", "0.001")),
    "data.validation or data.validation_fraction": (
        {"data": {"validation": "v", "validation_fraction": 0.25}},
        None,
        ("v", "0.25"),
    ),
    "data.validation differs from data.train": ({"data": {"validation": "t"}}, None, ("data.train",)),
    "train.eval_interval needs held-out data": ({"train": {"eval_interval": 9}}, None, ("9", "data.validation")),
    "train.patience needs train.eval_interval": ({"train": {"patience": 3}}, None, ("3", "train.eval_interval=0")),
    "data.train is a prefix": ({"data": {"train": "corpus.bin"}}, None, ("corpus.bin", "write corpus,")),
    "data.validation is a prefix": ({"data": {"validation": "held.idx"}}, None, ("held.idx", "write held,")),
    "a blend has sources, each once": (
        {"data": {"train": [{"prefix": "a", "weight": 1.0}, {"prefix": "b", "weight": 1}, {"prefix": "a", "weight": 0.5}]}},
        None,
        ("a twice",),
    ),
    "a blend needs data.validation": (
        {"data": {"train": [{"prefix": "a", "weight": 1.0}, {"prefix": "b", "weight": 2.0}], "validation_fraction": 0.25}},
        None,
        ("0.25", "2 sets", "data.validation"),
    ),
    "data.order=megatron takes a seed of 32 bits": (
        {"data": {"order": "megatron"}, "train": {"seed": 2**32}},
        None,
        ("4294967296", "megatron", "data.order"),
    ),
    "observe.sample_interval needs data.tokenizer": (
        {"data": {"tokenizer": None}, "observe": {"sample_interval": 5}},
        None,
        ("5", "data.tokenizer is not given"),
    ),
    "observe.profile_steps is a window": ({"observe": {"profile_steps": [9, 4]}}, None, ("[9, 4]", "[4, 9]")),
}


def test_every_constraint_has_its_case() -> None:
    assert [row.name for row in CONSTRAINTS] == list(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_constraint_gives_one_line_with_both_numbers_and_the_key(name: str) -> None:
    changes, world, words = BROKEN[name]
    (problem,) = find_problems(config_with(**changes), world)
    assert problem.name == name
    assert "\n" not in problem.message
    for word in (*words, problem.keys[0]):
        assert word in problem.message
    assert check(config_with(**changes), world) == [problem.message]


@pytest.mark.parametrize(
    ("body", "dtype", "hidden_size"),
    [
        *[(body, "float64", 512) for body in ("triton", "triton-tma", "cuda", "cudnn", "flash-attn")],
        *[(body, "float32", 512) for body in ("triton-tma", "cudnn", "flash-attn")],
        *[(body, "float16", 32) for body in ("triton-tma", "cuda", "flash-attn")],
        ("cudnn", "bfloat16", 8 * 256),
        ("cuda", "bfloat16", 8 * 80),
    ],
)
def test_what_a_body_of_attention_does_not_take_is_known_from_the_config(body: str, dtype: str, hidden_size: int) -> None:
    given = {"kernels": {"attention": body}, "train": {"dtype": dtype}, "model": {"hidden_size": hidden_size}}
    assert any(line.startswith(f"kernels.attention={body} ") for line in check(config_with(**given), None))
    sound = {**given, "train": {"dtype": "bfloat16"}, "model": {"hidden_size": 512}}
    assert check(config_with(**sound), None) == []


def test_constraints_name_keys_that_exist() -> None:
    for row in CONSTRAINTS:
        for key in row.keys:
            section, field = key.split(".")
            assert field in SECTIONS[section].model_fields, key


def test_a_sound_config_has_no_problems_with_and_without_a_world() -> None:
    config = config_with(parallel={"tensor": 2, "pipeline": 2, "sequence": True})
    assert check(config) == []
    assert check(config, 8) == []


def test_zero_2_warns_of_what_it_sends() -> None:
    config = config_with(parallel={"zero_stage": 2, "pipeline": 2})
    assert check(config, 4) == []
    (line,) = warnings(config, 4)  # 8 samples on 2 data ranks
    assert "parallel.zero_stage=2" in line and "4 microbatches send 4 times" in line and "parallel.pipeline=2" in line
    (line,) = warnings(config_with(parallel={"zero_stage": 2}), 2)
    assert "4 microbatches" in line and "pipeline" not in line
    assert warnings(config_with(parallel={"zero_stage": 2}), 8) == [], "one microbatch"
    assert warnings(config_with(parallel={"zero_stage": 2, "pipeline": 2}), 2) == [], "one data rank"
    assert warnings(config_with(parallel={"zero_stage": 1, "pipeline": 2}), 4) == []
    assert warnings(config_with(parallel={"zero_stage": 2, "pipeline": 2}), None) == [], "it depends on the number of ranks"


def test_uneven_vocabulary_and_one_data_rank_are_allowed() -> None:
    # Padding never depends on the layout: 100 tokens are 128 rows on any number of tensor ranks.
    config = config_with(model={"num_heads": 4, "hidden_size": 96, "mlp_size": 96}, parallel={"tensor": 4, "sequence": True})
    assert check(config, 4) == []
    assert config.model.padded_vocab_size == 128


@given(number=st.integers(1, 5000), target=st.integers(1, 5000))
def test_suggested_divisors_divide_and_none_is_nearer(number: int, target: int) -> None:
    named = [int(word) for word in divisors_near(number, target).replace(" or", ",").split(", ")]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    assert set(named) <= set(divisors)
    worst = max(abs(d - target) for d in named)
    assert all(abs(d - target) >= worst for d in divisors if d not in named)


@given(step=st.integers(1, 300), target=st.integers(1, 5000))
def test_suggested_multiples_enclose_the_target(step: int, target: int) -> None:
    named = [int(word) for word in multiples_near(step, target).split(" or ")]
    assert all(multiple % step == 0 for multiple in named)
    assert named[-1] - step <= target < named[-1]


def test_a_mistyped_giant_is_answered() -> None:
    # Its divisors cannot all be listed in a lifetime.
    (line,) = check(config_with(model={"hidden_size": 2**61 - 1}))
    assert str(2**61 - 1) in line


def test_every_field_has_a_doc_line_and_every_section_is_frozen() -> None:
    for model in (Config, *SECTIONS.values()):
        assert issubclass(model, Section) and model.model_config["frozen"] and model.model_config["extra"] == "forbid"
        for name, field in model.model_fields.items():
            assert field.description or name in SECTIONS, f"{model.__name__}.{name}"


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    ramp = {"start": 2, "increment": 2, "samples": 24}  # steps of 2, 2, 2, 2, 4, 4, 6, 6, then 8
    assert config_with(train={"steps": None, "tokens": (28 + 8) * 32, "batch_ramp": ramp}).num_steps == 9
    assert config_with(train={"steps": None, "tokens": 9 * 32, "batch_ramp": ramp}).num_steps == 5
    assert config_with(train={"steps": None, "tokens": 8 * 32 * 3 + 1}).num_steps == 4
    assert config_with(train={"steps": None, "tokens": 8 * 32 * 3}).num_steps == 3
