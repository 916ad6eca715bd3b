r"""Rotate a model's features, so that no single one stands out, and quantize then.

An orthogonal matrix spreads a feature that is far larger than the rest over all of them. A
transformer whose blocks normalize first does not notice if its residual stream is rotated: the
embeddings write $x Q$ in place of $x$, layers that read the stream undo $Q$, layers that write to
it apply $Q$, and $\operatorname{RMSNorm}(x Q) = \operatorname{RMSNorm}(x)\, Q$ once the norm's
gain $g$ has moved into the layers behind it. Weights $W$ (out, in) and embeddings $E$ become

$$E \leftarrow E Q, \qquad W_{read} \leftarrow W_{read} \operatorname{diag}(g)\, Q, \qquad
  W_{write} \leftarrow Q^\top W_{write}.$$

$Q = \operatorname{diag}(\pm 1)\, H / \sqrt n$ is a Hadamard matrix with random signs; see
`hadamard`.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv 2404.00456.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    find_blocks,
    put_modules,
    refuse_encoder_decoder,
    share,
)
from effnb.core.outliers import norm_offset, norm_readers
from effnb.core.proof import EXACT, ROUNDED, InFloat64, Probe, exact, probes
from effnb.core.watching import block_users
from effnb.inference.quantization.activations import check_inputs, quantize_inputs
from effnb.inference.quantization.formats import Granularity, check_bits, check_granularity
from effnb.inference.quantization.hadamard import check_order, hadamard_transform, random_signs
from effnb.inference.quantization.linear import refuse_quantized
from effnb.inference.quantization.rtn import rtn
from effnb.inference.quantization.smoothquant import check_same_function


class HadamardInputs(nn.Module):
    r"""A layer that rotates its inputs first: $y = f\left(x (H \otimes I_b) / \sqrt{n / b}\right)$.

    With b = 1 the whole input is mixed; with b a head's width, only equal channels of the heads.
    The weight of the wrapped layer has been rotated along, so the function stays.
    """

    def __init__(self, layer: nn.Module, block: int = 1) -> None:
        """Wrap a layer whose weight is rotated already."""
        super().__init__()
        self.layer, self.block = layer, block

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The wrapped layer's weight."""
        return self.layer.weight

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Rotate, then apply the layer."""
        return self.layer(_mix(inputs, self.block))

    def extra_repr(self) -> str:
        """What is mixed."""
        return f"block={self.block}"


def _mix(x: Tensor, block: int) -> Tensor:
    """$x (H ⊗ I)$: a transform across blocks, channel by channel."""
    if block == 1:
        return hadamard_transform(x)
    return hadamard_transform(x.unflatten(-1, (-1, block)).transpose(-1, -2)).mT.flatten(-2)


class PlainRMSNorm(nn.Module):
    r"""$x / \sqrt{\operatorname{mean}(x^2) + \epsilon}$: what is left of a LayerNorm.

    Its gain and bias have moved into the layers behind it, and its inputs have mean 0 already.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Divide by the root mean square."""
        working = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(working.square().mean(-1, keepdim=True) + self.eps)
        return (working * scale).to(x.dtype)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`: the model's class would load its LayerNorms again.

    Raises:
        ValueError: Always; says what can be saved instead.
    """
    raise ValueError(
        "rotation has turned this model's LayerNorms into RMSNorms, which its class does not load; "
        "save the original and the seed, and rotate again."
    )


