"""Tables for microcontrollers: rows are counts that repeat, and their sums are whole networks."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from transformers import ViTConfig

from nascompile import latency_table, network, plugins, program_costs, program_profiler, space as spaces, table_check, targets
from nascompile.errors import BudgetError, TableError, UnsupportedError
from nascompile.mcu import board as boards, micro
from nascompile.mcu.transformer import RandomNumbers, Shape, build
from nascompile.program_costs import REPEATED, Chip
from nascompile.progress import Silent

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24, "num_labels": 3}
CONFIG = ViTConfig(**SIZES, image_size=12, patch_size=4, num_channels=1)


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def bench(config=CONFIG, device: str = "stm32f746", session=None) -> SimpleNamespace:
    family, backend = plugins.get("families", "vit"), plugins.get("backends", "mcu_c")
    target = targets.make(device, "", family.workload(config, 1, 0), session=session)
    space = network.search_space(family, config, backend, target, "m")
    return SimpleNamespace(
        family=family, config=config, space=space, target=target, backend=backend, device=targets.device(device),
        parts=(family, config, space, target, backend, targets.device(device)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, mcu_tools):
    """(bench, table) of a space of small networks."""
    b = bench()
    return b, program_profiler.profile(*b.parts, tmp_path_factory.mktemp("profile"), 0, networks=4)


def test_whole_networks_are_predicted_to_a_fraction_of_a_percent(made):
    b, table = made
    assert table_check.faults(table) == ()
    assert {row.operator for row in table.rows} == set(program_costs.operators(b.family, b.config, b.space, b.target))
    assert len(table.validation) == 4
    errors = [abs(r.measured.value / r.predicted_ms - 1) for r in table.validation]
    assert max(errors) < 0.01
    assert max(errors) > 0, "networks have other numbers than rows: equal to the last instruction would be no check"
    assert {row.latency.kind for row in table.rows} == {"modelled"}
    assert latency_table.time_model(table.environment)


def test_a_row_is_a_count_of_its_own(made, tmp_path):
    """By itself or beside others: the same number, but for what loading a constant takes."""
    b, table = made
    rows = {row.operator: row.latency.value for row in table.rows}
    inner = program_profiler.Bench(b.family, b.config, b.space, b.target, 0)
    workshop = micro.Workshop(micro.roomy(inner.chip.board), tmp_path)
    attention = [o for o in rows if o.kind == "attention"]
    assert {REPEATED in o.attributes for o in attention} == {True, False}
    alone = [attention[-1], next(o for o in rows if o.kind == "mlp")]
    for project in inner.projects(alone):
        for operator, instructions in project.count(workshop).items():
            assert abs(instructions - boards.instructions_of(rows[operator], 216.0)) <= 4
            assert instructions > 100


def test_the_plan_that_normalizes_for_every_head_has_rows_of_its_own(made, tmp_path):
    b, table = made
    point = spaces.largest(b.space)
    graph = network.graph(b.family, b.config, b.space, point, b.target)
    plain, repeated = (latency_table.predict(table, program_costs.in_plan(graph, plan)).value for plan in ("blocks", "all"))
    assert repeated > 1.02 * plain, "or there would be no need"
    shape = Shape.of_graph(graph, b.target.workload.resolution)
    counted = micro.Workshop(Chip(b.target).board, tmp_path).count(build("all", shape, RandomNumbers(5), "all"))
    assert boards.modelled_ms(sum(counted.values()), 216.0) == pytest.approx(repeated, rel=0.01)


def test_canary_and_what_it_is_for(made, tmp_path):
    b, table = made
    arguments = (b.family, b.config, b.space, b.backend, b.device, tmp_path, 0)
    assert program_profiler.canary(table, *arguments) == 1.0

    def scaled(factor):
        rows = tuple(msgspec.structs.replace(r, latency=latency_table.rescaled(r.latency, factor)) for r in table.rows)
        return msgspec.structs.replace(table, rows=rows)

    assert program_profiler.canary(scaled(1 + 0.9 * program_profiler.SLACK_SHARE), *arguments) == 1.0, "other tokens"
    with pytest.raises(TableError, match=r"a count does not repeat: .* in the latency table"):
        program_profiler.canary(scaled(1.01), *arguments)
    foreign = msgspec.structs.replace(table, environment=msgspec.structs.replace(table.environment, must_match=(("threads", 1),)))
    with pytest.raises(TableError, match="made elsewhere"):
        program_profiler.canary(foreign, *arguments)


def test_what_was_counted_is_not_counted_again(made, tmp_path, monkeypatch):
    b, table = made
    counted = []
    count = program_profiler.Project.count
    monkeypatch.setattr(program_profiler.Project, "count", lambda self, shop: counted.extend(self.operators) or count(self, shop))
    few = msgspec.structs.replace(table, rows=table.rows[2:])
    notes = Notes()
    again = program_profiler.profile(*b.parts, tmp_path, 0, notes, networks=1, existing=few)
    assert set(counted) == {row.operator for row in table.rows[:2]}
    before = {row.operator: row.latency for row in table.rows}
    assert {row.operator for row in again.rows} == set(before)
    assert all(row.latency == before[row.operator] for row in again.rows if row.operator not in counted)
    assert all(row.latency.value == pytest.approx(before[row.operator].value, rel=0.01) for row in again.rows)
    assert notes.said[0].startswith(f"2 of {len(table.rows)} operators to count")


def test_a_killed_profile_goes_on(made, tmp_path, monkeypatch):
    b, table = made

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_profiler, "_networks", killed)
    with pytest.raises(KeyboardInterrupt):
        program_profiler.profile(*b.parts, tmp_path, 0, networks=1)
    monkeypatch.undo()
    monkeypatch.setattr(program_profiler.Project, "count", killed)  # nothing is left to count
    again = program_profiler.profile(*b.parts, tmp_path, 0, networks=1)
    assert [r.latency for r in again.rows] == [r.latency for r in table.rows]
    assert not list(tmp_path.glob("*.part"))


def test_a_device_that_nothing_fits_says_what_the_nearest_needs(mcu_tools, tmp_path):
    b = bench(session={"ram": "0x20000000:4608", "flash": "0x08000000:1048576"})
    with pytest.raises(BudgetError, match=r"no network of the space fits `stm32f746`: .* bytes of RAM \(4,608 there\)") as caught:
        program_profiler.profile(*b.parts, tmp_path, 0)
    assert caught.value.hint.startswith("a device with more RAM")


def test_boards_do_not_count_tables(mcu_tools, tmp_path):
    b = bench()
    with pytest.raises(UnsupportedError, match="counted in QEMU, not on a device of kind serial_m7"):
        program_profiler.profile(*b.parts[:-1], plugins.get("devices", "serial_m7"), tmp_path, 0)


# ---------------------------------------------------------------------------------------------- costs


def test_operators_that_no_kernel_takes_have_no_rows():
    b = bench(ViTConfig(**SIZES, image_size=96, patch_size=4, num_channels=1))
    kinds = {o.kind for o in program_costs.operators(b.family, b.config, b.space, b.target)}
    assert kinds == {"embedding", "mlp", "head"}, "577 tokens are too many for attention"


def test_the_devices_memory_bounds_what_nobody_bounded_more(mcu_tools):
    chip = Chip(bench().target)
    limits = {b.metric: b.bound for b in program_costs.bounded((), chip)}
    assert limits == {"memory_mb": 0.32768, "size_mb": 1.048576}
    tight = program_costs.Budget(metric="memory_mb", bound=0.1, target=chip.target.id)
    loose = program_costs.Budget(metric="size_mb", bound=2.0, target=chip.target.id)
    found = program_costs.bounded((tight, loose), chip)
    assert [(b.metric, b.bound, b.limit is True) for b in found] == [
        ("memory_mb", 0.1, False), ("size_mb", 2.0, False), ("size_mb", 1.048576, True),
    ]  # fmt: skip


def test_costs_are_those_of_the_footprint_and_the_table(made):
    from nascompile.search import Pricing

    b, table = made
    pricing = Pricing(b.family, b.config, b.space, b.target, table, chip=Chip(b.target))
    rng = np.random.default_rng(0)
    for point in (spaces.largest(b.space), *(spaces.sample(b.space, rng) for _ in range(5))):
        graph = network.graph(b.family, b.config, b.space, point, b.target)
        footprint = b.backend.footprint(graph, b.target)
        costs, latency, size, *_ = pricing(point)
        assert pricing.costs(point) == costs
        assert (round(1e6 * costs["memory_mb"]), size) == (footprint.ram, footprint.flash)
        assert latency == latency_table.predict(table, graph)
        assert pricing.in_time(point) == {"latency_ms": costs["latency_ms"], "macs_m": costs["macs_m"]}


def mcu_vit() -> SimpleNamespace:
    """A space whose images, patches, channels, heads, neurons and ranks are elastic."""
    family, backend = plugins.get("families", "mcu_vit"), plugins.get("backends", "mcu_c")
    config = family.config_class(
        image_size=16, image_sizes=[8, 16], patch_sizes=[8, 4], num_channels=1, hidden_size=24, head_dim=8, num_attention_heads=2,
        num_hidden_layers=2, intermediate_size=32, num_labels=3,
    )  # fmt: skip
    target = targets.make("stm32f746", "", family.workload(config, 1, 0))
    space = network.search_space(family, config, backend, target, "m")
    return SimpleNamespace(
        family=family, config=config, space=space, target=target, backend=backend,
        parts=(family, config, space, target, backend, targets.device("stm32f746")),
    )  # fmt: skip


def test_a_table_has_what_any_candidate_executes(mcu_tools):
    """Also those of other images, patches and ranks, in the plan that the board has them in."""
    b, rng, seen = mcu_vit(), np.random.default_rng(3), set()
    known, chip = set(program_costs.operators(b.family, b.config, b.space, b.target)), Chip(b.target)
    for _ in range(60):
        graph = network.graph(b.family, b.config, b.space, spaces.sample(b.space, rng), b.target)
        for plan in (chip.takes(graph).graph, program_costs.in_plan(graph, "all")):
            assert {node.operator for node in plan.nodes} <= known
        seen |= {(dict(n.operator.dims).get("image"), n.operator.kind, "rank" in dict(n.operator.dims)) for n in graph.nodes}
    assert {(8, "embedding", False), (16, "embedding", False), (None, "mlp", True), (None, "attention", True)} <= seen


def test_networks_of_other_images_and_ranks_are_predicted(mcu_tools, tmp_path):
    b = mcu_vit()
    table = program_profiler.profile(*b.parts, tmp_path, 1, networks=3)
    errors = [abs(r.measured.value / r.predicted_ms - 1) for r in table.validation]
    assert len(errors) == 3
    assert max(errors) < 0.01
    assert max(r.measured.value for r in table.validation) > 3 * min(r.measured.value for r in table.validation)


def test_what_searchers_are_told_quickly_is_what_they_are_told_slowly(made):
    """Objectives alone against whole prices, through what searchers keep of them."""
    from nascompile.search import Aim, Pricing
    from nascompile.searchers.blocks import Blocks
    from nascompile.searchers.encoding import Encoding

    b, table = made
    pricing = Pricing(b.family, b.config, b.space, b.target, table, chip=Chip(b.target))
    aim = Aim(("error", "latency_ms"), program_costs.bounded((), pricing.chip), (pricing,))
    problem, encoding = aim.problem(b.space), Encoding(b.space)
    whole = Aim(("error", "latency_ms", "memory_mb"), aim.budgets, (pricing,)).problem(b.space)
    quick, slow = Blocks(problem, encoding), Blocks(whole, encoding)
    assert problem.values is not None
    assert slow.problem.values is None, "memory is an objective, so there is no way around it"
    for row in encoding.sample(np.random.default_rng(1), 10):
        assert quick.price(row)[0] == slow.price(row)[0]
        assert quick.over(row[None])[0] == slow.over(row[None])[0] == 0
