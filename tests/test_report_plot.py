"""Loss curves: pictures of one run or several, and clear words where there is none."""

from __future__ import annotations

import builtins
import struct
from typing import Any

import pytest

from raysgd.errors import InputError
from raysgd.report.plot import format_of, loss_curve, loss_limits


def lines(steps: int, loss: float = 0.7) -> list[dict[str, Any]]:
    train = [{"kind": "train", "step": s, "loss": loss / s, "learning_rate": 0.1 / s} for s in range(1, steps + 1)]
    return [*train, {"kind": "validation", "step": steps, "loss": loss}]


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_picture_of_several_runs() -> None:
    one = loss_curve({"a": lines(9)})
    several = loss_curve({"a": lines(9), "_b $x": lines(3, loss=0.5)})
    assert size(one) == size(several) == (960, 720)
    assert one != several


def test_names_are_in_the_legend() -> None:
    picture = loss_curve({"flights": lines(9), "_b": lines(3)}, "svg").decode()
    for text in ("flights train", "flights validation", "b train", "learning rate", "step"):
        assert f"<!-- {text} -->" in picture


def test_the_same_lines_give_the_same_bytes() -> None:
    assert loss_curve({"a": lines(9)}) == loss_curve({"a": lines(9)})


def points(*losses: float) -> list[tuple[int, float]]:
    """Losses at steps 0, 10, 20, ..."""
    return [(10 * i, loss) for i, loss in enumerate(losses)]


FLAT = (0.30, 0.31, 0.29, 0.30, 0.29, 0.30, 0.28, 0.29, 0.28, 0.28)


def test_the_untrained_models_loss_does_not_flatten_what_follows() -> None:
    limits = loss_limits([points(0.7, *FLAT)])
    assert limits is not None
    assert 0.27 < limits[0] < 0.28
    assert 0.31 < limits[1] < 0.33


def test_late_losses_are_always_inside() -> None:
    """Divergence, at the end or for a while, and another run that never learned."""
    for runs in (
        [points(0.7, *FLAT, 5.0)],
        [points(0.7, 0.3, 0.3, 9.0, *FLAT)],
        [points(0.7, *FLAT), points(0.7, *[0.69] * 10)],
        [points(5.0, *FLAT), points(0.7, 0.3, 2.0)],
    ):
        late = max(loss for run in runs for _, loss in run[2:])
        limits = loss_limits(runs)
        assert limits is None or limits[1] > late
        assert limits is None or limits[0] < 0.28


@pytest.mark.parametrize("losses", [(0.7,), (0.7, 0.3), (0.3, 0.3, 0.3), (0.31, *FLAT), (0.2, 0.3, 0.4)])
def test_the_whole_range_is_seen_where_nothing_is_flattened(losses: tuple[float, ...]) -> None:
    assert loss_limits([points(*losses)]) is None


def test_what_is_cut_off_is_told() -> None:
    untrained = {"kind": "validation", "step": 0, "loss": 0.7}
    curve = [{"kind": "train", "step": s, "loss": loss} for s, loss in points(0.7, *FLAT)[1:]]
    assert "above: up to 0.7 at step 0 -->" in loss_curve({"a": [untrained, *curve]}, "svg").decode()
    assert "above:" not in loss_curve({"a": curve}, "svg").decode()


@pytest.mark.parametrize(("name", "head"), [("loss.svg", b"<?xml"), ("x/loss.PDF", b"%PDF"), ("loss.png", b"\x89PNG")])
def test_formats(name: str, head: bytes) -> None:
    assert loss_curve({"a": lines(3)}, format_of(name)).startswith(head)


@pytest.mark.parametrize("name", ["loss", "loss.gif", ".png"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"must end in one of \.png, \.svg, \.pdf"):
        format_of(name)


def test_nothing_to_draw() -> None:
    nan_only = [{"kind": "train", "step": 1, "loss": None, "learning_rate": 0.1}]
    with pytest.raises(InputError, match="no loss was logged yet in empty, nan"):
        loss_curve({"a": lines(2), "empty": [], "nan": nan_only})
    with pytest.raises(InputError, match="no loss was logged yet in any run"):
        loss_curve({})


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'raysgd\[plot\]'"):
        loss_curve({"a": lines(2)})
