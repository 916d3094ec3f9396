"""Encoders in conversion, against the stock model's own forward pass and against plain loops."""

import pytest
import torch
from transformers import BertConfig, BertModel

from sqa.conversion.encoder import NEIGHBOURS, Encoder, Passages
from sqa.conversion.subject import watched


def encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=90,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # transformers starts them at 0 and 1, where the wrong one would go unseen
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Encoder(model)


@pytest.fixture
def passages() -> list[Passages]:
    """Three batches of five rows of 3 to 11 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (3, 5, 11), generator=generator)
    lengths = torch.randint(3, 12, (3, 5, 1), generator=generator)
    return [Passages(*each) for each in zip(ids, torch.arange(11) < lengths, strict=True)]


def test_layers_are_walked_as_the_model_walks_them(passages: list[Passages]) -> None:
    subject = encoder(0)
    for batch in passages:
        with torch.no_grad():
            with watched([linear for view in subject.views for linear in (view.q, view.o)]) as seen:
                subject.hidden(batch)
            expected = [(q[0], o[1]) for q, o in zip(seen[::2], seen[1::2], strict=True)]
            for pair, other in zip(subject.layers(batch), expected, strict=True):
                for own, theirs in zip(pair, other, strict=True):
                    torch.testing.assert_close(own[batch.real], theirs[batch.real])


def test_the_distance_is_a_share_of_energy_over_real_tokens(passages: list[Passages]) -> None:
    teacher, student, batch = encoder(0), encoder(1), passages[0]
    with torch.no_grad():
        target, own = teacher.hidden(batch), student.hidden(batch)
        found = student.distance(own, teacher, target, batch)
        wrong = energy = 0.0
        for row, mask in enumerate(batch.real):
            for t in range(int(mask.sum())):
                wrong += float((own[row, t] - target[row, t]).square().sum())
                energy += float(target[row, t].square().sum())
    assert float(found) == pytest.approx(wrong / energy, rel=1e-5)


def test_quality_is_the_mean_cosine_and_the_share_of_neighbours_kept(passages: list[Passages]) -> None:
    teacher, student = encoder(0), encoder(1)
    reference = teacher.outputs(passages)
    found = student.measure(passages, teacher, reference)
    both = [torch.cat(each) for each in (student.outputs(passages), reference)]
    nearest = [
        [
            set(sorted((j for j in range(15) if j != i), key=lambda j, i=i, x=x: -float(x[i] @ x[j]))[:NEIGHBOURS])
            for i in range(15)
        ]
        for x in both
    ]
    kept = [len(own & theirs) / NEIGHBOURS for own, theirs in zip(*nearest, strict=True)]
    assert found.neighbours == pytest.approx(sum(kept) / 15)
    cosines = torch.nn.functional.cosine_similarity(*both)
    assert found.cosine == pytest.approx(float(cosines.mean()), rel=1e-5)
    same = teacher.measure(passages, teacher, reference)
    assert (same.cosine, same.neighbours) == (pytest.approx(1.0), 1.0)
