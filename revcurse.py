# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0"]
# ///
"""The reversal curse, made visible: a model trained on "A -> B" cannot answer "B <- A".

After Zhu, Huang, Zhang, Jordan, Jiao, Tian and Russell, "Towards a Theoretical Understanding of
the 'Reversal Curse' via Training Dynamics", NeurIPS 2024 (arXiv 2405.04669). Gradient descent on
cross-entropy raises the weight from A to B and does not raise the weight from B to A.

    python revcurse.py reversal                     Figures 1 and 2, seconds on a laptop
    python revcurse.py reversal --preset paper      the same at the paper's size, for a GPU
    python revcurse.py plot figures/reversal.json   draw again from the saved results

Read it from top to bottom: data and model (the paper's Section 5), training, measuring and
plotting (its Figures 1 and 2), running (what can go wrong), commands.

Shapes stand at each reshape: S seeds, B sentences, T tokens that the model reads, P tokens that it
predicts, D dim, H heads, V ids of the vocabulary, K tokens of an entity. NLL is in nats.
"""

import argparse
import functools
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
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------- Data

FORWARD, BACKWARD = 0, 1  # ids of the relations "->" and "<-"; entity tokens are 2 and up


class Dataset(NamedTuple):
    """Sentences of token ids for one seed, and what is needed to measure and print them."""

    train: torch.Tensor  # (sentences, T + 1)
    validation: torch.Tensor  # (sentences, T + 1), none of them in train
    answer_length: int  # K: the loss and the metrics look at a sentence's last K tokens
    alphabets: torch.Tensor  # (2, letters): the token ids that A and B are spelled with
    groups: dict[str, torch.Tensor]  # sentences by role, one heat map for each
    names: list[str]  # how to print each token id


def draw_entities(alphabet, length, count, generator):
    """`count` different tuples over `alphabet`, uniformly and in random order: (count, length).

    Draws until enough are different: the product (200**3 = 8 million) is never built.
    """
    letters = torch.empty(0, length, dtype=torch.long)
    while len(letters) < count:
        more = torch.randint(len(alphabet), (count, length), generator=generator)
        letters = torch.cat([letters, more]).unique(dim=0)
    return alphabet[letters[torch.randperm(len(letters), generator=generator)[:count]]]


def reversal_data(vocab_size, entity_length=1, complete=None, held_out=None, generator=None):
    """The reversal task (Section 5): a Dataset of sentences "A -> B" and "B <- A".

    Both directions of each complete pair are trained. Of each held-out pair one direction, chosen
    by a coin, is trained ("seen") and the other is asked ("unseen"): a model that learned from the
    complete pairs how the arrows belong together would answer. By default, as in the paper, there
    are min((vocab_size // 4)**K, 2 * (vocab_size // 4)) pairs, 70 % of them complete; from K = 3 on
    no more than 100 complete and 50 held out, so that the training set can be learned.

    vocab_size counts entity tokens; a model needs two ids more. A and B are spelled with
    vocab_size // 4 tokens each, disjoint. Raises ValueError if these cannot spell the pairs.
    """
    letters = vocab_size // 4
    pairs = min(letters**entity_length, 2 * letters)
    most = (pairs, pairs) if entity_length < 3 else (100, 50)
    complete = min(round(0.7 * pairs), most[0]) if complete is None else complete
    held_out = min(pairs - round(0.7 * pairs), most[1]) if held_out is None else held_out
    pairs = complete + held_out
    if min(complete, held_out) < 1:
        raise ValueError(f"vocab {vocab_size}: gives {complete} complete and {held_out} held-out "
                         "pairs; one of each is needed, so 8 tokens or more")
    if pairs > letters**entity_length:
        raise ValueError(f"complete {complete}: with --held-out {held_out} that is {pairs} pairs, "
                         f"but the {letters} tokens of an alphabet (--vocab {vocab_size} // 4) "
                         f"spell only {letters**entity_length} entities of length {entity_length}")

    alphabets = 2 + torch.randperm(vocab_size, generator=generator)[: 2 * letters].view(2, letters)
    a, b = (draw_entities(alphabet, entity_length, pairs, generator) for alphabet in alphabets)
    forward = torch.cat([a, torch.full((pairs, 1), FORWARD), b], dim=1)  # (pairs, K + 1 + K)
    backward = torch.cat([b, torch.full((pairs, 1), BACKWARD), a], dim=1)
    coin = torch.rand(held_out, 1, generator=generator) < 0.5
    groups = {"train_forward": forward[:complete], "train_backward": backward[:complete],
              "validation_seen": torch.where(coin, forward[complete:], backward[complete:]),
              "validation_unseen": torch.where(coin, backward[complete:], forward[complete:])}
    *train, validation = groups.values()

    names = ["->", "<-"] + [f"#{token}" for token in range(2, vocab_size + 2)]  # "#": in no pair
    for letter, alphabet, entities in zip("AB", alphabets, (a, b), strict=True):
        for i, token in enumerate((entities if entity_length == 1 else alphabet).flatten()):
            names[token] = f"{letter if entity_length == 1 else letter.lower()}{i}"
    return Dataset(torch.cat(train), validation, entity_length, alphabets, groups, names)


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


