"""The training model is SmolLM3, and training it works: weights map one to one, loss falls, a run resumes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from closeness import assert_close
from leanserve.bundled import bundled_model_dir
from leanserve.bundled.batches import FARTHEST_TOKENS, NEAR_TOKENS, Batches, Level
from leanserve.bundled.evaluate import Prompted
from leanserve.bundled.network import Network, Shape, load, save
from leanserve.bundled.train import Stage, Trainer, loss_of
from leanserve.bundled.words import OBJECTS

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.from_file(str(bundled_model_dir() / "tokenizer.json"))
VOCABULARY = TOKENIZER.get_vocab_size()
TINY = Shape(VOCABULARY, hidden_size=48, intermediate_size=40, num_attention_heads=6, num_key_value_heads=2)
EASY = Level(tokens=96, batch=4, filler=(0.0, 0.5), questions=0.5)
LONG = Level(tokens=512, batch=3, filler=(0.9, 0.9), questions=0.3, dilution=16, jumps=3)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    return Network(TINY)


def test_weights_and_logits_are_those_of_transformers(network: Network, tmp_path: Path) -> None:
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.bfloat16().float())
    save(network, tmp_path)
    theirs = SmolLM3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(theirs.state_dict()) - {"lm_head.weight"}
    ids = torch.randint(VOCABULARY, (2, 70))
    with torch.inference_mode():
        hidden, _ = network(ids, torch.arange(70).repeat(2, 1))
        assert_close(network.logits(hidden), theirs(ids).logits, torch.float32)


def test_transformers_sees_rope_on_every_other_layer() -> None:
    config = SmolLM3Config(**TINY.config())
    assert config.no_rope_layers == [1, 0, 1, 0] == [int(rope) for rope in TINY.layers_with_rope]


def test_a_saved_network_loads_as_it_was(network: Network, tmp_path: Path) -> None:
    save(network, tmp_path)
    again = load(tmp_path)
    assert again.shape == network.shape
    for name, weight in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.bfloat16().float())


def test_reading_in_two_parts_is_reading_at_once(network: Network) -> None:
    ids = torch.randint(VOCABULARY, (1, 40)).tolist()[0]
    with torch.inference_mode():
        hidden, _ = network(torch.tensor([ids]), torch.arange(40)[None])
        predicted = network.logits(hidden[0]).argmax(-1).tolist()
    prompted = Prompted(network, ids[:25])
    # The rest of the text is not what the network would say, its own predictions are: ask for both.
    assert not prompted.continues_with(ids[25:30], ids[30:])
    rest, _ = prompted._read(ids[25:])
    assert_close(rest, hidden[:, 25:], torch.float32)
    assert prompted.continues_with(ids[25:], []) is True
    assert prompted.continues_with(ids[25:40], [predicted[39]])


def test_equal_seeds_give_equal_batches_and_other_seeds_other_ones() -> None:
    first, again, other = (Batches(TOKENIZER, seed).batch(LONG, 5, CPU) for seed in ("a", "a", "b"))
    assert torch.equal(first.ids_BL, again.ids_BL)
    assert torch.equal(first.positions_BL, again.positions_BL)
    assert not torch.equal(first.ids_BL, other.ids_BL)


def test_answers_are_marked_and_told_in_the_body() -> None:
    batch = Batches(TOKENIZER, "marks").batch(EASY, 1, CPU)
    for ids, answer, reply in zip(batch.ids_BL, batch.answer_BL, batch.reply_BL, strict=True):
        assert reply[answer].all()
        body = TOKENIZER.decode(ids[~reply].tolist())
        marked = TOKENIZER.decode(torch.where(answer, ids, 0).tolist(), skip_special_tokens=False)
        for value in marked.split("<|begin|>"):
            assert value in body


def test_no_fact_is_asked_twice_where_once_is_enough() -> None:
    def asked(level: Level) -> list[list[str]]:
        batch = Batches(TOKENIZER, "once").batch(level, 1, CPU)
        # The sequence's end may cut the last question short.
        return [TOKENIZER.decode(ids.tolist()).split("Question: ")[1:-1] for ids in batch.ids_BL]

    sparse = Level(tokens=512, batch=3, filler=(0.8, 0.8), questions=0.6)
    assert any(len(set(questions)) < len(questions) for questions in asked(sparse))
    for questions in asked(replace(sparse, once=True)):
        assert questions
        assert len(set(questions)) == len(questions)


def test_more_distractors_are_more_facts_about_the_same_objects() -> None:
    def mentions_per_object(distractors: float) -> float:
        level = Level(512, 4, (0.0, 0.0), 0.3, updates=0.0, distractors=distractors)
        batch = Batches(TOKENIZER, "near").batch(level, 1, CPU)
        mentions = [
            [word for word in re.findall(r"\w+", TOKENIZER.decode(ids[~reply].tolist())) if word in OBJECTS]
            for ids, reply in zip(batch.ids_BL, batch.reply_BL, strict=True)
        ]
        return sum(map(len, mentions)) / sum(len(set(words)) for words in mentions)

    assert mentions_per_object(0.9) > 1.5 * mentions_per_object(0.0)


def test_dilution_is_the_attention_of_a_document_whose_filler_is_repeated() -> None:
    # log n on a key's logit weighs as n copies of that key do.
    logits, values = torch.randn(5), torch.randn(5)
    copies = torch.tensor([1, 1, 7, 1, 1])
    diluted = torch.softmax(logits + copies.log(), 0) @ values
    repeated = torch.softmax(logits.repeat_interleave(copies), 0) @ values.repeat_interleave(copies)
    assert_close(diluted, repeated, torch.float32)

    mask = Batches(TOKENIZER, "mask").batch(LONG, 2, CPU).mask_B1LL
    assert mask is not None
    distance = torch.arange(512)[:, None] - torch.arange(512)
    assert (mask[:, :, distance < 0] == -torch.inf).all()
    assert (mask[:, :, (distance >= 0) & (distance < NEAR_TOKENS)] == 0).all()
    far = mask[:, :, distance >= NEAR_TOKENS]
    assert 0 < far.max() <= torch.tensor(16.0).log()


def test_positions_only_grow_and_reach_far() -> None:
    positions = Batches(TOKENIZER, "jumps").batch(LONG, 1, CPU).positions_BL
    assert (positions.diff(dim=1) >= 1).all()
    assert 512 < positions.max() < FARTHEST_TOKENS + 512


def test_training_lowers_the_loss_on_documents_not_trained_on(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, bundled_model_dir(), TINY)
    held_out = trainer.held_out.batch(EASY, 0, CPU)

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(0)
        return loss_of(trainer.network, held_out)[0].item()

    before = loss()
    for _ in range(24):
        trainer.train_step(EASY, 5e-3)
    assert loss() < before - 1


def test_a_run_ends_with_a_checkpoint_and_goes_on_where_it_was(tmp_path: Path) -> None:
    stages = tuple(Stage(name, minutes=0.01, learning_rate=2e-3, levels=(EASY,)) for name in ("first", "second"))
    trainer = Trainer(tmp_path, bundled_model_dir(), TINY)
    trainer.run(stages[:1])
    assert trainer.step > 0
    first = load(tmp_path / "first")

    again = Trainer(tmp_path, bundled_model_dir(), TINY)
    assert (again.step, again.stage) == (trainer.step, 1)
    assert torch.equal(first.model.norm.weight, again.network.model.norm.weight.bfloat16().float())
    for before, after in zip(trainer.optimizers, again.optimizers, strict=True):
        old, new = before.state_dict()["state"], after.state_dict()["state"]
        assert old.keys() == new.keys() != set()
        assert all(torch.equal(old[i][name], new[i][name]) for i in old for name in old[i])
    again.run(stages[:1])
    assert again.step == trainer.step, "a finished stage is not trained again"
    again.run(stages)
    assert again.step > trainer.step
    assert load(tmp_path / "second").shape == TINY
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if "validation" in line} == {"first", "second"}
