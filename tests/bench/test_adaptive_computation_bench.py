"""Speculation beside transformers' assisted generation, on the same pair (`make bench`)."""

import pytest
import torch
from timing import answer, in_turn, measured

from effnb.inference.adaptive_computation import speculative
from effnb.lab import load

PROMPT, TOKENS, DRAFTS = 24, 48, 4


def measure_speculation():
    """Tokens per second of ours, of assisted generation and of the target alone."""
    target, draft = (load(name, device="cpu").model for name in ("mini-5m", "mini-300k"))
    prompts = torch.randint(5, 4000, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFTS, "constant"
    config.assistant_confidence_threshold = 0.0

    def ours():
        return [
            list(
                speculative.generate(
                    target, draft, row[None], max_new_tokens=TOKENS, draft_tokens=DRAFTS
                ).tokens
            )
            for row in prompts
        ]

    def generated(**more):
        return [
            target.generate(
                row[None], attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
                max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **more,
            )[0, PROMPT:].tolist()
            for row in prompts
        ]  # fmt: skip

    def assisted():
        return generated(assistant_model=draft)

    assert ours() == assisted() == generated()
    times = in_turn({"ours": ours, "assisted": assisted, "alone": generated}, 7)
    return {
        "assisted / ours": times["assisted"] / times["ours"],
        "alone / ours": times["alone"] / times["ours"],
    }


@pytest.mark.bench
def test_speculation_is_at_least_as_fast_as_assisted_generation():
    """The same pair, the same text, the same length of the draft."""
    found = measured(__file__, "speculation")
    print()
    print(", ".join(f"{what} {value:.2f}" for what, value in found.items()))
    assert found["assisted / ours"] >= 1


if __name__ == "__main__":
    answer(globals())
