"""The model of the book: when it is trained and when it is loaded, and what a cache may suffer."""

import math
import os
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from slimlab.config import InputError, ModelConfig, TrainingConfig
from slimlab.text.cache import cache_folder
from slimlab.text.corpus import corpus_from
from slimlab.train import reference, reference_cache
from slimlab.train.recipe import RECIPE, Recipe
from slimlab.train.reference import reference_model, training_config
from slimlab.train.text_model import continue_text, load_text_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = Recipe(
    vocab_size=262,
    model={"seq_len": 12, "d_model": 16, "num_layers": 1, "num_heads": 2},
    training={"num_steps": 7, "batch_size": 3, "peak_lr": 1e-2},
    validate_every=3,
)
WORDS = ["the", "cat", "and", "a", "dog", "sat", "or", "ran", "on", "under", "over", "our", "mat"]


@pytest.fixture(scope="module")
def corpus():
    documents = [
        "\n\n".join(
            " ".join(WORDS[(n * 7 + i * i + j * 3 * i) % 13] for j in range(12)) for i in range(9)
        )
        for n in range(6)
    ]
    return corpus_from(documents, "words", held_out_fraction=0.2)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Equal weights are asked for below: another number of threads adds in another order."""
    monkeypatch.setattr("slimlab.train.threads.num_processors", lambda: 1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trainings(monkeypatch):
    """The seeds of the trainings that were really made."""
    seeds, train = [], reference.train_reference

    def counted(recipe, corpus, config, progress):
        seeds.append(config.seed)
        return train(recipe, corpus, config, progress)

    monkeypatch.setattr(reference, "train_reference", counted)
    return seeds


def load(corpus, seed=0, **given):
    said = []
    given = {"recipe": SMALL, **given}
    found = reference_model(seed, progress=False, corpus=corpus, say=said.append, **given)
    return found, said


def weights(found):
    return torch.cat([p.detach().flatten() for p in found.model.parameters()])


def entry_of(found):
    (step,) = Path(found.source).glob("step_*")
    return Path(found.source), step


def test_it_is_trained_once_and_then_loaded_with_everything_it_knew(corpus, cache, trainings):
    first, said_first = load(corpus)
    second, said_second = load(corpus)
    assert trainings == [0]
    assert said_first == said_second == []
    assert torch.equal(weights(first), weights(second))
    assert first.training_s > 0
    assert second.training_s is None
    for name in ("tokenizer", "corpus", "seed", "bits_per_byte", "source"):
        assert getattr(first, name) == getattr(second, name)
    assert first.history.records == second.history.records
    assert first.history.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in second.validation_bits_per_byte] == [3, 6, 7]
    assert not first.model.training
    assert not second.model.training
    assert first.model.config == second.model.config


def test_what_is_loaded_belongs_to_the_caller(corpus, cache):
    first, _ = load(corpus)
    with torch.no_grad():
        next(first.model.parameters()).zero_()
    second, _ = load(corpus)
    assert not torch.equal(weights(first), weights(second))


def test_bits_per_byte_are_those_of_a_loop_over_windows(corpus, cache):
    found, _ = load(corpus)
    end_id = found.tokenizer.token_id("<|endoftext|>")
    ids = [end_id]
    for text in corpus.held_out:
        ids += [*found.tokenizer.encode(text), end_id]
    nats = 0.0
    for at in range(0, len(ids) - 1, 12):
        window = torch.tensor([ids[at : at + 13]])
        logits = found.model(window[:, :-1]).detach()
        nats += float(F.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    num_bytes = sum(len(text.encode()) for text in corpus.held_out)
    # Batches of another size add in another order: 1e-5 is some hundred roundings in float32.
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert found.validation_bits_per_byte[-1][1] == pytest.approx(found.bits_per_byte, rel=1e-5)


def test_another_seed_recipe_or_text_is_another_model(corpus, cache, trainings):
    other = replace(SMALL, training={**SMALL.training, "peak_lr": 2e-2})
    text = replace(corpus, fingerprint="0123456789ab")
    found = [
        load(corpus)[0],
        load(corpus, seed=1)[0],
        load(corpus, recipe=other)[0],
        load(text)[0],
    ]
    assert trainings == [0, 1, 0, 0]
    assert len({one.source for one in found}) == 4
    assert not torch.equal(weights(found[0]), weights(found[1]))


@pytest.mark.parametrize("field", [one.name for one in fields(Recipe)])
def test_every_number_of_the_recipe_changes_its_fingerprint(field):
    changes = {"model": {**SMALL.model, "d_ff": 40}, "training": {**SMALL.training, "clip_norm": 2}}
    changes |= {"vocab_size": 263, "residual": "plain", "validate_every": 2}
    changes |= {"held_out_fraction": 0.3}
    assert replace(SMALL, **{field: changes[field]}).fingerprint() != SMALL.fingerprint()


def test_the_fingerprint_is_the_same_in_another_process():
    program = "from slimlab.train.recipe import RECIPE; print(RECIPE.fingerprint('ab'))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=ROOT, text=True
    )
    assert found.stdout.strip() == RECIPE.fingerprint("ab") != RECIPE.fingerprint("ac")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def pickle_it(path):
    path.write_bytes(b"\x80\x04" + path.read_bytes())


DAMAGES = [
    ("step/model.safetensors", cut),
    ("step/model.safetensors", flip),
    ("step/model.safetensors", pickle_it),
    ("step/model.safetensors", Path.unlink),
    ("step/config.json", cut),
    ("step/state.json", cut),
    ("step/state.json", lambda path: path.write_text("[]")),
    ("step/state.json", Path.unlink),
    ("tokenizer.json", flip),
    ("tokenizer.json", Path.unlink),
    ("history.jsonl", cut),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_entry_is_told_and_trained_again(corpus, cache, trainings, name, damage):
    first, _ = load(corpus)
    folder, step = entry_of(first)
    damage(step / name[5:] if name.startswith("step/") else folder / name)
    second, said = load(corpus)
    assert trainings == [0, 0]
    assert "is damaged and will be trained again" in said[-1]
    assert str(folder) in said[-1]
    assert torch.equal(weights(first), weights(second))
    assert load(corpus)[1] == []
    assert len(trainings) == 2
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [
        folder.name
    ]


def test_a_file_in_the_place_of_the_folder_is_no_model(corpus, cache, trainings):
    first, _ = load(corpus)
    folder, step = entry_of(first)
    os.rename(folder, folder.with_name("elsewhere"))
    folder.write_text("a note")
    load(corpus)
    assert load(corpus)[0].training_s is None
    assert trainings == [0, 0]


@pytest.mark.parametrize("kind", ["a file", "no permission", "full"])
def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    corpus, cache, trainings, monkeypatch, kind
):
    if kind == "a file":
        cache.write_text("in the way")
    elif kind == "full":

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(reference_cache, "save_checkpoint", full)
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        cache.mkdir(mode=0o500)
    found, said = load(corpus)
    assert found.source == "memory"
    assert found.bits_per_byte < 8
    assert len(said) == 1
    assert "cannot be kept" in said[0]
    assert "SLIMLAB_CACHE=" in said[0]
    load(corpus)
    assert trainings == [0, 0]
    if kind == "full":
        assert [path.suffix for path in (cache / "reference").iterdir()] == [".lock"]


def test_messages_go_to_stderr_but_not_into_saved_outputs(corpus, cache, monkeypatch, capsys):
    cache.write_text("in the way")
    given = {"progress": False, "recipe": SMALL, "corpus": corpus}
    monkeypatch.setenv("SLIMLAB_BATCH", "1")
    reference_model(**given)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("SLIMLAB_BATCH", "0")
    reference_model(**given)
    assert "cannot be kept" in capsys.readouterr().err


def test_who_asks_meanwhile_waits_and_then_finds_the_model(corpus, cache, trainings, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no file locks")
    begun, go_on, counted = threading.Event(), threading.Event(), reference.train_reference

    def slow(*given):
        begun.set()
        assert go_on.wait(20)
        return counted(*given)

    monkeypatch.setattr(reference, "train_reference", slow)
    results = {}

    def ask(name, say):
        results[name] = reference_model(progress=False, recipe=SMALL, corpus=corpus, say=say)

    first = threading.Thread(target=ask, args=("first", print))
    first.start()
    assert begun.wait(20)
    said = []

    def note(text):
        said.append(text)
        go_on.set()

    second = threading.Thread(target=ask, args=("second", note))
    second.start()
    first.join(20)
    second.join(20)
    assert trainings == [0]
    assert said == ["another process is training the same model; waiting for it"]
    assert results["second"].training_s is None
    assert torch.equal(weights(results["first"]), weights(results["second"]))


def test_without_locks_two_that_train_at_once_leave_one_whole_entry(
    corpus, cache, trainings, monkeypatch
):
    barrier, write = threading.Barrier(2), reference.write_entry

    def together(*given):
        barrier.wait(20)
        write(*given)

    class NoLock:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(reference, "write_entry", together)
    monkeypatch.setattr(reference, "one_at_a_time", NoLock)
    threads = [threading.Thread(target=load, args=(corpus,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found, said = load(corpus)
    assert trainings == [0, 0]
    assert said == []
    assert found.training_s is None
    assert [path.name for path in (cache / "reference").iterdir()] == [Path(found.source).name]


def test_an_interrupted_training_leaves_nothing_behind(corpus, cache, trainings, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reference, "train_reference", stop)
        with pytest.raises(KeyboardInterrupt):
            load(corpus)
    assert [path.suffix for path in (cache / "reference").iterdir()] == [".lock"]
    assert load(corpus)[0].training_s is not None


def test_the_callers_random_numbers_are_left_as_they_were(corpus, cache):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(corpus)
    load(corpus)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", 1 << 32])
def test_a_seed_is_a_whole_number(corpus, seed):
    with pytest.raises(InputError, match="seed"):
        load(corpus, seed=seed)


def test_an_entry_is_the_folder_of_a_run_for_other_commands(corpus, cache):
    found, _ = load(corpus)
    loaded = load_text_model(found.source, "cpu")
    assert continue_text(loaded, "the", 5) == continue_text(found, "the", 5)


def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SLIMLAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "slimlab"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "slimlab"
    monkeypatch.setenv("SLIMLAB_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_the_recipe_can_be_cut_as_later_chapters_cut_it():
    config = ModelConfig(vocab_size=RECIPE.vocab_size, **RECIPE.model)
    for size in (config.num_layers, config.num_heads, config.num_kv_heads, config.d_ff):
        assert size % 4 == 0
    assert config.vocab_size % 8 == 0
    assert config.d_model % 32 == 0
    settings = training_config(RECIPE, seed=3)
    assert isinstance(settings, TrainingConfig)
    assert settings.seed == 3
    assert (settings.optimizer, settings.precision) == ("adamw", "float32")
