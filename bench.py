"""Speed and error of the attention kernels, beside what a user would pick instead.

    python bench.py                       # one GPU: every length, mask and head dim; on a CPU the torch path, under a minute
    python bench.py --quick               # only 4k and 16k tokens at head dims 64 and 128, flex once per head dim and mask
    python bench.py --filter "D128 16k"   # rows whose name contains this; decode: a few tokens against a long cache
    torchrun --nproc_per_node=2 bench.py  # rings of every schedule, and decoding from a cache that is striped over the ranks
    torchrun --nproc_per_node=2 bench.py --filter "ring zigzag 8k"
    torchrun --nproc_per_node=2 bench.py --trace             # what overlaps: a profile of each rank and a picture, in runs/trace
    torchrun --nproc_per_node=2 bench.py --figures --trace   # everything measured, then the README's pictures, in assets
    python bench.py --figures out.txt     # the pictures, from what an earlier run printed

A card, then one row per case, then why there are dashes; the last line is all of it as JSON. Peers are torch's SDPA
(FlashAttention-2 and cuDNN), compiled flex_attention, and FlashAttention-3 where flash_attn_interface is installed; decoding is
compared with SDPA's FlashAttention-2, autotuned flex_attention and FlashAttention-3's flash_attn_with_kvcache, and its GB/s with
those of a copy. Each gets its tensors in the layout it takes, and all are held to the same float32 truth on the same inputs.
Rings are compared with torch's context_parallel, with ring-flash-attn where it is installed (on torch's kernels, and on
FlashAttention-3's forward), and with our own kernel on one GPU that holds the whole sequence.
"""

import argparse
import contextlib
import functools
import html
import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
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
ASSETS = Path(__file__).parent / "assets"

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


def tried(context, f, *args):
    """(f(*args), None), or (None, why it failed)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with context():  # around all calls: it takes host time that is not the kernel's
                return f(*args), None
        except Exception as error:
            # SDPA raises "No available kernel" and warns why, of the kernels that were not asked for too
            said = [str(w.message).split(" (Triggered")[0] for w in caught if not re.search("because|runtime disabled|deprecated", str(w.message))]
            reason = " ".join(f"{type(error).__name__}: {error} {' '.join(said)}".split())[:200]
    if GPU:
        torch.cuda.empty_cache()  # it may have run out of memory; what its frames held is free by now
    return None, reason


def attempt(who, row, f, *args):
    """f(contender, *args) or, with the reason kept for the end, None: one contender must not stop the others."""
    contender = CONTENDERS[who]
    context = contextlib.nullcontext if contender.backend is None else functools.partial(sdpa_kernel, contender.backend)
    result, reason = tried(context, f, contender, *args)
    if reason:
        FAILED.setdefault(f"{who}: {reason}"[:200], []).append(row)
    return result


def together(who, row, f, context=contextlib.nullcontext):
    """f() on every rank; None on every rank where it fails on any, so that all go on to the same collective."""
    result, reason = tried(context, f)
    reasons = [reason] * N_RANKS
    if N_RANKS > 1:
        dist.all_gather_object(reasons, reason)
    if any(reasons):
        FAILED.setdefault(f"{who}: {next(filter(None, reasons))}"[:200], []).append(row)
        return None
    return result


def slowest(*numbers):
    """The largest of each number over all ranks, which wait for each other here."""
    numbers = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    if N_RANKS > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


# peers on a ring: their schedule is ours of the same name, so they take the same shards


class Peer(NamedTuple):
    library: str
    variant: str
    schedule: str
    f: Callable  # (q, k, v) -> o, in the layout of heads_first
    context: Callable  # what its calls run in
    heads_first: bool = False
    backward: bool = True


@functools.cache
def ring_mesh():
    return torch.distributed.device_mesh.init_device_mesh(DEVICE, (N_RANKS,))


@contextlib.contextmanager
def context_parallel(rotate, backend):
    """Inside, SDPA on (B, H, T, D) is a ring."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    sequence = torch.zeros(1, 2 * N_RANKS, device=DEVICE)  # it must have something to shard; our shards are cut already
    with context_parallel(ring_mesh(), buffers=[sequence], buffer_seq_dims=[1]), sdpa_kernel(backend):
        yield


STAND_IN = {"kernel": None}  # what the stand-ins for flash_attn's functions run


@contextlib.contextmanager
def on_kernel(kernel):
    ring_flash_attn()  # what is not installed should be missed here, before anything is on its way to other ranks
    if kernel == "fa3":
        importlib.import_module("flash_attn_interface")
    STAND_IN["kernel"] = kernel
    yield


@functools.cache
def no_dropout(kernel, device):
    """Seed and offset, of which a backward without dropout reads nothing."""
    shapes, dtype = (((2,), (0,)), torch.uint64) if kernel == "fa2" else (((), ()), torch.int64)
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]


