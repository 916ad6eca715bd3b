"""The companion of the chapter on self-distilled quantization, on a small encoder."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from effnb.chapters.inference.self_distilled_quantization import (
    checks,
    drawings,
    exercises,
    languages,
    methods,
    panels,
    tables,
    verdicts,
)
from effnb.lab import results
from effnb.lab.claims import UNTESTED
from effnb.lab.models import ENCODERS, ModelUnavailable
from effnb.lab.tasks import TOPICS, Example

NOTHING = results.NotMeasured("05_inference/4_self_distilled_quantization/nothing")


def body(layers=2, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=32, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A small encoder, batches of random tokens, and an own folder for teachers."""
    _, batch = checks.tiny()
    batch["labels"] = batch["labels"] % len(TOPICS)
    monkeypatch.setattr(languages, "batches", lambda tokenizer, seed: lambda step: batch)
    monkeypatch.setattr(methods, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(methods, "sha256", lambda name: None)
    loaded = SimpleNamespace(model=body(), tokenizer=None, name="small")
    return SimpleNamespace(loaded=loaded, batch=batch, folder=tmp_path / "build" / "teachers")


def given(batch):
    return {key: tensor for key, tensor in batch.items() if key != "labels"}


def logits(model, batch):
    with torch.no_grad():
        return model(**given(batch))


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exercise",
    [exercises.blocks, exercises.matching, exercises.fairness],
    ids=lambda exercise: exercise.name,
)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


# --- languages ------------------------------------------------------------------------------------


def test_languages_are_seen_or_not():
    assert len(languages.LANGUAGES) == 12
    assert {*languages.SEEN, *languages.UNSEEN} == set(languages.LANGUAGES)
    assert not set(languages.SEEN) & set(languages.UNSEEN)


def test_examples_are_of_sources_that_were_not_trained_on():
    trained = {e.document for e in languages.train_examples(("de",))}
    held = languages.held_out("de")
    assert 0 < len(held) <= languages.JUDGED_ON
    assert len({e.document for e in held}) == len(held)
    assert not trained & {e.document for e in held}
    labels = [e.label for e in held]
    assert languages.majority("de") == pytest.approx(
        max(labels.count(x) for x in labels) / len(labels)
    )


def test_the_same_package_counts_once(monkeypatch):
    right = {x: {"both": 1.0} for x in languages.LANGUAGES}
    right["en"]["english only"] = 0.0
    right["ja"]["both"] = 0.0
    found = languages.measured(right)
    assert found["languages"]["en"] == 0.5
    assert found["documents"] == [round(11 / 12, 3), 0.0]
    assert found["seen"] == [1.0, 0.0]
    assert found["unseen"] == [round(8 / 9, 3)]
    assert found["gap"] == [round(8 / 9 - 1, 3)]


def test_every_language_is_judged(monkeypatch):
    rows = tuple(Example(f"source {i}", "text", "", i % 2, "topic") for i in range(4))
    monkeypatch.setattr(languages, "held_out", lambda language: rows)
    monkeypatch.setattr(languages, "classify", lambda *_, tokens: ([0, 1, 1, 1], None))
    found = languages.judge(None, None)
    assert set(found) == set(languages.LANGUAGES)
    assert list(found["ko"].values()) == [1.0, 1.0, 0.0, 1.0]
    assert languages.accuracy(found)["ko"] == 0.75


# --- methods --------------------------------------------------------------------------------------


def test_an_encoder_that_is_not_trained_says_which_command_trains_it(monkeypatch):
    def missing(name, device):
        raise ModelUnavailable("not here")

    monkeypatch.setattr(methods, "load", missing)
    found = methods.encoder()
    assert not found
    assert "python data/train_multi.py" in str(found)
    assert methods.MODEL in ENCODERS
    monkeypatch.setattr(methods, "load", lambda name, device: "loaded")
    assert methods.encoder() == "loaded"


def test_the_first_blocks_of_an_encoder():
    model = body(3)
    part = methods.shallow(model, 1)
    assert len(part.encoder.layer) == part.config.num_hidden_layers == 1
    assert len(model.encoder.layer) == 3
    with pytest.raises(ValueError, match="4 blocks were asked for; the encoder has 3"):
        methods.shallow(model, 4)


