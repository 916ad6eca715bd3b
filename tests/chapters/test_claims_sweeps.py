"""The sweeps measure what the ledger registers: the same rows, with the same names.

They run on the smallest model, a few short documents and little training; only names and forms are
looked at.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effnb.chapters.inference.self_distilled_quantization import checks as script_checks
from effnb.inference import pruning
from effnb.lab import claims_bench, corpora, load
from effnb.lab.claims import chosen, ledger

SWEEPS = Path(__file__).resolve().parents[2] / "data" / "sweeps"
FOLDERS = [
    str(SWEEPS / name)
    for name in ("02_design", "03_pretraining", "04_finetuning", "05_inference", "06_hardware")
]
MODULES = {
    "pruning": "1_pruning_claims",
    "low_rank": "2_low_rank_claims",
    "quantization": "3_quantization_claims",
    "self_distilled": "4_self_distilled_quantization_claims",
    "distillation": "5_distillation_claims",
    "retrievers": "6_retrieval_distillation_claims",
    "adaptive": "7_adaptive_computation_claims",
    "matryoshka": "8_matryoshka_claims",
    "codesign": "2_codesign_claims",
    "retention": "5_retention_claims",
    "context": "6_context_claims",
    "attention": "1_attention_claims",
    "retrieval": "4_retrieval_claims",
    "experts": "2_experts_claims",
    "multitask": "3_multitask_claims",
    "objectives": "1_objectives_claims",
    "sharing": "3_sharing_claims",
}
NAMES = tuple(MODULES)


@pytest.fixture(scope="module")
def sweeps():
    """The scripts, for as long as their folder is on the path."""
    sys.path[:0] = FOLDERS
    before = set(sys.modules)
    try:
        found = {name: importlib.import_module(module) for name, module in MODULES.items()}
        yield SimpleNamespace(bench=claims_bench, **found)
    finally:
        del sys.path[: len(FOLDERS)]
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(SWEEPS) in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]


def ids(seed, *shape):
    """Random tokens: the sweeps' own text takes longer to read than all else."""
    return torch.randint(2, 4000, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(sweeps, monkeypatch):
    """A small model under every name, one seed, and little of everything."""

    class Bench(sweeps.bench.Bench):
        def __init__(self, name):
            self.name, self.loaded = name, load("mini-300k", device="cpu")
            self.model = self.loaded.model
            self.documents = [ids(number, 24) for number in range(3)]

        def calibration(self, seed):
            return ids(seed, 4, 64)

    domains = {name: [ids(n, 12) for n in range(2)] for name in ("novel", "Bible", "packages")}
    monkeypatch.setattr(sweeps.bench.results, "store", lambda *_, **__: None)
    for name in NAMES:
        module = getattr(sweeps, name)
        monkeypatch.setattr(module, "Bench", Bench, raising=False)
        monkeypatch.setattr(module, "SEEDS", (0,))
        monkeypatch.setattr(module, "domains_of", lambda loaded: domains, raising=False)
        monkeypatch.setattr(module, "TURNS", 2, raising=False)
    budget = dict.fromkeys(sweeps.quantization.TRAINING, (6, (2, 16)))
    monkeypatch.setattr(sweeps.quantization, "TRAINING", budget)
    monkeypatch.setattr(
        sweeps.quantization, "training_batches",
        lambda loaded, seed, steps, shape: [ids(seed + n, *shape) for n in range(steps)],
    )  # fmt: skip
    monkeypatch.setattr(sweeps.pruning, "german", lambda loaded: ids(9, 5000))
    some = [t.text for t in corpora.translations("de", "test")]
    reader = SimpleNamespace(documents=lambda *_: some, translations=corpora.translations)
    monkeypatch.setattr(sweeps.pruning, "corpora", reader)
    monkeypatch.setattr(sweeps.pruning, "TICKET_STEPS", 25)
    monkeypatch.setattr(sweeps.pruning, "LEARNING_STEPS", 12)
    return sweeps


def measured(sweeps, name, parts):
    """The rows that these parts of a sweep store."""
    rows = []
    for part in parts:
        table = sweeps.bench.Table("no_such_result", "python data/sweep.py")
        getattr(sweeps, name).PARTS[part](table)
        rows += [row for row in table.rows if row not in rows]  # as `rows_of` does
    return rows


def wanting(rows, chapter, claims=None):
    """Registered parts of a chapter that the rows do not serve, and why."""
    found = {}
    for claim in ledger().values():
        for part in claim.parts.values():
            if part.chapter != chapter or (claims and claim.id not in claims):
                continue
            for about in filter(None, (part.method, part.baseline)):
                fitting = chosen(rows, {"model": part.model, **about})
                seeds = [row.get("seed") for row in fitting]
                if not fitting or len(set(seeds)) < len(seeds):
                    found[claim.id, part.name] = f"{len(fitting)} rows of {about}"
                elif part.value not in fitting[0]:
                    found[claim.id, part.name] = f"no {part.value} in {sorted(fitting[0])}"
                elif missing := [k for k in part.equal if k not in fitting[0]]:
                    found[claim.id, part.name] = f"no {missing}"
            sides = [a for a in (part.method, part.baseline) if a is not None]
            drawn = [row for a in sides for row in chosen(rows, {"model": part.model, **a})]
            if part.seeds and not any("seed" in row for row in drawn):
                found[claim.id, part.name] = "no seeds"
    return found


def test_low_rank(small):
    rows = measured(small, "low_rank", ["mini", "smollm2"])
    assert wanting(rows, "05_inference/2_low_rank") == {}
    whole, less = (
        chosen(rows, {"model": "mini-5m", **a})[0]["layer_bytes"]
        for a in ({"method": "original"}, {"method": "SVD", "kept": 0.6})
    )
    assert less / whole == pytest.approx(0.6, abs=0.03)


def test_adaptive_computation(small, monkeypatch):
    adaptive = small.adaptive
    from transformers import BertConfig, BertModel

    class Sections(adaptive.Sections):
        def __init__(self):
            sizes = dict(vocab_size=9, hidden_size=12, intermediate_size=8)
            config = BertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)
            self.loaded = SimpleNamespace(model=BertModel(config))
            self.task = SimpleNamespace(labels="abcdef")

        def of(self, split):
            draw = torch.Generator().manual_seed(len(split))
            labels = torch.arange(60) % 6
            hot = torch.nn.functional.one_hot(labels, 12)
            return 0.3 * torch.randn(3, 60, 12, generator=draw) + hot, labels

    fit = adaptive.fit
    for name, value in {
        "Sections": Sections,
        "GRID": (0.9, 0.2),
        "READ_GRID": (0.9, 0.2),
        "PROMPTS": 4,
        "CALIBRATED": 2,
        "NEW_TOKENS": 3,
        "ROUNDS": 2,
        "load": lambda name, device: load("mini-300k", device=device),
        "prompts": lambda tokenizer: [(ids(n, 1, 5), [7, 8, 9]) for n in range(6)],
        "fit": lambda *given, **more: fit(*given, **more, steps=8),
        "results": SimpleNamespace(read=lambda name: None),
    }.items():
        monkeypatch.setattr(adaptive, name, value)
    rows = measured(small, "adaptive", list(adaptive.PARTS))
    lacking = wanting(rows, "05_inference/7_adaptive_computation")
    lacking.pop(("S-I4", "patience"), None)  # may find no patience that is quick enough
    assert lacking == {}
    whole = chosen(rows, {"model": "minilm-l6", "setting": "sections", "method": "all layers"})
    assert set(whole[0]["layers"]) == {1.0}
    texts = [row for row in rows if row.get("setting") == "texts"]
    assert [row["threshold"] for row in texts] == [0.9, 0.2]
    assert all(0 <= x <= 1 for row in texts for key in ("distance", "risk") for x in row[key])


