"""What implementations of a whole layer, a prediction module and a model are made of: an attention, norms, experts, their orders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import loss, mla, mla_backward, moe, moe_backward, norm
from .floats import Array, to_bf16
from .linear import product, product_outer, product_sequential, product_split, product_steps
from .router import FORWARD as ROUTERS
from .router import forward_eager
from .router_softmax import SOFTMAX, SOFTMAX_EAGER

Pair = tuple[Callable, Callable]


@dataclass(frozen=True)
class Parts:
    """What an implementation is made of; pairs are a forward and a backward. unrounded: a norm after a sum reads it before it is stored.
    summed: gradients that meet are added, then stored; else each is stored first. apart: of two inputs side by side, a product each.
    rolled: a prediction module runs over all rows, those without a token masked at the end. activations: logits under a loss, and their
    gradients, are stored as activations are. every: all operations round to bfloat16."""

    attention: Pair
    rms: Pair
    experts: tuple[moe.How, moe_backward.How]
    layer_back: Callable
    route: Callable
    softmax: Callable
    matmul: Callable = product
    embedding: Pair = (loss.rows_of, loss.scattered)
    entropy: Pair = (loss.LOSS["at-once"], loss.LOSS_BACK["divided"])
    absorbed: Pair | None = None  # the attention's other form, where all is rounded and each is judged by its own
    unrounded: bool = False
    summed: bool = True
    apart: bool = False
    rolled: bool = False
    activations: bool = False
    every: bool = False

    def form(self, a: dict[str, Any]) -> Pair:
        return self.absorbed if self.absorbed is not None and a.get("absorbed") else self.attention

    def inside(self, x: Any) -> Any:
        return to_bf16(x) if self.every else x

    def of_loss(self, to: Callable, x: Array) -> Array:
        return to(x) if self.activations or self.every else x

    def met(self, to: Callable, dx: Array, more: Array) -> Array:
        return to(dx + (more if self.summed else to(more)))


PREFILL, PREFILL_BACK, ABSORB, ABSORB_BACK = mla.PREFILL, mla_backward.PREFILL, mla.ABSORB, mla_backward.ABSORB
HOWS, BACKS, LAYERS = moe.HOWS, moe_backward.HOWS, moe_backward.LAYER
ONE_PASS, BLOCKS = ((loss.LOSS[a], loss.LOSS_BACK[b]) for a, b in (("one-pass", "reciprocal"), ("blocks", "logarithm")))
PARTS = {  # each has an exponential, a root or a key of float32's accuracy, no more
    "tokens": Parts(
        (PREFILL["naive"], PREFILL_BACK["naive"]),
        (norm.forward_pairwise, norm.backward_apex),
        (HOWS["tokens"], BACKS["tokens"]),
        LAYERS["tokens"],
        ROUTERS[0],
        SOFTMAX["sorting"],
    ),
    "absorbed-dense": Parts(
        (ABSORB["absorbed"], ABSORB_BACK["absorbed"]),
        (norm.forward_warp, norm.backward_cubed),
        (HOWS["dense"], BACKS["dense"]),
        LAYERS["dense"],
        ROUTERS[1],
        SOFTMAX["heap-online"],
        product_split,
        (loss.rows_by_product, loss.EMBEDDING_BACK["product"]),
        ONE_PASS,
        unrounded=True,
        apart=True,
        rolled=True,
    ),
    "fused-steps": Parts(
        (PREFILL["fused-down-apart"], PREFILL_BACK["joined"]),
        (norm.forward_dot, norm.backward_late_weight),
        (HOWS["fused-exp2"], BACKS["fused-late"]),
        LAYERS["fused-late"],
        ROUTERS[3],
        SOFTMAX["keys-split-exp"],
        product_steps,
        entropy=BLOCKS,
        unrounded=True,
    ),
    "autograd": Parts(
        (PREFILL["late"], PREFILL_BACK["autograd"]),
        (norm.forward_sequential, norm.backward_textbook),
        (HOWS["running-sum"], BACKS["experts-backwards"]),
        LAYERS["experts-backwards"],
        ROUTERS[2],
        SOFTMAX["partition-fast-exp"],
        product_outer,
        (loss.rows_of, loss.EMBEDDING_BACK["double"]),
        summed=False,
        rolled=True,
        activations=True,
    ),
    "absorbed-sequential": Parts(
        (ABSORB["sequential"], ABSORB_BACK["sequential"]),
        (norm.forward_divided, norm.backward_newton),
        (HOWS["experts-backwards"], BACKS["late-unstored"]),
        LAYERS["late-unstored"],
        ROUTERS[5],
        SOFTMAX["argmax-double"],
        product_sequential,
        (loss.rows_of, loss.EMBEDDING_BACK["product-sequential"]),
        ONE_PASS,
        apart=True,
    ),
}
WIDE = Parts(
    (PREFILL["double"], PREFILL_BACK["double"]),
    (norm.forward_double, norm.backward_double),
    (HOWS["double"], BACKS["double"]),
    LAYERS["double"],
    ROUTERS[4],
    SOFTMAX["argmax-double"],
)
EAGER_LAYER = (moe.EAGER_HOW, moe_backward.EAGER_HOW), moe_backward.LAYER_EAGER, forward_eager, SOFTMAX_EAGER
EAGERS = {
    "eager": Parts(
        (mla.EAGER["eager"], mla_backward.EAGER["eager"]),
        (norm.forward_eager, norm.backward_eager),
        *EAGER_LAYER,
        entropy=(loss.loss_eager, loss.loss_back_eager),
        absorbed=(mla.EAGER["eager-absorbed"], mla_backward.EAGER["eager-absorbed"]),
        summed=False,
        every=True,
    ),
    "eager-steps": Parts(
        (mla.EAGER["eager-hugging-face"], mla_backward.EAGER["eager"]),
        (norm.forward_eager_rsqrt, norm.backward_eager),
        *EAGER_LAYER,
        matmul=product_steps,
        entropy=(loss.loss_eager, loss.loss_back_eager),
        absorbed=(mla.EAGER["eager-absorbed"], mla_backward.EAGER["eager-absorbed"]),
        summed=False,
        rolled=True,
        every=True,
    ),
}
