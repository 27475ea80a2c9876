# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13.0", "numpy>=2.4.6", "matplotlib>=3.11.2"]
# ///
"""The reversal curse, made visible: a model trained on "A -> B" cannot answer "B <- A".

After Zhu, Huang, Zhang, Jordan, Jiao, Tian and Russell, "Towards a Theoretical Understanding of
the 'Reversal Curse' via Training Dynamics", NeurIPS 2024 (arXiv 2405.04669). Gradient descent on
cross-entropy raises the weight from A to B and leaves the weight from B to A where it was: nothing
in the loss asks for it to move.

    python revcurse.py reversal --animate     Figures 1 and 2, in about 25 seconds
    python revcurse.py chain                  Figures 3 and 4, and chain of thought
    python revcurse.py icl                    in-context reversal, where there is no curse
    python revcurse.py ablate                 Figures 5 to 11: what does not help
    python revcurse.py bilinear --symmetric   Section 3: Theorems 1 and 2
    python revcurse.py onelayer               Section 4: Theorems 3 and 4
    python revcurse.py cure                   what does help
    python revcurse.py weights                all weights of four models, in one picture
    python revcurse.py all                    all of this, and whether each claim holds

Ten small GPTs answer all of the sentences that they were trained on, and none of the reversals.

Read beside the paper. For one evening: Data, Model and Training; in Experiments the methods of
Settings, Experiment and Reversal, then heat_maps, matched_rank and verdict; in Theory the two
models and what stands above them; and the classes of Cures. Plotting and
Machinery (files, processes, the command line) come last.

Shapes are written with these letters: S seeds, B sentences of a batch (n for any other number), T
tokens that a model reads, D embedding dimension, H heads, K tokens of an answer, V tokens of the
vocabulary: those of entities (--vocab) and the relations. The paper writes m for V and d for D; N
is the number of trained sentences. NLL, the negative log-likelihood, is in nats. Sentences are
*trained* or *asked*; a fact is *complete* if all of its sentences are trained, and *held-out* if
one is asked. The *chance level* is the NLL of a uniform guess.
"""

import argparse
import base64
import contextlib
import copy
import functools
import glob
import json
import math
import os
import random
import sys
import tempfile
import time
import unicodedata
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # it may name one that is not installed; we need none
import matplotlib  # noqa: E402
from matplotlib.animation import FuncAnimation  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# ------------------------------------------------------------------------------------------- Data
# Token ids of the relations "->", "<-", "<=>" (in-context) and, of the chain task, "~>".
FORWARD, BACKWARD, EQUIVALENT = 0, 1, 2
INDIRECT = 1


@dataclass
class Dataset:
    """The sentences of one seed as token ids, (n, T + 1) for each role.

    A model reads the first T tokens of a sentence and is scored on the answer, which ends it.
    """

    train: dict[str, torch.Tensor]  # role: sentences that are trained
    test: dict[str, torch.Tensor]  # role: sentences that are asked, and never trained
    names: list[str]  # how to print each token id; as many as the vocabulary has
    alphabet_size: int  # how many tokens an answer is drawn from, for the chance level
    answer_length: int = 1  # K: the answer is a sentence's last K tokens
    graded_at: int = -1  # which token the figures show, from the end: mostly the answer's first, -K

    def train_sentences(self):
        return torch.cat(list(self.train.values()))

    def test_sentences(self):
        return torch.cat(list(self.test.values()))

    def to(self, device):
        """The same sentences on another device."""
        trained = {role: sentences.to(device) for role, sentences in self.train.items()}
        asked = {role: sentences.to(device) for role, sentences in self.test.items()}
        return replace(self, train=trained, test=asked)


def reversal_data(vocab=800, entity_length=1, complete=None, held_out=None, facts=(), seed=0):
    """The reversal task (Section 5): a Dataset of sentences "A -> B" and "B <- A".

    Both directions of a complete pair are trained. Of a held-out pair one, chosen by a coin, is
    trained and the other is asked. From the complete pairs a model could learn that "<-" undoes
    "->", and so infer what is asked.

    vocab is the number of entity tokens: a quarter for A, a quarter for B. The rest is unused: the
    chain task needs a third quarter, and both are to have models of the same size. The relations
    add two ids. facts: vocab // 4 pairs of names. Raises ValueError if the tokens cannot spell the
    pairs.
    """
    if facts and (entity_length > 1 or vocab != 4 * len(facts)):
        raise ValueError(f"vocab {vocab}: {len(facts)} facts need {4 * len(facts)}, of one token")
    rng = random.Random(seed)
    letters = vocab // 4
    complete, held_out = split_sizes(vocab, entity_length, complete, held_out)
    As = pick_entities(2, letters, entity_length, complete + held_out, rng)
    Bs = pick_entities(2 + letters, letters, entity_length, complete + held_out, rng)
    forward = join_entities(As, FORWARD, Bs)
    backward = join_entities(Bs, BACKWARD, As)
    coins = torch.tensor([[rng.randrange(2) == 1] for _ in range(held_out)])  # (held_out, 1)
    trained = {
        "complete A -> B": forward[:complete],
        "complete B <- A": backward[:complete],
        "held-out, trained": torch.where(coins, forward[complete:], backward[complete:]),
    }
    asked = {"held-out, asked": torch.where(coins, backward[complete:], forward[complete:])}
    names = token_names(vocab + 2, ["->", "<-"], A=letters, B=letters)
    shuffled = rng.sample(list(facts), len(facts))  # so that each seed holds out other pairs
    for i, (a, b) in enumerate(shuffled):
        names[2 + i] = a
        names[2 + letters + i] = b
    return Dataset(trained, asked, names, letters, entity_length, -entity_length)


def chain_data(vocab=800, entity_length=1, complete=None, held_out=None, seed=0):
    """The chain task (Section 5): a Dataset of "A -> B", "B -> C" and the implied "A ~> C".

    All three of a complete triple are trained, and the two steps of a held-out one. Vocabulary,
    numbers and errors are those of reversal_data.
    """
    rng = random.Random(seed)
    letters = vocab // 4
    complete, held_out = split_sizes(vocab, entity_length, complete, held_out)
    count = complete + held_out
    As = pick_entities(2, letters, entity_length, count, rng)
    Bs = pick_entities(2 + letters, letters, entity_length, count, rng)
    Cs = pick_entities(2 + 2 * letters, letters, entity_length, count, rng)
    trained, asked = chain_sentences(As, Bs, Cs, complete)
    names = token_names(vocab + 2, ["->", "~>"], A=letters, B=letters, C=letters)
    return Dataset(trained, asked, names, letters, entity_length, -entity_length)


def related_data(vocab=800, complete=200, held_out=50):
    """The chain task with entities of two tokens, "a i", "b i", "c i": a letter that all A's (B's,
    C's) share, and an index that the three of a triple share."""
    count = complete + held_out
    if held_out < 1 or 3 + count > vocab:
        raise ValueError(
            f"vocab {vocab}: {complete} complete and {held_out} held-out triples of related "
            f"tokens need {3 + count}"
        )
    As = [(2, 5 + i) for i in range(count)]
    Bs = [(3, 5 + i) for i in range(count)]
    Cs = [(4, 5 + i) for i in range(count)]
    trained, asked = chain_sentences(As, Bs, Cs, complete)
    names = token_names(vocab + 2, ["->", "~>", "a", "b", "c"], i=count)
    # The index is graded, the last token: "c" is the same in all answers.
    return Dataset(trained, asked, names, count, answer_length=2)


def icl_data(vocab=400, complete=7, held_out=3, seed=0):
    """In-context reversal: a Dataset of sentences "A -> B <=> B <- A", whose last A is asked.

    Every A meets the same B's. For each A, `held_out` of them are drawn: these sentences are asked
    and not trained.
    """
    rng = random.Random(seed)
    letters = vocab // 4
    partners = complete + held_out
    if min(letters, complete, held_out) < 1:
        raise ValueError(f"{letters} A's, {complete} + {held_out} B's: must be at least 1 of each")
    if letters + partners > vocab:
        raise ValueError(f"vocab {vocab}: no room for {letters} A's and {partners} B's")
    trained, asked = [], []
    for a in range(3, 3 + letters):
        Bs = rng.sample(range(3 + letters, 3 + letters + partners), partners)
        sentences = [(a, FORWARD, b, EQUIVALENT, b, BACKWARD, a) for b in Bs]
        trained += sentences[:complete]
        asked += sentences[complete:]
    names = token_names(vocab + 3, ["->", "<-", "<=>"], A=letters, B=partners)
    trained, asked = torch.tensor(trained), torch.tensor(asked)
    return Dataset({"complete": trained}, {"held-out": asked}, names, letters)


# What the generators share.


def split_sizes(vocab, length, complete=None, held_out=None):
    """How many facts are complete and how many held-out; None stands for the paper's number."""
    letters = vocab // 4
    spelled = letters**length  # entities that can be spelled
    if length <= 2:
        total = min(spelled, 2 * letters)
        usual_complete = round(0.7 * total)
    else:  # fewer, as in the authors' code, so that the training set can be learned
        total = min(spelled, 2 * letters, 150)
        usual_complete = round(total * 2 / 3)
    if complete is None:
        complete = usual_complete
    if held_out is None:
        held_out = total - usual_complete
    if complete < 0 or held_out < 1 or complete + held_out > spelled:
        raise ValueError(
            f"vocab {vocab}: a quarter of it spells {spelled} entities of {length} tokens, "
            f"too few for {complete} complete and {held_out} held-out facts"
        )
    return complete, held_out


def pick_entities(first, letters, length, count, rng):
    """`count` different entities: tuples of `length` of the `letters` ids from `first` on."""
    if length == 1:  # the start is random, so that it does not matter which ids form a pair
        return [(first + i,) for i in range(count)]
    drawn = {}  # a set that keeps its order
    while len(drawn) < count:
        entity = tuple(first + rng.randrange(letters) for _ in range(length))
        drawn[entity] = True
    return list(drawn)


def join_entities(lefts, relation, rights):
    """The sentences "left relation right" of two lists of entities: (n, T + 1)."""
    rows = [(*left, relation, *right) for left, right in zip(lefts, rights, strict=True)]
    return torch.tensor(rows)


def chain_sentences(As, Bs, Cs, complete):
    """(trained, asked) of the chain task: of held-out triples the implied "A ~> C" is asked."""
    a_to_b = join_entities(As, FORWARD, Bs)
    b_to_c = join_entities(Bs, FORWARD, Cs)
    a_to_c = join_entities(As, INDIRECT, Cs)
    trained = {
        "complete A -> B": a_to_b[:complete],
        "complete B -> C": b_to_c[:complete],
        "complete A ~> C": a_to_c[:complete],
        "held-out A -> B": a_to_b[complete:],
        "held-out B -> C": b_to_c[complete:],
    }
    return trained, {"held-out A ~> C": a_to_c[complete:]}


def token_names(V, names, **alphabets):
    """How to print each of V ids: these names, A0, A1, ... of each alphabet, "#" if never used."""
    for alphabet, letters in alphabets.items():
        names = names + [f"{alphabet}{i}" for i in range(letters)]
    return names + ["#"] * (V - len(names))


# ------------------------------------------------------------------------------------------ Model


class Attention(nn.Module):
    """Self-attention with H heads: softmax(Q K^T / sqrt(D/H)) V, in which no token looks ahead.

    rotary: relative positions by turning queries and keys (Su et al. 2021).
    """

    causal = True  # a cure ("either blank") switches it off

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.rotary = rotary
        self.c_attn = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.c_proj = nn.Linear(dim, dim)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x):
        """x (B, T, D) to (B, T, D)."""
        B, T, D = x.shape
        width = D // self.heads
        qkv = self.c_attn(x).view(B, T, 3, self.heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        # The query of token t asks and the key of token s answers: q_t . k_s / sqrt(D/H) scores
        # how much t listens to s. Among the s up to t, softmax turns the scores into weights.
        scores = q @ k.mT / math.sqrt(width)  # (B, H, T, T)
        if self.causal:
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        # A forward hook on attn_dropout sees these attention weights: the README shows how.
        attention = self.attn_dropout(scores.softmax(-1))
        heard = attention @ v  # (B, H, T, D/H): the sum over s of weight times v_s
        x = heard.transpose(1, 2).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(x))


def rotate(x):
    """Rotary positions: turn pair i of token t, x (..., T, D/H), by t * 10000^(-2i / (D/H))."""
    T, width = x.shape[-2:]
    speed = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.arange(T, device=x.device)[:, None] * speed  # (T, D/2H)
    cos, sin = angle.cos(), angle.sin()
    left, right = x.chunk(2, dim=-1)
    turned = [left * cos - right * sin, left * sin + right * cos]
    return torch.cat(turned, dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): from D to 4D, through GELU, and back to D."""

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, rotary, dropout)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)}
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, last=None):
        """x (B, T, D) to (B, T, D), or to (B, last, D) if only the last tokens are needed."""
        x = x + self.attn(self.ln_1(x))
        if last is not None:
            x = x[:, -last:]
        hidden = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.dropout(self.mlp.c_proj(hidden))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) by hand: token ids (B, T) to logits (B, last, vocab_size).

    position is "none", "absolute" (learned) or "relative" (rotary). T is at most block_size.
    Raises ValueError if dim cannot be divided among the heads. Parameters have the names of the
    published GPT-2 (which stores linear weights transposed), for those who know it or load it.
    """

    def __init__(
        self,
        vocab_size,
        block_size,
        layers,
        heads,
        dim,
        position="absolute",
        dropout=0.0,
        tie_embeddings=False,
    ):
        super().__init__()
        rotary = position == "relative"
        unit = 2 * heads if rotary else heads  # rotary positions turn pairs of entries
        if dim % unit:
            raise ValueError(f"dim {dim}: must be a multiple of {unit} for {position} positions")
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, dim),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(Block(dim, heads, rotary, dropout) for _ in range(layers)),
                "ln_f": nn.LayerNorm(dim),
            }
        )
        if position == "absolute":
            self.transformer["wpe"] = nn.Embedding(block_size, dim)
        # The output matrix is a weight of its own, as in the authors' code and unlike GPT-2: if it
        # were the input embedding, to learn to say a name would be to move the vector that is read.
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        # GPT-2's start: weights of deviation 0.02, and smaller for the two layers of a block whose
        # output is added to x, so that x does not grow with depth.
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))
            elif "ln_" not in name:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens, last=None):
        """Logits after each of the last `last` tokens, or after all if None."""
        T = tokens.shape[1]
        x = self.transformer.wte(tokens)  # (B, T, D)
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe.weight[:T]
        x = self.transformer.drop(x)
        for block in self.transformer.h[:-1]:
            x = block(x)
        # After the attention of the final block no token hears of another any more. We go on with
        # those alone whose logits are wanted, which saves a tenth of the training time.
        x = self.transformer.h[-1](x, last)  # (B, last, D)
        return self.lm_head(self.transformer.ln_f(x))


