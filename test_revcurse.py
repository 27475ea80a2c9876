# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.4.1", "numpy>=1.26.0", "matplotlib>=3.8.0", "pytest>=7.4.0"]
# ///
"""Tests of revcurse.py: `python test_revcurse.py`, or pytest. About two minutes on two cores."""

import copy
import functools
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models gain nothing from more, and may share the cores

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import revcurse
from revcurse import (GPT, Bilinear, OneLayer, Trainer, chain_data, icl_data, main, nll, rank,
                      reversal_data)

HERE = Path(__file__).parent
TINY = ["--vocab", "24", "--layers", "1", "--heads", "2", "--dim", "16", "--epochs", "12",
        "--seeds", "2", "--batch-size", "4"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.01, fused=True)


FRAMES = {"record": functools.partial(revcurse.logit_matrices, seeds=1), "record_every": 3}


def tiny_trainer(*seeds, vocab=24, k=1, epochs=3, dropout=0.0, optimizer=adamw, **options):
    gens = generators(*seeds)
    data = [reversal_data(vocab, k, generator=g) for g in gens]
    models = [GPT(vocab + 2, 2 * k, 2, 2, 16, dropout=dropout, generator=g) for g in gens]
    return Trainer(models, data, gens, optimizer, epochs=epochs, batch_size=4, **options), data


def run_in(folder, *argv):
    """Run a command line in this process: its exit status."""
    try:
        return main([*argv, "--out", str(folder)])
    except SystemExit as stop:
        return stop.code


# ------------------------------------------------------------------------------------------- Data

# vocab, entity length: training and validation sentences, as the paper's captions have them
COUNTS = {(20, 1): (9, 1), (50, 1): (20, 4), (200, 1): (85, 15), (800, 1): (340, 60),
          (2000, 1): (850, 150), (800, 2): (680, 120), (800, 3): (250, 50)}


@pytest.mark.parametrize("size", COUNTS, ids=str)
def test_data_is_the_papers(size):
    vocab, k = size
    data = reversal_data(vocab, k, generator=torch.Generator().manual_seed(1))
    assert (len(data.train), len(data.validation)) == COUNTS[size]
    train = [tuple(s) for s in data.train.tolist()]
    assert len(set(train)) == len(train)

    letters_a, letters_b = (set(row) for row in data.alphabets.tolist())
    assert len(letters_a) == len(letters_b) == vocab // 4 and not letters_a & letters_b
    assert min(letters_a | letters_b) >= 2 and max(letters_a | letters_b) < vocab + 2
    facts = {}  # (A, B): directions that are trained
    for s in train:
        left, arrow, right = s[:k], s[k], s[k + 1:]
        a, b = (left, right) if arrow == 0 else (right, left)
        assert set(a) <= letters_a and set(b) <= letters_b
        facts.setdefault((a, b), set()).add(arrow)
    assert len({a for a, _ in facts}) == len({b for _, b in facts}) == len(facts)  # one to one
    for s in data.validation.tolist():  # the reverse is trained, the sentence itself is not
        left, arrow, right = tuple(s[:k]), s[k], tuple(s[k + 1:])
        assert facts.pop((left, right) if arrow == 0 else (right, left)) == {1 - arrow}
    assert all(arrows == {0, 1} for arrows in facts.values())


def test_data_is_reproducible_and_its_coin_is_fair():
    one, same, other = (reversal_data(800, generator=g) for g in generators(5, 5, 6))
    assert torch.equal(one.train, same.train) and torch.equal(one.validation, same.validation)
    assert not torch.equal(one.train, other.train)
    arrows = torch.cat([reversal_data(800, generator=g).validation[:, 1]
                        for g in generators(*range(20))])  # 1200 tosses: 5 sigma are 0.072
    assert abs(arrows.float().mean() - 0.5) < 0.072


def test_data_of_long_entities_never_builds_the_product():
    data = reversal_data(800, 12, 30, 20, torch.Generator().manual_seed(0))  # of 200**12 tuples
    assert data.train.shape == (80, 25) and data.validation.shape == (20, 25)


def test_data_names_and_groups():
    data = reversal_data(24, generator=torch.Generator().manual_seed(0))
    named = [[data.names[t] for t in s] for s in data.groups["train_forward"].tolist()]
    assert named == [[f"A{i}", "->", f"B{i}"] for i in range(4)]
    seen, unseen = data.groups["validation_seen"], data.groups["validation_unseen"]
    assert torch.equal(seen[:, [0, 2]], unseen[:, [2, 0]])  # row by row the same pair
    assert torch.equal(torch.cat([data.groups[g] for g in list(data.groups)[:3]]), data.train)


# vocab, entity length, complete (None: not related): training and validation sentences
CHAINS = {(800, 1, None): (540, 60), (20, 1, None): (14, 1), (800, 2, None): (1080, 120),
          (800, 3, None): (400, 50), (800, 2, 200): (700, 50),
          **{(800, 2, n): (3 * n + 100, 50) for n in (10, 20, 50, 100, 500)}}


@pytest.mark.parametrize("size", CHAINS, ids=str)
def test_chain_data_is_the_papers(size):
    vocab, k, related = size
    g = torch.Generator().manual_seed(1)
    data = (chain_data(vocab, k, generator=g) if related is None else
            chain_data(vocab, complete=related, related_tokens=True, generator=g))
    assert data.answer_length == k
    assert (len(data.train), len(data.validation)) == CHAINS[size]
    train = {(tuple(s[:k]), s[k], tuple(s[k + 1:])) for s in data.train.tolist()}
    asked = {(tuple(s[:k]), s[k], tuple(s[k + 1:])) for s in data.validation.tolist()}
    assert len(train) == len(data.train) and len(asked) == len(data.validation)
    assert not train & asked
    step = {left: right for left, arrow, right in train if arrow == 0}
    implied = {(left, right) for left, arrow, right in train | asked if arrow == 1}
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
        assert data.graded == 1


def test_icl_data_is_the_papers():
    data = icl_data(generator=torch.Generator().manual_seed(1))
    assert (len(data.train), len(data.validation), len(data.names)) == (700, 300, 403)
    assert data.train.shape[1] == 7
    pairs = {"train": set(), "validation": set()}
    for part, sentences in data.groups.items():
        for a, forward, b, same, b2, backward, a2 in sentences.tolist():
            assert (forward, backward, same, a, b) == (0, 1, 2, a2, b2) and min(a, b) > 2
            pairs[part].add((a, b))
    assert len(pairs["train"]) == 700 and len(pairs["validation"]) == 300
    both = pairs["train"] | pairs["validation"]
    assert len(both) == 1000  # no pair is in both
    letters_a, letters_b = {a for a, _ in both}, {b for _, b in both}
    assert len(letters_a) == 100 and len(letters_b) == 10 and not letters_a & letters_b
    asked = {a: frozenset(b for a2, b in pairs["validation"] if a2 == a) for a in letters_a}
    assert all(len(others) == 3 for others in asked.values())
    assert len(set(asked.values())) > 20  # of 120: each A has its own three
    assert sorted(data.alphabets.flatten().tolist()) == sorted(letters_a)


def test_the_smallest_icl_data():
    assert len(icl_data(13).train) == 3 * 7
    with pytest.raises(ValueError, match="need 13 or more"):
        icl_data(12)


def test_names_of_chain_and_icl():
    def words(data, group):
        return [[data.names[t] for t in s] for s in data.groups[group].tolist()]

    g = torch.Generator().manual_seed(0)
    chain = chain_data(24, generator=g)
    assert words(chain, "train_ab")[1] == ["A1", "->", "B1"]
    assert words(chain, "validation_ac")[0] == ["A4", "~>", "C4"]
    related = chain_data(24, complete=4, held_out=2, related_tokens=True, generator=g)
    assert words(related, "validation_bc")[0] == ["b", "i4", "->", "c", "i4"]
    a, forward, b, same, b2, backward, a2 = words(icl_data(40, generator=g), "train")[7]
    assert (a, forward, same, backward, a2) == ("A1", "->", "<=>", "<-", "A1") and b == b2


@pytest.mark.parametrize("facts", [[(f"capital {i}", f"country {i}") for i in range(6)],
                                   [(f"B{i}", f"A{i}") for i in range(6)]], ids=["plain", "ours"])
def test_names_of_the_users_pairs(facts):
    drawn = set()
    for g in generators(0, 1, 2):
        data = revcurse.name_pairs(reversal_data(24, generator=g), facts, g)
        pairs = [(data.names[s[0]], data.names[s[2]]) for s in data.train.tolist() if s[1] == 0]
        pairs += [(data.names[s[2]], data.names[s[0]]) for s in data.train.tolist() if s[1] == 1]
        assert set(pairs) == set(facts)
        drawn.add(data.names[data.validation[0, 0]])
    assert len(drawn) > 1  # not the same pair is held out for every seed


@pytest.mark.parametrize("make, name", [
    (lambda: reversal_data(7), "vocab 7"), (lambda: chain_data(7), "vocab 7"),
    (lambda: chain_data(100, related_tokens=True), "vocab 100"),
    (lambda: icl_data(12), "vocab 12"), (lambda: reversal_data(24, 1, 6, 1), "complete 6")])
def test_data_errors_begin_with_the_parameter(make, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        make()


# ----------------------------------------------------------------------------------------- Theory


def bilinear_trainer(dim, seeds=10, vocab=40, lr=0.08, epochs=300, symmetric=False, span=True):
    """Pairs (2i, 2i + 1) of all tokens: trained from left to right, asked from right to left."""
    gens = generators(*range(seeds))
    pairs = torch.arange(vocab).view(-1, 2)
    data = [revcurse.Dataset({"forward": pairs, "reversal": pairs.flip(1)}, pairs.T, [""] * vocab)
            for _ in gens]
    models = [Bilinear(dim, vocab, 0.01, g, symmetric) for g in gens]
    models = [revcurse.in_span(model) for model in models] if span else models
    return Trainer(models, data, gens, lambda p: torch.optim.SGD(p, lr=lr * len(pairs)),
                   epochs=epochs, batch_size=len(pairs))


def test_bilinear_logits_are_those_of_the_loops():
    model = Bilinear(5, 7, 1.0, torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, 0, 6], [1, 1, 2]])
    logits = model(tokens)
    assert logits.shape == (2, 3, 7) and logits.dtype == torch.float64
    E, theta = model.embeddings.tolist(), model.Theta.tolist()
    for (row, column), x in np.ndenumerate(tokens.numpy()):
        for y in range(7):
            expected = sum(E[x][a] * theta[a][b] * E[y][b] for a in range(5) for b in range(5))
            assert math.isclose(logits[row, column, y].item(), expected, abs_tol=1e-12)
    assert torch.allclose(model(tokens, 2), logits[:, 1:])
    assert torch.allclose(model(tokens[0, 0]), logits[0, 0])


