"""Train a small causal transformer on text read as bytes, its sequences sharded over rings of processes.

    python train.py                                         # one GPU, or this laptop's CPU
    torchrun --nproc_per_node=2 train.py                    # a ring of two
    torchrun --nproc_per_node=8 train.py --seq_len=262144   # eight GPUs, 32k tokens each
    torchrun --nproc_per_node=8 train.py --ring_size=4 --fsdp --checkpoint --accumulate=2   # in less memory
    python train.py --data=my/texts --out=runs/mine --steps=2000
    python train.py --data=my/texts --documents --window=1024 --sinks   # each file a document, see below
    python train.py --out=runs/mine --resume                # go on where runs/mine stopped, with its flags
    torchrun --max-restarts=3 --nproc_per_node=8 train.py   # go on by itself when a process is lost
    python train.py --generate='def '                       # continue a text with the newest checkpoint
    torchrun --nproc_per_node=2 train.py --generate='def '  # the same text; each keeps half of the cache

The processes are a mesh (data, ring). Each ring takes its part of the batch. In a ring of n every rank holds
1/n of every sequence, as --schedule says, and reads only those bytes and the ones after them, the targets.
Every rank holds all weights, or with --fsdp a part of them; gradients are summed over all ranks.

A sequence is a stretch of the joined files, of any length. With --documents a token sees its own file only,
positions restart at 0 in each, and no loss is counted from one to the next; a sequence cuts the files at its
ends. --window, --sinks and --softcap change attention in training and in generation alike.

Batches and dropout masks follow from --seed and the number of the step. So a checkpoint holds just weights,
optimizer, step and flags. A resumed run repeats the losses to the bit; it may use other ranks and rings.
"""

import argparse
import codecs
import csv
import datetime
import html
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

import ring_attn
from model import IGNORED, AttentionType, Config, Transformer

# -----------------------------------------------------------------------------
# settings

RANK = int(os.environ.get("RANK", 0))
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
MODEL = "n_layers", "dim", "dim_per_head", "n_kv_heads", "seq_len", "dropout", "window", "sinks", "softcap"
FIXED = *MODEL, "documents", "batch_size", "seed"  # flags that a resumed run cannot change
# flags that old checkpoints lack
LATER = dict(free_order=False, window=None, sinks=False, softcap=None, documents=False)
# flags that only --generate reads, and all that it reads
TEXT_ONLY = {"generate", "prompt_file", "max_tokens", "cache_tokens"}
TEXT = TEXT_ONLY | {"temperature", "top_k", "out", "seed", "device", "dtype", "timeout"}
# flags that a resumed run does not take from its checkpoint
ANEW = TEXT_ONLY | {"temperature", "top_k", "out", "resume", "stop_after", "profile", "transport", "device"}


