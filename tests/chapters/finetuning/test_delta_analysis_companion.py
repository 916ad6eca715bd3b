"""The companion of the chapter on what deltas do together: sets, users, steering, tables, panel."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from effnb.chapters.finetuning.delta_analysis import (
    drawings,
    exercises,
    methods,
    panels,
    steering,
    tables,
    users,
    verdicts,
)
from effnb.chapters.finetuning.delta_tuning.methods import Subject
from effnb.core.deltas import attached, delta_parameters, delta_state_dict, hosts
from effnb.finetuning import adapters, lora, serving
from effnb.finetuning.optimal_control import steer_blocks
from effnb.lab import results
from effnb.lab.claims import chosen, ledger
from effnb.lab.models import load
from effnb.lab.tasks import Example, Task

EXERCISES = [exercises.serving, exercises.transfer, exercises.control]
SWEEP = Path(__file__).resolve().parents[3] / "data/sweeps/04_finetuning/2_delta_analysis.py"
LABELS = ("system", "network", "media", "science", "text", "games")
NAMES = tuple(verdicts.KIND_OF)


def examples(split, count, labels=6):
    return tuple(
        Example(f"{split} {i}", f"a package about {LABELS[i % 6]} number {i}", "", i % labels,
                LABELS[i % labels])
        for i in range(count)
    )  # fmt: skip


def made_up(name="section", train=200):
    rows = {"train": train, "validation": 12, "test": 60}
    return Task(name, "classification", "made up", LABELS, ("{text}\n\nTopic:",),
                **{split: examples(split, n) for split, n in rows.items()})  # fmt: skip


@pytest.fixture(scope="module")
def small():
    """A tiny decoder with the tokenizer of the bench, and a tiny encoder with MiniLM's."""
    torch.manual_seed(0)
    tokenizer = load("mini-300k", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    decoder = SimpleNamespace(
        name="mini-1m", model=LlamaForCausalLM(config).eval(), tokenizer=tokenizer
    )
    config = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    encoder = SimpleNamespace(
        model=BertModel(config, add_pooling_layer=False).eval(),
        tokenizer=load("minilm-l6", device="cpu").tokenizer,
    )
    return SimpleNamespace(decoder=decoder, encoder=encoder, task=made_up())


@pytest.fixture
def subject(small):
    made = Subject(small.task)
    made.__dict__["loaded"] = small.encoder
    return made


@pytest.fixture
def decoder(small, monkeypatch):
    monkeypatch.setattr(methods, "load", lambda name, device: small.decoder)
    monkeypatch.setattr(methods, "task", lambda name: small.task)
    return methods.Decoder()


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_rows_of_users_are_those_of_the_package():
    base = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False))
    model, draw = base, torch.Generator().manual_seed(0)
    for number in range(3):
        name = f"user{number}"
        model = lora.attach(model, name, rank=2, alpha=6.0, seed=number)
        for parameter in delta_parameters(model, name).values():
            parameter.data.normal_(generator=draw)
    states = [delta_state_dict(model, f"user{number}") for number in range(3)]
    A, B = (torch.stack([state[f"0.{leaf}"] for state in states]) for leaf in "AB")
    x, user = torch.randn(5, 5, generator=draw), torch.tensor([2, 0, 1, 2, 0])
    served = serving.serve(model)
    with serving.users(served, [f"user{number}" for number in user.tolist()]):
        found = served(x)
    wanted = exercises.serve_rows(x, base[0].weight, A, B, torch.full((3,), 3.0), user)
    torch.testing.assert_close(found, wanted.detach())


def test_damped_rounds_end_where_the_parabola_does():
    u = [0.0, 0.0]
    for _ in range(60):
        u = exercises.control_round(0.0, u, 3.0, 1.0, 1.0)
    assert u == pytest.approx([1.0, 1.0])


# --- several deltas -------------------------------------------------------------------------------


