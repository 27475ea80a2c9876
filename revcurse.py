# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0"]
# ///
"""The reversal curse, made visible: a model trained on "A -> B" cannot answer "B <- A".

After Zhu, Huang, Zhang, Jordan, Jiao, Tian and Russell, "Towards a Theoretical Understanding of
the 'Reversal Curse' via Training Dynamics", NeurIPS 2024 (arXiv 2405.04669). Gradient descent on
cross-entropy raises the weight from A to B and does not raise the weight from B to A.

    python revcurse.py reversal --animate           Figures 1 and 2, seconds on a laptop
    python revcurse.py chain                        Figures 3 and 4, and chain of thought
    python revcurse.py icl                          in-context reversal: no curse
    python revcurse.py ablate layers --task chain   Figures 5 to 12: what does not help
    python revcurse.py all                          all these figures, and what was seen in them
    python revcurse.py bilinear --symmetric         Section 3: Theorems 1 and 2, and a cure
    python revcurse.py onelayer                     Section 4: Theorems 3 and 4
    python revcurse.py plot figures/reversal.json   draw again from the saved results

--preset paper has the paper's sizes, for a GPU. Read the file from top to bottom: data, theory
(the paper's Sections 3 and 4), model (Section 5), training, measuring and plotting (its figures),
running (what can go wrong), flags, plans (what a command line asks for), results, commands.

Shapes stand at each reshape: S seeds, B sentences, T tokens that the model reads, P tokens that it
predicts, D dim, H heads, V ids of the vocabulary, K tokens of an entity. NLL is in nats.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import inspect
import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------- Data

# Ids of the relations "->", "<-", "~>" (chain) and "<=>" (in-context); entity tokens come after.
FORWARD, BACKWARD, INDIRECT, EQUIVALENT = 0, 1, 1, 2


class Dataset(NamedTuple):
    """Sentences of token ids for one seed, and what is needed to measure and print them."""

    groups: dict[str, torch.Tensor]  # role: sentences (n, T + 1); the last validates, others train
    alphabets: torch.Tensor  # (n, letters): the token ids that answers are spelled with
    names: list[str]  # how to print each token id
    answer_length: int = 1  # K: the loss and the metrics look at a sentence's last K tokens
    graded: int = 0  # the token of the answer that metrics look at: the first that tells it apart

    @property
    def train(self):
        return torch.cat(list(self.groups.values())[:-1])

    @property
    def validation(self):
        return list(self.groups.values())[-1]


def count_facts(vocab_size, entity_length, complete=None, held_out=None):
    """(complete, held_out): how many pairs or triples, if None as in the paper.

    That is min(letters**K, 2 * letters), 70 % of them complete; from K = 3 on no more than 100
    complete and 50 held out, so that the training set can be learned.
    """
    letters = vocab_size // 4
    facts = min(letters**entity_length, 2 * letters)
    most = (facts, facts) if entity_length < 3 else (100, 50)
    complete = min(round(0.7 * facts), most[0]) if complete is None else complete
    held_out = min(facts - round(0.7 * facts), most[1]) if held_out is None else held_out
    if held_out < 1:
        raise ValueError(f"vocab {vocab_size}: gives {complete} complete and {held_out} held-out "
                         "facts; one of these is needed, so 8 tokens or more")
    if complete + held_out > letters**entity_length:
        raise ValueError(f"complete {complete}: with --held-out {held_out} that is more than the "
                         f"{letters**entity_length} entities of length {entity_length} that the "
                         f"{letters} tokens of an alphabet (--vocab / 4) spell")
    return complete, held_out


def draw_entities(alphabet, length, count, generator):
    """`count` different tuples over `alphabet`, uniformly and in random order: (count, length).

    Draws until enough are different: the product (200**3 = 8 million) is never built.
    """
    letters = torch.empty(0, length, dtype=torch.long)
    while len(letters) < count:
        more = torch.randint(len(alphabet), (count, length), generator=generator)
        letters = torch.cat([letters, more]).unique(dim=0)
    return alphabet[letters[torch.randperm(len(letters), generator=generator)[:count]]]


def sentences(*parts):
    """Entities (n, K) and relations (an id) side by side: (n, T + 1)."""
    n = next(len(part) for part in parts if not isinstance(part, int))
    return torch.cat([torch.full((n, 1), part) if isinstance(part, int) else part
                      for part in parts], dim=1)


def token_names(relations, vocab_size, letters, tokens):
    """How to print each id: relations, then each letter's tokens, numbered; "#": in no sentence."""
    names = [*relations, *(f"#{token}" for token in range(vocab_size))]
    for letter, own in zip(letters, tokens, strict=True):
        for i, token in enumerate(own):
            names[token] = f"{letter}{i}" if len(own) > 1 else letter
    return names