# --------------------------------------------------------------------------------------- Training
NLL_CEILING = -math.log(1e-50)  # the authors clip p at 1e-50, so their curves saturate at 115


def cross_entropy(logits, targets):
    """Mean -log p of the targets (B, T), given logits (B, T, V)."""
    log_p = logits.log_softmax(-1)  # F.cross_entropy does the same, but is slow under vmap
    return -log_p.gather(-1, targets[..., None]).mean()


def nll(model, sentences, last=1):
    """Mean -log p of the last tokens of sentences (B, T + 1), each given those before it."""
    logits = model(sentences[:, :-1], last)  # (B, last, V)
    return cross_entropy(logits, sentences[:, -last:])


class Evaluation(NamedTuple):
    """What a model makes of each token of each answer: two tensors (n, K)."""

    nll: torch.Tensor  # -log p of the right token
    correct: torch.Tensor  # whether it has the highest logit


@torch.no_grad()
def evaluate(model, sentences, K):
    """The Evaluation of the last K tokens of sentences (n, T + 1), each given those before it.

    If all K are correct, a model that continues on its own, K times with its likeliest token, gives
    the answer too.
    """
    losses, correct = [], []
    for part in sentences.split(1000):  # so that memory stays small
        logits = model(part[:, :-1], K)  # (B, K, V)
        targets = part[:, -K:]  # (B, K)
        right = logits.gather(-1, targets[..., None]).squeeze(-1)
        losses.append((logits.logsumexp(-1) - right).clamp(max=NLL_CEILING))
        correct.append(logits.argmax(-1) == targets)
    return Evaluation(torch.cat(losses), torch.cat(correct))


class Ensemble:
    """S models of one kind that train side by side, in the time of a few.

    The weights of all models lie in stacked tensors (S, ...), and each model's own parameters are
    views of them: models[s] always holds the current weights of model s.
    """

    def __init__(self, models):
        self.models = models
        if len(models) == 1:  # nothing to stack; a large model is then twice as fast on a CPU
            self.weights = dict(models[0].named_parameters())
            return
        self.weights, _ = stack_module_state(models)  # {name: (S, ...)}
        for name, stacked in self.weights.items():
            for model, row in zip(models, stacked.detach(), strict=True):
                model.get_parameter(name).data = row  # no copy: the memory of the stack

    def losses(self, loss, sentences):
        """loss(model, sentences) of each model, for sentences (S, B, T + 1): (S,)."""
        if len(self.models) == 1:
            return loss(self.models[0], sentences[0])[None]

        def loss_of_one(weights, sentences):
            def call(tokens, last=None):  # the code of models[0], with these weights
                return functional_call(self.models[0], weights, (tokens, last))

            return loss(call, sentences)

        # vmap runs a function written for one model on all S rows at once. Each has dropout of its
        # own.
        return vmap(loss_of_one, randomness="different")(self.weights, sentences)


def train_epoch(experiment, ensemble, optimizer, sentences, generators):
    """Each model passes once over its own sentences (S, n, T + 1), in an order of its own."""
    ensemble.models[0].train()  # the one whose code all of them run
    n = sentences.shape[1]
    orders = torch.stack([torch.randperm(n, generator=each) for each in generators])  # (S, n)
    for rows in orders.to(sentences.device).split(experiment.batch_size, dim=1):  # (S, B)
        batch = sentences.take_along_dim(
            rows[..., None], dim=1
        )  # of each s its rows: (S, B, T + 1)
        losses = ensemble.losses(experiment.batch_loss, batch)  # (S,)
        optimizer.zero_grad()
        # One sum trains every model by itself: the loss of a model has no gradient for the weights
        # of another, and AdamW and SGD treat each number by itself.
        losses.sum().backward()
        optimizer.step()


def train(experiment, models, datasets, seeds, keeper=None):
    """Train models[s] on datasets[s], all at once. With one model it would be the usual loop:

        for epoch in range(epochs):
            for rows in torch.randperm(len(sentences)).split(batch_size):
                loss = nll(model, sentences[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    Returns {epoch: what experiment.evaluate gives for each model} and, for the animation, {epoch:
    heat maps of the first}. Raises FloatingPointError if a loss becomes NaN. keeper: see Machinery.
    """
    # Batches are drawn from these alone: what is asked, datasets[s].test, is never trained.
    sentences = torch.stack([data.train_sentences() for data in datasets])  # (S, n, T + 1)
    ensemble = Ensemble(models)
    weights = [weight for weight in ensemble.weights.values() if weight.requires_grad]
    optimizer = experiment.make_optimizer(weights)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    history, frames = {}, {}

    def record(epoch):
        pairs = zip(models, datasets, strict=True)
        history[epoch] = [experiment.evaluate(model, data) for model, data in pairs]
        if experiment.animate:
            frames[epoch] = heat_maps(models[0], datasets[0], SHOWN)
        if any(parts["trained"].nll.isnan().any() for parts in history[epoch]):
            raise FloatingPointError(f"loss NaN at epoch {epoch}: try a smaller --lr")

    record(0)
    done = 0  # epochs
    if keeper is not None:
        done, history, frames = keeper.begin(ensemble, optimizer, generators, history, frames)
    for epoch in range(done + 1, experiment.epochs + 1):
        train_epoch(experiment, ensemble, optimizer, sentences, generators)
        if epoch in experiment.eval_epochs():
            record(epoch)
        if keeper is not None:
            keeper.after_epoch(epoch, history, frames)
    return history, frames


# ------------------------------------------------------------------------------------ Experiments
# An experiment is a class: its fields are the flags of its command, its methods make the data, the
# model, the optimizer and the loss. A subclass changes any of them, in the file or in a notebook.
# (A new or changed field is written `lr: float = setting(0.01, "...")`, with @dataclass above.)
#     results = run(Reversal(seeds=2))
# makes the data and a model for each seed (make_data, make_model), calls train, and measures each
# trained model (measure); draw(results) shows it. How `run` keeps the books is in Machinery. A
# Sweep is several experiments that are run one after the other.


class Problem(Exception):
    """Bad input, found before any work: one line for the user, and exit status 2."""


def setting(default, help, paper=None, choices=None):
    """A field of an experiment: its default, what it means, and its value in the paper."""
    return field(default=default, metadata={"help": help, "paper": paper, "choices": choices})


# Results files say "train" and "validation" for what is called trained and asked here.
JSON_KEYS = {"trained": "train", "asked": "validation", "held-out, trained": "seen"}
SHOWN = 40  # facts in a heat map; with more, the diagonal is too thin to see


@dataclass
class Settings:
    """The base of all experiments. Most derive from Experiment, below, and those of Sections 3 and
    4 directly from this.

    A subclass has the fields epochs, batch_size and lr. It defines make_data(seed), which returns a
    Dataset (of the same size for each seed), and make_model(data), which returns a model that is
    not trained yet and is called as model(tokens (B, T), last) for logits (B, last, V).
    """

    seeds: int = setting(
        10, "how many seeds; each has its own weights, order and, where drawn, data"
    )
    seed: int = setting(0, "the first seed, from which the others count up")
    seeds_at_once: int | None = setting(None, "how many train side by side, to save memory [all]")
    device: str = setting("auto", "auto: cuda if any, else cpu", choices=("auto", "cpu", "cuda"))
    out: str = setting("figures", "folder of the results")
    quiet: bool = setting(False, "print no progress")

    answer_length = 1  # K, the tokens of an answer

    def make_optimizer(self, weights):
        """One optimizer for the weights of all models: it must treat each number by itself."""
        # AdamW and SGD do, weight decay included. Those that look at a whole tensor, as Adafactor
        # and LAMB do, would mix the models, and need --seeds-at-once 1. (LBFGS calls the loss
        # itself, which train_epoch does not offer.) Here it is gradient descent. The loss is a mean
        # over the batch, so that --lr times its size makes --lr the step of each sentence.
        return torch.optim.SGD(weights, self.lr * self.batch_size)

    def batch_loss(self, model, sentences):
        """The loss of one model on a batch (B, T + 1). The model can be called, and nothing else:
        while many train at once, it is a function without attributes."""
        return nll(model, sentences, self.answer_length)

    def evaluate(self, model, data):
        """What is measured at several epochs: {part: Evaluation}."""
        model.eval()
        n = len(data.train_sentences())
        sentences = torch.cat([data.train_sentences(), data.test_sentences()])
        nlls, correct = evaluate(model, sentences, data.answer_length)
        return {
            "trained": Evaluation(nlls[:n], correct[:n]),
            "asked": Evaluation(nlls[n:], correct[n:]),
        }

    def input_vectors(self, model):
        """The vectors (V, D) of the tokens that the model reads, if they are trained."""
        return None

    def measure(self, model, data, start, history):
        """What a trained model knows: {name: number, or curve over the epochs}.

        start: its input vectors before the training. history: {epoch: {part: Evaluation}}.
        """
        numbers = {}
        for part, last in history[max(history)].items():
            key = JSON_KEYS.get(part, part)
            losses = [parts[part].nll for parts in history.values()]  # each (n, K)
            numbers[f"{key}_nll"] = [loss[:, data.graded_at].mean().item() for loss in losses]
            numbers[f"{key}_accuracy"] = last.correct.all(1).float().mean().item()
            if data.answer_length > 1:
                numbers[f"{key}_word_nll"] = last.nll.sum(1).mean().item()
        numbers["matched_rank"], numbers["others_nll"] = matched_rank(model, data)
        if start is not None:
            cosines = F.cosine_similarity(start, self.input_vectors(model))
            questioned = data.test_sentences()[:, 0]
            numbers["asked_cosine"] = cosines[questioned].min().item()
        return numbers

    def matrices(self, model, data):
        """What the pictures show of the first seed's model: {name: matrix}."""
        return heat_maps(model, data)

    def conclude(self, results):
        """Add to the results of all seeds what follows from them."""
        results["outcome"], results["verdict"] = verdict(results)

    def draw(self, results):
        """The Figures of the results."""
        return draw_task(results)

    # Bookkeeping, to be skipped at first: names, presets, checks, when to measure. A subclass may
    # compute one of these values as a property.

    command = ""  # its name on the command line, and that of its files
    asked = "asked sentences"  # what the verdict calls them
    expected = "curse"  # the outcome that must be seen; None if that is open
    variant = "common"  # of a cure: at which rates, or without complete pairs
    measurements = 40
    animate = False

    @property
    def stem(self):
        """The name of the result files."""
        return self.command

    @classmethod
    def paper(cls, **changes):
        """The experiment at the paper's size, but for the changes: `--preset paper`."""
        values = {f.name: f.metadata.get("paper") for f in fields(cls)}
        values = {name: value for name, value in values.items() if value is not None}
        return cls(**(values | changes))

    @classmethod
    def of_preset(cls, preset="laptop", **changes):
        """The experiment with the defaults of a preset, "laptop" or "paper"."""
        return cls.paper(**changes) if preset == "paper" else cls(**changes)

    def check(self):
        """Raises Problem for a setting that makes no sense."""
        check_fields(self)

    def eval_epochs(self):
        """The epochs after which to measure, ever further apart."""
        share = np.linspace(0, 1, self.measurements) ** 2
        return np.unique(np.rint(self.epochs * share).astype(int)).tolist()


@dataclass
class Experiment(Settings):
    """What the experiments with a GPT have in common (Section 5; the paper's Tables 3 and 4)."""

    vocab: int = setting(
        800, "entity tokens, a quarter for each alphabet; in the paper also 20 to 2000"
    )
    complete: int | None = setting(
        None, "facts trained in full [70 %%, or 2/3; related tokens: 200]"
    )
    held_out: int | None = setting(
        None, "facts with a sentence that is asked [the rest; related: 50]"
    )
    layers: int = setting(2, "transformer blocks; in the paper also 1", paper=24)
    heads: int = setting(4, "attention heads", paper=12)
    dim: int = setting(64, "embedding dimension; in the paper also 20", paper=768)
    position: str = setting(
        "absolute", "relative: rotary", choices=("none", "absolute", "relative")
    )
    dropout: float = setting(0.0, "share of the activations zeroed in training", paper=0.1)
    freeze_embeddings: bool = setting(False, "do not train the embeddings; also in the paper")
    tie_embeddings: bool = setting(False, "the output matrix is the token embedding (ours)")
    epochs: int | None = setting(
        None, "passes over the sentences [at least 80 (chain: 140) and 480 steps]", paper=3000
    )
    batch_size: int = setting(64, "sentences in each step")
    lr: float = setting(0.003, "learning rate of AdamW", paper=0.01)
    betas: tuple = setting((0.9, 0.999), "decay rates of the moments of AdamW")
    weight_decay: float = setting(0.01, "weight decay of AdamW, as in the authors' runs")
    loss: str = setting(
        "entity",
        "on the last entity, or on all but the first token",
        choices=("entity", "sequence"),
    )
    cosine: bool = setting(False, "also draw the cosines of the token embeddings")

    def make_model(self, data):
        model = GPT(
            vocab_size=len(data.names),
            block_size=data.train_sentences().shape[1] - 1,
            layers=self.layers,
            heads=self.heads,
            dim=self.dim,
            position=self.position,
            dropout=self.dropout,
            tie_embeddings=self.tie_embeddings,
        )
        for part in model.modules():
            if isinstance(part, nn.Embedding):  # of tokens, and of positions if there are any
                part.requires_grad_(not self.freeze_embeddings)
        return model

    def make_optimizer(self, weights):
        # Weight decay applies to all weights, as in the authors' code; often the biases and layer
        # norms are left out.
        return torch.optim.AdamW(
            weights, self.lr, self.betas, weight_decay=self.weight_decay, fused=True
        )

    def batch_loss(self, model, sentences):
        # The paper takes the loss on the last entity alone: no token before it is a target.
        last = self.answer_length if self.loss == "entity" else sentences.shape[1] - 1
        return nll(model, sentences, last)

    def input_vectors(self, model):
        if isinstance(model, GPT) and not self.freeze_embeddings:
            return model.transformer.wte.weight
        return None

    def matrices(self, model, data):
        maps = heat_maps(model, data)
        if self.cosine and isinstance(model, GPT):  # Figure 11
            vectors = F.normalize(model.transformer.wte.weight, dim=-1)
            maps["cosine"] = vectors @ vectors.mT
        return maps

    # Bookkeeping

    least_epochs = 80

    @property
    def expected(self):
        return "trace" if self.tie_embeddings else "curse"

    def check(self):
        super().check()
        if self.dropout >= 1:
            raise Problem(f"--dropout {self.dropout}: must be less than 1, or nothing is left")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise Problem(f"--betas {self.betas}: must be two numbers, at least 0 and below 1")
        if self.freeze_embeddings and self.tie_embeddings:
            raise Problem("--freeze-embeddings: would freeze a tied output matrix too")


