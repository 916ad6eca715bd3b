r"""Hadamard matrices: orthogonal, made of plus and minus one, and fast to multiply by.

$H H^\top = n I$ with all entries ±1. For $n = 2^k$ there is Sylvester's, whose product takes
$O(n \log n)$ additions. Widths of models are often a power of two times 12, 20 or 43; matrices of
such orders come from Paley's constructions, which ask which elements of a finite field are squares
(Paley, "On orthogonal matrices", 1933), and $H_m \otimes H_{2^k}$ joins the two.

A row vector times $H / \sqrt n$ keeps its length, while any single large entry is spread evenly
over all of them.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 1024
"""Largest order of the part that is multiplied as an ordinary matrix."""


def _prime_power(q: int) -> tuple[int, int] | None:
    """The p and k of $q = p^k$ with an odd prime p; None if q is no such number."""
    p = next((d for d in range(3, math.isqrt(max(q, 0)) + 1, 2) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if q > 2 and q % 2 and p**k == q else None


def _jacobsthal(q: int) -> Tensor:
    r"""$J_{ab} = \chi(a - b)$ over the field of q elements: 1 for squares, -1 for others, 0 for 0.

    The field of $p^k$ elements is made of polynomials of degree below k over the numbers modulo p,
    multiplied modulo an irreducible one. A remainder ring is a field just if it has $(q + 1) / 2$
    squares, so the first polynomial that gives this number is taken.
    """
    p, k = _prime_power(q)
    elements = list(itertools.product(range(p), repeat=k))
    for tail in elements:  # x^k = tail, lowest power first
        squares = {_square(a, tail, p) for a in elements}
        if len(squares) == (q + 1) // 2:
            break
    digits = torch.tensor(elements)
    place = torch.tensor([p ** (k - 1 - i) for i in range(k)])
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[(torch.tensor(sorted(squares)) * place).sum(1)] = 1
    chi[0] = 0
    return chi[((digits[:, None] - digits[None]) % p * place).sum(-1)]


def _square(a: tuple[int, ...], tail: tuple[int, ...], p: int) -> tuple[int, ...]:
    k = len(a)
    product = [0] * (2 * k - 1)
    for i, j in itertools.product(range(k), repeat=2):
        product[i + j] += a[i] * a[j]
    for power in range(2 * k - 2, k - 1, -1):
        for i in range(k):
            product[power - k + i] += product[power] * tail[i]
    return tuple(c % p for c in product[:k])


@cache
def _paley(n: int) -> Tensor | None:
    """A Hadamard matrix of order n by one of Paley's two constructions (1933), if one applies."""
    q = n - 1
    if n % 4 == 0 and q % 4 == 3 and _prime_power(q):
        J = _jacobsthal(q)
        H = torch.ones(n, n, dtype=torch.int8)
        H[1:, 1:] = J + torch.eye(q, dtype=torch.int8)
        H[1:, 0] = -1
        return H
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _prime_power(q):
        C = torch.ones(q + 1, q + 1, dtype=torch.int8)
        C[0, 0], C[1:, 1:] = 0, _jacobsthal(q)
        one = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        eye = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(C, one) + torch.kron(torch.eye(q + 1, dtype=torch.int8), eye)
    return None


@cache
def _factors(n: int) -> tuple[int, int] | None:
    """Orders m and $2^k$ with $n = m 2^k$ and a known matrix of order m; the smallest such m."""
    power = n & -n if n > 0 else 0
    if n == power and n:
        return 1, n
    m = n // power if power else 0
    while 0 < m <= LARGEST and n % m == 0:
        if _paley(m) is not None:
            return m, n // m
        m *= 2
    return None


def has_hadamard(n: int) -> bool:
    r"""Whether a Hadamard matrix of order n can be made here.

    Orders are $m\,2^k$ with m = 1, or m up to 1,024 of Paley's kinds: $q + 1$ for a prime power
    $q \equiv 3 \bmod 4$, and $2 (q + 1)$ for $q \equiv 1 \bmod 4$. Among multiples of 4 up to 200,
    only 92, 116, 156, 172, 184 and 188 are missing.
    """
    return _factors(n) is not None


def check_order(n: int, what: str = "n") -> tuple[int, int]:
    """Refuse orders without a matrix here; otherwise, the m and $2^k$ that n is made of."""
    found = _factors(n)
    if found is None:
        raise ValueError(
            f"{what} is {n}; there is no Hadamard matrix of that order here (see has_hadamard)."
        )
    return found


def hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    r"""A matrix of ±1 with $H H^\top = n I$, in float64.

    For $n = 2^k$ it is Sylvester's, $H_{2n} = \begin{pmatrix} H & H \\ H & -H \end{pmatrix}$, which
    is symmetric; otherwise $H_m \otimes H_{2^k}$ with one of Paley's, which need not be.

    Raises:
        ValueError: When there is none of that order here; see `has_hadamard`.
    """
    m, power = check_order(n)
    H = torch.ones(1, 1, dtype=torch.float64) if m == 1 else _paley(m).double()
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power.bit_length() - 1):
        H = torch.kron(H, two)
    return H


def hadamard_transform(
    x: Float[Tensor, "*batch n"], *, transpose: bool = False
) -> Float[Tensor, "*batch n"]:
    r"""$x H / \sqrt n$ along the last axis, or $x H^\top / \sqrt n$, its inverse.

    The power of two in n takes $\log_2$ steps of additions, $O(n \log n)$ together; the rest of n
    is a product with a small matrix. Half-precision inputs are computed in float32.

    Args:
        x: Any tensor of floating-point numbers.
        transpose: Whether to multiply by the transpose. The two are the same for powers of two.

    Raises:
        ValueError: When there is no Hadamard matrix of order n here; see `has_hadamard`.
    """
    n = x.shape[-1]
    m, power = check_order(n, "the last axis")
    y = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (m, power))
    half = 1
    while half < power:  # butterflies: (a, b) -> (a + b, a - b) at distance `half`
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    if m > 1:
        H = _paley(m).to(y.device, y.dtype)
        y = (y.mT @ (H.T if transpose else H)).mT  # one product for all rows together
    return (y.flatten(-2) / math.sqrt(n)).to(x.dtype)


def random_hadamard(n: int, seed: int = 0) -> Float[Tensor, "n n"]:
    r"""The orthogonal matrix $Q = \operatorname{diag}(\pm 1)\, H / \sqrt n$, in float64.

    Signs are drawn before mixing: without them, a vector that happens to be a column of $H$, such
    as one of equal entries, would end as a single spike.

    Raises:
        ValueError: When there is no Hadamard matrix of order n here; see `has_hadamard`.
    """
    check_order(n)
    return hadamard_transform(torch.diag(random_signs(n, seed)))


def random_signs(n: int, seed: int) -> Float[Tensor, " n"]:
    """Random signs, ±1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
