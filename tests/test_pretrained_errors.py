"""What a bad folder, a bad setting and a bad disk get: numbers, names and the way out."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretrained_edits import edit_config, edit_tensors
from torch import nn

from slimlab.config import InputError
from slimlab.model import pretrained_folder
from slimlab.model.build import build_model
from slimlab.model.families import family_config
from slimlab.model.pretrained import from_pretrained, save_pretrained

SIZES = {"vocab_size": 23, "seq_len": 11, "d_model": 12, "num_layers": 2, "num_heads": 3}


def model_of(name, **other):
    sizes = {**SIZES, **({"d_head": 6} if name == "llama" else {})}
    return build_model(family_config(name, **{**sizes, **other})).eval()


@pytest.fixture(params=["gpt2", "llama", "bert"])
def folder(request, tmp_path):
    """A folder of each kind of model."""
    return saved(tmp_path, request.param)


def saved(tmp_path, name, **other):
    save_pretrained(model_of(name, **other), tmp_path / name)
    return tmp_path / name


def refused(folder, *expected, **given):
    """Check that the folder is refused and that the message holds all that is expected."""
    with pytest.raises(InputError) as caught:
        from_pretrained(folder, **given)
    assert str(caught.value).count("asked for:") == 1
    for part in expected:
        assert re.search(part, str(caught.value)), f"no {part!r} in: {caught.value}"


def test_what_is_no_path_or_no_list_of_patterns_is_refused(tmp_path):
    folder = saved(tmp_path, "gpt2")
    for given in (None, 5, b"folder", ""):
        refused(given, "the path of a folder", re.escape(f"given: {given!r}"))
    edit_config(folder, surprise=1)
    # Its star, taken for a pattern of its own, would let the unknown setting pass.
    refused(folder, "a list of patterns", r'give \["classifier', ignore="classifier.*")


def test_the_hubs_cache_is_read_through_its_links_and_its_top_folder_points_to_the_right_one(
    tmp_path,
):
    folder, top = saved(tmp_path, "gpt2"), tmp_path / "models--us er--gpt"
    (top / "snapshots" / "0a1b").mkdir(parents=True)
    (top / "blobs").mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(top / "blobs" / str(number))
        (top / "snapshots" / "0a1b" / file.name).symlink_to(f"../../blobs/{number}")
    ids = torch.tensor([[3, 1, 2]])
    expected = model_of("gpt2")(ids).shape
    assert from_pretrained(f"{top}/snapshots/0a1b/")(ids).shape == expected
    refused(top, re.escape(f"change: give {top / 'snapshots' / '0a1b'}"))


def test_a_compiled_model_is_not_taken_for_one_that_lacks_tensors(tmp_path):
    wrapped, model = nn.Module(), model_of("gpt2")
    wrapped._orig_mod, wrapped.config = model, model.config  # as torch.compile wraps it
    with pytest.raises(InputError, match="_orig_mod"):
        save_pretrained(wrapped, tmp_path / "new")
    save_pretrained(model, tmp_path / "new")


class Pickled:
    """Leaves a trace where somebody unpickles it."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.mkdir, (self.trace,))


def test_the_folders_of_these_tests_are_read(folder):
    from_pretrained(folder)


# Folders and files


def test_no_folder_says_how_to_fetch_one(tmp_path):
    refused(tmp_path / "gpt2", "does not exist", "hf download OWNER/NAME --local-dir FOLDER")


def test_a_file_is_no_folder(folder):
    refused(folder / "model.safetensors", "a file", "path of a folder")


def test_no_settings(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json", "the folder holds model.safetensors")


@pytest.mark.parametrize(("text", "expected"), [("{", "no JSON:"), ("[1]", "no JSON object")])
def test_settings_that_are_no_object(folder, text, expected):
    (folder / "config.json").write_text(text)
    refused(folder, expected)


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    refused(folder, "model.safetensors.index.json", "holds adapter.safetensors, config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_not_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Pickled(tmp_path / "trace")))
    refused(folder, re.escape(name), "pickle", "safe_serialization=True")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "save", [torch.save, lambda one, path: path.write_bytes(pickle.dumps(one))]
)
def test_a_pickle_under_another_name_is_not_opened(folder, tmp_path, save):
    save(Pickled(tmp_path / "trace"), folder / "model.safetensors")
    refused(folder, "pickle")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kept", [0.999, 0.5])
def test_a_file_that_was_cut_off_says_how_much_is_there(folder, kept):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refused(
        folder, f"{int(len(whole) * kept):,} bytes of {len(whole):,}", "fetch model.safetensors"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"weights", "7 bytes without a table"),
        (b"\x10\0\0\0\0\0\0\0{", "without a table"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (b"<!doctype html><html>Not found</html>", "a web page"),
        (b"GGUF" + b"\0" * 99, "without a table"),
    ],
)
def test_files_of_another_form_are_named(folder, content, expected):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, expected, "model.safetensors")


