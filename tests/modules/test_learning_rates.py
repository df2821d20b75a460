"""Learning rate schedules, alone and in a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from tiny import Stop, fit, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.errors import InputError
from pcnn_lightning.modules.schedules import LearningRate

PUBLISHED = {"schedule": "multistep", "milestones": (0.3, 0.6, 0.8), "decay": 0.2}


def test_the_published_schedule_of_200_epochs():
    rate = LearningRate(0.1, **PUBLISHED)
    rates = [rate.at(epoch, 200) for epoch in range(200)]
    assert rates == [0.1] * 60 + [0.1 * 0.2] * 60 + [0.1 * 0.2**2] * 40 + [0.1 * 0.2**3] * 40


@given(epochs=st.integers(1, 400), share=st.floats(0.01, 0.99))
def test_a_milestone_takes_effect_at_the_first_epoch_that_reaches_its_share(epochs, share):
    rate = LearningRate(1.0, "multistep", (share,), 0.5)
    for epoch in range(epochs):
        if abs(epoch - share * epochs) > 1e-5:
            assert rate.at(epoch, epochs) == (0.5 if epoch > share * epochs else 1.0)


def test_cosine_runs_from_the_base_to_zero_through_half_of_it():
    rate = LearningRate(0.4, "cosine")
    assert rate.at(0, 10) == 0.4
    assert rate.at(5, 10) == pytest.approx(0.2)
    assert rate.at(10, 10) == pytest.approx(0.0)
    assert rate.at(2.5, 10) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))


def test_exponential_decays_once_an_epoch():
    rate = LearningRate(1.0, "exponential", decay=0.9)
    assert [rate.at(epoch, math.inf) for epoch in (0, 0.99, 1, 1.5, 2)] == [1, 1, 0.9, 0.9, 0.9**2]


def test_warm_up_rises_linearly_and_the_rest_of_the_stage_follows():
    rate = LearningRate(1.0, "cosine", warmup_epochs=2)
    assert [rate.at(step / 4, 10, 1 / 4) for step in range(8)] == [(step + 1) / 8 for step in range(8)]
    assert rate.at(2, 10) == 1.0
    assert rate.at(6, 10) == pytest.approx(0.5)


@given(
    schedule=st.sampled_from(["constant", "multistep", "cosine", "exponential"]),
    epoch=st.floats(0, 100),
    epochs=st.floats(1, 100),
    warmup=st.floats(0, 10),
)
def test_a_rate_is_never_negative_nor_above_its_base(schedule, epoch, epochs, warmup):
    rate = LearningRate(0.3, schedule, (0.5,), 0.1, warmup)
    assert 0 <= rate.at(min(epoch, epochs), epochs, 0.01) <= 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": -0.1}, "at least 0, but got -0.1"),
        ({"base": math.nan}, "but got nan"),
        ({"base": 1, "schedule": "linear"}, "constant, multistep, cosine, exponential, but got 'linear'"),
        ({"base": 1, "milestones": (0.5, 0.5)}, r"rise within \(0, 1\), but got \[0.5, 0.5\]"),
        ({"base": 1, "milestones": (60, 120)}, r"shares of a stage"),
        ({"base": 1, "milestones": (0.3, math.nan)}, r"rise within \(0, 1\), but got \[0.3, nan\]"),
        ({"base": 1, "milestones": ("0.3",)}, r"rise within \(0, 1\), but got \['0.3'\]"),
        ({"base": 1, "decay": 0}, r"\(0, 1\], but got 0"),
        ({"base": 1, "warmup_epochs": -1}, "at least 0, but got -1"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)


# --- in a run -------------------------------------------------------------------------------------------------------


def test_rates_follow_their_schedules_in_each_stage():
    rates = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    model = tiny_pcnn(
        eta1=1e-3, eta2=1e-4, schedule="cosine", projection_schedule="multistep", projection_milestones=[0.5]
    )
    fit(model, max_epochs=3, callbacks=[Watch()])
    expected = [
        [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 12)), 1e-4 * (0.2 if step >= 6 else 1)] for step in range(12)
    ]
    assert rates == [pytest.approx([eta1, eta2, eta1]) for eta1, eta2 in expected]


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(InputError, match=r"max_epochs or trainer\.max_steps"):
        fit(tiny_pcnn(schedule="cosine"), max_epochs=-1)


@pytest.mark.parametrize(
    "schedules", [{"schedule": "multistep"}, {"schedule": "cosine"}, {"projection_schedule": "cosine"}], ids=str
)
def test_a_planned_stage_before_a_stage_without_an_end_is_refused_as_well(schedules):
    with pytest.raises(InputError, match=r"max_epochs or trainer\.max_steps"):
        fit(tiny_pcnn(stage="ternary", **schedules), max_epochs=-1, callbacks=[StageSwitch(1), Stop(6)])
