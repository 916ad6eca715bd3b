"""The companion of the chapter on retention: exercises, what is measured, tables, panels."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from effnb.chapters.design.retention import (
    drawings,
    exercises,
    methods,
    panels,
    tables,
    twins,
    verdicts,
)
from effnb.design.retention import CausalLM, RecurrentLM, decays, retention
from effnb.lab import models
from effnb.lab.results import NotMeasured

EXERCISES = [exercises.decay, exercises.step, exercises.chunk]
every_method = pytest.mark.parametrize("method", methods.METHODS)


@pytest.fixture
def ids():
    return torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twin():
    history = {"tokens": 10, "seconds": 60}
    return twins.Twin("retnet-300k", methods.build("RetNet"), history)


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_are_the_package_s_retention():
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 9, 4, generator=draw).double() for _ in range(2))
    v = torch.randn(1, 1, 9, 6, generator=draw).double()
    out, last = retention(q, k, v, torch.tensor([0.9]).double(), form="recurrent")
    S, gamma = torch.zeros(4, 6).double(), 0.9
    for n in range(9):
        found, S = exercises.one_token(S, q[0, 0, n], k[0, 0, n], v[0, 0, n], gamma)
        torch.testing.assert_close(found, out[0, 0, n], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(S, last[0, 0], rtol=1e-5, atol=1e-7)
    start = torch.zeros(4, 6).double()
    half = exercises.next_state(start, k[0, 0, :5], v[0, 0, :5], gamma)
    torch.testing.assert_close(exercises.next_state(half, k[0, 0, 5:], v[0, 0, 5:], gamma), S)
    D = exercises.decay_matrix(gamma, 9).double()
    parallel = 0.5 * ((q @ k.mT)[0, 0] * D) @ v[0, 0]
    torch.testing.assert_close(parallel, out[0, 0], rtol=1e-5, atol=1e-6)


# --- models of equal size -------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("size", methods.SHAPES)
def test_all_models_have_the_transformer_s_parameters(method, size):
    counts = [
        sum(p.numel() for p in methods.build(m, size).parameters()) for m in ("Transformer", method)
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.03)


@every_method
def test_a_step_goes_on_with_the_text(method, ids):
    """Reading all but one token, then one step, gives the logits of reading it all at once."""
    model = methods.build(method)
    one = methods.reader(model)
    one.read(ids[:, :-1])
    repeated = [one.step(ids[:, -1:]) for _ in range(2)]
    assert torch.equal(*repeated)
    assert one.position == ids.shape[1] - 1
    with torch.inference_mode():
        whole = model(ids) if isinstance(model, RecurrentLM) else model(input_ids=ids).logits
    torch.testing.assert_close(repeated[0][:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@every_method
def test_what_is_kept_of_random_tokens_is_as_large_as_what_is_kept_of_read_ones(method, ids):
    model = methods.build(method)
    read = methods.reader(model)
    read.read(ids)
    made = methods.after(model, ids.shape[1])
    assert made.bytes == read.bytes > 0
    assert made.position == read.position
    assert torch.isfinite(made.step(ids[:, :1])).all()
    grows = methods.after(model, 2 * ids.shape[1]).bytes > made.bytes
    assert grows == (method in ("Transformer", "Hyena"))
    assert methods.after(model, 8, batch=3).bytes == 3 * methods.after(model, 8).bytes


@every_method
def test_a_training_step_leaves_no_gradients(method):
    model = methods.build(method)
    seen = []
    next(iter(model.parameters())).register_hook(lambda grad: seen.append(float(grad.norm())))
    methods.training_step(model, 16)()
    assert seen and all(math.isfinite(x) and x > 0 for x in seen)
    assert all(p.grad is None for p in model.parameters())


def test_unknown_models_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="there is no 'LSTM'"):
        methods.build("LSTM")
    with pytest.raises(ValueError, match="of size '7b'"):
        methods.build("RetNet", "7b")


def test_the_wrapper_gives_what_the_model_gives(ids):
    model = methods.build("RetNet")
    wrapped = CausalLM(model)
    with torch.inference_mode():
        assert torch.equal(wrapped(input_ids=ids, use_cache=False).logits, model(ids))
        hidden = wrapped.model(input_ids=ids).last_hidden_state
        assert torch.equal(wrapped.lm_head(hidden), model(ids))
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, 3), torch.ones(ids.shape)], 1)
        found = wrapped(input_ids=padded, attention_mask=mask).logits[:, 3:]
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)
    assert wrapped.num_parameters() == sum(p.numel() for p in model.parameters())


# --- the trap -------------------------------------------------------------------------------------


@pytest.fixture
def long_ids():
    """More than two chunks."""
    return torch.randint(0, 4096, (150,), generator=torch.Generator().manual_seed(1))


def test_the_trap_is_the_epsilon_and_goes_with_it(long_ids):
    """Published forms disagree as initialized, with an epsilon of 10⁻⁶; plain ones never do."""
    model = methods.build("RetNet")
    x = methods.layer_input(model, long_ids)
    found = drawings.disagreements(model, x)
    at = drawings.SCALES.index(1.0)
    assert found["as published"][at] > 1e-2
    assert found["as published"][-1] < 0.1 * found["as published"][at]
    assert max(found["as published, ε = 10⁻³⁰"]) < 1e-8
    assert max(found["not normalized"]) < 1e-9
    assert "as published: " in drawings.trap(model, x).alt


@pytest.mark.parametrize("normalize", ["paper", "absolute"])
def test_forms_of_a_layer_as_published_and_plain(long_ids, normalize):
    model = methods.build("RetNet")
    x = methods.layer_input(model, long_ids)
    out = methods.normalized_outputs(model, x, normalize)
    assert float((out["parallel"] - out["chunkwise"]).abs().max()) > 1e-2
    plain = methods.normalized_outputs(model, x, None)
    for form in ("recurrent", "chunkwise"):
        torch.testing.assert_close(plain["parallel"], plain[form], rtol=1e-9, atol=1e-9)


# --- twins ----------------------------------------------------------------------------------------


def test_every_twin_of_the_lab_is_in_the_chapter():
    assert set(twins.NAMES) == set(models.TWINS)
    assert [twins.transformer_of(n) for n in ("retnet-1m", "rwkv-300k")] == ["mini-1m", "mini-300k"]


def test_a_twin_that_has_not_finished_is_a_missing_result(monkeypatch):
    def missing(name):
        raise models.ModelUnavailable(f"{name} is not trained yet")

    monkeypatch.setattr(twins, "twin_folder", missing)
    found = twins.load("rwkv-300k")
    assert isinstance(found, NotMeasured) and not found
    assert "python data/train_twins.py rwkv-300k" in str(found)
    assert twins.trained() == []
    assert methods.agreement(found, torch.zeros(200, dtype=torch.long)) == str(found)
    assert panels.decay_ranges(found, []) is found


def test_a_finished_twin_is_the_model_that_was_saved(monkeypatch, tmp_path, ids):
    model = methods.build("RetNet").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text('{"tokens": 20480000, "seconds": 1200}')
    monkeypatch.setattr(twins, "twin_folder", lambda name: tmp_path)
    found = twins.load("retnet-300k", torch.float64)
    assert "336,512 parameters" in repr(found) and "20 minutes" in repr(found)
    with torch.inference_mode():
        assert torch.equal(found.model(ids), model.double()(ids))
    said = methods.agreement(found, ids.repeat(1, 5)[0])
    assert said.count("True to ten digits") == 3


def test_both_write_on_from_the_same_words(twin):
    tokenizer = SimpleNamespace(
        encode=lambda text, **_: [5, 6, 7], decode=lambda ids: f" {len(ids)}  tokens"
    )
    bench = SimpleNamespace(
        name="mini-300k", model=methods.build("Transformer"),
        loaded=SimpleNamespace(tokenizer=tokenizer),
    )  # fmt: skip
    lines = methods.continuations(bench, twin, tokens=6).splitlines()
    assert [line.split(":")[0] for line in lines] == ["mini-300k", "retnet-300k"]
    assert all(line.endswith("surprise, and 6 tokens …") for line in lines)


# --- tables ---------------------------------------------------------------------------------------


def decoding(factor=2.0):
    rows = []
    for method in methods.METHODS:
        for tokens in (64, 512, 8192):
            grows = method in ("Transformer", "Hyena")
            time = 0.001 * (factor if grows and tokens == 8192 else 1) * (1 + (method == "RetNet"))
            size = 1000 * (tokens if grows else 64)
            rows.append(
                {"method": method, "tokens": tokens, "seconds": [time] * 3, "state_bytes": size}
            )
    return rows


def test_sentences_on_decoding_are_computed():
    assert "Transformer 2.0, RetNet 1.0" in tables.decoding_said(decoding())
    assert "never the faster one" in tables.crossing_said(decoding(1.5))
    said = tables.crossing_said(decoding(4.0))
    assert "Up to 512 tokens a step of the Transformer" in said and "at 8,192" in said
    assert "8.19 MB" in str(tables.state_table(decoding()))
    alt = drawings.decoding(decoding()).alt
    assert "RetNet: 64 kB and 2.0 ms after 64 tokens, 64 kB and 2.0 ms after 8,192" in alt


def test_sentences_on_latency_and_training_are_computed():
    rows = [
        {"method": m, "batch": b, "tokens": 2048, "seconds": [0.001 * b * f]}
        for m, f in (("RetNet", 1), ("Transformer", 3))
        for b in (1, 16)
    ]
    assert "takes 16.0 times for RetNet and 16.0 times for Transformer" in tables.latency_said(rows)
    rows = [
        {"method": m, "tokens": t, "seconds": [s * t], "peak_bytes": s * t}
        for m, s in (
            ("RetNet", 1), ("Transformer, FlashAttention", 2), ("Transformer, standard", 5),
        )
        for t in (1024, 2048, 8192)
    ]  # fmt: skip
    said = tables.training_said(rows)
    assert (
        "8 times for RetNet and 8 times for Transformer" in said and "5.0 times the bytes" in said
    )


def compared(settings=("a", "a"), gap=0.1):
    draw = random.Random(0)
    base = {d: [4 + draw.random() for _ in range(24)] for d in tables.DOMAINS}
    moved = {d: [x + gap + 0.01 * draw.random() for x in found] for d, found in base.items()}
    return [
        {
            "model": name, "domains": domains, "parameters": 336_000, "tokens": 1, "mix": {},
            "settings": how, "recall": recall, "answers": "0110",
        }
        for name, domains, how, recall in (
            ("mini-300k", base, settings[0], None), ("retnet-300k", moved, settings[1], 0.25)
        )
    ]  # fmt: skip


def test_twins_are_compared_where_they_were_trained_alike():
    said = tables.twins_said(compared())
    assert "retnet-300k − mini-300k, nats: novel +0.1" in said
    assert "rwkv-300k: not measured here; `python data/train_twins.py rwkv-300k`" in said
    assert "no comparison" in tables.twins_said(compared(("a", "b")))
    assert "retnet-300k 25%" in tables.recall_said(compared())
    shown = str(tables.twins_table(compared()))
    assert shown.count("not measured") >= 7 * 4 and shown.count("50%") == 2


def test_break_even_is_that_of_the_formula():
    shown = str(tables.break_even_table())
    assert "256" in shown.splitlines()[2]
    assert "SmolLM2-135M" in shown and "192" in shown


def test_positions_are_compared_with_the_end_of_the_trained_length():
    rows = [{"model": "mini-300k", "losses": [5.0, 4.5, 4.0, 4.0, *[6.0] * 12]}]
    assert "mini-300k +2.0" in tables.positions_said(rows)
    assert "4.00 before 512 tokens, 6.00" in drawings.positions(rows).alt


def test_what_is_not_measured_says_so():
    missing = NotMeasured("02_design/5_retention/nothing")
    for function in (
        tables.decoding_said, tables.crossing_said, tables.state_table, tables.latency_said,
        tables.training_said, tables.twins_table, tables.twins_said, tables.recall_said,
        tables.positions_said, tables.smollm2_table, drawings.decoding, drawings.latency,
        drawings.training, drawings.positions,
    ):  # fmt: skip
        assert function(missing) is missing


@pytest.mark.parametrize(
    ("bytes_", "words"), [(512, "512 B"), (16_384, "16.4 kB"), (2_500_000, "2.5 MB")]
)
def test_amounts(bytes_, words):
    assert tables.amount(bytes_) == words


# --- panels ---------------------------------------------------------------------------------------


def test_the_guess_on_memory_is_answered_by_the_memory(twin, ids):
    """From the break-even on, and not before, the cache is the larger one."""
    model = methods.build("Transformer")
    tokenizer = SimpleNamespace(decode=lambda ids: "words")
    shown = panels.writing(model, twin, ids[0], tokenizer)
    sizes = [shown.at(tokens=t).result["found"] for t in (16, 32, 64)]
    assert sizes[0]["Transformer"]["bytes"] < sizes[0]["RetNet"]["bytes"]
    assert sizes[1]["Transformer"]["bytes"] == sizes[1]["RetNet"]["bytes"]
    assert sizes[2]["Transformer"]["bytes"] > sizes[2]["RetNet"]["bytes"]
    assert shown.predict.answer(None) == 32


def test_no_chunk_changes_the_outputs():
    shown = panels.chunks()
    for chunk in panels.CHUNKS:
        found = shown.at(chunk=chunk, tokens=256).result
        assert found["differences"][found["chunk"]] < 1e-4
        assert found["chunk"] == min(chunk, 256)
    work = shown.at(tokens=256).result["work"]
    assert list(work.values()) == sorted(work.values())


def test_other_decays_are_another_model_with_the_same_weights(twin, ids):
    same = panels.with_decay(twin.model, "paper")
    with torch.inference_mode():
        assert torch.equal(same(ids), twin.model(ids))
        assert not torch.equal(panels.with_decay(twin.model, 0.5)(ids), twin.model(ids))
    assert same.embedding.weight.data_ptr() == twin.model.embedding.weight.data_ptr()
    documents = [ids[0], ids[0].flip(0)]
    shown = panels.decay_ranges(twin, documents)
    trained = shown.at(decay="the paper's", tokens=64).result
    assert trained["loss"] == trained["base"]
    assert trained["gammas"] == decays(4).tolist()
    assert shown.at(decay="0.5 in all heads", tokens=64).result["base"] == trained["base"]


def test_verdicts_name_their_tables():
    assert len(verdicts.ALL) == 6
    assert {one.name for one in verdicts.stored()} <= set(verdicts.TABLES)
