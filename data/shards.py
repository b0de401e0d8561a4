"""Images of any kind to webdataset shards: what the scripts in the folders beside this one share.

The way of an image: `sources` lists it; `make_plan` gives it a name, a split and a shard, a pure
function of what was listed; `pictures` reads, crops, resizes and encodes it, in any of several
processes; `run` writes the shards in order, so that their bytes depend on nothing but the images
and the options. A shard is written whole or not at all; one that has its record in OUT/.plan is
not made again by the next run.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from lmc.files import whole
from lmc.progress import Progress
from lmc.shards.images import heldout_digests, name_digest, write_shard
from lmc.shards.stream import check_shard

from pictures import Item, Options, digest_all, process_all, start_worker
from sources import SUFFIXES, Refused, Skip, Source

In = TypeVar("In")
Out = TypeVar("Out")
CHUNK = 16  # images a process is given at once
SAMPLE = 32  # images tried before the long work, and to estimate its size
FORMAT = 1  # of OUT: counts up when the same images and options would make other shards
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Plan:
    """Shards to write.

    Attributes:
        shards: items by the shard's name, 'train-00000' and so on.
        heldout: the names of the images held out, sorted.
        skipped: the duplicates.
    """

    shards: dict[str, list[Item]]
    heldout: list[str]
    skipped: list[Skip]


# ---------------------------------------------------------------------------------------------
# The plan


def has_names(sources: Sequence[Source]) -> bool:
    """Whether every source has a name, and one of its own."""
    names = {source.name for source in sources}
    return len(names) == len(sources) and "" not in names


def needs_digest(sources: Sequence[Source]) -> list[int]:
    """Which sources must be read for the plan: all where names do not tell them apart, else those
    that may be duplicates, having the same size as another."""
    sizes = Counter(source.size for source in sources)
    named = has_names(sources)
    return [i for i, source in enumerate(sources) if not named or sizes[source.size] > 1]


def make_plan(sources: Sequence[Source], digests: dict[int, str], options: Options) -> Plan:
    """Names, splits and shards for all sources.

    Held out are the round(5 %) with the smallest SHA-256 of the name, or of the bytes where names
    do not tell them apart ('' or the same twice). Of duplicates one stays: the held-out one, so
    that training never sees it, else the first by hash. Images are ordered by hash, which shuffles
    them; rows of tables stay together, because a table is read by the chunk.

    Args:
        digests: SHA-256 of the bytes of the sources in `needs_digest`, by index; '' if it cannot be
            read.
    """
    named = has_names(sources)
    ranks = [
        name_digest(source.name) if named else digests[i] or name_digest(source.where)
        for i, source in enumerate(sources)
    ]
    groups: dict[str, list[str]] = {}
    for source, rank in zip(sources, ranks, strict=True):
        groups.setdefault(source.label if options.by_class else "", []).append(rank)
    chosen = {group: heldout_digests(members) for group, members in groups.items()}
    held_out = [
        rank in chosen[source.label if options.by_class else ""]
        for source, rank in zip(sources, ranks, strict=True)
    ]

    def preference(i: int) -> tuple[Any, ...]:
        return not held_out[i], ranks[i], sources[i].label, sources[i].path, sources[i].place

    def order(i: int) -> tuple[Any, ...]:
        source = sources[i]
        return (source.path, source.place) if len(source.place) == 2 else (ranks[i],)

    kept: dict[str, int] = {}  # by content
    skipped = []
    for i in sorted(range(len(sources)), key=preference):
        first = kept.setdefault(digests.get(i) or sources[i].where, i)
        if first != i:
            skipped.append(Skip("duplicate", sources[i].where, f"of {sources[first].where}"))
    indices = sorted(kept.values(), key=order)
    names = {i: sources[i].name if named else ranks[i] for i in indices}
    plain = {i: re.sub(r"[^A-Za-z0-9_-]+", "_", Path(names[i]).stem)[:64] for i in indices}
    common = Counter(plain.values())
    shards: dict[str, list[Item]] = {}
    for split in SPLITS:
        mine = [i for i in indices if held_out[i] == (split == "heldout")]
        for count, i in enumerate(mine):
            # a.jpg and a.png are two samples; ranks tell apart whatever names do
            key = plain[i] if common[plain[i]] == 1 else f"{plain[i]}-{ranks[i][:16]}"
            shard = f"{split}-{count // options.shard_size:05d}"
            shards.setdefault(shard, []).append(Item(sources[i], key, names[i]))
    heldout = sorted(names[i] for i in indices if held_out[i])
    return Plan(shards, heldout, skipped)


# ---------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Executor | None]:
    """Processes to work in; None for one, which is this one."""
    if workers == 1:
        yield None
        return
    # Not 'fork', which copies the threads' locks of torch and pyarrow in whatever state they are.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=start_worker
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def in_order(
    executor: Executor | None, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Iterator[Out]:
    """Results in the order of the items, at most `ahead` computed before they are asked for."""
    if executor is None:
        yield from map(function, items)
        return
    pending: deque[Any] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def watched(what: str, total: int, results: Iterator[list[Out]]) -> Iterator[Out]:
    """The results of some images at a time, one by one; says how far they are.

    The first ones start the clock: until then the processes started.
    """
    with contextlib.ExitStack() as stack:
        progress: Progress | None = None
        for some in results:
            if progress is None:
                progress = Progress(what, total, "images", done=len(some))
                stack.enter_context(progress)
            else:
                progress.advance(len(some))
            yield from some


# ---------------------------------------------------------------------------------------------
# A run


def add_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """The arguments that all scripts share."""
    parser.add_argument("--out", type=Path, required=True, help="folder to write the shards to")
    parser.add_argument("--size", type=int, default=size, help="side in pixels (%(default)s)")
    parser.add_argument(
        "--min_side",
        type=int,
        help="skip images whose shorter side has fewer pixels (default: --size, so that none is "
        "enlarged)",
    )
    parser.add_argument(
        "--format",
        choices=("jpg", "png"),
        default="jpg",
        help="of the images written; JPEG has quality 95 without chroma subsampling (%(default)s)",
    )
    parser.add_argument("--shard_size", type=int, default=1000, help="images a shard (%(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; what is written does not depend on it (default: one a CPU)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be written, and write nothing"
    )


def options_of(args: argparse.Namespace, **more: Any) -> Options:
    """The options that `add_arguments` made, checked.

    Raises:
        Refused: one is out of its range.
    """
    for name in ("size", "shard_size", "workers"):
        if getattr(args, name) < 1:
            raise Refused(f"--{name} {getattr(args, name)}: must be at least 1")
    min_side = args.size if args.min_side is None else args.min_side
    return Options(args.size, args.format, min_side, args.shard_size, **more)


def main(prepare: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Any):
    """Run a script: bad input ends it with one line, an interruption with a hint."""
    args = parser.parse_args(argv)
    try:
        prepare(args)
    except Refused as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except BrokenProcessPool:
        sys.exit(
            f"{parser.prog}: error: a process died, perhaps of too little memory: the same "
            "command goes on, try fewer --workers"
        )
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted: the same command goes on")


def run(
    sources: list[Source],
    skipped: list[Skip],
    out: Path,
    options: Options,
    about: dict[str, Any],
    workers: int,
    dry_run: bool,
) -> None:
    """Write the shards of all sources to `out`, or what is missing of them.

    Args:
        sources: see `sources`.
        skipped: what was skipped in listing them.
        about: for index.json.
        workers: processes.
        dry_run: only say what would be written.

    Raises:
        Refused: there is nothing to write, `out` cannot be written to, or it holds something else.
    """
    if not sources:
        why = "".join(f"; {count} {reason}" for reason, count in reasons(skipped).items())
        raise Refused(f"no images in {about['source']}{why}: expected *{' *'.join(SUFFIXES)}")
    check_writable(out)
    begun = {
        "format": FORMAT,
        **asdict(options),
        "images": hashlib.sha256(repr(sources).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    state = out / ".plan"
    check_begun(out, begun)
    if dry_run:
        with pool(workers) as executor:
            plan = make_plan(sources, digests_of(sources, executor, workers), options)
            estimate = try_some(plan, options, executor)
        summary(plan, options, skipped + plan.skipped, out)
        print(f"about {estimate / 2**20:.0f} MiB; a dry run: nothing was written")
        return
    state.mkdir(parents=True, exist_ok=True)
    with only_run(state), pool(workers) as executor:
        write_json(state / "begun.json", begun)
        known = load_json(state / "digests.json")
        if known is None or known["images"] != begun["images"]:
            known = {"images": begun["images"], "digests": digests_of(sources, executor, workers)}
            known = write_json(state / "digests.json", known)
        digests = {int(i): digest for i, digest in known["digests"].items()}
        plan = make_plan(sources, digests, options)
        if not shards_in(out):
            try_some(plan, options, executor)
        records = write_shards(plan, options, out, executor, workers)
        write_index(plan, options, out, records, skipped, about)


def digests_of(
    sources: Sequence[Source], executor: Executor | None, workers: int
) -> dict[int, str]:
    """The digests that `make_plan` asks for."""
    indices = needs_digest(sources)
    chunks = [[sources[i] for i in part] for part in parts(indices, CHUNK)]
    found = in_order(executor, digest_all, chunks, 4 * workers)
    digests = watched("looking for duplicates", len(indices), found)
    return dict(zip(indices, digests, strict=True))


def try_some(plan: Plan, options: Options, executor: Executor | None) -> float:
    """Bytes that all shards will have, from a sample of the images.

    Raises:
        Refused: none of the sample can be used.
    """
    items = [item for shard in plan.shards.values() for item in shard]
    sample = [items[i * len(items) // SAMPLE] for i in range(SAMPLE)]
    sample = list(dict.fromkeys(sample))
    function = partial(process_all, options=options)
    tried = list(chain.from_iterable(in_order(executor, function, parts(sample, 4), SAMPLE)))
    good = [result for result in tried if not isinstance(result, Skip)]
    if not good:
        first = next(result for result in tried if isinstance(result, Skip))
        why = ", ".join(f"{count} {reason}" for reason, count in reasons(tried).items())
        raise Refused(
            f"none of {len(tried)} images tried can be used ({why}), the first being {first.name}: "
            f"{first.detail}; an image needs {options.min_side} pixels a side (--min_side)"
        )
    # In a tar: a header each for image and json, contents in blocks of 512, the json in one.
    sizes = [1536 + -(-len(data) // 512) * 512 for data, _ in good]
    return sum(sizes) / len(tried) * len(items)


def write_shards(
    plan: Plan, options: Options, out: Path, executor: Executor | None, workers: int
) -> dict[str, dict[str, Any]]:
    """Write the shards that have no record yet, in order; all records, by shard."""
    records = {name: load_record(out, name) for name in plan.shards}
    todo = {name: plan.shards[name] for name, record in records.items() if record is None}
    done = len(plan.shards) - len(todo)
    if done:
        print(f"{done} of {len(plan.shards)} shards are there already", file=sys.stderr)
    chunks = (part for items in todo.values() for part in parts(items, CHUNK))
    function = partial(process_all, options=options)
    made = in_order(executor, function, chunks, 4 * workers)
    results = watched("preparing", sum(map(len, todo.values())), made)
    for name, items in todo.items():
        skipped: list[Skip] = []
        counts: Counter[str] = Counter()

        def samples(
            name: str = name,
            items: list[Item] = items,
            skipped: list[Skip] = skipped,
            counts: Counter[str] = counts,
        ) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
            for item in items:
                result = next(results)
                if isinstance(result, Skip):
                    skipped.append(result)
                    continue
                counts[item.source.label] += 1
                split = name.partition("-")[0]
                about = {"label": item.source.label, "split": split, "name": item.name}
                yield item.key, *result, about

        path = out / f"{name}.tar"
        write_shard(path, samples())
        record = {"counts": dict(counts), "bytes": path.stat().st_size, "skipped": skipped}
        record["sha256"] = file_digest(path)
        if not counts:  # a reader takes an empty shard for a damaged one
            path.unlink()
        records[name] = write_json(out / ".plan" / f"{name}.json", record)
    return records


def load_record(out: Path, name: str) -> dict[str, Any] | None:
    """What was written about a shard that is there, whole."""
    record = load_json(out / ".plan" / f"{name}.json")
    path = out / f"{name}.tar"
    if record is None or not record["counts"]:
        return record
    try:
        check_shard(str(path))
        return record if path.stat().st_size == record["bytes"] else None
    except (OSError, ValueError):
        return None


def write_index(
    plan: Plan,
    options: Options,
    out: Path,
    records: dict[str, dict[str, Any]],
    skipped: list[Skip],
    about: dict[str, Any],
) -> None:
    """heldout.txt, skipped.txt and, last, index.json; and the summary."""
    skipped = skipped + plan.skipped
    skipped += [Skip(*skip) for name in plan.shards for skip in records[name]["skipped"]]
    counts = {split: Counter() for split in SPLITS}
    for name, record in records.items():
        counts[name.partition("-")[0]].update(record["counts"])
    if not counts["train"] and not counts["heldout"]:
        raise Refused(f"no image could be used: {reasons(skipped)}")
    shards = {name: record for name, record in sorted(records.items()) if record["counts"]}
    listing = "".join(f"{record['sha256']}  {name}.tar\n" for name, record in shards.items())
    heldout = write_text(out / "heldout.txt", "".join(f"{name}\n" for name in plan.heldout))
    write_text(out / "skipped.txt", "".join("\t".join(skip) + "\n" for skip in skipped))
    classes = sorted(counts["train"] | counts["heldout"])
    index = {
        **about,
        "classes": classes,
        **{split: counts[split].total() for split in SPLITS},
        "counts": {name: {split: counts[split][name] for split in SPLITS} for name in classes},
        "size": options.size,
        "image_format": options.suffix,
        "crop": options.crop,
        "min_side": options.min_side,
        "heldout_hash": heldout,
        "hash": hashlib.sha256(listing.encode()).hexdigest(),
        "shards": {
            f"{name}.tar": {"images": sum(record["counts"].values()), "sha256": record["sha256"]}
            for name, record in shards.items()
        },
        "skipped": reasons(skipped),
    }
    write_json(out / "index.json", index, indent=1)
    summary(plan, options, skipped, out, counts)


def summary(
    plan: Plan,
    options: Options,
    skipped: list[Skip],
    out: Path,
    counts: dict[str, Counter[str]] | None = None,
) -> None:
    """Print what was written, or (without counts) would be, and what was skipped."""
    for split in SPLITS:
        shards = [items for name, items in plan.shards.items() if name.startswith(split)]
        images = counts[split].total() if counts else sum(map(len, shards))
        print(f"{split}: {images} images of {options.size} x {options.size} in {out}/{split}-*.tar")
        if not images:
            print(f"  no {split} images: 5 % of so few are none; give more for both splits")
    print(f"skipped: {len(skipped)}" + (f" ({out}/skipped.txt)" if skipped and counts else ""))
    for reason, count in reasons(skipped).items():
        print(f"  {count} {reason}")


def reasons(results: Iterable[Any]) -> dict[str, int]:
    """How many were skipped for each reason."""
    return dict(Counter(skip.reason for skip in results if isinstance(skip, Skip)).most_common())


# ---------------------------------------------------------------------------------------------
# Files


def check_writable(out: Path) -> None:
    """See that `out` is a folder, or can be made one.

    Raises:
        Refused: it cannot be written to.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise Refused(f"--out {out}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--out {out}: {there} cannot be written to; name another folder")