def spell(roles, relations, vocab_size, length, count, generator):
    """For each role (a letter) an alphabet of vocab_size // 4 ids from 2 up, and `count` entities:
    (roles, letters), [(count, length)], and how to print each id."""
    order = torch.randperm(vocab_size, generator=generator)[:len(roles) * (vocab_size // 4)]
    alphabets = 2 + order.view(len(roles), -1)
    entities = [draw_entities(alphabet, length, count, generator) for alphabet in alphabets]
    named = (roles, [e[:, 0] for e in entities]) if length == 1 else (roles.lower(), alphabets)
    return alphabets, entities, token_names(relations, vocab_size, *named)


def reversal_data(vocab_size, entity_length=1, complete=None, held_out=None, generator=None):
    """The reversal task (Section 5): a Dataset of sentences "A -> B" and "B <- A".

    Both directions of each complete pair are trained. Of each held-out pair one direction, chosen
    by a coin, is trained ("seen") and the other is asked ("unseen"): a model that learned from the
    complete pairs how the arrows belong together would answer. count_facts has the numbers.

    vocab_size counts entity tokens; a model needs two ids more. A and B are spelled with
    vocab_size // 4 tokens each, disjoint. Raises ValueError if these cannot spell the pairs.
    """
    complete, held_out = count_facts(vocab_size, entity_length, complete, held_out)
    alphabets, (a, b), names = spell("AB", ["->", "<-"], vocab_size, entity_length,
                                     complete + held_out, generator)
    forward, backward = sentences(a, FORWARD, b), sentences(b, BACKWARD, a)
    coin = torch.rand(held_out, 1, generator=generator) < 0.5
    groups = {"train_forward": forward[:complete], "train_backward": backward[:complete],
              "validation_seen": torch.where(coin, forward[complete:], backward[complete:]),
              "validation_unseen": torch.where(coin, backward[complete:], forward[complete:])}
    return Dataset(groups, alphabets, names, entity_length)


def chain_data(vocab_size, entity_length=1, complete=None, held_out=None, related_tokens=False,
               generator=None):
    """The chain task (Section 5): a Dataset of "A -> B", "B -> C" and the implied "A ~> C".

    All three are trained of each complete triple, the two steps of a held-out one, whose A ~> C is
    asked. Alphabets, numbers and errors are those of reversal_data.

    related_tokens: entities are "a i", "b i", "c i", with the same three tokens in every triple and
    an index token i of its own; 200 complete and 50 held-out indices, if not told otherwise.
    """
    if related_tokens:
        complete, held_out = complete or 200, held_out or 50
        tokens = 2 + torch.randperm(vocab_size, generator=generator)
        alphabets = tokens[None, 3:3 + complete + held_out]  # the indices
        if alphabets.shape[1] < complete + held_out:
            raise ValueError(f"vocab {vocab_size}: {complete} complete and {held_out} held-out "
                             f"triples of related tokens need {complete + held_out + 3}")
        a, b, c = (sentences(int(token), alphabets.T) for token in tokens[:3])
        names = token_names(["->", "~>"], vocab_size, "abci", [*tokens[:3, None], alphabets[0]])
    else:
        complete, held_out = count_facts(vocab_size, entity_length, complete, held_out)
        alphabets, (a, b, c), names = spell("ABC", ["->", "~>"], vocab_size, entity_length,
                                            complete + held_out, generator)
    steps = {"ab": sentences(a, FORWARD, b), "bc": sentences(b, FORWARD, c),
             "ac": sentences(a, INDIRECT, c)}
    groups = {f"{part}_{step}": facts[rows]
              for part, rows in [("train", slice(complete)), ("validation", slice(complete, None))]
              for step, facts in steps.items()}
    return Dataset(groups, alphabets, names, a.shape[1], graded=int(related_tokens))


def icl_data(vocab_size=400, complete=7, held_out=3, generator=None):
    """In-context reversal: a Dataset of sentences "A -> B <=> B <- A", whose last A is asked.

    Each of vocab_size // 4 A's meets the same `complete` + `held_out` B's; with `held_out` of
    them, drawn for each A, it is validated. Raises ValueError if vocab_size is too small.
    """
    letters, partners = vocab_size // 4, complete + held_out
    if letters < 1 or letters + partners > vocab_size:
        raise ValueError(f"vocab {vocab_size}: a quarter for A, and {partners} tokens for B, need "
                         f"{max(4, partners + (partners - 1) // 3)} or more")
    tokens = 3 + torch.randperm(vocab_size, generator=generator)[:letters + partners]
    alphabet, others = tokens[None, :letters], tokens[letters:]
    order = torch.rand(letters, partners, generator=generator).argsort(1)  # of the B's, for each A
    a, b = alphabet.T.repeat_interleave(partners, dim=0), others[order].view(-1, 1)
    every = sentences(a, FORWARD, b, EQUIVALENT, b, BACKWARD, a).view(letters, partners, 7)
    groups = {"train": every[:, :complete].flatten(0, 1),
              "validation": every[:, complete:].flatten(0, 1)}
    names = token_names(["->", "<-", "<=>"], vocab_size, "AB", [alphabet[0], others])
    return Dataset(groups, alphabet, names)


def distractor_data(vocab_size, complete=3, held_out=3, generator=None):
    """Ours, for the attention of Section 4: a Dataset of "A D -> B", where D distracts.

    Each of complete + held_out A's has its own B and meets the same number of D's: `complete` of
    them, drawn for each A, in training, the others in validation. Raises ValueError if vocab_size
    is too small.
    """
    n = complete + held_out
    if vocab_size < 3 * n:
        raise ValueError(f"vocab {vocab_size}: {n} tokens each for A, B and D need {3 * n}")
    a, b, d = 2 + torch.randperm(vocab_size, generator=generator)[:3 * n].view(3, n, 1)
    order = torch.rand(n, n, generator=generator).argsort(1)  # of the D's, for each A
    every = sentences(a.repeat_interleave(n, dim=0), d[order].view(-1, 1), FORWARD,
                      b.repeat_interleave(n, dim=0)).view(n, n, 4)
    groups = {"train": every[:, :complete].flatten(0, 1),
              "validation": every[:, complete:].flatten(0, 1)}
    names = token_names(["->", "<-"], vocab_size, "ABD", [a[:, 0], b[:, 0], d[:, 0]])
    return Dataset(groups, b.T, names)


def name_pairs(data, facts, generator=None):
    """Reversal data with the user's names: each of its pairs gets a random one of facts, which are
    as many tuples (A, B) as an alphabet has letters."""
    names, order = list(data.names), torch.randperm(len(facts), generator=generator).tolist()
    for i in range(len(data.groups["train_forward"]) + len(data.validation)):
        for letter, name in zip("AB", facts[order[i]], strict=True):
            names[data.names.index(f"{letter}{i}")] = name
    return data._replace(names=names)


class Task(NamedTuple):
    """One of the paper's tasks: its data, and what to call things."""

    data: Callable[..., Dataset]
    title: str
    unseen: str  # the validation sentences, in words
    curse: str  # what to say if they are not answered
    note: str  # what else to say
    maps: dict[str, str]  # the group of each heat map and its title


TASKS = {
    "reversal": Task(reversal_data, "Reversal", "unseen reversals", "The reversal curse", "", {
        "train_forward": "complete pairs\nA -> B: trained",
        "train_backward": "complete pairs\nB <- A: trained",
        "validation_seen": "held-out pairs\nthe trained direction",
        "validation_unseen": "held-out pairs\nthe unseen direction"}),
    "chain": Task(chain_data, "Chain", 'unseen "A ~> C"', "Weights are intransitive", "", {
        f"{part}_{step}": f"{words} triples\n{sentence}: "
                          f"{'unseen' if part[0] + step == 'vac' else 'trained'}"
        for part, words in [("train", "complete"), ("validation", "held-out")]
        for step, sentence in [("ab", "A -> B"), ("bc", "B -> C"), ("ac", "A ~> C")]}),
    "icl": Task(icl_data, "In-context reversal", "sentences with new pairs",
                "The reversal curse", "No contradiction: the answer stands in the context, to be "
                "copied; the curse is about what the weights store.", {}),
}


# ----------------------------------------------------------------------------------------- Theory


class Bilinear(nn.Module):
    """The bilinear model (Section 3): token ids x (..., T) to logits (..., T, vocab_size).

    l(y|x) = x^T Theta y, with x and y the fixed random embeddings of two tokens, from N(0, I/dim);
    p(y|x) is the softmax over all tokens y. Theta (dim, dim) is trained; it starts from
    N(0, sigma^2). symmetric: (Theta + Theta^T) / 2 stands for it. Raises ValueError for dim < 1.

    For the pair x -> y gradient descent adds x (y - sum_j p_j v_j)^T to Theta. That moves
    x^T Theta y by |x|^2 |y|^2, about 1, and y^T Theta x by products of nearly orthogonal vectors.
    """

    def __init__(self, dim, vocab_size, sigma=0.0, generator=None, symmetric=False):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim {dim}: must be 1 or more")
        normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.symmetric = symmetric
        self.register_buffer("embeddings", normal(vocab_size, dim) / math.sqrt(dim))
        self.Theta = nn.Parameter(sigma * normal(dim, dim))

    def forward(self, tokens, last=None):
        """As GPT.forward, but each token knows of no other."""
        theta = (self.Theta + self.Theta.mT) / 2 if self.symmetric else self.Theta
        x = self.embeddings[tokens[..., -last:] if last else tokens]  # (..., T, D)
        return x @ theta @ self.embeddings.mT  # x^T Theta v for all v: (..., T, V)


def in_span(model):
    """The Bilinear with all its logits the same, and a Theta of (V, V) if dim > V: less to compute.

    E^T = Q R, with E (V, D) the embeddings and Q (D, V) orthonormal, turns E Theta E^T into
    R^T (Q^T Theta Q) R. Gradient descent on Q^T Theta Q takes the same steps, and what else is in
    Theta no logit sees and no step changes.
    """
    if model.embeddings.shape[1] > model.embeddings.shape[0]:
        Q, R = torch.linalg.qr(model.embeddings.mT)
        model.embeddings = R.mT.contiguous()
        model.Theta = nn.Parameter(Q.mT @ model.Theta.detach() @ Q)
    return model


class OneLayer(nn.Module):
    """The one-layer transformer (Section 4, after Tian et al. 2023): token ids (..., T + 1), the
    context x_1 .. x_T and then the query, to the logits (..., vocab_size) of the next token.

    Y and Z (V, V), both 0 at the start, stand for products of the usual weights and embeddings.
    With alpha = softmax(logits), e the one-hot vector of the next token, q of the query, a step is

        dY ~ f (e - alpha)^T,   dZ ~ q (e - alpha)^T Y^T (P / |X^T b|) X^T diag(b) X,

    with P the projection orthogonal to X^T b. For "A -> B" the context is A alone: b = 1, f = A, Z
    has no gradient, and the answer is row A of Y. No step on "A -> B" touches row B.
    """

    def __init__(self, vocab_size):
        super().__init__()
        for name in ("Y", "Z"):
            zeros = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(zeros))

    @staticmethod
    def attention(Z, tokens):
        """b = softmax over the context of Z[query, x_t]: (V, V) and (..., T + 1) to (..., T)."""
        return Z[tokens[..., -1:], tokens[..., :-1]].softmax(-1)

    def forward(self, tokens, last=1):
        """last: as GPT.forward's, but there is only one token to predict."""
        b = self.attention(self.Z, tokens)  # (..., T)
        X = F.one_hot(tokens[..., :-1], len(self.Y)).to(b.dtype)  # (..., T, V)
        Xb = (b[..., None, :] @ X)[..., 0, :]  # X^T b: (..., V)
        f = Xb / Xb.norm(dim=-1, keepdim=True)
        return f @ self.Y  # Y^T f


def closed_form(times, vocab_size, count):
    """NLL of trained sentences after each of `times` of gradient flow on their mean loss, in both
    models: with orthonormal embeddings and no token in two contexts, each is on its own.

    M = vocab_size, N = count of sentences, u = the target's logit above any other:
        N/M (exp(u) + (M - 1) u - 1) = t,   NLL = log(1 + (M - 1) exp(-u))
    Untrained contexts stay at log M. t(u) rises, so u(t) is read off a fine table.
    """
    M, N = vocab_size, count
    u = np.linspace(0, math.log1p(M / N * max(times)), 100_001)
    t = N / M * (np.expm1(u) + (M - 1) * u)
    return np.interp(times, t, np.log1p((M - 1) * np.exp(-u)))


# ------------------------------------------------------------------------------------------ Model


class Dropout(nn.Module):
    """While training, zero a share p of the entries and scale the others up by 1 / (1 - p).

    An entry is zeroed where uniform noise is below p. In a notebook the noise comes from torch's
    global generator. Trainer.draw_noise hands it in, which also says that this is training.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.register_buffer("noise", torch.empty(0), persistent=False)

    def forward(self, x):
        self.shape = x.shape[1:]  # of one sentence's noise, for Trainer.draw_noise
        handed_in = self.noise.numel() > 0
        if not (handed_in or (self.training and self.p)):
            return x
        noise = self.noise if handed_in else torch.rand_like(x)
        return torch.where(noise < self.p, 0.0, x / (1 - self.p))


class Attention(nn.Module):
    """Causal self-attention with H heads: softmax(Q K^T / sqrt(D/H)) V, and no token looks ahead.

    rotary: relative positions by turning queries and keys (Su et al. 2021).
    """

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.c_attn = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.c_proj = nn.Linear(dim, dim)
        self.attn_dropout, self.resid_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, x, last):
        """x (B, T, D) to (B, last, D): what the last tokens gather from all T."""
        B, T, D = x.shape
        # (B, T, 3D) -> (B, T, 3, H, D/H) -> three times (B, H, T, D/H)
        q, k, v = self.c_attn(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        # The query of token t asks and the key of token s answers: q_t . k_s / sqrt(D/H) scores how
        # much t listens to s. Among the s up to t, softmax turns the scores into shares.
        scores = q[:, :, T - last:] @ k.transpose(-2, -1) / math.sqrt(D // self.heads)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[T - last:]
        shares = scores.masked_fill(future, -math.inf).softmax(-1)  # (B, H, last, T)
        heard = self.attn_dropout(shares) @ v  # (B, H, last, D/H): sum over s of share times v_s
        return self.resid_dropout(self.c_proj(heard.transpose(1, 2).reshape(B, last, D)))

    @staticmethod
    def rotate(x):
        """Turn pair i of token t, x (..., T, D/H), by the angle t * 10000^(-2i / (D/H)).

        The product of a query and a key then depends on the distance of their tokens alone.
        """
        T, width = x.shape[-2:]
        speed = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
        angle = torch.arange(T, device=x.device)[:, None] * speed  # (T, D/2H)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class MLP(nn.Module):
    """Each token on its own: D to 4D, GELU in its tanh form, and back to D."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, heads, rotary=False, dropout=0.0):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, rotary, dropout)
        self.ln_2, self.mlp = nn.LayerNorm(dim), MLP(dim, dropout)

    def forward(self, x, last):
        x = x[:, x.shape[1] - last:] + self.attn(self.ln_1(x), last)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) by hand: token ids (..., T) to logits (..., T, vocab_size).

    position: "none", "absolute" (learned, as GPT-2's) or "relative" (rotary). The output matrix is
    a weight of its own, as in the authors' code, unless tie_embeddings. Parameters are named as in
    the published GPT-2; its linear weights, but for lm_head, are stored transposed. Raises
    ValueError if dim cannot be divided among the heads, and for more than block_size tokens.
    """

    def __init__(self, vocab_size, block_size, layers, heads, dim, position="absolute",
                 dropout=0.0, tie_embeddings=False, generator=None):
        super().__init__()
        if position not in ("none", "absolute", "relative"):
            raise ValueError(f"position {position}: must be none, absolute or relative")
        rotary = position == "relative"
        unit = 2 * heads if rotary else heads  # rotary positions turn pairs of entries
        if dim % unit:
            raise ValueError(f"dim {dim}: must be a multiple of {unit}, for {heads} heads"
                             f"{' with relative positions' if rotary else ''}")
        self.block_size = block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, dim),
            **({"wpe": nn.Embedding(block_size, dim)} if position == "absolute" else {}),
            "drop": Dropout(dropout),
            "h": nn.ModuleList(Block(dim, heads, rotary, dropout) for _ in range(layers)),
            "ln_f": nn.LayerNorm(dim)})
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
                nn.init.normal_(weight, 0, 0.02 / shrink, generator=generator)

    def forward(self, tokens, last=None):
        """Logits (..., last, vocab_size) after the `last` last of the tokens; all of them if None.
        The final block computes no more than these need."""
        *lead, T = tokens.shape
        if self.block_size < T:
            raise ValueError(f"{T} tokens are more than the block_size {self.block_size}")
        x = self.transformer.wte(tokens.reshape(-1, T))  # (B, T, D)
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe.weight[:T]
        x = self.transformer.drop(x)
        *blocks, final = self.transformer.h
        for block in blocks:
            x = block(x, T)
        x = self.transformer.ln_f(final(x, last or T))  # (B, last, D)
        return self.lm_head(x).view(*lead, last or T, -1)


# --------------------------------------------------------------------------------------- Training

NLL_CEILING = -math.log(1e-50)  # the authors clip p at 1e-50, so their curves saturate at 115


def nll(logits, targets):
    """-log p(target), in nats: logits (..., V) and targets (...) to (...)."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def spaced(epochs, log=False):
    """All epochs from 0 on if there are no more than 100, else about 50; or, with log, about 100
    that are ever further apart."""
    points = np.linspace(0, epochs, (epochs if epochs <= 100 else 50) + 1)
    if log:
        points = np.append(0, np.geomspace(1, epochs, 100))
    return np.unique(points.round().astype(int)).tolist()


class Recorder:
    """Calls a function of tensors; on a CUDA device, replays its kernels as one graph.

    A training step is thousands of kernels, and Python is slower to launch them than a GPU to run
    them. So the first two calls for each shape of the inputs run plainly, the kernels of the third
    are recorded, and from then on inputs are copied to where the recorded kernels read them, and
    all run at one command. On other devices, and if CUDA refuses, the function always runs plainly:
    `how` says which it is. The function may change what stands in the same place at each call, such
    as weights. It may step the optimizer, which has to know that it is being recorded.
    """

    def __init__(self, optimizer):
        self.optimizer, self.calls, self.graphs, self.pool = optimizer, {}, {}, None
        self.how = "one by one"

    def __call__(self, function, *inputs):
        shapes = tuple(tensor.shape for tensor in inputs)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if not inputs[0].is_cuda or "refused" in self.how:
            return function(*inputs)
        if self.calls[shapes] <= 2:  # lets libraries set themselves up, on a stream as in recording
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if shapes not in self.graphs and not self.record(function, shapes, inputs):
            return function(*inputs)
        graph, places, result = self.graphs[shapes]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result

    def record(self, function, shapes, inputs):
        """Record, without running them, the kernels for these inputs: whether it worked."""
        places, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        try:
            for group in groups:
                group["capturable"] = True
            with torch.cuda.graph(graph, pool=self.pool):
                result = function(*places)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.how = f"one by one, since CUDA refused to record them ({str(error)[:80]!r})"
            self.optimizer.zero_grad()  # whatever they are, they were not computed
            return False
        finally:
            for group in groups:
                group["capturable"] = False
        self.graphs[shapes], self.how = (graph, places, result), "as a CUDA graph"
        self.pool = graph.pool()  # one memory for all shapes: they never run at the same time
        return True


class Trainer:
    """Trains S seeds of one model at once, each on its own data, from its own weights.

    models, datasets and generators have length S; a model is any module from (tokens (B, T), last)
    to logits (B, last, V). A generator draws its seed's batches and dropout masks: what happens to
    a seed does not depend on the others. make_optimizer gets the list of trained tensors, each
    stacked over the seeds. loss: "entity" (the last K tokens) or "sequence" (all but the first).

    `curves` (2, 2, points, S) holds the NLL of training and validation sentences, of the graded
    token and of the whole entity, after each epoch in `points` (0 to the last; if not given, as
    `spaced` has them). At some points (each record_every-th) `frames` gets the epoch and what the
    function `record` says of this trainer, {name: tensor}. bf16: forward and backward in bfloat16
    autocast, with weights and updates in float32.
    """

    def __init__(self, models, datasets, generators, make_optimizer, *, epochs, batch_size=64,
                 loss="entity", device="cpu", bf16=False, points=None, record=None,
                 record_every=1):
        models = [model.to(device).eval() for model in models]  # eval: see Dropout
        self.model = models[0]  # for its structure: its own weights are not used
        self.params, self.buffers = stack_module_state(models)  # each tensor (S, ...)
        self.optimizer = make_optimizer([p for p in self.params.values() if p.requires_grad])
        self.generators, self.epochs, self.batch_size = generators, epochs, batch_size
        self.datasets, self.K, self.bf16 = datasets, datasets[0].answer_length, bf16
        self.recorder = Recorder(self.optimizer)
        self.groups = {group: torch.stack([data.groups[group] for data in datasets]).to(device)
                       for group in datasets[0].groups}  # (S, n, T + 1), the last one validates
        self.sentences = torch.cat(list(self.groups.values()), dim=1)  # (S, sentences, T + 1)
        self.train_count = len(datasets[0].train)
        self.P = self.K if loss == "entity" else self.sentences.shape[2] - 1
        self.steps_per_epoch = math.ceil(self.train_count / batch_size)
        self.points = points or spaced(epochs)
        self.curves = torch.zeros(2, 2, len(self.points), len(models), device=device,
                                  dtype=next(iter(self.params.values())).dtype)
        self.record, self.frames = record, []
        self.record_points = {*self.points[::record_every], epochs} if record else set()
        self.bad_epoch = torch.full((len(models),), math.inf, device=device)  # of the first NaN
        self.steps = self.evaluations = 0
        self.order = torch.zeros(len(models), self.train_count, dtype=torch.long)  # of this epoch
        self.noise_generators = [torch.Generator(device).manual_seed(
            int(torch.randint(2**62, (), generator=g))) for g in generators]
        self.logits(self.sentences[:, :1, :-1], self.P)  # tells each Dropout its noise's shape
        self.noise_shapes = {f"{name}.noise": module.shape for name, module in
                             self.model.named_modules() if isinstance(module, Dropout) and module.p}

    def logits(self, tokens, last, noise=None):
        """Each seed's model on its own sentences: (S, B, T) to (S, B, last, V). Fewer than S take
        the first seeds."""
        def one_seed(state, tokens):
            return functional_call(self.model, state, (tokens, last)).view(len(tokens), last, -1)

        S, state = len(tokens), {**self.params, **self.buffers, **(noise or {})}
        if len(self.generators) > S:
            state = {name: value[:S] for name, value in state.items()}
        with (torch.autocast(tokens.device.type, torch.bfloat16, cache_enabled=False) if self.bf16
              else contextlib.nullcontext()):
            if S == 1:  # without vmap matrix products of large models are faster on a processor
                state = {name: value.squeeze(0) for name, value in state.items()}
                logits = one_seed(state, tokens[0])[None]
            else:
                logits = vmap(one_seed)(state, tokens)
        return logits.float() if self.bf16 else logits

    def losses(self, sentences, last, noise=None):
        """NLL of the last tokens, each given those before it: (S, B, T + 1) to (S, B, last)."""
        return nll(self.logits(sentences[..., :-1], last, noise), sentences[..., -last:])

    def draw_noise(self, rows):
        """Uniform noise for every Dropout and `rows` sentences, each seed's from its own generator:
        (S, numbers).

        Within vmap there is one generator for all seeds, and what a seed got would depend on how
        many train beside it. So the noise is drawn here and goes in with the weights, as buffers.
        """
        count = rows * sum(shape.numel() for shape in self.noise_shapes.values())
        return torch.stack([torch.rand(count, generator=g, device=g.device)
                            for g in self.noise_generators])

    def name_noise(self, uniform, B):
        """The noise for each Dropout: (S, numbers) to {name: (S, B, ...)}."""
        shapes = self.noise_shapes
        parts = uniform.split([B * shape.numel() for shape in shapes.values()], dim=1)
        return {name: part.view(-1, B, *shape)
                for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def update(self, rows, uniform):
        """Forward, backward and update with sentences number rows (S, B): the losses (S,)."""
        noise = self.name_noise(uniform, rows.shape[1])
        sentences = self.sentences.take_along_dim(rows[..., None], dim=1)  # (S, B, T + 1)
        loss = self.losses(sentences, self.P, noise).mean((1, 2))  # (S,)
        loss.sum().backward()  # no seed's loss has a gradient for another seed's weights
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def step(self):
        """One batch of each seed. Nothing here waits for the device."""
        start = self.steps % self.steps_per_epoch * self.batch_size
        if start == 0:
            order = torch.stack([torch.randperm(self.train_count, generator=g)
                                 for g in self.generators])
            cuda = self.curves.is_cuda  # where from pinned memory a copy does not wait
            order = order.pin_memory() if cuda else order
            self.order = order.to(self.curves.device, non_blocking=cuda)
        rows = self.order[:, start:start + self.batch_size]  # (S, B)
        loss = self.recorder(self.update, rows, self.draw_noise(rows.shape[1]))
        self.steps += 1
        self.note_bad(loss)

    def note_bad(self, values):
        """Keep, on the device, the first epoch in which a seed's value (S,) was not finite."""
        epoch = math.ceil(self.steps / self.steps_per_epoch)
        now = torch.where(values.isfinite(), math.inf, float(epoch))
        self.bad_epoch = self.bad_epoch.minimum(now)

    @torch.no_grad()
    def evaluate(self):
        """The curves' next point."""
        # Some sentences at a time: their activations stay in the processor's cache.
        losses = [self.losses(part, self.K) for part in self.sentences.split(200, dim=1)]
        losses = torch.cat(losses, dim=1).clamp(max=NLL_CEILING)  # (S, sentences, K)
        both = torch.stack([losses[..., self.datasets[0].graded], losses.sum(-1)])
        parts = both[..., :self.train_count], both[..., self.train_count:]  # (2, S, sentences)
        self.curves[:, :, self.evaluations] = torch.stack([part.mean(-1) for part in parts])
        self.note_bad(losses.sum((1, 2)))
        epoch = self.points[self.evaluations]
        if epoch in self.record_points:
            self.frames.append((epoch, self.record(self)))
        self.evaluations += 1

    def run(self, watch=lambda: None):
        """Train to the end from wherever this trainer stands, calling watch() after each step."""
        if self.steps == 0:
            self.evaluate()
        while self.steps < self.epochs * self.steps_per_epoch:
            self.step()
            if self.steps == self.points[self.evaluations] * self.steps_per_epoch:
                self.evaluate()
            watch()

    def state_dict(self):
        """All that the rest of the run depends on, as long as no loss has been NaN."""
        return {"counts": [self.steps, self.evaluations], "curves": self.curves,
                "frames": self.frames, "order": self.order,
                "params": {name: tensor.detach() for name, tensor in self.params.items()},
                "optimizer": self.optimizer.state_dict(),
                "generators": [g.get_state() for g in self.generators + self.noise_generators]}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Go to where the trainer stood that gave this state, whose tensors become this one's."""
        self.recorder = Recorder(self.optimizer)  # what is recorded has the old tensors
        for name, tensor in self.params.items():
            tensor.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.evaluations = state["counts"]
        self.curves.copy_(state["curves"])
        device = self.curves.device
        self.frames = [(epoch, {name: matrix.to(device) for name, matrix in frame.items()})
                       for epoch, frame in state["frames"]]
        self.order = state["order"].to(device)
        for generator, saved in zip(self.generators + self.noise_generators, state["generators"],
                                    strict=True):
            generator.set_state(saved)


# -------------------------------------------------------------------------------------- Measuring


def rank(logits, targets, alphabets):
    """Place of the target's logit among its own alphabet, 1 the highest: (B, V), (B,) to (B,).

    alphabets (n, letters) are disjoint. Equal logits do not count against the target. A guess has
    (letters + 1) / 2 on average.
    """
    number = (alphabets == targets[:, None, None]).any(2).int().argmax(1)  # (B, n, letters) to (B,)
    own = logits.gather(1, alphabets[number])  # (B, letters)
    return 1 + (own > logits.gather(1, targets[:, None])).sum(1)


def spread(values):
    """(S,) to {"mean", "std", "per_seed"}: how the results file gives a number of all seeds."""
    values = values.double()
    return {"mean": values.mean().item(), "std": values.std(correction=0).item(),
            "per_seed": values.tolist()}


@torch.no_grad()
def measure(trainer):
    """The numbers of each seed: {"train_nll", ..., "validation_rank", ...}, each (S,).

    NLL and rank are of the answer's graded token, word_nll of a longer entity, which sums over its
    tokens, each given those before. Accuracy: of all tokens the right ones are likeliest. margin:
    the lowest validation NLL of the whole curve, less that of guessing among the alphabet. cosine:
    the median size of the cosine of two token embeddings, of all or of those read in training.
    """
    K, graded = trainer.K, trainer.datasets[0].graded
    targets = trainer.sentences[..., -K:]  # (S, sentences, K)
    logits = trainer.logits(trainer.sentences[..., :-1], K)
    losses = nll(logits, targets).clamp(max=NLL_CEILING)
    alphabets = [data.alphabets.to(targets.device) for data in trainer.datasets]
    found = {"nll": losses[..., graded],
             "accuracy": (logits.argmax(-1) == targets).all(-1).float(),
             "rank": torch.stack([rank(*seed) for seed in zip(
                 logits[:, :, graded], targets[..., graded], alphabets, strict=True)]).float(),
             **({"word_nll": losses.sum(-1)} if K > 1 else {})}  # each (S, sentences)
    N = trainer.train_count
    summary = {f"{part}_{name}": value[:, rows].mean(1)
               for part, rows in [("train", slice(N)), ("validation", slice(N, None))]
               for name, value in found.items()}
    summary["margin"] = trainer.curves[1, 0].amin(0) - math.log(alphabets[0].shape[1])
    sizes = cosines(trainer).abs()  # (S, V, V)
    sizes.diagonal(dim1=1, dim2=2).fill_(math.nan)  # not a token with itself
    read = [sentences[:N, :-1].unique() for sentences in trainer.sentences]
    some = [size[ids][:, ids] for size, ids in zip(sizes, read, strict=True)]
    for name, parts in [("cosine", sizes), ("cosine_read", some)]:
        summary[name] = torch.stack([part.nanmedian() for part in parts])
    return summary


@torch.no_grad()
def answer(trainer, questions):
    """The likeliest entity after each question, token by token: (S, B, T) to (S, B, K)."""
    for _ in range(trainer.K):
        best = trainer.logits(questions, 1).argmax(-1)  # (S, B, 1)
        questions = torch.cat([questions, best], dim=2)
    return questions[..., -trainer.K:]


def chain_of_thought(trainer):
    """Accuracy on the chain task's held-out triples, each (S,): asked for C at once, "A ~>", and in
    two steps, "A ->" and then "B ->" with the model's own B."""
    K, asked = trainer.K, trainer.groups["validation_ac"]  # (S, B, T + 1): A ~> C
    arrow = torch.full_like(asked[..., :1], FORWARD)
    thought = answer(trainer, torch.cat([asked[..., :K], arrow], dim=2))
    found = {"direct": answer(trainer, asked[..., :-K]),
             "two_step": answer(trainer, torch.cat([thought, arrow], dim=2))}
    return {f"{name}_accuracy": (answers == asked[..., -K:]).all(-1).float().mean(1)
            for name, answers in found.items()}


@torch.no_grad()
def logit_matrices(trainer, seeds=None):
    """Figure 2: {group: (S, n, n)}, or of the first `seeds` seeds. Entry (i, j) is the logit of the
    entity (its graded token) that ends sentence j, after the entity alone that begins sentence i.
    """
    matrices = {}
    for group, sentences in trainer.groups.items():
        sentences = sentences[:seeds]  # (S, n, T + 1)
        logits = trainer.logits(sentences[..., :trainer.K], 1)[:, :, 0]
        answers = sentences[:, None, :, trainer.datasets[0].graded - trainer.K]  # (S, 1, n)
        matrices[group] = logits.take_along_dim(answers, dim=2)  # (S, n, V) to (S, n, n)
    return matrices


def diagonal_means(matrices):
    """Means (S, groups, 2) and contrast (S,): mean logits of the pairs, on the diagonal, and of all
    else, NaN if there is nothing else; and by how much a pair stands out where it is asked, in
    units of how much it does in the held-out sentences that are trained."""
    means = []
    for matrix in matrices.values():  # (S, n, n)
        n, own = matrix.shape[1], matrix.diagonal(dim1=1, dim2=2).sum(1)
        means.append(torch.stack([own / n, (matrix.sum((1, 2)) - own) / (n * n - n)], dim=1))
    *seen, unseen = [on - off for group, (on, off) in zip(
        matrices, (mean.T for mean in means), strict=True) if group.startswith("validation")]
    return torch.stack(means, dim=1), unseen / (sum(seen) / len(seen))


def cosines(trainer):
    """Figure 11: cosine similarity of all token embeddings, (S, V, V)."""
    vectors = F.normalize(trainer.params["transformer.wte.weight"].detach(), dim=-1)  # (S, V, D)
    return vectors @ vectors.mT


@torch.no_grad()
def examples(trainer, count=3):
    """For a person: what the first seed was trained on, is asked, and answers (graded tokens)."""
    data, lines = trainer.datasets[0], []
    at = data.graded - data.answer_length  # of the graded token in a sentence
    *trained, asked = [group for group in data.groups if group.startswith("validation")]
    for i in range(min(count, len(data.validation))):
        for group in [*trained, asked]:
            logits = trainer.logits(trainer.groups[group][:1, [i], :at], 1)[0, 0].cpu()
            sentence, p = data.groups[group][i], logits[0].softmax(0)
            words, target = [data.names[token] for token in sentence], sentence[at]
            best = p.topk(3 if group == asked else 1).indices
            grade = "right" if best[0] == target else (
                f"wrong; {words[at]} has p {p[target].item():.1g}, rank "
                f"{rank(logits, target[None], data.alphabets).item()} of {data.alphabets.shape[1]}")
            if group in trained:
                lines.append(f"  trained: {' '.join(words)}")
            shown = ", ".join(f"{data.names[token]} (p {p[token]:.2g})" for token in best)
            lines.append(f"    {' '.join(words[:at])} ?  {shown}: {grade}")
    return lines


@torch.no_grad()
def asymmetry(trainer):
    """|Theta - Theta^T| / |Theta| of each seed's Bilinear, in the span of the tokens (Frobenius
    norms): 0 if symmetric, as at a start from 0, sqrt(2) if Theta is orthogonal to Theta^T."""
    theta = trainer.params["Theta"]  # (S, D, D)
    theta = (theta + theta.mT) / 2 if trainer.model.symmetric else theta
    norm = theta.norm(dim=(1, 2)).clamp(min=1e-99)
    return {"asymmetry": (theta - theta.mT).norm(dim=(1, 2)) / norm}


@torch.no_grad()
def probabilities(trainer):
    """p(right answer) of each sentence, (S, sentences), and b of its first token in OneLayer."""
    Z, tokens = trainer.params["Z"], trainer.sentences[..., :-1]
    return {"probability": (-trainer.losses(trainer.sentences, 1)[..., 0]).exp(),
            "attention": vmap(trainer.model.attention)(Z, tokens)[..., 0]}


def bilinear_results(run, numbers, times):
    """The results of one dimension from the numbers of all seeds: their curves and asymmetry.

    epsilon: the smallest with which Theorem 1, L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon, holds
    for all seeds at all points of the curves; epsilon_end: at the last.
    """
    curves = numbers["curves"][:, :, 0].transpose(0, 1)  # (2, S, points)
    forward, reversal = (curves / curves[..., :1]).log()[..., 1:]
    epsilon = torch.where(forward < 0, reversal / forward, 0).clamp(min=0)
    return {
        "dim": run.config["dim"], "symmetric": run.config["symmetric"],
        "curves": {"time": times, "forward_nll": curves[0].tolist(),
                   "reversal_nll": curves[1].tolist(), "asymmetry": numbers["asymmetry"].tolist()},
        "reversal_shift": (curves[1, :, -1] - curves[1, :, 0]).abs().mean().item(),
        "reversal_nll_min": curves[1].min().item(), "epsilon": epsilon.max().item(),
        "epsilon_end": epsilon[:, -1].max().item()}


def conclude_bilinear(results):
    """Add the slope of log shift against log dimension, over all dimensions and over those with
    room for all tokens, None for fewer than two; and all that was seen, in words."""
    runs = [run for run in results["runs"] if not run["symmetric"]]
    tied = results["runs"][len(runs):]
    for name, least in [("slope", 0), ("slope_large", results["config"]["vocab"])]:
        points = [(run["dim"], run["reversal_shift"]) for run in runs
                  if run["dim"] >= least and run["reversal_shift"] > 0]
        results[name] = (np.polyfit(*np.log(points).T, 1)[0] if len(dict(points)) > 1 else None)
    lines = [f"{'':22}forward NLL  reversal NLL: start   lowest      end   epsilon  at the end"]
    for run in results["runs"]:
        forward, reversal = (np.mean(run["curves"][f"{name}_nll"], axis=0)
                             for name in ("forward", "reversal"))
        lines.append(f"{run['value']:22}{forward[-1]:11.3f}  {reversal[0]:19.3f} "
                     f"{run['reversal_nll_min']:8.3f} {reversal[-1]:8.3f}  {run['epsilon']:8.4f} "
                     f"{run['epsilon_end']:11.4f}")
    least, chance = min(run["reversal_nll_min"] for run in runs), runs[0]["chance"]["vocabulary"]
    lines += ["", "Theorem 1: L_rev(t) / L_rev(0) >= (L(t) / L(0))^epsilon, for all seeds and at "
              "all points of the curves with the first epsilon, at the end with the second; none "
              "smaller would do.",
              f"Theorem 2: the reversal NLL was never below {least:.3f}, {least / chance:.1%} of "
              f"log m = {chance:.3f}."]
    for name, words in [("slope", ""), ("slope_large", " for dimensions from --vocab on")]:
        if results[name] is not None:
            lines.append(f"The reversal NLL moves as dim^{results[name]:.1f}{words}; nearly "
                         "orthogonal vectors predict dim^-1.")
    if tied:
        means = [np.mean(run["curves"]["reversal_nll"], axis=0) for run in tied]
        lines.append(f"Symmetric: the reversal NLL ends at "
                     f"{', '.join(f'{mean[-1] / mean[0]:.1%}' for mean in means)} of its start.")
    results["verdict"] = "\n".join(lines)


def onelayer_results(run, numbers, times):
    """The results of one kind of data from its numbers: probability and attention, each
    (S, sentences, points).

    For each group of sentences: curves of the mean probability and attention, a list for each seed;
    of all its sentences and seeds the lowest and highest probability at the end, the highest ever.
    closed_form_gap: the largest difference, in nats, where no token is in two contexts.
    """
    data, ends = run.datasets[0], {}
    contexts, entities = data.train[:, :-2], data.train[:, [0, -1]].unique().tolist()
    results = {"curves": {"time": times}, "attention": {}, "ends": ends, "tokens": sorted(
        ([data.names[token], token] for token in entities),
        key=lambda entity: (entity[0][0], len(entity[0]), entity[0]))}  # A9 before A10
    if contexts.unique().numel() == contexts.numel():
        expected = torch.from_numpy(closed_form(times, len(data.names), len(data.train)))
        gaps = numbers["probability"][:, :len(data.train)].log() + expected
        results["closed_form_gap"] = gaps.abs().max().item()
    sizes = [len(sentences) for sentences in data.groups.values()]
    parts = (numbers[name].split(sizes, dim=1) for name in ("probability", "attention"))
    for name, p, heard in zip(data.groups, *parts, strict=True):
        if p.numel():
            results["curves"][name] = p.mean(1).tolist()
            results["attention"][name] = heard.mean(1).tolist()
            ends[name] = {"lowest": p[..., -1].min().item(), "highest": p[..., -1].max().item(),
                          "highest_ever": p.max().item()}
    return results


def conclude_onelayer(results):
    """Add the summary of Theorems 3 and 4, of the worst sentence and seed; and it in words."""
    reversal, chain, both, distractors = results["runs"]
    (*trained, unseen), (*steps, indirect) = (run["ends"].values() for run in (reversal, chain))
    p, chance = min(end["lowest"] for end in trained + steps), reversal["chance"]["vocabulary"]
    summary = results["summary"] = {
        "trained_probability_min": p, "unseen_probability_max": unseen["highest_ever"],
        "chain_unseen_probability_max": indirect["highest_ever"], "chance": math.exp(-chance),
        "closed_form_gap": max(run["closed_form_gap"] for run in (reversal, chain))}
    lines = []
    for theorem, words, end in [(3, "the unseen direction", unseen), (4, "A ~> C", indirect)]:
        seen = ("not trained to the end, give more --epochs" if p < 0.9 else "as it says"
                if end["highest_ever"] <= summary["chance"] * (1 + 1e-9) else "NOT AS IT SAYS")
        lines.append(f"Theorem {theorem}: {seen}. Trained sentences end at p >= {p:.4f}; {words} "
                     f"never has p above {end['highest_ever']:.6f} and ends at {end['highest']:.6f}"
                     f" or below; 1/M = {summary['chance']:.6f}.")
    ends = [both["ends"][f"train_{step}"] for step in ("ab", "ac")]
    old, new = (np.mean(distractors["attention"][part], axis=0) for part in ("train", "validation"))
    lines += [f"Closed form: within {summary['closed_form_gap']:.3f} nats for all their sentences.",
              'One context token cannot tell "->" from "~>": where A ~> C is trained too, A -> B '
              f"and A ~> C share row A of Y and end at p from {min(e['lowest'] for e in ends):.3f} "
              f"to {max(e['highest'] for e in ends):.3f}.",
              "Ours, not the paper's: beside a distractor, attention to the entity goes from "
              f"{old[0]:.2f} to {old[-1]:.2f}, beside one that it never met to {new[-1]:.2f}."]
    results["verdict"] = "\n".join(lines)


# --------------------------------------------------------------------------------------- Plotting

# Colour-blind readers can tell these apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def draw_panel(axes, run, name):
    """Figure 1: NLL (`name`: "nll", or "word_nll" of whole entities) of the trained and of the
    unseen sentences against the epoch, with the level of two kinds of guessing."""
    curves, epochs = run["curves"], run["curves"]["epoch"]
    name = name if f"train_{name}" in curves else "nll"
    for part, colour, width, label in [  # the first line can be seen below the second
            ("train", BLUE, 3.5, "trained sentences"),
            ("validation", ORANGE, 1.8, TASKS[run["command"]].unseen)]:
        seeds = np.array(curves[f"{part}_{name}"])  # (S, points)
        if len(seeds) > 1:
            label += " (mean, lowest to highest)"
            axes.fill_between(epochs, seeds.min(0), seeds.max(0), color=colour, alpha=0.25, lw=0)
        axes.plot(epochs, seeds.mean(0), color=colour, linewidth=width, label=label)
    for kind, style, side in [("vocabulary", "--", "bottom"), ("alphabet", ":", "top")]:
        chance = run["chance"][name.replace("nll", kind)]
        axes.axhline(chance, color=GREY, linestyle=style, label=f"a guess within the {kind}")
        axes.text(1.01, chance, f"{chance:.2f}", color=GREY, fontsize=8, verticalalignment=side,
                  transform=axes.get_yaxis_transform())
    what = ("whole entity" if "word" in name
            else "index token" if run["config"].get("related_tokens")
            else "first token" if run["config"].get("entity_length", 1) > 1 else "right entity")
    axes.set(xlabel="epoch", ylabel=f"NLL of the {what} (nats)", ylim=(0, None))
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def describe(results, inches):
    """The title of a picture so wide: what ran, and where that is not as in the paper."""
    runs, config, words = results.get("runs", [results]), results["config"], []
    flags = task_flags(runs[0]["command"], config.get("axis"))
    for name, text in [("vocab", "V = {}"), ("layers", "{} layers"), ("dim", "dim {}"),
                       ("epochs", "{} epochs"), ("lr", "lr {}"), ("seeds", "{} seeds")]:
        values = {run["config"][name] for run in runs}
        if len(values) == 1:
            *_, paper, _ = flags[name]
            usual = "" if paper in (None, *values) else f" (paper: {paper})"
            words.append((text.format(1).rstrip("s") if values == {1} else text.format(*values))
                         + usual)
    what = f"{TASKS[runs[0]['command']].title} task"
    if config.get("related_tokens"):
        what += " with related tokens"
    if "axis" in config:
        *_, usual = AXES[config["axis"]]
        usual = "" if usual.split() == config["values"] else f" (--preset paper: {usual})"
        what += f", {config['axis']} {', '.join(config['values'])}{usual}"
    return textwrap.fill(f"{what}: {', '.join(words)}", int(13 * inches))


def draw_curves(results):
    """Figures 1, 3, 5 to 10: a panel for each run; for long entities also of the whole entity."""
    runs = results.get("runs", [results])
    names = ["nll"] + ["word_nll"] * any("train_word_nll" in run["curves"] for run in runs)
    if runs[0]["config"].get("related_tokens"):  # whose first token is always the same
        names = ["word_nll"]
    panels = [(run, name) for name in names for run in runs]
    columns = {1: 1, 2: 2, 4: 2}.get(len(runs), 3)
    rows, width = math.ceil(len(panels) / columns), max(7, 3.2 * columns)
    figure = Figure(figsize=(width, 1.5 + 2.7 * rows), layout="constrained")
    for i, (run, name) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i)
        draw_panel(axes, run, name)
        if "value" in run:
            axes.set_title(f"{results['config']['axis']} {run['value']}", fontsize=10)
    figure.suptitle(describe(results, width), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center",
                  ncols=4 if width > 12 else 2, frameon=False, fontsize=9)
    return figure


def draw_maps(figure, results, matrices, low, high):
    """The heat maps of Figures 2 and 4 on one colour scale: their images."""
    maps = TASKS[results["command"]].maps
    grid, images = figure.subplots(2, len(maps) // 2), []
    for axes, (name, title) in zip(grid.flat, maps.items(), strict=True):
        images.append(axes.imshow(matrices[name], vmin=low, vmax=high, cmap="magma"))
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="answer j", ylabel="question i")
        axes.locator_params(nbins=4, integer=True, min_n_ticks=1)
        questions, answers = zip(*results.get("names", {}).get(name, [("", "")]), strict=True)
        if questions[0] and len(questions) <= 40:  # a name may be long, or have "$" in it
            style = {"labels": [name[:18] for name in answers], "fontsize": 7, "parse_math": False}
            axes.set_xticks(range(len(answers)), rotation=90, **style)
            style["labels"] = [name[:18] for name in questions]
            axes.set_yticks(range(len(questions)), **style)
    figure.colorbar(images[0], ax=grid, shrink=0.6, extend="min" if low == 0 else "neither",
                    label="logit of answer j after question i")
    return images


def draw_weights(results, matrices):
    """Figures 2 and 4: logits after an entity alone. The curse is the missing diagonal."""
    low, high = (f([f(matrix) for matrix in matrices.values()]) for f in (np.min, np.max))
    figure = Figure(figsize=(2 * len(matrices), 7.8), layout="compressed")
    for name, image in zip(matrices, draw_maps(figure, results, matrices, low, high), strict=True):
        means = results["weights"][name]
        off = "" if means["off_diagonal"] is None else f", {means['off_diagonal']:.1f} off it"
        image.axes.set_title(f"{image.axes.get_title()}\nmean logit {means['diagonal']:.1f} on the "
                             f"diagonal{off}", fontsize=9)
    seeds = results["config"]["seeds"]
    figure.suptitle("Logits of the first seed" + f"; the means are over all {seeds}" * (seeds > 1),
                    fontsize=11)
    return figure


def draw_cosines(results, matrices):
    """Figure 11: cosine similarities of the token embeddings; those never read stay as drawn."""
    width = max(6, 1.5 + 3.6 * len(matrices))
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, run, matrix in zip(grid, results.get("runs", [results]), matrices, strict=True):
        image = axes.imshow(matrix.astype(np.float32), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set_title(f"{run['config']['layers']} layers, dim {run['config']['dim']}\nmedian "
                       f"|cosine| {run['summary']['cosine']['mean']:.3f}, of tokens that were read "
                       f"{run['summary']['cosine_read']['mean']:.3f}", fontsize=9)
        axes.set(xlabel="token id", ylabel="token id")
    figure.colorbar(image, ax=grid, shrink=0.7, label="cosine of two token embeddings")
    figure.suptitle(f"Token embeddings of the first seed\n{describe(results, width)}", fontsize=10)
    return figure


def draw_animation(results, frames, epochs, path):
    """The heat maps over the training beside the curve, as a GIF."""
    curves, high = results["curves"], max(frame.max() for frame in frames.values())
    figure = Figure(figsize=(4.4 + 1.4 * len(frames), 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1 + 1.4 * len(frames), 4))
    images = draw_maps(left, results, {name: frame[0] for name, frame in frames.items()}, 0, high)
    axes = right.subplots()
    draw_panel(axes, results, "nll")
    right.legend(loc="outside lower center", frameon=False, fontsize=8)
    marker, = axes.plot([], [], "o", color="black", markersize=6)
    means = [np.mean(curves[f"{part}_nll"], axis=0) for part in ("train", "validation")]
    writer = PillowWriter(fps=4)
    with writer.saving(figure, path, dpi=180 / math.sqrt(len(frames))):
        for i, epoch in [*enumerate(epochs), *[(-1, epochs[-1])] * 6]:  # the end stays a while
            for image, frame in zip(images, frames.values(), strict=True):
                image.set_data(frame[i])
            now = curves["epoch"].index(epoch)
            marker.set_data([epoch, epoch], [mean[now] for mean in means])
            figure.suptitle(f"{TASKS[results['command']].title} task after epoch {epoch}",
                            fontsize=11)
            writer.grab_frame()
            figure.set_layout_engine("none")  # what was laid out stays where it is


def draw_flow(axes, run, seeds, colour, label=None, lw=1.5, ls="-"):
    """The mean of the seeds (S, points) over time, with a band from the lowest to the highest; not
    at t = 0, which a logarithmic axis cannot show."""
    times, seeds = run["curves"]["time"][1:], np.array(seeds)[:, 1:]
    axes.fill_between(times, seeds.min(0), seeds.max(0), color=colour, alpha=0.2, lw=0)
    axes.plot(times, seeds.mean(0), color=colour, label=label or None, lw=lw, ls=ls)
    axes.set(xscale="log", xlabel="time t of gradient flow")


def draw_closed_form(axes, run, change):
    """The closed form over time: change(NLL)."""
    times, M = run["curves"]["time"][1:], round(math.exp(run["chance"]["vocabulary"]))
    axes.plot(times, change(closed_form(times, M, run["counts"]["train"])), "k--",
              label="closed form")


def draw_bilinear(results, arrays):
    """Section 3: both losses, Theorem 1, the shift against the dimension, and Theta's asymmetry."""
    runs = [run for run in results["runs"] if not run["symmetric"]]
    tied = results["runs"][len(runs):]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.95, 0, len(runs)))
    maps = {f"{name}_{results['runs'].index(run)}": (run, name)  # of the largest dimension
            for run in (runs[-1], *tied[-1:]) for name in ("forward", "reversal")}
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplot_mosaic([["losses", "theorem"],
                                    ["shifts", [[*maps], ["skew"] * len(maps)]]])
    losses, theorem, shifts, skew = map(panels.get, ("losses", "theorem", "shifts", "skew"))
    for run, colour in [*zip(runs, shades, strict=True), *((run, ORANGE) for run in tied)]:
        curves, same = run["curves"], run["symmetric"]
        forward, reversal = (np.array(curves[f"{name}_nll"]) for name in ("forward", "reversal"))
        label = (f"dim {run['dim']}: $\\varepsilon$ = {run['epsilon']:.2g}" if not same else
                 "symmetric" if run is tied[0] else None)
        theorem.plot((forward / forward[:, :1]).T, (reversal / reversal[:, :1]).T, color=colour,
                     lw=0.8, ls=":" if same else "-", label=[label] + [None] * (len(forward) - 1))
        draw_flow(skew, run, curves["asymmetry"], colour, label if same else None)
        if not same:
            moved = abs(reversal[:, -1] - reversal[:, 0])
            shifts.plot([run["dim"]] * len(moved), moved, ".", color=colour, alpha=0.6)
            shifts.plot(run["dim"], run["reversal_shift"], "o", color=colour, ms=9, mec="black")
        if not same or run is tied[-1]:
            draw_flow(losses, run, forward, colour, same and f"forward, {run['value']}")
            draw_flow(losses, run, reversal, "black" if same else colour,
                      same and f"reversal, {run['value']}", ls=":" if same else "-")
    low, high = (f([arrays[name] for name in maps]) for f in (np.min, np.max))
    for key, (run, name) in maps.items():
        image = panels[key].imshow(arrays[key], vmin=low, vmax=high, cmap="magma")
        entry = r"$x_i^T \Theta\, y_j$" if name == "forward" else r"$y_i^T \Theta\, x_j$"
        panels[key].set_title(f"{'symmetric' * run['symmetric']}\n{name}\n{entry}", fontsize=9)
        panels[key].set(xticks=[], yticks=[])
    figure.colorbar(image, ax=[panels[key] for key in maps], shrink=0.8,
                    label=f"logit, dim {runs[-1]['dim']}, first seed")
    label_bilinear(results, runs, losses, theorem, shifts, skew)
    figure.suptitle(f"Bilinear model: {runs[0]['counts']['train']} pairs, m = "
                    f"{math.exp(runs[0]['chance']['vocabulary']):.0f} tokens, "
                    f"{results['config']['seeds']} seeds (band: lowest to highest), gradient "
                    f"descent with lr {results['config']['lr']}", fontsize=12)
    return figure


