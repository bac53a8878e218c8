"""The text encoder: a CLIP text model, taught what captions mean before any picture is drawn, then frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorakit.families.pocket.scene_captions import EAR_WORDS, caption, parse
from lorakit.families.pocket.spec import COLOURS, EARS, FIELDS, random_spec
from tools.pocket.recipe import Recipe
from tools.pocket.workers import Run, Worker, save

POSITIONS = 77  # CLIP's


def tokenizer(recipe: Recipe, work: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(work / "tokenizer"), model_max_length=recipe.max_tokens)


def build(recipe: Recipe, vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=recipe.text_width, intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=recipe.text_layers, num_attention_heads=recipe.text_heads,
            max_position_embeddings=POSITIONS,
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        )
    )  # fmt: skip


class Reader(nn.Module):
    """Reads a caption's fields and words back from the encoder's states: what makes them worth attending to."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.fields = nn.ModuleDict(
            {name: nn.Linear(width, len(options) + 1) for name, options in FIELDS.items()}
        )  # + 1: not said
        self.fields["ears"], self.fields["second"] = nn.Linear(width, len(EARS) + 1), nn.Linear(width, len(COLOURS) + 1)
        self.word = nn.Linear(width, vocabulary)


def target_classes(text: str) -> list[int]:
    """Class of every field as said (the last class: not said), then of a toy's ears and their colour."""
    fields = parse(text)
    values = [options.index(fields[name]) if name in fields else len(options) for name, options in FIELDS.items()]
    ears, second = len(EARS), len(COLOURS)
    if " with " in text:
        tail = text.split(" with ")[1]
        for i, name in enumerate(EARS):
            if EAR_WORDS[name] in tail:
                ears = i
        second = next((i for i, name in enumerate(COLOURS) if tail.startswith(name)), second)
    return [*values, ears, second]


def texts(recipe: Recipe, count: int) -> list[str]:
    """Captions of all combinations. The captions of held-out combinations are included; only their pictures are held
    out."""
    half = count // 2
    training_texts = [caption(random_spec(s, unseen=False), s, 5) for s in range(half)]
    return training_texts + [caption(random_spec(s, unseen=True), s, 5) for s in range(half, count)]


def train(worker: Worker, recipe: Recipe, work: Path) -> None:
    """Text alone: every state from the caption's end on tells all fields, every state guesses the next word."""
    torch.manual_seed(recipe.seed)
    tokens = tokenizer(recipe, work)
    words = texts(recipe, min(40_000, recipe.text_captions))
    ids = torch.from_numpy(
        tokens(
            words, padding="max_length", max_length=recipe.max_tokens, truncation=True, return_tensors="np"
        ).input_ids
    )
    targets = torch.tensor([target_classes(text) for text in words])
    model, reader = build(recipe, len(tokens)), Reader(recipe.text_width, len(tokens))
    model, reader, ids, targets = (
        model.train().to(worker.device),
        reader.to(worker.device),
        ids.to(worker.device),
        targets.to(worker.device),
    )
    run = Run(
        worker,
        {"text": model, "reader": reader},
        work / "text.state",
        recipe.text_captions,
        recipe.text_batch,
        recipe.text_rate,
        recipe.seed,
        decay=0.99,
        save_seconds=recipe.save_seconds,
    )
    while not run.is_finished:
        rng = np.random.default_rng((recipe.seed, run.position, worker.rank, 2))
        picks = torch.from_numpy(rng.integers(0, len(ids), run.batch)).to(worker.device)
        batch, labels = ids[picks], targets[picks]
        with worker.autocast(recipe.bf16):
            states = model(input_ids=batch).last_hidden_state
        states = states.float()
        ends = (batch == tokens.eos_token_id).float().argmax(dim=1)
        tails = ends + torch.from_numpy(rng.integers(0, 1 << 20, run.batch)).to(worker.device) % (
            recipe.max_tokens - ends
        )
        loss, rows = torch.zeros((), device=worker.device), torch.arange(run.batch, device=worker.device)
        accuracies = []
        for at in (ends, tails):
            for i, head in enumerate(reader.fields.values()):
                logits = head(states[rows, at])
                loss = loss + F.cross_entropy(logits, labels[:, i])
                accuracies.append((logits.argmax(1) == labels[:, i]).float().mean())
        next_words = batch[:, 1:].clone()
        next_words[:, 1:][batch[:, 1:-1] == tokens.eos_token_id] = -100  # the padding is not guessed
        guess = reader.word(states[:, :-1])
        loss = loss + 0.5 * F.cross_entropy(guess.flatten(0, 1), next_words.flatten(), ignore_index=-100)
        run.step(loss)
        run.note(loss=float(loss.detach()), accuracy=float(torch.stack(accuracies).mean()))
    run.use_average()
    if worker.first:
        # Positions after the last one that is ever fed: other programs feed all 77, so they must not be noise.
        positions = next(m for name, m in model.named_modules() if name.endswith("position_embedding"))
        positions.weight.data[recipe.max_tokens :] = positions.weight.data[recipe.max_tokens - 1]
        save(model.state_dict(), work / "text.pt")


def load(recipe: Recipe, work: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The text encoder that `train` wrote."""
    tokens = tokenizer(recipe, work)
    model = build(recipe, len(tokens))
    model.load_state_dict(torch.load(work / "text.pt", map_location="cpu", weights_only=True))
    return tokens, model.eval()


@torch.no_grad()
def encode(model: CLIPTextModel, tokens: CLIPTokenizer, words: list[str], batch: int = 256) -> Tensor:
    """(N, max_tokens, width) float32, padded as the pipeline pads."""
    states = []
    for start in range(0, len(words), batch):
        ids = tokens(
            words[start : start + batch],
            padding="max_length",
            max_length=tokens.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states.append(model(input_ids=ids).last_hidden_state)
    return torch.cat(states)
