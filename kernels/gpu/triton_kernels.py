"""Triton kernels. Launchers, tables and counts are beside; nothing here knows torch.

Arguments that change from step to step (tokens, and what follows from them) are not specialised: nothing is compiled
in a step, however many lengths it meets.

The gather kernels multiply kept weights only. Their activations are packed as [features, pitch], tokens side by side
and zero-padded to `pitch`, so that one kept weight reads one contiguous run of tokens. Arithmetic is float32: operands
are cast right after each load, which the interpreter, whose bfloat16 arithmetic is wrong, needs as well.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def pack_activations(
    packed, x, tokens, features, pitch, token_stride, feature_stride, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """``packed[f, t] = x[t, f]``, zeros from `tokens` to `pitch`. Grid: (pitch / BLOCK_T, features / BLOCK_F)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t[:, None] < tokens) & (f[None, :] < features)
    source = t[:, None].to(tl.int64) * token_stride + f[None, :].to(tl.int64) * feature_stride
    tile = tl.trans(tl.load(x + source, mask=inside, other=0))
    tl.store(packed + f[:, None].to(tl.int64) * pitch + t[None, :], tile, mask=f[:, None] < features)


@triton.jit
def pack_words(words, bits, columns, order, count, PERMUTED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One word per kept weight: its bits above its column (16 + 16, or 32 + 32 if WIDE). Grid: count / BLOCK.

    `bits` are the values viewed as integers; PERMUTED takes them in `order`.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    source = tl.load(order + i, mask=inside, other=0) if PERMUTED else i
    value = tl.load(bits + source, mask=inside, other=0)
    column = tl.load(columns + i, mask=inside, other=0)
    if WIDE:
        word = (value.to(tl.int64) << 32) | column.to(tl.int64)
    else:
        word = (value.to(tl.int32) << 16) | (column.to(tl.int32) & 0xFFFF)
    tl.store(words + i, word, mask=inside)


@triton.jit
def unpack(word, KIND: tl.constexpr):
    """Column and float32 value of a word; KIND: "fp32", "fp16" or "bf16"."""
    if KIND == "fp32":
        column = (word & 0xFFFFFFFF).to(tl.int32)
        value = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif KIND == "bf16":  # its bits are the upper half of the float32
        column = word & 0xFFFF
        value = (word & -65536).to(tl.float32, bitcast=True)
    else:
        column = word & 0xFFFF
        value = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return column, value


@triton.jit(do_not_specialize=["tokens", "panels_each"])
def gather_spmm(
    y, packed, words, pointers, order, bias, tokens, rows, pitch, token_stride, panels_each,
    KIND: tl.constexpr, ORDERED: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``y[t, n] = bias[n] + sum of kept W[n, k] · packed[k, t]``.

    A program takes BLOCK_T tokens through `panels_each` panels of BLOCK_N rows; a column that several rows of a panel
    keep comes from L2 once. In step i each row of a panel takes its i-th kept weight: rows of unequal length idle
    (predicated loads, but their multiply-adds run and are counted), so a panel's time is its longest row's. Columns
    rise within a row: rows of a panel, and programs beside each other, move through `packed` together.

    `pointers` [rows + 1] starts each row's words; ORDERED: `order` [rows] is the row in each slot. WIDE: 64-bit offsets
    into `packed`. Grid: token blocks · ceil(panels / panels_each), panels fastest.
    """
    panels = tl.cdiv(rows, BLOCK_N)
    groups = tl.cdiv(panels, panels_each)
    first = (tl.program_id(0) % groups) * panels_each
    t = (tl.program_id(0) // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    for panel in range(first, min(first + panels_each, panels)):
        slot = panel * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = slot < rows
        row = tl.load(order + slot, mask=inside, other=0) if ORDERED else slot
        start = tl.load(pointers + row, mask=inside, other=0)
        length = tl.load(pointers + row + 1, mask=inside, other=0) - start
        sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        if BIAS:
            sums += tl.load(bias + row, mask=inside, other=0).to(tl.float32)[:, None]
        for i in range(0, tl.max(length, 0), UNROLL):
            # Words first, activations second: their latencies overlap.
            word = ()
            for u in tl.static_range(UNROLL):
                word += (tl.load(words + start + i + u, mask=i + u < length, other=0),)
            x = ()
            for u in tl.static_range(UNROLL):
                column, _ = unpack(word[u], KIND)
                if WIDE:
                    column = column.to(tl.int64)
                x += (tl.load(packed + column[:, None] * pitch + t[None, :], mask=(i + u < length)[:, None], other=0),)
            for u in tl.static_range(UNROLL):
                _, value = unpack(word[u], KIND)
                sums += value[:, None] * x[u].to(tl.float32)
        # Tokens are rows of y: turned round, so that a warp writes neighbours.
        where = t[:, None].to(tl.int64) * token_stride + row[None, :]
        store = (t[:, None] < tokens) & inside[None, :]
        tl.store(y + where, tl.trans(sums).to(y.dtype.element_ty), mask=store)


@triton.jit
def gather_sddmm(
    out, packed_grad, packed_x, rows, columns, count, pitch, share,
    WIDE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``out[s, e] = sum over t of packed_grad[rows[e], t] · packed_x[columns[e], t]`` for the tokens of split s.

    Kept weights in row-major order: those of a program share few rows of `packed_grad`. A split takes `share` tokens, a
    multiple of BLOCK_T, so that it is always specialised alike. `out` is float32 [splits, count]. Grid: (count /
    BLOCK_E, splits).
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < count
    n = tl.load(rows + e, mask=inside, other=0).to(tl.int32)
    k = tl.load(columns + e, mask=inside, other=0).to(tl.int32)
    if WIDE:
        n, k = n.to(tl.int64), k.to(tl.int64)
    sums = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    begin = tl.program_id(1) * share
    for t0 in range(begin, min(begin + share, pitch), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        grad = tl.load(packed_grad + n[:, None] * pitch + t[None, :], mask=inside[:, None], other=0).to(tl.float32)
        x = tl.load(packed_x + k[:, None] * pitch + t[None, :], mask=inside[:, None], other=0).to(tl.float32)
        sums += grad * x
    tl.store(out + tl.program_id(1) * count + e, tl.sum(sums, 1), mask=inside)


@triton.jit
def ones(word):
    """Bits set in an int32 whose top bit is not."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return (((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def kept_places(bits, before, pointers, columns, words, BLOCK: tl.constexpr):
    """Of BLOCK columns of a row: where they lie in the dense matrix, their places among the values, which are kept.

    `bits` int32 [rows, words] is the pattern, 32 columns a word; `before`, of the same shape, is its prefix sum along a
    row, and `pointers` along the column of rows. Grid: columns / BLOCK for each row.
    """
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    k = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    inside = k < columns
    where = row * words + k // 32
    word = tl.load(bits + where, mask=inside, other=0)
    bit = k % 32
    ahead = tl.load(pointers + row) + tl.load(before + where, mask=inside, other=0).to(tl.int32)
    return row * columns + k, ahead + ones(word & ((1 << bit) - 1)), inside, inside & (((word >> bit) & 1) == 1)


@triton.jit
def expand(weight, values, bits, before, pointers, columns, words, BLOCK: tl.constexpr):
    """``weight[row, k]`` = the value of a kept weight, zero where masked; of any two dtypes."""
    position, place, inside, kept = kept_places(bits, before, pointers, columns, words, BLOCK)
    value = tl.load(values + place, mask=kept, other=0)
    tl.store(weight + position, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def sample(values, dense, bits, before, pointers, columns, words, BLOCK: tl.constexpr):
    """``values`` = kept positions of ``dense``; of any two dtypes."""
    position, place, _, kept = kept_places(bits, before, pointers, columns, words, BLOCK)
    value = tl.load(dense + position, mask=kept, other=0)
    tl.store(values + place, value.to(values.dtype.element_ty), mask=kept)
