"""What the attention kernels share: a step of the online softmax (arXiv 1805.02867) and a matrix product."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(scores, row_max, row_sum, to_log2, shift):
    """Weights of one tile of scores, and the running maximum and sum of its rows brought up to date.

    scores [M, N] fp32, row_max and row_sum [M] fp32 -> weights [M, N], rescale [M], row_max, row_sum.
    weights = 2^(to_log2 * (scores - row_max) + shift), at most 2^shift. What was summed up under the old maximum is to
    be multiplied by `rescale`. The scores stay unscaled until the exponent, where the factor costs nothing: one
    multiply-add. A row must have a finite score in its first tile.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores * to_log2 - (new_max * to_log2 - shift)[:, None])
    rescale = tl.exp2((row_max - new_max) * to_log2)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def dot(a, b, accumulator, INTERPRET: tl.constexpr):
    """a [M, K] @ b [K, N] + accumulator in fp32. The interpreter multiplies bf16 wrongly, and is given fp32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator)


@triton.jit
def fresh_dot(a, b, INTERPRET: tl.constexpr):
    """a [M, K] @ b [K, N] of FP8 values, in an accumulator of its own, which the compiler must not merge with another.

    The FP8 tensor cores of Ada and Hopper add with about 14 bits and cut the rest off (arXiv 2412.19437, section 3.3.2;
    arXiv 2411.10958): over thousands of keys that is several percent. Sums of one tile each are added up in true fp32.
    """
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
