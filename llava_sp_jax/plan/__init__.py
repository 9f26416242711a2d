"""Planning for absent chips: compile the real step from shapes, read its schedule, predict."""
