import pytest

from safespec_hf import SafeSpecError
from safespec_hf.training.steps import Step, only_one


def sow(folder):
    (folder / "bed").write_text("roses")
    return {"num_roses": 3}


def fail(folder):
    (folder / "bed").write_text("half")
    raise KeyboardInterrupt


def test_a_finished_step_is_found_with_what_it_made_and_another_is_not(tmp_path):
    Step(tmp_path, "sow", {"seed": 1}).finish(sow)
    found = Step(tmp_path, "sow", {"seed": 1})
    assert found.is_finished
    assert found.facts == {"num_roses": 3}
    assert found.seconds < 60
    assert (found.folder / "bed").read_text() == "roses"
    others = [Step(tmp_path, "sow", {"seed": 2}), Step(tmp_path, "reap", {"seed": 1})]
    assert not any(step.is_finished for step in others)


@pytest.mark.parametrize("keeps_parts", [False, True])
def test_an_attempt_that_failed_leaves_nothing_or_what_the_next_goes_on_with(tmp_path, keeps_parts):
    step, seen = Step(tmp_path, "sow", {}, keeps_parts=keeps_parts), []
    with pytest.raises(KeyboardInterrupt):
        step.finish(fail)
    assert not step.is_finished
    step.finish(lambda folder: seen.extend(path.name for path in folder.iterdir()) or sow(folder))
    assert seen == ["bed"] * keeps_parts
    assert [path.name for path in tmp_path.iterdir()] == [step.folder.name]


def test_what_somebody_left_of_a_step_is_replaced(tmp_path):
    step = Step(tmp_path, "sow", {})
    step.finish(sow)
    (step.folder / "step.json").unlink()
    step.finish(sow)
    assert step.is_finished


def test_two_runs_are_not_at_work_in_one_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(SafeSpecError, match="Another run is at work in"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass
