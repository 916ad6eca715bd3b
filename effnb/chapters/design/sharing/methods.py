"""What the chapter on sharing builds and measures: small models that share, and their peers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from effnb.core.modules import clone, find_blocks, share
from effnb.core.training import TrainingSettings, train
from effnb.design.sharing import (
    Perceiver,
    PerceiverConfig,
    PerceiverIOConfig,
    PerceiverMLM,
    UniversalConfig,
    UniversalOutput,
    UniversalTransformer,
    factorize_embedding,
    load_shared,
    perceiver_io_multiply_adds,
    save_shared,
    share_layers,
    transformer_multiply_adds,
    unshare_layers,
)
from effnb.finetuning import lora
from effnb.inference import low_rank, pruning, quantization
from effnb.lab import corpora
from effnb.lab.claims_bench import Bench, by_document

# --- language models that share -------------------------------------------------------------------

LAYERS, WIDTH, NEURONS, HEADS = 6, 64, 128, 4
SHARED: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"what": "all"},
    "three groups": {"what": "all", "groups": 3},
    "attention": {"what": "attention"},
    "feed_forward": {"what": "feed_forward"},
    "one layer": {"layers": 1},
    "E = 16": {"size": 16},
    "all, E = 16": {"what": "all", "size": 16},
}
"""The models of the training runs: what they share, and how wide their token vectors are."""
NAMES = {
    "none": "nothing shared",
    "three groups": "three groups",
    "attention": "attention shared",
    "feed_forward": "feed-forward shared",
    "all": "all shared",
    "one layer": "one layer alone",
    "E = 16": "nothing shared, E = 16",
    "all, E = 16": "all shared, E = 16",
}
"""What tables and pictures call them."""


def language_model(method: str, seed: int = 0, vocabulary: int = 4096) -> LlamaForCausalLM:
    """A small random Llama that shares as the method says."""
    how = SHARED[method]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=NEURONS,
        num_hidden_layers=how.get("layers", LAYERS), num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if "what" in how:
        model = share_layers(model, how["what"], how.get("groups", 1))
    if "size" in how:
        model = factorize_embedding(model, how["size"], initial="random", seed=seed)
    return model


def token_multiply_adds(model: nn.Module, context: int = 128) -> int:
    """Multiply-adds per token of reading a text of that length, with the head."""
    config = model.config
    d, f, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    gate = L * d * f  # a gated feed-forward has a third matrix
    table = model.get_output_embeddings()
    factors = getattr(getattr(table, "embedding", None), "project", None)
    size = d if factors is None else factors.in_features
    extra = 0 if factors is None else 2 * size * d
    body = transformer_multiply_adds(context, d, f, L) // context
    return body + gate + config.vocab_size * size + extra


def block_numbers(model: nn.Module) -> int:
    """Numbers in the blocks, shared ones once."""
    _, blocks = find_blocks(model)
    return sum(p.numel() for p in blocks.parameters())


# --- time -----------------------------------------------------------------------------------------


def processor_seconds(call: Callable[[], Any], runs: int = 3) -> float:
    """The processor's seconds of a call, the least of a few."""
    best = float("inf")
    for _ in range(runs):
        began = time.process_time()
        call()
        best = min(best, time.process_time() - began)
    return best


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, runs: int = 2
) -> dict[str, list[float]]:
    """Processor's seconds of each call in every round; a round before them does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(round(processor_seconds(call, runs), 7))
    return found


# --- reading long inputs --------------------------------------------------------------------------

READ_LATENTS = 64


def perceiver_reader(layers: int) -> nn.Module:
    """A Perceiver of 64 latents that reads vectors of `WIDTH` channels."""
    torch.manual_seed(0)
    config = PerceiverConfig(
        WIDTH, READ_LATENTS, WIDTH, layers, heads=HEADS, cross_heads=HEADS, widening=2
    )
    return Perceiver(config).eval()


def transformer_reader(layers: int) -> nn.Module:
    """A BERT of the same width that reads the same vectors."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, max_position_embeddings=8192,
    )  # fmt: skip
    return _ReadsVectors(BertModel(config, add_pooling_layer=False).eval())