def test_matryoshka(small, monkeypatch):
    script = small.matryoshka
    draws = torch.Generator().manual_seed(0)

    def unit(count):
        return torch.nn.functional.normalize(torch.randn(count, 384, generator=draws), dim=1)

    packages = [
        SimpleNamespace(split=split, section=f"section {n // 3 % 3}")
        for n, split in enumerate(["train", "validation", "test"] * 80)
    ]
    here = SimpleNamespace(
        documents=packages,
        pairs=[],
        asked={"test": (2, 5, 8, 11), "validation": (1, 4, 7)},
    )
    documents = unit(len(packages))
    vectors = SimpleNamespace(
        documents=documents,
        queries={
            s: documents[list(rows)] + 0.02 * unit(len(rows)) for s, rows in here.asked.items()
        },
        pair_queries=unit(9),
        pair_documents=torch.zeros(0, 384),
    )
    fake = SimpleNamespace(collection=lambda: here, vectors=lambda: vectors)
    monkeypatch.setattr(script, "collection", fake)
    monkeypatch.setattr(script, "EFS", (10, 40))
    monkeypatch.setattr(script, "LOOKS", ((16, 100), (32, 50)))
    monkeypatch.setattr(
        script.methods,
        "trained_map",
        lambda v, dims, seed: script.matryoshka.orthogonal(dims[-1], 384, seed),
    )
    train = script.methods.train_classifier
    monkeypatch.setattr(
        script.methods, "train_classifier", lambda *given, **more: train(*given, steps=3, **more)
    )
    rows = measured(small, "matryoshka", ["search", "classes"])
    assert wanting(rows, "05_inference/8_matryoshka") == {}
    whole, less = (
        chosen(rows, {"model": "minilm-l6", "method": name})[0]["multiplications"]
        for name in ("all numbers", "two looks")
    )
    assert (whole, less) == (240 * 384, 240 * 16 + 200 * 384)


