"""Closed formulas of the field, each with its source: parameters, FLOPs, bubbles, activation bytes, peak rates."""

from __future__ import annotations

from typing import Literal

from megatronish.config import ModelConfig


def num_parameters(model: ModelConfig) -> int:
    """All parameters, the padded rows of embedding and output projection included; tied, those count once."""
    return num_matrix_weights(model) + _num_table_weights(model) + _num_vector_weights(model)


def num_parameters_without_embeddings(model: ModelConfig) -> int:
    """Parameters of the blocks and the last norm: without embedding, positions and output projection (Kaplan et al. 2020)."""
    return num_parameters(model) - _num_table_weights(model) - model.padded_vocab_size * model.hidden_size


def num_matrix_weights(model: ModelConfig) -> int:
    """Weights that are multiplied with every token: attention and MLP matrices and the output projection, which counts here also
    where it is the embedding; the lookup in the embedding does not."""
    query_size, kv_size = model.num_heads * model.head_size, model.kv_heads * model.head_size
    attention = model.hidden_size * (query_size + 2 * kv_size) + query_size * model.hidden_size
    mlp = (3 if model.architecture == "llama" else 2) * model.hidden_size * model.mlp_size
    return model.num_layers * (attention + mlp) + model.padded_vocab_size * model.hidden_size


def _num_table_weights(model: ModelConfig) -> int:
    """Rows that are only looked up: positions, and the embedding where it is not tied."""
    rows = (0 if model.tie_embeddings else model.padded_vocab_size) + (model.max_positions or 0)
    return rows * model.hidden_size


def _num_vector_weights(model: ModelConfig) -> int:
    """Norms and biases."""
    D, L = model.hidden_size, model.num_layers
    if model.architecture == "llama":
        return (2 * L + 1) * D
    biases = (model.num_heads + 2 * model.kv_heads) * model.head_size + D + model.mlp_size + D
    return L * biases + (2 * L + 1) * 2 * D


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token, as MFU counts them: 6 for each weight of a matrix and
    12 L H K S for attention.

    Chowdhery et al. 2022 (PaLM), appendix B: S x S scores are counted whole, although a causal kernel computes half of them, and
    recomputation is not counted. So MFU compares with published numbers; it is not the share of time that the units are busy.
    """
    attention = 12 * model.num_layers * model.num_heads * model.head_size * sequence_length
    return float(6 * num_matrix_weights(model) + attention)


def mfu(tokens_per_second: float, *, flops_per_token: float, num_devices: int, peak_tflops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: the FLOPs that the model needs against what the devices could do."""
    return tokens_per_second * flops_per_token / (num_devices * peak_tflops * 1e12)


def gpt_parameters(*, num_layers: int, hidden_size: int, vocab_size: int, sequence_length: int) -> float:
    """Parameters of a GPT with biases, MLP of 4 D, learned positions and tied embeddings: Narayanan et al. 2021, equation 2."""
    h, layers = hidden_size, num_layers
    return 12 * layers * h**2 * (1 + 13 / (12 * h) + (vocab_size + sequence_length) / (12 * layers * h))


def gpt_step_flops(
    *, batch_size: int, sequence_length: int, num_layers: int, hidden_size: int, vocab_size: int, recompute: Literal["none", "full"]
) -> float:
    """FLOPs of one step of the same GPT: Narayanan et al. 2021, equation 3 (96 B s l h^2 ..., with full recomputation counted);
    without it three quarters of the blocks' share (72 B s l h^2 ...)."""
    h, layers = hidden_size, num_layers
    passes = {"none": 3, "full": 4}[recompute]
    blocks = 24 * passes * batch_size * sequence_length * layers * h**2 * (1 + sequence_length / (6 * h))
    return blocks + 6 * batch_size * sequence_length * h * vocab_size


def pipeline_bubble(num_stages: int, num_microbatches: int, *, num_chunks: int = 1) -> float:
    """Idle time over working time of a stage under 1F1B, (p - 1) / (m v): Narayanan et al. 2021, section 2.2."""
    return (num_stages - 1) / (num_microbatches * num_chunks)


def pipeline_idle_fraction(num_stages: int, num_microbatches: int, *, num_chunks: int = 1) -> float:
    """Share of the step that a stage idles under GPipe, 1F1B and interleaved 1F1B, (p - 1) / (m v + p - 1): the same bubble over
    the whole step. Interleaved it holds where p divides m."""
    return (num_stages - 1) / (num_microbatches * num_chunks + num_stages - 1)


