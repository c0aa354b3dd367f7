"""Every test of the project. On a GPU the kernels run compiled, on a CPU in Triton's interpreter.

    python test.py                            # one process: kernels, schedules, virtual rings of 1 to 8 ranks
    torchrun --nproc_per_node=4 test.py       # the same cases spread over 4 processes, and rings of 2 and 4 real ones
    python test.py --filter zigzag            # cases whose name contains zigzag
    python test.py --kill=20                  # training under 20 kill -9 of random ranks, and nothing else

Truth is float64. The yardstick is torch's SDPA in the same dtype on the same inputs: the error may be at most twice
SDPA's plus 1e-5 for o and lse (whose yardstick is a float32 logsumexp), three times for gradients. Decoding is held to
flex_attention in the same way. Every torch.empty is filled with nan first. One row per case: what was worst, its error, the
bound, their ratio. Fails on all ranks or none.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections import deque
from datetime import timedelta
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch

GPU = torch.cuda.is_available()
if not GPU and "--compile_only" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before ring_attn decorates its kernels

import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bench
import decode
import ring_attn
import train
from decode import KVCache, decode_attn, decode_part, merge_parts, sharded_decode_attn
from model import Attention, AttentionType, Config, Transformer
from ring_attn import INT_MAX, SCHEDULES, Hop, HopRow, VirtualRing, merge, plan, positions, shard, unshard

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
DEVICE = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
HOPPER = GPU and torch.cuda.get_device_capability(DEVICE)[0] == 9
ALONE = None  # a group of this process only
RINGS = {}  # size -> the group of that size that this process is in

# -----------------------------------------------------------------------------
# cases: `local` ones need one process and are dealt out to the ranks, `real` ones run on all of them together

CASES = []


def local(name, f, *args, gpu=False, hopper=False):
    CASES.append((name, f, args, "local", "needs a GPU" if gpu and not GPU else "needs a Hopper GPU" if hopper and not HOPPER else None))


def real(name, f, *args, ranks=1, gpu=False):
    CASES.append((name, f, args, "real", "needs GPUs" if gpu and not GPU else None if WORLD >= ranks else f"needs {ranks} processes"))


def require(condition, message):
    if not condition:
        raise AssertionError(message)


def raises(f, *words):
    """f must raise a ValueError that contains all words."""
    try:
        f()
    except ValueError as error:
        require(all(w in str(error) for w in words), f"the message lacks one of {words}: {error}")
        return
    raise AssertionError(f"no ValueError about {words}")


@contextlib.contextmanager
def as_users_run_it():
    """On a CPU through the torch path, not the interpreter."""
    interpret, ring_attn.INTERPRET = ring_attn.INTERPRET, False
    try:
        yield
    finally:
        ring_attn.INTERPRET = interpret


def worst(rows):
    """The row with the largest error / bound out of (what, error, bound); AssertionError if one is above its bound."""
    ratio = lambda row: math.inf if math.isnan(row[1]) else row[1] / row[2]
    top = max(rows, key=ratio)
    require(ratio(top) <= 1, "; ".join(f"{what} {error:.2e} > {bound:.2e}" for what, error, bound in rows if not error <= bound))
    return top


# -----------------------------------------------------------------------------
# truth and yardstick


def make(B, T, H, HKV, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=g).to(DEVICE, dtype) for heads in (H, HKV, HKV, H)]  # q, k, v, do


def sdpa(q, k, v, do, causal):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    wide = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(*wide, is_causal=causal).transpose(1, 2)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


def true_lse(q, k, causal):
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    return s.logsumexp(-1)


def judge(got, q, k, v, do, causal):
    """got: (o, lse, dq, dk, dv) of the whole sequence, or of the first of them that were computed."""
    o, dq, dk, dv = sdpa(*(x.double() for x in (q, k, v, do)), causal)
    truth = o, true_lse(q.double(), k.double(), causal), dq, dk, dv
    o, dq, dk, dv = sdpa(q, k, v, do, causal)
    peer = o, true_lse(q.float(), k.float(), causal), dq, dk, dv
    error = lambda a, b: (a.double() - b).abs().max().item()
    rows = [("o", 2), ("lse", 2), ("dq", 3), ("dk", 3), ("dv", 3)]
    return worst([(what, error(a, t), times * error(p, t) + 1e-5) for (what, times), a, t, p in zip(rows, got, truth, peer)])


def run(q, k, v, do, schedule="contiguous", group=None, causal=True, backend=None):
    """(o, lse, dq, dk, dv); group None: this process alone."""
    group = group or ALONE
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = ring_attn.ring_attn(q, k, v, schedule, group, causal, return_lse=True, backend=backend)
    return o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), do)


def check_virtual(schedule, n_ranks, causal, backend, dtype, B, T, H, HKV, D):
    q, k, v, do = make(B, n_ranks * T, H, HKV, D, dtype, seed=n_ranks)
    return judge(run(q, k, v, do, schedule, VirtualRing(n_ranks), causal, backend), q, k, v, do, causal)


# kernels: head dims, lengths, groups and dtypes on a ring of one
HEADS = [(2, 2), (6, 2), (5, 1), (6, 1), (3, 1)] if GPU else [(2, 2), (3, 1), (5, 1), (6, 1)]
LENGTHS = (1, 17, 1000, 1023, 1024) if GPU else (1, 17, 64)
kinds = itertools.cycle(HEADS)
for D, T, causal in itertools.product((64, 80, 96, 128, 192, 256), LENGTHS, (True, False)):
    H, HKV = next(kinds)
    if GPU or T == 17 or D in (64, 128):
        dtype = torch.bfloat16 if GPU else (torch.float16 if T == 64 else torch.float32)
        local(f"kernels D{D} T{T} {H}/{HKV} {'causal' if causal else 'full'} {str(dtype)[6:]}", check_virtual, "contiguous", 1, causal, "triton", dtype, 2 if GPU else 1, T, H, HKV, D)
for D, T, causal in itertools.product((64, 80, 128), (1, 17, 1000, 1023, 1024), (True, False)):
    (H, HKV), mask = next(kinds), "causal" if causal else "full"
    local(f"hopper kernels D{D} T{T} {H}/{HKV} {mask} bfloat16", check_virtual, "contiguous", 1, causal, "gluon", torch.bfloat16, 2, T, H, HKV, D, hopper=True)
for D in (16, 128):
    local(f"hopper kernels D{D} T1000 6/2 causal float16", check_virtual, "contiguous", 1, True, "gluon", torch.float16, 2, 1000, 6, 2, D, hopper=True)
local("hopper kernels 2000 items", check_virtual, "contiguous", 1, True, "gluon", torch.bfloat16, 16, 600, 32, 4, 64, hopper=True)
for D, T, dtype in itertools.product((33, 64, 128, 256), (17, 256), (torch.float16, torch.float32)) if GPU else ((33, 40, torch.float32), (16, 1000, torch.float32), (16, 1023, torch.float16)):
    for causal in {17: (True,), 256: (False,), 40: (True, False)}.get(T, (True,)):
        local(f"kernels D{D} T{T} 2/1 {'causal' if causal else 'full'} {str(dtype)[6:]}", check_virtual, "contiguous", 1, causal, "triton", dtype, 1, T, 2, 1, D)
for T, dtype in itertools.product((1, 17, 1000, 1023), (torch.float32, torch.float16, torch.bfloat16)):
    local(f"torch path T{T} {str(dtype)[6:]}", check_virtual, "contiguous", 1, True, "torch", dtype, 2, T, 6, 2, 24)

local("torch path float64", check_virtual, "striped", 3, True, "torch", torch.float64, 2, 17, 6, 2, 24)

# schedules: virtual rings of 1 to 8
for schedule, n_ranks, causal in itertools.product(SCHEDULES, range(1, 9), (True, False)):
    mask = "causal" if causal else "full"
    local(f"torch path {schedule} x{n_ranks} {mask}", check_virtual, schedule, n_ranks, causal, "torch", torch.float32, 2, 18 if schedule == "zigzag" else 17, 6, 2, 16)
    for T, D, (H, HKV) in ((1000, 128, (6, 2)), (512, 64, (4, 4))):
        shape = torch.bfloat16, 2, T, H, HKV, D
        local(f"hopper kernels {schedule} x{n_ranks} T{T} D{D} {mask} bfloat16", check_virtual, schedule, n_ranks, causal, "gluon", *shape, hopper=True)
        if GPU:
            local(f"kernels {schedule} x{n_ranks} T{T} D{D} {mask} bfloat16", check_virtual, schedule, n_ranks, causal, "triton", *shape)
    if not GPU and (causal or n_ranks == 3):
        local(f"kernels {schedule} x{n_ranks} {mask} float32", check_virtual, schedule, n_ranks, causal, "triton", torch.float32, 2, 34 if n_ranks == 2 else 6, 2, 1, 16)
        if n_ranks == 4:
            local(f"kernels {schedule} x{n_ranks} T64 {mask} float16", check_virtual, schedule, n_ranks, causal, "triton", torch.float16, 2, 64, 1, 1, 16)

# -----------------------------------------------------------------------------
# properties of kernels and schedules


LOW = dict(torch=torch.float32, triton=torch.float32, gluon=torch.float16)  # the Hopper kernels take 16-bit inputs only


def check_masked_rows(backend):
    """Keys that begin at position 5 against queries 0..11: rows 0..4 see nothing and must end as o = 0, lse = -inf, dq = 0."""
    forward, preprocess, backward_dq, backward_dkv = ring_attn.BACKENDS[backend]
    q, k, v, do = make(1, 12, 2, 1, 16, LOW[backend])
    wide = lambda x: torch.empty_like(x, dtype=torch.float32)
    hop = Hop(0, (HopRow(0, 1, 0, 5, 1, 0, INT_MAX, 0, 0),), (12,), (), (), (), ())
    o, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = torch.empty(1, 2, 12, device=DEVICE)
    forward(q, k, v, o, o if o.dtype == torch.float32 else wide(o), lse, hop, True, 0.25)
    rows = preprocess(o, do, lse, None)
    backward_dq(q, k, v, do, rows, dq, dq if dq.dtype == torch.float32 else wide(dq), hop, True, 0.25)
    backward_dkv(q, k, v, do, rows, dk, dv, wide(dk), wide(dv), hop, True, 0.25)
    require(not o[:, :5].any() and not dq[:, :5].any() and (lse[..., :5] == -math.inf).all(), "rows without a key are not empty")
    # the other rows: query 5 + i sees keys 0..i
    got = o[:, 5:], lse[..., 5:], dq[:, 5:], dk[:, :7], dv[:, :7]
    require(not dk[:, 7:].any() and not dv[:, 7:].any(), "keys that no query sees have a gradient")
    return judge(got, q[:, 5:], k[:, :7], v[:, :7], do[:, 5:], True)


def check_lse_gradient(backend):
    """A loss of both o and lse: all three gradients."""
    q, k, v, do = make(2, 24, 4, 2, 16, torch.float32)
    dlse = torch.randn(2, 4, 24, device=DEVICE)
    grads = []
    for wide in (False, True):
        leaf = [(x.double() if wide else x.clone()).requires_grad_() for x in (q, k, v)]
        if wide:
            expanded = (x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in leaf)
            o, lse = F.scaled_dot_product_attention(*expanded, is_causal=True).transpose(1, 2), true_lse(leaf[0], leaf[1], True)
        else:
            o, lse = ring_attn.ring_attn(*leaf, "striped", VirtualRing(3), return_lse=True, backend=backend)
        grads.append(torch.autograd.grad((o, lse), leaf, (do.to(o.dtype), dlse.to(lse.dtype))))
    return worst([(what, (a - b).abs().max().item(), 2e-5) for what, a, b in zip(("dq", "dk", "dv"), *grads)])


def check_autocast(backend):
    """Autocast must not reach into the hop loops: the same bits with and without."""
    q, k, v, do = make(1, 24, 4, 2, 16, LOW[backend])
    plain = run(q, k, v, do, "zigzag", VirtualRing(2), True, backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = run(q, k, v, do, "zigzag", VirtualRing(2), True, backend)
    require(all(torch.equal(a, b) for a, b in zip(plain, cast)), "autocast changes the result")


def check_same_bits(backend):
    q, k, v, do = make(2, 512 if GPU else 36, 4, 2, 64 if GPU else 16, torch.float16)
    runs = [run(q, k, v, do, "zigzag", VirtualRing(2), True, backend) for _ in range(3)]
    require(all(torch.equal(a, b) for r in runs[1:] for a, b in zip(runs[0], r)), "the same inputs gave other bits")


def check_strides(backend):
    """Views into tensors that are nan everywhere else, transposed, packed and expanded ones."""
    B, T, H, HKV, D = 2, 128 if GPU else 32, 4, 2, 64 if GPU else 32
    q, k, v, do = make(B, T, H, HKV, D, torch.float16)

    def inside(x, *pad):  # x in a larger tensor of nan
        big = torch.full([n + 2 * p for n, p in zip(x.shape, pad)], math.nan, dtype=x.dtype, device=x.device)
        view = big[tuple(slice(p, n + p) for n, p in zip(x.shape, pad))]
        view.copy_(x)
        return view

    transposed = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    last = lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
    for change in (lambda x: inside(x, 1, 32, 0, 0), lambda x: inside(x, 0, 3, 1, 5), lambda x: inside(x, 0, 0, 2, 0), transposed, last):
        top = judge(run(*(change(x) for x in (q, k, v, do)), backend=backend), q, k, v, do, True)
    packed = torch.cat((q, k, v), dim=2)
    judge(run(*packed.split((H, HKV, HKV), dim=2), do, backend=backend), q, k, v, do, True)
    expanded = [x[:1].expand(B, -1, -1, -1) for x in (q, k, v, do)]
    return max(top, judge(run(*expanded, backend=backend), *expanded, True), key=lambda row: row[1] / row[2])


def check_offsets():
    """Offsets beyond 2**31 elements: in the inputs (far apart tokens) and in the states (a large batch)."""
    far = torch.empty(2**32 + 2**21, dtype=torch.bfloat16, device=DEVICE)
    q, k, v, do = make(1, 2048, 2, 2, 128, torch.bfloat16)
    spread = [far[i * 2**10 :].as_strided(x.shape, (0, 2**21, 128, 1)) for i, x in enumerate((q, k, v))]
    for view, x in zip(spread, (q, k, v)):
        view.copy_(x)
    top = judge(run(*spread, do), q, k, v, do, True)
    del far, spread
    B = 2**31 // (17 * 32 * 128) + 64
    q, k, v, do = (torch.randn(B, 17, heads, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (32, 1, 1, 32))
    got = run(q, k, v, do)
    tail = slice(B - 64, B)
    return max(top, judge([x[tail] for x in got], q[tail], k[tail], v[tail], do[tail], True), key=lambda row: row[1] / row[2])


def check_positions():
    for schedule, n_ranks, T, B in itertools.product(SCHEDULES, range(1, 9), (1, 2, 5, 8), (2, 4)):
        if n_ranks > 1 and T % SCHEDULES[schedule].T_multiple:
            continue
        pos = torch.cat([positions(schedule, r, n_ranks, T, B).expand(B, T) for r in range(n_ranks)], 1)
        require((pos.sort(1).values == torch.arange(n_ranks * T)).all(), f"{schedule} x{n_ranks}: not every position is held once")
        require(all((positions(schedule, r, n_ranks, T, B).diff(dim=1) > 0).all() for r in range(n_ranks)), f"{schedule}: not increasing")
        x = torch.randn(B, n_ranks * T, 3)
        require(torch.equal(merge([shard(x, schedule, r, n_ranks) for r in range(n_ranks)], schedule), x), f"{schedule}: merge(shard(x)) != x")


def check_plans():
    """What a rank sends is what its neighbour receives; nobody computes on keys that did not arrive; the known savings."""
    for schedule, n_ranks, causal, direction, T in itertools.product(SCHEDULES, range(1, 9), (True, False), (1, -1), (8, 512)):
        plans = [plan(schedule, r, n_ranks, T, causal, direction) for r in range(n_ranks)]
        for r, j in itertools.product(range(n_ranks), range(n_ranks)):
            hop, neighbour = plans[r][j], plans[(r + direction) % n_ranks][j]
            require(hop.send == neighbour.recv and hop.send_grad == neighbour.recv_grad, f"{schedule} x{n_ranks}: sends do not match")
            for g, row in enumerate(hop.table):
                q_pos, k_pos = (ring_attn.layout_positions(ring_attn.Layout(*at), T) for at in (row[:3], row[3:6]))
                n = int((k_pos <= q_pos[-1]).sum()) if causal else T
                require(hop.seen[g] == min(-(-n // 128) * 128, T), f"{schedule} x{n_ranks}: {hop.seen[g]} rows seen, not the tiles of {n}")
                if j:
                    require(plans[r][j - 1].recv[g] >= hop.seen[g], f"{schedule} x{n_ranks}: keys are missing")
                    require(j == 1 or plans[r][j - 1].recv_grad[g] == row.carry_grad, f"{schedule} x{n_ranks}: gradients are missing")
        moved = sum(sum(hop.recv) / len(hop.table) / T for p in plans for hop in p)
        whole = n_ranks * (n_ranks - 1)
        if schedule == "contiguous" and causal and direction == 1:
            require(moved == whole / 2, f"contiguous x{n_ranks} moves {moved} shards, not half of {whole}")
        require(moved <= whole, f"{schedule} x{n_ranks} moves {moved} shards, more than {whole}")
        if causal and T == 512:
            share = {"contiguous": 1 / 2, "step": 1 / 2, "zigzag": 3 / 4, "striped": 1}[schedule]
            require(sum(ring_attn.keys_moved(schedule, n_ranks, T, 2)) == share * 2 * T * whole, f"{schedule} x{n_ranks} does not pull {share} of all keys")
        if causal and T == 8 and schedule in ("striped", "zigzag", "step"):
            area = lambda row: (shard_pos(row[:3])[:, None] >= shard_pos(row[3:6])).sum().item()
            work = [sum(area(row) for hop in p for row in hop.table) for p in plans]
            require(max(work) - min(work) <= 8 * n_ranks * len(plans[0][0].table), f"{schedule} x{n_ranks} is not balanced: {work}")


def shard_pos(layout):
    return ring_attn.layout_positions(ring_attn.Layout(*layout), 8)


class ModelCopyStream:
    """What ring_attn.CopyStream does, as two lists of steps, for check_protocol to take in any order that a GPU might."""

    def __init__(self, rank, base):
        self.rank, self.base, self.kernels, self.steps, self.events = rank, base, [], [], itertools.count()

    def capturing(self):
        return False

    def record(self, steps):
        event = self.rank, next(self.events)
        steps.append(("record", event))
        return event

    def fork(self):
        self.steps.append(("wait", self.record(self.kernels)))

    def mark(self):
        return self.record(self.steps)

    def meet(self, mark):
        self.kernels.append(("wait", mark))

    def copy(self, to, source, nbytes):
        self.steps.append(("copy", to, source, nbytes))

    def prepare(self, signals):
        return [(kind, self.base[args[0]] + 4 * args[1]) if kind == "set" else (kind, self.base[self.rank] + 4 * args[0]) for kind, *args in signals]

    def signal(self, prepared):
        self.steps += prepared


def check_protocol(schedule, n_ranks, loops=8, seed=0):
    """ring_attn.Symmetric without a GPU: hop loops, forward and backward in turn, on ranks whose two streams advance at random. Every
    key and gradient must be what and where it should when a kernel reads it, nobody may wait for ever, all flags be clear at the end."""
    rng, B, T, HKV, D = random.Random(seed), 2, 256, 1, 2
    size = 2 * B * T * HKV * D * 4
    memories = [torch.full((4096 + 4 * size,), 255, dtype=torch.uint8) for _ in range(n_ranks)]
    base = [memory.data_ptr() for memory in memories]
    alive, bytes_pushed = [], [0] * n_ranks
    lanes, shared = [ModelCopyStream(rank, base) for rank in range(n_ranks)], []
    for lane, memory in zip(lanes, memories):
        shared.append(ring_attn.SymmetricMemory.__new__(ring_attn.SymmetricMemory))
        vars(shared[-1]).update(lane=lane, base=base, local=memory, slots=[4096, 4096 + size], boxes=[4096 + 2 * size, 4096 + 3 * size], captured=False, known={})
    content = lambda loop, rank, what: torch.randn(B, T, HKV, D, generator=torch.Generator().manual_seed(zlib.crc32(f"{loop} {rank} {what}".encode())))
    same = lambda x, y, rows, why: [require(torch.equal(x[s, :n], y[s, :n]), why) for s, n in zip(ring_attn.batch_slices(B, len(rows)), rows)]

    def hop_loop(loop, rank, direction):  # as in forward_hops and backward_hops
        ring = SimpleNamespace(rank=rank, n_ranks=n_ranks)
        ring.memory = shared[rank]
        kernel = lambda f, *args: lanes[rank].kernels.append(("kernel", f, *args))
        k, v = torch.full((B, T, HKV, D), math.nan), torch.full((B, T, HKV, D), math.nan)
        kernel(lambda: (k.copy_(content(loop, rank, "k")), v.copy_(content(loop, rank, "v"))))
        moves = ring_attn.Symmetric(ring, schedule, k, v, True, direction, torch.float32 if direction < 0 else None)
        alive.append((moves, k, v))
        name = f"{schedule} x{n_ranks}, loop {loop}, rank {rank}"

        def attend(kv, hop, j):
            for x, what in zip(kv, "kv"):
                same(x, content(loop, hop.source, what), hop.seen, f"{name}, hop {j}: wrong keys")
                if j:
                    x.fill_(math.nan)  # nobody needs them any more

        def collect(grads, hop, j):  # each rank adds 10 ** rank to the rows that it sees
            for x in grads:
                for s, row, n in zip(ring_attn.batch_slices(B, len(hop.seen)), hop.table, hop.seen):
                    x[s, row.carry_grad :] = 0
                    x[s, :n] += 10.0**rank

        def bring_home(grads):
            for s, row, g in zip(ring_attn.batch_slices(B, len(moves.hops[0].seen)), moves.hops[0].table, range(B)):
                truth = torch.zeros(T)
                for other in set(range(n_ranks)) - {rank}:
                    truth[: plan(schedule, other, n_ranks, T, True, 1)[(other - rank) % n_ranks].seen[g]] += 10.0**other
                for x in grads:
                    got = x[s, : row.carry_grad, 0, 0]
                    require((got == truth[: row.carry_grad]).all() and not truth[row.carry_grad :].any(), f"{name}: gradients lack a rank's part")
            for x in grads:
                x.fill_(math.nan)

        for j, hop in enumerate(moves.hops):
            kv = moves.keys(j)
            if direction < 0 and j:
                grads = moves.grads(j)
                if hop.visible:
                    kernel(collect, grads, hop, j)
                moves.pass_on(j)
            if hop.visible:
                kernel(attend, kv, hop, j)
        if direction < 0:
            kernel(bring_home, moves.grads(n_ranks))
        moves.finish()
        kernel(lambda: (k.fill_(math.nan), v.fill_(math.nan)))  # the caller may do so

    for memory in memories:
        memory[:4096] = 0
    for loop, rank in itertools.product(range(loops), range(n_ranks)):
        hop_loop(loop, rank, 1 if loop % 2 == 0 else -1)
    queues = [deque(steps) for lane in lanes for steps in (lane.kernels, lane.steps)]
    flag, done = (lambda at: ctypes.c_int32.from_address(at)), set()
    while any(queues):
        ready = [q for q in queues if q and not (q[0][0] == "wait" and q[0][1] not in done) and not (q[0][0] == "take" and flag(q[0][1]).value != 1)]
        require(ready, f"{schedule} x{n_ranks}: everybody waits")
        queue = rng.choice(ready)
        kind, *args = queue.popleft()
        if kind == "record":
            done.add(args[0])
        elif kind == "kernel":
            args[0](*args[1:])
        elif kind == "copy":
            ctypes.memmove(*args)
            for rank in range(n_ranks):
                if 0 <= args[0] - base[rank] < 4096 + 2 * size:
                    bytes_pushed[rank] += args[2]
        elif kind == "set":
            require(flag(args[0]).value == 0, f"{schedule} x{n_ranks}: a flag is set twice")
            flag(args[0]).value = 1
        elif kind == "take":
            flag(args[0]).value = 0
    require(not any(memory[:4096].any() for memory in memories), f"{schedule} x{n_ranks}: a flag is left set")
    forward = [n * 2 * D * 4 for n in ring_attn.keys_moved(schedule, n_ranks, T, B)]
    require(bytes_pushed == [n * loops for n in forward], f"{schedule} x{n_ranks}: moved {bytes_pushed} bytes in {loops} loops, not {forward} in each")


def check_memory():
    """At most two foreign key/value shards and two of their gradients, however long the ring."""
    seen, shard_size = set(), 2 * 4 * 2 * 16
    post = ring_attn.VirtualRank.exchange

    def spy(self, send, recv, direction, story):
        require(all(x.numel() == shard_size for x in recv), f"a buffer of {[tuple(x.shape) for x in recv]} is no shard")
        seen.update((self.rank, x.dtype, x.data_ptr()) for x in recv)
        return post(self, send, recv, direction, story)

    ring_attn.VirtualRank.exchange = spy
    try:
        run(*make(2, 8 * 4, 4, 2, 16, torch.float16), "zigzag", VirtualRing(8), True, "torch")
    finally:
        ring_attn.VirtualRank.exchange = post
    for dtype, most in ((torch.float16, 2 * 2 * 2), (torch.float32, 2 * 2)):  # k and v, two buffers, (forward, backward)
        require(max(sum(r == rank and d == dtype for r, d, _ in seen) for rank in range(8)) <= most, f"more than {most} buffers of {dtype}")


def check_operators():
    """torch.library.opcheck: schemas, fake implementations (shapes, dtypes, strides) and autograd of both operators are true."""
    for group, dtype in ((ALONE, torch.float64), (VirtualRing(2), torch.float16)):
        q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(2, 8, 4, 2, 16, dtype))
        options = ring_attn.resolve_ring(group).number, "zigzag", True, 0.25, "torch"
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(torch.ops.ring_attn.forward.default, (*leaves, *options, True, False, None))
        saved = [x.detach() for x in (*leaves, *torch.ops.ring_attn.forward(*leaves, *options, True, False, None))]
        for grads in ((do, None), (None, saved[-1])):
            torch.library.opcheck(torch.ops.ring_attn.backward.default, (*grads, *saved, *options))


def check_looked_at():
    """Who looks at operators finds them, though eager calls pass them by: selective checkpointing keeps o and lse, so that the forward
    runs once; forward-mode derivatives, which there are none of, are refused and not forgotten."""
    q, k, v, do = (x.requires_grad_() for x in make(1, 16, 2, 2, 16, torch.float32))
    attn, ran, real_hops = lambda q, k, v: ring_attn.flash_attn_func(2 * q, k, v), [], ring_attn.run_hops
    kept = torch.ops.ring_attn.forward.default
    policy = lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE
    ring_attn.run_hops = lambda hops, *args: (ran.append(hops), real_hops(hops, *args))[1]
    try:
        o = checkpoint(attn, q, k, v, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        grads = torch.autograd.grad(o, (q, k, v), do)
    finally:
        ring_attn.run_hops = real_hops
    require(ran == [ring_attn.forward_hops, ring_attn.backward_hops], f"under a checkpoint that keeps attention's results it ran {ran}")
    require(all(map(torch.equal, grads, torch.autograd.grad(attn(q, k, v), (q, k, v), do))), "other gradients under a checkpoint")
    with forward_ad.dual_level():
        try:
            ring_attn.flash_attn_func(forward_ad.make_dual(q.detach(), do.detach()), k.detach(), v.detach())
        except NotImplementedError:
            return
    raise AssertionError("a forward-mode derivative is lost without a word")


def check_compiled():
    """One graph: o, lse and gradients as in eager, whichever of the two has one; other lengths, no_grad; errors when it runs."""
    ring = VirtualRing(2)
    attn = lambda q, k, v: ring_attn.ring_attn(2 * q, k, v, "zigzag", ring, return_lse=True, backend=None if GPU else "torch")
    compiled = torch.compile(attn, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    losses = (lambda o, lse: o.square().sum(), lambda o, lse: lse.square().sum(), lambda o, lse: o.sum() + lse.square().sum())
    rows = []
    for T, loss in zip((8, 16, 24), losses):
        leaves = [x.requires_grad_() for x in make(2, T, 4, 2, 16, torch.float32)[:3]]
        eager, got = ((*f(*leaves), *torch.autograd.grad(loss(*f(*leaves)), leaves, materialize_grads=True)) for f in (attn, compiled))
        rows += [(what, (a - b).abs().max().item(), 1e-5) for what, a, b in zip(("o", "lse", "dq", "dk", "dv"), got, eager)]
    with torch.no_grad():
        require(torch.equal(compiled(*leaves)[0], attn(*leaves)[0]), "it differs under no_grad")
    raises(lambda: compiled(*(x[:, :7] for x in leaves)), "seq_len=7", "n_ranks=2")
    raises(lambda: torch.compile(ring_attn.flash_attn_func, fullgraph=True, backend="aot_eager")(*leaves, bias=leaves[0]), "bias")
    return worst(rows)


def check_million(T=2**20):
    """2**20 tokens, 8 heads: sampled rows of o, dq and of dk, dv against float64. The yardstick is the same sum with o, its probabilities
    and score gradients rounded to 16 bits, which is what tensor cores are given. dk, dv take o and lse from the forward under test."""
    torch.manual_seed(0)
    H, D = 8, 128
    q, k, v, do = (torch.randn(1, T, H, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, lse, dq, dk, dv = run(q, k, v, do)
    peak = (torch.cuda.max_memory_allocated() - before) / q.nbytes
    require(peak < 4.5, f"forward and backward keep {peak:.1f} times the memory of q")  # o, dq, dk, dv, and three float32 per row
    scale, low = D**-0.5, lambda x: x.bfloat16().double()
    rows, lse_error = {}, 0.0  # (what, position): squared errors of ours and of the yardstick, summed over the heads

    def note(what, i, got, truth, peer):
        ours, theirs = rows.get((what, i), (0.0, 0.0))
        rows[what, i] = ours + (got.double() - truth).square().sum().item(), theirs + (peer - truth).square().sum().item()

    for h, i in itertools.product(range(H), (0, 1, T // 100, T // 2 - 1, T - 1)):
        seen_k, seen_v, q_i, do_i = (x.double() for x in (k[0, : i + 1, h], v[0, : i + 1, h], q[0, i, h], do[0, i, h]))  # query i sees keys 0..i
        s = seen_k @ q_i * scale
        p, dp = s.softmax(0), seen_v @ do_i
        true_o, low_o = p @ seen_v, low(low(p) @ seen_v)
        true_ds, low_ds = p * (dp - true_o @ do_i) * scale, low(p * (dp - low_o @ do_i) * scale)
        lse_error = max(lse_error, abs(lse[0, h, i].item() - s.logsumexp(0).item()))
        note("o", i, o[0, i, h], true_o, low_o)
        note("dq", i, dq[0, i, h], true_ds @ seen_k, low(low_ds @ seen_k))
        by_q, by_do, by_o, k_i, v_i = (x.double() for x in (q[0, i:, h], do[0, i:, h], o[0, i:, h], k[0, i, h], v[0, i, h]))  # key i is seen by queries i..
        p = (by_q @ k_i * scale - lse[0, h, i:].double()).exp()
        ds = p * (by_do @ v_i - (by_o * by_do).sum(1)) * scale
        note("dv", i, dv[0, i, h], p @ by_do, low(low(p) @ by_do))
        note("dk", i, dk[0, i, h], ds @ by_q, low(low(ds) @ by_q))
    return worst([("lse", lse_error, 1e-4)] + [(f"{what} {i}", ours**0.5, 3 * theirs**0.5 + 1e-5) for (what, i), (ours, theirs) in rows.items()])


def check_graph():
    """A training step captured in a CUDA graph and replayed on other batches gives the losses of eager training."""
    torch.manual_seed(0)
    batches = torch.randint(256, (6, 2, 257), device=DEVICE)
    losses = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = Transformer(Config(n_layers=2, dim=128, dim_per_head=64, n_kv_heads=1, seq_len=256), attn_type=AttentionType.FLASH).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        text = batches[0].clone()

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(text[:, :-1], text[:, 1:])
            loss.backward()
            optimizer.step()
            return loss.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        play = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()

            def play():
                graph.replay()
                return loss.clone()

        losses.append([])
        for batch in batches:
            text.copy_(batch)
            losses[-1].append(play().item())
    require(len(set(losses[1])) == len(batches), f"replays do not see their batches: {losses[1]}")
    return worst([("loss", max(abs(a - b) for a, b in zip(*losses)), 1e-2)])  # the embedding's gradient adds in any order


def check_items(kernel):
    """The programs of a Hopper kernel have each tile of each head once between them, and under a causal mask nearly as much to do as each
    other, and without one nearly as many items; where a head's keys fill L2 they work on one head at a time."""
    uneven, real_properties = 0.0, torch.cuda.get_device_properties
    shapes = (1, 8192, 32, 8), (1, 16384, 16, 16), (2, 4096, 24, 3), (1, 65536, 32, 32), (1, 70000, 7, 7), (3, 100, 5, 5)
    for n_sm, (B, T, H, HKV) in itertools.product((132, 78, 7), shapes):
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=n_sm)
        try:
            *_, problem, P, constants, _ = ring_attn.hopper_config.__wrapped__(kernel, (B, T, H, 128), HKV, DEVICE, (None,), True)
        finally:
            torch.cuda.get_device_properties = real_properties
        (*_, section, rounds), n_tiles, n_heads = problem, triton.cdiv(T, 64 * constants["CONSUMERS"]), B * (HKV if kernel == "dkv" else H)
        n, program = np.arange(n_heads // section * rounds), np.arange(P)[:, None]
        gl = SimpleNamespace(num_programs=lambda axis: P, program_id=lambda axis: program, where=np.where, minimum=np.minimum)
        tile, head, exists = FunctionType(ring_attn.tile_scheduler.fn.__code__, {"gl": gl})(n, n_tiles, section, rounds)
        items = np.sort((tile * n_heads + head)[exists])
        require(np.array_equal(items, np.arange(n_tiles * n_heads)), f"{(B, T, H, HKV)} on {n_sm}: not every item once")
        require(section == 1 or (T, HKV) != (65536, 32), f"keys of {section} heads at a time, one of which fills L2")
        most = exists.sum(1).max()
        require(most <= triton.cdiv(len(items), P) + 1, f"{(B, T, H, HKV)} on {n_sm}: a program has {most} of {len(items)} items")
        if len(n) >= 4:
            work = (exists * (n_tiles - tile + 3)).sum(1)  # an item takes as long as its tiles and about three more
            uneven = max(uneven, work.max() / work.mean() - 1)
    return worst([("work", uneven, 0.05)])


def check_launches():
    """What the launchers of the Hopper kernels pass on, by place, fits the kernels' signatures: constants last, in their order."""
    real_launch, real_properties, seen = ring_attn.launch, torch.cuda.get_device_properties, []

    def launch(kernel, device, depends, grid, args, constants, **options):
        require(kernel.arg_names[len(args) :] == list(constants), f"{kernel.__name__}: {kernel.arg_names} against {len(args)} values and {list(constants)}")
        for name, value in zip(kernel.arg_names, args):
            kind = "tiles" if hasattr(value, "block_shape") else "pointer" if isinstance(value, torch.Tensor) else "number"
            if value is None:  # for dq there is one result, and rows do not stream by
                require(name in ("rows_desc", "out2_desc", "ACC2") and len(seen) == 1, f"{kernel.__name__}: no {name}")
                continue
            expected = "tiles" if name.endswith("_desc") else "number" if name in ("sm_scale", "B", "H", "G", "T", "GROUP_B", "SECTION", "ROUNDS") else "pointer"
            require(kind == expected, f"{kernel.__name__}: {name} is {value}")
        seen.append((kernel.__name__, grid))

    ring_attn.launch = launch
    torch.cuda.get_device_properties = lambda device: type("Properties", (), dict(multi_processor_count=10))
    ring_attn.hopper_config.cache_clear()
    try:
        q, k, v, do = make(2, 200, 4, 2, 40, torch.float16)
        hop, rows = plan("zigzag", 0, 1, 200, True, 1)[0], torch.zeros(2, 8, 256, device=DEVICE)
        _, _, dq, dkv = ring_attn.BACKENDS["gluon"]
        ring_attn.hopper_fwd(q, k, v, q, q.float(), rows, hop, True, 0.5)
        dq(q, k, v, do, rows, q, q.float(), hop, True, 0.5)
        dkv(q, k, v, do, rows, k, v, k.float(), v.float(), hop, True, 0.5)
    finally:
        ring_attn.launch, torch.cuda.get_device_properties = real_launch, real_properties
        ring_attn.hopper_config.cache_clear()
    require(seen == [("hopper_fwd_kernel", 10), ("hopper_bwd_kernel", 10), ("hopper_bwd_kernel", 8)], f"{seen}")


def check_compile():
    """What this machine's Triton makes of the kernels for Hopper, GPU or not: see compile_kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, "--compile_only"], capture_output=True, text=True, env=env, timeout=600)
    require(done.returncode == 0, (done.stdout + done.stderr)[-1500:])


def check_readme():
    """Its pictures are there, and the schedules are drawn as the plans are today."""
    readme, assets = (Path(ring_attn.__file__).with_name(name) for name in ("README.md", "assets"))
    require("@@" not in readme.read_text(), "README.md has a hole")
    for picture in ("schedules", "throughput", "overlap"):
        require(f"assets/{picture}.svg" in readme.read_text() and (assets / f"{picture}.svg").exists(), f"no {picture}.svg in README.md, or in assets/")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        bench.schedules_figure(Path(folder))
        drawn = Path(folder, "schedules.svg").read_text()
    require(drawn == (assets / "schedules.svg").read_text(), "assets/schedules.svg is not what `python bench.py --figures` draws")
    require("rank 3    k3 ██   k2 ████ k1 ████ k0 ████ 3.5    3" in ring_attn.draw(), "`python ring_attn.py` draws something else")


for backend in ("torch", "triton", "gluon"):
    local(f"rows without a key ({backend})", check_masked_rows, backend, hopper=backend == "gluon")
    if backend != "gluon":  # its bound is for float32 inputs
        local(f"gradient of lse ({backend})", check_lse_gradient, backend)
    local(f"autocast leaves it alone ({backend})", check_autocast, backend, hopper=backend == "gluon")
    local(f"same inputs, same bits ({backend})", check_same_bits, backend, hopper=backend == "gluon")
    local(f"strided views amid nan ({backend})", check_strides, backend, hopper=backend == "gluon")
local("offsets beyond 2**31", check_offsets, gpu=True)
local("a million tokens", check_million, gpu=True)
local("a training step in a CUDA graph", check_graph, gpu=True)
local("every kernel compiles for Hopper", check_compile)
local("launchers fit the Hopper kernels", check_launches)
for kernel in ring_attn.HOPPER_TILES:
    local(f"items of the Hopper kernels: {kernel}", check_items, kernel)
local("positions, shard, merge", check_positions)
local("plans: sends match receives", check_plans)
local("buffers per rank", check_memory)
for schedule, n_ranks in itertools.product(SCHEDULES, (2, 3, 5)):
    local(f"symmetric memory, steps in any order: {schedule} x{n_ranks}", lambda *args: [check_protocol(*args, seed=i) for i in range(4)] and None, schedule, n_ranks)
local("operators under opcheck", check_operators)
local("operators are there for who looks", check_looked_at)
local("compiled, with lse", check_compiled)
local("the pictures in the README", check_readme)

# -----------------------------------------------------------------------------
# decoding, against flex_attention, which nobody here wrote: eager, in float64 for the truth and in the dtype at hand for the yardstick


@triton.jit
def alibi_jit(score, b, h, q_idx, kv_idx, slopes, docs):
    return score + tl.load(slopes + h // 3) * (kv_idx - q_idx)


def alibi(score, b, h, q_idx, kv_idx, slopes, docs):  # by key/value head, of groups of 3
    return score + slopes[h // 3] * (kv_idx - q_idx)


@triton.jit
def softcap_jit(score, b, h, q_idx, kv_idx):
    return 4 * (2 * tl.sigmoid(score / 2) - 1)


def softcap(score, b, h, q_idx, kv_idx):
    return 4 * (2 * torch.sigmoid(score / 2) - 1)


@triton.jit
def same_doc_jit(b, h, q_idx, kv_idx, slopes, docs):
    return tl.load(docs + b * 256 + q_idx) == tl.load(docs + b * 256 + kv_idx)


def same_doc(b, h, q_idx, kv_idx, slopes, docs):
    return docs[b, q_idx] == docs[b, kv_idx]


@triton.jit
def causal_jit(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def causal_mask(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


@triton.jit
def dilated_jit(b, h, q_idx, kv_idx):  # differs by head and by sequence
    return (q_idx - kv_idx) % (h + b + 1) == 0


def dilated(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx) % (h + b + 1) == 0


JIT = {alibi: alibi_jit, softcap: softcap_jit, same_doc: same_doc_jit, causal_mask: causal_jit, dilated: dilated_jit}
LOW_DECODE = torch.bfloat16 if GPU else torch.float16


def flex_decode(q, k, v, lengths, causal, score_mod, mask_mod, aux, window, n_sink):
    """o (B, M, H, D), lse (B, H, M) of flex_attention, which numbers queries from 0: the mods are given positions."""
    B, M, N = len(q), q.shape[1], k.shape[1]
    place = lambda b, m: (lengths[b] - M + m).clamp(min=0)

    def mask(b, h, m, j):
        i = lengths[b] - M + m
        seen = j < lengths[b]
        if causal or window is not None:
            seen = seen & (j <= i)
        if window is not None:
            seen = seen & ((j > i - window) | (j < n_sink))
        return seen if mask_mod is None else seen & mask_mod(b, h, place(b, m), j, *aux)

    score = None if score_mod is None else lambda s, b, h, m, j: score_mod(s, b, h, place(b, m), j, *aux)
    blocks = create_block_mask(mask, B, q.shape[2], M, N, device=q.device)
    o, lse = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=score, block_mask=blocks, enable_gqa=q.shape[2] != k.shape[2], return_lse=True)
    return o.transpose(1, 2).nan_to_num(0.0), lse


class Case(NamedTuple):
    """Inputs of a decode call as whole sequences: whatever is behind a sequence's length is nan."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    options: dict
    judge: Callable  # (o, lse) -> the worst row


def decode_case(dtype, M, H, HKV, D, lengths, causal=True, score_mod=None, mask_mod=None, aux=(), window=None, sink=None, N=None, seed=0):
    B, N = len(lengths), N or max(lengths)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, heads, D, generator=g).to(DEVICE, dtype) for n, heads in ((M, H), (N, HKV), (N, HKV)))
    L = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    n_sink, logits = (0, sink) if isinstance(sink, torch.Tensor) else (sink or 0, None)
    flexed = []
    for wide in (torch.float64, dtype):
        floats = [x.to(wide) if x.is_floating_point() else x for x in aux]
        o, lse = flex_decode(*(x.to(wide) for x in (q, k, v)), L.long(), causal, score_mod, mask_mod, floats, window, n_sink)
        if logits is not None:  # one more term in the denominator
            total = torch.logaddexp(lse.to(wide), logits.to(wide)[:, None])
            o, lse = o * (lse - total).exp().transpose(1, 2)[..., None].to(o.dtype), total
        flexed.append((o, lse.double()))
    (true_o, true_lse), (peer_o, peer_lse) = flexed
    behind = torch.arange(N, device=DEVICE) >= L[:, None]
    for x in (k, v):
        x[behind] = math.nan

    def judge_decode(o, lse):
        empty = true_lse == -math.inf  # (B, H, M)
        require((lse[empty] == -math.inf).all() and not o.transpose(1, 2)[empty].any(), "a query without a key is not empty")
        error = lambda a, b: (a.double() - b).abs().nan_to_num(math.inf).max().item()
        filled = lambda x: x.double().masked_fill(empty, 0.0)
        return worst([("o", error(o, true_o), 2 * error(peer_o, true_o) + 1e-5),
                      ("lse", error(filled(lse), filled(true_lse)), (2 * error(filled(peer_lse), filled(true_lse)) if dtype != torch.float32 else 0) + 1e-5)])  # fmt: skip

    options = dict(causal=causal, score_mod=score_mod, mask_mod=mask_mod, aux=aux, window=window, sink=sink)
    return Case(q, k, v, L, options, judge_decode)