def test_retention(small, monkeypatch):
    retention = small.retention
    for name, value in {
        "LENGTHS": (64, 512, 512, 2048, 8192), "ROUNDS": 1, "STEPS_TIMED": 1, "STEPS": 2,
        "SHAPE": (2, 16), "FORMS_TOKENS": 24,
    }.items():  # fmt: skip
        monkeypatch.setattr(retention, name, value)
    some = [ids(number, 130) for number in range(3)]  # more than two chunks
    monkeypatch.setattr(retention, "documents", lambda texts, count, length: some)
    monkeypatch.setattr(
        retention, "training_batches",
        lambda tokenizer, seed, steps, shape: [ids(seed + n, *shape) for n in range(steps)],
    )  # fmt: skip
    fresh = SimpleNamespace(model=retention.build("RetNet").double())
    monkeypatch.setattr(retention.twins, "load", lambda name, dtype: fresh)
    monkeypatch.setattr(retention, "training_step", lambda model, tokens: lambda: None)
    monkeypatch.setattr(retention, "peak_memory", lambda step: 1)
    rows = measured(small, "retention", list(retention.PARTS))
    assert set(wanting(rows, "02_design/5_retention")) == {("R-5", "large")}
    digits = {row["method"]: min(row["digits"]) for row in rows if "digits" in row}
    assert min(digits[name] for name in ("recurrent", "chunkwise", "gradients")) > 10
    assert digits["published"] < 3