def label_bilinear(results, runs, losses, theorem, shifts, skew):
    """What the lines of draw_bilinear are to be compared with, and words."""
    chance, epsilon = runs[0]["chance"]["vocabulary"], max(run["epsilon"] for run in runs)
    draw_closed_form(losses, runs[0], np.positive)
    losses.axhline(chance, color=GREY, ls="--", lw=1, label=f"log m = {chance:.2f}")
    losses.set(ylabel="NLL (nats)", ylim=(0, None),
               title="Forward NLL falls, reversal NLL does not (colours: right)")
    ratio = np.geomspace(theorem.dataLim.x0, 1, 50)
    theorem.plot(ratio, ratio**epsilon, "k--",
                 label=f"$(L(t)\\,/\\,L(0))^\\varepsilon$, $\\varepsilon$ = {epsilon:.2g}")
    theorem.plot(ratio, ratio, "k:", lw=1, label=r"$\varepsilon$ = 1")
    theorem.set(xscale="log", yscale="log", xlim=(1, ratio[0]),
                xlabel=r"$L(t)\,/\,L(0)$, forward: training goes to the right",
                ylabel=r"$L_{rev}(t)\,/\,L_{rev}(0)$, reversal",
                title=r"Theorem 1: how little $\varepsilon$ suffices (dashed: the largest)")
    dims, moved = (np.array([run[key] for run in runs if run["reversal_shift"]], dtype=float)
                   for key in ("dim", "reversal_shift"))
    large = results["config"]["vocab"]
    for slope, least, style, text in [
            (results["slope"], 0, "-", "measured, all"), (-1, 0, ":", "slope -1, as predicted"),
            (results["slope_large"], large, "-", f"measured, dim {large} or more")]:
        if slope is not None and len(dims):  # through the middle of its points, or the last
            d, shift = dims[dims >= least], moved[dims >= least]
            level = np.log(shift * d**-slope)[-1 if slope == -1 else slice(None)].mean()
            shifts.plot(d, np.exp(level) * d**slope, "k" + style, alpha=0.4 if least == 0 else 1,
                        label=text if slope == -1 else f"{text}: slope {slope:.1f}")
    shifts.set(xscale="log", yscale="log", xlabel="dimension d",
               ylabel="|NLL(end) - NLL(start)| (nats)", title="How far the reversal NLL moves")
    skew.axhline(math.sqrt(2), color=GREY, ls="--", lw=1,
                 label=r"$\sqrt{2}$: $\Theta$ orthogonal to $\Theta^T$")
    skew.set(ylim=(-0.05, 1.6), ylabel=r"$|\Theta - \Theta^T|\,/\,|\Theta|$")
    for axes, place in [(losses, "upper left"), (theorem, "lower left"), (shifts, "upper right"),
                        (skew, "center left")]:
        axes.legend(fontsize=8, frameon=False, loc=place)


