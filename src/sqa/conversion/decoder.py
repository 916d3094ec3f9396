"""A causal language model as conversion sees it: our Transformer, which reads Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sqa import interop
from sqa.config import AttentionConfig
from sqa.conversion.subject import AttentionView, Subject
from sqa.conversion.text import packed_batches
from sqa.data.batches import Batch
from sqa.losses import IGNORE, linear_distillation, token_losses
from sqa.model import Transformer


class Decoder(Subject):
    """Reads packed rows; every position is a real token."""

    default_speed_at = (512, 2048)

    @classmethod
    def load(cls, directory: Path) -> Decoder:
        return cls(interop.load_model(directory))

    @classmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        config = interop.load_config(directory)
        return config.layers, config.max_seq_len

    @property
    def views(self) -> list[AttentionView]:
        layers = [block.self_attn for block in self.model.model.layers]
        return [AttentionView(layer.config, layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj) for layer in layers]

    def batches(
        self, directory: Path, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> list[Batch]:
        tokenizer = self.tokenizer(directory)
        end_id = interop.open_source(directory).read_text_side().end_of_document
        encoded = (tokenizer.encode(text).ids + ([] if end_id is None else [end_id]) for text in documents)
        return packed_batches(encoded, rows=rows, length=length, batch_size=batch_size)

    def row_of(self, input_ids: Tensor) -> Batch:
        return Batch(input_ids=input_ids, labels=input_ids, labels_all_positions=None, document_ids=None)

    def hidden(self, batch: Batch) -> Tensor:
        state: Tensor = self.model.hidden_states(batch.input_ids, document_ids=batch.document_ids)
        return state

    def prefill(self, batch: Batch) -> object:
        """Logits of the last position."""
        return self.model(batch.input_ids, num_logits=1)

    def attend(self, index: int, read: Tensor, batch: Batch) -> Tensor:
        given: Tensor = self.model.model.layers[index].self_attn(read, document_ids=batch.document_ids)
        return given

    def loss(self, batch: Batch) -> Tensor:
        """Mean nll a real token."""
        loss: Tensor = self.model(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss
        return loss

    def distance(self, hidden: Tensor, teacher: Decoder, teacher_hidden: Tensor, batch: Batch) -> Tensor:
        """KL(teacher || this model), mean over tokens."""
        head, other = self.model.lm_head, teacher.model.lm_head
        total = linear_distillation(hidden, head.weight, head.bias, (teacher_hidden, other.weight, other.bias))
        return total / batch.input_ids.numel()

    @torch.no_grad()
    def outputs(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [self.hidden(batch) for batch in batches]

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], teacher: Decoder, reference: Sequence[Tensor]) -> dict[str, float]:
        """Loss (nats a real token), its perplexity, and KL to the teacher (nats a token)."""
        nll = divergence = 0.0
        head = self.model.lm_head
        for batch, target in zip(batches, reference, strict=True):
            hidden = target if teacher is self else self.hidden(batch)
            losses, _ = token_losses(hidden, head.weight, head.bias, batch.labels)
            nll += float(losses.double().sum())
            if teacher is not self:
                divergence += float(self.distance(hidden, teacher, target, batch)) * batch.input_ids.numel()
        loss = nll / sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        positions = sum(batch.input_ids.numel() for batch in batches)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "kl": divergence / positions}

    def converted(self, attention: Sequence[AttentionConfig], weights: Sequence[dict[str, Tensor]]) -> Decoder:
        config = self.model.config.replace(attention=attention[0] if len(set(attention)) == 1 else tuple(attention))
        tensors: dict[str, Tensor] = self.model.state_dict()
        for i, layer in enumerate(weights):
            for name, tensor in layer.items():
                tensors[f"model.layers.{i}.self_attn.{name[0]}_proj{name[1:]}"] = tensor.float()
        return Decoder(Transformer.from_tensors(config, tensors, "the converted model"))

    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        interop.write_like(self.model.to(dtype), folder, source)
