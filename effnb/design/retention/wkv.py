r"""The wkv of RWKV-4: a running average of values, weighted by exponentials of keys that decay.

Every channel is by itself. With a decay $w > 0$ per token and a bonus $u$ for the present token,

$$\mathrm{wkv}_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i}\, v_i + e^{u + k_t}\, v_t}
                        {\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}} .$$

Keys are exponents without a bound, so that sums of exponentials overflow. Both forms here avoid it.

**Recurrent** (the paper's): numerator and denominator are kept as $a\,e^p$ and $b\,e^p$, with $p$
the largest exponent so far.

**Parallel**: the past of a token is the pair of its average $m = a / b$ and the logarithm of its
weight, $\ell = p + \ln b$. Two neighbouring stretches of text, the second $n$ tokens long, combine
into one:

$$\ell = \ln(e^{\ell_1 - n w} + e^{\ell_2}), \qquad
  m = m_1 + \sigma(\ell_2 - \ell_1 + n w)\,(m_2 - m_1),$$

an average of averages, which cannot overflow. The operation is associative, so that all prefixes
come from a scan of $\log_2 T$ rounds with about $2T$ operations.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv 2305.13048.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.design.retention.precision import wide

EMPTY = -1e38
"""The exponent of nothing: finite, so that differences of it are numbers."""
FORMS = ("parallel", "recurrent")
WkvState = tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]


def wkv(
    w: Float[Tensor, " dim"],
    u: Float[Tensor, " dim"],
    k: Float[Tensor, "batch time dim"],
    v: Float[Tensor, "batch time dim"],
    state: WkvState | None = None,
    *,
    form: str = "parallel",
) -> tuple[Float[Tensor, "batch time dim"], WkvState]:
    """The weighted averages, in either form; computed in float32, or float64 for such values.

    Args:
        w: Decay of each channel per token, above 0 (the model's $e^{time decay}$).
        u: Bonus of the present token.
        k: Keys.
        v: Values.
        state: (a, b, p) after an earlier text; of nothing by default.
        form: "parallel" or "recurrent".

    Returns:
        The averages, in the values' type, and the state (a, b, p), in the type of the arithmetic.

    Raises:
        ValueError: An unknown form, or shapes that do not fit each other.
    """
    if form not in FORMS:
        raise ValueError(f"the form is {form!r}; choose {' or '.join(FORMS)}.")
    fits = k.shape == v.shape and w.shape == u.shape == k.shape[-1:]
    if not fits or (state is not None and any(s.shape != k[:, 0].shape for s in state)):
        raise ValueError(
            f"w, u, k and v have the shapes {tuple(w.shape)}, {tuple(u.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}; they must be (dim,) twice and (batch, time, dim) twice, and a "
            "state three times (batch, dim)."
        )
    kind = wide(v)
    if state is None:
        nothing = k.new_zeros(k.shape[0], k.shape[2], dtype=kind)
        state = nothing, nothing, nothing + EMPTY
    run = wkv_parallel if form == "parallel" else wkv_recurrent
    out, state = run(w.to(kind), u.to(kind), k.to(kind), v.to(kind), state)
    return out.to(v.dtype), state


def wkv_step(
    w: Float[Tensor, " dim"],
    u: Float[Tensor, " dim"],
    k: Float[Tensor, "batch dim"],
    v: Float[Tensor, "batch dim"],
    state: WkvState,
) -> tuple[Float[Tensor, "batch dim"], WkvState]:
    """One token: read with the bonus first, then decay and take the token in."""
    a, b, p = state
    q = torch.maximum(p, u + k)
    past, now = torch.exp(p - q), torch.exp(u + k - q)
    out = (past * a + now * v) / (past * b + now)  # wkv_t
    q = torch.maximum(p - w, k)
    past, now = torch.exp(p - w - q), torch.exp(k - q)
    return out, (past * a + now * v, past * b + now, q)


def wkv_recurrent(w, u, k, v, state):
    """Token after token; arguments and results are those of `wkv`, all in one type."""
    outputs = [v[:, :0]]
    for t in range(k.shape[1]):
        out, state = wkv_step(w, u, k[:, t], v[:, t], state)
        outputs.append(out[:, None])
    return torch.cat(outputs, 1), state


def wkv_parallel(w, u, k, v, state):
    """All tokens in rounds of a scan; arguments and results are those of `wkv`, all in one type."""
    a, b, p = state
    empty = b <= 0
    some = b.masked_fill(empty, 1)  # so that nothing has a gradient, and no division by 0
    m = torch.cat([(a / some).masked_fill(empty, 0)[:, None], v], 1)
    log = torch.cat([(p + some.log()).masked_fill(empty, EMPTY)[:, None], k], 1)
    m, log = _prefixes(m, log, w)
    before, log_before = m[:, :-1], log[:, :-1]
    # The present token's share is e^(u+k) / (e^ℓ + e^(u+k))
    out = before + torch.sigmoid(u + k - log_before) * (v - before)
    return out, (m[:, -1], torch.ones_like(m[:, -1]), log[:, -1])


def _join(first, second, decay):
    """Two neighbouring stretches as one; the first decays by the length of the second."""
    m1, log1 = first[0], first[1] - decay
    m2, log2 = second
    return m1 + torch.sigmoid(log2 - log1) * (m2 - m1), torch.logaddexp(log1, log2)


def _prefixes(m: Tensor, log: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """From stretches to everything up to each of them.

    All stretches are equally long (`decay` is that of one), but for the first, whose length has no
    effect, and the last.
    """
    count = m.shape[1]
    if count == 1:
        return m, log
    firsts, seconds = (m[:, :-1:2], log[:, :-1:2]), (m[:, 1::2], log[:, 1::2])
    # Pairs first: their prefixes are those of every second stretch
    odd = _prefixes(*_join(firsts, seconds, decay), 2 * decay)
    up_to = (count - 1) // 2
    later = _join(tuple(x[:, :up_to] for x in odd), (m[:, 2::2], log[:, 2::2]), decay)
    return tuple(
        _interleave(torch.cat([x[:, :1], more], 1), every)
        for x, more, every in zip((m, log), later, odd)
    )


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    pairs = torch.stack([even[:, : odd.shape[1]], odd], 2).flatten(1, 2)
    return torch.cat([pairs, even[:, odd.shape[1] :]], 1)