def draw_probabilities(axes, run, title, trained, unseen):
    """Theorems 3 and 4: probability of the right answer against time, and the closed form."""
    curves, chance = run["curves"], math.exp(-run["chance"]["vocabulary"])
    *groups, last = run["ends"]  # the last one validates
    draw_flow(axes, run, np.concatenate([curves[name] for name in groups]), BLUE, trained, 4)
    draw_flow(axes, run, curves[last], ORANGE, unseen)
    draw_closed_form(axes, run, lambda losses: np.exp(-losses))
    axes.axhline(chance, color=GREY, ls="--", lw=1, label=f"1/M = {chance:.2g}")
    axes.set(yscale="log", ylabel="probability of the right answer", title=title)


def draw_onelayer(results, arrays):
    """Section 4: Theorems 3 and 4, the rows of Y, and what Z does."""
    reversal, chain, both, distractors = results["runs"]
    figure, config = Figure(figsize=(13, 10), layout="constrained"), results["config"]
    (left, rows), (right, heard) = figure.subplots(2, 2)
    draw_probabilities(left, reversal, "Theorem 3: reversal", "trained sentences",
                       "unseen direction")
    draw_probabilities(right, chain, "Theorem 4: chain", "A -> B, B -> C: trained",
                       "A ~> C: unseen")
    draw_flow(right, both, both["curves"]["train_ac"], GREEN,
              "another training, with A ~> C: row A has two answers")
    right.axhline(0.5, color=GREEN, ls=":", lw=1, label="one half")
    names, ids = zip(*reversal["tokens"], strict=True)
    Y = arrays["Y_0"][np.ix_(ids, ids)]  # of the entities of the sentences
    image = rows.imshow(Y, vmin=-abs(Y).max(), vmax=abs(Y).max(), cmap="RdBu_r")
    if len(ids) <= 60:
        rows.set_xticks(range(len(ids)), names, rotation=90, fontsize=8)
        rows.set_yticks(range(len(ids)), names, fontsize=8)
        for label, row in zip(rows.get_yticklabels(), Y, strict=True):
            label.set_color("black" if row.any() else ORANGE)
    rows.set(title="Y after reversal, first seed; orange: never touched", xlabel="next token",
             ylabel="context token")
    figure.colorbar(image, ax=rows, shrink=0.8, label="logit of the next token")
    for name, colour, label in [("train", BLUE, "trained sentences"),
                                ("validation", ORANGE, "distractors that the entity never met")]:
        draw_flow(heard, distractors, distractors["attention"][name], colour, label)
    heard.axhline(0.5, color=GREY, ls="--", lw=1, label="one half: no preference")
    heard.set(ylim=(0.4, 1), ylabel="attention b to the entity",
              title='Ours, not the paper\'s: "A D -> B", with a distractor D')
    for axes in (left, right, heard):
        axes.legend(fontsize=9, frameon=False)
    figure.suptitle(f"One-layer transformer: M = {1 / results['summary']['chance']:.0f} tokens, "
                    f"{config['seeds']} seeds (band: lowest to highest), lr {config['lr']}, "
                    f"{'full batch' if config['full_batch'] else 'batch size 1'}", fontsize=12)
    return figure


