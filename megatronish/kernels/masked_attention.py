"""Attention with what the flash kernels of torch cannot mask: documents, dropout of the weights, sliding window, ALiBi, any scale,
full or causal, other numbers of queries than of keys.

softmax(scale Q K^T - slope |distance|, over what the query may see) * M / (1 - rate) V, where M are the bits of `dropout.py` at
coordinates (head, query, key) of each sample. Query s of S stands at place s + T - S of T keys. The body named `torch` makes the
scores of some heads and queries of a sample at a time, at most _SCORES of them, and keeps none for backward; `triton` makes no
scores outside of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatronish.kernels import dropout
from megatronish.kernels.attention_bodies import triton_bodies
from megatronish.kernels.registry import Implementation, accumulate_dtype, register

if TYPE_CHECKING:
    from megatronish.kernels.triton.attention import Masks

_SCORES = 1 << 24


class Mask(NamedTuple):
    """The op's arguments after query, key and value."""

    documents_SB: Tensor | None = None
    """int64 [S, B], S = T: a query sees the keys of its own number only."""
    slopes_H: Tensor | None = None
    """ALiBi (Press et al. 2021), none negative: scores get -slope x distance."""
    samples_B: Tensor | None = None
    """int64, global numbers: weights are dropped. See `dropout.dropout` for this and the next three."""
    first_head: int = 0
    drop_key: int = 0
    rate: float = 0.0
    scale: float = 1.0
    causal: bool = True
    window: int = 0
    """A query sees keys less than so many places away; 0: all."""


def reference(query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] in the accumulation dtype). A query that sees
    nothing gets 0 and -inf."""
    m, wide = Mask(*mask), accumulate_dtype(query_SBHK)
    S, T, repeats = query_SBHK.shape[0], key_TBGK.shape[0], query_SBHK.shape[2] // key_TBGK.shape[2]
    key = key_TBGK.to(wide).repeat_interleave(repeats, 2)
    value = value_TBGK.to(wide).repeat_interleave(repeats, 2)
    scores_BHST = torch.einsum("sbhk,tbhk->bhst", query_SBHK.to(wide), key) * m.scale
    index = torch.arange(max(S, T), device=query_SBHK.device)
    distance = index[:S, None] + (T - S) - index[:T]
    if m.slopes_H is not None:
        scores_BHST = scores_BHST - m.slopes_H.to(wide)[:, None, None] * distance.abs()
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if m.causal:
        hidden = hidden | (distance < 0)
    if m.window:
        hidden = hidden | (distance.abs() >= m.window)
    if m.documents_SB is not None:
        hidden = hidden | (m.documents_SB.t()[:, None, :, None] != m.documents_SB.t()[:, None, None, :])
    scores_BHST = scores_BHST.masked_fill(hidden, -math.inf)
    # softmax gives NaN where all is hidden.
    weights_BHST = scores_BHST.softmax(-1).masked_fill(hidden, 0.0)
    if m.samples_B is not None:
        weights_BHST = dropout.reference(weights_BHST, m.samples_B, 0, m.first_head, m.drop_key, m.rate)
    out = torch.einsum("bhst,tbhk->sbhk", weights_BHST, value)
    return out.to(query_SBHK.dtype), scores_BHST.logsumexp(-1)


@dataclass(frozen=True)
class _Part:
    """Queries [begin, end) of key/value groups [groups] of one sample, and the first `keys` of its keys."""

    sample: int
    groups: slice
    heads: slice
    begin: int
    end: int
    keys: int


def _parts(query_SBHK: Tensor, key_TBGK: Tensor, causal: bool) -> Iterator[_Part]:
    S, B, H, _ = query_SBHK.shape
    T, _, num_groups, _ = key_TBGK.shape
    repeats = H // num_groups
    groups_at_once = max(1, _SCORES // (repeats * S * T))
    rows_at_once = S if groups_at_once > 1 else max(1, min(S, _SCORES // (repeats * T)))
    for sample in range(B):
        for group in range(0, num_groups, groups_at_once):
            stop = min(group + groups_at_once, num_groups)
            for begin in range(0, S, rows_at_once):
                heads = slice(group * repeats, stop * repeats)
                end = min(begin + rows_at_once, S)
                # One at least, be it hidden: a sum over nothing is an error.
                keys = max(1, min(T, end + T - S)) if causal else T
                yield _Part(sample, slice(group, stop), heads, begin, end, keys)


def _heads_first(x_TBGK: Tensor, part: _Part, *, repeats: int, wide: torch.dtype) -> Tensor:
    """A part's keys or values as [heads, keys, K]."""
    return x_TBGK[: part.keys, part.sample, part.groups].to(wide).transpose(0, 1).repeat_interleave(repeats, 0)


