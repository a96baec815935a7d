"""Trains the bundled model from nothing, in stages that each end with a usable checkpoint.

    python -m leanserve.bundled.train --out runs/bundled

A stage climbs levels: documents grow longer and sparser once answers are right often enough. The learning rate falls to
zero over the last part of the stage's time; then the checkpoint is written to OUT/<stage>. An interrupted run goes on
where it was. Uses a GPU where there is one.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from leanserve.bundled import bundled_model_dir
from leanserve.bundled.batches import Batch, Batches, Level
from leanserve.bundled.network import Attention, Network, Shape, save

__all__ = ["STAGES", "Stage", "Trainer", "loss_of"]


@dataclass(frozen=True)
class Stage:
    """A part of the training that ends with a checkpoint."""

    name: str
    """Of the checkpoint's directory."""
    minutes: float
    """Training time; validation and saving count."""
    learning_rate: float
    """Before it falls."""
    levels: tuple[Level, ...]
    """Climbed in turn; the last one lasts to the end."""
    sharpen: float = 1.0
    """Factor on the queries of rope layers as the stage begins: attention sharp enough for a short document leaks
    in a long one, and training on short ones asks for no more."""


STAGES = (
    Stage(
        "short",
        15,
        2e-3,
        (
            Level(192, 12, (0.0, 0.0), 0.66, updates=0.0),
            Level(256, 12, (0.0, 0.3), 0.5),
            Level(384, 8, (0.2, 0.7), 0.45, dilution=4, jumps=1),
            Level(512, 8, (0.2, 0.9), 0.4, dilution=16, jumps=2),
            Level(1024, 6, (0.2, 0.95), 0.4, dilution=32, jumps=3),
        ),
    ),
    Stage(
        "long",
        40,
        1.5e-3,
        (
            Level(512, 6, (0.2, 0.95), 0.45, updates=0.3, dilution=128, jumps=4),
            Level(1024, 4, (0.2, 0.97), 0.4, updates=0.3, dilution=64, jumps=4),
        ),
        sharpen=1.5,
    ),
    Stage(
        "near",
        60,
        1e-3,
        (Level(1024, 4, (0.3, 0.92), 0.4, updates=0.15, distractors=0.6, dilution=96, jumps=4, once=True),),
        sharpen=1.25,
    ),
)
PROMOTION = 0.92
"""Share of right answer tokens, averaged over recent steps, at which a level is left."""
WARM_UP_STEPS = 50
DECAY_FROM = 0.6
"""Share of a stage's time after which the learning rate falls linearly to zero."""
VALIDATE_EVERY_S = 120


