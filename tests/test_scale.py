"""The tables of docs/scale.md, and the simulation behind the last of them."""

import importlib.util
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_script(scale):
    page = scale.PAGE.read_text(encoding="utf-8")
    for table in islice(scale.tables(), 3):  # without the simulation, which takes a minute
        assert table in page


def test_a_plan_is_its_closed_form(scale):
    plan = scale.Plan(1e9, 8)
    assert plan.scoring == pytest.approx(2 * 24e9 * 1e9 / (8 * 989e12 * 0.5))
    assert plan.reduction == pytest.approx(2 * 2e9 * 7 / 8 / 450e9)
    # Young's interval is a minimum of checkpoints plus repeated steps.
    rate = plan.failures_per_day / scale.DAY

    def lost(interval):
        return plan.checkpoint / interval + rate * interval / 2

    assert lost(plan.interval) == pytest.approx(min(map(lost, np.geomspace(60, 1e6, 20_001))))


@pytest.mark.parametrize("policy", range(3))
def test_equal_workers_without_failures_take_the_ideal_time(scale, policy):
    outcome = scale.simulate(scale.POLICIES[policy], 60, np.full(6, 7.0), math.inf)
    assert outcome.makespan == pytest.approx(70.0)
    assert outcome.finished.tolist() == [1] * 60


@pytest.mark.parametrize("policy", range(3))
@pytest.mark.parametrize("mtbf", [math.inf, 400.0])
def test_every_shard_is_finished_whatever_fails(scale, policy, mtbf):
    seconds = 25.0 * scale.paces(50, seed=1)
    outcome = scale.simulate(scale.POLICIES[policy], 500, seconds, mtbf, seed=1)
    assert outcome.finished.min() == 1
    assert outcome.makespan >= 500 / (1 / seconds).sum()
    assert outcome.started >= outcome.finished.sum()
    if math.isinf(mtbf) and policy < 2:
        assert outcome.started == 500


def test_fixed_assignment_waits_for_its_slowest_worker_and_a_queue_does_not(scale):
    seconds = np.array([1.0] * 9 + [5.0])
    fixed, queue, copies = (
        scale.simulate(policy, 100, seconds, math.inf).makespan for policy in scale.POLICIES
    )
    assert fixed == pytest.approx(50.0)
    assert queue < 17
    assert copies <= queue
