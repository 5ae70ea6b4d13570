# The batches of `mmscale verify-layout`.
"""Tests of synthetic documents."""

from __future__ import annotations

import pytest

from mmscale.train.proof.synthetic import SyntheticMixture
from tests.distributed.layouts import config


@pytest.mark.parametrize("multiple", [1, 8, 16, 32, 64])
def test_documents_are_padded_to_any_multiple(multiple: int) -> None:
    """Also if a sequence of 64 tokens has room for fewer documents than usual."""
    made = config("moma", data={"document_multiple": multiple})
    batch = SyntheticMixture(made, share={"text": 0.5, "image": 0.5}).micro_batch(0)
    trained = batch.loss_mask.sum(axis=1)
    assert batch.tokens.shape == (2, 64) and (trained >= 8).all(), trained
