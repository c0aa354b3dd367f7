"""Train a small causal transformer on text read as bytes, one sequence over all processes.

    python train.py                                         # one GPU, or this laptop's CPU
    torchrun --nproc_per_node=2 train.py                    # a ring of two
    torchrun --nproc_per_node=8 train.py --seq_len=262144   # eight GPUs, 32k tokens each
    python train.py --data=my/texts --out=runs/mine --steps=2000
    python train.py --out=runs/mine --resume                # goes on where runs/mine stopped, with its flags, batch for batch

Every rank holds all weights and 1/n of every sequence, laid out by --schedule. The only text a rank reads is the bytes
at its own positions and the ones after them, the labels, wherever the layout puts those tokens.
"""

import argparse
import datetime
import json
import math
import os
import resource
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

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


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=lambda prog: HelpFormatter(prog, max_help_position=24, width=120))
    sized = lambda name: f"{SIZES['cpu'][name]} on a CPU, {SIZES['cuda'][name]} on a GPU"
    g = p.add_argument_group("run")
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
    g.add_argument("--sample_tokens", type=int, default=200, help="bytes of text to generate at the end")
    g = p.add_argument_group("model")
    g.add_argument("--seq_len", type=int, help=f"tokens per sequence, over all ranks ({sized('seq_len')})")
    g.add_argument("--batch_size", type=int, help=f"sequences per step ({sized('batch_size')})")
    g.add_argument("--n_layers", type=int, help=sized("n_layers"))
    g.add_argument("--dim", type=int, help=f"width ({sized('dim')})")
    g.add_argument("--dim_per_head", type=int, help=sized("dim_per_head"))
    g.add_argument("--n_kv_heads", type=int, help=f"key/value heads ({sized('n_kv_heads')})")
    g.add_argument("--dropout", type=float, default=0.0, help="on the outputs of attention and MLP")
    g.add_argument("--schedule", default="zigzag", choices=[t.value for t in AttentionType], help="attention; sdpa and flash: one process only")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=float, help=f"peak learning rate ({sized('lr')})")
    g.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up; a cosine to a tenth of --lr follows")
    g.add_argument("--weight_decay", type=float, default=0.1, help="on matrices")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g = p.add_argument_group("device")
    g.add_argument("--transport", default=None, choices=list(ring_attn.TRANSPORTS), help="how keys get from rank to rank (the fastest that the machine has)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"], help="where to run")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help=f"of products; weights stay float32 ({sized('dtype')})")
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
    for name in ("steps", "seq_len", "batch_size", "n_layers", "dim", "dim_per_head", "n_kv_heads", "log_every", "eval_every", "eval_batches", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be 1 or more")
    for name in ("warmup", "weight_decay", "sample_tokens"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}={getattr(args, name)} must be 0 or more")
    if not 0 < args.lr < math.inf or not args.clip > 0 or not args.weight_decay < math.inf:
        raise ValueError(f"--lr={args.lr} and --clip={args.clip} must be numbers above 0, --weight_decay={args.weight_decay} one from 0 up")
    if not 0 <= args.seed < 2**23:
        raise ValueError(f"--seed={args.seed} must be in 0..{2**23 - 1}")
    if args.stop_after is not None and args.stop_after <= start:
        raise ValueError(f"--stop_after={args.stop_after} must be above {start}, the steps already done")
    if not AttentionType(args.schedule).is_ring:
        if n_ranks > 1:
            raise ValueError(f"--schedule={args.schedule} works on whole sequences in one process, this run has {n_ranks}; use zigzag")
    elif args.seq_len % n_ranks:
        fits = n_ranks * ring_attn.SCHEDULES[args.schedule].T_multiple
        raise ValueError(f"--seq_len={args.seq_len} must be a multiple of the {n_ranks} processes; use {args.seq_len // fits * fits or fits}")
    else:
        ring_attn.check_schedule(args.schedule, n_ranks, args.seq_len // n_ranks, args.batch_size)


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


def get_batch(data, batch_size, seq_len, pos, key, device):
    """Tokens and targets (B, T) at global positions pos (1 or B, T). The batch follows from `key` alone, so all ranks
    pick the same sequences, and a resumed run the next ones."""
    start = np.random.default_rng(key).integers(0, len(data) - seq_len, size=(batch_size, 1))
    tokens, targets = (torch.from_numpy(data[start + pos + shift].astype(np.int64)) for shift in (0, 1))
    if device.type == "cuda":
        return tokens.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return tokens, targets


# -----------------------------------------------------------------------------
# run folder


def choose_out(args):
    """The run folder; ValueError where this would overwrite a run, or there is nothing to resume."""
    if args.out is None and args.resume:
        found = sorted(Path("runs").glob("*/ckpt.pt"), key=lambda f: f.stat().st_mtime)
        if not found:
            raise ValueError("--resume: no checkpoint under runs/; name the run folder with --out")
        return found[-1].parent
    out = Path(args.out or datetime.datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
    if args.resume and not (out / "ckpt.pt").exists():
        raise ValueError(f"--resume: {out / 'ckpt.pt'} does not exist; leave --resume out to start a run there")
    if not args.resume and (out / "ckpt.pt").exists():
        raise ValueError(f"--out={out} already holds a checkpoint; add --resume to go on with it, or name another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; name a folder")
    return out


def save_checkpoint(file, **state):
    tmp = file.with_suffix(".tmp")
    try:
        torch.save(state, tmp)
        os.replace(tmp, file)  # whole or not at all
    except (OSError, RuntimeError) as error:  # a full disk, say; the previous checkpoint stays
        tmp.unlink(missing_ok=True)
        raise ValueError(f"cannot write {file}: {error}") from error


# a resumed run takes these from its checkpoint where they are not given; the first ones cannot be changed
FIXED = ("batch_size", "seed", "seq_len", "n_layers", "dim", "dim_per_head", "n_kv_heads", "dropout")
KEPT = (*FIXED, "data", "steps", "schedule", "lr", "warmup", "weight_decay", "clip", "dtype", "log_every", "eval_every", "eval_batches", "save_every", "sample_tokens")


def load_checkpoint(file, args):
    """The saved state, and its flags into args; ValueError if it is no checkpoint, or of another model or batch sequence."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved = {name: state["args"][name] for name in KEPT}
        state["model"], state["optimizer"], state["text"], state["step"]
    except Exception as error:
        raise ValueError(f"{file} is not a checkpoint of train.py: {type(error).__name__} {str(error)[:100]}") from error
    differ = [f"{name} is {saved[name]} there and {getattr(args, name)} here" for name in FIXED if name in args.given and getattr(args, name) != saved[name]]
    if differ:
        raise ValueError(f"{file} is of another run: {'; '.join(differ)}; leave these flags out, or start anew with another --out")
    for name in KEPT:
        if name not in args.given:
            setattr(args, name, saved[name])
    return state


class Log:
    """Prints on rank 0 and keeps a copy in the run folder, which opens with all that is needed to repeat the run."""

    def __init__(self, out, rank, args, n_ranks):
        self.file = None
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.file = open(out / "log.txt", "a")
            for name in ("train.py", "model.py", "ring_attn.py", "decode.py"):
                self.file.write(f"==== {name}\n{Path(__file__).with_name(name).read_text()}\n")
            self.file.write(f"==== {sys.argv}\n{json.dumps(vars(args))}\nn_ranks {n_ranks}, python {sys.version.split()[0]}, torch {torch.__version__}\n")

    def __call__(self, line):
        if self.file:
            print(line, flush=True)
            self.file.write(line + "\n")
            self.file.flush()


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


def train(args, group=None):
    """Run a training as the flags say, on the processes of `group` (None: all, or this one alone).

    Returns the loss of every step as floats, and the last validation loss. Raises ValueError on every rank.
    """
    ring = ring_attn.resolve_ring(group, args.transport)
    rank, n_ranks = ring.rank, ring.n_ranks
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0))) if args.device == "cuda" else torch.device("cpu")

    def together(f, **same):
        """Run f on this rank; ValueError on every rank if it failed on any, or if the values of `same` differ."""
        result, problem = None, None
        try:
            result = f()
        except (ValueError, OSError) as error:
            problem = str(error)
        ring.agree({name: repr(value) for name, value in same.items()}, problem)
        return result

    together(lambda: None, **vars(args))
    out = [together(lambda: choose_out(args) if rank == 0 else None)]
    if n_ranks > 1:
        dist.broadcast_object_list(out, src=dist.get_global_rank(ring.group, 0), group=ring.group)
    out, start = out[0], 0
    if args.resume:
        state = together(lambda: load_checkpoint(out / "ckpt.pt", args))
        start = state["step"]
    together(lambda: check_args(args, n_ranks, start), start=start)
    attn_type = AttentionType(args.schedule)
    config = Config(256, args.n_layers, args.dim, args.dim_per_head, args.n_kv_heads, args.seq_len, args.dropout)
    torch.manual_seed(args.seed)
    together(lambda: None if n_ranks == 1 or not attn_type.is_ring else ring.settle(device))
    model = together(lambda: Transformer(config, rank, n_ranks, attn_type, ring)).to(device)

    one_per_host = rank == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0
    file = together(lambda: prepare_data(args.data, out, one_per_host, args.resume))
    train_data, val_data = together(lambda: open_data(file, args.seq_len))
    text = fingerprint(train_data)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def restore():
        if state["text"] != text:
            raise ValueError(f"{file} is not the text that {out / 'ckpt.pt'} was trained on; give that one as --data, or start anew with another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group_, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0)):
            group_["weight_decay"] = decay  # the flag's, should it have changed

    together(restore if args.resume else lambda: None, text=text)
    state = None  # a whole checkpoint: free its memory
    log = together(lambda: Log(out, rank, args, n_ranks))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads per process"
    n_params = sum(p.numel() for p in model.parameters())
    log(f"{n_ranks} x {name} | torch {torch.__version__} | {args.schedule}, {args.seq_len} tokens x {args.batch_size}, {args.dtype}")
    if n_ranks > 1:
        log(f"keys and gradients move by {ring.transport}: {ring.why}")
    log(f"{n_params:,} parameters | {len(train_data):,} + {len(val_data):,} bytes of text | {out}" + (f" | resumed at step {start}" if start else ""))

    T = args.seq_len // n_ranks
    pos = ring_attn.positions(args.schedule if attn_type.is_ring else "contiguous", rank, n_ranks, T, args.batch_size).numpy()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    flops_per_token = model.flops_per_token(args.seq_len)
    peak = next((f for known, f in PEAK_FLOPS.items() if known in name), None) if args.dtype == "bfloat16" else None
    sum_ranks = (lambda x: dist.all_reduce(x, group=ring.group)) if n_ranks > 1 else (lambda x: None)

    def evaluate():
        """Mean validation loss in nats per byte, over the same batches every time, by all ranks."""
        model.eval()
        total = torch.zeros((), device=device)
        with torch.no_grad(), amp:
            for i in range(args.eval_batches):
                total += model(*get_batch(val_data, args.batch_size, args.seq_len, pos, (args.seed, 1, i), device))
        sum_ranks(total)
        model.train()
        return total.item() / args.eval_batches / n_ranks

    def batch(step):
        return get_batch(train_data, args.batch_size, args.seq_len, pos, (args.seed, 0, step), device)

    losses, val_loss = [], None
    stop = min(args.steps, args.stop_after or args.steps)
    following = batch(start) if start < stop else None
    clock, clock_step = time.perf_counter(), start
    for step in range(start, stop):
        lr = learning_rate(step, args)
        for group_ in optimizer.param_groups:
            group_["lr"] = lr
        if args.dropout:
            torch.manual_seed((args.seed << 40) + (step << 12) + rank)  # so that a resumed run draws the same masks
        with amp:
            loss = model(*following)
        (loss / n_ranks).backward()  # shards are equal: the mean over all tokens is the mean of the ranks' means
        following = batch(step + 1)  # read while the GPU is busy
        if n_ranks > 1:
            for work in [dist.all_reduce(p.grad, group=ring.group, async_op=True) for p in model.parameters()]:
                work.wait()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.detach() / n_ranks
        sum_ranks(loss)
        losses.append(loss)

        done = step + 1
        if done % args.log_every == 0 or done == stop or done == start + 1:
            value = loss.item()
            dt = (time.perf_counter() - clock) / (done - clock_step)
            tokens = args.batch_size * args.seq_len / dt
            mfu = f"{100 * flops_per_token * tokens / (peak * n_ranks):.1f}%" if peak else "n/a"
            eta = str(datetime.timedelta(seconds=int(dt * (args.steps - done))))
            log(f"step {done:05d}/{args.steps:05d} | loss {value:.4f} | lr {lr:.1e} | dt {1000 * dt:.1f}ms | tok/s {tokens:,.0f} | mfu {mfu} | "
                f"mem {memory(device):.1f}GiB | eta {eta}")  # fmt: skip
            clock, clock_step = time.perf_counter(), done
        evaluating, saving = done % args.eval_every == 0 or done == args.steps, done % args.save_every == 0 or done == stop
        if device.type == "cuda" and (evaluating or saving):
            torch.cuda.synchronize()  # what still runs belongs to the steps, not to the pause
        pause = time.perf_counter()
        if evaluating:
            val_loss = evaluate()
            log(f"step {done:05d}/{args.steps:05d} | validation loss {val_loss:.4f} nats per byte")
        if saving:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=done, text=text, args=vars(args))
            together(lambda: save_checkpoint(out / "ckpt.pt", **state) if rank == 0 else None)
        clock += time.perf_counter() - pause  # evaluation and saving stay out of tok/s

    if stop == args.steps and args.sample_tokens and rank == 0:
        sampler = Transformer(config).to(device).eval()  # the whole sequence on this rank
        sampler.load_state_dict(model.state_dict())
        prompt = torch.tensor([list(b"def ")], device=device)
        with amp:
            generated = sampler.generate(prompt, args.sample_tokens, generator=torch.Generator(device).manual_seed(args.seed))
        log("---- sample\n" + bytes(generated[0].tolist()).decode(errors="replace") + "\n----")
    log(f"checkpoint in {out / 'ckpt.pt'}" + ("" if stop == args.steps else f"; stopped after step {stop}, --resume goes on"))
    return [x.item() for x in losses], val_loss


def setup(args):
    """Join the processes that torchrun started, if it did."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device=cuda: torch sees no GPU here; use --device=cpu")
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} processes but {torch.cuda.device_count()} GPUs; lower --nproc_per_node, or use --device=cpu")
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ:
        cuda = args.device == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device("cuda", local_rank) if cuda else None)


def run_script(name, f):
    """Run the body of a script, which raises its ValueErrors on every rank alike: one of them tells, and the exit code is 2."""
    try:
        f()
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        ring_attn.leave_groups()


if __name__ == "__main__":
    args = parse()
    run_script("train.py", lambda: (setup(args), train(args)))