def for_backend(options, backend):
    """The options with the mods that the backend takes."""
    return {name: JIT.get(x, x) if backend == "triton" and callable(x) else x for name, x in options.items()} | dict(backend=backend)


def check_decode(backend, *args, n_splits=None, **options):
    case = decode_case(*args, **options)
    call = lambda: decode_attn(case.q, case.k, case.v, cache_seqlens=case.lengths, return_lse=True, n_splits=n_splits, **for_backend(case.options, backend))
    got, again = call(), call()
    require(torch.equal(got[0], again[0]) and torch.equal(got[1], again[1]), "the same inputs gave other bits")
    require(got[0].dtype == case.q.dtype, f"o is {got[0].dtype}")
    rows = [case.judge(*got)]
    if len(set(args[5])) == 1 and args[5][0] == case.k.shape[1]:
        rows.append(case.judge(*decode_attn(case.q, case.k, case.v, return_lse=True, n_splits=n_splits, **for_backend(case.options, backend))))
    return max(rows, key=lambda row: row[1] / row[2])


def check_block_mask(backend, mask_mod, by_batch, by_head, size, dtype, M, H, HKV, D, lengths, N):
    """The BlockMask that flex itself makes of a mask, for a cache of N tokens; and one whose full blocks all are partial ones."""
    case = decode_case(dtype, M, H, HKV, D, lengths, mask_mod=mask_mod, N=N)
    L, rows = case.lengths.long(), []
    mask = lambda b, h, m, j: mask_mod(b, h, (L[b] - M + m).clamp(min=0), j)
    blocks = create_block_mask(mask, len(lengths) if by_batch else None, H if by_head else None, M, N, device=DEVICE, BLOCK_SIZE=(M, size))
    partial = BlockMask.from_kv_blocks(torch.full_like(blocks.kv_num_blocks, blocks.kv_indices.shape[-1]),
                                       torch.arange(blocks.kv_indices.shape[-1], device=DEVICE, dtype=torch.int32).expand_as(blocks.kv_indices).contiguous(),
                                       BLOCK_SIZE=(M, size), mask_mod=mask)  # fmt: skip
    require(mask_mod is dilated or blocks.full_kv_num_blocks.sum() > 0, "the case has no full block")
    options = for_backend(case.options, backend)
    for block_mask in (blocks, partial):
        rows.append(case.judge(*decode_attn(case.q, case.k, case.v, cache_seqlens=case.lengths, block_mask=block_mask, return_lse=True, **options)))
    for n_ranks in (2, 4):
        rows.append(case.judge(*virtual_decode(case, n_ranks, block_mask=blocks, **options)))
    return max(rows, key=lambda row: row[1] / row[2])


