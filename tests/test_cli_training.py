"""`slimlab train` and `slimlab generate`: what they write, how they go on, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from slimlab.cli import main
from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.families import family_config
from slimlab.model.pretrained import save_pretrained
from slimlab.model.tensor_files import read_tensors
from slimlab.text.corpus import corpus_from
from slimlab.text.tokenizer import Tokenizer
from slimlab.train import text_model
from slimlab.train.checkpoint_folder import latest
from slimlab.train.history import read_history
from slimlab.train.text_model import (
    TextModel,
    continue_text,
    encode_documents,
    held_out_bits_per_byte,
    load_text_model,
)

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["the", "cat", "and", "a", "dog", "sat", "or", "ran", "on", "under", "over", "our", "mat"]
SMALL = [
    *("--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--seq-len", 12, "--vocab-size", 290),
    *("--steps", 12, "--batch-size", 4, "--save-every", 4, "--device", "cpu", "--dropout", 0.2),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Six documents of paragraphs that differ."""
    folder = tmp_path_factory.mktemp("text")
    for name in range(6):
        chosen = [[WORDS[(name * 7 + i * i + j * 3 * i) % 13] for j in range(12)] for i in range(9)]
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(words) for words in chosen))
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A folder in which a run has ended, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    result = run("train", text, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    return out, result


def run(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def weights_in(folder):
    return read_tensors(latest(folder) / "model.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_a_text_becomes_a_folder_with_all_that_is_needed(trained, text):
    out, result = trained
    names = {path.name for path in out.iterdir()}
    assert names == {
        "tokenizer.json", "history.jsonl", "step_00000008", "step_00000012", ".lock",
    }  # fmt: skip
    assert "12 steps on cpu" in result.stdout
    assert f"slimlab generate {out}" in result.stdout
    assert "step 12: loss" in result.stderr  # a line, since this is no terminal
    assert "fingerprint" in result.stderr
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert tokenizer.vocab_size == 290
    model = load_text_model(out, "cpu").model
    assert model.config == ModelConfig(
        vocab_size=290, seq_len=12, d_model=16, num_layers=1, num_heads=2, dropout=0.2,
        feed_forward="swiglu",
    )  # fmt: skip
    shown = float(result.stdout.split(" bits per byte")[0].split()[-1])
    measured = held_out_bits_per_byte(model, tokenizer, corpus_from(text))
    assert shown == pytest.approx(measured, abs=6e-4)


def test_the_result_is_printed_as_json_and_nothing_beside_it(trained, text):
    out, _ = trained
    result = run("train", text, "--out", out, *SMALL, "--json")
    found = json.loads(result.stdout)
    assert (found["steps"], found["vocab_size"], found["device"]) == (12, 290, "cpu")
    assert found["loss"] == read_history(out).losses[-1]
    assert 0 < found["held_out_bits_per_byte"] < 8


def test_the_same_command_does_a_finished_run_no_harm_and_goes_on_with_a_half_one(
    trained, text, tmp_path
):
    out, _ = trained
    before = weights_in(out)
    again = run("train", text, "--out", out, *SMALL)
    assert f"going on from {out / 'step_00000012'}" in again.stderr
    assert equal(weights_in(out), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--steps", 13], "training.num_steps = 12 there, 13 now"),
        (["--lr", 0.5], "training.peak_lr = 0.002 there, 0.5 now"),
        (["--seed", 1], "training.seed = 0 there, 1 now"),
        (["--d-model", 20], "model.d_model = 16 there, 20 now"),
        (["--vocab-size", 291], "notes.vocab_size = 290 there, 291 now"),
        (["--max-bytes", 1500], "notes.text = "),
        (["--no-resume"], "resume=False"),
    ],
)
def test_another_run_is_refused_with_the_fields_that_differ(trained, text, changes, words):
    out, _ = trained
    before = {file: file.read_bytes() for file in out.rglob("*.*") if file.name != ".lock"}
    result = run("train", text, "--out", out, *SMALL, *changes)
    assert result.exit_code == 2
    assert words in result.stderr
    assert all(file.read_bytes() == old for file, old in before.items())


def test_pace_may_change(trained, text):
    out, _ = trained
    result = run("train", text, "--out", out, *SMALL, "--save-every", 3, "--validate-every", 5)
    assert result.exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_from_outside_ends_in_the_same_weights(
    trained, text, tmp_path, number
):
    program = (
        "import sys, time\n"
        "from slimlab.train import run\n"
        "update = run.Run.update\n"
        "def slow(self):\n"
        "    if self.step == 6:\n"
        "        print('six', flush=True)\n"
        "        time.sleep(2)\n"
        "    return update(self)\n"
        "run.Run.update = slow\n"
        "from slimlab.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "mine"
    arguments = ["train", text, "--out", out, *SMALL]
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "six\n"
        process.send_signal(number)
        printed = process.communicate(timeout=120)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -9
        assert latest(out).name == "step_00000004"
    else:
        assert process.returncode == 128 + number
        assert f"stopped by {number.name} after step 7 of 12, which is saved in {out}" in printed
        assert "Traceback" not in printed
        assert latest(out).name == "step_00000007"
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert equal(weights_in(out), weights_in(trained[0]))
    assert read_history(out).losses == read_history(trained[0]).losses


# Writing


def test_a_run_writes_the_same_text_for_the_same_seed(trained):
    out, _ = trained
    options = ["--prompt", "the cat", "--max-new-tokens", 15, "--device", "cpu"]
    texts = [run("generate", out, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the cat") and len(text) > 9 for text in texts)
    named = run("generate", latest(out), *options, "--seed", 1, "--json")
    found = json.loads(named.stdout)
    assert (found["prompt"], found["text"] + "\n") == ("the cat", texts[0])
    assert run("generate", out / "step_00000008", *options, "--seed", 1).exit_code == 0
    greedy = [run("generate", out, *options, "--temperature", 0, "--seed", s) for s in (1, 2)]
    assert greedy[0].stdout == greedy[1].stdout


def test_an_empty_prompt_begins_a_text_and_the_end_of_a_text_is_not_shown(trained):
    found = load_text_model(trained[0], "cpu")
    end_id = found.tokenizer.token_id("<|endoftext|>")
    assert "<|endoftext|>" not in continue_text(found, "", 40, temperature=3.0, seed=0)
    with torch.no_grad():
        found.model.final_norm.weight.zero_()  # all tokens alike: the draws decide
    assert continue_text(found, "", 5, temperature=1.0, seed=0) != ""

    class Ending(torch.nn.Module):
        def hidden(self, ids, cache):
            cache.layers[0].append(*[torch.zeros(1, 2, ids.shape[1], 8)] * 2)
            return ids

        def logits(self, ids):
            return torch.nn.functional.one_hot(torch.full_like(ids, end_id), 290).float()

    ending = Ending()
    ending.config, ending.weight = found.model.config, torch.nn.Parameter(torch.zeros(1))
    assert continue_text(TextModel(ending, found.tokenizer, "x"), "the cat", 9) == "the cat"


def test_a_model_in_the_form_of_transformers_writes_with_our_tokenizer(trained, tmp_path):
    folder = tmp_path / "llama"
    tokenizer = Tokenizer.load(trained[0] / "tokenizer.json")
    sizes = {"vocab_size": 290, "seq_len": 12, "d_model": 16, "num_layers": 1, "num_heads": 2}
    model = build_model(family_config("llama", **sizes))
    save_pretrained(model, folder)
    result = run("generate", folder, "--prompt", "the", "--device", "cpu")
    assert result.exit_code == 2
    assert "tokenizer.json" in result.stderr
    tokenizer.save(folder / "tokenizer.json")
    result = run("generate", folder, "--prompt", "the", "--temperature", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    expected = continue_text(TextModel(model, tokenizer, "here"), "the", 100)
    assert result.stdout == expected + "\n"


def test_without_a_folder_the_model_of_the_book_writes(trained, monkeypatch):
    found = load_text_model(trained[0], "cpu")
    module = types.ModuleType("slimlab.train.reference")
    module.reference_model = lambda: found
    monkeypatch.setitem(sys.modules, "slimlab.train.reference", module)
    result = run("generate", "--prompt", "a dog", "--temperature", 0)
    assert result.stdout == continue_text(found, "a dog", 100) + "\n"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "absent.txt"], "absent.txt"),
        (["train", "TEXT", "--steps", 0], "num_steps"),
        (["train", "TEXT", "--num-heads", 5], "choose --num-heads from"),
        (["train", "TEXT", "--device", "cuda:9"], "device cuda:9"),
        (["train", "TEXT", "--vocab-size", 256], "at least 257"),
        (["train", "TEXT", "--seq-len", 4000], "at least seq_len"),
        (["train", "TEXT", "--held-out", 2], "held_out_fraction"),
        (["train", "TEXT", "--out", "/dev/null/x"], "a folder for the run"),
        (["train", "TEXT", "--micro-batch-size", 9], "at most 4"),
        (["generate", "absent"], "absent"),
        (["generate", "TEXT"], "slimlab train"),
        (["generate", "RUN", "--temperature", -1], "temperature"),
        (["generate", "RUN", "--temperature", 0, "--top-k", 5], "top_k"),
        (["generate", "RUN", "--top-p", 2], "top_p"),
        (["generate", "RUN", "--max-new-tokens", 0], "max_new_tokens"),
        (["generate", "RUN", "--device", "fast"], "PyTorch's name"),
    ],
)
def test_bad_input_gets_a_message_and_exit_code_2(trained, text, tmp_path, arguments, words):
    given = [{"TEXT": text, "RUN": trained[0]}.get(one, one) for one in arguments]
    small = [*SMALL, *([] if "--out" in given else ["--out", tmp_path / "new"])]
    given = [*given[:2], *(small if given[0] == "train" else []), *given[2:]]
    result = run(*given)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert not list((tmp_path).rglob("step_*"))


@pytest.mark.parametrize("table", ["quantized.json", "sparse.json"])
def test_no_run_begins_where_a_smaller_model_lies_which_generate_would_read(text, tmp_path, table):
    (tmp_path / table).write_text("{}")
    result = run("train", text, "--out", tmp_path, *SMALL)
    assert result.exit_code == 2
    assert f"a smaller model: ['{table}']" in result.output
    assert [one.name for one in tmp_path.iterdir()] == [table]


def test_what_to_change_is_said_in_the_words_of_the_command_line(trained, text, tmp_path):
    told = {
        ("--num-heads", 5): "change: choose --num-heads from 1, 2, 4, 8, 16, or change --d-model",
        ("--seq-len", 4000): "a smaller --seq-len",
        ("--steps", 0): "give --steps a positive",
        ("--lr", 0): "give --lr such a number",
        ("--device", "cuda:9"): "give --device auto, or install a PyTorch built for that device",
    }
    for given, words in told.items():
        result = run("train", text, "--out", tmp_path / "new", *SMALL, *given)
        assert words in result.stderr, result.stderr
        assert not (tmp_path / "new").exists()  # so nothing is in the way of the next try
    (tmp_path / "one.txt").write_text("one paragraph alone")
    result = run("train", tmp_path / "one.txt", "--out", tmp_path / "new", *SMALL)
    assert "take --held-out 0" in result.stderr
    result = run("generate", trained[0], "--temperature", 0, "--top-k", 5)
    assert "give --temperature 1.0 to draw" in result.stderr


def test_a_run_goes_on_longer_when_asked(trained, text, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "moved")
    longer = ["train", text, "--out", out, *SMALL, "--steps", 14]
    refused = run(*longer)
    assert refused.exit_code == 2
    assert "or --new-settings, to go on from its last checkpoint" in refused.stderr
    result = run(*longer, "--new-settings")
    assert result.exit_code == 0, result.output
    assert read_history(out).steps == list(range(1, 15))


def test_a_prompt_that_is_no_utf_8_is_told_as_such(trained):
    result = run("generate", trained[0], "--prompt", "\udcff\udcfe")
    assert (result.exit_code, "a prompt in UTF-8" in result.stderr) == (2, True)


def test_a_tokenizer_of_another_vocabulary_is_refused(trained, tmp_path):
    Tokenizer([], ["<|endoftext|>"]).save(tmp_path / "tokenizer.json")
    shutil.copytree(trained[0] / "step_00000012", tmp_path / "step_00000012")
    with pytest.raises(InputError, match="tokenizer of 290 tokens.*\n.*one of 257"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("model", ["Small", None, {"d_model": 16}, {"wings": 2}])
def test_a_configuration_that_is_not_of_this_version_is_refused(trained, monkeypatch, model):
    monkeypatch.setattr(text_model, "read_json", lambda path: {"model": model})
    with pytest.raises(InputError, match="config.json"):
        load_text_model(trained[0])


def test_documents_are_encoded_with_their_ends_and_without_tokens_of_their_own_making():
    tokenizer = Tokenizer([], ["<|endoftext|>"])
    ids = encode_documents(tokenizer, ["ab", "<|endoftext|>"]).tolist()
    assert ids[:4] == [256, 97, 98, 256]
    assert ids[-1] == 256
    assert ids.count(256) == 3
    assert len(ids) == 1 + 2 + 1 + 13 + 1
