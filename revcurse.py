# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0"]
# ///
"""The reversal curse, made visible: a model trained on "A -> B" cannot answer "B <- A".

After Zhu, Huang, Zhang, Jordan, Jiao, Tian and Russell, "Towards a Theoretical Understanding of
the 'Reversal Curse' via Training Dynamics", NeurIPS 2024 (arXiv 2405.04669). Gradient descent on
cross-entropy raises the weight from A to B and leaves the weight from B to A where it was.

    python revcurse.py reversal --animate           Figures 1 and 2, in about 20 seconds
    python revcurse.py chain                        Figures 3 and 4, and chain of thought
    python revcurse.py icl                          in-context reversal, where there is no curse
    python revcurse.py ablate layers --task chain   Figures 5 to 12: what does not help
    python revcurse.py bilinear --symmetric         Section 3: Theorems 1 and 2
    python revcurse.py onelayer                     Section 4: Theorems 3 and 4
    python revcurse.py cure                         what does help
    python revcurse.py all                          all of this, and a table of what was seen

Ten small GPTs answer more than 99 % of the sentences they were trained on, and 0 % of the unseen
reversals. Read beside the paper, down to Machinery. Shapes: S seeds, B sentences, T tokens that a
model reads, D dim, H heads, V ids of the vocabulary, K tokens of an entity. NLL is in nats.
"""

import argparse
import base64
import contextlib
import copy
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # it may name one that is not installed; we need none
import matplotlib  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# --------------------------------------------------------------------------------------- Settings
# A command is a class; its fields are its flags. In a notebook: results = run(Reversal(seeds=2)).


class Problem(Exception):
    """Bad input, found before any work: a line for the user, and exit status 2."""


def flag(laptop, help, paper=None, choices=None, least=1, nargs=None):
    """A setting: its value on a laptop (None: by a rule), what it means, its value in the paper."""
    return field(default=None, metadata=locals())  # the arguments by their names


@dataclass
class Settings:
    """What every training needs. A field that is not given takes its value from the preset."""
    seeds: int = flag(10, "how many seeds; each has its own data, weights and order")
    seed: int = flag(0, "the first seed, from which the others count up", least=0)
    seeds_at_once: int = flag(None, "how many train side by side, to save memory [all]")
    device: str = flag("auto", "auto: cuda if any, else cpu", choices=("auto", "cpu", "cuda"))
    out: str = flag("figures", "folder of the results")
    quiet: bool = flag(False, "print no progress")

    # Where a command has nothing else to say:
    unseen, preset, loss, entity_length, facts = "unseen sentences", "laptop", "entity", 1, ()
    related_tokens = animate = cosine = keep = False
    expected, setting, measurements, causal, plans = "The curse", "common", 40, True, ()
    about = only = ""  # only: the matrices that a sweep keeps, if not all
    def given(self):
        """What is set, {name: value}; without the methods that a cure changes."""
        return {name: value for name, value in vars(self).items()
                if value is not None and not callable(value)}

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is None:
                value = self.preset == "paper" and f.metadata["paper"]
                setattr(self, f.name, value or f.metadata["laptop"])
        self.label = self.name = self.command + "-related-tokens" * self.related_tokens
        if self.related_tokens:
            self.expected = "No curse"

    def check(self):
        """Raises Problem for a value that makes no sense."""
        for f in fields(self):
            choices, least = f.metadata["choices"], f.metadata["least"] if f.type is int else 0
            for value in np.ravel(getattr(self, f.name)).tolist():
                words = f"--{f.name.replace('_', '-')} {value}: must be"
                if choices and value not in (None, *choices):
                    raise Problem(f"{words} one of {', '.join(choices)}")
                if type(value) in (int, float) and not least <= value < math.inf:
                    raise Problem(f"{words} {least} or more, and finite")

    def altered(self, **sets):
        s = copy.copy(self)
        vars(s).update(sets)
        return s

    @property
    def trainings(self):
        """What the command trains, {what it is called: settings}."""
        return {"": self}

    def points(self):
        """The epochs after which to measure, ever further apart."""
        share = np.linspace(0, 1, self.measurements) ** 2
        return np.unique(np.rint(self.epochs * share).astype(int)).tolist()

    def make_optimizer(self, weights):
        # Gradient descent. The loss is a mean over the batch, --lr is for each sentence.
        return torch.optim.SGD(weights, self.lr * self.batch_size)

    def make_data(self, seed):
        if self.task == "icl":
            return icl_data(self.vocab, self.complete, self.held_out, seed)
        size = self.vocab, self.entity_length, self.complete, self.held_out
        if self.task == "chain":
            return chain_data(*size, self.related_tokens, seed)
        return reversal_data(*size, self.facts, seed)

    def batch_loss(self, model, sentences, data):
        """Mean NLL of a batch (B, T + 1): of the last entity, or of all tokens but the first."""
        last = data.answer_length if self.loss == "entity" else sentences.shape[1] - 1
        return nll(model, sentences, last)


@dataclass
class Experiment(Settings):
    """What the experiments with a GPT need (Section 5; the paper's Tables 3 and 4)."""
    preset: str = flag("laptop", "which defaults the others have", choices=("laptop", "paper"))
    vocab: int = flag(800, "entity tokens, a quarter for each alphabet; also 20, 50, 200, 2000")
    complete: int = flag(None, "facts trained in full [70 %%; 100 of length 3; 200 if related]")
    held_out: int = flag(None, "facts of which one is asked [30 %%; 50 of length 3; 50 if related]")
    layers: int = flag(2, "transformer blocks; in the paper also 1", paper=24)
    heads: int = flag(4, "attention heads", paper=12)
    dim: int = flag(64, "embedding dimension; in the paper also 20", paper=768)
    position: str = flag("absolute", "relative: rotary", choices=("none", "absolute", "relative"))
    dropout: float = flag(0.0, "share of the activations zeroed in training", paper=0.1)
    freeze_embeddings: bool = flag(False, "do not train the embeddings; in the paper also tried")
    tie_embeddings: bool = flag(False, "the output matrix is the token embedding (ours)")
    epochs: int = flag(None, "passes over the sentences [80, chain 140, or 480 steps]", paper=3000)
    batch_size: int = flag(64, "sentences a step")
    lr: float = flag(0.01, "learning rate of AdamW")
    betas: float = flag((0.9, 0.999), "decay rates of its moments", nargs=2)
    weight_decay: float = flag(0.01, "of AdamW; the authors' flag of 0.9 never reaches it")

    def make_model(self, data):
        model = GPT(len(data.names), data.sentences.shape[1] - 1, self.layers, self.heads,
                    self.dim, self.position, self.dropout, self.tie_embeddings)
        for part in model.modules():
            if isinstance(part, Attention):
                part.causal = self.causal
            if isinstance(part, nn.Embedding):
                part.requires_grad_(not self.freeze_embeddings)
        return model

    def make_optimizer(self, weights):
        return torch.optim.AdamW(weights, self.lr, self.betas, weight_decay=self.weight_decay,
                                 fused=True)


