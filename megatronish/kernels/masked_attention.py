"""Causal attention within documents, with dropout of the attention weights: what the flash kernels of `attention.py` cannot mask.

softmax(Q K^T / sqrt(K), over the past of the token's document) * M / (1 - rate) V, where M are the bits of `dropout.py` at
coordinates (head, query, key) of each sample. The explicit path, for CPU and GPU alike: it makes the scores of some heads and
queries of a sample at a time, at most _SCORES of them, and keeps none for backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels import dropout
from megatronish.kernels.registry import accumulate_dtype, register

_SCORES = 1 << 24


def reference(
    query_SBHK: Tensor,
    key_SBGK: Tensor,
    value_SBGK: Tensor,
    documents_SB: Tensor | None,
    samples_B: Tensor | None,
    first_head: int,
    drop_key: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] in the accumulation dtype)."""
    wide = accumulate_dtype(query_SBHK)
    S, repeats = query_SBHK.shape[0], query_SBHK.shape[2] // key_SBGK.shape[2]
    key = key_SBGK.to(wide).repeat_interleave(repeats, 2)
    value = value_SBGK.to(wide).repeat_interleave(repeats, 2)
    scores_BHST = torch.einsum("sbhk,tbhk->bhst", query_SBHK.to(wide), key) / math.sqrt(query_SBHK.shape[-1])
    hidden = torch.ones(S, S, dtype=torch.bool, device=query_SBHK.device).triu(1)
    if documents_SB is not None:
        hidden = hidden | (documents_SB.t()[:, None, :, None] != documents_SB.t()[:, None, None, :])
    scores_BHST = scores_BHST.masked_fill(hidden, -math.inf)
    weights_BHST = scores_BHST.softmax(-1)
    if samples_B is not None:
        weights_BHST = dropout.reference(weights_BHST, samples_B, 0, first_head, drop_key, rate)
    out = torch.einsum("bhst,tbhk->sbhk", weights_BHST, value)
    return out.to(query_SBHK.dtype), scores_BHST.logsumexp(-1)


@dataclass(frozen=True)
class _Part:
    """Queries [begin, end) of key/value groups [groups] of one sample; their keys are [0, end)."""

    sample: int
    groups: slice
    heads: slice
    begin: int
    end: int


