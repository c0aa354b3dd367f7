"""Train a small causal transformer on text read as bytes, its sequences sharded over rings of processes.

    python train.py                                         # one GPU, or this laptop's CPU
    torchrun --nproc_per_node=2 train.py                    # a ring of two
    torchrun --nproc_per_node=8 train.py --seq_len=262144   # eight GPUs, 32k tokens each
    torchrun --nproc_per_node=8 train.py --ring_size=4 --fsdp --checkpoint --accumulate=2   # two rings of four, and less memory
    python train.py --data=my/texts --out=runs/mine --steps=2000
    python train.py --out=runs/mine --resume                # goes on where runs/mine stopped, with its flags, batch for batch
    torchrun --max-restarts=3 --nproc_per_node=8 train.py   # goes on by itself when a process is lost

The processes are a mesh (data, ring). Each of the rings takes its part of the batch; in a ring of n every rank holds 1/n of
every sequence, laid out by --schedule, and reads only the bytes at its own positions and the ones after them, the labels.
Weights and optimizer are whole on every rank, or sharded over all of them with --fsdp; gradients are summed over all.

What is random follows from --seed and the number of the step: batches, and the masks of dropout. So a checkpoint needs to
hold no more than weights, optimizer, step and flags to go on to the bit; it fits any number of ranks, rings and shards.
"""

import argparse
import csv
import datetime
import hashlib
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

import ring_attn
from model import AttentionType, Config, Transformer

# -----------------------------------------------------------------------------
# settings

