"""Tasks: no leaks between splits, labels of the corpora, inputs that score what they say."""

import importlib
import itertools
from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from effnb.core.training import causal_lm_loss
from effnb.lab import corpora
from effnb.lab.models import load

tasks = importlib.import_module("effnb.lab.tasks")
inputs = importlib.import_module("effnb.lab.task_inputs")
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def every():
    return {name: tasks.task(name) for name in tasks.NAMES}


@pytest.fixture(scope="module")
def tokenizer():
    return load("mini-300k", device="cpu").tokenizer


@pytest.fixture(scope="module")
def decoder(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertModel(config, add_pooling_layer=False).eval()


# ----------------------------------------------------------------------------------- the tasks


def test_kinds_and_label_sources(every):
    assert len(every) >= 6
    assert {t.kind for t in every.values()} == {"classification", "pair", "generation"}
    assert len({t.label_source for t in every.values()}) >= 4


def test_sizes_and_balance(every):
    for task in every.values():
        assert len(task.train) == tasks.SIZES["train"], task.name
        assert len(task.validation) >= 200 and len(task.test) >= 200, task.name
        if task.labels:
            share = Counter(e.label for e in task.test)
            assert set(share) == set(range(len(task.labels))), task.name
            assert max(share.values()) < 3 * min(share.values()), (task.name, share)


def test_no_document_is_in_two_splits(every):
    for task in every.values():
        documents = [{e.document for e in getattr(task, split)} for split in SPLITS]
        for one, other in itertools.combinations(documents, 2):
            assert not one & other, task.name


def test_documents_are_in_the_split_of_the_corpus(every):
    split_of = {p.source: p.split for p in corpora.packages()}
    for name in ("section", "language", "match", "origin", "summary", "expand"):
        for split in SPLITS:
            assert {split_of[e.document] for e in getattr(every[name], split)} == {split}, name


@pytest.mark.parametrize("name", ["section", "origin"])
def test_no_two_examples_are_alike(every, name):
    """By brute force: every held-out example against every other of the task."""
    sets = [
        (split, tasks.shingles(f"{e.text} {e.pair}"))
        for split in SPLITS
        for e in getattr(every[name], split)
    ]
    held_out = [(i, group) for i, (split, group) in enumerate(sets) if split == "test"][:60]
    for i, group in held_out:
        for j, (_, other) in enumerate(sets):
            assert i == j or tasks.alike(group, other) < tasks.ALIKE


def test_distinct_is_what_comparing_all_gives():
    texts = [e.text for e in tasks.task("language").train[:150]]
    texts += [f"{t} once more" for t in texts[:40]] + ["", "", "one", "one", "two"]
    kept = []
    for i, text in enumerate(texts):
        group = tasks.shingles(text)
        if all(tasks.alike(group, tasks.shingles(texts[j])) < tasks.ALIKE for j in kept):
            kept.append(i)
    assert tasks.distinct(texts) == kept
    assert len(kept) < len(texts)


def test_versions_do_not_make_texts_different():
    assert tasks.distinct(["GNU C compiler 11 for armhf", "GNU C compiler 12 for armhf"]) == [0]


def test_labels_are_those_of_the_corpora(every):
    packages = corpora.packages("test")
    sections: dict[str, set[str]] = {}
    synopses: dict[str, set[str]] = {}
    for p in packages:
        sections.setdefault(p.source, set()).add(p.section)
        synopses.setdefault(p.source, set()).add(p.synopsis)
    for e in every["section"].test:
        assert sections[e.document] & set(tasks.TOPICS[e.target])
    for e in every["match"].test:
        assert e.label == 0 or e.text in map(tasks.clipped, synopses[e.document])
        assert e.target == ("no", "yes")[e.label]
    for e in every["origin"].test:
        assert (e.pair in map(tasks.clipped, synopses[e.document])) == bool(e.label)
    for e in every["summary"].test:
        assert e.target in synopses[e.document] and e.label == -1


def test_texts_are_short_and_whole_words(every):
    for task in every.values():
        for e in task.test:
            assert e.text and e.target and "\n" not in e.text + e.pair
            assert len(e.text) <= tasks.CHARACTERS and len(e.pair) <= tasks.CHARACTERS
    assert tasks.clipped("one two  three", 9) == "one two"
    assert tasks.clipped("one") == "one"


def test_tasks_are_the_same_every_time():
    """The first examples of one task, whatever was drawn before it."""
    first = tasks.task("match").train[:5]
    tasks._built.cache_clear()
    tasks.task("origin")
    assert tasks.task("match").train[:5] == first


def test_few_shot(every):
    section = every["section"]
    train, validation = section.few_shot(16, seed=3)
    assert Counter(e.label for e in train) == dict.fromkeys(range(6), 16)
    assert Counter(e.label for e in validation) == dict.fromkeys(range(6), 16)
    assert not set(train) & set(validation)
    assert set(train + validation) <= set(section.train)
    assert section.few_shot(16, seed=3)[0] == train != section.few_shot(16, seed=4)[0]
    assert len(every["summary"].few_shot(16)[0]) == 16


@pytest.mark.parametrize("shots", [0, 10_000])
def test_few_shot_refuses_what_there_is_not(shots):
    with pytest.raises(ValueError, match="it must lie between 1 and"):
        tasks.task("section").few_shot(shots)


def test_unknown_task():
    with pytest.raises(ValueError, match="there is no task 'x'; choose one of section"):
        tasks.task("x")


def test_templates_hold_what_the_task_has(every):
    for task in every.values():
        assert len(set(task.templates)) >= 3
        for i, template in enumerate(task.templates):
            assert "{text}" in template and ("{pair}" in template) == (task.kind == "pair")
            assert task.test[0].text in task.prompt(task.test[0], i)


# ---------------------------------------------------------------------------------- the inputs


def test_batches_cover_every_example_once_a_round():
    examples = tasks.task("section").train[:10]
    batch = inputs.batches_of(examples, 4, seed=1)
    two_rounds = [e for step in range(5) for e in batch(step)]
    assert Counter(two_rounds) == dict.fromkeys(examples, 2)
    assert batch(3) == inputs.batches_of(examples, 4, seed=1)(3)
    assert batch(0) != inputs.batches_of(examples, 4, seed=2)(0)
    with pytest.raises(ValueError, match="there are 0 examples"):
        inputs.batches_of((), 4)


def test_a_new_classifier_says_nothing_and_learns(encoder):
    tokenizer = load("minilm-l6", device="cpu").tokenizer
    examples = tasks.task("match").train[:8]
    model = inputs.Classifier(encoder, 2)
    batch = inputs.encoder_batch(tokenizer, examples, 48)
    assert batch["input_ids"].shape[1] <= 48 and batch["token_type_ids"].max() == 1
    loss = inputs.classification_loss(model, batch)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0


def test_classify_does_not_depend_on_padding(encoder):
    tokenizer = load("minilm-l6", device="cpu").tokenizer
    examples = tasks.task("section").test[:9]
    model = inputs.Classifier(encoder, 6)
    torch.nn.init.normal_(model.classifier.weight)
    together = inputs.classify(model, tokenizer, examples, batch_size=9)
    alone = inputs.classify(model, tokenizer, examples, batch_size=1)
    assert together[0] == alone[0]
    assert together[1] == pytest.approx(alone[1], abs=1e-4)


def test_only_targets_are_labelled(tokenizer):
    batch = inputs.decoder_batch(tokenizer, ["A long question:", "Q:"], [" yes", " perhaps not"])
    for row in range(2):
        labelled = batch["labels"][row] != -100
        text = tokenizer.decode(batch["input_ids"][row][labelled][:-1])
        assert text == (" yes", " perhaps not")[row]
        assert batch["input_ids"][row][labelled][-1] == tokenizer.eos_token_id
        assert not (labelled & (batch["attention_mask"][row] == 0)).any()


def test_a_prompt_that_is_too_long_keeps_its_end(tokenizer):
    batch = inputs.decoder_batch(tokenizer, ["word " * 90 + "Topic:"], [" games"], tokens=20)
    assert batch["input_ids"].shape == (1, 20)
    assert "Topic: games" in tokenizer.decode(batch["input_ids"][0])


def test_likelihoods_are_the_loss_of_the_batch(decoder, tokenizer):
    section = tasks.task("section")
    texts = inputs.as_texts(section, section.test[:5], template=1)
    logs, counts = inputs.target_likelihoods(decoder, tokenizer, *texts, batch_size=2)
    loss = causal_lm_loss(decoder, inputs.decoder_batch(tokenizer, *texts))
    assert -sum(logs) / sum(counts) == pytest.approx(loss.item(), rel=1e-5)


def test_choose_takes_the_likeliest_word(decoder, tokenizer):
    section = tasks.task("section")
    few = section.test[:3]
    chosen = inputs.choose(decoder, tokenizer, section, few, batch_size=4)
    for example, label in zip(few, chosen, strict=True):
        prompts = [section.prompt(example)] * 6
        words = [f" {word}" for word in section.labels]
        logs, _ = inputs.target_likelihoods(decoder, tokenizer, prompts, words)
        assert label == max(range(6), key=logs.__getitem__)
    with pytest.raises(ValueError, match="summary has no labels"):
        inputs.choose(decoder, tokenizer, tasks.task("summary"), few)


def test_written_text_does_not_depend_on_padding(decoder, tokenizer):
    prompts = ["One:", "A much longer question than the first:"]
    together = inputs.write(decoder, tokenizer, prompts, most=6)
    assert together == [inputs.write(decoder, tokenizer, [p], most=6)[0] for p in prompts]


def test_overlap():
    assert inputs.overlap("a tool for X", "a tool for x") == 1
    assert inputs.overlap("a b", "b c d") == pytest.approx(2 / 5)
    assert inputs.overlap("a a", "a") == pytest.approx(2 / 3)
    assert inputs.overlap("", "a") == 0
