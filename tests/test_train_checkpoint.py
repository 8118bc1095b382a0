"""Checkpoints: whole or not at all, read back bit for bit, never run, damage named."""

import errno
import json
import os
import re
import resource
import shutil

import pytest
import torch
from torch import nn
from training_cases import small_disk

from slimlab.config import InputError, ModelConfig
from slimlab.model import tensor_files
from slimlab.model.build import build_model
from slimlab.train import checkpoint as module
from slimlab.train.checkpoint import load_checkpoint, save_checkpoint
from slimlab.train.checkpoint_folder import checkpoints_in, latest, problem_of
from slimlab.train.optimizer import make_optimizer
from slimlab.train.training_state import random_state, set_random_state

SIZES = ModelConfig(vocab_size=11, seq_len=7, d_model=12, num_layers=2, num_heads=3)


class Small(nn.Module):
    """Tied parameters, a matrix that is not contiguous, and both kinds of buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.table.weight
        self.across = nn.Parameter(torch.randn(7, 3).t())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        return self.head(self.table(ids)) + self.across.sum()


def train_a_little(model, optimizer, seed, steps=3):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(5, (2, 4))).logsumexp(-1).sum().backward()
        optimizer.step()


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 10 and 20, the second one with another weight."""
    torch.manual_seed(0)
    model = Small()
    save_checkpoint(tmp_path, model=model, step=10)
    with torch.no_grad():
        model.across += 1
    save_checkpoint(tmp_path, model=model, step=20)
    return tmp_path


@pytest.mark.parametrize("name", ["adamw", "adamw_own", "sgd"])
def test_model_and_optimizer_go_on_bit_for_bit_after_a_checkpoint(tmp_path, name):
    torch.manual_seed(1)
    model = build_model(SIZES)
    optimizer = make_optimizer(name, model, lr=0.01)
    train_a_little(model, optimizer, seed=2)
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=3)
    train_a_little(model, optimizer, seed=3)

    again = build_model(SIZES)
    fresh = make_optimizer(name, again, lr=0.5)
    assert not equal(again, model)
    load_checkpoint(path, again, fresh)
    train_a_little(again, fresh, seed=3)
    assert equal(again, model)
    assert fresh.param_groups[0]["lr"] == 0.01
    assert type(fresh.param_groups[0].get("betas", ())) is tuple


def test_a_checkpoint_without_the_optimizer_state_would_go_on_differently(tmp_path):
    torch.manual_seed(1)
    model = build_model(SIZES)
    optimizer = make_optimizer("adamw", model, lr=0.01)
    train_a_little(model, optimizer, seed=2)
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=3)
    train_a_little(model, optimizer, seed=3)
    again = build_model(SIZES)
    load_checkpoint(path, again)
    train_a_little(again, make_optimizer("adamw", again, lr=0.01), seed=3)
    assert not equal(again, model)


def test_how_the_update_is_computed_is_the_choice_of_the_machine_that_goes_on(tmp_path):
    model = build_model(SIZES)
    optimizer = make_optimizer("adamw", model, lr=0.01)
    train_a_little(model, optimizer, seed=2)
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=3)
    assert optimizer.param_groups[0]["fused"] is True
    groups = [{**group, "fused": False} for group in optimizer.param_groups]
    plain = torch.optim.AdamW(groups, fused=False)
    load_checkpoint(tmp_path, model, plain)
    assert [group["fused"] for group in plain.param_groups] == [False, False]
    train_a_little(model, plain, seed=3)


def test_what_a_run_adds_is_read_back(tmp_path):
    save_checkpoint(
        tmp_path,
        model=Small(),
        step=7,
        data_position=99,
        config={"model": SIZES, "text": "abc"},
        extra={"scale": 0.1},
        random_state=random_state(),
    )
    found = load_checkpoint(tmp_path)
    assert (found.step, found.data_position, found.extra) == (7, 99, {"scale": 0.1})
    assert ModelConfig(**found.config["model"]) == SIZES
    expected = torch.rand(4)
    set_random_state(found.random_state)
    assert torch.equal(torch.rand(4), expected)


def test_tied_and_strided_tensors_are_stored_once_and_scratch_buffers_not_at_all(tmp_path):
    model = Small()
    path = save_checkpoint(tmp_path, model=model, step=1)
    stored = tensor_files.read_tensors(path / "model.safetensors")
    assert sorted(stored) == ["across", "count", "table.weight"]
    again = Small()
    again.count += 4
    load_checkpoint(path, again)
    assert equal(again, model)
    assert again.head.weight is again.table.weight


