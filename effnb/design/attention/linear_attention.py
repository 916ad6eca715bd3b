r"""Linear attention: a similarity that factors, so that the past is summed once for all queries.

With $\phi(q) \cdot \phi(k)$ in place of $e^{q \cdot k}$, sums over the keys come first:

$$o_t = \frac{\phi(q_t)^\top S_t}{\phi(q_t) \cdot z_t + \varepsilon}, \qquad
  S_t = S_{t-1} + \phi(k_t) v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t),$$

with $\phi(x) = \operatorname{elu}(x) + 1$. Causal attention is a recurrence with a state of
$d_k \times d_v$ numbers, whatever the length; without a mask, $S$ and $z$ are those of the whole
text. For training, a text is read in chunks: inside a chunk by a small masked product, and before
it by the state. $O(T d_k d_v)$ operations.

Such a state holds about $d_k$ pairs of keys and values before they blur. A factor $1 / \sqrt d$ on
the scores is not used; it would not cancel, for elu + 1 is not homogeneous.

Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with
Linear Attention", 2020, arXiv 2006.16236.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from effnb.design.attention.checks import check_attention, check_count, check_mask, wide

EPSILON = 1e-6
"""Added to denominators, which are sums of positive numbers; they are computed in float32."""


def elu_features(x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    r"""$\phi(x) = \operatorname{elu}(x) + 1$, above 0 everywhere."""
    return torch.nn.functional.elu(x) + 1


@dataclass(frozen=True)
class LinearState:
    """What linear attention knows of the past: its size does not depend on the length.

    Attributes:
        S: Sums of key features times values.
        z: Sums of key features.
    """

    S: Float[Tensor, "batch heads features value_dim"]
    z: Float[Tensor, "batch heads features"]


def empty_state(
    k: Float[Tensor, "batch heads time features"], v: Float[Tensor, "batch heads time value_dim"]
) -> LinearState:
    """The state before the first token, for features and values of these shapes."""
    shape = *k.shape[:2], k.shape[3]
    kind = dict(dtype=wide(k), device=k.device)
    return LinearState(torch.zeros(*shape, v.shape[3], **kind), torch.zeros(shape, **kind))


def feature_attention(
    q: Float[Tensor, "batch heads queries features"],
    k: Float[Tensor, "batch heads keys features"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = True,
    chunk: int = 64,
    state: LinearState | None = None,
    epsilon: float = EPSILON,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], LinearState]:
    """Attention on features that are computed already, and the state at the end.

    Args:
        q: Features of queries, not negative.
        k: Features of keys.
        v: Values.
        causal: Whether a query sees no later key; there is a query for each key then.
        chunk: Tokens that are read together; it changes memory and speed, not the result.
        state: Of the tokens before, to which the new keys are added.
        epsilon: Added to denominators.

    Raises:
        ValueError: Shapes that do not fit, or a chunk below 1.
    """
    check_attention(q, k, v, same_length=causal)
    check_count("chunk", chunk)
    kind, given = wide(q), v.dtype
    q, k, v = q.to(kind), k.to(kind), v.to(kind)
    state = empty_state(k, v) if state is None else state
    S, z = state.S, state.z
    if not causal:
        S, z = S + k.mT @ v, z + k.sum(2)
        out = q @ S / ((q @ z[..., None]) + epsilon)
        return out.to(given), LinearState(S, z)
    outputs = [v[:, :, :0]]
    for queries, keys, values in zip(*(x.split(chunk, 2) for x in (q, k, v))):
        scores = (queries @ keys.mT).tril()
        top = queries @ S + scores @ values  # phi(q_t)^T S_t
        bottom = queries @ z[..., None] + scores.sum(-1, keepdim=True)  # phi(q_t) . z_t
        outputs.append(top / (bottom + epsilon))
        S = S + keys.mT @ values  # S_t = S_(t-1) + phi(k_t) v_t^T
        z = z + keys.sum(2)  # z_t = z_(t-1) + phi(k_t)
    return torch.cat(outputs, 2).to(given), LinearState(S, z)


def linear_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = True,
    chunk: int = 64,
    padding: Bool[Tensor, "batch keys"] | None = None,
    epsilon: float = EPSILON,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Linear attention with elu + 1 as features, in parallel.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        causal: Whether a query sees no later key; there is a query for each key then.
        chunk: Tokens that are read together; see `feature_attention`.
        padding: True at keys that nothing sees.
        epsilon: Added to denominators.

    Raises:
        ValueError: Shapes or masks that do not fit, or a chunk below 1.
    """
    check_attention(q, k, v, same_length=causal)
    check_mask("padding", padding, (k.shape[0], k.shape[2]))
    key_features = elu_features(k)
    if padding is not None:
        hidden = padding[:, None, :, None]
        key_features, v = key_features.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    options = dict(causal=causal, chunk=chunk, epsilon=epsilon)
    return feature_attention(elu_features(q), key_features, v, **options)[0]


def linear_attention_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    state: LinearState | None = None,
    *,
    epsilon: float = EPSILON,
) -> tuple[Float[Tensor, "batch heads value_dim"], LinearState]:
    """One token of the recurrent form: the same numbers as `linear_attention`, one by one.

    Args:
        q: The token's query.
        k: Its key.
        v: Its value.
        state: After the token before; None at the beginning.
        epsilon: Added to denominators.
    """
    kind = wide(q)
    phi_q, phi_k = elu_features(q.to(kind)), elu_features(k.to(kind))
    state = empty_state(phi_k[:, :, None], v[:, :, None]) if state is None else state
    S = state.S + phi_k[..., None] * v.to(kind)[..., None, :]  # S_t = S_(t-1) + phi(k_t) v_t^T
    z = state.z + phi_k  # z_t = z_(t-1) + phi(k_t)
    top = (phi_q[..., None, :] @ S)[..., 0, :]
    out = top / ((phi_q * z).sum(-1, keepdim=True) + epsilon)
    return out.to(v.dtype), LinearState(S, z)