def stand_in_forward(q, k, v, softmax_scale, causal, **unused):
    kernel = STAND_IN["kernel"]
    if kernel == "fa2":
        o, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=softmax_scale)
    elif kernel == "cudnn":
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, causal, False, scale=softmax_scale)
        o, lse = o.transpose(1, 2), lse.reshape(lse.shape[:3])
    else:
        o, lse, *_ = importlib.import_module("flash_attn_interface")._flash_attn_forward(q, k, v, softmax_scale=softmax_scale, causal=causal)
    return o, lse, None, None


def stand_in_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **unused):
    kernel, lse, sizes = STAND_IN["kernel"], softmax_lse.contiguous(), (q.shape[1], k.shape[1])
    seed = no_dropout(kernel, q.device)
    if kernel == "fa2":
        grads = torch.ops.aten._flash_attention_backward(dout, q, k, v, out, lse, None, None, *sizes, 0.0, causal, *seed, scale=softmax_scale)
    else:
        heads, backward = [x.transpose(1, 2) for x in (dout, q, k, v, out)], torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        grads = backward(*heads, lse[..., None], *seed, None, None, None, *sizes, 0.0, causal, scale=softmax_scale)
        grads = [x.transpose(1, 2) for x in grads]
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


@functools.cache
def ring_flash_attn():
    """{schedule: function} of ring-flash-attn, with torch's kernels in the place of flash_attn, and without the adapters that its __init__
    imports, which want transformers."""
    if (found := importlib.util.find_spec("ring_flash_attn")) is None:
        raise ImportError("not installed: pip install --no-deps ring-flash-attn")
    package, flash_attn, interface = map(types.ModuleType, ("ring_flash_attn", "flash_attn", "flash_attn.flash_attn_interface"))
    package.__path__ = list(found.submodule_search_locations)
    interface._flash_attn_forward, interface._flash_attn_backward = stand_in_forward, stand_in_backward
    sys.modules.update({x.__name__: x for x in (package, flash_attn, interface)})
    names = dict(contiguous="ring_flash_attn", zigzag="zigzag_ring_flash_attn", striped="stripe_flash_attn")
    return {schedule: getattr(importlib.import_module(f"ring_flash_attn.{name}"), f"{name}_func") for schedule, name in names.items()}


def ring_peers():
    peers = []
    for rotate, backend in itertools.product(("allgather", "alltoall"), ("cudnn", "fa2")):
        context = functools.partial(context_parallel, rotate, CONTENDERS[backend].backend)
        peers.append(Peer("torch cp", f"{rotate} {backend}", "zigzag", functools.partial(sdpa, causal=True), context, heads_first=True))
    for schedule, kernel in itertools.product(("zigzag", "striped", "contiguous"), ("cudnn", "fa2", "fa3")):
        f = lambda q, k, v, schedule=schedule: ring_flash_attn()[schedule](q, k, v, causal=True)
        peers.append(Peer("ring-flash-attn", kernel, schedule, f, functools.partial(on_kernel, kernel), backward=kernel != "fa3"))
    return peers


PEERS = ring_peers() if GPU else []


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


def ends_us(f, rounds=20):
    """Microseconds from the end of a call to the end of the next, the median. The host may run ahead: only where it is the limit does it show."""
    f()  # its end is where the clock starts
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)] if GPU else [time.perf_counter()]
    if not GPU:
        for _ in range(rounds):
            f()
            ends.append(time.perf_counter())
        return statistics.median(b - a for a, b in zip(ends, ends[1:])) * 1e6
    ends[0].record()
    for end in ends[1:]:
        f()
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
        us["graph"] = ends_us(captured(calls))
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
    cases = {f"small {how} {what}": (how == "graph", what == "fwd+bwd", True) for how in ("eager", "graph") for what in ("fwd", "fwd+bwd")}
    cases["small one thread fwd+bwd"] = (False, True, False)  # as train.py does: see its setup
    heading = f"{'':24}{columns(EAGER, 10)}   of best peer"
    return f"small: microseconds of wall time, the host's included; B1 S2048 H32 D128 causal. one thread: eager, autograd on the caller's\n{heading}", small_row, cases


def small_row(name, graph, backward, threads):
    tensors = make(name, 1, 2 * K, 32, 32, 128)

    def measure_small(contender):
        leaves, do = in_layout(contender, *tensors)
        forward = lambda: contender.f(*leaves, True)
        call = (lambda: torch.autograd.grad(forward(), leaves, do)) if backward else forward
        with torch.set_grad_enabled(backward), torch.autograd.set_multithreading_enabled(threads):
            return wall_us(captured(call) if graph else call)

    times = {who: us for who in EAGER if (us := attempt(who, name, measure_small))}
    print(f"{name:24}{columns((f'{times[who]:.1f}' if who in times else '-' for who in EAGER), 10)}   {ratio_text(of_best(times))}", flush=True)
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
    times = slowest(*(many[0][how] if many else math.inf for how in HOW))  # here the other ranks wait for rank 0
    us = {how: {"one rank": one[0][how]} if one else {} for how in HOW}
    if all(map(math.isfinite, times)):
        us = {how: {"sharded": t} | us[how] for how, t in zip(HOW, times)}
    both = "sharded" in us["eager"] and "one rank" in us["eager"]
    error = ((many[1] - one[1]).norm() / one[1].norm()).item() if both else None
    for how in HOW:
        text = lambda t: f"{t:.1f} ({case.needed() / t / 1e3:.{0 if GPU else 2}f})"
        cells = columns((text(us[how][who]) if who in us[how] else "-" for who in ("sharded", "one rank")), 18)
        ratio, shown = (f"{us[how]['one rank'] / us[how]['sharded']:.2f}", f"{error:.1e}") if both else ("-", "-")
        print(f"{name if how == HOW[0] else '':21} {how}{cells}   {ratio:>11}  {shown if how == HOW[0] else '':>17}".rstrip(), flush=True)
    return dict(name=name, **case._asdict(), needed=case.needed(), us=us, error=error)


