"""States: every job can end, ended jobs stay ended, and every job state says what its model is."""

from __future__ import annotations

import pytest

from nvcache.core.states import JOB_MOVES, MODEL_STATE_OF_JOB, JobState, ModelState


@pytest.mark.parametrize("state", JobState)
def test_every_job_can_end_and_then_stays(state: JobState) -> None:
    assert state.ended == (not JOB_MOVES[state])
    assert state not in JOB_MOVES[state]
    if not state.ended:
        assert {move for move in JobState if move.ended} <= JOB_MOVES[state]


def test_every_state_is_reached_from_the_first() -> None:
    seen = {JobState.QUEUED}
    while more := {move for state in seen for move in JOB_MOVES[state]} - seen:
        seen |= more
    assert seen == set(JobState) == set(JOB_MOVES)


def test_every_job_state_tells_its_models_state() -> None:
    assert set(MODEL_STATE_OF_JOB) == set(JobState)
    assert [job for job, model in MODEL_STATE_OF_JOB.items() if model is ModelState.READY] == [JobState.DONE]