def draw(stem, results, arrays):
    """All pictures of a run: {path: function of a path that writes there}."""
    theory = THEORY.get(results["command"])
    figures = {"": theory.draw(results, arrays) if theory else draw_curves(results)}
    if "runs" not in results and (names := TASKS[results["command"]].maps):
        figures["_weights"] = draw_weights(results, {name: arrays[name] for name in names})
    if cosine := [array for name, array in arrays.items() if name.startswith("cosine")]:
        figures["_cosine"] = draw_cosines(results, cosine)
    files = {stem.with_name(f"{stem.name}{suffix}.png"): functools.partial(figure.savefig, dpi=150)
             for suffix, figure in figures.items()}
    if "frame_epochs" in arrays:
        frames = {name: arrays[f"frames_{name}"].astype(np.float32) for name in names}
        files[stem.with_suffix(".gif")] = functools.partial(
            draw_animation, results, frames, arrays["frame_epochs"].tolist())
    return files


# ---------------------------------------------------------------------------------------- Running

CHECKPOINT_SECONDS = 30
LOOK_SECONDS = 0.5  # between two looks at the device, which wait for it


class Problem(Exception):
    """(What to tell the user in one line, exit status): 2, the default, for bad input, found before
    any work; 1 for a failed run; 130 for an interrupted one."""


def flag(config, name):
    """A flag and its value, in words."""
    value = config.get(name)
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')} {value}"


def write_files(writers):
    """Write {path: function that writes to a path}: all, before the first appears, whole."""
    temporary = {path: path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
                 for path in writers}
    try:
        for path, write in writers.items():
            write(temporary[path])
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def difference(config, theirs):
    """The first flag that makes this run another than theirs; None if they are the same."""
    return next((name for name, value in config.items() if name not in (
        "resume", "quiet", "out", "seeds_at_once") and theirs.get(name) != value), None)


def checkpoint_path(stem):
    """Where this process keeps its checkpoint."""
    rank, world = processes()
    return stem.with_suffix(f".{rank}of{world}.pt" if world > 1 else ".pt")


def read_checkpoint(path, config):
    """The checkpoint of a run with this configuration; None without --resume or a checkpoint."""
    if config["resume"] != path.exists():
        print(f"--resume: there is no checkpoint {path}; starting from the beginning"
              if config["resume"] else
              f"{path} is of an unfinished run; with the same flags --resume would go on")
    if not (config["resume"] and path.exists()):
        return None
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load would not notice a flipped bit
            raise ValueError("damaged")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        theirs, _ = dict(saved["config"]), (saved["trainer"], 0.0 + saved["seconds"])
        saved["done"], saved["jobs"] = list(saved["done"]), list(saved["jobs"])
        if saved["name"] != path.stem:
            raise ValueError("of another task")
    except Exception:  # whatever a damaged file leads to
        raise Problem(f"--resume: {path} is not a checkpoint that can be read; delete it to start "
                      "from the beginning") from None
    if name := difference(config, theirs):
        raise Problem(f"{flag(config, name)}: the checkpoint {path} is of a run with "
                      f"{flag(theirs, name)}; go on with that, or without --resume")
    return saved


class Watch:
    """What goes on around training: progress line, checkpoints, Ctrl-C, an end to NaN.

    Let it `start` each of the jobs that are not done, and call it after each step, within `with`.
    There the first Ctrl-C (or SIGTERM) waits for the step to end, saves and stops, or, once the
    training is over, lets the results be written; the second stops at once. A job is a Run's number
    and the seeds to train; `done` has what collect gives of those that are over.
    """

    def __init__(self, path, config, jobs):
        self.path, self.config, self.saved = path, config, read_checkpoint(path, config)
        resumed = self.saved or {"done": [], "jobs": jobs}
        self.done, self.jobs = resumed["done"], resumed["jobs"]
        self.owns_checkpoint = bool(self.saved)
        self.interrupted, self.in_place = False, sys.stdout.isatty()

    def start(self, run, seeds):
        """Make the trainer of these seeds of a Run; the first goes on from the checkpoint."""
        self.run, saved, self.saved = run, self.saved, None
        self.trainer = None  # there is not always room for the last one and the next
        axis = f"{self.config['axis']} " if "axis" in self.config else ""
        self.label = "" if run.value is None else f"{axis}{run.value}: "
        self.seeds = [str(run.config["seed"] + seed) for seed in seeds]  # as the flags count them
        if len(seeds) < run.config["seeds"]:
            self.label += f"seed {' '.join(self.seeds)}: "
        data, size = run.datasets[0], run.config["parameters"]
        # A weight comes with its gradient and two moments, each of 4 bytes.
        self.size = f"{size:,} parameters and {16 * size / 1e6:,.1f} MB to train them"
        print(f"{self.label}{len(data.train)} training and {len(data.validation)} validation "
              f"sentences; for each seed {self.size}")
        now = self.next_look = self.started = time.monotonic()
        self.next_save = now + CHECKPOINT_SECONDS
        self.trainer = trainer = make_trainer(run, seeds)
        if saved and saved["trainer"]:
            trainer.load_state_dict(saved["trainer"])
            self.started -= saved["seconds"]
            print(f"going on after epoch {trainer.steps // trainer.steps_per_epoch}")
        parts = 10 if run.value is None else 1  # each has a line where lines cannot be rewritten
        self.part = max(1, trainer.epochs // parts) * trainer.steps_per_epoch

    def seconds(self):
        """Time since the training began, with that of the runs which this one continues."""
        return max(time.monotonic() - self.started, 1e-3)  # some clocks tick slowly

    def __enter__(self):
        def interrupt(number, _):
            self.interrupted = True
            signal.signal(number, signal.default_int_handler)

        self.handlers = {number: signal.signal(number, interrupt)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, _):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error and self.in_place:
            print()
        if isinstance(error, RuntimeError) and any(  # CUDA's OutOfMemoryError is one
                words in str(error).lower() for words in ("out of memory", "alloc")):
            lower = [flag(self.config, name) for name in (
                "seeds_at_once", "seeds", "batch_size", "layers", "dim", "dims", "vocab")
                     if name in self.config]
            raise Problem(f"out of memory: each seed has {self.size}, and its activations on top; "
                          f"lower {', '.join(lower)}", 1)

    def __call__(self):
        now, part = time.monotonic(), self.trainer.steps % self.part == 0
        if part or now >= self.next_look:
            self.look(part)
            self.next_look = now + LOOK_SECONDS
        if now >= self.next_save or self.interrupted:
            self.save()
        if self.interrupted:
            raise Problem(f"interrupted; what is done is in {self.path}: go on with the same "
                          "command and --resume", 130)

    def look(self, part=False, over=False):
        """Read the numbers from the device: stop at NaN, print the progress line."""
        trainer, broken = self.trainer, self.trainer.bad_epoch.tolist()
        if min(broken) < math.inf:
            seeds = [seed for seed, epoch in zip(self.seeds, broken, strict=True)
                     if epoch < math.inf]
            raise Problem(f"{self.label}the loss is not finite since epoch {min(broken):.0f}, seed "
                          f"{', '.join(seeds)}: try a smaller --lr than {self.config['lr']}", 1)
        if self.run.command in THEORY:
            losses = trainer.curves[0, 0, :trainer.evaluations]  # (points, S)
            rise = (losses - losses.cummin(0).values).max().item()
            if rise > 0.01:  # gradient flow never rises
                raise Problem(f"{self.label}the training loss rises by {rise:.2g} nats: --lr "
                              f"{self.config['lr']} is unstable or else too long a step to "
                              f"stand for gradient flow; try --lr {self.config['lr'] / 4:.2g}", 1)
        if self.config["quiet"] or not (self.in_place or part):
            return
        train, validation = trainer.curves[:, 0, trainer.evaluations - 1].mean(1).tolist()
        epoch = trainer.steps / trainer.steps_per_epoch
        speed = epoch / self.seconds()  # epochs a second
        line = (f"{self.label}epoch {int(epoch)}/{trainer.epochs}  NLL: train {train:.4f}, "
                f"validation {validation:.3f}  {len(broken) * speed:.3g} seed-epochs/s  "
                f"{(trainer.epochs - epoch) / speed:.0f} s left")
        if self.in_place:  # at full width, to wipe out what stood there
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:<{width}}"
        print(line, end="" if self.in_place and not over else "\n", flush=True)

    def save(self, over=False):
        """Write the checkpoint; a large one less often, to take less than a tenth of the time. Of a
        run that is over the results suffice."""
        if not over:
            self.look()  # NaN is not worth keeping
        began = time.monotonic()
        content = {"name": self.path.stem, "config": self.config, "jobs": self.jobs,
                   "done": self.done, "seconds": self.seconds(),
                   "trainer": None if over else self.trainer.state_dict()}
        if self.path.exists() and not self.owns_checkpoint:  # another run's: keep it
            written = self.path.stat().st_mtime_ns
            os.replace(self.path, self.path.with_suffix(f".{written}.pt"))
        try:
            write_files({self.path: functools.partial(torch.save, content)})
        except (OSError, RuntimeError) as error:
            raise Problem(f"cannot write the checkpoint {self.path} ({error})", 1) from None
        self.owns_checkpoint = True
        self.next_save = began + CHECKPOINT_SECONDS + 11 * (time.monotonic() - began)


