"""A demo that needs no download: procedural endoscopy scenes and tiny models that can learn them."""
