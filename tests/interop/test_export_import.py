"""export and import: transformers computes the same from what we write, and we from what transformers writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.config import Config, ModelConfig
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.data.tokenizer import load_tokenizer, train_tokenizer
from megatronish.errors import UserError
from megatronish.interop.export import INDEX, Request, export
from megatronish.interop.import_model import import_model
from megatronish.interop.table import INTEROP
from megatronish.models import MODELS
from tests.small_run import VOCAB_SIZE, error_lines, forked, losses, saved_tensors, write_run, write_tokens

transformers = pytest.importorskip("transformers")

MODEL_SECTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"architecture": "gpt2", "num_kv_heads": None, "max_positions": 24, "tie_embeddings": True},
    "tied llama": {"tie_embeddings": True},
}
LAYOUTS = {
    "llama": ("parallel.tensor=2",),
    "gpt2": ("parallel.pipeline=2",),
    "tied llama": ("parallel.pipeline=2",),
}
KINDS = tuple(MODEL_SECTIONS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A run of 5 steps on two ranks for each kind of model; its folder."""
    found = {}
    for kind, model in MODEL_SECTIONS.items():
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        config = write_run(folder, model=model, train={"steps": 5})
        result = forked("train", str(config), *LAYOUTS[kind], nproc=2)
        assert result.returncode == 0, result.stderr
        found[kind] = folder / "runs" / "tiny"
    yield found


