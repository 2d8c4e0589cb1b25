"""From a mask to the polygons of its regions, block by block and exact across borders."""
