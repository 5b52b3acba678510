"""Power of choice: clients with the largest losses take part (Cho, Wang and Joshi, 2020, arXiv 2010.01243)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_lbgm.core.validation import check_count
from lightning_lbgm.data.samplers.base import Draw, Sampler, SamplerState
from lightning_lbgm.data.samplers.size import draw_by_size

__all__ = ["PowerOfChoice"]


class PowerOfChoice(Sampler):
    """Draw d candidates by n_k, and take those of them whose last loss is largest.

    It is the variant pi_rpow-d of Cho et al. (2020, arXiv 2010.01243). A client's loss is the mean over its local steps
    of the last round in which its update was due, which it reports anyway, so that nothing more is sent. Clients that
    have reported none come first; those whose loss was not a finite number come last. Equal ones are taken in the order
    in which they were drawn. The variants that ask all candidates for their present loss are not here.

    It learns faster where clients differ, at the price of a bias toward those with large losses, which grows with d;
    d = m is ``SizeSampler``. As the size counts in the draw, the paper's mean is that of
    ``LBGMFederated(weighting="uniform")``.

    Args:
        d: Candidates, at least as many as clients are wanted in a round.

    Raises:
        TypeError: If ``d`` is not an int.
        ValueError: If ``d`` is not positive, or at fit start if it is smaller than the cohort.

    Examples:
        >>> from lightning_lbgm.data import Draw
        >>> draw = Draw(0, (2, 5, 7), 2, 10, lambda client_id: 100, seed=0)
        >>> PowerOfChoice(d=3).sample(draw, {"losses": {2: 0.5, 5: 2.0}})  # 7 has never taken part
        [7, 5]
    """

    def __init__(self, d: int) -> None:
        self.d = check_count("PowerOfChoice", "d", d)

    def init(self) -> SamplerState:
        return {"losses": {}}

    def check_size(self, size: int) -> None:
        if self.d < size:
            raise ValueError(
                f"`PowerOfChoice(d={self.d})` draws fewer candidates than the {size} clients that are chosen in a"
                f" round: use d={size} or more, or a smaller `clients_per_round`."
            )

    def sample(self, draw: Draw, state: SamplerState) -> Sequence[int]:
        losses = state["losses"]
        candidates = draw_by_size(draw, self.d)
        candidates.sort(key=lambda client_id: losses.get(client_id, math.inf), reverse=True)  # equal ones keep order
        return candidates[: draw.size]

    def end_round(self, state: SamplerState, losses: Mapping[int, float]) -> SamplerState:
        reported = {k: loss if math.isfinite(loss) else -math.inf for k, loss in losses.items()}
        return {"losses": {**state["losses"], **reported}}
