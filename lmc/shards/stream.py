"""Shards to batches of samples: which shards, in which order, from where on. No noise.

webdataset is imported where shards are read: pictures and networks do without it.
"""

import glob
import itertools
import json
import os
import random
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from lmc.files import whole

CHECKED_FIRST = 100  # shards whose every header is read before anything starts

KEPT = 2**27  # bytes of local shards that a training stream keeps, not to take them apart again

ROUND = 8  # shards that a training stream shuffles together and a resumed run may have to re-read


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """All shards that a pattern (or several) names, checked as far as that costs nothing.

    A URL or 'pipe:' command is run when it is read: for what the user typed. What stands in a file
    goes through `local_shards`.

    Args:
        shards: a path with wildcards or braces ('cats/train-*.tar', 'train-{00000..00009}.tar'),
            or a URL or 'pipe:' command, which are taken as they are.

    Raises:
        FileNotFoundError: a pattern names nothing, or a file is missing.
        ValueError: nothing is named, or no pattern; or one of the first hundred is empty, cut off
            or damaged (the others are looked at when they are opened).
    """
    found = _expanded(shards)
    if not found:
        raise ValueError("no shards are named")
    for url in found[:CHECKED_FIRST]:
        check_shard(url)
    return found


def local_shards(shards: Any, where: str) -> list[str]:
    """`expand_shards` for what a file names, which somebody else may have written: paths only.

    Args:
        shards: what stands there.
        where: in which file and key, for messages.

    Returns:
        Files that are there; a stream takes them as they are.

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; or it names a URL or a command, or is
            no text or list of texts.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    if not isinstance(patterns, list | tuple) or not all(isinstance(x, str) for x in patterns):
        raise ValueError(f"{where} is no path of shards: {shards!r}")
    return expand_shards(_expanded(patterns, where))


def _expanded(shards: str | Sequence[str], where: str = "") -> list[str]:
    """See `expand_shards`; with `where`, local files alone."""
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for url in _alternatives(pattern):
            there = os.path.exists(url)
            if is_remote(url) and not there:
                if where:
                    raise ValueError(
                        f"{where} names {url!r}, a URL or command, and what a file says is never "
                        "run or fetched: name the shards yourself (--shards), if you trust it"
                    )
                found.append(url)
                continue
            files = sorted(glob.glob(url)) if glob.has_magic(url) and not there else [url]
            if not files or not os.path.exists(files[0]):
                raise FileNotFoundError(f"no shards at {url}: prepare the data first (see data/)")
            if os.path.isdir(files[0]):
                raise FileNotFoundError(f"{files[0]} is a folder: name the shards in it, *.tar")
            # A file that bears the name of a URL or command stays a file.
            found += [f"./{file}" if is_remote(file) else file for file in files]
    return found


def _alternatives(pattern: str) -> list[str]:
    """What a pattern of webdataset's stands for: braces, 'A::B', ${NAME} for WDS_NAME."""
    import webdataset as wds

    if os.path.exists(pattern):  # a file's name is no pattern; thus expanded twice is once
        return [pattern]
    try:
        return wds.shardlists.expand_urls(pattern)
    except (AssertionError, ValueError, RecursionError) as error:  # a variable, or odd braces
        raise ValueError(f"{pattern[:200]} is no pattern of shards: {error}") from error


def is_remote(url: str) -> bool:
    """Whether webdataset takes it for a URL, a command or its standard input: 'pipe:', 's3:', '-'.

    By what it does: it drops white space and control characters, and looks at no '//'.
    """
    return (
        url == "-"
        or re.match(r"[a-z][a-z0-9+.-]*:", re.sub(r"[\0-\x20]", "", url), re.I) is not None
    )


def check_shard(url: str) -> None:
    """Walk the headers of a local, uncompressed tar: reading one with a damage just ends early.

    Raises:
        ValueError: it holds nothing, is cut off, or has a broken header.
    """
    if not url.endswith(".tar") or not Path(url).exists():
        return
    members, length = 0, os.path.getsize(url)
    with open(url, "rb") as file:
        while (header := file.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            try:
                size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
            except tarfile.HeaderError as error:
                raise ValueError(
                    f"{url} is damaged after {members} files ({error}): prepare it again"
                ) from error
            if not 0 <= size <= length:  # of a negative one this would read the same again for ever
                raise ValueError(f"{url} is damaged after {members} files: prepare it again")
            file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, os.SEEK_CUR)
            members += 1
    if not members or len(header) < tarfile.BLOCKSIZE:
        raise ValueError(f"{url} is empty or cut off after {members} files: prepare it again")


