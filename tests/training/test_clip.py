"""A small CLIP of one's own, from labelled shards to a folder that CLIP's measures load."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from lmc.measure.metrics import Clip
from lmc.measure.small_clip import SmallClip, augment, halved
from lmc.release import release
from lmc.shards.images import from_uint8, write_shard
from lmc.training.start import train

import worlds

CAPTIONS = ["a photo of a cat", "a photo of a dog"]
SMALL = {"size": 16, "patch": 8, "width": 16, "layers": 2, "embedding": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Cats are bright above, dogs below."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 60), ("heldout", 12)):
        samples = []
        for label, side in (("cat", 0), ("dog", 1)):
            for i in range(count):
                generator = torch.Generator().manual_seed(i + 1000 * side)
                image = 0.3 * torch.randn(3, 12, 12, generator=generator).clamp(-2, 2) - 0.4
                image[:, 6 * side : 6 * side + 6] += 0.8
                samples.append((f"{label}-{i:03d}", worlds.png(image), "png", {"label": label}))
        write_shard(folder / f"{split}-00000.tar", samples)
    return str(folder)


def arguments(data: str, run: Path, *more: str) -> list[str]:
    tiny = ["--model.image_size=16", "--model.width=16", "--model.layers=1", "--data.image_size=12"]
    tiny += ["--trainer.max_steps=3", "--model.optimizer.warm_up=2"]
    return ["fit", f"--run={run}", "--model.classes=[cat,dog]", *worlds.common(data), *tiny, *more]


def fit(*given: str):
    return train("clip", list(given), "train.py")


def test_what_is_trained_learns_and_is_a_clip_like_any_other(data, tmp_path):
    steps = ["--trainer.max_steps=300", "--trainer.val_check_interval=300"]
    steps += ["--data.batch_size=16", "--model.optimizer.lr=5e-3", "--model.width=32"]
    cli = fit(*arguments(data, tmp_path, *steps, "--model.ema_decay=0.5"))
    logged = cli.trainer.callback_metrics
    assert logged["heldout/accuracy"] > 0.75
    by_class = [logged[f"heldout/accuracy/{name}"] for name in ("cat", "dog")]
    assert sum(by_class) / 2 == pytest.approx(logged["heldout/accuracy"].item())
    clip = Clip(str(tmp_path / "clip"))
    batch = next(iter(cli.datamodule.val_dataloader()))
    cosines = F.normalize(clip.images(batch.image)) @ F.normalize(clip.texts(CAPTIONS)).T
    right = cosines.argmax(1) == torch.tensor([["cat", "dog"].index(x) for x in batch.label])
    assert right.float().mean() > 0.75
    files = {path.suffix for path in (tmp_path / "clip").rglob("*") if path.is_file()}
    assert ".safetensors" in files and files <= {".safetensors", ".json", ".txt", ".jinja"}


def test_its_logits_are_transformers_own(tmp_path):
    """Of the folder, through its processor, from 8-bit pictures, to half precision."""
    torch.manual_seed(0)
    network = SmallClip(CAPTIONS, **SMALL).eval()
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    network.save(tmp_path / "clip")
    model = CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=CAPTIONS, images=list(pixels), padding=True, return_tensors="pt")
    with torch.no_grad():
        found, expected = network(from_uint8(pixels)), model(**inputs).logits_per_image
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    assert found.std() > 0.1, "nothing is compared"


def test_the_scale_of_the_cosines_is_bounded():
    network = SmallClip(CAPTIONS, **SMALL)
    with torch.no_grad():
        network.model.logit_scale.fill_(9.0)
    network.bound_scale()
    assert network.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-4)


def test_a_run_goes_on_and_another_order_of_classes_is_refused(data, tmp_path):
    fit(*arguments(data, tmp_path, "--trainer.max_steps=2"))
    cli = fit(*arguments(data, tmp_path))
    assert cli.trainer.global_step == 3
    with pytest.raises(SystemExit) as left:
        fit(*arguments(data, tmp_path, "--model.classes=[dog,cat]"))
    assert "model.classes was ['cat', 'dog'] and is ['dog', 'cat']" in str(left.value.code)


def test_it_is_released_as_a_model_folder(data, tmp_path):
    """That measures like any other CLIP, with a card."""
    fit(*arguments(data, tmp_path / "run", "--trainer.max_steps=2"))
    out = tmp_path / "release"
    release(tmp_path / "run", out=out, license="cc0-1.0", data="cats and dogs, CC0")
    card = (out / "README.md").read_text()
    assert "zero-shot-image-classification" in card and "Trained on: cats and dogs, CC0" in card
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, expected = (Clip(str(folder)).images(x) for folder in (out, tmp_path / "run/clip"))
    assert torch.equal(found, expected)


def test_augmented_pictures_are_pictures_still():
    """Each of its own, in range, and of the same randomness the same."""
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, same, other = (augment(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == x.shape and one.abs().max() <= 1
    assert (one - x).abs().mean((1, 2, 3)).min() > 0.01
    again = augment(x[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(1))
    assert len({tuple(picture.flatten()[:5].tolist()) for picture in again}) == 6
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(halved(flat), flat)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.patch=5"], "patch must be a divisor of the size 16, got 5"),
        (["--model.width=12"], "width must be a multiple of 8, got 12"),
        (["--model.classes=[cat]"], "model.classes must be two or more"),
        (["--model.classes=[cat,dog,lion]"], "no images of lion"),
        (["--model.prompt=x"], "model.prompt must be a text with {} in it"),
        (["--model.prompt=" + 40 * "z " + "{}"], "captions must be of 32 tokens at most"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(data, tmp_path, more, words):
    with pytest.raises(SystemExit) as left:
        fit(*arguments(data, tmp_path / "run", *more))
    said = str(left.value.code)
    assert words in said and "\n" not in said
    assert not (tmp_path / "run").exists()
