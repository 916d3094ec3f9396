"""Train a Llama with fewer query heads with Hugging Face's Trainer: train, evaluate, save, generate.

The shape is that of an existing config: `sqa.fewer_query_heads` proposes numbers of query heads and gives a config for
each. The model is transformers' own class, so every tool that trains Llama trains it. attn_implementation="sqa" runs
it with the kernels of sqa, "sdpa" with PyTorch's. It trains in bfloat16 (autocast).
Run: python examples/train_llama.py [FOLDER] [--attention sdpa] [--steps 200]
"""

import argparse
import math
import pathlib

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from sqa import fewer_query_heads
from sqa.interop.transformers import register

LENGTH = 128
# 9 query and 3 KV heads, as in SmolLM2-135M, an eighth as wide
EXISTING = LlamaConfig(
    vocab_size=256,  # bytes
    hidden_size=144,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2 * LENGTH,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)


def rows(pattern: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Text of the standard library as rows of bytes."""
    files = sorted(pathlib.Path(argparse.__file__).parent.glob(pattern))
    data = torch.tensor(list(b"".join(path.read_bytes() for path in files)))[: count * LENGTH]
    return [{"input_ids": row, "labels": row} for row in data.unfold(0, LENGTH, LENGTH)]


def main(out: str, steps: int = 60, attention: str = "sqa") -> tuple[float, float, str]:
    """Returns the first logged loss and that of the evaluation, both in nats a byte, and a continuation."""
    register()
    set_seed(0)
    choices = fewer_query_heads(EXISTING)
    for choice in choices:
        print(
            f"{choice.num_query_heads} query and {choice.num_kv_heads} KV heads: "
            f"attention takes {choice.attention_saving:.2f} times fewer FLOPs"
        )
    model = LlamaForCausalLM._from_config(choices[0].config, attn_implementation=attention)
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=max(steps // 6, 1),
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows("[a-d]*.py", 4_000), eval_dataset=rows("heapq.py", 64)
    )
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    last = trainer.evaluate()["eval_loss"]
    trainer.save_model(out)

    trained = AutoModelForCausalLM.from_pretrained(out, attn_implementation=attention)
    prompt = torch.tensor([list(b"def heappush(")])
    text = bytes(trained.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()).decode(errors="replace")
    return first, last, text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", default="runs/train_llama")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--attention", default="sqa", choices=["sqa", "sdpa"])
    given = parser.parse_args()
    first, last, text = main(given.out, given.steps, given.attention)
    print(f"loss from {first:.3f} nats a byte in training to {last:.3f} on other text, {last / math.log(2):.2f} bits")
    print(text)