def loss_of(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """The training loss, and the share of answer tokens that greedy decoding would get right.

    Answer values weigh twice as much as all the rest: they are a twentieth of the text, and the whole task.
    Of the body one token in four is scored: the vocabulary is the dearest matrix.
    """
    hidden, _ = network(batch.ids_BL, batch.positions_BL, batch.mask_B1LL)
    reply, answer = batch.reply_BL[:, 1:], batch.answer_BL[:, 1:]
    scored = reply | (torch.rand(reply.shape, device=reply.device) < 0.25)
    target, answer = batch.ids_BL[:, 1:][scored], answer[scored]
    logits = network.logits(hidden[:, :-1][scored]).float()
    loss = F.cross_entropy(logits, target, reduction="none")
    right = (logits[answer].argmax(-1) == target[answer]).float().mean()
    return loss[answer].mean() + 0.5 * loss[~answer].mean(), right.detach()


class Trainer:
    """One run in one directory: OUT/state.safetensors to go on from, OUT/log.jsonl, a checkpoint per finished stage."""

    def __init__(self, out: Path, tokenizer_dir: Path, shape: Shape | None = None, seed: int = 1) -> None:
        self.out = out
        self.tokenizer_dir = tokenizer_dir
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        self.network = Network(shape or Shape(tokenizer.get_vocab_size())).to(self.device)
        self.batches = Batches(tokenizer, f"train/{seed}")
        self.held_out = Batches(tokenizer, f"validation/{seed}")
        matrices = [p for name, p in self.network.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in self.network.named_parameters() if p.dim() != 2 or "embed" in name]
        # Muon finds retrieval in half the steps of AdamW; it is made for matrices between hidden states only.
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.step = self.stage = self.level = 0
        self.stage_seconds = self.total_seconds = 0.0
        self.accuracy = 0.0
        if (out / "state.safetensors").exists():
            self._restore()

    def train_step(self, level: Level, learning_rate: float) -> float:
        """One optimizer step; returns the loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        batch = self.batches.batch(level, self.step, self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss, right = loss_of(self.network, batch)
        self.network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.accuracy += 0.05 * (right.item() - self.accuracy)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def validate(self, level: Level, batches: int = 2) -> float:
        """Accuracy of answer tokens on documents that are never trained on."""
        shares = [loss_of(self.network, self.held_out.batch(level, i, self.device))[1] for i in range(batches)]
        return torch.stack(shares).mean().item()

    def run(self, stages: tuple[Stage, ...] = STAGES) -> None:
        """Trains until the last stage is over."""
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            while self.stage < len(stages):
                stage = stages[self.stage]
                bar = progress.add_task(stage.name, total=stage.minutes * 60, completed=round(self.stage_seconds))

                def report(text: str, bar: TaskID = bar) -> None:
                    progress.update(bar, description=text, completed=round(self.stage_seconds))

                self._run_stage(stage, report)
                directory = self.out / stage.name
                save(self.network, directory)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(self.tokenizer_dir / name, directory / name)
                self.stage, self.level, self.stage_seconds = self.stage + 1, 0, 0.0
                self._remember()

    def _run_stage(self, stage: Stage, report: Callable[[str], None]) -> None:
        since_validation = math.inf
        first_step = self.step
        if self.stage_seconds == 0:
            self._sharpen(stage.sharpen)
        while self.stage_seconds < stage.minutes * 60:
            started = time.monotonic()
            level = stage.levels[self.level]
            if since_validation > VALIDATE_EVERY_S:
                self._log(stage, validation=self.validate(level))
                self._remember()
                since_validation = 0.0
            over = self.stage_seconds / (stage.minutes * 60)
            rate = stage.learning_rate * min(1.0, (self.step - first_step + 1) / WARM_UP_STEPS)
            loss = self.train_step(level, rate * min(1.0, (1 - over) / (1 - DECAY_FROM)))
            if self.step % 20 == 0:
                self._log(stage, loss=loss)
            where = f"{stage.name}, {level.tokens} tokens, step {self.step}"
            report(f"{where}: loss {loss:.2f}, {self.accuracy:.0%} of answers right")
            if self.accuracy > PROMOTION and self.level + 1 < len(stage.levels):
                self.level, self.accuracy, since_validation = self.level + 1, 0.0, math.inf
            seconds = time.monotonic() - started
            self.stage_seconds += seconds
            self.total_seconds += seconds
            since_validation += seconds
        self._log(stage, validation=self.validate(stage.levels[self.level]))

    @torch.no_grad()
    def _sharpen(self, factor: float) -> None:
        for layer, rope in zip(self.network.model.layers, self.network.shape.layers_with_rope, strict=True):
            attention = layer.self_attn
            assert isinstance(attention, Attention)
            if rope:
                attention.q_proj.weight *= factor

    def _log(self, stage: Stage, **figures: float) -> None:
        line = {"stage": stage.name, "tokens": stage.levels[self.level].tokens, "step": self.step}
        line |= {"seconds": round(self.total_seconds), "answers": round(self.accuracy, 4)}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line | {name: round(value, 4) for name, value in figures.items()}) + "\n")

    _PROGRESS = ("step", "stage", "level", "stage_seconds", "total_seconds", "accuracy")

    def _remember(self) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for parameter, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{parameter}.{name}": moment for name, moment in moments.items()}
        progress = json.dumps({name: getattr(self, name) for name in self._PROGRESS})
        # Cloned: safetensors refuses tensors that share memory, as tied embeddings do.
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, self.out / "state.partial", metadata={"progress": progress})
        (self.out / "state.partial").replace(self.out / "state.safetensors")

    def _restore(self) -> None:
        with safe_open(self.out / "state.safetensors", framework="pt", device=str(self.device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            progress = json.loads(file.metadata()["progress"])
        prefix = "network."
        self.network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for number, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    _, _, parameter, moment = name.split(".")
                    moments.setdefault(int(parameter), {})[moment] = tensor
            # The groups hold settings, and those are this code's own.
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for name in self._PROGRESS:
            setattr(self, name, progress[name])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m leanserve.bundled.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run; an interrupted one goes on")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    Trainer(arguments.out, bundled_model_dir(), seed=arguments.seed).run()


if __name__ == "__main__":
    main()
