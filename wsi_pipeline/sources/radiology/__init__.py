"""Planar images and volumes: what opens, its values and its geometry."""
