# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0"]
# ///
"""The reversal curse, made visible: a model trained on "A -> B" cannot answer "B <- A".

After Zhu, Huang, Zhang, Jordan, Jiao, Tian and Russell, "Towards a Theoretical Understanding of
the 'Reversal Curse' via Training Dynamics", NeurIPS 2024 (arXiv 2405.04669). Gradient descent on
cross-entropy raises the weight from A to B and leaves the weight from B to A where it was.

    python revcurse.py reversal --animate           Figures 1 and 2
    python revcurse.py chain                        Figures 3 and 4, and chain of thought
    python revcurse.py icl                          in-context reversal, where there is no curse
    python revcurse.py ablate layers --task chain   Figures 5 to 12: what does not help
    python revcurse.py bilinear --symmetric         Section 3: Theorems 1 and 2
    python revcurse.py onelayer                     Section 4: Theorems 3 and 4
    python revcurse.py all                          all of this, and a table of what was seen
    python revcurse.py plot figures/reversal.json   draw saved results again

`reversal` trains ten small GPTs in TIME seconds on two processor cores. They answer 100 % of the
trained sentences and 0 % of the unseen reversals. --preset paper has the paper's size, for a GPU.

Read from top to bottom, beside the paper; you may stop where Machinery begins. Shapes: S seeds,
B sentences, T tokens that a model reads, D dim, H heads, V ids of the vocabulary, K tokens of an
entity. NLL is the negative log-likelihood, in nats.
"""

import argparse
import base64
import contextlib
import copy
import dataclasses
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

# matplotlib does not load if MPLBACKEND names a backend that is not installed. We need none.
backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

if backend:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

# --------------------------------------------------------------------------------------- Settings
# A command is a class; its fields are its flags. In a notebook: results = run(Reversal(seeds=2)).


class Problem(Exception):
    """Bad input, found before any work: a line for the user, and exit status 2."""


PRESETS = "laptop", "sweep", "paper"  # ablate has many trainings, so its are smaller


def flag(laptop, help, sweep=None, paper=None, choices=None, least=1, nargs=None, positional=False):
    """A setting: its value on a laptop, what it means, and its values in a sweep and in the paper
    where these are others. None stands for a rule, which `help` gives in brackets."""
    return dataclasses.field(default=None, metadata=locals())  # the arguments by their names