def test_bilinear_is_drawn_as_the_paper_says():
    model = Bilinear(400, 500, 0.3, torch.Generator().manual_seed(0))
    assert math.isclose(model.embeddings.var().item(), 1 / 400, rel_tol=0.02)
    assert math.isclose(model.Theta.var().item(), 0.09, rel_tol=0.02)
    assert [name for name, _ in model.named_parameters()] == ["Theta"]
    again = Bilinear(400, 500, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(model.embeddings, again.embeddings) and torch.equal(model.Theta, again.Theta)
    with pytest.raises(ValueError, match="dim 0"):
        Bilinear(0, 5)


def test_gradient_of_one_pair_by_hand():
    model = Bilinear(6, 9, 0.5, torch.Generator().manual_seed(1))
    nll(model(torch.tensor([4])), torch.tensor([7])).sum().backward()
    E, theta = model.embeddings, model.Theta.detach()
    x, y = E[4], E[7]
    weights = [math.exp(x @ theta @ v) for v in E]
    mean = sum(w * v for w, v in zip(weights, E, strict=True)) / sum(weights)
    torch.testing.assert_close(model.Theta.grad, -torch.outer(x, y - mean), rtol=0, atol=1e-12)


def test_symmetric_is_the_mean_of_theta_and_its_transpose():
    model = Bilinear(4, 9, 1.0, torch.Generator().manual_seed(0), symmetric=True)
    E, theta = model.embeddings, model.Theta
    torch.testing.assert_close(model(torch.arange(9)), E @ ((theta + theta.mT) / 2) @ E.mT)


def test_asymmetry_by_hand():
    trainer = bilinear_trainer(3, 2, vocab=8)
    trainer.params["Theta"].data[:] = torch.tensor([[0.0, 3, 0], [-1, 0, 0], [0, 0, 2]])
    expected = math.sqrt((4**2 + 4**2) / (3**2 + 1 + 2**2))
    assert revcurse.asymmetry(trainer)["asymmetry"].tolist() == pytest.approx([expected] * 2)
    trainer.params["Theta"].data.zero_()
    assert revcurse.asymmetry(trainer)["asymmetry"].tolist() == [0, 0]


def test_slopes_by_hand():
    runs = [{"dim": d, "symmetric": False, "reversal_shift": shift, "reversal_nll_min": 2.0,
             "epsilon": 0.1, "epsilon_end": 0.1, "value": f"dim {d}", "chance": {"vocabulary": 3.0},
             "curves": {"forward_nll": [[3.0, 0.1]], "reversal_nll": [[3.0, 2.5]]}}
            for d, shift in [(10, 8), (20, 1), (40, 0.5)]]
    runs += [{**runs[0], "symmetric": True, "reversal_nll_min": 0.1,
              "curves": {"forward_nll": [[3.0, 0.1]], "reversal_nll": [[3.0, 0.3]]}}]
    results = {"config": {"vocab": 20}, "runs": runs}
    revcurse.conclude_bilinear(results)
    assert (results["slope"], results["slope_large"]) == pytest.approx((-2, -1))
    for text in ("dim^-2.0;", "dim^-1.0 for", "never below 2.000, 66.7%", "ends at 10.0% of"):
        assert text in results["verdict"]


def test_results_of_a_dimension_by_hand(tmp_path):
    run = next(revcurse.bilinear_runs(revcurse.parse([*BILINEAR, "--sigma", "0.5"])))
    model = run.make_model(run.datasets[0], run.generators[0])
    assert abs(model.Theta.std() / 0.5 - 1) < 0.3
    trainer = revcurse.make_trainer(run, [0, 1, 2])
    trainer.run()
    trainer.curves[1, 0, 2, 1] = 0.5  # once, the reversal NLL of the second seed
    part = revcurse.collect((0, [0, 1, 2]), run, trainer, 1.0)
    results, arrays = revcurse.assemble(run, [part])
    source, target = trainer.groups["forward"][0].T
    logits = trainer.logits(trainer.groups["forward"][..., :1], 1)[0, :, 0]
    torch.testing.assert_close(arrays["forward"], logits[:, target].detach())
    assert results["reversal_nll_min"] == 0.5
    f, r = (trainer.curves[i, 0].tolist() for i in (0, 1))  # (points, S)
    expected = max(math.log(r[i][s] / r[0][s]) / math.log(f[i][s] / f[0][s])
                   for i in range(1, len(f)) for s in range(3))
    assert math.isclose(results["epsilon"], expected) and expected > 0.5
    assert results["epsilon_end"] < 0.5


def test_symmetric_theta_has_equal_forward_and_reverse_logits():
    options = {"sigma": 1.0, "generator": torch.Generator().manual_seed(0), "symmetric": True}
    logits = Bilinear(4, 9, **options)(torch.arange(9))  # (x, y)
    assert torch.allclose(logits, logits.T, atol=1e-14) and logits.std() > 0.1
    plain = Bilinear(4, 9, **options | {"symmetric": False})(torch.arange(9))
    assert (plain - plain.T).abs().max() > 0.1


@pytest.mark.parametrize("symmetric", [False, True])
def test_span_of_the_tokens_has_all_that_counts(symmetric):
    full, short = (bilinear_trainer(50, 2, vocab=12, epochs=60, symmetric=symmetric, span=span)
                   for span in (False, True))
    assert [trainer.params["Theta"].shape[1] for trainer in (full, short)] == [50, 12]
    for trainer in (full, short):
        trainer.run()
    torch.testing.assert_close(full.curves, short.curves, rtol=0, atol=1e-10)
    torch.testing.assert_close(*(revcurse.logit_matrices(trainer)["reversal"]
                                 for trainer in (full, short)), rtol=0, atol=1e-10)
    assert full.curves[0, 0, -1].max() < 1.5 < full.curves[0, 0, 0].min()  # something was learned
    small = Bilinear(5, 12)
    assert revcurse.in_span(small) is small and small.Theta.shape == (5, 5)


def test_half_the_step_gives_the_same_curves():
    for dim in (16, 256):
        whole, half = (bilinear_trainer(dim, lr=0.08 / k, epochs=300 * k) for k in (1, 2))
        whole.run()
        half.run()
        assert [2 * point for point in whole.points] == half.points
        assert whole.curves[0, 0, -1].mean() < 0.5
        assert (whole.curves - half.curves).abs().max() < 0.01


def test_theorem_1_and_the_cure_over_ten_seeds():
    shifts, epsilons = [], []
    for dim in (64, 256, 1024):
        trainer = bilinear_trainer(dim, epochs=600)
        trainer.run()
        forward, reversal = trainer.curves[:, 0]  # (points, S)
        assert forward[-1].max() < 0.2 and (forward.diff(dim=0) < 0).all()
        assert reversal.min() > 0.9 * math.log(40)
        shifts.append((reversal[-1] - reversal[0]).abs().mean().item())
        epsilons.append(max(math.log(reversal[i, s] / reversal[0, s])
                            / math.log(forward[i, s] / forward[0, s])
                            for i in range(1, len(forward)) for s in range(10)))
    assert shifts == sorted(shifts, reverse=True) and shifts[0] > 4 * shifts[2]
    assert epsilons == sorted(epsilons, reverse=True) and epsilons[-1] < 0.02
    cured = bilinear_trainer(256, epochs=1200, symmetric=True)
    cured.run()
    assert cured.curves[:, 0, -1].max() < 0.2


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
    alpha = np.exp(logits) / sum(math.exp(x) for x in logits)
    return np.array(b), f, alpha


@pytest.mark.parametrize("context", [[3], [3, 5], [5, 5], [1, 2, 4], [2, 0, 2]], ids=str)
def test_one_layer_and_its_gradients_are_the_papers(context):
    V, query, target = 7, 6, 1
    model, random = OneLayer(V), torch.Generator().manual_seed(sum(context))
    assert not model.Y.any() and not model.Z.any()
    for weight in model.parameters():
        nn.init.normal_(weight, generator=random)
    tokens = torch.tensor([*context, query])
    logits = model(tokens)
    Y, Z = model.Y.detach().numpy(), model.Z.detach().numpy()
    b, f, alpha = one_layer_by_loops(Y, Z, tokens.tolist())
    assert logits.shape == (V,)
    np.testing.assert_allclose(logits.softmax(-1).detach(), alpha, atol=1e-12)
    np.testing.assert_allclose(model.attention(model.Z, tokens).detach(), b, atol=1e-12)

    (-nll(logits[None], torch.tensor([target])).sum()).backward()  # steps go up -NLL
    e, q, X = np.eye(V)[target], np.eye(V)[query], np.eye(V)[context]
    Xb = X.T @ b
    P = np.eye(V) - np.outer(Xb, Xb) / (Xb @ Xb)
    dY = np.outer(f, e - alpha)
    dZ = np.outer(q, (e - alpha) @ Y.T @ (P / np.sqrt(Xb @ Xb)) @ X.T @ np.diag(b) @ X)
    np.testing.assert_allclose(model.Y.grad, dY, rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.Z.grad, dZ, rtol=0, atol=1e-10)
    if len(context) == 1:
        assert (model.Z.grad == 0).all()


def test_one_layer_takes_batches_of_any_shape():
    model = OneLayer(6)
    nn.init.normal_(model.Y, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[[1, 2, 0], [3, 3, 1]], [[4, 5, 0], [2, 1, 0]]])
    logits = model(tokens)
    assert logits.shape == (2, 2, 6)
    for at in np.ndindex(2, 2):
        assert torch.allclose(logits[at], model(tokens[at]))
    assert torch.allclose(logits[0, 0], logits[1, 1])  # the order of the context means nothing


def test_closed_form_solves_the_equation_of_motion():
    M, N = 30, 4
    for t in (0.5, 10.0, 300.0):
        u, steps = 0.0, 200_000
        for _ in range(steps):  # a target's gradient is 1 - p, any other token's p of its own
            p = 1 / (1 + (M - 1) * math.exp(-u))
            u += t / steps * ((1 - p) + (1 - p) / (M - 1)) / N
        expected = math.log(1 + (M - 1) * math.exp(-u))
        assert math.isclose(revcurse.closed_form([0, t], M, N)[1], expected, rel_tol=1e-3)
    assert math.isclose(revcurse.closed_form([0, 1], M, N)[0], math.log(M))


@pytest.mark.parametrize("M, N", [(20, 3), (60, 14), (202, 85)])
@pytest.mark.parametrize("batch", ["one", "full"])
def test_closed_form_against_training(M, N, batch):
    pairs = torch.arange(2 * N).view(2, N).T if 2 * N <= M else torch.stack(
        [torch.arange(N), (torch.arange(N) + 1) % M], dim=1)
    sentences = torch.stack([pairs[:, 0], torch.full((N,), M - 1), pairs[:, 1]], dim=1)
    unseen = torch.tensor([[M - 2, M - 1, 0]])  # a context that no sentence has
    data = revcurse.Dataset({"train": sentences, "unseen": unseen}, pairs.T, [""] * M)
    size, epochs = (1, 30) if batch == "one" else (N, 600)
    lr = 0.1 if batch == "one" else 0.05
    trainer = Trainer([OneLayer(M)], [data], generators(0), lambda params: torch.optim.SGD(
        params, lr=lr * size), epochs=epochs, batch_size=size)
    trainer.run()
    times = [epoch * lr * N for epoch in trainer.points]
    expected = revcurse.closed_form(times, M, N)
    assert expected[0] - expected[-1] > (0.3 if batch == "one" else 2.9)
    assert np.abs(trainer.curves[0, 0, :, 0].numpy() - expected).max() < 0.01
    assert (trainer.curves[1, 0] - math.log(M)).abs().max() < 1e-12
    touched = trainer.params["Y"][0].detach().abs().sum(1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(pairs[:, 0].tolist())
    assert (trainer.params["Z"] == 0).all()


def test_orthonormal_bilinear_is_the_closed_form():
    trainer = bilinear_trainer(40, seeds=2, epochs=400)
    trainer.buffers["embeddings"].copy_(torch.eye(40))
    with torch.no_grad():
        trainer.params["Theta"].zero_()
    trainer.run()
    expected = revcurse.closed_form([epoch * 0.08 * 20 for epoch in trainer.points], 40, 20)
    assert np.abs(trainer.curves[0, 0, :, 0].numpy() - expected).max() < 0.01
    assert (trainer.curves[1, 0] - math.log(40)).abs().max() < 1e-12


def test_distractors_vary_and_are_new_in_validation():
    data = revcurse.distractor_data(40, 4, 2, torch.Generator().manual_seed(0))
    assert data.train.shape == (24, 4) and data.validation.shape == (12, 4)
    answers, met = {}, {}
    for a, d, arrow, b in torch.cat([data.train, data.validation]).tolist():
        assert arrow == 0 and answers.setdefault(a, b) == b
        met.setdefault(a, []).append(d)
        assert [data.names[token][0] for token in (a, d, b)] == ["A", "D", "B"]
    assert len(met) == 6 and all(len(set(d)) == len(d) == 6 for d in met.values())
    assert len(set(answers.values()) | set(answers) | set(met[a])) == 18
    trained = data.train[:, 1].view(6, 4)  # a line for each A
    assert len({frozenset(line) for line in trained.tolist()}) > 1
    with pytest.raises(ValueError, match="vocab 17"):
        revcurse.distractor_data(17, 4, 2)


BILINEAR = ["bilinear", "--vocab", "24", "--dims", "8", "64", "--seeds", "3", "--epochs", "120",
            "--symmetric"]
ONELAYER = ["onelayer", "--vocab", "24", "--complete", "2", "--held-out", "2", "--seeds", "2",
            "--epochs", "60"]


def test_bilinear_command(tmp_path, capsys):
    assert run_in(tmp_path, *BILINEAR) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "bilinear.json").read_text())
    assert [(run["dim"], run["symmetric"]) for run in results["runs"]] == [
        (8, False), (64, False), (8, True), (64, True)]
    for run in results["runs"]:
        curves = run["curves"]
        assert len(curves["forward_nll"]) == len(curves["reversal_nll"]) == 3
        assert run["counts"] == {"train": 6, "validation": 6}
        assert math.isclose(curves["time"][-1], 120 * 0.08 * 6)
        assert math.isclose(curves["reversal_nll"][0][0], math.log(26))
        shift = sum(abs(seed[-1] - seed[0]) for seed in curves["reversal_nll"]) / 3
        assert math.isclose(run["reversal_shift"], shift)
        for forward, reversal in zip(curves["forward_nll"], curves["reversal_nll"], strict=True):
            for now, then in zip(forward[1:], reversal[1:], strict=True):
                assert then / reversal[0] >= (now / forward[0]) ** (run["epsilon"] + 1e-9)
    small, large, *cured = results["runs"]
    slope = math.log(large["reversal_shift"] / small["reversal_shift"]) / math.log(64 / 8)
    assert math.isclose(results["slope"], slope) and results["slope_large"] is None
    assert all(run["epsilon"] > 0.9 for run in cured) and large["epsilon"] < 0.3
    assert cured[0]["curves"]["asymmetry"][0] == [0.0] * len(curves["time"])
    assert f"never below {min(small['reversal_nll_min'], large['reversal_nll_min']):.3f}" in said
    for text in ("Theorem 1", "Theorem 2", "dim^", "Symmetric", "dim 64, symmetric"):
        assert text in said
    with np.load(tmp_path / "bilinear.npz") as arrays:
        axes = revcurse.draw_bilinear(results, arrays).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    forward = np.mean(large["curves"]["forward_nll"], axis=0)[1:]
    assert np.abs(drawn["closed form"] - forward).max() < 0.3
    picture = (tmp_path / "bilinear.png").read_bytes()
    (tmp_path / "bilinear.png").unlink()
    assert main(["plot", str(tmp_path / "bilinear.json")]) == 0
    assert (tmp_path / "bilinear.png").read_bytes() == picture


