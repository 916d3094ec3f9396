"""The layer in plain PyTorch: in a module of your own, and put into an nn.TransformerEncoder that exists.

Both learn whether the first token of a sequence occurs in it again. Run: python examples/plain_encoder.py
"""

import torch
from torch import Tensor, nn

from sqa import SparseQueryAttention, variant
from sqa.interop import replace_attention

TOKENS, LENGTH, WIDTH = 20, 12, 64


class OwnEncoder(nn.Module):
    """Two layers of attention without a causal mask; half of the 8 nominal query heads."""

    def __init__(self) -> None:
        super().__init__()
        config = variant("sqa", d_model=WIDTH, num_heads=8, causal=False)
        self.attention = nn.ModuleList(SparseQueryAttention(config) for _ in range(2))
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, (attention, mix) in enumerate(zip(self.attention, self.mix, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mix(self.norms[2 * i + 1](x))
        return x


def torch_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 128, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    print(replace_attention(encoder, "sqa"))
    return encoder


def train(encoder: nn.Module, steps: int = 300) -> float:
    """Train on fresh random sequences; returns the accuracy on 2,000 others."""
    embedding, head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 1)
    parts = nn.ModuleList((embedding, encoder, head))
    optimizer = torch.optim.AdamW(parts.parameters(), lr=2e-3)

    def scores(ids: Tensor) -> Tensor:
        return head(encoder(embedding(ids))[:, 0])[:, 0]

    def repeats(ids: Tensor) -> Tensor:
        return (ids[:, 1:] == ids[:, :1]).any(1)

    for _ in range(steps):
        ids = torch.randint(TOKENS, (128, LENGTH))
        loss = nn.functional.binary_cross_entropy_with_logits(scores(ids), repeats(ids).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(TOKENS, (2000, LENGTH))
    with torch.no_grad():
        return ((scores(ids) > 0) == repeats(ids)).float().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"own module: accuracy {train(OwnEncoder()):.3f}")
    print(f"nn.TransformerEncoder: accuracy {train(torch_encoder()):.3f}")
