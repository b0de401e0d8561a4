"""`lmc translate`: image files through a translator."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from glob import glob, has_magic
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lmc.device import choose_device
from lmc.errors import require
from lmc.files import whole
from lmc.load import load_translator
from lmc.progress import Progress
from lmc.shards.encoded import opened, upright
from lmc.shards.images import SUFFIXES, as_floats, middle_square, pixels_of, to_uint8
from lmc.translator import picture_of

LEFT_OUT = 3  # the exit status where some files could not be read
SHEET_ROWS = 40
TILE = 96  # pixels, at least, of a picture in a sheet: its heading has to fit

# A picture in the middle square: float (1, 3, S, S), and its alpha channel, (S, S) of mode L.
Read = tuple[Tensor, Image.Image | None]


@torch.no_grad()
def translate(
    images: list[str],
    *,
    translator: str,
    out: Path,
    to: list[str] | None = None,
    sheet: Path | None = None,
    overwrite: bool = False,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Translate image files; non-square ones are cropped at the centre.

    Writes OUT/NAME-CLASS.png each, upright and of the translator's size; what is transparent stays
    so (the network sees it on white). A file that cannot be read is named, and the others go on.

    Exit status: 0 all files were translated, 3 some could not be read, 1 (as of every command)
    something in what was asked for is wrong, and nothing was done.

    Args:
        images: files, folders of them, or patterns ('photos/*.jpg'); - is one on standard input.
        translator: run folder, release or hub id.
        out: folder to write; - writes the one picture to standard output, as PNG.
        to: target classes; default all the translator knows.
        sheet: PNG to write too, with the first 40 sources and what they became, side by side.
        overwrite: replace files that are there; else they are refused before any work.
        batch_size: images at a time; each goes to all targets at once.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        FileNotFoundError, OSError, ValueError: no such file or translator, an unknown class, two
            files of one name, no images at a time, files that would be overwritten, or more than
            one picture for standard output.
    """
    require(batch_size >= 1, "--batch_size", "at least 1", batch_size)
    device = choose_device(device)
    files = [file for each in images for file in _files(each)]
    stems = ["stdin" if str(file) == "-" else file.stem for file in files]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"several inputs are named {twice!r} and would overwrite each other")
    piped = str(out) == "-"
    with redirect_stdout(sys.stderr if piped else sys.stdout):  # huggingface_hub says what it loads
        network = load_translator(translator).to(device)
    targets = list(dict.fromkeys(to or network.classes))
    ids = network.class_ids(targets).to(device)
    if piped and len(files) * len(targets) != 1:
        raise ValueError(
            f"--out - is for one picture, not {len(files)} to {len(targets)} classes: name one "
            "file and one class (--to), or a folder (--out)"
        )
    names = [] if piped else [out / f"{s}-{t}.png" for s in stems for t in targets]
    for name in [*names, *([sheet] if sheet else [])]:
        if name.exists() and not overwrite:
            raise ValueError(f"{name} is there: name another place, or --overwrite it")
    if not piped:
        out.mkdir(parents=True, exist_ok=True)
    broken: list[str] = []
    rows: list[list[Image.Image]] = []
    read = partial(_read, size=network.image_size)

    def write(stem: str, pictures: Sequence[Image.Image]) -> None:
        for target, picture in zip(targets, pictures, strict=True):
            if piped:
                picture.save(sys.stdout.buffer, "png")
                continue
            with whole(out / f"{stem}-{target}.png", precious=False) as file:
                picture.save(file, "png")

    # Files are read and written by threads, which Pillow lets run, while the network computes.
    with (
        Progress("translating", len(files), "images") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        pairs = list(zip(files, stems, strict=True))
        several = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        ahead = [pool.submit(read, file) for file, _ in several[0]]
        writing: list[Future[None]] = []
        for number, batch in enumerate(several):
            following = several[number + 1] if number + 1 < len(several) else []
            now, ahead = ahead, [pool.submit(read, file) for file, _ in following]
            good: list[tuple[str, Read]] = []
            for (_, stem), future in zip(batch, now, strict=True):
                try:
                    good.append((stem, future.result()))
                except (OSError, ValueError) as error:
                    broken.append(str(error))
                    progress.say(f"left out: {error}")
            for earlier in writing:
                earlier.result()
            if good:
                sources = torch.cat([source for _, (source, _) in good]).to(device)
                made = network(sources.repeat_interleave(len(ids), 0), ids.repeat(len(good)))
                outputs = to_uint8(made).cpu().split(len(ids))
                writing = []
                for (stem, (source, alpha)), each in zip(good, outputs, strict=True):
                    pictures = [picture_of(output, alpha) for output in each]
                    writing.append(pool.submit(write, stem, pictures))
                    if sheet is not None and len(rows) < SHEET_ROWS:
                        rows.append([picture_of(to_uint8(source)[0], alpha), *pictures])
            progress.advance(len(batch))
        for earlier in writing:
            earlier.result()
    if sheet is not None and rows:
        with whole(sheet) as file:
            contact_sheet(["source", *targets], rows).save(file, "png")
    if not piped:
        print(f"{len(files) - len(broken)} images to {', '.join(targets)}, in {out}")
    if broken:
        line = f"lmc: {len(broken)} of {len(files)} files cannot be read: {broken[0]}"
        print(line, file=sys.stderr)
        sys.exit(LEFT_OUT)


def contact_sheet(headings: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, on white, with a heading above each column; RGB.

    Small ones are enlarged, every pixel to as many.
    """
    side = rows[0][0].width
    tile, top, gap = side * -(-TILE // side), 16, 4
    step = tile + gap
    sheet = Image.new("RGB", (len(headings) * step + gap, len(rows) * step + top), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((gap + column * step, 2), heading, "black")
        for row, pictures in enumerate(rows):
            large = pictures[column].resize((tile, tile), Image.Resampling.NEAREST)
            mask = large if large.mode == "RGBA" else None
            sheet.paste(large, (gap + column * step, top + row * step), mask)
    return sheet


def _read(file: Path, size: int) -> Read:
    """The middle square of an image file.

    Raises:
        OSError, ValueError: it cannot be read; names it.
    """
    piped = str(file) == "-"
    data = sys.stdin.buffer.read() if piped else file.read_bytes()
    try:
        with opened(data) as image:
            shown, alpha = upright(image)
            pixels = as_floats(pixels_of(shown))
    except ValueError as error:
        raise ValueError(f"{'standard input' if piped else file}: {error}") from error
    source = middle_square(pixels[None], size)
    if alpha is None:
        return source, None
    channel = to_uint8(middle_square(as_floats(pixels_of(alpha))[None, :1], size))[0, 0]
    return source, Image.fromarray(channel.numpy())


def _files(given: str) -> Iterator[Path]:
    """The image files that an argument names.

    Raises:
        FileNotFoundError: none.
    """
    path = Path(given)
    if path.is_file() or given == "-":
        yield path
        return
    found = path.glob("*") if path.is_dir() else map(Path, glob(given) if has_magic(given) else [])
    images = sorted(file for file in found if file.suffix[1:].lower() in SUFFIXES)
    if not images:
        what = f"no images ({', '.join(SUFFIXES)}) in" if path.is_dir() else "no such file:"
        raise FileNotFoundError(f"{what} {given}")
    yield from images
