"""The models of the worlds. All take a batch's first tensor and give logits; attention is written out, so that it can be batched over runs."""

import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

BASE = Path(__file__).with_name("base.safetensors")  # made by `python -m benchmarks.attribution.base`
WORDS = 256  # that a snippet's are hashed to
CONTEXT = 8  # bytes a byte is predicted from, at most


def logistic(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 10))


def mlp(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(pixels, 24), nn.GELU(), nn.Linear(24, 10))


def cnn(pixels: int) -> nn.Module:
    width = math.isqrt(pixels)
    sizes = [width]
    for _ in range(2):
        sizes.append((sizes[-1] - 3) // 2 + 1)
    model = nn.Sequential(
        nn.Unflatten(1, (1, width, width)),
        nn.Conv2d(1, 6, 3, stride=2),
        nn.GELU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * sizes[-1] ** 2, 10),
    )
    for layer in (model[1], model[3]):  # torch's own start leaves so small a network on its plateau for half of the run
        nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
    return model


class TextClassifier(nn.Module):
    """The sum of the words' embeddings, over the root of a snippet's length, and a hidden layer."""

    def __init__(self, n_class: int = 3, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, n_class)
        nn.init.normal_(self.words.weight, std=0.3)  # at torch's 1, words that no record shows would outvote the others

    def forward(self, words: Tensor) -> Tensor:
        seen = (words > 0).unsqueeze(-1).to(self.words.weight.dtype)
        total = (self.words(words) * seen).sum(1) / words.shape[1] ** 0.5
        return self.out(nn.functional.gelu(self.hidden(total)))


def text(width: int = 0) -> nn.Module:
    return TextClassifier()


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        b, t, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5 + mask[:t, :t]).softmax(-1)
        h = h + self.mixed((seen @ v).transpose(1, 2).reshape(b, t, d))
        return h + self.down(nn.functional.gelu(self.up(self.norm2(h))))


class ByteGPT(nn.Module):
    """A decoder over bytes: (B, t) → (B, t, n_byte)."""

    mask: Tensor

    def __init__(self, width: int = 16, layers: int = 1, heads: int = 2, n_byte: int = 128) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(n_byte, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_byte, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -1e9).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h, self.mask)
        return self.head(self.norm(h))


def gpt(width: int = 0) -> nn.Module:
    return ByteGPT()


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank: W x + B A x (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


@cache
def _base() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(BASE).items()}


def base_gpt() -> ByteGPT:
    """What the adapter stands on, untrained."""
    return ByteGPT(width=32, layers=2, heads=4)


def lora(width: int = 0, rank: int = 4) -> nn.Module:
    """The frozen base with adapters in its second block and at its head."""
    model = base_gpt()
    model.load_state_dict(_base())
    model.requires_grad_(False)
    last = model.blocks[-1]
    assert isinstance(last, Block)
    last.qkv, last.up, last.down = LoRA(last.qkv, rank), LoRA(last.up, rank), LoRA(last.down, rank)  # type: ignore[assignment]
    model.head = LoRA(model.head, rank)  # type: ignore[assignment]
    return model