@dataclass(frozen=True)
class _Stream:
    """Who reads and writes the residual stream, by name."""

    width: int
    norms: dict[str, list[str]]
    writers: list[str]
    embeddings: list[str]
    prefix: str
    signs: Tensor
    centred: bool

    def turn(self, rows: Tensor) -> Tensor:
        """Rows times Q."""
        return hadamard_transform(rows * self.signs.to(rows.device))

    def centre(self, rows: Tensor) -> Tensor:
        """Rows less their mean, where there are LayerNorms, which subtract it."""
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def moved(self, hidden: Tensor) -> Tensor:
        """What the rotated model has in the place of some hidden states."""
        return self.turn(self.centre(hidden))

    def within(self, blocks: Iterable[str]) -> _Stream:
        """The part of some blocks."""
        starts = tuple(f"{name}." for name in blocks)
        inside = lambda n: n.startswith(starts)  # noqa: E731
        norms = {n: r for n, r in self.norms.items() if inside(n)}
        return replace(
            self, norms=norms, writers=[n for n in self.writers if inside(n)], embeddings=[]
        )

    def outside(self) -> _Stream:
        """The part that no block holds: embeddings, the final norm and the output head."""
        norms = {n: r for n, r in self.norms.items() if not n.startswith(f"{self.prefix}.")}
        return replace(self, norms=norms, writers=[])


def _stream(model: nn.Module, seed: int) -> _Stream:
    prefix, _ = find_blocks(model)
    modules = dict(model.named_modules())
    ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    readers = norm_readers(model, ids)
    inside = {n: r for n, r in readers.items() if n.startswith(f"{prefix}.")}
    if not inside:
        raise ValueError("no norm of this model's blocks feeds a linear layer directly.")
    width = modules[next(iter(inside))].weight.numel()
    norms = [
        name
        for name, m in modules.items()
        if "norm" in type(m).__name__.lower()
        and getattr(m, "weight", None) is not None
        and m.weight.numel() == width
    ]
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    heads = [n for n in linears if not n.startswith(f"{prefix}.")]
    final = [n for n in norms if not n.startswith(f"{prefix}.")]
    if len(final) != 1 or len(heads) != 1 or modules[heads[0]].in_features != width:
        raise ValueError(
            "only language models with one final norm and one output head behind it can be rotated."
        )
    found = {n: inside[n] for n in norms if n in inside} | {final[0]: heads}
    reading = set(itertools.chain(*found.values()))
    writers = [n for n in linears if n not in reading]
    odd = [n for n in norms if n not in found] + [
        n for n in writers if modules[n].out_features != width
    ]
    if odd:
        raise ValueError(f"{odd[0]} is neither before nor behind a norm as in a pre-norm block.")
    embeddings = [
        n for n, m in modules.items() if isinstance(m, nn.Embedding) and m.embedding_dim == width
    ]
    check_order(width, "the model's width")
    centred = any(isinstance(modules[n], nn.LayerNorm) for n in found)
    return _Stream(width, found, writers, embeddings, prefix, random_signs(width, seed), centred)