class Parser(argparse.ArgumentParser):
    """Under torchrun only rank 0 prints: the help here, errors in run_script."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")

    def print_help(self, file=None):
        if RANK == 0:
            super().print_help(file)


def flag(group, name, kind, text, default=None, choices=None):
    """Add --name to a group. Its help shows choices and default; a default of two is a CPU's and a GPU's."""
    if kind is bool:
        return group.add_argument(f"--{name}", action="store_true", help=text)
    shown = "{} on a CPU, {} on a GPU".format(*default) if isinstance(default, tuple) else default
    text = (f"{', '.join(choices)}: " if choices else "") + text + ("" if shown is None else f" ({shown})")
    metavar = {int: "N", float: "X", str: "NAME" if choices else "PATH"}[kind]
    group.add_argument(f"--{name}", type=kind, default=default, choices=choices, metavar=metavar, help=text)


def parse(argv=None):
    """The flags, and as `given` the names of those on the command line. Raises ValueError."""
    usage = "train.py [flags]: train a small causal transformer on text, or continue a text with one"
    wide = partial(argparse.HelpFormatter, max_help_position=24, width=120)
    p = Parser(usage=usage, add_help=False, formatter_class=wide)
    g = p.add_argument_group("run")
    g.add_argument("-h", "--help", action="help", help="print this")
    flag(g, "data", str, "text to learn: a file or a folder (the source of Python's standard library)")
    flag(g, "documents", bool, "the files of a folder are documents: tokens see their own only")
    flag(g, "out", str, "run folder for checkpoints and log (a new one under runs/)")
    flag(g, "resume", bool, "go on from the checkpoint in --out (the newest under runs/)")
    flag(g, "steps", int, "optimizer steps", (400, 500))
    flag(g, "stop_after", int, "save and stop after this step, as if interrupted there")
    flag(g, "seed", int, "of weights, batches and dropout, or of the sampling", 0)
    flag(g, "log_every", int, "steps between log lines", 10)
    flag(g, "eval_every", int, "steps between evaluations; one more at the end", 100)
    flag(g, "eval_batches", int, "batches per evaluation", 8)
    flag(g, "save_every", int, "steps between checkpoints; one more at the end", 100)
    flag(g, "keep", int, "checkpoints to keep; while one is written there is one more", 2)
    flag(g, "sample_tokens", int, "bytes of text to generate at the end", 200)
    g = p.add_argument_group("model and optimizer")
    flag(g, "seq_len", int, "tokens per sequence, over all ranks", (256, 65536))
    flag(g, "batch_size", int, "sequences per step", (8, 2))
    flag(g, "n_layers", int, "layers", (4, 12))
    flag(g, "dim", int, "width", (128, 1024))
    flag(g, "dim_per_head", int, "width of a head", (32, 128))
    flag(g, "n_kv_heads", int, "key/value heads", 2)
    flag(g, "dropout", float, "on the outputs of attention and MLP", 0.0)
    flag(g, "window", int, "tokens that a token sees, itself included (all)")
    flag(g, "sinks", bool, "learn a logit for each head in the denominator of the softmax")
    flag(g, "softcap", float, "scores s become softcap * tanh(s / softcap) (off)")
    flag(g, "schedule", str, "the first two without rings", "zigzag", [t.value for t in AttentionType])
    flag(g, "lr", float, "peak learning rate", (2e-3, 6e-4))
    flag(g, "warmup", int, "steps of linear warm-up; a cosine to a tenth of --lr follows", 20)
    flag(g, "weight_decay", float, "on matrices", 0.1)
    flag(g, "clip", float, "largest norm of the gradient", 1.0)
    g = p.add_argument_group("processes and memory")
    flag(g, "ring_size", int, "processes that share a sequence; the rings share a batch (one ring of all)")
    flag(g, "accumulate", int, "micro batches that a ring splits its part of the batch into", 1)
    flag(g, "free_order", bool, "add gradients up in any order where that is faster: other bits every time")
    flag(g, "fsdp", bool, "shard weights, gradients and optimizer over all processes")
    flag(g, "checkpoint", bool, "keep only attention's outputs; the backward recomputes the rest of a layer")
    flag(g, "compile", bool, "compile the layers")
    flag(g, "timeout", int, "seconds to wait for another rank before the run ends with an error", 600)
    flag(g, "profile", int, "steps, after the first three, to trace into trace.json in the run folder", 0)
    flag(g, "transport", str, "how keys move (the fastest that there is)", None, [*ring_attn.TRANSPORTS])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    flag(g, "device", str, "where it runs", default, ["cuda", "cpu"])
    dtypes = "float32", "bfloat16"
    flag(g, "dtype", str, "of products; weights stay float32 in training", dtypes, dtypes)
    g = p.add_argument_group("text instead of training, by the checkpoint in --out (newest under runs/)")
    g.add_argument("--generate", metavar="TEXT", help="a text to continue")
    flag(g, "prompt_file", str, "a file with the text (-: standard input); that of --generate follows it")
    flag(g, "max_tokens", int, "bytes to generate", 200)
    flag(g, "temperature", float, "0 takes the likeliest byte; also at the end of a training run", 0.8)
    flag(g, "top_k", int, "sample among so many likeliest bytes (all); also at the end of a training run")
    flag(g, "cache_tokens", int, "room of the key/value cache (what the prompt and --max_tokens need)")
    args = p.parse_args(argv)
    p.set_defaults(**dict.fromkeys(vars(args)))
    args.given = sorted(name for name, value in vars(p.parse_args(argv)).items() if value is not None)
    wrong, verb = set(args.given) - TEXT, "does not go with"
    if wants_training(args):
        wrong, verb = TEXT_ONLY.intersection(args.given), "needs"
    if wrong:
        p.error(f"--{min(wrong)} {verb} --generate or --prompt_file")
    args.data = args.data and os.path.abspath(args.data)  # a resumed run may start elsewhere
    for name, value in vars(args).items():
        if isinstance(value, tuple):
            setattr(args, name, value[args.device == "cuda"])
    return args


def wants_training(args):
    return args.generate is None and args.prompt_file is None


def check_numbers(args):
    """ValueError if a number among the flags is too small, infinite (--clip may be) or nan."""
    from_zero = "seed dropout softcap lr warmup weight_decay clip sample_tokens profile temperature".split()
    numbers = {name: x for name, x in vars(args).items() if type(x) in (int, float)}
    for name, value in numbers.items():
        least, most = 0 if name in from_zero else 1, math.inf if name == "clip" else sys.float_info.max
        if not least <= value <= most:
            finite = ", and finite" if type(value) is float and name != "clip" else ""
            way_out = "; leave it out to see all" if name == "window" else ""
            raise ValueError(f"--{name}={value} must be {least} or more{finite}{way_out}")


def check_args(args, n_ranks, start):
    check_numbers(args)
    if not args.lr or not args.clip:
        raise ValueError(f"--lr={args.lr} and --clip={args.clip} must be above 0")
    if args.seed >= 2**23:
        raise ValueError(f"--seed={args.seed} must be in 0..{2**23 - 1}")
    if args.stop_after is not None and args.stop_after <= start:
        raise ValueError(f"--stop_after={args.stop_after} must be above {start}, the steps already done")
    R = args.ring_size
    if n_ranks % R:
        fits = max(r for r in range(1, R) if n_ranks % r == 0)
        raise ValueError(f"--ring_size={R} must divide the {n_ranks} processes; use {fits}, or start others")
    n_parts = n_ranks // R * args.accumulate
    if args.batch_size % n_parts:
        product = f"{n_parts}, {n_ranks // R} rings x --accumulate={args.accumulate}"
        fits = -(-args.batch_size // n_parts) * n_parts
        fix = f"use {fits}, a larger --ring_size, or a smaller --accumulate"
        raise ValueError(f"--batch_size={args.batch_size} must be a multiple of {product}; {fix}")
    if R == 1:
        return
    if not AttentionType(args.schedule).is_ring:
        one = f"--schedule={args.schedule} works on whole sequences in one process"
        raise ValueError(f"{one}, this run has {R} in a ring; use zigzag, or --ring_size=1")
    B, multiple = args.batch_size // n_parts, ring_attn.length_multiple(args.schedule, R)
    try:
        ring_attn.check_schedule(args.schedule, R, -(-args.seq_len // multiple) * multiple // R, B)
    except ValueError as error:
        part = f"a ring gets B={B} of --batch_size={args.batch_size} at a time"
        raise ValueError(f"{error} ({part})") from error


# -----------------------------------------------------------------------------
# data: one long array of bytes on disk


class Text(NamedTuple):
    data: np.ndarray  # bytes, mapped, not read
    documents: np.ndarray | None  # where documents begin in it, increasing; the last is where all of them end


def text_files(folder):
    """All files below a folder but hidden ones, in one order everywhere; of Python's library its modules."""
    stdlib = folder == Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib"} if stdlib else set()
    files = [f.relative_to(folder).parts for f in folder.rglob("*.py" if stdlib else "*") if f.is_file()]
    files = [parts for parts in files if not any(name in skip or name.startswith(".") for name in parts)]
    return [folder.joinpath(*parts) for parts in sorted(files)]


