"""Speed and error of the attention kernels, beside what a user would pick instead.

    python bench.py                       # one GPU: kernels, masks, memory, decoding
    python bench.py --quick               # fewer rows
    python bench.py --filter "D128 16k"   # rows whose name contains this
    python bench.py --part masks          # one table; --help lists them
    python bench.py --errors              # every contender's error beside SDPA's own, and whether bits repeat
    python bench.py --all                 # everything; under torchrun all of rings
    torchrun --nproc_per_node=2 bench.py  # rings, and decoding from a cache striped over the ranks
    torchrun --nproc_per_node=2 bench.py --filter "ring zigzag 8k"
    torchrun --nproc_per_node=2 bench.py --trace             # profiles of all ranks, a picture, in runs/trace
    python bench.py --figures a.txt b.txt # pictures and assets/RESULTS.md, from what earlier runs printed

It prints a card, tables, the reason for each dash, and all numbers as JSON in the last line. On a CPU its
rows, at small shapes, check that everything works. They take less than a minute, and say nothing of speed.

Peers are torch's SDPA (FlashAttention-2, cuDNN), compiled flex_attention, FlashAttention-4 if flash_attn.cute
is installed (det: deterministic=True), and FlashAttention-3 if flash_attn_interface is; of rings, torch's
context_parallel, and ring-flash-attn if it is installed, on torch's kernels and on FlashAttention-3's
forward. Each gets its tensors in the layout that it takes.
"""

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
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
from torch.utils.checkpoint import checkpoint

import ring_attn
import train
from decode import capture, capture_step, decode_attn, quantized, sharded_decode_attn
from model import AttentionType, Config, Transformer
from train import BLUE, GOLD, GREEN, INK, ORANGE, PURPLE, setup
from train import label, legend, rect, stroke, svg, ticks, y_axis

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, TRUE_DTYPE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)
RANK, N_RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
K = 1024
RING_D = 128 if GPU else 64  # of rings and errors
RATE, FLOP_PER_MS = ("TFLOP/s", 1e9) if GPU else ("GFLOP/s", 1e6)
ASSETS = Path(__file__).parent / "assets"

# -----------------------------------------------------------------------------
# masks: what a row asks for beside q, k and v. Contenders translate it into their arguments


