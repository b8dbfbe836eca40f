"""A run as frozen pydantic models, one section a class. Derived values are properties; nothing here reads files or ranks.

`config_loader.py` fills these from YAML, `constraints/` relates the fields to each other and to the number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatronish.batch_schedule import BatchSchedule
from megatronish.config_kernels import KernelsConfig
from megatronish.config_section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text

Recompute = Literal["none", "selective", "full"]


class RopeScaling(Section):
    """Slower rotary frequencies, for sequences longer than those that a model was first trained on. Keys as in the transformers
    library's `rope_parameters`."""

    type: Literal["linear", "llama3", "yarn"]
    """linear: all frequencies / factor (Chen et al. 2023); llama3: the low ones (Grattafiori et al. 2024); yarn: the low ones, and
    queries and keys times attention_factor (Peng et al. 2023)."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """How many times longer sequences become."""
    original_max_position_embeddings: PositiveInt | None = None
    """llama3 and yarn, which need it: the length before."""
    low_freq_factor: PositiveFloat | None = None
    """llama3: what turns less often in that length is slowed down by the whole factor; 1 when not given."""
    high_freq_factor: PositiveFloat | None = None
    """llama3: what turns more often stays; 4 when not given."""
    beta_fast: PositiveFloat | None = None
    """yarn: what turns more often in that length stays; 32 when not given."""
    beta_slow: PositiveFloat | None = None
    """yarn: what turns less often is slowed down by the whole factor; 1 when not given."""
    attention_factor: PositiveFloat | None = None
    """yarn: of rotated queries and of rotated keys; 0.1 ln(factor) + 1 when not given."""


class ModelConfig(Section):
    """The shape of the network. Letters of `batch.py`: D hidden_size, H num_heads, F mlp_size, V vocab_size."""

    architecture: Literal["llama", "gpt2"] = "llama"
    """A row of the table `megatronish.models.MODELS`."""
    num_layers: PositiveInt
    """Transformer blocks in the whole model."""
    hidden_size: PositiveInt
    """Width D of the residual stream."""
    num_heads: PositiveInt
    """Query heads H; hidden_size / num_heads is the head size K."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention); num_heads when not given."""
    mlp_size: PositiveInt
    """Width F of the MLP."""
    vocab_size: PositiveInt
    """Tokens the model knows, at least as many as the tokenizer has."""
    vocab_multiple: PositiveInt = 128
    """The embedding's rows are padded to a multiple of this. Never a function of the layout: padding changes the loss."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies (Su et al. 2021); gpt2 has none."""
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's elements that turn, its first ones; rounded down to a whole number, which must be even."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Which elements turn together: k and k + half of what turns (Hugging Face's Llama), or 2k and 2k + 1 (Meta's)."""
    rope_scaling: RopeScaling | None = None
    """Slower rotary frequencies for longer sequences."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""
    activation: Literal["swiglu", "geglu"] = "swiglu"
    """Of llama's gated MLP (Shazeer 2020): the gate through SiLU, or through GELU by GPT-2's formula. gpt2 has GELU and no gate."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream use it / sqrt(2 num_layers)."""
    max_positions: PositiveInt | None = None
    """Rows of the table of learned positions (gpt2, which needs it; llama has none)."""
    tie_embeddings: bool = False
    """The output projection is the embedding's weight (Press and Wolf 2017)."""
    dropout: Fraction = 0.0
    """Share of elements zeroed after the embedding, of attention weights and before residual sums (Srivastava et al. 2014)."""

    @property
    def head_size(self) -> int:
        """K = D / H (constraints/ refuses a remainder)."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        """R, the elements of a head that turn."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, after the default."""
        return self.num_kv_heads or self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output projection."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class ParallelConfig(Section):
    """How the ranks are laid out. World size = pipeline x data x tensor, tensor innermost."""

    tensor: PositiveInt = 1
    """Ranks that share each layer's matrices (keep within a node)."""
    pipeline: PositiveInt = 1
    """Stages the layers are cut into."""
    data: PositiveInt | None = None
    """Replicas, each with its own samples; world / (tensor x pipeline) when not given."""
    sequence: bool = False
    """Sequence parallelism: activations between blocks are cut over the tensor ranks (Korthikanti et al. 2022)."""
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """Order of forwards and backwards in the pipeline (Narayanan et al. 2021). `interleaved` needs num_chunks of 2 or more, and
    idles least where `pipeline` divides the number of microbatches."""
    num_chunks: PositiveInt = 1
    """Model chunks of one stage: the layers are cut into pipeline x num_chunks parts, dealt out round-robin."""
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each part, pipeline x num_chunks numbers in the order of the model; balanced by cost when not given."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """0: every data rank keeps all optimizer state; 1: each 1/data of it; 2: of the gradients too (Rajbhandari et al. 2020), which
    then travel once a microbatch instead of once a step; 3, with zero_engine=deepspeed: of the parameters too."""
    zero_engine: Literal["native", "deepspeed"] = "native"
    """Whose optimizer, gradients and ZeRO: ours, or DeepSpeed's engine around the same model and tensor ranks (no pipeline; float32
    or bfloat16)."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """zero_engine=deepspeed only. cpu: optimizer state and its update on the host (Ren et al. 2021); nvme, with zero_stage=3 and
    float32: state on a disk, brought to the host for its update (Rajbhandari et al. 2021)."""
    offload_path: Text | None = None
    """offload=nvme only: a folder on a fast disk of each node. There is none that fits every machine, so it must be given."""
    timeout_seconds: PositiveFloat = 600.0
    """A collective that some rank has not joined after so long ends the job with code 76: beyond any wait of a healthy run, such as
    that for a slow disk while a checkpoint is saved."""
    deepspeed_config: Text | None = None
    """zero_engine=deepspeed only: a DeepSpeed JSON whose further settings are taken over; what contradicts this config is an error.
    What the engine gets is written to RUN/ds_config.json."""
    recompute: Recompute | tuple[Recompute, ...] = "none"
    """`full` keeps only each block's input for backward and runs its forward again; `selective` does so for norms, activations and
    the attention core (Korthikanti et al. 2022). A list gives one for each stage."""

    def recompute_of(self, stage: int) -> Recompute:
        """The one of a stage."""
        return self.recompute if isinstance(self.recompute, str) else self.recompute[stage]


class BlendSource(Section):
    """One set of a blend."""

    prefix: Text
    """PREFIX.bin and PREFIX.idx."""
    weight: PositiveFloat
    """Its share of the samples, over the sum of all weights."""


class DataConfig(Section):
    """Token files on disk. A prefix names PREFIX.bin and PREFIX.idx."""

    train: Text | tuple[BlendSource, ...]
    """Prefix of the training tokens, or a list of prefixes with weights."""
    validation: Text | None = None
    """Prefix of held-out tokens."""
    validation_fraction: Fraction = 0.0
    """Without `validation`: this share of the training set's documents, its last ones, is held out."""
    sequence_length: PositiveInt
    """Tokens S in one sample."""
    tokenizer: Text | None = None
    """A tokenizer.json; gives bits per byte and a check of the vocabulary."""
    order: Literal["permutation", "megatron"] = "permutation"
    """Order of the samples: a keyed permutation with no index to build, or that of megatron-core's GPTDataset."""
    separate_documents: bool = False
    """Positions restart at each document, and tokens attend within their document only."""

    def missing_files(self) -> list[str]:
        """Of the files that are named here, those that this machine does not have, by key."""
        sources = [self.train] if isinstance(self.train, str) else [source.prefix for source in self.train]
        named = [("data.train", f"{prefix}.idx") for prefix in sources]
        named += [("data.validation", f"{self.validation}.idx")] if self.validation else []
        named += [("data.tokenizer", self.tokenizer)] if self.tokenizer else []
        return [f"{key}={name}" for key, name in named if not Path(name).is_file()]