@dataclass
class Task(Experiment):
    """What reversal, chain and icl have in common."""
    loss: str = flag("entity", "on the last entity, or on all", choices=("entity", "sequence"))
    cosine: bool = flag(False, "also draw the cosines of the token embeddings")


@dataclass
class Facts(Task):
    """What reversal and chain have in common."""
    entity_length: int = flag(1, "tokens of an entity; in the paper also 2 and 3")
    animate: bool = flag(False, "also draw the heat maps over the training, as a GIF")


@dataclass
class Reversal(Facts):
    """Figures 1 and 2: train A -> B, ask B <-."""
    facts: str = flag("", "your own pairs: a file of lines A<TAB>B; sets --vocab")
    command = task = "reversal"
    unseen, least_epochs = "unseen reversals", 80

    def __post_init__(self):
        if isinstance(self.facts, str):  # read only once, for it may be a pipe
            self.facts = read_facts(self.facts)
        if self.facts:
            self.vocab = self.vocab or 4 * len(self.facts)
        super().__post_init__()


@dataclass
class Chain(Facts):
    """Figures 3 and 4: train A -> B and B -> C, ask A ~>."""
    lr: float = flag(0.003, "learning rate of AdamW", paper=0.01)
    related_tokens: bool = flag(False, "entities a i, b i, c i that share tokens")
    command = task = "chain"
    unseen, least_epochs = 'unseen "A ~> C"', 140


@dataclass
class ICL(Task):
    """In-context reversal, where the curse does not appear."""
    vocab: int = flag(400, "entity tokens, a quarter of them for A")
    complete: int = flag(7, "B's that each A is trained with")
    held_out: int = flag(3, "B's that each A is asked with")
    epochs: int = flag(40, "passes over the training sentences", paper=3000)
    command = task = "icl"
    unseen, expected = "new pairs", "No curse"


@dataclass
class BilinearTheory(Settings):
    """Section 3: the bilinear model, Theorems 1 and 2."""
    vocab: int = flag(100, "entity tokens, a quarter of them x, a quarter y")
    dims: int = flag((16, 32, 64, 128, 256, 512, 1024), "embedding dimensions", nargs="+")
    symmetric: bool = flag(False, "train also with Theta tied to its transpose")
    epochs: int = flag(1500, "passes over the pairs")
    lr: float = flag(0.08, "the step of each pair")
    command, task, batch_size, complete = "bilinear", "reversal", 10**6, 0

    @property
    def trainings(self):
        return {f"dim {dim}{', symmetric' * tied}": self.altered(
                    dim=dim, symmetric=tied, held_out=self.vocab // 4,
                    expected="No curse" if tied else "The curse")
                for dim in self.dims for tied in sorted({False, self.symmetric})}

    def make_model(self, data):
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
        return {"reversal": self.altered(task="reversal"),
                "chain": self.altered(task="chain", complete=0,  # no A ~> C is trained
                                      held_out=self.complete + self.held_out)}

    def make_model(self, data):
        return OneLayer(len(data.names))


# ------------------------------------------------------------------------------------------- Data
# Token ids of the relations "->", "<-", "~>" (chain) and "<=>" (in-context); entities come after.
FORWARD, BACKWARD, INDIRECT, EQUIVALENT = 0, 1, 1, 2


@dataclass
class Dataset:
    """The sentences of one seed as token ids, and what is needed to measure and print them."""
    groups: dict  # role: sentences of T + 1 tokens; the last is asked, never trained
    names: list  # how to print each token id
    first: int  # answers are spelled with the ids from here on,
    letters: int  # so many in an alphabet, one alphabet after the other
    answer_length: int = 1  # K: the answer is a sentence's last K tokens
    graded: int = 0  # which of them is measured: the first that tells answers apart

    def __post_init__(self):
        self.groups = {role: torch.as_tensor(rows) for role, rows in self.groups.items()}
        *trained, asked = self.groups.values()
        self.sentences = torch.cat([*trained, asked])  # (n, T + 1)
        self.trained = len(self.sentences) - len(asked)  # how many, from the first on