class _Weights:
    """Parameters that are rewritten in float64, and rounded to their types at the end."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[nn.Module, str], Tensor] = {}

    def set(self, module: nn.Module, key: str, value: Tensor) -> None:
        """Put a value in the place of a parameter, or of a bias that was not there."""
        old = getattr(module, key)
        self._kinds.setdefault((module, key), module.weight if old is None else old)
        setattr(module, key, nn.Parameter(value.contiguous(), requires_grad=False))

    def round(self) -> None:
        """Round what was set to the types of what was there, on its devices."""
        for (module, key), like in self._kinds.items():
            new = getattr(module, key).detach().to(like.dtype).to(like.device)
            setattr(module, key, nn.Parameter(new, like.requires_grad))
        self._kinds.clear()


def _fold_norms(result: nn.Module, stream: _Stream, weights: _Weights) -> None:
    """Move gains and biases into the readers; turn LayerNorm into RMSNorm of a centred stream."""
    folded: set[str] = set()  # layers behind the norms of several blocks, whose gains are equal
    for name, readers in stream.norms.items():
        norm = result.get_submodule(name)
        offset = norm_offset(norm)
        gain, bias = exact(norm.weight) + offset, getattr(norm, "bias", None)
        for layer in [result.get_submodule(n) for n in readers if n not in folded]:
            W = exact(layer.weight)
            if bias is not None:
                old = 0 if layer.bias is None else exact(layer.bias)
                weights.set(layer, "bias", old + W @ exact(bias))
            weights.set(layer, "weight", W * gain)
        folded |= set(readers)
        if isinstance(norm, nn.LayerNorm):
            put_modules(result, {name: PlainRMSNorm(norm.eps)})
            result.save_pretrained = _refuse_to_save
        else:
            weights.set(norm, "weight", torch.ones_like(gain) - offset)
    if stream.centred:
        for name in stream.embeddings:
            E = result.get_submodule(name)
            weights.set(E, "weight", stream.centre(exact(E.weight)))
        for layer in map(result.get_submodule, stream.writers):
            weights.set(layer, "weight", stream.centre(exact(layer.weight).T).T)
            if layer.bias is not None:
                weights.set(layer, "bias", stream.centre(exact(layer.bias)))


def _check_gains(model: nn.Module, stream: _Stream) -> None:
    """Refuse a layer behind norms of different gains: it cannot take in all of them.

    Raises:
        ValueError: The sentence names the layer and two norms.
    """
    behind: dict[str, str] = {}
    for norm, readers in stream.norms.items():
        mine = model.get_submodule(norm)
        for reader in readers:
            other = behind.setdefault(reader, norm)
            first = model.get_submodule(other)
            if not all(
                torch.equal(value, first.get_parameter(name))
                for name, value in mine.named_parameters()
            ):
                raise ValueError(
                    f"{reader} is used in several blocks, and the gains of {other} and {norm} "
                    "differ: a rotation moves the gain of a norm into the layers behind it, and "
                    "one weight cannot take in two. Share the norms too (share_layers with what "
                    '"all"), or give every block weights of its own (unshare_layers).'
                )


def _connected(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each block the names of those that it has modules in common with: they turn together."""
    prefix, blocks = find_blocks(model)
    users = block_users(model)
    groups: list[set[nn.Module]] = []
    for together in {users[module] for block in blocks for module in block.modules()}:
        alike = [group for group in groups if group & together]
        groups = [group for group in groups if group not in alike]
        groups.append(set(together).union(*alike))
    found = {}
    for group in groups:
        names = tuple(f"{prefix}.{i}" for i, block in enumerate(blocks) if block in group)
        found |= dict.fromkeys(names, names)
    return found


def _head_sizes(model: nn.Module) -> dict[str, int]:
    """Attention modules whose values can be rotated head by head, with the width of a head."""
    parts = ("v_proj", "o_proj", "head_dim")
    return {
        name: module.head_dim
        for name, module in model.named_modules()
        if all(hasattr(module, part) for part in parts)
    }


def _rotate_heads(result: nn.Module, sizes: dict[str, int], weights: _Weights) -> None:
    """Hadamard within each head on values, undone in the output layer."""
    attentions = [(result.get_submodule(name), size) for name, size in sizes.items()]
    for v, size in {attention.v_proj: size for attention, size in attentions}.items():
        for key in ("weight", "bias"):
            old = getattr(v, key)
            if old is not None:
                rows = exact(old).view(-1, size, *old.shape[1:])
                new = hadamard_transform(rows.transpose(1, -1)).transpose(1, -1)
                weights.set(v, key, new.reshape(old.shape))
    for o, size in {attention.o_proj: size for attention, size in attentions}.items():
        heads = exact(o.weight).unflatten(1, (-1, size))
        weights.set(o, "weight", hadamard_transform(heads).flatten(1))


def _rotate_part(
    result: nn.Module, stream: _Stream, sizes: dict[str, int], online: dict[str, int]
) -> _Weights:
    """Rewrite the layers of one part of the stream, in float64."""
    weights = _Weights()
    _fold_norms(result, stream, weights)
    for name in dict.fromkeys([*stream.embeddings, *itertools.chain(*stream.norms.values())]):
        layer = result.get_submodule(name)
        weights.set(layer, "weight", stream.turn(exact(layer.weight)))
    for layer in map(result.get_submodule, stream.writers):
        weights.set(layer, "weight", stream.turn(exact(layer.weight).T).T)
        if layer.bias is not None:
            weights.set(layer, "bias", stream.turn(exact(layer.bias)))
    _rotate_heads(result, sizes, weights)
    for name, block in online.items():
        layer = result.get_submodule(name)
        weights.set(layer, "weight", _mix(exact(layer.weight), block))
        put_modules(result, {name: HadamardInputs(layer, block)})
    return weights


