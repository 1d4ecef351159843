"""MT-Bench: 80 questions of two turns, the answers of a model, a judge's ratings of them, and the scores."""
