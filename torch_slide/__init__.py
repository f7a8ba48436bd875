"""Output layers of a hundred thousand to a hundred million neurons, trained on the few that matter."""