def prepare_data(path, out, write, keep):
    """The file to map: `path`, or for a folder its files joined into out/data.bin. Where each begins there is
    in out/documents.npy. write: may this process write them? keep: a resumed run goes on with those that it
    has, whatever became of the folder."""
    path = Path(path or sysconfig.get_path("stdlib"))
    if not path.exists():
        raise ValueError(f"--data={path} does not exist; name a file or a folder of text")
    if path.is_file():
        return path
    joined = out / "data.bin"
    if write and not (keep and joined.exists()):
        files = text_files(path)
        if not files:
            raise ValueError(f"--data={path} holds no files; name a file or a folder of text")
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "data.bin.tmp", "wb") as f:
            sizes = [f.write(file.read_bytes()) for file in files]
        np.save(out / "documents.npy", np.cumsum([0, *sizes]))  # both are there once data.bin is
        os.replace(out / "data.bin.tmp", joined)
    return joined


def open_data(file, out, args):
    """Texts to train on and to validate with: the first 90% and the last 10% of the bytes."""
    size, need = file.stat().st_size, args.seq_len + 1
    if size == 0:
        raise ValueError(f"--data: {file} is empty; name a file or a folder of text")
    split = min(size - size // 10, size - need)
    if split < need:
        needs = f"training and validation need --seq_len + 1 = {need} each"
        fix = "use more text or a shorter --seq_len"
        raise ValueError(f"--data={args.data} has {size} bytes; {needs}: {fix}")
    data = np.memmap(file, dtype=np.uint8, mode="r")
    if not args.documents:
        return Text(data[:split], None), Text(data[split:], None)
    joined = file == out / "data.bin"  # else one file, which is one document
    documents = np.unique(np.load(out / "documents.npy") if joined else [0, size])  # without empty ones
    return Text(data[:split], documents), Text(data[split:], documents - split)


def fingerprint(data, documents):
    """Tells one text from another: size and checksum of both ends, and a checksum of its documents."""
    ends = data[: 1 << 20], data[-(1 << 20) :]
    return [len(data), *(zlib.crc32(x.tobytes()) for x in (*ends, documents) if x is not None)]


def offsets(data, args, n_rings, *key):
    """Where the sequences of a batch begin, (accumulate, n_rings, B, 1). It follows from --seed and `key`,
    so all ranks draw the same, and a resumed run draws what comes next."""
    rng = np.random.default_rng((args.seed, *key))
    starts = rng.integers(0, len(data) - args.seq_len, size=(args.batch_size, 1))
    return starts.reshape(args.accumulate, n_rings, -1, 1)


def get_batch(text, start, pos, seq_len, device):
    """Tokens and targets (B, T) at positions pos (B, T) of the sequences that begin at start (B, 1), and the
    cu_seqlens of their documents or None. Padding, at positions from seq_len on, and the last tokens of
    documents have no target."""
    data, documents = text
    at = start + np.minimum(pos, seq_len - 1)  # padding repeats the last token
    tokens, targets = (data[at + shift].astype(np.int64) for shift in (0, 1))
    targets[pos >= seq_len] = IGNORED
    cu_seqlens = None
    if documents is not None:
        targets[documents[np.searchsorted(documents, at + 1)] == at + 1] = IGNORED
        inside = np.searchsorted(documents, start + [1, seq_len])  # (B, 2): those that begin behind `start`
        begins = [documents[slice(*x)] - s for x, s in zip(inside, start[:, 0])]
        most = max(map(len, begins))  # all rows of cu_seqlens have one length
        rows = [[0, *x, *[seq_len] * (1 + most - len(x))] for x in begins]
        cu_seqlens = torch.tensor(rows, dtype=torch.int32)  # stays on the CPU: there it says what must move
    batch = [torch.from_numpy(x) for x in (tokens, targets)]
    if device.type == "cuda":
        batch = [x.pin_memory().to(device, non_blocking=True) for x in batch]
    return *batch, cu_seqlens


# -----------------------------------------------------------------------------
# pictures, here and in bench.py: mid-tones, which read on white and on dark pages and to colour-blind eyes

INK, BLUE, ORANGE, GREEN, PURPLE, GOLD = "#7a7f87", "#2f7fc1", "#d1661a", "#179a76", "#b8629b", "#a8860b"


def svg(path, width, height, parts, footer=""):
    font = 'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" {font}>'
    path.write_text("\n".join([start, *parts, label(width - 10, height - 10, footer, "end", 11), "</svg>\n"]))


def label(x, y, text, anchor="start", size=13, weight="normal", color=INK):
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{color}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(str(text))}</text>'


def rect(x, y, width, height, color, opacity=1):
    size = f'width="{max(width, 0.3):.2f}" height="{height:.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{color}" fill-opacity="{opacity}"/>'


def stroke(points, style='stroke-opacity="0.35"', color=INK):
    """Straight from point to point."""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{color}" {style}/>'


def legend(x, y, entries):
    """A row of (colour, text)."""
    parts = []
    for color, text in entries:
        parts += [rect(x, y - 10, 12, 12, color), label(x + 18, y, text)]
        x += 40 + 7 * len(text)
    return parts


def ticks(top, n=5):
    """About n round numbers up to top."""
    step = 10 ** math.floor(math.log10(top / n))
    step *= next(m for m in (1, 2, 5, 10) if top / (m * step) <= n)
    return [i * step for i in range(int(top / step) + 1)]


def y_axis(x, y, width, height, top):
    """Lines across, from 0 at y up to top, with their numbers."""
    parts = []
    for tick in ticks(top):
        at = y - height * tick / top
        parts += [stroke([(x, at), (x + width, at)]), label(x - 6, at + 4, f"{tick:,.10g}", "end", 11)]
    return parts


def curve_figure(table, path, footer):
    """Losses and tokens/s by step, from metrics.csv."""
    with open(table, newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["step"].isdigit()]
    last, x, y, width, height = max([int(row["step"]) for row in rows], default=1), 80, 60, 600, 180
    parts = legend(x, 24, [(BLUE, "training"), (ORANGE, "validation")])
    losses, speeds = dict(loss=BLUE, val_loss=ORANGE), dict(tokens_per_second=GREEN)
    for title, colors in (("loss, nats per byte", losses), ("tokens/s", speeds)):
        values = [float(row[name]) for row in rows for name in colors if row[name]]
        top = 1.05 * max([value for value in values if value < math.inf], default=1)
        y += height
        parts += [label(x, y - height - 10, title, weight="bold"), *y_axis(x, y, width, height, top)]
        for name, color in colors.items():
            curve = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            for good, run in itertools.groupby(curve, lambda point: math.isfinite(point[1])):
                points = [(x + width * step / last, y - height * value / top) for step, value in run if good]
                parts += [rect(a - 2, b - 2, 4, 4, color) for a, b in points]
                parts += [stroke(points, 'stroke-width="2"', color)] if points else []
        y += 50
    steps = [tick for tick in ticks(last) if tick == int(tick)]
    parts += [label(x + width * tick / last, y - 32, f"{tick:,.0f}", "middle", 11) for tick in steps]
    parts.append(label(x, y - 16, "step"))
    svg(path, x + width + 30, y, parts, footer)


