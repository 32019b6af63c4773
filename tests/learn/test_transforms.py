"""Update rules against their recurrences, against PyTorch, and byte for byte under every cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from raysgd.learn.transforms import FTRL, SGD, AdaGrad, Transform

RATES = [np.float32(0.1 / (1 + t)) for t in range(12)]


def run(transform: Transform, params, gradients, cuts=(), rates=RATES):
    """Parameters and state after all steps, each shard of the cut vector updated by its own calls."""
    edges = [0, *cuts, len(params)]
    now = params.copy()
    state = {slot: np.zeros_like(params) for slot in transform.slots}
    for gradient, rate in zip(gradients, rates, strict=False):
        new, new_state = np.full_like(now, np.nan), {slot: np.full_like(now, np.nan) for slot in state}
        for a, b in pairwise(edges):
            part = {slot: values[a:b] for slot, values in state.items()}
            new_part = {slot: values[a:b] for slot, values in new_state.items()}
            transform.update(gradient[a:b].copy(), rate, now[a:b], part, new[a:b], new_part)
        now, state = new, new_state
    return now, state


def sgd(w, g, state, rate, nesterov):
    momentum = 0.9
    trace = momentum * state.get("momentum", 0.0) + g
    return w - rate * (g + momentum * trace if nesterov else trace), {"momentum": trace}


def adagrad(w, g, state, rate, epsilon):
    accumulator = state.get("accumulator", 0.0) + g * g
    return w - rate * g / (np.sqrt(accumulator) + epsilon), {"accumulator": accumulator}


def ftrl(w, g, state, alpha, optimizer):
    """Algorithm 1 of McMahan et al. 2013, with w as it was left by the step before."""
    n, z = state.get("n", 0.0 * g), state.get("z", 0.0 * g)
    sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / alpha
    z, n = z + g - sigma * w, n + g * g
    inner = -(z - np.sign(z) * optimizer.l1) / ((optimizer.beta + np.sqrt(n)) / alpha + optimizer.l2)
    return np.where(np.abs(z) <= optimizer.l1, 0.0, inner), {"n": n, "z": z}


#: transform, its recurrence in float64, PyTorch's optimizer
TABLE = {
    "sgd": (
        SGD(),
        lambda w, g, _s, r: (w - r * g, {}),
        lambda p: torch.optim.SGD(p, lr=1.0),
    ),
    "momentum": (
        SGD(momentum=0.9),
        lambda w, g, s, r: sgd(w, g, s, r, False),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    ),
    "nesterov": (
        SGD(momentum=0.9, nesterov=True),
        lambda w, g, s, r: sgd(w, g, s, r, True),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True),
    ),
    "adagrad": (
        AdaGrad(),
        lambda w, g, s, r: adagrad(w, g, s, r, 1e-10),
        lambda p: torch.optim.Adagrad(p, lr=1.0, eps=1e-10),
    ),
    "ftrl": (FTRL(), lambda w, g, s, r: ftrl(w, g, s, r, FTRL()), None),
    "ftrl-l1": (FTRL(l1=0.5, l2=0.1), lambda w, g, s, r: ftrl(w, g, s, r, FTRL(l1=0.5, l2=0.1)), None),
}
every_transform = pytest.mark.parametrize("name", TABLE)


def problem(n=257, steps=12, seed=0):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((steps, n)).astype(np.float32)
    gradients[:, ::7] = 0  # coordinates that never get a gradient: AdaGrad divides 0 by epsilon
    return rng.standard_normal(n).astype(np.float32), gradients


@every_transform
def test_the_recurrence(name):
    transform, recurrence, _ = TABLE[name]
    params, gradients = problem()
    w, state = params.astype(np.float64), {}
    for g, rate in zip(gradients.astype(np.float64), RATES, strict=True):
        w, state = recurrence(w, g, state, float(rate))
    got, slots = run(transform, params, gradients)
    np.testing.assert_allclose(got, w, rtol=2e-6, atol=2e-6)
    assert set(slots) == set(state)
    for slot, values in slots.items():
        np.testing.assert_allclose(values, state[slot], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[2] is not None])
def test_pytorch(name):
    transform, _, optimizer_of = TABLE[name]
    params, gradients = problem()
    w = torch.tensor(params, requires_grad=True)
    optimizer = optimizer_of([w])
    for gradient, rate in zip(gradients, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        w.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(run(transform, params, gradients)[0], w.detach().numpy(), rtol=2e-6, atol=2e-6)


@every_transform
def test_every_cut_gives_the_same_bytes(name):
    transform = TABLE[name][0]
    params, gradients = problem(n=131, steps=4)
    whole, state = run(transform, params, gradients)
    for cut in range(1, 131):
        cuts = (cut, (cut + 131) // 2) if cut < 129 else (cut,)
        got, got_state = run(transform, params, gradients, cuts)
        assert got.tobytes() == whole.tobytes()
        assert all(got_state[slot].tobytes() == state[slot].tobytes() for slot in state)


@every_transform
def test_blocks_leave_no_seam(name):
    transform = TABLE[name][0]
    params, gradients = problem(n=40_003, steps=2)
    whole, _ = run(transform, params, gradients)
    cut, _ = run(transform, params, gradients, cuts=(5, 16_383, 16_385))
    assert whole.tobytes() == cut.tobytes()


@every_transform
def test_generation_t_is_only_read_and_no_memory_is_kept(name):
    transform = TABLE[name][0]
    params, gradients = problem()
    state = {slot: np.ones_like(params) for slot in transform.slots}
    before = params.tobytes(), {slot: values.tobytes() for slot, values in state.items()}
    new, new_state = np.empty_like(params), {slot: np.empty_like(params) for slot in state}
    transform.update(gradients[0], RATES[0], params, state, new, new_state)
    assert before == (params.tobytes(), {slot: values.tobytes() for slot, values in state.items()})
    assert new.dtype == np.float32
    assert new.tobytes() != params.tobytes()


@every_transform
def test_a_gradient_that_is_not_finite_shows_in_the_result(name):
    transform = TABLE[name][0]
    for bad in (np.nan, np.inf, -np.inf):
        params, gradients = problem(steps=1)
        gradients[0, 3] = bad
        with np.errstate(invalid="ignore"):
            got, state = run(transform, params, gradients)
        assert not np.isfinite(got[3]) or any(not np.isfinite(values[3]) for values in state.values())
        assert np.isfinite(np.delete(got, 3)).all()


#: The parameters after 5 steps of 4 coordinates. Products, sums, quotients and square
#: roots are correctly rounded, so these are the same on every machine; a change of them breaks resumed runs.
GOLDEN = {
    "sgd": "785684bf49e13abf713dcabea3b2c33d",
    "momentum": "dfbf85bf96e450bf4969eebec4ad433e",
    "nesterov": "278389bf9c485dbfe59a03bfdafa883e",
    "adagrad": "8cab8abf742e42bf0177d0be582bc23d",
    "ftrl": "9a1ca2bdd3f490bdca2118bdf7b2303c",
    "ftrl-l1": "9c518cbd53e481bd7c3f01bd7d05ad3b",
}


@every_transform
def test_golden_bytes(name):
    grid = (np.arange(24, dtype=np.float32).reshape(6, 4) % 7 - 3) / np.float32(3)
    got, _ = run(TABLE[name][0], grid[0], grid[1:])
    assert got.tobytes().hex() == GOLDEN[name]


def test_slots():
    assert SGD().slots == ()
    assert SGD(momentum=0.5).slots == ("momentum",)
    assert AdaGrad().slots == ("accumulator",)
    assert all(isinstance(transform, Transform) for transform, _, _ in TABLE.values())


@pytest.mark.parametrize(
    ("transform", "sentences"),
    [
        (SGD(learning_rate=0), ["learning_rate must be > 0, got 0"]),
        (SGD(learning_rate=-1), ["learning_rate must be > 0, got -1"]),
        (SGD(learning_rate="fast"), ["learning_rate must be a number > 0, got 'fast'"]),
        (SGD(momentum=1.5), ["momentum must be in [0, 1), got 1.5"]),
        (SGD(momentum="0.9", nesterov=1), ["momentum must be a number in [0, 1), got '0.9'", "nesterov must be"]),
        (SGD(nesterov=True), ["nesterov needs momentum in (0, 1)"]),
        (AdaGrad(learning_rate=float("nan"), epsilon=0), ["learning_rate must be a finite", "epsilon must be > 0"]),
    ],
)
def test_problems(transform, sentences):
    problems = transform.problems()
    assert len(problems) == len(sentences)
    assert all(problem.startswith(sentence) for problem, sentence in zip(problems, sentences, strict=True))


def test_ftrl_is_the_proximal_step():
    """The weights minimise ``g_1..t w + 1/2 sum sigma_s (w - w_s)^2 + l1 |w| + (l2 + beta / alpha) / 2 w^2``."""
    alpha, optimizer = 0.1, FTRL(l1=0.3, l2=0.2)
    _, gradients = problem(n=5, steps=6)
    w = np.zeros(5, np.float32)
    now, _ = run(optimizer, w, gradients, rates=[np.float32(alpha)] * 6)
    grid = np.linspace(-1, 1, 20_001)
    path = [run(optimizer, w, gradients[:t], rates=[np.float32(alpha)] * t)[0] if t else w for t in range(6)]
    squares = np.cumsum(gradients.astype(np.float64) ** 2, axis=0)
    sigmas = np.diff(np.sqrt(squares), axis=0, prepend=0.0) / alpha
    for j in range(5):
        value = gradients[:, j].astype(np.float64).sum() * grid
        for sigma, at in zip(sigmas[:, j], path, strict=True):
            value += sigma / 2 * (grid - at[j]) ** 2
        value += 0.3 * np.abs(grid) + (0.2 + 1.0 / alpha) / 2 * grid**2
        assert abs(grid[np.argmin(value)] - now[j]) < 2e-4


def test_ftrl_holds_weights_at_zero():
    params, gradients = problem()
    got, _ = run(FTRL(l1=100.0), np.zeros_like(params), gradients)
    assert not got.any()
    assert not np.signbit(got).any()
