"""Checkpoints at listed steps: of weights alone, or of the full state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.errors import UserError
from sa_jax.training import checkpoints
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.step import TrainState
from tests.training.states import flip


def tree(value: float) -> TrainState:
    """A state of 5 parameters with two moments, all of one value."""
    leaf = jnp.full(5, value, jnp.float32)
    return TrainState(jnp.int32(value), {"w": leaf}, {"mu": leaf, "nu": leaf})


def abstract_tree() -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree(0))


def save_all(folder, **arguments) -> list[int]:
    """Saves steps 0 to 10 as the loop does; returns the steps it saved at."""
    saved = []
    with RunCheckpointer(folder, **arguments) as checkpointer:
        for step in range(11):
            if checkpointer.should_save(step):
                checkpointer.save(step, tree(step + 1 / 3))
                saved.append(step)
    return saved


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("listed, dtype", [("weights", "float32"), ("weights_bf16", "bfloat16")])
def test_listed_steps_can_be_weights_alone(tmp_path, listed, dtype):
    schedule = {"steps": (1, 4, 7), "interval": 4, "keep_interval": 1, "listed": listed, "last": 10}
    assert save_all(tmp_path, **schedule) == [1, 4, 7, 8, 10]
    assert names(tmp_path) == ["step_000010", *(f"weights_{step:06d}" for step in (1, 4, 7))]
    assert checkpoints.saved_steps(tmp_path) == [1, 4, 7, 10]
    # A run goes on from the newest full state, children start from any.
    step, state = RunCheckpointer(tmp_path, **schedule).restore(abstract_tree())
    assert step == 10 and np.all(state.opt_state["nu"] == np.float32(10 + 1 / 3))
    params = checkpoints.load_subtree(tmp_path, 4, "params", abstract_tree().params)
    expected = np.float32(jnp.asarray(4 + 1 / 3, dtype))
    assert params["w"].dtype == np.float32 and np.all(params["w"] == expected)
    # Weights are digested too.
    data = max((tmp_path / "weights_000004").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match="step 4 is corrupt: .*its bytes are not those saved"):
        checkpoints.load_subtree(tmp_path, 4, "params", abstract_tree().params)
    with pytest.raises(UserError, match="no checkpoint of step 5; there are steps 1, 4, 7, 10"):
        checkpoints.load_subtree(tmp_path, 5, "params", abstract_tree().params)


def test_a_listed_full_state_stays_where_a_resume_lists_weights(tmp_path):
    save_all(tmp_path, steps=(1,), listed="full", last=1)
    with RunCheckpointer(
        tmp_path, steps=(1, 4), listed="weights", interval=2, keep_interval=1
    ) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, tree(step))
    assert names(tmp_path) == ["step_000001", "step_000006", "weights_000004"]


def test_a_stopped_run_saves_its_full_state_at_a_step_of_weights(tmp_path):
    arguments = {"steps": (2,), "listed": "weights", "last": 9, "keep_interval": 1}
    with RunCheckpointer(tmp_path, **arguments) as checkpointer:
        assert checkpointer.save(2, tree(2))
        checkpointer.wait()
        assert names(tmp_path) == ["weights_000002"]
        assert checkpointer.save(2, tree(2), wait=True)
        assert not checkpointer.save(2, tree(2), wait=True)
    assert names(tmp_path) == ["step_000002", "weights_000002"]
    assert RunCheckpointer(tmp_path, **arguments).restore(abstract_tree())[0] == 2
