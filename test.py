"""Every test of the project. On a GPU the kernels run compiled, on a CPU in Triton's interpreter.

    python test.py                        # one process: kernels, schedules, virtual rings of 1 to 8 ranks
    torchrun --nproc_per_node=4 test.py   # the same, dealt out to 4 processes, and rings of 2 and 4 real ones
    python test.py --filter zigzag        # cases whose name contains zigzag
    python test.py --compile_only         # what the kernels cost on Hopper: registers, spills; needs no GPU
    python test.py --fuzz=3000            # 3,000 more cases of masks; torchrun deals them out, too
    python test.py --kill=20              # training under 20 kill -9 of random ranks, and nothing else

Truth is float64. The yardstick is torch's SDPA in the same dtype on the same inputs: the error may be at most
twice SDPA's plus 1e-5 for o and lse (whose yardstick is a float32 logsumexp), three times for gradients.
Decoding is held to flex_attention likewise. Every torch.empty is filled with nan first. One row per case:
what was worst, its error, the bound, their ratio. A case that fails on any rank fails the run on all. Cases
that cannot run here are listed as skipped. A schedule that is added to ring_attn.SCHEDULES gets its cases by
itself.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import reprlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import weakref
import zlib
from collections import deque
from datetime import timedelta
from functools import partial
from itertools import product
from math import inf, nan
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Callable, NamedTuple
from xml.etree import ElementTree

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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import bench
import decode
import model as model_file
import ring_attn
import train
from decode import KVCache, decode_attn, decode_part, merge_parts, sharded_decode_attn
from model import Attention, AttentionType, Config, Transformer
from ring_attn import SCHEDULES, ScoreMod, VirtualRing, merge, plan, positions, shard, unshard

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
HOPPER = GPU and torch.cuda.get_device_capability(DEVICE)[0] == 9
HERE = Path(__file__).resolve().parent
COMPILER = "inductor" if GPU else "aot_eager"
if ring_attn.INTERPRET:  # it patches its language in every call of a function, and computes overflows in vain
    interpreter = triton.runtime.interpreter
    interpreter._patch_lang(SimpleNamespace(__globals__=dict(tl=tl, core=tl.core)))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
i32, i64 = torch.int32, torch.int64
randn, rand, zeros, ones, arange = (
    partial(f, device=DEVICE) for f in (torch.randn, torch.rand, torch.zeros, torch.ones, torch.arange)
)
GROUPS = {1: None}  # size -> the process group of that size that this process is in

# -----------------------------------------------------------------------------
# cases: `local` ones run in one process, `real` ones in all processes of a ring together; rings take turns


class Case(NamedTuple):
    """A row of the output. run(ring) gives (what, error, bound) or None, or raises if something is wrong."""

    name: str
    run: Callable
    ring: int  # of how many processes
    lacks: str | None  # why it cannot run here


CASES = []


def local(f=None, name=None, *args, needs=None, **options):
    """A case f(*args, **options), or the decorator of one. name: if left out, the function's, with blanks.
    needs: "GPU", "Hopper GPU", or, in full, why it cannot run; kernels in gluon need a Hopper GPU."""
    if f is None:
        return partial(local, name=name, needs=needs)
    needs = "Hopper GPU" if "gluon" in args else needs
    here = {None: True, "GPU": GPU, "Hopper GPU": HOPPER}
    lacks = needs if needs not in here else None if here[needs] else f"needs a {needs}"
    name = name or f.__name__.replace("_", " ")
    CASES.append(Case(name, lambda _: f(*args, **options), 1, lacks))
    return f


def real(f=None, name=None, *args, ring=WORLD, ranks=1, needs=None, **options):
    """As `local`, of f(Ring, *args) on rings of `ring` processes; `ranks`: so many processes at least."""
    if f is None:
        return partial(real, name=name, ring=ring, ranks=ranks)
    ranks = max(ring, ranks)
    lacks = f"needs a {needs}" if needs and not GPU else f"needs {ranks} processes" if WORLD < ranks else None
    name = name or f.__name__.replace("_", " ")
    CASES.append(Case(name, lambda on: f(on, *args, **options), ring, lacks))
    return f


def alone():
    """The group of this process only."""
    return ring_attn.resolve_ring(GROUPS[1])


def raises(f, *words, kind=ValueError, **options):
    """f(**options) must raise an error of this kind that contains all words."""
    try:
        f(**options)
    except kind as error:
        assert all(w in str(error) for w in words), f"the message lacks one of {words}: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} about {words}")


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def on_torch_path():
    """As users run it on a CPU: through the torch path, not the interpreter."""
    return replaced(ring_attn, "INTERPRET", False)


def without_fill():
    """torch.empty launches nothing."""
    return replaced(torch.utils.deterministic, "fill_uninitialized_memory", False)


def ratio(row):
    _, error, bound = row
    return error / bound


def worst(rows):
    """The row (what, error, bound) of the largest error / bound; AssertionError if one is above its bound."""
    bad = "; ".join(f"{what} {error:.2e} > {bound:.2e}" for what, error, bound in rows if not error <= bound)
    assert not bad, bad
    return max(rows, key=ratio)


def compare(names, got, expected, bound):
    """The worst row of two sequences of tensors, which may differ by `bound`."""
    return worst([(what, error(a, b), bound) for what, a, b in zip(names, got, expected, strict=True)])


def error(a, b):
    return (a.double() - b).abs().max().item()


def same_bits(a, b, why="not the same bits"):
    """The tensors of two sequences must be equal, one by one."""
    differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not torch.equal(x, y)]
    assert not differ, f"{why}: tensors {differ} of {len(a)} differ"


def by_rows(q, k, v, do, causal):
    """(o, lse, dq, dk, dv) by the formula in the inputs' dtype, of 256 queries at a time: the scores of all
    would take gigabytes."""
    leaves, results = [x.detach().requires_grad_() for x in (q, k, v)], []
    for first in range(0, q.shape[1], 256):
        rows = slice(first, first + 256)
        q, k, v = (x.repeat_interleave(do.shape[2] // x.shape[2], 2).transpose(1, 2) for x in leaves)
        s = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5  # (B, H, rows, T)
        if causal:
            s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1 + first), -inf)
        lse = s.logsumexp(-1)
        o = ((s - lse[..., None]).exp() @ v).transpose(1, 2)
        o.backward(do[:, rows])
        results.append((o.detach(), lse.detach()))
    o, lse = zip(*results)
    return torch.cat(o, 1), torch.cat(lse, 2), *(x.grad for x in leaves)


def fit(schedule, B, T):
    """The smallest batch and length from B and T up that a schedule can cut."""
    need = SCHEDULES[schedule]
    return -(-B // need.batch_groups) * need.batch_groups, -(-T // need.T_multiple) * need.T_multiple


@contextlib.contextmanager
def shared_folder(ring):
    """A temporary folder for the ranks of a ring, with a file `text` in it."""
    folder = None
    if ring.rank == 0:
        folder = Path(tempfile.mkdtemp())
        words = ["".join(letters) for letters in product("abcde", "rstuv", "xyz")]
        (folder / "text").write_text(" ".join(random.Random(0).choices(words, k=8000)))
    folder = ring.gather(folder)[0]
    try:
        yield folder
    finally:
        ring.gather(None)  # all are done with it
        if ring.rank == 0:
            shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# scripts: processes of their own, on CPUs and without the interpreter, as a user would start them


def user_env(**more):
    mine = "RANK WORLD_SIZE LOCAL_ MASTER_ GROUP_ ROLE_ TORCHELASTIC TRITON_INTERPRET OMP_".split()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(tuple(mine))}
    return kept | dict(PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1") | more


def start_python(stderr, *args, before=(), env=None):
    """Start Python, whose messages go to a file; what it prints is left out."""
    streams = dict(stdout=subprocess.DEVNULL, stderr=open(stderr, "w"))
    command = [*before, sys.executable, *map(str, args)]
    return subprocess.Popen(command, env=env or user_env(), cwd=HERE, **streams)


def call_python(*args, cwd=HERE, env=None):
    options = dict(capture_output=True, text=True, env=env or user_env(), cwd=cwd, timeout=180)
    return subprocess.run([sys.executable, *map(str, args)], **options)


# runs jobs in forks of one process that has imported torch: each is cheap, and ends as any script does
SCRIPTS = """
import contextlib, gc, json, os, random, runpy, signal, socket, sys, tempfile, train  # which leave CUDA alone
gc.freeze()

def free_port():  # not one of those that the system gives to clients, such as other test processes
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("localhost", port := random.randrange(10000, 30000)))
            return port

for line in sys.stdin:
    jobs, n_ranks, timeout, found = *json.loads(line), []
    for script, *flags in jobs:
        port = free_port()
        pids, codes, out, err = [], [], tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        for rank in range(n_ranks):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                if n_ranks > 1:
                    env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n_ranks, LOCAL_WORLD_SIZE=n_ranks)
                    env |= dict(MASTER_ADDR="localhost", MASTER_PORT=port)
                    os.environ.update({name: str(value) for name, value in env.items()})
                signal.alarm(timeout)
                sys.argv = [script, *flags]
                if script == "-c":
                    exec(sys.argv.pop(1), dict(__name__="__main__"))
                else:
                    runpy.run_path(script, run_name="__main__")
                sys.exit(0)
        for rank, pid in enumerate(pids):
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            for other in pids[rank + 1 :] if codes[-1] else ():  # as torchrun does
                os.kill(other, signal.SIGKILL)
        texts = [(f.seek(0), f.read())[1] for f in (out, err)]
        found.append((next(filter(None, codes), 0), *texts))
    print(json.dumps(found), flush=True)
"""


@functools.cache
def scripts_process():
    """Ends when this process does."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPTS], env=user_env(), cwd=HERE, **pipes)


def call_scripts(*jobs, n_ranks=1, timeout=120):
    """Run jobs (script or "-c", *flags) on n_ranks processes each: their return codes and outputs."""
    process = scripts_process()
    print(json.dumps((jobs, n_ranks, timeout)), file=process.stdin, flush=True)
    found = json.loads(process.stdout.readline())
    return [SimpleNamespace(returncode=c, stdout=out, stderr=err) for c, out, err in found]


def ended_well(done):
    assert done.returncode == 0, f"{done.returncode}: {(done.stdout + done.stderr)[-2000:]}"


def command_line_error(done, *words):
    """A script must have refused its flags: exit code 2, a message with all words, no traceback."""
    refused = done.returncode == 2 and all(w in done.stderr for w in ("error: ", *words))
    assert refused and "Traceback" not in done.stderr, f"{words}: {done.returncode} {done.stderr}"


# -----------------------------------------------------------------------------
# truth and yardstick


def make(B, T, H, HKV, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, D, generator=g).to(DEVICE, dtype) for n in (H, HKV, HKV, H)]  # q, k, v, do


def sdpa(q, k, v, do, causal):
    """(o, dq, dk, dv) of torch's SDPA."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v = (x.repeat_interleave(do.shape[2] // x.shape[2], 2).transpose(1, 2) for x in leaves)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def judge(got, *inputs):
    """got: (o, lse, dq, dk, dv) of the whole sequence, or of the first of them that were computed; inputs:
    q, k, v, do, causal."""
    *tensors, causal = inputs
    truth, (o, *grads) = by_rows(*(x.double() for x in tensors), causal), sdpa(*inputs)
    wide = torch.promote_types(o.dtype, f32)
    peer = o, by_rows(*(x.to(wide) for x in tensors), causal)[1], *grads
    of_all = zip(("o", "lse", "dq", "dk", "dv"), got, truth, peer, (2, 2, 3, 3, 3))
    return worst([(what, error(a, t), times * error(p, t) + 1e-5) for what, a, t, p, times in of_all])


def run(q, k, v, do=None, schedule="contiguous", group=None, causal=True, backend=None, dlse=None, sinks=None,
        **options):  # fmt: skip
    """(o, lse, dq, dk, dv), and dsinks if there are sinks; group None: this process alone. do, dlse: None
    where the loss does not depend on o or lse."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    options |= dict(return_lse=True, backend=backend) | ({} if sinks is None else dict(sinks=leaves[3]))
    results = ring_attn.ring_attn(*leaves[:3], schedule, group or alone(), causal, **options)
    loss = [(x, dx) for x, dx in zip(results, (do, dlse)) if dx is not None]
    grads = torch.autograd.grad([x for x, _ in loss], leaves, [dx for _, dx in loss])
    return *(x.detach() for x in results), *grads


def check_virtual(schedule, n_ranks, causal, backend, dtype, B, T, H, HKV, D):
    inputs = *make(B, n_ranks * T, H, HKV, D, dtype, seed=n_ranks), causal
    return judge(run(*inputs[:4], schedule, VirtualRing(n_ranks), causal, backend), *inputs)


def attention(backend, dtype, causal, B, T, H, HKV, D, schedule=None, n_ranks=1):
    """One case of o, lse, dq, dk and dv."""
    B, T = fit(schedule, B, T) if schedule else (B, T)
    what = dict(torch="torch path", triton="kernels", gluon="hopper kernels")[backend]
    where, mask = f" {schedule} x{n_ranks}" if schedule else "", "causal" if causal else "full"
    name = f"{what}{where} D{D} T{T} {H}/{HKV} {mask} {str(dtype)[6:]}"
    local(check_virtual, name, schedule or "contiguous", n_ranks, causal, backend, dtype, B, T, H, HKV, D)


# kernels: head dims, lengths, groups and dtypes on a ring of one
heads = itertools.cycle([(2, 2), (6, 2), (5, 1), (6, 1), (3, 1)] if GPU else [(2, 2), (3, 1), (5, 1), (6, 1)])
LENGTHS = (1, 17, 1000, 1023, 1024) if GPU else (1, 17, 64)
for D, T, causal in product((64, 80, 96, 128, 192, 256), LENGTHS, (True, False)):
    H, HKV = next(heads)
    if GPU or T == 17 or D in (64, 128):
        dtype = bf16 if GPU else f16 if T == 64 else f32
        attention("triton", dtype, causal, 2 if GPU else 1, T, H, HKV, D)
for D, T, causal in product((64, 80, 128), (1, 17, 1000, 1023, 1024), (True, False)):
    attention("gluon", bf16, causal, 2, T, *next(heads), D)
for D in (16, 128):
    attention("gluon", f16, True, 2, 1000, 6, 2, D)
attention("gluon", bf16, True, 16, 600, 32, 4, 64)  # 2,000 work tiles and more
if GPU:
    for D, dtype in product((33, 64, 128, 256), (f16, f32)):
        attention("triton", dtype, True, 1, 17, 2, 1, D)
        attention("triton", dtype, False, 1, 256, 2, 1, D)
else:
    for D, T, causal in ((33, 40, True), (33, 40, False), (16, 300, True)):
        attention("triton", f32, causal, 1, T, 2, 1, D)
    attention("triton", f16, True, 1, 263, 2, 1, 16)
for T, dtype in product((1, 17, 1000, 1023), (f32, f16, bf16)):
    attention("torch", dtype, True, 1 if T > 17 else 2, T, 6, 2, 24)
attention("torch", f64, True, 2, 17, 6, 2, 24, "striped", 3)

# schedules: virtual rings of 1 to 8
for schedule, n_ranks, causal in product(SCHEDULES, range(1, 9), (True, False)):
    at = schedule, n_ranks
    attention("torch", f32, causal, 2, 17, 6, 2, 16, *at)
    for T, D, H, HKV in ((1000, 128, 6, 2), (512, 64, 4, 4)):
        attention("gluon", bf16, causal, 2, T, H, HKV, D, *at)
        if GPU:
            attention("triton", bf16, causal, 2, T, H, HKV, D, *at)
    if not GPU and (causal and n_ranks <= 4 or n_ranks == 3):
        attention("triton", f32, causal, 1, 34 if n_ranks == 2 else 6, 2, 1, 16, *at)
        if n_ranks == 2:
            attention("triton", f16, causal, 1, 64, 1, 1, 16, *at)

# -----------------------------------------------------------------------------
# properties of kernels and schedules

# the Hopper kernels take 16-bit inputs only
LOW = dict(torch=f32, triton=f32, gluon=f16)


def check_masked_rows(backend):
    """12 queries, 7 keys, aligned at their ends: rows 0..4 see nothing; their o and dq are 0, lse is -inf."""
    q, k, v, do = make(1, 12, 2, 1, 16, LOW[backend])
    k, v = k[:, :7], v[:, :7]
    o, lse, dq, *dkv = run(q, k, v, do, backend=backend)
    assert not o[:, :5].any() and not dq[:, :5].any() and (lse[..., :5] == -inf).all()
    return judge((o[:, 5:], lse[..., 5:], dq[:, 5:], *dkv), q[:, 5:], k, v, do[:, 5:], True)


def check_autocast(backend):
    """Float32 inputs are cast to autocast's dtype, as SDPA casts them; 16-bit inputs give the same bits."""
    low = bf16 if GPU or backend == "torch" else f16  # the interpreter has no bfloat16
    inputs, options = make(1, 24, 4, 2, 16, f32), ("zigzag", VirtualRing(2), True, backend)
    casted = [x.to(low) for x in inputs]
    plain = run(*casted, *options)
    with torch.autocast(DEVICE.type, low):
        from_float32, same = run(*inputs[:3], casted[3], *options), run(*casted, *options)
    dtypes = from_float32[0].dtype, from_float32[2].dtype  # of o and dq
    assert dtypes == (low, f32)
    same_bits(plain, same)
    same_bits(plain, [x.to(y.dtype) for x, y in zip(from_float32, plain)])


def check_same_bits(backend):
    many = GPU and backend != "torch"
    small, large = (
        ((2, 512, 4, 2, 64), (1, 8192, 4, 2, 128)) if GPU else ((1, 24, 2, 1, 16), (1, 64, 2, 1, 16))
    )
    for shape, times, *args in (
        (small, 1000 if many else 2, "zigzag", VirtualRing(2), True),
        # many programs add to one tile of dq, and wait for each other
        (large, 300 if many else 1, "contiguous", None, True),
        (large, 300 if many else 1, "contiguous", None, False),
    ):
        call = partial(run, *make(*shape, f16), *args, backend)
        first = call()
        for _ in range(times):
            same_bits(first, call())


def check_free_order(backend):
    """deterministic=False: gradients within the yardstick, and the same bits where no kernel gains by it."""
    rows, shapes = [], [(2, 700, 4, 2, 128), (1, 2048, 4, 4, 64)] if GPU else [(1, 70, 2, 1, 16)]
    for shape, causal in product(shapes, (True, False)):
        inputs = make(*shape, LOW[backend])
        args = *inputs, "contiguous", None, causal, backend
        free = run(*args, deterministic=False)
        rows.append(judge(free, *inputs, causal))
        if backend != "gluon":
            same_bits(run(*args), free)
    return worst(rows)


@local
def deterministic_False_is_refused_by_a_deterministic_torch():
    """Where there will be a backward, in every public function and in a model. warn_only refuses nothing."""
    x = randn(1, 8, 2, 16, requires_grad=True)
    before = torch.get_deterministic_debug_mode()
    alone_, two = dict(deterministic=False), dict(deterministic=False, group=VirtualRing(2))
    config = Config(n_layers=1, dim=32, dim_per_head=16, seq_len=8, deterministic=False)
    model, tokens = Transformer(config).to(DEVICE), zeros(1, 8, dtype=i64)
    calls = [partial(ring_attn.flash_attn_func, x, x, x, **alone_), partial(model, tokens)]
    for schedule in set(SCHEDULES) - {"step"}:  # which needs an even B
        calls.append(partial(ring_attn.ring_attn, x, x, x, schedule, **two))
        calls.append(partial(ring_attn.ATTN_FUNCS[schedule], x, x, x, 1, 0, 0, 0, **alone_))
    try:
        for call in calls:
            torch.use_deterministic_algorithms(True)
            raises(call, "deterministic=False", "use_deterministic_algorithms")
            with torch.no_grad():
                call()
            torch.use_deterministic_algorithms(True, warn_only=True)
            call()
    finally:
        torch.set_deterministic_debug_mode(before)
    raises(partial(calls[0], deterministic="no"), "deterministic='no'", "True or False")


def amid_nan(x, *pad):
    """x as a view into a larger tensor of nan."""
    large = torch.full([n + 2 * p for n, p in zip(x.shape, pad)], nan, dtype=x.dtype, device=x.device)
    view = large[tuple(slice(p, n + p) for n, p in zip(x.shape, pad))]
    return view.copy_(x)


def permuted(x, *dims):
    """x with the memory layout of x.transpose(*dims)."""
    return x.transpose(*dims).contiguous().transpose(*dims)


def check_strides(backend):
    """Views into tensors that are nan everywhere else, transposed, packed and expanded ones."""
    B, T, H, HKV, D = 2, 128 if GPU else 32, 4, 2, 64 if GPU else 32
    inputs = q, k, v, do = make(B, T, H, HKV, D, f16)
    changed = [[amid_nan(x, *pad) for x in inputs] for pad in ((1, 32, 0, 0), (0, 3, 1, 5), (0, 0, 2, 0))]
    changed += [[permuted(x, 1, 2) for x in inputs], [permuted(x, -1, -2) for x in inputs]]
    changed += [[*torch.cat((q, k, v), dim=2).split((H, HKV, HKV), dim=2), do]]
    rows = [judge(run(*views, backend=backend), *inputs, True) for views in changed]
    expanded = [x[:1].expand(B, -1, -1, -1) for x in inputs]
    return worst([*rows, judge(run(*expanded, backend=backend), *expanded, True)])


@local(name="offsets beyond 2**31", needs="GPU")
def check_offsets():
    """Of elements: in the inputs (far apart tokens) and in the states (a large batch)."""
    far = torch.empty(2**32 + 2**21, dtype=bf16, device=DEVICE)
    q, k, v, do = make(1, 2048, 2, 2, 128, bf16)
    spread = [far[i * 2**10 :].as_strided(x.shape, (0, 2**21, 128, 1)) for i, x in enumerate((q, k, v))]
    for view, x in zip(spread, (q, k, v)):
        view.copy_(x)
    row = judge(run(*spread, do), q, k, v, do, True)
    del far, spread, view
    T = 100  # the last tile of 128 is hardly padded
    B = 2**31 // (T * 32 * 128) + 64
    inputs = [randn(B, T, n, 128, dtype=bf16) for n in (32, 1, 1, 32)]
    got = run(*inputs)
    return worst([row, judge([x[-64:] for x in got], *(x[-64:] for x in inputs), True)])


def check_positions(schedule):
    for n_ranks, T, B in product(range(1, 9), (1, 2, 5, 8), (1, 2, 4)):
        if n_ranks > 1 and fit(schedule, B, T) != (B, T):
            continue
        at = [positions(schedule, r, n_ranks, T, B).expand(B, T) for r in range(n_ranks)]
        assert (torch.cat(at, 1).sort(1).values == torch.arange(n_ranks * T)).all(), (
            "not every one is held once"
        )
        assert all((pos.diff(dim=1) > 0).all() for pos in at)
        x = torch.randn(B, n_ranks * T, 3)
        assert torch.equal(merge([shard(x, schedule, r, n_ranks) for r in range(n_ranks)], schedule), x)


