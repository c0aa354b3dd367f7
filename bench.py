"""Speed and error of the attention kernels, beside what a user would pick instead.

    python bench.py                       # one GPU: kernels, memory, decoding
    python bench.py --quick               # 4k and 16k tokens at head dims 64 and 128, fewer rows of decoding
    python bench.py --filter "D128 16k"   # rows whose name contains this
    torchrun --nproc_per_node=2 bench.py  # rings, and decoding from a cache striped over the ranks
    torchrun --nproc_per_node=2 bench.py --filter "ring zigzag 8k"
    torchrun --nproc_per_node=2 bench.py --trace             # profiles of all ranks, a picture, in runs/trace
    torchrun --nproc_per_node=2 bench.py --figures --trace   # all rows, then the README's pictures
    python bench.py --figures out.txt     # the pictures, from what an earlier run printed

It prints a card, tables, the reason for each dash, and all numbers as JSON in the last line. On a CPU its
rows, at small shapes, check that everything works. They take less than a minute, and say nothing of speed.

Peers are torch's SDPA (FlashAttention-2, cuDNN), compiled flex_attention, and FlashAttention-3 if
flash_attn_interface is installed; of rings, torch's context_parallel, and ring-flash-attn if it is installed,
on torch's kernels and on FlashAttention-3's forward. Each gets its tensors in the layout that it takes.
"""

import argparse
import contextlib
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
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import ring_attn
from decode import capture, decode_attn, sharded_decode_attn
from train import setup

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, TRUE_DTYPE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)
RANK, N_RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
K = 1024
RATE, FLOP_PER_MS = ("TFLOP/s", 1e9) if GPU else ("GFLOP/s", 1e6)
ASSETS = Path(__file__).parent / "assets"

# -----------------------------------------------------------------------------
# contenders: (q, k, v, causal=...) -> o


def sdpa(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@cache
def compiled_flex(mode=None):
    torch._dynamo.config.recompile_limit = 256  # each shape is a compile of its own
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    torch._inductor.config.autotune_num_choices_displayed = 0  # no tables between our rows
    return torch.compile(flex_attention, dynamic=False, mode=mode)


@cache
def causal_blocks(S):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=DEVICE)


def flex(q, k, v, causal):
    blocks = causal_blocks(q.shape[2]) if causal else None
    return compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def fa3(q, k, v, causal):
    from flash_attn_interface import flash_attn_func

    return without_lse(flash_attn_func(q, k, v, causal=causal))


def without_lse(o):
    return o[0] if isinstance(o, tuple) else o  # some builds return lse as well


# decoding: (shape, lengths, page table) -> a function (q, k, v) -> o, or None for what it cannot do


class DecodeShape(NamedTuple):
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
        """Bytes of the keys and values that a call must read."""
        most = self.window + self.M - 1 if self.window else self.N
        seen = sum(min(L, most) for L in self.lengths or [self.N] * self.B)
        return 2 * seen * self.HKV * self.D * DTYPE.itemsize


def decode_ours(shape, lengths, table):
    return partial(decode_attn, cache_seqlens=lengths, window=shape.window, page_table=table)


def decode_sdpa(shape, lengths, table):
    if lengths is not None:
        return None
    bias = causal_lower_right(shape.M, shape.N) if shape.M > 1 else None
    attend = partial(F.scaled_dot_product_attention, attn_mask=bias, enable_gqa=shape.H != shape.HKV)
    if shape.window:  # to a single query it is a slice, which moves with every token
        return lambda q, k, v: attend(q, k[:, :, -shape.window :], v[:, :, -shape.window :])
    return attend


def decode_flex(shape, lengths, table):
    if table is not None:
        return None
    first, window = shape.N - shape.M, shape.window  # the position of the first query

    def seen(b, h, i, j):
        return i + first >= j if lengths is None else j < lengths[b]

    def seen_in_window(b, h, i, j):
        return (i + first >= j) & (i + first < j + window)

    mask_mod, n = seen_in_window if window else seen, None if lengths is None else shape.B
    # made for a block of 128 queries, or no block of keys would count as full; then used for M
    made = create_block_mask(mask_mod, n, None, 128, shape.N, device=DEVICE)
    blocks = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    sizes = dict(BLOCK_SIZE=made.BLOCK_SIZE, seq_lengths=(shape.M, shape.N))
    mask = BlockMask.from_kv_blocks(*blocks, mask_mod=mask_mod, **sizes)
    attend = compiled_flex("max-autotune-no-cudagraphs")
    return partial(attend, block_mask=mask, enable_gqa=shape.H != shape.HKV)


def decode_fa3(shape, lengths, table):
    from flash_attn_interface import flash_attn_with_kvcache

    window = (shape.window - 1, 0) if shape.window else (-1, -1)
    options = dict(causal=shape.M > 1 or shape.window is not None, window_size=window)
    options |= dict(cache_seqlens=lengths, page_table=table)
    return lambda q, k, v: without_lse(flash_attn_with_kvcache(q, k, v, **options))


class Contender(NamedTuple):
    f: Callable
    heads_first: bool = False  # takes and returns (B, H, S, D), not (B, S, H, D)
    context: Callable = nullcontext  # what its calls run in
    decode: Callable | None = None

    def turn(self, x):
        """(B, S, H, D) into the contender's layout, or back."""
        return x.transpose(1, 2) if self.heads_first else x

    def call(self, tensors, what, causal=True):
        return attention_call(partial(self.f, causal=causal), [*map(self.turn, tensors)], what)


