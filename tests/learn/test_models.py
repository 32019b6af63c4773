"""Every model family: gradients against finite differences and PyTorch, layouts, categories, empty shapes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from learn_batches import random_batch
from torch.nn import functional

from raysgd.errors import InputError
from raysgd.learn.batch import Batch, Inputs, Target
from raysgd.learn.models import MLP, LinearRegression, LogisticRegression, Model, SoftmaxRegression, ValueAndGrad

#: model, number of classes
MODELS = {
    "linear": (LinearRegression(), 0),
    "logistic": (LogisticRegression(), 2),
    "softmax": (SoftmaxRegression(), 4),
    "softmax of two": (SoftmaxRegression(), 2),
    "mlp": (MLP(hidden=(6,)), 2),
    "mlp tanh": (MLP(hidden=(5, 4), activation="tanh", loss="cross_entropy"), 3),
    "mlp relu deep": (MLP(hidden=(7, 5, 3), loss="squared"), 0),
    "mlp one unit": (MLP(hidden=(1,), activation="tanh", loss="squared"), 0),
}
INPUTS = {
    "numbers": Inputs(5),
    "categories": Inputs(0, (3, 4)),
    "both": Inputs(4, (3, 2, 6)),
    "nothing": Inputs(0),
    "a category without values": Inputs(2, (0,)),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_input = pytest.mark.parametrize("shape", INPUTS)


def bound_and_batch(name, shape, n_rows=23, **options):
    model, classes = MODELS[name]
    bound = model.bind(INPUTS[shape], Target(classes))
    params = bound.initial(0) + np.random.default_rng(1).normal(0, 0.3, bound.layout.n_params).astype(np.float32)
    return bound, params, random_batch(n_rows, INPUTS[shape], classes, **options)


def gradient_of(bound, params, batch):
    out = np.full_like(params, np.nan)
    value = bound.value_and_grad(params, batch, out)
    return value, out


def wide_value(bound, params, batch):
    """The weighted loss sum, in float64 from the parameters on."""
    wide = Batch(batch.numeric.astype(np.float64), batch.codes, batch.label)
    scores = bound.scores(params, wide)
    assert scores.dtype == np.float64
    values = bound.loss.value(scores, batch.label)
    return float((values if batch.weight is None else values * batch.weight).sum())


@every_input
@every_model
@pytest.mark.parametrize("options", [{}, {"weighted": True, "unseen": 0.2}], ids=["plain", "weighted, unseen"])
def test_finite_differences(name, shape, options):
    """Central differences in float64, step 1e-5: within 1e-5 of the float32 gradient, coordinate by coordinate."""
    bound, params, batch = bound_and_batch(name, shape, **options)
    value, gradient = gradient_of(bound, params, batch)
    wide, step = params.astype(np.float64), 1e-5
    assert value == pytest.approx(wide_value(bound, wide, batch), rel=1e-5)
    for i in range(len(params)):
        shift = np.zeros_like(wide)
        shift[i] = step
        slope = (wide_value(bound, wide + shift, batch) - wide_value(bound, wide - shift, batch)) / (2 * step)
        assert gradient[i] == pytest.approx(slope, rel=1e-5, abs=2e-5)


def torch_loss(bound, params, batch, activation):
    """The same model written in PyTorch, one-hot as an embedding, in float64."""
    w = {k: torch.tensor(v.astype(np.float64), requires_grad=True) for k, v in bound.layout.views(params).items()}
    prefix = "layer0/" if "layer0/bias" in w else ""
    z = torch.zeros((len(batch), len(w[prefix + "bias"])), dtype=torch.float64) + w[prefix + "bias"]
    if prefix + "weights" in w:
        z = z + torch.tensor(batch.numeric.astype(np.float64)) @ w[prefix + "weights"]
    if prefix + "codes" in w:
        table = torch.cat([w[prefix + "codes"], torch.zeros((1, z.shape[1]), dtype=torch.float64)])
        z = z + functional.embedding(torch.tensor(batch.codes.astype(np.int64)), table).sum(dim=1)
    layer = 1
    while f"layer{layer}/weights" in w:
        z = activation(z) @ w[f"layer{layer}/weights"] + w[f"layer{layer}/bias"]
        layer += 1
    y = torch.tensor(batch.label.astype(np.float64))
    if bound.loss.name == "squared":
        return w, functional.mse_loss(z[:, 0], y, reduction="sum") / 2
    if bound.loss.name == "logistic":
        return w, functional.binary_cross_entropy_with_logits(z[:, 0], y, reduction="sum")
    return w, functional.cross_entropy(z, y.long(), reduction="sum")


@pytest.mark.parametrize("shape", ["numbers", "categories", "both"])
@every_model
def test_pytorch_autograd(name, shape):
    bound, params, batch = bound_and_batch(name, shape, n_rows=200, unseen=0.1)
    activation = torch.tanh if getattr(bound, "activation", None) == "tanh" else torch.relu
    arrays, loss = torch_loss(bound, params, batch, activation)
    loss.backward()
    value, gradient = gradient_of(bound, params, batch)
    assert value == pytest.approx(loss.item(), rel=1e-6)
    for key, view in bound.layout.views(gradient).items():
        np.testing.assert_allclose(view, arrays[key].grad.numpy(), rtol=1e-5, atol=1e-4, err_msg=key)


@every_model
def test_codes_are_one_hot_columns(name):
    """A model on codes has the scores and the gradient of the same model on the one-hot matrix."""
    bound, params, batch = bound_and_batch(name, "categories", n_rows=100, unseen=0.1)
    inputs, classes = INPUTS["categories"], MODELS[name][1]
    one_hot = np.zeros((100, inputs.n_codes + 1), np.float32)
    np.put_along_axis(one_hot, batch.codes.astype(np.intp), 1, axis=1)
    dense = MODELS[name][0].bind(Inputs(inputs.n_codes), Target(classes))
    matrix = np.ascontiguousarray(one_hot[:, :-1])
    dense_batch = Batch(matrix, np.empty((100, 0), np.int32), batch.label)
    np.testing.assert_allclose(bound.scores(params, batch), dense.scores(params, dense_batch), rtol=1e-5, atol=1e-5)
    got, expected = gradient_of(bound, params, batch)[1], gradient_of(dense, params, dense_batch)[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


@every_model
def test_an_unseen_category_contributes_zero_and_gets_no_gradient(name):
    bound, params, batch = bound_and_batch(name, "both")
    unseen = Batch(batch.numeric, np.full_like(batch.codes, INPUTS["both"].n_codes), batch.label)
    zeroed = params.copy()
    for key, view in bound.layout.views(zeroed).items():
        if key.endswith("codes"):
            view[:] = 0
    np.testing.assert_array_equal(bound.scores(params, unseen), bound.scores(zeroed, batch))
    _, gradient = gradient_of(bound, params, unseen)
    for key, view in bound.layout.views(gradient).items():
        assert view.any() != key.endswith("codes")


@every_input
@every_model
def test_no_rows_give_a_zero_gradient(name, shape):
    bound, params, batch = bound_and_batch(name, shape, n_rows=0)
    value, gradient = gradient_of(bound, params, batch)
    assert value == 0
    assert not gradient.any()
    assert bound.scores(params, batch).shape == (0, bound.loss.outputs(Target(MODELS[name][1])))


@every_input
@every_model
def test_arguments_are_only_read_and_results_are_float32(name, shape):
    bound, params, batch = bound_and_batch(name, shape, weighted=True)
    before = [a.tobytes() for a in (params, batch.numeric, batch.codes, batch.label, batch.weight)]
    value, gradient = gradient_of(bound, params, batch)
    scores = bound.scores(params, batch)
    assert before == [a.tobytes() for a in (params, batch.numeric, batch.codes, batch.label, batch.weight)]
    assert type(value) is float
    assert scores.dtype == gradient.dtype == np.float32
    assert scores.flags.c_contiguous


@every_model
def test_gradients_add_up_over_rows(name):
    bound, params, batch = bound_and_batch(name, "both", n_rows=60)
    value, gradient = gradient_of(bound, params, batch)
    parts = [gradient_of(bound, params, batch.slice(a, b)) for a, b in ((0, 1), (1, 20), (20, 60))]
    assert value == pytest.approx(sum(part[0] for part in parts), rel=1e-6)
    np.testing.assert_allclose(gradient, sum(part[1].astype(np.float64) for part in parts), rtol=1e-4, atol=1e-4)


@every_model
def test_bound_models_pickle_to_the_same_bytes(name):
    bound, params, batch = bound_and_batch(name, "both")
    copy = pickle.loads(pickle.dumps(bound))
    assert isinstance(copy, ValueAndGrad)
    assert isinstance(MODELS[name][0], Model)
    assert gradient_of(copy, params, batch)[1].tobytes() == gradient_of(bound, params, batch)[1].tobytes()
    assert copy.layout == bound.layout


@every_model
def test_a_diverged_model_says_so_in_the_gradient_and_stays_silent(name):
    bound, params, batch = bound_and_batch(name, "both")
    for bad in (np.inf, np.nan, 3e38):
        value, gradient = gradient_of(bound, np.full_like(params, bad), batch)
        if bad != 3e38:
            assert not (np.isfinite(value) and np.isfinite(gradient).all())
        bound.scores(np.full_like(params, bad), batch)


def test_names_of_the_arrays():
    both, target = INPUTS["both"], Target(2)
    names = [array.name for array in LogisticRegression().bind(both, target).layout.arrays]
    assert names == ["weights", "codes", "bias"]
    assert [a.name for a in LogisticRegression().bind(Inputs(3), target).layout.arrays] == ["weights", "bias"]
    assert [a.name for a in LogisticRegression().bind(Inputs(0, (3,)), target).layout.arrays] == ["codes", "bias"]
    layout = MLP(hidden=(6, 5)).bind(both, target).layout
    assert [(a.name, a.shape, a.penalized) for a in layout.arrays] == [
        ("layer0/weights", (4, 6), True),
        ("layer0/codes", (11, 6), True),
        ("layer0/bias", (6,), False),
        ("layer1/weights", (6, 5), True),
        ("layer1/bias", (5,), False),
        ("layer2/weights", (5, 1), True),
        ("layer2/bias", (1,), False),
    ]


@pytest.mark.parametrize(
    ("model", "gains"),
    [
        (LinearRegression(), [0.01]),
        (SoftmaxRegression(init_scale=0.5), [0.5]),
        (MLP(hidden=(400, 300), init_scale=0.5), [0.5 * 2**0.5, 0.5 * 2**0.5, 0.5]),
        (MLP(hidden=(400, 300), activation="tanh"), [1, 1, 1]),
    ],
)
def test_initial_weights_are_scaled_by_fan_in_and_biases_are_zero(model, gains):
    target = Target(0) if model.target_kind == "number" else Target(2 if isinstance(model, MLP) else 5)
    bound = model.bind(Inputs(300, (2000,) * 3), target)
    views = bound.layout.views(bound.initial(7))
    fan_in = {"weights": 303, "codes": 303, "layer0/weights": 303, "layer0/codes": 303}
    fan_in |= {"layer1/weights": 400, "layer2/weights": 300}
    for key, view in views.items():
        if key.endswith("bias"):
            assert not view.any()
        else:
            gain = gains[int(key[5])] if "layer" in key else gains[0]
            assert view.std() == pytest.approx(gain / fan_in[key] ** 0.5, rel=0.1)
    assert bound.initial(7).tobytes() == bound.initial(7).tobytes() != bound.initial(8).tobytes()


def test_a_categorical_column_counts_once_in_fan_in():
    """A row adds up one weight per categorical column, however many values the column has."""
    bound = LogisticRegression(init_scale=1.0).bind(Inputs(0, (5000, 10)), Target(2))
    assert bound.initial(0).std() == pytest.approx(1 / 2**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("model", "classes", "sentence"),
    [
        (LogisticRegression(), 3, "label must have 2 classes for the logistic loss, got 3"),
        (LogisticRegression(), 0, "label must have 2 classes"),
        (SoftmaxRegression(), 0, "label must have 2 or more classes"),
        (LinearRegression(), 2, "label must be a number"),
        (MLP(), 5, "label must have 2 classes"),
        (MLP(loss="squared"), 2, "label must be a number"),
        (LogisticRegression(l2=-1.0), 2, "l2 must be >= 0, got -1.0"),
        (MLP(loss="hinge"), 2, "loss must be one of 'logistic', 'cross_entropy', 'squared', got 'hinge'"),
    ],
)
def test_bind_refuses_what_does_not_fit(model, classes, sentence):
    with pytest.raises(InputError, match=sentence):
        model.bind(Inputs(3), Target(classes))


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (LinearRegression(l2="0.1", init_scale=float("nan")), ["l2", "init_scale"]),
        (LogisticRegression(l2=True), ["l2"]),
        (SoftmaxRegression(init_scale=-1), ["init_scale"]),
        (MLP(hidden=()), ["hidden"]),
        (MLP(hidden=64), ["hidden"]),
        (MLP(hidden="64"), ["hidden"]),
        (MLP(hidden=(8, 0, True, 2.5)), ["hidden[1]", "hidden[2]", "hidden[3]"]),
        (MLP(activation="gelu", loss=["squared"], l2=-1, init_scale=0), ["activation", "loss", "l2", "init_scale"]),
        (MLP(hidden=[8, 8]), []),
        (LogisticRegression(l2=0.1, init_scale=0), []),
    ],
)
def test_every_violation_is_named_by_its_field(model, fields):
    assert [problem.split(" ")[0] for problem in model.problems()] == fields


def test_target_kinds():
    assert LogisticRegression().target_kind == SoftmaxRegression().target_kind == MLP().target_kind == "class"
    assert LinearRegression().target_kind == MLP(loss="squared").target_kind == "number"
