"""Our Llama against Hugging Face's: logits, gradients, and 50 steps of training."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatronish.assemble import assemble, mesh_shape
from megatronish.batch import TokenContext
from megatronish.config import Config, ModelConfig
from megatronish.errors import UserError
from megatronish.interop.llama import LLAMA
from megatronish.kernels.rotary_tables import rotary_tables
from megatronish.models.decoder import rotary_settings
from megatronish.models.llama import Llama
from megatronish.optim.lr_schedule import learning_rate
from megatronish.parallel.mesh import build_mesh
from tests.batches import LearnableBatches, learnable_batch
from tests.ranks import ranks

transformers = pytest.importorskip("transformers")

SHAPES = {
    "square": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "mlp_size": 64, "vocab_size": 128},
    "grouped heads": {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "mlp_size": 80, "vocab_size": 97},
    "one key/value head": {"num_layers": 1, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 1, "mlp_size": 40, "vocab_size": 50},
    "odd sizes": {"num_layers": 2, "hidden_size": 30, "num_heads": 5, "mlp_size": 77, "vocab_size": 131, "vocab_multiple": 7},
    "long rotary base": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "mlp_size": 96, "vocab_size": 128, "rope_theta": 5e5},
    "frequencies of Llama 3.1": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_size": 48,
        "vocab_size": 64,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8},
    },
    "YaRN, interleaved": {
        "num_layers": 2,
        "hidden_size": 96,
        "num_heads": 6,
        "num_kv_heads": 2,
        "mlp_size": 48,
        "vocab_size": 64,
        "rope_layout": "interleaved",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 10,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
        },
    },
    "GeGLU": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "mlp_size": 64, "vocab_size": 128, "activation": "geglu"},
    "large epsilon": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "mlp_size": 48, "vocab_size": 64, "norm_eps": 1e-2},
}
shapes = pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())


def their_model(config: ModelConfig, sequence_length: int, dtype: torch.dtype) -> nn.Module:
    """Hugging Face's model of this shape, with random norms too, so that a norm in the wrong place shows."""
    torch.manual_seed(0)
    given = LLAMA.write_config(config, sequence_length)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(given)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than a training's first weights, so that attention is far from uniform.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def our_model(config: ModelConfig, theirs: nn.Module, dtype: torch.dtype) -> Llama:
    model = Llama(config, dtype=dtype)
    model.load_state_dict(LLAMA.from_hugging_face(config, theirs.state_dict()))
    return model


def both(fields: dict[str, Any], dtype: torch.dtype) -> tuple[ModelConfig, Llama, nn.Module, Tensor]:
    config = ModelConfig.model_validate(fields)
    theirs = their_model(config, 24, dtype)
    tokens_SB = torch.randint(config.vocab_size, (24, 3), generator=torch.Generator().manual_seed(1))
    return config, our_model(config, theirs, dtype), theirs, tokens_SB


def context_of(tokens_SB: Tensor) -> TokenContext:
    S, B = tokens_SB.shape
    return TokenContext(torch.arange(S)[:, None].expand(S, B), torch.arange(B))


@shapes
def test_logits_equal_hugging_face(fields: dict[str, Any]) -> None:
    config, ours, theirs, tokens_SB = both(fields, torch.float32)
    with torch.no_grad():
        got = ours(tokens_SB, context_of(tokens_SB))[..., : config.vocab_size]
        expected = theirs(tokens_SB.t()).logits.transpose(0, 1)
    assert expected.std() > 0.5  # else a small difference would say little
    assert (got - expected).abs().max() < 1e-4


def widen(theirs: nn.Module, config: ModelConfig) -> None:
    """Their norms and rotary tables fix float32; torch's own norm and our tables in float64 take their places."""

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(position_ids, dtype=torch.float64, **rotary_settings(config))
        return torch.cat((cos, cos), -1).squeeze(-2), torch.cat((sin, sin), -1).squeeze(-2)

    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(
                nn.functional.rms_norm, normalized_shape=(config.hidden_size,), weight=module.weight, eps=config.norm_eps
            )
        elif type(module).__name__ == "LlamaRotaryEmbedding":
            module.forward = tables


