"""Ring attention: exact attention over sequences longer than one GPU holds.

Every rank (process) holds queries, keys and values of T tokens, its shard. Keys and values travel round the
ring of ranks, one shard per hop, and each hop folds them into a running softmax, per query row:

    lse = log sum_j exp(s_j)            s_j = sm_scale * q . k_j
    o   = sum_j exp(s_j - lse) v_j
    hop: lse' = log(exp(lse) + sum_new exp(s_j)),  o' = exp(lse - lse') o + sum_new exp(s_j - lse') v_j

So (o, lse) in float32 is all that one hop hands to the next. The backward needs only the final lse and
delta = rowsum(do * o): p = exp(s - lse), dv = p^T do, ds = p * (do v^T - delta), dq = ds k, dk = ds^T q.

Shapes: B batch, T tokens on this rank, S = n_ranks * T, H query heads, HKV key/value heads, G = H // HKV, D
head dim. q, o, do (B, T, H, D); k, v (B, T, HKV, D); lse, delta (B, H, T) float32, natural log, -inf where a
row sees no key.

The file has four parts. Part I is the algorithm, and runs on a CPU: you may stop there.
    I    reference, schedules, plan, hop loops, the p2p transport, rings, public functions
    II   portable Triton kernels and their launchers
    III  fast paths: Hopper kernels in Gluon, symmetric memory, the watchdog
    IV   the operator, autograd, checks

Parallelism: forward by (query tile, head, batch); backward by (key tile, key/value head, batch), looping over
the G query heads of the group. The same inputs give the same bits, unless deterministic=False.

Not supported: attention bias, dropout on the probabilities.

Sources: Ring Attention (arXiv 2310.01889), Striped Attention (2311.09431), FlashAttention-2 and -3
(2307.08691, 2407.08608), step attention and the argument names (github mgmalek/ring-attention), zigzag
(zhuzilin/ring-flash-attention issue 2).

    python ring_attn.py                         # the schedules as text
    python test.py                              # tests: kernels, schedules, virtual rings of 1 to 8
    torchrun --nproc_per_node=4 test.py         # the same, and real processes
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import inspect
import itertools
import math
import numbers
import os
import random
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from einops import einsum, rearrange
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = constexpr(math.log2(math.e))
INT_MAX = 2**31 - 1
PAD_HINT = "pad it, see shard(..., pad=True), or change the number of ranks"
ROW_PAD = constexpr(128)  # keys move, and lse and delta are padded, in such blocks of rows: whole tiles

# =============================================================================
# Part I: the algorithm
# -----------------------------------------------------------------------------
# reference: attention of some queries to some keys, in plain torch


def reference_fwd(q, k, v, o, lse, seen, sm_scale, mods):
    """Fold keys and values into the softmax state (o, lse) of the queries and return the new state.

    q, o (B, M, H, D), lse (B, H, M), k, v (B, N, HKV, D). seen (M, N) bool: whether query i sees key j.
    Computes in the dtype of o, float32 or float64. mods: Mods at the positions of these queries and keys.
    """
    G = q.shape[2] // k.shape[2]
    q, o = (rearrange(x.to(o.dtype), "b m (h g) d -> b h g m d", g=G) for x in (q, o))
    k, v = (rearrange(x.to(o.dtype), "b n h d -> b h n d") for x in (k, v))
    lse = rearrange(lse, "b (h g) m -> b h g m", g=G)
    s = mods.scores(einsum(q, k, "b h g m d, b h n d -> b h g m n") * sm_scale)
    s = s.masked_fill(~seen, -math.inf)
    new_lse = torch.logaddexp(lse, s.logsumexp(-1))  # (B, HKV, G, M)
    safe = new_lse.masked_fill(new_lse == -math.inf, 0.0)  # a row that sees no key: o = 0, not nan
    o = o * (lse - safe).exp()[..., None]
    p = mods.drop((s - safe[..., None]).exp())
    o = o + einsum(p, v, "b h g m n, b h n d -> b h g m d")
    return rearrange(o, "b h g m d -> b m (h g) d"), rearrange(new_lse, "b h g m -> b (h g) m")


def reference_bwd(q, k, v, do, lse, delta, seen, sm_scale, mods):
    """What these keys and values add to dq, and these queries to dk and dv, and the gradient of Mods' bias by
    score (B, HKV, G, M, N). Arguments as in reference_fwd."""
    G = q.shape[2] // k.shape[2]
    q, do = (rearrange(x.to(lse.dtype), "b m (h g) d -> b h g m d", g=G) for x in (q, do))
    k, v = (rearrange(x.to(lse.dtype), "b n h d -> b h n d") for x in (k, v))
    lse, delta = (rearrange(x, "b (h g) m -> b h g m 1", g=G) for x in (lse, delta))
    products = einsum(q, k, "b h g m d, b h n d -> b h g m n") * sm_scale
    with torch.enable_grad():
        products.requires_grad_()
        biased = mods.scores(products, of_bias=True)
        s = mods.scores(biased, of_bias=False)
    p = (s.detach() - lse.masked_fill(lse == -math.inf, math.inf)).exp().masked_fill(~seen, 0.0)
    ds = p * (mods.drop(einsum(do, v, "b h g m d, b h n d -> b h g m n")) - delta)
    dbias = vjp(s, biased, ds).masked_fill(~seen, 0.0)
    ds = vjp(biased, products, dbias).masked_fill(~seen, 0.0) * sm_scale
    p = mods.drop(p)
    dq = einsum(ds, k, "b h g m n, b h n d -> b h g m d")
    dk = einsum(ds, q, "b h g m n, b h g m d -> b h n d")
    dv = einsum(p, do, "b h g m n, b h g m d -> b h n d")
    dk, dv = (rearrange(x, "b h n d -> b n h d") for x in (dk, dv))
    return rearrange(dq, "b h g m d -> b m (h g) d"), dk, dv, dbias


def vjp(y, x, dy):
    """The gradient of x from that of y, which was made of it."""
    return dy if y is x else torch.autograd.grad(y, x, dy, retain_graph=True, materialize_grads=True)[0]


# -----------------------------------------------------------------------------
# schedules: which global positions a rank holds. No kernel, transport or hop loop knows a schedule's name


class Layout(NamedTuple):
    """Local token i is at position start + stride * i + jump * (i >= T // 2). Positions increase with i."""

    start: int
    stride: int
    jump: int

    def position(self, i, T):
        return self.start + self.stride * i + self.jump * (i >= T // 2)


class Schedule(NamedTuple):
    batch_groups: int  # the batch is cut into this many equal groups, each with a layout of its own
    T_multiple: int  # T must be a multiple of this (on more than one rank)
    layouts: Callable  # (rank, n_ranks, T) -> one Layout per batch group


# To add a schedule, add a row: name, batch_groups, T_multiple, layouts of rank r of R with T tokens. Each
# position 0..S-1 must be on exactly one rank, and positions increase with i on each.
SCHEDULES = {
    "contiguous": Schedule(1, 1, lambda r, R, T: (Layout(r * T, 1, 0),)),
    "striped": Schedule(1, 1, lambda r, R, T: (Layout(r, R, 0),)),
    "zigzag": Schedule(1, 2, lambda r, R, T: (Layout(r * (T // 2), 1, (R - 1 - r) * T),)),
    "step": Schedule(2, 1, lambda r, R, T: (Layout(r * T, 1, 0), Layout((R - 1 - r) * T, 1, 0))),
}


def batch_slices(B, n_groups):
    """The rows of each batch group, as slices of the batch dimension."""
    return [slice(g * B // n_groups, (g + 1) * B // n_groups) for g in range(n_groups)]


def rank_layouts(schedule, rank, n_ranks, T, start=0):
    """One Layout per batch group. start: the position of the first of T tokens on a ring of one."""
    if n_ranks == 1:
        return (Layout(start, 1, 0),)  # as under all schedules, but for any B
    return SCHEDULES[schedule].layouts(rank, n_ranks, T)


def layout_positions(layout, T, device=None):  # (T,) int64
    return layout.position(torch.arange(T, device=device), T)


def positions(schedule, rank, n_ranks, T, B=1, device=None, *, cu_seqlens=None):
    """Global positions of a rank's T tokens: (1, T) int64, or (B, T) under a schedule that splits the batch,
    such as step, which needs B. With cu_seqlens, see ring_attn, they restart at 0 in each document, as rotary
    embeddings want them. Raises ValueError where the schedule, rank, T or B do not fit."""
    check_schedule(schedule, n_ranks, T, B)
    if not 0 <= rank < n_ranks:
        raise ValueError(f"{rank=} must be in 0..{n_ranks - 1}")
    layouts = rank_layouts(schedule, rank, n_ranks, T)
    rows = torch.stack([layout_positions(layout, T, device) for layout in layouts])
    if len(rows) > 1:
        rows = rows.repeat_interleave(B // len(rows), 0)
    if cu_seqlens is not None:
        if not torch.compiler.is_compiling():  # a graph cannot read them
            check_documents(cu_seqlens, B, range(n_ranks * T + 1))
        starts = document_starts(cu_seqlens, n_ranks * T).to(rows.device)
        rows, mask = rows.expand(max(len(rows), len(starts)), T), make_mask(n_ranks * T)
        begins = [mask.keys(row, starts[i % len(starts), None])[0] for i, row in enumerate(rows)]
        rows = rows - torch.cat(begins)
    return rows


def shard(x, schedule, rank, n_ranks, *, pad=False, pad_value=0):
    """The tokens of `rank`: (B, S, ...) -> (B, S // n_ranks, ...), a copy. Differentiable.

    pad: pads the end of the sequences with pad_value to the next length that the schedule can divide. Give
    the true length to ring_attn and unshard as seq_len. Targets take pad_value=-100, which cross_entropy
    ignores.
    Raises ValueError where n_ranks does not divide S and pad is False, and as `positions` does.
    """
    B, S = x.shape[:2]
    check_schedule(schedule, n_ranks)
    if pad and n_ranks > 1:
        missing = -S % length_multiple(schedule, n_ranks)
        x = torch.cat([x, x.new_full((B, missing, *x.shape[2:]), pad_value)], 1)
        S += missing
    if S % n_ranks:
        raise ValueError(f"seq_len={S} must be a multiple of {n_ranks=}; {PAD_HINT}")
    rows = torch.arange(B, device=x.device)[:, None]
    return x[rows, positions(schedule, rank, n_ranks, S // n_ranks, B, x.device)]


def length_multiple(schedule, n_ranks):
    """A sequence that ranks share has a multiple of so many tokens."""
    return 1 if n_ranks == 1 else n_ranks * SCHEDULES[schedule].T_multiple


def merge(shards, schedule):
    """The inverse of `shard`: the shards of ranks 0..n_ranks-1, (B, T, ...) each, -> (B, S, ...)."""
    n_ranks, (B, T) = len(shards), shards[0].shape[:2]
    x = shards[0].new_empty(B, n_ranks * T, *shards[0].shape[2:])
    rows = torch.arange(B, device=x.device)[:, None]
    for rank, x_rank in enumerate(shards):
        x[rows, positions(schedule, rank, n_ranks, T, B, x.device)] = x_rank
    return x


# -----------------------------------------------------------------------------
# masks: which keys a query sees. Only Mask.keys knows. All else follows from it

FULL, CAUSAL, INTERVAL = (constexpr(i) for i in range(3))  # how kernels find the keys of a query


class Mask(NamedTuple):
    """Which keys each query sees, as an interval of positions. Positions are 0..S-1; those from `length` on
    are padding, which sees nothing and is not seen."""

    kind: int  # FULL; CAUSAL; INTERVAL: anything, from tables of bounds
    S: int
    length: int
    left: int  # a query sees at most so many keys before its own position, and `right` after it
    right: int
    documents: Any = None  # where they begin: (sequences, or 1 for all; int32 bytes), or "on device"

    def keys(self, p, starts=None):
        """The first and the last position that queries at positions p (n,) see, each (n,). To change the
        mask, change this (and `kind` to INTERVAL). Neither may decrease with p, and before padding
        first <= p <= last.

        starts (B or 1, documents): where documents begin, increasing. The results are then (B or 1, n).
        """
        first, last = p - p.clamp(max=self.left), p + (self.length - 1 - p).clamp(max=self.right)
        if starts is not None:
            begun = torch.searchsorted(starts, p.expand(len(starts), len(p)).contiguous(), right=True)
            ends = torch.nn.functional.pad(starts[:, 1:], (0, 1), value=self.S)
            begun = (begun - 1).clamp(min=0)
            first = torch.maximum(first, starts.gather(1, begun))
            last = torch.minimum(last, ends.gather(1, begun) - 1)
        return torch.where(p < self.length, first, self.length), last

    def starts(self):
        """`documents` as a tensor (sequences, documents), where it holds them."""
        if isinstance(self.documents, tuple):
            n, data = self.documents
            return torch.frombuffer(bytearray(data), dtype=torch.int32).view(n, -1).long()


@functools.lru_cache(maxsize=1024)
def make_mask(S, causal=True, window=None, seq_len=None, documents=None, same_length=True):
    """The Mask of these arguments of ring_attn."""
    pair = (-1, -1) if window is None else window_pair(window)
    left, right = (x if 0 <= x < S - 1 else INT_MAX for x in pair)
    right, length = 0 if causal else right, S if seq_len is None else seq_len
    kind = INTERVAL
    if left == INT_MAX and length == S and documents is None and (same_length or not causal):
        kind = {0: CAUSAL, INT_MAX: FULL}.get(right, INTERVAL)
    return Mask(kind.value, S, length, left, right, documents)


def document_starts(cu_seqlens, S):
    """cu_seqlens (n + 1,) or (B, n + 1) -> where documents begin, (1 or B, n + 1) int64, in order."""
    return cu_seqlens.reshape(-1, cu_seqlens.shape[-1]).long().clamp(0, S).cummax(-1).values


def count_le(layouts, x, T):
    """How many of the T local tokens of a layout are at or before x. layouts (..., 3), x (...) or an int."""
    start, stride, jump = layouts.unbind(-1)
    first_half = (x - start) // stride + 1
    second_half = (x - start - jump) // stride + 1 - T // 2
    return first_half.clamp(0, T // 2) + second_half.clamp(0, T - T // 2)


# -----------------------------------------------------------------------------
# plan: what each rank does at each hop. Positions increase with the local index, so the keys that queries see
# are an interval of a shard


class HopRow(NamedTuple):
    """What kernels read about one batch group at one hop."""

    q_start: int  # Layout of the queries
    q_stride: int
    q_jump: int
    k_start: int  # Layout of the keys
    k_stride: int
    k_jump: int
    next_start: int  # the first key position of all later hops: queries before it are complete after this one
    carry: int  # rows of (o, lse), or of dq, that hold the result of earlier hops: 0 or T
    held_begin: int  # rows of dk, dv that hold what other ranks added
    held_end: int
    fill_begin: int  # rows that must hold something after this hop, if only zeros
    fill_end: int
    home: int  # whether these are the own keys, whose gradients go from there to dk, dv

    @property
    def layouts(self):
        """Of the queries and of the keys."""
        return Layout(*self[:3]), Layout(*self[3:6])


class Hop(NamedTuple):
    """What one rank does at one hop. Tuples have one entry per batch group: rows [begin, end) of a shard."""

    source: int  # the rank whose keys and values are at hand
    rows: tuple  # HopRows
    seen: tuple  # rows of k, v that queries of this rank see, in whole tiles; all empty: nothing to compute
    # between neighbours; the sender's and the receiver's rows are the same:
    send: tuple  # rows of k, v that the next rank, or one after it, needs
    recv: tuple  # rows of k, v that arrive for the next hop
    send_grad: tuple  # rows of dk, dv that leave (backward)
    recv_grad: tuple
    visible: bool  # whether there is anything to compute; hop 0 writes all results, if only zeros
    table: Any = None  # `rows` on the device, int32: see Ring.on_device
    bounds: Any = None  # Bounds, for the backend "torch" and where the mask's kind is INTERVAL


def is_some(interval):
    return interval[1] > interval[0]


def hull(a, b):
    """The shortest interval that holds both."""
    if not (is_some(a) and is_some(b)):
        return a if is_some(a) else b
    return min(a[0], b[0]), max(a[1], b[1])


@functools.lru_cache(maxsize=256)
def rows_seen(schedule, n_ranks, T, TK, mask):
    """[rank][source][batch group]: the rows [begin, end) of the keys of `source` that the T queries of `rank`
    see, in whole tiles. Kernels read whole tiles, and multiply values that no query sees by 0: those rows
    must hold numbers, not nan."""
    (q_layouts, k_layouts), tile = all_layouts(schedule, n_ranks, T, TK), ROW_PAD.value
    # between its halves a layout jumps; inside, the first query sees the first key, the last one the last
    ends = [0, max(T // 2 - 1, 0), T // 2, T - 1]
    p = [[[at.position(i, T) for i in ends] for at in layouts] for layouts in q_layouts]
    p, k = (torch.tensor(x, device="cpu") for x in (p, k_layouts))  # (ranks, groups, 4), (ranks, groups, 3)
    starts, by_group = mask.starts(), []
    for g, group in enumerate(batch_slices(0 if starts is None else len(starts), p.shape[1])):
        own = starts if starts is None or len(starts) == 1 else starts[group]
        first, last = (x.view(-1, n_ranks, 1, 4) for x in mask.keys(p[:, g].flatten(), own))
        begin = count_le(k[:, g, None], first[..., ::2] - 1, TK)  # (sequences, ranks, sources, halves)
        end = count_le(k[:, g, None], last[..., 1::2], TK)
        some = end > begin
        begin = (begin // tile * tile).where(some, TK).amin((0, 3))
        end = ((end + tile - 1) // tile * tile).clamp(max=TK).where(some, 0).amax((0, 3))
        by_group.append(torch.stack([begin.where(end > 0, 0), end], -1))
    return [[[tuple(x) for x in groups] for groups in row] for row in torch.stack(by_group, 2).tolist()]


def all_layouts(schedule, n_ranks, T, TK):
    """Layouts of the T queries and of the TK keys, by rank and batch group. On a ring of one the last query
    is at the position of the last key."""
    q_start, k_start = max(TK - T, 0), max(T - TK, 0)
    q_layouts = [rank_layouts(schedule, r, n_ranks, T, q_start) for r in range(n_ranks)]
    return q_layouts, [rank_layouts(schedule, r, n_ranks, TK, k_start) for r in range(n_ranks)]


@functools.lru_cache(maxsize=256)
def rows_seen_by_many(schedule, n_ranks, T, TK, mask, direction):
    """By source: before, after. Both are lists of rows [begin, end) by batch group, of the keys of `source`:
    before[j] are seen by ranks that hold them at the hops 1..j-1, after[j] by those from hop j on."""
    by_rank, R = rows_seen(schedule, n_ranks, T, TK, mask), n_ranks

    def joined(a, b):
        return tuple(map(hull, a, b))

    by_source = []
    for source in range(R):
        at_hop = [tuple(by_rank[(source + direction * j) % R][source]) for j in range(R)]
        nobody = ((0, 0),) * len(at_hop[0])
        before = [nobody, *itertools.accumulate(at_hop[1:], joined, initial=nobody)]
        after = [*itertools.accumulate(at_hop[:0:-1], joined, initial=nobody)]
        by_source.append((before, [None, *after[::-1]]))  # after[::-1][0] is of the hops from 1 on
    return by_source


@functools.lru_cache(maxsize=1024)
def plan(schedule, rank, n_ranks, T, mask, direction, TK=None):
    """The hops of one rank: a tuple of n_ranks Hops. Hop 0 works on its own keys, those it holds at first.

    direction 1 (forward): keys move to the next rank, hop j has those of rank - j. direction -1 (backward):
    keys and their gradients move to the previous rank, hop j has those of rank + j. Hop 0 then comes last, as
    the gradients of the own keys come home after hop n_ranks - 1. T queries and TK keys a rank (None: T).
    """
    R, TK = n_ranks, TK or T
    q_layouts, k_layouts = all_layouts(schedule, R, T, TK)
    sources = [(rank - direction * j) % R for j in range(R)]
    seen_by_rank = rows_seen(schedule, R, T, TK, mask)[rank]
    seen = [tuple(seen_by_rank[source]) for source in sources]
    by_many = rows_seen_by_many(schedule, R, T, TK, mask, direction)
    order = hop_order(R, direction)
    hops = []
    for j, source in enumerate(sources):
        done, rest = order[: order.index(j)], order[order.index(j) + 1 :]
        before, after = by_many[source]
        arriving = by_many[(source - direction) % R]
        # added by the ranks before this one; to the own keys, whose turn comes last, by all other ranks
        held, fill = before[j or R], before[j + 1] if j else [(0, TK)] * len(seen[0])
        rows = []
        for g, layout in enumerate(q_layouts[rank]):
            first_keys = [k_layouts[sources[i]][g].start for i in rest]
            next_start = min(first_keys, default=INT_MAX) if mask.kind == CAUSAL.value or not rest else -1
            carry = T if any(i == 0 or is_some(seen[i][g]) for i in done) else 0
            rows.append(HopRow(*layout, *k_layouts[source][g], next_start, carry, *held[g], *fill[g], j == 0))
        moves = after[j + 1], arriving[1][j + 1], before[j + 1], arriving[0][j + 1]
        hops.append(Hop(source, tuple(rows), seen[j], *moves, j == 0 or any(map(is_some, seen[j]))))
    return tuple(hops)


def hop_order(n_ranks, direction):
    """The hops in the order in which a rank works on them."""
    return [*range(n_ranks)] if direction > 0 else [*range(1, n_ranks), 0]


def keys_moved(schedule, n_ranks, T, B=1, causal=True, transport="symmetric", *, window=None, cu_seqlens=None,
               seq_len=None):  # fmt: skip
    """Rows (tokens of one sequence) of keys and values that each rank receives in a forward: a list by rank.

    transport "symmetric": what its queries see, in whole tiles of 128; "p2p": also what a rank after it sees.
    Full attention, and striped without padding, move (n_ranks - 1) * T * B. Under a causal mask "symmetric"
    moves half of that under contiguous and step on average, three quarters under zigzag; under a window
    contiguous and zigzag move about the window. cu_seqlens count on a CPU, as in ring_attn. Raises ValueError
    as `positions` and ring_attn do.
    """
    check_schedule(schedule, n_ranks, T, B)
    check_transport(transport)
    S = n_ranks * T
    check_mask(causal, window, cu_seqlens, seq_len, B, S, S)
    mask = make_mask(S, causal, window, seq_len, documents_of(cu_seqlens, S))
    moved = []
    for rank in range(n_ranks):
        hops = plan(schedule, rank, n_ranks, T, mask, 1)
        rows = [hop.seen for hop in hops[1:]] if transport == "symmetric" else [hop.recv for hop in hops]
        moved.append(sum((end - begin) * B // len(groups) for groups in rows for begin, end in groups))
    return moved


def documents_of(cu_seqlens, S):
    """Mask.documents of cu_seqlens."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type != "cpu":
        return "on device"
    starts = document_starts(cu_seqlens, S).int()
    return len(starts), starts.numpy(force=True).tobytes()  # whose hash is computed once


# -----------------------------------------------------------------------------
# score mods: what happens to scores between the product and the mask, and to probabilities (dropout)


class Mod(NamedTuple):
    """A function of scores in natural units, f(score, b, h, q_idx, kv_idx, *args), of global positions."""

    in_torch: Callable  # without args; autograd differentiates it
    kernel: Any  # @triton.jit
    # @triton.jit, g(dscore, score, b, h, q_idx, kv_idx, *args): the gradient of f's score. None: it is dscore
    kernel_bwd: Any
    args: tuple = ()  # of the kernels: tensors and numbers
    unit: float | None = None  # of scores that kernels take, if this is the first, and return, if the last


class Functions(tuple):
    """@triton.jit functions, or None, as a constant of a kernel. Triton keeps compiled kernels by their
    constants, but of the functions in a tuple it would only look at the names."""

    cache_key = property(lambda self: ".".join("" if f is None else f.cache_key for f in self))


# what kernels know of Mods, their argument MODS: positions of the last query and key; what products are
# multiplied by before the first function; the unit of what the last one returns; arguments of each; of
# dropout
KernelMods = namedtuple("KernelMods", "last_q last_k scale unit args dropout")


class Mods(NamedTuple):
    """What a call does to scores, one after the other, and then to probabilities."""

    before: tuple = ()  # Mods up to the bias
    after: tuple = ()
    dropout_p: float = 0.0
    seed: Any = None  # of dropout, a tensor of one int
    last: tuple = (0, 0)  # positions of the last query and key of all: mods may read there
    at: Any = None  # b, h, q_idx, kv_idx of some scores: tensors that broadcast with them

    def __bool__(self):
        return bool(self.before or self.after or self.dropout_p)

    def scores(self, s, of_bias=None):
        """Modified scores; only by the first Mods, up to the bias, or only by the others."""
        for mod in (self.before if of_bias is not False else ()) + (self.after if not of_bias else ()):
            s = mod.in_torch(s, *self.at).to(s.dtype)
        return s

    def drop(self, p):
        """Probabilities, or their gradients, 0 where they are dropped."""
        if not self.dropout_p:
            return p
        threshold, scale = dropout_numbers(self.dropout_p)
        return p * (philox(int(self.seed), *self.at) >= threshold) * scale

    def for_kernels(self, sm_scale, backward=False):
        """Of a launch: the argument MODS, constants, what else the compiled code depends on."""
        if not self:
            return None, NO_MODS_BWD if backward else NO_MODS_FWD, ()
        chain = self.before + self.after
        dropout = (self.seed, *dropout_numbers(self.dropout_p)) if self.dropout_p else ()
        args = kernel_mods(chain, sm_scale, self.last, dropout)
        constants = dict(MOD=Functions(mod.kernel for mod in chain), DROPOUT=bool(dropout))
        if backward:
            constants["MOD_BWD"] = Functions(mod.kernel_bwd for mod in chain)
        return args, constants, specialization(args)


NO_MODS_FWD = dict(MOD=None, DROPOUT=False)
NO_MODS_BWD = NO_MODS_FWD | dict(MOD_BWD=None)


def specialization(x):
    """What Triton compiles into a kernel of an argument that is a tensor, a number, or a tuple of them."""
    if isinstance(x, tuple):
        return tuple(map(specialization, x))
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return (x == 1, x % 16 == 0) if isinstance(x, int) else x is None


def kernel_mods(chain, sm_scale, last=(0, 0), dropout=()):
    """KernelMods of a chain of Mods."""
    scale, unit = (sm_scale / (chain[0].unit or 1.0), chain[-1].unit) if chain else (sm_scale, None)
    return KernelMods(*last, scale, unit, tuple(mod.args for mod in chain), dropout)


def make_chain(q, softcap=None, slopes=None, score_mod=None, score_mod_bwd=None, aux=(), bias=()):
    """Mods in their order, for the heads of q: those up to bias (a Mod in a tuple), and the others."""
    H, before, after = q.shape[2], bias, ()
    if softcap:
        in_kernels = softcap_mod, softcap_mod_bwd
        if q.dtype.itemsize > 2:
            in_kernels = exact_softcap_mod, exact_softcap_mod_bwd
        alone = not bias and slopes is None and score_mod is None

        def capped(s, *at):
            return softcap * (s / softcap).tanh()

        before = Mod(capped, *in_kernels, (None if alone else float(softcap),), float(softcap)), *bias
    if slopes is not None:
        slopes = slopes.view(-1, H)

        def with_slopes(s, b, h, q_idx, kv_idx):
            return s - slopes[b % len(slopes), h].to(s.dtype) * (q_idx - kv_idx).abs()

        after = (Mod(with_slopes, alibi_mod, None, (slopes, H if len(slopes) > 1 else 0)),)
    if score_mod is not None:
        after = *after, Mod(lambda s, *at: score_mod(s, *at, *aux), score_mod, score_mod_bwd, aux)
    return before, after


def make_mods(q, T, TK, n_ranks, mask, extras, softcap, dropout_p, functions):
    """The Mods of a call, from what operators take. T queries and TK keys a rank."""
    if not softcap and not dropout_p and not functions and extras.bias is None and extras.slopes is None:
        return Mods()
    B, H, bias = q.shape[0], q.shape[2], ()
    ends = [mask.length if n_ranks == 1 or T == TK else n_ranks * n for n in (T, TK)]
    if extras.bias is not None:
        shift = (max(TK - T, 0), max(T - TK, 0)) if n_ranks == 1 else (0, 0)  # to the first row and column
        whole = extras.bias.detach().expand(B, H, *(end - first for end, first in zip(ends, shift)))

        def with_bias(s, b, h, q_idx, kv_idx):
            return s + whole[b, h, q_idx - shift[0], kv_idx - shift[1]]

        bias = (Mod(with_bias, bias_mod, None, (whole, *whole.stride(), *shift)),)
    before, after = make_chain(q, softcap, extras.slopes, *functions_numbered(functions), extras.aux, bias)
    return Mods(before, after, dropout_p, extras.seed, tuple(end - 1 for end in ends))


def dropout_numbers(p):
    """Of 24 random bits those from the first number on are kept; what is kept is multiplied by the second."""
    threshold = round(p * 2**24)
    return threshold, 2**24 / (2**24 - threshold)


# what Philox multiplies by, and adds to its keys
PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1 = map(constexpr, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))


def philox(seed, b, h, q_idx, kv_idx):
    """24 random bits for each score: Philox4x32 with 7 rounds (Salmon et al., 2011). See philox_bits."""
    mask, key0, key1 = 0xFFFFFFFF, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    c0, c1, c2, c3 = h, kv_idx, q_idx, b
    for _ in range(7):
        x, y = PHILOX_M0.value * c0, PHILOX_M1.value * c2  # modulo 2**64
        c0, c1, c2, c3 = (y >> 32) & mask ^ c1 ^ key0, y & mask, (x >> 32) & mask ^ c3 ^ key1, x & mask
        key0, key1 = key0 + PHILOX_W0.value & mask, key1 + PHILOX_W1.value & mask
    return c0 >> 8


MAX_BIAS = 2**30  # bytes
MAX_ALIBI = 2**23  # tokens: see alibi_mod

FUNCTIONS = {}  # (score_mod, score_mod_bwd) by number, which operators take; the latest used are last
FUNCTION_NUMBERS = itertools.count(1)


def remember(cache, key, value, most):
    """Put a value into a dict, as the latest of at most so many."""
    cache.pop(key, None)
    cache[key] = value
    if len(cache) > most:
        cache.pop(next(iter(cache)), None)


@torch.compiler.assume_constant_result  # called when a graph is made
def number_of_functions(score_mod, score_mod_bwd):
    """0 for None. The latest 1024 are kept."""
    if score_mod is None:
        return 0
    known = (n for n, (f, f_bwd) in FUNCTIONS.items() if f is score_mod and f_bwd is score_mod_bwd)
    number = next(known, None) or next(FUNCTION_NUMBERS)
    remember(FUNCTIONS, number, (score_mod, score_mod_bwd), 1024)
    return number


def functions_numbered(number):
    if number == 0:
        return None, None
    if number not in FUNCTIONS:
        raise RuntimeError("1024 other score_mods came after this one, which was dropped; define each once")
    FUNCTIONS[number] = FUNCTIONS.pop(number)  # the latest
    return FUNCTIONS[number]


class ScoreMod:
    """A score_mod and its score_mod_bwd in one, or a mask_mod of decode_attn, for torch.compile, which cannot
    handle @triton.jit functions: made once, outside of what is compiled."""

    def __init__(self, score_mod, score_mod_bwd=None):
        self.number = number_of_functions(score_mod, score_mod_bwd)


def number_of(f, f_bwd=None):
    """number_of_functions, also of a ScoreMod."""
    return f.number if isinstance(f, ScoreMod) else number_of_functions(f, f_bwd)


# -----------------------------------------------------------------------------
# bounds: the mask as tables, for each query and key of a rank, at each hop


class Bounds(NamedTuple):
    """int32 tensors of one hop. `sets` of bounds: one a batch group, or one a sequence where documents are
    its own."""

    rows: Any  # (sets, 3, T): query i sees the keys [begin, end); 1 if it sees a key at a later hop
    columns: Any = None  # (sets, 2, TK): key j is seen by the queries [begin, end). Backward
    tiles: Any = None  # (sets, tiles, TILE_COLUMNS): of the resident rows of a Hopper kernel


def make_bounds(hops, mask, B, T, TK, starts, direction, tile, device):
    """Bounds of each hop. starts: where documents begin, (1 or B, n), or None. direction: 1 forward, -1
    backward, which has `columns`. tile: rows of a resident and of a streamed tile of Hopper's kernel; None:
    no `tiles`."""
    layouts = constant(tuple(tuple(row.layouts[1] for row in hop.rows) for hop in hops), device)  # of keys
    ends = []
    for g, group in enumerate(batch_slices(B, layouts.shape[1])):
        own = starts if starts is None or len(starts) == 1 else starts[group]
        p = layout_positions(hops[0].rows[g].layouts[0], T, device)
        first, last = mask.keys(p, own)  # (T,) or (sets, T)
        ends.append(count_le(layouts[:, g, None, None], torch.stack([first - 1, last]).view(2, 1, -1, T), TK))
    begin, end = both = torch.cat(ends, 2)  # (hops, sets, T): neither decreases along T
    some = end > begin
    later = [torch.zeros_like(some[0])] * len(hops)
    order = hop_order(len(hops), direction)
    for j, after in zip(order[-2::-1], order[:0:-1]):
        later[j] = later[after] | some[after]
    by_row = torch.stack([begin.where(some, TK), end.where(some, 0), torch.stack(later)], 2).int()
    by_column = tiles = None
    if direction < 0:
        key = torch.arange(TK, device=device).expand(*both.shape[:3], TK).contiguous()
        stop, first = torch.searchsorted(both, key, right=True)
        some = stop > first
        by_column = torch.stack([first.where(some, T), stop.where(some, 0)], 2).int()
    if tile:
        resident = by_column if direction < 0 else by_row
        tiles = tile_bounds(resident, T if direction < 0 else TK, *tile, direction)
    return [Bounds(*(x if x is None else x[j] for x in (by_row, by_column, tiles))) for j in range(len(hops))]


@functools.cache
def constant(numbers, device):
    """A tensor that CUDA graphs may go on reading."""
    return torch.tensor(numbers, device=device)


def bounds_tile(backend, q, direction, modified):
    """Rows of a resident and of a streamed tile of a Hopper kernel; None for other backends."""
    if backend != "gluon":
        return None
    consumers, streamed, _ = hopper_tiles("fwd" if direction > 0 else "bwd", q.shape[-1], modified)
    return (64 * consumers if direction > 0 else BWD_ROWS.value), streamed


# columns of Bounds.tiles. Streamed tiles that some row sees, [begin, end), and that all rows see,
# [full_begin, full_end). Forward, longest tile first: whether a row sees a key at a later hop; its number.
# Backward, in order: streamed tiles before wait_end wait for `turn`
TILE_COLUMNS = constexpr(8)
BEGIN, FULL_BEGIN, FULL_END, END, LATER, NUMBER = (constexpr(i) for i in range(6))
TURN, WAIT_END = LATER, NUMBER


def tile_bounds(bounds, n, BLOCK, STREAMED, direction):
    """Bounds.tiles of all hops. bounds (hops, sets, 2 or more, rows): by row; n: how many streamed rows."""
    missing = -bounds.shape[-1] % BLOCK
    by_tile = [torch.nn.functional.pad(bounds[:, :, i], (0, missing), value=n * (i == 0)) for i in (0, 1)]
    begin, end = (x.unflatten(-1, (-1, BLOCK)) for x in by_tile)
    (first, full_begin), (full_end, last) = begin.aminmax(dim=-1), end.aminmax(dim=-1)
    last = (last + STREAMED - 1) // STREAMED  # (hops, sets, tiles)
    first = torch.minimum(first // STREAMED, last)
    full_begin = torch.minimum((full_begin + STREAMED - 1) // STREAMED, last).maximum(first)
    full_end = (full_end // STREAMED).maximum(full_begin).minimum(last)
    if direction > 0:
        later = torch.nn.functional.pad(bounds[:, :, 2], (0, missing)).unflatten(-1, (-1, BLOCK)).amax(-1)
        order = (last - first).sort(stable=True, descending=True).indices
        columns = [first, full_begin, full_end, last, later]
        columns = [*(x.gather(-1, order) for x in columns), order]
    else:  # dq gets its parts in the order of the key tiles. Tiles without queries are left out
        number = torch.arange(1, first.shape[-1] + 1, device=first.device).expand_as(first)
        turn = number.where(last > first, 0).cummax(-1).values  # 1 + the last tile so far with queries
        turn = torch.nn.functional.pad(turn[..., :-1], (1, 0))
        before = torch.nn.functional.pad(last, (1, 0)).gather(-1, turn)
        columns = [first, full_begin, full_end, last, turn, before]
    return torch.stack([x.int() for x in (*columns, first, first)], -1)  # the last two fill up 32 bytes


# -----------------------------------------------------------------------------
# hop loops: generators. At each `yield` a virtual ring lets other ranks catch up; the last yields the result


class Backend(NamedTuple):
    """The functions of one hop, and those that a backward begins and ends with: torch_*, or kernels. Between
    hops sums stay in acc, dq_acc, dk_acc, dv_acc, float32; complete ones go to o, dq, dk, dv. A sum and its
    result may be one tensor."""

    forward: Callable
    preprocess: Callable  # (what `backward` needs: lse, delta, where dq is added up; `coming` of pass_on)
    backward: Callable
    postprocess: Callable  # writes dq where `backward` does not


class Extras(NamedTuple):
    """Tensors beside q, k, v, which each rank has whole."""

    sinks: Any = None
    cu_seqlens: Any = None
    bias: Any = None
    slopes: Any = None
    seed: Any = None
    aux: tuple = ()

    @classmethod
    def of(cls, flat):
        n = len(cls._fields) - 1
        return cls(*flat[:n], tuple(flat[n:]))

    def flat(self):
        return [*self[:-1], *self.aux]


def forward_hops(ring, q, k, v, extras, schedule, mask, mods, sm_scale, backend, transport):
    """o (B, T, H, D) like q, and lse (B, H, T)."""
    B, T, H, D = q.shape
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    padding = padding_of(schedule, ring.rank, ring.n_ranks, mask, B, T)
    q, k, v = (without_padding(padding, x) for x in (q, k, v))
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, H, T, dtype=acc_dtype, device=q.device)
    acc = accumulator(o, acc_dtype, ring.n_ranks, backend)
    link = ring.link(transport, schedule, k, v, T, mask, 1)
    for j, hop in enumerate(ring.on_device(link.hops, q, k, extras.cu_seqlens, mask, 1, backend, mods)):
        k_hop, v_hop = link.keys(j)
        if hop.visible:
            first = extras.sinks if j == 0 else None  # they are in the state from the first hop on
            BACKENDS[backend].forward(q, k_hop, v_hop, o, acc, lse, first, hop, mask, mods, sm_scale)
        yield
    link.finish()
    for rows, n in padding:
        lse[rows, :, n:] = -math.inf  # also with sinks
    yield o, lse


def backward_hops(ring, q, k, v, o, lse, do, dlse, extras, schedule, mask, mods, sm_scale, backend,
                  transport, deterministic, bias_grad):  # fmt: skip
    """dq, dk, dv, dsinks, dbias. Every hop adds to dk, dv of its keys and sends them on; the next hop waits
    for those of its own. The own keys come last. Theirs may still be on the way when their kernel starts: see
    pass_on."""
    kernels, R, T = BACKENDS[backend], ring.n_ranks, q.shape[1]
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    padding = padding_of(schedule, ring.rank, ring.n_ranks, mask, len(q), T)
    q, k, v, do = (without_padding(padding, x) for x in (q, k, v, do))
    dlse = dlse if dlse is None else without_padding(padding, dlse.transpose(1, 2)).transpose(1, 2)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    state, coming = kernels.preprocess(o, do, lse, dlse, dq, R)
    link = ring.link(transport, schedule, k, v, T, mask, -1, acc_dtype)
    hops = ring.on_device(link.hops, q, k, extras.cu_seqlens, mask, -1, backend, mods)
    dbias = lse.new_zeros(extras.bias.shape if bias_grad else 0)
    link.keys(0)  # the next rank's are on their way
    yield
    for j in hop_order(R, -1):
        k_hop, v_hop = link.keys(j) if j else (k, v)
        grads = link.grads(j or R) if R > 1 else [accumulator(x, acc_dtype, 1, backend) for x in (dk, dv)]
        if hops[j].visible:
            out = grads if j else (dk, dv)
            args = hops[j], j, mask, mods, sm_scale, deterministic
            kernels.backward(q, k_hop, v_hop, do, state, dq, *out, *grads, *args)
            if bias_grad:
                delta = state[0][1].view(*lse.shape[:2], -1)[:, :, :T]
                add_bias_gradient(dbias, q, k_hop, v_hop, do, lse, delta, hops[j], mods, sm_scale)
        if j:
            link.pass_on(j, coming if j == R - 1 else None)
        yield
    kernels.postprocess(state, dq, sm_scale)
    link.finish()
    yield dq, dk, dv, sink_gradient(extras.sinks, lse, state[0][1]), dbias


def sink_gradient(sinks, lse, delta):
    """dsinks (H,), of these queries, like lse; sinks None: (0,). A sink is a key whose value is 0."""
    if sinks is None:
        return lse.new_empty(0)
    p = (sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -math.inf, math.inf)).exp()  # (B, H, T)
    delta = delta.view(*lse.shape[:2], -1)[:, :, : lse.shape[2]]
    return -(p * delta).sum((0, 2))


def add_bias_gradient(dbias, q, k, v, do, lse, delta, hop, mods, sm_scale):
    """What a hop adds to dbias, (B or 1, H or 1, queries or 1, keys or 1): in plain torch, whatever the
    backend, as a bias is no longer than plain torch can bear. Sums over what was broadcast, in a fixed
    order."""
    shift_q, shift_k = mods.before[-1].args[-2:]
    for b, m, n, seen, at in torch_blocks(q, k, hop, mods):
        rows = lse[b, :, m], delta[b, :, m]
        *_, part = reference_bwd(q[b, m], k[b, n], v[b, n], do[b, m], *rows, seen, sm_scale, at)
        part = part.flatten(1, 2)
        for dim, size in enumerate(dbias.shape):
            part = part.sum(dim, keepdim=True) if size == 1 else part
        rows, columns = at.at[2] - shift_q, at.at[3] - shift_k
        rows = rows if dbias.shape[2] > 1 else rows[:1] * 0
        columns = columns if dbias.shape[3] > 1 else columns[:1] * 0
        dbias[b if dbias.shape[0] > 1 else slice(None)][:, :, rows, columns] += part


@functools.lru_cache(maxsize=1024)
def padding_of(schedule, rank, n_ranks, mask, B, T):
    """(rows of the batch, local token at which their padding begins): the end of every rank's tokens."""
    if mask.length == mask.S:
        return []
    layouts = rank_layouts(schedule, rank, n_ranks, T)
    starts = count_le(torch.tensor(layouts, device="cpu"), mask.length - 1, T).tolist()
    return list(zip(batch_slices(B, len(layouts)), starts))


def without_padding(padding, x):
    """x (B, T, ...) with zeros where padding is, which may hold anything; x itself where there is none."""
    x = x.clone() if padding else x
    for rows, n in padding:
        x[rows, n:] = 0
    return x


def accumulator(x, acc_dtype, n_hops, backend):
    """Where hops keep the sum for x, in acc_dtype, until it is complete: x itself if it has that dtype."""
    if x.dtype == acc_dtype:
        return x
    if n_hops == 1 and backend != "torch":  # kernels keep the sum of a single hop in registers
        return unused_argument(acc_dtype, x.device)
    return torch.empty(x.shape, dtype=acc_dtype, device=x.device)


@functools.cache
def unused_argument(dtype, device):
    return torch.empty(0, dtype=dtype, device=device)


# -----------------------------------------------------------------------------
# one hop in plain torch: the backend "torch". The kernels of parts II and III take the same arguments


def torch_blocks(q, k, hop, mods, block=512):
    """Blocks of queries and the keys that they see: slices of batch, queries, keys; seen; Mods there."""
    (B, T, H, _), TK, device = q.shape, k.shape[1], q.device
    heads = torch.arange(H, device=device).view(k.shape[2], -1, 1, 1)
    n_sets = len(hop.bounds.rows)
    for i, b in enumerate(batch_slices(B, n_sets)):
        rows, layouts = hop.bounds.rows[i], hop.rows[i * len(hop.rows) // n_sets].layouts
        q_idx, k_idx = (layout_positions(x, n, device) for x, n in zip(layouts, (T, TK)))
        sequences = torch.arange(b.start, b.stop, device=device).view(-1, 1, 1, 1, 1)
        n_real = int((q_idx <= mods.last[0]).sum()) if mods else T  # the others are padding
        for start in range(0, n_real, block):
            m = slice(start, min(start + block, n_real))
            begin, end, _ = rows[:, m, None]  # (M, 1)
            n = slice(int(begin.min()), int(end.max()))
            if n.start < n.stop:
                j = torch.arange(n.start, n.stop, device=device)
                at = mods._replace(at=(sequences, heads, q_idx[m, None], k_idx[n])) if mods else mods
                yield b, m, n, (begin <= j) & (j < end), at


def torch_fwd(q, k, v, o, acc, lse, sinks, hop, mask, mods, sm_scale):
    if not hop.rows[0].carry:
        acc.zero_()
        lse[:] = -math.inf if sinks is None else sinks[:, None]
    for b, m, n, seen, at in torch_blocks(q, k, hop, mods):
        state = acc[b, m], lse[b, :, m]
        acc[b, m], lse[b, :, m] = reference_fwd(q[b, m], k[b, n], v[b, n], *state, seen, sm_scale, at)
    o.copy_(acc)


def torch_preprocess(o, do, lse, dlse, dq, n_hops):
    """lse and delta = rowsum(do * o) - dlse; so a gradient of lse, too, enters ds = p * (dp - delta)."""
    delta = einsum(o.to(lse.dtype), do.to(lse.dtype), "b t h d, b t h d -> b h t")
    delta = delta if dlse is None else delta - dlse
    return ((lse, delta), accumulator(dq, lse.dtype, n_hops, "torch")), None


def torch_bwd(q, k, v, do, state, dq, dk, dv, dk_acc, dv_acc, hop, j, mask, mods, sm_scale, deterministic):
    lse_delta, dq_acc = state
    for row, b in zip(hop.rows, batch_slices(len(q), len(hop.rows))):
        held = row.held_begin, row.held_end
        for x, (begin, end) in ((dq_acc, (0, row.carry)), (dk_acc, held), (dv_acc, held)):
            x[b, :begin].zero_()  # nobody has added anything there
            x[b, end:].zero_()
    for b, m, n, seen, at in torch_blocks(q, k, hop, mods):
        rows = [x[b, :, m] for x in lse_delta]
        grads = reference_bwd(q[b, m], k[b, n], v[b, n], do[b, m], *rows, seen, sm_scale, at)
        for x, at, grad in zip((dq_acc, dk_acc, dv_acc), (m, n, n), grads):
            x[b, at] += grad
    for x, acc in ((dq, dq_acc), (dk, dk_acc), (dv, dv_acc)):
        x.copy_(acc)


def no_postprocess(*args):
    pass


# -----------------------------------------------------------------------------
# the p2p transport. A transport is a class; a hop loop makes an object of it, its `link`, with four methods:
#   keys(j)      k, v of hop j, which have arrived; starts to move those of hop j + 1
#   grads(j)     dk, dv of the keys of hop j, as earlier ranks left them; grads(n_ranks): of the own keys
#   pass_on(j, coming)  sends dk, dv of hop j on; this rank has added its part. coming: None, or the address
#                of an int: the next kernel waits until it is 0. A link that keeps it at 1 until grads(j + 1)
#                have arrived may return them before
#   finish()     after this, no other rank reads or writes this rank's memory


class P2P:
    """Neighbours pass keys on by send and receive (NCCL or gloo, any number of hosts). A rank holds at most
    two shards of other ranks, and two of gradients."""

    def __init__(self, ring, schedule, k, v, T, mask, direction, acc_dtype=None):
        """T: of the queries. acc_dtype: the dtype of gradients on the way, if there will be any."""
        self.ring, self.kv, self.direction = ring, (k, v), direction
        self.hops = plan(schedule, ring.rank, ring.n_ranks, T, mask, direction, k.shape[1])
        n_kv = min(2, ring.n_ranks - 1)
        self.kv_staging = [[torch.empty_like(x) for x in (k, v)] for _ in range(n_kv)]
        n_grad = 2 if n_kv and acc_dtype else 0
        self.grad_staging = [[torch.empty_like(x, dtype=acc_dtype) for x in (k, v)] for _ in range(n_grad)]

    def keys(self, j):
        hop = self.hops[j]
        if j > 0:
            self.wait_keys()
            self.kv = self.kv_staging[(j - 1) % 2]
        if j < len(self.hops) - 1:  # posted before the kernel of this hop, under which they move
            send, recv = rows_of(self.kv, hop.send), rows_of(self.kv_staging[j % 2], hop.recv)
            self.wait_keys = self.ring.exchange(send, recv, self.direction, ("keys", j + 1))
        return self.kv

    def grads(self, j):
        if j > 1:
            self.wait_grads()
        return self.grad_staging[j % 2]

    def pass_on(self, j, coming):
        send = rows_of(self.grad_staging[j % 2], self.hops[j].send_grad)
        recv = rows_of(self.grad_staging[(j + 1) % 2], self.hops[j].recv_grad)
        self.wait_grads = self.ring.exchange(send, recv, self.direction, ("gradients", j + 1))

    def finish(self):
        pass


def rows_of(tensors, rows):
    """The row_ranges of contiguous tensors (B, T, ...), as views."""
    B, T = tensors[0].shape[:2]
    ranges = row_ranges(rows, B, T)
    if ranges == ((0, B * T),):
        return list(tensors)  # most often, and views take time
    return [x.flatten(0, 1)[first : first + n] for x in tensors for first, n in ranges]


@functools.lru_cache(maxsize=1024)
def row_ranges(rows, B, T, n_tensors=1):
    """(first row, number of rows) of the ranges of memory that hold the tokens [begin, end) = rows[g] of each
    sequence of batch group g, of n_tensors (B, T, ...) tensors in a row."""
    found, groups = [], list(zip(batch_slices(B, len(rows)), rows))
    for i, (group, (begin, end)) in itertools.product(range(n_tensors), groups):
        for first in range((i * B + group.start) * T, (i * B + group.stop) * T, T):
            if end > begin and found and sum(found[-1]) == first + begin:
                found[-1] = found[-1][0], found[-1][1] + end - begin
            elif end > begin:
                found.append((first + begin, end - begin))
    return tuple(found)


# -----------------------------------------------------------------------------
# rings: who the ranks are, all in one process or a process each


class VirtualRing:
    """A ring of n_ranks on one device, in one process: the same hop loops, in lockstep. For tests.

    Pass it as `group`; q, k, v then hold all S tokens, and so does o. Operators take its number, -n_ranks.
    """

    def __init__(self, n_ranks):
        if n_ranks < 1:
            raise ValueError(f"{n_ranks=} must be 1 or more")
        self.n_ranks, self.number = n_ranks, -n_ranks
        self.rank, self.prev_rank, self.next_rank = 0, n_ranks - 1, 1 % n_ranks
        self.agreed, self.recent, self.in_graphs = {}, {}, {}

    def on_device(self, hops, q, k, cu_seqlens, mask, direction, backend, modified=False):
        """hops with their tables, and Bounds where they are read, on the device. The ring keeps the Bounds
        that CUDA graphs go on reading, and the latest others: every step may have new documents."""
        if mask.kind != INTERVAL.value and backend != "torch":
            return kept_tables(hops, q.device)
        (B, T), TK, tile = q.shape[:2], k.shape[1], bounds_tile(backend, q, direction, modified)
        key = hops, mask, B, T, TK, direction, backend, tile, q.device
        capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(q.device) if q.is_cuda else None
        if (kept := self.in_graphs.get(key) or self.recent.get(key)) is None:
            in_tensor = mask.documents == "on device"
            starts = document_starts(cu_seqlens, mask.S) if in_tensor else mask.starts()
            starts = starts if starts is None else starts.to(q.device)
            hops = (with_tables if isinstance(mask.documents, tuple) else kept_tables)(hops, q.device)
            made = make_bounds(hops, mask, B, T, TK, starts, direction, tile, q.device)
            hops = tuple(hop._replace(bounds=bounds) for hop, bounds in zip(hops, made))
            if in_tensor or capturing:
                return hops  # made anew in every call, and in every replay
            kept = hops, stream, stream and stream.record_event()
            remember(self.recent, key, kept, 8)
        hops, made_on, event = kept
        if capturing:
            self.in_graphs[key] = kept
        elif stream != made_on:
            stream.wait_event(event)
            for x in (x for hop in hops for x in (hop.table, *hop.bounds) if x is not None):
                x.record_stream(stream)  # it may be dropped while that stream reads it
        return hops

    def agree(self, signature, problem):
        if problem:
            raise ValueError(problem)

    def prepare(self, *args):
        pass

    def run(self, hops, tensors, extras, schedule, *args):
        mail, loops = {}, []
        for rank in range(self.n_ranks):
            cut = [x if x is None else swap(shard(swap(x), schedule, rank, self.n_ranks)) for x in tensors]
            loops.append(hops(VirtualRank(self, rank, mail), *cut, extras, schedule, *args))
        *_, results = zip(*loops)  # takes all ranks one hop further at a time
        merged = []
        for i, shards in enumerate(zip(*results)):
            parts = i > 2  # dsinks, dbias: each rank has the part of its queries
            merged.append(sum(shards) if parts else swap(merge([swap(x) for x in shards], schedule)))
        return tuple(merged)


class VirtualRank:
    """One rank of a VirtualRing, in one hop loop. Its shards move as in P2P, through `mail`."""

    def __init__(self, ring, rank, mail):
        self.rank, self.n_ranks, self.on_device = rank, ring.n_ranks, ring.on_device
        self.mail, self.n_posted = mail, 0

    def link(self, transport, *args):
        return P2P(self, *args)

    def exchange(self, send, recv, direction, what):
        number, source = self.n_posted, (self.rank - direction) % self.n_ranks
        self.mail[self.rank, number] = send  # for the neighbour's exchange of the same number
        self.n_posted += 1
        return lambda: [x.copy_(y) for x, y in zip(recv, self.mail.pop((source, number)), strict=True)]


def swap(x):
    """(B, H, T) as (B, T, H), for `shard` and `merge`, and back. (B, T, H, D) stays."""
    return x if x.ndim == 4 else x.transpose(1, 2).contiguous()


RINGS = weakref.WeakValueDictionary()  # by number, which operators take, as they cannot take objects
RING_OF = weakref.WeakKeyDictionary()  # the Ring of each process group, while that lives
RING_NUMBERS = itertools.count()


class Ring:
    """The processes of `group`, or this process alone. `resolve_ring` makes one per group.

    transport: "p2p" or "symmetric", chosen by the first call on more than one rank; why: the reason.
    """

    def __init__(self, group=None):
        self.group_ref, self.rank, self.n_ranks, self.processes = None, 0, 1, [0]
        self.number = next(RING_NUMBERS)
        RINGS[self.number] = self
        if group is not None:
            self.group_ref = weakref.ref(group)  # only whoever made a group keeps it alive
            self.rank, self.n_ranks = dist.get_rank(group), dist.get_world_size(group)
            self.processes = dist.get_process_group_ranks(group)
        self.prev_rank, self.next_rank = (self.rank - 1) % self.n_ranks, (self.rank + 1) % self.n_ranks
        self.transport, self.why = None, "nothing has moved yet"
        self.settled_for = None  # the type of device that the transport was chosen for
        self.agreed = {}  # what every rank has confirmed, oldest first
        self.recent, self.in_graphs = {}, {}  # see on_device
        self.memory, self.retired = None, []  # SymmetricMemory, and those that CUDA graphs may still use
        self.waiter = None  # tells the watchdog what p2p waits for on a GPU

    @property
    def group(self):
        group = self.group_ref and self.group_ref()
        if self.group_ref and group is None:
            raise RuntimeError("the process group of this ring was destroyed; pass a new one")
        return group

    def __deepcopy__(self, memo):
        return self  # copies of a model share its ring

    def __reduce__(self):
        return resolve_ring, (None,)  # a pickle leaves the group out: the default one takes its place

    def link(self, transport, schedule, k, *args):
        """The transport of one hop loop."""
        symmetric = self.memory is not None and k.is_cuda and transport != "p2p"
        return (Symmetric if symmetric else P2P)(self, schedule, k, *args)

    on_device = VirtualRing.on_device

    def exchange(self, send, recv, direction, what):
        """Post: `send` goes to the next rank (direction 1) or the previous one (-1), `recv` fills from the
        other side. Returns a function that waits; on CUDA it makes the current stream wait.
        what: (name, hop) of the tensors to receive, for messages."""
        to, source = (self.next_rank, self.prev_rank)[::direction]
        group, reason, began = self.group, (*what, source), time.monotonic()
        ops = [dist.P2POp(dist.isend, x, self.processes[to], group) for x in send]
        ops += [dist.P2POp(dist.irecv, x, self.processes[source], group) for x in recv]

        def with_ranks_named(f, *args):
            try:
                return f(*args)
            except RuntimeError as error:  # gloo's, which names an address at most
                lost = lost_message(self, reason, time.monotonic() - began)
                raise RuntimeError(lost + missing_text(group, error)) from error

        works = with_ranks_named(dist.batch_isend_irecv, ops) if ops else []

        def wait(tensors=(send, recv)):  # the default keeps them alive until here
            with self.waiter.waits_for(reason) if self.waiter and works else NO_CONTEXT:
                for work in works:
                    with_ranks_named(work.wait)

        return wait

    def run(self, hops, tensors, *args):
        """The result of a hop loop."""
        *_, result = hops(self, *tensors, *args)
        return result

    # agreement between the ranks

    def gather(self, x):
        """x of every rank, by rank: anything that can be pickled."""
        if self.n_ranks == 1:
            return [x]
        group, everyone, began = self.group, [None] * self.n_ranks, time.monotonic()
        bound = group.bound_device_id  # NCCL takes no other, whatever device is the current one
        try:
            with torch.cuda.device(bound) if bound else NO_CONTEXT:
                dist.all_gather_object(everyone, x, group=group)
        except RuntimeError as error:
            waited = f"waited {time.monotonic() - began:.0f} s for the others{missing_text(group, error)}"
            raise RuntimeError(f"rank {self.rank} of {self.n_ranks} {waited}") from error
        return everyone

    def agree(self, signature, problem):
        """Raise ValueError on every rank if any has a problem (text) or their signatures (dicts) differ."""
        # also makes NCCL's communicator, with every rank present
        signatures, problems = zip(*self.gather((signature, problem)))
        if any(problems):
            raise ValueError(by_rank(problems))
        first = signatures[0]
        for rank, other in enumerate(signatures):
            differ = [name for name in first | other if other.get(name) != first.get(name)]
            if differ:
                mine, theirs = (", ".join(f"{name}={s.get(name)}" for name in differ) for s in (first, other))
                differ = f"rank 0 has {mine}; rank {rank} has {theirs}"
                raise ValueError(f"ranks disagree: {differ}; pass the same on every rank")

    def settle(self, device, transport=None):
        """On all ranks together: choose the transport, once. Raises ValueError if `transport` is "symmetric"
        and cannot be had."""
        if self.n_ranks > 1 and self.settled_for != device.type:
            self.transport, self.why = choose_transport(self.gather(transport_facts(device)))
            if device.type == "cuda" and self.waiter is None and cuda_driver():
                self.waiter = Waiter(self)
            self.settled_for = device.type
        if transport == "symmetric" and self.transport == "p2p":
            raise ValueError(f'transport="symmetric" cannot be had: {self.why}; use "p2p", or None to choose')

    def prepare(self, x, transport, *sizes):
        """On all ranks together, once per shape: choose the transport for tensors like x, and have memory of
        these sizes for it, see SymmetricMemory."""
        with torch.cuda.device_of(x):  # events and memory are made there, whatever device is the current one
            self.settle(x.device, transport)
            if self.transport == "symmetric" and x.is_cuda and transport != "p2p":
                reserve(self, x.device, sizes)
                self.settle(x.device, transport)


virtual_ring = functools.cache(VirtualRing)
ALONE = Ring()  # a ring of one, whatever the process group


def by_rank(problems):
    """The problems of all ranks (texts or None) as one text: "" for none, and once what all ranks say."""
    if len(set(problems)) == 1:
        return problems[0] or ""
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)


def ring_numbered(number):
    return virtual_ring(-number) if number < 0 else RINGS[number]


def resolve_ring(group):
    """The ring of what users pass as `group`: None (the default process group, or this process alone if there
    is none), a ProcessGroup, which has one Ring, a VirtualRing or a Ring. Raises ValueError for all else."""
    return group if isinstance(group, (VirtualRing, Ring)) else process_ring(group)


@torch.compiler.assume_constant_result  # called when a graph is made, which keeps the ring's number
def process_ring(group):
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return ALONE
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{group=} must be None, a ProcessGroup of this process, a VirtualRing or a Ring")
    if group not in RING_OF:
        RING_OF[group] = Ring(group)
    return RING_OF[group]


# -----------------------------------------------------------------------------
# public functions


def ring_attn(q, k, v, schedule="zigzag", group=None, causal=True, sm_scale=None, return_lse=False, *,
              backend=None, transport=None, deterministic=True, window=None, cu_seqlens=None, sinks=None,
              seq_len=None, softcap=None, bias=None, alibi_slopes=None, score_mod=None, score_mod_bwd=None,
              aux=(), dropout_p=0.0, dropout_seed=None, debug=False):  # fmt: skip
    """softmax(sm_scale * q k^T) v over a sequence sharded over the ranks of `group`. Differentiable once.

    q: (B, T, H, D), k, v: (B, T, HKV, D): this rank's tokens, see `shard`; T, B the same on every rank.
       bfloat16, float16 or float32 (float64 in the torch path). H a multiple of HKV; D up to 256. Any
       strides. torch.autocast casts them as for scaled_dot_product_attention. k, v may have another T: on a
       ring if causal=False; on one GPU the last query is then at the last key (bottom right), and rows that
       see no key give o = 0, lse = -inf.
    schedule: a key of SCHEDULES. Under causal=False all of them give the same result.
    group: a process group; None: the default one, or a ring of one if there is none; a VirtualRing; a Ring.
    sm_scale: above 0; None means D ** -0.5.
    return_lse: also return lse (B, H, T) float32 (float64 for float64 inputs), the natural log of the
       softmax's denominator; gradients flow through it.
    backend: "torch", "triton" (any GPU, and CPU tensors under TRITON_INTERPRET=1) or "gluon" (Hopper);
       None chooses the fastest one.
    transport: "p2p" (send and receive between neighbours: NCCL, gloo) or "symmetric" (CUDA, one host: copies
       by the GPUs); None: symmetric where all GPUs can read each other. resolve_ring(group) says which one
       None means, in .transport, and why, in .why.
    deterministic: the same inputs give the same gradients, to the bit. False: Hopper's kernel adds up dq in
       any order, which is mostly faster under a causal mask. Under torch.use_deterministic_algorithms(True) a
       forward whose gradients are wanted then raises.
    window: W, an int of 1 or more, with causal=True: query i sees the keys i - W < j <= i. Or a pair (left,
       right): i - left <= j <= i + right, each 0 or more, -1 or None for all; causal=True sets right to 0.
    cu_seqlens: int32 (n + 1,), or (B, n + 1) for each sequence its own: documents packed into the sequences,
       the d-th at positions cu_seqlens[d]..cu_seqlens[d + 1] - 1. Queries see their own document. The same on
       every rank; begins with 0, ends with the true or the padded length; equal neighbours are an empty one.
       On a CPU it is checked, and rows outside the interval that a rank's queries see do not move. On a GPU
       it is clipped, not checked, and does not reduce what moves; but there is no host sync, and CUDA graphs
       may be replayed with other values.
    sinks: (H,), a logit for each head in the softmax's denominator, and in lse; learnable. The gradient is
       the part of this rank's queries, as of any weight; a VirtualRing returns the sum.
    seq_len: the true global length, where the end of the sequence is padding: see `shard`. Padding may hold
       anything; there o = 0, lse = -inf, and gradients are 0.
    debug: check cu_seqlens on a GPU, too, in every eager call: waits for the GPU and for the other ranks.

    Scores change in this order: sm_scale * q k^T, softcap, bias, alibi_slopes, score_mod, masks, sinks,
    softmax, dropout. Positions are global; where one GPU has T queries and TK keys, aligned at their ends.
    softcap: s becomes softcap * tanh(s / softcap); above 0; None or 0.0: off.
    bias: a floating point tensor that broadcasts to (B, H, queries, keys), in global order, without padding,
       whole on every rank, up to 1 GiB; added to scores. Its gradient is the part of this rank's queries, as
       that of sinks; it is computed in plain torch, which is slow, and not beside a score_mod in kernels.
    alibi_slopes: (H,) or (B, H) float32; adds -slope * |i - j| (ALiBi, arXiv 2108.12409). No gradient. For
       up to 2**23 tokens in kernels.
    score_mod: f(score, b, h, q_idx, kv_idx, *aux), the new score, as in decode_attn: a @triton.jit function
       for the kernels, a plain one for the torch path. It may return -inf, as a mask does, but a window or
       cu_seqlens costs less. Define it once, not in every call. Under torch.compile pass ScoreMod(f, g), made
       outside.
    score_mod_bwd: g(dscore, score, b, h, q_idx, kv_idx, *aux): the gradient of f's score from that of its
       result; score is what f was given. @triton.jit; kernels need it where a gradient is wanted. The torch
       path differentiates f itself.
    aux: a tuple of tensors on q's device, whole on every rank, which f and g load from. They get no gradient.
    dropout_p: probabilities are dropped with this probability (below 1), others divided by 1 - dropout_p.
    dropout_seed: an int, or an int64 tensor of one element on q's device (in a CUDA graph: it may change
       between replays). Which are dropped depends on the seed and on batch row, head and positions alone: not
       on schedule, ranks or backend. The same on every rank of a ring; data-parallel replicas take others.
       None: from torch's generator, the first rank's for the whole ring.
    Returns o, (B, T, H, D), in the dtype of q.

    Calls of one ring share staging memory and flags. Eager calls may be on any stream, as each waits for the
    one before. A CUDA graph cannot wait: replay it on the stream of the eager calls, or order the streams.

    Raises ValueError on every rank if any rank's inputs do not fit or the ranks' inputs differ: checked once
    per new combination of shapes and options. A rank that changes them alone later is only found by the
    process group's timeout. Raises RuntimeError where a second derivative is asked for.
    """
    return attend(
        q, k, v, schedule, resolve_ring(group), causal, sm_scale, return_lse, backend=backend,
        transport=transport, deterministic=deterministic, window=window, cu_seqlens=cu_seqlens, sinks=sinks,
        seq_len=seq_len, softcap=softcap, bias=bias, alibi_slopes=alibi_slopes, score_mod=score_mod,
        score_mod_bwd=score_mod_bwd, aux=aux, dropout_p=dropout_p, dropout_seed=dropout_seed, debug=debug,
    )  # fmt: skip


def flash_attn_func(q, k, v, bias=None, causal=True, sm_scale=None, *, return_lse=False, **options):
    """ring_attn on a ring of one, whatever the process group: (B, T, H, D). All else: as for ring_attn."""
    return attend(q, k, v, "contiguous", ALONE, causal, sm_scale, return_lse, bias=bias, **options)


def public_name(schedule):
    """A schedule in public names (ring_attn_func, AttentionType.RING): its key, but "ring" for contiguous."""
    return "ring" if schedule == "contiguous" else schedule


def named_attn_func(schedule):
    """The public function of one schedule, NAME_attn_func."""

    def func(q, k, v, n_ranks, rank, prev_rank, next_rank, bias=None, causal=True, sm_scale=None, *,
             group=None, **options):  # fmt: skip
        ring = ALONE if n_ranks == 1 and group is None else resolve_ring(group)
        given, problem = (n_ranks, rank, prev_rank, next_rank), None
        actual = ring.n_ranks, ring.rank, ring.prev_rank, ring.next_rank
        if given != actual:
            way_out = "pass those, or make the group first, by torch.distributed.init_process_group()"
            problem = f"n_ranks, rank, prev_rank, next_rank are {given}; in this process group they are "
            problem += f"{actual}: {way_out}"
        return attend(q, k, v, schedule, ring, causal, sm_scale, problem=problem, bias=bias, **options)

    func.__name__ = func.__qualname__ = f"{public_name(schedule)}_attn_func"
    func.__doc__ = f"""ring_attn(q, k, v, schedule="{schedule}") with the ring's ranks as arguments.

    q: (B, T, H, D), k, v: (B, T, HKV, D), this rank's tokens, see `shard`. Ranks are those within `group`
    (default: all processes); n_ranks = 1 without a group is a local call, whatever the process group.
    All other arguments: as for ring_attn. Returns o (B, T, H, D). Raises ValueError as
    ring_attn does, and for other ranks than the group's.
    """
    return func


ATTN_FUNCS = {schedule: named_attn_func(schedule) for schedule in SCHEDULES}
globals().update({f.__name__: f for f in ATTN_FUNCS.values()})  # ring_attn_func, striped_attn_func, ...


@torch.compiler.disable  # a graph break, where a model calls it under torch.compile
def unshard(x, schedule, group=None, *, seq_len=None):
    """The inverse of `shard`: every rank's (B, T, ...) -> the whole (B, S, ...), on every rank. Memory O(S).
    seq_len: the true length, to cut off what `shard` has padded.

    Differentiable once, for a loss that every rank computes alike from the whole: the gradient is this rank's
    part. Raises ValueError on every rank if the schedule cannot divide x, or the ranks' shapes differ.
    """
    ring = resolve_ring(group)
    signature = dict(x=summary(x), schedule=repr(schedule), seq_len=repr(seq_len))
    key = tuple(signature.values())
    agree_once(ring, key, signature, None, lambda: check_unshard(x, schedule, ring, seq_len))
    return (x if ring.n_ranks == 1 else Unshard.apply(x.contiguous(), schedule, ring))[:, :seq_len]


def work(schedule, n_ranks, T=256):
    """By rank and hop of a causal forward: (whose keys, the share of the scores that is computed)."""

    def share(row):
        q_pos, k_pos = (layout_positions(layout, T) for layout in row.layouts)
        return (k_pos <= q_pos[:, None]).double().mean().item()

    plans = [plan(schedule, rank, n_ranks, T, make_mask(n_ranks * T), 1) for rank in range(n_ranks)]
    return [[(hop.source, sum(map(share, hop.rows)) / len(hop.rows)) for hop in hops] for hops in plans]


def draw(n_ranks=4, T=256):
    """A table per schedule: whose keys a rank has at each hop, and the share of scores that it computes."""
    lines = []
    for schedule, (B, *_) in SCHEDULES.items():
        hops = "".join(f"hop {j}   " for j in range(n_ranks))
        lines.append(f"{schedule:12}{hops}work   shards received")
        received = keys_moved(schedule, n_ranks, T, B)
        for rank, row in enumerate(work(schedule, n_ranks, T)):
            cells = (f"k{source} " + "█" * round(4 * share) if share else "·" for source, share in row)
            cells = "".join(f"{cell:8}" for cell in cells) + f"{sum(share for _, share in row):<7.1f}"
            lines.append(f"  rank {rank}    {cells}{received[rank] / T / B:g}")
        lines.append("")
    return "\n".join(lines)


# =============================================================================
# Part II: portable Triton kernels, for every GPU, and for CPU tensors in Triton's interpreter

Q_LAYOUT, K_LAYOUT, NEXT_START, CARRY, HELD_BEGIN, HELD_END, FILL_BEGIN, FILL_END, HOME = (
    constexpr(HopRow._fields.index(x))
    for x in "q_start k_start next_start carry held_begin held_end fill_begin fill_end home".split()
)
HOP_COLUMNS = constexpr(len(HopRow._fields))  # HOP points to a table of HopRows, one per batch group


@triton.jit
def position(layout, i, T):
    """Global position of local token i; `layout` points to a Layout."""
    return tl.load(layout) + tl.load(layout + 1) * i + tl.where(i >= T // 2, tl.load(layout + 2), 0)


@triton.jit
def n_le(layout, x, T):
    """How many of the T local tokens are at or before x. Clipped before `//`, which rounds toward zero."""
    start, stride, jump, half = tl.load(layout), tl.load(layout + 1), tl.load(layout + 2), T // 2
    first = tl.maximum(x - start + stride, 0)
    second = tl.maximum(x - start - jump - stride * half + stride, 0)
    if stride > 1:  # most schedules have 1, and divisions are slow
        first, second = first // stride, second // stride
    return tl.minimum(first, half) + tl.minimum(second, T - half)


@triton.jit
def keys_seen(hop, i, T, TK, MASK: constexpr):
    """How many of the TK keys query i sees, at the hop of a HopRow: the first ones. Not for INTERVAL."""
    return n_le(hop + K_LAYOUT, position(hop + Q_LAYOUT, i, T), T) if MASK == CAUSAL else TK + 0 * i


@triton.jit
def first_query(hop, j, T, MASK: constexpr):
    """The first of T queries to see key j; all later ones do, too. Not for INTERVAL."""
    return n_le(hop + Q_LAYOUT, position(hop + K_LAYOUT, j, T) - 1, T) if MASK == CAUSAL else 0 * j


@triton.jit
def load_bounds(bounds, i, n, n_other):
    """[begin, end) of rows i of n, from Bounds.rows or .columns; empty from n on."""
    begin = tl.load(bounds + i, mask=i < n, other=n_other)
    return begin, tl.load(bounds + n + i, mask=i < n, other=0)


@triton.jit
def tile_bounds_of(begin, end, BLOCK: constexpr):
    """In whole tiles of BLOCK: [begin, end) that some row sees, [full_begin, full_end) that all rows see."""
    last = tl.cdiv(tl.max(end, 0), BLOCK) * BLOCK
    first = tl.minimum(tl.min(begin, 0) // BLOCK * BLOCK, last)
    full_begin = tl.maximum(tl.minimum(tl.cdiv(tl.max(begin, 0), BLOCK) * BLOCK, last), first)
    full_end = tl.minimum(tl.maximum(tl.min(end, 0) // BLOCK * BLOCK, full_begin), last)
    return first, full_begin, full_end, last


@triton.jit
def held_and_written(hop, j):
    """Of the tile that begins with key j: do dk, dv hold what other ranks added; must they be written, even
    if no query sees the tile?"""
    held = (j >= tl.load(hop + HELD_BEGIN)) & (j < tl.load(hop + HELD_END))
    fill = (j >= tl.load(hop + FILL_BEGIN)) & (j < tl.load(hop + FILL_END))
    return held, fill & ((tl.load(hop + HOME) > 0) | (held == 0))


# Mods in kernels. MODS: KernelMods. MOD, MOD_BWD: Functions. DROPOUT: whether there is any

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # kernels then run on CPU tensors, in numpy
INTERPRETED = constexpr(INTERPRET)  # without PTX


@triton.jit
def load_layout(layout):
    return tl.load(layout), tl.load(layout + 1), tl.load(layout + 2)


@triton.jit
def index_at(layout, i, T, last):
    """Global positions as mods get them, where they may read. layout: of load_layout."""
    start, stride, jump = layout
    return tl.minimum(start + stride * i + tl.where(i >= T // 2, jump, 0), last)


@triton.jit
def log2_scale(sm_scale, MODS, MOD: constexpr):
    """What brings products, or what `modify` returns last, to units of log 2."""
    if MOD is None:
        return sm_scale * LOG2E
    else:
        return LOG2E if MODS.unit is None else MODS.unit * LOG2E


@triton.jit
def modify(s, b, h, q_idx, kv_idx, MODS, MOD: constexpr):
    """Scores before the first function, after it, ..., after the last one, from products of q and k."""
    states = (s * MODS.scale,)
    for i in tl.static_range(len(MOD)):
        states = states + (MOD[i](states[i], b, h, q_idx, kv_idx, *MODS.args[i]).to(tl.float32),)
    return states


@triton.jit
def modify_bwd(ds, states, b, h, q_idx, kv_idx, MODS, MOD_BWD: constexpr):
    """The gradient of the first of the states, from that of the last."""
    for i in tl.static_range(len(MOD_BWD) - 1, -1, -1):
        if MOD_BWD[i] is not None:
            ds = MOD_BWD[i](ds, states[i], b, h, q_idx, kv_idx, *MODS.args[i]).to(tl.float32)
    return ds


@triton.jit
def keep(b, h, q_idx, kv_idx, MODS):
    """What dropout multiplies probabilities, and their gradients, by: 0 or 1 / (1 - dropout_p)."""
    SEED, threshold, scale = MODS.dropout
    return tl.where(philox_bits(tl.load(SEED), b, h, q_idx, kv_idx) >= threshold, scale, 0.0)


@gluon.constexpr_function
def philox_asm():
    """PTX of `philox`: $0 from h, kv_idx, q_idx, b and the two keys. One score after the other: Triton itself
    would work on all of a thread at once, for which there are too few registers."""
    names = dict(M0=PHILOX_M0.value, M1=PHILOX_M1.value, W0=PHILOX_W0.value, W1=PHILOX_W1.value)
    rounds = """
        mul.hi.u32 x, c0, {M0}; mul.lo.u32 u, c0, {M0}; mul.hi.u32 y, c2, {M1}; mul.lo.u32 w, c2, {M1};
        xor.b32 c0, y, c1; xor.b32 c0, c0, k0; mov.b32 c1, w;
        xor.b32 c2, x, c3; xor.b32 c2, c2, k1; mov.b32 c3, u;
        add.u32 k0, k0, {W0}; add.u32 k1, k1, {W1};""".format(**names)
    start = " ".join(f"mov.b32 {x}, ${i};" for i, x in enumerate("c0 c1 c2 c3 k0 k1".split(), 1))
    return "{ .reg .b32 c0, c1, c2, c3, k0, k1, x, y, u, w; " + start + rounds * 7 + " shr.u32 $0, c0, 8; }"


@triton.jit
def philox_bits(seed, b, h, q_idx, kv_idx):
    """`philox` of scores."""
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    if INTERPRETED:
        c0, c1, c2, c3 = h.to(tl.uint32), kv_idx.to(tl.uint32), q_idx.to(tl.uint32), b.to(tl.uint32)
        for _ in tl.static_range(7):
            x, y = tl.umulhi(c0, PHILOX_M0), tl.umulhi(c2, PHILOX_M1)
            c0, c1, c2, c3 = y ^ c1 ^ key0, c2 * PHILOX_M1, x ^ c3 ^ key1, c0 * PHILOX_M0
            key0, key1 = key0 + PHILOX_W0, key1 + PHILOX_W1
        return (c0 >> 8).to(tl.int32)
    else:
        asm: constexpr = philox_asm()
        args = [h, kv_idx, q_idx, b, key0, key1]
        return tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r", args, tl.int32, True, 1)


@triton.jit
def tanh(x, EXACT: constexpr):
    """EXACT: within some 2**-22 of it, else, by the GPU's own instruction, within 2**-11: results of 16-bit
    inputs are then as near the truth as those of flex_attention's exact one, at softcap 50 and scores up to
    that (one H100: the largest errors are equal, the root mean squares within 2%). 16% faster."""
    if EXACT or INTERPRETED:
        y = x * x  # near 0 the other formula would lose digits
        near = x + x * y * (-0.33333148 + y * (0.13325987 + y * (-0.05305295 + y * 0.01725699)))
        return tl.where(y < 0.25, near, 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E))))
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


# softcap in kernels: s is in units of softcap (Mod.unit). softcap is None where no function follows: the
# result stays in that unit, and log2_scale knows of it


@triton.jit
def softcap_mod(s, b, h, q_idx, kv_idx, softcap):
    return tanh(s, False) if softcap is None else tanh(s, False) * softcap


@triton.jit
def softcap_mod_bwd(ds, s, b, h, q_idx, kv_idx, softcap):
    ratio = tanh(s, False)
    return ds - ds * ratio * ratio


@triton.jit
def exact_softcap_mod(s, b, h, q_idx, kv_idx, softcap):
    return tanh(s, True) if softcap is None else tanh(s, True) * softcap


@triton.jit
def exact_softcap_mod_bwd(ds, s, b, h, q_idx, kv_idx, softcap):
    ratio = tanh(s, True)
    return ds - ds * ratio * ratio


@triton.jit
def bias_mod(s, b, h, q_idx, kv_idx, BIAS, stride_b, stride_h, stride_q, stride_k, shift_q, shift_k):
    at = b * stride_b + h * stride_h + (q_idx - shift_q) * stride_q + (kv_idx - shift_k) * stride_k
    return s + tl.load(BIAS + at)


@triton.jit
def alibi_mod(s, b, h, q_idx, kv_idx, SLOPES, stride_b):
    # 2**23 + i is the float32 with the bits of i below its own: cheaper than a conversion, if i < MAX_ALIBI
    q = (q_idx | 0x4B000000).to(tl.float32, bitcast=True)
    k = (kv_idx | 0x4B000000).to(tl.float32, bitcast=True)
    return s - tl.load(SLOPES + b * stride_b + h) * tl.abs(q - k)


@triton.jit
def load_tile(X, stride, b, h, row, T, BLOCK: constexpr, BLOCK_D: constexpr, HEAD_DIM: constexpr,
              TMA: constexpr):  # fmt: skip
    """Tokens row : row + BLOCK of one head, [BLOCK, BLOCK_D]; zeros past T and HEAD_DIM. stride: of batch,
    token, head.

    With TMA, X describes the matrix (tokens of all batches, all heads), and no tile overhangs.
    """
    stride_b, stride_t, stride_h = stride
    if TMA:
        return X.load([b * (stride_b // stride_t) + row, h * stride_h])
    else:
        offs_d = tl.arange(0, BLOCK_D)
        offs_t = row + tl.arange(0, BLOCK)
        x = X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        x = x + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
        mask = (offs_t < T)[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        return tl.load(x, mask=mask, other=0.0)


@triton.jit
def state_tile(b, h, row, T, H, BLOCK: constexpr, BLOCK_D: constexpr, HEAD_DIM: constexpr):
    """Offsets and mask of a tile of a contiguous (B, T, H, D) tensor, [BLOCK, BLOCK_D]."""
    offs_t, offs_d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    offs = ((b.to(tl.int64) * T + offs_t) * H + h) * HEAD_DIM
    return offs[:, None] + offs_d[None, :], (offs_t < T)[:, None] & (offs_d < HEAD_DIM)[None, :]


# b, h               batch, head
# start_m, offs_m    the first query; all queries
# begin, end         no query sees the keys before begin, nor those from end on
# full_begin, _end   all queries see the keys [full_begin, full_end)
# row_begin, row_end query i sees the keys [row_begin[i], row_end[i])
# carry              rows of the state that hold the result of earlier hops
# final              whether no later hop has keys for these queries
QueryTile = namedtuple(
    "QueryTile", "b h start_m offs_m begin full_begin full_end end row_begin row_end carry final"
)


@triton.jit
def query_tile(HOP, ROWS, H, T, TK, GROUP_B, SET_B, MASK: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr):
    """This program's tile of queries."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    start_m = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # the longest first, under a causal mask
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    offs_m = start_m + tl.arange(0, BLOCK_M)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    carry = tl.load(hop + CARRY)
    if MASK == INTERVAL:
        rows = ROWS + (b // SET_B).to(tl.int64) * (3 * T)
        row_begin, row_end = load_bounds(rows, offs_m, T, TK)
        begin, full_begin, full_end, end = tile_bounds_of(row_begin, row_end, BLOCK_N)
        final = tl.max(tl.load(rows + 2 * T + offs_m, mask=offs_m < T, other=0), 0) == 0
    else:
        last_m = tl.minimum(start_m + BLOCK_M, T) - 1
        begin, full_begin, row_begin = 0, 0, 0
        full_end = keys_seen(hop, start_m, T, TK, MASK) // BLOCK_N * BLOCK_N
        end, row_end = keys_seen(hop, last_m, T, TK, MASK), keys_seen(hop, offs_m, T, TK, MASK)
        final = position(hop + Q_LAYOUT, last_m, T) < tl.load(hop + NEXT_START)
    return QueryTile(
        b, h, start_m, offs_m, begin, full_begin, full_end, end, row_begin, row_end, carry, final
    )


@triton.jit
def key_part(tile, PART: constexpr):
    """The keys of a part of a QueryTile: bare; the last ones, masked; the first ones, masked."""
    if PART == 0:
        begin, end = tile.full_begin, tile.full_end
    elif PART == 1:
        begin, end = tile.full_end, tile.end
    else:
        begin, end = tile.begin, tile.full_begin
    return begin, end


@triton.jit
def sees(tile, offs_n, MASK: constexpr):
    """Whether the queries of a QueryTile see these keys, [BLOCK_M, BLOCK_N]."""
    seen = offs_n[None, :] < tile.row_end[:, None]
    if MASK == INTERVAL:
        seen = seen & (offs_n[None, :] >= tile.row_begin[:, None])
    return seen


@triton.jit(do_not_specialize=["H", "G", "T", "TK", "GROUP_B", "SET_B"])
def fwd_kernel(Q, K, V, O, ACC, LSE, SINKS, HOP, ROWS, sm_scale, H, G, T, TK, GROUP_B, SET_B,
               stride_q, stride_k, stride_v, MODS, MOD: constexpr, DROPOUT: constexpr,
               MASK: constexpr, TMA: constexpr, HEAD_DIM: constexpr, BLOCK_D: constexpr,
               BLOCK_M: constexpr, BLOCK_N: constexpr):  # fmt: skip
    """One hop of the forward for one tile of queries. State in ACC (B, T, H, D) and LSE (B, H, T), float32;
    a tile's last hop writes O, in its own dtype, instead of ACC. SINKS (H,): logits, at hop 0."""
    tile = query_tile(HOP, ROWS, H, T, TK, GROUP_B, SET_B, MASK, BLOCK_M, BLOCK_N)
    b, h, start_m, offs_m, carry = tile.b, tile.h, tile.start_m, tile.offs_m, tile.carry
    if (tile.end == 0) & (carry > 0):
        return  # nothing to add: the state stays, or O is complete already

    q = load_tile(Q, stride_q, b, h, start_m, T, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    offs, mask = state_tile(b, h, start_m, T, H, BLOCK_M, BLOCK_D, HEAD_DIM)
    lse = LSE + (b * H + h).to(tl.int64) * T + offs_m
    acc = tl.load(ACC + offs, mask=mask & (offs_m < carry)[:, None], other=0.0)
    if SINKS is None:
        m_i = tl.load(lse, mask=offs_m < carry, other=-float("inf")) * LOG2E
    else:
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(SINKS + h).to(tl.float32) * LOG2E
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)  # without a carry the first key rescales this to 0
    hk = h // G
    qk_scale = log2_scale(sm_scale, MODS, MOD)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    if MOD is not None:
        q_idx = index_at(load_layout(hop + Q_LAYOUT), offs_m, T, MODS.last_q)[:, None]
        k_layout = load_layout(hop + K_LAYOUT)
    # bare tiles first. With TMA no tile overhangs
    for PART in tl.static_range(0, 3 if MASK == INTERVAL else 2 if MASK == CAUSAL or not TMA else 1):
        begin, end = key_part(tile, PART)
        for start_n in tl.range(begin, end, BLOCK_N):
            k = load_tile(K, stride_k, b, hk, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
            s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if MOD is not None:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                kv_idx = index_at(k_layout, offs_n, TK, MODS.last_k)[None, :]
                s = modify(s, b, h, q_idx, kv_idx, MODS, MOD)[len(MOD)]
            if PART:
                s = tl.where(sees(tile, start_n + tl.arange(0, BLOCK_N), MASK), s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
            shift = m_new
            if (
                PART or MOD is not None
            ):  # a row that has seen no key yet: exp2(-inf - 0), not exp2(-inf + inf)
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.math.exp2(s * qk_scale - shift[:, None])
            alpha = tl.math.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, 1)
            if DROPOUT:
                p = p * keep(b, h, q_idx, kv_idx, MODS)
            v = load_tile(V, stride_v, b, hk, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")  # [BLOCK_M, D]
            m_i = m_new
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # a row that never saw a key: o = 0, lse = -inf
    acc = acc / l_i[:, None]
    tl.store(lse, (m_i + tl.math.log2(l_i)) / LOG2E, mask=offs_m < T)
    if tile.final:
        tl.store(O + offs, acc.to(O.dtype.element_ty), mask=mask)
    else:
        tl.store(ACC + offs, acc, mask=mask)


@triton.jit(do_not_specialize=["n_hops", "B", "H", "T"])
def bwd_preprocess_kernel(O, DO, LSE, DLSE, LSE_DELTA, DQ_ACC, DQ_SEMAPHORE, n_hops, B, H, T,
                          HEAD_DIM: constexpr, BLOCK_D: constexpr, BLOCK_M: constexpr):  # fmt: skip
    """What the backward needs per row, (2, B, H, T padded) float32. First lse in base 2, +inf where a row is
    padding or saw no key, so that p is 0. Then delta = rowsum(do * o) - dlse, as in torch_preprocess. And
    zeros for hopper_bwd_kernel: DQ_ACC (B, H, T padded, BLOCK_D), DQ_SEMAPHORE (n_hops, programs here)."""
    if DQ_ACC is not None:
        dq_acc = DQ_ACC + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_D)
        tl.store(dq_acc + tl.arange(0, BLOCK_M * BLOCK_D), tl.zeros([BLOCK_M * BLOCK_D], tl.float32))
        for j in range(n_hops):
            tl.store(DQ_SEMAPHORE + j * tl.num_programs(0) + tl.program_id(0), 0)
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
    tl.store(LSE_DELTA + row, lse * LOG2E)
    tl.store(LSE_DELTA + B.to(tl.int64) * H * T_pad + row, delta)


@triton.jit(do_not_specialize=["H", "G", "T", "TK", "GROUP_B", "SET_B"])
def dq_kernel(Q, K, V, DO, LSE_LOG2, DELTA, DQ, ACC, HOP, ROWS, sm_scale, H, G, T, TK, GROUP_B, SET_B,
              stride_q, stride_k, stride_v, stride_do, MODS, MOD: constexpr, DROPOUT: constexpr,
              MOD_BWD: constexpr, MASK: constexpr, TMA: constexpr, HEAD_DIM: constexpr, BLOCK_D: constexpr,
              BLOCK_M: constexpr, BLOCK_N: constexpr):  # fmt: skip
    """One hop of dq for one tile of queries; bounds, state (ACC) and the last write (DQ) as in fwd_kernel."""
    tile = query_tile(HOP, ROWS, H, T, TK, GROUP_B, SET_B, MASK, BLOCK_M, BLOCK_N)
    b, h, start_m, offs_m, carry = tile.b, tile.h, tile.start_m, tile.offs_m, tile.carry
    if (tile.end == 0) & (carry > 0):
        return

    q = load_tile(Q, stride_q, b, h, start_m, T, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    do = load_tile(DO, stride_do, b, h, start_m, T, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
    row = (b * H + h).to(tl.int64) * (tl.cdiv(T, ROW_PAD) * ROW_PAD) + offs_m
    lse, delta = tl.load(LSE_LOG2 + row), tl.load(DELTA + row)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    hk = h // G
    qk_scale = log2_scale(sm_scale, MODS, MOD)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    if MOD is not None:
        q_idx = index_at(load_layout(hop + Q_LAYOUT), offs_m, T, MODS.last_q)[:, None]
        k_layout = load_layout(hop + K_LAYOUT)
    for PART in tl.static_range(0, 3 if MASK == INTERVAL else 2 if MASK == CAUSAL or not TMA else 1):
        begin, end = key_part(tile, PART)
        for start_n in tl.range(begin, end, BLOCK_N):
            k = load_tile(K, stride_k, b, hk, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
            v = load_tile(V, stride_v, b, hk, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
            s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            offs_n = start_n + tl.arange(0, BLOCK_N)
            if MOD is not None:
                kv_idx = index_at(k_layout, offs_n, TK, MODS.last_k)[None, :]
                states = modify(s, b, h, q_idx, kv_idx, MODS, MOD)
                s = states[len(MOD)]
            p = tl.math.exp2(s * qk_scale - lse[:, None])
            if PART:
                p = tl.where(sees(tile, offs_n, MASK), p, 0.0)
            kept = p
            if DROPOUT:
                kept = p * keep(b, h, q_idx, kv_idx, MODS)
            dp = tl.dot(do, v.T, input_precision="ieee")
            ds = kept * dp - p * delta[:, None] if DROPOUT else p * (dp - delta[:, None])
            if MOD is not None:
                ds = modify_bwd(ds, states, b, h, q_idx, kv_idx, MODS, MOD_BWD)
                if PART:
                    ds = tl.where(sees(tile, offs_n, MASK), ds, 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, D]
    offs, mask = state_tile(b, h, start_m, T, H, BLOCK_M, BLOCK_D, HEAD_DIM)
    dq = dq * sm_scale + tl.load(ACC + offs, mask=mask & (offs_m < carry)[:, None], other=0.0)
    if tile.final:
        tl.store(DQ + offs, dq.to(DQ.dtype.element_ty), mask=mask)
    else:
        tl.store(ACC + offs, dq, mask=mask)


@triton.jit(do_not_specialize=["H", "G", "T", "TK", "GROUP_B", "SET_B"])
def dkv_kernel(Q, K, V, DO, LSE_LOG2, DELTA, DK, DV, DK_ACC, DV_ACC, HOP, COLUMNS, sm_scale, H, G, T, TK,
               GROUP_B, SET_B, stride_q, stride_k, stride_v, stride_do, MODS, MOD: constexpr,
               DROPOUT: constexpr, MOD_BWD: constexpr,
               MASK: constexpr, TMA: constexpr, HEAD_DIM: constexpr, BLOCK_D: constexpr,
               BLOCK_M: constexpr, BLOCK_N: constexpr):  # fmt: skip
    """One hop of dk, dv for one tile of keys. DK_ACC, DV_ACC (B, TK, HKV, D) float32 hold what earlier ranks
    added. DK, DV are the same buffers on the way; at home they are the gradients, in their own dtype."""
    n_tiles = tl.cdiv(TK, BLOCK_N)
    start_n = tl.program_id(0) % n_tiles * BLOCK_N  # under a causal mask the first keys have the most queries
    bh = tl.program_id(0) // n_tiles
    HKV = H // G
    b, h = bh // HKV, bh % HKV
    offs_n = start_n + tl.arange(0, BLOCK_N)
    hop = HOP + (b // GROUP_B) * HOP_COLUMNS
    # queries [begin, end) see something of the tile, [full_begin, full_end) all of it
    if MASK == INTERVAL:
        columns = COLUMNS + (b // SET_B).to(tl.int64) * (2 * TK)
        row_begin, row_end = load_bounds(columns, offs_n, TK, T)
        begin, full_begin, full_end, end = tile_bounds_of(row_begin, row_end, BLOCK_M)
    else:
        row_begin, full_end, end = first_query(hop, offs_n, T, MASK), T, T
        begin = tl.minimum(first_query(hop, start_n, T, MASK), T)
        full_begin = first_query(hop, tl.minimum(start_n + BLOCK_N, TK) - 1, T, MASK)
        full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_M) * BLOCK_M, T)
        begin = tl.where(begin < T, begin // BLOCK_M * BLOCK_M, T)
    held, written = held_and_written(hop, start_n)
    if (begin >= end) & (written == 0):
        return

    k = load_tile(K, stride_k, b, h, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
    v = load_tile(V, stride_v, b, h, start_n, TK, BLOCK_N, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_N, D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = log2_scale(sm_scale, MODS, MOD)
    if MOD is not None:
        kv_idx = index_at(load_layout(hop + K_LAYOUT), offs_n, TK, MODS.last_k)[:, None]
        q_layout = load_layout(hop + Q_LAYOUT)
    for g in tl.range(0, G):  # the query heads that share this key head
        hq = h * G + g
        row = (b * H + hq).to(tl.int64) * (tl.cdiv(T, ROW_PAD) * ROW_PAD)
        # first the masked tiles of the first queries, then the bare ones, then the masked ones of the last
        for PART in tl.static_range(1 if MASK == FULL else 0, 3 if MASK == INTERVAL else 2):
            if PART == 0:
                part, stop = begin, full_begin
            elif PART == 1:
                part, stop = full_begin, full_end
            else:
                part, stop = full_end, end
            for start_m in tl.range(part, stop, BLOCK_M):
                q = load_tile(Q, stride_q, b, hq, start_m, T, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)  # [BLOCK_M, D]
                do = load_tile(DO, stride_do, b, hq, start_m, T, BLOCK_M, BLOCK_D, HEAD_DIM, TMA)
                offs_m = start_m + tl.arange(0, BLOCK_M)
                lse, delta = tl.load(LSE_LOG2 + row + offs_m), tl.load(DELTA + row + offs_m)
                # scores come out transposed, so that both products below take them as they are
                s = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                if MOD is not None:
                    q_idx = index_at(q_layout, offs_m, T, MODS.last_q)[None, :]
                    states = modify(s, b, hq, q_idx, kv_idx, MODS, MOD)
                    s = states[len(MOD)]
                p = tl.math.exp2(s * qk_scale - lse[None, :])
                if PART != 1:
                    seen = offs_m[None, :] >= row_begin[:, None]
                    if MASK == INTERVAL:
                        seen = seen & (offs_m[None, :] < row_end[:, None])
                    p = tl.where(seen, p, 0.0)
                kept = p
                if DROPOUT:
                    kept = p * keep(b, hq, q_idx, kv_idx, MODS)
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, D]
                dp = tl.dot(v, do.T, input_precision="ieee")
                ds = kept * dp - p * delta[None, :] if DROPOUT else p * (dp - delta[None, :])
                if MOD is not None:
                    ds = modify_bwd(ds, states, b, hq, q_idx, kv_idx, MODS, MOD_BWD)
                    if PART != 1:
                        ds = tl.where(seen, ds, 0.0)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, D]
    offs, mask = state_tile(b, h, start_n, TK, HKV, BLOCK_N, BLOCK_D, HEAD_DIM)
    dk = dk * sm_scale + tl.load(DK_ACC + offs, mask=mask & held, other=0.0)
    dv = dv + tl.load(DV_ACC + offs, mask=mask & held, other=0.0)
    tl.store(DK + offs, dk.to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + offs, dv.to(DV.dtype.element_ty), mask=mask)


# -----------------------------------------------------------------------------
# their launchers: the backend "triton"


@functools.cache
def capability(device):
    return torch.cuda.get_device_capability(device)


NO_CONTEXT = contextlib.nullcontext()


def device_guard(x):
    """A context in which x's device is the current one, on which kernels are launched."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return NO_CONTEXT if here else torch.cuda.device_of(x)


COMPILED = {}  # what `launch` has compiled, oldest first


def launch(kernel, device, depends, grid, args, constants, **options):
    """kernel[grid](*args, **constants, **options) without Triton's search for the compiled kernel, which
    takes longer than a small problem on the GPU. depends: whatever else the compiled code depends on (dtypes,
    tile shapes, alignment)."""
    key = id(kernel), device, depends, *constants.values()
    if INTERPRET:
        kernel[(grid,)](*args, **constants)
    elif key in COMPILED:  # as torch.compile calls it; Triton's own way looks for the device and for hooks
        run, function, metadata = COMPILED[key]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        run(grid, 1, 1, stream, function, metadata, None, None, None, *args, *constants.values())
    else:
        compiled = kernel[(grid,)](*args, **constants, **options)
        remember(COMPILED, key, (compiled.run, compiled.function, compiled.packed_metadata), 4096)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()  # triton's, and its cdiv, take the host 4 us


# BLOCK_M (queries), BLOCK_N (keys), num_warps, num_stages by padded head dim. 64 and 128 were measured on one
# H100 for 16-bit inputs; 256 and float32, which does not run on the tensor cores, are chosen to spill little
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


@functools.cache
def tile_config(kernel, D, dtype, device):
    """Tile sizes and launch options of a kernel; fewer pipeline stages where shared memory is small."""
    BLOCK_D = max(16, next_power_of_2(D))
    tiles = TILES_FP32 if dtype == torch.float32 else TILES
    BLOCK_M, BLOCK_N, num_warps, num_stages = (32, 32, 4, 1) if INTERPRET else tiles[kernel][max(64, BLOCK_D)]
    if not INTERPRET:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        resident, streamed = (2 * BLOCK_N, BLOCK_M) if kernel == "dkv" else (2 * BLOCK_M, BLOCK_N)  # rows
        while num_stages > 1 and (resident + 2 * num_stages * streamed) * BLOCK_D * dtype.itemsize > shared:
            num_stages -= 1
    tile = dict(HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return tile | dict(num_warps=num_warps, num_stages=num_stages)


def with_tables(hops, device):
    """hops with their tables on the device: int32, HopRow after HopRow, from a multiple of 16 bytes on."""
    rows = torch.tensor([[n for row in hop.rows for n in row] for hop in hops], dtype=torch.int32)
    tables = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).to(device)
    return tuple(hop._replace(table=table) for hop, table in zip(hops, tables))


kept_tables = functools.cache(with_tables)  # small; CUDA graphs go on reading them


def tma_ok(shape, strides, dtype):
    """Can TMA read such a tensor? Rows must be dense, everything else a multiple of 16 bytes apart."""
    steps = (stride for stride, n in zip(strides[:-1], shape) if n > 1)
    return strides[-1] == 1 and all(step > 0 and step * dtype.itemsize % 16 == 0 for step in steps)


def as_matrix(x, rows):
    """x (B, T, heads, D) for TMA as a matrix of B * T rows, in tiles of one head; None if it is none."""
    (B, T, heads, D), (stride_b, stride_t, stride_h, _) = x.shape, x.stride()
    if x.dtype.itemsize != 2 or x.data_ptr() % 16 or not tma_ok(x.shape, x.stride(), x.dtype):
        return None
    if stride_t < (heads - 1) * stride_h + D or B > 1 and stride_b % stride_t:
        return None
    shape = [(B - 1) * (stride_b // stride_t) + T, (heads - 1) * stride_h + D]
    return TensorDescriptor(x, shape, [stride_t, 1], [rows, D])


def run_portable(kernel, name, inputs, outputs, hop, bounds, mask, mods, sm_scale):
    """Launch a kernel. inputs: q, k, v and perhaps do, as TMA descriptors where the GPU has TMA and no tile
    overhangs a sequence or a head, else as pointers. bounds: of the mask INTERVAL, by resident row."""
    q, k = inputs[:2]
    (B, T, H, D), (_, TK, HKV, _) = q.shape, k.shape
    config = tile_config(name, D, q.dtype, q.device)
    BLOCK_M, BLOCK_N = config["BLOCK_M"], config["BLOCK_N"]
    strides = [x.stride()[:3] for x in inputs]
    tma = INTERPRET or capability(q.device)[0] >= 9
    tma = tma and D == config["BLOCK_D"] and T % max(BLOCK_M, BLOCK_N) == TK % max(BLOCK_M, BLOCK_N) == 0
    if tma:
        matrices = [as_matrix(x, n) for x, n in zip(inputs, (BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_M))]
        tma = None not in matrices
        inputs = matrices if tma else inputs
    n_programs = -(-TK // BLOCK_N) * B * HKV if name == "dkv" else -(-T // BLOCK_M) * B * H
    bounds, set_b = (bounds, B // len(bounds)) if mask.kind == INTERVAL.value else (None, 1)
    args = hop.table, bounds, sm_scale, H, H // HKV, T, TK, B // len(hop.rows), set_b, *strides
    mod_args, constants, _ = mods.for_kernels(sm_scale, name != "fwd")
    kernel[(n_programs,)](*inputs, *outputs, *args, mod_args, **constants, MASK=mask.kind, TMA=tma, **config)


def triton_fwd(q, k, v, o, acc, lse, sinks, hop, mask, mods, sm_scale):
    rows = hop.bounds and hop.bounds.rows
    run_portable(fwd_kernel, "fwd", (q, k, v), (o, acc, lse, sinks), hop, rows, mask, mods, sm_scale)


def run_preprocess(o, do, lse, dlse, dq_acc=None, semaphores=None, n_hops=0):
    """lse in base 2 and delta, (2, B * H, T padded): see bwd_preprocess_kernel."""
    B, T, H, D = o.shape
    n_rows = padded_rows(T)
    lse_delta = torch.empty(2, B * H, n_rows, dtype=torch.float32, device=o.device)
    BLOCK_D = max(16 if dq_acc is None else 64, next_power_of_2(D))
    aligned = (x is not None and x.data_ptr() % 16 == 0 for x in (o, do, lse, dlse))
    depends = o.dtype, dlse is None, dq_acc is None, *aligned
    constants = dict(HEAD_DIM=D, BLOCK_D=BLOCK_D, BLOCK_M=32)
    args = o, do, lse, dlse, lse_delta, dq_acc, semaphores, n_hops, B, H, T
    launch(bwd_preprocess_kernel, o.device, depends, n_rows // 32 * B * H, args, constants, num_warps=4)
    return lse_delta


def padded_rows(T):
    return -(-T // ROW_PAD.value) * ROW_PAD.value


def triton_preprocess(o, do, lse, dlse, dq, n_hops):
    return (run_preprocess(o, do, lse, dlse), accumulator(dq, torch.float32, n_hops, "triton")), None


def triton_bwd(q, k, v, do, state, dq, dk, dv, dk_acc, dv_acc, hop, j, mask, mods, sm_scale, deterministic):
    lse_delta, dq_acc = state
    rows, columns, _ = hop.bounds or (None, None, None)
    inputs, outputs = (q, k, v, do), (*lse_delta, dk, dv, dk_acc, dv_acc)
    run_portable(dkv_kernel, "dkv", inputs, outputs, hop, columns, mask, mods, sm_scale)
    run_portable(dq_kernel, "dq", inputs, (*lse_delta, dq, dq_acc), hop, rows, mask, mods, sm_scale)


# =============================================================================
# Part III: fast paths
# -----------------------------------------------------------------------------
# Hopper kernels, in Gluon; arguments, state and results as in fwd_kernel and dkv_kernel. A program per SM
# works through work tiles. The rows of a work tile are resident while tiles of other rows stream by.
# One warp, the producer, loads tiles by TMA into a ring of buffers. Two or three warpgroups, the consumers,
# have 64 resident rows each: the softmax of one runs under the products of another, and under its own last
# ones (FlashAttention-3, arXiv 2407.08608). Barriers: k_full[s]: stage s holds keys. producer_acquire(s): all
# consumers have read it.

# by their names in triton 3.8 and later, else by those in 3.6
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
warpgroup_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

# what all warps know of the problem: HopRows; for INTERVAL Bounds of the resident rows and of their tiles,
# SET_B sequences a set; sizes; L2_HEADS, heads at a time; WAVES for tile_scheduler; OUTER for query_heads
Dims = namedtuple("Dims", "HOP BOUNDS TILES B H G T TK GROUP_B SET_B L2_HEADS WAVES OUTER")
# b, h, start, hop   batch, head, first resident row, HopRow
# bounds             Bounds.tiles of this tile, for INTERVAL
# first, n_tiles     the first streamed tile, the others before it follow; how many
# n_head, n_tail     how many of the first and of the last streamed tiles are masked
# active             whether there is anything to do
WorkTile = namedtuple("WorkTile", "b h start hop bounds first n_tiles n_head n_tail active")
# shared memory: q of each consumer, k and v of each stage; barriers that say what it holds
FwdBuffers = namedtuple("FwdBuffers", "q k v q_full q_empty k_full v_full")
# lse_delta: two rows a stage, with q; ds, dq: see bwd_tiles; number: of the work tile, from the producer
BwdBuffers = namedtuple(
    "BwdBuffers", "q k v do lse_delta ds dq number number_full kv_full kv_empty ds_full q_full do_full"
)


@gluon.constexpr_function
def product_layout(N):
    """Where a warpgroup holds the [64, N] result of a product."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def operand_layout(N):
    """Where it holds the left operand, in 16 bit, of a product with an [64, N] result."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(N), k_width=2)


@gluon.jit
def barriers(N: constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=1)
    return bars


NAMED_BARRIERS = constexpr(8)  # the first of ours, of 16 in hardware; the compiler uses some below for itself


@gluon.jit
def bar_arrive(i, THREADS: constexpr):
    """This warp is at named barrier i, and goes on. Named barriers, as Gluon has the whole warpgroup wait for
    its slowest warp before it arrives at an mbarrier, several times a tile: the tensor cores were busy 75% of
    the time with those, 79% with these (ncu, one H100, D128 16k causal, forward)."""
    asm: constexpr = "bar.arrive $1, $2; mov.b32 $0, 0;"
    args = [NAMED_BARRIERS + i, THREADS]
    gl.inline_asm_elementwise(asm, "=r,r,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_sync(i, THREADS: constexpr):
    """This warp waits until THREADS threads, 32 a warp, are at named barrier i."""
    asm: constexpr = "bar.sync $1, $2; mov.b32 $0, 0;"
    args = [NAMED_BARRIERS + i, THREADS]
    gl.inline_asm_elementwise(asm, "=r,r,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def consumer_release(stage, CONSUMERS: constexpr):
    """This warp has read the stage."""
    bar_arrive(stage, CONSUMERS * 128 + 32)


@gluon.jit
def producer_acquire(stage, CONSUMERS: constexpr):
    """The producer waits until all warps of all consumers have read the stage."""
    bar_sync(stage, CONSUMERS * 128 + 32)


@gluon.jit
def consumer_release_after(x, stage, CONSUMERS: constexpr):
    """consumer_release, once the rows' x, from 0 to 1, is computed: as far as ptxas knows, the barrier's
    number depends on x. Otherwise ptxas moves the release, and the wait for products that follows it, up
    above the softmax, which then no longer runs under those products."""
    asm: constexpr = """{ .reg .f32 x; .reg .pred p; .reg .b32 n;
        add.f32 x, $2, $3; setp.gt.f32 p, x, 0f40800000; selp.b32 n, 1, 0, p;
        add.s32 n, n, $4; bar.arrive n, $6; mov.b32 $0, $2; mov.b32 $1, $3; }"""
    args = [x, NAMED_BARRIERS + stage, CONSUMERS * 128 + 32]
    gl.inline_asm_elementwise(asm, "=r,=r,f,f,r,r,r,r", args, dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def hold_wait(x):
    """Nothing; but ptxas does not move a wait for products up above x, because of a barrier at which nobody
    ever arrives."""
    asm: constexpr = "{ .reg .pred p; setp.gt.f32 p, $1, 0f7F800000; @p bar.arrive 15, 160; mov.b32 $0, $1; }"
    gl.inline_asm_elementwise(asm, "=r,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def tile_scheduler(n, n_tiles, L2_HEADS, WAVES):
    """(tile, head) of this program's n-th work tile, tile 0 being the longest, and whether it exists.

    L2_HEADS heads at a time, whose streamed tiles stay in L2: their longer tiles first, dealt out to the P
    programs in waves, every second one backwards, so that all programs have about the same to do. The last
    wave of a section of heads may be short: the next section starts with the program where it ended."""
    P = gl.num_programs(0)
    section, wave = n // WAVES, n % WAVES
    turn = (gl.program_id(0) + section * (n_tiles * L2_HEADS - (WAVES - 1) * P)) % P
    i = wave * P + gl.where(wave % 2 == 0, turn, P - 1 - turn)
    exists, i = i < n_tiles * L2_HEADS, gl.minimum(i, n_tiles * L2_HEADS - 1)
    return i // L2_HEADS, section * L2_HEADS + i % L2_HEADS, exists


@gluon.jit
def streamed_tiles(b, tile, n_resident, dims):
    """Of a resident tile, for INTERVAL: as in WorkTile."""
    bounds = dims.TILES + ((b // dims.SET_B) * n_resident + tile) * TILE_COLUMNS
    begin, end = gl.load(bounds + BEGIN), gl.load(bounds + END)
    n_head, n_tail = end - gl.load(bounds + FULL_END), gl.load(bounds + FULL_BEGIN) - begin
    return bounds, gl.maximum(end, 1) - 1, end - begin, n_head, n_tail


@gluon.jit
def fwd_work_tile(n, dims, BLOCK_M: constexpr, BLOCK_N: constexpr, MASK: constexpr):
    """This program's n-th WorkTile: queries, and the keys that they see."""
    n_resident = gl.cdiv(dims.T, BLOCK_M)
    tile, bh, exists = tile_scheduler(n, n_resident, dims.L2_HEADS, dims.WAVES)
    start = (n_resident - 1 - tile) * BLOCK_M  # the last queries see the most keys
    b, h = bh // dims.H, bh % dims.H
    hop = dims.HOP + (b // dims.GROUP_B) * HOP_COLUMNS
    least = 1 - gl.minimum(gl.load(hop + CARRY), 1)  # without a carry there is something to write
    if MASK == INTERVAL:
        bounds, first, n_tiles, n_head, n_tail = streamed_tiles(b, tile, n_resident, dims)
        start = gl.load(bounds + NUMBER) * BLOCK_M
        n_tiles = gl.where(exists, gl.maximum(n_tiles, least), 0)
    else:
        last = gl.minimum(start + BLOCK_M, dims.T) - 1
        n_tiles = gl.cdiv(keys_seen(hop, last, dims.T, dims.TK, MASK), BLOCK_N)
        n_head = n_tiles - keys_seen(hop, start, dims.T, dims.TK, MASK) // BLOCK_N
        n_tiles = gl.where(exists, gl.maximum(n_tiles, least), 0)
        bounds, first, n_tail = hop, n_tiles - 1, 0
    return WorkTile(b, h, start, hop, bounds, first, n_tiles, n_head, n_tail, n_tiles > 0)


@gluon.jit
def bwd_work_tile(n, dims, BLOCK_N: constexpr, BLOCK_M: constexpr, MASK: constexpr):
    """The n-th WorkTile of all programs: keys, and the queries that see them. The first keys of L2_HEADS
    heads come first: under a causal mask the most queries see them, and dq is added up in that order. G tiles
    of one head follow each other: they stream the same queries at the same time, which L2 then holds."""
    n_resident = gl.cdiv(dims.TK, BLOCK_N)
    heads = dims.H // dims.G
    section, i = n // (n_resident * dims.L2_HEADS), n % (n_resident * dims.L2_HEADS)
    row, i = i // (dims.G * dims.L2_HEADS) * dims.G, i % (dims.G * dims.L2_HEADS)
    n_row = gl.minimum(dims.G, n_resident - row)
    tile, bh = row + i % n_row, section * dims.L2_HEADS + i // n_row
    start, b, h = tile * BLOCK_N, bh // heads, bh % heads
    hop = dims.HOP + (b // dims.GROUP_B) * HOP_COLUMNS
    if MASK == INTERVAL:
        bounds, first, n_tiles, n_head, n_tail = streamed_tiles(b, tile, n_resident, dims)
    else:
        begin = first_query(hop, start, dims.T, MASK)
        first, end = begin // BLOCK_M, gl.cdiv(dims.T, BLOCK_M)
        n_tiles = gl.where(begin < dims.T, end - first, 0)
        full_begin = first_query(hop, gl.minimum(start + BLOCK_N, dims.TK) - 1, dims.T, MASK)
        n_tail = gl.minimum(gl.cdiv(full_begin, BLOCK_M) - first, n_tiles)
        bounds, first, n_head = hop, end - 1, 0
    _, written = held_and_written(hop, start)
    return WorkTile(b, h, start, hop, bounds, first, n_tiles, n_head, n_tail, (n_tiles > 0) | written)


@gluon.jit
def store_tile(desc, smem, x, b, row, h):
    """x into the tile from (b, row, h) on of a 16-bit (B, T, H, D) tensor, by TMA, without rows past the end.
    No earlier store from the buffer may be under way."""
    smem.reshape(x.shape).store(x.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [b, row, h, 0], smem)


@gluon.jit
def state_offsets(b, h, row, T, H, ROWS: constexpr, BLOCK_D: constexpr, HEAD_DIM: constexpr,
                  LAYOUT: constexpr):  # fmt: skip
    """A tile of a contiguous (B, T, H, D) tensor: first element; offsets from it, mask: [ROWS, BLOCK_D]."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    first = ((b.to(gl.int64) * T + row) * H + h) * HEAD_DIM
    mask = (row + rows < T)[:, None] & (cols < HEAD_DIM)[None, :]
    return first, (rows * (H * HEAD_DIM))[:, None] + cols[None, :], mask


@gluon.jit
def fwd_producer(descs, smem, dims, MASK: constexpr):
    q_desc, k_desc, v_desc = descs
    CONSUMERS: constexpr = smem.q.shape[0]
    STAGES: constexpr = smem.k.shape[0]
    ROWS: constexpr = smem.q.shape[2]
    BLOCK_N: constexpr = smem.k.shape[2]
    n_done, tile = 0, 0  # work tiles, and tiles of keys, so far: they give the buffer and the phase
    for n in range(dims.B * dims.H // dims.L2_HEADS * dims.WAVES):
        work = fwd_work_tile(n, dims, CONSUMERS * ROWS, BLOCK_N, MASK)
        if work.active:
            n_tiles = work.n_tiles
            hk = work.h // dims.G
            for j in range(n_tiles):
                s = tile % STAGES
                start_n = (work.first - j) * BLOCK_N  # from the diagonal down: the masked tiles come first
                if tile >= STAGES:
                    producer_acquire(s, CONSUMERS)
                mbarrier.expect(smem.k_full.index(s), k_desc.block_type.nbytes)
                tma_load(k_desc, [work.b, start_n, hk, 0], smem.k_full.index(s), smem.k.index(s))
                if j == 0:
                    for c in gl.static_range(CONSUMERS):
                        mbarrier.wait(smem.q_empty.index(c), n_done & 1 ^ 1)
                        mbarrier.expect(smem.q_full.index(c), q_desc.block_type.nbytes)
                        row = work.start + c * ROWS
                        tma_load(q_desc, [work.b, row, work.h, 0], smem.q_full.index(c), smem.q.index(c))
                if tile >= STAGES:
                    producer_acquire(STAGES + s, CONSUMERS)
                mbarrier.expect(smem.v_full.index(s), v_desc.block_type.nbytes)
                tma_load(v_desc, [work.b, start_n, hk, 0], smem.v_full.index(s), smem.v.index(s))
                tile += 1
            n_done += 1


@gluon.jit
def by_lane(x):
    """[64, N], the result of a product, as [64, 4, N / 4]: rows, threads that share a row, numbers of each.
    What is reduced over the last axis needs no other thread."""
    N: constexpr = x.shape[1]
    return x.reshape([64, N // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([64, 4, N // 4])


@gluon.jit
def by_row(x):
    """The inverse of by_lane."""
    N: constexpr = x.shape[2] * 4
    return x.reshape([64, 4, N // 8, 2]).permute((0, 2, 1, 3)).reshape([64, N])


@gluon.jit
def lazy_max(m, l, x):
    """m, or the maximum of m and x over the threads of a row, if an x of this warp rises above m. [64, 4]: x
    is of each thread's own scores, l its part of a row's sum, m the same in the four threads of a row.

    Scores may be shifted by any m that keeps exp2(s - m) in range (FlashAttention-4 for Blackwell): to rise
    is to exceed m by more than 8. Or by more than log2(l): such a key may outweigh all others, and its p
    should be 1, which 16 bits hold exactly. Else rows with one large weight are rounded twice, and 3 or 4 of
    580 inputs, made to be hard, missed the yardstick of test.py. This costs 1%, but 4 to 15% where log2(l) is
    taken ahead, before the wait for the scores (one H200)."""
    asm: constexpr = """{ .reg .pred p; .reg .f32 a, b;
        lg2.approx.ftz.f32 a, $4; max.f32 a, a, 0f00000000; min.f32 a, a, 0f41000000; add.f32 a, a, $2;
        lg2.approx.ftz.f32 b, $5; max.f32 b, b, 0f00000000; min.f32 b, b, 0f41000000; add.f32 b, b, $3;
        setp.gt.f32 p, $6, a; setp.gt.or.f32 p, $7, b, p; vote.sync.any.pred p, p, 0xffffffff;
        mov.f32 $0, $2; mov.f32 $1, $3;
        @!p bra DONE;
        max.f32 $0, $0, $6; max.f32 $1, $1, $7;
        shfl.sync.bfly.b32 a, $0, 1, 31, 0xffffffff; shfl.sync.bfly.b32 b, $1, 1, 31, 0xffffffff;
        max.f32 $0, $0, a; max.f32 $1, $1, b;
        shfl.sync.bfly.b32 a, $0, 2, 31, 0xffffffff; shfl.sync.bfly.b32 b, $1, 2, 31, 0xffffffff;
        max.f32 $0, $0, a; max.f32 $1, $1, b;
        DONE: }"""
    args = [m, l, x]
    return gl.inline_asm_elementwise(asm, "=&f,=&f,f,f,f,f,f,f", args, dtype=gl.float32, is_pure=True, pack=2)


@gluon.constexpr_function
def rescale_asm(N):
    """PTX, and its operands: N numbers of a thread, which are replaced, times N others, if not all of those
    are 1 in this warp. They are of two rows, as the fragment of a product has them: 0, 0, 1, 1, 0, 0, ..."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * N + i};" for i in range(N))
    asm = f"""{{ .reg .pred p;
        setp.neu.f32 p, ${2 * N}, 0f3F800000; setp.neu.or.f32 p, ${2 * N + 2}, 0f3F800000, p;
        vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {products} DONE: }}"""
    return asm, ",".join(["=f"] * N + [str(i) for i in range(N)] + ["f"] * N)


@gluon.jit
def rescale(acc, alpha):
    """acc * alpha, [64, D] and [64, 4]. Most often alpha is 1 for all rows of a warp, which then goes on."""
    x = by_lane(acc)
    asm: constexpr = rescale_asm(x.shape[2] * 2)
    x, alpha = gl.broadcast(x, gl.convert_layout(alpha, gl.SliceLayout(2, x.type.layout))[:, :, None])
    N: constexpr = x.shape[2] * 2
    x = gl.inline_asm_elementwise(asm[0], asm[1], [x, alpha], dtype=gl.float32, is_pure=True, pack=N)
    return gl.convert_layout(by_row(x), acc.type.layout)


@gluon.jit
def online_softmax_max(s, m_i, l_i, qk_scale, offs_n, row_begin, row_end, masked, MASK: constexpr):
    """A tile of scores, masked, by lane; the rows' new maximum; shift, for p = exp2(s - shift); alpha, the
    factor for the rows' sum and output so far."""
    if masked:
        seen = offs_n[None, :] < row_end[:, None]
        if MASK == INTERVAL:
            seen = seen & (offs_n[None, :] >= row_begin[:, None])
        s = gl.where(seen, s, -float("inf"))
    s = by_lane(s)
    m_new = lazy_max(m_i, l_i, gl.max(s, 2) * qk_scale)
    shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row without a key yet: exp2(-inf - 0), not nan
    return s, m_new, shift[:, :, None], gl.exp2(m_i - shift)


@gluon.jit
def join_lse(old, new):
    """lse (in base 2) of two states together, and the factors for their outputs."""
    top = gl.maximum(old, new)
    shift = gl.where(top == -float("inf"), 0.0, top)
    top = shift + gl.log2(gl.exp2(old - shift) + gl.exp2(new - shift))
    shift = gl.where(top == -float("inf"), 0.0, top)
    return top, gl.exp2(old - shift), gl.exp2(new - shift)


@gluon.jit
def fwd_consumer(c: constexpr, out, smem, dims, MODS, HEAD_DIM: constexpr, MASK: constexpr,
                 HAS_SINKS: constexpr, MOD: constexpr, DROPOUT: constexpr):  # fmt: skip
    o_desc, o_smem, ACC, LSE, SINKS, sm_scale = out
    CONSUMERS: constexpr = smem.q.shape[0]
    STAGES: constexpr = smem.k.shape[0]
    ROWS: constexpr = smem.q.shape[2]
    BLOCK_N: constexpr = smem.k.shape[2]
    BLOCK_D: constexpr = smem.k.shape[4]
    s_layout: constexpr = product_layout(BLOCK_N)
    o_layout: constexpr = product_layout(BLOCK_D)
    p_layout: constexpr = operand_layout(BLOCK_D)
    row_s: constexpr = gl.SliceLayout(1, s_layout)
    row_o: constexpr = gl.SliceLayout(1, o_layout)
    dtype: constexpr = smem.k.dtype
    # exponentials under p v: 4% faster for three consumers and FULL, 6% with softcap (one H100); else slower
    EARLY: constexpr = MOD is not None or CONSUMERS == 3 and MASK == FULL
    T = dims.T
    q = matrix(smem.q, c)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    offs_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    qk_scale = log2_scale(sm_scale, MODS, MOD)
    n_done, tile = 0, 0
    for n in range(dims.B * dims.H // dims.L2_HEADS * dims.WAVES):
        work = fwd_work_tile(n, dims, CONSUMERS * ROWS, BLOCK_N, MASK)
        if work.active:
            n_tiles = work.n_tiles
            start_m, hop = work.start + c * ROWS, work.hop
            offs_m = start_m + gl.arange(0, ROWS, layout=row_s)
            l_i = gl.max(by_lane(zero), 2)  # [BLOCK_M, 4]: each thread's part of the rows' sums
            m_i = l_i - float("inf")
            acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            start_n = work.first * BLOCK_N
            s = tile % STAGES
            mbarrier.wait(smem.q_full.index(c), n_done & 1)
            mbarrier.wait(smem.k_full.index(s), tile // STAGES & 1)
            s_async = warpgroup_mma(q, matrix(smem.k, s).permute((1, 0)), zero, use_acc=False, is_async=True)
            if MASK == INTERVAL:
                rows = dims.BOUNDS + (work.b // dims.SET_B).to(gl.int64) * (3 * T)
                row_begin, row_end = load_bounds(rows, offs_m, T, dims.TK)
            else:
                row_begin, row_end = offs_m, keys_seen(hop, offs_m, T, dims.TK, MASK)
            if MOD is not None:
                q_idx = index_at(load_layout(hop + Q_LAYOUT), offs_m, T, MODS.last_q)[:, None]
                k_layout = load_layout(hop + K_LAYOUT)
            scores = warpgroup_mma_wait(0, (s_async,))  # [BLOCK_M, BLOCK_N]
            consumer_release(s, CONSUMERS)
            offs_j = start_n + offs_n
            if MOD is not None:
                kv_idx = index_at(k_layout, offs_j, dims.TK, MODS.last_k)[None, :]
                scores = modify(scores, work.b, work.h, q_idx, kv_idx, MODS, MOD)[len(MOD)]
            columns = offs_j, row_begin, row_end, True, MASK
            scores, m_i, shift, alpha = online_softmax_max(scores, m_i, l_i, qk_scale, *columns)
            p = gl.exp2(scores * qk_scale - shift)
            l_i = gl.sum(p, 2)
            if DROPOUT:
                factor = keep(work.b, work.h, q_idx, kv_idx, MODS)
                p = by_lane(gl.convert_layout(by_row(p), s_layout) * factor)
            p = gl.convert_layout(by_row(p.to(dtype)), p_layout)
            for j in range(1, n_tiles):
                s, last = (tile + j) % STAGES, (tile + j - 1) % STAGES
                mbarrier.wait(smem.k_full.index(s), (tile + j) // STAGES & 1)
                k_t = matrix(smem.k, s).permute((1, 0))
                s_async = warpgroup_mma(q, k_t, zero, use_acc=False, is_async=True)
                mbarrier.wait(smem.v_full.index(last), (tile + j - 1) // STAGES & 1)
                acc_async = warpgroup_mma(p, matrix(smem.v, last), acc, is_async=True)
                scores = warpgroup_mma_wait(1, (s_async,))
                offs_j, masked = start_n - j * BLOCK_N + offs_n, j < work.n_head
                if MASK == INTERVAL:
                    masked = masked | (j >= n_tiles - work.n_tail)
                if MOD is not None:
                    kv_idx = index_at(k_layout, offs_j, dims.TK, MODS.last_k)[None, :]
                    scores = modify(scores, work.b, work.h, q_idx, kv_idx, MODS, MOD)[len(MOD)]
                columns = offs_j, row_begin, row_end, masked, MASK
                scores, m_i, shift, alpha = online_softmax_max(scores, m_i, l_i, qk_scale, *columns)
                if EARLY:
                    consumer_release(s, CONSUMERS)
                    p_new = gl.exp2(scores * qk_scale - shift)
                    l_i = l_i * alpha + gl.sum(p_new, 2)
                    hold_wait(l_i)
                else:
                    consumer_release_after(alpha, s, CONSUMERS)
                acc = warpgroup_mma_wait(0, (acc_async,))  # p is in registers: they may not be written before
                consumer_release(STAGES + last, CONSUMERS)
                if not EARLY:
                    p_new = gl.exp2(scores * qk_scale - shift)
                    l_i = l_i * alpha + gl.sum(p_new, 2)
                if DROPOUT:
                    factor = keep(work.b, work.h, q_idx, kv_idx, MODS)
                    p_new = by_lane(gl.convert_layout(by_row(p_new), s_layout) * factor)
                p = gl.convert_layout(by_row(p_new.to(dtype)), p_layout)
                acc = rescale(acc, alpha)
            tile += n_tiles
            n_done += 1
            mbarrier.arrive(smem.q_empty.index(c), count=1)
            s = (tile - 1) % STAGES
            mbarrier.wait(smem.v_full.index(s), (tile - 1) // STAGES & 1)
            acc = warpgroup_mma(p, matrix(smem.v, s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            consumer_release(STAGES + s, CONSUMERS)

            b, h, H = work.b, work.h, dims.H
            first, offs, mask = state_offsets(b, h, start_m, T, H, ROWS, BLOCK_D, HEAD_DIM, o_layout)
            lse_rows = LSE + (b * H + h).to(gl.int64) * T + offs_m
            m_i, l_i = gl.convert_layout(gl.max(m_i, 1), row_s), gl.convert_layout(gl.sum(l_i, 1), row_s)
            l_i = gl.where(l_i == 0.0, 1.0, l_i)  # a row that saw no key: acc = 0, lse = -inf
            lse = m_i + gl.log2(l_i)
            weight = 1.0 / l_i
            if HAS_SINKS:  # at hop 0: a state with o = 0
                sink = gl.full([ROWS], 0.0, gl.float32, row_s) + gl.load(SINKS + h).to(gl.float32) * LOG2E
                lse, _, new_weight = join_lse(sink, lse)
                acc = acc * gl.convert_layout(weight * new_weight, row_o)[:, None]
            elif gl.load(hop + CARRY) > 0:  # the state of earlier hops; at the start it would cause delay
                old = gl.load(lse_rows, mask=offs_m < T, other=-float("inf")) * LOG2E
                lse, old_weight, new_weight = join_lse(old, lse)
                acc = acc * gl.convert_layout(weight * new_weight, row_o)[:, None]
                old_weight = gl.convert_layout(old_weight, row_o)[:, None]
                acc += gl.load(ACC + first + offs, mask=mask, other=0.0) * old_weight
            else:
                acc = acc * gl.convert_layout(weight, row_o)[:, None]
            gl.store(lse_rows, lse / LOG2E, mask=offs_m < T)
            if MASK == INTERVAL:
                final = gl.load(work.bounds + LATER) == 0
            else:
                last_m = gl.minimum(work.start + CONSUMERS * ROWS, T) - 1
                final = position(hop + Q_LAYOUT, last_m, T) < gl.load(hop + NEXT_START)
            if final:
                tma.store_wait(0)
                warpgroup_barrier()
                store_tile(o_desc, o_smem.index(c), acc, b, start_m, h)
            else:
                gl.store(ACC + first + offs, acc, mask=mask)
    tma.store_wait(0)


@gluon.jit
def matrix(buffers, i):
    """Tile i of a buffer of (1, rows, 1, columns) tiles, [rows, columns]."""
    return buffers.index(i).reshape([buffers.shape[2], buffers.shape[4]])


@gluon.jit
def tiles_like(desc, N: constexpr):
    """Shared memory for N of the tiles that desc describes."""
    return gl.allocate_shared_memory(desc.dtype, [N] + desc.block_type.shape, desc.layout)


@gluon.jit(do_not_specialize=["B", "H", "G", "T", "TK", "GROUP_B", "SET_B", "L2_HEADS", "WAVES"])
def hopper_fwd_kernel(q_desc, k_desc, v_desc, o_desc, ACC, LSE, SINKS, HOP, ROWS, TILES, sm_scale,
                      B, H, G, T, TK, GROUP_B, SET_B, L2_HEADS, WAVES, MODS, HEAD_DIM: constexpr,
                      MASK: constexpr, CONSUMERS: constexpr, STAGES: constexpr, HAS_SINKS: constexpr,
                      MOD: constexpr, DROPOUT: constexpr):  # fmt: skip
    q, k, v = tiles_like(q_desc, CONSUMERS), tiles_like(k_desc, STAGES), tiles_like(v_desc, STAGES)
    full, empty = barriers(CONSUMERS), barriers(CONSUMERS)
    smem = FwdBuffers(q, k, v, full, empty, barriers(STAGES), barriers(STAGES))
    dims = Dims(HOP, ROWS, TILES, B, H, G, T, TK, GROUP_B, SET_B, L2_HEADS, WAVES, 1)
    descs, out = (q_desc, k_desc, v_desc), (o_desc, tiles_like(o_desc, CONSUMERS), ACC, LSE, SINKS, sm_scale)
    if CONSUMERS == 2:  # registers: 240 for a consumer's thread, 24 for the producer's
        gl.warp_specialize([
            (fwd_consumer, (0, out, smem, dims, MODS, HEAD_DIM, MASK, HAS_SINKS, MOD, DROPOUT)),
            (fwd_consumer, (1, out, smem, dims, MODS, HEAD_DIM, MASK, HAS_SINKS, MOD, DROPOUT)),
            (fwd_producer, (descs, smem, dims, MASK)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (fwd_consumer, (0, out, smem, dims, MODS, HEAD_DIM, MASK, HAS_SINKS, MOD, DROPOUT)),
            (fwd_consumer, (1, out, smem, dims, MODS, HEAD_DIM, MASK, HAS_SINKS, MOD, DROPOUT)),
            (fwd_consumer, (2, out, smem, dims, MODS, HEAD_DIM, MASK, HAS_SINKS, MOD, DROPOUT)),
            (fwd_producer, (descs, smem, dims, MASK)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


# The backward is one kernel for dq, dk and dv, with five products a tile; dq_kernel and dkv_kernel make
# seven. Keys are resident, queries are streamed. Scores are computed transposed, so that p^T and ds^T are
# left operands of dv += p^T do and dk += ds^T q as they are, in registers. Both consumers put their ds into
# shared memory, meet, and each computes half of dq = ds k. One more warp, the reducer, adds that to DQ_ACC
# in global memory by TMA, so that no consumer waits for it. A consumer writes its half as its threads hold
# it (as FlashAttention-3 does): 16 bytes at a time, without bank conflicts; bwd_postprocess_kernel puts it
# in order.
#
# A query tile of dq gets its parts in a fixed order, that of the key tiles, so that the same inputs give
# the same bits. DQ_SEMAPHORE[query tile] is the number of the key tile that adds next. (CUTLASS's semaphores,
# as in FlashAttention.) Work tiles are handed out in this order, too, as programs become free: whoever is
# waited for has begun. All begin with the last queries, so that nobody waits long. Without DETERMINISTIC the
# reducer does not wait.
Q_FREE, DQ_FREE, DQ_FULL = (constexpr(i) for i in (0, 3, 6))  # named barriers
BWD_ROWS = constexpr(128)  # keys of a work tile


@builtin
def add_tile(desc, coord, src, _semantic=None):
    """Add a tile in shared memory to global memory, by TMA."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


tma_add = getattr(tma, "async_atomic_add", None) or add_tile  # new in triton 3.8


@gluon.jit
def next_work_tile(COUNTER):
    """A number that no other program gets: 0, 1, 2, ... For a partition of one warp."""
    asm: constexpr = """{ .reg .pred p; .reg .b32 lane; mov.b32 $0, 0; mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0; @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
        shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; }"""
    args = [COUNTER.to(gl.int64)]
    return gl.inline_asm_elementwise(asm, "=r,l", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def semaphore_fetch(SEMAPHORE):
    """Its value, for semaphore_wait. What comes between the two does not wait for this load."""
    asm: constexpr = "ld.relaxed.gpu.global.b32 $0, [$1];"
    args = [SEMAPHORE.to(gl.int64)]
    return gl.inline_asm_elementwise(asm, "=r,l", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def semaphore_wait(SEMAPHORE, turn, fetched):
    """Wait until its value is `turn`. If it was when fetched, nothing is acquired: additions are made in L2,
    and those before this are complete there. If not, all that was written before is visible."""
    asm: constexpr = """{ .reg .pred p; .reg .b32 x; mov.b32 x, $3;
        again: setp.eq.s32 p, x, $2; @p bra done; ld.acquire.sys.global.b32 x, [$1]; bra again;
        done: mov.b32 $0, 0; }"""
    args = [SEMAPHORE.to(gl.int64), turn, fetched]
    gl.inline_asm_elementwise(asm, "=r,l,r,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def semaphore_release(SEMAPHORE, turn):
    """Set it to turn + 1, once what this warp has added is in global memory. Waiting for the bulk group does
    not ensure that: with a relaxed store results differed from run to run."""
    asm: constexpr = """cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff;
        st.release.gpu.global.b32 [$1], $2; mov.b32 $0, 0;"""
    args = [SEMAPHORE.to(gl.int64), turn + 1]
    gl.inline_asm_elementwise(asm, "=r,l,r", args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def query_heads(dims, MASK: constexpr):
    """The G query heads of a key head are streamed OUTER heads after each other, each with all its tiles; the
    others take turns at each tile. Under a window all take turns at a distance: L2 would not hold G heads."""
    if MASK == INTERVAL:
        n_outer, n_inner = dims.OUTER, dims.G // dims.OUTER
    else:
        n_outer, n_inner = 1, dims.G
    return n_outer, n_inner


@gluon.jit
def bwd_producer(descs, smem, dims, COUNTER, n_work, MASK: constexpr):
    q_desc, k_desc, v_desc, do_desc, lse_delta_desc = descs
    STAGES: constexpr = smem.q.shape[0]
    BLOCK_M: constexpr = smem.q.shape[2]
    layout: constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_done, tile = 0, 0
    n = next_work_tile(COUNTER)
    while n < n_work:
        work = bwd_work_tile(n, dims, BWD_ROWS, BLOCK_M, MASK)
        if work.active:
            smem.number.index(n_done % 2).store(gl.full([1], n, gl.int32, layout))
            warpgroup_barrier()
            mbarrier.arrive(smem.number_full.index(n_done % 2), count=1)
            if work.n_tiles == 0:
                mbarrier.wait(smem.kv_empty.index(0), n_done & 1 ^ 1)
                mbarrier.arrive(smem.kv_full.index(0), count=1)
            n_outer, n_inner = query_heads(dims, MASK)
            for outer in range(n_outer):
                for j in range(work.n_tiles):
                    row = (work.first - j) * BLOCK_M
                    for g in range(n_inner):  # the query heads that share this key head
                        h = work.h * dims.G + outer + g
                        s = tile % STAGES
                        if tile >= STAGES:
                            bar_sync(Q_FREE + s, 288)
                        bar = smem.q_full.index(s)
                        mbarrier.expect(bar, q_desc.block_type.nbytes + lse_delta_desc.block_type.nbytes)
                        tma_load(q_desc, [work.b, row, h, 0], bar, smem.q.index(s))
                        tma_load(lse_delta_desc, [0, work.b * dims.H + h, row], bar, smem.lse_delta.index(s))
                        if (g == 0) & (j == 0) & (outer == 0):
                            mbarrier.wait(smem.kv_empty.index(0), n_done & 1 ^ 1)
                            bar = smem.kv_full.index(0)
                            mbarrier.expect(bar, k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
                            tma_load(k_desc, [work.b, work.start, work.h, 0], bar, smem.k.index(0))
                            tma_load(v_desc, [work.b, work.start, work.h, 0], bar, smem.v.index(0))
                            tma_load(v_desc, [work.b, work.start + 64, work.h, 0], bar, smem.v.index(1))
                        bar = smem.do_full.index(s)
                        mbarrier.expect(bar, do_desc.block_type.nbytes)
                        tma_load(do_desc, [work.b, row, h, 0], bar, smem.do.index(s))
                        tile += 1
            n_done += 1
        n = next_work_tile(COUNTER)
    smem.number.index(n_done % 2).store(gl.full([1], n_work, gl.int32, layout))
    warpgroup_barrier()
    mbarrier.arrive(smem.number_full.index(n_done % 2), count=1)


@gluon.jit
def next_number(smem, n_done, WARPS: constexpr):
    """The number of the work tile that comes next, from the producer."""
    layout: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(smem.number_full.index(n_done % 2), n_done // 2 & 1)
    return gl.max(smem.number.index(n_done % 2).load(layout), 0)


@gluon.jit
def bwd_reducer(dq_desc, smem, dims, DQ_SEMAPHORE, n_work, DETERMINISTIC: constexpr, MASK: constexpr):
    BLOCK_M: constexpr = smem.q.shape[2]
    UNITS: constexpr = smem.q.shape[2] * smem.q.shape[4] // (64 * 64)  # of a query tile: one of each consumer
    T_pad = gl.cdiv(dims.T, ROW_PAD) * ROW_PAD
    n_done = 0
    n = next_number(smem, n_done, 1)
    while n < n_work:
        work = bwd_work_tile(n, dims, BWD_ROWS, BLOCK_M, MASK)
        # without it, at work tiles without queries, this warp would be ahead, and count twice in kv_empty
        mbarrier.wait(smem.kv_full.index(0), n_done & 1)
        number, last = work.start // BWD_ROWS, DQ_SEMAPHORE
        turn, wait_end = number, work.first + 1
        if MASK == INTERVAL:
            turn, wait_end = gl.load(work.bounds + TURN), gl.load(work.bounds + WAIT_END)
        n_outer, n_inner = query_heads(dims, MASK)
        for outer in range(n_outer):
            for j in range(work.n_tiles):
                for g in range(n_inner):
                    h = work.h * dims.G + outer + g
                    tile = (work.b * dims.H + h) * (T_pad // BLOCK_M) + work.first - j
                    bar_arrive(DQ_FREE, 160)
                    bar_arrive(DQ_FREE + 1, 160)
                    if DETERMINISTIC:
                        fetched = semaphore_fetch(DQ_SEMAPHORE + tile)
                        if (g > 0) | (j > 0) | (outer > 0):
                            semaphore_release(last, number)
                        last = DQ_SEMAPHORE + tile
                        # the first key tile of those that see these queries does not wait
                        semaphore_wait(last, gl.where(work.first - j < wait_end, turn, fetched), fetched)
                    bar_sync(DQ_FULL, 160)
                    tma_add(dq_desc, [tile * UNITS * 16, 0], smem.dq.index(0))
                    bar_sync(DQ_FULL + 1, 160)
                    tma_add(dq_desc, [tile * UNITS * 16 + 16, 0], smem.dq.index(1))
                    tma.store_wait(0)
        if DETERMINISTIC:
            if work.n_tiles > 0:
                semaphore_release(last, number)
        n_done += 1
        mbarrier.arrive(smem.kv_empty.index(0), count=1)
        n = next_number(smem, n_done, 1)


@gluon.jit
def unknown_zero():
    """0, which no compiler knows. An address with it is computed where it is used: those of k and v, some
    twenty, would else stay in registers throughout the loop, for which there are too few."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bwd_tiles(c: constexpr, dk, dv, smem, tile, n, start_m, bounds, offs_n, T, TK, G, qk_scale, at, MODS,
              MOD: constexpr, DROPOUT: constexpr, MOD_BWD: constexpr, MASK: constexpr):  # fmt: skip
    """n streamed tiles, the first being the tile-th of this program, with the queries from start_m on: G
    heads' of the same queries, then of the queries before. bounds: Bounds.columns if MASK is INTERVAL; the
    first query that sees each key if CAUSAL; unused if FULL, which masks nothing. at: HopRow, batch, the
    first of the heads, which only MODS need."""
    STAGES: constexpr = smem.q.shape[0]
    BLOCK_M: constexpr = smem.q.shape[2]
    BLOCK_D: constexpr = smem.q.shape[4]
    s_layout: constexpr = product_layout(BLOCK_M)
    p_layout: constexpr = operand_layout(BLOCK_D)
    dtype: constexpr = smem.q.dtype
    zero = gl.zeros([64, BLOCK_M], gl.float32, s_layout)
    zero_dq = gl.zeros([64, 64], gl.float32, product_layout(64))
    if MOD is not None:
        hop, b, head = at
        kv_idx = index_at(load_layout(hop + K_LAYOUT), offs_n, TK, MODS.last_k)[:, None]
        q_layout = load_layout(hop + Q_LAYOUT)
    for i in range(tile, tile + n):
        s, phase, both = i % STAGES, i // STAGES & 1, i % 2
        here = unknown_zero()
        k, v = matrix(smem.k, here), matrix(smem.v, c + here)
        q, do = matrix(smem.q, s), matrix(smem.do, s)
        lse_delta = smem.lse_delta.index(s).reshape([2, BLOCK_M])
        mbarrier.wait(smem.q_full.index(s), phase)
        lse = lse_delta.slice(0, 1).load(s_layout)
        s_async = warpgroup_mma(k.slice(c * 64, 64), q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(smem.do_full.index(s), phase)
        dp_async = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, (s_async,))  # [64 keys, BLOCK_M queries]
        if MASK != FULL or MOD is not None:
            offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))[None, :]
            first = start_m - (i - tile) // G * BLOCK_M
        if MOD is not None:
            h, q_idx = head + (i - tile) % G, index_at(q_layout, first + offs_m, T, MODS.last_q)
            states = modify(scores, b, h, q_idx, kv_idx, MODS, MOD)
            scores = states[len(MOD)]
        p = gl.exp2(scores * qk_scale - lse)
        if MASK != FULL:
            if MASK == INTERVAL:
                begin, end = load_bounds(
                    bounds, offs_n, TK, T
                )  # here: for the loop they would take registers
                seen = (offs_m >= (begin - first)[:, None]) & (offs_m < (end - first)[:, None])
            else:
                seen = offs_m >= (bounds - first)[:, None]
            p = gl.where(seen, p, 0.0)
        kept = p
        if DROPOUT:
            kept = p * keep(b, h, q_idx, kv_idx, MODS)
        dp = warpgroup_mma_wait(0, (dp_async,))
        delta = lse_delta.slice(1, 1).load(s_layout)
        ds = kept * dp - p * delta if DROPOUT else p * (dp - delta)
        if MOD is not None:
            ds = modify_bwd(ds, states, b, h, q_idx, kv_idx, MODS, MOD_BWD)
            if MASK != FULL:
                ds = gl.where(seen, ds, 0.0)
        ds = ds.to(dtype)
        # two buffers: the other consumer may still read the last one
        smem.ds.index(both).slice(c * 64, 64, 1).permute((1, 0)).store(ds)
        dv_async = warpgroup_mma(gl.convert_layout(kept.to(dtype), p_layout), do, dv, is_async=True)
        fence_async_shared()
        bar_sync(DQ_FREE + c, 160)
        mbarrier.arrive(smem.ds_full.index(0), count=1)
        mbarrier.wait(smem.ds_full.index(0), i & 1)
        all_ds = smem.ds.index(both)  # [BLOCK_M queries, 128 keys]
        if BLOCK_M == 64:  # dq is [64, 128]: half of the columns each; else [128, 64]: half of the rows
            dq_async = warpgroup_mma(all_ds, k.slice(c * 64, 64, 1), zero_dq, use_acc=False, is_async=True)
        else:
            dq_async = warpgroup_mma(all_ds.slice(c * 64, 64), k, zero_dq, use_acc=False, is_async=True)
        dk_async = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, (dv_async, dq_async))
        # [warp, upper or lower rows, row, columns of 8, of 2, of 1], by threads and what they hold
        fragments = dq.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([16, 256])
        smem.dq.index(c).store(fragments)
        fence_async_shared()
        bar_arrive(DQ_FULL + c, 160)
        dk = warpgroup_mma_wait(0, (dk_async,))
        bar_arrive(Q_FREE + s, 288)
    return dk, dv


@gluon.jit
def bwd_consumer(c: constexpr, out, smem, dims, n_work, MODS, HEAD_DIM: constexpr, MASK: constexpr,
                 MOD: constexpr, DROPOUT: constexpr, MOD_BWD: constexpr):  # fmt: skip
    DK, DV, DK_ACC, DV_ACC, COMING, dk_desc, dv_desc, sm_scale = out
    BLOCK_M: constexpr = smem.q.shape[2]
    BLOCK_D: constexpr = smem.q.shape[4]
    dtype: constexpr = smem.q.dtype
    o_layout: constexpr = product_layout(BLOCK_D)
    row_s: constexpr = gl.SliceLayout(1, product_layout(BLOCK_M))
    heads, T, TK = dims.H // dims.G, dims.T, dims.TK
    qk_scale = log2_scale(sm_scale, MODS, MOD)
    n_done, tile = 0, 0
    n = next_number(smem, n_done, 4)
    while n < n_work:
        work = bwd_work_tile(n, dims, BWD_ROWS, BLOCK_M, MASK)
        row = work.start + c * 64
        offs_n = row + gl.arange(0, 64, layout=row_s)
        bounds = dims.BOUNDS  # of INTERVAL; else the first query that sees each key
        if MASK == INTERVAL:
            bounds += (work.b // dims.SET_B).to(gl.int64) * (2 * TK)
        else:
            bounds = first_query(work.hop, offs_n, T, MASK)
        dk = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        dv = dk
        mbarrier.wait(smem.kv_full.index(0), n_done & 1)
        n_outer, G = query_heads(dims, MASK)
        n, args = work.n_tiles - work.n_head - work.n_tail, (bounds, offs_n, T, TK, G, qk_scale)
        for outer in range(n_outer):
            start_m, at = work.first * BLOCK_M, (work.hop, work.b, work.h * dims.G + outer)
            if MASK == INTERVAL:  # loops of their own: a branch in one would cost registers
                dk, dv = bwd_tiles(c, dk, dv, smem, tile, work.n_head * G, start_m, *args, at, MODS,
                                   MOD, DROPOUT, MOD_BWD, MASK)  # fmt: skip
                tile += work.n_head * G
                start_m -= work.n_head * BLOCK_M
            dk, dv = bwd_tiles(c, dk, dv, smem, tile, n * G, start_m, *args, at, MODS,
                               MOD, DROPOUT, MOD_BWD, FULL)  # fmt: skip
            tile += n * G
            if MASK != FULL:
                start_m -= n * BLOCK_M
                dk, dv = bwd_tiles(c, dk, dv, smem, tile, work.n_tail * G, start_m, *args, at, MODS,
                                   MOD, DROPOUT, MOD_BWD, MASK)  # fmt: skip
                tile += work.n_tail * G
        n_done += 1
        dk = dk * sm_scale
        at, offs, mask = state_offsets(work.b, work.h, row, TK, heads, 64, BLOCK_D, HEAD_DIM, o_layout)
        held, _ = held_and_written(work.hop, work.start)
        if held:
            semaphore_wait(COMING, 0, 1)
            dk += gl.load(DK_ACC + at + offs, mask=mask, other=0.0)
            dv += gl.load(DV_ACC + at + offs, mask=mask, other=0.0)
        if DK.dtype.element_ty == dtype:
            # over this consumer's v, which nobody else reads
            store_tile(dv_desc, smem.v.index(c), dv, work.b, row, work.h)
            tma.store_wait(0)
            warpgroup_barrier()
            store_tile(dk_desc, smem.v.index(c), dk, work.b, row, work.h)
            tma.store_wait(0)
            warpgroup_barrier()
        else:
            gl.store(DK + at + offs, dk, mask=mask)
            gl.store(DV + at + offs, dv, mask=mask)
        mbarrier.arrive(smem.kv_empty.index(0), count=1)
        n = next_number(smem, n_done, 4)


@gluon.jit(do_not_specialize=["B", "H", "G", "T", "TK", "GROUP_B", "SET_B", "L2_HEADS", "WAVES", "OUTER"])
def hopper_bwd_kernel(q_desc, k_desc, v_desc, do_desc, lse_delta_desc, dq_desc, dk_desc, dv_desc,
                      DK, DV, DK_ACC, DV_ACC, DQ_SEMAPHORE, HOP, COLUMNS, TILES, sm_scale,
                      B, H, G, T, TK, GROUP_B, SET_B, L2_HEADS, WAVES, OUTER, MODS, HEAD_DIM: constexpr,
                      MASK: constexpr, STAGES: constexpr, DETERMINISTIC: constexpr, MOD: constexpr,
                      DROPOUT: constexpr, MOD_BWD: constexpr):  # fmt: skip
    BLOCK_M: constexpr = q_desc.block_type.shape[1]
    ds_layout: constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BWD_ROWS], q_desc.dtype)
    ds = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK_M, BWD_ROWS], ds_layout)
    number = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    kv_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ds_full.index(0), count=2)
    mbarrier.init(kv_empty.index(0), count=3)  # of the consumers and the reducer
    q, do = tiles_like(q_desc, STAGES), tiles_like(do_desc, STAGES)
    lse_delta = tiles_like(lse_delta_desc, STAGES)
    k, v, dq = tiles_like(k_desc, 1), tiles_like(v_desc, 2), tiles_like(dq_desc, 2)
    smem = BwdBuffers(q, k, v, do, lse_delta, ds, dq, number, barriers(2), barriers(1), kv_empty, ds_full,
                      barriers(STAGES), barriers(STAGES))  # fmt: skip
    dims = Dims(HOP, COLUMNS, TILES, B, H, G, T, TK, GROUP_B, SET_B, L2_HEADS, WAVES, OUTER)
    descs = (q_desc, k_desc, v_desc, do_desc, lse_delta_desc)
    n_work = gl.cdiv(TK, BWD_ROWS) * B * (H // G)
    COUNTER = DQ_SEMAPHORE + B * H * (gl.cdiv(T, ROW_PAD) * (ROW_PAD // 64))  # behind those of dq
    out = (DK, DV, DK_ACC, DV_ACC, COUNTER + 1, dk_desc, dv_desc, sm_scale)
    gl.warp_specialize([
        (bwd_consumer, (0, out, smem, dims, n_work, MODS, HEAD_DIM, MASK, MOD, DROPOUT, MOD_BWD)),
        (bwd_consumer, (1, out, smem, dims, n_work, MODS, HEAD_DIM, MASK, MOD, DROPOUT, MOD_BWD)),
        (bwd_producer, (descs, smem, dims, COUNTER, n_work, MASK)),
        (bwd_reducer, (dq_desc, smem, dims, DQ_SEMAPHORE, n_work, DETERMINISTIC, MASK)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@triton.jit(do_not_specialize=["H", "T"])
def bwd_postprocess_kernel(DQ_ACC, DQ, sm_scale, H, T, HEAD_DIM: constexpr, BLOCK_D: constexpr):
    """dq in its own dtype and order from 64 rows of what hopper_bwd_kernel has added up."""
    n_tiles = tl.cdiv(T, ROW_PAD) * (ROW_PAD // 64)
    bh, tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    dq = tl.load(DQ_ACC + tl.program_id(0).to(tl.int64) * (64 * BLOCK_D) + tl.arange(0, 64 * BLOCK_D))
    # halves of the columns, then as in bwd_tiles
    dq = dq.reshape(BLOCK_D // 64, 8, 4, 8, 4, 2, 2).permute(2, 5, 3, 0, 1, 4, 6).reshape(64, BLOCK_D)
    offs, mask = state_tile(bh // H, bh % H, tile * 64, T, H, 64, BLOCK_D, HEAD_DIM)
    tl.store(DQ + offs, (dq * sm_scale).to(DQ.dtype.element_ty), mask=mask)


# their launchers: the backend "gluon". Consumers (warpgroups of 64 resident rows), rows of a streamed tile,
# stages, by padded head dim, as measured on one H100. Other head dims run in portable Triton
HOPPER_TILES = {"fwd": {64: (3, 128, 2), 128: (2, 128, 2)}, "bwd": {64: (2, 128, 2), 128: (2, 64, 2)}}
L2_BYTES = 32 << 20  # of the 50 MB of an H100; 32 and 64 were the best of 8 to 512


def padded_head_dim(D):
    return max(64, next_power_of_2(D))


def hopper_tiles(kernel, D, modified):
    """Of HOPPER_TILES. With score mods two consumers have more registers than three, and need them."""
    consumers, streamed, stages = HOPPER_TILES[kernel][padded_head_dim(D)]
    return 2 if modified else consumers, streamed, stages


def hopper_takes(D, dtype):
    """Are there Hopper kernels for this head dim and dtype? TMA wants rows of a multiple of 16 bytes."""
    return D <= max(HOPPER_TILES["fwd"]) and D % 8 == 0 and dtype in (torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=4096)
def tma_fields(shape, strides, block, dtype):
    """The fields of what tma_descriptor returns, but for the tensor; None where TMA cannot read x."""
    if not tma_ok(shape, strides, dtype):
        return None
    if dtype == torch.float32:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(block))
    else:  # one for both 16-bit dtypes
        layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.float16)
    strides = [s if n > 1 else 16 for s, n in zip(strides[:-1], shape)]  # a dimension of 1 may have any
    return vars(GluonDescriptor(torch.empty(0, dtype=dtype), list(shape), [*strides, 1], list(block), layout))


def tma_descriptor(x, block):
    """x for TMA, in tiles of shape `block`; what is outside x reads as 0. Of a copy where TMA cannot read x
    itself: never for results, which are contiguous and aligned, with a D that hopper_takes."""
    fields = tma_fields(x.shape, x.stride(), block, x.dtype)
    if fields is None or x.data_ptr() % 16:
        x = x.contiguous() if fields is None else x.clone()
        fields = tma_fields(x.shape, x.stride(), block, x.dtype)
    descriptor = object.__new__(GluonDescriptor)  # its own checks take longer than a launch
    descriptor.__dict__ = {**fields, "base": x}
    return descriptor


@functools.lru_cache(maxsize=1024)
def hopper_config(kernel, shape, k_shape, device, n_groups, n_sets, mask_kind, modified):
    """Of a launch: shapes of a consumer's resident tile and of streamed ones, integers of Dims, grid,
    constants, options."""
    (B, T, H, D), (_, TK, HKV, _) = shape, k_shape
    BLOCK_D = padded_head_dim(D)
    consumers, streamed, stages = hopper_tiles(kernel, D, modified)
    n_sm = torch.cuda.get_device_properties(device).multi_processor_count
    n_resident, n_streamed = (TK, T) if kernel == "bwd" else (T, TK)
    shared = 1 if kernel == "bwd" else H // HKV  # heads that stream the same tiles
    n_tiles, n_heads = triton.cdiv(n_resident, 64 * consumers), B * HKV * shared
    # heads at a time: as many as fit L2, two waves at least, and all sections alike
    heads = max(L2_BYTES // (4 * n_streamed * BLOCK_D), triton.cdiv(2 * n_sm, n_tiles * shared))
    if kernel == "bwd" and mask_kind != FULL.value:
        heads = max(heads, n_sm // 16)  # else too many programs in a row wait for each other's dq
    heads = shared * next(n for n in range(1, B * HKV + 1) if B * HKV % n == 0 and n >= min(heads, B * HKV))
    grid = min(n_tiles * n_heads, n_sm)
    waves = triton.cdiv(n_tiles * heads, grid)
    dims = B, H, H // HKV, T, TK, B // n_groups, B // n_sets, heads, waves
    of_fwd = dict(CONSUMERS=consumers) if kernel == "fwd" else {}
    constants = dict(HEAD_DIM=D, MASK=mask_kind, **of_fwd, STAGES=stages)
    options = dict(num_warps=4, maxnreg={2: 168, 3: 128}[consumers])
    return (1, 64, 1, BLOCK_D), (1, streamed, 1, BLOCK_D), dims, grid, constants, options


def hopper_problem(kernel, q, k, hop, mask, mods):
    """Bounds of resident rows and of tiles, or any pointers where the kernel reads none; hopper_config."""
    bounds, n_sets = (hop.table, hop.table), 1
    if mask.kind == INTERVAL.value:
        rows = hop.bounds.rows if kernel == "fwd" else hop.bounds.columns
        bounds, n_sets = (rows, hop.bounds.tiles), len(rows)
    args = q.shape, k.shape, q.device, len(hop.rows), n_sets, mask.kind, bool(mods)
    return bounds, *hopper_config(kernel, *args)


def hopper_fwd(q, k, v, o, acc, lse, sinks, hop, mask, mods, sm_scale):
    bounds, resident, streamed, dims, grid, constants, options = hopper_problem("fwd", q, k, hop, mask, mods)
    tiles = (q, resident), (k, streamed), (v, streamed), (o, resident)
    has_sinks = sinks is not None
    sinks = sinks if has_sinks else lse  # any pointer
    mod_args, of_mods, also = mods.for_kernels(sm_scale)
    args = *(tma_descriptor(*tile) for tile in tiles), acc, lse, sinks, hop.table, *bounds, sm_scale, *dims
    depends = q.dtype, streamed, sinks.dtype, *(x.data_ptr() % 16 == 0 for x in (sinks, bounds[0])), also
    constants = dict(constants, HAS_SINKS=has_sinks, **of_mods)
    launch(hopper_fwd_kernel, q.device, depends, grid, (*args, mod_args), constants, **options)


def hopper_preprocess(o, do, lse, dlse, dq, n_hops):
    B, T, H, D = o.shape
    n, BLOCK_D = B * H * padded_rows(T), padded_head_dim(D)
    dq_acc = torch.empty(n * BLOCK_D // 256, 256, dtype=torch.float32, device=o.device)  # in tiles of 64 x 64
    semaphores = torch.empty(n_hops, n // 32, dtype=torch.int32, device=o.device)
    coming = semaphores.data_ptr() + 4 * (n // 64 + 1)  # beside hop 0's counter of work tiles
    return (run_preprocess(o, do, lse, dlse, dq_acc, semaphores, n_hops), dq_acc, semaphores), coming


def hopper_bwd(q, k, v, do, state, dq, dk, dv, dk_acc, dv_acc, hop, j, mask, mods, sm_scale, deterministic):
    lse_delta, dq_acc, semaphores = state
    bounds, half, streamed, dims, grid, constants, options = hopper_problem("bwd", q, k, hop, mask, mods)
    resident = 1, BWD_ROWS.value, 1, half[3]
    inputs = [tma_descriptor(x, b) for x, b in ((q, streamed), (k, resident), (v, half), (do, streamed))]
    rows, dq_tiles = tma_descriptor(lse_delta, (2, 1, streamed[1])), tma_descriptor(dq_acc, (16, 256))
    outs = [tma_descriptor(x, half) if x.dtype == q.dtype else rows for x in (dk, dv)]
    outs += dk, dv, dk_acc, dv_acc, semaphores[j], hop.table, *bounds
    outer = q.shape[2] // k.shape[2] if mask.left < INT_MAX else 1  # see query_heads
    mod_args, of_mods, also = mods.for_kernels(sm_scale, backward=True)
    args = (*inputs, rows, dq_tiles, *outs, sm_scale, *dims, outer, mod_args)
    depends = q.dtype, dk.dtype, dk_acc.dtype, streamed, bounds[0].data_ptr() % 16 == 0, also
    constants = dict(constants, DETERMINISTIC=deterministic, **of_mods)
    launch(hopper_bwd_kernel, q.device, depends, grid, args, constants, **options)


def hopper_postprocess(state, dq, sm_scale):
    (_, T, H, D), dq_acc = dq.shape, state[1]
    constants = dict(HEAD_DIM=D, BLOCK_D=padded_head_dim(D))
    grid, args = dq_acc.numel() // (64 * padded_head_dim(D)), (dq_acc, dq, sm_scale, H, T)
    launch(bwd_postprocess_kernel, dq.device, (dq.dtype,), grid, args, constants, num_warps=4)


BACKENDS = {
    "torch": Backend(torch_fwd, torch_preprocess, torch_bwd, no_postprocess),
    "triton": Backend(triton_fwd, triton_preprocess, triton_bwd, no_postprocess),
    "gluon": Backend(hopper_fwd, hopper_preprocess, hopper_bwd, hopper_postprocess),
}


def best_backend(q):
    """The fastest backend that takes q."""
    if not q.is_cuda:
        return "triton" if INTERPRET else "torch"
    return "gluon" if capability(q.device)[0] == 9 and hopper_takes(q.shape[-1], q.dtype) else "triton"


# -----------------------------------------------------------------------------
# the symmetric memory transport (CUDA, one host)

# Multicast is unused here, and a fault in it can stop all GPUs of a host. torch reads this when it first uses
# symmetric memory: import this module before
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


class Symmetric:
    """Each rank pushes to every other rank those of its keys that the other's queries see, with the copy
    engine, on a stream of its own: no SM is used. Gradients are pulled from the rank before.

    Signals are flags in the memory of the rank that waits for them, which then clears them. At the end of a
    hop loop all flags are clear, and all that was sent is read: loops may follow in any order, and CUDA
    graphs replay.
        FREE + reader    keys may be pushed to `reader`
        READY + source   the keys of `source` have been pushed
        SENT + staging   the gradients in that staging buffer of the rank before may be pulled
        READ + staging   they have been pulled, from this rank's
    """

    def __init__(self, ring, schedule, k, v, T, mask, direction, acc_dtype=None):
        self.memory, self.stream, self.rank = ring.memory, ring.memory.copy_stream, ring.rank
        self.kv, known = (k, v), self.memory.known
        key = schedule, len(k), T, k.shape[1], mask, direction
        if key not in known:  # CUDA graphs have copies
            remember(known, key, stream_ops(self.stream, schedule, ring.rank, ring.n_ranks, *key[1:]), 1024)
        self.hops, self.key_ops, self.grad_ops, self.last_ops, self.joins = known[key]
        self.kv_staging = self.memory.views(self.memory.kv_staging, k, k.dtype)
        self.grad_staging = acc_dtype and self.memory.views(self.memory.grad_staging, k, acc_dtype)
        self.memory.in_graph |= self.stream.capturing()

    def keys(self, j):
        ops, stream = self.key_ops[j], self.stream
        if ops.staging is not None:
            stream.compute_wait(self.arrived)
        if j == 0 or ops.arrives:
            stream.wait_compute()  # k and v are computed, earlier kernels have read the staging buffer
        stream.run(ops.before)
        if ops.rows:
            to = self.memory.base[ops.peer] + self.memory.kv_staging[ops.peer_staging]
            for i, x in enumerate(self.kv):
                self.copy_rows(ops.rows, x, to + i * x.nbytes, x.data_ptr())
        stream.run(ops.after)
        if ops.arrives:
            self.arrived = stream.record_event()
        return self.kv if ops.staging is None else self.kv_staging[ops.staging]

    def copy_rows(self, rows, x, to, source):
        """Copy rows of memory laid out as the tensor x."""
        row_bytes = x.nbytes // (x.shape[0] * x.shape[1])
        for first, n in rows:
            self.stream.copy(to + first * row_bytes, source + first * row_bytes, n * row_bytes)

    def grads(self, j):
        if j > 1 and self.arrived_grads:
            self.stream.compute_wait(self.arrived_grads)
        return self.grad_staging[j % 2]

    def pass_on(self, j, coming):
        ops, stream, memory = self.grad_ops[j], self.stream, self.memory
        # in a CUDA graph nothing says that copies run beside a kernel that waits for them
        coming = coming if ops.rows and not stream.capturing() else None
        if coming:
            stream.write(coming, 1, on_compute=True)
        stream.wait_compute()  # the kernel that wrote them is done
        stream.run(ops.before)
        to = memory.base[self.rank] + memory.grad_staging[(j + 1) % 2]
        source = memory.base[ops.peer] + memory.grad_staging[j % 2]
        self.copy_rows(ops.rows, self.grad_staging[0][0], to, source)
        if coming:
            stream.write(coming, 0)
        stream.run(ops.after)
        self.arrived_grads = None if coming else stream.record_event()

    def finish(self):
        self.stream.run(self.last_ops)
        if self.joins or self.stream.capturing():  # a CUDA graph must end on the stream that it began on
            self.stream.compute_wait(self.stream.record_event())


class StreamOps(NamedTuple):
    """What the copy stream does for the keys, or the gradients, of a hop."""

    staging: int | None  # the staging buffer that this hop's keys were pushed to, if they were
    before: object  # signals, prepared
    rows: tuple  # (first row, how many): of the own keys, to push; of gradients, to pull
    peer: int  # to or from this rank
    peer_staging: int
    after: object  # signals, prepared
    arrives: bool  # whether the keys of the next hop are there then


def stream_ops(copy_stream, schedule, rank, n_ranks, B, T, TK, mask, direction):
    """(hops, their StreamOps for keys, for gradients, the signals at the end, `joins`). Made once per shape:
    a call should take the host no longer than a small problem takes the GPU."""
    R = n_ranks
    plans = [plan(schedule, r, R, T, mask, direction, TK) for r in range(R)]
    to, source = (rank + direction) % R, (rank - direction) % R  # of gradients
    FREE, READY, SENT, READ = 0, R, 2 * R, 2 * R + 2
    key_ops, grad_ops, joins, prepare = [], [], False, copy_stream.prepare
    # joins: this stream has work left that the kernels' stream has not waited for; it must, at the end.
    # unread: staging buffers whose gradients the next rank is not known to have read. coming: keys arrive for
    # the next hop. here, there: staging buffers of this hop and of the next
    unread = set()

    def staging(r, j):  # of the keys of hop j; each rank fills its two in turn
        return sum(hop.visible for hop in plans[r][1:j]) % 2

    for j, hop in enumerate(plans[rank]):
        before, after, rows, reader, coming = [], [], (), (rank + direction * (j + 1)) % R, False
        if j + 1 < R:
            owner, coming = plans[rank][j + 1].source, plans[rank][j + 1].visible
            rows = row_ranges(plans[reader][j + 1].seen, B, TK)
            before += [("signal", owner, FREE + rank)] * coming
            if rows:
                before.append(("wait", FREE + reader, ("room for keys", j + 1, reader)))
                after.append(("signal", reader, READY + rank))
            if coming:
                after.append(("wait", READY + owner, ("keys", j + 1, owner)))
            joins = not coming and (joins or bool(rows))
        here, there = staging(rank, j) if j and hop.visible else None, staging(reader, j + 1)
        key_ops.append(StreamOps(here, prepare(before), rows, reader, there, prepare(after), coming))

        before, after, rows, here, there = [], [], (), j % 2, (j + 1) % 2
        sends = any(map(is_some, hop.send_grad))
        if sends:
            before.append(("signal", to, SENT + here))
        if there in unread:
            before.append(("wait", READ + there, ("a reader of gradients", j + 1, to)))
        unread = {here} if sends else set()
        if any(map(is_some, hop.recv_grad)):
            before.append(("wait", SENT + here, ("gradients", j + 1, source)))
            rows = row_ranges(hop.recv_grad, B, TK, 2)
            after.append(("signal", source, READ + here))
        grad_ops.append(StreamOps(None, prepare(before), rows, source, there, prepare(after), True))
    last = [("wait", READ + i, ("a reader of gradients", R - 1, to)) for i in unread] if direction < 0 else []
    return plans[rank], key_ops, grad_ops, prepare(last), joins or bool(last)


TRANSPORTS = {"p2p": P2P, "symmetric": Symmetric}


class SymmetricMemory:
    """Memory that the whole ring can access: flags, staging for keys and gradients, and two buffers that
    receive the parts of all ranks when they decode. All ranks make it.

    peers: int64, on the device: see PEERS in decode.py.
    """

    def __init__(self, ring, device, kv_bytes, grad_bytes, part_bytes):
        """kv_bytes: of k and v of a shard; grad_bytes: of dk and dv; part_bytes: of all ranks' parts."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self.sizes, self.in_graph, self.known = (kv_bytes, grad_bytes, part_bytes), False, {}
        sizes = [kv_bytes] * min(2, ring.n_ranks - 1) + [grad_bytes] * 2 + [2 * part_bytes]
        *starts, end = itertools.accumulate((4096, *(-(-n // 1024) * 1024 for n in sizes)))
        self.kv_staging, self.grad_staging, receive = starts[:-3], starts[-3:-1], starts[-1]  # offsets
        error = None
        try:
            self.local = symmetric_memory.empty(end, dtype=torch.uint8, device=device)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        if errors := by_rank(ring.gather(error)):  # the others would wait for this rank
            raise RuntimeError(errors)
        self.handle = symmetric_memory.rendezvous(self.local, ring.group)
        self.base = list(self.handle.buffer_ptrs)  # by rank: where its memory is, for this process
        self.local[:4096].zero_()
        self.local[receive:].zero_()
        others = " or ".join(str(rank) for rank in range(ring.n_ranks) if rank != ring.rank)
        _, *reason = ring.waiter.write(("its part of what is decoded", ring.n_ranks - 1, others))
        buffers = [base + receive + odd * part_bytes for odd in (0, 1) for base in self.base]
        self.peers = torch.tensor([0, 0, *reason, *buffers], device=device)
        self.peers_stream = None  # the stream of the last call
        torch.cuda.synchronize(device)
        dist.barrier(ring.group, device_ids=[device.index])  # nobody signals before all flags are clear
        self.copy_stream = CopyStream(device, self.base, ring)

    def use_peers(self):
        """`peers`, for a kernel on the current stream, which waits for kernels that used it before."""
        if self.copy_stream.capturing():
            self.in_graph = True
            return self.peers
        stream = torch._C._cuda_getCurrentRawStream(self.local.device.index)
        if self.peers_stream not in (None, stream):
            self.copy_stream.order(self.peers_stream, stream)
        self.peers_stream = stream
        return self.peers

    def views(self, starts, x, dtype):
        """Two tensors of the shape of x at each of these offsets."""
        key = tuple(starts), x.shape, dtype
        if key not in self.known:
            n = 2 * x.numel() * dtype.itemsize
            both = (self.local[start : start + n].view(dtype) for start in starts)
            remember(self.known, key, [x2.view(2, *x.shape).unbind() for x2 in both], 1024)
        return self.known[key]


def reserve(ring, device, sizes):
    """On all ranks together: symmetric memory of at least these `sizes`, see SymmetricMemory. Where there is
    none, the ring goes on with p2p and warns."""
    had = ring.memory.sizes if ring.memory else (-1, -1, -1)
    sizes = tuple(map(max, sizes, had))
    if sizes == had:
        return
    torch.cuda.synchronize(device)  # what is there may be in use
    if ring.memory and ring.memory.in_graph:
        ring.retired.append(ring.memory)  # CUDA graphs may be replayed with it
    ring.memory, error = None, None
    torch.cuda.empty_cache()  # it does not come out of torch's cache
    try:
        ring.memory = SymmetricMemory(ring, device, *sizes)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    if errors := by_rank(ring.gather(error)):
        ring.memory, ring.transport, ring.why = None, "p2p", f"no symmetric memory: {errors}"
        if ring.rank == 0:
            warnings.warn(f"from here on keys move by send and receive: {ring.why}", stacklevel=2)


class CopyStream:
    """A stream for copies and signals, which use no SM, beside the kernels' stream. It calls the driver, as
    torch's functions take the host several times as long."""

    def __init__(self, device, base, ring):
        self.base, self.rank, self.device, self.waiter = base, ring.rank, device.index, Waiter(ring)
        self.stream = torch.cuda.Stream(device)
        self.handle, self.compute = self.stream.cuda_stream, None  # compute: the stream of the last call
        events = (ctypes.c_void_p * 5)()
        for i in range(5):
            cuda("cuEventCreate", ctypes.byref(events, 8 * i), 2)  # 2: CU_EVENT_DISABLE_TIMING
        self.compute_event, *events = events
        self.events = itertools.cycle(events)  # of which two are in use at a time

    def capturing(self):
        return torch.cuda.is_current_stream_capturing()

    def wait_compute(self):
        """What comes next here waits for all kernels launched so far."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if stream != self.compute and self.compute is not None and not self.capturing():
            self.order(self.compute, self.handle)  # kernels of the last call may still read staging
        self.compute = stream
        self.order(stream, self.handle)

    def order(self, first, then):
        """What comes next on stream `then` waits for what is on stream `first`."""
        cuda("cuEventRecord", self.compute_event, first)
        cuda("cuStreamWaitEvent", then, self.compute_event, 0)

    def record_event(self):
        """An event on this stream, for `compute_wait`."""
        event = next(self.events)
        cuda("cuEventRecord", event, self.handle)
        return event

    def compute_wait(self, event):
        """Kernels launched from here on wait for the event."""
        cuda("cuStreamWaitEvent", torch._C._cuda_getCurrentRawStream(self.device), event, 0)

    def copy(self, to, source, nbytes):
        cuda("cuMemcpyDtoDAsync_v2", to, source, nbytes, self.handle)

    def write(self, address, value, on_compute=False):
        """Set an int, in the order of this stream or of the kernels'."""
        stream = torch._C._cuda_getCurrentRawStream(self.device) if on_compute else self.handle
        cuda("cuStreamBatchMemOp_v2", stream, *stream_operations([(WRITE, address, value)]), 0)

    def prepare(self, signals):
        """For `run`: ("signal", rank, flag) sets a flag; ("wait", flag, reason) waits until a flag of this
        rank is set, and clears it. reason: (what, hop, rank), for the watchdog."""
        operations = []
        for kind, *args in signals:
            if kind == "signal":
                operations.append((WRITE, self.base[args[0]] + 4 * args[1], 1))
            else:
                flag = self.base[self.rank] + 4 * args[0]
                operations += [self.waiter.write(args[1]), (WAIT_EQUAL, flag, 1), (WRITE, flag, 0)]
        return stream_operations([*operations, self.waiter.write(None)]) if operations else None

    def run(self, prepared):
        if prepared:
            cuda("cuStreamBatchMemOp_v2", self.handle, *prepared, 0)


# CU_STREAM_MEM_OP_WRITE_VALUE_32; CU_STREAM_MEM_OP_WAIT_VALUE_32 and CU_STREAM_WAIT_VALUE_EQ
WRITE, WAIT_EQUAL = (2, 0), (1, 1)


def stream_operations(operations):
    """(how many, CUstreamBatchMemOpParams: six 64-bit words each) of ((kind, flags), address, value)."""
    words = [x for (kind, flags), address, value in operations for x in (kind, address, value, flags, 0, 0)]
    return len(operations), (ctypes.c_uint64 * len(words))(*words)


@functools.cache
def cuda_driver():
    """The CUDA driver, for what torch lacks, such as a stream that waits for a value. None without one."""
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


def cuda(function, *args):
    error = getattr(cuda_driver(), function)(*args)
    if error:
        raise RuntimeError(f"the CUDA driver refused a copy or signal between GPUs: {function} gave {error}")


def choose_transport(facts):
    """("symmetric" or "p2p", why), from the transport_facts of every rank: the same on all of them."""
    if lacks := by_rank([fact["lacks"] for fact in facts]):
        return "p2p", lacks
    if (n := len({fact["host"] for fact in facts})) > 1:
        return "p2p", f"the ranks are on {n} hosts"
    if len({fact["gpu"] for fact in facts}) < len(facts):
        return "p2p", "ranks share a GPU"
    for (a, reader), (b, other) in itertools.permutations(enumerate(facts), 2):
        if not reader["reads"].get(other["gpu"], True):
            return "p2p", f"the GPU of rank {a} cannot read that of rank {b}"
    return "symmetric", "GPUs of one host that can read each other"


def transport_facts(device):
    """What choose_transport asks about this process."""
    if device.type != "cuda":
        return dict(lacks="the tensors are on CPUs")
    lacks = None if cuda_driver() else "libcuda.so.1, or stream memory operations in it, are not there"
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError as error:
        lacks = f"torch has no symmetric memory: {error}"
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    gpus = {i: str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())}
    own = gpus.pop(device.index)
    reads = {uuid: torch.cuda.can_device_access_peer(device.index, i) for i, uuid in gpus.items()}
    return dict(lacks=lacks, host=host, gpu=own, reads=reads)


@atexit.register
def release_memory():
    """Symmetric memory must be freed while the CUDA driver is loaded."""
    for ring in list(RINGS.values()):
        ring.memory, ring.retired = None, []


# -----------------------------------------------------------------------------
# ranks that do not answer


class Waiter:
    """What a stream of this process waits for. The GPU writes a number to `word` when a wait begins, and 0
    when it ends: its lower 16 bits are an index of `reasons`, each (what, hop, rank)."""

    def __init__(self, ring):
        self.ring, self.reasons = ring, [None]
        self.word = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.number = ctypes.c_int32.from_address(self.word.data_ptr())
        self.seen, self.since = 0, time.monotonic()
        timeout = 600
        with contextlib.suppress(Exception):  # there is no public way to ask
            timeout = ring.group._get_backend(torch.device("cuda")).options._timeout.total_seconds()
        self.timeout = 0.9 * timeout  # before NCCL's own
        watchdog().waiters.add(self)

    def write(self, reason):
        """The stream operation that says that a wait begins; None: that it has ended."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return WRITE, self.word.data_ptr(), self.reasons.index(reason)

    @contextlib.contextmanager
    def waits_for(self, reason):
        """Inside, the current stream waits for this."""
        stream = torch.cuda.current_stream().cuda_stream
        cuda("cuStreamBatchMemOp_v2", stream, *stream_operations([self.write(reason)]), 0)
        yield
        cuda("cuStreamBatchMemOp_v2", stream, *stream_operations([self.write(None)]), 0)


class Watchdog(threading.Thread):
    """Ends this process when its GPU has waited too long for another rank. A stream that waits cannot raise,
    and whoever synchronizes with it hangs. NCCL's watchdog does the same, but knows nothing of hops."""

    def __init__(self):
        super().__init__(daemon=True)
        self.waiters = weakref.WeakSet()
        self.start()

    def run(self):
        waiters = []
        while True:
            time.sleep(random.uniform(0.05, 0.15))  # at random, or it could meet a repeating pattern in step
            with contextlib.suppress(RuntimeError):  # a waiter is added meanwhile
                waiters = list(self.waiters)
            for waiter in waiters:
                number, now = waiter.number.value, time.monotonic()
                if number == 0 or number != waiter.seen:
                    waiter.seen, waiter.since = number, now
                elif now - waiter.since > waiter.timeout:
                    sys.stdout.flush()
                    lost = lost_message(waiter.ring, waiter.reasons[number & 0xFFFF], waiter.timeout)
                    print(f"ring_attn: {lost}", file=sys.stderr, flush=True)
                    os._exit(1)


watchdog = functools.cache(Watchdog)  # one per process


def lost_message(ring, reason, seconds):
    what, hop, rank = reason
    return (
        f"rank {ring.rank} of the ring of processes {ring.processes} waited {seconds:.0f} s, at hop {hop} of "
        f"{ring.n_ranks - 1}, for {what} from rank {rank}, which has died, is stuck, or never made this call"
    )


def missing_ranks(group=None, seconds=10.0):
    """The processes of `group` (default: all), by global rank, that do not answer within some seconds. Call
    it on every rank where a collective has failed: that is an answer. [] where nobody can be asked."""
    missing = []

    def ask():
        with contextlib.suppress(Exception):  # the store may have died, too
            store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + seconds
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            store.set(f"ring_attn answers {dist.get_rank()}", "")
            while silent := [rank for rank in ranks if not store.check([f"ring_attn answers {rank}"])]:
                if time.monotonic() > deadline:
                    missing.extend(silent)
                    return
                time.sleep(0.1)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 5)  # a store on a host that cannot be reached never answers
    return missing


def missing_text(group, error):
    seconds = 10 if "imed out" in str(error) else 2  # a rank that has died is seen at once
    missing = missing_ranks(group, seconds)
    return f"; no answer from processes {missing}: died, stopped or stuck" if missing else ""


# =============================================================================
# Part IV: the operator, autograd, checks
# -----------------------------------------------------------------------------
# Eager calls go straight to the functions below. Where something looks at operators (torch.compile, fake
# tensors, selective checkpointing), calls go through torch.ops.ring_attn.forward and .backward: torch.compile
# takes shapes from the *_fake functions and puts the operators into its graph, without a graph break


def can_skip_dispatcher(*tensors):
    """Does nothing look at operators? Then they are called directly: the dispatcher takes time."""
    plain = all(type(x) is torch.Tensor or type(x) is torch.nn.Parameter for x in tensors)
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    looked_at = transformed or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return plain and not looked_at


def dense(q, k, v, ring):
    """q, k, v with the D numbers of a head side by side; contiguous keys and values where they move."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    alone = ring_numbered(ring).n_ranks == 1
    k, v = (x if alone and x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return q, k, v


def run_hops(hops, tensors, extras, ring, schedule, causal, window, seq_len, sm_scale, backend, transport,
             softcap, dropout_p, functions, *options):  # fmt: skip
    q, k, ring_object = *tensors[:2], ring_numbered(ring)
    backend = best_backend(q) if backend is None else backend
    n_virtual = ring_object.n_ranks if ring < 0 else 1
    T, TK = q.shape[1] // n_virtual, k.shape[1] // n_virtual
    S = max(T, TK) * ring_object.n_ranks
    extras = Extras.of(extras)
    extras = Extras(*(x if x is None else x.contiguous() for x in extras[:-1]), extras.aux)
    window = window if window is None else tuple(window)
    mask = make_mask(S, causal, window, seq_len, documents_of(extras.cu_seqlens, S), T == TK)
    backward = hops is backward_hops
    # elsewhere hopper_bwd_kernel does not mask keys past the end in a tile that all queries see. They are 0,
    # but ds, with p = exp(-lse), may be infinite in 16 bits, and dq nan
    overhangs = backend == "gluon" and TK % BWD_ROWS.value
    if backward and (overhangs or options[-1]):  # bias_grad: its loop wants tables
        mask = mask._replace(kind=INTERVAL.value)
    mods = make_mods(q, T, TK, ring_object.n_ranks, mask, extras, softcap, dropout_p, functions)
    kind = q.device.type
    # the state stays in float32, also under autocast
    no_casts = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NO_CONTEXT
    with device_guard(q), no_casts:
        args = schedule, mask, mods, sm_scale, backend, transport, *options
        return ring_object.run(hops, tensors, extras, *args)


def forward_real(q, k, v, extras, *args):
    return run_hops(forward_hops, dense(q, k, v, args[0]), extras, *args[:N_OF_HOPS])


def forward_checked(q, k, v, extras, ring, *args):
    """Checks when a compiled graph runs, as it was made before its tensors were there."""
    *options, problem = args
    check_once(q, k, v, extras, ring_numbered(ring), options, problem)
    return forward_real(q, k, v, extras, ring, *options)


def forward_autograd(q, k, v, extras, *args):
    return RingAttention.apply(q, k, v, forward_checked, args, *extras)


def forward_fake(q, k, v, *args):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


def backward_real(do, dlse, q, k, v, o, lse, extras, ring, *args):
    do = torch.zeros_like(o) if do is None else do.to(o.dtype).contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    tensors = *dense(q, k, v, ring), o, lse, do, dlse
    *grads, dsinks, dbias = run_hops(backward_hops, tensors, extras, ring, *args)
    of_extras = (dsinks, extras[0]), (dbias, extras[2])  # sinks, bias
    return *grads, *(dx if x is None else dx.to(x.dtype) for dx, x in of_extras)


def backward_fake(do, dlse, q, k, v, o, lse, extras, *args):
    sinks, bias = extras[0], extras[2] if args[-1] else None
    of_extras = (lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in (sinks, bias))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *of_extras


class FirstDerivative(torch.autograd.Function):
    """The last n_grads tensors, as functions of all others that raise where they are differentiated."""

    @staticmethod
    def forward(ctx, n_grads, *tensors):
        return tuple(x.detach() for x in tensors[-n_grads:])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("ring_attn has no second derivative; write the attention in torch.einsum for one")


def once(f, *inputs):
    """f() of a backward, a tuple of gradients, which raise where they are differentiated (create_graph=True):
    once_differentiable gives zeros there unless the incoming gradient requires one."""
    if not torch.is_grad_enabled():
        return f()
    with torch.no_grad():
        grads = f()
    needs_grad = any(x is not None and x.requires_grad for x in inputs)
    return FirstDerivative.apply(len(grads), *inputs, *grads) if needs_grad else grads


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, run, args, *extras):
        q, k, v = dense(q, k, v, args[0])  # here already, as these are kept for the backward
        if can_skip_dispatcher(q, k, v):
            o, lse = run(q, k, v, extras, *args)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # the same operator, below autograd
                o, lse = torch.ops.ring_attn.forward.default(q, k, v, extras, *args)
        ctx.save_for_backward(q, k, v, o, lse, *extras)
        ctx.args, ctx.ring = args, ring_numbered(args[0])  # the ring lives until the backward
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, *extras = ctx.saved_tensors  # once: under checkpointing it computes them again
        saved = q, k, v, o, lse
        need_sinks, _, need_bias, *_ = ctx.needs_input_grad[5:]
        backward = backward_real if can_skip_dispatcher(*saved) else torch.ops.ring_attn.backward.default
        args = *ctx.args[: len(OPTION_NAMES)], need_bias
        inputs = do, dlse, *saved[:3], extras[0], extras[2]
        *grads, dsinks, dbias = once(lambda: backward(do, dlse, *saved, extras, *args), *inputs)
        of_extras = dsinks if need_sinks else None, None, dbias if need_bias else None
        return *grads, None, None, *of_extras, *(None for _ in extras[3:])


LIBRARY = torch.library.Library("ring_attn", "DEF")
TENSORS = "Tensor q, Tensor k, Tensor v"
OPTIONS = "int ring, str schedule, bool causal, SymInt[]? window, SymInt? seq_len, float sm_scale"
OPTIONS += ", str? backend, str? transport, float softcap, float dropout_p, int functions, bool deterministic"
OPTION_NAMES = [option.split()[1] for option in OPTIONS.split(", ")]
N_OF_HOPS = OPTION_NAMES.index("deterministic")  # of these both hop loops take; the backward takes all
TAKES = f"{TENSORS}, Tensor?[] extras, {OPTIONS}, bool backward, str? problem"
LIBRARY.define(f"forward({TAKES}) -> (Tensor, Tensor)")
TAKES = f"Tensor? do, Tensor? dlse, {TENSORS}, Tensor o, Tensor lse, Tensor?[] extras, {OPTIONS}"
LIBRARY.define(f"backward({TAKES}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.impl("forward", forward_autograd, "Autograd")
LIBRARY.impl("forward", forward_checked, "CompositeExplicitAutograd")  # on any device; checks refuse some
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
        return *once(lambda: (shard(dx, *ctx.args),), dx), None, None


def attend(q, k, v, schedule, ring, causal, sm_scale, return_lse=False, *, backend=None, transport=None,
           deterministic=True, window=None, cu_seqlens=None, sinks=None, seq_len=None, softcap=None,
           bias=None, alibi_slopes=None, score_mod=None, score_mod_bwd=None, aux=(), dropout_p=0.0,
           dropout_seed=None, debug=False, problem=None):  # fmt: skip
    """What all public functions call. problem: what the caller found wrong, to be raised on every rank."""
    has_shape = isinstance(q, torch.Tensor) and not q.is_nested and q.ndim > 0
    if sm_scale is None:
        sm_scale = max(q.shape[-1], 1) ** -0.5 if has_shape else 1.0
    if has_shape and q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        q, k, v = autocast(q, k, v)
    if not isinstance(aux, tuple):
        aux, problem = (), problem or f"aux is a {type(aux).__name__}; it must be a tuple"
    problem = problem or seed_problem(dropout_seed) or window_problem(window, causal)
    flags = dict(causal=causal, deterministic=deterministic)
    problem = problem or type_problem(flags, dict(sm_scale=sm_scale, softcap=softcap, dropout_p=dropout_p))
    if problem is None and dropout_p and has_shape and not isinstance(dropout_seed, torch.Tensor):
        dropout_seed = make_seed(dropout_seed, ring, q.device)
    seed = dropout_seed if isinstance(dropout_seed, torch.Tensor) and dropout_p else None
    extras = [sinks, cu_seqlens, bias, alibi_slopes, seed, *aux]
    learn = q, k, v, sinks, bias
    backward = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in learn)
    softcap, dropout_p = 0.0 if softcap is None else softcap, 0.0 if dropout_p is None else dropout_p
    functions = number_of(score_mod, score_mod_bwd)
    if not torch.compiler.is_compiling():  # else the operator checks when it runs
        options = (schedule, causal, window, seq_len, sm_scale, backend, transport, softcap, dropout_p,
                   functions, deterministic, backward)  # fmt: skip
        check_once(q, k, v, extras, ring_numbered(ring.number), options, problem, debug)
        if debug and cu_seqlens is not None:
            check_values(cu_seqlens, ring, seq_len, q)
    pair = None if window is None or problem else window_pair(window)
    args = (ring.number, schedule, bool(causal), pair, seq_len, float(sm_scale), backend, transport,
            float(softcap), float(dropout_p), functions, bool(deterministic), backward, problem)  # fmt: skip
    unseen = k.shape[1] - q.shape[1] - (pair[0] if pair and pair[0] >= 0 else k.shape[1])
    modified = softcap or dropout_p or functions or bias is not None or alibi_slopes is not None
    if ring.n_ranks == 1 and unseen > 0 and cu_seqlens is None and seq_len is None and not modified:
        k, v = k[:, unseen:], v[:, unseen:]  # the others are before the first query's window
    if not can_skip_dispatcher(q, k, v):
        o, lse = torch.ops.ring_attn.forward.default(q, k, v, extras, *args)
    elif backward:
        o, lse = RingAttention.apply(q, k, v, forward_real, args, *extras)
    else:
        o, lse = forward_real(q, k, v, extras, *args)
    return (o, lse) if return_lse else o


def seed_problem(seed):
    if seed is None or isinstance(seed, torch.Tensor) or is_int(seed):
        return None
    return f"dropout_seed={seed!r} must be an int, an int64 tensor of one element, or None"


def make_seed(seed, ring, device):
    """A tensor (1,) int64. None: random, the same on the whole ring."""
    if seed is not None:
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    seed = torch.randint(2**62, (1,), device=device)
    if ring.n_ranks > 1 and not isinstance(ring, VirtualRing):
        dist.broadcast(seed, ring.processes[0], group=ring.group)
    return seed


def window_pair(window):
    """(left, right), -1 for all: what operators take."""
    left, right = (window - 1, 0) if isinstance(window, int) else window
    return [-1 if left is None else left, -1 if right is None else right]


def autocast(*tensors):
    """Tensors as autocast hands them to scaled_dot_product_attention."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    cast = []
    for x in tensors:
        eligible = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        cast.append(x.to(dtype) if eligible else x)
    return cast


# -----------------------------------------------------------------------------
# checks. Each raises ValueError, with the values and a way out


def check_schedule(schedule, n_ranks, T=None, B=None):
    """Shards of (B, T) tokens must be able to follow this schedule."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"{schedule=} is unknown; choose one of {', '.join(SCHEDULES)}")
    if n_ranks < 1:
        raise ValueError(f"{n_ranks=} must be 1 or more")
    if T is not None and T < 1:
        raise ValueError(f"the tokens per rank, {T}, must be 1 or more")
    if n_ranks == 1 or T is None:
        return  # all schedules are the same on a ring of one
    groups, multiple, _ = SCHEDULES[schedule]
    if T % multiple:
        wanted = f"a multiple of {multiple}*n_ranks={multiple * n_ranks} for {schedule}"
        way_out = 'pad it, see shard(..., pad=True), or use schedule="striped"'
        raise ValueError(f"seq_len={n_ranks * T} must be {wanted}; {way_out}")
    if B is not None and B % groups:
        wanted = f"a multiple of {groups} for {schedule}"
        raise ValueError(f'batch size {B=} must be {wanted}; pad it, or use schedule="zigzag"')
    if n_ranks * T > INT_MAX:
        raise ValueError(f"seq_len={n_ranks * T} must stay below 2**31; positions are 32 bit in the kernels")


def check_transport(transport):
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        raise ValueError(f"{transport=} is unknown; choose one of {', '.join(TRANSPORTS)}, or leave it out")


def check_common(q, k, v, sm_scale, backend, backends, kv_dtype=None):
    """What ring_attn and decode_attn have in common; q (B, M, H, D), k, v (B, N, HKV, D). kv_dtype: of k and
    v, if it is not that of q."""
    for name, x in dict(q=q, k=k, v=v).items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor (B, T, heads, D), not {type(x).__name__}")
        if x.is_nested:
            raise ValueError(f"{name} is a nested tensor; use torch.nested.to_padded_tensor({name}, 0.0)")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}; make it dense with .to_dense()")
        if x.ndim != 4 or 0 in x.shape:
            wanted = "(B, T, heads, D) with no dimension of 0"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {wanted}")
    (*_, H, D), HKV = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape[3] != D:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"shapes do not fit: {shapes}; need k and v of one shape, with the D of q")
    if H % HKV:
        raise ValueError(f"{H} query heads cannot share {HKV} key/value heads: H must be a multiple of HKV")
    if not (kv_dtype or q.dtype) == k.dtype == v.dtype:
        fix = f"with scales k and v must be {kv_dtype}" if kv_dtype else "cast them to one"
        raise ValueError(f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; {fix}")
    if not q.device == k.device == v.device:
        raise ValueError(f"devices differ: q {q.device}, k {k.device}, v {v.device}; move them to one")
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"tensors are on {q.device}; cpu and cuda are supported")
    number = isinstance(sm_scale, numbers.Real) and not isinstance(sm_scale, bool)
    if not number or not 0 < sm_scale < math.inf:
        raise ValueError(f"{sm_scale=} must be a finite number above 0; to flip its sign negate q")
    if not isinstance(backend, str) or backend not in backends:
        raise ValueError(f"{backend=} is unknown; choose one of {', '.join(backends)}, or None")
    dtypes = torch.bfloat16, torch.float16, torch.float32, torch.float64
    dtypes = dtypes[: {"torch": 4, "triton": 3, "gluon": 2}[backend]]
    if q.dtype not in dtypes:
        raise ValueError(f"{q.dtype} is not supported by {backend=}; cast to one of {dtypes}")
    if backend != "triton":
        return
    if D > 256:
        raise ValueError(f'head dim {D} is above 256; use smaller heads, or backend="torch"')
    if INTERPRET:
        if q.dtype == torch.bfloat16:
            raise ValueError("bfloat16 is wrong in Triton's interpreter: use float16, or no TRITON_INTERPRET")
    elif not q.is_cuda:
        raise ValueError('backend="triton" needs CUDA tensors, or TRITON_INTERPRET=1 to run on CPUs')
    elif capability(q.device) < (8, 0):
        has = f"{torch.cuda.get_device_name(q.device)} has {capability(q.device)}"
        raise ValueError(f'the kernels need CUDA capability (8, 0); {has}: use backend="torch"')


def check_seq_len(seq_len, S):
    if seq_len is not None and not (is_int(seq_len) and 1 <= seq_len <= S):
        raise ValueError(f"{seq_len=} must be an int from 1 to {S}, the padded length, or None")


def is_int(x):
    return isinstance(x, int) and not isinstance(x, bool)


def window_problem(window, causal):
    """What is wrong with a window: a text, or None."""
    if is_int(window):
        window = int(window)  # of a symbol, torch.compile makes no text
    if isinstance(window, (tuple, list)):
        if [x is None or is_int(x) and x >= -1 for x in window] != [True, True]:
            each = "each an int of 0 or more, or -1 or None for all keys on that side"
            return f"{window=} must be a pair (left, right), {each}"
    elif window is not None and not (is_int(window) and window >= 1):
        return f"{window=} must be an int of 1 or more, or a pair (left, right), or None"
    elif window is not None and not causal:
        return f"{window=} needs causal=True; with causal=False pass a pair (left, right)"


def type_problem(flags, values):
    """What is wrong with options {name: value} and would be gone once they are converted: a text, or None."""
    for name, x in flags.items():
        if not isinstance(x, int):  # bool is one
            return f"{name}={x!r} must be True or False"
    for name, x in values.items():
        if isinstance(x, (bool, str)):
            return f"{name}={x!r} must be a number"


def check_mask(causal, window, cu_seqlens, seq_len, B, S, SK):
    """S, SK: how many positions there are of queries and of keys."""
    if problem := window_problem(window, causal):
        raise ValueError(problem)
    check_seq_len(seq_len, S)
    if cu_seqlens is not None:
        check_documents(cu_seqlens, B, (S if seq_len is None else seq_len, S))
    if S != SK and (cu_seqlens is not None or seq_len is not None):
        given = "cu_seqlens" if seq_len is None else f"{seq_len=}"
        raise ValueError(f"{given} with {S} queries and {SK} keys: they need equal lengths; pad the shorter")


def check_documents(cu_seqlens, B, ends):
    """ends: what may be the last entry."""
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
        wanted = "an int32 tensor (n + 1,) or (B, n + 1)"
        raise ValueError(f"cu_seqlens is {summary(cu_seqlens)}; it must be {wanted}")
    shape = tuple(cu_seqlens.shape)
    if len(shape) not in (1, 2) or shape[-1] < 2 or len(shape) == 2 and shape[0] != B:
        wanted = f"(n + 1,) or (B, n + 1) with {B=} and n >= 1"
        raise ValueError(f"cu_seqlens has shape {shape}; it must be {wanted}")
    if cu_seqlens.device.type != "cpu":
        return  # its values are only read under debug=True: that waits for the GPU
    for row in cu_seqlens.reshape(-1, shape[-1]).tolist():
        if row[0] != 0 or row[-1] not in ends or row != sorted(row):
            lengths = f"{ends[-1]}, the length of the whole sequence"
            if isinstance(ends, range):
                lengths = f"at most {lengths}"
            elif ends[0] != ends[-1]:
                lengths = f"{ends[0]}, the true length, or {ends[-1]}, the padded one"
            wanted = f"begin with 0, not decrease, and end with {lengths}"
            text = f"{row[:4]}..{row[-2:]}" if len(row) > 8 else row
            raise ValueError(f"cu_seqlens holds {text}; it must {wanted}")


def check_values(cu_seqlens, ring, seq_len, q):
    """On all ranks together: of cu_seqlens that may be on a GPU."""
    S = q.shape[1] * (1 if isinstance(ring, VirtualRing) else ring.n_ranks)
    args = cu_seqlens.cpu(), len(q), (S if seq_len is None else seq_len, S)
    agree_now(ring, dict(cu_seqlens=cu_seqlens.tolist()), None, lambda: check_documents(*args))


def check_mods(q, k, n_ranks, seq_len, extras, backend, softcap, dropout_p, functions, backward):
    """q, k (B, T, heads, D) of one rank."""
    (B, T, H, _), TK, device = q.shape, k.shape[1], q.device
    check_softcap(softcap)
    if not is_number(dropout_p) or not 0 <= dropout_p < 1:
        raise ValueError(f"{dropout_p=} must be a probability below 1")
    bias, slopes, seed = extras.bias, extras.slopes, extras.seed
    if bias is not None:
        shape = B, H, *(n_ranks * n if seq_len is None else seq_len for n in (T, TK))
        if not isinstance(bias, torch.Tensor):
            order = "flash-attn has dropout_p in this place, then softmax_scale: name dropout_p=, sm_scale="
            raise ValueError(f"{bias=} must be a tensor, or None. {order}")
        fits = bias.ndim == 4 and all(a in (1, b) for a, b in zip(bias.shape, shape))
        if not fits or not bias.is_floating_point() or bias.device != device:
            wanted = f"a floating point tensor on {device} of 4 dimensions that broadcasts to {shape}"
            raise ValueError(f"bias is {summary(bias)}; it must be {wanted}, whole on every rank")
        if (size := bias.numel() * bias.itemsize) > MAX_BIAS:
            way_out = "compute it in a score_mod, from tensors in aux"
            raise ValueError(f"bias has {size} bytes, above {MAX_BIAS}; {way_out}")
    check_slopes(slopes, q, backend, n_ranks * max(T, TK))
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(f"dropout_seed is {summary(seed)}; it must have one element, int64, on {device}")
    constants = {f"aux[{i}]": x for i, x in enumerate(extras.aux)}
    for name, x in constants.items():
        if not isinstance(x, torch.Tensor) or x.device != device:
            raise ValueError(f"{name} is {summary(x)}; aux must be a tuple of tensors on {device}")
    for name, x in (dict(alibi_slopes=slopes) | constants).items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            way_out = "detach it; what is learned can be a bias, or sinks"
            raise ValueError(f"{name} requires a gradient, and gets none; {way_out}")
    if not functions:
        return
    score_mod, score_mod_bwd = functions_numbered(functions)
    check_function("score_mod", score_mod, "score, b, h, q_idx, kv_idx", len(extras.aux), backend)
    if backend == "torch":
        return  # which differentiates score_mod itself
    if score_mod_bwd is not None:
        takes = "dscore, score, b, h, q_idx, kv_idx"
        check_function("score_mod_bwd", score_mod_bwd, takes, len(extras.aux), backend)
    if backward and bias is not None and bias.requires_grad:
        alone = "beside a score_mod in kernels: its gradient is computed in plain torch"
        raise ValueError(f'bias requires a gradient {alone}; detach one of them, or pass backend="torch"')
    if backward and score_mod_bwd is None:
        raise ValueError("a gradient of score_mod needs score_mod_bwd, or torch.no_grad()")


def check_softcap(softcap):
    if softcap and not (is_number(softcap) and 0 < softcap < math.inf):
        raise ValueError(f"{softcap=} must be above 0, or None or 0.0 for none")


def check_slopes(slopes, q, backend, length):
    if slopes is None:
        return
    (B, _, H, _), device = q.shape, q.device
    if backend != "torch" and length > MAX_ALIBI:
        way_out = "compute it in a score_mod"
        raise ValueError(f"alibi_slopes are for up to {MAX_ALIBI} tokens, and here are {length}: {way_out}")
    floats = isinstance(slopes, torch.Tensor) and slopes.dtype == torch.float32
    if not (floats and slopes.shape in ((H,), (B, H)) and slopes.device == device):
        wanted = f"a float32 tensor ({H},) or {(B, H)} on {device}, or None"
        raise ValueError(f"alibi_slopes is {summary(slopes)}; it must be {wanted}")


def check_function(name, f, takes, n_aux, backend):
    """f: a function of scores or positions, which kernels and the torch path take in their own kinds."""
    jitted = hasattr(f, "arg_names")
    if jitted != (backend != "torch") or not (jitted or callable(f)):
        need = "a @triton.jit function"
        if backend == "torch":
            need = f"a plain function of torch tensors ({need} needs a GPU, or TRITON_INTERPRET=1)"
        raise ValueError(f'{name}={f!r} must be {need} for backend="{backend}"')
    takes = takes.split(", ") + [f"aux[{i}]" for i in range(n_aux)]
    if n_arguments(f) not in (None, len(takes)):
        given = f"is given {len(takes)}: {', '.join(takes)}"
        raise ValueError(f"{name} takes {n_arguments(f)} arguments and {given}")


def n_arguments(f):
    """How many arguments a function takes; None if any number."""
    if hasattr(f, "arg_names"):
        return len(f.arg_names)  # of a @triton.jit function
    kinds = [x.kind for x in inspect.signature(f).parameters.values()]
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else len(kinds)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_inputs(q, k, v, extras, schedule, ring, causal, window, seq_len, sm_scale, backend, transport,
                 softcap, dropout_p, functions, deterministic, backward):  # fmt: skip
    """Everything that the hop loops cannot do."""
    sinks, cu_seqlens = extras.sinks, extras.cu_seqlens
    check_common(q, k, v, sm_scale, backend, BACKENDS)
    (B, T, H, D), TK, n_ranks = q.shape, k.shape[1], ring.n_ranks
    if k.shape[0] != B:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}; need equal B and D")
    n_others = 1 if isinstance(ring, VirtualRing) else n_ranks
    check_mask(causal, window, cu_seqlens, seq_len, B, n_others * T, n_others * TK)
    if cu_seqlens is not None and cu_seqlens.device not in (torch.device("cpu"), q.device):
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on the CPU or on {q.device}")
    floats = isinstance(sinks, torch.Tensor) and sinks.is_floating_point()
    if sinks is not None and not (floats and sinks.shape == (H,) and sinks.device == q.device):
        wanted = f"a floating point tensor ({H},), a logit for each head, on {q.device}"
        raise ValueError(f"sinks is {summary(sinks)}; it must be {wanted}, or None")
    check_mods(q, k, n_others, seq_len, extras, backend, softcap, dropout_p, functions, backward)
    if T != TK and n_ranks > 1 and (causal or window is not None):
        asked = f"{causal=}" if window is None else f"{window=}"
        lengths = f"{T} queries and {TK} keys a rank"
        only = "on a ring they may differ only with causal=False and window=None; pad the shorter one"
        raise ValueError(f"{lengths} with {asked}: {only}")
    if backend == "gluon":
        if not q.is_cuda or capability(q.device)[0] != 9:
            raise ValueError(f'{backend=} needs a Hopper GPU, not {q.device}; use backend="triton"')
        if not hopper_takes(D, q.dtype):
            wanted = f"a multiple of 8 up to {max(HOPPER_TILES['fwd'])}"
            raise ValueError(f'head dim {D} must be {wanted} for {backend=}; use backend="triton"')
    if transport is not None:
        check_transport(transport)
    if isinstance(ring, VirtualRing):
        if transport is not None:
            raise ValueError(f"{transport=} is for process groups, and this is a VirtualRing; leave it out")
        for S in (T, TK):
            if S % n_ranks:
                raise ValueError(f"seq_len={S} must be a multiple of {n_ranks=}; {PAD_HINT}")
        T, TK = T // n_ranks, TK // n_ranks
    elif n_ranks > 1:
        check_movable(q, ring.group)
    for length in {T, TK}:
        check_schedule(schedule, n_ranks, length, B)


def check_unshard(x, schedule, ring, seq_len):
    if isinstance(ring, VirtualRing):
        raise ValueError("a VirtualRing holds whole sequences: there is nothing to unshard")
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided or x.ndim < 2:
        raise ValueError(f"x is {summary(x)}; it must be a dense tensor (B, T, ...)")
    if ring.n_ranks > 1:
        check_movable(x, ring.group)
    check_schedule(schedule, ring.n_ranks, x.shape[1], x.shape[0])
    check_seq_len(seq_len, ring.n_ranks * x.shape[1])


def check_movable(x, group):
    """Can the process group move x?"""
    config = str(dist.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
    by_device = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
    if by_device.get("cuda") == "gloo":
        del by_device["cuda"]  # gloo has no send and receive for CUDA tensors
    if x.device.type not in by_device:
        use = f'init_process_group("{"nccl" if x.is_cuda else "gloo"}")'
        raise ValueError(f"the process group ({config}) cannot move {x.device.type} tensors; use {use}")
    if x.is_cuda and group.bound_device_id not in (None, x.device):
        given = f"init_process_group was given device_id={group.bound_device_id}"
        raise ValueError(f"tensors are on {x.device}, but {given}; use the GPU of this rank")


def summary(x):
    """What all ranks must agree on of an argument that should be a tensor."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return "a nested tensor" if x.is_nested else (tuple(x.shape), str(x.dtype), x.device.type, str(x.layout))


def agree_now(ring, signature, problem, check):
    """Raise ValueError on every rank if `check` finds a problem on any, or their signatures differ. problem:
    what is known to be wrong."""
    if problem is None:
        try:
            check()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    ring.agree(signature, problem)


def agree_once(ring, key, signature, problem, check, prepare=lambda: None):
    """What `prepare` returned the first time that a key came up, after agree_now."""
    if key not in ring.agreed:
        agree_now(ring, signature, problem, check)
        remember(ring.agreed, key, prepare(), 4096)  # all ranks drop the same one
    return ring.agreed[key]


def check_once(q, k, v, extras, ring, options, problem, debug=False):
    """check_inputs, and that all ranks agree, the first time that shapes and options come up. options: those
    of the operators behind `ring`, and `backward`."""
    extras, options = Extras.of(extras), dict(zip((*OPTION_NAMES[1:], "backward"), options))
    deterministic, backward, functions = (options[x] for x in ("deterministic", "backward", "functions"))
    strict_torch = torch.get_deterministic_debug_mode() == 2
    if backward and strict_torch and isinstance(deterministic, int) and not deterministic:
        strict = "under torch.use_deterministic_algorithms(True); leave one of the two out"
        problem = problem or f"{deterministic=} {strict}"
    documents, tensors, cu_seqlens = None, (q, k, v, *extras.flat()), extras.cu_seqlens
    capturing = isinstance(q, torch.Tensor) and q.is_cuda and torch.cuda.is_current_stream_capturing()
    try:
        if options["backend"] is None:
            options["backend"] = best_backend(q)
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
            # the other ranks must have the same
            documents = hashlib.blake2b(cu_seqlens.numpy(force=True).tobytes(), digest_size=8).hexdigest()
            if capturing:
                freeze = "a CUDA graph would freeze cu_seqlens that are on the CPU"
                raise ValueError(f"{freeze}; pass them on {q.device}, and write new values there")
        values = [tuple(x) if isinstance(x, list) else x for x in options.values()]
        learned = tuple(x is not None and x.requires_grad for x in tensors[3:])
        kinds = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors]
        key = *kinds, learned, *values, *map(type, values), documents, problem, debug
        if key in ring.agreed:
            return
    except (AttributeError, IndexError, RuntimeError, TypeError):  # of an argument that will be refused
        key = repr((*map(summary, tensors), options, problem))
    if capturing:
        raise ValueError("ranks cannot agree on options inside a CUDA graph; make this call once before it")
    names = "q", "k", "v", *Extras._fields[:-1], *(f"aux[{i}]" for i in range(len(extras.aux)))
    signature = dict(zip(names, map(summary, tensors))) | {x: repr(y) for x, y in options.items()}
    signature["functions"] = functions and [getattr(f, "__name__", f) for f in functions_numbered(functions)]
    signature["debug"] = repr(debug)
    if documents is not None:
        signature["cu_seqlens"] += (f"with the checksum {documents}",)

    def prepare():
        acc_dtype = torch.promote_types(k.dtype, torch.float32)
        grad_bytes = 2 * k.numel() * acc_dtype.itemsize * backward
        ring.prepare(k, options["transport"], 2 * k.nbytes, grad_bytes, 0)

    def check():
        check_inputs(q, k, v, extras, ring=ring, **options)

    agree_once(ring, key, signature, problem, check, prepare)


if __name__ == "__main__":
    print(draw())
