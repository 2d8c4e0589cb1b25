"""From a mask to the polygons of its regions, block by block and exact across borders.

`components` numbers the 4-connected regions, `arcs` follows the borders between them, `simplify`
takes vertices away, `build` puts the arcs around each region together; `trace` does it in threads.
`neighbours` measures along arcs what lies around each region.

    x 0   1   2   3
  y 0 +-------+          The mask [[1, 1, 0], [1, 2, 0]]: region 1 (class 1), region 2 (class 2)
      | 1   1 |          and background, 0. Three of these meet at each junction, J. So there are
    1 |   +---J          three arcs: 1 | 0 on the left, 2 | 1 through the middle, 2 | 0 below. The
      | 1 | 2 |          middle one is walked by both regions, once in each direction, so no
    2 +---J---+          simplification of it can leave a gap or an overlap.

Example:
    >>> import numpy as np
    >>> from wsi_pipeline.export.polygons.build import polygons
    >>> from wsi_pipeline.export.polygons.trace import find_outlines, trace_mask
    >>> from wsi_pipeline.geometry import iter_blocks
    >>> mask = np.array([[1, 1, 0], [1, 2, 0]], np.uint8)
    >>> components = trace_mask(mask, iter_blocks(mask.shape, (2, 2)))
    >>> outlines = find_outlines(mask, components, block_size=2)
    >>> arcs = outlines.arcs
    >>> for right, left, a, b in zip(arcs.right, arcs.left, arcs.bounds, arcs.bounds[1:]):
    ...     print(right, left, arcs.xy[a:b].tolist())
    1 0 [[1, 2], [0, 2], [0, 0], [2, 0], [2, 1]]
    2 1 [[1, 2], [1, 1], [2, 1]]
    2 0 [[2, 1], [2, 2], [1, 2]]
    >>> print(*polygons(outlines), sep="; ")
    POLYGON ((0 0, 2 0, 2 1, 1 1, 1 2, 0 2, 0 0)); POLYGON ((1 1, 2 1, 2 2, 1 2, 1 1))
"""
