"""The arithmetic on a tile as two Triton kernels, on a GPU.

They compute what `tile_reductions.py` and `logit_gradients.py` do.

Products are the library's (cuBLAS); a tile of them is then read once, one row to a program, and
everything about the row happens in registers. `streaming.py` takes these kernels on a CUDA device
where Triton is installed; `TRITON_INTERPRET=1` runs them on a CPU, slowly, for the tests.

Left out: fusing the product itself into the kernel. Writing and reading a tile costs little beside
a product thousands wide.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportUntypedFunctionDecorator=false
# Triton is an optional dependency, and its kernels are no Python: parameters are pointers, and a
# branch on a term that is None is taken or left out when the kernel is compiled.

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kleash.scoring.logit_gradients import Rows
from kleash.scoring.tile_reductions import Needs
from kleash.scoring.tiles import Bare, raw_logits, softcap_slope


def tile_sums(bare: list[Bare], needs: Needs, out: Float[Tensor, "sums R"]) -> None:
    """`tile_reductions.tile_sums` by a kernel, into `out`."""
    raw = [raw_logits(one) for one in bare]
    rows, columns = raw[0].shape
    if rows == 0:
        return
    two_models = len(bare) == 2
    _sums[(rows,)](
        raw[0],
        raw[-1],
        out,
        out.stride(0),
        out.stride(1),
        columns,
        bare[0].gain,
        bare[-1].gain,
        bare[-1].gain / bare[0].gain,
        TWO_MODELS=two_models,
        ENTROPY=needs.entropy,
        REF_ENTROPY=needs.ref_entropy and two_models,
        MEAN_D=(needs.kl or needs.variance) and two_models,
        VARIANCE=needs.variance and two_models,
        REF_MEAN_D=needs.reverse_kl and two_models,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=8,
    )


def tile_gradients(bare: list[Bare | None], rows: Rows, outs: list[Tensor | None]) -> None:
    """`logit_gradients.tile_gradients` by a kernel."""
    policy, reference = (*bare, None)[:2]
    out, ref_out = (*outs, None)[:2]
    raw = None if policy is None else raw_logits(policy)
    ref_raw = None if reference is None else raw_logits(reference)
    some = raw if raw is not None else ref_raw
    assert some is not None, "a tile without a model has no gradient"
    if some.shape[0] == 0:
        return
    gain = 1.0 if policy is None else policy.gain
    ref_gain = 1.0 if reference is None else reference.gain
    terms, ref_terms = rows.policy, rows.reference
    _gradients[(some.shape[0],)](
        raw,
        ref_raw,
        rows.m,
        rows.n,
        rows.mean_d,
        rows.ref_mean_d,
        *((None,) * 5 if terms is None else terms),
        *((None,) * 5 if ref_terms is None else ref_terms),
        out,
        ref_out,
        some.shape[1],
        gain,
        ref_gain,
        ref_gain / gain,
        BLOCK=triton.next_power_of_2(some.shape[1]),
        num_warps=8,
    )
    for model, logits, gradient in ((policy, raw, out), (reference, ref_raw, ref_out)):
        if gradient is not None and logits is not None and model is not None:
            gradient.mul_(softcap_slope(logits, model.inner))


@triton.jit
@no_type_check
def _below_maximum(raw, row, columns, gain, BLOCK: tl.constexpr):
    """One row: its maximum, how far the others lie below it, and 2 to that in bits; 0 beyond."""
    column = tl.arange(0, BLOCK)
    here = column < columns
    logits = tl.load(raw + row * columns + column, mask=here, other=-float("inf"))
    top = tl.max(logits, axis=0)
    below = tl.where(here, logits - top, 0.0)
    return top, below, tl.where(here, tl.exp2(below * gain), 0.0)


@triton.jit
@no_type_check
def _sums(
    x,
    y,
    out,
    out_stride,
    row_stride,
    columns,
    gain,
    ref_gain,
    ratio,
    TWO_MODELS: tl.constexpr,
    ENTROPY: tl.constexpr,
    REF_ENTROPY: tl.constexpr,
    MEAN_D: tl.constexpr,
    VARIANCE: tl.constexpr,
    REF_MEAN_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a tile; rows of `out` in the order of `tile_reductions.sum_names`."""
    row = tl.program_id(0).to(tl.int64)
    to = out + row * row_stride
    m, a, p = _below_maximum(x, row, columns, gain, BLOCK)
    s = tl.sum(p, axis=0)
    tl.store(to, m)
    tl.store(to + out_stride, s)
    to += 2 * out_stride
    if ENTROPY:
        tl.store(to, tl.sum(p * a, axis=0) / s)
        to += out_stride
    if TWO_MODELS:
        n, b, q = _below_maximum(y, row, columns, ref_gain, BLOCK)
        r = tl.sum(q, axis=0)
        tl.store(to, n)
        tl.store(to + out_stride, r)
        to += 2 * out_stride
        if REF_ENTROPY:
            tl.store(to, tl.sum(q * b, axis=0) / r)
            to += out_stride
        d = a - b * ratio
        if MEAN_D:
            mean_d = tl.sum(p * d, axis=0) / s
            tl.store(to, mean_d)
            to += out_stride
            if VARIANCE:
                tl.store(to, tl.sum(p * (d - mean_d) * (d - mean_d), axis=0) / s)
                to += out_stride
        if REF_MEAN_D:
            tl.store(to, tl.sum(q * d, axis=0) / r)


@triton.jit
@no_type_check
def _below(at, maximum, here, gain):
    """How far one row's logits lie below its maximum of all tiles, and 2 to that in bits."""
    below = tl.load(at, mask=here, other=0.0) - tl.load(maximum)
    return below, tl.exp2(below * gain)


@triton.jit
@no_type_check
def _gradients(
    x,
    y,
    m,
    n,
    mean_d,
    ref_mean_d,
    constant,
    by_d,
    by_d2,
    by_a,
    by_q,
    ref_constant,
    ref_by_d,
    by_b,
    by_p,
    by_pd,
    out,
    ref_out,
    columns,
    gain,
    ref_gain,
    ratio,
    BLOCK: tl.constexpr,
):
    """One row of a tile; a pointer that is None is a term that is not there."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < columns
    at = row * columns + column
    if x is not None:
        a, p = _below(x + at, m + row, here, gain)
    if y is not None:
        b, q = _below(y + at, n + row, here, ref_gain)
    if mean_d is not None:
        d = a - b * ratio - tl.load(mean_d + row)
    if constant is not None:
        factor = tl.load(constant + row)
        if by_d is not None:
            factor = factor + d * tl.load(by_d + row)
        if by_d2 is not None:
            factor = factor + d * d * tl.load(by_d2 + row)
        if by_a is not None:
            factor = factor + a * tl.load(by_a + row)
        gradient = p * factor
        if by_q is not None:
            gradient -= q * tl.load(by_q + row)
        tl.store(out + at, gradient, mask=here)
    if ref_constant is not None:
        factor = tl.load(ref_constant + row)
        if ref_by_d is not None:
            ref_d = a - b * ratio - tl.load(ref_mean_d + row)
            factor = factor + ref_d * tl.load(ref_by_d + row)
        if by_b is not None:
            factor = factor + b * tl.load(by_b + row)
        gradient = q * factor
        if by_pd is not None:
            gradient += p * d * tl.load(by_pd + row)
        if by_p is not None:
            gradient += p * tl.load(by_p + row)
        tl.store(ref_out + at, gradient, mask=here)
