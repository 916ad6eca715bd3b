r"""kNN-LM: a language model that looks up what followed the contexts most like the present one.

Every token of a text gives an entry: the key $f(c)$ is the model's own representation of the
context $c$, the value the token that came next. The model predicts with

$$p(y \mid c) = \lambda\, p_\text{kNN}(y \mid c) + (1 - \lambda)\, p_\text{LM}(y \mid c), \qquad
p_\text{kNN}(y \mid c) \propto
\sum_{(k_i, v_i) \in \mathcal N} 1[v_i = y]\, e^{-d(k_i, f(c)) / \tau}$$

over the $k$ nearest entries $\mathcal N$. Nothing is trained.

Khandelwal, Levy, Jurafsky, Zettlemoyer, Lewis, "Generalization through Memorization: Nearest
Neighbor Language Models", 2020, arXiv 1911.00172, eqs. 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from effnb.core.context import check_context, context_limit
from effnb.core.modules import output_heads
from effnb.core.sublayers import find_sublayers
from effnb.design.retrieval.checks import check_count, check_ids, check_positive, check_share
from effnb.design.retrieval.datastore import Datastore, FaissIndex, Neighbours

KEYS = ("feedforward", "output")
"""Where keys are read: the input of the last feed-forward, or of the output layer."""


def knn_log_probabilities(
    distances: Float[Tensor, "*queries k"],
    values: Int[Tensor, "*queries k"],
    vocabulary: int,
    temperature: float = 1.0,
) -> Float[Tensor, "*queries vocabulary"]:
    r"""$\ln p_\text{kNN}(y \mid c)$ of every token; minus infinity where no neighbour has it.

    Args:
        distances: Squared distances of the neighbours; infinite for one that does not count.
        values: Their tokens.
        vocabulary: Number of tokens.
        temperature: $\tau$; the larger, the more alike the neighbours count.

    Raises:
        ValueError: When the shapes differ, a token lies outside the vocabulary, or the temperature
            is not above 0.

    Source:
        Khandelwal et al., 2020, arXiv 1911.00172, eq. 2; temperature: knnlm's code.
    """
    check_positive("temperature", temperature)
    _check_neighbours(distances, values)
    if int(values.min()) < 0 or int(values.max()) >= vocabulary:
        raise ValueError(
            f"the neighbours' tokens lie between {int(values.min())} and {int(values.max())}; "
            f"they must lie between 0 and {vocabulary - 1}."
        )
    # w_i = softmax_i(−d_i / τ), over the neighbours, not over the vocabulary
    weights = (-distances.float() / temperature).softmax(-1)
    p = weights.new_zeros(*values.shape[:-1], vocabulary)
    # p(y) = Σ_i 1[v_i = y] w_i
    return p.scatter_add(-1, values, weights).log()


def knn_target_log_probabilities(
    distances: Float[Tensor, "*queries k"],
    values: Int[Tensor, "*queries k"],
    targets: Int[Tensor, "*queries"],
    temperature: float = 1.0,
) -> Float[Tensor, "*queries"]:
    r"""$\ln p_\text{kNN}$ of one token per query, without the vocabulary.

    Raises:
        ValueError: When the shapes differ or the temperature is not above 0.
    """
    check_positive("temperature", temperature)
    _check_neighbours(distances, values)
    if targets.shape != values.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; there must be one for each query, "
            f"{tuple(values.shape[:-1])}."
        )
    weights = (-distances.float() / temperature).softmax(-1)
    return (weights * (values == targets[..., None])).sum(-1).log()


def interpolate(
    log_lm: Float[Tensor, "*shape"], log_knn: Float[Tensor, "*shape"], lam: float
) -> Float[Tensor, "*shape"]:
    r"""$\ln(\lambda\, p_\text{kNN} + (1 - \lambda)\, p_\text{LM})$, from logarithms.

    Args:
        log_lm: $\ln p_\text{LM}$.
        log_knn: $\ln p_\text{kNN}$; minus infinity is allowed.
        lam: $\lambda$, the share of the neighbours, from 0 to 1.

    Raises:
        ValueError: When the share lies outside [0, 1] or the shapes differ.

    Source:
        Khandelwal et al., 2020, arXiv 1911.00172, eq. 3.
    """
    check_share("lambda", lam)
    if log_lm.shape != log_knn.shape:
        raise ValueError(
            f"the model's logarithms have shape {tuple(log_lm.shape)}, the neighbours' "
            f"{tuple(log_knn.shape)}; they must agree."
        )
    if lam == 0:
        return log_lm
    if lam == 1:
        return log_knn
    # ln(λ p_kNN + (1 − λ) p_LM) = logaddexp(ln λ + ln p_kNN, ln(1 − λ) + ln p_LM)
    return torch.logaddexp(math.log(lam) + log_knn, math.log1p(-lam) + log_lm)


def _check_neighbours(distances: Tensor, values: Tensor) -> None:
    if distances.shape != values.shape or not distances.shape[-1:].numel():
        raise ValueError(
            f"distances have shape {tuple(distances.shape)}, values {tuple(values.shape)}; they "
            "must agree, with at least one neighbour."
        )


class KeyReader:
    """Reads the keys of a model: one vector for each token of a text.

    Attributes:
        model: The model; it is only run.
        at: "feedforward" or "output".
        module: Name of the module whose input is read.
    """

    def __init__(self, model: nn.Module, at: str = "feedforward") -> None:
        """Find where to read.

        Args:
            model: A decoder that runs on `input_ids`.
            at: "feedforward" reads the input of the last block's feed-forward, after its norm, as
                the paper does; "output" the input of the output layer.

        Raises:
            ValueError: When there is no such place.
        """
        if at not in KEYS:
            raise ValueError(f'keys are read at "{at}"; it must be "feedforward" or "output".')
        self.model, self.at = model, at
        if at == "feedforward":
            self.module = find_sublayers(model, "feedforward_in")[-1].feedforward_in
        else:
            heads = output_heads(model)
            if not heads:
                raise ValueError("the model has no output layer whose input could be the key.")
            self.module = heads[0]

    @torch.no_grad()
    def __call__(
        self, ids: Int[Tensor, "batch time"], **inputs: Any
    ) -> tuple[Float[Tensor, "batch time vocabulary"], Float[Tensor, "batch time width"]]:
        """Logits and keys.

        Raises:
            ValueError: When there are no tokens.
        """
        check_ids(ids)
        read: list[Tensor] = []
        hook = self.model.get_submodule(self.module).register_forward_pre_hook(
            lambda _, given: read.append(given[0])
        )
        try:
            logits = self.model(input_ids=ids, **inputs).logits
        finally:
            hook.remove()
        return logits, read[-1].view(*ids.shape, -1)


def build_datastore(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    context: int | None = None,
    at: str = "feedforward",
    dtype: torch.dtype = torch.float16,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Datastore:
    """One entry for every token of the documents that another one follows.

    A document is cut into windows of `context` tokens, each followed by its last token's successor.

    Args:
        model: The decoder that makes the keys; it is only run.
        documents: Tokens of each.
        context: Tokens of a window; 256 when None, or as many as the model has positions for.
        at: Where keys are read.
        dtype: How keys are kept.
        batch_size: Windows that run at once.
        progress: Told how many windows of how many are done.

    Raises:
        ValueError: When no document has two tokens, or the context does not fit the model.
    """
    if context is None:
        context = min(256, context_limit(model) or 256)
    check_count("context", context)
    check_count("batch_size", batch_size)
    check_context(model, context)
    device = next(model.parameters()).device
    windows: list[tuple[int, Sequence[int]]] = []
    for number, ids in enumerate(documents):
        for start in range(0, len(ids) - 1, context):
            windows.append((number, ids[start : start + context + 1]))
    if not windows:
        raise ValueError("no document has two tokens: the datastore would be empty.")
    reader = KeyReader(model, at)
    keys, values, origin = [], [], []
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        length = max(len(ids) for _, ids in part) - 1
        # Padded at the end: no token of a decoder reads what comes after it.
        rows = torch.tensor([[*ids[:-1], *[0] * (length + 1 - len(ids))] for _, ids in part])
        found = reader(rows.to(device))[1]
        for (number, ids), states in zip(part, found, strict=True):
            keys.append(states[: len(ids) - 1].to(dtype))
            values.append(torch.tensor(ids[1:], device=device))
            origin.append(torch.full((len(ids) - 1,), number, device=device))
        if progress:
            progress(first + len(part), len(windows))
    return Datastore(torch.cat(keys), torch.cat(values), torch.cat(origin))


@dataclass(frozen=True)
class Looked:
    r"""A text that was looked up once: any λ, smaller k and τ follow without another search.

    Attributes:
        log_lm: The model's own $\ln p$ of each token that came.
        targets: These tokens.
        neighbours: What the datastore gave for each.
    """

    log_lm: Float[Tensor, " queries"]
    targets: Int[Tensor, " queries"]
    neighbours: Neighbours

    def losses(
        self, lam: float, k: int | None = None, temperature: float = 1.0
    ) -> Float[Tensor, " queries"]:
        r"""$-\ln p$ of each token, in nats.

        Raises:
            ValueError: When a setting lies outside its range.
        """
        near = self.neighbours if k is None else self.neighbours.first(k)
        check_share("lambda", lam)
        log_knn = knn_target_log_probabilities(
            near.distances, near.values, self.targets, temperature
        )
        return -interpolate(self.log_lm, log_knn, lam)


class KnnLm(nn.Module):
    r"""A decoder with a datastore; it is called like the decoder, its logits are $\ln p$.

    Attributes:
        model: The decoder.
        store: What it looks things up in.
        lam: Share of the neighbours.
        k: How many count.
        temperature: $\tau$.
        search: How they are found: the datastore itself or an index over it.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Datastore | FaissIndex,
        *,
        lam: float = 0.25,
        k: int = 64,
        temperature: float = 1.0,
        at: str = "feedforward",
    ) -> None:
        """Join a decoder and a datastore.

        Args:
            model: The decoder; it is only run.
            store: A datastore of its keys, or an index over one.
            lam: Share of the neighbours, from 0 to 1.
            k: Neighbours that count.
            temperature: Divides squared distances.
            at: Where keys are read, as when the datastore was built.

        Raises:
            ValueError: When a setting lies outside its range.
        """
        super().__init__()
        entries = store.store if isinstance(store, FaissIndex) else store
        self.lam = check_share("lambda", lam)
        self.k = check_count("k", k, len(entries), "entries of the datastore")
        self.temperature = check_positive("temperature", temperature)
        self.model, self.search, self.store = model, store, entries
        self.reader = KeyReader(model, at)

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.model.config

    def changed(self, **settings: Any) -> KnnLm:
        """The same decoder and datastore with other `lam`, `k` or `temperature`.

        Raises:
            ValueError: When a setting lies outside its range, or is none of these.
        """
        known = {"lam": self.lam, "k": self.k, "temperature": self.temperature}
        if unknown := sorted(settings.keys() - known.keys()):
            raise ValueError(f"{unknown[0]} is no setting; there are lam, k and temperature.")
        return KnnLm(self.model, self.search, at=self.reader.at, **(known | settings))

    @torch.no_grad()
    def forward(self, input_ids: Int[Tensor, "batch time"], **inputs: Any) -> CausalLMOutput:
        """Logits of every position: the logarithm of the mixture.

        Where the mixture is 0 (only with λ = 1) the logit is that of the least number that is not.
        """
        inputs.pop("labels", None)
        logits, keys = self.reader(input_ids, **inputs)
        log_lm = logits.float().log_softmax(-1)
        if self.lam == 0:
            return CausalLMOutput(logits=log_lm)
        near = self.search.search(keys.flatten(0, 1), self.k)
        log_knn = knn_log_probabilities(
            near.distances, near.values, logits.shape[-1], self.temperature
        )
        mixed = interpolate(log_lm, log_knn.view_as(log_lm), self.lam)
        return CausalLMOutput(logits=mixed.clamp(min=torch.finfo(mixed.dtype).min))

    @torch.no_grad()
    def look_up(
        self,
        ids: Int[Tensor, "batch time"],
        *,
        exclude: Int[Tensor, " batch"] | None = None,
        k: int | None = None,
    ) -> Looked:
        """Search once for every token of some texts but the first.

        Args:
            ids: The texts.
            exclude: Of each text the document in the datastore that it may not find: itself.
            k: Neighbours of each; those of the model when None.

        Raises:
            ValueError: When the shapes do not fit, or FAISS is asked to exclude.
        """
        check_ids(ids)
        if ids.shape[1] < 2:
            raise ValueError("the texts have one token each; nothing foresees it.")
        logits, keys = self.reader(ids)
        log_lm = logits[:, :-1].float().log_softmax(-1)
        targets = ids[:, 1:].flatten()
        queries = keys[:, :-1].flatten(0, 1)
        k = self.k if k is None else k
        if exclude is None:
            near = self.search.search(queries, k)
        elif isinstance(self.search, FaissIndex):
            raise ValueError("an index cannot exclude documents; search the datastore itself.")
        else:
            own = exclude[:, None].expand(-1, ids.shape[1] - 1).flatten()
            near = self.search.search(queries, k, exclude=own)
        own_log = log_lm.flatten(0, 1).gather(1, targets[:, None])[:, 0]
        return Looked(own_log, targets, near)


def with_neighbours(looked: Looked, neighbours: Neighbours) -> Looked:
    """The same text with the neighbours of another search."""
    return replace(looked, neighbours=neighbours)
