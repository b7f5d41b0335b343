"""What the numbers say, in sentences; a difference inside its interval is not called a difference."""

from __future__ import annotations

from eval_nuscenes.bootstrap import LEAST_SCENES, Interval
from eval_nuscenes.comparison import LatencyComparison
from eval_nuscenes.evaluation import PRUNED
from eval_nuscenes.summary import EvaluationSummary, Planning, VariantSummary

REFERENCES = ("blanked", "constant_velocity")


def headlines(summary: EvaluationSummary) -> list[str]:
    """The findings under the first protocol.

    Returns:
        Sentences for a reader. They say what they rest on, and where that is little.
    """
    protocol = summary.protocols[0]
    reference = next(row for row in summary.variants if row.name == summary.reference)
    planning = reference.planning[protocol]
    mean = planning.l2_m[-1].mean
    if mean is None:
        return [f"Protocol {protocol} counts no sample here, so nothing can be said by it."]
    said = [
        f"{_called(reference)} is {mean:.2f} m off on average over 1, 2 and 3 s ({protocol}, "
        f"{resting_on(planning)})"
        f"{_time(reference)}{_others(summary, protocol)}.{_late(planning)}"
    ]
    if planning.few:
        said.append(
            f"Few samples: {resting_on(planning)} count under {protocol}; take every figure and interval "
            "here for a trial run."
        )
    for variant in summary.variants:
        if variant.name == summary.reference or variant.kind in REFERENCES:
            continue
        above = _difference(variant.planning[protocol].l2_above_reference_m, summary.reference)
        said.append(f"{variant.name}: {protocol} L2 {above}{_saved(variant, reference)}{_failed(variant)}.")
    said += [
        f"{variant.name} against {variant.counterpart}: {protocol} L2 {verdict(difference)}."
        for variant in summary.variants
        if (difference := variant.planning[protocol].l2_above_counterpart_m) is not None
    ]
    if reference.failed_plans:
        said.append(f"{_called(reference)} did not always answer{_failed(reference)}.")
    compared = [each for each in summary.comparisons if each.protocol == protocol]
    said += [comparison_sentence(each) for each in compared]
    if not compared and len({row.kind for row in summary.variants if row.kind in PRUNED}) > 1:
        said.append("The policies' latencies do not overlap, so they cannot be compared at equal latency.")
    if reference.kind == "full" and reference.cost is not None:
        total = reference.cost.total_ms.p50
        without = total - reference.cost.prefill_ms.p50
        said.append(
            f"A prefill that cost nothing would still leave {without:.0f} of {total:.0f} ms: pruning inside "
            "the decoder saves neither the vision tower nor the decoding."
        )
    return said


def resting_on(planning: Planning) -> str:
    """How many samples and scenes a figure rests on."""
    counts = sorted(set(planning.counted))
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{samples} samples of {planning.scenes} scene{'s' * (planning.scenes != 1)}"


def comparison_sentence(comparison: LatencyComparison) -> str:
    """Two policies at one latency, with no more than the interval allows."""
    return (
        f"At {comparison.latency_ms:.1f} ms per plan, {comparison.variant} against {comparison.against}: "
        f"{comparison.protocol} L2 {verdict(comparison.l2_m)}."
    )


def verdict(difference: Interval) -> str:
    """A difference of L2 in metres, and what may be said of it."""
    if difference.mean is None:
        return "no sample counts"
    if difference.low is None or difference.high is None:
        return f"{signed(difference.mean)} m, without an interval (fewer than {LEAST_SCENES} scenes)"
    interval = f"{signed(difference.mean)} m [{signed(difference.low)}, {signed(difference.high)}]"
    if difference.verdict == "no difference shown":
        return f"{interval}, no difference can be shown"
    return f"{interval}, {'better' if difference.verdict == 'lower' else 'worse'}"


def signed(metres: float) -> str:
    """With its sign, to the millimetre; never minus zero."""
    return f"{round(metres, 3) + 0.0:+.3f}"


def _called(variant: VariantSummary) -> str:
    return "Unpruned, the model" if variant.kind == "full" else variant.name


def _time(variant: VariantSummary) -> str:
    return f" at {variant.cost.total_ms.p50:.0f} ms per plan" if variant.cost is not None else ""


def _others(summary: EvaluationSummary, protocol: str) -> str:
    values = [
        f"{variant.name} {variant.planning[protocol].l2_m[-1].mean:.2f} m"
        for variant in summary.variants
        if variant.kind in REFERENCES and variant.planning[protocol].l2_m[-1].mean is not None
    ]
    return f" (for comparison: {', '.join(values)})" if values else ""


def _late(planning: Planning) -> str:
    if planning.late is None or planning.late.l2_m[-1].mean is None:
        return ""
    return (
        f" Carried out only after its {planning.late.latency_ms:.0f} ms, it is "
        f"{planning.late.l2_m[-1].mean:.2f} m off."
    )


def _difference(above: Interval | None, reference: str) -> str:
    if above is None or above.mean is None:
        return "has no sample that counts"
    if above.low is None or above.high is None:
        return f"{signed(above.mean)} m, without an interval (fewer than {LEAST_SCENES} scenes)"
    name = "unpruned" if reference == "full" else reference
    interval = f"{signed(above.mean)} m [{signed(above.low)}, {signed(above.high)}]"
    if above.verdict == "no difference shown":
        return f"{interval}, no difference from {name} can be shown"
    return f"{interval} {'better' if above.verdict == 'lower' else 'worse'} than {name}"


def _failed(variant: VariantSummary) -> str:
    """Nothing where every answer was a plan."""
    count = variant.failed_plans
    return f"; {count} of its plans failed and count as standing still" if count else ""


def _saved(variant: VariantSummary, reference: VariantSummary) -> str:
    if variant.cost is None or reference.cost is None:
        return ""
    prefill = variant.cost.prefill_ms.p50 / max(reference.cost.prefill_ms.p50, 1e-9)
    total = variant.cost.total_ms.p50 / max(reference.cost.total_ms.p50, 1e-9)
    return f"; prefill takes {prefill:.0%} of the unpruned time, the whole plan {total:.0%}"
