"""Every transition between random topologies, with a failure at every action."""

import itertools
import random
from pathlib import Path

import msgspec
import pytest

from netorch import engine
from netorch.compiler import compile
from netorch.engine import Progress
from netorch.errors import ApplyError, ConflictError
from netorch.facts import Facts, Uplink
from netorch.planner import Delete, Plan, diff
from netorch.resources import Bridge, Record, Resource, Ruleset, Tap
from netorch.state import EMPTY, State
from tests.engine.fake import FakeSystem, Killed
from tests.engine.topologies import random_topology, state_of


def transitions() -> list[tuple[int, State, State]]:
    pairs = []
    for seed in range(60):
        rng = random.Random(seed)
        old = EMPTY if seed % 5 == 0 else state_of(random_topology(rng))
        pairs.append((seed, old, state_of(random_topology(rng))))
    return pairs


@pytest.mark.parametrize(("seed", "old", "new"), transitions(), ids=lambda value: str(value)[:12])
class TestTransition:
    def test_converges_and_then_rests(self, seed: int, old: State, new: State) -> None:
        machine = FakeSystem(old)
        engine.apply(machine, new, Progress())
        assert machine.observe() == new
        changes = machine.changes
        assert not engine.apply(machine, new, Progress())
        assert machine.changes == changes

    def test_a_failure_at_any_action_leaves_the_old_state(
        self, seed: int, old: State, new: State
    ) -> None:
        length = len(diff(new, old))
        for n in range(1, length + 1):
            machine = FakeSystem(old)
            machine.fail_at = n
            with pytest.raises(ApplyError) as caught:
                engine.apply(machine, new, Progress())
            assert machine.observe() == old, f"seed {seed}, failure at {n}"
            assert not caught.value.left

    def test_what_a_failed_action_left_half_made_goes_too(
        self, seed: int, old: State, new: State
    ) -> None:
        def half(resource: Resource) -> Resource | None:
            if isinstance(resource, Tap):
                return msgspec.structs.replace(resource, up=False, bridge="")
            return (
                msgspec.structs.replace(resource, mtu=999) if isinstance(resource, Bridge) else None
            )

        for n in range(1, len(diff(new, old)) + 1):
            machine = FakeSystem(old)
            machine.fail_at = n
            machine.half_made = half
            with pytest.raises(ApplyError):
                engine.apply(machine, new, Progress())
            assert machine.observe() == old, f"seed {seed}, failure at {n}"

    def test_killed_at_any_action_the_next_apply_converges_and_teardown_clears(
        self, seed: int, old: State, new: State
    ) -> None:
        for n in range(1, len(diff(new, old)) + 1):
            machine = FakeSystem(old)
            machine.fail_at = n
            machine.fail_with = Killed()
            with pytest.raises(Killed):
                execute(machine, diff(new, old))
            killed = FakeSystem(machine.observe())
            engine.apply(machine, new, Progress())
            assert machine.observe() == new
            assert engine.teardown(killed, Progress()) == []
            assert len(killed.observe()) == 0

    def test_interrupted_says_what_was_undone(self, seed: int, old: State, new: State) -> None:
        if len(diff(new, old)) < 2:
            return
        machine = FakeSystem(old)
        machine.fail_at = 2
        machine.fail_with = KeyboardInterrupt()
        with pytest.raises(ApplyError, match="interrupted") as caught:
            engine.apply(machine, new, Progress())
        assert machine.observe() == old
        assert caught.value.undone


def execute(machine: FakeSystem, plan: Plan) -> None:
    for step in plan.steps:
        machine.execute(step, lambda action: None)


def some_state() -> State:
    return state_of(random_topology(random.Random(7)))


def test_a_conflict_stops_before_the_first_change() -> None:
    machine = FakeSystem()
    machine.refused = ["virbr0 is libvirt's"]
    with pytest.raises(ConflictError, match="libvirt"):
        engine.apply(machine, some_state(), Progress())
    assert machine.changes == 0


def test_teardown_goes_on_past_an_error_and_reports_it() -> None:
    state = some_state()
    for n in range(1, len(state) + 1):
        machine = FakeSystem(state)
        machine.fail_at = n
        errors = engine.teardown(machine, Progress())
        # The step is tried again one by one, and the fake fails once: so all goes.
        assert errors == []
        assert len(machine.observe()) == 0


def test_teardown_reports_what_will_not_go() -> None:
    class Stubborn(FakeSystem):
        def _change(self, action: object) -> None:
            if isinstance(getattr(action, "old", None), Bridge):
                raise OSError(16, "Device or resource busy")
            super()._change(action)  # type: ignore[arg-type]

    state = some_state()
    bridges = len(state.of(Bridge))
    machine = Stubborn(state)
    errors = engine.teardown(machine, Progress())
    assert sum("failed to delete bridge" in error for error in errors) == bridges
    assert {resource.key for resource in machine.observe()} == {b.key for b in state.of(Bridge)}


def test_a_machine_that_does_not_show_the_change_is_an_error() -> None:
    class Liar(FakeSystem):
        def observe(self) -> State:
            return State(r for r in super().observe() if not isinstance(r, Tap))

    state = some_state()
    assert state.of(Tap)
    with pytest.raises(ApplyError, match="does not show"):
        engine.apply(Liar(), state, Progress())


def test_the_plan_names_deletes_first_and_needs_before_what_needs_them() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        old, new = state_of(random_topology(rng)), state_of(random_topology(rng))
        plan = diff(new, old)
        verbs = [type(action).__name__ for action in plan]
        assert verbs == sorted(verbs, key=lambda verb: verb != "Delete"), f"seed {seed}"
        made = [action for action in plan if not isinstance(action, Delete)]
        position = {action.key: i for i, action in enumerate(made)}
        for action in made:
            for needed in action.resource.needs:
                if needed in position:
                    assert position[needed] < position[action.key], f"seed {seed}"


def test_a_step_never_holds_what_depends_on_each_other() -> None:
    for seed in range(20):
        for step in diff(state_of(random_topology(random.Random(seed))), EMPTY).steps:
            keys = {action.key for action in step}
            for a, b in itertools.permutations(step, 2):
                assert a.key not in b.resource.needs, f"seed {seed}: {keys}"


@pytest.mark.parametrize(
    ("rules", "steps"),
    [
        ([], [["tap", "tap", "bridge"], ["record"]]),
        ([Ruleset(text="", digest="1")], [["tap", "tap"], ["bridge", "ruleset"], ["record"]]),
    ],
    ids=["without rules", "with rules"],
)
def test_ports_go_with_their_bridge_and_never_after_the_rules(
    rules: list[Resource], steps: list[list[str]]
) -> None:
    taps = [
        Tap(id=id, name=id, network="lan", bridge="br0", mac=f"02:00:00:00:00:0{id}")
        for id in ("1", "2")
    ]
    bridge = Bridge(network="lan", name="br0", mac="02:00:00:00:00:09", mtu=1500)
    plan = diff(EMPTY, State([Record(text="{}", source="/lab.toml"), bridge, *rules, *taps]))
    assert [[action.key.partition(":")[0] for action in step] for step in plan.steps] == steps


def test_the_compiler_is_a_function() -> None:
    topology = random_topology(random.Random(1))
    facts = Facts(uplinks=(Uplink(name="eth0", mtu=1500),))
    first, second = (compile(topology, facts, Path("/run/x"), "netorch_x") for _ in range(2))
    assert first == second
    assert isinstance(next(iter(first)), Record)
