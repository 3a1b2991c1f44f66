"""The kernel of the momentum update: thousands of tensors of any dtypes in one launch, by a table of their addresses."""

import triton
import triton.language as tl

from mgrpo_kernels.ops._triton.kernels import narrow

# Columns of the table, int64, a row for each tensor.
EMA, PARAM, EMIT, NUMEL, COMBINATION, FIRST_CHUNK, KEY_0, KEY_1, BASE, INNER, STRIDE = (
    tl.constexpr(i) for i in range(11)
)
COLUMNS = tl.constexpr(11)
COMBINATIONS = tl.constexpr(80)  # 4 dtypes of the EMA x 4 of the parameter x 5 of what is emitted, one of them none


@triton.jit
def _pointer(address, KIND: tl.constexpr):
    """Return an address as a pointer to the dtype that specs number KIND."""
    if KIND == 0:
        return address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        return address.to(tl.pointer_type(tl.bfloat16))
    elif KIND == 2:
        return address.to(tl.pointer_type(tl.float16))
    else:
        return address.to(tl.pointer_type(tl.float64))


@triton.constexpr_function
def _wider(a, b):
    return a if a.primitive_bitwidth >= b.primitive_bitwidth else b


@triton.jit
def _places(pointer, i, WIDEST: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to elements i.

    The widest dtype moves 16 bytes at once, and the others as many elements, so that a thread keeps the same elements
    throughout: if narrow ones were declared aligned to 16 bytes too, values would move between threads.
    """
    pointers = pointer + i
    if ALIGNED:
        bits: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
        pointers = tl.multiple_of(pointers, 16 * bits // WIDEST.primitive_bitwidth)
    return pointers


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(pointers, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values, mask=inside)
    else:
        tl.store(pointers, values)


@triton.jit
def _convert(values, dtype: tl.constexpr):
    """Round to dtype as PyTorch does: from float64 to 16 bits through float32."""
    if dtype == tl.float64:
        return values.to(tl.float64)
    else:
        return narrow(values.to(tl.float32), dtype)


@triton.jit
def _mix(h):
    """Scramble uint32 numbers: ops/ema/specs.py's mix."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _round_stochastically(values, index, key_0, key_1, dtype: tl.constexpr):
    """Return float32 values rounded to ones that dtype represents: ops/ema/specs.py's round_stochastically."""
    bits = _mix((index & 0xFFFFFFFF).to(tl.uint32) ^ key_0)
    bits = _mix(bits ^ key_1 ^ (index >> 32).to(tl.uint32))
    raw = values.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        bits = bits & 0x1FFF
        rounded = ((raw + bits) & 0xFFFFE000).to(tl.float32, bitcast=True)
        size = tl.abs(values)
        units = tl.floor(size * 16777216.0 + bits.to(tl.float32) * 0.0001220703125)  # of 2^-24
        small = (units * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (raw & 0x80000000)
        rounded = tl.where(size < 6.103515625e-05, small.to(tl.float32, bitcast=True), rounded)
    return tl.where(tl.abs(values) < float("inf"), rounded, values)


@triton.jit
def _block(
    ema,
    param,
    emit,
    i,
    numel,
    decay,
    base,
    inner,
    stride,
    key_0,
    key_1,
    HAS_EMIT: tl.constexpr,
    ROUNDED: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update elements i of a tensor: ema + (1 - decay) (param - ema), from the nearer end."""
    both: tl.constexpr = _wider(ema.dtype.element_ty, param.dtype.element_ty)
    widest: tl.constexpr = _wider(both, emit.dtype.element_ty) if HAS_EMIT else both
    ema = _places(ema, i, widest, ALIGNED)
    param = _places(param, i, widest, ALIGNED)
    inside = i < numel
    wide: tl.constexpr = tl.float64 if ema.dtype.element_ty == tl.float64 else tl.float32
    old = _load(ema, inside, MASKED).to(wide)
    new = _load(param, inside, MASKED).to(wide)
    toward_new = (1.0 - decay).to(wide)
    step = new - old
    updated = tl.where(toward_new < 0.5, old + toward_new * step, new - decay.to(wide) * step)
    updated = tl.where(old == new, old, updated)
    if ROUNDED:
        if inner >= numel:
            index = base + i
        else:
            index = base + (i // inner) * stride + i % inner
        updated = _round_stochastically(updated, index, key_0, key_1, ema.dtype.element_ty)
    result = _convert(updated, ema.dtype.element_ty)
    _store(ema, result, inside, MASKED)
    if HAS_EMIT:
        emit = _places(emit, i, widest, ALIGNED)
        _store(emit, _convert(result.to(wide), emit.dtype.element_ty), inside, MASKED)


@triton.jit
def update_kernel(
    table,
    tensor_of_chunk,
    decay,
    SEEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update chunk ``program_id(0)``. SEEN has a bit for each combination of dtypes: for each the code is compiled in."""
    chunk = tl.program_id(0)
    row = table + tl.load(tensor_of_chunk + chunk).to(tl.int64) * COLUMNS
    numel = tl.load(row + NUMEL)
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    end = tl.minimum(begin + CHUNK, numel)
    whole = begin + (end - begin) // BLOCK * BLOCK  # blocks up to here need no mask, and so load 16 bytes at once
    combination = tl.load(row + COMBINATION)
    rate = tl.load(decay)
    base, inner, stride = tl.load(row + BASE), tl.load(row + INNER), tl.load(row + STRIDE)
    key_0, key_1 = tl.load(row + KEY_0).to(tl.uint32), tl.load(row + KEY_1).to(tl.uint32)
    for code in tl.static_range(COMBINATIONS):
        if (SEEN >> code) & 1 and combination == code:
            ema = _pointer(tl.load(row + EMA), code % 4)
            param = _pointer(tl.load(row + PARAM), code // 4 % 4)
            emit = _pointer(tl.load(row + EMIT), code // 16 - 1)
            has_emit: tl.constexpr = code >= 16
            rounded: tl.constexpr = STOCHASTIC and (code % 4 == 1 or code % 4 == 2)
            for first in range(begin, whole, BLOCK):
                i = first + tl.arange(0, BLOCK)
                _block(
                    ema,
                    param,
                    emit,
                    i,
                    numel,
                    rate,
                    base,
                    inner,
                    stride,
                    key_0,
                    key_1,
                    has_emit,
                    rounded,
                    False,
                    ALIGNED,
                )
            if whole < end:
                i = whole + tl.arange(0, BLOCK)
                _block(
                    ema,
                    param,
                    emit,
                    i,
                    numel,
                    rate,
                    base,
                    inner,
                    stride,
                    key_0,
                    key_1,
                    has_emit,
                    rounded,
                    True,
                    ALIGNED,
                )
