"""The page: what is written, what is refused, and all of it in a real browser."""

import functools
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lmc.page
from lmc.cli import main
from lmc.corrector import Corrector
from lmc.load import load_translator
from lmc.release import Terms, write_release
from lmc.shards.images import decode_image, middle_square, to_uint8
from lmc.translator import Translator

import worlds

CLASSES = ["dog", "otter", "<b>&bear"]  # the last would break a page that does not escape it
SIZE = 32


def smooth(height: int, width: int, seed: int) -> Image.Image:
    """A picture with edges softer than a pixel's, as photographs have."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    image = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return Image.fromarray(to_uint8(image)[0].permute(1, 2, 0).numpy())


def encoded(picture: Image.Image, kind: str = "png", **more: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator that changes every picture much, and sample pictures of its size."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    network = Translator(CLASSES, SIZE, [8, 8, 8], residual=True)
    for parameter in network.unet.last.parameters():
        nn.init.normal_(parameter)
    write_release(network, folder / "release", "made up", Terms(**worlds.TERMS))
    for seed in range(2):
        smooth(SIZE, SIZE, seed).save(folder / f"cat {seed}.png")
    return folder


# ---------------------------------------------------------------------------------------------
# What is written, and what is refused


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of onnxruntime-web's files."""
    folder = tmp_path_factory.mktemp("npm") / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    for name in lmc.page.RUNTIME:
        (folder / "dist" / name).write_text(name)
    (folder / "package.json").write_text('{"name": "onnxruntime-web", "version": "9.8.7"}')
    return folder


def written(world: Path, out: Path, *more: object) -> Path:
    main(["page", str(world / "release"), "--out", str(out), *map(str, more)])
    return out


def message(*given: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["page", *map(str, given)])
    assert isinstance(caught.value.code, str), "exits with status 1 and a message"
    return caught.value.code


def test_a_folder_for_a_web_server_and_the_hub(world, runtime, tmp_path):
    smooth(300, 700, 3).save(tmp_path / "wide.png")
    out = tmp_path / "made" / "page"
    options = ["--onnxruntime", runtime, "--source", "owl", "--samples", tmp_path / "wide.png"]
    for _ in range(2):  # a page that is there is replaced
        written(world, out, *options)
    assert {file.name for file in out.iterdir()} == lmc.page.FILES
    assert {x.name for x in (out / "ort").iterdir()} == {*lmc.page.RUNTIME, "LICENSE"}
    assert (out / "ort" / lmc.page.RUNTIME[0]).read_text() == lmc.page.RUNTIME[0]
    html = (out / "index.html").read_text()
    assert "<title>Turn an owl into a dog, otter or &lt;b&gt;&amp;bear</title>" in html
    assert "<b>&bear" not in html
    with Image.open(out / "samples" / "0.png") as sample:
        assert sample.size == (256, 256)
        expected = middle_square(decode_image((tmp_path / "wide.png").read_bytes())[None], 256)
        assert np.array_equal(np.asarray(sample), to_uint8(expected)[0].permute(1, 2, 0).numpy())
    card = huggingface_hub.RepoCard.load(out / "README.md")
    assert card.data.sdk == "static" and card.data.license == "cc0-1.0"
    assert card.data.custom_headers["cross-origin-embedder-policy"] == "require-corp"
    assert "onnxruntime-web 9.8.7" in card.text
    assert json.loads((out / "model.json").read_text())["classes"] == CLASSES


def test_titles():
    title = lmc.page._title
    assert title("cat", ["otter"]) == "Turn a cat into an otter"
    assert title("cat", ["dog", "bear"]) == "Turn a cat into a dog or bear"
    assert title("owl", list("abcdefgh")) == "Turn an owl into one of 8 others"