@dataclass
class Reversal(Experiment):
    """Figures 1 and 2: train "A -> B", ask "B <-"."""

    entity_length: int = setting(1, "tokens of an entity; in the paper also 2 and 3")
    animate: bool = setting(False, "also draw the heat maps over the training, as a GIF")
    facts: tuple = setting((), "your own pairs: a file of lines A<TAB>B; sets --vocab")

    command = "reversal"
    asked = "reversals"

    def __post_init__(self):
        if self.facts:
            self.facts = read_facts(self.facts)  # only once, for it may be a pipe
            if self.vocab not in (type(self).vocab, 4 * len(self.facts)):
                raise Problem(f"--vocab {self.vocab}: is set by --facts, leave it out")
            self.vocab = 4 * len(self.facts)

    @property
    def answer_length(self):
        return self.entity_length

    def make_data(self, seed):
        return reversal_data(
            self.vocab, self.entity_length, self.complete, self.held_out, self.facts, seed
        )


@dataclass
class Chain(Reversal):
    """Figures 3 and 4: train "A -> B" and "B -> C", ask "A ~>"."""

    related_tokens: bool = setting(False, "entities a i, b i, c i that share tokens")

    command = "chain"
    asked = '"A ~> C"'
    least_epochs = 140

    def make_data(self, seed):
        if not self.related_tokens:
            return chain_data(self.vocab, self.entity_length, self.complete, self.held_out, seed)
        complete = 200 if self.complete is None else self.complete
        held_out = 50 if self.held_out is None else self.held_out
        return related_data(self.vocab, complete, held_out)  # the same for all seeds

    def measure(self, model, data, start, history):
        numbers = super().measure(model, data, start, history)
        numbers["direct_accuracy"] = numbers["validation_accuracy"]
        numbers["two_step_accuracy"] = chain_of_thought(model, data)
        return numbers

    @property
    def answer_length(self):
        return 2 if self.related_tokens else self.entity_length

    @property
    def expected(self):
        return "no curse" if self.related_tokens else super().expected

    @property
    def stem(self):
        return "chain-related-tokens" if self.related_tokens else "chain"

    def check(self):
        super().check()
        if self.facts:
            raise Problem("--facts: are pairs, and the chain task needs triples")
        if self.related_tokens and self.entity_length > 1:
            raise Problem("--related-tokens: needs entity_length 1")


@dataclass
class ICL(Experiment):
    """In-context reversal, where the curse does not appear."""

    vocab: int = setting(400, "entity tokens, a quarter of them for A")
    complete: int = setting(7, "B's that each A is trained with")
    held_out: int = setting(3, "B's that each A is asked with")
    epochs: int = setting(40, "passes over the training sentences", paper=3000)

    command = "icl"
    asked = "new pairs"
    expected = "no curse"

    def make_data(self, seed):
        return icl_data(self.vocab, self.complete, self.held_out, seed)

    def matrices(self, model, data):
        return {}  # no weight is asked about


@torch.no_grad()
def heat_maps(model, data, most=None):
    """Figures 2 and 4: {role: (n, n)}, the logit of answer j after entity i alone, without a
    relation: what the paper calls the weight from i to j.

    In training the answer comes after entity and relation, never after the entity alone. So a
    bright diagonal shows that the entity itself leads to its answer, whatever the relation adds.
    """
    K = data.answer_length
    maps = {}
    for role, sentences in (data.train | data.test).items():
        rows = sentences[:most]
        entities = rows[:, :K]
        answers = rows[:, data.graded_at]
        logits = [model(part, 1)[:, 0, answers] for part in entities.split(200)]
        maps[role] = torch.cat(logits)
    return maps


@torch.no_grad()
def entity_map(model, data):
    """{"entities": the logits between all A's and B's, each read alone; "trained": 1 where the pair
    is trained, else 0}, both (2n, 2n) for n A's and n B's. Rows are read, columns said."""
    sentences = data.train_sentences()
    entities = torch.arange(2, 2 + 2 * data.alphabet_size, device=sentences.device)
    trained = torch.zeros(len(data.names), len(data.names), device=sentences.device)
    read, said = sentences[:, 0], sentences[:, -1]
    trained[read, said] = 1.0
    logits = model(entities[:, None], 1)[:, 0]  # (2n, V)
    return {"entities": logits[:, entities], "trained": trained[entities][:, entities]}


@torch.no_grad()
def matched_rank(model, data):
    """(matched rank, NLL of the other candidates): is there a trace of the right answer?

    Accuracy 0 does not say that nothing was learned. A fair measure compares the right answer with
    its equals, the answers of all asked sentences with the same relation: its place among them,
    from 0 (first) to 1, is 0.5 on average if there is no trace. None if nothing can be compared.

    In the reversal task, without a cure, no candidate was ever a target of that relation, so that
    all were pushed down alike. (Entities of several tokens are compared by the graded token, which
    they share with others, some of them targets.)
    """
    # Why does the NLL of the asked answers end above the chance level? Each step of softmax
    # cross-entropy pushes down the logits of all names but the target, so that a name which never
    # is a target sinks. And logits grow in training, the more so at a high learning rate, so that
    # to a question that it never met a model says some other name with confidence (whether or not
    # it has read the entity: see "read elsewhere" in Cures). Both hit the right answer and the
    # other candidates alike: their NLL is the level to compare with.
    asked = data.test_sentences()
    at = data.graded_at
    relations = asked[:, -data.answer_length - 1]
    ranks, losses = [], []
    for relation in relations.unique():
        rows = asked[relations == relation]  # (n, T + 1)
        answers = rows[:, at]
        candidates = answers.unique()
        if len(candidates) == 1:  # nothing to compare with
            continue
        logits = model(rows[:, :at], 1)[:, 0]  # (n, V)
        log_p = logits.log_softmax(-1)[:, candidates]
        is_right = candidates == answers[:, None]  # (n, candidates), one True in each row
        right = log_p[is_right].view(len(rows), 1)
        others = log_p[~is_right].view(len(rows), -1)  # (n, candidates - 1)
        ahead = (others > right).float() + 0.5 * (others == right)  # ties count half
        ranks.append(ahead.mean(1))
        losses.append(-others.mean(1))
    if not ranks:
        return None, None
    rank, loss = torch.cat(ranks).mean(), torch.cat(losses).mean()
    return rank.item(), loss.item()


@torch.no_grad()
def chain_of_thought(model, data):
    """Accuracy on "A ~> C" in two steps: "A ->", then "B ->" with the model's own answer B."""
    K = data.answer_length
    asked = data.test_sentences()  # (n, T + 1)
    arrow = torch.full_like(asked[:, :1], FORWARD)
    tokens = torch.hstack([asked[:, :K], arrow])  # A ->
    for _ in range(K):  # B, token by token
        tokens = torch.hstack([tokens, model(tokens, 1).argmax(-1)])
    second_step = torch.hstack([tokens[:, -K:], arrow, asked[:, -K:]])  # B -> C
    correct = evaluate(model, second_step, K).correct  # (n, K)
    return correct.all(1).float().mean().item()


OUTCOMES = {
    "not learned": "Not learned yet",
    "no curse": "No curse",
    "some": "Some curse",
    "trace": "The curse, but a trace",
    "curse": "The curse, and no clear trace",
}


def has_trace(results):
    """Whether the mean matched rank is clearly below chance, 0.5: by 0.1 and 3 standard errors."""
    rank = results["summary"]["matched_rank"]
    if rank["mean"] is None:
        return False
    asked = results["counts"]["validation"] * len(rank["per_seed"])
    standard_error = math.sqrt(1 / 12) / math.sqrt(asked)  # of ranks drawn uniformly from 0 to 1
    return rank["mean"] < 0.5 - max(0.1, 3 * standard_error)


def verdict(results):
    """(outcome, one of OUTCOMES; the outcome and the numbers that it rests on, in words)."""
    mean = {name: number["mean"] for name, number in results["summary"].items()}
    trained, asked = mean["train_accuracy"], mean["validation_accuracy"]
    rank = mean["matched_rank"]
    chance = results["chance"]["alphabet"]
    if trained < 0.99:
        outcome = "not learned"
    elif asked > 0.9:
        outcome = "no curse"
    elif asked >= 0.1:
        outcome = "some"
    elif mean["validation_nll"] < chance or has_trace(results):
        outcome = "trace"
    else:
        outcome = "curse"
    text = (
        f"{OUTCOMES[outcome]}: {trained:.1%} of the trained sentences are answered right (NLL "
        f"{mean['train_nll']:.3f}), and {asked:.1%} of the {results['unseen']} (NLL "
        f"{mean['validation_nll']:.2f}; the chance level within the alphabet is {chance:.2f})."
    )
    if rank is not None:
        text += (
            f" Among the asked answers of its relation the right one has rank {rank:.3f} (0 is "
            f"first, 0.5 is chance); the others have NLL {mean['others_nll']:.2f}."
        )
    if "two_step_accuracy" in mean:
        text += f' In two steps, "A ->" and then "B ->", {mean["two_step_accuracy"]:.1%} are right.'
    if mean.get("asked_cosine", 0) > 0.9999:
        text += (
            " The entities asked about were never an input: their input vectors still point where "
            f"they did at the start (cosine {mean['asked_cosine']:.7f})."
        )
    return outcome, text


def examples(model, data):
    """Print asked facts in words: a question, the model's answer and the right one."""
    at = data.graded_at
    for row in data.test_sentences()[:3].cpu():
        p = model(row[None, :at], 1)[0, 0].softmax(0)
        question = " ".join(data.names[i] for i in row[:at])
        guess, right = p.argmax(), row[at]
        say(
            f"  {question} ?  {data.names[guess]} (p = {p[guess]:.2g}); "
            f"right is {data.names[right]} (p = {p[right]:.2g})"
        )


def values_of(name, *values, **others):
    """{value: the settings that it stands for} of an axis that varies one setting."""
    return {str(value): {name: value} | others for value in values}


# What `ablate` tries on each axis, {axis: {value: the settings that it changes}}: Figures 5 to 11
# and more.
AXES = {
    "vocab": values_of("vocab", 20, 50, 200, 2000),
    "entity-length": values_of("entity_length", 2, 3),
    "layers": values_of("layers", 1, 2, 4, 8),
    "heads": values_of("heads", 1, 2, 4, 8),
    "position": values_of("position", "none", "absolute", "relative"),
    "embeddings": {
        "learned": {"freeze_embeddings": False, "tie_embeddings": False},
        "frozen": {"freeze_embeddings": True, "tie_embeddings": False},
        "tied": {"freeze_embeddings": False, "tie_embeddings": True},
    },
    "size": {
        "1x20": {"layers": 1, "dim": 20, "heads": 4, "cosine": True},
        "1x256": {"layers": 1, "dim": 256, "heads": 4, "cosine": True},
        "12x20": {"layers": 12, "dim": 20, "heads": 4, "cosine": True},
    },
    "related-tokens": values_of("complete", 10, 20, 50, 100, 200, 500, related_tokens=True),
}
# On a laptop these trainings are smaller. Two axes need other sizes, to be learned or to fit.
# `ablate` itself is in Machinery.
ABLATE_LAPTOP = {"seeds": 3, "vocab": 400}
ABLATE_LAPTOP_OF = {
    "entity-length": {"vocab": 200, "epochs": 300},
    "related-tokens": {"vocab": 800},
}


@dataclass
class Sweep:
    """Several experiments that are trained, saved and drawn together."""

    command: str
    stem: str  # the name of the result files
    trials: dict  # {label: experiment}
    keep: set = frozenset()  # names of the matrices that its pictures need


# ----------------------------------------------------------------------------------------- Theory
# Section 3: the bilinear model. Assumptions: embeddings are random, fixed and nearly orthogonal;
# gradient flow on the mean loss L of the pairs x -> y, from Theta = 0. L_rev is that of y -> x.
#
# Theorem 1. For any epsilon, with high probability and for d large enough, at all times t
#     L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon.
# If epsilon is small, the right side stays near 1 until L has fallen by orders of magnitude, and
# L_rev / L_rev(0) must stay above it. Measured, below: the least epsilon for which this holds.
# Theorem 2 (in the form used here). For any c > 0, with high probability and for d large enough:
# when L has fallen to c, L_rev is still at least log(m/2), that of a guess among half of the m
# tokens (our V).
#
# Why. For x -> y a step of gradient descent, of size h, adds h x (y - sum_j p_j v_j)^T to Theta.
#     Forward:  x^T Theta y moves by h |x|^2 (|y|^2 - sum_j p_j v_j.y), about h (1 - p_y).
#     Reverse:  y^T Theta x moves by h (y.x) (y.x - sum_j p_j v_j.x). Two different random vectors
#               have a product of about 1/sqrt(d), so that this is a product of two small numbers,
#               about h/d. (The sum contains |x|^2 = 1 with p_x, about 1/m: this adds h/(m sqrt(d)),
#               which is less as long as d < m^2. The steps of other pairs add about +-h/d each.)
# This is about gradient descent. Adam rescales the gradient of each number by itself, so that the
# other logits move more, and how much depends on the coordinates (the README's fifth exercise).
# The reversal is not learned with it either.


