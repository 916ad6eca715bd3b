"""Prompts, verbalizers and calibration."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from effnb.finetuning.contextual_calibration import calibrate, content_free
from effnb.finetuning.prompting import (
    Pattern,
    Verbalizer,
    label_probabilities,
    orders,
    word_log_probs,
)
from effnb.lab import load


@pytest.fixture(scope="module")
def loaded():
    return load("mini-300k", device="cpu")


def test_prompts():
    pattern = Pattern("Text: {input}\nKind:", "What is it?\n\n")
    assert pattern.prompt("one") == "What is it?\n\nText: one\nKind:"
    assert pattern.prompt("two", [("one", "good")]) == (
        "What is it?\n\nText: one\nKind: good\n\nText: two\nKind:"
    )
    assert pattern.one("{braces} stay") == "Text: {braces} stay\nKind:"
    assert len(list(orders("abcd"))) == 24 and len(list(orders(range(9), 5))) == 5


@pytest.mark.parametrize("shared", [False, True])
def test_odds_of_words_against_one_pass_each(loaded, shared):
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = ["It is a truth universally acknowledged", "a library for", "the lord said unto the"]
    if shared:  # what all prompts begin with is read once
        shots = [("alpha", "people"), ("beta", "and")]
        prompts = [Pattern("Word: {input}\nKind:").prompt(text, shots) for text in prompts]
    words = ["people", "incomprehensibilities", "and", "graphical user interfaces"]
    lengths = [len(tokenizer.encode(f" {w}", add_special_tokens=False)) for w in words]
    assert min(lengths) == 1 < max(lengths)
    found = word_log_probs(model, tokenizer, prompts, words, batch_size=2)
    for i, prompt in enumerate(prompts):
        for k, word in enumerate(words):
            head = tokenizer.encode(prompt, add_special_tokens=False)
            tail = tokenizer.encode(f" {word}", add_special_tokens=False)
            ids = torch.tensor([head + tail])
            with torch.no_grad():
                logs = model(input_ids=ids).logits.float().log_softmax(-1)[0]
            at = range(len(head) - 1, ids.shape[1] - 1)
            want = sum(float(logs[t, ids[0, t + 1]]) for t in at)
            assert float(found[i, k]) == pytest.approx(want, abs=1e-3)


def test_labels_add_their_words(loaded):
    verbalizer = Verbalizer.of({"one": ["people", "and"], "two": "library"})
    prompts = ["a", "the lord said unto"]
    found = label_probabilities(loaded.model, loaded.tokenizer, prompts, verbalizer)
    assert len(verbalizer) == 2
    logs = word_log_probs(loaded.model, loaded.tokenizer, prompts, ["people", "and", "library"])
    p = logs.exp()
    want = torch.stack([p[:, 0] + p[:, 1], p[:, 2]], 1)
    torch.testing.assert_close(found, want / want.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_calibration_by_hand():
    """0.6 and 0.4 over 0.7 and 0.3: the decision flips."""
    found = calibrate(torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3]))
    assert found.tolist() == pytest.approx([0.391304, 0.608696], abs=1e-5)
    subtracted = calibrate(torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3]), form="subtract")
    want = torch.softmax(torch.tensor([-0.1, 0.1]), 0)
    torch.testing.assert_close(subtracted, want)


@given(st.integers(2, 6), st.integers(0, 99))
@examples(max_examples=25, deadline=None)
def test_what_has_no_content_becomes_uniform(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.rand(labels, generator=generator) + 0.01
    bias = bias / bias.sum()
    torch.testing.assert_close(calibrate(bias, bias), torch.full((labels,), 1 / labels))
    p = torch.rand(4, labels, generator=generator)
    found = calibrate(p, bias)
    assert found.shape == p.shape
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    logits = torch.softmax(p / bias - (p / bias).amax(1, keepdim=True), 1)
    assert torch.equal(found.argmax(1), logits.argmax(1))  # softmax(W p) chooses the same
    uniform = torch.full((labels,), 1 / labels)
    torch.testing.assert_close(calibrate(p, uniform), p / p.sum(1, keepdim=True))


def test_no_content(loaded):
    pattern = Pattern("{input}: it is")
    verbalizer = Verbalizer.of(["a", "the", "not"])
    shots = [("one", "a"), ("two", "a")]
    found = content_free(
        loaded.model, loaded.tokenizer, lambda text: pattern.prompt(text, shots), verbalizer
    )
    each = [
        label_probabilities(
            loaded.model, loaded.tokenizer, [pattern.prompt(text, shots)], verbalizer
        )
        for text in ("N/A", "", "[MASK]")
    ]
    torch.testing.assert_close(found, torch.cat(each).mean(0), atol=1e-5, rtol=1e-4)
    assert float(found[0]) == pytest.approx(1, abs=1) and float(found.sum()) == pytest.approx(1)


def test_bad_input(loaded):
    model, tokenizer = loaded.model, loaded.tokenizer
    for words, message in [
        (["one"], "at least two labels"),
        (["one", ()], "each with at least one word"),
        (["one", " "], "each with at least one word"),
        (["one", ["two", "one"]], "'one' stands for two labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            Verbalizer.of(words)
    for text, message in [("no place", "no {input}"), ("{input}: ", "ends with a space")]:
        with pytest.raises(ValueError, match=message):
            Pattern(text)
    with pytest.raises(ValueError, match="too many orders"):
        orders(range(9))
    for prompts, words, message in [
        ([], ["a"], "there are 0 prompts"),
        (["a"], [], "0 words"),
        ([""], ["a"], "a prompt has no tokens"),
        (["a " * 600], ["b"], "the model reads 512 at most"),
    ]:
        with pytest.raises(ValueError, match=message):
            word_log_probs(model, tokenizer, prompts, words)
    half = torch.tensor([0.5, 0.5])
    for p, bias, form, message in [
        (half, half, "multiply", "form is 'multiply'"),
        (half, torch.zeros(2), "subtract", "above 0"),
        (half, torch.tensor([1.0, 0.0]), "divide", "above 0"),
        (-half, half, "divide", "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate(p, bias, form=form)
    with pytest.raises(ValueError, match="no content-free input"):
        content_free(model, tokenizer, str, Verbalizer.of(["a", "b"]), inputs=())