def test_context(small, monkeypatch):
    script = small.context

    def at_once(model, sequences, settings, evaluate):
        for _ in range(settings.steps // settings.evaluate_every):
            evaluate(model)

    few = script.judged(load("mini-300k", device="cpu").model, ids(0, 2, 300), 280)
    assert len(few["documents"]) == 2
    monkeypatch.setattr(script, "load", lambda name, device: load("mini-300k", device=device))
    monkeypatch.setattr(script, "long_texts", lambda *_, **__: ids(0, 2, 300))
    monkeypatch.setattr(script, "judged", lambda *_: dict(few))
    monkeypatch.setattr(script, "fine_tune", at_once)
    rows = measured(small, "context", ["zero_shot", "tuned"])
    assert wanting(rows, "02_design/6_context") == {}
    tuned = [row["training_tokens"] for row in rows if row.get("steps") == 8]
    assert set(tuned) == {8 * script.TARGET}


def test_experts(small, monkeypatch):
    script = small.experts
    monkeypatch.setattr(script, "documents", lambda: list(ids(0, 2, 24)))
    monkeypatch.setattr(script, "batches", lambda seed: [ids(seed, 2, 16)])
    rows = measured(small, "experts", list(script.PARTS))
    assert wanting(rows, "02_design/2_experts") == {}


def test_attention(small, monkeypatch):
    script, real = small.attention, load("mini-300k", device="cpu")
    for name, value in {
        "ROUNDS": 1, "DOCUMENTS": 2, "LAYERS": (0,),
        "novels": lambda: torch.randint(1, 60, (9000,)),
        "chapters": lambda: torch.randint(1, 60, (2, script.recurrence.JUDGED[1] + 1)),
        "calls_of": lambda tokens: dict.fromkeys(
            ("full, fused", "full, masked", "full, entmax", "ETC", "Sparsefinder"), lambda: 0
        ),
        "peak_memory": lambda call: 1,
        "load": lambda name, device: real,
    }.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.recurrence.trained, "__defaults__", (1,))
    monkeypatch.setattr(script.needle.trained, "__defaults__", (4, 64))
    monkeypatch.setattr(script.needle.far_texts, "__defaults__", (64,))
    monkeypatch.setattr(script.needle, "STEPS", 4)
    monkeypatch.setattr(script.graphs, "learning_ids", lambda *_: ids(1, 2, 64))
    monkeypatch.setattr(script.graphs, "judged_ids", lambda *_: ids(2, 2, 64))
    rows = measured(small, "attention", script.PARTS)
    assert wanting(rows, "02_design/1_attention") == {}
    assert len({row["training_characters"] for row in rows if "training_characters" in row}) == 1


def test_retrieval(small, monkeypatch):
    script, real = small.retrieval, load("mini-300k", device="cpu")
    shelf = [ids(number, 70).tolist() for number in range(6)]
    some = [ids(10 + number, 70).tolist() for number in range(3)]
    for name, value in {"load": lambda name, device: real, "RETRO_STEPS": 2}.items():
        monkeypatch.setattr(script, name, value)
    for name, found in {"library": shelf, "german": shelf, "texts": some}.items():
        monkeypatch.setattr(script.texts, name, lambda *_, found=found: found)
    monkeypatch.setattr(script.fitting, "LENGTH", 64)
    monkeypatch.setattr(script.fitting.course, "__defaults__", (64,))
    monkeypatch.setattr(script.memory.look_up, "__kwdefaults__", {"k": 4, "at": "feedforward"})
    monkeypatch.setattr(script.memory, "LAMS", (0.2, 0.5))
    rows = measured(small, "retrieval", script.PARTS)
    assert wanting(rows, "02_design/4_retrieval") == {}
    alone, joined = (
        chosen(rows, {"table": "knn", "size": "mini-5m", "method": name})[0]
        for name in ("alone", "kNN-LM")
    )
    assert len(alone["documents"]) == len(joined["documents"]) == 3
    assert joined["entries"] == 6 * 69
    none, plain = (
        chosen(rows, {"table": "retro", "seed": 0, "read": "none"})[0],
        chosen(rows, {"table": "retro", "method": "alone"})[0],
    )
    assert none["documents"] == pytest.approx(plain["documents"], abs=1e-4)