@local
def shards_are_padded():
    """`shard(..., pad=True)` to what the schedule needs, with any value; `positions` within documents."""
    for schedule, n_ranks, S in product(SCHEDULES, (1, 2, 4), (1, 5, 8, 13)):
        x = torch.randn(2, S, 3, requires_grad=True)
        shards = [shard(x, schedule, r, n_ranks, pad=True, pad_value=7) for r in range(n_ranks)]
        y, more = merge(shards, schedule), n_ranks * fit(schedule, 2, 1)[1] if n_ranks > 1 else 1
        assert y.shape[1] == -(-S // more) * more
        assert torch.equal(y[:, :S], x) and (y[:, S:] == 7).all()
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.equal(grad, 2 * x)
        targets = shard(x[..., 0].long(), schedule, 0, n_ranks, pad=True, pad_value=-100)
        assert targets.dtype == torch.int64 and targets.shape == shards[0].shape[:2]
    raises(lambda: shard(torch.zeros(3, 5), "step", 0, 2, pad=True), "B=3", "zigzag")
    one = torch.tensor([0, 3, 3, 8], dtype=i32)
    by_sequence = torch.tensor([[0, 3, 3, 8], [0, 1, 8, 8]], dtype=i32)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]])
    documents = (one, starts[:1]), (by_sequence, starts)
    for schedule, n_ranks, (cu_seqlens, start) in product(SCHEDULES, (1, 2, 4), documents):
        at = partial(positions, n_ranks=n_ranks, T=8 // n_ranks, B=2, cu_seqlens=cu_seqlens)
        got = merge([at(schedule, rank).expand(2, -1) for rank in range(n_ranks)], schedule)
        assert torch.equal(got, (torch.arange(8) - start).expand(2, -1))


def rows_needed(first, last, q_layout, k_layout, T, block):
    """The keys of k_layout, in whole blocks, between the first and the last one that the queries in a half of
    q_layout see; first, last (sequences, S): of each query."""
    q_pos, k_pos = (ring_attn.layout_positions(layout, T) for layout in (q_layout, k_layout))
    needed = torch.zeros(T, dtype=torch.bool)
    for half in (q_pos[: T // 2], q_pos[T // 2 :])[T < 2 :]:
        begin, end = first[:, half].amin(1, keepdim=True), last[:, half].amax(1, keepdim=True)
        needed |= ((k_pos >= begin) & (k_pos <= end)).any(0)
    rows = needed.nonzero().flatten().tolist()
    return (rows[0] // block * block, min(-(-(rows[-1] + 1) // block) * block, T)) if rows else (0, 0)


def mask_of(S, cu_seqlens=None, **options):
    return ring_attn.make_mask(S, **options, documents=ring_attn.documents_of(cu_seqlens, S))


def check_plan(schedule, n_ranks, T, B, block, **options):
    """Ranks send what neighbours receive; keys that a query sees have arrived; no others are moved; gradients
    come home. options: of the mask. Returns the plans forward by rank."""
    S = n_ranks * T
    seen, mask = seen_by_position(S, S, **options).cpu()[:, 0], mask_of(S, **options)
    last = (seen * torch.arange(1, S + 1)).amax(2) - 1  # (1 or B, S): the last key that each query sees
    first = S - (seen * torch.arange(S, 0, -1)).amax(2)

    def holds(outer, inner):
        return inner[0] == inner[1] or outer[0] <= inner[0] and inner[1] <= outer[1]

    for direction in (-1, 1):
        plans = [plan(schedule, r, n_ranks, T, mask, direction) for r in range(n_ranks)]
        pulled = [0] * n_ranks
        for r, j in product(range(n_ranks), range(n_ranks)):
            hop, neighbour, came = plans[r][j], plans[(r + direction) % n_ranks][j], plans[r][j - 1]
            assert hop.send == neighbour.recv and hop.send_grad == neighbour.recv_grad
            for g, row in enumerate(hop.rows):
                rows, layouts = hop.seen[g], (ring_attn.Layout(*row[:3]), ring_attn.Layout(*row[3:6]))
                sequences = ring_attn.batch_slices(len(seen), len(hop.rows))[g] if len(seen) > 1 else slice(1)
                needed = rows_needed(first[sequences], last[sequences], *layouts, T, block)
                # between queries that are a stride apart there may be keys that none of them sees
                exact = layouts[0].stride == 1 or mask.kind != ring_attn.INTERVAL.value
                assert rows == needed if exact else holds(rows, needed)
                pulled[r] += (rows[1] - rows[0]) * B // len(hop.rows) * (j > 0)
                assert not j or holds(came.recv[g], rows), "keys are missing"
                held, fill = (row.held_begin, row.held_end), (row.fill_begin, row.fill_end)
                if direction < 0:
                    assert held == ((0, 0) if n_ranks == 1 or j == 1 else came.recv_grad[g])
                    written = holds(fill, held) and holds(fill, rows) and (not j or fill == hop.send_grad[g])
                    assert written, "gradients leave that nobody has written"
    moved = ring_attn.keys_moved(schedule, n_ranks, T, B, **options)
    assert moved == pulled
    return plans, pulled


# under a causal mask: the share of other ranks' keys that a rank pulls on average; is the work balanced?
KNOWN = {"contiguous": (1 / 2, False), "striped": (1, True), "zigzag": (3 / 4, True), "step": (1 / 2, True)}


def check_plans(schedule):
    """Causal and full ones, and what is known of them."""
    for n_ranks, causal, T in product(range(1, 9), (True, False), (8, 256)):
        B, T = fit(schedule, 1, T)
        plans, pulled = check_plan(schedule, n_ranks, T, B, 128, causal=causal)
        most, n_groups = n_ranks * (n_ranks - 1), len(plans[0][0].rows)  # most: shards
        moved = sum(end - begin for p in plans for hop in p for begin, end in hop.recv) / n_groups / T
        assert moved <= most
        if causal and schedule in KNOWN:
            share, balanced = KNOWN[schedule]
            assert schedule != "contiguous" or moved == most / 2
            assert T < 256 or sum(pulled) == share * B * T * most
            work = [sum(share for _, share in hops) for hops in ring_attn.work(schedule, n_ranks, T)]
            even = max(work) - min(work) <= 8 * n_ranks / T**2
            assert T == 256 or n_ranks == 1 or even == balanced


def check_plans_of_masks(schedule):
    """Those of windows, documents and padding, in blocks of 4 rows."""
    rng, windows = random.Random(0), (None, 1, 5, (3, 2), (0, None))
    with row_blocks(4):
        for n_ranks, T, causal in product((1, 2, 3, 5), (1, 18), (True, False)):
            B, T = fit(schedule, 2, T)
            S = n_ranks * T
            for window, packed, padding in product(windows, (False, True), (0, 1, T + 1)):
                if isinstance(window, int) and not causal or padding >= S:
                    continue
                options = dict(causal=causal, window=window, seq_len=S - padding)
                if packed:
                    options["cu_seqlens"] = draw_documents(rng, B, S - padding, S - rng.choice((0, padding)))
                check_plan(schedule, n_ranks, T, B, 4, **options)


def blocks_of(x, rows, columns):
    """x (T, TK) bool -> by block: whether some entries are True; whether all are, in a whole block."""
    x = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    x = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return x.any(3).any(1), x.all(3).all(1)


def check_bounds(schedule, BLOCK=8, STREAMED=4):
    """Tables of bounds, forward and backward, against the dense mask: by query, by key, by tile."""
    rng = random.Random(0)
    for n_ranks, direction, causal, padding in product((1, 2, 3), (1, -1), (True, False), (0, 2)):
        B, T = fit(schedule, 2, rng.randint(3, 40))
        S, order = n_ranks * T, ring_attn.hop_order(n_ranks, direction)
        options = dict(causal=causal, window=draw_window(rng, S, causal), seq_len=S - padding)
        options["cu_seqlens"] = draw_documents(rng, B, S - padding, S)
        seen = seen_by_position(S, S, **options).cpu().expand(B, 1, S, S)
        mask = mask_of(S, **options)
        hops = plan(schedule, n_ranks - 1, n_ranks, T, mask, direction)
        args = hops, mask, B, T, T, mask.starts(), direction, (BLOCK, STREAMED), "cpu"
        tables = ring_attn.make_bounds(*args)
        for b in range(B):
            later = torch.zeros(T, dtype=torch.bool)
            for j in reversed(order):
                row = hops[j].rows[b * len(hops[j].rows) // B]
                layouts = ring_attn.Layout(*row[:3]), ring_attn.Layout(*row[3:6])
                q_pos, k_pos = (ring_attn.layout_positions(layout, T) for layout in layouts)
                here = seen[b, 0][q_pos][:, k_pos]
                bounds = ring_attn.Bounds(*(x if x is None else x[b * len(x) // B] for x in tables[j]))
                check_tables(here, later, bounds, BLOCK, STREAMED, direction)
                later |= here.any(1)


def check_tables(seen, later, bounds, BLOCK, STREAMED, direction):
    """Bounds of one sequence at one hop; seen (T, TK); later (T,): does a query see a key at a later hop?"""

    def interval(begin, end, n):
        return (begin[:, None] <= torch.arange(n)) & (torch.arange(n) < end[:, None])

    T, TK = seen.shape
    assert torch.equal(interval(*bounds.rows[:2], TK), seen), "keys of a query"
    assert torch.equal(bounds.rows[2].bool(), later), "later hops of a query"
    if direction < 0:
        assert torch.equal(interval(*bounds.columns, T), seen.mT), "queries of a key"
    some, every = blocks_of(seen if direction > 0 else seen.mT, BLOCK, STREAMED)  # (resident, streamed) tiles
    n, names = some.shape[1], "BEGIN FULL_BEGIN FULL_END END LATER NUMBER TURN WAIT_END".split()
    columns = (bounds.tiles[:, getattr(ring_attn, x).value] for x in names)
    begin, full_begin, full_end, end, any_later, number, *turns = columns
    if direction > 0:  # the tiles that see the most keys come first
        assert torch.equal(number.sort().values, torch.arange(len(some))), "not every tile once"
        assert (end - begin).diff().le(0).all()
        expected = F.pad(later, (0, -T % BLOCK)).unflatten(0, (-1, BLOCK)).any(1)[number]
        assert torch.equal(any_later.bool(), expected), "later hops of a tile"
        some, every = some[number], every[number]
    visited, bare = interval(begin, end, n), interval(full_begin, full_end, n)
    assert not (some & ~visited).any(), "a tile is left out"
    assert not (bare & ~(visited & every)).any(), "a tile is not masked that must be"
    ordered = (begin <= full_begin) & (full_begin <= full_end) & (full_end <= end)
    assert ordered.all(), "tiles would be visited twice"
    if direction < 0:  # dq of a query tile is added up by one key tile after the other, which wait in turn
        turn, wait_end = (x[:, None] for x in turns)
        number = torch.arange(1, len(some) + 1)[:, None]
        before = F.pad((number * visited).cummax(0).values, (0, 0, 1, 0))[:-1]  # 1 + the last one before it
        waits = torch.where(torch.arange(n) < wait_end, turn, 0)
        assert not ((waits != before) & visited).any()


@local
def p2p_moves_what_keys_moved_says():
    """Bytes of keys and values under windows, documents and padding, in blocks of 8 rows."""
    rng, masks = random.Random(0), product(SCHEDULES, (2, 5), (20, (4, 13)), (False, True))
    with row_blocks(8):
        for schedule, n_ranks, window, packed in masks:
            B, T = fit(schedule, 2, 35)
            options = dict(causal=isinstance(window, int), window=window, seq_len=n_ranks * T)
            if packed:
                options["seq_len"] -= rng.choice((0, T + 3))
                options["cu_seqlens"] = draw_documents(rng, B, options["seq_len"], n_ranks * T)
            moved, ring = [0] * n_ranks, VirtualRing(n_ranks)

            def spy(self, send, recv, *args):
                moved[self.rank] += sum(x.nbytes for x in recv)
                return exchange(self, send, recv, *args)

            q, k, v, _ = make(B, n_ranks * T, 1, 1, 8, f32)
            with replaced(ring_attn.VirtualRank, "exchange", spy) as exchange:
                ring_attn.ring_attn(q, k, v, schedule, ring, backend="torch", **options)
            rows = ring_attn.keys_moved(schedule, n_ranks, T, B, transport="p2p", **options)
            assert moved == [n * 2 * 8 * 4 for n in rows]


@local
def windows_and_documents_move_what_is_seen():
    """A window of 257 tokens in shards of 1024: 256 from the token before each run of consecutive ones."""
    documents = torch.tensor([0, 1024, 2048, 3072, 4096], dtype=i32)
    for schedule, expected, options in (
        ("contiguous", [0, 256, 256, 256], dict(window=257)),
        ("zigzag", [256, 512, 512, 256], dict(window=257)),
        ("striped", [3072] * 4, dict(window=257)),
        ("contiguous", [0] * 4, dict(cu_seqlens=documents)),
        ("contiguous", [0] * 4, dict(cu_seqlens=documents, causal=False)),
        ("contiguous", [128, 1024, 0, 0], dict(seq_len=1100, causal=False)),
    ):
        moved = ring_attn.keys_moved(schedule, 4, 1024, **options)
        assert moved == expected


class ModelCopyStream:
    """ring_attn.CopyStream as two lists of operations, for check_protocol."""

    def __init__(self, rank, base):
        self.rank, self.base, self.kernels, self.copies, self.events = rank, base, [], [], itertools.count()

    def capturing(self):
        return False

    def record(self, operations):
        event = self.rank, next(self.events)
        operations.append(("record", event))
        return event

    def wait_compute(self):
        self.copies.append(("wait event", self.record(self.kernels)))

    def record_event(self):
        return self.record(self.copies)

    def compute_wait(self, event):
        self.kernels.append(("wait event", event))

    def copy(self, *args):
        self.copies.append(("copy", *args))

    def write(self, address, value, on_compute=False):
        (self.kernels if on_compute else self.copies).append(("write", address, value))

    def prepare(self, signals):
        at = [(kind, args if kind == "signal" else (self.rank, args[0])) for kind, *args in signals]
        return [(kind, self.base[rank] + 4 * flag) for kind, (rank, flag) in at]

    def run(self, prepared):
        self.copies += prepared


def check_protocol(schedule, n_ranks, seed, loops=8, **options):
    """ring_attn.Symmetric without a GPU: hop loops, forward and backward in turn, on ranks whose two streams
    advance at random. Every key and gradient must be what and where it should when a kernel reads it, no rank
    may wait for ever, and all flags must be clear at the end. options: of the mask."""
    rng, D, (B, T) = random.Random(seed), 2, fit(schedule, 2, 256)
    mask = mask_of(n_ranks * T, **options)
    size = 2 * B * T * D * 4
    kv_staging, grad_staging = [4096, 4096 + size], [4096 + 2 * size, 4096 + 3 * size]
    memories = [torch.full((4096 + 4 * size,), 255, dtype=torch.uint8) for _ in range(n_ranks)]
    base = [memory.data_ptr() for memory in memories]
    alive, shared, bytes_pushed = [], [], [0] * n_ranks
    streams = [ModelCopyStream(rank, base) for rank in range(n_ranks)]
    for copy_stream, local_memory in zip(streams, memories):
        local_memory[:4096] = 0
        memory = ring_attn.SymmetricMemory.__new__(ring_attn.SymmetricMemory)
        vars(memory).update(copy_stream=copy_stream, base=base, local=local_memory, in_graph=False, known={})
        vars(memory).update(kv_staging=kv_staging, grad_staging=grad_staging)
        shared.append(memory)

    def content(loop, rank, what):
        g = torch.Generator().manual_seed(zlib.crc32(f"{loop} {rank} {what}".encode()))
        return torch.randn(B, T, 1, D, generator=g)

    def groups(hop):  # of sequences: their slice, row of the hop table, rows seen
        return zip(ring_attn.batch_slices(B, len(hop.seen)), hop.rows, hop.seen)

    def attend(loop, kv, hop, j):
        for x, what in zip(kv, "kv"):
            expected = content(loop, hop.source, what)
            for s, _, (begin, end) in groups(hop):
                assert torch.equal(x[s, begin:end], expected[s, begin:end])
            if j:
                x.fill_(nan)  # they are not needed any more

    def collect(rank, grads, hop):  # each rank adds 10 ** rank to the rows that it sees
        for x, (s, row, (begin, end)) in product(grads, groups(hop)):
            held = slice(row.held_begin, row.held_end)
            kept = x[s, held].clone()
            x[s, row.fill_begin : row.fill_end], x[s, held] = 0, kept
            x[s, begin:end] += 10.0**rank

    def bring_home(rank, hop, grads):
        for g, (s, row, _) in enumerate(groups(hop)):
            truth, home = torch.zeros(T), slice(row.held_begin, row.held_end)
            for other in set(range(n_ranks)) - {rank}:
                begin, end = plan(schedule, other, n_ranks, T, mask, 1)[(other - rank) % n_ranks].seen[g]
                truth[begin:end] += 10.0**other
            for x in grads:
                assert (x[s, home, 0, 0] == truth[home]).all() and truth[home].sum() == truth.sum()
        spoil(*grads)

    def fill(k, v, loop, rank):
        k.copy_(content(loop, rank, "k")), v.copy_(content(loop, rank, "v"))

    def spoil(*tensors):
        for x in tensors:
            x.fill_(nan)

    def hop_loop(loop, rank, direction):  # as in forward_hops and backward_hops
        ring = SimpleNamespace(rank=rank, n_ranks=n_ranks, memory=shared[rank])
        k, v = torch.full((2, B, T, 1, D), nan)

        def kernel(*call):
            streams[rank].kernels.append(("kernel", *call))

        kernel(fill, k, v, loop, rank)
        wide = f32 if direction < 0 else None
        moves = ring_attn.Symmetric(ring, schedule, k, v, T, mask, direction, wide)
        coming = ctypes.c_int32(0)
        alive.append((moves, k, v, coming))
        if direction < 0:
            moves.keys(0)
        for j in ring_attn.hop_order(n_ranks, direction):
            hop, kv = moves.hops[j], (k, v) if direction < 0 and j == 0 else moves.keys(j)
            if direction < 0:
                grads = moves.grads(j or n_ranks)
                if hop.visible and j:
                    kernel(collect, rank, grads, hop)
            if hop.visible:
                kernel(attend, loop, kv, hop, j)
            if direction < 0 and j:
                at = ctypes.addressof(coming) if loop % 4 == 1 and j == n_ranks - 1 else None
                moves.pass_on(j, at)
            elif direction < 0:
                streams[rank].kernels.append(("wait for 0", ctypes.addressof(coming)))  # within the kernel
                kernel(bring_home, rank, hop, grads)
        moves.finish()
        kernel(spoil, k, v)  # as the caller may

    for loop, rank in product(range(loops), range(n_ranks)):
        hop_loop(loop, rank, 1 if loop % 2 == 0 else -1)
    queues, done = [deque(operations) for x in streams for operations in (x.kernels, x.copies)], set()
    flag = ctypes.c_int32.from_address

    def ready(queue):
        kind, what, *_ = queue[0]
        if kind == "wait event":
            return what in done
        wanted = {"wait": 1, "wait for 0": 0}
        return kind not in wanted or flag(what).value == wanted[kind]

    while any(queues):
        able = [queue for queue in queues if queue and ready(queue)]
        assert able, "every stream waits"
        kind, *args = rng.choice(able).popleft()
        if kind == "record":
            done.add(args[0])
        elif kind == "kernel":
            args[0](*args[1:])
        elif kind == "copy":
            ctypes.memmove(*args)
            for rank in range(n_ranks):
                bytes_pushed[rank] += args[2] * (0 <= args[0] - base[rank] < grad_staging[0])
        elif kind == "write":
            flag(args[0]).value = args[1]
        elif kind in ("signal", "wait"):
            assert kind == "wait" or flag(args[0]).value == 0, "a flag is set twice"
            flag(args[0]).value = int(kind == "signal")
    assert not any(memory[:4096].any() for memory in memories), "a flag is left set"
    expected = [n * 2 * D * 4 * loops for n in ring_attn.keys_moved(schedule, n_ranks, T, B, **options)]
    assert bytes_pushed == expected


def check_protocols(schedule, n_ranks):
    rng, (B, T) = random.Random(n_ranks), fit(schedule, 2, 256)
    documents = draw_documents(rng, B, n_ranks * T, n_ranks * T)
    masks = {}, dict(window=150), dict(causal=False, window=(40, 200)), dict(cu_seqlens=documents)
    for seed, options in enumerate((*masks, dict(causal=False), dict(window=T, seq_len=n_ranks * T - T - 9))):
        check_protocol(schedule, n_ranks, seed, **options)


@local
def buffers_per_rank():
    """At most two foreign key/value shards and two of their gradients, however long the ring."""
    seen, shard_size = set(), 2 * 4 * 2 * 16

    def spy(self, send, recv, *args):
        assert {x.numel() for x in recv} <= {shard_size}
        seen.update((self.rank, x.dtype, x.data_ptr()) for x in recv)
        return exchange(self, send, recv, *args)

    with replaced(ring_attn.VirtualRank, "exchange", spy) as exchange:
        run(*make(2, 8 * 4, 4, 2, 16, f16), "zigzag", VirtualRing(8), True, "torch")
    # two buffers each: k and v in 16 bits, forward and backward; dk and dv in float32
    for dtype, most in ((f16, 2 * 2 * 2), (f32, 2 * 2)):
        counts = [sum(r == rank and d == dtype for r, d, _ in seen) for rank in range(8)]
        assert 0 < min(counts) and max(counts) <= most


@local
def operators_under_opcheck():
    """Schemas, fakes (shapes, dtypes, strides) and autograd of both operators."""
    documents, seed = torch.tensor([0, 3, 8], dtype=i32), torch.tensor([1], device=DEVICE)
    masked = dict(sinks=randn(4), cu_seqlens=documents, seed=seed)
    for group, dtype, given in ((alone(), f64, {}), (VirtualRing(2), f16, {}), (VirtualRing(2), f32, masked)):
        leaves = [permuted(x, 1, 2).requires_grad_() for x in make(2, 8, 4, 2, 16, dtype)]
        (*qkv, do), mods = leaves, (0.0, 0.1 if given else 0.0, 0)
        if given:
            given["sinks"].requires_grad_()
        extras, mask = ring_attn.Extras(**given).flat(), ([2, 0], 7) if given else (None, None)
        number = ring_attn.resolve_ring(group).number
        options = number, "zigzag", True, *mask, 0.25, "torch", None, *mods, True
        torch.library.opcheck(torch.ops.ring_attn.forward.default, (*qkv, extras, *options, True, None))
        results = torch.ops.ring_attn.forward(*qkv, extras, *options, True, None)
        saved = [x.detach() for x in (*qkv, *results)]
        detached = [x if x is None else x.detach() for x in extras]
        for grads in ((do.detach(), None), (None, saved[4])):
            args = *grads, *saved, detached, *options, False
            torch.library.opcheck(torch.ops.ring_attn.backward.default, args)


@local
def operators_where_the_dispatcher_is_needed():
    """Eager calls skip it. Selective checkpointing still finds the operator and keeps o and lse, so that the
    forward runs once; forward-mode derivatives, which there are none of, are refused."""
    q, k, v, do = (x.requires_grad_() for x in make(1, 16, 2, 2, 16, f32))
    ran, kept = [], torch.ops.ring_attn.forward.default

    def attn(q, k, v):
        return ring_attn.flash_attn_func(2 * q, k, v)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE

    def spy(hops, *args):
        ran.append(hops)
        return run_hops(hops, *args)

    with replaced(ring_attn, "run_hops", spy) as run_hops:
        keep = partial(create_selective_checkpoint_contexts, policy)
        o = checkpoint(attn, q, k, v, use_reentrant=False, context_fn=keep)
        grads = torch.autograd.grad(o, (q, k, v), do)
    assert ran == [ring_attn.forward_hops, ring_attn.backward_hops], ran
    same_bits(grads, torch.autograd.grad(attn(q, k, v), (q, k, v), do))
    with forward_ad.dual_level():
        q, k, v = (x.detach() for x in (q, k, v))
        raises(lambda: attn(forward_ad.make_dual(q, do.detach()), k, v), kind=NotImplementedError)


@local
@on_torch_path()
def second_derivatives_are_refused():
    """A first backward that could be differentiated again is not refused, and gives the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1, 1, dtype=f64) for _ in range(3))
    refused = partial(raises, kind=RuntimeError)

    def loss(q):
        return ring_attn.flash_attn_func(q, k, v).sum()

    refused(lambda: torch.autograd.functional.hessian(loss, q), "second derivative")
    for group in (alone(), VirtualRing(2)):
        leaves = [x.requires_grad_() for x in make(1, 8, 2, 1, 16, f32)[:3]]
        results = ring_attn.ring_attn(*leaves, group=group, return_lse=True, backend="torch")
        total = sum(x.sum() for x in results)
        plain = torch.autograd.grad(total, leaves, retain_graph=True)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        same_bits(plain, grads)
        for grad in grads:
            refused(grad.sum().backward, "second derivative", retain_graph=True)


@local(name="compiled, with lse")
def check_compiled():
    """One graph: o, lse and gradients as in eager, whichever of the two has one; other lengths, no_grad;
    errors when it runs; a VirtualRing that is made inside."""
    made, backend = VirtualRing(2), None if GPU else "torch"

    def attn(q, k, v, ring=made):
        return ring_attn.ring_attn(2 * q, k, v, "zigzag", ring, return_lse=True, backend=backend)

    def with_own_ring(q, k, v):
        return attn(q, k, v, VirtualRing(2))

    compiled, rows = torch.compile(attn, fullgraph=True, backend=COMPILER), []
    for T, loss in (
        (8, lambda o, lse: o.square().sum()),
        (16, lambda o, lse: lse.square().sum()),
        (24, lambda o, lse: o.sum() + lse.square().sum()),
    ):
        leaves, results = [x.requires_grad_() for x in make(2, T, 4, 2, 16, f32)[:3]], []
        for f in (attn, compiled):
            out = f(*leaves)
            results.append([*out, *torch.autograd.grad(loss(*out), leaves, materialize_grads=True)])
        rows.append(compare(("o", "lse", "dq", "dk", "dv"), *results, 1e-5))
    with torch.no_grad():
        same_bits(compiled(*leaves), attn(*leaves))
        same_bits(torch.compile(with_own_ring, backend=COMPILER)(*leaves), attn(*leaves))
    raises(lambda: compiled(*(x[:, :7] for x in leaves)), "seq_len=7", "n_ranks=2")
    flash = torch.compile(ring_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    raises(lambda: flash(*leaves, bias=leaves[0]), "bias")
    for bad in (dict(sm_scale=True), dict(softcap="50"), dict(dropout_p=True), dict(causal="no"),
                dict(deterministic="no")):  # fmt: skip
        for f in (flash, ring_attn.flash_attn_func):  # with words, before anything converts them
            raises(lambda: f(*leaves, **bad), *(f"{name}={x!r} must be" for name, x in bad.items()))
    return worst(rows)


@local(name="compiled, with masks")
def check_compiled_masks():
    """One graph with windows, documents, sinks and padding: results and gradients as in eager, new documents
    without a new graph; errors when it runs."""
    made, backend, sinks = VirtualRing(2), None if GPU else "torch", randn(4)
    graphs = CompileCounterWithBackend(COMPILER)
    leaves = [x.requires_grad_() for x in (*make(2, 24, 4, 2, 16, f32)[:3], sinks)]

    def attn(q, k, v, sinks, cu_seqlens, window):
        options = dict(window=window, cu_seqlens=cu_seqlens, sinks=sinks, seq_len=21, backend=backend)
        o, lse = ring_attn.ring_attn(2 * q, k, v, "zigzag", made, return_lse=True, **options)
        return o.square().sum() + lse[..., :21].sum()

    compiled, rows, devices = torch.compile(attn, fullgraph=True, backend=graphs), [], {"cpu", DEVICE.type}
    for n, (device, window, cut) in enumerate(product(sorted(devices), (5, (3, 2)), (4, 9))):
        documents, results = torch.tensor([0, cut, 21], dtype=i32, device=device), []
        for f in (attn, compiled):
            loss = f(*leaves, documents, window)
            results.append((loss / 1000, *torch.autograd.grad(loss, leaves)))
        rows.append(compare(("loss", "dq", "dk", "dv", "dsinks"), *results, 1e-4))
        assert graphs.frame_count == n // 2 + 1, f"{graphs.frame_count} graphs"
    wild = torch.tensor([0, 30, 21], dtype=i32)
    raises(lambda: compiled(*leaves, wild, 5), "cu_seqlens", "begin with 0")
    raises(lambda: compiled(*leaves, None, 0), "window")
    return worst(rows)


@local
def rings_and_agreements_do_not_pile_up():
    inputs, rings = make(1, 8, 1, 1, 8, f32), [VirtualRing(2) for _ in range(50)]
    for ring in rings:
        run(*inputs, "zigzag", ring, backend="torch")
    left = [weakref.ref(ring) for ring in rings]
    del ring, rings
    gc.collect()
    n_left = sum(ring() is not None for ring in left)
    assert n_left <= 4
    ring = VirtualRing(2)
    for i in range(20_000):
        ring_attn.agree_once(ring, i, {}, None, lambda: None)
    assert 0 < len(ring.agreed) <= 10_000, f"a ring remembers {len(ring.agreed)} agreements"
    x = inputs[0].requires_grad_()
    ring_attn.ring_attn(x, x, x, group=ring_attn.Ring()).sum().backward()  # only the graph holds the ring


@local
def tables_stay_where_they_are():
    """CUDA graphs have captured the addresses of the tables of a ring's hops."""
    ring = ring_attn.Ring()

    def on_device(T):
        q, mask = torch.empty(1, T, 1, 16, device=DEVICE), ring_attn.make_mask(T)
        return ring.on_device(plan("contiguous", 0, 1, T, mask, 1), q, q, None, mask, 1, "triton")

    hops = on_device(64)
    tables = [hop.table for hop in hops]
    for table, hop in zip(tables, hops, strict=True):
        rows = [n for row in hop.rows for n in row]
        assert table.device == DEVICE and table.tolist()[: len(rows)] == rows
    if GPU:
        inputs = make(1, 64, 2, 2, 64, bf16)
        truth = run(*inputs, group=ring)
        with without_fill():
            replay, results = decode.capture(partial(run, *inputs, group=ring), warm_up=False)
    for T in range(1, 2001):
        on_device(2 * T + 1)
        for rank in (0, 1):  # fills the cache of plans as well
            plan("contiguous", rank, 2, 2 * T + 1, ring_attn.make_mask(4 * T + 2), 1)
    again = [hop.table for hop in on_device(64)]
    assert all(a is b for a, b in zip(tables, again, strict=True))
    if GPU:
        gc.collect()
        litter = [torch.full((16,), 10**6, dtype=i32, device=DEVICE) for _ in range(4000)]
        for _ in range(3):
            replay()
        same_bits(results, truth, f"a graph replayed after 2,000 other shapes, {len(litter)} tensors")


@real
def copies_of_a_ring_share_it(_):
    ring = ring_attn.resolve_ring(None)
    assert copy.deepcopy([ring])[0] is ring
    assert pickle.loads(pickle.dumps(ring)) is ring


@local(needs="GPU")
def a_million_tokens(T=2**20):
    """Causal, 8 heads: sampled rows of o, dq, dk, dv against float64. The yardstick is the same sum with
    o, its probabilities and score gradients rounded to 16 bits, as tensor cores get them. dk, dv take o and
    lse from the forward."""
    torch.manual_seed(0)
    H, D = 8, 128
    q, k, v, do = (randn(1, T, H, D, dtype=bf16) for _ in range(4))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, lse, dq, dk, dv = run(q, k, v, do)
    peak = (torch.cuda.max_memory_allocated() - before) / q.nbytes
    # o, dq, dk, dv, 3 float32 a row; on Hopper also dq in float32
    most = 6.5 if ring_attn.best_backend(q) == "gluon" else 4.5
    assert peak < most
    scale, lse_error = D**-0.5, 0.0
    squares = {}  # (what, position): squared errors of ours and of the yardstick, summed over the heads

    def rounded(x):
        return x.bfloat16().double()

    def note(what, i, got, truth, peer):
        errors = torch.stack((got.double() - truth, peer - truth)).square().sum(1)
        squares[what, i] = squares.get((what, i), 0) + errors.cpu()

    for h, i in product(range(H), (0, 1, T // 100, T // 2 - 1, T - 1)):
        seen_k, seen_v = (x[0, : i + 1, h].double() for x in (k, v))  # query i sees keys 0..i
        q_i, do_i, k_i, v_i = (x[0, i, h].double() for x in (q, do, k, v))
        s = seen_k @ q_i * scale
        p, dp = s.softmax(0), seen_v @ do_i
        true_o, low_o = p @ seen_v, rounded(rounded(p) @ seen_v)
        true_ds, low_ds = p * (dp - true_o @ do_i) * scale, rounded(p * (dp - low_o @ do_i) * scale)
        lse_error = max(lse_error, abs(lse[0, h, i].item() - s.logsumexp(0).item()))
        note("o", i, o[0, i, h], true_o, low_o)
        note("dq", i, dq[0, i, h], true_ds @ seen_k, rounded(low_ds @ seen_k))
        by_q, by_do, by_o = (x[0, i:, h].double() for x in (q, do, o))  # key i is seen by queries i..
        p = (by_q @ k_i * scale - lse[0, h, i:].double()).exp()
        ds = p * (by_do @ v_i - (by_o * by_do).sum(1)) * scale
        note("dv", i, dv[0, i, h], p @ by_do, rounded(rounded(p) @ by_do))
        note("dk", i, dk[0, i, h], ds @ by_q, rounded(rounded(ds) @ by_q))
    roots = {f"{what} {i}": x.sqrt().tolist() for (what, i), x in squares.items()}
    return worst([("lse", lse_error, 1e-4), *((what, a, 3 * b + 1e-5) for what, (a, b) in roots.items())])


SHAPES_OF_WORK = [(1, 8192, 32, 8), (1, 16384, 16, 16), (2, 4096, 24, 3)]
SHAPES_OF_WORK += [(1, 65536, 32, 32), (1, 70000, 7, 7), (3, 100, 5, 5)]


def dealt(kernel, n_sm, B, T, H, HKV):
    """hopper_config of a causal problem on a GPU of n_sm multiprocessors: its integers, and the programs."""
    properties = SimpleNamespace(multi_processor_count=n_sm)
    with replaced(torch.cuda, "get_device_properties", lambda device, found=properties: found):
        args = kernel, (B, T, H, 128), (B, T, HKV, 128), DEVICE, 1, 1, ring_attn.CAUSAL.value, False
        _, _, integers, P, *_ = ring_attn.hopper_config.__wrapped__(*args)
    return integers, P


@local
def work_tiles_of_the_Hopper_forward():
    """Its programs have each tile of each head once between them, and under a causal mask nearly as much to
    do as each other; where a head's keys fill L2 they work on one head at a time."""
    uneven = 0.0
    for n_sm, (B, T, H, HKV) in product((132, 78, 7), SHAPES_OF_WORK):
        (*_, l2_heads, waves), P = dealt("fwd", n_sm, B, T, H, HKV)
        n_tiles, n_heads = triton.cdiv(T, 64 * ring_attn.HOPPER_TILES["fwd"][128][0]), B * H
        n, program = np.arange(n_heads // l2_heads * waves), np.arange(P)[:, None]
        grid = dict(num_programs=lambda axis, P=P: P, program_id=lambda axis, p=program: p)
        gl = SimpleNamespace(where=np.where, minimum=np.minimum, **grid)
        scheduler = FunctionType(ring_attn.tile_scheduler.fn.__code__, {"gl": gl})
        tile, head, exists = scheduler(n, n_tiles, l2_heads, waves)
        tiles = np.sort((tile * n_heads + head)[exists])
        assert np.array_equal(tiles, np.arange(n_tiles * n_heads)), "not every work tile once"
        assert l2_heads == 1 or (T, HKV) != (65536, 32), "here one head fills L2"
        most = exists.sum(1).max()  # work tiles of a program
        assert most <= triton.cdiv(len(tiles), P) + 1
        if len(n) >= 4:  # a work tile takes as long as its key tiles and about three more
            work = (exists * (n_tiles - tile + 3)).sum(1)
            uneven = max(uneven, work.max() / work.mean() - 1)
    return worst([("work", uneven, 0.05)])


@local
def work_tiles_of_the_Hopper_backward():
    """Each key tile of each head once, and those that an addition waits for earlier: so that whoever is
    waited for has begun. Their queries are those that see a key of the tile; the masked tiles come last."""
    code, M, N = ring_attn.bwd_work_tile.fn.__code__, 64, ring_attn.BWD_ROWS.value
    gl = SimpleNamespace(cdiv=lambda a, b: -(-a // b), where=np.where, minimum=np.minimum, load=lambda at: 0)
    names = dict(gl=gl, WorkTile=ring_attn.WorkTile, HOP_COLUMNS=0, INTERVAL=ring_attn.INTERVAL.value)
    names["held_and_written"] = lambda hop, j: (False, False)
    for B, T, H, HKV in SHAPES_OF_WORK:
        names["first_query"] = lambda hop, j, T, mask: np.minimum(j, T)
        integers, _ = dealt("bwd", 132, B, T, H, HKV)
        dims, n_tiles = ring_attn.Dims(0, 0, 0, *integers, 1), -(-T // N)
        work = FunctionType(code, names)(np.arange(n_tiles * B * HKV), dims, N, M, ring_attn.CAUSAL.value)
        tiles = (work.b * HKV + work.h) * n_tiles + work.start // N
        assert np.array_equal(np.sort(tiles), np.arange(len(tiles))), "not every work tile once"
        for head in range(B * HKV):
            starts = work.start[work.b * HKV + work.h == head]
            assert (np.diff(starts) > 0).all(), "a key tile comes before one that it waits for"
        end = -(-T // M)
        assert work.first == end - 1 and (work.n_tiles == end - work.start // M).all()
        assert (work.n_tail == np.minimum(N // M, work.n_tiles)).all()


@local
def launchers_fit_the_Hopper_kernels():
    """What launchers pass to the Hopper kernels fits their signatures, name by name, constants last."""
    seen = []
    integers = "sm_scale n_hops B H G T TK GROUP_B SET_B L2_HEADS WAVES OUTER".split()

    def spy(kernel, device, depends, grid, args, constants, **options):
        name = kernel.__name__
        assert list(kernel.arg_names[len(args) :]) == list(constants)
        for x, value in zip(kernel.arg_names, args):
            if value is None:
                assert x in ("DLSE", "MODS")
            elif x == "MODS":
                assert [len(value), len(value.args), len(value.dropout)] == [6, 1, 3]
            else:
                kind = "_desc" if hasattr(value, "block_shape") else isinstance(value, torch.Tensor)
                assert kind == ("_desc" if x.endswith("_desc") else x not in integers)
        seen.append((name, grid))

    properties = SimpleNamespace(multi_processor_count=10)
    config = ring_attn.hopper_config.__wrapped__  # not the cached one: the GPU is made up
    q, k, v, do = make(2, 200, 4, 2, 40, f16)
    lse, kernels = zeros(2, 4, 200), ring_attn.BACKENDS["gluon"]
    sinks, ring = zeros(4), ring_attn.Ring()
    with (
        replaced(ring_attn, "launch", spy),
        replaced(ring_attn, "hopper_config", config),
        replaced(torch.cuda, "get_device_properties", lambda device: properties),
    ):
        seed = zeros(1, dtype=i64)
        modified = ring_attn.make_chain(q, 2.0)[0], (), 0.1, seed, (199, 199)
        for window, sink, mods in ((None, None, ()), (9, sinks, modified)):
            mask, mods = ring_attn.make_mask(200, window=window), ring_attn.Mods(*mods)
            (fwd,), (bwd,) = (ring.on_device(plan("zigzag", 0, 1, 200, mask, direction), q, k, None, mask,
                                             direction, "gluon", mods) for direction in (1, -1))  # fmt: skip
            kernels.forward(q, k, v, q, q.float(), lse, sink, fwd, mask, mods, 0.5)
            state, _ = kernels.preprocess(q, do, lse, None, q, 1)
            grads = k, v, k.float(), v.float()
            kernels.backward(q, k, v, do, state, q, *grads, bwd, 0, mask, mods, 0.5, True)
            kernels.postprocess(state, q, 0.5)
    backward = [("bwd_preprocess_kernel", 64), ("hopper_bwd_kernel", 8), ("bwd_postprocess_kernel", 32)]
    assert seen == [("hopper_fwd_kernel", 10), *backward] * 2


@local
def a_schedule_is_one_row():
    """With one row more in ring_attn.py, and nothing else changed, test.py has cases for it, which pass."""
    first = "SCHEDULES = {\n"
    fifth = '    "fifth": Schedule(1, 2, lambda r, R, T: (Layout(r * (T // 2), 1, (R - 1) * (T // 2)),)),\n'
    with shared_folder(alone()) as folder:
        for file in HERE.glob("*.py"):
            shutil.copy(file, folder)
        code = (folder / "ring_attn.py").read_text()
        assert code.count(first) == 1
        (folder / "ring_attn.py").write_text(code.replace(first, first + fifth))
        done = call_python("test.py", "--filter", "fifth x2", cwd=folder)
        cases, last = re.findall(r"^(.*fifth x2.*) ok$", done.stdout, re.M), done.stdout.splitlines()[-1:]
        passed = done.returncode == 0 and len(cases) >= 4 and last == [f"{len(cases)} passed, 0 failed"]
        assert passed, (done.stdout + done.stderr)[-2000:]


def check_low_scores(backend):
    """Scores far below 0, and a T that tiles overhang: where what is past the end took part in dq with
    p = exp(0 - lse), it became nan."""
    q, do = make(1, *(200, 2, 2) if GPU else (80, 1, 1), 64, LOW[backend])[::3]
    k, v = (torch.randn_like(x) for x in (q, q))
    q[:], k[:] = 1.5, -1.5  # lse is about -13
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for n_ranks, causal in product((1, 2), (True, False)):
        o = ring_attn.ring_attn(*leaves, "contiguous", VirtualRing(n_ranks), causal, backend=backend)
        grads = torch.autograd.grad(o, leaves, do)
        assert all(x.isfinite().all() for x in grads)


for backend in ring_attn.BACKENDS:
    local(check_low_scores, f"scores far below 0 ({backend})", backend)
    local(check_masked_rows, f"rows without a key ({backend})", backend)
    local(check_autocast, f"autocast casts as SDPA's ({backend})", backend)
    local(check_same_bits, f"same inputs, same bits ({backend})", backend)
    local(check_free_order, f"gradients in free order ({backend})", backend)
    local(check_strides, f"strided views amid nan ({backend})", backend)
for schedule in SCHEDULES:
    local(check_positions, f"positions, shard, merge: {schedule}", schedule)
    local(check_plans, f"plans, sends match receives: {schedule}", schedule)
    local(check_plans_of_masks, f"plans of windows, documents, padding: {schedule}", schedule)
    local(check_bounds, f"tables of bounds: {schedule}", schedule)
    for n_ranks in (2, 3, 5):
        name = f"symmetric memory, operations in any order: {schedule} x{n_ranks}"
        local(check_protocols, name, schedule, n_ranks)

# -----------------------------------------------------------------------------
# masks: cases drawn at random, against a dense float64 truth that is made from positions and nothing else


def seen_by_position(T, TK, causal=True, window=None, cu_seqlens=None, seq_len=None):
    """(B or 1, 1, T, TK) bool: which keys each query sees. The last query is where the last key is."""
    i, j = torch.arange(T)[:, None] + TK - T, torch.arange(TK)
    left, right = (window - 1, 0) if isinstance(window, int) else window or (None, None)
    seen = torch.ones(1, 1, T, TK, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if left not in (None, -1):
        seen &= j >= i - left
    if right not in (None, -1):
        seen &= j <= i + right
    if seq_len is not None:
        seen &= (i < seq_len) & (j < seq_len)
    if cu_seqlens is not None:
        document = (cu_seqlens.cpu().view(-1, cu_seqlens.shape[-1], 1) <= j).sum(1)  # (B or 1, TK)
        seen = seen & (document[:, :, None] == document[:, None])[:, None]
    return seen.to(DEVICE)


def with_sink_key(q, k, v, sinks, seen, n_real):
    """(q, k, v, score, empty), heads first, for dense attention in the dtype of q. A sink is one more key, of
    zeros, whose score is the sink. Where a query sees nothing (empty, (B, H, T)) such a key has score 0, so
    that o is 0. Queries from n_real on are padding: sinks are not for them."""
    B, T, H, _ = q.shape
    q, k, v = (x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    empty = (torch.arange(T, device=q.device) >= n_real) | (~seen.any(-1) if sinks is None else False)
    last = q.new_tensor([-inf] * H) if sinks is None else sinks.to(q.dtype)
    last = last[:, None].expand(B, H, T).masked_fill(empty.expand(B, H, T), 0.0)
    score = q.new_zeros(1).masked_fill(~seen, -inf).expand(B, H, T, -1)
    return q, k, v, torch.cat([score, last[..., None]], -1), empty.expand(B, H, T)


def dense_attention(q, k, v, do, dlse, sinks, seen, n_real, sm_scale, rounded=None):
    """(o, lse, dq, dk, dv, dsinks) by the formula in the dtype of q; dsinks by query, (B, H, T). rounded: the
    dtype in which gradients of scores enter products."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    q, k, v, score, empty = with_sink_key(*leaves, sinks, seen, n_real)
    score.requires_grad_()
    products = q @ k.mT * sm_scale
    if rounded is not None:
        products.register_hook(lambda ds: ds.to(rounded).to(ds.dtype))
    s = products + score  # (B, H, T, TK + 1)
    lse = s.logsumexp(-1)
    o = ((s - lse[..., None]).exp() @ v).transpose(1, 2)
    dlse = dlse.masked_fill(empty, 0.0)
    *grads, dscore = torch.autograd.grad((o, lse), (*leaves, score), (do.to(o.dtype), dlse.to(o.dtype)))
    return o.detach(), lse.detach().masked_fill(empty, -inf), *grads, dscore[..., -1].masked_fill(empty, 0.0)


def masked_sdpa(q, k, v, do, dlse, sinks, seen, n_real, sm_scale):
    """The same of torch's SDPA; lse, of which SDPA knows nothing, and its gradients in float32, but for ds,
    which every kernel in 16 bits rounds. SDPA has kernels for head dims that are multiples of 8."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    *inputs, score, empty = with_sink_key(*leaves, sinks, seen, n_real)
    inputs = [F.pad(x, (0, -x.shape[-1] % 8)) for x in inputs]
    o = F.scaled_dot_product_attention(*inputs, score, scale=sm_scale)[..., : q.shape[-1]].transpose(1, 2)
    grads = torch.autograd.grad(o, leaves, do)
    wide, mask = [x.float() for x in (q, k, v, 0 * do)], (seen, n_real, sm_scale)
    _, lse, *of_lse, dsinks = dense_attention(*wide, dlse, sinks, *mask, rounded=q.dtype)
    if sinks is not None:
        p = (sinks.float()[:, None] - lse.masked_fill(empty, inf)).exp()
        dsinks = dsinks - p * (do * o).float().sum(-1).mT
    return o.detach(), lse, *((a + b).to(q.dtype) for a, b in zip(grads, of_lse)), dsinks


def judge_masked(got, *inputs):
    """got: o, lse, dq, dk, dv, and dsinks if there are sinks. inputs: as of dense_attention. dsinks, one
    number a head, is held to the root of the squared errors of its parts: a sum may be right by chance."""
    q, k, v, do, dlse, sinks, seen, n_real, sm_scale = inputs
    wide = [x if x is None else x.double() for x in inputs[:6]]
    truth = dense_attention(*wide, *inputs[6:])
    peer = truth if q.dtype == f64 else masked_sdpa(*inputs)
    assert torch.equal(got[1] == -inf, truth[1] == -inf)
    sees, is_seen = seen.any(-1).mT.expand(*q.shape[:2], 1), seen.any(2).mT.expand(*k.shape[:2], 1)
    for i, what, some in ((0, "o", sees), (2, "dq", sees), (3, "dk", is_seen), (4, "dv", is_seen)):
        assert (got[i].masked_fill(some[..., None], 0.0) == 0).all(), f"{what} where nothing is seen"
    rows, names, exact = [], ("o", "lse", "dq", "dk", "dv"), 1e-12 if q.dtype == f64 else 1e-5
    for what, a, t, p, times in zip(names, got, truth, peer, (2, 2, 3, 3, 3)):
        a, t, p = (x.masked_fill(x == -inf, 0.0) for x in (a, t, p))
        rows.append((what, error(a, t), times * error(p, t) + exact))
    if sinks is not None:
        t, noise = truth[5].sum((0, 2)), (peer[5] - truth[5]).square().sum((0, 2)).sqrt().max().item()
        rounding = torch.finfo(sinks.dtype).eps * t.abs().max().item()
        rows.append(("dsinks", error(got[5], t), 3 * noise + rounding + exact))
    return worst(rows)


def poisoned(x, where):
    """x with nan in the rows (B or 1, T) of its tokens; x (B, T, heads, D) or (B, H, T)."""
    where = where[..., None, None] if x.ndim == 4 else where[:, None]
    return x.masked_fill(where, nan)


def run_in_shards(q, k, v, do, schedule, group, dlse, **options):
    """`run` on a ring of processes: whole tensors, of which each rank takes its shards, and whole results."""
    at, swap = (schedule, group.rank, group.n_ranks), ring_attn.swap
    inputs = [x if x is None else swap(shard(swap(x), *at)) for x in (q, k, v, do, dlse)]
    results = run(*inputs[:4], schedule, group, dlse=inputs[4], **options)
    dsinks = [x.double() for x in results[5:]]
    for x in dsinks:
        dist.all_reduce(x, group=group.group)  # each rank has the part of its queries
    return *(swap(unshard(swap(x), schedule, group)) for x in results[:5]), *dsinks


def check_masked(q, k, v, do, dlse, sinks, schedule, group, backend, loss=("o", "lse"), sm_scale=None,
                 **options):  # fmt: skip
    """One call, forward and backward, with nan wherever it may be. options: of ring_attn, causal included.
    loss: which of the results have a gradient."""
    mask = {x: options[x] for x in ("causal", "window", "cu_seqlens", "seq_len") if x in options}
    T, TK = q.shape[1], k.shape[1]
    seen, n_real = seen_by_position(T, TK, **mask), options.get("seq_len") or T
    padding, unseen = torch.arange(T, device=q.device)[None] >= n_real, ~seen.any(2)[:, 0]  # (1 or B, T), TK
    nan_q, nan_do, nan_dlse = (poisoned(x, padding) for x in (q, do, dlse))
    nan_k, nan_v = (poisoned(x, unseen) for x in (k, v))
    grads = dict(do=nan_do if "o" in loss else None, dlse=nan_dlse if "lse" in loss else None)
    options |= dict(sinks=sinks, sm_scale=sm_scale) | grads
    call = run if isinstance(group, VirtualRing) else run_in_shards
    got = call(nan_q, nan_k, nan_v, schedule=schedule, group=group, backend=backend, **options)
    do, dlse = do * ("o" in loss), dlse * ("lse" in loss)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    return judge_masked(got, q, k, v, do, dlse, sinks, seen, n_real, scale)


def check_own_mask(backend, changed, seen):
    """A mask of one's own as the README says: its line that changes `first` or `last` in Mask.keys, before
    documents, and the kind INTERVAL. seen: the mask as a function of the positions of query and key."""
    source, make_mask = textwrap.dedent(inspect.getsource(ring_attn.Mask.keys)), ring_attn.make_mask
    (line,) = re.findall(rf"^({changed} = .*\b{changed}\b.*?) +#", (HERE / "README.md").read_text(), re.M)
    before = "    if starts is not None:"
    assert source.count(before) == 1
    exec(source.replace(before, f"    {line}\n{before}"), vars(ring_attn), found := {})

    def make_interval(*args, **options):
        return make_mask(*args, **options)._replace(kind=ring_attn.INTERVAL.value)

    D, dtype = dict(torch=(8, f64), triton=(16, f32), gluon=(64, bf16))[backend]
    S, rows, n_all = 168, [], (2,) if backend == "triton" and not GPU else (1, 3)
    inputs, i = make(2, S, 2, 1, D, dtype), arange(S)
    dlse = zeros(2, 2, S, dtype=torch.promote_types(dtype, f32))
    given = *inputs, dlse, None, seen(i[:, None], i)[None, None], S, D**-0.5
    with replaced(ring_attn.Mask, "keys", found["keys"]), replaced(ring_attn, "make_mask", make_interval):
        with row_blocks(128):  # no plan from before
            for schedule, n_ranks in product(SCHEDULES if len(n_all) > 1 else ("zigzag",), n_all):
                got = run(*inputs, schedule, VirtualRing(n_ranks), True, backend)
                rows.append(judge_masked(got, *given))
    return worst(rows)


for backend in ring_attn.BACKENDS:
    local(check_own_mask, f"the README's chunked attention ({backend})", backend, "first",
          lambda i, j: (j <= i) & (j >= i // 64 * 64))  # fmt: skip
    local(check_own_mask, f"the README's prefix LM ({backend})", backend, "last",
          lambda i, j: (j <= i) | (j < 100) & (i < 100))  # fmt: skip


@local(needs="GPU")
def documents_on_a_GPU():
    """No call waits for the GPU to learn them; a CUDA graph follows new ones; values are clipped, and checked
    under debug=True. A graph would freeze those on a CPU."""
    S, ring, inputs = 300, ring_attn.Ring(), make(2, 300, 4, 2, 64, bf16)
    rows = ((0, 5, 170, S), (0, 0, 299, S), (0, 100, 200, S), (0, 900, -7, S))  # the last ones are wild
    tables = [torch.tensor(row, dtype=i32, device=DEVICE) for row in rows]
    clipped = torch.tensor((0, S, S, S), dtype=i32)

    def call(cu_seqlens, backend, **options):
        options |= dict(cu_seqlens=cu_seqlens, window=60, sinks=ones(4))
        return run(*inputs, "zigzag", ring, True, backend, **options)

    for backend in ("triton", "gluon")[: 1 + HOPPER]:
        with without_fill():
            truth = [call(x.cpu(), backend) for x in tables[:3]] + [call(clipped, backend)]
            static = tables[0].clone()
            call(static, backend)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                eager = [call(x, backend) for x in tables]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            replay, results = decode.capture(lambda: call(static, backend), warm_up=False)
            for x, of_eager, of_cpu in zip(tables, eager, truth):
                static.copy_(x)
                replay()
                same_bits(results, of_eager)
                same_bits(of_eager, of_cpu)
            frozen = partial(decode.capture, lambda: call(clipped, backend), warm_up=False)
            raises(frozen, "cu_seqlens", "CUDA graph", "freeze")
            raises(partial(call, tables[3], backend, debug=True), "cu_seqlens", "begin with 0")


def draw_documents(rng, B, length, end):
    """cu_seqlens (n + 1,) or (B, n + 1): the last document ends at `end`, others at `length` or before."""
    by_sequence, rows = rng.random() < 0.5, []
    for _ in range(B if by_sequence else 1):
        cuts = [rng.randint(0, length) for _ in range(rng.choice((0, 1, 2, rng.randint(3, 9))))]
        cuts += [min(cut + 1, length) for cut in cuts if rng.random() < 0.3]  # documents of one token
        cuts += [cut for cut in cuts if rng.random() < 0.2]  # empty ones
        rows.append([0, *sorted(cuts), end])
    rows = [row + [end] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor(rows if by_sequence else rows[0], dtype=i32)


def draw_window(rng, S, causal):
    """An int, or a pair whose ends may be None or -1."""
    widths = [rng.choice((rng.randint(0, 4), rng.randint(0, S + 4), 2 ** rng.randint(20, 40))) for _ in "ab"]
    if causal and rng.random() < 0.5:
        return widths[0] + 1
    return tuple(rng.choice((None, -1, width, width)) for width in widths)


def draw_case(seed, ring=None):
    """What check_drawn needs: S queries and SK keys on n_ranks, in whose shards the schedule can cut them.
    ring: of processes."""
    rng = random.Random(seed)
    shares = (1, 2, 3) if HOPPER else (1, 4, 0) if GPU else (5, 0 if ring else 1, 0)
    backend = rng.choices(("torch", "triton", "gluon"), shares)[0]
    interpreted, schedule = backend == "triton" and not GPU, rng.choice([*SCHEDULES])  # that is slow
    n_ranks = ring.n_ranks if ring else rng.randint(1, 4 if interpreted else 8)
    most = (80 if interpreted else 600 if backend == "torch" else 2400) // n_ranks
    lengths = [rng.choice((1, 2, 20, most, *rng.choices(range(1, most + 1), k=3))) for _ in "qk"]
    (B, T), (_, TK) = (fit(schedule, rng.randint(1, 2 if interpreted else 3), T) for T in lengths)
    S, SK = n_ranks * T, n_ranks * (T if rng.random() < 0.8 else TK)
    H, HKV = rng.choice(((1, 1), (2, 1)) if interpreted else ((1, 1), (2, 1), (2, 2), (6, 2), (3, 1)))
    dims = dict(torch=(8, 24), triton=(16, 33, 64, 128, 256)[: 2 if interpreted else 5], gluon=(40, 64, 128))
    dtypes = dict(torch=(f64, f32, f16, bf16), triton=(f32, f16, bf16)[: 2 if interpreted else 3])
    options = dict(causal=(S == SK or n_ranks == 1) and rng.random() < 0.6, deterministic=rng.random() < 0.8)
    if rng.random() < 0.5 and (S == SK or n_ranks == 1):
        options["window"] = draw_window(rng, S, options["causal"])
    if rng.random() < 0.4 and S == SK:
        options["seq_len"] = rng.choice((S, rng.randint(1, S), max(1, S - rng.randint(0, T))))
    if rng.random() < 0.4 and S == SK:
        length = options.get("seq_len", S)
        options["cu_seqlens"] = draw_documents(rng, B, length, rng.choice((length, S)))
        if GPU and rng.random() < 0.5:
            options["cu_seqlens"] = options["cu_seqlens"].to(DEVICE)
    if ring and GPU and rng.random() < 0.3:
        options["transport"] = "p2p"
    options |= dict(sm_scale=rng.choice((None, 0.3)), loss=rng.choice((("o", "lse"), ("o",), ("lse",))))
    case = dict(backend=backend, schedule=schedule, n_ranks=n_ranks, B=B, S=S, SK=SK, H=H, HKV=HKV)
    case |= dict(D=rng.choice(dims[backend]), dtype=rng.choice(dtypes.get(backend, (f16, bf16))))
    case |= dict(sinks=rng.choice((None, None, None, f64, f32, f16, bf16)), options=options)
    return SimpleNamespace(**case, row_block=rng.choice((4, 128)) if backend == "torch" else 128)


@contextlib.contextmanager
def row_blocks(n):
    """Keys move in whole blocks of n rows. Kernels need 128; short sequences show more with fewer. No plan or
    table from before is used, nor one from here afterwards."""
    made = ring_attn.plan, ring_attn.rows_seen, ring_attn.rows_seen_by_many, ring_attn.virtual_ring
    with replaced(ring_attn, "ROW_PAD", tl.constexpr(n)):
        for f in made:
            f.cache_clear()
        yield
    for f in made:
        f.cache_clear()


def check_drawn(seed, ring=None):
    case, g = draw_case(seed, ring), torch.Generator().manual_seed(seed)
    B, S, SK, H, HKV, D = case.B, case.S, case.SK, case.H, case.HKV, case.D
    shapes = (B, S, H, D), (B, SK, HKV, D), (B, SK, HKV, D), (B, S, H, D), (B, H, S)
    *inputs, dlse = (torch.randn(shape, generator=g).to(DEVICE) for shape in shapes)
    inputs = [x.to(case.dtype) for x in inputs]
    dlse = dlse.to(torch.promote_types(case.dtype, f32))
    sinks = None  # exact in every dtype
    if case.sinks:
        sinks = torch.randint(-32, 33, (H, 2), generator=g).div(8).to(DEVICE, case.sinks)[:, 1]  # strided
    with row_blocks(case.row_block) if case.row_block < 128 else contextlib.nullcontext():
        group = ring or VirtualRing(case.n_ranks)
        return check_masked(*inputs, dlse, sinks, case.schedule, group, case.backend, **case.options)


def check_seeds(ring, check, first, n):
    return max((check(seed, ring) for seed in range(first, first + n)), key=ratio)


for first in range(0, 150 if GPU else 60, 10):
    name = f"masks drawn at random, seeds {first} to {first + 9}"
    local(check_seeds, name, None, check_drawn, first, 10)
n_draws = 20 if GPU else 12
for size in (2, 4):
    real(check_seeds, f"masks drawn at random on a ring of {size}", check_drawn, 0, n_draws, ring=size)


def fuzz(n, seed):
    """Many cases, dealt out to the processes. A case that fails is run alone by --fuzz=1 with its seed."""
    failed, top, began = [], ("", 0.0, 1.0), time.perf_counter()
    for case in range(seed + RANK, seed + n, WORLD):
        try:
            top = max(top, check_drawn(case), key=ratio)
        except Exception as error:
            failed.append(case)
            print(f"FAILED {told(error)}", flush=True)
        if (case - seed) % 100 < WORLD:
            print(f"seed {case}: {time.perf_counter() - began:.0f} s, {len(failed)} failed", flush=True)
    said = f"seeds {seed} to {seed + n - 1}, {time.perf_counter() - began:.0f} s"
    print(f"rank {RANK}, {said}: {len(failed)} failed {failed}; worst ratio {ratio(top):.2f}, {top[0]}")
    sys.exit(len(failed) > 0)


# -----------------------------------------------------------------------------
# score mods and dropout, against dense attention in float64, in whose dtype-at-hand twin the yardstick is


@triton.jit
def stretch_jit(score, b, h, q_idx, kv_idx, scales, shifts):
    return score * tl.load(scales + h) + tl.load(shifts + kv_idx) * (q_idx + b)


@triton.jit
def stretch_bwd_jit(dscore, score, b, h, q_idx, kv_idx, scales, shifts):
    return dscore * tl.load(scales + h)


def stretch(score, b, h, q_idx, kv_idx, scales, shifts):
    return score * scales[h] + shifts[kv_idx] * (q_idx + b)


def dense_modified(q, k, v, do, sinks, seen, softcap=None, bias=None, alibi_slopes=None, aux=(), dropout_p=0,
                   dropout_seed=0):  # fmt: skip
    """o, dq, dk, dv and, where there are such, dsinks and dbias, by the formula in the dtype of q. bias,
    alibi_slopes: with as many queries and keys. aux: of stretch."""
    leaves = [x if x is None else x.detach().to(q.dtype).requires_grad_() for x in (q, k, v, sinks, bias)]
    q, k, v, sinks, bias = leaves
    (B, T, H, D), TK = q.shape, k.shape[1]
    sizes = (B, 3), (H, 2), (T, 1), (TK, 0)
    b, h, i, j = (arange(n).view(-1, *[1] * dims) for n, dims in sizes)
    i, j = i + max(TK - T, 0), j + max(T - TK, 0)
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("b m h d, b n h d -> b h m n", q, k) * D**-0.5
    s = softcap * (s / softcap).tanh() if softcap else s
    s = s if bias is None else s + bias
    if alibi_slopes is not None:
        s = s - alibi_slopes.view(-1, H)[b % (alibi_slopes.numel() // H), h].to(s.dtype) * (i - j).abs()
    if aux:
        s = stretch(s, b, h, i, j, *(x.to(s.dtype) for x in aux))
    sink = s.new_full((B, H, T, 1), -inf) if sinks is None else sinks[:, None, None].expand(B, H, T, 1)
    s = torch.cat([s.masked_fill(~seen, -inf), sink], -1)
    p = s.softmax(-1).nan_to_num()[..., :-1].masked_fill(~seen, 0.0)
    if dropout_p:
        threshold, scale = ring_attn.dropout_numbers(dropout_p)
        p = p * (ring_attn.philox(dropout_seed, b, h, i, j) >= threshold) * scale
    o = torch.einsum("b h m n, b n h d -> b m h d", p, v)
    return o.detach(), *torch.autograd.grad(o, [x for x in leaves if x is not None], do.to(o.dtype))


def draw_mods(rng, g, B, T, TK, H, backend):
    """Options of ring_attn, and what a gradient of bias is wanted beside."""

    def draw(*shape):
        return torch.randn(shape, generator=g).to(DEVICE)

    options = {}
    if rng.random() < 0.4:
        options["softcap"] = rng.choice((0.5, 3.0, 50.0))
    if rng.random() < 0.5:
        options["bias"] = draw(*(rng.choice((1, n)) for n in (B, H, T, TK)))
    if rng.random() < 0.4:
        options["alibi_slopes"] = draw(*rng.choice(((H,), (B, H)))).abs() / 4
    if rng.random() < 0.4:
        wide = f64 if backend == "torch" else f32
        options["aux"] = (draw(H) + 1).to(wide), (draw(max(T, TK)) / 100).to(wide)
    if rng.random() < 0.4:
        options |= dict(dropout_p=0.3, dropout_seed=rng.randint(-(2**63), 2**63 - 1))
    return options


def check_mods(seed, ring=None):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    shares = (1, 2, 4) if HOPPER else (1, 3, 0) if GPU else (3, 1, 0)
    backend = rng.choices(("torch", "triton", "gluon"), shares)[0]
    interpreted, schedule = backend == "triton" and not GPU, rng.choice([*SCHEDULES])
    n_ranks = ring.n_ranks if ring else rng.randint(1, 4 if interpreted else 8)
    B, T = fit(schedule, 1 if interpreted else 2, rng.randint(1, (40 if interpreted else 600) // n_ranks))
    S, (H, HKV) = n_ranks * T, rng.choice(((2, 1), (2, 2), (6, 2)))
    SK = rng.randint(1, 300) if n_ranks == 1 and not interpreted and rng.random() < 0.3 else S
    dims = dict(torch=(8, 24), triton=(16, 64, 128), gluon=(40, 64, 128))[backend]
    D = rng.choice(dims[: 1 if interpreted else 3])
    low = (bf16, f16) if backend == "gluon" else (f32, f16) if interpreted else (f32, bf16)
    dtype, causal = f64 if backend == "torch" else rng.choice(low), rng.random() < 0.6
    shapes = (B, S, H, D), (B, SK, HKV, D), (B, SK, HKV, D), (B, S, H, D)
    q, k, v, do = padded = [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]
    n_padding = rng.randint(1, S - 1) if 1 < S == SK and rng.random() < 0.3 else 0
    if n_padding:  # tensors have it, and it changes nothing
        S = SK = S - n_padding
        q, k, v, do = (x[:, :S] for x in padded)
    mods = draw_mods(rng, g, B, S, SK, H, backend)
    window = rng.randint(1, S) if causal and rng.random() < 0.3 else None
    sinks = torch.randn(H, generator=g).to(DEVICE) if rng.random() < 0.3 else None
    seen = seen_by_position(S, SK, causal, window)
    wants_bias = "bias" in mods and (backend == "torch" or "aux" not in mods)
    inputs, options = (q, k, v, do, sinks, seen), dict(mods)
    if "bias" in mods:
        options["bias"] = mods["bias"].clone().requires_grad_(wants_bias)
    if "aux" in mods:
        jitted = dict(score_mod=stretch_jit, score_mod_bwd=stretch_bwd_jit)
        options |= dict(score_mod=stretch) if backend == "torch" else jitted
    leaves = [x.clone().requires_grad_() for x in (*padded[:3], sinks) if x is not None]
    options |= dict(causal=causal, window=window, backend=backend, deterministic=rng.random() < 0.8)
    options |= dict(sinks=leaves[3] if sinks is not None else None, seq_len=S if n_padding else None)
    if ring:
        at = schedule, ring.rank, ring.n_ranks
        o = ring_attn.ring_attn(*(shard(x, *at) for x in leaves[:3]), schedule, ring, **options)
        loss = (o * shard(padded[3], *at)).sum()
    else:
        o = ring_attn.ring_attn(*leaves[:3], schedule, VirtualRing(n_ranks), **options)
        loss = (o * padded[3]).sum()
    grads = [*torch.autograd.grad(loss, leaves + ([options["bias"]] if wants_bias else []))]
    if ring:
        o = unshard(o, schedule, ring)
        for x in grads:  # each rank has the part of its queries
            dist.all_reduce(x, group=ring.group)
    if n_padding:
        assert not any(x[:, S:].any() for x in (o, *grads[:3])), "padding is not 0"
        o, *grads = o[:, :S], *(x[:, :S] for x in grads[:3]), *grads[3:]
    exact = [x if x is None or x.dtype == torch.bool else x.double() for x in inputs]
    truth = dense_modified(*exact, **mods)
    peer = dense_modified(*inputs, **mods) if dtype.itemsize == 2 else truth
    names, rows = ["o", "dq", "dk", "dv", *["dsinks"] * (sinks is not None), "dbias"], []
    # every kernel subtracts do * o with a rounded o from all of a row's gradients of scores: what dbias sums
    rounding = do.double() * (truth[0].to(dtype).double() - truth[0])
    noise = rounding.sum(-1).square().mT[..., None]  # (B, H, queries, 1)
    if sinks is not None:  # likewise, by how much of a row's weight its sink has
        kept = {x: y for x, y in mods.items() if "dropout" not in x}
        exact[2] = torch.ones_like(exact[2])
        of_sinks = 1 - dense_modified(*exact, **kept)[0][..., :1].transpose(1, 2)  # (B, H, queries, 1)
    for name, a, t, p in zip(names, (o, *grads), truth, peer):
        least = 1e-12 if dtype == f64 and name[1:] not in ("sinks", "bias") else 2e-5
        bound = 3 * error(p, t) + least * max(1, t.abs().max().item())
        if name == "dsinks":
            bound += 3 * (noise * of_sinks.square()).sum((0, 2, 3)).sqrt().max().item()
        if name == "dbias":
            summed = [dim for dim, n in enumerate(t.shape[:3]) if n == 1]
            bound += 3 * noise.sum(summed, keepdim=True).sqrt().max().item()
        rows.append((name, error(a, t), bound))
    return worst(rows)


for first in range(0, 100 if GPU else 20, 10):
    name = f"score mods drawn at random, seeds {first} to {first + 9}"
    local(check_seeds, name, None, check_mods, first, 10)
for size in (2, 4):
    name, n_draws = f"score mods drawn at random on a ring of {size}", 12 if GPU else 4
    real(check_seeds, name, check_mods, 0, n_draws, ring=size)


@local
def dropout_is_philox():
    """The known answer of Random123, a share of entries kept, a scale that keeps the mean; the same entries
    whatever the backend; another seed drops others; a seed may be a tensor."""
    zero = torch.zeros((), dtype=i64)
    assert int(ring_attn.philox(0, zero, zero, zero, zero)) == 0x5F6FB709 >> 8
    S, H = 1024 if GPU else 64, 2
    q, v = zeros(1, S, H, S), torch.eye(S, device=DEVICE)
    v = v.expand(1, H, S, S).transpose(1, 2)

    def call(seed=None, backend="torch", D=S, dtype=f32):
        args = q[..., :D].to(dtype), q[..., :D].to(dtype), v[..., :D].contiguous().to(dtype)
        options = dict(causal=False, dropout_p=0.25, dropout_seed=seed, backend=backend)
        return ring_attn.flash_attn_func(*args, **options)

    o = call(7)
    for backend in ring_attn.BACKENDS if HOPPER else ("torch", "triton"):
        kind = backend, S if backend == "torch" else 64, f16 if backend == "gluon" else f32
        got = call(7, *kind)
        assert torch.equal(got[..., :64] > 0, o[..., :64] > 0)
        same_bits(got, call(torch.tensor([7], device=DEVICE), *kind))
    share, deviation = (o > 0).float().mean().item(), (0.25 * 0.75 / o.numel()) ** 0.5
    assert abs(share - 0.75) < 4 * deviation
    assert (o[o > 0] * S - 1 / 0.75).abs().max() < 1e-5
    assert 0.3 < ((o > 0) != (call(8) > 0)).float().mean() < 0.45
    torch.manual_seed(0)
    first = call()
    assert not torch.equal(first, call())
    torch.manual_seed(0)
    same_bits(first, call())
    torch.manual_seed(0)
    options = dict(causal=False, dropout_p=0.25, backend="torch")
    on_ring = ring_attn.ring_attn(q, q, v.contiguous(), "zigzag", VirtualRing(2), **options)
    assert torch.equal(on_ring > 0, first > 0)


@local(name="errors of score mods")
def check_mod_errors():
    x = randn(2, 8, 4, 16)

    def call(**options):
        return ring_attn.ring_attn(x, x, x, group=alone(), **dict(backend="torch") | options)

    refused, learned = partial(raises, call), x.clone().requires_grad_()
    for softcap in (-1.0, "x", inf, True):
        refused(f"softcap={softcap!r}", softcap=softcap)
    for p in (1.0, -0.1, "x"):
        refused(f"dropout_p={p!r}", dropout_p=p)
    refused("dropout_seed='x'", dropout_p=0.1, dropout_seed="x")
    refused("dropout_seed", "int64", dropout_p=0.1, dropout_seed=zeros(1))
    raises(lambda: ring_attn.flash_attn_func(x, x, x, 0.1), "bias=0.1", "dropout_p=", "sm_scale=")
    refused("bias", "(2, 4, 8, 8)", bias=zeros(2, 4, 8, 7))
    refused("bias", "4 dimensions", bias=zeros(8, 8))
    with replaced(ring_attn, "MAX_BIAS", 255):
        refused("bias has", "score_mod", bias=zeros(1, 1, 8, 8))
    refused("alibi_slopes", "(4,)", "(2, 4)", alibi_slopes=zeros(3))
    refused("alibi_slopes", "requires a gradient", alibi_slopes=ones(4, requires_grad=True))
    plain = dict(score_mod=stretch, aux=(x[0, 0, :, 0], x[0, 0, 0]))
    refused("aux is a list", **dict(plain, aux=[x, x]))
    refused("aux[1] is NoneType", **dict(plain, aux=(x, None)))
    refused("aux[0] requires a gradient", "bias", **dict(plain, aux=(learned, x)))
    refused("score_mod takes 7 arguments and is given 6", **dict(plain, aux=(x,)))
    refused("@triton.jit", **dict(plain, score_mod=stretch_jit))
    jitted = dict(plain, score_mod=stretch_jit, backend="triton")
    refused("must be a @triton.jit function", **dict(jitted, score_mod=stretch))
    with torch.enable_grad():
        words = "score_mod_bwd", "no_grad"
        raises(lambda: ring_attn.ring_attn(learned, x, x, group=alone(), **jitted), *words)
        bias = zeros(1, 1, 8, 8, requires_grad=True)
        both = dict(jitted, score_mod_bwd=stretch_bwd_jit, bias=bias)
        raises(lambda: ring_attn.ring_attn(x, x, x, group=alone(), **both), "bias", "beside a score_mod")
    number = ring_attn.number_of_functions(stretch, None)
    for i in range(1100):
        ring_attn.number_of_functions(lambda s, *at: s, None)
    assert len(ring_attn.FUNCTIONS) <= 1024
    raises(lambda: ring_attn.functions_numbered(number), "1024", kind=RuntimeError)
    assert call(**plain).isfinite().all()


@local(name="compiled, with score mods")
def check_compiled_mods():
    """One graph, results and gradients as in eager."""
    bias = randn(1, 4, 24, 24)
    leaves = [x.requires_grad_() for x in (*make(2, 24, 4, 2, 16, f32)[:3], bias)]
    seed = torch.tensor([5], device=DEVICE)
    slopes, scales, shifts = (rand(n) for n in (4, 4, 24))
    backend, mod = ("triton", ScoreMod(stretch_jit, stretch_bwd_jit)) if GPU else ("torch", stretch)

    def attn(q, k, v, bias, with_bias):
        options = dict(softcap=3.0, alibi_slopes=slopes, dropout_p=0.2, dropout_seed=seed, backend=backend)
        options |= dict(bias=bias) if with_bias else dict(score_mod=mod, aux=(scales, shifts))
        return ring_attn.ring_attn(2 * q, k, v, "zigzag", VirtualRing(2), **options).square().sum()

    compiled, rows = torch.compile(attn, fullgraph=True, backend=COMPILER), []
    for with_bias in (True, False):
        results = []
        for f in (attn, compiled):
            loss = f(*leaves, with_bias)
            results.append((loss / 1000, *torch.autograd.grad(loss, leaves[: 3 + with_bias])))
        rows.append(compare(("loss", "dq", "dk", "dv", "dbias")[: 4 + with_bias], *results, 1e-4))
    return worst(rows)


# -----------------------------------------------------------------------------
# decoding, against flex_attention: eager, in float64 for the truth and in the dtype at hand for the yardstick


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


@triton.jit
def dilated_jit(b, h, q_idx, kv_idx):  # differs by head and by sequence
    return (q_idx - kv_idx) % (h + b + 1) == 0


@triton.jit
def never_jit(b, h, q_idx, kv_idx):
    return kv_idx < 0


@triton.jit
def left_pad_jit(b, h, q_idx, kv_idx, pad):
    return kv_idx >= tl.load(pad + b)


def left_pad(b, h, q_idx, kv_idx, pad):  # the first pad[b] tokens of a sequence
    return kv_idx >= pad[b]


@triton.jit
def sparse_jit(b, h, q_idx, kv_idx, pad):
    return (kv_idx % 7 == h) | (kv_idx == q_idx)


@triton.jit
def scale_jit(score, b, h, q_idx, kv_idx, slopes):
    return score * tl.load(slopes + h)


def scale_by_head(score, b, h, q_idx, kv_idx, slopes):
    return score * slopes[h]


JIT = {x.fn: x for x in (causal_jit, dilated_jit, never_jit, sparse_jit)}  # the same in Python
causal_mask, dilated, never, sparse = JIT
JIT |= {alibi: alibi_jit, softcap: softcap_jit, same_doc: same_doc_jit}
JIT |= {left_pad: left_pad_jit, scale_by_head: scale_jit}
LOW_DECODE = bf16 if GPU else f16


def ints(*x):
    return torch.tensor(x, dtype=i32, device=DEVICE)


def block_list(n, *blocks):
    """As BlockMask.from_kv_blocks takes them, of all heads and sequences: the first n of these blocks."""
    return ints(n).view(1, 1, 1), ints(*blocks).view(1, 1, 1, -1)


def visible(L, M, H, N, causal=True, mask_mod=None, aux=(), window=None, sink=0):
    """(B, H, M, N): which keys the queries may see."""
    sizes = (len(L), (-1, 1, 1, 1)), (H, (-1, 1, 1)), (N, (-1,))
    b, h, j = (arange(n).view(shape) for n, shape in sizes)
    i = L.long()[b] - M + arange(M)[:, None]  # (B, 1, M, 1)
    seen = j < L[b]
    if causal or window is not None:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & ((j > i - window) | (j < sink))
    if mask_mod is not None:
        seen = seen & mask_mod(b, h, i.clamp(min=0), j, *aux)
    return seen.expand(len(L), H, M, N)


def flex_decode(q, k, v, L, seen, score_mod, aux):
    """o (B, M, H, D), lse (B, H, M) of flex_attention, which numbers queries from 0: score_mod is given
    positions."""
    B, M, H, _ = q.shape

    def mask(b, h, m, j):
        return seen[b, h, m, j]

    def score(s, b, h, m, j):
        return score_mod(s, b, h, (L[b] - M + m).clamp(min=0), j, *aux)

    blocks = create_block_mask(mask, B, H, M, k.shape[1], device=q.device)
    options = dict(block_mask=blocks, enable_gqa=H != k.shape[2], return_lse=True)
    o, lse = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=score_mod and score, **options)
    return o.transpose(1, 2).nan_to_num(0.0), lse


def for_backend(options, backend):
    """The options, with the mods that the backend takes."""
    jit = {name: JIT.get(x, x) for name, x in options.items() if callable(x)} if backend == "triton" else {}
    return options | jit | dict(backend=backend)


class Decode(NamedTuple):
    """A decode call on whole sequences: whatever is behind a sequence's length is nan."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    options: dict
    judge: Callable  # (o, lse) -> the worst row

    def given(self, backend):
        return for_backend(self.options, backend) | dict(cache_seqlens=self.lengths)

    def __call__(self, backend, k=None, v=None, **more):
        k, v = self.k if k is None else k, self.v if v is None else v
        return decode_attn(self.q, k, v, **self.given(backend) | dict(return_lse=True) | more)


def make_qkv(dtype, B, M, N, H, HKV, D, seed=0):
    g, shapes = torch.Generator().manual_seed(seed), ((M, H), (N, HKV), (N, HKV))
    return [torch.randn(B, n, n_heads, D, generator=g).to(DEVICE, dtype) for n, n_heads in shapes]


def in_float8(x):
    """x as float8 and scales, powers of two, and what they stand for, exact in any dtype."""
    x8, scale = decode.quantized(x)
    spread = torch.randint(-6, 2, scale.shape, generator=torch.Generator().manual_seed(1)).to(scale.device)
    scale = 2.0 ** (scale.log2().round() + spread)
    return x8, scale, decode.dequantized(x8, scale, f32).to(x.dtype)


def make_decode(dtype, M, H, HKV, D, lengths, causal=True, score_mod=None, mask_mod=None, aux=(), window=None,
                sink=None, N=None, seed=0, float8=False):  # fmt: skip
    B, N = len(lengths), N or max(lengths)
    (q, k, v), L = make_qkv(dtype, B, M, N, H, HKV, D, seed), ints(*lengths)
    if float8:
        (k8, k_scale, k), (v8, v_scale, v) = in_float8(k), in_float8(v)
    n_sink, logits = (0, sink) if isinstance(sink, torch.Tensor) else (sink or 0, None)
    seen, flexed = visible(L, M, H, N, causal, mask_mod, aux, window, n_sink), []
    for exact in (f64, dtype):
        tensors = [x.to(exact) if x.is_floating_point() else x for x in aux]
        o, lse = flex_decode(*(x.to(exact) for x in (q, k, v)), L.long(), seen, score_mod, tensors)
        if logits is not None:  # one more term in the denominator
            total = torch.logaddexp(lse.to(exact), logits.to(exact)[:, None])
            o, lse = o * (lse - total).exp().transpose(1, 2)[..., None].to(o.dtype), total
        flexed.append((o, lse.double()))
    (true_o, true_lse), (peer_o, peer_lse) = flexed
    behind = arange(N) >= L[:, None]
    k[behind] = v[behind] = nan
    empty = true_lse == -inf  # (B, H, M)

    def judge_decode(o, lse):
        assert (lse[empty] == -inf).all() and not o.transpose(1, 2)[empty].any()
        truth, got, peer = (x.double().masked_fill(empty, 0.0) for x in (true_lse, lse, peer_lse))
        lse_bound = (2 * error(peer, truth) if dtype != f32 else 0) + 1e-5
        row = "o", error(o, true_o), 2 * error(peer_o, true_o) + 1e-5
        return worst([row, ("lse", error(got, truth), lse_bound)])

    options = dict(causal=causal, score_mod=score_mod, mask_mod=mask_mod, aux=aux, window=window, sink=sink)
    if float8:
        k_scale[behind] = v_scale[behind] = nan
        k, v = (torch.where(behind[..., None, None], nan, x.float()).to(x.dtype) for x in (k8, v8))
        options |= dict(k_scale=k_scale, v_scale=v_scale)
    return Decode(q, k, v, L, options, judge_decode)


def hopper_config(call):
    """The LaunchConfig of a Call on an H100 or H200."""
    hopper = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    with (
        replaced(ring_attn, "INTERPRET", False),
        replaced(ring_attn, "capability", lambda device: (9, 0)),
        replaced(torch.cuda, "get_device_properties", lambda device: hopper),
    ):
        return decode.make_config(call)


@triton.jit
def count_splits_jit(
    TILES, SPLITS, SEQLENS, sizes, row_tiles, MAX_GROUPS: tl.constexpr, BLOCK_N: tl.constexpr
):
    counts = decode.count_splits(SEQLENS, None, sizes, sizes.GROUPS_B, row_tiles, 0, MAX_GROUPS, BLOCK_N)
    tl.store(TILES + tl.arange(0, MAX_GROUPS), counts[0])
    tl.store(SPLITS + tl.arange(0, MAX_GROUPS), counts[1])


@local
def decode_splits_are_of_equal_length():
    """There is a program for each split, however long the sequences are. Where N_UNEVEN is above N_PROGRAMS,
    the longest split is at most 1.4 times the average of N_PROGRAMS splits."""
    new = partial(torch.empty, device="meta")
    K, some = 1024, random.Random(0)
    batches = [[K * i for i in range(1, 9)], [K] * 31 + [128 * K], [8 * K] * 8, [0] * 5, [100 * K, 0, 1]]
    batches += [[some.randrange(16 * K) for _ in range(B)] for B in (2, 5, 12, 16, 20, 32, 64, 200)]
    for lengths, M, float8, paged in product(batches, (1, 8), (False, True), (False, True)):
        B, N = len(lengths), max(lengths) + 1
        cache = (B * 16, -(-N // 16 // 16) * 16, 8) if paged else (B, N, 8)
        k = new(*cache, 128, dtype=decode.FLOAT8 if float8 else bf16)
        options = dict.fromkeys(("k_scale", "v_scale"), new(cache)) if float8 else {}
        if paged:
            options["page_table"] = new(B, 16, dtype=i32)
        seqlens = torch.tensor(lengths, dtype=i32, device=DEVICE)
        options["cache_seqlens"] = seqlens
        q = new(B, M, 32, 128, dtype=bf16)
        config = hopper_config(decode.make_call(q, k, k, 0, 1, "triton", **options))
        sizes, n, BLOCK_N = config.sizes, config.constants["MAX_GROUPS"], config.constants["BLOCK_N"]
        row_tiles = sizes.HEAD_SETS * sizes.ROW_TILES
        tiles, splits = zeros(2, n, dtype=i32)
        count_splits_jit[(1,)](tiles, splits, seqlens, sizes, row_tiles, n, BLOCK_N)
        tiles, splits = tiles[:B].tolist(), splits[:B].tolist()
        assert tiles == [-(-x // BLOCK_N) for x in lengths]
        assert sum(splits) * row_tiles <= config.grid
        longest = max(-(-t // s) for t, s in zip(tiles, splits))
        average = sum(tiles) * row_tiles / sizes.N_PROGRAMS
        if sizes.N_UNEVEN > sizes.N_PROGRAMS:
            assert longest <= max(1.4 * average + 1, min(tiles, default=0))


def check_decode(backend, *args, n_splits=None, **options):
    call = make_decode(*args, **options)
    got = call(backend, n_splits=n_splits)
    if GPU or backend == "torch":  # the interpreter is slow, and the operator is the same
        with InOperators() as operators:
            same_bits(got, call(backend, n_splits=n_splits))
        assert torch.ops.ring_attn.decode.default in operators.ran
    assert got[0].dtype == call.q.dtype
    rows = [call.judge(*got)]
    if (call.lengths == call.k.shape[1]).all():
        rows.append(call.judge(*call(backend, n_splits=n_splits, cache_seqlens=None)))
    return worst(rows)


class InOperators(TorchDispatchMode):
    """Calls go through operators, as something looks at them: those that `ran`."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ran.add(op)
        return op(*args, **(kwargs or {}))


@local(name="compiled, decode")
def check_compiled_decode():
    """One graph for each set of options, whatever the lengths: the bits of eager calls; errors when it
    runs."""
    backend = "triton" if GPU else "torch"
    (q, k, v), L = make_qkv(f32, 2, 2, 64, 4, 2, 16), ints(64, 9)
    (k8, k_scale), (v8, v_scale) = decode.quantized(k), decode.quantized(v)
    pages, table = in_pages(k, v, 16, nan, 3, seed=0)
    blocks = create_block_mask(causal_mask, 2, None, 2, 64, device=DEVICE, BLOCK_SIZE=(2, 16))
    blocks.mask_mod = decode_attn  # not looked at beside a mask_mod
    jit = dict(score_mod=ScoreMod(softcap_jit), mask_mod=ScoreMod(dilated_jit))
    mods = jit if GPU else dict(score_mod=softcap, mask_mod=dilated)
    causal = ScoreMod(causal_jit) if GPU else causal_mask
    of_heads = dict(alibi_slopes=rand(4), sink=rand(4))
    for k, v, options in (
        (k, v, {}),
        (k, v, dict(return_lse=True, window=20, sink=3, n_splits=2)),
        (k, v, dict(softcap=3.0, **of_heads)),
        (k, v, mods),
        (k, v, dict(block_mask=blocks, mask_mod=causal, return_lse=True)),
        (k8, v8, dict(k_scale=k_scale, v_scale=v_scale)),
        (*pages, dict(page_table=table)),
    ):
        f = partial(decode_attn, backend=backend, **options)
        graphs = CompileCounterWithBackend(COMPILER)
        g = torch.compile(lambda q, k, v, L: f(q, k, v, cache_seqlens=L), fullgraph=True, backend=graphs)
        for lengths in (L, L // 2, L.flip(0)):
            got, expected = g(q, k, v, lengths), f(q, k, v, cache_seqlens=lengths)
            if not options.get("return_lse"):
                got, expected = [got], [expected]
            same_bits(got, expected)
            assert [x.stride() for x in got] == [x.stride() for x in expected]
        assert graphs.frame_count == 1, f"{graphs.frame_count} graphs"
    compiled = torch.compile(decode_attn, fullgraph=True, backend="aot_eager")
    k, v = make_qkv(f32, 2, 2, 64, 4, 2, 16)[1:]
    raises(lambda: compiled(q.clone().requires_grad_(), k, v), "q requires a gradient")
    raises(lambda: compiled(q, k, v, window=0), "window=0")
    for wrong in ("window", "n_splits", "sink", "sm_scale", "softcap"):
        torch._dynamo.reset()  # each is a graph, of which a function may have eight
        raises(lambda: compiled(q, k, v, **{wrong: True}), f"{wrong}=True")
    raises(lambda: compiled(q, k, v, causal="no"), "causal='no'")
    raises(lambda: compiled(q, k, v, block_mask=blocks), "mask_mod=")
    raises(lambda: compiled(q, k[:, :, :0], v), "shape")


def check_block_mask(backend, mask_mod, by_batch, by_head, size, dtype, M, H, HKV, D, lengths, N):
    """The BlockMask that flex makes of a mask, for a cache of N tokens; and one of partial blocks only."""
    call = make_decode(dtype, M, H, HKV, D, lengths, mask_mod=mask_mod, N=N)
    L = call.lengths.long()

    def mask(b, h, m, j):
        return mask_mod(b, h, (L[b] - M + m).clamp(min=0), j)

    shape = len(lengths) if by_batch else None, H if by_head else None, M, N
    blocks = create_block_mask(mask, *shape, device=DEVICE, BLOCK_SIZE=(M, size))
    assert mask_mod is dilated or blocks.full_kv_num_blocks.sum() > 0, "the case has no full block"
    n_blocks = blocks.kv_indices.shape[-1]
    indices = ints(*range(n_blocks)).expand_as(blocks.kv_indices).contiguous()
    tables = torch.full_like(blocks.kv_num_blocks, n_blocks), indices
    only_partial = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(M, size), mask_mod=mask)
    results = [call(backend, block_mask=x) for x in (blocks, only_partial)]
    results += [virtual_decode(call, backend, n_ranks, block_mask=blocks) for n_ranks in (2, 4)[: 1 + GPU]]
    return worst([call.judge(*result) for result in results])


def check_skipped_blocks(backend):
    """Blocks that a mask does not name are not read, and full ones are seen without mask_mod: the former hold
    nan, the mask_mod refuses everything."""
    q, k, v = (randn(1, n, 2, 16, dtype=LOW_DECODE) for n in (1, 96, 96))
    k[:, 32:64] = v[:, 32:64] = nan
    tables = *block_list(0, 0, 0, 0), *block_list(2, 2, 0, 1)  # partial, full
    blocks = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(128, 32))
    got = decode_attn(q, k, v, block_mask=blocks, **for_backend(dict(mask_mod=never), backend))
    seen = (torch.cat((x[:, 64:], x[:, :32]), 1) for x in (k, v))
    assert (got - decode_attn(q, *seen, backend=backend)).abs().max() < 1e-2, "blocks are mixed up"
    assert got.isfinite().all(), "a block that is not named was read"


def virtual_decode(call, backend, n_ranks, **more):
    """striped() of a call."""
    options = call.given(backend) | more
    logits = options.pop("sink") if isinstance(options["sink"], torch.Tensor) else None
    return striped(call.q, call.k, call.v, n_ranks, logits, **options)


def striped(q, k, v, n_ranks, logits=None, **options):
    """What n_ranks ranks find, each in its stripe, merged: o, lse."""
    stripes = [[stripe(x, rank, n_ranks) for x in (k, v)] for rank in range(n_ranks)]
    parts = [decode_part(q, *mine, rank, n_ranks, **options) for rank, mine in enumerate(stripes)]
    return merge_parts(torch.stack(parts), logits, q.dtype)


def stripe(x, rank, n_ranks):
    """Rank's tokens of x (B, N, ...), and nan up to the number that each rank has room for."""
    mine = x[:, rank::n_ranks]
    return F.pad(mine, (0, 0, 0, 0, 0, -(-x.shape[1] // n_ranks) - mine.shape[1]), value=nan)


def check_stripes(backend, n_ranks, *args, **options):
    """The cache striped over ranks gives the answer of the whole one."""
    call = make_decode(*args, **options)
    return call.judge(*virtual_decode(call, backend, n_ranks))


def check_pages(backend, page_size, dtype, n_ranks=1):
    """A cache in pages, the ones that are not in use nan; table entries beyond the length are wild."""
    call, parts = make_decode(dtype, 2, 6, 2, 32, (200, 0, 1, 77), window=100, sink=3), []
    for rank in range(n_ranks):
        mine = (stripe(x, rank, n_ranks) for x in (call.k, call.v))
        pages, table = in_pages(*mine, page_size, nan, 3, seed=rank)
        table[1], table[2, 1:] = 2**31 - 1, -5
        parts.append(decode_part(call.q, *pages, rank, n_ranks, page_table=table, **call.given(backend)))
    merged = merge_parts(torch.stack(parts), None, dtype)
    return call.judge(*(call(backend, *pages, page_table=table) if n_ranks == 1 else merged))


def check_float8_pages(backend, page_size, dtype):
    """Pages of float8 and of scales, the ones that are not in use nan."""
    call = make_decode(dtype, 2, 6, 2, 32, (200, 0, 1, 77), window=100, sink=3, float8=True)
    scales = (call.options[name][..., None] for name in ("k_scale", "v_scale"))
    as_bytes = (x.view(torch.uint8) for x in (call.k, call.v))  # torch cannot index all float8 tensors
    pages, table = in_pages(*as_bytes, page_size, 0x7F, 3, seed=0)
    (k_scale, v_scale), _ = in_pages(*scales, page_size, nan, 3, seed=0)
    scales = dict(k_scale=k_scale[..., 0], v_scale=v_scale[..., 0])
    return call.judge(*call(backend, *(x.view(call.k.dtype) for x in pages), page_table=table, **scales))


def check_float8_stripes(backend, n_ranks, dtype):
    call, parts = make_decode(dtype, 2, 6, 2, 32, (204, 0, 1, 77), float8=True), []
    tensors = dict(call.given(backend), k=call.k, v=call.v)
    for rank in range(n_ranks):
        mine = {x: tensors[x][:, rank::n_ranks] for x in ("k", "v", "k_scale", "v_scale")}
        parts.append(decode_part(call.q, rank=rank, n_ranks=n_ranks, **tensors | mine))
    return call.judge(*merge_parts(torch.stack(parts), None, dtype))


@local(name="a model decodes through a float8 cache")
def check_float8_cache():
    """Its logits after some steps are near those of a cache in the model's dtype; whose bits they are not."""
    torch.manual_seed(3)
    config = Config(n_layers=2, dim=64, dim_per_head=16, n_kv_heads=2, seq_len=64, vocab_size=61)
    model, logits = Transformer(config, 0, 1, AttentionType.FLASH).to(DEVICE), []
    tokens = torch.randint(61, (2, 40), device=DEVICE)
    for dtype in (None, decode.FLOAT8):
        cache = model.new_cache(2, 40, dtype)
        model.prefill(tokens[:, :30], cache)
        logits.append(torch.cat([model.step(x, cache) for x in tokens[:, 30:].split((1, 4, 5), 1)], 1))
    off = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert off > 0, "the cache is not in float8"
    return "logits", off.item(), 0.05


@local(name="float8: any scale, and what is refused")
@on_torch_path()
def check_float8():
    x = randn(2, 40, 3, 64) * torch.logspace(-30, 30, 40, device=DEVICE)[:, None, None]
    x[0, 0] = 0
    x8, scale = decode.quantized(x)
    off = (decode.dequantized(x8, scale, f32) - x).abs() / x.abs().amax(-1, keepdim=True).clamp(min=1e-37)
    assert off.max() <= 2**-4, f"off by {off.max():.3f} of a row's largest number"
    q, refused = x[:, :1, :, :].bfloat16(), partial(raises, decode_attn)
    refused("k_scale", "float32 (2, 40, 3)", q=q, k=x8, v=x8)
    refused("v_scale", "float32 (2, 40, 3)", q=q, k=x8, v=x8, k_scale=scale, v_scale=scale[:, :5])
    refused("dtypes differ", q=q, k=q, v=q, k_scale=scale[:, :1], v_scale=scale[:, :1])
    return "off", off.max().item(), 2**-4


def check_cache_layouts(backend):
    """Caches in (B, HKV, N, D), inside of larger tensors of nan, expanded ones; queries with any strides."""
    call = make_decode(LOW_DECODE, 3, 6, 2, 48, (150, 40, 97))
    strided, kv = call._replace(q=permuted(call.q, 1, 3)), (call.k, call.v)
    rows = [call.judge(*strided(backend, *(permuted(x, 1, 2) for x in kv)))]
    rows += [call.judge(*strided(backend, *(amid_nan(x, 1, 10, 1, 8) for x in kv)))]
    one = make_decode(LOW_DECODE, 1, 4, 4, 32, (60,))
    expanded = (x.expand(3, -1, -1, -1) for x in (one.q, one.k, one.v))
    got = decode_attn(*expanded, return_lse=True, backend=backend)
    return worst([*rows, one.judge(*(x[2:] for x in got))])


def check_wild_values(backend):
    """Lengths outside of the cache are clipped: nothing outside is read; debug=True and CPUs refuse them."""
    call = make_decode(LOW_DECODE, 1, 4, 2, 32, (64, 64, 64))
    pages, tables = call.k.reshape(-1, 32, 2, 32)[:3], (*block_list(9, 0, 1), *block_list(-3, 7, -7))
    wild = dict(cache_seqlens=ints(64, 65, -1))
    paged = dict(k=pages, v=pages, page_table=ints([0, 1], [1, 2], [2, 3]), cache_seqlens=None)
    blocked = dict(block_mask=BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(128, 32)), cache_seqlens=None)
    refused = partial(raises, partial(call, backend, debug=True))
    refused("cache_seqlens[1]=65", "0..64", **wild)
    refused("block_mask.kv_num_blocks", "0..2", **blocked)
    refused("page_table[2, 1]=3", "0..2", **paged)
    if GPU:
        o, full = call(backend, **wild)[0], call(backend)[0]
        assert torch.equal(o[:2], full[:2]) and not o[2].any(), "lengths are not clipped"
        assert call(backend, **paged)[0].isfinite().all(), "a page outside was read"
        assert (call(backend, **blocked)[0] - full).abs().max() < 1e-2, "a list of blocks is not clipped"


def in_pages(k, v, page_size, fill, n_unused, seed):
    """k, v (B, N, HKV, D) as pages, in any order and with n_unused more, and the table. `fill` is what is not
    in use."""
    B, N, HKV, D = k.shape
    n_pages = -(-N // page_size)
    order = torch.randperm(B * n_pages + n_unused, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    table, pages = order[: B * n_pages].view(B, n_pages).int(), []
    for x in (k, v):
        pages.append(x.new_full((len(order), page_size, HKV, D), fill))
        padded = F.pad(x, (0, 0, 0, 0, 0, n_pages * page_size - N), value=fill)
        pages[-1][table.long()] = padded.view(B, n_pages, page_size, HKV, D)
    return pages, table


def check_unseen(backend, poison, dtype, M, H, HKV, D, lengths, N, n_ranks=1, page_size=None, block_size=None,
                 float8=False, **options):  # fmt: skip
    """Whatever no query of the call may see may hold nan, in keys and values: the result keeps its bits."""
    B = len(lengths)
    q, k, v = make_qkv(dtype, B, M, N, H, HKV, D)
    L, pad = ints(*lengths), ints(*[3, 70, 0, 11][:B])
    if "mask_mod" in options:
        options["aux"] = (pad,)
    known = {x: options[x] for x in ("causal", "mask_mod", "aux", "window", "sink") if x in options}
    seen = visible(L, M, H, N, **known)
    if block_size:  # every second block is full, the others partial, the last one not named at all
        n_blocks, tables = -(-N // block_size), []
        for first in (1, 0):
            named = range(first, n_blocks - 1, 2)
            tables += block_list(len(named), *named, *[0] * (n_blocks - len(named)))
        options["block_mask"] = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=(128, block_size))
        block = arange(N) // block_size
        seen = torch.where(block % 2 == 0, visible(L, M, H, N, **known | dict(mask_mod=None)), seen)
        seen = seen & (block < n_blocks - 1)
    hidden = ~seen.any(dim=2).view(B, HKV, H // HKV, N).any(dim=2).transpose(1, 2)  # (B, N, HKV)
    assert hidden.any(), "nothing is hidden"
    options = for_backend(options, backend) | dict(cache_seqlens=L)
    results = []
    for fill in (0.0, poison):
        kv = [x.masked_fill(hidden[..., None], fill) for x in (k, v)]
        if float8:  # 0x7F is nan
            kv, scales = zip(*(decode.quantized(x) for x in (k, v)))
            byte, kv = 0x7F if fill else 0, [x.view(torch.uint8) for x in kv]
            kv = [x.masked_fill(hidden[..., None], byte).view(decode.FLOAT8) for x in kv]
            options |= {x: y.masked_fill(hidden, fill) for x, y in zip(("k_scale", "v_scale"), scales)}
        if page_size:
            kv, options["page_table"] = in_pages(*kv, page_size, poison, 0, seed=1)
        if n_ranks == 1:
            results.append(decode_attn(q, *kv, return_lse=True, **options))
        else:
            results.append(striped(q, *kv, n_ranks, **options))
    assert results[0][0].isfinite().all()
    same_bits(*results)


@local(name="decode refuses gradients, odd numbers, nested tensors")
def check_decode_refusals():
    q, k = randn(2, 1, 4, 16), randn(2, 32, 2, 16)
    sink, slopes = (ones(4, requires_grad=True) for _ in range(2))
    attn = partial(decode_attn, q=q, k=k, v=k, backend="triton")
    with torch.no_grad():
        parts = torch.stack([decode_part(q, k, k, rank, 2, backend="triton") for rank in range(2)])
    for name, call in (
        ("sink", partial(attn, sink=sink)),
        ("aux[0]", partial(attn, score_mod=scale_jit, aux=(slopes,))),
        ("sink", partial(sharded_decode_attn, q, k, k, sink=sink, backend="triton", group=alone())),
        ("sink", partial(merge_parts, parts, sink)),
    ):
        raises(call, f"{name} requires a gradient", "no_grad")
        with torch.no_grad():
            call()  # nothing to differentiate
        raises(call, f"{name} requires a gradient")  # the good call has not hidden it
    got = [attn(sm_scale=x) for x in (0.25, np.float32(0.25), np.float64(0.25))]
    same_bits(got[1:], got[:1] * 2)
    long = torch.empty(16, device=DEVICE).expand(2, 2**23 + 1, 2, 16)
    with torch.no_grad():
        raises(attn, "8388608 tokens", "score_mod", k=long, v=long, alibi_slopes=slopes)
    for _ in range(2):
        raises(attn, "sm_scale=True", sm_scale=True)
        attn(sm_scale=1.0)  # 1.0 == True, and is another key
    ragged = [randn(n, 2, 16) for n in (3, 5)]
    for layout in (torch.jagged, torch.strided):
        bad = torch.nested.nested_tensor(ragged, layout=layout)
        refused = partial(raises, decode_attn)
        way_out = "is a nested tensor", "to_padded_tensor("
        refused(*way_out, q=q, k=bad, v=bad)
        refused(*way_out, q=bad, k=k, v=k)
        refused("cache_seqlens", q=q, k=k, v=k, cache_seqlens=bad)
        fixed = torch.nested.to_padded_tensor(bad, 0.0)  # the way out works
        assert decode_attn(q, fixed, fixed, cache_seqlens=ints(3, 5)).isfinite().all()


@local
@on_torch_path()
def decode_with_functions_made_for_every_call():
    """They are not mistaken for each other, nor are all of them kept."""
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 1, 16)

    def first(limit):
        return lambda b, h, q_idx, kv_idx: kv_idx < limit

    for limit in (*range(1, 9), *range(8, 0, -1)):
        got = decode_attn(q, k, k, mask_mod=first(limit))
        expected = decode_attn(q, k[:, :limit], k[:, :limit])
        assert (got - expected).abs().max() < 1e-5, "another function's answer"
    mod = first(3)
    decode_attn(q, k, k, mask_mod=mod)
    mod = weakref.ref(mod)
    for _ in range(4096 + 10):
        decode_attn(q, k, k, mask_mod=first(3))
    gc.collect()
    assert len(ring_attn.ALONE.agreed) <= 4096
    assert mod() is None, "a function is kept that later ones should have pushed out"


@local(name="decode: kinds of @triton.jit functions", needs="GPU")  # compiled ones
def check_jit_mods():
    """Copies of a function are one kind of call; those that differ in a constant are not."""

    def made(window):
        W = tl.constexpr(window)

        @triton.jit
        def mod(b, h, q_idx, kv_idx):
            return kv_idx > q_idx - W

        return decode.kind_of(mod)

    assert made(3) == made(3) != made(4)


@local(name="decode.capture", needs="GPU")
def check_capture():
    """What f returned is overwritten by each replay; with and without a warm-up call."""
    x, calls = ones(4), []

    def f():
        calls.append(1)
        return x * 2

    for warm_up in (True, False):
        calls.clear(), x.fill_(1)
        replay, y = decode.capture(f, warm_up)
        assert len(calls) == 1 + warm_up
        x.fill_(3)
        replay()
        assert (y == 6).all()


@local(needs="GPU")
def decode_in_a_CUDA_graph():
    """It gives the right answers after lengths, cache and page table have changed."""
    rows = []
    for paged in (False, True):
        lengths = [(700, 3, 0, 64), (1, 1000, 1000, 999), (1000, 5, 5, 5), (0, 0, 0, 0)]
        calls = [make_decode(bf16, 1, 8, 2, 64, n, N=1000, seed=i) for i, n in enumerate(lengths)]
        q, k, v, L = (x.clone() for x in calls[0][:4])
        table = ints([0], [1], [2], [3])
        options = dict(cache_seqlens=L, page_table=table if paged else None, return_lse=True)
        replay, results = decode.capture(partial(decode_attn, q, k, v, **options))
        for call in (*calls[1:], calls[0]):
            table.copy_(table.roll(1, 0))
            order = table[:, 0].long() if paged else arange(4)
            q.copy_(call.q), L.copy_(call.lengths)
            k[order], v[order] = call.k, call.v
            replay()
            rows.append(call.judge(*results))
    return worst(rows)


@local(name="decode offsets beyond 2**31", needs="GPU")
def check_decode_offsets():
    """A cache of more than 2**31 elements, by its length, its heads and its batch."""
    rows, long = [], 2**21 + 100
    for B, N, n, heads_first in ((1, long, 1, False), (1, long, 1, True), (2050, 1024, 2, False)):
        shape = (B, 16, N, 128) if heads_first else (B, N, 16, 128)
        k, v = (torch.empty(shape, dtype=bf16, device=DEVICE).normal_() for _ in range(2))
        k, v = (x.transpose(1, 2) for x in (k, v)) if heads_first else (k, v)
        q = randn(B, 1, 16, 128, dtype=bf16)
        o, lse = decode_attn(q, k, v, window=300, return_lse=True)
        tail = q[-n:], k[-n:, -300:], v[-n:, -300:], q[-n:]
        truth, true_lse, *_ = by_rows(*(x.double() for x in tail), False)
        rows.append(("o", error(o[-n:], truth), 2 * error(sdpa(*tail, False)[0], truth) + 1e-5))
        rows.append(("lse", error(lse[-n:], true_lse), 1e-4))
        del k, v
    return worst(rows)


@local(name="errors of decode_attn")
def check_decode_errors():
    q, k = randn(2, 1, 4, 16), randn(2, 32, 2, 16)

    def call(q=q, k=k, **options):
        return decode_attn(q, k, **dict(v=k) | options)

    def blocks(*shape):
        return dict(block_mask=create_block_mask(causal_mask, *shape, device=DEVICE, BLOCK_SIZE=16))

    refused = partial(raises, call)
    refused("q ", "(1, 4, 16)", q=q[0])
    refused("k must be", "NoneType", k=None)
    refused("shapes do not fit", "(1, 32, 2, 16)", k=k[:1])
    refused("shapes do not fit", "(2, 5, 2, 16)", v=k[:, :5])
    refused("3 query heads", "2 key/value heads", q=q[:, :, :3])
    refused("torch.float16", "torch.float32", "cast", v=k.half())
    refused("torch.int32 is not supported", q=q.int(), k=k.int())
    refused("requires a gradient", "ring_attn", q=q.clone().requires_grad_())
    odd = dict(backend="flash", sm_scale=-1.0, causal="yes", window=0, n_splits=0, score_mod=5)
    for name, value in (*odd.items(), ("sm_scale", [1.0]), ("window", [3])):
        refused(f"{name}={value!r}", **{name: value})
    refused("sink=4", "window", sink=4)
    refused("sink=-1", sink=-1, window=8)
    refused("sink=((3,)", "(4,)", sink=zeros(3))
    refused("cache_seqlens", "(2,)", cache_seqlens=ints(1, 2, 3))
    refused("cache_seqlens", "int32", cache_seqlens=ints(1, 2).long())
    refused("cache_seqlens list", cache_seqlens=[1, 2])
    refused("cache_seqlens[0]=33", "0..32", cache_seqlens=ints(33, 2), debug=True)
    refused("cache_seqlens[1]=-1", cache_seqlens=ints(2, -1), debug=True)
    refused("page_table", "(2, max_pages)", page_table=ints(1, 2))
    refused("aux must be a tuple", aux=[q])
    refused("score_mod takes 7 arguments and is given 5", "kv_idx", score_mod=alibi_jit, backend="triton")
    words = "mask_mod takes 7 arguments and is given 5", "aux[0]"
    refused(*words, mask_mod=alibi_jit, aux=(k,), backend="triton")
    refused("strides", "last must be 1", k=permuted(k, 1, 3))
    refused("score_mod", "@triton.jit", score_mod=softcap)
    refused("score_mod", "plain function", score_mod=softcap_jit, backend="torch")
    refused("made from", "mask_mod=", **blocks(None, None, 1, 32))
    refused("block_mask is a int", block_mask=5)
    masked = partial(refused, mask_mod=causal_jit, backend="triton")
    masked("4 blocks of 16 keys", "32 tokens has 2", **blocks(None, None, 1, 64))
    masked("3 heads", "4 query heads", **blocks(None, 3, 1, 32))
    masked("3 sequences", "2 sequences", **blocks(3, None, 1, 32))
    masked("(1, 1, 4)", "one row of blocks", **blocks(None, None, 64, 32))
    masked("17 query tokens", "block of 16", q=q.expand(2, 17, 4, 16), **blocks(None, None, 1, 32))
    raises(lambda: sharded_decode_attn(q, k, k, group=VirtualRing(2)), "VirtualRing", "decode_attn")
    raises(lambda: KVCache(1, 1, 0, 1, 1), "n_tokens=0")
    raises(lambda: KVCache(1, 1, 1, 1, 1, n_pages=3), "n_pages=3", "page_size")
    raises(lambda: KVCache(1, 1, 1, 1, 1, page_size=0), "page_size=0")
    raises(lambda: KVCache(1, 2.0, 1, 1, 1), "B=2.0")
    raises(lambda: KVCache(1, 1, 1, 1, 1, torch.int8), "int8", "float16")
    raises(lambda: decode_part(q, k, k, 2, 2), "rank=2", "n_ranks=2")
    if not GPU:
        refused("interpreter", q=q.bfloat16(), k=k.bfloat16(), backend="triton")
    assert call().isfinite().all()


def models_that_decode(ring, kind, kind_alone, **options):
    """A model on a ring, and the same one on this process only. options: of the config."""
    torch.manual_seed(0)
    config = Config(n_layers=2, dim=64, dim_per_head=16, n_kv_heads=2, seq_len=64, **options)
    reference = Transformer(config, attn_type=kind_alone).to(DEVICE).eval()
    for name, p in reference.named_parameters():
        p.data = 4 * p.data + ("sinks" in name)  # so that the next token is not the last one again
    model = Transformer(config, ring.rank, ring.n_ranks, kind, ring).to(DEVICE).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


@on_torch_path()
def check_stream(ring, kind, **options):
    """Decoding through a cache, also in chunks of tokens and until it is full, equals running all again.
    options: of the model's attention."""
    kind_alone = AttentionType.FLASH if "softcap" in options else AttentionType.SDPA
    model, reference = models_that_decode(ring, kind, kind_alone, **options)
    tokens = torch.randint(256, (2, 41), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = model.new_cache(2, 41)
    with torch.no_grad():
        expected = reference(tokens)
    bound = 1e-4 * expected.abs().max().item()
    got = [model.prefill(tokens[:, :19], cache)[:, None]]
    for first, last in ((19, 20), (20, 23), (23, 24), (24, 41)):
        got.append(model.step(tokens[:, first:last], cache))
    raises(lambda: model.step(tokens[:, :1], cache), "the cache is full", "41 tokens")
    assert cache.host_lengths == [41, 41] and (cache.lengths == 41).all(), "the refused tokens were counted"
    for temperature in (0, 0.8):
        pick, pick_again = (torch.Generator(DEVICE).manual_seed(3) for _ in range(2))
        graph = GPU and ring.n_ranks == 1
        text = model.generate(tokens[:, :7], 12, temperature, generator=pick, graph=graph)
        again = tokens[:, :7]
        with torch.no_grad():
            for _ in range(12):  # the full context for every token
                token = reference.sample(reference(again)[:, -1], temperature, None, pick_again)
                again = torch.cat((again, token), 1)
        assert torch.equal(text, again)
    if not options:
        graphs = CompileCounterWithBackend(COMPILER)
        compiled = torch.compile(model.decode, fullgraph=True, backend=graphs)
        for size, most in (41, 1), (46, 2), (60, 2):  # of caches: the second graph is for all sizes
            cache, logits = model.new_cache(2, size), []
            model.prefill(tokens[:, :19], cache)
            for x in tokens[:, 19:].split(1, 1):
                cache.reserve(1)
                logits.append(compiled(x, cache))
            assert (torch.cat(logits, 1) - torch.cat(got[1:], 1)).abs().max().item() < bound
            assert graphs.frame_count <= most, f"{graphs.frame_count} graphs"
    if GPU and ring.n_ranks == 1:
        cache, new = model.new_cache(2, 41), tokens[:, 20:21]
        model.prefill(tokens[:, :19], cache), model.step(tokens[:, 19:20], cache)
        step = decode.capture_step(model.decode, new, cache)
        raises(lambda: step(tokens[:, 20:22], cache), "captured", "(2, 2)")
        raises(lambda: step(new, model.new_cache(2, 41)), "captured")
        assert (step(new, cache)[:, 0] - expected[:, 20]).abs().max().item() < bound
    refused = partial(raises, partial(model.generate, tokens, 3))
    refused("the cache is full", "43 more", cache=model.new_cache(2, 42))
    refused("temperature=-1", temperature=-1)
    refused("temperature=nan", temperature=nan)
    if ring.n_ranks > 1:
        zigzag, _ = models_that_decode(ring, AttentionType.ZIGZAG, kind_alone, **options)
        raises(lambda: zigzag.generate(tokens, 1), "STRIPED")
    return compare(["logits"], [torch.cat(got, 1)], [expected[:, 18:]], bound)


@on_torch_path()
def check_ragged(ring, kind, dtype=None, **options):
    """Prompts of different lengths in one batch continue as each does alone, also where sequences end early
    and give their pages to others. options: of the model's attention."""
    model, reference = models_that_decode(ring, kind, AttentionType.FLASH, vocab_size=61, **options)
    graph, n_new, page_size = GPU and ring.n_ranks == 1, 14, max(1, 4 // ring.n_ranks)
    lengths, span = (5, 17, 1, 12), page_size * ring.n_ranks  # span: tokens of all ranks' pages of a number
    prompts, alone = [], []
    for n in lengths:
        g, cache = torch.Generator().manual_seed(n), reference.new_cache(1, n + n_new, dtype)
        prompts.append(torch.randint(61, (1, n), generator=g).to(DEVICE))
        alone.append(reference.generate(prompts[-1], n_new, 0, cache=cache)[:, n:])
    alone, stop = torch.cat(alone), alone[1][0, 2].item()
    stopped = [row[: row.index(stop) + 1] if stop in row else row for row in alone.tolist()]
    columns, most = max(map(len, stopped)), 0  # most: pages in use at once
    for i in range(columns):
        most = max(most, sum(-(-(n + i) // span) for n, row in zip(lengths, stopped) if i < len(row)))
    stopped = torch.tensor([row + [stop] * (columns - len(row)) for row in stopped], device=DEVICE)
    for left, paged in product((False, True), repeat=2):
        tokens, mask = torch.full((4, 20), -1, device=DEVICE), zeros(4, 20)
        for b, (n, prompt) in enumerate(zip(lengths, prompts)):
            at = slice(20 - n, None) if left else slice(n)
            tokens[b, at], mask[b, at] = prompt[0], 1
        generate = partial(model.generate, tokens, n_new, 0, graph=graph, mask=mask.bool())
        new_cache = partial(model.new_cache, 4, 17 + n_new - 1, dtype)
        in_pages = partial(new_cache, page_size=page_size)
        all_pages = sum(-(-(n + n_new - 1) // span) for n in lengths)
        text = generate(cache=in_pages(n_pages=all_pages) if paged else new_cache())
        assert torch.equal(text, torch.cat((tokens, alone), 1))
        got = generate(cache=in_pages(n_pages=most) if paged else new_cache(), stop=stop)
        assert torch.equal(got, torch.cat((tokens, stopped), 1))
    assert 4 < columns and most < all_pages, "pages that were given back were not needed"
    refused = partial(raises, generate)
    cache, too_few = in_pages(n_pages=all_pages - 1), f"pages of {page_size} tokens"
    refused(too_few, "n_pages", cache=cache)
    assert not any(cache.host_lengths), "it was refused after the first token only"
    refused(too_few, "free", stop=stop, cache=in_pages(n_pages=most - 1))
    cache = in_pages(n_pages=all_pages)
    cache.free = [0] * all_pages
    assert not torch.equal(generate(cache=cache), text), "nobody noticed that sequences share a page"
    hole, empty = mask.bool(), mask.bool()
    hole[1, 10], empty[2] = False, False
    refused("rows [1] of mask", mask=hole)
    refused("rows [2] of mask", mask=empty)
    refused("mask", "(4, 20)", mask=mask.bool()[:, 1:])
    refused("float32", "bool", mask=mask)
    for stop in (61, 1.5, True):
        refused(f"stop={stop}", "60", stop=stop)
    raises(lambda: model.generate(tokens, -1), "n_tokens=-1")
    raises(lambda: model.generate(tokens[0], 1), "tokens", "(20,)")
    refused("3 sequences", cache=model.new_cache(3, 40))
    refused("(3, 2, 16", "new_cache", cache=KVCache(3, 4, 40, 2, 16, device=DEVICE, group=ring))
    raises(lambda: model.step(tokens[:2, :1], new_cache()), "(2, 1)", "4 sequences")
    if not GPU:
        refused("graph=True", "GPU", graph=True)
    if ring.n_ranks > 1:
        refused("(2, 2, 16, 1)", "ranks", cache=reference.new_cache(4, 40))
        refused("ranks disagree", "mask", mask=(mask if ring.rank else torch.ones_like(mask)).bool())
        refused("ranks disagree", "stop", stop=ring.rank)
        raises(lambda: model.generate(tokens.clamp(min=ring.rank), 3), "ranks disagree", "tokens")
        raises(lambda: model.prefill(tokens[:1], new_cache(), rows=[ring.rank]), "ranks disagree", "rows")
    check_refill(model, span, prompts, alone, new_cache)


def check_refill(model, span, prompts, alone, new_cache):
    """Steps by hand: no page is left, a sequence ends, another takes its place."""

    def pages_fit():
        assert sorted(sum(cache.pages, cache.free)) == list(range(n_pages)), "a page is lost, or there twice"
        for b, (L, pages) in enumerate(zip(cache.host_lengths, cache.pages)):
            assert len(pages) == -(-L // span) and cache.page_table[b, : len(pages)].tolist() == pages
        assert cache.lengths.tolist() == cache.host_lengths

    longest, n = prompts[1].shape[1], prompts[0].shape[1]
    tokens = prompts[1].repeat(2, 1)
    tokens[1, :n] = prompts[0]
    n_pages = -(-longest // span) + -(-n // span)
    cache = new_cache(page_size=span // model.blocks[0].attn.n_ranks, n_pages=n_pages)
    model.prefill(tokens, cache, torch.tensor([longest, n]), rows=[2, 0])
    refused, i, new = None, 0, zeros(4, 1, dtype=i64)
    if not GPU:  # what fails leaves no tokens without keys
        raises(lambda: model.step(new - 1, cache), "index", kind=IndexError)
    while refused is None:  # until a page is needed, and none is free
        pages_fit()
        new[[2, 0], 0] = alone[[1, 0], i]
        before = copy.deepcopy((cache.host_lengths, cache.pages, cache.free))
        try:
            logits = model.step(new, cache)
            i += 1
            assert logits[[2, 0], 0].argmax(-1).tolist() == alone[[1, 0], i].tolist()
        except ValueError as error:
            refused = str(error)
    assert f"0 of {n_pages} are free" in refused, refused
    assert before == (cache.host_lengths, cache.pages, cache.free), "the refused step left traces"

    def keys():  # of layer 0, as bytes
        tokens = {b: arange(cache.host_lengths[b])[None] for b in (0, 2)}
        return [cache.k[0].view(torch.uint8)[cache.slots(x, cache.rows[[b]])] for b, x in tokens.items()]

    held = keys()
    with contextlib.suppress(ValueError):  # on a CPU
        model.decode(new, cache)  # without reserve
    cache.restore(cache.host_lengths)
    same_bits(keys(), held)
    raises(lambda: model.prefill(prompts[2], cache, rows=[2]), "[2]", "release")
    cache.release([2])
    pages_fit()
    if not GPU and cache.ring.n_ranks == 1:
        raises(lambda: model.prefill(prompts[2] - 99, cache, rows=[3]), "index", kind=IndexError)
        pages_fit()
    got = model.prefill(prompts[2], cache, rows=[3])  # a token
    assert got.argmax(-1).item() == alone[2, 0]
    for j in range(4):
        new[[0, 3], 0] = torch.stack((alone[0, i + j], alone[2, j]))
        logits = model.step(new, cache)
        assert logits[[0, 3], 0].argmax(-1).tolist() == [alone[0, i + j + 1].item(), alone[2, j + 1].item()]
        pages_fit()
    assert cache.host_lengths[1:3] == [0, 0]
    cache.release(range(4))
    pages_fit()
    raises(lambda: model.step(new, cache), "prefill")
    raises(lambda: cache.release([4]), "[4]", "0 to 3")
    raises(lambda: model.prefill(tokens, cache, [n]), f"lengths=[{n}]", "2 ints")
    raises(lambda: model.prefill(tokens, cache, [0, n]), "lengths=[0", f"1 to {longest}")
    raises(lambda: model.prefill(tokens, cache, rows=[1, 1]), "rows=[1, 1]", "4 sequences")


def check_sharded(ring, backend, *args, **options):
    """Real ranks give the bits of virtual ones, the same on each; and all raise where one is wrong."""
    call, last = make_decode(*args, **options), ring.n_ranks - 1
    kv = (stripe(x, ring.rank, ring.n_ranks) for x in (call.k, call.v))
    sharded = partial(sharded_decode_attn, call.q, *kv, group=ring, return_lse=True, **call.given(backend))

    def wrong(a, b):
        return a if ring.rank == last else b

    got = sharded()
    if ring.n_ranks > 1:
        expected, refused = virtual_decode(call, backend, ring.n_ranks), partial(raises, sharded)
        same_bits(got, expected)
        refused("ranks disagree", "window", window=wrong(7, 8))
        refused(f"rank {last}: n_splits=0", n_splits=wrong(0, 1))
        lengths = call.lengths + wrong(10**6, 0)
        refused(f"rank {last}: cache_seqlens[0]=1000", cache_seqlens=lengths, debug=True)
        same_bits(sharded(), expected)
    return call.judge(*got)


SHAPES = [(1, 4, 4, 16, (33, 0, 1)), (1, 6, 2, 64, (200, 64, 5)), (2, 32, 1, 24, (70, 1, 2))]
SHAPES += [(4, 8, 2, 80, (130,)), (17, 5, 1, 128, (60, 9)), (1, 3, 1, 256, (65, 64)), (40, 4, 2, 33, (90,))]
if GPU:
    SHAPES += [(1, 8, 2, 128, (5000, 17, 1024)), (3, 32, 4, 128, (4096, 4096)), (70, 8, 8, 96, (333, 64, 1))]
docs = arange(4 * 256).view(4, 256) // 37
MODS = dict(score_mod=alibi, mask_mod=same_doc, aux=(torch.tensor([0.25, 0.05], device=DEVICE), docs))
for backend in ("torch", "triton"):

    def decoding(name, *args, f=check_decode, backend=backend, **options):
        local(f, f"decode {backend} {name}", backend, *args, **options)

    low, full = LOW_DECODE, f32
    interpreted = backend == "triton" and not GPU  # that is slow
    for i, (dtype, (M, H, HKV, D, lengths)) in enumerate(product((full, low), SHAPES)):
        if interpreted and i % 2:
            continue  # SHAPES has an odd length: every other dtype
        decoding(f"M{M} {H}/{HKV} D{D} {lengths} {str(dtype)[6:]}", dtype, M, H, HKV, D, lengths)
    decoding("full", low, 5, 6, 2, 32, (90, 3, 0), causal=False)
    decoding("window", low, 3, 6, 2, 32, (200, 39, 2), window=40)
    decoding("window of 1", low, 1, 2, 1, 16, (200, 1), window=1)
    decoding("window and sink tokens", low, 4, 6, 2, 32, (200, 45, 3), window=40, sink=5)
    decoding("window and many sink tokens", low, 1, 2, 2, 16, (300, 100), window=20, sink=150)
    decoding("sink logits", low, 2, 6, 2, 32, (100, 3, 0), sink=torch.linspace(-2, 3, 6, device=DEVICE))
    alibi_only, docs_only = (dict(MODS, **{name: None}) for name in ("mask_mod", "score_mod"))
    decoding("alibi by key/value head", full, 3, 6, 2, 32, (200, 17, 0), **alibi_only)
    decoding("softcap", low, 1, 6, 2, 32, (200, 17), score_mod=softcap)
    decoding("documents", low, 3, 6, 2, 32, (200, 37, 150), **docs_only)
    decoding("documents, alibi, window", full, 2, 6, 2, 32, (200, 37, 150), window=90, **MODS)
    for n_splits in (1, 2, 7, 16):
        decoding(f"n_splits={n_splits}", low, 2, 6, 2, 32, (150, 20, 0), n_splits=n_splits)
    over = partial(decoding, f=check_stripes)
    for n_ranks in (1, 2, 3) if interpreted else (1, 2, 3, 8):
        over(f"striped over {n_ranks}", n_ranks, low, 3, 6, 2, 32, (203, 17, 1, 0))
    shape = 3, full, 2, 6, 2, 32, (203, 150, 1)
    over("striped over 3, window and sink tokens", *shape, window=80, sink=4)
    over("striped over 3, mods and sink logits", *shape, sink=ones(6), **MODS)
    heads, lengths = (2, 6, 2, 32), ((190, 64, 3), 200)
    for title, *args in (
        ("causal, blocks of 32", causal_mask, True, False, 32, low, *heads, *lengths),
        ("causal, blocks of 48", causal_mask, True, False, 48, low, *heads, *lengths),
        ("causal by head, blocks of 64", causal_mask, True, True, 64, low, *heads, *lengths),
        ("dilated by head, blocks of 16", dilated, True, True, 16, low, *heads, (100, 64, 3), 112),
        ("for all", causal_mask, False, False, 32, full, 3, 6, 2, 32, (150, 150), 160),
    ):
        decoding(f"block mask {title}", *args, f=check_block_mask)
    decoding("reads named blocks only", f=check_skipped_blocks)
    for page_size in (7, 16, 64):
        decoding(f"pages of {page_size}", page_size, low, f=check_pages)
    decoding("pages of 16, striped over 2", 16, full, 2, f=check_pages)
    for dtype, *args, options in (
        (low, 1, 6, 2, 64, (200, 37, 0), {}),
        (full, 3, 6, 2, 32, (200, 45, 3), dict(window=40, sink=5)),
        (low, 9, 4, 2, 32, (90, 50), dict(sink=ones(4))),
        (low, 2, 6, 2, 32, (150, 20, 0), dict(n_splits=5, score_mod=softcap)),
        (low, 3, 6, 2, 32, (200, 37, 150), docs_only),
    ):
        decoding(f"float8 M{args[0]} {', '.join(options)}", dtype, *args, float8=True, **options)
    if GPU:  # small programs, many of them
        decoding("float8, many", low, 1, 8, 2, 128, (9000,) * 20 + (8500, 3), float8=True)
    decoding("float8, pages of 16", 16, low, f=check_float8_pages)
    decoding("float8, striped over 3", 3, low, f=check_float8_stripes)
    decoding("cache layouts amid nan", f=check_cache_layouts)
    decoding("wild lengths and pages", f=check_wild_values)
    single, shape, two = (full, 1, 2, 1, 16, (4,), 4), heads, (200, 150)
    padded, holes = dict(mask_mod=left_pad), dict(mask_mod=sparse)
    for poison, title, args, options in (
        (nan, "left padding of one", single, padded),
        (inf, "left padding of one", single, padded),
        (inf, "window of 3", single, dict(window=3)),
        (nan, "window and sink tokens", (low, 4, 6, 2, 40, (200, 45, 3), 200), dict(window=40, sink=5)),
        (nan, "window, 32 rows", (low, 9, 4, 2, 32, (90, 50), 100), dict(window=30)),
        (nan, "window, 64 rows", (low, 17, 4, 2, 32, (90, 50), 100), dict(window=30)),
        (inf, "left padding", (low, *shape, (200, 150, 9), 210), padded),
        (nan, "left padding, 32 rows", (low, 9, 4, 2, 64, (90, 80), 100), padded),
        (nan, "left padding, 64 rows", (low, 17, 4, 2, 64, (90, 80), 100), padded),
        (nan, "left padding, full", (full, *shape, two, 200), dict(padded, causal=False)),
        (nan, "holes by head", (low, 1, 3, 3, 32, (200, 77), 200), holes),
        (inf, "holes and window", (full, *shape, (200, 77), 200), dict(holes, window=50, sink=4)),
        (nan, "pages", (low, *shape, (200, 0, 77), 210), dict(page_size=16, window=30)),
        (inf, "pages, left padding", (low, *shape, (200, 0, 77), 210), dict(padded, page_size=16)),
        (nan, "float8, left padding", (low, *shape, (200, 150, 9), 210), dict(padded, float8=True)),
        (inf, "float8, window", (low, *shape, (200, 150, 9), 210), dict(window=30, float8=True)),
        (nan, "striped", (low, *shape, (200, 150, 9), 210), dict(padded, n_ranks=3, window=90)),
        (nan, "blocks", (low, *shape, two, 210), dict(block_size=32)),
        (nan, "partial blocks", (low, 1, 6, 2, 32, two, 210), dict(padded, block_size=48)),
        (nan, "splits", (low, 1, 6, 2, 32, two, 210), dict(padded, n_splits=5, window=90)),
    ):
        decoding(f"hidden {poison} {title}", poison, *args, f=check_unseen, **options)

# -----------------------------------------------------------------------------
# bad input


@local(name="errors of ring_attn")
def check_errors():
    x, ring2 = randn(2, 8, 4, 16), VirtualRing(2)

    def call(args=(x, x, x), **options):
        return ring_attn.ring_attn(*args, **dict(group=alone()) | options)

    refused = partial(raises, call)
    refused("(8, 4, 16)", "(B, T, heads, D)", args=(x[0], x, x))
    refused("NoneType", args=(x, None, x))
    refused("sparse", "to_dense", args=(x.to_sparse(), x, x))
    refused("['zigzag']", schedule=["zigzag"])
    for scale in ([1.0], True, -1.0):
        refused(f"sm_scale={scale}", sm_scale=scale)
    refused("causal", causal=torch.ones(2))
    refused("(1, 8, 4, 16)", "equal B and D", args=(x, x[:1], x[:1]))
    refused("shapes do not fit", args=(x, x, x[..., :8]))
    refused("shape ()", args=(x[0, 0, 0, 0], x, x))
    refused("dimension of 0", args=[x[:, :0]] * 3)
    refused("4 query heads", "3 key/value heads", args=(x, x[:, :, :3], x[:, :, :3]))
    refused("dtypes differ", "cast", args=(x, x.half(), x))
    refused("torch.int32 is not supported", args=[x.int()] * 3)
    refused("devices differ", args=(x, x.to("meta"), x))
    refused("meta", "cpu and cuda", args=[x.to("meta")] * 3)
    refused("spiral", "zigzag", schedule="spiral")
    refused("group", "'world'", group="world")
    refused("backend='cuda'", "triton", backend="cuda")
    refused("257", "256", args=[randn(1, 4, 1, 257)] * 3, backend="triton")
    refused("seq_len=8", "n_ranks=3", group=VirtualRing(3))
    words = "seq_len=6 must be a multiple of 2*n_ranks=4", 'schedule="striped"'
    refused(*words, args=[x[:, :6]] * 3, schedule="zigzag", group=ring2)
    refused("B=1 must be a multiple of 2", "zigzag", args=[x[:1]] * 3, schedule="step", group=ring2)
    if GPU:
        refused("CUDA tensors", args=[x.cpu()] * 3, backend="triton")
    else:
        refused("interpreter", "float16", args=[x.bfloat16()] * 3, backend="triton")
    if HOPPER:
        refused("12", "multiple of 8", args=[x[..., :12].bfloat16()] * 3, backend="gluon")
    else:
        refused("Hopper", 'backend="triton"', args=[x.half()] * 3, backend="gluon")
    refused("torch.float32", "float16", backend="gluon")
    ragged = torch.nested.nested_tensor([x[0], x[1, :5]], layout=torch.jagged)
    refused("to_padded_tensor", args=[ragged] * 3)
    dense = ragged.to_padded_tensor(0.0)  # the way out that the message names
    scaled = [call((dense, x, x), sm_scale=number) for number in (0.25, np.float32(0.25), np.float64(0.25))]
    same_bits(scaled[1:], scaled[:1] * 2)
    for f, args, *words in (
        (ring_attn.flash_attn_func, (x, x, x, x, True, 1.0), "bias", "(2, 4, 8, 8)"),
        (positions, ("zigzag", 2, 2, 8), "rank=2"),
        (positions, ("spiral", 0, 2, 8), "spiral"),
        (shard, (x, "striped", 0, 3), "seq_len=8", "n_ranks=3"),
        (shard, (x[:1], "step", 0, 2), "B=1"),
        (shard, (x, "striped", 0, 0), "n_ranks=0"),
        (VirtualRing, (0,), "n_ranks=0"),
        (unshard, (x, "striped", ring2), "VirtualRing"),
        (unshard, (x[0, 0, 0], "striped", alone()), "(B, T, ...)"),
    ):
        raises(partial(f, *args), *words)


@local
def errors_of_masks():
    """In every public function."""
    x, ring2 = randn(2, 8, 4, 16), VirtualRing(2)

    def ints(*values):
        return torch.tensor(values, dtype=i32)

    def call(q=x, k=x, **options):
        return ring_attn.ring_attn(q, k, k, **dict(group=alone(), backend="torch") | options)

    def refused(*words, **options):
        raises(call, *words, **options)
        if not {"q", "k", "group", "causal"} & set(options):
            raises(partial(ring_attn.flash_attn_func, x, x, x), *words, **options)
            for f in ring_attn.ATTN_FUNCS.values():
                raises(partial(f, x, x, x, 1, 0, 0, 0), *words, **options)

    for window in (0, -1, 2.0, True, "4", torch.tensor(4)):
        refused(f"{window=}", "1 or more", window=window)
    call(window=(1, 0))  # which ranks have agreed on then, but not on (True, 0) or (1.0, 0)
    for window in ((1,), (1, 2, 3), (-2, 0), (0, 1.5), (True, 0), (1.0, 0)):
        refused(f"{window=}", "0 or more", window=window)
    refused("window=4", "causal=True", "(left, right)", window=4, causal=False)
    for seq_len in (0, 9, -1, 8.0, True):
        refused(f"{seq_len=}", "from 1 to 8", seq_len=seq_len)
    refused("seq_len=9", "from 1 to 8", seq_len=9, group=ring2)
    for documents in ([0, 8], (0, 8), ints(0, 8).long(), ints(0, 8).float(), np.array([0, 8])):
        refused("cu_seqlens", "int32", cu_seqlens=documents)
    for documents in (ints(8), ints(), ints([0, 8]), ints([[0, 8], [0, 8]]), ints(0, 8)[0]):
        refused("cu_seqlens", str(tuple(documents.shape)), "(B, n + 1)", cu_seqlens=documents)
    for documents in (ints(1, 8), ints(0, 5, 4, 8), ints(0, 7), ints(0, 9), ints([0, 8, 8], [0, 8, 4])):
        refused("cu_seqlens", "begin with 0", str(documents.flatten()[-1].item()), cu_seqlens=documents)
    refused("cu_seqlens", "5", "8", cu_seqlens=ints(0, 4), seq_len=5)
    for sinks in (torch.zeros(3), torch.zeros(4, 1), torch.zeros(()), ints(1, 1, 1, 1), 1.0, [0.0] * 4):
        refused("sinks", "(4,)", sinks=sinks)
    refused("sinks", "meta", sinks=torch.zeros(4, device="meta"))
    short, on_ring = x[:, :6], dict(group=ring2, schedule="contiguous")
    refused("8 queries", "6 keys", "causal=False", k=short, **on_ring)
    refused("window=(1, 1)", "causal=False", k=short, causal=False, window=(1, 1), **on_ring)
    for options in (dict(seq_len=6), dict(cu_seqlens=ints(0, 8))):
        for where in ({}, on_ring):
            refused(*options, "equal lengths", k=short, causal=False, **options, **where)
    refused("seq_len=7", "n_ranks=2", k=x[:, :7], causal=False, **on_ring)
    for options in (dict(window=0), dict(seq_len=9), dict(cu_seqlens=ints(1, 8))):
        raises(partial(ring_attn.keys_moved, "zigzag", 2, 4, **options), *options)
    raises(lambda: positions("zigzag", 0, 2, 4, cu_seqlens=ints(1, 8)), "cu_seqlens", "begin with 0")
    raises(lambda: unshard(x, "zigzag", alone(), seq_len=9), "seq_len=9", "from 1 to 8")
    good = [call(window=window) for window in (2, (1, 0), [1, None])]
    same_bits(good[1:], good[:1] * 2)


@local
def errors_of_the_model():
    good = dict(dim=64, dim_per_head=16, seq_len=96, rank=0, n_ranks=1, dropout=0.0, causal=True)
    refused = partial(raises, partial(Attention, **good, attn_type=AttentionType.ZIGZAG))
    refused("dim=65", "dim_per_head=16", dim=65)
    refused("rank=2", "n_ranks=2", rank=2, n_ranks=2)
    refused("dropout=1.0", dropout=1.0)
    refused("AttentionType", attn_type="zigzag")
    refused("n_heads=4", "n_kv_heads=3", n_kv_heads=3)
    refused("dim_per_head=1", "even", dim_per_head=1, rope_theta=1e4)
    refused("window=0", "1 or more", window=0)
    on_two = Transformer(Config(), 0, 2, AttentionType.ZIGZAG)
    raises(lambda: on_two.generate(torch.zeros(1, 1, dtype=i64), 1), "on 2 ranks", "STRIPED")


@real(ranks=2)
def errors_on_one_rank_raise_on_all(ring):
    """And the ring still works afterwards."""
    x, last = randn(2, 8, 4, 16), WORLD - 1

    def wrong(a, b=x):
        return a if RANK == last else b

    def refused(*words, q=x, k=None, f=ring_attn.ring_attn, **options):
        k = q if k is None else k
        raises(lambda: f(q, k, k, **options), *words)

    refused("ranks disagree", "schedule='striped'", "schedule='zigzag'", schedule=wrong("striped", "zigzag"))
    refused("ranks disagree", "causal", causal=RANK == last)
    refused("ranks disagree", "backward", q=wrong(x[:, :, :, :15]).requires_grad_(RANK == last))
    x = x.detach()
    refused(f"rank {last}: 4 query heads", k=wrong(x[:, :, :3]))
    refused(f"seq_len={7 * WORLD} must be a multiple of 2*n_ranks={2 * WORLD}", q=x[:, :7])
    refused("B=1 must be a multiple of 2", q=x[:1], schedule="step")
    refused("spiral", schedule="spiral")
    refused(f"rank {last}: q is torch.sparse_coo", q=wrong(x.to_sparse()), k=x)
    refused(f"rank {last}: schedule=['zigzag']", schedule=wrong(["zigzag"], "zigzag"))
    S, sinks = 8 * WORLD, zeros(4)
    documents, others = (torch.tensor([0, n, S], dtype=i32) for n in (3, 4))
    for name, good, bad in (
        ("window", 4, 5),
        ("window", 4, (3, 0)),
        ("seq_len", S - 1, S),
        ("cu_seqlens", documents, others),
        ("cu_seqlens", documents, None),
        ("cu_seqlens", documents, others.expand(2, 3)),
        ("sinks", sinks, sinks.double()),
        ("sinks", sinks, None),
    ):
        refused("ranks disagree", name, **{name: wrong(bad, good)})
    refused("ranks disagree", "backward", sinks=wrong(sinks.clone().requires_grad_(), sinks))
    refused(f"rank {last}: window=0", window=wrong(0, 4))
    refused(f"rank {last}: seq_len={S + 1}", seq_len=wrong(S + 1, S))
    refused(f"rank {last}: cu_seqlens", "begin with 0", cu_seqlens=wrong(others + 1, documents))
    refused(f"rank {last}: sinks", "(4,)", sinks=wrong(sinks[1:], sinks))
    refused("causal=False", "8 queries", "6 keys", k=x[:, :6])
    # compiled: the operator's own checks, of shapes that have not been agreed on
    for f in (ring_attn.ring_attn, torch.compile(ring_attn.ring_attn, fullgraph=True, backend="aot_eager")):
        refused("ranks disagree", "(2, 6, 4, 16)", "(2, 8, 4, 16)", q=wrong(x[:, :6]), f=f)
        refused(f"rank {last}: seq_len={7 * WORLD}", q=wrong(x[:, :7]), f=f)
        refused("ranks disagree", "window", q=x[:, :4], window=wrong(2, 3), f=f)
    gather = partial(raises, partial(unshard, schedule="zigzag"))
    gather("ranks disagree", x=wrong(x[:, :6]))
    gather(f"rank {last}: seq_len=0", x=x, seq_len=wrong(0, 9))
    gather(f"rank {last}: x is", "(B, T, ...)", x=wrong(x[0, 0, 0]))
    gather("cannot move meta tensors", x=x.to("meta"))
    if GPU:
        other = x.to("cuda:0")
        words = f"rank {last}: tensors are on cuda:0, but init_process_group was given device_id=cuda:{last}"
        refused(words, q=other)
        gather(words, x=other)
    good = WORLD, RANK, (RANK - 1) % WORLD, (RANK + 1) % WORLD
    for schedule, f in ring_attn.ATTN_FUNCS.items():
        for words, named, bias in (
            ("in this process group they are", wrong((WORLD, RANK, 0, WORLD), good), None),
            (f"n_ranks, rank, prev_rank, next_rank are ({WORLD + 1}", (WORLD + 1, *good[1:]), None),
            (f"rank {last}: bias", good, wrong(x, None)),
        ):
            raises(partial(f, x, x, x, *named, bias, True, 1.0), words)
        o = f(x, x, x, *good, None, True, 1.0)
        assert o.isfinite().all() and o.shape == x.shape
        assert getattr(ring_attn, f"{ring_attn.public_name(schedule)}_attn_func") is f


# -----------------------------------------------------------------------------
# real rings


def check_real(ring, schedule, causal, backend, dtype, B, T, H, HKV, D):
    """A real ring against the truth, and against a virtual ring, whose bits must be the same."""
    B, T = fit(schedule, B, T)
    inputs = make(B, ring.n_ranks * T, H, HKV, D, dtype, seed=T)
    mine = (shard(x, schedule, ring.rank, ring.n_ranks) for x in inputs)
    o, lse, *grads = run(*mine, schedule, ring, causal, backend)
    o, lse, *grads = (unshard(x, schedule, ring) for x in (o, lse.transpose(1, 2), *grads))
    joined = o, lse.transpose(1, 2), *grads
    virtual = run(*inputs, schedule, VirtualRing(ring.n_ranks), causal, backend)
    same_bits(joined, virtual)
    return judge(joined, *inputs, causal)


@real(name="one Ring per group")
def check_one_ring(ring):
    """Whatever the transport of a call; it takes p2p for any."""
    inputs = make(2, 16, 2, 2, 16, f32, seed=RANK)
    same_bits(run(*inputs, "zigzag", ring), run(*inputs, "zigzag", ring, transport="p2p"))
    for group in (ring.group, ring):
        assert ring_attn.resolve_ring(group) is ring


def check_transports(ring, schedule, causal):
    """Both transports give the same bits, forward and backward; and so does a checkpointed forward."""
    for dtype, H, HKV, D in ((bf16, 6, 2, 64), (f32, 2, 2, 40)):
        inputs = make(*fit(schedule, 2, 1000), H, HKV, D, dtype, seed=RANK)
        p2p, symmetric = (run(*inputs, schedule, ring, causal, transport=t) for t in ("p2p", "symmetric"))
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        options = dict(schedule=schedule, group=ring, causal=causal, transport="symmetric")
        o = checkpoint(partial(ring_attn.ring_attn, **options), *leaves, use_reentrant=False)
        same_bits(p2p, symmetric)
        again = o.detach(), *torch.autograd.grad(o, leaves, inputs[3])
        same_bits(again, (symmetric[0], *symmetric[2:]))
    assert ring.transport == "symmetric", f"the ring chose {ring.transport}: {ring.why}"


def check_other_device(ring, schedule):
    """Tensors on this rank's GPU while another one is the current device."""
    other = torch.device("cuda", (DEVICE.index + 1) % torch.cuda.device_count())
    # larger than what other cases have made room for: the ring has to make its memory then
    inputs = make(1, 4096, 4, 4, 128, bf16, seed=RANK)
    with torch.cuda.device(other):
        there = run(*inputs, schedule, ring)
    same_bits(there, run(*inputs, schedule, ring))


def check_reuse(ring, times=1000):
    """Symmetric memory, one call after another: other inputs, schedules and masks, on two streams without an
    order, kernels and copies held up at random; every result checked."""
    together, own = random.Random(0), random.Random(RANK)
    inputs = [make(2, 256, 4, 2, 64, bf16, seed=100 * RANK + i) for i in range(4)]
    fitting = [s for s in SCHEDULES if fit(s, 2, 256) == (2, 256)]
    masks = dict(causal=dict(causal=True), full=dict(causal=False), window=dict(causal=True, window=60))
    kinds = list(product(range(4), fitting, masks))
    truth = {(i, s, m): run(*inputs[i], s, ring, transport="p2p", **masks[m]) for i, s, m in kinds}
    run(*inputs[0], "zigzag", ring, transport="symmetric")
    streams, wrong = [torch.cuda.Stream(), torch.cuda.Stream()], zeros(2)
    torch.cuda.synchronize()
    with without_fill():
        for _ in range(times):
            (n, schedule, mask), i = together.choice(kinds), together.randrange(2)
            for stream in (streams[i], ring.memory.copy_stream.stream):
                if own.random() < 0.3:
                    with torch.cuda.stream(stream):
                        torch.cuda._sleep(own.randrange(300_000))
            with torch.cuda.stream(streams[i]):
                got = run(*inputs[n], schedule, ring, transport="symmetric", **masks[mask])
                for a, b in zip(got, truth[n, schedule, mask]):
                    wrong[i] += (a != b).any()
    torch.cuda.synchronize()
    assert not wrong.any(), f"{wrong.sum():.0f} of {5 * times} results are wrong"
    assert not ring.memory.local[:4096].any(), "a flag is left set"


def check_receive_buffers(ring, n_calls=4):
    """merge_ranks_kernel with receive buffers in files that ranks share: the bits that merge_parts gives."""
    with shared_folder(ring) as folder:
        size = 2 * ring.n_ranks * 4 * 9  # of two receive buffers
        files = [str(folder / f"buffer {r}") for r in range(ring.n_ranks)]
        buffers = [torch.from_file(file, shared=True, size=size, dtype=i64) for file in files]
        waits, halves = torch.zeros(1, dtype=i32), [half for odd in (0, 1) for half in buffers]
        where = [buffer.data_ptr() + i // ring.n_ranks * 4 * size for i, buffer in enumerate(halves)]
        peers = torch.tensor([2**31 - 3, 0, waits.data_ptr(), 7, *where])  # epochs that overflow 32 bits
        memory = SimpleNamespace(use_peers=lambda: peers)
        among = SimpleNamespace(rank=ring.rank, n_ranks=ring.n_ranks, memory=memory)
        ring.gather(None)  # all have zeros in them
        for i in range(n_calls):
            torch.manual_seed(i)
            parts, sink = torch.randn(ring.n_ranks, (2, 1)[i % 2], 1, 2, 9), torch.randn(2) if i > 2 else None
            parts[0, 0, 0, 0, -1] = -inf
            got = decode.merged(parts[ring.rank, None], sink, f32, among)
            same_bits(got, decode.merged(parts, sink, f32))
            assert peers[:2].tolist() == [2**31 - 2 + i, 0] and waits == 0
        ring.gather(None)  # all have read them


def check_sent_parts(ring, times=300):
    """sharded_decode_attn through symmetric memory in any order of shapes, on two streams, ranks late at
    random, and as a CUDA graph between eager calls: the bits that an all-gather gives."""
    own, together = random.Random(RANK), random.Random(0)

    def decoding(seed, B, M, H, D, N):
        g = torch.Generator(DEVICE).manual_seed(seed)
        draw = partial(torch.randn, generator=g, device=DEVICE)
        q, kv = draw(B, M, H, D), [draw(B, N, 2, D) for _ in range(2)]
        kv = [stripe(x, ring.rank, ring.n_ranks).to(bf16) for x in kv]
        return partial(sharded_decode_attn, q.to(bf16), *kv, group=ring, return_lse=True)

    shapes = (1, 1, 8, 128, 3000), (40, 2, 16, 64, 100), (3, 1, 4, 96, 700), (2, 5, 2, 256, 90)
    calls = [decoding(i, *shape) for i, shape in enumerate(shapes)]
    truth = []
    for call in calls:
        call()  # makes the memory
        memory, ring.memory = ring.memory, None
        truth.append(call())
        ring.memory = memory
    assert memory is not None, ring.why
    replay, replayed = decode.capture(calls[0])
    streams, wrong = [torch.cuda.Stream(), torch.cuda.Stream()], zeros(2)
    torch.cuda.synchronize()
    for n in range(times):
        if n % 50 == 0:
            torch.cuda.synchronize()
            replay()
            torch.cuda.synchronize()
            same_bits(replayed, truth[0])
        case, i = together.randrange(len(calls)), together.randrange(2)
        with torch.cuda.stream(streams[i]):
            if own.random() < 0.3:
                torch.cuda._sleep(own.randrange(300_000))
            for a, b in zip(calls[case](), truth[case]):
                wrong[i] += (a != b).any()
    torch.cuda.synchronize()
    assert not wrong.any(), f"{wrong.sum():.0f} of {2 * times} results are wrong"


def check_ring_graph(ring, packed):
    """A ring over symmetric memory as a CUDA graph, replayed on other inputs, with eager calls in between.
    packed: documents, also other ones in each replay."""
    inputs = [make(2, 256, 4, 2, 64, bf16, seed=100 * RANK + i) for i in range(3)]
    for i, x in enumerate(inputs if packed else ()):
        S = 256 * ring.n_ranks
        x.append(torch.tensor([0, 9 + 90 * i, S - 99 * i, S], dtype=i32, device=DEVICE))
    static = [x.clone() for x in inputs[0]]

    def call(q, k, v, do, cu_seqlens=None):
        return run(q, k, v, do, "zigzag", ring, cu_seqlens=cu_seqlens, window=200 if packed else None)

    with without_fill():
        truth = [call(*x) for x in inputs]
        replay, results = decode.capture(lambda: call(*static), warm_up=False)
        for i in (0, 1, 2, 1) * 5:
            for x, new in zip(static, inputs[i]):
                x.copy_(new)
            replay()
            eager = call(*inputs[i])
            replay()
            same_bits(results, truth[i])
            same_bits(eager, truth[i])


def check_launches_on_ring(ring, schedule):
    """Forward: a kernel for each hop that has something to do. Backward: on Hopper one for each, one before
    and one after; elsewhere two for each, and one before."""
    from torch.profiler import ProfilerActivity, profile

    B, T = fit(schedule, 2, 512)
    q, k, v, do = make(B, T, 4, 2, 128, bf16, seed=RANK)
    leaves, mask = [x.requires_grad_() for x in (q, k, v)], ring_attn.make_mask(ring.n_ranks * T)
    visible = sum(hop.visible for hop in plan(schedule, ring.rank, ring.n_ranks, T, mask, 1))

    def forward(*tensors):
        return ring_attn.ring_attn(*tensors, schedule, ring)

    def forward_backward():
        return torch.autograd.grad(forward(*leaves), leaves, do)

    detached = [x.detach() for x in leaves]
    both = 2 * visible + 2 if ring_attn.best_backend(q) == "gluon" else 3 * visible + 1
    with without_fill():
        for call, n_kernels in ((lambda: forward(*detached), visible), (forward_backward, both)):
            call(), torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
                call(), torch.cuda.synchronize()
            on_gpu = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            names = [name for name in on_gpu if not name.startswith("Mem")]
            assert len(names) == n_kernels, names


@real(name="which transport, and why")
def check_choice(ring):
    def gpu(i, **changed):
        reads = {f"gpu{j}": True for j in range(4) if j != i}
        return dict(lacks=None, host="a", gpu=f"gpu{i}", reads=reads) | changed

    blind = {f"gpu{j}": False for j in range(4)}
    for facts, expected, words in (
        ([gpu(0), gpu(1)], "symmetric", ""),
        ([gpu(0, reads={}), gpu(1, reads={})], "symmetric", ""),  # hidden from each other's processes
        ([gpu(0), gpu(0, host="b")], "p2p", "2 hosts"),
        ([gpu(0), gpu(0)], "p2p", "share a GPU"),
        ([gpu(0), gpu(1, reads=blind)], "p2p", "GPU of rank 1 cannot read that of rank 0"),
        ([gpu(0), gpu(1, lacks="no driver")], "p2p", "no driver"),
        ([ring_attn.transport_facts(torch.device("cpu"))] * 2, "p2p", "CPU"),
    ):
        chosen, why = ring_attn.choose_transport(facts)
        assert chosen == expected and words in (why or "")
    q = torch.randn(1, 8, 2, 16)

    def attn(q=q, **options):
        return ring_attn.ring_attn(q, q, q, "striped", backend="torch", **options)

    words, pigeon, refused = ("carrier pigeon", "p2p", "symmetric"), "carrier pigeon", partial(raises, attn)
    refused(*words, group=alone(), transport=pigeon)
    raises(lambda: ring_attn.keys_moved("zigzag", 4, 512, transport=pigeon), *words)
    refused("p2p", "VirtualRing", "leave it out", group=VirtualRing(2), transport="p2p")
    if WORLD > 1 and not GPU:
        refused("symmetric", "CPU", "p2p", group=ring, transport="symmetric")
        attn(group=ring)
        assert ring.transport == "p2p" and "CPU" in ring.why
        new = torch.randn(1, 12, 2, 16)  # a shape of which nothing was agreed yet
        refused("disagree", "transport", q=new, group=ring, transport="p2p" if RANK else None)


@local
def a_GPU_that_waits_for_ever_ends_its_process():
    """One watchdog, two waiters: it is quiet while what they wait for changes, and names what is stuck."""
    said, ended, waiters = io.StringIO(), threading.Event(), []
    for reason in (("keys", 1, 3), ("gradients", 2, 5)):
        waiters.append(ring_attn.Waiter.__new__(ring_attn.Waiter))
        number = ctypes.c_int32(0)  # which a GPU writes
        known = dict(ring=ring_attn.Ring(), reasons=[None, reason], number=number)
        vars(waiters[-1]).update(known, seen=0, since=time.monotonic(), timeout=1.0)

    def leave(code):
        ended.set()
        raise SystemExit(code)

    with replaced(os, "_exit", leave), contextlib.redirect_stderr(said):
        watchdog = ring_attn.Watchdog()
        watchdog.waiters.update(waiters)
        for _ in range(25):  # waits, each of them answered
            for value, seconds in ((1, 0.02), (0, 0.06)):
                for waiter in waiters:
                    waiter.number.value = value
                time.sleep(seconds)
        assert not ended.is_set(), "it ends a process whose waits are answered"
        waiters[1].number.value = 1
        assert ended.wait(10), "it lets a process wait for ever"
    said = said.getvalue()
    assert "at hop 2 of" in said and "for gradients from rank 5" in said and "rank 3" not in said, said


LOST_RANK = """
import os, sys, time, torch, torch.distributed as dist, ring_attn, decode
from datetime import timedelta
rank, (how, transport) = int(os.environ["RANK"]), sys.argv[1:]
gpu = torch.cuda.is_available()
device = torch.device("cuda", rank) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=6))
x = torch.randn(1, 64, 2, 16, device=device, dtype=torch.float16 if gpu else torch.float32).requires_grad_()
def attn():
    return ring_attn.ring_attn(x, x, x, "zigzag", transport=transport)

def decoded():
    with torch.no_grad():
        return decode.sharded_decode_attn(x[:, :1], x, x)

if transport == "decode":
    decoded()
else:
    attn().sum().backward()
    o = attn()
if rank == 1:
    time.sleep(0.5)
    os._exit(0) if how == "dies" else time.sleep(100)
decoded() if transport == "decode" else o.sum().backward()
if gpu:
    torch.cuda.synchronize()
print("it went on without rank 1")
"""


def check_lost_rank(how, transport):
    """Rank 1 dies, or does not call the backward: rank 0 must end in time and name the ring, hop and rank."""
    (done,) = call_scripts(("-c", LOST_RANK, how, transport), n_ranks=2, timeout=90)
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -signal.SIGALRM) and "it went on" not in said, said[-500:]
    for words in ("processes [0, 1]", "at hop 1 of 1", "from rank 1"):
        assert words in said, said[-1500:]


ENDS = """
import gc, sys, weakref, torch, torch.distributed as dist, ring_attn
from model import Attention, AttentionType
dist.init_process_group("gloo")
rank, n_ranks = dist.get_rank(), dist.get_world_size()
subgroup = dist.new_group(range(n_ranks))
x = torch.randn(2, 16, 2, 16).requires_grad_()
for schedule in ring_attn.SCHEDULES:
    for group in (None, subgroup):
        o = ring_attn.ring_attn(x, x, x, schedule, group)
        ring_attn.unshard(o, schedule, group).sum().backward()
attn = Attention(32, 16, 16 * n_ranks, rank, n_ranks, 0.0, True, AttentionType.ZIGZAG)
attn.unshard(attn(attn.shard(torch.randn(2, 16 * n_ranks, 32)))).sum().backward()
groups = [weakref.ref(dist.group.WORLD), weakref.ref(subgroup)]
dist.destroy_process_group()
del o, group, subgroup
gc.collect()
if any(group() is not None for group in groups):
    print("a ring keeps its group")
    sys.exit(2)
"""


@local(name="scripts end with destroy_process_group")
def check_script_ends():
    """A script that ends with destroy_process_group exits with 0 every time; no ring keeps a group alive."""
    with shared_folder(alone()) as folder:
        (folder / "ends.py").write_text(ENDS)
        for done in call_scripts(*[(str(folder / "ends.py"),)] * 3, n_ranks=4):
            ended_well(done)


def check_unshard(ring, schedule):
    n_ranks, (B, T) = ring.n_ranks, fit(schedule, 2, 6)
    x = torch.randn(B, n_ranks * T, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    y = unshard(shard(x, schedule, ring.rank, n_ranks), schedule, ring)
    assert torch.equal(x, y)
    (grad,) = torch.autograd.grad((y * x.detach()).sum(), x)
    if n_ranks > 1:
        dist.all_reduce(grad)
        mine = shard(x, schedule, ring.rank, n_ranks).detach().requires_grad_()
        (again,) = torch.autograd.grad(unshard(mine, schedule, ring).square().sum(), mine, create_graph=True)
        raises(lambda: again.sum().backward(), "second derivative", kind=RuntimeError)
    assert torch.equal(grad, x.detach())


def check_attention(ring, kind, masked):
    """Attention under every type: outputs and gradients of the same weights as under SDPA on one process.
    masked: a window, sinks, documents, and a length that no schedule divides."""
    torch.manual_seed(0)
    n_ranks, S = ring.n_ranks, 24 * ring.n_ranks - 3 * masked
    args = 64, 16, S, ring.rank, n_ranks, 0.0, True, AttentionType.SDPA
    options = dict(window=20, sinks=True) if masked else {}
    attn = Attention(*args, n_kv_heads=2, rope_theta=1e4, group=ring, **options).to(DEVICE)
    cu_seqlens = torch.tensor([[0, 9, S], [0, S, S]], dtype=i32) if masked else None
    if masked:
        attn.sinks.data = randn(4)
    x, dy = randn(2, 2, S, 64).unbind()
    results = []
    for attn.attn_type in (AttentionType.SDPA, kind):
        leaf = x.clone().requires_grad_()
        y = attn.unshard(attn(attn.shard(leaf), cu_seqlens=cu_seqlens))[:, :S]
        grads = [x.contiguous() for x in torch.autograd.grad(y, (leaf, *attn.parameters()), dy)]
        if attn.attn_type.is_ring and n_ranks > 1:
            for grad in grads:
                dist.all_reduce(grad, group=ring.group)
        results.append((y, *grads))
    names = "y", "dx", *(f"d{name.split('.')[0]}" for name, _ in attn.named_parameters())
    return compare(names, *results, 1e-4)


def small_model(ring, T, kind=AttentionType.ZIGZAG, **options):
    """A Transformer for sequences of T tokens a rank."""
    torch.manual_seed(0)
    config = Config(n_layers=2, dim=32, dim_per_head=16, n_kv_heads=1, seq_len=T * ring.n_ranks)
    return Transformer(config, ring.rank, ring.n_ranks, kind, **dict(group=ring) | options).to(DEVICE)


def check_compiled_model(ring, kind, autocast):
    """A compiled Transformer, in one graph, equals the eager one: loss and gradients."""
    model = small_model(ring, 16, kind)
    text = torch.randint(256, (2, 2, 16 * ring.n_ranks), device=DEVICE)
    tokens, targets = (model.blocks[0].attn.shard(x) for x in text)
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    results, low = [], f16 if ring_attn.INTERPRET else bf16
    # what runs in the operator does not concern a graph: the interpreter, which is slow, on one process only
    with on_torch_path() if ring.n_ranks > 1 else contextlib.nullcontext():
        for f in (model, compiled, compiled):
            with torch.autocast(DEVICE.type, low, enabled=autocast):
                loss = f(tokens, targets)
            results.append([loss, *torch.autograd.grad(loss, model.parameters())])
    bound = 5e-2 if autocast else 1e-4
    errors = [error(a, b) / max(1e-3, b.abs().max().item()) for a, b in zip(results[-1], results[0])]
    return worst([("loss, grad", x, bound) for x in errors])


if ring_attn.INTERPRET:  # GPUs have symmetric memory: check_sent_parts
    real(check_receive_buffers, "ranks send their parts", ring=min(WORLD, 2))
for how in ("dies", "is stuck"):
    if GPU:  # it takes two of the GPUs: the other processes wait
        for transport in ("p2p", "symmetric", "decode"):
            lost = partial(check_lost_rank, how.split()[-1], transport)
            real(lambda ring, lost=lost: None if RANK else lost(), f"a rank {how}, {transport}", ranks=2)
    else:
        local(check_lost_rank, f"a rank {how}, p2p", how.split()[-1], "p2p")
for n_ranks in (2, 4, 8):
    on = dict(ring=n_ranks, needs="GPU")
    for schedule, causal in product(SCHEDULES, (True, False)):
        name = f"transports, same bits: {schedule} x{n_ranks} {'causal' if causal else 'full'}"
        real(check_transports, name, schedule, causal, **on)
    real(check_reuse, f"symmetric memory, 1000 calls x{n_ranks}", **on)
    real(check_sent_parts, f"sharded decode through symmetric memory x{n_ranks}", **on)
    real(check_ring_graph, f"symmetric memory in a CUDA graph x{n_ranks}", False, **on)
    real(check_ring_graph, f"documents in a CUDA graph x{n_ranks}", True, **on)
real(check_other_device, "tensors on another GPU than the current one x2", "zigzag", ring=2, needs="GPU")
for n_ranks, schedule in product((1, 2, 4), SCHEDULES):
    real(check_launches_on_ring, f"launches: {schedule} x{n_ranks}", schedule, ring=n_ranks, needs="GPU")
SIZES = sorted({1, 2, WORLD})
MODEL_SIZES = SIZES if GPU else SIZES[:2]  # of whole models: four processes on two cores take long
for schedule in SCHEDULES:
    real(check_unshard, f"unshard(shard(x)) is x, {schedule} x{WORLD}", schedule)
for schedule, causal, n_ranks in product(SCHEDULES, (True, False), SIZES):
    name, args = f"real ring {schedule} x{n_ranks} {'causal' if causal else 'full'}", (schedule, causal)
    if GPU:
        for T, D, H, HKV in ((1000, 80, 6, 2), (1024, 128, 8, 2), (1024, 64, 4, 4)):
            shape = bf16, 2, T, H, HKV, D
            real(check_real, f"{name} T{T} D{D} bfloat16", *args, None, *shape, ring=n_ranks)
    else:
        args += "torch", f32, 2, 20, 6, 2, 24
        real(check_real, f"{name} torch float32", *args, ring=n_ranks)
        if causal and n_ranks < 4:
            args = schedule, causal, "triton", f16, 1, 10, 2, 1, 16
            real(check_real, f"{name} triton float16", *args, ring=n_ranks)
for n_ranks in SIZES:
    for backend in ("triton",) if GPU or n_ranks > 2 else ("torch", "triton"):
        name, long = f"sharded decode {backend} x{n_ranks}", 203 if GPU or backend == "torch" else 70
        real(check_sharded, name, backend, LOW_DECODE, 3, 4, 2, 32, (long, 1, 0), ring=n_ranks)
        shape = backend, f32, 1, 2, 1, 32, (long, 1)
        real(check_sharded, f"{name} window and sink tokens", *shape, window=60, sink=4, ring=n_ranks)
for n_ranks in MODEL_SIZES:
    for kind in (t for t in AttentionType if t is not AttentionType.SDPA):
        real(check_attention, f"Attention {kind.name} x{n_ranks} equals SDPA", kind, False, ring=n_ranks)
        real(check_attention, f"Attention {kind.name} x{n_ranks} with masks", kind, True, ring=n_ranks)
    flash, zigzag = AttentionType.FLASH, AttentionType.ZIGZAG
    for kind, autocast in ((zigzag, True), (zigzag, False)) if n_ranks > 1 else ((flash, False),):
        name = f"compiled {kind.name} x{n_ranks}{' autocast' * autocast} equals eager"
        real(check_compiled_model, name, kind, autocast, ring=n_ranks)
    kind = flash if n_ranks == 1 else AttentionType.STRIPED
    name = f"a model decodes through its cache x{n_ranks}"
    real(check_stream, name, kind, ring=n_ranks)
    options = dict(window=13, sinks=True)
    real(check_stream, f"{name}, window and sinks", kind, ring=n_ranks, **options)
    real(check_stream, f"{name}, window, sinks, softcap", kind, ring=n_ranks, softcap=2.0, **options)
    name = f"a model decodes ragged batches x{n_ranks}"
    real(check_ragged, name, kind, ring=n_ranks)
    real(check_ragged, f"{name}, float8", kind, decode.FLOAT8, ring=n_ranks)
    real(check_ragged, f"{name}, window and sinks", kind, ring=n_ranks, **options)

# -----------------------------------------------------------------------------
# training

MODEL = "--seq_len=128 --batch_size=4 --n_layers=2 --dim=64 --dim_per_head=16 --n_kv_heads=2".split()
MODEL += "--dtype=float32 --warmup=4 --lr=3e-3 --sample_tokens=0".split()
STEPS = 20 if GPU else 12
TINY = [*MODEL, f"--steps={STEPS}", "--eval_batches=2", "--log_every=20"]


def trained(ring, out, *flags, tiny=TINY):
    """train.train in the run folder `out`, on the text beside it: (losses, validation loss)."""
    args = train.parse([f"--out={out}", *(tiny and [f"--data={out.parent / 'text'}", *tiny]), *flags])
    with on_torch_path(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        return train.train(args, ring)


def resumed(ring, out, *flags):
    """As `trained`, going on with the flags that the run was started with."""
    return trained(ring, out, "--resume", *flags, tiny=())


def apart(name, got, expected):
    """Rows of two trainings: losses, validation loss."""
    losses = max(abs(a - b) for a, b in zip(got[0], expected[0], strict=True))
    return [(name, losses, 1e-4), (name, abs(got[1] - expected[1]), 1e-4)]


@functools.lru_cache
def trained_alone(batch_size, *flags):
    """What every split of the same batches must find: SDPA, which has no softcap, on one process."""
    schedule = "flash" if any("--softcap" in flag for flag in flags) else "sdpa"
    with shared_folder(alone()) as folder:
        flags = *with_files(alone(), folder, flags), f"--batch_size={batch_size}", f"--schedule={schedule}"
        return trained(alone(), folder / "run", *flags)


def with_files(ring, folder, flags):
    """flags; if --documents is one, and --data: the text of the folder in many files."""
    if "--documents" not in flags:
        return flags
    if ring.rank == 0:
        (folder / "files").mkdir()
        rng, text = random.Random(0), (folder / "text").read_text()
        for i in range(200):
            (folder / "files" / f"{i:03}").write_text(text[: rng.randint(0, 400)])
            text = text[400:] or text
    ring.gather(None)  # they are there
    return *flags, f"--data={folder / 'files'}"


def check_train(ring, schedule, *flags):
    """The steps on a ring equal those under SDPA on one process, and on GPUs those over p2p; with a resume
    half way they are the same, to the last bit."""
    expected = trained_alone(4, *flags)
    with shared_folder(ring) as folder:
        flags = *with_files(ring, folder, flags), f"--schedule={schedule}"
        losses, val = trained(ring, folder / "run", *flags)
        trained(ring, folder / "parts", *flags, f"--stop_after={STEPS // 2}")
        tail, _ = resumed(ring, folder / "parts")
        rows = apart("loss", (losses, val), expected)
        if GPU and ring.n_ranks > 1:
            rows += apart("p2p", trained(ring, folder / "p2p", *flags, "--transport=p2p"), expected)
    # on CUDA the embedding's gradient adds in any order
    assert GPU or tail == losses[STEPS // 2 :]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5, "it does not learn"
    return worst(rows)


def tensors_of(folder):
    """Weights and moments of the last checkpoint, in order."""
    state = torch.load(train.checkpoints(folder)[0], weights_only=True)
    moments = [x for _, values in sorted(state["optimizer"]["state"].items()) for x in values.values()]
    return [x for x in [*state["model"].values(), *moments] if isinstance(x, torch.Tensor)]


@real(name="train on meshes, micro batches and shards equals train x1")
def check_meshes(ring):
    """A sharded run resumes to the bit, and on one process."""
    steps, batch = 6, "--batch_size=8"
    expected = trained_alone(8, f"--steps={steps}")
    splits = {f"{WORLD // R}x{R}": [f"--ring_size={R}"] for R in (1, 2, 4, 8) if WORLD % R == 0}
    two = math.gcd(WORLD, 2)
    # step wants two sequences in each ring
    splits["step"] = ["--schedule=step", f"--ring_size={max(two, WORLD // 2)}", "--accumulate=2"]
    memory = splits["fsdp"] = [f"--ring_size={two}", "--fsdp", "--checkpoint", "--accumulate=2"]
    rows = []
    with shared_folder(ring) as folder:
        for name, split in splits.items():
            losses, val = trained(None, folder / name, batch, f"--steps={steps}", *split)
            rows += apart(name, (losses, val), expected)
        trained(None, folder / "parts", batch, f"--steps={steps}", *memory, f"--stop_after={steps // 2}")
        own = folder / f"alone{RANK}"
        shutil.copytree(folder / "parts", own)
        ring.gather(None)  # all have copied it
        tail, _ = resumed(None, folder / "parts")
        if not GPU:
            assert tail == losses[steps // 2 :]
            same_bits(tensors_of(folder / "parts"), tensors_of(folder / "fsdp"))
        rows += apart("alone", resumed(alone(), own), (expected[0][steps // 2 :], expected[1]))
    return worst(rows)


@real(name="train recomputes layers, not exchanges")
@on_torch_path()
def check_train_memory(ring):
    """Activation checkpointing and losses in pieces: the same gradients to the bit, and no exchange more."""
    # over symmetric memory there is nothing to count
    model = small_model(ring, 32, transport="p2p" if ring.n_ranks > 1 else None)
    tokens, targets = torch.randint(256, (2, 2, 32), device=DEVICE)
    results, counts, most = [], [], []

    def exchange_spy(*args):
        counts[-1] += 1
        return exchange(*args)

    def logits_spy(x, targets):
        most[-1] = max(most[-1], len(targets))
        return token_losses(x, targets)

    model(tokens, targets)  # what ranks agree upon the first time is not counted
    with (
        replaced(ring, "exchange", exchange_spy) as exchange,
        replaced(model, "token_losses", logits_spy) as token_losses,
    ):
        for saving, logits in ((False, 2**22), (True, 2**22), (True, 10 * 256)):
            counts.append(0), most.append(0)
            for block in model.blocks:
                block.checkpoint = saving
            with replaced(model_file, "LOGITS", logits):
                loss = model(tokens, targets)
                results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert counts[0] == counts[1] == counts[2]
    assert ring.n_ranks == 1 or counts[0] > 0
    assert most == [64, 64, 10]  # tokens whose logits exist at once
    if not GPU:
        same_bits(results[0], results[1])
    return compare(["grad"] * len(results[0]), results[0], results[2], 1e-5)


@real(name="train leaves out targets of -100")
def check_ignored_targets(ring):
    """Training and evaluation divide by the targets that count, over all ranks and micro batches; a rank that
    has none adds 0."""
    torch.manual_seed(0)
    model = Transformer(Config(n_layers=1, dim=32, dim_per_head=16, rope_theta=None))  # no rotary embedding
    tokens, targets = torch.randint(256, (2, 2, 16))
    targets[:, 5:] = -100
    with on_torch_path():
        truth = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        assert abs(model(tokens, targets) - truth) < 1e-5, "the mean counts targets of -100"

    def masked(text, start, pos, *args):
        tokens, targets, cu_seqlens = get_batch(text, start, pos, *args)
        targets[torch.as_tensor(pos < 70, device=targets.device)] = -100
        return tokens, targets, cu_seqlens

    with shared_folder(ring) as folder, replaced(train, "get_batch", masked) as get_batch:
        flags = "--stop_after=8", "--eval_every=8"
        expected = trained(alone(), folder / f"alone{RANK}", *flags, "--schedule=sdpa")
        got = trained(ring, folder / "ring", *flags, "--schedule=contiguous", "--accumulate=2")
    return worst(apart("loss", got, expected))


@real(ranks=2)
@on_torch_path()
def copies_of_a_model_on_a_ring(ring):
    """deepcopy, AveragedModel and torch.save of a model on a ring: the copies give the same logits."""
    model = small_model(ring, 16, group=ring.group)
    tokens, file = torch.randint(256, (2, 16), device=DEVICE), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module, loaded):
        assert torch.equal(model(tokens), other(tokens))


@real(name="train's checkpoints: truncated, foreign, full disk", ring=min(WORLD, 2))
def check_run_folder(ring):
    """The newest whole checkpoint is taken, and log.txt says why others are not; --keep; a full disk."""
    with shared_folder(ring) as folder:
        out = folder / "run"
        all_steps, _ = trained(ring, folder / "whole", "--steps=20", "--log_every=4")
        trained(ring, out, "--steps=20", "--save_every=4", "--keep=3", "--stop_after=14", "--log_every=4")
        kept = [f.name for f in train.checkpoints(out)]
        assert kept == [f"ckpt-{n:08}.pt" for n in (14, 12, 8)]
        ring.gather(None)  # all have looked
        if ring.rank == 0:
            last = out / "ckpt-00000014.pt"
            last.write_bytes(last.read_bytes()[:-100])
            (out / "ckpt-00000016.pt").write_text("a letter")
            (out / "ckpt.tmp").write_text("of a run that was killed")
        ring.gather(None)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))  # as if the disk were full then
        try:
            words = "ckpt-00000013.pt: [Errno 27] File too large", "MiB are free", "ckpt-00000012.pt is whole"
            raises(lambda: resumed(ring, out, "--stop_after=13"), "cannot write", *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        tail, _ = resumed(ring, out)
        assert GPU or tail == all_steps[12:]
        if ring.rank == 0:
            said = (out / "log.txt").read_text()
            opening = f"==== train.py\n{Path(train.__file__).read_text()}==== model.py\n"
            assert said.startswith(opening) and said.count(opening) == 1
            words = ["ckpt-00000014.pt is not a checkpoint of train.py, or not a whole one"]
            words += ["ckpt-00000016.pt is not", "resumed at step 12", "commit ", "train.py "]
            missing = [text for text in (*words, "loss by position") if text not in said]
            assert not missing
            files = [f / "metrics.csv" for f in (folder / "whole", out)]
            tables = [[line.split(",") for line in file.read_text().splitlines()] for file in files]
            steps = [" ".join(row[0] for row in table if row[1]) for table in tables]
            assert steps == ["step 1 4 8 12 16 20", "step 1 4 8 12 13 16 20"]
            ends = [table[-2][:2] for table in tables]
            assert GPU or ends == [["20", repr(all_steps[-1])]] * 2
            tags = ElementTree.parse(out / "curve.svg").getroot()
            dots = [x.get("fill") for x in tags if x.tag.endswith("rect") and x.get("height") == "4.00"]
            assert dots.count(train.GREEN) == 7  # of tokens/s


@real(ring=min(WORLD, 2))
def train_stops_at_signals_and_at_nan(ring):
    """A signal to one rank: all save the same step and return. Something not finite on one rank: all raise,
    the last checkpoint stays."""
    numbers, bad, steps = (signal.SIGTERM, signal.SIGINT), ring.n_ranks - 1, itertools.count()

    def broken(self, tokens, *args, **options):  # the 7th call of a training step
        loss = forward(self, tokens, *args, **options)
        return loss * (nan if self.training and next(steps) == 6 and ring.rank == bad else 1.0)

    with shared_folder(ring) as folder:
        undisturbed, _ = trained(ring, folder / "whole")
        for number in numbers:
            out = folder / number.name

            def rate(step, args, number=number):
                if step == 6 and ring.rank == bad:
                    os.kill(os.getpid(), number)
                return learning_rate(step, args)

            own = {n: lambda *_: None for n in numbers}
            before = {n: signal.signal(n, handler) for n, handler in own.items()}
            try:
                with replaced(train, "learning_rate", rate) as learning_rate:
                    losses, _ = trained(ring, out)
                after = {n: signal.getsignal(n) for n in numbers}
            finally:
                for n, handler in before.items():
                    signal.signal(n, handler)
            assert after == own, "the handlers of before are not back"
            # on a GPU the host reads what a step reported when the next one is on its way
            assert len(losses) == 7 + GPU and len(train.checkpoints(out)) == 1
            tail, _ = trained(ring, out, "--resume")
            assert GPU or losses + tail == undisturbed
        out, last = folder / "nan", "ckpt-00000006.pt is the last good"
        words = "step 7", f"loss of rank {bad}", "begin at bytes [", "text", last
        with replaced(Transformer, "forward", broken) as forward:
            raises(lambda: trained(ring, out, "--save_every=3"), *words)
        tensors = tensors_of(out)
        assert tensors and all(x.isfinite().all() for x in tensors)
        flags = "--lr=1e30", "--warmup=0"
        raises(lambda: trained(ring, folder / "inf", *flags), "is not finite", "no checkpoint")


@real
def train_refuses_bad_input(ring):
    with shared_folder(ring) as folder:
        short, empty, blank, out = (folder / name for name in ("short", "empty", "blank", "a"))

        def refused(flags, *words):
            raises(lambda: trained(ring, out, *flags.split()), *words)

        if RANK == 0:
            short.write_bytes(b"x" * 100), empty.write_bytes(b""), blank.mkdir()
        ring.gather(None)
        refused(f"--data={folder / 'missing'}", "missing", "does not exist")
        refused(f"--data={empty}", "is empty")
        refused(f"--data={blank}", "holds no files")
        refused(f"--data={short}", "100 bytes", "129")
        refused("--resume", "no checkpoint in", "/a;")
        wrong = "--steps=0 --seed=-1 --lr=nan --lr=inf --lr=0.0 --keep=0 --clip=nan --weight_decay=nan"
        for flag in (*wrong.split(), "--temperature=inf", "--top_k=0", "--dropout=nan", "--window=0"):
            refused(flag, flag)
        refused("--accumulate=3", "--batch_size=4", "--accumulate=3", "use 6")
        assert not out.exists(), "a refused run left a folder behind"
        if WORLD > 1:
            size = f"--ring_size={WORLD + 1}"
            refused("--schedule=sdpa", "--schedule=sdpa", f"has {WORLD}")
            refused(f"--batch_size={3 + RANK // (WORLD - 1)}", "ranks disagree", "batch_size")
            refused("--schedule=step --batch_size=3", "B=3")
            refused(size, size, f"the {WORLD} processes")
            refused("--schedule=step --accumulate=4", "B=1", "--batch_size=4")
        trained(ring, out, "--stop_after=2")
        file = out / "ckpt-00000002.pt"
        saved = file.read_bytes()
        refused("", "already holds a checkpoint", "--resume")
        refused("--resume --dim=32", "dim is 64 there and 32 here")
        refused("--resume --seed=5", "seed is 0 there and 5 here")
        refused("--resume --window=5", "window is None there and 5 here")
        refused("--resume --documents", "documents is False there and True here")
        refused(f"--resume --data={train.__file__}", "not the text")
        refused("--resume --stop_after=2", "--stop_after=2", "above 2")
        assert file.read_bytes() == saved, "a refused run overwrote the checkpoint"
        for content in (saved[:1000], b""):
            ring.gather(None)
            if RANK == 0:
                file.write_bytes(content)
            ring.gather(None)
            refused("--resume", "ckpt-00000002.pt is not a checkpoint")


# a run of 30 steps that a script takes some seconds for
SMALL = MODEL + "--device=cpu --steps=30 --eval_batches=1 --log_every=1 --save_every=4 --dropout=0.1".split()


def done_steps(out):
    """The steps that log.txt tells of, over all starts of a run."""
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    return [int(x) for x in re.findall(r"^step (\d+)/\d+ \| loss", log, re.M)]


def same_end(out, quiet):
    """Two runs must have ended with the same losses, weights and moments, bit for bit."""
    tables = ((f / "metrics.csv").read_text().splitlines() for f in (out, quiet))
    a, b = ([line.split(",")[:3] for line in table[-2:]] for table in tables)
    assert a == b
    same_bits(tensors_of(out), tensors_of(quiet))


def worker_of(launcher, rank):
    """The process id of a rank below torchrun; None while it is not there."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)


def wait_steps(n, out, processes, seconds=180):
    """Wait until log.txt has n steps, over all starts, or a process has ended; returns whether it has n."""
    limit = time.monotonic() + seconds
    while len(done_steps(out)) < n and time.monotonic() < limit and all(p.poll() is None for p in processes):
        time.sleep(0.005)
    return len(done_steps(out)) >= n


@local(name="train survives kill -9 of a rank, twice")
def check_kills(n_kills=2, n_ranks=2, flags=(), seed=0, record=lambda *_: None):
    """Random ranks die at random steps, up to three a run: torchrun starts them again. Every run ends with
    the undisturbed losses and weights, bit for bit. record(run, rank, step) is told of each kill."""
    rng, torchrun = random.Random(seed), ("-m", "torch.distributed.run", "--standalone", "--max-restarts=3")

    def start(out):
        run = f"--out={out}", f"--data={out.parent / 'text'}", *SMALL, *flags
        return start_python(f"{out}.stderr", *torchrun, f"--nproc_per_node={n_ranks}", "train.py", *run)

    with shared_folder(alone()) as folder:
        quiet, killed = folder / "quiet", []
        call = "train.py", f"--out={quiet}", f"--data={folder / 'text'}", *SMALL, *flags
        ended_well(*call_scripts(call, n_ranks=n_ranks))
        while len(killed) < n_kills:
            out = folder / f"run{len(killed)}"
            process = start(out)
            try:
                for _ in range(min(3, n_kills - len(killed))):
                    rank = rng.randrange(n_ranks)
                    wait_steps(len(done_steps(out)) + rng.randrange(1, 15), out, [process])
                    time.sleep(rng.random() * 0.05)  # anywhere in a step, or in a checkpoint
                    pid = worker_of(process.pid, rank) if process.poll() is None else None
                    if pid is None or done_steps(out)[-1] == 30:
                        break  # it had ended
                    killed.append((out.name, rank, done_steps(out)[-1]))
                    record(*killed[-1])
                    os.kill(pid, signal.SIGKILL)
                assert process.wait(120) == 0, Path(f"{out}.stderr").read_text()[-2000:]
            finally:
                process.kill(), process.wait()
            same_end(out, quiet)
            shutil.rmtree(out)


def train_process(rank, folder, *flags, before=(), **env):
    """train.py as rank `rank` of 2, without torchrun; its messages go to the file stderr{rank}."""
    env = dict(MASTER_ADDR="localhost", MASTER_PORT="29577", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1") | env
    env = user_env(**env, RANK=str(rank), WORLD_SIZE="2")
    args = "train.py", f"--out={folder / 'run'}", *flags
    return start_python(folder / f"stderr{rank}", *args, before=before, env=env)


@local
def train_names_a_rank_that_is_stopped():
    """A rank that SIGSTOP has stopped: the other ends with an error that names it."""
    with shared_folder(alone()) as folder:
        flags = f"--data={folder / 'text'}", *SMALL, "--steps=3000", "--timeout=5"
        processes = [train_process(rank, folder, *flags, MASTER_PORT="29578") for rank in (0, 1)]
        try:
            assert wait_steps(3, folder / "run", processes)
            processes[1].send_signal(signal.SIGSTOP)
            code, said = processes[0].wait(90), (folder / "stderr0").read_text()
            assert code and "[1]" in said, f"{code}: {said[-1500:]}"
        finally:
            for process in processes:
                process.kill(), process.wait()


@local(name="train.py into other outputs")
def check_output():
    """An output that is not UTF-8, and a reader that goes away."""
    with shared_folder(alone()) as folder:
        run, ascii_only = f"--out={folder / 'run'}", user_env(PYTHONIOENCODING="ascii")
        flags = f"--data={folder / 'text'}", *SMALL, "--steps=1", "--sample_tokens=60"
        ended_well(call_python("train.py", run, *flags, env=ascii_only))
        command = f"{sys.executable} train.py {run} --device=cpu --generate=ab --max_tokens=100 | head -c 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=user_env(), cwd=HERE)
        assert done.stdout == "a" and "Traceback" not in done.stderr, done.stderr[-1500:]


def no_hosts():
    """Why this machine cannot play two hosts; None if it can."""
    calls = [["ip", "netns", word, f"ring{os.getpid()}"] for word in ("add", "del")]
    try:
        failed = any([subprocess.run(call, capture_output=True).returncode for call in calls])
        return "may not make network namespaces" if failed else None
    except OSError:
        return "needs ip, of iproute2"


@local(name="train on two hosts, whose link is cut", needs=no_hosts())
def check_two_hosts():
    """Two hosts, in two network namespaces, one process each. Their link is cut: both end with an error, in
    time. They resume, and end as one host of two processes does."""
    hosts, links = ([f"{name}{os.getpid()}{x}" for x in "ab"] for name in ("ring", "v"))

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def inside(i, *words):
        ip("netns", "exec", hosts[i], "ip", *words)

    def start(i, *flags):
        network = dict(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME=links[i], TP_SOCKET_IFNAME=links[i])
        within = "ip", "netns", "exec", hosts[i]
        return train_process(i, folder, "--timeout=15", *flags, before=within, **network)

    def said(i):
        return (folder / f"stderr{i}").read_text()[-1500:]

    with shared_folder(alone()) as folder:
        processes, out, flags = [], folder / "run", (f"--data={folder / 'text'}", *SMALL)
        try:
            for name in hosts:
                ip("netns", "add", name)
            ends = [(links[i], "netns", hosts[i]) for i in (0, 1)]
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
            for i in (0, 1):
                inside(i, "addr", "add", f"10.77.0.{i + 1}/24", "dev", links[i])
                inside(i, "link", "set", links[i], "up"), inside(i, "link", "set", "lo", "up")
            processes = [start(i, *flags) for i in (0, 1)]
            assert wait_steps(9, out, processes)
            inside(1, "link", "set", links[1], "down")
            began = time.monotonic()
            codes = [p.wait(90) for p in processes]
            took = time.monotonic() - began
            assert all(codes) and took < 60, said(0) + said(1)
            assert 9 <= done_steps(out)[-1] < 30
            inside(1, "link", "set", links[1], "up")
            processes = [start(i, "--resume") for i in (0, 1)]
            codes = [p.wait(120) for p in processes]
            assert codes == [0, 0], said(0)
            ended_well(*call_scripts(("train.py", f"--out={folder / 'quiet'}", *flags), n_ranks=2))
            same_end(out, folder / "quiet")
        finally:
            for process in processes:
                process.kill(), process.wait()
            for name in hosts:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


for schedule, n_ranks in product(SCHEDULES, SIZES):
    if schedule == "zigzag" or n_ranks > 1 and n_ranks in MODEL_SIZES:  # on a ring of one all are the same
        real(check_train, f"train {schedule} x{n_ranks} equals SDPA x1, resumes", schedule, ring=n_ranks)
    if GPU or (schedule, n_ranks) in (("zigzag", 1), ("step", 2), ("striped", 2)):  # all take minutes on CPUs
        flags = "--documents", "--window=50", "--sinks", "--seq_len=125"
        real(check_train, f"train {schedule} x{n_ranks} with masks", schedule, *flags, ring=n_ranks)
    if schedule == "zigzag" and n_ranks in MODEL_SIZES:  # attention as Gemma 2 has it
        flags, name = ("--softcap=1", "--window=50"), f"train zigzag x{n_ranks} with softcap and window"
        real(check_train, name, schedule, *flags, ring=n_ranks)

# -----------------------------------------------------------------------------
# command lines, and the README


@local(name="train.py at the command line")
def check_command_line():
    calls = ["--data=/no/such/file", "--device=cpu"], ["--schedule=spiral"], ["--help"]
    missing, spiral, usage = call_scripts(*(("train.py", *flags) for flags in calls))
    command_line_error(missing, "train.py: error: --data=/no/such/file does not exist")
    command_line_error(spiral, "invalid choice")
    lines = usage.stdout.splitlines()
    assert any("--stop_after" in line for line in lines)
    height, width = len(lines), max(map(len, lines))
    assert height <= 60 and width <= 120, "--help does not fit a screen"
    code = """if True:
        import torch, train
        def f(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB.')
        train.run_script('train.py', f, 'less')"""
    (done,) = call_scripts(("-c", code))
    said = "train.py: rank 0 is out of memory; use less. CUDA out of memory. Tried to allocate 1 GiB."
    assert done.returncode == 1 and done.stderr.strip() == said, done.stderr


@local(name="train.py --generate at the command line")
def check_generate():
    """It continues a prompt from a checkpoint: on 1 and 2 processes with the same text."""
    with shared_folder(alone()) as folder:
        out = folder / "run"
        trained(alone(), out, "--stop_after=2", "--schedule=flash", "--device=cpu")
        (file,) = train.checkpoints(out)
        state = torch.load(file, weights_only=True)
        torch.save(state | dict(args=state["args"] | dict(n_kv_heads=1)), folder / "other.pt")
        (folder / "short.pt").write_bytes(file.read_bytes()[:1000])
        base = "train.py", f"--out={out}", "--generate=ab cd", "--max_tokens=30", "--device=cpu"
        bad = {
            f"--out={folder / 'other.pt'}": ("weights of another shape", "qkv_proj"),
            f"--out={folder / 'short.pt'}": ("short.pt is not a checkpoint",),
            f"--out={folder / 'none'}": ("none",),
            "--cache_tokens=34": ("5 bytes", "--cache_tokens=34"),
            "--generate=": ("the prompt has 0 bytes",),
            "--prompt_file=/no/such/file": ("/no/such/file",),
            "--temperature=-1": ("--temperature=-1",),
            "--temperature=nan": ("--temperature=nan",),
        }
        a, b, *refused = call_scripts(*((*base, flag) for flag in ("--seed=1", "--seed=2", *bad)))
        (on_two,) = call_scripts((*base, "--seed=1"), n_ranks=2)
        for done in (a, b, on_two):
            ended_well(done)
        assert a.stdout == on_two.stdout != b.stdout
        assert a.stdout.startswith("ab cd")
        assert "prefill 5 tokens" in a.stderr and "GB/s" in a.stderr, a.stderr
        for words, done in zip(bad.values(), refused, strict=True):
            command_line_error(done, *words)


@local(name="bench.py at the command line")
def check_bench():
    """Single rows of bench.py, whose last line is JSON, from which RESULTS.md and pictures are made; a filter
    that fits nothing, a part that is none and a file that is no output are told what there is."""
    single = "mask sinks", "error bf16 window 2", "decode ragged"
    on_ring = "sharded decode 2k", "error fp16 causal", "ring zigzag 16 documents", "train striped"
    on_ring += ("generate 256",)
    runs = []
    for rows, n_ranks in ((("memory 32k", "mask sinks"), 1),) if GPU else ((single, 1), (on_ring, 2)):
        filters = (f"--filter={row}" for row in rows)
        (done,) = call_scripts(("bench.py", "--quick", *filters), n_ranks=n_ranks, timeout=300)
        ended_well(done)
        *lines, last = done.stdout.strip().splitlines()
        found = json.loads(last)
        names = {line["name"] for table in found["parts"].values() for line in table["rows"]}
        assert names == set(rows) and found["n_ranks"] == n_ranks
        assert all(any(line.startswith(row) for line in lines) for row in rows)
        runs.append(found | dict(gpu=found["gpu"] or "a GPU"))
    text = bench.markdown(runs)
    assert text.count("bench.py --quick --part=") == sum(len(run["parts"]) for run in runs)
    assert "| refused" not in text  # such rows are listed below their table
    for run, table in ((run, table) for run in runs for table in run["parts"].values()):
        assert all(f"| {line['name']} |" in text for line in table["rows"])
    (whole,) = bench.joined([runs[0]] * 2)  # as of a part that was run in two pieces
    for part, table in runs[0]["parts"].items():
        assert whole["parts"][part]["rows"] == table["rows"] * 2
    with shared_folder(alone()) as folder:
        if some := [run for run in runs if bench.error_lines(run)]:
            bench.errors_figure(folder / "errors.svg", some)
            assert ElementTree.parse(folder / "errors.svg").getroot() is not None
    bad = ("--filter=nonesuch", "D64"), ("--part=nonesuch", "masks"), ("--figures", "last line")
    calls = [("bench.py", flag, *(["LICENSE"] if flag == "--figures" else [])) for flag, _ in bad]
    for done, (flag, word) in zip(call_scripts(*calls), bad, strict=True):
        command_line_error(done, flag.split("=")[0], word)


@local
def bench_refuses_wrong_results():
    """A contender whose result is wrong gets a dash, as it raises; errors as large as float8's are none."""
    true = torch.ones(8)
    bench.relative_error(true * 1.05, true)
    for factor in (1.2, math.inf, math.nan):
        raises(lambda: bench.relative_error(true * factor, true), "is wrong")


@local
def bench_on_a_ring_waits_for_no_rank():
    """Whether bits repeat takes as many calls where they differ as elsewhere. A rank that is stuck in C, such
    as one that waits for another, prints what was measured when it is interrupted."""
    calls = []
    assert not bench.same_bits(lambda: calls.append(0) or [torch.ones(1)], [torch.zeros(1)], 3)
    assert len(calls) == 3, "a rank stops where bits differ, and the others wait for it"
    code = """
import bench, ctypes, os, signal, threading
signal.signal(signal.SIGTERM, signal.default_int_handler)
bench.leave_if_stuck(dict(parts={"kernels": 1}), 0.2)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex), lock(mutex)
"""
    done = call_python("-c", code)
    assert done.returncode == 130
    assert json.loads(done.stdout.splitlines()[-1]) == {"parts": {"kernels": 1}}


@real(ranks=2)
def a_peer_that_fails_leaves_SDPA_as_it_was(ring):
    """torch's context_parallel puts a ring in SDPA's place; before torch 2.14 it stayed after an error."""
    before, kernel = F.scaled_dot_product_attention, "fa2" if GPU else "sdpa"

    def fail():
        with bench.context_parallel("allgather", kernel):
            assert F.scaled_dot_product_attention is not before
            raise ValueError("of a peer")

    raises(fail, "of a peer")
    assert F.scaled_dot_product_attention is before


@local(name="test.py at the command line")
def check_filter():
    """A filter that fits no case is an error."""
    command_line_error(*call_scripts(("test.py", "--filter=nosuch")), "no case", "nosuch")


@local
def the_README():
    """The README's Python runs as it stands, block after block; the flags of its commands and its pictures
    exist."""
    text = (HERE / "README.md").read_text()
    pictures = re.findall(r"\((assets/\w+\.svg)\)", text)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert "assets/schedules.svg" in pictures
    assert all((HERE / picture).exists() for picture in pictures)
    command = r"^(?:.*&& |    )?(?:python|torchrun|\S+=\S+ torchrun)[^#\n]*?(\w+\.py)([^#\n]*)"
    commands = re.findall(command, text.replace("\\\n", " "), re.M)
    assert {"train.py", "test.py", "bench.py"} <= {script for script, _ in commands}
    scripts = sorted({script for script, flags in commands if "--" in flags})
    helps = dict(zip(scripts, call_scripts(*((script, "--help") for script in scripts)), strict=True))
    for script, flags in commands:
        for flag in re.findall(r"--\w+", flags):
            assert flag in helps[script].stdout.split()
    assert len(blocks) >= 2
    ended_well(*call_scripts(("-c", "\n".join(blocks))))


def shaded_area(outline):
    """Of the path of a polygon: M, V and H."""
    x, y = map(float, re.match(r"M(\S+) ([\d.]+)", outline).groups())
    points = [(x, y)]
    for letter, number in re.findall(r"([VH])([\d.]+)", outline):
        x, y = (x, float(number)) if letter == "V" else (float(number), y)
        points.append((x, y))
    return abs(sum(x0 * y1 - y0 * x1 for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]))) / 2


@local(name="assets/schedules.svg")
def check_schedules_picture():
    """assets/schedules.svg, read as a picture: the colour of a strip is the rank that holds the tokens there,
    squares are as full as the share of scores that is computed. A new schedule is in what bench.py draws
    now."""
    with shared_folder(alone()) as folder, contextlib.redirect_stdout(io.StringIO()):
        bench.schedules_figure(folder)
        drawn = read_schedules(folder / "schedules.svg", list(SCHEDULES))
    shipped = read_schedules(HERE / "assets/schedules.svg", [name for name in SCHEDULES if name in KNOWN])
    return worst([drawn, shipped])


def read_schedules(path, schedules, n_ranks=4):
    colors = [bench.BLUE, bench.ORANGE, bench.GREEN, bench.PURPLE]
    tags = [(tag.tag.split("}")[1], tag.attrib, tag.text) for tag in ElementTree.parse(path).getroot()]
    names = [text for tag, attributes, text in tags if attributes.get("font-size") == "15"]
    assert names == schedules
    strips, held, rows = {}, [], []  # strips: top: [(left, right, rank)], of rectangles higher than the bars
    for tag, x, _ in tags:
        if tag == "rect" and float(x["height"]) > 25:
            edges = float(x["x"]), float(x["x"]) + float(x["width"]) + 1
            strips.setdefault(float(x["y"]), []).append((*edges, colors.index(x["fill"])))
    areas = [shaded_area(x["d"]) / 400 for tag, x, _ in tags if tag == "path" and x["d"].endswith("Z")]
    for schedule in schedules:
        n_groups, multiple, _ = SCHEDULES[schedule]
        tokens = torch.zeros(n_groups, 32 * multiple, dtype=i64)
        for rank in range(n_ranks):
            tokens.scatter_(1, positions(schedule, rank, n_ranks, 8 * multiple, n_groups), rank)
        held += tokens.tolist()
        for _, share in itertools.chain(*ring_attn.work(schedule, n_ranks, 256)):
            area, areas = sum(areas[:n_groups]) / n_groups, areas[n_groups:]
            rows.append(("area", abs(area - share), 0.04))
    assert not areas, "there are too many squares"
    assert len(strips) == len(held)
    for (top, strip), ranks in zip(sorted(strips.items()), held):
        step = 400 / len(ranks)
        centers = [16 + step * (i + 0.5) for i in range(len(ranks))]
        drawn = [[r for left, right, r in strip if left < center < right] for center in centers]
        assert drawn == [[r] for r in ranks]
    return worst(rows)


# -----------------------------------------------------------------------------
# compilation for Hopper, which needs no GPU: ptxas comes with triton


def leaves(x, *at):
    """(path, part) of all parts of nested tuples."""
    return [z for i, y in enumerate(x) for z in leaves(y, *at, i)] if isinstance(x, tuple) else [(at, x)]


def compiled(kernel, types, constants, **options):
    """(SASS, what ptxas says, registers, bytes spilled) of a kernel for capability 9.0. types: of the
    run-time arguments, by name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    values, aligned = {(names.index(name),): value for name, value in constants.items()}, {}  # by path
    for name, kind in types.items():
        for at, part in leaves(kind, names.index(name)):
            if part == "constexpr":
                values[at] = None
            elif part[0] == "*" or name.startswith("stride"):
                aligned[at] = [["tt.divisibility", 16]]
    signature = {name: types.get(name, "constexpr") for name in names}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, values, aligned)
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).with_name("backends") / "nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(done.asm["ptx"]), cubin.write_bytes(done.asm["cubin"])
        for ptxas in ("ptxas", "ptxas-blackwell"):  # the second, newer one is what triton 3.9 uses
            command = [tools / ptxas, "-v", "-arch=sm_90a", ptx, "-o", Path(folder, "again.cubin")]
            again = subprocess.run(command, capture_output=True, text=True)
            if again.returncode == 0:
                command = [tools / "cuobjdump", "--dump-sass", cubin]
                sass = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
                counts = r"Used (\d+) registers", r"(\d+) bytes spill stores"
                return sass, again.stderr, *(int(re.findall(x, again.stderr)[-1]) for x in counts)
    raise RuntimeError(f"no ptxas takes what triton made of {kernel.__name__}: {again.stderr[:500]}")


def inspect_loops(sass):
    """(products, spills, overwritten) over the loops with products: spills to local memory, and writes to a
    register that a product in flight still reads. ptxas must see to that, and has been seen to forget it
    where the wait for the product was in the next iteration."""
    instructions = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    code = [(int(m[1], 16), re.sub(r"^@!?U?P\d+ +", "", m[2].strip())) for m in instructions]
    end = max(at for at, op in code if op.startswith("EXIT"))  # slow paths of waits follow, and branch back

    def body(lo, hi):
        return [op for at, op in code if lo <= at <= hi]

    branches = [(at, re.match(r"BRA.*?0x([0-9a-f]+)", op)) for at, op in code if at < end]
    back = [(int(m[1], 16), at) for at, m in branches if m]
    back = [(lo, hi) for lo, hi in back if lo < hi and any("HGMMA" in op for op in body(lo, hi))]
    products = spills = overwritten = 0
    for lo, hi in back:
        if any((lo, hi) != (a, b) and lo <= a and b <= hi for a, b in back):
            continue  # not an innermost loop
        ops = body(lo, hi)
        products += sum("HGMMA" in op for op in ops)
        spills += sum(op.startswith(("STL", "LDL")) for op in ops)
        groups, group = [], set()  # registers that products read, by group that one wait covers
        for op in ops + ops:  # twice: what one iteration leaves in flight meets the next one
            if m := re.match(r"HGMMA\S* R\d+, (?:R(\d+), )?", op):
                group |= set(range(int(m[1]), int(m[1]) + 4)) if m[1] else set()
                if "gsb0" in op:
                    groups, group = groups + [group], set()
            elif m := re.search(r"DEPBAR\.LE gsb0, 0x(\d)", op):
                groups = groups[len(groups) - int(m[1]) :] if len(groups) > int(m[1]) else groups
            elif m := re.match(r"(?!ST|SYNCS|RED)(\S+) (?:U?P\d, )?R(\d+),", op):
                width = 4 if ".128" in m[1] else 2 if ".64" in m[1] or ".WIDE" in m[1] else 1
                written = set(range(int(m[2]), int(m[2]) + width))
                overwritten += any(written & read for read in (*groups, group))
    return products, spills, overwritten


def under_products(sass):
    """How many row maxima are taken while a product is in flight: after a wait that leaves one, before the
    next wait."""
    waits = re.findall(r"DEPBAR\.LE gsb0, 0x1(.*?)DEPBAR", sass, re.DOTALL)
    return min((len(re.findall("FMNMX", code)) for code in waits), default=0)


def decode_calls():
    """{name: Call}, as decode_attn gets them, of tensors without data."""
    new = partial(torch.empty, device="meta")
    ints = partial(new, dtype=i32)

    def call(B=1, M=1, D=128, cache=None, float8=False, **options):
        q, cache = new(B, M, 32, D, dtype=bf16), (*(cache or (B, 8192)), 8)
        k, v = (new(*cache, D, dtype=decode.FLOAT8 if float8 else bf16) for _ in "kv")
        options |= dict.fromkeys(("k_scale", "v_scale"), new(cache)) if float8 else {}
        return decode.make_call(q, k, v, 0, 1, "triton", **options)

    def blocks(full):
        tables = dict(kv_num_blocks=ints(1, 1, 1), kv_indices=ints(1, 1, 1, 64))
        full = {f"full_{x}": table if full else None for x, table in tables.items()}
        return dict(block_mask=SimpleNamespace(**tables, **full, BLOCK_SIZE=(128, 128)))

    def pages(B):
        return dict(B=B, cache=(512, 16), cache_seqlens=ints(B), page_table=ints(B, 512))

    calls = {"one length": {}, "many": dict(B=16)}
    some = {"": 2, "more ": 8, "many ": 32}  # sequences
    calls |= {f"{x}lengths": dict(B=B, cache_seqlens=ints(B)) for x, B in some.items()}
    calls |= {f"{x}pages": pages(B) for x, B in some.items()}
    calls |= {"32 rows": dict(M=8), "64 rows": dict(M=16), "D256": dict(D=256), "D80": dict(D=80)}
    calls |= {"window": dict(window=512), "window, causal": dict(window=512, M=4)}
    calls |= {"blocks": blocks(True), "partial blocks": blocks(False), "sink logits": dict(sink=new(32))}
    some = "one length", "many", "32 rows", "window", "pages"
    calls |= {f"float8, {name}": dict(calls[name], float8=True) for name in some}
    return {name: call(**options) for name, options in calls.items()}


def decode_kernel_of(call):
    """(types, constants, options) of a Call's kernel, as for `compiled`."""
    config = hopper_config(call)
    k, v = decode.in_pairs(call.k, call.v)
    tensors = dict(Q=call.q, K=k, V=v, K_SCALE=call.k_scale, V_SCALE=call.v_scale, SINK=call.sink_logits())
    parts = call.q if config.parts is None else config.parts  # as write_part
    tensors |= dict(O=call.q, LSE=call.q.float(), PARTS=parts)
    tensors |= dict(SEQLENS=call.cache_seqlens, PAGES=call.page_table)
    names = {bf16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16"}
    found = {name: names[x.dtype] for name, x in tensors.items() if x is not None}
    found |= dict.fromkeys((f"stride_{x}" for x in ("q", "k", "v")), ("i32",) * 3)
    found |= dict.fromkeys(("stride_ks", "stride_vs"), ("i32",) * 3) if call.k_scale is not None else {}
    found |= dict(sm_scale="fp32", stride_o="i32", stride_l="i32")
    found["sizes"] = decode.Sizes(*["i32"] * len(config.sizes))
    tables = decode.mask_tables(call.block_mask)
    found["blocks"] = decode.BlockTables(*("constexpr" if x is None else "*i32" for x in tables))
    options = {name: x for name, x in config.options.items() if name != "launch_pdl"}
    return found, config.constants, options


def compile_kernels(few=False):
    """Compile the kernels in the configurations that are shipped; False if one serialises its products,
    spills in a loop with products, overwrites what a product in flight reads, leaves nothing to do under
    products, or uses a barrier that is ours. few: leave out what others show, for the sake of time."""
    gl, all_good = ring_attn.gl, True
    # 3.9 spills more; what that costs has not been measured
    strict_spills = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    integers = dict.fromkeys("B H G T TK GROUP_B SET_B L2_HEADS WAVES OUTER".split(), "i32")
    title = "registers, bytes spilled; in loops with products: products, spills, overwritten registers"
    print(f"triton {triton.__version__}, capability 9.0: {title}")

    def report(name, strict, *args, **options):
        nonlocal all_good
        if few and not re.match(r"decode|\w+ \w+ D128 (causal|interval)", name):
            return
        sass, said, used, spilled = compiled(*args, **options)
        if name.startswith("decode"):  # keys and values are copied ahead, 16 bytes at a time
            ahead = len(re.findall(r"LDGSTS\S*\.128", sass))
            good, found = ahead >= 16 and spilled <= 64, f"{ahead:3} copies ahead"
        else:
            products, spills, overwritten = inspect_loops(sass)
            # barriers of a whole warpgroup, or without a number of threads, are the compiler's
            theirs = re.findall(r" BAR\.\w+[.\w]* 0x([0-9a-f]+)(?:, 0x80)? ;", sass)
            serial = "serialized" in said
            good = products > 0 and not serial and not overwritten
            # a few reloads do no harm; nor more of them in loops over masked tiles, of which there are few
            harmless = (3 if "interval" in name else 10) * spills <= products
            good &= not (strict and strict_spills) or harmless
            good &= not name.startswith("hopper fwd") or under_products(sass) >= 32
            good &= all(int(barrier, 16) < ring_attn.NAMED_BARRIERS.value for barrier in theirs)
            found = f"{products:3} {spills:3} {overwritten:3}{' SERIALIZED' * serial}"
        all_good &= good
        print(f"{name:32} {used:>4} {spilled:>5}   {found}{' BAD' * (not good)}", flush=True)

    def tile(rows, D, kind="bf16", shape=None):
        shape = shape or [1, rows, 1, D]
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(shape))
        if kind == "bf16":
            layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
        return f"tensordesc<{kind}{shape},{layout!r}>"

    masks = {"full": ring_attn.FULL, "causal": ring_attn.CAUSAL, "interval": ring_attn.INTERVAL}
    for (kernel, table), (mask, kind) in product(ring_attn.HOPPER_TILES.items(), masks.items()):
        for D, (consumers, rows, stages) in table.items():
            constants = dict(HEAD_DIM=D, MASK=kind.value, STAGES=stages, MOD=None, DROPOUT=False)
            resident, streamed = tile(64, D), tile(rows, D)
            types = dict.fromkeys(("ACC", "LSE", "SINKS", "DK_ACC", "DV_ACC"), "*fp32")
            types |= dict.fromkeys(("HOP", "ROWS", "COLUMNS", "TILES", "DQ_SEMAPHORE"), "*i32")
            types |= dict.fromkeys(("DK", "DV"), "*bf16")
            types |= dict(sm_scale="fp32", **integers)
            if kernel == "fwd":
                function = ring_attn.hopper_fwd_kernel
                constants |= dict(CONSUMERS=consumers, HAS_SINKS=False)
                types |= dict(q_desc=resident, k_desc=streamed, v_desc=streamed, o_desc=resident)
            else:
                function = ring_attn.hopper_bwd_kernel
                constants |= dict(DETERMINISTIC=True, MOD_BWD=None)
                types |= dict.fromkeys(("v_desc", "dk_desc", "dv_desc"), resident)
                types |= dict(q_desc=streamed, do_desc=streamed, k_desc=tile(64 * consumers, D))
                types["lse_delta_desc"] = tile(0, 0, "fp32", [2, 1, rows])
                types["dq_desc"] = tile(0, 0, "fp32", [16, 256])
            types = {x: types[x] for x in function.arg_names if x in types}
            options = dict(num_warps=4, maxnreg={2: 168, 3: 128}[consumers])
            name = f"hopper {kernel} D{D} {mask}"
            report(name, True, function, types, constants, **options)
            if (D, mask) == (128, "causal"):
                types["MODS"] = ring_attn.KernelMods("i32", "i32", "fp32", "fp32", (("constexpr",),), ())
                constants["MOD"] = ring_attn.Functions([ring_attn.softcap_mod])
                if kernel == "bwd":
                    constants["MOD_BWD"] = ring_attn.Functions([ring_attn.softcap_mod_bwd])
                types = {x: types[x] for x in function.arg_names if x in types}
                report(f"{name} softcap", True, function, types, constants, **options)
    for kernel, D in product(ring_attn.TILES, (64, 128, 256)):
        BLOCK_M, BLOCK_N, num_warps, num_stages = ring_attn.TILES[kernel][D]
        function = getattr(ring_attn, f"{kernel}_kernel")
        known = dict(HOP="*i32", sm_scale="fp32") | integers
        known |= dict.fromkeys(("O", "DQ", "DK", "DV"), "*bf16")
        known |= dict.fromkeys(("ACC", "LSE", "LSE_LOG2", "DELTA", "DK_ACC", "DV_ACC"), "*fp32")
        for name, rows in dict(Q=BLOCK_M, DO=BLOCK_M, K=BLOCK_N, V=BLOCK_N).items():
            known[name] = f"tensordesc<bf16[{rows}, {D}]>"
        names = [name for name in function.arg_names if name in known or name.startswith("stride")]
        types = {name: known.get(name, ("i32",) * 3) for name in names}
        constants = dict(
            MASK=ring_attn.CAUSAL.value, TMA=True, HEAD_DIM=D, BLOCK_D=D, MOD=None, DROPOUT=False
        )
        constants |= {} if kernel == "fwd" else dict(MOD_BWD=None)
        constants |= dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
        options = dict(num_warps=num_warps, num_stages=num_stages)
        report(f"portable {kernel} D{D} causal", D < 256, function, types, constants, **options)
    for_all = "one length", "many", "many pages", "32 rows", "64 rows", "window"  # others resemble them
    for_all += "float8, one length", "float8, 32 rows", "float8, pages"
    for name, call in decode_calls().items():
        if few and name not in for_all:
            continue
        types, constants, options = decode_kernel_of(call)
        report(f"decode {name}", True, decode.decode_kernel, types, constants, **options)
    types = dict.fromkeys(("rank", "n_ranks", "rows", "H"), "i32") | dict(O="*bf16", PEERS="*i64")
    types |= dict.fromkeys(("PARTS", "LSE"), "*fp32")
    constants = dict(PDL=True, HEAD_DIM=128, BLOCK_D=128, CHUNK=8)
    sass, _, used, spilled = compiled(decode.merge_ranks_kernel, types, constants, num_warps=4)
    whole = [re.search(x, sass) for x in (r"STG\S*\.64", r"LDG\S*\.64\S*STRONG")]  # words are one number
    all_good &= spilled == 0 and all(whole)
    print(f"{'merge of ranks':32} {used:>4} {spilled:>5}{'' if all(whole) else '   BAD'}", flush=True)
    return all_good


@local
def every_kernel_compiles_for_Hopper():
    """What this machine's Triton makes of the kernels for Hopper, GPU or not: see compile_kernels. All of
    them: python test.py --compile_only."""
    ended_well(*call_scripts(("test.py", "--compile_only", "--few"), timeout=600))


# -----------------------------------------------------------------------------
# runner


def kill_runs(n_kills, seed):
    """Kills in turn in a ring, in shards without one, and in both."""
    kinds = (2, ()), (2, ("--ring_size=1", "--fsdp")), (4, ("--ring_size=2", "--fsdp", "--checkpoint"))
    for i, (n_ranks, flags) in enumerate(kinds):
        share, began = n_kills // len(kinds) + (i < n_kills % len(kinds)), time.perf_counter()
        if share:
            title = f"{n_ranks} ranks {' '.join(flags)}", "killed: run, rank, after step"
            check_kills(share, n_ranks, flags, seed + i, partial(print, *title))
            ends = "every run ended with the undisturbed loss, bit for bit"
            print(f"{share} kills, {ends}, {time.perf_counter() - began:.0f} s", flush=True)


def told(error):
    """What an error says, or the line that raised it; then the variables of the checks on the way to it."""
    where, short = traceback.extract_tb(error.__traceback__)[-1], reprlib.Repr()
    short.maxother = short.maxstring = 100
    short.maxlist = short.maxtuple = short.maxdict = 16
    said = str(error)[:2000] or where.line
    lines = [f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {said}"]
    for frame, line in [*traceback.walk_tb(error.__traceback__)][1:]:  # without who called the check
        if frame.f_globals is globals():
            known = {x: " ".join(short.repr(y).split()) for x, y in frame.f_locals.items()}
            values = ", ".join(f"{x}={text[:300]}" for x, text in known.items() if text[0] != "<")
            lines.append(f"        {frame.f_code.co_name}:{line} {values[:1500]}")
    return "\n".join(lines)


def execute(case, *args):
    """(name, the worst row or None, the failure or None, seconds)."""
    start, row, failure = time.perf_counter(), None, None
    try:
        row = case.run(*args)
    except (Exception, SystemExit) as error:
        failure = told(error)
    return case.name, row, failure, time.perf_counter() - start


def verdict(results):
    """Of a case, from what each rank of a ring has."""
    return "FAILED" if any(failure for _, _, failure, _ in results) else "ok"


def report(results, first):
    """Print the row of a case, and its failures. first: the rank of the first result."""
    name, seconds = results[0][0], max(s for *_, s in results)
    row = max((row for _, row, _, _ in results if row), key=ratio, default=None)
    numbers = "     -         -         -      -"
    if row:
        numbers = f"{row[0]:>6} {row[1]:9.1e} {row[2]:9.1e} {ratio(row):6.2f}"
    lines = [f"{name:62} {numbers} {seconds:5.1f} {verdict(results)}"]
    lines += [f"    rank {rank}: {r[2]}" for rank, r in enumerate(results, first) if r[2]]
    print("\n".join(lines), flush=True)


def take_turns(everyone, size, cases):
    """Run the cases, each on the first ring of `size` processes that is free: results on its first rank.
    The longest are last in this file and begin first."""
    mine = []
    with shared_folder(everyone) as folder:
        ring = ring_attn.resolve_ring(GROUPS[size]) if size in GROUPS else None
        for i, case in reversed(list(enumerate(cases))) if ring else ():
            takes = False
            if ring.rank == 0:
                with contextlib.suppress(FileExistsError):
                    (folder / f"taken {i}").touch(exist_ok=False)
                    takes = True
            if not ring.gather(takes)[0]:
                continue
            result = execute(case, ring)
            said = ring.gather((case.name, result))
            # otherwise another rank is amid the collectives of a case
            if not all(isinstance(x, tuple) and x[0] == case.name for x in said):
                ended = f"rank {RANK} ended it with {result[2] or 'no error'}"
                sys.exit(f"{case.name}: the ranks are out of step; {ended}")
            if ring.rank == 0:
                mine.append([result for _, result in said])
                report(mine[-1], RANK)
    return mine


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--filter", default="", help="run only the cases whose name contains this")
    flag("--compile_only", action="store_true", help="compile the kernels for Hopper and say what they cost")
    flag("--few", action="store_true", help="with --compile_only: leave out kernels that others resemble")
    flag("--kill", type=int, default=0, metavar="N", help="train with N kills of random ranks, on CPUs")
    flag("--fuzz", type=int, default=0, metavar="N", help="N cases of masks, drawn at random")
    flag("--seed", type=int, default=0, help="of --fuzz's first case; with --kill: which ranks, and when")
    args = parser.parse_args()
    cases = [case for case in CASES if args.filter in case.name]
    if not cases:
        parser.error(f"--filter={args.filter}: no case has this in its name")
    if not __debug__:
        parser.error("python -O leaves out the assertions, of which the tests consist")
    if args.compile_only:
        sys.exit(not compile_kernels(args.few))
    if args.kill:
        return kill_runs(args.kill, args.seed)
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with nan, too
    torch.backends.cuda.matmul.allow_tf32 = False
    if GPU:
        torch.cuda.set_device(LOCAL_RANK)
    if args.fuzz:
        fuzz(args.fuzz, args.seed)
    if "RANK" in os.environ:
        options = dict(device_id=DEVICE if GPU else None, timeout=timedelta(seconds=300))
        dist.init_process_group("nccl" if GPU else "gloo", **options)
        for size in sorted({case.ring for case in CASES if case.ring <= WORLD} | {WORLD}):
            # rings of the first WORLD // size * size processes
            for first in range(0, WORLD // size * size, size):
                group = dist.new_group(range(first, first + size))
                if first <= RANK < first + size:
                    GROUPS[size] = group
    everyone = ring_attn.resolve_ring(GROUPS[WORLD])
    skipped = [(case.name, case.lacks) for case in cases if case.lacks]
    counts, top = dict(ok=0, FAILED=0), 0.0

    def say(line):
        if RANK == 0:
            print(line, flush=True)

    where = torch.cuda.get_device_name() if GPU else "CPU, kernels in Triton's interpreter"
    say(f"{WORLD} x {where} | torch {torch.__version__} | triton {triton.__version__} | {len(cases)} cases")
    say(f"{'case':62} {'worst':>6} {'error':>9} {'bound':>9} {'ratio':>6}     s")
    for size in sorted({case.ring for case in cases}):
        mine = take_turns(everyone, size, [case for case in cases if case.ring == size and not case.lacks])
        for results in itertools.chain(*everyone.gather(mine)):
            counts[verdict(results)] += 1
            top = max(top, *(ratio(row) for _, row, _, _ in results if row), 0.0)
    assert sum(counts.values()) + len(skipped) == len(cases), "a case ran nowhere"
    for why in dict.fromkeys(why for _, why in skipped):
        say(f"skipped, {why}: {'; '.join(name for name, reason in skipped if reason == why)}")
    say(f"worst ratio to the bound: {top:.2f}")
    say(f"{len(skipped)} skipped")
    say(f"{counts['ok']} passed, {counts['FAILED']} failed")
    if dist.is_initialized():
        GROUPS.clear()
        dist.destroy_process_group()
    sys.exit(1 if counts["FAILED"] or not counts["ok"] else 0)


if __name__ == "__main__":
    main()
