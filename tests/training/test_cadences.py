"""When something is recorded."""

import pytest

from emformer.parts import UserError
from emformer.training.cadences import AtEnd, Every, LogSpaced


def test_every_n_steps_and_the_last():
    assert [step for step in range(26) if Every(10).due(step, 25)] == [0, 10, 20, 25]
    with pytest.raises(UserError, match="at least 1"):
        Every(0)


def test_log_spaced_steps_grow_by_a_constant_factor():
    assert LogSpaced(8).steps(1000) == [0, 1, 3, 10, 32, 100, 316, 1000]
    assert LogSpaced(4, first=10).steps(1000) == [0, 10, 100, 1000]
    assert LogSpaced(1).steps(300) == [300] and LogSpaced(2).steps(300) == [0, 300] and LogSpaced(3).steps(300) == [0, 1, 300]
    for count in range(1, 12):
        for last in (1, 2, 3, 7, 300):
            steps = LogSpaced(count, first=5).steps(last)
            assert len(steps) <= count and steps == sorted(set(steps)) and steps[-1] == last
            assert [step for step in range(last + 1) if LogSpaced(count, first=5).due(step, last)] == steps
    with pytest.raises(UserError, match="at least 1"):
        LogSpaced(0)


def test_at_the_end_is_the_last_step_alone():
    assert [step for step in range(6) if AtEnd().due(step, 5)] == [5]
