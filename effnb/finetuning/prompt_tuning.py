r"""Prompt tuning: train vectors in front of the embedded text, and nothing else.

The model reads $X' = [P; E(x)]$ with $P \in \mathbb{R}^{p \times d}$ in place of the embedded text
$E(x)$. Only $P$ is trained, $p\,d$ numbers. It should start at the embeddings' own scale: from rows
of the table, at random or those of a text that says what the task is, or from random numbers of the
table's spread. (Numbers of spread 1 in front of embeddings of spread 0.02 drown the text.)

A prompt is the first thing the model reads, so no weight can take it up. The text's positions begin
behind it; outside, masks, positions, caches and the length of what comes out are those of the text,
and labels need no padding (the text's first token is not predicted from the prompt). Where a model
pools its first token (BERT), that is the text's first.

Lester, Al-Rfou, Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv
2104.08691.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.delta_files import attach_state
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import attach_deltas, check_name, hosts, key_of, refuse_rounded_inputs
from effnb.core.modules import Model
from effnb.core.virtual_tokens import (
    Computed,
    backbone,
    check_length,
    fresh_cache,
    give_back,
    named,
    outermost,
    refuse_checkpointing,
    shape_of,
    study,
    text_mask,
    text_positions,
    virtual_cache,
    widened,
    widened_at_first,
)
from effnb.finetuning import peft_files

STARTS = ("vocabulary", "random")


class PromptTuning(Delta):
    """Vectors in front of the embedded text of one backbone.

    Attributes:
        prompt: $P$, (length, dim).
    """

    kind = "prompt"
    in_place = True
    prompt: Float[Tensor, "length dim"]

    def __init__(self, base: nn.Module, prompt: Float[Tensor, "length dim"]) -> None:
        """Take the vectors themselves; `attach` makes them.

        Raises:
            ValueError: When the prompt is empty, of another width than the model's embeddings, or
                as long as its context, or the model could lose sight of it.
        """
        super().__init__()
        table = base.get_input_embeddings().weight
        if prompt.ndim != 2 or not len(prompt) or prompt.shape[1] != table.shape[1]:
            raise ValueError(
                f"a prompt consists of vectors of {table.shape[1]} numbers here, one at least; "
                f"found the shape {tuple(prompt.shape)}."
            )
        self.reader = study(base)
        if self.reader.sliding:
            raise ValueError(
                f"{type(base).__name__} has layers that only attend to near tokens and would lose "
                "sight of a prompt; prompt tuning needs attention to everything."
            )
        check_length(self.reader, 1, len(prompt), "a prompt")
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        self.prompt = nn.Parameter(prompt.detach().clone().to(table.device, dtype))

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """Run the backbone on a text behind the prompt, or go on with one it began."""
        given = named(base, arguments, keywords)
        cache = given.get("past_key_values")
        off = any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
        if cache is None and not (off and base.training):  # then the layers get no cache
            cache = fresh_cache(base, self.reader, given)
        own = outermost(cache)
        first = own is None or not int(own.get_seq_length())
        length = len(self.prompt)
        past = 0 if cache is None else int(cache.get_seq_length())
        check_length(self.reader, past + shape_of(given)[1], length, "a prompt")
        mask = text_mask(given, past)
        positions = text_positions(given, self.reader, mask, length)
        if own is not None:
            refuse_checkpointing(base)
            cache = virtual_cache(cache, self._computed(own, first), first)
        if first:
            self._prepend(base, given, mask, positions, past)
        else:
            given |= {"attention_mask": widened(mask, length)}
            given |= {} if positions is None else {"position_ids": positions}
        output = run(**given | {"past_key_values": cache, "return_dict": True})
        if not first:
            return give_back(output, own, keywords)
        pooler = getattr(base, "pooler", None)
        if pooler is not None and output.get("pooler_output") is not None:
            output["pooler_output"] = pooler(output["last_hidden_state"][:, length:])
        return give_back(output, own, keywords, length)

    def _prepend(
        self,
        base: nn.Module,
        given: dict[str, Any],
        mask: Any,
        positions: Tensor | None,
        past: int,
    ) -> None:
        """Put the prompt in front of what the model is given."""
        text = given.get("inputs_embeds")
        if text is None:
            text = base.get_input_embeddings()(given["input_ids"])
        length, batch = len(self.prompt), len(text)
        prompt = self.prompt.to(text).expand(batch, -1, -1)
        # X' = [P; E(x)]
        given |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, text], 1)}
        given["attention_mask"] = widened_at_first(mask, length, past, self.reader.causal)
        if positions is not None:
            start = past + (self.reader.first_position or 0)
            ahead = torch.arange(start, start + length, device=positions.device)
            ahead = ahead.expand(len(positions), -1)
            given["position_ids"] = torch.cat([ahead, positions], 1)
        kinds = given.get("token_type_ids")
        if kinds is not None:
            given["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), length), kinds], 1)

    def _computed(self, own: Any, first: bool) -> Computed:
        """Where the prompt's keys and values lie that belong to a caller's cache.

        Raises:
            ValueError: When the cache was filled without this prompt.
        """
        known = vars(own).setdefault("_prompts", {})
        key = self.prompt.data_ptr()
        if first:
            known[key] = Computed(len(self.prompt))
        elif key not in known:
            raise ValueError(
                "the cache was filled without this prompt; start with an empty one, or None."
            )
        return known[key]

    def merged(self, base: nn.Module) -> nn.Module:
        """Refuse."""
        raise ValueError(
            "a prompt is a part of what the model reads, which no weight can take up; keep it "
            "attached."
        )

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> PromptTuning:
        """Make the prompt that a file's tensor fits into."""
        if set(tensors) != {"prompt"}:
            raise ValueError(f"a prompt is one matrix, prompt; found {', '.join(tensors)}.")
        if not hasattr(base, "get_input_embeddings"):
            raise ValueError(
                f"a prompt sits on a whole transformer; this is a {type(base).__name__}."
            )
        return cls(base, tensors["prompt"], **settings)

    def extra_repr(self) -> str:
        """How many vectors of which width."""
        return f"length={self.prompt.shape[0]}, dim={self.prompt.shape[1]}"