def pipeline_peak_in_flight(
    schedule: Literal["1f1b", "gpipe", "interleaved"], *, stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> int:
    """How many (microbatch, chunk) a stage keeps activations of at once; each is 1 / (p v) of the layers.

    GPipe keeps all, m. 1F1B keeps as many as there are stages from this one on, min(m, p - s). Interleaved it is
    min(m v, p v + p - 1 - 2 s), (1 + (p - 1) / (p v)) of the model's layers on the first stage: Korthikanti et al. 2022, section
    4.2.3. Interleaved it is a bound, reached where p divides m."""
    p, m, v, s = num_stages, num_microbatches, num_chunks, stage
    bounds = {"gpipe": m, "1f1b": p - s, "interleaved": p * v + p - 1 - 2 * s}
    return min(m * v, bounds[schedule])


def activation_bytes_per_layer(
    *,
    sequence_length: int,
    micro_batch_size: int,
    hidden_size: int,
    num_heads: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """Bytes that one layer of a GPT (16-bit numbers, MLP of 4 D, dropout, scores kept) keeps for backward on one rank.

    Korthikanti et al. 2022, table 2. Full recomputation keeps the layer's whole input, unless that is cut along the sequence too.
    """
    sbh = float(sequence_length * micro_batch_size * hidden_size)
    if recompute == "full":
        return 2 * sbh
    scores = 0.0 if recompute == "selective" else 5 * num_heads * sequence_length / hidden_size
    return sbh * (34 + scores) / tensor if sequence_parallel else sbh * (10 + (24 + scores) / tensor)


def kept_bytes_per_block(
    model: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    element_bytes: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    regather_input: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> int:
    """Bytes that one block of ours keeps for the backward of one microbatch on one rank: what its modules are written to keep.

    In elements for t local and T whole tokens: both norms' inputs 2 D t; without recomputation also what the linears multiply,
    2 D T (t where the input is gathered again) and F T, attention's inputs and output, and statistics of rows, which are at least
    32 bits wide. Selective: the norms' inputs, the packed projection and the activation's input. Full: the block's input. Dropout
    keeps nothing. Tested against live storages."""
    T = sequence_length * micro_batch_size
    t = T // tensor if sequence_parallel else T
    D, K, F = model.hidden_size, model.head_size, model.mlp_size // tensor
    H, G = model.num_heads // tensor, model.kv_heads // tensor
    into_activation, statistics = (2 * F, 1) if model.architecture == "llama" else (F, 2)
    if recompute == "full":
        return D * t * element_bytes
    if recompute == "selective":
        return (2 * D * t + (H + 2 * G) * K * T + into_activation * T) * element_bytes
    gathered = t if regather_input else T
    # Without rotation keys and values stay in the packed projection; the queries of a group of several are copied out of it.
    copied = H if model.architecture == "gpt2" and H != G else 0
    elements = 2 * D * t + 2 * D * gathered + (2 * H + 2 * G + copied) * K * T + (into_activation + F) * T
    return elements * element_bytes + (2 * statistics * t + H * T) * max(4, element_bytes)


# Dense peaks without sparsity, TFLOP/s, from the data sheets of NVIDIA and AMD: bfloat16 (float16 alike), and float32 outside the
# tensor cores.
# A name matches when all its words are in the device's name; the first match counts, so the particular stand before the general.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB300", 2500.0, 80.0),
    ("B300", 2250.0, 75.0),
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 67.0),
    ("H200 NVL", 835.5, 60.0),
    ("H200", 989.4, 67.0),
    ("H100 PCIE", 756.0, 51.0),
    ("H100 NVL", 835.5, 60.0),
    ("H800", 989.4, 67.0),
    ("H100", 989.4, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 383.0, 47.9),
)


def peak_tflops(device_name: str, dtype: Literal["bfloat16", "float16", "float32", "float64"]) -> float | None:
    """One device's dense peak in TFLOP/s by the name its driver gives it; None when the table does not know it, and for float64."""
    words = device_name.upper().replace("-", " ").replace("_", " ").split()
    for name, bfloat16, float32 in _PEAKS:
        if all(word in words for word in name.split()):
            return {"bfloat16": bfloat16, "float16": bfloat16, "float32": float32}.get(dtype)
    return None