def test_onelayer_command(tmp_path, capsys):
    assert run_in(tmp_path, *ONELAYER, "--epochs", "20") == 0
    said = capsys.readouterr().out
    assert said.count("not trained to the end") == 2 and "Ours, not the paper's" in said
    assert run_in(tmp_path, *ONELAYER, "--epochs", "300", "--full-batch") == 0
    said = capsys.readouterr().out
    assert "Theorem 3: as it says" in said and "Theorem 4: as it says" in said
    results = json.loads((tmp_path / "onelayer.json").read_text())
    summary = results["summary"]
    assert math.isclose(summary["chance"], 1 / 26)
    assert summary["trained_probability_min"] > 0.98 and summary["closed_form_gap"] < 0.03
    assert math.isclose(summary["unseen_probability_max"], 1 / 26)
    assert math.isclose(summary["chain_unseen_probability_max"], 1 / 26)  # at the start
    chain, both, distractors = results["runs"][1:]
    for b, c in zip(*(chain["curves"][f"validation_{step}"] for step in ("ab", "ac")), strict=True):
        assert math.isclose(c[-1], (1 - b[-1]) / 25)  # what B leaves is shared by all other tokens
    for step in ("ab", "ac"):  # two answers of one row
        assert abs(both["ends"][f"train_{step}"]["lowest"] - 0.5) < 0.02
    assert both["ends"]["train_bc"]["lowest"] > 0.98
    for seed in distractors["attention"]["validation"]:
        assert seed[0] == 0.5 and seed[-1] > 0.75
    with np.load(tmp_path / "onelayer.npz") as file:
        arrays = dict(file)
    names = {token: name for name, token in results["runs"][0]["tokens"]}
    touched = [names[token] for token in np.any(arrays["Y_0"], axis=1).nonzero()[0]]
    assert len(names) == 8 and len(set(touched)) == 6 and {"A0", "A1", "B0", "B1"} < set(touched)
    left, _, right, *_ = revcurse.draw_onelayer(results, arrays).axes
    for axes in (left, right):
        trained, unseen, closed, *_ = (line.get_ydata() for line in axes.get_lines())
        assert trained[-1] > 0.98 and unseen.max() < 0.04
        assert np.abs(closed - trained).max() < 0.03
    with Image.open(tmp_path / "onelayer.png") as picture:
        assert picture.width > 1000


def test_verdict_of_onelayer_by_hand():
    def run(gap, attention=None, **ends):
        names = ("lowest", "highest", "highest_ever")
        return {"ends": {group: dict(zip(names, end, strict=True)) for group, end in ends.items()},
                "attention": attention, "chance": {"vocabulary": math.log(10)},
                "closed_form_gap": gap}

    results = {"runs": [
        run(0.1, a=(0.95, 1, 1), b=(0.91, 1, 1), u=(0, 0.05, 0.1)),
        run(0.3, ab=(0.97, 1, 1), bc=(0.98, 1, 1), ac=(0, 0.05, 0.2)),
        run(9, train_ab=(0.4, 0.5, 0.5), train_bc=(0.9, 1, 1), train_ac=(0.45, 0.6, 0.7)),
        run(9, {"train": [[0.5, 0.8]], "validation": [[0.5, 0.7]]})]}
    revcurse.conclude_onelayer(results)
    for text in ("Theorem 3: as it says. Trained sentences end at p >= 0.9100", "met to 0.70",
                 "Theorem 4: NOT AS IT SAYS", "above 0.200000", "0.050000 or below",
                 "within 0.300", "from 0.400 to 0.600", "from 0.50 to 0.80"):
        assert text in results["verdict"]


def test_results_of_onelayer_take_the_worst_sentence():
    runs = list(revcurse.onelayer_runs(revcurse.parse([*ONELAYER, "--epochs", "3"])))
    trainer = revcurse.make_trainer(runs[1], [0, 1])
    trainer.run()
    trainer.frames[-1][1]["probability"][1, 3] = 1e-3
    results, _ = revcurse.assemble(runs[1], [revcurse.collect((1, [0, 1]), runs[1], trainer, 1.0)])
    end = revcurse.closed_form(results["curves"]["time"], 26, 8)[-1]
    assert results["closed_form_gap"] == pytest.approx(math.log(1000) - end)
    assert results["ends"]["validation_ab"]["lowest"] == 1e-3
    both = revcurse.make_trainer(runs[2], [0])
    both.run()
    part = revcurse.collect((2, [0]), runs[2], both, 1.0)
    assert "closed_form_gap" not in revcurse.assemble(runs[2], [part])[0]  # row A has two answers


def test_a_rise_of_the_training_loss_stops_the_run(tmp_path):
    _, config, runs = revcurse.plan(revcurse.parse([*BILINEAR, "--quiet", "--out", str(tmp_path)]))
    watch = revcurse.Watch(tmp_path / "x.pt", config, revcurse.share(runs))
    watch.start(runs[0], [0, 1, 2])
    watch.trainer.evaluate()
    watch.trainer.evaluate()
    watch.trainer.curves[0, 0, 1] += 0.009
    watch.look()
    watch.trainer.curves[0, 0, 1] += 0.011
    with pytest.raises(revcurse.Problem, match="rises by 0.02 nats"):
        watch.look()


def test_batch_of_one_and_full_batch_take_the_same_steps_for_separate_rows(tmp_path):
    curves = []
    for flags in ([], ["--full-batch"]):
        assert run_in(tmp_path, *ONELAYER, "--epochs", "20", *flags) == 0
        results = json.loads((tmp_path / "onelayer.json").read_text())
        curves.append([results["runs"][i]["curves"] for i in (0, 1)])
    for one, full in zip(*curves, strict=True):
        assert one.keys() == full.keys()
        assert all(np.allclose(one[name], full[name], rtol=1e-9) for name in one)


@pytest.mark.parametrize("flags, text", [
    ("bilinear --dims 0", "--dims"), ("bilinear --dims 8 x", "'x'"), ("bilinear --dims", "--dims"),
    ("bilinear --lr 3", "--lr 3.0"), ("onelayer --lr 1.5", "unstable"),
    ("bilinear --vocab 3", "--vocab"),
    ("bilinear --layers 2", "--layers"), ("bilinear --complete 2", "--complete"),
    ("bilinear --preset paper", "--preset"), ("bilinear --sigma -1", "--sigma"),
    ("onelayer --vocab 20", "--complete 3"), ("onelayer --dims 3", "--dims"),
    ("onelayer --symmetric", "--symmetric"),
    ("onelayer --vocab 7 --complete 1 --held-out 1", "--complete"),
    ("reversal --dims 3", "--dims"), ("reversal --full-batch", "--full-batch")])