class _ReadsVectors(nn.Module):
    """A BERT that is called with vectors."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        return self.bert(inputs_embeds=x).last_hidden_state


READERS: dict[str, Callable[[int], nn.Module]] = {
    "Perceiver": perceiver_reader,
    "Transformer": transformer_reader,
}

# --- masked characters ----------------------------------------------------------------------------

PLACES = 256
MASK_RATE = 0.15
CHARACTERS = 97
"""The printable ASCII characters and one for the rest; the mask is another."""
MASK = CHARACTERS
FILLERS = ("4 latents", "16 latents", "64 latents", "Transformer")
DEPTH = 4


def characters(text: str) -> list[int]:
    """A number for each character: 0 to 94 for ASCII, 95 for a line break, 96 for all others."""
    return [
        ord(c) - 32 if 32 <= ord(c) < 127 else 95 if c == "\n" else CHARACTERS - 1 for c in text
    ]


@cache
def _stream(split: str) -> Tensor:
    texts = corpora.documents("novels", split)
    return torch.tensor(characters("\n".join(texts)), dtype=torch.uint8)


def character_windows(split: str, count: int, places: int) -> Int[Tensor, "windows places"]:
    """Windows spread evenly over the novels of a split."""
    ids = _stream(split)
    starts = [i * (len(ids) - places) // count for i in range(count)]
    return torch.stack([ids[s : s + places] for s in starts]).long()


def mask_some(
    ids: Int[Tensor, "batch places"], seed: int
) -> tuple[Int[Tensor, "batch places"], Int[Tensor, "batch places"]]:
    """Texts with 15 % of their characters masked, and labels: -100 where none is."""
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < MASK_RATE
    return ids.masked_fill(chosen, MASK), ids.masked_fill(~chosen, -100)


def masked_batches(seed: int, shape: tuple[int, int]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """From a step to its texts, at random places of the training novels."""
    ids = _stream("train")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        starts = torch.randint(0, len(ids) - shape[1], (shape[0],), generator=generator)
        rows = torch.stack([ids[s : s + shape[1]] for s in starts.tolist()]).long()
        return mask_some(rows, 7_000_003 * (seed + 1) + step)

    return batch


def filler(method: str, seed: int = 0) -> nn.Module:
    """A model that fills in masked characters: a Perceiver IO, or a Transformer of its width."""
    torch.manual_seed(seed)
    if method == "Transformer":
        return _Encoder()
    return PerceiverMLM(filler_config(method), CHARACTERS + 1, PLACES)


def filler_config(method: str) -> PerceiverIOConfig:
    """Sizes of a Perceiver by its number of latents."""
    latents = int(method.split()[0])
    encoder = PerceiverConfig(
        WIDTH, latents, WIDTH, DEPTH, heads=HEADS, cross_heads=HEADS, widening=2
    )
    return PerceiverIOConfig(encoder, WIDTH, heads=HEADS, widening=2)


def filler_multiply_adds(method: str) -> int:
    """Multiply-adds of one text, with the head."""
    head = PLACES * WIDTH * (CHARACTERS + 1)
    if method == "Transformer":
        return head + transformer_multiply_adds(PLACES, WIDTH, 2 * WIDTH, DEPTH)
    return head + perceiver_io_multiply_adds(PLACES, PLACES, filler_config(method))


class _Encoder(nn.Module):
    """A Transformer encoder of the same width and depth, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=CHARACTERS + 1, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=DEPTH, num_attention_heads=HEADS, max_position_embeddings=PLACES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        hidden = self.bert(input_ids=ids).last_hidden_state
        return hidden @ self.bert.embeddings.word_embeddings.weight.T


def masked_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the masked characters, in nats."""
    ids, labels = batch
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


@torch.inference_mode()
def masked_by_window(
    model: nn.Module, windows: Int[Tensor, "windows places"], seed: int = 12345
) -> tuple[list[float], float]:
    """The loss of each window's masked characters, and the part of all that was filled in right."""
    ids, labels = mask_some(windows, seed)
    logits = model(ids)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(labels.shape)
    counted = labels != -100
    each = (losses * counted).sum(1) / counted.sum(1)
    right = (logits.argmax(-1) == labels)[counted].float().mean()
    return [round(float(x), 5) for x in each], round(float(right), 5)


