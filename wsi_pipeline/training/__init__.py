"""Training: recipes and patients in, measured bundles out."""
