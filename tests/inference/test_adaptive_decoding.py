"""Early exits of a decoder, speculation and self-speculation: exact where they promise to be."""

import itertools

import pytest
import torch
from scipy.stats import chi2

from effnb.inference.adaptive_computation import (
    calm,
    confidence,
    exits,
    layers,
    layerskip,
    mixture_of_depths,
    speculative,
)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(0, num_hidden_layers=4)


@pytest.fixture(scope="module")
def draft(tiny_llama):
    return tiny_llama(1, num_hidden_layers=1)


PROMPT = torch.tensor([[5, 17, 99, 3, 42]])


def greedy(model, count=20, prompt=PROMPT, **more):
    with torch.inference_mode():
        ids = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0, **more,
        )  # fmt: skip
    return tuple(ids[0, prompt.shape[1] :].tolist())


# ------------------------------------------------------------------------------------- exits


def test_exits_are_what_the_layers_give(model):
    ids = torch.arange(12)[None]
    found = exits.exit_logits(model, ids)
    with torch.inference_mode():
        torch.testing.assert_close(found[-1], model(input_ids=ids).logits)
        state = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(state, torch.arange(12)[None])
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        for layer, logits in zip(model.model.layers, found):
            state = layer(state, attention_mask=mask, position_embeddings=rotary)
            wanted = model.lm_head(model.model.norm(state))
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_weights_of_the_exits():
    assert exits.exit_weights(4).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert exits.exit_weights(2, "uniform").tolist() == [0.5, 0.5]
    assert exits.exit_weights(3, "exponential").tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    for bad in ((0, "linear"), (3, "square")):
        with pytest.raises(ValueError):
            exits.exit_weights(*bad)


def test_the_loss_is_the_weighted_sum_and_weighs_tokens(model):
    ids = torch.arange(16).view(2, 8)
    omega = exits.exit_weights(4)
    single = exits.exit_losses(model, ids)
    wanted = sum(w * loss for w, loss in zip(omega, single))
    torch.testing.assert_close(exits.exit_loss(model, ids, omega), wanted)
    plain = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(single[-1], plain)
    half = torch.ones(2, 8)
    half[1] = 0
    torch.testing.assert_close(
        exits.exit_losses(model, ids, half)[0], exits.exit_losses(model, ids[:1])[0]
    )
    with pytest.raises(ValueError, match="one for each"):
        exits.exit_loss(model, ids, [0.5, 0.5])


# -------------------------------------------------------------------------------------- calm


