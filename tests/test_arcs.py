"""Paths are put in order; what the arcs are is seen in the polygons."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.export.polygons.arcs import order_paths


@given(st.integers(0, 30).flatmap(lambda n: st.permutations(range(n))), st.sets(st.integers(0, 29)))
def test_paths_and_rings_are_put_in_a_row(permutation, cut):
    """Any permutation, some of whose links are cut, is made of rings and paths."""
    following = np.array(permutation, np.int32)
    following[[i for i in cut if i < len(following)]] = -1
    order, bounds, is_ring = order_paths(following)
    assert sorted(order.tolist()) == list(range(len(following)))
    for (begin, end), closed in zip(itertools.pairwise(bounds.tolist()), is_ring, strict=True):
        path = order[begin:end].tolist()
        assert following[path[:-1]].tolist() == path[1:]
        assert following[path[-1]] == (min(path) if closed else -1)
        assert not closed or path[0] == min(path)
        assert closed or path[0] not in following
