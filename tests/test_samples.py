"""The order of samples: sample k is the same whatever the length of the run, and no torn index is trusted.

Real data sets and megatron's own indexes, in this process. What an epoch should hold is read from the
.bin and .idx files with numpy alone.
"""

import dataclasses
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed
from numpy.typing import NDArray

from megatron_solar.cpu import cuda_calls_on_cpu
from megatron_solar.sample_order import (
    BLEND_SHARDS,
    COMPLETE,
    ORDER,
    BlendSource,
    OrderedSamples,
    build_index,
    request_digest,
)
from megatron_solar.sample_request import request_samples
from orchestrator.errors import DataError
from orchestrator.model_shape import TransformerShape
from orchestrator.settings import DataSettings
from orchestrator.tokenize.manifest import DatasetManifest, TokenShard, read_manifest
from orchestrator.tokenize.stage import tokenize_corpus

if TYPE_CHECKING:
    from megatron_solar.data import Samples

LENGTH = 128
SEED = 11
SHAPE = TransformerShape(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    vocab_size=32000,
    max_position_embeddings=LENGTH,
)


@pytest.fixture(scope="module", autouse=True)
def megatron_on_cpu() -> Iterator[None]:
    """Megatron is imported inside, as in every CPU worker."""
    with cuda_calls_on_cpu():
        yield


@pytest.fixture(scope="module")
def one_shard(corpus: Path) -> Path:
    """A data set of one shard."""
    return corpus / "validation"


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A small data set of several shards."""
    folder = tmp_path_factory.mktemp("shards") / "json"
    manifest = tokenize_corpus(
        [Path(os.__file__).parent / "json", Path(os.__file__).parent / "wsgiref"],
        tokenizer,
        folder,
        shard_tokens=4000,
        progress=False,
    )
    assert len(manifest.shards) > 3
    return folder


def open_train(
    cache: Path, folders: Sequence[Path], samples: int, *, weights: tuple[float, ...] = (), seed: int = SEED
) -> OrderedSamples:
    """Open the training samples of data sets as a run does."""
    data = DataSettings(train=tuple(map(str, folders)), weights=weights, sequence_length=LENGTH)
    return open_data(cache, data, samples, seed=seed).train


def open_data(cache: Path, data: DataSettings, samples: int, *, held_out: int = 0, seed: int = SEED) -> "Samples":
    """Open the samples of data sets in one phase as a run does."""
    from megatron_solar.data import open_samples

    asked = request_samples(data, SHAPE, seed=seed, training_samples=samples, validation_samples=held_out)
    return open_samples(asked, cache)


def read(samples: OrderedSamples, count: int | None = None) -> list[bytes]:
    """Return the first samples, or all, each as the bytes of its sequence_length + 1 tokens."""
    found = []
    for number in range(len(samples) if count is None else count):
        item = samples[number]
        tokens, labels = item["tokens"].numpy(), item["labels"].numpy()
        assert tokens.dtype == labels.dtype == np.int64
        assert tokens.shape == labels.shape == (LENGTH,)
        assert (tokens[1:] == labels[:-1]).all()
        assert item["position_ids"].tolist() == list(range(LENGTH))
        found.append(np.append(tokens, labels[-1]).tobytes())
    return found


def epoch_samples(folder: Path) -> int:
    """Return how many samples an epoch of a data set has; a shard's last one needs its label as well."""
    return sum((shard.tokens - 1) // LENGTH for shard in read_manifest(folder).shards)


def documents_of(prefix: Path) -> list[NDArray[np.int64]]:
    """Read a shard's documents without megatron: the header of 34 bytes, then int32 lengths."""
    index = prefix.with_suffix(".idx").read_bytes()
    code, count = struct.unpack_from("<BQ", index, 17)
    lengths = np.frombuffer(index, np.int32, count, 34)
    tokens = np.fromfile(prefix.with_suffix(".bin"), {8: np.uint16, 4: np.int32}[code]).astype(np.int64)
    assert lengths.sum() == len(tokens)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def document_order(cache: Path, seed: int) -> NDArray[np.int32]:
    """Return the documents' order in the epoch of a seed, which megatron keeps in a file."""
    for description in (cache / "train").glob("*-description.txt"):
        if json.loads(description.read_text())["random_seed"] == seed:
            name = description.name.replace("description.txt", "document_index.npy")
            order: NDArray[np.int32] = np.load(description.with_name(name))
            return order
    raise AssertionError(f"no epoch of seed {seed} in {cache}")


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)], ids=["one data set of many shards", "two weighted data sets"])
def test_a_prolonged_run_begins_with_the_samples_of_the_shorter_one(
    tmp_path: Path, one_shard: Path, many_shards: Path, weights: tuple[float, ...]
) -> None:
    folders = [many_shards, one_shard] if weights else [many_shards]
    once = epoch_samples(many_shards)
    short = open_train(tmp_path / "short", folders, round(1.5 * once), weights=weights)
    long = open_train(tmp_path / "long", folders, round(4.3 * once), weights=weights)
    assert max(short.place(number)[1] for number in range(len(short))) == 1
    assert max(long.place(number)[1] for number in range(len(long))) >= 3
    assert read(short) == read(long, len(short))


