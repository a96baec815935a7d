"""Measures a checkpoint of the bundled model on documents it was not trained on, and draws what it found.

    python -m leanserve.bundled.evaluate DIRECTORY

writes evaluation.json and accuracy.png beside the checkpoint. The model card quotes these and nothing else.

A document holds ten facts at ten depths; each is asked alone, after the document. An answer counts when greedy decoding
gives the whole answering sentence: no token of it may be wrong. `leanserve.bundled.needles` asks the same of a server.
"""

import argparse
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from leanserve.bundled.corpus import Haystack, make_haystack
from leanserve.bundled.grammar import STYLES, Writer, corpus_words
from leanserve.bundled.held_out import DEPTHS, KINDS, LENGTHS_TOKENS, Kind, held_out, question_and_answer
from leanserve.bundled.network import KVCache, Network, load

__all__ = ["Asked", "Prompted", "accuracy_by_depth", "ask", "broken_words", "held_out_perplexity", "sample"]

END = 1


class Prompted:
    """A network that has read a text, and can be asked how it goes on, again and again."""

    @torch.inference_mode()
    def __init__(self, network: Network, ids: list[int]) -> None:
        self._network = network
        self._device = network.model.embed_tokens.weight.device
        self._tokens = len(ids)
        at = torch.arange(len(ids), device=self._device)[None]
        self._hidden, self._cache = network(torch.tensor([ids], device=self._device), at)

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> tuple[Tensor, KVCache]:
        at = torch.arange(self._tokens, self._tokens + len(ids), device=self._device)
        keys = torch.arange(self._tokens + len(ids), device=self._device)
        mask = torch.where(keys <= at[:, None], 0.0, -math.inf)
        return self._network(torch.tensor([ids], device=self._device), at[None], mask, self._cache)

    @torch.inference_mode()
    def continues_with(self, question: list[int], answer: list[int]) -> bool:
        """Whether greedy decoding after `question` gives exactly `answer`; one pass, as all of it must match."""
        hidden, _ = self._read([*question, *answer])
        predicted = self._network.logits(hidden[0]).argmax(-1).tolist()
        return predicted[len(question) - 1 : -1] == answer

    @torch.inference_mode()
    def sample(self, tokens: int, temperature: float, generator: torch.Generator) -> list[int]:
        """Up to `tokens` further tokens, drawn; an end token ends them. The text read so far grows by them."""
        drawn: list[int] = []
        while len(drawn) < tokens:
            probabilities = torch.softmax(self._network.logits(self._hidden[0, -1]).float() / temperature, -1)
            token = int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
            if token == END:
                break
            drawn.append(token)
            self._hidden, self._cache = self._read([token])
            self._tokens += 1
        return drawn


@dataclass(frozen=True)
class Asked:
    """A fact of a haystack and whether its question was answered rightly."""

    depth: float
    relation: str
    right: bool


def ask(network: Network, tokenizer: Tokenizer, haystack: Haystack) -> list[Asked]:
    """Asks for each fact of the haystack by itself."""
    prompted = Prompted(network, tokenizer.encode(haystack.text).ids)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    asked: list[Asked] = []
    for depth, fact in zip(haystack.depths, haystack.facts, strict=True):
        question, answer = question_and_answer(fact)
        right = prompted.continues_with(encode(question), encode(f"{answer}<|end|>"))
        asked.append(Asked(depth, fact.relation, right))
    return asked


def accuracy_by_depth(network: Network, tokenizer: Tokenizer, tokens: int, documents: int, kind: Kind) -> list[float]:
    """Share of right answers at each of `DEPTHS`."""
    right = [0] * len(DEPTHS)
    for i in range(documents):
        for j, asked in enumerate(ask(network, tokenizer, held_out(tokens, i, kind))):
            right[j] += asked.right
    return [count / documents for count in right]