# -----------------------------------------------------------------------------
# run folder: checkpoints, log.txt, metrics.csv, curve.svg


def checkpoint_file(folder, step):
    return Path(folder) / f"ckpt-{step:08d}.pt"


def checkpoints(folder, step=10**8 - 1):
    """The checkpoints in a run folder, newest first, up to a step."""
    files = sorted(Path(folder).glob("ckpt-*.pt"), reverse=True)
    return [f for f in files if f <= checkpoint_file(folder, step)]


def run_folders(out):
    """[--out], or without it the folders under runs/ that have checkpoints, the one with the newest first."""
    files = sorted(Path("runs").glob("*/ckpt-*.pt"), key=lambda f: f.stat().st_mtime, reverse=True)
    return [Path(out)] if out else list(dict.fromkeys(f.parent for f in files))


def torchrun_id():
    """Tells one torchrun from another, and is the same in the processes that it starts again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def read_checkpoint(file):
    """What was saved; ValueError if it is no checkpoint, or not a whole one."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["model"], state["optimizer"], state["text"], state["step"], state["n_ranks"]
        state["args"] = LATER | state["args"]
        [state["args"][name] for name in FIXED]
        return state
    except Exception as error:
        reason = f"{type(error).__name__} {str(error)[:100]}"
        raise ValueError(f"{file} is not a checkpoint of train.py, or not a whole one: {reason}") from error


def newest_checkpoint(folder):
    """(the newest whole checkpoint in a run folder or None, its state, what is wrong with newer ones)"""
    refused = []
    for file in checkpoints(folder):
        try:
            return file, read_checkpoint(file), refused
        except ValueError as error:
            refused.append(str(error))
    return None, None, refused