def test_bad_input_of_the_theory(flags, text, tmp_path, capsys):
    assert run_in(tmp_path, *flags.split()) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_unstable_step_is_named_and_leaves_earlier_results(tmp_path, capsys):
    flags = ["bilinear", "--vocab", "24", "--seeds", "2", "--epochs", "30", "--dims"]
    assert run_in(tmp_path, *flags, "32") == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_in(tmp_path, *flags, "1", "--lr", "1") == 1
    error = capsys.readouterr().err
    assert "--lr 1.0 is unstable" in error and "--lr 0.25" in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_resumed_theory_ends_with_the_same_numbers(tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_in(whole, *BILINEAR) == 0
    steps, step = [], Trainer.step

    def stop(trainer):
        steps.append(trainer)
        if len(steps) == 290:  # in the third of four trainings
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stop)
    assert run_in(resumed, *BILINEAR) == 130 and (resumed / "bilinear.pt").exists()
    monkeypatch.setattr(Trainer, "step", step)
    assert run_in(resumed, *BILINEAR, "--resume") == 0 and not (resumed / "bilinear.pt").exists()
    one, other = (json.loads((folder / "bilinear.json").read_text()) for folder in (whole, resumed))
    for run, again in zip(one["runs"], other["runs"], strict=True):
        assert run["curves"] == again["curves"]
    assert one["slope"] == other["slope"]


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
        z = x[:d // 2] + 1j * x[d // 2:]  # a pair of entries is a complex number
        z = z * np.exp(1j * t * 10000.0 ** (-np.arange(d // 2) * 2 / d))
        return np.concatenate([z.real, z.imag])

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
    g = torch.Generator().manual_seed(0)
    model = GPT(11, 6, 3, 2, 8, position, tie_embeddings=tied, generator=g)
    with torch.no_grad():  # away from the start, where attention is flat and norms are the identity
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=g) * 0.5)
    tokens = torch.randint(11, (3, 5), generator=g)
    expected = np.stack([naive_gpt(model.state_dict(), s, 3, 2, position) for s in tokens.tolist()])
    logits = model(tokens)
    assert logits.shape == (3, 5, 11)
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(tokens, 2).detach(), expected[:, -2:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(tokens[0]).detach(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["none", "absolute", "relative"])
def test_gpt_is_causal(position):
    model = GPT(11, 6, 2, 2, 8, position, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[2, 3, 4, 5, 6]])
    changed = torch.tensor([[2, 3, 4, 9, 6]])
    same = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert torch.equal(same[:3], torch.zeros(3)) and (same[3:] > 0).all()


def test_relative_positions_depend_on_distance_alone():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    turn = revcurse.Attention.rotate
    scores = turn(q.expand(6, 8)) @ turn(k.expand(6, 8)).T  # (query at, key at)
    for distance in range(-4, 5):
        assert scores.diagonal(distance).std() < 1e-6
    assert scores[0].std() > 0.1


def test_gpt_starts_as_gpt2_and_has_its_parameter_names():
    model = GPT(500, 8, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    block = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
             "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
             "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    weights = dict(model.named_parameters())
    assert sorted(weights) == sorted(
        ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
         "transformer.ln_f.weight", "transformer.ln_f.bias",
         *(f"transformer.h.{i}.{name}" for i in range(3) for name in block)])
    assert set(model.state_dict()) == set(weights)
    for name, weight in weights.items():
        if "ln_" in name or name.endswith("bias"):
            assert (weight == float("ln_" in name and name.endswith("weight"))).all()
        elif weight.numel() > 1000:  # smaller ones say little about their spread
            expected = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert abs(weight.std() / expected - 1) < 0.05 and abs(weight.mean()) < 0.002
    tied = GPT(500, 8, 1, 4, 64, tie_embeddings=True)
    assert tied.lm_head.weight is tied.transformer.wte.weight


def test_gpt_against_the_published_one():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=48, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False)).eval()
    ours = GPT(50, 16, 3, 4, 48).eval()
    with torch.no_grad():
        weights = {name: weight.normal_(0, 0.2) for name, weight in theirs.named_parameters()}
    ours.load_state_dict({name: weight.mT if "c_" in name and weight.dim() == 2 else weight
                          for name, weight in weights.items()})
    tokens = torch.randint(50, (4, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_dropout():
    torch.manual_seed(0)
    drop = revcurse.Dropout(0.3)
    x = torch.ones(100, 1000)
    y = drop(x)
    assert abs((y == 0).float().mean() - 0.3) < 0.01  # 100,000 draws: 7 sigma
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert torch.equal(drop.eval()(x), x)
    model = GPT(10, 4, 2, 2, 8, dropout=0.5)
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


# --------------------------------------------------------------------------------------- Training


class Table(nn.Module):
    """A model set by hand: the logits after a token are its row of a table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(26, 4)})  # for its cosines alone

    def forward(self, tokens, last):
        return self.table[tokens[..., -last:]]


def table_trainer(table, k=1, vocab=24, **options):
    gens = generators(0)
    data = [reversal_data(vocab, k, generator=g) for g in gens]
    return Trainer([Table(table)], data, gens, lambda p: torch.optim.SGD(p, lr=1.0), epochs=1,
                   batch_size=10**6, **options), data[0]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_loss_looks_at_the_right_tokens(loss, k):
    """Gradient descent on an all-zero table, step 1: minus the gradient, by hand."""
    trainer, data = table_trainer(torch.zeros(26, 26), k, loss=loss)
    trainer.step()
    expected = torch.zeros(26, 26)
    predicted = range(k + 1, 2 * k + 1) if loss == "entity" else range(1, 2 * k + 1)
    for sentence in data.train.tolist():
        for at in predicted:
            expected[sentence[at - 1]] -= 1 / 26
            expected[sentence[at - 1], sentence[at]] += 1
    expected /= len(data.train) * len(predicted)
    torch.testing.assert_close(trainer.params["table"][0].detach(), expected)


def test_metrics_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0, -1.0, 5.0], [4.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([2, 4])
    total = sum(math.exp(v) for v in [0, 2, 1, 3, -1, 5])
    torch.testing.assert_close(nll(logits, targets), torch.tensor(
        [math.log(total) - 1, math.log(math.exp(4) + 5)]))
    assert nll(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3)
    alphabets = torch.tensor([[2, 3, 1], [4, 0, 5]])
    assert rank(logits, targets, alphabets).tolist() == [3, 2]  # of 2, 3, 1 and of 4, 0, 5


def test_measure_and_matrices_on_a_model_set_by_hand():
    """A table that knows each pair A_i -> B_i and nothing else, from the entity or the arrow."""
    table = torch.zeros(26, 26)
    trainer, data = table_trainer(table)
    for a, _, b in data.groups["train_forward"].tolist():
        trainer.params["table"].data[0, a, b] = 7.0
    matrices = revcurse.logit_matrices(trainer)
    assert torch.equal(matrices["train_forward"][0], 7 * torch.eye(4))
    assert torch.equal(matrices["train_backward"][0], torch.zeros(4, 4))
    means, _ = revcurse.diagonal_means(matrices)
    assert means[0, 0].tolist() == [7.0, 0.0]  # of the first group

    target = data.validation[0, 2]  # after both arrows the table now says this token, surely
    trainer.params["table"].data[0, :2, target] = 200.0
    embeddings = trainer.params["transformer.wte.weight"].data[0]
    embeddings[:] = 1.0
    embeddings[1::2, 1:] = -1.0  # cosines of 1 and, for somewhat more pairs, of minus a half
    read = data.train[:, :2].unique()
    embeddings[read] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    embeddings[read[0]] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    trainer.evaluate()
    trainer.evaluate()
    trainer.curves[1, 0, 1] += 1.0  # first 55, now 56
    measured = revcurse.measure(trainer)
    hits = data.train[:, 2] == target
    assert measured["train_accuracy"].item() == pytest.approx(hits.double().mean().item())
    assert measured["validation_accuracy"].tolist() == [1 / len(data.validation)]
    ceiling = -math.log(1e-50)  # every other answer has NLL 200, clipped
    expected = ceiling * (~hits).double().mean().item()
    assert measured["train_nll"].item() == pytest.approx(expected)
    assert measured["margin"].item() == pytest.approx(
        trainer.curves[1, 0, 0, 0].item() - math.log(6))
    assert measured["cosine"].item() == pytest.approx(0.5)
    assert measured["cosine_read"].item() == pytest.approx(1.0)
    other = (data.alphabets == target).any(1).nonzero().item()
    in_alphabet = torch.isin(data.train[:, 2], data.alphabets[other])
    expected = torch.where(in_alphabet & ~hits, 2.0, 1.0).mean()  # one token of its own is better
    assert measured["train_rank"].item() == pytest.approx(expected.item())


def test_contrast_by_hand():
    seen, unseen = torch.full((2, 3, 3), 1.0), torch.full((2, 3, 3), 5.0)
    seen[0] += 8 * torch.eye(3)
    seen[1] += 4 * torch.eye(3)
    unseen[0] += 2 * torch.eye(3)
    unseen[1] -= torch.eye(3)
    means, contrast = revcurse.diagonal_means({
        "train_forward": seen, "validation_seen": seen, "validation_unseen": unseen})
    assert means[:, 2].tolist() == [[7.0, 5.0], [4.0, 5.0]]  # on and off the diagonal, unseen
    assert contrast.tolist() == [0.25, -0.25]
    _, contrast = revcurse.diagonal_means({  # the mean of what two trained groups have
        "validation_ab": seen, "validation_bc": 3 * seen, "validation_ac": unseen})
    assert contrast.tolist() == [0.125, -0.125]


def test_word_nll_is_the_sum_over_the_tokens():
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(3))
    trainer, data = table_trainer(table, k=2)
    log_p = table.log_softmax(-1)
    words = [-(log_p[s[2], s[3]] + log_p[s[3], s[4]]) for s in data.validation]
    firsts = [-log_p[s[2], s[3]] for s in data.validation]
    right = [s[3] == log_p[s[2]].argmax() and s[4] == log_p[s[3]].argmax() for s in data.train]
    trainer.evaluate()
    measured = revcurse.measure(trainer)
    assert measured["validation_word_nll"].item() == pytest.approx(np.mean(words), rel=1e-5)
    assert measured["validation_nll"].item() == pytest.approx(np.mean(firsts), rel=1e-5)
    assert measured["train_accuracy"].item() == pytest.approx(np.mean(right))
    curves = trainer.curves[1, :, 0, 0].tolist()
    assert curves == pytest.approx([np.mean(firsts), np.mean(words)], rel=1e-5)


class Lookup(nn.Module):
    """A model set by hand: the logits after "entity arrow" are in a table[arrow, entity]."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens, last):
        return self.table[tokens[:, -1], tokens[:, -2]][:, None]


def test_chain_of_thought_by_hand():
    g = generators(0)
    data = chain_data(40, generator=g[0])  # 10 triples, 3 of them held out
    table = torch.zeros(2, 42, 42)
    a, b, c = (data.groups[f"validation_{step}"][:, end] for step, end in
               [("ab", 0), ("ab", 2), ("bc", 2)])
    table[0, a, b] = 1.0
    table[0, b, c] = 1.0
    table[0, a[0], b[1]] = 2.0  # A0 -> B1, which leads to C1
    table[0, b[2], b[2]] = 3.0  # B2 -> B2
    table[1, a[0], c[0]] = 1.0  # A0 ~> C0 at once
    table[1, a[1], b[1]] = 1.0
    table[1, a[2], c[2]] = 1.0
    trainer = Trainer([Lookup(table)], [data], g, adamw, epochs=1)
    found = revcurse.chain_of_thought(trainer)
    assert found["direct_accuracy"].item() == pytest.approx(2 / 3)  # the first and the last
    assert found["two_step_accuracy"].item() == pytest.approx(1 / 3)  # the middle one
    answers = revcurse.answer(trainer, torch.stack([a, torch.zeros(3, dtype=int)], 1)[None])
    assert answers[0, :, 0].tolist() == [b[1], b[1], b[2]]


def test_answers_of_several_tokens_against_a_loop():
    g = generators(0, 1)
    data = [chain_data(24, 2, generator=gen) for gen in g]
    models = [GPT(26, 4, 2, 2, 16, generator=gen) for gen in g]
    trainer = Trainer([copy.deepcopy(m) for m in models], data, g, adamw, epochs=1)
    questions = trainer.groups["validation_ac"][..., :3]
    found = revcurse.answer(trainer, questions)
    for model, asked, answers in zip(models, questions, found, strict=True):
        for question, words in zip(asked.tolist(), answers.tolist(), strict=True):
            for _ in range(2):
                question = question + [model(torch.tensor(question))[-1].argmax().item()]
            assert question[3:] == words


def test_cosines_by_hand():
    trainer, _ = tiny_trainer(0, 1)
    trainer.params["transformer.wte.weight"].data[1, :2] = torch.tensor(
        [[3.0, 4.0] + [0.0] * 14, [4.0, 3.0] + [0.0] * 14])
    cosine = revcurse.cosines(trainer)
    assert cosine.shape == (2, 26, 26)
    assert cosine[1, 0, 1].item() == pytest.approx(24 / 25)
    assert torch.allclose(cosine.diagonal(dim1=1, dim2=2), torch.ones(2, 26))


def test_frames_are_the_heat_maps_of_their_epochs():
    still, moving = tiny_trainer(0, 1, epochs=60)[0], tiny_trainer(0, 1, epochs=60, **FRAMES)[0]
    seen = {}

    def watch():
        if moving.steps % moving.steps_per_epoch == 0:
            epoch = moving.steps // moving.steps_per_epoch
            seen[epoch] = revcurse.logit_matrices(moving)

    moving.run(watch)
    still.run()
    assert torch.equal(still.curves, moving.curves) and not still.frames  # looking changes nothing
    epochs = [epoch for epoch, _ in moving.frames]
    assert epochs[0] == 0 and epochs[-1] == 60 and 20 <= len(epochs) <= 26
    for epoch, frame in moving.frames[1:]:
        for group, matrix in frame.items():
            torch.testing.assert_close(matrix, seen[epoch][group][:1])

    half, rest = (tiny_trainer(0, 1, epochs=60, **FRAMES)[0] for _ in range(2))
    with pytest.raises(StopIteration):
        half.run(lambda: next(iter([])) if half.steps == 40 else None)
    rest.load_state_dict(half.state_dict())
    rest.run()
    assert [epoch for epoch, _ in rest.frames] == epochs


def test_training_all_seeds_at_once_against_one_plain_loop_each():
    """In float64, as the keys' biases have no gradient but rounding, which AdamW scales up."""
    def adam(params):
        return torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1)

    gens = generators(0, 1, 2)
    data = [reversal_data(24, generator=g) for g in gens]
    models = [GPT(26, 2, 2, 2, 16, generator=g).double() for g in gens]
    alone = [copy.deepcopy(model) for model in models]
    trainer = Trainer(models, data, gens, adam, epochs=4, batch_size=4)
    orders = [copy.deepcopy(g.get_state()) for g in gens]
    trainer.run()
    for s, model in enumerate(alone):
        g = torch.Generator()
        g.set_state(orders[s])
        optimizer = adam(model.parameters())
        for _ in range(4):
            order = torch.randperm(len(data[s].train), generator=g)
            for rows in order.split(4):
                batch = data[s].train[rows]
                loss = nn.functional.cross_entropy(model(batch[:, :2])[:, -1], batch[:, 2])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(trainer.params[name][s], weight, atol=1e-9, rtol=1e-9)
        for curve, sentences in zip(trainer.curves[:, 0], (data[s].train, data[s].validation),
                                    strict=True):
            p = model(sentences[:, :2])[:, 1].softmax(-1)
            p_right = p[torch.arange(len(p)), sentences[:, 2]]
            assert curve[-1, s].item() == pytest.approx(-p_right.log().mean().item(), rel=1e-5)


def test_a_seed_alone_is_the_same_as_among_others():
    many, data_many = tiny_trainer(0, 1, 2, 3, dropout=0.2)
    one, data_one = tiny_trainer(3, dropout=0.2)
    assert torch.equal(data_many[3].train, data_one[0].train)
    for name, weight in one.params.items():
        assert torch.equal(weight[0], many.params[name][3])
    for trainer in (many, one):
        trainer.run()
    assert torch.equal(one.order[0], many.order[3])
    torch.testing.assert_close(one.curves[..., 0], many.curves[..., 3], atol=1e-4, rtol=1e-4)


def test_dropout_masks_belong_to_the_seed():
    many, one = tiny_trainer(0, 1, 2, 3, dropout=0.2)[0], tiny_trainer(3, dropout=0.2)[0]
    theirs, ours = (trainer.name_noise(trainer.draw_noise(4), 4) for trainer in (many, one))
    assert len(ours) == 1 + 3 * 2  # embeddings; attention, residual and MLP of two blocks
    for name, noise in ours.items():
        assert torch.equal(noise[0], theirs[name][3])
        assert not torch.equal(noise[0], theirs[name][2])


@pytest.mark.parametrize("loss", ["entity", "sequence"])
def test_dropout_is_at_work_in_training_only(loss):
    trainer, _ = tiny_trainer(0, dropout=0.5, loss=loss)
    before = {name: weight.detach().clone() for name, weight in trainer.params.items()}
    first, second = (trainer.losses(trainer.sentences, trainer.P, trainer.name_noise(
        trainer.draw_noise(12), 12)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(trainer.logits(trainer.sentences[..., :-1], 1) for _ in range(2)))
    trainer.run()
    assert not torch.equal(before["lm_head.weight"], trainer.params["lm_head.weight"])


def test_evaluation_does_not_change_training():
    often, seldom = (tiny_trainer(0, 1, epochs=5, dropout=0.1)[0] for _ in range(2))
    seldom.points = [0, 5]
    for trainer in (often, seldom):
        trainer.run()
    for name, weight in often.params.items():
        assert torch.equal(weight, seldom.params[name])
    assert torch.equal(often.curves[:, :, -1], seldom.curves[:, :, 1])


def test_curves_have_the_promised_points():
    trainer, _ = tiny_trainer(0, epochs=3)
    assert trainer.points == [0, 1, 2, 3]
    trainer.run()
    assert (trainer.curves[:, 0, 0] - math.log(26)).abs().max() < 0.05
    points = tiny_trainer(0, epochs=3000)[0].points
    assert points[0] == 0 and points[-1] == 3000 and len(points) == 51
    assert np.diff(points).tolist() == [60] * 50
    points = revcurse.spaced(1500, log=True)
    assert points[:4] == [0, 1, 2, 3] and points[-1] == 1500 and 70 < len(points) < 102


def test_frozen_embeddings_stay_and_tied_ones_are_trained_together():
    config = {"layers": 1, "heads": 2, "dim": 16,
              "position": "absolute", "dropout": 0.0}
    for tied in (False, True):
        config |= {"tie_embeddings": tied, "freeze_embeddings": not tied}
        g = generators(0)
        data = [reversal_data(24, generator=g[0])]
        trainer = Trainer([revcurse.make_gpt(config, data[0], g[0])], data, g, adamw, epochs=2)
        before = {name: weight.detach().clone() for name, weight in trainer.params.items()}
        trainer.run()
        moved = {name for name, weight in trainer.params.items()
                 if not torch.equal(weight, before[name])}
        frozen = set() if tied else {"transformer.wte.weight", "transformer.wpe.weight"}
        assert set(before) - moved == frozen
        assert ("lm_head.weight" in before) != tied


# --------------------------------------------------------------------------- The command, as a user


def test_the_curse(tmp_path, capsys):
    argv = ["reversal", "--vocab", "100", "--layers", "1", "--heads", "2", "--dim", "32",
            "--epochs", "100", "--seeds", "3"]
    assert run_in(tmp_path / "a", *argv) == 0
    printed = capsys.readouterr().out
    assert "device: c" in printed and "The reversal curse: 100.0% of the trained" in printed
    assert printed.count("seed-epochs/s") == 10
    assert "trained: A18 -> B18" in printed or "trained: B18 <- A18" in printed
    results = json.loads((tmp_path / "a/reversal.json").read_text())

    assert set(results) == {"command", "config", "environment", "counts", "chance", "summary",
                            "weights", "curves", "seconds"}
    assert results["counts"] == {"train": 43, "validation": 7}
    assert results["chance"] == {"vocabulary": math.log(102), "alphabet": math.log(25)}
    assert results["config"]["complete"] == 18 and results["config"]["held_out"] == 7
    assert set(results["environment"]) == {"python", "torch", "numpy", "device"}
    summary = results["summary"]
    assert set(summary) == {"margin", "cosine", "cosine_read", "contrast"} | {
        f"{part}_{name}" for part in ("train", "validation")
        for name in ("nll", "accuracy", "rank")}
    for values in summary.values():
        assert values["mean"] == pytest.approx(np.mean(values["per_seed"]))
        assert values["std"] == pytest.approx(np.std(values["per_seed"]))
    assert np.shape(results["curves"]["train_nll"]) == (3, 101)
    for part in ("train_nll", "validation_nll"):
        last = [curve[-1] for curve in results["curves"][part]]
        assert last == pytest.approx(summary[part]["per_seed"], rel=1e-4)

    # The science: learned, and yet no trace of the pairs in the unseen direction.
    assert summary["train_accuracy"]["per_seed"] == [1.0] * 3
    assert summary["train_nll"]["mean"] < 0.1
    assert summary["validation_accuracy"]["mean"] < 0.05
    assert min(summary["validation_nll"]["per_seed"]) > results["chance"]["vocabulary"]
    gaps = {name: means["diagonal"] - means["off_diagonal"]
            for name, means in results["weights"].items()}
    for name in ("train_forward", "train_backward", "validation_seen"):
        assert gaps[name] > 5
    assert abs(gaps["validation_unseen"]) < 0.1 * gaps["validation_seen"]

    # Written once more: the same numbers; drawn once more: the same pictures.
    assert run_in(tmp_path / "b", *argv, "--quiet") == 0
    assert "seed-epochs/s" not in capsys.readouterr().out
    again = json.loads((tmp_path / "b/reversal.json").read_text())
    for one in (results, again):
        del one["seconds"], one["config"]["out"], one["config"]["quiet"]
    assert results == again
    names = {"reversal.json", "reversal.npz", "reversal.png", "reversal_weights.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    pictures = {name: (tmp_path / "a" / name).read_bytes() for name in names if "png" in name}
    for name, content in pictures.items():
        assert content.startswith(b"\x89PNG")
        (tmp_path / "a" / name).unlink()
    assert main(["plot", str(tmp_path / "a/reversal.json")]) == 0
    for name, content in pictures.items():
        assert (tmp_path / "a" / name).read_bytes() == content
    with np.load(tmp_path / "a/reversal.npz", allow_pickle=False) as matrices:
        assert {name: matrix.shape for name, matrix in matrices.items()} == {
            "train_forward": (18, 18), "train_backward": (18, 18), "validation_seen": (7, 7),
            "validation_unseen": (7, 7)}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def pictures(folder):
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".gif")}


def test_chain_command(tmp_path, capsys):
    argv = ["chain", "--vocab", "60", "--layers", "1", "--heads", "2", "--dim", "32", "--epochs",
            "150", "--seeds", "2", "--animate", "--cosine", "--lr", "0.005"]
    assert run_in(tmp_path, *argv) == 0
    printed = capsys.readouterr().out
    assert "Weights are intransitive: 100.0% of the trained" in printed
    assert 'in two steps, "A ->" and then "B ->" with its own B, 100.0%.' in printed
    assert pictures(tmp_path) == {"chain.png", "chain_weights.png", "chain_cosine.png", "chain.gif"}
    results = read(tmp_path, "chain")
    assert results["summary"]["two_step_accuracy"]["per_seed"] == [1.0, 1.0]
    assert results["summary"]["direct_accuracy"]["mean"] < 0.2
    assert abs(results["summary"]["contrast"]["mean"]) < 0.3
    assert list(results["weights"]) == [f"{part}_{step}" for part in ("train", "validation")
                                        for step in ("ab", "bc", "ac")]
    with Image.open(tmp_path / "chain.gif") as gif:
        assert 20 <= gif.n_frames <= 27
    assert (tmp_path / "chain.gif").stat().st_size < 3e6
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in pictures(tmp_path):
        (tmp_path / path).unlink()
    assert main(["plot", str(tmp_path / "chain.json")]) == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_related_tokens_have_results_of_their_own(tmp_path, capsys):
    assert run_in(tmp_path, "chain", "--related-tokens", "--complete", "4", "--held-out", "2",
                  *TINY) == 0
    results = read(tmp_path, "chain-related-tokens")
    assert pictures(tmp_path) == {"chain-related-tokens.png", "chain-related-tokens_weights.png"}
    assert results["chance"]["alphabet"] == results["chance"]["word_alphabet"] == math.log(6)
    assert {"direct_accuracy", "two_step_accuracy", "train_word_nll"} <= set(results["summary"])


def test_icl_has_no_curse(tmp_path, capsys):
    assert run_in(tmp_path, "icl", "--vocab", "40", "--layers", "2", "--heads", "2", "--dim", "32",
                  "--epochs", "60", "--seeds", "2", "--lr", "0.005", "--batch-size", "16") == 0
    results = read(tmp_path, "icl")
    assert results["counts"] == {"train": 70, "validation": 30}
    assert (results["config"]["complete"], results["config"]["held_out"]) == (7, 3)
    assert results["summary"]["validation_accuracy"]["per_seed"] == [1.0, 1.0]
    printed = capsys.readouterr().out
    assert "No curse: 100.0%" in printed and "stands in the context" in printed
    assert pictures(tmp_path) == {"icl.png"}


SWEEPS = {"vocab": "24 32", "entity-length": "2 3", "layers": "1 2", "heads": "1 4",
          "position": "none relative", "embeddings": "learned frozen tied", "size": "1x8 2x12",
          "related-tokens": "3 4 5 6 7 8"}


@pytest.mark.parametrize("task", ["reversal", "chain"])
@pytest.mark.parametrize("axis", SWEEPS)
def test_ablate(tmp_path, capsys, axis, task):
    values = SWEEPS[axis].split()
    tiny = [*TINY, "--epochs", "2", "--quiet"]
    if axis == "related-tokens":
        if task == "reversal":  # not a task with such tokens
            assert run_in(tmp_path, "ablate", axis, "--task", task, *tiny) == 2
            return
        tiny += ["--held-out", "2"]
    values += values[:1]  # a value may come twice
    assert run_in(tmp_path, "ablate", axis, "--task", task, "--values", *values, *tiny) == 0
    name = f"ablate-{axis}" if task == "reversal" else f"ablate-chain-{axis}"
    assert pictures(tmp_path) == {f"{name}.png", *([f"{name}_cosine.png"] * (axis == "size"))}
    results = read(tmp_path, name)
    printed = capsys.readouterr().out
    assert [run["value"] for run in results["runs"]] == values
    assert all(f"\n{axis} {value}: Not learned yet: " in printed for value in values)
    assert (results["command"], results["config"]["axis"]) == ("ablate", axis)
    for run in results["runs"]:
        assert {"config", "counts", "chance", "summary", "curves", "weights", "seconds"} <= set(run)
        assert run["config"]["epochs"] == 2 and run["command"] == task
    configs = [run["config"] for run in results["runs"]]
    got = {"vocab": [c["vocab"] for c in configs], "layers": [c["layers"] for c in configs],
           "entity-length": [c["entity_length"] for c in configs],
           "heads": [c["heads"] for c in configs], "position": [c["position"] for c in configs],
           "related-tokens": [c["complete"] for c in configs],
           "size": [f"{c['layers']}x{c['dim']}" for c in configs],
           "embeddings": ["frozen" if c["freeze_embeddings"] else "tied" if c["tie_embeddings"]
                          else "learned" for c in configs]}[axis]
    assert list(map(str, got)) == values
    assert main(["plot", str(tmp_path / f"{name}.json")]) == 0


def test_a_value_of_a_sweep_is_the_run_of_its_own_flags(tmp_path):
    flags = [*TINY, "--lr", "0.02"]
    assert run_in(tmp_path, "ablate", "layers", "--values", "1", "2", *flags) == 0
    assert run_in(tmp_path, "reversal", *flags, "--layers", "2") == 0
    swept, alone = read(tmp_path, "ablate-layers")["runs"][1], read(tmp_path, "reversal")
    for key in ("summary", "curves", "weights", "counts", "chance"):
        assert swept[key] == alone[key]


def test_sweeps_of_the_presets():
    def first_run(*argv):
        return revcurse.plan(revcurse.parse([*argv, "--layers", "1", "--seeds", "1"]))

    _, config, runs = revcurse.plan(revcurse.parse(["ablate", "position"]))
    for c in [config, *(run.config for run in runs)]:
        assert (c["vocab"], c["lr"], c["seeds"], c["epochs"]) == (400, 0.003, 3, 160)
    name, config, runs = first_run("ablate", "vocab")
    assert name == "ablate-vocab" and config["values"] == ["20", "50", "200", "2000"]
    counts = [(len(run.datasets[0].train), len(run.datasets[0].validation)) for run in runs]
    assert counts == [(9, 1), (20, 4), (85, 15), (850, 150)]
    name, config, runs = first_run("ablate", "entity-length", "--preset", "paper", "--epochs", "7")
    counts = [(len(run.datasets[0].train), len(run.datasets[0].validation)) for run in runs]
    assert counts == [(680, 120), (250, 50)] and runs[0].config["epochs"] == 7
    args = revcurse.parse(["ablate", "size", "--task", "chain", "--preset", "paper"])
    name, config, runs = revcurse.plan(args)
    assert name == "ablate-chain-size" and config["values"] == ["1x20", "1x768", "24x20"]
    assert {(run.config["epochs"], run.config["vocab"], run.config["lr"], run.config["seeds"])
            for run in runs} == {(3000, 800, 0.01, 10)}
    _, config, runs = revcurse.plan(revcurse.parse(["icl"]))
    counts = len(runs[0].datasets[0].train), len(runs[0].datasets[0].validation)
    assert config["vocab"] == 400 and counts == (700, 300)


def test_titles_say_what_is_smaller_than_the_papers(tmp_path):
    assert run_in(tmp_path, "ablate", "layers", "--values", "1", *TINY) == 0
    title = revcurse.describe(read(tmp_path, "ablate-layers"), 10).replace("\n", " ")
    for words in ("V = 24 (paper: 800)", "dim 16 (paper: 768)", "2 seeds (paper: 10)",
                  "lr 0.003 (paper: 0.01)", "layers 1 (--preset paper: 1 12 24)"):
        assert words in title


CAPITALS = [("Paris", "$\\foo$"), ("Rome", "Italy"), ("Oslo", "Norway"), ("Cairo", "Egypt"),
            ("S\u00e3o Tom\u00e9", "S\u00e3o Tom\u00e9 and Pr\u00edncipe"), ("Lima", "Peru")]


def test_facts(tmp_path, capsys):
    file = tmp_path / "facts.tsv"
    file.write_text("\ufeff" + "".join(f"{a}\t{b}\r\n" for a, b in CAPITALS) + "\r\n",
                    encoding="utf-8")
    assert run_in(tmp_path, "reversal", "--facts", str(file), *TINY) == 0
    results = read(tmp_path, "reversal")
    assert results["config"]["vocab"] == 24 and results["counts"] == {"train": 10, "validation": 2}
    named = {tuple(sorted(pair)) for pairs in results["names"].values() for pair in pairs}
    assert named == {tuple(sorted(pair)) for pair in CAPITALS}
    assert {tuple(pair) for pair in results["names"]["train_forward"]} < set(CAPITALS)
    printed = capsys.readouterr().out
    assert sum(f"trained: {a} -> {b}" in printed or f"trained: {b} <- {a}" in printed
               for a, b in CAPITALS) == 2
    with np.load(tmp_path / "reversal.npz") as arrays:
        axes = revcurse.draw_weights(results, dict(arrays)).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        pair[0][:18] for pair in results["names"]["train_forward"]]


