"""How fast a step of SOLAR's layers is on one GPU in several ways, and one layer alone."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check_model import Found, Trial, memory, start_peak
from benchmarks.gpu_check_sizes import Size, settings_of
from megatron_solar import compat
from orchestrator.settings import PrecisionSettings
from orchestrator.units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a step."""

    recompute: str = "none"
    micro_batch_size: int = 1
    is_fused: bool = False
    """With megatron's fused SwiGLU, rotary positions and cross entropy, which runs do not use yet."""

    @property
    def name(self) -> str:
        """A few words."""
        recompute = "" if self.recompute == "none" else f", {self.recompute}"
        return f"batch {self.micro_batch_size}{recompute}{', fused' if self.is_fused else ''}"


TUNED = (
    Variant(),
    Variant(micro_batch_size=2),
    Variant(recompute="selective"),
    Variant(recompute="selective", micro_batch_size=2),
    Variant(micro_batch_size=2, is_fused=True),
)
TUNED_STEPS = 6


def tune(
    size: Size, precision: PrecisionSettings, device: str, folder: Path, variants: tuple[Variant, ...] = TUNED
) -> Iterator[Found]:
    """Time a step in several ways, then one layer alone: half of what two layers more cost the fastest way."""
    precision = dataclasses.replace(precision, first_bf16_layers=0, last_bf16_layers=0)
    times: dict[Variant, float] = {}
    for number, variant in enumerate(variants):
        try:
            speed, figures = _timed(size, precision, device, folder / str(number), variant)
        except Exception as error:  # such as too little memory; the next one may fit
            yield "tune", f"{precision.label}, {variant.name}", [f"{type(error).__name__}: {error}"[:400]], "", {}
            continue
        times[variant] = speed["step_seconds"]
        told = f"{speed['tokens_per_second']:.0f} tokens/s, {speed['tflops']:.3g} TFLOP/s, MFU {speed['mfu']:.1%}"
        if figures:
            told += f", peak {format_bytes(figures['peak_allocated_bytes'])}"
        yield "tune", f"{precision.label}, {variant.name}", [], told, speed | figures
    if not times:
        return
    best = min(times, key=lambda variant: times[variant])
    half = size.shape.num_layers // 2
    fewer = dataclasses.replace(size, shape=dataclasses.replace(size.shape, num_layers=half))
    speed, _ = _timed(fewer, precision, device, folder / "half", best)
    layers = size.shape.num_layers - half
    seconds = (times[best] - speed["step_seconds"]) / layers
    tokens = size.sequences * size.sequence_length
    flops = size.shape.flops_per_token(size.sequence_length) - fewer.shape.flops_per_token(size.sequence_length)
    if seconds <= 0:
        said = f"{layers} layers more should take longer, found {seconds * layers:.4f} s more"
        yield "tune", f"{precision.label}, layers", [said] if device == "cuda" else [], said, {}  # a CPU has other work
        return
    tflops = flops / layers * tokens / seconds / 1e12
    told = f"{best.name}: one layer takes {seconds * 1e3:.2f} ms a step, {tflops:.3g} TFLOP/s"
    figures = {"layer_seconds": seconds, "layer_tflops": tflops, "peak_tflops": speed["peak_tflops"], "way": best.name}
    yield "tune", f"{precision.label}, layers", [], told, figures


def _timed(
    size: Size, precision: PrecisionSettings, device: str, folder: Path, variant: Variant
) -> tuple[dict[str, float], dict[str, Any]]:
    start_peak(device)
    settings = settings_of(
        size, precision, device, micro_batch_size=variant.micro_batch_size, recompute=variant.recompute
    )
    config_of = compat.transformer_config
    if variant.is_fused:
        compat.transformer_config = _fused(config_of)
    try:
        trial = Trial(settings, folder, is_filled_later=True)
    finally:
        compat.transformer_config = config_of
    seconds = [trial.step()[1] for _ in range(TUNED_STEPS)]
    figures = memory(trial)[2] if device == "cuda" else {}
    return trial.speed(statistics.median(seconds[TUNED_STEPS // 2 :])), figures


def _fused(config_of: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*arguments: Any) -> Any:
        config = config_of(*arguments)
        config.bias_activation_fusion = True
        config.apply_rope_fusion = True
        config.cross_entropy_loss_fusion = True
        config.cross_entropy_fusion_impl = "native"
        return config

    return changed
