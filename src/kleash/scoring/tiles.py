"""Cutting [N, V] logits into tiles, and running arithmetic on one tile at a time.

A tile of logits is a matrix product small enough to stay in the cache while it is summed up. Its
shape decides speed as much as the arithmetic does: wide and tall enough for the product to be
efficient, small enough not to be written to main memory.

Exponentials are 2^x, the cheapest there is (torch on a CPU takes e^x in two and a half times the
time), so sums over tiles are held in bits; scores are turned back into nats.
"""

import functools
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kleash.types import Head

_logger = logging.getLogger(__name__)

T = TypeVar("T")

Body = Literal["auto", "plain", "compiled", "triton"]

LN2 = math.log(2)
"""Nats per bit."""

SLICE = 1 << 17
"""Logits per thread and step of the plain body: few enough to stay in the second-level cache,
enough to be worth a call."""

WORTH_COMPILING = 1 << 27
"""Logits per call from which "auto" spends some twenty seconds, once, on compiling."""

BANNED = -1e18
"""Stands for a logit of −∞ inside the tiles, in bits.

It lies so far below any logit that its exponential is exactly 0, and unlike −∞ it, its differences
and their squares stay finite, so that 0 · x is 0 in value and gradient. Whether a KL is infinite is
read off the heads, never off this number.
"""


@dataclass(frozen=True)
class Tiles:
    """How to walk over the logits: changes time and memory, not results beyond rounding."""

    rows: int = 1024
    """Rows (tokens) per tile."""
    columns: int = 1024
    """Words per tile."""
    keep_bytes: int = 0
    """Bytes of logits to keep from forward for backward; what is not kept is computed again."""
    keep_reference: bool = True
    """Whether the reference's are kept beside the policy's: a loss of log-probabilities alone does
    not ask for them."""
    weight_gradients: Literal["returned", "in_place"] = "returned"
    """Where the gradient of the policy's head goes: to autograd as a matrix, or, of a weight that
    is a leaf, straight into its `.grad`, so that there is one such matrix and not two."""
    body: Body = "auto"
    """Arithmetic on a tile: plain torch, compiled by torch.compile, Triton kernels, or "auto":
    Triton on a CUDA device that has it; on a CPU compiled where a C++ compiler works and a call has
    at least `WORTH_COMPILING` logits; else plain."""

    def __post_init__(self) -> None:
        """Refuse empty tiles and negative budgets."""
        if self.rows < 1 or self.columns < 1 or self.keep_bytes < 0:
            raise ValueError(
                "expected tiles of at least one row and column and keep_bytes of at least 0, "
                f"got {self}"
            )


def default_tiles(device: torch.device) -> Tiles:
    """Tiles for the cache of a CPU, or large enough to keep a GPU busy."""
    return Tiles(rows=2048, columns=4096) if device.type == "cuda" else Tiles()


class Bare(NamedTuple):
    """Products W h, of a tile or one per row, with what turns them into logits; see `Side`."""

    product: Float[Tensor, "*R C"]
    bias: Float[Tensor, " C"] | None
    inner: float | None
    gain: float

    def cut(self, rows: slice) -> "Bare":
        """The same for some of the rows."""
        return self._replace(product=self.product[rows])


def raw_logits(bare: Bare) -> Float[Tensor, "*R C"]:
    """From bare products to logits up to the gain."""
    x = bare.product if bare.bias is None else bare.product + bare.bias
    return x if bare.inner is None else torch.tanh(x * bare.inner)


def softcap_slope(raw: Tensor, inner: float | None) -> Tensor | float:
    """Derivative of raw logits with respect to the bare products."""
    return 1.0 if inner is None else inner * (1 - raw.square())


@dataclass(frozen=True)
class Side:
    """One of the two models, as tensors and numbers ready for tiles.

    Logits in bits are gain · raw, and of x = W h + b

        raw = x                  without: gain = scale / (T ln 2)
        raw = tanh(inner · x)    with it: gain = softcap / (T ln 2), inner = scale / softcap

    The gain multiplies differences of raw logits, after they are taken: multiplied into h or W it
    would cost a rounding of each, and the logits more than they lose in the product itself.
    """

    hidden: Float[Tensor, "N D"]
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    banned: Bool[Tensor, " V"] | None
    """Words whose logit is −∞ whatever the hidden state; None where there are none."""
    inner: float | None
    gain: float
    dtype: torch.dtype

    def new_empty(self, *shape: int) -> Tensor:
        """Memory on the model's device in the working dtype."""
        return self.hidden.new_empty(shape, dtype=self.dtype)

    @property
    def on_gpu(self) -> bool:
        """Whether the model lies on a CUDA device."""
        return self.hidden.is_cuda

    @property
    def half(self) -> bool:
        """Whether products are of bfloat16 with sums in float32, which a GPU has and torch's CPU
        has not: there the sums would be rounded to bfloat16. The hidden states decide: rows of a
        float32 head are rounded a tile at a time, and their gradient is never rounded."""
        kinds = (torch.bfloat16, torch.float32)
        return self.on_gpu and self.hidden.dtype == kinds[0] and self.weight.dtype in kinds

    def rows(self, span: slice) -> Float[Tensor, "R D"]:
        """Hidden states of a tile's rows, ready for `product`."""
        return self.hidden[span] if self.half else self.hidden[span].to(self.dtype)

    def columns(self, span: slice) -> Float[Tensor, "C D"]:
        """Head rows of a tile's words, ready for `product`."""
        return self.weight[span].to(torch.bfloat16 if self.half else self.dtype)

    def product(
        self, left: Float[Tensor, "I K"], right: Float[Tensor, "K J"], out: Float[Tensor, "I J"]
    ) -> Float[Tensor, "I J"]:
        """left · right in the working dtype, into `out`."""
        if self.half:
            return torch.mm(left, right, out_dtype=self.dtype, out=out)
        return torch.mm(left, right, out=out)

    def bare(self, product: Float[Tensor, "R C"], span: slice) -> Bare:
        """A tile's product with the biases of its words."""
        bias = None if self.bias is None else self.bias[span]
        return Bare(product, bias, self.inner, self.gain)


