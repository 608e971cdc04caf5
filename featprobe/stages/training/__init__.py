"""From caches, or images, to scored heads."""