BAD_FACTS = {
    b"": "line 1 ", b"a\tb\nc\td\ne\tf\n": "line 3; 4 pairs", b"a\tb\nc d\n": "line 2 ",
    b"a\tb\nc\td\te\n": "line 2 ", b"a\tb\n\nc\td\n": "line 2 ", b"a\tb\nc\t \n": "line 2 ",
    b"a\tb\nc\td\ne\ta\n": "line 3 repeats 'a' of line 1", b"a\tb\nc\tc\n": "line 2 repeats 'c'",
    b"a\tb\nc\t\xff\n": "line 2 is not UTF-8"}


@pytest.mark.parametrize("content", BAD_FACTS, ids=str)
def test_bad_facts(tmp_path, capsys, content):
    file = tmp_path / "facts.tsv"
    file.write_bytes(content)
    assert run_in(tmp_path / "out", "reversal", "--facts", str(file), *TINY) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"--facts {file}: " in printed.err and BAD_FACTS[content] in printed.err
    assert not (tmp_path / "out").exists()


def test_facts_that_do_not_fit(tmp_path, capsys):
    file = tmp_path / "facts.tsv"
    file.write_text("".join(f"{a}\t{b}\n" for a, b in CAPITALS), encoding="utf-8")
    for flags, words in [(["--facts", str(file), "--complete", "6"], "--complete 6"),
                         (["--facts", str(file), "--entity-length", "2"], "--entity-length 2"),
                         (["--facts", str(tmp_path / "none")], "No such file"),
                         (["--facts", str(file), "--vocab", "9", "--complete", "6"], "complete 6"),
                         (["--facts", str(tmp_path)], "--facts")]:
        assert run_in(tmp_path / "out", "reversal", *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert run_in(tmp_path / "out", "ablate", "vocab", "--facts", str(file)) == 2
    assert "sets --vocab" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SMALL = ["--layers", "1", "--heads", "2", "--dim", "16", "--epochs", "2", "--seeds", "2"]


def test_all_and_its_resume(tmp_path, capsys, monkeypatch):
    some = ["reversal --vocab 24", "chain --vocab 24", "icl --vocab 40",
            "ablate embeddings --vocab 24", "ablate size --vocab 24 --values 1x8 2x8"]
    monkeypatch.setattr(revcurse, "EVERYTHING", some)
    names = ["reversal", "chain", "icl", "ablate-embeddings", "ablate-size"]
    monkeypatch.setattr(revcurse, "CLAIMS", [c for c in revcurse.CLAIMS if c[1] in names])
    assert run_in(tmp_path, "all", *SMALL) == 0
    claims = read(tmp_path, "all")["claims"]
    assert [claim["figure"] for claim in claims] == [
        "1", "2", "3", "4", "Section 5", "6, 7, 9", "10", "11", "12 on"]
    assert all({"figure", "claim", "measured", "holds"} <= set(claim) for claim in claims)
    assert revcurse.claims_table(claims) in capsys.readouterr().out
    assert main(["plot", *map(str, tmp_path.glob("*.json"))]) == 0
    assert {f"{name}.json" for name in [*names, "all"]} == {
        path.name for path in tmp_path.glob("*.json")}

    (tmp_path / "chain.json").unlink()
    (tmp_path / "icl.json").write_text("{damaged")
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.json")
            if path.stem not in ("all", "icl")}
    trained = []
    carry_out = revcurse.carry_out
    monkeypatch.setattr(revcurse, "carry_out", lambda *args: trained.append(args[0]) or carry_out(
        *args))
    assert run_in(tmp_path, "all", *SMALL, "--resume") == 0
    assert trained == ["chain", "icl"]
    assert kept == {path: path.read_bytes() for path in kept}
    assert read(tmp_path, "all")["claims"] == claims
    assert run_in(tmp_path, "all", *SMALL, "--resume", "--lr", "0.02", "--held-out", "1") == 0
    assert trained[2:] == names  # other flags, so all of them; and a single pair has no contrast
    found = {c["figure"]: c for c in read(tmp_path, "all")["claims"]}
    assert found["2"]["measured"] == {"contrast": None} and not found["2"]["holds"]


