# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0", "pytest>=7.4.0"]
# ///
"""Tests of revcurse.py: `python test_revcurse.py`, or pytest. About a minute on two cores."""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and may share the cores

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import revcurse
from revcurse import (GPT, Bilinear, Chain, CureTrials, OneLayer, Reversal, chain_data, draw,
                      evaluate, icl_data, main, nll, prepare, reversal_data, run, train)

HERE = Path(__file__).parent
TINY = {"vocab": 24, "layers": 1, "heads": 2, "dim": 16, "epochs": 12, "seeds": 2,
        "batch_size": 4, "quiet": True}


def flags(**settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        if value not in (None, False):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else str(value).split())]
    return words


def without(*names, **others):
    """TINY without some settings, or with others."""
    return {name: value for name, value in (TINY | others).items() if name not in names}


def run_in(folder, *argv, **settings):
    """Run a command line in this process, with output to a folder: its exit status."""
    return main([*argv, *flags(**settings), "--out", str(folder)])


def read(folder, name="reversal"):
    return json.loads((folder / f"{name}.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- Data

# vocab, entity length: trained and asked sentences, as the paper's captions have them
COUNTS = {(20, 1): (9, 1), (50, 1): (20, 4), (200, 1): (85, 15), (800, 1): (340, 60),
          (2000, 1): (850, 150), (800, 2): (680, 120), (800, 3): (250, 50)}


@pytest.mark.parametrize("size", COUNTS, ids=str)
def test_reversal_data_is_the_papers(size):
    vocab, K = size
    data = reversal_data(vocab, K, seed=1)
    assert (data.trained, len(data.sentences) - data.trained) == COUNTS[size]
    assert len(data.names) == vocab + 2 and data.answer_length == K
    sentences = [tuple(s) for s in data.sentences.tolist()]
    assert len(set(sentences)) == len(sentences)
    facts = {}  # (A, B): directions that are trained
    for i, s in enumerate(sentences):
        left, arrow, right = s[:K], s[K], s[K + 1:]
        a, b = (left, right) if arrow == 0 else (right, left)
        assert all(2 <= t < 2 + vocab // 4 for t in a)
        assert all(2 + vocab // 4 <= t < 2 + vocab // 4 * 2 for t in b)
        if i < data.trained:
            facts.setdefault((a, b), set()).add(arrow)
        else:  # the reverse is trained, the sentence itself is not
            assert facts.pop((a, b)) == {1 - arrow}
    assert all(arrows == {0, 1} for arrows in facts.values())
    assert len({a for a, _ in facts}) == len({b for _, b in facts}) == len(facts)  # one to one


def test_data_comes_from_the_seed_and_its_coin_is_fair():
    one, same, other = (reversal_data(800, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.sentences, same.sentences)
    assert not torch.equal(one.sentences, other.sentences)
    arrows = torch.cat([reversal_data(800, seed=seed).groups["held-out, asked"][:, 1]
                        for seed in range(20)])  # 1200 tosses: 5 sigma are 0.072
    assert abs(arrows.float().mean() - 0.5) < 0.072


def test_long_entities_are_drawn_without_building_the_product():
    data = reversal_data(800, 6, 30, 20)  # of 200**6 tuples
    assert data.sentences.shape == (100, 13) and data.trained == 80
    spelled = [row[:6] if row[6] == 0 else row[7:] for row in data.sentences.tolist()]
    assert 80 < np.mean(spelled) < 124  # letters of A are 2 to 201


# vocab, entity length, complete (None: not related): trained and asked sentences
CHAINS = {(800, 1, None): (540, 60), (20, 1, None): (14, 1), (800, 2, None): (1080, 120),
          (800, 3, None): (400, 50), (800, 2, 200): (700, 50),
          **{(800, 2, n): (3 * n + 100, 50) for n in (10, 20, 50, 100, 500)}}


@pytest.mark.parametrize("size", CHAINS, ids=str)
def test_chain_data_is_the_papers(size):
    vocab, K, related = size
    data = (chain_data(vocab, K, seed=1) if related is None else
            chain_data(vocab, complete=related, related_tokens=True, seed=1))
    assert data.answer_length == K and data.graded == (0 if related is None else 1)
    assert (data.trained, len(data.sentences) - data.trained) == CHAINS[size]
    split = [(tuple(s[:K]), s[K], tuple(s[K + 1:])) for s in data.sentences.tolist()]
    trained, asked = set(split[:data.trained]), set(split[data.trained:])
    assert len(trained) + len(asked) == len(split) and not trained & asked
    step = {left: right for left, arrow, right in trained if arrow == 0}
    implied = {(left, right) for left, arrow, right in trained | asked if arrow == 1}
    # Every A has its two steps trained, and its A ~> C trained or asked: two steps lead there.
    assert implied == {(a, step[step[a]]) for a in step if step[a] in step}
    tokens = [set(), set(), set()]
    for a, c in implied:
        for alphabet, entity in zip(tokens, (a, step[a], c), strict=True):
            alphabet |= set(entity)
            assert min(entity) >= 2 and max(entity) < vocab + 2
    if related is None:
        assert not tokens[0] & tokens[1] and not tokens[1] & tokens[2] and not tokens[0] & tokens[2]
    else:
        fixed = {(a[0], step[a][0], c[0]) for a, c in implied}
        assert len(fixed) == 1 and len(set(*fixed)) == 3
        assert all(a[1] == step[a][1] == c[1] not in set(*fixed) for a, c in implied)


def test_icl_data_is_the_papers():
    data = icl_data(seed=1)
    assert (data.trained, len(data.sentences), len(data.names)) == (700, 1000, 403)
    pairs = {"complete": set(), "held-out": set()}
    for role, sentences in data.groups.items():
        for a, forward, b, same, b2, backward, a2 in sentences.tolist():
            assert (forward, backward, same, a, b) == (0, 1, 2, a2, b2) and min(a, b) > 2
            pairs[role].add((a, b))
    assert len(pairs["complete"]) == 700 and len(pairs["held-out"]) == 300
    both = pairs["complete"] | pairs["held-out"]
    assert len(both) == 1000  # no pair is in both
    letters_a, letters_b = {a for a, _ in both}, {b for _, b in both}
    assert len(letters_a) == 100 and len(letters_b) == 10 and not letters_a & letters_b
    asked = {a: frozenset(b for a2, b in pairs["held-out"] if a2 == a) for a in letters_a}
    assert all(len(others) == 3 for others in asked.values())
    assert len(set(asked.values())) > 20  # of 120: each A has its own three
    assert len(icl_data(13).groups["complete"]) == 3 * 7  # the smallest


def test_names():
    def words(data, role, row):
        return [data.names[token] for token in data.groups[role][row]]

    data = reversal_data(24)
    assert words(data, "complete A -> B", 3) == ["A3", "->", "B3"]
    assert words(data, "complete B <- A", 3) == ["B3", "<-", "A3"]
    chain = chain_data(24)
    assert words(chain, "complete B -> C", 1) == ["B1", "->", "C1"]
    assert words(chain, "held-out A ~> C", 0) == ["A4", "~>", "C4"]
    related = chain_data(24, complete=4, held_out=2, related_tokens=True)
    assert words(related, "held-out B -> C", 0) == ["b", "i4", "->", "c", "i4"]
    a, forward, b, same, b2, backward, a2 = words(icl_data(40), "complete", 7)
    assert (a, forward, same, backward, a2) == ("A1", "->", "<=>", "<-", "A1") and b == b2
    for data, letters in ((data, 6), (chain, 6), (related, 6)):  # answers lie in whole alphabets
        assert data.letters == letters
        assert (data.sentences[:, -1] >= data.first).all()


def test_facts_are_held_out_at_random():
    facts = [(f"capital {i}", f"country {i}") for i in range(6)]
    drawn = set()
    for seed in range(3):
        data = reversal_data(24, facts=facts, seed=seed)
        named = [[data.names[t] for t in s] for s in data.sentences.tolist()]
        pairs = {(s[0], s[2]) if s[1] == "->" else (s[2], s[0]) for s in named}
        assert pairs == set(facts)
        drawn.add(tuple(named[-1]))
    assert len(drawn) > 1


@pytest.mark.parametrize("make, text", [
    (lambda: reversal_data(7), "vocab 7: "), (lambda: chain_data(7), "vocab 7: "),
    (lambda: chain_data(100, related_tokens=True), "vocab 100: "),
    (lambda: chain_data(800, 2, related_tokens=True), "entity_length 1"),
    (lambda: icl_data(12), "vocab 12: "), (lambda: reversal_data(24, 1, 6, 1), "6 complete"),
    (lambda: reversal_data(20, facts=[("a", "b")] * 6), "6 facts need 24"),
    (lambda: reversal_data(24, 2, facts=[("a", "b")] * 6), "of one token"),
    (lambda: GPT(10, 4, 1, 3, 8), "multiple of 3"),
    (lambda: GPT(10, 4, 1, 4, 12, "relative"), "multiple of 8")])
def test_pieces_raise_value_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ----------------------------------------------------------------------------------------- Theory


def trained_theory(kind, seeds=3, value=None, **settings):
    """(settings, losses (S, points, n), models) of a theory command's training."""
    trainings = kind(quiet=True, seeds=seeds, **settings).trainings
    s, data, _ = prepare(trainings[value] if value else [*trainings.values()][0])
    models = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        models.append(s.make_model(data))
    seen, _ = train(s, models, [s.make_data(seed) for seed in range(seeds)], range(seeds))
    return s, seen[:, :, :, 0, 0], models


def test_bilinear_logits_are_those_of_the_loops():
    torch.manual_seed(0)
    model = Bilinear(5, 7)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not model.Theta.any() and trained == ["Theta"]
    assert Bilinear(5, 7, train_embeddings=True).embeddings.requires_grad
    nn.init.normal_(model.Theta)
    logits = model(torch.tensor([[3, 0], [1, 1]]))
    assert logits.shape == (2, 1, 7) and logits.dtype == torch.float64
    E, theta = model.embeddings.tolist(), model.Theta.tolist()
    for row, x in enumerate([3, 1]):
        for y in range(7):
            expected = sum(E[x][a] * theta[a][b] * E[y][b] for a in range(5) for b in range(5))
            assert math.isclose(logits[row, 0, y].item(), expected, abs_tol=1e-12)
    symmetric = Bilinear(5, 7, symmetric=True)
    symmetric.load_state_dict(model.state_dict())
    mean = (model.Theta + model.Theta.T) / 2
    torch.testing.assert_close(symmetric(torch.arange(7)[:, None])[:, 0],
                               model.embeddings @ mean @ model.embeddings.T)


def test_bilinear_embeddings_are_the_papers():
    assert abs(Bilinear(400, 500).embeddings.var() * 400 - 1) < 0.02
    torch.manual_seed(3)
    full = torch.randn(12, 50, dtype=torch.float64) / math.sqrt(50)
    torch.manual_seed(3)
    short = Bilinear(50, 12)
    assert short.Theta.shape == (12, 12)  # in the span of the tokens all products are the same
    torch.testing.assert_close(short.embeddings @ short.embeddings.T, full @ full.T)


def test_gradient_of_one_pair_by_hand():
    torch.manual_seed(1)
    model = Bilinear(6, 9)
    nn.init.normal_(model.Theta, 0, 0.5)
    nll(model, torch.tensor([[4, 0, 7]])).backward()
    E, theta = model.embeddings, model.Theta.detach()
    x, y = E[4], E[7]
    weights = [math.exp(x @ theta @ v) for v in E]
    mean = sum(w * v for w, v in zip(weights, E, strict=True)) / sum(weights)
    torch.testing.assert_close(model.Theta.grad, -torch.outer(x, y - mean), rtol=0, atol=1e-12)


def test_theorem_1_over_ten_seeds_and_the_symmetric_cure():
    epsilons = []
    for dim in (64, 256, 1024):
        s, losses, _ = trained_theory(revcurse.BilinearTheory, 10, dims=[dim], vocab=40)
        L, L_rev = losses[:, :, :10].mean(2), losses[:, :, 10:].mean(2)  # (S, points)
        assert L[:, -1].max() < 0.05 and (L.diff(dim=1) < 0).all()
        assert L_rev.min() > 0.9 * math.log(42)
        epsilons.append(max(
            math.log(L_rev[i, t] / L_rev[i, 0]) / math.log(L[i, t] / L[i, 0])
            for i in range(10) for t in range(1, L.shape[1])))
    assert epsilons == sorted(epsilons, reverse=True) and epsilons[-1] < 0.02
    _, losses, _ = trained_theory(revcurse.BilinearTheory, 10, "dim 256, symmetric", dims=[256],
                                  vocab=40, symmetric=True)
    assert losses[:, -1].max() < 0.1


def test_half_the_step_gives_the_same_curves():
    whole, half = (trained_theory(revcurse.BilinearTheory, dims=[64], vocab=40, lr=0.08 / k,
                                  epochs=80 * k)[:2] for k in (1, 2))
    ends = [losses[:, -1] for _, losses in (whole, half)]
    assert ends[0][:, :10].mean() < 1 and (ends[0] - ends[1]).abs().max() < 0.01


def one_layer_by_loops(Y, Z, tokens):
    """(b, f, alpha) of the paper's formulas, entry by entry, of one sentence."""
    *context, query = tokens
    scores = [math.exp(Z[query, token]) for token in context]
    b = [score / sum(scores) for score in scores]
    Xb = np.zeros(len(Y))
    for share, token in zip(b, context, strict=True):
        Xb[token] += share
    f = Xb / math.sqrt(sum(x * x for x in Xb))
    logits = [sum(f[i] * Y[i, j] for i in range(len(Y))) for j in range(len(Y))]
    return np.array(b), f, np.exp(logits) / sum(math.exp(x) for x in logits)


@pytest.mark.parametrize("context", [[3], [3, 5], [5, 5], [1, 2, 4], [2, 0, 2]], ids=str)
def test_one_layer_and_its_gradients_are_the_papers(context):
    V, query, target = 7, 6, 1
    model = OneLayer(V)
    assert not model.Y.any() and not model.Z.any()
    torch.manual_seed(sum(context))
    for weight in model.parameters():
        nn.init.normal_(weight)
    logits = model(torch.tensor([[*context, query]] * 2))
    assert logits.shape == (2, 1, V) and logits.dtype == torch.float64
    Y, Z = model.Y.detach().numpy(), model.Z.detach().numpy()
    b, f, alpha = one_layer_by_loops(Y, Z, [*context, query])
    np.testing.assert_allclose(logits[1, 0].softmax(-1).detach(), alpha, atol=1e-12)

    (-nll(model, torch.tensor([[*context, query, target]]))).backward()  # up -NLL
    e, q, X = np.eye(V)[target], np.eye(V)[query], np.eye(V)[context]
    Xb = X.T @ b
    P = np.eye(V) - np.outer(Xb, Xb) / (Xb @ Xb)
    dY = np.outer(f, e - alpha)
    dZ = np.outer(q, (e - alpha) @ Y.T @ (P / np.sqrt(Xb @ Xb)) @ X.T @ np.diag(b) @ X)
    np.testing.assert_allclose(model.Y.grad, dY, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.Z.grad, dZ, rtol=0, atol=1e-10)
    if len(context) == 1:
        assert (model.Z.grad == 0).all()


def test_closed_form_solves_the_equation_of_motion():
    M, N = 30, 4
    for t in (0.5, 10.0, 300.0):
        u, steps = 0.0, 100_000
        for _ in range(steps):  # a target's gradient is 1 - p, any other token's p of its own
            p = 1 / (1 + (M - 1) * math.exp(-u))
            u += t / steps * ((1 - p) + (1 - p) / (M - 1)) / N
        expected = math.log(1 + (M - 1) * math.exp(-u))
        assert math.isclose(revcurse.closed_form([0, t], M, N)[1], expected, rel_tol=2e-3)
    assert math.isclose(revcurse.closed_form([0, 1], M, N)[0], math.log(M))


@pytest.mark.parametrize("lr, batch_size", [(0.02, 1), (0.02, 10**6)])
def test_one_layer_trains_as_the_closed_form_says(lr, batch_size):
    s, losses, models = trained_theory(revcurse.OneLayerTheory, vocab=24, lr=lr, epochs=600,
                                       batch_size=batch_size, complete=2, held_out=2)
    expected = revcurse.closed_form([epoch * lr * 6 for epoch in s.points()], 26, 6)
    assert expected[-1] < 0.5
    assert np.abs(losses[:, :, :6].numpy() - expected[:, None]).max() < 0.02
    assert (losses[:, :, 6:] - math.log(26)).abs().max() < 1e-12  # Theorem 3, exactly a guess
    for seed, model in enumerate(models):
        read = {s[0] for s in reversal_data(24, 1, 2, 2, seed=seed).sentences[:6].tolist()}
        touched = model.Y.detach().abs().sum(1) > 0
        assert set(touched.nonzero().flatten().tolist()) == read and (model.Z == 0).all()


# ------------------------------------------------------------------------------------------ Model


def naive_gpt(weights, tokens, layers, heads, position):
    """GPT-2 in plain loops over tokens and heads, from its parameters by name, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    dim = w["transformer.wte.weight"].shape[1]
    d = dim // heads

    def norm(x, name):
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def turn(x, t):
        if position != "relative":
            return x
        half, turned = d // 2, np.zeros(d)
        for i in range(half):
            angle = t * 10000.0 ** (-2 * i / d)
            turned[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
            turned[half + i] = x[i] * math.sin(angle) + x[half + i] * math.cos(angle)
        return turned

    x = [w["transformer.wte.weight"][t] for t in tokens]
    if position == "absolute":
        x = [v + w["transformer.wpe.weight"][t] for t, v in enumerate(x)]
    for layer in range(layers):
        h = f"transformer.h.{layer}"
        qkv = [linear(norm(v, f"{h}.ln_1"), f"{h}.attn.c_attn") for v in x]
        mixed = []
        for t in range(len(x)):
            heads_out = []
            for n in range(heads):
                part = slice(n * d, (n + 1) * d)
                q = turn(qkv[t][:dim][part], t)
                keys = [turn(qkv[s][dim:2 * dim][part], s) for s in range(t + 1)]
                p = np.exp([q @ k / math.sqrt(d) for k in keys])
                values = [qkv[s][2 * dim:][part] for s in range(t + 1)]
                heads_out.append(sum(a * v for a, v in zip(p / p.sum(), values, strict=True)))
            mixed.append(linear(np.concatenate(heads_out), f"{h}.attn.c_proj"))
        x = [a + b for a, b in zip(x, mixed, strict=True)]
        for t, v in enumerate(x):
            u = linear(norm(v, f"{h}.ln_2"), f"{h}.mlp.c_fc")
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            x[t] = v + linear(u, f"{h}.mlp.c_proj")
    return np.stack([w["lm_head.weight"] @ norm(v, "transformer.ln_f") for v in x])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_gpt_against_plain_loops(position, tied):
    torch.manual_seed(0)
    model = GPT(11, 6, 3, 2, 8, position, tie_embeddings=tied)
    with torch.no_grad():  # away from the start, where attention is flat and norms are the identity
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.5)
    tokens = torch.randint(11, (3, 5))
    expected = np.stack([naive_gpt(model.state_dict(), s, 3, 2, position) for s in tokens.tolist()])
    for last in (None, 5, 2, 1):
        logits = model(tokens, last).detach()
        np.testing.assert_allclose(logits, expected[:, -(last or 5):], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_gpt_is_causal(position):
    torch.manual_seed(0)
    model = GPT(11, 6, 2, 2, 8, position)
    tokens, changed = torch.tensor([[[2, 3, 4, 5, 6]], [[2, 3, 4, 9, 6]]])
    same = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.equal(same[:3], torch.zeros(3)) and (same[3:] > 0).all()


def test_relative_positions_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8).double()
    turn = revcurse.Attention.rotate
    scores = turn(q.expand(6, 8)) @ turn(k.expand(6, 8)).T  # (query at, key at)
    for distance in range(-4, 5):
        assert scores.diagonal(distance).std() < 1e-5
    assert scores[0].std() > 0.1


def test_gpt_starts_as_gpt2_and_has_its_parameter_names():
    torch.manual_seed(0)
    model = GPT(500, 8, 3, 4, 64)
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
             "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    weights = dict(model.named_parameters())
    assert sorted(weights) == sorted(
        ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
         "transformer.ln_f.weight", "transformer.ln_f.bias",
         *(f"transformer.h.{i}.{name}" for i in range(3) for name in block)])
    for name, weight in weights.items():
        if "ln_" in name or name.endswith("bias"):
            assert (weight == float("ln_" in name and name.endswith("weight"))).all()
        elif weight.numel() > 1000:  # smaller ones say little about their spread
            expected = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(weight.std() / expected - 1) < 0.05 and abs(weight.mean()) < 0.002
    tied = GPT(500, 8, 1, 4, 64, tie_embeddings=True)
    assert tied.lm_head.weight is tied.transformer.wte.weight


# --------------------------------------------------------------------------------------- Training


class Table(nn.Module):
    """A model set by hand: the logits after a token are its row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens, last=1):
        return self.table[tokens[:, -last:]]


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_loss_looks_at_the_right_tokens(loss, K):
    """The gradient of an all-zero table, by hand."""
    data, model = reversal_data(24, K), Table(torch.zeros(26, 26))
    batch = data.sentences[:data.trained]
    Reversal(loss=loss).batch_loss(model, batch, data).backward()
    expected = torch.zeros(26, 26)
    predicted = range(K + 1, 2 * K + 1) if loss == "entity" else range(1, 2 * K + 1)
    for sentence in batch.tolist():
        for at in predicted:
            expected[sentence[at - 1]] += 1 / 26
            expected[sentence[at - 1], sentence[at]] -= 1
    torch.testing.assert_close(model.table.grad, expected / len(batch) / len(predicted))


def tiny(*seeds, dtype=None, **settings):
    """(settings, models, datasets) of a tiny reversal task."""
    s, data, _ = prepare(Reversal(**TINY | {"layers": 2, "epochs": 4} | settings))
    datasets, models = [s.make_data(seed) for seed in seeds], []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(s.make_model(data).to(dtype))
    return s, models, datasets


@pytest.mark.parametrize("seeds", [(5,), (0, 1, 2)], ids=str)
def test_training_all_seeds_at_once_against_one_plain_loop_each(seeds):
    """In float64, as the keys' biases have no gradient but rounding, which AdamW scales up."""
    s, models, datasets = tiny(*seeds, dtype=torch.float64, lr=0.02, betas=(0.8, 0.99),
                               weight_decay=0.1)
    alone = copy.deepcopy(models)
    seen, frames = train(s, models, datasets, seeds)
    assert seen.shape == (len(seeds), 5, 12, 3, 1) and frames == []
    for i, (seed, model, data) in enumerate(zip(seeds, alone, datasets, strict=True)):
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, (0.8, 0.99), weight_decay=0.1)
        sentences = data.sentences[:10]
        for epoch in range(5):
            p = model(data.sentences[:, :2])[:, 1].softmax(-1)
            p = p[torch.arange(12), data.sentences[:, 2]]
            torch.testing.assert_close(seen[i, epoch, :, 0, 0], -p.log().detach())
            if epoch == 4:
                break
            for rows in torch.randperm(10, generator=order).split(4):
                batch = sentences[rows]
                loss = nn.functional.cross_entropy(model(batch[:, :2])[:, -1], batch[:, 2])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert not models[i].training  # the trained weights are in the models
        for name, weight in model.named_parameters():
            torch.testing.assert_close(models[i].get_parameter(name), weight, atol=1e-9, rtol=1e-9)


def test_a_seed_alone_is_the_same_as_among_others():
    many = train(*tiny(0, 1, 2, 3), (0, 1, 2, 3))[0]
    one = train(*tiny(3), (3,))[0]
    torch.testing.assert_close(many[3:], one, atol=1e-4, rtol=1e-4)
    assert (many[2:3] - one).abs().max() > 0.01


def test_dropout_is_at_work_in_training_only():
    s, models, datasets = tiny(0, 1, dropout=0.5, lr=0.0)
    losses = train(s, models, datasets, (0, 1))[0]
    for point in range(1, 5):  # with rate 0 nothing is learned, and nothing is dropped
        assert torch.equal(losses[:, 0], losses[:, point])
    ends = [train(*tiny(0, 0, dropout=rate), (0, 0))[0][:, -1] for rate in (0.0, 0.5)]
    torch.testing.assert_close(*ends[0])  # the same seed twice
    assert (ends[1][0] - ends[1][1]).abs().max() > 0.01  # has other masks
    model = GPT(10, 4, 2, 2, 8, dropout=0.5)
    parts = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert len(parts) == 1 + 2 * 2 and {part.p for part in parts} == {0.5}


def test_frozen_embeddings_stay_and_tied_ones_are_trained_together():
    for tied in (False, True):
        s, models, datasets = tiny(0, 1, tie_embeddings=tied, freeze_embeddings=not tied)
        before = copy.deepcopy(models)
        train(s, models, datasets, (0, 1))
        for old, model in zip(before, models, strict=True):
            moved = {name for name, weight in model.named_parameters()
                     if not torch.equal(weight, old.get_parameter(name))}
            frozen = set() if tied else {"transformer.wte.weight", "transformer.wpe.weight"}
            assert {name for name, _ in model.named_parameters()} - moved == frozen
            assert (model.lm_head.weight is model.transformer.wte.weight) == tied
            if tied:
                assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_points_and_epochs():
    def points(settings):
        return prepare(settings)[0].points()

    for settings, epochs in [(Reversal(), 80), (Reversal(epochs=3000), 3000), (
            revcurse.BilinearTheory().trainings["dim 16"], 1500)]:
        found = points(settings)
        assert found[0] == 0 and found[1] < 3 and found[-1] == epochs and 50 < len(found) <= 80
        assert all(b - a >= 1 for a, b in zip(found, found[1:], strict=False))
    # 480 steps at least: V = 20 has 9 sentences, one step an epoch; V = 2000 has 850, fourteen
    assert prepare(Reversal(vocab=20))[0].epochs == 480
    assert prepare(Reversal(vocab=2000))[0].epochs == 80
    assert prepare(Chain())[0].epochs == 140
    assert prepare(Reversal(vocab=20, batch_size=4))[0].epochs == 160


# -------------------------------------------------------------------------------------- Measuring


def test_evaluation_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    data = reversal_data(24)
    data.first, data.letters = 0, 3  # alphabets 0 to 2 and 3 to 5
    total = sum(math.exp(v) for v in [0, 2, 1, 3, -1, 5])
    sentences = torch.tensor([[0, 2], [0, 5], [1, 4], [1, 0], [0, 0]])
    torch.testing.assert_close(evaluate(Table(logits), sentences, data)[..., 0], torch.tensor([
        [math.log(total) - 1, 0, 2], [math.log(total) - 5, 1, 1],  # 2 is below 1; 5 is the highest
        [math.log(math.exp(4) + 5), 0, 1], [math.log(math.exp(4) + 5) - 4, 1, 1],  # 3 to 5 equal
        [math.log(total), 0, 3]]))
    assert nll(Table(logits), sentences[:1]).item() == pytest.approx(math.log(total) - 1)
    high = evaluate(Table(torch.tensor([[500.0, 0, 0, 0, 0, 0]])), torch.tensor([[0, 1]]), data)
    assert high[0, 0].item() == pytest.approx(50 * math.log(10))  # the authors' ceiling


def test_heat_maps_of_a_model_set_by_hand():
    """A table that knows each pair A_i -> B_i and nothing else."""
    data, table = reversal_data(24), torch.zeros(26, 26)
    for a, _, b in data.groups["complete A -> B"].tolist():
        table[a, b] = 7.0
    maps = revcurse.heat_maps(Table(table), data)
    assert torch.equal(maps["complete A -> B"], 7 * torch.eye(4))
    assert torch.equal(maps["complete B <- A"], torch.zeros(4, 4))
    assert revcurse.heat_maps(Table(table), data, 3)["complete A -> B"].shape == (3, 3)


def test_numbers_of_long_entities_against_a_loop():
    s, models, datasets = tiny(0, entity_length=2)
    data, model = datasets[0], models[0].eval()
    seen, _ = train(s.altered(epochs=1, lr=0.0), models, datasets, (0,))
    found, maps = revcurse.measure(s, 0, model, data, seen[0], [])
    words, firsts, right = [], [], []
    with torch.no_grad():
        for sentence in data.sentences[data.trained:].tolist():
            log_p = model(torch.tensor([sentence[:-1]]))[0].log_softmax(-1)
            firsts.append(-log_p[2, sentence[3]].item())
            words.append(firsts[-1] - log_p[3, sentence[4]].item())
            right.append([log_p[2].argmax(), log_p[3].argmax()] == sentence[3:])
        role = "held-out, asked"
        rows = data.groups[role]
        expected = [[model(row[None, :2])[0, 1, column[3]].item() for column in rows]
                    for row in rows]
    assert found["validation_nll"] == pytest.approx([np.mean(firsts)] * 2, rel=1e-5)
    assert found["validation_word_nll"] == pytest.approx(np.mean(words), rel=1e-5)
    assert found["validation_accuracy"] == pytest.approx(np.mean(right))
    assert found["asked_cosine"] == pytest.approx(1, abs=1e-6)  # nothing was trained
    assert maps[role] == pytest.approx(np.array(expected), abs=1e-3)
    results = revcurse.summarize(s.altered(epochs=1), data, [(found, maps)])
    n, weights = len(expected), results["weights"][role]
    assert weights["diagonal"] == pytest.approx(np.trace(expected) / n, abs=1e-3)
    off = (np.sum(expected) - np.trace(expected)) / (n * n - n)
    assert weights["off_diagonal"] == pytest.approx(off, abs=1e-3)
    assert results["summary"]["validation_nll"]["per_seed"] == [found["validation_nll"][-1]]


class Lookup(nn.Module):
    """A model set by hand: the logits after "entity arrow" are in a table[arrow, entity]."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens, last=1):
        return self.table[tokens[:, -1], tokens[:, -2]][:, None]


def test_chain_of_thought_by_hand():
    data = chain_data(40)  # 10 triples, 3 of them held out
    table = torch.zeros(2, 42, 42)
    a, _, b = data.groups["held-out A -> B"].T
    c = data.groups["held-out B -> C"][:, 2]
    table[0, a, b] = 1.0
    table[0, b, c] = 1.0
    table[0, a[0], b[1]] = 2.0  # A0 -> B1, which leads to C1
    table[0, b[2], b[2]] = 3.0  # B2 -> B2
    table[1, a[0], c[0]] = 1.0  # A0 ~> C0 at once
    table[1, a[1], b[1]] = 1.0
    table[1, a[2], c[2]] = 1.0
    asked = data.groups["held-out A ~> C"]
    assert revcurse.chain_of_thought(Lookup(table), asked, data) == pytest.approx(1 / 3)
    assert evaluate(Lookup(table), asked, data)[:, 1].mean().item() == pytest.approx(2 / 3)


def test_chain_of_thought_of_several_tokens_against_a_loop():
    data = chain_data(24, 2)
    torch.manual_seed(2)
    model = GPT(26, 4, 2, 2, 16)
    with torch.no_grad():
        for weight in model.parameters():  # so that it says something else after each token
            weight.add_(torch.randn(weight.shape) * 0.3)

    def continued(question):
        for _ in range(2):
            question = question + [model(torch.tensor([question]))[0, -1].argmax().item()]
        return question[-2:]

    asked = data.groups["held-out A ~> C"]
    for i, row in enumerate(asked.tolist()):  # make the model's own answers the right ones
        asked[i, 3:] = torch.tensor(continued(continued([*row[:2], 0]) + [0]) if i % 2 else
                                    continued(row[:3]))
    found = revcurse.chain_of_thought(model, asked, data)
    steps = [continued(continued([*row[:2], 0]) + [0]) == row[3:] for row in asked.tolist()]
    assert found == pytest.approx(np.mean(steps)) and 0 < found < 1


def test_verdict():
    def word(trained, asked, nll, guess=2.0):
        means = {"train_accuracy": trained, "validation_accuracy": asked, "validation_nll": nll,
                 "train_nll": 0.1}
        return revcurse.verdict({"unseen": "x", "chance": {"alphabet": guess}, "summary": {
            name: {"mean": mean} for name, mean in means.items()}}).split(":")[0]

    assert word(0.98, 0.0, 9.0) == "Not learned yet"
    assert word(1.0, 0.0, 9.0) == word(0.991, 0.09, 2.1) == "The curse"
    assert word(1.0, 0.95, 0.1) == "No curse"
    assert word(1.0, 0.5, 9.0) == word(1.0, 0.05, 1.9) == "Some curse"


# ------------------------------------------------------------------------- The commands, as a user


def test_the_curse(tmp_path, capsys):
    """The default size, with fewer seeds; the numbers that README and help promise."""
    assert run_in(tmp_path, "reversal", seeds=3, seed=3) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "reversal on cpu" in lines[0] or "cuda" in lines[0]
    assert "of 340 sentences, 202,880 parameters" in lines[1]
    assert "The curse: " in printed and printed.count("right is ") == 3
    results = read(tmp_path)
    assert {"command", "config", "environment", "counts", "chance", "summary", "weights", "curves",
            "seconds"} <= set(results)
    assert results["counts"] == {"train": 340, "validation": 60}
    assert results["chance"] == pytest.approx({"vocabulary": math.log(802),
                                               "alphabet": math.log(200)})
    summary = results["summary"]
    for name in ("nll", "accuracy", "rank"):
        for part in ("train", "validation"):
            number = summary[f"{part}_{name}"]
            assert number["mean"] == pytest.approx(np.mean(number["per_seed"]))
            assert number["std"] == pytest.approx(np.std(number["per_seed"]))
            assert len(number["per_seed"]) == 3
    assert summary["train_accuracy"]["mean"] > 0.97 and summary["train_nll"]["mean"] < 0.2
    assert max(summary["validation_accuracy"]["per_seed"]) <= 0.02
    assert min(summary["validation_nll"]["per_seed"]) > math.log(200) + 2
    assert summary["train_rank"]["mean"] < 1.5 and 60 < summary["validation_rank"]["mean"] < 140
    weights = results["weights"]
    for role in ("complete A -> B", "complete B <- A", "held-out, trained"):
        assert weights[role]["diagonal"] > weights[role]["off_diagonal"] + 5
    unseen = weights["held-out, asked"]
    assert abs(unseen["diagonal"] - unseen["off_diagonal"]) < 0.5
    curves = results["curves"]
    assert curves["epoch"][-1] == 80 and np.shape(curves["train_nll"]) == (3, len(curves["epoch"]))
    assert min(summary["asked_cosine"]["per_seed"]) > 0.99999  # never read
    assert [curve[-1] for curve in curves["validation_nll"]] == summary["validation_nll"]["per_seed"]
    assert abs(np.array(curves["train_nll"])[:, 0] - math.log(802)).max() < 0.05
    with np.load(tmp_path / "reversal.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "complete A -> B": (140, 140), "complete B <- A": (140, 140),
            "held-out, trained": (60, 60), "held-out, asked": (60, 60)}
        assert arrays["held-out, trained"].argmax(1).tolist() == list(range(60))
    assert names_in(tmp_path) == ["reversal.json", "reversal.npz", "reversal.png",
                                  "reversal_weights.png"]


def test_chain_is_intransitive_but_two_steps_lead_there(tmp_path, capsys):
    assert run_in(tmp_path, "chain", vocab=80, seeds=2, seed=1) == 0
    summary = read(tmp_path, "chain")["summary"]
    assert summary["train_accuracy"]["mean"] > 0.99 and summary["two_step_accuracy"]["mean"] > 0.99
    assert summary["direct_accuracy"] == summary["validation_accuracy"]
    assert summary["direct_accuracy"]["mean"] < 0.1
    assert 'In two steps, "A ->" and then "B ->", 100.0%' in capsys.readouterr().out


def test_icl_and_related_tokens_have_no_curse(tmp_path):
    assert run_in(tmp_path, "icl", vocab=60, seeds=2, epochs=80) == 0
    assert read(tmp_path, "icl")["summary"]["validation_accuracy"]["mean"] > 0.95
    assert names_in(tmp_path) == ["icl.json", "icl.png"]  # no .npz with nothing in it
    assert run_in(tmp_path, "chain", "--related-tokens", vocab=80, complete=50, held_out=10,
                  seeds=2, epochs=60) == 0
    results = read(tmp_path, "chain-related-tokens")
    assert results["summary"]["validation_accuracy"]["mean"] > 0.95
    assert results["verdict"].startswith("No curse")


def test_theory_commands(tmp_path, capsys):
    assert run_in(tmp_path, "bilinear", "--symmetric", vocab=24, dims="16 128", seeds=2, epochs=600) == 0
    results = read(tmp_path, "bilinear")
    assert [run["value"] for run in results["runs"]] == [
        "dim 16", "dim 128", "dim 16, symmetric", "dim 128, symmetric"]
    for run, (dim, tied) in zip(results["runs"], [(16, 0), (128, 0), (16, 1), (128, 1)],
                                strict=True):
        L, L_rev = (np.array(run["curves"][name]) for name in ("forward_nll", "reversal_nll"))
        assert (run["dim"], run["symmetric"]) == (dim, tied) and L.shape == L_rev.shape
        times = run["curves"]["time"]
        assert times[:2] == [0, 0.08 * 6] and times[-1] == pytest.approx(600 * 0.08 * 6)
        assert L[:, 0] == pytest.approx(math.log(26)) == L_rev[:, 0]
        epsilon = max(math.log(L_rev[i, t] / L_rev[i, 0]) / math.log(L[i, t] / L[i, 0])
                      for i in range(2) for t in range(1, len(times)))
        assert run["epsilon"] == pytest.approx(max(0, epsilon))
        assert run["reversal_shift"] == pytest.approx(
            np.mean([abs(L_rev[i, -1] - math.log(26)) for i in range(2)]))
    assert results["runs"][1]["epsilon"] < 0.1 and results["runs"][3]["epsilon"] > 0.5
    assert capsys.readouterr().out.count("Theorem 1 holds with epsilon 0.0") > 0
    assert run_in(tmp_path, "onelayer", vocab=24, seeds=2, complete=2, held_out=2) == 0
    summary = read(tmp_path, "onelayer")["summary"]
    assert summary["trained_probability_min"] > 0.95 and summary["closed_form_gap"] < 0.2
    assert summary["unseen_probability_max"] == pytest.approx(summary["chance"]) == 1 / 26
    assert summary["chain_unseen_probability_max"] <= 1 / 26 + 1e-12


SWEEPS = {"vocab": "24 32", "entity-length": "2 3", "layers": "1 2", "heads": "1 4",
          "position": "none relative", "embeddings": "learned frozen tied", "size": "1x16 2x8",
          "dropout": "0 0.3", "betas": "0.9,0.99 0.8,0.9"}


@pytest.mark.parametrize("task", ["reversal", "chain"])
@pytest.mark.parametrize("axis", SWEEPS)
def test_ablate(tmp_path, axis, task):
    own = ("vocab", "layers", "heads", "dim") if axis == "size" else [axis]
    settings = without(*own, epochs=2, task=task, values=SWEEPS[axis])
    assert run_in(tmp_path, "ablate", axis, **settings) == 0
    name = f"ablate-{'chain-' * (task == 'chain')}{axis}"
    results = read(tmp_path, name)
    assert [run["value"] for run in results["runs"]] == [
        f"{axis} {value}" for value in SWEEPS[axis].split()]
    field = axis.replace("-", "_")
    for run, value in zip(results["runs"], SWEEPS[axis].split(), strict=True):
        config = run["config"]  # the settings that ran
        ran = {"size": "{layers}x{dim}", "betas": "{betas[0]},{betas[1]}"}.get(
            axis, "{" + field + "}")
        if axis == "embeddings":
            assert config["freeze_embeddings"] == (value == "frozen")
            assert config["tie_embeddings"] == (value == "tied")
        else:
            assert ran.format(**config) in (value, f"{value}.0")
        assert len(run["summary"]["train_nll"]["per_seed"]) == 2
    assert (tmp_path / f"{name}_cosine.png").exists() == (axis == "size")
    assert (tmp_path / f"{name}.npz").exists() == (axis == "size")


def test_a_value_of_a_sweep_is_the_run_of_its_own_flags(tmp_path):
    settings = without("layers", lr=0.02)
    assert run_in(tmp_path, "ablate", "layers", values=2, **settings) == 0
    assert run_in(tmp_path, "reversal", layers=2, **settings) == 0
    one, other = read(tmp_path, "ablate-layers")["runs"][0], read(tmp_path)
    for name in ("summary", "curves", "weights", "counts"):
        assert one[name] == other[name]


def test_presets_and_what_sweeps_vary():
    paper, laptop = Reversal(preset="paper", layers=3), Reversal()
    assert (paper.layers, paper.heads, paper.dim, paper.epochs, paper.dropout) == (
        3, 12, 768, 3000, 0.1)
    assert (laptop.layers, laptop.heads, laptop.dim, laptop.dropout) == (2, 4, 64, 0)
    assert (Chain().lr, Chain(preset="paper").lr) == (0.003, 0.01)
    for s in (paper, laptop):
        assert (s.vocab, s.batch_size, s.lr, s.betas, s.weight_decay, s.seeds) == (
            800, 64, 0.01, (0.9, 0.999), 0.01, 10)
    sweep = revcurse.Ablate(axis="size").trainings
    assert {(s.layers, s.dim, s.heads, s.vocab, s.seeds, s.lr) for s in sweep.values()} == {
        (1, 20, 4, 400, 3, 0.003), (1, 256, 4, 400, 3, 0.003), (12, 20, 4, 400, 3, 0.003)}
    sweep = revcurse.Ablate(axis="size", preset="paper").trainings
    assert {(s.vocab, s.seeds, s.epochs, s.dropout) for s in sweep.values()} == {
        (800, 10, 3000, 0.1)}
    sweep = revcurse.Ablate(axis="related-tokens").trainings
    assert [s.complete for s in sweep.values()] == [10, 20, 50, 100, 200, 500]
    assert {(s.command, s.related_tokens, s.vocab) for s in sweep.values()} == {("chain", True, 800)}
    sweep = revcurse.Ablate(axis="entity-length", task="chain").trainings.values()
    assert [(s.entity_length, s.vocab, s.epochs) for s in sweep] == [(2, 200, 300), (3, 200, 300)]


def test_flags_reach_model_and_optimizer():
    s, data, model = prepare(Reversal(**TINY | {
        "lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.3, "dropout": 0.4, "position": "none"}))
    group = s.make_optimizer(list(model.parameters())).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.2, (0.5, 0.6), 0.3)
    assert "wpe" not in model.transformer and model.transformer.drop.p == 0.4
    assert len(model.transformer.h) == 1 and model.transformer.h[0].attn.heads == 2
    theory = prepare(revcurse.OneLayerTheory(lr=0.1, batch_size=2).trainings["chain"])[0]
    assert theory.make_optimizer([torch.zeros(1)]).param_groups[0]["lr"] == 0.2


def test_all_and_its_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(revcurse.All, "lines", ["icl", "ablate layers --values 1", "cure"])
    monkeypatch.setattr(revcurse, "CURES", {"none": revcurse.CURES["none"]})
    assert run_in(tmp_path, "all", **without("layers", vocab=40)) == 0
    claims = read(tmp_path, "all")["claims"]
    assert [(claim["figure"], claim["claim"]) for claim in claims] == [
        ("icl", "icl: No curse"), ("ablate-layers", "layers 1: The curse"),
        ("cure", "none: The curse"), ("cure", "none, as in the paper: The curse")]
    for claim in claims:
        assert claim["holds"] == claim["measured"].startswith(claim["claim"].split(": ")[1])
    assert {"icl.json", "icl.png", "ablate-layers.json", "cure.png"} <= set(names_in(tmp_path))


# -------------------------------------------------------------------------------------- Bad input

BAD = {  # command line: what the one line on stderr must hold
    "reversal --dim 30": "dim 30", "reversal --dim 20 --position relative": "multiple of 8",
    "reversal --dim 0": "--dim 0", "reversal --layers -1": "--layers -1",
    "reversal --heads x": "--heads", "reversal --dim 1.5": "--dim",
    "reversal --vocab 0": "--vocab 0", "reversal --vocab 3": "vocab 3",
    "reversal --vocab 4 --entity-length 3": "vocab 4", "reversal --entity-length 0": "length 0",
    "reversal --complete 0": "--complete 0", "reversal --held-out -3": "--held-out -3",
    "reversal --complete 180": "180", "reversal --epochs 0": "--epochs 0",
    "reversal --batch-size 0": "--batch-size 0", "reversal --seeds 0": "--seeds 0",
    "reversal --seed -1": "--seed -1", "reversal --lr -1": "--lr -1", "reversal --lr nan": "--lr nan",
    "reversal --lr inf": "--lr inf", "reversal --weight-decay -0.1": "--weight-decay -0.1",
    "reversal --betas 1 0.9": "beta", "reversal --betas 0.9": "--betas",
    "reversal --dropout 1.5": "dropout", "reversal --dropout -0.1": "--dropout -0.1",
    "reversal --device tpu": "--device", "reversal --position sideways": "relative",
    "reversal --resume": "--resume", "reversal --precision bf16": "--precision",
    "reversal --loss none": "sequence", "reversal --preset server": "laptop",
    "reversal --frobnicate 1": "--frobnicate", "reversal --seeds-at-once 0": "--seeds-at-once 0",
    "reversal --device mps": "mps", "reversal --device cuda": "cuda", "": "COMMAND",
    "reversal --epoch 3": "--epoch", "nonsense": "nonsense",
    "ablate": "axis", "ablate colour": "colour", "ablate vocab --values 0": "--vocab 0",
    "ablate dropout": "--values", "ablate vocab --values 24 x": "'x'",
    "ablate vocab --values 24 3": "vocab 3", "ablate size --values 1x20 3": "--dim",
    "ablate size --values 1x30": "dim 30", "ablate size --values ax20": "'a'",
    "ablate embeddings --values green": "green", "ablate position --values up": "'up'",
    "ablate layers --frobnicate 1": "--frobnicate", "ablate layers --task icl": "icl",
    "ablate layers --animate": "--animate", "ablate related-tokens --task reversal": "related",
    "ablate layers --layers 6": "--layers", "ablate size --heads 2": "--heads",
    "ablate size --cosine": "--cosine", "ablate entity-length --entity-length 2": "--entity-length",
    "ablate embeddings --tie-embeddings --values learned frozen": "--tie-embeddings",
    "ablate layers --task chain --facts x": "--facts",
    "ablate layers --related-tokens": "--related-tokens", "ablate preset --values paper": "preset",
    "all --frobnicate": "--frobnicate", "all --dim 30": "--dim", "all --layers 2": "--layers",
    "all --batch-size 0": "--batch-size 0", "cure --values snake-oil": "snake-oil",
    "icl --entity-length 2": "--entity-length", "icl --animate": "--animate",
    "icl --vocab 12": "vocab 12", "chain --facts x": "--facts",
    "chain --related-tokens --entity-length 2": "entity_length 1",
    "chain --related-tokens --vocab 100": "vocab 100", "chain --complete 180": "180",
    "bilinear --dims 16 0": "--dims 0", "bilinear --layers 2": "--layers",
    "onelayer --held-out 0": "--held-out 0", "onelayer --complete 30": "30",
    "onelayer --precision bf16": "--precision", "plot": "files", "plot none.json": "none.json"}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(tmp_path, capsys, line):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this device is here")
    (tmp_path / "reversal.json").write_text("earlier")
    where = [] if line.startswith(("plot", "nonsense")) or not line else ["--out", str(tmp_path)]
    assert main([*line.split(), *where]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and BAD[line] in printed.err
    assert names_in(tmp_path) == ["reversal.json"]
    assert (tmp_path / "reversal.json").read_text() == "earlier"


def test_bad_output_directory(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert run_in(out, "reversal", **TINY) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--out {out}" in error
    assert file.read_text() == "mine" and names_in(tmp_path) == ["file"]


CAPITALS = [("Paris", "France"), ("Rome", "$\\foo$"), ("Oslo", "Norway"), ("Cairo", "Egypt"),
            ("Georgetown", "Guyana"), ("Lima", "Peru")]
LINES = "\n".join("\t".join(pair) for pair in CAPITALS)


def test_facts_as_real_lists_have_them(tmp_path, capsys):
    """Names that repeat, trailing tabs, blank lines, a byte order mark, any line ends."""
    file = tmp_path / "facts.tsv"
    file.write_bytes(("\ufeff" + LINES.replace("\n", "\r\n") + "\t\t\r\r\n \t\r\nDjibouti\tDjibouti"
                      "\nGeorgetown\tCayman Islands\nLyon\tFrance\n").encode())
    assert run_in(tmp_path, "reversal", facts=file, **{**TINY, "vocab": 24}) == 0
    printed = capsys.readouterr().out
    assert "3 pairs left out" in printed and "Djibouti - Djibouti" in printed
    results = read(tmp_path)
    assert results["config"]["vocab"] == 24 and results["counts"] == {"train": 10, "validation": 2}
    named = {tuple(sorted(pair)) for pairs in results["names"].values() for pair in pairs}
    assert named == {tuple(sorted(pair)) for pair in CAPITALS}
    assert printed.count("right is ") == 2
    results["matrices"] = dict(np.load(tmp_path / "reversal.npz"))
    axes = draw(results)["_weights.png"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        pair[0] for pair in results["names"]["complete A -> B"]]


def test_many_long_names_have_small_labels_and_a_mark_where_they_are_cut(tmp_path):
    facts = [(f"The city with the number {i}", f"Land {i}") for i in range(40)]
    results = run(Reversal(facts=facts, **{**TINY, "vocab": None, "animate": True}))
    figures = draw(results)
    labels = figures["_weights.png"].axes[0].get_yticklabels()
    assert len(labels) == 28 and {len(label.get_text()) for label in labels} <= {18, 19}
    assert all(label.get_text().endswith(("...", "\u2026")) for label in labels)
    assert labels[0].get_fontsize() * len(labels) < 140  # points: about the length of the axis


BAD_FACTS = {
    "": "4 are needed", "a\tb\nc\td\ne\tf\n": "3 pairs", LINES + "\nc d\n": "(7)",
    LINES + "\nc\td\te\n\nf\n\tg\nh\ni\nj\nk\n": "7 lines (7, 9, 10, 11, 12)"}


@pytest.mark.parametrize("content", BAD_FACTS)
def test_bad_facts(tmp_path, capsys, content):
    file = tmp_path / "facts.tsv"
    file.write_text(content)
    assert run_in(tmp_path / "out", "reversal", facts=file) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"--facts {file}" in printed.err and BAD_FACTS[content] in printed.err
    assert not (tmp_path / "out").exists()


def test_facts_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("facts").write_text(LINES)
    Path("latin").write_bytes(b"a\tb\nc\t\xff\n")
    for line, words in {"reversal --complete 6": "6 complete", "reversal --vocab 800": "vocab",
                        "reversal --entity-length 2": "of one token", "ablate vocab": "vocab 20",
                        "reversal --facts latin": "UTF-8", "reversal --facts .": "--facts .",
                        "reversal --facts none": "No such file"}.items():
        facts = [] if "--facts" in line else ["--facts", "facts"]
        assert run_in("out", *line.split(), *facts) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs a pipe as a file")
def test_facts_from_a_pipe_are_read_once(tmp_path):
    line = [sys.executable, "revcurse.py", "ablate", "layers", "--values", "1", "2", *flags(
        **{name: TINY[name] for name in TINY if name not in ("vocab", "layers")})]
    done = subprocess.run(["bash", "-c", '"$@" --facts <(printf "%s" "$LINES")', "bash", *line,
                           "--out", str(tmp_path)], cwd=HERE, env=os.environ | {"LINES": LINES},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [run["config"]["vocab"] for run in read(tmp_path, "ablate-layers")["runs"]] == [24, 24]


def test_nan_stops_the_run_and_leaves_earlier_results(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", **TINY) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_in(tmp_path, "reversal", **TINY, lr=1e8, seed=5) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NaN at epoch" in error and "--lr" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(revcurse, "train", fail)
    assert run_in(tmp_path, "reversal", **TINY) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memory" in error and "--batch-size" in error


# ------------------------------------------------------------------------------ Files and pictures


def test_files_appear_whole_or_not_at_all(tmp_path):
    file = tmp_path / "one"
    file.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        revcurse.write(file, fail)
    assert file.read_text() == "old" and names_in(tmp_path) == ["one"]
    revcurse.write(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and names_in(tmp_path) == ["one"]


def test_a_picture_that_fails_leaves_the_numbers(tmp_path, capsys):
    (tmp_path / "reversal.png").mkdir()  # in the way
    assert run_in(tmp_path, "reversal", **TINY) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "numbers are safe" in error and "plot" in error
    assert read(tmp_path)["summary"] and (tmp_path / "reversal.npz").exists()
    shutil.rmtree(tmp_path / "reversal.png")
    assert main(["plot", str(tmp_path / "reversal.json")]) == 0
    assert (tmp_path / "reversal.png").stat().st_size > 1000


def test_plot_draws_what_the_run_drew(tmp_path, monkeypatch):
    assert run_in(tmp_path, "reversal", "--animate", "--cosine", **TINY) == 0
    pictures = {path: path.read_bytes() for path in tmp_path.iterdir()
                if path.suffix in (".png", ".gif")}
    assert sorted(path.name for path in pictures) == [
        "reversal.gif", "reversal.png", "reversal_cosine.png", "reversal_weights.png"]
    with Image.open(tmp_path / "reversal.gif") as gif:
        assert gif.n_frames == 13 + 6 - 1 or gif.n_frames > 10
    for path in pictures:
        path.unlink()
    for name in ("run_lr0.01", "run_lr0.003"):  # names with dots stay apart
        for end in ("json", "npz"):
            shutil.copy(tmp_path / f"reversal.{end}", tmp_path / f"{name}.{end}")
    with contextlib.chdir(tmp_path):
        assert main(["plot", "reversal.json", "run_lr0.01.json", "run_lr0.003.json"]) == 0
    for path, content in pictures.items():
        assert path.read_bytes() == content
        for name in ("run_lr0.01", "run_lr0.003"):
            assert (tmp_path / path.name.replace("reversal", name)).exists()


class Evil:
    """Something that acts when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_bad_results_to_plot(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", **TINY) == 0
    capsys.readouterr()
    good, arrays = tmp_path / "reversal.json", tmp_path / "reversal.npz"
    picture = (tmp_path / "reversal.png").read_bytes()
    text, content = good.read_text(), arrays.read_bytes()

    def fails():
        assert main(["plot", str(good)]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and "not a results file" in printed.err
        assert (tmp_path / "reversal.png").read_bytes() == picture

    for damaged in (text[:200], "", "[1]", "{}", json.dumps({**json.loads(text), "curves": 1}),
                    "\x00"):
        good.write_text(damaged)
        fails()
    good.write_text(text)
    arrays.write_bytes(content[:-40])
    fails()
    np.savez(arrays, **{"complete A -> B": np.array([Evil(tmp_path / "marker")])})
    fails()
    arrays.unlink()
    fails()
    assert not (tmp_path / "marker").exists()


def test_in_a_notebook(tmp_path, capsys, monkeypatch):
    """run writes nothing, says its progress, and returns what the file would hold."""
    monkeypatch.chdir(tmp_path)
    backend, state = revcurse.matplotlib.rcParams["backend"], torch.get_default_dtype()
    results = run(Reversal(**TINY | {"quiet": False}))
    assert "epoch 12 of 12" in capsys.readouterr().out and names_in(tmp_path) == []
    assert results["matrices"]["held-out, asked"].shape == (2, 2)
    numbers = {name: results[name] for name in results if name not in ("matrices", "seconds")}
    assert run_in(tmp_path, "reversal", **TINY) == 0
    saved = read(tmp_path)
    for name in ("summary", "curves", "weights", "counts", "chance"):
        assert saved[name] == json.loads(json.dumps(numbers[name]))
    html = draw(results)._repr_html_()
    assert html.count("<img") == 2 and "base64" in html
    for settings in (revcurse.ICL(vocab=40, **{n: TINY[n] for n in TINY if n != "vocab"}),
                     revcurse.Ablate(axis="heads", values=[1, 2], **{
                         name: TINY[name] for name in TINY if name != "heads"}),
                     revcurse.BilinearTheory(dims=[8], seeds=2, vocab=24, epochs=5),
                     revcurse.OneLayerTheory(vocab=24, seeds=2, epochs=5)):
        assert draw(run(settings))._repr_html_()
    with pytest.raises(revcurse.Problem, match="must be one of"):
        run(Reversal(position="up"))
    assert revcurse.matplotlib.rcParams["backend"] == backend
    assert torch.get_default_dtype() == state


# ------------------------------------------------------------------------------------- Going on

LONG = {**TINY, "epochs": 60, "dropout": 0.1}
SLOW = """
import sys, time, revcurse
adam = revcurse.torch.optim.AdamW
class Slow(adam):
    def step(self):
        time.sleep(0.03)
        super().step()
revcurse.torch.optim.AdamW = Slow
clock = time.monotonic
revcurse.time.monotonic = lambda: 1000 * clock()
sys.exit(revcurse.main(sys.argv[1:]))
"""  # steps take longer, and checkpoints come at each epoch


def wait_for(happened):
    for _ in range(1200):
        if happened():
            return
        time.sleep(0.05)
    raise TimeoutError


def killed(folder, *argv, when, how=signal.SIGKILL, launcher=()):
    """Run a command line in a process of its own, and kill it `when` there is something."""
    running = subprocess.Popen([sys.executable, *launcher, "-c", SLOW, *argv, "--out", str(folder)],
                               cwd=HERE, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    wait_for(when)
    time.sleep(0.3)
    running.send_signal(how)
    return running, running.communicate(timeout=60)[1]


def numbers(folder, name="reversal"):
    results = read(folder, name)
    arrays = {}
    if (folder / f"{name}.npz").exists():
        with np.load(folder / f"{name}.npz") as matrices:
            arrays = {key: matrices[key].tolist() for key in matrices}
    results = results.get("runs", [results])
    return [[run[key] for key in ("value", "summary", "weights", "curves", "counts")]
            for run in results], arrays


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_killed_and_given_again_is_the_same_as_uninterrupted(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_in(whole, "reversal", "--animate", **LONG) == 0

    def checkpoints():
        return list(broken.glob(".reversal.*.pt")) if broken.exists() else []

    running, _ = killed(broken, "reversal", "--animate", *flags(**LONG), when=checkpoints)
    assert running.returncode == -9 and len(checkpoints()) == 1
    assert names_in(broken) == [checkpoints()[0].name]
    stamp = checkpoints()[0].stat().st_mtime_ns
    running, error = killed(broken, "reversal", "--animate", *flags(**LONG), how=signal.SIGINT,
                            when=lambda: checkpoints()[0].stat().st_mtime_ns > stamp)
    assert running.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    before = checkpoints()[0].read_bytes()
    assert run_in(broken, "reversal", "--animate", **{**LONG, "lr": 0.02}) == 2  # other flags
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "delete" in error and str(checkpoints()[0]) in error
    assert checkpoints()[0].read_bytes() == before
    assert run_in(broken, "reversal", "--animate", **LONG) == 0
    assert "going on after epoch" in capsys.readouterr().out
    assert numbers(broken) == numbers(whole)
    assert names_in(broken) == names_in(whole)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_sweep_goes_on_without_training_values_again(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = ["ablate", "layers", "--values", "1", "2", "3", *flags(
        **{name: LONG[name] for name in LONG if name != "layers"})]
    assert run_in(whole, *line) == 0
    killed(broken, *line, when=lambda: len(list(broken.glob(".ablate-layers.*.pt"))) == 2)
    steps = []
    optimizer = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *more, **options: counted(
        optimizer(*more, **options)))

    def counted(made):
        step = made.step
        made.step = lambda: (steps.append(made), step())
        return made

    assert run_in(broken, *line) == 0
    assert len(set(map(id, steps))) == 2 and len(steps) < 2 * 60 * 3  # the second, where it stood
    assert numbers(broken, "ablate-layers") == numbers(whole, "ablate-layers")
    assert names_in(broken) == names_in(whole)


def test_damaged_and_evil_checkpoints(tmp_path, capsys):
    checkpoint = tmp_path / ".reversal.reversal, from seed 0.pt"
    for content in (b"", b"nonsense", "evil"):
        if content == "evil":
            torch.save([Evil(tmp_path / "marker")], checkpoint)
        else:
            checkpoint.write_bytes(content)
        assert run_in(tmp_path, "reversal", **TINY) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(checkpoint) in error and "delete" in error
    assert names_in(tmp_path) == [checkpoint.name]


@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_of_seeds_have_the_numbers_of_all_at_once(at_once, tmp_path):
    settings = TINY | {"seeds": 3}
    assert run_in(tmp_path / "all", "reversal", **settings) == 0
    assert run_in(tmp_path / "some", "reversal", **settings, seeds_at_once=at_once) == 0
    one, other = (read(tmp_path / part) for part in ("all", "some"))
    for name, number in one["summary"].items():
        assert other["summary"][name]["per_seed"] == pytest.approx(number["per_seed"], rel=1e-3)
    assert names_in(tmp_path / "all") == names_in(tmp_path / "some")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.skipif(os.name != "posix", reason="starts processes")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    settings = TINY | {"seeds": 3, "quiet": False}
    assert run_in(tmp_path / "one", "reversal", **settings) == 0
    done = subprocess.run([*TORCHRUN, str(HERE / "revcurse.py"), "reversal", *flags(**settings),
                           "--out", str(tmp_path / "two")], timeout=90, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for the other processes") == 1
    one, other = (read(tmp_path / part) for part in ("one", "two"))
    for name, number in one["summary"].items():
        assert other["summary"][name]["per_seed"] == pytest.approx(number["per_seed"], rel=1e-3)
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")


# ----------------------------------------------------------------------- Terminals and environments


def command(folder, *argv, stdout=subprocess.PIPE, python=(), shell=None, **environment):
    """Run a command line as a user does: (status, output, errors)."""
    line = [sys.executable, *python, "revcurse.py", *argv, "--out", str(folder)]
    if shell:
        line = ["bash", "-c", shell, "bash", *line]
    done = subprocess.run(line, cwd=HERE, env=os.environ | environment, stdout=stdout,
                          stderr=subprocess.PIPE, timeout=90, check=False)
    return done.returncode, (done.stdout or b"").decode("latin-1"), done.stderr.decode("latin-1")


def test_a_strange_environment(tmp_path):
    """A notebook's backend, warnings as errors, no home, a terminal with few letters, no docs."""
    facts = tmp_path / "facts.tsv"
    facts.write_text("\u0160\u00e1rka\t\u017b\u00f3\u0142w\n" + LINES, encoding="utf-8")
    settings = {name: TINY[name] for name in TINY if name != "vocab"}
    status, printed, error = command(
        tmp_path / "\u017b", "reversal", "--facts", str(facts), *flags(**settings), python=["-OO"],
        MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONIOENCODING="cp1252",
        PYTHONWARNINGS="error", HOME="/nowhere", MPLCONFIGDIR="/nowhere")
    assert (status, error) == (0, ""), error
    assert "right is" in printed
    assert names_in(tmp_path / "\u017b") == ["reversal.json", "reversal.npz", "reversal.png",
                                             "reversal_weights.png"]


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
@pytest.mark.parametrize("shell", ['"$@" >&-', '"$@" | head -1; exit ${PIPESTATUS[0]}'])
def test_output_that_is_closed(tmp_path, shell):
    settings = flags(**{**TINY, "quiet": False, "epochs": 30})
    status, _, error = command(tmp_path, "reversal", *settings, shell=shell)
    assert (status, error) == (0, "")
    assert len(names_in(tmp_path)) == 4


def test_output_that_is_replaced_and_a_thread(tmp_path, monkeypatch):
    class Written:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Written())
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run_in(tmp_path, "reversal", **TINY)))
    thread.start()
    thread.join()
    assert statuses == [0] and "of 10 sentences" in sys.stdout.text


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"WORLD_SIZE": "2"},
                                  {"RANK": "1", "WORLD_SIZE": "2"}], ids=str)
def test_what_torchrun_left_in_the_shell(tmp_path, capsys, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert run_in(tmp_path, "reversal", **TINY) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "RANK" in error and names_in(tmp_path) == []


def test_fonts_and_latex_that_are_not_there(tmp_path, capsys):
    facts = [(f"\u6771{i}", f"\u4eac{i}") for i in range(6)]
    with revcurse.matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        draw(run(Reversal(facts=facts, **{**TINY, "vocab": None}))).save(tmp_path / "x")
    assert capsys.readouterr().out.count("font.family") == 1
    with revcurse.matplotlib.rc_context({"text.usetex": True}):
        if shutil.which("latex") is None:
            assert run_in(tmp_path, "reversal", **TINY) == 1
            assert "numbers are safe" in capsys.readouterr().err
            assert read(tmp_path)["summary"]


def test_help_is_complete(capsys):
    for name in (None, *revcurse.KINDS, "plot"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"] if name else ["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert "None" not in text and max(map(len, text.splitlines())) <= 100
    assert "[64] [paper: 768]" in helped(capsys, "reversal")


def helped(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_import_changes_nothing():
    script = """
import os, sys, torch
os.environ["MPLBACKEND"] = "agg"
before = dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()
import revcurse, matplotlib
assert before == (dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision())
assert matplotlib.rcParams["backend"] == "agg" and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)


# ------------------------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu(tmp_path):
    for device in ("cpu", "cuda"):
        for line in (["reversal", "--animate"], ["chain", "--entity-length", "2"], ["icl"]):
            assert run_in(tmp_path / device, *line, **TINY, device=device) == 0
    for name in ("reversal", "chain", "icl"):
        one, other = (read(tmp_path / device, name) for device in ("cpu", "cuda"))
        for key, number in one["summary"].items():
            if "nll" in key:
                assert other["summary"][key]["per_seed"] == pytest.approx(
                    number["per_seed"], abs=0.05, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_goes_on_after_a_kill(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_in(whole, "reversal", **LONG, device="cuda") == 0
    killed(broken, "reversal", *flags(**LONG, device="cuda"),
           when=lambda: list(broken.glob(".reversal.*.pt")))
    assert run_in(broken, "reversal", **LONG, device="cuda") == 0
    assert numbers(broken) == numbers(whole)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-W", "error", *sys.argv[1:]]))