class Trainer:
    """Trains S seeds of one model at once, each on its own data, from its own weights.

    models, datasets and generators have length S; a model is any module from (tokens (B, T), last)
    to logits (B, last, V). A generator draws its seed's batches and dropout masks: what happens to
    a seed does not depend on the others. make_optimizer gets the list of trained tensors, each
    stacked over the seeds. loss: "entity" (the last K tokens) or "sequence" (all but the first).

    `curves` (2, points, S) holds the NLL of the entity's first token, on the training and on the
    validation sentences, after each of the epochs in `points` (all, or about 100 of them).
    """

    EVALUATE = 200  # sentences of a seed at once, to bound the memory and stay in the cache

    def __init__(self, models, datasets, generators, make_optimizer, *, epochs, batch_size=64,
                 loss="entity", device="cpu"):
        models = [model.to(device).eval() for model in models]  # eval: see Dropout
        self.model = models[0]  # for its structure: its own weights are not used
        self.params, self.buffers = stack_module_state(models)  # each tensor (S, ...)
        self.optimizer = make_optimizer([p for p in self.params.values() if p.requires_grad])
        self.generators, self.epochs, self.batch_size = generators, epochs, batch_size
        self.sentences = torch.stack([torch.cat([data.train, data.validation])
                                      for data in datasets]).to(device)  # (S, sentences, T + 1)
        self.train_count, self.K = len(datasets[0].train), datasets[0].answer_length
        self.P = self.K if loss == "entity" else self.sentences.shape[2] - 1
        self.steps_per_epoch = math.ceil(self.train_count / batch_size)
        self.points = np.linspace(0, epochs, min(epochs, 100) + 1).round().astype(int).tolist()
        self.curves = torch.zeros(2, len(self.points), len(models), device=device)
        self.bad_epoch = torch.full((len(models),), math.inf, device=device)  # of the first NaN
        self.steps = self.evaluations = 0
        self.order = torch.zeros(len(models), self.train_count, dtype=torch.long)  # of this epoch
        self.noise_generators = [torch.Generator(device).manual_seed(
            int(torch.randint(2**62, (), generator=g))) for g in generators]
        self.predict(self.sentences[:, :1, :-1], self.P)  # tells each Dropout its noise's shape
        self.noise_shapes = {f"{name}.noise": module.shape for name, module in
                             self.model.named_modules() if isinstance(module, Dropout) and module.p}

    def logits(self, tokens, last, noise=None):
        """Each seed's model on its own sentences: (S, B, T) to (S, B, last, V)."""
        def one_seed(state, tokens):
            return functional_call(self.model, state, (tokens, last))

        return vmap(one_seed)({**self.params, **self.buffers, **(noise or {})}, tokens)

    def losses(self, sentences, last, noise=None):
        """NLL of the last tokens, each given those before it: (S, B, T + 1) to (S, B, last)."""
        return nll(self.logits(sentences[..., :-1], last, noise), sentences[..., -last:])

    def draw_noise(self, rows):
        """Noise for every Dropout, each seed's from its own generator: {name: (S, rows, ...)}.

        Within vmap there is one generator for all seeds, and what a seed got would depend on how
        many train beside it. So the noise is drawn here and goes in with the weights, as buffers.
        """
        sizes = [rows * shape.numel() for shape in self.noise_shapes.values()]
        uniform = torch.stack([torch.rand(sum(sizes), generator=g, device=g.device)
                               for g in self.noise_generators])
        parts = zip(self.noise_shapes.items(), uniform.split(sizes, dim=1), strict=True)
        return {name: part.view(-1, rows, *shape) for (name, shape), part in parts}

    def step(self):
        """One batch of each seed: forward, backward, update. Nothing here waits for the device."""
        start = self.steps % self.steps_per_epoch * self.batch_size
        if start == 0:
            order = torch.stack([torch.randperm(self.train_count, generator=g)
                                 for g in self.generators])
            cuda = self.curves.is_cuda  # where from pinned memory a copy does not wait
            order = order.pin_memory() if cuda else order
            self.order = order.to(self.curves.device, non_blocking=cuda)
        rows = self.order[:, start:start + self.batch_size, None]  # (S, B, 1)
        sentences = self.sentences.take_along_dim(rows, dim=1)  # (S, B, T + 1)
        noise = self.draw_noise(rows.shape[1]) if self.noise_shapes else {}
        loss = self.losses(sentences, self.P, noise).mean((1, 2))  # (S,)
        self.optimizer.zero_grad()
        loss.sum().backward()  # no seed's loss has a gradient for another seed's weights
        self.optimizer.step()
        self.steps += 1
        self.note_bad(loss)

    def note_bad(self, values):
        """Keep, on the device, the first epoch in which a seed's value (S,) was not finite."""
        epoch = math.ceil(self.steps / self.steps_per_epoch)
        now = torch.where(values.isfinite(), math.inf, float(epoch))
        self.bad_epoch = self.bad_epoch.minimum(now)

    @torch.no_grad()
    def in_parts(self, function, tokens):
        """function(tokens) without gradients and dropout, some of the sentences at a time."""
        return torch.cat([function(part) for part in tokens.split(self.EVALUATE, dim=1)], dim=1)

    def predict(self, tokens, last):
        """As logits, but without gradients and dropout."""
        return self.in_parts(lambda part: self.logits(part, last), tokens)

    def evaluate(self):
        """The curves' next point."""
        losses = self.in_parts(lambda part: self.losses(part, self.K)[..., 0], self.sentences)
        losses = losses.clamp(max=NLL_CEILING)  # (S, sentences)
        parts = losses[:, :self.train_count], losses[:, self.train_count:]
        self.curves[:, self.evaluations] = torch.stack([part.mean(1) for part in parts])
        self.note_bad(losses.sum(1))
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
                "order": self.order, "params": {k: p.detach() for k, p in self.params.items()},
                "optimizer": self.optimizer.state_dict(),
                "generators": [g.get_state() for g in self.generators + self.noise_generators]}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Go to where the trainer stood that gave this state, whose tensors become this one's."""
        for name, tensor in self.params.items():
            tensor.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.evaluations = state["counts"]
        self.curves.copy_(state["curves"])
        self.order = state["order"].to(self.curves.device)
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