@pytest.mark.parametrize("measure", ["softmax", "saturation"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_threshold_of_one_is_greedy_decoding_token_for_token(tiny_llama, measure, seed):
    model = tiny_llama(seed, num_hidden_layers=4)
    found = calm.generate(model, PROMPT, max_new_tokens=20, threshold=1.0, measure=measure)
    assert found.tokens == greedy(model)
    assert set(found.layers) == {4}


def test_repetitions_are_punished_as_transformers_does(model):
    found = calm.generate(model, PROMPT, max_new_tokens=20, threshold=1.0, repetition_penalty=1.3)
    assert found.tokens == greedy(model, repetition_penalty=1.3)
    assert found.tokens != greedy(model)
    with pytest.raises(ValueError, match="above 0"):
        calm.generate(model, PROMPT, repetition_penalty=0.0)


def test_a_threshold_of_zero_leaves_at_the_first_layer(model):
    found = calm.generate(model, PROMPT, max_new_tokens=8, threshold=0.0)
    assert set(found.layers) == {1}
    assert found.mean_layers == 1
    later = calm.generate(model, PROMPT, max_new_tokens=8, threshold=0.0, first_exit=3)
    assert set(later.layers) == {3}


def test_layers_grow_with_the_threshold_for_the_first_token(model):
    at = [
        calm.generate(model, PROMPT, max_new_tokens=1, threshold=t).layers[0]
        for t in (0.0, 0.2, 0.5, 0.8, 1.0)
    ]
    assert at == sorted(at)


def by_hand(model, prompt, layers_left):
    """Tokens of a text whose tokens left at given layers, from whole passes and no cache."""
    stack = layers.LayerStack(model)
    ids = prompt[0].tolist()
    tokens = []
    for new in range(len(layers_left)):
        # token t of the new ones passed layers 1..layers_left; above, its state is copied
        seen = torch.tensor([ids])
        limits = [model.config.num_hidden_layers] * (len(prompt[0]) - 1) + layers_left[: new + 1]
        state = stack.embed(seen)
        rotary = stack.rotary(state, 0)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        for i, layer in enumerate(stack.layers):
            after = layer(state, attention_mask=mask, position_embeddings=rotary)
            keep = torch.tensor(limits)[None, :, None] > i
            state = torch.where(keep, after, state)
        token = int(stack.head(state)[0, -1].argmax())
        tokens.append(token)
        ids.append(token)
    return tokens


@torch.inference_mode()
def test_copied_states_are_what_a_pass_without_a_cache_gives(model):
    found = calm.generate(model, PROMPT, max_new_tokens=12, threshold=0.25)
    assert len(set(found.layers)) > 1, "the threshold must send tokens to several layers"
    assert list(found.tokens) == by_hand(model, PROMPT, list(found.layers))


def test_projected_copies_are_another_text(tiny_llama):
    differ = 0
    for seed in range(4):
        model = tiny_llama(seed, num_hidden_layers=4)
        right, wrong = (
            calm.generate(model, PROMPT, max_new_tokens=12, threshold=0.1, copying=copying).tokens
            for copying in calm.COPYING
        )
        differ += right != wrong
    assert differ


def test_an_end_token_ends_the_text(model):
    whole = greedy(model)
    end = whole[3]
    found = calm.generate(model, PROMPT, max_new_tokens=20, threshold=1.0, end=end)
    assert found.tokens == whole[: whole.index(end) + 1]


def test_measures_of_confidence():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert float(confidence.softmax_response(logits)) == pytest.approx(0.2)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert float(confidence.saturation(a, b)) == pytest.approx(2**-0.5)
    assert float(confidence.saturation(a, -a)) == 0
    assert confidence.batch_confidence([0.9, 0.4, 0.7]) == pytest.approx(0.4)


def test_thresholds_of_the_paper_and_of_the_code():
    paper = confidence.thresholds(0.5, 10, 4.0)
    code = confidence.thresholds(0.5, 10, 4.0, "code")
    assert paper[0] == pytest.approx(0.55)  # above lambda: the trap
    assert code[0] == pytest.approx(0.5)
    assert max(code) <= 0.5
    assert paper == sorted(paper, reverse=True)
    assert paper[5] == pytest.approx(0.9 * 0.5 + 0.1 * 2.718281828**-2)
    assert confidence.thresholds(1.0, 3, 4.0)[0] == 1.0
    assert confidence.thresholds(0.3, 2) == [0.3, 0.3]


def test_the_classifier_learns_which_layers_already_know(model):
    ids = torch.randint(0, 128, (4, 40), generator=torch.Generator().manual_seed(0))
    found = confidence.train_classifier(model, ids, steps=150)
    states, labels = confidence.agreement(model, ids)
    start = confidence.balanced_loss(torch.zeros_like(labels), labels)
    assert confidence.balanced_loss(found.scores(states), labels) < start - 0.01
    text = calm.generate(
        model, PROMPT, max_new_tokens=6, threshold=0.5, measure="classifier", classifier=found
    )
    assert len(text.tokens) == 6


def test_classes_of_the_classifier_weigh_alike():
    scores = torch.zeros(1, 10)
    labels = torch.zeros(1, 10)
    labels[0, 0] = 1
    moved = scores.clone()
    moved[0, 0] = 2.0  # the one positive weighs as much as nine negatives
    each = torch.nn.functional.softplus
    wanted = 0.5 * (each(torch.tensor(-2.0)) + each(torch.tensor(0.0)))
    torch.testing.assert_close(confidence.balanced_loss(moved, labels), wanted)


def test_exits_that_are_read_agree_with_texts_that_are_written(model):
    ids = torch.arange(20).view(1, 20)
    seen = calm.read_exits(model, ids)
    logits = exits.exit_logits(model, ids)[:, 0, :-1]
    torch.testing.assert_close(
        seen.confidences["softmax"], confidence.softmax_response(logits[:-1])
    )
    assert bool((seen.layer("softmax", 1.0) == 4).all())
    assert bool((seen.layer("softmax", 0.0) == 1).all())
    low, high = (seen.layer("softmax", t).float().mean() for t in (0.2, 0.6))
    assert low <= high
    loss = seen.loss_at(seen.layer("softmax", 1.0)).mean()
    torch.testing.assert_close(loss, exits.exit_losses(model, ids)[-1].detach())
    oracle = seen.layer("oracle", 0.5)
    best = logits.argmax(-1)
    for t, layer in enumerate(oracle.tolist()):
        assert best[layer - 1, t] == best[-1, t]
        assert all(best[i, t] != best[-1, t] for i in range(layer - 1))


# ------------------------------------------------------------------------------- speculative


@pytest.mark.parametrize("gamma", [1, 3, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_speculative_decoding_is_the_targets_greedy_text(tiny_llama, draft, gamma, seed):
    target = tiny_llama(seed + 5, num_hidden_layers=4)
    found = speculative.generate(target, draft, PROMPT, max_new_tokens=20, draft_tokens=gamma)
    assert found.tokens == greedy(target) == greedy(target, assistant_model=draft)
    assert len(found.tokens) == 20 == found.passes + sum(found.accepted)


def test_a_model_that_drafts_for_itself_is_always_accepted(model):
    found = speculative.generate(model, model, PROMPT, max_new_tokens=15, draft_tokens=4)
    assert found.tokens == greedy(model, 15)
    assert found.rate == 1
    assert found.passes == 3


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_self_speculation_is_the_models_greedy_text(model, exit_layer):
    found = layerskip.self_speculative(
        model, PROMPT, exit_layer=exit_layer, max_new_tokens=20, draft_tokens=3
    )
    assert found.tokens == greedy(model) == greedy(model, assistant_early_exit=exit_layer)


def test_the_worked_example_of_one_position():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.6, 0.2, 0.1])
    assert float(speculative.acceptance(p, q)) == pytest.approx(0.6)
    assert speculative.expected_tokens(0.6, 4) == pytest.approx(2.3056)
    assert speculative.speed_up(0.8, 5, 0.05) == pytest.approx(2.951, abs=1e-3)
    assert speculative.speed_up(0.6, 4, 0.1) == pytest.approx(1.647, abs=1e-3)
    assert speculative.best_draft_length(0.1, 0.5) == 0
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    draws = 6_000
    for x in torch.multinomial(q, draws, replacement=True, generator=generator).tolist():
        kept, token = speculative.verify(torch.stack([p, p]), q[None], torch.tensor([x]), generator)
        counts[x if kept else token] += 1
    chi = ((counts - draws * p).square() / (draws * p)).sum()
    assert chi < 16.3  # 3 degrees of freedom, one in a thousand


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one only, with the interface of a decoder."""

    def __init__(self, seed, vocabulary=3):
        super().__init__()
        from transformers import LlamaConfig

        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.embedding = torch.nn.Embedding(vocabulary, 2)
        self.config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=2, num_hidden_layers=1, num_attention_heads=1
        )

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        from types import SimpleNamespace

        empty = torch.zeros(1, 1, input_ids.shape[1], 2)
        past_key_values.update(empty, empty, 0)
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 1.0), (1.3, 0.8)])
def test_two_tokens_have_the_targets_joint_distribution(temperature, top_p):
    target, draft = Bigram(0), Bigram(1)
    p = speculative.probabilities(target.table.detach(), temperature, top_p)
    wanted = {(a, b): float(p[0, a] * p[a, b]) for a, b in itertools.product(range(3), repeat=2)}
    generator = torch.Generator().manual_seed(3)
    counts = dict.fromkeys(wanted, 0)
    draws = 1000
    for _ in range(draws):
        found = speculative.generate(
            target, draft, [0], max_new_tokens=3, draft_tokens=2, temperature=temperature,
            top_p=top_p, generator=generator,
        )  # fmt: skip
        counts[found.tokens[:2]] += 1
    assert all(counts[pair] == 0 for pair, probability in wanted.items() if probability == 0)
    rare = [pair for pair, probability in wanted.items() if 0 < draws * probability < 5]
    cells = [[pair] for pair, probability in wanted.items() if draws * probability >= 5]
    cells += [rare] if rare else []  # cells with few expected counts are taken together
    chi = 0.0
    for cell in cells:
        expected = draws * sum(wanted[pair] for pair in cell)
        chi += (sum(counts[pair] for pair in cell) - expected) ** 2 / expected
    assert chi < chi2.isf(1e-3, len(cells) - 1)


def test_sampling_from_the_target_alone_would_be_found():
    """The same test on a rule that resamples from p instead of the residual must fail."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.6, 0.2, 0.1])
    accept = torch.minimum(p, q)
    wrong = accept + (1 - accept.sum()) * p
    draws = 40_000
    assert ((draws * wrong - draws * p).square() / (draws * p)).sum() > 100


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.95])
def test_the_nucleus_is_that_of_transformers(top_p):
    from transformers import TopPLogitsWarper

    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(top_p)(None, logits / 0.7).softmax(-1)
    torch.testing.assert_close(speculative.probabilities(logits, 0.7, top_p), wanted)


