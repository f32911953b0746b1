"""Linear parts of SOLAR's layers in bf16 and in FP8, forward and backward, against fp32, and how fast they are.

What FP8 should cost in accuracy is computed beside it: the same inputs are rounded with torch's own casts, with the
scales of the recipe, and multiplied in fp32. An error far above that is a fault. One far below it is a fault too: the
product was not computed in FP8.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.settings import PrecisionSettings

BF16_LIMIT = 0.01
"""bf16 rounds to 8 bits, 2e-3 on average; its products are summed in fp32."""
RANGE = (0.5, 1.5)
"""What an FP8 error may be, as a share of the one that torch's casts give."""
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
WARM_UP = 4
"""Passes before the one that is compared: delayed scaling takes its scales from those before."""
TIMED = 12

PARTS = ("output", "input gradient", "weight gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A linear part: [tokens, inputs] by [outputs, inputs]."""

    name: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> float:
        """Of one product: 2*M*N*K."""
        return 2.0 * self.tokens * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What is multiplied, all in bf16, so that every precision begins from the same numbers."""

    x: Tensor
    """Inputs, [M, K]."""
    w: Tensor
    """Weight, [N, K]."""
    g: Tensor
    """Gradient of the output, [M, N]."""


def operands(product: Product, device: str, seed: int = 1) -> Operands:
    """Draw normal inputs, weights as a model begins with them, and small gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, deviation: float) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device)
        return (drawn * deviation).bfloat16()

    return Operands(
        x=draw(product.tokens, product.inputs, 1.0),
        w=draw(product.outputs, product.inputs, 0.02),
        g=draw(product.tokens, product.outputs, 1e-3),
    )


def three_products(x_MK: Tensor, w_NK: Tensor, g_MN: Tensor) -> tuple[Tensor, ...]:
    """Return output, input gradient and weight gradient of a linear part, in the inputs' own numbers."""
    return x_MK @ w_NK.t(), g_MN @ w_NK, g_MN.t() @ x_MK


def reference(given: Operands) -> tuple[Tensor, ...]:
    """Return the three products in fp32, without TF32."""
    return three_products(given.x.float(), given.w.float(), given.g.float())


def rounded(value: Tensor, dtype: torch.dtype, rows: int = 0, columns: int = 0) -> Tensor:
    """Return a matrix as FP8 keeps it, in fp32.

    Args:
        rows, columns: of the blocks that have a scale each, a power of two as Transformer Engine's; 0 is one scale.
    """
    wide = value.float()
    if not rows:
        scale = torch.finfo(dtype).max / wide.abs().max().clamp(min=1e-30)
        return (wide * scale).to(dtype).float() / scale
    height, width = wide.shape
    blocks = wide.view(height // rows, rows, width // columns, columns)
    scale = torch.finfo(dtype).max / blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2(scale)))
    return ((blocks * scale).to(dtype).float() / scale).view(height, width)


def expected_errors(given: Operands, precision: PrecisionSettings, exact: Sequence[Tensor]) -> list[float]:
    """Return the errors of the three products when their inputs are rounded as a recipe does, and nothing else is.

    Blocks of inputs and gradients are 1 x 128 along what is summed over, those of weights 128 x 128.
    """
    backward = E5M2 if precision.fp8_format == "hybrid" else E4M3
    x, w, g = given.x, given.w, given.g
    if precision.fp8 == "blockwise":
        weight = rounded(w, E4M3, BLOCK, BLOCK)
        found = (
            rounded(x, E4M3, 1, BLOCK) @ weight.t(),
            rounded(g, backward, 1, BLOCK) @ weight,
            rounded(g, backward, BLOCK, 1).t() @ rounded(x, E4M3, BLOCK, 1),
        )
    else:
        found = three_products(rounded(x, E4M3), rounded(w, E4M3), rounded(g, backward))
    return errors(found, exact)


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return the norm of each difference as a share of the norm of what is exact."""
    return [
        float(torch.linalg.vector_norm(a.float() - b) / torch.linalg.vector_norm(b))
        for a, b in zip(found, exact, strict=True)
    ]


def problems(measured: Sequence[float], expected: Sequence[float] | None) -> list[str]:
    """Return which errors are not as they should be; without expected ones it is bf16."""
    found = []
    for number, part in enumerate(PARTS):
        low, high = (0.0, BF16_LIMIT) if expected is None else (share * expected[number] for share in RANGE)
        if not low <= measured[number] <= high:
            why = "; so small an error means that it was not computed in FP8" if measured[number] < low else ""
            found.append(f"error of the {part} should be {low:.4f} to {high:.4f}, found {measured[number]:.4f}{why}")
    return found


def passes(layer: Callable[[Tensor], Tensor], given: Operands, weight: Tensor) -> tuple[Tensor, ...]:
    """Run a layer forward and backward once, and return what `three_products` does."""
    x_MK = given.x.detach().requires_grad_()
    weight.grad = None
    output = layer(x_MK)
    output.backward(given.g)
    assert x_MK.grad is not None and weight.grad is not None
    return output.detach(), x_MK.grad, weight.grad


def torch_layer(given: Operands) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return torch's own linear part in bf16, and its weight."""
    weight = torch.nn.Parameter(given.w.clone())
    return lambda x_MK: torch.nn.functional.linear(x_MK, weight), weight