RING_CALLS = {"fwd": 2, "fwd+bwd": 7}  # FLOP under a causal mask, over B * H * S * S * D
RING_D = 128 if GPU else 64


def rings(quick):
    heads, mha, lengths = ((32, 8), ((32, 32), (64, 8)), (2 * K, 8 * K, 32 * K, 128 * K)) if GPU else ((4, 2), ((4, 4),), (128, 256))
    some = (8 * K, 32 * K) if GPU else (256,)
    cases = {}
    for T in some if quick else lengths:
        for schedule in ("zigzag", "step", "striped", "contiguous")[: 3 if quick else None]:
            cases[f"ring {schedule} {size(T)}"] = (schedule, T, *heads)
            if schedule == "zigzag" and T in some:
                cases[f"ring zigzag {size(T)} p2p"] = ("zigzag", T, *heads, "p2p")
        for H, HKV in mha if T in some and not quick else ():
            cases[f"ring zigzag {size(T)} {H}/{HKV}"] = ("zigzag", T, H, HKV)

    def heading():
        first = [torch.randn(2, 128, h, RING_D, dtype=DTYPE, device=DEVICE) for h in (heads[0], heads[1], heads[1])]
        together("ours", "the first ring", lambda: ring_attn.ring_attn(*first))
        ring = ring_attn.resolve_ring(None)
        columns = ring_line("", "", "ms", "TFLOP/s", "of ideal", "exposed ms", "launches", f"{'of best peer':30}{'GiB':>6}   error")
        return f"""rings: {N_RANKS} ranks, causal, {heads[0]}/{heads[1]} heads and D{RING_D}, B1 (step: B2), tokens on each rank and whatever is different as named
transport {ring.transport} ({ring.why}), or as named
ms: between the ends of calls in a row, the slowest rank's; all of a row take turns, each library with its fastest variant; medians (of calls over 0.3 s one). Everybody's backward
    runs in the calling thread: autograd's own would be woken for each call here, but once per step in training
TFLOP/s: per rank. of ideal: our kernel on one GPU with the whole sequence (all GPUs at once) over {N_RANKS} times the ring. exposed: beyond the same hops where nothing
moves. launches: kernels on the stream of the attention. of best peer: its time over ours, same schedule (step: zigzag), ring-flash-attn on torch's kernels (fa2,
cudnn) or FlashAttention-3's forward. GiB: peak beyond the inputs, symmetric memory included. error: to one GPU, relative (Frobenius)
{columns}"""

    return heading, ring_row, cases


def ring_line(label, what, ms, tflops, ideal, exposed="", launches="", rest=""):
    return f"{label:24}{what:8}{ms:>10}{tflops:>9}{ideal:>10}{exposed:>12}{launches:>10}   {rest}".rstrip()


def number(x, form=None):
    """As text; without a form as TFLOP/s."""
    return "-" if x is None else format(x, form or (".0f" if x >= 10 else ".3f"))


def ring_call(f, tensors, what):
    """A call of f(q, k, v), with its backward or without."""
    *leaves, do = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call():
        with torch.set_grad_enabled(what == "fwd+bwd"):
            o = f(*leaves)
            return (o, *torch.autograd.grad(o, leaves, do)) if what == "fwd+bwd" else (o,)

    return call


def timed_together(who, row, call, rounds, context=contextlib.nullcontext):
    """Microseconds per call on the slowest rank; None if it fails on any."""

    def timed():
        dist.barrier()
        if GPU:
            torch.cuda.synchronize()
        return ends_us(call, rounds)

    us = together(who, row, timed, context)
    return us and slowest(us)[0]


def in_turns(row, contenders):
    """{who: milliseconds per call}, the median of rounds in which all take turns, each of them first once, as a GPU that has been busy for a
    while is slower. contenders: {who: (call, what it runs in)}. Without those that fail; of calls of over 0.3 s only one is timed."""
    about = {who: timed_together(who, row, call, 1, context) for who, (call, context) in contenders.items()}  # the first calls compile
    found = {who: [us] for who, us in about.items() if us}
    order = list(found)
    for i in range(max(3, len(order))):
        for who in order[i:] + order[:i]:
            us = found[who]
            if about[who] < 3e5:
                us *= i > 0  # the first ones were for the estimate
                us.append(timed_together(who, row, contenders[who][0], int(min(20, max(2, 1e5 / about[who]))), contenders[who][1]))
    return {who: statistics.median(us) / 1e3 for who, us in found.items() if all(us)}