def our_logits(run: Path, step: int, tokens_SB: Tensor) -> Tensor:
    """The plain model's, from a checkpoint's master weights."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    config = Config.model_validate(manifest["state"]["config"]).model
    model = MODELS[config.architecture].module(config, dtype=torch.float32)
    states = saved_tensors(run, step)
    model.load_state_dict({name.removeprefix("master/"): t for name, t in states.items() if name.startswith("master/")})
    S, B = tokens_SB.shape
    with torch.no_grad():
        context = TokenContext(torch.arange(S)[:, None].expand(S, B), torch.arange(B))
        logits: Tensor = model.eval()(tokens_SB, context)
    return logits[..., : config.vocab_size]


def their_logits(folder: Path, tokens_SB: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = model(tokens_SB.t()).logits.transpose(0, 1)
    return logits


def some_tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (16, 3), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file_bytes", [10**9, 20_000], ids=["one file", "many files"])
def test_transformers_gives_the_same_logits_of_an_export(runs: dict[str, Path], kind: str, file_bytes: int, tmp_path: Path) -> None:
    tokens_SB = some_tokens()
    folder = export(Request(runs[kind], tmp_path / "hf"), file_bytes=file_bytes)
    expected, got = our_logits(runs[kind], 5, tokens_SB), their_logits(folder, tokens_SB)
    assert expected.std() > 0.01 and got.shape[-1] == VOCAB_SIZE
    assert (got - expected).abs().max() < 1e-4
    assert (folder / INDEX).exists() == (file_bytes == 20_000)
    if file_bytes == 20_000:
        sizes = [path.stat().st_size for path in folder.glob("model-*.safetensors")]
        largest = 101 * 32 * 4  # the embedding
        assert len(sizes) > 2 and max(sizes) < max(file_bytes, largest) + 4096  # and a header


def test_a_step_and_a_dtype_may_be_chosen(runs: dict[str, Path], tmp_path: Path) -> None:
    result = forked("export", str(runs["llama"]), "--hf", str(tmp_path / "a"), "--step", "5", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as file:
        got = file.get_tensor("model.norm.weight")
    assert torch.equal(got, saved_tensors(runs["llama"], 5)["master/final_norm.weight"].bfloat16())
    with pytest.raises(UserError, match="step-00000004 does not exist"):
        export(Request(runs["llama"], tmp_path / "b", step=4))
    assert not (tmp_path / "b").exists()


def test_an_exported_tokenizer_is_loaded_by_transformers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 'a cat and another cat'\n" * 50)
    train_tokenizer([text], vocab_size=300, out=tmp_path / "tokenizer.json")
    config = write_run(
        tmp_path, model={"vocab_size": 300}, data={"tokenizer": str(tmp_path / "tokenizer.json")}, train={"steps": 4}
    )
    assert forked("train", str(config)).returncode == 0
    folder = export(Request(tmp_path / "runs" / "tiny", tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    words = "def cat():\n    return  'another' é"
    assert tokenizer(words)["input_ids"] == ours.encode(words).ids and tokenizer.decode(ours.encode(words).ids) == words
    assert tokenizer.eos_token_id == ours.token_to_id("<|endoftext|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_export_import_export_gives_the_same_bits(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    first = export(Request(runs[kind], tmp_path / "first"))
    import_model(first, tmp_path / "back", ["model.vocab_multiple=8"])
    second = export(Request(tmp_path / "back", tmp_path / "second"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir()) and "model.safetensors" in names
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert one == other
    states = saved_tensors(tmp_path / "back", 0)
    expected = saved_tensors(runs[kind], 5)
    for name, tensor in states.items():
        if name.startswith("master/"):
            rows = VOCAB_SIZE if name.endswith(("embedding.weight", "head.weight")) else None
            assert torch.equal(tensor[:rows], expected[name][:rows])
        else:
            assert not tensor.any()
    assert states.keys() == expected.keys()


def their_llama(**more: Any) -> nn.Module:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = transformers.LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, max_position_embeddings=64, **fields, **more)
    return transformers.LlamaForCausalLM(shape)


def their_gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    )


@pytest.fixture(params=["llama", "gpt2"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model that transformers saved, its weights larger than first ones."""
    torch.manual_seed(4)
    model = {"llama": their_llama, "gpt2": their_gpt2}[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    return folder


def their_loss(folder: Path, prefix: Path, sequence_length: int) -> float:
    """Mean over all targets of the set."""
    dataset = GPTDataset(str(prefix), sequence_length=sequence_length, vocab_size=VOCAB_SIZE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.from_numpy(dataset.tokens(np.arange(len(dataset))))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.slow
def test_an_imported_model_evaluates_and_trains_as_transformers_says(theirs: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", seed=1, num_documents=60)
    write_tokens(tmp_path / "heldout", seed=2, num_documents=11)
    run = tmp_path / "runs" / "tuned"
    assert (result := forked("import", str(theirs), "--out", str(run), "data.sequence_length=16")).returncode == 0, result.stderr
    assert f"megatronish eval {run}" in result.stdout and f"megatronish train {run}/config.yaml" in result.stdout
    evaluated = forked("eval", str(run), "--data", str(tmp_path / "heldout"), "--json", str(tmp_path / "e.json"), nproc=2)
    assert evaluated.returncode == 0, evaluated.stderr
    nats = json.loads((tmp_path / "e.json").read_text())["nats_per_token"]
    assert nats == pytest.approx(their_loss(theirs, tmp_path / "heldout", 16), rel=1e-5)

    # Until step 1 is saved, all but the model may change.
    settings = [f"data.train={tmp_path / 'train'}", "data.sequence_length=32", "train.steps=2", "train.global_batch_size=4"]
    settings += ["observe.log_interval=1", "observe.tensorboard=false", "observe.peak_tflops=1.0"]
    other_model = forked("train", str(run / "config.yaml"), *settings, "model.norm_eps=0.1")
    assert other_model.returncode == 2 and "model.norm_eps=0.1" in error_lines(other_model.stderr)[0]
    tuned = forked("train", str(run / "config.yaml"), *settings, "parallel.tensor=2", nproc=2)
    assert tuned.returncode == 0, tuned.stderr
    # Random tokens: any batch's loss is near the whole set's; a model drawn anew would be at log 101 = 4.6.
    assert losses(run)[1] == pytest.approx(their_loss(theirs, tmp_path / "train", 32), rel=0.1)
    longer = forked("train", str(run / "config.yaml"), "data.sequence_length=16", "train.steps=3", "parallel.tensor=1")
    assert longer.returncode == 2 and "data.sequence_length=16" in error_lines(longer.stderr)[0]


def test_names_without_the_models_prefix_and_masks_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(4)
    their_gpt2().save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    for name in ("new", "old"):
        import_model(tmp_path / name, tmp_path / f"run_{name}", [])
    new, again = (saved_tensors(tmp_path / f"run_{name}", 0) for name in ("new", "old"))
    assert all(torch.equal(new[name], again[name]) for name in new)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "code": ("llama", {"auto_map": {"AutoModel": "modeling.M"}}, "auto_map names code"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
    "architecture": ("llama", {"model_type": "mamba"}, "model_type='mamba' is not known; known are llama, gpt2"),
    "head": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
    "another scaling": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type must be default, linear,"),
    "scaling twice": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        "differ",
    ),
    "part of a head": ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "of whole heads"),
    "scaling of another kind": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1.0}},
        "rope_parameters=",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is another model"),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias=True"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    "window": ("llama", {"sliding_window": 128}, "sliding_window=128"),
    "head size": ("llama", {"head_dim": 16}, "head_dim=16"),
    "unknown key": ("llama", {"logit_scale": 2.0}, "may change what the model computes: logit_scale"),
    "no number": ("llama", {"hidden_size": "32"}, "hidden_size='32' must be a whole number"),
    "exact GELU": ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu'"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "unscaled": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "shapes": ("gpt2", {"n_inner": 64}, "6 tensors of another shape: transformer.h.0.mlp.c_fc.weight has shape [32, 128]"),
    "layers": ("gpt2", {"n_layer": 3}, "12 missing tensors for a GPT2LMHeadModel of model.num_layers=3: transformer.h.2."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_we_do_not_compute_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    architecture, changes, message = REFUSED[case]
    {"llama": their_llama, "gpt2": their_gpt2}[architecture]().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        import_model(tmp_path / "theirs", tmp_path / "run", [])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["theirs"], "nothing is left behind"


def test_missing_damaged_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    their_gpt2().save_pretrained(folder)
    weights = folder / "model.safetensors"

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            import_model(folder, tmp_path / "run", [])
        return str(caught.value)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "model.safetensors cannot be read" in refusal()
    weights.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    assert "pytorch_model.bin alone" in refusal()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: not there (1 files in all)" in refusal()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../../etc/passwd"}}))
    assert "not in the folder" in refusal()
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refusal()


