import asyncio
import random

import pytest
from scripted_engine import END, RESERVED, UNSAFE, ScriptedEngine, make_guard

from safespec_hf.vllm.driving import Batcher, drive

PROMPT = [11, 12, 13]
SAMPLING = {"max_tokens": 40, "temperature": 1.0}


@pytest.fixture
def guard(target, tokenizer):
    return make_guard(target, tokenizer)


async def read(answer, engine, most=None):
    """What a client gets until it hangs up after so many tokens."""
    given = []
    steps = drive(answer, engine)
    async for tokens in steps:
        given += tokens
        if most is not None and len(given) >= most:
            break
    await steps.aclose()
    return given


@pytest.mark.parametrize("seed", range(20))
def test_what_leaves_is_the_answer_and_nothing_flagged_is_in_it(guard, seed):
    engine, answer = ScriptedEngine(seed), guard.request("a", PROMPT, SAMPLING)
    given = asyncio.run(read(answer, engine))
    assert given == answer.result().token_ids
    assert not {*UNSAFE, RESERVED} & set(given)


def test_forced_flags_were_among_them(guard):
    flags = []
    for seed in range(20):
        answer = guard.request("a", PROMPT, SAMPLING)
        asyncio.run(read(answer, ScriptedEngine(seed)))
        flags.append(answer.result().statistics.num_flags)
    assert sum(num > 0 for num in flags) >= 10


@pytest.mark.parametrize("seed", range(20))
def test_a_client_that_hangs_up_leaves_nothing_running(guard, seed):
    engine, answer = ScriptedEngine(seed), guard.request("a", PROMPT, SAMPLING)
    given = asyncio.run(read(answer, engine, most=random.Random(seed).randint(1, 12)))
    assert not {*UNSAFE, RESERVED} & set(given)
    assert engine.open == set()
    assert engine.released == ["a"]


@pytest.mark.parametrize("num_steps", range(1, 60, 4))
def test_so_does_one_that_is_cancelled_anywhere(guard, num_steps):
    engine, answer = ScriptedEngine(5, 0.2), guard.request("a", PROMPT, SAMPLING)

    async def main():
        task = asyncio.create_task(read(answer, engine))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)  # candidates end in their own time

    asyncio.run(main())
    assert engine.open == set()
    assert engine.released == ["a"]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_death_of_the_engine_is_raised_and_lets_nothing_out(guard, number):
    # the fifth seed is flagged soon: the first submission is General Mode, the others are its candidates
    engine, answer = ScriptedEngine(5, 0.2, deaths=[number]), guard.request("a", PROMPT, SAMPLING)
    given = []

    async def main():
        async for tokens in drive(answer, engine):
            given.extend(tokens)

    with pytest.raises(ConnectionError):
        asyncio.run(main())
    assert not {*UNSAFE, RESERVED} & set(given)
    assert engine.open == set()


def test_records_that_do_not_come_end_an_answer_in_the_refusal(guard):
    engine, answer = ScriptedEngine(1, 0.0), guard.request("a", PROMPT, SAMPLING)
    engine.take = lambda keys: asyncio.sleep(0, {})
    given = asyncio.run(read(answer, engine))
    assert answer.result().finish_reason == "safety_refusal"
    assert given[-3:] == [6, 9, END]  # "no thanks"
    assert answer.result().failure == "the worker knows nothing of it"


def test_calls_that_wait_are_made_together():
    calls = []

    async def call(keys):
        calls.append(keys)
        await asyncio.sleep(0.01)
        return {key: key.upper() for key in keys}

    async def ask(batcher, key, seconds):
        await asyncio.sleep(seconds)
        return (await batcher.ask([key]))[key]

    async def main():
        batcher = Batcher(call)
        return await asyncio.gather(*(ask(batcher, key, 0.002 * index) for index, key in enumerate("abcd")))

    assert asyncio.run(main()) == list("ABCD")
    assert calls == [["a"], ["b", "c", "d"]]


def test_a_caller_that_is_cancelled_takes_no_other_with_it():
    async def call(keys):
        await asyncio.sleep(0.01)
        return keys

    async def main():
        batcher = Batcher(call)
        gone, stays = (asyncio.create_task(batcher.ask([key])) for key in "ab")
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(main()) == ["a", "b"]


def test_a_call_that_fails_fails_for_all_who_wait_for_it_and_no_other():
    async def call(keys):
        await asyncio.sleep(0)
        if "bad" in keys:
            raise RuntimeError("no")
        return keys

    async def main():
        batcher = Batcher(call)
        first = await asyncio.gather(batcher.ask(["bad"]), batcher.ask(["a"]), return_exceptions=True)
        return first, await batcher.ask(["b"])

    (bad, other), later = asyncio.run(main())
    assert isinstance(bad, RuntimeError)
    assert isinstance(other, RuntimeError)
    assert later == ["b"]