class Bilinear(nn.Module):
    """The bilinear model (Section 3): token ids (..., T) to logits (..., 1, V) of y. It reads the
    first token, x, and not the relation.

        l(y|x) = x^T Theta y,   p(y|x) = exp l(y|x) / sum_j exp l(v_j|x)

    x, y, v_j are drawn from N(0, I / dim) and not trained. Theta is trained from 0; if symmetric,
    (Theta + Theta^T) / 2 stands in its place.
    """

    def __init__(self, dim, vocab_size, symmetric=False):
        super().__init__()
        self.symmetric = symmetric
        embeddings = torch.randn(vocab_size, dim, dtype=torch.float64) / math.sqrt(dim)
        if dim > vocab_size:
            # Gradient descent depends on the inner products of the embeddings alone. With E^T =
            # Q R, the rows of R^T have the same inner products as those of E, in V coordinates.
            embeddings = torch.linalg.qr(embeddings.mT).R.mT
        width = embeddings.shape[1]  # D
        self.embeddings = nn.Parameter(embeddings, requires_grad=False)  # (V, D)
        self.Theta = nn.Parameter(torch.zeros(width, width, dtype=torch.float64))

    def forward(self, tokens, last=1):
        theta = (self.Theta + self.Theta.mT) / 2 if self.symmetric else self.Theta
        x = self.embeddings[tokens[..., 0]][..., None, :]  # (..., 1, D)
        return x @ theta @ self.embeddings.mT  # x^T Theta v for all v: (..., 1, V)


@dataclass
class BilinearTheory(Settings):
    """Section 3: the bilinear model, trained on one direction of each pair."""

    vocab: int = setting(100, "entity tokens, half of them in pairs x, y")
    complete: int = setting(0, "pairs of which both directions are trained")
    dim: int = setting(1024, "embedding dimension")
    symmetric: bool = setting(False, "tie Theta to its transpose (the command does both)")
    epochs: int = setting(1300, "passes over the pairs")
    lr: float = setting(0.4, "the step of each pair")

    command = "bilinear"
    batch_size = 10**6  # all at once: it is cut to the number of sentences

    def make_data(self, seed):
        held_out = self.vocab // 4 - self.complete
        return reversal_data(self.vocab, 1, self.complete, held_out, seed=seed)

    def make_model(self, data):
        return Bilinear(self.dim, len(data.names), self.symmetric)

    def measure(self, model, data, start, history):
        numbers = super().measure(model, data, start, history)
        # In all our runs with free Theta, Theorem 1 is hardest to meet at the start, Theta = 0,
        # where L = L_rev = log V. There the least epsilon is the slope dL_rev / dL along the flow:
        # over seeds its mean is 1/d, its deviation about sqrt(2)/d.
        at_zero = copy.deepcopy(model)
        nn.init.zeros_(at_zero.Theta)
        forward = torch.autograd.grad(nll(at_zero, data.train_sentences()), at_zero.Theta)[0]
        reverse = torch.autograd.grad(nll(at_zero, data.test_sentences()), at_zero.Theta)[0]
        slope = (forward * reverse).sum() / forward.square().sum()
        numbers["slope"] = slope.item()
        # Why does L_rev not fall? It is normaliser - own logit; the normaliser is the log-sum-exp
        # of all logits after y. After training Theta is close to u sum_k x_k y_k^T, where u is the
        # logit that each trained pair has. Then, after y,
        #     x, the right answer, has the logit u (y.x)^2, about u/d: L_rev falls by it;
        #     y_k has the logit u (y.x_k), about +-u/sqrt(d). The mean of these is 0, but the
        #         log-sum-exp grows with half their variance, so that L_rev rises by N/V u^2/(2d).
        # If d is well above V and u^2, fall and rise both go as 1/d, and the rise is the larger if
        # u > 2V/N, here 8; at L = 0.01, u is 9. For smaller d it grows faster than 1/d.
        # A trace is left at any d. The other x_k have logits of about +-sqrt(N) u/d, and the right
        # one is ahead of their mean by u/d, a fifth of that. The matched rank shows it, 0.41 to
        # 0.46, too near to 0.5 for the verdict's "trace"; L_rev alone does not.
        asked = data.test_sentences()
        logits = model(asked[:, :-1])[:, 0].detach()  # (n, V)
        own = logits.gather(1, asked[:, -1:]).mean().item()
        normaliser = logits.logsumexp(1).mean().item()
        numbers["own_logit_shift"] = -own
        numbers["normaliser_shift"] = normaliser - math.log(len(data.names))
        return numbers

    def matrices(self, model, data):
        return entity_map(model, data)

    def draw(self, results):
        return draw_bilinear([results], {})

    def conclude(self, results):
        super().conclude(results)
        form = closed_form_symmetric if self.symmetric else closed_form
        L, L_rev = hold_against_theory(results, self.lr, form)
        results["slope"] = results["summary"]["slope"]["per_seed"]
        results["epsilon"] = max(results["epsilon"], *results["slope"])  # at the very start
        results["theorem_2"] = {}
        for c in (0.1, 0.01):
            seeds = zip(L, L_rev, strict=True)
            reached = [first_below(forward, c, reverse) for forward, reverse in seeds]
            results["theorem_2"][str(c)] = reached
        results["verdict"] += in_words(results)

    # Bookkeeping

    @property
    def expected(self):
        if self.dim < 64:  # too few dimensions for the theorems
            return None
        return "no curse" if self.symmetric else "curse"

    def check(self):
        super().check()
        if self.symmetric and self.complete:
            raise Problem("--complete: must be 0 with --symmetric, for the closed form")


# Section 4: the one-layer transformer. Assumptions: one-hot tokens, Y and Z zero at the start, one
# sentence a step, a large vocabulary.
#
# Theorem 3. Trained sentences reach a probability near 1, their reversals stay at 1/V or below.
# Theorem 4. Of a chain p(B|A) and p(C|B) go to 1, and p(C|A ~>) stays at 1/V or below.
#
# Why. For "A ->" the context is A alone, so that b = 1 and f = A, and the logits are row A of Y. Z
# has no gradient. Training on "A -> B" never touches row B: the curse, in one line. (The relation
# plays no part here: "A ->" and "A ~>" read the same row, which training on "A -> B" fills with B.)


class OneLayer(nn.Module):
    """The one-layer transformer (Section 4, after Tian et al. 2023): token ids (..., T) to logits
    (..., 1, V) of the next token. The last token, x_T, is the query; the others are the context.

        b = softmax over the context of Z[x_T, x_t],   f = X^T b / |X^T b|,   logits = Y^T f

    X has the one-hot vectors of the context. Y and Z (V, V), 0 at the start, stand for products of
    the usual weights and embeddings.
    """

    def __init__(self, vocab_size):
        super().__init__()
        self.Y = nn.Parameter(torch.zeros(vocab_size, vocab_size, dtype=torch.float64))
        self.Z = nn.Parameter(torch.zeros(vocab_size, vocab_size, dtype=torch.float64))

    def forward(self, tokens, last=1):
        context, query = tokens[..., :-1], tokens[..., -1:]
        b = self.Z[query, context].softmax(-1)  # row x_T at each x_t: (..., T - 1)
        X = F.one_hot(context, len(self.Y)).to(b.dtype)  # (..., T - 1, V)
        f = F.normalize(b[..., None, :] @ X, dim=-1)  # X^T b as a row: (..., 1, V)
        return f @ self.Y


@dataclass
class OneLayerTheory(Settings):
    """Section 4: the one-layer transformer on the reversal task (Theorem 3)."""

    vocab: int = setting(100, "entity tokens, a quarter for each alphabet")
    complete: int = setting(3, "pairs trained in both directions")
    held_out: int = setting(3, "pairs of which one direction is asked")
    epochs: int = setting(400, "passes over the training sentences")
    batch_size: int = setting(1, "sentences a step")
    lr: float = setting(0.25, "the step of each sentence")

    command = "onelayer"

    def make_data(self, seed):
        return reversal_data(self.vocab, 1, self.complete, self.held_out, seed=seed)

    def make_model(self, data):
        return OneLayer(len(data.names))

    def matrices(self, model, data):
        return {"Y": model.Y}

    def draw(self, results):
        Y = {f"{results['value']}: Y": results["matrices"]["Y"]}
        return draw_onelayer([results], Y)

    def conclude(self, results):
        super().conclude(results)
        hold_against_theory(results, self.lr, closed_form)
        results["verdict"] += in_words(results)
        data = self.make_data(self.seed)
        sentences = torch.cat([data.train_sentences(), data.test_sentences()])
        used = sentences.unique().tolist()
        results["tokens"] = {token: data.names[token] for token in used}


@dataclass
class OneLayerChain(OneLayerTheory):
    """Section 4: the one-layer transformer on the chain task (Theorem 4)."""

    def make_data(self, seed):  # no "A ~> C" is trained
        return chain_data(self.vocab, 1, 0, self.complete + self.held_out, seed)


# Measurements held against the theory: closed forms of the losses, and the least epsilon. The two
# models can be understood without this.


def closed_form(times, V, N):
    """The NLL of N trained sentences, each with an input of its own, after each of `times` of
    gradient flow on their mean loss, in the bilinear model with V orthonormal embeddings and in the
    one-layer transformer. u is the target's logit minus any other:

        N/V (exp(u) + (V - 1) u - 1) = t,   NLL = log(1 + (V - 1) exp(-u))

    Inputs that are not trained stay at log V.
    """
    u = np.linspace(0, math.log1p(V / N * max(times)), 100_001)
    t = N / V * (np.expm1(u) + (V - 1) * u)  # rises with u, so that u(t) is read off the table
    loss = np.log1p((V - 1) * np.exp(-u))
    return np.interp(times, t, loss)


def closed_form_symmetric(times, V, N):
    """The same for the symmetric bilinear model, by integration of two equations."""

    # The logit of j after i is that of i after j, so that each of the two gets half of every step.
    # After an input, p_a is the probability of its target, p_b of any one of the N inputs (itself
    # included), p_o of any other token. The logits move at the rates
    #     target:           (1 - p_a) / 2N
    #     an input:         -p_b / N, for that input pushes the logit between the two down as well
    #                       (and the logit of an input after itself gets the whole step)
    #     any other token:  -p_o / 2N
    # Relative to the last, a (target) and b (input) obey
    #     a' = (1 - p_a + p_o) / 2N,   b' = (p_o / 2 - p_b) / N.
    # Since a' > 0, b and t are found as functions of a, by midpoint steps.
    def sum_of_exponentials(a, b):
        return math.exp(a) + N * math.exp(b) + V - 1 - N

    def rates(a, b):
        Z = sum_of_exponentials(a, b)
        p_a = math.exp(a) / Z
        p_b = math.exp(b) / Z
        p_o = 1 / Z
        return (1 - p_a + p_o) / (2 * N), (p_o / 2 - p_b) / N

    step, a, b = 0.002, 0.0, 0.0
    t, losses = [0.0], [math.log(V)]
    while t[-1] < max(times):
        a_rate, b_rate = rates(a, b)
        a_rate, b_rate = rates(a + step / 2, b + step / 2 * b_rate / a_rate)
        a += step
        b += step * b_rate / a_rate
        t.append(t[-1] + step / a_rate)
        losses.append(math.log(sum_of_exponentials(a, b)) - a)
    return np.interp(times, t, losses)


def needed_epsilon(L, L_rev):
    """The least epsilon >= 0 with which Theorem 1 holds at these times, for losses (S, times).

    In logarithms it is epsilon >= log(L_rev / L_rev(0)) / log(L / L(0)), as L falls.
    """
    forward = np.log(L[:, 1:] / L[:, :1])
    reverse = np.log(L_rev[:, 1:] / L_rev[:, :1])
    return max(0.0, (reverse / forward).max())


def first_below(losses, level, others):
    """`others` where `losses` first reach a level, interpolated in log loss, or None."""
    for i in range(1, len(losses)):
        if losses[i] <= level:
            now = math.log(losses[i])
            before = math.log(losses[i - 1])
            share = (math.log(level) - before) / (now - before)
            return others[i - 1] + share * (others[i] - others[i - 1])
    return None


def hold_against_theory(results, lr, form):
    """Add to the results what the theory speaks of: curves over the time of gradient flow on the
    mean loss, Theorem 1's epsilon, the closed form. Returns L and L_rev, (S, points)."""
    curves, N = results["curves"], results["counts"]["train"]
    log_V = results["chance"]["vocabulary"]
    L, L_rev = np.array(curves["train_nll"]), np.array(curves["validation_nll"])
    times = np.array(curves["epoch"]) * lr * N
    expected = form(times, round(math.exp(log_V)), N)
    shift = L_rev[:, -1] - log_V
    results |= results["config"]  # the pictures look for dim and symmetric at the top
    results |= {
        "epsilon": needed_epsilon(L, L_rev),
        "shift": shift.tolist(),
        "reversal_shift": shift.mean(),
        "closed_form_gap": abs(L - expected).max(),
        "trained_probability_min": math.exp(-L[:, -1].max()),
        "unseen_probability_max": math.exp(-L_rev.min()),
        "curves": {
            "time": times.tolist(),
            "forward_nll": L.tolist(),
            "reversal_nll": L_rev.tolist(),
            "closed_form": [expected.tolist()],
        },
    }
    return L, L_rev


def in_words(results):
    """The numbers of hold_against_theory, and of the bilinear model, in words."""
    text = (
        f" Theorem 1 holds from epsilon {results['epsilon']:.4f} on. p (geometric mean) of the "
        f"trained is at least {results['trained_probability_min']:.3f}, of the asked at most "
        f"{results['unseen_probability_max']:.4f}. The closed form is within "
        f"{results['closed_form_gap']:.3f}. L_rev shifts by {results['reversal_shift']:+.4f}"
    )
    if "theorem_2" not in results:
        return f"{text}."
    summary, slopes = results["summary"], results["slope"]
    own, normaliser = summary["own_logit_shift"]["mean"], summary["normaliser_shift"]["mean"]
    text += f" ({own:+.4f} the own logit, {normaliser:+.4f} the normaliser)."
    for c, reached in results["theorem_2"].items():
        least = "is not reached" if None in reached else f"has L_rev >= {min(reached):.2f}"
        text += f" L = {c} {least}."
    bound = results["chance"]["vocabulary"] - math.log(2)
    return text + (
        f" Theorem 2's bound is {bound:.2f}. Slope of L_rev at the start: {min(slopes):+.4f} to "
        f"{max(slopes):+.4f}; theory: 1/d = {1 / results['dim']:.4f}."
    )


def bilinear(dims=None, symmetric=False, **given):
    """A Sweep of the bilinear model over dimensions, with Theta also symmetric if wanted.

    With Theta symmetric the logits are the same in both directions, the normalisers are not: L_rev
    falls with L, and stays a little above it, if d is large enough.
    """
    if dims is None:
        dims = [16, 32, 64, 128, 256, 512, 1024]
    trials = {}
    for dim in dims:
        trials[f"dim {dim}"] = BilinearTheory(dim=dim, **given)
        if symmetric:
            trials[f"dim {dim}, symmetric"] = BilinearTheory(dim=dim, symmetric=True, **given)
    return Sweep("bilinear", "bilinear", trials)


