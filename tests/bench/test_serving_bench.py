"""Many users in one batch against one user after the other (`make bench`)."""

import pytest
import torch
from timing import answer, in_turn, measured

from effnb.core.deltas import delta_parameters, set_active
from effnb.finetuning import lora, serving
from effnb.lab import load

USERS = (2, 8, 16)
TOKENS = 16


def measure_serving():
    """Seconds of a batch with one row a user: batched, in a loop, and the frozen model alone."""
    model = load("mini-5m", device="cpu").model
    found = {}
    for count in USERS:
        names = [f"user{i}" for i in range(count)]
        many = model
        for seed, name in enumerate(names):
            many = lora.attach(many, name, rank=8, layers=["*.q_proj", "*.v_proj"], seed=seed)
            for parameter in delta_parameters(many, name).values():
                parameter.data.add_(0.01)
        ids = torch.randint(5, 4000, (count, TOKENS), generator=torch.Generator().manual_seed(0))
        served = serving.serve(many)
        alone = [set_active(many, name) for name in names]

        @torch.inference_mode()
        def batched(served=served, ids=ids, names=names):
            with serving.users(served, names):
                return served(input_ids=ids).logits

        @torch.inference_mode()
        def loop(alone=alone, ids=ids):
            return torch.cat([m(input_ids=ids[i : i + 1]).logits for i, m in enumerate(alone)])

        @torch.inference_mode()
        def frozen(ids=ids):
            return model(input_ids=ids).logits

        torch.testing.assert_close(batched(), loop(), atol=1e-3, rtol=1e-3)
        times = in_turn({"batched": batched, "loop": loop, "frozen": frozen}, 9)
        found[str(count)] = {
            "loop / batched": times["loop"] / times["batched"],
            "batched / frozen": times["batched"] / times["frozen"],
        }
    return found


@pytest.mark.bench
def test_a_batch_of_users_beats_a_loop_over_them():
    """From 8 users on, and its price over the frozen model."""
    found = measured(__file__, "serving")
    print()
    for users, ratios in found.items():
        said = ", ".join(f"{what} {value:.2f}" for what, value in ratios.items())
        print(f"{users} users: {said}")
    assert found["8"]["loop / batched"] > 1
    assert found["16"]["loop / batched"] > 1


if __name__ == "__main__":
    answer(globals())