class ShardStream(IterableDataset):
    """Batches from shards; use it in a DataLoader with batch_size=None.

    In training, endless: each (rank, worker) draws its own order of the shards, shuffled, a pure
    function of (seed, rank, worker), so that it can be taken up again at any batch's `position`.
    Otherwise one pass, each sample exactly once over all ranks and workers, unshuffled.
    A sample that cannot be decoded is skipped and named in the next batch's `skipped`.

    A subclass says what a sample is (`_decode`) and what a batch (`_collate`).

    Args:
        shards: see `expand_shards`.
        batch_size: samples a batch; the last one of a single pass may be smaller.
        training: endless and shuffled, or one pass.
        seed: of the order.
        shuffle: samples in the shuffle buffer; of one there is no shuffling within shards.
        rank, world_size: of this process.
        limit: of a single pass, how many samples of the shards it is over, the first ones; None is
            all.

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; a number is out of its range.
    """

    members = ""  # what a sample consists of, for messages

    def __init__(
        self,
        shards: str | Sequence[str],
        batch_size: int,
        training: bool,
        seed: int = 0,
        shuffle: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        at_least_one(batch_size=batch_size, shuffle=shuffle)
        at_least_one(limit=1 if limit is None else limit)
        check_rank(rank, world_size)
        self.urls = expand_shards(shards)
        self.batch_size, self.training, self.limit = batch_size, training, limit
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.batches_read = 0
        self.positions: dict[int, tuple[int, int]] = {}
        self._kept: dict[str, list[dict[str, Any]]] = {}
        self._left = KEPT if training else 0

    def _wanted(self, sample: dict[str, Any], rng: random.Random) -> bool:
        """Whether training reads a raw sample this time, by `rng`."""
        return True

    def _decode(self, sample: dict[str, Any]) -> Any:
        """What a raw sample holds; BrokenSample where it may be skipped."""
        raise NotImplementedError

    def _collate(
        self, decoded: list[Any], position: tuple[int, int, int], skipped: tuple[str, ...]
    ) -> Any:
        """A batch of what `_decode` gave, possibly of nothing."""
        raise NotImplementedError

    def resume(self, batches_read: int, positions: dict[int, tuple[int, int]]) -> None:
        """Go on after `batches_read` batches, the streams of the workers being at `positions`.

        Args:
            batches_read: by this rank.
            positions: (round, samples read) by worker, from the last batch of each.
        """
        self.batches_read, self.positions = batches_read, dict(positions)

    def check(self) -> None:
        """Read samples until one is whole.

        Raises:
            ValueError: there is none, or it is not what the stream was made for.
        """
        broken = "there is none"
        for sample in self.samples(self.urls[:ROUND]):
            try:
                self._decode(sample)
                return
            except BrokenSample as error:
                broken = str(error)
        raise ValueError(
            f"{self.urls[0]} and its neighbours hold no sample that can be read "
            f"({self.members} each): {broken}"
        )

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.training:
            # The loader asks worker 0 first: let it take the role of the one whose turn it is.
            worker = (worker + self.batches_read) % workers
            return self._batches(self._endless(worker))
        part, parts = self.rank * workers + worker, self.world_size * workers
        every = enumerate(self.samples(self.urls, self.limit))
        samples = (sample for i, sample in every if i % parts == part)
        return self._batches((sample, (worker, 0, 0)) for sample in samples)

    def _endless(self, worker: int) -> Iterator[tuple[dict[str, Any], tuple[int, int, int]]]:
        """Samples and the position after each, from where the worker's stream is, without end."""
        import webdataset as wds

        number, offset = self.positions.get(worker, (0, 0))
        rounds_a_pass = -(-len(self.urls) // ROUND)
        while True:
            turn, part = divmod(number, rounds_a_pass)
            order = self.urls.copy()
            _random(self.seed, self.rank, worker, "pass", turn).shuffle(order)
            every = self.samples(order[part * ROUND : (part + 1) * ROUND])
            lot = _random(self.seed, self.rank, worker, "wanted", number)
            samples = (sample for sample in every if self._wanted(sample, lot))
            rng = _random(self.seed, self.rank, worker, "round", number)
            count = 0
            shuffled = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)
            for sample in shuffled(samples):
                count += 1
                if count > offset:
                    yield sample, (worker, number, count)
            if count == 0 and not any(True for _ in self.samples(order[:1])):
                raise ValueError(f"{order[0]} and its neighbours hold no samples")
            number, offset = number + 1, 0

    def _batches(
        self, samples: Iterable[tuple[dict[str, Any], tuple[int, int, int]]]
    ) -> Iterator[Any]:
        good: list[Any] = []
        skipped: list[str] = []
        position = (0, 0, 0)

        def batch() -> Any:
            done = self._collate(good, position, tuple(skipped))
            good.clear()
            skipped.clear()
            return done

        for sample, position in samples:  # noqa: B007 (batch() reads it)
            try:
                good.append(self._decode(sample))
            except BrokenSample as error:
                skipped.append(str(error))
                if len(skipped) > 100 * self.batch_size:
                    raise ValueError(f"hardly a sample can be read, last: {error}") from error
                continue
            if len(good) == self.batch_size:
                yield batch()
        if good or skipped:
            yield batch()

    def samples(self, urls: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Raw samples of some shards, in order; the first `limit` of them, or all."""
        return itertools.islice(itertools.chain.from_iterable(map(self._shard, urls)), limit)

    def _shard(self, url: str) -> Iterator[dict[str, Any]]:
        """The raw samples of a shard; in training from memory the second time, of small ones."""
        import webdataset as wds
        from webdataset.tariterators import group_by_keys, tar_file_expander

        if url in self._kept:
            yield from self._kept[url]
            return
        if len(self.urls) > CHECKED_FIRST:
            check_shard(url)
        if is_remote(url):
            yield from wds.tarfile_to_samples()([{"url": url}])
            return
        size = os.path.getsize(url)
        keep = size <= self._left
        kept: list[dict[str, Any]] = []
        with open(url, "rb") as file:  # not by webdataset: it looks for commands in names
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": file}])):
                if keep:
                    kept.append(sample)
                yield sample
        if keep and url not in self._kept:  # two readers of one stream may end at once
            self._kept[url] = kept
            self._left -= size


T = TypeVar("T")


def ahead(batches: Iterable[T]) -> Iterator[T]:
    """The same, of which a thread reads the next while the caller works on this one.

    A training has a loader's workers for that; this needs no processes.
    """
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


class BrokenSample(ValueError):
    """A sample that cannot be read and may be skipped."""


def where_of(sample: Mapping[str, Any]) -> str:
    """A raw sample for messages: 'KEY in SHARD'."""
    return f"{sample['__key__']} in {sample['__url__']}"


def about_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a raw sample's KEY.json.

    Raises:
        BrokenSample: there is none, or it is no JSON object.
    """
    try:
        about = json.loads(sample["json"])
    except (KeyError, ValueError, RecursionError) as error:  # the last one of brackets alone
        raise BrokenSample(f"{where_of(sample)}: no KEY.json ({error!r})") from error
    if not isinstance(about, dict):
        raise BrokenSample(f"{where_of(sample)}: KEY.json is no object")
    return about


def at_least_one(**numbers: int) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: one is; it is named.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a process that cannot be.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), the world_size, got {rank}")


def write_members(path: Path, samples: Iterable[dict[str, Any]]) -> int:
    """Write one shard of any samples, as `write_shard`: "__key__" and bytes by suffix each."""
    import webdataset as wds

    count = 0
    with (
        whole(path) as partial,
        open(partial, "wb") as file,
        wds.TarWriter(file, mtime=0) as tar,
    ):
        for sample in samples:
            tar.write(sample)
            count += 1
    return count


def _random(*key: Any) -> random.Random:
    """A generator that follows from `key` alone (a str seeds it through SHA-512)."""
    return random.Random(repr(key))