def test_only_what_the_weights_do_not_fix_may_be_overridden(tmp_path: Path) -> None:
    their_gpt2().save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "a", ["model.dropout=0.0", "optim.lr=3e-5"])
    with pytest.raises(UserError, match=r"only model\.dropout, model\.rope_scaling"):
        import_model(tmp_path / "theirs", tmp_path / "b", ["model.norm_eps=1e-6"])
    with pytest.raises(UserError, match="exists already"):
        import_model(tmp_path / "theirs", tmp_path / "a", [])
    with pytest.raises(UserError, match=r"--hf .* exists already"):
        export(Request(tmp_path / "a", tmp_path / "theirs"))


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", SCALED)
def test_a_model_with_scaled_rotation_computes_the_same_here(kind: str, key: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    parameters = {"rope_type": kind, "rope_theta": 5e3, **SCALED[kind]}
    theirs = their_llama(rope_parameters=parameters)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    values = json.loads(path.read_text())
    if key == "rope_scaling":  # as transformers 4 writes it
        del values["rope_parameters"]
        path.write_text(json.dumps(values | {"rope_theta": 5e3, key: {"type": kind, **SCALED[kind]}}))
    config, _ = import_model(tmp_path / "theirs", tmp_path / "run", [])
    assert config.model.rope_theta == 5e3
    tokens_SB = some_tokens().repeat(3, 1)  # beyond the length before
    expected = their_logits(tmp_path / "theirs", tokens_SB)
    got = our_logits(tmp_path / "run", 0, tokens_SB)
    # float32 through two layers; without the scaling they differ by more than 0.1.
    assert (got - expected).abs().max() < 1e-4
    again = their_logits(export(Request(tmp_path / "run", tmp_path / "again")), tokens_SB)
    assert torch.equal(again, expected)


def test_a_model_whose_heads_turn_in_part_is_not_exported() -> None:
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, mlp_size=8, vocab_size=8, partial_rotary_factor=0.5)
    with pytest.raises(UserError, match=r"model\.partial_rotary_factor=0\.5"):
        INTEROP["llama"].write_config(config, 16)


@pytest.mark.parametrize("architecture", list(INTEROP))
def test_a_written_config_reads_back_as_the_same_model(architecture: str) -> None:
    fields = {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "mlp_size": 80, "vocab_size": 97, "norm_eps": 1e-4}
    llama = {"num_kv_heads": 2, "rope_theta": 5e5, "activation": "geglu", "rope_scaling": {"type": "yarn", **SCALED["yarn"]}}
    more: dict[str, Any] = {"llama": llama, "gpt2": {"max_positions": 40}}[architecture]
    for tied in (False, True):
        config = ModelConfig.model_validate({"architecture": architecture, "tie_embeddings": tied, **fields, **more})
        interop = INTEROP[architecture]
        assert ModelConfig.model_validate(interop.read_config(interop.write_config(config, 128))) == config
