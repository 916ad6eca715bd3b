"""What the chapter and its sweeps measure: models of equal size, their states, steps and costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from effnb.chapters.design.retention.twins import Twin
from effnb.design.retention import (
    GLALM,
    RWKVLM,
    GLAConfig,
    HyenaConfig,
    HyenaLM,
    LMConfig,
    ModelState,
    RecurrentLM,
    RetNetConfig,
    RetNetLM,
    RWKVConfig,
    decays,
    retention,
    rotate,
)
from effnb.lab import load
from effnb.lab.bench import Bench
from effnb.lab.results import NotMeasured
from effnb.lab.sweeps import held_out_novel, windows_of

SHAPES = {  # hidden, feed-forward, layers, heads, key-value heads
    "300k": (64, 128, 2, 4, 2),
    "1m": (128, 344, 4, 4, 2),
}
"""The Transformers mini-300k and mini-1m, whose size all models of the chapter have."""
KINDS: dict[str, tuple[type[LMConfig], type[RecurrentLM]]] = {
    "RetNet": (RetNetConfig, RetNetLM),
    "RWKV": (RWKVConfig, RWKVLM),
    "Hyena": (HyenaConfig, HyenaLM),
    "GLA": (GLAConfig, GLALM),
}
FORMS = ("parallel", "recurrent", "chunkwise")
METHODS = ("Transformer", *KINDS)


def build(method: str, size: str = "300k", *, seed: int = 0, tokens: int = 512) -> nn.Module:
    """An untrained model of a method, within 3 % of the Transformer's parameters.

    Args:
        method: One of `METHODS`; "Transformer, standard" computes attention without a fused kernel.
        size: One of `SHAPES`.
        seed: Seed of the weights.
        tokens: The longest text, which Hyena's filters have to know.

    Raises:
        ValueError: When there is no such method or size.
    """
    name = method.split(",")[0]
    if name not in METHODS or size not in SHAPES:
        raise ValueError(
            f"there is no {method!r} of size {size!r}; choose {', '.join(METHODS)} and "
            f"{', '.join(SHAPES)}."
        )
    torch.manual_seed(seed)
    if name != "Transformer":
        config, kind = KINDS[name]
        more = {"max_length": tokens} if name == "Hyena" else {}
        return kind(config.twin_of(*SHAPES[size], **more)).eval()
    hidden, feed_forward, layers, heads, kv_heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(512, tokens),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="eager" if method.endswith("standard") else "sdpa",
    )
    return LlamaForCausalLM(config).eval()


# ----------------------------------------------------------------------------------- decoding


@dataclass
class Reader:
    """A model in the middle of a text: what it keeps, and the step to the next token.

    Attributes:
        model: The model.
        state: A `DynamicCache` or a `ModelState`.
        position: Tokens read.
    """

    model: nn.Module
    state: Any
    position: int

    @property
    def bytes(self) -> int:
        """Bytes of all that is kept of the past for one step after the other."""
        if isinstance(self.state, DynamicCache):
            return sum(t.nbytes for layer in self.state.layers for t in (layer.keys, layer.values))
        return sum(
            t.nbytes
            for layer in self.state.layers
            for name, t in layer.items()
            if name != "filters"  # which all texts share
        )

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Logits after each of the tokens; the state goes on."""
        self.position += ids.shape[1]
        if isinstance(self.state, DynamicCache):
            return self.model(input_ids=ids, past_key_values=self.state).logits
        form = "recurrent" if ids.shape[1] == 1 else None
        hidden, self.state = self.model.advance(ids, self.state, form=form)
        return self.model.lm_head(hidden)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """One token's logits, with the state left where it is, so that a step can be repeated."""
        if isinstance(self.state, DynamicCache):
            logits = self.model(input_ids=ids, past_key_values=self.state).logits
            self.state.crop(-ids.shape[1])
            return logits
        hidden, _ = self.model.advance(ids, self.state, form="recurrent")
        return self.model.lm_head(hidden)


def reader(model: nn.Module, batch: int = 1) -> Reader:
    """A model that has read nothing."""
    if isinstance(model, RecurrentLM):
        return Reader(model, model.initial_state(batch), 0)
    return Reader(model, DynamicCache(), 0)