class Mask(NamedTuple):
    causal: bool = True
    window: int | None = None  # query i sees keys j > i - window
    documents: tuple = ()  # lengths of packed documents, B = 1; a query sees its own document
    sinks: bool = False  # a logit for each head in the denominator
    softcap: float | None = None
    alibi: bool = False

    def pairs(self, S):
        """How many scores one head of one sequence computes."""
        if not self.causal:
            return S * S
        lengths, window = self.documents or (S,), self.window or S
        return sum(n * (n + 1) // 2 - max(n - window, 0) * (max(n - window, 0) + 1) // 2 for n in lengths)

    def seen(self):
        """f(b, h, i, j): does query i see key j?"""
        causal, window, ids = self.causal, self.window, self.documents and document_ids(self.documents)

        def seen(b, h, i, j):
            found = i >= j if causal else j >= 0
            found = found & (i - j < window) if window else found
            return found & (ids[i] == ids[j]) if len(ids) else found

        return seen

    def scores(self, H):
        """f(score, b, h, i, j), a new score; None if it stays as it is."""
        softcap, slopes = self.softcap, alibi_slopes(H) if self.alibi else None

        def scores(s, b, h, i, j):
            s = softcap * torch.tanh(s / softcap) if softcap else s
            return s if slopes is None else s - slopes[h] * (i - j)  # causal: i >= j

        return scores if softcap or self.alibi else None

    def ours(self, H):
        """Arguments of ring_attn and flash_attn_func."""
        return dict(
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            cu_seqlens=boundaries(self.documents, "cpu") if self.documents else None,
            sinks=sink_logits(H) if self.sinks else None,
            alibi_slopes=alibi_slopes(H) if self.alibi else None,
        )

    def allow(self, *names):
        """Raises NotImplementedError if this needs what is not among names."""
        needs = [name for name, x, default in zip(self._fields[1:], self[1:], CAUSAL[1:]) if x != default]
        if missing := [name for name in needs if name not in names]:
            raise NotImplementedError(f"it has no {', '.join(missing)}")


CAUSAL, FULL = Mask(), Mask(causal=False)


def masks(S):
    """{name: Mask} of S tokens."""
    cuts = [0, *sorted(random.Random(5).sample(range(1, S), 15)), S]
    several = {f"window {S // 8}": Mask(window=S // 8), f"window {S // 64}": Mask(window=S // 64)}
    several[f"documents of {S // 8}"] = Mask(documents=(S // 8,) * 8)
    several["16 documents"] = Mask(documents=tuple(b - a for a, b in itertools.pairwise(cuts)))
    several |= {"sinks": Mask(sinks=True), "softcap 50": Mask(softcap=50.0), "ALiBi": Mask(alibi=True)}
    return several


@cache
def boundaries(lengths, device):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@cache
def document_ids(lengths):
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)


@cache
def alibi_slopes(H):
    return 2.0 ** (-8 * torch.arange(1, H + 1, device=DEVICE) / H)


@cache
def sink_logits(H):
    """In float32, but of few bits, so that no contender rounds them."""
    return torch.randn(H, generator=torch.Generator().manual_seed(H)).bfloat16().float().to(DEVICE)


def dense(mask, H, q, k, v):
    """The truth: attention by the formula, in q's dtype. q (B, S, h, D) has the last h of H heads."""
    S, h = k.shape[1], q.shape[2]
    q, k, v = (x.repeat_interleave(h // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    j, head = torch.arange(S, device=q.device), torch.arange(H - h, H, device=q.device)
    seen, scores = mask.seen(), mask.scores(H)

    def rows(i, q, k, v):
        s = q[:, :, i] @ k.mT * q.shape[-1] ** -0.5
        at = None, head[:, None, None], i[:, None], j
        s = (scores(s, *at) if scores else s).to(s.dtype).masked_fill(~seen(*at), -math.inf)
        if mask.sinks:
            sinks = sink_logits(H)[head].to(s.dtype)
            s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
        return (s.softmax(-1)[..., :S] @ v).transpose(1, 2)

    blocks = j.split(512)  # of queries, as all scores would take gigabytes; the backward recomputes them
    return torch.cat([checkpoint(rows, i, q, k, v, use_reentrant=False) for i in blocks], 1)


# -----------------------------------------------------------------------------
# contenders: make(mask, H) -> f(q, k, v) -> o; NotImplementedError if it does not have the mask


def ours(mask, H, f=ring_attn.flash_attn_func, **options):
    return partial(f, **mask.ours(H), **options)


def sdpa(mask, H):
    mask.allow()

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, enable_gqa=grouped(q, k))

    return attend


def grouped(q, k):  # heads first
    return q.shape[1] != k.shape[1]


def biased_sdpa(mask, H):
    """SDPA under any mask that leaves scores as they are. Sinks are one more key."""
    if mask in (CAUSAL, FULL):
        return sdpa(mask, H)
    mask.allow("window", "documents", "sinks")

    def attend(q, k, v):
        i = torch.arange(q.shape[2], device=q.device)
        bias = q.new_zeros(H, len(i), len(i)).masked_fill(~mask.seen()(None, None, i[:, None], i), -math.inf)
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        if mask.sinks:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            bias = torch.cat([bias, sink_logits(H).to(q.dtype)[:, None, None].expand(H, len(i), 1)], -1)
        return F.scaled_dot_product_attention(q, k, v, bias)

    return attend


def attend_flex(q, k, v, sinks=None, **options):
    if sinks is None:
        return flex_attention(q, k, v, **options)
    o, lse = flex_attention(q, k, v, return_lse=True, **options)
    return o * torch.sigmoid(lse - sinks[:, None])[..., None].to(o.dtype)


@cache
def compiled_flex(mode=None):
    torch._dynamo.config.recompile_limit = 256  # each shape is a compile of its own
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    torch._inductor.config.autotune_num_choices_displayed = 0  # no tables between our rows
    return torch.compile(attend_flex, dynamic=False, mode=mode)


@cache
def flex_blocks(mask, S):
    return create_block_mask(mask.seen(), None, None, S, S, device=DEVICE)


def flex(mask, H):
    options = dict(score_mod=mask.scores(H), sinks=sink_logits(H) if mask.sinks else None)

    def attend(q, k, v):
        blocks = None if mask == FULL else flex_blocks(mask, q.shape[2])
        return compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=grouped(q, k), **options)

    return attend


def flash(library, mask, H, deterministic=False):
    """FlashAttention-3 (flash_attn_interface) or FlashAttention-4 (flash_attn.cute)."""
    fa4 = library == "flash_attn.cute"
    mask.allow("window", "documents", "softcap", *(("sinks", "alibi") if fa4 else ()))
    module, options = importlib.import_module(library), dict(causal=mask.causal, deterministic=deterministic)
    if mask.softcap:
        options["softcap"] = mask.softcap
    if mask.window:
        options["window_size"] = mask.window - 1, 0
    if mask.sinks:
        options["learnable_sink"] = sink_logits(H).bfloat16()
    if mask.alibi:
        options["score_mod"], options["score_mod_bwd"] = fa4_alibi(H)
    if not mask.documents:
        return lambda q, k, v: without_lse(module.flash_attn_func(q, k, v, **options))
    options |= dict(max_seqlen_q=max(mask.documents), max_seqlen_k=max(mask.documents))

    def attend(q, k, v):
        ends = boundaries(mask.documents * len(q), DEVICE)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        o = module.flash_attn_varlen_func(*packed, cu_seqlens_q=ends, cu_seqlens_k=ends, **options)
        return without_lse(o).view_as(q)

    return attend


@cache
def fa4_alibi(H):
    import cutlass
    import cutlass.cute as cute

    @cute.jit
    def alibi(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        slope = cute.math.exp2((h + 1).to(cutlass.Float32) * (-8.0 / H))
        return score - slope * (q_idx - kv_idx).to(cutlass.Float32)

    @cute.jit
    def alibi_bwd(dscore, score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        return dscore

    return alibi, alibi_bwd


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

    def needed(self, float8=False):
        """Bytes of the keys and values that a call must read; float8: with a scale for each D numbers."""
        most = self.window + self.M - 1 if self.window else self.N
        seen = sum(min(L, most) for L in self.lengths or [self.N] * self.B)
        return 2 * seen * self.HKV * (self.D + 4 if float8 else self.D * DTYPE.itemsize)


def decode_ours(shape, lengths, table):
    return partial(decode_attn, cache_seqlens=lengths, window=shape.window, page_table=table)


def decode_float8(shape, lengths, table):
    f = decode_ours(shape, lengths, table)
    return lambda q, k, v: f(q, k[0], v[0], k_scale=k[1], v_scale=v[1])


def decode_sdpa(shape, lengths, table):
    if lengths is not None:
        return None
    bias = causal_lower_right(shape.M, shape.N) if shape.M > 1 else None
    attend = partial(F.scaled_dot_product_attention, attn_mask=bias, enable_gqa=shape.H != shape.HKV)
    if shape.window:  # a single query sees a slice of the cache
        return lambda q, k, v: attend(q, k[:, :, -shape.window :], v[:, :, -shape.window :])
    return attend


def decode_flex(shape, lengths, table):
    if table is not None:
        return None
    first, window = shape.N - shape.M, shape.window  # the position of the first query

    def seen(b, h, i, j):
        if lengths is not None:
            return j < lengths[b]
        return (i + first >= j) & (i + first < j + window) if window else i + first >= j

    # made for 128 queries, then used for M: if made for M, no block of keys would count as full
    made = create_block_mask(seen, shape.lengths and shape.B, None, 128, shape.N, device=DEVICE)
    blocks = made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices
    sizes = dict(BLOCK_SIZE=made.BLOCK_SIZE, seq_lengths=(shape.M, shape.N))
    mask = BlockMask.from_kv_blocks(*blocks, mask_mod=seen, **sizes)
    attend = compiled_flex("max-autotune-no-cudagraphs")
    return partial(attend, block_mask=mask, enable_gqa=shape.H != shape.HKV)


def decode_fa3(shape, lengths, table):
    from flash_attn_interface import flash_attn_with_kvcache

    window = (shape.window - 1, 0) if shape.window else (-1, -1)
    options = dict(causal=shape.M > 1 or shape.window is not None, window_size=window)
    options |= dict(cache_seqlens=lengths, page_table=table)
    return lambda q, k, v: without_lse(flash_attn_with_kvcache(q, k, v, **options))


class Contender(NamedTuple):
    make: Callable | None  # (mask, H) -> f(q, k, v) -> o; NotImplementedError: it does not have this mask
    heads_first: bool = False  # takes and returns (B, H, S, D), not (B, S, H, D)
    context: Callable = nullcontext  # what its calls run in
    decode: Callable | None = None
    store: Callable = torch.Tensor.contiguous  # keys or values of a cache, in its layout -> what it reads

    def turn(self, x):
        """(B, S, H, D) into the contender's layout, or back."""
        return x.transpose(1, 2) if self.heads_first else x

    def call(self, tensors, what, mask=CAUSAL):
        f = self.make(mask, tensors[0].shape[2])
        return attention_call(f, [*map(self.turn, tensors)], what)


FLASH, CUDNN = (partial(sdpa_kernel, x) for x in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
CONTENDERS = {"ours": Contender(ours, decode=decode_ours)}  # on the backend that is fastest
if GPU:
    CONTENDERS["ours free"] = Contender(partial(ours, deterministic=False))
    CONTENDERS["triton"] = Contender(partial(ours, backend="triton"))  # what every GPU can run
    CONTENDERS["fa2"] = Contender(sdpa, True, FLASH, decode_sdpa)
    CONTENDERS["cudnn"] = Contender(sdpa, True, CUDNN)
    CONTENDERS["flex"] = Contender(flex, True, decode=decode_flex)
    CONTENDERS["fa3"] = Contender(partial(flash, "flash_attn_interface"), decode=decode_fa3)
    CONTENDERS["fa4"] = Contender(partial(flash, "flash_attn.cute"))
    CONTENDERS["fa4 det"] = Contender(partial(flash, "flash_attn.cute", deterministic=True))
else:
    CONTENDERS["sdpa"] = Contender(biased_sdpa, True, decode=decode_sdpa)
CONTENDERS["ours float8"] = Contender(None, decode=decode_float8, store=quantized)
KERNELS = [who for who in CONTENDERS if CONTENDERS[who].make]
EAGER = [who for who in KERNELS if who != "flex"]
DECODERS = [who for who in CONTENDERS if CONTENDERS[who].decode]
OURS = "ours", "triton"  # how the names of our contenders begin

FAILED = {}  # "contender: reason" -> names of the rows that show a dash for it


def gathered(x):
    """Every rank's x."""
    found = [x] * N_RANKS
    if N_RANKS > 1:
        dist.all_gather_object(found, x)
    return found


def attempt(who, row, f, *args, context=None):
    """f(*args), or None if it fails: one contender must not stop the others. FAILED keeps the reason. Every
    rank calls this, and all get None if it fails on any.

    context: what f runs in, if not what the contender called `who` runs in."""
    if context is None:
        context = CONTENDERS[who].context if who in CONTENDERS else nullcontext
    result = reason = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with context():  # once for many calls, as entering it takes host time
                result = f(*args)
        except Exception as error:
            # SDPA raises "No available kernel" and warns why, also of kernels that were not asked for
            said = [str(w.message).split(" (Triggered")[0] for w in caught]
            said = [text for text in said if not re.search("because|runtime disabled|deprecated", text)]
            kind = "refused" if isinstance(error, NotImplementedError) else type(error).__name__
            reason = " ".join(f"{kind}: {error} {' '.join(said)}".split())[:200]
    if reason and GPU:
        torch.cuda.empty_cache()  # it may have run out of memory; the tensors that it held are free by now
    if reason := next(filter(None, gathered(reason)), None):
        FAILED.setdefault(f"{who}: {reason}"[:200], []).append(row)
        return None
    return result


def of_each(names, row, f, *args):
    """{who: f(contender, *args)} of those contenders that do not fail."""
    found = {who: attempt(who, row, f, CONTENDERS[who], *args) for who in names}
    return {who: x for who, x in found.items() if x is not None}


def why(who, row):
    """Of a contender that failed: "refused" or "failed"."""
    refused = any(row in rows for reason, rows in FAILED.items() if reason.startswith(f"{who}: refused: "))
    return "refused" if refused else "failed"


def slowest(*numbers):
    """The largest of each number over all ranks, which wait for each other here."""
    numbers = torch.tensor(numbers, dtype=torch.float64, device=DEVICE)
    if N_RANKS > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


# -----------------------------------------------------------------------------
# peers on a ring. Under a schedule of the same name they take the same shards as ours


class Peer(NamedTuple):
    library: str
    variant: str
    schedule: str
    contender: Contender  # it takes this rank's shards
    backward: bool = True


COMMON = "zigzag"  # every peer has this schedule; ours is timed under it over p2p and with other heads too
ring_mesh = cache(dist.device_mesh.init_device_mesh)


@contextlib.contextmanager
def context_parallel(rotate, kernel):
    """Inside, SDPA on (B, H, T, D) is a ring."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    sequence = torch.zeros(1, 2 * N_RANKS, device=DEVICE)  # it must shard something; our tensors are shards
    mesh, failed = ring_mesh(DEVICE, (N_RANKS,)), None
    with context_parallel(mesh, buffers=[sequence], buffer_seq_dims=[1]), CONTENDERS[kernel].context():
        try:
            yield
        except Exception as error:  # before torch 2.14 it would leave SDPA a ring
            failed = error
    if failed:
        raise failed


STAND_IN = {"kernel": None}  # the kernel that the stand-ins for flash_attn's functions call


@contextlib.contextmanager
def on_kernel(kernel):
    ring_flash_attn()  # raises ImportError here, before anything is sent to other ranks
    if kernel == "fa3":
        importlib.import_module("flash_attn_interface")
    STAND_IN["kernel"] = kernel
    yield


@cache
def no_dropout(kernel):
    """Seed and offset, which a backward without dropout does not read."""
    if kernel == "fa2":
        return [torch.zeros(n, dtype=torch.uint64, device=DEVICE) for n in (2, 0)]
    return [torch.zeros((), dtype=torch.int64, device=DEVICE)] * 2


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
    seed = no_dropout(kernel)
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
    if (real := importlib.util.find_spec("flash_attn")) is not None:
        flash_attn.__path__ = list(real.submodule_search_locations)  # FlashAttention-4 is in flash_attn.cute
    package.__path__ = list(found.submodule_search_locations)
    interface._flash_attn_forward, interface._flash_attn_backward = stand_in_forward, stand_in_backward
    sys.modules.update(zip(names, (package, flash_attn, interface)))
    functions = {}
    for schedule, name in dict(contiguous="ring", zigzag="zigzag_ring", striped="stripe").items():
        module = importlib.import_module(f"ring_flash_attn.{name}_flash_attn")
        functions[schedule] = getattr(module, f"{name}_flash_attn_func")
    return functions


def make_ring_flash_attn(schedule, mask, H):
    mask.allow()
    return lambda q, k, v: ring_flash_attn()[schedule](q, k, v, causal=mask.causal)  # it may be missing


PEERS = []
if GPU:
    for rotate, kernel in itertools.product(("allgather", "alltoall"), ("cudnn", "fa2")):
        contender = Contender(sdpa, True, partial(context_parallel, rotate, kernel))
        PEERS.append(Peer("torch cp", f"{rotate} {kernel}", "zigzag", contender))
    for schedule, kernel in itertools.product(("zigzag", "striped", "contiguous"), ("cudnn", "fa2", "fa3")):
        contender = Contender(partial(make_ring_flash_attn, schedule), context=partial(on_kernel, kernel))
        PEERS.append(Peer("ring-flash-attn", kernel, schedule, contender, backward=kernel != "fa3"))
LIBRARIES = list(dict.fromkeys(peer.library for peer in PEERS))

# -----------------------------------------------------------------------------
# measuring


def generator(name):
    """Each row has inputs of its own, the same in every run."""
    return torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))


def normal(g, *shape, dtype=DTYPE):
    return torch.randn(*shape, generator=g, dtype=dtype, device=DEVICE)


def make(name, B, S, H, HKV, D, dtype=DTYPE):
    """q, k, v, do."""
    g = generator(name)
    return [normal(g, B, S, heads, D, dtype=dtype) for heads in (H, HKV, HKV, H)]


def attention_call(f, tensors, what):
    """A function without arguments. what="fwd": it returns [o] of f(q, k, v); "fwd+bwd": o and gradients;
    "bwd": gradients of one forward, which is done here. tensors: q, k, v, do."""
    *inputs, do = tensors
    inputs = [x.detach().requires_grad_(what != "fwd") for x in inputs]
    if what == "bwd":
        return partial(torch.autograd.grad, f(*inputs), inputs, do, retain_graph=True)

    def call():
        o = f(*inputs)
        return (o, *torch.autograd.grad(o, inputs, do)) if what == "fwd+bwd" else (o,)

    return call


def synchronize():
    if GPU:
        torch.cuda.synchronize()


# timers: microseconds of one of n calls in a row, after one that compiles and warms up


def wall_us(f, n):
    """The host's work included."""
    f()
    synchronize()
    start = time.perf_counter()
    for _ in range(n):
        f()
    synchronize()
    return (time.perf_counter() - start) / n * 1e6


def events_us(f, n, before=None):
    """Median from the end of one call to the end of the next: the host's time shows where it is longer.
    before: a function that runs before each call; the clock starts at its end."""
    if not GPU:
        return wall_us(f, n)
    f()
    starts, ends = [[torch.cuda.Event(enable_timing=True) for _ in range(n)] for _ in "ab"]
    starts[0].record()
    for start, end in zip(starts, ends):
        if before:
            before(), start.record()
        f()
        end.record()
    torch.cuda.synchronize()
    starts = starts if before else [starts[0], *ends]
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends)) * 1e3


def cold_us(f, n):
    """The GPU's time, with no inputs in its L2 cache."""
    return events_us(f, n, flush().zero_ if GPU else None)


@cache
def flush():
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def slowest_us(who, row, call, n, context=None, timer=events_us):
    """On the slowest rank; None if it fails on any."""

    def timed():
        if N_RANKS > 1:
            dist.barrier()
        synchronize()
        return timer(call, n)

    us = attempt(who, row, timed, context=context)
    return us and slowest(us)[0]


def in_turns(row, calls, timer, contexts={}):
    """{who: microseconds per call} of those that do not fail, on the slowest rank. contexts: {who: what the
    call runs in}, for those that are no contenders.

    The median of five rounds in which all take turns. Each round begins with another one, as a busy GPU
    gets slower. Calls of more than 0.3 s are timed once."""
    about = {who: slowest_us(who, row, f, 1, contexts.get(who), timer) for who, f in calls.items()}
    found = {who: [us] for who, us in about.items() if us}
    order = list(found)
    for i in range(5 if GPU else 2):
        start = i * len(order) // 5
        for who in order[start:] + order[:start]:
            if about[who] < 3e5:
                n = int(min(50, max(2, 4e4 / about[who]))) if GPU else 1
                us = slowest_us(who, row, calls[who], n, contexts.get(who), timer)
                found[who] = [*found[who], us] if i else [us]
    return {who: statistics.median(us) for who, us in found.items() if all(us)}


def n_caches(needed):
    """How many caches of `needed` bytes fill L2 four times: a call on each in turn finds none of its own."""
    return -(-4 * torch.cuda.get_device_properties().L2_cache_size // needed) if GPU else 1


def decode_us(row, callers):
    """{how: {who: microseconds per call}}. callers: {who: (f, q, [(k, v)])}; f(q, k, v) is called on the
    caches in turn, eight times or more."""
    callers = {who: (f, q, caches * -(-8 // len(caches))) for who, (f, q, caches) in callers.items()}
    calls = {who: lambda x=x: [x[0](x[1], *kv) for kv in x[2]] for who, x in callers.items()}
    found = {}
    if GPU:
        graphs = {who: attempt(who, row, capture, f) for who, f in calls.items()}
        replays = {who: graph[0] for who, graph in graphs.items() if graph}
        found["graph"] = in_turns(row, replays, events_us)
    found["eager"] = in_turns(row, calls, wall_us)
    return {how: {who: t / len(callers[who][2]) for who, t in us.items()} for how, us in found.items()}


@cache
def copy_gbs():
    """GB/s, read and written, of a copy of 1 GiB: the most that memory gives in practice."""
    x = torch.randn(2**29, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / events_us(lambda: y.copy_(x), 20) / 1e3


def peak_bytes(call):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def relative_error(x, true):
    """In the Frobenius norm; raises ValueError where x is wrong: not finite, or further off than float8."""
    error = ((x.to(true.dtype) - true).norm() / true.norm()).item()
    if not error < 0.1:
        raise ValueError(f"the result is wrong: its relative error is {error:.2g}")
    return error


def same_bits(call, results, times=1):
    """Do more calls return the same bits? All are made, also after a difference: other ranks wait in them."""
    return all([torch.equal(x, y) for _ in range(times) for x, y in zip(call(), results, strict=True)])


# -----------------------------------------------------------------------------
# tables. A section is a title, a function, and {row name: arguments}. function(row name, *arguments) measures
# and returns lines, {heading: text, number, or None for a dash}, which are printed and go into the JSON

LEFT = {"name": 31, "what": 15, "best peer": 15, "who": 26, "variants": 0}  # widths of the columns of text


def shown(x):
    if isinstance(x, str):
        return x
    return "-" if x is None else f"{x:.0f}" if x >= 1e4 else f"{x:.1e}" if abs(x) < 1e-3 else f"{x:.4g}"


def print_line(line):
    cells = [(heading, shown(x)) for heading, x in line.items()]
    cells = [x.ljust(LEFT[h]) if h in LEFT else x.rjust(max(8, len(h))) for h, x in cells]
    print("  ".join(cells).rstrip(), flush=True)


def of_best(values, better=min):
    """How many times as good as the best peer ours is, and that peer. values: {contender: number}."""
    peers = {who: x for who, x in values.items() if not who.startswith(OURS)}
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
    if GPU:
        lengths = (4 * K, 16 * K) if quick else (K, 4 * K, 8 * K, 16 * K, 64 * K)
        shapes = [(D, S, 2048 // D, 2048 // D) for D in (64, 128) for S in lengths]
        shapes += [(128, S, 32, 8) for S in (8 * K, 16 * K) if not quick]
        shapes = [(*shape, mask) for shape in shapes for mask in (CAUSAL, FULL)]
        shapes += [(D, 4 * K, 2048 // D, 2048 // D, CAUSAL) for D in (80, 96, 192, 256) if not quick]
        title = (
            "B*S = 16384 tokens (at 64k 65536), H*D = 2048, or H/HKV as named; flex at 16k only, not tuned"
        )
    else:
        shapes = [(64, S, 4, HKV, mask) for S, HKV in ((512, 4), (512, 2)) for mask in (CAUSAL, FULL)]
        title = "B1 H4"
    rows = {}
    for D, S, H, HKV, mask in shapes:
        name = f"D{D} {size(S)} {'causal' if mask.causal else 'full'}" + (f" {H}/{HKV}" if H != HKV else "")
        names = [who for who in KERNELS if who != "flex" or S == 16 * K]
        rows[name] = (max(1, 16 * K // S) if GPU else 1, S, H, HKV, D), mask, names
    return f"kernels: {title}", kernel_row, rows


def masked(quick, some, title):
    B, S, H, HKV, D = shape = (1, 32 * K, 32, 8, 128) if GPU else (1, 512, 4, 2, 64)
    chosen = {"causal": CAUSAL, **dict([*masks(S).items()][some])}
    rows = {f"mask {name}": (shape, mask, KERNELS) for name, mask in chosen.items()}
    text = f"{title}: B1 S{S} {H}/{HKV} D{D}, all causal; 16 documents: of random lengths; flex: not tuned"
    return text, kernel_row, rows


def truth_of(mask, tensors, H, dtype):
    """o, dq, dk, dv by the formula; tensors: of the last of H heads."""
    return attention_call(partial(dense, mask, H), [x.to(dtype) for x in tensors], "fwd+bwd")()


def kernel_row(name, shape, mask, names):
    (B, S, H, HKV, D), tensors = shape, make(name, *shape)
    # the truth of one batch item and key/value head, the last, where offsets are largest
    truth = truth_of(mask, [x[-1:, :, -(x.shape[2] // HKV) :] for x in tensors], H, TRUE_DTYPE)
    us, errors, same = {}, {}, {}

    def prepare(contender, what, expected):
        call = contender.call(tensors, what, mask)
        results = call()
        pairs = zip(map(contender.turn, results), expected, strict=True)
        error = max(relative_error(x[-1:, :, -true.shape[2] :], true) for x, true in pairs)
        return call, error, same_bits(call, results)

    for what, expected in ("fwd", truth[:1]), ("bwd", truth[1:]):
        found = of_each(names, name, prepare, what, expected)
        us[what] = in_turns(name, {who: call for who, (call, *_) in found.items()}, cold_us)
        for who, (_, error, repeats) in found.items():
            errors[who] = max(error, errors.get(who, 0))
            same[who] = "yes" if repeats and same.get(who) != "no" else "no"
        names = list(us[what])  # without a forward there is no backward
        found.clear()
    us["fwd+bwd"] = {who: us["fwd"][who] + t for who, t in us["bwd"].items()}
    lines = []
    for (what, times), products in zip(us.items(), (2, 5, 7)):
        flop = 2 * products * B * H * mask.pairs(S) * D
        rates = {who: flop / t * 1e3 / FLOP_PER_MS for who, t in times.items()}
        lines.append(compare(name, f"{what} {RATE}", rates, KERNELS, max))
    lines.append(compare(name, "error", errors, KERNELS))
    repeats = {"name": name, "what": "deterministic"} | {who: same.get(who) for who in KERNELS}
    return [*lines, repeats | {"of best": "", "best peer": ""}]


def small(quick):
    calls = itertools.product(("eager", "graph"), ("fwd", "fwd+bwd"))
    rows = {f"small {how} {what}": (how == "graph", what, True) for how, what in calls}
    rows["small one thread fwd+bwd"] = False, "fwd+bwd", False  # as in train.py: see its setup
    title = """small: microseconds of wall time, the host's included; B1 S2048 H32 D128 causal
one thread: eager, with autograd in the thread that calls"""
    return title, small_row, rows


def small_row(name, graph, what, threads):
    tensors = make(name, 1, 2 * K, 32, 32, 128)

    def prepare(contender):
        call = contender.call(tensors, what)
        return capture(call)[0] if graph else call

    with torch.autograd.set_multithreading_enabled(threads):
        return [compare(name, "us", in_turns(name, of_each(EAGER, name, prepare), wall_us), EAGER)]


def memory(quick):
    rows = {f"memory {size(T)}": (T,) for T in (32 * K, 64 * K, 128 * K, 256 * K)}
    return "memory: peak of forward + backward beyond the inputs; B1 H8 D128 causal", memory_row, rows


def memory_row(name, T):
    tensors = make(name, 1, T, 8, 8, 128)

    def measure_memory(contender):
        return peak_bytes(contender.call(tensors, "fwd+bwd"))

    peaks, units = of_each(EAGER, name, measure_memory), {"GiB": 2**30, "MiB / 1k": K * T}
    return [compare(name, unit, {who: x / n for who, x in peaks.items()}, EAGER) for unit, n in units.items()]


# what --errors measures: the smallest shapes that have all kinds of tiles, so that float64 is quick
ERROR_S, REPEATS, VIRTUAL = (2 * K, 20, (4, 8)) if GPU else (128, 2, (2,))
ERROR_HEADS = (8, 2) if N_RANKS == 1 else (4, 4)  # not all peers on rings take grouped heads
ERROR_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def errors(quick, dtype="bf16"):
    chosen = {"causal": CAUSAL, "full": FULL, **masks(ERROR_S)}
    rows = {f"error {dtype} {name}": (mask, ERROR_DTYPES[dtype]) for name, mask in chosen.items()}
    (H, HKV), D = ERROR_HEADS, RING_D
    title = f"""errors in {dtype}: B2 S{ERROR_S} {H}/{HKV} D{D}; all but full causal. The largest absolute
error of each tensor beside float64: of SDPA, and of others as multiples of SDPA's, of which test.py allows 2
for o, 3 for gradients. For softcap and ALiBi the formula in {dtype} takes SDPA's place
same bits: in {REPEATS} more calls, forward and backward. ours xN: the worst of all schedules, virtual ring"""
    return title, error_row, rows


def error_contenders():
    """{who: [(contender, schedule of its shards)]}; on one rank a shard is the whole."""

    def on_ring(**options):
        f = partial(ours, f=ring_attn.ring_attn, **options)
        return [(Contender(partial(f, schedule=x)), x) for x in ring_attn.SCHEDULES]

    if N_RANKS == 1:
        names = [who for who in KERNELS if who != "sdpa"]  # it is the yardstick
        found = {who: [(CONTENDERS[who], "contiguous")] for who in names}
        return found | {f"ours x{n}": on_ring(group=ring_attn.VirtualRing(n)) for n in VIRTUAL}
    found = {f"ours {x}": on_ring(transport=x) for x in ("p2p", "symmetric")[: 1 + GPU]}
    for peer in PEERS:
        found[f"{peer.library} {peer.schedule} {peer.variant}"] = [(peer.contender, peer.schedule)]
    return found


def error_row(name, mask, dtype):
    H, HKV = ERROR_HEADS
    tensors = make(name, 2, ERROR_S, H, HKV, RING_D, dtype)
    truth = truth_of(mask, tensors, H, torch.float64)

    def largest(results, expected):
        found = [(x - true).abs().max().item() for x, true in zip(results, expected)]
        return [x if math.isfinite(x) else math.inf for x in found]

    if mask.softcap or mask.alibi:
        yardstick = largest(truth_of(mask, tensors, H, dtype), truth)
    else:
        judge = Contender(biased_sdpa, True)
        yardstick = largest(map(judge.turn, judge.call(tensors, "fwd+bwd", mask)()), truth)

    def measure(what, contenders):
        worst, repeats = [0.0] * (4 if what == "fwd+bwd" else 1), True
        for contender, schedule in contenders:
            mine = partial(ring_attn.shard, schedule=schedule, rank=RANK, n_ranks=N_RANKS)
            inputs = [contender.turn(mine(x)).contiguous() for x in tensors]
            call = attention_call(contender.make(mask, H), inputs, what)
            results = call()
            worst = [*map(max, worst, largest(map(contender.turn, results), map(mine, truth)))]
            repeats &= same_bits(call, results, REPEATS)
        return *worst, not repeats

    columns = "o", "dq", "dk", "dv"
    lines = [{"name": name, "who": "SDPA"} | dict(zip(columns, yardstick)) | {"same bits": ""}]
    for who, contenders in error_contenders().items():
        line, context = lines[0] | {"who": who}, contenders[0][0].context
        for what, n in ("fwd", 1), ("fwd+bwd", 4):  # some have no backward
            found = attempt(who, name, measure, what, contenders, context=context)
            if found is None:
                line |= dict.fromkeys(columns[n // 4 :], why(who, name))
                break
            *worst, differ = slowest(*found)
            line |= {x: a / max(b, 1e-12) for x, a, b in zip(columns[:n], worst, yardstick)}
            line["same bits"] = "no" if differ else "yes"
        lines.append(line)
    return lines


def decode(quick):
    if GPU:
        shapes = (1, 32, 8, 1), (1, 32, 8, 8), (1, 32, 8, 128), (2, 28, 4, 20), (3, 40, 8, 12)
        shapes += (8, 32, 8, 8), (8, 32, 8, 32), (64, 32, 8, 8), (16, 32, 1, 16), (16, 16, 16, 8)
        rows = {f"decode B{B} {H}/{HKV} {N}k": DecodeShape(B, H, HKV, N * K) for B, H, HKV, N in shapes}
        rows["decode ragged"] = DecodeShape(32, 32, 8, 128 * K, lengths=[512] * 31 + [128 * K])
        for n in (16, 64):
            rows[f"decode pages of {n}"] = DecodeShape(8, 32, 8, 8 * K, lengths=[8 * K] * 8, page_size=n)
        rows["decode window"] = DecodeShape(1, 32, 8, 128 * K, window=4 * K)
        rows |= {f"decode M{M}": DecodeShape(8, 32, 8, 8 * K, M=M) for M in (4, 8)}
        some = re.compile("B1 |B3|B8|pages|M8" if quick else "")
        rows = {name: x for name, x in rows.items() if some.search(name)}
        title = """decode: D128, one token; ours float8: keys and values in float8_e4m3fn, with scales
ragged: B32 32/8, one sequence of 128k tokens and 31 of 512. pages, M4 and M8 (new tokens): B8 32/8 8k.
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

    def prepare(contender):
        call, mine = contender.decode(shape, lengths, table), contender.turn(q)
        if call is None:
            return None
        needed = shape.needed(contender.store is quantized)
        caches = [make_cache(name, i, shape) for i in range(n_caches(needed))]
        caches = [[contender.store(contender.turn(x)) for x in kv] for kv in caches]
        error = relative_error(contender.turn(call(mine, *caches[0]))[-1:], truth)
        return error, needed, (call, mine, caches)

    found = of_each(DECODERS, name, prepare)
    us = decode_us(name, {who: caller for who, (*_, caller) in found.items()})
    lines = [compare(name, f"{how} us", x, DECODERS) for how, x in us.items()]
    for what, unit in (("GB/s", 1), ("of copy", copy_gbs())) if GPU else ():
        rates = {who: found[who][1] / t / 1e3 / unit for who, t in us["graph"].items()}
        lines.append(compare(name, what, rates, DECODERS, max))
    return lines + [compare(name, "error", {who: error for who, (error, *_) in found.items()}, DECODERS)]


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

    callers = {"ours": (sharded_decode_attn, q, stripes), "one rank": (decode_attn, q, caches)}
    who, lines = [*callers], []
    for how, us in decode_us(name, callers).items():
        rates = {x: shape.needed() / t / 1e3 for x, t in us.items()}
        lines.append(compare(name, f"{how} us", us, who))
        lines.append(compare(name, f"{how} GB/s", rates, who, max))

    def error():
        return relative_error(*(f(q, *kv[0]).to(TRUE_DTYPE) for f, q, kv in callers.values()))

    return [*lines, compare(name, "error", {"ours": attempt("ours", name, error)}, who)]


# -----------------------------------------------------------------------------
# rings

RING_CALLS = {"fwd": 2, "fwd+bwd": 7}  # products of two matrices


def rings(quick, lengths=(2 * K, 8 * K)):
    H, HKV, others, some = (32, 8, ((32, 32), (64, 8)), (8 * K, 32 * K)) if GPU else (4, 2, ((4, 4),), (256,))
    rows = {}
    for T in lengths if GPU else (128, 256):
        for schedule in ring_attn.SCHEDULES if T in some or not quick else ():
            rows[f"ring {schedule} {size(T)}"] = schedule, T, H, HKV
            if schedule == COMMON and T in some:
                rows[f"ring {schedule} {size(T)} p2p"] = schedule, T, H, HKV, "p2p"
        for heads in others if T in some and not quick else ():
            rows[f"ring {COMMON} {size(T)} {heads[0]}/{heads[1]}"] = COMMON, T, *heads
    return ring_title, ring_row, rows


def masked_rings(quick):
    T, H, HKV = (32 * K, 32, 8) if GPU else (256, 4, 2)
    some = (COMMON, None), (COMMON, "p2p"), ("striped", None), ("contiguous", None)
    rows = {}
    for (name, mask), (schedule, transport) in itertools.product(masks(N_RANKS * T).items(), some):
        if (GPU or not transport) and (schedule != "contiguous" or mask.window):
            row = f"ring {schedule} {name}" + (f" {transport}" if transport else "")
            rows[row] = schedule, T, H, HKV, transport, mask
    return ring_title, ring_row, rows


def ring_title():
    first = make("the first ring", 2, 128, 4, 2, RING_D)[:3]
    attempt("ours", "the first ring", ring_attn.ring_attn, *first)
    ring = ring_attn.resolve_ring(None)
    return f"""rings: {N_RANKS} ranks, causal, D{RING_D}, B1 (or what the schedule needs), tokens per rank
transport {ring.transport} ({ring.why}), or as named
ms: between the ends of calls in a row, on the slowest rank; of calls over 0.3 s, one. Backwards run in the
    thread that calls, as in train.py. graph: in a CUDA graph
{RATE}: of each rank. of ideal: one GPU's ms for the whole sequence, on all GPUs at once, / {N_RANKS} / ours
GiB: peak beyond the inputs, symmetric memory included
peers: ms of B1 under our schedule, or {COMMON} if no peer has it, of each library's fastest variant"""


@lru_cache(maxsize=1)  # memory holds one long sequence
def one_gpu(T, H, HKV, mask):
    """All ranks' tokens on every rank alone: ([q, k, v, do], [o, dq, dk, dv]), or (None, None)."""
    S = N_RANKS * T

    def results():
        if S > 512 * K:
            raise ValueError("more than 512k tokens would take minutes")
        tensors = make("one GPU", 1, S, H, HKV, RING_D)
        return tensors, attention_call(ours(mask, H), tensors, "fwd+bwd")()

    return attempt("one GPU", f"ring {size(T)} {H}/{HKV}", results) or (None, None)


@lru_cache(maxsize=1)
def fastest_peers(schedule, T, H, HKV):
    """{"fwd", "fwd+bwd": {variant: (call, what it runs in)}}: of each library the one that is fastest now."""
    best = {what: {} for what in RING_CALLS}  # {library: (microseconds, variant, (call, what it runs in))}
    q, k, v, do = make(f"peers {RANK} {T} {H} {HKV}", 1, T, H, HKV, RING_D)
    row = f"ring {schedule} {size(T)}"
    # torch cp gets grouped heads as they are, and repeated, as some of its variants refuse them
    for peer, repeats in itertools.product(PEERS, sorted({1, H // HKV})):
        contender = peer.contender
        if peer.schedule != schedule or repeats > 1 and not contender.heads_first:
            continue
        tensors = q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2), do
        tensors = [contender.turn(x).contiguous() for x in tensors]
        variant = f"{peer.library} {peer.variant}" + " repeated" * (repeats > 1)
        for what in RING_CALLS if peer.backward else ("fwd",):
            call = attention_call(contender.make(CAUSAL, H), tensors, what)
            time_it = partial(slowest_us, variant, row, call, context=contender.context)
            us = time_it(n=1)
            if us and us < 3e5:  # a short one three times: a pause of one of the hosts must not decide
                again = [time_it(n=3) for _ in range(3 if us < 5e4 else 1)]
                us = min(filter(None, again), default=None)
            if us and us < best[what].get(peer.library, (math.inf,))[0]:
                best[what][peer.library] = us, variant, (call, contender.context)
    return {what: {variant: call for _, variant, call in x.values()} for what, x in best.items()}


def ring_rates(what, ms, one_ms, B, pairs, H):
    """one_ms: of one GPU, with one of the B sequences."""
    flop, ideal = 2 * RING_CALLS[what] * B * H * pairs * RING_D, one_ms and B * one_ms / N_RANKS
    rate = ms and flop / N_RANKS / ms / FLOP_PER_MS
    return {"ms": ms, RATE: rate, "of ideal": ms and ideal and ideal / ms}


def ring_row(name, schedule, T, H, HKV, transport=None, mask=CAUSAL):
    B, pairs = ring_attn.SCHEDULES[schedule].batch_groups, mask.pairs(N_RANKS * T)
    sequence, results = one_gpu(T, H, HKV, mask)
    theirs = schedule if any(peer.schedule == schedule for peer in PEERS) else COMMON
    peers = fastest_peers(theirs, T, H, HKV) if mask == CAUSAL else dict.fromkeys(RING_CALLS, {})

    def mine(x):
        """This rank's shard of B sequences; every other one has the heads reversed."""
        x = x if B == 1 else torch.cat([x.flip(2) if i % 2 else x for i in range(B)])
        return ring_attn.shard(x, schedule, RANK, N_RANKS)

    tensors = [mine(x) for x in sequence] if sequence else make(f"{name} {RANK}", B, T, H, HKV, RING_D)
    ring = ring_attn.resolve_ring(None)
    options = dict(schedule=schedule, group=ring, transport=transport)
    whole, on_ring = ours(mask, H), ours(mask, H, ring_attn.ring_attn, **options)
    calls, lines = {what: attention_call(on_ring, tensors, what) for what in RING_CALLS}, []
    for what, call in calls.items():
        contenders = {"ours": call}
        if sequence:
            contenders["one GPU"] = attention_call(whole, sequence, what)
        contenders |= {x: f for x, (f, _) in peers[what].items()}
        contexts = {x: context for x, (_, context) in peers[what].items()}
        times = {x: us / 1e3 for x, us in in_turns(name, contenders, events_us, contexts).items()}
        ms, one_ms = map(times.get, ("ours", "one GPU"))
        variants = [who for who in peers[what] if who in times]
        library_ms = {x: times[who] for x in LIBRARIES for who in variants if who.startswith(x)}
        line = {"name": name, "what": what, "transport": transport or ring.transport, "heads": f"{H}/{HKV}"}
        line |= ring_rates(what, ms, one_ms, B, pairs, H)
        line |= {"GiB": None if what == "fwd+bwd" else "", "error": None, "one GPU": one_ms}
        line |= {x: library_ms.get(x) for x in LIBRARIES}
        line |= of_best(library_ms | ({"ours": ms / B} if ms else {}))
        lines.append(line | {"variants": ", ".join(variants)})
    if not all(line["ms"] for line in lines):
        return lines
    forward, both = lines
    if GPU and (peak := attempt("memory", name, peak_bytes, calls["fwd+bwd"])):
        staging = ring.memory.local.nbytes if both["transport"] == "symmetric" else 0
        both["GiB"] = (slowest(peak)[0] + staging) / 2**30
    if results:

        def errors():
            pairs = zip(calls["fwd+bwd"](), results, strict=True)
            return [relative_error(x.float(), mine(true).float()) for x, true in pairs]

        if found := attempt("ours", name, errors):
            forward["error"], *grads = slowest(*found)
            both["error"] = max(grads)
    for line, call in zip([forward, both], calls.values()) if GPU and T == 2 * K else ():
        captured = attempt("ours in a CUDA graph", name, capture, call)
        if us := captured and slowest_us("ours in a CUDA graph", name, captured[0], 20):
            rates = ring_rates(line["what"], us / 1e3, line["one GPU"], B, pairs, H)
            lines.append(dict.fromkeys(line, "") | {"name": name, "what": f"graph {line['what']}"} | rates)
    return lines


# -----------------------------------------------------------------------------
# whole models: training, as train.py does it, and generating


def training(quick):
    flags = ["--steps=12", "--log_every=4", "--eval_batches=1", "--sample_tokens=0"]
    if not GPU:
        flags += ["--steps=2", "--seq_len=64", "--batch_size=4", "--n_layers=1", "--dim=64", "--device=cpu"]
    rows = {f"train {x}": f"--schedule={x}" for x in ring_attn.SCHEDULES if N_RANKS > 1}
    if N_RANKS == 1:
        rows = {"train flash": "--schedule=flash", "train sdpa": "--schedule=sdpa"}
        rows["train flash compiled"] = "--schedule=flash --compile"
    elif GPU and not quick:
        more = "--seq_len=1048576 --batch_size=1 --n_layers=4 --dim=512 --checkpoint --steps=2 --log_every=1"
        rows[f"train {COMMON} 1M tokens"] = f"--schedule={COMMON} {more}"
    title = """training: train.py's default model, the last line that it logs
1M tokens: one sequence, 4 layers of width 512"""
    return title, train_row, {name: ([*flags, *more.split()],) for name, more in rows.items()}


def train_row(name, flags):
    with tempfile.TemporaryDirectory() as folder:
        folder = gathered(folder)[0]
        args = train.parse([*flags, f"--out={folder}"])

        def run():
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                train.train(args)
            return True

        if not attempt("ours", name, run):
            return [{"name": name, "ms per step": None}]
        with open(Path(folder, "metrics.csv"), newline="") as f:
            last = [row for row in csv.DictReader(f) if row["loss"]][-1]
        slowest(0)  # all have read it
    names = {"loss": "loss", "tokens_per_second": "tokens/s", "mfu": "MFU", "memory_gib": "GiB"}
    line = {"name": name, "ms per step": 1e3 * float(last["seconds_per_step"])}
    return [line | {text: float(last[x]) if last[x] else None for x, text in names.items()}]


SHAPE = dict(n_layers=8, dim=2048, dim_per_head=128, n_kv_heads=8) if GPU else dict(n_layers=1, dim=64)


def generating(quick):
    lengths = (8 * K, 32 * K, 128 * K)[1 if quick else 0 :] if GPU else (256,)
    shape = ", ".join(f"{name} {n}" for name, n in SHAPE.items())
    title = f"""generate: a prompt of so many tokens, then one more a step; {shape}
on a ring each rank has a part of the prompt and of the cache; one rank: has all, at the same time
step: {"one replay of a CUDA graph" if GPU else "eager"}, without the sampling"""
    return title, generate_row, {f"generate {size(S)}": (S,) for S in lengths}


@torch.no_grad()
def generate_row(name, S, steps=50 if GPU else 2):
    tokens, lines = torch.randint(256, (1, S), generator=generator(name), device=DEVICE), []

    def measure(model):
        cache = model.to(DEVICE, DTYPE).new_cache(1, S + 4 * steps)

        def prefill():
            cache.release([0])
            model.prefill(tokens, cache)

        ms, new = events_us(prefill, 2) / 1e3, tokens[:, -1:]
        model.step(new, cache)
        step = capture_step(model.decode, new, cache) if GPU else model.step
        us = events_us(lambda: step(new, cache), steps)
        return ms, us

    ranks = {"ours": (AttentionType.STRIPED, RANK, N_RANKS)} if N_RANKS > 1 else {}
    for who, (kind, rank, n_ranks) in (ranks | {"one rank": (AttentionType.FLASH, 0, 1)}).items():
        torch.manual_seed(0)
        model = Transformer(Config(seq_len=S, **SHAPE), rank, n_ranks, kind)
        if found := attempt("ours", name, measure, model):
            ms, us = slowest(*found)
            line = {"name": name, "who": who, "prefill ms": ms, "prefill tokens/s": S / ms * 1e3}
            lines.append(line | {"step us": us, "tokens/s": 1e6 / us})
    return lines


if N_RANKS > 1:
    SECTIONS = {"rings": rings, "ring-masks": masked_rings, "sharded": sharded}
    if GPU:
        SECTIONS["rings-32k"] = partial(rings, lengths=(32 * K,))
else:
    SECTIONS = {"kernels": kernels, "masks": partial(masked, some=slice(4), title="windows, documents")}
    SECTIONS["mods"] = partial(masked, some=slice(4, None), title="sinks, softcap, ALiBi")
    SECTIONS |= dict(small=small, memory=memory) if GPU else {}
    SECTIONS["decode"] = decode
MORE = {"train": training, "generate": generating}  # they run only where a flag asks for them
MORE |= {f"errors-{dtype}": partial(errors, dtype=dtype) for dtype in ERROR_DTYPES}
SECTIONS |= MORE

# -----------------------------------------------------------------------------
# what overlaps: a profile of every rank

PARTS = ring_attn.Backend._fields
MOVES = {"keys": "keys, values", "pass_on": "gradients"}  # methods of a transport that start copies


def profiled(call, calls, path):
    """Events of a Chrome trace of some calls, written to path."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * GPU
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        synchronize()
    profile.export_chrome_trace(str(path))
    found = json.loads(path.read_text())
    base = int(found.get("baseTimeNanoseconds", 0)) / 1e3
    return [event | dict(ts=base + event["ts"]) for event in found["traceEvents"] if event.get("ph") == "X"]


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
        category = "gpu_user_annotation"
        kernels = [x for x in events if x.get("cat") == "kernel" and "nccl" not in x["name"]]
        stream = statistics.mode(x["tid"] for x in kernels)  # where attention runs
    ranges = [x for x in events if x.get("cat") == category and x["name"] in (*PARTS, *MOVES.values())]
    ranges.sort(key=lambda x: x["ts"])
    found = []
    for event in events:
        cat, name, start, thread = event.get("cat"), event["name"], event["ts"], event["tid"]
        wanted = cat in ("kernel", "gpu_memcpy") if GPU else cat == category and name in (*PARTS, "gloo:recv")
        if not wanted:
            continue
        moves = cat == "gpu_memcpy" and thread != stream or "nccl" in name or name == "gloo:recv"
        kind = "forward" if "fwd" in name else "other"
        for x in ranges:  # the last that began before it; a CPU's messages may outlast theirs
            if x["tid"] == thread and x["ts"] - 0.1 <= start and (not GPU or start < x["ts"] + x["dur"]):
                kind = x["name"]
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

    mine = attempt("ours", "trace", profile)
    if mine is None:
        return None
    ranks = gathered(mine)
    zero = min(start for rank in ranks for _, start, *_ in rank)  # the clocks of processes on a host agree
    for event in itertools.chain(*ranks):
        event[1:3] = round(event[1] - zero), max(1, round(event[2]))
    facts = dict(T=T, H=H, HKV=HKV, D=RING_D, schedule=COMMON, n_ranks=N_RANKS, ranks=ranks)
    return facts | dict(transport=ring_attn.resolve_ring(None).transport)


# -----------------------------------------------------------------------------
# pictures and RESULTS.md

DASHED = 'stroke-width="1.5" stroke-dasharray="4 3"'


def measured_on(found):
    return f"{found['gpu'] or 'CPU'} | torch {found['torch']} | commit {found['commit']}"


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
        T, height = 8 * multiple, min(44, 72 / n_groups - 4)
        work = [sum(share for _, share in hops) for hops in ring_attn.work(schedule, R)]
        shares = [x / sum(work) for x in work]
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
        parts.append(stroke([(x, y - 2), (x, y + 24 * R - 2)], DASHED))
        y += 24 + max(24 * R, 28 + round(n_groups * (height + 4)))
    text = "squares: queries down, keys across, coloured by the rank they come from. dashed: an even share"
    svg(folder / "schedules.svg", 870, y + 10, parts, text)


def throughput_figure(path, runs):
    """Bars for tokens per GPU, forward and forward + backward, for the number of GPUs of the first run."""
    n_ranks = runs[0]["n_ranks"]
    lines = [line for found in runs if found["n_ranks"] == n_ranks for line in ring_lines(found)]
    who = {"ours": BLUE, "torch cp": ORANGE, "ring-flash-attn": GREEN}
    titles = f"this project, {COMMON}", "torch context_parallel", f"ring-flash-attn, {COMMON}"

    def rates(line):
        rate = {"ours": line["TFLOP/s"], "ideal": line["of ideal"] and line["TFLOP/s"] / line["of ideal"]}
        return rate | {x: rate["ours"] * line["ms"] / line[x] for x in who if line.get(x)}

    names = list(dict.fromkeys(line["name"] for line in lines))
    top = 1.08 * max(rate for line in lines for rate in rates(line).values() if rate)
    base, height, width, bar = 330, 250, 400, 400 * 0.8 / len(names) / len(who)
    parts = [*legend(60, 28, zip(who.values(), titles)), stroke([(660, 24), (684, 24)], DASHED)]
    parts.append(label(690, 28, "one GPU with the whole sequence"))
    for left, what, title in (60, "fwd", "forward"), (510, "fwd+bwd", "forward + backward"):
        parts.append(label(left, 62, f"{title}, TFLOP/s per GPU", size=14, weight="bold"))
        parts += y_axis(left, base, width, height, top)
        for line in (line for line in lines if line["what"] == what):
            x, rate = left + width * (names.index(line["name"]) + 0.1) / len(names), rates(line)
            for n, (key, color) in enumerate(who.items()):
                if rate.get(key):
                    y = height * rate[key] / top
                    parts.append(rect(x + n * bar, base - y, bar - 4, y, color))
                    y, style = (y - 18, ("bold", "#ffffff")) if y > 24 else (y, ())
                    middle = x + (n + 0.5) * bar - 2
                    parts.append(label(middle, base - y - 4, f"{rate[key]:.0f}", "middle", 11, *style))
            if rate["ideal"]:
                y = base - height * rate["ideal"] / top
                parts.append(stroke([(x - 4, y), (x + 3 * bar, y)], DASHED))
            tokens = f"{line['name'].split()[-1]} per GPU"
            parts.append(label(x + 1.5 * bar - 2, base + 18, tokens, "middle", 12))
    what = f"{lines[0]['heads']} heads, D128, {runs[0]['dtype']}, causal, transport {lines[0]['transport']}"
    parts.append(label(10, 390, f"{what}; peers: the fastest of their variants", size=11))
    svg(path, 940, 400, parts, f"{n_ranks} x {measured_on(runs[0])}")


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
        parts += [stroke([(x, 84), (x, y)]), label(x, y + 16, f"{tick:g}", "middle", 11)]
    parts.append(label(left - 8, y + 16, "ms", "end", 11))
    svg(path, left + width + 30, y + 50, parts, measured_on(found))


def errors_figure(path, runs):
    """A table for each number of GPUs and dtype, of contenders and masks: the worst of o, dq, dk, dv."""
    left, wide, high, right, y, parts = 210, 92, 18, 0, 0, []
    for found, dtype in itertools.product(runs, ERROR_DTYPES):
        lines = [line for line in lines_of(found, f"error {dtype} .*") if line["who"] != "SDPA"]
        if not lines:
            continue
        names, who = ([*dict.fromkeys(line[heading] for line in lines)] for heading in ("name", "who"))
        n_ranks, y, right = found["n_ranks"], y + 33, max(right, left + wide * len(names))
        parts.append(label(left - 10, y - 6, f"{dtype}, {n_ranks} GPU{'s' * (n_ranks > 1)}", "end", 14))
        for i, name in enumerate(names):
            parts.append(label(left + wide * (i + 0.5), y - 7, name.split(" ", 2)[2], "middle", 11))
        for j, name in enumerate(who):
            parts.append(label(left - 10, y + 12 + high * j, name, "end", 11))
        for line in lines:
            x, at = left + wide * names.index(line["name"]), y + high * who.index(line["who"])
            ratios = {key: line[key] for key in ("o", "dq", "dk", "dv") if not isinstance(line[key], str)}
            within = all(ratio <= (2 if key == "o" else 3) for key, ratio in ratios.items())  # as in test.py
            opacity = 0.15 if not ratios else 1 if line["same bits"] == "yes" else 0.6
            color = INK if not ratios else GREEN if within else ORANGE
            parts.append(rect(x, at, wide - 2, high - 2, color, opacity))
            if ratios:
                text = f"{max(ratios.values()):.2f}{' of o' * (len(ratios) == 1)}"
                parts.append(label(x + wide / 2 - 1, at + 12, text, "middle", 11, color="#ffffff"))
        y += high * len(who)
    text = "largest error of o and of gradients over SDPA's; test.py allows 2 and 3"
    parts.append(label(10, y + 30, f"{text}; pale: bits differ; grey: refused or failed", size=11))
    svg(path, right + 10, y + 60, parts, measured_on(runs[0]))


BY_HAND = "\n## Where the tests ran\n"  # from this heading on, people write RESULTS.md
CARD = "gpu", "n_ranks", "torch", "triton", "cuda", "cudnn", "dtype", "commit"


def joined(runs):
    """Runs of the same card as one, which has the rows of all."""
    found = {}
    for run in runs:
        same = found.setdefault(tuple(run.get(x) for x in (*CARD, "quick")), run | {"parts": {}})
        same["trace"] = same.get("trace") or run.get("trace")
        for part, table in run["parts"].items():
            whole = same["parts"].setdefault(part, table | {"rows": [], "failed": {}})
            whole["rows"] += table["rows"]
            for why, rows in table["failed"].items():
                whole["failed"][why] = whole["failed"].get(why, []) + rows
    return [*found.values()]


def markdown(runs):
    """RESULTS.md: a table for each part, each with the GPU and commit that made it."""
    text = ["# Results\n"]
    text.append(
        "`bench.py --figures` wrote this file from the output of `bench.py --all`, or of its parts.\n"
    )
    cards = dict.fromkeys(tuple(found[x] for x in CARD) for found in runs)
    text.append(md_table(["GPU", "ranks", *CARD[2:]], cards))
    text.append("![largest errors beside those of SDPA](errors.svg)\n")
    text.append("![kernels and copies of two ranks during forward and backward](overlap.svg)\n")
    for found in sorted(runs, key=lambda x: (x["gpu"], x["n_ranks"])):
        for part, table in found["parts"].items():
            text.append(f"## {part}: {found['n_ranks']} x {found['gpu']}, {found['commit']}\n")
            command = f"torchrun --nproc_per_node={found['n_ranks']}" if found["n_ranks"] > 1 else "python"
            command += " bench.py --quick" if found.get("quick") else " bench.py"
            text.append(f"```\n{command} --part={part}\n\n{table['title'].rstrip()}\n```\n")
            # failures() lists who refused what
            lines = [line for line in table["rows"] if "refused" not in line.values()]
            heads = list(dict.fromkeys(x for line in lines for x in line))
            text.append(md_table(heads, [[shown(line.get(x, "")) for x in heads] for line in lines]))
            text += [*failures(table["failed"]), ""]
    return "\n".join(text).rstrip() + "\n"


def failures(found):
    """A line for each reason and the rows that it explains; who failed for it comes first."""
    groups = {}
    for who_and_reason, rows in found.items():
        who, reason = who_and_reason.split(": ", 1)
        groups.setdefault((reason, *rows), []).append(who)
    lines = []
    for (reason, *rows), who in groups.items():
        n = f"{len(rows)} row{'s' * (len(rows) > 1)}"
        lines.append(f"- {', '.join(who)}: {reason} ({n}, the first {rows[0]})")
    return lines


def md_table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def lines_of(found, pattern):
    """Of a run on GPUs, the lines whose names fit."""
    tables = found["parts"].values() if found.get("gpu") else ()
    return [line for table in tables for line in table["rows"] if re.fullmatch(pattern, line["name"])]


def ring_lines(found):
    """The lines that throughput.svg shows."""
    return [x for x in lines_of(found, rf"ring {COMMON} (2|8|32)k") if x["what"] in RING_CALLS and x["ms"]]


def error_lines(found):
    return lines_of(found, "error .*")


def figures(runs):
    """Writes the README's pictures and RESULTS.md, from runs on GPUs. Throughput and errors: of the first run
    that has them, and of all others on such GPUs at its commit. Overlap: of the first run with a trace."""
    runs = joined(runs)
    ASSETS.mkdir(exist_ok=True)
    schedules_figure(ASSETS)
    wrote = ["schedules.svg"]
    pictures = ("throughput.svg", ring_lines, throughput_figure), ("errors.svg", error_lines, errors_figure)
    for name, find, draw in pictures:
        if some := [found for found in runs if find(found)]:
            draw(ASSETS / name, [found for found in some if measured_on(found) == measured_on(some[0])])
            wrote.append(name)
    if traced := next((found for found in runs if found.get("trace") and found["gpu"]), None):
        overlap_figure(ASSETS / "overlap.svg", traced)
        wrote.append("overlap.svg")
    if measured := [found for found in runs if found["gpu"] and found["parts"]]:
        results = ASSETS / "RESULTS.md"
        _, heading, by_hand = (results.read_text() if results.exists() else "").partition(BY_HAND)
        results.write_text(markdown(measured) + heading + by_hand)
        wrote.append("RESULTS.md")
    commits = {found["commit"] for found in runs if found["gpu"]}
    print(f"wrote {', '.join(wrote)} into {ASSETS}; other files need the output of runs on GPUs with --all")
    if len(commits) > 1:
        print(f"these runs are of several commits: {', '.join(map(str, commits))}")


# -----------------------------------------------------------------------------
# the run


def commit():
    """Short hash of the checkout, and whether files differ from it; None outside of one."""
    with contextlib.suppress(OSError):  # no git here
        command = "git", "describe", "--always", "--dirty", "--exclude=*"
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def refuse(parser, text):
    if RANK == 0:  # one message, not one from each rank
        parser.error(text)
    sys.exit(2)


def print_json(found):
    rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(json.dumps(rounded), flush=True)


def leave_if_stuck(found, seconds=5.0):
    """After SIGINT or SIGTERM Python raises KeyboardInterrupt, but only once it is back from C. A rank that
    waits in C for a rank that is gone stays there: a thread prints `found` and ends it, seconds later."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)

    def leave():
        os.read(read, 1)
        time.sleep(seconds)
        print("\ninterrupted, and stuck: below is what was measured so far")
        print_json(found)
        os._exit(130)

    threading.Thread(target=leave, daemon=True).start()


def tell_failed():
    """Prints the reason for each dash; did one of ours fail?"""
    print(*failures(FAILED), sep="\n", end="\n" * bool(FAILED))
    return any(reason.startswith(OURS) for reason in FAILED)


def main():
    parser, parts = argparse.ArgumentParser(description=__doc__.split("\n")[0]), [*SECTIONS, "trace"]
    flag = parser.add_argument
    flag("--quick", action="store_true", help="fewer rows: some lengths and head dims only")
    text = 'only rows whose name contains TEXT, such as "decode" or "16k causal"; once or more'
    flag("--filter", action="append", metavar="TEXT", help=text)
    text = f"only this part of the tables, once or more; with as many processes as here: {', '.join(parts)}"
    flag("--part", action="append", choices=parts, metavar="NAME", help=text)
    flag("--errors", action="store_true", help="only errors beside float64: all parts errors-*")
    flag("--all", action="store_true", help="all parts")
    text = "profile every rank into FOLDER (default: runs/trace): Chrome traces, overlap.svg; alone: no rows"
    flag("--trace", nargs="?", const="runs/trace", metavar="FOLDER", help=text)
    text = (
        "write pictures and RESULTS.md into assets, from this run, or from FILEs: the output of earlier runs"
    )
    flag("--figures", nargs="*", metavar="FILE", help=text)
    args = parser.parse_args()
    if ring_attn.INTERPRET:
        refuse(parser, "TRITON_INTERPRET=1 is set: the interpreter's speed says nothing; unset it")
    chosen = set(args.part or ()) | {part for part in SECTIONS if args.errors and part.startswith("errors")}
    only_trace = args.trace and not (args.quick or args.filter or args.all or args.figures is not None)
    if not chosen and not only_trace:
        chosen = {part for part in SECTIONS if args.all or args.filter or part not in MORE}
        chosen |= {"trace"} if args.all and N_RANKS > 1 else set()
    if "trace" in chosen:
        args.trace = args.trace or "runs/trace"
    sections = {part: make(args.quick) for part, make in SECTIONS.items() if part in chosen}
    names = [name for _, _, rows in sections.values() for name in rows]
    for text in args.filter or ():
        if names and not any(text in name for name in names):
            refuse(parser, f"--filter={text!r} is in no name; there are: {', '.join(names)}")
    if args.figures or args.figures is not None and not args.trace and not GPU:
        runs = []
        for file in args.figures:
            try:
                runs.append(json.loads(Path(file).read_text().strip().splitlines()[-1]))
                [runs[-1][x] for x in ("parts", "gpu", "n_ranks")]
            except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
                refuse(parser, f"--figures: the last line of {file} must be the JSON of a run: {error!r}")
        return figures(runs) if RANK == 0 else None
    if N_RANKS > 1:
        try:
            setup(argparse.Namespace(device=DEVICE))
        except ValueError as error:
            refuse(parser, str(error))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept

    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is float32 throughout
    found = dict(commit=commit(), gpu=torch.cuda.get_device_name() if GPU else None, torch=torch.__version__)
    found |= dict(triton=triton.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    found |= dict(dtype=str(DTYPE)[6:], n_ranks=N_RANKS, quick=args.quick)
    print(" | ".join(f"{key} {value}" for key, value in found.items()))
    if not GPU:
        print("no GPU here: these rows check that everything works; their times say nothing of speed")
    print(f"""FLOP: 4*D of the forward for each score that the mask leaves; backward 2.5 times the forward
of best: how many times as good as the best peer ours is; ours free: deterministic=False; fa4 det: True
deterministic: do two calls, forward and backward, return the same bits? Inputs are normal, times medians
error: relative (Frobenius), the worst of o, dq, dk, dv; of rings to one GPU, of other rows to
    {str(TRUE_DTYPE)[6:]}, for the last sequence (kernels: and key head)""")
    found |= dict(parts={})
    leave_if_stuck(found)
    status = 0
    try:
        for part, (title, measure_row, rows) in sections.items():
            some = [name for name in rows if any(text in name for text in args.filter or [""])]
            if not some:
                continue
            FAILED.clear()
            title = title() if callable(title) else title
            table = found["parts"][part] = dict(title=title, rows=[], failed={})
            print(f"\n{title}", flush=True)
            start = time.perf_counter()
            try:
                for name in some:
                    lines = attempt("ours, or its truth", name, measure_row, name, *rows[name]) or []
                    if lines and not table["rows"]:
                        print_line({heading: heading for heading in lines[0]})
                    for line in lines:
                        print_line(line)
                    table["rows"] += lines
            finally:
                table |= dict(failed=dict(FAILED), seconds=time.perf_counter() - start)
                status |= tell_failed()
                print(f"part {part}: {table['seconds']:.0f} s", flush=True)
        if args.trace:
            FAILED.clear()
            found["trace"] = trace(Path(args.trace))
            status |= tell_failed()
    except KeyboardInterrupt:
        print("\ninterrupted: below is what was measured so far")
        status = 130
    if RANK == 0 and status != 130:
        if found.get("trace"):
            picture = Path(args.trace) / "overlap.svg"
            overlap_figure(picture, found)
            print(f"wrote {picture}")
        if args.figures is not None:
            figures([found])
    print_json(found)
    if N_RANKS > 1 and status != 130:  # interrupted ranks may stand at different collectives, and would wait
        dist.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    main()
