"""The companion of the chapter on delta tuning: runs, memory, exercises, tables, the panel."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from effnb.chapters.finetuning.delta_tuning import (
    drawings,
    exercises,
    memory,
    methods,
    panels,
    tables,
)
from effnb.core.deltas import attached, delta_parameters
from effnb.evaluation.cost import peak_memory
from effnb.finetuning import diff_pruning, lora
from effnb.lab import results
from effnb.lab.models import load
from effnb.lab.task_inputs import Classifier, classification_loss
from effnb.lab.tasks import Example, Task

EXERCISES = [exercises.counting, exercises.merging, exercises.gate]
SWEEP = Path(__file__).resolve().parents[3] / "data/sweeps/04_finetuning/1_delta_tuning.py"
WORDS = ("alpha beta", "gamma delta", "one two", "three four", "red blue", "cat dog")


def examples(split, count, labels):
    words = [f"{WORDS[i % 6]} {split} {i}" for i in range(count)]
    return tuple(
        Example(f"{split} {i}", text, "", i % labels, WORDS[i % labels])
        for i, text in enumerate(words)
    )


@pytest.fixture(scope="module")
def small_task():
    splits = {"train": 96, "validation": 70, "test": 190}
    rows = {name: examples(name, count, 2) for name, count in splits.items()}
    return Task("section", "classification", "made up", ("alpha beta", "gamma delta"),
                ("{text}:",), **rows)  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def subject(small_task, encoder):
    """The task on a tiny encoder under MiniLM's name."""
    made = methods.Subject(small_task)
    tokenizer = load("minilm-l6", device="cpu").tokenizer
    made.__dict__["loaded"] = SimpleNamespace(model=encoder, tokenizer=tokenizer)
    return made


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_counts_are_those_of_the_package(subject):
    d, layers = 16, 3
    for name, size in (("LoRA", 2), ("adapter", 4), ("prefix", 3), ("prompt", 5)):
        made = methods.prepared(subject.base, name, size)
        assert made.parameters == exercises.delta_size(name, size, d, layers), name


def test_merged_weights_are_those_of_the_package():
    base = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False))
    tuned = lora.attach(base, rank=2, alpha=6.0)
    A, B = delta_parameters(tuned, "default").values()
    B.data.normal_()
    merged = lora.merge(tuned, "default")[0].weight
    torch.testing.assert_close(merged, exercises.lora_weight(base[0].weight, A, B, 6.0))


def test_a_prefix_mixes_an_answer_into_attention():
    """He et al. 2022: attention with a prefix is a gated sum."""
    draw = torch.Generator().manual_seed(0)
    q, P, K = (torch.randn(*s, generator=draw).double() for s in ((8,), (3, 8), (6, 8)))
    Pv, V = (torch.randn(n, 8, generator=draw).double() for n in (3, 6))

    def attend(keys, values):
        return (keys @ q / 8**0.5).softmax(0) @ values

    share = exercises.prefix_share(q, P, K)
    mixed = (1 - share) * attend(K, V) + share * attend(P, Pv)
    torch.testing.assert_close(attend(torch.cat([P, K]), torch.cat([Pv, V])), mixed)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_trains_and_leaves_the_base_alone(subject, name):
    frozen = {k: p.clone() for k, p in subject.base.named_parameters()}
    size = {"random modules": 30, "intrinsic": 20}.get(name, 2)
    found = methods.tune(
        subject.base, name, subject.batch, subject.task.train, steps=2, size=size,
        watch=lambda model: {"training": model.training}, points=(0, 1, 2),
    )  # fmt: skip
    for key, parameter in subject.base.named_parameters():
        assert torch.equal(parameter, frozen[key]), key
    assert len(found.losses) == 2 and found.seconds > 0
    assert found.seen == [{"step": step, "training": False} for step in (0, 1, 2)]
    assert found.model.classifier.weight.abs().max() > 0
    assert (attached(found.model) == ()) == (name == "full")
    whole = sum(p.numel() for p in subject.base.encoder.parameters())
    assert found.parameters == whole if name == "full" else 0 < found.parameters < whole


def test_runs_of_a_seed_see_the_same_texts(subject):
    def seen(name, seed):
        texts = []

        def batch(chosen):
            texts.extend(e.text for e in chosen)
            return subject.batch(chosen)

        methods.tune(subject.base, name, batch, subject.task.train, steps=3, size=2, seed=seed)
        return texts

    assert seen("LoRA", 1) == seen("prompt", 1) != seen("LoRA", 2)


