"""A small causal transformer whose attention runs on one GPU or on a ring of them, and the choice between the two.

Pre-norm blocks (RMSNorm), rotary position embedding at global positions, grouped-query attention, GELU MLP, tied
embeddings. Everything but attention works on tokens one by one, so each rank simply runs the model on its own shard:

    attn = Attention(dim, dim_per_head, seq_len, rank, n_ranks, dropout, causal, AttentionType.ZIGZAG)
    y = attn.unshard(attn(attn.shard(x)))     # x, y (B, S, dim) on every rank; S = seq_len = n_ranks * T

    model = Transformer(Config())             # and text from it, through a cache of keys and values, sharded or not
    tokens = model.generate(prompt, 100)      # (B, S) -> (B, S + 100)

Shapes: B batch, T tokens of the shard at hand, H query heads, HKV key/value heads, D dim_per_head.
Sources: RoPE (arXiv 2104.09864), RMSNorm (1910.07467), GQA (2305.13245), tied embeddings (1608.05859).
"""

import functools
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ring_attn
from decode import KVCache, captured


class AttentionType(Enum):
    SDPA = "sdpa"  # torch's own, on the whole sequence
    FLASH = "flash"  # our kernels, on the whole sequence
    RING = "contiguous"  # the others are ring schedules: the value is a key of ring_attn.SCHEDULES
    STRIPED = "striped"
    STEP = "step"
    ZIGZAG = "zigzag"

    @property
    def is_ring(self):
        return self not in (AttentionType.SDPA, AttentionType.FLASH)


LOGITS = 2**22  # numbers of the output layer that exist at once while a loss is computed
RING_FUNCS = {t: ring_attn.named_schedule(f"{t.value}_attn", t.value) for t in AttentionType if t.is_ring}