def test_at_once_all_of_them_move_and_nothing_else(subject):
    frozen = {k: p.clone() for k, p in subject.base.named_parameters()}
    names = methods.PARTS
    model = methods.together(subject.base, names, subject.batch, subject.task.train, steps=3)
    assert set(attached(model)) == set(names)
    start = subject.base
    for name in names:
        start = methods.attach(start, name)
    for name in names:
        before, after = delta_state_dict(start, name), delta_state_dict(model, name)
        assert any(not torch.equal(before[k], after[k]) for k in before), name
    for key, parameter in subject.base.named_parameters():
        assert torch.equal(parameter, frozen[key]), key
    assert methods.said(()) == "classifier"


def test_adapters_and_biases_bear_with_each_other_in_both_orders(subject):
    alone = hosts(methods.attach(subject.base, "adapter"), "adapter")
    biased = methods.attach(subject.base, "BitFit")
    later = methods.attach(biased, "adapter")
    assert hosts(later, "adapter").keys() == alone.keys()
    earlier = methods.attach(methods.attach(subject.base, "adapter"), "BitFit")
    assert hosts(earlier, "BitFit").keys() == hosts(biased, "BitFit").keys()
    with pytest.raises(ValueError, match="has deltas of another sort"):
        adapters.attach(biased, "on the norm", placement="pfeiffer", size=2)


def test_decoders_carry_several_as_well(decoder, small):
    names = ("prompt", "adapter")
    model = methods.together(decoder.model, names, decoder.batch, small.task.train, steps=2)
    assert set(attached(model)) == set(names)
    assert not any(name.startswith("classifier") for name, _ in model.named_parameters())


def test_in_sequence_what_came_before_stays(subject):
    first = methods.next_in_line(
        subject.base, "adapter", subject.batch, subject.task.train, steps=2
    )
    second = methods.next_in_line(first, "prompt", subject.batch, subject.task.train, steps=2)
    before, after = delta_state_dict(first, "adapter"), delta_state_dict(second, "adapter")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert set(attached(second)) == {"adapter", "prompt"}
    on = methods.next_in_line(first, "adapter", subject.batch, subject.task.train, steps=2)
    assert attached(on) == ("adapter",)
    assert any(not torch.equal(before[k], v) for k, v in delta_state_dict(on, "adapter").items())


def test_each_delta_has_its_own_rate(subject):
    names = ("prompt", "adapter")
    model = subject.base
    for name in names:
        model = methods.attach(model, name)
    model = methods.set_trainable(model, *names, also="classifier.*")
    settings = methods.TrainingSettings(steps=1)
    (optimizer,) = methods.rates_of(model, names)(model, settings)
    rates = [methods.METHODS[n].rate for n in names] + [methods.CLASSIFIER_RATE]
    assert [g["lr"] for g in optimizer.param_groups] == rates
    held = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_only_three_can_be_combined(subject):
    with pytest.raises(ValueError, match="cannot be combined here"):
        methods.attach(subject.base, "LoRA")


def test_energy():
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(12, 10, generator=draw)
    thin = torch.randn(12, 2, generator=draw) @ torch.randn(2, 10, generator=draw)
    assert methods.energy(before, before + thin, rank=2) == pytest.approx(1.0)
    assert 0.3 < methods.energy(before, before + thin, rank=1) < 1
    assert methods.energy(before, before + torch.eye(12, 10), rank=5) == pytest.approx(0.5)


# --- decoders -------------------------------------------------------------------------------------


def test_a_template_is_words_behind_the_text(decoder, small):
    one = small.task.test[:2]
    assert decoder.prompts(one)[0].endswith("Topic:")
    assert methods.Decoder(bare=True).prompts(one) == [e.text for e in one]
    logs = decoder.label_log_probs(decoder.model, one)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(2))
    assert set(decoder.right(decoder.model, one)) <= {0.0, 1.0}


def test_steering_is_what_the_control_problem_says(decoder, small):
    batch = decoder.batch(small.task.train[:3])
    problem, start = steer_blocks(decoder.model, batch)
    controls = [u + 0.1 * (1 + i) for i, u in enumerate(start)]
    with torch.no_grad():
        wanted = float(problem.terminal(problem.states(controls)[-1]))
    with steering.steered(decoder.model, controls) as model:
        found = float(methods_loss(model, batch))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert float(methods_loss(decoder.model, batch)) != pytest.approx(wanted, abs=1e-3)