class OptimConfig(Section):
    """AdamW (Loshchilov and Hutter 2019) and its learning rate."""

    lr: PositiveFloat
    """Highest learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Where the schedule ends."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the decay after the warm-up. `wsd`: constant, then linear over the last `decay_steps`."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear growth from 0 to lr."""
    decay_steps: PositiveInt | None = None
    """Length of the decay; for `wsd` required, for cosine and linear everything after the warm-up when not given."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    moments_dtype: Literal["float32", "bfloat16"] | None = None
    """Of both moments; that of the master weights when not given."""
    master: Literal["full", "remainder", "none"] = "full"
    """Master weights of bfloat16 parameters. `remainder`: float32 still, but only the 16 bits that the parameter lacks are kept.
    `none`: the parameters are all there is, and `rounding` must be stochastic."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of what the optimizer keeps in bfloat16: moments, and parameters without master weights. stochastic: up with the probability
    that makes the mean right; a hash of (train.seed, parameter, element, number of the update) decides, whatever the layout."""
    clip_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""
    bucket_mib: PositiveFloat = 64.0
    """Size of a gradient bucket, the unit of overlapped reduction, in MiB."""
    grad_reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Of gradients on their way between data ranks; that of the accumulated gradients (float32, so nothing is rounded) when not
    given. bfloat16: what a rank has accumulated is rounded once, as are the partial sums on the way; sums over other axes come
    before it (zero_stage 2: after it) in float32. With zero_stage 2 and 3 each microbatch travels, and is added up in float32."""


