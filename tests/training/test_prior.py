"""A small prior of one's own, from labelled shards to a folder that `DiffusersPrior` loads."""

import json
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from lmc.measure.metrics import cmmd
from lmc.priors import DiffusersPrior
from lmc.priors.small import TextDenoiser, sample, scheduler
from lmc.release import release
from lmc.shards.images import ImageStream, to_uint8, write_shard
from lmc.training.labelled import check_labels
from lmc.training.prior import PriorTraining
from lmc.training.start import train

import worlds

SIZE = 8
TINY = ["--model.widths=[8,8]", "--model.attention=1", "--model.samples.each=2"]
TINY += ["--model.samples.steps=2", "--trainer.max_steps=4", "--model.optimizer.warm_up=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty cats and six dogs to train on, of ten pixels a side; cats are bright, dogs dark."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, counts in (("train", (60, 6)), ("heldout", (6, 4))):
        samples = []
        for label, count, level in zip(("cat", "dog"), counts, (0.5, -0.5), strict=True):
            for i in range(count):
                image = torch.full((3, 10, 10), level)
                image[:, :, 5:] += 0.1 + i / 1000
                about = {"label": label}
                samples.append((f"{split}-{label}-{i:03d}", worlds.png(image), "png", about))
        write_shard(folder / f"{split}-00000.tar", samples)
    return str(folder)


def arguments(data: str, run: Path, *more: str) -> list[str]:
    given = ["fit", f"--run={run}", "--model.classes=[cat,dog]", f"--model.image_size={SIZE}"]
    return [*given, *worlds.common(data), "--data.image_size=10", *TINY, *more]


def fit(*given: str):
    return train("prior", list(given), "train.py")


def message(*given: str) -> str:
    with pytest.raises(SystemExit) as left:
        fit(*given)
    return str(left.value.code)


def test_what_is_trained_is_a_prior_like_any_other(data, tmp_path):
    """Its predictions are those of the averaged weights, of noise and captions as trained on."""
    cli = fit(*arguments(data, tmp_path))
    prior = DiffusersPrior(str(tmp_path / "prior"), cache_dir=str(tmp_path / "cache"))
    prior.to("cpu")
    assert (prior.image_size, prior.prediction_type) == (SIZE, "v_prediction")
    network = cli.model.averaged
    z, eps = torch.randn(2, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([100, 700])
    bar = scheduler().alphas_cumprod[step][:, None, None, None]
    z_t = bar.sqrt() * z + (1 - bar).sqrt() * eps
    with torch.no_grad():
        v = network(z_t, step, torch.tensor([1, 2]))  # a dog, and nothing
    z_hat = bar.sqrt() * z_t - (1 - bar).sqrt() * v
    text = prior.embed(["a photo of a dog", ""])
    # t is where the schedule has this step's noise.
    t = torch.tensor([_time_of(prior, b) for b in bar.flatten()])
    _, found = prior.predict(z_t, t, text)
    torch.testing.assert_close(found, z_hat, atol=2e-2, rtol=0)  # the folder is of half precision
    files = {path.suffix for path in (tmp_path / "prior").rglob("*") if path.is_file()}
    assert ".safetensors" in files and files <= {".safetensors", ".json", ".model", ".txt"}
    assert list((tmp_path / "validation").glob("samples_*.png"))
    logged = cli.trainer.callback_metrics
    assert 0 < logged["heldout/loss"] < 10


def test_it_is_released_as_a_pipeline(data, tmp_path):
    """That loads like any other, with a card; and is replaced by the next."""
    fit(*arguments(data, tmp_path / "run"))
    out = tmp_path / "release"
    terms = {"license": "cc-by-nc-4.0", "data": "cats and dogs, CC BY-NC 4.0"}
    with pytest.raises(ValueError, match=r"has to state --data \(what it was trained on"):
        release(tmp_path / "run", out=out, license="cc-by-nc-4.0")
    assert not out.exists()
    for _ in range(2):
        release(tmp_path / "run", out=out, **terms)
        card = huggingface_hub.ModelCard.load(out / "README.md")
        assert (card.data.license, card.data.library_name) == ("cc-by-nc-4.0", "diffusers")
        assert card.data.pipeline_tag == "text-to-image"
        assert "'a photo of a cat', 'a photo of a dog', of 8 x 8 pixels" in card.text
        assert "Trained on: cats and dogs, CC BY-NC 4.0" in card.text
        identities = [DiffusersPrior(str(x)).identity for x in (out, tmp_path / "run/prior")]
        assert identities[0]["digest"] == identities[1]["digest"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is there and is no release"):
        release(tmp_path / "run", out=tmp_path / "mine", **terms)


def test_samples_are_judged(data, tmp_path, monkeypatch):
    """By a classifier that takes what is bright for a dog, and the distance of its features."""
    (tmp_path / "sample_judge.py").write_text(worlds.JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = "--model.samples.classifier=sample_judge:load"
    cli = fit(*arguments(data, tmp_path / "run", chosen))
    logged = cli.trainer.callback_metrics
    drawn = to_uint8(cli.model.draw())
    bright = drawn.float().mean((1, 2, 3)) > 127
    assert logged["heldout/classified"].item() == pytest.approx(bright[2:].sum().item() / 4)
    heldout = ImageStream(f"{data}/heldout-*.tar", 10, 10, training=False)
    (batch,) = heldout
    real = to_uint8(batch.image[:, :, 1:9, 1:9]).flatten(1) / 255
    expected = []
    for i, name in enumerate(("cat", "dog")):
        own = real[[label == name for label in batch.label]]
        expected.append(cmmd(drawn[2 * i : 2 * i + 2].flatten(1) / 255, own))
    wanted = sum(expected) / 2
    assert logged["heldout/classifier_cmmd"].item() == pytest.approx(wanted, rel=1e-4)
    assert "heldout/recognised" not in logged


def _time_of(prior, bar: torch.Tensor) -> float:
    """By bisection: alpha falls with t."""
    low, high = 0.0, 1.0
    for _ in range(40):
        t = torch.tensor([(low + high) / 2], dtype=torch.float64)
        alpha, _ = prior.schedule.coefficients(t, torch.float64)
        low, high = (t.item(), high) if alpha.square() > bar else (low, t.item())
    return low


def test_a_run_goes_on_to_the_same_weights(data, tmp_path):
    whole = fit(*arguments(data, tmp_path / "whole"))
    fit(*arguments(data, tmp_path / "parts", "--trainer.max_steps=2"))
    # The cosine is of the steps there are now.
    parts = fit(*arguments(data, tmp_path / "parts"))
    assert parts.trainer.global_step == whole.trainer.global_step == 4
    for run in ("whole", "parts"):
        assert (tmp_path / run / "checkpoints" / "last.ckpt").exists()
    again = fit(*arguments(data, tmp_path / "again"))
    for name, weight in whole.model.network.state_dict().items():
        assert torch.equal(weight, again.model.network.state_dict()[name]), name


def test_the_hours_end_it_and_go_with_the_checkpoint(data, tmp_path):
    hour = ["--trainer.max_steps=1000000", "--model.hours=0.0006"]  # two seconds
    cli = fit(*arguments(data, tmp_path, *hour))
    steps = cli.trainer.global_step
    assert 0 < steps < 1_000_000 and cli.model.share >= 1
    rate = cli.trainer.optimizers[0].param_groups[0]["lr"]
    assert rate < 1e-6  # the cosine is at its end
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["seconds"] >= 2
    later = fit(*arguments(data, tmp_path, *hour))
    assert later.trainer.global_step <= steps + 1


def test_rarer_classes_are_seen_as_often_where_asked(data):
    def share(balance: float) -> float:
        stream = ImageStream(f"{data}/train-*.tar", 10, 10, True, shuffle=30, balance=balance)
        labels: Counter[str] = Counter()
        for _, batch in zip(range(60), stream, strict=False):
            labels.update(batch.label)
        return labels["dog"] / labels.total()

    assert share(0) == pytest.approx(1 / 11, abs=0.03)
    assert share(1) == pytest.approx(1 / 2, abs=0.08)
    assert share(0.5) == pytest.approx(10**0.5 / (10 + 10**0.5), abs=0.08)


def test_a_balanced_stream_is_taken_up_where_it_was(data):
    def stream() -> ImageStream:
        return ImageStream(f"{data}/train-*.tar", 10, 5, True, shuffle=30, balance=1.0)

    batches = [batch for _, batch in zip(range(8), stream(), strict=False)]
    later = stream()
    worker, *position = batches[3].position
    later.resume(4, {worker: tuple(position)})
    rest = [batch.key for _, batch in zip(range(4), later, strict=False)]
    assert rest == [batch.key for batch in batches[4:]]


def test_crops_are_of_the_pixels_themselves(data):
    model = PriorTraining(["cat", "dog"], image_size=4, widths=(8, 8), attention=1)
    image = torch.arange(5 * 3 * 7 * 7).reshape(5, 3, 7, 7).float()
    found = model.cropped(image, torch.Generator().manual_seed(1))
    places = set()
    for whole, part in zip(image, found, strict=True):
        windows = whole.unfold(1, 4, 1).unfold(2, 4, 1)  # (3, 4, 4, 4, 4)
        same = (windows.permute(1, 2, 0, 3, 4) == part).flatten(2).all(2)
        assert same.sum() == 1
        places.add(tuple(same.nonzero()[0].tolist()))
    assert len(places) > 1
    assert torch.equal(model.cropped(image, None), image[..., 1:5, 1:5])


def test_the_loss_is_of_v_weighed_by_snr():
    """Against diffusers' own get_velocity and add_noise."""
    z, eps = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([10, 500, 990])
    ddpm = scheduler()
    v, seen = ddpm.get_velocity(z, eps, step), []

    def network(z_t, step, caption):
        seen.append(z_t)
        return torch.zeros_like(z_t)

    found = {}
    for gamma in (None, 5.0):
        model = PriorTraining(["a", "b"], 4, widths=(8, 8), attention=1, min_snr=gamma)
        found[gamma] = model.losses(network, z, step, eps, torch.zeros(3).long())
    torch.testing.assert_close(seen[0], ddpm.add_noise(z, eps, step))
    torch.testing.assert_close(found[None], v.square().mean((1, 2, 3)))
    bar = np.asarray(ddpm.alphas_cumprod[step], dtype=np.float64)
    snr = bar / (1 - bar)
    weight = np.minimum(snr, 5) / (snr + 1)
    np.testing.assert_allclose(found[5.0], found[None] * torch.from_numpy(weight), rtol=1e-4)


def test_samples_are_diffusers_own(tmp_path):
    """IFPipeline with its DDIM, from the folder, to half precision."""
    from diffusers import DDIMScheduler, IFPipeline

    torch.manual_seed(0)
    network = TextDenoiser(["a cat", "a dog"], 8, (8, 8), 1).eval()
    network.save_pipeline(tmp_path / "prior")
    made = sample(network, torch.tensor([1]), 4, 3.0, torch.Generator().manual_seed(3))
    pipeline = IFPipeline.from_pretrained(tmp_path / "prior", torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.register_to_config(variance_type="fixed_small")  # the pipeline splits it off
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        ["a dog"],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        clean_caption=False,
        output_type="pt",
    )
    torch.testing.assert_close(made, out.images.clamp(-1, 1), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.classes=[cat]"], "model.classes must be two or more"),
        (["--model.classes=[cat,dog,lion]"], "no images of lion. There are: cat 60, dog 6"),
        (["--model.classes=[cat,lion]"], "images of dog, which model.classes does not name"),
        (["--model.image_size=12"], "data.image_size 10 is below model.image_size 12"),
        (["--model.widths=[8,12]"], "widths must be multiples of 8, got [8, 12]"),
        (["--model.widths=[8,8,8,8,8]"], "size must be a multiple of 16"),
        (["--model.prompt=a photo"], "model.prompt must be a text with {} in it"),
        (["--model.hours=-1"], "model.hours must be above 0, or null"),
        (["--model.samples.clip=/no/such/clip"], "model.samples.clip /no/such/clip: no such"),
        (["--model.samples.classifier=no_such:load"], "model.samples: --classifier no_such:load"),
        (["--data.balance=2"], "data.balance must be in [0, 1], got 2"),
        (["--model.width=8"], "has no 'width'; did you mean 'widths'?"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(data, tmp_path, more, words):
    said = message(*arguments(data, tmp_path / "run", *more))
    assert words in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_shards_without_labels_are_refused(tmp_path):
    for split in ("train", "heldout"):
        samples = [("a", worlds.png(torch.zeros(3, 10, 10)), "png", {"other": 1})]
        write_shard(tmp_path / f"{split}-00000.tar", samples)
    said = message(*arguments(str(tmp_path), tmp_path / "run"))
    assert "no KEY.json with a label" in said and "\n" not in said


def test_of_few_images_it_is_said_that_they_are_learnt_by_heart():
    (line,) = check_labels(Counter(cat=500, dog=3), ["cat", "dog"])
    assert line.startswith("dog: 3 images are few")


def test_a_dry_run_needs_no_prior(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(*arguments(data, tmp_path / "run", "--dry_run"))
    said = capsys.readouterr().out
    assert "TextDenoiser, " in said and "denoiser = " not in said
    assert json.dumps("paper") not in said and not (tmp_path / "run").exists()