def check_skipped_blocks(backend):
    """Blocks that a mask does not name are not read, and full ones not asked about: nan in the ones, a mask_mod that says no to the others."""
    q, k, v = (torch.randn(1, n, 2, 16, device=DEVICE, dtype=LOW_DECODE) for n in (1, 96, 96))
    table = lambda *x: torch.tensor([[[x]]], dtype=torch.int32, device=DEVICE)
    count = lambda x: torch.tensor([[[x]]], dtype=torch.int32, device=DEVICE)
    k[:, 32:64] = v[:, 32:64] = math.nan
    blocks = BlockMask.from_kv_blocks(count(0), table(0, 0, 0), count(2), table(2, 0, 1), BLOCK_SIZE=(128, 32))
    no = no_jit if backend == "triton" else lambda b, h, q_idx, kv_idx: kv_idx < 0
    got = decode_attn(q, k, v, block_mask=blocks, mask_mod=no, backend=backend)
    seen = torch.cat((k[:, 64:], k[:, :32]), 1), torch.cat((v[:, 64:], v[:, :32]), 1)
    require((got - decode_attn(q, *seen, backend=backend)).abs().max() < 1e-2, "blocks are mixed up")
    require(got.isfinite().all(), "a block that nobody named was read")


@triton.jit
def no_jit(b, h, q_idx, kv_idx):
    return kv_idx < 0


def virtual_decode(case, n_ranks, **options):
    """What n_ranks ranks find, each in its stripe, merged: o, lse."""
    sink, parts = options.pop("sink", None), []
    logits = sink if isinstance(sink, torch.Tensor) else None
    for rank in range(n_ranks):
        k, v = (stripe(x, rank, n_ranks) for x in (case.k, case.v))
        parts.append(decode_part(case.q, k, v, rank, n_ranks, cache_seqlens=case.lengths, sink=None if logits is not None else sink, **options))
    return merge_parts(torch.stack(parts), logits, case.q.dtype)


