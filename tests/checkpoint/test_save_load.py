from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatronish.checkpoint import (
    FileStorage,
    NoStorage,
    SaveJob,
    find_checkpoints,
    newest_loadable,
    open_checkpoint,
    save_checkpoint,
)
from megatronish.checkpoint.pieces import Piece, whole_box
from megatronish.comm import Group, single_process_group
from megatronish.errors import UserError
from megatronish.layout import Rectangle
from tests.checkpoint.support import SHAPES, Layout, on_threads, part, read_all, same, save, save_all, values_of

layouts = st.builds(Layout, tp=st.integers(1, 2), dp=st.integers(1, 3), shard_dim=st.integers(0, 1))
specs = st.dictionaries(
    st.sampled_from(["a", "layers.1.b", "exp_avg/c"]),
    st.tuples(st.lists(st.integers(1, 7), max_size=3).map(tuple), st.sampled_from(["float32", "bfloat16", "float64", "int64"])),
    min_size=1,
)


@settings(max_examples=25, deadline=None)
@given(specs, layouts, layouts)
def test_what_one_layout_saves_any_other_reads_bit_for_bit(shapes: dict, saved: Layout, loaded: Layout) -> None:
    values = values_of(shapes, 5)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_all(Path(folder), 5, saved, shapes=shapes)
        assert paths == [Path(folder) / "step-00000005"] * saved.size
        checkpoint = open_checkpoint(paths[0])
        assert checkpoint.tensors() == shapes
        assert same(read_all(checkpoint), values)
        for rank in range(loaded.size):
            for piece, expected in part(values, loaded.pieces(shapes, rank)):
                out = torch.empty(piece.box.num_elements, dtype=expected.dtype)
                checkpoint.read(piece.tensor, piece.box, out)
                assert torch.equal(out, expected.reshape(-1))


def test_the_manifest_is_plain_json_and_files_are_plain_safetensors(tmp_path: Path) -> None:
    layout = Layout(2, 2)
    state = {
        "config": {"model": {"num_layers": 2}, "name": "é"},
        "consumed_samples": 2**53 + 1,
        "lr": 0.1,
        "none": None,
        "on": True,
    }
    (path, *_) = save_all(tmp_path, 3, layout, state=state)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["state"] == state
    assert open_checkpoint(path).state == state and open_checkpoint(path).step == 3
    values = values_of(SHAPES, 3)
    assert sorted(p.name for p in path.iterdir()) == sorted(["manifest.json", *(f["name"] for f in manifest["files"])])
    for rank, entry in enumerate(manifest["files"]):
        stored = load_file(path / entry["name"])
        expected = {piece.key: value for piece, value in part(values, layout.pieces(SHAPES, rank))}
        assert same(stored, expected)
        listed = [(tensor, *box) for tensor, boxes in entry["pieces"].items() for box in boxes]
        assert listed == [(p.tensor, *p.box.offsets, *p.box.sizes) for p in layout.pieces(SHAPES, rank)]


def test_a_rank_that_owns_nothing_writes_no_file_and_takes_part(tmp_path: Path) -> None:
    shapes = {"w": ((2,), "float32")}
    paths = save_all(tmp_path, 1, Layout(1, 4), shapes=shapes)
    assert sorted(p.name for p in paths[3].iterdir()) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert same(read_all(open_checkpoint(paths[0])), values_of(shapes, 1))