# what depends on the device: a model that learns something in two minutes on two cores, and one worth a GPU
SIZES = {
    "cpu": dict(seq_len=256, batch_size=8, n_layers=4, dim=128, dim_per_head=32, n_kv_heads=2, steps=400, lr=2e-3, dtype="float32"),
    "cuda": dict(seq_len=65536, batch_size=2, n_layers=12, dim=1024, dim_per_head=128, n_kv_heads=2, steps=500, lr=6e-4, dtype="bfloat16"),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, by name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default that depends on the device is told in words
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _format_args(self, action, default_metavar):  # short, so that every flag is one line
        return "" if action.nargs == 0 else {int: "N", float: "X"}.get(action.type, "NAME" if action.choices else "PATH")


def parse(argv=None):
    p = argparse.ArgumentParser(
        usage="train.py [flags]   (--help lists them)", description=__doc__.split("\n")[0], add_help=False, formatter_class=lambda prog: HelpFormatter(prog, max_help_position=24, width=120)
    )
    sized = lambda name: f"{SIZES['cpu'][name]} on a CPU, {SIZES['cuda'][name]} on a GPU"
    g = p.add_argument_group("run")
    g.add_argument("-h", "--help", action="help", help="print this")
    g.add_argument("--data", default=None, help="text to learn: a file or a folder (the source of Python's standard library)")
    g.add_argument("--out", default=None, help="run folder for the checkpoint and the log (a new one under runs/)")
    g.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out (the newest under runs/)")
    g.add_argument("--steps", type=int, help=f"optimizer steps ({sized('steps')})")
    g.add_argument("--stop_after", type=int, default=None, help="save and stop after this step, as if interrupted there")
    g.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    g.add_argument("--log_every", type=int, default=10, help="steps between log lines")
    g.add_argument("--eval_every", type=int, default=100, help="steps between evaluations; one more at the end")
    g.add_argument("--eval_batches", type=int, default=8, help="batches per evaluation")
    g.add_argument("--save_every", type=int, default=100, help="steps between checkpoints; one more at the end")
    g.add_argument("--keep", type=int, default=2, help="checkpoints to keep; while one is written there is one more")
    g.add_argument("--sample_tokens", type=int, default=200, help="bytes of text to generate at the end")
    g = p.add_argument_group("model")
    g.add_argument("--seq_len", type=int, help=f"tokens per sequence, over all ranks ({sized('seq_len')})")
    g.add_argument("--batch_size", type=int, help=f"sequences per step ({sized('batch_size')})")
    g.add_argument("--n_layers", type=int, help=sized("n_layers"))
    g.add_argument("--dim", type=int, help=f"width ({sized('dim')})")
    g.add_argument("--dim_per_head", type=int, help=sized("dim_per_head"))
    g.add_argument("--n_kv_heads", type=int, help=f"key/value heads ({sized('n_kv_heads')})")
    g.add_argument("--dropout", type=float, default=0.0, help="on the outputs of attention and MLP")
    g.add_argument("--schedule", default="zigzag", choices=[t.value for t in AttentionType], help="%(choices)s; the first two without rings")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=float, help=f"peak learning rate ({sized('lr')})")
    g.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up; a cosine to a tenth of --lr follows")
    g.add_argument("--weight_decay", type=float, default=0.1, help="on matrices")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g = p.add_argument_group("processes and memory")
    g.add_argument("--ring_size", type=int, default=None, help="processes that share a sequence; the rings share a batch (one ring of all)")
    g.add_argument("--accumulate", type=int, default=1, help="micro batches that a ring splits its part of the batch into")
    g.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer over all processes")
    g.add_argument("--checkpoint", action="store_true", help="keep attention's results of a layer, compute the rest again in the backward")
    g.add_argument("--compile", action="store_true", help="compile the layers")
    g.add_argument("--timeout", type=int, default=600, help="seconds to wait for another rank before the run ends with an error")
    g.add_argument("--profile", type=int, default=0, help="steps, after the first three, to trace into trace.json in the run folder")
    g.add_argument("--transport", default=None, choices=list(ring_attn.TRANSPORTS), help="how keys move in a ring, %(choices)s (the fastest that the machine has)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"], help="%(choices)s")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help=f"of products, %(choices)s; weights stay float32 ({sized('dtype')})")
    args = p.parse_args(argv)
    unset = object()  # argparse fills in defaults only where the namespace has no value yet
    marked = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    args.given = sorted(name for name, value in vars(marked).items() if value is not unset)
    args.data = args.data and os.path.abspath(args.data)  # a resumed run may start elsewhere
    for name, value in SIZES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_args(args, n_ranks, start):
    for name in ("steps", "seq_len", "batch_size", "n_layers", "dim", "dim_per_head", "n_kv_heads", "log_every", "eval_every", "eval_batches", "save_every",
                 "keep", "ring_size", "accumulate", "timeout"):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be 1 or more")
    for name in ("warmup", "weight_decay", "sample_tokens", "profile"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}={getattr(args, name)} must be 0 or more")
    if not 0 < args.lr < math.inf or not args.clip > 0 or not args.weight_decay < math.inf:
        raise ValueError(f"--lr={args.lr} and --clip={args.clip} must be numbers above 0, --weight_decay={args.weight_decay} one from 0 up")
    if not 0 <= args.seed < 2**23:
        raise ValueError(f"--seed={args.seed} must be in 0..{2**23 - 1}")
    if args.stop_after is not None and args.stop_after <= start:
        raise ValueError(f"--stop_after={args.stop_after} must be above {start}, the steps already done")
    R = args.ring_size
    if n_ranks % R:
        raise ValueError(f"--ring_size={R} must divide the {n_ranks} processes; use {max(r for r in range(1, R) if n_ranks % r == 0)}, or start others")
    n_parts = n_ranks // R * args.accumulate
    if args.batch_size % n_parts:
        raise ValueError(
            f"--batch_size={args.batch_size} must be a multiple of {n_parts}, {n_ranks // R} rings x --accumulate={args.accumulate}; "
            f"use {-(-args.batch_size // n_parts) * n_parts}, a larger --ring_size, or a smaller --accumulate"
        )
    if not AttentionType(args.schedule).is_ring:
        if R > 1:
            raise ValueError(f"--schedule={args.schedule} works on whole sequences in one process, this run has {R} in a ring; use zigzag, or --ring_size=1")
    elif args.seq_len % R:
        fits = R * ring_attn.SCHEDULES[args.schedule].T_multiple
        raise ValueError(f"--seq_len={args.seq_len} must be a multiple of the {R} processes; use {args.seq_len // fits * fits or fits}")
    else:
        try:
            ring_attn.check_schedule(args.schedule, R, args.seq_len // R, args.batch_size // n_parts)
        except ValueError as error:
            raise ValueError(f"{error} (a ring gets B={args.batch_size // n_parts} of --batch_size={args.batch_size} at a time)") from error


# -----------------------------------------------------------------------------
# data: one long array of bytes on disk


def text_files(folder):
    """All files below a folder but hidden ones, in one order on every machine; of the standard library its own modules."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = (f for f in folder.rglob("*.py" if folder == stdlib else "*") if f.is_file())
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib"} if folder == stdlib else set()
    parts = {f: f.relative_to(folder).parts for f in files}
    return sorted((f for f, names in parts.items() if not skip & set(names) and not any(n.startswith(".") for n in names)), key=parts.get)


def prepare_data(path, out, write, keep):
    """The file to map: `path` itself, or for a folder its files joined into out/data.bin, by the one process told to
    write; keep: a resumed run goes on with the data.bin it has, whatever became of the folder."""
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
            for file in files:
                f.write(file.read_bytes())
        os.replace(out / "data.bin.tmp", joined)
    return joined


def open_data(file, seq_len):
    """(train, validation): the first 90% and the last 10% of the bytes, mapped, not read."""
    size, need = file.stat().st_size, seq_len + 1
    if size == 0:
        raise ValueError(f"--data: {file} is empty; name a file or a folder of text")
    split = min(size - size // 10, size - need)
    if split < need:
        raise ValueError(
            f"--data: {file} has {size} bytes, too few: training and validation need a sequence of --seq_len + 1 = {need} each; "
            f"use more text or a shorter --seq_len"
        )
    data = np.memmap(file, dtype=np.uint8, mode="r")
    return data[:split], data[split:]


def fingerprint(data):
    """Tells one text from another without reading all of it: size and checksum of both ends."""
    return [len(data), zlib.crc32(data[: 1 << 20].tobytes()), zlib.crc32(data[-(1 << 20) :].tobytes())]


def offsets(data, batch_size, seq_len, key):
    """Where the sequences of a batch begin, (B, 1). They follow from `key` alone, so all ranks pick the same ones, and a resumed run the next."""
    return np.random.default_rng(key).integers(0, len(data) - seq_len, size=(batch_size, 1))


def get_batch(data, start, pos, device):
    """Tokens and targets (B, T) at global positions pos (1 or B, T) of the sequences that begin at start (B, 1)."""
    tokens, targets = (torch.from_numpy(data[start + pos + shift].astype(np.int64)) for shift in (0, 1))
    if device.type == "cuda":
        return tokens.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return tokens, targets


# -----------------------------------------------------------------------------
# run folder: checkpoints, log.txt, metrics.csv


def checkpoint_file(folder, step):
    return Path(folder) / f"ckpt-{step:08d}.pt"


def checkpoints(folder, step=10**8 - 1):
    """The checkpoints in a run folder, newest first, up to a step: what is later was passed over."""
    return [f for f in sorted(Path(folder).glob("ckpt-*.pt"), reverse=True) if f <= checkpoint_file(folder, step)]


def launch():
    """Tells one torchrun from another, and is the same to the processes that it starts again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def choose_run(args, restarted):
    """(run folder, its newest whole checkpoint or None, what is wrong with newer ones); ValueError where this would overwrite
    a run, or there is nothing to resume. restarted: torchrun has started these processes again, they look for their run."""
    folders = [Path(args.out)] if args.out else [f.parent for f in Path("runs").glob("*/launch")]
    own = [f for f in folders if restarted and (f / "launch").exists() and (f / "launch").read_text() == launch()]
    if own:
        out = max(own, key=lambda f: (f / "launch").stat().st_mtime)
    elif args.resume:
        out = Path(args.out) if args.out else max(Path("runs").glob("*/ckpt-*.pt"), key=lambda f: f.stat().st_mtime, default=Path()).parent
        if not checkpoints(out):
            raise ValueError(f"--resume: no checkpoint in {out}; leave --resume out to start a run there" if args.out else
                             "--resume: no checkpoint under runs/; name the run folder with --out")  # fmt: skip
    else:
        out = Path(args.out or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out={out} is a file; name a folder")
        if checkpoints(out):
            raise ValueError(f"--out={out} already holds a checkpoint; add --resume to go on with it, or name another folder")
    refused = []
    for file in checkpoints(out):
        try:
            read_checkpoint(file)
            return out, file, refused
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise ValueError("; ".join(refused))
    return out, None, []


def whole(x, rank):
    """The tensors of a state, however deep, in the CPU memory of rank 0: put together from FSDP's shards, if any, by all ranks."""
    if isinstance(x, dict):
        return {name: whole(y, rank) for name, y in x.items()}
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x if not isinstance(x, torch.Tensor) else x.detach().cpu() if rank == 0 else None


def save_checkpoint(out, keep, **state):
    """Whole or not at all: under a temporary name, down to the disk, then renamed. The newest `keep` stay."""
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
            reason = reason.__context__  # torch.save stumbles once more over what it could not write
        raise ValueError(
            f"cannot write {file}: {reason}; {shutil.disk_usage(out).free / 2**20:,.1f} MiB are free there, "
            + (f"{left[0]} is whole: make room and --resume" if left else "and no checkpoint was written before")
        ) from error
    for old in checkpoints(out, state["step"])[keep:]:
        old.unlink(missing_ok=True)


# a resumed run takes these from its checkpoint where they are not given; the first ones cannot be changed, the last one goes with the number of ranks
FIXED = ("batch_size", "seed", "seq_len", "n_layers", "dim", "dim_per_head", "n_kv_heads", "dropout")
KEPT = (*FIXED, "data", "steps", "schedule", "lr", "warmup", "weight_decay", "clip", "dtype", "log_every", "eval_every", "eval_batches", "save_every", "sample_tokens",
        "keep", "accumulate", "fsdp", "checkpoint", "compile", "timeout", "ring_size")  # fmt: skip


def read_checkpoint(file):
    """What was saved; ValueError if it is no checkpoint, or not a whole one."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state["model"], state["optimizer"], state["text"], state["step"], state["n_ranks"], [state["args"][name] for name in KEPT]
    except Exception as error:
        raise ValueError(f"{file} is not a checkpoint of train.py, or not a whole one: {type(error).__name__} {str(error)[:100]}") from error
    return state


def load_checkpoint(file, args, n_ranks):
    """The saved state, and its flags into args; ValueError if it is no checkpoint, or of another model or batch sequence."""
    state = read_checkpoint(file)
    saved = state["args"]
    differ = [f"{name} is {saved[name]} there and {getattr(args, name)} here" for name in FIXED if name in args.given and getattr(args, name) != saved[name]]
    if differ:
        raise ValueError(f"{file} is of another run: {'; '.join(differ)}; leave these flags out, or start anew with another --out")
    for name in KEPT if n_ranks == state["n_ranks"] else KEPT[:-1]:
        if name not in args.given:
            setattr(args, name, saved[name])
    return state


def load_optimizer(optimizer, saved):
    """Saved state into the optimizer, of which every rank takes its shards under FSDP."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if isinstance(p, DTensor) and i in saved["state"]:
            cut = lambda x: distribute_tensor(x.to(p.device), p.device_mesh, p.placements) if x.shape == p.shape else x
            saved["state"][i] = {name: cut(x) for name, x in saved["state"][i].items()}
    optimizer.load_state_dict(saved)


def sources():
    """What runs: the commit, where there is one, with a hash of every file, in a line; and the files."""
    here, names = Path(__file__).parent, ("train.py", "model.py", "ring_attn.py", "decode.py")
    git = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD") + " with changes" * bool(git("status", "--porcelain", "--", *names))
    except OSError:  # no git here
        commit = ""
    files = {name: (here / name).read_text() for name in names}
    line = ", ".join([f"commit {commit or 'unknown'}", *(f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}" for name, text in files.items())])
    return line, "".join(f"==== {name}\n{text}" for name, text in files.items())


class Log:
    """Prints on rank 0 and keeps a copy in log.txt, which opens with all that is needed to repeat the run; numbers go to metrics.csv."""

    COLUMNS = "step", "loss", "val_loss", "lr", "grad_norm", "seconds_per_step", "tokens_per_second", "mfu", "memory_gib"

    def __init__(self, out, rank, args, n_ranks, start, device_name):
        self.file = None
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "launch").write_text(launch())
            self.file, self.table = open(out / "log.txt", "a+"), out / "metrics.csv"
            self.file.seek(0)
            version, files = sources()
            if version not in self.file.read():  # a resumed run has them there already, if nothing changed
                self.file.write(files)
            self.file.write(f"==== {sys.argv}\n{version}\n{json.dumps(vars(args))}\n")
            self.file.write(f"{n_ranks} x {device_name}, python {sys.version.split()[0]}, torch {torch.__version__}\n")
            rows = list(csv.reader(open(self.table))) if self.table.exists() else []
            rows = [row for row in rows[1:] if row[0].isdigit() and int(row[0]) <= start]  # what comes after is computed again
            with open(out / "metrics.tmp", "w", newline="") as f:
                csv.writer(f).writerows([self.COLUMNS, *rows])
            os.replace(out / "metrics.tmp", self.table)

    def __call__(self, line):
        if self.file:
            print(line, flush=True)
            try:
                self.file.write(line + "\n")
                self.file.flush()
            except OSError as error:  # a full disk ends a run where a checkpoint is due, on all ranks together
                print(f"log.txt: {error}", file=sys.stderr, flush=True)

    def numbers(self, **columns):
        if self.file:
            try:
                with open(self.table, "a", newline="") as f:
                    csv.writer(f).writerow([columns.get(name, "") for name in self.COLUMNS])
            except OSError as error:
                print(f"metrics.csv: {error}", file=sys.stderr, flush=True)


class Interrupt:
    """While this lasts, the first Ctrl-C or SIGTERM only asks for an end; the second one ends the process."""

    def __enter__(self):
        self.asked, self.before = None, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# -----------------------------------------------------------------------------
# training


def learning_rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def memory(device):  # GiB, the peak so far
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def make_mesh(args, n_ranks, device):
    """The mesh (data, ring) of all processes. The ranks of a ring are neighbours, on one host where it holds them."""
    grid = torch.arange(n_ranks).view(-1, args.ring_size)
    wait = datetime.timedelta(seconds=args.timeout)
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)[0] for ranks in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("data", "ring"))


def bins(seq_len):
    """Positions in up to 8 ranges, each as long as all before it: their ends."""
    return [seq_len >> k for k in range(7, -1, -1) if seq_len >> k]


def train(args, group=None):
    """Run a training as the flags say: on all processes, in rings of --ring_size, or on those of `group`, as one ring.

    Returns the loss of every step as floats, and the last validation loss. Raises ValueError on every rank.
    """
    world = ring_attn.resolve_ring(group)  # all ranks, to agree on things
    rank, n_ranks = world.rank, world.n_ranks
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" else torch.device("cpu")

    def together(f, **same):
        """Run f on this rank; ValueError on every rank if it failed on any, or if the values of `same` differ."""
        result, problem = None, None
        try:
            result = f()
        except (ValueError, OSError) as error:
            problem = str(error)
        world.agree({name: repr(value) for name, value in same.items()}, problem)
        return result

    together(lambda: None, **vars(args))
    restarted = any(world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))
    out, file, refused = world.gather(together(lambda: choose_run(args, restarted) if rank == 0 else None))[0]
    start = 0
    if file:
        state = together(lambda: load_checkpoint(file, args, n_ranks))
        start = state["step"]
    args.ring_size = n_ranks if args.ring_size is None else args.ring_size
    together(lambda: check_args(args, n_ranks, 0 if restarted else start), start=start)
    mesh = make_mesh(args, n_ranks, device) if n_ranks > args.ring_size else None
    ring = ring_attn.resolve_ring(mesh.get_group("ring") if mesh else world.group, args.transport)
    data_rank, n_rings = mesh.get_local_rank("data") if mesh else 0, n_ranks // args.ring_size
    attn_type = AttentionType(args.schedule)
    config = Config(256, args.n_layers, args.dim, args.dim_per_head, args.n_kv_heads, args.seq_len, args.dropout)
    torch.manual_seed(args.seed)
    together(lambda: None if ring.n_ranks == 1 or not attn_type.is_ring else ring.settle(device))
    model = together(lambda: Transformer(config, ring.rank, ring.n_ranks, attn_type, ring))

    one_per_host = rank == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0
    text_file = together(lambda: prepare_data(args.data, out, one_per_host, file is not None))
    train_data, val_data = together(lambda: open_data(text_file, args.seq_len))
    text = fingerprint(train_data)

    def restore():
        if state["text"] != text:
            raise ValueError(f"{text_file} is not the text that {file} was trained on; give that one as --data, or start anew with another --out")
        model.load_state_dict(state["model"])

    together(restore if file else lambda: None, text=text)
    for block in model.blocks:
        block.checkpoint = args.checkpoint
        if args.compile:
            block.forward = torch.compile(block.forward)
    sharded = args.fsdp and n_ranks > 1
    if sharded:
        for module in (*model.blocks, model):
            fully_shard(module, mesh=DeviceMesh.from_group(world.group, device.type))
            module.set_gradient_divide_factor(1.0)  # sums, as below without FSDP
            module.set_force_sum_reduction_for_comms(True)
    else:
        model.to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    if file:
        load_optimizer(optimizer, state["optimizer"])
        for group_, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0)):
            group_["weight_decay"] = decay  # the flag's, should it have changed
    state = None  # a whole checkpoint: free its memory
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads per process"
    log = together(lambda: Log(out, rank, args, n_ranks, start, name))
    for problem in refused:
        log(f"passed over: {problem}")
    n_params = sum(p.numel() for p in model.parameters())
    log(f"{n_ranks} x {name} | torch {torch.__version__} | {args.schedule}, {args.seq_len} tokens x {args.batch_size}, {args.dtype}")
    if n_rings > 1 or sharded:
        log(f"{n_rings} rings of {args.ring_size}" + f" | weights and optimizer sharded over {n_ranks}" * sharded)
    if ring.n_ranks > 1:
        log(f"keys and gradients move by {ring.transport}: {ring.why}")
    log(f"{n_params:,} parameters | {len(train_data):,} + {len(val_data):,} bytes of text | {out}" + (f" | resumed at step {start}" if start else ""))

    B, T = args.batch_size // (n_rings * args.accumulate), args.seq_len // args.ring_size  # of a micro batch, on this rank
    pos = ring_attn.positions(args.schedule if attn_type.is_ring else "contiguous", ring.rank, ring.n_ranks, T, B)
    ends = bins(args.seq_len)
    place = torch.bucketize(pos, torch.tensor(ends), right=True).to(device)  # whose range a position is in
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    flops_per_token = model.flops_per_token(args.seq_len)
    peak = next((f for known, f in PEAK_FLOPS.items() if known in name), None) if args.dtype == "bfloat16" else None
    sum_ranks = (lambda x: dist.all_reduce(x, group=world.group)) if n_ranks > 1 else (lambda x: None)

    def sequences(data, data_rank, *key):
        """Where the sequences of a ring begin, by micro batch."""
        start = offsets(data, args.batch_size, args.seq_len, (args.seed, *key))
        return start.reshape(args.accumulate, n_rings, B, 1)[:, data_rank]

    def micro_batches(data, *key):
        return [get_batch(data, start, pos.numpy(), device) for start in sequences(data, data_rank, *key)]

    def evaluate():
        """Mean validation losses in nats per byte by range of positions, and over all, on the same batches every time, by all ranks."""
        model.eval()
        total = torch.zeros(2, len(ends), device=device)
        with torch.no_grad():
            for i in range(args.eval_batches):
                for batch in micro_batches(val_data, 1, i):
                    with amp:
                        losses = model(*batch, each=True)  # (B, T)
                    for j in range(len(ends)):
                        total[:, j] += torch.stack([(losses * (place == j)).sum(), (place == j).expand_as(losses).sum()])
        sum_ranks(total)
        model.train()
        return (total[0] / total[1]).tolist(), (total[0].sum() / total[1].sum()).item()

    losses, val_loss, by_position, grad_norm, asked = [], None, None, None, False
    reports = deque()  # (step, loss, whether a rank was asked to end, and for each rank if something is not finite) that the host has not read yet

    def read_reports(leave):
        """On every rank alike: ValueError if a rank found something that is not finite."""
        nonlocal asked
        while len(reports) > leave:
            step, report = reports.popleft()
            loss, ending, *bad = report.tolist()
            losses.append(loss)
            asked |= ending > 0
            found = [r for r in range(n_ranks) if bad[r] and bad[r] == max(bad)]  # a loss before a gradient: in a ring that of one spoils all
            if found:
                r, have = found[0], checkpoints(out, step)
                starts = sequences(train_data, r // args.ring_size, 0, step).flatten().tolist()
                raise ValueError(
                    f"step {step + 1}: the {'loss' if bad[r] > 1 else 'gradient'} of rank {r} is not finite" + (f" (and that of {found[1:]})" if found[1:] else "")
                    + f"; its sequences begin at bytes {starts} of {text_file}; " + (f"{have[0]} is the last good checkpoint" if have else "no checkpoint was written yet")
                )  # fmt: skip

    stop = min(args.steps, args.stop_after or args.steps)
    following = micro_batches(train_data, 0, start) if start < stop else None
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=args.profile, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(out / "trace.json")),
    ) if args.profile and rank == 0 else None  # fmt: skip
    if profiler:
        profiler.start()
    clock, clock_step, done = time.perf_counter(), start, start
    with Interrupt() as interrupt:
        while done < stop and not asked:
            step, done = done, done + 1
            lr = learning_rate(step, args)
            for group_ in optimizer.param_groups:
                group_["lr"] = lr
            if args.dropout:
                torch.manual_seed((args.seed << 40) + (step << 12) + rank)  # so that a resumed run draws the same masks
            loss = torch.zeros((), device=device)
            for batch in following:
                with amp:
                    part = model(*batch) / (n_ranks * args.accumulate)  # shards are equal: the mean over all tokens is the mean of their means
                part.backward()
                loss += part.detach()
            following = micro_batches(train_data, 0, done)  # read while the GPU is busy
            grads = [p.grad for p in model.parameters()]
            norm = get_total_norm(grads)  # of what is on this rank: before the sum, as then all have the nan of one
            bad = 2 * ~loss.isfinite() + ~(norm.to_local() if sharded else norm).isfinite()
            if n_ranks > 1 and not sharded:
                for work in [dist.all_reduce(g, group=world.group, async_op=True) for g in grads]:
                    work.wait()
            grad_norm = clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report = torch.zeros(2 + n_ranks, device=device)
            report[0], report[1], report[2 + rank] = loss, bool(interrupt.asked), bad
            sum_ranks(report)
            reports.append((step, report))
            if profiler:
                profiler.step()

            logging = done % args.log_every == 0 or done == stop or done == start + 1
            evaluating, saving = done % args.eval_every == 0 or done == args.steps, done % args.save_every == 0 or done == stop
            # the report of a step is read when the next one is on its way to the GPU, so that it never waits for the host
            read_reports(leave=device.type == "cuda" and not (logging or evaluating or saving))
            if asked:
                saving = True
                read_reports(leave=0)
            if logging:
                dt = (time.perf_counter() - clock) / (done - clock_step)
                tokens = args.batch_size * args.seq_len / dt
                mfu = flops_per_token * tokens / (peak * n_ranks) if peak else None
                eta = str(datetime.timedelta(seconds=int(dt * (args.steps - done))))
                log(f"step {done:05d}/{args.steps:05d} | loss {losses[-1]:.4f} | lr {lr:.1e} | dt {1000 * dt:.1f}ms | tok/s {tokens:,.0f} | "
                    f"mfu {f'{100 * mfu:.1f}%' if mfu else 'n/a'} | mem {memory(device):.1f}GiB | eta {eta}")  # fmt: skip
                grad_norm = (grad_norm.full_tensor() if sharded else grad_norm).item()
                log.numbers(step=done, loss=losses[-1], lr=lr, grad_norm=grad_norm, seconds_per_step=dt, tokens_per_second=tokens, mfu=mfu, memory_gib=memory(device))
                clock, clock_step = time.perf_counter(), done
            if device.type == "cuda" and (evaluating or saving):
                torch.cuda.synchronize()  # what still runs belongs to the steps, not to the pause
            pause = time.perf_counter()
            if evaluating:
                by_position, val_loss = evaluate()
                log(f"step {done:05d}/{args.steps:05d} | validation loss {val_loss:.4f} nats per byte")
                log.numbers(step=done, val_loss=val_loss)
            if saving:
                state = dict(model=whole(model.state_dict(), rank), optimizer=whole(optimizer.state_dict(), rank), step=done, text=text, n_ranks=n_ranks, args=vars(args))
                together(lambda: save_checkpoint(out, args.keep, **state) if rank == 0 else None)
            clock += time.perf_counter() - pause  # evaluation and saving stay out of tok/s
    if profiler:
        profiler.stop()

    if by_position and done == args.steps:
        log("validation loss by position: " + " | ".join(f"{first}.. {x:.3f}" for first, x in zip([0, *ends], by_position)))
    if done == args.steps and args.sample_tokens:
        weights = whole(model.state_dict(), rank)
        if rank == 0:
            sampler = Transformer(config)  # the whole sequence on this rank
            sampler.load_state_dict(weights)
            sampler = sampler.to(device).eval()
            prompt = torch.tensor([list(b"def ")], device=device)
            with amp:
                generated = sampler.generate(prompt, args.sample_tokens, generator=torch.Generator(device).manual_seed(args.seed))
            log("---- sample\n" + bytes(generated[0].tolist()).decode(errors="replace") + "\n----")
    if asked:
        log(f"asked to end{f' by {interrupt.asked}' if interrupt.asked else ''}")
    log(f"checkpoint in {next(iter(checkpoints(out, done)), out)}" + ("" if done == args.steps else f"; stopped after step {done}, --resume goes on"))
    return losses, val_loss