def methods_loss(model, batch):
    with torch.no_grad():
        return steering.causal_lm_loss(model, batch)


def test_both_ways_end_at_one_cost(decoder, small):
    found = steering.solve(decoder, small.task.train[:3], weight=1.0)
    ends = [one.costs[-1] for one in found.by.values()]
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)
    assert max(ends) < found.free


def test_a_search_never_ends_above_its_start(decoder, small):
    train = small.task.train[:4]
    model, found = steering.search(decoder, train, dimension=4, budget=12, population=4)
    assert found.calls == 12
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert float(methods_loss(model, decoder.batch(train))) == pytest.approx(found.loss, abs=1e-4)


# --- users ----------------------------------------------------------------------------------------


def test_all_ways_give_the_same_answers(small, monkeypatch):
    monkeypatch.setattr(users, "load", lambda name, device: small.decoder)
    found = {way: function() for way, function in users.ways("tiny", 3, tokens=4).items()}
    for way in ("loop", "merged"):
        torch.testing.assert_close(found["batch"], found[way], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found["batch"], found["frozen"], atol=1e-3)
    held = users.stored_bytes(small.decoder.model, 3)
    assert held["batch"] + 2 * held["merged"] // 3 == held["merged"] + 3 * held["delta"]


def test_everyone_reads_something():
    for voice in users.VOICES:
        assert len(users.documents(voice)) >= 3, voice