def measure(trainer, datasets):
    """Final metrics {"train_nll", ..., "validation_rank"}: each {"mean", "std", "per_seed"}.

    NLL, accuracy (the likeliest of all tokens is right) and rank are of the entity's first token;
    word_nll, for longer ones, sums over its tokens, each given those before. std is over the seeds.
    """
    K = trainer.K
    alphabets = [data.alphabets.to(trainer.curves.device) for data in datasets]

    def values(sentences):  # (S, B, T + 1) to (S, B, 4), the order that of the names below
        logits, targets = trainer.logits(sentences[..., :-1], K), sentences[..., -K:]
        losses = nll(logits, targets).clamp(max=NLL_CEILING)  # (S, B, K)
        first, target = logits[:, :, 0], targets[..., 0]  # (S, B, V), (S, B)
        ranks = torch.stack([rank(*seed) for seed in zip(first, target, alphabets, strict=True)])
        return torch.stack([losses[..., 0], first.argmax(-1) == target, ranks, losses.sum(-1)], -1)

    found = trainer.in_parts(values, trainer.sentences).cpu().double()
    summary = {}
    for part, rows in [("train", found[:, :trainer.train_count]),
                       ("validation", found[:, trainer.train_count:])]:
        for i, name in enumerate(["nll", "accuracy", "rank"] + ["word_nll"] * (K > 1)):
            seeds = rows[..., i].mean(1)
            summary[f"{part}_{name}"] = {"mean": seeds.mean().item(), "std": seeds.std(
                correction=0).item(), "per_seed": seeds.tolist()}
    return summary


def logit_matrices(trainer, datasets):
    """Figure 2: {group: (S, n, n)}. Entry (i, j) is the logit of the entity (its first token) that
    ends sentence j, when the model reads the entity that begins sentence i, alone."""
    matrices = {}
    for group in datasets[0].groups:
        sentences = torch.stack([data.groups[group] for data in datasets])  # (S, n, T + 1)
        logits = trainer.predict(sentences[..., :trainer.K].to(trainer.curves.device), 1)[:, :, 0]
        answers = sentences[:, None, :, -trainer.K]  # (S, 1, n)
        matrices[group] = logits.cpu().take_along_dim(answers, dim=2)  # (S, n, V) to (S, n, n)
    return matrices


