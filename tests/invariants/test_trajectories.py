"""Runs compute what they computed when trajectories.json was recorded."""

import copy

import pytest
from invariants import trajectories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


# Each kind of method and layout; test_topologies.py compares the kinds of sharing with one process.
SHORT = (["tied", "packed", "padded", "accumulated", "clm", "lora", "qlora", "muon"], {})
LONG = ([*trajectories.CASES], dict.fromkeys(trajectories.TOPOLOGIES, trajectories.SHARED))


@pytest.mark.parametrize(
    ("alone", "shared"),
    [SHORT, pytest.param(*LONG, marks=pytest.mark.proof)],
    ids=["some", "all"],
)
def test_runs_reproduce_their_trajectories(tmp_path, alone, shared):
    recorded_on, expected = trajectories.references()
    exact = trajectories.machine() == recorded_on
    found = trajectories.train(tmp_path, alone, shared)
    assert {
        name: differs
        for name, trajectory in found.items()
        if (
            differs := trajectories.differences(
                trajectory, expected[name], exact, trajectories.WIDER.get(name, 1)
            )
        )
    } == {}


@pytest.mark.parametrize("topology", trajectories.TOPOLOGIES)
@pytest.mark.parametrize("case", trajectories.SHARED)
def test_recorded_trajectories_of_one_and_two_processes_agree(topology, case):
    """The records themselves: sums in another order, with the bounds of test_topologies.py."""
    recorded = trajectories.references()[1]
    for name, bound in (("loss", 1e-5), ("grad_norm", 1e-4), ("weights", 1e-5)):
        assert recorded[f"{topology}/{case}"][name] == pytest.approx(
            recorded[case][name], rel=bound
        )


def test_every_case_is_recorded():
    shared = [
        f"{topology}/{name}" for topology in trajectories.TOPOLOGIES for name in trajectories.SHARED
    ]
    assert sorted(trajectories.references()[1]) == sorted([*trajectories.CASES, *shared])


@pytest.mark.parametrize(
    ("exact", "factor", "message"),
    [
        (True, [1 + 1e-15] + [1] * 11, "loss"),
        (False, [1] * 11 + [1 + 2e-6], "loss of step 12"),
        (False, [1 + 1e-7] * 12, "one side"),
        (False, [1] * 11, "11 steps instead of 12"),
    ],
)  # fmt: skip
def test_a_changed_computation_is_detected(exact, factor, message):
    """Catch a last digit here; elsewhere one step too far off, a shared drift, a missing step."""
    reference = trajectories.references()[1]["untied"]
    changed = copy.deepcopy(reference)
    changed["loss"] = [loss * by for loss, by in zip(reference["loss"], factor)]
    assert message in "; ".join(trajectories.differences(changed, reference, exact))
    assert trajectories.differences(reference, reference, exact) == []
    wobbling = {
        **reference,
        "loss": [loss * (1 + 5e-7 * (-1) ** step) for step, loss in enumerate(reference["loss"])],
    }
    assert trajectories.differences(wobbling, reference, exact=False) == []
