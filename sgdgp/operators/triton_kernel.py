"""Device code of the Triton operator: a product with tiles made on the way.

``operators/triton.py`` says what is computed. ``PARTS`` has seven numbers for each part
of a kernel, of which ``AT`` is the first: whether it is added, the profile, the first
column of the operand and the two widths of that, the first coordinate and how many.
``NUMBERS`` has three: weight, alpha, and E of near pairs. They are not compiled for.
``PULL`` is the part that a quadratic form is differentiated by, -1 for products; the
operand of the form's weights comes behind those of all parts.

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
def _difference(ZR, ZC, rows, cols, m, n, i):
    """Differences of coordinate i, of (d, m) and (d, n)."""
    return tl.load(ZR + i * m + rows)[:, None] - tl.load(ZC + i * n + cols)[None, :]


@triton.jit
@no_type_check
def _part(
    x1, x2, XC, ZR, ZC, rows, cols, stride, m, n, alpha, level,
    PARTS: tl.constexpr, AT: tl.constexpr, SHIFT: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """2^SHIFT P of one part, or zero if there is a near pair, and whether there is.

    Between them, what dP / dE and dP / d alpha are but for a number. That is such that
    slopes of Matern-1/2 are at most P where no pair is near.
    """
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
                t = _difference(ZR, ZC, rows, cols, m, n, i)
                e -= t * t
        else:
            for i in tl.range(D0, D0 + D, num_stages=1):
                t = _difference(ZR, ZC, rows, cols, m, n, i)
                e -= t * t
    if PARTS[AT + 1] == 0:
        p = tl.exp2(e + shift)
        slope = p
        bend = p
    elif PARTS[AT + 1] == 1:
        base = 1.0 + tl.maximum(-e, 0.0)
        power = tl.log2(base)
        p = tl.exp2(shift - alpha * power)
        slope = p / base
        bend = -power * p
    else:
        d2 = tl.maximum(-e, 1e-30)
        root = tl.rsqrt(d2)
        u = d2 * root
        p = tl.exp2(shift - u)
        slope = p
        bend = p
        if PARTS[AT + 1] == 2:
            slope = p * (root * tl.sqrt(-level))
        elif PARTS[AT + 1] == 3:
            p *= u * 0.6931471805599453 + 1.0
        else:
            linear = u * 0.6931471805599453 + 1.0
            slope = p * linear
            p *= d2 * 0.1601510046 + linear
    return p, slope, bend, near


@triton.jit
@no_type_check
def _linked(
    p, own, slope, bend, outer, q, q_slope, q_bend, weight,
    PARTS: tl.constexpr, AT: tl.constexpr, PULL: tl.constexpr,
):  # fmt: skip
    """P + weight q or p q; of the part to pull at, its values and dp / d own."""
    if PULL * 7 == AT:
        own = q
        slope = q_slope
        bend = q_bend
        outer = weight if PARTS[AT] == 1 else p
    elif PARTS[AT] == 0:
        outer = outer * q
    p = p + q * weight if PARTS[AT] == 1 else p * q
    return p, own, slope, bend, outer


@triton.jit
@no_type_check
def _added(to, values, mask):
    """Add sums over rows (a, b); no other program writes there."""
    tl.atomic_add(to, tl.sum(values, 1), mask=mask, sem="relaxed")


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
    XR, XC, ZR, ZC, INDEX, V, W, OUT, SUMS, NUMBERS, NEAR,
    first_row, num_rows, tiles, per_split, m, n, stride, count, v_stride,
    PARTS: tl.constexpr, LAST: tl.constexpr, INDEXED: tl.constexpr,
    LISTED: tl.constexpr, EXACT: tl.constexpr, PULL: tl.constexpr, FULL: tl.constexpr,
    K: tl.constexpr, REST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """2^10 P V of a block of rows and one of the splits of columns.

    Tiles with a near pair are left out and listed in ``NEAR``, behind their number. A
    second launch, ``EXACT``, adds them, made of differences. Both in one would halve
    how many programs the registers have room for.

    With a part to pull at, G V of G = 2^10 (weights * slopes), entry by entry; what
    sums of differences there are, of values, and of what alpha bends, go to ``SUMS``.
    """
    # One part has no weight to put the scale in; of several, the weights hold it.
    SHIFT: tl.constexpr = 10 if LAST == 0 else 0
    PULLED: tl.constexpr = 7 * PULL if PULL > 0 else 0
    # Where displacements are summed, and not their two ends.
    APART: tl.constexpr = PULL >= 0 and (EXACT or PARTS[PULLED + 3] == 0)
    D: tl.constexpr = PARTS[PULLED + 6]
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
    if PULL >= 0:
        a1, a2 = _operand(XR, rows, stride, PARTS, 7 * LAST + 7)
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
        p, slope, bend, near = _part(
            x1, x2, XC, ZR, ZC, rows, cols, stride, m, n, alpha, level,
            PARTS, 0, SHIFT, EXACT, BM, BN)  # fmt: skip
        value = p
        outer = weight
        if LAST >= 1:
            q, q_slope, q_bend, near_b = _part(
                xb1, xb2, XC, ZR, ZC, rows, cols, stride, m, n, alpha_b, level_b,
                PARTS, 7, SHIFT, EXACT, BM, BN)  # fmt: skip
            p, value, slope, bend, outer = _linked(
                p * weight, value, slope, bend, outer, q, q_slope, q_bend, weight_b,
                PARTS, 7, PULL)  # fmt: skip
            near = near | near_b
        if LAST >= 2:
            q, q_slope, q_bend, near_c = _part(
                xc1, xc2, XC, ZR, ZC, rows, cols, stride, m, n, alpha_c, level_c,
                PARTS, 14, SHIFT, EXACT, BM, BN)  # fmt: skip
            p, value, slope, bend, outer = _linked(
                p, value, slope, bend, outer, q, q_slope, q_bend, weight_c,
                PARTS, 14, PULL)  # fmt: skip
            near = near | near_c
        if PULL >= 0:
            b1, b2 = _operand(XC, cols, stride, PARTS, 7 * LAST + 7)
            p = tl.dot(a1, tl.trans(b1))
            if PARTS[7 * LAST + 11] > 0:
                p = tl.dot(a2, tl.trans(b2), p)
            # Both sides were multiplied by 2^6, and there are two terms.
            p *= 0.0001220703125
            if LAST >= 1:
                p *= outer
        if LISTED:
            if LAST >= 1:
                p *= tl.where(near, 0.0, 1.0)
            tl.store(listed + 1 + found, here.to(tl.int16), mask=near)
            found += near.to(tl.int32)
        if PULL >= 0:
            to = SUMS + (tl.program_id(1) * num_rows + own) * (D + 2)
            _added(to + D, p * value, inside)
            if PARTS[PULLED + 1] == 1:
                _added(to + D + 1, p * bend, inside)
            p *= slope
            if APART:
                for i in tl.range(0, D, num_stages=1):
                    t = _difference(ZR, ZC, rows, cols, m, n, PARTS[PULLED + 5] + i)
                    _added(to + i, p * t, inside)
        if K == 1:
            v = tl.load(V + cols * v_stride, mask=cols < count, other=0.0)
            acc += p * v[None, :]
        elif not APART:
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
    elif not APART:
        to = out[:, None] + tl.arange(0, K)[None, :]
        _finish(to, acc, inside[:, None], EXACT)
    if REST > 0 and not APART:
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