def test_the_classifier_has_a_rate_of_its_own(subject):
    model = methods.prepared(subject.base, "LoRA", 2).model
    settings = methods.TrainingSettings(steps=1, learning_rate=1e-4)
    (optimizer,) = methods.optimizers(model, settings)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-4, methods.CLASSIFIER_RATE]
    held = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_decoders_get_the_same_methods(small_task):
    torch.manual_seed(0)
    tokenizer = load("mini-300k", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    made = methods.Subject(small_task, "mini-300k")
    made.__dict__["loaded"] = SimpleNamespace(model=LlamaForCausalLM(config), tokenizer=tokenizer)
    for name in ("full", "LoRA", "adapter", "prefix", "prompt"):
        found = methods.tune(
            made.base, name, made.batch, small_task.train, steps=2, size=2, rate=1e-2
        )
        assert len(found.losses) == 2, name


def test_one_example_of_each_document():
    every = examples("a", 6, 2) + examples("a", 6, 2)
    assert methods.one_per_document(every, 6) == list(every[:6])
    with pytest.raises(ValueError, match="there are 6 documents, fewer than 7"):
        methods.one_per_document(every, 7)


# --- memory ---------------------------------------------------------------------------------------


def test_the_state_follows_the_closed_form(subject):
    batch = subject.batch(subject.task.train[:4])
    head = sum(p.numel() for p in subject.base.classifier.parameters())
    for name in ("full", "LoRA", "BitFit"):
        made = methods.prepared(subject.base, name, 2)
        found = memory.training_memory(made.model, classification_loss, batch)
        total = sum(p.numel() for p in made.model.parameters())
        assert found.state == memory.state_bytes(total, made.parameters + head)
        assert found.total == found.state + found.activations
    n = 1000
    assert memory.state_bytes(n, n) == 16 * n and memory.state_bytes(n, 0) == 4 * n
    assert memory.state_bytes(n, n, kept=0) == 8 * n


def test_activations_are_what_a_layer_saves():
    layer = torch.nn.Linear(6, 3, bias=False)
    batch = torch.randn(5, 6)

    def loss(model, x):
        return model(x).sum()

    assert memory.training_memory(layer, loss, batch).activations == batch.nbytes
    frozen = torch.nn.Linear(6, 3, bias=False).requires_grad_(False)
    both = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False), frozen)
    # The frozen layer does not keep its inputs: only the first one's are there.
    assert memory.training_memory(both, loss, batch).activations == batch.nbytes


def test_counting_leaves_nothing_behind(subject):
    model = methods.prepared(subject.base, "full").model
    batch = subject.batch(subject.task.train[:8])

    def count(times):
        for _ in range(times):
            memory.training_memory(model, classification_loss, batch)

    assert peak_memory(lambda: count(4)) < 1.5 * peak_memory(lambda: count(1))


def test_deltas_save_less_as_batches_grow_and_diff_pruning_saves_nothing(subject):
    def total(model, count):
        batch = subject.batch(subject.task.train[:count])
        return memory.training_memory(model, classification_loss, batch).total

    models = {name: methods.prepared(subject.base, name, 2).model for name in ("full", "LoRA")}
    few, many = (total(models["LoRA"], n) / total(models["full"], n) for n in (1, 32))
    assert few < many < 1
    gated = diff_pruning.attach(subject.base, layers="encoder.*")
    assert total(gated, 1) > total(models["full"], 1)


# --- the grid -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("delta_sweep", SWEEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["delta_sweep"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["delta_sweep"]


def test_a_row_of_the_grid(sweep, subject, monkeypatch):
    monkeypatch.setattr(sweep, "POINTS", (1, 2))
    row = sweep.classified(subject, "LoRA, rank 1", 0, subject.task.train, steps=2)
    assert row["parameters"] == 2 * 3 * (16 + 16)
    assert len(row["answers"]) == sweep.DOCUMENTS
    assert row["accuracy"] == pytest.approx(row["answers"].count("1") / sweep.DOCUMENTS, abs=1e-4)
    assert [len(point) for point in row["curve"]] == [sweep.WATCHED] * 2
    assert len(row["curve_losses"]) == 2


def test_compared_methods_exist_and_equal_sizes_are_equal(sweep):
    assert {name for name, _ in sweep.COMPARED.values()} <= set(methods.METHODS)
    sizes = {
        name: exercises.delta_size(m, methods.METHODS[m].size if s is None else s, 384, 6)
        for name, (m, s) in sweep.COMPARED.items()
        if m in ("LoRA", "adapter", "prefix", "prompt")
    }
    assert sizes["LoRA, rank 1"] == sizes["prompt"] == 9_216
    assert sizes["prefix"] == sizes["LoRA"] == 8 * 9_216
    for name, tried in sweep.TRIED.items():
        assert methods.METHODS[name].rate in tried


