"""What `benchmarks/gpu_check.py` found: one result a case, the table, the JSON and the exit code. Pure.

Standard library only: it is read where nothing else could be imported.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from orchestrator.values import to_plain

WIDTH = 118
LOSS_LIMIT = 0.01
"""Relative difference of a step's loss from bf16's: the default of `precision.gap_alarm`."""
PEAK_AIM = 0.60
"""Share of the bf16 peak at which layers should be computed in bf16."""
FP8_AIM = 1.3
"""How many times faster they should be in FP8."""

Outcome = Literal["passed", "failed", "not run", "below aim"]
Figures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One case of a check."""

    check: str
    case: str
    outcome: Outcome
    """`below aim` is slower than hoped for and no failure."""
    told: str
    """One line for people."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Numbers, and lists of them, for programs; units are in their names."""


def in_a_line(error: Exception, longest: int = 400) -> str:
    """Return an error as a table shows it, of so many characters at most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:longest]


def exit_code(results: Sequence[Result], device: str) -> int:
    """Return 0 where all passed; what was not run counts as a failure unless the CPU was asked for."""
    outcomes = {result.outcome for result in results}
    if "failed" in outcomes or ("not run" in outcomes and device == "cuda"):
        return 1
    return 0 if "passed" in outcomes else 1


def report(results: Sequence[Result], device: str, seconds: float) -> dict[str, Any]:
    """Return what the JSON file holds."""
    return {
        "device": device,
        "all_passed": exit_code(results, device) == 0,
        "seconds": round(seconds, 1),
        "conventions": {
            "linear TFLOP/s": "2*M*N*K for each product; forward and backward are three products",
            "model TFLOP/s": "the plan's flops_per_token: 6 x matrix parameters (output layer included) and the causal "
            "half of attention's scores, forward and backward; nothing that is computed again counts",
            "MFU": "model TFLOP/s by the dense bf16 peak, in FP8 too",
            "error": "Frobenius norm of the difference by that of the fp32 product",
        },
        "results": [to_plain(result) for result in results],
    }


def table(results: Sequence[Result]) -> str:
    """Return the results as lines within 118 columns."""
    headings = ("check", "case", "outcome")
    rows = [(result.check, result.case, result.outcome, result.told) for result in results]
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(3)]
    indent = sum(widths) + 6
    lines = ["  ".join(name.ljust(width) for name, width in zip((*headings, ""), (*widths, 0), strict=True)).rstrip()]
    for row in rows:
        told = textwrap.wrap(row[3], max(30, WIDTH - indent), max_lines=4, placeholder=" ...") or [""]
        start = "  ".join(name.ljust(width) for name, width in zip(row[:3], widths, strict=True))
        lines.append(f"{start}  {told[0]}".rstrip())
        lines += [" " * indent + line for line in told[1:]]
    return "\n".join(lines)


def summary(results: Sequence[Result], device: str) -> str:
    """Return the last line."""
    outcomes = [result.outcome for result in results]
    counts = [f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "not run", "below aim")]
    verdict = "all that can run without a GPU passed" if device == "cpu" else "all passed"
    return f"{', '.join(counts)}: {verdict if exit_code(results, device) == 0 else 'not all passed'}"


def agreement(reference: Result, other: Result, limit: float = LOSS_LIMIT) -> Result:
    """Compare the losses of two runs step by step, over the steps that both have."""
    count = min(len(reference.figures["losses"]), len(other.figures["losses"]))
    left, right = (run.figures["losses"][:count] for run in (reference, other))
    differences = [abs(b - a) / abs(a) for a, b in zip(left, right, strict=True)]
    worst = max(range(count), key=lambda step: differences[step])
    is_wrong = any(not difference <= limit for difference in differences)  # a loss that is no number does not pass
    is_same = other.case.startswith("fp8") and not any(differences)
    return Result(
        check="agreement",
        case=f"{other.case} with {reference.case}",
        outcome="failed" if is_wrong or is_same else "passed",
        told=f"losses of {len(left)} steps differ by at most {differences[worst]:.1e} (step {worst + 1}), "
        f"limit {limit:g}; the last are {left[-1]:.4f} and {right[-1]:.4f}"
        + ("; losses that are equal to the bit were not computed in FP8" if is_same else ""),
        figures={"relative_differences": differences, "limit": limit},
    )


def aims(results: Sequence[Result]) -> list[Result]:
    """Hold the best layer speeds of `tune` against what is aimed at; nothing where one is missing."""
    speeds = {
        result.case: result.figures["layer_tflops"]
        for result in results
        if result.check == "tune" and "layer_tflops" in result.figures
    }
    peak = next((result.figures["peak_tflops"] for result in results if "peak_tflops" in result.figures), None)
    found = []
    slow = speeds.get("bf16, layers")
    fast = speeds.get("fp8-tensorwise, layers")
    if slow is not None and peak:
        share = slow / peak
        told = f"a layer in bf16 runs at {slow:.0f} TFLOP/s, {share:.0%} of {peak:.0f}; aim {PEAK_AIM:.0%}"
        found.append(_aim("share of the peak", share >= PEAK_AIM, told, share))
    if slow is not None and fast is not None:
        told = f"a layer in FP8 runs at {fast:.0f} TFLOP/s, {fast / slow:.2f} times bf16; aim {FP8_AIM:g} times"
        found.append(_aim("FP8 by bf16", fast / slow >= FP8_AIM, told, fast / slow))
    return found


def _aim(case: str, is_reached: bool, told: str, value: float) -> Result:
    return Result(
        check="aim", case=case, outcome="passed" if is_reached else "below aim", told=told, figures={"value": value}
    )