@pytest.fixture
def shards(tmp_path):
    save_pretrained(model_of("llama"), tmp_path / "llama", max_shard_bytes=4000)
    return tmp_path / "llama"


def test_a_shard_that_is_absent_is_named(shards):
    first = sorted(shards.glob("model-*"))[0]
    first.unlink()
    refused(shards, f"no {first.name}", "1 absent")


def test_an_index_without_a_map(shards):
    (shards / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(shards, "weight_map", "None")


def test_an_index_that_points_outside_the_folder(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere/model.safetensors"
    path.write_text(json.dumps(index))
    refused(shards, "files beside it")


def test_an_index_and_shards_of_different_models(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    refused(shards, "in one of the two only: ", "model.norm.weight|model.extra")


def test_a_shard_that_was_cut_off_is_named(shards):
    last = sorted(shards.glob("model-*"))[-1]
    last.write_bytes(last.read_bytes()[:-7])
    refused(shards, last.name, "bytes of")


# Settings


@pytest.mark.parametrize("given", ["mistral", None, 7, ["gpt2"]])
def test_other_kinds_of_model_get_the_list_of_those_read(folder, given):
    edit_config(folder, model_type=given)
    refused(folder, "gpt2, llama, bert", re.escape(repr(given)))


def test_unknown_keys_are_named_and_can_be_passed_over(folder):
    edit_config(folder, sliding_window=64, note="of no effect", unused=None)
    refused(folder, "sliding_window = 64, note = 'of no effect'", r"ignore=\['sliding_window'")
    from_pretrained(folder, ignore=["sliding_*", "note"])
    refused(folder, "given: [^\n]*config.json: note", ignore=["sliding_*"])


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = True, or no such key"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"activation_function": "tanh"}, "gelu_new, gelu_pytorch_tanh"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ("llama", {"hidden_act": "gelu"}, "silu, swish"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "stretched"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = "),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "yarn"),
        ("llama", {"rope_parameters": {"rope_theta": 9.0}}, "rope_theta = 10000.0, but 9.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": "default"}, "rope_scaling = default"),
        ("bert", {"position_embedding_type": "relative_key"}, "'absolute'"),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("bert", {"hidden_act": "relu"}, "hidden_act = 'gelu'"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ],
)
def test_settings_that_change_the_computation_are_refused(tmp_path, name, changes, expected):
    edit_config(saved(tmp_path, name), **changes)
    refused(tmp_path / name, re.escape(expected), "config.json")


@pytest.mark.parametrize(
    ("name", "key"), [("gpt2", "n_embd"), ("llama", "intermediate_size"), ("bert", "vocab_size")]
)
def test_a_size_that_is_missing_is_named_in_both_languages(tmp_path, name, key):
    edit_config(saved(tmp_path, name), **{key: ...})
    refused(tmp_path / name, rf"{key} \(\w+ in this book\)", "no such key")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt2", {"n_head": 5}, ["num_heads = 5, d_model = 12", "num_heads is n_head"]),
        ("bert", {"hidden_size": 13}, ["d_model = 13", "d_model is hidden_size"]),
        ("llama", {"num_key_value_heads": 2}, ["num_kv_heads = 2", "num_key_value_heads"]),
        ("llama", {"head_dim": 5}, ["d_head = 5", "d_head is head_dim"]),
        ("llama", {"rms_norm_eps": "tiny"}, ["norm_eps = 'tiny'"]),
        ("llama", {"attention_bias": "no"}, ["bias = 'no'"]),
        ("gpt2", {"n_layer": 2.5}, ["num_layers = 2.5", "num_layers is n_layer"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, name, changes, expected):
    edit_config(saved(tmp_path, name), **changes)
    refused(tmp_path / name, *expected)


# Settings and tensors


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gpt2", "transformer.wte"),
        ("llama", "model.embed_tokens"),
        ("bert", "bert.embeddings.word_embeddings"),
    ],
)
def test_another_vocabulary_than_that_of_the_table(tmp_path, name, table):
    edit_config(saved(tmp_path, name), vocab_size=25)
    expected = re.escape(f"{table}.weight (23, 12) instead of (25, 12)")
    refused(tmp_path / name, expected, "the table has 23 rows")


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, "9 unknown: model.layers.1.input"), (3, "9 missing: model.layers.2.input")],
)
def test_other_numbers_of_blocks_than_those_stored(tmp_path, num_layers, expected):
    edit_config(saved(tmp_path, "llama"), num_hidden_layers=num_layers)
    refused(tmp_path / "llama", expected, "different models")


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "expected"),
    [
        # As nn.Linear would have it: GPT-2's are the other way round.
        ("gpt2", "transformer.h.1.attn.c_attn.weight", (36, 12), "(36, 12) instead of (12, 36)"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias", (12,), "(12,) instead of (48,)"),
        ("llama", "model.layers.0.self_attn.k_proj.weight", (6, 12), "instead of (18, 12)"),
        ("bert", "cls.predictions.bias", (12,), "(12,) instead of (23,)"),
    ],
)
def test_tensors_of_another_shape(tmp_path, name, tensor, shape, expected):
    change = {tensor: torch.zeros(shape)}
    edit_tensors(saved(tmp_path, name), lambda tensors: tensors.update(change))
    refused(tmp_path / name, re.escape(f"1 of another shape: {tensor} "), re.escape(expected))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["transformer.ln_f.bias"]
        tensors["transformer.h.0.ln_1.weight"] = torch.ones(13)
        tensors["score.weight"] = torch.ones(2, 12)

    edit_tensors(saved(tmp_path, "gpt2"), change)
    refused(
        tmp_path / "gpt2",
        "1 missing: transformer.ln_f.bias",
        "1 unknown: score.weight",
        "1 of another shape: transformer.h.0.ln_1.weight",
    )


