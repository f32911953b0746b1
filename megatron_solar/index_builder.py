"""Build the sample index of a run ahead, on any machine, without ranks: the very files that rank 0 would build.

The blend over shards is one pass; then every epoch of a shard is built by itself, in several processes.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_solar import compat
from megatron_solar.prebuilt_index import REQUEST, expected_size, prebuilt_problems
from megatron_solar.preload import die_with_parent
from megatron_solar.sample_order import EachEpoch, Epoch, build_index
from megatron_solar.sample_request import SampleRequest
from orchestrator.errors import OrchestrateError
from orchestrator.files import check_room, new_folder, write_json

Show = Callable[[str, int, int], None]
"""Told of the split, of the epochs built and of all."""


@contextlib.contextmanager
def epoch_workers(count: int) -> Iterator[EachEpoch]:
    """Yield a way to go through epochs in `count` processes; forked, so that none imports megatron again.

    Enter it before anything starts threads, such as a progress bar.
    """
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),)
    ) as pool:
        pool.submit(int).result()  # forks them all now

        def each(function: Callable[[Epoch], int], epochs: Sequence[Epoch]) -> Iterable[int]:
            try:
                yield from pool.map(function, epochs, chunksize=max(1, min(16, len(epochs) // (8 * count))))
            except concurrent.futures.BrokenExecutor as error:
                raise OrchestrateError(
                    "a process that built a part of the index was killed, perhaps for memory; the same command "
                    "starts over, with fewer --workers if memory was short"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield each


def _begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def build_ahead(request: SampleRequest, output: Path, each: EachEpoch, show: Show) -> bool:
    """Build the index of a request into a new folder, which appears whole or not at all.

    Returns:
        whether it was built; it is left as it is where the folder has it already.

    Raises:
        DataError: a shard is not what its manifest says.
        DiskFullError: the disk has no room for it; nothing is written.
        OrchestrateError: the folder is there and is something else, or a process was killed.
    """
    if output.exists() and not prebuilt_problems(output, request):
        return False
    files, size = expected_size(request)
    check_room(output, size, files, "the sample index")
    digests, open_epoch = request.digests(), compat.EpochOpener(request)
    with new_folder(output) as folder:
        for name, source in request.sources.items():

            def each_shown(
                function: Callable[[Epoch], int], epochs: Sequence[Epoch], split: str = name
            ) -> Iterable[int]:
                show(split, 0, len(epochs))
                for done, size in enumerate(each(function, epochs), 1):
                    yield size
                    show(split, done, len(epochs))

            build_index(source, folder / name, digests[name], open_epoch, compat.blend, each_shown)
        write_json(folder / REQUEST, request.facts())
    return True