@torch.inference_mode()
def held_out_perplexity(network: Network, tokenizer: Tokenizer) -> float:
    """Of twenty documents of 512 tokens without questions, per token, facts included."""
    device = network.model.embed_tokens.weight.device
    losses = []
    for i in range(20):
        text = make_haystack(512, DEPTHS, f"perplexity/{i}").text
        ids = torch.tensor([tokenizer.encode(text).ids], device=device)
        hidden, _ = network(ids, torch.arange(ids.shape[1], device=device)[None])
        losses.append(torch.nn.functional.cross_entropy(network.logits(hidden[0, :-1]), ids[0, 1:]))
    return math.exp(torch.stack(losses).mean().item())


def sample(
    network: Network, tokenizer: Tokenizer, samples: int, tokens: int = 64, temperature: float = 0.7
) -> list[str]:
    """Free completions of a header and a date or entry number."""
    texts = []
    for i in range(samples):
        rng = random.Random(f"sample/{i}")
        writer = Writer(rng, rng.choice(STYLES))
        prompted = Prompted(network, tokenizer.encode(f"{writer.header()}\n{writer.opener()}").ids)
        texts.append(tokenizer.decode(prompted.sample(tokens, temperature, torch.Generator().manual_seed(i))))
    return texts


def broken_words(text: str) -> set[str]:
    """Words of `text` that the corpus does not have."""
    return {word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in corpus_words()}


def draw(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A chart of accuracy over length (rows) and depth for each kind of document."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    lengths = [str(tokens) for tokens in LENGTHS_TOKENS]
    figure, panels = pyplot.subplots(1, len(tables), figsize=(13, 3.4), sharey=True, layout="constrained")
    images = []
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        shares = [table.get(tokens, [math.nan] * len(DEPTHS)) for tokens in lengths]
        images.append(axes.imshow(shares, vmin=0.5, vmax=1, cmap="RdYlGn", aspect="auto", alpha=0.7))
        axes.set_xticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS], fontsize=8)
        axes.set(xlabel="depth of the fact", title=name.replace("_", " "))
        for row, column in itertools.product(range(len(lengths)), range(len(DEPTHS))):
            if not math.isnan(shares[row][column]):
                axes.text(column, row, f"{shares[row][column]:.0%}", ha="center", va="center", fontsize=7)
    panels[0].set_yticks(range(len(lengths)), [f"{tokens:,}" for tokens in LENGTHS_TOKENS])
    panels[0].set_ylabel("tokens")
    figure.suptitle("Share of right answers, held-out documents")
    figure.colorbar(images[0], ax=panels)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m leanserve.bundled.evaluate", description=__doc__)
    parser.add_argument("directory", type=Path, help="a checkpoint directory")
    parser.add_argument("--documents", type=int, default=10, help="per length, each with ten facts; default 10")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.directory / "tokenizer.json"))
    network = load(arguments.directory).to("cuda" if torch.cuda.is_available() else "cpu")
    tables: dict[str, dict[str, list[float]]] = {name: {} for name in KINDS}
    for tokens in track(LENGTHS_TOKENS, description="asking"):
        for name, kind in KINDS.items():
            if tokens in kind.lengths_tokens:
                row = accuracy_by_depth(network, tokenizer, tokens, arguments.documents, kind)
                tables[name][str(tokens)] = row
    samples = sample(network, tokenizer, 100)
    result = {
        "documents_per_length": arguments.documents,
        "facts_per_document": len(DEPTHS),
        "depths": DEPTHS,
        "accuracy": {
            name: {tokens: round(sum(row) / len(row), 4) for tokens, row in table.items()}
            for name, table in tables.items()
        },
        "accuracy_by_depth": tables,
        "perplexity": round(held_out_perplexity(network, tokenizer), 3),
        "samples_at_temperature_0.7": samples[:5],
        "samples": len(samples),
        "samples_with_broken_words": sum(bool(broken_words(text)) for text in samples),
        "torch": torch.__version__,
    }
    (arguments.directory / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(tables, arguments.directory / "accuracy.png")
    print(json.dumps(result["accuracy"], indent=2))


if __name__ == "__main__":
    main()