# ------------------------------------------------------------------------------------------ Flags


def number(kind, allowed, rule):
    """An argparse type: a number that keeps the rule; `allowed` says in words which those are."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if rule(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")

    return parse


COUNT = number(int, "a whole number from 1 to 1000000", lambda n: 1 <= n <= 10**6)
SEED = number(int, "a whole number from 0 to 2^32", lambda n: 0 <= n <= 2**32)
RATE = number(float, "a number above 0", lambda x: 0 < x < math.inf)
DECAY = number(float, "a number from 0 up", lambda x: 0 <= x < math.inf)
SHARE = number(float, "a number from 0 up and below 1", lambda x: 0 <= x < 1)

# (name, type or choices, laptop preset, paper preset or None if it is the same, help); "also": what
# the paper tried beside its default.
FLAGS = {
    "data": [
        ("vocab", COUNT, 800, 800, "entity tokens, 1/4 to an alphabet; also 20, 50, 200, 2000"),
        ("entity-length", COUNT, 1, 1, "tokens of an entity; also 2, 3"),
        ("complete", COUNT, None, None, "pairs, triples, or for icl B's of an A, trained in full; "
         "else 70 %, 100 of entity length 3, 200 of related tokens"),
        ("held-out", COUNT, None, None, "those of which one sentence is asked, not trained; else "
         "30 %, 50 of entity length 3, 50 of related tokens; onelayer: and both of distractors"),
        ("related-tokens", bool, False, None, "entities a i, b i, c i that share tokens"),
        ("facts", Path, None, None, "your own pairs: a file of lines A<TAB>B; sets --vocab")],
    "model": [
        ("layers", COUNT, 2, 24, "blocks; also 1"),
        ("heads", COUNT, 4, 12, "attention heads"),
        ("dim", COUNT, 64, 768, "embedding dimension; also 20"),
        ("position", ["none", "absolute", "relative"], "absolute", "absolute",
         "none, learned (absolute) or rotary (relative); all tried"),
        ("dropout", SHARE, 0.0, 0.1, "share of the activations zeroed in training"),
        ("freeze-embeddings", bool, False, None, "do not train them [paper: off; also on]"),
        ("tie-embeddings", bool, False, None, "output matrix is the token embedding [paper: off]")],
    "theory": [
        ("dims", number(int, "a whole number from 1 to 10000", lambda n: 1 <= n <= 10**4),
         [16, 32, 64, 128, 256, 512, 1024], None,
         "embedding dimensions, a training for each [16 32 64 128 256 512 1024]"),
        ("sigma", DECAY, 0.0, None, "Theta starts from N(0, sigma^2) [0]"),
        ("symmetric", bool, False, None, "train also with Theta tied to its transpose"),
        ("full-batch", bool, False, None, "all sentences a step, not one at a time")],
    "training": [
        ("epochs", COUNT, None, 3000, "passes over the training sentences"),
        ("batch-size", COUNT, 64, 64, "sentences a step"),
        ("lr", RATE, 0.01, 0.01, "learning rate of AdamW; in the theory, the step of gradient "
         "descent for each sentence"),
        ("betas", SHARE, [0.9, 0.999], None, "decay rates of its moments [paper: 0.9 0.999]"),
        ("weight-decay", DECAY, 0.01, 0.01, "of AdamW; the authors' 0.9 never reaches theirs"),
        ("loss", ["entity", "sequence"], "entity", "entity", "on the last entity or all tokens"),
        ("seeds", COUNT, 10, 10, "how many seeds train at once"),
        ("seed", SEED, 0, None, "the first seed, from which the others count up [0]")],
    "running": [
        ("device", ["auto", "cpu", "cuda", "mps"], "auto", None, "auto is cuda if there, else cpu"),
        ("precision", ["highest", "high", "bf16"], None, None, "of matrix products: float32, TF32, "
         "or all in bfloat16 but weights and updates [high on cuda, else highest]"),
        ("seeds-at-once", COUNT, None, None, "how many train side by side; they do not feel it "
         "[cuda: what fits its memory; cpu: 1 of a large model, else all]"),
        ("out", Path, Path("figures"), None, "directory of the results [figures]"),
        ("cosine", bool, False, None, "also the cosine similarities of the token embeddings"),
        ("animate", bool, False, None, "also the heat maps over the training, as a GIF"),
        ("resume", bool, False, None, "go on from the checkpoint of an interrupted run"),
        ("quiet", bool, False, None, "print no progress line")],
}
ONLY = {  # flags of these commands alone
    **dict.fromkeys([*(name for name, *_ in FLAGS["model"]), "batch-size", "betas", "weight-decay",
                     "loss", "cosine", "precision"], ("reversal", "chain", "icl")),
    **dict.fromkeys(["complete", "held-out"], ("reversal", "chain", "icl", "onelayer")),
    **dict.fromkeys(["dims", "sigma", "symmetric"], ("bilinear",)), "full-batch": ("onelayer",),
    "entity-length": ("reversal", "chain"), "related-tokens": ("chain",), "facts": ("reversal",),
    "animate": ("reversal", "chain")}
# Defaults that a command or an axis of ablate has for itself: (laptop preset, paper preset).
DEFAULTS = {
    "chain": {"epochs": (140, 3000), "lr": (0.003, 0.01)},
    "bilinear": {"vocab": (100, None), "epochs": (1500, None), "lr": (0.08, None)},
    "onelayer": {"vocab": (100, None), "complete": (3, None), "held-out": (3, None),
                 "epochs": (400, None), "lr": (0.25, None)},
    "icl": {"vocab": (400, 400), "complete": (7, 7), "held-out": (3, 3), "epochs": (40, 3000)},
    "ablate": {"seeds": (3, 10), "vocab": (400, 800), "epochs": (160, 3000), "lr": (0.003, 0.01)},
    "vocab": {"epochs": (None, 3000)},
    "entity-length": {"vocab": (200, 800), "epochs": (300, 3000)},
    "related-tokens": {"vocab": (800, 800), "epochs": (None, 3000)},
}
# What ablate varies: the flags that a value sets, the values of the laptop and the paper preset.
AXES = {
    "vocab": ("--vocab {}", "20 50 200 2000", "20 50 200 2000"),
    "entity-length": ("--entity-length {}", "2 3", "2 3"),
    "layers": ("--layers {}", "1 2 4 8", "1 12 24"),
    "heads": ("--heads {}", "1 2 4 8", "1 6 12"),
    "position": ("--position {}", "none absolute relative", "none absolute relative"),
    "embeddings": ("{}", "learned frozen tied", "learned frozen tied"),
    "size": ("--cosine --heads 4 --layers {} --dim {}", "1x20 1x256 12x20", "1x20 1x768 24x20"),
    "related-tokens": ("--related-tokens --complete {}", *["10 20 50 100 200 500"] * 2),
}
EMBEDDINGS = {"learned": "", "frozen": "--freeze-embeddings", "tied": "--tie-embeddings"}


def task_flags(task, axis=None):
    """FLAGS as a task has them, with the defaults that it and the axis of ablate have:
    {name: (title, type, laptop preset, paper preset, help)}."""
    own = DEFAULTS.get(task, {}) | (DEFAULTS["ablate"] if axis else {}) | DEFAULTS.get(axis, {})
    return {name: (title, kind, *own.get(name, presets), text) for title, rows in FLAGS.items()
            for name, kind, *presets, text in rows if task in ONLY.get(name, (task,))}


class Parser(argparse.ArgumentParser):
    """Argparse that tells an error in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n" if processes()[0] == 0 else None)


def build_parser():
    """The command line. Flags that are not given are None."""
    parser = Parser(prog="revcurse.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    epilog="Start with: python revcurse.py reversal")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {name: commands.add_parser(name, help=text, allow_abbrev=False,
                                       description=f"{name}: {text}. {run.__doc__}")
             for name, (run, text) in COMMANDS.items()}
    for name, usage in [("ablate", "ablate AXIS [--task TASK] [--values X ...]"), ("all", "all")]:
        added[name].usage = f"revcurse.py {usage} [flags of the task]"
        added[name].epilog = ("The flags of the tasks: revcurse.py reversal --help. Sweeps have "
                              "smaller defaults; what they are is printed first.")
    added["plot"].add_argument("results", type=Path, nargs="+", metavar="FILE.json",
                               help="results, with their .npz beside them")
    added["ablate"].add_argument("axis", choices=AXES, metavar="AXIS", help=", ".join(AXES))
    added["ablate"].add_argument("--task", choices=["reversal", "chain"],
                                 help="[reversal; for related-tokens chain]")
    added["ablate"].add_argument("--values", nargs="+", metavar="X",
                                 help="what to try, for size LAYERSxDIM [" + "; ".join(
                                     f"{axis}: {values}" for axis, (_, values, _) in AXES.items())
                                 + "; --preset paper has the paper's]")
    for task in (*TASKS, *THEORY):
        if task in TASKS:
            added[task].add_argument("--preset", choices=["laptop", "paper"], default="laptop",
                                     help="values of the flags that are not given [laptop]")
        groups = {title: added[task].add_argument_group(title) for title in FLAGS}
        for name, (title, kind, laptop, paper, text) in task_flags(task).items():
            options = {"type": kind, "metavar": "X",
                       "nargs": {"betas": 2, "dims": "+"}.get(name)}
            if kind is bool:
                options = {"action": "store_const", "const": True}
            elif isinstance(kind, list):
                options = {"choices": kind}
            if paper is not None:
                small = "80, or 480 steps" if laptop is None else laptop
                usual = "" if laptop == paper else f"laptop: {small}, "
                text += f" [{usual}paper: {paper}]"
            elif laptop and "[" not in text:
                text += f" [{laptop}]"
            groups[title].add_argument(f"--{name}", help=text.replace("%", "%%"), **options)
    return parser


def parse(argv, axis=None):
    """The arguments of a command line, with the defaults of its preset (and of an axis of ablate).
    In `rest`, ablate and all have the flags that they hand on to the tasks."""
    parser = build_parser()
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in ("ablate", "all"):
        parser.error(f"{args.command} does not know {' '.join(args.rest)}")
    for name, (_, _, laptop, paper, _) in task_flags(args.command, axis).items():
        name = name.replace("-", "_")
        if getattr(args, name, 0) is None:
            paper_size = getattr(args, "preset", "laptop") == "paper" and paper is not None
            setattr(args, name, paper if paper_size else laptop)
    return args


# ------------------------------------------------------------------------------------------ Plans


def choose_device(wanted):
    """auto is a CUDA GPU if there is one. Raises Problem if the wanted device is not here."""
    here = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(),
            "cpu", "auto"]
    if wanted not in here:
        raise Problem(f"--device {wanted}: torch {torch.__version__} finds none here; allowed: "
                      f"{', '.join(here)}")
    device = wanted if wanted != "auto" else "cuda" if "cuda" in here else "cpu"
    if device == "cuda":  # each process of torchrun on this machine has one of its own
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise Problem(f"--device cuda: {torch.cuda.device_count()} here, one for each process "
                          "of torchrun (--nproc-per-node)")
        torch.cuda.set_device(local)
    return device


def read_facts(path):
    """The pairs of names (A, B) in a file, one pair a line with a tab between."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")
    except OSError as error:
        raise Problem(f"--facts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object[:error.start].count(b"\n")
        raise Problem(f"--facts {path}: line {line} is not UTF-8; save it as such") from None
    facts, seen = [], {}
    for number, line in enumerate(lines, 1):
        names = tuple(name.strip() for name in line.split("\t"))
        if len(names) != 2 or not all(names):
            raise Problem(f"--facts {path}: line {number} is not two names with a tab between: "
                          f"{line[:40]!r}")
        for name in names:
            if name in seen:
                raise Problem(f"--facts {path}: line {number} repeats {name!r} of line "
                              f"{seen[name]}; each name is a token of its own")
            seen[name] = number
        facts.append(names)
    if len(facts) < 4:
        raise Problem(f"--facts {path}: ends with line {len(facts)}; 4 pairs or more are needed")
    return facts


def make_gpt(config, data, generator=None):
    """The GPT that the flags describe, for the sentences of this data set."""
    model = GPT(len(data.names), data.train.shape[1] - 1, config["layers"], config["heads"],
                config["dim"], config["position"], config["dropout"], config["tie_embeddings"],
                generator)
    for name in ("wte", "wpe"):
        if config["freeze_embeddings"] and name in model.transformer:
            model.transformer[name].requires_grad_(False)
    return model


class Run(NamedTuple):
    """One training: what a command line of a task asks for."""

    command: str  # of TASKS or THEORY
    value: str | None  # in a sweep
    config: dict  # every flag's final value
    datasets: list[Dataset]
    generators: list[torch.Generator]
    make_model: Callable[[Dataset, torch.Generator], nn.Module]


def flag_values(args):
    """Flags as the results file has them: {name: value}."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items() if name not in ("command", "rest")}


