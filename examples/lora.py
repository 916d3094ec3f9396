"""LoRA with peft on an exported model: train a few weights, merge them, and load the result with sqa.

Run: python examples/lora.py [FOLDER] [--steps 30]
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sqa import Transformer
from sqa.interop import export, load_model
from sqa.variants import preset


def main(folder: Path, steps: int = 30) -> tuple[float, float, float]:
    """Returns the loss on one sentence before, after, and of the merged model loaded as ours."""
    Transformer(preset("demo", "sqa")).save(folder / "run")
    export(folder / "run", folder / "hf", format="hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    adapted.print_trainable_parameters()
    ids = torch.tensor([list(b"Fewer query heads, less work where attention is bound by compute.")])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    ours = load_model(folder / "merged")
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    with torch.no_grad():
        back = ours(ids, labels=labels).loss
    assert back is not None
    return losses[0], losses[-1], back.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/lora"))
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    before, after, back = main(given.folder, given.steps)
    print(f"loss {before:.3f} -> {after:.3f}; merged and loaded as ours: {back:.3f}")