@dataclass(frozen=True)
class _Part:
    """A block, or the output head, that has been rotated.

    Attributes:
        name: What it is called.
        kind: The class of its model.
        own: The norm of what it adds.
        expected: What it should give.
        run: Runs it as it is now.
    """

    name: str
    kind: str
    own: float
    expected: Tensor
    run: Callable[[], Tensor]

    @property
    def what(self) -> str:
        """The part, for sentences."""
        return f"{self.name} of {self.kind}"


def _check_parts(parts: Iterable[_Part], weights: _Weights) -> None:
    """Refuse parts that compute something else, in float64 or once their weights are rounded.

    Args:
        parts: Those that have some of the weights.
        weights: What was rewritten; rounded on return.
    """
    for part in parts:
        if not float((part.run() - part.expected).norm()) <= EXACT * part.own:
            raise ValueError(
                f"{part.what} would compute something else; its architecture is not that of a "
                "plain pre-norm transformer."
            )
    weights.round()
    for part in parts:
        moved = float((part.run() - part.expected).norm()) / part.own if part.own else 0.0
        if not moved <= ROUNDED:
            raise ValueError(
                f"{part.what}: rounding the rotated weights to the model's type would change "
                f"{moved:.0%} of what it computes; convert the model to float32 first."
            )


def rotate(model: Model, seed: int = 0, *, heads: bool = True, online: bool = False) -> Model:
    r"""The same function with its features rotated; nothing is quantized yet.

    Norm gains move into the layers behind them, a tied output head gets a separate weight, and
    the residual stream is multiplied by `random_hadamard`. A LayerNorm also subtracts the mean:
    whatever writes to the stream is made to write numbers of mean 0, after which it is an RMSNorm.

    Args:
        model: A causal language model whose blocks normalize first (Llama and its kin, GPT-NeoX,
            OPT, …); it is not changed.
        seed: For the signs of $Q$.
        heads: Also rotate each attention head's values, where attention has `v_proj`, `o_proj` and
            `head_dim`; the output layer undoes it.
        online: Also rotate what the writing layers read (after the activation function, and across
            heads), by transforms at run time: their inputs are not on the residual stream. The
            model then has `HadamardInputs` in place of these layers. Without, it stays an ordinary
            model of its class.

    Returns:
        A new model with the same outputs up to rounding.

    Raises:
        ValueError: A model that is quantized already, an architecture that is not as described, a
            width for which there is no Hadamard matrix here, or a model that would compute
            something else: block by block that is tried in float64, and once more with the weights
            rounded to their type. Also a layer that several blocks use behind norms of different
            gains, which one weight cannot take in.
    """
    refuse_quantized(model)
    refuse_encoder_decoder(model, "rotation")
    stream = _stream(model, seed)
    _check_gains(model, stream)
    sizes = _head_sizes(model) if heads else {}
    for name, size in sizes.items():
        check_order(size, f"the width of a head in {name}")
    blocks = {name: sizes.get(name.rpartition(".")[0], 1) for name in stream.writers}
    for name, block in blocks.items() if online else ():
        inputs = model.get_submodule(name).in_features
        check_order(inputs // block, f"the number of inputs of {name}")
    result = share(model)
    kind = type(model).__name__
    with torch.inference_mode(False):  # its parameters can be trained, wherever this is called
        start = last = None
        connected, waiting = _connected(model), []
        for probe in probes(model):
            start = probe.arguments[0] if start is None else start
            last = probe.truth
            waiting.append(_rotated(probe, result, stream, kind))
            group = connected[probe.name]
            if probe.name != group[-1]:  # a later block has modules of this one
                continue
            part = stream.within(group)
            inside = tuple(f"{name}." for name in group)
            weights = _rotate_part(
                result,
                part,
                {n: size for n, size in sizes.items() if n.startswith(inside)},
                {n: blocks[n] for n in part.writers} if online else {},
            )
            _check_parts([block for block in waiting if block.name in group], weights)
            waiting = [block for block in waiting if block.name not in group]
        ends = stream.outside()
        (norm, (head,)), *_ = ends.norms.items()
        logits = _head_output(model, norm, head, last)
        weights = _rotate_part(result, ends, {}, {})
        run = partial(_head_output, result, norm, head, stream.moved(last))
        end = _Part("the output head", kind, float(logits.norm()), logits, run)
        _check_parts([end], weights)
    if getattr(getattr(result, "config", None), "tie_word_embeddings", False):
        result.config.tie_word_embeddings = False
    _check_start(model, stream.moved(start), next(probes(result)).arguments[0])
    check_same_function(model, result)
    return result


def _rotated(probe: Probe, result: nn.Module, stream: _Stream, kind: str) -> _Part:
    """A block once it is rotated, and what it should give; the float64 copy is let go."""
    given = (stream.moved(probe.arguments[0]), *probe.arguments[1:])
    run = partial(_run, result, probe.name, given, probe.keywords)
    return _Part(probe.name, kind, probe.own, stream.moved(probe.truth), run)


def _run(model: nn.Module, name: str, arguments: tuple, keywords: dict[str, Any]) -> Tensor:
    """What the block of that name gives in float64."""
    return Probe.of(name, model.get_submodule(name), arguments, keywords).truth


def _head_output(model: nn.Module, norm: str, head: str, hidden: Tensor) -> Tensor:
    """The final norm and the output head of a model in float64."""
    parts = [copy.deepcopy(model.get_submodule(name)) for name in (norm, head)]
    if hidden.device.type == "cpu":
        parts = [part.cpu() for part in parts]
    with torch.no_grad(), InFloat64():
        for part in parts:
            hidden = part.double()(hidden)
    return hidden


def _check_start(model: nn.Module, expected: Tensor, found: Tensor) -> None:
    """Refuse a model whose first block does not read the rotated embeddings."""
    narrow = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not float((found - expected).norm()) <= (0.02 if narrow else 1e-4) * float(expected.norm()):
        raise ValueError(
            f"{type(model).__name__} would compute something else: more lies between its "
            "embeddings and its first block than a rotation passes."
        )


@chooses_layers
def quarot(
    model: Model,
    bits: int = 4,
    activation_bits: int | None = 4,
    *,
    seed: int = 0,
    group_size: Granularity = "row",
    clip_ratio: float = 1.0,
    quantizer: Callable[[Model], Model] | None = None,
    layers: LayerChoice = "*",
) -> Model:
    r"""Rotate, round the weights, and round every token's inputs at run time.

    Keys can be rotated and quantized in the cache, see `kv_cache.KiviCache(rotate_keys=True)`.

    Args:
        model: A causal language model as `rotate` takes it; it is not changed.
        bits: Bits of the weights, 2 to 8.
        activation_bits: Bits of the inputs, symmetric with a scale per token; None leaves them.
        seed: For the signs of the rotation.
        group_size: What shares a scale of the weights. They are symmetric.
        clip_ratio: Fraction of a token's largest magnitude that its grid spans.
        quantizer: Another way to quantize the weights of the rotated model, in place of rounding
            them; for example `lambda m: gptq(m, calibration, 4)`. `bits` and `group_size` are then
            its business.
        layers: Name patterns of the layers; wrapped ones end in `.layer`.

    Returns:
        A new model.

    Raises:
        ValueError: As `rotate`, `effnb.inference.quantization.rtn` and
            `effnb.inference.quantization.activations.quantize_inputs`.
    """
    check_bits(bits)
    check_granularity(group_size)
    if activation_bits is not None:
        check_inputs(activation_bits, "token", clip_ratio)
    rotated = rotate(model, seed, online=True)
    if quantizer is None:
        weights = rtn(
            rotated,
            bits,
            group_size=group_size,
            symmetric=True,
            layers=layers,
        )
    else:
        weights = quantizer(rotated)
    if activation_bits is None:
        return weights
    return quantize_inputs(weights, activation_bits, clip_ratio=clip_ratio, layers=layers)
