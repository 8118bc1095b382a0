"""`slimlab slim`: what it writes and reports, what it refuses; originals stay as they are."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from training_cases import small_disk

from slimlab.cli import main
from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.families import family_config
from slimlab.model.pretrained import save_pretrained
from slimlab.show import slimming
from slimlab.show.slimming import pareto_figure, pareto_front, slimming_figure
from slimlab.slim import load, measure, prune_file, quantize_pack, recipe, recipe_quantize
from slimlab.slim.distill import fingerprint
from slimlab.slim.load import load_any_model, read_original
from slimlab.slim.prune_masks import is_two_four
from slimlab.slim.prune_scores import prunable_weights
from slimlab.slim.quantize_layers import Int8Linear, QuantizedEmbedding, QuantizedLinear
from slimlab.slim.quantize_pack import load_quantized
from slimlab.slim.recipe import SlimConfig, slim_checkpoint
from slimlab.text.corpus import corpus_from
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint import save_checkpoint
from slimlab.train.text_model import END_OF_TEXT, held_out_bits_per_byte, load_text_model

WORDS = ["the", "cat", "and", "a", "dog", "sat", "or", "ran", "on", "under", "over", "our", "mat"]
SIZES = {"seq_len": 16, "d_model": 32, "num_layers": 2, "num_heads": 4, "feed_forward": "swiglu"}
FEW = {"batch_size": 2, "distill_steps": 2, "prune_steps": 2}


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Speeds are measured in each run, but here twice are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ROUNDS", 2)
        patch.setattr(measure, "WRITTEN_TOKENS", 2)
        yield


def documents():
    """Six documents of paragraphs that differ."""
    for name in range(6):
        chosen = [[WORDS[(name * 7 + i * i + j * 3 * i) % 13] for j in range(12)] for i in range(9)]
        yield "\n\n".join(" ".join(words) for words in chosen)


@pytest.fixture(scope="module")
def corpus():
    return corpus_from(list(documents()), "words", 0.3)


@pytest.fixture(scope="module")
def kept(corpus, tmp_path_factory):
    """A run's folder with a checkpoint of a model that was not trained; nobody may change it."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    tokenizer = Tokenizer.train(corpus.train, 20, (END_OF_TEXT,))
    write_run(folder, tokenizer, corpus)
    before = hashes(folder)
    yield folder
    assert hashes(folder) == before


def write_run(folder, tokenizer, corpus, change=None, **sizes):
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=tokenizer.vocab_size, **SIZES | sizes))
    if change is not None:
        change(model)
    config = {"model": model.config, "notes": {"text": corpus.fingerprint}}
    save_checkpoint(folder, model=model, step=7, config=config)
    tokenizer.save(folder / "tokenizer.json")


