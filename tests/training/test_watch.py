"""What is said of a translator that goes astray, while it trains."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_translator
from lmc.progress import NOTE
from lmc.shards.images import ImageStream
from lmc.training.callbacks import SaveBest, ShowProgress
from lmc.training.translator import TranslatorTraining
from lmc.training.validation import Heldout
from lmc.training.watch import ALIKE, FALLEN, GAINED, SATURATED, Sources, Watch, astray

import worlds

# As lmc evaluate says it of the demo's DDS, the most saturated of the three losses.
GOOD = {
    **{"r_precision": 0.885, "clip_score": 0.735, "rmse": 0.273, "saturation": 0.016},
    **{"spectrum_error": 0.166, "spectrum_lost": 0.158, "spectrum_gained": 0.008},
}
IDENTITY = {"rmse": 0.0, "spectrum_error": 0.0, "spectrum_gained": 0.0, "saturation": 0.02}


CATS = Sources(saturation=0.02, apart=0.5)


def said(sources=CATS, best=0.9, progress=0.7, corrected=True, **changes) -> list[str]:
    return astray({**GOOD, **changes}, sources, best, progress, corrected)


def test_of_a_good_look_nothing_is_said():
    assert said() == said(best=None) == []
    assert astray({}, Sources(0.0, 0.1), 0.9, 1.0, True) == [], "of what is not measured"
    assert said(Sources(0.6, 0.5), saturation=0.65) == [], "white backgrounds are no runaway"
    assert said(rmse=ALIKE / 2) == [], "a blur is no translation, but no identity either"


def test_a_runaway_is_said_with_what_to_do():
    (line,) = said(Sources(0.01, 0.5), saturation=0.41)
    assert line.startswith("the outputs run away: saturation 0.41, the sources' 0.01. ")
    for what in ("lmc stability", "model.restoring", "model.loss.guidance_scale"):
        assert what in line
    assert said(saturation=0.02 + SATURATED) == []
    (line,) = said(spectrum_gained=1.0, corrected=False)
    assert "10.0 times the sources' power" in line and "corrector" not in line
    assert said(spectrum_gained=GAINED) == []
    (line,) = said(saturation=0.5, spectrum_gained=0.5)
    assert "saturation" in line and "power" in line
    (line,) = said(rmse=0.53)
    assert "RMSE 0.53 to their sources, which are 0.50 from one another" in line
    assert said(rmse=0.49) == said(Sources(0.02, math.inf), rmse=1.9) == []


def test_a_fall_of_r_precision_is_said():
    (line,) = said(r_precision=0.5)
    assert "R-Precision fell to 0.50 from 0.90" in line and "--best" in line
    assert said(r_precision=0.9 - FALLEN + 0.01) == said(r_precision=0.5, best=None) == []


def test_an_output_equal_to_its_input_is_said_from_the_half_on():
    """A residual translator begins so."""
    for progress, count in ((0.0, 0), (0.49, 0), (0.5, 1), (1.0, 1)):
        lines = astray(IDENTITY, CATS, None, progress, False)
        assert len(lines) == count
    assert "nothing is translated" in lines[0] and "model.l2_weight" in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


def test_what_is_known_of_the_sources_depends_on_no_batch(data):
    model = TranslatorTraining.__new__(TranslatorTraining)  # of its kind, and nothing else

    def sources(size: int, limit: int) -> Sources:
        watch = Watch(ShowProgress(), SaveBest(Path("best.ckpt")))
        stream = ImageStream(f"{data}/heldout-*.tar", 16, size, training=False, limit=limit)
        for i, batch in enumerate(stream):
            watch.on_validation_batch_end(None, model, None, batch, i)
        return watch.measured_sources()

    whole = sources(50, 7)
    (batch,) = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=7)
    x = batch.image.numpy()
    apart = [np.sqrt(np.mean((x[i + 1] - x[i]) ** 2)) for i in range(6)]
    assert whole.apart == pytest.approx(np.mean(apart), rel=1e-5)
    assert whole.saturation == pytest.approx(np.mean(np.abs(x) == 1)) and whole.saturation > 0.01
    for size in (1, 3):
        again = sources(size, 7)
        assert again.apart == pytest.approx(whole.apart)
        assert again.saturation == pytest.approx(whole.saturation)
    assert sources(1, 1).apart == math.inf, "of one alone nothing can be said"


def args(prior: Path, data: str, run: Path, *more: str) -> list[str]:
    """A training of four steps that looks at seven held-out images after each."""
    options = ["--trainer.val_check_interval=1", "--model.validation.images=7"]
    return worlds.translator_args(prior, data, run, "SDS", *options, *more)


def notes(run: Path, printed: str) -> list[tuple[int, str]]:
    """Step and line, as printed; the same are in TensorBoard."""
    found = re.findall(rf"^{NOTE}(\d+): (.*)$", printed, re.M)
    events = EventAccumulator(str(run)).Reload()
    tag = "note/text_summary"
    written = events.Tensors(tag) if tag in events.Tags()["tensors"] else []
    texts = [(each.step, each.tensor_proto.string_val[0].decode()) for each in written]
    assert texts == [(int(step), line) for step, line in found]
    return texts


def test_an_idle_translator_is_noted(tiny_prior_folder, data, tmp_path, capfd):
    idle = ["--model.residual=true", "--model.optimizer.lr=1e-12"]
    train_translator.main(args(tiny_prior_folder, data, tmp_path, *idle))
    found = notes(tmp_path, capfd.readouterr().err)
    assert [step for step, _ in found] == [2, 3, 4]
    assert all(line.startswith("nothing is translated") for _, line in found)


def test_a_runaway_is_noted_against_its_sources(
    tiny_prior_folder, data, tmp_path, monkeypatch, capfd
):
    """Those that are looked at; and the best R-Precision is of all looks, resumed ones too."""
    looks = iter([0.9, 0.95, 0.9, 0.5, 0.5, 0.8])

    def measures(self) -> dict[str, float]:
        return {**GOOD, "r_precision": next(looks), "saturation": 0.75}

    monkeypatch.setattr(Heldout, "measures", measures)
    train_translator.main(args(tiny_prior_folder, data, tmp_path))
    (batch,) = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=7)
    ends = ((batch.image == 1) | (batch.image == -1)).double().mean().item()
    assert ends > 0.01, "or it is no test"
    printed = capfd.readouterr().err
    found = notes(tmp_path, printed)
    assert [step for step, _ in found] == [1, 2, 3, 4, 4]
    assert f"saturation 0.75, the sources' {ends:.2f}. Lower" in found[0][1]
    assert "R-Precision fell to 0.50 from 0.95" in found[-1][1]
    train_translator.main(args(tiny_prior_folder, data, tmp_path, "--trainer.max_steps=6"))
    again = capfd.readouterr().err
    assert "note at step 5: R-Precision fell to 0.50 from 0.95" in again
    assert "note at step 6: R-Precision" not in again