def setup(args):
    """Join the processes that torchrun started, if it did."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda: torch sees no GPU here; use --device=cpu")
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node, or use --device=cpu")
        torch.cuda.set_device(local_rank)
        torch.autograd.set_multithreading_enabled(False)  # one GPU: launches of the backward take the host less from this thread
    if "RANK" in os.environ:
        cuda = args.device == "cuda"
        env, wait, named = os.environ, datetime.timedelta(seconds=getattr(args, "timeout", 600)), {}  # decode.py has no such flag
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives the processes, with the addresses of those that torchrun has replaced.
            # Several hosts may count their restarts differently: there README.md does without it
            store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=wait)
            store = dist.PrefixStore(f"start {env['TORCHELASTIC_RESTART_COUNT']}", store)
            named = dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))
        dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device("cuda", local_rank) if cuda else None, timeout=wait, **named)


def run_script(name, f, less):
    """Run the body of a script, which raises its ValueErrors on every rank alike: one of them tells, and the exit code is 2.
    less: what takes less memory, for those who run out of it."""
    rank = int(os.environ.get("RANK", 0))
    try:
        f()
    except ValueError as error:
        if rank == 0:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"{name}: rank {rank} is out of memory; use {less}. {str(error).split(' Including')[0]}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        ring_attn.leave_groups()


if __name__ == "__main__":
    args = parse()
    run_script("train.py", lambda: (setup(args), train(args)), "--checkpoint, --accumulate, --fsdp, more processes, or a smaller --seq_len")