FLASH, CUDNN = (partial(sdpa_kernel, x) for x in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
CONTENDERS = {"ours": Contender(ring_attn.flash_attn_func, decode=decode_ours)}
if GPU:
    if len(ring_attn.BACKENDS) > 2:  # ours is the fastest of them; this is what every GPU can run
        CONTENDERS["triton"] = Contender(partial(ring_attn.ring_attn, group=None, backend="triton"))
    CONTENDERS["fa2"] = Contender(sdpa, True, FLASH, decode_sdpa)
    CONTENDERS["cudnn"] = Contender(sdpa, True, CUDNN)
    CONTENDERS["flex"] = Contender(flex, True, decode=decode_flex)
    CONTENDERS["fa3"] = Contender(fa3, decode=decode_fa3)
else:
    CONTENDERS["sdpa"] = Contender(sdpa, True, FLASH, decode_sdpa)
EAGER = [who for who in CONTENDERS if who != "flex"]
DECODERS = [who for who in CONTENDERS if CONTENDERS[who].decode]

FAILED = {}  # "contender: reason" -> names of the rows that show a dash for it


def attempt(who, row, f, *args, context=nullcontext, all_ranks=False):
    """f(*args), or None if it fails: one contender must not stop the others. FAILED keeps the reason.

    all_ranks: every rank calls this, and all get None if it fails on any."""
    result = reason = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with context():  # around all calls: it takes host time that is not the kernel's
                result = f(*args)
        except Exception as error:
            # SDPA raises "No available kernel" and warns why, also of kernels that were not asked for
            said = [str(w.message).split(" (Triggered")[0] for w in caught]
            said = [text for text in said if not re.search("because|runtime disabled|deprecated", text)]
            reason = " ".join(f"{type(error).__name__}: {error} {' '.join(said)}".split())[:200]
    if reason and GPU:
        torch.cuda.empty_cache()  # it may have run out of memory; what its frames held is free by now
    reasons = [reason] * (N_RANKS if all_ranks else 1)
    if len(reasons) > 1:
        dist.all_gather_object(reasons, reason)
    if any(reasons):
        FAILED.setdefault(f"{who}: {next(filter(None, reasons))}"[:200], []).append(row)
        return None
    return result


def of_each(names, row, f, *args):
    """{who: f(contender, *args)} of those contenders that do not fail."""
    found = {}
    for who in names:
        contender = CONTENDERS[who]
        found[who] = attempt(who, row, f, contender, *args, context=contender.context)
    return {who: x for who, x in found.items() if x is not None}


def slowest(*numbers):
    """The largest of each number over all ranks, which wait for each other here."""
    numbers = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    if N_RANKS > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


# -----------------------------------------------------------------------------
# peers on a ring: their schedule is ours of the same name, so they take the same shards


class Peer(NamedTuple):
    library: str
    variant: str
    schedule: str
    f: Callable  # (q, k, v) -> o, in the layout of heads_first
    context: Callable  # what its calls run in
    heads_first: bool = False
    backward: bool = True


COMMON = "zigzag"  # the schedule of every peer; ours is timed over p2p and with other heads too
ring_mesh = cache(dist.device_mesh.init_device_mesh)


@contextlib.contextmanager
def context_parallel(rotate, kernel):
    """Inside, SDPA on (B, H, T, D) is a ring."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    sequence = torch.zeros(1, 2 * N_RANKS, device=DEVICE)  # it wants something to shard; ours is sharded
    mesh = ring_mesh(DEVICE, (N_RANKS,))
    with context_parallel(mesh, buffers=[sequence], buffer_seq_dims=[1]), CONTENDERS[kernel].context():
        yield


STAND_IN = {"kernel": None}  # what the stand-ins for flash_attn's functions run


@contextlib.contextmanager
def on_kernel(kernel):
    ring_flash_attn()  # what is not installed is missed here, before anything is on its way to other ranks
    if kernel == "fa3":
        importlib.import_module("flash_attn_interface")
    STAND_IN["kernel"] = kernel
    yield


@cache
def no_dropout(kernel, device):
    """Seed and offset, which a backward without dropout does not read."""
    if kernel == "fa2":
        return [torch.zeros(n, dtype=torch.uint64, device=device) for n in (2, 0)]
    return [torch.zeros((), dtype=torch.int64, device=device)] * 2


def stand_in_forward(q, k, v, softmax_scale, causal, **unused):
    kernel, aten = STAND_IN["kernel"], torch.ops.aten
    if kernel == "fa2":
        options = q.shape[1], k.shape[1], 0.0, causal, False
        o, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, *options, scale=softmax_scale)
    elif kernel == "cudnn":
        heads, options = [x.transpose(1, 2) for x in (q, k, v)], (None, True, 0.0, causal, False)
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads, *options, scale=softmax_scale)
        o, lse = o.transpose(1, 2), lse.reshape(lse.shape[:3])
    else:
        from flash_attn_interface import _flash_attn_forward

        o, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=softmax_scale, causal=causal)
    return o, lse, None, None


def stand_in_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **unused):
    kernel, aten, lse = STAND_IN["kernel"], torch.ops.aten, softmax_lse.contiguous()
    tensors, options = (dout, q, k, v, out), (q.shape[1], k.shape[1], 0.0, causal)
    seed = no_dropout(kernel, q.device)
    if kernel == "fa2":
        options = None, None, *options, *seed
        grads = aten._flash_attention_backward(*tensors, lse, *options, scale=softmax_scale)
    else:
        backward = aten._scaled_dot_product_cudnn_attention_backward
        tensors = [x.transpose(1, 2) for x in tensors]
        grads = backward(*tensors, lse[..., None], *seed, None, None, None, *options, scale=softmax_scale)
        grads = [x.transpose(1, 2) for x in grads]
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


@cache
def ring_flash_attn():
    """{schedule: function} of ring-flash-attn, with the stand-ins as flash_attn, and without its __init__,
    whose adapters want transformers."""
    if (found := importlib.util.find_spec("ring_flash_attn")) is None:
        raise ImportError("not installed: pip install --no-deps ring-flash-attn")
    names = "ring_flash_attn", "flash_attn", "flash_attn.flash_attn_interface"
    package, flash_attn, interface = map(types.ModuleType, names)
    package.__path__ = list(found.submodule_search_locations)
    interface._flash_attn_forward, interface._flash_attn_backward = stand_in_forward, stand_in_backward
    sys.modules.update(zip(names, (package, flash_attn, interface)))
    functions = {}
    for schedule, name in dict(contiguous="ring", zigzag="zigzag_ring", striped="stripe").items():
        module = importlib.import_module(f"ring_flash_attn.{name}_flash_attn")
        functions[schedule] = getattr(module, f"{name}_flash_attn_func")
    return functions


def call_ring_flash_attn(schedule, q, k, v):
    return ring_flash_attn()[schedule](q, k, v, causal=True)


PEERS = []
if GPU:
    for rotate, kernel in itertools.product(("allgather", "alltoall"), ("cudnn", "fa2")):
        f, context = partial(sdpa, causal=True), partial(context_parallel, rotate, kernel)
        PEERS.append(Peer("torch cp", f"{rotate} {kernel}", "zigzag", f, context, heads_first=True))
    for schedule, kernel in itertools.product(("zigzag", "striped", "contiguous"), ("cudnn", "fa2", "fa3")):
        f, context = partial(call_ring_flash_attn, schedule), partial(on_kernel, kernel)
        PEERS.append(Peer("ring-flash-attn", kernel, schedule, f, context, backward=kernel != "fa3"))
LIBRARIES = list(dict.fromkeys(peer.library for peer in PEERS))

# -----------------------------------------------------------------------------
# measuring


def generator(name):
    """Each row has inputs of its own, the same in every run."""
    return torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=DTYPE, device=DEVICE)


def make(name, B, S, H, HKV, D):
    """q, k, v, do."""
    g = generator(name)
    return [normal(g, B, S, heads, D) for heads in (H, HKV, HKV, H)]


def attention_call(f, tensors, what):
    """A function that returns f(q, k, v), with gradients if what="fwd+bwd"; tensors: q, k, v, do."""
    *inputs, do = tensors
    inputs = [x.detach().requires_grad_(what == "fwd+bwd") for x in inputs]

    def call():
        o = f(*inputs)
        return (o, *torch.autograd.grad(o, inputs, do)) if what == "fwd+bwd" else (o,)

    return call


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def wall_us(f, calls=50, rounds=5):
    """Microseconds per call, the host's work included: the median of rounds of many calls."""
    times = []
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
    rep = max(100, 5 * wall_us(f, calls=1, rounds=1) / 1e3)  # five calls even of the longest
    return triton.testing.do_bench(f, rep=rep, return_mode="median")


def ends_us(f, rounds=20):
    """Median microseconds from the end of a call to that of the next. The host's time shows if it limits."""
    if not GPU:
        return wall_us(f, 1, rounds)
    f()  # its end is where the clock starts
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    ends[0].record()
    for end in ends[1:]:
        f()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(ends)) * 1e3