def test_all_runs_every_figure_and_knows_its_results():
    planned = []
    for line in revcurse.EVERYTHING:
        name, _, runs = revcurse.plan(revcurse.parse([*line.split(), "--seeds", "1"]))
        planned.append(name)
        assert {run.config["seeds"] for run in runs} == {1}
        *_, runs = revcurse.plan(revcurse.parse([*line.split(), "--preset", "paper", "--seeds", "1",
                                                 "--layers", "1"]))
        assert {(c["epochs"], c["lr"], c["dropout"], c["batch_size"], c["weight_decay"])
                for c in (run.config for run in runs)} == {(3000, 0.01, 0.1, 64, 0.01)}
    assert len(set(planned)) == len(planned) == 4 + 7 + 8
    assert {claim[1] for claim in revcurse.CLAIMS} <= set(planned)
    assert {claim[0] for claim in revcurse.CLAIMS} >= {
        "1", "2", "3", "4", "5", "6, 7, 9", "8", "10", "11", "12 on"}


def test_claims_by_hand(monkeypatch):
    def run(accuracy, *margins, **more):
        return {"summary": {"train_accuracy": {"per_seed": [1.0, accuracy]},
                            "margin": {"per_seed": margins}}, **more}

    curse = {"train_accuracy": (0.99, math.inf), "margin": (0, math.inf)}
    monkeypatch.setattr(revcurse, "CLAIMS", [
        ("1", "one", "words", curse), ("2", "two", "words", curse), ("3", "three", "words", curse),
        ("4", "four", "words", {"margin": (-0.1, 0.1)}), ("5", "one", "words", {"none": (0, 1)})])
    claims = revcurse.check_claims({
        "one": run(1.0, 0.5), "two": {"runs": [run(0.995, 0.2), run(1.0, 9.0, -0.1)]},
        "three": {"runs": [run(1.0, 3.0), run(0.2, -1.0, value="tied"), run(0.993, 2.0)]},
        "four": {"runs": [run(1.0, 0.05), run(1.0, 0.2, -0.2)]}})
    assert [claim["holds"] for claim in claims] == [True, False, True, False, False]
    assert claims[1]["measured"] == {"train_accuracy": 0.995, "margin": -0.1}
    assert claims[2]["measured"] == {"train_accuracy": 0.993, "margin": 2.0}  # tied is ours
    assert abs(claims[3]["measured"]["margin"]) == 0.2
    assert claims[4]["measured"] == {"none": None}
    assert "none -" in revcurse.claims_table(claims)


def test_readme_holds_the_table_and_the_pictures():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert revcurse.claims_table(read(HERE / "figures", "all")["claims"]) in readme
    for name in pictures(HERE / "figures"):
        assert f"figures/{name}" in readme