def onelayer(**given):
    """A Sweep of the one-layer transformer over the reversal and the chain task."""
    trials = {"reversal": OneLayerTheory(**given), "chain": OneLayerChain(**given)}
    return Sweep("onelayer", "onelayer", trials, {"Y"})


# ------------------------------------------------------------------------------------------ Cures
# Why is the curse so complete in a GPT, and what breaks it? B of a held-out "A -> B" is a target
# and never an input, so that its input vector has no gradient. (Weight decay shortens it; the
# direction stays.) Asked "B <-", the model reads the random vector that it began with. This holds
# for entities of one token, with input and output vectors apart, and for these most ablations of
# the reversal task could not have come out otherwise. It is a sufficient cause, not the only one.
# In the chain task every A that is asked is read, in "A -> B"; entities of two and three tokens
# (`ablate entity-length`) are read, piece by piece; and so are the names of two controls below,
# "read elsewhere" and "shuffled bridge".
#
# A cure is a Reversal that changes the data, the model or the loss. The question at the end stays
# the same. Cures are written for entities of one token.


@dataclass
class Cure(Reversal):
    """A cure is a subclass with a name, what supervision it adds, and what it changes."""

    variant: str = setting("common", "at which rates, or without complete pairs")

    command = "cure"
    name = "none"  # a cure of your own needs another one
    supervision = "control"
    claim = "no curse"  # the outcome that must be seen
    claim_without_pairs = None  # the same without complete pairs, where that is tried
    measurements = 20

    def with_sentences(self, data, added):
        """The Dataset with more training sentences (n, T + 1), which come first."""
        train = dict(data.train)
        if "added" in train:  # by another cure
            added = torch.cat([train.pop("added"), added])
        return replace(data, train={"added": added} | train)

    def with_identities(self, data):
        """The Dataset with a sentence "x = x" for every entity; "=" is in no other sentence."""
        first, _, last = data.train_sentences().unbind(1)
        entities = torch.cat([first, last]).unique()
        equals = torch.full_like(entities, len(data.names) - 1)
        return self.with_sentences(data, torch.stack([entities, equals, entities], dim=1))

    def evaluate(self, model, data):  # also the held-out facts as they were trained
        parts = super().evaluate(model, data)
        parts["held-out, trained"] = evaluate(model, data.train["held-out, trained"], 1)
        return parts

    def matrices(self, model, data):
        return super().matrices(model, data) | entity_map(model, data)

    def conclude(self, results):
        super().conclude(results)
        results |= {"cure": self.name, "supervision": self.supervision}

    # Bookkeeping

    @property
    def expected(self):  # at the paper's rates it is open
        claims = {"common": self.claim, "no complete pairs": self.claim_without_pairs}
        return claims.get(self.variant)

    def check(self):
        super().check()
        if self.entity_length > 1:
            raise Problem(f"entity_length {self.entity_length}: cures are written for one token")
        if self.loss != "entity":
            raise Problem(f"--loss {self.loss}: cures are written for the loss on the last entity")


class NoCure(Cure):
    """The control."""

    claim = "curse"


class Oracle(Cure):
    """Train what will be asked: the upper bound."""

    name = "oracle"
    supervision = "the answers"

    def make_data(self, seed):
        data = super().make_data(seed)
        return self.with_sentences(data, data.test["held-out, asked"])


class ReverseTraining(Cure):
    """Train every sentence also backwards (Golovneva et al. 2024): "A -> B" as "B -> A"."""

    name = "reverse training"
    supervision = "the answers"
    claim_without_pairs = "no curse"

    def make_data(self, seed):
        data = super().make_data(seed)
        return self.with_sentences(data, data.train_sentences().flip(1))


class EitherBlank(Cure):
    """Train both blanks, y in "x r _" and x in "_ r y", with attention that looks both ways. The
    asked answer was trained, but for another question: "_ -> B", where "B <- _" is asked."""

    name = "either blank"
    supervision = "the answers"

    def make_model(self, data):
        model = super().make_model(data)
        for block in model.transformer.h:
            block.attn.causal = False
        return model

    def batch_loss(self, model, sentences):
        logits = model(sentences[:, 1:], 2)  # after r and after y of "r y": (B, 2, V)
        x_after_r = cross_entropy(logits[:, :1], sentences[:, :1])  # r attends to y
        return nll(model, sentences) + x_after_r


class RulePenalty(Cure):
    """Tells the model that "<-" undoes "->", but no pair: a penalty on the mean square of (logit of
    y after "x ->" - logit of x after "y <-"), over all x and y of a batch."""

    name = "rule penalty"
    supervision = "the rule"

    def batch_loss(self, model, sentences):
        first, _, last = sentences.unbind(1)
        entities = torch.cat([first, last])  # (2B,)

        def logits_after(relation):
            """(2B, 2B): the logit of entity j after entity i and the relation."""
            questions = torch.stack([entities, torch.full_like(entities, relation)], dim=1)
            return model(questions, 1)[:, 0, entities]

        difference = logits_after(FORWARD) - logits_after(BACKWARD).mT
        return nll(model, sentences) + difference.square().mean()


class IdentityBridge(Cure):
    """Train "x = x" for every entity (Ma et al. 2026): each is read, and said as itself."""

    name = "identity bridge"
    supervision = "nothing"
    claim = "some"
    claim_without_pairs = "trace"  # mostly the name itself is said, or a trained target

    def make_data(self, seed):
        return self.with_identities(super().make_data(seed))


@dataclass
class TiedGPT(Cure):
    """One matrix for input and output vectors. The right name then leads its equals, but a name
    that was a target of the relation is said."""

    tie_embeddings: bool = setting(True, "the output matrix is the token embedding")

    name = "tied GPT"
    supervision = "nothing"
    claim = "trace"


class LearnedBilinear(nn.Module):
    """Logits (B, 1, V) of y after x, r: (E[x] M + E[r]) U^T, all learned. If tied, U is E."""

    def __init__(self, vocab_size, dim, tied):
        super().__init__()
        self.E = nn.Parameter(0.02 * torch.randn(vocab_size, dim))
        self.M = nn.Parameter(0.02 * torch.randn(dim, dim))
        self.U = self.E if tied else nn.Parameter(0.02 * torch.randn(vocab_size, dim))

    def forward(self, tokens, last=1):
        read = self.E[tokens]  # (B, T, D)
        x = read[:, :1]
        r = read[:, 1:].sum(1, keepdim=True)  # 0 if x stands alone, as in the heat maps
        return (x @ self.M + r) @ self.U.mT


class TiedBilinear(Cure):
    """Where input and output vectors are one, to learn to say a name is to learn to read it. M must
    also be symmetric. It learns this from complete pairs, and fails without them."""

    name = "tied bilinear"
    supervision = "nothing"
    claim = "some"
    claim_without_pairs = "trace"
    tied = True

    def make_model(self, data):
        return LearnedBilinear(len(data.names), self.dim, self.tied)

    def input_vectors(self, model):
        return model.E

    def measure(self, model, data, start, history):
        numbers = super().measure(model, data, start, history)
        M = model.M
        asymmetry = (M - M.mT).norm() / (M + M.mT).norm()
        numbers["asymmetry"] = asymmetry.item()  # 0 if M is symmetric, about 1 if it is random
        return numbers


class UntiedBilinear(TiedBilinear):
    """The control of tied bilinear, from which nothing else differs."""

    name = "untied bilinear"
    supervision = "control"
    claim = "curse"
    claim_without_pairs = None
    tied = False


class ReadElsewhere(Cure):
    """Is it enough that a name is read? Every name of a held-out pair is also the subject of an
    unrelated fact, with a target of its own and a relation of no other sentence."""

    name = "read elsewhere"
    claim = "curse"

    def make_data(self, seed):
        data = super().make_data(seed)
        first, _, last = data.train["held-out, trained"].unbind(1)
        subjects = torch.cat([first, last])
        unused = 2 + 2 * data.alphabet_size  # the first token that no other sentence has
        relation = len(data.names) - 1
        if unused + len(subjects) > relation:
            raise ValueError(f"held_out {len(first)}: too many for unrelated facts about all names")
        targets = unused + torch.arange(len(subjects))
        relations = torch.full_like(subjects, relation)
        return self.with_sentences(data, torch.stack([subjects, relations, targets], dim=1))


class ShuffledBridge(Cure):
    """Is it enough that a name is read and said? Train "x = another name" for every entity."""

    name = "shuffled bridge"
    claim = "curse"

    def make_data(self, seed):
        data = self.with_identities(super().make_data(seed))
        added = data.train["added"]
        order = torch.randperm(len(added), generator=torch.Generator().manual_seed(seed))
        shuffled = added[order]
        shuffled[:, 2] = shuffled[:, 0].roll(1)  # each name once, and never after itself
        return replace(data, train=data.train | {"added": shuffled})


# The identity bridge in theory (Ma et al. 2026; the small trial is ours). One layer without
# attention: the logits after "x r" are the sum of rows x and r of a (V, V) matrix. Look at
# its weights between A and B (row: read, column: said). A to A, A to B and B to B are trained to 1,
# by "A = A", "A -> B" and "B = B"; B to A is free, call it z: [[1, 1], [z, 1]]. If the matrix is a
# product of two factors, gradient descent from a small start tends to keep its nuclear norm small,
# the sum of its singular values. Here that is sqrt(3 + z^2 + 2 |1 - z|), least at z = 1: the
# reversal is filled in. If the matrix is trained itself, its Frobenius norm tends to stay small,
# which is least at z = 0. This is a tendency, not a theorem.


class SumOfTokens(nn.Module):
    """Logits (B, 1, V) after x, r (B, 2): E[x] + E[r], or, factorised, (E[x] + E[r]) U^T."""

    def __init__(self, vocab_size, width, factorised):
        super().__init__()
        self.E = nn.Parameter(0.002 * torch.randn(vocab_size, width))
        self.U = nn.Parameter(0.002 * torch.randn(vocab_size, width)) if factorised else None

    def forward(self, tokens, last=1):
        both = self.E[tokens].sum(1, keepdim=True)
        return both if self.U is None else both @ self.U.mT


@dataclass
class BridgeTheory(Cure):
    """The theory with one merged matrix or two factors, without or with "x = x". It is trained by
    gradient descent on the mean loss, in steps of --lr."""

    factorised: bool = setting(False, "two factors in place of one merged matrix")
    bridge: bool = setting(False, "train x = x for every entity")

    supervision = "theory"

    @property
    def name(self):
        kind = "factorised" if self.factorised else "merged"
        return f"{kind}, x = x" if self.bridge else kind

    @property
    def expected(self):
        return "no curse" if self.factorised and self.bridge else "curse"

    def make_data(self, seed):
        data = super().make_data(seed)
        return self.with_identities(data) if self.bridge else data

    def make_model(self, data):
        V = len(data.names)
        return SumOfTokens(V, 32 if self.factorised else V, self.factorised)

    def make_optimizer(self, weights):
        return torch.optim.SGD(weights, self.lr)


CURES = [Oracle, ReverseTraining, EitherBlank, RulePenalty, IdentityBridge, TiedGPT, TiedBilinear]
CURES += [NoCure, UntiedBilinear, ReadElsewhere, ShuffledBridge]  # controls
CURE_LAPTOP = {"lr": 0.003, "weight_decay": 0.1}  # at which all learn their training sentences


def cure(values=None, **given):
    """A Sweep of cures and controls, by name: at common rates and at the paper's, and some without
    complete pairs, which could teach a model that "<-" undoes "->"."""
    common = CURE_LAPTOP | given
    paper = given | {"lr": 0.01, "weight_decay": 0.01, "variant": "paper"}
    alone = common | {"complete": 0, "variant": "no complete pairs"}
    trials = {}
    for each in CURES:
        if each.name in trials:
            raise Problem(f"{each.__name__}: its name, {each.name!r}, is that of another cure")
        trials[each.name] = each.of_preset(**common)
        trials[f"{each.name}, as in the paper"] = each.of_preset(**paper)
        if each.claim_without_pairs is not None:
            trials[f"{each.name}, no complete pairs"] = each.of_preset(**alone)
    small = {"vocab": 80, "complete": 14, "held_out": 6, "epochs": 1000, "batch_size": 10**6}
    theory = given | small | {"lr": 3.0, "variant": "theory", "preset": "laptop"}
    for factorised in (False, True):
        for bridge in (False, True):
            trial = BridgeTheory.of_preset(factorised=factorised, bridge=bridge, **theory)
            trials[trial.name] = trial
    if values is not None:
        trials = trials_of_names(trials, values)
    return Sweep("cure", "cure", trials, {"held-out, asked"})


def trials_of_names(trials, names):
    """The trials of the cures with these names."""
    chosen = {}
    for name in names:
        named = {label: trial for label, trial in trials.items() if trial.name == name}
        if not named:
            known = dict.fromkeys(trial.name for trial in trials.values())
            raise Problem(f"--values {name}: must be one of {', '.join(known)}")
        chosen |= named
    return chosen


def four_models(**given):
    """A Sweep of four models on the same sentences. Every weight between entities is drawn."""
    given = {"seeds": 1, "vocab": 96, "complete": 8} | given
    held_out = given["vocab"] // 4 - given["complete"]
    trials = {
        "bilinear": BilinearTheory(dim=256, **given),
        "one-layer": OneLayerTheory(held_out=held_out, **given),
        "GPT": NoCure(held_out=held_out, **given),
        "GPT, reverse training": ReverseTraining(held_out=held_out, **given),
    }
    return Sweep("weights", "weights", trials, {"entities", "trained", "Y"})


# --------------------------------------------------------------------------------------- Plotting
# Here the science ends: you may stop reading. What follows draws the pictures, from the results
# alone, so that a saved file is drawn just as a run is.
TRAINED, ASKED = "tab:blue", "tab:orange"
STYLE = {
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0,
    "figure.constrained_layout.use": True,
}


@contextlib.contextmanager
def our_style():
    """Matplotlib's defaults and STYLE, but the font family is the user's."""
    with matplotlib.rc_context():
        family = matplotlib.rcParams["font.family"]
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.family": family})
        yield


def centred(matrix):
    """Logits of an input are defined up to a constant: take the mean of each row away."""
    matrix = matrix.astype(float)
    return matrix - matrix.mean(1, keepdims=True)


