"""Calls and flows: several outputs, other names, conditions, averages, edits, what cannot be meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.flow.flow import Average, Call, Flow, PhaseTimer, join
from alignment.flow.method import Train
from alignment.parallel import World
from alignment.rollout.batch import Batch


class Pair(World):
    """The first of two data ranks; the other has what ``other`` makes of this one's rows."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other, self.messages = other, 0

    def all_gather_object(self, value: Any, label: str = "") -> list[Any]:
        self.messages += 1
        return [value, self.other(value)]


def run(
    flow: Flow, values: dict[str, Any], roles: dict[str, Any] | None = None, world: World | None = None, **more: Any
):
    return flow.run(values, roles or {}, world or World(), PhaseTimer(), **more)


def test_a_call_gives_several_values_and_may_have_names_of_its_own() -> None:
    def split(text: str) -> dict[str, Any]:
        return {"head": text[0], "tail": text[1:]}

    flow = Flow(
        [
            Call("cut", "host", (), ("line",), ("first", "rest"), split,
                 rename={"line": "text", "first": "head", "rest": "tail"}),
            Call("both", "host", (), ("rest", "first"), ("again", "size"), lambda rest, head: (head + rest, len(rest))),
        ],
        inputs=("line",),
    )  # fmt: skip
    assert run(flow, {"line": "abc"}) == {"line": "abc", "first": "a", "rest": "bc", "again": "abc", "size": 2}
    wrong = flow.edit(change={"both": {"run": lambda rest, first: first}})
    with pytest.raises(TypeError, match="both: a tuple of again, size was to be returned"):
        run(wrong, {"line": "abc"})


def test_a_call_may_wait_for_its_step() -> None:
    calls = [
        Call("sometimes", "host", (), ("x",), "y", lambda x: x + 1, when=lambda step: step % 2 == 0),
        Call("always", "host", (), ("y",), "z", lambda y: y),
    ]
    flow = Flow(calls, ("x",))
    assert [run(flow, {"x": 1}, step=step)["z"] for step in range(3)] == [2, None, 2]


def test_rows_of_other_ranks_are_seen_by_host_calls_in_one_message() -> None:
    seen: list[Any] = []
    flow = Flow(
        [
            Call("mark", "infer", ("role",), ("rows",), "marks", lambda role, rows: rows["x"][:, None] * 10),
            Call("sum", "host", (), ("rows", "marks"), "total", lambda rows, marks: seen.append(rows) or marks.sum()),
            Call("more", "host", (), ("marks", "total"), "twice", lambda marks, total: 2 * total),
        ],
        inputs=("rows",),
    )
    other = lambda value: (Batch({"x": np.array([5])}), np.array([[50, 1]]))  # noqa: E731
    world = Pair(other)
    values = run(flow, {"rows": Batch({"x": np.array([1, 2])})}, world=world)
    assert values["marks"].tolist() == [[10], [20]], "an infer call sees this rank's rows"
    assert seen[0]["x"].tolist() == [1, 2, 5] and values["total"] == 81 and values["twice"] == 162
    assert world.messages == 1


def test_a_rank_without_rows_takes_part_in_passes() -> None:
    passes: list[int] = []

    class Engine:
        def infer_pass(self, batches: list[Any], rows: Any, compute: Any) -> list[Any]:
            passes.append(len(batches))
            return []

        def in_passes(self) -> Any:
            from contextlib import nullcontext

            return nullcontext()

    flow = Flow(
        [
            Call("score", "infer", ("role",), ("rows",), "scores", lambda role, rows: 1 / 0),
            Call("end", "host", (), ("scores",), "sum", lambda scores: scores.sum()),
        ],
        inputs=("rows",),
    )
    world = Pair(lambda value: (np.array([1.0, 2.0]),))
    assert run(flow, {"rows": None}, {"role": SimpleNamespace(engine=Engine())}, world)["sum"] == 3.0
    assert passes == [0]


def test_roles_are_averaged_behind_a_call_and_needed_for_it() -> None:
    moved: list[tuple[str, float]] = []

    def engine(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, average=lambda source, share: moved.append((name + source.name, share)))

    roles = {name: SimpleNamespace(engine=engine(name)) for name in ("slow", "fast")}
    call = Call("step", "host", (), ("x",), "y", lambda x: x, after=(Average("fast", "slow", 0.1),))
    flow = Flow([call], ("x",))
    run(flow, {"x": 1}, roles)
    assert moved == [("slowfast", 0.1)]
    assert dict(flow.residency())["step"] == {"fast", "slow"}


def test_a_flow_is_edited_and_checked_at_the_end() -> None:
    flow = Flow([Call("a", "host", (), ("x",), "y", len), Call("b", "host", (), ("y",), "z", int)], ("x",))
    other = flow.edit(drop=("a",), add=[Call("c", "host", (), ("x",), "y", sum)], change={"b": {"run": float}})
    assert [call.name for call in other.calls] == ["c", "b"] and other["b"].run is float
    with pytest.raises(KeyError, match="no call 'aa'; did you mean 'a'"):
        flow.edit(drop=("aa",))
    with pytest.raises(ValueError, match="b needs y"):
        flow.edit(drop=("a",))
    with pytest.raises(ValueError, match="needs scoers; did you mean 'scores'"):
        Flow([Call("d", "host", (), ("scoers",), "w", int)], ("scores",))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (Call("c", "infer", ("acter",), ("x",), "y", len), "there is no role 'acter'; did you mean 'actor'"),
        (Call("c", "host", (), ("x",), "y"), "c: there is no function to run"),
        (Call("c", "train", ("actor", "judge"), ("x",), "y", Train({"judge": len})), "judge has a loss, but"),
        (Call("c", "train", ("judge",), ("x",), "y", Train({"actor": len})), "actor has a loss, but"),
        (Call("c", "infer", ("actor",), ("x",), "y", len), "nothing uses y"),
    ],
)
def test_what_cannot_be_meant_is_told(call: Call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Flow([call], ("x",)).check(["actor", "judge"], ["actor"])


def test_an_update_can_be_taken_up_again_or_is_refused() -> None:
    """A second training call began where the first had stopped; a call behind the update missed what it needs."""
    update = Call("update", "train", ("actor",), ("rows",), "stats", Train({"actor": len}))
    second = Call("more", "train", ("judge",), ("rows",), "others", Train({"judge": len}))
    late = Call("late", "host", (), ("scores", "stats"), "told", len)
    after = Call("after", "host", (), ("rows", "stats"), "told", len)

    def check(*calls: Call) -> None:
        Flow(calls, ("rows", "scores")).check(["actor", "judge"], ["actor", "judge"])

    check(update, after, Call("last", "host", (), ("told",), "end", len))
    check(Call("early", "host", (), ("scores",), "seen", len), update)
    with pytest.raises(ValueError, match="update and more both train"):
        check(update, second)
    with pytest.raises(ValueError, match="late comes behind update and needs scores, which"):
        check(update, late)
    with pytest.raises(ValueError, match="it trains on one batch, and needs rows, scores"):
        check(Call("update", "train", ("actor",), ("rows", "scores"), "stats", Train({"actor": len})))


def test_what_cannot_be_joined_is_told() -> None:
    assert join([]) is None
    assert join([{"a": [1]}, {"a": [2]}]) == {"a": [1, 2]}
    with pytest.raises(TypeError, match="rows of data ranks as int cannot be joined"):
        join([1, 2])