def diagonal_means(matrices):
    """{group: {"diagonal", "off_diagonal"}}: mean logit of the pairs, and of everything else."""
    means = {}
    for group, matrix in matrices.items():  # (S, n, n)
        own = torch.eye(matrix.shape[1], dtype=torch.bool).expand_as(matrix)
        off = matrix[~own].mean().item() if matrix.shape[1] > 1 else None
        means[group] = {"diagonal": matrix[own].mean().item(), "off_diagonal": off}
    return means


def examples(trainer, datasets, pairs=3):
    """For a person: what the first seed was trained on, is asked, and answers (first tokens)."""
    K, data, lines = trainer.K, datasets[0], []
    for i in range(min(pairs, len(data.validation))):
        for group, shown in [("validation_seen", 1), ("validation_unseen", 3)]:
            sentences = torch.stack([data.groups[group][[i]] for data in datasets])  # (S, 1, T + 1)
            logits = trainer.predict(sentences[..., :-K].to(trainer.curves.device), 1)[0, 0].cpu()
            words = [data.names[token] for token in sentences[0, 0]]
            target, p = sentences[0, 0, -K], logits[0].softmax(0)
            best = p.topk(shown).indices
            grade = "right" if best[0] == target else (
                f"wrong; {words[-K]} has p {p[target].item():.1g}, rank "
                f"{rank(logits, target[None], data.alphabets).item()} of {data.alphabets.shape[1]}")
            if group == "validation_seen":
                lines.append(f"  trained: {' '.join(words)}")
            answer = ", ".join(f"{data.names[token]} (p {p[token]:.2g})" for token in best)
            lines.append(f"    {' '.join(words[:-K])} ?  {answer}: {grade}")
    return lines


# --------------------------------------------------------------------------------------- Plotting

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # colour-blind readers tell them apart