def test_sharing(small, monkeypatch):
    script = small.sharing
    for name, value in {
        "ROUNDS": 1, "STEPS": 2, "SHAPE": (2, 16), "MASKED_STEPS": 2, "MASKED_SHAPE": (2, 256),
    }.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "documents", lambda count, length: [ids(n, 24) for n in range(3)])
    monkeypatch.setattr(
        script, "training_batches",
        lambda tokenizer, seed, steps, shape: [ids(seed + n, *shape) for n in range(steps)],
    )  # fmt: skip
    monkeypatch.setattr(script.methods, "_stream", lambda split: torch.randint(0, 97, (5000,)))
    rows = measured(small, "sharing", list(script.PARTS))
    assert wanting(rows, "02_design/3_sharing") == {}
    sizes = {row["method"]: row["parameters"] for row in rows if row["table"] == "shared"}
    assert sizes["all"] == sizes["one layer"] < sizes["none"]


def test_every_form_of_attention_is_timed_on_the_same_numbers(sweeps):
    script = sweeps.attention
    shapes = {name: call() for name, call in script.calls_of(1024).items()}
    outputs = {name: x[0] if isinstance(x, tuple) else x for name, x in shapes.items()}
    assert {x.numel() for x in outputs.values()} == {4 * 1024 * 32}
    torch.testing.assert_close(outputs["full, fused"], outputs["full, with a table"], atol=1e-5,
                               rtol=1e-4)  # fmt: skip
    assert script.pairs_of("ETC", 1024) < script.pairs_of("full, fused", 1024)
    assert script.pairs_of("LSH", 1024) is None


def test_objectives(small, monkeypatch):
    script = small.objectives
    for name, value in {"STEPS": 2, "SHAPE": (2, 24)}.items():
        monkeypatch.setattr(script.runs, name, value)
    monkeypatch.setattr(script.runs.trained, "__kwdefaults__", {
        **script.runs.trained.__kwdefaults__, "steps": 2
    })  # fmt: skip
    monkeypatch.setattr(script.runs, "text_windows", lambda seed, *shape: ids(seed, *shape))
    monkeypatch.setattr(script, "documents_of", lambda *_: [ids(number, 24) for number in range(3)])
    monkeypatch.setattr(
        script.probing, "probed", lambda read, tokenizer: [len(read([ids(0, 9)])) == 1] * 96
    )
    rows = measured(small, "objectives", script.PARTS)
    assert wanting(rows, "03_pretraining/1_objectives") == {}
    assert {row["method"] for row in rows} == {*script.runs.ALL, "untrained"}
    trained = [row for row in rows if row["method"] != "untrained"]
    assert {row["training_tokens"] for row in trained} == {2 * 2 * 24}
    assert {len(row["probe_groups"]) for row in rows} == {script.probing.GROUPS}


def test_codesign(small):
    rows = measured(small, "codesign", ["mini", "smollm2"])
    assert wanting(rows, "06_hardware/2_codesign", {"S-H3"}) == {}


def test_pruning(small, monkeypatch):
    def at_once(model, batches, settings, *_, **__):
        return SimpleNamespace(model=pruning.magnitude(model, 0.9))

    for name in ("movement", "soft_movement"):  # a few steps do not remove 90 %
        monkeypatch.setattr(small.pruning.pruning, name, at_once)
    rows = measured(small, "pruning", small.pruning.PARTS)
    assert wanting(rows, "05_inference/1_pruning") == {}


def test_quantization(small):
    rows = measured(small, "quantization", small.quantization.PARTS)
    assert wanting(rows, "05_inference/3_quantization") == {}
    same = [row for row in rows if row.get("budget") == "2 bits, groups of 32"]
    (uniform,) = [row["layer_bytes"] for row in same if row["method"] == "uniform GPTQ"]
    sizes = [row["layer_bytes"] for row in same if row["method"] == "mixed GPTQ"]
    assert len(sizes) == 2
    assert all(0.9 * uniform < size <= uniform for size in sizes)


def test_a_document_counts_the_same_alone_and_among_longer_ones(sweeps):
    loaded = load("mini-300k", device="cpu")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 4000, (n,), generator=generator) for n in (30, 9, 17)]
    together = sweeps.bench.by_document(loaded.model, documents)
    alone = [sweeps.bench.by_document(loaded.model, [d])[0] for d in documents]
    assert together == pytest.approx(alone, abs=2e-4)