def side(
    hidden: Float[Tensor, "N D"], head: Head, *, temperature: float, dtype: torch.dtype
) -> Side:
    """Prepare a model for tiling; banned words get a finite stand-in (see `BANNED`).

    Raises:
        ValueError: if every word is banned.
    """
    outer = head.scale if head.softcap is None else head.softcap
    gain = outer / (temperature * LN2)
    bias = banned = None
    if head.bias is not None:
        bias = head.bias[: head.words].to(dtype)
        # A soft-cap lifts a bias of −∞ to a finite logit.
        if head.softcap is None and bool((unwritable := bias == -torch.inf).any()):
            if bool(unwritable.all()):
                raise ValueError("a head must leave a word to write, got a bias of −∞ on all words")
            banned = unwritable
            bias = torch.where(banned, BANNED / gain, bias)
    return Side(
        hidden=hidden,
        weight=head.weight[: head.words],
        bias=bias,
        banned=banned,
        inner=None if head.softcap is None else head.scale / head.softcap,
        gain=gain,
        dtype=dtype,
    )


Sides = tuple[Side] | tuple[Side, Side]
"""The policy alone, or the policy and its reference."""


class Buffer:
    """Memory for one tile, used again for every tile."""

    def __init__(self, side: Side, tiles: Tiles) -> None:
        """Buffer for a whole tile, or for all logits where they are fewer."""
        rows = min(tiles.rows, side.hidden.shape[0])
        columns = min(tiles.columns, side.weight.shape[0])
        self._memory = side.new_empty(rows * columns)

    def tile(self, rows: int, columns: int) -> Float[Tensor, "R C"]:
        """A contiguous matrix of this shape; what was in it is lost."""
        return self._memory[: rows * columns].view(rows, columns)


def lacks(one: Side, other: Side) -> bool:
    """Whether a word of `other` is banned in `one`: then a KL from `other` to `one` is infinite."""
    if one.banned is None:
        return False
    return bool((one.banned if other.banned is None else one.banned & ~other.banned).any())


def spans(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `total`; one empty slice covers 0."""
    for start in range(0, max(total, 1), size):
        yield slice(start, min(start + size, total))


def slices(rows: int, columns: int) -> Iterator[slice]:
    """Rows that the plain body takes at once."""
    return spans(rows, max(1, SLICE * torch.get_num_threads() // columns))


def body_for(tiles: Tiles, side: Side) -> Literal["plain", "compiled", "triton"]:
    """How the arithmetic on the tiles of a call is done."""
    if tiles.body != "auto":
        return tiles.body
    if side.on_gpu:
        return "triton" if importlib.util.find_spec("triton") else "plain"
    logits = side.hidden.shape[0] * side.weight.shape[0]
    return "compiled" if logits >= WORTH_COMPILING and compiler_works() else "plain"


@functools.cache
def compiler_works() -> bool:
    """Try torch.compile once; without a working C++ compiler it fails, and we say so in the log."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own code
            doubled = torch.compile(_double)(torch.ones(2))
    except Exception as error:  # torch.compile's failures have nothing in common
        _logger.info("kleash scores with plain torch: torch.compile does not work here (%s)", error)
        return False
    return bool((doubled == 2).all())


def _double(x: Tensor) -> Tensor:
    return x * 2


def is_whole(tile: Float[Tensor, "R C"], tiles: Tiles) -> bool:
    """Whether a tile is no remnant: compiling for each shape of remnant would not pay."""
    return tile.shape == (tiles.rows, tiles.columns)


@functools.cache
def compiled(body: Callable[..., T]) -> Callable[..., T]:
    """The body through torch.compile, one kernel for each shape of whole tiles."""
    return torch.compile(body, dynamic=False)