def prepare(args, value, make_data, make_model):
    """The Run of these flags on data that make_data(generator=) gives. Raises Problem if flags do
    not fit together."""
    generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.seeds)]
    try:
        datasets = [make_data(generator=g) for g in generators]
        with torch.device("meta"):  # all that the model checks, and none of its memory
            size = sum(weight.numel() for weight in make_model(datasets[0], None).parameters())
    except ValueError as error:  # it begins with the parameter, which is named as the flag
        raise Problem(f"--{error}") from None
    config = flag_values(args) | {"device": choose_device(args.device), "parameters": size}
    return Run(args.command, value, config, datasets, generators, make_model)


def prepare_task(args, value=None):
    """The Run of a task's command line."""
    facts = read_facts(args.facts) if getattr(args, "facts", None) else None
    for name in ("facts", "related_tokens"):
        if getattr(args, name, None) and args.entity_length > 1:
            raise Problem(f"--entity-length {args.entity_length}: does not go with "
                          f"--{name.replace('_', '-')}")
    args.vocab = 4 * len(facts) if facts else args.vocab
    flags, make = flag_values(args), TASKS[args.command].data
    options = {name: flags[name] for name in inspect.signature(make).parameters if name in flags}

    def make_data(generator):
        data = make(args.vocab, **options, generator=generator)
        return name_pairs(data, facts, generator) if facts else data

    run = prepare(args, value, make_data, functools.partial(make_gpt, flags))
    device = run.config["device"]
    if args.precision == "bf16" and device == "mps":
        raise Problem("--precision bf16: is for cpu and cuda")
    counts = [len(sentences) for sentences in run.datasets[0].groups.values()]
    steps = math.ceil(len(run.datasets[0].train) / args.batch_size)  # of an epoch
    return run._replace(config=run.config | {
        "complete": args.complete or counts[0], "held_out": args.held_out or counts[-1],
        "precision": args.precision or ("high" if device == "cuda" else "highest"),
        "epochs": args.epochs or max(80, math.ceil(480 / steps))})


def bilinear_runs(args):
    """A Run for each of the dimensions on the reversal task's pairs, and with --symmetric another.

    Section 3 has no relations: the sentences are x y, trained, and y x, asked.
    """
    def make_data(generator):
        data = reversal_data(args.vocab, 1, 0, args.vocab // 4, generator)  # no pair is complete
        return data._replace(groups={
            name: data.groups[group][:, [0, 2]] for name, group in [
                ("forward", "validation_seen"), ("reversal", "validation_unseen")]})

    for symmetric in [False, True][:1 + args.symmetric]:
        for dim in args.dims:
            def make_model(data, generator, dim=dim, symmetric=symmetric):
                return in_span(Bilinear(dim, len(data.names), args.sigma, generator, symmetric))

            run = prepare(args, f"dim {dim}{', symmetric' * symmetric}", make_data, make_model)
            yield run._replace(config=run.config | {
                "dim": dim, "symmetric": symmetric, "batch_size": len(run.datasets[0].train)})


def onelayer_runs(args):
    """A Run on each kind of data: Theorem 3's, Theorem 4's, and two that show their limits."""
    V, complete, held_out = args.vocab, args.complete, args.held_out
    for value, make_data in {
            "reversal": functools.partial(reversal_data, V, 1, complete, held_out),
            "chain": functools.partial(chain_data, V, 1, 0, complete + held_out),
            "chain with A ~> C": functools.partial(chain_data, V, 1, complete, held_out),
            "distractors": functools.partial(distractor_data, V, complete, held_out)}.items():
        run = prepare(args, value, make_data, lambda data, _: OneLayer(len(data.names)))
        yield run._replace(config=run.config | {
            "batch_size": len(run.datasets[0].train) if args.full_batch else 1})


def plan(args):
    """What a command line asks for: (name of its files, configuration, its Runs). A value of ablate
    is a command line as well: the task's, with the value's flags at the end."""
    if args.command in THEORY:
        runs = list(THEORY[args.command].runs(args))
        if runs[0].config["device"] == "mps":
            raise Problem("--device mps: has no float64, in which the theory is computed")
        if args.lr > 1:
            raise Problem(f"--lr {args.lr}: a step that moves a logit by more than 1 does not "
                          "stand for gradient flow and may be unstable")
        return args.command, flag_values(args) | {"device": runs[0].config["device"]}, runs
    if args.command in TASKS:
        run = prepare_task(args)
        related = "-related-tokens" if run.config.get("related_tokens") else ""
        return args.command + related, run.config, [run]
    form, laptop, paper = AXES[args.axis]
    task = args.task or ("chain" if args.axis == "related-tokens" else "reversal")
    if task == "reversal" and args.axis == "related-tokens":
        raise Problem("--task reversal: it has no related-tokens, the chain task has")
    base = parse([task, *args.rest], args.axis)
    if args.axis == "vocab" and getattr(base, "facts", None):
        raise Problem(f"--facts {base.facts}: sets --vocab, which this would vary")
    if base.animate:
        raise Problem("--animate: is for one training, not for a sweep")
    values = args.values or (paper if base.preset == "paper" else laptop).split()
    runs = []
    for value in values:
        parts = value.split("x") if args.axis == "size" else [value]
        if args.axis == "embeddings":
            parts = [EMBEDDINGS[value]] if value in EMBEDDINGS else []
        if len(parts) != form.count("{}"):
            raise Problem(f"--values {value}: not one for {args.axis}, such as {laptop}")
        flags = form.format(*parts).split()
        runs.append(prepare_task(parse([task, *args.rest, *flags], args.axis), value))
    config = {**flag_values(base), "axis": args.axis, "values": values,
              "device": runs[0].config["device"]}
    return f"ablate-{'chain-' if task == 'chain' else ''}{args.axis}", config, runs


# ---------------------------------------------------------------------------------------- Results


def make_trainer(run, seeds):
    """The trainer of these seeds that the flags describe."""
    config = run.config
    if run.command in THEORY:
        options = {"record": THEORY[run.command].record,
                   "points": spaced(config["epochs"], log=True)}
    else:
        options = {"loss": config["loss"], "bf16": config["precision"] == "bf16"}
    torch.set_float32_matmul_precision("high" if config.get("precision") == "high" else "highest")
    if config.get("animate"):
        options |= {"record": functools.partial(logit_matrices, seeds=1),
                    "record_every": max(1, round(len(spaced(config["epochs"])) / 25))}

    def make_optimizer(params):
        if run.command in THEORY:  # the loss is a mean over the batch, lr is for each sentence
            return torch.optim.SGD(params, lr=config["lr"] * config["batch_size"])
        return torch.optim.AdamW(
            params, lr=config["lr"], betas=config["betas"], weight_decay=config["weight_decay"],
            fused=config["device"] != "mps")  # which old versions of torch lack

    datasets, generators = ([column[seed] for seed in seeds]
                            for column in (run.datasets, run.generators))
    models = [run.make_model(*seed) for seed in zip(datasets, generators, strict=True)]
    return Trainer(models, datasets, generators, make_optimizer, epochs=config["epochs"],
                   batch_size=config["batch_size"], device=config["device"], **options)


def theory_numbers(run, trainer):
    """What was recorded, {name: (S, ..., points)}, and matrices of the first seed for the .npz."""
    frames = [frame for _, frame in trainer.frames]
    matrices = THEORY[run.command].matrices(trainer)
    return ({name: torch.stack([frame[name] for frame in frames], dim=-1) for name in frames[0]},
            {name: matrix[0] for name, matrix in matrices.items()})


def task_numbers(run, trainer):
    """The same of a task: numbers of each seed, {name: (S, ...)}, those of shape (S,) for the
    summary, and matrices of the first seed for the .npz."""
    numbers, arrays = measure(trainer), {}
    if run.command == "chain":
        numbers |= chain_of_thought(trainer)
    if TASKS[run.command].maps:
        matrices = logit_matrices(trainer)
        numbers["weights"], contrast = diagonal_means(matrices)
        if contrast.isfinite().all():
            numbers["contrast"] = contrast
        if run.value is None:
            arrays = {name: matrix[0] for name, matrix in matrices.items()}
    if run.config["cosine"]:
        arrays["cosine"] = cosines(trainer)[0].half()
    if trainer.frames:
        epochs, frames = zip(*trainer.frames, strict=True)
        arrays |= {"frame_epochs": torch.tensor(epochs), **{
            f"frames_{name}": torch.cat([frame[name] for frame in frames]).clamp(min=0).half()
            for name in frames[0]}}
    return numbers, arrays


def task_results(run, numbers, chance):
    """What the numbers of all seeds say of a task, for the results file."""
    data, K = run.datasets[0], run.datasets[0].answer_length
    results = {"summary": {name: spread(seeds) for name, seeds in numbers.items()
                           if seeds.ndim == 1}}
    results["curves"] = {"epoch": spaced(run.config["epochs"])} | {
        f"{part}_{name}": numbers["curves"][:, i, j].tolist()
        for j, name in enumerate(["nll", "word_nll"][:1 + (K > 1)])
        for i, part in enumerate(["train", "validation"])}
    if K > 1:
        chance |= {"word_vocabulary": K * chance["vocabulary"],
                   "word_alphabet": (K - data.graded) * chance["alphabet"]}
    if "weights" in numbers:
        results["weights"] = {
            group: {"diagonal": on, "off_diagonal": off if math.isfinite(off) else None}
            for group, (on, off) in zip(data.groups, numbers["weights"].mean(0).tolist(),
                                        strict=True)}
    if run.config.get("facts"):
        results["names"] = {group: [[data.names[s[0]], data.names[s[-1]]] for s in sentences]
                            for group, sentences in data.groups.items()}
    return results


def collect(job, run, trainer, seconds):
    """What is kept of a trained job: its numbers, and those things that only the first seed has."""
    find = theory_numbers if run.command in THEORY else task_numbers
    numbers, arrays = find(run, trainer)
    numbers["curves"] = trainer.curves.permute(3, 0, 1, 2)
    numbers, arrays = ({name: tensor.detach().cpu() for name, tensor in tensors.items()}
                       for tensors in (numbers, arrays))
    first = 0 in job[1]
    lines = examples(trainer) if first and run.value is None else []
    return {"job": job, "numbers": numbers, "arrays": arrays if first else {}, "lines": lines,
            "seconds": seconds, "step": seconds / trainer.steps, "how": trainer.recorder.how}


def assemble(run, parts):
    """(Content of the results file, arrays for the .npz) of a Run, from all parts of its seeds."""
    data = run.datasets[0]
    order = torch.tensor([seed for part in parts for seed in part["job"][1]]).argsort()
    numbers = {name: torch.cat([part["numbers"][name] for part in parts])[order]
               for name in parts[0]["numbers"]}
    results = {
        **({} if run.value is None else {"value": run.value}),
        "command": run.command, "config": run.config,
        "environment": {"python": platform.python_version(), "torch": str(torch.__version__),
                        "numpy": np.__version__, "device": run.config["device"]},
        "counts": {"train": len(data.train), "validation": len(data.validation)},
        "chance": {"vocabulary": math.log(len(data.names)),
                   "alphabet": math.log(data.alphabets.shape[1])},
        "seconds": sum(part["seconds"] for part in parts)}
    if run.command in THEORY:  # t: time of gradient flow on the mean loss
        times = [epoch * run.config["lr"] * len(data.train)
                 for epoch in spaced(run.config["epochs"], log=True)]
        results |= THEORY[run.command].results(run, numbers, times)
    else:
        results |= task_results(run, numbers, results["chance"])
    return results, next(part["arrays"] for part in parts if 0 in part["job"][1])


def verdict(results):
    """A sentence or two on whether the curse was seen in a run."""
    summary, chance, task = results["summary"], results["chance"], TASKS[results["command"]]
    word = "word_" if "train_word_nll" in summary else ""
    trained, unseen, loss = (summary[name]["mean"] for name in (
        "train_accuracy", "validation_accuracy", f"validation_{word}nll"))
    guess = chance[f"{word}alphabet"]
    name = ("Not learned yet" if trained < 0.99 else task.curse if unseen < 0.1 and loss > guess
            else "No curse" if unseen > 0.9 else "No clear curse")
    lines = [f"{name}: {trained:.1%} of the trained sentences are answered right and {unseen:.1%} "
             f"of the {task.unseen}, with an NLL of {loss:.2f} where guessing has {guess:.2f}."]
    if "two_step_accuracy" in summary:
        direct, steps = (summary[f"{way}_accuracy"]["mean"] for way in ("direct", "two_step"))
        lines.append(f'Asked "A ~>" at once, {direct:.1%} of the held-out triples are answered '
                     f'right; in two steps, "A ->" and then "B ->" with its own B, {steps:.1%}.')
    if name == "No curse" and task.note:
        lines.append(task.note)
    return "\n".join(lines)


def report(results, parts):
    """Print the verdicts, and of a single task also examples and the table."""
    if results["command"] in THEORY:
        return print(f"\n{results['verdict']}\n")
    if results["command"] == "ablate":
        for run in results["runs"]:
            print(f"{results['config']['axis']} {run['value']}: {verdict(run)}")
        return None
    summary, titles = results["summary"], {"accuracy": "accuracy", "nll": "NLL"}
    titles["rank"] = f"rank of {math.exp(results['chance']['alphabet']):.0f}"
    if "train_word_nll" in summary:
        titles |= {"nll": "NLL, one token", "word_nll": "NLL, whole entity"}
    print("\nHeld-out facts of the first seed:", *next(part["lines"] for part in parts
                                                       if part["lines"]), sep="\n")
    print("\nmean (std)  " + "".join(f"{title:^20}" for title in titles.values()))
    for part in ("train", "validation"):
        cells = ["{mean:.3f} ({std:.3f})".format(**summary[f"{part}_{name}"]) for name in titles]
        print(f"{part:12}" + "".join(f"{cell:^20}" for cell in cells))
    return print(f"\n{verdict(results)}\n")


# --------------------------------------------------------------------------------------- Commands


def processes():
    """(rank, world): which of how many processes of torchrun this one is."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fit(run):
    """How many seeds of a Run train at once, if --seeds-at-once does not say it.

    A seed takes 16 bytes for each parameter, of which 4 may be there twice, and 40 numbers for each
    token and layer, about, to go backward through. Small models of a processor train together, in
    its cache; large ones gain nothing from it.
    """
    config, train = run.config, run.datasets[0].train
    tokens = config["batch_size"] * (train.shape[1] - 1)
    need = 20 * config["parameters"] + 160 * tokens * config.get("layers", 0) * config.get("dim", 0)
    if config["seeds_at_once"] or config["device"] == "mps":
        return config["seeds_at_once"] or config["seeds"]
    if config["device"] == "cpu":
        return config["seeds"] if need < 100e6 else 1
    free, _ = torch.cuda.mem_get_info()
    count = max(1, int(0.9 * free / need))
    if count < config["seeds"]:
        print(f"{free / 1e9:.1f} GB are free, a seed needs about {need / 1e9:.2f} GB: no more than "
              f"{count} at once")
    return count


def share(runs):
    """This process's part of all seeds, as jobs: (a Run's number, seeds that train at once)."""
    (rank, world), jobs = processes(), []
    for i, run in enumerate(runs):
        S = run.config["seeds"]
        mine = [seed for seed in range(S) if (i * S + seed) % world == rank]
        if not mine:
            continue
        parts = np.array_split(mine, math.ceil(len(mine) / fit(run)))  # as equal as can be
        jobs += [(i, part.tolist()) for part in parts]
    return jobs


def gather(done):
    """What all processes have done, on the first of them; None on the others."""
    rank, world = processes()
    if world == 1:
        return done
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, if another process dies meanwhile
    parts = [None] * world if rank == 0 else None
    torch.distributed.gather_object(done, parts)
    return parts and [part for some in parts for part in some]


def floor(parameters, tokens, bandwidth, operations):
    """Seconds that a training step takes at least, at `bandwidth` bytes and `operations` a second.

    Forward and backward read each weight and write its gradient; AdamW reads weight, gradient and
    two moments and writes three of them: 40 bytes. A token costs 2 operations forward, 4 backward.
    """
    return max(40 * parameters / bandwidth, 6 * parameters * tokens / operations)


def measure_device(device, bf16):
    """(bytes, operations) a second, as a copy and a matrix product show them."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    numbers, side = (2**26, 4096) if device == "cuda" else (2**25, 1024)
    x, y = (torch.ones(numbers, device=device) for _ in range(2))
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    copy, product = (min(timeit.repeat(lambda call=call: (call(), wait()), repeat=6, number=1))
                     for call in (lambda: x.copy_(y), lambda: a @ a))
    return 8 * numbers / copy, 2 * side**3 / product


