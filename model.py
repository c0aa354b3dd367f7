"""A small causal transformer whose attention runs on one GPU or on a ring of them.

Pre-norm blocks (RMSNorm), rotary position embedding at global positions, grouped-query attention, GELU MLP,
tied embeddings. Only attention mixes tokens, so each rank runs the model on its own shard:

    attn = Attention(dim, dim_per_head, seq_len, rank, n_ranks, dropout, causal, AttentionType.ZIGZAG)
    y = attn.unshard(attn(attn.shard(x)))     # x, y (B, S, dim) on every rank; S = seq_len, any number

    model = Transformer(Config())
    tokens = model.generate(prompt, 100)      # (B, S) -> (B, S + 100), through a cache of keys and values
    tokens = model.generate(padded, 100, mask=mask, stop=10)  # prompts of any lengths; each ends at token 10

Shapes: B batch, T tokens on this rank, H query heads, HKV key/value heads, D dim_per_head.
Sources: RoPE (arXiv 2104.09864), RMSNorm (1910.07467), GQA (2305.13245), tied embeddings (1608.05859).
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ring_attn
from decode import KVCache, capture_step, int_list, is_int


class AttentionType(Enum):
    SDPA = "sdpa"  # torch's own, on the whole sequence
    FLASH = "flash"  # our kernels, on the whole sequence
    _ignore_ = "schedule"
    for schedule in ring_attn.SCHEDULES:  # RING = "contiguous", STRIPED = "striped", ZIGZAG, STEP
        vars()[ring_attn.public_name(schedule).upper()] = schedule

    @property
    def is_ring(self):
        return self.value in ring_attn.SCHEDULES


LOGITS = 2**22  # logits that exist at once while a loss is computed
IGNORED = -100  # a target that has no loss, as in torch's cross_entropy


def rotary_table(positions, dim_per_head, theta):
    """cos and sin of the rotary angles at positions (1 or B, T): (1 or B, T, 1, D // 2) float32 each."""
    exponents = torch.arange(0, dim_per_head, 2, device=positions.device, dtype=torch.float64) / dim_per_head
    angles = positions[..., None, None] * theta**-exponents  # float32 has too few digits for position 1e6
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, heads, D): the pairs (x[i], x[i + D // 2]) turn by their angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over seq_len tokens: whole sequences (SDPA, FLASH), or a shard on each rank.
    Shards have seq_len / n_ranks tokens, or a few more: the end is padded to what the schedule needs.

    dim: width of x, a multiple of dim_per_head. n_kv_heads: key/value heads (default: one per query head).
    rope_theta: base of the rotary embedding; None for none. dropout: of the projected output.
    group: process group or Ring (default: all processes); copies share it, a pickle leaves it out.
    window, softcap, transport, deterministic: as for ring_attn.ring_attn; SDPA has no softcap.
    sinks: learn the sinks of ring_attn.ring_attn, 0 at first.
    attn_type may be changed at any time: weights do not depend on it.
    Raises ValueError for values that do not fit together.
    """

    def __init__(self, dim, dim_per_head, seq_len, rank, n_ranks, dropout, causal,
                 attn_type=AttentionType.FLASH, *, n_kv_heads=None, rope_theta=None, window=None, sinks=False,
                 softcap=None, group=None, transport=None, deterministic=True):  # fmt: skip
        super().__init__()
        if not isinstance(attn_type, AttentionType):
            raise ValueError(f"{attn_type=} must be an AttentionType: {', '.join(map(str, AttentionType))}")
        if dim < 1 or dim_per_head < 1 or dim % dim_per_head:
            raise ValueError(f"{dim=} must be a multiple of {dim_per_head=}")
        if seq_len < 1 or not 0 <= rank < n_ranks:
            raise ValueError(f"{seq_len=} must be 1 or more and {rank=} in 0..{n_ranks - 1}, as {n_ranks=}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{dropout=} must be in [0, 1)")
        if rope_theta is not None and dim_per_head % 2:
            raise ValueError(f"{dim_per_head=} must be even for rotary embeddings, or rope_theta=None")
        ring_attn.check_mask(causal, window, None, None, 1, seq_len, seq_len)
        ring_attn.check_softcap(softcap)
        if softcap and attn_type is AttentionType.SDPA:
            raise ValueError(f"{softcap=}, which SDPA has not; use AttentionType.FLASH")
        self.n_heads = dim // dim_per_head
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            made = f"n_heads={self.n_heads} (dim={dim} / dim_per_head={dim_per_head})"
            raise ValueError(f"{n_kv_heads=} must divide {made}; change one of the three")
        self.dim, self.dim_per_head, self.seq_len = dim, dim_per_head, seq_len
        self.rank, self.n_ranks, self.transport = rank, n_ranks, transport
        self.group = group and ring_attn.resolve_ring(group)  # without a group, before init_process_group too
        self.causal, self.attn_type, self.rope_theta = causal, attn_type, rope_theta
        self.window, self.softcap, self.deterministic = window, softcap, deterministic
        self.qkv_proj = nn.Linear(dim, (self.n_heads + 2 * self.n_kv_heads) * dim_per_head, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.o_drop = nn.Dropout(dropout)
        self.sinks = nn.Parameter(torch.zeros(self.n_heads)) if sinks else None  # None: not in the state dict

    def shard(self, x, pad_value=0):
        """This rank's tokens of x (B, S, ...), and of what pads its end; x itself under SDPA and FLASH."""
        if not self.attn_type.is_ring:
            return x
        schedule = self.attn_type.value
        return ring_attn.shard(x, schedule, self.rank, self.n_ranks, pad=True, pad_value=pad_value)

    def unshard(self, x):
        """The whole (B, S, ...) from every rank's shard, on every rank; x itself under SDPA and FLASH."""
        if not self.attn_type.is_ring or self.n_ranks == 1:
            return x
        return ring_attn.unshard(x, self.attn_type.value, self.group, seq_len=self.true_length(x.shape[1]))

    def true_length(self, T):
        """How many of n_ranks * T tokens are not padding: seq_len, if its shards have T tokens, else all."""
        multiple = ring_attn.length_multiple(self.attn_type.value, self.n_ranks)
        padded = -(-self.seq_len // multiple) * multiple
        return self.seq_len if self.n_ranks * T == padded else self.n_ranks * T

    def positions(self, B, T, device, cu_seqlens=None):
        """Positions of this rank's T tokens, (1 or B, T): in the sequence, or in their documents."""
        kind = self.attn_type
        shards = (kind.value, self.rank, self.n_ranks) if kind.is_ring else ("contiguous", 0, 1)
        return ring_attn.positions(*shards, T, B, device, cu_seqlens=cu_seqlens)

    def rotary(self, positions):
        return self.rope_theta and rotary_table(positions, self.dim_per_head, self.rope_theta)

    def sdpa(self, q, k, v, cu_seqlens):
        """torch's attention of q (B, S, H, D) to k, v (B, S, HKV, D): (B, S, H, D)."""
        if self.softcap:  # attn_type may have been changed
            raise ValueError(f"softcap={self.softcap}, which SDPA has not; use AttentionType.FLASH")
        S, D, bias = q.shape[1], q.shape[3], None
        if any(x is not None for x in (self.window, cu_seqlens, self.sinks)):
            starts = None if cu_seqlens is None else ring_attn.document_starts(cu_seqlens, S).to(q.device)
            pos, mask = torch.arange(S, device=q.device), ring_attn.make_mask(S, self.causal, self.window)
            first, last = (x.view(-1, 1, S, 1) for x in mask.keys(pos, starts))
            seen = (first <= pos) & (pos <= last)
            bias = q.new_zeros(()).where(seen, -math.inf)  # (1 or B, 1, S, S)
        if self.sinks is not None:  # the logits of one more key, whose value is 0
            sinks = self.sinks.to(q.dtype)[:, None, None].expand(len(bias), -1, S, 1)
            bias = torch.cat((bias.expand(-1, self.n_heads, -1, -1), sinks), dim=-1)  # (1 or B, H, S, S + 1)
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = dict(attn_mask=bias, is_causal=self.causal and bias is None, scale=D**-0.5)
        options["enable_gqa"] = self.n_heads != self.n_kv_heads
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    def forward(self, x, rotary=None, cache=None, layer=0, slots=None, prefill=False, cu_seqlens=None,
                seq_len=None):  # fmt: skip
        """x (B, T, dim) -> (B, T, dim). rotary: the rotary_table of x's positions, if the caller has it.

        cache: a KVCache whose last T tokens are those of x. Their keys and values for `layer` go to its slots
        (B, T), see KVCache.slots, and the queries see all that it holds. prefill: these sequences hold only
        x (on a ring: that of all ranks).
        cu_seqlens: of documents, as for ring_attn; not with a cache. seq_len: how many of the n_ranks * T
        tokens are not padding (default: see true_length; in a prefill all of them).
        """
        B, T, _ = x.shape
        heads = rearrange(self.qkv_proj(x), "b t (h d) -> b t h d", d=self.dim_per_head)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)  # (B, T, H or HKV, D)
        if self.rope_theta is not None:
            if rotary is None:
                rotary = self.rotary(self.positions(B, T, x.device, cu_seqlens))
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            cache.write(layer, k, v, slots)
        sm_scale = self.dim_per_head**-0.5
        options = dict(causal=self.causal, sm_scale=sm_scale, deterministic=self.deterministic)
        options |= dict(window=self.window, cu_seqlens=cu_seqlens, sinks=self.sinks, softcap=self.softcap)
        if cache is not None and not prefill:
            o = cache.attend(layer, q, sm_scale, self.window, self.sinks, self.softcap)
        elif self.attn_type is AttentionType.SDPA:
            o = self.sdpa(q, k, v, cu_seqlens)
        elif self.attn_type is AttentionType.FLASH:
            o = ring_attn.flash_attn_func(q, k, v, **options)
        else:
            R, r, func = self.n_ranks, self.rank, ring_attn.ATTN_FUNCS[self.attn_type.value]
            if seq_len is None:  # no token of a prompt sees the padding at its end
                seq_len = R * T if prefill else self.true_length(T)
            options |= dict(seq_len=seq_len, group=self.group, transport=self.transport)
            o = func(q, k, v, R, r, (r - 1) % R, (r + 1) % R, **options)
        return self.o_drop(self.o_proj(rearrange(o, "b t h d -> b t (h d)")))


def to_the_left(tokens, mask):
    """Move the tokens (B, S) where mask (B, S) is True to the left of their rows: (tokens, how many in each
    row). ValueError unless they are one run in each row."""
    S, device = tokens.shape[1], tokens.device
    is_tensor = isinstance(mask, torch.Tensor)
    like_bool = is_tensor and not mask.is_floating_point() and mask.shape == tokens.shape
    if not like_bool or (mask != mask.bool()).any():
        kind = f"{tuple(mask.shape)} {mask.dtype}" if is_tensor else type(mask).__name__
        need = f"must be bool, or ints of 0 and 1, of the shape of tokens, {tuple(tokens.shape)}"
        raise ValueError(f"mask ({kind}) {need}")
    mask, i = mask.to(device).bool(), torch.arange(S, device=device)
    tokens = tokens.masked_fill(~mask, 0)  # padding may be no token at all
    first, n = mask.int().argmax(1, keepdim=True), mask.sum(1, keepdim=True)
    wrong = (n == 0) | (mask != (first <= i) & (i < first + n)).any(1, keepdim=True)
    if wrong.any():
        rows = wrong[:, 0].nonzero()[:, 0].tolist()
        raise ValueError(f"rows {rows} of mask must each be True for one run of tokens, padded left or right")
    return tokens.gather(1, (first + i) % S), n[:, 0].tolist()


def checksum(x):
    """What ranks compare: of a tensor a hash, of anything else its text."""
    if not isinstance(x, torch.Tensor):
        return repr(x)
    return hashlib.blake2b(x.numpy(force=True).tobytes(), digest_size=8).hexdigest()


@dataclass
class Config:
    """The shape of a Transformer."""

    vocab_size: int = 256  # bytes
    n_layers: int = 4
    dim: int = 128
    dim_per_head: int = 32
    n_kv_heads: int = 2
    seq_len: int = 512  # tokens of the whole sequence, over all ranks
    dropout: float = 0.0
    rope_theta: float | None = 500_000.0  # None: no position embedding
    deterministic: bool = True  # as for ring_attn.ring_attn
    window: int | None = None  # tokens that a token sees, itself included; None: all
    sinks: bool = False  # a learned logit for each head in the softmax's denominator
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)


class Block(nn.Module):
    def __init__(self, c, rank, n_ranks, attn_type, group, transport):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        args = c.dim, c.dim_per_head, c.seq_len, rank, n_ranks, c.dropout, True, attn_type
        options = dict(n_kv_heads=c.n_kv_heads, rope_theta=c.rope_theta, deterministic=c.deterministic)
        options |= dict(window=c.window, sinks=c.sinks, softcap=c.softcap)
        self.attn = Attention(*args, **options, group=group, transport=transport)
        up, down = nn.Linear(c.dim, 4 * c.dim, bias=False), nn.Linear(4 * c.dim, c.dim, bias=False)
        self.mlp = nn.Sequential(up, nn.GELU(), down, nn.Dropout(c.dropout))
        self.checkpoint = False

    def forward(self, x, *args):  # (B, T, dim); args of Attention.forward
        if self.checkpoint and torch.is_grad_enabled():
            # keeps x and attention's o and lse: the backward computes the rest again, but moves no key twice
            kept = [torch.ops.ring_attn.forward.default]
            context = functools.partial(create_selective_checkpoint_contexts, kept)
            return checkpoint(self.body, x, *args, use_reentrant=False, context_fn=context)
        return self.body(x, *args)

    def body(self, x, *args):
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Causal language model. On a ring every rank holds all weights and runs its own tokens.

    config: a Config; rank, n_ranks, attn_type, group, transport: as for Attention.
    """

    def __init__(self, config, rank=0, n_ranks=1, attn_type=AttentionType.FLASH, group=None, transport=None):
        super().__init__()
        c = self.config = config
        if c.n_layers < 1 or c.vocab_size < 1:
            raise ValueError(f"n_layers={c.n_layers} and vocab_size={c.vocab_size} must be 1 or more")
        if isinstance(c.window, (tuple, list)):
            raise ValueError(f"window={c.window} must be an int or None: no token sees those after it")
        self.embedding = nn.Embedding(c.vocab_size, c.dim)  # also the output projection
        args = c, rank, n_ranks, attn_type, group, transport
        self.blocks = nn.ModuleList(Block(*args) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what is added to the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("o_proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.n_layers) ** 0.5 if residual else 0.02)

    def hidden(self, tokens, cache=None, rows=None, cu_seqlens=None):
        """tokens (B, T) -> input of the output projection (B, T, dim). rows: (B,) int64, the sequences of the
        cache that begin with them; None: they follow those in it. All else: as for Attention.forward."""
        x, attn = self.embedding(tokens), self.blocks[0].attn  # (B, T, dim)
        decoding = cache is not None and rows is None
        B, T = tokens.shape
        pos = cache.positions(T) if decoding else attn.positions(B, T, tokens.device, cu_seqlens)
        rotary, slots = attn.rotary(pos), None if cache is None else cache.slots(pos, rows)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer, slots, rows is not None, cu_seqlens)
        return self.norm(x)

    def forward(self, tokens, targets=None, reduction="mean", cu_seqlens=None):
        """tokens (B, T) int64 of this rank -> logits (B, T, vocab_size); with targets (B, T), a loss in nats.

        reduction: "mean" over the targets that are not -100, "sum", or "none": (B, T), 0 at a target of -100.
        cu_seqlens: of documents, as for ring_attn.ring_attn; positions restart at 0 in each. Padding and the
        last tokens of documents should have a target of -100.
        While a loss is computed, at most LOGITS logits exist. Raises ValueError for other reductions.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'{reduction=} must be "mean", "sum" or "none"')
        x = self.hidden(tokens, cu_seqlens=cu_seqlens)
        if targets is None:
            return F.linear(x, self.embedding.weight)
        rows = max(1, LOGITS // self.config.vocab_size)
        chunks = list(zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows)))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            losses = [self.token_losses(*chunk) for chunk in chunks]
        else:  # the backward computes the logits of a chunk again
            options = dict(use_reentrant=False, preserve_rng_state=False)
            losses = [checkpoint(self.token_losses, *chunk, **options) for chunk in chunks]
        losses = torch.cat(losses)
        if reduction == "none":
            return losses.view_as(targets)
        return losses.sum() if reduction == "sum" else losses.sum() / (targets != IGNORED).sum()

    def token_losses(self, x, targets):  # (N, dim), (N,) -> (N,) float32
        logits = F.linear(x, self.embedding.weight).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    def flops_per_token(self, seq_len, documents=None):
        """Training FLOPs per token: 6 per weight, and attention, whose backward is 2.5 forwards.

        documents: their lengths, a tensor, if tokens see their own only; sequences then begin anywhere in the
        joined documents, and cut those at their ends.
        """
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)  # embedding: as output projection
        most = min(self.config.window or seq_len, seq_len)
        keys = most - most**2 / (2 * seq_len)  # that a token sees on average
        if documents is not None:  # token i of one sees min(i, most), if the sequence begins before it
            n = documents.double()
            begun = n.clamp(max=most)
            keys = ((begun**2 / 2 - begun**3 / (6 * seq_len) + (n - begun) * keys).sum() / n.sum()).item()
        return 6 * weights + 3.5 * self.config.n_layers * 4 * keys * self.config.dim

    def ring_of_cache(self):
        """The ring whose ranks share a cache of this model. ValueError if its type does not fit a cache."""
        attn = self.blocks[0].attn
        R, kind = attn.n_ranks, attn.attn_type
        if R == 1:
            return ring_attn.ALONE
        if kind is not AttentionType.STRIPED:
            fix = "make the model with AttentionType.STRIPED"
            raise ValueError(f"attn_type={kind} does not fit a cache, which is striped on {R} ranks; {fix}")
        ring = ring_attn.resolve_ring(attn.group)
        if ring.n_ranks != R:
            other = f"its process group has {ring.n_ranks}"
            raise ValueError(f"the model is on {R} ranks, and {other}: pass its group")
        return ring

    def new_cache(self, B, n_tokens, dtype=None, **options):
        """An empty KVCache for B sequences of up to n_tokens tokens, striped over the ranks of the model.
        dtype: of KVCache; None: that of the model, or of autocast. options: its page_size and n_pages."""
        attn, weight = self.blocks[0].attn, self.embedding.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = dtype or (torch.get_autocast_dtype(kind) if autocast else weight.dtype)
        shape = len(self.blocks), B, n_tokens, attn.n_kv_heads, attn.dim_per_head
        return KVCache(*shape, dtype, weight.device, self.ring_of_cache(), **options)

    def check_tokens(self, tokens, cache):
        """Raise ValueError unless tokens are (B, M) int64, and the cache, if there is one, fits the model."""
        attn = self.blocks[0].attn
        is_tensor = isinstance(tokens, torch.Tensor)
        if not is_tensor or tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype != torch.int64:
            given = f"{tokens.dtype} {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
            raise ValueError(f"tokens ({given}) must be an int64 tensor (B, S), neither of them 0")
        if cache is not None:
            mine = len(self.blocks), attn.n_kv_heads, attn.dim_per_head, attn.n_ranks
            theirs = len(cache.k), *cache.k[0].shape[1:], cache.ring.n_ranks
            if mine != theirs:
                text = f"the cache is of (layers, heads, dim, ranks) {theirs}, and the model of {mine}"
                raise ValueError(f"{text}; make it with new_cache of this model")

    @torch.no_grad()
    def prefill(self, tokens, cache, lengths=None, rows=None):
        """Put prompts, tokens (B, S), the same on every rank, into empty sequences of the cache: the logits
        (B, vocab_size) after each prompt.

        lengths: tokens of each prompt, B ints from 1 to S; padding follows them; None: S. rows: the sequences
        of the cache that the prompts become, B ints; None: all. Other sequences may hold tokens.
        On a ring each rank runs 1/n of them, and the model's type must be STRIPED, as the cache is. Without
        gradients. Raises ValueError, on every rank, for another type, other lengths, a cache of another
        model, sequences that hold something, what the cache has no room for, arguments that differ by rank.
        """
        attn, ring, held = self.blocks[0].attn, self.ring_of_cache(), cache.host_lengths
        R = ring.n_ranks

        def check():
            nonlocal lengths, rows
            self.check_tokens(tokens, cache)
            B, S = tokens.shape
            lengths = [S] * B if lengths is None else int_list(lengths)
            rows = list(range(len(held))) if rows is None else int_list(rows)
            if len(lengths) != B or not all(is_int(n, 1, S) for n in lengths):
                raise ValueError(f"{lengths=} must be {B} ints from 1 to {S}, as the tokens are {B, S}")
            if not len(rows) == len(set(rows)) == B or not all(is_int(b, 0, len(held) - 1) for b in rows):
                need = f"must be {B} of the {len(held)} sequences of the cache, one a prompt"
                raise ValueError(f"{rows=} {need}")
            if any(held[b] for b in rows):
                have = f"sequences {rows} of the cache hold {[held[b] for b in rows]} tokens"
                raise ValueError(f"{have}; prefill wants empty ones: release them, or make another cache")

        same = dict(lengths=repr(lengths), rows=repr(rows), tokens=R > 1 and checksum(tokens))
        ring_attn.agree_now(ring, same, None, check)
        B = len(tokens)
        more = dict(zip(rows, lengths))
        more = [more.get(b, 0) for b in range(len(held))]
        cache.reserve(more)
        try:
            cache.extend(more)
            at = torch.tensor(rows, device=tokens.device)
            x = self.hidden(attn.shard(tokens), cache, at)
            last = cache.lengths[at].long() - 1  # (B,)
            x = x[torch.arange(B, device=x.device), last // R]  # (B, dim)
            if R > 1:  # only one rank has the last token of a prompt
                x = x.where((last % R == attn.rank)[:, None], 0)
                dist.all_reduce(x, group=cache.ring.group)
            return F.linear(x, self.embedding.weight)
        except BaseException:
            cache.release(rows)  # not all of their keys are there
            raise

    def step(self, tokens, cache):
        """Put M tokens, the same on every rank, behind each of the B sequences of the cache: the logits
        (B, M, vocab_size) after each of the tokens (B, M). A sequence that was released stays empty; its
        logits mean nothing. Without gradients."""
        self.check_tokens(tokens, cache)
        before = cache.host_lengths
        if len(tokens) != len(before):
            raise ValueError(f"tokens {tuple(tokens.shape)} must be of {len(before)} sequences, as the cache")
        cache.reserve(tokens.shape[1])
        try:
            return self.decode(tokens, cache)
        except BaseException:
            cache.restore(before)  # without tokens whose keys are not there
            raise

    @torch.no_grad()
    def decode(self, tokens, cache):
        """What `step` does on the device, for torch.compile(fullgraph=True) and CUDA graphs. Call
        cache.reserve(M) before: without it the cache does not keep the tokens."""
        cache.extend(tokens.shape[1])
        return F.linear(self.hidden(tokens, cache), self.embedding.weight)

    @torch.no_grad()
    def stream(self, tokens, n_tokens, temperature=0.8, top_k=None, generator=None, cache=None, graph=False,
               mask=None, stop=None):  # fmt: skip
        """Continue tokens (B, S) int64 by n_tokens sampled ones: yields each, (B, 1). All arguments are the
        same on every rank. A model with dropout should be in eval mode.

        temperature: 0 takes the likeliest token. top_k: sample among so many. generator: on this device; on a
        ring rank 0's decides. cache: an empty one of B sequences with room for S + n_tokens - 1 tokens each;
        it is left filled. graph: on a GPU, replay a CUDA graph from the third token on.
        mask: (B, S) bool, True for the tokens of a prompt, False for padding to the left or right of them.
        stop: None, or a token that ends its sequence, which is released from the cache; `stop` fills it up
        until all sequences have ended. Waits for the GPU in each step.
        Raises ValueError on every rank, when the first token is asked for, if something does not fit; later
        only if a cache with fewer pages than all sequences may need has none left.
        """
        ring, lengths = self.ring_of_cache(), None
        same = dict(n_tokens=n_tokens, temperature=temperature, top_k=top_k, graph=graph, stop=repr(stop))
        same["mask"] = ring.n_ranks > 1 and checksum(mask)

        def check():
            nonlocal tokens, lengths, cache
            self.check_tokens(tokens, cache)
            (B, S), V = tokens.shape, self.config.vocab_size
            good_k = top_k is None or is_int(top_k, 1)
            if not (is_int(n_tokens, 0) and 0 <= temperature < math.inf and good_k):
                need = f"{temperature=} must be a number of 0 or more, {top_k=} an int of 1 or more, or None"
                raise ValueError(f"{n_tokens=} must be an int of 0 or more, {need}")
            if stop is not None and not is_int(stop, 0, V - 1):
                raise ValueError(f"{stop=} must be a token, 0 to {V - 1}, or None")
            if graph and not tokens.is_cuda:
                raise ValueError(f"{graph=} needs tokens on a GPU, not on {tokens.device}")
            if cache is not None and len(cache.host_lengths) != B:
                held = len(cache.host_lengths)
                raise ValueError(f"the cache has {held} sequences and tokens {B}; make it for {B}")
            lengths = [S] * B
            if mask is not None:
                tokens, lengths = to_the_left(tokens, mask)
            need = [n + max(n_tokens, 1) - 1 for n in lengths]  # the last token does not go into the cache
            cache = self.new_cache(B, max(need)) if cache is None else cache
            cache.check_room(need, pages=stop is None)  # a sequence that ends early gives its pages to others

        ring_attn.agree_now(ring, same, None, check)
        step = self.step
        for i in range(n_tokens):
            if i == 0:
                logits = self.prefill(tokens, cache, lengths)
            else:
                logits = step(new, cache)[:, -1]
                if i == 1 and graph and n_tokens > 2:
                    step = capture_step(self.decode, new, cache)
            new = self.sample(logits.float(), temperature, top_k, generator)
            if cache.ring.n_ranks > 1:  # the ranks agree even where the rounding of their logits differs
                dist.broadcast(new, group=cache.ring.group, group_src=0)
            if stop is not None:
                new = new.masked_fill(cache.lengths[:, None] == 0, stop)
            yield new
            if stop is not None:
                ended = new[:, 0].tolist()
                cache.release(b for b, n in enumerate(cache.host_lengths) if n and ended[b] == stop)
                if not any(cache.host_lengths):
                    return

    def sample(self, logits, temperature, top_k, generator):  # (B, vocab_size) -> (B, 1)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if top_k is not None:
            logits, tokens = logits.topk(min(top_k, logits.shape[-1]))
        logits = logits - logits.amax(-1, keepdim=True)  # however small the temperature
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        return new if top_k is None else tokens.gather(1, new)

    def generate(self, tokens, n_tokens, *args, **options):
        """tokens (B, S) and n_tokens more: (B, S + n_tokens), or less where all sequences have ended before.
        Arguments as for `stream`. If pages run out, all text is lost, unlike in `stream`. Padding stays where
        it was: on the right it is between a prompt and what follows."""
        return torch.cat([tokens, *self.stream(tokens, n_tokens, *args, **options)], dim=1)