@torch.inference_mode()
def after(model: nn.Module, tokens: int, batch: int = 1) -> Reader:
    """A model that has read so many tokens, with random numbers for what it kept of them.

    The time of a step depends on how large the state is and not on what is in it.
    """
    draw = torch.Generator().manual_seed(0)
    if not isinstance(model, RecurrentLM):
        config, cache = model.config, DynamicCache()
        size = config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            shape = batch, config.num_key_value_heads, tokens, size
            keys, values = (torch.randn(shape, generator=draw) for _ in range(2))
            cache.update(keys, values, layer)
        return Reader(model, cache, tokens)
    begun = torch.zeros(batch, 1, dtype=torch.long)
    _, state = model.advance(begun, form="recurrent")
    layers = tuple(
        {
            name: torch.randn(batch, tokens, t.shape[2], generator=draw) if name == "past" else t
            for name, t in layer.items()
        }
        for layer in state.layers
    )
    return Reader(model, ModelState(model.config, tokens, layers), tokens)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are, shared ones once."""
    return sum(p.nbytes for p in model.parameters())


# ----------------------------------------------------------------------------------- training


def training_step(model: nn.Module, tokens: int) -> Callable[[], None]:
    """Forward and backward of one text through the blocks, without the output head.

    The head is the same in all models, and its work per token does not depend on the length.
    """
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())

    def step() -> None:
        with torch.enable_grad():
            if isinstance(model, RecurrentLM):
                hidden = model.hidden(ids)
            else:
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def processor_seconds(function: Callable[[], Any], runs: int = 1) -> float:
    """Seconds that the processor worked on a call, the mean of a few.

    Other programs on the machine do not count, unless they push data out of its caches.
    """
    began = time.process_time()
    for _ in range(runs):
        function()
    return (time.process_time() - began) / runs


# ----------------------------------------------------------------------------------- the trap


@torch.inference_mode()
def normalized_outputs(
    model: RetNetLM,
    x: Tensor,
    normalize: str | None,
    *,
    scale: float = 1.0,
    epsilon: float = 1e-6,
) -> dict[str, Tensor]:
    """Head outputs of the first layer after their norm, in all three forms, in float64.

    Args:
        model: A RetNet, of which the projections of the first layer are used.
        x: Inputs of the layer, (batch, time, hidden).
        normalize: Normalization of the scores, as `effnb.design.retention.retention` takes it.
        scale: Factor of the values, and so of the outputs before the norm.
        epsilon: Inside the norm of each head.
    """
    layer, config = model.blocks[0].retention, model.config
    q, k, v = (
        (x.double() @ one.weight.double().T).unflatten(-1, (config.heads, -1)).transpose(1, 2)
        for one in (layer.query, layer.key, layer.value)
    )
    q, k = rotate(q, k, 0, config.rotation)
    gamma, found = decays(config.heads, config.decay), {}
    for form in FORMS:
        out, _ = retention(
            q, k, scale * v, gamma, form=form, chunk_size=config.chunk_size, normalize=normalize
        )
        found[form] = nn.functional.layer_norm(out, out.shape[-1:], eps=epsilon)
    return found


@torch.inference_mode()
def layer_input(model: RetNetLM, ids: Tensor) -> Tensor:
    """What the first layer of a RetNet reads for a text, (1, time, hidden)."""
    return model.blocks[0].norm1(model.embedding(ids[None]))


# --------------------------------------------------------------------------- what is done live


class Written:
    """One text that two models write: its tokens, and what each keeps of them.

    Args:
        bench: The Transformer's bench.
        twin: Its twin; the picture has one line where the twin is missing.
        tokens: How much of the text.
    """

    def __init__(self, bench: Bench, twin: Twin | NotMeasured, tokens: int) -> None:
        self.tokenizer = bench.loaded.tokenizer
        self.ids = windows_of(bench.loaded, held_out_novel(), 1, tokens)[0]
        self.models = {f"{bench.name}, attention": bench.model}
        if twin:
            self.models[f"{twin.name}, retention"] = twin.model

    def bytes_kept(self, piece: int = 256) -> dict[str, list[tuple[int, int]]]:
        """For each model, tokens read and bytes kept; the text is read in pieces."""
        found: dict[str, list[tuple[int, int]]] = {}
        for name, model in self.models.items():
            one, found[name] = reader(model), []
            for ids in [self.ids[:1], self.ids[1:piece], *self.ids[piece:].split(piece)]:
                one.read(ids[None])
                found[name].append((one.position, one.bytes))
        return found

    def words(self, places: int = 3, letters: int = 22) -> list[str]:
        """What stands in the text at a few places, in whole words."""
        starts = [i * len(self.ids) // places for i in range(places)]
        said = [" ".join(self.tokenizer.decode(self.ids[s : s + 40]).split()) for s in starts]
        return [one.lstrip(" .,;:!?-")[: letters + 1].rsplit(" ", 1)[0] for one in said]

    def documents(self, count: int, tokens: int = 512) -> list[Tensor]:
        """Stretches of the text."""
        return list(self.ids[: count * tokens].split(tokens))


def continuations(bench: Bench, twin: Twin | NotMeasured, tokens: int = 40) -> str:
    """What the Transformer and its twin write after the same words, each drawn with one seed."""
    prompt = "She looked at him with surprise, and"
    ids = torch.tensor([bench.loaded.tokenizer.encode(prompt, add_special_tokens=False)])
    torch.manual_seed(0)
    written = bench.model.generate(
        ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, pad_token_id=0
    )
    found = {bench.name: written[0, ids.shape[1] :]}
    if twin:
        found[twin.name] = twin.model.generate(ids, tokens, temperature=0.7)[0]
    lines = [
        f"{name}: {prompt} {' '.join(bench.loaded.tokenizer.decode(some).split())} …"
        for name, some in found.items()
    ]
    return "\n".join(lines)


def agreement(twin: Twin | NotMeasured, ids: Tensor) -> str:
    """Whether the forms of a trained twin give the same logits, to ten digits."""
    if not twin:
        return str(twin)
    lines = []
    with torch.inference_mode():
        wanted = twin.model(ids[None], form="parallel")
        found = {form: twin.model(ids[None], form=form) for form in FORMS[1:]}
        first, state = twin.model.advance(ids[None, :150])
        rest = [twin.model.advance(ids[None, 150:], state, form="recurrent")[0]]
        found["chunkwise, then recurrent"] = twin.model.lm_head(torch.cat([first, *rest], 1))
    for name, logits in found.items():
        error = float((logits - wanted).abs().max() / wanted.abs().max())
        lines.append(f"parallel = {name}: {error < 1e-10} to ten digits")
    return "\n".join(lines)


def growth(short: int, long: int) -> dict[str, float]:
    """The processor's time for a long text over that for a short one, of one layer's mixing."""
    hidden, _, _, heads, _ = SHAPES["1m"]
    size, gamma = hidden // heads, decays(heads)
    times: dict[str, list[float]] = {"chunkwise retention": [], "FlashAttention": []}
    for tokens in (short, long):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, tokens, size, generator=draw) for _ in range(3))
        calls = {
            "chunkwise retention": lambda q=q, k=k, v=v: retention(q, k, v, gamma),
            "FlashAttention": lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ),
        }
        for name, call in calls.items():
            call()
            times[name].append(min(processor_seconds(call) for _ in range(3)))
    return {name: last / first for name, (first, last) in times.items()}


def smollm2_here(tokens: int) -> str:
    """What SmolLM2 keeps of so many tokens, and what a step after them takes, here and now."""
    model = load("smollm2-135m", device="cpu").model
    token, seconds = torch.zeros(1, 1, dtype=torch.long), {}
    for read in (64, tokens):
        one = after(model, read)
        one.step(token)
        seconds[read] = min(processor_seconds(lambda one=one: one.step(token)) for _ in range(3))
    return (
        f"After {tokens:,} tokens SmolLM2 keeps {one.bytes / 1e6:.0f} MB of them, and a step takes "
        f"{seconds[tokens] / seconds[64]:.1f} times its time after 64."
    )
