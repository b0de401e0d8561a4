"""Milliseconds an image of translators as ONNX: by onnxruntime, and in the browser.

    python benchmarks/page.py --out runs/page

Writes the page (`lmc page`) of the demo's translator and of translators of the paper's widths with
random weights, at 64 x 64 and 256 x 256, and asks each page's own worker, in headless Chromium
(Debian's package chromium), for one picture many times. `lmc page` has measured the ONNX network by
onnxruntime then, on as many threads as OMP_NUM_THREADS says. Medians. Needs npm, for
onnxruntime-web. Prints a table, then JSON (or writes it to --json).
"""

import argparse
import functools
import json
import shutil
import statistics
import threading
from collections.abc import Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from lmc.cli import main as lmc
from lmc.files import write_json
from lmc.release import Terms, write_release
from lmc.translator import Translator

DEMO = "data/demo/release/translator"
CLASSES = ["bear", "dog", "lion", "squirrel"]
ASK = """([size, count]) => new Promise((done, wrong) => {
  const worker = new Worker(`network.js?size=${size}`, { type: "module" });
  const image = Float32Array.from({ length: 3 * size * size }, () => 2 * Math.random() - 1);
  const times = [];
  let device;
  const ask = () => worker.postMessage({ id: times.length + 1, image, targets: [0] });
  worker.onmessage = ({ data }) => {
    if (data.failed) return wrong(data.failed);
    device ??= data.device;
    if (data.ms !== undefined) times.push(data.ms);
    if (times.length < count) ask();
    else done([device, times]);
  };
})"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *args: Any) -> None:
        pass


def in_browser(browser: Any, folder: Path, size: int, count: int) -> tuple[str, list[float]]:
    """The device a page's worker runs on, and `count` times of one image in milliseconds."""
    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        device, times = page.evaluate(ASK, [size, count])
        page.close()
        server.shutdown()
    return device, times


def main(argv: Sequence[str] | None = None) -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/page"), help="(%(default)s)")
    parser.add_argument("--count", type=int, default=20, help="images a network (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    releases = {"the demo's": DEMO}
    for size in (64, 256):
        torch.manual_seed(0)
        terms = Terms(license="cc0-1.0", data="none", prior_license="none")
        folder = args.out / f"release{size}"
        write_release(Translator(CLASSES, size), folder, "random weights", terms)
        releases[f"the paper's widths, {size} x {size}"] = str(folder)
    rows: dict[str, Any] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, release in releases.items():
            out = args.out / f"page {len(rows)}"
            lmc(["page", release, "--out", str(out)])
            about = json.loads((out / "model.json").read_text())
            size = about["measured"]["size"][0]
            device, times = in_browser(browser, out, size, args.count)
            rows[name] = {
                "megabytes": about["bytes"] / 1e6,
                "onnxruntime_ms": about["measured"]["milliseconds"],
                "browser_ms": statistics.median(times),
                "browser": f"{device}, Chromium {browser.version}",
            }
        browser.close()
    print("| network | model.onnx | onnxruntime, ms | browser, ms | |\n|---|---|---|---|---|")
    for name, row in rows.items():
        times = f"{row['onnxruntime_ms']:.1f} | {row['browser_ms']:.1f}"
        print(f"| {name} | {row['megabytes']:.2f} MB | {times} | {row['browser']} |")
    print(json.dumps(rows))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