@pytest.fixture
def readers(small, monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    monkeypatch.delenv("EFFNB_BUILD", raising=False)
    for module in (panels, users):
        monkeypatch.setattr(module, "load", lambda name, device: small.decoder)
    monkeypatch.setattr(users, "documents", lambda voice: [f"{voice} said so. " * 60])
    monkeypatch.setattr(panels, "WORDS", 3)
    for function in (panels.voices, panels.prepared):
        function.cache_clear()
    yield panels
    for function in (panels.voices, panels.prepared):
        function.cache_clear()


def test_a_row_of_the_batch_is_what_its_user_reads_alone(readers):
    together = readers.answer("It is", 4)
    assert list(together) == list(users.VOICES)[:4]
    ready, (_, tokenizer) = readers.prepared(4), readers.voices()
    for name, model in zip(ready["names"], ready["loop"], strict=True):
        assert readers.write(model, tokenizer, 1, "It is") == [together[name]]


def test_the_panel_answers_everywhere(readers):
    shown = readers.compute(2, "It is")
    assert "Austen reads" in readers.text(shown)
    assert {readers.choice(x) for x in (1.0, 3.0, 9.0)} == set(readers.CHOICES)
    readers.serve().sweep()


# --- the sweep, and what is said with it ----------------------------------------------------------


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("analysis_sweep", SWEEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["analysis_sweep"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["analysis_sweep"]


@pytest.fixture
def stored(sweep, small, subject, decoder, monkeypatch):
    """All tables, as small as they can be."""
    kept = {}

    def store(name, data, **_):
        kept[name.rpartition("/")[2]] = data

    monkeypatch.setattr("effnb.lab.sweeps.results.store", store)
    for name, value in {
        "SEEDS": (0,), "DOCUMENTS": 24, "STEPS": 2, "TOGETHER": 1, "STAGE": 1, "POINTS": (1, 2),
        "USERS": (1, 2), "TURNS": 1, "JUDGED": 4, "LOGS": 4, "SHOTS": 4, "STEERED": 2,
    }.items():  # fmt: skip
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(sweep, "load", lambda name, device: small.decoder)
    monkeypatch.setattr(users, "load", lambda name, device: small.decoder)
    monkeypatch.setattr(methods, "encoder", lambda: subject)
    monkeypatch.setattr(sweep, "task", made_up)
    monkeypatch.setattr(sweep.before, "load", lambda name: small.decoder)
    monkeypatch.setattr(sweep, "held_out_novel", lambda: ["Once there was a house. " * 9] * 24)
    monkeypatch.setattr(steering, "ROUNDS", 2)
    quick = steering.search
    monkeypatch.setattr(
        steering, "search",
        lambda d, e, budget, seed: quick(d, e, dimension=2, budget=4, population=2, seed=seed),
    )  # fmt: skip
    for part in sweep.PARTS.values():
        part()
    return kept


def test_the_sweep_measures_what_is_registered_and_the_page_can_tell_it(stored):
    rows = []
    for part, data in stored.items():
        make = verdicts.MADE.get(f"{verdicts.CHAPTER}/{part}")
        rows += make(data["table"]) if make else []
    wanting = {}
    for claim in ledger().values():
        for part in claim.parts.values():
            sides = [a for a in (part.method, part.baseline) if a and a["table"] != "grid"] if (
                part.chapter == verdicts.CHAPTER) else []  # fmt: skip
            for about in sides:
                if about.get("users", 0) > 2 or about.get("shots", 0) > 0:
                    continue  # not in so small a sweep
                found = chosen(rows, {"model": part.model, **about})
                if not found or part.value not in found[0]:
                    wanting[claim.id, part.name] = about
    assert wanting == {}

    table = {part: data["table"] for part, data in stored.items()}
    said = [
        tables.serving_said(table["serve"]),
        tables.smollm2_said(table["smollm2"]),
        tables.times_table(table["times"]),
        tables.together_table(table["together"]),
        tables.adds_said(table["together"]),
        tables.gap_said(table["together"]),
        tables.sequence_table(table["sequence"]),
        tables.orders_said(table["sequence"]),
        tables.templates_table(table["templates"]),
        tables.scale_table(table["scale"]),
        tables.transfer_said(table["transfer"]),
        tables.tuned_table(table["tuned"]),
        tables.energy_said(table["tuned"]),
        tables.control_said(table["control"]),
        tables.black_box_table(table["black_box"]),
    ]
    for one in said:
        assert "not measured" not in str(one).lower(), one
    pictures = (
        drawings.serving(table["serve"]),
        drawings.together(table["together"]),
        drawings.scale(table["scale"]),
        drawings.control(table["control"]),
    )
    for one in pictures:
        assert len(one.alt) > 40
    part = [r for r in table["together"] if r["method"] in ("full", "prompt")]
    assert "not measured" in str(tables.together_table(part))
    assert not tables.adds_said(part)
    assert drawings.together(part).alt


def planted_transfer():
    level = {"same": 3.0, "other": 4.0}
    rows = [{"source": "untuned"} | {t: [5.0] for t in NAMES}]
    for s in NAMES:
        row = {"source": s, "seed": 0}
        for t in NAMES:
            kind = "same" if verdicts.KIND_OF[s] == verdicts.KIND_OF[t] else "other"
            row[t] = [1.0 if s == t else level[kind]]
        rows.append(row)
    return rows


def test_what_arrives():
    rows = planted_transfer()
    found = tables.arriving(rows)
    assert found["section", "language"] == pytest.approx(0.5)
    assert found["section", "match"] == pytest.approx(0.25)
    assert found["match", "match"] == 1
    assert "saves 50% on average" in tables.transfer_said(rows)
    assert "from section: 100 on section, 50 on language" in drawings.transfer(rows).alt
    less = [r for r in rows if r["source"] != "expand"]
    assert not drawings.transfer(less)


def test_what_is_not_measured_says_so():
    missing = results.NotMeasured(f"{verdicts.CHAPTER}/nothing").data
    for function in (
        tables.serving_said, tables.smollm2_said, tables.times_table, tables.together_table,
        tables.adds_said, tables.gap_said, tables.sequence_table, tables.orders_said,
        tables.templates_table, tables.scale_table, tables.transfer_said, tables.tuned_table,
        tables.energy_said, tables.control_said, tables.black_box_table, drawings.serving,
        drawings.together, drawings.scale, drawings.transfer, drawings.control,
    ):  # fmt: skip
        assert function(missing) is missing
