"""Records of what scored heads find."""
