"""Operations on checkpoints and models that keep what they compute, or say how it changes."""
