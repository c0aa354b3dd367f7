"""Attention of a few new queries to a long key/value cache: grouped heads, split keys, one GPU or a ring of them.

Decoding reads every key and value once and computes next to nothing, so it should take as long as the bytes do. The G
query heads times M query tokens that share a key/value head are packed into the rows of one tile, so that the cache is
read once. A sequence's tiles are cut into as many pieces as fill the GPU; each piece leaves a partial result

    lse_i = log sum_j exp(s_j)      o_i = sum_j exp(s_j - lse_i) v_j            over the keys j of piece i

and one reduction merges pieces of one GPU, and shards of many:

    lse = log sum_i exp(lse_i)      o = sum_i exp(lse_i - lse) o_i

Shapes: B batch, M query tokens, N tokens that the cache has room for, H query heads, HKV key/value heads, G = H // HKV, D
head dim; L tokens in the cache of a sequence. q, o (B, M, H, D); k, v (B, N, HKV, D), or pages (P, page_size, HKV, D) with
a table; lse (B, H, M) float32, natural log. Query m sits at position L - M + m, key j of rank r of R at r + R * j.
Parallelism: a program per piece. How many pieces a sequence gets is computed from the lengths on the device, so a ragged
batch costs about its bytes, and a CUDA graph replays after they have changed.

Not here: gradients, quantised caches, dropout.

Sources: Flash-Decoding (Dao et al. 2023), FlexAttention and its flex_decoding (PyTorch), PagedAttention (arXiv 2309.06180),
attention sinks (2309.17453), tree attention (2408.04093).

    python decode.py --prompt='def '                            # go on with the newest checkpoint of train.py
    torchrun --nproc_per_node=2 decode.py --prompt='def '       # each process keeps half of the cache; the text is the same
    python bench.py --filter decode                             # speed, beside flex_attention and FlashAttention
    python test.py --filter decode
"""

import argparse
import codecs
import inspect
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from einops import einsum, rearrange

import ring_attn
from ring_attn import LOG2E, launch

# -----------------------------------------------------------------------------
# reference: plain torch. The CPU path, and the page to read first