def frequency_loss(windows: Int[Tensor, "windows places"], seed: int = 12345) -> float:
    """Nats per masked character of a guess that knows the characters' frequencies and no more."""
    counts = torch.bincount(_stream("train").long(), minlength=CHARACTERS) + 1
    _, labels = mask_some(windows, seed)
    return float(-(counts / counts.sum()).log()[labels[labels != -100]].mean())


class Neighbours(nn.Module):
    """A convolution over seven places and one hidden layer: its neighbours are given, not found."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS + 1, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, 2 * WIDTH, 7, padding=3)
        self.head = nn.Linear(2 * WIDTH, CHARACTERS + 1)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the character at each place."""
        hidden = self.convolution(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(hidden.relu())


def train_neighbours(steps: int = 100, seed: int = 0) -> nn.Module:
    """The convolution after a few seconds of training on the texts that the others read."""
    torch.manual_seed(seed)
    model = Neighbours()
    settings = TrainingSettings(steps=steps, learning_rate=4e-3, schedule="wsd", seed=seed)
    train(model, masked_batches(seed, (16, PLACES)), settings, loss=masked_loss)
    return model


# --- the Universal Transformer on a task whose depth is known -------------------------------------

DIGITS = 10
CHAINS = (0, 1, 2, 3, 4, 5)
"""How many places a carry may have come through before it arrives."""


def addition(batch: int, seed: int, digits: int = DIGITS) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of two numbers, the lowest digit first; half of the places hand on what comes to them.

    Returns:
        The sum of the two digits of each place, 0 to 18; the digit of the result; and how many
        places in a row below each hand on a carry (9), so that its origin lies behind them. All
        (batch, digits).
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(0, 19, (batch, digits), generator=generator)
    sums = sums.masked_fill(torch.rand(batch, digits, generator=generator) < 0.45, 9)
    carry = torch.zeros(batch, dtype=torch.long)
    chain = torch.zeros(batch, dtype=torch.long)
    result, chains = [], []
    for place in range(digits):
        chains.append(chain)
        result.append((sums[:, place] + carry) % 10)
        chain = torch.where(sums[:, place] == 9, chain + 1, 0)
        carry = (sums[:, place] + carry >= 10).long()
    return sums, torch.stack(result, 1), torch.stack(chains, 1)


def universal(steps: int = 6, halting: bool = True, seed: int = 0) -> UniversalTransformer:
    """The model that adds."""
    torch.manual_seed(seed)
    return UniversalTransformer(UniversalConfig(64, 4, 128, 19, steps, halting=halting))


def addition_loss(
    model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], ponder: float = 0.01
) -> Float[Tensor, ""]:
    """Cross-entropy of every digit, and the price of pondering."""
    sums, result, _ = batch
    found: UniversalOutput = model(sums)
    loss = nn.functional.cross_entropy(found.logits.flatten(0, 1), result.flatten())
    cost = 0.0 if found.halting is None else ponder * found.halting.ponder_cost.mean()
    return loss + cost


addition_batches = partial(addition, 64)


@torch.inference_mode()
def addition_report(
    model: UniversalTransformer, steps: int | None = None, digits: int = DIGITS, seed: int = 999
) -> list[dict[str, float]]:
    """By length of the chain: the part of digits that is right, and the steps that they took."""
    sums, result, chains = addition(600, seed, digits)
    found = model(sums, steps=steps)
    right = (found.logits.argmax(-1) == result).float()
    taken = (
        torch.full_like(right, steps or model.config.steps)
        if found.halting is None
        else found.halting.steps.float()
    )
    rows = []
    for chain in CHAINS:
        here = chains == chain
        rows.append(
            {
                "chain": chain,
                "right": round(float(right[here].mean()), 4),
                "steps": round(float(taken[here].mean()), 3),
            }
        )
    return rows