def test_a_teacher_learns_and_is_kept(small):
    first = methods.fine_tuned(small.loaded, 0, steps=20)
    labels = small.batch["labels"]
    fresh = torch.nn.functional.cross_entropy(torch.zeros(len(labels), len(TOPICS)), labels)
    assert torch.nn.functional.cross_entropy(logits(first, small.batch), labels) < fresh
    assert len(list(small.folder.glob("*"))) == 1
    second = methods.fine_tuned(small.loaded, 0, steps=20)
    assert torch.equal(logits(first, small.batch), logits(second, small.batch))
    assert not second.training


@pytest.mark.parametrize("method", ["PTQ", *methods.METHODS])
def test_students_lie_on_the_grid_and_teachers_stay(small, method):
    teacher = methods.fine_tuned(small.loaded, 0, steps=4)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    extra = {} if method == "PTQ" else {"steps": 2}
    found = methods.trained(teacher, None, method, 3, 0, **extra)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    weight = dict(found.named_modules())[
        next(n for n, _ in found.named_modules() if n.endswith("layer.0.attention.self.query"))
    ].weight
    assert max(len(row.unique()) for row in weight.detach()) <= 8
    assert not torch.equal(logits(found, small.batch), logits(teacher, small.batch))


def test_codewords_take_fewer_bits(small):
    teacher = methods.fine_tuned(small.loaded, 0, steps=2)
    model, bits = methods.codewords(teacher, None, 0, 0, centroids=8)
    assert 0 < bits < 32
    assert logits(model, small.batch).isfinite().all()


def test_errors_by_role(small):
    teacher = methods.fine_tuned(small.loaded, 0, steps=2)
    errors = methods.sdq.module_errors(teacher, methods.rounded(teacher, 3), [given(small.batch)])
    found = methods.role_errors(errors)
    assert set(tables.ROLES) | {"first block", "last block"} <= set(found)
    assert all(value > 0 for value in found["query"]["alone"])
    assert found["first block"]["accumulated"] != found["last block"]["accumulated"]
    layers = methods.layer_means(errors)
    assert {row["layer"] for row in layers} == {0, 1}
    assert set(tables.role_means(layers)) == set(tables.ROLES)


def test_bytes_are_counted():
    model, _ = checks.tiny()
    rows, weights = 2 * (5 * 32 + 64), 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert methods.linear_bytes(model, 4) == weights // 2 + 2 * rows
    assert methods.embedding_bytes(model) == 2 * 32 * (100 + 32 + 2)
    shape = {"vocabulary": 100, "hidden": 32, "feed-forward": 64, "blocks": 2, "positions": 32}
    assert checks.sizes_of(shape) == {"weights": weights, "rows": rows, "embeddings": 132 * 32}


def test_attention_of_a_text_sums_to_one():
    model, batch = checks.tiny()
    found = methods.attention_of(model, batch, 1, 2)
    assert found.shape == (int(batch["attention_mask"][0].sum()),) * 2
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)))


# --- stored rows ----------------------------------------------------------------------------------


def accuracies(seen, unseen):
    rows = dict.fromkeys(languages.LANGUAGES, unseen) | dict.fromkeys(languages.SEEN, seen)
    return {"languages": rows}


def layer_rows(depth=2):
    rows = []
    for layer in range(depth):
        for i, role in enumerate((*tables.ROLES, "block"), 1):
            rows.append(
                {"role": role, "layer": layer, "accumulated": 0.02 * i + 0.01 * layer,
                 "alone": 0.01 * i}
            )  # fmt: skip
    return rows


def module_rows(*models):
    return [{"model": model, "bits": 4, "layers": layer_rows()} for model in models]


def student_rows():
    one = {"setting": "students"}
    rows = [{**one, "method": "teacher", "seed": 0} | accuracies(0.9, 0.8)]
    for bits in methods.BITS:
        for i, method in enumerate(tables.METHODS):
            found = accuracies(0.8 + 0.01 * i, 0.5 + 0.05 * i)
            rows.append({**one, "method": method, "bits": bits, "seed": 0} | found)
    return rows


def grid_rows(bits=(8, 4), noises=(0.5, 1.0), alphas=(0.0, 10.0)):
    rows = [{"method": "teacher"} | accuracies(0.9, 0.8)]
    rows += [{"method": "PTQ", "bits": b} | accuracies(0.8, 0.5) for b in bits]
    rows += [
        {"method": "SDQ", "bits": b, "noise": p, "alpha": a} | accuracies(0.85, 0.7)
        for b in bits for p in noises for a in alphas
    ]  # fmt: skip
    return rows


