r"""RETRO: a decoder that reads retrieved chunks, trained so or fitted to a frozen decoder.

In some layers, chunked cross-attention stands between attention and feed-forward:
$H \leftarrow H + \mathrm{Attn}(H)$, $H \leftarrow H + \mathrm{CCA}(H, E)$,
$H \leftarrow H + \mathrm{FFW}(H)$. The neighbours are encoded once, at the first of these layers.
*RETRO-fitting* trains only the encoder and the cross-attention; the decoder stays as it is, and
without neighbours it predicts as before.

Borgeaud et al., "Improving language models by retrieving from trillions of tokens", 2022,
arXiv 2112.04426, algorithm 1 and section 4.2 (RETRO-fitting).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from effnb.core.checks import check_loaded
from effnb.core.modules import clone, exchange, refuse_encoder_decoder, shared_skeleton
from effnb.core.sublayers import find_sublayers
from effnb.design.retrieval.checks import check_count, check_ids
from effnb.design.retrieval.chunked_attention import ChunkedCrossAttention
from effnb.design.retrieval.neighbour_encoder import NeighbourEncoder, embed_neighbours


class _Retrieved:
    """What the layers of one pass share: the neighbours, and their encoding once it is made."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is retrieved."""
        self.embedded: Tensor | None = None
        self.present: Tensor | None = None
        self.encoded: Tensor | None = None
        self.streams: dict[int, Tensor] = {}


