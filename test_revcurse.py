# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13.0", "numpy>=2.4.6", "matplotlib>=3.11.2", "pytest>=9.0.3"]
# ///
"""Tests of revcurse.py: `python test_revcurse.py`, or pytest. About a minute on two cores."""

import copy
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and may share the cores

import numpy as np
import pytest
import torch
from torch import nn

import revcurse
from revcurse import (
    GPT,
    Bilinear,
    BilinearTheory,
    Chain,
    Cure,
    OneLayer,
    OneLayerTheory,
    Reversal,
    ablate,
    chain_data,
    cure,
    draw,
    evaluate,
    icl_data,
    main,
    nll,
    prepare,
    related_data,
    reversal_data,
    run,
    setting,
    train,
)

HERE = Path(__file__).parent
TINY = {
    "vocab": 24,
    "layers": 1,
    "heads": 2,
    "dim": 16,
    "epochs": 12,
    "seeds": 2,
    "batch_size": 4,
    "quiet": True,
}
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and a shell")


def without(*names, **others):
    """TINY without some settings, or with others."""
    return {name: value for name, value in (TINY | others).items() if name not in names}


def flags(**settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value not in (None, False):
            words += [flag, *str(value).split()]
    return words


def run_in(folder, *argv, **settings):
    """Run a command line in this process, with output to a folder: its exit status."""
    return main([*argv, *flags(**settings), "--out", str(folder)])


def read(folder, name="reversal"):
    return json.loads((folder / f"{name}.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def one_line(capsys, *words):
    """What is on stderr is one line with these words."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in words:
        assert str(word) in error, error


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are tested elsewhere, and take most of the time of a tiny run."""
    monkeypatch.setattr(revcurse, "draw", lambda results: revcurse.Figures())


def start(experiment, seeds, dtype=None):
    """(experiment with all rules applied, models, datasets) of these seeds, before a training."""
    experiment, _, _ = prepare(experiment)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = experiment.make_model(experiment.make_data(seed))
        models.append(model.to(dtype))
    return experiment, models, [experiment.make_data(seed) for seed in seeds]


def curves_of(history, part, seeds):
    """NLL of each sentence of a part: (S, points, n)."""
    return torch.stack(
        [torch.stack([point[s][part].nll[:, 0] for point in history.values()]) for s in seeds]
    )


# ------------------------------------------------------------------------------------------- Data
COUNTS = {
    (20, 1): (9, 1),
    (50, 1): (20, 4),
    (200, 1): (85, 15),
    (800, 1): (340, 60),
    (2000, 1): (850, 150),
    (800, 2): (680, 120),
    (800, 3): (250, 50),
}


@pytest.mark.parametrize("size", COUNTS, ids=str)
def test_reversal_data_is_the_papers(size):
    vocab, K = size
    data = reversal_data(vocab, K, seed=1)
    trained, asked = data.train_sentences().tolist(), data.test_sentences().tolist()
    assert (len(trained), len(asked)) == COUNTS[size]
    assert len(data.names) == vocab + 2 and data.answer_length == K and data.graded == 0
    assert len({tuple(s) for s in trained + asked}) == len(trained + asked)
    facts = {}  # (A, B): directions that are trained
    for s in trained + asked:
        left, arrow, right = tuple(s[:K]), s[K], tuple(s[K + 1 :])
        a, b = (left, right) if arrow == 0 else (right, left)
        assert all(2 <= token < 2 + vocab // 4 for token in a)
        assert all(2 + vocab // 4 <= token < 2 + vocab // 4 * 2 for token in b)
        if s in trained:
            facts.setdefault((a, b), set()).add(arrow)
        else:  # the reverse is trained, the sentence itself is not
            assert facts.pop((a, b)) == {1 - arrow}
    assert all(arrows == {0, 1} for arrows in facts.values())
    assert len({a for a, _ in facts}) == len({b for _, b in facts}) == len(facts)  # one to one


def test_seeds_coins_and_long_entities():
    one, same, other = (reversal_data(800, seed=seed).train_sentences() for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    arrows = [reversal_data(800, seed=seed).test_sentences()[:, 1] for seed in range(20)]
    tosses = torch.cat(arrows).float()  # 1200: 5 sigma are 0.072
    assert abs(tosses.mean() - 0.5) < 0.072
    data = reversal_data(800, 6, 30, 20)  # of 200**6 tuples: the product is not built
    spelled = [s[:6] if s[6] == 0 else s[7:] for s in data.train_sentences().tolist()]
    assert len(spelled) == 80 and 80 < np.mean(spelled) < 124  # letters of A are 2 to 201
    assert len(reversal_data(800, 40, 4, 2).train_sentences()) == 10
    assert len(reversal_data(8, 2, 2, 2).train_sentences()) == 6  # all four entities there are


CHAINS = {
    (800, 1): (540, 60),
    (20, 1): (14, 1),
    (800, 2): (1080, 120),
    (800, 3): (400, 50),
}


def check_chain(data, vocab, counts):
    """Every A has its two steps trained, and its A ~> C trained or asked: two steps lead there."""
    K = data.answer_length
    trained, asked = data.train_sentences().tolist(), data.test_sentences().tolist()
    assert (len(trained), len(asked)) == counts and len(data.names) == 2 + vocab
    trained = {(tuple(s[:K]), s[K], tuple(s[K + 1 :])) for s in trained}
    asked = {(tuple(s[:K]), s[K], tuple(s[K + 1 :])) for s in asked}
    assert (len(trained), len(asked)) == counts and not trained & asked
    step = {left: right for left, arrow, right in trained if arrow == 0}
    implied = {(left, right) for left, arrow, right in trained | asked if arrow == 1}
    assert implied == {(a, step[step[a]]) for a in step if step[a] in step}
    for a, c in implied:
        assert min(a + step[a] + c) >= 2 and max(a + step[a] + c) < vocab + 2
    return implied, step


@pytest.mark.parametrize("size", CHAINS, ids=str)
def test_chain_data_is_the_papers(size):
    vocab, K = size
    data = chain_data(vocab, K, seed=1)
    implied, step = check_chain(data, vocab, CHAINS[size])
    assert data.graded == 0 and data.alphabet_size == vocab // 4
    As = {token for a, _ in implied for token in a}
    Bs = {token for a, _ in implied for token in step[a]}
    Cs = {token for _, c in implied for token in c}
    assert len(As | Bs | Cs) == len(As) + len(Bs) + len(Cs)


@pytest.mark.parametrize("complete", [10, 20, 50, 100, 200, 500])
def test_related_tokens_are_the_papers(complete):
    data = related_data(800, complete)
    implied, step = check_chain(data, 800, (3 * complete + 100, 50))
    assert (data.answer_length, data.graded, data.alphabet_size) == (2, 1, complete + 50)
    fixed = {(a[0], step[a][0], c[0]) for a, c in implied}
    assert len(fixed) == 1 and len(set(*fixed)) == 3
    assert all(a[1] == step[a][1] == c[1] not in set(*fixed) for a, c in implied)


def test_icl_data_is_the_papers():
    data = icl_data(seed=1)
    sentences = torch.cat([data.train_sentences(), data.test_sentences()])
    assert (len(data.train_sentences()), len(sentences), len(data.names)) == (700, 1000, 403)
    a, forward, b, same, b2, backward, a2 = sentences.T
    assert (forward == 0).all() and (backward == 1).all() and (same == 2).all()
    assert (a == a2).all() and (b == b2).all() and min(a) > 2
    pairs = list(zip(a.tolist(), b.tolist()))
    letters_a, letters_b = set(a.tolist()), set(b.tolist())
    assert len(set(pairs)) == 1000 and len(letters_a) == 100 and len(letters_b) == 10
    assert not letters_a & letters_b and data.alphabet_size == 100
    asked = {a: frozenset(b for a2, b in pairs[700:] if a2 == a) for a in letters_a}
    assert all(len(others) == 3 for others in asked.values())
    assert len(set(asked.values())) > 20  # of 120: each A has its own three
    assert len(icl_data(13).train_sentences()) == 3 * 7
    assert len(icl_data(4, 1, 2).test_sentences()) == 2  # the smallest: one A, three B's


def test_names_of_tokens_and_facts():
    related = related_data(24, 4, 2)
    for data, role, row, words in (
        (reversal_data(24), "complete B <- A", 3, "B3 <- A3"),
        (chain_data(24), "complete A ~> C", 1, "A1 ~> C1"),
        (related, "held-out B -> C", 0, "b i4 -> c i4"),
    ):
        assert " ".join(data.names[token] for token in data.train[role][row]) == words
    icl = icl_data(16, 2, 2)
    assert " ".join(icl.names[t] for t in icl.train["complete"][0])[:6] == "A0 -> "
    assert icl.names[3:11] == ["A0", "A1", "A2", "A3", "B0", "B1", "B2", "B3"]
    assert icl.names[11:] == ["#"] * 8
    facts = [(f"A {i}", f"B {i}") for i in range(6)]
    orders = set()
    for seed in range(3):
        data = reversal_data(24, facts=facts, seed=seed)
        sentences = torch.cat([data.train_sentences(), data.test_sentences()]).tolist()
        named = [[data.names[token] for token in s] for s in sentences]
        assert {(s[0], s[2]) if s[1] == "->" else (s[2], s[0]) for s in named} == set(facts)
        orders.add(tuple(data.names))
    assert len(orders) == 3  # each seed holds out other facts


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: reversal_data(7), "vocab 7: "),
        (lambda: chain_data(7), "vocab 7: "),
        (lambda: related_data(100), "vocab 100: "),
        (lambda: related_data(800, 10, 0), "held-out"),
        (lambda: icl_data(12), "vocab 12: "),
        (lambda: icl_data(400, complete=0), "0 . 3 B"),
        (lambda: reversal_data(24, 1, 6, 1), "6 complete"),
        (lambda: reversal_data(20, facts=[("a", "b")] * 6), "6 facts need 24"),
        (lambda: reversal_data(24, 2, facts=[("a", "b")] * 6), "of one token"),
        (lambda: GPT(10, 4, 1, 3, 8), "multiple of 3"),
        (lambda: GPT(10, 4, 1, 4, 12, "relative"), "multiple of 8"),
    ],
)
def test_pieces_raise_value_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ----------------------------------------------------------------------------------------- Theory


def test_bilinear_logits_are_those_of_the_loops():
    torch.manual_seed(0)
    model = Bilinear(5, 7)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not model.Theta.any() and trained == ["Theta"]
    nn.init.normal_(model.Theta)
    logits = model(torch.tensor([[3, 0], [1, 1]]))
    assert logits.shape == (2, 1, 7) and logits.dtype == torch.float64
    E, theta, five = model.embeddings.tolist(), model.Theta.tolist(), range(5)
    for row, x in enumerate([3, 1]):
        expected = []
        for y in range(7):
            expected.append(sum(E[x][a] * theta[a][b] * E[y][b] for a in five for b in five))
        assert logits[row, 0].tolist() == pytest.approx(expected)
    symmetric = Bilinear(5, 7, symmetric=True)
    symmetric.load_state_dict(model.state_dict())
    mean = (model.Theta + model.Theta.T) / 2
    all_logits = symmetric(torch.arange(7)[:, None])[:, 0]
    torch.testing.assert_close(all_logits, model.embeddings @ mean @ model.embeddings.T)
    torch.manual_seed(3)
    full = torch.randn(12, 50, dtype=torch.float64) / math.sqrt(50)
    torch.manual_seed(3)
    short = Bilinear(50, 12).embeddings  # in the span of the tokens all products are the same
    assert short.shape == (12, 12)
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


def test_theorems_over_ten_seeds():
    """Theorem 1's epsilon, its slope and Theorem 2, each from the curves or from small steps."""
    for dim, most in ((64, 0.15), (1024, 0.02)):
        results = run(BilinearTheory(dim=dim, vocab=40, epochs=400, quiet=True))
        L, L_rev = (np.array(results["curves"][f"{way}_nll"]) for way in ("forward", "reversal"))
        assert L[:, -1].max() < 0.1 and (np.diff(L) < 0).all()
        epsilons = []
        for i in range(10):
            for t in range(1, L.shape[1]):
                reverse, forward = L_rev[i, t] / L_rev[i, 0], L[i, t] / L[i, 0]
                epsilons.append(math.log(reverse) / math.log(forward))
        assert results["epsilon"] == pytest.approx(max(0, *epsilons)) and results["epsilon"] < most
        form = revcurse.closed_form(results["curves"]["time"], 42, 10)
        assert results["closed_form_gap"] == pytest.approx(np.abs(L - form).max())
        shifts = [L_rev[i, -1] - math.log(42) for i in range(10)]
        assert results["shift"] == pytest.approx(shifts)
        assert results["reversal_shift"] == pytest.approx(np.mean(shifts))
        summary = results["summary"]
        parts = [
            np.array(summary[f"{part}_shift"]["per_seed"]) for part in ("own_logit", "normaliser")
        ]
        assert sum(parts) == pytest.approx(shifts)
        assert parts[0].mean() < 0 < parts[1].mean()
        for c in (0.1, 0.01):
            for i, value in enumerate(results["theorem_2"][str(c)]):
                t = int(np.argmax(L[i] <= c))  # the first time, or 0 if there is none
                if t == 0:
                    assert value is None
                else:
                    assert value == pytest.approx(L_rev[i, t], abs=0.02)
        assert min(results["theorem_2"]["0.1"]) > math.log(42 / 2)
        assert len(results["slope"]) == 10
        assert abs(np.mean(results["slope"]) - 1 / dim) < 4 * math.sqrt(2 / 10) / dim


def test_slope_at_the_start_by_small_steps():
    experiment = BilinearTheory(dim=8, vocab=24, epochs=1, lr=1e-4, quiet=True, seeds=3)
    results = run(experiment)
    curves = results["curves"]
    for i in range(3):
        forward, reverse = curves["forward_nll"][i], curves["reversal_nll"][i]
        slope = (reverse[1] - reverse[0]) / (forward[1] - forward[0])
        assert results["slope"][i] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_first_below_by_hand():
    losses, others = [1.0, 0.1, 0.001], [4.0, 5.0, 7.0]
    assert revcurse.first_below(losses, 0.1, others) == pytest.approx(5)
    assert revcurse.first_below(losses, 0.01, others) == pytest.approx(6)  # half way in log
    assert revcurse.first_below(losses, 1e-4, others) is None
    assert revcurse.first_below([1.0, 0.01], 0.1, [4.0, 6.0]) == pytest.approx(5)


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


@pytest.mark.parametrize("symmetric", [False, True])
def test_closed_forms_against_gradient_descent_with_orthonormal_embeddings(symmetric):
    M, N, lr = 30, 6, 0.05
    model = Bilinear(M, M, symmetric)
    with torch.no_grad():
        model.embeddings.copy_(torch.eye(M))
    sentences = torch.tensor([(i, 0, N + i) for i in range(N)])
    times, losses, reverse = [], [], []
    for step in range(4001):
        loss = nll(model, sentences)
        if step % 400 == 0:
            times.append(step * lr)
            losses.append(loss.item())
            reverse.append(nll(model, sentences.flip(1)).item())
        (gradient,) = torch.autograd.grad(loss, model.Theta)
        with torch.no_grad():
            model.Theta -= lr * gradient
    form = revcurse.closed_form_symmetric if symmetric else revcurse.closed_form
    assert form(times, M, N) == pytest.approx(losses, abs=1e-3)
    if symmetric:  # logits are symmetric, normalisers are not
        assert losses[-1] < reverse[-1] < 1.3 * losses[-1] < 1
    else:
        assert reverse == pytest.approx([math.log(M)] * len(times))


@pytest.mark.parametrize("batch_size", [1, 10**6])
def test_one_layer_trains_as_the_closed_form_says(batch_size):
    settings = {"vocab": 24, "lr": 0.02, "complete": 2, "held_out": 2, "seeds": 3}
    theory = OneLayerTheory(epochs=400, batch_size=batch_size, quiet=True, **settings)
    experiment, models, datasets = start(theory, range(3))
    history, _ = train(experiment, models, datasets, range(3))
    times = [epoch * 0.02 * 6 for epoch in history]
    expected = revcurse.closed_form(times, 26, 6)
    assert np.abs(curves_of(history, "trained", range(3)).numpy() - expected[:, None]).max() < 0.02
    asked = curves_of(history, "asked", range(3))
    assert (asked - math.log(26)).abs().max() < 1e-12  # Theorem 3, exactly a guess
    for model, data in zip(models, datasets, strict=True):
        read_tokens = set(data.train_sentences()[:, 0].tolist())
        touched = model.Y.detach().abs().sum(1) > 0
        assert set(touched.nonzero().flatten().tolist()) == read_tokens and (model.Z == 0).all()


# ------------------------------------------------------------------------------------------ Model


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
            angle = t * 10000.0 ** (-2 * i / d)
            cos, sin = math.cos(angle), math.sin(angle)
            turned[i] = x[i] * cos - x[half + i] * sin
            turned[half + i] = x[i] * sin + x[half + i] * cos
        return turned

    x = [w["transformer.wte.weight"][t] for t in tokens]
    if position == "absolute":
        x = [v + w["transformer.wpe.weight"][t] for t, v in enumerate(x)]
    for layer in range(layers):
        h = f"transformer.h.{layer}"
        qkv = [linear(norm(v, f"{h}.ln_1"), f"{h}.attn.c_attn") for v in x]
        mixed = []
        for t in range(len(x)):
            out = []
            heard = range(t + 1 if causal else len(x))
            for n in range(heads):
                q, k, v = (
                    [each[i * dim + n * d : i * dim + (n + 1) * d] for each in qkv]
                    for i in range(3)
                )
                scores = [turn(q[t], t) @ turn(k[s], s) / math.sqrt(d) for s in heard]
                p = np.exp(scores) / np.exp(scores).sum()
                out.append(sum(share * v[s] for share, s in zip(p, heard)))
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
    weights = model.state_dict()
    expected = [naive_gpt(weights, s, 3, 2, position, causal) for s in tokens.tolist()]
    for last in (None, 5, 2, 1):
        logits = model(tokens, last).detach()
        shown = np.stack(expected)[:, -(last or 5) :]
        np.testing.assert_allclose(logits, shown, rtol=1e-4, atol=1e-4)


def test_gpt_starts_as_gpt2_and_has_its_parameter_names():
    torch.manual_seed(0)
    model = GPT(500, 8, 3, 4, 64)
    names = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    for layer in range(3):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for kind in ("weight", "bias")]
    weights = dict(model.named_parameters())
    assert sorted(weights) == sorted(names)
    for name, weight in weights.items():
        if "ln_" in name or name.endswith("bias"):
            assert (weight == float("ln_" in name and name.endswith("weight"))).all()
        elif weight.numel() > 1000:  # smaller ones say little about their spread
            expected = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(weight.std() / expected - 1) < 0.05 and abs(weight.mean()) < 0.002


# --------------------------------------------------------------------------------------- Training


def table_model(table):
    """A model set by hand: the logits after a token are its row of a table."""
    return lambda tokens, last=1: table[tokens[:, -last:]]


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_loss_looks_at_the_right_tokens(loss, K):
    table = torch.zeros(26, 26, requires_grad=True)
    batch = reversal_data(24, K).train_sentences()
    Reversal(loss=loss, entity_length=K).batch_loss(table_model(table), batch).backward()
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
    settings = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
    experiment, models, datasets = tiny(*seeds, dtype=torch.float64, **settings)
    alone = copy.deepcopy(models)
    history, frames = train(experiment, models, datasets, seeds)
    assert list(history) == [0, 1, 2, 3, 4] and frames == {}
    for i, (seed, model, data) in enumerate(zip(seeds, alone, datasets, strict=True)):
        trained, asked = data.train_sentences(), data.test_sentences()
        assert (len(trained), len(asked)) == (10, 2)
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, (0.8, 0.99), weight_decay=0.1)
        for epoch in range(5):
            for part, sentences in (("trained", trained), ("asked", asked)):
                p = model(sentences[:, :2])[:, 1].softmax(-1).detach()
                p = p[torch.arange(len(sentences)), sentences[:, 2]]
                torch.testing.assert_close(history[epoch][i][part].nll[:, 0], -p.log())
            if epoch == 4:
                break
            for rows in torch.randperm(10, generator=order).split(4):
                batch = trained[rows]
                loss = nn.functional.cross_entropy(model(batch[:, :2])[:, -1], batch[:, 2])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, weight in model.named_parameters():  # the trained weights are in the models
            torch.testing.assert_close(models[i].get_parameter(name), weight, atol=1e-9, rtol=1e-9)


def test_the_loop_in_the_docstring_of_train_is_what_train_does():
    lines = inspect.getdoc(train).split("\n")
    first = lines.index("    for epoch in range(epochs):")
    text = textwrap.dedent("\n".join(lines[first : lines.index("", first)]))
    assert "loss.backward()" in text
    experiment, models, datasets = tiny(0, 1, 2, dtype=torch.float64, epochs=3)
    model, data = copy.deepcopy(models[1]), datasets[1]
    names = {"torch": torch, "nll": nll, "epochs": 3, "batch_size": 4, "model": model}
    names["sentences"] = data.train_sentences()
    names["optimizer"] = experiment.make_optimizer(model.parameters())
    torch.manual_seed(1)  # the loop shuffles with the generator of torch
    exec(text, names)
    train(experiment, models, datasets, (0, 1, 2))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), weight, atol=1e-9, rtol=1e-9)


