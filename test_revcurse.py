# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13.0", "numpy>=2.4.6", "matplotlib>=3.11.2", "pytest>=9.0.3"]
# ///
"""Tests of revcurse.py: `python test_revcurse.py`, or pytest. A minute and a half on two cores."""

import copy
import io
import json
import math
import os
import re
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
from revcurse import GPT, ICL, Bilinear, BilinearTheory, Chain, Cure, OneLayer, Problem, Reversal
from revcurse import ablate, chain_data, cure, draw, evaluate, icl_data, main
from revcurse import nll, prepare, related_data, reversal_data, run, setting, train

HERE = Path(__file__).parent
TINY = dict(vocab=24, layers=1, heads=2, dim=16, epochs=12, seeds=2, batch_size=4, quiet=True)
TINY["device"] = "cpu"  # where equal trainings give equal numbers
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and a shell")


def without(*names, **others):
    """TINY without some settings, or with others."""
    return {name: value for name, value in (TINY | others).items() if name not in names}


def flags(**settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += str(value).split()
    return words


def run_in(folder, *argv, **settings):
    """Run a command line in this process, with output to a folder: its exit status."""
    return main([*argv, *flags(**settings), "--out", str(folder)])


def read(folder, name="reversal"):
    """The numbers that a command has saved."""
    return json.loads((folder / f"{name}.json").read_text())


def contents(folder):
    """{name: content} of the files in a folder; of a folder in it, None."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@pytest.fixture
def fails(capsys):
    """A function that runs a command line, which must end with one line of error."""

    def check(words, *argv, status=2):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

    return check


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are tested elsewhere, and take most of the time of a tiny run."""
    monkeypatch.setattr(revcurse, "draw", lambda results: revcurse.Figures())


@pytest.fixture(scope="session", autouse=True)
def recipes():
    """A process that runs the README's Python while the tests run, for it takes half a minute."""
    code = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(code) >= 5
    with subprocess.Popen([sys.executable, "-c", "\n".join(code)], cwd=HERE, **PIPES) as process:
        yield process
        process.kill()


def untrained(experiment, seeds, dtype=None):
    """(experiment with all rules applied, models, datasets) of these seeds, before a training."""
    experiment, _, _ = prepare(experiment)
    datasets, models = [experiment.make_data(seed) for seed in seeds], []
    for seed, data in zip(seeds, datasets, strict=True):
        torch.manual_seed(seed)
        models.append(experiment.make_model(data).to(dtype))
    return experiment, models, datasets


def table_model(table):
    """A model set by hand: the logits after a token are its row of a table (V, V)."""
    return lambda tokens, last=1: table[tokens[:, -last:]]


def relation_model(table):
    """A model set by hand: the logits after "x r" are table[r, x], of a table (R, V, V)."""
    return lambda tokens, last=1: table[tokens[:, -last], tokens[:, -last - 1]][:, None]


# ------------------------------------------------------------------------------------------- Data


def split(sentences, K):
    """Sentences as (entity, relation, entity)."""
    return [(tuple(s[:K]), s[K], tuple(s[K + 1 :])) for s in sentences.tolist()]


@pytest.mark.parametrize("K, counts", [(1, (340, 60)), (2, (680, 120)), (3, (250, 50))])
def test_reversal_data_is_the_papers(K, counts):
    """Numbers, alphabets, pairs one to one; what is asked is the reverse of what is trained."""
    data = reversal_data(entity_length=K, seed=1)
    trained, asked = split(data.train_sentences(), K), split(data.test_sentences(), K)
    assert (len(trained), len(asked)) == counts
    assert (len(data.names), data.answer_length, data.graded_at) == (802, K, -K)
    assert len({*trained, *asked}) == len(trained + asked)
    facts = {}  # (A, B): directions that are trained
    for left, relation, right in trained + asked:
        a, b = (left, right) if relation == 0 else (right, left)
        assert min(a) >= 2 and max(a) < 202 <= min(b) and max(b) < 402
        if (left, relation, right) in trained:
            facts.setdefault((a, b), set()).add(relation)
        else:  # the reverse is trained, the sentence itself is not
            assert facts.pop((a, b)) == {1 - relation}
    assert all(relations == {0, 1} for relations in facts.values())
    assert len({a for a, _ in facts}) == len({b for _, b in facts}) == len(facts)


def test_seeds_coins_and_long_entities():
    """Data depend on the seed; a fair coin chooses what is asked; entities are drawn evenly."""
    one, same, other = (reversal_data(800, seed=seed).train_sentences() for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    tosses = torch.cat([reversal_data(800, seed=seed).test_sentences() for seed in range(20)])[:, 1]
    assert abs(tosses.float().mean() - 0.5) < 0.072  # 5 sigma of 1200
    data = reversal_data(800, 6, 30, 20)  # of 200**6 tuples: the product is not built
    spelled = [s[:6] if s[6] == 0 else s[7:] for s in data.train_sentences().tolist()]
    assert len(spelled) == 80 and 80 < np.mean(spelled) < 124  # letters of A are 2 to 201
    assert len(reversal_data(8, 2, 2, 2).train_sentences()) == 6  # all four entities there are


def test_chain_data_is_the_papers():
    """Two steps lead to each A ~> C; three alphabets, or one token for each and a shared index."""
    datasets = [chain_data(entity_length=K, seed=1) for K in (1, 2, 3)]
    datasets += [related_data(), related_data(800, 10)]
    counts = [(540, 60), (1080, 120), (400, 50), (700, 50), (130, 50)]
    for data, count in zip(datasets, counts, strict=True):
        K = data.answer_length
        trained, asked = split(data.train_sentences(), K), split(data.test_sentences(), K)
        assert (len(trained), len(asked)) == count and len(data.names) == 802
        assert len({*trained, *asked}) == len(trained + asked)
        step = {left: right for left, relation, right in trained if relation == 0}
        implied = {(left, right) for left, relation, right in trained + asked if relation == 1}
        assert implied == {(a, step[step[a]]) for a in step if step[a] in step}
        chains = np.array([(a, step[a], c) for a, c in implied])  # (facts, 3, K)
        assert chains.min() == 2 and chains.max() < 802
        if data.graded_at == -K:
            As, Bs, Cs = (set(chains[:, i].flatten().tolist()) for i in range(3))
            assert len(As | Bs | Cs) == len(As) + len(Bs) + len(Cs)
            assert data.alphabet_size == 200
        else:
            assert (K, data.graded_at, data.alphabet_size) == (2, -1, len(implied))
            assert (chains[:, :, 0] == (2, 3, 4)).all() and chains[:, :, 1].min() > 4
            assert (chains[:, :, 1] == chains[:, :1, 1]).all()


def test_icl_data_is_the_papers():
    """1,000 pairs "A -> B <=> B <- A" of 100 A's and 10 B's; of each A its own three are asked."""
    data = icl_data(seed=1)
    sentences = torch.cat([data.train_sentences(), data.test_sentences()])
    assert (len(data.train_sentences()), len(sentences), len(data.names)) == (700, 1000, 403)
    a, _, b, _, b2, _, a2 = sentences.T.tolist()
    assert (sentences[:, 1::2] == torch.tensor([0, 2, 1])).all() and a == a2 and b == b2
    assert len({*zip(a, b, strict=True)}) == 1000 and len({*a}) == data.alphabet_size == 100
    assert len({*b}) == 10 and not {*a} & {*b} and min(a) > 2
    asked = {left: set() for left in a}
    for left, right in zip(a[700:], b[700:], strict=True):
        asked[left].add(right)
    assert {len(others) for others in asked.values()} == {3}
    assert len({frozenset(others) for others in asked.values()}) > 20  # of 120
    smallest = icl_data(4, 1, 2)  # one A, three B's
    assert len(icl_data(13).train_sentences()) == 21 and len(smallest.test_sentences()) == 2


def test_names_of_tokens_and_facts():
    """Sentences read as the paper's; facts of one's own keep their partners, in a random order."""
    data, chain, related = reversal_data(24), chain_data(24), related_data(24, 4, 2)
    rows = [(data, "complete B <- A", "B3 <- A3"), (chain, "complete A ~> C", "A3 ~> C3")]
    for data, role, words in [*rows, (related, "complete B -> C", "b i3 -> c i3")]:
        assert " ".join(data.names[token] for token in data.train[role][3]) == words
    assert " ".join(icl_data(16, 2, 2).names) == f"-> <- <=> A0 A1 A2 A3 B0 B1 B2 B3{8 * ' #'}"
    facts = [(f"A {i}", f"B {i}") for i in range(6)]
    datasets = [reversal_data(24, facts=facts, seed=seed) for seed in range(3)]
    assert len({tuple(data.names) for data in datasets}) == 3  # each seed holds out other facts
    for data in datasets:
        sentences = torch.cat([data.train_sentences(), data.test_sentences()]).tolist()
        named = [[data.names[token] for token in s] for s in sentences]
        assert {(s[0], s[2]) if s[1] == "->" else (s[2], s[0]) for s in named} == set(facts)
    for vocab, K, words in ((20, 1, "6 facts need 24"), (24, 2, "of one token")):
        with pytest.raises(ValueError, match=words):
            reversal_data(vocab, K, facts=facts)
    with pytest.raises(ValueError, match="held-out"):
        related_data(800, 10, 0)


# ----------------------------------------------------------------------------------------- Theory


def test_logits_of_the_small_models_by_hand():
    """Entries of Bilinear by a loop, also with Theta symmetric; then the models of the cures."""
    torch.manual_seed(0)
    model, symmetric = Bilinear(5, 7), Bilinear(5, 7, symmetric=True)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not model.Theta.any() and trained == ["Theta"]
    nn.init.normal_(model.Theta)
    symmetric.load_state_dict(model.state_dict())
    E, Theta = model.embeddings, model.Theta
    for x, y in ((3, 6), (1, 1), (0, 5)):
        entries = [(a, b) for a in range(5) for b in range(5)]
        expected = sum(E[x, a] * Theta[a, b] * E[y, b] for a, b in entries)
        reverse = sum(E[y, a] * Theta[a, b] * E[x, b] for a, b in entries)
        logits = model(torch.tensor([[1, 0], [x, 1]]))
        assert logits.shape == (2, 1, 7) and logits.dtype == torch.float64
        torch.testing.assert_close(logits[1, 0, y], expected)
        mean = symmetric(torch.tensor([[x, 0]]))[0, 0, y]
        torch.testing.assert_close(mean, (expected + reverse) / 2)
    tokens = torch.tensor([[3, 1], [2, 0]])
    for tied in (True, False):
        model = revcurse.LearnedBilinear(9, 4, tied)
        assert (model.U is model.E) == tied
        expected = (model.E[3] @ model.M + model.E[1]) @ model.U.T
        torch.testing.assert_close(model(tokens)[0, 0], expected)
    model, merged = revcurse.SumOfTokens(5, 3, True), revcurse.SumOfTokens(5, 5, False)
    torch.testing.assert_close(model(tokens)[0, 0], (model.E[3] + model.E[1]) @ model.U.T)
    torch.testing.assert_close(merged(tokens)[0, 0], merged.E[3] + merged.E[1])


def test_starts_of_the_small_models():
    """The spread of their weights; fewer coordinates than dimensions leave all products alike."""
    torch.manual_seed(0)
    starts = [(weight, 0.02) for weight in revcurse.LearnedBilinear(300, 100, False).parameters()]
    starts += [(weight, 0.002) for weight in revcurse.SumOfTokens(300, 100, True).parameters()]
    for weight, spread in [*starts, (Bilinear(100, 300).embeddings, 0.1)]:
        assert abs(weight.std() / spread - 1) < 0.05 and abs(weight.mean()) < 0.1 * spread
    torch.manual_seed(3)
    full = torch.randn(12, 50, dtype=torch.float64) / math.sqrt(50)
    torch.manual_seed(3)
    short = Bilinear(50, 12).embeddings
    assert short.shape == (12, 12)
    torch.testing.assert_close(short @ short.T, full @ full.T)


def test_theorems_1_and_2_over_ten_seeds(tmp_path):
    """`bilinear`: epsilon, shifts and bounds of each trial are those of its curves, and small."""
    settings = {"vocab": 40, "dims": "64 1024", "epochs": 400, "quiet": True, "device": "cpu"}
    assert run_in(tmp_path, "bilinear", "--symmetric", **settings) == 0
    runs = read(tmp_path, "bilinear")["runs"]
    assert [one["value"] for one in runs[1:3]] == ["dim 64, symmetric", "dim 1024"]
    for one in runs:
        free, dim, summary = not one["symmetric"], one["dim"], one["summary"]
        assert one["outcome"] == one["expected"] == ("curse" if free else "no curse")
        times, L, L_rev, _ = (np.array(curve) for curve in one["curves"].values())
        assert times[-1] == pytest.approx(400 * 0.4 * 10)
        assert L[:, -1].max() < 0.1 and (np.diff(L) < 0).all()
        form = revcurse.closed_form if free else revcurse.closed_form_symmetric
        gap = np.abs(L - form(times, 42, 10)).max()
        assert one["closed_form_gap"] == pytest.approx(gap) and gap < 0.8
        epsilons = np.log(L_rev / L_rev[:, :1])[:, 1:] / np.log(L / L[:, :1])[:, 1:]
        expected = max(0, epsilons.max(), *one["slope"])
        assert one["epsilon"] == pytest.approx(expected, rel=1e-3)
        shifts = L_rev[:, -1] - math.log(42)
        assert one["shift"] == pytest.approx(shifts)
        assert one["reversal_shift"] == pytest.approx(shifts.mean())
        own, normaliser = summary["own_logit_shift"], summary["normaliser_shift"]
        assert np.add(own["per_seed"], normaliser["per_seed"]) == pytest.approx(shifts)
        for c in (0.1, 0.01):  # L_rev where L reaches c, half way in log L
            for i, value in enumerate(one["theorem_2"][str(c)]):
                expected = np.interp(-math.log(c), -np.log(L[i]), L_rev[i])
                assert value == (pytest.approx(expected) if L[i, -1] <= c else None)
        if free:
            assert min(one["theorem_2"]["0.1"]) > math.log(42 / 2)
            assert own["mean"] < 0 < normaliser["mean"]
            assert one["epsilon"] < 0.15 * 64 / dim + 0.01
            assert abs(np.mean(one["slope"]) - 1 / dim) < 4 * math.sqrt(2 / 10) / dim
        else:
            assert one["epsilon"] > 0.5


def test_slope_at_the_start_by_small_steps():
    """The slope dL_rev / dL at Theta = 0 is that of one small step, of each seed."""
    results = run(BilinearTheory(dim=8, vocab=24, epochs=1, lr=1e-4, seeds=3, device="cpu"))
    forward, reverse = (np.diff(results["curves"][f"{way}_nll"]) for way in ("forward", "reversal"))
    assert results["slope"] == pytest.approx((reverse / forward)[:, 0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("context", [[3], [3, 5], [5, 5], [1, 2, 4], [2, 0, 2]], ids=str)
def test_one_layer_and_its_gradients_are_the_papers(context):
    """Probabilities and gradients by the formulas of Section 4, for contexts of some tokens."""
    V, query, target = 7, 6, 1
    model = OneLayer(V)
    assert not model.Y.any() and not model.Z.any()
    torch.manual_seed(sum(context))
    for weight in model.parameters():
        nn.init.normal_(weight)
    Y, Z = model.Y.detach().numpy(), model.Z.detach().numpy()
    e, q, X = np.eye(V)[target], np.eye(V)[query], np.eye(V)[context]
    b = np.exp(Z[query, context]) / np.exp(Z[query, context]).sum()
    length = math.sqrt(sum(x * x for x in X.T @ b))
    f = X.T @ b / length
    alpha = np.exp(Y.T @ f) / np.exp(Y.T @ f).sum()
    logits = model(torch.tensor([[*context, query]] * 2))
    assert logits.shape == (2, 1, V) and logits.dtype == torch.float64
    np.testing.assert_allclose(logits[1, 0].softmax(-1).detach(), alpha, atol=1e-12)

    (-nll(model, torch.tensor([[*context, query, target]]))).backward()  # up -NLL
    P = np.eye(V) - np.outer(f, f)
    dZ = np.outer(q, (e - alpha) @ Y.T @ (P / length) @ X.T @ np.diag(b) @ X)
    np.testing.assert_allclose(model.Y.grad, np.outer(f, e - alpha), rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.Z.grad, dZ, rtol=0, atol=1e-10)
    assert len(context) > 1 or not model.Z.grad.any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_closed_forms_against_gradient_descent_with_orthonormal_embeddings(symmetric):
    """The curves of the closed forms are those of 2,000 small steps."""

    class Orthonormal(BilinearTheory):
        def make_model(self, data):
            model = super().make_model(data)
            nn.init.eye_(model.embeddings)
            return model

    settings = {"vocab": 24, "symmetric": symmetric, "quiet": True, "device": "cpu"}
    results = run(Orthonormal(dim=26, epochs=2000, lr=0.01, seeds=1, **settings))
    form = revcurse.closed_form_symmetric if symmetric else revcurse.closed_form
    times, (forward,), (reverse,), _ = results["curves"].values()
    assert times[::39] == pytest.approx([0, 2000 * 0.01 * 6])
    assert form(times, 26, 6) == pytest.approx(forward, abs=1e-3)
    if symmetric:  # logits are symmetric, normalisers are not
        assert forward[-1] < reverse[-1] < 1.3 * forward[-1] < 1
    else:
        assert reverse == pytest.approx([math.log(26)] * len(times))


@pytest.mark.parametrize("batch_size, seeds", [(1, 1), (10**6, 2)])
def test_theorems_3_and_4(tmp_path, batch_size, seeds):
    """`onelayer`: the trained follow the closed form, the asked stay a guess, exactly."""
    settings = {"vocab": 24, "complete": 2, "held_out": 2, "seeds": seeds, "device": "cpu"}
    settings |= {"epochs": 200, "lr": 0.02, "batch_size": batch_size, "quiet": True}
    assert run_in(tmp_path, "onelayer", **settings) == 0
    reversal, chain = read(tmp_path, "onelayer")["runs"]
    with np.load(tmp_path / "onelayer.npz") as arrays:
        rows = [np.flatnonzero(abs(arrays[f"{name}: Y"]).sum(1)) for name in ("reversal", "chain")]
    for one, N, touched in zip((reversal, chain), (6, 8), rows, strict=True):
        curves = one["curves"]
        assert curves["time"][-1] == pytest.approx(200 * 0.02 * N)
        expected = revcurse.closed_form(curves["time"], 26, N)
        assert curves["closed_form"] == [pytest.approx(expected)]
        assert np.abs(np.array(curves["forward_nll"]) - expected).max() < 0.02
        assert one["trained_probability_min"] == pytest.approx(math.exp(-expected[-1]), abs=0.02)
        data = reversal_data(24, 1, 2, 2) if one is reversal else chain_data(24, 1, 0, 4)
        assert set(touched) == set(data.train_sentences()[:, 0].tolist())  # the rows of Y
    assert np.abs(np.array(reversal["curves"]["reversal_nll"]) - math.log(26)).max() < 1e-12
    assert reversal["unseen_probability_max"] == pytest.approx(1 / 26, abs=1e-12)
    assert chain["unseen_probability_max"] <= 1 / 26 + 1e-12
    assert list(reversal["tokens"].values())[:3] == ["->", "<-", "A0"]


# ------------------------------------------------------------------------------------------ Model


def naive_gpt(weights, tokens, layers, heads, position, causal):
    """GPT-2 token by token and head by head, from its parameters by name, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    dim = w["transformer.wte.weight"].shape[1]
    d, T = dim // heads, len(tokens)

    def norm(x, name):
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def turn(x, t):  # pairs of entries as complex numbers
        if position != "relative":
            return x
        angles = t * 10000.0 ** (-2 * np.arange(d // 2) / d)
        turned = (x[: d // 2] + 1j * x[d // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    x = [w["transformer.wte.weight"][token] for token in tokens]
    if position == "absolute":
        x = [v + w["transformer.wpe.weight"][t] for t, v in enumerate(x)]
    for layer in range(layers):
        h = f"transformer.h.{layer}"
        qkv = [linear(norm(v, f"{h}.ln_1"), f"{h}.attn.c_attn").reshape(3, heads, d) for v in x]
        for t in range(T):
            out = []
            for n in range(heads):
                heard = range(t + 1 if causal else T)
                query = turn(qkv[t][0, n], t)
                p = np.exp([query @ turn(qkv[s][1, n], s) / math.sqrt(d) for s in heard])
                out.append(sum(p[s] / p.sum() * qkv[s][2, n] for s in heard))
            x[t] = x[t] + linear(np.concatenate(out), f"{h}.attn.c_proj")
        for t, v in enumerate(x):
            u = linear(norm(v, f"{h}.ln_2"), f"{h}.mlp.c_fc")
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            x[t] = v + linear(u, f"{h}.mlp.c_proj")
    return np.stack([w["lm_head.weight"] @ norm(v, "transformer.ln_f") for v in x])


@pytest.mark.parametrize("causal, tied", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_gpt_against_plain_loops(position, causal, tied):
    """The logits after all tokens, and after the last few, of weights away from their start."""
    torch.manual_seed(0)
    model = GPT(11, 6, 3, 2, 12, position, tie_embeddings=tied)
    for block in model.transformer.h:
        block.attn.causal = causal
    with torch.no_grad():  # at the start attention is flat and norms are the identity
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
    """The names of the published GPT-2, and the spread of its weights at the start."""
    torch.manual_seed(0)
    weights = dict(GPT(500, 8, 3, 4, 64).named_parameters())
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [f"transformer.h.{layer}.{part}" for layer in range(3) for part in parts]
    names = [
        f"{part}.{kind}" for part in [*layers, "transformer.ln_f"] for kind in ("weight", "bias")
    ]
    names += ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
    assert sorted(weights) == sorted(names)
    for name, weight in weights.items():
        if "ln_" in name or name.endswith("bias"):
            assert (weight == float("ln_" in name and name.endswith("weight"))).all()
        elif weight.numel() > 1000:  # smaller ones say little about their spread
            expected = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(weight.std() / expected - 1) < 0.05 and abs(weight.mean()) < 0.002


# --------------------------------------------------------------------------------------- Training


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_loss_looks_at_the_right_tokens(loss, K):
    """The gradient of the loss with respect to the logits, counted token by token."""
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
    """A tiny experiment with two layers, its models and datasets."""
    return untrained(Reversal(**TINY | {"layers": 2, "epochs": 4} | settings), seeds, dtype)


@pytest.mark.parametrize("embeddings", ["free", "freeze", "tie"])
@pytest.mark.parametrize("seeds", [(5,), (0, 1, 2)], ids=str)
def test_train_does_to_each_model_what_the_loop_in_its_docstring_does(seeds, embeddings):
    """The text of the docstring, run for each seed: the losses of every epoch, and the weights."""
    loop = textwrap.dedent(train.__doc__.split("\n\n")[1])
    settings = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}
    settings |= {f"{way}_embeddings": way == embeddings for way in ("freeze", "tie")}
    experiment, models, datasets = tiny(*seeds, dtype=torch.float64, **settings)
    alone = copy.deepcopy(models)
    history, frames = train(experiment, models, datasets, seeds)
    assert list(history) == [0, 1, 2, 3, 4] and frames == {}
    for i, (seed, model, data) in enumerate(zip(seeds, alone, datasets, strict=True)):
        weights = dict(model.named_parameters())
        frozen = {name for name, weight in weights.items() if not weight.requires_grad}
        both = {"transformer.wte.weight", "transformer.wpe.weight"}
        assert frozen == (both if embeddings == "freeze" else set())
        parts = {"trained": data.train_sentences(), "asked": data.test_sentences()}
        optimizer = torch.optim.AdamW(weights.values(), 0.02, (0.8, 0.99), weight_decay=0.1)
        names = {"torch": torch, "nll": nll, "model": model, "epochs": 1, "batch_size": 4}
        names |= {"sentences": parts["trained"], "optimizer": optimizer}
        torch.manual_seed(seed)  # the loop shuffles with the generator of torch
        for epoch in range(5):
            if epoch > 0:
                exec(loop, names)
            for part, sentences in parts.items():
                p = model(sentences[:, :2])[:, 1].softmax(-1).detach()
                p = p[torch.arange(len(sentences)), sentences[:, 2]]
                torch.testing.assert_close(history[epoch][i][part].nll[:, 0], -p.log())
        tied = models[i].lm_head.weight is models[i].transformer.wte.weight
        assert tied == (embeddings == "tie")
        for name, weight in weights.items():
            torch.testing.assert_close(models[i].get_parameter(name), weight, atol=1e-9, rtol=1e-9)


def test_dropout_is_at_work_in_training_only():
    """Measuring drops nothing; in training each of two equal models has masks of its own."""
    gaps = []
    for rate in (0.0, 0.5):
        experiment, models, datasets = tiny(0, 0, dropout=rate)
        history, _ = train(experiment, models, datasets, (0, 0))
        one, other = (parts["trained"].nll for parts in history[4])
        gaps.append((one - other).abs().max())
        again = experiment.evaluate(models[0].train(), datasets[0])["trained"].nll
        assert torch.equal(one, again)
    assert gaps[0] < 1e-5 and gaps[1] > 0.01
    assert str(GPT(10, 4, 1, 2, 8, dropout=0.5)).count("Dropout(p=0.5") == 4
    assert str(revcurse.Block(8, 2)).count("Dropout(p=0.0") == 3


# ------------------------------------------------------------------------------------ Experiments


def test_evaluation_by_hand():
    """Loss and correctness of each answer, in parts of any size, up to the authors' ceiling."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    first = math.log(sum(math.exp(v) for v in [0, 2, 1, 3, -1, 5]))
    second = math.log(math.exp(4) + 5)
    sentences = torch.tensor([[0, 2], [0, 5], [1, 4], [1, 0]])
    losses = torch.tensor([[first - 1], [first - 5], [second], [second - 4]])
    found = evaluate(table_model(logits), sentences.repeat(700, 1), 1)
    torch.testing.assert_close(found.nll, losses.repeat(700, 1))
    assert found.correct.tolist() == [[False], [True], [False], [True]] * 700
    assert nll(table_model(logits), sentences[:1]).item() == pytest.approx(first - 1)
    high = evaluate(table_model(500 * torch.eye(6)), torch.tensor([[0, 1]]), 1)
    assert high.nll.item() == pytest.approx(50 * math.log(10))


def test_heat_maps_of_a_model_set_by_hand():
    """Logits of all answers after all entities, by role, of a few facts, and of all entities."""
    data, table = reversal_data(24), torch.zeros(26, 26)
    a, _, b = data.train["complete A -> B"].T
    table[a, b] = 7.0
    table[3, 4] = 2.0  # A1 -> A2
    maps = revcurse.heat_maps(table_model(table), data)
    assert list(maps) == [*data.train, *data.test]
    assert torch.equal(maps["complete A -> B"], 7 * torch.eye(4))
    assert torch.equal(maps["complete B <- A"], torch.zeros(4, 4))
    assert revcurse.heat_maps(table_model(table), data, 3)["complete A -> B"].shape == (3, 3)
    entities, trained = revcurse.entity_map(table_model(table), data).values()
    assert torch.equal(entities, table[2:14, 2:14])
    expected = {(x - 2, y - 2) for x, _, y in data.train_sentences().tolist()}
    assert {tuple(at) for at in trained.nonzero().tolist()} == expected


def test_matched_rank_by_hand():
    """The rank of the right answer among those of its relation; ties; nothing to compare with."""
    data = reversal_data(24, complete=1, held_out=5, seed=3)
    asked = data.test_sentences()
    forward, backward = (asked[asked[:, 1] == relation].tolist() for relation in (0, 1))
    assert (len(forward), len(backward)) == (3, 2)
    table, (x, r, y) = torch.zeros(2, 26, 26), asked.T
    table[r, x, y] = 1.0
    table[1, backward[0][0], backward[1][2]] = 2.0  # another asked answer of "<-" is above
    table[1, backward[1][0], 25] = 9.0  # no asked answer: does not count
    table[0, forward[0][0]] = 0.0  # all equal: the middle
    rank, others = revcurse.matched_rank(relation_model(table), data)
    assert rank == pytest.approx((0.5 + 0 + 0 + 1 + 0) / 5)
    losses = []
    for rows in (forward, backward):
        for x, r, right in rows:
            log_p = table[r, x].log_softmax(0)
            losses.append(np.mean([-log_p[y].item() for _, _, y in rows if y != right]))
    assert others == pytest.approx(np.mean(losses), rel=1e-5)
    assert revcurse.matched_rank(relation_model(table), reversal_data(20)) == (None, None)


def test_chain_of_thought_by_hand():
    """Two steps with the model's own B, of three facts: a wrong B, a right one, a wrong C."""
    data, table = chain_data(40), torch.zeros(2, 42, 42)  # 10 triples, 3 of them held out
    a, _, b = data.train["held-out A -> B"].T
    c = data.train["held-out B -> C"][:, 2]
    table[0, a, b] = table[0, b, c] = 1.0
    table[0, a[0], b[1]] = 2.0  # A0 -> B1, which leads to C1
    table[0, b[2], b[2]] = 3.0  # B2 -> B2
    table[1, a[0], c[0]] = table[1, a[1], b[1]] = table[1, a[2], c[2]] = 1.0  # two at once
    assert revcurse.chain_of_thought(relation_model(table), data) == pytest.approx(1 / 3)
    asked = evaluate(relation_model(table), data.test_sentences(), 1)
    assert asked.correct.float().mean().item() == pytest.approx(2 / 3)


def test_numbers_of_long_entities_by_hand():
    """Entities of two tokens: first token, whole answer, heat map and its means."""
    experiment, (model,), (data,) = tiny(0, entity_length=2)
    rows = data.test["held-out, asked"]
    n = len(rows)
    history = {0: experiment.evaluate(model, data), 1: experiment.evaluate(model, data)}
    before = model.transformer.wte.weight.detach().clone()
    numbers = experiment.measure(model, data, before, history)
    log_p = model(rows[:, :-1]).log_softmax(-1).detach()
    first, second = -log_p[range(n), 2, rows[:, 3]], -log_p[range(n), 3, rows[:, 4]]
    right = (log_p[:, 2:].argmax(-1) == rows[:, 3:]).all(1)
    assert numbers["validation_nll"] == pytest.approx([first.mean().item()] * 2, rel=1e-5)
    assert numbers["validation_word_nll"] == pytest.approx((first + second).mean().item(), rel=1e-5)
    assert numbers["validation_accuracy"] == pytest.approx(right.float().mean().item())
    assert numbers["asked_cosine"] == pytest.approx(1, abs=1e-6)  # nothing was trained
    logits = model(rows[:, :2])[:, 1, rows[:, 3]].detach().numpy()  # of first tokens after entities
    matrices = {name: each.numpy() for name, each in experiment.matrices(model, data).items()}
    assert matrices["held-out, asked"] == pytest.approx(logits, abs=1e-3)
    results = revcurse.results_of(experiment, data, [(numbers, matrices)])
    assert results["summary"]["validation_nll"]["per_seed"] == [numbers["validation_nll"][-1]]
    on, off = logits[np.eye(n, dtype=bool)], logits[~np.eye(n, dtype=bool)]
    means = {"diagonal": on.mean(), "off_diagonal": off.mean()}
    assert results["weights"]["held-out, asked"] == pytest.approx(means, abs=1e-3)


@pytest.mark.parametrize(
    "trained, asked, nll, rank, count, outcome",
    [
        (0.98, 0.0, 9.0, 0.5, 60, "not learned"),
        (0.991, 0.0, 9.0, 0.41, 1000, "curse"),
        (1.0, 0.0, 9.0, 0.39, 10, "trace"),
        (1.0, 0.0, 9.0, 0.39, 4, "curse"),  # too few to be clear
        (1.0, 0.0, 9.0, 0.2, 4, "trace"),
        (1.0, 0.0, 9.0, None, 60, "curse"),
        (1.0, 0.95, 0.1, 0.0, 60, "no curse"),
        (1.0, 0.09, 2.1, 0.5, 60, "curse"),
        (1.0, 0.5, 9.0, 0.0, 60, "some"),
        (1.0, 0.05, 1.9, 0.5, 60, "trace"),
    ],
)
def test_outcomes(trained, asked, nll, rank, count, outcome):
    """What the measured numbers mean, on both sides of each limit."""
    numbers = {"train_accuracy": trained, "validation_accuracy": asked, "validation_nll": nll}
    numbers |= {"train_nll": 0.1, "matched_rank": rank, "others_nll": 9.5}
    summary = {name: {"mean": mean, "per_seed": [mean] * 10} for name, mean in numbers.items()}
    results = {"unseen": "x", "chance": {"alphabet": 2.0}, "summary": summary}
    found, text = revcurse.verdict(results | {"counts": {"validation": count}})
    assert found == outcome and text.startswith(f"{revcurse.OUTCOMES[outcome]}: ")
    assert (rank is None) or f"rank {rank:.3f}" in text


def test_the_curse(tmp_path, capsys):
    """The paper's claim: all that is trained is known, nothing of what is asked, at any seed."""
    settings = {"vocab": 400, "complete": 25, "held_out": 60, "epochs": 150, "seeds": 2}
    assert run_in(tmp_path, "reversal", **settings, device="cpu") == 0
    printed = capsys.readouterr().out
    assert "reversal on cpu" in printed and "110 sentences, 151,680 parameters" in printed
    assert "The curse, and no clear trace: 100.0%" in printed and printed.count("right is ") == 3
    assert "were never an input" in printed
    results = read(tmp_path)
    summary, curves = results["summary"], results["curves"]
    assert results["counts"] == {"train": 110, "validation": 60}
    assert results["outcome"] == "curse" and results["seconds"] > 0
    for number in summary.values():
        assert number["mean"] == pytest.approx(np.mean(number["per_seed"]))
        assert number["std"] == pytest.approx(np.std(number["per_seed"]))
    mean = {name: number["mean"] for name, number in summary.items()}
    assert mean["train_accuracy"] == 1 and mean["train_nll"] < 0.1
    assert max(summary["validation_accuracy"]["per_seed"]) <= 0.02
    assert min(summary["validation_nll"]["per_seed"]) > math.log(100) + 2
    assert all(0.4 < rank < 0.6 for rank in summary["matched_rank"]["per_seed"])
    assert mean["others_nll"] == pytest.approx(mean["validation_nll"], abs=0.2)
    assert min(summary["asked_cosine"]["per_seed"]) > 0.99999  # never read
    gaps = [role["diagonal"] - role["off_diagonal"] for role in results["weights"].values()]
    assert len(gaps) == 4 and min(gaps[:3]) > 5 and abs(gaps[3]) < 0.8
    assert np.shape(curves["train_nll"]) == (2, len(curves["epoch"])) and curves["epoch"][-1] == 150
    assert [curve[0] for curve in curves["train_nll"]] == pytest.approx(
        [math.log(402)] * 2, abs=0.05
    )
    with np.load(tmp_path / "reversal.npz") as arrays:
        assert [arrays[name].shape for name in arrays] == [(25, 25)] * 2 + [(60, 60)] * 2
        assert arrays["held-out, trained"].argmax(1).tolist() == list(range(60))
    assert len(contents(tmp_path)) == 4  # .json, .npz, .png and _weights.png


def test_tasks_where_the_curse_is_escaped(no_pictures, tmp_path, capsys):
    """The chain task in two steps; in-context reversal and related tokens without any trick."""
    few = {"seeds": 1, "device": "cpu"}
    assert run_in(tmp_path, "chain", vocab=80, seed=1, epochs=140, **few) == 0
    mean = {name: number["mean"] for name, number in read(tmp_path, "chain")["summary"].items()}
    assert mean["train_accuracy"] > 0.99 and mean["two_step_accuracy"] > 0.99
    assert mean["direct_accuracy"] == mean["validation_accuracy"] < 0.2
    assert 'In two steps, "A ->" and then "B ->", 100.0%' in capsys.readouterr().out
    assert run_in(tmp_path, "icl", vocab=60, **few) == 0
    settings = {"vocab": 80, "complete": 50, "held_out": 10, "epochs": 60}
    assert run_in(tmp_path, "chain", "--related-tokens", **settings, **few) == 0
    for name in ("icl", "chain-related-tokens"):
        results = read(tmp_path, name)
        assert results["summary"]["validation_accuracy"]["mean"] > 0.95
        assert results["outcome"] == results["expected"] == "no curse"
    assert not (tmp_path / "icl.npz").exists()  # no .npz with nothing in it


def test_the_one_picture():
    """`weights`: what is trained is high in each model, what is asked if trained in reverse."""
    results = run(revcurse.four_models(vocab=24, complete=2, epochs=150, quiet=True, device="cpu"))
    trained = results["matrices"]["bilinear: trained"].astype(bool)
    assert trained.shape == (12, 12) and trained.sum() == 2 * 2 + 4
    asked = trained.T & ~trained
    for label, known in (("bilinear", False), ("GPT", False), ("GPT, reverse training", True)):
        logits = results["matrices"][f"{label}: entities"].astype(float)
        logits -= logits.mean(1, keepdims=True)
        assert logits[trained].min() > 1
        assert (logits[asked].mean() > 1) == known
    assert len(draw(results)[".png"].axes) == 4 + 1  # four models and their scale


def test_a_value_of_a_sweep_is_the_run_of_its_own_flags(no_pictures, tmp_path):
    """Settings as the flags would have been; of the matrices only what the pictures need."""
    facts = tmp_path / "big towns.tsv"
    facts.write_text(LINES)
    trials = ablate("facts", values=[facts], seeds=2).trials
    assert trials == {f"facts {facts}": Reversal(facts=facts, seeds=2)}
    for value, changes in (("0.3", {"dropout": 0.3}), ("7", {"complete": 7})):
        (axis,) = changes
        expected = Reversal(**revcurse.ABLATE_LAPTOP | {"seeds": 2} | changes)
        assert ablate(axis, values=[value], seeds=2).trials == {f"{axis} {value}": expected}
    assert ablate("entity_length", values="2").trials == ablate("entity-length", values="2").trials
    settings = without("layers", lr=0.02)
    assert run_in(tmp_path, "ablate", "layers", values=2, **settings) == 0
    assert run_in(tmp_path, "reversal", layers=2, **settings) == 0
    one, other = read(tmp_path, "ablate-layers")["runs"][0], read(tmp_path)
    for name in ("summary", "curves", "weights", "counts"):
        assert one[name] == other[name]
    settings = without("layers", "heads", "dim", epochs=1, task="chain", values="1x20 1x256")
    assert run_in(tmp_path, "ablate", "size", **settings) == 0
    with np.load(tmp_path / "ablate-chain-size.npz") as arrays:
        assert list(arrays) == ["size 1x20: cosine", "size 1x256: cosine"]
        drawn = draw(read(tmp_path, "ablate-chain-size") | {"matrices": dict(arrays)})
    assert set(drawn) == {".png", "_cosine.png"}
    assert not (tmp_path / "ablate-layers.npz").exists()


def test_all_axes_train_the_usual_model_once(tmp_path, capsys, monkeypatch):
    """Equal trials are one training, told twice; the picture has a panel for each axis."""
    axes = {name: revcurse.AXES[name] for name in ("layers", "heads", "related-tokens")}
    monkeypatch.setattr(revcurse, "AXES", axes)
    assert run_in(tmp_path, "ablate", **without("layers", "heads", vocab=40, epochs=2)) == 0
    runs = {one["value"]: one for one in read(tmp_path, "ablate")["runs"]}
    assert list(runs) == [f"{axis} {n}" for axis in ("layers", "heads") for n in (1, 2, 4, 8)]
    assert runs["layers 2"]["summary"] == runs["heads 4"]["summary"]
    assert runs["layers 2"]["summary"] != runs["layers 1"]["summary"]
    assert capsys.readouterr().out.count("sentences, ") == 7  # trainings
    (figure,) = draw(read(tmp_path, "ablate") | {"matrices": {}}).values()
    assert [axes.get_title() for axes in figure.axes] == ["layers", "heads"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_settings_of_the_paper():
    """The numbers of the paper's Tables 3 and 4, by each way to them; settings make the model."""
    table = {"layers": 24, "heads": 12, "dim": 768, "epochs": 3000, "dropout": 0.1, "lr": 0.01}
    table |= {"batch_size": 64, "betas": (0.9, 0.999), "weight_decay": 0.01}
    for experiment in (Reversal.paper(), Chain.paper(), ICL.paper()):
        assert vars(experiment).items() >= table.items()
    _, _, model = prepare(Reversal(position="none", dropout=0.3))
    assert "wpe" not in model.transformer and model.transformer.drop.p == 0.3
    (from_line,) = revcurse.make_plans("reversal", {"preset": "paper", "layers": 3})
    assert from_line == Reversal.paper(layers=3) and from_line.layers == 3
    for trial in ablate("related-tokens", preset="paper").trials.values():
        assert isinstance(trial, Chain) and vars(trial).items() >= table.items()
    oracle = cure(preset="paper").trials["oracle"]
    assert vars(oracle).items() >= (table | {"lr": 0.003, "weight_decay": 0.1}).items()


def test_the_program_is_that_of_the_published_results():
    """Settings, epochs, data and claims of every trial of `all` are those that are in figures/."""
    folder, claims = HERE / "figures", []
    for plan in revcurse.make_plans("all", {}):
        published = read(folder, plan.stem)
        runs = published.get("runs", [published])
        claims += revcurse.claims_of(plan.stem, runs)
        for one, (label, trial) in zip(runs, revcurse.trials_of(plan).items(), strict=True):
            experiment, data, _ = prepare(trial)
            assert one["value"] == label and one["expected"] == experiment.expected
            sentences = (data.train_sentences(), data.test_sentences())
            assert list(one["counts"].values()) == [len(each) for each in sentences]
            epochs = experiment.eval_epochs()
            assert one["curves"].get("epoch", epochs) == epochs
            for name in one["config"].keys() - {"out", "device"}:
                value = json.loads(json.dumps(getattr(experiment, name)))
                assert value == one["config"][name], (plan.stem, label, name)
    assert claims == read(folder, "all")["claims"]
    for plan in revcurse.make_plans("all", {"epochs": 7, "seeds": 3}):
        for trial in revcurse.trials_of(plan).values():  # some have epochs of their own
            theory = isinstance(trial, BilinearTheory | revcurse.OneLayerTheory)
            own = theory or isinstance(trial, revcurse.BridgeTheory) or plan.stem == "weights"
            assert trial.seeds == 3 and (trial.epochs == 7) == (not own)
    assert prepare(Reversal(vocab=20, batch_size=4))[0].epochs == 160  # 480 steps of 4
    experiment = Reversal(epochs=39)
    experiment.measurements = 4  # at 0, 1/9, 4/9 and all of the training
    assert experiment.eval_epochs() == [0, 4, 17, 39]


def test_all_and_its_claims(no_pictures, tmp_path, monkeypatch):
    """`all` gives its flags to each command, saves each, and tells what was claimed and seen."""
    heads, cures = {"axis": "heads", "values": ["1"]}, {"values": ["none", "tied GPT"]}
    monkeypatch.setattr(revcurse, "ALL", [("icl", {}), ("ablate", heads), ("cure", cures)])
    assert run_in(tmp_path, "all", **without("heads", vocab=40)) == 0
    results = read(tmp_path, "all")
    claims = [(claim["figure"], claim["expected"].split(",")[0]) for claim in results["claims"]]
    curses = [(figure, "The curse") for figure in ("ablate-heads", "cure", "cure")]
    assert claims == [("icl", "No curse"), *curses]
    for claim in results["claims"]:  # in so few steps only the in-context task is learned
        assert claim["holds"] == (claim["figure"] == "icl") == ("not learned" not in claim["seen"])
    assert len(results["trainings"]) == 6 and "epochs 12" in results["trainings"][0]
    files = {"icl.json", "ablate-heads.json", "cure.json", "all.json"}
    assert {name for name in contents(tmp_path) if not name.endswith(".npz")} == files


# ------------------------------------------------------------------------------------------ Cures


def test_each_cure_and_only_the_oracle_is_told_what_is_asked():
    """The sentences that each cure adds, which names are then read, and its rates."""
    trials = cure(**TINY).trials
    assert len(trials) == 2 * 11 + 3 + 4
    for name, trial in trials.items():
        data = trial.make_data(1)
        trained = {tuple(row) for row in data.train_sentences().tolist()}
        asked = {tuple(row) for row in data.test_sentences().tolist()}
        assert asked & trained == (asked if "oracle" in name else set()), name
        assert (trained == {row[::-1] for row in trained}) == ("reverse training" in name)
        same = {row[0] for row in trained if row[0] == row[2]}
        entities = {x for first, _, last in trained | asked for x in (first, last)}
        bridged = "identity bridge" in name or "x = x" in name
        assert same == (entities if bridged else set())
        alone = len(data.train["complete A -> B"]) == 0
        assert alone == (trial.variant == "no complete pairs") == ("no complete" in name)
        asked_about = {row[0] for row in asked}
        others = ("oracle", "reverse", "elsewhere", "shuffled")
        read_too = bridged or any(word in name for word in others)
        assert asked_about - {row[0] for row in trained} == (set() if read_too else asked_about)
        if "shuffled" in name:  # as the identity bridge, but each name after another one
            first, equals, last = data.train["added"].unbind(1)
            assert {*first.tolist()} == {*last.tolist()} == entities and len(first) == len(entities)
            assert {*equals.tolist()} == {len(data.names) - 1} and (first != last).all()
        if trial.variant in ("common", "paper"):
            rates = (0.003, 0.1) if trial.variant == "common" else (0.01, 0.01)
            assert (trial.lr, trial.weight_decay) == rates
    elsewhere = trials["read elsewhere"].make_data(0)
    added = elsewhere.train["added"]
    held_out = torch.cat([elsewhere.train["held-out, trained"], elsewhere.test["held-out, asked"]])
    assert {*added[:, 1].tolist()} == {len(elsewhere.names) - 1}
    assert {*added[:, 0].tolist()} == {*held_out[:, [0, 2]].flatten().tolist()}
    assert len({*added[:, 2].tolist()}) == len(added)  # a target of its own, in no other sentence
    assert not {*added[:, 1:].flatten().tolist()} & {*held_out.flatten().tolist()}


def test_cures_are_measured(no_pictures, tmp_path):
    """Which trials run for which cures, what is measured of each, and what it has cost."""
    names = ["none", "either blank", "rule penalty", "untied bilinear", "tied GPT", "tied bilinear"]
    assert run_in(tmp_path, "cure", "--values", *names, **without(epochs=4)) == 0
    runs = read(tmp_path, "cure")["runs"]
    expected = [(name, setting) for name in names for setting in ("common", "paper")]
    expected.append(("tied bilinear", "no complete pairs"))
    assert [(one["cure"], one["setting"]) for one in runs] == expected
    keys = {"validation_accuracy", "validation_nll", "train_accuracy", "seen_accuracy", "seen_nll"}
    for one in runs:
        assert {"sentences", "steps", "parameters", "seconds"} == set(one["cost"])
        assert keys | {"matched_rank", "asked_cosine"} <= set(one["summary"])
        assert ("asymmetry" in one["summary"]) == ("bilinear" in one["cure"])
        assert one["expected"] is None or one["setting"] != "paper"
    assert (runs[0]["cost"]["sentences"], runs[0]["cost"]["steps"]) == (10, 12)
    with np.load(tmp_path / "cure.npz") as arrays:
        assert arrays["tied GPT: held-out, asked"].shape == (2, 2)


def test_cures_of_the_theory():
    """Of four trials the factorised one with x = x has no curse."""
    names = ["merged", "merged, x = x", "factorised", "factorised, x = x"]
    for one in run(cure(names, seeds=1, device="cpu"))["runs"]:
        cured, summary = one["cure"] == "factorised, x = x", one["summary"]
        assert one["setting"] == "theory" and summary["train_accuracy"]["mean"] == 1
        assert summary["validation_accuracy"]["mean"] == cured and one["outcome"] == one["expected"]


def test_what_cures_compute_by_hand():
    """The losses of either blank and of the rule penalty; the asymmetry of a bilinear matrix."""
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    sentences = torch.tensor([[2, 0, 8], [9, 1, 3]])
    log_p = table.log_softmax(-1)
    expected = -(log_p[0, 8] + log_p[1, 3] + log_p[0, 2] + log_p[1, 9]) / 2  # after the arrows
    found = revcurse.EitherBlank().batch_loss(table_model(table), sentences)
    assert found.item() == pytest.approx(expected.item())
    model = revcurse.EitherBlank(**TINY).make_model(reversal_data(24))
    assert not any(block.attn.causal for block in model.transformer.h)

    def linear(tokens, last=1):  # the logit of y after "x arrow" is 10 x + y + 100 arrow
        x, arrow = tokens[:, -last - 1], tokens[:, -last]
        return (10.0 * x + 100 * arrow)[:, None, None] + torch.arange(26)

    squares = [(9 * x - 9 * y - 100) ** 2 for x in (2, 8, 9, 3) for y in (2, 8, 9, 3)]
    answers = torch.arange(26.0).log_softmax(0)
    found = revcurse.RulePenalty().batch_loss(linear, sentences).item()
    assert found == pytest.approx(np.mean(squares) - (answers[8] + answers[3]).item() / 2, rel=1e-5)

    experiment, (model,), (data,) = untrained(revcurse.TiedBilinear(**TINY), (0,))
    model.M.data = torch.eye(16)
    model.M.data[0, 1] = 1.0
    numbers = experiment.measure(model, data, None, {0: experiment.evaluate(model, data)})
    assert numbers["asymmetry"] == pytest.approx(math.sqrt(2) / math.sqrt(4 * 16 + 2))


# --------------------------------------------------------------------------- Bad input, own facts
CAPITALS = [("Paris", "France"), ("Rome", "$\\foo$"), ("Oslo", "Norway"), ("Cairo", "Egypt")]
CAPITALS += [("Georgetown", "Guyana"), ("Lima", "Peru")]
LINES = "\n".join("\t".join(pair) for pair in CAPITALS)

BAD_FLAGS = {  # command: flags that it refuses, with an error that names the flag
    "reversal": "--dim 0 | --heads x | --epochs 0 | --seed -1 | --seed 18446744073709551615 | "
    "--lr nan | --lr inf | --lr 0 | --weight-decay -0.1 | --betas 1 0.9 | --dropout 1.5 | "
    "--dropout 1 | --device tpu | --seeds-at-once 0 | --resume | --epoch 3 | --facts no",
    "reversal --facts facts": "--vocab 400 | --out facts | --out facts/below",
    "ablate": "--layers 6",
    "ablate layers": "--layers 6 | --animate | --related-tokens",
    "ablate size": "--heads 2 | --cosine",
    "ablate embeddings": "--tie-embeddings --values learned frozen",
    "all": "--frobnicate | --dim 30 | --batch-size 0",
    "cure": "--entity-length 2 | --loss sequence",
    "icl": "--animate",
    "bilinear": "--lr 0",
    "onelayer": "--held-out 0",
}
BAD_LINES = {  # command line: what the error must hold
    "": "COMMAND",
    "reversal --dim 30": "dim 30: must be a multiple of 4",
    "reversal --dim 20 --position relative": "multiple of 8",
    "reversal --vocab 7": "vocab 7: ",
    "reversal --complete 180": "180 complete",
    "reversal --freeze-embeddings --tie-embeddings": "tied",
    "reversal --device cuda": "cuda",
    "reversal --facts facts --complete 6": "6 complete",
    "reversal --facts latin": "UTF-8",
    "reversal --facts three": "at least 4 pairs",
    "reversal --facts bad": "['c d']",
    "ablate dropout": "--values",
    "ablate layer": "entity-length, layers, heads",
    "ablate --values 1 2": "entity-length, layers",
    "ablate vocab --values 24 x": "--values x",
    "ablate lr --values 0.001,0.01": "blanks",
    "ablate vocab --values 24 3": "vocab 3",
    "ablate size --values 1x20 3": "1x256",
    "ablate related-tokens --values 30": "10, 20, 50",
    "ablate cosine --values 1": "has no values",
    "cure --values snake-oil": "snake-oil",
    "icl --vocab 12": "vocab 12",
    "icl --complete 0": "0 + 3",
    "chain --related-tokens --entity-length 2": "entity_length 1",
    "chain --related-tokens --vocab 100": "vocab 100",
    "bilinear --dims 16 0": "0: must be",
    "bilinear --symmetric --complete 3": "--complete: must be 0",
    "cure --vocab 80 --complete 0 --held-out 20": "held_out 20: too many",
    "plot none.json": "none.json",
}
for command, some in BAD_FLAGS.items():
    BAD_LINES |= {f"{command} {flag}": flag.split()[0] for flag in some.split(" | ")}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_input(tmp_path, monkeypatch, fails, line):
    """One line of error and status 2, before any file is written."""
    if line == "reversal --device cuda" and torch.cuda.is_available():
        pytest.skip("this device is here")
    monkeypatch.chdir(tmp_path)
    Path("reversal.json").write_text("earlier")
    Path("facts").write_text(LINES)
    Path("latin").write_bytes(b"a\tb\nc\t\xff\n")
    Path("three").write_text("a\tb\nc\td\ne\tf\n")
    Path("bad").write_text(f"{LINES}\nc d\n")
    before = contents(tmp_path)
    out = [] if "--out" in line or line in ("", "plot none.json") else ["--out", "."]
    fails(BAD_LINES[line], *line.split(), *out)
    assert contents(tmp_path) == before


def test_bad_settings_in_a_notebook(monkeypatch):
    """What the command line would not accept is refused in the same way."""

    class Quick(Reversal):  # without @dataclass Python ignores the new default
        epochs = 3

    @dataclass
    class Bare(Reversal):  # a field that is not made by `setting` is fine
        lr: float = -1.0

    class Uneven(Reversal):
        def make_data(self, seed):
            return reversal_data(24 + 4 * seed)

    class Twin(Cure):  # it has no name of its own
        pass

    wrong = [(Reversal(position="up"), "must be one of"), (Reversal(seeds=1.5), "whole number")]
    wrong += [(Bare(), "--lr -1.0"), (Uneven(seeds=2), "equally many")]
    wrong += [(Cure(entity_length=2), "one token"), (Chain(facts=CAPITALS), "triples")]
    for experiment, words in [*wrong, (Quick(seeds=1), "Quick.epochs")]:
        with pytest.raises(Problem, match=words):
            run(experiment)
    monkeypatch.setattr(revcurse, "CURES", [*revcurse.CURES, Twin])
    with pytest.raises(Problem, match="Twin: its name, 'none'"):
        cure()
    for facts in ([1, 2, 3, 4], ["ab", "cd", "ef", "gh"], [("a", 1)] * 4, 5):
        with pytest.raises(Problem, match="at least 4 pairs|two names"):
            Reversal(facts=facts)


def test_facts_from_anywhere_get_the_same_cleaning(tmp_path, monkeypatch, capsys):
    """Blanks, marks of Windows and two forms of "ã"; a name seen before leaves its pair out."""
    composed, loose = "S\u00e3o Tom\u00e9", unicodedata.normalize("NFD", "S\u00e3o Tom\u00e9")
    pairs = [*CAPITALS, (composed, "Africa"), (f" {loose}\u00a0", "Atlantic"), ("New  York", "US")]
    pairs += [("Djibouti", "Djibouti"), ("Lyon", "France")]
    lines = [f"{a}\t{b}" for a, b in pairs] + ["\t\t", " \t", ""]
    lines[3] = "\ufeff" + lines[3]  # two files joined to one
    file = tmp_path / "facts"
    file.write_bytes("\r\n".join(["\ufeff", *lines]).encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (pairs, file, str(file), "~/facts"):
        expected = (*CAPITALS, (composed, "Africa"), ("New York", "US"))
        assert composed != loose and Reversal(facts=source).facts == expected
        assert "3 pairs left out, with a name seen before: S" in capsys.readouterr().out


# --------------------------------------------------------------------- Files, pictures, notebooks


def test_a_thread_whose_output_is_replaced_and_a_home_folder(no_pictures, tmp_path, monkeypatch):
    """Some notebooks have no main thread and no file behind stdout; "~" is the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    thread = threading.Thread(target=run_in, args=("~/x", "reversal"), kwargs=TINY)
    thread.start()
    thread.join()
    assert "10 sentences" in sys.stdout.getvalue() and not Path("~").exists()
    assert (tmp_path / "home" / "x" / "reversal.json").exists()


def test_what_stops_a_run_leaves_earlier_results(no_pictures, tmp_path, fails, monkeypatch):
    """A loss that becomes NaN and too little memory are one line of advice."""
    line = ["reversal", *flags(**TINY), "--out", str(tmp_path)]
    assert main(line) == 0
    before = contents(tmp_path)
    fails("NaN at epoch", *line, "--lr", "1e8", "--seed", "5", status=1)
    monkeypatch.setattr(revcurse, "train", lambda *args: torch.empty(10**15))
    fails("memory: try a smaller --seeds-at-once or --batch-size", *line, status=1)
    assert contents(tmp_path) == before


def test_a_value_that_diverges_does_not_lose_the_sweep(tmp_path, capsys):
    """It is named in the output, the error, the file (without NaN) and the picture."""
    assert run_in(tmp_path, "ablate", "lr", values="0.003 1e8 0.01", **TINY) == 1
    output = capsys.readouterr()
    assert "diverged: lr 1e8" in output.out and "Holds: False" in output.out
    assert output.err.count("\n") == 1 and "lr 1e8" in output.err
    text = (tmp_path / "ablate-lr.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # of NaN and Infinity
    assert [one["outcome"] == "diverged" for one in results["runs"]] == [False, True, False]
    (axes,) = draw(results | {"matrices": {}})[".png"].axes
    assert "1e8: diverged" in [label.get_text() for label in axes.get_legend().get_texts()]
    assert run_in(tmp_path, "cure", values="none oracle", **TINY, lr=1e8) == 1
    assert (tmp_path / "cure.png").exists()


def test_pictures_fail_alone_and_are_drawn_again(tmp_path, monkeypatch, fails):
    """The numbers are safe, and `plot` draws from them the pictures that the run would have."""
    monkeypatch.chdir(tmp_path)
    Path("reversal_cosine.png").mkdir()  # in the way of the last picture
    line = ["reversal", "--animate", "--cosine", *flags(**without(epochs=1)), "--out", "."]
    fails("numbers are safe: revcurse.py plot", *line, status=1)
    drawn = contents(tmp_path)  # before it failed
    for end in ("json", "npz"):  # names with dots stay apart
        Path(f"reversal.{end}").rename(f"run_lr0.01.{end}")
    assert main(["plot", "run_lr0.01.json"]) == 0
    for end in (".png", ".gif", "_weights.png"):
        assert Path(f"run_lr0.01{end}").read_bytes() == drawn[f"reversal{end}"]
    assert "run_lr0.01_cosine.png" in contents(tmp_path)


class Evil:  # makes a file when it is unpickled
    def __reduce__(self):
        return open, ("marker", "w")


def test_bad_results_to_plot(tmp_path, fails, monkeypatch):
    """Damaged, foreign, evil and missing files are one line, and nothing is drawn or run."""
    monkeypatch.chdir(tmp_path)
    assert run_in(".", "reversal", **TINY) == 0
    good = contents(tmp_path)
    np.savez("evil.npz", **{"complete A -> B": np.array([Evil()])})
    text, arrays, evil = good["reversal.json"], good["reversal.npz"], Path("evil.npz").read_bytes()
    bad = [(text[:200], arrays), (b"[1]", arrays), (b"{}", arrays)]
    bad += [(text, arrays[:-40]), (text, evil), (text, None)]
    for numbers, matrices in bad:
        Path("reversal.json").write_bytes(numbers)
        Path("reversal.npz").unlink()
        if matrices is not None:
            Path("reversal.npz").write_bytes(matrices)
        fails("not a results file", "plot", "reversal.json")
        assert Path("reversal.png").read_bytes() == good["reversal.png"]
        assert not Path("marker").exists()


def test_pictures_in_the_users_style_and_of_strange_names(capsys):
    """Only the font is the user's; one without the letters is one hint; long names are cut."""
    facts = [(f"The city with the number {i}", f"\u4eac{i}") for i in range(40)]
    results = run(Reversal(facts=facts, **without("vocab", epochs=1)))
    pairs = [pair for role in results["names"].values() for pair in role]
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in facts}
    ugly = {"figure.autolayout": True, "axes.grid": True, "image.origin": "lower", "font.size": 20}
    ugly |= {"axes.facecolor": "black", "savefig.facecolor": "black", "text.color": "white"}
    figures = draw(results)
    plain = figures.files()
    assert capsys.readouterr().out.count("font.family") == 1
    with revcurse.matplotlib.rc_context(ugly):
        assert draw(results).files() == plain
    with revcurse.matplotlib.rc_context({"font.family": "monospace"}):
        assert draw(results)._repr_png_() != plain[".png"]
    axes = figures["_weights.png"].axes[0]
    labels, (low, high) = axes.get_yticklabels(), axes.images[0].get_clim()
    shown = [f"{read[:16]}..." for read, _ in results["names"]["complete A -> B"]]
    assert [label.get_text() for label in labels] == shown
    assert low == -high and len(labels) == 28 and labels[0].get_fontsize() * 28 < 140


def test_subclasses_change_one_method():
    """An optimizer and a drawing, defaults, data of other roles, and a model of one's own."""

    class Slow(Reversal):
        def make_optimizer(self, weights):
            return torch.optim.SGD(weights, self.lr, momentum=0.9)

        def draw(self, results):
            return results["value"]

    @dataclass
    class Short(Slow):
        epochs: int = setting(3, "passes")

    class Groups(Reversal):
        def make_data(self, seed):
            data = super().make_data(seed)
            asked = data.test.pop("held-out, asked")
            data.test |= {"first": asked[:1], "second": asked[1:]}
            return data

    class Odd(nn.Linear):
        def forward(self, tokens, last=1):
            if self.bias.sum() > 100:  # vmap cannot decide for many models at once
                return tokens
            return self.bias.expand(*tokens[:, -last:].shape, 26)

    class Own(Reversal):
        def make_model(self, data):
            return Odd(1, 26)

    class Buffers(Reversal):
        def make_model(self, data):
            return nn.BatchNorm1d(26)

    settings = without("epochs", lr=0.1)
    results = run(Short(**settings))
    assert results["curves"]["epoch"] == [0, 1, 2, 3] and draw(results) == "reversal"
    slow, fast = run(Slow(**settings, epochs=3)), run(Reversal(**settings, epochs=3))
    assert results["summary"] == slow["summary"] != fast["summary"]
    figures = draw(run(Groups(**TINY)))
    assert figures._repr_html_().count("<img") == 2
    assert len(figures["_weights.png"].axes) == 5 + 2  # five maps, their scale, curves
    with pytest.raises(Problem, match="--seeds-at-once 1 trains it"):
        run(Own(**TINY))
    results = run(Own(**TINY, seeds_at_once=1))
    assert "asked_cosine" not in results["summary"] and "never an input" not in results["verdict"]
    with pytest.raises(Problem, match="buffers"):
        run(Buffers(**TINY))


# ----------------------------------------------------------------- Checkpoints, processes, README
CHECKPOINT = ".reversal.reversal, from seed {}.pt"
SLOW = """
import signal, sys, time, revcurse
signal.signal(signal.SIGINT, signal.default_int_handler)
torch, clock, save = revcurse.torch, [0], revcurse.torch.save
class Slow(torch.optim.AdamW):
    def step(self):
        time.sleep(0.02)
        clock[0] += 100
        super().step()
def slow_save(state, path):
    save(state, path)
    time.sleep(0.3 if "seed 1" in str(path) else 0)
torch.optim.AdamW, torch.save = Slow, slow_save
revcurse.time.monotonic = lambda: clock[0]
sys.exit(revcurse.main(sys.argv[1:]))
"""  # steps take longer, and by the clock so long that a checkpoint is due after each epoch


def start(shell, *words, **environment):
    """Start Python in a shell, whose "$@" is the interpreter and these words."""
    line = ["bash", "-c", shell, "bash", sys.executable, *map(str, words)]
    return subprocess.Popen(line, cwd=HERE, env=os.environ | environment, **PIPES)


@posix
def test_killed_and_given_again_is_the_same_as_uninterrupted(no_pictures, tmp_path, fails, capsys):
    """Killed while it writes, interrupted, given again: equal numbers, and no file is left."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    line = ["reversal", "--animate", *flags(**TINY, dropout=0.1, seeds_at_once=1), "--out"]
    assert main([*line, str(whole)]) == 0
    second = broken / CHECKPOINT.format(1)
    process = start('exec "$@" >&-', "-c", SLOW, *line, broken)  # its output is closed
    while not (second.exists() and list(broken.glob(".*tmp*seed 1.pt"))):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9 and list(broken.glob(".*tmp*"))
    stamp = second.stat().st_mtime_ns
    process = start('exec "$@" > >(true)', "-c", SLOW, *line, broken)  # nobody reads its output
    while second.stat().st_mtime_ns == stamp:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    before = second.read_bytes()
    other = f"{broken / CHECKPOINT.format(0)}: does not fit (lr 0.003, now 0.02)"
    fails(other, *line, broken, "--lr", "0.02")
    fails("seeds [0], now [0, 1]", *line, broken, "--seeds-at-once", "2")
    mine = broken / CHECKPOINT.format(7)
    mine.write_bytes(before)  # of an unfinished run of other seeds
    living = broken / f".{os.getppid()}.tmp.reversal.json"  # what another process is writing
    living.write_text("half")
    assert main([*line, str(broken), "--seed", "3"]) == 0
    assert mine.exists() and second.read_bytes() == before
    assert main([*line, str(broken)]) == 0
    printed = capsys.readouterr().out
    assert "seed 0: going on after epoch 12" in printed and "seed 1: going on after" in printed
    assert read(broken)["summary"] == read(whole)["summary"]
    assert contents(broken).keys() == contents(whole).keys() | {mine.name, living.name}
    with np.load(whole / "reversal.npz") as one, np.load(broken / "reversal.npz") as other:
        assert "frames held-out, asked" in one
        assert all((one[name] == other[name]).all() for name in one)


@posix
def test_a_full_disk_does_not_end_the_training(tmp_path):
    """With 60 KB a file neither checkpoint nor picture can be written: nothing half is left."""
    (tmp_path / "reversal_weights.png").write_text("earlier")
    process = start('ulimit -f 60; "$@"', "-c", SLOW, "reversal", *flags(**TINY), "--out", tmp_path)
    printed, error = process.communicate(timeout=60)
    assert printed.count("no checkpoint can be written") == 1
    assert process.returncode == 1 and error.count("\n") == 1 and "a picture failed" in error
    names = {"reversal.json", "reversal.npz", "reversal.png", "reversal_weights.png"}
    assert set(contents(tmp_path)) == names  # the first picture is small enough
    assert (tmp_path / "reversal_weights.png").read_text() == "earlier"


def test_damaged_foreign_and_evil_checkpoints(tmp_path, fails, monkeypatch):
    """Each is named, with the advice to delete it, and runs no code."""
    monkeypatch.chdir(tmp_path)
    file = Path(CHECKPOINT.format(0))
    for state in (None, [Evil()], {"settings": {}, "epoch": 3}):
        torch.save(state, file)
        if state is None:
            file.write_bytes(b"x")
        fails(f"{file}: does not fit (damaged", "reversal", *flags(**TINY), "--out", ".")
        assert list(contents(tmp_path)) == [file.name]


def test_progress_and_checkpoints_by_a_clock(no_pictures, tmp_path, capsys, monkeypatch):
    """A line each 5 seconds; a checkpoint after 30, then so that saving takes a twentieth."""
    clock, saves = [1000.0], []

    def loss_in_a_second(self, model, sentences):
        clock[0] += 1
        return nll(model, sentences)

    def save_in_two_seconds(state, path):
        saves.append(clock[0])
        clock[0] += 2
        Path(path).write_text("")
        if len(saves) > 1:
            raise OSError("disk full")

    monkeypatch.setattr(revcurse.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Reversal, "batch_loss", loss_in_a_second)
    monkeypatch.setattr(torch, "save", save_in_two_seconds)
    settings = without("quiet", epochs=120, batch_size=10, seeds=1)  # one step an epoch
    assert run_in(tmp_path, "reversal", **settings) == 0
    printed = capsys.readouterr().out
    assert printed.count("no checkpoint can be written (disk full); the training goes on") == 1
    curves = read(tmp_path)["curves"]
    loss = curves["train_nll"][0][curves["epoch"].index(5)]
    told = re.findall("seed 0: epoch (.*) of 120, NLL of what is trained (.*), (.*) s", printed)
    assert told[0] == ("5", f"{loss:.3f}", "5") and told[1][::2] == ("10", "10")
    assert set(contents(tmp_path)) == {"reversal.json", "reversal.npz"}
    run(Reversal(**settings, quiet=True))  # in a notebook none is saved; quiet says nothing
    assert saves == [1030, 1072, 1114] and " of 120" not in capsys.readouterr().out


@posix
def test_groups_of_seeds_and_processes_give_the_same_numbers(no_pictures, tmp_path, monkeypatch):
    """A notebook writes no file and gets the models; groups and torchrun divide the seeds."""
    line = ["reversal", *flags(**without(seeds=3)), "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start('"$@"', *torchrun, HERE / "revcurse.py", *line, tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    results = run(Reversal(**without(seeds=3)))
    assert not {"figures", "reversal.json"} & set(contents(tmp_path))
    found = evaluate(results["models"][1], reversal_data(24, seed=1).train_sentences(), 1)
    expected = results["summary"]["train_nll"]["per_seed"][1]
    assert found.nll.mean().item() == pytest.approx(expected, rel=1e-5)
    assert main([*line, "one"]) == main([*line, "groups", "--seeds-at-once", "2"]) == 0
    one = read(Path("one"))
    for name in ("summary", "curves", "weights", "counts", "chance"):
        assert one[name] == json.loads(json.dumps(results[name]))
    printed, error = process.communicate(timeout=90)
    assert process.returncode == 0 and printed.count("waiting for the other") == 1, error
    for other in ("groups", "two"):
        for name, number in read(Path(other))["summary"].items():
            assert number["per_seed"] == pytest.approx(one["summary"][name]["per_seed"], rel=1e-3)


def test_processes_that_have_nothing_to_do_say_so(tmp_path, fails, monkeypatch):
    """A process that torchrun has not started, one without a seed, and one without a GPU."""

    def no_gpu(number):
        raise RuntimeError(f"CUDA error: invalid device ordinal {number}\nmore")

    line = ["reversal", *flags(**without("device")), "--out", tmp_path]
    for left in ("RANK", "WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(left, "1")
            fails("RANK", *line)
    assert not contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(revcurse, "place", lambda: (1, 2))
        fails("process 1 of 2: has no seed", *line, "--seeds", "1", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "set_device", no_gpu)
    monkeypatch.setenv("LOCAL_RANK", "3")
    fails("process 3 finds none (CUDA error: invalid device ordinal 3)", *line, "--device", "cuda")


@posix
def test_a_strange_environment(tmp_path):
    """No home, no encoding, no backend, warnings as errors, and facts that can be read but once."""
    folder, home = tmp_path / "\u017b", {"HOME": "/nowhere", "MPLCONFIGDIR": "/nowhere"}
    line = ["revcurse.py", "ablate", "layers", "--values", "1", "2", "--out", folder]
    process = start(
        '"$@" --facts <(printf "%s" "$FACTS")',
        *[*line, *flags(**without("vocab", "layers", epochs=2))],
        **home | {"MPLBACKEND": "module://missing", "PYTHONIOENCODING": "cp1252"},
        **{"PYTHONWARNINGS": "error", "FACTS": f"\u0160\u00e1rka\t\u017b\u00f3\u0142w\n{LINES}"},
    )
    printed, error = process.communicate(timeout=90)
    assert (process.returncode, error) == (0, "") and "ablate-layers.json" in printed
    assert [one["config"]["vocab"] for one in read(folder, "ablate-layers")["runs"]] == [28, 28]
    assert set(contents(folder)) == {"ablate-layers.json", "ablate-layers.png"}


def test_help_is_complete(capsys):
    """Every command has its help, in lines of 100, with the defaults that hold there."""
    bare = {"__name__": "bare"}  # the program without docstrings, as by `python -OO`
    code = compile((HERE / "revcurse.py").read_text(), "revcurse.py", "exec", optimize=2)
    exec(code, bare)
    for name in (None, *revcurse.COMMANDS, "plot"):
        with pytest.raises(SystemExit) as stopped:
            bare["main"]([name, "--help"] if name else ["--help"])
        text = capsys.readouterr().out
        assert stopped.value.code == 0 and "None" not in text
        assert max(map(len, text.splitlines())) <= 100
        assert name is not None or "Figures 1 and 2" in text
        if name in ("reversal", "cure"):
            assert "[64] [paper: 768]" in " ".join(text.split())


def test_import_changes_nothing_and_needs_what_is_declared():
    """The state of the interpreter before and after; the libraries in the headers of both files."""
    script = """import os, sys, torch
os.environ["MPLBACKEND"] = "agg"
def state(): return dict(os.environ), torch.get_num_threads(), torch.get_float32_matmul_precision()
before = state(); import revcurse; assert before == state()
assert revcurse.matplotlib.rcParams["backend"] == "agg"
assert "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", script], cwd=HERE, check=True)
    headers = [(HERE / name).read_text() for name in ("revcurse.py", "test_revcurse.py")]
    declared = [re.search(r'dependencies = \[(.*?)(, "pytest.*)?\]', text)[1] for text in headers]
    assert declared[0] == declared[1]


def as_range(numbers, digits):
    """As the README writes the range of some numbers."""
    low, high = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def test_the_numbers_of_the_readme_are_those_of_the_results():
    """Rows of tables and numbers in sentences of both README, from the files in figures/."""
    text, folder = (HERE / "README.md").read_text(), HERE / "figures"
    flat = " ".join(text.split())  # without line breaks
    runs = {one["value"]: one for one in read(folder, "cure")["runs"]}
    for name, one in runs.items():
        rank = f"{one['summary']['matched_rank']['mean']:.2f}"
        accuracy = one["summary"]["validation_accuracy"]
        if one["setting"] == "common":
            paper = runs[f"{name}, as in the paper"]["summary"]["validation_accuracy"]
            ours, theirs = (f"{each['mean']:.2f} ({each['std']:.2f})" for each in (accuracy, paper))
            star = "*" if runs[f"{name}, as in the paper"]["outcome"] == "not learned" else ""
            cells = [name, one["supervision"], ours, rank, f"{theirs}{star}"]
            assert f"| {' | '.join(cells)} |" in text
        if one["setting"] == "no complete pairs":
            assert f"{accuracy['mean']:.2f} ({one['cure']}, matched rank {rank})" in flat

    trials = read(folder, "ablate")["runs"] + read(folder, "ablate-chain")["runs"]
    trials = [one for one in trials if not one["value"].startswith("related-tokens")]

    def means(key, tied):
        chosen = [one["summary"][key]["mean"] for one in trials if ("tied" in one["value"]) == tied]
        return [mean for mean in chosen if mean is not None]

    trained, asked = (means(key, 0) + means(key, 1) for key in ("train_nll", "validation_nll"))
    assert f"In all {len(trials)} trainings the trained NLL ends at {max(trained):.3f}" in flat
    assert (
        f"the asked at {min(asked):.2f} or more" in flat
        and max(means("validation_accuracy", 0)) == 0
    )
    assert f"and the matched rank {as_range(means('matched_rank', 0), 2)}." in flat
    (rank, chain), (accuracy, some) = means("matched_rank", 1), means("validation_accuracy", 1)
    words = f"rank is {rank:.2f} (chain: {chain:.2f}) and the accuracy {accuracy:.3f} ({some:.3f})"
    assert words in flat

    summary = read(folder)["summary"]
    ranks, cosines = summary["matched_rank"], summary["asked_cosine"]["per_seed"]
    assert f"{ranks['mean']:.3f} ({as_range(ranks['per_seed'], 3)} over the seeds)" in flat
    assert f"is at least {min(cosines):.7f}" in flat
    free = [one for one in read(folder, "bilinear")["runs"] if not one["symmetric"]]
    low, high = free[-1]["epsilon"], free[0]["epsilon"]
    assert f"epsilon is {high:.2f} for d = 16 and {low:.4f} for d = 1024" in flat
    bound = min(min(one["theorem_2"]["0.01"]) for one in free if one["dim"] >= 64)
    assert f"at least {bound:.2f} for d from 64 on" in flat
    large = read(folder / "paper-size")
    mean = {name: number["mean"] for name, number in large["summary"].items()}
    words = f"took {large['seconds']:.0f} s: {mean['train_accuracy']:.1%} of the trained sentences "
    words += f"and {mean['validation_accuracy']:.1%} of the reversals are answered, with NLL "
    words += f"{mean['validation_nll']:.1f} and matched rank {mean['matched_rank']:.3f}"
    assert words in flat.replace(" %", "%")
    summary = read(folder / "paper-size", "chain")["summary"]
    names = ("train_accuracy", "validation_accuracy", "two_step_accuracy")
    learned, asked, steps = (f"{summary[name]['mean']:.1%}" for name in names)
    assert f"{learned}, {asked} of the asked, and {steps} in two" in flat.replace(" %", "%")
    gallery = (folder / "README.md").read_text()
    for claim in read(folder, "all")["claims"]:
        cells = [claim["figure"], claim["expected"], claim["seen"]]
        assert f"| {' | '.join(cells)} | {'yes' if claim['holds'] else '**no**'} |" in gallery


def test_recipes_of_the_readme(recipes):
    """The Python that the README shows runs as it stands."""
    _, error = recipes.communicate(timeout=300)
    assert (recipes.returncode, error) == (0, "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("line", ["reversal --animate", "chain --entity-length 2", "icl"])
def test_cuda_agrees_with_the_cpu_and_exactly_with_itself(tmp_path, line):
    """On a GPU the numbers are those of the CPU, but for rounding, and the same each time."""
    found = {}
    for folder, device in (("one", "cpu"), ("two", "cuda"), ("three", "cuda")):
        assert run_in(tmp_path / folder, *line.split(), **TINY | {"device": device}) == 0
        found[folder] = read(tmp_path / folder, line.split()[0])["summary"]
    assert found["two"] == found["three"]
    for key in ("train_nll", "validation_nll"):
        near = pytest.approx(found["one"][key]["per_seed"], abs=0.05, rel=0.02)
        assert found["two"][key]["per_seed"] == near


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-W", "error", *sys.argv[1:]]))