def draw_curves(results):
    """Figure 1: NLL of the trained sentences and of the unseen direction against the epoch."""
    curves, config = results["curves"], results["config"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour, label in [("train_nll", BLUE, "trained sentences"),
                                ("validation_nll", ORANGE, "unseen direction")]:
        seeds = np.array(curves[name])  # (S, points)
        axes.fill_between(curves["epoch"], seeds.min(0), seeds.max(0), color=colour, alpha=0.25,
                          linewidth=0)
        axes.plot(curves["epoch"], seeds.mean(0), color=colour, linewidth=2, label=label)
    for (name, value), style in zip(results["chance"].items(), ("--", ":"), strict=True):
        axes.axhline(value, color=GREY, linestyle=style, label=f"chance, {name}: {value:.2f}")
    axes.set(xlabel="epoch", ylabel="NLL of the right entity (nats)", ylim=(0, None))
    axes.margins(x=0)
    many = f": mean of {len(seeds)} seeds, band from lowest to highest" if len(seeds) > 1 else ""
    axes.set_title(f"Reversal task, V = {config['vocab']}, {config['layers']} layers, dim "
                   f"{config['dim']}{many}", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_weights(results, matrices):
    """Figure 2: four matrices of logits on one colour scale. The curse is the missing diagonal."""
    titles = {"train_forward": "complete pairs, A -> B: trained",
              "train_backward": "complete pairs, B <- A: trained",
              "validation_seen": "held-out pairs, the trained direction",
              "validation_unseen": "held-out pairs, the unseen direction"}
    low, high = (f([f(matrices[name]) for name in titles]) for f in (np.min, np.max))
    figure = Figure(figsize=(8, 7.4), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes, (name, title) in zip(grid.flat, titles.items(), strict=True):
        image = axes.imshow(matrices[name], vmin=low, vmax=high, cmap="magma")
        means = results["weights"][name]
        off = "" if means["off_diagonal"] is None else f", {means['off_diagonal']:.1f} off it"
        axes.set_title(f"{title}\nmean logit {means['diagonal']:.1f} on the diagonal{off}",
                       fontsize=10)
        axes.set(xlabel="answer of pair j", ylabel="question of pair i")
        axes.locator_params(nbins=6, integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=grid, shrink=0.6, label="logit of answer j after question i")
    seeds = len(results["curves"]["train_nll"])
    figure.suptitle("Logits of the first seed" + f"; the means are over all {seeds}" * (seeds > 1),
                    fontsize=11)
    return figure


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
    """Write {path: function of the open file}. All are written before the first appears, whole."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    try:
        for path, write in writers.items():
            with open(temporary[path], "wb") as file:
                write(file)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def draw(stem, results, matrices):
    """All pictures of a run: {path: function that writes the open file}."""
    figures = {"": draw_curves(results), "_weights": draw_weights(results, matrices)}
    return {stem.with_name(f"{stem.name}{suffix}.png"):
            functools.partial(figure.savefig, format="png", dpi=150)
            for suffix, figure in figures.items()}


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
        theirs, _, _ = dict(saved["config"]), saved["trainer"], 0.0 + saved["seconds"]
    except Exception:  # whatever a damaged file leads to
        raise Problem(f"--resume: {path} is not a checkpoint that can be read; delete it to start "
                      "from the beginning") from None
    for name, value in config.items():
        if name not in ("resume", "quiet", "out") and theirs.get(name) != value:
            raise Problem(f"{flag(config, name)}: the checkpoint {path} is of a run with "
                          f"{flag(theirs, name)}; go on with that, or without --resume")
    return saved


class Watch:
    """What goes on around training: progress line, checkpoints, Ctrl-C, an end to NaN.

    Call it after each step, within `with`. There the first Ctrl-C waits for the step to end, saves
    and stops, or, once the training is over, lets the results be written; the second stops at once.
    `seconds` were spent before, if the trainer goes on from a checkpoint.
    """

    def __init__(self, trainer, path, config, seconds=0.0):
        self.trainer, self.path, self.config = trainer, path, config
        now = time.monotonic()
        self.started = now - seconds
        self.next_look, self.next_save = now, now + CHECKPOINT_SECONDS
        self.tenth = max(1, trainer.epochs // 10) * trainer.steps_per_epoch
        self.interrupted, self.in_place = False, sys.stdout.isatty()
        self.owns_checkpoint = trainer.steps > 0

    def seconds(self):
        """Time since the training began, with that of the runs which this one continues."""
        return max(time.monotonic() - self.started, 1e-3)  # some clocks tick slowly

    def __enter__(self):
        def interrupt(*_):
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.handler = signal.signal(signal.SIGINT, interrupt)
        return self

    def __exit__(self, error, *_):
        signal.signal(signal.SIGINT, self.handler)
        if error and self.in_place:
            print()

    def __call__(self):
        now, tenth = time.monotonic(), self.trainer.steps % self.tenth == 0
        if tenth or now >= self.next_look:
            self.look(tenth)
            self.next_look = now + LOOK_SECONDS
        if now >= self.next_save or self.interrupted:
            self.save()
        if self.interrupted:
            raise Problem(f"interrupted; what is done is in {self.path}: go on with the same "
                          "command and --resume", 130)

    def look(self, tenth=False):
        """Read the numbers from the device: stop at NaN, print the progress line."""
        trainer, broken = self.trainer, self.trainer.bad_epoch.tolist()
        if min(broken) < math.inf:
            seeds = [str(self.config["seed"] + s) for s, epoch in enumerate(broken)
                     if epoch < math.inf]
            raise Problem(f"the loss is not finite since epoch {min(broken):.0f}, seed "
                          f"{', '.join(seeds)}: try a smaller --lr than {self.config['lr']}", 1)
        if self.config["quiet"] or not (self.in_place or tenth):
            return
        train, validation = trainer.curves[:, trainer.evaluations - 1].mean(1).tolist()
        seconds = self.seconds()
        speed = trainer.steps / trainer.steps_per_epoch / seconds  # epochs a second
        left = trainer.epochs / speed - seconds
        line = (f"epoch {trainer.steps // trainer.steps_per_epoch}/{trainer.epochs}  NLL: train "
                f"{train:.4f}, validation {validation:.3f}  {len(broken) * speed:.3g} "
                f"seed-epochs/s  {left:.0f} s left")
        if self.in_place:  # at full width, to wipe out what stood there
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{line[:width]:<{width}}"
        print(line, end="" if self.in_place else "\n", flush=True)

    def save(self):
        """Write the checkpoint; a large one less often, to take less than a tenth of the time."""
        self.look()  # NaN is not worth keeping
        began = time.monotonic()
        content = {"config": self.config, "seconds": self.seconds(),
                   "trainer": self.trainer.state_dict()}
        if self.path.exists() and not self.owns_checkpoint:  # another run's: keep it
            written = int(self.path.stat().st_mtime)
            os.replace(self.path, self.path.with_suffix(f".{written}.pt"))
        try:
            write_files({self.path: lambda file: torch.save(content, file)})
        except (OSError, RuntimeError) as error:
            raise Problem(f"cannot write the checkpoint {self.path} ({error})", 1) from None
        self.owns_checkpoint = True
        took = time.monotonic() - began
        self.next_save = began + CHECKPOINT_SECONDS + 11 * took


# --------------------------------------------------------------------------------------- Commands


def number(kind, allowed, rule):
    """An argparse type: a number that keeps the rule; `allowed` says in words which those are."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # keeps no rule
        if not rule(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


COUNT = number(int, "a whole number from 1 to 1000000", lambda n: 1 <= n <= 10**6)
SEED = number(int, "a whole number from 0 to 2^32", lambda n: 0 <= n <= 2**32)
RATE = number(float, "a number above 0", lambda x: 0 < x < math.inf)
DECAY = number(float, "a number from 0 up", lambda x: 0 <= x < math.inf)
SHARE = number(float, "a number from 0 up and below 1", lambda x: 0 <= x < 1)

# Flags by purpose: (name, type or choices, laptop preset, paper preset, help). A subcommand takes
# the groups that it needs. Where the paper has no value, the laptop's holds for both.
FLAGS = {
    "data": [
        ("vocab", COUNT, 800, 800, "entity tokens, a quarter for A, a quarter for B; also "
         "tried: 20, 50, 200, 2000"),
        ("entity-length", COUNT, 1, 1, "tokens of an entity; also tried: 2, 3"),
        ("complete", COUNT, None, None, "pairs trained in both directions [paper: 70 % of the "
         "pairs, 100 for entity length 3]"),
        ("held-out", COUNT, None, None, "pairs trained in one direction and validated in the other "
         "[paper: 30 % of the pairs, 50 for entity length 3]")],
    "model": [
        ("layers", COUNT, 2, 24, "blocks; also tried: 1"),
        ("heads", COUNT, 4, 12, "attention heads"),
        ("dim", COUNT, 64, 768, "embedding dimension; also tried: 20"),
        ("position", ["none", "absolute", "relative"], "absolute", "absolute",
         "none, learned (absolute) or rotary (relative); all tried"),
        ("dropout", SHARE, 0.0, 0.1, "share of the activations zeroed in training"),
        ("freeze-embeddings", bool, False, None, "leave token and position embeddings as they are "
         "drawn [paper: learned; also tried: frozen]"),
        ("tie-embeddings", bool, False, None, "use the token embedding as output matrix [paper: "
         "not tied]")],
    "training": [
        ("epochs", COUNT, 80, 3000, "passes over the training sentences"),
        ("batch-size", COUNT, 64, 64, "sentences a step"),
        ("lr", RATE, 0.01, 0.01, "learning rate of AdamW"),
        ("betas", SHARE, [0.9, 0.999], None, "AdamW's decay rates of the two moments [paper: 0.9 "
         "0.999]"),
        ("weight-decay", DECAY, 0.01, 0.01, "of AdamW; the authors' 0.9 never reaches theirs"),
        ("loss", ["entity", "sequence"], "entity", "entity", "on the last entity or all tokens"),
        ("seeds", COUNT, 10, 10, "how many seeds train at once"),
        ("seed", SEED, 0, None, "the first seed, from which the others count up [0]")],
    "running": [
        ("device", ["auto", "cpu", "cuda", "mps"], "auto", None, "auto is cuda if there, else cpu"),
        ("out", Path, Path("figures"), None, "directory of the results [figures]"),
        ("resume", bool, False, None, "go on from the checkpoint of an interrupted run"),
        ("quiet", bool, False, None, "print no progress line")],
}


class Parser(argparse.ArgumentParser):
    """Argparse that tells an error in one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_flags(parser, groups, preset):
    """Add --preset and these groups of FLAGS, with the preset's values as defaults."""
    parser.add_argument("--preset", choices=["laptop", "paper"], default="laptop",
                        help="values of the flags that are not given [laptop]")
    for title in groups:
        group = parser.add_argument_group(title)
        for name, kind, laptop, paper, text in FLAGS[title]:
            options = {"type": kind, "metavar": "X", "nargs": 2 if name == "betas" else None}
            if kind is bool:
                options = {"action": "store_true"}
            elif isinstance(kind, list):
                options = {"choices": kind}
            if paper is not None:
                text += f" [paper: {paper}]" if laptop == paper else (
                    f" [laptop: {laptop}, paper: {paper}]")
            default = laptop if paper is None or preset == "laptop" else paper
            group.add_argument(f"--{name}", default=default, help=text.replace("%", "%%"),
                               **options)


def build_parser(preset):
    """The command line, with the defaults of this preset."""
    parser = Parser(prog="revcurse.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                    epilog="Start with: python revcurse.py reversal")
    commands = parser.add_subparsers(dest="command", required=True, metavar="reversal|plot")
    for name, run in [("reversal", reversal_command), ("plot", plot_command)]:
        command = commands.add_parser(name, help=run.__doc__.split(".")[0], allow_abbrev=False,
                                      description=run.__doc__)
        command.set_defaults(run=run, preset=None)
        if run is plot_command:
            command.add_argument("results", type=Path, nargs="+", metavar="FILE.json",
                                 help="results, with their .npz beside them")
        else:
            add_flags(command, FLAGS, preset)
    return parser


def choose_device(wanted):
    """(device, why this one). Raises Problem if the wanted one is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    if wanted == "auto":
        return ("cuda", torch.cuda.get_device_name()) if here["cuda"] else ("cpu", "no CUDA GPU")
    if not here[wanted]:
        raise Problem(f"--device {wanted}: torch {torch.__version__} finds none here; allowed: "
                      f"auto, {', '.join(name for name in here if here[name])}")
    return wanted, "as asked"


def check_directory(path):
    """Find out before any work whether results can be written here."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise Problem(f"--out {path}: not a directory that can be written to "
                      f"({error.strerror})") from None


def make_model(config, data, generator=None):
    """The GPT that the flags describe, for the sentences of this data set."""
    model = GPT(len(data.names), data.train.shape[1] - 1, config["layers"], config["heads"],
                config["dim"], config["position"], config["dropout"], config["tie_embeddings"],
                generator)
    for name in ("wte", "wpe"):
        if config["freeze_embeddings"] and name in model.transformer:
            model.transformer[name].requires_grad_(False)
    return model


def prepare(args, make_data):
    """Flags to (config: every flag's final value, data sets, generators). Prints the configuration;
    raises Problem if flags do not fit together. make_data(generator) is the data set of a seed."""
    config = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    generators = [torch.Generator().manual_seed(args.seed + s) for s in range(args.seeds)]
    try:
        datasets = [make_data(generator) for generator in generators]
        with torch.device("meta"):  # all that the model checks, and none of its memory
            size = sum(weight.numel() for weight in make_model(config, datasets[0]).parameters())
    except ValueError as error:  # it begins with the parameter, which is named as the flag
        raise Problem(f"--{error}") from None
    counts = [len(sentences) for sentences in datasets[0].groups.values()]
    config["complete"], config["held_out"] = counts[0], counts[-1]
    config["device"], why = choose_device(args.device)
    check_directory(args.out)
    config["out"] = str(args.out)
    # A weight comes with its gradient and two moments, each of 4 bytes.
    args.size = f"{size:,} parameters and {16 * size / 1e6:,.1f} MB to train them"
    print(f"device: {config['device']} ({why})")
    print(textwrap.fill(", ".join(flag(config, name)[2:] for name in config),
                        shutil.get_terminal_size((100, 24)).columns, break_on_hyphens=False))
    print(f"{len(datasets[0].train)} training and {len(datasets[0].validation)} validation "
          f"sentences; for each seed {args.size}")
    return config, datasets, generators


def make_trainer(config, datasets, generators, checkpoint):
    """(The trainer that the flags describe, seconds spent before), from the checkpoint if resumed.
    """
    saved = read_checkpoint(checkpoint, config)
    trainer = Trainer(
        [make_model(config, *seed) for seed in zip(datasets, generators, strict=True)],
        datasets, generators,
        lambda params: torch.optim.AdamW(
            params, lr=config["lr"], betas=config["betas"], weight_decay=config["weight_decay"],
            fused=config["device"] != "mps"),  # which old versions of torch lack
        epochs=config["epochs"], batch_size=config["batch_size"], loss=config["loss"],
        device=config["device"])
    if saved is None:
        return trainer, 0.0
    trainer.load_state_dict(saved["trainer"])
    print(f"going on after epoch {trainer.steps // trainer.steps_per_epoch}")
    return trainer, saved["seconds"]


def report(results):
    """Print the table, and one sentence on whether the curse was seen."""
    summary, chance = results["summary"], results["chance"]["alphabet"]
    titles = "NLL", "accuracy", f"rank of {math.exp(chance):.0f}"
    print("\nmean (std)  " + "".join(f"{title:^20}" for title in titles))
    for part in ("train", "validation"):
        cells = [summary[f"{part}_{name}"] for name in ("nll", "accuracy", "rank")]
        cells = ["{mean:.3f} ({std:.3f})".format(**cell) for cell in cells]
        print(f"{part:12}" + "".join(f"{cell:^20}" for cell in cells))
    trained, unseen, loss = (summary[name]["mean"] for name in (
        "train_accuracy", "validation_accuracy", "validation_nll"))
    verdict = "The reversal curse" if unseen < 0.1 and loss > chance else "No clear curse"
    right = "right" if results["config"]["entity_length"] == 1 else "right in their first token"
    print(f"\n{verdict if trained > 0.99 else 'Not learned yet'}: {trained:.1%} of the trained "
          f"sentences are answered {right} and {unseen:.1%} of their unseen reversals, with an "
          f"NLL of {loss:.2f} where guessing has {chance:.2f}.\n")


def collect(command, config, trainer, datasets, matrices, seconds):
    """The content of the results file."""
    train_nll, validation_nll = trainer.curves.transpose(1, 2).tolist()  # (2, S, points)
    return {
        "command": command,
        "config": config,
        "environment": {"python": platform.python_version(), "torch": torch.__version__,
                        "numpy": np.__version__, "device": config["device"]},
        "counts": {"train": len(datasets[0].train), "validation": len(datasets[0].validation)},
        "chance": {"vocabulary": math.log(len(datasets[0].names)),
                   "alphabet": math.log(datasets[0].alphabets.shape[1])},
        "summary": measure(trainer, datasets),
        "weights": diagonal_means(matrices),
        "curves": {"epoch": trainer.points, "train_nll": train_nll,
                   "validation_nll": validation_nll},
        "seconds": seconds,
    }


def reversal_command(args):
    """Figures 1 and 2: train "A -> B", ask "B <-". Some pairs are trained in both directions, of
    the others one direction is trained and the other asked. Writes reversal.json, reversal.npz
    (the first seed's heat maps), reversal.png and reversal_weights.png."""
    config, datasets, generators = prepare(args, lambda generator: reversal_data(
        args.vocab, args.entity_length, args.complete, args.held_out, generator))
    stem = Path(config["out"]) / args.command
    checkpoint = stem.with_suffix(".pt")
    trainer, seconds = make_trainer(config, datasets, generators, checkpoint)
    with Watch(trainer, checkpoint, config, seconds) as watch:
        trainer.run(watch)
        watch.look()
        matrices = logit_matrices(trainer, datasets)
        results = collect(args.command, config, trainer, datasets, matrices, watch.seconds())
        first = {group: matrix[0].numpy() for group, matrix in matrices.items()}
        text = json.dumps(results, indent=1, allow_nan=False)
        files = {**draw(stem, results, first),
                 stem.with_suffix(".json"): lambda file: file.write(text.encode()),
                 stem.with_suffix(".npz"): lambda file: np.savez_compressed(file, **first)}
        write_files(files)
        if watch.owns_checkpoint:  # another run's is left alone
            for file in (checkpoint, *stem.parent.glob(f".{checkpoint.name}.*.tmp")):
                file.unlink(missing_ok=True)  # also what a kill has left half-written
    print("\nHeld-out pairs of the first seed:", *examples(trainer, datasets), sep="\n")
    report(results)
    print("wrote", ", ".join(map(str, files)))


def plot_command(args):
    """Draw the pictures of results files again. They are written beside them; nothing is trained.
    """
    for path in args.results:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            with open(path.with_suffix(".npz"), "rb") as file:
                pictures = draw(path.with_suffix(""), results, np.load(file, allow_pickle=False))
            write_files(pictures)
        except Exception as error:  # a strange file can go wrong in every way
            if getattr(error, "strerror", None):
                raise Problem(f"{error.filename or path}: {error.strerror}") from None
            raise Problem(f"{path}: not a results file of revcurse.py with its .npz, or damaged"
                          ) from None
        print("wrote", ", ".join(map(str, pictures)))


def parse(argv=None):
    """The arguments of a command line, with the defaults of its preset."""
    args = build_parser("laptop").parse_args(argv)
    return build_parser("paper").parse_args(argv) if args.preset == "paper" else args


def main(argv=None):
    """Run a command line; returns the exit status."""
    args = parse(argv)
    try:
        args.run(args)
        return 0
    except Problem as problem:
        message, status, *_ = *problem.args, 2
    except OSError as error:  # a full disk, say
        message, status = f"a file could not be written: {error}", 1
    except RuntimeError as error:  # of which CUDA's OutOfMemoryError is a kind
        if not any(words in str(error).lower() for words in ("out of memory", "alloc")):
            raise
        names = "seeds", "batch_size", "layers", "dim", "vocab", "entity_length"
        needs = getattr(args, "size", "its sentences")  # set once the sentences are there
        message = (f"out of memory: each seed has {needs}, and its activations on top; lower "
                   f"{', '.join(flag(vars(args), name) for name in names)}")
        status = 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"revcurse.py {args.command}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