def test_sampling_by_self_speculation_follows_the_model(tiny_llama):
    """First token of many draws against the model's own distribution."""
    model = tiny_llama(3, vocab_size=6, num_hidden_layers=2)
    prompt = torch.tensor([[1, 2]])
    with torch.inference_mode():
        p = model(input_ids=prompt).logits[0, -1].softmax(-1)
    stack = layers.LayerStack(model)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    draws = 300
    for _ in range(draws):
        found = layerskip.self_speculative(
            stack, prompt, exit_layer=1, max_new_tokens=2, draft_tokens=1, temperature=1.0,
            generator=generator,
        )  # fmt: skip
        counts[found.tokens[0]] += 1
    seen = p > 0.005
    chi = ((counts - draws * p).square() / (draws * p))[seen].sum()
    assert chi < 20.6  # 5 degrees of freedom, one in a thousand


def test_the_rate_counts_only_drafts_that_were_tested():
    found = speculative.SpeculativeText((1,) * 7, (2, 0, 4), (4, 4, 4), 1.0)
    assert found.rate == pytest.approx(6 / (3 + 1 + 4))


# --------------------------------------------------------------------------------- layerskip


def test_layer_dropout_rises_from_nothing_to_its_largest():
    rates = layerskip.dropout_rates(5, 0.2)
    assert float(rates[0]) == 0
    assert float(rates[-1]) == pytest.approx(0.2)
    assert bool((rates.diff() > 0).all())