def draw_matrices(figure, maps, label, read="entity read", said="entity said", rows=1):
    """Heat maps {title: matrix} on one diverging scale with zero in the middle: their images."""
    limit = max(abs(matrix).max() for matrix in maps.values())
    scale = matplotlib.colors.Normalize(-limit, limit)
    columns = math.ceil(len(maps) / rows)
    images = []
    for i, (title, matrix) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(rows, columns, i, title=title)
        images.append(axes.imshow(matrix, cmap="RdBu_r", norm=scale))
    figure.colorbar(images[0], ax=figure.axes, shrink=0.6, label=label)
    figure.supxlabel(said)
    figure.supylabel(read)
    return images


def name_ticks(axes, read, said):
    """Write names at the rows and columns of a heat map."""
    for axis, names in ((axes.yaxis, read), (axes.xaxis, said)):
        # An axis is about 130 points long. A name may be long, or have a "$" in it.
        short = [name if len(name) < 18 else f"{name[:16]}..." for name in names]
        size = min(8, 130 / len(names))
        axis.set_ticks(range(len(names)), short, fontsize=size, parse_math=False)
    axes.tick_params(axis="x", rotation=90)


def draw_line(axes, x, seeds, color, label, ls="-"):
    """A curve of each seed (thin), and their mean, in a line style."""
    axes.plot(x, np.transpose(seeds), color=color, lw=0.3)
    mean = np.mean(seeds, 0)
    axes.plot(x, mean, color=color, lw=2, ls=ls, label=label)