def test_models_are_at_any_time_as_trained_so_far():
    seen = []

    class Watch(Reversal):
        def evaluate(self, model, data):
            seen.append(model.lm_head.weight.detach().clone())
            return super().evaluate(model, data)

    experiment, models, datasets = start(Watch(**TINY | {"epochs": 3}), (0, 1))
    first = [model.lm_head.weight.detach().clone() for model in models]
    train(experiment, models, datasets, (0, 1))
    assert len(seen) == 2 * 4 and torch.equal(seen[0], first[0]) and torch.equal(seen[1], first[1])
    assert torch.equal(seen[-1], models[1].lm_head.weight)
    assert all(not torch.equal(seen[i], seen[i + 2]) for i in range(6))


def test_dropout_is_at_work_in_training_only():
    experiment, models, datasets = tiny(0, 1, dropout=0.5)
    experiment.lr = 0.0  # with rate 0 nothing is learned, and nothing is dropped
    history, _ = train(experiment, models, datasets, (0, 1))
    losses = curves_of(history, "trained", (0, 1))
    for point in range(1, 5):
        assert torch.equal(losses[:, 0], losses[:, point])
    ends = []
    for rate in (0.0, 0.5):
        history, _ = train(*tiny(0, 0, dropout=rate), (0, 0))
        ends.append(curves_of(history, "trained", (0, 1))[:, -1])
    torch.testing.assert_close(*ends[0])  # the same seed twice
    assert (ends[1][0] - ends[1][1]).abs().max() > 0.01  # has other masks
    assert str(GPT(10, 4, 1, 2, 8, dropout=0.5)).count("Dropout(p=0.5") == 4
    assert str(revcurse.Block(8, 2)).count("Dropout(p=0.0") == 3