def _scores(query_hsK: Tensor, key_htK: Tensor, part: _Part, m: Mask, *, shift: int) -> Tensor:
    """[heads, queries, keys], scaled; -inf where a query may not look. `shift`: T - S."""
    scores = query_hsK @ key_htK.transpose(1, 2)
    scores *= m.scale
    index = torch.arange(max(part.end + shift, part.keys), device=scores.device)
    place, column = torch.arange(part.begin + shift, part.end + shift, device=scores.device)[:, None], index[: part.keys]
    if m.slopes_H is not None:
        scores -= m.slopes_H[part.heads].to(scores.dtype)[:, None, None] * (place - column).abs()
    hidden = place < column if m.causal else None
    if m.window:
        far = (place - column).abs() >= m.window
        hidden = far if hidden is None else hidden | far
    if m.documents_SB is not None:
        document = m.documents_SB[: part.keys, part.sample]
        others = m.documents_SB[part.begin : part.end, part.sample, None] != document
        hidden = others if hidden is None else hidden | others
    return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)


def _weights(scores: Tensor, log_sum_exp: Tensor, *, may_be_empty: bool) -> Tensor:
    """softmax in place, from its log-sum-exp; zeros for a query that sees nothing: one, where there are fewer keys than queries."""
    if may_be_empty:
        log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -math.inf, 0.0)
    return scores.sub_(log_sum_exp[..., None]).exp_()


def _kept(part: _Part, m: Mask, *, S: int, T: int) -> Tensor:
    """bool [heads, queries, keys]: the weights that stay."""
    assert m.samples_B is not None
    sample, rows = m.samples_B[part.sample : part.sample + 1], part.end - part.begin
    heads = range(m.first_head + part.heads.start, m.first_head + part.heads.stop)
    draw: dict[str, Any] = {"key": m.drop_key, "rate": m.rate}
    if rows == S:
        whole = dropout.keep_bits(sample, start=heads.start * S * T, count=len(heads) * S * T, **draw)
        return whole.view(len(heads), S, T)[..., : part.keys]
    starts = [(head * S + part.begin) * T for head in heads]
    bits = [dropout.keep_bits(sample, start=start, count=rows * T, **draw).view(rows, T) for start in starts]
    return torch.stack(bits)[..., : part.keys]


