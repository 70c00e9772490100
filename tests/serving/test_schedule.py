"""Who is admitted next and whose turn it is: fair between adapters and lanes, and nobody waits for ever."""

from __future__ import annotations

from mlx_lora import GenerateConfig
from mlx_lora.serving.requests import Request, Row
from mlx_lora.serving.schedule import Schedule

LANE = ("shared",)


def row(adapter: str | None) -> Row:
    return Row(Request([1], GenerateConfig(), adapter), None, lambda piece: None, set())


def admitted(schedule: Schedule, count: int) -> list[str | None]:
    found = []
    for _ in range(count):
        name, first = schedule.first()
        schedule.admit(name, first)
        found.append(first.request.adapter)
        schedule.remove(first)  # it ends at once
    return found


def test_a_flood_of_one_adapter_delays_another_by_one_place():
    schedule = Schedule(1.0)
    for _ in range(100):
        schedule.add(LANE, row("flood"))
    assert admitted(schedule, 10) == ["flood"] * 10
    schedule.add(LANE, row("other"))
    schedule.add(LANE, row(None))
    assert set(admitted(schedule, 3)) == {"flood", "other", None}
    assert admitted(schedule, 5) == ["flood"] * 5


def test_the_adapters_of_a_backlog_alternate():
    schedule = Schedule(1.0)
    for adapter in ("a", "a", "a", "b", "b", "b", None):
        schedule.add(LANE, row(adapter))
    assert [{*admitted(schedule, 3)}, {*admitted(schedule, 2)}, {*admitted(schedule, 2)}] == [
        {"a", "b", None},
        {"a", "b"},
        {"a", "b"},
    ]


def test_new_adapters_that_keep_coming_do_not_starve_a_request():
    """New adapters' requests come faster than they are admitted; the second one of "a" has its turn all the same."""
    schedule = Schedule(1.0)
    schedule.add(LANE, row("a"))
    waiting = row("a")
    schedule.add(LANE, waiting)
    for number in range(20):
        schedule.add(LANE, row(f"new {number}"))
        schedule.add(LANE, row(f"newer {number}"))
        admitted(schedule, 1)
        if waiting not in schedule.rows:
            break
    assert waiting not in schedule.rows and number < 6


def test_lanes_take_turns_and_one_without_rows_has_none():
    schedule = Schedule(turn_seconds=0.0)
    for name in ("x", "y", "z"):
        schedule.add((name,), row(None))
    assert schedule.next() is None, "rows that wait take no turn from those that are computed"
    for _ in range(3):
        schedule.admit(*schedule.first())
    assert {schedule.next() for _ in range(3)} == {("x",), ("y",), ("z",)}
    gone = next(each for each in schedule.rows if each in schedule.active[("y",)])
    assert schedule.remove(gone) == ("y",) and schedule.remove(gone) is None
    assert {schedule.next() for _ in range(4)} == {("x",), ("z",)}
    schedule.turn_seconds = 1e9
    assert len({schedule.next() for _ in range(4)}) == 1
