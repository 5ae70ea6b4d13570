"""One optimizer step: portions of a batch, evaluation that leaves no trace, figures that are measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.config import Config
from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.data.vocab import Vocabulary
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import TrainingParts, build
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.batch import Batch, to_device
from mmscale.train.steps.step import mean_losses, reduce_sums
from tests.distributed.layouts import config as tiny
from tests.support import distributed

SHARE = {"text": 0.5, "image": 0.5}


def batches(config: Config, numbers: range) -> list[Batch]:
    mixture, vocabulary = SyntheticMixture(config, share=SHARE), Vocabulary.from_config(config.vocab)
    return [to_device(mixture.micro_batch(number), vocabulary) for number in numbers]


def parts(config: Config) -> TrainingParts:
    return build(config, process_groups.initialize_layout(seed=config.run.seed))


def weights(made: TrainingParts) -> torch.Tensor:
    return torch.cat([param.detach().float().flatten() for chunk in made.chunks for param in chunk.parameters()])


def losses(sums: torch.Tensor, made: TrainingParts, config: Config) -> dict[str, float]:
    return mean_losses(reduce_sums(sums, made.groups), config.vocab.names)


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def rows(batch: Batch, start: int, stop: int) -> Batch:
    p = batch.params
    cut = [x[:, start:stop].contiguous() for x in (p.modality_ids, p.position_ids, p.document_ids)]
    params = type(p).of(modality_ids=cut[0].t(), position_ids=cut[1].t(), document_ids=cut[2].t())
    tokens, labels, label_modality, loss_mask = (
        x[start:stop] for x in (batch.tokens, batch.labels, batch.label_modality, batch.loss_mask)
    )
    return replace(
        batch, tokens=tokens, labels=labels, label_modality=label_modality, loss_mask=loss_mask, params=params
    )


@distributed(world_size=1)
def test_a_batch_in_portions_is_the_batch(ranks: RankEnv) -> None:
    """Two micro-batches of 2 equal four of 1, though their numbers of labels differ: the sum is divided once."""
    process_groups.start(ranks)
    seen = []
    for size in (2, 1):
        config = changed(tiny("moma"), "train", micro_batch_size=size)
        made = parts(config)
        given = batches(tiny("moma"), range(2))
        given[0].loss_mask[0, 5:] = 0.0
        if size == 1:
            given = [rows(batch, row, row + 1) for batch in given for row in range(2)]
        result = made.stepper.train(given, lr=1e-3)
        seen.append((losses(result.sums, made, config)["loss"], result.grad_norm, weights(made)))
        process_groups.destroy_layout()
    (loss, norm, after), (other_loss, other_norm, other_after) = seen
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other_norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(other_after, after, rtol=0, atol=1e-5)
    process_groups.finalize()


@distributed(world_size=1)
def test_evaluation_leaves_no_trace(ranks: RankEnv) -> None:
    """With noise on: evaluation has none, and training goes on as if it had not been."""
    process_groups.start(ranks)
    settings = tiny("moma_post_per_expert_shared", dtype="bf16")
    seen = []
    for evaluated in (False, True):
        made = parts(settings)
        first = made.stepper.train(batches(settings, range(2)), lr=1e-3)
        if evaluated:
            before = weights(made)
            twice = [made.stepper.evaluate(batches(settings, range(4, 6))) for _ in range(2)]
            assert torch.equal(twice[0], twice[1])
            assert torch.equal(weights(made), before)
            assert all(not chunk.training for chunk in made.chunks)
        second = made.stepper.train(batches(settings, range(2, 4)), lr=1e-3)
        assert all(chunk.training for chunk in made.chunks)
        seen.append((first.grad_norm, second.grad_norm, second.sums.tolist(), weights(made)))
        process_groups.destroy_layout()
    assert seen[0][:3] == seen[1][:3] and torch.equal(seen[0][3], seen[1][3])
    process_groups.finalize()


@distributed(world_size=1)
def test_the_dry_run_leaves_no_trace(ranks: RankEnv) -> None:
    process_groups.start(ranks)
    settings, seen = tiny("moma_depth"), []
    for rehearsed in (False, True):
        made = parts(settings)
        if rehearsed:
            made.stepper.accumulate(batches(settings, range(6, 8)))
        result = made.stepper.train(batches(settings, range(2)), lr=1e-3)
        seen.append((result.grad_norm, result.sums.tolist(), weights(made)))
        process_groups.destroy_layout()
    assert seen[0][:2] == seen[1][:2] and torch.equal(seen[0][2], seen[1][2])
    process_groups.finalize()


@pytest.mark.parametrize("model", ["dense", "moma"])
def test_clipping_and_norm(model: str) -> None:
    """The norm is that before clipping, and it is measured where nothing is clipped too."""

    @distributed(world_size=1)
    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        norms, moved = {}, {}
        for clip in (0.0, 1e-3, 1e9):
            settings = changed(tiny(model), "optim", clip_grad=clip, eps=1.0, weight_decay=0.0)
            made = parts(settings)
            before = weights(made)
            norms[clip] = made.stepper.train(batches(settings, range(2)), lr=1e-3).grad_norm
            moved[clip] = float((weights(made) - before).norm())
            process_groups.destroy_layout()
        assert norms[0.0] > 0.1 and norms[0.0] == norms[1e-3] == norms[1e9]
        assert moved[0.0] == moved[1e9] > 100 * moved[1e-3] > 0
        process_groups.finalize()

    ranks_do()


@distributed(world_size=1)
def test_a_modality_without_weight_is_measured_and_not_learned(ranks: RankEnv) -> None:
    process_groups.start(ranks)
    settings = changed(tiny("dense"), "train", modality_weights={"image": 0.0}, z_loss=0.0)
    settings = changed(settings, "optim", weight_decay=0.0)
    made = parts(settings)
    result = made.stepper.train(batches(settings, range(2)), lr=1e-3)
    found = losses(result.sums, made, settings)
    assert found["loss/image"] > 0 and found["loss/text"] > 0
    norms = [result.grad_norm]
    process_groups.destroy_layout()
    # The same gradient as of a batch in which image labels are masked, but for the number that it is divided by.
    made = parts(settings)
    given = batches(settings, range(2))
    labels = sum(float(batch.loss_mask.sum()) for batch in given)
    for batch in given:
        batch.loss_mask[batch.label_modality == 1] = 0.0
    left = sum(float(batch.loss_mask.sum()) for batch in given)
    norms.append(made.stepper.train(given, lr=1e-3).grad_norm * left / labels)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and left < labels
    process_groups.finalize()


def test_losses_of_nothing_are_left_out() -> None:
    assert mean_losses(torch.zeros(3, 2), ("text", "image")) == {}
    only_text = torch.tensor([[6.0, 3.0], [0.0, 0.0], [12.0, 3.0]])
    assert mean_losses(only_text, ("text", "image")) == {"loss": 2.0, "z_loss": 4.0, "loss/text": 2.0}
    broken = torch.tensor([[math.nan, 3.0], [1.0, 1.0], [12.0, 4.0]])
    found = mean_losses(broken, ("text", "image"))
    assert math.isnan(found["loss"]) and found["loss/image"] == 1.0


@distributed(world_size=1)
def test_tokens_that_are_asked_for_are_of_the_same_probability_in_chunks(ranks: RankEnv) -> None:
    """With `parallel.loss_chunk` the output layer makes no logits of a whole sequence for them either."""
    process_groups.start(ranks)
    at = np.arange(6)
    wanted = [WantedTokens(at % 2, 7 * at, at, 10 * at, asked=at) for _ in range(2)]
    found, widths = [], []
    for chunk in (0, 4):
        config = changed(tiny("moma"), "parallel", loss_chunk=chunk)
        made = parts(config)
        layer: Any = made.chunks[0].module.output_layer
        layer.register_forward_hook(lambda _, __, output: widths.append(output[0].shape[-1]))
        found.append(torch.cat(made.stepper.pick(batches(config, range(2)), wanted)))
        process_groups.destroy_layout()
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert found[0].shape == (12, 2)
    logits, hidden = config.vocab.padded_size, config.model.hidden_size
    assert widths == [logits] * 2 + [hidden] * 2 and logits != hidden
    process_groups.finalize()


@distributed(world_size=1)
def test_what_layers_keep_of_a_micro_batch_goes_with_it(ranks: RankEnv) -> None:
    """Masks of a micro-batch are as large as S^2; a step of hundreds of micro-batches must not keep those of all."""
    process_groups.start(ranks)
    config = changed(tiny("moma_depth"), "train", global_batch_size=12)
    made, given = parts(config), batches(config, range(6))
    made.stepper.accumulate(given)
    assert [bool(batch.params._cache) for batch in given] == [False] * 5 + [True]
    made.stepper.evaluate(given)
    assert [bool(batch.params._cache) for batch in given] == [False] * 5 + [True]
    process_groups.finalize()