def transformer_engine_layer(given: Operands, recipe: Any | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return Transformer Engine's linear part, in FP8 where there is a recipe, and its weight."""
    import transformer_engine.pytorch as te

    outputs, inputs = given.w.shape
    module = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        module.weight.copy_(given.w)

    def layer(x_MK: Tensor) -> Tensor:
        if recipe is None:
            return module(x_MK)
        with te.autocast(enabled=True, recipe=recipe):
            return module(x_MK)

    return layer, module.weight


def seconds_of(work: Callable[[], object], device: str, times: int = TIMED) -> float:
    """Return the median seconds of some work that was done before."""
    found = []
    for _ in range(times):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def compare(
    product: Product, precision: PrecisionSettings, recipe: Any | None, device: str
) -> tuple[list[str], str, dict[str, Any]]:
    """Compute a linear part in a precision: Transformer Engine's on a GPU, torch's own in bf16 on the CPU.

    Returns:
        what is wrong, a line for people, and the figures.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    given = operands(product, device)
    exact = reference(given)
    layer, weight = transformer_engine_layer(given, recipe) if device == "cuda" else torch_layer(given)
    for _ in range(WARM_UP):
        found = passes(layer, given, weight)
    measured = errors(found, exact)
    expected = expected_errors(given, precision, exact) if precision.fp8 != "none" else None
    del exact, found
    seconds = seconds_of(lambda: passes(layer, given, weight), device)
    tflops = 3 * product.flops / seconds / 1e12
    told = f"errors {' '.join(f'{error:.4f}' for error in measured)}"
    if expected is not None:
        told += f" (rounding alone {' '.join(f'{error:.4f}' for error in expected)})"
    told += f"; {seconds * 1e3:.2f} ms forward and backward, {tflops:.3g} TFLOP/s"
    figures = {
        "tokens": product.tokens,
        "inputs": product.inputs,
        "outputs": product.outputs,
        "errors": dict(zip(PARTS, measured, strict=True)),
        "expected_errors": dict(zip(PARTS, expected, strict=True)) if expected is not None else None,
        "seconds": seconds,
        "tflops": tflops,
    }
    return problems(measured, expected), told, figures


def scaled_product(
    product: Product, device: str, accumulate: Literal["fast", "exact"] = "fast"
) -> tuple[list[str], str, dict[str, Any]]:
    """Compute the forward product with `torch._scaled_mm`, one scale a tensor; no Transformer Engine is in it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = operands(product, device)
    exact = given.x.float() @ given.w.float().t()

    def cast(value: Tensor) -> tuple[Tensor, Tensor]:
        scale = value.abs().max().float() / torch.finfo(E4M3).max
        return (value.float() / scale).to(E4M3), scale

    x_MK, x_scale = cast(given.x)
    w_NK, w_scale = cast(given.w)

    def multiply() -> Tensor:
        return torch._scaled_mm(
            x_MK,
            w_NK.t(),
            scale_a=x_scale,
            scale_b=w_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=accumulate == "fast" and device == "cuda",
        )

    measured = errors([multiply()], [exact])[0]
    expected = errors([rounded(given.x, E4M3) @ rounded(given.w, E4M3).t()], [exact])[0]
    seconds = seconds_of(multiply, device)
    tflops = product.flops / seconds / 1e12
    low, high = (share * expected for share in RANGE)
    wrong = [] if low <= measured <= high else [f"error should be {low:.4f} to {high:.4f}, found {measured:.4f}"]
    told = f"error {measured:.4f} (rounding alone {expected:.4f}); {seconds * 1e3:.2f} ms, {tflops:.3g} TFLOP/s"
    return wrong, told, {"error": measured, "expected_error": expected, "seconds": seconds, "tflops": tflops}