def test_bad_input_ends_in_one_line_and_writes_nothing(world, runtime, tmp_path):
    release, out = world / "release", tmp_path / "page"
    given = ["--out", out, "--onnxruntime", runtime]
    (tmp_path / "notes.txt").write_text("no picture")
    assert "notes.txt" in message(release, *given, "--samples", tmp_path / "notes.txt")
    assert "none.png" in message(release, *given, "--samples", tmp_path / "none.png")
    many = [world / "cat 0.png"] * 25
    assert "--samples must be at most 24" in message(release, *given, "--samples", *many)
    assert "--source must be a word" in message(release, *given, "--source", " ")
    write_release(Corrector(3, [8, 8]), tmp_path / "b", "made up", Terms(**worlds.TERMS))
    assert "a page is of a Translator" in message(tmp_path / "b", *given)
    (tmp_path / "package.json").write_text('{"name": "onnxruntime-web", "version": "9"}')
    said = message(release, "--out", out, "--onnxruntime", tmp_path)
    assert "has no dist/ort.wasm.min.mjs" in said and lmc.page.VERSION in said
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "thesis.tex" in message(release, *given) and (out / "thesis.tex").exists()


def test_without_npm_or_without_the_package(world, tmp_path, monkeypatch):
    given = [world / "release", "--out", tmp_path / "page"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    said = message(*given)
    assert "there is no npm" in said and "--onnxruntime" in said
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2; exit 1\n")
    npm.chmod(0o755)
    assert message(*given).endswith("onnxruntime-web@1.30.0: npm error code E404")
    assert not (tmp_path / "page").exists()


# ---------------------------------------------------------------------------------------------
# In a browser


@contextmanager
def served(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """What `python -m http.server` serves, with more headers if asked for; its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

    handler = functools.partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def site(browser: Any, world: Path) -> Iterator[tuple[Path, str]]:
    """The page with the real onnxruntime-web, which npm fetches; its folder and address."""
    samples = [world / f"cat {seed}.png" for seed in range(2)]
    try:
        out = written(world, world / "page", "--samples", *samples)
    except SystemExit as error:
        if "npm cannot fetch" in str(error) and not os.environ.get("CHROMIUM_REQUIRED"):
            pytest.skip(str(error))
        raise
    with served(out) as address:
        yield out, address


@pytest.fixture
def opened(browser: Any, site: tuple[Path, str]) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have gone wrong, nor been asked of elsewhere."""
    wrong: list[str] = []
    contexts: list[Any] = []

    def go(address: str = site[1], ready: bool = True, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(90_000)  # of a machine that does much else
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        inside = (address, f"blob:{address}", "data:")
        page.on("request", lambda it: it.url.startswith(inside) or wrong.append(it.url))
        page.goto(address)
        if ready:
            page.locator("#status", has_text="ms an image on the CPU").wait_for()
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def pixels(page: Any, canvas: str) -> Tensor:
    """What a canvas shows, uint8 (3, SIZE, SIZE)."""
    data = page.locator(canvas).evaluate(
        "x => [...x.getContext('2d').getImageData(0, 0, x.width, x.height).data]"
    )
    return torch.tensor(data, dtype=torch.uint8).view(SIZE, SIZE, 4).permute(2, 0, 1)[:3]


def translated(world: Path, image: Tensor, target: int) -> Tensor:
    """By PyTorch: a picture (1, 3, SIZE, SIZE) to uint8 (3, SIZE, SIZE)."""
    with torch.no_grad():
        return to_uint8(load_translator(str(world / "release"))(image, torch.tensor([target])))[0]


def assert_near(one: Tensor, other: Tensor, atol: int = 2) -> None:
    torch.testing.assert_close(one.int(), other.int(), atol=atol, rtol=0)


def choose(page: Any, name: str) -> None:
    """A target, by its button."""
    page.locator("#targets label", has_text=re.compile(f"^{re.escape(name)}$")).click()
    page.locator("#save:enabled").wait_for()


def test_every_sample_and_target_is_what_pytorch_makes_of_it(world, opened, site):
    page = opened()
    for number in (0, 1):
        page.locator("#samples button").nth(number).click()
        page.locator(f"#samples button:nth-child({number + 1})[aria-pressed=true]").wait_for()
        image = decode_image((world / f"cat {number}.png").read_bytes())[None]
        results = []
        for target, name in enumerate(CLASSES):
            choose(page, name)
            assert torch.equal(pixels(page, "#before"), to_uint8(image)[0])
            results.append(pixels(page, "#after"))
            assert_near(results[-1], translated(world, image, target))
            assert page.locator("#became").inner_text() == name
        assert (results[0].int() - results[1].int()).abs().max() > 8, "targets differ"
    # All at once, one of which is then looked at; each can be saved.
    choose(page, "all at once")
    for target in range(3):
        assert torch.equal(pixels(page, f"#all [data-target='{target}'] canvas"), results[target])
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "cat 1-all.png"
    with Image.open(download.value.path()) as sheet:
        assert sheet.size == (4 * SIZE, SIZE)
    page.locator("#all button").nth(1).click()
    assert page.locator("#compare").is_visible() and not page.locator("#all").is_visible()
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "cat 1-otter.png"
    with Image.open(download.value.path()) as saved:
        assert torch.equal(torch.from_numpy(np.array(saved))[..., :3].permute(2, 0, 1), results[1])
    assert re.fullmatch(r"[\d.]+ ms an image on the CPU", page.locator("#status").inner_text())


GIVE = """([how, name, type, data]) => {
  const given = new DataTransfer();
  if (data) given.items.add(new File([Uint8Array.from(data)], name, { type }));
  const more = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(how === "drop"
    ? new DragEvent("drop", { ...more, dataTransfer: given })
    : new ClipboardEvent("paste", { ...more, clipboardData: given }));
}"""


def test_files_that_are_chosen_dropped_and_pasted(world, opened):
    """Prepared as by lmc.shards.images, whatever their size; what is no picture is refused."""
    page = opened()

    def shown() -> Tensor:
        page.locator("#samples").locator("[aria-pressed=true]").wait_for(state="detached")
        page.locator("#save:enabled").wait_for()
        return pixels(page, "#before")

    def expected(data: bytes) -> Tensor:
        return to_uint8(middle_square(decode_image(data)[None], SIZE))[0]

    def back() -> None:
        page.locator("#samples button").first.click()
        page.locator("#samples button:first-child[aria-pressed=true]").wait_for()

    larger = encoded(smooth(97, 151, 4))
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": larger})
    assert_near(shown(), expected(larger), atol=1)
    image = middle_square(decode_image(larger)[None], SIZE)
    assert_near(pixels(page, "#after"), translated(world, image, 0))
    back()
    smaller = encoded(smooth(20, 11, 5))
    page.evaluate(GIVE, ["drop", "b.png", "image/png", list(smaller)])
    assert_near(shown(), expected(smaller), atol=1)
    back()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side, as a phone writes it
    photo = encoded(smooth(120, 160, 6), "jpeg", exif=exif, quality=95, subsampling=0)
    page.evaluate(GIVE, ["paste", "c.jpg", "image/jpeg", list(photo)])
    assert_near(shown(), expected(photo))
    # What is no picture is named, and the picture before it stays; the next one takes it away.
    before, wrong = pixels(page, "#before"), page.locator("#wrong")
    page.set_input_files("#file", {"name": "d.txt", "mimeType": "text/plain", "buffer": b"no"})
    page.locator("#wrong", has_text="d.txt is no picture").wait_for()
    page.evaluate(GIVE, ["drop", "e.png", "image/png", list(larger[:200])])
    page.locator("#wrong", has_text="e.png is no picture").wait_for()
    page.evaluate(GIVE, ["drop", "", "", None])
    page.locator("#wrong", has_text="no file").wait_for()
    page.evaluate(GIVE, ["paste", "", "", None])
    page.locator("#wrong", has_text="clipboard").wait_for()
    assert torch.equal(pixels(page, "#before"), before)
    back()
    assert not wrong.is_visible()


def test_by_keyboard_alone(opened):
    page = opened()
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused = "document.activeElement.id || document.activeElement.dataset.name"
        order.append(page.evaluate(focused))
    assert order == ["slider", "save", "dog", "cat 0", "cat 1", "file"]
    page.locator("#slider").focus()
    page.keyboard.press("End")
    assert page.locator("#before").evaluate("x => x.style.clipPath") == "inset(0px 0% 0px 0px)"
    page.keyboard.press("Home")
    assert page.locator("#before").evaluate("x => x.style.clipPath") == "inset(0px 100% 0px 0px)"
    page.locator("[name=target]").first.focus()
    page.keyboard.press("ArrowDown")
    page.locator("#became", has_text="otter").wait_for()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # around to the last
    page.locator("#all").wait_for()
    page.locator("#samples button").nth(1).focus()
    page.keyboard.press("Enter")
    page.locator("#samples button:nth-child(2)[aria-pressed=true]").wait_for()
    page.locator("#save:enabled").wait_for()
    page.locator("#all button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.name") == "otter"
    assert page.locator("#became").inner_text() == "otter"


def test_on_a_phone_and_in_the_dark(opened):
    phone = {"viewport": {"width": 340, "height": 700}, "has_touch": True, "is_mobile": True}
    page = opened(color_scheme="dark", **phone)
    for name in ("dog", "all at once"):
        choose(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 340
    assert page.locator("#camera").get_attribute("capture") and page.locator(".camera").is_visible()
    of = "x => getComputedStyle(document.body)[x].match(/\\d+/g).slice(0, 3).map(Number)"
    dark, light = (sum(page.evaluate(of, x)) / 765 for x in ("backgroundColor", "color"))
    assert dark < 0.2 and light > 0.8


def test_with_threads_where_the_page_is_isolated(world, opened, site):
    with served(site[0], lmc.page.HEADERS) as address:
        page = opened(address)
        assert page.evaluate("crossOriginIsolated")
        image = decode_image((world / "cat 0.png").read_bytes())[None]
        assert_near(pixels(page, "#after"), translated(world, image, 0))


def test_what_is_missing_is_said(browser, site):
    """The network; and JavaScript."""
    page = browser.new_page()
    page.route("**/model.onnx", lambda route: route.abort())
    page.goto(site[1])
    page.locator("#wrong", has_text="The network cannot be run in this browser").wait_for()
    page.close()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site[1])
    assert page.locator("noscript").inner_text().startswith("This page needs JavaScript")
    context.close()


def test_the_snippet_of_an_export_is_right(world, opened, site, tmp_path):
    """The JavaScript of its README.md, as it stands there, with the page's onnxruntime-web."""
    main(["export", str(world / "release"), "--out", str(tmp_path / "onnx")])
    card = (tmp_path / "onnx" / "README.md").read_text()
    found = re.search(r'```js\nimport \* as ort from "onnxruntime-web";.*?\n(.*?)```', card, re.S)
    assert found
    page = opened()
    image = decode_image((world / "cat 1.png").read_bytes())[None]
    given = np.array(Image.open(world / "cat 1.png").convert("RGBA")).ravel().tolist()
    output = page.evaluate(
        "async (given) => { const ort = await import('./ort/ort.wasm.min.mjs');"
        "ort.env.wasm.wasmPaths = new URL('ort/', location.href).href;"
        f"ort.env.wasm.numThreads = 1; {found[1]} return [...await translate(given, 2)]; }}",
        given,
    )
    made = torch.tensor(output, dtype=torch.uint8).view(SIZE, SIZE, 4).permute(2, 0, 1)
    assert_near(made[:3], translated(world, image, 2))
    assert (made[3] == 255).all()


@pytest.mark.slow
def test_on_webgpu(world, opened, site, tmp_path):
    """On a GPU that the CPU plays, a minute to begin with, which the page itself would not take."""
    script = (site[0] / "network.js").read_text()
    taken = script.replace(" && !adapter.info?.isFallbackAdapter", "")
    assert taken != script
    shutil.copytree(site[0], tmp_path / "page")
    (tmp_path / "page" / "network.js").write_text(taken)
    with served(tmp_path / "page") as address:
        page = opened(address, ready=False)
        page.locator("#status", has_text="ms an image on the GPU").wait_for(timeout=200_000)
        image = decode_image((world / "cat 0.png").read_bytes())[None]
        assert_near(pixels(page, "#after"), translated(world, image, 0))