def ring_tflops(what, ms, B, S, H, ranks=N_RANKS):
    return RING_CALLS[what] * B * H * S * S * RING_D / ranks / ms / 1e9


@functools.lru_cache(maxsize=1)  # of long sequences, memory holds one
def whole(T, H, HKV):
    """The sequence of all ranks' tokens on every rank alone: ([q, k, v, do], [o, dq, dk, dv]); None for what fails."""
    name, S = f"one GPU {size(N_RANKS * T)} {H}/{HKV}", N_RANKS * T
    if S > 512 * K:
        FAILED.setdefault("one GPU: more than 512k tokens would take minutes", []).append(f"ring {size(T)}")
        return None, None
    tensors = together(name, "ring", lambda: make(name, 1, S, H, HKV, RING_D))
    return tensors, together(name, "ring", ring_call(ring_attn.flash_attn_func, tensors, "fwd+bwd")) if tensors else None


@functools.lru_cache(maxsize=1)
def fastest_peers(schedule, T, H, HKV):
    """{"fwd", "fwd+bwd": {name: (call, what it runs in)}}: of each library with this schedule, the variant that is fastest in a few calls."""
    best = {what: {} for what in RING_CALLS}
    q, k, v, do = make(f"peers {RANK} {T} {H} {HKV}", 1, T, H, HKV, RING_D)
    for peer in PEERS:
        if peer.schedule != schedule:
            continue
        row, left = f"ring {schedule} {size(T)}", list(RING_CALLS)[: 2 if peer.backward else 1]
        for times_kv in (1, H // HKV) if peer.heads_first and H != HKV else (1,):  # what refuses grouped heads gets them repeated, off the clock
            kv = [x.repeat_interleave(times_kv, 2) for x in (k, v)]
            tensors = [x.transpose(1, 2).contiguous() if peer.heads_first else x for x in (q, *kv, do)]
            name = f"{peer.library} {peer.variant}" + " repeated" * (times_kv > 1)
            for what in list(left):
                call = ring_call(peer.f, tensors, what)
                us = timed_together(name, row, call, 1, peer.context)
                if us and us < 3e5:  # a short one three times: a pause of one of the hosts must not decide
                    us = min(filter(None, [timed_together(name, row, call, 3, peer.context) for _ in range(3 if us < 5e4 else 1)]), default=None)
                if us:
                    left.remove(what)
                    if us < best[what].get(peer.library, (math.inf,))[0]:
                        best[what][peer.library] = us, name, (call, peer.context)
            if not left:
                break
    return {what: {name: how for _, name, how in found.values()} for what, found in best.items()}


SHOWN = set()  # what has a line already


@functools.cache
def silent_ring():
    """A ring on which nothing moves: hops compute with whatever is in their buffers."""
    ring = ring_attn.Ring(dist.group.WORLD, "p2p")
    ring.exchange = lambda *what: lambda: None
    return ring


def profiled(call, calls, path):
    """Events of a Chrome trace of some calls, written to path."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        if GPU:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    found = json.loads(Path(path).read_text())
    base = int(found.get("baseTimeNanoseconds", 0)) / 1e3
    return [event | dict(ts=base + event["ts"]) for event in found["traceEvents"] if event.get("ph") == "X"]


def attention_stream(events):
    """(the stream with most kernels that are not NCCL's, those kernels)."""
    streams = {}
    for event in events:
        if event.get("cat") == "kernel" and "nccl" not in event["name"]:
            streams.setdefault(event["tid"], []).append(event)
    return max(streams.items(), key=lambda x: len(x[1]))


def count_launches(call):
    with tempfile.TemporaryDirectory() as folder:
        return len(attention_stream(profiled(call, 1, Path(folder, "trace.json")))[1])


def peak_bytes(call):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def ring_row(name, schedule, T, H, HKV, transport=None):
    B, S = ring_attn.SCHEDULES[schedule].batch_groups, N_RANKS * T
    mine = lambda x: ring_attn.shard(x if B == 1 else torch.cat([x, x.flip(2)]), schedule, RANK, N_RANKS)  # the second sequence: heads reversed
    sequence, results = whole(T, H, HKV)
    theirs = "zigzag" if schedule == "step" else schedule
    peers = fastest_peers(theirs, T, H, HKV)
    tensors = [mine(x) for x in sequence] if sequence else make(f"{name} {RANK}", B, T, H, HKV, RING_D)
    ring = ring_attn.resolve_ring(None, transport)
    ours = lambda q, k, v: ring_attn.ring_attn(q, k, v, schedule, ring)
    silent = lambda q, k, v: ring_attn.ring_attn(q, k, v, schedule, silent_ring())
    calls = {what: ring_call(ours, tensors, what) for what in RING_CALLS}
    times = {}
    for what, call in calls.items():
        contenders = {"ours": (call, contextlib.nullcontext), "ours where nothing moves": (ring_call(silent, tensors, what), contextlib.nullcontext)}
        if sequence:
            contenders["one GPU"] = ring_call(ring_attn.flash_attn_func, sequence, what), contextlib.nullcontext
        times[what] = in_turns(name, contenders | peers[what])
    of = lambda who: {what: t[who] for what, t in times.items() if who in t and "ours" in t}
    ms, alone = of("ours"), of("one GPU")
    row = dict(name=name, schedule=schedule, transport=ring.transport, B=B, T=T, H=H, HKV=HKV, D=RING_D, ms=ms, one_gpu_ms=alone)
    row["peers"] = {what: {who: times[what][who] for who in peers[what] if who in times[what]} for what in times}
    row["tflops"] = {what: ring_tflops(what, t, B, S, H) for what, t in ms.items()}
    row["of_ideal"] = {what: B * alone[what] / N_RANKS / ms[what] for what in alone}
    row["exposed_ms"] = {what: ms[what] - t for what, t in of("ours where nothing moves").items()}
    row["of_best"] = {what: of_best(dict(ours=t / B) | row["peers"][what]) for what, t in ms.items()}
    row["launches"], row["peak_bytes"], row["errors"] = {}, None, None
    if GPU and len(ms) == len(RING_CALLS):
        counts = {what: together("launches", name, lambda: count_launches(call)) for what, call in calls.items()}
        row["launches"] = {what: max(slowest(n)) for what, n in counts.items() if n is not None}
        peak = together("memory", name, lambda: peak_bytes(calls["fwd+bwd"]))
        row["peak_bytes"] = peak and int(*slowest(peak)) + (ring.memory.local.nbytes if ring.memory else 0)
    if results and len(ms) == len(RING_CALLS):
        error = lambda x, true: ((x.float() - true).norm() / true.norm()).item()
        errors = together("ours", name, lambda: [error(x, mine(true).float()) for x, true in zip(calls["fwd+bwd"](), results, strict=True)])
        if errors:
            row["errors"] = dict(zip(("o", "dq", "dk", "dv"), slowest(*(x if math.isfinite(x) else math.inf for x in errors))))
            if math.inf in row["errors"].values():
                FAILED.setdefault("ours: the result is not finite", []).append(name)

    for label, key, found in [(f"one GPU {size(S)} {H}/{HKV}", (T, H, HKV), {what: {"": t} for what, t in alone.items()})] + [
        (f"  {library}", (library, theirs, T, H, HKV), {what: {who: t for who, t in peers.items() if who.startswith(library)} for what, peers in row["peers"].items()})
        for library in dict.fromkeys(peer.library for peer in PEERS if peer.schedule == theirs)
    ]:  # fmt: skip
        for i, (what, times) in enumerate(() if key in SHOWN else found.items()):
            (who, t), one = next(iter(times.items()), ("", None)), label.startswith("one")
            ideal = None if one or t is None or what not in alone else alone[what] / N_RANKS / t
            tflops = t and ring_tflops(what, t, 1, S, H, 1 if one else N_RANKS)
            print(ring_line("" if i else label, what, number(t, ".3f"), number(tflops), "" if one else number(ideal, ".1%"), rest=who.removeprefix(label.strip())), flush=True)
        SHOWN.add(key)
    for what in RING_CALLS:
        backward = what == "fwd+bwd"
        cell = lambda kind, form=None: number(row[kind].get(what), form)
        errors = " ".join(f"{key} {x:.1e}" for key, x in (row["errors"] or {}).items() if (key != "o") == backward)
        best = ratio_text(row["of_best"].get(what))
        peak = number(row["peak_bytes"] and row["peak_bytes"] / 2**30, ".2f") if backward else ""
        print(ring_line("" if backward else name, what, cell("ms", ".3f"), cell("tflops"), cell("of_ideal", ".1%"), cell("exposed_ms", ".3f"),
                        cell("launches", "g"), f"{best:30}{peak:>6}   {errors}"), flush=True)  # fmt: skip
    if GPU and T == 2 * K and len(ms) == len(RING_CALLS):
        row["graph_ms"] = {}
        for what, call in calls.items():
            us = together("ours in a CUDA graph", name, lambda: ends_us(captured(call)))
            if us:
                row["graph_ms"][what] = slowest(us)[0] / 1e3
        for what, t in row["graph_ms"].items():
            ideal = number(B * alone[what] / N_RANKS / t if what in alone else None, ".1%")
            print(ring_line("  in a CUDA graph" if what == "fwd" else "", what, f"{t:.3f}", number(ring_tflops(what, t, B, S, H)), ideal), flush=True)
    return row


if N_RANKS > 1:
    SECTIONS = [rings, sharded]
else:
    SECTIONS = [kernels, small, memory, decode] if GPU else [kernels, schedules, decode]

# -----------------------------------------------------------------------------
# what overlaps: a profile of every rank

PARTS = ("forward", "rows", "dq", "dkv")  # of a backend
MOVES = dict(keys="keys, values", pass_on="gradients")  # methods of a transport that start copies


@contextlib.contextmanager
def named_parts():
    """Inside, profiles have a range around the launches of each part of a hop loop."""

    def named(f, name):
        def call(*args, **kwargs):
            with torch.profiler.record_function(name):
                return f(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        backends = dict(ring_attn.BACKENDS)
        stack.callback(ring_attn.BACKENDS.update, backends)
        ring_attn.BACKENDS.update({key: tuple(map(named, parts, PARTS)) for key, parts in backends.items()})
        for transport, method in itertools.product(ring_attn.TRANSPORTS.values(), MOVES):
            stack.callback(setattr, transport, method, getattr(transport, method))
            setattr(transport, method, named(getattr(transport, method), MOVES[method]))
        yield


def intervals(events, calls):
    """[lane, start, length, kind] of the last of some calls, in microseconds: kernels by the part that launched them, and copies."""
    named, stream = (*PARTS, *MOVES.values()), attention_stream(events)[0] if GPU else None
    ranges = [event for event in events if event.get("cat") == ("gpu_user_annotation" if GPU else "user_annotation") and event["name"] in named]
    found = []
    for event in events:
        cat, name, start, lane = event.get("cat"), event["name"], event["ts"], event["tid"]
        if cat not in ("kernel", "gpu_memcpy") if GPU else cat != "user_annotation" or name not in PARTS and name != "gloo:recv":
            continue
        moves = cat == "gpu_memcpy" and lane != stream or "nccl" in name or name == "gloo:recv"
        # the last range to begin before it: on a GPU it is inside, on a CPU a message is under way for longer than the range that posted it
        around = [r for r in ranges if r["tid"] == lane and r["ts"] - 0.1 <= start and (not GPU or start < r["ts"] + r["dur"])]
        kind = max(around, key=lambda r: r["ts"])["name"] if around else "forward" if "fwd" in name else None
        if (kind in MOVES.values()) != moves:
            kind = "copy" if moves else "other"
        lane = "copies" if moves else "kernels" if lane == stream or not GPU else "other stream"
        found.append([lane, start, event["dur"], "other" if kind in (None, "rows") else kind])
    kernels = sorted(start for lane, start, *_ in found if lane == "kernels")
    first = kernels[-(len(kernels) // calls)]
    return [x for x in found if x[1] + x[2] > first]


def trace(folder):
    """Profiles calls of forward + backward on every rank into `folder`; returns what `overlap_figure` draws."""
    T, H, HKV, calls = (8 * K, 32, 8, 3) if GPU else (256, 4, 2, 3)
    tensors = make(f"trace {RANK}", 1, T, H, HKV, RING_D)
    call = ring_call(lambda q, k, v: ring_attn.ring_attn(q, k, v, "zigzag"), tensors, "fwd+bwd")
    folder.mkdir(parents=True, exist_ok=True)

    def profile():
        call(), call()
        with named_parts():
            call()
            slowest(0)
            return intervals(profiled(call, calls, folder / f"rank{RANK}.json"), calls)

    mine = together("ours", "trace", profile)
    if mine is None:
        return None
    ranks = [mine] * N_RANKS
    if N_RANKS > 1:
        dist.all_gather_object(ranks, mine)
    first = min(start for rank in ranks for _, start, *_ in rank)  # the clocks of processes on one host agree
    ranks = [[[lane, round(start - first), max(1, round(length)), kind] for lane, start, length, kind in rank] for rank in ranks]
    ring = ring_attn.resolve_ring(None)
    return dict(T=T, H=H, HKV=HKV, D=RING_D, schedule="zigzag", transport=ring.transport, n_ranks=N_RANKS, ranks=ranks)


# -----------------------------------------------------------------------------
# pictures for the README: mid-tones on nothing, which read on white and on dark pages

INK, BLUE, ORANGE, GREEN, PURPLE, GOLD = "#7a7f87", "#2f7fc1", "#d1661a", "#179a76", "#b8629b", "#a8860b"  # told apart by colour-blind eyes too


def svg(path, width, height, parts, footer=""):
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [*parts, label(width - 10, height - 10, footer, "end", 11)]
    path.write_text("\n".join([f'{start} font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">', *parts, "</svg>\n"]))
    print(f"wrote {path}", flush=True)


def label(x, y, text, anchor="start", size=13, weight="normal", color=INK):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}">{html.escape(text)}</text>'


def box(x, y, width, height, color, opacity=1):
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" fill="{color}" fill-opacity="{opacity}"/>'


def line(x, y, to_x, to_y, style='stroke-opacity="0.35"'):
    return f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{INK}" {style}/>'


DASHED = 'stroke-width="1.5" stroke-dasharray="4 3"'


def legend(x, y, entries):
    """A row of (colour, text)."""
    parts = []
    for color, text in entries:
        parts += [box(x, y - 10, 12, 12, color), label(x + 18, y, text)]
        x += 40 + 7 * len(text)
    return parts


def measured_on(found):
    return f"{found['n_ranks']} x {found['gpu'] or 'CPU'} | torch {found['torch']} | commit {found['commit']}"


def ticks(top, n=5):
    """About n round numbers up to top."""
    step = 10 ** math.floor(math.log10(top / n))
    step *= next(m for m in (1, 2, 5, 10) if top / (m * step) <= n)
    return [i * step for i in range(int(top / step) + 1)]


def schedules_figure(folder, n_ranks=4):
    """Rank x hop: whose keys are at hand, and how much of the scores with them a rank computes."""
    parts = [label(20, 28, f"One attention, forward, causal, on {n_ranks} ranks: whose keys are there at each hop, and the share of scores computed", size=14)]
    for i, schedule in enumerate(ring_attn.SCHEDULES):
        left, top = 20 + i % 2 * 430, 70 + i // 2 * 235
        parts.append(label(left, top, schedule, size=15, weight="bold"))
        parts += [label(left + 60 + 70 * j, top + 22, f"hop {j}", size=12) for j in range(n_ranks)] + [label(left + 400, top + 22, "work", "end", 12)]
        shares = ring_attn.work(schedule, n_ranks)
        total = sum(share for row in shares for _, share in row)
        for rank, row in enumerate(shares):
            y = top + 32 + 44 * rank
            parts.append(label(left, y + 28, f"rank {rank}", size=12))
            for j, (source, share) in enumerate(row):
                x = left + 60 + 70 * j
                parts += [label(x, y + 12, f"k{source}" if share else "nothing", size=11), box(x, y + 17, 60, 14, INK, 0.15)]
                parts += [box(x, y + 17, 60 * share, 14, BLUE)] if share else []
            parts.append(label(left + 400, y + 28, f"{sum(share for _, share in row) / total:.0%}", "end", 12))
    svg(folder / "schedules.svg", 870, 545, parts, "k2: keys of rank 2; a full bar: every query sees every key | from the plans that the hop loops follow")


def throughput_figure(found, rows):
    """Bars for tokens per GPU, forward and forward + backward."""
    who = {"ours": BLUE, "torch cp": ORANGE, "ring-flash-attn": GREEN}
    names = ["this project, zigzag", "torch context_parallel", "ring-flash-attn, zigzag"]
    bars, ideal = {}, {}  # {(what, T): {who: TFLOP/s}}
    for row, what in itertools.product(rows, RING_CALLS):
        rates = {"ours": row["tflops"].get(what)}
        for peer, ms in row["peers"].get(what, {}).items():
            library = next(x for x in who if peer.startswith(x))
            rates[library] = max(rates.get(library, 0), row["tflops"][what] * row["ms"][what] / ms) if what in row["ms"] else 0
        bars[what, row["T"]] = {key: rate for key, rate in rates.items() if rate}
        if what in row["of_ideal"]:
            ideal[what, row["T"]] = row["tflops"][what] / row["of_ideal"][what]
    top = 1.08 * max(itertools.chain(ideal.values(), *(x.values() for x in bars.values())))
    parts, height = legend(60, 28, [*zip(who.values(), names)]), 250
    parts += [line(660, 24, 684, 24, DASHED), label(690, 28, "one GPU with the whole sequence")]
    for i, what in enumerate(RING_CALLS):
        left, base, width = 60 + 450 * i, 330, 400
        parts.append(label(left, 62, {"fwd": "forward", "fwd+bwd": "forward + backward"}[what] + ", TFLOP/s per GPU", size=14, weight="bold"))
        for tick in ticks(top):
            y = base - height * tick / top
            parts += [line(left, y, left + width, y), label(left - 6, y + 4, f"{tick:g}", "end", 11)]
        for j, row in enumerate(rows):
            x, at = left + width * (j + 0.1) / len(rows), (what, row["T"])
            step = width * 0.8 / len(rows) / len(who)
            for n, (key, color) in enumerate(who.items()):
                if rate := bars[at].get(key):
                    y = height * rate / top
                    inside = dict(y=base - y + 14, color="#ffffff", weight="bold") if y > 24 else dict(y=base - y - 4)
                    parts += [box(x + n * step, base - y, step - 4, y, color), label(x + (n + 0.5) * step - 2, text=f"{rate:.0f}", anchor="middle", size=11, **inside)]
            if at in ideal:
                y = base - height * ideal[at] / top
                parts.append(line(x - 4, y, x + 3 * step, y, DASHED))
            parts.append(label(x + 1.5 * step - 2, base + 18, f"{size(row['T'])} per GPU", "middle", 12))
    first = rows[0]
    what = f"{first['H']}/{first['HKV']} heads, D{first['D']}, {found['dtype']}, causal, transport {first['transport']}; peers: the fastest of their variants"
    svg(ASSETS / "throughput.svg", 940, 400, [*parts, label(10, 390, what, size=11)], measured_on(found))


def overlap_figure(path, found):
    """A band for each rank: its kernels, and the copies that bring keys, values and gradients from other ranks."""
    data, colors = found["trace"], dict(forward=BLUE, dq=ORANGE, dkv=GREEN, other=INK)
    colors |= {"keys, values": PURPLE, "copy": PURPLE, "gradients": GOLD}
    end = max(start + length for rank in data["ranks"] for _, start, length, _ in rank)
    left, width, y = 130, 800, 90
    present = {kind for rank in data["ranks"] for *_, kind in rank}
    what = f"forward + backward, {data['schedule']}, {size(data['T'])} tokens per GPU, {data['H']}/{data['HKV']} heads, D{data['D']}, causal, transport {data['transport']}"
    parts = [label(20, 28, what, size=14), *legend(20, 56, [(color, kind) for kind, color in colors.items() if kind in present])]
    for rank, spans in enumerate(data["ranks"]):
        parts.append(label(10, y + 15, f"rank {rank}", weight="bold"))
        for lane in ("kernels", "copies", "other stream"):
            if mine := [x for x in spans if x[0] == lane]:
                parts += [label(left - 8, y + 15, lane, "end", 12), box(left, y, width, 20, INK, 0.12)]
                for _, start, length, kind in mine:
                    parts.append(box(left + width * max(0, start) / end, y, width * length / end, 20, colors[kind]))
                y += 24
        y += 14
    for tick in ticks(end / 1e3, 8):
        x = left + width * tick * 1e3 / end
        parts += [line(x, 84, x, y), label(x, y + 16, f"{tick:g}", "middle", 11)]
    svg(path, left + width + 30, y + 50, [*parts, label(left - 8, y + 16, "ms", "end", 11)], measured_on(found))


def figures(runs):
    """The README's pictures, from what runs have found that were made on GPUs: throughput from all that name the machine and
    the commit of the first one that measured it, the overlap from the first with a trace."""
    ASSETS.mkdir(exist_ok=True)
    schedules_figure(ASSETS)
    runs = [found for found in runs if found.get("gpu")]
    shown = re.compile(r"ring zigzag (2|8|32)k")
    rows = lambda found: [row for row in found["rows"] if shown.fullmatch(row["name"]) and row["ms"]]
    card = lambda found: [value for name, value in found.items() if name not in ("rows", "trace", "failed")]
    timed, traced = next(filter(rows, runs), None), next((found for found in runs if found.get("trace")), None)
    if timed:
        throughput_figure(timed, [row for found in runs if card(found) == card(timed) for row in rows(found)])
    if traced:
        overlap_figure(ASSETS / "overlap.svg", traced)
    for name, found, flag in (("throughput", timed, '--filter "ring zigzag"'), ("overlap", traced, "--trace")):
        if not found:
            print(f"no {name}.svg: it takes torchrun --nproc_per_node=2 bench.py --figures {flag}, on GPUs, or --figures FILE with what that has printed")


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
    parser.add_argument("--trace", nargs="?", const="runs/trace", metavar="FOLDER",
                        help="profile forward + backward on each rank: Chrome traces and overlap.svg (default folder runs/trace); rows only with another flag")
    parser.add_argument("--figures", nargs="*", metavar="FILE",
                        help="draw the README's pictures into assets, from this run, or from the saved output of earlier ones")  # fmt: skip
    args = parser.parse_args()
    refuse = parser.error if RANK == 0 else lambda text: sys.exit(2)  # one of several ranks tells
    if ring_attn.INTERPRET:
        refuse("TRITON_INTERPRET=1 is set: the interpreter's speed says nothing; unset it")
    sections = [section(args.quick) for section in SECTIONS]
    names = [name for _, _, cases in sections for name in cases]
    if not any(args.filter in name for name in names):
        refuse(f"--filter={args.filter!r} is in no name; there are: {', '.join(names)}")
    if args.figures or args.figures is not None and not args.trace and not (GPU and N_RANKS > 1):
        try:
            runs = [json.loads(Path(file).read_text().strip().splitlines()[-1]) for file in args.figures]
        except (OSError, ValueError, IndexError) as error:
            refuse(f"--figures: the last line of a FILE must be the JSON of a run: {error}")
        return figures(runs) if RANK == 0 else None
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

    rows, status, found = [], 0, {}
    only_trace = args.trace and not (args.quick or args.filter or args.figures is not None)
    try:
        for heading, measure_row, cases in () if only_trace else sections:
            chosen = [name for name in cases if args.filter in name]
            if chosen:
                print(f"\n{heading() if callable(heading) else heading}", flush=True)
            for name in chosen:
                rows.append(measure_row(name, *cases[name]))
        if args.trace:
            found["trace"] = trace(Path(args.trace))
    except KeyboardInterrupt:
        print("\ninterrupted: below is what was measured so far", end="")
        status = 130
    print()
    for reason, failed in FAILED.items():
        print(f"- {reason} ({len(failed)} rows, the first {failed[0]})")
    if args.quick and "flex" in CONTENDERS and kernels in SECTIONS:
        print("- flex: --quick compiles it once per head dim and mask, of the kernels")
    rounded = lambda text: float(f"{float(text):.4g}")
    found = card | dict(rows=rows, failed=FAILED) | found
    if RANK == 0 and not status:
        if found.get("trace"):
            overlap_figure(Path(args.trace) / "overlap.svg", found)
        if args.figures is not None:
            figures([found])
    print(json.dumps(json.loads(json.dumps(found), parse_float=rounded)), flush=True)
    if N_RANKS > 1 and not status:  # interrupted ranks may stand at different collectives, and would wait for each other
        ring_attn.leave_groups()
    sys.exit(status or any(reason.startswith(("ours:", "triton:")) for reason in FAILED))


if __name__ == "__main__":
    main()
