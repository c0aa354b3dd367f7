"""Speed and error of the attention kernels, beside what a user would pick instead.

    python bench.py                       # one GPU: every length, mask and head dim; on a CPU the torch path, under a minute
    python bench.py --quick               # only 4k and 16k tokens at head dims 64 and 128, flex once per head dim and mask
    python bench.py --filter "D128 16k"   # rows whose name contains this

A card, then one row per case, then why there are dashes; the last line is all of it as JSON. Peers are torch's SDPA
(FlashAttention-2 and cuDNN), compiled flex_attention, and FlashAttention-3 where flash_attn_interface is installed. Each
gets its tensors in the layout it takes, and all are held to the same float32 truth on the same inputs.
"""

import argparse
import contextlib
import functools
import json
import math
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
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ring_attn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, WIDE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)  # of the inputs, of the truth
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
def compiled_flex():
    torch._dynamo.config.recompile_limit = 256  # each shape is a compile of its own
    torch._functorch.config.donated_buffer = False  # the backward is timed with retain_graph
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def causal_blocks(S):
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device=DEVICE)


def flex(q, k, v, causal):
    return compiled_flex()(q, k, v, block_mask=causal_blocks(q.shape[2]) if causal else None, enable_gqa=q.shape[1] != k.shape[1])


def fa3(q, k, v, causal):
    from flash_attn_interface import flash_attn_func

    o = flash_attn_func(q, k, v, causal=causal)
    return o[0] if isinstance(o, tuple) else o  # some builds return lse as well


class Contender(NamedTuple):
    f: Callable
    heads_first: bool = False  # takes and returns (B, H, S, D), not (B, S, H, D)
    backend: Any = None  # which of SDPA's kernels


CONTENDERS = {"ours": Contender(ours)}
if GPU:
    if set(ring_attn.BACKENDS) - {"triton", "torch"}:  # `ours` is the best of them; what every other GPU gets goes beside it
        CONTENDERS["triton"] = Contender(portable)
    CONTENDERS["fa2"] = Contender(sdpa, True, SDPBackend.FLASH_ATTENTION)
    CONTENDERS["cudnn"] = Contender(sdpa, True, SDPBackend.CUDNN_ATTENTION)
    CONTENDERS["flex"] = Contender(flex, True)
    CONTENDERS["fa3"] = Contender(fa3)
else:
    CONTENDERS["sdpa"] = Contender(sdpa, True, SDPBackend.FLASH_ATTENTION)
EAGER = [who for who in CONTENDERS if who != "flex"]


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
    with torch.cuda.graph(graph, stream=stream):
        f()
    return graph.replay


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


def of_best(times):
    """(the fastest peer's time over ours, which peer), or None; times: {contender: time}, of those that have one."""
    peers = {who: t for who, t in times.items() if who not in ("ours", "triton")}
    best = min(peers, key=peers.get, default=None)
    return (peers[best] / times["ours"], best) if best and "ours" in times else None


# -----------------------------------------------------------------------------
# sections: functions that return a heading, a function that measures a row, prints it and returns it, and {name: its arguments}


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


SECTIONS = [kernels, small, memory] if GPU else [kernels, schedules]

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
    if ring_attn.INTERPRET:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter's speed says nothing; unset it")
    sections = [section(args.quick) for section in SECTIONS]
    names = [name for _, _, cases in sections for name in cases]
    if not any(args.filter in name for name in names):
        parser.error(f"--filter={args.filter!r} is in no name; there are: {', '.join(names)}")

    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is float32 throughout
    card = dict(commit=commit(), gpu=torch.cuda.get_device_name() if GPU else None, torch=torch.__version__, triton=triton.__version__)
    card |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), dtype=str(DTYPE)[6:], n_ranks=1)
    print(" | ".join(f"{key} {value}" for key, value in card.items()))
    if not GPU:
        print("no GPU here: the torch path and the schedules at small shapes")
    print("FLOP: forward 4*B*H*S*S*D, half of it under a causal mask; backward 2.5 times the forward. Inputs are normal, times medians")
    print("of best peer: time of the fastest peer / ours, so above 1 we are faster; fwd+bwd: the sum of both medians")
    print(f"error: relative (Frobenius) to {str(WIDE)[6:]}, of o, or the worst of dq, dk, dv, on one batch item and key/value head")

    rows, status = [], 0
    try:
        for heading, measure_row, cases in sections:
            chosen = [name for name in cases if args.filter in name]
            if chosen:
                print(f"\n{heading}", flush=True)
            for name in chosen:
                rows.append(measure_row(name, *cases[name]))
    except KeyboardInterrupt:
        print("\ninterrupted: below is what was measured so far", end="")
        status = 130
    print()
    for reason, failed in FAILED.items():
        print(f"- {reason} ({len(failed)} rows, the first {failed[0]})")
    if args.quick and "flex" in CONTENDERS:
        print("- flex: --quick compiles it once per head dim and mask")
    rounded = lambda text: float(f"{float(text):.4g}")
    print(json.dumps(json.loads(json.dumps(card | dict(rows=rows, failed=FAILED)), parse_float=rounded)), flush=True)
    sys.exit(status or any(reason.startswith(("ours:", "triton:")) for reason in FAILED))


if __name__ == "__main__":
    main()
