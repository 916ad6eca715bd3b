r"""QLoRA: fine-tune a model whose weights are frozen in four bits.

The base of every linear layer is stored as NF4, a table of sixteen numbers made for normally
distributed weights, with block scales that are quantized themselves: 4.127 bits per weight. Beside
it a LoRA is trained in full precision; the gradient reaches it through the weights read back:

$$y = \operatorname{dequantize}(W)\, x + \frac{\alpha}{r}\, B A x.$$

A weight is read back for each product and dropped again, in the forward and in the backward pass,
so that training holds the model in four bits all the time (see `effnb.core.deltas`).

Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
arXiv 2305.14314.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Layers, Model, chooses_layers
from effnb.finetuning import lora
from effnb.inference.quantization.formats import Granularity, quantize
from effnb.inference.quantization.linear import refuse_quantized
from effnb.inference.quantization.rtn import quantize_linears
from effnb.inference.quantization.stored import Stored
from effnb.inference.quantization.tables import quantize_table


@chooses_layers
@in_linear_form
def qlora(
    model: Model,
    name: str = "default",
    *,
    table: str | Float[Tensor, "*levels"] = "nf4",
    block_size: Granularity = 64,
    double: bool = True,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    layers: LayerChoice = "*",
    seed: int = 0,
) -> Model:
    """Store the linear layers of a model in four bits and lay a LoRA beside each.

    The result is a model with a delta as any other: train it, then save, swap or detach the delta
    by the functions of `effnb.finetuning.lora`. Merging needs `dequantize=True`, because the sum of
    weight and delta is on no grid. For a base quantized by another method (GPTQ, AWQ), use
    `lora.attach` on that model.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        name: What to call the delta.
        table: What the base is stored in: a named table ("nf4", "fp4", "e2m1", …), the entries of
            your own, or "int4" for the symmetric uniform grid with scales in half precision.
        block_size: Weights that share a scale.
        double: Whether the scales are quantized too; not for "int4".
        rank: r. The paper has 64, and layers thousands wide.
        alpha: The delta is scaled by alpha / rank.
        dropout: Part of the inputs of A set to 0 in training; the paper has 0.1 for models of up to
            13 billion parameters.
        rank_stabilized: Whether to scale by alpha / sqrt(rank).
        layers: Name patterns of the layers; the paper takes all linear layers.
        seed: Seed of A.

    Returns:
        A new model; only A and B require gradients.

    Raises:
        ValueError: An argument out of range, an unknown table, weights that are not finite, no
            fitting layer, or a model that is quantized already.
        TypeError: When the rank is not a whole number.
    """
    refuse_quantized(model)

    def store(weight: Tensor) -> Stored:
        if isinstance(table, str) and table == "int4":
            return quantize(weight, 4, group_size=block_size, symmetric=True)
        return quantize_table(weight, table, block_size=block_size, double=double)

    new = lora.attach(
        model,
        name,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rank_stabilized=rank_stabilized,
        layers=layers,
        seed=seed,
    )
    bases = [f"{path}.base" for path in lora.hosts(new, name)]
    return quantize_linears(new, store, layers=Layers(bases, ()))
