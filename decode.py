"""Attention of a few new queries to a long key/value cache: grouped heads, split keys, one GPU or a ring.

Decoding reads every key and value once and computes little, so it should take as long as reading the bytes
takes. The G query heads times M query tokens that share a key/value head are rows of one tile, so that the
cache is read once. The keys of a sequence are cut into splits, enough to fill the GPU. Each split leaves a
partial result

    lse_i = log sum_j exp(s_j)      o_i = sum_j exp(s_j - lse_i) v_j            over the keys j of split i

and one reduction merges the splits of one GPU, and the shards of many:

    lse = log sum_i exp(lse_i)      o = sum_i exp(lse_i - lse) o_i

Shapes: B batch, M query tokens, N tokens that this rank has room for, H query heads, HKV key/value heads,
G = H // HKV, D head dim; L tokens in the cache of a sequence. q, o (B, M, H, D); k, v (B, N, HKV, D), or
pages (P, page_size, HKV, D) with a table; lse (B, H, M) float32, natural log. Query m is at position
L - M + m, key j of rank r of R at r + R * j. Parallelism: one program per split. The number of splits follows
from the lengths on the device: a ragged batch costs about its bytes, and a CUDA graph can be replayed after
the lengths have changed.

Not here: gradients, dropout.

decode_attn and sharded_decode_attn are one operator, which torch.compile(fullgraph=True) takes.

Sources: Flash-Decoding (Dao et al. 2023), FlexAttention and its flex_decoding (PyTorch), PagedAttention
(arXiv 2309.06180), attention sinks (2309.17453), tree attention (2408.04093).

    python train.py --generate='def '      # text from the newest checkpoint; on more GPUs with torchrun
    python bench.py --filter decode        # speed, beside flex_attention and FlashAttention
    python test.py --filter decode
"""

import itertools
import math
from collections import namedtuple
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from einops import einsum, rearrange

import ring_attn
from ring_attn import INTERPRETED, LOG2E, launch, log2_scale, modify

# -----------------------------------------------------------------------------
# reference: plain torch. The CPU path, and the best place to start reading


def dequantized(x, scale, dtype):
    """x (..., D) in dtype, each row times its scale (...); x itself for None."""
    return x if scale is None else x.to(dtype) * scale[..., None].to(dtype)


FLOAT8 = torch.float8_e4m3fn


def quantized(x):
    """x (..., D) as float8_e4m3fn, and scales (...) float32, by which its rows are to be multiplied."""
    scale = x.abs().amax(-1).float() / torch.finfo(FLOAT8).max
    scale = torch.where(scale > 0, scale, 1.0)
    return (x.float() / scale[..., None]).to(FLOAT8), scale


