"""What a model says, and how good that is."""
