import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.parallel import rules
from sa_jax.parallel.mesh import check_divisible, check_rows, make_mesh
from sa_jax.training.start import abstract_params
from sa_jax.training.step import init_state
from tests.toys import CONFIG

GOLDEN = """\
embed/embedding                     ('tensor', 'fsdp')
final_norm/scale                    ()
layers/attention/k/kernel           (None, 'fsdp', 'tensor')
layers/attention/k/lora_a           (None, 'fsdp', None)
layers/attention/k/lora_b           (None, None, 'tensor')
layers/attention/o/kernel           (None, 'tensor', 'fsdp')
layers/attention/o/lora_a           (None, 'tensor', None)
layers/attention/o/lora_b           (None, None, 'fsdp')
layers/attention/q/kernel           (None, 'fsdp', 'tensor')
layers/attention/q/lora_a           (None, 'fsdp', None)
layers/attention/q/lora_b           (None, None, 'tensor')
layers/attention/v/kernel           (None, 'fsdp', 'tensor')
layers/attention/v/lora_a           (None, 'fsdp', None)
layers/attention/v/lora_b           (None, None, 'tensor')
layers/attention_norm/scale         ()
layers/mlp/down/kernel              (None, 'tensor', 'fsdp')
layers/mlp/down/lora_a              (None, 'tensor', None)
layers/mlp/down/lora_b              (None, None, 'fsdp')
layers/mlp/gate/kernel              (None, 'fsdp', 'tensor')
layers/mlp/gate/lora_a              (None, 'fsdp', None)
layers/mlp/gate/lora_b              (None, None, 'tensor')
layers/mlp/up/kernel                (None, 'fsdp', 'tensor')
layers/mlp/up/lora_a                (None, 'fsdp', None)
layers/mlp/up/lora_b                (None, None, 'tensor')
layers/mlp_norm/scale               ()
lm_head/kernel                      ('fsdp', 'tensor')
"""


def test_every_parameter_has_its_place():
    params = abstract_params(Llama(CONFIG, lora=LoraConfig(4, 8.0)))
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = rules.path_string(path)
        lines.append(f"{name:35} {tuple(rules.partition_spec(name, leaf.ndim))}\n")
    assert "".join(sorted(lines)) == GOLDEN


def test_optimizer_moments_lie_beside_their_parameters():
    params = abstract_params(Llama(CONFIG))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(lambda p: init_state(p, tx), params)
    specs = rules.partition_specs(state)
    adam = specs.opt_state[1][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(specs.params)
    assert jax.tree.leaves(adam.nu) == jax.tree.leaves(specs.params)
    assert adam.count == specs.step == P()


def test_a_path_without_a_rule_or_with_two_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="0 partition rules match 'layers/attention/r/kernel'"):
        rules.partition_spec("layers/attention/r/kernel", 3)
    monkeypatch.setattr(rules, "PARTITION_RULES", (*rules.PARTITION_RULES, ("kernel$", P())))
    with pytest.raises(ValueError, match="2 partition rules match"):
        rules.partition_spec("layers/attention/q/kernel", 3)


def test_mesh_fills_one_axis_and_names_what_does_not_fit():
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UsageError, match="8 devices"):
        make_mesh(data=1, fsdp=3, tensor=1)
    with pytest.raises(UsageError, match="at most one may be -1"):
        make_mesh(data=-1, fsdp=-1)


class Tpu:
    """A device that says which slice it belongs to."""

    platform, device_kind, process_index = "tpu", "TPU v6 lite", 0

    def __init__(self, number):
        self.id, self.slice_index = number, 1 - number // 4
        self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0


def test_slices_lie_along_the_slowest_part_of_data():
    mesh = make_mesh(data=2, fsdp=-1, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert [[d.id for d in row] for row in mesh.devices[..., 0]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UsageError, match="fsdp=3 tensor=1 slices=2 does not use 8 devices"):
        make_mesh(fsdp=3, slices=2)
    with pytest.raises(UsageError, match="tensor=3 does not use 8 devices: 3 does not divide 8"):
        make_mesh(tensor=3)
    # Devices that were listed in the order of their numbers, not of their slices.
    tpus = [Tpu(number) for number in range(8)]
    slices = [[d.slice_index for d in part.flat] for part in make_mesh(1, 4, 1, tpus, 2).devices]
    assert slices == [[0] * 4, [1] * 4]
    with pytest.raises(UsageError, match=r"slices=1, but there are 2 .*slices=2"):
        make_mesh(devices=tpus)


def test_a_mesh_that_does_not_divide_the_model_says_which_sizes_would():
    mesh = make_mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(UsageError) as refused:
        check_mesh(CONFIG, mesh)
    assert str(refused.value) == (
        "config.mesh: 4 key/value heads do not divide by tensor = 8; "
        "tensor may be 1, 2, 4 on these 8 devices"
    )


def test_rows_that_do_not_divide_name_sizes_of_the_devices_and_the_nearest_numbers():
    mesh = make_mesh(data=2, fsdp=4)
    for rows, said in (
        (30, "data x fsdp may be 1, 2 on these 8 devices, or take 24 or 32 rows"),
        (6, "data x fsdp may be 1, 2 on these 8 devices, or take 8 rows"),
    ):
        with pytest.raises(UsageError, match=f"{rows} rows do not divide by .* = 8; {said}$"):
            check_divisible(mesh, ("data", "fsdp"), rows, "rows")


def test_arrays_are_really_cut():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    params = abstract_params(Llama(CONFIG))
    placed = jax.jit(
        lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape), params),
        out_shardings=rules.shardings(mesh, params),
    )()
    kernel = placed["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // 4, 48 // 2)
    assert len({s.device for s in kernel.addressable_shards}) == len(jax.devices()) == 8
    assert np.asarray(kernel).shape == (3, 32, 48)


def test_a_mesh_on_which_xla_mixes_up_rows_is_refused():
    """Where this fails because the product is right, XLA has been mended: `check_rows` can go."""
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(UsageError, match=r"data=2 fsdp=2 tensor=2: .*such as fsdp=4 tensor=1"):
        check_rows(mesh.shape)
    for sizes in ((1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 4, 1), (4, 1, 2)):
        check_rows(make_mesh(*sizes).shape)

    rows = NamedSharding(mesh, P(*rules.BATCH_SPEC, None, "tensor"))
    rng = np.random.default_rng(0)
    x_bsd, w_dn = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 8, 48), (48, 48)))

    def product(x_bsd, w_dn):
        return (x_bsd.reshape(64, 48) @ w_dn).reshape(8, 8, 48)

    placed = jax.device_put((x_bsd, w_dn), (rows, NamedSharding(mesh, P("tensor", "fsdp"))))
    errors_bsd = np.abs(jax.jit(product, out_shardings=rows)(*placed) - product(x_bsd, w_dn))
    assert np.flatnonzero(errors_bsd.max((1, 2)) > 1).tolist() == [2, 3, 4, 5]