def reference_decode(q, k, v, seen, sm_scale, mods=(), indices=()):
    """o (B, M, H, D) and lse (B, H, M), float32 or wider, of q (B, M, H, D) and k, v (B, N, HKV, D).

    seen: which keys each query sees, (B, H, M, N). indices: b, h, q_idx, kv_idx for mods (ring_attn.Mod),
    which broadcast to the same shape.
    """
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    G = q.shape[2] // k.shape[2]
    q = rearrange(q.to(acc_dtype), "b m (h g) d -> b h g m d", g=G)
    s = einsum(q, k.to(acc_dtype), "b h g m d, b n h d -> b h g m n").flatten(1, 2) * sm_scale  # (B, H, M, N)
    for mod in mods:
        s = mod.in_torch(s, *indices).to(acc_dtype)
    s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)  # (B, H, M)
    p = (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()  # a row that sees no key: 0, not nan
    unseen = ~seen.any(2).unflatten(1, (-1, G)).any(2).transpose(1, 2)  # (B, N, HKV)
    v = v.to(acc_dtype).masked_fill(unseen[..., None], 0.0)  # it may be nan, and 0 * nan is nan
    return einsum(p.unflatten(1, (-1, G)), v, "b h g m n, b n h d -> b m h g d").flatten(2, 3), lse


def reference_merge(o, lse, sink=None):
    """Merge o (R, B, M, H, D), lse (R, B, H, M), logits sink (H,) into o (B, M, H, D), lse (B, H, M)."""
    total = lse.logsumexp(0)
    if sink is not None:
        total = torch.logaddexp(total, sink.to(lse.dtype)[:, None])
    w = (lse - total.masked_fill(total == -math.inf, 0.0)).exp()  # (R, B, H, M)
    return einsum(o, w, "r b m h d, r b h m -> b m h d"), total


# -----------------------------------------------------------------------------
# kernels
#
# A head set is the G query heads of a key/value head, or one head under a block mask that differs by head. A
# row tile is up to BLOCK_M of the G * M rows of a head set in one sequence; a key tile is BLOCK_N keys. A
# tile group is the key tiles that some row tiles share: those of a sequence, or of the blocks that a row of a
# block mask names. All row tiles of a group have the same splits; a program computes one split of one row
# tile. Programs are numbered group by group, then split by split, heads fastest, so that programs side by
# side read whole rows of the cache.

# The integers of a call. SETS_PER_KV: head sets of a key/value head. CAPACITY: tokens of a sequence that all
# ranks together have room for. There are GROUPS_B (1 or B) * GROUPS_H (1 or H) tile groups. N_SPLITS: 0 to
# choose by length: see count_splits. BLOCK_SIZE: this rank's keys in a block of the block mask
Sizes = namedtuple(
    "Sizes",
    "SETS_PER_KV B H HEAD_SETS G M N CAPACITY RANK N_RANKS WINDOW N_SINK GROUPS_B GROUPS_H ROW_TILES "
    "N_BLOCKS N_PROGRAMS N_UNEVEN N_SPLITS N_PAGES PAGE_SIZE MAX_PAGES BLOCK_SIZE",
)
# the tables of a BlockMask: the blocks that its mask applies to, and those that all queries see
BlockTables = namedtuple("BlockTables", "kv_num_blocks kv_indices full_kv_num_blocks full_kv_indices")
Blocks = namedtuple("Blocks", BlockTables._fields + ("BLOCK_SIZE",))  # a BlockMask in the operator


@triton.jit
def n_before(x, sizes):
    """How many keys of this rank are before position x."""
    return tl.minimum((tl.maximum(x - sizes.RANK, 0) + sizes.N_RANKS - 1) // sizes.N_RANKS, sizes.N)


@triton.jit
def tile_ranges(L, sizes, BLOCK_N: tl.constexpr):
    """Key tiles of a sequence of L tokens: how many hold sink tokens, how many are skipped after these, and
    how many there are to compute in all."""
    tiles = tl.cdiv(n_before(L, sizes), BLOCK_N)
    sink = tl.minimum(tl.cdiv(n_before(sizes.N_SINK, sizes), BLOCK_N), tiles)
    first = tl.maximum(n_before(L - sizes.M - sizes.WINDOW + 1, sizes) // BLOCK_N, sink)
    return sink, first - sink, tiles - first + sink


@triton.jit
def load_count(NUM, exists, sizes):
    """How many blocks a row of a block mask names. Clipped, so that a wrong number does not lead outside."""
    return tl.maximum(tl.minimum(tl.load(NUM, mask=exists, other=0), sizes.N_BLOCKS), 0)


@triton.jit
def count_splits(SEQLENS, blocks, sizes, n_groups, row_tiles,
                 TILES_PER_BLOCK: tl.constexpr, MAX_GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """For each of the n_groups tile groups, [MAX_GROUPS]: how many key tiles it has, and into how many splits
    each of its row tiles is cut. That is N_SPLITS if given; else N_PROGRAMS are shared out by key tiles. If
    one of them would then be 1.4 times as long as the average, N_UNEVEN are: more and smaller ones that take
    turns. Never more splits than key tiles, but at least one, as a group without keys has zeros to write."""
    group = tl.arange(0, MAX_GROUPS)
    exists = group < n_groups
    if TILES_PER_BLOCK > 0:
        tiles = load_count(blocks.kv_num_blocks + group, exists, sizes) * TILES_PER_BLOCK
        if blocks.full_kv_num_blocks is not None:
            tiles += load_count(blocks.full_kv_num_blocks + group, exists, sizes) * TILES_PER_BLOCK
    else:
        L = tl.full([MAX_GROUPS], 0, tl.int32) + sizes.CAPACITY
        if SEQLENS is not None:
            L = tl.minimum(tl.load(SEQLENS + group, mask=exists, other=0), sizes.CAPACITY)
        _, _, tiles = tile_ranges(L, sizes, BLOCK_N)
    tiles = tl.where(exists, tiles, 0)
    tiles64 = tiles.to(tl.int64)
    total = tl.maximum(tl.sum(tiles64, 0) * row_tiles, 1)
    share = tiles64 * sizes.N_PROGRAMS // total
    if MAX_GROUPS > 1:
        longest = tl.max(tiles64 * sizes.N_PROGRAMS // tl.maximum(share, 1), 0)
        share = tl.where(5 * longest > 7 * total, tiles64 * sizes.N_UNEVEN // total, share)
    share = share.to(tl.int32)
    # no branch on N_SPLITS: behind one Triton 3.8 forgets that addresses are aligned
    splits = tl.minimum(tl.where(sizes.N_SPLITS > 0, sizes.N_SPLITS, share), tiles)
    return tiles, tl.where(exists, tl.maximum(splits, 1), 0)


@triton.jit
def locate(group, i, sizes):
    """(sequence, head set, row tile of the head set) of the i-th row tile of a tile group."""
    row_tile, rest = i % sizes.ROW_TILES, i // sizes.ROW_TILES
    h = tl.where(sizes.GROUPS_H == 1, rest % sizes.HEAD_SETS, group % sizes.GROUPS_H)
    any_b = sizes.GROUPS_B == 1
    b = tl.where(any_b, tl.where(sizes.GROUPS_H == 1, rest // sizes.HEAD_SETS, rest), group // sizes.GROUPS_H)
    return b, h, row_tile


@triton.jit
def store_rows(acc, m_i, l_i, row, head, keep, O, LSE, SINK, stride_o, stride_l,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write o = acc / l_i [rows, BLOCK_D] and lse [rows] to rows `row` of O and LSE: 0 and -inf where l_i is
    0. m_i is in units of log 2."""
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
    mask = keep[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(O + row.to(tl.int64)[:, None] * stride_o + offs_d[None, :], o, mask=mask)
    if LSE is not None:
        LSE += row.to(tl.int64) * stride_l
        tl.store(LSE, tl.where(some, (m_i + tl.math.log2(l_i)) / LOG2E, -float("inf")), mask=keep)


@triton.jit
def first_key(t, group, n_full, sink, skipped, blocks, sizes,
              TILES_PER_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The first key of key tile t of a tile group. A block mask's full blocks come before its others."""
    if TILES_PER_BLOCK > 0:
        i = t // TILES_PER_BLOCK
        index = blocks.kv_indices + group * sizes.N_BLOCKS + i - n_full
        if blocks.full_kv_indices is not None:
            index = tl.where(i < n_full, blocks.full_kv_indices + group * sizes.N_BLOCKS + i, index)
        return tl.load(index) * sizes.BLOCK_SIZE + t % TILES_PER_BLOCK * BLOCK_N
    else:
        return (t + tl.where(t < sink, 0, skipped)) * BLOCK_N


@triton.jit
def load_pages(PAGES, start, n, sizes, BLOCK_N: tl.constexpr):
    """The pages of the BLOCK_N keys from `start` on."""
    j = start + tl.arange(0, BLOCK_N)
    return tl.load(PAGES + j // sizes.PAGE_SIZE, mask=(j >= 0) & (j < n), other=0)


@triton.jit
def cache_rows(start, page, offs_n, stride, PAGES, sizes):
    """Offsets of the keys from `start` on, or of those in their pages, from the first of the head."""
    if PAGES is None:
        return start.to(tl.int64) * stride[1] + offs_n * stride[1]
    else:
        return page * stride[0] + (start + offs_n) % sizes.PAGE_SIZE * stride[1]


TWO_HALVES = tl.constexpr((tl.float16, tl.float16))  # inside a kernel Triton 3.8 would wrap each


@triton.jit
def from_float8(x, dtype):
    """Even and odd columns of x, int16: pairs of float8. A product's operand of 16-bit pairs is, number for
    number, where those of its halves have to be; operands of bytes would go through shared memory again."""
    if INTERPRETED:
        even, odd = x.to(tl.uint8), (x >> 8).to(tl.uint8)
        even, odd = (even.to(tl.float8e4nv, bitcast=True), odd.to(tl.float8e4nv, bitcast=True))
    else:
        asm: tl.constexpr = """{ .reg .b16 a, b; .reg .b32 x; prmt.b32 x, $2, 0, 0x3120; mov.b32 {a, b}, x;
            cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"""
        even, odd = tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=TWO_HALVES, is_pure=True, pack=2)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def zero_unseen(v, seen):
    """v [BLOCK_N, BLOCK_D], with zeros for the keys that no row of seen [BLOCK_M, BLOCK_N] sees."""
    BITS: tl.constexpr = tl.int16 if v.dtype.primitive_bitwidth == 16 else tl.int32
    bits = -tl.max(seen.to(tl.int32), 0)  # all or none of them; Triton 3.8 cannot compile a tl.where here
    return (v.to(BITS, bitcast=True) & bits.to(BITS)[:, None]).to(v.dtype, bitcast=True)


@triton.jit
def decode_kernel(Q, K, V, O, LSE, PARTS, SEQLENS, PAGES, K_SCALE, V_SCALE, blocks, SINK, AUX, MODS, sm_scale,
                  sizes, stride_q, stride_k, stride_v, stride_ks, stride_vs, stride_o, stride_l,
                  MOD: tl.constexpr, MASK_MOD: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOWED: tl.constexpr, TILES_PER_BLOCK: tl.constexpr, MAX_GROUPS: tl.constexpr,
                  PDL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """One split of one row tile: o and lse if it is the only split, else a part for merge_splits_kernel."""
    pid = tl.program_id(0)
    n_groups = sizes.GROUPS_B * sizes.GROUPS_H
    row_tiles = sizes.B * sizes.HEAD_SETS * sizes.ROW_TILES // n_groups  # of each tile group
    if PDL:  # the launch did not wait for the kernels before it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    all_tiles, all_splits = count_splits(
        SEQLENS, blocks, sizes, n_groups, row_tiles, TILES_PER_BLOCK, MAX_GROUPS, BLOCK_N
    )
    ends = tl.cumsum(all_splits * row_tiles, 0)  # where the programs of each tile group end
    group = tl.sum((ends <= pid).to(tl.int32), 0)
    if group >= n_groups:
        return  # the grid has room for any lengths
    this = tl.arange(0, MAX_GROUPS) == group
    tiles, splits = tl.sum(tl.where(this, all_tiles, 0), 0), tl.sum(tl.where(this, all_splits, 0), 0)
    i = pid - tl.sum(tl.where(this, ends, 0), 0) + splits * row_tiles
    split, i = i // row_tiles, i % row_tiles
    b, h, row_tile = locate(group, i, sizes)

    L = sizes.CAPACITY
    if SEQLENS is not None:
        L = tl.maximum(tl.minimum(tl.load(SEQLENS + b), sizes.CAPACITY), 0)
    n = n_before(L, sizes)
    sink, skipped, _ = tile_ranges(L, sizes, BLOCK_N)
    window_begin = n_before(L - sizes.M - sizes.WINDOW + 1, sizes)  # the first key in any query's window
    n_full = 0  # blocks
    if blocks.full_kv_num_blocks is not None:
        n_full = load_count(blocks.full_kv_num_blocks + group, True, sizes)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = row < sizes.G * sizes.M
    m, head = row // sizes.G, h * sizes.G + row % sizes.G
    offs_d, offs_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_d = (offs_d < HEAD_DIM)[None, :]
    Q += b.to(tl.int64) * stride_q[0]
    q = Q + m[:, None] * stride_q[1] + head[:, None] * stride_q[2] + offs_d[None, :]
    q = tl.load(q, mask=keep[:, None] & in_d, other=0.0)  # [BLOCK_M, BLOCK_D]
    q_pos = L - sizes.M + m
    q_idx = tl.maximum(tl.minimum(q_pos, L - 1), 0)[:, None]  # mods may load at an index: it must exist
    seq = 0 if PAGES is not None else b.to(tl.int64)
    hk = (h // sizes.SETS_PER_KV).to(tl.int64)
    if K_SCALE is not None:  # K and V are pairs of float8: even and odd columns have products of their own
        offs_d = tl.arange(0, BLOCK_D // 2)
        in_d = (offs_d < HEAD_DIM // 2)[None, :]
    K += seq * stride_k[0] + hk * stride_k[2] + offs_d[None, :]
    V += seq * stride_v[0] + hk * stride_v[2] + offs_d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if K_SCALE is not None:
        K_SCALE += seq * stride_ks[0] + hk * stride_ks[2]
        V_SCALE += seq * stride_vs[0] + hk * stride_vs[2]
        if q.dtype.primitive_bitwidth == 16:
            q = q.to(tl.float16)  # into which float8 converts in one instruction
        q, q_odd = tl.split(q.reshape(BLOCK_M, BLOCK_D // 2, 2))
        acc, acc_odd = tl.split(acc.reshape(BLOCK_M, BLOCK_D // 2, 2))

    m_i, l_i = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    begin, end = tiles * split // splits, tiles * (split + 1) // splits
    if PAGES is not None:
        PAGES += b * sizes.MAX_PAGES
    for AGAIN in tl.static_range(1 if MASK_MOD is None else 2):
        if AGAIN:  # an unseen value was nan or inf, and 0 * nan is nan: start over, with zeros in its place
            again = tl.max((acc != acc).to(tl.int32)) > 0
            if K_SCALE is not None:
                again = again | (tl.max((acc_odd != acc_odd).to(tl.int32)) > 0)
                acc_odd = tl.where(again, 0.0, acc_odd)
            begin = tl.where(again, begin, end)
            m_i = tl.where(again, -float("inf"), m_i)
            l_i = tl.where(again, 0.0, l_i)
            acc = tl.where(again, 0.0, acc)
        page = 0
        if PAGES is not None:
            start = first_key(begin, group, n_full, sink, skipped, blocks, sizes, TILES_PER_BLOCK, BLOCK_N)
            page = load_pages(PAGES, start, n, sizes, BLOCK_N)
        for t in tl.range(begin, end, num_stages=1 if AGAIN else None):
            start = first_key(t, group, n_full, sink, skipped, blocks, sizes, TILES_PER_BLOCK, BLOCK_N)
            j = start + offs_n
            exists = (j >= 0) & (j < n)
            if TILES_PER_BLOCK > 0:
                exists = exists & (j < (start // sizes.BLOCK_SIZE + 1) * sizes.BLOCK_SIZE)
            if PAGES is not None:
                page = tl.maximum(tl.minimum(page, sizes.N_PAGES - 1), 0).to(tl.int64)  # one that exists
            k_row = cache_rows(start, page, offs_n, stride_k, PAGES, sizes)
            v_row = cache_rows(start, page, offs_n, stride_v, PAGES, sizes)
            if K_SCALE is not None:
                k_scale = K_SCALE + cache_rows(start, page, offs_n, stride_ks, PAGES, sizes)
                v_scale = V_SCALE + cache_rows(start, page, offs_n, stride_vs, PAGES, sizes)
            if PAGES is not None:
                # load the next tile's pages now: otherwise the copies of its keys would wait for them
                next_t = tl.minimum(t + 1, end - 1)
                start = first_key(
                    next_t, group, n_full, sink, skipped, blocks, sizes, TILES_PER_BLOCK, BLOCK_N
                )
                page = load_pages(PAGES, start, n, sizes, BLOCK_N)
            if WINDOWED:  # a value that no query sees may be nan, and 0 * nan is nan
                exists = exists & ((j >= window_begin) | (j < n_before(sizes.N_SINK, sizes)))
            k = tl.load(K + k_row[:, None], mask=exists[:, None] & in_d, other=0.0)  # [BLOCK_N, BLOCK_D]
            v = tl.load(V + v_row[:, None], mask=exists[:, None] & in_d, other=0.0)  # [BLOCK_N, BLOCK_D]
            if K_SCALE is not None:
                k_scale = tl.load(k_scale, mask=exists, other=0.0)
                v_scale = tl.load(v_scale, mask=exists, other=0.0)
                k, k_odd = from_float8(k, q.dtype)
                v, v_odd = from_float8(v, q.dtype)
            s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if K_SCALE is not None:
                s = tl.dot(q_odd, k_odd.T, s, input_precision="ieee") * k_scale[None, :]
            kv_pos = sizes.RANK + sizes.N_RANKS * j
            kv_idx = tl.maximum(tl.minimum(kv_pos, L - 1), 0)[None, :]
            if MOD is not None:
                s = modify(s, b, head[:, None], q_idx, kv_idx, MODS, MOD)[len(MOD)]
            s *= log2_scale(sm_scale, MODS, MOD)
            seen = exists[None, :]
            if CAUSAL:
                seen = seen & (kv_pos[None, :] <= q_pos[:, None])
            if WINDOWED:
                in_window = kv_pos[None, :] > q_pos[:, None] - sizes.WINDOW
                seen = seen & (in_window | (kv_pos < sizes.N_SINK)[None, :])
            if MASK_MOD is not None:
                allowed = MASK_MOD(b, head[:, None], q_idx, kv_idx, *AUX)
                if TILES_PER_BLOCK > 0:
                    allowed = allowed | (t < n_full * TILES_PER_BLOCK)
                seen = seen & allowed
            if AGAIN:
                v = zero_unseen(v, seen)
                if K_SCALE is not None:
                    v_odd = zero_unseen(v_odd, seen)
            s = tl.where(seen, s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key seen yet: exp2(-inf) = 0, not nan
            p = tl.math.exp2(s - shift[:, None])
            alpha = tl.math.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc *= alpha[:, None]
            if K_SCALE is None:
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
            else:  # in units of the tile's largest scale: below it float16 has room enough for p
                v_scale = tl.where(tl.max(seen.to(tl.int32), 0) > 0, v_scale, 0.0)
                most = tl.max(v_scale, 0)
                p = tl.where(seen, p * (v_scale / tl.where(most > 0, most, 1.0))[None, :], 0.0).to(v.dtype)
                acc += tl.dot(p, v, input_precision="ieee") * most
                acc_odd = acc_odd * alpha[:, None] + tl.dot(p, v_odd, input_precision="ieee") * most
            m_i = m_new
    if K_SCALE is not None:
        acc = tl.interleave(acc, acc_odd)

    if splits == 1:
        row = (b * sizes.M + m) * sizes.H + head
        store_rows(acc, m_i, l_i, row, head, keep, O, LSE, SINK, stride_o, stride_l, HEAD_DIM, BLOCK_D)
    else:
        row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        store_rows(acc, m_i, l_i, row, head, keep, PARTS, PARTS + BLOCK_D, None,
                   2 * BLOCK_D, 2 * BLOCK_D, BLOCK_D, BLOCK_D)  # fmt: skip


# Ranks that can read each other's memory send their parts to the receive buffers of all. A word there is a
# float32 and the epoch, the number of the call, by which it tells that it has arrived, as in NCCL's LL
# protocol. Who has all words of an epoch knows that the others have read those of the one before: two do.
# PEERS (SymmetricMemory.peers, int64): the epoch, how many programs of this call are done, where the watchdog
# reads what a GPU waits for, and as what; the receive buffers of all ranks for even epochs, then for odd ones
EPOCH, DONE, WAITS, REASON, BUFFERS = map(tl.constexpr, range(5))


@triton.jit
def receive_buffer(PEERS, rank, n_ranks, epoch):
    """Where the words of an epoch to this rank are."""
    return tl.load(PEERS + BUFFERS + epoch % 2 * n_ranks + rank).to(tl.pointer_type(tl.int64))


@triton.jit
def tell_watchdog(PEERS, number):
    tl.store(tl.load(PEERS + WAITS).to(tl.pointer_type(tl.int32)), number.to(tl.int32))


@triton.jit
def as_words(x, epoch):
    return (epoch << 32) | (x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def load_part(PART, mask, other, epoch):
    """float32 numbers; with an epoch, from words, which may be still on their way."""
    if epoch is None:
        return tl.load(PART, mask=mask, other=other)
    else:
        words = tl.load(PART, mask=mask, other=epoch << 32, volatile=True)
        while tl.max(((words >> 32).to(tl.int32) != epoch.to(tl.int32)).to(tl.int32)) > 0:
            words = tl.load(PART, mask=mask, other=epoch << 32, volatile=True)
        return tl.where(mask, words.to(tl.int32).to(tl.float32, bitcast=True), other)


@triton.jit
def send_part(PART, PEERS, epoch, rank, n_ranks, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows of PART (rows, D + 1), every num_programs-th, to all ranks' receive buffers."""
    offs_d = tl.arange(0, BLOCK_D)
    if tl.program_id(0) == 0:  # with the epoch: the next one is another wait
        tell_watchdog(PEERS, tl.load(PEERS + REASON) | (epoch & 0x7FFF) << 16)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        part, at = PART + row * (HEAD_DIM + 1), (rank * rows + row) * (HEAD_DIM + 1)
        o, lse = tl.load(part + offs_d, mask=offs_d < HEAD_DIM), tl.load(part + HEAD_DIM)
        for i in tl.range(1, n_ranks + 1):
            to = receive_buffer(PEERS, (rank + i) % n_ranks, n_ranks, epoch) + at
            tl.store(to + offs_d, as_words(o, epoch), mask=offs_d < HEAD_DIM)
            tl.store(to + HEAD_DIM, as_words(lse, epoch))


@triton.jit
def merge_row(PARTS, epoch, first, step, n, row, head, O, LSE, SINK, lse_offset, stride_part, stride_o,
              stride_l, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Merge the n rows first + i * step of PARTS, of o and at lse_offset lse, into row `row` of O and LSE.
    epoch: of the words, if PARTS are words, else None."""
    m_i, l_i = tl.full([1], -float("inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for start in tl.range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        part = PARTS + (first + i * step).to(tl.int64) * stride_part
        lse = load_part(part + lse_offset, i < n, -float("inf"), epoch) * LOG2E  # [CHUNK]
        mask = (i < n)[:, None] & (offs_d < HEAD_DIM)[None, :]
        o = load_part(part[:, None] + offs_d[None, :], mask, 0.0, epoch)  # [CHUNK, BLOCK_D]
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        w = tl.math.exp2(lse - shift)
        alpha = tl.math.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(w, 0)
        acc = acc * alpha[:, None] + tl.sum(o * w[:, None], 0)[None, :]
        m_i = m_new
    one = tl.arange(0, 1)
    store_rows(acc, m_i, l_i, row + one, head + one, one == 0, O, LSE, SINK, stride_o, stride_l,
               HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def merge_splits_kernel(PARTS, O, LSE, SEQLENS, blocks, SINK, sizes, stride_o, stride_l,
                        TILES_PER_BLOCK: tl.constexpr, MAX_GROUPS: tl.constexpr, PDL: tl.constexpr,
                        HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One row of the result from the parts that decode_kernel left, if it left parts."""
    rows = tl.minimum(sizes.G * sizes.M, BLOCK_M)
    i, r = tl.program_id(0) // rows, tl.program_id(0) % rows
    n_groups = sizes.GROUPS_B * sizes.GROUPS_H
    row_tiles = sizes.B * sizes.HEAD_SETS * sizes.ROW_TILES // n_groups
    group, i = i // row_tiles, i % row_tiles
    _, all_splits = count_splits(
        SEQLENS, blocks, sizes, n_groups, row_tiles, TILES_PER_BLOCK, MAX_GROUPS, BLOCK_N
    )
    groups = tl.arange(0, MAX_GROUPS)
    splits = tl.sum(tl.where(groups == group, all_splits, 0), 0)
    first = tl.sum(tl.where(groups < group, all_splits * row_tiles, 0), 0) + i  # program of the first split
    b, h, row_tile = locate(group, i, sizes)
    row = row_tile * BLOCK_M + r
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (splits > 1) & (row < sizes.G * sizes.M):
        head = h * sizes.G + row % sizes.G
        first, step = first * BLOCK_M + r, row_tiles * BLOCK_M
        row = (b * sizes.M + row // sizes.G) * sizes.H + head
        merge_row(PARTS, None, first, step, splits, row, head, O, LSE, SINK, BLOCK_D, 2 * BLOCK_D,
                  stride_o, stride_l, HEAD_DIM, BLOCK_D, CHUNK)  # fmt: skip


@triton.jit
def merge_ranks_kernel(PARTS, O, LSE, SINK, PEERS, rank, n_ranks, rows, H, PDL: tl.constexpr,
                       HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Rows of the result from what each rank found: PARTS (n_ranks, rows, D + 1), lse behind o. With PEERS
    PARTS has this rank's only: all ranks run this kernel, which first sends them."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    epoch = None
    if PEERS is not None:
        epoch = tl.load(PEERS + EPOCH) + 1
        send_part(PARTS, PEERS, epoch, rank, n_ranks, rows, HEAD_DIM, BLOCK_D)
        PARTS = receive_buffer(PEERS, rank, n_ranks, epoch)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        merge_row(PARTS, epoch, row, rows, n_ranks, row, row % H, O, LSE, SINK,
                  HEAD_DIM, HEAD_DIM + 1, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, CHUNK)  # fmt: skip
    if PEERS is not None:
        if tl.atomic_add(PEERS + DONE, 1) == tl.num_programs(0) - 1:  # all programs have read the epoch
            tl.store(PEERS + DONE, 0)
            tl.store(PEERS + EPOCH, epoch)
            tell_watchdog(PEERS, epoch * 0)  # a 0 that is a tensor


# -----------------------------------------------------------------------------
# launchers


class Call(NamedTuple):
    """The arguments of decode_attn; on a ring, those of one rank."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rank: int
    n_ranks: int
    backend: str
    sm_scale: float
    causal: bool = True
    window: int | None = None
    n_splits: int | None = None
    cache_seqlens: torch.Tensor | None = None
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    aux: tuple = ()
    block_mask: Any = None
    sink: int | torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def mods(self):
        """ring_attn.Mods in their order."""
        if not (self.softcap or self.alibi_slopes is not None or self.score_mod):
            return ()
        chain = ring_attn.make_chain(self.q, self.softcap, self.alibi_slopes, self.score_mod, aux=self.aux)
        return sum(chain, ())

    def n_sink(self):
        return self.sink if isinstance(self.sink, int) else 0

    def sink_logits(self):
        return None if isinstance(self.sink, int) else self.sink

    def capacity(self):
        """How many tokens of a sequence all ranks together have room for."""
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1]) * self.n_ranks


class LaunchConfig(NamedTuple):
    """How the kernels are launched for a kind of call, whatever the lengths."""

    number: int  # no other has it; `launch` finds compiled kernels by it
    grid: int  # programs of decode_kernel: the most splits that all row tiles can have
    merge_grid: int  # programs of merge_splits_kernel, which runs if there are parts
    sizes: Sizes
    strides: tuple  # of q, k, v, k_scale, v_scale
    parts: torch.Tensor | None  # shape and dtype of the parts, in one number's memory; None: nothing is split
    constants: dict
    merge_constants: dict
    options: dict
    merge_options: dict


NO_WINDOW = 2**30  # above every position
CONFIG_NUMBERS = itertools.count()


def make_config(call):
    """The LaunchConfig of a Call. Tile sizes are those that were fastest on an H100 or H200."""
    (B, M, H, D), HKV, dtype, device = call.q.shape, call.k.shape[2], call.q.dtype, call.q.device
    paged, blocked, windowed = (x is not None for x in (call.page_table, call.block_mask, call.window))
    GROUPS_B, GROUPS_H, N_BLOCKS, BLOCK_SIZE = B if call.cache_seqlens is not None else 1, 1, 0, 1
    if blocked:
        GROUPS_B, GROUPS_H, N_BLOCKS, BLOCK_SIZE = mask_shape(call.block_mask)
        BLOCK_SIZE //= call.n_ranks
    HEAD_SETS, G = (H, 1) if GROUPS_H > 1 else (HKV, H // HKV)
    float8, narrow, of_cache = call.k.dtype == FLOAT8, dtype.itemsize == 2, call.k.dtype.itemsize
    BLOCK_D = max(32 if float8 else 16, ring_attn.next_power_of_2(D))
    # wgmma takes 64 rows, of which 32 would leave half empty, and keys from shared memory only, where float8
    # is not converted yet
    BLOCK_M = 16 if G * M <= 16 else 64 if G * M > 32 and narrow and D <= 128 and not float8 else 32
    ROW_TILES = triton.cdiv(G * M, BLOCK_M)
    row_tiles, merge_grid = B * HEAD_SETS * ROW_TILES, B * HEAD_SETS * ROW_TILES * min(G * M, BLOCK_M)
    n_sm, shared_memory, pdl = 2, math.inf, False
    if not ring_attn.INTERPRET:
        properties = torch.cuda.get_device_properties(device)
        n_sm = properties.multi_processor_count
        shared_memory = properties.shared_memory_per_block_optin - 16384
        pdl = ring_attn.capability(device)[0] >= 9  # programmatic dependent launch: gdc_wait
    # few row tiles: two programs an SM, as splits are short and small tiles start sooner. Many, one for about
    # each SM: large tiles; with pages or lengths small ones, read further ahead, and if there are fewer row
    # tiles than SMs, three programs an SM
    many, paged_or_ragged = BLOCK_M == 16 and 4 * row_tiles > n_sm, paged or call.cache_seqlens is not None
    per_sm, elements, num_warps, num_stages = 2, 8192, 4, 3
    if many and row_tiles > (n_sm if paged_or_ragged else 7 * n_sm // 8):
        per_sm, elements, num_stages = (2, 8192, 4) if paged_or_ragged else (1, 16384, 3)
    elif many and paged_or_ragged:
        per_sm = 3
    if float8 and narrow:  # many row tiles: four small programs an SM; few: two, which read ahead more
        per_sm, elements, num_warps, num_stages = (4, 8192, 2, 3) if many else (2, 16384, 4, 3)
    BLOCK_N = min(128, max(16, (elements if narrow else 4096) // max(BLOCK_D, 128 if float8 else 16)))
    N, n_programs = call.capacity() // call.n_ranks, per_sm * n_sm
    # where groups differ: the splits of more row tiles than SMs would else be one each
    n_uneven = (12 if many and row_tiles > n_sm else 6) * n_sm if 4 * row_tiles > n_sm else n_programs
    while blocked and BLOCK_N > 16 and BLOCK_SIZE % BLOCK_N:
        BLOCK_N //= 2
    while num_stages > 1 and 2 * (num_stages - 1) * BLOCK_N * BLOCK_D * of_cache > shared_memory:
        num_stages -= 1
    most = call.n_splits  # splits of a row tile; None: not known here
    if not most and GROUPS_B == 1 and not blocked:
        most = max(1, min(triton.cdiv(N, BLOCK_N), n_programs // row_tiles))  # as count_splits finds, or more
    grid = row_tiles * most if most else row_tiles + n_uneven
    pages = (*call.k.shape[:2], call.page_table.shape[1]) if paged else (0, 1, 0)
    sizes = Sizes(
        H // HKV // G, B, H, HEAD_SETS, G, M, N, call.capacity(), call.rank, call.n_ranks,
        call.window or NO_WINDOW, call.n_sink(), GROUPS_B, GROUPS_H, ROW_TILES, N_BLOCKS, n_programs,
        n_uneven, call.n_splits or 0, *pages, BLOCK_SIZE,
    )  # fmt: skip
    # in the order of the kernels' parameters: `launch` passes them by position
    mods = ring_attn.Functions(mod.kernel for mod in call.mods())
    constants = dict(MOD=mods or None, MASK_MOD=call.mask_mod)
    constants |= dict(CAUSAL=bool(call.causal or windowed) and M > 1, WINDOWED=windowed)  # one query sees all
    shared = dict(TILES_PER_BLOCK=triton.cdiv(BLOCK_SIZE, BLOCK_N) if blocked else 0)
    shared |= dict(MAX_GROUPS=ring_attn.next_power_of_2(GROUPS_B * GROUPS_H), PDL=pdl)
    shared |= dict(HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    CHUNK, merge_warps = (64, 4) if merge_grid <= n_sm else (16, 2)  # few large programs, or many small ones
    options, merge_options = dict(num_warps=num_warps, num_stages=num_stages), dict(num_warps=merge_warps)
    plain = narrow and BLOCK_D <= 128 and not (float8 or paged or blocked or mods or call.mask_mod)
    if windowed and plain and BLOCK_M == 16 and per_sm > 1:  # it would take 168 registers, and 20% longer
        options["maxnreg"] = 128
    if pdl:
        options["launch_pdl"] = merge_options["launch_pdl"] = True
    constants, merge_constants = constants | shared, shared | dict(CHUNK=CHUNK)
    kwargs = constants, merge_constants, options, merge_options
    strides = call.q.stride()[:3], *(x.stride()[:3] for x in in_pairs(call.k, call.v))
    strides += (*(None if x is None else x.stride() for x in (call.k_scale, call.v_scale)),)
    # per row o and lse, padded to a power of two: rows that start within a cache line cost 1 to 2 us
    parts = torch.empty(1, dtype=torch.float32, device=device).expand(grid * BLOCK_M * 2 * BLOCK_D)
    parts = parts if grid > row_tiles else None
    return LaunchConfig(next(CONFIG_NUMBERS), grid, merge_grid, sizes, strides, parts, *kwargs)


def in_pairs(*tensors):
    """float8 tensors as kernels take them, in pairs as int16; others as they are."""
    return tuple(x.view(torch.int16) if x.dtype == FLOAT8 else x for x in tensors)


NO_TABLES = BlockTables(None, None, None, None)


def mask_tables(block_mask):
    """The BlockTables of a block mask; Nones for None."""
    if block_mask is None:
        return NO_TABLES
    tables = (getattr(block_mask, name, None) for name in BlockTables._fields)
    return BlockTables(*(x if x is None else x.contiguous() for x in tables))


def mask_shape(block_mask):
    """(sequences, heads, blocks, keys in a block) of a block mask."""
    (n_seqs, n_heads, _, n_blocks), size = block_mask.kv_indices.shape, block_mask.BLOCK_SIZE
    return n_seqs, n_heads, n_blocks, size if isinstance(size, int) else size[1]


def write_part(call, config, sink, o, lse):
    """Write the result of a Call to o (B, M, H, D) and lse (B, M, H) or None. sink: logits, or None."""
    if config is None:
        part_o, part_lse = torch_part(call, sink)
        o.copy_(part_o)
        return None if lse is None else lse.copy_(part_lse.transpose(1, 2))
    tables = mask_tables(call.block_mask)
    parts = o if config.parts is None else torch.empty_like(config.parts)  # o: not written to
    pointers = call.q, *in_pairs(call.k, call.v), o, lse, parts, call.cache_seqlens, call.page_table
    pointers += call.k_scale, call.v_scale
    alignment = [x is not None and x.data_ptr() & 15 for x in (*pointers, *tables, sink, *call.aux)]
    chain, strides = call.mods(), (o.stride(2), 0 if lse is None else lse.stride(2))
    mods = ring_attn.kernel_mods(chain, call.sm_scale) if chain else None
    depends = config.number, o.dtype, lse is None, strides, tuple(alignment) if any(alignment) else None
    depends = *depends, ring_attn.specialization(mods)
    args = *pointers, tables, sink, call.aux, mods, float(call.sm_scale), config.sizes
    args += *config.strides, *strides
    with ring_attn.device_guard(call.q):
        launch(decode_kernel, o.device, depends, config.grid, args, config.constants, **config.options)
        if config.parts is not None:
            args = parts, o, lse, call.cache_seqlens, tables, sink, config.sizes, *strides
            merging = config.merge_grid, args, config.merge_constants
            launch(merge_splits_kernel, o.device, depends, *merging, **config.merge_options)


def torch_part(call, sink):
    """o (B, M, H, D) and lse (B, H, M), float32 or wider."""
    (B, M, H, _), device = call.q.shape, call.q.device
    acc_dtype = torch.promote_types(call.q.dtype, torch.float32)
    k, v = dequantized(call.k, call.k_scale, acc_dtype), dequantized(call.v, call.v_scale, acc_dtype)
    if call.page_table is not None:
        pages = call.page_table.long().clamp(0, len(k) - 1)
        k, v = k[pages].flatten(1, 2), v[pages].flatten(1, 2)
    capacity, lengths = call.capacity(), call.cache_seqlens
    L = torch.full((B,), capacity, device=device) if lengths is None else lengths.long().clamp(0, capacity)
    n = -(-max(int(L.max()) - call.rank, 0) // call.n_ranks)  # no sequence has more keys here
    L = L[:, None, None, None]
    q_pos = L - M + torch.arange(M, device=device)[:, None]  # (B, 1, M, 1)
    kv_pos = call.rank + call.n_ranks * torch.arange(n, device=device)
    seen = kv_pos < L
    if call.causal or call.window is not None:
        seen = seen & (kv_pos <= q_pos)
    if call.window is not None:
        seen = seen & ((kv_pos > q_pos - call.window) | (kv_pos < call.n_sink()))
    b, h = torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[:, None, None]
    indices = b, h, *(pos.minimum(L - 1).clamp(min=0) for pos in (q_pos, kv_pos))  # mods may read there
    allowed = torch.ones((), dtype=torch.bool, device=device)
    if call.mask_mod is not None:
        allowed = call.mask_mod(*indices, *call.aux)
    if call.block_mask is not None:
        tables, block = mask_tables(call.block_mask), kv_pos // mask_shape(call.block_mask)[3]
        allowed = allowed & named_blocks(*tables[:2])[:, :, None, block]  # (B or 1, H or 1, 1, n)
        if tables.full_kv_num_blocks is not None:
            allowed = allowed | named_blocks(*tables[2:])[:, :, None, block]
    seen, scale = (seen & allowed).expand(B, H, -1, -1), float(call.sm_scale)
    o, lse = reference_decode(call.q, k[:, :n], v[:, :n], seen, scale, call.mods(), indices)
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


def is_int(x, least, most=math.inf):
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def int_list(x):
    """Ints in a tensor, an array or any iterable, or one, as a list."""
    x = x.tolist() if hasattr(x, "tolist") else x
    return [x] if isinstance(x, (int, float)) else list(x)


def is_plain(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested


def is_ints(x, shape, device):
    """Is x a contiguous int32 tensor of a shape? None: any size but 0."""
    if not is_plain(x) or x.dtype != torch.int32 or x.device != device or x.ndim != len(shape):
        return False
    return x.is_contiguous() and all(a == b or b is None and a > 0 for a, b in zip(x.shape, shape))


def check_gradients(**tensors):
    """Raise ValueError if one of these requires a gradient, of which nothing here computes any."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            wrong = f"{name} requires a gradient, and decoding has none"
            raise ValueError(f"{wrong}; call it under torch.no_grad(), or train with ring_attn")


def problem_of(call):
    """What is wrong with a call and cannot be seen in the operator, or None."""
    own = getattr(getattr(call.block_mask, "mask_mod", None), "__name__", "noop_mask")
    if call.mask_mod is None and own != "noop_mask":
        need = "pass mask_mod=, the same by position in the sequence"
        return f"block_mask was made from {own}, in torch and by index of the query; {need}"
    values = {x: getattr(call, x) for x in ("sm_scale", "window", "n_splits", "sink", "softcap")}
    if problem := ring_attn.type_problem(dict(causal=call.causal), values):
        return problem
    tensors = {name: getattr(call, name) for name in ("q", "k", "v", "sink", "alibi_slopes")}
    tensors |= {f"aux[{i}]": x for i, x in enumerate(call.aux)} if isinstance(call.aux, tuple) else {}
    try:
        check_gradients(**tensors)
    except ValueError as error:
        return str(error)


def check_decode(call):
    """Raise ValueError, with the values and a way out, for what a call cannot do. Reads no tensor."""
    q, k, v, sink, table, backend = call.q, call.k, call.v, call.sink, call.page_table, call.backend
    scales = dict(k_scale=call.k_scale, v_scale=call.v_scale)
    is_float8 = getattr(k, "dtype", None) == FLOAT8 or any(x is not None for x in scales.values())
    kv_dtype = FLOAT8 if is_float8 else None
    ring_attn.check_common(q, k, v, call.sm_scale, backend, ("torch", "triton"), kv_dtype)
    if is_float8 and backend == "triton" and q.is_cuda and ring_attn.capability(q.device) < (8, 9):
        has = f"{torch.cuda.get_device_name(q.device)} has {ring_attn.capability(q.device)}"
        raise ValueError(f'float8 needs CUDA capability (8, 9); {has}: use bfloat16, or backend="torch"')
    for name, x in scales.items() if is_float8 else ():
        wanted = tuple(k.shape[:3])
        fits = is_plain(x) and x.shape == wanted and x.dtype == torch.float32 and x.device == k.device
        if not fits:
            given = None if x is None else ring_attn.summary(x)
            raise ValueError(f"{name} is {given}; need float32 {wanted} on {k.device}, and both scales")
    for name, x in (("k", k), ("v", v)) if is_float8 and backend == "triton" else ():
        if x.shape[3] % 2 or any(n % 2 for n in (*x.stride()[:3], x.storage_offset())):
            given = f"head dim {x.shape[3]}, strides {x.stride()} and offset {x.storage_offset()}"
            raise ValueError(f"{name} has {given}; for float8 all but the last stride must be even: copy it")
    B, H, device, short = len(q), q.shape[2], q.device, ring_attn.summary
    if table is None and len(k) != B:
        need = "need q (B, M, H, D), k (B, N, HKV, D), or pages and a page_table"
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}; {need}")
    for name, x in (("k", k), ("v", v)) if backend == "triton" else ():
        if x.stride(3) != 1:
            layouts = "(B, N, HKV, D), or as (B, HKV, N, D), transposed"
            raise ValueError(f"{name} has strides {x.stride()}; the last must be 1: lay it out as {layouts}")
        if table is not None and x.shape[1] * x.stride(1) > ring_attn.INT_MAX:
            pages = f"pages of {x.shape[1]} tokens, {x.stride(1)} numbers apart"
            raise ValueError(f"{name} has {pages}; a page must stay below 2**31 numbers: use smaller pages")
    aux = call.aux
    if not isinstance(aux, tuple) or not all(isinstance(x, torch.Tensor) and x.device == device for x in aux):
        raise ValueError(f"aux must be a tuple of tensors on {device}, further arguments for the mods")
    ring_attn.check_softcap(call.softcap)
    if call.window is not None and not is_int(call.window, 1, NO_WINDOW - 1):
        raise ValueError(f"window={call.window!r} must be 1 to {NO_WINDOW - 1} keys, or None for all")
    if call.n_splits is not None and not is_int(call.n_splits, 1, 4096):
        raise ValueError(f"n_splits={call.n_splits!r} must be from 1 to 4096, or None to choose by length")
    logits = is_plain(sink) and sink.shape == (H,) and sink.device == device and sink.is_floating_point()
    if sink is not None and not is_int(sink, 0) and not logits:
        given = sink if isinstance(sink, (int, float)) else short(sink)
        logits = f"a float tensor ({H},) on {device}: a logit for each query head"
        raise ValueError(f"sink={given} must be how many first keys every window keeps, or {logits}")
    if is_int(sink, 1) and call.window is None:
        raise ValueError(f"{sink=} keeps keys that a window would drop, but window=None; give a window")
    if table is not None and not is_ints(table, (B, None), device):
        need = f"a contiguous int32 tensor ({B}, max_pages) on {device}"
        raise ValueError(f"page_table {short(table)} must be {need}")
    if call.capacity() >= NO_WINDOW:
        raise ValueError(f"the cache has room for {call.capacity()} tokens; the most are {NO_WINDOW - 1}")
    ring_attn.check_slopes(call.alibi_slopes, q, backend, call.capacity())
    if call.cache_seqlens is not None and not is_ints(call.cache_seqlens, (B,), device):
        need = f"a contiguous int32 tensor ({B},) on {device}"
        raise ValueError(f"cache_seqlens {short(call.cache_seqlens)} must be {need}")
    for name, takes in dict(score_mod="score, b, h, q_idx, kv_idx", mask_mod="b, h, q_idx, kv_idx").items():
        mod = getattr(call, name)
        if mod is None:
            continue
        ring_attn.check_function(name, mod, takes, len(aux), backend)
    if call.block_mask is not None:
        check_block_mask(call)


def check_block_mask(call):
    mask, names, (B, M, H, _) = call.block_mask, BlockTables._fields, call.q.shape
    if not all(hasattr(mask, name) for name in (*names, "BLOCK_SIZE")):
        need = f"a BlockMask of flex_attention, or have its {', '.join(names)} and BLOCK_SIZE"
        raise ValueError(f"block_mask is a {type(mask).__name__}; it must be {need}")
    if (mask.full_kv_num_blocks is None) != (mask.full_kv_indices is None):
        raise ValueError("block_mask has one of full_kv_num_blocks and full_kv_indices; give both or neither")
    n_seqs, n_heads, n_blocks, size = mask_shape(mask) if mask.kv_indices.ndim == 4 else (0, 0, 0, 0)
    for name, x in zip(names, (getattr(mask, name) for name in names)):
        expected = (n_seqs, n_heads, 1, n_blocks) if name.endswith("indices") else (n_seqs, n_heads, 1)
        if x is not None and (x.dtype != torch.int32 or x.device != call.q.device):
            raise ValueError(f"block_mask.{name} is {x.dtype} on {x.device}; need int32 on {call.q.device}")
        if x is not None and tuple(x.shape) != expected:
            need = "one row of blocks, (sequences, heads, 1, ...): take block_mask[:, :, [row]]"
            raise ValueError(f"block_mask.{name} has shape {tuple(x.shape)}; all queries share {need}")
    if n_seqs not in (1, B) or n_heads not in (1, H):
        given = f"{n_seqs} sequences and {n_heads} heads; here are {B} sequences and {H} query heads"
        raise ValueError(f"block_mask is for {given}: each must be equal, or 1 for all")
    q_size = size if isinstance(mask.BLOCK_SIZE, int) else mask.BLOCK_SIZE[0]
    if M > q_size:
        given = f"{M} query tokens are more than a block of {q_size} (block_mask.BLOCK_SIZE)"
        raise ValueError(f"{given}; use larger blocks, or fewer tokens a call")
    if size < 1 or size % call.n_ranks:
        given = f"blocks of {size} keys, which {call.n_ranks} ranks cannot share evenly"
        raise ValueError(f"block_mask has {given}; use a multiple of {call.n_ranks}")
    if n_blocks != (need := -(-call.capacity() // size)):
        need = f"a cache of {call.capacity()} tokens has {need}"
        raise ValueError(f"block_mask has {n_blocks} blocks of {size} keys; {need}")
    if n_seqs * n_heads > 16384:
        raise ValueError(f"block_mask has {n_seqs} x {n_heads} rows; at most 16384 fit: split the batch")


def check_values(call):
    """Raise ValueError for lengths, pages and blocks that lead outside. Reads tensors: waits for the GPU."""
    capacity, lengths = call.capacity(), call.cache_seqlens
    for b, L in enumerate([capacity] * len(call.q) if lengths is None else lengths.tolist()):
        if not 0 <= L <= capacity:
            raise ValueError(f"cache_seqlens[{b}]={L} must be in 0..{capacity}, the room of the cache")
        n = -(-max(L - call.rank, 0) // call.n_ranks)
        used = call.page_table[b, : -(-n // call.k.shape[1])].tolist() if call.page_table is not None else ()
        for i, page in enumerate(used):
            if not 0 <= page < len(call.k):
                raise ValueError(f"page_table[{b}, {i}]={page} must be in 0..{len(call.k) - 1}")
    tables = mask_tables(call.block_mask)
    for name, num, idx in (("kv", *tables[:2]), ("full_kv", *tables[2:])):
        if num is not None:
            n = idx.shape[-1]
            listed = torch.arange(n, device=num.device) < num[..., None]
            if num.min() < 0 or num.max() > n or (listed & ((idx < 0) | (idx >= n))).any():
                need = f"in 0..{n}, and what it takes of {name}_indices in 0..{n - 1}"
                raise ValueError(f"block_mask.{name}_num_blocks must be {need}")


# -----------------------------------------------------------------------------
# public functions


def kind_of(x):
    """What the checks, the LaunchConfig and the compiled kernels depend on, of any argument. Hashable."""
    if x is None:
        return None
    if is_plain(x):
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    if isinstance(x, tuple):
        return tuple(map(kind_of, x))
    if hasattr(x, "BLOCK_SIZE"):  # a block mask
        tables = (getattr(x, name, None) for name in BlockTables._fields)
        return repr(x.BLOCK_SIZE), getattr(x, "mask_mod", None), *map(kind_of, tables)
    if callable(x):
        return getattr(x, "cache_key", x)  # Triton's hash of the source: copies of a mod are of one kind
    return repr(x)


def make_call(q, k, v, rank, n_ranks, backend=None, sm_scale=None, *args, **options):
    """A Call, whose other fields are args and options."""
    plain = is_plain(q) and q.ndim == 4
    if sm_scale is None:
        sm_scale = max(q.shape[3], 1) ** -0.5 if plain else 1.0
    if backend is None:
        backend = "triton" if ring_attn.INTERPRET or isinstance(q, torch.Tensor) and q.is_cuda else "torch"
    if plain and q.stride(3) != 1:
        q = q.contiguous()  # a few rows
    return Call(q, k, v, rank, n_ranks, backend, sm_scale, *args, **options)


def config_of(call, ring=ring_attn.ALONE, problem=None, debug=False):
    """The LaunchConfig of a call, or None for the torch path. The first call of a kind is checked, on a ring
    on all ranks together. problem: what a graph's maker found wrong."""
    values = repr(call[3:10])  # rank to n_splits; 1, 1.0 and True differ
    tensors = *call[:3], *call[10:]
    kind = values, debug, problem, torch.is_grad_enabled(), *[x if x is None else kind_of(x) for x in tensors]
    if kind in ring.agreed:
        return ring.agreed[kind]
    given = call._asdict() | dict(rank=0, aux=(), block_mask=None, page_table=call.page_table is not None)
    given["debug"] = debug
    for name, x in given.items():  # what the ranks must have alike
        is_tensor = isinstance(x, torch.Tensor)
        given[name] = ring_attn.summary(x) if is_tensor else getattr(x, "__name__", repr(x))
    problem = problem or problem_of(call)

    def prepare():
        if call.backend != "triton":
            return None
        if ring.n_ranks > 1 and part_bytes(call) <= MOST_SENT:
            ring.prepare(call.q, None, 0, 0, max(2**20, ring_attn.next_power_of_2(part_bytes(call))))
        return make_config(call)

    return ring_attn.agree_once(ring, kind, given, problem, lambda: check_decode(call), prepare)


MOST_SENT = 2**24  # bytes in a receive buffer; larger parts are all-gathered, in half the bytes


def part_bytes(call):
    """Of the words that all ranks send to one rank in a call."""
    B, M, H, D = call.q.shape
    return 8 * call.n_ranks * B * M * H * (D + 1)


def packed_part(call, config):
    """What a rank finds in its part of the cache, (B, M, H, D + 1), float32 or wider: o and behind it lse."""
    *lead, D = call.q.shape
    acc_dtype = torch.promote_types(call.q.dtype, torch.float32)
    packed = torch.empty(*lead, D + 1, dtype=acc_dtype, device=call.q.device)
    write_part(call, config, None, packed[..., :D], packed[..., D])
    return packed


def merge_parts(parts, sink=None, dtype=torch.float32):
    """o (B, M, H, D) in dtype and lse (B, H, M) from what decode_part found on each of R ranks, stacked:
    parts (R, B, M, H, D + 1). sink: None, or a logit for each query head, (H,)."""
    check_gradients(parts=parts, sink=sink)
    o, lse = merged(parts, sink, dtype)
    return o, lse.transpose(1, 2)


def merged(parts, sink, dtype, ring=None):
    """merge_parts, but lse (B, M, H). ring: of ranks that each give their own part, (1, B, M, H, D + 1), and
    send it to each other."""
    (*_, B, M, H, D), device = parts.shape, parts.device
    D, (rank, n_ranks) = D - 1, (0, len(parts)) if ring is None else (ring.rank, ring.n_ranks)
    if not (parts.is_cuda or ring_attn.INTERPRET) or parts.dtype != torch.float32:
        o, lse = reference_merge(parts[..., :D], parts[..., D].transpose(2, 3), sink)
        return o.to(dtype), lse.transpose(1, 2).contiguous()
    o = torch.empty(B, M, H, D, dtype=dtype, device=device)
    lse = torch.empty(B, M, H, dtype=torch.float32, device=device)
    pdl = parts.is_cuda and ring_attn.capability(device)[0] >= 9
    constants = dict(PDL=pdl, HEAD_DIM=D, BLOCK_D=max(16, ring_attn.next_power_of_2(D)))
    constants |= dict(CHUNK=min(64, ring_attn.next_power_of_2(n_ranks)))
    depends = parts.shape, rank, n_ranks, ring is None, dtype
    depends = *depends, *(x is None or (x.dtype, x.data_ptr() % 16) for x in (parts, sink))
    # real and virtual ranks agree to the last bit only if the compiler does not choose what to fuse
    options = dict(num_warps=4, enable_fp_fusion=False, **dict(launch_pdl=True) if pdl else {})
    # programs that wait for other ranks must all run at once
    grid = B * M * H if ring is None else min(B * M * H, 128)
    with ring_attn.device_guard(parts):
        peers = None if ring is None else ring.memory.use_peers()
        args = parts, o, lse, sink, peers, rank, n_ranks, B * M * H, H
        launch(merge_ranks_kernel, device, depends, grid, args, constants, **options)
    return o, lse


def decode_attn(
    q, k, v, *, cache_seqlens=None, sm_scale=None, causal=True, score_mod=None, mask_mod=None, aux=(),
    block_mask=None, window=None, sink=None, page_table=None, n_splits=None, return_lse=False, backend=None,
    softcap=None, alibi_slopes=None, k_scale=None, v_scale=None, debug=False,
):  # fmt: skip
    """Attention of the last M tokens of each sequence to its cached keys and values. Not differentiable.

    q: (B, M, H, D), the queries of the last M of the L tokens of each sequence, whose keys are in the cache
       already. Query m is at position L - M + m. bfloat16, float16 or float32 (float64 in the torch path).
    k, v: (B, N, HKV, D), room for N tokens, the first L in use; H a multiple of HKV, D up to 256. Any strides
       but the last, which is 1: (B, HKV, N, D), transposed, is as good. Or pages (P, page_size, HKV, D), with
       page_table (B, max_pages) int32. Keys and values that no query of the call may see may be nan.
    k_scale, v_scale: float32 (B, N, HKV), or as pages (P, page_size, HKV): k and v are float8_e4m3fn, and key
       and value vectors are k * k_scale and v * v_scale. `quantized` makes both. Kernels take a bfloat16 q as
       float16: beyond 65504 it is inf. An even D, and even strides but the last.
    cache_seqlens: L of each sequence, (B,) int32, 0 to N; None means N. Read on the device: a CUDA graph may
       be replayed after lengths, cache and tables have changed.
    sm_scale: above 0; None means D ** -0.5. causal: query m sees keys up to its own position, else all L.
    score_mod(score, b, h, q_idx, kv_idx, *aux), mask_mod(b, h, q_idx, kv_idx, *aux): as in flex_attention, h
       the query head, but q_idx is the position L - M + m, so that a function of positions serves training
       and decoding. @triton.jit functions (for CPU tensors, without the interpreter: plain functions of torch
       tensors); under torch.compile a ring_attn.ScoreMod of each, made before. aux: tensors for them, which a
       @triton.jit function reads with tl.load(aux + index). What a query sees is what mask_mod, causal and
       window all allow.
    softcap, alibi_slopes: as for ring_attn.ring_attn, before score_mod.
    block_mask: a BlockMask of flex_attention, or what has its tables, with one row of blocks for all queries
       of the call. All of its full blocks is seen, of its others what mask_mod allows.
    window: query i sees keys j with i - window < j <= i only. sink: an int, the first keys that every window
       keeps (arXiv 2309.17453), or a tensor (H,) of logits, which join the softmax's denominator only.
    n_splits: splits of every sequence; None chooses by length, on the device.
    return_lse: also return lse (B, H, M) float32, the natural log of the softmax's denominator.
    backend: "torch", or "triton" (any GPU, and CPU tensors under TRITON_INTERPRET=1); None chooses by device.
    debug: also check the values of cache_seqlens, page_table and block_mask, which waits for the GPU.
    Returns o (B, M, H, D) in the dtype of q; o = 0 and lse = -inf for a query that sees no key. The same
    inputs give the same bits.

    Raises ValueError for anything that does not fit. Values on a GPU are checked under debug=True only.
    Otherwise lengths are clipped to 0..N and page numbers to 0..P-1, and blocks outside of the cache are
    skipped: results are then wrong, but no memory outside of the cache is read.
    """
    call = make_call(
        q, k, v, 0, 1, backend, sm_scale, causal, window, n_splits, cache_seqlens, score_mod, mask_mod, aux,
        block_mask, sink, page_table, softcap, alibi_slopes, k_scale, v_scale,
    )  # fmt: skip
    return attend(call, ring_attn.ALONE, return_lse, debug)


def decode_part(q, k, v, rank, n_ranks, **options):
    """What one rank contributes to sharded_decode_attn, for transports of your own: (B, M, H, D + 1) float32
    or wider, o and behind it lse, for merge_parts. options: those of decode_attn but return_lse and debug; a
    sink of logits belongs to merge_parts."""
    if not is_int(n_ranks, 1) or not is_int(rank, 0, n_ranks - 1):
        raise ValueError(f"{rank=} must be from 0 to n_ranks - 1, {n_ranks=} 1 or more")
    call = make_call(q, k, v, rank, n_ranks, **options)
    if call.sink_logits() is not None:
        raise ValueError("the logits of sink count once: give them to merge_parts")
    return packed_part(call, config_of(with_functions(call)))


def sharded_decode_attn(q, k, v, *, group=None, return_lse=False, debug=False, **options):
    """decode_attn over a cache that is striped over the R ranks of `group`: token p of a sequence is on rank
    p % R, at index p // R, as a ring prefill under the striped schedule leaves it. The ranks give each other
    M * H * (D + 1) float32 numbers per sequence: through symmetric memory, where ring_attn has it and they
    are at most 16 MiB in words, in the kernel that merges them; else by one all-gather.

    Arguments as for decode_attn. q and cache_seqlens are the same on every rank and describe whole sequences;
    k and v (B, N, HKV, D) are the rank's stripe, so that a sequence may have up to R * N tokens; pages are
    the rank's own. A block_mask describes whole sequences; its block size must be a multiple of R. group: a
    process group; None for the default one, or for this process alone. Returns o (B, M, H, D), and lse, the
    same on every rank.

    Raises ValueError on every rank if any rank's arguments do not fit, or if the ranks' shapes and options
    differ, checked once per new combination. Values are checked under debug=True only.
    """
    ring = ring_attn.resolve_ring(group)
    if isinstance(ring, ring_attn.VirtualRing):
        raise ValueError("a VirtualRing holds whole sequences; use decode_attn")
    call = make_call(q, k, v, ring.rank, ring.n_ranks, **options)
    return attend(call, ring, return_lse, debug)


all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.14

# -----------------------------------------------------------------------------
# the operator. As in ring_attn.py, eager calls go straight to `run`


def attend(call, ring, return_lse, debug):
    """What decode_attn and sharded_decode_attn call."""
    tensors = call.q, call.k, call.v
    if ring_attn.can_skip_dispatcher(*tensors) or not all(map(is_plain, tensors)):  # refused
        o, lse = run(with_functions(call), ring, return_lse, debug)
    else:
        o, lse = torch.ops.ring_attn.decode.default(*operands(call), ring.number, return_lse, debug)
    return (o, lse.transpose(1, 2)) if return_lse else o


def with_functions(call):
    """The Call, with functions in place of ScoreMods."""
    if type(call.score_mod) is not ring_attn.ScoreMod and type(call.mask_mod) is not ring_attn.ScoreMod:
        return call
    return call._replace(**numbered_mods(*map(ring_attn.number_of, (call.score_mod, call.mask_mod))))


def numbered_mods(*numbers):
    score_mod, mask_mod = (ring_attn.functions_numbered(number)[0] for number in numbers)
    return dict(score_mod=score_mod, mask_mod=mask_mod)


def run(call, ring, return_lse, debug, problem=None):
    """o (B, M, H, D), and lse (B, M, H) or None."""
    config, sink, q = config_of(call, ring, problem, debug), call.sink_logits(), call.q
    if debug or ring.n_ranks == 1 and not q.is_cuda:
        ring_attn.agree_now(ring, {}, None, lambda: check_values(call))
    if ring.n_ranks == 1:
        o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), None
        if return_lse:
            lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        write_part(call, config, sink, o, lse)
        return o, lse
    part = packed_part(call, config)
    if config is not None and ring.memory is not None and ring.memory.sizes[2] >= part_bytes(call):
        return merged(part[None], sink, q.dtype, ring)
    parts = part.new_empty(ring.n_ranks * len(part), *part.shape[1:])  # gloo joins them along a dimension
    all_gather(parts, part, group=ring.group)
    return merged(parts.unflatten(0, (ring.n_ranks, -1)), sink, q.dtype)


def operands(call):
    """A Call as the operator takes it."""
    tensors = call.cache_seqlens, call.sink_logits(), call.page_table, call.alibi_slopes, call.k_scale
    tensors = *tensors, call.v_scale, *mask_tables(call.block_mask), *call.aux
    block_size = None if call.block_mask is None else call.block_mask.BLOCK_SIZE
    block_size = [block_size] * 2 if isinstance(block_size, int) else block_size
    numbers = ring_attn.number_of(call.score_mod), ring_attn.number_of(call.mask_mod)
    options = call.backend, float(call.sm_scale), bool(call.causal), call.window, call.n_splits, call.n_sink()
    return *call[:3], list(tensors), *options, call.softcap, *numbers, block_size, problem_of(call)


OPTIONS = "str backend, float sm_scale, bool causal, SymInt? window, SymInt? n_splits, SymInt n_sink"
OPTIONS += ", float? softcap, int score_mod, int mask_mod, SymInt[]? block_size, str? problem"
OPTIONS += ", int ring, bool return_lse, bool debug"


def decode_real(q, k, v, tensors, backend, sm_scale, causal, window, n_splits, n_sink, softcap, score_mod,
                mask_mod, block_size, problem, ring, return_lse, debug):  # fmt: skip
    ring, (lengths, logits, pages, slopes, *scales) = ring_attn.ring_numbered(ring), tensors[:6]
    mask = block_size and Blocks(*tensors[6:10], tuple(block_size))
    call = Call(
        q, k, v, ring.rank, ring.n_ranks, backend, sm_scale, causal, window, n_splits, lengths,
        **numbered_mods(score_mod, mask_mod), aux=tuple(tensors[10:]), block_mask=mask,
        sink=n_sink or None if logits is None else logits, page_table=pages, softcap=softcap,
        alibi_slopes=slopes, k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip
    o, lse = run(call, ring, return_lse, debug, problem)
    return o, lse if return_lse else q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))


def decode_fake(q, k, v, tensors, *options):
    lse = q.new_empty(q.shape[:3] if options[-2] else 0, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


ring_attn.LIBRARY.define(f"decode({ring_attn.TENSORS}, Tensor?[] tensors, {OPTIONS}) -> (Tensor, Tensor)")
ring_attn.LIBRARY.impl("decode", decode_real, "CompositeExplicitAutograd")
torch.library.register_fake("ring_attn::decode", decode_fake, lib=ring_attn.LIBRARY)

# -----------------------------------------------------------------------------
# a cache for models, and CUDA graphs


class KVCache:
    """Keys and values of every layer of a model, for B sequences of up to n_tokens tokens each.

    k, v: lists of n_layers tensors (n_pages * page_size + 1, n_kv_heads, D); the last slot takes what is not
    kept. page_size: if given, a sequence takes pages of so many tokens as it grows, of n_pages (None: enough
    for all); if not, each has one page of n_tokens / n_ranks tokens, rounded up.
    dtype: float64, float32, bfloat16, float16, or torch.float8_e4m3fn, which halves a 16-bit cache; each
    (token, head) then has a scale in k_scale, v_scale, else None.
    host_lengths: tokens of each sequence, a list of ints; lengths: the same as a tensor (B,) int32 on the
    device, which kernels read. page_table: (B, max_pages) int32 on the device, -1 where there is no page;
    pages: the same as lists; free: the pages that no sequence has.
    group: the process group that shares the tokens, token p on rank p % n_ranks; None: all are here. All
    ranks hand out pages alike, for the rank that has most tokens.
    Tokens are added by `reserve` on the host, then `extend`, then `write` for each layer on the device.
    Raises ValueError for sizes below 1, another dtype, and n_pages without page_size.
    """

    def __init__(self, n_layers, B, n_tokens, n_kv_heads, dim_per_head, dtype=torch.bfloat16, device="cpu",
                 group=None, page_size=None, n_pages=None):  # fmt: skip
        if not all(is_int(x, 1) for x in (n_layers, B, n_tokens, n_kv_heads, dim_per_head)):
            given = f"{n_layers=}, {B=}, {n_tokens=}, {n_kv_heads=} and {dim_per_head=}"
            raise ValueError(f"{given} must be ints of 1 or more")
        if dtype not in (dtypes := (torch.float64, torch.float32, torch.bfloat16, torch.float16, FLOAT8)):
            raise ValueError(f"{dtype=} must be one of {', '.join(map(str, dtypes))}")
        sizes_fit = all(x is None or is_int(x, 1) for x in (page_size, n_pages))
        if not sizes_fit or page_size is None and n_pages is not None:
            need = "must be 1 or more, or None, and n_pages needs a page_size"
            raise ValueError(f"{page_size=} and {n_pages=} {need}")
        self.ring = ring_attn.ALONE if group is None else ring_attn.resolve_ring(group)
        self.n_tokens, self.paged = n_tokens, page_size is not None
        N = -(-n_tokens // self.ring.n_ranks)
        self.page_size = page_size or N  # without pages each sequence has one of its own, for good
        max_pages = -(-N // self.page_size)
        n_pages = n_pages or B * max_pages
        self.trash = n_pages * self.page_size  # the slot of what this rank is not to keep
        shape, of = (self.trash + 1, n_kv_heads), dict(device=device)

        def new():
            return torch.empty(*shape, dim_per_head, dtype=dtype, **of)

        def new_scale():
            return torch.empty(shape, **of) if dtype == FLOAT8 else None

        self.k, self.v = ([new() for _ in range(n_layers)] for _ in "kv")
        self.k_scale, self.v_scale = ([new_scale() for _ in range(n_layers)] for _ in "kv")
        self.host_lengths, self.lengths = [0] * B, torch.zeros(B, dtype=torch.int32, **of)
        self.pages, self.free = [[] for _ in range(B)], list(range(n_pages))
        self.page_table = torch.full((B, max_pages), -1, dtype=torch.int32, **of)  # -1: not handed out
        if not self.paged:
            self.pages, self.free = [[b] for b in range(B)], []
            self.page_table[:, 0] = torch.arange(B)
        self.rows = torch.arange(B, device=device)

    def check_room(self, n, pages=True):
        """Raise ValueError unless n more tokens fit, as for `reserve`; pages=False: if enough pages will be
        free. Returns the lengths with them, and the new pages, (sequence, index in it) each."""
        lengths, n = self.host_lengths, n if is_int(n, 0) else int_list(n)
        if is_int(n, 0):
            if not any(lengths):
                raise ValueError(f"no sequence has tokens that {n} could follow; prefill prompts first")
            n = [n if L else 0 for L in lengths]
        if len(n) != len(lengths) or not all(is_int(x, 0) for x in n):
            raise ValueError(f"{n=} must be an int, or an int for each of {len(lengths)} sequences")
        for b, (L, x) in enumerate(zip(lengths, n)):
            if L + x > self.n_tokens:
                full = f"the cache is full: sequence {b} has {L} tokens, {x} more do not fit into its"
                raise ValueError(f"{full} {self.n_tokens}; make it with a larger n_tokens")
        lengths, span = [L + x for L, x in zip(lengths, n)], self.page_size * self.ring.n_ranks
        new = [(b, i) for b, L in enumerate(lengths) for i in range(len(self.pages[b]), -(-L // span))]
        if pages and len(new) > len(self.free):
            n_pages = sum(map(len, self.pages)) + len(self.free)
            need = f"{len(new)} more pages of {self.page_size} tokens are needed, and {len(self.free)} of"
            fix = "release sequences that are finished, or make the cache with more n_pages"
            raise ValueError(f"{need} {n_pages} are free; {fix}")
        return lengths, new

    def reserve(self, n):
        """What the host has to do before `extend(n)`: count tokens and hand out pages. n: a number for all
        sequences that hold tokens, or a list, one for each sequence. ValueError if they do not fit; the cache
        is then as before."""
        self.host_lengths, new = self.check_room(n)
        if new:
            new = [(b, i, self.free.pop()) for b, i in new]
            for b, _, page in new:
                self.pages[b].append(page)
            b, i, page = torch.tensor(new).T.to(self.lengths.device, non_blocking=True)
            self.page_table[b, i] = page.int()

    def extend(self, n):
        """Make the sequences longer by what was reserved, for `write` to fill. With an int for n a CUDA graph
        or torch.compile may have it: it reads no length on the host."""
        if isinstance(n, int):
            n = n * (self.lengths > 0)
        self.lengths += torch.as_tensor(n, device=self.lengths.device)

    def release(self, rows):
        """Drop the sequences `rows`, ints: they are empty, cost nothing, and stay so until the next prefill
        of them. Their pages are free."""
        rows = int_list(rows)
        if not all(is_int(b, 0, len(self.pages) - 1) for b in rows):
            raise ValueError(f"{rows=} must be from 0 to {len(self.pages) - 1}, the sequences of the cache")
        for b in rows:
            self.host_lengths[b] = 0
            if self.paged:
                self.free += self.pages[b]
                self.pages[b] = []
        if rows:
            self.lengths[rows] = 0
        if rows and self.paged:
            self.page_table[rows] = -1

    def restore(self, lengths):
        """Go back to these host_lengths, after an error in what came after `reserve`."""
        self.host_lengths = lengths
        self.lengths.copy_(torch.tensor(lengths))

    def positions(self, n):
        """Positions of the last n tokens, (B, n) int64; below 0 where a sequence is empty."""
        return self.lengths.long()[:, None] - n + torch.arange(n, device=self.lengths.device)

    def slots(self, pos, rows=None):
        """Where this rank keeps the tokens at positions pos (1 or B, n) of the sequences `rows`, (B,) int64,
        or of all: (B, n) int64, page * page_size + index in the page. For tokens of other ranks, and for
        positions that a sequence does not have, it is the trash slot."""
        rows = (self.rows if rows is None else rows)[:, None]
        R, index = self.ring.n_ranks, pos // self.ring.n_ranks  # of the tokens that this rank keeps
        i, max_pages = index // self.page_size, self.page_table.shape[1]
        page = self.page_table[rows, i.clamp(0, max_pages - 1)]
        mine = (pos % R == self.ring.rank) & (pos >= 0) & (pos < self.lengths[rows])
        # whatever was not reserved, nothing of others is written to
        mine = mine & (i < max_pages) & (page >= 0)
        return torch.where(mine, page.long() * self.page_size + index % self.page_size, self.trash)

    def write(self, layer, k, v, slots):
        """Write k, v (B, n, HKV, D) to slots (B, n), in the dtype of the cache."""
        for x, caches, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            cache, scale = caches[layer], scales[layer]
            if scale is None:
                cache[slots] = x.to(cache.dtype)
            else:
                x, scale[slots] = quantized(x)
                cache.view(torch.uint8)[slots] = x.view(torch.uint8)  # torch cannot index all float8 tensors

    def attend(self, layer, q, sm_scale, window=None, sink=None, softcap=None):
        """Attention of q (B, M, H, D), the last M tokens, to the cache: (B, M, H, D). window, sink, softcap:
        as for decode_attn."""

        def in_pages(layers):  # not kept: torch 2.11 compiles no graph for caches of any size that has both
            x = layers[layer]
            return x if x is None else x[:-1].view(-1, self.page_size, *x.shape[1:])

        k, v, k_scale, v_scale = map(in_pages, (self.k, self.v, self.k_scale, self.v_scale))
        window = window and min(window, NO_WINDOW - 1)  # a model's window may be longer than any cache
        options = dict(cache_seqlens=self.lengths, sm_scale=sm_scale, window=window, sink=sink)
        options |= dict(softcap=softcap, k_scale=k_scale, v_scale=v_scale)
        options["page_table"] = self.page_table if self.paged else None
        dtype = q.dtype if k.dtype == FLOAT8 else k.dtype
        if self.ring.n_ranks > 1:
            return sharded_decode_attn(q.to(dtype), k, v, group=self.ring, **options).to(q.dtype)
        return decode_attn(q.to(dtype), k, v, **options).to(q.dtype)


def capture(f, warm_up=True):
    """f() as a CUDA graph: (a function that replays it, what f returned, which every replay overwrites).
    warm_up: call f once before, as a first call makes things that must not be made during capture."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    if warm_up:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            f()
        torch.cuda.current_stream().wait_stream(stream)
    # thread_local: NCCL's watchdog may query events meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = f()
    return graph.replay, result


def capture_step(step, tokens, cache):
    """step(tokens, cache) as a CUDA graph: a function of new tokens (B, n) of the same shape and the same
    cache, which reserves their room first. step: what is to be done on the device, such as
    Transformer.decode; it must have run before. Its next call overwrites what it returns."""
    tokens = tokens.clone()
    captured = cache
    replay, result = capture(lambda: step(tokens, captured), warm_up=False)

    def replay_step(new, cache):
        if cache is not captured or new.shape != tokens.shape:
            need = f"the cache that it was captured with, and tokens {tuple(tokens.shape)}"
            raise ValueError(f"a captured step takes {need}, not {tuple(new.shape)}; capture another")
        cache.reserve(new.shape[1])
        tokens.copy_(new)
        replay()
        return result

    return replay_step
