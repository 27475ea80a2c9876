# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0", "pytest>=7.4.0"]
# ///
"""Tests of revcurse.py: `python test_revcurse.py`, or pytest. About a minute on two cores."""

import copy
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and may share the cores

import numpy as np
import pytest
import torch
from torch import nn

import revcurse
from revcurse import (CURES, GPT, Bilinear, Chain, CureTrials, OneLayer, Reversal, chain_data, draw,
                      evaluate, icl_data, main, nll, prepare, reversal_data, run, train)

HERE = Path(__file__).parent
TINY = {"vocab": 24, "layers": 1, "heads": 2, "dim": 16, "epochs": 12, "seeds": 2,
        "batch_size": 4, "quiet": True}
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and a shell")

def without(*names, **others):
    """TINY without some settings, or with others."""
    return {name: value for name, value in (TINY | others).items() if name not in names}

def flags(**settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        if value not in (None, False):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else str(value).split())]
    return words

def run_in(folder, *argv, **settings):
    """Run a command line in this process, with output to a folder: its exit status."""
    return main([*argv, *flags(**settings), "--out", str(folder)])

def read(folder, name="reversal"):
    return json.loads((folder / f"{name}.json").read_text())

def names_in(folder):
    return sorted(path.name for path in folder.iterdir())

def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(str(word) in error for word in words), error

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