def test_an_epoch_holds_what_the_files_hold_every_sample_once(tmp_path: Path, one_shard: Path) -> None:
    (shard,) = read_manifest(one_shard).shards
    documents = documents_of(one_shard / shard.name)
    once = epoch_samples(one_shard)
    assert once > 50
    found = read(open_train(tmp_path, [one_shard], 2 * once))
    for epoch in range(2):
        order = document_order(tmp_path, SEED + epoch)
        assert sorted(order) == list(range(len(documents)))
        stream = np.concatenate([documents[number] for number in order])
        windows = [stream[start : start + LENGTH + 1].tobytes() for start in range(0, once * LENGTH, LENGTH)]
        assert Counter(found[epoch * once : (epoch + 1) * once]) == Counter(windows)
        assert len(stream) - (once * LENGTH + 1) < LENGTH  # what is left is less than a sample


def test_epochs_differ_in_the_order_of_documents_and_of_samples(tmp_path: Path, one_shard: Path) -> None:
    once = epoch_samples(one_shard)
    found = read(open_train(tmp_path, [one_shard], 3 * once))
    epochs = [found[start : start + once] for start in range(0, 3 * once, once)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Other documents stand before a document, so nearly all samples are cut elsewhere.
    assert len(set(epochs[0]) & set(epochs[1])) < once / 2
    orders = [document_order(tmp_path, SEED + epoch) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 3


def test_a_data_set_of_many_shards_gives_each_sample_once_before_any_again(tmp_path: Path, many_shards: Path) -> None:
    once = epoch_samples(many_shards)
    samples = open_train(tmp_path, [many_shards], 3 * once)
    places = [samples.place(number) for number in range(3 * once)]
    for epoch in range(3):
        part = places[epoch * once : (epoch + 1) * once]
        assert {place[1] for place in part} == {epoch}
        assert len(set(part)) == once


def test_two_data_sets_keep_their_weights_within_a_sample_at_every_length(
    tmp_path: Path, one_shard: Path, corpus: Path
) -> None:
    samples = open_train(tmp_path, [one_shard, corpus / "train"], 2000, weights=(3.0, 7.0))
    of_first = np.cumsum([samples.place(number)[0] == 0 for number in range(2000)])
    assert np.abs(of_first - 0.3 * np.arange(1, 2001)).max() <= 1


def test_the_shards_of_weighted_data_sets_share_their_weight(
    tmp_path: Path, one_shard: Path, many_shards: Path
) -> None:
    samples = open_train(tmp_path, [one_shard, many_shards], 1000, weights=(1.0, 1.0))
    of_first = np.cumsum([samples.place(number)[0] == 0 for number in range(1000)])
    # The one furthest behind is next: no shard is ever a sample ahead, so a data set no more than its shards.
    shards = len(read_manifest(many_shards).shards)
    ahead = of_first - 0.5 * np.arange(1, 1001)
    assert ahead.max() <= 1
    assert ahead.min() >= -shards
    assert of_first[-1] == pytest.approx(500, abs=2)


@pytest.mark.parametrize("with_complete", [False, True], ids=["no complete.json", "complete.json"])
def test_a_torn_index_is_built_anew(tmp_path: Path, many_shards: Path, with_complete: bool) -> None:
    count = 2 * epoch_samples(many_shards)
    expected = read(open_train(tmp_path, [many_shards], count))
    folder = tmp_path / "train"
    torn = sorted(folder.glob("*.npy"))
    for path in torn:
        os.truncate(path, path.stat().st_size // 2)
    (folder / "left-over.npy").write_bytes(b"torn")
    if not with_complete:
        (folder / COMPLETE).unlink()
    assert read(open_train(tmp_path, [many_shards], count)) == expected
    assert sorted(folder.glob("*.npy")) == torn


def test_a_build_that_ends_half_way_leaves_nothing_that_is_trusted(tmp_path: Path, many_shards: Path) -> None:
    (shard, other, *_) = read_manifest(many_shards).shards
    source = BlendSource(
        prefixes=(str(many_shards / shard.name), str(many_shards / other.name)),
        weights=None,
        epoch_samples=(4, 4),
        samples=16,
    )
    opener = Opener(fails_at=3)
    with pytest.raises(InterruptedError):
        build_index(source, tmp_path / "train", "request", opener, by_turns)
    assert (tmp_path / "train" / BLEND_SHARDS).exists()
    with pytest.raises(DataError, match="does not see it"):
        OrderedSamples(source, tmp_path / "train", "request", opener)
    opener = Opener()
    build_index(source, tmp_path / "train", "request", opener, by_turns)
    assert len(opener.opened) == 4
    assert len(OrderedSamples(source, tmp_path / "train", "request", opener)) == 16


@pytest.mark.parametrize(("more", "seed"), [(5, SEED), (0, SEED + 1)], ids=["longer", "another seed"])
def test_an_index_of_another_request_is_not_used(tmp_path: Path, many_shards: Path, more: int, seed: int) -> None:
    count = epoch_samples(many_shards)
    first = read(open_train(tmp_path / "same", [many_shards], count))
    second = read(open_train(tmp_path / "same", [many_shards], count + more, seed=seed))
    assert second == read(open_train(tmp_path / "fresh", [many_shards], count + more, seed=seed))
    assert second != first
    names = [sorted(path.name for path in (tmp_path / cache / "train").iterdir()) for cache in ("same", "fresh")]
    assert names[0] == names[1]


def test_everything_that_decides_an_index_is_in_its_request(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(b"1234")
        (tmp_path / f"{name}.idx").write_bytes(b"12")
    source = BlendSource(
        prefixes=(str(tmp_path / "a"), str(tmp_path / "b")), weights=(1.0, 2.0), epoch_samples=(4, 5), samples=6
    )
    others = [
        dataclasses.replace(source, prefixes=source.prefixes[::-1]),
        dataclasses.replace(source, weights=(1.0, 3.0)),
        dataclasses.replace(source, weights=None),
        dataclasses.replace(source, epoch_samples=(4, 6)),
        dataclasses.replace(source, samples=7),
    ]
    digests = [
        *(request_digest(of, sequence_length=8, seed=1, tokenizer_fingerprint="t") for of in [source, *others]),
        request_digest(source, sequence_length=9, seed=1, tokenizer_fingerprint="t"),
        request_digest(source, sequence_length=8, seed=2, tokenizer_fingerprint="t"),
        request_digest(source, sequence_length=8, seed=1, tokenizer_fingerprint="u"),
    ]
    (tmp_path / "b.bin").write_bytes(b"12345")
    digests.append(request_digest(source, sequence_length=8, seed=1, tokenizer_fingerprint="t"))
    (tmp_path / "b.bin").write_bytes(b"1234")
    (tmp_path / "a.idx").write_bytes(b"1")
    digests.append(request_digest(source, sequence_length=8, seed=1, tokenizer_fingerprint="t"))
    assert len(set(digests)) == len(digests) == 11
    (tmp_path / "a.idx").write_bytes(b"12")
    assert request_digest(source, sequence_length=8, seed=1, tokenizer_fingerprint="t") == digests[0]


def test_an_index_of_the_same_request_is_not_built_again(tmp_path: Path, many_shards: Path) -> None:
    def files() -> dict[str, tuple[int, int]]:
        found = {path.name: path.stat() for path in (tmp_path / "train").iterdir()}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}

    open_train(tmp_path, [many_shards], 100)
    before = files()
    open_train(tmp_path, [many_shards], 100)
    assert files() == before


def test_a_rank_that_does_not_see_the_index_of_rank_0_says_so(tmp_path: Path) -> None:
    source = BlendSource(prefixes=("shard",), weights=None, epoch_samples=(4,), samples=4)
    with pytest.raises(DataError, match="a file system that all nodes share"):
        OrderedSamples(source, tmp_path, "request", Opener())


def test_epochs_are_opened_when_first_read_and_one_of_a_shard_at_a_time(tmp_path: Path) -> None:
    source = BlendSource(prefixes=("a", "b"), weights=None, epoch_samples=(2, 3), samples=8)
    build_index(source, tmp_path / "train", "request", Opener(), by_turns)
    opener = Opener()
    samples = OrderedSamples(source, tmp_path / "train", "request", opener)
    assert opener.opened == []
    assert [samples[number] for number in range(8)] == [
        {"a": (0, 0)}, {"b": (0, 0)}, {"a": (0, 1)}, {"b": (0, 1)},
        {"a": (1, 0)}, {"b": (0, 2)}, {"a": (1, 1)}, {"b": (1, 0)},
    ]  # fmt: skip
    assert opener.opened == [("a", 0, True), ("b", 0, True), ("a", 1, True), ("b", 1, True)]
    for number in (-1, 8):
        with pytest.raises(IndexError, match="from 0 to below 8"):
            samples[number]


def test_a_group_of_ranks_reads_what_one_process_alone_reads(
    tmp_path: Path, one_shard: Path, many_shards: Path
) -> None:
    alone = read(open_train(tmp_path / "alone", [one_shard, many_shards], 200))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert read(open_train(tmp_path / "group", [one_shard, many_shards], 200)) == alone
    finally:
        torch.distributed.destroy_process_group()


def test_held_out_samples_are_ordered_the_same_way(tmp_path: Path, one_shard: Path, many_shards: Path) -> None:
    data = DataSettings(train=(str(one_shard),), validation=(str(many_shards),), sequence_length=LENGTH)
    opened = open_data(tmp_path / "both", data, 8, held_out=40)
    (held_out,) = opened.validation.values()
    assert read(held_out) == read(open_train(tmp_path / "alone", [many_shards], 40))
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["train", "validation"]


def test_each_held_out_data_set_has_samples_of_its_own(tmp_path: Path, one_shard: Path, many_shards: Path) -> None:
    copy = shutil.copytree(one_shard, tmp_path / "copy" / many_shards.name)
    data = DataSettings(
        train=(str(one_shard),), validation=(str(many_shards), str(one_shard), str(copy)), sequence_length=LENGTH
    )
    opened = open_data(tmp_path / "cache", data, 8, held_out=20)
    assert list(opened.validation) == ["json", "validation", "json-2"]
    alone = {folder: read(open_train(tmp_path / folder.name, [folder], 20)) for folder in (many_shards, one_shard)}
    of_each = [read(samples) for samples in opened.validation.values()]
    assert of_each == [alone[many_shards], alone[one_shard], alone[one_shard]]


def test_a_shard_below_one_sample_is_left_out_where_the_data_set_has_others(many_shards: Path) -> None:
    from megatron_solar.sample_request import blend_source

    manifest = with_shards(many_shards, 10 * LENGTH + 1, LENGTH, 30 * LENGTH + 77)
    source = blend_source([manifest], ["folder"], (), LENGTH, 100)
    assert source.prefixes == ("folder/shard_00000", "folder/shard_00002")
    assert source.epoch_samples == (10, 30)
    assert source.weights == (10.0, 30.0)


def test_data_sets_without_a_sample_are_named_with_their_shards(many_shards: Path) -> None:
    from megatron_solar.sample_request import blend_source

    manifests = [with_shards(many_shards, 1000), with_shards(many_shards, LENGTH, 5), with_shards(many_shards, 3)]
    with pytest.raises(DataError) as raised:
        blend_source(manifests, ["good", "short", "tiny"], (), LENGTH, 100)
    assert str(raised.value).splitlines() == [
        "a data set should have a shard of at least 129 tokens, one sample at data.sequence_length=128; add text or "
        "shorten the sequences:",
        "  - short has shard_00000 with 128 tokens, shard_00001 with 5 tokens",
        "  - tiny has shard_00000 with 3 tokens",
    ]


def test_a_shard_that_is_not_what_its_manifest_says_is_an_error(tmp_path: Path) -> None:
    source = BlendSource(prefixes=("a",), weights=None, epoch_samples=(5,), samples=5)
    with pytest.raises(DataError, match="a should hold 5 samples, found 2"):
        build_index(source, tmp_path / "train", "request", Opener(), by_turns)


def test_the_order_belongs_to_the_fingerprint(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSettings(train=(str(many_shards),), sequence_length=LENGTH)
    asked = request_samples(data, SHAPE, seed=SEED, training_samples=8, validation_samples=0)
    before = asked.fingerprint_at(8)
    monkeypatch.setattr("megatron_solar.sample_order.ORDER", ORDER + 1)
    assert asked.fingerprint_at(8) != before


class Opener:
    """Stands for megatron: an epoch's samples say where they are from; notes what was opened."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.opened: list[tuple[str, int, bool]] = []
        self._fails_at = fails_at

    def __call__(self, folder: Path, prefix: str, epoch: int, *, is_built: bool) -> Any:
        self.opened.append((prefix, epoch, is_built))
        if len(self.opened) == self._fails_at:
            raise InterruptedError
        size = {"a": 2, "b": 3}.get(prefix, 4)
        return [{prefix: (epoch, sample)} for sample in range(size)]


def by_turns(shards: NDArray[np.int16], samples: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
    """Fill a blend of two shards that take turns."""
    shards[:] = np.arange(len(shards)) % 2
    samples[:] = np.arange(len(shards)) // 2


def with_shards(folder: Path, *tokens: int) -> DatasetManifest:
    """Return a data set's manifest with shards of other sizes."""
    manifest = read_manifest(folder)
    shards: list[TokenShard] = [
        dataclasses.replace(manifest.shards[0], name=f"shard_{number:05}", tokens=count)
        for number, count in enumerate(tokens)
    ]
    return dataclasses.replace(manifest, tokens=sum(tokens), shards=tuple(shards))