def draw_values(axes, values):
    """Means over the seeds, a colour for each value {label: (x, trained, asked)}: a solid curve
    for what was trained, a dashed one for what was asked."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(values)))
    for color, (label, (x, trained, asked)) in zip(colors, values.items(), strict=True):
        axes.plot(x, np.mean(trained, 0), color=color, label=label)
        axes.plot(x, np.mean(asked, 0), color=color, ls="--")
    if values:
        axes.legend()


def draw_level(axes, height, text, va="bottom"):
    """A horizontal line with its name, which stands on the line or, with va="top", below it."""
    axes.axhline(height, color="gray", ls="--", lw=0.8)
    where = axes.get_yaxis_transform()
    axes.text(1, height, text, color="dimgray", ha="right", va=va, transform=where)


def draw_curves(figure, results):
    """Figures 1 and 3: NLL over the epochs, and the chance levels."""
    axes = figure.subplots()
    curves, chance = results["curves"], results["chance"]
    epochs = curves["epoch"]
    draw_line(axes, epochs, curves["train_nll"], TRAINED, "trained")
    label = f"asked: {results['unseen']}"
    draw_line(axes, epochs, curves["validation_nll"], ASKED, label, "--")  # both stay visible
    draw_level(axes, chance["vocabulary"], "chance level among all tokens")
    draw_level(axes, chance["alphabet"], "chance level within the alphabet", va="top")
    axes.set(xlabel="epoch", ylabel="NLL of the answer (nats)", title=results["title"])
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return axes


def draw_maps(results):
    """Figures 2 and 4: heat maps, in which the curse is the missing diagonal, and the curves."""
    maps = {}
    for role in results["weights"]:
        facts = role.split(", ")[0]  # such as "held-out"
        kind = "never trained" if role in results["never_trained"] else "trained"
        maps[f"{facts}: {kind}"] = centred(results["matrices"][role][:SHOWN, :SHOWN])
    columns = math.ceil(len(maps) / 2)
    figure = Figure(figsize=(4 + 3 * columns, 5.6))
    figure.suptitle(f"Logits of the first seed, {SHOWN} facts at most")
    left, right = figure.subfigures(1, 2, width_ratios=(columns, 1))
    images = draw_matrices(left, maps, "logit above the mean of its row", rows=2)
    for image, role in zip(images, results["weights"], strict=True):
        pairs = results["names"].get(role)
        if pairs:
            read, said = zip(*pairs[:SHOWN], strict=True)
            name_ticks(image.axes, read, said)
    return figure, images, draw_curves(right, results)


def draw_animation(results):
    """The figure of draw_maps as it changes over the training."""
    figure, images, axes = draw_maps(results)
    epochs = results["curves"]["epoch"]
    now = axes.axvline(0, color="black")

    def show(i):
        for image, role in zip(images, results["weights"], strict=True):
            image.set_data(centred(results["matrices"][f"frames {role}"][i]))
        now.set_xdata([epochs[i], epochs[i]])
        axes.set_title(f"after epoch {epochs[i]}")

    for image in images:  # without ticks it is drawn twice as fast
        image.axes.set(xticks=[], yticks=[])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was laid out stays where it is
    shown = np.unique(np.linspace(0, len(epochs) - 1, 20, dtype=int)).tolist()
    shown += [shown[-1]] * 8  # two seconds on the last
    return FuncAnimation(figure, show, shown)


def draw_cosines(maps):
    """Figure 11: the cosines of all token embeddings."""
    figure = Figure(figsize=(2 + 3 * len(maps), 3.6))
    draw_matrices(figure, maps, "cosine of two token embeddings", "token", "token")
    return figure


def draw_task(results):
    """Reversal, chain and in-context reversal: Figures 1 to 4, and 11."""
    figures = Figures({".png": Figure(figsize=(6, 4))})
    draw_curves(figures[".png"], results)
    if results["weights"]:
        figures["_weights.png"] = draw_maps(results)[0]
        if results["config"].get("animate"):
            figures[".gif"] = draw_animation(results)
    if "cosine" in results["matrices"]:
        figures["_cosine.png"] = draw_cosines({results["title"]: results["matrices"]["cosine"]})
    return figures


def draw_ablation(runs, matrices):
    """Figures 5 to 10: each axis is a panel, each value a colour, and the curse is the gap."""
    panels = {}
    for one in runs:
        axis, value = one["value"].split(" ", 1)
        values = panels.setdefault(axis, {})
        if one["outcome"] == "diverged":
            values[f"{value}: diverged"] = [], [[]], [[]]  # in the legend, with no curve
        else:
            curves = one["curves"]
            share = np.divide(curves["epoch"], curves["epoch"][-1])
            values[value] = share, curves["train_nll"], curves["validation_nll"]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1 + 3 * columns, 3.5 * rows))
    axes = None  # all panels share the scale of the first
    for i, (axis, values) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, i, title=axis, sharey=axes)
        draw_values(axes, values)
        axes.set_ylim(bottom=0)
    figure.supxlabel("share of the training")
    figure.supylabel("NLL (nats): trained (solid), asked (dashed)")
    figures = Figures({".png": figure})
    if matrices:
        figures["_cosine.png"] = draw_cosines(matrices)
    return figures


def draw_bilinear(runs, matrices):
    """Theorems 1 and 2: NLL over time, free and symmetric, and the slope at the start."""
    figure = Figure(figsize=(13, 4.2))
    figure.suptitle("trained (solid), reversed (dashed), closed form (dotted)")
    left, middle, right = figure.subplots(1, 3)
    level = runs[0]["chance"]["vocabulary"]
    for axes, symmetric in ((left, False), (middle, True)):
        values = {}
        drawn = [one for one in runs if one["symmetric"] == symmetric]
        if len(drawn) > 4:
            drawn = drawn[::2]
        for one in drawn:
            curves = one["curves"]
            times = curves["time"]
            values[f"d = {one['dim']}"] = times, curves["forward_nll"], curves["reversal_nll"]
            axes.semilogx(times, curves["closed_form"][0], "k:", zorder=3)  # on top
        draw_values(axes, values)
        draw_level(axes, level, "log m")
        draw_level(axes, level - math.log(2), "log(m/2)")
        axes.set(xlabel="time of gradient flow", ylabel="NLL (nats)", ylim=(0, 8))
        axes.set_title("symmetric Theta" if symmetric else "free Theta")
    free = [one for one in runs if not one["symmetric"]]
    d = np.array([one["dim"] for one in free])
    slopes = [one["slope"] for one in free]
    right.semilogx(d, slopes, "o", base=2, color=ASKED, ms=4)
    right.margins(x=0.05)
    mean = 1 / d
    deviation = math.sqrt(2) / d
    low, high = mean - deviation, mean + deviation
    right.plot(d, mean, "k", label="theory: 1/d")
    right.fill_between(d, low, high, color="gray", alpha=0.25, label="and its deviation")
    right.set_yscale("symlog", linthresh=1e-3)
    title = "Theorem 1's epsilon: the slope of the reversal loss"
    right.set(xlabel="dimension d", ylabel="dL_rev / dL at the start, each seed", title=title)
    right.legend()
    return Figures({".png": figure})


def draw_onelayer(runs, matrices):
    """Theorems 3 and 4: the rows of Y that training touches, and the probabilities."""
    figure = Figure(figsize=(9.5, 4.2 * len(runs)))
    parts = figure.subfigures(len(runs), 2, squeeze=False)
    for (left, right), one in zip(parts, runs, strict=True):
        used = [int(token) for token in one["tokens"]]
        Y = matrices[f"{one['value']}: Y"][used][:, used]
        maps = {f"Y: {one['value']} task": Y}
        label = "logit (0 if never touched)"
        (image,) = draw_matrices(left, maps, label, "token read", "token said")
        names = list(one["tokens"].values())
        name_ticks(image.axes, names, names)
        curves = {name: np.array(curve) for name, curve in one["curves"].items()}
        times = curves["time"]
        axes = right.subplots()
        draw_line(axes, times, np.exp(-curves["forward_nll"]), TRAINED, "trained")
        draw_line(axes, times, np.exp(-curves["reversal_nll"]), ASKED, "asked")
        axes.loglog(times, np.exp(-curves["closed_form"][0]), "k:", label="closed form")
        draw_level(axes, math.exp(-one["chance"]["vocabulary"]), "1/m")
        axes.set(xlabel="time of gradient flow", ylabel="p of the answer")
        axes.legend()
    return Figures({".png": figure})


# The colours of the bars; any other supervision is gray.
SUPERVISION = {"the answers": "C0", "the rule": "C1", "nothing": "C2", "control": "C3"}


def draw_cures(runs, matrices):
    """What each cure does to the asked reversals: accuracy, matched rank, diagonal."""
    heights = 1.5 + 0.16 * len(runs), 4.5
    figure = Figure(figsize=(11, sum(heights)))
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    axes, square = top.subplots(1, 2, width_ratios=(4, 1))
    theory = {one["value"]: one for one in runs if one["setting"] == "theory"}
    draw_square(square, theory)
    maps = {}
    for one in runs:
        value, supervision = one["value"], one["supervision"]
        if value in theory:
            continue
        name = f"{value.removesuffix(', as in the paper')} ({supervision})"
        accuracy = one["summary"]["validation_accuracy"]
        if one["setting"] == "paper":
            label = "mean accuracy at the paper's rates"
            axes.plot(accuracy["mean"], name, "kD", mfc="none", label=label)
            continue
        color = SUPERVISION.get(supervision, "gray")
        axes.barh(name, accuracy["mean"], color=color, alpha=0.6)
        for seed in accuracy["per_seed"]:
            axes.plot(seed, name, "k.", label="accuracy of a seed (bar: mean)")
        rank = one["summary"]["matched_rank"]["mean"]  # None if there is nothing to compare with
        axes.plot([rank], [name], "rx", mew=2, label="matched rank (0: first, 0.5: chance)")
        if one["setting"] == "common":
            matrix = matrices[f"{value}: held-out, asked"]
            maps[value] = centred(matrix[:SHOWN, :SHOWN])
    axes.axvline(0.5, color="red", lw=0.6, ls=":")
    axes.set(xlim=(-0.02, 1.02), xlabel="of the asked reversals")
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))  # each once
    top.legend(marks.values(), marks.keys(), loc="outside upper center", ncols=3)
    if maps:
        rows = math.ceil(len(maps) / 6)
        draw_matrices(bottom, maps, "logit above the mean of its row", rows=rows)
    return Figures({".png": figure})


def draw_square(axes, theory):
    """The theory of the identity bridge as a table of accuracies."""
    axes.set(title="identity bridge\nin theory: accuracy", xlim=(-0.5, 1.5), ylim=(1.5, -0.5))
    axes.set_xticks([0, 1], ["without", "x = x"])
    axes.set_yticks([0, 1], ["merged", "factorised"], rotation=90, va="center")
    axes.set_aspect("equal")
    places = {"merged": (0, 0), "merged, x = x": (1, 0)}
    places |= {"factorised": (0, 1), "factorised, x = x": (1, 1)}
    for name, one in theory.items():
        accuracy = one["summary"]["validation_accuracy"]["mean"]
        axes.text(*places[name], f"{accuracy:.2f}", ha="center", va="center", size=12)


def draw_weights(runs, matrices):
    """The one picture: fold along the diagonal. What was taught both ways meets."""
    trained = matrices["bilinear: trained"].astype(int)
    n = len(trained) // 2
    forward = np.diag(trained[:n, n:])  # 1 for each pair that is taught as "A -> B", or else 0
    backward = np.diag(trained[n:, :n])
    groups = 3 - 2 * forward - backward  # of the pairs, and then of all entities, A and B
    groups = np.concatenate([groups, 3 + groups])
    labels = ["A both", "A ->", "A <-", "B both", "B ->", "B <-"]
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=6)
    ends = np.cumsum(sizes) - 0.5
    middles = ends - sizes / 2
    maps = {}
    for one in runs:
        value = one["value"]
        if one["command"] == "onelayer":  # row x of Y holds the logits after x, an entity from 2 on
            matrix = matrices[f"{value}: Y"][2:, 2:]
        else:
            matrix = matrices[f"{value}: entities"]
        matrix = centred(matrix[order][:, order])
        maps[value] = matrix / abs(matrix).max()
    figure = Figure(figsize=(10, 9.4))
    figure.suptitle(
        "Fold along the diagonal: what was taught both ways meets; one way, it does not"
    )
    label = "logit above the mean of its row, as a share of the largest"
    for image in draw_matrices(figure, maps, label, rows=2):
        axes = image.axes
        axes.set_xticks(middles, labels)
        axes.set_yticks(middles, labels, rotation=90, va="center")
        axes.axline((0, 0), slope=1, color="black", ls=":")
        for end in ends:
            width = 1.2 if end == n - 0.5 else 0.3
            axes.axvline(end, color="black", lw=width)
            axes.axhline(end, color="black", lw=width)
    return Figures({".png": figure})


class Figures(dict):
    """{end of the file name: figure or animation}. A notebook shows them."""

    def save(self, stem):
        """Write them to files. Missing letters are one hint."""
        with our_style(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for end, figure in self.items():
                if end == ".gif":
                    how = functools.partial(figure.save, writer="pillow", fps=4, dpi=60)
                else:
                    how = figure.savefig
                write(Path(f"{stem}{end}"), how)
        if any("Glyph" in str(warning.message) for warning in caught):
            say("matplotlib's font lacks some of the letters: set font.family in a matplotlibrc")

    def files(self):
        """{end of the file name: content}"""
        with tempfile.TemporaryDirectory() as folder:
            self.save(f"{folder}/figure")
            return {end: Path(f"{folder}/figure{end}").read_bytes() for end in self}

    def _repr_html_(self):
        images = [base64.b64encode(content).decode() for content in self.files().values()]
        return "".join(f'<img src="data:image;base64,{image}">' for image in images)

    def _repr_png_(self):  # for a notebook that is printed
        return self.files()[".png"]


def draw(results):
    """All Figures of the results of a run, or of a file."""
    pictures = {
        "ablate": draw_ablation,
        "bilinear": draw_bilinear,
        "onelayer": draw_onelayer,
        "cure": draw_cures,
        "weights": draw_weights,
    }
    command = results["command"]
    with our_style():
        if "runs" in results:
            runs = results["runs"]
            if command != "ablate":  # which says what diverged
                runs = [one for one in runs if one["outcome"] != "diverged"]
            return pictures[command](runs, results["matrices"])
        if "experiment" in results:
            return results["experiment"].draw(results)
        return TASKS[command]().draw(results)  # read from a file


# -------------------------------------------------------------------------------------- Machinery
# How a plan is carried out. First `run`, which is all that a notebook needs; then files and
# checkpoints, processes, bad input, `ablate` and the command line.

IN_MEMORY = ("matrices", "models", "experiment")  # results that JSON cannot hold


def run(plan, keeper=None):
    """Carry out an experiment, such as Reversal(seeds=2), or a Sweep, such as ablate("layers").

    Returns the results: numbers, `matrices` and, of one experiment, `models`, the trained models of
    this process (they share memory: save a copy.deepcopy of one). draw(results) shows them.
    """
    if keeper is None:
        keeper = Keeper()
    if not isinstance(plan, Sweep):
        return run_trial(plan, plan.stem, keeper, show_examples=True)
    for trial in plan.trials.values():  # all are checked before the first is trained
        prepare(trial)
    runs, matrices = {}, {}
    for label, trial in plan.trials.items():
        same = [other for other in runs if plan.trials[other] == trial]
        if same:  # the usual model, which is on every axis of an ablation, is trained once
            twin = runs[same[0]]
            runs[label] = twin | {"value": label}
            continue
        try:
            results = run_trial(trial, label, keeper)
        except FloatingPointError as error:
            say(f"diverged: {error}")
            results = {"value": label, "outcome": "diverged", "verdict": str(error), "matrices": {}}
            results |= {"expected": trial.expected, "config": asdict(trial)}
        for name in plan.keep & results["matrices"].keys():
            matrices[f"{label}: {name}"] = results["matrices"][name]
        runs[label] = {name: each for name, each in results.items() if name not in IN_MEMORY}
    return {"command": plan.command, "runs": list(runs.values()), "matrices": matrices}


def run_trial(experiment, label, keeper, show_examples=False):
    """Train a model for each seed and measure what it knows: the results of one experiment."""
    experiment, data, model = prepare(experiment)
    n = len(data.train_sentences())
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    title = f"{label}: seeds {experiment.seeds}, epochs {experiment.epochs}"
    say(f"{title}, {n} sentences, {parameters:,} parameters")
    began = time.monotonic()
    # All seeds train at once, unless --seeds-at-once or the processes of torchrun divide them.
    rank, processes = place()
    mine = range(experiment.seed, experiment.seed + experiment.seeds)[rank::processes]
    if not mine:
        raise Problem(f"process {rank} of {processes}: has no seed of --seeds {experiment.seeds}")
    size = experiment.seeds if experiment.seeds_at_once is None else experiment.seeds_at_once
    models, rows = [], {}
    for i in range(0, len(mine), size):
        seeds = mine[i : i + size]
        keeper.next_training(experiment, label, seeds)
        group, measured = train_group(experiment, seeds, keeper)
        models += group
        rows |= measured
    rows = join(rows)
    if show_examples:
        examples(models[0], data)
    results = results_of(experiment, data, rows) | {"value": label, "title": title}
    steps = experiment.epochs * math.ceil(n / experiment.batch_size)
    seconds = time.monotonic() - began
    results["seconds"] = seconds
    cost = {"sentences": n, "steps": steps, "parameters": parameters, "seconds": seconds}
    results |= {"cost": cost, "models": models, "experiment": experiment}
    experiment.conclude(results)
    say(results["verdict"])
    return results


def prepare(experiment):
    """Check before any work: (experiment with all rules applied, first data, an empty model)."""
    experiment.check()
    experiment = copy.copy(experiment)
    experiment.device = choose_device(experiment.device)
    try:
        data = experiment.make_data(experiment.seed)
        with torch.device("meta"):  # shapes without numbers
            model = experiment.make_model(data)
    except ValueError as error:  # raised by the data or the model
        raise Problem(error) from None
    if data.answer_length != experiment.answer_length:
        raise Problem(f"{type(experiment).__name__}.answer_length: differs from that of its data")
    if any(True for _ in model.buffers()):  # vmap would not stack them
        raise Problem(f"{type(model).__name__}: make its buffers parameters without a gradient")
    n = len(data.train_sentences())
    experiment.batch_size = min(experiment.batch_size, n)
    if experiment.epochs is None:
        steps = math.ceil(n / experiment.batch_size)  # of an epoch
        experiment.epochs = max(experiment.least_epochs, math.ceil(480 / steps))
    return experiment, data, model


def train_group(experiment, seeds, keeper):
    """Train a model for each of these seeds side by side: (models, {seed: (numbers, matrices)})."""
    datasets = []
    models = []
    starts = []  # the input vectors before the training
    for seed in seeds:
        datasets.append(experiment.make_data(seed).to(experiment.device))
        torch.manual_seed(seed)
        models.append(experiment.make_model(datasets[-1]).to(experiment.device))
        start = experiment.input_vectors(models[-1])
        starts.append(start if start is None else start.detach().clone())
    if len({len(data.train_sentences()) for data in datasets}) > 1:
        raise Problem("make_data: seeds that train at once must have equally many sentences")
    try:
        history, frames = train(experiment, models, datasets, seeds, keeper)
    except FloatingPointError as error:
        return models, {"diverged": f"{keeper.label}: {error}"}  # all processes will hear of it
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        reason = f"not for many models: {first_line(error)}"
        raise Problem(f"{reason} --seeds-at-once 1 trains it") from None
    rows = {}
    for s, seed in enumerate(seeds):
        own = {epoch: evaluations[s] for epoch, evaluations in history.items()}
        numbers = experiment.measure(models[s], datasets[s], starts[s], own)
        matrices = {}
        if seed == experiment.seed:
            for name, matrix in experiment.matrices(models[s], datasets[s]).items():
                matrices[name] = matrix.detach().half().cpu().numpy()
            for role in frames.get(0, {}):
                stacked = torch.stack([maps[role] for maps in frames.values()])
                matrices[f"frames {role}"] = stacked.half().cpu().numpy()
        rows[seed] = numbers, matrices
        models[s].cpu()
    return models, rows


def results_of(experiment, data, rows):
    """The results of all seeds, from the (numbers, matrices) of each, and the first data."""
    summary, curves = {}, {"epoch": experiment.eval_epochs()}
    matrices = rows[0][1]
    for name in rows[0][0]:
        values = [numbers[name] for numbers, _ in rows]
        if isinstance(values[0], list):
            curves[name] = values
            values = [curve[-1] for curve in values]
        known = [value for value in values if value is not None]
        mean = float(np.mean(known)) if known else None
        std = float(np.std(known)) if known else None
        summary[name] = {"mean": mean, "std": std, "per_seed": values}
    weights_of_roles, names = {}, {}
    for role, sentences in (data.train | data.test).items():
        n = len(sentences)
        if role in matrices and n > 0:
            on = matrices[role].trace(dtype=float)
            off = matrices[role].sum(dtype=float) - on
            mean = {"diagonal": on / n, "off_diagonal": off / max(1, n * n - n)}
            weights_of_roles[role] = mean
        if getattr(experiment, "facts", ()):
            read, said = sentences[:, 0], sentences[:, -1]
            names[role] = [[data.names[a], data.names[b]] for a, b in zip(read, said, strict=True)]
    chance = {"vocabulary": len(data.names), "alphabet": data.alphabet_size}
    return {
        "command": experiment.command,
        "setting": experiment.variant,
        "config": asdict(experiment),
        "unseen": experiment.asked,
        "expected": experiment.expected,
        "environment": {"torch": torch.__version__, "device": experiment.device},
        "counts": {"train": len(data.train_sentences()), "validation": len(data.test_sentences())},
        "chance": {name: math.log(tokens) for name, tokens in chance.items()},
        "summary": summary,
        "weights": weights_of_roles,
        "curves": curves,
        "never_trained": list(data.test),
        "names": names,
        "matrices": matrices,
    }


# Files: results, pictures, checkpoints.


def carry_out(plan, within=""):
    """Run a plan, write its results, and draw them; `within` names the command around it."""
    first = next(iter(trials_of(plan).values()))
    stem = Path(first.out).expanduser() / plan.stem
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=stem.parent).close()
    except OSError as error:
        raise Problem(f"--out {first.out}: {error}") from None
    say(f"{plan.stem} on {choose_device(first.device)}")
    keeper = Keeper(stem.with_name(f".{within}{plan.stem}"))
    results = run(plan, keeper)
    if place()[0] == 0:  # numbers first, then the pictures, which can be drawn again
        save_results(results, stem)
    if distributed.is_initialized():
        distributed.barrier()
    for path in keeper.paths:
        path.unlink(missing_ok=True)
    if place()[0] == 0:
        try:
            draw(results).save(stem)
        except Exception as error:  # a folder in the way, a full disk
            hint = f"but the numbers are safe: revcurse.py plot {stem}.json draws them"
            raise OSError(f"a picture failed ({error}), {hint}") from None
    return results


def save_results(results, stem):
    """Write stem.json with the numbers, and stem.npz with the matrices, if there are any."""
    numbers = {name: each for name, each in results.items() if name not in IN_MEMORY}
    if results["matrices"]:
        write(Path(f"{stem}.npz"), functools.partial(np.savez_compressed, **results["matrices"]))
    text = json.dumps(numbers, indent=1, allow_nan=False, default=str)
    write(Path(f"{stem}.json"), lambda path: path.write_text(text))
    say(f"wrote {stem}.json")


def claims_of(stem, runs):
    """What must be seen in the trainings of a command, and what was: a row for each outcome."""
    claims = []
    for expected in OUTCOMES:
        group = [one for one in runs if one["expected"] == expected]
        seen = []
        for key in ("train_accuracy", "validation_accuracy", "matched_rank"):
            values = []
            for one in group:
                if "summary" in one:
                    values += one["summary"][key]["per_seed"]
            values = [value for value in values if value is not None]
            if values:
                seen.append(f"{key.replace('_', ' ')} {min(values):.3f} to {max(values):.3f}")
        others = [
            f"{one['value']}: {one['outcome']}" for one in group if one["outcome"] != expected
        ]
        if group:
            trainings = "1 training" if len(group) == 1 else f"{len(group)} trainings"
            claim = {"figure": stem, "expected": f"{OUTCOMES[expected]}, in {trainings}"}
            claims.append(claim | {"seen": "; ".join(seen + others), "holds": not others})
    return claims


def plot(files):
    """Draw saved results again, without training."""
    for file in files:
        stem = file.removesuffix(".json")
        try:
            results = json.loads(Path(file).read_text()) | {"matrices": {}}
            if Path(f"{stem}.npz").exists():
                with open(f"{stem}.npz", "rb") as arrays:
                    results["matrices"] = dict(np.load(arrays))
            draw(results).save(stem)
        except Exception as error:  # a strange file can go wrong in every way
            raise Problem(f"{stem}.json: not a results file, or damaged ({error!r})") from None


def write(path, how):
    """Let how(path) write a file: it appears whole or not at all."""
    remove_leftovers(path)
    unfinished = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        how(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_leftovers(path):
    """Remove what processes that were killed while they wrote this file have left."""
    if os.name != "posix":
        return  # there is no harmless way to ask for a process
    for left in path.parent.glob(f".*.tmp.{glob.escape(path.name)}"):
        pid = left.name.split(".")[1]
        if pid.isdecimal():
            try:
                os.kill(int(pid), 0)  # signal 0 only asks
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except OSError:  # it is there, but not ours
                pass


class Keeper:
    """The progress of a command's trainings, and the checkpoints from which they go on.

    stem: the beginning of the checkpoints' paths; without it, as in a notebook, none is written.
    """

    def __init__(self, stem=None):
        self.stem = stem
        self.paths = []  # of its checkpoints
        self.failed = False
        self.next_save = time.monotonic() + 30  # not sooner: at the paper's size it is 2 GB

    def next_training(self, experiment, label, seeds):
        """Remember what is trained next."""
        self.label = f"{label}, from seed {seeds[0]}"
        if self.stem is not None:
            self.paths.append(Path(f"{self.stem}.{self.label.replace('/', '-')}.pt"))
            remove_leftovers(self.paths[-1])
        self.settings = asdict(experiment) | {"class": type(experiment).__name__}
        self.settings |= {"seeds": list(seeds), "out": "", "quiet": ""}
        self.quiet, self.epochs = experiment.quiet, experiment.epochs
        self.began = time.monotonic()
        self.next_line = self.began + 5

    def begin(self, ensemble, optimizer, generators, history, frames):
        """Go on from the checkpoint, if there is one: (epochs done, history, frames)."""
        self.weights, self.optimizer = ensemble.weights, optimizer
        self.generators = [*generators, torch.default_generator, *torch.cuda.default_generators]
        if not self.paths or not self.paths[-1].exists():
            return 0, history, frames
        path = self.paths[-1]
        try:
            with torch.serialization.safe_globals([Evaluation]):
                state = torch.load(path, map_location="cpu", weights_only=True)
            differ = []
            for name, now in self.settings.items():
                was = state["settings"][name]
                if was != now:
                    differ.append(f"{name} {was}, now {now}")
            if not differ:
                for name, tensor in self.weights.items():
                    tensor.data.copy_(state["weights"][name])
                optimizer.load_state_dict(state["optimizer"])
                for generator, numbers in zip(self.generators, state["generators"], strict=False):
                    generator.set_state(numbers)
        except Exception:  # whatever a strange file leads to
            differ = ["damaged, or of another version of revcurse.py"]
        if differ:
            reason = "; ".join(differ)
            raise Problem(f"{path}: does not fit ({reason}); delete it, or take another --out")
        say(f"{self.label}: going on after epoch {state['epoch']}")
        return state["epoch"], state["history"], state["frames"]

    def after_epoch(self, epoch, history, frames):
        """Say how far the training is, and save it; that takes a twentieth of the time at most."""
        now = time.monotonic()
        if now >= self.next_line and not self.quiet:
            latest = history[max(history)]
            losses = [parts["trained"].nll.mean().item() for parts in latest]
            told = f"epoch {epoch} of {self.epochs}, NLL of what is trained {np.mean(losses):.3f}"
            say(f"{self.label}: {told}, {now - self.began:.0f} s")
            self.next_line = now + 5
        if not self.paths or now < self.next_save:
            return
        state = {
            "settings": self.settings,
            "epoch": epoch,
            "weights": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "history": history,
            "frames": frames,
        }
        try:
            write(self.paths[-1], functools.partial(torch.save, state))
        except (OSError, RuntimeError) as error:  # torch has both for a full disk
            if not self.failed:
                say(f"no checkpoint can be written ({first_line(error)}); the training goes on")
            self.failed = True
        after = time.monotonic()
        self.next_save = after + 20 * (after - now)


# Devices, and the processes of torchrun.


def choose_device(wanted):
    """The device to train on. Each process of torchrun takes a GPU of its own."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    process = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        if wanted == "cuda":
            torch.cuda.set_device(process)
            torch.set_float32_matmul_precision("high")  # TF32
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed for the next line
            # The same numbers each time; operations of others that cannot do so only warn.
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.zeros(1, device=wanted)
    except Exception as error:  # each device has errors of its own
        reason = first_line(error)
        raise Problem(f"--device {wanted}: process {process} finds none ({reason})") from None
    return wanted