class BatchRamp(Section):
    """The global batch grows from `start` by `increment` up to train.global_batch_size, in equal shares of `samples` (GPT-3's
    way: Brown et al. 2020, appendix B)."""

    start: PositiveInt
    """Samples of the first step."""
    increment: PositiveInt
    """Samples more at each stage of the ramp."""
    samples: PositiveInt
    """Samples that the whole ramp takes."""


class TrainConfig(Section):
    """How long, how much a step, in which numbers."""

    steps: PositiveInt | None = None
    """Optimizer steps in the whole run; give this or `tokens`."""
    tokens: PositiveInt | None = None
    """Tokens in the whole run; rounded up to whole steps."""
    global_batch_size: PositiveInt
    """Samples a step, over all ranks."""
    micro_batch_size: PositiveInt
    """Samples B of one forward and backward on one rank."""
    batch_ramp: BatchRamp | None = None
    """Smaller batches at the start."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of parameters and activations. Master weights and accumulated gradients are float32 (float64 for float64)."""
    loss_scale: PositiveFloat = 65536.0
    """float16 only: first factor of the loss; halved when a gradient overflows, doubled after `loss_scale_interval` good steps
    (Micikevicius et al. 2018)."""
    loss_scale_interval: PositiveInt = 1000
    """float16 only: good steps before the loss scale doubles."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradients are not finite. Its update is never applied; `skip` goes on to the next step,
    and stops after twenty in a row. In float16 gradients beyond its range are the loss scale's affair under `stop` too."""
    label_smoothing: Fraction = 0.0
    """Share of the target's probability spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of log(sum exp(logits))^2, which keeps logits near zero (Chowdhery et al. 2022)."""
    loss_chunks: PositiveInt = 1
    """Parts that the tokens of a microbatch are cut into for the output projection and the loss: the logits of one part exist at a
    time, 1/loss_chunks of their memory. The same losses; parts below some 1,000 tokens cost time. 1: the logits exist whole."""
    seed: NonNegativeInt = 1234
    """Of the weights and of the order of samples."""
    eval_interval: NonNegativeInt = 0
    """Evaluate every this many steps; 0: never."""
    eval_steps: PositiveInt = 8
    """Global batches an evaluation reads."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a new lowest held-out loss."""
    cpu_threads: PositiveInt = 1
    """Threads of one rank on CPU. Set, never inherited: sums in another order have other last bits."""
    deterministic: bool = False
    """On GPU: deterministic kernels only. On CPU every run is."""


class CheckpointConfig(Section):
    """Checkpoints go to RUN/checkpoints/step-XXXXXXXX."""

    interval: PositiveInt | None = None
    """Save every this many steps; the last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""
    asynchronous: bool = False
    """Copy the state and go on; files are written under the steps that follow."""


class ObserveConfig(Section):
    """What a run says of itself."""

    log_interval: PositiveInt = 10
    """Write metrics every this many steps; the only steps on which the host waits for the device."""
    tensorboard: bool = True
    """Write RUN/tensorboard/ as well as RUN/metrics.jsonl."""
    peak_tflops: PositiveFloat | None = None
    """One device's peak, for MFU; when not given, a table by GPU name, or a measured matrix product on CPU."""
    sample_interval: NonNegativeInt = 0
    """Continue `sample_prompts` every this many steps; 0: never."""
    sample_prompts: tuple[Text, ...] = ("The",)
    """What the samples begin with; needs data.tokenizer."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of a profile, written to RUN/profile/ as a Chrome trace for each rank."""
    hang_seconds: NonNegativeFloat = 300.0
    """A rank that communicates nothing for so long writes RUN/post_mortem/, for `megatronish why-hung`; 0: only on SIGUSR2 or an
    error. Collectives end by themselves after parallel.timeout_seconds."""
    memory_snapshot_step: PositiveInt | None = None
    """After this step each rank on a GPU writes its allocator's history to RUN/profile/."""
    wandb_project: Text | None = None
    """Send metrics to Weights & Biases too (WANDB_MODE=offline keeps them on disk)."""


class Config(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's folder is RUN_ROOT/NAME."""
    run_root: Text = "runs"
    """Where run folders are made."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def num_steps(self) -> int:
        """Steps of the whole run, from `steps` or `tokens`."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None, "constraints/ refuses a config with neither"
        return self.batch_schedule.steps_for(-(-self.train.tokens // self.data.sequence_length))

    @property
    def batch_schedule(self) -> BatchSchedule:
        """Which samples each step takes."""
        return BatchSchedule.of(self.train.global_batch_size, self.train.batch_ramp)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas in a world of `world_size` ranks (constraints/ refuses a remainder)."""
        return self.parallel.data or world_size // (self.parallel.tensor * self.parallel.pipeline)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches of one rank in one step, after a ramp of the batch size (constraints/ refuses a remainder)."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))