def draw_facts(vocab, K, complete, held_out, alphabets, rng):
    """(how many are complete, facts): a fact is a tuple of entities, an entity of K ids."""
    # None: 70 % and 30 % of min(letters^K, 2 letters); from K = 3 on 100 and 50, to be learnable.
    letters = vocab // 4
    share, most = (0.7, 2 * letters) if K < 3 else (2 / 3, min(150, 2 * letters))
    facts = min(letters**K, most)
    complete = round(share * facts) if complete is None else complete
    held_out = facts - round(share * facts) if held_out is None else held_out
    count, spelled = complete + held_out, range(min(letters**K, sys.maxsize))
    if held_out < 1 or count > len(spelled):
        raise ValueError(f"vocab {vocab}: a quarter of it spells {len(spelled)} entities of {K} "
                         f"tokens, too few for {complete} complete and {held_out} held-out facts")
    # Which token is which makes no difference, as the weights of all tokens start alike: entity i
    # of one token is letter i. Longer ones are drawn by their number, 1 of letters^K.
    entities = []
    for first in range(2, 2 + alphabets * letters, letters):
        numbers = range(count) if K == 1 else rng.sample(spelled, count)
        entities.append([tuple(first + i // letters**k % letters for k in range(K))
                         for i in numbers])
    return complete, zip(*entities)


def token_names(relations, vocab, **alphabets):
    """How to print each id: relations, the letters of each alphabet, and "#": in no sentence."""
    names = [f"{letter}{i}" for letter, count in alphabets.items() for i in range(count)]
    return relations + names + ["#"] * (vocab - len(names))


def reversal_data(vocab=800, entity_length=1, complete=None, held_out=None, facts=(), seed=0):
    """The reversal task (Section 5): a Dataset of sentences "A -> B" and "B <- A".
    vocab counts entity tokens, a quarter for A and a quarter for B; a model needs two ids more.
    facts: vocab // 4 pairs of names. Raises ValueError if the tokens cannot spell the pairs."""
    # Both directions of a complete pair are trained; of a held-out pair one, chosen by a coin. From
    # the complete pairs a model could learn that the arrows are inverses, and infer the other one.
    if facts and (entity_length > 1 or vocab != 4 * len(facts)):
        raise ValueError(f"vocab {vocab}: {len(facts)} facts need {4 * len(facts)}, of one token")
    rng, n, groups = random.Random(seed), vocab // 4, defaultdict(list)
    complete, pairs = draw_facts(vocab, entity_length, complete, held_out, 2, rng)
    for i, (a, b) in enumerate(pairs):
        both = [[*a, FORWARD, *b], [*b, BACKWARD, *a]]
        roles = "complete A -> B", "complete B <- A"
        if i >= complete:
            roles = "held-out, trained", "held-out, asked"
            rng.shuffle(both)  # the coin
        for role, sentence in zip(roles, both):
            groups[role].append(sentence)
    names = token_names(["->", "<-"], vocab, A=n, B=n)
    for i, pair in enumerate(rng.sample(facts, len(facts))):
        names[2 + i], names[2 + n + i] = pair
    return Dataset(groups, names, 2, n, entity_length)


def chain_data(vocab=800, entity_length=1, complete=None, held_out=None, related_tokens=False,
               seed=0):
    """The chain task (Section 5): a Dataset of "A -> B", "B -> C" and the implied "A ~> C", which
    is asked of held-out triples. Vocabulary, numbers and errors are those of reversal_data."""
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
        complete, triples = draw_facts(vocab, K, complete, held_out, 3, rng)
        names = token_names(["->", "~>"], vocab, A=n, B=n, C=n)
    for i, (a, b, c) in enumerate(triples):
        part = "complete" if i < complete else "held-out"
        groups[f"{part} A -> B"].append([*a, FORWARD, *b])
        groups[f"{part} B -> C"].append([*b, FORWARD, *c])
        groups[f"{part} A ~> C"].append([*a, INDIRECT, *c])
    return Dataset(groups, names, first, n, K, graded=int(related_tokens))


def icl_data(vocab=400, complete=7, held_out=3, seed=0):
    """In-context reversal: a Dataset of sentences "A -> B <=> B <- A", whose last A is asked."""
    # Each A meets the same B's. With `held_out` of them, drawn for each A, it is only asked.
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
# Theorem 1. For any epsilon, if dim is large enough, L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon
# at all times t of gradient flow: the forward loss L may go to 0, the reversal loss L_rev stays.
# Theorem 2. When the forward loss has become small, the reversal loss is still bounded below.
# Why: for x -> y gradient descent adds x (y - sum_j p_j v_j)^T to Theta. That moves x^T Theta y by
# |x|^2 |y|^2, about 1, but y^T Theta x by products of nearly orthogonal vectors, about 1 / dim.


class Bilinear(nn.Module):
    """The bilinear model (Section 3): token ids (..., T), x the first, to logits (..., 1, V) of y.
        l(y|x) = x^T Theta y,   p(y|x) = exp l(y|x) / sum_j exp l(v_j|x)
    x, y, v_j are drawn from N(0, I / dim) and, as in the theorems, not trained. Theta is trained
    from 0; with symmetric, (Theta + Theta^T) / 2 stands in its place."""

    def __init__(self, dim, vocab_size, symmetric=False, train_embeddings=False):
        super().__init__()
        self.symmetric = symmetric
        embeddings = torch.randn(vocab_size, dim, dtype=torch.float64) / math.sqrt(dim)
        if dim > vocab_size:
            # With E^T = Q R, the rows of R^T are the same vectors in fewer coordinates.
            embeddings = torch.linalg.qr(embeddings.mT).R.mT
        self.embeddings = nn.Parameter(embeddings, train_embeddings)  # (V, D)
        self.Theta = nn.Parameter(torch.zeros_like(embeddings.mT @ embeddings))  # (D, D)

    def forward(self, tokens, last=1):
        theta = (self.Theta + self.Theta.mT) / 2 if self.symmetric else self.Theta
        x = self.embeddings[tokens[..., :1]]  # (..., 1, D)
        return x @ theta @ self.embeddings.mT  # x^T Theta v for all v: (..., 1, V)


# Theorem 3. Trained sentences reach a probability near 1, unseen ones stay at 1/V or below.
# Theorem 4. Of a chain p(B|A) and p(C|B) go to 1, and p(C|A ~>) stays at 1/V or below.
# Why: for "A ->" the context is A alone, so b = 1, f = A, and the answer is row A of Y. Z has no
# gradient. Training on "A -> B" never touches row B: the curse, in one line.


class OneLayer(nn.Module):
    """The one-layer transformer (Section 4, after Tian et al. 2023): token ids (..., T), the last,
    x_T, is the query and the others are the context, to logits (..., 1, V) of the next token.
        b = softmax over the context of Z[x_T, x_t],   f = X^T b / |X^T b|,   logits = Y^T f

    X has the one-hot vectors of the context. Y and Z (V, V), 0 at the start, stand for products of
    the usual weights and embeddings."""

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


def closed_form(times, M, N):
    """NLL of N trained sentences after each of `times` of gradient flow on their mean loss, in both
    models, for M orthonormal embeddings. u is the target's logit above any other:
        N/M (exp(u) + (M - 1) u - 1) = t,   NLL = log(1 + (M - 1) exp(-u))"""
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
        # The attention pattern, (B, H, last, T). To see it, print it below, with --seeds 1.
        shares = scores.masked_fill(future & self.causal, -math.inf).softmax(-1)
        heard = self.dropout(shares) @ v  # (B, H, last, D/H): sum over s of share times v_s
        return self.dropout(self.c_proj(heard.transpose(1, 2).reshape(B, last, D)))

    @staticmethod
    def rotate(x):
        """Turn pair i of token t, x (..., T, D/H), by the angle t * 10000^(-2i / (D/H))."""
        T, width = x.shape[-2:]
        speed = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
        angle = torch.arange(T, device=x.device)[:, None] * speed  # (T, D/2H)
        pairs = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
        return torch.cat([pairs.real, pairs.imag], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): from D to 4D, through GELU, and back to D."""

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
    ValueError if dim cannot be divided among the heads."""
    # The output matrix is a weight of its own, as in the authors' code, unless tie_embeddings.
    # Parameters are named as in the published GPT-2, which stores linear weights transposed.

    def __init__(self, vocab_size, block_size, layers, heads, dim, position="absolute",
                 dropout=0.0, tie_embeddings=False):
        super().__init__()
        rotary = position == "relative"
        unit = heads * (1 + rotary)  # rotary positions turn pairs of entries
        if dim % unit:
            raise ValueError(f"dim {dim}: must be a multiple of {unit} for {position} positions")
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, dim), "drop": nn.Dropout(dropout),
            "h": nn.ModuleList(Block(dim, heads, rotary, dropout) for _ in range(layers)),
            "ln_f": nn.LayerNorm(dim)})
        if position == "absolute":
            self.transformer["wpe"] = nn.Embedding(block_size, dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        # GPT-2's start: weights of 0.02, smaller for the two sums of each block, to keep x small.
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


def nll(model, sentences, last=1):
    """Mean -log p of the last tokens of sentences (B, T + 1), each given those before it."""
    logits, targets = model(sentences[:, :-1], last), sentences[:, -last:]  # (B, last, V)
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


# A model and a loss are written for one seed; vmap runs the stacked weights of all S side by side,
# each as it would run alone, but for dropout masks. One optimizer is enough: no seed's loss has a
# gradient for another seed's weights, and AdamW and SGD treat each number by itself.


def train(s, models, datasets, seeds, record=None):
    """Train a model for each seed, each on its own data and in its own order. Returns what evaluate
    gives of all sentences at all s.points(), (S, points, n, 3, K), and each record(first model)."""
    module, data = models[0], datasets[0]
    sentences = torch.stack([data.sentences for data in datasets]).to(s.device)  # (S, n, T + 1)
    models = [model.to(s.device) for model in models]
    alone = len(models) == 1  # without vmap a large model is twice as fast on a processor
    weights = dict(module.named_parameters()) if alone else stack_module_state(models)[0]
    optimizer = s.make_optimizer([each for each in weights.values() if each.requires_grad])
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    keeper = Keeper(s, seeds, weights, optimizer, orders)
    start, measured, frames = keeper.load()

    def own(i):  # the weights of seed i, from (S, ...)
        return weights if alone else {name: each[i] for name, each in weights.items()}
    def bind(state):  # the model with these weights
        return lambda *inputs: functional_call(module, state, inputs)
    def each_seed(function, tokens):  # function(model, tokens, data) of each seed, tokens (S, B, T)
        if alone:
            return function(bind(own(0)), tokens[0], data)[None]
        return vmap(lambda state, tokens: function(bind(state), tokens, data),
                    randomness="different")(weights, tokens)

    for epoch in range(start, s.epochs + 1):
        if epoch in s.points()[len(measured):]:
            module.eval()
            with torch.no_grad():
                parts = [each_seed(evaluate, part) for part in sentences.split(PART, 1)]
                measured.append(torch.cat(parts, 1))  # (S, n, 3, K)
                frames += [record(bind(own(0)))] if record else []
        keeper.keep(epoch, measured, frames)
        if epoch == s.epochs:
            break
        # Shuffle. Each seed has its own order; the asked sentences, which come last, are not in it.
        module.train()
        order = torch.stack([torch.randperm(data.trained, generator=g) for g in orders])
        for rows in order.to(s.device).split(s.batch_size, 1):  # (S, B)
            batch = sentences.take_along_dim(rows[..., None], 1)  # (S, B, T + 1)
            optimizer.zero_grad()
            each_seed(s.batch_loss, batch).sum().backward()
            optimizer.step()
    for i, model in enumerate(models):
        model.eval().load_state_dict(own(i), False)
    return torch.stack(measured, 1), frames


# -------------------------------------------------------------------------------------- Measuring


def evaluate(model, sentences, data):
    """NLL, right or not, and rank in its alphabet, of each token of the answers: (B, 3, K)."""
    K = data.answer_length
    logits, targets = model(sentences[:, :-1], K), sentences[:, -K:, None]  # (B, K, V), (B, K, 1)
    picked = logits.gather(-1, targets)
    wrong = (logits.logsumexp(-1, keepdim=True) - picked).clamp(max=NLL_CEILING)
    begin = targets - (targets - data.first) % data.letters  # of its alphabet, if it is in one
    own = logits.gather(-1, begin.clamp(0) + torch.arange(data.letters, device=logits.device))
    rank = 1 + (own > picked).sum(-1, keepdim=True)
    return torch.cat([wrong, logits.argmax(-1, keepdim=True) == targets, rank], -1).mT


def heat_maps(model, data, most=None):
    """Figures 2 and 4: {role: (n, n)}, logits of the answer of j after the entity of i alone."""
    K, maps = data.answer_length, {}
    for role, rows in data.groups.items():
        rows = rows[:most]
        maps[role] = torch.cat([model(part[:, :K], 1)[:, 0, rows[:, data.graded - K]]
                                for part in rows.split(PART)])
    return maps


def chain_of_thought(model, asked, data):
    """Accuracy on "A ~> C" (B, T + 1) in two steps: "A ->", then "B ->" of the model's own B."""
    K, arrow = data.answer_length, torch.full_like(asked[:, :1], FORWARD)
    tokens = torch.hstack([asked[:, :K], arrow])  # A ->
    for _ in range(K):  # B, token by token
        tokens = torch.hstack([tokens, model(tokens, 1).argmax(-1)])
    steps = torch.hstack([tokens[:, -K:], arrow, asked[:, -K:]])  # B -> C
    return evaluate(model, steps, data)[:, 1].prod(1).mean().item()


# ------------------------------------------------------------------------------------ Experiments


def prepare(s):
    """Check before any work: (settings by all rules, data of the first seed, an empty model)."""
    s.check()
    s = s.altered(device=choose_device(s.device))
    try:
        data = s.make_data(s.seed)
        with torch.device("meta"):
            model = s.make_model(data)
        s.batch_size = min(s.batch_size, data.trained)
        s.make_optimizer(model.parameters())
    except ValueError as error:  # raised by the data, the model or the optimizer
        raise Problem(error) from None
    steps = math.ceil(data.trained / s.batch_size)  # of an epoch
    s.epochs = s.epochs or max(s.least_epochs, math.ceil(480 / steps))
    s.steps = s.epochs * steps
    return s, data, model


def experiment(s):
    """Train a model for each seed, and measure what it knows: all of reversal, chain and icl."""
    s, data, model = prepare(s)
    cost = {"sentences": data.trained, "steps": s.steps,
            "parameters": sum(w.numel() for w in model.parameters() if w.requires_grad)}
    title = f"{s.label}: {s.seeds} seeds, {s.epochs} epochs"
    say(f"{title} of {data.trained} sentences, {cost['parameters']:,} parameters"
        f"{', ' * bool(s.about)}{s.about}")
    rows, record, began = {}, None, time.monotonic()
    # All seeds train at once, unless --seeds-at-once or the processes of torchrun divide them.
    process, processes = place()
    mine = range(s.seed, s.seed + s.seeds)[process::processes]
    size = s.seeds_at_once or s.seeds
    for i in range(0, len(mine), size):
        seeds = mine[i:i + size]
        datasets, models = [], []
        for seed in seeds:
            with torch.device(s.device):
                datasets.append(s.make_data(seed))
            torch.manual_seed(seed)
            models.append(s.make_model(data))
        if s.animate:
            record = partial(heat_maps, data=datasets[0], most=SHOWN)
        losses, frames = train(s, models, datasets, seeds, record)
        for j, seed in enumerate(seeds):
            rows[seed] = measure(s, seed, models[j], datasets[j], losses[j], frames)
        if s.label == s.name and seeds[0] == s.seed:
            examples(models[0], datasets[0])
    results = {"value": s.label, "title": title, "cost": cost, **summarize(s, data, join(rows))}
    results["verdict"] = verdict(results)
    results["seconds"] = cost["seconds"] = time.monotonic() - began
    say(results["verdict"])
    return results


@torch.no_grad()
def measure(s, seed, model, data, seen, frames):
    """What one seed knows: ({name: number or curve}, {name: matrix})."""
    K, N, n = data.answer_length, data.trained, len(data.sentences)
    found, maps, parts = {}, {}, {"train": slice(N), "validation": slice(N, n)}
    if s.command == "cure":  # the other direction of the asked facts
        parts["seen"] = slice(2 * N - n, N)
    for part, rows in parts.items():
        own = seen[:, rows]  # (points, n, 3, K)
        found[f"{part}_nll"] = own[:, :, 0, data.graded].mean(1).tolist()
        found[f"{part}_accuracy"] = own[-1, :, 1].prod(1).mean().item()
        found[f"{part}_rank"] = own[-1, :, 2, data.graded].mean().item()
        if K > 1:
            found[f"{part}_word_nll"] = own[-1, :, 0].sum(1).mean().item()
    if s.command == "chain":
        found["direct_accuracy"] = found["validation_accuracy"]
        found["two_step_accuracy"] = chain_of_thought(model, data.sentences[N:], data)
    if isinstance(s, Experiment) and not s.freeze_embeddings:
        torch.manual_seed(seed)
        start = next(s.make_model(data).to(s.device).parameters())  # the input vectors
        cosines = F.cosine_similarity(start, next(model.parameters()))
        found["asked_cosine"] = cosines[data.sentences[N:, 0]].min().item()
    if s.cosine:  # Figure 11
        vectors = F.normalize(model.transformer.wte.weight, dim=-1)
        maps["cosine"] = vectors @ vectors.mT
    if s.command == "onelayer":
        maps["Y"] = model.Y
    elif s.command != "icl":
        maps |= heat_maps(model, data)
    for role in data.groups if frames else ():
        maps[f"frames {role}"] = torch.stack([frame[role] for frame in frames])
    return found, {name: matrix.half().cpu().numpy() for name, matrix in maps.items()}


def summarize(s, data, rows):
    """The results, from what measure gives of each seed. Heat maps are of the first."""
    summary, curves, weights, matrices = {}, {"epoch": s.points()}, {}, rows[0][1]
    for name, one in rows[0][0].items():
        values = [found[name] for found, _ in rows]
        if isinstance(one, list):
            curves[name], values = values, [curve[-1] for curve in values]
        summary[name] = {"mean": np.mean(values), "std": np.std(values), "per_seed": values}
    for role in data.groups:
        if role in matrices:
            n, on = len(matrices[role]), matrices[role].trace(dtype=float)
            off = (matrices[role].sum(dtype=float) - on) / max(1, n * n - n)
            weights[role] = {"diagonal": on / n, "off_diagonal": off}
    return {
        "command": s.command, "setting": s.setting, "config": s.given(), "unseen": s.unseen,
        "expected": s.expected,
        "environment": {"torch": torch.__version__, "device": s.device},
        "counts": {"train": data.trained, "validation": len(data.sentences) - data.trained},
        "chance": {"vocabulary": math.log(len(data.names)), "alphabet": math.log(data.letters)},
        "summary": summary, "weights": weights, "curves": curves, "matrices": matrices,
        "names": {role: [[data.names[row[0]], data.names[row[-1]]] for row in group]
                  for role, group in data.groups.items() if s.facts}}


def examples(model, data):
    """Print unseen facts in words: a question, the model's answer and the right one."""
    names, at = data.names, data.graded - data.answer_length  # of the graded token in a sentence
    for row in data.sentences[data.trained:][:3]:
        p = model(row[None, :at], 1)[0, 0].softmax(0)
        question = " ".join(names[i] for i in row[:at])
        say(f"  {question} ?  {names[p.argmax()]} (p = {p.max():.2g}); "
            f"right is {names[row[at]]} (p = {p[row[at]]:.2g})")


def verdict(results):
    """What the seeds show on average, in a sentence or two."""
    mean = {name: number["mean"] for name, number in results["summary"].items()}
    asked, guess = mean["validation_accuracy"], results["chance"]["alphabet"]
    word = ("Not learned yet" if mean["train_accuracy"] < 0.99
            else "The curse" if asked < 0.1 and mean["validation_nll"] > guess
            else "No curse" if asked > 0.9 else "Some curse")
    text = (f"{word}: {mean['train_accuracy']:.1%} of the trained sentences are answered right "
            f"(NLL {mean['train_nll']:.3f}), and {asked:.1%} of the {results['unseen']} (NLL "
            f"{mean['validation_nll']:.2f}; a guess within the alphabet has {guess:.2f}).")
    if "two_step_accuracy" in mean:
        text += f' In two steps, "A ->" and then "B ->", {mean["two_step_accuracy"]:.1%} are right.'
    if mean.get("asked_cosine", 0) > 0.9999:
        text += (" The entities asked about were said and never read: their input vectors still "
                 f"point where they did at the start (cosine {mean['asked_cosine']:.7f}).")
    return text


@dataclass
class Ablate(Chain, Reversal):
    """Figures 5 to 12: a training for each value of an axis; laptop: 3 seeds, V 400, lr 0.003."""
    axis: str = flag(None, "vocab, entity-length, layers, heads, position, embeddings, size, "
                     "related-tokens, or any flag of the task")
    task: str = flag(None, "what to train [chain for related-tokens, else reversal]",
                     choices=("reversal", "chain"))
    values: str = flag(None, "what to try; the axes above have values of their own", nargs="+")
    command, trainings = "ablate", {}
    only = "cosine"  # of heat maps there would be too many
    axes = {"vocab": "20 50 200 2000", "entity-length": "2 3", "layers": "1 2 4 8",
            "heads": "1 2 4 8", "position": "none absolute relative",
            "embeddings": "learned frozen tied", "size": "1x20 1x256 12x20",
            "related-tokens": "10 20 50 100 200 500"}
    # There are many trainings, so that they are smaller on a laptop.
    small = {"seeds": 3, "vocab": 400, "lr": 0.003}
    own = {"entity-length": {"vocab": 200, "epochs": 300}, "related-tokens": {"vocab": 800}}
    # The flags that a value sets, if it is not --AXIS VALUE.
    flags = {"size": "--layers {0} --dim {2} --heads 4 --cosine",
             "related-tokens": "--related-tokens --complete {0}"}

    def __post_init__(self):
        names = self.given().keys() - {"axis", "task", "values"}
        super().__post_init__()
        self.check()
        self.task = self.task or ("chain" if self.axis == "related-tokens" else "reversal")
        kind, self.trainings = KINDS[self.task], {}
        self.name = f"ablate-{'chain-' * (self.task == 'chain')}{self.axis}"
        own = self.small | self.own.get(self.axis, {}) if self.preset == "laptop" else {}
        own |= {name: getattr(self, name) for name in names}  # facts as they were read
        if self.facts:
            own["vocab"] = self.vocab
        for value in map(str, self.values or self.axes.get(self.axis, "").split()):
            sets = self.vary(value)
            fixed, known = {*sets, "animate"}, {*kind.__dataclass_fields__}
            for name in (names | {"preset"}) & fixed | names - known:
                raise Problem(f"--{name.replace('_', '-')}: does not go with ablate {self.axis}")
            self.trainings[f"{self.axis} {value}"] = kind(**own | sets)
        if not self.trainings:
            raise Problem(f"--values: needed to ablate {self.axis}")

    def vary(self, value):
        """The fields that a value of the axis sets, {name: value}, read as on the command line."""
        if self.axis == "embeddings" and value in ("learned", "frozen", "tied"):
            return {"freeze_embeddings": value == "frozen", "tie_embeddings": value == "tied"}
        words = f"--{self.axis} {value.replace(',', ' ')}"
        if self.axis in self.flags:
            words = self.flags[self.axis].format(*value.partition("x"))
        return parse([self.task, *words.split()])[1]


def sweep(s):
    """Carry out the trainings of a command, one after the other."""
    runs, matrices = [], {}
    for value, settings in s.trainings.items():
        runs.append(experiment(settings.altered(label=value, keep=s.keep)))
        for name, matrix in runs[-1].pop("matrices").items():
            if s.only in name:
                matrices[f"{value}: {name}"] = matrix
    return {"command": s.command, "runs": runs, "matrices": matrices}


def theory(s):
    """bilinear and onelayer: hold the curves of each dimension or task against the theorems."""
    results = sweep(s)
    for run in results["runs"]:
        curves, N = run["curves"], run["counts"]["train"]
        start = run["chance"]["vocabulary"]  # L(0) = L_rev(0) = log V
        L, L_rev = np.array(curves["train_nll"]), np.array(curves["validation_nll"])  # (S, points)
        times = np.array(curves["epoch"]) * s.lr * N  # of gradient flow on the mean loss
        expected = closed_form(times, round(math.exp(start)), N)
        # Theorem 1, L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon, holds from this epsilon on.
        needed = np.log(L_rev[:, 1:] / start) / np.log(L[:, 1:] / start)
        run |= {**run["config"], "reversal_shift": abs(L_rev[:, -1] - start).mean(),
                "epsilon": max(0.0, needed.max()), "closed_form_gap": abs(L - expected).max(),
                "trained_probability_min": math.exp(-L[:, -1].max()),
                "unseen_probability_max": math.exp(-L_rev.min()),
                "curves": {"time": times.tolist(), "forward_nll": L.tolist(),
                           "reversal_nll": L_rev.tolist(), "closed_form": [expected.tolist()]}}
        say(f"Theorem 1's bound: epsilon {run['epsilon']:.4f}. Trained p >= "
            f"{run['trained_probability_min']:.3f}, unseen <= {run['unseen_probability_max']:.4f}. "
            f"Closed form: within {run['closed_form_gap']:.3f}")
    if s.command == "onelayer":
        results["summary"] = {
            "chance": math.exp(-start),
            "chain_unseen_probability_max": run["unseen_probability_max"],
            **{name: results["runs"][0][name] for name in (
                "trained_probability_min", "unseen_probability_max", "closed_form_gap")}}
    return results


# ------------------------------------------------------------------------------------------ Cures
# Why the curse is exact: the y of "x r y" is said and never read, so its input vector has no
# gradient. Asked about it, the model reads a vector that holds nothing. What could help?


def identities(data):
    """A sentence "x = x" for every entity x. "=" is the last id of the vocabulary."""
    x = data.sentences[:, ::2].unique()[:, None]
    return torch.hstack([x, torch.full_like(x, len(data.names) - 1), x])


def either_blank(model, sentences, data):
    """NLL of y in "x r _" and of x in "_ r y", which is said at r, for r attends to y."""
    before = model(sentences[:, 1:], 2)[:, 0]  # (B, V)
    return nll(model, sentences) + F.cross_entropy(before, sentences[:, 0])


def rule_penalty(model, sentences, data):
    """Mean NLL + mean square of (logit of y after "x ->" - logit of x after "y <-"), all x, y."""
    x = sentences[:, [0, 2]].flatten()

    def ask(relation):
        return model(torch.stack([x, torch.full_like(x, relation)], 1), 1)[:, 0, x]  # (2B, 2B)

    return nll(model, sentences) + (ask(FORWARD) - ask(BACKWARD).mT).square().mean()


class Linear(nn.Module):
    """Logits (B, 1, V) after x, r (B, 2): E[x] + E[r], or of width `dim`, (E[x] + E[r]) U^T."""
    def __init__(self, vocab_size, dim=None):
        super().__init__()
        self.E = nn.Parameter(0.002 * torch.randn(vocab_size, dim or vocab_size))
        self.U = nn.Parameter(0.002 * torch.randn(vocab_size, dim)) if dim else None

    def forward(self, tokens, last=1):
        both = self.E[tokens].sum(1, keepdim=True)
        return both @ self.U.mT if self.U is not None else both


# A cure: what it is told, as a student would say it, and the fields and methods of CureTrials that
# it changes. Add a row of your own.
CURES = {
    "none": ("told nothing: B is said and never read", {"expected": "The curse"}),
    "oracle": ("told the answers: what will be asked", {
        "expected": "No curse", "add": lambda data: data.groups["held-out, asked"]}),
    "reverse training": ("told the answers: all but the arrow", {
        "expected": "No curse", "add": lambda data: data.sentences[:data.trained].flip(1)}),
    "either blank": ("told the answers: it is asked for A given B", {
        "batch_loss": either_blank, "causal": False}),
    "rule penalty": ("told the rule: <- undoes ->, but of no pair", {
        "batch_loss": rule_penalty, "weight_decay": 0.01}),
    "identity bridge": ("told nothing: it must read every name, and say it", {
        "add": identities}),
    "tied GPT": ("told nothing: one table, but the network can still memorise", {
        "tie_embeddings": True}),
    "one table": ("told nothing: in a bilinear model to learn to say B is to learn to read B", {
        "make_model": lambda data: Bilinear(64, len(data.names), train_embeddings=True)}),
    "two tables": ("told nothing: the control, in which B is said and never read", {
        "make_model": lambda data: Linear(len(data.names), 64)}),
}
# Theory (Ma et al. 2026; the small trial is ours): gradient descent on a product of two matrices,
# but not on one, prefers low rank, and one vector for each pair says "x = x" and "A -> B" so.
for kind, dim in ("merged", None), ("factorised", 32):
    changes = {"setting": "theory", "vocab": 80, "complete": 14, "held_out": 6, "epochs": 1000,
               "batch_size": 10**6, "make_optimizer": partial(torch.optim.SGD, lr=3.0),
               "make_model": lambda data, dim=dim: Linear(len(data.names), dim)}
    CURES[kind] = "theory: B is said and never read", changes | {"expected": "The curse"}
    CURES[f"{kind}, x = x"] = "theory: every name is read", changes | {
        "add": identities, "expected": "No curse" if dim else "The curse"}


@dataclass
class CureTrials(Experiment):
    """What breaks the curse, and what does not (ours)."""
    lr: float = flag(0.003, "learning rate of AdamW; each cure is also tried at the paper's 0.01")
    weight_decay: float = flag(1.0, "of AdamW; also tried: 0.01")
    values: str = flag(None, "which cures, by their names [all]", nargs="+")
    command, task, only, expected, add = "cure", "reversal", "held-out, asked", "", None
    unseen, least_epochs, measurements = "unseen reversals", 80, 20

    @property
    def trainings(self):
        found, paper = {}, {"setting": "paper", "lr": 0.01, "weight_decay": 0.01}
        for name in self.values or CURES:
            if name not in CURES:
                raise Problem(f"--values {name}: must be one of {', '.join(CURES)}")
            about, changes = CURES[name]
            found[name] = self.altered(cure=name, about=about, **changes)
            if found[name].setting == "common":
                found[f"{name}, as in the paper"] = found[name].altered(**paper)
        return found

    def make_data(self, seed):
        data = super().make_data(seed)
        if self.add:
            data = replace(data, groups={"added": self.add(data), **data.groups})
        return data


@dataclass
class All(Task):
    """Every figure, and a table of what is seen. A flag goes to each command that has it."""
    command, trainings = "all", {}
    lines = ["reversal --animate --cosine", "chain --animate", "chain --related-tokens", "icl",
             "bilinear --symmetric", "onelayer", "cure",
             *(f"ablate {axis}" for axis in Ablate.axes),  # the last is of the chain alone
             *(f"ablate {axis} --task chain" for axis in [*Ablate.axes][:-1])]

    def __post_init__(self):
        given, self.plans = self.given(), []
        super().__post_init__()
        for line in self.lines:
            command, own = parse(line.split())
            kind = KINDS[command]
            names = given.keys() & {*kind.__dataclass_fields__}
            self.plans.append(kind(**own | {name: given[name] for name in names}))


def everything(s):
    """Carry out all, and hold each verdict against what must be seen."""
    claims = []
    for plan in s.plans:
        results = run(plan.altered(keep=s.keep and f"{s.keep}.{plan.name}"))
        for one in results.get("runs", [results]):
            claims.append({"figure": plan.name, "claim": f"{one['value']}: {one['expected']}",
                           "measured": one["verdict"],
                           "holds": one["expected"] and one["verdict"].startswith(one["expected"])})
            say("| {figure} | {claim} | {measured} | {holds} |".format(**claims[-1]))
    return {"command": "all", "claims": claims, "matrices": {}}


COMMANDS = {Reversal: experiment, Chain: experiment, ICL: experiment, Ablate: sweep,
            BilinearTheory: theory, OneLayerTheory: theory, CureTrials: sweep, All: everything}
KINDS = {kind.command: kind for kind in COMMANDS}


# --------------------------------------------------------------------------------------- Plotting
# From the results alone: a saved file is drawn just as a run is.
SHOWN = 40  # pairs in a heat map; of more, the diagonal is thinner than the eye can see
STYLE = {"axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.xmargin": 0, "figure.titlesize": 10, "figure.constrained_layout.use": True,
         "legend.fontsize": 8, "legend.frameon": False}
CURVES = {  # of a run: label, colour, line style
    "train_nll": ("trained", "tab:blue", "-"),
    "validation_nll": ("unseen", "tab:orange", "-"),
    "forward_nll": ("trained", "tab:blue", "-"),
    "reversal_nll": ("unseen", "tab:orange", "-"),
    "closed_form": ("trained, closed form", "black", ":"),
}


def draw_panel(axes, run):
    """Figure 1: NLL, the mean of the seeds in a band from lowest to highest, and of guesses."""
    (x, points), *curves = run["curves"].items()  # x is the epoch, in the theory the time
    for name, seeds in curves:
        label, color, dashes = CURVES[name]
        axes.fill_between(points, np.min(seeds, 0), np.max(seeds, 0), alpha=0.25, lw=0, color=color)
        axes.plot(points, np.mean(seeds, 0), label=label, color=color, ls=dashes)
    for kind, dashes in ("vocabulary", "--"), ("alphabet", "-."):
        axes.axhline(run["chance"][kind], color="gray", ls=dashes, label=f"a guess in the {kind}")
    axes.set(xlabel=x, ylabel="NLL of the answer (nats)", title=run["title"], ylim=(0, None),
             xscale="log" if x == "time" else "linear")


def draw_matrices(maps, label, figure=None, rows=1, **style):
    """Heat maps {title: matrix}, on one scale of colours: (figure, images)."""
    figure, images = figure or Figure(figsize=(2 + 3 * len(maps), 4)), []
    style = {"cmap": "magma", "vmin": 0, "vmax": max(1, *map(np.max, maps.values()))} | style
    for i, (title, matrix) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(rows, len(maps) // rows, i, title=title)
        images.append(axes.imshow(matrix.astype(float), **style))
    figure.colorbar(images[-1], ax=figure.axes, shrink=0.6, label=label)
    return figure, images


def draw_maps(results):
    """Figures 2 and 4: heat maps, in which the curse is the missing diagonal, and the curves."""
    maps = {role: results["matrices"][role][:SHOWN, :SHOWN] for role in results["weights"]}
    figure = Figure(figsize=(4 + 1.5 * len(maps), 5))
    left, right = figure.subfigures(1, 2, width_ratios=(len(maps) // 2, 1))
    _, images = draw_matrices(maps, "logit of answer j after entity i", left, 2)
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


def draw_cures(runs, matrices):
    """What a cure does to the unseen reversals: accuracy, and the diagonal of the first seed."""
    figure = Figure(figsize=(13, 8))
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.5, 1))
    axes, maps, groups = top.subplots(), {}, []
    for run in runs:
        name, told = run["config"]["cure"], run["config"]["about"].split(":")[0]
        seeds, setting = run["summary"]["validation_accuracy"]["per_seed"], run["setting"]
        groups += [told] * (told not in groups)
        if setting == "paper":
            axes.plot(np.mean(seeds), f"{name} ({told})", "kD", mfc="none")
            continue
        axes.barh(f"{name} ({told})", np.mean(seeds), color=f"C{groups.index(told)}")
        axes.plot(seeds, [f"{name} ({told})"] * len(seeds), "ko", alpha=0.3)
        if setting == "common":
            maps[name] = matrices[f"{run['value']}: held-out, asked"][:SHOWN, :SHOWN]
    axes.set(xlim=(-0.01, 1.01), xlabel="accuracy on unseen reversals: mean (bar), each seed (dot),"
             " mean at the paper's learning rate and weight decay (diamond)")
    axes.invert_yaxis()
    if maps:
        draw_matrices(maps, "logit", bottom)
    return figure


def draw_animation(results):
    """The figure of draw_maps over the training."""
    figure, images, curves = draw_maps(results | {"names": {}})
    epochs, now = results["curves"]["epoch"], curves.axvline(0, color="black", lw=1)

    def show(i):
        for image, role in zip(images, results["weights"]):
            image.set_data(results["matrices"][f"frames {role}"][i].astype(float))
        now.set_xdata([epochs[i]] * 2)
        figure.suptitle(f"{results['command']} task after epoch {epochs[i]}")

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was laid out stays where it is
    for image in images:  # without ticks it is drawn twice as fast
        image.axes.set(xticks=[], yticks=[])
    shown = np.unique(np.linspace(0, len(epochs) - 1, 25).round().astype(int))
    return FuncAnimation(figure, show, np.append(shown, shown[-1:].repeat(6)))  # a while at the end


class Figures(dict):
    """{end of the file name: figure or animation}. A notebook shows them."""
    def save(self, stem):
        """Write them to files. Missing letters are one hint."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for end, figure in self.items():
                how = partial(figure.savefig, dpi=100) if end.endswith("png") else partial(
                    figure.save, writer=PillowWriter(fps=4), dpi=80)
                write(Path(f"{stem}{end}"), how)
        if any("Glyph" in str(warning.message) for warning in caught):
            say("matplotlib's font lacks some of the letters: set font.family in a matplotlibrc")

    def _repr_html_(self):
        with tempfile.TemporaryDirectory() as folder:
            self.save(f"{folder}/figure")
            files = [base64.b64encode(Path(f"{folder}/figure{end}").read_bytes()) for end in self]
        return "".join(f'<img src="data:image;base64,{file.decode()}">' for file in files)


@matplotlib.rc_context(STYLE)
def draw(results):
    """All figures of a run."""
    if "claims" in results:
        return Figures()
    runs, matrices = results.get("runs", [results]), results["matrices"]
    if results["command"] == "cure":
        return Figures({".png": draw_cures(runs, matrices)})
    figures = Figures()
    if results.get("weights"):
        if results["config"]["animate"]:
            figures[".gif"] = draw_animation(results)
        figures["_weights.png"] = draw_maps(results)[0]
    columns = math.ceil(len(runs) ** 0.5)
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(3 + 3 * columns, 1.5 + 2.7 * rows))
    for i, run in enumerate(runs, 1):  # Figures 1, 3, 5 to 10
        draw_panel(figure.add_subplot(rows, columns, i), run)
    figure.legend(handles=figure.axes[0].lines, loc="outside lower center", ncols=2)
    figures[".png"] = figure
    if "epsilon" in runs[0]:
        figures["_weights.png"] = draw_matrices(dict([*matrices.items()][-4:]), "logit")[0]
    cosines = {name: matrix for name, matrix in matrices.items() if "cosine" in name}
    if cosines:  # Figure 11
        figures["_cosine.png"] = draw_matrices(cosines, "cosine of two token embeddings", vmin=-1,
                                               vmax=1, cmap="RdBu_r")[0]
    return figures


# -------------------------------------------------------------------------------------- Machinery
# You may stop reading here: this is about files, processes and the command line.


def say(text):
    """Print, in the first process of torchrun. A run outlives the reader of its output."""
    try:
        if place()[0] == 0:
            print(text, flush=True)
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
        say(f"{len(left_out)} pairs left out, with a name seen before: {', '.join(left_out[:5])}")
    return facts


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
    rows = {seed: row for some in everyone for seed, row in some.items()}
    return [rows[seed] for seed in sorted(rows)]


class Keeper:
    """The progress of one training, and its checkpoint, from which it can go on."""
    def __init__(self, s, seeds, weights, optimizer, orders):
        self.s, self.weights, self.optimizer = s, weights, optimizer
        self.label = f"{s.label}, from seed {seeds[0]}"
        self.path = s.keep and Path(f"{s.keep}.{self.label.replace('/', '-')}.pt")
        self.settings = repr((seeds, s.altered(out="", quiet="", keep="").given()))
        self.generators = [*orders, torch.default_generator, *torch.cuda.default_generators]
        self.began = time.monotonic()
        self.next = self.began + 5

    def load(self):
        """(epoch to begin with, what was measured so far, frames so far)"""
        if not (self.path and self.path.exists()):
            return 0, [], []
        try:
            settings, weights, moments, states, *done = torch.load(self.path, weights_only=True)
        except Exception:  # whatever a damaged file leads to
            settings = None
        if settings != self.settings:
            raise Problem(f"{self.path} is of other flags, or damaged: delete it, or change --out")
        for name, tensor in self.weights.items():
            tensor.data.copy_(weights[name])
        self.optimizer.load_state_dict(moments)
        for generator, state in zip(self.generators, states):
            generator.set_state(state)
        say(f"{self.label}: going on after epoch {done[0]}")
        return done

    def keep(self, epoch, measured, frames):
        """Say and save the progress; a twentieth of the time at most. FloatingPointError if NaN."""
        now, loss = time.monotonic(), measured[-1][:, :, 0].mean()
        if epoch < self.s.epochs and now < self.next:
            return
        if loss.isnan():
            raise FloatingPointError(f"{self.label}: loss NaN at epoch {epoch}: try a smaller --lr")
        if not self.s.quiet:
            say(f"{self.label}: epoch {epoch} of {self.s.epochs}, NLL of all sentences {loss:.3f}, "
                f"{now - self.began:.0f} s")
        if self.path:
            states = [generator.get_state() for generator in self.generators]
            state = self.settings, self.weights, self.optimizer.state_dict(), states
            write(self.path, partial(torch.save, (*state, epoch, measured, frames)))
        after = time.monotonic()
        self.next = after + 5 + 20 * (after - now)


def write(path, how):
    """Let how(path) write a file: it appears whole or not at all."""
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        how(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(s):
    """Carry out a command, such as Reversal(seeds=2): its results, which draw(results) shows."""
    # A notebook writes no file. The command line sets s.keep, the path of the checkpoints.
    for plan in s.plans or [s]:
        for training in plan.trainings.values():
            prepare(training)
    if s.keep:
        try:
            Path(s.out).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=s.out).close()
        except OSError as error:
            raise Problem(f"--out {s.out}: {error}") from None
    gpu = "a GPU is there" if torch.cuda.is_available() else "there is no CUDA GPU"
    say(f"{s.name} on {choose_device(s.device)}; {gpu}")
    results = COMMANDS[type(s)](s)
    if s.keep and place()[0] == 0:  # numbers first, then the pictures, which can be drawn again
        stem, numbers = Path(s.out, s.name), dict(results)
        matrices = numbers.pop("matrices")
        if matrices:
            write(Path(f"{stem}.npz"), partial(np.savez_compressed, **matrices))
        write(Path(f"{stem}.json"), lambda path: path.write_text(json.dumps(numbers, indent=1)))
        say(f"wrote {stem}.json, and draws it")
        for path in Path(s.out).glob(f".{s.name}.*.pt"):
            path.unlink()
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
            results = json.loads(Path(file).read_text()) | {"matrices": {}}
            if Path(f"{stem}.npz").exists():
                with open(f"{stem}.npz", "rb") as file:
                    results["matrices"] = dict(np.load(file))
            draw(results).save(stem)
        except Exception as error:  # a strange file can go wrong in every way
            raise Problem(f"{stem}.json: not a results file, or damaged ({error!r})") from None


class Parser(argparse.ArgumentParser):
    """Argparse that reports an error in one line."""
    def error(self, message):
        raise Problem(message)


def parse(argv):
    """(command, {flag: value} of those that are given). A command has the fields of its class."""
    parser = Parser(prog="revcurse.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("plot", help="draw saved results again")
    command.add_argument("files", nargs="+", help="results.json, with its .npz")
    for name, kind in KINDS.items():
        command = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__,
                                      argument_default=argparse.SUPPRESS, allow_abbrev=False)
        for f in fields(kind):
            about = f.metadata
            text = about["help"]
            if about["laptop"]:
                text += f" [{about['laptop']}]"
            if about["paper"]:
                text += f" [paper: {about['paper']}]"
            how = {"action": "store_true"} if f.type is bool else {
                "type": f.type, "nargs": about["nargs"], "choices": about["choices"]}
            name = f.name if f.name == "axis" else f"--{f.name.replace('_', '-')}"
            command.add_argument(name, help=text, **how)
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
        s = KINDS[command](**flags)
        if distributed.is_torchelastic_launched():
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        elif "RANK" in os.environ or "WORLD_SIZE" in os.environ:
            raise Problem("RANK or WORLD_SIZE is set, but not by torchrun: unset it")
        run(s.altered(keep=f"{s.out}/.{s.name}"))
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return 0
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
