"""Train a Llama with half the query heads from its config alone, with Hugging Face's Trainer; nothing of sqa runs.

A layer of Sparse Query Attention is a Llama layer with fewer heads and an explicit head_dim, so every tool that trains
Llama trains it. Run: python examples/train_llama.py [FOLDER]
"""

import argparse
import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sqa import variant

LENGTH = 128


def main(out: str, steps: int = 60) -> tuple[float, float]:
    """Returns the first and the last logged loss, in nats a byte."""
    shape = variant("sqa", d_model=128, num_heads=8)  # 4 query heads and 2 KV heads of the nominal 8
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.d_model,
        num_attention_heads=shape.num_query_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=384,
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
    )
    text = "".join(path.read_text("utf-8") for path in sorted(pathlib.Path(argparse.__file__).parent.glob("a*.py")))
    rows = torch.tensor(list(text.encode()))[: 4_000 * LENGTH].unfold(0, LENGTH, LENGTH)
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=steps // 6,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", default="runs/train_llama")
    first, last = main(parser.parse_args().out)
    print(f"loss from {first:.3f} to {last:.3f} nats a byte")
