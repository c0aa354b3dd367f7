"""Speed and error of the attention kernels, beside what a user would pick instead.

    python bench.py                       # one GPU: every length, mask and head dim; on a CPU the torch path, under a minute
    python bench.py --quick               # only 4k and 16k tokens at head dims 64 and 128, flex once per head dim and mask
    python bench.py --filter "D128 16k"   # rows whose name contains this; decode: a few tokens against a long cache
    torchrun --nproc_per_node=2 bench.py  # only decoding from a cache that is striped over the ranks, beside one GPU that holds it all

A card, then one row per case, then why there are dashes; the last line is all of it as JSON. Peers are torch's SDPA
(FlashAttention-2 and cuDNN), compiled flex_attention, and FlashAttention-3 where flash_attn_interface is installed; decoding is
compared with SDPA's FlashAttention-2, autotuned flex_attention and FlashAttention-3's flash_attn_with_kvcache, and its GB/s with
those of a copy. Each gets its tensors in the layout it takes, and all are held to the same float32 truth on the same inputs.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import ring_attn
from decode import decode_attn, sharded_decode_attn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, WIDE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)  # of the inputs, of the truth
RANK, N_RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
K = 1024

# -----------------------------------------------------------------------------
# contenders: (q, k, v, causal) -> o


def ours(q, k, v, causal):
    return ring_attn.flash_attn_func(q, k, v, None, causal, None)


def portable(q, k, v, causal):
    return ring_attn.ring_attn(q, k, v, group=None, causal=causal, backend="triton")


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compiled_flex(mode=None):
    torch._dynamo.config.recompile_limit = 256  # each shape is a compile of its own
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    torch._inductor.config.autotune_num_choices_displayed = 0  # no tables between our rows
    return torch.compile(flex_attention, dynamic=False, mode=mode)


@functools.cache
def causal_blocks(S):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=DEVICE)


def flex(q, k, v, causal):
    return compiled_flex()(q, k, v, block_mask=causal_blocks(q.shape[2]) if causal else None, enable_gqa=q.shape[1] != k.shape[1])


def fa3(q, k, v, causal):
    from flash_attn_interface import flash_attn_func

    return without_lse(flash_attn_func(q, k, v, causal=causal))


def without_lse(o):
    return o[0] if isinstance(o, tuple) else o  # some builds return lse as well


# and for decoding: (case, lengths, page table) -> a function (q, k, v) -> o, or None for what a contender does not do


class Case(NamedTuple):
    """M new tokens in each of B sequences, and a cache with room for N."""

    B: int
    H: int
    HKV: int
    N: int
    M: int = 1
    D: int = 128 if GPU else 64
    window: int | None = None
    lengths: list | None = None  # tokens in the cache of each sequence, if not N
    page_size: int | None = None

    def needed(self):
        """Bytes of the keys and values that a call cannot do without."""
        seen = [min(L, self.window + self.M - 1) if self.window else L for L in self.lengths or [self.N] * self.B]
        return 2 * sum(seen) * self.HKV * self.D * DTYPE.itemsize


def decode_ours(case, lengths, table):
    return lambda q, k, v: decode_attn(q, k, v, cache_seqlens=lengths, window=case.window, page_table=table)


def decode_sdpa(case, lengths, table):
    if lengths is not None:
        return None
    options = dict(attn_mask=causal_lower_right(case.M, case.N) if case.M > 1 else None, enable_gqa=case.H != case.HKV)
    if case.window:  # to a single query it is a slice, which moves with every token
        return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, -case.window :], v[:, :, -case.window :], **options)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def decode_flex(case, lengths, table):
    if table is not None:
        return None
    first, window = case.N - case.M, case.window  # the position of the first query
    if lengths is not None:
        seen = lambda b, h, i, j: j < lengths[b]
    elif window:
        seen = lambda b, h, i, j: (i + first >= j) & (i + first < j + window)
    else:
        seen = lambda b, h, i, j: i + first >= j
    # made for a whole block of queries, or no block of keys would count as full; then the same blocks for the M that there are
    whole = create_block_mask(seen, None if lengths is None else case.B, None, 128, case.N, device=DEVICE)
    tables = whole.kv_num_blocks, whole.kv_indices, whole.full_kv_num_blocks, whole.full_kv_indices
    mask = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=whole.BLOCK_SIZE, mask_mod=seen, seq_lengths=(case.M, case.N))
    attend = compiled_flex("max-autotune-no-cudagraphs")
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=case.H != case.HKV)


def decode_fa3(case, lengths, table):
    from flash_attn_interface import flash_attn_with_kvcache

    options = dict(causal=case.M > 1 or case.window is not None, window_size=(case.window - 1, 0) if case.window else (-1, -1))
    return lambda q, k, v: without_lse(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table, **options))


class Contender(NamedTuple):
    f: Callable
    heads_first: bool = False  # takes and returns (B, H, S, D), not (B, S, H, D)
    backend: Any = None  # which of SDPA's kernels
    decode: Callable | None = None


CONTENDERS = {"ours": Contender(ours, decode=decode_ours)}
if GPU:
    if set(ring_attn.BACKENDS) - {"triton", "torch"}:  # `ours` is the best of them; what every other GPU gets goes beside it
        CONTENDERS["triton"] = Contender(portable)
    CONTENDERS["fa2"] = Contender(sdpa, True, SDPBackend.FLASH_ATTENTION, decode_sdpa)
    CONTENDERS["cudnn"] = Contender(sdpa, True, SDPBackend.CUDNN_ATTENTION)
    CONTENDERS["flex"] = Contender(flex, True, None, decode_flex)
    CONTENDERS["fa3"] = Contender(fa3, decode=decode_fa3)
else:
    CONTENDERS["sdpa"] = Contender(sdpa, True, SDPBackend.FLASH_ATTENTION, decode_sdpa)
EAGER = [who for who in CONTENDERS if who != "flex"]
DECODERS = [who for who in CONTENDERS if CONTENDERS[who].decode]


def in_layout(contender, q, k, v, do):
    """Fresh leaves (q, k, v), and do, as the contender takes them, so that no transpose is on its clock."""
    turn = (lambda x: x.transpose(1, 2)) if contender.heads_first else (lambda x: x)
    return [turn(x).detach().requires_grad_() for x in (q, k, v)], turn(do)


FAILED = {}  # "contender: reason" -> names of the rows that show a dash for it


def attempt(who, row, f, *args):
    """f(contender, *args) or, with the reason kept for the end, None: one contender must not stop the others."""
    contender = CONTENDERS[who]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # chosen once around all calls: sdpa_kernel takes host time that is not the kernel's
            with contextlib.nullcontext() if contender.backend is None else sdpa_kernel(contender.backend):
                return f(contender, *args)
        except Exception as error:
            # SDPA raises "No available kernel" and warns why, of the kernels that were not asked for too
            said = [str(w.message).split(" (Triggered")[0] for w in caught if not re.search("because|runtime disabled", str(w.message))]
            reason = " ".join(f"{who}: {type(error).__name__}: {error} {' '.join(said)}".split())[:200]
            FAILED.setdefault(reason, []).append(row)
    torch.cuda.empty_cache()  # it may have run out of memory; what its frames held is free by now


# -----------------------------------------------------------------------------
# measuring


def make(name, B, S, H, HKV, D):
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))  # each row has inputs of its own, the same in every run
    return [torch.randn(B, S, heads, D, generator=g, dtype=DTYPE, device=DEVICE) for heads in (H, HKV, HKV, H)]  # q, k, v, do


def wall_us(f, calls=50, rounds=5):
    """Microseconds per call, the host's work included: many calls, one synchronize; the median of some rounds."""
    synchronize, times = torch.cuda.synchronize if GPU else lambda: None, []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])  # the first round compiles and warms up