def report_speed(run, part):
    """Print the time of a step beside its floor."""
    config, (_, seeds), train = run.config, part["job"], run.datasets[0].train
    memory = (f"; peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
              if config["device"] == "cuda" else "")
    steps = math.ceil(len(train) / config["batch_size"])  # of an epoch, whose last may be small
    bandwidth, operations = measure_device(config["device"], config["precision"] == "bf16")
    least = floor(len(seeds) * config["parameters"], len(train) / steps * (train.shape[1] - 1),
                  bandwidth, operations)
    print(f"a step of {len(seeds)} seed{'s' * (len(seeds) > 1)}: {1e3 * part['step']:.2f} ms, "
          f"evaluation included; floor {1e3 * least:.2f} ms at {bandwidth / 1e9:.0f} GB/s and "
          f"{operations / 1e12:.2f} TFLOP/s ({config['precision']}), {part['step'] / least:.1f} "
          f"times as much; kernels run {part['how']}{memory}")


def carry_out(name, config, runs):
    """Train the Runs of a plan, write NAME.json, NAME.npz and the pictures: the results, or None in
    all processes but the first."""
    stem, (rank, world) = Path(config["out"]) / name, processes()
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=stem.parent).close()
    except OSError as error:
        raise Problem(f"--out {stem.parent}: not a directory that can be written to "
                      f"({error.strerror})") from None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU here"
    if config["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(f"device: {config['device']} ({gpu}){f', {world} processes' * (world > 1)}")
    print(textwrap.fill(", ".join(flag(config, name)[2:] for name in config),
                        shutil.get_terminal_size((100, 24)).columns, break_on_hyphens=False))
    began = time.monotonic()
    with Watch(checkpoint_path(stem), config, share(runs)) as watch:
        for job in watch.jobs[len(watch.done):]:
            watch.start(runs[job[0]], job[1])
            watch.trainer.run(watch)
            watch.look(over=True)
            watch.done.append(collect(job, runs[job[0]], watch.trainer, watch.seconds()))
            if len(watch.done) < len(watch.jobs) or world > 1:
                watch.save(over=True)
        if parts := gather(watch.done):
            results, files = write_results(stem, config, runs, parts)
        if world > 1:
            torch.distributed.barrier()  # the results are there: nothing is lost any more
        if watch.owns_checkpoint:  # another run's is left alone
            for file in (watch.path, *stem.parent.glob(f".{watch.path.stem}[._]*.tmp.*")):
                file.unlink(missing_ok=True)  # also what a kill has left half-written
        watch.trainer = None  # makes room
    if rank:
        return None
    report(results, parts)
    if results["command"] in TASKS:
        report_speed(runs[0], parts[0])
    print(f"wrote {', '.join(map(str, files))} in {time.monotonic() - began:.1f} s")
    return results


def write_results(stem, config, runs, parts):
    """Write the files of a plan whose jobs are done: (results, their paths)."""
    found = [assemble(run, [part for part in parts if part["job"][0] == i])
             for i, run in enumerate(runs)]
    results, arrays = found[0]
    command = "ablate" if "axis" in config else runs[0].command
    if command not in TASKS:
        results = {"command": command, "config": config, "runs": [run for run, _ in found]}
        arrays = {f"{name}_{i}": array for i, (_, arrays) in enumerate(found)
                  for name, array in arrays.items()}
    if command in THEORY:
        THEORY[command].conclude(results)
    arrays = {name: array.numpy() for name, array in arrays.items()}
    text = json.dumps(results, indent=1, allow_nan=False)
    files = {**draw(stem, results, arrays),
             stem.with_suffix(".npz"): lambda path: np.savez_compressed(path, **arrays),
             stem.with_suffix(".json"): lambda path: path.write_bytes(text.encode())}
    write_files(files)
    return results, files


def run_command(args):
    """Train what the flags describe, and draw it."""
    carry_out(*plan(args))


def plot_command(args):
    """Draw the pictures of results files again, beside them. Nothing is trained."""
    for path in args.results:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            if results["command"] == "all":
                print(f"{path} is the table of what was seen: there is nothing to draw")
                continue
            with open(path.with_suffix(".npz"), "rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
            pictures = draw(path.with_suffix(""), results, arrays)
            write_files(pictures)
        except Exception as error:  # a strange file can go wrong in every way
            if getattr(error, "strerror", None):
                raise Problem(f"{error.filename or path}: {error.strerror}") from None
            raise Problem(f"{path}: not a results file of revcurse.py with its .npz, or damaged"
                          ) from None
        print("wrote", ", ".join(map(str, pictures)))


EVERYTHING = ["reversal --animate --cosine", "chain --animate", "chain --related-tokens", "icl",
              *(f"ablate {axis} --task {task}" for task in ("reversal", "chain") for axis in AXES
                if task == "chain" or axis != "related-tokens")]
# A claim in words, and the range that it allows to numbers of the summary.
CURSE = "the trained sentences are learned, the unseen never better than chance", {
    "train_accuracy": (0.99, math.inf), "margin": (0, math.inf)}
DIAGONAL = "no diagonal where the pairs are unseen", {"contrast": (-0.1, 0.1)}
CLAIMS = [  # figure of the paper, results, what must be seen
    ("1", "reversal", *CURSE), ("2", "reversal", *DIAGONAL),
    ("3", "chain", *CURSE), ("4", "chain", *DIAGONAL),
    ("Section 5", "chain", "C is reached by way of B, not at once", {
        "direct_accuracy": (-math.inf, 0.1), "two_step_accuracy": (0.9, math.inf)}),
    *((figure, f"ablate-{axis}", *CURSE) for figure, axis in [
        ("5", "vocab"), ("6, 7, 9", "layers"), ("6, 7, 9", "heads"), ("6, 7, 9", "position"),
        ("6, 7, 9", "embeddings"), ("8", "entity-length"), ("10", "size")]),
    ("11", "ablate-size", "token embeddings are nearly orthogonal", {
        "cosine": (-math.inf, 0.2), "cosine_read": (-math.inf, 0.2)}),
    ("12 on", "icl", "no curse where the answer is in the context", {
        "validation_accuracy": (0.9, math.inf)}),
    *(("12 on", f"ablate-chain-{axis}", *CURSE) for axis in AXES if axis != "related-tokens")]


def check_claims(found):
    """Each of CLAIMS beside found = {name: results}: {"figure", "results", "claim", "measured",
    "holds"}. Measured is the number of the run and seed that is worst for the claim, None if there
    is none (a single held-out pair has no contrast). Tied embeddings are not the paper's."""
    claims = []
    for figure, name, claim, ranges in CLAIMS:
        runs, measured = found[name].get("runs", [found[name]]), {}
        for key, (low, high) in ranges.items():
            seeds = [seed for run in runs if run.get("value") != "tied" and key in run["summary"]
                     for seed in run["summary"][key]["per_seed"]]
            measured[key] = min(seeds, default=None,
                                key=lambda seed: min(seed - low, high - seed))
        holds = all(measured[key] is not None and low <= measured[key] <= high
                    for key, (low, high) in ranges.items())
        claims.append({"figure": figure, "results": name, "claim": claim, "measured": measured,
                       "holds": holds})
    return claims


def claims_table(claims):
    """The claims as a table in Markdown."""
    lines = ["| figure | results | what must be seen | measured | seen |", "|---|---|---|---|---|"]
    for *words, measured, holds in map(dict.values, claims):
        numbers = ", ".join(f"{key} -" if value is None else f"{key} {value:.3f}"
                            for key, value in measured.items())
        lines.append(f"| {' | '.join([*words, numbers, 'yes' if holds else '**no**'])} |")
    return "\n".join(lines)


def all_command(args):
    """Draw every figure of Section 5, and print a table of what must be seen and what was measured.
    Flags go to each command. With --resume, results that are there with the same flags are kept."""
    plans = [plan(parse([*line.split(), *args.rest])) for line in EVERYTHING]
    began, found, out = time.monotonic(), {}, Path(plans[0][1]["out"])
    rank, world = processes()
    for name, config, _ in plans if plans[0][1]["resume"] else []:
        if checkpoint_path(out / name).exists():  # find what does not fit before any work
            read_checkpoint(checkpoint_path(out / name), config)
        with contextlib.suppress(Exception):  # what is missing or damaged is made again
            results = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            if not difference(config, results["config"]):
                found[name] = results
                print(f"{out / name}.json is there")
    there = [list(found)]
    if world > 1:  # what the first process finds, which has the results
        torch.distributed.broadcast_object_list(there)
    for name, config, runs in plans:
        if name not in there[0]:
            found[name] = carry_out(name, config, runs)
    if rank:
        return
    claims = check_claims(found)
    text = json.dumps({"command": "all", "config": {"flags": args.rest}, "claims": claims,
                       "seconds": time.monotonic() - began}, indent=1)
    write_files({out / "all.json": lambda path: path.write_bytes(text.encode())})
    print(f"\n{claims_table(claims)}\n\nwrote {out / 'all.json'}")


class Theory(NamedTuple):
    """One of the commands on the theory, by its functions."""

    runs: Callable  # (args) to its Runs
    record: Callable  # (trainer) to {name: tensor}, at each point of the curves
    matrices: Callable  # (trainer) to {name: (S, ...)}, of which the first seed's go to the .npz
    results: Callable  # (run, numbers, times) to the results of one of the runs
    conclude: Callable  # (results): adds what follows from all runs, and it in words
    draw: Callable  # (results, arrays) to the figure


THEORY = {
    "bilinear": Theory(bilinear_runs, asymmetry, logit_matrices, bilinear_results,
                       conclude_bilinear, draw_bilinear),
    "onelayer": Theory(onelayer_runs, probabilities, lambda trainer: {"Y": trainer.params["Y"]},
                       onelayer_results, conclude_onelayer, draw_onelayer),
}
COMMANDS = {
    "reversal": (run_command, "Figures 1 and 2: train A -> B, ask B <-"),
    "chain": (run_command, "Figures 3 and 4: train A -> B and B -> C, ask A ~>"),
    "icl": (run_command, "in-context reversal: where the curse does not appear"),
    "ablate": (run_command, "Figures 5 to 12: a training for each value of a setting, the AXIS"),
    "bilinear": (run_command, "Section 3: the bilinear model, Theorems 1 and 2"),
    "onelayer": (run_command, "Section 4: the one-layer transformer, Theorems 3 and 4"),
    "all": (all_command, "every figure of the experiments, and a table of what was seen"),
    "plot": (plot_command, "draw again from the saved results"),
}


def main(argv=None):
    """Run a command line; returns the exit status."""
    args, (rank, world) = parse(argv), processes()
    with contextlib.suppress(Exception):  # glibc alone has it: keep what a step frees for the next
        for option, megabytes in [(-3, 32), (-1, 2047)]:  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, megabytes << 20)
    # The first process speaks for all.
    with contextlib.redirect_stdout(io.StringIO() if rank else sys.stdout):
        if world > 1:  # they meet at the end alone, where the first waits for the slowest
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        try:
            command, _ = COMMANDS[args.command]
            command(args)
            return 0
        except Problem as problem:
            message, status, *_ = *problem.args, 2
        except OSError as error:  # a full disk, say
            message, status = f"a file could not be written: {error}", 1
        except KeyboardInterrupt:
            message, status = "interrupted", 130
    if rank and status == 2:  # if the first process says the same, torchrun ends this one now
        time.sleep(1)
    if rank == 0 or status in (1, 2):
        who = f" (process {rank} of {world})" if world > 1 else ""
        print(f"revcurse.py {args.command}: error{who}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
