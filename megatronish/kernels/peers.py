"""Bodies by others, each used only where its package is installed: thin calls with the arguments and results of our ops.

None is a dependency. dispatch.py admits one only after it has matched the reference on this device; what an installed version no
longer has under these names is a refusal with that reason.

`apex` is NVIDIA's: the project of that name on the package index is another one, so its extension is imported to know.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_cpu, refuses_package
from megatronish.kernels.registry import Implementation

_APEX = "fused_layer_norm_cuda"
_ENGINE = "transformer_engine_torch"
_FLASH = "flash_attn.flash_attn_interface"


def _liger(op: str) -> Any:
    return importlib.import_module(f"liger_kernel.ops.{op}")


def _refuses_liger(op: str) -> Callable[..., str | None]:
    def refuses(x: Tensor, *others: Any) -> str | None:
        if reason := refuses_package("liger_kernel", f"liger_kernel.ops.{op}") or refuses_cpu(x):
            return reason
        if x.dtype == torch.float64 or not x.is_contiguous() or not x.numel():
            return "float64, empty or strided tensors"
        return None if x.shape[-1] <= 65536 else f"rows of {x.shape[-1]} (65,536 at most)"

    return refuses


def _liger_settings(columns: int) -> tuple[int, int]:
    settings: tuple[int, int] = importlib.import_module("liger_kernel.ops.utils").calculate_settings(columns)
    return settings


def _liger_rms(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # "llama": rounded before the weight, as in rms_norm.py.
    y, _, rstd, *_ = _liger("rms_norm").rms_norm_forward(x, weight_D, eps, 0.0, "llama", False)
    return y, rstd.view(*x.shape[:-1], 1)


def _liger_rms_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.flatten(0, -2)
    llama, in_place, row_mode = 0, False, False
    backward = _liger("rms_norm").rms_norm_backward
    settings = _liger_settings(x.shape[-1])
    dx, dweight = backward(dy.contiguous(), rows, weight_D, rstd.flatten(), 0.0, llama, *settings, in_place, row_mode)
    return dx, dweight


def _liger_layer(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd, *_ = _liger("layer_norm").layer_norm_forward(x, weight_D, bias_D, eps)
    shape = (*x.shape[:-1], 1)
    return y, mean.view(shape), rstd.view(shape)


def _liger_layer_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    given = (dy.contiguous(), x.flatten(0, -2), weight_D, weight_D, mean.flatten(), rstd.flatten())
    dx, dweight, dbias = _liger("layer_norm").layer_norm_backward(*given)
    return dx, dweight, dbias


def _refuses_apex(x: Tensor, *others: Any) -> str | None:
    if reason := refuses_package("apex", _APEX) or refuses_cpu(x):
        return reason
    return None if x.is_contiguous() and x.numel() else "empty or strided tensors"


def _apex_rms(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = importlib.import_module(_APEX).rms_forward_affine(x, (x.shape[-1],), weight_D, eps)
    return y, rstd.view(*x.shape[:-1], 1)


def _apex_rms_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    # Backward reads rstd, not eps.
    given = (dy.contiguous(), rstd.flatten(), x, (x.shape[-1],), weight_D, 0.0, False)
    dx, dweight = importlib.import_module(_APEX).rms_backward_affine(*given)
    return dx, dweight


def _apex_layer(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = importlib.import_module(_APEX).forward_affine(x, (x.shape[-1],), weight_D, bias_D, eps)
    shape = (*x.shape[:-1], 1)
    return y, mean.view(shape), rstd.view(shape)


def _apex_layer_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    given = (dy.contiguous(), mean.flatten(), rstd.flatten(), x, (x.shape[-1],), weight_D, weight_D, 0.0, False)
    dx, dweight, dbias = importlib.import_module(_APEX).backward_affine(*given)
    return dx, dweight, dbias


def _engine() -> tuple[Any, Callable[[torch.dtype], Any]]:
    """(its extension, its own name of a dtype)."""
    importlib.import_module("transformer_engine.pytorch")
    dtypes = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
    return importlib.import_module(_ENGINE), dtypes.__getitem__


def _refuses_engine(x: Tensor, *others: Any) -> str | None:
    if reason := refuses_package("transformer_engine", "transformer_engine.pytorch", _ENGINE) or refuses_cpu(x):
        return reason
    if x.dtype == torch.float64 or not x.is_contiguous() or not x.numel():
        return "float64, empty or strided tensors"
    return None


# What the extension's functions take last: no multiprocessors left out, and weights that are not counted from one.
_ENGINE_END = (0, False)


def _engine_rms(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    engine, dtype = _engine()
    y, _, rstd = engine.rmsnorm_fwd(x.flatten(0, -2), weight_D, eps, None, None, dtype(x.dtype), *_ENGINE_END)
    return y.view(x.shape), rstd.view(*x.shape[:-1], 1)


def _engine_rms_backward(dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    engine, _ = _engine()
    rows = (dy.contiguous().flatten(0, -2), x.flatten(0, -2))
    dx, dweight = engine.rmsnorm_bwd(*rows, rstd.flatten(), weight_D, *_ENGINE_END)
    return dx.view(x.shape), dweight


def _engine_layer(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    engine, dtype = _engine()
    given = (x.flatten(0, -2), weight_D, bias_D, eps, None, None, dtype(x.dtype), *_ENGINE_END)
    y, mean, rstd = engine.layernorm_fwd(*given)
    shape = (*x.shape[:-1], 1)
    return y.view(x.shape), mean.view(shape), rstd.view(shape)


def _engine_layer_backward(dy: Tensor, x: Tensor, weight_D: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    engine, _ = _engine()
    rows = (dy.contiguous().flatten(0, -2), x.flatten(0, -2))
    dx, dweight, dbias = engine.layernorm_bwd(*rows, mean.flatten(), rstd.flatten(), weight_D, *_ENGINE_END)
    return dx.view(x.shape), dweight, dbias


def _refuses_cudnn(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    if reason := refuses_cpu(query):
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype} (float16 and bfloat16 only)"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"head size {query.shape[-1]} (multiples of 8 up to 128 only)"
    return None


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """torch's cuDNN attention: heads [B, H, S, K], log-sum-exp [B, H, S, 1]; without bias and dropout, causal."""
    heads = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, True, False)
    return out.permute(2, 0, 1, 3).contiguous(), lse.view(lse.shape[:3]).contiguous()