def rotary_table(positions, dim_per_head, theta):
    """cos and sin of the rotary angles at these positions (1 or B, T): (1 or B, T, 1, D // 2) float32 each."""
    freqs = theta ** -(torch.arange(0, dim_per_head, 2, device=positions.device, dtype=torch.float64) / dim_per_head)
    angles = positions[..., None, None] * freqs  # float64: position 1e6 times frequency 1 has no digits left in float32
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, T, heads, D): the pairs (x[i], x[i + D // 2]) turn by their angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention over a sequence of seq_len tokens, whole (SDPA, FLASH) or sharded over n_ranks ranks.

    dim: width of x; dim_per_head divides it. n_kv_heads: key/value heads (default: as many as query heads).
    rope_theta: base of the rotary embedding; None for none. group: process group or Ring (default: all processes).
    dropout: applied to the projected output. Weights do not depend on the type: attn_type may be changed at any time.
    Raises ValueError for values that do not fit each other.
    """

    def __init__(self, dim, dim_per_head, seq_len, rank, n_ranks, dropout, causal, attn_type=AttentionType.FLASH, *,
                 n_kv_heads=None, rope_theta=None, group=None):  # fmt: skip
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
            raise ValueError(f"{dim_per_head=} must be even for rotary embeddings; choose another, or rope_theta=None")
        if attn_type.is_ring:
            if seq_len % n_ranks:
                raise ValueError(f"{seq_len=} must be a multiple of {n_ranks=}; pad it, or change the number of ranks")
            ring_attn.check_schedule(attn_type.value, n_ranks, seq_len // n_ranks)
        self.n_heads = dim // dim_per_head
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} (dim={dim} // dim_per_head={dim_per_head}) must be a multiple of n_kv_heads={n_kv_heads}")
        self.dim, self.dim_per_head, self.seq_len = dim, dim_per_head, seq_len
        self.rank, self.n_ranks, self.group = rank, n_ranks, group
        self.causal, self.attn_type, self.rope_theta = causal, attn_type, rope_theta
        self.qkv_proj = nn.Linear(dim, (self.n_heads + 2 * self.n_kv_heads) * dim_per_head, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.o_drop = nn.Dropout(dropout)

    def shard(self, x):
        """This rank's tokens of x (B, S, ...); x itself under SDPA and FLASH, which work on the whole."""
        return ring_attn.shard(x, self.attn_type.value, self.rank, self.n_ranks) if self.attn_type.is_ring else x

    def unshard(self, x):
        """The whole (B, S, ...) from every rank's shard, on every rank; x itself under SDPA and FLASH."""
        return ring_attn.unshard(x, self.attn_type.value, self.group) if self.attn_type.is_ring and self.n_ranks > 1 else x

    def positions(self, B, T, device):
        """Global positions of the T tokens at hand, (1 or B, T)."""
        if not self.attn_type.is_ring:
            return torch.arange(T, device=device)[None]
        return ring_attn.positions(self.attn_type.value, self.rank, self.n_ranks, T, B, device)

    def rotary(self, B, T, device):
        return rotary_table(self.positions(B, T, device), self.dim_per_head, self.rope_theta)

    def forward(self, x, rotary=None, cache=None, layer=0, prefill=False):
        """x (B, T, dim) -> (B, T, dim). rotary: the table of `rotary`, if the caller has it already.

        cache: a KVCache, whose last T tokens these are; its keys and values of `layer` take the place of those of x, to which
        they are added. prefill: all the tokens of the cache are in x, or, on a ring, in the shards of the ranks.
        """
        B, T, _ = x.shape
        heads = rearrange(self.qkv_proj(x), "b t (h d) -> b t h d", d=self.dim_per_head)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)  # (B, T, H, D), (B, T, HKV, D) twice
        if self.rope_theta is not None:
            cos, sin = rotary or self.rotary(B, T, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        sm_scale = self.dim_per_head**-0.5
        if prefill:
            cache.fill(layer, k, v)
        elif cache is not None:
            cache.write(layer, k, v)
        if cache is not None and not prefill:
            o = cache.attend(layer, q, sm_scale)
        elif self.attn_type is AttentionType.SDPA:
            qt, kt, vt = (y.transpose(1, 2) for y in (q, k, v))
            o = F.scaled_dot_product_attention(qt, kt, vt, is_causal=self.causal, scale=sm_scale, enable_gqa=self.n_heads != self.n_kv_heads).transpose(1, 2)
        elif self.attn_type is AttentionType.FLASH:
            o = ring_attn.flash_attn_func(q, k, v, None, self.causal, sm_scale)
        else:
            prev_rank, next_rank = (self.rank - 1) % self.n_ranks, (self.rank + 1) % self.n_ranks
            o = RING_FUNCS[self.attn_type](q, k, v, self.n_ranks, self.rank, prev_rank, next_rank, None, self.causal, sm_scale, group=self.group)
        return self.o_drop(self.o_proj(rearrange(o, "b t h d -> b t (h d)")))


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
    rope_theta: float = 500_000.0


class Block(nn.Module):
    def __init__(self, c, rank, n_ranks, attn_type, group):
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(c.dim), nn.RMSNorm(c.dim)
        self.attn = Attention(c.dim, c.dim_per_head, c.seq_len, rank, n_ranks, c.dropout, True, attn_type,
                              n_kv_heads=c.n_kv_heads, rope_theta=c.rope_theta, group=group)  # fmt: skip
        self.mlp = nn.Sequential(
            nn.Linear(c.dim, 4 * c.dim, bias=False), nn.GELU(), nn.Linear(4 * c.dim, c.dim, bias=False), nn.Dropout(c.dropout)
        )
        self.checkpoint = False

    def forward(self, x, *args):  # (B, T, dim); args of Attention.forward
        if self.checkpoint and torch.is_grad_enabled():
            # of all that is inside, the backward finds x and attention's o and lse; it computes the rest again, but moves no key a second time
            kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.ring_attn.forward.default])
            return checkpoint(self.body, x, *args, use_reentrant=False, context_fn=kept)
        return self.body(x, *args)

    def body(self, x, *args):
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Causal language model. On a ring every rank holds all weights and runs its own tokens.

    config: a Config; rank, n_ranks, attn_type, group: as for Attention.
    """

    def __init__(self, config, rank=0, n_ranks=1, attn_type=AttentionType.FLASH, group=None):
        super().__init__()
        if config.n_layers < 1 or config.vocab_size < 1:
            raise ValueError(f"n_layers={config.n_layers} and vocab_size={config.vocab_size} must be 1 or more")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)  # also the output projection
        self.blocks = nn.ModuleList(Block(config, rank, n_ranks, attn_type, group) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what is added to the residual stream starts smaller, as in GPT-2
                out = name.endswith(("o_proj.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layers) ** 0.5 if out else 0.02)

    def hidden(self, tokens, cache=None, prefill=False):
        """tokens (B, T) -> what the output projection takes, (B, T, dim). cache, prefill: as for Attention."""
        x = self.embedding(tokens)  # (B, T, dim)
        attn = self.blocks[0].attn
        pos = attn.positions(*tokens.shape, tokens.device) if cache is None or prefill else cache.positions(tokens.shape[1])
        rotary = rotary_table(pos, attn.dim_per_head, attn.rope_theta)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer, prefill)
        return self.norm(x)

    def forward(self, tokens, targets=None, each=False):
        """tokens (B, T) int64, this rank's -> logits (B, T, vocab_size); with targets (B, T), the mean loss in nats instead,
        or, if `each`, every token's (B, T). Losses are computed in pieces: no more than LOGITS logits exist at once."""
        x = self.hidden(tokens)
        if targets is None:
            return F.linear(x, self.embedding.weight)
        rows = max(1, LOGITS // self.config.vocab_size)
        pieces = list(zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows)))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            losses = [self.token_losses(*piece) for piece in pieces]
        else:  # the backward computes the logits of a piece again
            losses = [checkpoint(self.token_losses, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        losses = torch.cat(losses)
        return losses.view_as(targets) if each else losses.mean()

    def token_losses(self, x, targets):  # (N, dim), (N,) -> (N,) float32
        return F.cross_entropy(F.linear(x, self.embedding.weight).float(), targets, reduction="none")

    def flops_per_token(self, seq_len):
        """Training FLOPs per token: 6 per weight used in a product, and causal attention, forward + 2.5x for the backward."""
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)  # the embedding counts once, as output projection
        return 6 * weights + 3.5 * self.config.n_layers * 2 * seq_len * self.config.dim

    def new_cache(self, B, n_tokens):
        """An empty KVCache for B sequences of up to n_tokens tokens, striped over the ranks of the model."""
        attn, weight = self.blocks[0].attn, self.embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        group = None
        if attn.n_ranks > 1:
            group = dist.group.WORLD if attn.group is None else attn.group
        return KVCache(len(self.blocks), B, n_tokens, attn.n_kv_heads, attn.dim_per_head, dtype, weight.device, group)

    def prefill(self, tokens, cache):
        """Put tokens (B, S), the same on every rank, into the empty cache: logits (B, vocab_size) for what follows them.

        On a ring each rank runs its own 1/n of them, and the model's type must be STRIPED, which leaves every key where the
        cache keeps it. Raises ValueError if it is not, if the cache holds something, and if the tokens do not fit.
        """
        (B, S), attn = tokens.shape, self.blocks[0].attn
        R = attn.n_ranks
        if R > 1 and attn.attn_type is not AttentionType.STRIPED:
            raise ValueError(f"attn_type={attn.attn_type} leaves the cache where decoding does not look on {R} ranks; make the model with AttentionType.STRIPED")
        if cache.length or S == 0:
            raise ValueError(f"the cache holds {cache.length} tokens and the prompt {S}; prefill wants an empty cache and a prompt of 1 or more")
        cache.extend(S)
        x = self.hidden(attn.shard(F.pad(tokens, (0, -S % R))), cache, True)  # what pads is behind every real token, and not counted
        last = x[:, (S - 1) // R].contiguous()  # (B, dim), on the rank that has the last token
        if R > 1:
            group = cache.ring.group
            dist.broadcast(last, dist.get_global_rank(group, (S - 1) % R), group=group)
        return F.linear(last, self.embedding.weight)

    def step(self, tokens, cache):
        """Put tokens (B, M), the same on every rank, behind those in the cache: logits (B, M, vocab_size) for what follows each."""
        cache.extend(tokens.shape[1])
        return F.linear(self.hidden(tokens, cache), self.embedding.weight)

    @torch.no_grad()
    def stream(self, tokens, n_tokens, temperature=0.8, top_k=None, generator=None, cache=None, graph=False):
        """Continue tokens (B, S), the same on every rank, by n_tokens sampled ones: yields (B, 1) at a time.

        temperature 0 takes the likeliest token. generator: of this device, seeded alike on every rank. cache: an empty one to use.
        graph: from the second token on replay a CUDA graph. Raises ValueError before the first token if something does not fit.
        """
        if temperature < 0 or tokens.shape[1] == 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"{temperature=} must be 0 or more, {top_k=} 1 or more or None, and the prompt, {tokens.shape[1]} tokens, not empty")
        need = tokens.shape[1] + max(n_tokens, 1) - 1  # the last token is not followed by anything
        cache = self.new_cache(len(tokens), need) if cache is None else cache
        cache.check_room(need)
        step = self.step
        for i in range(n_tokens):
            if i == 0:
                logits = self.prefill(tokens, cache)
            else:
                logits = step(new, cache)[:, -1]
                if i == 1 and graph and n_tokens > 2:
                    step = captured(step, new, cache)
            new = self.sample(logits.float(), temperature, top_k, generator)
            if cache.ring.n_ranks > 1:  # the ranks found the same logits; should rounding ever differ, they still go on alike
                dist.broadcast(new, dist.get_global_rank(cache.ring.group, 0), group=cache.ring.group)
            yield new

    def sample(self, logits, temperature, top_k, generator):  # (B, vocab_size) -> (B, 1)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

    def generate(self, tokens, n_tokens, *args, **options):
        """tokens (B, S) and n_tokens more: (B, S + n_tokens). Arguments as for `stream`."""
        return torch.cat([tokens, *self.stream(tokens, n_tokens, *args, **options)], dim=1)
