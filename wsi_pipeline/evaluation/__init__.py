"""How well a prediction agrees with the truth, whatever files the two are."""