def _parts(query_SBHK: Tensor, num_groups: int) -> Iterator[_Part]:
    S, B, H, _ = query_SBHK.shape
    repeats = H // num_groups
    groups_at_once = max(1, _SCORES // (repeats * S * S))
    rows_at_once = S if groups_at_once > 1 else max(1, min(S, _SCORES // (repeats * S)))
    for sample in range(B):
        for group in range(0, num_groups, groups_at_once):
            stop = min(group + groups_at_once, num_groups)
            for begin in range(0, S, rows_at_once):
                heads = slice(group * repeats, stop * repeats)
                yield _Part(sample, slice(group, stop), heads, begin, min(begin + rows_at_once, S))


def _heads_first(x_SBGK: Tensor, part: _Part, *, repeats: int, wide: torch.dtype) -> Tensor:
    """A part's keys or values as [heads, T, K]."""
    return x_SBGK[: part.end, part.sample, part.groups].to(wide).transpose(0, 1).repeat_interleave(repeats, 0)


def _scores(query_hsK: Tensor, key_hTK: Tensor, part: _Part, documents_SB: Tensor | None) -> Tensor:
    """[heads, queries, T], scaled; -inf where a query may not look."""
    scores = query_hsK @ key_hTK.transpose(1, 2)
    scores *= 1.0 / math.sqrt(query_hsK.shape[-1])
    index = torch.arange(part.end, device=scores.device)
    hidden = index[part.begin :, None] < index
    if documents_SB is not None:
        document = documents_SB[: part.end, part.sample]
        hidden = hidden | (document[part.begin :, None] != document)
    return scores.masked_fill_(hidden, -math.inf)


def _kept(part: _Part, samples_B: Tensor, S: int, first_head: int, drop_key: int, rate: float) -> Tensor:
    """bool [heads, queries, T]: the weights that stay."""
    sample, rows = samples_B[part.sample : part.sample + 1], part.end - part.begin
    heads = range(first_head + part.heads.start, first_head + part.heads.stop)
    if rows == S:
        whole = dropout.keep_bits(sample, start=heads.start * S * S, count=len(heads) * S * S, key=drop_key, rate=rate)
        return whole.view(len(heads), S, S)
    starts = [(head * S + part.begin) * S for head in heads]
    bits = [dropout.keep_bits(sample, start=start, count=rows * S, key=drop_key, rate=rate).view(rows, S) for start in starts]
    return torch.stack(bits)[..., : part.end]


def _forward(
    query_SBHK: Tensor,
    key_SBGK: Tensor,
    value_SBGK: Tensor,
    documents_SB: Tensor | None,
    samples_B: Tensor | None,
    first_head: int,
    drop_key: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    out, log_sum_exp_BHS = _forward_fake(query_SBHK, key_SBGK, value_SBGK, documents_SB, samples_B, first_head, drop_key, rate)
    S, wide = query_SBHK.shape[0], accumulate_dtype(query_SBHK)
    repeats = query_SBHK.shape[2] // key_SBGK.shape[2]
    for part in _parts(query_SBHK, key_SBGK.shape[2]):
        query = query_SBHK[part.begin : part.end, part.sample, part.heads].to(wide).transpose(0, 1)
        scores = _scores(query, _heads_first(key_SBGK, part, repeats=repeats, wide=wide), part, documents_SB)
        log_sum_exp = scores.logsumexp(-1)
        weights = scores.sub_(log_sum_exp[..., None]).exp_()
        if samples_B is not None:
            weights *= _kept(part, samples_B, S, first_head, drop_key, rate)
            weights *= 1.0 / (1.0 - rate)
        mixed = weights @ _heads_first(value_SBGK, part, repeats=repeats, wide=wide)
        out[part.begin : part.end, part.sample, part.heads] = mixed.transpose(0, 1)
        log_sum_exp_BHS[part.sample, part.heads, part.begin : part.end] = log_sum_exp
    return out, log_sum_exp_BHS


def _forward_fake(
    query_SBHK: Tensor,
    key_SBGK: Tensor,
    value_SBGK: Tensor,
    documents_SB: Tensor | None,
    samples_B: Tensor | None,
    first_head: int,
    drop_key: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    S, B, H, _ = query_SBHK.shape
    return query_SBHK.new_empty(query_SBHK.shape), query_SBHK.new_empty((B, H, S), dtype=accumulate_dtype(query_SBHK))


def _backward(
    dout: Tensor,
    query_SBHK: Tensor,
    key_SBGK: Tensor,
    value_SBGK: Tensor,
    out: Tensor,
    log_sum_exp_BHS: Tensor,
    documents_SB: Tensor | None,
    samples_B: Tensor | None,
    first_head: int,
    drop_key: int,
    rate: float,
) -> tuple[Tensor, Tensor, Tensor]:
    S, wide = query_SBHK.shape[0], accumulate_dtype(query_SBHK)
    G, K = key_SBGK.shape[2], key_SBGK.shape[3]
    repeats = query_SBHK.shape[2] // G
    dquery = torch.empty_like(query_SBHK, memory_format=torch.contiguous_format)
    # Sums over queries and over the heads of a group, in the accumulation dtype.
    dkey, dvalue = (torch.zeros(key_SBGK.shape, dtype=wide, device=key_SBGK.device) for _ in range(2))
    for part in _parts(query_SBHK, G):
        rows = (slice(part.begin, part.end), part.sample, part.heads)
        query, dmixed, mixed = (x[rows].to(wide).transpose(0, 1) for x in (query_SBHK, dout, out))
        key, value = (_heads_first(x, part, repeats=repeats, wide=wide) for x in (key_SBGK, value_SBGK))
        log_sum_exp = log_sum_exp_BHS[part.sample, part.heads, part.begin : part.end]
        weights = _scores(query, key, part, documents_SB).sub_(log_sum_exp[..., None]).exp_()
        dweights, dropped = dmixed @ value.transpose(1, 2), weights
        if samples_B is not None:
            factor = _kept(part, samples_B, S, first_head, drop_key, rate).to(wide).mul_(1.0 / (1.0 - rate))
            dropped = weights * factor
            dweights *= factor
        # sum over keys of weight x dweight = dout . out, dropout or not (Dao et al. 2022, appendix B.2).
        dscores = dweights.sub_((dmixed * mixed).sum(-1, keepdim=True)).mul_(weights).mul_(1.0 / math.sqrt(K))
        dquery[rows] = (dscores @ key).transpose(0, 1).to(dquery.dtype)
        for total, product in ((dkey, dscores.transpose(1, 2) @ query), (dvalue, dropped.transpose(1, 2) @ dmixed)):
            total[: part.end, part.sample, part.groups] += product.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return dquery, dkey.to(key_SBGK.dtype), dvalue.to(value_SBGK.dtype)


def _backward_fake(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_MASKS = "Tensor? documents, Tensor? samples, int first_head, int drop_key, float rate"
_forward_op = register(
    f"masked_attention(Tensor query, Tensor key, Tensor value, {_MASKS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = register(
    f"masked_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_MASKS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *masks: Any) -> Tensor:
        out, log_sum_exp = _forward_op(query, key, value, *masks)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward_op(dout, *ctx.saved_tensors, *ctx.masks), None, None, None, None, None


@dataclass(frozen=True)
class WeightDropout:
    """Which attention weights are dropped: see `dropout.dropout`."""

    samples_B: Tensor
    first_head: int
    key: int
    rate: float


def masked_attention(
    query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *, documents_SB: Tensor | None, drop: WeightDropout | None
) -> Tensor:
    """Causal attention over S: query [S, B, H, K], key and value [S, B, G, K] with H a multiple of G -> [S, B, H, K].

    documents_SB: int64, whole along S; a token attends to those with its own number only. Saves its inputs, its output and the
    log-sum-exp [B, H, S]."""
    drops = (None, 0, 0, 0.0) if drop is None else (drop.samples_B, drop.first_head, drop.key, drop.rate)
    out: Tensor = _MaskedAttention.apply(query_SBHK, key_SBGK, value_SBGK, documents_SB, *drops)
    return out


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Inputs that tests and benches run every implementation on: documents alone, dropout alone, both."""
    generator = torch.Generator(device).manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    for S, B, H, G, K, num_documents, rate in [(16, 2, 4, 4, 8, 3, 0.0), (13, 1, 4, 2, 16, 1, 0.3), (33, 2, 6, 2, 8, 4, 0.1)]:
        shapes = [(S, B, H, K), (S, B, G, K), (S, B, G, K)]
        q, k, v = (torch.randn(*s, generator=generator, dtype=dtype, device=device) for s in shapes)
        documents = torch.randint(num_documents, (S, B), generator=generator, device=device).sort(0).values
        samples = torch.arange(B, device=device) + 41 if rate else None
        cases.append((q, k, v, documents if num_documents > 1 else None, samples, 8, 99, rate))
    return cases
