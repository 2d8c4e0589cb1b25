"""What a path names, and files that appear whole and outlast a power cut."""
