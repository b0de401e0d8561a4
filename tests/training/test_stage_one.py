"""Stage one's own options, run for real: hybrids, restoring trainings."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_bias
from lmc.closed_form import training_triplets
from lmc.corrector import Corrector
from lmc.filter import HybridCorrector, estimate_filter
from lmc.load import load_averaged, load_corrector
from lmc.measure.correctors import evaluate_corrector
from lmc.perturbations import Restoring
from lmc.priors import DiffusersPrior
from lmc.shards.images import ImageStream
from lmc.shards.store import TripletSet, write_triplets
from lmc.training import bias
from lmc.training.bias import CorrectorTraining

import ranks
import worlds

HYBRID = ["--model.kind=hybrid", "--model.closed_form_triplets=400"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_prior_folder: Path, data: str) -> str:
    """Its triplets."""
    folder = tmp_path_factory.mktemp("stored")
    for split in ("train", "heldout"):
        what = TripletSet((f"{data}/{split}-*.tar",), 16, times_per_image=4)
        write_triplets(DiffusersPrior(str(tiny_prior_folder)), what, folder / split)
    return str(folder)


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def by_hand(prior_folder: Path, data: str, batch_size: int = 4):
    """The filter of the first 400 triplets of the training data."""
    prior = DiffusersPrior(str(prior_folder))
    prior.to("cpu")
    batches = training_triplets(
        f"{data}/train-*.tar", prior, 400, 16, batch_size, (0.02, 0.98), 0, "cpu"
    )
    return estimate_filter(batches, prior.identity)


def test_a_hybrid_is_one_run(tiny_prior_folder, data, tmp_path, monkeypatch, capfd):
    """Estimated once, by which also a run that goes on has it; then trained, released, loaded."""
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *HYBRID)
    metrics = train_bias.main(args).trainer.callback_metrics
    assert "estimating 400/400" in capfd.readouterr().err
    wanted = by_hand(tiny_prior_folder, data)
    state = last(tmp_path / "run")["state_dict"]
    for part in ("network", "ema.module"):
        for name in ("gain", "offset"):
            assert torch.equal(state[f"{part}.closed_form.{name}"], getattr(wanted, name))
    assert state["network.unet.last.weight"].abs().max() > 0
    # Beside it, the closed form alone.
    assert metrics["heldout/closed_form_loss"] > 0
    assert metrics["heldout/closed_form_loss"] != metrics["heldout/loss"]
    monkeypatch.setattr(bias, "estimate_filter", None)
    train_bias.main([*args, "--trainer.max_steps=6"])
    network, step = load_averaged(tmp_path / "run")
    assert isinstance(network, HybridCorrector) and step == 6
    assert torch.equal(network.closed_form.gain, wanted.gain)
    worlds.release(tmp_path / "run", tmp_path / "release", unmeasured=False)
    loaded = load_corrector(str(tmp_path / "release"))
    assert loaded.digest() == network.digest()
    loaded.check_prior(DiffusersPrior(str(tiny_prior_folder)).identity)
    card = (tmp_path / "release" / "README.md").read_text()
    assert "HybridCorrector.from_pretrained" in card
    # What was measured at the end of the training is on the card, without being asked for.
    found = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert found["step"] == 6 and found["measured"]["loss"] > 0
    assert f"| loss | {found['measured']['loss']:.4g} |" in card
    assert "closed_form_loss" in card and "/t0" not in card


def test_processes_have_one_closed_form(tiny_prior_folder, data, tmp_path):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *HYBRID)
    first, second = ranks.run(tmp_path, args)
    wanted = by_hand(tiny_prior_folder, data)
    for rank in (first, second):
        assert torch.equal(rank["ema"]["closed_form.gain"], wanted.gain)
    assert first["ema"].keys() == second["ema"].keys()
    for name, value in first["ema"].items():
        assert torch.equal(value, second["ema"][name]), name


def test_a_hybrid_from_stored_triplets_needs_no_prior(
    tiny_prior_folder, stored, tmp_path, monkeypatch
):

    def loaded(self, device: torch.device | str) -> None:
        raise AssertionError("the prior is loaded")

    monkeypatch.setattr(DiffusersPrior, "to", loaded)
    shards = [f"--data.train={stored}/train/*.tar", f"--data.heldout={stored}/heldout/*.tar"]
    args = worlds.bias_args(tiny_prior_folder, stored, tmp_path, *HYBRID, *shards)
    train_bias.main(args)
    assert last(tmp_path)["state_dict"]["network.closed_form.gain"].any()


@pytest.mark.parametrize("bins", [3, 16])
def test_a_hybrid_begins_with_a_released_closed_form(
    tiny_prior_folder, data, tmp_path, monkeypatch, bins
):
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    batches = training_triplets(f"{data}/train-*.tar", prior, 400, 16, 8, (0.02, 0.98), 3, "cpu")
    found = estimate_filter(batches, prior.identity, bins)
    found.save_pretrained(tmp_path / "filter")
    monkeypatch.setattr(bias, "estimate_filter", None)
    more = ["--model.kind=hybrid", f"--model.closed_form={tmp_path / 'filter'}"]
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *more)
    train_bias.main(args)
    train_bias.main([*args, "--trainer.max_steps=6"])
    network, step = load_averaged(tmp_path / "run")
    assert isinstance(network, HybridCorrector) and step == 6
    assert torch.equal(network.closed_form.gain, found.gain)
    network.save_pretrained(tmp_path / "release", config=None)  # as push_to_hub does
    assert len(load_corrector(str(tmp_path / "release")).closed_form.gain) == bins
    found.gain[0] += 1
    found.save_pretrained(tmp_path / "another")
    args = [*args, f"--model.closed_form={tmp_path / 'another'}", "--trainer.max_steps=8"]
    with pytest.raises(SystemExit, match="is not what the hybrid was begun with"):
        train_bias.main(args)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.kind=hybrid", "--model.widths=[8,8,8,8,8,8]"], "a side of 16 cannot be: 32"),
        (["--model.kind=hybrid", "--model.closed_form_triplets=10"], "at least 64, some hundred"),
        (["--model.kind=hybrid", "--model.bounded=true"], "bounded is of kind unet"),
        (["--model.restoring.weights={cast: -1}"], "weights.cast must be at least 0, got -1"),
    ],
)
def test_what_a_stage_one_cannot_be_is_said(tiny_prior_folder, data, tmp_path, options, words):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *options)
    with pytest.raises(SystemExit) as left:
        train_bias.main(args)
    assert words in str(left.value) and "\n" not in str(left.value)
    assert not (tmp_path / "run").exists()


def test_too_few_triplets_are_said_with_the_option(tiny_prior_folder, data, tmp_path):
    more = ["--model.kind=hybrid", "--model.closed_form_triplets=64"]
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, *more)
    with pytest.raises(SystemExit, match=r"closed_form_triplets: too few triplets: \d with t in"):
        train_bias.main(args)


def test_a_latent_prior_that_does_not_say_its_side(family_folder, tiny_prior_folder):
    prior = DiffusersPrior(str(family_folder("sd15")))
    network = CorrectorTraining(prior, (8, 8), kind="hybrid").corrector
    assert network.closed_form.offset.shape[1:] == (prior.channels, prior.z_size, prior.z_size)
    assert prior.z_size < prior.image_size
    del prior.z_size
    with pytest.raises(ValueError, match="has to say z_size"):
        CorrectorTraining(prior, (8, 8), kind="hybrid")


def test_a_dry_run_knows_of_the_closed_form(tiny_prior_folder, data, tmp_path, capsys):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *HYBRID, "--dry_run")
    restoring = ["--model.restoring.weights={mix: 0}"]
    with pytest.raises(SystemExit):
        train_bias.main([*args, *restoring])
    said = capsys.readouterr().out
    assert "HybridCorrector, " in said
    assert "416 of the denoiser = 1 per image and step (a triplet) x 16, and 400 before" in said


def test_a_restoring_training_is_of_perturbed_pictures(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    """b̂(z + δ, t) to ẑ + δ, from one evaluation an image, not normalised; applied, it is."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    sampled: list[bias.Triplets] = []
    loss, sample = bias.corrector_loss, bias.sample_triplets
    forward = Corrector.forward

    def noting(b, z_hat):
        seen.append((b, z_hat))
        return loss(b, z_hat)

    def note(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def look(self, z, t):
        b_hat = forward(self, z, t)
        if torch.is_grad_enabled():
            inputs.append(z)
            outputs.append(b_hat)
        return b_hat

    monkeypatch.setattr(bias, "corrector_loss", noting)
    monkeypatch.setattr(bias, "sample_triplets", note)
    monkeypatch.setattr(Corrector, "forward", look)
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--model.restoring.weights.cast=2")
    metrics = train_bias.main(args).trainer.callback_metrics
    assert len(inputs) == len(sampled) == len(seen) == 4
    for z, b_hat, x, (b, wanted) in zip(inputs, outputs, sampled, seen, strict=True):
        assert b is b_hat
        assert not torch.equal(z, x.z) and z.abs().max() <= 1
        torch.testing.assert_close(wanted - x.z_hat, z - x.z, rtol=0, atol=1e-6)
    network, _ = load_averaged(tmp_path)
    assert network.statistics == "image"
    assert metrics["heldout/restoring_loss"] > 0
    assert metrics["heldout/restoring_loss"] != metrics["heldout/loss"]
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert "heldout/restoring_loss" in tags


def test_a_calibrated_training_notes_the_ratio_of_clean_pictures(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    """And is otherwise one without Eq. 10."""
    seen, right = [], Corrector.calibrate

    def note(self, b_hat, t, z_hat, among):
        seen.append((b_hat, z_hat, among))
        return right(self, b_hat, t, z_hat, among)

    monkeypatch.setattr(Corrector, "calibrate", note)
    given = ["--model.statistics=calibrated", "--model.ema_decay=0", "--model.bounded=false"]
    runs = {}
    for name, more in (("plain", []), ("restoring", ["--model.restoring={}"])):
        seen.clear()
        run = tmp_path / name
        args = worlds.bias_args(tiny_prior_folder, data, run, *given, *more)
        metrics = train_bias.main(args).trainer.callback_metrics
        runs[name], _ = load_averaged(run)
        among = torch.cat([each for *_, each in seen])
        assert among.all() if name == "plain" else 0 < among.sum() < len(among)
        assert len(seen) == 4 and (runs[name].ratio != 1).any()
        assert metrics["heldout/loss"] > 0
    none = worlds.bias_args(tiny_prior_folder, data, tmp_path / "none", *given)
    train_bias.main([*none, "--model.statistics=none"])
    network, _ = load_averaged(tmp_path / "none")
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, runs["plain"].state_dict()[name]), name


def test_the_heldout_restoring_loss_is_that_of_perturbed_pictures(tiny_prior_folder, data):
    """Of b̂ = z, which answers every δ whole, it is the clean pictures' own."""
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    losses = {}
    for name in ("identity", "nothing"):
        model = CorrectorTraining(prior, (8, 8), restoring=Restoring())
        model.null = prior.embed([""])
        answer = (lambda z, t: z) if name == "identity" else (lambda z, t: torch.zeros_like(z))
        model.averaged.forward = answer
        model._origins = lambda: [None, None]
        model.on_validation_epoch_start()
        for number, batch in enumerate(ImageStream(f"{data}/heldout-*.tar", 16, 8, training=False)):
            model.validation_step(batch, 1 + number)
        losses[name] = model.errors.compute()
    found = losses["identity"]
    torch.testing.assert_close(found["restoring_loss"], found["identity_loss"])
    found = losses["nothing"]
    assert abs(found["restoring_loss"] - found["loss"]) > 0.003


def test_the_excess_is_logged_by_t_and_is_that_of_evaluate_corrector(
    tiny_prior_folder, data, stored, tmp_path, capsys
):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run")
    metrics = train_bias.main(args).trainer.callback_metrics
    network, _ = load_averaged(tmp_path / "run")
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    images = ImageStream(f"{data}/heldout-*.tar", 16, 7, training=False)
    found = evaluate_corrector(network, prior, images)
    for name in ("loss", "excess", "floor"):
        assert metrics[f"heldout/{name}"].item() == pytest.approx(found[name], rel=1e-4)
    assert {"heldout/excess/t0.2", "heldout/floor/t0.2"} <= set(metrics)
    # One draw is today's figures, and as stored triplets have them they have none of these.
    for name, more in (
        ("one", ["--model.heldout_draws=1"]),
        ("stored", [f"--data.heldout={stored}/heldout/*.tar"]),
    ):
        args = worlds.bias_args(tiny_prior_folder, data, tmp_path / name, *more)
        others = train_bias.main(args).trainer.callback_metrics
        assert "heldout/excess" not in others
        if name == "one":
            assert torch.equal(others["heldout/loss"], metrics["heldout/loss"])
    assert capsys.readouterr().out.count("heldout/excess and heldout/floor are left out") == 1


def test_a_stage_one_ends_with_its_stability(
    tiny_prior_folder, data, stored, tmp_path, capsys, monkeypatch
):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", "--model.stability=2")
    monkeypatch.setattr(bias, "FREE_STEPS", 3)
    train_bias.main(args)
    said = capsys.readouterr().out
    assert "stability: " in said and f"({tmp_path / 'run' / 'stability.png'})" in said
    result = json.loads((tmp_path / "run" / "stability.json").read_text())
    assert result["images"] == 2 and result["verdict"] in said
    assert (tmp_path / "run" / "stability.png").exists()
    shards = [f"--data.train={stored}/train/*.tar", f"--data.heldout={stored}/heldout/*.tar"]
    more = ["--model.stability=2", *shards]
    train_bias.main(worlds.bias_args(tiny_prior_folder, data, tmp_path / "stored", *more))
    said = capsys.readouterr().out
    assert f"lmc stability CONFIG --corrector {tmp_path / 'stored'} --out DIR" in said
    assert not (tmp_path / "stored" / "stability.json").exists()