def place():
    """(rank, world): which of how many processes this is."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def join(rows):
    """The rows of all seeds in order, from {seed: row} of this and of the other processes."""
    everyone = [rows] * place()[1]
    if len(everyone) > 1:
        say("waiting for the other processes")
        distributed.all_gather_object(everyone, rows)
    together = {}
    for some in everyone:
        together.update(some)
    if "diverged" in together:
        raise FloatingPointError(together["diverged"])
    return [together[seed] for seed in sorted(together)]


def say(text):
    """Print, in the first process of torchrun. A run goes on if nobody reads its output."""
    try:
        if place()[0] == 0:
            print(text, flush=True)
    except OSError:  # such as "| head" when it has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def first_line(error):
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


# Bad input.


def check_fields(experiment):
    """Raises Problem for a field whose value makes no sense."""
    for f in fields(experiment):
        value = getattr(experiment, f.name)
        must_be = f"--{f.name.replace('_', '-')} {value}: must be"
        choices = f.metadata.get("choices")
        kind = type(experiment)
        if getattr(kind, f.name) != f.default:  # a new default that Python would ignore
            raise Problem(
                f"{kind.__name__}.{f.name}: is a field, write {f.name}: ... = setting(...) and "
                f"@dataclass above the class"
            )
        if choices is not None and value not in choices:
            raise Problem(f"{must_be} one of {', '.join(choices)}")
        if f.type in (int, int | None) and value is not None:
            least = 0 if f.name in ("seed", "complete") else 1
            if not isinstance(value, int) or not least <= value < 2**63:
                raise Problem(f"{must_be} a whole number from {least} to 2^63 - 1")
        if f.type is float and not 0 <= value < math.inf:
            raise Problem(f"{must_be} 0 or more, and finite")
    if experiment.lr == 0:
        raise Problem("--lr 0: must be more than 0, or nothing is learned")


def read_facts(source):
    """The pairs (A, B) of a file with a pair a line and a tab between, or of a list of pairs."""
    what = "--facts"
    if isinstance(source, str | Path):
        what = f"--facts {source}"
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Problem(f"{what}: cannot be read as UTF-8 text ({error})") from None
        lines = text.replace("\ufeff", "").split("\n")  # without byte order marks
        source = [line.strip().split("\t") for line in lines if line.strip()]
    if not isinstance(source, list | tuple) or len(source) < 4:
        raise Problem(f"{what}: must be a file of at least 4 pairs, or a list of them")
    facts, left_out = [], []
    known = set()
    for row in source:
        if not is_pair(row):
            raise Problem(f"{what}: must be two names with a tab between, and not {row!r}")
        # Names that look the same are the same: one Unicode form, single blanks.
        pair = tuple(" ".join(unicodedata.normalize("NFC", name).split()) for name in row)
        if pair[0] == pair[1] or known & set(pair):  # a name is a token, and has one partner
            left_out.append(" - ".join(pair))
        else:
            facts.append(pair)
            known.update(pair)
    if left_out:
        say(f"{len(left_out)} pairs left out, with a name seen before: {', '.join(left_out[:5])}")
    if len(facts) < 4:
        raise Problem(f"{what}: has {len(facts)} pairs without a name in common, and needs 4")
    return tuple(facts)


def is_pair(row):
    """Whether this is a list or a tuple of two names."""
    if not isinstance(row, list | tuple) or len(row) != 2:
        return False
    if not all(isinstance(name, str) for name in row):
        return False
    return all(name.strip() for name in row)


# The command line.


def ablate(axis=None, task=None, values=None, preset="laptop", **given):
    """A Sweep with a training for each value of an axis, or of all axes of the paper.

    axis: one of AXES, or the name of any setting of the task, whose values are then needed.
    """
    if task is None:
        task = "chain" if axis == "related-tokens" else "reversal"
    experiment = TASKS[task]
    stem = "ablate" if task == "reversal" else f"ablate-{task}"
    axes = [name for name in AXES if name != "related-tokens" or task == "chain"]
    if "facts" in given:
        given["facts"] = read_facts(given["facts"])  # only once, for it may be a pipe
    trials = {}
    if axis is None:
        if values is not None:
            raise Problem(f"--values: need an axis, such as {', '.join(axes)}")
        for each in axes:
            trials |= ablate(each, task, None, preset, **given).trials
        return Sweep("ablate", stem, trials, {"cosine"})

    axis = axis.replace("_", "-")
    known = {f.name: f for f in fields(experiment)}
    field_of_axis = known.get(axis.replace("-", "_"))
    if axis not in axes and field_of_axis is None:
        raise Problem(f"ablate {axis}: must be one of {', '.join(axes)}, or a flag of {task}")
    if values is None and axis not in AXES:
        raise Problem(f"--values: needed to ablate {axis}")
    for value in AXES[axis] if values is None else values:
        changes = AXES.get(axis, {}).get(str(value))
        if changes is None:
            changes = read_value(field_of_axis, axis, value)
        for name in given:
            if name in changes or name not in known or name == "animate":
                raise Problem(f"--{name.replace('_', '-')}: does not go with ablate {axis}")
        usual = ABLATE_LAPTOP | ABLATE_LAPTOP_OF.get(axis, {})
        if preset == "paper":
            usual = {}
        elif "facts" in given | changes:
            usual = {"seeds": 3}
        trial = experiment.of_preset(preset, **(usual | given | changes))
        trials[f"{axis} {value}"] = trial
    return Sweep("ablate", f"{stem}-{axis}", trials, {"cosine"})


def read_value(f, axis, value):
    """{the setting: its value}, read as the command line would read it."""
    if axis in AXES and (f is None or f.type is bool):
        raise Problem(f"--values {value}: must be one of {', '.join(AXES[axis])}")
    if f.type is bool:
        raise Problem(f"ablate {axis}: has no values, it is a flag that is given or not")
    if f.type in (str, tuple) or not isinstance(value, str):
        return {f.name: value}
    try:
        return {f.name: float(value) if f.type is float else int(value)}
    except ValueError:
        hint = "; write blanks between values" if "," in value else ""
        raise Problem(f"--values {value}: not a value of {axis}{hint}") from None


class Command(NamedTuple):
    """A command: its fields are flags, and `make` turns those given into what is carried out."""

    make: callable  # gives an experiment or a Sweep
    experiment: type  # the class whose fields are the flags
    defaults: dict  # that differ from those of the class
    help: str


TASKS = {"reversal": Reversal, "chain": Chain, "icl": ICL}
COMMANDS = {
    "reversal": Command(
        Reversal.of_preset, Reversal, {}, 'Figures 1 and 2: train "A -> B", ask "B <-"'
    ),
    "chain": Command(
        Chain.of_preset, Chain, {}, 'Figures 3 and 4: train "A -> B" and "B -> C", ask "A ~>"'
    ),
    "icl": Command(ICL.of_preset, ICL, {}, "in-context reversal, where the curse does not appear"),
    "ablate": Command(ablate, Chain, ABLATE_LAPTOP, "Figures 5 to 11: what does not help"),
    "bilinear": Command(
        bilinear, BilinearTheory, {}, "Section 3: the bilinear model, Theorems 1 and 2"
    ),
    "onelayer": Command(onelayer, OneLayerTheory, {}, "Section 4: the one-layer transformer"),
    "cure": Command(cure, Experiment, CURE_LAPTOP, "what breaks the curse, and what does not"),
    "weights": Command(
        four_models, Settings, {"seeds": 1}, "all weights of four models, in one picture"
    ),
    "all": Command(None, Experiment, {}, "all of this; a flag goes to all GPTs that have it"),
}
ALL = [  # what `all` carries out
    ("reversal", {"animate": True, "cosine": True}),
    ("chain", {}),
    ("chain", {"related_tokens": True}),
    ("icl", {}),
    ("bilinear", {"symmetric": True}),
    ("onelayer", {}),
    ("weights", {}),
    ("cure", {}),
    ("ablate", {}),
    ("ablate", {"task": "chain"}),
]


class Parser(argparse.ArgumentParser):
    """Argparse that reports an error in one line."""

    def error(self, message):
        raise Problem(message)


def add_flags(command, experiment, defaults):
    """The fields of an experiment as flags of a command, with the defaults that hold there."""
    for f in fields(experiment):
        flag = f"--{f.name.replace('_', '-')}"
        text = f.metadata["help"]
        default, paper = defaults.get(f.name, f.default), f.metadata["paper"]
        if default not in (None, ()) and f.type is not bool:
            text += f" [{default}]"
        if paper is not None:
            text += f" [paper: {paper}]"
        if f.type is bool:
            command.add_argument(flag, help=text, action="store_true")
        elif f.name == "betas":
            command.add_argument(flag, help=text, type=float, nargs=2)
        elif experiment is BilinearTheory and f.name == "dim":
            command.add_argument("--dims", help="dimensions [16 to 1024]", type=int, nargs="+")
        else:
            kind = {int | None: int, tuple: str}.get(f.type, f.type)
            command.add_argument(flag, help=text, type=kind, choices=f.metadata["choices"])


def parse(argv):
    """(command, {flag: value} of those that are given)."""
    parser = Parser(prog="revcurse.py", description="The reversal curse, made visible.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("plot", help="draw saved results again")
    command.add_argument("files", nargs="+", help="results.json, with its .npz")
    for name, each in COMMANDS.items():
        how = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
        command = commands.add_parser(name, help=each.help, description=each.help, **how)
        if issubclass(each.experiment, Experiment):
            sizes = ("laptop", "paper")
            command.add_argument("--preset", help="sets the other defaults", choices=sizes)
        if name == "ablate":
            axes = f"{', '.join(AXES)}, or any flag of the task [all]"
            command.add_argument("axis", help=axes, nargs="?")
            command.add_argument("--task", help="what to train", choices=("reversal", "chain"))
        if name in ("ablate", "cure"):
            command.add_argument("--values", help="which to try [all]", nargs="+")
        add_flags(command, each.experiment, each.defaults)
    flags = vars(parser.parse_args(argv))
    return flags.pop("command"), flags


def make_plans(command, flags):
    """What a command carries out: experiments and Sweeps."""
    if command != "all":
        return [COMMANDS[command].make(**flags)]
    plans = []
    for name, changes in ALL:
        experiment = COMMANDS[name].experiment
        if issubclass(experiment, Experiment):
            known = {f.name for f in fields(experiment)} | {"preset"}
        else:  # the theory has sizes and rates of its own
            known = {f.name for f in fields(Settings)}
        own = {flag: value for flag, value in flags.items() if flag in known}
        plans.append(COMMANDS[name].make(**(own | changes)))
    return plans


def trials_of(plan):
    """{label: experiment} of an experiment or a Sweep."""
    return plan.trials if isinstance(plan, Sweep) else {plan.stem: plan}


def carry_out_line(argv):
    """Carry out a command line: the labels of the trainings that diverged."""
    command, flags = parse(argv)
    if command == "plot":
        plot(flags["files"])
        return []
    plans = make_plans(command, flags)
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
    elif "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise Problem("RANK or WORLD_SIZE is set, but not by torchrun: unset it")
    for plan in plans:
        for trial in trials_of(plan).values():  # all are checked before the first is trained
            prepare(trial)
    everything = {"command": "all", "claims": [], "trainings": [], "matrices": {}}
    lost = []
    for plan in plans:
        results = carry_out(plan, "all." if command == "all" else "")
        runs = results.get("runs", [results])
        for claim in claims_of(plan.stem, runs):
            everything["claims"].append(claim)
            say("{figure}: {expected}. Seen: {seen}. Holds: {holds}".format(**claim))
        for one in runs:
            everything["trainings"].append(one.get("title", one["value"]))
        lost += [one["value"] for one in runs if one["outcome"] == "diverged"]
    if command == "all" and place()[0] == 0:
        save_results(everything, Path(plans[0].out).expanduser() / "all")
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return lost


def main(argv=None):
    """Carry out a command line, in each process of torchrun: the exit status."""
    with contextlib.suppress(AttributeError):  # a replaced or a closed output
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal lacks
    try:
        lost = carry_out_line(argv)
        if not lost:
            return 0
        message, status = f"{', '.join(lost)}: diverged; try a smaller --lr", 1
    except Problem as problem:
        message, status = problem, 2
    except (OSError, FloatingPointError) as error:
        message, status = error, 1
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():
            raise
        message, status = "out of memory: try a smaller --seeds-at-once or --batch-size", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on", 130
    print(f"revcurse.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