def test_a_save_is_one_collective(tmp_path: Path) -> None:
    groups: list[Group] = []

    def rank(group: Group) -> None:
        groups.append(group)
        save(tmp_path, 1, group=group, layout=Layout(1, 3))

    assert on_threads(3, rank) == [None] * 3
    assert groups[0].meeting.num_collectives == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rehearsal_saves_meta_tensors_and_writes_nothing(tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"w": ((1000, 64), "bfloat16"), "n": ((2,), "float32")}  # ranks own different numbers of pieces
    layout = Layout(2, 3)
    asked: list[tuple[int, ...]] = []

    def gather(x: torch.Tensor, group: Group, *, what: str) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return x.expand(group.size, -1)

    monkeypatch.setattr("megatronish.checkpoint.exchange.all_gather", gather)
    with torch.device("meta"):
        local = [
            (piece, torch.empty(piece.box.sizes, dtype=getattr(torch, shapes[piece.tensor][1])))
            for piece in layout.pieces(shapes, rank)
        ]
        save_checkpoint(
            SaveJob(
                tmp_path / "run",
                step=7,
                local=local,
                pieces_of_rank=lambda r: layout.pieces(shapes, r),
                shapes=shapes,
                state={},
                world=Group("world", tuple(range(6)), rank),
                keep=2,
                storage=NoStorage(),
                device=torch.device("meta"),
            )
        )
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_reading_converts_only_when_asked(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    box = whole_box((6, 5))
    out = torch.empty(6, 5, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"layers.0.up is float32, torch.bfloat16 was asked for"):
        checkpoint.read("layers.0.up", box, out)
    checkpoint.read("layers.0.up", box, out, dtype="convert")
    assert torch.equal(out, values_of(SHAPES, 1)["layers.0.up"].to(torch.bfloat16))
    parameter = torch.nn.Parameter(torch.zeros(30))
    checkpoint.read("layers.0.up", box, parameter)
    assert torch.equal(parameter.detach(), values_of(SHAPES, 1)["layers.0.up"].reshape(-1))


def test_reading_what_is_not_there_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(UserError, match="no tensor nothing"):
        checkpoint.read("nothing", Rectangle((), ()), torch.empty(()))
    with pytest.raises(ValueError, match="not within"):
        checkpoint.read("layers.0.up", Rectangle((5, 0), (2, 5)), torch.empty(10))
    with pytest.raises(ValueError, match="contiguous"):
        checkpoint.read("layers.0.up", whole_box((6, 5)), torch.empty(5, 6).T)


def test_tensors_that_differ_from_the_expected_are_named_ten_and_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    checkpoint.check_tensors(SHAPES)
    expected = {name: spec for name, spec in SHAPES.items() if name != "count"}
    expected |= {"layers.0.up": ((6, 6), "float32"), "layers.0.norm": ((7,), "float32")}
    expected |= {f"layers.{i}.new": ((i,), "float32") for i in range(1, 12)}
    with pytest.raises(UserError) as caught:
        checkpoint.check_tensors(expected)
    lines = str(caught.value).splitlines()
    assert "14 problems" in lines[0] and "and 4 more" in lines[-1] and len(lines) == 12
    assert "tensor layers.1.new [1] is missing" in lines[1]
    for name in list(expected):
        if name.endswith("new"):
            del expected[name]
    with pytest.raises(UserError) as caught:
        checkpoint.check_tensors(expected)
    text = str(caught.value)
    assert "tensor count [] is unexpected" in text
    assert "tensor layers.0.up has shape [6, 5], this run needs [6, 6]" in text
    assert "tensor layers.0.norm is bfloat16, this run needs float32" in text


def test_the_newest_k_are_kept_and_only_those(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step, keep=2)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step-00000025", "step-00000020"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000025"]
    for path in find_checkpoints(tmp_path):
        assert same(read_all(open_checkpoint(path)), values_of(SHAPES, int(path.name[5:])))


def test_a_directory_that_lost_its_manifest_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-00000020" / "manifest.json").unlink()
    save(tmp_path, 30, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020", "step-00000030"]


def test_a_later_refused_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 300)
    (tmp_path / "step-00000300" / "rank-00000.safetensors").write_bytes(b"gone")
    save(tmp_path, 200, keep=1)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step-00000300", "step-00000200"]
    checkpoint = newest_loadable(tmp_path, world=single_process_group(), log=lambda line: None)
    assert checkpoint is not None and checkpoint.step == 200


def test_names_that_are_not_complete_checkpoints_are_not_found(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "nowhere") == []
    assert newest_loadable(tmp_path / "nowhere", world=single_process_group(), log=lambda line: None) is None
    for name in ("step-00000300.tmp-abc", "step-00000300.bad-abc", "step-3", "latest"):
        (tmp_path / name).mkdir()
    save(tmp_path, 123456789)  # nine digits
    save(tmp_path, 99999999)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step-123456789", "step-99999999"]


def test_twenty_thousand_pieces_open_and_read(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.w": ((200, 3), "float32") for i in range(100)}
    pieces = [Piece(name, Rectangle((row, 0), (1, 3))) for name in shapes for row in range(200)]
    values = values_of(shapes, 1)
    path = save_checkpoint(
        SaveJob(
            tmp_path,
            step=1,
            local=part(values, pieces),
            pieces_of_rank=lambda rank: pieces,
            shapes=shapes,
            state={},
            world=single_process_group(),
            keep=1,
            storage=FileStorage(),
        )
    )
    checkpoint = open_checkpoint(path)
    out = torch.empty(50, 2)
    checkpoint.read("layers.57.w", Rectangle((100, 1), (50, 2)), out)
    assert torch.equal(out, values["layers.57.w"][100:150, 1:])


def test_reading_one_box_opens_no_file_without_a_part_of_it(tmp_path: Path) -> None:
    (path, *_) = save_all(tmp_path, 1, Layout(1, 3), shapes={"w": ((9, 2), "float32")})
    checkpoint = open_checkpoint(path)
    for rank in (0, 2):
        (path / f"rank-0000{rank}.safetensors").unlink()
    out = torch.empty(3, 2)
    checkpoint.read("w", Rectangle((3, 0), (3, 2)), out)
    assert torch.equal(out, values_of({"w": ((9, 2), "float32")}, 1)["w"][3:6])
    with pytest.raises(UserError, match=r"rank-00000\.safetensors cannot be read"):
        checkpoint.read("w", Rectangle((0, 0), (1, 2)), torch.empty(2))
