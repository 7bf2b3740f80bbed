"""Device code of the Triton operator: a product with tiles made on the way.

``operators/triton.py`` says what is computed. ``PARTS`` has seven numbers for each part
of a kernel, of which ``AT`` is the first: whether it is added, the profile, the first
column of the operand and the two widths of that, the first coordinate and how many.
``NUMBERS`` has three: weight, alpha, and E of near pairs. They are not compiled for.

Triton reads this source, so annotations are not checked: see ``no_type_check``.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _operand(X, rows, stride, PARTS: tl.constexpr, AT: tl.constexpr):
    """The operand of some points in one or two pieces (a, K1), (a, K2)."""
    x1 = rows
    x2 = rows
    if PARTS[AT + 3] > 0:
        at = X + rows[:, None] * stride + PARTS[AT + 2]
        x1 = tl.load(at + tl.arange(0, PARTS[AT + 3])[None, :])
        if PARTS[AT + 4] > 0:
            x2 = tl.load(at + PARTS[AT + 3] + tl.arange(0, PARTS[AT + 4])[None, :])
    return x1, x2


@triton.jit
@no_type_check
def _numbers(NUMBERS, i: tl.constexpr):
    """Weight, alpha, and E of near pairs of a part."""
    return tl.load(NUMBERS + i), tl.load(NUMBERS + i + 1), tl.load(NUMBERS + i + 2)


@triton.jit
@no_type_check
def _difference(e, ZR, ZC, rows, cols, m, n, i):
    """E less the squared differences of coordinate i, of (d, m) and (d, n)."""
    t = tl.load(ZR + i * m + rows)[:, None] - tl.load(ZC + i * n + cols)[None, :]
    return e - t * t


@triton.jit
@no_type_check
def _part(
    x1, x2, XC, ZR, ZC, rows, cols, stride, m, n, alpha, level,
    PARTS: tl.constexpr, AT: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """2^SHIFT P of one part, or zero if there is a near pair, and whether there is."""
    near = False
    shift = 1.0 * SHIFT
    D0: tl.constexpr = PARTS[AT + 5]
    D: tl.constexpr = PARTS[AT + 6]
    if PARTS[AT + 3] > 0 and not EXACT:
        y1, y2 = _operand(XC, cols, stride, PARTS, AT)
        e = tl.dot(x1, tl.trans(y1))
        if PARTS[AT + 4] > 0:
            e = tl.dot(x2, tl.trans(y2), e)
        near = tl.max(e) > level
        shift = tl.where(near, -1e4, shift)
    else:
        e = tl.zeros((BM, BN), tl.float32)
        if D <= 4:
            for i in tl.static_range(D0, D0 + D):
                e = _difference(e, ZR, ZC, rows, cols, m, n, i)
        else:
            for i in tl.range(D0, D0 + D, num_stages=1):
                e = _difference(e, ZR, ZC, rows, cols, m, n, i)
    if PARTS[AT + 1] == 0:
        p = tl.exp2(e + shift)
    elif PARTS[AT + 1] == 1:
        p = tl.exp2(shift - alpha * tl.log2(1.0 + tl.maximum(-e, 0.0)))
    else:
        d2 = tl.maximum(-e, 1e-30)
        u = d2 * tl.rsqrt(d2)
        p = tl.exp2(shift - u)
        if PARTS[AT + 1] == 3:
            p *= u * 0.6931471805599453 + 1.0
        elif PARTS[AT + 1] == 4:
            p *= d2 * 0.1601510046 + (u * 0.6931471805599453 + 1.0)
    return p, near


@triton.jit
@no_type_check
def _times(p, V, W, at, acc, FULL: tl.constexpr):
    """Add to acc p v, for v = V + W; the sum over tiles is rounded, not truncated."""
    v = tl.load(V + at)
    hi = p.to(tl.float16)
    if FULL:
        part = tl.dot((p - hi.to(tl.float32)).to(tl.float16), v)
        part = tl.dot(hi, tl.load(W + at), part)
        part = tl.dot(hi, v, part)
    else:
        part = tl.dot(hi, v)
    return acc + part


@triton.jit(do_not_specialize=["first_row", "num_rows", "tiles", "per_split"])
@no_type_check
def product(
    XR, XC, ZR, ZC, INDEX, V, W, OUT, NUMBERS, NEAR,
    first_row, num_rows, tiles, per_split, m, n, stride, count, v_stride,
    PARTS: tl.constexpr, LAST: tl.constexpr, INDEXED: tl.constexpr,
    LISTED: tl.constexpr, EXACT: tl.constexpr, FULL: tl.constexpr, K: tl.constexpr,
    REST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """2^10 P V of a block of rows and one of the splits of columns.

    Tiles with a near pair are left out and listed in ``NEAR``, behind their number. A
    second launch, ``EXACT``, adds them, made of differences. Both in one would halve
    how many programs the registers have room for.
    """
    # One part has no weight to put the scale in; of several, the weights hold it.
    SHIFT: tl.constexpr = 10 if LAST == 0 else 0
    own = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = own < num_rows
    rows = tl.minimum(own, num_rows - 1)
    if INDEXED:
        rows = tl.load(INDEX + rows)
    else:
        rows += first_row
    x1, x2 = _operand(XR, rows, stride, PARTS, 0)
    weight, alpha, level = _numbers(NUMBERS, 0)
    if LAST >= 1:
        xb1, xb2 = _operand(XR, rows, stride, PARTS, 7)
        weight_b, alpha_b, level_b = _numbers(NUMBERS, 3)
    if LAST >= 2:
        xc1, xc2 = _operand(XR, rows, stride, PARTS, 14)
        weight_c, alpha_c, level_c = _numbers(NUMBERS, 6)
    acc = tl.zeros((BM, BN if K == 1 else K), tl.float32)
    if REST > 0:
        rest = tl.zeros((BM, REST), tl.float32)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    listed = NEAR + program * (per_split + 1)
    first = tl.program_id(1) * per_split
    steps = tl.minimum(per_split, tiles - first)
    if EXACT:
        steps = tl.load(listed).to(tl.int32)
        inside = inside & (steps > 0)
    found = 0
    for j in range(0, steps):
        here = j
        if EXACT:
            here = tl.load(listed + 1 + j).to(tl.int32)
        cols = (first + here) * BN + tl.arange(0, BN)
        p, near = _part(x1, x2, XC, ZR, ZC, rows, cols, stride, m, n, alpha, level,
                        PARTS, 0, SHIFT, EXACT, BM, BN)  # fmt: skip
        if LAST >= 1:
            p *= weight
            q, near_b = _part(xb1, xb2, XC, ZR, ZC, rows, cols, stride, m, n, alpha_b,
                              level_b, PARTS, 7, SHIFT, EXACT, BM, BN)  # fmt: skip
            p = p + q * weight_b if PARTS[7] == 1 else p * q
            near = near | near_b
        if LAST >= 2:
            q, near_c = _part(xc1, xc2, XC, ZR, ZC, rows, cols, stride, m, n, alpha_c,
                              level_c, PARTS, 14, SHIFT, EXACT, BM, BN)  # fmt: skip
            p = p + q * weight_c if PARTS[14] == 1 else p * q
            near = near | near_c
        if LISTED:
            if LAST >= 1:
                p *= tl.where(near, 0.0, 1.0)
            tl.store(listed + 1 + found, here.to(tl.int16), mask=near)
            found += near.to(tl.int32)
        if K == 1:
            v = tl.load(V + cols * v_stride, mask=cols < count, other=0.0)
            acc += p * v[None, :]
        else:
            at = cols[:, None] * (K + REST)
            acc = _times(p, V, W, at + tl.arange(0, K)[None, :], acc, FULL)
            if REST > 0:
                more = at + K + tl.arange(0, REST)[None, :]
                rest = _times(p, V, W, more, rest, FULL)
    if LISTED:
        tl.store(listed, found.to(tl.int16))
    out = OUT + (tl.program_id(1) * num_rows + own) * (K + REST)
    if K == 1:
        _finish(out, tl.sum(acc, 1), inside, EXACT)
    else:
        to = out[:, None] + tl.arange(0, K)[None, :]
        _finish(to, acc, inside[:, None], EXACT)
    if REST > 0:
        to = out[:, None] + K + tl.arange(0, REST)[None, :]
        _finish(to, rest, inside[:, None], EXACT)


@triton.jit
@no_type_check
def _finish(to, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(to, mask=mask, other=0.0)
    tl.store(to, value, mask=mask)


@triton.jit(do_not_specialize=["count"])
@no_type_check
def digits(
    V, LARGEST, HI, LO, count, row_stride, column_stride,
    FULL: tl.constexpr, C: tl.constexpr, K: tl.constexpr, REST: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """V (n, C) over its largest entries times 2^10, as float16 hi + lo, padded."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    for part in tl.static_range(2 if REST > 0 else 1):
        cols = part * K + tl.arange(0, REST if part else K)
        known = (rows < count)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * row_stride + cols[None, :] * column_stride
        v = tl.load(V + at, mask=known, other=0.0)
        v *= 1024.0 / tl.load(LARGEST + cols, mask=cols < C, other=1.0)[None, :]
        hi = v.to(tl.float16)
        to = rows[:, None] * (K + REST) + cols[None, :]
        tl.store(HI + to, hi)
        if FULL:
            tl.store(LO + to, (v - hi.to(tl.float32)).to(tl.float16))
