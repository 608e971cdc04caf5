"""From images to caches."""
