"""The peers that are timed beside lrjax compute the same gradients."""

import jax
import numpy as np
import pytest

from experiments.gradcheck import max_error
from experiments.paper import peers
from experiments.vgg16_stack import init, parse_method


@pytest.mark.slow
def test_accumulated_gradients_are_the_batchs():
    few = [(k[..., :4] if i == 0 else k[:, :, :4, :4], b[:4]) for i, (k, b) in
           enumerate(init(jax.random.key(0)))]  # fmt: skip
    images = jax.random.normal(jax.random.key(1), (peers.BATCH, 32, 32, 3))
    run = peers.accumulated(few, images)
    expected = jax.jit(parse_method("column").gradient())(few, images)
    assert max_error(run(), expected) <= 1e-5
    assert max_error(run(), expected) <= 1e-5, "a second run starts from zero"


@pytest.mark.parametrize("size", [peers.QUICK, peers.FULL])
def test_peers_by_rows_have_no_more_blocks_than_the_last_map_has_rows(size):
    by_rows = [peer for peer in peers.peers_of(size) if "/" in peer]
    assert [peers.label(peer) for peer in by_rows] == [
        f"lrjax, 2PS in {size['blocks']} blocks",
        f"lrjax, stream in {size['blocks']} blocks",
    ]
    arguments = jax.eval_shape(lambda: peers.arrays(size["side"]))
    for peer in by_rows:
        assert jax.eval_shape(parse_method(peer).gradient(), *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not peers.has_torch(), reason="needs PyTorch: pip install 'lrjax[peers]'")
@pytest.mark.parametrize("peer", peers.TORCH_PEERS)
def test_torchs_gradients_are_jaxs(peer):
    with jax.enable_x64(True):
        params, images = jax.tree.map(lambda x: x.astype("float64"), peers.arrays(32))
        expected = jax.jit(parse_method("column").gradient())(params, images)
        found = peers.torch_step(peer, params, images)()
        # The loss itself is computed in float32.
        assert max_error(found, jax.tree.map(np.asarray, expected)) <= 1e-7