@pytest.mark.parametrize("more", [
    ["--vocab", "8"], ["--entity-length", "2", "--position", "relative"],
    ["--entity-length", "3", "--loss", "sequence", "--dropout", "0.1", "--position", "none"],
    ["--freeze-embeddings", "--tie-embeddings", "--complete", "2", "--held-out", "1"]], ids=str)
def test_every_setting_runs(tmp_path, more):
    assert run_in(tmp_path, "reversal", *TINY, *more) == 0
    results = json.loads((tmp_path / "reversal.json").read_text())
    assert ("train_word_nll" in results["summary"]) == ("--entity-length" in more)
    assert len(list(tmp_path.iterdir())) == 4


def test_flags_reach_model_and_optimiser(tmp_path, capsys):
    flags = ["--lr", "0.2", "--betas", "0.5", "0.6", "--weight-decay", "0.3", "--dropout", "0.4",
             "--position", "none"]
    args = revcurse.parse(["reversal", *TINY, *flags, "--out", str(tmp_path)])
    trainer = revcurse.make_trainer(revcurse.prepare_task(args), [0, 1])
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (0.2, (0.5, 0.6), 0.3)
    assert (trainer.batch_size, trainer.epochs, len(trainer.generators)) == (4, 12, 2)
    assert "transformer.wpe.weight" not in trainer.params
    assert {m.p for m in trainer.model.modules() if isinstance(m, revcurse.Dropout)} == {0.4}


def test_presets():
    def config(*argv):
        return vars(revcurse.parse(["reversal", *argv]))

    paper = config("--preset", "paper", "--layers", "3")
    assert (paper["layers"], paper["heads"], paper["dim"], paper["epochs"], paper["dropout"]) == (
        3, 12, 768, 3000, 0.1)
    laptop = config()
    assert (laptop["layers"], laptop["heads"], laptop["dim"], laptop["dropout"]) == (2, 4, 64, 0)
    for shared in (paper, laptop):
        assert (shared["vocab"], shared["batch_size"], shared["lr"], shared["betas"],
                shared["weight_decay"], shared["seeds"]) == (800, 64, 0.01, [0.9, 0.999], 0.01, 10)


BAD = {  # flags: what the one line on stderr must hold, beside the flag and its value
    "--dim 30": "4", "--dim 20 --heads 4 --position relative --layers 1 --vocab 24": None,
    "--dim 0": "1", "--layers -1": "1", "--heads 0": "1", "--layers x": "whole", "--dim 1.5": None,
    "--vocab 0": "1", "--vocab 7": "8", "--vocab 4 --entity-length 3": "8",
    "--entity-length 0": "1", "--complete 0": "1", "--held-out -3": "1",
    "--complete 180": "200", "--complete 36 --vocab 24 --entity-length 2": "36",
    "--epochs 0": "1", "--batch-size 0": "1", "--seeds 0": "1", "--seed -1": "0",
    "--lr 0": "above 0", "--lr -1": "above 0", "--lr nan": "above 0", "--lr inf": "above 0",
    "--weight-decay -0.1": "0", "--betas 1 0.9": "below 1", "--betas -0.1 0.9": "below 1",
    "--betas 0.9": "2 arguments", "--dropout 1": "below 1", "--dropout -0.1": "below 1",
    "--device tpu": "cpu", "--position sideways": "relative", "--loss none": "sequence",
    "--preset server": "laptop", "--frobnicate 1": None,
    "--device mps": None, "--device cuda": None}


BAD_SWEEPS = {
    "ablate": "AXIS", "ablate colour": "colour", "ablate vocab --values 0": "'0'",
    "ablate vocab --values 24 x": "'x'", "ablate vocab --values 24 4": "--vocab 4",
    "ablate size --values 1x20 3": "--values 3", "ablate size --values 1x2x3": "1x2x3",
    "ablate size --values 1x30": "--dim 30", "ablate size --values ax20": "'a'",
    "ablate embeddings --values green": "green", "ablate position --values up": "'up'",
    "ablate layers --frobnicate 1": "--frobnicate", "ablate layers --task icl": "icl",
    "ablate layers --animate": "--animate", "chain --related-tokens --entity-length 2": "length 2",
    "ablate related-tokens --task reversal": "--task reversal", "all --frobnicate": "--frobnicate",
    "all --dim 30": "--dim 30", "icl --entity-length 2": "--entity-length",
    "icl --animate": "--animate", "icl --vocab 12": "--vocab 12", "chain --facts x": "--facts",
    "chain --related-tokens --vocab 100": "--vocab 100", "chain --complete 180": "--complete 180"}