def _cudnn_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    views = [x.permute(1, 2, 0, 3) for x in (dout, query, key, value, out)]
    S = query.shape[0]
    # Without dropout the kernel never reads its random state.
    state = torch.zeros((), dtype=torch.int64, device=query.device)
    given = (*views, lse.unsqueeze(-1), state, state, None, None, None, S, S, 0.0, True)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*given)
    return dq.permute(2, 0, 1, 3).contiguous(), dk.permute(2, 0, 1, 3).contiguous(), dv.permute(2, 0, 1, 3).contiguous()


def _refuses_cudnn_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    return _refuses_cudnn(query, key, value)


def _refuses_flash(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    if reason := refuses_package("flash_attn", _FLASH) or refuses_cpu(query):
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {query.dtype} (float16 and bfloat16 only)"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"head size {query.shape[-1]} (multiples of 8 up to 256 only)"
    return None if all(x.stride(-1) == 1 for x in (query, key, value)) else "a head whose elements are not side by side"


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # No dropout, window (-1, -1: none), soft cap or ALiBi.
    given = [x.transpose(0, 1) for x in (query, key, value)]
    forward = importlib.import_module(_FLASH)._flash_attn_forward
    out, lse, *_ = forward(*given, 0.0, query.shape[-1] ** -0.5, True, -1, -1, 0.0, None, False)
    return out.transpose(0, 1).contiguous(), lse


def _flash_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    given = [x.transpose(0, 1) for x in (dout, query, key, value, out)]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    backward = importlib.import_module(_FLASH)._flash_attn_backward
    views = [g.transpose(0, 1) for g in gradients]
    deterministic = torch.are_deterministic_algorithms_enabled()
    backward(*given, lse, *views, 0.0, query.shape[-1] ** -0.5, True, -1, -1, 0.0, None, deterministic)
    dq, dk, dv = gradients
    return dq, dk, dv


def _refuses_flash_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    return _refuses_flash(query, key, value)


RMS_NORM = {
    "liger": Implementation(_liger_rms, _refuses_liger("rms_norm")),
    "apex": Implementation(_apex_rms, _refuses_apex),
    "transformer-engine": Implementation(_engine_rms, _refuses_engine),
}
RMS_NORM_BACKWARD = {
    "liger": Implementation(_liger_rms_backward, _refuses_liger("rms_norm")),
    "apex": Implementation(_apex_rms_backward, _refuses_apex),
    "transformer-engine": Implementation(_engine_rms_backward, _refuses_engine),
}
LAYER_NORM = {
    "liger": Implementation(_liger_layer, _refuses_liger("layer_norm")),
    "apex": Implementation(_apex_layer, _refuses_apex),
    "transformer-engine": Implementation(_engine_layer, _refuses_engine),
}
LAYER_NORM_BACKWARD = {
    "liger": Implementation(_liger_layer_backward, _refuses_liger("layer_norm")),
    "apex": Implementation(_apex_layer_backward, _refuses_apex),
    "transformer-engine": Implementation(_engine_layer_backward, _refuses_engine),
}
ATTENTION = {"flash-attn": Implementation(_flash, _refuses_flash), "cudnn": Implementation(_cudnn, _refuses_cudnn)}
ATTENTION_BACKWARD = {
    "flash-attn": Implementation(_flash_backward, _refuses_flash_backward),
    "cudnn": Implementation(_cudnn_backward, _refuses_cudnn_backward, is_deterministic=False),
}
