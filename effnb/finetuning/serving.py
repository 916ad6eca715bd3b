r"""Many users in one batch, each with a LoRA of their own on one frozen model.

The frozen product is computed once for the whole batch, and every row adds its user's update:

$$y_m = W x_m + s_u\, B_u A_u x_m, \qquad u = \text{the user of row } m.$$

Merging would need a model for each user, and running the users one after the other a pass for each.
Here the users' matrices are stacked, and rows of one user are gathered into tiles that read them
once; no loop goes over users (`effnb.kernels.gathered_lora`).

    model = serving.serve(model, "alice", "bob")
    with serving.users(model, ["bob", "alice", None]):   # one name a row; None: the frozen model
        model.generate(**batch)

Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023, arXiv 2310.18547; Sheng et al., "S-LoRA:
Serving Thousands of Concurrent LoRA Adapters", 2023, arXiv 2311.03285.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_kinds import Delta
from effnb.core.deltas import attach_deltas, attached, detach, hosts, modules_by_name
from effnb.core.linear_form import ExpertLinears
from effnb.core.modules import Model
from effnb.finetuning.lora import LoRA
from effnb.kernels.gathered_lora import UserBatch, gathered_lora, stack_users

SERVED = "served"
"""The name of what `serve` attaches."""


class _Rows:
    """Whose the rows of the present batch are; one object for all layers of a model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.index: tuple[int, ...] | None = None
        self._arranged: dict[tuple[int, torch.device], UserBatch] = {}

    def __deepcopy__(self, memo: dict) -> _Rows:
        """A copy of a model has rows of its own, the same ones in all of its layers."""
        return memo.setdefault(id(self), _Rows(self.names))

    def set(self, index: tuple[int, ...] | None) -> None:
        """Begin a batch, or end it."""
        self.index = index
        self._arranged = {}

    def batch(self, count: int, device: torch.device) -> UserBatch:
        """The rows of a layer's input: tokens of a sequence, and beams of a row, follow each other.

        Raises:
            ValueError: Outside `users`, or when the rows are no multiple of the names.
        """
        if self.index is None:
            raise ValueError(
                "whose rows are these? Run a model that serves several users inside "
                "`with serving.users(model, names):`, with one name for each row."
            )
        each, rest = divmod(count, len(self.index))
        if rest or not each:
            raise ValueError(
                f"the batch has {count} rows of inputs, which {len(self.index)} users cannot share "
                "equally; give `serving.users` one name for each sequence."
            )
        if (count, device) not in self._arranged:
            index = torch.tensor(self.index).repeat_interleave(each).to(device)
            lines = 16 if each <= 16 else 32 if each <= 32 else 64  # a sequence fills a tile
            self._arranged[count, device] = UserBatch.of(index, len(self.names), lines)
        return self._arranged[count, device]


class ServedLoRA(Delta):
    """The stacked matrices of all users on one linear layer.

    Attributes:
        A: (users, rank, in), filled up with zeros where ranks differ.
        B: (users, out, rank).
        scaling: (users,).
    """

    A: Float[Tensor, "users rank in"]
    B: Float[Tensor, "users out rank"]
    scaling: Float[Tensor, " users"]

    def __init__(self, updates: Sequence[LoRA | None], base: nn.Module, rows: _Rows) -> None:
        """Stack what each user has on this layer; None where there is nothing."""
        super().__init__()
        like = next(u for u in updates if u is not None)
        nothing = (like.A.new_zeros(0, base.in_features), like.B.new_zeros(base.out_features, 0))
        pairs = [nothing if u is None else (u.A.detach(), u.B.detach()) for u in updates]
        A, B = stack_users(pairs)
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        scaling = [0.0 if u is None else u.scaling for u in updates]
        self.register_buffer("scaling", torch.tensor(scaling, dtype=A.dtype, device=A.device))
        self.rows = rows

    def forward(
        self, inputs: Float[Tensor, "*batch in"], output: Float[Tensor, "*batch out"], base: Any
    ) -> Float[Tensor, "*batch out"]:
        """Add to each row its user's update."""
        x, y = inputs.reshape(-1, inputs.shape[-1]), output.reshape(-1, output.shape[-1])
        batch = self.rows.batch(len(x), x.device)
        # $y_m = W x_m + s_u B_u A_u x_m$
        found = gathered_lora(x.to(y.dtype), self.A, self.B, batch, self.scaling, y)
        return found.view(output.shape)

    def merged(self, base: nn.Module) -> nn.Module:
        """There is none: one weight cannot be another for every row."""
        raise ValueError("it serves several users, of whom a weight can take up one only.")


def serve(model: Model, *names: str) -> Model:
    """Stack LoRAs that are attached, so that every row of a batch can use another one.

    Args:
        model: A model with LoRAs, of any ranks and on any layers; it is not changed.
        names: Which of them; all that are attached by default.

    Returns:
        A model for inference that computes as the frozen one plus each row's LoRA, inside `users`.

    Raises:
        ValueError: When no LoRA is attached, a name is unknown or given twice, a delta is of
            another kind, or lies on the experts of a mixture, whose rows are not those of the
            batch.
    """
    names = names or attached(model)
    if not names:
        raise ValueError("no LoRA is attached, so there is no user to serve.")
    if len(set(names)) < len(names):
        raise ValueError(f"a delta is named twice in {', '.join(names)}.")
    layers = {name: hosts(model, name) for name in names}
    for name, found in layers.items():
        for host in found.values():
            if type(host.deltas[name]) is not LoRA:
                raise ValueError(
                    f"the delta {name!r} is of kind {host.deltas[name].kind!r}; LoRAs alone can be "
                    "served together."
                )
    modules = modules_by_name(model)
    inside = [path for path, module in modules.items() if isinstance(module, ExpertLinears)]
    rows = _Rows(names)
    stacked: dict[str, Delta] = {}
    for path in dict.fromkeys(p for found in layers.values() for p in found):
        if any(path.startswith(f"{experts}.") for experts in inside):
            raise ValueError(
                f"{path} is an expert: which rows it reads is decided by a router, so that its "
                "users are not known; serve LoRAs on other layers."
            )
        updates = [
            layers[name][path].deltas[name] if path in layers[name] else None for name in names
        ]
        base = next(layers[name][path] for name in names if path in layers[name]).base
        stacked[path] = ServedLoRA(updates, base, rows)
    for name in attached(model):
        model = detach(model, name)
    return attach_deltas(model, SERVED, stacked)


@contextmanager
def users(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Say whose the rows of the batches are that the model reads inside.

    Args:
        model: What `serve` returned.
        names: One for each row of the batch; None for the frozen model.

    Raises:
        ValueError: When the model serves no users, no name is given, or one is unknown.
    """
    deltas = [delta for host in hosts(model).values() for delta in host.deltas.values()]
    served = [delta for delta in deltas if isinstance(delta, ServedLoRA)]
    if not served:
        raise ValueError("the model serves no users; `serving.serve` makes one that does.")
    rows = served[0].rows
    unknown = [name for name in names if name is not None and name not in rows.names]
    if unknown or not names:
        raise ValueError(
            f"{unknown[0]!r} is no user; there are {', '.join(rows.names)}."
            if unknown
            else "no rows are named; give one user, or None, for each."
        )
    before = rows.index
    rows.set(tuple(-1 if name is None else rows.names.index(name) for name in names))
    try:
        yield
    finally:
        rows.set(before)