def rows_of_grid(tasks=tables.TASKS, seeds=(0, 1), names=tables.SHOWN):
    quality = {name: 0.9 - 0.05 * i for i, name in enumerate(names)}
    draw = torch.Generator().manual_seed(1)
    rows = []
    for seed in seeds:
        for task in tasks:
            for name in names:
                right = (torch.rand(180, generator=draw) < quality[name]).int().tolist()
                curve = [
                    "".join(map(str, (torch.rand(64, generator=draw) < p).int().tolist()))
                    for p in (0.3, 0.5, 0.6, 0.7, quality[name])
                ]
                rows.append(
                    {
                        "model": "minilm-l6", "task": task, "method": name, "seed": seed,
                        "parameters": 9216 * (1 + len(name)), "answers": "".join(map(str, right)),
                        "accuracy": sum(right) / 180, "loss": 1.0, "curve": curve,
                    }
                )  # fmt: skip
    return rows


def test_tables_of_a_whole_and_of_a_broken_off_grid():
    rows = rows_of_grid()
    assert "4 tasks and 2 seeds" in tables.cost_said(rows)
    assert "full is better than LoRA" in tables.order_said(rows) or "indistinguishable" in (
        tables.order_said(rows)
    )
    assert "4 tasks" in str(tables.grid_table(rows))
    part = rows[: len(rows) - len(tables.SHOWN) - 3]
    assert "not measured" not in str(tables.grid_table(part))  # the first seed has them all
    first = rows_of_grid(tasks=("section",), seeds=(0,))
    assert "1 task and 1 seed" in tables.cost_said(first)
    assert "not measured" in str(tables.grid_table(first))
    nothing = [row for row in first if row["method"] == "full"]
    assert tables.cost_said(nothing) == tables.order_said(nothing) == tables.unfinished()
    assert "1 task and 1 seed" in str(tables.grid_table(nothing))
    apart = nothing + [r for r in rows if r["method"] == "LoRA" and r["task"] == "match"]
    assert "as far as measured" in str(tables.grid_table(apart))
    assert "not measured" in str(tables.few_table(rows, nothing))
    assert "not measured" not in str(tables.few_table(rows, rows))
    assert "not measured" in str(tables.writing_table(nothing))


def test_means_are_over_what_all_have():
    rows = rows_of_grid()
    less = [r for r in rows if not (r["method"] == "prompt" and r["task"] == "match")]
    assert len(tables.common(rows)) == 8
    assert len(tables.common(less)) == 6
    assert len(tables.common(less, ("full", "LoRA"))) == 8
    runs = tables.common(rows)
    found = tables.answers(rows, "full", runs)
    assert len(found) == 720
    assert sum(found) / 720 == pytest.approx(tables.accuracy(rows, "full", runs))


def test_pictures_of_a_grid():
    data = {"table": rows_of_grid(), "points": (5, 10, 20, 40, 80)}
    assert "LoRA" in drawings.result(data["table"]).alt
    assert "after 80" in drawings.learning(data).alt
    assert "after" in tables.speed_said(data)
    first = [r for r in data["table"] if r["method"] == "full"]
    assert drawings.result(first) == tables.unfinished()
    assert drawings.learning(data | {"table": first}) == tables.unfinished()
    two = [r for r in data["table"] if r["method"] in ("full", "prompt")]
    assert drawings.result(two).alt.count("per cent") == 3  # and guessing
    assert "LoRA" not in drawings.learning(data | {"table": two}).alt


def test_names_keep_apart():
    found = drawings.apart({"a": 80.0, "b": 80.5, "c": 60.0}, least=12, points_each=2)
    places = {"a": 160 + found["a"], "b": 161 + found["b"], "c": 120 + found["c"]}
    assert places["b"] - places["a"] == pytest.approx(12)
    assert places["a"] - places["c"] > 12
    assert sum(found.values()) == pytest.approx(0)


