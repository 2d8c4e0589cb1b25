"""Where on a slide there is tissue, and which patches lie over it."""
