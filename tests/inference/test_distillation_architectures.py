"""Recorded attention and students made of a teacher's layers, right or refused by architecture."""

import architectures
import pytest
import torch

from effnb.core.modules import find_stacks
from effnb.inference.distillation import run_recorded, student_from_layers

OWN_ATTENTION = ("BLOOM", "GPT-J", "Falcon")
CHANGED_SCORES = {"Gemma2": "softcap", "GPT-OSS": "s_aux", "T5": "position_bias"}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_recorded_scores_give_the_models_attention_or_are_refused(name, padding):
    model, batch = architectures.build(name), architectures.batch(name, padding)
    if name in OWN_ATTENTION:
        with pytest.raises(ValueError, match="computes attention in its own way"):
            run_recorded(model, **batch)
        return
    if name in CHANGED_SCORES:
        with pytest.raises(
            ValueError, match=rf"changes its attention scores \({CHANGED_SCORES[name]}"
        ):
            run_recorded(model, **batch)
        return
    with torch.no_grad():
        plain = model(**batch, output_attentions=True)
        found, layers = run_recorded(model, **batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], plain.logits[real], atol=2e-5, rtol=2e-5)
    assert len(layers) == 2
    for layer, theirs in zip(layers, plain.attentions):
        scores = layer.scores()
        if layer.seen is not None:
            scores = scores.masked_fill(~layer.seen, -1e30)
        rows = real[:, None].expand(-1, layer.heads, -1)
        torch.testing.assert_close(
            scores.softmax(-1)[rows], theirs[rows].float(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", architectures.NAMES)
def test_a_student_of_one_layer_is_the_teacher_without_the_other(name):
    model, batch = architectures.build(name), architectures.batch(name)
    if name == "T5":
        with pytest.raises(ValueError, match="several stacks"):
            student_from_layers(model, [1])
        return
    ((_, blocks),) = find_stacks(model).items()

    def passed(module, arguments, keywords, output):
        states = arguments[0] if arguments else keywords["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with torch.no_grad():
        student = student_from_layers(model, [1])
        hook = blocks[0].register_forward_hook(passed, with_kwargs=True)
        without = model(**batch).logits
        hook.remove()
        torch.testing.assert_close(student(**batch).logits, without, atol=1e-5, rtol=1e-5)
    assert student.config.num_hidden_layers == 1