@pytest.mark.parametrize(
    ("wide", "tolerance"),
    [
        # As they are: float32 (6e-8) inside norms and tables, through every layer and back; 2e-6 seen.
        (False, 1e-5),
        # float64 throughout: 2e-16 through the same path.
        (True, 1e-12),
    ],
    ids=["as it is", "widened"],
)
@shapes
def test_every_gradient_equals_hugging_face(fields: dict[str, Any], wide: bool, tolerance: float) -> None:
    config, ours, theirs, tokens_SB = both(fields, torch.float64)
    if wide:
        widen(theirs, config)
    labels = tokens_SB.roll(-1, 0)
    logits = ours(tokens_SB, context_of(tokens_SB))[..., : config.vocab_size]
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    nn.functional.cross_entropy(theirs(tokens_SB.t()).logits.transpose(0, 1).flatten(0, 1), labels.flatten()).backward()
    got = LLAMA.to_hugging_face(config, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        error = (got[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@shapes
def test_the_name_map_is_total_and_reversible(fields: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(fields)
    theirs = their_model(config, 8, torch.float32).state_dict()
    ours = LLAMA.from_hugging_face(config, theirs)
    plain = Llama(config, dtype=torch.float32, device="meta")
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in plain.named_parameters()}
    assert list(LLAMA.name_map(config)) == [name for name, _ in plain.named_parameters()]
    back = LLAMA.to_hugging_face(config, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert not ours["head.weight"][config.vocab_size :].any()


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    config = ModelConfig.model_validate(SHAPES["grouped heads"])
    state = their_model(config, 8, torch.float32).state_dict()
    with pytest.raises(UserError, match=r"1 missing tensors .*model\.layers\.2\.mlp\.up_proj\.weight"):
        LLAMA.from_hugging_face(config, {k: v for k, v in state.items() if k != "model.layers.2.mlp.up_proj.weight"})
    with pytest.raises(UserError, match=r"1 unknown tensors .*model\.layers\.0\.self_attn\.q_proj\.bias"):
        LLAMA.from_hugging_face(config, {**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
    with pytest.raises(UserError, match=r"k_proj\.weight has shape \[48, 48\].* \[16, 48\]"):
        LLAMA.from_hugging_face(config, {**state, "model.layers.1.self_attn.k_proj.weight": torch.zeros(48, 48)})


NUM_STEPS = 50


def training(tp: int, pp: int, dp: int) -> Config:
    """A small run; the global batch is the same on every layout."""
    return Config.model_validate(
        {
            "name": "truth",
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_heads": 8,
                "num_kv_heads": 4,
                "mlp_size": 176,
                "vocab_size": 250,
                "vocab_multiple": 3,
            },
            "parallel": {"tensor": tp, "pipeline": pp, "data": dp, "sequence": tp > 1, "zero_stage": 1},
            "data": {"train": "none", "sequence_length": 32},
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 5, "clip_norm": 1.0, "bucket_mib": 0.05},
            "train": {"steps": NUM_STEPS, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3},
        }
    )


@cache
def their_training() -> tuple[dict[str, Tensor], list[float], list[float]]:
    """(first weights, losses, norms) of Hugging Face's model under torch.optim.AdamW."""
    config = training(1, 1, 1)
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(LLAMA.write_config(config.model, 32)))
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    c = config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(c, done + 1, NUM_STEPS) / c.lr)
    losses, norms = [], []
    for step in range(1, NUM_STEPS + 1):
        batch = learnable_batch(config, step)
        logits = model(batch.tokens_SB.t()).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_SB.t().flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm).item())
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    return first, losses, norms


def train_rank(rank: int, config: Config, theirs: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """(losses, norms) of our trainer from their first weights."""
    world_size = config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)
    mesh = build_mesh(mesh_shape(config, world_size), rank, device=torch.device("cpu"))
    run = assemble(config, mesh, LearnableBatches(config, mesh.index("dp"), mesh.size("dp")))
    whole = LLAMA.from_hugging_face(config.model, theirs)
    with torch.no_grad():
        for bucket in run.cut.buckets:
            for slot in bucket.slots:
                starts_and_sizes = zip(slot.local_box.offsets, slot.local_box.sizes, strict=True)
                run.cut.parameters.by_name[slot.name].copy_(whole[slot.name][tuple(slice(o, o + n) for o, n in starts_and_sizes)])
    run.optimizer.reset_master()
    results = list(run.trainer.fit(1, NUM_STEPS))
    run.optimizer.ensure_parameters()  # a rank that leaves while others still gather cuts them off
    return [r.loss.item() for r in results], [r.grad_norm.item() for r in results]


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)], ids=["one process", "tp2 pp2 dp2"])
def test_fifty_steps_equal_hugging_face_and_torch_adamw(layout: tuple[int, int, int]) -> None:
    first, losses, norms = their_training()
    for got_losses, got_norms in ranks(layout[0] * layout[1] * layout[2]).run(train_rank, training(*layout), first):
        # It must learn, or equal losses would say little.
        assert losses[-1] < 0.9 * losses[0]
        # float32 rounding (6e-8) in another order of sums, fed back through 50 steps of Adam, reached 2e-7.
        assert got_losses == pytest.approx(losses, rel=1e-4)
        assert got_norms == pytest.approx(norms, rel=1e-3)