def choose_run(args, restarted):
    """(run folder, its newest whole checkpoint or None, what is wrong with newer ones). ValueError where this
    would overwrite a run, or there is nothing to resume. restarted: torchrun has started these processes once
    more; they go on from the newest checkpoint that was written under it, if there is one."""
    folders = run_folders(args.out)
    for folder in folders if restarted else ():
        file, state, refused = newest_checkpoint(folder)
        if file and state.get("torchrun_id") == torchrun_id():
            return folder, file, refused
    if not args.resume:
        out = Path(args.out or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out={out} is a file; name a folder")
        if checkpoints(out):
            raise ValueError(f"--out={out} already holds a checkpoint; add --resume, or name another folder")
        return out, None, []
    if not folders:
        raise ValueError("--resume: no checkpoint under runs/; name the run folder with --out")
    out = folders[0]
    file, _, refused = newest_checkpoint(out)
    if not file:
        none = f"--resume: no checkpoint in {out}; leave --resume out to start a run there"
        raise ValueError("; ".join(refused) or none)
    return out, file, refused


def load_checkpoint(file, args, n_ranks):
    """The saved state; its flags go into args. ValueError if it is of another model or other batches."""
    state = read_checkpoint(file)
    saved = state["args"]
    changed = [x for x in FIXED if x in args.given and getattr(args, x) != saved[x]]
    if changed:
        differ = "; ".join(f"{x} is {saved[x]} there and {getattr(args, x)} here" for x in changed)
        fix = "leave these flags out, or start anew with another --out"
        raise ValueError(f"{file} is of another run: {differ}; {fix}")
    for name in saved.keys() - ANEW - {"given", *args.given}:
        if name != "ring_size" or n_ranks == state["n_ranks"]:
            setattr(args, name, saved[name])
    return state


def full_state(x, rank):
    """A state with its tensors in the CPU memory of rank 0; all ranks join their shards."""
    if isinstance(x, dict):
        return {name: full_state(y, rank) for name, y in x.items()}
    if isinstance(x, DTensor):
        x = x.full_tensor()
    if isinstance(x, torch.Tensor):
        return x.detach().cpu() if rank == 0 else None
    return x


def save_checkpoint(out, keep, **state):
    """Write a checkpoint to disk under a temporary name, then rename it: it is whole or not there. The newest
    `keep` stay."""
    file, tmp = checkpoint_file(out, state["step"]), out / "ckpt.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, file)
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        left, reason = checkpoints(out, state["step"] - 1), error
        while not isinstance(reason, OSError) and reason.__context__:
            reason = reason.__context__  # torch.save hides the disk's error behind one of its own
        free = f"{shutil.disk_usage(out).free / 2**20:,.1f} MiB are free there"
        last = f"{left[0]} is whole: make room and --resume" if left else "and no checkpoint is there yet"
        raise ValueError(f"cannot write {file}: {reason}; {free}, {last}") from error
    for old in checkpoints(out, state["step"])[keep:]:
        old.unlink(missing_ok=True)


def load_optimizer(optimizer, saved):
    """Saved state into the optimizer; under FSDP every rank takes its shards."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        moments = saved["state"].get(i, {}) if isinstance(p, DTensor) else {}
        for name, x in moments.items():
            if x.shape == p.shape:
                moments[name] = distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=saved["state"]))  # with this run's flags


def sources():
    """The commit, if there is one, and the text of all files."""
    here = Path(__file__).parent
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    names = "train.py", "model.py", "ring_attn.py", "decode.py"
    texts = [f"==== {name}\n{(here / name).read_text(encoding='utf-8')}" for name in names]
    return commit or "unknown", "".join(texts)


def show(text):
    """Print text; False if standard output is gone, as behind `| head`. Later calls then print nothing."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more at its end
        if not isinstance(error, BrokenPipeError):
            print(f"standard output: {error}", file=sys.stderr)
        return False
    return True


class Log:
    """On rank 0: prints lines and keeps them in log.txt, which opens with all it takes to repeat the run, and
    numbers in metrics.csv. A full disk ends a run only where a checkpoint is due."""

    COLUMNS = "step loss val_loss lr grad_norm seconds_per_step tokens_per_second mfu memory_gib".split()

    def __init__(self, out, rank, args, n_ranks, start, device_name):
        self.rank, self.text, self.table = rank, out / "log.txt", out / "metrics.csv"
        if rank > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        commit, files = sources()
        with open(self.text, "a+", encoding="utf-8", errors="replace") as f:
            f.seek(0)
            if files not in f.read():  # a resumed run has them there already, if nothing changed
                f.write(files)
            f.write(f"==== {sys.argv}\ncommit {commit}\n{json.dumps(vars(args))}\n")
            f.write(f"{n_ranks} x {device_name}, torch {torch.__version__}, python {sys.version}\n")
        rows = list(csv.reader(open(self.table))) if self.table.exists() else []
        rows = [row for row in rows if row[0].isdigit() and int(row[0]) <= start]  # later ones come again
        with open(out / "metrics.tmp", "w", newline="") as f:
            csv.writer(f).writerows([self.COLUMNS, *rows])
        os.replace(out / "metrics.tmp", self.table)
        self.footer = f"{out.name} | {n_ranks} x {device_name} | commit {commit[:9]}"

    def draw(self):
        """curve.svg: the whole run so far, however it ends. A resumed run draws it again."""
        try:
            curve_figure(self.table, self.table.with_name("curve.svg"), self.footer)
        except (OSError, ValueError, TypeError) as error:  # no room for it, or the table was changed
            print(f"{self.table}: no curve of it: {error}", file=sys.stderr, flush=True)

    def __call__(self, line, **numbers):
        if self.rank > 0:
            return
        show(line + "\n")
        try:
            with open(self.text, "a", encoding="utf-8", errors="replace") as f:
                f.write(line + "\n")
            if numbers:
                with open(self.table, "a", newline="") as f:
                    csv.DictWriter(f, self.COLUMNS).writerow(numbers)
        except OSError as error:
            print(f"{self.text.parent}: {error}", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# processes


class Interrupt:
    """Inside, the first Ctrl-C or SIGTERM only sets `asked` to its number; the second ends the process. A
    RuntimeError, as of a lost rank, calls `on_error`."""

    def __init__(self, on_error=lambda: None):
        self.asked, self.before, self.on_error = 0, {}, on_error

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = number
        for n in self.before:
            signal.signal(n, signal.SIG_DFL)

    def __exit__(self, kind, error, trace):
        failed = isinstance(error, RuntimeError)
        if failed:  # first, as torchrun's SIGTERM may end this process as soon as the handlers are gone
            self.on_error()
        for n, handler in self.before.items():
            signal.signal(n, handler)
        if failed and self.asked:
            signal.raise_signal(self.asked)


def device_of(args):
    return torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)


def on_every_rank(world, f, *args, **same):
    """f(*args), or None without f; ValueError on every rank if any failed or the values of `same` differ."""
    result, problem = None, None
    try:
        result = f and f(*args)
    except (ValueError, OSError) as error:
        problem = str(error)
    world.agree({name: repr(value) for name, value in same.items()}, problem)
    return result


def all_reduce(x, world, op=dist.ReduceOp.SUM):
    if world.n_ranks > 1:
        dist.all_reduce(x, op, group=world.group)
    return x


# -----------------------------------------------------------------------------
# training


def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / (args.steps - args.warmup)  # step < steps
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def memory(device):  # GiB, the peak so far
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def open_run(args, world):
    """Find the run, new or old, and complete its flags: (run folder, checkpoint or None, its state, the first
    step, what is wrong with newer checkpoints)."""
    on_every_rank(world, None, **vars(args))
    restarted = any(world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    chosen = on_every_rank(world, choose_run if world.rank == 0 else None, args, restarted)
    out, file, refused = world.gather(chosen)[0]
    state = on_every_rank(world, load_checkpoint, file, args, world.n_ranks) if file else None
    start = state["step"] if file else 0
    args.ring_size = world.n_ranks if args.ring_size is None else args.ring_size
    on_every_rank(world, check_args, args, world.n_ranks, 0 if restarted else start, start=start)
    return out, file, state, start, refused


def place_model(model, args, world, device):
    """Move the model to its device, under --fsdp only this rank's shards; returns its optimizer."""
    for block in model.blocks:
        block.checkpoint = args.checkpoint
        if args.compile:
            block.forward = torch.compile(block.forward)
    if args.fsdp and world.n_ranks > 1:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=DeviceMesh.from_group(world.group, device.type))
            module.set_gradient_divide_factor(1.0)  # sums of gradients, as without FSDP
            module.set_force_sum_reduction_for_comms(True)
    else:
        model.to(device)
    groups = [dict(params=[], weight_decay=decay) for decay in (args.weight_decay, 0.0)]
    for p in model.parameters():
        groups[p.ndim != 2]["params"].append(p)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def train_step(model, optimizer, batches, amp, clip, world):
    """One step. Returns tensors: this rank's part of the loss (a mean over the targets of all ranks and micro
    batches), the norm of the gradient, and what is not finite on this rank: 2 its loss, 1 its gradient, 0."""
    n_targets = all_reduce(sum((targets != IGNORED).sum() for _, targets, _ in batches), world).clamp(min=1)
    loss = 0
    for tokens, targets, cu_seqlens in batches:
        with amp:
            part = model(tokens, targets, "sum", cu_seqlens) / n_targets
        part.backward()
        loss += part.detach()
    grads = [p.grad for p in model.parameters()]
    norm = get_total_norm(grads)  # before the sum over ranks, which spreads the nan of one to all
    sharded = isinstance(norm, DTensor)
    bad = 2 * ~loss.isfinite() + ~(norm.to_local() if sharded else norm).isfinite()
    if world.n_ranks > 1 and not sharded:
        for work in [dist.all_reduce(g, group=world.group, async_op=True) for g in grads]:
            work.wait()
    norm = clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, bad


def evaluate(model, batches, amp, ranges, n_ranges, world):
    """Mean losses in nats per byte over the batches of all ranks: by range of positions, and over all."""
    totals = torch.zeros(2, n_ranges, dtype=torch.float64, device=ranges.device)  # losses, targets
    model.eval()
    with torch.no_grad():
        for tokens, targets, cu_seqlens in batches:
            with amp:
                losses = model(tokens, targets, "none", cu_seqlens)  # (B, T)
            for i in range(n_ranges):
                counted = (ranges == i) & (targets != IGNORED)
                totals[:, i] += torch.stack([(losses * counted).sum(), counted.sum()])
    model.train()
    all_reduce(totals, world)
    return (totals[0] / totals[1]).tolist(), (totals[0].sum() / totals[1].sum()).item()


def not_finite(bad, step, starts, args, text_file, out):
    """The error for a step. bad: of every rank, see train_step; starts: where the batch's sequences begin."""
    found = [r for r, x in enumerate(bad) if x == max(bad)]  # one rank's loss spoils the gradients of others
    what, also = "loss" if max(bad) > 1 else "gradient", f" (and that of {found[1:]})" if found[1:] else ""
    begins, left = starts[:, found[0] // args.ring_size].flatten().tolist(), checkpoints(out, step)
    where = f"its sequences begin at bytes {begins} of {text_file}"
    last = f"{left[0]} is the last good checkpoint" if left else "no checkpoint was written yet"
    return ValueError(f"step {step + 1}: the {what} of rank {found[0]} is not finite{also}; {where}; {last}")


def train(args, group=None):
    """Train as the flags say: on all processes, in rings of --ring_size, or on those of `group`, as one ring.

    Returns the loss of every step as floats, and the last validation loss. Raises ValueError on every rank.
    """
    world = ring_attn.resolve_ring(group)  # all ranks
    rank, n_ranks, device = world.rank, world.n_ranks, device_of(args)
    out, file, state, start, refused = open_run(args, world)

    # rings, model, data, optimizer
    ring, data_rank, n_rings = world, rank // args.ring_size, n_ranks // args.ring_size
    if n_rings > 1:  # the ranks of a ring are neighbours, on one host if they fit
        wait = datetime.timedelta(seconds=args.timeout)
        ring = ring_attn.resolve_ring(dist.new_subgroups(args.ring_size, timeout=wait)[0])
    attn_type = AttentionType(args.schedule)
    if ring.n_ranks > 1:
        on_every_rank(world, ring.settle, device, args.transport)
    torch.manual_seed(args.seed)
    options = ring.rank, ring.n_ranks, attn_type, ring, args.transport
    model = on_every_rank(world, Transformer, make_config(vars(args)), *options)
    first_of_host = rank == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0
    text_file = on_every_rank(world, prepare_data, args.data, out, first_of_host, file is not None)
    train_text, val_text = on_every_rank(world, open_data, text_file, out, args)
    text_id = fingerprint(*train_text)

    def restore():
        if state["text"] != text_id:
            fix = "give that one as --data, or start anew with another --out"
            raise ValueError(f"{text_file} is not the text that {file} was trained on; {fix}")
        model.load_state_dict(state["model"])

    on_every_rank(world, restore if file else None, text=text_id)
    optimizer = place_model(model, args, world, device)
    if file:
        load_optimizer(optimizer, state["optimizer"])
    state = None  # frees the memory of all weights

    # what the log opens with
    cuda, sharded = device.type == "cuda", args.fsdp and n_ranks > 1
    n_threads = torch.get_num_threads()
    name = f"CPU, {n_threads} thread{'s' * (n_threads > 1)} per process"
    name = torch.cuda.get_device_name(device) if cuda else name
    log = on_every_rank(world, Log, out, rank, args, n_ranks, start, name)
    for problem in refused:
        log(f"passed over: {problem}")
    size = f"{args.schedule}, {args.seq_len} tokens x {args.batch_size}, {args.dtype}"
    size += (f", window {args.window}" if args.window else "") + ", sinks" * args.sinks
    size += f", softcap {args.softcap}" if args.softcap else ""
    log(f"{n_ranks} x {name} | torch {torch.__version__} | {size}")
    if n_rings > 1 or sharded:
        shards = f" | weights and optimizer sharded over {n_ranks}" * sharded
        log(f"{n_rings} ring{'s' * (n_rings > 1)} of {args.ring_size}{shards}")
    if ring.n_ranks > 1:
        transport, why = (args.transport, "asked for") if args.transport else (ring.transport, ring.why)
        log(f"keys and gradients move by {transport}: {why}")
    n_params = sum(p.numel() for p in model.parameters())
    resumed = f" | resumed at step {start}" if start else ""
    text, documents = f"{len(train_text.data):,} + {len(val_text.data):,} bytes of text", train_text.documents
    text += "" if documents is None else f" in {len(documents) - 1:,} document{'s' * (len(documents) > 2)}"
    log(f"{n_params:,} parameters | {text} | {out}{resumed}")

    # what all steps share
    B = args.batch_size // (n_rings * args.accumulate)  # sequences of a micro batch
    pos = torch.arange(args.seq_len).repeat(B, 1)
    pos = model.blocks[0].attn.shard(pos, pad_value=args.seq_len)  # (B, T), of this rank's tokens
    ends = [args.seq_len >> k for k in range(7, -1, -1) if args.seq_len >> k]  # of ranges, each twice as long
    ranges = torch.bucketize(pos, torch.tensor(ends), right=True).to(device)  # which one a token is in
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    peak = next((x for gpu, x in PEAK_FLOPS.items() if gpu in name and args.dtype == "bfloat16"), None)
    lengths = None if documents is None else torch.from_numpy(np.diff(documents))
    flops_per_token = model.flops_per_token(args.seq_len, lengths)

    def micro_batches(text, *key):
        parts = offsets(text.data, args, n_rings, *key)[:, data_rank]
        return [get_batch(text, part, pos.numpy(), args.seq_len, device) for part in parts]

    def tell_end():
        by = f" by {signal.Signals(interrupt.asked).name}" if interrupt.asked else ""
        newest = next(iter(checkpoints(out, done)), None)
        more = f"; stopped{by} at step {done}" if newest != checkpoint_file(out, args.steps) else ""
        more += f", --out={out} --resume goes on" if more and newest else ""
        log((f"checkpoint in {newest}" if newest else f"no checkpoint in {out}") + more)
        if rank == 0:
            log.draw()

    profiler = None
    if args.profile and rank == 0:
        when = torch.profiler.schedule(wait=2, warmup=1, active=args.profile, repeat=1)
        path = str(out / "trace.json")
        profiler = torch.profiler.profile(schedule=when, on_trace_ready=lambda p: p.export_chrome_trace(path))
        profiler.start()
    losses, val_loss, by_range = [], None, None
    reports = deque()  # not read by the host yet: (step, [loss, is a rank asked to end?, `bad` of all ranks])
    stop = min(args.steps, args.stop_after or args.steps)
    batches = micro_batches(train_text, 0, start)
    clock, clock_step, done = time.perf_counter(), start, start
    with Interrupt(tell_end) as interrupt:
        while done < stop:
            step, done = done, done + 1
            lr = learning_rate(step, args)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if args.dropout:  # a resumed run draws the same masks
                torch.manual_seed((args.seed << 40) + (step << 12) + rank)
            loss, grad_norm, bad = train_step(model, optimizer, batches, amp, args.clip, world)
            report = torch.zeros(2 + n_ranks, device=device)
            report[0], report[1], report[2 + rank] = loss, bool(interrupt.asked), bad
            reports.append((step, all_reduce(report, world)))
            batches = micro_batches(train_text, 0, done)  # read while the GPU is busy
            if profiler:
                profiler.step()

            logging = done % args.log_every == 0 or done in (stop, start + 1)
            evaluating = done % args.eval_every == 0 or done == args.steps
            saving = done % args.save_every == 0 or done == stop
            # a GPU's report is read when the next step is on its way there: the GPU never waits for the host
            while reports and (len(reports) > 1 or not cuda or logging or evaluating or saving):
                reported, report = reports.popleft()
                loss, ending, *bad = report.tolist()
                losses.append(loss)
                if any(bad):
                    starts = offsets(train_text.data, args, n_rings, 0, reported)
                    raise not_finite(bad, reported, starts, args, text_file, out)
                if ending:
                    stop, saving = done, True
            title = f"step {done:05d}/{args.steps:05d}"
            if logging:
                dt = (time.perf_counter() - clock) / (done - clock_step)
                speed = args.batch_size * args.seq_len / dt
                mfu, mem = flops_per_token * speed / (peak * n_ranks) if peak else None, memory(device)
                eta = datetime.timedelta(seconds=int(dt * (args.steps - done)))
                grad_norm = (grad_norm.full_tensor() if sharded else grad_norm).item()
                numbers = dict(step=done, loss=losses[-1], lr=lr, grad_norm=grad_norm, seconds_per_step=dt)
                numbers |= dict(tokens_per_second=speed, mfu=mfu, memory_gib=mem)
                line = f"{title} | loss {losses[-1]:.4f} | lr {lr:.1e} | dt {1000 * dt:.1f}ms"
                line += f" | tok/s {speed:,.0f}" + (f" | mfu {100 * mfu:.1f}%" if mfu else "")
                log(f"{line} | mem {mem:.1f}GiB | eta {eta}", **numbers)
                clock, clock_step = time.perf_counter(), done
            if cuda and (evaluating or saving):
                torch.cuda.synchronize()  # what still runs belongs to the steps, not to the pause
            pause = time.perf_counter()
            if evaluating:
                val_batches = (x for i in range(args.eval_batches) for x in micro_batches(val_text, 1, i))
                by_range, val_loss = evaluate(model, val_batches, amp, ranges, len(ends), world)
                log(f"{title} | validation loss {val_loss:.4f} nats per byte", step=done, val_loss=val_loss)
            if saving:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done)
                state |= dict(text=text_id, n_ranks=n_ranks, args=vars(args), torchrun_id=torchrun_id())
                save = partial(save_checkpoint, out, args.keep, **full_state(state, rank))
                on_every_rank(world, save if rank == 0 else None)
            clock += time.perf_counter() - pause  # evaluation and saving stay out of tok/s
    if profiler:
        profiler.stop()

    if by_range and done == args.steps:
        means = [f"{first}-{end - 1}: {x:.3f}" for first, end, x in zip([0, *ends], ends, by_range)]
        log(f"validation loss by position, nats per byte: {' | '.join(means)}")
    if args.sample_tokens and done == args.steps and rank == 0:
        sampler = load_sampler(checkpoints(out, done)[0], args, ring_attn.ALONE)
        log(f"---- sample\n{''.join(continue_text(sampler, b'def ', args.sample_tokens, args))}\n----")
    tell_end()
    return losses, val_loss


# -----------------------------------------------------------------------------
# text from a checkpoint


def make_config(args):  # a dict
    return Config(**{name: args[name] for name in MODEL}, deterministic=not args["free_order"])


def load_sampler(file, args, ring):
    """The model of a checkpoint, ready to generate on the ranks of a ring."""
    state = read_checkpoint(file)
    attn_type = AttentionType.STRIPED if ring.n_ranks > 1 else AttentionType.FLASH  # as the cache is
    model = Transformer(make_config(state["args"]), ring.rank, ring.n_ranks, attn_type)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} holds weights of another shape than its flags say: {reason}") from error
    return model.to(device_of(args), getattr(torch, args.dtype)).eval()


