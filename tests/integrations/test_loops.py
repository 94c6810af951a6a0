"""The recipes for loops: plain and torch.distributed.checkpoint."""

from __future__ import annotations

import pytest
import torch
from recipes import Recipe, blocks, close, plain, sections

PLAIN = {"A plain loop": True, "torch.distributed.checkpoint": False}


@pytest.mark.parametrize("section", PLAIN)
def test_losses_are_those_of_torch(section: str) -> None:
    Recipe(section).run("make", "train").same_as(*plain(schedule=PLAIN[section]))


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("section", PLAIN)
def test_a_resumed_run_goes_on(section: str) -> None:
    losses, norms = plain(schedule=PLAIN[section])
    Recipe(section, range(4)).run("make", "train", "save")
    resumed = Recipe(section, range(4, 8)).run("make", "load", "train")
    close(resumed.losses, losses[4:])
    close(resumed.norms, norms[4:])


def test_a_checkpoint_of_the_bare_optimizer_is_resumed() -> None:
    section = "torch.distributed.checkpoint"
    first = Recipe(section, range(4)).run("make", "train")
    first.names["opt"] = first["opt"].optimizer
    first.run("save")
    resumed = Recipe(section, range(4, 8)).run("make", "load", "train")
    close(resumed.losses, plain(schedule=False)[0][4:])


def test_total_norm_before_the_first_step_of_distributed_checkpoint() -> None:
    recipe = Recipe("torch.distributed.checkpoint").run("make")
    recipe["get_state_dict"](recipe["model"], recipe["opt"])
    assert recipe["opt"].total_norm == torch.tensor(0.0)


def test_all_recipes_have_code() -> None:
    assert len(sections()) == 8
    for section in sections():
        assert {"make", "train"} <= set(blocks(section))