def test_seeds_coins_and_long_entities():
    one, same, other = (reversal_data(800, seed=seed).sentences for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    arrows = torch.cat([reversal_data(800, seed=seed).groups["held-out, asked"][:, 1]
                        for seed in range(20)])  # 1200 tosses: 5 sigma are 0.072
    assert abs(arrows.float().mean() - 0.5) < 0.072
    data = reversal_data(800, 6, 30, 20)  # of 200**6 tuples: the product is not built
    spelled = [row[:6] if row[6] == 0 else row[7:] for row in data.sentences.tolist()]
    assert data.trained == 80 and 80 < np.mean(spelled) < 124  # letters of A are 2 to 201
    assert reversal_data(800, 40, 4, 2).trained == 10  # more tuples than a machine word counts

CHAINS = {(800, 1, None): (540, 60), (20, 1, None): (14, 1), (800, 2, None): (1080, 120),
          (800, 3, None): (400, 50), (800, 2, 200): (700, 50),
          **{(800, 2, n): (3 * n + 100, 50) for n in (10, 20, 50, 100, 500)}}

@pytest.mark.parametrize("size", CHAINS, ids=str)
def test_chain_data_is_the_papers(size):
    vocab, K, related = size
    data = (chain_data(vocab, K, seed=1) if related is None else
            chain_data(vocab, complete=related, related_tokens=True, seed=1))
    assert (data.answer_length, data.graded, len(data.names)) == (K, related is not None, 2 + vocab)
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
        assert len(tokens[0] | tokens[1] | tokens[2]) == sum(map(len, tokens))
    else:
        fixed = {(a[0], step[a][0], c[0]) for a, c in implied}
        assert len(fixed) == 1 and len(set(*fixed)) == 3
        assert all(a[1] == step[a][1] == c[1] not in set(*fixed) for a, c in implied)

def test_icl_data_is_the_papers():
    data = icl_data(seed=1)
    assert (data.trained, len(data.sentences), len(data.names)) == (700, 1000, 403)
    a, forward, b, same, b2, backward, a2 = data.sentences.T
    assert (forward == 0).all() and (backward == 1).all() and (same == 2).all()
    assert (a == a2).all() and (b == b2).all() and min(a) > 2
    pairs = [*zip(a.tolist(), b.tolist())]
    letters_a, letters_b = set(a.tolist()), set(b.tolist())
    assert len(set(pairs)) == 1000 and len(letters_a) == 100 and len(letters_b) == 10
    assert not letters_a & letters_b
    asked = {a: frozenset(b for a2, b in pairs[700:] if a2 == a) for a in letters_a}
    assert all(len(others) == 3 for others in asked.values())
    assert len(set(asked.values())) > 20  # of 120: each A has its own three
    assert len(icl_data(13).groups["complete"]) == 3 * 7  # the smallest

def test_names_of_tokens_and_facts():
    related = chain_data(24, complete=4, held_out=2, related_tokens=True)
    for data, role, row, words in [(reversal_data(24), "complete B <- A", 3, "B3 <- A3"),
                                   (chain_data(24), "held-out A ~> C", 0, "A4 ~> C4"),
                                   (related, "held-out B -> C", 0, "b i4 -> c i4")]:
        assert " ".join(data.names[token] for token in data.groups[role][row]) == words
        assert data.letters == 6 and data.names[data.first] == ("i0" if data is related else "A0")
    facts = [(f"A {i}", f"B {i}") for i in range(6)]
    for seed in range(3):
        data = reversal_data(24, facts=facts, seed=seed)
        named = [[data.names[t] for t in s] for s in data.sentences.tolist()]
        assert {(s[0], s[2]) if s[1] == "->" else (s[2], s[0]) for s in named} == set(facts)

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

def start(settings, seeds, dtype=None):
    """(settings by all rules, models, datasets) of these seeds, before a training."""
    s, data, _ = prepare(settings)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(s.make_model(data).to(dtype))
    return s, models, [s.make_data(seed) for seed in seeds]

def trained_theory(kind, seeds=3, value=0, **settings):
    """(settings, losses (S, points, n), models) of a theory command's training."""
    plans = [*kind(quiet=True, seeds=seeds, **settings).trainings.values()]
    s, models, datasets = start(plans[value], range(seeds))
    return s, train(s, models, datasets, range(seeds))[0][:, :, :, 0, 0], models

def test_bilinear_logits_are_those_of_the_loops():
    torch.manual_seed(0)
    model = Bilinear(5, 7)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not model.Theta.any() and trained == ["Theta"]
    assert Bilinear(5, 7, train_embeddings=True).embeddings.requires_grad
    nn.init.normal_(model.Theta)
    logits = model(torch.tensor([[3, 0], [1, 1]]))
    assert logits.shape == (2, 1, 7) and logits.dtype == torch.float64
    E, theta, five = model.embeddings.tolist(), model.Theta.tolist(), range(5)
    for row, x in enumerate([3, 1]):
        assert logits[row, 0].tolist() == pytest.approx([
            sum(E[x][a] * theta[a][b] * E[y][b] for a in five for b in five) for y in range(7)])
    symmetric = Bilinear(5, 7, symmetric=True)
    symmetric.load_state_dict(model.state_dict())
    mean = (model.Theta + model.Theta.T) / 2
    torch.testing.assert_close(symmetric(torch.arange(7)[:, None])[:, 0],
                               model.embeddings @ mean @ model.embeddings.T)
    torch.manual_seed(3)
    full = torch.randn(12, 50, dtype=torch.float64) / math.sqrt(50)
    torch.manual_seed(3)
    short = Bilinear(50, 12).embeddings  # in the span of the tokens all products are the same
    torch.testing.assert_close(short @ short.T, full @ full.T)

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
    epsilons, settings = [], {"vocab": 40, "epochs": 1000}
    for dim in (64, 256, 1024):
        s, losses, _ = trained_theory(revcurse.BilinearTheory, 10, dims=[dim], **settings)
        L, L_rev = losses[:, :, :10].mean(2), losses[:, :, 10:].mean(2)  # (S, points)
        assert L[:, -1].max() < 0.1 and (L.diff(dim=1) < 0).all()
        assert L_rev.min() > 0.9 * math.log(42)
        epsilons.append(max(
            math.log(L_rev[i, t] / L_rev[i, 0]) / math.log(L[i, t] / L[i, 0])
            for i in range(10) for t in range(1, L.shape[1])))
    assert epsilons == sorted(epsilons, reverse=True) and epsilons[-1] < 0.02
    _, losses, _ = trained_theory(revcurse.BilinearTheory, 10, 1, dims=[256],
                                  symmetric=True, **settings)
    assert losses[:, -1].max() < 0.2

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
        u, steps = 0.0, 30_000
        for _ in range(steps):  # a target's gradient is 1 - p, any other token's p of its own
            p = 1 / (1 + (M - 1) * math.exp(-u))
            u += t / steps * ((1 - p) + (1 - p) / (M - 1)) / N
        expected = math.log(1 + (M - 1) * math.exp(-u))
        assert math.isclose(revcurse.closed_form([0, t], M, N)[1], expected, rel_tol=2e-3)
    assert math.isclose(revcurse.closed_form([0, 1], M, N)[0], math.log(M))

@pytest.mark.parametrize("lr, batch_size", [(0.02, 1), (0.02, 10**6)])
def test_one_layer_trains_as_the_closed_form_says(lr, batch_size):
    s, losses, models = trained_theory(revcurse.OneLayerTheory, vocab=24, lr=lr, epochs=400,
                                       batch_size=batch_size, complete=2, held_out=2)
    expected = revcurse.closed_form([epoch * lr * 6 for epoch in s.points()], 26, 6)
    assert np.abs(losses[:, :, :6].numpy() - expected[:, None]).max() < 0.02
    assert (losses[:, :, 6:] - math.log(26)).abs().max() < 1e-12  # Theorem 3, exactly a guess
    for seed, model in enumerate(models):
        rows = {s[0] for s in reversal_data(24, 1, 2, 2, seed=seed).sentences[:6].tolist()}
        touched = model.Y.detach().abs().sum(1) > 0
        assert set(touched.nonzero().flatten().tolist()) == rows and (model.Z == 0).all()

def naive_gpt(weights, tokens, layers, heads, position, causal):
    """GPT-2 in plain loops over tokens and heads, from its parameters by name, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    dim = w["transformer.wte.weight"].shape[1]
    d = dim // heads

    def norm(x, name):
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def turn(x, t):
        turned, half = x.copy(), d // 2
        for i in range(half if position == "relative" else 0):
            cos, sin = (f(t * 10000.0 ** (-2 * i / d)) for f in (math.cos, math.sin))
            turned[[i, half + i]] = x[i] * cos - x[half + i] * sin, x[i] * sin + x[half + i] * cos
        return turned

    x = [w["transformer.wte.weight"][t] for t in tokens]
    if position == "absolute":
        x = [v + w["transformer.wpe.weight"][t] for t, v in enumerate(x)]
    for h in (f"transformer.h.{layer}" for layer in range(layers)):
        qkv, mixed = [linear(norm(v, f"{h}.ln_1"), f"{h}.attn.c_attn") for v in x], []
        for t in range(len(x)):
            out, read = [], range(t + 1 if causal else len(x))
            for n in range(heads):
                q, k, v = (lambda s, i=i, n=n: qkv[s][i * dim + n * d:][:d] for i in range(3))
                p = np.exp([turn(q(t), t) @ turn(k(s), s) / math.sqrt(d) for s in read])
                out.append(sum(share * v(s) for share, s in zip(p / p.sum(), read)))
            mixed.append(linear(np.concatenate(out), f"{h}.attn.c_proj"))
        x = [a + b for a, b in zip(x, mixed)]
        for t, v in enumerate(x):
            u = linear(norm(v, f"{h}.ln_2"), f"{h}.mlp.c_fc")
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            x[t] = v + linear(u, f"{h}.mlp.c_proj")
    return np.stack([w["lm_head.weight"] @ norm(v, "transformer.ln_f") for v in x])

@pytest.mark.parametrize("causal, tied", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_gpt_against_plain_loops(position, causal, tied):
    torch.manual_seed(0)
    model = GPT(11, 6, 3, 2, 8, position, tie_embeddings=tied)
    for block in model.transformer.h:
        block.attn.causal = causal
    with torch.no_grad():  # away from the start, where attention is flat and norms are the identity
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.5)
    tokens = torch.randint(11, (3, 5))
    expected = np.stack([naive_gpt(model.state_dict(), s, 3, 2, position, causal)
                         for s in tokens.tolist()])
    for last in (None, 5, 2, 1):
        logits = model(tokens, last).detach()
        np.testing.assert_allclose(logits, expected[:, -(last or 5):], rtol=1e-4, atol=1e-4)

def test_gpt_starts_as_gpt2_and_has_its_parameter_names():
    torch.manual_seed(0)
    model = GPT(500, 8, 3, 4, 64)
    block = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc",
                                           "mlp.c_proj") for kind in ("weight", "bias")]
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

def table_model(table):
    """A model set by hand: the logits after a token are its row of a table."""
    return lambda tokens, last=1: table[tokens[:, -last:]]

@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_loss_looks_at_the_right_tokens(loss, K):
    data, table = reversal_data(24, K), torch.zeros(26, 26, requires_grad=True)
    batch = data.sentences[:data.trained]
    Reversal(loss=loss).batch_loss(table_model(table), batch, data).backward()
    expected = torch.zeros(26, 26)
    predicted = range(K + 1, 2 * K + 1) if loss == "entity" else range(1, 2 * K + 1)
    for sentence in batch.tolist():
        for at in predicted:
            expected[sentence[at - 1]] += 1 / 26
            expected[sentence[at - 1], sentence[at]] -= 1
    torch.testing.assert_close(table.grad, expected / len(batch) / len(predicted))

def tiny(*seeds, dtype=None, **settings):
    return start(Reversal(**TINY | {"layers": 2, "epochs": 4} | settings), seeds, dtype)

@pytest.mark.parametrize("seeds", [(5,), (0, 1, 2)], ids=str)
def test_training_all_seeds_at_once_against_one_plain_loop_each(seeds):
    s, models, datasets = tiny(*seeds, dtype=torch.float64, lr=0.02, betas=(0.8, 0.99),
                               weight_decay=0.1)
    alone = copy.deepcopy(models)
    seen, frames = train(s, models, datasets, seeds)
    assert seen.shape == (len(seeds), 5, 12, 3, 1) and frames == []
    for i, (seed, model, data) in enumerate(zip(seeds, alone, datasets, strict=True)):
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, (0.8, 0.99), weight_decay=0.1)
        for epoch in range(5):
            p = model(data.sentences[:, :2])[:, 1].softmax(-1)
            p = p[torch.arange(12), data.sentences[:, 2]]
            torch.testing.assert_close(seen[i, epoch, :, 0, 0], -p.log().detach())
            if epoch == 4:
                break
            for rows in torch.randperm(10, generator=order).split(4):
                batch = data.sentences[:10][rows]
                loss = nn.functional.cross_entropy(model(batch[:, :2])[:, -1], batch[:, 2])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert not models[i].training  # the trained weights are in the models
        for name, weight in model.named_parameters():
            torch.testing.assert_close(models[i].get_parameter(name), weight, atol=1e-9, rtol=1e-9)

def test_dropout_is_at_work_in_training_only():
    losses = train(*tiny(0, 1, dropout=0.5, lr=0.0), (0, 1))[0]
    for point in range(1, 5):  # with rate 0 nothing is learned, and nothing is dropped
        assert torch.equal(losses[:, 0], losses[:, point])
    ends = [train(*tiny(0, 0, dropout=rate), (0, 0))[0][:, -1, :, 0] for rate in (0.0, 0.5)]
    torch.testing.assert_close(*ends[0])  # the same seed twice
    assert (ends[1][0] - ends[1][1]).abs().max() > 0.01  # has other masks
    assert str(GPT(10, 4, 1, 2, 8, dropout=0.5)).count("Dropout(p=0.5") == 3

def test_frozen_embeddings_stay_and_tied_ones_are_trained_together():
    for tied in (False, True):
        s, models, datasets = tiny(0, 1, tie_embeddings=tied, freeze_embeddings=not tied)
        before = copy.deepcopy(models)
        train(s, models, datasets, (0, 1))
        for old, model in zip(before, models, strict=True):
            still = {name for name, weight in model.named_parameters()
                     if torch.equal(weight, old.get_parameter(name))}
            assert len(still) == (0 if tied else 2)
            assert (model.lm_head.weight is model.transformer.wte.weight) == tied

def test_evaluation_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    data = reversal_data(24)
    data.first, data.letters = 0, 3  # alphabets 0 to 2 and 3 to 5
    total = sum(math.exp(v) for v in [0, 2, 1, 3, -1, 5])
    sentences = torch.tensor([[0, 2], [0, 5], [1, 4], [1, 0], [0, 0]])
    found = evaluate(table_model(logits), sentences, data)[..., 0]
    torch.testing.assert_close(found, torch.tensor([
        [math.log(total) - 1, 0, 2], [math.log(total) - 5, 1, 1],  # 2 is below 1; 5 is the highest
        [math.log(math.exp(4) + 5), 0, 1], [math.log(math.exp(4) + 5) - 4, 1, 1],  # 3 to 5 equal
        [math.log(total), 0, 3]]))
    assert nll(table_model(logits), sentences[:1]).item() == pytest.approx(math.log(total) - 1)
    high = evaluate(table_model(500 * torch.eye(6)), torch.tensor([[0, 1]]), data)
    assert high[0, 0].item() == pytest.approx(50 * math.log(10))  # the authors' ceiling

def test_heat_maps_of_a_model_set_by_hand():
    data, table = reversal_data(24), torch.zeros(26, 26)
    for a, _, b in data.groups["complete A -> B"].tolist():
        table[a, b] = 7.0
    maps = revcurse.heat_maps(table_model(table), data)
    assert torch.equal(maps["complete A -> B"], 7 * torch.eye(4))
    assert torch.equal(maps["complete B <- A"], torch.zeros(4, 4))
    assert revcurse.heat_maps(table_model(table), data, 3)["complete A -> B"].shape == (3, 3)

def test_numbers_of_long_entities_against_a_loop():
    s, models, datasets = tiny(0, entity_length=2)
    data, model, rows = datasets[0], models[0].eval(), datasets[0].groups["held-out, asked"]
    s = s.altered(epochs=1, lr=0.0)
    found, maps = revcurse.measure(s, 0, model, data, train(s, models, datasets, (0,))[0][0], [])
    words, firsts, right = [], [], []
    with torch.no_grad():
        for sentence in rows.tolist():
            log_p = model(torch.tensor([sentence[:-1]]))[0].log_softmax(-1)
            firsts.append(-log_p[2, sentence[3]].item())
            words.append(firsts[-1] - log_p[3, sentence[4]].item())
            right.append([log_p[2].argmax(), log_p[3].argmax()] == sentence[3:])
        expected = np.array([[model(row[None, :2])[0, 1, column[3]].item() for column in rows]
                             for row in rows])
    assert found["validation_nll"] == pytest.approx([np.mean(firsts)] * 2, rel=1e-5)
    assert found["validation_word_nll"] == pytest.approx(np.mean(words), rel=1e-5)
    assert found["validation_accuracy"] == pytest.approx(np.mean(right))
    assert found["asked_cosine"] == pytest.approx(1, abs=1e-6)  # nothing was trained
    assert maps["held-out, asked"] == pytest.approx(expected, abs=1e-3)
    results = revcurse.summarize(s, data, [(found, maps)])
    assert results["summary"]["validation_nll"]["per_seed"] == [found["validation_nll"][-1]]
    n, total = len(expected), np.sum(expected)
    assert results["weights"]["held-out, asked"] == pytest.approx({
        "diagonal": np.trace(expected) / n,
        "off_diagonal": (total - np.trace(expected)) / (n * n - n)}, abs=1e-3)

def test_chain_of_thought_by_hand():
    data, table = chain_data(40), torch.zeros(2, 42, 42)  # 10 triples, 3 of them held out
    a, _, b = data.groups["held-out A -> B"].T
    c = data.groups["held-out B -> C"][:, 2]
    table[0, a, b] = table[0, b, c] = 1.0
    table[0, a[0], b[1]] = 2.0  # A0 -> B1, which leads to C1
    table[0, b[2], b[2]] = 3.0  # B2 -> B2
    table[1, a[0], c[0]] = table[1, a[1], b[1]] = table[1, a[2], c[2]] = 1.0  # two at once
    asked = data.groups["held-out A ~> C"]

    def model(tokens, last):
        return table[tokens[:, -1], tokens[:, -2]][:, None]

    assert revcurse.chain_of_thought(model, asked, data) == pytest.approx(1 / 3)
    assert evaluate(model, asked, data)[:, 1].mean().item() == pytest.approx(2 / 3)

@pytest.mark.parametrize("trained, asked, nll, word", [
    (0.98, 0.0, 9.0, "Not learned yet"), (1.0, 0.0, 9.0, "The curse"), (1.0, 0.95, 0.1, "No curse"),
    (0.991, 0.09, 2.1, "The curse"), (1.0, 0.5, 9.0, "Some curse"), (1.0, 0.05, 1.9, "Some curse")])
def test_verdict(trained, asked, nll, word):
    summary = {"train_accuracy": trained, "validation_accuracy": asked, "validation_nll": nll,
               "train_nll": 0.1}
    assert revcurse.verdict({"unseen": "x", "chance": {"alphabet": 2.0}, "summary": {
        name: {"mean": mean} for name, mean in summary.items()}}).startswith(f"{word}: ")

def test_the_curse(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", seeds=3, seed=3) == 0
    printed = capsys.readouterr().out
    assert "reversal on c" in printed and "of 340 sentences, 202,880 parameters" in printed
    assert "The curse: " in printed and printed.count("right is ") == 3
    results = read(tmp_path)
    assert results["counts"] == {"train": 340, "validation": 60} and results["seconds"] > 0
    summary = results["summary"]
    for number in summary.values():
        assert number["mean"] == pytest.approx(np.mean(number["per_seed"]))
        assert number["std"] == pytest.approx(np.std(number["per_seed"]))
    assert summary["train_accuracy"]["mean"] > 0.97 and summary["train_nll"]["mean"] < 0.2
    assert max(summary["validation_accuracy"]["per_seed"]) <= 0.02
    assert min(summary["validation_nll"]["per_seed"]) > math.log(200) + 2
    assert summary["train_rank"]["mean"] < 1.5 and 60 < summary["validation_rank"]["mean"] < 140
    assert min(summary["asked_cosine"]["per_seed"]) > 0.99999  # never read
    *trained, unseen = (sides["diagonal"] - sides["off_diagonal"]
                        for sides in results["weights"].values())
    assert min(trained) > 5 and abs(unseen) < 0.8 and len(trained) == 3
    curves = results["curves"]
    assert curves["epoch"][-1] == 80 and np.shape(curves["train_nll"]) == (3, len(curves["epoch"]))
    assert curves["validation_nll"][2][-1] == summary["validation_nll"]["per_seed"][2]
    assert np.array(curves["train_nll"])[:, 0] == pytest.approx(math.log(802), abs=0.05)
    with np.load(tmp_path / "reversal.npz") as arrays:
        assert [arrays[name].shape for name in arrays] == [(140, 140)] * 2 + [(60, 60)] * 2
        assert arrays["held-out, trained"].argmax(1).tolist() == list(range(60))
    assert len(names_in(tmp_path)) == 4  # .json, .npz, .png, _weights.png

def test_chain_has_two_steps_and_context_or_related_tokens_have_no_curse(tmp_path, capsys):
    assert run_in(tmp_path, "chain", vocab=80, seeds=2, seed=1, epochs=140) == 0
    mean = {name: number["mean"] for name, number in read(tmp_path, "chain")["summary"].items()}
    assert mean["train_accuracy"] > 0.99 and mean["two_step_accuracy"] > 0.99
    assert mean["direct_accuracy"] == mean["validation_accuracy"] < 0.2
    assert 'In two steps, "A ->" and then "B ->", 100.0%' in capsys.readouterr().out
    assert run_in(tmp_path, "icl", vocab=60, seeds=2, epochs=80) == 0
    assert run_in(tmp_path, "chain", "--related-tokens", vocab=80, complete=50, held_out=10,
                  seeds=2, epochs=60) == 0
    for name in ("icl", "chain-related-tokens"):
        results = read(tmp_path, name)
        assert results["summary"]["validation_accuracy"]["mean"] > 0.95
        assert results["verdict"].startswith("No curse")
    assert not (tmp_path / "icl.npz").exists()  # no .npz with nothing in it

def test_theory_commands(tmp_path):
    assert run_in(tmp_path, "bilinear", "--symmetric", vocab=24, dims="16 128", seeds=2,
                  epochs=500) == 0
    runs = read(tmp_path, "bilinear")["runs"]
    assert [(run["value"], run["dim"], run["symmetric"]) for run in runs] == [
        ("dim 16", 16, 0), ("dim 16, symmetric", 16, 1), ("dim 128", 128, 0),
        ("dim 128, symmetric", 128, 1)]
    for one in runs:
        times, L, L_rev = (np.array(one["curves"][name]) for name in (
            "time", "forward_nll", "reversal_nll"))
        assert times[1] == 0.08 * 6 and times[-1] == pytest.approx(500 * 0.08 * 6)
        epsilon = max(math.log(L_rev[i, t] / L_rev[i, 0]) / math.log(L[i, t] / L[i, 0])
                      for i in range(2) for t in range(1, len(times)))
        assert one["epsilon"] == pytest.approx(max(0, epsilon))
        assert one["reversal_shift"] == pytest.approx(
            np.mean([abs(L_rev[i, -1] - math.log(26)) for i in range(2)]))
    assert runs[2]["epsilon"] < 0.1 and runs[3]["epsilon"] > 0.5
    assert run_in(tmp_path, "onelayer", vocab=24, seeds=2, complete=2, held_out=2, epochs=200) == 0
    summary = read(tmp_path, "onelayer")["summary"]
    assert summary["trained_probability_min"] > 0.9 and summary["closed_form_gap"] < 0.2
    assert summary["unseen_probability_max"] == pytest.approx(summary["chance"]) == 1 / 26
    assert summary["chain_unseen_probability_max"] <= 1 / 26 + 1e-12

SWEEPS = {"vocab": "24 32", "entity-length": "2 3", "layers": "1 2", "heads": "1 4",
          "position": "none relative", "embeddings": "learned frozen tied", "size": "1x16 2x8",
          "dropout": "0 0.3", "betas": "0.9,0.99 0.8,0.9"}

@pytest.mark.parametrize("axis, task", [("heads", "chain"), *zip(SWEEPS, ["reversal"] * 9)])
def test_ablate(tmp_path, axis, task):
    own = ("vocab", "layers", "heads", "dim") if axis == "size" else [axis]
    assert run_in(tmp_path, "ablate", axis, task=task, values=SWEEPS[axis],
                  **without(*own, epochs=2)) == 0
    name = f"ablate-{'chain-' * (task == 'chain')}{axis}"
    forms = {"size": "{layers}x{dim}", "betas": "{betas[0]},{betas[1]}",
             "embeddings": "{freeze_embeddings} {tie_embeddings}"}
    words = {"learned": "False False", "frozen": "True False", "tied": "False True"}
    for one, value in zip(read(tmp_path, name)["runs"], SWEEPS[axis].split(), strict=True):
        ran = forms.get(axis, f"{{{axis.replace('-', '_')}}}").format(**one["config"])
        assert ran in (value, f"{value}.0", words.get(value))  # the settings that ran
        assert one["value"] == f"{axis} {value}" and len(one["curves"]["train_nll"]) == 2
    assert (tmp_path / f"{name}_cosine.png").exists() == (axis == "size")
    assert (tmp_path / f"{name}.npz").exists() == (axis == "size")

def test_a_value_of_a_sweep_is_the_run_of_its_own_flags(tmp_path):
    settings = without("layers", lr=0.02)
    assert run_in(tmp_path, "ablate", "layers", values=2, **settings) == 0
    assert run_in(tmp_path, "reversal", layers=2, **settings) == 0
    one, other = read(tmp_path, "ablate-layers")["runs"][0], read(tmp_path)
    for name in ("summary", "curves", "weights", "counts"):
        assert one[name] == other[name]

def test_settings():
    paper, laptop = Reversal(preset="paper", layers=3), Reversal()
    assert (paper.layers, paper.heads, paper.dim, paper.epochs, paper.dropout) == (
        3, 12, 768, 3000, 0.1)
    assert (Chain().lr, Chain(preset="paper").lr, laptop.lr, paper.lr) == (0.003, 0.01, 0.01, 0.01)
    sweep = revcurse.Ablate(axis="size").trainings.values()
    assert {(s.layers, s.dim, s.heads, s.vocab, s.seeds, s.lr) for s in sweep} == {
        (1, 20, 4, 400, 3, 0.003), (1, 256, 4, 400, 3, 0.003), (12, 20, 4, 400, 3, 0.003)}
    sweep = revcurse.Ablate(axis="related-tokens", preset="paper").trainings.values()
    assert {(s.command, s.vocab, s.seeds, s.epochs) for s in sweep} == {("chain", 800, 10, 3000)}
    # 480 steps at least: V = 20 has 9 sentences, one step an epoch; V = 2000 has 850, fourteen
    for settings, epochs in [(Reversal(vocab=20), 480), (Reversal(vocab=2000), 80), (Chain(), 140),
                             (Reversal(vocab=20, batch_size=4), 160)]:
        s = prepare(settings)[0]
        assert s.epochs == epochs and 25 < len(s.points()) <= 40
        assert s.points() == sorted({0, epochs, *s.points()})
    s, _, model = prepare(Reversal(**TINY | {
        "lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0, "dropout": 0.4, "position": "none"}))
    group = s.make_optimizer(list(model.parameters())).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.2, (0.5, 0.6), 0)
    assert "wpe" not in model.transformer and model.transformer.drop.p == 0.4
    theory = prepare(revcurse.OneLayerTheory(lr=0.1, batch_size=2).trainings["chain"])[0]
    assert theory.make_optimizer([torch.zeros(1)]).param_groups[0]["lr"] == 0.2
    assert len(revcurse.All.lines) == 7 + 8 + 7

def test_all_and_its_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(revcurse.All, "lines", ["icl", "ablate layers --values 1", "cure"])
    monkeypatch.setattr(revcurse, "CURES", {name: CURES[name] for name in ("none", "tied GPT")})
    assert run_in(tmp_path, "all", **without("layers", vocab=40)) == 0
    claims = read(tmp_path, "all")["claims"]
    assert [(claim["figure"], claim["claim"]) for claim in claims] == [
        ("icl", "icl: No curse"), ("ablate-layers", "layers 1: The curse"),
        ("cure", "none: The curse"), ("cure", "none, as in the paper: The curse"),
        ("cure", "tied GPT: "), ("cure", "tied GPT, as in the paper: ")]
    for claim in claims:
        word = claim["claim"].split(": ")[1]
        assert claim["holds"] == (claim["measured"].startswith(word) if word else "")
    assert {"icl.json", "icl.png", "ablate-layers.json", "cure.png"} <= set(names_in(tmp_path))

def test_each_cure_runs_and_only_the_oracle_is_told_what_is_asked(tmp_path):
    trainings = CureTrials(**TINY).trainings
    assert len(trainings) == 2 * 9 + 4
    for name, s in trainings.items():
        data = s.make_data(1)
        trained = {tuple(row) for row in data.sentences[:data.trained].tolist()}
        asked = {tuple(row) for row in data.sentences[data.trained:].tolist()}
        assert asked & trained == (asked if "oracle" in name else set()), name
        assert (trained == {row[::-1] for row in trained}) == ("reverse training" in name)
        same, entities = {row[0] for row in trained if row[0] == row[2]}, data.sentences[:, ::2]
        bridged = "identity bridge" in name or "x = x" in name
        assert same == ({*entities.flatten().tolist()} if bridged else set())
    names = ["none", "either blank", "rule penalty", "two tables"]
    assert run_in(tmp_path, "cure", "--values", *names, **TINY) == 0
    runs = read(tmp_path, "cure")["runs"]
    assert [(run["config"]["cure"], run["setting"]) for run in runs] == [
        (name, setting) for name in names for setting in ("common", "paper")]
    for one in runs:
        assert {"sentences", "steps", "parameters", "seconds"} == set(one["cost"])
        assert {"validation_accuracy", "validation_nll", "validation_rank", "train_accuracy",
                "seen_accuracy"} <= set(one["summary"])
    assert (runs[0]["cost"]["sentences"], runs[0]["cost"]["steps"]) == (10, 36)
    assert (tmp_path / "cure.png").exists()

def test_losses_of_cures_by_hand():
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    sentences = torch.tensor([[2, 0, 8], [9, 1, 3]])
    log_p = table.log_softmax(-1)
    expected = -(log_p[0, 8] + log_p[1, 3]) / 2  # after the arrows
    found = revcurse.either_blank(table_model(table), sentences, None)
    assert found.item() == pytest.approx((expected - (log_p[0, 2] + log_p[1, 9]) / 2).item())

    def model(tokens, last=1):  # the logit of y after "x arrow" is 10 x + y + 100 arrow
        return (10.0 * tokens[:, -2] + 100 * tokens[:, -1])[:, None, None] + torch.arange(26)

    penalty = np.mean([(10 * x + y - (10 * y + x + 100)) ** 2
                       for x in (2, 8, 9, 3) for y in (2, 8, 9, 3)])
    answers = torch.arange(26.0).log_softmax(0)
    found = revcurse.rule_penalty(model, sentences, None).item()
    assert found == pytest.approx(penalty - (answers[8] + answers[3]).item() / 2, rel=1e-5)

def test_cures_of_the_theory():
    for name in ("merged", "merged, x = x", "factorised", "factorised, x = x"):
        s = CureTrials(quiet=True, seeds=3).trainings[name].altered(label=name)
        summary = revcurse.experiment(s)["summary"]
        assert summary["train_accuracy"]["mean"] == 1
        assert summary["validation_accuracy"]["mean"] == (name == "factorised, x = x")

def test_recipes_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(recipes) >= 5
    for recipe in recipes:
        exec(compile(recipe, "README.md", "exec"), {"__name__": "notebook"})

BAD = {  # command line: what the one line on stderr must hold
    "reversal --dim 30": "dim 30", "reversal --dim 20 --position relative": "multiple of 8",
    "reversal --dim 0": "--dim 0", "reversal --heads x": "--heads",
    "reversal --vocab 3": "vocab 3", "reversal --complete 0": "--complete 0",
    "reversal --complete 180": "180", "reversal --epochs 0": "--epochs 0",
    "reversal --seed -1": "--seed -1", "reversal --lr nan": "--lr nan",
    "reversal --lr inf": "--lr inf", "reversal --weight-decay -0.1": "--weight-decay -0.1",
    "reversal --betas 1 0.9": "beta", "reversal --dropout 1.5": "dropout",
    "reversal --device tpu": "--device", "reversal --position sideways": "relative",
    "reversal --resume": "--resume", "reversal --loss none": "sequence",
    "reversal --seeds-at-once 0": "--seeds-at-once 0", "cure --cosine": "--cosine",
    "reversal --device cuda": "cuda", "": "COMMAND", "reversal --epoch 3": "--epoch",
    "ablate": "axis", "ablate dropout": "--values", "ablate vocab --values 24 x": "'x'",
    "ablate vocab --values 24 3": "vocab 3", "ablate size --values 1x20 3": "--dim",
    "ablate embeddings --values green": "green", "ablate layers --animate": "--animate",
    "ablate related-tokens --task reversal": "related", "ablate layers --layers 6": "--layers",
    "ablate size --heads 2": "--heads", "ablate size --cosine": "--cosine",
    "ablate embeddings --tie-embeddings --values learned frozen": "--tie-embeddings",
    "ablate layers --related-tokens": "--related-tokens", "ablate preset --values paper": "preset",
    "all --frobnicate": "--frobnicate", "all --dim 30": "--dim",
    "all --batch-size 0": "--batch-size 0", "cure --values snake-oil": "snake-oil",
    "icl --animate": "--animate", "icl --vocab 12": "vocab 12",
    "chain --related-tokens --entity-length 2": "entity_length 1",
    "chain --related-tokens --vocab 100": "vocab 100", "bilinear --dims 16 0": "--dims 0",
    "onelayer --held-out 0": "--held-out 0", "plot": "files", "plot none.json": "none.json"}

@pytest.mark.parametrize("line", BAD)
def test_bad_input(tmp_path, capsys, line):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this device is here")
    (tmp_path / "reversal.json").write_text("earlier")
    where = [] if line.startswith(("plot", "nonsense")) or not line else ["--out", str(tmp_path)]
    assert main([*line.split(), *where]) == 2
    one_line(capsys, BAD[line])
    assert names_in(tmp_path) == ["reversal.json"]
    assert (tmp_path / "reversal.json").read_text() == "earlier"

CAPITALS = [("Paris", "France"), ("Rome", "$\\foo$"), ("Oslo", "Norway"), ("Cairo", "Egypt"),
            ("Georgetown", "Guyana"), ("Lima", "Peru")]
LINES = "\n".join("\t".join(pair) for pair in CAPITALS)

def test_facts_as_real_lists_have_them(tmp_path, capsys):
    file = tmp_path / "facts.tsv"
    file.write_bytes(("\ufeff" + LINES.replace("\n", "\r\n") + "\t\t\r\r\n \t\r\nDjibouti\tDjibouti"
                      "\nGeorgetown\tCayman Islands\nLyon\tFrance\n").encode())
    assert run_in(tmp_path, "reversal", facts=file, **TINY) == 0
    assert "3 pairs left out, with a name seen before: Djibouti - Dj" in capsys.readouterr().out
    results = read(tmp_path)
    assert results["config"]["vocab"] == 24 and results["counts"] == {"train": 10, "validation": 2}
    named = {tuple(sorted(pair)) for pairs in results["names"].values() for pair in pairs}
    assert named == {tuple(sorted(pair)) for pair in CAPITALS}

def test_many_long_names_have_small_labels_and_a_mark_where_they_are_cut():
    facts = [(f"The city with the number {i}", f"Land {i}") for i in range(40)]
    results = run(Reversal(facts=facts, **without("vocab")))
    axes = draw(results)["_weights.png"].axes[0]
    labels, (low, _) = axes.get_yticklabels(), axes.images[0].get_clim()
    assert [label.get_text() for label in labels] == [
        f"{pair[0][:16]}..." for pair in results["names"]["complete A -> B"]]
    assert low == 0 and len(labels) == 28 and labels[0].get_fontsize() * 28 < 140

BAD_FACTS = {
    "": "4 are needed", "a\tb\nc\td\ne\tf\n": "3 pairs", LINES + "\nc d\n": "(7)",
    LINES + "\nc\td\te\n\nf\n\tg\nh\ni\nj\nk\n": "7 lines (7, 9, 10, 11, 12)"}

def test_bad_facts_and_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("facts").write_text(LINES)
    Path("latin").write_bytes(b"a\tb\nc\t\xff\n")
    lines = {"--complete 6": "6 complete", "--vocab 800": "vocab", "--facts latin": "UTF-8",
             "--entity-length 2": "of one token", "--facts .": "--facts .", "--facts no": "No such",
             "--facts facts --out facts": "--out facts", "--out facts/below": "--out facts/below"}
    for i, (content, words) in enumerate(BAD_FACTS.items()):
        Path(str(i)).write_text(content)
        lines[f"--facts {i}"] = words
    for line, words in lines.items():
        words_of_facts = [] if "--facts" in line else ["--facts", "facts"]
        assert main(["reversal", "--out", "out", *words_of_facts, *line.split()]) == 2
        one_line(capsys, words)
    assert not Path("out").exists() and Path("facts").read_text() == LINES

@posix
def test_facts_from_a_pipe_are_read_once(tmp_path):
    line = [sys.executable, "revcurse.py", "ablate", "layers", "--values", "1", "2",
            *flags(**without("vocab", "layers", epochs=2)), "--out", str(tmp_path)]
    done = subprocess.run(["bash", "-c", '"$@" --facts <(printf "%s" "$LINES")', "bash", *line],
                          cwd=HERE, env=os.environ | {"LINES": LINES}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [run["config"]["vocab"] for run in read(tmp_path, "ablate-layers")["runs"]] == [24, 24]

def test_what_stops_a_run_leaves_earlier_results(tmp_path, capsys, monkeypatch):
    assert run_in(tmp_path, "reversal", **TINY) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_in(tmp_path, "reversal", **TINY, lr=1e8, seed=5) == 1
    one_line(capsys, "NaN at epoch", "--lr")
    monkeypatch.setattr(revcurse, "train", lambda *args: torch.empty(10**15))
    assert run_in(tmp_path, "reversal", **TINY) == 1
    one_line(capsys, "memory", "--batch-size")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

def test_files_appear_whole_or_not_at_all(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    revcurse.write(tmp_path / "one", lambda path: path.write_text("old"))
    with pytest.raises(OSError):
        revcurse.write(tmp_path / "one", fail)
    assert (tmp_path / "one").read_text() == "old" and names_in(tmp_path) == ["one"]

def test_pictures_fail_alone_and_are_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("reversal.png").mkdir()  # in the way
    line = "reversal", "--animate", "--cosine"
    assert run_in(".", *line, **TINY | {"epochs": 2}) == 1
    one_line(capsys, "numbers are safe", "plot")
    Path("reversal.png").rmdir()
    assert run_in(".", *line, **TINY | {"epochs": 2}) == 0
    pictures = {path.name: path.read_bytes() for path in Path().iterdir()
                if path.suffix in (".png", ".gif")}
    assert len(pictures) == 4
    for end in ("json", "npz"):  # names with dots stay apart
        shutil.copy(f"reversal.{end}", f"run_lr0.01.{end}")
    assert main(["plot", "run_lr0.01.json"]) == 0
    for name, content in pictures.items():
        assert Path(name.replace("reversal", "run_lr0.01")).read_bytes() == content

class Evil:  # makes a file when it is unpickled
    def __reduce__(self):
        return open, ("marker", "w")

def test_bad_results_to_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_in(".", "reversal", **TINY) == 0
    good, arrays = Path("reversal.json"), Path("reversal.npz")
    text, picture = good.read_text(), Path("reversal.png").read_bytes()
    evil = {"complete A -> B": np.array([Evil()])}
    for damage in [lambda: good.write_text(text[:200]), lambda: good.write_text("[1]"),
                   lambda: good.write_text("{}"), lambda: good.write_text(text) and
                   arrays.write_bytes(arrays.read_bytes()[:-40]),
                   lambda: np.savez(arrays, **evil), arrays.unlink]:
        damage()
        assert main(["plot", "reversal.json"]) == 2
        one_line(capsys, "not a results file")
        assert Path("reversal.png").read_bytes() == picture and not Path("marker").exists()

def test_in_a_notebook(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = run(Reversal(**TINY | {"quiet": False}))
    assert "epoch 12 of 12" in capsys.readouterr().out and names_in(tmp_path) == []
    assert run_in(tmp_path, "reversal", **TINY) == 0
    for name in ("summary", "curves", "weights", "counts", "chance"):
        assert read(tmp_path)[name] == json.loads(json.dumps(results[name]))
    assert draw(results)._repr_html_().count("<img") == 2
    for settings in (revcurse.Ablate(axis="heads", values=[1, 2], **without("heads")),
                     revcurse.OneLayerTheory(vocab=24, seeds=2, epochs=5)):
        assert draw(run(settings))._repr_html_()
    with pytest.raises(revcurse.Problem, match="must be one of"):
        run(Reversal(position="up"))

SLOW = """
import signal, sys, time, revcurse; signal.signal(signal.SIGINT, signal.default_int_handler)
adam = revcurse.torch.optim.AdamW
class Slow(adam):
    def step(self):
        time.sleep(0.02)
        super().step()
revcurse.torch.optim.AdamW = Slow
revcurse.time.monotonic = lambda clock=time.monotonic: 1000 * clock() ** 2
sys.exit(revcurse.main(sys.argv[1:]))
"""  # steps take longer, and checkpoints come at each epoch

def killed(folder, *argv, when, how=signal.SIGKILL):
    """Run a command line in a process of its own, and kill it `when` there is something."""
    running = subprocess.Popen([sys.executable, "-c", SLOW, *argv, "--out", str(folder)],
                               cwd=HERE, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    while not (folder.exists() and when()):
        time.sleep(0.02)
    running.send_signal(how)
    return running, running.communicate(timeout=60)[1]

@posix
def test_killed_and_given_again_is_the_same_as_uninterrupted(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = ["reversal", "--animate", *flags(**TINY | {"dropout": 0.1, "seeds_at_once": 1})]
    assert run_in(whole, *line) == 0
    second = broken / ".reversal.reversal, from seed 1.pt"
    running, _ = killed(broken, *line, when=second.exists)
    assert running.returncode == -9 and all(name.endswith(".pt") for name in names_in(broken))
    stamp = second.stat().st_mtime_ns
    running, error = killed(broken, *line, how=signal.SIGINT,
                            when=lambda: second.stat().st_mtime_ns > stamp)
    assert running.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    before = second.read_bytes()
    capsys.readouterr()
    assert run_in(broken, *line, "--lr", "0.02") == 2  # other flags
    one_line(capsys, "delete", ".reversal.reversal, from seed 0.pt")
    assert second.read_bytes() == before
    assert run_in(broken, *line) == 0
    printed = capsys.readouterr().out
    assert "seed 0: going on after epoch 12" in printed and "seed 1: going on after" in printed
    assert read(broken)["summary"] == read(whole)["summary"] and names_in(broken) == names_in(whole)
    with np.load(whole / "reversal.npz") as one, np.load(broken / "reversal.npz") as other:
        assert all((one[name] == other[name]).all() for name in one)

def test_damaged_and_evil_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(".reversal.reversal, from seed 0.pt")
    for damage in lambda: checkpoint.write_bytes(b"x"), lambda: torch.save([Evil()], checkpoint):
        damage()
        assert run_in(".", "reversal", **TINY) == 2
        one_line(capsys, checkpoint, "delete")
        assert names_in(tmp_path) == [checkpoint.name]

@posix
def test_groups_of_seeds_and_two_processes_give_the_numbers_of_one(tmp_path):
    settings = TINY | {"seeds": 3}
    assert run_in(tmp_path / "one", "reversal", **settings) == 0
    assert run_in(tmp_path / "groups", "reversal", **settings, seeds_at_once=2) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(HERE / "revcurse.py"), "reversal", *flags(**settings), "--out", str(tmp_path / "two")],
        timeout=90, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for the other processes") == 1
    one = read(tmp_path / "one")
    for other in ("groups", "two"):
        for name, number in read(tmp_path / other)["summary"].items():
            assert number["per_seed"] == pytest.approx(one["summary"][name]["per_seed"], rel=1e-3)
        assert names_in(tmp_path / other) == names_in(tmp_path / "one")

def command(folder, *argv, python=(), shell=None, **environment):
    """Run a command line as a user does: (status, output, errors)."""
    line = [sys.executable, *python, "revcurse.py", *argv, "--out", str(folder)]
    line = ["bash", "-c", shell, "bash", *line] if shell else line
    done = subprocess.run(line, cwd=HERE, env=os.environ | environment, capture_output=True,
                          timeout=90, check=False)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")

def test_a_strange_environment(tmp_path):
    facts = tmp_path / "facts.tsv"
    facts.write_text("\u0160\u00e1rka\t\u017b\u00f3\u0142w\n" + LINES, encoding="utf-8")
    status, printed, error = command(
        tmp_path / "\u017b", "reversal", *flags(facts=facts, **without("vocab")), python=["-OO"],
        MPLBACKEND="module://matplotlib_inline.backend_inline", PYTHONIOENCODING="cp1252",
        PYTHONWARNINGS="error", HOME="/nowhere", MPLCONFIGDIR="/nowhere")
    assert (status, error) == (0, "") and "right is" in printed
    assert len(names_in(tmp_path / "\u017b")) == 4

@posix
@pytest.mark.parametrize("shell", ['"$@" >&-', '"$@" | head -1; exit ${PIPESTATUS[0]}'])
def test_output_that_is_closed(tmp_path, shell):
    status, _, error = command(tmp_path, "reversal", *flags(**TINY | {"quiet": False}), shell=shell)
    assert (status, error) == (0, "") and len(names_in(tmp_path)) == 4

def test_output_that_is_replaced_and_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    (thread := threading.Thread(target=run_in, args=(tmp_path, "reversal"), kwargs=TINY)).start()
    thread.join()
    assert "of 10 sentences" in sys.stdout.getvalue() and len(names_in(tmp_path)) == 4

@pytest.mark.parametrize("left", ["RANK", "WORLD_SIZE"])
def test_what_torchrun_left_in_the_shell(tmp_path, capsys, monkeypatch, left):
    monkeypatch.setenv(left, "1")
    assert run_in(tmp_path, "reversal", **TINY) == 2
    one_line(capsys, "RANK")
    assert names_in(tmp_path) == []

def test_a_font_without_the_letters_is_one_hint(tmp_path, capsys):
    facts = [(f"\u6771{i}", f"\u4eac{i}") for i in range(6)]
    with revcurse.matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        draw(run(Reversal(facts=facts, **without("vocab")))).save(tmp_path / "x")
    assert capsys.readouterr().out.count("font.family") == 1

def test_help_is_complete(capsys):
    for name in (None, *revcurse.KINDS, "plot"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        assert stopped.value.code == 0 and "None" not in text
        assert max(map(len, text.splitlines())) <= 100
        if name in ("reversal", "cure"):
            assert "[64] [paper: 768]" in " ".join(text.split())

def test_import_changes_nothing():
    script = """import os, sys, torch
os.environ["MPLBACKEND"] = "agg"
def state(): return dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()
before = state(); import revcurse; assert before == state()
assert revcurse.matplotlib.rcParams["backend"] == "agg", "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu(tmp_path):
    for line in (["reversal", "--animate"], ["chain", "--entity-length", "2"], ["icl"]):
        for device in ("cpu", "cuda"):
            assert run_in(tmp_path / device, *line, **TINY, device=device) == 0
        one, other = (read(tmp_path / device, line[0])["summary"] for device in ("cpu", "cuda"))
        for key in ("train_nll", "validation_nll"):
            assert other[key]["per_seed"] == pytest.approx(one[key]["per_seed"], abs=0.05, rel=0.02)

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-W", "error", *sys.argv[1:]]))
