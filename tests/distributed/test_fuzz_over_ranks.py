"""Parameters of any kind on two ranks, against one process."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings
from parameters import Spot, Twins
from torch.optim import SGD, AdamW, NAdam, RMSprop

CASES, SECONDS = 200, 30
MAKERS: dict[str, Any] = {
    "AdamW": lambda p: AdamW(p, lr=0.05),
    "fused": lambda p: AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: AdamW(p, lr=0.05, foreach=True),
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "NAdam": lambda p: NAdam(p, lr=0.05),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
}
SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple)


@st.composite
def spots(draw: Any) -> Spot:
    shape = draw(SHAPES)
    if draw(st.integers(0, 3)) == 0:
        return Spot(shape)
    placed = draw(st.sampled_from(["R", *(f"S{i}" for i in range(len(shape)))]))
    # Without a gradient on one rank alone, a replica would stay behind.
    absent = [(), (), (), (0,), (1,), (0, 1)] if placed != "R" else [(), (), (0, 1)]
    return Spot(shape, (2,), placed, draw(st.sampled_from(absent)))


def check_case(
    given_spots: list[Spot], maker: str, mode: str, write_grads: bool | None, steps: list[int]
) -> None:
    twins = Twins(given_spots, MAKERS[maker], mode=mode, write_grads=write_grads)
    for step in steps:
        twins.set_grads(step)
        twins.ours.step()
        twins.theirs.step()
        twins.check(rtol=1e-5, atol=1e-6)


def test_any_parameters(on_ranks: Any) -> None:
    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # each fault ends the processes: to shrink one takes minutes
    )
    @given(
        st.lists(spots(), min_size=1, max_size=6),
        st.sampled_from(sorted(MAKERS)),
        st.sampled_from(["auto", "auto", "eager"]),
        st.sampled_from([None, True, False]),
        st.lists(st.integers(0, 9), min_size=1, max_size=4),
    )
    def run(
        given_spots: list[Spot],
        maker: str,
        mode: str,
        write_grads: bool | None,
        steps: list[int],
    ) -> None:
        args = (given_spots, maker, mode, write_grads, steps)
        on_ranks(2, check_case, *args, seconds=SECONDS)

    assert torch.get_num_threads() > 0
    run()