def stripe(x, rank, n_ranks):
    """Rank's tokens of x (B, N, ...), and nan up to the number that each rank has room for."""
    mine = x[:, rank::n_ranks]
    return F.pad(mine, (0, 0, 0, 0, 0, -(-x.shape[1] // n_ranks) - mine.shape[1]), value=math.nan)


def check_stripes(backend, n_ranks, *args, **options):
    """The cache striped over ranks gives the answer of the whole one."""
    case = decode_case(*args, **options)
    return case.judge(*virtual_decode(case, n_ranks, **for_backend(case.options, backend)))


def check_pages(backend, page_size, dtype, n_ranks=1):
    """A cache in pages, in any order, the ones that are not in use and the rest of the last ones nan; table entries beyond the length are wild."""
    case = decode_case(dtype, 2, 6, 2, 32, (200, 0, 1, 77), window=100, sink=3)
    parts = []
    for rank in range(n_ranks):
        local = [stripe(x, rank, n_ranks) for x in (case.k, case.v)]
        n_pages = -(-local[0].shape[1] // page_size)
        order = torch.randperm(4 * n_pages + 3, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
        pages = [torch.full((len(order), page_size, 2, 32), math.nan, device=DEVICE, dtype=dtype) for _ in local]
        table = order[: 4 * n_pages].view(4, n_pages).int()
        for x, y in zip(local, pages):
            y[table.long()] = F.pad(x, (0, 0, 0, 0, 0, n_pages * page_size - x.shape[1]), value=math.nan).view(4, n_pages, page_size, 2, 32)
        table[1], table[2, 1:] = 2**31 - 1, -5
        parts.append(decode_part(case.q, *pages, rank, n_ranks, cache_seqlens=case.lengths, page_table=table, **for_backend(case.options, backend)))
    if n_ranks == 1:
        return case.judge(*decode_attn(case.q, *pages, cache_seqlens=case.lengths, page_table=table, return_lse=True, **for_backend(case.options, backend)))
    return case.judge(*merge_parts(torch.stack(parts), None, dtype))


def check_cache_layouts(backend):
    """Caches in (B, HKV, N, D), inside of larger tensors of nan, expanded ones; queries with any strides."""
    case, rows = decode_case(LOW_DECODE, 3, 6, 2, 48, (150, 40, 97)), []
    inside = torch.full((5, 170, 5, 64), math.nan, device=DEVICE, dtype=LOW_DECODE)

    def view(x):
        inside[1:4, 10:160, 1:3, 8:56] = x
        return inside.clone()[1:4, 10:160, 1:3, 8:56]

    for change in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), view):
        q = case.q.transpose(1, 3).contiguous().transpose(1, 3)
        rows.append(case.judge(*decode_attn(q, change(case.k), change(case.v), cache_seqlens=case.lengths, return_lse=True, backend=backend)))
    one = decode_case(LOW_DECODE, 1, 4, 4, 32, (60,))
    got = decode_attn(*(x.expand(3, -1, -1, -1) for x in (one.q, one.k, one.v)), return_lse=True, backend=backend)
    rows.append(one.judge(*(x[2:] for x in got)))
    return max(rows, key=lambda row: row[1] / row[2])


def check_wild_values(backend):
    """Lengths outside of the cache are clipped, unless debug is on (on a CPU it always is): nothing outside is read."""
    case = decode_case(LOW_DECODE, 1, 4, 2, 32, (64, 64, 64))
    wild = torch.tensor([64, 65, -1], dtype=torch.int32, device=DEVICE)
    call = lambda **options: decode_attn(case.q, case.k, case.v, cache_seqlens=wild, backend=backend, **options)
    raises(lambda: call(debug=True), "cache_seqlens[1]=65", "0..64")
    table = torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32, device=DEVICE)
    pages = case.k.reshape(-1, 32, 2, 32)[:3]
    ints = lambda *x: torch.tensor([[[*x]]], dtype=torch.int32, device=DEVICE)
    blocks = BlockMask.from_kv_blocks(ints(9), ints(0, 1)[None], ints(-3), ints(7, -7)[None], BLOCK_SIZE=(128, 32))
    raises(lambda: decode_attn(case.q, case.k, case.v, block_mask=blocks, backend=backend, debug=True), "block_mask.kv_num_blocks", "0..2")
    raises(lambda: decode_attn(case.q, pages, pages, page_table=table, backend=backend, debug=True), "page_table[2, 1]=3", "0..2")
    if GPU:
        o, whole = call(), decode_attn(case.q, case.k, case.v, backend=backend)
        require(torch.equal(o[:2], whole[:2]) and not o[2].any(), "lengths are not clipped")
        require(decode_attn(case.q, pages, pages, page_table=table, backend=backend).isfinite().all(), "a page outside was read")
        require((decode_attn(case.q, case.k, case.v, block_mask=blocks, backend=backend) - whole).abs().max() < 1e-2, "a list of blocks is not clipped")


def check_decode_graph():
    """A CUDA graph captured once gives the right answers after lengths, cache and page table have changed."""
    for paged in (False, True):
        lengths = [(700, 3, 0, 64), (1, 1000, 1000, 999), (1000, 5, 5, 5), (0, 0, 0, 0)]
        cases = [decode_case(torch.bfloat16, 1, 8, 2, 64, n, N=1000, seed=i) for i, n in enumerate(lengths)]
        q, k, v, L = (x.clone() for x in cases[0][:4])
        table = torch.arange(4, dtype=torch.int32, device=DEVICE)[:, None].contiguous()
        call = lambda: decode_attn(q, k, v, cache_seqlens=L, page_table=table if paged else None, return_lse=True)
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, lse = call()
        rows = []
        for case in (*cases[1:], cases[0]):
            table.copy_(table.roll(1, 0))
            order = table[:, 0].long() if paged else torch.arange(4, device=DEVICE)
            q.copy_(case.q), L.copy_(case.lengths)
            k[order], v[order] = case.k, case.v
            graph.replay()
            rows.append(case.judge(o, lse))
    return max(rows, key=lambda row: row[1] / row[2])


def check_decode_offsets():
    """A cache of more than 2**31 elements, by its length, its heads and its batch."""
    rows = []
    for B, N, n, heads_first in ((1, 2**21 + 100, 1, False), (1, 2**21 + 100, 1, True), (2**21 // 1024 + 2, 1024, 2, False)):
        shape = (B, 16, N, 128) if heads_first else (B, N, 16, 128)
        k, v = (torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
        k, v = (x.transpose(1, 2) for x in (k, v)) if heads_first else (k, v)
        q = torch.randn(B, 1, 16, 128, dtype=torch.bfloat16, device=DEVICE)
        o, lse = decode_attn(q, k, v, window=300, return_lse=True)
        tail = [x[-n:, -300:] for x in (k, v)]
        truth, true_lse_ = torch_decode(q[-n:].double(), *(x.double() for x in tail))
        peer, peer_lse = torch_decode(q[-n:], *tail)
        error = lambda a, b: (a.double() - b).abs().max().item()
        rows += [("o", error(o[-n:], truth), 2 * error(peer, truth) + 1e-5), ("lse", error(lse[-n:], true_lse_), 2 * error(peer_lse, true_lse_) + 1e-4)]
        del k, v
    return worst(rows)


def torch_decode(q, k, v):
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    s = torch.einsum("bhmd,bhnd->bhmn", qt.double(), kt.double()) * q.shape[-1] ** -0.5
    return F.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2), s.logsumexp(-1)


def check_decode_errors():
    backend = "triton" if GPU or ring_attn.INTERPRET else "torch"
    q, k = torch.randn(2, 1, 4, 16, device=DEVICE), torch.randn(2, 32, 2, 16, device=DEVICE)
    ints = lambda *x: torch.tensor(x, dtype=torch.int32, device=DEVICE)
    call = lambda q=q, k=k, v=None, **options: decode_attn(q, k, k if v is None else v, **options)
    raises(lambda: call(q=q[0]), "q must be a dense tensor", "(1, 4, 16)")
    raises(lambda: call(k=None), "k must be", "NoneType")
    raises(lambda: call(k=k[:1]), "shapes do not fit", "(1, 32, 2, 16)")
    raises(lambda: call(v=k[:, :5]), "shapes do not fit", "(2, 5, 2, 16)")
    raises(lambda: call(q=q[:, :, :3]), "3 query heads", "2 key/value heads")
    raises(lambda: call(v=k.half()), "v is torch.float16", "q torch.float32", "cast")
    raises(lambda: call(q=q.int(), k=k.int()), "torch.int32 is not supported")
    raises(lambda: call(q=q.clone().requires_grad_()), "requires a gradient", "ring_attn")
    raises(lambda: call(backend="flash"), "backend='flash'")
    raises(lambda: call(sm_scale=-1.0), "sm_scale=-1.0")
    raises(lambda: call(causal="yes"), "causal='yes'")
    raises(lambda: call(window=0), "window=0")
    raises(lambda: call(window=[3]), "window=[3]")
    raises(lambda: call(sm_scale=[1.0]), "sm_scale=[1.0]")
    raises(lambda: call(n_splits=0), "n_splits=0")
    raises(lambda: call(sink=4), "sink=4", "window")
    raises(lambda: call(sink=-1, window=8), "sink=-1")
    raises(lambda: call(sink=torch.zeros(3, device=DEVICE)), "sink=((3,)", "(4,)")
    raises(lambda: call(cache_seqlens=ints(1, 2, 3)), "cache_seqlens", "(2,)")
    raises(lambda: call(cache_seqlens=ints(1, 2).long()), "cache_seqlens", "int32")
    raises(lambda: call(cache_seqlens=[1, 2]), "cache_seqlens list")
    raises(lambda: call(cache_seqlens=ints(33, 2), debug=True), "cache_seqlens[0]=33", "0..32")
    raises(lambda: call(cache_seqlens=ints(2, -1), debug=True), "cache_seqlens[1]=-1")
    raises(lambda: call(page_table=ints(1, 2)), "page_table", "(2, max_pages)")
    raises(lambda: call(aux=[q]), "aux must be a tuple")
    good = alibi_jit if backend == "triton" else alibi
    raises(lambda: call(score_mod=good, backend=backend), "score_mod takes 7 arguments and is given 5", "kv_idx")
    raises(lambda: call(mask_mod=good, aux=(q,), backend=backend), "mask_mod takes 7 arguments and is given 5", "aux[0]")
    if backend == "triton":
        raises(lambda: call(k=k.transpose(1, 3).contiguous().transpose(1, 3)), "strides", "last must be 1")
        raises(lambda: call(score_mod=softcap), "score_mod", "@triton.jit")
    raises(lambda: call(score_mod=softcap_jit, backend="torch"), "score_mod", "plain function")
    raises(lambda: call(score_mod=5), "score_mod=5")
    blocks = lambda *args, **kw: create_block_mask(causal_mask, *args, device=DEVICE, **kw)
    masked = lambda block_mask, **options: call(block_mask=block_mask, mask_mod=causal_jit if backend == "triton" else causal_mask, backend=backend, **options)
    raises(lambda: masked(blocks(None, None, 1, 64, BLOCK_SIZE=16)), "4 blocks of 16 keys", "32 tokens has 2")
    raises(lambda: masked(blocks(None, 3, 1, 32, BLOCK_SIZE=16)), "3 heads", "4 query heads")
    raises(lambda: masked(blocks(3, None, 1, 32, BLOCK_SIZE=16)), "3 sequences", "2 sequences")
    raises(lambda: masked(blocks(None, None, 64, 32, BLOCK_SIZE=16)), "(1, 1, 4)", "one row of blocks")
    raises(lambda: masked(blocks(None, None, 1, 32, BLOCK_SIZE=16), q=q.expand(2, 17, 4, 16)), "17 query tokens", "block of 16")
    raises(lambda: call(block_mask=blocks(None, None, 1, 32, BLOCK_SIZE=16)), "made from causal_mask", "mask_mod=")
    raises(lambda: call(block_mask=5), "block_mask is a int")
    raises(lambda: sharded_decode_attn(q, k, k, group=VirtualRing(2)), "VirtualRing", "decode_attn")
    raises(lambda: KVCache(1, 1, 0, 1, 1), "n_tokens=0")
    if not GPU:
        raises(lambda: call(q=q.bfloat16(), k=k.bfloat16(), backend="triton"), "interpreter")
    require(call().isfinite().all(), "the good call fails")


@as_users_run_it()
def check_stream(kind, n_ranks):
    """A model that decodes through its cache finds what it finds by running everything again; chunks of tokens too, until the cache is full."""
    group = RINGS[n_ranks]
    rank = ring_attn.resolve_ring(group).rank if n_ranks > 1 else 0
    torch.manual_seed(0)
    config = Config(n_layers=2, dim=64, dim_per_head=16, n_kv_heads=2, seq_len=64)
    whole = Transformer(config, attn_type=AttentionType.SDPA).to(DEVICE).eval()
    model = Transformer(config, rank, n_ranks, kind, group).to(DEVICE).eval()
    for p in whole.parameters():
        p.data *= 4  # so that the next token is not the last one again
    model.load_state_dict(whole.state_dict())
    tokens = torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows, cache = [], model.new_cache(2, 41)
    with torch.no_grad():
        expected = whole(tokens)
        got = [model.prefill(tokens[:, :19], cache)[:, None]]
        for first, last in ((19, 20), (20, 23), (23, 24), (24, 41)):
            got.append(model.step(tokens[:, first:last], cache))
    raises(lambda: model.step(tokens[:, :1], cache), "the cache is full", "41 tokens")
    require(cache.length == 41 and (cache.lengths == 41).all(), "the refused tokens were counted")
    rows.append(("logits", (torch.cat(got, 1) - expected[:, 18:]).abs().max().item(), 1e-4 * expected.abs().max().item()))
    for temperature in (0, 0.8):
        sampler = lambda: torch.Generator(DEVICE).manual_seed(3)
        text = model.generate(tokens[:, :7], 12, temperature, generator=sampler(), graph=GPU and n_ranks == 1)
        again = tokens[:, :7]
        with torch.no_grad():
            pick = sampler()
            for _ in range(12):  # the whole context for every token
                again = torch.cat((again, whole.sample(whole(again)[:, -1], temperature, None, pick)), 1)
        require(torch.equal(text, again), f"temperature {temperature}: {text.tolist()} and {again.tolist()}")
    raises(lambda: model.generate(tokens, 3, cache=model.new_cache(2, 42)), "the cache is full", "43 more")
    raises(lambda: model.generate(tokens, 3, temperature=-1), "temperature=-1")
    if n_ranks > 1:
        raises(lambda: Transformer(config, rank, n_ranks, AttentionType.ZIGZAG, group).to(DEVICE).generate(tokens, 1), "STRIPED")
    return worst(rows)


def check_sharded(backend, n_ranks, *args, **options):
    """Real ranks give the bits of virtual ones, the same on each; and all raise where one is wrong."""
    group, case = RINGS[n_ranks], decode_case(*args, **options)
    rank = ring_attn.resolve_ring(group).rank
    k, v = (stripe(x, rank, n_ranks) for x in (case.k, case.v))
    call = lambda **more: sharded_decode_attn(case.q, k, v, group=group, return_lse=True, **dict(for_backend(case.options, backend), cache_seqlens=case.lengths) | more)
    got, expected = call(), virtual_decode(case, n_ranks, **for_backend(case.options, backend))
    if n_ranks > 1:
        require(torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1]), "real and virtual ranks differ in bits")
        wrong = lambda a, b: a if rank == n_ranks - 1 else b
        raises(lambda: call(window=wrong(7, 8)), "ranks disagree", "window")
        raises(lambda: call(n_splits=wrong(0, 1)), f"rank {n_ranks - 1}: n_splits=0")
        raises(lambda: call(cache_seqlens=case.lengths + wrong(10**6, 0), debug=True), f"rank {n_ranks - 1}: cache_seqlens[0]=1000")
        require(torch.equal(call()[0], expected[0]), "it is broken after errors")
    return case.judge(*got)


for backend in ("torch", "triton"):
    for dtype, (M, H, HKV, D, lengths) in itertools.product((torch.float32, LOW_DECODE), (
        (1, 4, 4, 16, (33, 0, 1)), (1, 6, 2, 64, (200, 64, 5)), (2, 32, 1, 24, (70, 1, 2)), (4, 8, 2, 80, (130,)), (17, 5, 1, 128, (100, 9)), (1, 3, 1, 256, (65, 64)),
        (40, 4, 2, 33, (41, 90)), *(((1, 8, 2, 128, (5000, 17, 1024)), (3, 32, 4, 128, (4096, 4096)), (70, 8, 8, 96, (333, 64, 1))) if GPU else ()),
    )):  # fmt: skip
        local(f"decode {backend} M{M} {H}/{HKV} D{D} {lengths} {str(dtype)[6:]}", check_decode, backend, dtype, M, H, HKV, D, lengths)
    more = lambda name, *args, **options: local(f"decode {backend} {name}", functools.partial(check_decode, backend, *args, **options))
    more("full", LOW_DECODE, 5, 6, 2, 32, (90, 3, 0), causal=False)
    more("window", LOW_DECODE, 3, 6, 2, 32, (200, 39, 2), window=40)
    more("window of 1", LOW_DECODE, 1, 2, 1, 16, (200, 1), window=1)
    more("window and sink tokens", LOW_DECODE, 4, 6, 2, 32, (200, 45, 3), window=40, sink=5)
    more("window and many sink tokens", LOW_DECODE, 1, 2, 2, 16, (300, 100), window=20, sink=150)
    more("sink logits", LOW_DECODE, 2, 6, 2, 32, (100, 3, 0), sink=torch.linspace(-2, 3, 6, device=DEVICE))
    slopes = torch.tensor([0.25, 0.05], device=DEVICE)
    docs = torch.arange(4 * 256, device=DEVICE).view(4, 256) // 37
    more("alibi by key/value head", torch.float32, 3, 6, 2, 32, (200, 17, 0), score_mod=alibi, aux=(slopes, docs))
    more("softcap", LOW_DECODE, 1, 6, 2, 32, (200, 17), score_mod=softcap)
    more("documents", LOW_DECODE, 3, 6, 2, 32, (200, 37, 150), mask_mod=same_doc, aux=(slopes, docs))
    more("documents, alibi, window", torch.float32, 2, 6, 2, 32, (200, 37, 150), mask_mod=same_doc, score_mod=alibi, aux=(slopes, docs), window=90)
    for n_splits in (1, 2, 7, 64):
        more(f"n_splits={n_splits}", LOW_DECODE, 2, 6, 2, 32, (300, 20, 0), n_splits=n_splits)
    for n_ranks in (1, 2, 3, 8):
        local(f"decode {backend} striped over {n_ranks}", check_stripes, backend, n_ranks, LOW_DECODE, 3, 6, 2, 32, (203, 17, 1, 0))
    striped = functools.partial(check_stripes, backend, 3, torch.float32, 2, 6, 2, 32, (203, 150, 1), window=80, sink=4)
    local(f"decode {backend} striped over 3, window and sink tokens", striped)
    striped = functools.partial(check_stripes, backend, 3, torch.float32, 2, 6, 2, 32, (203, 150, 1), score_mod=alibi, mask_mod=same_doc, aux=(slopes, docs), sink=torch.ones(6, device=DEVICE))
    local(f"decode {backend} striped over 3, mods and sink logits", striped)
    for mask_mod, by_batch, by_head, size in ((causal_mask, True, False, 32), (causal_mask, True, False, 48), (causal_mask, True, True, 64), (dilated, True, True, 16)):
        kind = f"{mask_mod.__name__}{' by head' * by_head} blocks of {size}"
        local(f"decode {backend} block mask {kind}", check_block_mask, backend, mask_mod, by_batch, by_head, size, LOW_DECODE, 2, 6, 2, 32, (190, 64, 3), 200)
    local(f"decode {backend} block mask for all", check_block_mask, backend, causal_mask, False, False, 32, torch.float32, 3, 6, 2, 32, (150, 150), 160)
    local(f"decode {backend} reads named blocks only", check_skipped_blocks, backend)
    for page_size in (7, 16, 64):
        local(f"decode {backend} pages of {page_size}", check_pages, backend, page_size, LOW_DECODE)
    local(f"decode {backend} pages of 16, striped over 2", check_pages, backend, 16, torch.float32, 2)
    local(f"decode {backend} cache layouts amid nan", check_cache_layouts, backend)
    local(f"decode {backend} wild lengths and pages", check_wild_values, backend)
local("decode in a CUDA graph", check_decode_graph, gpu=True)
local("decode offsets beyond 2**31", check_decode_offsets, gpu=True)
local("errors of decode_attn", check_decode_errors)

# -----------------------------------------------------------------------------
# bad input


def check_errors():
    x = torch.randn(2, 8, 4, 16, device=DEVICE)
    attn, ring2 = ring_attn.ring_attn, VirtualRing(2)
    alone = dict(group=ALONE)
    raises(lambda: attn(x[0], x, x, **alone), "(8, 4, 16)", "(B, T, heads, D)")
    raises(lambda: attn(x, None, x, **alone), "NoneType")
    raises(lambda: attn(x.to_sparse(), x, x, **alone), "sparse", "to_dense")
    raises(lambda: attn(x, x, x, ["zigzag"], **alone), "['zigzag']")
    raises(lambda: attn(x, x, x, sm_scale=[1.0], **alone), "sm_scale=[1.0]")
    raises(lambda: attn(x, x, x, causal=torch.ones(2), **alone), "causal")
    raises(lambda: attn(x, x[:, :7], x[:, :7], **alone), "(2, 7, 4, 16)", "equal B, T and D")
    raises(lambda: attn(x, x, x[..., :8], **alone), "shapes do not fit")
    raises(lambda: attn(x[0, 0, 0, 0], x, x, **alone), "shape ()")
    raises(lambda: attn(x[:, :0], x[:, :0], x[:, :0], **alone), "dimension of 0")
    raises(lambda: attn(x, x[:, :, :3], x[:, :, :3], **alone), "4 query heads", "3 key/value heads")
    raises(lambda: attn(x, x.half(), x, **alone), "dtypes differ", "cast")
    raises(lambda: attn(x.int(), x.int(), x.int(), **alone), "torch.int32 is not supported")
    raises(lambda: attn(x, x.to("meta"), x, **alone), "devices differ")
    raises(lambda: attn(*[x.to("meta")] * 3, **alone), "meta", "cpu and cuda")
    raises(lambda: attn(x, x, x, "spiral", **alone), "spiral", "zigzag")
    raises(lambda: attn(x, x, x, sm_scale=-1.0, **alone), "sm_scale=-1.0")
    raises(lambda: attn(x, x, x, group="world"), "group", "'world'")
    raises(lambda: attn(x, x, x, backend="cuda", **alone), "backend='cuda'", "triton")
    raises(lambda: attn(*[torch.randn(1, 4, 1, 257, device=DEVICE)] * 3, backend="triton", **alone), "257", "256")
    raises(lambda: attn(x, x, x, group=VirtualRing(3)), "seq_len=8", "n_ranks=3")
    raises(lambda: attn(*[x[:, :6]] * 3, "zigzag", ring2), "seq_len=6 must be a multiple of 2*n_ranks=4", 'schedule="striped"')
    raises(lambda: attn(*[x[:1]] * 3, "step", ring2), "B=1 must be a multiple of 2", "zigzag")
    if GPU:
        raises(lambda: attn(*[x.cpu()] * 3, backend="triton", **alone), "CUDA tensors")
    else:
        raises(lambda: attn(*[x.bfloat16()] * 3, backend="triton", **alone), "interpreter", "float16")
    if HOPPER:
        raises(lambda: attn(*[x[..., :12].bfloat16()] * 3, backend="gluon", **alone), "12", "multiple of 8")
    else:
        raises(lambda: attn(*[x.half()] * 3, backend="gluon", **alone), "Hopper", 'backend="triton"')
    raises(lambda: attn(x, x, x, backend="gluon", **alone), "torch.float32", "float16")
    raises(lambda: ring_attn.flash_attn_func(x, x, x, x, True, 1.0), "bias", "None")
    raises(lambda: positions("zigzag", 2, 2, 8), "rank=2")
    raises(lambda: positions("spiral", 0, 2, 8), "spiral")
    raises(lambda: shard(x, "striped", 0, 3), "seq_len=8", "n_ranks=3")
    raises(lambda: shard(x[:1], "step", 0, 2), "B=1")
    raises(lambda: shard(x, "striped", 0, 0), "n_ranks=0")
    raises(lambda: VirtualRing(0), "n_ranks=0")
    raises(lambda: unshard(x, "striped", ring2), "VirtualRing")
    raises(lambda: unshard(x[0, 0, 0], "striped", ALONE), "(B, T, ...)")


def check_model_errors():
    make_attn = lambda dim=64, head=16, seq=96, rank=0, n=1, drop=0.0, kind=AttentionType.ZIGZAG, **kw: Attention(dim, head, seq, rank, n, drop, True, kind, **kw)
    raises(lambda: make_attn(dim=65), "dim=65", "dim_per_head=16")
    raises(lambda: make_attn(rank=2, n=2), "rank=2", "n_ranks=2")
    raises(lambda: make_attn(drop=1.0), "dropout=1.0")
    raises(lambda: make_attn(kind="zigzag"), "AttentionType")
    raises(lambda: make_attn(n_kv_heads=3), "n_heads=4", "n_kv_heads=3")
    raises(lambda: make_attn(head=1, rope_theta=1e4), "dim_per_head=1", "even")
    raises(lambda: make_attn(seq=97, n=2), "seq_len=97", "n_ranks=2")
    raises(lambda: make_attn(seq=98, n=2), "seq_len=98", "striped")
    raises(lambda: Transformer(Config(), 0, 2, AttentionType.ZIGZAG).generate(torch.zeros(1, 1, dtype=torch.int64), 1), "on 2 ranks", "STRIPED")


def check_errors_together():
    """One rank is wrong, all ranks raise, and the ring still works afterwards."""
    x = torch.randn(2, 8, 4, 16, device=DEVICE)
    wrong = WORLD - 1
    mine = lambda a, b: a if RANK == wrong else b
    attn = ring_attn.ring_attn
    raises(lambda: attn(*[mine(x[:, :6], x)] * 3), "ranks disagree", "(2, 6, 4, 16)", "(2, 8, 4, 16)")
    raises(lambda: attn(x, x, x, mine("striped", "zigzag")), "ranks disagree", "schedule='striped'", "schedule='zigzag'")
    raises(lambda: attn(x, x, x, causal=RANK == wrong), "ranks disagree", "causal")
    raises(lambda: attn(*[mine(x[:, :, :, :15], x).requires_grad_(RANK == wrong)] * 3), "ranks disagree", "backward")
    raises(lambda: attn(x, mine(x[:, :, :3], x), mine(x[:, :, :3], x)), f"rank {wrong}: 4 query heads")
    raises(lambda: attn(*[mine(x[:, :7], x)] * 3), f"rank {wrong}: seq_len={7 * WORLD}")
    raises(lambda: attn(*[x[:, :7]] * 3), f"seq_len={7 * WORLD} must be a multiple of 2*n_ranks={2 * WORLD}")
    raises(lambda: attn(*[x[:1]] * 3, "step"), "B=1 must be a multiple of 2")
    raises(lambda: attn(x, x, x, "spiral"), "spiral")
    raises(lambda: unshard(mine(x[:, :6], x), "zigzag"), "ranks disagree")
    raises(lambda: unshard(mine(x[0, 0, 0], x), "zigzag"), f"rank {wrong}: x is", "(B, T, ...)")
    raises(lambda: unshard(x.to("meta"), "zigzag"), "cannot move meta tensors")
    raises(lambda: attn(*[mine(x.to_sparse(), x)] * 3), f"rank {wrong}: q is torch.sparse_coo")
    raises(lambda: attn(x, x, x, mine(["zigzag"], "zigzag")), f"rank {wrong}: schedule=['zigzag']")
    if GPU:
        on_another = f"rank {wrong}: tensors are on cuda:0, but init_process_group was given device_id=cuda:{wrong}"
        raises(lambda: attn(*[x.to("cuda:0")] * 3), on_another)
        raises(lambda: unshard(x.to("cuda:0"), "zigzag"), on_another)
    good = (WORLD, RANK, (RANK - 1) % WORLD, (RANK + 1) % WORLD)
    raises(lambda: ring_attn.zigzag_attn_func(x, x, x, *mine((WORLD, RANK, 0, WORLD), good), None, True, 1.0), "in this process group they are")
    raises(lambda: ring_attn.ring_attn_func(x, x, x, WORLD + 1, *good[1:], None, True, 1.0), f"n_ranks, rank, prev_rank, next_rank are ({WORLD + 1}")
    raises(lambda: ring_attn.step_attn_func(x, x, x, *good, mine(x, None), True, 1.0), f"rank {wrong}: bias")
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")  # the operator's own checks
    raises(lambda: compiled(*[mine(x[:, :6], x)] * 3), "ranks disagree", "(2, 6, 4, 16)", "(2, 8, 4, 16)")
    raises(lambda: compiled(*[mine(x[:, :7], x)] * 3), f"rank {wrong}: seq_len={7 * WORLD}")
    o = ring_attn.ring_attn_func(x, x, x, *good, None, True, 1.0)
    require(o.isfinite().all() and o.shape == x.shape, "the ring is broken after errors")


local("errors of ring_attn", check_errors)
local("errors of the model", check_model_errors)
real("errors on one rank raise on all", check_errors_together, ranks=2)

# -----------------------------------------------------------------------------
# real processes


def check_real(schedule, causal, n_ranks, backend, dtype, B, T, H, HKV, D):
    """A real ring against the truth, and against a virtual ring, whose bits must be the same."""
    group = RINGS[n_ranks]
    q, k, v, do = whole = make(B, n_ranks * T, H, HKV, D, dtype, seed=T)
    rank = ring_attn.resolve_ring(group).rank
    got = run(*(shard(x, schedule, rank, n_ranks) for x in whole), schedule, group, causal, backend)
    flat = lambda x: x if x.ndim == 4 else x.transpose(1, 2)
    joined = [flat(unshard(flat(x), schedule, group)) for x in got]
    virtual = run(*whole, schedule, VirtualRing(n_ranks), causal, backend)
    require(all(torch.equal(a, b) for a, b in zip(joined, virtual)), "real and virtual ring differ in bits")
    return judge(joined, *whole, causal)


def check_transports(schedule, n_ranks, causal):
    """Both transports give the same bits, forward and backward, and so does a forward that is run again (activation checkpointing)."""
    group, T = RINGS[n_ranks], 1000
    for dtype, H, HKV, D in ((torch.bfloat16, 6, 2, 64), (torch.float32, 2, 2, 40)):
        q, k, v, do = make(2, T, H, HKV, D, dtype, seed=RANK)
        p2p, symmetric = (run(q, k, v, do, schedule, ring_attn.resolve_ring(group, transport), causal) for transport in ("p2p", "symmetric"))
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attn = lambda q, k, v: ring_attn.ring_attn(q, k, v, schedule, group, causal, transport="symmetric")
        o = checkpoint(attn, *leaves, use_reentrant=False)
        again = o.detach(), *torch.autograd.grad(o, leaves, do)
        for what, a, b in zip(("o", "lse", "dq", "dk", "dv"), p2p, symmetric):
            require(torch.equal(a, b), f"{what} differs between transports")
        for what, a, b in zip(("o", "dq", "dk", "dv"), again, (symmetric[0], *symmetric[2:])):
            require(torch.equal(a, b), f"{what} differs under checkpoint")
    names = [ring_attn.resolve_ring(group, transport).transport for transport in ("p2p", "symmetric")]
    require(names == ["p2p", "symmetric"], f"asked for one of each, got {names}")


def check_other_device(schedule, n_ranks):
    """Tensors on this rank's GPU while another one is the current device, on a ring that has to make its memory then."""
    group, other = RINGS[n_ranks], torch.device("cuda", (DEVICE.index + 1) % torch.cuda.device_count())
    q, k, v, do = make(1, 4096, 4, 4, 128, torch.bfloat16, seed=RANK)  # larger than what other cases have made room for
    with torch.cuda.device(other):
        there = run(q, k, v, do, schedule, group)
    for what, a, b in zip(("o", "lse", "dq", "dk", "dv"), there, run(q, k, v, do, schedule, group)):
        require(torch.equal(a, b), f"{what} differs")


def check_reuse(kind, n_ranks, times=1000):
    """Symmetric memory, one call after another: other inputs, schedules and masks, on two streams that nobody orders, kernels and copies
    held up at random; every result checked."""
    ring, same, mine = ring_attn.resolve_ring(RINGS[n_ranks], "symmetric"), random.Random(0), random.Random(RANK)
    inputs = [make(2, 256, 4, 2, 64, torch.bfloat16, seed=100 * RANK + i) for i in range(4)]
    kinds = list(itertools.product(range(4), SCHEDULES, (True, False)))
    truth = {x: run(*inputs[x[0]], x[1], ring_attn.resolve_ring(RINGS[n_ranks], "p2p"), x[2]) for x in kinds}
    run(*inputs[0], "zigzag", ring)
    torch.utils.deterministic.fill_uninitialized_memory = False
    streams, wrong = [torch.cuda.Stream(), torch.cuda.Stream()], torch.zeros(2, device=DEVICE)
    torch.cuda.synchronize()
    try:
        for _ in range(times):
            x, i = same.choice(kinds), same.randrange(2)
            for stream in (streams[i], ring.memory.lane.stream):
                if mine.random() < 0.3:
                    with torch.cuda.stream(stream):
                        torch.cuda._sleep(mine.randrange(300_000))
            with torch.cuda.stream(streams[i]):
                for a, b in zip(run(*inputs[x[0]], x[1], ring, x[2]), truth[x]):
                    wrong[i] += (a != b).any()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.synchronize()
    require(not wrong.any(), f"{wrong.sum():.0f} of {5 * times} results are wrong")
    require(not ring.memory.local[:4096].any(), "a flag is left set")


def check_ring_graph(kind, n_ranks):
    """Forward and backward of a ring over symmetric memory as a CUDA graph, replayed on other inputs, with eager calls in between."""
    ring = ring_attn.resolve_ring(RINGS[n_ranks], "symmetric")
    inputs = [make(2, 256, 4, 2, 64, torch.bfloat16, seed=100 * RANK + i) for i in range(3)]
    static = [x.clone() for x in inputs[0]]
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        truth = [run(*x, "zigzag", ring) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = run(*static, "zigzag", ring)
        for i in (0, 1, 2, 1) * 5:
            for x, new in zip(static, inputs[i]):
                x.copy_(new)
            graph.replay()
            eager = run(*inputs[i], "zigzag", ring)
            graph.replay()
            require(all(torch.equal(a, b) for a, b in zip(results, truth[i])), "a replay differs from eager")
            require(all(torch.equal(a, b) for a, b in zip(eager, truth[i])), "eager calls differ between replays")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def check_launches_on_ring(schedule, n_ranks):
    """Forward: one kernel for each hop that has something to do, and none beside. Backward: two for each, and one for the rows."""
    from torch.profiler import ProfilerActivity, profile

    ring = ring_attn.resolve_ring(RINGS[n_ranks], None if n_ranks == 1 else "symmetric")
    q, k, v, do = make(2, 512, 4, 2, 128, torch.bfloat16, seed=RANK)
    leaves, hops = [x.requires_grad_() for x in (q, k, v)], plan(schedule, ring.rank, n_ranks, 512, True, 1)
    visible = sum(hop.visible for hop in hops)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        for calls, kernels in ((lambda: ring_attn.ring_attn(q.detach(), k.detach(), v.detach(), schedule, ring), visible),
                               (lambda: torch.autograd.grad(ring_attn.ring_attn(*leaves, schedule, ring), leaves, do), 3 * visible + 1)):  # fmt: skip
            calls(), torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
                calls(), torch.cuda.synchronize()
            names = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Mem")]
            require(len(names) == kernels, f"{len(names)} kernels, not {kernels}: {names}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def check_choice():
    """Which transport a machine gets, and why; a transport that cannot be had."""
    gpu = lambda i, host="a", reads=True, lacks=None: dict(lacks=lacks, host=host, gpu=f"gpu{i}", reads={f"gpu{j}": reads for j in range(4) if j != i})
    choose = ring_attn.choose_transport
    require(choose([gpu(0), gpu(1)])[0] == "symmetric", "two GPUs that read each other")
    require(choose([dict(gpu(0), reads={}), dict(gpu(1), reads={})])[0] == "symmetric", "GPUs that are hidden from each other's processes")
    for facts, why in (
        ([gpu(0), gpu(0, host="b")], "2 hosts"),
        ([gpu(0), gpu(0)], "share a GPU"),
        ([gpu(0), gpu(1, reads=False)], "GPU of rank 1 cannot read that of rank 0"),
        ([gpu(0), gpu(1, lacks="no driver")], "no driver"),
        ([ring_attn.transport_facts(torch.device("cpu"))] * 2, "CPU"),
    ):
        require(choose(facts)[0] == "p2p" and why in choose(facts)[1], f"{choose(facts)}, not p2p because of {why}")
    q = torch.randn(1, 8, 2, 16)
    raises(lambda: ring_attn.ring_attn(q, q, q, group=ALONE, transport="carrier pigeon"), "carrier pigeon", "p2p", "symmetric")
    raises(lambda: ring_attn.keys_moved("zigzag", 4, 512, transport="carrier pigeon"), "carrier pigeon", "p2p", "symmetric")
    raises(lambda: ring_attn.ring_attn(q, q, q, group=VirtualRing(2), transport="p2p"), "p2p", "VirtualRing", "leave it out")
    if WORLD > 1 and not GPU:
        group = RINGS[WORLD]
        raises(lambda: ring_attn.ring_attn(q, q, q, "striped", group, transport="symmetric", backend="torch"), "symmetric", "CPU", "p2p")
        ring_attn.ring_attn(q, q, q, "striped", group, backend="torch")
        require(ring_attn.resolve_ring(group).transport == "p2p" and "CPU" in ring_attn.resolve_ring(group).why, "it does not say why it is p2p")
        q = torch.randn(1, 12, 2, 16)  # a shape of which nothing was agreed yet
        raises(lambda: ring_attn.ring_attn(q, q, q, "striped", group, transport="p2p" if RANK else None, backend="torch"), "disagree", "transport")


def check_watch():
    """ring_attn.Watchdog, with a number where a GPU would write what it waits for: quiet while that changes, an end with a reason when it does not."""
    watch, ended, said = ring_attn.Watchdog.__new__(ring_attn.Watchdog), threading.Event(), io.StringIO()
    threading.Thread.__init__(watch, daemon=True)
    ring = ring_attn.Ring()
    watch.ring, watch.stories, watch.number, watch.timeout = ring, [None, ("keys", 1, 3)], ctypes.c_int32(0), 1.0

    def leave(code):
        ended.set()
        raise SystemExit(code)

    leave_for_good, os._exit = os._exit, leave
    try:
        with contextlib.redirect_stderr(said):
            watch.start()
            for _ in range(25):  # waits, each of them answered
                watch.number.value = 1
                time.sleep(0.02)
                watch.number.value = 0
                time.sleep(0.06)
            require(not ended.is_set(), "it ends a process whose waits are answered")
            watch.number.value = 1
            require(ended.wait(10), "it lets a process wait for ever")
    finally:
        os._exit = leave_for_good
    require("hop 1 of" in said.getvalue() and "for keys from rank 3" in said.getvalue(), f"it says {said.getvalue()!r}")


LOST_RANK = """
import os, sys, time, torch, torch.distributed as dist, ring_attn
from datetime import timedelta
rank, how, transport, where = int(sys.argv[1]), *sys.argv[2:]
gpu = torch.cuda.is_available()
device = torch.device("cuda", rank) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{where}", rank=rank, world_size=2, timeout=timedelta(seconds=6))
x = torch.randn(1, 64, 2, 16, device=device, dtype=torch.float16 if gpu else torch.float32).requires_grad_()
attn = lambda: ring_attn.ring_attn(x, x, x, "zigzag", transport=transport or None)
attn().sum().backward()
o = attn()
if rank == 1:
    time.sleep(0.5)
    os._exit(0) if how == "dies" else time.sleep(100)
o.sum().backward()
print("gradients without rank 1", x.grad.sum().item())
"""


def check_lost_rank(how, transport):
    """Rank 1 dies, or does not call the backward: rank 0 must end by itself, in time, and say which ring, hop and rank."""
    if RANK > 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET")} | {"PYTHONUNBUFFERED": "1"}
        command = lambda rank: [sys.executable, "-c", LOST_RANK, str(rank), how, transport, f"{folder}/store"]
        home = Path(ring_attn.__file__).parent
        other = subprocess.Popen(command(1), cwd=home, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            done = subprocess.run(command(0), cwd=home, env=env, capture_output=True, text=True, timeout=90)
        finally:
            other.kill(), other.wait()
    said = done.stdout + done.stderr
    require(done.returncode not in (0, None) and "without rank 1" not in said, f"it went on: {said[-500:]}")
    for words in ("processes [0, 1]", "at hop 1 of 1", "from rank 1"):
        require(words in said, f"it does not say {words!r}: {said[-1500:]}")


def check_unshard(schedule):
    x = torch.randn(2, WORLD * 6, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    y = unshard(shard(x, schedule, RANK, WORLD), schedule)
    require(torch.equal(x, y), "unshard(shard(x)) != x")
    (grad,) = torch.autograd.grad((y * x.detach()).sum(), x)
    if WORLD > 1:
        dist.all_reduce(grad)
    require(torch.equal(grad, x.detach()), "the ranks' gradients do not add up to the whole")


def check_attention(kind, n_ranks):
    """Attention under every type: outputs and gradients of the same weights as under SDPA on one process."""
    group = RINGS[n_ranks]
    rank = ring_attn.resolve_ring(group).rank
    torch.manual_seed(0)
    attn = Attention(64, 16, 24 * n_ranks, rank, n_ranks, 0.0, True, AttentionType.SDPA, n_kv_heads=2, rope_theta=1e4, group=group).to(DEVICE)
    x, dy = torch.randn(2, 2, 24 * n_ranks, 64, device=DEVICE).unbind()
    results = []
    for attn.attn_type in (AttentionType.SDPA, kind):
        leaf = x.clone().requires_grad_()
        y = attn.unshard(attn(attn.shard(leaf)))
        grads = torch.autograd.grad(y, (leaf, attn.qkv_proj.weight, attn.o_proj.weight), dy)
        if attn.attn_type.is_ring and n_ranks > 1:
            [dist.all_reduce(g, group=group) for g in grads]
        results.append((y, *grads))
    return worst([(what, (a - b).abs().max().item(), 1e-4) for what, a, b in zip(("y", "dx", "dqkv", "do_proj"), *results)])


def check_compiled_model(kind, n_ranks, autocast):
    """A compiled Transformer, in one graph, equals the eager one: loss and gradients."""
    group = RINGS[n_ranks]
    rank = ring_attn.resolve_ring(group).rank
    torch.manual_seed(0)
    model = Transformer(Config(n_layers=2, dim=32, dim_per_head=16, n_kv_heads=1, seq_len=16 * n_ranks), rank, n_ranks, kind, group).to(DEVICE)
    whole = torch.randint(256, (2, 2, 16 * n_ranks), device=DEVICE)
    tokens, targets = (model.blocks[0].attn.shard(x) for x in whole)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    results = []
    for f in (model, compiled, compiled):
        with torch.autocast(DEVICE.type, torch.float16 if ring_attn.INTERPRET else torch.bfloat16, enabled=autocast):
            loss = f(tokens, targets)
        results.append([loss, *torch.autograd.grad(loss, model.parameters())])
    error = lambda a, b: (a - b).abs().max().item() / max(1e-3, b.abs().max().item())
    rows = [(what, error(a, b), 5e-2 if autocast else 1e-4) for what, a, b in zip(["loss"] + ["grad"] * 99, results[-1], results[0])]
    return worst(rows)


def tiny_run(folder, *flags):
    base = f"--out={folder} --steps=20 --seq_len=128 --batch_size=4 --n_layers=2 --dim=64 --dim_per_head=16 --n_kv_heads=2 --warmup=4 --lr=3e-3".split()
    return train.parse([*base, "--dtype=float32", "--sample_tokens=0", "--eval_batches=2", "--log_every=20", *flags])


def quietly_train(args, group):
    """train.train without its output."""
    with as_users_run_it(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        return train.train(args, group)


def shared_folder(group):
    """One temporary folder for the processes of a group, with a file `text` in it; its first rank removes it."""
    ring = ring_attn.resolve_ring(group)
    folder = [tempfile.mkdtemp() if ring.rank == 0 else None]
    if ring.rank == 0:
        words = ["".join(letters) for letters in itertools.product("abcde", "rstuv", "xyz")]
        Path(folder[0], "text").write_text(" ".join(random.Random(0).choices(words, k=8000)))
    if ring.n_ranks > 1:
        dist.broadcast_object_list(folder, src=dist.get_global_rank(group, 0), group=group)
    return Path(folder[0])


def check_train(schedule, n_ranks):
    """20 steps on a ring equal 20 steps under SDPA on one process, and 20 over p2p where that is not what it takes; 10 + 10
    resumed ones equal 20, to the last bit."""
    group = RINGS[n_ranks]
    folder, own = shared_folder(group), Path(tempfile.mkdtemp())
    try:
        text = folder / "text"
        expected, expected_val = quietly_train(tiny_run(own / "sdpa", "--schedule=sdpa", f"--data={text}"), ALONE)
        losses, val = quietly_train(tiny_run(folder / "ring", f"--schedule={schedule}", f"--data={text}"), group)
        quietly_train(tiny_run(folder / "parts", f"--schedule={schedule}", f"--data={text}", "--stop_after=10"), group)
        tail, _ = quietly_train(train.parse([f"--out={folder / 'parts'}", "--resume"]), group)  # with the flags it was started with
        over_p2p, _ = quietly_train(tiny_run(folder / "p2p", f"--schedule={schedule}", f"--data={text}", "--transport=p2p"), group) if GPU else (losses, val)
        if not GPU:  # the embedding's gradient on CUDA adds in any order
            require(tail == losses[10:], f"resumed losses differ: {tail} and {losses[10:]}")
        require(len(losses) == 20 and losses[-1] < losses[0] - 0.5, f"it does not learn: {losses}")
    finally:
        shutil.rmtree(own)
        if ring_attn.resolve_ring(group).rank == 0:
            shutil.rmtree(folder)
    apart = lambda a, b: max(abs(x - y) for x, y in zip(a, b))
    return worst([("loss", apart(losses, expected), 1e-4), ("p2p", apart(over_p2p, expected), 1e-4), ("val", abs(val - expected_val), 1e-4)])


def in_both(folder, f):
    """f(folder) by all processes, in one folder that is removed afterwards."""
    try:
        return f(folder)
    finally:
        if WORLD > 1:
            dist.barrier()
        if RANK == 0:
            shutil.rmtree(folder)


def check_meshes():
    """Whatever the split into rings, micro batches and shards: the losses of one process. A sharded run resumes to the bit, and on one process."""

    def check(folder):
        data, own = f"--data={folder / 'text'}", folder / f"alone{RANK}"
        alone, alone_val = quietly_train(tiny_run(own, data, "--batch_size=8"), ALONE)
        splits = {f"{WORLD // R}x{R}": [f"--ring_size={R}"] for R in (1, 2, 4, 8) if WORLD % R == 0}
        splits["step"] = ["--schedule=step", f"--ring_size={max(math.gcd(WORLD, 2), WORLD // 2)}", "--accumulate=2"]  # step wants two sequences in each ring
        memory = [f"--ring_size={math.gcd(WORLD, 2)}", "--fsdp", "--checkpoint", "--accumulate=2"]
        splits["fsdp"] = memory
        rows = []
        for name, flags in splits.items():
            losses, val = quietly_train(tiny_run(folder / name, data, "--batch_size=8", *flags), None)
            rows += [(name, max(abs(a - b) for a, b in zip(losses, alone, strict=True)), 1e-4), (name, abs(val - alone_val), 1e-4)]
        quietly_train(tiny_run(folder / "parts", data, "--batch_size=8", *memory, "--stop_after=10"), None)
        shutil.copytree(folder / "parts", own / "parts")
        if WORLD > 1:
            dist.barrier()
        tail, _ = quietly_train(train.parse([f"--out={folder / 'parts'}", "--resume"]), None)
        if not GPU:
            require(tail == losses[10:], f"resumed losses differ: {tail} and {losses[10:]}")
            a, b = (read_state(folder / name) for name in ("parts", "fsdp"))
            require(all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True)), "resumed weights or moments differ")
        tail, _ = quietly_train(train.parse([f"--out={own / 'parts'}", "--resume"]), ALONE)
        return worst([*rows, ("alone", max(abs(a - b) for a, b in zip(tail, alone[10:], strict=True)), 1e-4)])

    return in_both(shared_folder(RINGS[WORLD]), check)


def read_state(folder):
    return torch.load(train.checkpoints(folder)[0], weights_only=True)


def tensors_of(state):
    """Weights and moments of a checkpoint, in order."""
    moments = [x for _, values in sorted(state["optimizer"]["state"].items()) for x in values.values()]
    return [x for x in [*state["model"].values(), *moments] if isinstance(x, torch.Tensor)]


def check_train_memory():
    """Activation checkpointing and losses in pieces: the same gradients to the bit, and not one exchange more."""
    ring = ring_attn.resolve_ring(RINGS[WORLD])
    torch.manual_seed(0)
    model = Transformer(Config(n_layers=2, dim=32, dim_per_head=16, n_kv_heads=1, seq_len=32 * WORLD), ring.rank, ring.n_ranks, AttentionType.ZIGZAG, ring).to(DEVICE)
    tokens, targets = torch.randint(256, (2, 2, 32), device=DEVICE)
    results, exchange, counts, most = [], ring.exchange, [], []

    def counted(*args):
        counts[-1] += 1
        return exchange(*args)

    def logits_counted(x, targets):
        most[-1] = max(most[-1], len(targets))
        return Transformer.token_losses(model, x, targets)

    with as_users_run_it():
        model(tokens, targets)  # what ranks agree upon the first time is not counted
        ring.exchange, model.token_losses = counted, logits_counted
        try:
            for saving, logits in ((False, 2**22), (True, 2**22), (True, 10 * 256)):
                counts.append(0), most.append(0)
                model_logits, sys.modules["model"].LOGITS = sys.modules["model"].LOGITS, logits
                for block in model.blocks:
                    block.checkpoint = saving
                loss = model(tokens, targets)
                results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
                sys.modules["model"].LOGITS = model_logits
        finally:
            ring.exchange = exchange
    require(counts[0] == counts[1] == counts[2], f"exchanges: {counts}")
    require(most == [64, 64, 10], f"tokens whose logits exist at once: {most}")
    if not GPU:
        require(all(torch.equal(a, b) for a, b in zip(results[0], results[1])), "checkpointing changes gradients")
    return worst([("grad", (a - b).abs().max().item(), 1e-5) for a, b in zip(results[0], results[2])])


def check_run_folder():
    """The newest whole checkpoint is taken, what is wrong with others is said; --keep; a full disk; the record of numbers."""

    def check(folder):
        group, out, data = RINGS[WORLD], folder / "run", f"--data={folder / 'text'}"
        whole, _ = quietly_train(tiny_run(folder / "whole", data, "--log_every=4"), group)
        quietly_train(tiny_run(out, data, "--save_every=4", "--keep=3", "--stop_after=14", "--log_every=4"), group)
        require([f.name for f in train.checkpoints(out)] == [f"ckpt-{n:08}.pt" for n in (14, 12, 8)], f"kept {train.checkpoints(out)}")
        if WORLD > 1:
            dist.barrier()  # all have looked
        if RANK == 0:
            last = out / "ckpt-00000014.pt"
            last.write_bytes(last.read_bytes()[:-100])
            (out / "ckpt-00000016.pt").write_text("a letter")
            (out / "ckpt.tmp").write_text("of a run that was killed")
        if WORLD > 1:
            dist.barrier()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))  # as a disk that is full from there on
        try:
            refused = lambda: quietly_train(train.parse([f"--out={out}", "--resume", "--stop_after=13"]), group)
            raises(refused, "cannot write", "ckpt-00000013.pt: [Errno 27] File too large", "MiB are free", "ckpt-00000012.pt is whole")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        tail, _ = quietly_train(train.parse([f"--out={out}", "--resume"]), group)
        if not GPU:
            require(tail == whole[12:], f"resumed losses differ: {tail} and {whole[12:]}")
        if RANK == 0:
            said = (out / "log.txt").read_text()
            opening = f"==== train.py\n{Path(train.__file__).read_text()}==== model.py\n"
            require(said.startswith(opening) and said.count(opening) == 1, "log.txt does not open with the source, once")
            for words in ("ckpt-00000014.pt is not a checkpoint of train.py, or not a whole one", "ckpt-00000016.pt is not", "resumed at step 12", "commit ", "train.py ", "loss by position"):
                require(words in said, f"log.txt does not say {words!r}")
            tables = [[line.split(",") for line in (f / "metrics.csv").read_text().splitlines()] for f in (folder / "whole", out)]
            steps = [[row[0] for row in table if row[1]] for table in tables]
            require(steps == [["step", "1", "4", "8", "12", "16", "20"], ["step", "1", "4", "8", "12", "13", "16", "20"]], f"metrics.csv: {steps}")
            require(GPU or tables[0][-2][:2] == tables[1][-2][:2] == ["20", repr(whole[-1])], "metrics.csv differs")

    return in_both(shared_folder(RINGS[WORLD]), check)


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def check_train_stops():
    """A signal to one rank: all save the same step and return. Something not finite on one rank: all raise, the last checkpoint stays."""

    def check(folder):
        group, data = RINGS[WORLD], f"--data={folder / 'text'}"
        whole, _ = quietly_train(tiny_run(folder / "whole", data), group)
        for number in (signal.SIGTERM, signal.SIGINT):
            out = folder / number.name

            def rate(step, args):
                if step == 6 and RANK == WORLD - 1:
                    os.kill(os.getpid(), number)
                return before(step, args)

            with replaced(train, "learning_rate", rate) as before:
                losses, _ = quietly_train(tiny_run(out, data), group)
            # on a GPU the host reads what a step reported when the next one is on its way
            require(len(losses) == 7 + GPU and len(train.checkpoints(out)) == 1, f"{number.name}: it went on to step {len(losses)}")
            require(signal.getsignal(number) is not signal.SIG_DFL or number == signal.SIGTERM, "the handler of before is not back")
            tail, _ = quietly_train(tiny_run(out, "--resume"), group)
            require(GPU or losses + tail == whole, f"{number.name}: {losses + tail} and {whole}")
        bad, out = WORLD - 1, folder / "nan"
        forward, steps = Transformer.forward, itertools.count()

        def broken(self, tokens, *args, **options):  # the 7th call of a training step
            loss = forward(self, tokens, *args, **options)
            return loss * (math.nan if self.training and next(steps) == 6 and RANK == bad else 1.0)

        with replaced(Transformer, "forward", broken):
            raises(lambda: quietly_train(tiny_run(out, data, "--save_every=3"), group), "step 7", f"loss of rank {bad}", "begin at bytes [", "text", "ckpt-00000006.pt is the last good")
        require(len(read_state(out)["model"]) > 0 and all(x.isfinite().all() for x in tensors_of(read_state(out))), "the last checkpoint is not finite")
        raises(lambda: quietly_train(tiny_run(folder / "inf", data, "--lr=1e30", "--warmup=0"), group), "is not finite", "no checkpoint")

    return in_both(shared_folder(RINGS[WORLD]), check)


def alone_env():
    mine = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if not k.startswith(mine)}


def worker_of(launcher, rank):
    """The process id of a rank below torchrun; None while it is not there."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)


def small_run(folder, *flags):
    """Flags of a run of 30 steps that a script takes some seconds for."""
    base = f"--data={folder / 'text'} --device=cpu --steps=30 --seq_len=128 --batch_size=4 --n_layers=2 --dim=64 --dim_per_head=16 --n_kv_heads=2".split()
    return [*base, *"--warmup=4 --lr=3e-3 --dtype=float32 --sample_tokens=0 --eval_batches=1 --log_every=1 --save_every=4 --dropout=0.1".split(), *flags]


def done_steps(out):
    """The steps that log.txt tells of, over all starts of a run."""
    return [int(x) for x in re.findall(r"^step (\d+)/\d+ \| loss", (out / "log.txt").read_text(), re.M)] if (out / "log.txt").exists() else []


def same_end(out, quiet, story=""):
    """Two runs must have ended with the same losses, weights and moments, bit for bit."""
    a, b = ([line.split(",")[:3] for line in (folder / "metrics.csv").read_text().splitlines()[-2:]] for folder in (out, quiet))
    require(a == b, f"{story} it ends with {a}, undisturbed with {b}")
    require(all(torch.equal(x, y) for x, y in zip(tensors_of(read_state(out)), tensors_of(read_state(quiet)), strict=True)), f"{story} weights differ")


def check_kills(n_kills, n_ranks=2, flags=(), seed=0):
    """kill -9 of random ranks at random steps, up to three a run: torchrun starts them again, and every run ends with the undisturbed
    losses and weights, bit for bit."""
    rng, folder = random.Random(seed), shared_folder(ALONE)
    start = lambda out: subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n_ranks}", "--max-restarts=3", "--standalone",
         str(Path(__file__).with_name("train.py")), f"--out={out}", *small_run(folder, *flags)],
        env=alone_env() | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=open(f"{out}.stderr", "w"),
    )  # fmt: skip
    try:
        quiet = folder / "quiet"
        require(start(quiet).wait(180) == 0, Path(f"{quiet}.stderr").read_text()[-2000:])
        killed = []
        while len(killed) < n_kills:
            out = folder / f"run{len(killed)}"
            process = start(out)
            try:
                for _ in range(min(3, n_kills - len(killed))):
                    n_seen = len(done_steps(out))
                    rank, after = rng.randrange(n_ranks), rng.randrange(1, 15)  # steps of this start that are to be seen first
                    limit = time.monotonic() + 180
                    while len(done_steps(out)) - n_seen < after and process.poll() is None and time.monotonic() < limit:
                        time.sleep(0.005)
                    time.sleep(rng.random() * 0.05)  # anywhere in a step, or in a checkpoint
                    pid = worker_of(process.pid, rank) if process.poll() is None else None
                    if pid is None or done_steps(out)[-1] == 30:
                        break  # it had ended
                    killed.append((out.name, rank, done_steps(out)[-1]))
                    os.kill(pid, signal.SIGKILL)
                require(process.wait(120) == 0, f"{killed}: {Path(f'{out}.stderr').read_text()[-3000:]}")
            finally:
                process.kill(), process.wait()
            same_end(out, quiet, f"after {killed}")
            shutil.rmtree(out)
        return killed
    finally:
        shutil.rmtree(folder)


def no_hosts():
    """Why this machine cannot play two hosts; None if it can."""
    name = f"ring{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
        return None if made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0 else "may not make network namespaces"
    except OSError:
        return "needs ip, of iproute2"


def check_two_hosts():
    """Two hosts, in two network namespaces, one process each. Their link is cut: both end with an error, in time. Then they resume."""
    folder, tag = shared_folder(ALONE), os.getpid()
    names, links, ip = [f"ring{tag}{x}" for x in "ab"], [f"v{tag}{x}" for x in "ab"], lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
    inside = lambda i, *words: ip("netns", "exec", names[i], "ip", *words)

    def start(i, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=10.77.0.1", "--master_port=29577"]
        command += [str(Path(__file__).with_name("train.py")), f"--out={folder / 'run'}", "--timeout=15", *flags]
        env = alone_env() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": links[i], "TP_SOCKET_IFNAME": links[i]}
        return subprocess.Popen(["ip", "netns", "exec", names[i], *command], env=env, stdout=subprocess.DEVNULL, stderr=open(folder / f"stderr{i}", "w"))

    hosts = []
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for i in (0, 1):
            inside(i, "addr", "add", f"10.77.0.{i + 1}/24", "dev", links[i])
            inside(i, "link", "set", links[i], "up"), inside(i, "link", "set", "lo", "up")
        hosts = [start(i, *small_run(folder)) for i in (0, 1)]
        limit = time.monotonic() + 120
        while len(done_steps(folder / "run")) < 9 and time.monotonic() < limit and all(h.poll() is None for h in hosts):
            time.sleep(0.01)
        inside(1, "link", "set", links[1], "down")
        began = time.monotonic()
        codes = [h.wait(90) for h in hosts]
        took, said = time.monotonic() - began, [(folder / f"stderr{i}").read_text() for i in (0, 1)]
        require(all(codes) and took < 60, f"exit codes {codes} after {took:.0f} s: {said[0][-1500:]} {said[1][-1500:]}")
        require(9 <= done_steps(folder / "run")[-1] < 30, f"the link was cut after step {done_steps(folder / 'run')}")
        inside(1, "link", "set", links[1], "up")
        hosts = [start(i, "--resume") for i in (0, 1)]
        codes = [h.wait(120) for h in hosts]
        require(codes == [0, 0], f"exit codes {codes}: {(folder / 'stderr0').read_text()[-1500:]}")
        done = call_script("train.py", f"--out={folder / 'quiet'}", *small_run(folder), n_ranks=2)
        require(done.returncode == 0, done.stderr[-1500:])
        same_end(folder / "run", folder / "quiet")
    finally:
        for host in hosts:
            host.kill(), host.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(folder)


def check_train_errors():
    group = RINGS.get(WORLD)
    folder = shared_folder(group)
    text, short, empty, blank = folder / "text", folder / "short", folder / "empty", folder / "blank"
    run_ = lambda out, *flags: quietly_train(tiny_run(folder / out, *flags), group)
    try:
        if RANK == 0:
            short.write_bytes(b"x" * 100), empty.write_bytes(b""), blank.mkdir()
        if WORLD > 1:
            dist.barrier()
        data = f"--data={text}"
        raises(lambda: run_("a", f"--data={folder / 'missing'}"), "missing", "does not exist")
        raises(lambda: run_("a", f"--data={empty}"), "is empty")
        raises(lambda: run_("a", f"--data={blank}"), "holds no files")
        raises(lambda: run_("a", f"--data={short}"), "100 bytes", "129")
        raises(lambda: run_("a", data, "--resume"), "no checkpoint in", "/a;")
        raises(lambda: run_("a", data, "--steps=0"), "--steps=0")
        raises(lambda: run_("a", data, "--seed=-1"), "--seed=-1")
        raises(lambda: run_("a", data, "--lr=nan"), "--lr=nan")
        require(not (folder / "a").exists(), "a refused run left a folder behind")
        if WORLD > 1:
            raises(lambda: run_("a", data, "--schedule=sdpa"), "--schedule=sdpa", f"has {WORLD}")
            raises(lambda: run_("a", data, f"--seq_len={128 + WORLD // 2}"), f"--seq_len={128 + WORLD // 2}", "multiple")
            raises(lambda: run_("a", data, f"--batch_size={3 + RANK // (WORLD - 1)}"), "ranks disagree", "batch_size")
            raises(lambda: run_("a", data, "--schedule=step", "--batch_size=3"), "B=3")
            raises(lambda: run_("a", data, f"--ring_size={WORLD + 1}"), f"--ring_size={WORLD + 1}", f"the {WORLD} processes")
            raises(lambda: run_("a", data, "--schedule=step", "--accumulate=4"), "B=1", "--batch_size=4")
        raises(lambda: run_("a", data, "--accumulate=3"), "--batch_size=4", "--accumulate=3", "use 6")
        raises(lambda: run_("a", data, "--keep=0"), "--keep=0")
        run_("a", data, "--stop_after=2")
        file = folder / "a/ckpt-00000002.pt"
        saved = file.read_bytes()
        raises(lambda: run_("a", data), "already holds a checkpoint", "--resume")
        raises(lambda: run_("a", data, "--resume", "--dim=32"), "dim is 64 there and 32 here")
        raises(lambda: run_("a", data, "--resume", "--seed=5"), "seed is 0 there and 5 here")
        raises(lambda: run_("a", f"--data={train.__file__}", "--resume"), "not the text")
        raises(lambda: run_("a", data, "--resume", "--stop_after=2"), "--stop_after=2", "above 2")
        require(file.read_bytes() == saved, "a refused run overwrote the checkpoint")
        if WORLD > 1:
            dist.barrier()
        if RANK == 0:
            file.write_bytes(saved[:1000])
        raises(lambda: run_("a", data, "--resume"), "ckpt-00000002.pt is not a checkpoint")
        if WORLD > 1:
            dist.barrier()
        if RANK == 0:
            file.write_bytes(b"")
        raises(lambda: run_("a", data, "--resume"), "ckpt-00000002.pt is not a checkpoint")
    finally:
        if RANK == 0:
            shutil.rmtree(folder)


def call_script(name, *flags, n_ranks=1, timeout=120):
    """A script of this project as a user would run it, in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"] if n_ranks > 1 else []
    return subprocess.run([sys.executable, *launcher, str(Path(__file__).with_name(name)), *flags], capture_output=True, text=True, env=alone_env(), timeout=timeout)


def check_command_line():
    done = call_script("train.py", "--data=/no/such/file", "--device=cpu")
    require(done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("train.py: error: --data=/no/such/file does not exist"), done.stderr)
    require("Traceback" not in done.stderr, done.stderr)
    done = call_script("train.py", "--schedule=spiral")
    require(done.returncode == 2 and "invalid choice" in done.stderr, done.stderr)
    lines = call_script("train.py", "--help").stdout.splitlines()
    require(any("--stop_after" in line for line in lines), "--help does not help")
    require(len(lines) <= 50 and max(map(len, lines)) <= 120, f"--help does not fit a screen: {len(lines)} lines of up to {max(map(len, lines))}")

    code = "import torch, train\ndef f(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB.')\ntrain.run_script('train.py', f, 'less')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone_env(), cwd=Path(__file__).parent, timeout=120)
    said = "train.py: rank 0 is out of memory; use less. CUDA out of memory. Tried to allocate 1 GiB."
    require(done.returncode == 1 and done.stderr.strip() == said, done.stderr)


def check_decode_command_line():
    """decode.py continues a prompt with a checkpoint of train.py: the same text on 1 and 2 processes, another one with another seed."""
    folder = shared_folder(ALONE)
    try:
        out = folder / "run"
        quietly_train(tiny_run(out, f"--data={folder / 'text'}", "--stop_after=2", "--schedule=flash", "--device=cpu"), ALONE)
        call = lambda *flags, **options: call_script("decode.py", f"--ckpt={out}", "--prompt=ab cd", "--max_tokens=30", "--device=cpu", *flags, **options)
        texts = [call(f"--seed={seed}", n_ranks=n) for seed, n in ((1, 1), (1, 2), (2, 1))]
        require(all(done.returncode == 0 for done in texts), texts[0].stderr + texts[1].stderr)
        require(texts[0].stdout == texts[1].stdout != texts[2].stdout, f"{[done.stdout for done in texts]}")
        require(texts[0].stdout.startswith("ab cd") and "prefill 5 tokens" in texts[0].stderr and "GB/s" in texts[0].stderr, texts[0].stderr)
        file = train.checkpoints(out)[0]
        state = torch.load(file, weights_only=True)
        torch.save(state | dict(args=state["args"] | dict(n_kv_heads=1)), folder / "other.pt")
        (folder / "short.pt").write_bytes(file.read_bytes()[:1000])
        for flag, *words in ((f"--ckpt={folder / 'other.pt'}", "weights of another shape", "qkv_proj"), (f"--ckpt={folder / 'short.pt'}", "short.pt is not a checkpoint"),
                             (f"--ckpt={folder / 'none'}", "none is not a checkpoint", "No such file"), ("--cache_tokens=34", "5 bytes", "--cache_tokens=34"),
                             ("--prompt=", "the prompt has 0 bytes"), ("--prompt_file=/no/such/file", "/no/such/file"), ("--temperature=-1", "--temperature=-1")):  # fmt: skip
            done = call(flag)
            require(done.returncode == 2 and "Traceback" not in done.stderr and "decode.py: error" in done.stderr and all(w in done.stderr for w in words), done.stderr)
    finally:
        shutil.rmtree(folder)


def check_bench():
    """One row of bench.py, whose last line is JSON; a filter that fits nothing is told what there is."""
    call = lambda *flags, **options: call_script("bench.py", *flags, timeout=300, **options)
    runs = [("memory 32k", 1)] if GPU else [("schedule zigzag", 1), ("decode ragged", 1), ("sharded decode 2k", 2)]
    for row, n_ranks in runs:
        done = call("--quick", f"--filter={row}", n_ranks=n_ranks)
        require(done.returncode == 0, (done.stdout + done.stderr)[-1500:])
        found = json.loads(done.stdout.strip().splitlines()[-1])
        require([r["name"] for r in found["rows"]] == [row] and found["n_ranks"] == n_ranks, done.stdout)
        require(any(line.startswith(row) for line in done.stdout.splitlines()), done.stdout)
    done = call("--filter=nonesuch")
    require(done.returncode == 2 and "nonesuch" in done.stderr and "D64" in done.stderr and "Traceback" not in done.stderr, done.stderr)


real("the transport is chosen and named", check_choice)
local("a GPU that waits for ever ends its process", check_watch)
for how, transport in itertools.product(("dies", "is stuck"), ("p2p", "symmetric")):
    real(f"a rank {how}, {transport}", check_lost_rank, how.split()[-1], transport, ranks=2 if GPU else 1, gpu=transport == "symmetric")
for n_ranks in (2, 4, 8):
    for schedule, causal in itertools.product(SCHEDULES, (True, False)):
        real(f"transports, same bits: {schedule} x{n_ranks} {'causal' if causal else 'full'}", check_transports, schedule, n_ranks, causal, ranks=n_ranks, gpu=True)
    real(f"symmetric memory, 1000 calls x{n_ranks}", check_reuse, "symmetric", n_ranks, ranks=n_ranks, gpu=True)
    real(f"symmetric memory in a CUDA graph x{n_ranks}", check_ring_graph, "symmetric", n_ranks, ranks=n_ranks, gpu=True)
real("tensors on another GPU than the current one x2", check_other_device, "zigzag", 2, ranks=2, gpu=True)
for n_ranks, schedule in itertools.product((1, 2, 4), SCHEDULES):
    real(f"launches: {schedule} x{n_ranks}", check_launches_on_ring, schedule, n_ranks, ranks=n_ranks, gpu=True)
real("unshard(shard(x)) is x, " + ", ".join(SCHEDULES), lambda: [check_unshard(s) for s in SCHEDULES] and None)
for schedule, causal, n_ranks in itertools.product(SCHEDULES, (True, False), sorted({1, 2, WORLD})):
    name = f"real ring {schedule} x{n_ranks} {'causal' if causal else 'full'}"
    if GPU:
        for T, D, H, HKV in ((1000, 80, 6, 2), (1024, 128, 8, 2), (1024, 64, 4, 4)):
            real(f"{name} T{T} D{D} bfloat16", check_real, schedule, causal, n_ranks, None, torch.bfloat16, 2, T, H, HKV, D, ranks=n_ranks)
    else:
        real(f"{name} torch float32", check_real, schedule, causal, n_ranks, "torch", torch.float32, 2, 20, 6, 2, 24, ranks=n_ranks)
        if causal:
            real(f"{name} triton float16", check_real, schedule, causal, n_ranks, "triton", torch.float16, 2, 10, 2, 1, 16, ranks=n_ranks)
for n_ranks in sorted({1, 2, WORLD}):
    for kind in (t for t in AttentionType if t is not AttentionType.SDPA):
        real(f"Attention {kind.name} x{n_ranks} equals SDPA", check_attention, kind, n_ranks, ranks=n_ranks)
    for kind, autocast in ((AttentionType.FLASH, False), (AttentionType.ZIGZAG, False), (AttentionType.ZIGZAG, True)):
        real(f"compiled {kind.name} x{n_ranks}{' autocast' * autocast} equals eager", check_compiled_model, kind, n_ranks, autocast, ranks=n_ranks)
    for schedule in SCHEDULES:
        real(f"train {schedule} x{n_ranks} equals SDPA x1, resumes", check_train, schedule, n_ranks, ranks=n_ranks)
for n_ranks in sorted({1, 2, WORLD}):
    for backend in ("triton",) if GPU else ("torch", "triton"):
        long = 203 if GPU or backend == "torch" else 70
        real(f"sharded decode {backend} x{n_ranks}", check_sharded, backend, n_ranks, LOW_DECODE, 3, 4, 2, 32, (long, 1, 0), ranks=n_ranks)
        more = functools.partial(check_sharded, window=60, sink=4)
        real(f"sharded decode {backend} x{n_ranks} window and sink tokens", more, backend, n_ranks, torch.float32, 1, 2, 1, 32, (long, 1), ranks=n_ranks)
    kind = AttentionType.FLASH if n_ranks == 1 else AttentionType.STRIPED
    real(f"a model decodes through its cache x{n_ranks}", check_stream, kind, n_ranks, ranks=n_ranks)
real("train refuses bad input", check_train_errors)
real("train on meshes, micro batches and shards equals train x1", check_meshes)
real("train recomputes layers, not exchanges", check_train_memory)
real("train's checkpoints: truncated, foreign, full disk", check_run_folder)
real("train stops at signals and at nan", check_train_stops)
local("train survives kill -9 of a rank, twice", lambda: check_kills(2) and None)
CASES.append(("train on two hosts, whose link is cut", check_two_hosts, (), "local", no_hosts()))
local("train.py at the command line", check_command_line)
local("decode.py at the command line", check_decode_command_line)
local("bench.py at the command line", check_bench)

# -----------------------------------------------------------------------------
# compilation for Hopper, which needs no GPU: ptxas comes with triton


def compiled(kernel, types, constants, **options):
    """(SASS, what ptxas says) of a kernel for capability 9.0. types: of the run-time arguments, by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    place = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, type_ in types.items() if type_.startswith("*") or name.startswith("stride")}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    done = compile(source(kernel, {name: types.get(name, "constexpr") for name in names}, place, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(ring_attn.triton.__file__).with_name("backends") / "nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(done.asm["ptx"]), cubin.write_bytes(done.asm["cubin"])
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the second, newer one is what triton 3.9 uses
            again = subprocess.run([tools / ptxas, "-v", "-arch=sm_90a", ptx, "-o", Path(folder, "again.cubin")], capture_output=True, text=True)
            if again.returncode == 0:
                return subprocess.run([tools / "cuobjdump", "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout, again.stderr
        raise RuntimeError(f"no ptxas takes what triton made of {kernel.__name__}: {again.stderr[:500]}")


def inspect_loops(sass):
    """(products, spills, overwritten) over the loops with products: spills to local memory, and writes to a register that a product in
    flight still reads. ptxas must see to that, and has been seen to forget it where the wait for the product was in the next iteration."""
    code = [(int(m[1], 16), re.sub(r"^@!?U?P\d+ +", "", m[2].strip())) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    end = max(at for at, op in code if op.startswith("EXIT"))  # what follows are the slow paths of waits, which branch back as well
    back = [(int(m[1], 16), at) for at, op in code if at < end and (m := re.match(r"BRA.*?0x([0-9a-f]+)", op)) and int(m[1], 16) < at]
    holds = lambda lo, hi: sum("HGMMA" in op for at, op in code if lo <= at <= hi)
    back = [(lo, hi) for lo, hi in back if holds(lo, hi)]
    inner = [(lo, hi) for lo, hi in back if not any((lo, hi) != (a, b) and lo <= a and b <= hi for a, b in back)]
    products = spills = overwritten = 0
    for lo, hi in inner:
        body = [op for at, op in code if lo <= at <= hi]
        products, spills = products + holds(lo, hi), spills + sum(op.startswith(("STL", "LDL")) for op in body)
        groups, group = [], set()  # registers that products read, by group that one wait covers
        for op in body + body:  # twice: what one round leaves in flight meets the next one
            if m := re.match(r"HGMMA\S* R\d+, (?:R(\d+), )?", op):
                group |= set(range(int(m[1]), int(m[1]) + 4)) if m[1] else set()
                if "gsb0" in op:
                    groups, group = groups + [group], set()
            elif m := re.search(r"DEPBAR\.LE gsb0, 0x(\d)", op):
                groups = groups[len(groups) - int(m[1]) :] if len(groups) > int(m[1]) else groups
            elif (m := re.match(r"(\S+) (?:U?P\d, )?R(\d+),", op)) and not op.startswith(("ST", "SYNCS", "RED")):
                width = 4 if ".128" in m[1] else 2 if ".64" in m[1] or ".WIDE" in m[1] else 1
                overwritten += any(set(range(int(m[2]), int(m[2]) + width)) & g for g in (*groups, group))
    return products, spills, overwritten


def under_products(sass):
    """How many row maxima are taken while a product is in flight: after a wait that leaves one, before the next wait."""
    spans = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR", sass, re.DOTALL)
    return min((len(re.findall("FMNMX", span)) for span in spans), default=0)


def compile_kernels():
    """Compile the kernels in the configurations that are shipped; False if one serialises its products, spills in a loop with
    products, overwrites what a product in flight reads, leaves nothing to do under products, or uses a barrier that is ours."""
    gl, good = ring_attn.gl, True
    timed = tuple(map(int, ring_attn.triton.__version__.split(".")[:2])) < (3, 9)  # 3.9 spills more; what that costs has not been measured
    integers = dict.fromkeys(("B", "H", "G", "T", "GROUP_B", "SECTION", "ROUNDS"), "i32")
    print(f"triton {ring_attn.triton.__version__}, capability 9.0: registers, bytes spilled; in loops with products: products, spills, overwritten registers")

    def report(name, strict, *args, **options):
        nonlocal good
        sass, said = compiled(*args, **options)
        products, spills, overwritten = inspect_loops(sass)
        serial = "serialized" in said
        bad = serial or not products or overwritten > 0 or strict and timed and 10 * spills > products  # a reload here and there does no harm
        bad |= name.startswith("hopper fwd") and under_products(sass) < 32
        bad |= any(int(barrier, 16) >= ring_attn.NAMED_BARRIERS.value for barrier in re.findall(r" BAR\.\w+[.\w]* 0x([0-9a-f]+)", sass))
        good &= not bad
        number = lambda what: (re.findall(what, said) or ["?"])[-1]
        used, spilled = number(r"Used (\d+) registers"), number(r"(\d+) bytes spill stores")
        print(f"{name:32} {used:>4} {spilled:>5}   {products:3} {spills:3} {overwritten:3}{' SERIALIZED' * serial}{' BAD' * bad}", flush=True)

    def tile(rows, D, kind="bf16", shape=None):
        layout = gl.NVMMASharedLayout.get_default_for(shape or [1, rows, 1, D], gl.bfloat16 if kind == "bf16" else gl.float32)
        return f"tensordesc<{kind}{shape or [1, rows, 1, D]},{layout!r}>"

    for (kernel, table), causal in itertools.product(ring_attn.HOPPER_TILES.items(), (True, False)):
        for D, (consumers, streamed, stages) in table.items():
            constants = dict(HEAD_DIM=D, CAUSAL=causal, CONSUMERS=consumers, STAGES=stages)
            stay, stream, options = tile(64, D), tile(streamed, D), dict(num_warps=4, maxnreg={2: 168, 3: 128}[consumers])
            types = dict(HOP="*i32", sm_scale="fp32", ACC="*fp32", **integers)
            if kernel == "fwd":
                types = dict(q_desc=stay, k_desc=stream, v_desc=stream, o_desc=stay, LSE="*fp32", **types)
            else:
                rows = tile(0, 0, "fp32", [2, 1, streamed])
                types = dict(a_desc=stay, a2_desc=stay, b_desc=stream, b2_desc=stream, out_desc=stay, LSE_LOG2="*fp32", **types)
                if kernel == "dkv":
                    types |= dict(rows_desc=rows, out2_desc=stay, ACC2="*fp32")
                constants["DKV"] = kernel == "dkv"
            function = ring_attn.hopper_fwd_kernel if kernel == "fwd" else ring_attn.hopper_bwd_kernel
            report(f"hopper {kernel} D{D} {'causal' if causal else 'full'}", True, function, types, constants, **options)
    for kernel, D in itertools.product(ring_attn.TILES, (64, 128, 256)):
        BLOCK_M, BLOCK_N, num_warps, num_stages = ring_attn.TILES[kernel][D]
        function = getattr(ring_attn, f"{kernel}_kernel")
        floats = dict.fromkeys(("ACC", "LSE", "LSE_LOG2", "DELTA", "DK_ACC", "DV_ACC"), "*fp32")
        tiles = {name: f"tensordesc<bf16[{rows}, {D}]>" for rows, names in ((BLOCK_M, ("Q", "DO")), (BLOCK_N, ("K", "V"))) for name in names}
        known = dict(HOP="*i32", sm_scale="fp32", **dict.fromkeys(("O", "DQ", "DK", "DV"), "*bf16"), **floats, **tiles, **integers)
        types = {name: known.get(name, "i32") for name in function.arg_names if name in known or name.startswith("stride")}
        constants = dict(CAUSAL=True, TMA=True, HEAD_DIM=D, BLOCK_D=D, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        report(f"portable {kernel} D{D} causal", D < 256, function, types, constants, num_warps=num_warps, num_stages=num_stages)
    everything = decode.decode_kernel.arg_names
    whole = dict(SEQLENS="*i32", KV_NUM="*i32", KV_IDX="*i32", FULL_NUM="*i32", FULL_IDX="*i32", PAGES="*i32", SINK="*fp32", sm_scale="fp32")
    whole |= dict.fromkeys(("Q", "K", "V", "O"), "*bf16") | dict.fromkeys(("LSE", "PARTS"), "*fp32")
    for name, given, constants in (
        ("one length", (), {}), ("many", (), dict(BLOCK_N=128)), ("lengths", ("SEQLENS",), dict(LISTS=32)), ("64 rows", (), dict(BLOCK_M=64)),
        ("D256", (), dict(HEAD_DIM=256, BLOCK_D=256, BLOCK_N=32)), ("D80", (), dict(HEAD_DIM=80)), ("sink logits", ("SINK",), {}),
        ("pages", ("SEQLENS", "PAGES"), dict(LISTS=32)),
        ("blocks", ("KV_NUM", "KV_IDX", "FULL_NUM", "FULL_IDX"), dict(TILES_PER_BLOCK=2)), ("partial blocks", ("KV_NUM", "KV_IDX"), dict(TILES_PER_BLOCK=2)),
    ):  # fmt: skip
        constants = dict(CAUSAL=True, TILES_PER_BLOCK=0, LISTS=1, PDL=True, HEAD_DIM=128, BLOCK_D=128, BLOCK_M=16, BLOCK_N=64) | constants
        optional = set(whole) & {"SEQLENS", "PAGES", "KV_NUM", "KV_IDX", "FULL_NUM", "FULL_IDX", "SINK"} - set(given)
        types = {x: whole.get(x, "i32") for x in everything if x not in optional and x not in constants and x not in ("AUX", "SCORE_MOD", "MASK_MOD")}
        sass, said = compiled(decode.decode_kernel, types, constants, num_warps=4, num_stages=5 if "PAGES" in given else 3)
        ahead, stores = len(re.findall(r"LDGSTS\S*\.128", sass)), int(re.findall(r"(\d+) bytes spill stores", said)[0])
        bad = ahead < 16 or stores > 64  # keys and values are copied ahead, 16 bytes at a time
        good &= not bad
        print(f"decode {name:25} {re.findall(r'Used (.*?) registers', said)[0]:>4} {stores:>5}   {ahead:3} copies ahead{' BAD' * bad}", flush=True)
    return good


# -----------------------------------------------------------------------------
# runner

BY_SIZE = check_attention, check_compiled_model, check_train, check_sharded, check_stream, check_transports, check_reuse, check_ring_graph, check_launches_on_ring, check_other_device  # (kind, ranks)


def kill_runs(n_kills, seed):
    """Kills in turn in a ring, in shards without one, and in both."""
    kinds = (2, ()), (2, ("--ring_size=1", "--fsdp")), (4, ("--ring_size=2", "--fsdp", "--checkpoint"))
    for i, (n_ranks, flags) in enumerate(kinds):
        share = n_kills // len(kinds) + (i < n_kills % len(kinds))
        if share:
            began = time.perf_counter()
            for run_, rank, step in check_kills(share, n_ranks, flags, seed + i):
                print(f"{n_ranks} ranks {' '.join(flags)} {run_}: rank {rank} killed after step {step}")
            print(f"{share} kills, every run ended with the undisturbed loss, bit for bit, {time.perf_counter() - began:.0f} s", flush=True)


def execute(f, args):
    """(what, error, bound) or None, and the failure or None."""
    start = time.perf_counter()
    try:
        row, failure = f(*args), None
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        row, failure = None, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:2000]}"
    return row, failure, time.perf_counter() - start


def main():
    global ALONE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--filter", default="", help="run only the cases whose name contains this")
    parser.add_argument("--compile_only", action="store_true", help="compile the kernels for Hopper, without a GPU, and say what they cost")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="train with N kills of random ranks at random steps, on CPUs, and nothing else")
    parser.add_argument("--seed", type=int, default=0, help="of --kill")
    args = parser.parse_args()
    if args.compile_only:
        sys.exit(not compile_kernels())
    if args.kill:
        kill_runs(args.kill, args.seed)
        return
    cases = [c for c in CASES if args.filter in c[0]]
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # and with it, every torch.empty is filled with nan
    torch.backends.cuda.matmul.allow_tf32 = False
    if GPU:
        torch.cuda.set_device(LOCAL_RANK)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if GPU else "gloo", device_id=DEVICE if GPU else None, timeout=timedelta(seconds=300))
        for size in {1, 2, 4, WORLD} & set(range(WORLD + 1)):  # the first WORLD // size * size processes, in rings of `size`
            for first in range(0, WORLD // size * size, size):
                group = dist.new_group(range(first, first + size))
                if first <= RANK < first + size:
                    RINGS[size] = group
        ALONE = RINGS[1]
    RINGS.setdefault(1, None)
    gathered = lambda x: [x]
    if WORLD > 1:

        def gathered(x):
            everyone = [None] * WORLD
            dist.all_gather_object(everyone, x)
            return everyone

    where = torch.cuda.get_device_name() if GPU else "CPU, kernels in Triton's interpreter"
    say = print if RANK == 0 else lambda *a, **k: None
    say(f"{WORLD} x {where} | torch {torch.__version__} | triton {ring_attn.triton.__version__} | {len(cases)} cases")
    say(f"{'case':62} {'worst':>6} {'error':>9} {'bound':>9} {'ratio':>6}     s")
    passed, failed, skipped, top = 0, [], [], ("", 0.0)

    def report(name, results):
        nonlocal passed, top
        rows, seconds = [r for r, _, _ in results if r], max(s for _, _, s in results)
        row = max(rows, key=lambda r: r[1] / r[2], default=None)
        failures = [(rank, f) for rank, (_, f, _) in enumerate(results) if f]
        numbers = f"{row[0]:>6} {row[1]:9.1e} {row[2]:9.1e} {row[1] / row[2]:6.2f}" if row else f"{'-':>6} {'-':>9} {'-':>9} {'-':>6}"
        say(f"{name:62} {numbers} {seconds:5.1f} {'FAILED' if failures else 'ok'}", flush=True)
        if row and row[1] / row[2] > top[1]:
            top = (name, row[1] / row[2])
        for rank, text in failures:
            say(f"    rank {rank}: {text}")
        if failures:
            failed.append(name)
        else:
            passed += 1

    ready = [c for c in cases if c[4] is None]
    skipped = [(name, why) for name, _, _, _, why in cases if why]
    alone = [c for c in ready if c[3] == "local"]
    at_once = 32 * WORLD if WORLD > 1 else 1  # shared out among the processes, some at a time, so that one sees how it goes
    for batch in (alone[first : first + at_once] for first in range(0, len(alone), at_once)):
        mine = {c[0]: execute(c[1], c[2]) for c in batch[RANK::WORLD]}
        everyone = {name: result for part in gathered(mine) for name, result in part.items()}
        for name, *_ in batch:
            report(name, [everyone[name]])
    for name, f, f_args, *_ in (c for c in ready if c[3] == "real"):
        # a ring of fewer processes than there are may leave some without one: those pass
        needed = f_args[2] if f is check_real else f_args[1] if getattr(f, "func", f) in BY_SIZE else WORLD
        result = execute(f, f_args) if needed in RINGS or needed == WORLD else (None, None, 0.0)
        everyone = gathered((name, result))
        if any(not isinstance(said, tuple) or said[0] != name for said in everyone):  # another rank is amid what takes all of them
            sys.exit(f"{name}: the ranks are out of step; rank {RANK} ended it with {result[1] or 'no error'}")
        report(name, [mine for _, mine in everyone])
    for why in dict.fromkeys(why for _, why in skipped):
        say(f"skipped, {why}: {'; '.join(name for name, reason in skipped if reason == why)}")
    say(f"worst ratio to the bound: {top[1]:.2f} in {top[0]}")
    say(f"{len(skipped)} skipped")
    say(f"{passed} passed, {len(failed)} failed")
    RINGS.clear()
    ring_attn.leave_groups()
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