def continue_text(model, prompt, n_tokens, args, cache=None):
    """Continue prompt (bytes) by n_tokens sampled bytes: yields the prompt, then the text that each adds."""
    yield prompt.decode(errors="replace")
    device = model.embedding.weight.device
    tokens = torch.tensor([list(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    options = args.temperature, args.top_k, generator, cache, device.type == "cuda"
    for i, new in enumerate(model.stream(tokens, n_tokens, *options)):
        yield text.decode(bytes(new[0].tolist()), final=i == n_tokens - 1)  # waits for the GPU


def read_prompt(args, n_ranks):
    """(the prompt as bytes, how many tokens the cache is for)"""
    check_numbers(args)
    file, prompt = args.prompt_file, b""
    if file == "-" and n_ranks > 1:
        raise ValueError("--prompt_file=-: only one of several processes has the standard input; give a file")
    try:
        if file is not None:
            prompt = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"--prompt_file={file}: {error.strerror}; name a file of text") from error
    prompt += os.fsencode(args.generate or "")
    if not prompt:
        raise ValueError("the prompt has 0 bytes; give 1 or more by --generate or --prompt_file")
    need = len(prompt) + args.max_tokens
    room = args.cache_tokens or need
    if room < need:
        sizes = f"the prompt has {len(prompt)} bytes and --max_tokens={args.max_tokens}"
        raise ValueError(f"{sizes}; they do not fit into --cache_tokens={room}")
    return prompt, room


def find_checkpoint(out):
    """--out if it is a file, else the newest checkpoint in that run folder, or under runs/."""
    folders = run_folders(out)
    if not folders:
        raise ValueError("no checkpoint under runs/; train one, or name a run folder or a file with --out")
    return next(iter(checkpoints(folders[0])), folders[0])


def generate(args):
    """Continue a prompt, on all ranks; rank 0 prints. A signal to any of them, or the end of whoever reads
    the text, ends all, with the exit code that shells know. Raises ValueError on every rank."""
    world, device = ring_attn.resolve_ring(None), device_of(args)
    prompt, room = on_every_rank(world, read_prompt, args, world.n_ranks, **vars(args))
    file = world.gather(on_every_rank(world, find_checkpoint, args.out))[0]  # a run may write a newer one now
    model = on_every_rank(world, load_sampler, file, args, world)
    if world.rank == 0 and room > model.config.seq_len:
        print(f"note: up to {room} tokens; the model was trained on {model.config.seq_len}", file=sys.stderr)
    cache = model.new_cache(1, room)
    clocks, number = [], 0  # when the prompt and each byte was printed; the signal that ends this
    with Interrupt() as interrupt:
        for piece in continue_text(model, prompt, args.max_tokens, args, cache):
            number = interrupt.asked if world.rank > 0 or show(piece) else signal.SIGPIPE
            if world.n_ranks > 1:
                number = all_reduce(torch.tensor(number, device=device), world, dist.ReduceOp.MAX).item()
            clocks.append(time.perf_counter())
            if number:
                break
    if number == signal.SIGPIPE:
        sys.exit(0 if world.n_ranks > 1 else 128 + number)  # torchrun tells of other codes in 30 lines
    if world.rank == 0:
        show("\n")
        if number:
            print("(interrupted)", file=sys.stderr)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        speed = speed_of(clocks, len(prompt), cache)
        print(f"{file} | {world.n_ranks} x {name}, {args.dtype} | {speed}", file=sys.stderr, flush=True)
    if number:
        sys.exit(128 + number)


def speed_of(clocks, n_prompt, cache):
    first = clocks[min(1, len(clocks) - 1)] - clocks[0] or math.nan
    line = f"prefill {n_prompt} tokens in {1e3 * first:.1f} ms, {n_prompt / first:,.0f} tokens/s"
    line += " (the first kernels are compiled meanwhile)" * cache.lengths.is_cuda
    rest = clocks[3:]  # the first two steps compile and capture
    if len(rest) > 1:
        dt = (rest[-1] - rest[0]) / (len(rest) - 1)
        per_token = sum(2 * x[:1].numel() * x.element_size() for x in cache.k)
        length = n_prompt + len(clocks) - 1 - len(rest) / 2  # on average
        line += f" | decode {1e3 * dt:.2f} ms per token, {1 / dt:,.0f} tokens/s"
        line += f", KV {length * per_token / dt / 1e9:.3g} GB/s"
    return line


# -----------------------------------------------------------------------------
# the script


def setup(args):
    """Join the processes that torchrun started, if it did."""
    env, device = os.environ, device_of(args)
    cuda, local_size = args.device == "cuda", int(env.get("LOCAL_WORLD_SIZE", 1))
    if cuda:
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda: torch sees no GPU here; use --device=cpu")
        if local_size > (n := torch.cuda.device_count()):
            raise ValueError(f"{local_size} processes, {n} GPUs; lower --nproc_per_node or use --device=cpu")
        torch.cuda.set_device(device)
        torch.autograd.set_multithreading_enabled(False)  # one GPU: this thread launches the backward faster
    if "RANK" not in env:
        return
    wait, options = datetime.timedelta(seconds=getattr(args, "timeout", 600)), {}  # bench.py has no such flag
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # This store outlives the processes, with the addresses of those that torchrun has replaced. Hosts may
        # count restarts differently: README.md's command for several hosts does without it
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=wait)
        store = dist.PrefixStore(f"start {env['TORCHELASTIC_RESTART_COUNT']}", store)
        options = dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))
    backend, device_id = ("nccl", device) if cuda else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id, timeout=wait, **options)