def hashes(folder):
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    return {str(one): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def slim(source, out, corpus, **choices):
    return slim_checkpoint(
        source, out, SlimConfig(**choices), corpus=corpus, show=False, say=lambda _: None
    )


@pytest.fixture(scope="module")
def three(kept, corpus, tmp_path_factory):
    """All three steps: the folder and the report."""
    out = tmp_path_factory.mktemp("slim") / "small"
    steps = {"distill": True, "prune": 0.5, "quantize": "int8"}
    return out, slim(kept, out, corpus, **FEW, **steps)


@pytest.fixture(scope="module")
def grouped(kept, corpus, tmp_path_factory):
    """Four bits in groups: the folder and the report."""
    out = tmp_path_factory.mktemp("slim") / "groups"
    return out, slim(kept, out, corpus, quantize="int4")


def test_steps_follow_in_order_and_the_sizes_of_the_model_say_so(three):
    out, report = three
    names = [one.name for one in report.stages]
    assert names == ["original", "distilled", "pruned", "quantized", "as written"]
    config = load_any_model(out).model.config
    assert config.num_layers == 1
    assert config.d_ff == 88 // 2
    counts = [one.num_params for one in report.stages]
    assert counts[0] > counts[1] > counts[2] == counts[3] == counts[4]


def test_sizes_are_those_of_the_files(three, kept):
    out, report = three
    old = kept / "step_00000007"
    assert report.slim.weights_bytes == (out / "quantized.safetensors").stat().st_size
    assert report.original.weights_bytes == (old / "model.safetensors").stat().st_size
    read = [out / name for name in ("quantized.safetensors", "quantized.json", "tokenizer.json")]
    assert report.slim.folder_bytes == sum(one.stat().st_size for one in read)
    read = [old / name for name in ("model.safetensors", "config.json", "state.json")]
    read += [kept / "tokenizer.json"]
    assert report.original.folder_bytes == sum(one.stat().st_size for one in read)
    written = report.stages[-1], report.stages[-2]
    assert written[0].weights_bytes == written[1].weights_bytes == report.slim.weights_bytes
    assert report.stages[0].weights_bytes == report.original.weights_bytes


def test_memory_is_that_of_tensors_and_far_less_than_the_originals(three, kept):
    _, report = three
    model = load_text_model(kept, "cpu").model
    assert report.original.memory_bytes == 4 * sum(one.numel() for one in model.parameters())
    assert report.memory_ratio < 0.3


def test_what_is_read_back_is_what_was_measured_bit_for_bit(grouped, kept, corpus):
    _, report = grouped
    assert report.stages[-1].bits_per_byte == report.stages[-2].bits_per_byte
    assert report.slim.bits_per_byte == report.stages[-1].bits_per_byte
    trained = load_text_model(kept, "cpu")
    wanted = held_out_bits_per_byte(trained.model, trained.tokenizer, corpus)
    assert report.original.bits_per_byte == wanted
    assert report.price == report.slim.bits_per_byte - report.original.bits_per_byte


def test_reports_lie_in_the_folder_as_text_and_json(three):
    out, report = three
    stored = json.loads((out / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert stored["weights_ratio"] == report.weights_ratio
    text = (out / "report.txt").read_text()
    assert f"{report.slim.bits_per_byte:.4f}" in text
    assert f"{report.slim.weights_bytes:,}" in text


def test_speeds_are_positive_and_lie_within_their_spread(three):
    _, report = three
    for one in (report.original, report.slim):
        for spread in (one.reading_per_s, one.writing_per_s):
            assert 0 < spread.low <= spread.median <= spread.high
    assert report.reading_ratio.low <= report.reading_ratio.median <= report.reading_ratio.high


def test_every_layer_and_the_table_hold_integers_and_groups_fit_each_width(grouped):
    out, _ = grouped
    model = load_any_model(out).model
    sizes = {}
    for one in model.modules():
        assert not isinstance(one, torch.nn.Linear | torch.nn.Embedding)
        if isinstance(one, QuantizedLinear | QuantizedEmbedding):
            assert one.table.scheme.num_bits == 4
            sizes[one.table.shape[1]] = one.table.scheme.quant_group_size
    assert sizes == {32: 32, 88: 22}


def test_four_bits_in_groups_are_compensated_unless_nearest_is_asked_for(
    kept, corpus, tmp_path, grouped
):
    slim(kept, tmp_path / "near", corpus, quantize="int4", rounding="nearest")
    near, comp = (load_quantized(one).tensors for one in (tmp_path / "near", grouped[0]))
    name = "blocks.0.attention.q_proj.weight"
    assert not torch.equal(near[name].integers, comp[name].integers)


def test_sixteen_bits_are_a_cast_of_half_the_size(kept, corpus, tmp_path):
    report = slim(kept, tmp_path / "out", corpus, quantize="bfloat16")
    before, after = load_text_model(kept, "cpu").model, load_any_model(tmp_path / "out").model
    wanted = {name: one.bfloat16() for name, one in before.state_dict().items()}
    assert all(torch.equal(one, wanted[name]) for name, one in after.state_dict().items())
    assert report.memory_ratio == 0.5
    assert report.stages[-1].weights_bytes == report.stages[-2].weights_bytes
    assert report.stages[-1].bits_per_byte == report.stages[-2].bits_per_byte


def test_dynamic_activations_multiply_in_int8(kept, corpus, tmp_path):
    slim(kept, tmp_path / "out", corpus, quantize="int8", activations="dynamic")
    model = load_any_model(tmp_path / "out").model
    assert isinstance(model.blocks[0].attention.q_proj, Int8Linear)


def test_training_with_rounded_weights_changes_them_and_leaves_the_original(
    kept, corpus, tmp_path, grouped
):
    before = fingerprint(load_text_model(kept, "cpu").model)
    slim(kept, tmp_path / "two", corpus, quantize="int4", aware_steps=2, batch_size=2)
    none, two = (load_quantized(one).tensors for one in (grouped[0], tmp_path / "two"))
    name = "blocks.0.attention.q_proj.weight"
    assert not torch.equal(none[name].dequantize(), two[name].dequantize())
    assert fingerprint(load_text_model(kept, "cpu").model) == before


def test_weights_that_learned_to_be_rounded_are_rounded_to_the_nearest(
    kept, corpus, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        recipe_quantize, "learn", lambda model, *_, **part: asked.append(part) or model
    )
    monkeypatch.setattr(recipe_quantize, "sample_windows", lambda _: pytest.fail("compensated"))
    slim(kept, tmp_path / "out", corpus, quantize="int4", aware_steps=2)
    assert asked == [{"lr_part": recipe_quantize.AWARE_LR}]


def test_without_integers_an_ordinary_run_folder_is_written(kept, corpus, tmp_path):
    report = slim(kept, tmp_path / "out", corpus, prune=0.5, prune_what="both", prune_steps=0)
    model = load_text_model(tmp_path / "out", "cpu").model
    assert (model.config.num_heads, model.config.d_ff) == (2, 44)
    assert report.slim.num_params == sum(one.numel() for one in model.parameters())
    again = read_original(tmp_path / "out")
    assert again.text == corpus.fingerprint


@pytest.mark.parametrize(
    ("what", "steps", "form"),
    [("weights", 3, "bitmap"), ("weights", 0, "bitmap"), ("2:4", 2, "2:4")],
)
def test_zeros_are_packed_in_the_file_and_nowhere_else(kept, corpus, tmp_path, what, steps, form):
    out, few = tmp_path / "out", {"prune_steps": steps, "batch_size": 2}
    report = slim(kept, out, corpus, prune=0.5, prune_what=what, **few)
    table = json.loads((out / "sparse.json").read_text())
    assert {one["form"] for one in table["forms"].values()} == {form}
    model = load_any_model(out).model
    for weight in prunable_weights(model).values():
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert what == "weights" or is_two_four(weight)
    assert report.slim.weights_bytes == (out / "sparse.safetensors").stat().st_size
    assert report.stages[-1].weights_bytes == report.stages[-2].weights_bytes
    assert report.weights_ratio < 0.75
    assert report.memory_ratio == 1
    assert report.slim.bits_per_byte == report.stages[1].bits_per_byte
    with pytest.raises(InputError, match="holds packed zeros"):
        read_original(out)


def test_packed_files_that_were_changed_are_refused(kept, corpus, tmp_path):
    out = tmp_path / "out"
    slim(kept, out, corpus, prune=0.5, prune_what="2:4", prune_steps=0)
    table = json.loads((out / "sparse.json").read_text())
    damages = {
        "another form": table | {"version": 2},
        "a whole table": {name: one for name, one in table.items() if name != "forms"},
    }
    for damage in damages.values():
        (out / "sparse.json").write_text(json.dumps(damage))
        with pytest.raises(InputError, match="version 1|a whole table"):
            load_any_model(out)
    (out / "sparse.json").write_text(json.dumps(table))
    load_any_model(out)
    with open(out / "sparse.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="1,000 bytes instead of"):
        load_any_model(out)


def test_groups_must_fit_what_heads_leave(kept, corpus, tmp_path):
    few = {"prune": 0.5, "prune_what": "heads", "prune_steps": 0}
    with pytest.raises(InputError, match="quant_group_size = 44"):
        slim(kept, tmp_path / "out", corpus, quantize="int4", quant_group_size=44, **few)
    slim(kept, tmp_path / "out", corpus, quantize="int4", **few)
    table = load_any_model(tmp_path / "out").model.blocks[0].attention.out_proj.table
    assert (table.shape[1], table.scheme.quant_group_size) == (16, 16)


def test_heads_that_share_keys_go_together(corpus, tmp_path):
    tokenizer = Tokenizer.train(corpus.train, 20, (END_OF_TEXT,))
    write_run(tmp_path / "run", tokenizer, corpus, num_kv_heads=2)
    slim(tmp_path / "run", tmp_path / "out", corpus, prune=0.5, prune_what="heads", prune_steps=0)
    config = load_text_model(tmp_path / "out", "cpu").model.config
    assert (config.num_heads, config.num_kv_heads) == (2, 2)


def test_the_same_seed_gives_the_same_file(three, kept, corpus, tmp_path):
    out, report = three
    config = {**report.config}
    slim(kept, tmp_path / "again", corpus, **config)
    again = (tmp_path / "again" / "quantized.safetensors").read_bytes()
    assert again == (out / "quantized.safetensors").read_bytes()


def test_a_text_that_the_original_did_not_learn_from_is_noted(kept, tmp_path, three):
    other = corpus_from([f"{one} and more" for one in documents()], "others", 0.3)
    report = slim(kept, tmp_path / "out", other, quantize="int8")
    assert "another text" in report.notes[0]
    assert "note: " in report.as_text()
    assert three[1].notes == ()


@pytest.mark.parametrize(
    ("choices", "given", "change"),
    [
        ({}, "none of them", 'quantize="int8"'),
        ({"quantize": "int5"}, "quantize = 'int5'", "choose one"),
        ({"quantize": "int16"}, "quantize = 'int16'", "16 bits is a cast: bfloat16"),
        ({"quantize": "int8", "quant_group_size": 32}, "'int8' with quant_group_size", "int4"),
        ({"quantize": "float16", "aware_steps": 5}, "'float16' with aware_steps", "int4"),
        ({"quantize": "int4", "activations": "dynamic"}, "activations = 'dynamic'", "int8"),
        ({"quantize": "int4", "rounding": "up"}, "rounding = 'up'", "one of these"),
        ({"distill": True, "distill_temperature": 0}, "distill_temperature = 0", "give"),
        ({"distill": True, "soft_weight": 1.5}, "soft_weight = 1.5", "soft_weight"),
        ({"quantize": "int8", "student_layers": 1}, "without it", "distill=True"),
        ({"prune": 1.5}, "prune = 1.5", "prune"),
        ({"prune": -0.1}, "prune = -0.1", "prune"),
        ({"prune": 0.0}, "prune = 0.0", "prune"),
        ({"prune": 0.4, "prune_what": "2:4"}, "prune = 0.4", "prune=0.5"),
        ({"prune": 0.5, "prune_what": "2:4", "quantize": "int8"}, "with quantize", "neurons"),
        ({"prune": 0.5, "prune_what": "layers"}, "prune_what = 'layers'", "one of these"),
        ({"prune": 0.5, "aware_steps": 5}, "aware_steps = 5 without", "leave aware_steps out"),
        ({"prune": 0.5, "activations": "dynamic"}, "'dynamic' without it", 'quantize="int8"'),
        ({"distill": True, "quant_group_size": 8}, "= 8 without it", "leave quant_group_size"),
        ({"distill": True, "rounding": "nearest"}, "'nearest' without it", "leave rounding out"),
        ({"distill": True, "prune_what": "2:4"}, "'2:4' without it", "give prune=0.5"),
        ({"quantize": "int8", "soft_weight": 0.5}, "= 0.5 without it", "leave soft_weight out"),
    ],
)
def test_choices_that_cannot_be_are_refused(choices, given, change):
    with pytest.raises(InputError) as error:
        SlimConfig(**choices)
    assert given in error.value.given
    assert change in error.value.change


@pytest.mark.parametrize(
    ("choices", "given", "change"),
    [
        ({"prune": 1.0}, "all 88 would go", "at most 0.988"),
        ({"prune": 1.0, "prune_what": "weights"}, "all 1024 would go", "at most 0.999"),
        ({"prune": 0.9, "prune_what": "heads"}, "all 4 would go", "at most 0.75"),
        ({"prune": 0.001}, "none would go", "at least 0.012"),
        ({"prune": 0.125, "prune_what": "both"}, "none would go", '0.25, or prune_what="neurons"'),
        ({"prune": 0.0001, "prune_what": "weights"}, "none would go", "at least 0.0004"),
        ({"distill": True, "student_layers": 3}, "student_layers = 3", "fewer"),
        ({"quantize": "int4", "quant_group_size": 30}, "quant_group_size = 30", "is 8"),
        ({"quantize": "int4", "quant_group_size": 16}, "quant_group_size = 16", "out"),
    ],
)
def test_sizes_that_the_model_has_not_are_refused_before_anything_is_trained(
    kept, corpus, tmp_path, choices, given, change, monkeypatch
):
    monkeypatch.setattr(recipe, "run_steps", lambda _: pytest.fail("work was begun"))
    with pytest.raises(InputError) as error:
        slim(kept, tmp_path / "out", corpus, **choices)
    assert given in error.value.given
    assert change in error.value.change
    assert list(tmp_path.iterdir()) == []


def test_widths_that_four_does_not_divide_are_refused_by_name(corpus, tmp_path):
    tokenizer = Tokenizer.train(corpus.train, 20, (END_OF_TEXT,))
    write_run(tmp_path / "run", tokenizer, corpus, d_ff=90)
    with pytest.raises(InputError, match=r"blocks.0.feed_forward.down_proj.weight \(32, 90\)"):
        slim(tmp_path / "run", tmp_path / "out", corpus, prune=0.5, prune_what="2:4")


def test_one_layer_is_not_halved(corpus, tmp_path):
    tokenizer = Tokenizer.train(corpus.train, 20, (END_OF_TEXT,))
    write_run(tmp_path / "run", tokenizer, corpus, num_layers=1)
    with pytest.raises(InputError, match="at least 2 layers"):
        slim(tmp_path / "run", tmp_path / "out", corpus, distill=True)


def test_sources_that_cannot_be_made_smaller_are_refused(grouped, kept, corpus, tmp_path):
    out = tmp_path / "out"
    cases = [
        (tmp_path / "none", "does not exist"),
        (grouped[0], "which holds numbers of fewer bits"),
        (kept / "tokenizer.json", "a single file"),
    ]
    for source, given in cases:
        with pytest.raises(InputError, match=given):
            slim(source, out, corpus, quantize="int8")
    assert not out.exists()


def test_weights_that_are_no_numbers_are_refused_by_name(kept, corpus, tmp_path):
    def spoil(model):
        model.blocks[1].attention.k_proj.weight.data[3, 5] = float("nan")

    write_run(tmp_path / "run", Tokenizer.load(kept / "tokenizer.json"), corpus, spoil)
    with pytest.raises(InputError, match=r"finite numbers\n.*blocks.1.attention.k_proj.weight: 1 "):
        slim(tmp_path / "run", tmp_path / "out", corpus, quantize="int8")


def test_integers_are_no_ordinary_checkpoint_and_the_other_way_round(grouped, kept):
    with pytest.raises(InputError, match="was made smaller: slimlab.slim.load.load_any_model"):
        load_text_model(grouped[0])
    with pytest.raises(InputError, match="an ordinary checkpoint"):
        load_quantized(kept / "step_00000007")


def test_folders_that_exist_or_lie_in_the_original_are_refused(kept, corpus, tmp_path):
    (tmp_path / "there").mkdir()
    cases = [
        (tmp_path / "there", "a folder that does not exist"),
        (kept, "a folder that does not exist"),
        (kept / "inner", "a folder of its own"),
        (kept / "step_00000007" / "inner", "a folder of its own"),
        (kept / "step_00000008", "a name that no checkpoint has"),
        (kept / ".step_9", "a name that no checkpoint has"),
    ]
    for out, asked in cases:
        with pytest.raises(InputError, match=asked):
            slim(kept / "step_00000007" if "step" in out.name else kept, out, corpus, prune=0.5)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write_model", "measure_speed", "write_json"])
def test_what_is_interrupted_leaves_nothing_behind(
    kept, corpus, tmp_path, monkeypatch, error, place
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(recipe, place, fail)
    kind = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="No space left" if kind is InputError else None):
        slim(kept, tmp_path / "out", corpus, quantize="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("x" * 240, "name too long"),
        ("new/" + "x" * 300 + "/out", "name too long"),
        ("broken/out", "exists"),
        ("file/out", "exists"),
        ("new/..", "new/.."),
        ("a\0b", "x00b"),
        ("a\udc80", "udc80"),
    ],
)
def test_names_that_cannot_be_made_are_refused_before_the_work_and_leave_nothing(
    kept, corpus, tmp_path, monkeypatch, name, given
):
    monkeypatch.setattr(recipe, "run_steps", lambda _: pytest.fail("work was begun"))
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"(?i){given}"):
        slim(kept, tmp_path / name, corpus, quantize="int8")
    assert {one.name for one in tmp_path.iterdir()} == {"broken", "file"}


@pytest.mark.parametrize("choices", [{"quantize": "int8"}, {"prune": 0.5, "prune_what": "2:4"}])
def test_a_disk_that_becomes_full_is_named_by_out_and_the_original_stays(
    kept, corpus, tmp_path, monkeypatch, choices
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    for module in (quantize_pack, prune_file):
        monkeypatch.setattr(module, "write_tensors", fail)
    out = tmp_path / "out"
    with pytest.raises(InputError) as error:
        slim(kept, out, corpus, **choices, **({} if "quantize" in choices else {"prune_steps": 0}))
    wanted = f"{out}: No space left on device; the original is as it was"
    assert error.value.given == wanted
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_any_work(kept, corpus, tmp_path):
    with small_disk(tmp_path, "64k") as disk, pytest.raises(InputError, match="bytes of room"):
        slim(kept, disk / "out", corpus, quantize="int8")


def test_training_that_diverges_leaves_nothing_behind(kept, corpus, tmp_path):
    with pytest.raises(InputError, match="finite"):
        slim(kept, tmp_path / "out", corpus, prune=0.5, prune_steps=60, peak_lr=1e30)
    assert list(tmp_path.iterdir()) == []


def test_the_random_numbers_of_the_caller_stay(kept, corpus, tmp_path):
    before = torch.random.get_rng_state()
    slim(kept, tmp_path / "out", corpus, **FEW, distill=True, quantize="int4")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_command_writes_a_figure_and_generate_goes_on(kept, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(documents()))
    result = run("slim", kept, out, "--text", text, "--quantize", "int4", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["slim"]["weights_bytes"] > 0
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    result = run("generate", out, "--max-new-tokens", 3, "--prompt", "the")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the")


def test_the_command_speaks_of_options(kept, tmp_path):
    result = run("slim", kept, tmp_path / "out", "--quantize", "int8", "--student-layers", 1)
    assert result.exit_code == 2
    assert "--distill" in result.output
    result = run("slim", kept, tmp_path / "out", "--quantize", "int8", "--prune-steps", 200)
    assert result.exit_code == 2
    assert "--prune 0.5, or leave --prune-steps out" in result.output
    result = run("slim", kept, tmp_path / "out", "--prune", "0.5", "--figure", "a.bmp")
    assert result.exit_code == 2
    assert ".png" in result.output
    result = run("slim", kept, tmp_path / "out", "--prune", 0.5, "--figure", kept / "a.png")
    assert result.exit_code == 2
    assert "a figure outside the original" in result.output
    assert list(tmp_path.iterdir()) == []
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documents()))
    held = ("--text", text, "--held-out", 0)
    result = run("slim", kept, tmp_path / "out", "--quantize", "int8", *held)
    assert "a part is held out: --held-out 0.1\n" in result.output


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("run_steps", "out was not written"),
        ("slimming_figure", "out is written, though its figure"),
    ],
)
def test_the_command_says_truly_what_is_written_when_it_is_stopped(
    kept, tmp_path, monkeypatch, place, said
):
    def stop(*_):
        raise KeyboardInterrupt

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documents()))
    monkeypatch.setattr(recipe if place == "run_steps" else slimming, place, stop)
    result = run("slim", kept, tmp_path / "out", "--quantize", "int8", "--text", text)
    assert result.exit_code == 130
    assert said in result.stderr
    assert (tmp_path / "out" / "report.json").is_file() == (place != "run_steps")
    assert [one.name for one in tmp_path.glob(".*")] == []


