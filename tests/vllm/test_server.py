"""The server as clients see it: over HTTP, with OpenAI's own client. Needs vLLM."""

import asyncio
import random
import time

import pytest

pytest.importorskip("vllm.version")
pytest.importorskip("openai")

import httpx
import openai
from tiny_server import Server, save_target, save_word_head

END = 2
REFUSAL = [8, 6, 9, END]  # a blank line, "no thanks"
WORDS = ["w10", "w11", "w12", "w13", "w14", "w15", "w16", "w17", "w18", "w19"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_target(folder / "target")
    return folder


@pytest.fixture(scope="module")
def flagged(folder):
    return save_word_head(folder / "head", folder / "target")


@pytest.fixture(scope="module")
def server(folder, flagged):
    arguments = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")
    server = Server(folder / "target", folder / "head", folder / "log", *arguments)
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def said(tokens):
    """What the model said itself."""
    for length in (len(REFUSAL), len(REFUSAL) - 1):
        if tokens[-length:] == REFUSAL[-length:]:
            return tokens[:-length]
    return tokens


def known(risks):
    """Risks, a number in the place of one that there is not."""
    return [-1.0 if risk is None else risk for risk in risks]


def ask(seed, **more):
    words = random.Random(seed).choices(WORDS, k=6)
    return {"model": "target", "prompt": " ".join(words), "max_tokens": 40, "seed": seed, **more}


def test_what_is_streamed_is_what_is_answered_at_once(client):
    for seed in range(6):
        whole = client.completions.create(**ask(seed, temperature=0))
        parts = list(client.completions.create(**ask(seed, temperature=0), stream=True))
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        told, again = whole.choices[0].safespec, parts[-1].choices[0].safespec
        assert [event["outcome"] for event in told["events"]] == [event["outcome"] for event in again["events"]]
        # what comes from the prefix cache was summed up in forwards of other shapes
        assert known(told["risks"]) == pytest.approx(known(again["risks"]), abs=1e-4)


def test_a_chat_tells_its_risks_and_counts_its_tokens(client):
    chat = [{"role": "user", "content": "w10 w11"}]
    answer = client.chat.completions.create(model="target", messages=chat, max_tokens=20, seed=1)
    assert answer.choices[0].finish_reason in ("stop", "length", "content_filter")
    assert answer.usage.completion_tokens == len(answer.choices[0].safespec["risks"])
    assert answer.usage.prompt_tokens == 2


def test_several_answers_are_guarded_each_on_its_own(client, flagged):
    answer = client.completions.create(**ask(3, n=4), extra_body={"return_token_ids": True})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) > 1
    assert not any(flagged & set(said(choice.token_ids)) for choice in answer.choices)


def test_an_answer_ends_before_a_stop_string(client):
    whole = client.completions.create(**ask(2, temperature=0)).choices[0].text
    stop = whole.split()[3]
    answer = client.completions.create(**ask(2, temperature=0), stop=[stop]).choices[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (whole[: whole.index(stop)], "stop", stop)


def test_a_client_may_ask_for_more_caution_and_gets_a_refusal(client):
    answer = client.completions.create(**ask(4), extra_body={"safespec": {"risk_threshold": 1e-6}}).choices[0]
    assert answer.finish_reason == "content_filter"
    assert answer.text.split() == ["no", "thanks"]
    assert answer.safespec["finish_reason"] == "safety_refusal"


@pytest.mark.parametrize(
    "field",
    [
        {"min_tokens": 4},
        {"logprobs": 1},
        {"echo": True},
        {"allowed_token_ids": [4]},
        {"vllm_xargs": {"safespec": "{}"}},
        {"safespec": {"risk_threshold": 1.0}},
        {"safespec": False},
        {"response_format": {"type": "json_object"}},
        {"use_beam_search": True},
        {"a_new_field": 1},
        {"logit_bias": {"63": -100}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_can_not_be_guarded_is_refused_by_name(server, field):
    answer = httpx.post(f"{server.url}/v1/completions", json=ask(0) | field, timeout=30)
    assert answer.status_code == 400
    assert next(iter(field)) in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"n": 0},
        {"n": 2, "temperature": 0},
        {"stop_token_ids": [10**6]},
        {"stop_token_ids": [-1]},
        {"stop": ["w10", ""]},
        {"logit_bias": {"1000": 1}},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e39},
        {"temperature": 2.5},
        {"bad_words": ["w10"]},
        {"ignore_eos": True},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {}}}], "tool_choice": "auto"},
    ],
    ids=str,
)
def test_what_is_wrong_is_told_before_anything_is_streamed(server, route, stream, field):
    asked = {"prompt": "w10 w11"} if route == "completions" else {"messages": [{"role": "user", "content": "w10"}]}
    body = {"model": "target", "max_tokens": 4, "stream": stream, **asked} | field
    answer = httpx.post(f"{server.url}/v1/{route}", json=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], ["w10", ""], [10] * 255, [10, 10**6]], ids=lambda one: str(one)[:20])
def test_prompts_that_cant_be_answered_are_refused_and_no_other_one_begins(server, prompt):
    answer = httpx.post(f"{server.url}/v1/completions", json=ask(0) | {"prompt": prompt}, timeout=30)
    assert answer.status_code == 400
    assert "choices" not in answer.json()


