"""Parameters and multiplications of models that share weights or read through latents.

The two are counted apart, because sharing changes only the first and latents mostly the second.
Multiply-adds are those of matrix products, one for each pair of numbers multiplied and added;
norms, softmax and activations are left out. A FLOP count has two for each.
"""

from __future__ import annotations

from effnb.design.attention.checks import check_count
from effnb.design.sharing.albert import layer_groups
from effnb.design.sharing.perceiver import PerceiverConfig
from effnb.design.sharing.perceiver_io import PerceiverIOConfig


def albert_parameters(
    vocabulary: int,
    embedding: int,
    hidden: int,
    feed_forward: int,
    layers: int,
    *,
    groups: int = 1,
    positions: int = 512,
    types: int = 2,
) -> int:
    r"""Numbers of an ALBERT encoder with its pooler, $E = $ `embedding`, $d = $ `hidden`.

    $$(V + P + 2) E + 2 E + (E d + d) + g \, (4 d^2 + 4 d + 2 d f + f + d + 4 d) + d^2 + d$$

    Args:
        vocabulary: V.
        embedding: E, the width of all three tables.
        hidden: d.
        feed_forward: f.
        layers: N, which does not change the count.
        groups: g, groups of layers with one set of weights; it divides N.
        positions: P.
        types: Kinds of segments.

    Raises:
        ValueError: Groups that do not divide the layers, or a size below 1.
    """
    layer_groups(layers, groups)
    E, d, f = (
        check_count(name, value)
        for name, value in (
            ("embedding", embedding),
            ("hidden", hidden),
            ("feed_forward", feed_forward),
        )
    )
    tables = (vocabulary + positions + types) * E + 2 * E + E * d + d
    layer = 4 * (d * d + d) + (2 * d * f + f + d) + 4 * d
    return tables + groups * layer + d * d + d


def transformer_multiply_adds(length: int, hidden: int, feed_forward: int, layers: int) -> int:
    r"""$L \, (4 T d^2 + 2 T d f + 2 T^2 d)$: projections, two matrices, scores and mixing.

    Sharing does not enter: weights that are used $L$ times are multiplied $L$ times.
    """
    T, d = check_count("length", length), hidden
    return layers * (4 * T * d * d + 2 * T * d * feed_forward + 2 * T * T * d)


def _layer(asks: int, reads: int, width: int, context: int, qk: int, v: int, widening: int) -> int:
    """Multiply-adds of one attention with its feed-forward layer."""
    project = asks * width * qk + reads * context * (qk + v) + asks * v * width
    return project + asks * reads * (qk + v) + 2 * asks * width * widening * width


def perceiver_multiply_adds(length: int, config: PerceiverConfig) -> int:
    r"""$O(M N)$ for each reading, and $O(N^2)$ for each self-attention layer, whatever $M$ is."""
    return config.cross_attends * (
        reading_multiply_adds(length, config)
        + config.repeats * config.self_attends * latent_layer_multiply_adds(config)
    )


def reading_multiply_adds(length: int, config: PerceiverConfig) -> int:
    """One cross-attention of the latents over the input: linear in its length."""
    N, D, C = config.latents, config.hidden, config.inputs
    length = check_count("length", length)
    return _layer(N, length, D, C, config.cross, config.cross, config.widening)


def latent_layer_multiply_adds(config: PerceiverConfig) -> int:
    """One self-attention layer over the latents: what a further layer of depth costs."""
    N, D = config.latents, config.hidden
    return _layer(N, N, D, D, D, D, config.widening)


def perceiver_io_multiply_adds(length: int, outputs: int, config: PerceiverIOConfig) -> int:
    """Encoder and decoder, for so many queries; the head over a vocabulary is left out."""
    E, D, N = config.outputs, config.encoder.hidden, config.encoder.latents
    outputs = check_count("outputs", outputs)
    decoder = _layer(outputs, N, E, D, config.qk, E, config.widening)
    return perceiver_multiply_adds(length, config.encoder) + decoder
