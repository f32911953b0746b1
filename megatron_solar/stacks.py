"""What a thread is doing, read from its frames: where it stands in our code or megatron's, and whether it waits.

With gloo a collective blocks in a frame of torch.distributed, or in a `wait` that megatron calls. With NCCL it is
queued on the device, and the thread blocks where it next needs a number: in `item` or `synchronize` in megatron, or in
a function marked with `waits_for_others`. A kernel of its own that never ends looks the same there; NCCL's flight
record tells them apart. What is said here of GPUs has never run on one.

No source line is read: the disk that holds it may be what does not answer.
"""

import dis
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_WAITING_FUNCTIONS: set[CodeType] = set()
_OWN = ("megatron_solar", "orchestrator", "megatron", "__main__")  # a worker is its process's main module
_WAITING_CALLS = ("wait", "item", "synchronize")


def waits_for_others(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function of ours that does nothing but wait for other ranks."""
    _WAITING_FUNCTIONS.add(function.__code__)
    return function


def is_waiting(frame: FrameType) -> bool:
    """Return whether a thread whose innermost frame this is waits for other ranks."""
    if _is_of(frame, "torch.distributed") or frame.f_code in _WAITING_FUNCTIONS:
        return True
    if _is_of(frame, "torch.cuda") and frame.f_back is not None:
        frame = frame.f_back
    return _is_of(frame, "megatron") and _call_under_way(frame) in _WAITING_CALLS


def place(frame: FrameType) -> str:
    """Return the innermost place in our code or megatron's, as `file.py:88 in function`."""
    frames = list(_outwards(frame))
    own = next((f for f in frames if _is_of(f, *_OWN)), frames[0])
    return f"{own.f_code.co_filename.rpartition('/')[2]}:{own.f_lineno} in {own.f_code.co_name}"


def traceback_of(frame: FrameType) -> str:
    """Return the frames of a thread as Python prints them, the innermost last, without source lines."""
    lines = [f'  File "{f.f_code.co_filename}", line {f.f_lineno}, in {f.f_code.co_name}' for f in _outwards(frame)]
    return "\n".join(["Traceback (most recent call last):", *reversed(lines)]) + "\n"


def _is_of(frame: FrameType, *packages: str) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _outwards(frame: FrameType) -> Iterator[FrameType]:
    here: FrameType | None = frame
    while here is not None:
        yield here
        here = here.f_back


def _call_under_way(frame: FrameType) -> str:
    """Return the name of the method whose call this frame is in, or nothing where it is no method's."""
    called = ""
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:
            break
        is_here = instruction.positions is not None and instruction.positions.lineno == frame.f_lineno
        if is_here and instruction.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            called = str(instruction.argval)
    return called