def test_files_get_the_permissions_that_other_files_get(tmp_path):
    path = save_checkpoint(tmp_path, model=Small(), step=1)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_only_the_newest_are_kept_and_an_older_one_leaves_after_the_new_one_is_there(
    tmp_path, monkeypatch
):
    seen = []

    def remove(path, old=shutil.rmtree, **options):
        if ".removed." in str(path) and path.exists():
            seen.append([one.name for one in checkpoints_in(tmp_path) if not problem_of(one)])
        old(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    for step in (9, 10, 100000000):
        save_checkpoint(tmp_path, model=Small(), step=step, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_00000010", "step_100000000"]
    assert seen == [["step_00000010", "step_100000000"]]
    assert sorted(os.listdir(tmp_path)) == ["step_00000010", "step_100000000"]


def test_a_later_damaged_checkpoint_does_not_push_a_good_one_out(saved):
    (saved / "step_00000020" / "model.safetensors").write_bytes(b"")
    save_checkpoint(saved, model=Small(), step=15, keep=1)
    assert latest(saved, say=lambda _: None).name == "step_00000015"
    save_checkpoint(saved, model=Small(), step=20, keep=1)
    assert [path.name for path in checkpoints_in(saved)] == ["step_00000020"]
    assert problem_of(saved / "step_00000020") is None


def test_a_step_that_is_saved_whole_is_not_saved_over(saved):
    before = {f: f.read_bytes() for f in (saved / "step_00000020").iterdir()}
    with pytest.raises(InputError, match="a step that is not saved yet"):
        save_checkpoint(saved, model=Small(), step=20)
    assert before == {f: f.read_bytes() for f in (saved / "step_00000020").iterdir()}


def test_what_a_killed_process_left_is_removed_and_never_taken_for_a_checkpoint(saved):
    shutil.copytree(saved / "step_00000020", saved / ".step_00000030.4711.tmp")
    assert latest(saved).name == "step_00000020"
    save_checkpoint(saved, model=Small(), step=30)
    assert not list(saved.glob(".step*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def without(key):
    def damage(path):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in state.items() if name != key}))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, r"model.safetensors has [\d,]+ bytes instead of [\d,]+"),
        ("model.safetensors", flip, "model.safetensors has the right size, but not its SHA-256"),
        ("random.safetensors", os.remove, "random.safetensors is missing"),
        ("config.json", flip, "config.json has the right size"),
        ("state.json", os.remove, "state.json is missing"),
        ("state.json", lambda path: cut(path) or cut(path), "state.json cannot be read"),
        ("state.json", lambda path: path.write_text("[]"), "state.json: a list"),
        ("state.json", lambda path: path.write_text("{}"), "not that of a checkpoint"),
        (
            "state.json",
            lambda path: path.write_text('{"format": "slimlab checkpoint", "version": 1}'),
            "does not list the files",
        ),
        ("state.json", without("version"), "names no version"),
        ("state.json", without("step"), "state.json has no step"),
        ("state.json", without("data_position"), "state.json has no data_position"),
        ("state.json", without("extra"), "state.json has no extra"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(saved, name, damage, words):
    newest = saved / "step_00000020"
    damage(newest / name)
    said = []
    assert latest(saved, said.append) == saved / "step_00000010"
    assert len(said) == 1
    assert str(newest) in said[0]
    assert re.search(words, said[0]), said[0]
    assert load_checkpoint(saved, Small(), say=said.append).step == 10
    with pytest.raises(InputError, match=words):
        load_checkpoint(newest, Small())


def test_a_checkpoint_of_a_later_version_is_not_taken_for_damaged_and_written_over(saved):
    state = saved / "step_00000020" / "state.json"
    state.write_text(state.read_text().replace('"version": 1', '"version": 2'))
    words = "of version 2, later than 1: update slimlab"
    for read in (latest, lambda path: load_checkpoint(path, Small())):
        with pytest.raises(InputError, match=words):
            read(saved)
    with pytest.raises(InputError, match=words):
        load_checkpoint(state.parent, Small())
    assert load_checkpoint(saved / "step_00000010", Small()).step == 10


class Explosive:
    """Unpickling this makes a file."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(Explosive(), folder / "pytorch_model.bin")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(InputError, match="pickle"):
            load_checkpoint(path, Small())
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match="pickle"):
        tensor_files.read_tensors(folder / "model.safetensors")
    assert not (tmp_path / "exploded").exists()
    (folder / "model.safetensors").rename(folder / "model.pt")
    torch.load(folder / "model.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()  # so the file was live


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_a_tensor_file_that_is_cut_off_is_refused_with_its_size(tmp_path, num_bytes):
    path = tmp_path / "x.safetensors"
    tensor_files.write_tensors(path, {"a": torch.zeros(50)})
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(InputError, match=f"{path.stat().st_size} bytes"):
        tensor_files.read_tensors(path)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "run, which does not exist"),
        (lambda folder: folder.mkdir(), "which holds nothing"),
        (lambda folder: folder.write_text("x"), "give the folder in which it lies"),
        (
            lambda folder: folder.mkdir() or (folder / "config.json").write_text("{}"),
            "from_pretrained",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_it_is(tmp_path, prepare, words):
    prepare(tmp_path / "run")
    with pytest.raises(InputError, match=words):
        load_checkpoint(tmp_path / "run", Small())


def test_weights_of_another_model_are_refused_by_name_and_nothing_is_changed(saved):
    class Wider(Small):
        def __init__(self):
            super().__init__()
            self.across = nn.Parameter(torch.randn(3, 8))

    class Other(Small):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.randn(3))
            del self.across

    for kind, words in ((Wider, r"across \(3, 8\)"), (Other, "missing more; left over across")):
        model = kind()
        optimizer = make_optimizer("sgd", model, lr=1.0)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(InputError, match=words):
            load_checkpoint(saved, model, optimizer)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    with pytest.raises(InputError, match="dtype|float64"):
        load_checkpoint(saved, Small().double())


def test_an_optimizer_of_another_grouping_is_refused_and_nothing_is_changed(tmp_path):
    model = Small()
    optimizer = make_optimizer("adamw", model, lr=0.1)
    train_a_little(model, optimizer, seed=0)
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    again = Small()
    before = [p.clone() for p in again.parameters()]
    flat = torch.optim.AdamW([*again.parameters(), nn.Parameter(torch.zeros(1))][:-1][::-1])
    with pytest.raises(InputError, match="another order"):
        load_checkpoint(path, again, flat)
    assert all(torch.equal(p, old) for p, old in zip(again.parameters(), before))
    with pytest.raises(InputError, match="not the model's"):
        load_checkpoint(path, again, optimizer)
    bare = save_checkpoint(tmp_path, model=model, step=2)
    with pytest.raises(InputError, match="weights alone"):
        load_checkpoint(bare, again, make_optimizer("adamw", again, lr=0.1))


def assert_refused_for_lack_of_space(folder, model, words):
    good = {f: f.read_bytes() for f in (folder / "step_00000020").iterdir()}
    with pytest.raises(InputError, match=words) as caught:
        save_checkpoint(folder, model=model, step=30, keep=1)
    assert f"the last good checkpoint is {folder / 'step_00000020'}" in caught.value.given
    assert good == {f: f.read_bytes() for f in (folder / "step_00000020").iterdir()}
    assert {"step_00000010", "step_00000020"} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "sync"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(saved, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, failing, full)
    assert_refused_for_lack_of_space(saved, Small(), "No space left on device")


def test_a_file_that_may_not_grow_is_a_full_disk_too(saved):
    model = nn.Linear(300, 300)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert_refused_for_lack_of_space(saved, model, "model.safetensors: .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_really_full(saved, tmp_path):
    with small_disk(tmp_path, "128k") as disk:
        for step in (10, 20):
            shutil.copytree(saved / f"step_000000{step}", disk / f"step_000000{step}")
        assert_refused_for_lack_of_space(disk, nn.Linear(300, 300), "No space left on device")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="there is no earlier checkpoint") as caught:
        save_checkpoint(tmp_path / "file" / "run", model=Small(), step=1)
    assert "Not a directory" in caught.value.given


@pytest.mark.parametrize(("name", "value"), [("step", -1), ("step", 1.0), ("keep", 0)])
def test_a_step_or_number_of_checkpoints_out_of_range_is_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=name):
        save_checkpoint(tmp_path, **{"model": Small(), "step": 1, name: value})


def test_state_json_can_be_read_by_a_person(saved):
    state = json.loads((saved / "step_00000020" / "state.json").read_text())
    assert state["step"] == 20
    assert state["versions"]["torch"] == torch.__version__
    assert sorted(state["files"]) == ["config.json", "model.safetensors", "random.safetensors"]