def test_pictures_and_words_of_subspaces_and_memory(subject):
    rows = [{"dimension": d, "accuracy": a} for d, a in ((0, 0.8), (4, 0.5), (64, 0.75))]
    assert "64 numbers keep 90%" in tables.intrinsic_said(rows)
    assert "None keeps" in tables.intrinsic_said(rows[:2])
    assert "full tuning 80" in drawings.subspaces(rows).alt
    held = []
    for name in ("full", "LoRA"):
        made = methods.prepared(subject.base, name, 2)
        for batch in (0, 1, 8, 32):
            found = memory.training_memory(
                made.model, classification_loss, subject.batch(subject.task.train[: max(1, batch)])
            )
            about = {"method": name, "batch": batch, "parameters": made.parameters}
            row = about | {"state_bytes": found.state}
            if batch:
                row |= {"bytes": [found.total], "activations": [found.activations]}
            held.append(row)
    assert "batch 32" in drawings.memory(held).alt
    assert "closed form" in tables.memory_said(held)
    assert "LoRA" in str(tables.memory_table(held))
    rows = [{"method": "full", "parameters": 10, "bytes": 100}]
    assert "1.000" in str(tables.smollm2_table(rows))
    assert "2.0e-03" in str(
        tables.rates_table([{"method": "LoRA", "rate": 2e-3, "accuracy": 0.5, "loss": 1.0}])
    )


def test_every_method_has_the_rate_that_the_table_chose():
    rows = tables.stored("rates").data["table"]
    tried = {row["method"] for row in rows}
    assert len(tried) == 8
    for name in tried:
        assert methods.METHODS[name].rate == tables.chosen_rate(rows, name)["rate"], name


def test_a_rate_that_is_too_high_was_seen_to_be():
    """Full tuning stays at guessing on pairs at it, and does better at the rate that it has."""
    steep, grid = (tables.stored(part).data["table"] for part in ("steep", "grid"))
    pairs = [row for row in steep if row["task"] in tables.PAIRS]
    assert {row["rate"] for row in pairs} == {methods.TOO_HIGH[methods.FULL]}
    own = [
        row
        for row in grid
        if row["method"] == methods.FULL and row["task"] in tables.PAIRS and row["seed"] < 2
    ]
    high, low = (sum(row["accuracy"] for row in rows) for rows in (pairs, own))
    assert len(own) == len(pairs) == 4 and low > high
    said = tables.steep_said(steep, grid)
    assert "at 4e-04" in said and "at 1e-04" in said and "4 runs at guessing" in said
    assert "Not measured" in tables.steep_said(steep, [])


def test_what_is_not_measured_says_so():
    missing = results.NotMeasured("04_finetuning/1_delta_tuning/nothing").data
    for function in (
        tables.cost_said,
        tables.grid_table,
        tables.order_said,
        tables.writing_table,
        tables.speed_said,
        tables.intrinsic_said,
        tables.memory_table,
        tables.memory_said,
        tables.smollm2_table,
        tables.rates_table,
        lambda none: tables.few_table(none, []),
        drawings.result,
        drawings.learning,
        drawings.memory,
        drawings.subspaces,
    ):
        assert function(missing) is missing


def test_sizes_in_words():
    assert tables.size_said(18_432) == "18.0 KiB"
    assert tables.size_said(12) == "12 bytes"
    assert tables.size_said(45_426_432) == "43.3 MiB"


# --- the panel ------------------------------------------------------------------------------------


def test_the_panel_answers_at_every_method(subject, monkeypatch):
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)
    monkeypatch.delenv("EFFNB_BUILD", raising=False)
    monkeypatch.setattr(panels, "subject", lambda: subject)
    monkeypatch.setattr(panels, "steps", lambda: 2)
    panels.whole.cache_clear()
    made = panels.training()
    for method in made.knobs["method"].values:
        at = made.at(method=method, size=2)
        assert "Right on new texts" in at.text and "Held by a step" in at.text, method
    few = made.at(data="16 of each topic")
    assert few.result["parameters"] == made.at().result["parameters"]
    assert made.at(method="full", size=2).result is made.at(method="full").result  # no size there
    assert panels.share_choice(0.0004) == "less than a hundredth"
    assert panels.share_choice(0.05) == "a hundredth to a tenth"
    panels.whole.cache_clear()


def test_a_sweep_over_positions_trains_one_step(monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    assert panels.steps() == 1
    monkeypatch.delenv("EFFNB_SWEEP")
    assert panels.steps() == panels.STEPS


def test_times_and_counts_here(subject):
    found = dict(methods.times(subject, ("full", "LoRA"), turns=2))
    assert set(found) == {"full", "LoRA"} and min(found.values()) > 0
    assert "LoRA" in str(tables.counted_table(Classifier(subject.loaded.model, 2), 3, 16))