def test_sentences_on_errors_follow_their_rows():
    rows = module_rows("minilm-l6")
    said = tables.errors_said(rows)
    assert "the largest error is that of the norm after feed-forward" in said
    assert "the smallest that of the query" in said
    assert "self-attention put out is the number 6" in said
    assert "python data/train_multi.py" in tables.errors_said(rows, methods.MODEL)
    shown = str(tables.errors_table(rows))
    assert "minilm-l6" in shown
    assert methods.MODEL not in shown
    assert methods.MODEL in str(tables.errors_table(module_rows("minilm-l6", methods.MODEL)))


def test_the_map_of_errors_says_its_numbers():
    alt = drawings.errors(module_rows("minilm-l6")).alt
    assert "query 2.5%" in alt
    assert "all rounded: 20.0%, 21.0%; each alone: 10.0%, 10.0%" in alt
    missing = drawings.errors(module_rows("minilm-l6"), methods.MODEL)
    assert isinstance(missing, methods.NotTrained)


def test_students_by_language():
    rows = student_rows()
    said = tables.students_said(rows)
    assert "At 4 bits SDQ does best on unseen languages: 65.0%" in said
    assert "teacher reaches 80.0%" in said
    assert str(tables.students_table(rows)).count("PTQ") == 3
    assert tables.students_said(rows[1:]) == "Not all of these methods have been measured."
    alt = drawings.students(rows).alt
    assert "rounded to 4 bits" in alt
    assert "Japanese 50%" in alt
    assert "Japanese 80%" in alt


def test_the_encoder_beside_the_most_frequent_topic():
    stored = {
        "table": [accuracies(0.9, 0.7), accuracies(0.7, 0.5)],
        "majority": dict.fromkeys(languages.LANGUAGES, 0.3) | {"ja": 0.55},
        "texts": dict.fromkeys(languages.LANGUAGES, 150),
    }
    said = tables.encoder_said(stored)
    assert "80% of the held-out topics right in these, 60% in nine other languages" in said
    assert "More than ten points above that: 8 of the nine." in said
    assert "Japanese" in str(tables.encoder_table(stored))


def test_variants_and_costs():
    rows = [{"variant": "output", "seed": s} | accuracies(0.8, 0.6) for s in (0, 1)]
    rows.append({"variant": "codewords", "bits": 1.25} | accuracies(0.7, 0.4))
    shown = str(tables.variants_table({"table": rows, "bits": 4}))
    assert "1.25" in shown
    assert "4.00" in shown
    said = tables.cost_said(
        [
            {"method": "QAT", "flops": 300, "seconds": [2.0, 1.0]},
            {"method": "SDQ", "flops": 400, "seconds": [1.5, 3.0]},
        ]
    )
    assert said == "SDQ: 1.33 times the operations and 1.5 times the seconds of QAT on labels."


def test_a_missing_result_says_so():
    for shown in (
        drawings.errors(NOTHING), drawings.students(NOTHING), panels.grid(NOTHING),
        tables.errors_said(NOTHING), tables.errors_table(NOTHING), tables.encoder_said(NOTHING),
        tables.encoder_table(NOTHING), tables.students_said(NOTHING),
        tables.students_table(NOTHING), tables.variants_table(NOTHING), tables.cost_said(NOTHING),
    ):  # fmt: skip
        assert "Not measured here" in str(shown)


# --- on the page ----------------------------------------------------------------------------------


def test_noise_on_all_blocks_is_training_with_rounded_weights():
    model, batch = checks.tiny()
    assert checks.against_qat(model, batch) < 1e-6
    shown = str(tables.loss_parts(model, methods.sdq.prepare_quant_noise(model, 4), batch))
    for name in ("attention, mse", "attention, kl", "hidden", "output", "labels"):
        assert name in shown


def test_words_of_the_page():
    assert "6.2% of the steps" in tables.exact_gradients_said()
    assert "+0.90" in str(tables.noise_rows())
    assert "XLM-R-Base" in str(checks.sizes_table())


def test_what_the_page_runs_live():
    said = checks.minilm_step()
    assert said.startswith("MiniLM in 4 bits: its output is wrong by ")
    assert "64 codewords of 4" in str(checks.codewords_table((16, 64)))


def test_panels_pass_over_their_knobs(monkeypatch):
    _, batch = checks.tiny()
    encoder = body(3)
    monkeypatch.setattr(panels, "minilm", lambda: (encoder, [given(batch)]))
    panels.errors().sweep()
    panels.noise().sweep()
    panels.grid(grid_rows()).sweep()


def test_verdicts_say_what_is_not_tested():
    for judge in verdicts.ALL:
        assert judge().outcome == UNTESTED
        assert judge().note