class _Note:
    """Notes the residual stream that enters a block; an object, so that copies copy it."""

    def __init__(self, retrieved: _Retrieved, number: int) -> None:
        self.retrieved, self.number = retrieved, number

    def __call__(self, block: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        self.retrieved.streams[self.number] = given[0] if given else named["hidden_states"]


class _WithNeighbours(nn.Module):
    """Attention's projection, with what the row reads from neighbours added to its output."""

    def __init__(self, base: nn.Module, layer: int, owner: Retro) -> None:
        super().__init__()
        self.base = base
        self.layer = layer
        object.__setattr__(self, "owner", owner)  # no submodule: it holds this module itself

    def forward(self, inputs: Tensor) -> Tensor:
        """`base(inputs)`, and the cross-attention of the residual stream after it."""
        output = self.base(inputs)
        return output + self.owner.reading(self.layer, output)


class Retro(nn.Module):
    """A decoder with an encoder of neighbours and chunked cross-attention in some of its layers.

    Attributes:
        decoder: The decoder.
        encoder: Encodes the neighbours.
        cross: The cross-attention of each layer that has one, by the layer's number.
        layers: These numbers, counted from 0.
        chunk: Tokens of a chunk.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        layers: Sequence[int],
        chunk: int = 64,
        heads: int = 4,
        encoder_layers: int = 1,
        frozen: bool = True,
        seed: int = 0,
    ) -> None:
        """Join a decoder with what reads neighbours; the given decoder stays as it was.

        The cross-attention starts with an output of 0: the model predicts what the decoder does
        until it is trained. (The paper does not say how its weights start.)

        Args:
            decoder: A decoder with one stack of pre-norm blocks.
            layers: Blocks that read neighbours, counted from 0.
            chunk: Tokens of a chunk; a neighbour has up to twice as many.
            heads: Heads of the new attention.
            encoder_layers: Layers of the encoder.
            frozen: Whether the decoder's weights are shared and not trained (RETRO-fitting);
                otherwise they are copied, and trained too.
            seed: Seed of the new weights.

        Raises:
            ValueError: When a layer does not exist or is named twice, or the decoder is none that
                can be joined.
        """
        super().__init__()
        check_loaded(decoder)
        refuse_encoder_decoder(decoder, "RETRO")
        check_count("chunk", chunk)
        found = find_sublayers(decoder, "attention_out", "feedforward_in")
        self.layers = _check_layers(layers, len(found))
        if any(found[i].norm for i in self.layers):
            raise ValueError("the decoder's blocks end in a norm; RETRO joins pre-norm blocks.")
        self.chunk, self.frozen = chunk, frozen
        # Weights may be shared, modules may not: these are the new model's own.
        self.decoder = shared_skeleton(decoder) if frozen else _copied(decoder)
        width = found[0].width
        sizes = {"chunk": chunk, "neighbour": 2 * chunk}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = NeighbourEncoder(width, heads, layers=encoder_layers, **sizes)
            self.cross = nn.ModuleDict(
                {str(i): ChunkedCrossAttention(width, heads, **sizes) for i in self.layers}
            )
        any_weight = next(decoder.parameters())
        self.encoder.to(any_weight.device, any_weight.dtype)
        self.cross.to(any_weight.device, any_weight.dtype)
        self._join([found[i] for i in self.layers])

    def _join(self, found: list[Any]) -> None:
        """Put the cross-attention behind attention's projection, where the stream is known."""
        self._retrieved = _Retrieved()
        new = {}
        for number, parts in zip(self.layers, found, strict=True):
            base = self.decoder.get_submodule(parts.attention_out)
            new[base] = _WithNeighbours(base, number, self)
            note = _Note(self._retrieved, number)
            block = self.decoder.get_submodule(parts.block)
            block.register_forward_pre_hook(note, with_kwargs=True)
        exchange(self.decoder, new)
        if self.frozen:
            _hold_still(self.decoder)

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.decoder.config

    def new_parameters(self) -> int:
        """Parameters that the decoder does not have."""
        return sum(p.numel() for m in (self.encoder, self.cross) for p in m.parameters())

    def reading(self, layer: int, attended: Tensor) -> Tensor:
        """What a layer adds to the stream after attention; 0 without neighbours."""
        now = self._retrieved
        if now.embedded is None:
            return torch.zeros_like(attended)
        hidden = now.streams[layer] + attended
        if now.encoded is None:
            now.encoded = self._encode(hidden, now.embedded, now.present)
        return self.cross[str(layer)](hidden, now.encoded, now.present)

    def _encode(self, hidden: Tensor, embedded: Tensor, present: Tensor) -> Tensor:
        """E_u from the rows H_u of each whole chunk at the first layer that reads."""
        batch, chunks = embedded.shape[:2]
        rows = hidden[:, : chunks * self.chunk].reshape(batch, chunks, self.chunk, -1)
        return self.encoder(embedded, present, rows)

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        neighbours: Int[Tensor, "batch chunks k r"] | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """Logits of every position.

        Args:
            input_ids: The texts, without padding on the left.
            neighbours: Tokens of the neighbours of each whole chunk, -1 where there is none; the
                decoder predicts alone when None.
            inputs: Further arguments of the decoder.

        Raises:
            ValueError: When there are not the neighbours of each whole chunk, or they are longer
                than two chunks.
        """
        check_ids(input_ids)
        inputs.pop("labels", None)
        now = self._retrieved
        now.clear()
        if neighbours is not None and neighbours.numel():
            self._check_neighbours(input_ids, neighbours)
            table = self.decoder.get_input_embeddings()
            now.embedded, now.present = embed_neighbours(table, neighbours)
        try:
            # A cache would skip the rows that were computed before; chunks need them.
            found = self.decoder(input_ids=input_ids, **{**inputs, "use_cache": False})
        finally:
            now.clear()
        return CausalLMOutput(logits=found.logits)

    def _check_neighbours(self, ids: Tensor, neighbours: Tensor) -> None:
        wanted = (len(ids), ids.shape[1] // self.chunk)
        if neighbours.ndim != 4 or neighbours.shape[:2] != wanted:
            raise ValueError(
                f"the neighbours have shape {tuple(neighbours.shape)}; it must be {wanted} for the "
                "texts and their whole chunks, then neighbours and tokens."
            )
        if neighbours.shape[3] > 2 * self.chunk:
            raise ValueError(
                f"a neighbour has {neighbours.shape[3]} tokens; at most {2 * self.chunk} fit, a "
                "chunk and its continuation."
            )


def _check_layers(layers: Sequence[int], blocks: int) -> tuple[int, ...]:
    chosen = tuple(sorted(layers))
    if not chosen:
        raise ValueError("no layer reads neighbours; name at least one.")
    for number in chosen:
        check_count("a layer", number, blocks - 1, "blocks counted from 0", least=0)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"the layers {list(chosen)} name one twice.")
    return chosen


def _hold_still(decoder: nn.Module) -> None:
    """Parameters of the same memory that are not trained; what was tied stays tied."""
    held: dict[int, nn.Parameter] = {}
    for module in decoder.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in held:
                held[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            setattr(module, leaf, held[id(parameter)])


def _copied(decoder: nn.Module) -> nn.Module:
    copied = clone(decoder)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def retro_loss(model: Retro, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    r"""Mean $-\ln p$ of every token but the first, in nats, with the batch's neighbours.

    For `effnb.core.training.train`: a batch has `input_ids` and `neighbours`.
    """
    ids = batch["input_ids"]
    logits = model(ids, batch.get("neighbours")).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def readers(time: int, chunk: int) -> Bool[Tensor, "time chunks"]:
    r"""Which rows of a text read the neighbours of which chunk, in one layer.

    Row $t$ reads those of chunk $u = \lfloor (t + 1) / m \rfloor - 1$; none where $u < 0$.

    Raises:
        ValueError: When a number is below 1.
    """
    check_count("time", time)
    check_count("chunk", chunk)
    rows = torch.arange(time)
    return ((rows + 1) // chunk - 1)[:, None] == torch.arange(time // chunk)
