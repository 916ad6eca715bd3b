r"""Low-rank updates on top of a layer's output: one for all rows, or another for every user.

Row m of a batch belongs to user $u_m$, whose update is

$$y_m = y_{0,m} + s_u\,(x_m A_u^\top) B_u^\top;$$

-1 stands for none. Rows are gathered into tiles of one user each, so that a user's matrices are
read once a tile and multiplied on the tensor cores, in two kernels: $h = x A_u^\top$, then
$y = y_0 + s_u h B_u^\top$. The first cuts the inputs into parts where there are few tiles, and the
parts are added in a fixed order. Ranks may differ: fill up with zeros (`stack_users`). Rows are
arranged once a batch, not in every layer: a `UserBatch` is that arrangement.

**Bytes**, in 16 bits: $2 U r (K + N) + 2M (K + 2N) + 8Mr$ for U users in the batch.
**Operations**: $2Mr(K + N)$; of 16-bit numbers, the second product is in TF32, which has the range
of float32 where half precision would overflow, and so is the first where A is float32.
**Bound**: memory, as $r$ is small; the update should take a small part of the layer's time.

Gradients reach x, A, B, s and $y_0$: $\partial x_m = s_u\,(\partial y_m B_u) A_u$ is computed by
the same kernels on transposed matrices.

Many users in one batch: Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023, arXiv 2310.18547;
Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", 2023, arXiv 2311.03285.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from effnb.kernels import _tuning
from effnb.kernels._launch import (
    cdiv,
    check_floats,
    check_number,
    check_shape,
    check_whole,
    choose,
    empty,
    exact,
    jit,
    launch,
    next_power_of_2,
    rows_of,
    short,
    tl,
    wide_precision,
)
from effnb.kernels._tuning import Candidate, Numbers, TuneCase, cut, drawn, key_of
from effnb.kernels.bench import EXACT, BenchCase, pinned
from effnb.kernels.compile import CompileCase
from effnb.kernels.lora import too_large
from effnb.kernels.report import Work

__all__ = ["UserBatch", "gathered_lora", "gathered_reference", "lora_update", "stack_users"]


# --- the reference --------------------------------------------------------------------------------


def gathered_reference(
    x: Tensor, A: Tensor, B: Tensor, index: Tensor, scaling: Tensor, base: Tensor | None = None
) -> Tensor:
    """Every row with its user's update, in plain PyTorch: in float32 or float64, rounded once."""
    kind = exact(x, A, scaling, base)
    mine = (index >= 0).nonzero().flatten()
    user = index[mine]
    h = torch.einsum("mk,mrk->mr", x[mine].to(kind), A[user].to(kind))
    update = torch.einsum("mr,mnr->mn", h, B[user].to(kind)) * scaling[user].to(kind).unsqueeze(1)
    if base is None:
        out = torch.zeros(len(x), B.shape[1], dtype=kind, device=x.device)
    else:
        out = base.to(kind)
    return out.index_add(0, mine, update).to(x.dtype)


def _in_tiles(
    x: Tensor, A: Tensor, B: Tensor, batch: UserBatch, scaling: Tensor, base: Tensor | None
) -> Tensor:
    """What `gathered_reference` computes; a user's matrices are read once a tile, not a row."""
    if not batch.users:
        return gathered_reference(x, A, B, batch.index, scaling, base)
    kind = exact(x, A, scaling, base)
    there = (batch.rows >= 0) & (batch.owners >= 0).unsqueeze(1)
    lines, owner = batch.rows.clamp(min=0).long(), batch.owners.clamp(min=0).long()
    mine = torch.where(there.unsqueeze(2), x[lines], 0)  # what is no row spoils no other
    h = torch.bmm(mine.to(kind), A[owner].to(kind).transpose(1, 2))
    h = h * scaling[owner].to(kind)[:, None, None]
    update = torch.bmm(h, B[owner].to(kind).transpose(1, 2))[there]
    if base is None:
        out = torch.zeros(len(x), B.shape[1], dtype=kind, device=x.device)
    else:
        out = base.to(kind)
    return out.index_add(0, lines[there], update).to(x.dtype)


