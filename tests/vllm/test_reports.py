import asyncio
import json

import pytest
from scripted_engine import ScriptedEngine, make_guard

from safespec_hf.vllm.driving import drive
from safespec_hf.vllm.reports import report


@pytest.fixture
def result(target, tokenizer):
    """An answer in which something was flagged."""
    answer = make_guard(target, tokenizer).request("a", [11, 12, 13], {"max_tokens": 40})

    async def finish():
        async for _ in drive(answer, ScriptedEngine(5, 0.3)):
            pass

    asyncio.run(finish())
    return answer.result()


def test_everything_that_is_told_is_json(result):
    told = json.loads(json.dumps(report(result, 0.5), allow_nan=False))
    assert len(told["risks"]) == len(result.token_ids)
    assert [event["outcome"] for event in told["events"]] == [event.outcome for event in result.events]
    assert told["events"]
    assert all(risk is None or risk < 0.5 for risk in told["risks"])


def test_an_outcome_has_no_risk_in_it(result):
    told = report(result, 0.5, "outcome")
    assert told == {"finish_reason": result.finish_reason, "num_flags": result.statistics.num_flags}
