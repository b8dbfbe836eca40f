"""The truth that layouts are compared with: nothing of `parallel/`, `pipeline/` or `optim/` but the learning rate's formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatronish.comm.host import read_scalar
from megatronish.comm.random import normal_fill_, stream_key
from megatronish.config import Config
from megatronish.models import MODELS
from megatronish.models.layers import place_dropout
from megatronish.optim.lr_schedule import learning_rate
from megatronish.verify.batches import global_batch


@dataclass
class Reference:
    """What the plain model gives, step by step; tensors by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """After each step."""


def plain_model(config: Config) -> nn.Module:
    """The whole model on one device, with the weights that every layout starts from."""
    architecture = MODELS[config.model.architecture]
    dtype = getattr(torch, config.train.dtype)
    model = architecture.module(config.model, dtype=dtype)
    place_dropout(model, seed=config.train.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = architecture.init_std(config.model, name)
            if std is None:
                parameter.fill_(1.0)
            else:
                zero, key = (0,) * parameter.dim(), stream_key(config.train.seed, "init", name)
                normal_fill_(parameter, offsets=zero, global_shape=tuple(parameter.shape), key=key, std=std)
    return model


def train_reference(config: Config) -> Reference:
    """Train the plain model in this process: autograd, torch's cross entropy and AdamW. Of the config's layout nothing is read."""
    model = plain_model(config)
    decays = {name: p.dim() >= 2 and not name.endswith(".bias") for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if decays[name]]
    vectors = [p for name, p in model.named_parameters() if not decays[name]]
    c = config.optim
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    result = Reference()
    for step in range(1, config.num_steps + 1):
        batch = global_batch(config, step)
        logits = model(batch.tokens_SB, batch.context)[..., : config.model.vocab_size]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels_SB.flatten(), reduction="none", label_smoothing=config.train.label_smoothing
        )
        losses = losses + config.train.z_loss * logits.flatten(0, 1).logsumexp(-1).square()
        loss = (losses * batch.loss_mask_SB.flatten()).sum() / batch.loss_mask_SB.sum()
        optimizer.zero_grad()
        loss.backward()
        result.losses.append(read_scalar(loss.detach(), 0.0))
        result.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        result.norms.append(read_scalar(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm or math.inf), 0.0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(c, step, config.num_steps)
        optimizer.step()
        result.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return result