def test_documents_are_spread_over_all_of_a_corpus(sweeps):
    loaded = load("mini-300k", device="cpu")
    texts = [f"number {i} of many texts, none of them like the others: {i * i}" for i in range(100)]
    found = sweeps.bench.documents_of(loaded, ["short", *texts], 4, 1000)
    assert [loaded.tokenizer.decode(d) for d in found] == [texts[i] for i in (0, 25, 50, 75)]


def test_each_kind_of_text_is_whole(sweeps):
    found = sweeps.bench.domains_of(load("mini-300k", device="cpu"))
    assert {name: len(of) for name, of in found.items()} == {
        "novel": 24, "Bible": 46, "packages": 96,
    }  # fmt: skip


def test_multitask(small, monkeypatch):
    script = small.multitask
    real = load("mini-300k", device="cpu")
    for name, value in {"JUDGED": 4, "TEXTS": 4, "EXAMPLES": 8, "STEPS": 1}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(
        script, "load",
        lambda name, device: SimpleNamespace(
            name=name, model=real.model, tokenizer=real.tokenizer
        ),
    )  # fmt: skip
    rows = measured(small, "multitask", list(script.PARTS))
    assert wanting(rows, "04_finetuning/3_multitask") == {}
    (together,) = chosen(rows, {"table": "tasks", "method": "mixture"})
    (each,) = chosen(rows, {"table": "tasks", "method": "one for each"})
    assert together["steps"] == each["steps"] == len(script.LABELLED)
    asked = [e.document for own in script.questioned().values() for e in own]
    assert len(set(asked)) == len(asked) == 2 * 4
    found = script.apart(script.LABELLED)
    documents = [e.document for own in found.values() for e in own]
    assert len(set(documents)) == len(documents) == len(together["documents"])


def test_distillation(small, monkeypatch):
    script = small.distillation
    real = load("mini-300k", device="cpu")
    few = {"documents": [0.0, 1.0], "steps": 1, "budget": 1}
    methods = {
        "few labels": ("teacher", "distilled", "labels alone", "labels for longer"),
        "even noise": ("plain", "forward correction", "labels for longer"),
        "uneven noise, small": ("plain", "weighted", "labels for longer"),
        "uneven noise, large": ("plain", "weighted", "labels for longer"),
        "asking": ("robust", "random", "hardest first"),
        "limited": ("by gradient", "at random", "distilled", "labels for longer"),
        "long tail": ("by gradient", "at random", "distilled", "labels for longer"),
        "states": ("early states first", "last state"),
    }  # the companion's tests run these experiments and look at their methods
    assert set(methods) == set(script.EXPERIMENTS)
    for setting, names in methods.items():
        monkeypatch.setitem(
            script.EXPERIMENTS, setting, lambda seed, names=names: dict.fromkeys(names, few)
        )
    one = [{"complexity": 1.0, "share_of_shuffled": 0.5}]
    monkeypatch.setattr(script.experiments, "complexity", lambda *_: one)
    monkeypatch.setattr(script.experiments, "states", lambda seed: {})
    monkeypatch.setattr(script.experiments, "confidences", lambda seed: SimpleNamespace(slope=1.1))
    monkeypatch.setattr(script.own, "teacher", lambda seed: None)
    monkeypatch.setattr(script, "load", lambda name, device: real)
    monkeypatch.setattr(
        script, "training_batches",
        lambda loaded, seed, steps, shape: [ids(seed + n, 2, 16) for n in range(steps)],
    )  # fmt: skip
    monkeypatch.setattr(script.students, "POOL", 2)
    for name, value in {
        "STEPS": 2, "CONTEXT_STEPS": 2, "SUM_TOKENS": 500, "SUMS": 40, "JUDGED": 3
    }.items():  # fmt: skip
        monkeypatch.setattr(script, name, value)
    rows = measured(small, "distillation", list(script.PARTS))
    assert wanting(rows, "05_inference/5_distillation") == {}
    (longer,) = chosen(rows, {"setting": "text", "method": "labels for longer"})
    assert longer["steps"] > 2