@torch.inference_mode()
def addition_right(
    model: UniversalTransformer, steps: int | None = None, digits: int = DIGITS, seed: int = 999
) -> float:
    """The part of all digits that is right after so many steps."""
    sums, result, _ = addition(200, seed, digits)
    right = model(sums, steps=steps).logits.argmax(-1) == result
    return round(float(right.float().mean()), 4)


# --- live cells of the chapter --------------------------------------------------------------------


def train_adder(steps: int = 600, seed: int = 0) -> UniversalTransformer:
    """A Universal Transformer that has just learned to add, about ten seconds on one core."""
    model = universal(6, True, seed)
    settings = TrainingSettings(
        steps=steps, learning_rate=2e-3, warmup_steps=50, schedule="wsd", seed=seed
    )
    train(model, addition_batches, settings, loss=partial(addition_loss, ponder=0.003))
    return model


def gradient_gap(seed: int = 0) -> float:
    """How far a shared weight's gradient is from the sum over an untied copy's places, in float64.

    As a part of the sum's largest entry.
    """
    shared = clone(language_model("all", seed, vocabulary=64).double())
    apart = clone(unshare_layers(shared))
    ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(seed))
    for model in (shared, apart):
        model(input_ids=ids, labels=ids).loss.backward()
    name = "mlp.up_proj.weight"
    one = shared.get_parameter(f"model.layers.0.{name}").grad
    total = torch.stack(
        [apart.get_parameter(f"model.layers.{i}.{name}").grad for i in range(LAYERS)]
    ).sum(0)
    return float((one - total).abs().max() / total.abs().max())


@torch.inference_mode()
def cache_gap(model: nn.Module, ids: Int[Tensor, "1 time"]) -> float:
    """The largest difference that reading token by token with a cache makes to the last logits."""
    whole = model(input_ids=ids, use_cache=False).logits[0, -1]
    cache = None
    for at in range(ids.shape[1]):
        out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    return float((out.logits[0, -1] - whole).abs().max())


def whole_attention_shared(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The wrong way: one attention module, with its layer's number, stands in every block."""
    result = share(model)
    for block in result.model.layers:
        block.self_attn = result.model.layers[0].self_attn
    return result


def saved_and_loaded(model: nn.Module, ids: Int[Tensor, "1 time"]) -> tuple[int, int, float]:
    """Numbers in the model, numbers in its file, and what saving and loading changes."""
    with tempfile.TemporaryDirectory() as folder:
        save_shared(model, folder)
        stored = sum(t.numel() for t in load_file(Path(folder) / "model.safetensors").values())
        again = load_shared(folder)
    with torch.inference_mode():
        before, after = (m(input_ids=ids, use_cache=False).logits for m in (model, again))
    return sum(p.numel() for p in model.parameters()), stored, float((before - after).abs().max())


def compressed(model: nn.Module, ids: Int[Tensor, "batch time"]) -> list[tuple[str, str, bool]]:
    """A few compression methods: what stands in the first and last block, and whether it is one."""
    new = {
        "rounded to 4 bits": quantization.rtn(model, 4),
        "GPTQ": quantization.gptq(model, ids, 4),
        "AWQ": quantization.awq(model, ids, 4, group_size=32, grid=5),
        "rotated": quantization.rotate(model),
        "pruned by Wanda": pruning.wanda(model, ids, 0.5),
        "SVD": low_rank.svd(model, 0.5),
        "LoRA attached": lora.attach(model, rank=4),
    }
    found = []
    for name, result in new.items():
        first, last = (result.model.layers[i].mlp.up_proj for i in (0, -1))
        found.append((name, type(first).__name__, first is last))
    return found


def smollm2_here(groups: int = 15) -> str:
    """SmolLM2 with pairs of layers made to share their mean: size and loss, here and now."""
    bench = Bench("smollm2-135m")
    new = share_layers(bench.model, groups=groups, initial="mean")
    documents = bench.documents[:2]
    before, after = (fmean(by_document(m, documents)) for m in (bench.model, new))
    numbers = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (bench.model, new)]
    return (
        f"SmolLM2-135M in {groups} groups: {numbers[1]:.0f} of {numbers[0]:.0f} million "
        f"parameters, {after - before:+.2f} nats on {len(documents)} chapters."
    )