def check_begun(out: Path, begun: dict[str, Any]) -> None:
    """See that `out` holds nothing, or a part of the very same.

    Raises:
        Refused: it was begun otherwise.
    """
    before = load_json(out / ".plan" / "begun.json")
    other = "use another --out, or delete it"
    if before is None or not shards_in(out):
        if shards_in(out):
            raise Refused(f"--out {out} holds shards that were not made by this script: {other}")
        return
    for name, value in begun.items():
        if before.get(name) == value:
            continue
        if name == "images":
            raise Refused(f"--out {out} was begun with other images: {other}")
        raise Refused(f"--out {out} was begun with {name} {before.get(name)}, not {value}: {other}")


def shards_in(out: Path) -> bool:
    """Whether there are any, or records of any."""
    return any(out.glob("*.tar")) or any((out / ".plan").glob("*-*.json"))


@contextlib.contextmanager
def only_run(state: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The system lets go of the lock of a killed one.

    Raises:
        Refused: there is another run.
    """
    with open(state / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"another run is writing to {state.parent}: wait for it") from error
        yield


def parts(items: Sequence[In], size: int) -> list[Sequence[In]]:
    """Cut into pieces of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a file whole or not at all; its SHA-256 in hexadecimal."""
    data = text.encode("utf-8", "surrogateescape")
    with whole(path) as partial_file:
        partial_file.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, content: Any, indent: int | None = None) -> Any:
    """Write a file whole or not at all; `content` as it will be read back."""
    text = json.dumps(content, indent=indent)
    write_text(path, text)
    return json.loads(text)


def load_json(path: Path) -> Any:
    """What a file holds, None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None