def test_another_tasks_head_is_named_and_can_be_passed_over(tmp_path):
    folder = saved(tmp_path, "bert")
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.weight": torch.ones(2, 12)}))
    refused(folder, "1 unknown: classifier.weight", r"ignore=\['classifier.weight'\]")
    from_pretrained(folder, ignore=["classifier.*"])


def test_half_a_head_is_refused(tmp_path):
    folder = saved(tmp_path, "bert")
    edit_tensors(folder, lambda tensors: tensors.pop("cls.predictions.transform.dense.bias"))
    refused(folder, "1 missing: cls.predictions.transform.dense.bias")


def test_a_tied_head_that_is_another_table(tmp_path):
    folder = saved(tmp_path, "gpt2")

    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["lm_head.weight"][4, 5] += 0.25

    edit_tensors(folder, change)
    refused(folder, "tie_word_embeddings is true", "differ by up to 0.25", "lm_head.weight")
    edit_config(folder, tie_word_embeddings=False)
    model = from_pretrained(folder)
    gap = (model.lm_head.weight - model.embedding.tokens.weight).abs().sum().item()
    assert gap == pytest.approx(0.25)


def test_an_untied_head_that_is_absent(tmp_path):
    edit_config(saved(tmp_path, "gpt2"), tie_word_embeddings=False)
    refused(tmp_path / "gpt2", "1 missing: lm_head.weight")


def test_a_tensor_under_two_names(tmp_path):
    folder = saved(tmp_path, "gpt2")
    edit_tensors(folder, lambda tensors: tensors.update({"wpe.weight": torch.ones(11, 12)}))
    refused(folder, "two names of one", "wpe.weight")


def test_mixed_dtypes_ask_for_one(tmp_path):
    folder = saved(tmp_path, "llama")
    norm = "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({norm: tensors[norm].bfloat16()}))
    refused(folder, r"20 F32 \(model.embed_tokens.weight\), 1 BF16 \(model.norm.weight\)")
    model = from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    folder = saved(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, re.escape(f"1 I8 ({name})"), dtype=dtype)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": torch.int8}, "torch.int8"),
        ({"dtype": "float32"}, "'float32'"),
        ({"device": "nowhere"}, "'nowhere'"),
        ({"device": "cuda:99"}, "'cuda:99'"),
    ],
)
def test_dtypes_and_devices_that_are_none(tmp_path, given, expected):
    refused(saved(tmp_path, "llama"), expected, **given)


# Saving


def not_saved(model, folder, *expected, **given):
    with pytest.raises(InputError) as caught:
        save_pretrained(model, folder, **given)
    for part in expected:
        assert re.search(part, str(caught.value)), f"no {part!r} in: {caught.value}"


@pytest.mark.parametrize(
    ("name", "changes", "family", "expected"),
    [
        ("vaswani", {}, None, "not gpt2: kind = 'encoder_decoder' instead of 'decoder'"),
        ("llama", {"norm_place": "post"}, None, "not llama: norm_place = 'post'"),
        ("llama", {"feed_forward": "gelu"}, None, "feed_forward = 'gelu' instead of 'swiglu'"),
        ("llama", {}, "gpt2", "not gpt2: positions = 'rotary' instead of 'learned'"),
        ("llama", {}, "mistral", "family: one of gpt2, llama, bert"),
        ("llama", {"num_heads": 5}, "llama", "d_model = 12 is no multiple of num_heads = 5"),
        ("gpt2", {"num_kv_heads": 1}, None, "num_kv_heads = 1 instead of 3"),
        ("gpt2", {"d_head": 6}, None, "d_head = 6 instead of d_model / num_heads"),
        ("gpt2", {"bias": False}, None, "bias = False instead of True"),
        ("bert", {"num_segments": 0}, None, "num_segments = 0 instead of at least 1"),
        ("bert", {"tie_embeddings": False}, None, "tie_embeddings = False instead of True"),
    ],
)
def test_choices_that_no_family_has(tmp_path, name, changes, family, expected):
    not_saved(model_of(name, **changes), tmp_path / "out", re.escape(expected), family=family)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_of_this_book(tmp_path):
    for other in (nn.Linear(2, 3), "gpt2", nn.DataParallel(model_of("gpt2"))):
        not_saved(other, tmp_path / "out", "a model of this book", type(other).__name__)


