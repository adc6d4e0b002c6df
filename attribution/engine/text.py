"""Text for models that a document describes: its bytes as tokens, its hashed n-grams, and a byte-level GPT.

    tokens      UTF-8 bytes 0..255, cut off after `length` of them, filled up with PAD = 256
    n-grams     x[b] = Σ sign(h) over the n-grams of PAD ‖ bytes ‖ PAD with h mod buckets = b, then x / ‖x‖
    next byte   loss_i = − mean over the bytes of text i of log p(byte | the bytes before it, begun by PAD)

Hashing with signs keeps inner products in expectation: Weinberger et al. 2009, arXiv:0902.2206. The hash is arithmetic on
integers, so that the same text has the same features on any machine. The GPT is GPT-2's (Radford et al. 2019): normed
before each branch, learned positions, its embedding tied to its head.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

PAD = 256  # begins a text, and fills it up; no byte has this number
VOCABULARY = 257
MAX_TEXT_BYTES = 65_536  # of one text that n-grams are taken from; what follows is not looked at
BLOCK_NUMBERS = 4_000_000  # of features that are counted at once: 32 MB
BLOCK_BYTES = 4_000_000
_FNV_PRIME, _FNV_BASIS = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325)


def byte_tokens(texts: Sequence[str], length: int) -> Tensor:
    """(n, length) int64: the first bytes of each text, then PAD."""
    tokens = np.full((len(texts), length), PAD, np.int64)
    for row, text in enumerate(texts):
        # A character has a byte or more, so the rest of a long text need not be encoded.
        data = np.frombuffer(text[:length].encode()[:length], np.uint8)
        tokens[row, : len(data)] = data
    return torch.from_numpy(tokens)


def hashed_ngrams(texts: Sequence[str], *, shortest: int, longest: int, buckets: int) -> Tensor:
    """(n, buckets) float64, each row of length 1: signed counts of the byte n-grams, both ends of the text marked."""
    features = np.zeros((len(texts), buckets))
    for start, stop, tokens, owner in _blocks(texts, max(1, BLOCK_NUMBERS // buckets)):
        counts = np.zeros((stop - start) * buckets)
        for n in range(shortest, longest + 1):
            if len(tokens) < n:
                break
            hashed = _hash(tokens, n)
            inside = owner[: len(hashed)] == owner[n - 1 :]  # an n-gram belongs to one text
            place = owner[: len(hashed)] * buckets + (hashed % np.uint64(buckets)).astype(np.int64)
            sign = 1.0 - 2.0 * ((hashed >> np.uint64(61)) & np.uint64(1)).astype(np.float64)
            counts += np.bincount(place[inside], sign[inside], minlength=len(counts))
        features[start:stop] = counts.reshape(stop - start, buckets)
    norms = np.sqrt(np.square(features).sum(1, keepdims=True))
    return torch.from_numpy(features / np.where(norms > 0, norms, 1))


def _blocks(texts: Sequence[str], rows: int) -> Iterator[tuple[int, int, NDArray[np.uint64], NDArray[np.int64]]]:
    """(first text, last + 1, all tokens of the block, the text within the block that each belongs to)."""
    start = 0
    while start < len(texts):
        parts: list[NDArray[np.uint64]] = []
        size, stop = 0, start
        while stop < len(texts) and stop - start < rows and size < BLOCK_BYTES:
            data = texts[stop][:MAX_TEXT_BYTES].encode()[:MAX_TEXT_BYTES]
            parts.append(np.pad(np.frombuffer(data, np.uint8).astype(np.uint64), 1, constant_values=PAD))
            size, stop = size + len(data), stop + 1
        owner = np.repeat(np.arange(stop - start), [len(part) for part in parts])
        yield start, stop, np.concatenate(parts), owner
        start = stop


def _hash(tokens: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """FNV-1a over each run of n tokens, its bits mixed as murmur's finalizer does: their low ones choose the bucket."""
    hashed = np.full(len(tokens) - n + 1, _FNV_BASIS ^ np.uint64(n))
    for at in range(n):
        hashed = (hashed ^ tokens[at : at + len(hashed)]) * _FNV_PRIME
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(factor)
    return hashed ^ (hashed >> np.uint64(33))


class MeanEmbedding(nn.Module):
    """(B, T) tokens → (B, d): the mean of their embeddings, padding left out.

    `nn.EmbeddingBag(mode="mean")` in two layers, which second derivatives and batched replays pass through.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int = PAD) -> None:
        super().__init__()
        self.embedding, self.padding_idx = nn.Embedding(num_embeddings, embedding_dim), padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        kept = (tokens != self.padding_idx).to(embedded.dtype)
        # An empty text has mean 0, not 0/0.
        return (embedded * kept[..., None]).sum(-2) / kept.sum(-1, keepdim=True).clamp(min=1)


class CausalAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.mix, self.out, self.softmax = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # each (B, head, T, d)
        t = x.shape[1]
        # Written out: torch's fused kernel has no second derivative and no batched version.
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
        return self.out((self.softmax(weights) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(n_embd), CausalAttention(n_embd, n_head)
        self.norm_2, self.up, self.gelu = nn.LayerNorm(n_embd), nn.Linear(n_embd, 4 * n_embd), nn.GELU()
        self.down, self.dropout = nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.down(self.gelu(self.up(self.norm_2(x)))))


class GPT(nn.Module):
    """(B, T) tokens, T at most `n_positions` → (B, T, 257) logits of the token that follows each.

    Drawn as GPT-2 is: N(0, 0.02²), the last layer of each branch by √(2 · n_layer) less; biases 0.
    """

    def __init__(self, n_positions: int, n_embd: int, n_layer: int, n_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, n_embd), nn.Embedding(n_positions, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * n_layer) if ends_branch else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(self.token(tokens) + positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_byte(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """(B,) nats per byte, the mean over each text's own bytes: its padding counts for nothing, its length neither."""
    tokens = batch[0]  # (B, T)
    before = torch.cat([tokens.new_full((len(tokens), 1), PAD), tokens[:, :-1]], 1)
    nats = functional.cross_entropy(model(before).transpose(1, 2), tokens, reduction="none")  # (B, T)
    kept = (tokens != PAD).to(nats.dtype)
    return (nats * kept).sum(1) / kept.sum(1).clamp(min=1)
