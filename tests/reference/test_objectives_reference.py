"""Objectives against transformers' collator and models, and the probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from effnb.evaluation import linear_probe
from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED

NAMES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 60
MASK = 3


@pytest.fixture(scope="module")
def tokenizer():
    table = {name: i for i, name in enumerate(NAMES + [f"w{i}" for i in range(VOCABULARY - 4)])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(table, unk_token="[PAD]")),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def texts(count=200, time=64, seed=0):
    """Random words between [CLS] and [SEP]; the second half of the texts is padded."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (count, time), generator=draws)
    mask = torch.ones_like(ids)
    mask[count // 2 :, time - 10 :] = 0
    ids[:, 0] = 1
    ids[torch.arange(count), mask.sum(1) - 1] = 2
    return ids * mask, mask


def facts(ids, inputs, labels):
    """What a masking shows: where it asks, and what stands there."""
    chosen = labels != IGNORED
    shown, true = inputs[chosen], ids[chosen]
    changed = (shown != true) & (shown != MASK)
    return {
        "chosen": float(chosen.float().sum() / (ids > 3).sum()),
        "masked": float((shown == MASK).float().mean()),
        "random": float(changed.float().mean()),
        "special random": float((shown[changed] < 4).float().mean()),
        "by place": chosen.float().mean(0),
    }


@pytest.mark.parametrize(
    "rates", [(0.15, 0.8, 0.1), (0.4, 0.5, 0.4), (0.6, 0.0, 1.0), (0.3, 1.0, 0.0)]
)
def test_masking_is_that_of_the_collator(tokenizer, rates):
    rate, masked, random = rates
    ids, mask = texts(2000)
    collator = DataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=rate,
        mask_replace_prob=masked,
        random_replace_prob=random,
        seed=5,
    )
    theirs = collator(list(ids))
    ours = objectives.masked_lm(
        ids, rate, mask_token=MASK, vocabulary=len(tokenizer), special=(0, 1, 2, 3), mask=mask,
        masked=masked, random=random, generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    for inputs, labels in ((theirs["input_ids"], theirs["labels"]), (ours.inputs, ours.labels)):
        chosen = labels != IGNORED
        assert torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(inputs[~chosen], ids[~chosen])
        assert not chosen[ids < 4].any()
    one = facts(ids, theirs["input_ids"], theirs["labels"])
    other = facts(ids, ours.inputs, ours.labels)
    for name in ("chosen", "masked", "random"):
        assert one[name] == pytest.approx(other[name], abs=0.012), name
    if random >= 0.4:  # both draw random words from the whole vocabulary, special ones included
        # (of the words that show a change, which neither the mask token nor the true word does)
        assert one["special random"] == pytest.approx(3 / (VOCABULARY - 2), abs=0.01)
        assert other["special random"] == pytest.approx(3 / (VOCABULARY - 2), abs=0.01)
    torch.testing.assert_close(one["by place"], other["by place"], atol=0.07, rtol=0)


def test_causal_labels_are_the_collators_shifted_by_one(tokenizer):
    ids, mask = texts(4, 20)
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)(list(ids))
    ours = objectives.causal_lm(ids, mask=mask)
    assert torch.equal(ours.labels[:, :-1], theirs["labels"][:, 1:])


def test_a_masked_loss_is_berts(tokenizer):
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    ids, mask = texts(6, 24)
    example = objectives.masked_lm(
        ids, 0.3, mask_token=MASK, vocabulary=VOCABULARY, special=(0, 1, 2), mask=mask,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        wanted = model(input_ids=example.inputs, attention_mask=mask, labels=example.labels).loss
        found = objectives.example_loss(model, example)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_t5_takes_the_inputs_and_targets():
    """Its own loss is over all targets; sentinels are the last ids of its vocabulary."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=150, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    made = objectives.span_corruption(
        ids, first_sentinel=149, end=config.eos_token_id, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        out = model(input_ids=made.inputs, labels=made.targets)
    wanted = torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), made.targets)
    torch.testing.assert_close(out.loss, wanted)
    assert out.logits.shape[1] == made.targets.shape[1]


def test_the_discriminators_loss_is_transformers():
    torch.manual_seed(0)
    model = ElectraForPreTraining(
        ElectraConfig(
            vocab_size=VOCABULARY, embedding_size=16, hidden_size=16, intermediate_size=20,
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    ids, mask = texts(6, 24)
    example = objectives.electra_masking(
        ids, mask_token=MASK, special=(0, 1, 2), mask=mask,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    logits = torch.randn(example.targets, VOCABULARY, generator=torch.Generator().manual_seed(1))
    replaced = objectives.replace_tokens(
        ids, example, logits, mask=mask, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        out = model(input_ids=replaced.inputs, attention_mask=mask, labels=replaced.labels.long())
    found = objectives.discriminator_loss(out.logits, replaced)
    torch.testing.assert_close(found, out.loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
def test_the_probe_is_scikit_learns(c):
    draws = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = draws.normal(size=(90, 6)) + draws.normal(size=(3, 6))[labels]
    probe = linear_probe(torch.tensor(features), torch.tensor(labels), c=c)
    scaled = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(scaled, labels)
    weight = probe.weight - probe.weight.mean(0)  # a constant in all classes changes nothing
    other = theirs.coef_ - theirs.coef_.mean(0)
    np.testing.assert_allclose(weight.numpy(), other, atol=2e-4)
    found = probe.scores(torch.tensor(features)).argmax(1)
    assert np.array_equal(found.numpy(), theirs.predict(scaled))


def electra_by_the_letter(ids, rate, draws):
    """The steps of google-research/electra's `pretrain_helpers.mask`, for one text without padding.

    Positions from a categorical draw, as many as round(rate · tokens); each shows the mask token
    with probability 0.85, and an update of one position happens once.
    """
    candidates = np.flatnonzero(~np.isin(ids, (0, 1, 2, MASK)))
    count = max(1, round(len(ids) * rate))
    positions = draws.choice(candidates, size=count, replace=True)
    masked = positions[draws.random(count) < 0.85]
    inputs = ids.copy()
    inputs[masked] = MASK
    return inputs, positions


@pytest.mark.parametrize("rate", [0.15, 0.25])
def test_masking_is_that_of_electras_code(rate):
    draws = np.random.default_rng(0)
    ids = torch.randint(4, VOCABULARY, (1500, 128), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 1, 2
    theirs = [electra_by_the_letter(row, rate, draws) for row in ids.numpy()]
    ours = objectives.electra_masking(
        ids, rate, mask_token=MASK, special=(0, 1, 2, 3), generator=torch.Generator().manual_seed(1)
    )
    count = len(theirs[0][1])
    assert (ours.weights.sum(1) == count).all()
    distinct = np.array([len(set(positions)) for _, positions in theirs])
    found = (ours.labels != IGNORED).sum(1).numpy()
    error = distinct.std() * (2 / 1500) ** 0.5
    assert found.mean() == pytest.approx(distinct.mean(), abs=4 * error)
    assert found.std() == pytest.approx(distinct.std(), rel=0.1)
    masked = np.array([(inputs == MASK).sum() for inputs, _ in theirs])
    shown = (ours.inputs == MASK).sum(1).numpy()
    assert shown.mean() == pytest.approx(masked.mean(), abs=4 * masked.std() * (2 / 1500) ** 0.5)
    most = np.array([np.bincount(positions).max() for _, positions in theirs])
    assert ours.weights.max(1).values.mean().item() == pytest.approx(most.mean(), abs=0.1)
