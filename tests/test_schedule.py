"""The schedule's conversions, against themselves, diffusers and the definitions."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lmc.schedule import (
    FallingTime,
    FlowSchedule,
    PredictionType,
    Schedule,
    UniformTime,
    add_noise,
    ddim_step,
    from_eps_and_z_hat,
    guide,
    to_eps_and_z_hat,
)

from gaussian import cosine_alphas_cumprod

TYPES = get_args(PredictionType)
GRID = torch.arange(1000)


def coefficients(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_t, sigma_t over t = 0.02 … 0.98, written out: flow is linear, the rest on a circle."""
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64).view(-1, 1, 1, 1)
    if kind == "flow":
        return 1 - t, t
    return (t * torch.pi / 2).cos(), (t * torch.pi / 2).sin()


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 3, 5, generator=generator, dtype=torch.float64)


def diffusers_scheduler(cls: type, prediction_type: str, **options):
    """One of diffusers' schedulers, its ᾱ in float64 so that 1e-12 can be asked of it."""
    scheduler = cls(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        **options,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("kind", TYPES)
def test_conversions_round_trip(kind):
    alpha_t, sigma_t = coefficients(kind)
    z, eps = images(49, 0), images(49, 1)
    z_t = add_noise(z, eps, alpha_t, sigma_t)
    raw = from_eps_and_z_hat(eps, z, alpha_t, sigma_t, kind)
    eps_again, z_again = to_eps_and_z_hat(raw, z_t, alpha_t, sigma_t, kind)
    torch.testing.assert_close(eps_again, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(z_again, z, rtol=0, atol=1e-12)
    raw_again = from_eps_and_z_hat(eps_again, z_again, alpha_t, sigma_t, kind)
    torch.testing.assert_close(raw_again, raw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
def test_any_raw_output_is_read_consistently(kind):
    """z_t = alpha_t z_hat + sigma_t eps holds for what a network says, not only for the truth."""
    alpha_t, sigma_t = coefficients(kind)
    z_t, raw = images(49, 2), images(49, 3)
    eps, z_hat = to_eps_and_z_hat(raw, z_t, alpha_t, sigma_t, kind)
    torch.testing.assert_close(alpha_t * z_hat + sigma_t * eps, z_t, rtol=0, atol=1e-12)
    raw_again = from_eps_and_z_hat(eps, z_hat, alpha_t, sigma_t, kind)
    torch.testing.assert_close(raw_again, raw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_agrees_with_diffusers_over_the_whole_grid(cls, kind):
    # epsilon divides by alpha_t, 5e-5 at the end of the cosine schedule, so that DDIM (which
    # rounds in another order) differs by 1e-16 / 5e-5 there: relative, not absolute, tolerance.
    scheduler = diffusers_scheduler(cls, kind)
    schedule = Schedule(scheduler.alphas_cumprod)
    z, eps, raw = images(1000, 0), images(1000, 1), images(1000, 2)
    alpha_t, sigma_t = schedule.coefficients(GRID.double() / 1000)
    z_t = add_noise(z, eps, alpha_t, sigma_t)
    torch.testing.assert_close(z_t, scheduler.add_noise(z, eps, GRID), rtol=0, atol=1e-12)
    _, z_hat = to_eps_and_z_hat(raw, z_t, alpha_t, sigma_t, kind)
    if cls is DDIMScheduler:
        scheduler.set_timesteps(1000)
    for i in range(1000):
        step = scheduler.step(raw[i], i, z_t[i])
        torch.testing.assert_close(z_hat[i], step.pred_original_sample, rtol=1e-11, atol=1e-12)


def test_velocity_is_the_one_of_diffusers():
    scheduler = diffusers_scheduler(DDPMScheduler, "v_prediction")
    alpha_t, sigma_t = Schedule(scheduler.alphas_cumprod).coefficients(GRID.double() / 1000)
    z, eps = images(1000, 0), images(1000, 1)
    velocity = from_eps_and_z_hat(eps, z, alpha_t, sigma_t, "v_prediction")
    wanted = scheduler.get_velocity(z, eps, GRID)
    torch.testing.assert_close(velocity, wanted, rtol=0, atol=1e-12)


def test_cosine_schedule_of_the_helper_is_the_one_of_diffusers():
    # diffusers multiplies a thousand factors in float32, hence 1e-4 and not 1e-7.
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(cosine_alphas_cumprod(), theirs, rtol=1e-4, atol=1e-7)


def test_flow_velocity_takes_diffusers_sampler_to_both_ends():
    """Following v along sigma lands on z_hat at sigma 0; v = eps − z by definition."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    z, eps = images(1, 0), images(1, 1)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        z_t = scheduler.scale_noise(z, timestep[None], eps)
        torch.testing.assert_close(z_t, add_noise(z, eps, 1 - sigma, sigma), rtol=0, atol=1e-6)
        raw = from_eps_and_z_hat(eps, z, 1 - sigma, sigma, "flow")
        torch.testing.assert_close(raw, eps - z, rtol=0, atol=0)
        # One Euler step of diffusers stays on the straight line from eps to z (its sigmas are
        # float32, hence 1e-6).
        following = scheduler.step(raw, timestep, z_t).prev_sample
        lower = scheduler.sigmas[i + 1].double()
        torch.testing.assert_close(
            following.double(), add_noise(z, eps, 1 - lower, lower), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("t", "index"),
    [(0.02, 20), (0.98, 980), (0.5, 500), (0.0204, 20), (0.0206, 21), (0, 0), (1, 999), (1.5, 999)],
)
def test_times_map_to_the_nearest_index_inside_the_grid(t, index, dtype):
    schedule = Schedule(cosine_alphas_cumprod())
    times = torch.tensor([t], dtype=dtype)
    assert schedule.timestep(times).tolist() == [index]
    assert schedule.timestep(times).dtype == torch.int64
    alpha_t, sigma_t = schedule.coefficients(times, torch.float64)
    assert alpha_t.item() == pytest.approx(schedule.alphas_cumprod[index].item() ** 0.5, rel=1e-12)
    assert alpha_t.shape == sigma_t.shape == (1, 1, 1, 1)


def test_every_grid_index_is_reached_in_float32():
    schedule = Schedule(cosine_alphas_cumprod())
    assert torch.equal(schedule.timestep(GRID.float() / 1000), GRID)


def test_coefficients_lie_on_the_circle_and_take_the_dtype_asked_for():
    schedule = Schedule(cosine_alphas_cumprod().float())  # as diffusers keeps it
    times = GRID.float() / 1000
    alpha_t, sigma_t = schedule.coefficients(times, torch.float64)
    unit = alpha_t.square() + sigma_t.square()
    torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-12)
    assert schedule.coefficients(times)[0].dtype == torch.float32


@pytest.mark.parametrize("convert", [to_eps_and_z_hat, from_eps_and_z_hat])
def test_unknown_prediction_type_names_the_known_ones(convert):
    x = images(1, 0)
    with pytest.raises(ValueError, match="'velocity'") as error:
        convert(x, x, *Schedule(cosine_alphas_cumprod()).coefficients(x[:, 0, 0, 0]), "velocity")
    assert all(kind in str(error.value) for kind in TYPES)


def test_guidance_extrapolates_from_uncond_through_cond():
    uncond, cond = images(1, 0), images(1, 1)
    torch.testing.assert_close(guide(uncond, cond, 0), uncond, rtol=0, atol=0)
    torch.testing.assert_close(guide(uncond, cond, 1), cond, rtol=0, atol=1e-15)
    torch.testing.assert_close(guide(uncond, cond, 2), 2 * cond - uncond, rtol=0, atol=1e-14)


def test_a_flow_schedules_time_is_its_sigma():
    """Continuous: nothing is rounded to a grid; and alpha_t near t = 1 keeps its digits."""
    schedule = FlowSchedule(steps=500)
    t = torch.tensor([0.0203, 0.5, 1 - 2**-20])
    assert torch.equal(schedule.timestep(t), t * 500)
    alpha_t, sigma_t = schedule.coefficients(t)
    assert alpha_t.shape == sigma_t.shape == (3, 1, 1, 1) and alpha_t.dtype == torch.float32
    assert torch.equal(sigma_t.flatten(), t) and alpha_t.flatten()[2].item() == 2**-20
    alpha_t, sigma_t = schedule.coefficients(t.double(), torch.float64)
    assert alpha_t.dtype == torch.float64 and torch.equal(
        alpha_t + sigma_t, torch.ones(3, 1, 1, 1).double()
    )
    # The straight path between z and eps, as the flow's training has it: v = d z_t / d t.
    z, eps = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    z_t = add_noise(z, eps, alpha_t, sigma_t)
    step = 1e-3
    later = add_noise(z, eps, *schedule.coefficients(t.double() + step))
    velocity = (later - z_t) / step
    back = to_eps_and_z_hat(velocity, z_t, alpha_t, sigma_t, "flow")
    torch.testing.assert_close(back, (eps, z), rtol=0, atol=1e-9)
    assert schedule.to("cpu") == schedule


def draw(schedule, count: int = 4, progress: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return schedule.draw(count, progress, generator, torch.float64)


def test_uniform_times_fill_their_range_whatever_the_progress():
    t = draw(UniformTime((0.2, 0.6)), 4000)
    assert 0.2 <= t.min() < 0.201 and 0.599 < t.max() <= 0.6
    # The deviation of the mean of 4000 is 0.4 / √(12 · 4000) = 0.0018.
    assert t.mean().item() == pytest.approx(0.4, abs=5 * 0.0018)
    assert torch.equal(t, draw(UniformTime((0.2, 0.6)), 4000, progress=0.9))
    assert draw(UniformTime()).unique().numel() == 4


def test_a_shared_uniform_time_is_one_for_all_and_another_at_the_next_draw():
    times = [draw(UniformTime((0.2, 0.6), shared=True), seed=seed) for seed in range(2000)]
    assert all(t.shape == (4,) and t.unique().numel() == 1 for t in times)
    first = torch.stack([t[0] for t in times])
    assert 0.2 <= first.min() < 0.201 and 0.599 < first.max() <= 0.6
    # The deviation of the mean of 2000 is 0.4 / √(12 · 2000) = 0.0026.
    assert first.mean().item() == pytest.approx(0.4, abs=5 * 0.0026)


def test_falling_time_is_one_for_all_and_falls_linearly_within_its_range():
    for progress in (0.0, 0.25, 0.5, 0.995):
        wanted = min(max(1 - progress, 0.02), 0.98)
        assert draw(FallingTime(), progress=progress).tolist() == [wanted] * 4
    raised = {draw(FallingTime(jitter=0.1), progress=0.5, seed=seed)[0].item() for seed in range(9)}
    assert len(raised) == 9 and 0.5 <= min(raised) < max(raised) <= 0.6
    assert draw(FallingTime(jitter=0.5), progress=0.1)[0].item() == 0.98


@pytest.mark.parametrize("schedule", [UniformTime, FallingTime])
@pytest.mark.parametrize("time_range", [(0.9, 0.1), (-0.1, 0.5), (0.5, 1.5)])
def test_a_time_range_that_is_none_is_refused(schedule, time_range):
    with pytest.raises(ValueError, match="time_range must be an interval"):
        schedule(time_range)


def test_a_negative_jitter_is_refused():
    with pytest.raises(ValueError, match=r"jitter must not be negative, got -0\.1"):
        FallingTime(jitter=-0.1)


def test_a_ddim_step_is_diffusers_own():
    """Down, on its grid and to the clean end; and back up, the inverse of the step down."""
    scheduler = diffusers_scheduler(DDIMScheduler, "epsilon", set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    z_t, eps = images(1, 0), images(1, 1)
    bars = torch.cat([scheduler.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
    for here, there in ((900, 800), (100, 0), (0, -1)):
        a, b = ((bars[i].sqrt().item(), (1 - bars[i]).sqrt().item()) for i in (here, there))
        wanted = scheduler.step(eps, here, z_t).prev_sample
        down = ddim_step(z_t, eps, a, b)
        torch.testing.assert_close(down, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(ddim_step(down, eps, b, a), z_t, rtol=0, atol=1e-10)