def graph_us(f):
    """The same, of a CUDA graph of f()."""
    return ends_us(capture(f)[0])


def n_caches(needed):
    """How many caches of `needed` bytes make four times L2: calls on them in turn find it cold."""
    return min(16, -(-4 * torch.cuda.get_device_properties().L2_cache_size // needed)) if GPU else 1


HOW = ("graph", "eager") if GPU else ("eager",)  # calls of decoding are timed


def decode_us(call, q, caches):
    """{how: microseconds per call} of call(q, k, v) on caches [(k, v)] in turn, eight times or more."""
    caches = caches * -(-8 // len(caches))

    def calls():
        return [call(q, k, v) for k, v in caches]

    us = dict(eager=wall_us(calls, calls=max(1, 48 // len(caches)) if GPU else 1))
    if GPU:
        us["graph"] = graph_us(calls)
    return {how: us[how] / len(caches) for how in HOW}


@cache
def copy_gbs():
    """GB/s, read and written, of a copy of 1 GiB: the most that memory gives in practice."""
    x = torch.randn(2**29, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6


def peak_bytes(call):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def relative_error(x, true):
    """In the Frobenius norm; raises ValueError where x is not finite."""
    error = ((x.to(true.dtype) - true).norm() / true.norm()).item()
    if not math.isfinite(error):
        raise ValueError("the result is not finite")
    return error


# -----------------------------------------------------------------------------
# tables. A section is a title, a function, and {row name: arguments}. function(row name, *arguments) measures
# and returns lines, {heading: text, number, or None for a dash}, which are printed and go into the JSON

LEFT = {"name": 25, "what": 15, "best peer": 15, "variants": 0}  # widths of the columns of text


def print_line(line):
    cells = []
    for heading, x in line.items():
        if not isinstance(x, str):
            x = "-" if x is None else f"{x:.0f}" if x >= 1e4 else f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.4g}"
        cells.append(x.ljust(LEFT[heading]) if heading in LEFT else x.rjust(max(8, len(heading))))
    print("  ".join(cells).rstrip(), flush=True)


def of_best(values, better=min):
    """How many times as good as the best peer ours is, and that peer. values: {contender: number}."""
    peers = {who: x for who, x in values.items() if who not in ("ours", "triton")}
    best, ratio = better(peers, key=peers.get, default=None), None
    if best and peers[best] and values.get("ours"):
        ratio = peers[best] / values["ours"] if better is min else values["ours"] / peers[best]
    return {"of best": ratio, "best peer": best}


def compare(name, what, values, names, better=min):
    """The line of one measurement, with each contender's value."""
    return {"name": name, "what": what} | {who: values.get(who) for who in names} | of_best(values, better)


def size(S):
    return f"{S // K}k" if S % K == 0 else f"{S}"


def kernels(quick):
    masks, heads, flexed = (True, False), [(D, 2048 // D) for D in (64, 128)], set()
    if GPU:
        lengths = 512, K, 2 * K, 4 * K, 8 * K, 16 * K, 64 * K
        shapes = [(D, S, H, H, causal) for D, H in heads for S in lengths for causal in masks]
        shapes += [(128, S, 32, 8, causal) for S in (8 * K, 16 * K) for causal in masks]
        shapes += [(D, 4 * K, 2048 // D, 2048 // D, True) for D in (80, 96, 192, 256)]
        shapes = [s for s in shapes if not quick or s[0] in (64, 128) and s[1] in (4 * K, 16 * K)]
        title = "B*S = 16384 tokens (at 64k 65536), H*D = 2048, or H/HKV as named; L2 cache cold"
    else:
        some, title = ((512, 4), (512, 2)) if quick else ((512, 4), (512, 2), (K, 4)), "B1 H4"
        shapes = [(64, S, 4, HKV, causal) for S, HKV in some for causal in masks]
    rows = {}
    for D, S, H, HKV, causal in shapes:
        name = f"D{D} {size(S)} {'causal' if causal else 'full'}" + (f" {H}/{HKV}" if H != HKV else "")
        B = max(1, 16 * K // S) if GPU else 1
        rows[name] = (B, S, H, HKV, D), causal, flexed if quick else set()
    return f"kernels: {title}", kernel_row, rows


def true_results(q, k, v, do, causal):
    """Of the reference in ring_attn.py, which takes blocks of queries: (S, S) scores never exist."""
    f = partial(ring_attn.ring_attn, group=None, causal=causal, backend="torch")
    o, *grads = attention_call(f, [x.to(TRUE_DTYPE) for x in (q, k, v, do)], "fwd+bwd")()
    return dict(fwd=[o.detach()], bwd=grads)


def measure(contender, what, tensors, causal, truth):
    """(ms, the largest relative error of o, or of dq, dk and dv) of what="fwd" or "bwd"."""
    call = contender.call(tensors, "fwd", causal)
    if what == "bwd":
        *inputs, do = map(contender.turn, tensors)
        inputs = [x.detach().requires_grad_() for x in inputs]
        o = contender.f(*inputs, causal=causal)
        call = partial(torch.autograd.grad, o, inputs, do, retain_graph=True)
    ms, results = median_ms(call), call()
    pairs = zip(map(contender.turn, results), truth[what], strict=True)
    return ms, max(relative_error(x[-1:, :, -true.shape[2] :], true) for x, true in pairs)


def kernel_row(name, shape, causal, flexed):
    """flexed: the (D, causal) for which flex is left out."""
    (B, S, H, HKV, D), tensors = shape, make(name, *shape)
    # the truth of one batch item and key/value head, the last, where offsets are largest
    truth = true_results(*(x[-1:, :, -(x.shape[2] // HKV) :] for x in tensors), causal)
    ms, errors = dict(fwd={}, bwd={}), dict(fwd={}, bwd={})
    for who, contender in CONTENDERS.items():
        for what in () if who == "flex" and (D, causal) in flexed else ms:
            args = contender, what, tensors, causal, truth
            found = attempt(who, name, measure, *args, context=contender.context)
            if found is None:
                break  # without a forward there is no backward
            ms[what][who], errors[what][who] = found
    flexed.add((D, causal))
    ms["fwd+bwd"] = {who: ms["fwd"][who] + t for who, t in ms["bwd"].items()}
    lines = []
    for (what, times), products in zip(ms.items(), (2, 5, 7)):
        flop = 2 * products * B * H * S * S * D / (2 if causal else 1)
        rates = {who: flop / t / FLOP_PER_MS for who, t in times.items()}
        lines.append(compare(name, f"{what} {RATE}", rates, CONTENDERS, max))
    return lines + [compare(name, f"{what} error", x, CONTENDERS) for what, x in errors.items()]


def small(quick):
    calls = itertools.product(("eager", "graph"), ("fwd", "fwd+bwd"))
    rows = {f"small {how} {what}": (how == "graph", what, True) for how, what in calls}
    rows["small one thread fwd+bwd"] = False, "fwd+bwd", False  # as in train.py: see its setup
    title = """small: microseconds of wall time, the host's included; B1 S2048 H32 D128 causal
one thread: eager, with autograd in the thread that calls"""
    return title, small_row, rows


def small_row(name, graph, what, threads):
    tensors = make(name, 1, 2 * K, 32, 32, 128)

    def measure_small(contender):
        call = contender.call(tensors, what)
        with torch.autograd.set_multithreading_enabled(threads):
            return wall_us(capture(call)[0] if graph else call)

    return [compare(name, "us", of_each(EAGER, name, measure_small), EAGER)]


def memory(quick):
    rows = {f"memory {size(T)}": (T,) for T in (32 * K, 64 * K, 128 * K, 256 * K)}
    return "memory: peak of forward + backward beyond the inputs; B1 H8 D128 causal", memory_row, rows


def memory_row(name, T):
    tensors = make(name, 1, T, 8, 8, 128)

    def measure_memory(contender):
        return peak_bytes(contender.call(tensors, "fwd+bwd"))

    peaks, units = of_each(EAGER, name, measure_memory), {"GiB": 2**30, "MiB / 1k": K * T}
    return [compare(name, unit, {who: x / n for who, x in peaks.items()}, EAGER) for unit, n in units.items()]


def schedules(quick):
    rows = {f"schedule {schedule}": (schedule, 4) for schedule in ring_attn.SCHEDULES}
    rows["schedule none"] = next(iter(ring_attn.SCHEDULES)), 1
    title = """schedules: forward + backward of four ranks in turn on this CPU (none: of one); B2 S512 H4 D64
causal. rank 0 to 3: shares of the scores"""
    return title, schedule_row, rows


def schedule_row(name, schedule, n_ranks):
    ring, tensors = ring_attn.VirtualRing(n_ranks), make(name, 2, 512, 4, 4, 64)
    f = partial(ring_attn.ring_attn, schedule=schedule, group=ring, backend="torch")
    line = {"name": name, "ms": median_ms(attention_call(f, tensors, "fwd+bwd"))}
    for rank, share in enumerate(work_shares(schedule, n_ranks)):
        line[f"rank {rank}"] = share
    return [line]


def work_shares(schedule, n_ranks):
    """Each rank's share of the scores of a causal forward."""
    work = [sum(share for _, share in hops) for hops in ring_attn.work(schedule, n_ranks)]
    return [x / sum(work) for x in work]


def decode(quick):
    if GPU:
        shapes = (1, 32, 8, 8), (1, 32, 8, 128), (8, 32, 8, 8), (8, 64, 8, 32)
        shapes += (64, 32, 8, 8), (16, 32, 1, 16), (16, 16, 16, 8), (16, 24, 8, 16)
        rows = {f"decode B{B} {H}/{HKV} {N}k": DecodeShape(B, H, HKV, N * K) for B, H, HKV, N in shapes}
        rows["decode ragged"] = DecodeShape(32, 32, 8, 128 * K, lengths=[512] * 31 + [128 * K])
        rows["decode pages"] = DecodeShape(8, 32, 8, 8 * K, lengths=[8 * K] * 8, page_size=64)
        rows["decode window"] = DecodeShape(1, 32, 8, 128 * K, window=4 * K)
        rows["decode M4"] = DecodeShape(8, 32, 8, 8 * K, M=4)
        some = re.compile("B1 |B64|24/8|ragged|window" if quick else "")
        rows = {name: x for name, x in rows.items() if some.search(name)}
        title = """decode: D128, one token
ragged: B32 32/8, one sequence of 128k tokens and 31 of 512. pages (of 64), M4 (four new tokens): B8 32/8 8k.
window: the last 4k of B1 32/8 128k
graph: microseconds of calls in one CUDA graph. Each has a cache of its own, as many as make four times the L2
cache, so all keys come from memory. GB/s: of the keys and values needed. of copy: over a copy's GB/s
"""
    else:
        rows = {f"decode B{B} 8/2 {size(N)}": DecodeShape(B, 8, 2, N) for B, N in ((1, 2 * K), (4, 512))}
        rows["decode ragged"] = DecodeShape(4, 8, 2, 2 * K, lengths=[64] * 3 + [2 * K])
        title = "decode: D64, one token; ragged: B4 8/2, one sequence of 2k tokens and three of 64\n"
    return f"{title}eager: microseconds of wall time", decode_row, {name: (x,) for name, x in rows.items()}


def make_cache(name, i, shape):
    """k, v of the i-th cache: (B, N, HKV, D) or its pages."""
    g, (B, N) = generator(f"{name} {i}"), (shape.B, shape.N)
    if shape.page_size:
        B, N = B * N // shape.page_size, shape.page_size
    return [normal(g, B, N, shape.HKV, shape.D) for _ in "kv"]


def measure_decode(contender, name, shape, q, lengths, table, truth):
    """({how: microseconds per call}, relative error of o), or None for what the contender does not do."""
    call = contender.decode(shape, lengths, table)
    if call is None:
        return None
    q, n = contender.turn(q), n_caches(shape.needed())
    caches = [[contender.turn(x).contiguous() for x in make_cache(name, i, shape)] for i in range(n)]
    error = relative_error(contender.turn(call(q, *caches[0]))[-1:], truth)
    return decode_us(call, q, caches), error


@torch.no_grad()
def decode_row(name, shape):
    g = generator(name)
    q, lengths, table = normal(g, shape.B, shape.M, shape.H, shape.D), None, None
    if shape.lengths:
        lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
    if shape.page_size:
        n_pages = shape.B * shape.N // shape.page_size
        table = torch.randperm(n_pages, generator=g, dtype=torch.int32, device=DEVICE).view(shape.B, -1)
    # the truth of the last sequence
    last = [x if x is None else x[-1:] for x in (lengths, table)]
    k, v = ((x if shape.page_size else x[-1:]).to(TRUE_DTYPE) for x in make_cache(name, 0, shape))
    truth = decode_ours(shape, *last)(q[-1:].to(TRUE_DTYPE), k, v, backend="torch")
    found = of_each(DECODERS, name, measure_decode, name, shape, q, lengths, table, truth)
    us = {how: {who: times[how] for who, (times, _) in found.items()} for how in HOW}
    lines = [compare(name, f"{how} us", x, DECODERS) for how, x in us.items()]
    for what, unit in (("GB/s", 1), ("of copy", copy_gbs())) if GPU else ():
        rates = {who: shape.needed() / t / 1e3 / unit for who, t in us["graph"].items()}
        lines.append(compare(name, what, rates, DECODERS, max))
    return lines + [compare(name, "error", {who: error for who, (_, error) in found.items()}, DECODERS)]


def sharded(quick):
    H, HKV, lengths = (32, 8, (128 * K, 512 * K)) if GPU else (4, 2, (2 * K, 8 * K))
    rows = {f"sharded decode {size(N)}": (DecodeShape(1, H, HKV, N // N_RANKS * N_RANKS),) for N in lengths}
    title = f"""sharded: ours has the cache striped over {N_RANKS} ranks; B1 {H}/{HKV}, one token
graph: microseconds of calls in one CUDA graph, of the slowest rank. eager: wall time. GB/s: of all ranks"""
    return title, sharded_row, rows


@torch.no_grad()
def sharded_row(name, shape):
    q = normal(generator(name), shape.B, shape.M, shape.H, shape.D)
    caches = [make_cache(name, i, shape) for i in range(n_caches(shape.needed() // N_RANKS))]
    stripes = [[x[:, RANK::N_RANKS].contiguous() for x in kv] for kv in caches]

    def timed(call, caches):
        return decode_us(call, q, caches), call(q, *caches[0]).to(TRUE_DTYPE)

    many = attempt("ours", name, timed, sharded_decode_attn, stripes)
    one = attempt("ours", name, timed, decode_attn, caches) if RANK == 0 else None
    times = [many[0][how] if many else math.inf for how in HOW]
    times = slowest(*times)  # the other ranks wait here for rank 0
    who, lines = ("ours", "one rank"), []
    for how, t in zip(HOW, times):
        us = ({"ours": t} if math.isfinite(t) else {}) | ({"one rank": one[0][how]} if one else {})
        rates = {x: shape.needed() / t / 1e3 for x, t in us.items()}
        lines.append(compare(name, f"{how} us", us, who))
        lines.append(compare(name, f"{how} GB/s", rates, who, max))
    error = attempt("ours", name, relative_error, many[1], one[1]) if many and one else None
    return [*lines, compare(name, "error", {} if error is None else {"ours": error}, who)]


# -----------------------------------------------------------------------------
# rings

RING_CALLS = {"fwd": 2, "fwd+bwd": 7}  # FLOP under a causal mask, over B * H * S * S * D
RING_D = 128 if GPU else 64


def rings(quick):
    H, HKV, others, lengths, some = 4, 2, ((4, 4),), (128, 256), (256,)
    if GPU:
        H, HKV, others, lengths = 32, 8, ((32, 32), (64, 8)), (2 * K, 8 * K, 32 * K, 128 * K)
        some = 8 * K, 32 * K
    rows = {}
    for T in some if quick else lengths:
        for schedule in ring_attn.SCHEDULES:
            rows[f"ring {schedule} {size(T)}"] = schedule, T, H, HKV
            if schedule == COMMON and T in some:
                rows[f"ring {schedule} {size(T)} p2p"] = schedule, T, H, HKV, "p2p"
        for heads in others if T in some and not quick else ():
            rows[f"ring {COMMON} {size(T)} {heads[0]}/{heads[1]}"] = COMMON, T, *heads

    def title():
        first = make("the first ring", 2, 128, H, HKV, RING_D)[:3]
        attempt("ours", "the first ring", ring_attn.ring_attn, *first, all_ranks=True)
        ring = ring_attn.resolve_ring(None)
        return f"""rings: {N_RANKS} ranks, causal, D{RING_D}, B1 (or what the schedule needs), tokens per rank
transport {ring.transport} ({ring.why}), or as named
ms: between the ends of calls in a row, on the slowest rank; the median of rounds in which all take turns (one
    of calls over 0.3 s). Backwards run in the thread that calls, as in train.py. graph: in a CUDA graph
{RATE}: of each rank. of ideal: one GPU's ms for the whole sequence, on all GPUs at once, / {N_RANKS} / ours
exposed: ms beyond those of the same hops where nothing moves. launches: kernels on the attention's stream
GiB: peak beyond the inputs, symmetric memory included
peers: ms of B1 under our schedule, or {COMMON} if no peer has it, of each library's fastest variant"""

    return title, ring_row, rows


def slowest_us(who, row, call, rounds, context=nullcontext):
    """Microseconds per call on the slowest rank; None if it fails on any."""

    def timed():
        dist.barrier()
        synchronize()
        return ends_us(call, rounds)

    us = attempt(who, row, timed, context=context, all_ranks=True)
    return us and slowest(us)[0]


def in_turns(row, contenders):
    """{who: milliseconds per call} of those that do not fail. contenders: {who: (call, what it runs in)}.

    The median of rounds in which all take turns. Each is first in one round, as a busy GPU gets slower.
    Calls of more than 0.3 s are timed once."""
    about = {who: slowest_us(who, row, call, 1, context) for who, (call, context) in contenders.items()}
    found = {who: [us] for who, us in about.items() if us}  # an estimate, with the compilation done
    order = list(found)
    for i in range(max(3, len(order))):
        for who in order[i:] + order[:i]:
            if about[who] < 3e5:
                call, context = contenders[who]
                us = slowest_us(who, row, call, int(min(20, max(2, 1e5 / about[who]))), context)
                found[who] = [*found[who], us] if i else [us]
    return {who: statistics.median(us) / 1e3 for who, us in found.items() if all(us)}


@lru_cache(maxsize=1)  # of long sequences, memory holds one
def one_gpu(T, H, HKV):
    """All ranks' tokens on every rank alone: ([q, k, v, do], [o, dq, dk, dv]), or (None, None)."""
    S = N_RANKS * T

    def results():
        if S > 512 * K:
            raise ValueError("more than 512k tokens would take minutes")
        tensors = make("one GPU", 1, S, H, HKV, RING_D)
        return tensors, attention_call(ring_attn.flash_attn_func, tensors, "fwd+bwd")()

    return attempt("one GPU", f"ring {size(T)} {H}/{HKV}", results, all_ranks=True) or (None, None)


@lru_cache(maxsize=1)
def fastest_peers(schedule, T, H, HKV):
    """{"fwd", "fwd+bwd": {variant: (call, what it runs in)}}: of each library the one that is fastest now."""
    best = {what: {} for what in RING_CALLS}  # {library: (microseconds, variant, (call, what it runs in))}
    q, k, v, do = make(f"peers {RANK} {T} {H} {HKV}", 1, T, H, HKV, RING_D)
    row = f"ring {schedule} {size(T)}"
    # torch cp gets grouped heads as they are, and repeated, as some of its variants refuse them
    for peer, repeats in itertools.product(PEERS, sorted({1, H // HKV})):
        if peer.schedule != schedule or repeats > 1 and not peer.heads_first:
            continue
        tensors = q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), do
        tensors = [x.transpose(1, 2).contiguous() if peer.heads_first else x for x in tensors]
        variant = f"{peer.library} {peer.variant}" + " repeated" * (repeats > 1)
        for what in RING_CALLS if peer.backward else ("fwd",):
            call = attention_call(peer.f, tensors, what)
            us = slowest_us(variant, row, call, 1, peer.context)
            if us and us < 3e5:  # a short one three times: a pause of one of the hosts must not decide
                again = [slowest_us(variant, row, call, 3, peer.context) for _ in range(3 if us < 5e4 else 1)]
                us = min(filter(None, again), default=None)
            if us and us < best[what].get(peer.library, (math.inf,))[0]:
                best[what][peer.library] = us, variant, (call, peer.context)
    return {what: {variant: call for _, variant, call in x.values()} for what, x in best.items()}


class SilentRing(ring_attn.Ring):
    """A ring on which nothing moves: its hops compute with whatever is in their buffers."""

    def exchange(self, *what):
        return lambda: None


@cache
def silent_ring():
    return SilentRing(dist.group.WORLD)


def profiled(call, calls, path):
    """Events of a Chrome trace of some calls, written to path."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        synchronize()
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


def ring_rates(what, ms, one_ms, B, S, H):
    """one_ms: of one GPU, with one of the B sequences."""
    flop, ideal = RING_CALLS[what] * B * H * S * S * RING_D, one_ms and B * one_ms / N_RANKS
    rate = ms and flop / N_RANKS / ms / FLOP_PER_MS
    return {"ms": ms, RATE: rate, "of ideal": ms and ideal and ideal / ms}


def ring_row(name, schedule, T, H, HKV, transport=None):
    B, S = ring_attn.SCHEDULES[schedule].batch_groups, N_RANKS * T
    sequence, results = one_gpu(T, H, HKV)
    theirs = schedule if any(peer.schedule == schedule for peer in PEERS) else COMMON
    peers = fastest_peers(theirs, T, H, HKV)

    def mine(x):
        """This rank's shard of B sequences; every other one has the heads reversed."""
        x = x if B == 1 else torch.cat([x.flip(2) if i % 2 else x for i in range(B)])
        return ring_attn.shard(x, schedule, RANK, N_RANKS)

    tensors = [mine(x) for x in sequence] if sequence else make(f"{name} {RANK}", B, T, H, HKV, RING_D)
    ring = ring_attn.resolve_ring(None)
    ours = partial(ring_attn.ring_attn, schedule=schedule, group=ring, transport=transport)
    silent = partial(ours, group=silent_ring(), transport="p2p")
    calls = {what: attention_call(ours, tensors, what) for what in RING_CALLS}
    lines = []
    for what, call in calls.items():
        contenders = {"ours": call, "silent": attention_call(silent, tensors, what)}
        if sequence:
            contenders["one GPU"] = attention_call(ring_attn.flash_attn_func, sequence, what)
        contenders = {who: (f, nullcontext) for who, f in contenders.items()}
        times = in_turns(name, contenders | peers[what])
        ms, silent_ms, one_ms = map(times.get, ("ours", "silent", "one GPU"))
        variants = [who for who in peers[what] if who in times]
        library_ms = {x: times[who] for x in LIBRARIES for who in variants if who.startswith(x)}
        line = {"name": name, "what": what, "transport": transport or ring.transport, "heads": f"{H}/{HKV}"}
        line |= ring_rates(what, ms, one_ms, B, S, H) | {"exposed": ms and silent_ms and ms - silent_ms}
        line |= {"launches": None, "GiB": None if what == "fwd+bwd" else "", "error": None, "one GPU": one_ms}
        line |= {x: library_ms.get(x) for x in LIBRARIES}
        line |= of_best(library_ms | ({"ours": ms / B} if ms else {}))
        lines.append(line | {"variants": ", ".join(variants)})
    if not all(line["ms"] for line in lines):
        return lines
    forward, both = lines
    if GPU:
        for line, call in zip(lines, calls.values()):
            n = attempt("launches", name, count_launches, call, all_ranks=True)
            line["launches"] = n and slowest(n)[0]
        if peak := attempt("memory", name, peak_bytes, calls["fwd+bwd"], all_ranks=True):
            staging = ring.memory.local.nbytes if both["transport"] == "symmetric" else 0
            both["GiB"] = (slowest(peak)[0] + staging) / 2**30
    if results:

        def errors():
            pairs = zip(calls["fwd+bwd"](), results, strict=True)
            return [relative_error(x.float(), mine(true).float()) for x, true in pairs]

        if found := attempt("ours", name, errors, all_ranks=True):
            forward["error"], *grads = slowest(*found)
            both["error"] = max(grads)
    for line, call in zip([forward, both], calls.values()) if GPU and T == 2 * K else ():
        if us := attempt("ours in a CUDA graph", name, graph_us, call, all_ranks=True):
            rates = ring_rates(line["what"], slowest(us)[0] / 1e3, line["one GPU"], B, S, H)
            lines.append(dict.fromkeys(line, "") | {"name": name, "what": f"graph {line['what']}"} | rates)
    return lines


if N_RANKS > 1:
    SECTIONS = [rings, sharded]
else:
    SECTIONS = [kernels, small, memory, decode] if GPU else [kernels, schedules, decode]

# -----------------------------------------------------------------------------
# what overlaps: a profile of every rank

PARTS = ring_attn.Backend._fields
MOVES = {"keys": "keys, values", "pass_on": "gradients"}  # methods of a transport that start copies


@contextlib.contextmanager
def named_parts():
    """Inside, profiles have a range around the launches of each part of a hop loop."""

    def named(f, name):
        def call(*args, **kwargs):
            with torch.profiler.record_function(name):
                return f(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.callback(ring_attn.BACKENDS.update, dict(ring_attn.BACKENDS))
        for key, backend in ring_attn.BACKENDS.items():
            ring_attn.BACKENDS[key] = ring_attn.Backend(*map(named, backend, PARTS))
        for transport, (method, name) in itertools.product(ring_attn.TRANSPORTS.values(), MOVES.items()):
            stack.callback(setattr, transport, method, getattr(transport, method))
            setattr(transport, method, named(getattr(transport, method), name))
        yield


def intervals(events, calls):
    """[track, start, length, kind] of the last of some calls, in microseconds: kernels, and copies."""
    category, stream = "user_annotation", None
    if GPU:
        category, stream = "gpu_user_annotation", attention_stream(events)[0]
    ranges = [x for x in events if x.get("cat") == category and x["name"] in (*PARTS, *MOVES.values())]
    ranges.sort(key=lambda x: x["ts"])
    found = []
    for event in events:
        cat, name, start, thread = event.get("cat"), event["name"], event["ts"], event["tid"]
        wanted = cat in ("kernel", "gpu_memcpy") if GPU else cat == category and name in (*PARTS, "gloo:recv")
        if not wanted:
            continue
        moves = cat == "gpu_memcpy" and thread != stream or "nccl" in name or name == "gloo:recv"
        # the last range that began before it. On a GPU it must not have ended; a CPU's messages take longer
        around = [x for x in ranges if x["tid"] == thread and x["ts"] - 0.1 <= start]
        around = [x["name"] for x in around if not GPU or start < x["ts"] + x["dur"]]
        kind = around[-1] if around else "forward" if "fwd" in name else "other"
        if (kind in MOVES.values()) != moves:
            kind = "copy" if moves else "other"
        track = "copies" if moves else "kernels" if thread == stream or not GPU else "other stream"
        found.append([track, start, event["dur"], "other" if kind in ("preprocess", "postprocess") else kind])
    kernels = sorted(start for track, start, *_ in found if track == "kernels")
    first = kernels[-(len(kernels) // calls)]
    return [x for x in found if x[1] + x[2] > first]


def trace(folder):
    """Profiles forward + backward on every rank into `folder`; returns what `overlap_figure` draws."""
    T, H, HKV, calls = (8 * K, 32, 8, 3) if GPU else (256, 4, 2, 3)
    tensors = make(f"trace {RANK}", 1, T, H, HKV, RING_D)
    call = attention_call(partial(ring_attn.ring_attn, schedule=COMMON), tensors, "fwd+bwd")
    folder.mkdir(parents=True, exist_ok=True)

    def profile():
        call(), call()
        with named_parts():
            call()
            slowest(0)
            return intervals(profiled(call, calls, folder / f"rank{RANK}.json"), calls)

    mine = attempt("ours", "trace", profile, all_ranks=True)
    if mine is None:
        return None
    ranks = [mine] * N_RANKS
    if N_RANKS > 1:
        dist.all_gather_object(ranks, mine)
    zero = min(start for rank in ranks for _, start, *_ in rank)  # the clocks of processes on a host agree
    for event in itertools.chain(*ranks):
        event[1:3] = round(event[1] - zero), max(1, round(event[2]))
    facts = dict(T=T, H=H, HKV=HKV, D=RING_D, schedule=COMMON, n_ranks=N_RANKS, ranks=ranks)
    return facts | dict(transport=ring_attn.resolve_ring(None).transport)


# -----------------------------------------------------------------------------
# pictures for the README: mid-tones, which read on white and on dark pages and to colour-blind eyes

INK, BLUE, ORANGE, GREEN, PURPLE, GOLD = "#7a7f87", "#2f7fc1", "#d1661a", "#179a76", "#b8629b", "#a8860b"


def svg(path, width, height, parts, footer=""):
    font = 'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" {font}>'
    path.write_text("\n".join([start, *parts, label(width - 10, height - 10, footer, "end", 11), "</svg>\n"]))
    print(f"wrote {path}", flush=True)


def label(x, y, text, anchor="start", size=13, weight="normal", color=INK):
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(str(text))}</text>'


def rect(x, y, width, height, color, opacity=1):
    size = f'width="{max(width, 0.3):.2f}" height="{height:.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{color}" fill-opacity="{opacity}"/>'


def stroke(x, y, to_x, to_y, style='stroke-opacity="0.35"'):
    return f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{INK}" {style}/>'


DASHED = 'stroke-width="1.5" stroke-dasharray="4 3"'


def legend(x, y, entries):
    """A row of (colour, text)."""
    parts = []
    for color, text in entries:
        parts += [rect(x, y - 10, 12, 12, color), label(x + 18, y, text)]
        x += 40 + 7 * len(text)
    return parts


def measured_on(found):
    return f"{found['n_ranks']} x {found['gpu'] or 'CPU'} | torch {found['torch']} | commit {found['commit']}"


def ticks(top, n=5):
    """About n round numbers up to top."""
    step = 10 ** math.floor(math.log10(top / n))
    step *= next(m for m in (1, 2, 5, 10) if top / (m * step) <= n)
    return [i * step for i in range(int(top / step) + 1)]


def staircase(x, y, side, visible, color, opacity):
    """A square of queries (down) and keys (across), of which query i sees the first visible[i]."""
    path, step = f"M{x:g} {y:g}", side / len(visible)
    for i, (before, keys) in enumerate(itertools.pairwise([0, *visible, 0])):
        if keys != before:
            path += f"V{y + step * i:g}H{x + step * keys:g}"
    return f'<path d="{path}Z" fill="{color}" fill-opacity="{opacity:.2g}"/>'


def schedules_figure(folder):
    """Four ranks: who holds which tokens, which scores each hop computes, and each rank's share."""
    colors, strip, grid, bars, side, y = (BLUE, ORANGE, GREEN, PURPLE), 400, 532, 690, 20, 66
    R, titles = len(colors), {16: "who holds which tokens, from first to last", grid: "scores computed"}
    titles[bars] = "share of the work"
    parts = [label(x, 22, text, weight="bold") for x, text in titles.items()]
    parts.append(label(grid - 8, 48, "hop", "end", 12))
    parts += legend(16, 48, [(color, f"rank {rank}") for rank, color in enumerate(colors)])
    parts += [label(grid + 24 * hop + side / 2, 48, hop, "middle", 12) for hop in range(R)]
    for schedule, (n_groups, multiple, _) in ring_attn.SCHEDULES.items():
        parts.append(label(16, y + 13, schedule, size=15, weight="bold"))
        T, height, shares = 8 * multiple, min(44, 72 / n_groups - 4), work_shares(schedule, R)
        owners = ring_attn.merge([torch.full((n_groups, T), rank) for rank in range(R)], schedule).tolist()
        for g, owner in enumerate(owners):  # of each token of the sequence, in each part of the batch
            x, top, width = 16, y + 24 + g * (height + 4), strip / len(owner)
            for rank, tokens in itertools.groupby(owner):
                n = len(list(tokens))
                parts.append(rect(x, top, width * n - 1, height, colors[rank]))
                x += width * n
            if n_groups > 1:
                parts.append(label(x + 4, top + height / 2 + 4, f"batch {g + 1}/{n_groups}", size=11))
        at = [ring_attn.positions(schedule, rank, R, 2 * T, n_groups) for rank in range(R)]
        for rank, color in enumerate(colors):
            top = y + 24 * rank
            parts.append(label(grid - 8, top + 14, f"rank {rank}", "end", 12))
            for hop in range(R):
                x, source = grid + 24 * hop, (rank - hop) % R
                parts.append(rect(x, top, side, side, INK, 0.15))
                for queries, keys in zip(at[rank], at[source]):
                    visible = (keys <= queries[:, None]).sum(1).tolist()
                    parts.append(staircase(x, top, side, visible, colors[source], 1 / n_groups))
            parts.append(rect(bars, top + 4, 280 * shares[rank], side - 8, color))
            parts.append(label(854, top + 14, f"{shares[rank]:.0%}", "end", 12))
        x = bars + 280 / R
        parts.append(stroke(x, y - 2, x, y + 24 * R - 2, DASHED))
        y += 24 + max(24 * R, 28 + round(n_groups * (height + 4)))
    text = "squares: queries down, keys across, coloured by the rank they come from. dashed: an even share"
    svg(folder / "schedules.svg", 870, y + 10, parts, text)


def throughput_figure(found, lines):
    """Bars for tokens per GPU, forward and forward + backward; lines: of the rings of one schedule."""
    who = {"ours": BLUE, "torch cp": ORANGE, "ring-flash-attn": GREEN}
    titles = f"this project, {COMMON}", "torch context_parallel", f"ring-flash-attn, {COMMON}"

    def rates(line):
        rate = {"ours": line["TFLOP/s"], "ideal": line["of ideal"] and line["TFLOP/s"] / line["of ideal"]}
        return rate | {x: rate["ours"] * line["ms"] / line[x] for x in who if line.get(x)}

    names = list(dict.fromkeys(line["name"] for line in lines))
    top = 1.08 * max(rate for line in lines for rate in rates(line).values() if rate)
    base, height, width, bar = 330, 250, 400, 400 * 0.8 / len(names) / len(who)
    parts = [*legend(60, 28, zip(who.values(), titles)), stroke(660, 24, 684, 24, DASHED)]
    parts.append(label(690, 28, "one GPU with the whole sequence"))
    for left, what, title in (60, "fwd", "forward"), (510, "fwd+bwd", "forward + backward"):
        parts.append(label(left, 62, f"{title}, TFLOP/s per GPU", size=14, weight="bold"))
        for tick in ticks(top):
            y = base - height * tick / top
            parts += [stroke(left, y, left + width, y), label(left - 6, y + 4, f"{tick:g}", "end", 11)]
        for line in (line for line in lines if line["what"] == what):
            x, heights = left + width * (names.index(line["name"]) + 0.1) / len(names), rates(line)
            heights = {key: (rate, height * rate / top) for key, rate in heights.items() if rate}
            for n, key in enumerate(who):
                if key in heights:
                    rate, y = heights[key]
                    parts.append(rect(x + n * bar, base - y, bar - 4, y, who[key]))
                    y, style = (y - 18, ("bold", "#ffffff")) if y > 24 else (y, ())
                    middle = x + (n + 0.5) * bar - 2
                    parts.append(label(middle, base - y - 4, f"{rate:.0f}", "middle", 11, *style))
            if "ideal" in heights:
                y = base - heights["ideal"][1]
                parts.append(stroke(x - 4, y, x + 3 * bar, y, DASHED))
            tokens = f"{line['name'].split()[-1]} per GPU"
            parts.append(label(x + 1.5 * bar - 2, base + 18, tokens, "middle", 12))
    what = f"{lines[0]['heads']} heads, D128, {found['dtype']}, causal, transport {lines[0]['transport']}"
    parts.append(label(10, 390, f"{what}; peers: the fastest of their variants", size=11))
    svg(ASSETS / "throughput.svg", 940, 400, parts, measured_on(found))


def overlap_figure(path, found):
    """A band for each rank: its kernels, and the copies that bring keys and gradients from other ranks."""
    data, colors = found["trace"], dict(forward=BLUE, backward=ORANGE, other=INK)
    colors |= {"keys, values": PURPLE, "copy": PURPLE, "gradients": GOLD}
    end = max(start + length for rank in data["ranks"] for _, start, length, _ in rank)
    left, width, y, kinds = 130, 800, 90, {kind for rank in data["ranks"] for *_, kind in rank}
    what = f"forward + backward, {data['schedule']}, {size(data['T'])} tokens per GPU, causal, D{data['D']}, "
    what += f"{data['H']}/{data['HKV']} heads, transport {data['transport']}"
    parts = [label(20, 28, what, size=14)]
    parts += legend(20, 56, [(color, kind) for kind, color in colors.items() if kind in kinds])
    for rank, events in enumerate(data["ranks"]):
        parts.append(label(10, y + 15, f"rank {rank}", weight="bold"))
        for track in ("kernels", "copies", "other stream"):
            if mine := [x for x in events if x[0] == track]:
                parts += [label(left - 8, y + 15, track, "end", 12), rect(left, y, width, 20, INK, 0.12)]
                for _, start, length, kind in mine:
                    x = left + width * max(0, start) / end
                    parts.append(rect(x, y, width * length / end, 20, colors[kind]))
                y += 24
        y += 14
    for tick in ticks(end / 1e3, 8):
        x = left + width * tick * 1e3 / end
        parts += [stroke(x, 84, x, y), label(x, y + 16, f"{tick:g}", "middle", 11)]
    parts.append(label(left - 8, y + 16, "ms", "end", 11))
    svg(path, left + width + 30, y + 50, parts, measured_on(found))


def ring_lines(found):
    """Of a run on GPUs, the lines that throughput.svg shows."""
    if not found.get("gpu"):
        return []
    name = re.compile(rf"ring {COMMON} (2|8|32)k")
    return [x for x in found["rows"] if name.fullmatch(x["name"]) and x["what"] in RING_CALLS and x["ms"]]


def figures(runs):
    """The README's pictures, from runs on GPUs: throughput from all with the machine and commit of the first
    one with rings, the overlap from the first one with a trace."""
    ASSETS.mkdir(exist_ok=True)
    schedules_figure(ASSETS)
    timed = next(filter(ring_lines, runs), None)
    traced = next((found for found in runs if found.get("trace") and found["gpu"]), None)
    if timed:
        same = [found for found in runs if measured_on(found) == measured_on(timed)]
        throughput_figure(timed, [line for found in same for line in ring_lines(found)])
    if traced:
        overlap_figure(ASSETS / "overlap.svg", traced)
    command = "torchrun --nproc_per_node=2 bench.py --figures"
    for name, found, flags in ("throughput", timed, ""), ("overlap", traced, " --trace"):
        if not found:
            print(f"no {name}.svg: it takes {command}{flags}, on GPUs, or --figures FILE with its output")


# -----------------------------------------------------------------------------
# the run


def commit():
    """Short hash of the checkout; None outside of one."""
    with contextlib.suppress(OSError):  # no git here
        command = "git", "rev-parse", "--short", "HEAD"
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def refuse(parser, text):
    if RANK == 0:  # one of several ranks tells
        parser.error(text)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows: some lengths and head dims only")
    text = 'only rows whose name contains TEXT, such as "decode" or "16k causal"'
    parser.add_argument("--filter", default="", metavar="TEXT", help=text)
    text = "profile every rank into FOLDER (default: runs/trace): Chrome traces, overlap.svg; alone: no rows"
    parser.add_argument("--trace", nargs="?", const="runs/trace", metavar="FOLDER", help=text)
    text = "draw the README's pictures into assets, from this run, or from FILEs: the output of earlier runs"
    parser.add_argument("--figures", nargs="*", metavar="FILE", help=text)
    args = parser.parse_args()
    if ring_attn.INTERPRET:
        refuse(parser, "TRITON_INTERPRET=1 is set: the interpreter's speed says nothing; unset it")
    sections = [section(args.quick) for section in SECTIONS]
    names = [name for _, _, rows in sections for name in rows]
    if not any(args.filter in name for name in names):
        refuse(parser, f"--filter={args.filter!r} is in no name; there are: {', '.join(names)}")
    if args.figures or args.figures is not None and not args.trace and not (GPU and N_RANKS > 1):
        try:
            runs = [json.loads(Path(file).read_text().strip().splitlines()[-1]) for file in args.figures]
        except (OSError, ValueError, IndexError) as error:
            refuse(parser, f"--figures: the last line of a FILE must be the JSON of a run: {error}")
        return figures(runs) if RANK == 0 else None
    if N_RANKS > 1:
        try:
            setup(argparse.Namespace(device=DEVICE))
        except ValueError as error:
            refuse(parser, str(error))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")

    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is float32 throughout
    found = dict(commit=commit(), gpu=torch.cuda.get_device_name() if GPU else None, torch=torch.__version__)
    found |= dict(triton=triton.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    found |= dict(dtype=str(DTYPE)[6:], n_ranks=N_RANKS)
    print(" | ".join(f"{key} {value}" for key, value in found.items()))
    if not GPU:
        print("no GPU here: these rows check that everything works; their times say nothing of speed")
    print(f"""FLOP: forward 4*B*H*S*S*D, half of it under a causal mask; backward 2.5 times the forward
of best: how many times as good as the best peer ours is. Inputs are normal, times medians
error: relative (Frobenius), of o, or the worst of dq, dk, dv; of rings to one GPU, of other rows to
    {str(TRUE_DTYPE)[6:]}, for the last sequence (kernels: and key head)""")
    found |= dict(rows=[], failed=FAILED)
    only_trace, status = args.trace and not (args.quick or args.filter or args.figures is not None), 0
    try:
        for title, measure_row, rows in () if only_trace else sections:
            chosen = [name for name in rows if args.filter in name]
            if chosen:
                print(f"\n{title() if callable(title) else title}", flush=True)
            for name in chosen:
                lines = measure_row(name, *rows[name])
                found["rows"] += lines
                for line in [dict(zip(lines[0], lines[0]))] * (name == chosen[0]) + lines:
                    print_line(line)
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
    if RANK == 0 and not status:
        if found.get("trace"):
            overlap_figure(Path(args.trace) / "overlap.svg", found)
        if args.figures is not None:
            figures([found])
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(json.dumps(rounded), flush=True)
    if N_RANKS > 1 and not status:  # interrupted ranks may stand at different collectives, and would wait
        dist.destroy_process_group()
    sys.exit(status or any(reason.startswith(("ours:", "triton:")) for reason in FAILED))


if __name__ == "__main__":
    main()
