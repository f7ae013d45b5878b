import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints_tools import (
    CheckpointError,
    ChecksumError,
    ConfigError,
    LeafMismatchError,
    ManifestError,
    NotACheckpointError,
    restore,
)
from checkpoints_tools.tree import flatten

LEAF = "layers/attn/q_proj/kernel"


def edit_manifest(directory, change):
    file = directory / "manifest.json"
    contents = json.loads(file.read_text())
    change(contents)
    file.write_text(json.dumps(contents))


@pytest.mark.parametrize("verify", [False, True])
def test_dtype_casts_every_leaf_with_one_rounding(converted, verify):
    stored = flatten(restore(converted).params)
    cast = flatten(restore(converted, dtype="bfloat16", verify=verify).params)
    for path, leaf in cast.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(stored[path]).astype(jnp.bfloat16), err_msg=path)


def test_leaves_have_the_sharding_asked_for(converted):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    for leaf in jax.tree.leaves(restore(converted, sharding=everywhere).params):
        assert leaf.sharding == everywhere


@pytest.mark.parametrize("options", [{}, {"verify": True, "dtype": "bfloat16"}])
def test_shardings_may_be_a_prefix_of_the_tree(converted, options):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    whole, layers = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("x"))
    params = restore(converted, sharding={"embed": whole, "layers": layers, "final_norm": whole}, **options).params
    assert params["layers"]["attn"]["q_proj"]["kernel"].sharding == layers
    assert params["embed"]["embedding"].sharding == whole


def test_sharding_of_another_tree_is_refused(converted):
    whole = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
    with pytest.raises(CheckpointError, match="sharding does not fit"):
        restore(converted, sharding={"decoder": whole})
    with pytest.raises(CheckpointError, match="sharding holds 'cpu' at embed/embedding"):
        restore(converted, sharding="cpu")


def test_sharding_with_more_axes_than_a_leaf_is_refused_by_path(converted):
    too_deep = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec(None, "x"))
    with pytest.raises(CheckpointError, match="sharding at final_norm/scale does not fit its shape"):
        restore(converted, sharding=too_deep)


def test_sharding_that_does_not_divide_an_axis_is_refused_by_path(converted):
    mesh = jax.sharding.AbstractMesh((7,), ("x",))
    with pytest.raises(CheckpointError, match="sharding at .* does not fit its shape"):
        restore(converted, sharding=NamedSharding(mesh, PartitionSpec("x")))


@pytest.mark.parametrize("dtype", ["int8", "floaty"])
def test_dtype_that_is_not_floating_is_refused(converted, dtype):
    with pytest.raises(CheckpointError, match=f"dtype is '?{dtype}"):
        restore(converted, dtype=dtype)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(NotACheckpointError, match="nowhere"):
        restore(tmp_path / "nowhere")


def test_missing_manifest_means_unfinished(converted):
    (converted / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="no finished conversion"):
        restore(converted)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format_version": 1}', '{"format_version": 1, "leaves": []}']
)
def test_damaged_manifest_is_refused(converted, text):
    (converted / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match="damaged"):
        restore(converted)


def test_manifest_of_another_version_is_refused(converted):
    edit_manifest(converted, lambda manifest: manifest.update(format_version=99))
    with pytest.raises(ManifestError, match="version 99"):
        restore(converted)


def test_missing_unexpected_and_wrong_shape_leaves_are_all_named(converted):
    def change(manifest):
        del manifest["leaves"]["embed/embedding"]
        manifest["leaves"]["layers/extra"] = manifest["leaves"][LEAF]
        manifest["leaves"]["final_norm/scale"]["shape"] = [65]

    edit_manifest(converted, change)
    with pytest.raises(LeafMismatchError) as caught:
        restore(converted)
    for part in ("missing: embed/embedding", "unexpected: layers/extra", "final_norm/scale: expected [64], found [65]"):
        assert part in str(caught.value)


def test_stored_leaf_of_another_dtype_is_named(converted):
    edit_manifest(converted, lambda manifest: manifest["leaves"][LEAF].update(dtype="float16"))
    with pytest.raises(LeafMismatchError, match=f"{LEAF}: expected .* float16, found .* float32"):
        restore(converted)


def test_stored_leaves_missing_from_orbax_are_named(tmp_path, converted):
    import orbax.checkpoint as ocp

    params = restore(converted).params
    del params["final_norm"]
    shutil.rmtree(converted / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(converted / "params", params)
    with pytest.raises(LeafMismatchError, match="missing: final_norm/scale"):
        restore(converted)


def test_absent_arrays_are_reported(converted):
    shutil.rmtree(converted / "params")
    with pytest.raises(LeafMismatchError, match="params cannot be read"):
        restore(converted)


def test_damaged_arrays_are_reported(converted):
    largest = max((f for f in (converted / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    contents = bytearray(largest.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 64] = bytes(64)
    largest.write_bytes(contents)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        restore(converted, verify=True)


def test_verify_finds_bytes_that_were_not_written(converted):
    edit_manifest(converted, lambda manifest: manifest["leaves"][LEAF].update(crc32="00000000"))
    restore(converted)
    with pytest.raises(ChecksumError, match=LEAF):
        restore(converted, verify=True)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_damaged_config_is_refused(converted, text):
    if text is None:
        (converted / "config.json").unlink()
    else:
        (converted / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        restore(converted)


def test_config_of_another_model_is_refused(converted):
    file = converted / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(LeafMismatchError, match=r"mlp/up_proj/kernel: expected \[2, 64, 128\], found \[2, 64, 96\]"):
        restore(converted)