def test_retrievers(small, monkeypatch):
    script = small.retrievers
    few = {"documents": [0, 1], "train_documents": [1, 1], "drop_documents": [1, 0], "mrr": 0.5}
    searched, ranked = [], []

    def learn(course, **given):
        searched.append(given)

    def dual(task, seed, method="labels", answers=None, **given):
        ranked.append((method, answers, given))

    for name, value in {
        "course": lambda: SimpleNamespace(),
        "teacher_ranks": lambda course: [1, 2],
        "layers_of_teacher": lambda course, depth: 16,
        "learn": learn,
        "ranks_of": lambda *_: [1, 20],
    }.items():
        monkeypatch.setattr(script.students, name, value)
    for name, value in {
        "task": lambda: SimpleNamespace(),
        "steps_of": lambda task: 40,
        "steps_for_answers": lambda task: 15,
        "cross_encoder": lambda task, seed, dual_pooled=True: ranked.append(("cross", None, {})),
        "answers_of": lambda *_: "answers",
        "dual_encoder": dual,
        "ranked": lambda *_: dict(few),
    }.items():
        monkeypatch.setattr(script.rankers, name, value)
    rows = measured(small, "retrievers", list(script.PARTS))
    assert wanting(rows, "05_inference/6_retrieval_distillation") == {}
    for setting, steps in (("search", small.retrievers.students.STEPS + 16), ("ranking", 55)):
        (longer,) = chosen(rows, {"setting": setting, "method": "labels for longer"})
        assert longer["steps"] == steps
    # Each run is of the method that its row names, and only students of a teacher get its answers.
    assert {one["loss"] for one in searched} == {"labels", "scores", "embeddings", "both"}
    assert all(given["depth"] == script.DEPTH for given in searched)
    assert all(
        (answers is None) == (method in ("labels", "cross")) for method, answers, _ in ranked
    )


def test_self_distilled(small, monkeypatch):
    """Which rows are stored, from a small classifier of random weights that nothing trains."""
    script = small.self_distilled
    model, batch = script_checks.tiny()
    asked = []

    def trained(teacher, tokenizer, method, bits, seed, **changed):
        asked.append((method, bits, changed))
        return model

    right = {language: {"a": 1.0, "b": 0.0} for language in script.languages.LANGUAGES}
    encoder = SimpleNamespace(model=model, tokenizer=None)
    monkeypatch.setattr(script, "encoder", lambda: encoder)
    monkeypatch.setattr(script, "load", lambda name, device: encoder)
    monkeypatch.setattr(script, "teacher", lambda seed, layers=None: model)
    monkeypatch.setattr(script, "encoder_batch", lambda *_: batch)
    monkeypatch.setattr(script.methods, "trained", trained)
    monkeypatch.setattr(script.languages, "held_out", lambda language: tuple(range(24)))
    monkeypatch.setattr(script.languages, "text_batches", lambda *_: [batch])
    monkeypatch.setattr(script.languages, "batches", lambda *_: lambda step: batch)
    monkeypatch.setattr(script.languages, "judge", lambda *_: right)
    rows = measured(small, "self_distilled", list(script.PARTS))
    assert wanting(rows, "05_inference/4_self_distilled_quantization") == {}
    (longer,) = chosen(rows, {"setting": "students", "method": "QAT for longer"})
    assert longer["steps"] == script.LONGER > script.STEPS
    (noisy,) = [changed for method, _, changed in asked if changed.get("noise")]
    assert noisy["noise"] == script.methods.NOISE
    assert {bits for _, bits, _ in asked} == set(script.BITS)
    flops = {row["method"]: row["flops"] for row in rows if row.get("setting") == "cost"}
    assert flops["SDQ"] > flops["QAT"]