def reference_decode(q, k, v, seen, sm_scale, score_mod=None, indices=(), aux=()):
    """o (B, M, H, D) and lse (B, H, M), both float32 or wider, of queries q (B, M, H, D) and keys and values k, v (B, N, HKV, D).

    seen: which keys each query sees, broadcast to (B, H, M, N). indices: b, h, q_idx, kv_idx for score_mod, broadcast likewise.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    G = q.shape[2] // k.shape[2]
    q = rearrange(q.to(wide), "b m (h g) d -> b h g m d", g=G)
    s = rearrange(einsum(q, k.to(wide), "b h g m d, b n h d -> b h g m n"), "b h g m n -> b (h g) m n") * sm_scale
    if score_mod is not None:
        s = score_mod(s, *indices, *aux).to(wide)
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)  # (B, H, M)
    p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()  # a row that sees no key: o = 0, not nan
    v = v.to(wide).masked_fill(~seen.any(dim=(1, 2)).expand(len(v), -1)[:, :, None, None], 0.0)  # what nobody sees may be nan
    return einsum(rearrange(p, "b (h g) m n -> b h g m n", g=G), v, "b h g m n, b n h d -> b m h g d").flatten(2, 3), lse


def reference_merge(o, lse, sink=None):
    """Merge parts o (R, B, M, H, D), lse (R, B, H, M), and sink (H,) logits without a value, into o (B, M, H, D), lse (B, H, M)."""
    total = lse.logsumexp(0)
    if sink is not None:
        total = torch.logaddexp(total, sink.to(lse.dtype)[:, None])
    w = (lse - total.masked_fill(total == -math.inf, 0.0)).exp()  # (R, B, H, M)
    return einsum(o, w, "r b m h d, r b h m -> b m h d"), total


# -----------------------------------------------------------------------------
# kernels. A key list is what some segments share: the tokens of a sequence, or the blocks that a row of a block mask names. A segment
# is a tile of packed query rows that share a key/value head of a sequence. All segments of a list are cut into the same pieces. These
# are numbered list by list, then piece by piece, heads fastest: programs that run side by side read whole rows of the cache

@triton.jit
def n_before(x, N, START, STRIDE):
    """How many of the N local keys, at positions START + STRIDE * j, sit before position x."""
    return tl.minimum((tl.maximum(x - START, 0) + STRIDE - 1) // STRIDE, N)


@triton.jit
def span(L, M, N, START, STRIDE, WINDOW, N_SINK, BLOCK_N: tl.constexpr):
    """How the local keys of a sequence of L tokens fall into tiles: the number with sink tokens, of unseen ones behind them, which are
    skipped, and of tiles to look at."""
    tiles = tl.cdiv(n_before(L, N, START, STRIDE), BLOCK_N)
    sink = tl.minimum(tl.cdiv(n_before(N_SINK, N, START, STRIDE), BLOCK_N), tiles)
    first = tl.maximum(n_before(L - M - WINDOW + 1, N, START, STRIDE) // BLOCK_N, sink)  # where the first query's window begins
    return sink, first - sink, tiles - first + sink


@triton.jit
def n_named(NUM, exists, n_blocks):
    """How many blocks a row of a mask names; a wrong number must not lead outside of its list."""
    return tl.maximum(tl.minimum(tl.load(NUM, mask=exists, other=0), n_blocks), 0)


@triton.jit
def list_pieces(SEQLENS, KV_NUM, FULL_NUM, n_lists, n_sub, M, N, LENGTH, START, STRIDE, WINDOW, N_SINK, n_blocks, TARGET, N_SPLITS,
                TILES_PER_BLOCK: tl.constexpr, LISTS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Of every key list: its tiles, and the pieces that each of its n_sub segments is cut into: N_SPLITS, or their share of TARGET.
    An empty list has one piece, which writes zeros; lists that do not exist have none. [LISTS] each."""
    l = tl.arange(0, LISTS)
    exists = l < n_lists
    if TILES_PER_BLOCK > 0:
        tiles = n_named(KV_NUM + l, exists, n_blocks) * TILES_PER_BLOCK
        if FULL_NUM is not None:
            tiles += n_named(FULL_NUM + l, exists, n_blocks) * TILES_PER_BLOCK
    else:
        L = tl.full([LISTS], 0, tl.int32) + LENGTH
        if SEQLENS is not None:
            L = tl.minimum(tl.load(SEQLENS + l, mask=exists, other=0), LENGTH)
        _, _, tiles = span(L, M, N, START, STRIDE, WINDOW, N_SINK, BLOCK_N)
    tiles = tl.where(exists, tiles, 0)
    share = (tiles.to(tl.int64) * TARGET // tl.maximum(tl.sum(tiles.to(tl.int64), 0) * n_sub, 1)).to(tl.int32)
    pieces = tl.minimum(tl.where(N_SPLITS > 0, N_SPLITS, share), tiles)  # no branch here: behind one Triton 3.8 forgets that addresses are aligned
    return tiles, tl.where(exists, tl.maximum(pieces, 1), 0)


@triton.jit
def place(l, sub, B, HS, LB, LH, MT):
    """(sequence, head segment, row tile) of segment `sub` of key list l."""
    mt, rest = sub % MT, sub // MT
    h = tl.where(LH == 1, rest % HS, l % LH)
    b = tl.where(LB == 1, tl.where(LH == 1, rest // HS, rest), l // LH)
    return b, h, mt


@triton.jit
def finish(acc, m_i, l_i, row, head, keep, O, LSE, SINK, stride_o, stride_l, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write o = acc / l_i [rows, BLOCK_D] and lse [rows] to rows `row` of O and LSE; m_i is in units of log 2. Zeros and -inf where l_i is 0."""
    if SINK is not None:
        sink = tl.load(SINK + head).to(tl.float32) * LOG2E
        m_new = tl.maximum(m_i, sink)
        alpha = tl.math.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.math.exp2(sink - m_new)
        acc, m_i = acc * alpha[:, None], m_new
    some = l_i > 0
    l_i = tl.where(some, l_i, 1.0)
    offs_d = tl.arange(0, BLOCK_D)
    o = (acc / l_i[:, None]).to(O.dtype.element_ty)
    tl.store(O + row.to(tl.int64)[:, None] * stride_o + offs_d[None, :], o, mask=keep[:, None] & (offs_d < HEAD_DIM)[None, :])
    if LSE is not None:
        tl.store(LSE + row.to(tl.int64) * stride_l, tl.where(some, (m_i + tl.math.log2(l_i)) / LOG2E, -float("inf")), mask=keep)


@triton.jit
def tile_start(t, l, n_full, sink, skipped, n_blocks, block_size, KV_IDX, FULL_IDX, TILES_PER_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of tile t of a key list. Of a mask's row first come the full blocks, then the others that it names."""
    if TILES_PER_BLOCK > 0:
        at = t // TILES_PER_BLOCK
        index = KV_IDX + l * n_blocks + at - n_full
        if FULL_IDX is not None:
            index = tl.where(at < n_full, FULL_IDX + l * n_blocks + at, index)
        return tl.load(index) * block_size + t % TILES_PER_BLOCK * BLOCK_N
    else:
        return (t + tl.where(t < sink, 0, skipped)) * BLOCK_N


@triton.jit
def look_up(PAGES, start, n, page_size, BLOCK_N: tl.constexpr):
    """The pages of the keys from `start` on, [BLOCK_N]."""
    j = start + tl.arange(0, BLOCK_N)
    return tl.load(PAGES + j // page_size, mask=(j >= 0) & (j < n), other=0)


@triton.jit
def decode_kernel(Q, K, V, O, LSE, PARTS, SEQLENS, PAGES, KV_NUM, KV_IDX, FULL_NUM, FULL_IDX, SINK, AUX, sm_scale,
                  KV_GROUP, B, H, HS, G, M, N, LENGTH, START, STRIDE, WINDOW, N_SINK, LB, LH, MT, n_blocks, TARGET, N_SPLITS,
                  n_pages, page_size, max_pages, block_size,
                  stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_o, stride_l,
                  SCORE_MOD: tl.constexpr, MASK_MOD: tl.constexpr, CAUSAL: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
                  LISTS: tl.constexpr, PDL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One piece of one segment: its own o and lse if it is the only piece, else a partial result for merge_pieces_kernel."""
    pid = tl.program_id(0)
    n_lists = LB * LH
    n_sub = B * HS * MT // n_lists
    if PDL:  # the launch did not wait for the kernels before it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    all_tiles, all_pieces = list_pieces(SEQLENS, KV_NUM, FULL_NUM, n_lists, n_sub, M, N, LENGTH, START, STRIDE, WINDOW, N_SINK, n_blocks, TARGET,
                                        N_SPLITS, TILES_PER_BLOCK, LISTS, BLOCK_N)  # fmt: skip
    ends = tl.cumsum(all_pieces * n_sub, 0)
    l = tl.sum((ends <= pid).to(tl.int32), 0)
    if l >= n_lists:
        return  # the grid has room for any lengths
    this = tl.arange(0, LISTS) == l
    tiles, pieces, end = tl.sum(tl.where(this, all_tiles, 0), 0), tl.sum(tl.where(this, all_pieces, 0), 0), tl.sum(tl.where(this, ends, 0), 0)
    piece, sub = (pid - end + pieces * n_sub) // n_sub, (pid - end + pieces * n_sub) % n_sub
    b, h, mt = place(l, sub, B, HS, LB, LH, MT)

    L = LENGTH
    if SEQLENS is not None:
        L = tl.maximum(tl.minimum(tl.load(SEQLENS + b), LENGTH), 0)
    n = n_before(L, N, START, STRIDE)
    sink, skipped, _ = span(L, M, N, START, STRIDE, WINDOW, N_SINK, BLOCK_N)
    n_full = 0  # blocks
    if FULL_NUM is not None:
        n_full = n_named(FULL_NUM + l, True, n_blocks)

    row = mt * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = row < G * M
    m, head = row // G, h * G + row % G
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d = (offs_d < HEAD_DIM)[None, :]
    q = Q + b.to(tl.int64) * stride_qb + m[:, None] * stride_qm + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q, mask=keep[:, None] & in_d, other=0.0)  # [BLOCK_M, D]
    q_pos = L - M + m
    q_idx = tl.maximum(tl.minimum(q_pos, L - 1), 0)[:, None]  # for the mods, which may read at these indices: always one that exists
    q_end = q_pos + 1 if CAUSAL else L
    seq = 0 if PAGES is not None else b.to(tl.int64)
    K += seq * stride_kb + (h // KV_GROUP).to(tl.int64) * stride_kh + offs_d[None, :]
    V += seq * stride_vb + (h // KV_GROUP).to(tl.int64) * stride_vh + offs_d[None, :]

    m_i, l_i = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, end = tiles * piece // pieces, tiles * (piece + 1) // pieces
    if PAGES is not None:
        PAGES += b * max_pages
        start = tile_start(begin, l, n_full, sink, skipped, n_blocks, block_size, KV_IDX, FULL_IDX, TILES_PER_BLOCK, BLOCK_N)
        page = look_up(PAGES, start, n, page_size, BLOCK_N)
    for t in tl.range(begin, end):
        start = tile_start(t, l, n_full, sink, skipped, n_blocks, block_size, KV_IDX, FULL_IDX, TILES_PER_BLOCK, BLOCK_N)
        j = start + offs_n
        there = (j >= 0) & (j < n)
        if TILES_PER_BLOCK > 0:
            there = there & (j < (start // block_size + 1) * block_size)
        if PAGES is None:
            k_at, v_at = start.to(tl.int64) * stride_kn + offs_n * stride_kn, start.to(tl.int64) * stride_vn + offs_n * stride_vn
        else:
            where = tl.maximum(tl.minimum(page, n_pages - 1), 0).to(tl.int64)  # a wrong page must not lead outside
            k_at, v_at = where * stride_kb + j % page_size * stride_kn, where * stride_vb + j % page_size * stride_vn
            # the next tile's page, now: the copies of its keys would else wait for it
            start = tile_start(tl.minimum(t + 1, end - 1), l, n_full, sink, skipped, n_blocks, block_size, KV_IDX, FULL_IDX, TILES_PER_BLOCK, BLOCK_N)
            page = look_up(PAGES, start, n, page_size, BLOCK_N)
        k = tl.load(K + k_at[:, None], mask=there[:, None] & in_d, other=0.0)  # [BLOCK_N, D]
        v = tl.load(V + v_at[:, None], mask=there[:, None] & in_d, other=0.0)  # [BLOCK_N, D]
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        kv_pos = START + STRIDE * j
        kv_idx = tl.maximum(tl.minimum(kv_pos, L - 1), 0)[None, :]
        if SCORE_MOD is not None:
            s = SCORE_MOD(s * sm_scale, b, head[:, None], q_idx, kv_idx, *AUX) * LOG2E
        else:
            s *= sm_scale * LOG2E
        seen = there[None, :] & (kv_pos[None, :] < (q_end[:, None] if CAUSAL else q_end))
        seen = seen & ((kv_pos[None, :] > q_pos[:, None] - WINDOW) | (kv_pos < N_SINK)[None, :])
        if MASK_MOD is not None:
            allowed = MASK_MOD(b, head[:, None], q_idx, kv_idx, *AUX)
            if TILES_PER_BLOCK > 0:
                allowed = allowed | (t < n_full * TILES_PER_BLOCK)
            seen = seen & allowed
        s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen no key yet: exp2(-inf - 0) = 0, not nan
        p = tl.math.exp2(s - shift[:, None])
        alpha = tl.math.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BLOCK_M, D]
        m_i = m_new

    if pieces == 1:
        finish(acc, m_i, l_i, (b * M + m) * H + head, head, keep, O, LSE, SINK, stride_o, stride_l, HEAD_DIM, BLOCK_D)
    else:
        finish(acc, m_i, l_i, pid * BLOCK_M + tl.arange(0, BLOCK_M), head, keep, PARTS, PARTS + BLOCK_D, None, 2 * BLOCK_D, 2 * BLOCK_D, BLOCK_D, BLOCK_D)


@triton.jit
def merge_row(PARTS, first, stride, n, row, head, O, LSE, SINK, behind, stride_part, stride_o, stride_l,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Merge the n rows first + i * stride of PARTS, of o with lse `behind` it, into row `row` of O and LSE."""
    m_i, l_i = tl.full([1], -float("inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for start in tl.range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        at = PARTS + (first + i * stride).to(tl.int64) * stride_part
        lse = tl.load(at + behind, mask=i < n, other=-float("inf")) * LOG2E  # [CHUNK]
        o = tl.load(at[:, None] + offs_d[None, :], mask=(i < n)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        w = tl.math.exp2(lse - shift)
        alpha = tl.math.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(w, 0)
        acc = acc * alpha[:, None] + tl.sum(o * w[:, None], 0)[None, :]
        m_i = m_new
    one = tl.arange(0, 1)
    finish(acc, m_i, l_i, row + one, head + one, one == 0, O, LSE, SINK, stride_o, stride_l, HEAD_DIM, BLOCK_D)


@triton.jit
def merge_pieces_kernel(PARTS, O, LSE, SEQLENS, KV_NUM, FULL_NUM, SINK,
                        B, H, HS, G, M, N, LENGTH, START, STRIDE, WINDOW, N_SINK, LB, LH, MT, n_blocks, TARGET, N_SPLITS, stride_o, stride_l,
                        TILES_PER_BLOCK: tl.constexpr, LISTS: tl.constexpr, PDL: tl.constexpr, HEAD_DIM: tl.constexpr,
                        BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One row of the result from the pieces of its segment, which decode_kernel left; nothing to do where there was one."""
    rows = tl.minimum(G * M, BLOCK_M)
    segment, r = tl.program_id(0) // rows, tl.program_id(0) % rows
    n_lists = LB * LH
    n_sub = B * HS * MT // n_lists
    l, sub = segment // n_sub, segment % n_sub
    _, all_pieces = list_pieces(SEQLENS, KV_NUM, FULL_NUM, n_lists, n_sub, M, N, LENGTH, START, STRIDE, WINDOW, N_SINK, n_blocks, TARGET,
                                N_SPLITS, TILES_PER_BLOCK, LISTS, BLOCK_N)  # fmt: skip
    lists = tl.arange(0, LISTS)
    pieces = tl.sum(tl.where(lists == l, all_pieces, 0), 0)
    first = tl.sum(tl.where(lists < l, all_pieces * n_sub, 0), 0) + sub
    b, h, mt = place(l, sub, B, HS, LB, LH, MT)
    row = mt * BLOCK_M + r
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (pieces > 1) & (row < G * M):
        head = h * G + row % G
        merge_row(PARTS, first * BLOCK_M + r, n_sub * BLOCK_M, pieces, (b * M + row // G) * H + head, head, O, LSE, SINK, BLOCK_D, 2 * BLOCK_D,
                  stride_o, stride_l, HEAD_DIM, BLOCK_D, CHUNK)  # fmt: skip


@triton.jit
def merge_ranks_kernel(PARTS, O, LSE, SINK, n_ranks, rows, H, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """One row of the result from what each rank found: PARTS (n_ranks, rows, D + 1), o and behind it lse."""
    row = tl.program_id(0)
    merge_row(PARTS, row, rows, n_ranks, row, row % H, O, LSE, SINK, HEAD_DIM, HEAD_DIM + 1, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, CHUNK)


# -----------------------------------------------------------------------------
# launchers


class Problem(NamedTuple):
    """What is asked for; one rank's part of it, if the cache is striped over ranks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None
    page_table: torch.Tensor | None
    block_mask: Any
    score_mod: Callable | None
    mask_mod: Callable | None
    aux: tuple
    sm_scale: float
    causal: bool
    window: int | None
    n_sink: int
    n_splits: int | None
    rank: int
    n_ranks: int

    def capacity(self):
        """Tokens of a sequence that all ranks together have room for."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1]) * self.n_ranks


class Plan(NamedTuple):
    """How a kind of problem is cut and launched, whatever the lengths."""

    number: int  # of the kind
    segments: int  # (sequence, key/value head, row tile) triples
    grid: int  # programs of decode_kernel: as many as there may be pieces
    rows: int  # programs of merge_pieces_kernel, if there may be more pieces than segments
    sizes: tuple  # decode_kernel's integers, in order, but for the strides of o and lse
    shared: tuple  # those that merge_pieces_kernel takes too
    constants: dict  # decode_kernel's
    merge_constants: dict
    options: dict
    merge_options: dict


NO_WINDOW = 2**30  # every position is below


def make_plan(p):
    """The Plan of a Problem. Tile sizes are what one H100 liked best."""
    (B, M, H, D), HKV, dtype, device = p.q.shape, p.k.shape[2], p.q.dtype, p.q.device
    _, mask_shape = mask_tables(p.block_mask)
    LB, LH, n_blocks, block_size = mask_shape or (B if p.lengths is not None else 1, 1, 0, p.n_ranks)
    block_size //= p.n_ranks
    HS, G = (H, 1) if LH > 1 else (HKV, H // HKV)  # under a mask that differs by head, heads cannot share what they read
    BLOCK_D, narrow = max(16, triton.next_power_of_2(D)), dtype.itemsize == 2
    BLOCK_M = 16 if G * M <= 16 else 64 if narrow and D <= 128 else 32  # wgmma takes 64 rows; at 256 columns they would spill
    MT = triton.cdiv(G * M, BLOCK_M)
    segments, rows = B * HS * MT, B * HS * MT * min(G * M, BLOCK_M)
    properties = None if ring_attn.INTERPRET else torch.cuda.get_device_properties(device)
    n_sm = properties.multi_processor_count if properties else 8
    # large tiles: the memory likes few streams of them. Small ones, where pieces are short, are sooner under way
    large = 4 * segments > n_sm and BLOCK_M == 16
    BLOCK_N = min(128, max(16, (16384 if large else 8192) // BLOCK_D)) if narrow else max(16, 4096 // BLOCK_D)
    while mask_shape and BLOCK_N > 16 and block_size % BLOCK_N:
        BLOCK_N //= 2
    num_stages = 5 if p.page_table is not None and not large else 3  # looking pages up takes stages too
    while properties and num_stages > 1 and 2 * (num_stages - 1) * BLOCK_N * BLOCK_D * dtype.itemsize > properties.shared_memory_per_block_optin - 16384:
        num_stages -= 1
    N = p.capacity() // p.n_ranks
    if p.n_splits:
        grid = segments * p.n_splits
    elif LB * LH == 1 and not mask_shape and p.window is None:
        grid = segments * max(1, min(triton.cdiv(N, BLOCK_N), n_sm // segments))  # what list_pieces will find
    else:
        grid = segments + n_sm
    pdl = properties is not None and ring_attn.capability(device)[0] >= 9  # programmatic dependent launch: see gdc_wait in the kernels
    shared = (B, H, HS, G, M, N, p.capacity(), p.rank, p.n_ranks, p.window or NO_WINDOW, p.n_sink, LB, LH, MT, n_blocks, n_sm, p.n_splits or 0)
    n_pages, page_size, max_pages = (len(p.k), p.k.shape[1], p.page_table.shape[1]) if p.page_table is not None else (0, 1, 0)
    sizes = (H // HKV // G, *shared, n_pages, page_size, max_pages, block_size, *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3])
    constants = dict(TILES_PER_BLOCK=triton.cdiv(block_size, BLOCK_N) if mask_shape else 0, LISTS=triton.next_power_of_2(LB * LH), PDL=pdl,
                     HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)  # fmt: skip
    mods = dict(SCORE_MOD=p.score_mod, MASK_MOD=p.mask_mod, CAUSAL=bool(p.causal or p.window))
    chunk, warps = (64, 4) if rows <= n_sm else (16, 2)  # few programs, which have the machine for themselves, or many small ones
    options = dict(launch_pdl=True) if pdl else {}
    return Plan(len(CHECKED), segments, grid, rows, sizes, shared, mods | constants, constants | dict(CHUNK=chunk),
                dict(num_warps=4, num_stages=num_stages, **options), dict(num_warps=warps, **options))  # fmt: skip


def mask_tables(block_mask):
    """KV_NUM, KV_IDX, FULL_NUM, FULL_IDX of a block mask, and its (sequences, heads, blocks, block size); Nones for None."""
    if block_mask is None:
        return (None, None, None, None), None
    tables = [getattr(block_mask, name) for name in BLOCK_MASK_TABLES]
    size = block_mask.BLOCK_SIZE
    shape = *tables[1].shape[:2], tables[1].shape[3], size if isinstance(size, int) else size[1]
    return tuple(x if x is None else x.contiguous() for x in tables), shape


BLOCK_MASK_TABLES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def triton_part(p, plan, o, lse, sink):
    """Launch the kernels that write o (B, M, H, D) and lse (B, M, H), or None for no lse; both may have a stride between rows."""
    tables, _ = mask_tables(p.block_mask)
    cut = plan.grid > plan.segments
    # of each piece and row o, lse and nothing, to a power of two: rows that begin in the middle of a cache line cost a microsecond or two
    size = plan.grid * plan.constants["BLOCK_M"] * 2 * plan.constants["BLOCK_D"]
    parts = torch.empty(size, dtype=torch.float32, device=p.q.device) if cut else o  # which then nobody writes to
    strides = o.stride(2), 0 if lse is None else lse.stride(2)
    pointers = (p.q, p.k, p.v, o, lse, parts, p.lengths, p.page_table, *tables, sink)
    alignment = [x is not None and x.data_ptr() % 16 for x in (*pointers, *p.aux)]
    depends = plan.number, o.dtype, lse is None, strides, tuple(alignment) if any(alignment) else None
    with torch.cuda.device_of(p.q):  # kernels launch on the current device
        launch(decode_kernel, p.q.device, depends, plan.grid, (*pointers, p.aux, p.sm_scale, *plan.sizes, *strides), plan.constants, **plan.options)
        if cut:
            args = (parts, o, lse, p.lengths, tables[0], tables[2], sink, *plan.shared, *strides)
            launch(merge_pieces_kernel, p.q.device, depends, plan.rows, args, plan.merge_constants, **plan.merge_options)


def torch_part(p, sink):
    """o (B, M, H, D) and lse (B, H, M), float32 or wider."""
    (B, M, H, _), device = p.q.shape, p.q.device
    k, v = p.k, p.v
    if p.page_table is not None:
        pages = p.page_table.long().clamp(0, len(k) - 1)
        k, v = k[pages].flatten(1, 2), v[pages].flatten(1, 2)
    lengths = torch.full((B,), p.capacity(), device=device) if p.lengths is None else p.lengths.long().clamp(0, p.capacity())
    n = -(-max(int(lengths.max()) - p.rank, 0) // p.n_ranks)  # no sequence has more keys here
    k, v = k[:, :n], v[:, :n]
    L = lengths[:, None, None, None]
    q_pos = L - M + torch.arange(M, device=device)[:, None]  # (B, 1, M, 1)
    kv_pos = p.rank + p.n_ranks * torch.arange(n, device=device)
    seen = kv_pos < L
    if p.causal or p.window is not None:
        seen = seen & (kv_pos <= q_pos)
    if p.window is not None:
        seen = seen & ((kv_pos > q_pos - p.window) | (kv_pos < p.n_sink))
    existing = lambda pos: pos.minimum(L - 1).clamp(min=0)  # mods may read at these indices
    indices = torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[:, None, None], existing(q_pos), existing(kv_pos)
    allowed = p.mask_mod(*indices, *p.aux) if p.mask_mod is not None else torch.ones((), dtype=torch.bool, device=device)
    (num, idx, full_num, full_idx), shape = mask_tables(p.block_mask)
    if shape:
        allowed = allowed & named_blocks(num, idx)[:, :, None, kv_pos // shape[3]]  # (B or 1, H or 1, 1, n)
        if full_num is not None:
            allowed = allowed | named_blocks(full_num, full_idx)[:, :, None, kv_pos // shape[3]]
    o, lse = reference_decode(p.q, k, v, (seen & allowed).expand(B, -1, -1, -1), p.sm_scale, p.score_mod, indices, p.aux)
    return reference_merge(o[None], lse[None], sink)


def named_blocks(num, idx):
    """Which blocks the first num (B, H, 1) entries of idx (B, H, 1, blocks) name: (B, H, blocks) bool."""
    num, idx = num[:, :, 0], idx[:, :, 0]
    n_blocks = idx.shape[-1]
    listed = torch.arange(n_blocks, device=idx.device) < num[..., None]
    named = torch.zeros(*num.shape, n_blocks + 1, dtype=torch.bool, device=idx.device)
    return named.scatter(2, torch.where(listed, idx, n_blocks).long(), True)[..., :n_blocks]


# -----------------------------------------------------------------------------
# checks


def n_arguments(mod):
    """How many arguments a mod takes; None if any number."""
    if hasattr(mod, "arg_names"):
        return len(mod.arg_names)  # of a @triton.jit function
    kinds = [x.kind for x in inspect.signature(mod).parameters.values()]
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else len(kinds)


def whole(x, least, most=math.inf):
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def check_decode(p, backend, sink):
    """Raise ValueError, with the values and a way out, for anything that a call cannot do. Reads no tensor."""
    q, k, v = p.q, p.k, p.v
    for name, x in dict(q=q, k=k, v=v).items():
        if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be a dense tensor with four dimensions, none of them 0, not {ring_attn.summary(x)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} and q {q.dtype} on {q.device}; cast and move them to one")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and decoding has none; call it under torch.no_grad(), or train with ring_attn")
    (B, M, H, D), HKV = q.shape, k.shape[2]
    table, on_device = p.page_table, lambda x, dtype: isinstance(x, torch.Tensor) and x.dtype == dtype and x.device == q.device
    if k.shape != v.shape or k.shape[3] != D or (table is None and len(k) != B):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; need q (B, M, H, D), k and v (B, N, HKV, D), or (P, page_size, HKV, D) and a page_table")
    if H % HKV:
        raise ValueError(f"{H} query heads cannot share {HKV} key/value heads: H must be a multiple of HKV")
    if backend not in ("torch", "triton"):
        raise ValueError(f'{backend=} is unknown; choose "torch" or "triton", or None to choose by device')
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)[: 4 if backend == "torch" else 3]
    if q.dtype not in dtypes:
        raise ValueError(f'{q.dtype} is not supported by backend="{backend}"; cast to one of {", ".join(map(str, dtypes))}')
    if backend == "triton":
        ring_attn.check_portable(q)
        for name, x in dict(k=k, v=v).items():
            if table is not None and x.shape[1] * x.stride(1) > ring_attn.INT_MAX:
                raise ValueError(f"{name} has pages of {x.shape[1]} tokens, {x.stride(1)} numbers apart; a page must stay below 2**31 numbers: use smaller pages")
            if x.stride(3) != 1:
                raise ValueError(f"{name} has strides {x.stride()}; the last must be 1: lay the cache out as (B, N, HKV, D) or as (B, HKV, N, D), transposed")
    if not isinstance(p.sm_scale, (int, float)) or not 0 < p.sm_scale < math.inf:
        raise ValueError(f"sm_scale={p.sm_scale!r} must be a finite number above 0; to flip its sign negate q")
    if not isinstance(p.causal, int):  # bool is one
        raise ValueError(f"causal={p.causal!r} must be True or False")
    if p.window is not None and not whole(p.window, 1, NO_WINDOW - 1):
        raise ValueError(f"window={p.window!r} must be a number of keys from 1 to {NO_WINDOW - 1}, or None for all")
    if p.n_splits is not None and not whole(p.n_splits, 1, 4096):
        raise ValueError(f"n_splits={p.n_splits!r} must be from 1 to 4096, or None to choose by length")
    if sink is not None and not whole(sink, 0) and not (isinstance(sink, torch.Tensor) and sink.shape == (H,) and on_device(sink, sink.dtype) and sink.is_floating_point()):
        kind = sink if isinstance(sink, (int, float)) else ring_attn.summary(sink)
        raise ValueError(f"sink={kind} must be how many first keys every window keeps, or a float tensor ({H},) on {q.device}: a logit for each query head")
    if whole(sink, 1) and p.window is None:
        raise ValueError(f"{sink=} keeps keys that a window would drop, but window=None drops none; give a window")
    if table is not None and not (on_device(table, torch.int32) and table.ndim == 2 and len(table) == B and table.shape[1] and table.is_contiguous()):
        raise ValueError(f"page_table {ring_attn.summary(table)} must be a contiguous int32 tensor ({B}, max_pages) on {q.device}")
    if p.capacity() >= NO_WINDOW:
        raise ValueError(f"the cache has room for {p.capacity()} tokens; it must be fewer than {NO_WINDOW}")
    if p.lengths is not None and not (on_device(p.lengths, torch.int32) and p.lengths.shape == (B,) and p.lengths.is_contiguous()):
        raise ValueError(f"cache_seqlens {ring_attn.summary(p.lengths)} must be a contiguous int32 tensor ({B},) on {q.device}")
    if not isinstance(p.aux, tuple) or not all(isinstance(x, torch.Tensor) and x.device == q.device for x in p.aux):
        raise ValueError(f"aux must be a tuple of tensors on {q.device}, further arguments for the mods")
    for name, mod, takes in (("score_mod", p.score_mod, "score, b, h, q_idx, kv_idx"), ("mask_mod", p.mask_mod, "b, h, q_idx, kv_idx")):
        if mod is None:
            continue
        jitted = hasattr(mod, "arg_names")
        if jitted != (backend == "triton") or not (jitted or callable(mod)):
            kind = "a @triton.jit function" if backend == "triton" else "a plain function of torch tensors (@triton.jit ones need a GPU, or TRITON_INTERPRET=1)"
            raise ValueError(f'{name}={mod!r} must be {kind} for backend="{backend}"')
        arguments = takes.split(", ") + [f"aux[{i}]" for i in range(len(p.aux))]
        if n_arguments(mod) not in (None, len(arguments)):
            raise ValueError(f"{name} takes {n_arguments(mod)} arguments and is given {len(arguments)}: {', '.join(arguments)}")
    if p.block_mask is not None:
        check_block_mask(p)


def check_block_mask(p):
    mask, (B, M, H, _) = p.block_mask, p.q.shape
    if not all(hasattr(mask, name) for name in (*BLOCK_MASK_TABLES, "BLOCK_SIZE")):
        raise ValueError(f"block_mask is a {type(mask).__name__}; it must be a BlockMask of flex_attention, or have its {', '.join(BLOCK_MASK_TABLES)} and BLOCK_SIZE")
    tables = dict(zip(BLOCK_MASK_TABLES, (getattr(mask, name) for name in BLOCK_MASK_TABLES)))
    if (tables["full_kv_num_blocks"] is None) != (tables["full_kv_indices"] is None):
        raise ValueError("block_mask has only one of full_kv_num_blocks and full_kv_indices; give both or neither")
    LB, LH, _, n_blocks = mask.kv_indices.shape if mask.kv_indices.ndim == 4 else (0, 0, 0, 0)
    for name, x in tables.items():
        if x is not None and (x.dtype != torch.int32 or x.device != p.q.device):
            raise ValueError(f"block_mask.{name} is {x.dtype} on {x.device}; it must be int32 on {p.q.device}")
        expected = (LB, LH, 1, n_blocks) if name.endswith("indices") else (LB, LH, 1)
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(f"block_mask.{name} has shape {tuple(x.shape)}; the queries of a call share one row of blocks, (sequences, heads, 1, ...): take block_mask[:, :, [row]]")
    q_size, size = (mask.BLOCK_SIZE,) * 2 if isinstance(mask.BLOCK_SIZE, int) else mask.BLOCK_SIZE
    if LB not in (1, B) or LH not in (1, H):
        raise ValueError(f"block_mask is for {LB} sequences and {LH} heads; here are {B} sequences and {H} query heads: each must be equal, or 1 for all")
    if M > q_size:
        raise ValueError(f"{M} query tokens are more than a block of {q_size}, as block_mask.BLOCK_SIZE says; use larger blocks, or fewer tokens a call")
    if size < 1 or size % p.n_ranks:
        raise ValueError(f"block_mask has blocks of {size} keys, which {p.n_ranks} ranks cannot share evenly; use a multiple of {p.n_ranks}")
    if n_blocks != -(-p.capacity() // size):
        raise ValueError(f"block_mask has {n_blocks} blocks of {size} keys; a cache of {p.capacity()} tokens has {-(-p.capacity() // size)}")
    if LB * LH > 16384:
        raise ValueError(f"block_mask has {LB} x {LH} rows of blocks; at most 16384 fit a launch: split the batch")
    own = getattr(mask, "mask_mod", None)
    if p.mask_mod is None and own is not None and getattr(own, "__name__", "") != "noop_mask":
        raise ValueError(f"block_mask was made from {own.__name__}, in torch and by index of the query; pass mask_mod=, the same by position in the sequence")


def check_values(p):
    """Raise ValueError for lengths, pages and blocks that lead outside. Reads tensors: a synchronization, on a GPU."""
    lengths = [p.capacity()] * len(p.q) if p.lengths is None else p.lengths.tolist()
    for b, L in enumerate(lengths):
        if not 0 <= L <= p.capacity():
            raise ValueError(f"cache_seqlens[{b}]={L} must be in 0..{p.capacity()}, the tokens that the cache has room for")
    for b, L in enumerate(lengths if p.page_table is not None else ()):
        used = -(-max(L - p.rank, 0) // p.n_ranks)
        for i, page in enumerate(p.page_table[b, : -(-used // p.k.shape[1])].tolist()):
            if not 0 <= page < len(p.k):
                raise ValueError(f"page_table[{b}, {i}]={page} must be in 0..{len(p.k) - 1}, the pages that there are")
    (num, idx, full_num, full_idx), shape = mask_tables(p.block_mask)
    for name, counts, blocks in (("kv", num, idx), ("full_kv", full_num, full_idx)):
        if counts is not None:
            listed = torch.arange(shape[2], device=counts.device) < counts[..., None]
            if counts.min() < 0 or counts.max() > shape[2] or (listed & ((blocks < 0) | (blocks >= shape[2]))).any():
                raise ValueError(f"block_mask.{name}_num_blocks must be in 0..{shape[2]}, and what it takes of {name}_indices in 0..{shape[2] - 1}")


# -----------------------------------------------------------------------------
# public functions


all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
CHECKED = {}  # what was checked, and found in order: the Plan that it got, or None for the torch path


def kind(x):
    """What the checks, the plan and the compiled kernels depend on, of an argument that may be a tensor."""
    if isinstance(x, torch.Tensor) and x.layout == torch.strided:
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    return None if x is None else repr(x)


def problem_of(q, k, v, rank, n_ranks, *, cache_seqlens=None, sm_scale=None, causal=True, score_mod=None, mask_mod=None, aux=(), block_mask=None,
               window=None, sink=None, page_table=None, n_splits=None, backend=None):  # fmt: skip
    """The Problem, the logits among `sink`, the backend, and a key to CHECKED."""
    if sm_scale is None:
        sm_scale = max(q.shape[-1], 1) ** -0.5 if isinstance(q, torch.Tensor) and q.ndim else 1.0
    if backend is None:
        backend = "triton" if ring_attn.INTERPRET or isinstance(q, torch.Tensor) and q.is_cuda else "torch"
    if isinstance(q, torch.Tensor) and q.layout == torch.strided and q.ndim == 4 and q.stride(3) != 1:
        q = q.contiguous()  # a few rows
    n_sink, logits = (sink or 0, None) if sink is None or isinstance(sink, int) else (0, sink)
    p = Problem(q, k, v, cache_seqlens, page_table, block_mask, score_mod, mask_mod, aux, sm_scale, causal, window, n_sink, n_splits, rank, n_ranks)
    masks = None
    if block_mask is not None:
        named = lambda name: getattr(block_mask, name, None)
        masks = repr(named("BLOCK_SIZE")), named("mask_mod"), *(kind(named(name)) for name in BLOCK_MASK_TABLES)
    tensors = map(kind, (q, k, v, cache_seqlens, page_table, logits, *(aux if isinstance(aux, tuple) else [aux])))
    options = repr((sm_scale, causal, window, n_sink, n_splits, rank, n_ranks, backend))  # whatever they are, this can be looked up
    key = (*tensors, type(aux), masks, score_mod, mask_mod, type(sink), options, torch.is_grad_enabled())
    return p, logits, backend, key


def check_once(p, sink, backend, key):
    check_decode(p, backend, sink)
    CHECKED[key] = make_plan(p) if backend == "triton" else None


def run_whole(p, key, sink, return_lse):
    """o (B, M, H, D) in the dtype of q, and lse (B, H, M) if asked for."""
    plan, (B, M, H, _) = CHECKED[key], p.q.shape
    if plan is None:
        o, lse = torch_part(p, sink)
        return o.to(p.q.dtype), lse
    o = torch.empty(p.q.shape, dtype=p.q.dtype, device=p.q.device)
    lse = torch.empty(B, M, H, dtype=torch.float32, device=p.q.device) if return_lse else None
    triton_part(p, plan, o, lse, sink)
    return o, lse.transpose(1, 2) if return_lse else None


def packed_part(p, key):
    """(B, M, H, D + 1), float32 or wider: o and behind it lse."""
    plan, (*lead, D) = CHECKED[key], p.q.shape
    packed = torch.empty(*lead, D + 1, dtype=torch.promote_types(p.q.dtype, torch.float32), device=p.q.device)
    o, lse = packed[..., :D], packed[..., D]
    if plan is None:
        part_o, part_lse = torch_part(p, None)
        o.copy_(part_o), lse.copy_(part_lse.transpose(1, 2))
    else:
        triton_part(p, plan, o, lse, None)
    return packed


def merge_parts(parts, sink=None, dtype=torch.float32):
    """o (B, M, H, D) in dtype and lse (B, H, M) from what each rank found: parts (R, B, M, H, D + 1), float32 or wider, o and behind
    it lse. sink: None, or a logit for each query head, (H,)."""
    R, B, M, H, D = *parts.shape[:4], parts.shape[4] - 1
    if not (parts.is_cuda or ring_attn.INTERPRET) or parts.dtype != torch.float32:
        o, lse = reference_merge(parts[..., :D], parts[..., D].transpose(2, 3), sink)
        return o.to(dtype), lse
    o, lse = torch.empty(B, M, H, D, dtype=dtype, device=parts.device), torch.empty(B, M, H, device=parts.device)
    constants = dict(HEAD_DIM=D, BLOCK_D=max(16, triton.next_power_of_2(D)), CHUNK=min(64, triton.next_power_of_2(R)))
    depends = parts.shape, dtype, *(x is None or (x.dtype, x.data_ptr() % 16) for x in (parts, sink))
    with torch.cuda.device_of(parts):
        launch(merge_ranks_kernel, parts.device, depends, B * M * H, (parts, o, lse, sink, R, B * M * H, H), constants, num_warps=4)
    return o, lse.transpose(1, 2)


def decode_attn(q, k, v, *, cache_seqlens=None, sm_scale=None, causal=True, score_mod=None, mask_mod=None, aux=(), block_mask=None, window=None,
                sink=None, page_table=None, n_splits=None, return_lse=False, backend=None, debug=False):  # fmt: skip
    """Attention of the last M tokens of each sequence to its cached keys and values. Not differentiable.

    q: (B, M, H, D), the queries of the last M of the L tokens of each sequence, whose keys are in the cache already. Query m
       sits at position L - M + m. bfloat16, float16 or float32 (float64 in the torch path), D up to 256.
    k, v: (B, N, HKV, D), room for N tokens, the first L in use; H a multiple of HKV. Any strides but the last, which is 1: a
       transposed view of (B, HKV, N, D) is as good. Or pages (P, page_size, HKV, D), with page_table (B, max_pages) int32.
    cache_seqlens: L of each sequence, (B,) int32, 0 to N; None means N. Read on the device: a CUDA graph may be replayed after
       they, the cache and the tables have changed.
    sm_scale: above 0; None means D ** -0.5. causal: query m sees keys up to its own position; if False, all L.
    score_mod(score, b, h, q_idx, kv_idx, *aux), mask_mod(b, h, q_idx, kv_idx, *aux): as in flex_attention, h the query head, but
       q_idx is the position L - M + m, so that a function of positions serves training and decoding. Functions decorated with
       @triton.jit (for CPU tensors, without the interpreter: plain functions of torch tensors). aux: tensors for them, which a
       @triton.jit function reads with tl.load(aux + index). mask_mod comes on top of causal and window.
    block_mask: a BlockMask of flex_attention, or what has its tables, with one row of blocks for all queries of the call; the
       blocks that it calls full are seen without asking mask_mod, the others that it names as far as mask_mod goes.
    window: query i sees keys j with i - window < j <= i only. sink: an int, the first keys that every window keeps
       (arXiv 2309.17453), or a tensor (H,) of logits that join the softmax's denominator without a value.
    n_splits: pieces to cut every sequence into; None chooses by length, on the device.
    return_lse: also return lse (B, H, M) float32, the natural log of the softmax's denominator.
    backend: "torch", or "triton" (any GPU, and CPU tensors under TRITON_INTERPRET=1); None chooses by device.
    debug: also check the values of cache_seqlens, page_table and block_mask, which a GPU must be waited for to read.
    Returns o (B, M, H, D) in the dtype of q. A query that sees no key gets o = 0 and lse = -inf. The same inputs give the same bits.

    Raises ValueError for anything that does not fit. Values on a GPU are checked under debug=True only; otherwise lengths are
    clipped to 0..N, blocks outside of the cache are skipped and page numbers clipped to 0..P-1: results are then wrong, but no
    memory outside of the cache is read.
    """
    p, logits, backend, key = problem_of(
        q, k, v, 0, 1, cache_seqlens=cache_seqlens, sm_scale=sm_scale, causal=causal, score_mod=score_mod, mask_mod=mask_mod, aux=aux,
        block_mask=block_mask, window=window, sink=sink, page_table=page_table, n_splits=n_splits, backend=backend,
    )  # fmt: skip
    if key not in CHECKED:
        check_once(p, sink, backend, key)
    if debug or not q.is_cuda:
        check_values(p)
    o, lse = run_whole(p, key, logits, return_lse)
    return (o, lse) if return_lse else o


def decode_part(q, k, v, rank, n_ranks, **options):
    """What one rank contributes to sharded_decode_attn: (B, M, H, D + 1) float32 (or wider), o and behind it lse, for merge_parts.
    options: those of decode_attn but for return_lse and debug; a sink of logits belongs to merge_parts. For transports of your own."""
    p, logits, backend, key = problem_of(q, k, v, rank, n_ranks, **options)
    if logits is not None:
        raise ValueError("the logits of sink count once: give them to merge_parts")
    if key not in CHECKED:
        check_once(p, p.n_sink, backend, key)
    return packed_part(p, key)


def sharded_decode_attn(q, k, v, *, group=None, sink=None, return_lse=False, debug=False, **options):
    """decode_attn over a cache that is striped over the ranks of `group`: token p of a sequence is on rank p % R, at place p // R, as a
    ring prefill under the striped schedule leaves it. One all-gather of M * H * (D + 1) float32 numbers per sequence and rank.

    Arguments as for decode_attn; q and cache_seqlens are the same on every rank and speak of whole sequences, k and v (B, N, HKV, D)
    are the rank's stripe, so that a sequence may have up to R * N tokens; pages are the rank's own. A block_mask speaks of whole
    sequences; its block size must be a multiple of R. group: a process group, None for the default one or for this process alone.
    Returns o (B, M, H, D), and lse, the same on every rank.

    Raises ValueError on every rank if any rank's arguments do not fit or the ranks' shapes and options differ, checked once per new
    combination. Values are checked under debug=True only.
    """
    ring = ring_attn.resolve_ring(group)
    if isinstance(ring, ring_attn.VirtualRing):
        raise ValueError("a VirtualRing holds whole sequences; use decode_attn")
    p, logits, backend, key = problem_of(q, k, v, ring.rank, ring.n_ranks, sink=sink, **options)
    if key not in ring.agreed:
        named = lambda x: ring_attn.summary(x) if isinstance(x, torch.Tensor) else getattr(x, "__name__", repr(x))
        given = dict(q=q, k=k, v=v, sink=sink) | options | dict(backend=backend, page_table=p.page_table is not None)
        check = lambda: check_once(p, sink, backend, key)
        ring_attn.agree_once(ring, key, {name: named(x) for name, x in given.items() if name not in ("aux", "block_mask")}, None, check)
    if debug:
        problem = None
        try:
            check_values(p)
        except ValueError as error:
            problem = str(error)
        ring.agree({}, problem)
    if ring.n_ranks == 1:
        o, lse = run_whole(p, key, logits, return_lse)
    else:
        packed = packed_part(p, key)
        parts = packed.new_empty(ring.n_ranks * len(packed), *packed.shape[1:])  # gloo wants them joined along a dimension of theirs
        all_gather_single(parts, packed, group=ring.group)
        o, lse = merge_parts(parts.unflatten(0, (ring.n_ranks, -1)), logits, q.dtype)
    return (o, lse) if return_lse else o


# -----------------------------------------------------------------------------
# a cache for models


class KVCache:
    """Keys and values of every layer of a model, for B sequences of up to n_tokens tokens; on a ring, this rank's stripe of them.

    k, v: lists of n_layers tensors (B, N, n_kv_heads, D) each, N = n_tokens / n_ranks, rounded up. All sequences have the same length.
    length: how many tokens are in, as an int; lengths: the same as a tensor (B,) int32 on the device, which kernels read.
    group: the process group whose ranks share the tokens, token p on rank p % n_ranks; None for a cache that is all here.
    """

    def __init__(self, n_layers, B, n_tokens, n_kv_heads, dim_per_head, dtype=torch.bfloat16, device="cpu", group=None):
        if min(n_layers, B, n_tokens, n_kv_heads, dim_per_head) < 1:
            raise ValueError(f"{n_layers=}, {B=}, {n_tokens=}, {n_kv_heads=} and {dim_per_head=} must be 1 or more")
        self.ring = ring_attn.ALONE if group is None else ring_attn.resolve_ring(group)
        self.n_tokens, self.length = n_tokens, 0
        N = -(-n_tokens // self.ring.n_ranks)
        # one token more than are kept: tokens of other ranks are written there
        whole = torch.empty(2, n_layers, B, N + 1, n_kv_heads, dim_per_head, dtype=dtype, device=device)
        self.whole_k, self.whole_v = (list(x) for x in whole)
        self.k, self.v = ([x[:, :N] for x in xs] for xs in (self.whole_k, self.whole_v))
        self.lengths = torch.zeros(B, dtype=torch.int32, device=device)
        self.rows = torch.arange(B, device=device)[:, None]

    def check_room(self, n):
        """Raise ValueError unless n more tokens fit."""
        if self.length + n > self.n_tokens:
            raise ValueError(f"the cache is full: {self.length} tokens are in, {n} more do not fit into its {self.n_tokens}; make it with a larger n_tokens")

    def extend(self, n):
        """Make the cache n tokens longer; what they hold is then for `write` and `fill` to say. ValueError if they do not fit."""
        self.check_room(n)
        self.length += n
        self.lengths += n

    def positions(self, n):
        """Positions of the last n tokens, (B, n) int64."""
        return self.lengths.long()[:, None] - n + torch.arange(n, device=self.lengths.device)

    def write(self, layer, k, v):
        """Put k, v (B, n, HKV, D), the same on every rank, where the last n tokens are."""
        pos, R = self.positions(k.shape[1]), self.ring.n_ranks
        place = torch.where(pos % R == self.ring.rank, pos // R, self.k[layer].shape[1])
        self.whole_k[layer][self.rows, place] = k.to(self.k[layer].dtype)
        self.whole_v[layer][self.rows, place] = v.to(self.v[layer].dtype)

    def fill(self, layer, k, v):
        """Put the rank's own part k, v (B, T, HKV, D) of all tokens, which may be a few more than the cache's length: padding."""
        T = min(k.shape[1], self.k[layer].shape[1])
        self.k[layer][:, :T], self.v[layer][:, :T] = k[:, :T], v[:, :T]

    def attend(self, layer, q, sm_scale):
        """Attention of q (B, M, H, D), the last M tokens, to everything in the cache: (B, M, H, D)."""
        args = q.to(self.k[layer].dtype), self.k[layer], self.v[layer]
        if self.ring.n_ranks == 1:
            return decode_attn(*args, cache_seqlens=self.lengths, sm_scale=sm_scale).to(q.dtype)
        return sharded_decode_attn(*args, group=self.ring.group, cache_seqlens=self.lengths, sm_scale=sm_scale).to(q.dtype)


def captured(step, tokens, cache):
    """step(tokens, cache), which must have run before, as a CUDA graph: a function of the same arguments that replays it. What it
    returns is overwritten by its next call."""
    graph, tokens, length = torch.cuda.CUDAGraph(), tokens.clone(), cache.length
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog may look at events meanwhile
        result = step(tokens, cache)
    cache.length = length  # so far nothing has run

    def replay(new, cache):
        cache.check_room(new.shape[1])
        cache.length += new.shape[1]
        tokens.copy_(new)
        graph.replay()
        return result

    return replay


# -----------------------------------------------------------------------------
# the command line


def parse(argv=None):
    p = argparse.ArgumentParser(description="Continue a prompt with a model that train.py made; on several ranks each keeps its part of the cache.")
    p.add_argument("--ckpt", default=None, metavar="FILE", help="checkpoint, or the run folder with it (default: the newest under runs/)")
    p.add_argument("--prompt", default="def ", metavar="TEXT", help="what to continue (default: 'def ')")
    p.add_argument("--prompt_file", default=None, metavar="FILE", help="read the prompt from here instead; - for standard input")
    p.add_argument("--max_tokens", type=int, default=200, help="tokens, here bytes, to generate (default: 200)")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    p.add_argument("--top_k", type=int, default=None, help="sample among this many likeliest tokens (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    p.add_argument("--cache_tokens", type=int, default=None, help="room of the cache (default: what prompt and max_tokens need)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default=None, help="of weights and cache (default: bfloat16 on a GPU, else float32)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU, if there is one")
    args = p.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


def load_model(args, rank, n_ranks):
    """The model of a checkpoint, (file, Transformer); ValueError if there is none, or it is none of train.py's."""
    from model import AttentionType, Config, Transformer  # which imports this file
    from train import checkpoints

    file = Path(args.ckpt) if args.ckpt else max(Path("runs").glob("*/ckpt-*.pt"), key=lambda f: f.stat().st_mtime, default=None)
    if file is None:
        raise ValueError("no checkpoint under runs/; train one with train.py, or name one with --ckpt")
    if file.is_dir():
        file = next(iter(checkpoints(file)), file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weights, config = state["model"], Config(256, *(state["args"][name] for name in ("n_layers", "dim", "dim_per_head", "n_kv_heads", "seq_len", "dropout")))
    except Exception as error:
        raise ValueError(f"--ckpt={file} is not a checkpoint of train.py: {type(error).__name__} {str(error)[:100]}") from error
    model = Transformer(config, rank, n_ranks, AttentionType.STRIPED if n_ranks > 1 else AttentionType.FLASH)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"--ckpt={file} holds weights of another shape than its flags say: {' '.join(str(error).split())[:300]}") from error
    return file, model.to(getattr(torch, args.dtype)).eval()


def read_prompt(args):
    if args.prompt_file is None:
        return args.prompt.encode()
    return sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()


def generate(args):
    """What the command line asks for, on every rank; rank 0 prints. Ends the process if interrupted. Raises ValueError on every rank."""
    from train import setup

    setup(args)
    ring = ring_attn.resolve_ring(None)
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" else torch.device("cpu")
    problem = None
    try:
        prompt = read_prompt(args)
        if args.prompt_file == "-" and ring.n_ranks > 1:
            raise ValueError("--prompt_file=-: only one of several processes has the standard input; give a file")
        if not prompt or args.max_tokens < 1 or args.temperature < 0 or (args.top_k is not None and args.top_k < 1):
            raise ValueError(f"the prompt has {len(prompt)} bytes, --max_tokens={args.max_tokens}, --temperature={args.temperature}, --top_k={args.top_k}: "
                             "need 1 or more, 1 or more, 0 or more, 1 or more")  # fmt: skip
        room = args.cache_tokens if args.cache_tokens is not None else len(prompt) + args.max_tokens
        if room < len(prompt) + args.max_tokens:
            raise ValueError(f"the prompt has {len(prompt)} bytes and --max_tokens={args.max_tokens}; they do not fit into --cache_tokens={room}")
        file, model = load_model(args, ring.rank, ring.n_ranks)
    except (ValueError, OSError) as error:
        problem = str(error)
    ring.agree(dict(args=repr(vars(args))), problem)
    say = (lambda text, **options: print(text, flush=True, **options)) if ring.rank == 0 else lambda text, **options: None
    model, config = model.to(device), model.config
    if room > config.seq_len:
        say(f"note: up to {room} tokens; the model was trained on {config.seq_len}", file=sys.stderr)
    with torch.no_grad():
        cache = model.new_cache(1, room)
    tokens = torch.tensor([list(prompt)], device=device)
    sampler = torch.Generator(device).manual_seed(args.seed)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    say(prompt.decode(errors="replace"), end="")
    clocks, start, interrupted = [], time.perf_counter(), False
    try:
        for new in model.stream(tokens, args.max_tokens, args.temperature, args.top_k, sampler, cache, graph=device.type == "cuda"):
            say(text.decode(bytes(new[0].tolist())), end="")  # waits for the GPU
            clocks.append(time.perf_counter())
    except KeyboardInterrupt:
        interrupted = True
        say("\n(interrupted)", end="", file=sys.stderr)
    say(text.decode(b"", final=True))
    if clocks:
        first = clocks[0] - start
        report = f"{file} | {ring.n_ranks} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, {args.dtype} | "
        report += f"prefill {len(prompt)} tokens in {1e3 * first:.1f} ms, {len(prompt) / first:,.0f} tokens/s"
        report += " (the first kernels are compiled meanwhile)" * (device.type == "cuda")
        rest = clocks[min(2, len(clocks) - 1) :]  # the first two steps compile and capture
        if len(rest) > 1:
            dt = (rest[-1] - rest[0]) / (len(rest) - 1)
            per_token = sum(2 * x[0, :1].numel() * x.element_size() for x in cache.k)
            length = len(prompt) + len(clocks) - len(rest) / 2  # on average
            report += f" | decode {1e3 * dt:.2f} ms per token, {1 / dt:,.0f} tokens/s, KV {length * per_token / dt / 1e9:.3g} GB/s"
        say(report, file=sys.stderr)
    if interrupted:
        os._exit(130)  # the ranks may stand at different collectives, and would wait for each other


def main():
    from train import run_script  # which imports model.py, and that this file

    args = parse()
    run_script("decode.py", lambda: generate(args), "more processes, or fewer tokens")


if __name__ == "__main__":
    from decode import main  # once more, under its own name: model.py imports it too

    main()
