r"""A causal language model around any token mixer: embedding, blocks, norm, tied head.

RetNet, RWKV, Hyena and gated linear attention differ in one layer only. What is common to their
models is here: reading a text in any of the forms of the mixer, going on from a state, generating
with it, saving and loading. The head has the embedding's matrix.

**States.** `advance` reads tokens and gives a `ModelState`; reading more from it is the same as
reading the whole text at once. Its size does not depend on how much was read, except for Hyena's,
which has to keep all of it.

**Padding.** A mask of shape (batch, time) says which tokens are text. Padding on the right is never
seen, because the models are causal; padding on the left enters no state and no mixer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effnb.core.losses import linear_cross_entropy
from effnb.design.retention.configuration import Call, LayerState, LMConfig, ModelState
from effnb.design.retention.precision import wide

ARCHITECTURES: dict[str, type[RecurrentLM]] = {}
"""Every language model of this package by the name of its class, which its folder says."""


class RecurrentLM(nn.Module):
    """A causal language model; its subclasses say what a block is.

    Args:
        config: Sizes and settings. Weights are random, by PyTorch's global seed.
    """

    config_class: ClassVar[type[LMConfig]]
    block_class: ClassVar[type[nn.Module]]
    forms: ClassVar[tuple[str, ...]]
    """Forms of the mixer; texts are read in the first one unless another is asked for."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        ARCHITECTURES[cls.__name__] = cls

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} was given a {type(config).__name__}; it takes a "
                f"{self.config_class.__name__}."
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(self.block_class(config, i) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    # ------------------------------------------------------------------------------ reading

    def forward(
        self,
        ids: Int[Tensor, "batch time"],
        *,
        mask: Tensor | None = None,
        form: str | None = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the next token at each position; arguments are those of `hidden`."""
        return self.lm_head(self.hidden(ids, mask=mask, form=form))

    def hidden(
        self,
        ids: Int[Tensor, "batch time"],
        *,
        mask: Tensor | None = None,
        form: str | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """What the head `lm_head` reads.

        Args:
            ids: Token ids.
            mask: True or 1 where a token is text, (batch, time); padding is on the left or on the
                right of a row.
            form: One of `forms`; the first where None. All give the same result.

        Raises:
            ValueError: Ids or a mask that do not fit, or an unknown form.
        """
        mask = self._check(ids, mask)
        return self._run(ids, self._start(len(ids)), Call(self._form(form), 0, mask))[0]

    def advance(
        self,
        ids: Int[Tensor, "batch time"],
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        form: str | None = None,
    ) -> tuple[Float[Tensor, "batch time hidden"], ModelState]:
        """Read tokens after those that made the state; what the head reads, and the new state.

        Args:
            ids: The tokens that follow.
            state: From `initial_state` or an earlier call, which is not changed; None for the
                beginning of a text.
            mask: See `hidden`; here padding can only be on the left of the beginning.
            form: See `hidden`.

        Raises:
            ValueError: As `hidden`, and a state of another model or another batch size.
        """
        mask = self._check(ids, mask)
        goes_on = state is not None and state.position > 0
        if mask is not None and (goes_on or not mask[:, -1].all()):
            raise ValueError(
                "padding on the right, or after a state, would enter the state; where a text goes "
                "on, only its beginning can be padded, on the left."
            )
        state = self.initial_state(len(ids)) if state is None else state
        if state.config != self.config:
            raise ValueError(
                f"the state is of another model, {state.config}; this one is {self.config}."
            )
        rows = {len(t) for layer in state.layers for name, t in layer.items() if name != "filters"}
        if rows != {len(ids)}:
            raise ValueError(
                f"the state is of {max(rows)} texts, the ids of {len(ids)}; they must agree."
            )
        hidden, layers = self._run(ids, state.layers, Call(self._form(form), state.position, mask))
        return hidden, ModelState(self.config, state.position + ids.shape[1], layers)

    def initial_state(self, batch: int) -> ModelState:
        """The state before the first token of so many texts."""
        return ModelState(self.config, 0, self._start(batch))

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def _start(self, batch: int) -> tuple[LayerState, ...]:
        weight = self.embedding.weight
        zeros = weight.new_zeros(batch, dtype=wide(weight))  # says rows, type and device
        return tuple(block.initial_state(zeros) for block in self.blocks)

    def _run(self, ids, layers, call: Call) -> tuple[Tensor, tuple[LayerState, ...]]:
        x, new = self.embedding(ids), []
        for block, state in zip(self.blocks, layers):
            x, state = block(x, state, call)
            new.append(state)
        return self.norm(x), tuple(new)

    def _form(self, form: str | None) -> str:
        if form is not None and form not in self.forms:
            raise ValueError(
                f"the form is {form!r}; {type(self).__name__} has {', '.join(self.forms)}."
            )
        return form or self.forms[0]

    def _check(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Refuse ids that are none; the mask, or None where it hides nothing."""
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            raise ValueError(
                f"the ids are of shape {tuple(ids.shape)} and {ids.dtype}; they must be whole "
                "numbers of shape (batch, time), at least one of them."
            )
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < (
            self.config.vocabulary
        ):
            raise ValueError(
                f"the ids reach from {int(ids.min())} to {int(ids.max())}; the model has the "
                f"tokens 0 to {self.config.vocabulary - 1}."
            )
        if mask is None:
            return None
        if mask.shape != ids.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}; these models are causal, and a mask says "
                f"only which tokens are padding: it must have the ids' shape {tuple(ids.shape)}."
            )
        mask = mask.to(ids.device).bool()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
        if not bool(((changes <= 1) & mask.any(1)).all()):
            raise ValueError(
                "a row of the mask has gaps or no text; padding must be on one side of the text."
            )
        return None if bool(mask.all()) else mask

    # --------------------------------------------------------------------------- generating

    @torch.no_grad()
    def stream(
        self,
        ids: Int[Tensor, "batch time"],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        mask: Tensor | None = None,
    ) -> Iterator[tuple[Int[Tensor, " batch"], ModelState]]:
        """Go on with texts, token by token and without end.

        Args:
            ids: Prompts.
            temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of
                the logits divided by it.
            seed: Of the draws.
            mask: Padding on the left of prompts of different lengths.

        Yields:
            The next token of each text, and the state before it is read.

        Raises:
            ValueError: A temperature below 0, or what `advance` refuses.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be at least 0.")
        draws = torch.Generator().manual_seed(seed)
        hidden, state = self.advance(ids, mask=mask)
        while True:
            logits = self.lm_head(hidden[:, -1]).float()
            if temperature:
                weights = (logits / temperature).softmax(-1).cpu()
                token = torch.multinomial(weights, 1, generator=draws)[:, 0].to(ids.device)
            else:
                token = logits.argmax(-1)
            yield token, state
            hidden, state = self.advance(token[:, None], state, form="recurrent")

    def generate(
        self,
        ids: Int[Tensor, "batch time"],
        tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        mask: Tensor | None = None,
    ) -> Int[Tensor, "batch tokens"]:
        """The next tokens of each text, without the prompt; see `stream`.

        Raises:
            ValueError: When `tokens` is below 1, or as `stream`.
        """
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; at least 1 is needed.")
        found = self.stream(ids, temperature=temperature, seed=seed, mask=mask)
        return torch.stack([next(found)[0] for _ in range(tokens)], 1)

    # ------------------------------------------------------------------------------- saving

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors`, the tied matrix once."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"architecture": type(self).__name__, **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        state = self.state_dict()
        del state["lm_head.weight"]
        tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> RecurrentLM:
        """Read a model that `save_pretrained` wrote, in the type of its weights, for evaluation.

        Called on `RecurrentLM` itself it reads any model of this package.

        Raises:
            FileNotFoundError: When one of the two files is missing.
            ValueError: When the folder holds another model, or damaged or unfitting files.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}; a model's folder has config.json and "
                    "model.safetensors."
                )
        try:
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "model.safetensors")
        except (SafetensorError, json.JSONDecodeError) as problem:
            raise ValueError(f"a file of {folder} is damaged: {problem}.") from None
        name = about.pop("architecture", None) if isinstance(about, Mapping) else None
        kind = ARCHITECTURES.get(name or "")
        if kind is None or not issubclass(kind, cls):
            known = [n for n, one in ARCHITECTURES.items() if issubclass(one, cls)]
            raise ValueError(f"{folder} holds a {name}; {', '.join(known)} can be read here.")
        try:
            config = kind.config_class(**about)
        except TypeError:
            raise ValueError(f"config.json of {folder} has not the fields of a {name}.") from None
        return kind._filled(config, tensors, folder)

    @classmethod
    def _filled(cls, config: LMConfig, tensors: Mapping[str, Tensor], folder: Path) -> RecurrentLM:
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        del expected["lm_head.weight"]
        found = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = [n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)]
        if wrong:
            raise ValueError(
                f"{min(wrong)} of {folder} is missing, unknown or of another shape than its "
                f"config.json says ({len(wrong)} tensors in all)."
            )
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        model.lm_head.weight = model.embedding.weight
        return model.requires_grad_().eval()


def lm_loss(
    model: RecurrentLM,
    batch: Int[Tensor, "batch time"] | tuple[Tensor, Tensor],
) -> Float[Tensor, ""]:
    r"""Next-token cross-entropy $\sum_t w_t \ell_t / \sum_t w_t$, in nats: a loss for the trainer.

    Args:
        model: Any model of this package.
        batch: Token ids, or a pair of ids and the weight of each token, both (batch, time).
    """
    ids, weights = batch if isinstance(batch, tuple) else (batch, None)
    return linear_cross_entropy(
        model.hidden(ids)[:, :-1].flatten(0, 1),
        model.lm_head.weight,
        ids[:, 1:].flatten(),
        None if weights is None else weights[:, 1:].flatten(),
    )
