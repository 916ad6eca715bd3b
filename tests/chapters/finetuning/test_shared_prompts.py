"""Prompts of many small tasks: the tasks are what they say, and the subspace is what is tuned."""

import pytest
import torch

from effnb.chapters.finetuning.delta_tuning import shared_prompts, tables, verdicts
from effnb.finetuning.intrinsic_prompt import FEWEST_PROMPTS, random_subspace
from effnb.lab.tasks import task


@pytest.fixture(scope="module")
def reader():
    return shared_prompts.Reader("mini-300k")


def test_each_task_has_two_labels_and_its_parents_texts():
    known, unseen = shared_prompts.split()
    assert len(known) >= FEWEST_PROMPTS
    assert len(unseen) == shared_prompts.UNSEEN
    assert not {one.name for one in known} & {one.name for one in unseen}
    for one in (*known, *unseen):
        parent = task(next(p for p in shared_prompts.PARENTS if one.labels[0] in task(p).labels))
        names = {example.text: parent.labels[example.label] for example in parent.test}
        assert {example.label for example in one.test} == {0, 1}
        assert all(names[e.text] == one.labels[e.label] for e in one.test)


def test_answers_are_those_of_the_whole_model(reader):
    """The logits behind a text of its own length, without padding or prompt."""
    one = shared_prompts.contrasts()[0]
    found = reader.logits(one, None, one.test[:3])
    tokenizer = reader.loaded.tokenizer
    for row, example in zip(found, one.test[:3], strict=True):
        ids = tokenizer.encode(one.prompt(example), add_special_tokens=False)
        ids = ids[-shared_prompts.TOKENS :]
        words = [tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in one.labels]
        whole = reader.loaded.model(torch.tensor([ids])).logits[0, -1, words]
        torch.testing.assert_close(row, whole, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_embeddings_in_front(reader):
    """A prompt that holds a text's own embeddings reads as that text."""
    one = shared_prompts.contrasts()[0]
    ids = torch.tensor([reader.loaded.tokenizer.encode("a game", add_special_tokens=False)])
    prompt = reader.loaded.model.get_input_embeddings()(ids)[0].detach()
    example = one.test[0]
    rest = reader.loaded.tokenizer.encode(one.prompt(example), add_special_tokens=False)
    rest = rest[-shared_prompts.TOKENS :]
    words = [
        reader.loaded.tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in one.labels
    ]
    together = torch.cat([ids, torch.tensor([rest])], 1)
    whole = reader.loaded.model(together).logits[0, -1, words]
    torch.testing.assert_close(
        reader.logits(one, prompt, [example])[0], whole, atol=1e-4, rtol=1e-4
    )


def test_tuning_inside_a_subspace_stays_there(reader, monkeypatch):
    monkeypatch.setattr(shared_prompts, "STEPS", 3)
    start = reader.start()
    prompts = start + torch.randn(20, *start.shape, generator=torch.Generator().manual_seed(0))
    subspace = random_subspace(prompts, 4)
    one = shared_prompts.contrasts()[0]
    inside = reader.inside(subspace, one, seed=0)
    torch.testing.assert_close(subspace(inside), inside, atol=1e-4, rtol=1e-4)
    assert not torch.equal(inside, subspace.mean)
    whole = reader.prompt(one, seed=0)
    assert whole.shape == start.shape
    assert not torch.equal(whole, start)


def test_rows_of_the_verdict_by_hand():
    rows = [
        {"model": "m", "method": "prompt", "seed": 0, "accuracies": [0.9, 0.5]},
        {"model": "m", "method": "random subspace", "seed": 0, "accuracies": [0.6, 0.5]},
        {"model": "m", "method": "intrinsic prompt", "seed": 0, "accuracies": [0.85, 0.6]},
    ]
    shown = str(tables.shared_table(rows))
    assert "72.5%" in shown
    assert "70.0%" in shown
    (found,) = verdicts.shared(rows)
    assert found["gain_documents"] == pytest.approx([0.35 - 0.8 * 0.4, 0.1])
    assert found["over_random_documents"] == pytest.approx([0.25, 0.1])