def test_frozen_embeddings_stay_and_tied_ones_are_trained_together():
    for tied in (False, True):
        experiment, models, datasets = tiny(0, 1, tie_embeddings=tied, freeze_embeddings=not tied)
        before = copy.deepcopy(models)
        train(experiment, models, datasets, (0, 1))
        for old, model in zip(before, models, strict=True):
            still = set()
            for name, weight in model.named_parameters():
                if torch.equal(weight, old.get_parameter(name)):
                    still.add(name)
            assert len(still) == (0 if tied else 2)
            assert (model.lm_head.weight is model.transformer.wte.weight) == tied


# ------------------------------------------------------------------------------------ Experiments


def test_evaluation_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    total = sum(math.exp(v) for v in [0, 2, 1, 3, -1, 5])
    sentences = torch.tensor([[0, 2], [0, 5], [1, 4], [1, 0]])
    found = evaluate(table_model(logits), sentences, 1)
    losses = [math.log(total) - 1, math.log(total) - 5]
    losses += [math.log(math.exp(4) + 5), math.log(math.exp(4) + 5) - 4]
    torch.testing.assert_close(found.nll, torch.tensor(losses)[:, None])
    assert found.correct.tolist() == [[False], [True], [False], [True]]
    assert nll(table_model(logits), sentences[:1]).item() == pytest.approx(math.log(total) - 1)
    many = evaluate(table_model(logits), sentences.repeat(700, 1), 1)  # in parts
    torch.testing.assert_close(many.nll, found.nll.repeat(700, 1))
    high = evaluate(table_model(500 * torch.eye(6)), torch.tensor([[0, 1]]), 1)
    assert high.nll.item() == pytest.approx(50 * math.log(10))  # the authors' ceiling


def test_heat_maps_of_a_model_set_by_hand():
    data, table = reversal_data(24), torch.zeros(26, 26)
    for a, _, b in data.train["complete A -> B"].tolist():
        table[a, b] = 7.0
    maps = revcurse.heat_maps(table_model(table), data)
    assert list(maps) == [*data.train, *data.test]
    assert torch.equal(maps["complete A -> B"], 7 * torch.eye(4))
    assert torch.equal(maps["complete B <- A"], torch.zeros(4, 4))
    assert revcurse.heat_maps(table_model(table), data, 3)["complete A -> B"].shape == (3, 3)
    table[3, 4] = 2.0  # A1 -> A2
    entities = revcurse.entity_map(table_model(table), data)
    assert torch.equal(entities["entities"], table[2:14, 2:14])
    trained = {(x - 2, y - 2) for x, _, y in data.train_sentences().tolist()}
    assert {tuple(at) for at in entities["trained"].nonzero().tolist()} == trained


def test_matched_rank_by_hand():
    data = reversal_data(24, complete=1, held_out=5, seed=3)
    asked = data.test_sentences()
    forward = asked[asked[:, 1] == 0]
    backward = asked[asked[:, 1] == 1]
    assert (len(forward), len(backward)) == (3, 2)
    table = torch.zeros(2, 26, 26)  # logits after "x r" are table[r, x]
    for relation, rows in ((0, forward), (1, backward)):
        for x, _, y in rows.tolist():
            table[relation, x, y] = 1.0
    table[1, backward[0, 0], backward[1, 2]] = 2.0  # another asked answer of "<-" is above
    table[1, backward[1, 0], 25] = 9.0  # no asked answer: does not count
    table[0, forward[0, 0]] = 0.0  # all equal: the middle

    def model(tokens, last):
        return table[tokens[:, -1], tokens[:, -2]][:, None]

    rank, others = revcurse.matched_rank(model, data)
    assert rank == pytest.approx((0.5 + 0 + 0 + 1 + 0) / 5)
    losses = []
    for rows in (forward, backward):
        answers = rows[:, 2].tolist()
        for x, r, y in rows.tolist():
            log_p = table[r, x].log_softmax(0)
            losses.append(np.mean([-log_p[other].item() for other in answers if other != y]))
    assert others == pytest.approx(np.mean(losses), rel=1e-5)
    assert revcurse.matched_rank(model, reversal_data(20)) == (None, None)  # one is asked


def test_numbers_of_long_entities_against_a_loop():
    experiment, models, datasets = tiny(0, entity_length=2)
    data, model = datasets[0], models[0].eval()
    rows = data.test["held-out, asked"]
    history = {0: experiment.evaluate(model, data), 1: experiment.evaluate(model, data)}
    start = model.transformer.wte.weight.detach().clone()
    numbers = experiment.measure(model, data, start, history)
    words, firsts, right = [], [], []
    with torch.no_grad():
        for sentence in rows.tolist():
            log_p = model(torch.tensor([sentence[:-1]]))[0].log_softmax(-1)
            firsts.append(-log_p[2, sentence[3]].item())
            words.append(firsts[-1] - log_p[3, sentence[4]].item())
            right.append([log_p[2].argmax(), log_p[3].argmax()] == sentence[3:])
        expected = []
        for row in rows:
            logits = model(row[None, :2])[0, 1]
            expected.append([logits[column[3]].item() for column in rows])
    expected = np.array(expected)
    assert numbers["validation_nll"] == pytest.approx([np.mean(firsts)] * 2, rel=1e-5)
    assert numbers["validation_word_nll"] == pytest.approx(np.mean(words), rel=1e-5)
    assert numbers["validation_accuracy"] == pytest.approx(np.mean(right))
    assert numbers["asked_cosine"] == pytest.approx(1, abs=1e-6)  # nothing was trained
    matrices = {name: each.numpy() for name, each in experiment.matrices(model, data).items()}
    assert matrices["held-out, asked"] == pytest.approx(expected, abs=1e-3)
    results = revcurse.results_of(experiment, data, [(numbers, matrices)])
    assert results["summary"]["validation_nll"]["per_seed"] == [numbers["validation_nll"][-1]]
    n, total = len(expected), np.sum(expected)
    mean = {
        "diagonal": np.trace(expected) / n,
        "off_diagonal": (total - np.trace(expected)) / (n * n - n),
    }
    assert results["weights"]["held-out, asked"] == pytest.approx(mean, abs=1e-3)


def test_chain_of_thought_by_hand():
    data, table = chain_data(40), torch.zeros(2, 42, 42)  # 10 triples, 3 of them held out
    a, _, b = data.train["held-out A -> B"].T
    c = data.train["held-out B -> C"][:, 2]
    table[0, a, b] = table[0, b, c] = 1.0
    table[0, a[0], b[1]] = 2.0  # A0 -> B1, which leads to C1
    table[0, b[2], b[2]] = 3.0  # B2 -> B2
    table[1, a[0], c[0]] = table[1, a[1], b[1]] = table[1, a[2], c[2]] = 1.0  # two at once

    def model(tokens, last):
        return table[tokens[:, -1], tokens[:, -2]][:, None]

    assert revcurse.chain_of_thought(model, data) == pytest.approx(1 / 3)
    asked = evaluate(model, data.test_sentences(), 1)
    assert asked.correct.float().mean().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "trained, asked, nll, rank, outcome",
    [
        (0.98, 0.0, 9.0, 0.5, "not learned"),
        (0.991, 0.0, 9.0, 0.41, "curse"),
        (1.0, 0.0, 9.0, 0.39, "trace"),
        (1.0, 0.0, 9.0, None, "curse"),
        (1.0, 0.95, 0.1, 0.0, "no curse"),
        (1.0, 0.09, 2.1, 0.5, "curse"),
        (1.0, 0.5, 9.0, 0.0, "some"),
        (1.0, 0.05, 1.9, 0.5, "trace"),
    ],
)
def test_outcomes(trained, asked, nll, rank, outcome):
    numbers = {"train_accuracy": trained, "validation_accuracy": asked, "validation_nll": nll}
    numbers |= {"train_nll": 0.1, "matched_rank": rank, "others_nll": 9.5}
    summary = {name: {"mean": mean, "per_seed": [mean] * 10} for name, mean in numbers.items()}
    results = {"unseen": "x", "chance": {"alphabet": 2.0}, "summary": summary}
    found, text = revcurse.verdict(results | {"counts": {"validation": 60}})
    assert found == outcome and text.startswith(f"{revcurse.OUTCOMES[outcome]}: ")
    assert (rank is None) or f"rank {rank:.3f}" in text


def test_a_trace_is_clearly_below_chance():
    for rank, asked, expected in (
        (0.39, 10, True),
        (0.39, 4, False),
        (0.2, 4, True),
        (0.41, 1000, False),
    ):
        summary = {"matched_rank": {"mean": rank, "per_seed": [rank] * 10}}
        results = {"summary": summary, "counts": {"validation": asked}}
        assert revcurse.has_trace(results) == expected