def start_values(
    table: Float[Tensor, "vocabulary dim"],
    length: int,
    start: str | Sequence[int] | Tensor,
    generator: torch.Generator,
) -> Float[Tensor, "length dim"]:
    """Vectors for a prompt to start from.

    Args:
        table: The model's embeddings.
        length: How many.
        start: "vocabulary", "random", or token ids, repeated or cut to the length; see `attach`.
        generator: Where random choices come from.

    Raises:
        ValueError: When the start is none of these, or ids are not in the vocabulary.
    """
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(
                f"start is {start!r}; choose one of {', '.join(STARTS)}, or give token ids."
            )
        if start == "random":
            noise = torch.randn(length, table.shape[1], generator=generator).to(table.device)
            return table.mean(0).float() + noise * table.float().std(0)
        ids = torch.randint(len(table), (length,), generator=generator)
    else:
        ids = torch.as_tensor(start).flatten().cpu()
        inside = len(ids) and not ids.is_floating_point() and int(ids.min()) >= 0
        if not inside or int(ids.max()) >= len(table):
            raise ValueError(f"a prompt starts from ids, one or more, of 0 to {len(table) - 1}.")
        ids = ids.repeat(-(-length // len(ids)))[:length]
    return table[ids.to(table.device)]


def attach(
    model: Model,
    name: str = "default",
    *,
    length: int | None = None,
    start: str | Sequence[int] | Tensor = "vocabulary",
    seed: int = 0,
) -> Model:
    """Freeze a model and put trainable vectors in front of the texts that it reads.

    Args:
        model: A Hugging Face decoder whose layers attend to everything, or an encoder; it is not
            changed.
        name: What to call this delta.
        length: p, how many vectors; 100 in the paper. By default 20, or the number of ids given.
        start: "vocabulary" starts from embeddings of random tokens, "random" from numbers of the
            embeddings' mean and spread. Token ids, such as `tokenizer(text).input_ids`, start from
            their embeddings, repeated or cut to the length.
        seed: Seed of random starts.

    Returns:
        A new model on the same frozen tensors; only the vectors require gradients.

    Raises:
        ValueError: A length below 1, an unknown start, a name that is taken, a prompt as long as
            the context, or a model that cannot read one.
    """
    if length is None:
        length = 20 if isinstance(start, str) else max(1, torch.as_tensor(start).numel())
    if length < 1:
        raise ValueError(f"length is {length}; a prompt has at least 1 vector.")
    check_loaded(model)
    check_name(model, name)
    refuse_rounded_inputs(model)
    path = backbone(model)
    base = model.get_submodule(path)
    generator = torch.Generator().manual_seed(seed)
    embedding = base.get_input_embeddings()
    table = embedding.weight.detach()
    vectors = start_values(table, length, start, generator)
    return attach_deltas(model, name, {path: PromptTuning(base, vectors)})


# --- the files of the library peft ----------------------------------------------------------------

_KNOWN: peft_files.Known = {
    "peft_type": ("PROMPT_TUNING",),
    **peft_files.VIRTUAL,
    # How training started.
    "prompt_tuning_init": ("RANDOM", "TEXT", "SAMPLE_VOCAB"),
    "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None,
    "tokenizer_kwargs": None,
    # A classifier of sequences pools the first vector of the prompt there, and the first token of
    # the text here.
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "TOKEN_CLS", "QUESTION_ANS"),
}


def save_peft(model: nn.Module, name: str, folder: str | os.PathLike) -> None:
    """Write a prompt as a folder that `peft.PeftModel.from_pretrained` reads.

    Raises:
        ValueError: When no prompt of that name is attached.
    """
    prompt = next(iter(hosts(model, name).values())).deltas[name]
    if not isinstance(prompt, PromptTuning):
        raise ValueError(f"the delta {name!r} is of kind {prompt.kind!r}, not a prompt.")
    about = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM" if prompt.reader.causal else "FEATURE_EXTRACTION",
        "token_dim": prompt.prompt.shape[1],
        "prompt_tuning_init": "RANDOM",
    }
    peft_files.write_virtual_tokens(prompt.prompt, about, folder)


def load_peft(model: Model, folder: str | os.PathLike, name: str = "default") -> Model:
    """Attach a prompt that the library peft saved.

    Raises:
        ValueError: When the folder holds another method, a setting that is not understood, or
            vectors of another width than the model's embeddings.
        FileNotFoundError: When a file is missing.
    """
    table = peft_files.read_virtual_tokens(folder, _KNOWN)
    return attach_state(model, name, "prompt", {}, {key_of(backbone(model), "prompt"): table})
