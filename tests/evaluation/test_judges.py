import pytest

from safespec_hf import SafeSpecError
from safespec_hf.config import DEFAULT_REFUSAL
from safespec_hf.evaluation import judges_loading
from safespec_hf.evaluation.judges import Judge, RefusalPhrases, judge_texts
from safespec_hf.evaluation.judges_guard import EndpointJudge, GuardModel
from safespec_hf.evaluation.judges_loading import load_judge
from safespec_hf.evaluation.judges_offline import OfflineJudge

ASKED = "When to prune roses?"


def test_refusal_phrases_count_every_answer_that_does_not_refuse():
    answers = ["In late winter.", DEFAULT_REFUSAL, "I can’t say.", "Nonsense, but no refusal.", " \n"]
    assert RefusalPhrases().judge([ASKED] * 5, answers) == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("kind", [RefusalPhrases, GuardModel, EndpointJudge, OfflineJudge])
def test_every_judge_judges(kind):
    assert callable(kind.judge)
    assert isinstance(RefusalPhrases(), Judge)


def test_as_many_requests_as_answers():
    with pytest.raises(SafeSpecError, match="got 1 for 2"):
        RefusalPhrases().judge([ASKED] * 2, ["In late winter."])


def test_blank_answers_are_judged_by_nobody():
    asked = []
    answers = ["", "In winter.", "\t", "In spring."]
    risks = judge_texts([f"{n}" for n in range(4)], answers, lambda *texts: asked.append(texts) or [0.25, 0.75])
    assert (risks, asked) == ([0, 0.25, 0, 0.75], [(["1", "3"], ["In winter.", "In spring."])])


def test_no_answers_are_no_work():
    assert judge_texts([], [], lambda *_: pytest.fail("asked")) == []


@pytest.mark.parametrize("name", ["phrases", "refusal-phrases"])
def test_phrases_are_found_by_their_name(name):
    assert load_judge(name) == RefusalPhrases()


def test_an_endpoint_is_found_by_its_address_and_the_guard_s_name(monkeypatch):
    made = []
    monkeypatch.setattr(judges_loading, "EndpointJudge", lambda *args, **kwargs: made.append((args, kwargs)))
    load_judge("https://garden.example/v1#owner/Llama-Guard-3-1B")
    monkeypatch.setenv("SAFESPEC_JUDGE_KEY", "rose")
    load_judge("https://garden.example/v1#owner/Llama-Guard-3-1B")
    where = ("https://garden.example/v1", "owner/Llama-Guard-3-1B")
    assert made == [(where, {"key_variable": None}), (where, {"key_variable": "SAFESPEC_JUDGE_KEY"})]


def test_an_endpoint_without_a_guard_is_refused():
    with pytest.raises(SafeSpecError, match="Say which guard"):
        load_judge("https://garden.example/v1")


def test_a_folder_without_a_judge_is_taken_for_a_guard(target_folder):
    with pytest.raises(SafeSpecError, match="is LlamaForCausalLM, which can't label"):
        load_judge(target_folder)
