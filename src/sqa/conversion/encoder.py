"""BERT-type encoders in conversion, where the last hidden state takes the place of logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from sqa.config import AttentionConfig
from sqa.conversion.records import EmbeddingQuality
from sqa.conversion.subject import AttentionView, Subject
from sqa.errors import InputError
from sqa.interop import bert
from sqa.interop.text import TextSide

NEIGHBOURS = 10  # of a passage, in the retrieval that is compared


@dataclass(frozen=True)
class Passages:
    """input_ids int64, and real (True where there is a token) bool, both (B, T)."""

    input_ids: Tensor
    real: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, rows: slice, device: torch.device) -> Passages:
        """Some of the rows, on `device`."""
        return Passages(self.input_ids[rows].to(device), self.real[rows].to(device))


class Encoder(Subject):
    """An encoder. A row of its batches is the padded beginning of one document."""

    default_speed_at = (128, 256, 512)
    predicts = False

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        return cls(bert.load_bert(directory))

    @classmethod
    def shape(cls, directory: Path) -> tuple[tuple[AttentionConfig, ...], int]:
        config = bert.load_config(directory)
        return (bert.attention_config(config),) * config.num_hidden_layers, config.max_position_embeddings

    @property
    def views(self) -> list[AttentionView]:
        config, layers = bert.attention_config(self.model.config), (each.attention for each in self.model.encoder.layer)
        return [AttentionView(config, x.self.query, x.self.key, x.self.value, x.output.dense) for x in layers]

    def batches(
        self, side: TextSide, documents: Iterator[str], rows: int, length: int, batch_size: int
    ) -> list[Passages]:
        tokenizer = side.tokenizer
        assert tokenizer is not None, "text_side() refuses it"
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(pad_id=self.model.config.pad_token_id or 0)
        texts = list(islice(documents, rows))
        if len(texts) < rows:
            raise InputError(
                f"text: {rows} passages are asked for, but only {len(texts)} documents are left in this split; "
                f"give more documents, or ask for fewer passages"
            )
        encoded = (tokenizer.encode_batch(texts[start : start + batch_size]) for start in range(0, rows, batch_size))
        return [
            Passages(
                torch.tensor([x.ids for x in found], device=self.device),
                torch.tensor([x.attention_mask for x in found], device=self.device).bool(),
            )
            for found in encoded
        ]

    def row_of(self, input_ids: Tensor) -> Passages:
        return Passages(input_ids, torch.ones_like(input_ids, dtype=torch.bool))

    def tokens(self, x: Tensor, batch: Passages) -> Tensor:
        return x[batch.real]

    def hidden(self, batch: Passages) -> Tensor:
        return self.model(input_ids=batch.input_ids, attention_mask=batch.real.long()).last_hidden_state

    @property
    def trainable(self) -> list[nn.Parameter]:
        """All but the pooler, which comes after the last hidden state."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("pooler.")]

    def attend(self, index: int, x: Tensor, batch: Passages) -> Tensor:
        attention = self.model.encoder.layer[index].attention
        return attention.output.dense(attention.self(x, attention_mask=batch.real[:, None, None])[0])

    def layers(self, batch: Passages) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.model.embeddings(input_ids=batch.input_ids)
        for index, layer in enumerate(self.model.encoder.layer):
            output = self.attend(index, x, batch)
            yield x, output
            x = layer.feed_forward_chunk(layer.attention.output.LayerNorm(x + output))

    def loss(self, batch: Passages) -> Tensor:
        """A stand-in that is only timed: an encoder predicts nothing, so it has no loss (see `prepare`)."""
        return self.hidden(batch).float().square().mean()

    def distance(self, hidden: Tensor, teacher: Encoder, teacher_hidden: Tensor, batch: Passages) -> Tensor:
        """Squared error of the last hidden state as a share of its energy, over real positions."""
        target = teacher_hidden[batch.real].float()
        return (hidden[batch.real].float() - target).square().sum() / target.square().sum()

    @torch.no_grad()
    def outputs(self, batches: Iterable[Passages]) -> list[Tensor]:
        """Embeddings, (B, d) each."""
        return [bert.embed(self.model, batch.input_ids, batch.real) for batch in batches]

    @torch.no_grad()
    def measure(self, batches: Iterable[Passages], teacher: Encoder, reference: Sequence[Tensor]) -> EmbeddingQuality:
        other = torch.cat(list(reference))
        own = other if teacher is self else torch.cat(self.outputs(batches))
        count = min(NEIGHBOURS, len(own) - 1)
        nearest = [
            (x @ x.T).fill_diagonal_(-torch.inf).topk(count).indices  # a passage is no neighbour of its own
            for x in (own, other)
        ]
        kept = (nearest[0][:, :, None] == nearest[1][:, None]).any(-1).float()
        return EmbeddingQuality(
            cosine=float((own * other).sum(-1).mean()), neighbours=float(kept.mean()) if count else 1.0
        )

    def with_heads(self, attention: Sequence[AttentionConfig]) -> Encoder:
        return Encoder(bert.with_heads(self.model, attention[0]))

    @classmethod
    def serve(cls, directory: Path) -> str:
        return f"SentenceTransformer({directory.name!r}, trust_remote_code=True)"

    def save(self, folder: Path, source: Path, dtype: torch.dtype) -> None:
        """Write a directory for AutoModel with trust_remote_code."""
        bert.save_bert(self.model.to(dtype), folder, source)
