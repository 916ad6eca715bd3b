"""Padding is cut off before a model sees it, and masks follow what is left of it."""

import pytest
import torch
from zoo import make, texts, words

from effnb.core.calibration import Hessian, layerwise, unpadded_batches
from effnb.core.padding import gaps, masked_rows, without_padding


def lengths(batches, key="input_ids"):
    return sorted(tuple(batch[key].shape) for batch in batches)


def test_sequences_lose_their_padding_on_either_side():
    ids = torch.arange(1, 13).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    kinds = torch.arange(12).view(3, 4) % 2
    found = without_padding({"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds})
    assert lengths(found) == [(1, 4), (2, 2)]
    short = next(batch for batch in found if len(batch["input_ids"]) == 2)
    assert short["input_ids"].tolist() == [[1, 2], [7, 8]]
    assert short["token_type_ids"].tolist() == [[0, 1], [0, 1]]
    assert bool(short["attention_mask"].all()) and gaps(short) is None


def test_positions_that_are_given_are_kept():
    ids, mask = words(2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for positions in (torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]), torch.arange(4).unsqueeze(0)):
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = {b["input_ids"].shape[1]: b["position_ids"] for b in without_padding(batch)}
        assert found[4].tolist() == [[0, 1, 2, 3]]
        assert found[2].tolist() == [positions[0, 2:].tolist()]


def test_a_batch_without_padding_stays_whole():
    batch = {"input_ids": words(3, 4), "attention_mask": torch.ones(3, 4), "use": "anything"}
    (found,) = without_padding(batch)
    assert all(found[key] is value for key, value in batch.items())
    square = {"input_ids": words(2, 4), "attention_mask": torch.zeros(2, 1, 4, 4)}
    assert without_padding(square)[0]["attention_mask"] is square["attention_mask"]


def test_each_side_of_an_encoder_decoder_has_its_own_padding():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[4, 3, -100], [4, -100, -100]]),
    }
    found = without_padding(batch, encoder_decoder=True)
    assert lengths(found) == [(1, 2), (1, 3)] and lengths(found, "labels") == [(1, 1), (1, 2)]
    # In a decoder the labels go with the tokens.
    alone = without_padding(batch)
    assert lengths(alone, "labels") == [(1, 2), (1, 3)]
    masked = batch | {"decoder_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    found = without_padding(masked, encoder_decoder=True)
    assert lengths(found, "labels") == [(1, 2), (1, 3)]


def test_sequences_of_nothing_but_padding_are_left_out():
    batch = {"input_ids": words(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    (found,) = without_padding(batch)
    assert len(found["input_ids"]) == 1
    empty = [batch | {"attention_mask": torch.zeros(2, 3, dtype=torch.long)}]
    with pytest.raises(ValueError, match="nothing but padding"):
        unpadded_batches(make("llama"), empty)


def test_a_mask_with_gaps_follows_a_reshape():
    batch = {"input_ids": words(2, 5), "attention_mask": torch.tensor([[0, 1, 0, 1, 0], [1] * 5])}
    cut = {b["input_ids"].shape[1]: b for b in without_padding(batch)}
    mask = gaps(cut[3])
    assert mask.tolist() == [[True, False, True]]
    rows = torch.arange(6.0).view(1, 3, 2)
    assert masked_rows(rows, mask).tolist() == [[0, 1], [4, 5]]
    assert masked_rows(rows.flatten(0, 1), mask).tolist() == [[0, 1], [4, 5]]  # as in OPT
    assert masked_rows(rows, None).shape == (3, 2)
    with pytest.raises(ValueError, match="padding"):
        masked_rows(torch.zeros(7, 2), mask)


@pytest.mark.parametrize("name", ["opt", "t5", "bert"])
def test_tokens_counted_are_those_of_the_text(name):
    seen = {}
    for padding in (None, "left", "right"):
        layerwise(
            make(name),
            texts(name, padding),
            lambda key, layer: Hessian(layer.in_features),
            lambda key, layer, found, padding=padding: seen.__setitem__((padding, key), found),
        )
    assert max(found.tokens for found in seen.values()) == 14 + 9
    for (_, key), found in seen.items():
        assert found.tokens == seen[None, key].tokens
        torch.testing.assert_close(found.value, seen[None, key].value, rtol=1e-5, atol=1e-6)