@pytest.mark.parametrize("line", BAD_SWEEPS)
def test_bad_input_to_other_commands(tmp_path, capsys, line):
    assert run_in(tmp_path, *line.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and BAD_SWEEPS[line] in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(tmp_path, capsys, flags):
    flag, *values = flags.split()[:2]
    if flag == "--device" and values[0] in ("cuda", "mps"):
        here = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if here[values[0]]():
            pytest.skip("this device is here")
    (tmp_path / "reversal.json").write_text("earlier")
    assert run_in(tmp_path, "reversal", *flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    if flags == "--betas 0.9":  # where the value that is missing cannot be named
        values = []
    for part in (flag, *values, BAD[flags] or ""):
        assert part in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["reversal.json"]
    assert (tmp_path / "reversal.json").read_text() == "earlier"


def test_bad_output_directory(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        assert run_in(out, "reversal", *TINY) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--out {out}" in error
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    if os.name == "posix" and os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert run_in(tmp_path, "reversal", *TINY) == 2


class Evil:
    """Something that acts when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_bad_results_to_plot(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", *TINY) == 0
    capsys.readouterr()
    good, arrays = tmp_path / "reversal.json", tmp_path / "reversal.npz"
    picture = (tmp_path / "reversal.png").read_bytes()
    text, content = good.read_text(), arrays.read_bytes()

    def fails(*words, path=good):
        assert main(["plot", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and printed.out == ""
        assert all(word in printed.err for word in (path.stem, *words))
        assert (tmp_path / "reversal.png").read_bytes() == picture

    fails("No such file", path=tmp_path / "reversal2.json")
    for damaged in (text[:200], "", "[1]", "{}", json.dumps({**json.loads(text), "curves": 1}),
                    "\x00\xff"):
        good.write_text(damaged)
        fails("not a results file")
    good.write_text(text)
    arrays.write_bytes(content[:-40])
    fails("not a results file")
    np.savez(arrays, train_forward=np.array([Evil(tmp_path / "marker")]))
    fails("not a results file")
    assert not (tmp_path / "marker").exists()
    arrays.unlink()
    fails("reversal.npz", "No such file")


def test_nan_stops_the_run_and_leaves_earlier_results(tmp_path, capsys):
    assert run_in(tmp_path, "reversal", *TINY) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_in(tmp_path, "reversal", *TINY, "--lr", "1e30", "--seed", "5") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "epoch 1," in error and "seed 5, 6" in error
    assert "--lr" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_broken_seed_is_named(tmp_path, capsys, monkeypatch):
    run = Trainer.run

    def poisoned(trainer, watch):
        def poison():
            if trainer.steps == 4 * trainer.steps_per_epoch:  # after epoch 4
                trainer.params["lm_head.weight"].data[1, 0, 0] = math.inf
            watch()
        run(trainer, poison)

    monkeypatch.setattr(Trainer, "run", poisoned)
    # 300 epochs are evaluated every third time: after 3 and 6, but the loss is watched at each step
    assert run_in(tmp_path, "reversal", *TINY, "--seeds", "3", "--epochs", "300", "--quiet") == 1
    assert "since epoch 5, seed 1:" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["step", "__init__"])
def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch, when):
    def fail(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Trainer, when, fail)
    assert run_in(tmp_path, "reversal", "--preset", "paper", "--layers", "1", "--dim", "768",
                  "--seeds", "1", "--device", "cpu") == 1
    error = capsys.readouterr().err
    size = 2 * 802 * 768 + 2 * 768 + 12 * 768**2 + 13 * 768 + 2 * 768  # wte, head, wpe, block, ln_f
    assert f"{16 * size / 1e6:,.1f} MB" in error and error.count("\n") == 1
    for flag in ("--seeds 1", "--batch-size 64", "--layers 1", "--dim 768"):
        assert flag in error
    assert list(tmp_path.iterdir()) == []


def test_files_appear_whole_and_together_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        revcurse.write_files({one: lambda path: path.write_text("new"), two: fail})
    assert one.read_text() == "old" and list(tmp_path.iterdir()) == [one]
    revcurse.write_files({one: lambda path: path.write_text("new")})
    assert one.read_text() == "new"


# ------------------------------------------------------------------------------------- Going on

LONG = ["reversal", *TINY, "--epochs", "60", "--dropout", "0.1", "--quiet"]


# ------------------------------------------------------------------ Groups, processes and speed


@pytest.mark.parametrize("at_once", [1, 2])
def test_groups_of_seeds_have_the_numbers_of_all_at_once(at_once, tmp_path, capsys):
    whole, groups = tmp_path / "whole", tmp_path / "groups"
    flags = ["chain", *TINY, "--seeds", "5", "--dropout", "0.1", "--cosine"]
    flags += ["--animate", "--epochs", "4"] * (at_once == 2)
    assert run_in(whole, *flags) == 0
    assert run_in(groups, *flags, "--seeds-at-once", str(at_once)) == 0
    assert ("seed 2: " if at_once == 1 else "seed 2 3: ") in capsys.readouterr().out
    one, other = read(whole, "chain"), read(groups, "chain")
    for name, number in one["summary"].items():
        assert other["summary"][name]["per_seed"] == pytest.approx(number["per_seed"], abs=1e-5)
    for name, curve in one["curves"].items():
        assert np.allclose(curve, other["curves"][name], atol=1e-5)
    for name, means in one["weights"].items():
        assert other["weights"][name] == pytest.approx(means, abs=1e-5)
    with np.load(whole / "chain.npz") as a, np.load(groups / "chain.npz") as b:
        assert a.keys() == b.keys()
        assert all(np.allclose(a[name], b[name], atol=2e-3) for name in a)


def test_processes_share_all_seeds_of_all_runs(monkeypatch, tmp_path):
    args = revcurse.parse(["ablate", "layers", "--values", "1", "2", "3", *TINY, "--seeds", "5",
                           "--seeds-at-once", "2"])
    _, _, runs = revcurse.plan(args)
    for world in (1, 2, 3, 20):
        seen, loads = [], []
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for process in range(world):
            monkeypatch.setenv("RANK", str(process))
            jobs = revcurse.share(runs)
            assert all(len(seeds) <= 2 for _, seeds in jobs)
            seen += [(i, seed) for i, seeds in jobs for seed in seeds]
            loads.append(sum(len(seeds) for _, seeds in jobs))
        assert sorted(seen) == [(i, seed) for i in range(3) for seed in range(5)]
        assert max(loads) - min(loads) <= 1


def test_how_many_seeds_fit(monkeypatch, capsys):
    run = revcurse.prepare_task(revcurse.parse(["reversal"]))
    assert revcurse.fit(run) == 10  # of a small model all
    large = run._replace(config={**run.config, "parameters": 10**7})
    assert revcurse.fit(large) == 1
    large = large._replace(config={**large.config, "device": "cuda"})
    for free, seeds in [(24e9, 106), (1e9, 4), (10, 1)]:  # of 200 MB + 64 * 2 * 2 * 64 * 160 B
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80e9))
        assert revcurse.fit(large) == seeds
        said = capsys.readouterr().out
        few = f"{free / 1e9:.1f} GB are free, a seed needs about 0.20 GB: no more than {seeds} at"
        assert (few in said) == (seeds < 10)
    large.config["seeds_at_once"] = 7
    assert revcurse.fit(large) == 7


def test_floor_by_hand():
    # 1000 parameters, 10 tokens: 40,000 bytes, 60,000 operations
    assert revcurse.floor(1000, 10, bandwidth=4000, operations=1e9) == pytest.approx(10)
    assert revcurse.floor(1000, 10, bandwidth=1e9, operations=2000) == pytest.approx(30)
    bandwidth, operations = revcurse.measure_device("cpu", bf16=False)
    assert 1e8 < bandwidth < 1e13 and 1e8 < operations < 1e14


def test_a_run_prints_the_time_of_its_steps(tmp_path, capsys):
    assert run_in(tmp_path, *LONG) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "floor" in line)
    assert line.startswith("a step of 2 seeds: ") and line.endswith("kernels run one by one")
    assert "(highest)" in line


def test_bf16_is_close_and_not_the_same(tmp_path):
    plain, half = (tiny_trainer(0, 1, epochs=4, bf16=bf16)[0] for bf16 in (False, True))
    for trainer in (plain, half):
        trainer.run()
    assert all(weight.dtype == torch.float32 for weight in half.params.values())
    assert not torch.equal(plain.curves, half.curves)
    torch.testing.assert_close(plain.curves, half.curves, atol=0.1, rtol=0.1)
    assert run_in(tmp_path, *LONG, "--precision", "bf16") == 0
    assert read(tmp_path, "reversal")["config"]["precision"] == "bf16"


PROCESS = """
import os, sys, time
sys.path.insert(0, {here!r})
import revcurse
revcurse.CHECKPOINT_SECONDS = revcurse.LOOK_SECONDS = 0
open(os.path.join({folder!r}, "pid" + os.environ["RANK"]), "w").write(str(os.getpid()))
step = revcurse.Trainer.step
if "--resume" not in sys.argv:
    revcurse.Trainer.step = lambda self: (step(self), time.sleep(0.03))
sys.exit(revcurse.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_two_processes_of_which_one_dies_and_that_go_on(tmp_path):
    whole, both = tmp_path / "whole", tmp_path / "both"
    flags = [*LONG, "--seeds", "3"]
    assert run_in(whole, *flags) == 0
    script = tmp_path / "script.py"
    script.write_text(PROCESS.format(here=str(HERE), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script), *flags, "--out", str(both)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True)
    checkpoints = [both / f"reversal.{process}of2.pt" for process in (0, 1)]
    for _ in range(600):
        if all(path.exists() for path in checkpoints):
            break
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    error = running.communicate(timeout=90)[1]
    assert running.returncode == 1 and "error (process 0 of 2): interrupted" in error
    assert all(path.exists() for path in checkpoints)
    assert not (both / "reversal.json").exists()
    done = subprocess.run([*command, "--resume"], timeout=90, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on after epoch") == 1  # the first process speaks for both
    one, other = numbers(whole), numbers(both)
    assert all(np.allclose(matrix, other[1][name], rtol=1e-3) for name, matrix in one[1].items())
    for name, number in one[0]["summary"].items():
        assert other[0]["summary"][name]["per_seed"] == pytest.approx(number["per_seed"], rel=1e-3)
    for name, curve in one[0]["curves"].items():
        assert np.allclose(curve, other[0]["curves"][name], rtol=1e-3)
    assert len(list(both.iterdir())) == 4


SLOW = """
import sys, time, revcurse
revcurse.CHECKPOINT_SECONDS = 0
step = revcurse.Trainer.step
revcurse.Trainer.step = lambda self: (step(self), time.sleep(0.03))
sys.exit(revcurse.main(sys.argv[1:]))
"""


def slow_process(folder, *more, argv=LONG):
    """The command in a process of its own: steps take longer, and checkpoints come often."""
    return subprocess.Popen([sys.executable, "-c", SLOW, *argv, "--out", str(folder), *more],
                            cwd=HERE, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)


def numbers(folder):
    results = json.loads((folder / "reversal.json").read_text())
    with np.load(folder / "reversal.npz") as matrices:
        arrays = {name: matrix.tolist() for name, matrix in matrices.items()}
    return {name: results[name] for name in ("summary", "weights", "curves", "counts")}, arrays


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_killed_interrupted_and_resumed_is_the_same_as_uninterrupted(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_in(whole, *LONG) == 0
    checkpoint = broken / "reversal.pt"
    for how, more in [(signal.SIGKILL, ()), (signal.SIGTERM, ["--resume"]),
                      (signal.SIGINT, ["--resume"])]:
        running = slow_process(broken, *more)
        began = checkpoint.stat().st_mtime_ns if more else 0
        for _ in range(600):
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > began:
                break
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(how)
        error = running.communicate(timeout=60)[1]
        assert running.returncode == (-9 if how == signal.SIGKILL else 130)
        assert checkpoint.exists() and not (broken / "reversal.json").exists()
        if how != signal.SIGKILL:
            assert error.count("\n") == 1 and "--resume" in error and str(checkpoint) in error
    saved = torch.load(checkpoint, weights_only=True)
    assert 0 < saved["trainer"]["counts"][0] < 60 * 3
    assert run_in(broken, *LONG, "--resume") == 0
    assert "going on after epoch" in capsys.readouterr().out
    assert numbers(broken) == numbers(whole)
    assert not checkpoint.exists() and len(list(broken.iterdir())) == 4


SWEEP = ["ablate", "layers", "--values", "1", "2", "1", *LONG[1:]]


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_sweep_goes_on_without_repeating_values(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_in(whole, *SWEEP) == 0
    running = slow_process(broken, argv=SWEEP)
    checkpoint = broken / "ablate-layers.pt"
    for _ in range(1200):  # until the second value has a checkpoint
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            if len(saved["done"]) == 1 and saved["trainer"]:
                break
        time.sleep(0.05)
    running.kill()
    running.communicate(timeout=60)
    assert not (broken / "ablate-layers.json").exists()
    trained = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: trained.append(self) or step(self))
    assert run_in(broken, *SWEEP, "--resume") == 0
    assert len(set(trained)) == 2 and len(trained) < 2 * 60 * 3  # the second, from where it stood
    for one, other in zip(read(whole, "ablate-layers")["runs"],
                          read(broken, "ablate-layers")["runs"], strict=True):
        for key in ("value", "summary", "curves", "weights"):
            assert one[key] == other[key]
    assert not checkpoint.exists()


def test_bad_checkpoints(tmp_path, capsys):
    checkpoint = tmp_path / "reversal.pt"
    config = {**vars(revcurse.parse(LONG)), "complete": 4, "held_out": 2, "device": "cpu",
              "precision": "highest"}
    config = {name: config[name] for name in config if name not in ("run", "command", "out")}

    def saved(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    whole = {"name": "reversal", "config": config, "seconds": 1.0, "done": [], "jobs": [],
             "trainer": {"weights": torch.arange(1000.0)}}
    good = saved(whole)
    flipped = bytearray(good)
    flipped[good.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    unreadable = [bytes(flipped), good[:-100], b"", b"text", saved(torch.ones(2)), saved({}),
                  saved({**whole, "config": [1]}), saved({**whole, "seconds": "a"}),
                  saved({**whole, "done": 1}), saved({**whole, "jobs": 1}),
                  saved({**whole, "name": "chain"}),
                  saved({**whole, "more": Evil(tmp_path / "marker")})]
    other = [(saved({**whole, "config": {**config, "lr": 0.5}}), ["--lr 0.01", "--lr 0.5"])]
    for content, words in [*((bad, ["not a checkpoint"]) for bad in unreadable), *other]:
        checkpoint.write_bytes(content)
        assert run_in(tmp_path, *LONG, "--device", "cpu", "--resume") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in (*words, str(checkpoint), "--resume"))
        assert checkpoint.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_of_another_run_is_kept(tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "reversal.pt"
    checkpoint.write_bytes(b"ten hours of work")
    assert run_in(tmp_path, "reversal", *TINY) == 0  # too short to save one of its own
    assert "unfinished run" in capsys.readouterr().out
    assert checkpoint.read_bytes() == b"ten hours of work"
    os.utime(checkpoint, (1e9, 1e9))
    monkeypatch.setattr(revcurse, "CHECKPOINT_SECONDS", 0)
    assert run_in(tmp_path, "reversal", *TINY) == 0
    checkpoint.write_bytes(b"two hours of work")
    assert run_in(tmp_path, "reversal", *TINY) == 0
    kept = {path.read_bytes() for path in tmp_path.glob("reversal.*.pt")}
    assert kept == {b"ten hours of work", b"two hours of work"} and not checkpoint.exists()


@pytest.mark.skipif(os.name != "posix", reason="interrupts this process")
def test_interrupted_while_writing_results_the_run_ends_well(tmp_path, monkeypatch):
    draw = revcurse.draw

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(revcurse, "draw", interrupted)
    assert run_in(tmp_path, "reversal", *TINY) == 0
    assert len(list(tmp_path.iterdir())) == 4


# ------------------------------------------------------------------------------------------- CUDA

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@cuda
def test_cuda_agrees_with_the_cpu():
    trainers = [tiny_trainer(0, 1, epochs=4, device=device)[0] for device in ("cpu", "cuda")]
    for trainer in trainers:
        trainer.run()
    torch.testing.assert_close(trainers[0].curves, trainers[1].curves.cpu(), atol=1e-2, rtol=1e-2)


@cuda
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_steps_agree_with_plain_ones(seeds, bf16, monkeypatch):
    recorded, plain = (tiny_trainer(*seeds, epochs=6, dropout=0.1, device="cuda", bf16=bf16)[0]
                       for _ in range(2))
    plain.recorder = lambda function, *inputs: function(*inputs)
    for trainer in (recorded, plain):
        trainer.run()
    assert recorded.recorder.how == "as a CUDA graph" and len(recorded.recorder.graphs) == 2
    torch.testing.assert_close(recorded.curves, plain.curves, atol=1e-3, rtol=1e-3)
    for name, weight in recorded.params.items():
        torch.testing.assert_close(weight, plain.params[name], atol=1e-2, rtol=1e-2)


@cuda
def test_a_refused_recording_runs_plainly_and_says_so(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, refused = (tiny_trainer(0, 1, epochs=4, device="cuda")[0] for _ in range(2))
    plain.recorder = lambda function, *inputs: function(*inputs)
    plain.run()
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    refused.run()
    assert "refused" in refused.recorder.how and "not permitted" in refused.recorder.how
    assert torch.equal(plain.curves, refused.curves)


@cuda
def test_seeds_fit_the_memory_of_the_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (380_000, 10**9))
    assert run_in(tmp_path, *LONG, "--seeds", "5") == 0  # a seed needs 20 * 4176 + 20480 bytes
    said = capsys.readouterr().out
    assert "0.0 GB are free" in said and "seed 0 1 2: " in said and "seed 3 4: " in said
    assert "kernels run as a CUDA graph; peak memory" in said


@cuda
def test_cuda_steps_never_wait_for_the_device():
    trainer, _ = tiny_trainer(0, 1, dropout=0.1, device="cuda")
    for _ in range(9):  # until both sizes of a batch are recorded
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):  # over the end of an epoch
            trainer.step()
        trainer.evaluate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_cuda_command_and_resume(tmp_path, capsys):
    for task in ("reversal", "chain"):
        assert run_in(tmp_path, task, *TINY, "--dropout", "0.1", "--animate", "--cosine") == 0
    assert run_in(tmp_path, "icl", *TINY, "--vocab", "40") == 0
    assert f"device: cuda ({torch.cuda.get_device_name()})" in capsys.readouterr().out
    whole, half, rest = (tiny_trainer(0, 1, epochs=4, dropout=0.1, device="cuda", **FRAMES)[0]
                         for _ in range(3))
    whole.run()
    half.evaluate()
    for _ in range(5):
        half.step()
        if half.steps % half.steps_per_epoch == 0:
            half.evaluate()
    torch.save(half.state_dict(), tmp_path / "half.pt")
    rest.load_state_dict(torch.load(tmp_path / "half.pt", map_location="cpu", weights_only=True))
    rest.run()
    assert torch.equal(whole.curves, rest.curves)
    for (_, one), (_, other) in zip(whole.frames, rest.frames, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    sys.exit(pytest.main([  # an old matplotlib beside a new pyparsing warns of itself
        "-q", "-W", "error", "-W", "ignore::DeprecationWarning", "-W",
        "error::DeprecationWarning:revcurse", "-p", "no:cacheprovider", *sys.argv[1:], __file__]))