def _forward(query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    m = Mask(*mask)
    out, log_sum_exp_BHS = _forward_fake(query_SBHK, key_TBGK, value_TBGK)
    S, T, wide = query_SBHK.shape[0], key_TBGK.shape[0], accumulate_dtype(query_SBHK)
    repeats = query_SBHK.shape[2] // key_TBGK.shape[2]
    for part in _parts(query_SBHK, key_TBGK, m.causal):
        query = query_SBHK[part.begin : part.end, part.sample, part.heads].to(wide).transpose(0, 1)
        scores = _scores(query, _heads_first(key_TBGK, part, repeats=repeats, wide=wide), part, m, shift=T - S)
        log_sum_exp = scores.logsumexp(-1)
        weights = _weights(scores, log_sum_exp, may_be_empty=S > T)
        if m.samples_B is not None:
            weights *= _kept(part, m, S=S, T=T)
            weights *= 1.0 / (1.0 - m.rate)
        mixed = weights @ _heads_first(value_TBGK, part, repeats=repeats, wide=wide)
        out[part.begin : part.end, part.sample, part.heads] = mixed.transpose(0, 1)
        log_sum_exp_BHS[part.sample, part.heads, part.begin : part.end] = log_sum_exp
    return out, log_sum_exp_BHS


def _forward_fake(query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    S, B, H, _ = query_SBHK.shape
    return query_SBHK.new_empty(query_SBHK.shape), query_SBHK.new_empty((B, H, S), dtype=accumulate_dtype(query_SBHK))


def _backward(
    dout: Tensor, query_SBHK: Tensor, key_TBGK: Tensor, value_TBGK: Tensor, out: Tensor, log_sum_exp_BHS: Tensor, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    m = Mask(*mask)
    S, T, wide = query_SBHK.shape[0], key_TBGK.shape[0], accumulate_dtype(query_SBHK)
    repeats = query_SBHK.shape[2] // key_TBGK.shape[2]
    dquery = torch.empty_like(query_SBHK, memory_format=torch.contiguous_format)
    # Sums over queries and over the heads of a group, in the accumulation dtype.
    dkey, dvalue = (torch.zeros(key_TBGK.shape, dtype=wide, device=key_TBGK.device) for _ in range(2))
    for part in _parts(query_SBHK, key_TBGK, m.causal):
        rows = (slice(part.begin, part.end), part.sample, part.heads)
        query, dmixed, mixed = (x[rows].to(wide).transpose(0, 1) for x in (query_SBHK, dout, out))
        key, value = (_heads_first(x, part, repeats=repeats, wide=wide) for x in (key_TBGK, value_TBGK))
        log_sum_exp = log_sum_exp_BHS[part.sample, part.heads, part.begin : part.end]
        weights = _weights(_scores(query, key, part, m, shift=T - S), log_sum_exp, may_be_empty=S > T)
        dweights, dropped = dmixed @ value.transpose(1, 2), weights
        if m.samples_B is not None:
            factor = _kept(part, m, S=S, T=T).to(wide).mul_(1.0 / (1.0 - m.rate))
            dropped = weights * factor
            dweights *= factor
        # sum over keys of weight x dweight = dout . out, dropout or not (Dao et al. 2022, appendix B.2).
        dscores = dweights.sub_((dmixed * mixed).sum(-1, keepdim=True)).mul_(weights).mul_(m.scale)
        dquery[rows] = (dscores @ key).transpose(0, 1).to(dquery.dtype)
        for total, product in ((dkey, dscores.transpose(1, 2) @ query), (dvalue, dropped.transpose(1, 2) @ dmixed)):
            total[: part.keys, part.sample, part.groups] += product.unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    return dquery, dkey.to(key_TBGK.dtype), dvalue.to(value_TBGK.dtype)


def _backward_fake(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _reference_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        again, _ = reference(*inputs, *mask)
    dq, dk, dv = torch.autograd.grad(again, inputs, dout)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _reference_forward(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
    out, lse = reference(query, key, value, *mask)
    return out.contiguous(), lse.contiguous()


def _masks(m: Mask) -> Masks:
    from megatronish.kernels.triton import attention

    return attention.Masks(
        causal=m.causal,
        window=m.window,
        documents_TB=None if m.documents_SB is None else m.documents_SB.contiguous(),
        slopes_H=None if m.slopes_H is None else m.slopes_H.float().contiguous(),
        samples_B=None if m.samples_B is None else m.samples_B.contiguous(),
        first_head=m.first_head,
        key=m.drop_key,
        rate=m.rate,
    )


def _triton_masks(query: Tensor, *mask: Any) -> tuple[Masks, float]:
    m = Mask(*mask)
    return _masks(m), m.scale


_MASK = (
    "Tensor? documents, Tensor? slopes, Tensor? samples, int first_head, int drop_key, float rate, "
    "float scale, bool causal, int window"
)


def _by_queries(query: Tensor, *others: Any) -> tuple[Sequence[int], torch.dtype, str]:
    """Of the queries, or of their output's gradient. Attention without masks is another kind: evaluation with dropout has it."""
    return query.shape, query.dtype, "masked"


_forward_op = register(
    f"masked_attention(Tensor query, Tensor key, Tensor value, {_MASK}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    also={"reference": Implementation(_reference_forward), **triton_bodies(_triton_masks, backward=False)},
    choice="attention",
    keyed_by=_by_queries,
)
_backward_op = register(
    f"masked_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_MASK})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    also={"reference": Implementation(_reference_backward), **triton_bodies(_triton_masks, backward=True)},
    choice="attention",
    keyed_by=_by_queries,
)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = _forward_op(query, key, value, *mask)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.mask = mask
        ctx.mark_non_differentiable(log_sum_exp)
        return out, log_sum_exp

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Tensor | None, ...]:
        return *_backward_op(dout, *ctx.saved_tensors, *ctx.mask), *[None] * len(ctx.mask)


@dataclass(frozen=True)
class WeightDropout:
    """Which attention weights are dropped: see `dropout.dropout`."""

    samples_B: Tensor
    first_head: int
    key: int
    rate: float


def attend(
    query_SBHK: Tensor,
    key_TBGK: Tensor,
    value_TBGK: Tensor,
    *,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    documents_SB: Tensor | None = None,
    slopes_H: Tensor | None = None,
    drop: WeightDropout | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [S, B, H, K], log-sum-exp of the scaled scores [B, H, S] in the accumulation dtype, which has no gradient) of query
    [S, B, H, K], key and value [T, B, G, K] with H a multiple of G. See `Mask`; scale is 1 / sqrt(K) by default.

    A query that sees nothing gets 0 and -inf. Saves its inputs, its output and the log-sum-exp."""
    drops = (None, 0, 0, 0.0) if drop is None else (drop.samples_B, drop.first_head, drop.key, drop.rate)
    scale = 1.0 / math.sqrt(query_SBHK.shape[-1]) if scale is None else scale
    assert documents_SB is None or query_SBHK.shape[0] == key_TBGK.shape[0], "documents need a number for every query and key"
    out: tuple[Tensor, Tensor] = _MaskedAttention.apply(
        query_SBHK, key_TBGK, value_TBGK, documents_SB, slopes_H, *drops, scale, causal, window
    )
    return out


def masked_attention(
    query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *, documents_SB: Tensor | None, drop: WeightDropout | None
) -> Tensor:
    """Causal attention over S: query [S, B, H, K], key and value [S, B, G, K] with H a multiple of G -> [S, B, H, K].

    documents_SB: int64, whole along S; a token attends to those with its own number only."""
    return attend(query_SBHK, key_SBGK, value_SBGK, documents_SB=documents_SB, drop=drop)[0]


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Inputs that tests and benches run every implementation on: documents alone, dropout alone, both; a window over fewer queries
    than keys; ALiBi, full, with fewer keys than queries; queries that see nothing."""
    generator = torch.Generator(device).manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    for S, T, B, H, G, K, num_documents, rate, causal, window in [
        (16, 16, 2, 4, 4, 8, 3, 0.0, True, 0),
        (13, 13, 1, 4, 2, 16, 1, 0.3, True, 0),
        (33, 33, 2, 6, 2, 8, 4, 0.1, True, 0),
        (9, 20, 1, 2, 1, 8, 1, 0.0, True, 6),
        (14, 11, 1, 4, 2, 8, 1, 0.0, False, 0),
        (12, 9, 1, 2, 2, 8, 1, 0.2, True, 4),
    ]:
        shapes = [(S, B, H, K), (T, B, G, K), (T, B, G, K)]
        q, k, v = (torch.randn(*s, generator=generator, dtype=dtype, device=device) for s in shapes)
        documents = torch.randint(num_documents, (S, B), generator=generator, device=device).sort(0).values
        slopes = None if causal else torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
        samples = torch.arange(B, device=device) + 41 if rate else None
        scale = 1.0 / math.sqrt(K) if causal else 0.2
        cases.append((q, k, v, documents if num_documents > 1 else None, slopes, samples, 8, 99, rate, scale, causal, window))
    return cases