def from_distributed(error):
    """Does an error, or its cause, come from torch.distributed? gloo's are plain RuntimeErrors."""
    known = isinstance(error, dist.DistError) or "gloo/" in str(error)
    return known or error.__cause__ is not None and from_distributed(error.__cause__)


def run_script(name, f, less):
    """Run the body of a script. A ValueError is the same on every rank: rank 0 prints it, the exit code is 2.
    less: what takes less memory, should it run out."""
    try:
        f()
    except ValueError as error:
        if RANK == 0:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        else:  # torchrun ends all when one fails: let rank 0 speak first
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
            time.sleep(10)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(" Including")[0]
        print(f"{name}: rank {RANK} is out of memory; use {less}. {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if not (dist.is_initialized() and from_distributed(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, until the lost rank is named
        said = str(error)
        if error.__cause__ is None:  # else it is ring_attn's, and names the lost ranks
            # other ranks fail within seconds, too: those that are there answer
            lost = ring_attn.missing_ranks(seconds=10 if "imed out" in said else 2)
            what = f"rank(s) {lost}: died, stopped or stuck" if lost else f"a connection: {said}"
            said = f"rank {RANK} lost {what}"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        os._exit(1)  # to end the process group might take the lost ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main():
    args = parse()
    setup(args)
    train(args) if wants_training(args) else generate(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show
    less = "more processes, fewer tokens, or in training --checkpoint, --accumulate, --fsdp"
    run_script("train.py", main, less)