def stack_users(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The matrices of users whose ranks may differ, filled up with zeros and stacked.

    Args:
        updates: A (rank, K) and B (N, rank) of each user.

    Returns:
        A (users, largest rank, K) and B (users, N, largest rank).

    Raises:
        ValueError: When there is no user, or two differ in more than the rank.
    """
    if not updates:
        raise ValueError("there is no user to stack.")
    for user, (a, b) in enumerate(updates):
        if a.ndim != 2 or b.ndim != 2:
            raise ValueError(
                f"A and B of user {user} have shapes {tuple(a.shape)} and {tuple(b.shape)}; they "
                "must be matrices."
            )
    k, n = updates[0][0].shape[-1], updates[0][1].shape[0]
    for user, (a, b) in enumerate(updates):
        check_shape(f"A of user {user}", a, (a.shape[0], k), f"A of user 0 with {k} inputs")
        check_shape(f"B of user {user}", b, (n, a.shape[0]), f"A of shape {tuple(a.shape)}")
    rank = max(len(a) for a, _ in updates)
    return (
        torch.stack([pad(a, (0, 0, 0, rank - len(a))) for a, _ in updates]),
        torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in updates]),
    )


# --- the kernels ----------------------------------------------------------------------------------


@jit
def _down(
    x, a, rows, users, h, stride_xm, stride_xk, stride_au, stride_ar, stride_ak,
    K: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): h of the rows of tile i, from the j-th part of the inputs."""
    kind: tl.constexpr = x.dtype.element_ty
    inner: tl.constexpr = kind if a.dtype.element_ty == kind else tl.float32
    each = tl.cdiv((K + BLOCK_K - 1) // BLOCK_K, tl.num_programs(1))
    tile = tl.program_id(0)
    user = tl.load(users + tile).to(tl.int64)
    lines = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ms = tl.load(rows + lines).to(tl.int64)
    rs = tl.arange(0, BLOCK_R)
    there = (ms >= 0) & (user >= 0)
    a_rows = a + user * stride_au + rs.to(tl.int64)[None, :] * stride_ar
    thin = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block in range(each):
        first = (tl.program_id(1) * each + block) * BLOCK_K
        ks = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = there[:, None] & (ks < K)[None, :]
        part = x + ms[:, None] * stride_xm + ks[None, :] * stride_xk
        part = tl.load(part, mask=mask, other=0.0)
        mask = (ks < K)[:, None] & (rs < RANK)[None, :] & (user >= 0)
        down = tl.load(a_rows + ks[:, None] * stride_ak, mask=mask, other=0.0).to(inner)
        thin = tl.dot(part.to(inner), down, thin, input_precision=WIDE)
    # Every line of every tile is written, also those without a row: h is as long as the tiles.
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) * BLOCK_M + lines
    tl.store(h + place[:, None] * RANK + rs[None, :], thin, mask=(rs < RANK)[None, :])


@jit
def _up(
    h, b, rows, users, scaling, base, out, stride_bu, stride_bn, stride_br, stride_0m, stride_0n,
    N: tl.constexpr, RANK: tl.constexpr, BASE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs j BLOCK_N ... of the rows of tile i; of no user, the base alone."""
    kind: tl.constexpr = out.dtype.element_ty
    tile = tl.program_id(0)
    user = tl.load(users + tile).to(tl.int64)
    lines = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ms = tl.load(rows + lines).to(tl.int64)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rs = tl.arange(0, BLOCK_R)
    thin = tl.load(h + lines[:, None] * RANK + rs[None, :], mask=(rs < RANK)[None, :], other=0.0)
    mask = (rs < RANK)[:, None] & (ns < N)[None, :] & (user >= 0)
    up = b + user * stride_bu + ns.to(tl.int64)[None, :] * stride_bn
    up += rs.to(tl.int64)[:, None] * stride_br
    up = tl.load(up, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scaling + user, mask=user >= 0, other=0.0).to(tl.float32)
    total = tl.dot(thin, up, input_precision=WIDE) * s
    mask = (ms >= 0)[:, None] & (ns < N)[None, :]
    if BASE:
        start = base + ms[:, None] * stride_0m + ns.to(tl.int64)[None, :] * stride_0n
        total += tl.load(start, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + ms[:, None] * N + ns[None, :], total.to(kind), mask=mask)


# --- a batch of users ----------------------------------------------------------------------------


@dataclass(frozen=True)
class UserBatch:
    """Which row belongs to which user, arranged for the kernels: made once, used in every layer.

    Attributes:
        index: (M,) the user of each row, -1 for none; a copy of what was given.
        users: How many users there are.
        rows: (tiles, lines) the row of each line of a tile, -1 for none.
        owners: (tiles,) the one user of each tile; -1 for rows without one, and unused tiles.
        ordered: Whether it is one user and all rows as they come.
    """

    index: Tensor
    users: int
    rows: Tensor
    owners: Tensor
    ordered: bool = False

    @classmethod
    def of(cls, index: Tensor, users: int, lines: int = 16) -> UserBatch:
        """Gather rows of the same user into tiles.

        Args:
            index: (M,) the user of each row, -1 for none.
            users: How many users there are.
            lines: Rows per tile, a power of two from 16: more where most users have many.

        Raises:
            ValueError: A user that does not exist, an index that is no list, or lines that no
                tensor core takes.
            TypeError: When the index, the users or the lines are not whole numbers.
        """
        users, lines = check_whole("users", users), check_whole("lines", lines)
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index is of {short(index.dtype)}; it must be int32 or int64.")
        check_shape("index", index, (index.numel(),), "one user per row")
        if users < 0:
            raise ValueError(f"users is {users}; there cannot be fewer than none.")
        if lines < 16 or lines != next_power_of_2(lines):
            raise ValueError(f"lines is {lines}; it must be a power of two from 16.")
        count, device = len(index), index.device
        if count:
            low, high = int(index.min()), int(index.max())
            if low < -1 or high >= users:
                raise ValueError(
                    f"index names user {low if low < -1 else high}; there are {users}, from 0, "
                    "and -1 for none."
                )
        index = index.clone()  # the caller's may be filled with the next batch
        ordered, order = torch.sort(index, stable=True)
        owners = torch.arange(-1, users, device=device, dtype=index.dtype)
        starts = torch.searchsorted(ordered, owners)
        ends = torch.searchsorted(ordered, owners, right=True)
        last = torch.cumsum((ends - starts + lines - 1) // lines, 0)  # each owner's last tile + 1
        tiles = torch.arange(int(last[-1]), device=device)
        owner = torch.searchsorted(last, tiles, right=True)
        ahead = torch.cat([last.new_zeros(1), last[:-1]])[owner]
        first = starts[owner] + (tiles - ahead) * lines
        places = first.unsqueeze(1) + torch.arange(lines, device=device)
        inside = places < ends[owner].unsqueeze(1)
        rows = torch.where(inside, order[places.clamp(max=max(count - 1, 0))], -1)
        kind = torch.int32 if count < 2**31 else torch.int64
        return cls(index, users, rows.to(kind), (owner - 1).int())

    @classmethod
    def of_one(cls, count: int, device: torch.device) -> UserBatch:
        """All rows belong to one user."""
        lines = min(max(16, next_power_of_2(count)), 64)
        rows = torch.arange(cdiv(count, lines) * lines, device=device, dtype=torch.int32)
        rows = torch.where(rows < count, rows, -1).view(-1, lines)
        owners = torch.zeros(len(rows), device=device, dtype=torch.int32)
        return cls(owners.new_zeros(count), 1, rows, owners, ordered=True)


def _parts(tiles: int, k: int, block_k: int) -> int:
    """A few tiles leave most of a GPU idle, which has about 128 multiprocessors: cut the inputs."""
    return max(1, min(next_power_of_2(cdiv(128, max(tiles, 1))), cdiv(k, block_k)))


@lru_cache(maxsize=64)
def _one_user(count: int, device: torch.device) -> UserBatch:
    """All rows belong to one user: arranged once for a number of rows, not in every layer."""
    with torch.inference_mode(mode=False):
        return UserBatch.of_one(count, device)


def _cut(dtype: torch.dtype) -> Numbers:
    """Inputs of a turn of the first kernel, outputs of a program of the second, and warps.

    128 inputs of 16 rows and of rank 16 are 8 KiB in 16 bits: with twelve programs on a
    multiprocessor, all that memory can deliver. In float32 sums take the registers.
    """
    return (32 if dtype == torch.float32 else 128), 64, 4


def _run_gathered(
    x: Tensor, A: Tensor, B: Tensor, batch: UserBatch, scaling: Tensor, base: Tensor | None
) -> Tensor:
    """Launch both kernels: x (M, K), A (U, r, K), B (U, N, r), with any strides."""
    (count, k), (_, n, rank) = x.shape, B.shape
    tiles, block_m = batch.rows.shape
    block_r = max(16, next_power_of_2(rank))
    key = partial(key_of, x.dtype, rows=count, k=k, n=n, rank=rank)
    block_k, block_n, warps = _tuning.chosen("gathered_lora", key, x.device, _cut(x.dtype))
    how = {"RANK": rank, "BLOCK_M": block_m, "BLOCK_R": block_r, "WIDE": wide_precision(x.dtype)}
    parts = _parts(tiles, k, block_k)
    lists = batch.rows.contiguous(), batch.owners.contiguous()
    h = empty((parts, tiles * block_m, rank), torch.float32, x.device)
    launch(
        _down, (tiles, parts), x, A, *lists, h, *x.stride(), *A.stride(),
        K=k, BLOCK_K=block_k, **how, num_warps=warps, num_stages=2,
    )  # fmt: skip
    h = h[0] if parts == 1 else h.sum(0)
    out = empty((count, n), x.dtype, x.device)
    strides = (0, 0) if base is None else base.stride()
    launch(
        _up, (tiles, cdiv(n, block_n)), h, B, *lists, scaling.contiguous(), base, out,
        *B.stride(), *strides, N=n, BASE=base is not None, BLOCK_N=block_n, **how,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


class _Gathered(torch.autograd.Function):
    """Every row with its user's update, with gradients to x, A, B, the base and the scaling."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, base: Tensor | None, scaling: Tensor,
        batch: UserBatch,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, A, B, scaling)
        ctx.batch = batch
        return _run_gathered(x, A, B, batch, scaling, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, scaling = ctx.saved_tensors
        need, batch = ctx.needs_input_grad, ctx.batch
        dx = da = db = ds = None
        if need[0]:  # the roles of inputs and outputs change, and those of A and B
            down, up = B.transpose(1, 2), A.transpose(1, 2)
            dx = _run_gathered(dy, down, up, batch, scaling, None)
        if need[1] or need[2] or need[4]:
            da, db, ds = _user_gradients(x, dy, A, B, scaling, batch)
        return dx, da, db, dy if need[3] else None, ds, None


def _user_gradients(
    x: Tensor, dy: Tensor, A: Tensor, B: Tensor, scaling: Tensor, batch: UserBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, B and the scaling: in float32, where nothing in between overflows."""
    if not len(A):
        return torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(scaling)
    wide, steep, there, owners = _by_tile(x.float(), dy.float(), batch)
    users = owners.clamp(min=0)
    # Lines without a row are 0; times a matrix that is not finite they would not be.
    up = torch.where(there, steep @ B[users].float(), 0)
    down = torch.where(there, wide @ A[users].float().mT, 0)
    s = scaling[users].view(-1, 1, 1)
    da = _sum_by_user(s * up.mT @ wide, owners, len(A)).to(A.dtype)
    db = _sum_by_user(s * steep.mT @ down, owners, len(A)).to(B.dtype)
    return da, db, _sum_by_user((up * down).sum((1, 2)), owners, len(A))


def _sum_by_user(parts: Tensor, owners: Tensor, users: int) -> Tensor:
    """The sum of each user's tiles, in a fixed order and apart from all others: (users, ...)."""
    order = owners.argsort(stable=True)
    counts = (torch.arange(-1, users, device=owners.device).unsqueeze(1) == owners).sum(1)
    flat = parts.flatten(1) if parts.ndim > 1 else parts.unsqueeze(1)
    sums = torch.segment_reduce(flat[order], "sum", lengths=counts, unsafe=True, initial=0)
    return sums[1:].view(users, *parts.shape[1:])


def _by_tile(x: Tensor, dy: Tensor, batch: UserBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and output gradients as (tiles, lines, ...), 0 where no user's row is.

    And where one is, (tiles, lines, 1); and the user of each tile, -1 for none.
    """
    if batch.ordered:  # one tile is enough
        there = torch.ones(1, len(x), 1, dtype=torch.bool, device=x.device)
        return x.unsqueeze(0), dy.unsqueeze(0), there, batch.owners.new_zeros(1).long()
    owners = batch.owners.long()
    there = ((batch.rows >= 0) & (owners >= 0).unsqueeze(1)).unsqueeze(2)
    lines = batch.rows.clamp(min=0).long()
    return torch.where(there, x[lines], 0), torch.where(there, dy[lines], 0), there, owners


def lora_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    output: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""$y = y_0 + s\,(x A^\top) B^\top$ where $y_0$ was computed before, by a layer of any storage.

    Args:
        x: (..., K).
        A: (r, K).
        B: (N, r) in the type of A.
        scaling: $s$, a number.
        output: (..., N) $y_0$. The kernel needs the type of x; otherwise the reference is taken.
            The sum is in float32 (float64 if a tensor is) and rounded once.
        backend: None: Triton on a GPU, the reference elsewhere; or "triton" or "torch".

    Returns:
        (..., N) in the type of the output.

    Raises:
        ValueError: Shapes that do not fit each other, tensors on two devices, or "triton" where it
            cannot run.
        TypeError: Tensors that are not of floating-point numbers, or a scaling that is no number.
    """
    check_floats(x=x, A=A, B=B, output=output)
    scaling = check_number("scaling", scaling)
    rank = A.shape[0] if A.ndim else 0
    k = x.shape[-1] if x.ndim else 0
    n = output.shape[-1] if output.ndim else 0
    check_shape("A", A, (rank, k), f"x of shape {tuple(x.shape)}")
    check_shape("B", B, (n, rank), f"A {tuple(A.shape)} and an output {tuple(output.shape)}")
    check_shape("output", output, (*x.shape[:-1], n), f"x of shape {tuple(x.shape)}")
    if A.dtype != B.dtype:
        raise ValueError(f"A and B are of {A.dtype} and {B.dtype}; they must be the same.")
    obstacle = too_large(rank)
    if output.dtype != x.dtype:
        obstacle = f"x and the output are of {short(x.dtype)} and {short(output.dtype)}."
    if choose(backend, x, A, B, output, obstacle=obstacle) == "torch":
        kind = exact(x, A, output)
        update = linear(linear(x.to(kind), A.to(kind)), B.to(kind)) * scaling
        return (output.to(kind) + update).to(output.dtype)
    rows, base = rows_of(x), rows_of(output)
    batch = _one_user(len(rows), x.device)
    s = torch.full((1,), scaling, device=x.device)
    result = _Gathered.apply(rows, A.unsqueeze(0), B.unsqueeze(0), base, s, batch)
    return result.reshape(output.shape)


def gathered_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor | UserBatch,
    scaling: Tensor | float = 1.0,
    base: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""$y_m = y_{0,m} + s_u\,(x_m A_u^\top) B_u^\top$ with $u$ = `index[m]`: a batch of users.

    Args:
        x: (M, K), any strides.
        A: (users, r, K) in the type of x or float32; see `stack_users`.
        B: (users, N, r) in the type of A.
        index: (M,) the user of each row, -1 for none; or a `UserBatch` of it, which saves arranging
            the batch again in every layer.
        scaling: (users,) $s_u$, or one number for all.
        base: (M, N) what is added to, in the type of x; 0 if None.
        backend: None: Triton on a GPU, the reference elsewhere; or "triton" or "torch".

    Returns:
        (M, N) in the type of x.

    Raises:
        ValueError: Shapes or types that do not fit each other, a user that does not exist, or
            "triton" where it cannot run.
        TypeError: Tensors of the wrong kind of numbers.
    """
    check_floats(x=x, A=A, B=B, base=base)
    if x.ndim != 2 or A.ndim != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and A {tuple(A.shape)}; they must be (rows, inputs) and "
            "(users, rank, inputs)."
        )
    (users, rank, _), (count, k) = A.shape, x.shape
    check_shape("A", A, (users, rank, k), f"x of shape {tuple(x.shape)}")
    n = B.shape[1] if B.ndim == 3 else 0
    check_shape("B", B, (users, n, rank), f"A of shape {tuple(A.shape)}")
    batch = index if isinstance(index, UserBatch) else UserBatch.of(index, users)
    check_shape("index", batch.index, (count,), f"x of shape {tuple(x.shape)}")
    if batch.users != users:
        raise ValueError(f"the batch is of {batch.users} users; A has {users}.")
    if base is not None:
        check_shape("base", base, (count, n), f"x of shape {tuple(x.shape)} and B {tuple(B.shape)}")
    if A.dtype != B.dtype or (base is not None and base.dtype != x.dtype):
        first, second = (A, B) if A.dtype != B.dtype else (x, base)
        names = "A and B" if first is A else "x and the base"
        raise ValueError(f"{names} are of {first.dtype} and {second.dtype}; they must be the same.")
    if not isinstance(scaling, Tensor):
        kind = exact(x, A)
        scaling = torch.full((users,), check_number("scaling", scaling), dtype=kind).to(A.device)
    check_floats(scaling=scaling)
    check_shape("scaling", scaling, (users,), f"A of shape {tuple(A.shape)}")
    tensors = (x, A, B, batch.index, scaling, base)
    if choose(backend, *tensors, obstacle=too_large(rank)) == "torch":
        return _in_tiles(x, A, B, batch, scaling, base)
    return _Gathered.apply(x, A, B, base, scaling.float(), batch)


# --- for `compile` and `bench` --------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Both kernels in the block sizes of decoding and of a prompt, up to the largest rank.

    And backward, where B and A come transposed and there is no base.
    """
    found = []
    for dtype, ab, rank, kernel, m, n, k, backward in (
        ("bf16", "fp32", 128, _down, 64, 64, 128, False),
        ("bf16", "fp32", 16, _down, 64, 64, 128, True),
        ("fp16", "fp16", 16, _down, 16, 64, 128, False),
        ("fp32", "fp32", 16, _down, 16, 64, 32, False),
        ("bf16", "fp32", 128, _up, 64, 64, 0, False),
        ("bf16", "fp32", 16, _up, 64, 64, 0, True),
        ("fp16", "fp16", 16, _up, 16, 64, 0, False),
        ("fp32", "fp32", 16, _up, 16, 64, 0, False),
    ):
        types = dict.fromkeys(("x", "base", "out"), f"*{dtype}")
        types |= dict.fromkeys(("a", "b"), f"*{ab}") | dict.fromkeys(("h", "scaling"), "*fp32")
        types |= dict.fromkeys(("rows", "users"), "*i32")
        rows, columns = ("stride_ar", "stride_bn"), ("stride_ak", "stride_br")
        far, near = (columns, rows) if backward else (rows, columns)
        far = ("stride_xm", "stride_au", "stride_bu", "stride_0m", *far)
        types |= dict.fromkeys(far, "i32")
        constants = dict.fromkeys(("stride_xk", "stride_0n", *near), 1)
        constants |= {
            "N": 4096,
            "K": 4096,
            "RANK": rank,
            "BLOCK_R": rank,
            "WIDE": "ieee" if dtype == "fp32" else "tf32",
        }
        constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BASE": not backward}
        name = f"gathered_lora: {dtype} {kernel.__name__.strip('_')} {m}, A and B {ab}, r {rank}"
        name += backward * " backward"
        work = _work(kernel is _down, rank, m, n, k, 4 if dtype == "fp32" else 2)
        found.append(CompileCase(name, kernel, types, constants, mma=dtype != "fp32", work=work))
    return found


def _work(down: bool, rank: int, m: int, n: int, k: int, size: int) -> Work:
    """Sixteen users on a layer of 4,096 by 4,096: 16 rows, or a tile's rows 16 times."""
    users, width = 16, 4096
    rows = users * (1 if m == 16 else m)
    parts = _parts(users, width, k) if down else width // n
    return Work(
        what=f"{rows} rows of {users} users, {width} x {width}, rank {rank}",
        item="tile",
        items=1,
        turns=width // k // parts if down else 1,
        programs=users * parts,
        fetched=(m + rank) * k * size if down else n * (rank + m) * size,
        bytes=users * rank * width * size
        + rows * width * size * (1 if down else 2)
        + 4 * users * m * rank * (parts if down else 1),
        flops=2 * rows * rank * width,
    )


CANDIDATES = (
    Candidate((128, 64, 4), "8 KiB of x and A a turn at rank 16; 4 KiB of the output a program"),
    Candidate((256, 64, 4), "16 KiB a turn: fewer waits, where a few tiles leave programs few"),
    Candidate((64, 64, 4), "half of it: more parts of the inputs run side by side"),
    Candidate((128, 128, 4), "twice the outputs a program: h is read half as often"),
    Candidate((128, 128, 8), "the same by twice the threads, each with half of the sums"),
)
"""Inputs of a turn, outputs of a program, and warps."""


def tune_cases(*, small: bool = False) -> list[TuneCase]:
    """Sixteen users with rank 16: a token of each, and prompts."""
    n, k, rank = (40, 64, 4) if small else (4096, 4096, 16)
    return [_tune_case(m, n, k, rank, small) for m in ([5] if small else [16, 1024])]


def _tune_case(m: int, n: int, k: int, rank: int, small: bool) -> TuneCase:
    dtype, users = torch.float16 if small else torch.bfloat16, 3 if small else 16

    def make(device: torch.device, numbers: Numbers) -> Callable[[], Tensor]:
        x, a, b, base = drawn(device, dtype, (m, k), (users, rank, k), (users, n, rank), (m, n))
        batch = UserBatch.of(torch.arange(m, device=device) % users, users)
        scaling = torch.ones(users, device=device)
        return cut(
            "gathered_lora",
            numbers,
            lambda: gathered_lora(x, a, b, batch, scaling, base, backend="triton"),
        )

    key = key_of(dtype, rows=m, k=k, n=n, rank=rank)
    return TuneCase("gathered_lora", key, _cut(dtype), CANDIDATES, make)


def bench_cases(*, small: bool = False) -> list[BenchCase]:
    """Sixteen users with rank 16 on a layer of a model of 7 billion parameters."""
    n, k, rank = (96, 128, 4) if small else (4096, 4096, 16)
    return [_bench_users(m, n, k, rank, 16) for m in ([5] if small else [16, 2048])]


def _bench_users(m: int, n: int, k: int, r: int, users: int) -> BenchCase:
    def make(device: torch.device) -> dict[str, Any]:
        x, a, b, base = (
            torch.randn(shape, device=device, dtype=torch.bfloat16) / 8
            for shape in ((m, k), (users, r, k), (users, n, r), (m, n))
        )
        index = torch.arange(m, device=device) % users
        batch, s = UserBatch.of(index, users), torch.ones(users, device=device)

        def one_by_one() -> Tensor:
            out = base.clone()
            for user in range(min(users, m)):
                mine = slice(user, None, users)
                out[mine] += linear(linear(x[mine], a[user]), b[user])
            return out

        def exactly() -> Tensor:
            wide = (t.double() for t in (x, a, b))
            return _in_tiles(*wide, batch, s.double(), base.double())

        return {
            EXACT: exactly,
            "ours": lambda: gathered_lora(x, a, b, batch, s, base, backend=pinned(device)),
            "torch, user by user": one_by_one,
            "torch, gathered": (
                (lambda: gathered_reference(x, a, b, index, s, base))
                if m <= 64
                else "It would gather a copy of A and B for every row."
            ),
        }

    size = 2 * min(users, m) * r * (k + n) + 2 * m * (k + 2 * n) + 8 * m * r
    shape = f"M={m} N={n} K={k} r={r}, {users} users"
    return BenchCase("gathered_lora", shape, torch.bfloat16, size, 2 * m * r * (k + n), make)