def test_models_that_are_not_as_their_configuration_says(tmp_path):
    model = model_of("llama")
    model.blocks[1].feed_forward.up_proj = nn.Linear(12, 31, bias=False)
    not_saved(model, tmp_path / "out", "of another shape: blocks.1.feed_forward.up_proj.weight")
    model = model_of("llama")
    model.adapter = nn.Linear(2, 3)
    not_saved(model, tmp_path / "out", "adapter.weight, adapter.bias")
    model = model_of("gpt2")
    model.lm_head.weight = nn.Parameter(torch.ones(23, 12))
    not_saved(model, tmp_path / "out", "lm_head.weight equal", "tie_embeddings=False")
    model = model_of("gpt2")
    model.final_norm.bfloat16()
    not_saved(model, tmp_path / "out", "torch.bfloat16, torch.float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, -1, 2.5, "1GB"])
def test_shards_of_no_size(tmp_path, size):
    not_saved(model_of("gpt2"), tmp_path / "out", "max_shard_bytes", max_shard_bytes=size)


def test_what_is_no_folder_of_a_model_is_not_written_over(tmp_path):
    model = model_of("gpt2")
    (tmp_path / "file").write_text("mine")
    not_saved(model, tmp_path / "file", "a file", "name of a new folder")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    not_saved(model, tmp_path / "notes", "holds diary.txt")
    (tmp_path / "run" / "step_1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    not_saved(model, tmp_path / "run", "holds step_1")
    not_saved(model, tmp_path / "file" / "below", "can be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes", "run"]
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_a_new_folder_below_new_folders_and_an_empty_one_are_fine(tmp_path):
    save_pretrained(model_of("gpt2"), tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    save_pretrained(model_of("gpt2"), str(tmp_path / "c"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    for folder in (tmp_path / "a" / "b", tmp_path / "c"):
        from_pretrained(folder)


@pytest.mark.parametrize("step", ["write_tensors", "write_atomically", "sync"])
def test_a_disk_that_is_full_leaves_the_old_model(tmp_path, monkeypatch, step):
    folder = saved(tmp_path, "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = getattr(pretrained_folder, step), []

    def full(*given):
        calls.append(step)
        if len(calls) == 2 or step != "write_tensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(pretrained_folder, step, full)
    new = model_of("llama", d_model=18)
    not_saved(new, folder, "No space left on device", "is intact", max_shard_bytes=4000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_last_step_that_fails_is_taken_back(tmp_path, monkeypatch):
    folder = saved(tmp_path, "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    not_saved(model_of("llama", d_model=18), folder, "Input/output error")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


KILLED = """
import os, sys
from slimlab.model.pretrained_folder import whole_folder
rename = os.rename
def kill(source, target):
    if sys.argv[2] == "between" and str(source).endswith(".tmp"):
        os.kill(os.getpid(), 9)
    rename(source, target)
os.rename = kill
with whole_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    if sys.argv[2] == "amid":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("when", ["amid", "between"])
def test_a_save_that_is_killed_leaves_the_old_model_and_the_next_one_tidies_up(tmp_path, when):
    folder = saved(tmp_path, "llama")
    root = Path(pretrained_folder.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, folder, when], cwd=root, check=False)
    assert done.returncode == -9
    if when == "between":  # two names cannot be exchanged in one step everywhere
        (old,) = tmp_path.glob(".llama.*.old")
        refused(folder, re.escape(str(old)))
        old.rename(folder)
    from_pretrained(folder)
    assert len(list(tmp_path.glob(".llama.*.tmp"))) == 1
    save_pretrained(model_of("llama"), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_sequence_longer_than_the_table_says_so(tmp_path):
    model = from_pretrained(saved(tmp_path, "gpt2"))
    with pytest.raises(InputError, match="at most 11 positions"):
        model(torch.zeros(1, 12, dtype=torch.int64))


def test_a_configuration_can_be_varied_and_saved_again(tmp_path):
    model = from_pretrained(saved(tmp_path, "llama"))
    longer = build_model(replace(model.config, seq_len=99))
    longer.load_state_dict(model.state_dict())
    save_pretrained(longer, tmp_path / "longer")
    assert from_pretrained(tmp_path / "longer").config.seq_len == 99