def test_prompts_may_be_words_or_tokens_and_several(client):
    words, tokens = ["w10 w11", "w12"], [[10, 11], [12]]
    for prompt in (words, tokens):
        asked = {"model": "target", "prompt": prompt, "max_tokens": 5, "temperature": 0}
        answer = client.completions.create(**asked)
        parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert [choice.index for choice in answer.choices] == [0, 1]
        for index, choice in enumerate(answer.choices):
            mine = [one for part in parts for one in part.choices if one.index == index]
            assert "".join(one.text for one in mine) == choice.text
            assert mine[-1].safespec["finish_reason"] == choice.safespec["finish_reason"]
        assert parts[-1].usage == answer.usage
        assert answer.usage.completion_tokens == sum(len(choice.safespec["risks"]) for choice in answer.choices)


def test_ids_that_clients_choose_may_come_twice_at_once(server):
    async def main():
        async with httpx.AsyncClient(timeout=60) as client:
            body = ask(1, temperature=0, request_id="mine")
            posts = (client.post(f"{server.url}/v1/completions", json=body) for _ in range(6))
            return await asyncio.gather(*posts)

    answers = asyncio.run(main())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_with_a_seed_an_answer_comes_again_recoveries_too(client):
    outcomes = set()
    for seed in range(8):
        first, again = (client.completions.create(**ask(seed, n=2)) for _ in range(2))
        assert [one.text for one in first.choices] == [one.text for one in again.choices]
        outcomes |= {event["outcome"] for one in first.choices for event in one.safespec["events"]}
    assert "recovered" in outcomes


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"logit_bias": {str(token): 100 for token in range(8, 48)}},
        {"temperature": 2.0, "top_k": 1, "min_p": 1.0},
        {"top_p": 1e-6, "stop_token_ids": [63]},
    ],
    ids=str,
)
def test_at_the_ends_of_what_is_allowed_nothing_flagged_gets_out(client, flagged, more):
    known = {name: more.pop(name) for name in ("frequency_penalty", "presence_penalty") if name in more}
    for seed in range(6):
        extra = {"return_token_ids": True} | more
        parts = list(client.completions.create(**ask(seed) | known, stream=True, extra_body=extra))
        tokens = [token for part in parts for choice in part.choices for token in choice.token_ids or []]
        assert not flagged & set(said(tokens))


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages", "/inference/v1/generate", "/collective_rpc"])
def test_no_route_leads_past_the_guard(server, route):
    assert httpx.post(f"{server.url}{route}", json={}, timeout=30).status_code == 404


def test_nothing_flagged_is_streamed_and_nothing_is_left(server, flagged):
    async def stream(client, seed):
        most = random.Random(seed).choice([3, 10, 100])  # some hang up in the middle
        body = ask(seed, stream=True, return_token_ids=True, n=1 + seed % 2)
        tokens = {}
        async for part in await client.completions.create(**{"extra_body": {}} | _split(body)):
            for choice in part.choices:
                tokens.setdefault(choice.index, []).extend(choice.token_ids or [])
            if sum(map(len, tokens.values())) >= most:
                break
        return list(tokens.values())

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, seed) for seed in range(40)))

    before = server.count("safespec_flags_total")
    answers = [tokens for streams in asyncio.run(main()) for tokens in streams]
    assert not any(flagged & set(said(tokens)) for tokens in answers)
    assert server.count("safespec_flags_total") > before
    assert server.count("safespec_fail_closed_total") == 0
    assert _settles(server, "safespec_state_entries", 0)
    assert server.count("safespec_head_seconds_total") > 0


def test_when_the_worker_dies_no_request_hangs_or_is_answered(server, flagged):
    """The last one: it takes the server with it."""

    async def stream(client, seed):
        text = ""
        async with client.stream("POST", f"{server.url}/v1/completions", json=ask(seed, stream=True)) as answer:
            async for line in answer.aiter_lines():
                text += line
        return text

    async def main():
        async with httpx.AsyncClient(timeout=30) as client:
            tasks = [asyncio.create_task(stream(client, seed)) for seed in range(24)]
            await asyncio.sleep(0.15)
            for worker in server.workers():
                worker.kill()
            return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    ends = asyncio.run(main())
    assert all(isinstance(end, httpx.HTTPError) or "[DONE]" in end for end in ends)
    assert any("The engine is gone" in end for end in ends if isinstance(end, str))
    statuses = set()
    while (status := _post(server, ask(0))) is not None:
        statuses.add(status)
        time.sleep(0.1)
    assert statuses <= {503}
    assert server.process.wait(30) is not None  # for whoever starts it again


def _post(server, body):
    """The status; nothing where there is no server any more."""
    try:
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=10).status_code
    except httpx.TransportError:
        return None


def _split(body):
    """OpenAI's client knows its own fields only."""
    known = {name: body[name] for name in ("model", "prompt", "max_tokens", "seed", "stream", "n")}
    return known | {"extra_body": {name: value for name, value in body.items() if name not in known}}


def _settles(server, name, value, seconds=20):
    end = time.monotonic() + seconds
    while server.count(name) != value and time.monotonic() < end:
        time.sleep(0.5)
    return server.count(name) == value
