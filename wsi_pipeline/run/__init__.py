"""A run: from a slide, image or volume and a bundle to the folder that users look into."""