@dataclass
class Settings:
    """What every training needs. A field that is not given takes its value from the preset."""

    seeds: int = flag(10, "how many seeds; each has its own data, weights and order", sweep=3)
    seed: int = flag(0, "the first seed, from which the others count up", least=0)
    seeds_at_once: int = flag(None, "how many train side by side, to save memory [all]")
    device: str = flag("auto", "auto is cuda if there is one, else cpu",
                       choices=("auto", "cpu", "cuda", "mps"))
    out: str = flag("figures", "folder of the results")
    quiet: bool = flag(False, "print no progress")

    # Where a command has nothing else to say:
    unseen, preset, loss, entity_length, facts = "unseen sentences", "laptop", "entity", 1, ()
    related_tokens = animate = cosine = model = False
    kept = ()  # matrices that a sweep keeps, if not all

    def given(self):
        """The fields that are not None, {name: value}."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __post_init__(self):
        self.preset = self.preset or self.__dataclass_fields__["preset"].metadata["laptop"]
        for f in fields(self):
            if getattr(self, f.name) is None:
                value = f.metadata[self.preset]
                setattr(self, f.name, f.metadata["laptop"] if value is None else value)
        self.name = self.command + "-related-tokens" * self.related_tokens  # of the results

    def check(self):
        """Raises Problem for a value that makes no sense."""
        for f in fields(self):
            values, choices = getattr(self, f.name), f.metadata["choices"]
            for value in values if isinstance(values, (list, tuple)) else [values]:
                words = f"--{dashed(f.name)} {value}: must be"
                least = f.metadata["least"] if type(value) is int else 0
                if choices and value not in (None, *choices):
                    raise Problem(f"{words} one of {', '.join(choices)}")
                if type(value) in (int, float) and not least <= value < 10**9:
                    raise Problem(f"{words} {least} or more, and finite")

    def altered(self, **sets):
        """A copy with other values."""
        s = copy.copy(self)
        vars(s).update(sets)
        return s

    @property
    def trainings(self):
        """What the command trains, {what it is called: settings}."""
        return {"": self}

    def points(self):
        """The epochs after which to measure: all, or about 80; in the theory ever further apart,
        for a logarithmic axis."""
        share = np.linspace(0, 1, 1 + min(self.epochs, 80))
        epochs = self.epochs * (share if isinstance(self, Experiment) else share**3)
        return np.unique(epochs.round().astype(int)).tolist()

    def make_optimizer(self, weights):
        """Gradient descent. The loss is a mean over the batch, --lr is for each sentence."""
        return torch.optim.SGD(weights, self.lr * self.batch_size)

    def make_data(self, seed):
        """The sentences of one seed."""
        if self.task == "icl":
            return icl_data(self.vocab, self.complete, self.held_out, seed)
        size = self.vocab, self.entity_length, self.complete, self.held_out
        if self.task == "chain":
            return chain_data(*size, self.related_tokens, seed)
        return reversal_data(*size, self.facts, seed)

    def batch_loss(self, model, sentences, K):
        """The loss on a batch (B, T + 1): mean NLL of the last entity, of K tokens, or with --loss
        sequence of all tokens but the first."""
        last = K if self.loss == "entity" else sentences.shape[1] - 1
        return nll(model, sentences, last).mean()


@dataclass
class Experiment(Settings):
    """What the experiments with a GPT need (Section 5; the paper's Tables 3 and 4)."""

    preset: str = flag("laptop", "which defaults the others have",
                       choices=PRESETS)
    vocab: int = flag(800, "entity tokens, a quarter for each alphabet; also 20, 50, 200, 2000",
                      sweep=400, paper=800)
    complete: int = flag(None, "facts trained in full [70 %; 100 of entity length 3, 200 "
                                "of related tokens]")
    held_out: int = flag(None, "facts of which one sentence is asked [30 %; 50, 50]")
    layers: int = flag(2, "transformer blocks; also 1", paper=24)
    heads: int = flag(4, "attention heads", paper=12)
    dim: int = flag(64, "embedding dimension; also 20", paper=768)
    position: str = flag("absolute", "none, learned (absolute) or rotary (relative); all tried",
                         choices=("none", "absolute", "relative"))
    dropout: float = flag(0.0, "share of the activations zeroed in training", paper=0.1)
    freeze_embeddings: bool = flag(False, "do not train the embeddings; also tried")
    tie_embeddings: bool = flag(False, "the output matrix is the token embedding (ours)")
    epochs: int = flag(None, "passes over the training sentences [80, for chain 140, or as "
                              "many as give 480 steps]", paper=3000)
    batch_size: int = flag(64, "sentences a step")
    lr: float = flag(0.01, "learning rate of AdamW", sweep=0.003)
    betas: float = flag((0.9, 0.999), "decay rates of its moments", nargs=2)
    weight_decay: float = flag(0.01, "of AdamW; the authors' 0.9 never reaches theirs")
    loss: str = flag("entity", "on the last entity or on all tokens",
                     choices=("entity", "sequence"))
    cosine: bool = flag(False, "also draw the cosines of the token embeddings")

    def make_model(self, data):
        """A GPT for the sentences of a data set."""
        kind = self.model or GPT
        model = kind(len(data.names), data.sentences.shape[1] - 1, self.layers, self.heads,
                     self.dim, self.position, self.dropout, self.tie_embeddings)
        for part in model.modules():
            if self.freeze_embeddings and isinstance(part, nn.Embedding):
                part.requires_grad_(False)
        return model

    def make_optimizer(self, weights):
        """AdamW for a list of tensors."""
        return torch.optim.AdamW(weights, self.lr, self.betas, weight_decay=self.weight_decay,
                                 fused=self.device != "mps")


@dataclass
class Reversal(Experiment):
    """Figures 1 and 2: train A -> B, ask B <-."""

    entity_length: int = flag(1, "tokens of an entity; also 2, 3")
    facts: str = flag("", "your own pairs: a file of lines A<TAB>B; sets --vocab")
    animate: bool = flag(False, "also draw the heat maps over the training, as a GIF")

    command = task = "reversal"
    unseen, least_epochs = "unseen reversals", 80

    def __post_init__(self):
        if self.facts:  # read only once, for it may be a pipe
            self.facts = read_facts(self.facts) if isinstance(self.facts, str) else self.facts
            self.vocab = self.vocab or 4 * len(self.facts)
        super().__post_init__()


@dataclass
class Chain(Experiment):
    """Figures 3 and 4: train A -> B and B -> C, ask A ~>."""

    lr: float = flag(0.003, "learning rate of AdamW", paper=0.01)
    entity_length: int = flag(1, "tokens of an entity; also 2, 3")
    related_tokens: bool = flag(False, "entities a i, b i, c i that share tokens")
    animate: bool = flag(False, "also draw the heat maps over the training, as a GIF")

    command = task = "chain"
    unseen, least_epochs = 'unseen "A ~> C"', 140


@dataclass
class ICL(Experiment):
    """In-context reversal, where the curse does not appear."""

    vocab: int = flag(400, "entity tokens, a quarter of them for A")
    complete: int = flag(7, "B's that each A is trained with")
    held_out: int = flag(3, "B's that each A is asked with")
    epochs: int = flag(40, "passes over the training sentences", paper=3000)

    command = task = "icl"
    unseen = "new pairs"


@dataclass
class BilinearTheory(Settings):
    """Section 3: the bilinear model, Theorems 1 and 2."""

    vocab: int = flag(100, "entity tokens, a quarter of them x, a quarter y")
    dims: int = flag((16, 32, 64, 128, 256, 512, 1024), "embedding dimensions, a training "
                           "for each", nargs="+")
    symmetric: bool = flag(False, "train also with Theta tied to its transpose")
    epochs: int = flag(1500, "passes over the pairs")
    lr: float = flag(0.08, "the step of each pair")

    command, task, batch_size, complete = "bilinear", "reversal", 10**6, 0

    @property
    def trainings(self):
        return {f"dim {dim}{', symmetric' * tied}": self.altered(
                    dim=dim, symmetric=tied, held_out=self.vocab // 4)
                for tied in sorted({False, self.symmetric}) for dim in self.dims}

    def make_model(self, data):
        """The bilinear model of one dimension."""
        return Bilinear(self.dim, len(data.names), self.symmetric)


@dataclass
class OneLayerTheory(Settings):
    """Section 4: the one-layer transformer, Theorems 3 and 4."""

    vocab: int = flag(100, "entity tokens, a quarter for each alphabet")
    complete: int = flag(3, "pairs trained in both directions", least=0)
    held_out: int = flag(3, "pairs of which one direction is asked")
    epochs: int = flag(400, "passes over the training sentences")
    batch_size: int = flag(1, "sentences a step")
    lr: float = flag(0.25, "the step of each sentence")

    command = "onelayer"

    @property
    def trainings(self):
        total = self.complete + self.held_out  # triples, of which no A ~> C is trained
        return {"reversal": self.altered(task="reversal"),
                "chain": self.altered(task="chain", complete=0, held_out=total)}

    def make_model(self, data):
        """The one-layer transformer."""
        return OneLayer(len(data.names))


# ------------------------------------------------------------------------------------------- Data

# Token ids of the relations "->", "<-", "~>" (chain) and "<=>" (in-context); entities come after.
FORWARD, BACKWARD, INDIRECT, EQUIVALENT = 0, 1, 1, 2


@dataclass
class Dataset:
    """The sentences of one seed as token ids, and what is needed to measure and print them."""

    groups: dict[str, list]  # role: sentences of T + 1 tokens; the last is asked, never trained
    names: list[str]  # how to print each token id
    first: int  # answers are spelled with the ids from here on,
    letters: int  # so many in an alphabet, one alphabet after the other
    answer_length: int = 1  # K: the answer is a sentence's last K tokens
    graded: int = 0  # which of them is measured: the first that tells answers apart

    def __post_init__(self):
        self.groups = {role: torch.as_tensor(rows) for role, rows in self.groups.items()}
        *_, asked = self.groups.values()
        self.sentences = torch.cat(list(self.groups.values()))  # (n, T + 1)
        self.trained = len(self.sentences) - len(asked)  # how many, from the first on


def count_facts(vocab, K, complete, held_out):
    """(complete, held_out): how many pairs or triples; None stands for the paper's number."""
    # 70 % and 30 % of min(letters^K, 2 letters); from K = 3 on 100 and 50, which can be learned.
    letters = vocab // 4
    facts = min(letters**K, 2 * letters)
    most = (facts, facts) if K < 3 else (100, 50)
    complete = min(round(0.7 * facts), most[0]) if complete is None else complete
    held_out = min(facts - round(0.7 * facts), most[1]) if held_out is None else held_out
    if held_out < 1 or complete + held_out > letters**K:
        raise ValueError(f"vocab {vocab}: a quarter of it spells {letters**K} entities of {K} "
                         f"tokens, too few for {complete} complete and {held_out} held-out facts")
    return complete, held_out


def entities(first, letters, K, count, rng):
    """`count` different entities: tuples of K ids from first .. first + letters - 1."""
    # Which token is which makes no difference, as the weights of all tokens start alike: entity i of
    # one token is first + i. Longer ones are drawn by their number, 1 of letters^K.
    numbers = range(count) if K == 1 else rng.sample(range(letters**K), count)
    return [tuple(first + i // letters**k % letters for k in range(K)) for i in numbers]


def token_names(relations, vocab, **alphabets):
    """How to print each id: relations, the letters of each alphabet, and "#": in no sentence."""
    names = [f"{letter}{i}" for letter, count in alphabets.items() for i in range(count)]
    return relations + names + ["#"] * (vocab - len(names))


def reversal_data(vocab=800, entity_length=1, complete=None, held_out=None, facts=(), seed=0):
    """The reversal task (Section 5): a Dataset of sentences "A -> B" and "B <- A".

    vocab counts entity tokens, a quarter for A and a quarter for B; a model needs two ids more.
    facts: vocab // 4 pairs of names. Raises ValueError if the tokens cannot spell the pairs.
    """
    # Both directions of a complete pair are trained. Of a held-out pair one direction, chosen by a
    # coin, is trained and the other is asked. A model that learned from the complete pairs how the
    # arrows belong together would know the answer.
    if facts and (entity_length > 1 or vocab != 4 * len(facts)):
        raise ValueError(f"vocab {vocab}: {len(facts)} facts need {4 * len(facts)}, and "
                         "entity_length 1")
    complete, held_out = count_facts(vocab, entity_length, complete, held_out)
    rng, n, groups = random.Random(seed), vocab // 4, defaultdict(list)
    A, B = (entities(first, n, entity_length, complete + held_out, rng) for first in (2, 2 + n))
    for i, (a, b) in enumerate(zip(A, B)):
        both, roles = [[*a, FORWARD, *b], [*b, BACKWARD, *a]], ["complete A -> B", "complete B <- A"]
        if i >= complete:
            roles = ["held-out, trained", "held-out, asked"]
            rng.shuffle(both)  # the coin
        for role, sentence in zip(roles, both):
            groups[role].append(sentence)
    names = token_names(["->", "<-"], vocab, A=n, B=n)
    for i, pair in enumerate(rng.sample(facts, len(facts))):
        names[2 + i], names[2 + n + i] = pair
    return Dataset(groups, names, 2, n, entity_length)


def chain_data(vocab=800, entity_length=1, complete=None, held_out=None, related_tokens=False,
               seed=0):
    """The chain task (Section 5): a Dataset of "A -> B", "B -> C" and the implied "A ~> C", which is
    asked of held-out triples. Vocabulary, numbers and errors are those of reversal_data."""
    rng, n, groups = random.Random(seed), vocab // 4, defaultdict(list)
    first, K = 2, entity_length
    if related_tokens:  # "a i", "b i", "c i": three tokens for all triples, and an index for each
        complete, held_out, first, K = complete or 200, held_out or 50, 5, 2
        n = complete + held_out
        if 3 + n > vocab or entity_length > 1:
            raise ValueError(f"vocab {vocab}: {complete} complete and {held_out} held-out triples "
                             f"of related tokens need {3 + n}, and entity_length 1")
        triples = [[(token, first + i) for token in (2, 3, 4)] for i in range(n)]
        names = token_names(["->", "~>", "a", "b", "c"], vocab - 3, i=n)
    else:
        complete, held_out = count_facts(vocab, K, complete, held_out)
        triples = zip(*(entities(first + i * n, n, K, complete + held_out, rng) for i in range(3)))
        names = token_names(["->", "~>"], vocab, A=n, B=n, C=n)
    for i, (a, b, c) in enumerate(triples):
        part = "complete" if i < complete else "held-out"
        groups[f"{part} A -> B"].append([*a, FORWARD, *b])
        groups[f"{part} B -> C"].append([*b, FORWARD, *c])
        groups[f"{part} A ~> C"].append([*a, INDIRECT, *c])
    return Dataset(groups, names, first, n, K, graded=int(related_tokens))


def icl_data(vocab=400, complete=7, held_out=3, seed=0):
    """In-context reversal: a Dataset of sentences "A -> B <=> B <- A", of which the last A is asked.
    Raises ValueError if vocab is too small."""
    # Each of vocab // 4 A's meets the same B's; with `held_out` of them, drawn for each A, it is
    # asked, and never trained.
    rng, n, partners = random.Random(seed), vocab // 4, complete + held_out
    if n < 1 or n + partners > vocab:
        raise ValueError(f"vocab {vocab}: too few tokens for {n} A's and {partners} B's")
    groups = defaultdict(list)
    for a in range(3, 3 + n):
        for i, b in enumerate(rng.sample(range(3 + n, 3 + n + partners), partners)):
            sentence = [a, FORWARD, b, EQUIVALENT, b, BACKWARD, a]
            groups["complete" if i < complete else "held-out"].append(sentence)
    names = token_names(["->", "<-", "<=>"], vocab, A=n, B=partners)
    return Dataset(groups, names, 3, n)


# ----------------------------------------------------------------------------------------- Theory
# Theorem 1. For any epsilon, if dim is large enough, L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon at
# all times t of gradient flow: the forward loss L may go to 0, the reversal loss L_rev stays.
# Theorem 2. When the forward loss has become small, the reversal loss is still bounded below.
# Why: for the pair x -> y gradient descent adds x (y - sum_j p_j v_j)^T to Theta. That moves
# x^T Theta y by |x|^2 |y|^2, about 1, but y^T Theta x by products of nearly orthogonal vectors,
# about 1 / dim.


class Bilinear(nn.Module):
    """The bilinear model (Section 3): token ids (..., T), the first is x, to logits (..., 1, V) of y.

        l(y|x) = x^T Theta y,   p(y|x) = exp l(y|x) / sum_j exp l(v_j|x)

    x, y, v_j are fixed, drawn from N(0, I / dim). Theta is trained from 0; with symmetric,
    (Theta + Theta^T) / 2 stands in its place.
    """

    def __init__(self, dim, vocab_size, symmetric=False):
        super().__init__()
        self.symmetric = symmetric
        embeddings = torch.randn(vocab_size, dim, dtype=torch.float64) / math.sqrt(dim)
        if dim > vocab_size:
            # Theta acts in the span of the tokens alone. With E^T = Q R, the rows of R^T are the
            # same vectors in the basis Q: all logits and steps stay the same, and cost less.
            embeddings = torch.linalg.qr(embeddings.mT).R.mT.contiguous()
        self.register_buffer("embeddings", embeddings)  # (V, D)
        self.Theta = nn.Parameter(torch.zeros_like(embeddings.mT @ embeddings))  # (D, D)

    def forward(self, tokens, last=1):
        theta = (self.Theta + self.Theta.mT) / 2 if self.symmetric else self.Theta
        x = self.embeddings[tokens[..., :1]]  # (..., 1, D)
        return x @ theta @ self.embeddings.mT  # x^T Theta v for all v: (..., 1, V)


# Theorem 3. Trained sentences reach a probability near 1, the unseen direction stays at 1/V or below.
# Theorem 4. Of a chain p(B|A) and p(C|B) go to 1, and p(C|A ~>) stays at 1/V or below.
# Why: for "A ->" the context is A alone, so b = 1, f = A, and the answer is row A of Y. Z has no
# gradient. Training on "A -> B" never touches row B: the curse, in one line.


class OneLayer(nn.Module):
    """The one-layer transformer (Section 4, after Tian et al. 2023): token ids (..., T), of which x_T
    is the query and the others are the context, to the logits (..., 1, V) of the next token.

        b = softmax over the context of Z[x_T, x_t],   f = X^T b / |X^T b|,   logits = Y^T f

    X has the one-hot vectors of the context. Y and Z (V, V), 0 at the start, stand for products of
    the usual weights and embeddings.
    """

    def __init__(self, vocab_size):
        super().__init__()
        self.Y = nn.Parameter(torch.zeros(vocab_size, vocab_size, dtype=torch.float64))
        self.Z = nn.Parameter(torch.zeros_like(self.Y))

    def forward(self, tokens, last=1):
        context, query = tokens[..., :-1], tokens[..., -1:]
        b = self.Z[query, context].softmax(-1)  # (..., T - 1)
        X = F.one_hot(context, len(self.Y)).to(b.dtype)  # (..., T - 1, V)
        f = F.normalize(b[..., None, :] @ X, dim=-1)  # X^T b as a row: (..., 1, V)
        return f @ self.Y


def closed_form(times, vocab_size, count):
    """NLL of trained sentences after each of `times` of gradient flow on their mean loss, in both
    models, for orthonormal embeddings. u is the target's logit above any other:

        N/M (exp(u) + (M - 1) u - 1) = t,   NLL = log(1 + (M - 1) exp(-u))
    """
    M, N = vocab_size, count
    # t(u) rises, so u(t) is read off a fine table. Untrained contexts stay at log M.
    u = np.linspace(0, math.log1p(M / N * max(times)), 100_001)
    t = N / M * (np.expm1(u) + (M - 1) * u)
    return np.interp(times, t, np.log1p((M - 1) * np.exp(-u)))


# ------------------------------------------------------------------------------------------ Model


class Attention(nn.Module):
    """Causal self-attention with H heads: softmax(Q K^T / sqrt(D/H)) V, and no token looks ahead.
    rotary: relative positions by turning queries and keys (Su et al. 2021)."""

    causal = True

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.c_attn = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.c_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, last):
        """x (B, T, D) to (B, last, D): what the last tokens gather from all T."""
        B, T, D = x.shape
        # (B, T, 3D) -> (B, T, 3, H, D/H) -> three times (B, H, T, D/H)
        q, k, v = self.c_attn(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        # The query of token t asks and the key of token s answers: q_t . k_s / sqrt(D/H) scores how
        # much t listens to s. Among the s up to t, softmax turns the scores into shares.
        scores = q[:, :, T - last:] @ k.mT / math.sqrt(D // self.heads)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(T - last + 1)  # (last, T)
        # The attention pattern, (B, H, last, T). To see it, print it here.
        shares = scores.masked_fill(future & self.causal, -math.inf).softmax(-1)
        heard = self.dropout(shares) @ v  # (B, H, last, D/H): sum over s of share times v_s
        return self.dropout(self.c_proj(heard.transpose(1, 2).reshape(B, last, D)))

    @staticmethod
    def rotate(x):
        """Turn pair i of token t, x (..., T, D/H), by the angle t * 10000^(-2i / (D/H)). The
        product of a query and a key then depends on the distance of their tokens alone."""
        T, width = x.shape[-2:]
        speed = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
        angle = torch.arange(T, device=x.device)[:, None] * speed  # (T, D/2H)
        pairs = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
        return torch.cat([pairs.real, pairs.imag], -1)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). The MLP takes each token on its
    own from D to 4D, through GELU in its tanh form, and back to D."""

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, rotary, dropout)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(dim, 4 * dim), gelu=nn.GELU("tanh"), c_proj=nn.Linear(4 * dim, dim),
            dropout=nn.Dropout(dropout)))

    def forward(self, x, last):
        x = x[:, -last:] + self.attn(self.ln_1(x), last)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) by hand: token ids (B, T) to logits (B, last, vocab_size).

    position: "none", "absolute" (learned) or "relative" (rotary). T is block_size at most. Raises
    ValueError if dim cannot be divided among the heads.
    """
    # The output matrix is a weight of its own, as in the authors' code, unless tie_embeddings.
    # Parameters are named as in the published GPT-2, which stores linear weights transposed.

    def __init__(self, vocab_size, block_size, layers, heads, dim, position="absolute",
                 dropout=0.0, tie_embeddings=False):
        super().__init__()
        rotary = position == "relative"
        unit = 2 * heads if rotary else heads  # rotary positions turn pairs of entries
        if dim % unit:
            raise ValueError(f"dim {dim}: must be a multiple of {unit}, for {heads} heads and "
                             f"{position} positions")
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, dim), "drop": nn.Dropout(dropout),
            "h": nn.ModuleList(Block(dim, heads, rotary, dropout) for _ in range(layers)),
            "ln_f": nn.LayerNorm(dim)})
        if position == "absolute":
            self.transformer["wpe"] = nn.Embedding(block_size, dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        # GPT-2's start: weights of 0.02, biases 0. Each block adds two projections to the residual
        # stream; theirs are smaller, so that the sum over the layers is not larger.
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif "ln_" not in name:
                shrink = math.sqrt(2 * layers) if "c_proj" in name else 1
                nn.init.normal_(weight, 0, 0.02 / shrink)

    def forward(self, tokens, last=None):
        """Logits after the `last` last of the tokens; after each of them if None."""
        # The final block computes no more than these need. That saves a tenth of the training.
        parts, T = self.transformer, tokens.shape[1]
        x = parts.wte(tokens)  # (B, T, D)
        if "wpe" in parts:
            x = x + parts.wpe.weight[:T]
        x = parts.drop(x)
        *blocks, final = parts.h
        for block in blocks:
            x = block(x, T)
        return self.lm_head(parts.ln_f(final(x, last or T)))  # (B, last, V)


# --------------------------------------------------------------------------------------- Training

NLL_CEILING = -math.log(1e-50)  # the authors clip p at 1e-50, so their curves saturate at 115
PART = 200  # sentences measured at a time: they stay in a processor's cache, and need little memory


def nll(model, sentences, last):
    """-log p of the last tokens, each given those before it: (B, T + 1) to (B, last)."""
    log_p = model(sentences[:, :-1], last).log_softmax(-1)  # (B, last, V)
    return -log_p.gather(-1, sentences[:, -last:, None])[..., 0]


# A model and a loss are written for one seed. torch.func stacks the weights of all S models, and
# vmap runs them side by side, each as it would run alone. One optimizer is enough: the losses are
# summed, no seed's loss has a gradient for another seed's weights, and AdamW and SGD treat each
# number by itself. Only dropout masks depend on who trains beside a seed.


def train(s, models, datasets, seeds, label="", path=None, record=None):
    """Train a model for each seed, all at once, each on its own data and in its own order. Returns
    the NLL of all sentences at all s.points(), (S, points, n, K), and what record(first model) gave."""
    module, K, N = models[0], datasets[0].answer_length, datasets[0].trained
    sentences = torch.stack([data.sentences for data in datasets]).to(s.device)  # (S, n, T + 1)
    weights, buffers = stack_module_state([model.to(s.device) for model in models])
    optimizer = s.make_optimizer([each for each in weights.values() if each.requires_grad])
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    keeper = Keeper(s, label, path, weights, optimizer, orders)
    start, measured, frames = keeper.load()
    state = weights | buffers  # {name: (S, ...)}
    first = {name: each[0] for name, each in state.items()}

    def bind(state):  # the model with these weights
        return lambda *inputs: functional_call(module, state, inputs)

    def each_seed(function, tokens):  # function(model, tokens) of each seed, tokens (S, B, T)
        if len(models) == 1:  # without vmap a large model is twice as fast on a processor
            return function(bind(first), tokens[0])[None]
        return vmap(lambda state, tokens: function(bind(state), tokens),
                    randomness="different")(state, tokens)

    for epoch in range(start, s.epochs + 1):
        keeper.save(epoch, measured, frames)
        if epoch in s.points():
            module.eval()
            with torch.no_grad():
                losses = [each_seed(lambda model, part: nll(model, part, K), part)
                          for part in sentences.split(PART, 1)]
                measured.append(torch.cat(losses, 1).clamp(max=NLL_CEILING))  # (S, n, K)
                frames += [record(bind(first))] if record else []
        keeper.show(epoch, measured[-1], N)
        if epoch == s.epochs:
            break
        # Shuffle. Each seed has its own order; the asked sentences, from N on, are never trained.
        module.train()
        order = torch.stack([torch.randperm(N, generator=g) for g in orders]).to(s.device)
        for rows in order.split(s.batch_size, 1):  # (S, B)
            batch = sentences.take_along_dim(rows[..., None], 1)  # (S, B, T + 1)
            optimizer.zero_grad()
            each_seed(lambda model, batch: s.batch_loss(model, batch, K), batch).sum().backward()
            optimizer.step()
    for i, model in enumerate(models):
        model.eval().load_state_dict({name: each[i] for name, each in weights.items()}, False)
    return torch.stack(measured, 1), frames


# -------------------------------------------------------------------------------------- Measuring


def rank(logits, targets, first, letters):
    """Place of the target's logit in its own alphabet, 1 the highest: (B, V), (B,) to (B,). Equal
    logits do not count against it. Alphabets of `letters` ids begin at the id `first`."""
    begin = targets - (targets - first) % letters  # where its alphabet begins
    own = logits.gather(1, begin[:, None] + torch.arange(letters, device=logits.device))
    return 1 + (own > logits.gather(1, targets[:, None])).sum(1)


def grade(model, sentences, data):
    """(accuracy, mean rank) on sentences (B, T + 1). In a right answer every token is the likeliest."""
    K, at, found = data.answer_length, data.graded, []
    for part in sentences.split(PART):
        logits, targets = model(part[:, :-1], K), part[:, -K:]
        right = (logits.argmax(-1) == targets).all(1)
        place = rank(logits[:, at], targets[:, at], data.first, data.letters)
        found.append(torch.stack([right, place]))
    return torch.cat(found, 1).double().mean(1).tolist()


def heat_maps(model, data, most=None):
    """Figures 2 and 4: {role: (n, n)}. Entry (i, j) is the logit of the entity that ends sentence j,
    after the entity alone that begins sentence i."""
    K, maps = data.answer_length, {}
    for role, rows in data.groups.items():
        rows = rows[:most]
        maps[role] = torch.cat([model(part[:, :K], 1)[:, 0, rows[:, data.graded - K]]
                                for part in rows.split(PART)])
    return maps


def chain_of_thought(model, asked, data):
    """Accuracy on held-out triples "A ~> C" (B, T + 1): asked for C at once, "A ~>", and in two
    steps, "A ->" and then "B ->" with the model's own B."""
    K, arrow = data.answer_length, torch.full_like(asked[:, :1], FORWARD)
    tokens = torch.hstack([asked[:, :K], arrow])  # A ->
    for _ in range(K):  # B, token by token
        tokens = torch.hstack([tokens, model(tokens, 1).argmax(-1)])
    steps = torch.hstack([tokens[:, -K:], arrow, asked[:, -K:]])  # B -> C
    return {"direct_accuracy": grade(model, asked, data)[0],
            "two_step_accuracy": grade(model, steps, data)[0]}


# ------------------------------------------------------------------------------------ Experiments


def prepare(s):
    """Check all that can be checked without training. Returns (settings with all rules applied, data
    of the first seed, a model without memory)."""
    s.check()
    s = s.altered(device=choose_device(s.device))
    try:
        data = s.make_data(s.seed)
        with torch.device("meta"):
            model = s.make_model(data)
        s.batch_size = min(s.batch_size, data.trained)
        s.make_optimizer(list(model.parameters()))
    except ValueError as error:  # of a piece or of PyTorch, about a parameter
        raise Problem(error) from None
    steps = math.ceil(data.trained / s.batch_size)  # of an epoch
    s.epochs = s.epochs or max(s.least_epochs, math.ceil(480 / steps))
    return s, data, model


def experiment(s, keep=None, value=""):
    """Train a model for each seed, and measure what it knows. This is all of reversal, chain, icl."""
    s, data, model = prepare(s)
    asked, size = len(data.sentences) - data.trained, sum(w.numel() for w in model.parameters())
    title = f"{s.command}{', ' * bool(value)}{value}: {s.seeds} seeds, {s.epochs} epochs"
    say(f"{title}, {data.trained} sentences to train and {asked} to ask, {size:,} parameters")
    rows, record, began = {}, None, time.monotonic()
    for seeds, label, path in divide(s, keep, value):
        datasets, models = [], []
        for seed in seeds:
            with torch.device(s.device):
                datasets.append(s.make_data(seed))
            torch.manual_seed(seed)
            models.append(s.make_model(data))
        if s.animate:
            record = partial(heat_maps, data=datasets[0], most=SHOWN)
        losses, frames = train(s, models, datasets, seeds, label, path, record)
        for i, seed in enumerate(seeds):
            rows[seed] = measure(s, models[i], datasets[i], losses[i], frames)
        if not value and seeds[0] == s.seed:
            examples(models[0], datasets[0])
    results = {"value": value, "title": title, **summarize(s, data, join(rows))}
    results |= {"verdict": verdict(results), "seconds": time.monotonic() - began}
    say(results["verdict"])
    return results


@torch.no_grad()
def measure(s, model, data, losses, frames):
    """What one seed knows: ({name: number or curve}, {name: matrix})."""
    K, N, found, maps = data.answer_length, data.trained, {}, {}
    for part, rows in [("train", slice(N)), ("validation", slice(N, None))]:
        sentences, own = data.sentences[rows], losses[:, rows]  # (points, n, K)
        found[f"{part}_accuracy"], found[f"{part}_rank"] = grade(model, sentences, data)
        found[f"{part}_nll"] = own[..., data.graded].mean(1).tolist()
        if K > 1:
            found[f"{part}_word_nll"] = own.sum(2).mean(1).tolist()
    if s.command == "chain":
        found |= chain_of_thought(model, sentences, data)
    if s.command in ("reversal", "chain", "bilinear"):
        maps = heat_maps(model, data)
    for role, matrix in maps.items():
        on = torch.eye(len(matrix), dtype=torch.bool, device=s.device)
        found[f"diagonal {role}"] = matrix[on].mean().item()
        found[f"off_diagonal {role}"] = matrix[~on].mean().nan_to_num().item()
    if s.command == "onelayer":
        maps["Y"] = model.Y
    if s.cosine:
        vectors = F.normalize(model.transformer.wte.weight, dim=-1)
        maps["cosine"] = vectors @ vectors.mT  # Figure 11
        found["cosine"] = maps["cosine"].abs().median().item()
    for role in data.groups if frames else ():
        maps[f"frames {role}"] = torch.stack([frame[role] for frame in frames])
    return found, {name: matrix.half().cpu().numpy() for name, matrix in maps.items()}


def summarize(s, data, rows):
    """The results, from what measure gives of each seed."""
    summary, curves, weights = {}, {"epoch": s.points()}, {}
    for name, one in rows[0][0].items():
        values = [found[name] for found, _ in rows]
        if isinstance(one, list):
            curves[name], values = values, [curve[-1] for curve in values]
        summary[name] = {"mean": np.mean(values), "std": np.std(values), "per_seed": values}
    for role in data.groups:
        if f"diagonal {role}" in summary:
            weights[role] = {side: summary.pop(f"{side} {role}")["mean"]
                             for side in ("diagonal", "off_diagonal")}
    return {
        "command": s.command, "config": vars(s), "unseen": s.unseen,
        "environment": {"torch": torch.__version__, "device": s.device},
        "counts": {"train": data.trained, "validation": len(data.sentences) - data.trained},
        "chance": {"vocabulary": math.log(len(data.names)), "alphabet": math.log(data.letters)},
        "summary": summary, "weights": weights, "curves": curves, "matrices": rows[0][1],
        "names": {role: [[data.names[row[0]], data.names[row[-1]]] for row in group]
                  for role, group in data.groups.items() if s.facts}}


def examples(model, data):
    """Print held-out facts in words: the question, and p of the model's answer and the right one."""
    at = data.graded - data.answer_length  # of the graded token in a sentence
    for role, rows in data.groups.items():
        for row in rows[:3] if "held-out" in role else ():
            p = model(row[None, :at], 1)[0, 0].softmax(0)
            *question, said, right = (data.names[i] for i in [*row[:at], p.argmax(), row[at]])
            say(f"  {role}: {' '.join(question)} ?  {said} (p = {p.max():.2g}); "
                f"right is {right} (p = {p[row[at]]:.2g})")


def verdict(results):
    """What the seeds show on average, in a sentence or two."""
    mean = {name: number["mean"] for name, number in results["summary"].items()}
    asked, guess = mean["validation_accuracy"], results["chance"]["alphabet"]
    word = ("Not learned yet" if mean["train_accuracy"] < 0.99
            else "The curse" if asked < 0.1 and mean["validation_nll"] > guess
            else "No curse" if asked > 0.9 else "Some curse")
    text = ("{}: {train_accuracy:.1%} of the trained sentences are answered right (NLL "
            "{train_nll:.3f}), and {validation_accuracy:.1%} of the {} (NLL {validation_nll:.2f}; "
            "a guess within the alphabet has {:.2f})")
    if "direct_accuracy" in mean:
        text += ('. Asked "A ~>" at once, {direct_accuracy:.1%} of the held-out triples are '
                 'answered right; in two steps, "A ->" and then "B ->", {two_step_accuracy:.1%}')
    return text.format(word, results["unseen"], guess, **mean)


@dataclass
class Ablate(Chain, Reversal):
    """Figures 5 to 12: a training for each value of a setting, the axis."""

    axis: str = flag(None, "vocab, entity-length, layers, heads, position, embeddings, size, "
                     "related-tokens, or any flag of the task", positional=True)
    task: str = flag(None, "what to train [chain for related-tokens, else reversal]",
                     choices=("reversal", "chain"))
    values: str = flag(None, "what to try; the axes above have values of their own",
                             nargs="+")

    command, trainings = "ablate", {}
    axes = {
        "vocab": "20 50 200 2000",
        "entity-length": "2 3",
        "layers": "1 2 4 8",
        "heads": "1 2 4 8",
        "position": "none absolute relative",
        "embeddings": "learned frozen tied",
        "size": "1x20 1x256 12x20",
        "related-tokens": "10 20 50 100 200 500",
    }
    paper = {"layers": "1 12 24", "heads": "1 6 12", "size": "1x20 1x768 24x20"}
    own = {"entity-length": {"vocab": 200, "epochs": 300}, "related-tokens": {"vocab": 800}}

    def __post_init__(self):
        given = self.given()
        super().__post_init__()
        self.check()
        self.task = self.task or ("chain" if self.axis == "related-tokens" else "reversal")
        kind, self.trainings = COMMANDS[self.task][0], {}
        self.name = f"ablate-{'chain-' * (self.task == 'chain')}{self.axis}"
        axes, own = self.axes | self.paper, {}
        if self.preset == "laptop":
            axes, own = self.axes, {"preset": "sweep"} | self.own.get(self.axis, {})
        names = given.keys() - {"axis", "task", "values"}
        given = {name: getattr(self, name) for name in names}  # facts as they were read
        for value in map(str, self.values or axes.get(self.axis, "").split()):
            sets = self.vary(value)
            for name in {*names, "preset"} & {*sets, "animate"} | names - {*kind.__dataclass_fields__}:
                raise Problem(f"--{dashed(name)}: does not go with ablate {self.axis} of {self.task}")
            self.trainings[f"{self.axis} {value}"] = kind(**own | given | sets)
        if not self.trainings:
            raise Problem(f"--values: needed to ablate {self.axis}")

    def vary(self, value):
        """The fields that a value of the axis sets, {name: value}, read as on the command line."""
        if self.axis == "embeddings" and value in ("learned", "frozen", "tied"):
            return {"freeze_embeddings": value == "frozen", "tie_embeddings": value == "tied"}
        words = [f"--{self.axis}", *value.split(",")]
        if self.axis == "size":
            layers, _, dim = value.partition("x")
            words = ["--layers", layers, "--dim", dim, "--heads", "4", "--cosine"]
        if self.axis == "related-tokens":
            words = ["--related-tokens", "--complete", value]
        return parse([self.task, *words])[1]


def sweep(s, keep=None):
    """Carry out the trainings of a command, one after the other."""
    runs, matrices = [], {}
    for value, settings in s.trainings.items():
        runs.append(experiment(settings, keep, value))
        for name, matrix in runs[-1].pop("matrices").items():
            if s.command != "ablate" or name == "cosine":  # its heat maps would be too many
                matrices[f"{value}: {name}"] = matrix
    return {"command": s.command, "config": runs[0]["config"], "runs": runs, "matrices": matrices}


def theory(s, keep=None):
    """bilinear and onelayer: hold the curves of each dimension or task against the theorems."""
    results = sweep(s, keep)
    runs = results["runs"]
    for run in runs:
        epochs, L, L_rev = (np.array(run["curves"][name])  # (points,), (S, points), (S, points)
                            for name in ("epoch", "train_nll", "validation_nll"))
        N, start = run["counts"]["train"], run["chance"]["vocabulary"]  # L(0) = L_rev(0) = log V
        times = epochs * s.lr * N  # of gradient flow on the mean loss
        expected = closed_form(times, round(math.exp(start)), N)
        # Theorem 1, L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon, holds from this epsilon on.
        needed = np.log(L_rev[:, 1:] / start) / np.log(L[:, 1:] / start)
        run |= {"dim": run["config"].get("dim"), "symmetric": run["config"].get("symmetric", False),
                "epsilon": max(0.0, needed.max()), "closed_form_gap": abs(L - expected).max(),
                "reversal_shift": abs(L_rev[:, -1] - start).mean(),
                "trained_probability_min": math.exp(-L[:, -1].max()),
                "unseen_probability_max": math.exp(-L_rev.min()), "guess": math.exp(-start),
                "curves": {"time": times.tolist(), "forward_nll": L.tolist(),
                           "reversal_nll": L_rev.tolist(), "closed_form": [expected.tolist()]}}
        say("{value}: Theorem 1 holds with epsilon {epsilon:.4f}; p of trained sentences is "
            "{trained_probability_min:.3f} or more, of unseen ones never above "
            "{unseen_probability_max:.4f}, where a guess has {guess:.4f}; the closed form is "
            "within {closed_form_gap:.3f}".format(**run))
    return results | {"summary": {
        "trained_probability_min": min(run["trained_probability_min"] for run in runs),
        "unseen_probability_max": runs[0]["unseen_probability_max"],
        "chain_unseen_probability_max": runs[-1]["unseen_probability_max"], "chance": run["guess"],
        "closed_form_gap": max(run["closed_form_gap"] for run in runs)}}


# The paper's figures, and the commands that draw them.
FIGURES = """
1, 2            reversal --animate --cosine
3, 4            chain --animate
5               ablate vocab
6, 7, 9         ablate layers
6, 7, 9         ablate heads
6, 7, 9         ablate position
6, 7, 9         ablate embeddings
8               ablate entity-length
10, 11          ablate size
12 on           icl
12 on           chain --related-tokens
12 on           ablate related-tokens
12 on           ablate vocab --task chain
12 on           ablate layers --task chain
12 on           ablate heads --task chain
12 on           ablate position --task chain
12 on           ablate embeddings --task chain
12 on           ablate entity-length --task chain
12 on           ablate size --task chain
Theorems 1, 2   bilinear --symmetric
Theorems 3, 4   onelayer
"""


@dataclass
class All(Experiment):
    """Every figure, and a table of what is seen in them. A flag goes to each command that has it."""

    command, trainings = "all", {}

    def __post_init__(self):
        given, self.plans, self.trainings = self.given(), {}, {}
        super().__post_init__()
        for line in FIGURES.strip().splitlines():
            command, own = parse(line[16:].split())
            kind = COMMANDS[command][0]
            names = given.keys() & {*kind.__dataclass_fields__}
            plan = kind(**own | {name: given[name] for name in names})
            self.plans[plan.name] = line[:16].strip(), plan
            for value, settings in plan.trainings.items():
                self.trainings[plan.name, value] = settings


def everything(s, keep=None):
    """Carry out all, and hold each verdict against what must be seen."""
    # It is the curse, but not where the context has the answer, tokens are related or Theta is
    # symmetric.
    claims = []
    for name, (figure, plan) in s.plans.items():
        results = run(plan, keep and Path(f"{keep}.{name}"))
        for one in results.get("runs", [results]):
            free = name == "icl" or "related" in name or one.get("symmetric")
            claim = "No curse" if free else "The curse"
            claims.append({"figure": figure, "claim": f"{name} {one['value']}: {claim}",
                           "measured": one["verdict"], "holds": one["verdict"].startswith(claim)})
            say("| {figure} | {claim} | {measured} | {holds} |".format(**claims[-1]))
    return {"command": "all", "claims": claims, "matrices": {}}


COMMANDS = {
    "reversal": (Reversal, experiment), "chain": (Chain, experiment), "icl": (ICL, experiment),
    "ablate": (Ablate, sweep), "bilinear": (BilinearTheory, theory),
    "onelayer": (OneLayerTheory, theory), "all": (All, everything),
}


# --------------------------------------------------------------------------------------- Plotting
# From the results alone: a saved file is drawn just as a run is.

SHOWN = 40  # pairs in a heat map; of more, the diagonal is thinner than the eye can see
STYLE = {"axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "figure.titlesize": 10, "figure.constrained_layout.use": True, "legend.fontsize": 8,
         "legend.frameon": False}


# How to draw a curve of a run: its label and style.
CURVES = {
    "train_nll": ("trained", {"color": "tab:blue"}),
    "validation_nll": ("unseen", {"color": "tab:orange"}),
    "train_word_nll": ("trained, whole entity", {"color": "tab:blue", "ls": ":"}),
    "validation_word_nll": ("unseen, whole entity", {"color": "tab:orange", "ls": ":"}),
    "forward_nll": ("trained", {"color": "tab:blue"}),
    "reversal_nll": ("unseen", {"color": "tab:orange"}),
    "closed_form": ("trained, closed form", {"color": "black", "ls": ":"}),
}


def draw_panel(axes, run):
    """Figure 1: NLL of trained and of unseen sentences, and of two ways to guess. A curve is the mean
    of the seeds, with a band from the lowest to the highest."""
    (x, points), *curves = run["curves"].items()  # x is the epoch, in the theory the time
    for name, seeds in curves:
        label, style = CURVES[name]
        axes.fill_between(points, np.min(seeds, 0), np.max(seeds, 0), alpha=0.25, lw=0,
                          color=style["color"])
        axes.plot(points, np.mean(seeds, 0), label=label, **style)
    for kind, dashes in [("vocabulary", "--"), ("alphabet", "-.")]:
        axes.axhline(run["chance"][kind], color="gray", ls=dashes, label=f"a guess in the {kind}")
    axes.set(xlabel=x, ylabel="NLL of the answer (nats)", title=run["title"], ylim=(0, None),
             xlim=(points[0], points[-1]))
    if x == "time":
        axes.set(xscale="log", xlim=(points[1], points[-1]))


def draw_curves(runs):
    """Figures 1, 3, 5 to 10: a panel for each run."""
    columns = len(runs) if len(runs) < 4 else math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(3 + 3 * columns, 1.5 + 2.7 * rows))
    for i, run in enumerate(runs, 1):
        draw_panel(figure.add_subplot(rows, columns, i), run)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_matrices(figure, rows, matrices, label, **style):
    """Heat maps {title: matrix} with one colour bar: their images."""
    images = []
    for i, (title, matrix) in enumerate(matrices.items(), 1):
        axes = figure.add_subplot(rows, len(matrices) // rows, i, title=title)
        axes.locator_params(nbins=4, integer=True, min_n_ticks=1)
        images.append(axes.imshow(matrix.astype(float), **style))
    figure.colorbar(images[-1], ax=figure.axes, shrink=0.6, label=label)
    return images


def draw_maps(results):
    """Figures 2 and 4: logits after an entity alone; the curse is the missing diagonal. Returns
    (figure, images, subplot of the curves)."""
    maps = {role: results["matrices"][role][:SHOWN, :SHOWN] for role in results["weights"]}
    figure, columns = Figure(figsize=(4 + 1.5 * len(maps), 5)), len(maps) // 2
    left, right = figure.subfigures(1, 2, width_ratios=(columns, 1))
    images = draw_matrices(left, 2, maps, "logit of answer j after question i", vmin=0, cmap="magma",
                           vmax=max(matrix.max() for matrix in maps.values()))
    for image, pairs in zip(images, results["names"].values()):
        for axis, names in zip((image.axes.yaxis, image.axes.xaxis), zip(*pairs[:SHOWN])):
            # An axis is about 130 points long. A name may be long, or have a "$" in it.
            short = [name if len(name) < 18 else f"{name[:16]}..." for name in names]
            axis.set_ticks(range(len(short)), short, fontsize=min(8, 130 / len(short)),
                           parse_math=False)
            image.axes.tick_params(axis="x", rotation=90)
    curves = right.subplots()
    draw_panel(curves, results)
    right.legend(loc="outside lower center")
    figure.suptitle(f"logits of the first seed, {SHOWN} pairs at most")
    return figure, images, curves


def draw_animation(results):
    """The same over the training."""
    figure, images, curves = draw_maps(results | {"names": {}})
    epochs, now = results["curves"]["epoch"], curves.axvline(0, color="black", lw=1)

    def show(i):
        for image, role in zip(images, results["weights"]):
            image.set_data(results["matrices"][f"frames {role}"][i].astype(float))
        now.set_xdata([epochs[i], epochs[i]])
        figure.suptitle(f"{results['command']} task after epoch {epochs[i]}")

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was laid out stays where it is
    for image in images:  # without ticks it is drawn twice as fast
        image.axes.set(xticks=[], yticks=[])
    shown = np.unique(np.linspace(0, len(epochs) - 1, 25).round().astype(int))
    return FuncAnimation(figure, show, [*shown, *[shown[-1]] * 6])  # the end stays a while


def draw_grid(maps, label, **style):
    """Heat maps {title: matrix} in a row."""
    figure = Figure(figsize=(2 + 3 * len(maps), 4))
    draw_matrices(figure, 1, maps, label, **style)
    return figure


class Figures(dict):
    """{end of the file name: figure or animation}. A notebook shows them."""

    def save(self, stem):
        """Write them to files, whose paths are returned. Missing letters are one hint."""
        paths = [Path(f"{stem}{end}") for end in self]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for path, figure in zip(paths, self.values()):
                if path.suffix == ".gif":
                    write(path, lambda path: figure.save(path, PillowWriter(fps=4), dpi=80))
                else:
                    write(path, lambda path: figure.savefig(path, dpi=150))
                say(f"wrote {path}")
        if any("Glyph" in str(warning.message) for warning in caught):
            say("matplotlib's font lacks some of the letters: set font.family in a matplotlibrc")
        return paths

    def _repr_html_(self):
        with tempfile.TemporaryDirectory() as folder:
            files = [base64.b64encode(path.read_bytes()).decode()
                     for path in self.save(f"{folder}/figure")]
        return "".join(f'<img src="data:image;base64,{file}">' for file in files)


@matplotlib.rc_context(STYLE)
def draw(results):
    """All figures of a run."""
    if "claims" in results:
        return Figures()
    runs, matrices = results.get("runs", [results]), results["matrices"]
    figures = Figures({".png": draw_curves(runs)})
    if "epsilon" in runs[0]:
        figures["_weights.png"] = draw_grid(dict([*matrices.items()][-4:]), "logit", cmap="magma")
    cosines = {name: matrix for name, matrix in matrices.items() if "cosine" in name}
    if cosines:  # Figure 11
        figures["_cosine.png"] = draw_grid(cosines, "cosine of two token embeddings", vmin=-1,
                                           vmax=1, cmap="RdBu_r")
    if results.get("weights"):
        figures["_weights.png"] = draw_maps(results)[0]
        if results["config"]["animate"]:
            figures[".gif"] = draw_animation(results)
    return figures


# -------------------------------------------------------------------------------------- Machinery
# You may stop reading here: this is about files, processes and the command line.


def dashed(name):
    """A field's name as the command line has it."""
    return name.replace("_", "-")


def say(*words):
    """Print, in the first process of torchrun. A run outlives the reader of its output."""
    try:
        if place()[0] == 0:
            print(*words)
            sys.stdout.flush()
    except AttributeError:  # an output that cannot be flushed, or none
        pass
    except OSError:  # such as "| head" when it has enough
        sys.stdout = open(os.devnull, "w")


def choose_device(wanted):
    """The device to train on. Each process of torchrun takes a GPU of its own."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if wanted == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32
        torch.zeros(1, device=wanted)
    except Exception:  # each device has errors of its own
        raise Problem(f"--device {wanted}: torch {torch.__version__} finds none here") from None
    return wanted


def read_facts(path):
    """The pairs (A, B) of a file with a pair a line and a tab between."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"--facts {path}: cannot be read as UTF-8 text ({error})") from None
    facts, bad, left_out, seen = [], [], [], set()
    for number, line in enumerate(lines, 1):
        names = [name.strip() for name in line.rstrip().split("\t")]
        if len(names) != 2 or not all(names):
            bad += [str(number)] if line.strip() else []
        elif len({*names} - seen) < 2:  # a name is a token, and has one partner
            left_out.append(" - ".join(names))
        else:
            facts.append(names)
            seen |= {*names}
    if bad or len(facts) < 4:
        raise Problem(f"--facts {path}: has {len(facts)} pairs, and 4 are needed; not two names "
                      f"with a tab between in {len(bad)} lines ({', '.join(bad[:5])})")
    if left_out:
        say(f"{len(left_out)} pairs are left out, for one of their names was there before: "
            f"{', '.join(left_out[:5])}")
    return facts


def place():
    """(rank, world): which of how many processes this is."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def divide(s, keep, value):
    """(seeds, label, path of the checkpoint) of each training. It is one, of all seeds, unless
    --seeds-at-once or the processes of torchrun divide them."""
    rank, world = place()
    mine = range(s.seed, s.seed + s.seeds)[rank::world]
    size = s.seeds_at_once or s.seeds
    for i in range(0, len(mine), size):
        seeds = mine[i:i + size]
        label = f"{value or s.command}, from seed {seeds[0]}"
        yield seeds, label, keep and Path(f"{keep}.{label.replace('/', '-')}.pt")


def join(rows):
    """The rows of all seeds in order, from {seed: row} of this and of the other processes."""
    everyone = [rows] * place()[1]
    if len(everyone) > 1:
        say("waiting for the other processes")
        distributed.all_gather_object(everyone, rows)
    rows = {seed: row for some in everyone for seed, row in some.items()}
    return [rows[seed] for seed in sorted(rows)]


class Keeper:
    """The progress of one training, and its checkpoint, from which it can go on."""

    def __init__(self, s, label, path, weights, optimizer, orders):
        self.s, self.label, self.path, self.weights, self.optimizer = (
            s, label, path, weights, optimizer)
        self.settings = repr({**vars(s), "out": "", "quiet": ""})  # what makes another run
        self.generators = [*orders, torch.default_generator, *torch.cuda.default_generators]
        self.began = self.saved = time.monotonic()
        self.shown = 0

    def load(self):
        """(epoch to begin with, what was measured so far, frames so far)"""
        if not (self.path and self.path.exists()):
            return 0, [], []
        try:
            settings, weights, moments, states, *done = torch.load(self.path, weights_only=True)
        except Exception:  # whatever a damaged file leads to
            settings = None
        if settings != self.settings:
            raise Problem(f"{self.path} is of an unfinished run with other flags, or damaged: "
                          "delete it, or give another --out")
        for name, tensor in self.weights.items():
            tensor.data.copy_(weights[name])
        self.optimizer.load_state_dict(moments)
        for generator, state in zip(self.generators, states):
            generator.set_state(state)
        say(f"{self.label}: going on after epoch {done[0]}")
        return done

    def save(self, *done):
        """Every half minute, and at the end, so that a sweep keeps what is done."""
        if self.path and (done[0] == self.s.epochs or time.monotonic() > self.saved + 30):
            states = [generator.get_state() for generator in self.generators]
            state = self.settings, self.weights, self.optimizer.state_dict(), states, *done
            write(self.path, partial(torch.save, state))
            self.saved = time.monotonic()

    def show(self, epoch, losses, N):
        """Say the progress, ever more seldom. Raises FloatingPointError for a loss that is not a number."""
        trained, asked = losses[:, :N, 0].mean().item(), losses[:, N:, 0].mean().item()
        if math.isnan(trained + asked):
            raise FloatingPointError(f"{self.label}: the loss is not a number after epoch {epoch}: "
                                     "try a smaller --lr")
        passed, last = time.monotonic() - self.began, epoch == self.s.epochs
        if not self.s.quiet and (last or passed > self.shown + max(5, passed / 20)):
            self.shown = passed
            say(f"{self.label}: epoch {epoch} of {self.s.epochs}, NLL of trained sentences "
                f"{trained:.4f}, of asked ones {asked:.3f}, {passed:.0f} s")


def write(path, how):
    """Let how(path) write a file: it appears whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        how(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(s, keep=None):
    """Carry out a command, such as Reversal(seeds=2). Returns what the results file holds, with the
    matrices; draw(results) shows them. Files are written if `keep`, for checkpoints, is given."""
    for training in s.trainings.values():
        prepare(training)
    if keep:
        try:
            keep.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=keep.parent).close()
        except OSError as error:
            raise Problem(f"--out {s.out}: {error}") from None
    gpu = torch.cuda.is_available() and torch.cuda.get_device_name()
    say(f"{s.name} on {choose_device(s.device)} ({gpu or 'there is no CUDA GPU'})")
    results = COMMANDS[s.command][1](s, keep)
    if keep and place()[0] == 0:  # numbers first, then the pictures, which can be drawn again
        stem, numbers = Path(s.out, s.name), dict(results)
        matrices = numbers.pop("matrices")
        if matrices:
            write(Path(f"{stem}.npz"), lambda path: np.savez_compressed(path, **matrices))
        write(Path(f"{stem}.json"), lambda path: path.write_text(json.dumps(numbers, indent=1)))
        say(f"wrote {stem}.json")
        try:
            draw(results).save(stem)
        except Exception as error:  # LaTeX, a folder in the way, a full disk
            raise OSError(f"a picture failed ({error}), but the numbers are safe: revcurse.py plot "
                          f"{stem}.json draws them") from None
    return results


def plot(files):
    """Draw saved results again, without training."""
    for file in files:
        stem = file.removesuffix(".json")
        try:
            results = json.loads(Path(file).read_text())
            results["matrices"] = {}
            if Path(f"{stem}.npz").exists():
                with np.load(f"{stem}.npz") as arrays:
                    results["matrices"] = dict(arrays)
            draw(results).save(stem)
        except Exception as error:  # a strange file can go wrong in every way
            raise Problem(f"{file}: not a results file, or damaged ({error!r})") from None


class Parser(argparse.ArgumentParser):
    """Argparse that tells an error in one line."""

    def error(self, message):
        raise Problem(message)


def parse(argv):
    """(command, {flag: value} of those that are given). A command has the fields of its class."""
    parser = Parser(prog="revcurse.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("plot", help="draw saved results again")
    command.add_argument("files", nargs="+", help="results.json, with its .npz")
    for name, (kind, _) in COMMANDS.items():
        command = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__,
                                      argument_default=argparse.SUPPRESS, allow_abbrev=False)
        for f in fields(kind):
            about = f.metadata
            text = about["help"] + "".join(
                f" [{about[preset]}{', ' * (preset != 'laptop')}]" for preset in PRESETS
                if str(about[preset]) not in ("None", "False", ""))
            how = {"action": "store_const", "const": True} if f.type is bool else {
                "type": f.type, "nargs": about["nargs"], "choices": about["choices"]}
            command.add_argument(f.name if about["positional"] else f"--{dashed(f.name)}",
                                 help=text.replace("%", "%%"), **how)
    flags = vars(parser.parse_args(argv))
    return flags.pop("command"), flags


def main(argv=None):
    """Carry out a command line, in each process of torchrun: the exit status."""
    with contextlib.suppress(AttributeError):  # a replaced or a closed output
        sys.stdout.reconfigure(errors="replace")  # letters that the terminal lacks
    try:
        command, flags = parse(argv)
        if command == "plot":
            plot(**flags)
            return 0
        s = COMMANDS[command][0](**flags)
        if distributed.is_torchelastic_launched():
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        elif "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            raise Problem("RANK or WORLD_SIZE is set, but not by torchrun: unset it")
        keep = Path(s.out, f".{s.name}")
        run(s, keep)
        if place()[1] > 1:
            distributed.barrier()
        for path in keep.parent.glob(f"{keep.name}.*.pt"):
            path.unlink(missing_ok=True)
        return 0
    except Problem as problem:
        message, status = problem, 2
    except (OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        message, status = error, 1
        if isinstance(error, RuntimeError):
            if "memory" not in str(error):
                raise
            message = "out of memory: try a smaller --seeds-at-once or --batch-size"
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on", 130
    print(f"revcurse.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