def test_book_is_the_model_of_the_book_with_its_text(kept, corpus, tmp_path, monkeypatch):
    trained = load_text_model(kept, "cpu")
    book = SimpleNamespace(**{**vars(trained), "source": str(kept)}, corpus=corpus)
    monkeypatch.setattr(load, "reference_model", lambda progress: book)
    report = slim("book", tmp_path / "out", None, quantize="int8")
    assert report.text["fingerprint"] == corpus.fingerprint
    assert report.notes == ()
    assert report.original.weights_bytes > report.slim.weights_bytes > 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a folder of its own"):
        slim("book", kept / "inner", None, quantize="int8")
    with pytest.raises(InputError, match="does not exist"):
        slim("./book", tmp_path / "other", corpus, quantize="int8")


def run(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_figures_show_every_step_and_the_front_leaves_out_what_is_beaten(three, grouped):
    figure = slimming_figure(three[1])
    labels = [one.get_text() for one in figure.axes[0].get_legend().get_texts()]
    assert labels == ["original", "distilled", "pruned", "quantized"]
    figure = pareto_figure({"three": three[1], "four bits": grouped[1]})
    assert len(figure.axes[0].get_legend().get_texts()) == 3
    marks = pareto_figure({str(n): three[1] for n in range(9)}).axes[0].collections
    looks = {(tuple(one.get_facecolor()[0]), len(one.get_paths()[0])) for one in marks}
    assert len(looks) == 10
    assert pareto_front([(3, 1), (1, 2), (2, 3), (2, 1.5)]) == [(1, 2), (2, 1.5), (3, 1)]
    with pytest.raises(InputError, match="at least one report"):
        pareto_figure({})


def test_a_folder_in_the_form_of_transformers_is_a_source_too(corpus, tmp_path):
    tokenizer = Tokenizer.train(corpus.train, 20, (END_OF_TEXT,))
    sizes = {"vocab_size": tokenizer.vocab_size, "seq_len": 16, "d_model": 32, "num_layers": 1}
    model = build_model(family_config("gpt2", **sizes, num_heads=2))
    save_pretrained(model, tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2" / "tokenizer.json")
    report = slim(tmp_path / "gpt2", tmp_path / "out", corpus, quantize="int8")
    size = (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    assert report.original.weights_bytes == size
    assert "does not name" in report.notes[0]
    assert load_any_model(tmp_path / "out").model.config.positions == "learned"
