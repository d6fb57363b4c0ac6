"""Temperature schedules: the host's reference, the device's table, and what is refused."""

import dataclasses
import math
import pickle
from collections.abc import Callable

import pytest
import torch

from nanovllm.layers.temperature import Constant, Cosine, Linear, Points, TemperatureSchedule, evaluate

SCHEDULES = [
    Constant(0.7),
    Constant(0),
    Linear(1.2, 0.3, 64),
    Linear(0.0, 2.0, 1),
    Linear(1.0, 0.0, 1000),
    Cosine(1.5, 0.0, 100),
    Cosine(0.2, 0.9, 7),
    Points([(5, 1.0)]),
    Points([(0, 1.0), (1, 0.0), (10, 0.0), (11, 2.0), (500, 0.1)]),
    Points([(3, 0.5), (9, 1.5), (10, 0.25)]),
]


@pytest.mark.parametrize(
    ("schedule", "position", "value"),
    [
        (Constant(0.7), 10**9, 0.7),
        (Linear(1.0, 0.0, 10), 0, 1.0),
        (Linear(1.0, 0.0, 10), 5, 0.5),
        (Linear(1.0, 0.0, 10), 10, 0.0),
        (Linear(1.0, 0.0, 10), 11, 0.0),
        (Cosine(1.0, 0.0, 8), 0, 1.0),
        (Cosine(1.0, 0.0, 8), 2, (1 + math.cos(math.pi / 4)) / 2),
        (Cosine(1.0, 0.0, 8), 4, 0.5),
        (Cosine(1.0, 0.0, 8), 8, 0.0),
        (Points([(4, 1.0), (8, 2.0), (10, 0.0)]), 0, 1.0),
        (Points([(4, 1.0), (8, 2.0), (10, 0.0)]), 5, 1.25),
        (Points([(4, 1.0), (8, 2.0), (10, 0.0)]), 8, 2.0),
        (Points([(4, 1.0), (8, 2.0), (10, 0.0)]), 9, 1.0),
        (Points([(4, 1.0), (8, 2.0), (10, 0.0)]), 99, 0.0),
        (Points([(4, 1.0)]), 0, 1.0),
    ],
)
def test_the_temperature_at_a_position(schedule: TemperatureSchedule, position: int, value: float) -> None:
    assert schedule.at(position) == pytest.approx(value, abs=1e-12)


def test_the_device_agrees_with_the_host_in_a_batch_of_all_kinds() -> None:
    longest = max(len(schedule.pieces()) for schedule in SCHEDULES)
    padded = [s.pieces() + s.pieces()[-1:] * (longest - len(s.pieces())) for s in SCHEDULES]
    table = torch.tensor(padded, dtype=torch.float32)
    for position in [*range(130), 499, 500, 501, 999, 1000, 1001, 100_000]:
        expected = [schedule.at(position) for schedule in SCHEDULES]
        found = evaluate(table, torch.full((len(SCHEDULES),), position)).tolist()
        assert found == pytest.approx(expected, abs=1e-6)
        assert [value == 0 for value in found] == [value == 0 for value in expected]  # greedy where it should be


def test_largest_and_smallest_temperatures_stay_finite() -> None:
    schedule = Linear(1e300, 1e-300, 10)
    table = torch.tensor([schedule.pieces()], dtype=torch.float32)
    for position in range(12):
        assert evaluate(table, torch.tensor([position])).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_are_values(schedule: TemperatureSchedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))
    assert isinstance(schedule, TemperatureSchedule)
    field = dataclasses.fields(schedule)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Constant(-0.1), ValueError, "value is -0.1"),
        (lambda: Constant("warm"), TypeError, "value is 'warm'"),
        (lambda: Constant(math.nan), ValueError, "value is nan"),
        (lambda: Linear(1.0, -1.0, 5), ValueError, "end is -1.0"),
        (lambda: Linear(math.inf, 1.0, 5), ValueError, "start is inf"),
        (lambda: Cosine(1.0, 0.5, 0), ValueError, "num_tokens is 0; it must be a whole number of at least 1"),
        (lambda: Cosine(1.0, 0.5, 2.5), TypeError, "num_tokens is 2.5"),
        (lambda: Points([]), ValueError, "points is empty"),
        (lambda: Points("ab"), TypeError, "points is 'ab'"),
        (lambda: Points(3), TypeError, "points is 3"),
        (lambda: Points([(1, 2, 3)]), TypeError, r"points\[0\] is \(1, 2, 3\)"),
        (lambda: Points([(-1, 1.0)]), ValueError, r"position of points\[0\] is -1"),
        (lambda: Points([(2, 1.0), (2, 0.5)]), ValueError, r"position of points\[1\] is 2; .* at least 3"),
        (lambda: Points([(0, 1.0), (2, -0.5)]), ValueError, r"temperature of points\[1\] is -0.5"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
