"""The loss of the auxiliary routers in steps whose batches lack a modality."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mmscale.data.vocab import Vocabulary
from mmscale.model.build import build_chunks, transformer_config
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.router_step import RouterStepper
from mmscale.train.steps.step import Stepper
from tests.distributed.test_auxiliary_routers import settings
from tests.support import run_ranks


@pytest.mark.parametrize("model", ["moma", "moma_depth"])
@pytest.mark.parametrize("absent", ["image", None])
def test_routers_of_a_modality_that_a_step_lacks_are_left_out(model: str, absent: str | None) -> None:
    """Routers that have learned nothing have a cross entropy of 0.69; without a token they decide nothing."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = settings(model)
        process_groups.initialize_layout(tp=1, pp=1, vpp=None, ep=1, cp=1, seed=made.run.seed)
        groups, transformer = process_groups.collection(), transformer_config(made)
        models: Any = build_chunks(made, groups, transformer=transformer)
        stepper = RouterStepper(
            Stepper(made, models, None, groups), AuxiliaryTrainer(made, transformer, models, groups)
        )
        share, vocabulary = made.model.experts.share, Vocabulary.from_config(made.vocab)
        assert isinstance(share, dict)
        mixture = SyntheticMixture(made, share=share, absent=absent)
        read = [to_device(mixture.micro_batch(index), vocabulary) for index in (1, 3)]
        loss = stepper.compute(read).losses["loss"]
        assert loss == pytest.approx(math.log(2), abs=0.02) and stepper.figures()["loss"] == pytest.approx(loss)
        process_groups.destroy_layout()
        process_groups.finalize()

    run_ranks(ranks_do, world_size=1)