def median_ms(f):
    if not GPU:
        return wall_us(f, calls=1) / 1e3
    estimate = wall_us(f, calls=1, rounds=1) / 1e3
    return triton.testing.do_bench(f, rep=max(100, 5 * estimate), return_mode="median")  # five calls even of the longest


def captured(f):
    """f as a CUDA graph: a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a first call makes things that may not be made during capture
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL's watchdog may look at events meanwhile
        f()
    return graph.replay


def replay_us(replay, rounds=20):
    """Microseconds from the end of a replay to the end of the next; the host is ahead, so that its launches are not in them."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for end in ends:
        replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(ends, ends[1:])) * 1e3


HOW = ("graph", "eager") if GPU else ("eager",)  # calls are timed


def timed(call, q, caches):
    """{how: microseconds per call}, of call(q, k, v) on each of the caches [(k, v)] in turn, eight times or more."""
    caches = caches * -(-8 // len(caches))
    calls = lambda: [call(q, k, v) for k, v in caches]
    us = dict(eager=wall_us(calls, calls=max(1, 48 // len(caches)) if GPU else 1))
    if GPU:
        us["graph"] = replay_us(captured(calls))
    return {how: us[how] / len(caches) for how in HOW}


def n_caches(needed):
    """How many caches, of which a call reads `needed` bytes, are four times the GPU's L2 cache: then no call finds what an earlier one left."""
    return min(16, -(-4 * torch.cuda.get_device_properties().L2_cache_size // needed)) if GPU else 1


@functools.cache
def copy_gbs():
    """GB/s, read and written, of a copy of 1 GiB: the most that memory gives in practice."""
    x = torch.randn(2**29, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6


def true_results(q, k, v, do, causal):
    """o, dq, dk, dv of the reference in ring_attn.py, which takes blocks of queries: (S, S) scores never exist."""
    q, k, v = (x.to(WIDE).requires_grad_() for x in (q, k, v))
    o = ring_attn.ring_attn(q, k, v, group=None, causal=causal, backend="torch")
    return dict(fwd=[o.detach()], bwd=torch.autograd.grad(o, (q, k, v), do.to(WIDE)))


def measure(contender, what, tensors, causal, truth):
    """(ms, the largest relative Frobenius error of o, or of dq, dk and dv) of what="fwd" or "bwd"."""
    leaves, do = in_layout(contender, *tensors)
    with torch.set_grad_enabled(what == "bwd"):
        call = lambda: [contender.f(*leaves, causal)]
        if what == "bwd":
            (o,) = call()
            call = lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)
        ms, results = median_ms(call), call()
    errors = []
    for x, true in zip(results, truth[what], strict=True):
        x = x.transpose(1, 2) if contender.heads_first else x
        errors.append(((x[-1:, :, -true.shape[2] :].to(WIDE) - true).norm() / true.norm()).item())
    if not all(map(math.isfinite, errors)):
        raise ValueError(f"the result of {what} is not finite")
    return ms, max(errors)


def make_decode(name, case):
    """q (B, M, H, D), lengths, page table; None for what the case has not."""
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    q = torch.randn(case.B, case.M, case.H, case.D, generator=g, dtype=DTYPE, device=DEVICE)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE) if case.lengths else None
    n_pages = case.B * case.N // case.page_size if case.page_size else 0
    table = torch.randperm(n_pages, generator=g, dtype=torch.int32, device=DEVICE).view(case.B, -1) if n_pages else None
    return q, lengths, table


def make_cache(name, i, case, heads_first=False):
    """k, v of the i-th cache: (B, N, HKV, D) or its pages, or (B, HKV, N, D)."""
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(f"{name} {i}".encode()))
    lead = (case.B * case.N // case.page_size, case.page_size) if case.page_size else (case.B, case.N)
    kv = [torch.randn(*lead, case.HKV, case.D, generator=g, dtype=DTYPE, device=DEVICE) for _ in "kv"]
    return [x.transpose(1, 2).contiguous() for x in kv] if heads_first else kv


def true_decode(name, case, q, table):
    """o (M, H, D) of the last sequence, on the first cache."""
    L = case.lengths[-1] if case.lengths else case.N
    q, *kv = q[-1].to(WIDE), *make_cache(name, 0, case)
    k, v = ((x[-1] if table is None else x[table[-1]].flatten(0, 1))[:L].to(WIDE) for x in kv)  # (L, HKV, D)
    s = torch.einsum("mhgd,nhd->hgmn", q.unflatten(1, (case.HKV, -1)), k) * case.D**-0.5
    behind = torch.arange(L - case.M, L, device=DEVICE)[:, None] - torch.arange(L, device=DEVICE)  # (M, L), by how much a key is
    s = s.masked_fill((behind < 0) | (behind >= (case.window or L)), -math.inf)
    return torch.einsum("hgmn,nhd->mhgd", s.softmax(-1), v).flatten(1, 2)


def measure_decode(contender, name, case, q, lengths, table, truth):
    """({how: microseconds per call}, relative Frobenius error of o), or None for what the contender does not do."""
    call = contender.decode(case, lengths, table)
    if call is None:
        return None
    turn = (lambda x: x.transpose(1, 2)) if contender.heads_first else (lambda x: x)
    caches = [make_cache(name, i, case, contender.heads_first) for i in range(n_caches(case.needed()))]
    o = turn(call(turn(q), *caches[0]))[-1].to(WIDE)
    error = ((o - truth).norm() / truth.norm()).item()
    if not math.isfinite(error):
        raise ValueError("the result of decode is not finite")
    return timed(call, turn(q), caches), error


def of_best(times):
    """(the fastest peer's time over ours, which peer), or None; times: {contender: time}, of those that have one."""
    peers = {who: t for who, t in times.items() if who not in ("ours", "triton")}
    best = min(peers, key=peers.get, default=None)
    return (peers[best] / times["ours"], best) if best and "ours" in times else None


# -----------------------------------------------------------------------------
# sections: functions that return a heading, or one that measures what it says; a function that measures a row, prints it and
# returns it; and {name: its arguments}


def size(S):
    return f"{S // K}k" if S % K == 0 else f"{S}"


def columns(names, width):
    return "".join(f"{name:>{width}}" for name in names)


def ratio_text(ratio):
    return "{:.2f} {}".format(*ratio) if ratio else "-"


def kernels(quick):
    if GPU:
        shapes = [(D, S, 2048 // D, 2048 // D, causal) for D in (64, 128) for S in (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 64 * K) for causal in (True, False)]
        shapes += [(128, S, 32, 8, causal) for S in (8 * K, 16 * K) for causal in (True, False)]
        shapes += [(D, 4 * K, 2048 // D, 2048 // D, True) for D in (80, 96, 192, 256)]
        shapes = [s for s in shapes if not quick or s[0] in (64, 128) and s[1] in (4 * K, 16 * K)]
    else:
        shapes = [(64, S, 4, HKV, causal) for S, HKV in ((512, 4), (512, 2), (K, 4)) for causal in (True, False) if not quick or S == 512]
    flexed = set()  # the (D, causal) that flex was compiled for
    cases = {}
    for D, S, H, HKV, causal in shapes:
        name = f"D{D} {size(S)} {'causal' if causal else 'full'}" + (f" {H}/{HKV}" if H != HKV else "")
        cases[name] = ((max(1, 16 * K // S) if GPU else 1, S, H, HKV, D), causal, flexed if quick else set())
    what = "B*S = 16384 tokens (at 64k 65536), H*D = 2048, or H/HKV as named; L2 cache cold" if GPU else "B1 H4"
    heading = f"{'':25}{columns(CONTENDERS, 16)}   of best peer  error/sdpa   fwd+bwd of best"
    return f"kernels: TFLOP/s and error; {what}\n{heading}", kernel_row, cases


def kernel_row(name, shape, causal, flexed):
    (B, S, H, HKV, D), tensors = shape, make(name, *shape)
    # the truth of one batch item and key/value head, the last, where offsets are largest
    truth = true_results(*(x[-1:, :, -(x.shape[2] // HKV) :] for x in tensors), causal)
    row = dict(name=name, B=B, S=S, H=H, HKV=HKV, D=D, causal=causal, fwd={}, bwd={})
    flops = 4 * B * H * S * S * D / (2 if causal else 1)
    for who in CONTENDERS:
        if who == "flex" and (D, causal) in flexed:
            continue
        for what, times_flops in (("fwd", 1), ("bwd", 2.5)):
            result = attempt(who, name, measure, what, tensors, causal, truth)
            if result is None:
                break  # without a forward there is no backward
            row[what][who] = dict(ms=result[0], tflops=times_flops * flops / result[0] / 1e9, error=result[1])
    flexed.add((D, causal))

    times = {what: {who: x["ms"] for who, x in row[what].items()} for what in ("fwd", "bwd")}
    times["fwd+bwd"] = {who: times["fwd"][who] + ms for who, ms in times["bwd"].items()}
    row["of_best"] = {what: of_best(t) for what, t in times.items()}
    for what in ("fwd", "bwd"):
        found = [row[what].get(who) for who in CONTENDERS]
        cells = columns((f"{x['tflops']:.{0 if x['tflops'] >= 10 else 3}f} {x['error']:.1e}" if x else "-" for x in found), 16)
        errors = [row[what][who]["error"] for who in row[what] if CONTENDERS[who].backend is not None]
        share = f"{row[what]['ours']['error'] / min(errors):.2f}" if errors and "ours" in row[what] else "-"
        label, both = (name, "") if what == "fwd" else ("", ratio_text(row["of_best"]["fwd+bwd"]))
        print(f"{label:21} {what}{cells}   {ratio_text(row['of_best'][what]):12}  {share:>10}   {both}".rstrip(), flush=True)
    return row


def small(quick):
    cases = {f"small {how} {what}": (how == "graph", what == "fwd+bwd") for how in ("eager", "graph") for what in ("fwd", "fwd+bwd")}
    heading = f"{'':20}{columns(EAGER, 10)}   of best peer"
    return f"small: microseconds of wall time, the host's included; B1 S2048 H32 D128 causal\n{heading}", small_row, cases


def small_row(name, graph, backward):
    tensors = make(name, 1, 2 * K, 32, 32, 128)

    def measure_small(contender):
        leaves, do = in_layout(contender, *tensors)
        forward = lambda: contender.f(*leaves, True)
        call = (lambda: torch.autograd.grad(forward(), leaves, do)) if backward else forward
        with torch.set_grad_enabled(backward):
            return wall_us(captured(call) if graph else call)

    times = {who: us for who in EAGER if (us := attempt(who, name, measure_small))}
    print(f"{name:20}{columns((f'{times[who]:.1f}' if who in times else '-' for who in EAGER), 10)}   {ratio_text(of_best(times))}", flush=True)
    return dict(name=name, us=times, of_best=of_best(times))


def memory(quick):
    cases = {f"memory {size(T)}": (T,) for T in (32 * K, 64 * K, 128 * K, 256 * K)}
    heading = f"{'':13}{columns(EAGER, 16)}"
    return f"memory: peak GiB of forward + backward beyond the inputs (MiB per 1k tokens); B1 H8 D128 causal\n{heading}", memory_row, cases


def memory_row(name, T):
    tensors = make(name, 1, T, 8, 8, 128)

    def measure_memory(contender):
        leaves, do = in_layout(contender, *tensors)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(contender.f(*leaves, True), leaves, do)
        return torch.cuda.max_memory_allocated() - before

    peaks = {who: peak for who in EAGER if (peak := attempt(who, name, measure_memory))}
    cells = (f"{peaks[who] / 2**30:.3f} ({peaks[who] / K / T:.2f})" if who in peaks else "-" for who in EAGER)
    print(f"{name:13}{columns(cells, 16)}", flush=True)
    return dict(name=name, T=T, peak_bytes=peaks)


def schedules(quick):
    cases = {"schedule none": ("contiguous", 1)} | {f"schedule {schedule}": (schedule, 4) for schedule in ring_attn.SCHEDULES}
    heading = f"{'':21}fwd+bwd ms   share of the scores, rank by rank"
    return f"schedules: four ranks in turn on this CPU, none: one rank; B2 S512 H4 D64 causal\n{heading}", schedule_row, cases


def schedule_row(name, schedule, R):
    B, S = 2, 512
    q, k, v, do = make(name, B, S, 4, 4, 64)
    leaves, ring = [x.requires_grad_() for x in (q, k, v)], ring_attn.VirtualRing(R)
    ms = median_ms(lambda: torch.autograd.grad(ring_attn.ring_attn(*leaves, schedule, ring, causal=True, backend="torch"), leaves, do))
    scores = [(ring_attn.positions(schedule, rank, R, S // R, B) + 1).double().mean().item() for rank in range(R)]  # position p sees p + 1 keys
    shares = [x / sum(scores) for x in scores]
    print(f"{name:21}{ms:10.1f}   {' '.join(f'{share:6.1%}' for share in shares)}", flush=True)
    return dict(name=name, ms=ms, shares=shares)


def decode(quick):
    if GPU:
        shapes = (1, 32, 8, 8), (1, 32, 8, 128), (8, 32, 8, 8), (8, 64, 8, 32), (64, 32, 8, 8), (16, 32, 1, 16), (16, 16, 16, 8), (16, 24, 8, 16)
        cases = {f"decode B{B} {H}/{HKV} {N}k": Case(B, H, HKV, N * K) for B, H, HKV, N in shapes}
        cases["decode ragged"] = Case(32, 32, 8, 128 * K, lengths=[512] * 31 + [128 * K])
        cases["decode pages"] = Case(8, 32, 8, 8 * K, lengths=[8 * K] * 8, page_size=64)
        cases["decode window"] = Case(1, 32, 8, 128 * K, window=4 * K)
        cases["decode M4"] = Case(8, 32, 8, 8 * K, M=4)
        cases = {name: case for name, case in cases.items() if not quick or re.search("B1 |B64|24/8|ragged|window", name)}
    else:
        cases = {"decode B1 8/2 2k": Case(1, 8, 2, 2 * K), "decode B4 8/2 512": Case(4, 8, 2, 512)}
        cases["decode ragged"] = Case(4, 8, 2, 2 * K, lengths=[64] * 3 + [2 * K])

    def heading():
        names = f"{'':27}{columns(DECODERS, 16)}   of best peer  of copy  error/{'fa2' if GPU else 'sdpa'}"
        if not GPU:
            return f"decode: microseconds of wall time per call, and error; D64, one token; ragged: B4 8/2, one of 2k tokens and three of 64\n{names}"
        return f"""decode: microseconds per call; D128, one token; ragged: B32 32/8, one of 128k tokens and 31 of 512; pages of 64, M4 (four tokens): B8 32/8 8k;
window: the last 4k of B1 32/8 128k. graph: calls in a row of one CUDA graph (GB/s of the keys and values needed), each on a cache of its own, as many
as make four times the L2 cache: all are read from memory, no flush leaves dirty lines, and no launch is on the clock. eager: wall time, and error
of copy: our GB/s over those of a copy, {copy_gbs() / 1e3:.2f} TB/s\n{names}"""

    return heading, decode_row, {name: (case,) for name, case in cases.items()}


def decode_row(name, case):
    q, lengths, table = make_decode(name, case)
    with torch.no_grad():
        truth = true_decode(name, case, q, table)
        found = {who: x for who in DECODERS if (x := attempt(who, name, measure_decode, name, case, q, lengths, table, truth))}
    us, errors = {how: {who: x[0][how] for who, x in found.items()} for how in HOW}, {who: x[1] for who, x in found.items()}
    row = dict(name=name, **case._asdict(), needed=case.needed(), us=us, errors=errors, of_best={how: of_best(us[how]) for how in HOW})
    row["gbs"] = {who: case.needed() / t / 1e3 for who, t in us["graph"].items()} if GPU else {}
    row["copy_gbs"] = copy_gbs() if GPU else None
    # SDPA's error; the best peer's where SDPA has none
    yardstick = [x for who, x in errors.items() if CONTENDERS[who].backend is not None] or [x for who, x in errors.items() if who != "ours"]
    for how in HOW:
        text = lambda who: f"{us[how][who]:.1f} " + (f"({row['gbs'][who]:.0f})" if how == "graph" else f"{errors[who]:.1e}")
        cells = columns((text(who) if who in found else "-" for who in DECODERS), 16)
        copy = f"{row['gbs']['ours'] / copy_gbs():.2f}" if how == "graph" and "ours" in found else ""
        share = (f"{errors['ours'] / min(yardstick):.2f}" if yardstick and "ours" in found else "-") if how == "eager" else ""
        print(f"{name if how == HOW[0] else '':21} {how}{cells}   {ratio_text(row['of_best'][how]):12}  {copy:>7}  {share:>9}".rstrip(), flush=True)
    return row


def sharded(quick):
    H, HKV, lengths = (32, 8, (128 * K, 512 * K)) if GPU else (4, 2, (2 * K, 8 * K))
    cases = {f"sharded decode {size(N)}": (Case(1, H, HKV, N // N_RANKS * N_RANKS),) for N in lengths}
    what = f"B1 {H}/{HKV}, one token, the cache striped over {N_RANKS} ranks" + ("; graph: calls in a row of one CUDA graph; eager: wall time" if GPU else "")
    heading = f"sharded: microseconds per call (GB/s of all ranks), the slowest rank's; {what}"
    return f"{heading}\n{'':27}{columns(('sharded', 'one rank'), 18)}   one/sharded  error to one rank", sharded_row, cases


def sharded_row(name, case):
    q, _, _ = make_decode(name, case)
    caches = [make_cache(name, i, case) for i in range(n_caches(case.needed() // N_RANKS))]
    stripes = [[x[:, RANK::N_RANKS].contiguous() for x in kv] for kv in caches]
    measured = lambda call, caches: attempt("ours", name, lambda _: (timed(call, q, caches), call(q, *caches[0]).to(WIDE)))
    with torch.no_grad():
        many = measured(sharded_decode_attn, stripes)
        one = measured(decode_attn, caches) if RANK == 0 else None
    slowest = torch.tensor([many[0][how] if many else math.inf for how in HOW], dtype=torch.float64, device=DEVICE)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # here the other ranks wait for rank 0
    us = {how: {"one rank": one[0][how]} if one else {} for how in HOW}
    if slowest.isfinite().all():
        us = {how: {"sharded": t} | us[how] for how, t in zip(HOW, slowest.tolist())}
    both = "sharded" in us["eager"] and "one rank" in us["eager"]
    error = ((many[1] - one[1]).norm() / one[1].norm()).item() if both else None
    for how in HOW:
        text = lambda t: f"{t:.1f} ({case.needed() / t / 1e3:.{0 if GPU else 2}f})"
        cells = columns((text(us[how][who]) if who in us[how] else "-" for who in ("sharded", "one rank")), 18)
        ratio, shown = (f"{us[how]['one rank'] / us[how]['sharded']:.2f}", f"{error:.1e}") if both else ("-", "-")
        print(f"{name if how == HOW[0] else '':21} {how}{cells}   {ratio:>11}  {shown if how == HOW[0] else '':>17}".rstrip(), flush=True)
    return dict(name=name, **case._asdict(), needed=case.needed(), us=us, error=error)


if N_RANKS > 1:
    SECTIONS = [sharded]
else:
    SECTIONS = [kernels, small, memory, decode] if GPU else [kernels, schedules, decode]

# -----------------------------------------------------------------------------
# the run


def commit():
    """Short hash of the checkout; None outside of one."""
    with contextlib.suppress(OSError):  # no git here
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer lengths and head dims")
    parser.add_argument("--filter", default="", metavar="TEXT", help='only rows whose name contains this, such as "D128 16k causal"')
    args = parser.parse_args()
    refuse = parser.error if RANK == 0 else lambda text: sys.exit(2)  # one of several ranks tells
    if ring_attn.INTERPRET:
        refuse("TRITON_INTERPRET=1 is set: the interpreter's speed says nothing; unset it")
    sections = [section(args.quick) for section in SECTIONS]
    names = [name for _, _, cases in sections for name in cases]
    if not any(args.filter in name for name in names):
        refuse(f"--filter={args.filter!r} is in no name; there are: {', '.join(names)}")
    if N_RANKS > 1:
        from train import setup

        try:
            setup(argparse.Namespace(device=DEVICE))
        except ValueError as error:
            refuse(str(error))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")

    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is float32 throughout
    card = dict(commit=commit(), gpu=torch.cuda.get_device_name() if GPU else None, torch=torch.__version__, triton=triton.__version__)
    card |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), dtype=str(DTYPE)[6:], n_ranks=N_RANKS)
    print(" | ".join(f"{key} {value}" for key, value in card.items()))
    if not GPU:
        print("no GPU here: the torch path and the schedules at small shapes")
    if N_RANKS == 1:
        print("FLOP: forward 4*B*H*S*S*D, half of it under a causal mask; backward 2.5 times the forward. Inputs are normal, times medians")
        print("of best peer: time of the fastest peer / ours, so above 1 we are faster; fwd+bwd: the sum of both medians")
        print(f"error: relative (Frobenius) to {str(WIDE)[6:]}, of o, or the worst of dq, dk, dv, on one batch item and key/value head; decode: on one sequence")

    rows, status = [], 0
    try:
        for heading, measure_row, cases in sections:
            chosen = [name for name in cases if args.filter in name]
            if chosen:
                print(f"\n{heading() if callable(heading) else heading}", flush=True)
            for name in chosen:
                rows.append(measure_row(name, *cases[name]))
    except KeyboardInterrupt:
        print("\ninterrupted: below is what was measured so far", end="")
        status = 130
    print()
    for reason, failed in FAILED.items():
        print(f"- {reason} ({len(failed)} rows, the first {failed[0]})")
    if args.quick and "flex" in CONTENDERS and kernels in SECTIONS:
        print("- flex: --quick compiles it once per head dim and mask, of the kernels")
    rounded = lambda text: float(f"{float(text):.4g}")
    print(json.dumps(json.loads(json.dumps(card | dict(rows=rows, failed=FAILED)), parse_float=rounded)), flush=True)
    if N_RANKS > 1 and not status:  # interrupted ranks may stand at different collectives, and would wait for each other
        ring_attn.leave_groups()
    sys.exit(status or any(reason.startswith(("ours:", "triton:")) for reason in FAILED))


if __name__ == "__main__":
    main()