def test_the_curse(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", seeds=3, seed=3) == 0
    printed = capsys.readouterr().out
    assert "reversal on c" in printed and "340 sentences, 202,880 parameters" in printed
    assert "The curse, and no clear trace: 100.0%" in printed and printed.count("right is ") == 3
    assert "were never an input" in printed
    results = read(tmp_path)
    assert results["counts"] == {"train": 340, "validation": 60} and results["seconds"] > 0
    assert results["outcome"] == "curse" and results["config"]["epochs"] == 80
    summary = results["summary"]
    for number in summary.values():
        assert number["mean"] == pytest.approx(np.mean(number["per_seed"]))
        assert number["std"] == pytest.approx(np.std(number["per_seed"]))
    assert summary["train_accuracy"]["mean"] == 1 and summary["train_nll"]["mean"] < 0.1
    assert max(summary["validation_accuracy"]["per_seed"]) <= 0.02
    assert min(summary["validation_nll"]["per_seed"]) > math.log(200) + 2
    assert all(0.4 < rank < 0.6 for rank in summary["matched_rank"]["per_seed"])
    others = summary["others_nll"]["mean"]
    assert others == pytest.approx(summary["validation_nll"]["mean"], abs=0.2)
    assert min(summary["asked_cosine"]["per_seed"]) > 0.99999  # never read
    gaps = []
    for role in results["weights"].values():
        gaps.append(role["diagonal"] - role["off_diagonal"])
    assert len(gaps) == 4 and min(gaps[:3]) > 5 and abs(gaps[3]) < 0.8
    curves = results["curves"]
    assert curves["epoch"][-1] == 80 and np.shape(curves["train_nll"]) == (3, len(curves["epoch"]))
    assert curves["validation_nll"][2][-1] == summary["validation_nll"]["per_seed"][2]
    assert np.array(curves["train_nll"])[:, 0] == pytest.approx(math.log(802), abs=0.05)
    with np.load(tmp_path / "reversal.npz") as arrays:
        assert [arrays[name].shape for name in arrays] == [(140, 140)] * 2 + [(60, 60)] * 2
        assert arrays["held-out, trained"].argmax(1).tolist() == list(range(60))
    assert len(names_in(tmp_path)) == 4  # .json, .npz, .png, _weights.png


def test_chain_has_two_steps_and_context_or_related_tokens_have_no_curse(
    no_pictures, tmp_path, capsys
):
    assert run_in(tmp_path, "chain", vocab=80, seeds=2, seed=1, epochs=140) == 0
    mean = {name: number["mean"] for name, number in read(tmp_path, "chain")["summary"].items()}
    assert mean["train_accuracy"] > 0.99 and mean["two_step_accuracy"] > 0.99
    assert mean["direct_accuracy"] == mean["validation_accuracy"] < 0.2
    assert 'In two steps, "A ->" and then "B ->", 100.0%' in capsys.readouterr().out
    assert run_in(tmp_path, "icl", vocab=60, seeds=2) == 0
    settings = {"vocab": 80, "complete": 50, "held_out": 10, "seeds": 2, "epochs": 60}
    assert run_in(tmp_path, "chain", "--related-tokens", **settings) == 0
    for name in ("icl", "chain-related-tokens"):
        results = read(tmp_path, name)
        assert results["summary"]["validation_accuracy"]["mean"] > 0.95
        assert results["outcome"] == results["expected"] == "no curse"
    assert not (tmp_path / "icl.npz").exists()  # no .npz with nothing in it


def test_theory_commands(tmp_path):
    settings = {"vocab": 24, "dims": "64 128", "seeds": 2, "epochs": 200}
    assert run_in(tmp_path, "bilinear", "--symmetric", **settings) == 0
    runs = read(tmp_path, "bilinear")["runs"]
    labels = ["dim 64", "dim 64, symmetric", "dim 128", "dim 128, symmetric"]
    assert [run["value"] for run in runs] == labels
    assert [(run["dim"], run["symmetric"]) for run in runs] == [
        (64, False), (64, True), (128, False), (128, True)
    ]  # fmt: skip
    for one in runs:
        times = one["curves"]["time"]
        assert times[-1] == pytest.approx(200 * 0.4 * 6) and one["closed_form_gap"] < 0.8
        assert one["outcome"] == one["expected"] == ("no curse" if one["symmetric"] else "curse")
    assert runs[2]["epsilon"] < 0.1 and runs[3]["epsilon"] > 0.5
    settings = {"vocab": 24, "seeds": 2, "complete": 2, "held_out": 2, "epochs": 200}
    assert run_in(tmp_path, "onelayer", **settings) == 0
    reversal, chain = read(tmp_path, "onelayer")["runs"]
    assert reversal["trained_probability_min"] > 0.9 and reversal["closed_form_gap"] < 0.2
    assert reversal["unseen_probability_max"] == pytest.approx(1 / 26)
    assert chain["unseen_probability_max"] <= 1 / 26 + 1e-12
    assert list(reversal["tokens"].values())[:3] == ["->", "<-", "A0"]
    assert (chain["counts"]["train"], chain["counts"]["validation"]) == (8, 4)
    assert (tmp_path / "bilinear.png").exists() and (tmp_path / "onelayer.png").exists()


def test_the_one_picture(tmp_path):
    sweep = revcurse.weights(vocab=24, complete=2, epochs=150, quiet=True)
    results = run(sweep)
    assert [one["value"] for one in results["runs"]] == list(sweep.trials)
    trained = results["matrices"]["bilinear: trained"]
    assert trained.shape == (12, 12) and trained.sum() == 2 * 2 + 4
    asked = trained.T.astype(bool) & ~trained.astype(bool)
    for label, seen in (("bilinear", False), ("GPT", False), ("GPT, reverse training", True)):
        logits = results["matrices"][f"{label}: entities"].astype(float)
        logits -= logits.mean(1, keepdims=True)
        assert logits[trained.astype(bool)].min() > 1
        assert (logits[asked].mean() > 1) == seen
    assert len(draw(results)[".png"].axes) == 4


SWEEPS = {  # axis: values, and the settings that must have run
    "vocab": ("24 32", [{"vocab": 24}, {"vocab": 32}]),
    "entity-length": ("2 3", [{"entity_length": 2}, {"entity_length": 3}]),
    "entity_length": ("2", [{"entity_length": 2}]),
    "heads": ("1 4", [{"heads": 1}, {"heads": 4}]),
    "position": ("none relative", [{"position": "none"}, {"position": "relative"}]),
    "embeddings": (
        "learned frozen tied",
        [
            {"freeze_embeddings": False, "tie_embeddings": False},
            {"freeze_embeddings": True, "tie_embeddings": False},
            {"freeze_embeddings": False, "tie_embeddings": True},
        ],
    ),
    "size": ("1x20 1x256", [{"layers": 1, "dim": 20, "heads": 4}, {"layers": 1, "dim": 256}]),
    "dropout": ("0 0.3", [{"dropout": 0.0}, {"dropout": 0.3}]),
}


@pytest.mark.parametrize("axis", SWEEPS)
def test_ablate(tmp_path, axis):
    values, expected = SWEEPS[axis]
    name = axis.replace("_", "-")
    own = ("vocab", "layers", "heads", "dim") if axis == "size" else [axis.replace("-", "_")]
    settings = without(*own, epochs=2) | {"task": "reversal", "values": values}
    if axis == "vocab":
        settings |= {"task": "chain"}
        name = "chain-vocab"
    assert run_in(tmp_path, "ablate", axis, **settings) == 0
    runs = read(tmp_path, f"ablate-{name}")["runs"]
    for one, value, changes in zip(runs, values.split(), expected, strict=True):
        assert one["config"].items() >= changes.items()  # the settings that ran
        assert one["value"] == f"{axis.replace('_', '-')} {value}"
        assert len(one["curves"]["train_nll"]) == 2
    assert (tmp_path / f"ablate-{name}_cosine.png").exists() == (axis == "size")
    assert (tmp_path / f"ablate-{name}.npz").exists() == (axis == "size")


def test_a_value_of_a_sweep_is_the_run_of_its_own_flags(no_pictures, tmp_path):
    settings = without("layers", lr=0.02)
    assert run_in(tmp_path, "ablate", "layers", values=2, **settings) == 0
    assert run_in(tmp_path, "reversal", layers=2, **settings) == 0
    one, other = read(tmp_path, "ablate-layers")["runs"][0], read(tmp_path)
    for name in ("summary", "curves", "weights", "counts"):
        assert one[name] == other[name]


def test_all_axes_train_the_usual_model_once(no_pictures, tmp_path, capsys, monkeypatch):
    axes = {name: revcurse.AXES[name] for name in ("layers", "heads", "related-tokens")}
    monkeypatch.setattr(revcurse, "AXES", axes)
    assert run_in(tmp_path, "ablate", **without("layers", "heads", vocab=40, epochs=2)) == 0
    runs = read(tmp_path, "ablate")["runs"]
    labels = [f"{axis} {n}" for axis in ("layers", "heads") for n in (1, 2, 4, 8)]
    assert [one["value"] for one in runs] == labels
    by_label = {one["value"]: one for one in runs}
    assert by_label["layers 2"]["summary"] == by_label["heads 4"]["summary"]
    assert by_label["layers 2"]["summary"] != by_label["layers 1"]["summary"]
    assert capsys.readouterr().out.count("sentences, ") == 7  # trainings
    assert list(ablate(task="chain").trials)[-1] == "related-tokens 500"
    (figure,) = draw({"command": "ablate", "runs": runs, "matrices": {}}).values()
    assert [axes.get_title() for axes in figure.axes] == ["layers", "heads"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_settings():
    paper, laptop = Reversal.paper(layers=3), Reversal()
    sizes = (paper.layers, paper.heads, paper.dim, paper.epochs, paper.dropout)
    assert sizes == (3, 12, 768, 3000, 0.1)
    assert (laptop.layers, laptop.heads, laptop.dim, laptop.epochs) == (2, 4, 64, None)
    assert (laptop.vocab, laptop.batch_size, laptop.seeds) == (800, 64, 10)
    rates = [
        experiment.lr for experiment in (laptop, Chain(), revcurse.ICL(), paper, Chain.paper())
    ]
    assert rates == [0.003, 0.003, 0.003, 0.01, 0.01]
    assert (laptop.betas, laptop.weight_decay) == ((0.9, 0.999), 0.01)
    (from_line,) = revcurse.make_plans("reversal", {"preset": "paper", "layers": 3})
    assert from_line == paper
    sizes = set()
    for trial in ablate("size").trials.values():
        sizes.add((trial.layers, trial.dim, trial.heads, trial.vocab, trial.seeds, trial.lr))
    assert sizes == {
        (layers, dim, 4, 400, 3, 0.003) for layers, dim in ((1, 20), (1, 256), (12, 20))
    }
    for trial in ablate("related-tokens", preset="paper").trials.values():
        settings = (trial.command, trial.vocab, trial.seeds, trial.epochs, trial.held_out)
        assert settings == ("chain", 800, 10, 3000, None)
    for trial in ablate("entity-length", task="chain").trials.values():
        assert (trial.vocab, trial.epochs, trial.seeds) == (200, 300, 3)
    # 480 steps at least: V = 20 has 9 sentences, one step an epoch; V = 2000 has 850, fourteen
    for plain, epochs in (
        (Reversal(vocab=20), 480),
        (Reversal(vocab=2000), 80),
        (Chain(), 140),
        (Reversal(vocab=20, batch_size=4), 160),
    ):
        experiment, _, _ = prepare(plain)
        points = experiment.eval_epochs()
        assert experiment.epochs == epochs and 25 < len(points) <= 40
        assert points == sorted({0, epochs, *points})
    experiment = Reversal(epochs=39)
    experiment.measurements = 4  # at 0, 1/9, 4/9 and all of the training
    assert experiment.eval_epochs() == [0, 4, 17, 39]
    settings = {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.0, "dropout": 0.4}
    experiment, _, model = prepare(Reversal(**TINY | settings, position="none"))
    group = experiment.make_optimizer(list(model.parameters())).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.2, (0.5, 0.6), 0)
    assert "wpe" not in model.transformer and model.transformer.drop.p == 0.4
    theory, _, _ = prepare(OneLayerTheory(lr=0.1, batch_size=2))
    assert theory.make_optimizer([torch.zeros(1)]).param_groups[0]["lr"] == 0.2
    assert (theory.seeds, theory.vocab, theory.complete, theory.held_out) == (10, 100, 3, 3)
    trials = revcurse.bilinear(symmetric=True).trials
    dims = [(trial.dim, trial.symmetric) for trial in trials.values()]
    assert dims == [(2**n, symmetric) for n in range(4, 11) for symmetric in (False, True)]
    assert {trial.vocab for trial in trials.values()} == {100}


def test_settings_of_every_command():
    """The numbers of Tables 3 and 4, and our own, written down a second time."""

    def values(experiment, *names):
        return tuple(getattr(experiment, name) for name in names)

    sizes = ("layers", "heads", "dim", "dropout", "batch_size", "lr", "betas", "weight_decay")
    assert values(Reversal(), *sizes) == (2, 4, 64, 0.0, 64, 0.003, (0.9, 0.999), 0.01)
    assert values(Reversal.paper(), *sizes) == (24, 12, 768, 0.1, 64, 0.01, (0.9, 0.999), 0.01)
    data = ("seeds", "seed", "vocab", "entity_length", "complete", "held_out", "position", "loss")
    for experiment in (Reversal(), Reversal.paper(), Chain(), cure().trials["none"]):
        assert values(experiment, *data) == (10, 0, 800, 1, None, None, "absolute", "entity")
    icl = ("vocab", "complete", "held_out", "epochs")
    assert values(revcurse.ICL(), *icl) == (400, 7, 3, 40)
    assert values(revcurse.ICL.paper(), *icl) == (400, 7, 3, 3000)
    theory = ("vocab", "complete", "dim", "epochs", "lr", "batch_size", "measurements")
    assert values(BilinearTheory(), *theory) == (100, 0, 1024, 1300, 0.4, 10**6, 40)
    assert values(OneLayerTheory(), "epochs", "lr", "batch_size") == (400, 0.25, 1)
    trials = cure(preset="paper").trials
    assert values(trials["oracle"], *sizes[:4], "lr", "epochs") == (24, 12, 768, 0.1, 0.003, 3000)
    assert values(cure().trials["oracle"], *sizes[:4]) == (2, 4, 64, 0.0)
    small = ("vocab", "complete", "held_out", "epochs", "batch_size", "lr", "seeds")
    assert values(cure().trials["merged"], *small) == (80, 14, 6, 1000, 10**6, 3.0, 10)
    for label, trial in revcurse.weights().trials.items():
        assert values(trial, "seeds", "vocab", "complete") == (1, 96, 8)
        assert getattr(trial, "held_out", 16) == 16
        assert label != "bilinear" or trial.dim == 256
    axes = {axis: list(table) for axis, table in revcurse.AXES.items()}
    assert axes.pop("embeddings") == ["learned", "frozen", "tied"]
    assert axes == {
        "vocab": ["20", "50", "200", "2000"],
        "entity-length": ["2", "3"],
        "layers": ["1", "2", "4", "8"],
        "heads": ["1", "2", "4", "8"],
        "position": ["none", "absolute", "relative"],
        "size": ["1x20", "1x256", "12x20"],
        "related-tokens": ["10", "20", "50", "100", "200", "500"],
    }
    assert len(related_data().names) == 802 and len(related_data().test_sentences()) == 50
    assert len(icl_data().names) == 403 and len(chain_data().names) == 802


def test_starts_of_the_small_models():
    torch.manual_seed(0)
    for weight in revcurse.LearnedBilinear(300, 100, tied=False).parameters():
        assert abs(weight.std() / 0.02 - 1) < 0.05 and abs(weight.mean()) < 0.002
    for weight in revcurse.SumOfTokens(300, 100, True).parameters():
        assert abs(weight.std() / 0.002 - 1) < 0.05 and abs(weight.mean()) < 0.0002
    embeddings = Bilinear(100, 300).embeddings
    assert abs(embeddings.std() * 10 - 1) < 0.05


def test_a_default_without_dataclass_is_refused():
    class Quick(Reversal):
        epochs = 3

    with pytest.raises(revcurse.Problem, match="Quick.epochs"):
        run(Quick(seeds=1))


def test_all_and_its_claims(no_pictures, tmp_path, monkeypatch, capsys):
    plans = [("icl", {}), ("ablate", {"axis": "layers", "values": ["1"]})]
    plans.append(("cure", {"values": ["none", "tied GPT"]}))
    monkeypatch.setattr(revcurse, "ALL", plans)
    assert run_in(tmp_path, "all", **without("layers", vocab=40)) == 0
    results = read(tmp_path, "all")
    claims = [(claim["figure"], claim["expected"]) for claim in results["claims"]]
    assert claims == [
        ("icl", "No curse, in 1 trainings"),
        ("ablate-layers", "The curse, and no clear trace, in 1 trainings"),
        ("cure", "The curse, but a trace, in 1 trainings"),
        ("cure", "The curse, and no clear trace, in 1 trainings"),
    ]
    for claim in results["claims"]:  # in so few steps only the in-context task is learned
        assert claim["holds"] == (claim["figure"] == "icl") == ("not learned" not in claim["seen"])
    assert len(results["trainings"]) == 6 and "epochs 12" in results["trainings"][0]
    assert {"icl.json", "ablate-layers.json", "cure.json", "all.json"} <= set(names_in(tmp_path))
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


def test_claims_by_hand():
    def one(value, expected, outcome, *accuracies):
        summary = {"train_accuracy": [1.0, 1.0], "validation_accuracy": list(accuracies)}
        summary["matched_rank"] = [None, 0.25]
        summary = {name: {"per_seed": values} for name, values in summary.items()}
        return {"value": value, "expected": expected, "outcome": outcome, "summary": summary}

    runs = [one("a", "curse", "curse", 0.0, 0.1), one("b", "curse", "some", 0.5, 0.25)]
    runs += [
        one("c", None, "curse", 0, 0),
        {"value": "d", "expected": "no curse", "outcome": "diverged"},
    ]
    no_curse, curse = revcurse.claims_of("x", runs)
    assert no_curse["holds"] is False and no_curse["seen"] == "d: diverged"
    assert curse["expected"] == "The curse, and no clear trace, in 2 trainings"
    seen = "train accuracy 1.000 to 1.000; validation accuracy 0.000 to 0.500; "
    assert curse["seen"] == f"{seen}matched rank 0.250 to 0.250; b: some"
    (good,) = revcurse.claims_of("x", runs[:1])
    assert good["holds"] is True


# ------------------------------------------------------------------------------------------ Cures


def test_each_cure_and_only_the_oracle_is_told_what_is_asked():
    trials = cure(**TINY).trials
    assert len(trials) == 2 * 10 + 3 + 4
    for name, trial in trials.items():
        data = trial.make_data(1)
        trained = {tuple(row) for row in data.train_sentences().tolist()}
        asked = {tuple(row) for row in data.test_sentences().tolist()}
        assert asked & trained == (asked if "oracle" in name else set()), name
        assert (trained == {row[::-1] for row in trained}) == ("reverse training" in name)
        same = {row[0] for row in trained if row[0] == row[2]}
        entities = {row[0] for row in trained | asked} | {row[2] for row in trained | asked}
        bridged = "identity bridge" in name or "x = x" in name
        assert same == (entities if bridged else set())
        if "no complete" in name:
            assert not len(data.train["complete A -> B"]) and trial.variant == "no complete pairs"
        read_names = {row[0] for row in trained}
        unread = {row[0] for row in asked} - read_names
        bridged |= "oracle" in name or "reverse" in name or "elsewhere" in name
        assert unread == (set() if bridged else {row[0] for row in asked})
    elsewhere = trials["read elsewhere"].make_data(0)
    added = elsewhere.train["added"]
    others = torch.cat([elsewhere.train["held-out, trained"], elsewhere.test["held-out, asked"]])
    assert set(added[:, 0].tolist()) == set(others[:, [0, 2]].flatten().tolist())
    assert len(set(added[:, 2].tolist())) == len(added)  # a target of its own
    assert not set(added[:, 1:].flatten().tolist()) & set(others.flatten().tolist())
    assert (trials["oracle"].lr, trials["oracle"].weight_decay) == (0.003, 0.1)
    paper = trials["oracle, as in the paper"]
    assert (paper.lr, paper.weight_decay, paper.variant) == (0.01, 0.01, "paper")


def test_cures_are_measured(no_pictures, tmp_path):
    names = ["none", "either blank", "rule penalty", "untied bilinear", "tied bilinear", "tied GPT"]
    names += ["identity bridge"]
    assert run_in(tmp_path, "cure", "--values", *names, **TINY) == 0
    runs = read(tmp_path, "cure")["runs"]
    kinds = [(one["cure"], one["setting"]) for one in runs]
    expected = []
    for name in names:
        expected += [(name, "common"), (name, "paper")]
        if name in ("tied bilinear", "identity bridge"):
            expected.append((name, "no complete pairs"))
    assert kinds == expected
    keys = {"validation_accuracy", "validation_nll", "train_accuracy", "seen_accuracy", "seen_nll"}
    for one in runs:
        assert {"sentences", "steps", "parameters", "seconds"} == set(one["cost"])
        assert keys | {"matched_rank", "asked_cosine"} <= set(one["summary"])
        assert ("asymmetry" in one["summary"]) == ("bilinear" in one["cure"])
        assert one["expected"] is None or one["setting"] != "paper"
    assert (runs[0]["cost"]["sentences"], runs[0]["cost"]["steps"]) == (10, 36)
    assert runs[0]["expected"] == "curse" and runs[8]["cure"] == "tied bilinear"
    with np.load(tmp_path / "cure.npz") as arrays:
        assert arrays["tied GPT: held-out, asked"].shape == (2, 2)


def test_losses_of_cures_by_hand():
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    sentences = torch.tensor([[2, 0, 8], [9, 1, 3]])
    log_p = table.log_softmax(-1)
    expected = -(log_p[0, 8] + log_p[1, 3]) / 2  # after the arrows
    found = revcurse.EitherBlank().batch_loss(table_model(table), sentences)
    assert found.item() == pytest.approx((expected - (log_p[0, 2] + log_p[1, 9]) / 2).item())
    model = revcurse.EitherBlank(**TINY).make_model(reversal_data(24))
    assert not any(block.attn.causal for block in model.transformer.h)

    def model(tokens, last=1):  # the logit of y after "x arrow" is 10 x + y + 100 arrow
        return (10.0 * tokens[:, -2] + 100 * tokens[:, -1])[:, None, None] + torch.arange(26)

    squares = []
    for x in (2, 8, 9, 3):
        for y in (2, 8, 9, 3):
            squares.append((10 * x + y - (10 * y + x + 100)) ** 2)
    answers = torch.arange(26.0).log_softmax(0)
    found = revcurse.RulePenalty().batch_loss(model, sentences).item()
    loss = np.mean(squares) - (answers[8] + answers[3]).item() / 2
    assert found == pytest.approx(loss, rel=1e-5)


def test_bilinear_cures_differ_in_one_matrix_alone():
    for tied in (True, False):
        model = revcurse.LearnedBilinear(9, 4, tied)
        assert (model.U is model.E) == tied
        logits = model(torch.tensor([[3, 1], [2, 0]]))
        assert logits.shape == (2, 1, 9)
        expected = (model.E[3] @ model.M + model.E[1]) @ model.U.T
        torch.testing.assert_close(logits[0, 0], expected)
    experiment, models, datasets = start(revcurse.TiedBilinear(**TINY), (0,))
    with torch.no_grad():
        models[0].M.copy_(torch.eye(16))
        models[0].M[0, 1] = 1.0
    history = {0: experiment.evaluate(models[0], datasets[0])}
    numbers = experiment.measure(models[0], datasets[0], None, history)
    assert numbers["asymmetry"] == pytest.approx(math.sqrt(2) / math.sqrt(4 * 16 + 2))


def test_cures_of_the_theory():
    names = ["merged", "merged, x = x", "factorised", "factorised, x = x"]
    results = run(cure(names, quiet=True, seeds=3))
    for one in results["runs"]:
        summary = one["summary"]
        assert one["setting"] == "theory" and summary["train_accuracy"]["mean"] == 1
        assert summary["validation_accuracy"]["mean"] == (one["cure"] == "factorised, x = x")
        assert one["outcome"] == one["expected"]
    model = revcurse.SumOfTokens(5, 3, True)
    logits = model(torch.tensor([[1, 4]]))[0, 0]
    torch.testing.assert_close(logits, (model.E[1] + model.E[4]) @ model.U.T)
    merged = revcurse.SumOfTokens(5, 5, False)
    torch.testing.assert_close(merged(torch.tensor([[1, 4]]))[0, 0], merged.E[1] + merged.E[4])


# -------------------------------------------------------------------------------------- Bad input
BAD = {  # command line: what the one line on stderr must hold
    "reversal --dim 30": "dim 30",
    "reversal --dim 20 --position relative": "multiple of 8",
    "reversal --dim 0": "--dim 0",
    "reversal --heads x": "--heads",
    "reversal --vocab 3": "vocab 3",
    "reversal --complete 180": "180",
    "reversal --epochs 0": "--epochs 0",
    "reversal --seed -1": "--seed -1",
    "reversal --seed 18446744073709551615": "--seed 18446744073709551615",
    "reversal --lr nan": "--lr nan",
    "reversal --lr inf": "--lr inf",
    "reversal --lr 0": "--lr 0",
    "bilinear --lr 0": "--lr 0",
    "reversal --weight-decay -0.1": "--weight-decay -0.1",
    "reversal --betas 1 0.9": "--betas",
    "reversal --dropout 1.5": "--dropout 1.5",
    "reversal --dropout 1": "--dropout 1.0",
    "reversal --freeze-embeddings --tie-embeddings": "tied",
    "reversal --device tpu": "--device",
    "reversal --position sideways": "relative",
    "reversal --resume": "--resume",
    "reversal --loss none": "sequence",
    "reversal --seeds-at-once 0": "--seeds-at-once 0",
    "reversal --device cuda": "cuda",
    "": "COMMAND",
    "reversal --epoch 3": "--epoch",
    "ablate dropout": "--values",
    "ablate layer": "entity-length, layers, heads",
    "ablate --values 1 2": "entity-length, layers",
    "ablate vocab --values 24 x": "--values x",
    "ablate lr --values 0.001,0.01": "blanks",
    "ablate vocab --values 24 3": "vocab 3",
    "ablate size --values 1x20 3": "1x256",
    "ablate embeddings --values green": "learned, frozen, tied",
    "ablate layers --animate --values 1": "--animate",
    "ablate layers --layers 6": "--layers",
    "ablate --layers 6": "--layers",
    "ablate size --heads 2": "--heads",
    "ablate size --cosine": "--cosine",
    "ablate embeddings --tie-embeddings --values learned frozen": "--tie-embeddings",
    "ablate layers --related-tokens": "--related-tokens",
    "ablate preset --values paper": "preset",
    "ablate related-tokens --task reversal": "related-tokens",
    "all --frobnicate": "--frobnicate",
    "all --dim 30": "--dim",
    "all --batch-size 0": "--batch-size 0",
    "cure --values snake-oil": "snake-oil",
    "cure --entity-length 2": "--entity-length",
    "icl --animate": "--animate",
    "icl --vocab 12": "vocab 12",
    "icl --complete 0": "0 + 3",
    "chain --related-tokens --entity-length 2": "entity_length 1",
    "chain --related-tokens --vocab 100": "vocab 100",
    "bilinear --dims 16 0": "0: must be",
    "onelayer --held-out 0": "--held-out 0",
    "plot": "files",
    "plot none.json": "none.json",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(tmp_path, capsys, line):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this device is here")
    (tmp_path / "reversal.json").write_text("earlier")
    where = [] if line.startswith("plot") or not line else ["--out", str(tmp_path)]
    assert main([*line.split(), *where]) == 2
    one_line(capsys, BAD[line])
    assert names_in(tmp_path) == ["reversal.json"]
    assert (tmp_path / "reversal.json").read_text() == "earlier"


def test_bad_settings_in_a_notebook():
    for experiment, words in (
        (Reversal(position="up"), "must be one of"),
        (Reversal(seeds=1.5), "whole number"),
        (Cure(entity_length=2), "one token"),
        (Chain(facts=CAPITALS), "triples"),
    ):
        with pytest.raises(revcurse.Problem, match=words):
            run(experiment)


# ------------------------------------------------------------------------------------- Own facts
CAPITALS = [
    ("Paris", "France"),
    ("Rome", "$\\foo$"),
    ("Oslo", "Norway"),
    ("Cairo", "Egypt"),
    ("Georgetown", "Guyana"),
    ("Lima", "Peru"),
]
LINES = "\n".join("\t".join(pair) for pair in CAPITALS)


def test_facts_as_real_lists_have_them(no_pictures, tmp_path, capsys):
    file = tmp_path / "facts.tsv"
    text = "\ufeff" + LINES.replace("\n", "\r\n") + "\t\t\r\r\n \t\r\nDjibouti\tDjibouti"
    file.write_bytes((text + "\nGeorgetown\tCayman Islands\nLyon\tFrance\n").encode())
    assert run_in(tmp_path, "reversal", facts=file, **without("vocab")) == 0
    assert "3 pairs left out, with a name seen before: Djibouti - Dj" in capsys.readouterr().out
    results = read(tmp_path)
    assert results["config"]["vocab"] == 24 and results["counts"] == {"train": 10, "validation": 2}
    named = {tuple(sorted(pair)) for pairs in results["names"].values() for pair in pairs}
    assert named == {tuple(sorted(pair)) for pair in CAPITALS}


def test_facts_from_anywhere_get_the_same_cleaning(tmp_path, monkeypatch):
    composed, loose = "S\u00e3o Tom\u00e9", unicodedata.normalize("NFD", "S\u00e3o Tom\u00e9")
    assert composed != loose
    pairs = [*CAPITALS, (composed, "Africa"), (f" {loose}\u00a0", "Atlantic"), ("New  York", "US")]
    expected = (*CAPITALS, (composed, "Africa"), ("New York", "US"))
    assert Reversal(facts=pairs).facts == expected
    file = tmp_path / "facts"
    lines = [f"{a}\t{b}" for a, b in pairs]
    lines[3] = "\ufeff" + lines[3]  # two files joined to one
    file.write_text("\n".join(lines), encoding="utf-8")
    assert Reversal(facts=file).facts == expected and Reversal(facts=str(file)).facts == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Reversal(facts="~/facts").facts == expected
    for wrong in ([1, 2, 3, 4], ["ab", "cd", "ef", "gh"], [("a", 1)] * 4, 5):
        with pytest.raises(revcurse.Problem, match="file or pairs of names"):
            Reversal(facts=wrong)


def test_many_long_names_have_small_labels_and_a_mark_where_they_are_cut():
    facts = [(f"The city with the number {i}", f"Land {i}") for i in range(40)]
    results = run(Reversal(facts=facts, **without("vocab")))
    axes = draw(results)["_weights.png"].axes[0]
    labels, (low, high) = axes.get_yticklabels(), axes.images[0].get_clim()
    shown = [f"{pair[0][:16]}..." for pair in results["names"]["complete A -> B"]]
    assert [label.get_text() for label in labels] == shown
    assert low == -high and len(labels) == 28 and labels[0].get_fontsize() * 28 < 140


BAD_FACTS = {
    "": "4 are needed",
    "a\tb\nc\td\ne\tf\n": "3 pairs",
    LINES + "\nc d\n": "(7)",
    LINES + "\nc\td\te\n\nf\n\tg\nh\ni\nj\nk\n": "7 lines (7, 9, 10, 11, 12)",
}


def test_bad_facts_and_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("facts").write_text(LINES)
    Path("latin").write_bytes(b"a\tb\nc\t\xff\n")
    lines = {
        "--complete 6": "6 complete",
        "--vocab 400": "--vocab 400",
        "--facts latin": "UTF-8",
        "--entity-length 2": "of one token",
        "--facts .": "--facts .",
        "--facts no": "No such",
        "--facts facts --out facts": "--out facts",
        "--out facts/below": "--out facts/below",
    }
    for i, (content, words) in enumerate(BAD_FACTS.items()):
        Path(str(i)).write_text(content)
        lines[f"--facts {i}"] = words
    for line, words in lines.items():
        facts = [] if "--facts" in line else ["--facts", "facts"]
        assert main(["reversal", "--out", "out", *facts, *line.split()]) == 2
        one_line(capsys, words)
    assert not Path("out").exists() and Path("facts").read_text() == LINES


@posix
def test_facts_from_a_pipe_are_read_once(tmp_path):
    line = [sys.executable, "revcurse.py", "ablate", "layers", "--values", "1", "2"]
    line += [*flags(**without("vocab", "layers", epochs=2)), "--out", str(tmp_path)]
    done = subprocess.run(
        ["bash", "-c", '"$@" --facts <(printf "%s" "$LINES")', "bash", *line],
        cwd=HERE,
        env=os.environ | {"LINES": LINES},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert [run["config"]["vocab"] for run in read(tmp_path, "ablate-layers")["runs"]] == [24, 24]


def test_a_sweep_over_files_of_facts(no_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("big towns.tsv").write_text(LINES)
    Path("rivers.tsv").write_text("\n".join(f"r{i}\ts{i}" for i in range(8)))
    line = ["ablate", "facts", "--values", "big towns.tsv", "rivers.tsv"]
    assert run_in(".", *line, **without("vocab", epochs=2)) == 0
    runs = read(Path("."), "ablate-facts")["runs"]
    found = [(one["value"], one["config"]["vocab"]) for one in runs]
    assert found == [("facts big towns.tsv", 24), ("facts rivers.tsv", 32)]


# ----------------------------------------------------------------------------------- Real use


def test_out_may_be_in_the_home_folder(no_pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_in("~/x", "icl", **without("layers", vocab=40, epochs=1)) == 0
    assert "icl.json" in names_in(tmp_path / "home" / "x") and not Path("~").exists()


def test_what_stops_a_run_leaves_earlier_results(no_pictures, tmp_path, capsys, monkeypatch):
    assert run_in(tmp_path, "reversal", **TINY) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_in(tmp_path, "reversal", **TINY | {"lr": 1e8, "seed": 5}) == 1
    one_line(capsys, "NaN at epoch", "--lr")
    monkeypatch.setattr(revcurse, "train", lambda *args: torch.empty(10**15))
    assert run_in(tmp_path, "reversal", **TINY) == 1
    one_line(capsys, "memory", "--batch-size")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_value_that_diverges_does_not_lose_the_sweep(tmp_path, capsys):
    line = ["ablate", "lr", "--values", "0.003", "1e8", "0.01"]
    assert run_in(tmp_path, *line, **TINY) == 1
    output = capsys.readouterr()
    assert "diverged: lr 1e8" in output.out and output.err.count("\n") == 1
    assert "lr 1e8" in output.err
    text = (tmp_path / "ablate-lr.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)  # of NaN and Infinity
    outcomes = [one["outcome"] == "diverged" for one in json.loads(text)["runs"]]
    assert outcomes == [False, True, False]
    (legend,) = [axes.get_legend() for axes in draw(revived(tmp_path, "ablate-lr"))[".png"].axes]
    assert "1e8: diverged" in [label.get_text() for label in legend.get_texts()]
    line = ["cure", "--values", "none", "oracle"]
    assert run_in(tmp_path, *line, **TINY, lr=1e8) == 1
    assert (tmp_path / "cure.png").exists()


def revived(folder, name):
    """Saved results, as `plot` reads them."""
    return read(folder, name) | {"matrices": {}}


def test_files_appear_whole_or_not_at_all(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    revcurse.write(tmp_path / "one", lambda path: path.write_text("old"))
    with pytest.raises(OSError):
        revcurse.write(tmp_path / "one", fail)
    assert (tmp_path / "one").read_text() == "old" and names_in(tmp_path) == ["one"]


@posix
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    dead, alive = f".{killed.pid}.tmp.one", f".{os.getppid()}.tmp.one"
    other = f".{killed.pid}.tmp.other"
    for name in (dead, alive, other, ".notes.tmp.one"):
        (tmp_path / name).write_text("x")
    revcurse.write(tmp_path / "one", lambda path: path.write_text("new"))
    assert names_in(tmp_path) == sorted([alive, other, ".notes.tmp.one", "one"])
    (tmp_path / f".{killed.pid}.tmp..x.y, from seed 0.pt").write_text("x")  # of a checkpoint
    revcurse.Keeper(tmp_path / ".x").next_training(Reversal(), "y", [0])
    assert names_in(tmp_path) == sorted([alive, other, ".notes.tmp.one", "one"])


def test_pictures_fail_alone_and_are_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("reversal.png").mkdir()  # in the way
    line = "reversal", "--animate", "--cosine"
    assert run_in(".", *line, **TINY | {"epochs": 2}) == 1
    one_line(capsys, "numbers are safe", "plot")
    Path("reversal.png").rmdir()
    assert run_in(".", *line, **TINY | {"epochs": 2}) == 0
    pictures = {}
    for path in Path().iterdir():
        if path.suffix in (".png", ".gif"):
            pictures[path.name] = path.read_bytes()
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
    text, numbers = good.read_text(), arrays.read_bytes()
    picture = Path("reversal.png").read_bytes()

    def damage(json_text=text, npz=numbers):
        good.write_text(json_text)
        arrays.write_bytes(npz)

    evil = {"complete A -> B": np.array([Evil()])}
    for how in (
        lambda: damage(text[:200]),
        lambda: damage("[1]"),
        lambda: damage("{}"),
        lambda: damage(npz=numbers[:-40]),
        lambda: damage() or np.savez(arrays, **evil),
        lambda: damage() or arrays.unlink(),
    ):
        how()
        assert main(["plot", "reversal.json"]) == 2
        one_line(capsys, "not a results file")
        assert Path("reversal.png").read_bytes() == picture and not Path("marker").exists()


# -------------------------------------------------------------------------------------- Notebooks


def test_in_a_notebook(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(revcurse.Keeper, "next_training", hurried(revcurse.Keeper.next_training))
    results = run(Reversal(**TINY | {"quiet": False}))
    assert "epoch 1 of 12" in capsys.readouterr().out and names_in(tmp_path) == []
    assert run_in(tmp_path, "reversal", **TINY) == 0
    for name in ("summary", "curves", "weights", "counts", "chance"):
        assert read(tmp_path)[name] == json.loads(json.dumps(results[name]))
    data = reversal_data(24, seed=1)  # the trained models come back
    found = evaluate(results["models"][1], data.train_sentences(), 1)
    expected = results["summary"]["train_nll"]["per_seed"][1]
    assert found.nll.mean().item() == pytest.approx(expected, rel=1e-5)
    figures = draw(results)
    assert figures._repr_html_().count("<img") == 2
    assert figures._repr_png_().startswith(b"\x89PNG")
    theory = revcurse.onelayer(vocab=24, seeds=2, epochs=5, quiet=True)
    for sweep in (ablate("heads", values=[1, 2], **without("heads")), theory):
        assert draw(run(sweep))._repr_html_()


def hurried(next_training):
    """Keeper.next_training, after which a progress line is due at once."""

    def prepare_now(self, *args):
        next_training(self, *args)
        self.next_line = 0

    return prepare_now


def test_subclasses_change_one_method():
    class Slow(Reversal):
        def make_optimizer(self, weights):
            return torch.optim.SGD(weights, self.lr, momentum=0.9)

        def draw(self, results):
            return results["value"]

    @dataclass
    class Short(Slow):
        epochs: int = setting(3, "passes")

    settings = without("epochs", lr=0.1)
    results = run(Short(**settings))
    assert results["curves"]["epoch"] == [0, 1, 2, 3] and draw(results) == "reversal"
    expected = run(Slow(**settings, epochs=3))
    assert (
        results["summary"] == expected["summary"] != run(Reversal(**settings, epochs=3))["summary"]
    )


def test_data_and_models_of_ones_own(capsys):
    class Groups(Reversal):
        def make_data(self, seed):
            data = super().make_data(seed)
            asked = data.test.pop("held-out, asked")
            data.test |= {"first": asked[:1], "second": asked[1:]}
            return data

    results = run(Groups(**TINY))
    assert len(draw(results)["_weights.png"].axes) == 5 + 2  # five maps, their scale, curves

    class Odd(nn.Module):  # its first parameter is no embedding
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.logits = nn.Parameter(torch.zeros(26))

        def forward(self, tokens, last=1):
            if self.scale > 100:  # vmap cannot decide for many models at once
                return tokens
            return (self.scale * self.logits).expand(*tokens[:, -last:].shape, 26)

    class Own(Reversal):
        def make_model(self, data):
            return Odd()

    with pytest.raises(revcurse.Problem, match="--seeds-at-once 1 trains it"):
        run(Own(**TINY))
    results = run(Own(**TINY, seeds_at_once=1))
    assert "asked_cosine" not in results["summary"] and "never an input" not in results["verdict"]

    class Buffers(Reversal):
        def make_model(self, data):
            model = super().make_model(data)
            model.register_buffer("mask", torch.zeros(3))
            return model

    with pytest.raises(revcurse.Problem, match="buffers"):
        run(Buffers(**TINY))


UGLY = {
    "figure.autolayout": True,
    "axes.grid": True,
    "image.origin": "lower",
    "font.size": 20,
    "axes.facecolor": "black",
    "savefig.facecolor": "black",
    "text.color": "white",
}


def test_the_users_matplotlib_style_changes_nothing_but_the_font(tmp_path):
    results = run(Reversal(**TINY))
    sweep = run(ablate("heads", values=[1, 2], **without("heads")))
    draw(results).save(tmp_path / "plain")
    draw(sweep).save(tmp_path / "sweep")
    with revcurse.matplotlib.rc_context(UGLY):
        figures = draw(results)
        figures.save(tmp_path / "ugly")
        draw(sweep).save(tmp_path / "ugly_sweep")
    for one, other in (
        ("plain", "ugly"),
        ("plain_weights", "ugly_weights"),
        ("sweep", "ugly_sweep"),
    ):
        assert (tmp_path / f"{one}.png").read_bytes() == (tmp_path / f"{other}.png").read_bytes()
    with revcurse.matplotlib.rc_context({"font.family": "monospace"}):
        draw(results).save(tmp_path / "mono")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "mono.png").read_bytes()


def test_a_font_without_the_letters_is_one_hint(tmp_path, capsys):
    facts = [(f"\u6771{i}", f"\u4eac{i}") for i in range(6)]
    with revcurse.matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        draw(run(Reversal(facts=facts, **without("vocab")))).save(tmp_path / "x")
    assert capsys.readouterr().out.count("font.family") == 1


# ------------------------------------------------------------------------- Checkpoints, processes
SLOW = """
import signal, sys, time, revcurse; signal.signal(signal.SIGINT, signal.default_int_handler)
adam = revcurse.torch.optim.AdamW
class Slow(adam):
    def step(self):
        time.sleep(0.02)
        super().step()
revcurse.torch.optim.AdamW = Slow
revcurse.time.monotonic = lambda clock=time.monotonic: 10000 * clock()
write = revcurse.write
def slow_write(path, how):
    if path.suffix == ".pt" and revcurse.os.environ.get("NO_PT"):
        raise OSError("disk full")
    write(path, how)
revcurse.write = slow_write
keeper = revcurse.Keeper.after_epoch
def eager(self, *args):
    self.next_save = 0
    keeper(self, *args)
revcurse.Keeper.after_epoch = eager
sys.exit(revcurse.main(sys.argv[1:]))
"""  # steps take longer, and checkpoints come after each epoch


def start_slow(folder, *argv, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *argv, "--out", str(folder)],
        cwd=HERE,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def killed(folder, *argv, when, how=signal.SIGKILL):
    """Run a command line in a process of its own, and kill it `when` there is something."""
    running = start_slow(folder, *argv)
    while not (folder.exists() and when()):
        time.sleep(0.02)
        assert running.poll() is None, running.communicate()
    running.send_signal(how)
    return running, running.communicate(timeout=60)[1]


@posix
def test_killed_and_given_again_is_the_same_as_uninterrupted(no_pictures, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = ["reversal", "--animate", *flags(**TINY | {"dropout": 0.1, "seeds_at_once": 1})]
    assert run_in(whole, *line) == 0
    second = broken / ".reversal.reversal, from seed 1.pt"
    running, _ = killed(broken, *line, when=second.exists)
    assert running.returncode == -9
    stamp = second.stat().st_mtime_ns
    running, error = killed(
        broken, *line, how=signal.SIGINT, when=lambda: second.stat().st_mtime_ns > stamp
    )
    assert running.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    before = second.read_bytes()
    capsys.readouterr()
    assert run_in(broken, *line, "--lr", "0.02") == 2  # other flags
    one_line(capsys, "delete", ".reversal.reversal, from seed 0.pt", "lr 0.003, now 0.02")
    assert run_in(broken, *line[:-2], "--seeds-at-once", "2") == 2  # another division
    one_line(capsys, "seeds [0], now [0, 1]")
    assert second.read_bytes() == before
    mine = broken / ".reversal.reversal, from seed 7.pt"
    mine.write_bytes(before)  # of an unfinished run of other seeds
    assert run_in(broken, *line, "--seed", "3") == 0
    assert mine.exists() and second.exists()
    assert run_in(broken, *line) == 0
    printed = capsys.readouterr().out
    assert "seed 0: going on after epoch 12" in printed and "seed 1: going on after" in printed
    assert read(broken)["summary"] == read(whole)["summary"]
    assert set(names_in(broken)) - {mine.name} == set(names_in(whole))
    with np.load(whole / "reversal.npz") as one, np.load(broken / "reversal.npz") as other:
        assert "frames held-out, asked" in one
        assert all((one[name] == other[name]).all() for name in one)


@posix
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path):
    line = ["reversal", *flags(**TINY)]
    running = start_slow(tmp_path, *line, NO_PT="1")
    printed, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (0, "")
    assert printed.count("no checkpoint can be written (disk full)") == 1
    assert "reversal.json" in names_in(tmp_path)
    script = 'ulimit -f 60; "$@"'  # 60 KB: neither checkpoint nor picture can be written
    words = [sys.executable, "-c", SLOW, *line, "--out", str(tmp_path / "small")]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("no checkpoint can be written") == 1
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr
    assert not [name for name in names_in(tmp_path / "small") if "tmp" in name or ".pt" in name]


def test_damaged_foreign_and_evil_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(".reversal.reversal, from seed 0.pt")
    for damage in (
        lambda: checkpoint.write_bytes(b"x"),
        lambda: torch.save([Evil()], checkpoint),
        lambda: torch.save({"settings": {}, "epoch": 3}, checkpoint),
    ):
        damage()
        assert run_in(".", "reversal", **TINY) == 2
        one_line(capsys, checkpoint, "delete", "damaged")
        assert names_in(tmp_path) == [checkpoint.name]


def test_no_checkpoint_in_the_first_half_minute_and_later_a_twentieth(tmp_path, monkeypatch):
    clock, saves, lines = [1000.0], [], []
    monkeypatch.setattr(revcurse.time, "monotonic", lambda: clock[0])

    def slow(path, how):
        saves.append(clock[0])
        clock[0] += 2  # a save takes two seconds

    monkeypatch.setattr(revcurse, "write", slow)
    monkeypatch.setattr(revcurse, "say", lambda text: lines.append((clock[0], text)))
    keeper = revcurse.Keeper(tmp_path / ".x")
    experiment, models, datasets = tiny(0, quiet=False)
    keeper.next_training(experiment, "x", [0])
    ensemble = revcurse.Ensemble(models)
    optimizer = experiment.make_optimizer(list(ensemble.weights.values()))
    keeper.begin(ensemble, optimizer, [], {}, {})
    history = {0: [experiment.evaluate(models[0], datasets[0])]}
    for _ in range(120):
        clock[0] += 1
        keeper.after_epoch(1, history, {})
    assert saves == [1030, 1072, 1114]
    assert [when for when, _ in lines[:3]] == [1005, 1010, 1015]
    loss = history[0][0]["trained"].nll.mean().item()
    assert lines[0][1] == f"x, from seed 0: epoch 1 of 4, NLL of what is trained {loss:.3f}, 5 s"


@posix
def test_groups_of_seeds_and_two_processes_give_the_numbers_of_one(no_pictures, tmp_path):
    settings = TINY | {"seeds": 3}
    assert run_in(tmp_path / "one", "reversal", **settings) == 0
    assert run_in(tmp_path / "groups", "reversal", **settings, seeds_at_once=2) == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += [str(HERE / "revcurse.py"), "reversal"]
    done = subprocess.run(
        [*line, *flags(**settings), "--out", str(tmp_path / "two")],
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for the other processes") == 1
    one = read(tmp_path / "one")
    for other in ("groups", "two"):
        for name, number in read(tmp_path / other)["summary"].items():
            assert number["per_seed"] == pytest.approx(one["summary"][name]["per_seed"], rel=1e-3)


def test_a_process_without_a_seed_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(revcurse, "place", lambda: (1, 2))
    assert run_in(tmp_path, "reversal", **TINY | {"seeds": 1}) == 2
    one_line(capsys, "process 1 of 2: has no seed")


def test_a_process_without_a_gpu_says_so(monkeypatch, capsys, tmp_path):
    def no_gpu(number):
        raise RuntimeError(f"CUDA error: invalid device ordinal {number}\nmore")

    monkeypatch.setattr(torch.cuda, "set_device", no_gpu)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert run_in(tmp_path, "reversal", **TINY, device="cuda") == 2
    one_line(capsys, "process 3", "invalid device ordinal 3")


def command(folder, *argv, shell=None, **environment):
    """Run a command line as a user does: (status, output, errors)."""
    line = [sys.executable, "revcurse.py", *argv, "--out", str(folder)]
    if shell is not None:
        line = ["bash", "-c", shell, "bash", *line]
    done = subprocess.run(
        line, cwd=HERE, env=os.environ | environment, capture_output=True, timeout=90
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


def test_a_strange_environment(tmp_path):
    facts = tmp_path / "facts.tsv"
    facts.write_text("\u0160\u00e1rka\t\u017b\u00f3\u0142w\n" + LINES, encoding="utf-8")
    status, printed, error = command(
        tmp_path / "\u017b",
        "reversal",
        *flags(facts=facts, **without("vocab")),
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONIOENCODING="cp1252",
        PYTHONWARNINGS="error",
        HOME="/nowhere",
        MPLCONFIGDIR="/nowhere",
    )
    assert (status, error) == (0, "") and "right is" in printed
    assert len(names_in(tmp_path / "\u017b")) == 4


@posix
@pytest.mark.parametrize("shell", ['"$@" >&-', '"$@" | head -1; exit ${PIPESTATUS[0]}'])
def test_output_that_is_closed(tmp_path, shell):
    status, _, error = command(tmp_path, "reversal", *flags(**TINY), shell=shell)
    assert (status, error) == (0, "") and len(names_in(tmp_path)) == 4


def test_output_that_is_replaced_and_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    thread = threading.Thread(target=run_in, args=(tmp_path, "reversal"), kwargs=TINY)
    thread.start()
    thread.join()
    assert "10 sentences" in sys.stdout.getvalue() and len(names_in(tmp_path)) == 4


@pytest.mark.parametrize("left", ["RANK", "WORLD_SIZE"])
def test_what_torchrun_left_in_the_shell(no_pictures, tmp_path, capsys, monkeypatch, left):
    monkeypatch.setenv(left, "1")
    assert run_in(tmp_path, "reversal", **TINY) == 2
    one_line(capsys, "RANK")
    assert names_in(tmp_path) == []


def test_help_is_complete(capsys):
    for name in (None, *revcurse.COMMANDS, "plot"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        assert stopped.value.code == 0 and "None" not in text
        assert max(map(len, text.splitlines())) <= 100
        if name in ("reversal", "cure"):
            assert "[64] [paper: 768]" in " ".join(text.split())
    done = subprocess.run(
        [sys.executable, "-OO", "revcurse.py", "--help"], cwd=HERE, capture_output=True, text=True
    )
    assert "None" not in done.stdout and "Figures 1 and 2" in done.stdout


def test_import_changes_nothing():
    script = """import os, sys, torch
os.environ["MPLBACKEND"] = "agg"
def state(): return dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()
before = state(); import revcurse; assert before == state()
assert revcurse.matplotlib.rcParams["backend"] == "agg", "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)


def test_the_versions_that_are_declared_are_the_same_everywhere():
    declared = []
    for name in ("revcurse.py", "test_revcurse.py"):
        text = (HERE / name).read_text()
        declared.append(re.search(r'dependencies = \[(.*?)(, "pytest.*)?\]', text).group(1))
    assert declared[0] == declared[1]


def rows_of_table(text, first):
    """The cells of each row of the table whose header begins with `first`."""
    lines = text.split("\n")
    heads = (f"|{first}|", f"| {first} |")
    (start,) = [i for i, line in enumerate(lines) if line.startswith(heads)]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def as_range(values, digits):
    """As the README writes the range of some numbers."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def test_the_numbers_of_the_readme_are_those_of_the_results():
    text, folder = (HERE / "README.md").read_text(), HERE / "figures"
    flat = " ".join(text.split())  # without line breaks
    runs = {one["value"]: one["summary"] for one in read(folder, "cure")["runs"]}

    def accuracy(label):
        number = runs[label]["validation_accuracy"]
        return f"{number['mean']:.2f} ({number['std']:.2f})"

    table = rows_of_table(text, "cure")
    assert len(table) == 10
    for name, _, common, rank, paper in table:
        assert (common, paper) == (accuracy(name), accuracy(f"{name}, as in the paper"))
        assert rank == f"{runs[name]['matched_rank']['mean']:.2f}"
    for name in ("reverse training", "identity bridge", "tied bilinear"):
        summary = runs[f"{name}, no complete pairs"]
        accuracy_alone = summary["validation_accuracy"]["mean"]
        rank = summary["matched_rank"]["mean"]
        words = f"{accuracy_alone:.2f} ({name}, matched rank {rank:.2f})"
        assert words in flat

    table = rows_of_table(text, "axis")
    assert len(table) == 7
    for axis, _, trained, *cells in table:
        losses = []
        for task, place in (("ablate", 0), ("ablate-chain", 1)):
            summaries = []
            for one in read(folder, task)["runs"]:
                if one["value"].startswith(f"{axis.strip('`')} "):
                    summaries.append(one["summary"])
            losses += [summary["train_nll"]["mean"] for summary in summaries]
            keys = ("validation_nll", 1), ("validation_accuracy", 3), ("matched_rank", 2)
            for cell, (key, digits) in zip(cells, keys, strict=True):
                values = [summary[key]["mean"] for summary in summaries]
                values = [value for value in values if value is not None]
                assert cell.split(", ")[place] == as_range(values, digits), (axis, key)
        assert trained == as_range(losses, 3)

    summary = read(folder)["summary"]
    ranks = summary["matched_rank"]
    low, high = min(ranks["per_seed"]), max(ranks["per_seed"])
    assert f"{ranks['mean']:.3f} ({low:.3f} to {high:.3f} over the seeds)" in flat
    assert f"is at least {min(summary['asked_cosine']['per_seed']):.7f}" in flat
    free = [one for one in read(folder, "bilinear")["runs"] if not one["symmetric"]]
    assert f"epsilon {free[0]['epsilon']:.2f} for d = 16" in flat
    assert f"from {free[-1]['epsilon']:.4f} for d = 1024" in flat
    bound = min(min(one["theorem_2"]["0.01"]) for one in free if one["dim"] >= 64)
    assert f"at least {bound:.2f} for d from 64 on" in flat
    gallery = rows_of_table((folder / "README.md").read_text(), "results")
    claims = read(folder, "all")["claims"]
    for row, claim in zip(gallery, claims, strict=True):
        assert row[:3] == [claim["figure"], claim["expected"], claim["seen"]]
        assert row[3] == ("yes" if claim["holds"] else "**no**")


def test_recipes_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = list(revcurse.CURES)
    recipes = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(recipes) >= 5
    for recipe in recipes:
        exec(compile(recipe, "README.md", "exec"), {"__name__": "notebook"})
    monkeypatch.setattr(revcurse, "CURES", known)


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
