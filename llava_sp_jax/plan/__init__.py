"""Plans for absent chips: compiles the real step from shapes and predicts memory and time."""
