"""The warning at the start of runs whose weights do not exclude a collapse."""

from __future__ import annotations

from typing import Any

from align_uniform.bounds import can_collapse


def collapse_warning(objective: Any, push: float = 1) -> dict[str, str]:
    """{"warning": line} where alignment may pull all features to one point, else {}.

    Args:
        objective: with the weights, align_alpha and unif_t.
        push: as in `align_uniform.bounds.can_collapse`.
    """
    align_w, unif_w, t = objective.align_w, objective.unif_w, objective.unif_t
    alone = not objective.contr_w
    if not alone or not can_collapse(align_w, unif_w, t, alpha=objective.align_alpha, push=push):
        return {}
    least = f"{align_w / (push * t):.3g}"
    factor = "" if round(push, 3) == 1 else f"{push:.3g} * "
    return {
        "warning": f"features may collapse to one point: the weight of alignment, {align_w:g}, is "
        f"above {factor}t * that of uniformity, {push * t * unif_w:.3g}; a weight of uniformity of "
        f"at least {least} excludes it"
    }
