"""Sampling fields on a real server of two ranks: what lm-eval measures, what a schema promises, what a bomb costs."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from checkpoints import hf_logits
from leanserve.bundled import EXAMPLE_PROMPT, bundled_model_dir
from live_server import LiveServer, live_server

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "locker": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["brass", "tin"]}, "maxItems": 3},
    },
    "required": ["name", "locker", "tags"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


def exponential(keyword: str) -> dict[str, Any]:
    twice = {f"n{i}": {keyword: [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(25)}
    return {"$ref": "#/$defs/n0", "$defs": {**twice, "n25": {"type": "string"}}}


HOSTILE: dict[str, dict[str, Any]] = {
    "many patterns at once": {"json": {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(20)]}},
    "deep": {"json": nested(30)},
    "too deep": {"json": nested(60)},
    "many alternatives": {
        "json": {
            "type": "object",
            "properties": {f"p{i}": {"anyOf": [{"type": "string"}, nested(1)]} for i in range(800)},
        }
    },
    "doubling": {"json": exponential("anyOf")},
    "doubling all": {"json": exponential("allOf")},
    "a loop": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "elsewhere": {"json": {"$ref": "http://127.0.0.1:1/schema"}},
    "ten thousand values": {"json": {"enum": [f"value {i}" for i in range(5000)]}},
    "a long array": {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}},
    "nested repeats": {"regex": "(a{1,1000}){1,1000}"},
    "many stars": {"regex": "(.*a){40}"},
    "ambiguous": {"grammar": 'start: a\na: a a | "x" | a "x" a'},
    "parentheses": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    arguments = ("--ranks", "2", "--device", "cpu", "--dtype", "float32", "--kv-memory", "32MiB")
    with live_server(*arguments, log=log) as server:
        yield server


def completed(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = server.post(**body)
    assert response.status_code == 200, response.text
    return response.json()


def test_log_likelihoods_are_those_of_transformers(server):
    """lm-eval's local-completions: batched ids, echo, logprobs 1, max_tokens 1; the continuation's are summed."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 2000, (length,), generator=generator).tolist() for length in (3, 70, 200)]
    context_lengths = [1, 50, 130]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = completed(server, **body)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    for prompt, context, choice in zip(prompts, context_lengths, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None
        truth_NV = torch.log_softmax(hf_logits(bundled_model_dir(), prompt), dim=-1)
        expected = sum(float(truth_NV[i - 1, prompt[i]]) for i in range(context, len(prompt)))
        assert sum(logprobs["token_logprobs"][context:-1]) == pytest.approx(expected, abs=1e-3)
        scored = list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))[context:-1]
        greedy = [int(truth_NV[i - 1].argmax()) == prompt[i] for i in range(context, len(prompt))]
        assert [max(top.values()) == top[token] for token, top in scored] == greedy


def test_twenty_seeds_of_a_schema_parse_at_temperature_one(server):
    form = {"type": "json_schema", "json_schema": {"name": "locker", "schema": SCHEMA, "strict": True}}
    body = {"prompt": EXAMPLE_PROMPT, "max_tokens": 150, "temperature": 1, "seed": 0, "response_format": form}
    answer = completed(server, **body, n=20, logprobs=0)
    assert len({choice["text"] for choice in answer["choices"]}) > 10
    for choice in answer["choices"]:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        found = json.loads(choice["text"])
        assert list(found) == ["name", "locker", "tags"]
        assert len(found["name"]) <= 6
        assert 0 <= found["locker"] <= 9999
        assert set(found["tags"]) <= {"brass", "tin"}
    again = completed(server, **body | {"seed": 13})
    assert again["choices"][0]["text"] == answer["choices"][13]["text"], "sample i has the seed of the request plus i"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_p": 0.5, "top_k": 5, "min_p": 0.01},
    {"logit_bias": {"5": 100, "6": -100}, "repetition_penalty": 1.5, "presence_penalty": 2},
    {"ignore_eos": True, "min_tokens": 2},
    {"allowed_token_ids": [5, 6, 7]},
    {"stop_token_ids": [1]},
]


@pytest.mark.parametrize(
    ("wish", "texts", "options"),
    [
        ({"choice": ["a red key", "a blue\nkey"]}, {"a red key", "a blue\nkey"}, OPTIONS[:1]),
        ({"regex": "(north|south)-[0-9]"}, {f"{way}-{i}" for way in ("north", "south") for i in range(10)}, OPTIONS),
        ({"grammar": 'start: "(" start ")" | "x"'}, {"(" * i + "x" + ")" * i for i in range(40)}, OPTIONS[:2]),
    ],
    ids=["choice", "regex", "grammar"],
)
def test_other_forms_hold_with_every_sampling_option(server, wish, texts, options):
    def ask(seed: int) -> list[dict[str, Any]]:
        body = {"prompt": EXAMPLE_PROMPT, "max_tokens": 24, "structured_outputs": wish, "n": 2, **options[seed]}
        return completed(server, **body, seed=seed)["choices"]

    with ThreadPoolExecutor(len(options)) as clients:
        for option, choices in zip(options, clients.map(ask, range(len(options))), strict=True):
            for choice in choices:
                is_beginning = any(text.startswith(choice["text"]) for text in texts)
                assert choice["text"] in texts if choice["finish_reason"] == "stop" else is_beginning, option


def test_a_json_object_through_the_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.completions.create(
        model="leanserve-bundled",
        prompt=EXAMPLE_PROMPT,
        max_tokens=12,
        stream=True,
        logprobs=2,
        n=2,
        seed=1,
        extra_body={"response_format": {"type": "json_object"}, "min_tokens": 1},
    )
    texts = ["", ""]
    for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        assert len(choice.logprobs.tokens or []) == 1
    assert all(text.startswith("{") for text in texts)
    client.close()


def test_hostile_grammars_cost_little_and_nobody_else_anything(server):
    def post(wish: dict[str, Any]) -> tuple[int, dict[str, Any], float]:
        began = time.perf_counter()
        response = server.post(prompt=EXAMPLE_PROMPT, max_tokens=4, structured_outputs=wish)
        return response.status_code, response.json(), time.perf_counter() - began

    with ThreadPoolExecutor(1) as attacker, httpx.Client() as client:
        for name, wish in HOSTILE.items():
            pending = attacker.submit(post, wish)
            while not pending.done():
                began = time.perf_counter()
                client.get(f"{server.url}/ping")
                assert time.perf_counter() - began < 60, name
                time.sleep(0.01)
            status, body, seconds = pending.result()
            assert status in (200, 400), (name, body)
            assert seconds < 60, name  # unbounded ones take minutes; CPU time has its own limit, of 0.2 s
            if status == 400:
                assert body["error"]["param"] == "structured_outputs", name
                assert body["error"]["code"] == "invalid_grammar", name
    assert completed(server, prompt=EXAMPLE_PROMPT, max_tokens=2)["choices"][0]["text"]