def test_layer_dropout_skips_samples_in_training_only(model):
    ids = torch.arange(12).repeat(6, 1)
    dropped = layerskip.with_layer_dropout(model, 0.9)
    with torch.inference_mode():
        torch.testing.assert_close(dropped(input_ids=ids).logits, model(input_ids=ids).logits)
        dropped.train()
        torch.manual_seed(0)
        logits = dropped(input_ids=ids, use_cache=False).logits
    assert len({round(float(x), 4) for x in logits[:, -1, 0]}) > 1  # sample by sample
    assert dropped.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert not isinstance(model.model.layers[0], layerskip.DroppedLayer)


def test_loss_weights_and_curricula():
    raw = torch.tensor([0.5, 1.5, 3.0, 10.0])
    torch.testing.assert_close(layerskip.loss_weights(4, 0.5), raw / raw.sum())
    only = layerskip.loss_weights(4, 1.0, torch.tensor([False, True, False, True]))
    torch.testing.assert_close(only, torch.tensor([0.0, 3, 0, 10]) / 13)
    first = layerskip.curriculum("rotational", 6, 0, 10)
    assert first.tolist() == [True, False, False, True, False, True]
    assert layerskip.curriculum("rotational", 6, 1, 10).tolist()[1]
    assert layerskip.curriculum("gradual", 5, 0, 10).tolist() == [False] * 4 + [True]
    assert all(layerskip.curriculum("gradual", 5, 5, 10).tolist())


# -------------------------------------------------------------------------- mixture of depths


def test_full_capacity_and_a_router_of_one_is_the_vanilla_model(model):
    ids = torch.arange(16).view(2, 8)
    routed = mixture_of_depths.mixture_of_depths(model, 1.0)
    for block in routed.modules():
        if isinstance(block, mixture_of_depths.DepthBlock):
            torch.nn.init.zeros_(block.router.weight)
            torch.nn.init.ones_(block.router.bias)
    with torch.inference_mode():
        torch.testing.assert_close(
            routed(input_ids=ids, use_cache=False).logits,
            model(input_ids=ids, use_cache=False).logits, atol=1e-4, rtol=1e-4,
        )  # fmt: skip


