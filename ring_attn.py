"""Ring attention: exact attention over sequences longer than one GPU holds.

Every rank keeps the queries, keys and values of its own T tokens. Keys and values come from all round the ring, one
rank's per hop, and each hop folds them into a running softmax (per query row, over the keys j seen so far):

    lse = log sum_j exp(s_j)            s_j = sm_scale * q . k_j
    o   = sum_j exp(s_j - lse) v_j
    hop: lse' = log(exp(lse) + sum_new exp(s_j)),  o' = exp(lse - lse') o + sum_new exp(s_j - lse') v_j

so that (o, lse) in float32 is all the state a hop hands to the next one. The backward needs only the final lse and
delta = rowsum(do * o): p = exp(s - lse), dv = p^T do, ds = p * (do v^T - delta), dq = ds k, dk = ds^T q.

Shapes: B batch, T tokens on this rank, S = n_ranks * T, H query heads, HKV key/value heads, G = H // HKV, D head dim.
q, o, do (B, T, H, D); k, v (B, T, HKV, D); lse, delta (B, H, T) float32, natural log, -inf where a row sees no key.

A schedule is data: which global positions a rank holds. Kernels see positions and never a schedule's name: the keys
at or before a query are a prefix of the local keys, so skipped, unmasked and masked tiles are loop bounds.
Parallelism: forward and dq by (query tile, head, batch); dk, dv by (key tile, kv head, batch), looping over the G query
heads of the group: no atomics, the same bits every time. Each is there twice: in portable Triton, and for Hopper in Gluon.

Not here: attention bias, windows, dropout on the probabilities, queries and keys of different lengths.

Sources: Ring Attention (arXiv 2310.01889), Striped Attention (2311.09431), FlashAttention-2 and -3 (2307.08691, 2407.08608),
step attention and the argument names (github mgmalek/ring-attention), zigzag (zhuzilin/ring-flash-attention issue 2).

    python test.py                              # tests: kernels, schedules, virtual rings of 1 to 8
    torchrun --nproc_per_node=4 test.py         # the same, and real processes
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
import random
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from einops import einsum, rearrange
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

# -----------------------------------------------------------------------------
# reference: one hop in plain torch. The CPU path, and the page to read first

LOG2E = tl.constexpr(math.log2(math.e))
INT_MAX = 2**31 - 1


def reference_fwd(q, k, v, o, lse, q_pos, k_pos, sm_scale):
    """Fold keys and values into the softmax state (o, lse) of the queries and return the new state.

    q, o (B, M, H, D), lse (B, H, M), k, v (B, N, HKV, D). q_pos (M,), k_pos (N,): query i sees key j where
    k_pos[j] <= q_pos[i]; both None: every key. Computes in the dtype of o: float32, or float64 for float64 inputs.
    """
    G = q.shape[2] // k.shape[2]
    q, o = (rearrange(x.to(o.dtype), "b m (h g) d -> b h g m d", g=G) for x in (q, o))
    k, v = (rearrange(x.to(o.dtype), "b n h d -> b h n d") for x in (k, v))
    lse = rearrange(lse, "b (h g) m -> b h g m", g=G)
    s = einsum(q, k, "b h g m d, b h n d -> b h g m n") * sm_scale
    if q_pos is not None:
        s = s.masked_fill(k_pos > q_pos[:, None], -math.inf)
    new_lse = torch.logaddexp(lse, s.logsumexp(-1))  # (B, HKV, G, M)
    safe = new_lse.masked_fill(new_lse == -math.inf, 0.0)  # a row that sees no key: o = 0, not nan
    o = o * (lse - safe).exp()[..., None]
    o = o + einsum((s - safe[..., None]).exp(), v, "b h g m n, b h n d -> b h g m d")
    return rearrange(o, "b h g m d -> b m (h g) d"), rearrange(new_lse, "b h g m -> b (h g) m")


def reference_bwd(q, k, v, do, lse, delta, q_pos, k_pos, sm_scale):
    """What these keys and values add to dq, and these queries to dk and dv; arguments as in reference_fwd."""
    G = q.shape[2] // k.shape[2]
    q, do = (rearrange(x.to(lse.dtype), "b m (h g) d -> b h g m d", g=G) for x in (q, do))
    k, v = (rearrange(x.to(lse.dtype), "b n h d -> b h n d") for x in (k, v))
    lse, delta = (rearrange(x, "b (h g) m -> b h g m 1", g=G) for x in (lse, delta))
    s = einsum(q, k, "b h g m d, b h n d -> b h g m n") * sm_scale
    if q_pos is not None:
        s = s.masked_fill(k_pos > q_pos[:, None], -math.inf)
    p = (s - lse.masked_fill(lse == -math.inf, math.inf)).exp()
    ds = p * (einsum(do, v, "b h g m d, b h n d -> b h g m n") - delta) * sm_scale
    dq = einsum(ds, k, "b h g m n, b h n d -> b h g m d")
    dk = einsum(ds, q, "b h g m n, b h g m d -> b h n d")
    dv = einsum(p, do, "b h g m n, b h g m d -> b h n d")
    return rearrange(dq, "b h g m d -> b m (h g) d"), rearrange(dk, "b h n d -> b n h d"), rearrange(dv, "b h n d -> b n h d")


# -----------------------------------------------------------------------------
# schedules: which global positions a rank holds


class Layout(NamedTuple):
    """Local token i sits at global position start + stride * i + jump * (i >= T // 2). Positions increase with i."""

    start: int
    stride: int
    jump: int


class Schedule(NamedTuple):
    batch_groups: int  # the batch is cut into this many equal parts, each with a layout of its own
    T_multiple: int  # T must be a multiple of this (on more than one rank)
    layouts: Callable  # (rank, n_ranks, T) -> one Layout per batch group


# A new schedule is one more row. Each position 0..S-1 must be held by exactly one rank, and increase with i on each.
SCHEDULES = {
    "contiguous": Schedule(1, 1, lambda r, R, T: (Layout(r * T, 1, 0),)),
    "striped": Schedule(1, 1, lambda r, R, T: (Layout(r, R, 0),)),
    "zigzag": Schedule(1, 2, lambda r, R, T: (Layout(r * (T // 2), 1, (R - 1 - r) * T),)),
    "step": Schedule(2, 1, lambda r, R, T: (Layout(r * T, 1, 0), Layout((R - 1 - r) * T, 1, 0))),
}


def check_schedule(schedule, n_ranks, T, B=None):
    """Raise ValueError unless shards of (B, T) tokens on n_ranks ranks can follow this schedule."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"{schedule=} is unknown; choose one of {', '.join(SCHEDULES)}")
    if n_ranks < 1 or T < 1:
        raise ValueError(f"{n_ranks=} and the tokens per rank, {T}, must be 1 or more")
    if n_ranks == 1:
        return  # all schedules are the same on a ring of one
    need = SCHEDULES[schedule]
    if T % need.T_multiple:
        raise ValueError(
            f"seq_len={n_ranks * T} must be a multiple of {need.T_multiple}*n_ranks={need.T_multiple * n_ranks} for {schedule}; "
            f'pad it, or use schedule="striped"'
        )
    if B is not None and B % need.batch_groups:
        raise ValueError(f'batch size {B=} must be a multiple of {need.batch_groups} for {schedule}; pad the batch, or use schedule="zigzag"')
    if n_ranks * T > INT_MAX:
        raise ValueError(f"seq_len={n_ranks * T} must stay below 2**31; positions are 32 bit in the kernels")


def batch_slices(B, n_groups):
    """The batch rows of each group, which share a layout, as slices of the batch dimension."""
    return [slice(g * B // n_groups, (g + 1) * B // n_groups) for g in range(n_groups)]


def rank_layouts(schedule, rank, n_ranks, T):
    """One Layout per batch group; a ring of one has a single group under every schedule."""
    return SCHEDULES[schedule].layouts(rank, n_ranks, T)[: 1 if n_ranks == 1 else None]


def layout_positions(layout, T, device=None):  # (T,) int64
    i = torch.arange(T, device=device)
    return layout.start + layout.stride * i + layout.jump * (i >= T // 2)


def positions(schedule, rank, n_ranks, T, B=1, device=None):
    """Global positions of a rank's T tokens: (1, T) int64, or (B, T) under a schedule that splits the batch (step, which
    needs B to be told).

    Raises ValueError for an unknown schedule, a rank outside the ring, or T or B that the schedule cannot cut.
    """
    check_schedule(schedule, n_ranks, T, B)
    if not 0 <= rank < n_ranks:
        raise ValueError(f"{rank=} must be in 0..{n_ranks - 1}")
    layouts = rank_layouts(schedule, rank, n_ranks, T)
    if len(layouts) == 1:
        return layout_positions(layouts[0], T, device)[None]
    return torch.cat([layout_positions(at, T, device).expand(s.stop - s.start, T) for at, s in zip(layouts, batch_slices(B, len(layouts)))])


def shard(x, schedule, rank, n_ranks):
    """The tokens of `rank`: (B, S, ...) -> (B, S // n_ranks, ...), a copy. Differentiable.

    Raises ValueError where n_ranks does not divide S, and as `positions` does.
    """
    B, S = x.shape[:2]
    if n_ranks < 1 or S % n_ranks:
        raise ValueError(f"seq_len={S} must be a multiple of {n_ranks=}; pad it, or change the number of ranks")
    pos = positions(schedule, rank, n_ranks, S // n_ranks, B, x.device)  # (1 or B, T)
    return x[:, pos[0]] if len(pos) == 1 else x[torch.arange(B, device=x.device)[:, None], pos]


def merge(shards, schedule):
    """The inverse of `shard`: the shards of ranks 0..n_ranks-1, (B, T, ...) each, -> (B, S, ...)."""
    n_ranks, (B, T) = len(shards), shards[0].shape[:2]
    x = shards[0].new_empty(B, n_ranks * T, *shards[0].shape[2:])
    for rank, part in enumerate(shards):
        x[torch.arange(B, device=x.device)[:, None], positions(schedule, rank, n_ranks, T, B, x.device)] = part
    return x


class HopRow(NamedTuple):
    """One batch group at one hop: nine integers that the kernels read by index."""

    q_start: int  # 0..2: Layout of the queries
    q_stride: int
    q_jump: int
    k_start: int  # 3..5: Layout of the keys
    k_stride: int
    k_jump: int
    next_start: int  # 6: the first key position of all later hops; queries before it are complete after this one
    carry: int  # 7: rows of (o, lse), or of dq, that hold the result of earlier hops: 0 or T
    carry_grad: int  # 8: rows of dk, dv, from the first on, that hold what other ranks collected


class Hop(NamedTuple):
    """What one rank does at one hop; made by `plan`. Keys seen by a rank's queries are the first ones of a shard, as positions
    increase: how many, for each batch group, is all there is to say of what has to move."""

    source: int  # whose keys and values are at hand
    table: tuple  # one HopRow per batch group
    seen: tuple  # rows of k, v that queries of this rank see, in whole tiles; all 0: there is nothing to compute
    # between neighbours, the same on every rank, so that sends and receives match:
    send: tuple  # rows of k, v that the next rank, or one after it, needs
    recv: tuple  # rows of k, v that arrive for the next hop
    send_grad: tuple  # rows of dk, dv that leave with something in them (backward)
    recv_grad: tuple

    @property
    def visible(self):
        return any(self.seen)


@functools.lru_cache(maxsize=4096)
def plan(schedule, rank, n_ranks, T, causal, direction):
    """The hops of one rank: a tuple of n_ranks Hops. Hop 0 works on the rank's own keys.

    direction 1 (forward): keys move to the next rank, hop j has those of rank - j. direction -1 (backward): keys and
    the gradients collected for them move to the previous rank, hop j has those of rank + j; the gradients of the own
    keys come home after hop n_ranks - 1 and are finished last.
    """
    R = n_ranks
    layouts = [rank_layouts(schedule, r, R, T) for r in range(R)]
    groups = range(len(layouts[0]))
    first = lambda at: at.start + at.jump * (T // 2 == 0)
    seen = lambda q_rank, k_rank, g: n_visible(layouts[q_rank][g], layouts[k_rank][g], T) if causal else T
    stop = lambda source, j: (source + direction * j) % R  # where the keys of `source` are at hop j
    needed = lambda source, j, g: max(seen(stop(source, i), source, g) for i in range(j, R))  # at stop j or beyond
    collected = lambda source, j, g: max((seen(stop(source, i), source, g) for i in range(1, j + 1)), default=0)  # dk, dv after stop j

    sources = [(rank - direction * j) % R for j in range(R)]
    hops = []
    for j, source in enumerate(sources):
        table = []
        for g in groups:
            later = [first(layouts[s][g]) if causal else -1 for s in sources[j + 1 :]]
            carry_grad = collected(source, j - 1, g) if j else collected(rank, R - 1, g)  # the own keys are finished last
            table.append(HopRow(*layouts[rank][g], *layouts[source][g], min(later, default=INT_MAX), T if j else 0, carry_grad))
        arriving = (rank - direction * (j + 1)) % R
        final = j == R - 1
        hops.append(
            Hop(
                source=source,
                table=tuple(table),
                seen=tuple(seen(rank, source, g) for g in groups),
                send=tuple(0 if final else needed(source, j + 1, g) for g in groups),
                recv=tuple(0 if final else needed(arriving, j + 1, g) for g in groups),
                send_grad=tuple(collected(source, j, g) for g in groups),
                recv_grad=tuple(collected(arriving, j, g) if j else 0 for g in groups),
            )
        )
    return tuple(hops)


def n_visible(q_at, k_at, T):
    """How many of the T keys of layout k_at the last of T queries of layout q_at sees under a causal mask, rounded up to whole tiles: a
    kernel that reads a tile multiplies what no query sees by 0, and may not find nan there."""
    last = q_at.start + q_at.stride * (T - 1) + q_at.jump * (T - 1 >= T // 2)
    first_half = (last - k_at.start) // k_at.stride + 1
    second_half = (last - k_at.start - k_at.jump - k_at.stride * (T // 2)) // k_at.stride + 1
    n = min(max(first_half, 0), T // 2) + min(max(second_half, 0), T - T // 2)
    return min(-(-n // ROW_PAD.value) * ROW_PAD.value, T)


def keys_moved(schedule, n_ranks, T, B=1, causal=True, transport="symmetric"):
    """How many rows (tokens of one sequence) of keys and values each rank receives in a forward, in whole tiles of 128: a list by rank.

    transport "symmetric": only what its queries see. "p2p": what it or a rank after it sees.
    Full attention, and striped under any mask, move (n_ranks - 1) * T * B. Under a causal mask "symmetric" moves half of that under contiguous and
    step on average, three quarters under zigzag. Raises ValueError for an unknown transport, and as `positions` does.
    """
    check_schedule(schedule, n_ranks, T, B)
    check_transport(transport)
    rows = lambda hops: [hop.seen for hop in hops[1:]] if transport == "symmetric" else [hop.recv for hop in hops]
    per_group = lambda counts: sum(n * B // len(counts) for n in counts)
    return [sum(map(per_group, rows(plan(schedule, rank, n_ranks, T, causal, 1)))) for rank in range(n_ranks)]


@functools.lru_cache(maxsize=1024)
def hop_table(table, device):
    return torch.tensor(table, dtype=torch.int32, device=device)


# -----------------------------------------------------------------------------
# kernels. HOP points to a table of HopRows: +0 layout of the queries, +3 layout of the keys, +6 next_start, +7 carry, +8 carry_grad

HOP_COLUMNS = tl.constexpr(len(HopRow._fields))
ROW_PAD = tl.constexpr(128)  # a multiple of every tile's rows: per-row constants of the backward are padded to it, and so are the rows that move


@triton.jit
def position(at, i, T):
    """Global position of local token i; `at` points to a Layout."""
    return tl.load(at) + tl.load(at + 1) * i + tl.where(i >= T // 2, tl.load(at + 2), 0)


@triton.jit
def n_le(at, x, T):
    """How many of the T local tokens sit at or before position x. Clipped before `//`, which truncates toward zero."""
    start, stride, jump, half = tl.load(at), tl.load(at + 1), tl.load(at + 2), T // 2
    first = tl.maximum(x - start + stride, 0)
    second = tl.maximum(x - start - jump - stride * half + stride, 0)
    if stride > 1:  # most schedules have 1, and divisions take their time
        first, second = first // stride, second // stride
    return tl.minimum(first, half) + tl.minimum(second, T - half)


@triton.jit
def load_tile(X, b, h, row, T, stride_b, stride_t, stride_h, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr):
    """Tokens row : row + BLOCK of one head, [BLOCK, BLOCK_D]; zeros past T and past HEAD_DIM.

    With TMA, X describes the matrix (tokens of all batches, all heads); the launcher made sure that no tile overhangs.
    """
    if TMA:
        return X.load([b * (stride_b // stride_t) + row, h * stride_h])
    else:
        offs_d = tl.arange(0, BLOCK_D)
        offs_t = row + tl.arange(0, BLOCK)
        x = X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
        mask = (offs_t < T)[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        return tl.load(x, mask=mask, other=0.0)


@triton.jit
def state_tile(b, h, row, T, H, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets and mask of a tile of a contiguous (B, T, H, D) tensor, [BLOCK, BLOCK_D]."""
    offs_t, offs_d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    offs = ((b.to(tl.int64) * T + offs_t) * H + h) * HEAD_DIM
    return offs[:, None] + offs_d[None, :], (offs_t < T)[:, None] & (offs_d < HEAD_DIM)[None, :]


@triton.jit
def fwd_tiles(acc, l_i, m_i, q, K, V, b, h, lo, hi, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
              BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(K, b, h, start_n, T, stride_kb, stride_kt, stride_kh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASK:
            s = tl.where((start_n + tl.arange(0, BLOCK_N))[None, :] < row_end[:, None], s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
        shift = m_new
        if MASK:  # a row that has seen no key yet: exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = nan
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.math.exp2(s * qk_scale - shift[:, None])
        alpha = tl.math.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_tile(V, b, h, start_n, T, stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BLOCK_M, D]
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def query_tile(HOP, H, T, GROUP_B, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of queries and the keys it sees: all rows those before n_full, row i those before row_end[i], none from n_end on."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    start_m = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # under a causal mask the longest tiles go first
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    offs_m = start_m + tl.arange(0, BLOCK_M)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    if CAUSAL:
        n_full = n_le(hop + 3, position(hop, start_m, T), T)
        n_end = n_le(hop + 3, position(hop, tl.minimum(start_m + BLOCK_M, T) - 1, T), T)
        row_end = n_le(hop + 3, position(hop, offs_m, T), T)
    else:
        n_full, n_end = T, T
        row_end = tl.zeros([BLOCK_M], tl.int32) + T
    final = position(hop, tl.minimum(start_m + BLOCK_M, T) - 1, T) < tl.load(hop + 6)  # no later hop has keys for these queries
    carried = tl.load(hop + 7)  # rows of the state that earlier hops have filled: none, or all
    return b, h, start_m, offs_m, n_full // BLOCK_N * BLOCK_N, n_end, row_end, carried, final


@triton.jit(do_not_specialize=["H", "G", "T", "GROUP_B"])
def fwd_kernel(Q, K, V, O, ACC, LSE, HOP, sm_scale, H, G, T, GROUP_B,
               stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
               CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One hop of the forward for one tile of queries. State in ACC (B, T, H, D) and LSE (B, H, T), float32; the last
    hop that a tile takes part in writes O in its own dtype instead of ACC."""
    b, h, start_m, offs_m, n_full, n_end, row_end, carried, final = query_tile(HOP, H, T, GROUP_B, CAUSAL, BLOCK_M, BLOCK_N)
    if (n_end == 0) & (carried > 0):
        return  # nothing to add: the state stays, or O is complete already

    q = load_tile(Q, b, h, start_m, T, stride_qb, stride_qt, stride_qh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    offs, mask = state_tile(b, h, start_m, T, H, BLOCK_M, BLOCK_D, HEAD_DIM)
    lse = LSE + (b * H + h).to(tl.int64) * T + offs_m
    acc = tl.load(ACC + offs, mask=mask & (offs_m < carried)[:, None], other=0.0)
    m_i = tl.load(lse, mask=offs_m < carried, other=-float("inf")) * LOG2E
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)  # without a carry m_i is -inf and the first key rescales this 1 to 0
    hk = h // G
    qk_scale = sm_scale * LOG2E
    acc, l_i, m_i = fwd_tiles(acc, l_i, m_i, q, K, V, b, hk, 0, n_full, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh,
                              stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA, MASK=False)  # fmt: skip
    if CAUSAL or not TMA:  # with TMA no tile overhangs
        acc, l_i, m_i = fwd_tiles(acc, l_i, m_i, q, K, V, b, hk, n_full, n_end, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh,
                                  stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA, MASK=True)  # fmt: skip
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row that never saw a key: o = 0, lse = -inf
    acc = acc / l_i[:, None]
    tl.store(lse, (m_i + tl.math.log2(l_i)) / LOG2E, mask=offs_m < T)
    if final:
        tl.store(O + offs, acc.to(O.dtype.element_ty), mask=mask)
    else:
        tl.store(ACC + offs, acc, mask=mask)


@triton.jit(do_not_specialize=["B", "H", "T"])
def bwd_preprocess_kernel(O, DO, LSE, DLSE, ROWS, B, H, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """What the backward needs per row, (2, B, H, T padded) float32: lse in base 2, +inf where a row is padding or saw no key, so that
    p is 0; and delta = rowsum(do * o) - dlse, as a gradient of lse enters ds = p * (dp - delta) the same way."""
    T_pad = tl.cdiv(T, ROW_PAD) * ROW_PAD
    n_tiles = T_pad // BLOCK_M
    bh = tl.program_id(0) // n_tiles
    start_m = tl.program_id(0) % n_tiles * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs, mask = state_tile(bh // H, bh % H, start_m, T, H, BLOCK_M, BLOCK_D, HEAD_DIM)
    o = tl.load(O + offs, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(DO + offs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    row = bh.to(tl.int64) * T + offs_m
    if DLSE is not None:
        delta -= tl.load(DLSE + row, mask=offs_m < T, other=0.0)
    lse = tl.load(LSE + row, mask=offs_m < T, other=float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    row = bh.to(tl.int64) * T_pad + offs_m
    tl.store(ROWS + row, lse * LOG2E)
    tl.store(ROWS + B.to(tl.int64) * H * T_pad + row, delta)


@triton.jit
def dq_tiles(dq, q, do, lse, delta, K, V, b, h, lo, hi, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    for start_n in tl.range(lo, hi, BLOCK_N):
        k = load_tile(K, b, h, start_n, T, stride_kb, stride_kt, stride_kh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
        v = load_tile(V, b, h, start_n, T, stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
        p = tl.math.exp2(tl.dot(q, k.T, input_precision="ieee") * qk_scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
        if MASK:
            p = tl.where((start_n + tl.arange(0, BLOCK_N))[None, :] < row_end[:, None], p, 0.0)
        ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, D]
    return dq


@triton.jit(do_not_specialize=["H", "G", "T", "GROUP_B"])
def dq_kernel(Q, K, V, DO, LSE_LOG2, DELTA, DQ, ACC, HOP, sm_scale, H, G, T, GROUP_B,
              stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
              CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One hop of dq for one tile of queries; bounds, state (ACC, float32) and the last write (DQ) as in fwd_kernel."""
    b, h, start_m, offs_m, n_full, n_end, row_end, carried, final = query_tile(HOP, H, T, GROUP_B, CAUSAL, BLOCK_M, BLOCK_N)
    if (n_end == 0) & (carried > 0):
        return

    q = load_tile(Q, b, h, start_m, T, stride_qb, stride_qt, stride_qh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    do = load_tile(DO, b, h, start_m, T, stride_ob, stride_ot, stride_oh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    row = (b * H + h).to(tl.int64) * (tl.cdiv(T, ROW_PAD) * ROW_PAD) + offs_m
    lse, delta = tl.load(LSE_LOG2 + row), tl.load(DELTA + row)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    hk = h // G
    qk_scale = sm_scale * LOG2E
    dq = dq_tiles(dq, q, do, lse, delta, K, V, b, hk, 0, n_full, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh,
                  stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA, MASK=False)  # fmt: skip
    if CAUSAL or not TMA:
        dq = dq_tiles(dq, q, do, lse, delta, K, V, b, hk, n_full, n_end, row_end, qk_scale, T, stride_kb, stride_kt, stride_kh,
                      stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA, MASK=True)  # fmt: skip
    offs, mask = state_tile(b, h, start_m, T, H, BLOCK_M, BLOCK_D, HEAD_DIM)
    dq = dq * sm_scale + tl.load(ACC + offs, mask=mask & (offs_m < carried)[:, None], other=0.0)
    if final:
        tl.store(DQ + offs, dq.to(DQ.dtype.element_ty), mask=mask)
    else:
        tl.store(ACC + offs, dq, mask=mask)


@triton.jit
def dkv_tiles(dk, dv, k, v, Q, DO, LSE_LOG2, DELTA, b, h, row, lo, hi, row_first, qk_scale, T, stride_qb, stride_qt, stride_qh, stride_ob, stride_ot, stride_oh,
              BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    for start_m in tl.range(lo, hi, BLOCK_M):
        q = load_tile(Q, b, h, start_m, T, stride_qb, stride_qt, stride_qh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
        do = load_tile(DO, b, h, start_m, T, stride_ob, stride_ot, stride_oh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse, delta = tl.load(LSE_LOG2 + row + offs_m), tl.load(DELTA + row + offs_m)
        # scores come out transposed, so that both products below take them as they are
        p = tl.math.exp2(tl.dot(k, q.T, input_precision="ieee") * qk_scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        if MASK:
            p = tl.where(offs_m[None, :] >= row_first[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, D]
        ds = p * (tl.dot(v, do.T, input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, D]
    return dk, dv


@triton.jit(do_not_specialize=["H", "G", "T", "GROUP_B"])
def dkv_kernel(Q, K, V, DO, LSE_LOG2, DELTA, DK, DV, DK_ACC, DV_ACC, HOP, sm_scale, H, G, T, GROUP_B,
               stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
               CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One hop of dk, dv for one tile of keys. DK_ACC, DV_ACC (B, T, HKV, D) float32 hold what earlier ranks collected;
    DK, DV are the same buffers on the way, and the gradients themselves, in their own dtype, at home."""
    n_tiles = tl.cdiv(T, BLOCK_N)
    start_n = tl.program_id(0) % n_tiles * BLOCK_N  # under a causal mask the first keys have the most queries
    bh = tl.program_id(0) // n_tiles
    HKV = H // G
    b, h = bh // HKV, bh % HKV
    offs_n = start_n + tl.arange(0, BLOCK_N)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    carried = tl.load(hop + 8)  # rows of DK_ACC, DV_ACC, from the first on, that hold something
    if CAUSAL:
        m_lo = n_le(hop, position(hop + 3, start_n, T) - 1, T)  # queries before this see nothing of the tile
        m_full = n_le(hop, position(hop + 3, tl.minimum(start_n + BLOCK_N, T) - 1, T) - 1, T)  # from here on, all of it
        row_first = n_le(hop, position(hop + 3, offs_n, T) - 1, T)  # each key is seen by the queries from row_first on
    else:
        m_lo, m_full = 0, 0
        row_first = tl.zeros([BLOCK_N], tl.int32)
    if (m_lo >= T) & (carried > 0):
        return
    m_full = tl.cdiv(m_full, BLOCK_M) * BLOCK_M
    m_lo = tl.where(m_lo < T, m_lo // BLOCK_M * BLOCK_M, T)

    k = load_tile(K, b, h, start_n, T, stride_kb, stride_kt, stride_kh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
    v = load_tile(V, b, h, start_n, T, stride_vb, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = sm_scale * LOG2E
    for g in tl.range(0, G):  # the query heads that share this key head
        hq = h * G + g
        row = (b * H + hq).to(tl.int64) * (tl.cdiv(T, ROW_PAD) * ROW_PAD)
        if CAUSAL:
            dk, dv = dkv_tiles(dk, dv, k, v, Q, DO, LSE_LOG2, DELTA, b, hq, row, m_lo, tl.minimum(m_full, T), row_first, qk_scale, T, stride_qb, stride_qt, stride_qh,
                               stride_ob, stride_ot, stride_oh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA, MASK=True)  # fmt: skip
        dk, dv = dkv_tiles(dk, dv, k, v, Q, DO, LSE_LOG2, DELTA, b, hq, row, m_full, T, row_first, qk_scale, T, stride_qb, stride_qt, stride_qh,
                           stride_ob, stride_ot, stride_oh, BLOCK_M, BLOCK_D, HEAD_DIM, TMA, MASK=False)  # fmt: skip
    offs, mask = state_tile(b, h, start_n, T, HKV, BLOCK_N, BLOCK_D, HEAD_DIM)
    dk = dk * sm_scale + tl.load(DK_ACC + offs, mask=mask & (offs_n < carried)[:, None], other=0.0)
    dv = dv + tl.load(DV_ACC + offs, mask=mask & (offs_n < carried)[:, None], other=0.0)
    tl.store(DK + offs, dk.to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + offs, dv.to(DV.dtype.element_ty), mask=mask)


# -----------------------------------------------------------------------------
# Hopper kernels, in Gluon: arguments, state and results as in fwd_kernel, dq_kernel and dkv_kernel. One warp feeds tiles by TMA into
# a circle of buffers; two or three warpgroups with 64 rows each use them, one's softmax under another's products and under its own last
# ones (FlashAttention-3, arXiv 2407.08608). There is a program per SM, which works through items, tiles of rows that stay; the next one's
# tiles arrive while the last one is stored. x_full says that buffer x holds data, x_empty or consumer_release that its readers are done with it

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in triton 3.9
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
all_here = getattr(gl, "barrier", None) or gl.thread_barrier  # all threads of a warpgroup; renamed in triton 3.8


@gluon.constexpr_function
def product_layout(N):
    """Where a warpgroup holds the [64, N] result of a product."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def operand_layout(N):
    """Where it holds the left operand, in 16 bit, of a product with an [64, N] result."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(N), k_width=2)


@gluon.jit
def barriers(N: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=1)
    return bars


NAMED_BARRIERS = gl.constexpr(8)  # of the 16 barriers that hardware has, the first of ours; the compiler uses some below for itself


@gluon.jit
def consumer_release(buffer, CONSUMERS: gl.constexpr):
    """This warp has read the buffer. Not by an mbarrier: before one arrives at those, Gluon has the whole warpgroup wait for its slowest
    warp, several times a tile. On one H100 that kept the tensor cores 75% busy, in place of 79 (ncu, D128 16k causal)."""
    asm: gl.constexpr = "bar.arrive $1, $2; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r,r,r", [NAMED_BARRIERS + buffer, CONSUMERS * 128 + 32], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def producer_acquire(buffer, CONSUMERS: gl.constexpr):
    """The producer's side: wait until all warps of all consumers have read the buffer."""
    asm: gl.constexpr = "bar.sync $1, $2; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r,r,r", [NAMED_BARRIERS + buffer, CONSUMERS * 128 + 32], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def consumer_release_after(x, buffer, CONSUMERS: gl.constexpr):
    """consumer_release, but not before the rows' x, from 0 to 1, are computed, as if larger ones meant another barrier: else ptxas moves it up,
    and with it the wait for products that comes next, and nothing is left to do under those."""
    asm: gl.constexpr = """{ .reg .f32 x; .reg .pred p; .reg .b32 n; add.f32 x, $2, $3; setp.gt.f32 p, x, 0f40800000; selp.b32 n, 1, 0, p;
        add.s32 n, n, $4; bar.arrive n, $6; mov.b32 $0, $2; mov.b32 $1, $3; }"""
    args: gl.constexpr = "=r,=r,f,f,r,r,r,r"
    gl.inline_asm_elementwise(asm, args, [x, NAMED_BARRIERS + buffer, CONSUMERS * 128 + 32], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def tile_scheduler(n, n_tiles, SECTION, ROUNDS):
    """(tile, head) of this program's n-th item, tile 0 being the longest, and whether there is one. SECTION heads at a time, whose keys
    stay in L2: their longer tiles first, dealt out to the P programs in rounds, every second one backwards, so that sums come out even.
    A section's last round, which need not go all round, starts where that of the section before ended."""
    P = gl.num_programs(0)
    section, rnd = n // ROUNDS, n % ROUNDS
    seat = (gl.program_id(0) + section * (n_tiles * SECTION - (ROUNDS - 1) * P)) % P
    i = rnd * P + gl.where(rnd % 2 == 0, seat, P - 1 - seat)
    exists, i = i < n_tiles * SECTION, gl.minimum(i, n_tiles * SECTION - 1)
    return i // SECTION, section * SECTION + i % SECTION, exists


@gluon.jit
def store_tile(desc, smem, x, b, row, h):
    """x into the tile from (b, row, h) on of a 16-bit (B, T, H, D) tensor, by TMA: what lies outside is left out. Nothing may be on its
    way out of the buffer."""
    smem.reshape(x.shape).store(x.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [b, row, h, 0], smem)


@gluon.jit
def state_offsets(b, h, row, T, H, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile of a contiguous (B, T, H, D) tensor: its first element, and offsets from there, and mask, [ROWS, BLOCK_D]."""
    rows, cols = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    first = ((b.to(gl.int64) * T + row) * H + h) * HEAD_DIM
    return first, (rows * (H * HEAD_DIM))[:, None] + cols[None, :], (row + rows < T)[:, None] & (cols < HEAD_DIM)[None, :]


@gluon.jit
def fwd_work_tile(n, problem, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Batch, head, first query and HopRow of this program's n-th item; how many of its tiles of keys no row masks; how many there are,
    0 if there is no such item."""
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    n_m = gl.cdiv(T, BLOCK_M)
    tile, bh, exists = tile_scheduler(n, n_m, SECTION, ROUNDS)
    start_m = (n_m - 1 - tile) * BLOCK_M  # under a causal mask the last queries see the most keys
    b, h = bh // H, bh % H
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    n_full, n_end = T, T
    if CAUSAL:
        n_full = n_le(hop + 3, position(hop, start_m, T), T)
        n_end = n_le(hop + 3, position(hop, gl.minimum(start_m + BLOCK_M, T) - 1, T), T)
    n_tiles = gl.maximum(gl.cdiv(n_end, BLOCK_N), 1 - gl.minimum(gl.load(hop + 7), 1))  # without a carry there is something to write
    return b, h, start_m, hop, n_full // BLOCK_N, gl.where(exists, n_tiles, 0)


@gluon.jit
def fwd_producer(descs, buffers, problem, CAUSAL: gl.constexpr):
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full = buffers
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    CONSUMERS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    ROWS: gl.constexpr = q_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    item, tile = 0, 0  # used so far: they say which buffer is next, and the phase of its barriers
    for n in range(B * H // SECTION * ROUNDS):
        b, h, start_m, hop, n_full, n_tiles = fwd_work_tile(n, problem, CONSUMERS * ROWS, BLOCK_N, CAUSAL)
        if n_tiles > 0:
            for j in range(n_tiles):
                s = tile % STAGES
                start_n = (n_tiles - 1 - j) * BLOCK_N  # from the diagonal down: the masked tiles come first
                if tile >= STAGES:
                    producer_acquire(s, CONSUMERS)
                mbarrier.expect(k_full.index(s), k_desc.block_type.nbytes)
                tma_load(k_desc, [b, start_n, h // G, 0], k_full.index(s), k_smem.index(s))
                if j == 0:
                    for c in gl.static_range(CONSUMERS):
                        mbarrier.wait(q_empty.index(c), item & 1 ^ 1)
                        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                        tma_load(q_desc, [b, start_m + c * ROWS, h, 0], q_full.index(c), q_smem.index(c))
                if tile >= STAGES:
                    producer_acquire(STAGES + s, CONSUMERS)
                mbarrier.expect(v_full.index(s), v_desc.block_type.nbytes)
                tma_load(v_desc, [b, start_n, h // G, 0], v_full.index(s), v_smem.index(s))
                tile += 1
            item += 1


@gluon.jit
def online_softmax_max(s, m_i, qk_scale, offs_n, row_end, masked):
    """A tile of scores, masked; the rows' new maximum; what p = exp2(s - shift) takes off; what that does to their sum and output so far."""
    if masked:
        s = gl.where(offs_n[None, :] < row_end[:, None], s, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * qk_scale)
    shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen no key yet: p = exp2(-inf - 0) = 0, not nan
    return s, m_new, shift, gl.exp2(m_i - shift)


@gluon.jit
def fwd_consumer(c: gl.constexpr, state, buffers, problem, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr):
    o_desc, o_smem, ACC, LSE, sm_scale = state
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full = buffers
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    CONSUMERS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    ROWS: gl.constexpr = q_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    BLOCK_D: gl.constexpr = k_smem.shape[4]
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(BLOCK_D)
    p_layout: gl.constexpr = operand_layout(BLOCK_D)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_smem.index(c).reshape([ROWS, BLOCK_D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    qk_scale = sm_scale * LOG2E
    item, tile = 0, 0
    for n in range(B * H // SECTION * ROUNDS):
        b, h, start_m, hop, n_full, n_tiles = fwd_work_tile(n, problem, CONSUMERS * ROWS, BLOCK_N, CAUSAL)
        if n_tiles > 0:
            offs_m = start_m + c * ROWS + gl.arange(0, ROWS, layout=row_s)
            m_i = gl.full([ROWS], -float("inf"), gl.float32, row_s)
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            start_n = (n_tiles - 1) * BLOCK_N
            s = tile % STAGES
            mbarrier.wait(q_full.index(c), item & 1)
            mbarrier.wait(k_full.index(s), tile // STAGES & 1)
            s_async = warpgroup_mma(q, k_smem.index(s).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)), zero, use_acc=False, is_async=True)
            if CAUSAL:
                row_end = n_le(hop + 3, position(hop, offs_m, T), T)  # each row sees the keys [0, row_end)
            else:
                row_end = gl.full([ROWS], T, gl.int32, row_s)
            scores = warpgroup_mma_wait(0, (s_async,))  # [BLOCK_M, BLOCK_N]
            consumer_release(s, CONSUMERS)
            scores, m_i, shift, alpha = online_softmax_max(scores, m_i, qk_scale, start_n + offs_n, row_end, True)
            p = gl.exp2(scores * qk_scale - shift[:, None])
            l_i = gl.sum(p, 1)
            p = gl.convert_layout(p.to(k_smem.dtype), p_layout)
            for j in range(1, n_tiles):
                s, last = (tile + j) % STAGES, (tile + j - 1) % STAGES
                mbarrier.wait(k_full.index(s), (tile + j) // STAGES & 1)
                s_async = warpgroup_mma(q, k_smem.index(s).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(last), (tile + j - 1) // STAGES & 1)
                acc_async = warpgroup_mma(p, v_smem.index(last).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
                scores = warpgroup_mma_wait(1, (s_async,))
                scores, m_i, shift, alpha = online_softmax_max(scores, m_i, qk_scale, start_n - j * BLOCK_N + offs_n, row_end, j < n_tiles - n_full)
                consumer_release_after(alpha, s, CONSUMERS)
                acc = warpgroup_mma_wait(0, (acc_async,))  # p is in registers: they may not be written before
                consumer_release(STAGES + last, CONSUMERS)
                p_new = gl.exp2(scores * qk_scale - shift[:, None])
                l_i = l_i * alpha + gl.sum(p_new, 1)
                p = gl.convert_layout(p_new.to(k_smem.dtype), p_layout)
                acc = acc * gl.convert_layout(alpha, row_o)[:, None]
            tile += n_tiles
            item += 1
            mbarrier.arrive(q_empty.index(c), count=1)
            s = (tile - 1) % STAGES
            mbarrier.wait(v_full.index(s), (tile - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_smem.index(s).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            consumer_release(STAGES + s, CONSUMERS)

            first, offs, mask = state_offsets(b, h, start_m + c * ROWS, T, H, ROWS, BLOCK_D, HEAD_DIM, o_layout)
            lse_rows = LSE + (b * H + h).to(gl.int64) * T + offs_m
            l_i = gl.where(l_i == 0.0, 1.0, l_i)  # a row that saw no key: acc = 0, lse = -inf
            lse = m_i + gl.log2(l_i)
            weight = 1.0 / l_i
            if gl.load(hop + 7) > 0:  # the state of earlier hops joins here and not at the start, where it would delay the first tile
                old = gl.load(lse_rows, mask=offs_m < T, other=-float("inf")) * LOG2E
                top = gl.maximum(old, lse)
                shift = gl.where(top == -float("inf"), 0.0, top)
                top = shift + gl.log2(gl.exp2(old - shift) + gl.exp2(lse - shift))
                shift = gl.where(top == -float("inf"), 0.0, top)
                acc = acc * gl.convert_layout(weight * gl.exp2(lse - shift), row_o)[:, None]
                acc += gl.load(ACC + first + offs, mask=mask, other=0.0) * gl.convert_layout(gl.exp2(old - shift), row_o)[:, None]
                lse = top
            else:
                acc = acc * gl.convert_layout(weight, row_o)[:, None]
            gl.store(lse_rows, lse / LOG2E, mask=offs_m < T)
            if position(hop, gl.minimum(start_m + CONSUMERS * ROWS, T) - 1, T) < gl.load(hop + 6):
                tma.store_wait(0)
                all_here()
                store_tile(o_desc, o_smem.index(c), acc, b, start_m + c * ROWS, h)
            else:
                gl.store(ACC + first + offs, acc, mask=mask)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "G", "T", "GROUP_B", "SECTION", "ROUNDS"])
def hopper_fwd_kernel(q_desc, k_desc, v_desc, o_desc, ACC, LSE, HOP, sm_scale, B, H, G, T, GROUP_B, SECTION, ROUNDS,
                      HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    buffers = (q_smem, k_smem, v_smem, barriers(CONSUMERS), barriers(CONSUMERS), barriers(STAGES), barriers(STAGES))
    problem = (HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS] + o_desc.block_type.shape, o_desc.layout)
    descs, state = (q_desc, k_desc, v_desc), (o_desc, o_smem, ACC, LSE, sm_scale)
    if CONSUMERS == 2:  # registers: 240 for a consumer's thread, 24 for the producer's
        gl.warp_specialize([
            (fwd_consumer, (0, state, buffers, problem, HEAD_DIM, CAUSAL)),
            (fwd_consumer, (1, state, buffers, problem, HEAD_DIM, CAUSAL)),
            (fwd_producer, (descs, buffers, problem, CAUSAL)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (fwd_consumer, (0, state, buffers, problem, HEAD_DIM, CAUSAL)),
            (fwd_consumer, (1, state, buffers, problem, HEAD_DIM, CAUSAL)),
            (fwd_consumer, (2, state, buffers, problem, HEAD_DIM, CAUSAL)),
            (fwd_producer, (descs, buffers, problem, CAUSAL)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


# The backward is one kernel. dq: a tile of q and do stays (a, a2), tiles of k and v stream by (b, b2). dk, dv: the other way round.
# s = a b^T, dp = a2 b2^T, ds = p * (dp - delta), acc += ds b; and for dv, acc2 += p b2


@gluon.jit
def bwd_work_tile(n, problem, BLOCK_A: gl.constexpr, BLOCK_B: gl.constexpr, DKV: gl.constexpr, CAUSAL: gl.constexpr):
    """Batch, head, first row and HopRow of this program's n-th item; the first tile that streams by, the masked ones coming first; how
    many are masked; how many there are; whether there is anything to do."""
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    n_a = gl.cdiv(T, BLOCK_A)
    heads = H // G if DKV else H
    tile, bh, exists = tile_scheduler(n, n_a, SECTION, ROUNDS)
    start = (tile if DKV else n_a - 1 - tile) * BLOCK_A  # under a causal mask the first keys, and the last queries, have the most to do
    b, h = bh // heads, bh % heads
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    end = gl.minimum(start + BLOCK_A, T) - 1
    if DKV:
        lo, full = 0, 0
        if CAUSAL:
            lo = n_le(hop, position(hop + 3, start, T) - 1, T)  # queries before this see none of the keys
            full = n_le(hop, position(hop + 3, end, T) - 1, T)  # from here on, all of them
        first = lo // BLOCK_B
        n_tiles = gl.where(lo < T, gl.cdiv(T, BLOCK_B) - first, 0)
        n_masked = gl.minimum(gl.cdiv(full, BLOCK_B) - first, n_tiles)
    else:
        full, hi = T, T
        if CAUSAL:
            full = n_le(hop + 3, position(hop, start, T), T)
            hi = n_le(hop + 3, position(hop, end, T), T)
        n_tiles = gl.cdiv(hi, BLOCK_B)
        first = n_tiles - 1
        n_masked = n_tiles - full // BLOCK_B
    active = exists & ((n_tiles > 0) | (gl.load(hop + 7 + DKV) == 0))  # without a carry there is something to write
    return b, h, start, hop, first, n_masked, n_tiles, active


@gluon.jit
def bwd_producer(descs, buffers, problem, DKV: gl.constexpr, CAUSAL: gl.constexpr):
    a_desc, a2_desc, b_desc, b2_desc, rows_desc = descs
    a_smem, a2_smem, b_smem, b2_smem, rows_smem, a_full, a_empty, b_full, b2_full = buffers
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    CONSUMERS: gl.constexpr = a_smem.shape[0]
    STAGES: gl.constexpr = b_smem.shape[0]
    ROWS: gl.constexpr = a_smem.shape[2]
    BLOCK_B: gl.constexpr = b_smem.shape[2]
    item, tile = 0, 0
    for n in range(B * (H // G if DKV else H) // SECTION * ROUNDS):
        b, h, start, hop, first, n_masked, n_tiles, active = bwd_work_tile(n, problem, CONSUMERS * ROWS, BLOCK_B, DKV, CAUSAL)
        if active:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(a_empty.index(c), item & 1 ^ 1)
                mbarrier.expect(a_full.index(c), 2 * a_desc.block_type.nbytes)
                tma_load(a_desc, [b, start + c * ROWS, h, 0], a_full.index(c), a_smem.index(c))
                tma_load(a2_desc, [b, start + c * ROWS, h, 0], a_full.index(c), a2_smem.index(c))
            for g in range(G if DKV else 1):  # the query heads that share this key head
                h_b = h * G + g if DKV else h // G
                for j in range(n_tiles):
                    s = tile % STAGES
                    row = (first + j if DKV else first - j) * BLOCK_B
                    if tile >= STAGES:
                        producer_acquire(s, CONSUMERS)
                    if DKV:
                        mbarrier.expect(b_full.index(s), b_desc.block_type.nbytes + rows_desc.block_type.nbytes)
                        tma_load(rows_desc, [0, b * H + h_b, row], b_full.index(s), rows_smem.index(s))
                    else:
                        mbarrier.expect(b_full.index(s), b_desc.block_type.nbytes)
                    tma_load(b_desc, [b, row, h_b, 0], b_full.index(s), b_smem.index(s))
                    mbarrier.expect(b2_full.index(s), b2_desc.block_type.nbytes)
                    tma_load(b2_desc, [b, row, h_b, 0], b2_full.index(s), b2_smem.index(s))
                    tile += 1
            item += 1


@gluon.jit
def bwd_tiles(acc, acc2, ds, a, a2, lse, delta, buffers, start, lo, full, hi, offset, edge, qk_scale,
              MASKED: gl.constexpr, DKV: gl.constexpr, LATE: gl.constexpr):  # fmt: skip
    """Tiles lo to hi of those that stream by, the first one of the item being `start`; if MASKED, those before `full` are. LATE: acc
    gets its product with ds only when the next tile's products start, so that the tensor cores have it to do while this warpgroup
    computes p; ds then is the one of the tile before, 0 at first, and the last one is left to the caller."""
    a_smem, a2_smem, b_smem, b2_smem, rows_smem, a_full, a_empty, b_full, b2_full = buffers
    CONSUMERS: gl.constexpr = a_smem.shape[0]
    STAGES: gl.constexpr = b_smem.shape[0]
    ROWS: gl.constexpr = a_smem.shape[2]
    BLOCK_B: gl.constexpr = b_smem.shape[2]
    BLOCK_D: gl.constexpr = b_smem.shape[4]
    s_layout: gl.constexpr = product_layout(BLOCK_B)
    ds_layout: gl.constexpr = operand_layout(BLOCK_D)
    zero = gl.zeros([ROWS, BLOCK_B], gl.float32, s_layout)
    for tile in range(lo, hi):
        s, phase, last = tile % STAGES, tile // STAGES & 1, gl.maximum(tile - 1, start) % STAGES
        b, b2 = b_smem.index(s).reshape([BLOCK_B, BLOCK_D]), b2_smem.index(s).reshape([BLOCK_B, BLOCK_D])
        b_last = b_smem.index(last).reshape([BLOCK_B, BLOCK_D])
        mbarrier.wait(b_full.index(s), phase)
        if LATE and not DKV:
            acc_async = warpgroup_mma(ds, b_last, acc, is_async=True)
        s_async = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(b2_full.index(s), phase)
        dp_async = warpgroup_mma(a2, b2.permute((1, 0)), zero, use_acc=False, is_async=True)
        if LATE and DKV:  # before s for dq, behind dp for dk: as measured, the other ways are 3 to 10% slower
            acc_async = warpgroup_mma(ds, b_last, acc, is_async=True)
        if LATE and not DKV:
            scores, acc = warpgroup_mma_wait(1, (s_async, acc_async))  # [BLOCK_A, BLOCK_B]
            if tile > start:
                consumer_release(last, CONSUMERS)
        else:
            scores = warpgroup_mma_wait(2 if LATE else 1, (s_async,))
        if DKV:
            lse_t = rows_smem.index(s).reshape([2, BLOCK_B]).slice(0, 1).load(s_layout)  # [1, BLOCK_B]
        else:
            lse_t = lse[:, None]  # [BLOCK_A, 1]
        p = gl.exp2(scores * qk_scale - lse_t)
        if MASKED:
            if tile < full:
                offs_b = (offset + tile * BLOCK_B if DKV else offset - tile * BLOCK_B) + gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, s_layout))
                visible = offs_b[None, :] >= edge[:, None] if DKV else offs_b[None, :] < edge[:, None]
                p = gl.where(visible, p, 0.0)
        if LATE and DKV:
            dp, acc = warpgroup_mma_wait(0, (dp_async, acc_async))
            if tile > start:
                consumer_release(last, CONSUMERS)
        if DKV:
            acc2_async = warpgroup_mma(gl.convert_layout(p.to(b_smem.dtype), ds_layout), b2, acc2, is_async=True)
            if not LATE:
                dp = warpgroup_mma_wait(1, (dp_async,))
            delta_t = rows_smem.index(s).reshape([2, BLOCK_B]).slice(1, 1).load(s_layout)
        else:
            dp = warpgroup_mma_wait(0, (dp_async,))
            delta_t = delta[:, None]
        ds = gl.convert_layout((p * (dp - delta_t)).to(b_smem.dtype), ds_layout)
        if not LATE:
            acc_async = warpgroup_mma(ds, b, acc, is_async=True)
            if DKV:
                acc, acc2 = warpgroup_mma_wait(0, (acc_async, acc2_async))
            else:
                acc = warpgroup_mma_wait(0, (acc_async,))
            consumer_release(s, CONSUMERS)
        elif DKV:
            acc2 = warpgroup_mma_wait(0, (acc2_async,))
    return acc, acc2, ds


@gluon.jit
def bwd_consumer(c: gl.constexpr, state, buffers, problem, HEAD_DIM: gl.constexpr, DKV: gl.constexpr, CAUSAL: gl.constexpr):
    LSE_LOG2, out_desc, out2_desc, out_smem, out2_smem, ACC, ACC2, sm_scale = state
    a_smem, a2_smem, b_smem, b2_smem, rows_smem, a_full, a_empty, b_full, b2_full = buffers
    HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS = problem
    CONSUMERS: gl.constexpr = a_smem.shape[0]
    STAGES: gl.constexpr = b_smem.shape[0]
    ROWS: gl.constexpr = a_smem.shape[2]
    BLOCK_B: gl.constexpr = b_smem.shape[2]
    BLOCK_D: gl.constexpr = b_smem.shape[4]
    LATE: gl.constexpr = BLOCK_D > 64  # three warpgroups, or tiles of twice the length, keep the tensor cores as busy
    s_layout: gl.constexpr = product_layout(BLOCK_B)
    o_layout: gl.constexpr = product_layout(BLOCK_D)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    a, a2 = a_smem.index(c).reshape([ROWS, BLOCK_D]), a2_smem.index(c).reshape([ROWS, BLOCK_D])
    qk_scale = sm_scale * LOG2E
    heads = H // G if DKV else H
    item, tile = 0, 0
    for n in range(B * heads // SECTION * ROUNDS):
        b, h, start, hop, first, n_masked, n_tiles, active = bwd_work_tile(n, problem, CONSUMERS * ROWS, BLOCK_B, DKV, CAUSAL)
        if active:
            offs_a = start + c * ROWS + gl.arange(0, ROWS, layout=row_s)
            lse, delta, edge = offs_a, offs_a, offs_a  # unused where not set below
            if DKV:  # lse and delta stream by; a key is seen by the queries from edge on
                if CAUSAL:
                    edge = n_le(hop, position(hop + 3, offs_a, T) - 1, T)
            else:  # a query sees the keys before edge
                T_pad = gl.cdiv(T, ROW_PAD) * ROW_PAD  # all of lse2, then all of delta
                row = (b * H + h).to(gl.int64) * T_pad + offs_a
                lse = gl.load(LSE_LOG2 + row, mask=offs_a < T, other=float("inf"))
                delta = gl.load(LSE_LOG2 + B.to(gl.int64) * H * T_pad + row, mask=offs_a < T, other=0.0)
                if CAUSAL:
                    edge = n_le(hop + 3, position(hop, offs_a, T), T)
                else:
                    edge = gl.full([ROWS], T, gl.int32, row_s)
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            acc2 = acc
            mbarrier.wait(a_full.index(c), item & 1)
            ds, begin = gl.zeros([ROWS, BLOCK_B], b_smem.dtype, operand_layout(BLOCK_D)), tile
            for g in range(G if DKV else 1):
                full, hi = tile + n_masked, tile + n_tiles
                if DKV:  # two loops: a branch in one would cost registers
                    offset = (first - tile) * BLOCK_B
                    if CAUSAL:
                        acc, acc2, ds = bwd_tiles(acc, acc2, ds, a, a2, lse, delta, buffers, begin, tile, full, full, offset, edge, qk_scale, True, DKV, LATE)
                        tile = full
                    acc, acc2, ds = bwd_tiles(acc, acc2, ds, a, a2, lse, delta, buffers, begin, tile, full, hi, offset, edge, qk_scale, False, DKV, LATE)
                else:
                    offset = (first + tile) * BLOCK_B
                    acc, acc2, ds = bwd_tiles(acc, acc2, ds, a, a2, lse, delta, buffers, begin, tile, full, hi, offset, edge, qk_scale, True, DKV, LATE)
                tile = hi
            if LATE:
                if n_tiles > 0:
                    last = (tile - 1) % STAGES
                    acc = warpgroup_mma(ds, b_smem.index(last).reshape([BLOCK_B, BLOCK_D]), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, (acc,))
                    consumer_release(last, CONSUMERS)
            item += 1
            mbarrier.arrive(a_empty.index(c), count=1)

            origin, offs, mask = state_offsets(b, h, start + c * ROWS, T, heads, ROWS, BLOCK_D, HEAD_DIM, o_layout)
            acc = acc * sm_scale
            carried = gl.load(hop + 7 + DKV)  # rows of ACC, from the first on, that hold the result of earlier hops
            if carried > start + c * ROWS:
                held = mask & (start + c * ROWS + gl.arange(0, ROWS, layout=row_o) < carried)[:, None]
                acc += gl.load(ACC + origin + offs, mask=held, other=0.0)
                if DKV:
                    acc2 += gl.load(ACC2 + origin + offs, mask=held, other=0.0)
            if DKV:
                done: gl.constexpr = out_desc.dtype == a_smem.dtype  # gradients that travel on are in float32
            else:
                done = position(hop, gl.minimum(start + CONSUMERS * ROWS, T) - 1, T) < gl.load(hop + 6)
            if done:
                tma.store_wait(0)
                all_here()
                store_tile(out_desc, out_smem.index(c), acc, b, start + c * ROWS, h)
                if DKV:
                    store_tile(out2_desc, out2_smem.index(c), acc2, b, start + c * ROWS, h)
            else:
                gl.store(ACC + origin + offs, acc, mask=mask)
                if DKV:
                    gl.store(ACC2 + origin + offs, acc2, mask=mask)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["B", "H", "G", "T", "GROUP_B", "SECTION", "ROUNDS"])
def hopper_bwd_kernel(a_desc, a2_desc, b_desc, b2_desc, rows_desc, out_desc, out2_desc, LSE_LOG2, ACC, ACC2, HOP, sm_scale,
                      B, H, G, T, GROUP_B, SECTION, ROUNDS,
                      DKV: gl.constexpr, HEAD_DIM: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [CONSUMERS] + a_desc.block_type.shape, a_desc.layout)
    a2_smem = gl.allocate_shared_memory(a_desc.dtype, [CONSUMERS] + a_desc.block_type.shape, a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)
    b2_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)
    rows_smem = a_smem  # of no use for dq
    if DKV:
        rows_smem = gl.allocate_shared_memory(gl.float32, [STAGES] + rows_desc.block_type.shape, rows_desc.layout)
    buffers = (a_smem, a2_smem, b_smem, b2_smem, rows_smem, barriers(CONSUMERS), barriers(CONSUMERS), barriers(STAGES), barriers(STAGES))
    problem = (HOP, B, H, G, T, GROUP_B, SECTION, ROUNDS)
    out_smem, out2_smem = a_smem, a2_smem  # never written: gradients that travel on are in float32 and stored from registers
    if out_desc.dtype == a_desc.dtype:
        out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS] + out_desc.block_type.shape, out_desc.layout)
        if DKV:
            out2_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS] + out_desc.block_type.shape, out_desc.layout)
    descs, state = (a_desc, a2_desc, b_desc, b2_desc, rows_desc), (LSE_LOG2, out_desc, out2_desc, out_smem, out2_smem, ACC, ACC2, sm_scale)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (bwd_consumer, (0, state, buffers, problem, HEAD_DIM, DKV, CAUSAL)),
            (bwd_consumer, (1, state, buffers, problem, HEAD_DIM, DKV, CAUSAL)),
            (bwd_producer, (descs, buffers, problem, DKV, CAUSAL)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (bwd_consumer, (0, state, buffers, problem, HEAD_DIM, DKV, CAUSAL)),
            (bwd_consumer, (1, state, buffers, problem, HEAD_DIM, DKV, CAUSAL)),
            (bwd_consumer, (2, state, buffers, problem, HEAD_DIM, DKV, CAUSAL)),
            (bwd_producer, (descs, buffers, problem, DKV, CAUSAL)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


# -----------------------------------------------------------------------------
# launchers: one hop on real tensors. triton_* run the portable kernels, hopper_* those in Gluon, torch_* the reference; all take
# the same arguments

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # the portable kernels then run on CPU tensors, in numpy


@functools.lru_cache(maxsize=None)
def capability(device):
    return torch.cuda.get_device_capability(device)


COMPILED = {}  # what `launch` has compiled


def launch(kernel, device, depends, grid, args, constants, **options):
    """kernel[grid](*args, **constants, **options) without Triton's search for the compiled kernel, which takes the host longer than
    a small problem takes the GPU. depends: whatever else the compiled code depends on (dtypes, tile shapes, alignment)."""
    key = id(kernel), device, depends, *constants.values()
    if INTERPRET:
        kernel[(grid,)](*args, **constants)
    elif key in COMPILED:  # as torch.compile calls it: Triton's own way there looks for the device and for hooks
        run, function, metadata = COMPILED[key]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        run(grid, 1, 1, stream, function, metadata, None, None, None, *args, *constants.values())
    else:
        compiled = kernel[(grid,)](*args, **constants, **options)
        COMPILED[key] = compiled.run, compiled.function, compiled.packed_metadata


# BLOCK_M (queries), BLOCK_N (keys), num_warps, num_stages by padded head dim. 64 and 128 were measured on one H100 for 16-bit
# inputs; 256 and float32, whose products run in full precision and not on the tensor cores, were chosen to spill little
TILES = {
    "fwd": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)},
    "dq": {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "dkv": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 64, 8, 2)},
}
TILES_FP32 = {
    "fwd": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "dkv": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}


@functools.lru_cache(maxsize=None)
def tile_config(kernel, D, dtype, device):
    """Tile sizes and launch options of a kernel, as keyword arguments; fewer pipeline stages where shared memory is small."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    table = TILES_FP32 if dtype == torch.float32 else TILES
    BLOCK_M, BLOCK_N, num_warps, num_stages = (32, 32, 4, 1) if INTERPRET else table[kernel][max(64, BLOCK_D)]
    if not INTERPRET:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        resident, streamed = (2 * BLOCK_N, BLOCK_M) if kernel == "dkv" else (2 * BLOCK_M, BLOCK_N)  # rows kept, rows per stage
        while num_stages > 1 and (resident + 2 * num_stages * streamed) * BLOCK_D * dtype.itemsize > shared:
            num_stages -= 1
    return dict(HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages)


def has_tma(device):
    return INTERPRET or capability(device)[0] >= 9


def tma_ok(x):
    """Can TMA read x (B, T, heads, D) as a matrix of B*T rows? 16-byte steps, and heads side by side within a row."""
    B, T, heads, D = x.shape
    stride_b, stride_t, stride_h, stride_d = x.stride()
    steps = [stride_t] + [stride_h] * (heads > 1) + [stride_b] * (B > 1)
    return (
        stride_d == 1
        and x.dtype.itemsize == 2
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * 2 % 16 == 0 for s in steps)
        and stride_t >= (heads - 1) * stride_h + D
        and (B == 1 or stride_b % stride_t == 0)
    )


def tile_inputs(config, rows_m, rows_n):
    """rows_m: (q,) or (q, do), read in tiles of BLOCK_M rows; rows_n: (k, v), in tiles of BLOCK_N. As TMA descriptors,
    where Hopper can and no tile overhangs a sequence or a head, else as pointers; and the constexpr TMA that says which."""
    BLOCK_M, BLOCK_N, BLOCK_D = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"]
    B, T, _, D = rows_m[0].shape
    tma = has_tma(rows_m[0].device) and D == BLOCK_D and T % max(BLOCK_M, BLOCK_N) == 0 and all(map(tma_ok, (*rows_m, *rows_n)))
    if not tma:
        return *rows_m, *rows_n, False
    matrix = lambda x, rows: TensorDescriptor(
        x, [(B - 1) * (x.stride(0) // x.stride(1)) + T, (x.shape[2] - 1) * x.stride(2) + D], [x.stride(1), 1], [rows, D]
    )
    return *(matrix(x, BLOCK_M) for x in rows_m), *(matrix(x, BLOCK_N) for x in rows_n), True


def triton_fwd(q, k, v, o, acc, lse, hop, causal, sm_scale):
    B, T, H, D = q.shape
    config = tile_config("fwd", D, q.dtype, q.device)
    *tiles, tma = tile_inputs(config, (q,), (k, v))
    fwd_kernel[(triton.cdiv(T, config["BLOCK_M"]) * B * H,)](
        *tiles, o, acc, lse, hop_table(hop.table, q.device), sm_scale, H, H // k.shape[2], T, B // len(hop.table),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], CAUSAL=causal, TMA=tma, **config,
    )  # fmt: skip


def triton_preprocess(o, do, lse, dlse):
    """What the backward needs to know of each query row, lse2 and delta; of no use but to the dq and dkv kernels."""
    B, T, H, D = o.shape
    n_rows = -(-T // ROW_PAD.value) * ROW_PAD.value
    rows = torch.empty(2, B * H, n_rows, dtype=torch.float32, device=o.device)
    BLOCK_D = max(16, 1 << (D - 1).bit_length())
    depends = o.dtype, dlse is None, *(x is not None and x.data_ptr() % 16 == 0 for x in (o, do, lse, dlse))
    constants = dict(HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=32)
    launch(bwd_preprocess_kernel, o.device, depends, n_rows // 32 * B * H, (o, do, lse, dlse, rows, B, H, T), constants, num_warps=4)
    return rows


def triton_dq(q, k, v, do, rows, dq, acc, hop, causal, sm_scale):
    B, T, H, D = q.shape
    config = tile_config("dq", D, q.dtype, q.device)
    tq, tdo, tk, tv, tma = tile_inputs(config, (q, do), (k, v))
    dq_kernel[(triton.cdiv(T, config["BLOCK_M"]) * B * H,)](
        tq, tk, tv, tdo, *rows, dq, acc, hop_table(hop.table, q.device), sm_scale, H, H // k.shape[2], T, B // len(hop.table),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], CAUSAL=causal, TMA=tma, **config,
    )  # fmt: skip


def triton_dkv(q, k, v, do, rows, dk, dv, dk_acc, dv_acc, hop, causal, sm_scale):
    B, T, H, D = q.shape
    config = tile_config("dkv", D, q.dtype, q.device)
    tq, tdo, tk, tv, tma = tile_inputs(config, (q, do), (k, v))
    dkv_kernel[(triton.cdiv(T, config["BLOCK_N"]) * B * k.shape[2],)](
        tq, tk, tv, tdo, *rows, dk, dv, dk_acc, dv_acc, hop_table(hop.table, q.device), sm_scale, H, H // k.shape[2], T, B // len(hop.table),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], CAUSAL=causal, TMA=tma, **config,
    )  # fmt: skip


# warpgroups of 64 rows that stay, rows of a tile that streams by, stages, by padded head dim, as measured on one H100. Other head
# dims run in portable Triton
HOPPER_TILES = {
    "fwd": {64: (3, 128, 2), 128: (2, 128, 2)},
    "dq": {64: (3, 64, 3), 128: (2, 64, 4)},
    "dkv": {64: (2, 128, 2), 128: (2, 64, 3)},
}


L2_BYTES = 32 << 20  # of the 50 MB of an H100, where 32 and 64 were the best of 8 to 512


def hopper_takes(D, dtype):
    """Are there Hopper kernels for this head dim and dtype? TMA wants rows of whole 16 bytes."""
    return D <= max(HOPPER_TILES["fwd"]) and D % 8 == 0 and dtype in (torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=4096)
def tma_fields(shape, strides, block, dtype):
    """The fields of what `tma_descriptor` returns, but for the tensor; None where TMA cannot read such a tensor."""
    if strides[-1] != 1 or any(n > 1 and (s <= 0 or s * dtype.itemsize % 16) for s, n in zip(strides[:-1], shape)):
        return None
    layout = gl.NVMMASharedLayout.get_default_for(list(block), {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype])
    strides = [s if n > 1 else 16 for s, n in zip(strides[:-1], shape)]  # a dimension of 1 may have any
    return vars(GluonDescriptor(torch.empty(0, dtype=dtype), list(shape), [*strides, 1], list(block), layout))


def tma_descriptor(x, block):
    """x for TMA, in tiles of shape `block`; what lies outside x reads as 0. Of a copy of x where TMA cannot read x itself; results are
    never copied, as they are contiguous and aligned, and D is what `hopper_takes`. None for None."""
    if x is None:
        return None
    known = tma_fields(x.shape, x.stride(), block, x.dtype)
    if known is None or x.data_ptr() % 16:
        x = x.contiguous() if known is None else x.clone()
        known = tma_fields(x.shape, x.stride(), block, x.dtype)
    made = object.__new__(GluonDescriptor)  # its own checks take longer than a launch
    made.__dict__ = {**known, "base": x}
    return made


@functools.lru_cache(maxsize=1024)
def hopper_config(kernel, shape, HKV, device, table, causal):
    """Of a launch: the shapes of tiles that stay and of those that stream by, the integers that describe the problem, grid, constants, options."""
    B, T, H, D = shape
    BLOCK_D = max(64, triton.next_power_of_2(D))
    consumers, streamed, stages = HOPPER_TILES[kernel][BLOCK_D]
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count
    shared = 1 if kernel == "dkv" else H // HKV  # heads that read the same
    n_tiles, n_heads = triton.cdiv(T, 64 * consumers), B * HKV * shared
    # heads at a time: as many as L2 holds of what streams by, two rounds of items at least, and all sections alike
    section = max(L2_BYTES // (4 * T * BLOCK_D), triton.cdiv(2 * n_sm, n_tiles * shared))
    section = shared * next(n for n in range(1, B * HKV + 1) if B * HKV % n == 0 and n >= min(section, B * HKV))
    grid = min(n_tiles * n_heads, n_sm)
    problem = B, H, H // HKV, T, B // len(table), section, triton.cdiv(n_tiles * section, grid)
    constants = dict(HEAD_DIM=D, CAUSAL=causal, CONSUMERS=consumers, STAGES=stages)
    if kernel != "fwd":
        constants = dict(DKV=kernel == "dkv", **constants)
    options = dict(num_warps=4, maxnreg={2: 168, 3: 128}[consumers])
    return (1, 64, 1, BLOCK_D), (1, streamed, 1, BLOCK_D), problem, grid, constants, options


def hopper_fwd(q, k, v, o, acc, lse, hop, causal, sm_scale):
    stay, stream, problem, grid, constants, options = hopper_config("fwd", q.shape, k.shape[2], q.device, hop.table, causal)
    args = (
        tma_descriptor(q, stay), tma_descriptor(k, stream), tma_descriptor(v, stream), tma_descriptor(o, stay), acc, lse, hop_table(hop.table, q.device), sm_scale, *problem,
    )  # fmt: skip
    launch(hopper_fwd_kernel, q.device, (q.dtype, stream), grid, args, constants, **options)


def hopper_bwd(kernel, a, a2, b, b2, rows, streamed_rows, out, out2, acc, acc2, q, k, hop, causal, sm_scale):
    stay, stream, problem, grid, constants, options = hopper_config(kernel, q.shape, k.shape[2], q.device, hop.table, causal)
    args = (
        tma_descriptor(a, stay), tma_descriptor(a2, stay), tma_descriptor(b, stream), tma_descriptor(b2, stream), tma_descriptor(streamed_rows, (2, 1, stream[1])),
        tma_descriptor(out, stay), tma_descriptor(out2, stay), rows, acc, acc2, hop_table(hop.table, q.device), sm_scale, *problem,
    )  # fmt: skip
    launch(hopper_bwd_kernel, q.device, (q.dtype, out.dtype, acc.dtype, stream), grid, args, constants, **options)


def hopper_dq(q, k, v, do, rows, dq, acc, hop, causal, sm_scale):
    hopper_bwd("dq", q, do, k, v, rows, None, dq, None, acc, None, q, k, hop, causal, sm_scale)


def hopper_dkv(q, k, v, do, rows, dk, dv, dk_acc, dv_acc, hop, causal, sm_scale):
    hopper_bwd("dkv", k, v, q, do, rows, rows, dk, dv, dk_acc, dv_acc, q, k, hop, causal, sm_scale)


def torch_blocks(hop, B, T, causal, device, rows=512):
    """Blocks of queries and the prefix of keys that they see: (batch slice, query slice, key slice, q_pos, k_pos)."""
    for row, b in zip(hop.table, batch_slices(B, len(hop.table))):
        q_pos, k_pos = layout_positions(Layout(*row[:3]), T, device), layout_positions(Layout(*row[3:6]), T, device)
        for m in (slice(i, min(i + rows, T)) for i in range(0, T, rows)):
            n_end = int((k_pos <= q_pos[m][-1]).sum()) if causal else T
            if n_end:
                yield b, m, slice(n_end), q_pos[m] if causal else None, k_pos[:n_end]


def torch_fwd(q, k, v, o, acc, lse, hop, causal, sm_scale):
    if not hop.table[0].carry:
        acc.zero_(), lse.fill_(-math.inf)
    for b, m, n, q_pos, k_pos in torch_blocks(hop, *q.shape[:2], causal, q.device):
        acc[b, m], lse[b, :, m] = reference_fwd(q[b, m], k[b, n], v[b, n], acc[b, m], lse[b, :, m], q_pos, k_pos, sm_scale)
    o.copy_(acc)


def torch_preprocess(o, do, lse, dlse):
    delta = einsum(o.to(lse.dtype), do.to(lse.dtype), "b t h d, b t h d -> b h t")
    return lse, delta if dlse is None else delta - dlse


def torch_dq(q, k, v, do, rows, dq, acc, hop, causal, sm_scale):
    lse, delta = rows
    if not hop.table[0].carry:
        acc.zero_()
    for b, m, n, q_pos, k_pos in torch_blocks(hop, *q.shape[:2], causal, q.device):
        acc[b, m] += reference_bwd(q[b, m], k[b, n], v[b, n], do[b, m], lse[b, :, m], delta[b, :, m], q_pos, k_pos, sm_scale)[0]
    dq.copy_(acc)


def torch_dkv(q, k, v, do, rows, dk, dv, dk_acc, dv_acc, hop, causal, sm_scale):
    lse, delta = rows
    for row, b in zip(hop.table, batch_slices(len(q), len(hop.table))):
        dk_acc[b, row.carry_grad :].zero_(), dv_acc[b, row.carry_grad :].zero_()
    for b, m, n, q_pos, k_pos in torch_blocks(hop, *q.shape[:2], causal, q.device):
        _, dk_hop, dv_hop = reference_bwd(q[b, m], k[b, n], v[b, n], do[b, m], lse[b, :, m], delta[b, :, m], q_pos, k_pos, sm_scale)
        dk_acc[b, n] += dk_hop
        dv_acc[b, n] += dv_hop
    dk.copy_(dk_acc), dv.copy_(dv_acc)


# (forward, rows, dq, dkv) of a hop
BACKENDS = {
    "torch": (torch_fwd, torch_preprocess, torch_dq, torch_dkv),
    "triton": (triton_fwd, triton_preprocess, triton_dq, triton_dkv),
    "gluon": (hopper_fwd, triton_preprocess, hopper_dq, hopper_dkv),
}


def best_backend(q):
    """The fastest backend that takes q."""
    if not q.is_cuda:
        return "triton" if INTERPRET else "torch"
    return "gluon" if capability(q.device)[0] == 9 and hopper_takes(q.shape[-1], q.dtype) else "triton"


# -----------------------------------------------------------------------------
# transports: how keys, and the gradients collected for them, get from rank to rank. A transport lives as long as one hop loop:
#   keys(j)      k, v of hop j, arrived; those of hop j + 1 are on their way when it returns
#   grads(j)     where dk, dv of hop j are collected, with what earlier ranks did; after the last hop: those of the own keys
#   pass_on(j)   the gradients of hop j are complete: on to the next rank
#   finish()     nothing of this rank is in use elsewhere any more


class P2P:
    """p2p: a shard of keys is handed on from rank to rank by send and receive (NCCL or gloo, any hosts). At most two foreign shards
    are held, and two of gradients."""

    def __init__(self, ring, schedule, k, v, causal, direction, wide=None):
        """direction as in `plan`. wide: the dtype of gradients on the way, if there will be any."""
        self.ring, self.kv, self.direction = ring, (k, v), direction
        self.hops = plan(schedule, ring.rank, ring.n_ranks, k.shape[1], causal, direction)
        few = min(2, len(self.hops) - 1)
        self.buffers = [[torch.empty_like(x) for x in (k, v)] for _ in range(few)]
        self.grad_buffers = [[torch.empty_like(x, dtype=wide) for x in (k, v)] for _ in range(2 if few and wide else 0)]

    def keys(self, j):
        hop = self.hops[j]
        if j > 0:
            self.wait()
            self.kv = self.buffers[(j - 1) % 2]
        if j < len(self.hops) - 1:
            send, recv = pieces(self.kv, hop.send), pieces(self.buffers[j % 2], hop.recv)
            self.wait = self.ring.exchange(send, recv, self.direction, ("keys", j + 1))
        return self.kv

    def grads(self, j):
        if j > 1:
            self.wait_grad()
        return self.grad_buffers[j % 2]

    def pass_on(self, j):
        send, recv = pieces(self.grad_buffers[j % 2], self.hops[j].send_grad), pieces(self.grad_buffers[(j + 1) % 2], self.hops[j].recv_grad)
        self.wait_grad = self.ring.exchange(send, recv, self.direction, ("gradients", j + 1))

    def finish(self):
        pass


def pieces(tensors, rows):
    """The first rows[g] rows of contiguous (B, T, ...) tensors, g being a sequence's batch group: as few contiguous views as will do."""
    B, T = tensors[0].shape[:2]
    if all(n == T for n in rows):
        return list(tensors)
    cut = lambda x, s, n: [x[s]] if n == T else [x[b, :n] for b in range(s.start, s.stop)]
    return [part for x in tensors for s, n in zip(batch_slices(B, len(rows)), rows) if n for part in cut(x, s, n)]


class Symmetric:
    """symmetric memory (CUDA, one host): a rank pushes to every other rank what that one's queries see of its keys, with the copy engine, on
    a stream of its own: no SM and no launch is taken from the kernels. Gradients are pulled from the rank before, in the same way.

    Signals are flags in the memory of the rank that waits for them; whoever waits also clears. By the end of a hop loop all
    are clear, and what was sent has been read: loops may follow in any order, and CUDA graphs may replay them.
        FREE + reader   keys may be pushed to `reader`               READY + source   those of `source` have been
        SENT + box      the gradients in that box of the rank before may be pulled       READ + box   they have been, from this rank's
    """

    def __init__(self, ring, schedule, k, v, causal, direction, wide=None):
        self.memory, self.lane, self.k, self.v, self.rank = ring.memory, ring.memory.lane, k, v, ring.rank
        B, T, HKV, D = k.shape
        self.row_bytes, known = HKV * D * k.element_size(), self.memory.known
        key = schedule, B, T, causal, direction
        if key not in known:
            known[key] = stream_ops(self.lane, schedule, ring.rank, ring.n_ranks, B, T, causal, direction)
        self.hops, self.key_steps, self.grad_steps, self.last, self.joins = known[key]
        self.slots, self.boxes = self.memory.views(self.memory.slots, k, k.dtype), wide and self.memory.views(self.memory.boxes, k, wide)
        self.memory.captured |= self.lane.capturing()

    def keys(self, j):
        step, lane = self.key_steps[j], self.lane
        if step.slot is not None:
            lane.meet(self.arrived)
        if step.forks:
            lane.fork()  # k and v are computed, the kernels that read a slot before are done
        lane.signal(step.before)
        if step.rows:
            to = self.memory.base[step.peer] + self.memory.slots[step.peer_slot]
            for i, x in enumerate((self.k, self.v)):
                for first, n in step.rows:
                    lane.copy(to + i * x.nbytes + first * self.row_bytes, x.data_ptr() + first * self.row_bytes, n * self.row_bytes)
        lane.signal(step.after)
        if step.marks:
            self.arrived = lane.mark()
        return (self.k, self.v) if step.slot is None else self.slots[step.slot]

    def grads(self, j):
        if j > 1:
            self.lane.meet(self.landed)
        return self.boxes[j % 2]

    def pass_on(self, j):
        step, lane, memory, x = self.grad_steps[j], self.lane, self.memory, self.boxes[0][0]
        lane.fork()  # the kernel that wrote them is done
        lane.signal(step.before)
        to, source = memory.base[self.rank] + memory.boxes[(j + 1) % 2], memory.base[step.peer] + memory.boxes[j % 2]
        row_bytes = x.nbytes // (x.shape[0] * x.shape[1])
        for first, n in step.rows:
            lane.copy(to + first * row_bytes, source + first * row_bytes, n * row_bytes)
        lane.signal(step.after)
        self.landed = lane.mark()

    def finish(self):
        self.lane.signal(self.last)
        if self.joins or self.lane.capturing():  # a CUDA graph must end on the stream that it began on
            self.lane.meet(self.lane.mark())


class StreamOps(NamedTuple):
    """What the lane does for the keys, or the gradients, of a hop."""

    slot: int | None  # where this hop's keys were pushed to, if they were
    forks: bool
    before: object  # signals, prepared
    rows: tuple  # (first row, how many): to push of the own keys, or to pull of gradients
    peer: int  # to or from this rank
    peer_slot: int
    after: object  # signals, prepared
    marks: bool  # then the keys of the next hop are there


def stream_ops(lane, schedule, me, R, B, T, causal, direction):
    """(hops, their StreamOps for keys, for gradients, the signals at the end, whether the lane then still has something to do), for Symmetric:
    made once per shape, as a call should take the host no longer than a small problem takes the GPU."""
    plans = [plan(schedule, rank, R, T, causal, direction) for rank in range(R)]
    slot = lambda rank, j: sum(hop.visible for hop in plans[rank][1:j]) % 2  # of the keys of hop j; each rank fills its two in turn
    to, source = ((me + d) % R for d in (direction, -direction))  # of gradients
    FREE, READY, SENT, READ = 0, R, 2 * R, 2 * R + 2
    key_steps, grad_steps, unread, joins = [], [], set(), False  # unread: boxes whose gradients the next rank has not been seen to read
    for j, hop in enumerate(plans[me]):
        before, after, rows, reader, coming = [], [], (), (me + direction * (j + 1)) % R, False
        if j + 1 < R:
            owner, coming = plans[me][j + 1].source, plans[me][j + 1].visible
            rows = row_ranges(plans[reader][j + 1].seen, B, T, 1)
            before += [("set", owner, FREE + me)] * coming
            if rows:
                before.append(("take", FREE + reader, ("room for keys", j + 1, reader)))
                after.append(("set", reader, READY + me))
            if coming:
                after.append(("take", READY + owner, ("keys", j + 1, owner)))
            joins = not coming and (joins or bool(rows))
        here = slot(me, j) if j and hop.visible else None
        key_steps.append(StreamOps(here, j == 0 or coming, lane.prepare(before), rows, reader, slot(reader, j + 1), lane.prepare(after), coming))

        before, after, rows, here, there = [], [], (), j % 2, (j + 1) % 2
        if any(hop.send_grad):
            before.append(("set", to, SENT + here))
        if there in unread:
            before.append(("take", READ + there, ("a reader of gradients", j + 1, to)))
        unread = {here} if any(hop.send_grad) else set()
        if any(hop.recv_grad):
            before.append(("take", SENT + here, ("gradients", j + 1, source)))
            rows = row_ranges(hop.recv_grad, B, T, 2)
            after.append(("set", source, READ + here))
        grad_steps.append(StreamOps(None, True, lane.prepare(before), rows, source, there, lane.prepare(after), True))
    last = [("take", READ + box, ("a reader of gradients", R - 1, to)) for box in unread] if direction < 0 else []
    return plans[me], key_steps, grad_steps, lane.prepare(last), joins or bool(last)


@functools.lru_cache(maxsize=1024)
def row_ranges(rows, B, T, parts):
    """(first row, number of rows) of the pieces of memory that hold the first rows[g] rows of each sequence of `parts` (B, T, ...) tensors."""
    found = []
    for part, (s, n) in itertools.product(range(parts), list(zip(batch_slices(B, len(rows)), rows))):
        for first in range((part * B + s.start) * T, (part * B + s.stop) * T, T):
            if n and found and sum(found[-1]) == first:
                found[-1] = found[-1][0], found[-1][1] + n
            elif n:
                found.append((first, n))
    return tuple(found)


TRANSPORTS = {"p2p": P2P, "symmetric": Symmetric}


def check_transport(transport):
    if transport not in TRANSPORTS:
        raise ValueError(f"{transport=} is unknown; choose one of {', '.join(TRANSPORTS)}, or leave it out")


class SymmetricMemory:
    """Memory of every rank of a ring that all of them reach: flags, slots for keys, boxes for gradients. All ranks make it together."""

    def __init__(self, ring, device, key_bytes, grad_bytes):
        """key_bytes: of k and v of a shard; grad_bytes: of dk and dv."""
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # unused here, and a fault in it can take all GPUs of the host down
        import torch.distributed._symmetric_memory as symmetric_memory

        self.key_bytes, self.grad_bytes, self.captured, self.known = key_bytes, grad_bytes, False, {}
        whole = lambda n: -(-n // 1024) * 1024
        slots = min(2, ring.n_ranks - 1)
        *starts, end = itertools.accumulate((4096, *[whole(key_bytes)] * slots, *[whole(grad_bytes)] * 2))
        self.slots, self.boxes = starts[:slots], starts[slots:]  # offsets
        self.local = symmetric_memory.empty(end, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.local, ring.group)
        self.base = list(self.handle.buffer_ptrs)  # by rank: where its memory is, for this process
        self.local[:4096].zero_()
        torch.cuda.synchronize(device)
        dist.barrier(ring.group, device_ids=[device.index])  # nobody signals before all flags are clear
        self.lane = CopyStream(device, self.base, ring)

    def views(self, starts, x, dtype):
        """Two tensors of the shape of x at each of these offsets."""
        key = tuple(starts), x.shape, dtype
        if key not in self.known:
            n = 2 * x.numel() * dtype.itemsize
            self.known[key] = [self.local[start : start + n].view(dtype).view(2, *x.shape).unbind() for start in starts]
        return self.known[key]


class CopyStream:
    """A stream of copies and signals beside that of the kernels. Copies are the copy engine's, signals the GPU front end's: no SM is used.
    By the driver's own functions, as torch's take the host several times as long."""

    def __init__(self, device, base, ring):
        self.stream, self.base, self.ring, self.device = torch.cuda.Stream(device), base, ring, device.index
        self.handle, self.kernels = self.stream.cuda_stream, None  # kernels: the stream that the last call was on
        events = (ctypes.c_void_p * 5)()
        for i in range(5):
            check_cuda(cuda_driver().cuEventCreate(ctypes.byref(events, 8 * i), 2))  # 2: CU_EVENT_DISABLE_TIMING
        self.forked, *marks = events
        self.marks = itertools.cycle(marks)  # of which two are in use at a time

    def capturing(self):
        return torch.cuda.is_current_stream_capturing()

    def fork(self):
        """What comes next on the lane waits for all that has been launched so far."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if stream != self.kernels and self.kernels is not None and not self.capturing():
            self.follow(self.kernels)  # the kernels of the call before, on another stream, may still read the slots
        self.kernels = stream
        self.follow(stream)

    def follow(self, stream):
        check_cuda(cuda_driver().cuEventRecord(self.forked, stream))
        check_cuda(cuda_driver().cuStreamWaitEvent(self.handle, self.forked, 0))

    def mark(self):
        """A point on the lane, for `meet`."""
        event = next(self.marks)
        check_cuda(cuda_driver().cuEventRecord(event, self.handle))
        return event

    def meet(self, mark):
        """Kernels launched from here on wait for the lane to get to the mark."""
        check_cuda(cuda_driver().cuStreamWaitEvent(torch._C._cuda_getCurrentRawStream(self.device), mark, 0))

    def copy(self, to, source, nbytes):
        check_cuda(cuda_driver().cuMemcpyDtoDAsync_v2(to, source, nbytes, self.handle))

    def prepare(self, signals):
        """For `signal`: ("set", rank, flag), or ("take", flag, what the ring waits for): wait until it is set, and clear it."""
        operations = []
        for kind, *args in signals:
            if kind == "set":
                operations.append((WRITE, self.base[args[0]] + 4 * args[1], 1))
            else:
                mine = self.base[self.ring.rank] + 4 * args[0]
                operations += [self.ring.watch.write(args[1]), (WAIT_EQUAL, mine, 1), (WRITE, mine, 0)]
        return stream_operations([*operations, self.ring.watch.write(None)]) if operations else None

    def signal(self, prepared):
        if prepared:
            check_cuda(cuda_driver().cuStreamBatchMemOp_v2(self.handle, *prepared, 0))


WRITE, WAIT_EQUAL = (2, 0), (1, 1)  # CU_STREAM_MEM_OP_WRITE_VALUE_32; CU_STREAM_MEM_OP_WAIT_VALUE_32 with CU_STREAM_WAIT_VALUE_EQ


def stream_operations(operations):
    """(how many, CUstreamBatchMemOpParams) of a tuple of ((kind, flags), address, value): structs of six 64-bit words."""
    words = [word for (kind, flags), address, value in operations for word in (kind, address, value, flags, 0, 0)]
    return len(operations), (ctypes.c_uint64 * len(words))(*words)


@functools.lru_cache(maxsize=None)
def cuda_driver():
    """The CUDA driver, for what torch does not offer, such as a stream that waits for a value in memory. None where there is none."""
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuStreamBatchMemOp_v2.argtypes = pointer, number, pointer, number
        driver.cuMemcpyDtoDAsync_v2.argtypes = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, pointer
        driver.cuEventCreate.argtypes = pointer, number
        driver.cuEventRecord.argtypes = pointer, pointer
        driver.cuStreamWaitEvent.argtypes = pointer, pointer, number
        return driver
    except (OSError, AttributeError):
        return None


def check_cuda(error):
    if error:
        raise RuntimeError(f"the CUDA driver refused a copy or a signal between GPUs: error {error}")


class Watchdog(threading.Thread):
    """Ends this process when its GPU has waited too long for another rank. A stream that waits can raise nothing, and whoever synchronizes
    with it would hang; NCCL's own watchdog ends a process likewise, but knows nothing of hops."""

    def __init__(self, ring):
        super().__init__(daemon=True)
        self.ring, self.stories = ring, [None]  # what may be waited for; the GPU writes its number to `word` when the wait begins, and 0 when it ends
        self.word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.number = ctypes.c_int32.from_address(self.word.data_ptr())
        with contextlib.suppress(Exception):  # no public way to ask
            self.timeout = ring.group._get_backend(torch.device("cuda")).options._timeout.total_seconds()
        self.timeout = 0.9 * getattr(self, "timeout", 600)  # before NCCL's own
        self.start()

    def write(self, story):
        """The stream operation that says that this is waited for; None: nothing."""
        if story not in self.stories:
            self.stories.append(story)
        return WRITE, self.word.data_ptr(), self.stories.index(story)

    def begin(self, story):
        """As `write`, on the current stream."""
        check_cuda(cuda_driver().cuStreamBatchMemOp_v2(torch.cuda.current_stream().cuda_stream, *stream_operations([self.write(story)]), 0))

    def run(self):
        seen, since = 0, time.monotonic()
        while True:
            time.sleep(random.uniform(0.05, 0.15))  # at random, or it could meet a wait of a repeating pattern every time
            number = self.number.value
            if number == 0 or number != seen:
                seen, since = number, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                sys.stdout.flush()
                print(f"ring_attn: {self.ring.lost(self.stories[number], self.timeout)}", file=sys.stderr, flush=True)
                os._exit(1)


def choose_transport(facts):
    """("symmetric" or "p2p", why), from what every rank says of itself: the same on all of them."""
    lacks = {rank: fact["lacks"] for rank, fact in enumerate(facts) if fact["lacks"]}
    if lacks:
        return "p2p", "; ".join(f"rank {rank}: {why}" for rank, why in lacks.items()) if len(set(lacks.values())) > 1 else next(iter(lacks.values()))
    if (n := len({fact["host"] for fact in facts})) > 1:
        return "p2p", f"the ranks are on {n} hosts"
    if len({fact["gpu"] for fact in facts}) < len(facts):
        return "p2p", "ranks share a GPU"
    for (a, reader), (b, other) in itertools.permutations(enumerate(facts), 2):
        if not reader["reads"].get(other["gpu"], True):
            return "p2p", f"the GPU of rank {a} cannot read that of rank {b}"
    return "symmetric", "GPUs of one host that can read each other"


def transport_facts(device):
    """What choose_transport wants to know of this process."""
    if device.type != "cuda":
        return dict(lacks="the tensors are on CPUs", host=None, gpu=None, reads={})
    lacks = None
    if cuda_driver() is None:
        lacks = "libcuda.so.1, or stream memory operations in it, are not there"
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError as error:
        lacks = f"torch has no symmetric memory: {error}"
    boot = Path("/proc/sys/kernel/random/boot_id")
    gpus = {i: str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())}
    reads = {uuid: torch.cuda.can_device_access_peer(device.index, i) for i, uuid in gpus.items() if i != device.index}
    return dict(lacks=lacks, host=(socket.gethostname(), boot.read_text() if boot.exists() else ""), gpu=gpus[device.index], reads=reads)


# -----------------------------------------------------------------------------
# rings: who the ranks are

RINGS = []  # every Ring and VirtualRing of this process: operators take their numbers, as they cannot take objects


class Ring:
    """The processes of `group` in rank order."""

    def __init__(self, group=None, wanted=None):
        """wanted: the transport, "p2p" or "symmetric"; None for the best one that there is."""
        alone = group is None
        self.group, self.wanted = group, wanted
        self.rank, self.n_ranks = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
        self.prev_rank, self.next_rank = (self.rank - 1) % self.n_ranks, (self.rank + 1) % self.n_ranks
        self.agreed = set()  # what every rank has confirmed
        self.transport, self.why, self.settled = None, "nothing has moved yet", None  # until the first call; settled: for which type of device
        self.memory, self.watch, self.kept = None, None, []
        self.number = len(RINGS)
        RINGS.append(self)

    def agree(self, signature, problem):
        """Raise ValueError on every rank if any rank has a problem (a string), or if their signatures (dicts) differ."""
        said = self.gather((signature, problem))  # once per new signature; on NCCL this also brings the communicator up with every rank present
        problems = {rank: p for rank, (_, p) in enumerate(said) if p}
        if problems:
            everywhere = len(set(problems.values())) == 1 and len(problems) == self.n_ranks
            raise ValueError(next(iter(problems.values())) if everywhere else "; ".join(f"rank {r}: {p}" for r, p in problems.items()))
        for rank, (other, _) in enumerate(said):
            differ = [name for name in {**said[0][0], **other} if other.get(name) != said[0][0].get(name)]
            if differ:
                pick = lambda s: ", ".join(f"{name}={s.get(name)}" for name in differ)
                raise ValueError(f"ranks disagree: rank 0 has {pick(said[0][0])}; rank {rank} has {pick(other)}; pass the same on every rank")

    def gather(self, x):
        """x of every rank, by rank. x can be pickled."""
        if self.n_ranks == 1:
            return [x]
        everyone, bound = [None] * self.n_ranks, self.group.bound_device_id
        with torch.cuda.device(bound) if bound else contextlib.nullcontext():  # NCCL takes no other, whatever device is the current one
            dist.all_gather_object(everyone, x, group=self.group)
        return everyone

    def settle(self, device):
        """On all ranks together: choose the transport, if that has not been done."""
        if self.n_ranks > 1 and self.settled != device.type:
            self.transport, self.why = choose_transport(self.gather(transport_facts(device)))
            if self.wanted == "p2p" and self.transport == "symmetric":
                self.transport, self.why = "p2p", "asked for"
            if device.type == "cuda" and self.watch is None and cuda_driver():
                self.watch = Watchdog(self)
            self.settled = device.type
        if self.wanted == "symmetric" and self.transport == "p2p":
            raise ValueError(f'transport="symmetric" cannot be had: {self.why}; use transport="p2p", or None to choose by machine')

    def prepare(self, k, backward):
        """On all ranks together, once per shape: choose the transport, and have memory enough for it."""
        with torch.cuda.device_of(k):  # whose events and memory are made, whatever device is the current one
            self.settle(k.device)
            if self.transport == "symmetric" and k.is_cuda:
                need = 2 * k.nbytes, 2 * k.numel() * torch.promote_types(k.dtype, torch.float32).itemsize if backward else 0
                had = (self.memory.key_bytes, self.memory.grad_bytes) if self.memory else (0, 0)
                if need[0] > had[0] or need[1] > had[1]:
                    self.reserve(k.device, *map(max, need, had))
                    self.settle(k.device)

    def reserve(self, device, key_bytes, grad_bytes):
        torch.cuda.synchronize(device)  # what is there may be in use
        if self.memory and self.memory.captured:
            self.kept.append(self.memory)  # CUDA graphs may be replayed with it
        self.memory, error = None, None
        torch.cuda.empty_cache()  # it does not come out of torch's cache
        try:
            self.memory = SymmetricMemory(self, device, key_bytes, grad_bytes)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        errors = self.gather(error)
        if any(errors):
            self.memory, self.transport = None, "p2p"
            self.why = "no symmetric memory: " + "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            if self.rank == 0:
                warnings.warn(f"from here on keys move by send and receive: {self.why}", stacklevel=2)

    def lost(self, story, seconds):
        what, hop, rank = story
        ranks = dist.get_process_group_ranks(self.group) if dist.is_initialized() else list(range(self.n_ranks))
        return (
            f"rank {self.rank} of the ring of processes {ranks} waited {seconds:.0f} s, at hop {hop} of {self.n_ranks - 1}, for {what} "
            f"from rank {rank}, which has died, is stuck, or never made this call"
        )

    def moves(self, schedule, k, *args):
        """The transport of one hop loop."""
        return TRANSPORTS["symmetric" if self.memory and k.is_cuda else "p2p"](self, schedule, k, *args)

    def exchange(self, send, recv, direction, story):
        """Post: `send` goes to the next rank (direction 1) or the previous one (-1), `recv` fills from the other side. Returns a function
        that waits (on CUDA: makes the current stream wait) and keeps the tensors alive until then. story: what is received, for which hop."""
        to, source = (self.next_rank, self.prev_rank)[::direction]
        peer = lambda rank: dist.get_global_rank(self.group, rank)
        ops = [dist.P2POp(dist.isend, x, peer(to), self.group) for x in send]
        ops += [dist.P2POp(dist.irecv, x, peer(source), self.group) for x in recv]
        story, began = (*story, source), time.monotonic()

        def named(f, *args):
            try:
                return f(*args)
            except RuntimeError as error:  # gloo's, which names an address at most
                raise RuntimeError(self.lost(story, time.monotonic() - began)) from error

        works = named(dist.batch_isend_irecv, ops) if ops else []

        def wait(tensors=(send, recv)):
            if self.watch and works:
                self.watch.begin(story)
            for work in works:
                named(work.wait)
            if self.watch and works:
                self.watch.begin(None)

        return wait

    def run(self, hops, tensors, *args):
        """Run a hop loop (a generator) to its end and return its result."""
        loop = hops(self, *tensors, *args)
        while True:
            try:
                next(loop)
            except StopIteration as end:
                return end.value


class VirtualRing:
    """A ring of n_ranks on one device, in one process: the same hop loops, in lockstep, over shards of whole sequences, that move as in p2p.

    Pass it as `group`; q, k, v then hold all S tokens, and so does o. For tests and for reading.
    """

    def __init__(self, n_ranks):
        if n_ranks < 1:
            raise ValueError(f"{n_ranks=} must be 1 or more")
        self.n_ranks, self.agreed, self.mail = n_ranks, set(), {}
        self.rank, self.prev_rank, self.next_rank = 0, n_ranks - 1, 1 % n_ranks
        self.number = len(RINGS)
        RINGS.append(self)

    def agree(self, signature, problem):
        if problem:
            raise ValueError(problem)

    def prepare(self, k, backward):
        pass

    def run(self, hops, tensors, schedule, *args):
        split = lambda x, rank: x if x is None else along_tokens(lambda y: shard(y, schedule, rank, self.n_ranks), x)
        members = [VirtualRank(self, rank) for rank in range(self.n_ranks)]
        loops = {m.rank: hops(m, *(split(x, m.rank) for x in tensors), schedule, *args) for m in members}
        results = [None] * self.n_ranks
        while loops:
            for rank, loop in list(loops.items()):
                try:
                    next(loop)
                except StopIteration as end:
                    results[rank] = end.value
                    del loops[rank]
        return tuple(along_tokens(lambda *parts: merge(parts, schedule), *parts) for parts in zip(*results))


class VirtualRank:
    def __init__(self, ring, rank):
        self.ring, self.rank, self.n_ranks, self.posted = ring, rank, ring.n_ranks, 0

    def moves(self, *args):
        return P2P(self, *args)

    def exchange(self, send, recv, direction, story):
        number, self.posted = self.posted, self.posted + 1  # the neighbour's exchange of the same number is the other end
        self.ring.mail[self.rank, number] = send
        source = (self.rank - direction) % self.n_ranks
        return lambda: [x.copy_(y) for x, y in zip(recv, self.ring.mail.pop((source, number)), strict=True)]


def along_tokens(f, *xs):
    """Apply f, which cuts or joins dimension 1, to (B, T, H, D) tensors, or to (B, H, T) ones."""
    return f(*xs) if xs[0].ndim == 4 else f(*(x.transpose(1, 2) for x in xs)).transpose(1, 2).contiguous()


ring_of = functools.lru_cache(maxsize=None)(Ring)
ALONE = ring_of(None)  # a ring of one, whatever the process group


def leave_groups():
    """End torch.distributed, at the end of a script, if it was begun. Rings let go of their groups: the threads of a gloo group that is
    alive when Python exits may still be freeing tensors, and abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    ring_of.cache_clear()
    for ring in RINGS:
        ring.group = ring.memory = None


def resolve_ring(group, transport=None):
    """A ring from what users pass as `group`: None, a ProcessGroup, a VirtualRing or a Ring."""
    if not isinstance(group, (VirtualRing, Ring)):
        return process_ring(group, transport)
    if transport is not None:
        raise ValueError(f"{transport=} goes with a process group: a {type(group).__name__} has its own; leave it out")
    return group


@torch.compiler.assume_constant_result  # called once, when a graph is made: the compiled graph keeps the ring
def process_ring(group, transport=None):
    if transport is not None:
        check_transport(transport)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be None, a ProcessGroup this process belongs to, a VirtualRing or a Ring, not {group!r}")
    return ring_of(group, transport) if group else ALONE


# -----------------------------------------------------------------------------
# hop loops. Generators: each `yield` is where a virtual ring lets its other ranks catch up


@functools.lru_cache(maxsize=None)
def nothing(dtype, device):  # an argument that no kernel reads
    return torch.empty(0, dtype=dtype, device=device)


def accumulator(x, wide, n_hops, backend):
    """Where hops keep x in float32 until it is complete: x itself if wide enough, nothing if one kernel does it all."""
    if x.dtype == wide:
        return x
    return torch.empty(x.shape, dtype=wide, device=x.device) if n_hops > 1 or backend == "torch" else nothing(wide, x.device)


def forward_hops(ring, q, k, v, schedule, causal, sm_scale, backend):
    """o (B, T, H, D) like q, and lse (B, H, T)."""
    B, T, H, D = q.shape
    forward, *_ = BACKENDS[backend]
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=wide, device=q.device)
    acc = accumulator(o, wide, ring.n_ranks, backend)
    moves = ring.moves(schedule, k, v, causal, 1)
    for j, hop in enumerate(moves.hops):
        kv = moves.keys(j)
        if hop.visible:
            forward(q, *kv, o, acc, lse, hop, causal, sm_scale)
        yield
    moves.finish()
    return o, lse


def backward_hops(ring, q, k, v, o, lse, do, dlse, schedule, causal, sm_scale, backend):
    """dq, dk, dv. The own keys come first for dq and last for dk, dv: the first keys to arrive do so under dq of the own
    ones, gradients travel under dq of the same hop, and are home after n_ranks - 1 hops."""
    _, preprocess, backward_dq, backward_dkv = BACKENDS[backend]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq_acc = accumulator(dq, wide, ring.n_ranks, backend)
    rows = preprocess(o, do, lse, dlse)
    moves = ring.moves(schedule, k, v, causal, -1, wide)
    for j, hop in enumerate(moves.hops):
        kv = moves.keys(j)
        if j > 0:  # to what earlier ranks collected for these keys add, and send it on
            grads = moves.grads(j)
            if hop.visible:
                backward_dkv(q, *kv, do, rows, *grads, *grads, hop, causal, sm_scale)
            moves.pass_on(j)
        if hop.visible:
            backward_dq(q, *kv, do, rows, dq, dq_acc, hop, causal, sm_scale)
        yield
    home = moves.grads(ring.n_ranks) if ring.n_ranks > 1 else [accumulator(x, wide, 1, backend) for x in (dk, dv)]
    backward_dkv(q, k, v, do, rows, dk, dv, *home, moves.hops[0], causal, sm_scale)
    moves.finish()
    return dq, dk, dv


# -----------------------------------------------------------------------------
# operators and autograd. Whoever looks at operators (torch.compile, fake tensors, selective checkpointing) finds torch.ops.ring_attn.forward
# and .backward: torch.compile reads shapes off the *_fake functions, puts the operators into its graph as they are, and breaks no graph here


def can_skip_dispatcher(*tensors):
    """Then functions are called directly: the dispatcher would take the host longer than a launch."""
    plain = all(type(x) is torch.Tensor or type(x) is torch.nn.Parameter for x in tensors)
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return plain and not (transformed or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def wire_ready(q, k, v, ring):
    """Kernels want the D numbers of a head side by side; keys and values that go on the wire are whole blocks."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, v = (x if x.stride(-1) == 1 and RINGS[ring].n_ranks == 1 else x.contiguous() for x in (k, v))
    return q, k, v


def run_hops(hops, tensors, ring, schedule, causal, sm_scale, backend):
    q = tensors[0]
    backend = best_backend(q) if backend is None else backend
    casts = torch.is_autocast_enabled(q.device.type)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False) if casts else contextlib.nullcontext():
        return RINGS[ring].run(hops, tensors, schedule, causal, sm_scale, backend)  # kernels launch on the current device


def forward_real(q, k, v, ring, schedule, causal, sm_scale, backend, backward, checked, problem):
    if not checked:  # it comes from a compiled graph
        check_once(q, k, v, schedule, RINGS[ring], causal, sm_scale, backend, backward, problem)
    return run_hops(forward_hops, wire_ready(q, k, v, ring), ring, schedule, causal, sm_scale, backend)


def forward_fake(q, k, v, *args):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


def backward_real(do, dlse, q, k, v, o, lse, ring, *args):
    do = torch.zeros_like(o) if do is None else do.to(o.dtype).contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    return run_hops(backward_hops, (*wire_ready(q, k, v, ring), o, lse, do, dlse), ring, *args)


def backward_fake(do, dlse, q, k, v, *args):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, args):
        q, k, v = wire_ready(q, k, v, args[0])  # here already, as these are kept for the backward
        if can_skip_dispatcher(q, k, v):
            o, lse = forward_real(q, k, v, *args)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # the same operator again, now the part below autograd
                o, lse = torch.ops.ring_attn.forward.default(q, k, v, *args)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.args = args
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        saved = ctx.saved_tensors
        backward = backward_real if can_skip_dispatcher(*saved) else torch.ops.ring_attn.backward.default
        return *backward(do, dlse, *saved, *ctx.args[:5]), None


LIBRARY = torch.library.Library("ring_attn", "DEF")
OPTIONS = "int ring, str schedule, bool causal, float sm_scale, str? backend"
LIBRARY.define(f"forward(Tensor q, Tensor k, Tensor v, {OPTIONS}, bool backward, bool checked, str? problem) -> (Tensor, Tensor)")
LIBRARY.define(f"backward(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
LIBRARY.impl("forward", lambda q, k, v, *args: RingAttention.apply(q, k, v, args), "Autograd")
LIBRARY.impl("forward", forward_real, "CompositeExplicitAutograd")  # on any device: check_inputs says which are supported
LIBRARY.impl("backward", backward_real, "CompositeExplicitAutograd")
torch.library.register_fake("ring_attn::forward", forward_fake, lib=LIBRARY)
torch.library.register_fake("ring_attn::backward", backward_fake, lib=LIBRARY)


class Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, schedule, ring):
        shards = [torch.empty_like(x) for _ in range(ring.n_ranks)]
        dist.all_gather(shards, x, group=ring.group)
        ctx.args = schedule, ring.rank, ring.n_ranks
        return merge(shards, schedule)

    @staticmethod
    def backward(ctx, dx):
        return shard(dx, *ctx.args), None, None


# -----------------------------------------------------------------------------
# public functions


def check_inputs(q, k, v, schedule, ring, causal, sm_scale, backend):
    """Raise ValueError, with the values and a way out, for anything that the hop loops cannot do."""
    for name, x in dict(q=q, k=k, v=v).items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor (B, T, heads, D), not {type(x).__name__}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}; make it dense with .to_dense()")
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (B, T, heads, D) with no dimension of 0")
    if k.shape != v.shape or (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; need q (B, T, H, D), k and v (B, T, HKV, D) with equal B, T and D")
    (B, T, H, D), HKV = q.shape, k.shape[2]
    if H % HKV:
        raise ValueError(f"{H} query heads cannot share {HKV} key/value heads: H must be a multiple of HKV")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one")
    if not q.device == k.device == v.device:
        raise ValueError(f"devices differ: q {q.device}, k {k.device}, v {v.device}; move them to one")
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"tensors are on {q.device}; cpu and cuda are supported")
    if not isinstance(causal, int):  # bool is one
        raise ValueError(f"{causal=} must be True or False")
    if not isinstance(sm_scale, (int, float)) or not 0 < sm_scale < math.inf:
        raise ValueError(f"{sm_scale=} must be a finite number above 0; to flip its sign negate q")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{backend=} is unknown; choose one of {', '.join(BACKENDS)}, or None to choose by device")
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)[: {"torch": 4, "triton": 3, "gluon": 2}[backend]]
    if q.dtype not in dtypes:
        raise ValueError(f'{q.dtype} is not supported by backend="{backend}"; cast to one of {", ".join(map(str, dtypes))}')
    if backend == "gluon":
        if not q.is_cuda or capability(q.device)[0] != 9:
            raise ValueError(f'backend="gluon" needs a Hopper GPU (capability 9.0), the tensors are on {q.device}; use backend="triton"')
        if not hopper_takes(D, q.dtype):
            raise ValueError(f'head dim {D} must be a multiple of 8 up to {max(HOPPER_TILES["fwd"])} for backend="gluon"; use backend="triton"')
    if backend == "triton":
        check_portable(q)
    if isinstance(ring, VirtualRing):
        if T % ring.n_ranks:
            raise ValueError(f"seq_len={T} must be a multiple of n_ranks={ring.n_ranks}; pad it, or change the number of ranks")
        T //= ring.n_ranks
    elif ring.n_ranks > 1:
        check_movable(q, ring.group)
    check_schedule(schedule, ring.n_ranks, T, B)


def check_movable(x, group):
    """Raise ValueError unless the process group can move x."""
    if x.device.type not in device_types(group):
        raise ValueError(
            f"the process group ({dist.get_backend(group)}) cannot move {x.device.type} tensors; "
            f'use init_process_group("{"nccl" if x.device.type == "cuda" else "gloo"}")'
        )
    if x.is_cuda and group.bound_device_id not in (None, x.device):
        raise ValueError(
            f"tensors are on {x.device}, but init_process_group was given device_id={group.bound_device_id}; make them on the GPU of this rank"
        )


def check_portable(q):
    """Raise ValueError unless the portable kernels can run on q (B, T, H, D)."""
    D = q.shape[-1]
    if D > 256:
        raise ValueError(f'head dim {D} is above 256, the most the kernels take; use smaller heads, or backend="torch"')
    if INTERPRET and q.dtype == torch.bfloat16:
        raise ValueError("bfloat16 is wrong in Triton's interpreter; use float16 or float32, or unset TRITON_INTERPRET")
    if not INTERPRET and q.device.type != "cuda":
        raise ValueError('backend="triton" needs CUDA tensors, or TRITON_INTERPRET=1 in the environment to run on the CPU')
    if not INTERPRET and capability(q.device) < (8, 0):
        has = ".".join(map(str, capability(q.device)))
        raise ValueError(f'the kernels need CUDA capability 8.0; {torch.cuda.get_device_name(q.device)} has {has}: use backend="torch"')


def device_types(group):
    """Kinds of device whose tensors the process group can move."""
    config = str(dist.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
    by_device = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
    if by_device.get("cuda") == "gloo":
        del by_device["cuda"]  # gloo has no send and receive for CUDA tensors
    return list(by_device)


def summary(x):
    """What all ranks must agree on, and what the checks look at, of an argument that should be a tensor."""
    return (tuple(x.shape), str(x.dtype), x.device.type, str(x.layout)) if isinstance(x, torch.Tensor) else type(x).__name__


def agree_once(ring, key, signature, problem, check, prepare=lambda: None):
    """Before the first call of a kind: raise ValueError on every rank if `check` finds a problem on any, or if the ranks'
    signatures differ; if all is well, `prepare`. Later calls with the same key cost a look-up."""
    if key in ring.agreed:
        return
    if problem is None:
        try:
            check()
        except ValueError as error:
            problem = str(error)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = f"{type(error).__name__}: {error}"
    ring.agree(signature, problem)
    prepare()
    ring.agreed.add(key)


def check_once(q, k, v, schedule, ring, causal, sm_scale, backend, backward, problem):
    """check_inputs, and that every rank has the same, the first time that these shapes and options come up."""
    if backend is None:
        backend = best_backend(q) if isinstance(q, torch.Tensor) and q.ndim > 0 else "torch"
    options = schedule, causal, sm_scale, backend, backward, problem, type(causal)
    try:
        key = *((x.shape, x.dtype, x.device, x.layout) for x in (q, k, v)), *options
        known = key in ring.agreed
    except (AttributeError, TypeError):  # an argument of a kind that will be refused
        key, known = repr((summary(q), summary(k), summary(v), *options)), False
    if not known:
        if isinstance(q, torch.Tensor) and q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("ranks cannot agree on shapes and options inside a CUDA graph: make this call once before you capture it")
        options = dict(zip(("schedule", "causal", "sm_scale", "backend", "backward"), map(repr, options)))
        signature = dict(q=summary(q), k=summary(k), v=summary(v), transport=getattr(ring, "wanted", None), **options)
        agree_once(ring, key, signature, problem, lambda: check_inputs(q, k, v, schedule, ring, causal, sm_scale, backend), lambda: ring.prepare(k, backward))


def attend(q, k, v, schedule, ring, causal, sm_scale, return_lse, backend, problem=None):
    """What all public functions come down to. problem: what the caller found wrong, to be raised on every rank."""
    if sm_scale is None:
        sm_scale = max(q.shape[-1], 1) ** -0.5 if isinstance(q, torch.Tensor) and q.ndim > 0 else 1.0
    backward = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v))
    checked = not torch.compiler.is_compiling()  # a compiled graph is made before the tensors: there the operator checks them
    if checked:
        check_once(q, k, v, schedule, ring, causal, sm_scale, backend, backward, problem)
    args = ring.number, schedule, bool(causal), sm_scale, backend, backward, checked, problem
    if checked and can_skip_dispatcher(q, k, v):
        o, lse = RingAttention.apply(q, k, v, args) if backward else forward_real(q, k, v, *args)
    else:
        o, lse = torch.ops.ring_attn.forward.default(q, k, v, *args)
    return (o, lse) if return_lse else o


def ring_attn(q, k, v, schedule="zigzag", group=None, causal=True, sm_scale=None, return_lse=False, *, backend=None, transport=None):
    """softmax(sm_scale * q k^T) v over a sequence that is sharded over the ranks of `group`. Differentiable.

    q: (B, T, H, D), k, v: (B, T, HKV, D): this rank's tokens under `schedule`, see `shard`; T, B the same on every
       rank. bfloat16, float16 or float32 (float64 in the torch path). H a multiple of HKV; D up to 256. Any strides.
    schedule: a key of SCHEDULES. Under causal=False all of them give the same result.
    group: a process group; None for the default one, or for a ring of one if there is none; VirtualRing(n); or a Ring, as resolve_ring makes.
    sm_scale: above 0; None means D ** -0.5.
    return_lse: also return lse (B, H, T) float32 (float64 for float64 inputs), the natural log of the softmax's denominator;
       gradients flow through it.
    backend: "torch", "triton" (any GPU, and CPU tensors under TRITON_INTERPRET=1) or "gluon" (Hopper); None chooses the fastest one.
    transport: "p2p" (send and receive between neighbours: NCCL, gloo) or "symmetric" (CUDA, one host: copies from where the keys are);
       None chooses: symmetric memory where all GPUs can read each other. resolve_ring(group).transport says which it was, .why says why.
    Returns o, (B, T, H, D), in the dtype of q.

    Raises ValueError on every rank if any rank's inputs do not fit or the ranks' inputs differ. That is checked once
    per new combination of shapes and options; a rank that changes them alone, after the others have agreed on theirs,
    is found by the process group's timeout only.
    """
    return attend(q, k, v, schedule, resolve_ring(group, transport), causal, sm_scale, return_lse, backend)


def flash_attn_func(q, k, v, bias=None, causal=True, sm_scale=None):
    """ring_attn on a ring of one: (B, T, H, D) -> (B, T, H, D), whatever the process group. bias must be None."""
    problem = None if bias is None else "bias is not supported yet; pass None"
    return attend(q, k, v, "contiguous", ALONE, causal, sm_scale, False, None, problem)


def named_schedule(name, schedule):
    """The function `name`, which is ring_attn under one schedule with the ring spelled out."""

    def func(q, k, v, n_ranks, rank, prev_rank, next_rank, bias=None, causal=True, sm_scale=None, *, group=None):
        ring = ALONE if n_ranks == 1 and group is None else resolve_ring(group)
        given = (n_ranks, rank, prev_rank, next_rank)
        actual = (ring.n_ranks, ring.rank, ring.prev_rank, ring.next_rank)
        problem = None if bias is None else "bias is not supported yet; pass None"
        if given != actual:
            problem = f"n_ranks, rank, prev_rank, next_rank are {given}; in this process group they are {actual}"
        return attend(q, k, v, schedule, ring, causal, sm_scale, False, None, problem)

    func.__name__ = func.__qualname__ = name
    func.__doc__ = f"""ring_attn(q, k, v, schedule="{schedule}") with the ring spelled out: ranks within `group` (default: all processes).

    q: (B, T, H, D), k, v: (B, T, HKV, D), this rank's tokens, see `shard`. n_ranks = 1 is a local call: it needs no process
    group and, unless one is given, takes no notice of any. bias must be None. Returns o (B, T, H, D).
    Raises ValueError as ring_attn does, and where the ranks are not the group's.
    """
    return func


ring_attn_func = named_schedule("ring_attn_func", "contiguous")
striped_attn_func = named_schedule("striped_attn_func", "striped")
zigzag_attn_func = named_schedule("zigzag_attn_func", "zigzag")
step_attn_func = named_schedule("step_attn_func", "step")


@torch.compiler.disable  # a graph break, where a model calls it under torch.compile
def unshard(x, schedule, group=None):
    """The inverse of `shard`: every rank's (B, T, ...) -> the whole (B, S, ...), on every rank. Memory O(S).

    Differentiable, for a loss that every rank computes alike from the whole: the gradient is this rank's own part.
    Raises ValueError on every rank if the schedule is unknown, cannot cut x, or the ranks' shapes differ.
    """
    ring = resolve_ring(group)
    signature = dict(x=summary(x), schedule=repr(schedule))

    def check():
        if isinstance(ring, VirtualRing):
            raise ValueError("a VirtualRing holds whole sequences: there is nothing to unshard")
        if not isinstance(x, torch.Tensor) or x.ndim < 2 or x.layout != torch.strided:
            raise ValueError(f"x is {summary(x)}; it must be a dense tensor (B, T, ...)")
        if ring.n_ranks > 1:
            check_movable(x, ring.group)
        check_schedule(schedule, ring.n_ranks, x.shape[1], x.shape[0])

    agree_once(ring, tuple(signature.values()), signature, None, check)
    return x if ring.n_ranks == 1 else Unshard.apply(x.contiguous(), schedule, ring)


# -----------------------------------------------------------------------------
# the schedules, drawn from the plans that the hop loops follow


def work(schedule, n_ranks, T=256):
    """By rank and hop of a causal forward: (whose keys, the share of the scores with them that is computed)."""
    at = lambda layout: layout_positions(Layout(*layout), T)
    seen = lambda row: (at(row[3:6]) <= at(row[:3])[:, None]).double().mean().item()
    share = lambda hop: sum(map(seen, hop.table)) / len(hop.table)
    return [[(hop.source, share(hop)) for hop in plan(schedule, rank, n_ranks, T, True, 1)] for rank in range(n_ranks)]


def draw(n_ranks=4, T=256):
    """One table per schedule: at each hop of the forward, whose keys a rank has and how much of the scores it computes."""
    lines = []
    for schedule in SCHEDULES:
        B = SCHEDULES[schedule].batch_groups
        lines.append(f"{schedule:12}" + "".join(f"hop {j}   " for j in range(n_ranks)) + "work   shards received")
        for rank, (hops, received) in enumerate(zip(work(schedule, n_ranks, T), keys_moved(schedule, n_ranks, T, B))):
            cells = (f"k{source} " + "█" * round(4 * share) if share else "·" for source, share in hops)
            lines.append(f"  rank {rank}    " + "".join(f"{cell:8}" for cell in cells) + f"{sum(share for _, share in hops):<7.1f}{received / T / B:g}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(draw())
