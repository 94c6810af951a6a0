"""A small byte-level GPT, and text for it that every machine with Python has."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # as in torch's documentation
from torch import Tensor, nn

from bench.cases.case import NotRunError

VOCABULARY = 256  # a token is a byte
HEAD_SIZE = 32


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a ``GPT``: ``width`` is a multiple of ``HEAD_SIZE``, ``block`` in tokens."""

    layers: int = 9
    width: int = 128
    block: int = 64


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Without a bias: no softmax sees that of the keys, so its gradient would be rounding noise,
        # which AdamW blows up to full steps.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return y


class GPT(nn.Module):
    """A decoder-only transformer over bytes; its head is tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.block, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(_initialize)
        # As in GPT-2: 2 * layers terms add up in the residual stream, so each one starts smaller.
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of ``targets``; both are (batch, tokens) of int64."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def read_text() -> Tensor:
    """The source code of Python's standard library as a 1-dim uint8 tensor.

    The same on each machine with the same Python.

    Raises:
        NotRunError: this Python comes without the source code of its library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not text:
        raise NotRunError(f"no text to train on: there is no *.py file in {folder}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, block: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets, each (batch, block) of int64, drawn at random; never ends."""
    generator = torch.Generator().manual_seed(seed)
    windows = text.unfold(0, block + 1, 1)
    while True:
        starts = torch.randint(len(windows), (batch,), generator=generator)
        drawn = windows[starts].long()
        yield drawn[:, :-1], drawn[:, 1:]