def test_tokens_that_are_not_chosen_keep_their_state(model):
    routed = mixture_of_depths.mixture_of_depths(model, 0.25)
    block = routed.model.layers[1]
    seen = {}
    block.register_forward_hook(lambda _, inputs, out: seen.update(before=inputs[0], after=out))
    routed(input_ids=torch.arange(16).view(2, 8), use_cache=False).logits.sum().backward()
    assert block.chosen.sum(1).tolist() == [2, 2]
    same = (seen["before"] == seen["after"]).all(-1)
    assert bool((same == ~block.chosen).all())
    assert block.router.weight.grad.abs().sum() > 0
    assert mixture_of_depths.auxiliary_loss(routed) > 0
    with pytest.raises(ValueError, match="use_cache=False"):
        routed(input_ids=torch.arange(8)[None], use_cache=True)


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, d: calm.generate(m, PROMPT, threshold=1.5), r"threshold is 1.5"),
        (lambda m, d: calm.generate(m, PROMPT, threshold=-0.1), r"\[0, 1\]"),
        (lambda m, d: calm.generate(m, PROMPT, threshold=float("nan")), "threshold is nan"),
        (lambda m, d: calm.generate(m, PROMPT, threshold=[0.5]), "1 thresholds for 32"),
        (lambda m, d: calm.generate(m, PROMPT, measure="entropy"), "choose of softmax"),
        (lambda m, d: calm.generate(m, PROMPT, measure="classifier"), "needs one"),
        (lambda m, d: calm.generate(m, PROMPT, copying="none"), "choose of states"),
        (lambda m, d: calm.generate(m, PROMPT, first_exit=5), "layers 1 to 4"),
        (lambda m, d: calm.generate(m, PROMPT, max_new_tokens=60), "64 positions"),
        (lambda m, d: calm.generate(m, PROMPT.repeat(2, 1)), "one row"),
        (lambda m, d: calm.generate(m, []), "at least one token"),
        (lambda m, d: calm.generate(m, [500]), "tokens 0 to 127"),
        (lambda m, d: confidence.thresholds(0.5, 4, -1.0), "decay is -1"),
        (lambda m, d: confidence.thresholds(0.5, 4, 1.0, "blog"), "paper or code"),
        (lambda m, d: confidence.train_classifier(m, PROMPT[:0]), "give"),
        (lambda m, d: speculative.generate(m, d, PROMPT, draft_tokens=0), "at least 1"),
        (lambda m, d: speculative.generate(m, d, PROMPT, temperature=-1.0), "at least 0"),
        (lambda m, d: speculative.generate(m, d, PROMPT, top_p=0.0), "top_p is 0"),
        (lambda m, d: speculative.expected_tokens(1.2, 3), "alpha is 1.2"),
        (lambda m, d: speculative.speed_up(0.5, 3, -1.0), "cost is -1"),
        (lambda m, d: layerskip.self_speculative(m, PROMPT, exit_layer=4), "1 to 3"),
        (lambda m, d: layerskip.dropout_rates(1, 0.1), "two layers"),
        (lambda m, d: layerskip.curriculum("random", 4, 0, 1), "rotational or gradual"),
        (lambda m, d: mixture_of_depths.mixture_of_depths(m, 0.0), "capacity is 0"),
        (lambda m, d: layers.LayerStack(torch.nn.Linear(2, 2)), "laid out otherwise"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(model, draft, call, says):
    with pytest.raises(ValueError, match=says):
        call(model, draft)


def test_another_vocabulary_is_refused(model, tiny_llama):
    other = tiny_llama(0, vocab_size=64)
    with pytest.raises(ValueError, match="64 tokens and the target 128"):
        speculative.generate(model, other, PROMPT)


def test_layers_that_hide_tokens_are_refused(model):
    from transformers import MistralConfig, MistralForCausalLM

    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            sliding_window=4,
        )
    ).eval()
    with pytest.raises(ValueError, match="hides distant tokens"):
        layers.LayerStack(windowed)


def test_a_model_whose_parts_do_not_make_it_is_refused(tiny_llama):
    model = tiny_llama(0)
    model.lm_head.register_forward_hook(lambda *args: args[-1] * 2)
    whole = model.forward
    model.forward = lambda *a, **k: (lambda out: (setattr(out, "logits", out.logits + 5), out)[1])(
        whole(*a, **k)
    )
    with pytest.raises(ValueError, match="more than its layers show"):
        layers.LayerStack(model)
